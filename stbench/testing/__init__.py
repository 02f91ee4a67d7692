"""The public conformance suite: golden numbers, and checks for backbones and recipes."""

from stbench.testing.check_backbone import check_backbone
from stbench.testing.check_recipe import check_recipe

__all__ = ["check_backbone", "check_recipe"]
