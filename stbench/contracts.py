"""The central interfaces: Backbone, Objective, Recipe, Stage, Artifact, and the few records that pass between
them.

Shape legend, used everywhere: B batch, C latent channels, H W latent size, N image tokens, D width, K
classes. Time t is in [0,1], t=0 is data and t=1 is noise, float64. Labels are 0..K-1, and K is the null
label. Block indices are 0-based over executed blocks. "Features of block k" is the residual stream right
after it, image tokens only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from stbench.errors import UserError
from stbench.flops import forward_flops
from stbench.rng import Rng

Features = dict[int, Tensor]
"""0-based block index -> image tokens (B,N,D)."""

Weights = Literal["raw", "ema"]


@dataclass(frozen=True)
class BackboneInfo:
    """What the rest of the program may know of a network."""

    name: str
    """Registered family name, such as "sit"."""
    size: str
    """Preset name, such as "ti/2" or "b/2"; "custom" for none."""
    depth: int
    """Executed blocks (U-ViT: in + mid + out)."""
    width: int
    tokens: int
    """Image tokens N, prefix tokens not counted."""
    patch: int
    channels: int
    """Latent channels C of the input."""
    input_size: int
    """Latent height = width."""
    classes: int
    """K; also the null label."""
    null_label: bool = True
    """Whether it takes the null label; without one it needs label_drop=0 and has no guidance."""

    def block(self, option: str, index: int) -> int:
        """`index` if this network has such a block; else a UserError that names the option."""
        if not 0 <= index < self.depth:
            raise UserError(
                f"{option}={index} is out of range: {self.name}-{self.size} has blocks 0..{self.depth - 1}; "
                f"try --set {option}={self.depth - 1}"
            )
        return index


class Backbone(nn.Module, ABC):
    """A denoiser: noisy latent in, prediction out, with readable block outputs.

    A pure function of (x, t, y): labels are dropped by the engine, never here. Subclasses implement
    `forward_intermediates` alone and are built as `cls(channels=, input_size=, classes=, out_channels=,
    size=, **options)`.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Size name -> constructor options."""
    objective: ClassVar[str] = "linear"
    """The objective it was published with (a preset may name another under "objective")."""

    info: BackboneInfo
    time_scale: float = 1.0
    """What t in [0,1] is multiplied by before it is embedded."""

    @abstractmethod
    def forward_intermediates(
        self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int] = (), stop_early: bool = False
    ) -> tuple[Tensor | None, Features]:
        """Predict from x (B,C,H,W), t (B,) in [0,1], y (B,) in 0..K, and read the blocks named in `indices`.

        Returns the prediction (B,C_out,H,W) and the features. With `stop_early` nothing after max(indices)
        runs and the prediction is None.
        """

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The prediction (B,C_out,H,W)."""
        prediction, _ = self.forward_intermediates(x, t, y)
        assert prediction is not None
        return prediction

    def features(self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int]) -> Features:
        """The features of the blocks `indices`; nothing behind the deepest of them runs."""
        return self.forward_intermediates(x, t, y, indices=indices, stop_early=True)[1]

    def flops(self, upto: int | None = None) -> int:
        """Forward FLOPs for one image, of the whole network or of nothing behind block `upto`."""

        def call(net: nn.Module) -> object:
            info = self.info
            x = torch.empty(1, info.channels, info.input_size, info.input_size, device="meta")
            t, y = torch.empty(1, device="meta"), torch.empty(1, dtype=torch.long, device="meta")
            indices = () if upto is None else (upto,)
            return net.forward_intermediates(x, t, y, indices=indices, stop_early=upto is not None)  # type: ignore[operator]

        return forward_flops(self, call, ("backbone", upto))


@dataclass(frozen=True)
class Batch:
    """What one (micro-)step trains on. `rng` holds every random number of this step."""

    x0: Tensor
    """Clean latents (B,C,H,W), a fresh posterior sample."""
    y: Tensor
    """Labels after dropping (B,): what the student, and SRA's teacher, is told."""
    y_true: Tensor
    """Labels before dropping (B,): what Self-Transcendence's conditional teacher is told."""
    index: Tensor
    """Rows of the training set (B,), on the host."""
    rng: Rng
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Per-image tensors a recipe asked for, such as cached encoder tokens."""


@dataclass(frozen=True)
class Noised:
    """A latent corrupted at known times: x_t = alpha(t) x0 + sigma(t) noise."""

    x_t: Tensor
    t: Tensor
    """(B,) float64, on the device of x_t."""
    t_host: Tensor
    """The same values on the host, so that a subset by time needs no synchronisation."""
    x0: Tensor
    noise: Tensor


class Objective(ABC):
    """The corruption, the regression target and its loss; sole owner of t- and noise-sampling."""

    samplers: ClassVar[Sequence[str]] = ()
    """Samplers that can invert this process; the first is the default."""

    @abstractmethod
    def sample_t(self, rng: Rng) -> Tensor:
        """Training times (B,) float64 on the host."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise coefficients at t, float64, same shape and device as t."""

    @abstractmethod
    def loss(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Training loss per sample (B,), float32."""

    @abstractmethod
    def denoise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latent and the noise (x0, eps) that a prediction implies at (x_t, t)."""

    @abstractmethod
    def velocity_target(self, noised: Noised) -> Tensor:
        """The velocity of this process at a training point (B,C,H,W).

        Flows: the derivative of their own path. Noise predictions: eps - x0, the velocity of the linear flow
        through the same pair, so that a recipe that regresses a velocity means the same thing under every
        objective.
        """

    def velocity(self, prediction: Tensor, noised: Noised) -> Tensor:
        """The same velocity as `velocity_target`, from a prediction instead of the truth."""
        x0, eps = self.denoise(prediction, noised.x_t, noised.t_host)
        return self.velocity_target(Noised(noised.x_t, noised.t, noised.t_host, x0, eps))

    def out_channels(self, channels: int) -> int:
        """Channels the network must predict for C latent channels."""
        return channels

    def snap(self, t: Tensor) -> Tensor:
        """The nearest time the process knows: t itself, or the nearest whole step of a discrete process."""
        return t

    def tau(self, t: Tensor) -> Tensor:
        """Flow-equivalent time sigma/(alpha+sigma): the same noise level on the linear flow."""
        alpha, sigma = self.alpha_sigma(t)
        return sigma / (alpha + sigma)

    @abstractmethod
    def t_of_tau(self, tau: Tensor) -> Tensor:
        """Inverse of `tau`, clamped to the times the process reaches."""

    def earlier(self, t: Tensor, amount: float, u: Tensor) -> Tensor:
        """Host times (B,) moved towards the data by `amount` * u, u (B,) in [0,1), in raw t, clamped to
        [0,1].

        Discrete processes move by whole steps.
        """
        return (t - amount * u).clamp(0.0, 1.0)

    def at(self, x0: Tensor, noise: Tensor, t: Tensor) -> Noised:
        """Corrupt x0 (B,C,H,W) with `noise` at host times t (B,)."""
        t = self.snap(t.double())
        alpha, sigma = (c.to(x0.device, x0.dtype).view(-1, 1, 1, 1) for c in self.alpha_sigma(t))
        return Noised(alpha * x0 + sigma * noise, t.to(x0.device, non_blocking=True), t, x0, noise)

    def draw(self, batch: Batch) -> Noised:
        """Corrupt a batch at this step's times with this step's noise."""
        noise = batch.rng.normal("noise", tuple(batch.x0.shape[1:])).to(batch.x0.device, non_blocking=True)
        return self.at(batch.x0, noise, self.sample_t(batch.rng))


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


class Recipe(ABC):
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
class Plain(Recipe):
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
    """One training run inside a method; the last stage's network is the one that is evaluated."""

    name: str
    recipe: Callable[[Mapping[str, Artifact]], Recipe]
    """Called late, with what the earlier stages left, by stage name."""
    length: float = 1.0
    """Steps as a multiple of --steps; the last stage is always 1.0."""
    steps: int | None = None
    """Absolute number of steps, instead of `length`."""
    init: Literal["scratch", "previous"] = "scratch"


Method = Callable[..., Sequence[Stage]]
"""A method: `(info: BackboneInfo, *, <settings with published defaults>) -> stages`. Its docstring is its
help.
"""
