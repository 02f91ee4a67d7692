"""The run specification: every setting of one run, validated and with the values that are actually used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

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


def _compile_word(value: Any) -> Any:
    """True and False, which earlier versions stored and YAML makes of on and off, as words."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


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
    posthoc_ema: bool = False
    """Whether the last stage keeps a second average, from which `stbench evaluate --ema-decay` reconstructs
    other EMA decays. It changes no weight."""
    label_drop: FractionBelowOne
    """Probability that a label is replaced by the null label."""
    precision: Precision = "fp32"
    teacher_precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of teachers and encoders; bf16 only with precision bf16. Under tf32 they follow it."""
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_compile_word)] = "off"
    """Whether the blocks of student and teachers are compiled; "auto" does so where it pays back."""
    checkpointing: bool = False
    """Whether the blocks' activations are recomputed in the backward pass, which saves memory."""
    save_every: Steps = 100
    """Steps between saved training states."""


def _split(value: object) -> object:
    """Split a text at its commas."""
    return value.split(",") if isinstance(value, str) else value


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
    guides: Annotated[str, Field(max_length=limits.MAX_NAME)] = ""
    """Guides with which every scale of the grid is also evaluated, such as "head:1.4@0-0.7"; see
    docs/guidance.md."""
    extras: Literal["last", "all"] | Annotated[list[Steps], Field(max_length=limits.MAX_ITEMS)] = "last"
    """Where the guidance grid and the slow metrics are evaluated: at the last point, at all points, or at
    these steps and the last one."""
    metrics: Annotated[list[Name], Field(max_length=limits.MAX_ITEMS), BeforeValidator(_split)] = Field(
        default_factory=list
    )
    """Metrics of plug-ins, which are computed at every evaluation point, as a list or separated by commas."""
    extractor: Name | Literal[""] = ""
    """Feature extractor: "inception-v3-compat", "dinov2", "timm/MODEL", "torchvision/MODEL", or a registered
    one; "" for the data set's, in records of earlier versions."""
    extractor_file: Name | None = None
    """Absolute path of its weights; None for those in the local caches, or its own."""
    extractor_sha256: Name | None = None
    """First digits of the sha256 of that file, if the user gave them."""
    extractor_batch: BatchSize = 250
    """Images that the extractor measures at a time. It is not part of the protocol."""
    fdr: Annotated[list[Name], BeforeValidator(_split), Field(max_length=limits.MAX_ITEMS)] = Field(
        default_factory=list
    )
    """Feature extractors whose Frechet distances enter FDr, as a list or separated by commas; "fdr6" stands
    for the six published ones."""
    fdr_files: dict[Name, Name] = Field(default_factory=dict)
    """Absolute paths of weights of extractors in `fdr`, for those that are not in the local caches."""


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
    objective_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the objective that differ from its defaults. Together with the name they label the table."""
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
