"""The run specification: every setting of one run, validated and with the values that are actually used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from stbench.core import limits
from stbench.core.errors import UserError
from stbench.core.ranges import (
    BatchSize,
    Fraction,
    FractionBelowOne,
    Guidance,
    Name,
    NonNegativeReal,
    PositiveReal,
    SamplerSteps,
    Seed,
    Steps,
    StepsOrZero,
    Width,
)
from stbench.data.spec import DataSpec, SpecModel
from stbench.runs.records import size_name

Precision = Literal["fp32", "tf32", "bf16"]


class BackboneSpec(SpecModel):
    """A backbone: its family, its size and its constructor options."""

    name: str
    size: str
    """The preset that the options start from."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options set by the user that differ from the size's preset."""
    effective: dict[str, Any] = Field(default_factory=dict)
    """All constructor options that the data set and the objective do not decide."""

    @property
    def size_name(self) -> str:
        """The size, or "custom" if the options change the shape that it stands for."""
        return size_name(self.size, self.options)


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

    steps: Steps
    batch: BatchSize
    """Images per optimiser step."""
    accumulate: BatchSize = 1
    """Micro-batches per optimiser step."""
    lr: PositiveReal
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999)
    weight_decay: NonNegativeReal = 0.0
    adam_eps: PositiveReal = 1e-8
    warmup: StepsOrZero = 0
    """Steps of linear learning-rate warm-up."""
    clip: PositiveReal | None = None
    """Maximum gradient norm; None disables clipping."""
    ema_decay: FractionBelowOne
    ema_warmup: bool = False
    """Whether the EMA decay after n updates is min(ema_decay, (1+n)/(10+n))."""
    label_drop: FractionBelowOne
    """Probability that a label is replaced by the null label."""
    precision: Precision = "fp32"
    compile: bool = False
    save_every: Steps = 100
    """Steps between saved training states."""


class EvalSpec(SpecModel):
    """When and how the EMA weights are evaluated."""

    points: Annotated[list[Steps], Field(max_length=limits.MAX_ITEMS)]
    """Steps of the last stage after which it is evaluated."""
    samples: int = Field(ge=10, le=limits.MAX_SAMPLES)
    labels: Literal["balanced", "random"] = "balanced"
    seed: Seed = 0
    sampler: str
    steps: SamplerSteps
    """Function evaluations per sample (for Heun: sampler steps)."""
    guidance: Annotated[list[Guidance], Field(max_length=100)] = Field(default_factory=lambda: [1.0])
    """Guidance scales; 1.0 (no guidance) is always among them."""
    interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Flow-equivalent times between which guidance is on."""
    channels: Width | None = None
    """Number of leading latent channels that are guided; None guides all of them."""
    extras: Literal["last", "all"] | Annotated[list[Steps], Field(max_length=limits.MAX_ITEMS)] = "last"
    """Where the guidance grid and the slow metrics are evaluated: at the last point, at all points, or at
    these steps and the last one."""
    extractor: Name | Literal[""] = ""
    """Feature extractor: "inception-v3-compat", "dinov2", "timm/MODEL", "torchvision/MODEL", or a registered
    one; "" for the data set's, in records of earlier versions."""
    extractor_file: Name | None = None
    """Absolute path of its weights; None for those in the local caches, or its own."""
    extractor_sha256: Name | None = None
    """First digits of the sha256 of that file, if the user gave them."""
    extractor_batch: BatchSize = 250
    """Images that the extractor measures at a time. It is not part of the protocol."""


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
    seed: Seed
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
