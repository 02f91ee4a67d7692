"""The public conformance suite: golden numbers, and checks for backbones and recipes."""

from stbench.testing.conformance import check_backbone
from stbench.testing.conformance_recipes import check_recipe

__all__ = ["check_backbone", "check_recipe"]
