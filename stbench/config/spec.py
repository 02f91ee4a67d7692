"""What a run is: the validated specification, its overrides (`--set a.b=c`), and its hashes. Knows nothing of
training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from stbench.core.errors import UserError
from stbench.data.spec import DataSpec, SpecModel

Beta = Annotated[float, Field(ge=0, lt=1)]


Time = Annotated[float, Field(ge=0, le=1)]


Precision = Literal["fp32", "tf32", "bf16"]


class BackboneSpec(SpecModel):
    """Family, size and the options that differ from the size's preset."""

    name: str
    size: str
    options: dict[str, Any] = Field(default_factory=dict)


class RecipeSpec(SpecModel):
    """A method, the options the user set, and all options with their defaults."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    resolved: dict[str, Any] = Field(default_factory=dict)
    needs: str = ""


class TrainSpec(SpecModel):
    """How every stage is trained. `steps` is the length of the last stage."""

    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    accumulate: int = Field(default=1, gt=0)
    lr: float = Field(gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_eps: float = Field(default=1e-8, gt=0)
    warmup: int = Field(default=0, ge=0)
    clip: float | None = Field(default=None, gt=0)
    ema_decay: float = Field(ge=0, lt=1)
    ema_warmup: bool = False
    label_drop: float = Field(ge=0, lt=1)
    precision: Precision = "fp32"
    compile: bool = False
    save_every: int = Field(default=100, gt=0)


class EvalSpec(SpecModel):
    """When and how the EMA weights are evaluated. `steps` is the number of function evaluations a sample
    costs; `extras` says where the guidance grid and the costly metrics are due: at the last point, at all, or
    at these steps and the last.
    """

    points: list[int]
    samples: int = Field(ge=10)
    labels: Literal["balanced", "random"] = "balanced"
    seed: int = Field(default=0, ge=0)
    sampler: str
    steps: int = Field(gt=0)
    guidance: list[float] = Field(default_factory=lambda: [1.0])
    interval: tuple[Time, Time] = (0.0, 1.0)
    channels: int | None = Field(default=None, gt=0)
    extras: Literal["last", "all"] | list[int] = "last"


class InitSpec(SpecModel):
    """An official checkpoint that the first stage's student starts from; only `sha256` is in a hash."""

    file: str
    """Absolute."""
    sha256: str
    """Of the network's tensors, whatever lies beside them."""
    weights: Literal["raw", "ema"] = "ema"
    original: str | None = None
    """Repository it is from, where the user said so."""
    heads: int | None = None
    classes: int
    source: str
    """What it was found to be, in words."""


class RunSpec(SpecModel):
    """One run, fully resolved."""

    dataset: str
    data: DataSpec | None = None
    """For data sets that are read from a path."""
    backbone: BackboneSpec
    objective: str
    recipe: RecipeSpec
    train: TrainSpec
    eval: EvalSpec
    seed: int = Field(ge=0)
    init: InitSpec | None = None


def revalidate(stored: Mapping[str, Any], where: Path) -> RunSpec:
    """The specification a run folder holds. Raises UserError where it does not fit this version."""
    try:
        return RunSpec(**stored)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{where}/spec.json: bad value for '{place}': {first['msg'].lower()}; run it again from the start"
        ) from error
