"""Recipe, Stage, Supervision and Artifact: how the hidden features of a backbone are supervised.

Shapes and conventions are listed in `stbench.core.backbone`.
"""

from __future__ import annotations

import inspect
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


@dataclass(frozen=True)
class Term:
    """One auxiliary loss: its value per sample (B,), float32, and its weight in the total."""

    value: Tensor
    weight: float


class Encoder(Protocol):
    """A frozen image encoder that gives one token for each patch of the latent."""

    flops: float
    """Of one image."""

    def tokens(self, images: Tensor) -> Tensor:
        """Tokens (B,N,Dz) of uint8 images (B,c,H,W)."""


@dataclass
class Cost:
    """FLOPs spent so far, split by who spent them."""

    student: float = 0.0
    heads: float = 0.0
    teachers: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.student + self.heads + self.teachers


@dataclass(frozen=True)
class Step:
    """A read-only view of one training step, for a recipe's terms."""

    batch: Batch
    noised: Noised
    prediction: Tensor
    features: Features
    """The student's tapped blocks."""
    heads: nn.ModuleDict
    ema: Backbone
    objective: Objective
    info: BackboneInfo
    images_seen: int
    dataset_size: int
    global_batch: int
    cost: Cost

    def project(self, head: str, tokens: Tensor) -> Tensor:
        """Run tokens (b,N,D) through a trained head; counted as one forward and one backward a row."""
        module = self.heads[head]
        shape = tuple(tokens.shape[1:])
        one = forward_flops(module, lambda m: m(torch.empty(1, *shape, device="meta")), ("head", shape))
        self.cost.heads += 3.0 * one * tokens.shape[0]
        return module(tokens)

    def teach(self, teacher: Backbone, x: Tensor, t: Tensor, y: Tensor, *, block: int) -> Tensor:
        """A frozen network's features of one block (b,N,D), without gradient and in full precision.

        Nothing behind `block` runs; counted as one forward a row.
        """
        if x.shape[0] == 0:
            return x.new_zeros(0, self.info.tokens, teacher.info.width)
        self.cost.teachers += float(teacher.flops(block)) * x.shape[0]
        with _full_precision(x):
            return teacher.features(x, t, y, indices=(block,))[block].float()

    def encode(self, encoder: Encoder, images: Tensor) -> Tensor:
        """A frozen encoder's tokens (B,N,Dz) of clean images, uint8 (B,c,H,W); without gradient, in full
        precision, counted as one forward an image.
        """
        self.cost.teachers += encoder.flops * len(images)
        with _full_precision(images):
            return encoder.tokens(images).float()


@contextmanager
def _full_precision(x: Tensor) -> Iterator[None]:
    """No gradient and no autocast on the device of x."""
    with torch.no_grad(), torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
        yield


class Supervision(ABC):
    """What one stage adds to plain denoising. A dataclass whose fields are everything that shapes its terms.

    Not an nn.Module: whatever it holds (a teacher, an encoder) never reaches the optimiser, the state dict or
    DDP.
    """

    @property
    def needs(self) -> str:
        """What it needs from outside the model, named in its leaderboard row; "" for nothing."""
        return ""

    @property
    def contents(self) -> Mapping[str, Any]:
        """For options that name files: what stands for them in hashes, so that a moved file is the same
        run.
        """
        return {}

    @property
    def images(self) -> bool:
        """Whether `step.batch.extras["images"]` must hold the clean images, uint8 (B,c,H,W)."""
        return False

    @property
    def taps(self) -> Sequence[int]:
        """Student blocks to expose in `step.features`."""
        return ()

    def setup(self, device: torch.device) -> None:
        """Load teachers to the device; called once, before the first step."""

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """Trained modules that are dropped at evaluation, by name."""
        return nn.ModuleDict()

    @abstractmethod
    def terms(self, step: Step) -> Mapping[str, Term]:
        """The auxiliary losses of this step by name; {} is vanilla."""


@dataclass
class Plain(Supervision):
    """No auxiliary loss: plain denoising."""

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Nothing to add."""
        return {}


@dataclass(frozen=True)
class Artifact:
    """What a finished stage leaves behind."""

    name: str
    fingerprint: str
    """Hash of everything that made it; equal fingerprints are equal weights."""
    checkpoint: str
    """Folder that holds raw.safetensors and ema.safetensors."""
    sha256: Mapping[str, str]
    steps: int
    images_seen: int
    seconds: float
    flops: float
    loader: Callable[[Weights], Backbone] = field(repr=False, compare=False)

    def load(self, weights: Weights) -> Backbone:
        """The network, frozen and in eval mode."""
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

    def length_at(self, steps: int) -> int:
        """Steps of this stage, as an earlier stage, when the last stage has `steps` steps."""
        return round(self.length * steps) if self.steps is None else self.steps


Recipe = Callable[..., Sequence[Stage]]
"""A recipe: `(info: BackboneInfo, *, <options with published defaults>) -> stages`.

The docstring of the function is its help.
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
    recipe: Recipe, info: BackboneInfo, *, steps: int | None = None, **options: Any
) -> dict[str, Any]:
    """All options of a recipe by name: those given, and the defaults of the others for this backbone."""
    parameters = {
        name: p.default for name, p in inspect.signature(recipe).parameters.items() if name != "info"
    }
    known = {name: default for name, default in parameters.items() if not is_computed(default)} | options
    for name, default in parameters.items():
        if name not in known:
            known[name] = default.compute(OptionContext(info, steps, known))
    return {name: known[name] for name in parameters} | options


def build_stages(
    recipe: Recipe, info: BackboneInfo, *, steps: int | None = None, **options: Any
) -> Sequence[Stage]:
    """Call a recipe with its effective options."""
    return recipe(info, **effective_options(recipe, info, steps=steps, **options))
