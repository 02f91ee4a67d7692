"""The Recipe interface: supervision of a backbone's hidden features, in one or several stages.

A recipe returns stages; each stage has a supervision; a supervision returns terms; a finished stage is an
artifact. Shapes and conventions are listed in `stbench.core.backbone`.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from stbench.core.backbone import Backbone, BackboneInfo, Weights
from stbench.core.guides import Guide
from stbench.core.objective import Batch, Noised, Objective
from stbench.core.ranges import option_parameters
from stbench.core.step import Cost, Encoder, Step, Term
from stbench.core.text import check_name

__all__ = [
    "LATER",
    "Artifact",
    "Cost",
    "Encoder",
    "NoSupervision",
    "OptionContext",
    "Recipe",
    "Stage",
    "Step",
    "Supervision",
    "Term",
    "computed",
    "computed_defaults",
    "effective_options",
    "is_computed",
    "unset_fields",
]

LATER: Mapping[str, Any] = MappingProxyType({"later": True})
"""Metadata of a field of a supervision that earlier versions lacked, and whose default is what they did.

While the field has its default, the hashes of a run contain neither it nor the recipe's option of the same
name, so that runs of earlier versions keep theirs.
"""


class Supervision(ABC):
    """The auxiliary losses of one stage.

    Subclasses are dataclasses. Their fields identify the stage, so they must contain everything that changes
    a loss. A supervision is not an nn.Module: a teacher or encoder that it stores never reaches the
    optimiser, the state dict or DDP.
    """

    takes_subsets: ClassVar[bool] = False
    """Whether the terms also take features of some of the tokens, which blocks inside a route have: targets
    are then restricted to `step.kept` (`stbench.models.align.at_kept`)."""

    teacher_precision = "fp32"
    """Precision of a frozen network that runs in `corrupt`, before there is a step. Set by the engine."""

    @property
    def needs(self) -> str:
        """What the supervision needs from outside the run, shown in its leaderboard row; "" for nothing."""
        return ""

    @property
    def contents(self) -> Mapping[str, Any]:
        """Option name -> value that replaces it in the run's hashes.

        For options that name files: a content hash instead of a path makes a moved file the same run.
        """
        return {}

    @property
    def images(self) -> bool:
        """Whether the clean images, uint8 (B,c,H,W), are needed in `step.batch.extras["images"]`."""
        return False

    @property
    def taps(self) -> Sequence[int]:
        """Student blocks whose features are needed in `step.features`."""
        return ()

    def require(self, objective: Objective) -> None:
        """Raise UserError unless the losses have a meaning under an objective; called before training."""

    def setup(self, device: torch.device) -> None:
        """Load teachers and encoders onto the device; called once, before the first step."""

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """Return the modules that are trained with the student and discarded at evaluation, by name.

        Heads that stay with the network are declared by `Stage.heads`.
        """
        return nn.ModuleDict()

    def corrupt(self, objective: Objective, batch: Batch) -> Noised:
        """Return the student's input: by default the batch with the objective's noise and times.

        Times may be (B,N), one per token, for a backbone with the capability "token-time". Draw from
        `batch.rng` only.
        """
        return objective.draw(batch)

    def inputs(self, batch: Batch, noised: Noised) -> Mapping[str, Any]:
        """Return optional inputs of the student's forward pass: `attention`, `mask`, `routes` or `prefix`.

        See `Backbone.forward_intermediates`; the recipe must have required the capability.
        """
        return {}

    @abstractmethod
    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compute the auxiliary losses of this step, by name."""


def unset_fields(supervision: Supervision) -> set[str]:
    """Return the names of the fields with the metadata `LATER` that have their default."""
    added = [f for f in dataclasses.fields(supervision) if f.metadata.get("later")]  # type: ignore[arg-type]
    return {f.name for f in added if getattr(supervision, f.name) == f.default}


@dataclass
class NoSupervision(Supervision):
    """No auxiliary loss: the denoising loss alone."""

    # Stage fingerprints contain the qualified class name, which was Plain when the published runs were made.
    __qualname__ = "Plain"

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Return no terms."""
        return {}


@dataclass(frozen=True)
class Artifact:
    """The result of a finished stage."""

    name: str
    """Name of the stage."""
    fingerprint: str
    """Hash of everything that determines the weights: equal fingerprints mean equal weights."""
    checkpoint: str
    """Folder with raw.safetensors and ema.safetensors."""
    sha256: Mapping[str, str]
    """Weights ("raw", "ema") -> sha256 of the file."""
    steps: int
    images_seen: int
    seconds: float
    """Training time, without evaluation."""
    flops: float
    loader: Callable[[Weights], Backbone] = field(repr=False, compare=False)

    def load(self, weights: Weights) -> Backbone:
        """Return the network with these weights, frozen and in eval mode."""
        return self.loader(weights).eval().requires_grad_(False)


@dataclass(frozen=True)
class Stage:
    """One training run inside a recipe. The network of the last stage is the one that is evaluated."""

    name: str
    supervision: Callable[[Mapping[str, Artifact]], Supervision]
    """Builds the stage's supervision from the artifacts of the earlier stages, by stage name."""
    length: float = 1.0
    """Steps as a multiple of --steps. The last stage always has length 1.0."""
    steps: int | None = None
    """Absolute number of steps; replaces `length`."""
    init: Literal["scratch", "previous"] = "scratch"
    """Initial weights: fresh, or the EMA weights of the previous stage."""
    heads: Callable[[Backbone], Mapping[str, nn.Module]] | None = None
    """Builds the heads that belong to the stage's network and stay with it: they are averaged, saved and
    usable at sampling. A module with a method `fit(dataset)` can fill its buffers from the training data
    before the first step. The fields of the supervision must contain everything that the heads depend on."""
    guides: Mapping[str, Guide] = field(default_factory=dict)
    """How the stage's network can be guided at sampling, by the names that `--guide` takes."""

    def __post_init__(self) -> None:
        """Raise UserError unless the names can be part of a path."""
        check_name(self.name, "the name of a stage")
        for guide in self.guides:
            check_name(guide, "the name of a guide")

    def length_at(self, steps: int) -> int:
        """Steps of this stage, as an earlier stage, when the last stage has `steps` steps."""
        return round(self.length * steps) if self.steps is None else self.steps


Recipe = Callable[..., Sequence[Stage]]
"""What `--recipe` names: `(info: BackboneInfo, *, <options with published defaults>) -> stages`.

The docstring of the function is its help text in `stbench list recipes`.
"""


@dataclass(frozen=True)
class OptionContext:
    """What the default of a recipe option may depend on."""

    info: BackboneInfo
    steps: int | None
    """Steps of the last stage; None where they are not known."""
    options: Mapping[str, Any]
    """The other options of the recipe, as far as they are known: those given, and the defaults of those that
    come earlier in the signature."""


@dataclass(frozen=True)
class _Computed:
    compute: Callable[[OptionContext], Any]

    def __repr__(self) -> str:
        return "depends on the backbone"


def computed(compute: Callable[[OptionContext], Any]) -> Any:
    """Mark the default of a recipe option that depends on the backbone, the steps or other options.

    Use it in the recipe's signature: ``block: int = computed(lambda c: c.info.depth // 2)``. The value is
    computed before the recipe function is called and is stored in the run's specification, so that a run
    never depends on the default of a later version.
    """
    return _Computed(compute)


def is_computed(default: Any) -> bool:
    """Whether a parameter's default was made by `computed`."""
    return isinstance(default, _Computed)


def effective_options(
    recipe: Recipe, info: BackboneInfo, options: Mapping[str, Any], *, steps: int | None = None
) -> dict[str, Any]:
    """Options of a recipe by name: those given, and the defaults of the others for this backbone."""
    parameters = option_parameters(recipe)
    defaults = {k: p.default for k, p in parameters.items() if k != "info" and p.default is not p.empty}
    known = {k: default for k, default in defaults.items() if not is_computed(default)} | dict(options)
    for name, default in defaults.items():
        if name not in known:
            known[name] = default.compute(OptionContext(info, steps, known))
    return {**{name: known[name] for name in defaults}, **options}


def computed_defaults(recipe: Recipe) -> Recipe:
    """Decorate a recipe so that a direct call in Python also fills in its computed defaults.

    `stbench run` fills them in with or without this decorator. Put it below the registration.
    """

    @functools.wraps(recipe)
    def call(info: BackboneInfo, **options: Any) -> Sequence[Stage]:
        return recipe(info, **effective_options(recipe, info, options))

    return call
