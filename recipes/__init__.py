"""Supervision recipes, one file a method; imported as stbench.recipes."""

if __name__ != "stbench.recipes":
    raise ImportError("import stbench.recipes, not recipes: the folder is only a package under stbench")
