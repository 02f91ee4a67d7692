"""What a run is: the validated specification, its overrides (`--set a.b=c`), and its hashes. Knows nothing of
training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stbench.contracts import Backbone, BackboneInfo, Objective, Stage
from stbench.errors import UserError
from stbench.registry import (
    BACKBONES,
    OBJECTIVES,
    RECIPES,
    lookup,
    plugin_hash,
)

Beta = Annotated[float, Field(ge=0, lt=1)]
Time = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["fp32", "tf32", "bf16"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BackboneSpec(_Model):
    """Family, size and the options that differ from the size's preset."""

    name: str
    size: str
    options: dict[str, Any] = Field(default_factory=dict)


class RecipeSpec(_Model):
    """A method, the options the user set, and all options with their defaults."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    resolved: dict[str, Any] = Field(default_factory=dict)
    needs: str = ""


class TrainSpec(_Model):
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


class EvalSpec(_Model):
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


class DataSpec(_Model):
    """Where the data of a run lie and how they are read. Of these only `flip` and, for a folder of images,
    `vae` and `size` change a weight, and they do so through the data set's fingerprint.
    """

    path: str
    """Absolute: a prepared data set, REPA's layout, or images."""
    vae: str = ""
    """Autoencoder by published name or folder, "none" for pixels; "" for the one the data were made with."""
    size: int | None = Field(default=None, gt=0)
    """Pixels to crop images to that are encoded on the fly."""
    flip: bool | None = None
    """Whether images are mirrored at random; None for what the data were prepared with."""
    resident: Literal["auto", "yes", "no"] = "auto"
    """Whether all moments are kept on the device."""
    extractor: str | None = None
    """torch-fidelity extractor of the evaluation; None for the data set's own."""
    fingerprint: str = ""
    """Of the data set when the run began; "" for not yet known."""


class InitSpec(_Model):
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


class RunSpec(_Model):
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


def build_backbone(
    spec: BackboneSpec, objective: str, dataset: Any, device: str = "cpu", seed: int = 0
) -> Backbone:
    """The network of a spec for a data set's latents, freshly initialised from a generator of its own."""
    family = lookup(BACKBONES, spec.name)
    preset = {k: v for k, v in family.presets[spec.size].items() if k != "objective"}
    kwargs = {**preset, **spec.options}
    out = build_objective(objective).out_channels(dataset.channels)
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network: Backbone = family(
                channels=dataset.channels,
                input_size=dataset.input_size,
                classes=dataset.classes,
                out_channels=out,
                size=spec.size,
                **kwargs,
            )
        except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{spec.name}-{spec.size} cannot be built with {spec.options}: {error}; "
                f"change the backbone.* options"
            ) from error
    if network.info.depth < 1:
        raise UserError(
            f"{spec.name} wants at least one block, got {network.info.depth}; raise backbone.depth"
        )
    return network


def build_objective(name: str) -> Objective:
    """A registered objective by name."""
    return lookup(OBJECTIVES, name)()


def stages_of(spec: RunSpec, info: BackboneInfo) -> list[Stage]:
    """The method's stages for this network."""
    name = spec.recipe.name
    try:
        stages = list(lookup(RECIPES, name)(info, **spec.recipe.resolved))
    except UserError:
        raise
    except Exception as error:  # a plug-in's method may raise anything
        raise UserError(
            f"recipe '{name}' failed: {type(error).__name__}: {error}; mend its method"
        ) from error
    if not stages or not all(isinstance(stage, Stage) for stage in stages):
        raise UserError(
            f"recipe '{name}' wants a list of at least one Stage, got {stages!r}; mend its method"
        )
    return stages


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


def fingerprint(value: Any) -> str:
    """sha256 of a plain value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Hashes:
    """8 hex digits each; docs/protocol.md lists the fields."""

    train: str
    """All that changes a weight but the length of the last stage."""
    row: str
    """`train` without the seed, with the length: what the seeds of one leaderboard row share."""
    setting: str
    """`train` without recipe, recipe options, earlier stages and seed: what the rows of one table share."""


def hashes(
    spec: RunSpec, earlier_steps: Sequence[int], dataset_fingerprint: str, contents: Mapping[str, Any]
) -> Hashes:
    """The run's hashes; `earlier_steps` are the lengths of the stages before the last, `contents` what stands
    for recipe options that name files.
    """
    resolved = spec.recipe.resolved
    setting = setting_fields(spec, dataset_fingerprint)
    recipe = {
        "name": spec.recipe.name,
        "options": {k: v if v is None else contents.get(k, v) for k, v in resolved.items()},
        "plugin": plugin_hash(lookup(RECIPES, spec.recipe.name)),
        "earlier_steps": list(earlier_steps),
    }
    return Hashes(
        train=fingerprint([setting, recipe, spec.seed])[:8],
        row=fingerprint([setting, recipe, spec.train.steps])[:8],
        setting=fingerprint(setting)[:8],
    )


def setting_fields(spec: RunSpec, dataset_fingerprint: str) -> dict[str, Any]:
    """What decides a weight besides the recipe and the seed."""
    train = spec.train.model_dump(exclude={"steps", "save_every"})
    started = {} if spec.init is None else {"init": spec.init.sha256}
    return started | {
        "dataset": dataset_fingerprint,
        "backbone": spec.backbone.model_dump(),
        "backbone_preset": dict(lookup(BACKBONES, spec.backbone.name).presets[spec.backbone.size]),
        "backbone_plugin": plugin_hash(lookup(BACKBONES, spec.backbone.name)),
        "objective": spec.objective,
        "train": train,
    }
