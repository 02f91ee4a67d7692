"""Backbone families, one file each; imported as stbench.backbones."""

if __name__ != "stbench.backbones":
    raise ImportError("import stbench.backbones, not backbones: the folder is only a package under stbench")
