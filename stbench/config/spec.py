"""The run specification: every setting of one run, validated and with the values that are actually used."""

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
    """A backbone: its family, its size and its constructor options."""

    name: str
    size: str
    options: dict[str, Any] = Field(default_factory=dict)
    """Options set by the user that differ from the size's preset."""
    effective: dict[str, Any] = Field(default_factory=dict)
    """All constructor options that the data set and the objective do not decide."""


class RecipeSpec(SpecModel):
    """A recipe and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    """Options set by the user that differ from the defaults for this backbone. They label the row."""
    effective: dict[str, Any] = Field(default_factory=dict)
    """All options with the values that are used."""
    needs: str = ""
    """What the run needs from outside the model, such as a pretrained encoder; "" for nothing."""


class TrainSpec(SpecModel):
    """How each stage is trained. `steps` is the length of the last stage."""

    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    """Images per optimiser step."""
    accumulate: int = Field(default=1, gt=0)
    """Micro-batches per optimiser step."""
    lr: float = Field(gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_eps: float = Field(default=1e-8, gt=0)
    warmup: int = Field(default=0, ge=0)
    """Steps of linear learning-rate warm-up."""
    clip: float | None = Field(default=None, gt=0)
    """Maximum gradient norm; None disables clipping."""
    ema_decay: float = Field(ge=0, lt=1)
    ema_warmup: bool = False
    """Whether the EMA decay after n updates is min(ema_decay, (1+n)/(10+n))."""
    label_drop: float = Field(ge=0, lt=1)
    """Probability that a label is replaced by the null label."""
    precision: Precision = "fp32"
    compile: bool = False
    save_every: int = Field(default=100, gt=0)
    """Steps between saved training states."""


class EvalSpec(SpecModel):
    """When and how the EMA weights are evaluated."""

    points: list[int]
    """Steps of the last stage after which it is evaluated."""
    samples: int = Field(ge=10)
    labels: Literal["balanced", "random"] = "balanced"
    seed: int = Field(default=0, ge=0)
    sampler: str
    steps: int = Field(gt=0)
    """Function evaluations per sample (for Heun: sampler steps)."""
    guidance: list[float] = Field(default_factory=lambda: [1.0])
    """Guidance scales; 1.0 (no guidance) is always among them."""
    interval: tuple[Time, Time] = (0.0, 1.0)
    """Flow-equivalent times between which guidance is on."""
    channels: int | None = Field(default=None, gt=0)
    """Number of leading latent channels that are guided; None guides all of them."""
    extras: Literal["last", "all"] | list[int] = "last"
    """Where the guidance grid and the slow metrics are evaluated: at the last point, at all points, or at
    these steps and the last one."""


class InitSpec(SpecModel):
    """An official checkpoint that the first stage starts from. Only `sha256` enters a hash."""

    file: str
    """Absolute path."""
    sha256: str
    """Hash of the network's tensors, whatever else the file contains."""
    weights: Literal["raw", "ema"] = "ema"
    original: str | None = None
    """Repository that wrote the file, if the user named it."""
    heads: int | None = None
    """Attention heads, if the user gave them."""
    classes: int
    source: str
    """Description of what the file was recognised as."""


class RunSpec(SpecModel):
    """All settings of one run, resolved."""

    dataset: str
    data: DataSpec | None = None
    """Only for data sets that are read from a path."""
    backbone: BackboneSpec
    objective: str
    recipe: RecipeSpec
    train: TrainSpec
    eval: EvalSpec
    seed: int = Field(ge=0)
    init: InitSpec | None = None


def stored_spec(stored: Mapping[str, Any], where: Path) -> RunSpec:
    """The specification stored in a run folder.

    Raises:
        UserError: If it does not fit this version of stbench.
    """
    try:
        return RunSpec(**{name: stored[name] for name in RunSpec.model_fields if name in stored})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{where}/spec.json: invalid value for '{place}': {first['msg'].lower()}; delete the folder and "
            f"train the run again"
        ) from error
