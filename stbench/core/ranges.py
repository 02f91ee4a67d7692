"""Types of option values with their ranges, for the signatures of recipes and backbones and for the spec.

The range of an option is stated here, where its type is declared, and nowhere else. NaN and infinity are
always refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from stbench.core import limits

PositiveReal = Annotated[float, Field(gt=0, le=limits.LARGEST)]
NonNegativeReal = Annotated[float, Field(ge=0, le=limits.LARGEST)]
Logit = Annotated[float, Field(ge=-20, le=20)]
"""A location on the scale log(p/(1-p))."""
LogitScale = Annotated[float, Field(gt=0, le=20)]
"""A standard deviation on that scale."""
Fraction = Annotated[float, Field(ge=0, le=1)]
"""A probability, or a time in [0, 1]."""
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
"""A decay, or a probability that must leave something."""
Guidance = Annotated[float, Field(ge=1, le=limits.MAX_GUIDANCE)]
"""Scale w of u + w (c - u); 1 is no guidance."""

Steps = Annotated[int, Field(ge=1, le=limits.MAX_STEPS)]
StepsOrZero = Annotated[int, Field(ge=0, le=limits.MAX_STEPS)]
SamplerSteps = Annotated[int, Field(ge=1, le=limits.MAX_SAMPLER_STEPS)]
BatchSize = Annotated[int, Field(ge=1, le=limits.MAX_BATCH)]
Seed = Annotated[int, Field(ge=0, le=limits.MAX_SEED)]

Block = Annotated[int, Field(ge=0, lt=limits.MAX_DEPTH)]
"""0-based index of a block; `BackboneInfo.block` checks that the network has it."""
Depth = Annotated[int, Field(ge=1, le=limits.MAX_DEPTH)]
Width = Annotated[int, Field(ge=1, le=limits.MAX_WIDTH)]
"""A width in channels, or the number of attention heads into which it is divided."""
Pixels = Annotated[int, Field(ge=1, le=limits.MAX_PIXELS)]
"""A height or width of an image, a latent or a patch."""

Name = Annotated[str, Field(min_length=1, max_length=limits.MAX_NAME)]
"""A name or a path."""


def option_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function or class by name, without ``*args`` and ``**options``."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {k: p for k, p in inspect.signature(function).parameters.items() if p.kind not in several}
