"""Conformance checks for authors of plug-ins, and the golden checks against published implementations.

from stbench.testing import check_backbone, check_recipe
check_backbone("my-backbone")
check_recipe("my-recipe")
"""

from stbench.testing.check_backbone import check_backbone
from stbench.testing.check_recipe import check_recipe

__all__ = ["check_backbone", "check_recipe"]
