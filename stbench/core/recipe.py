"""The Recipe interface: supervision of a backbone's hidden features, in one or several stages.

A recipe returns stages; each stage has a supervision; a supervision returns terms; a finished stage is an
artifact. Shapes and conventions are listed in `stbench.core.backbone`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from stbench.core.backbone import Backbone, BackboneInfo, Features, Weights
from stbench.core.flops import forward_flops
from stbench.core.objective import Batch, Noised, Objective
from stbench.core.phases import phase
from stbench.core.ranges import option_parameters
from stbench.core.text import check_name


@dataclass(frozen=True)
class Term:
    """One auxiliary loss and its weight in the total loss."""

    value: Tensor
    """Loss per sample (B,), float32; the engine takes the mean."""
    weight: float


class Encoder(Protocol):
    """A frozen external image encoder that returns one token per latent patch."""

    flops: float
    """Forward FLOPs for one image."""

    def tokens(self, images: Tensor) -> Tensor:
        """Encode uint8 images (B,c,H,W) as tokens (B,N,Dz)."""


@dataclass
class Cost:
    """FLOPs spent so far, by what spent them."""

    student: float = 0.0
    heads: float = 0.0
    teachers: float = 0.0
    """Teachers and encoders."""

    @property
    def total(self) -> float:
        """Sum over student, heads and teachers."""
        return self.student + self.heads + self.teachers


@dataclass(frozen=True)
class Step:
    """Everything a supervision can read in one training step.

    Read-only: trained heads, teachers and encoders run through its methods, which count their FLOPs.
    """

    batch: Batch
    noised: Noised
    prediction: Tensor
    """The student's prediction (B,C_out,H,W)."""
    features: Features
    """Features of the student's tapped blocks."""
    heads: nn.ModuleDict
    """The modules that `Supervision.heads` returned."""
    ema: Backbone
    """Exponential moving average of the student, frozen."""
    objective: Objective
    info: BackboneInfo
    """Facts about the student."""
    images_seen: int
    """Images that this stage has processed before this step."""
    dataset_size: int
    """Images in the training set."""
    global_batch: int
    """Images per optimiser step, over all devices and micro-batches."""
    cost: Cost

    def project(self, head: str, tokens: Tensor) -> Tensor:
        """Apply the trained head `head` to tokens (b,N,D).

        Counts one forward and one backward pass per row.
        """
        module = self.heads[head]
        shape = tuple(tokens.shape[1:])
        one = forward_flops(module, lambda m: m(torch.empty(1, *shape, device="meta")), ("head", shape))
        self.cost.heads += 3.0 * one * tokens.shape[0]
        with phase("heads"):
            return module(tokens)

    def teach(self, teacher: Backbone, x: Tensor, t: Tensor, y: Tensor, *, block: int) -> Tensor:
        """Return the features (b,N,D) of one block of a frozen network, float32.

        Runs without gradient and outside autocast, stops after `block`, and counts one forward pass per row.
        """
        # An empty selection (no sample inside an interval) must not reach the network.
        if x.shape[0] == 0:
            return x.new_zeros(0, self.info.tokens, teacher.info.width)
        self.count_teacher(float(teacher.flops(block)) * x.shape[0])
        with _frozen_forward(x):
            return teacher.features(x, t, y, indices=(block,))[block].float()

    def encode(self, encoder: Encoder, images: Tensor) -> Tensor:
        """Return the tokens (B,N,Dz) of clean images, uint8 (B,c,H,W), under a frozen encoder, float32.

        Runs without gradient and outside autocast, and counts one forward pass per image.
        """
        self.count_teacher(encoder.flops * len(images))
        with _frozen_forward(images):
            return encoder.tokens(images).float()

    def count_teacher(self, flops: float) -> None:
        """Add `flops` to the cost of teachers and encoders; `teach` and `encode` call it themselves."""
        self.cost.teachers += flops


@contextmanager
def _frozen_forward(x: Tensor) -> Iterator[None]:
    """Disable gradients, and autocast on the device of x."""
    with phase("teachers"), torch.no_grad(), torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
        yield


class Supervision(ABC):
    """The auxiliary losses of one stage.

    Subclasses are dataclasses. Their fields identify the stage, so they must contain everything that changes
    a loss. A supervision is not an nn.Module: a teacher or encoder that it stores never reaches the
    optimiser, the state dict or DDP.
    """

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

    def setup(self, device: torch.device) -> None:
        """Load teachers and encoders onto the device; called once, before the first step."""

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """Return the modules that are trained with the student and discarded at evaluation, by name."""
        return nn.ModuleDict()

    @abstractmethod
    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compute the auxiliary losses of this step, by name."""


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

    def __post_init__(self) -> None:
        """Raise UserError unless the name can be part of a path."""
        check_name(self.name, "the name of a stage")

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
