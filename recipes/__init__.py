"""Recipes, one file per publication. Import them as `stbench.recipes`."""

if __name__ != "stbench.recipes":
    raise ImportError("import stbench.recipes instead of recipes, which is only a package under stbench")
