"""Backbone families, one file each. Import them as `stbench.backbones`."""

if __name__ != "stbench.backbones":
    raise ImportError("import stbench.backbones instead of backbones, which is only a package under stbench")
