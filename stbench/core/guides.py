"""Guides: how a network can be guided by a weaker prediction of its own or of another network.

A stage names the guides of its network in `Stage.guides`; `stbench.diffusion.guidance` applies them, and
docs/guidance.md describes them. Shapes and conventions are listed in `stbench.core.backbone`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stbench.core.backbone import Backbone, Output, Route, kept_heads


@dataclass(frozen=True)
class Evaluation:
    """The inputs of one evaluation of a network by a sampler; with classifier-free guidance, both halves."""

    network: Backbone
    x: Tensor
    """Noisy latents (B,C,H,W), float32."""
    t: Tensor
    """Times (B,), float64."""
    y: Tensor
    """Labels (B,)."""
    keep: Callable[[int, float], Tensor]
    """`keep(i, rate)` returns the indices (B,n) of the tokens that remain if a share `rate` is dropped. The
    two draws i = 0 and 1 of an evaluation are independent, and an image's depend on its own noise only."""


@dataclass(frozen=True, kw_only=True)
class Guide:
    """A change of the prediction at sampling, in a closed interval of flow-equivalent times."""

    low: float = 0.0
    """Start of the interval unless another is asked for."""
    high: float = 1.0
    """End of that interval."""

    def active(self, tau: float) -> bool:
        """Whether the guide changes the prediction at flow-equivalent time `tau`."""
        return self.low <= tau <= self.high


@dataclass(frozen=True, kw_only=True)
class WeakGuide(Guide, ABC):
    """Guidance away from a weaker prediction: v becomes weak + scale (v - weak)."""

    scale: float = 1.0
    """Scale unless another is asked for; 1 changes nothing."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """The 0-based blocks whose features `weak_prediction` reads."""
        return ()

    def active(self, tau: float) -> bool:
        """Whether the guide changes the prediction at flow-equivalent time `tau`."""
        return self.scale != 1.0 and super().active(tau)

    def inputs(self, evaluation: Evaluation) -> Mapping[str, Any]:
        """Return optional inputs of the forward pass that predicts v."""
        return {}

    def labels(self, y: Tensor, null: int) -> Tensor:
        """Return the labels (B,) that both predictions see, given those of the sampler; `null` is K."""
        return y

    @abstractmethod
    def weak_prediction(self, evaluation: Evaluation, output: Output) -> Tensor:
        """Return the weak prediction (B,C_out,H,W); `output` is the result of the forward pass."""


@dataclass(frozen=True)
class HeadGuide(WeakGuide):
    """Guidance by a head that stays with the network (Internal Guidance, CVL-UESTC/Internal-Guidance).

    The head is called with the features of its block and the condition, and predicts what the network does.
    """

    head: str
    """Name of the head in `Stage.heads`."""
    block: int
    """0-based block whose features it reads."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """The head's block."""
        return (self.block,)

    def weak_prediction(self, evaluation: Evaluation, output: Output) -> Tensor:
        """Return the prediction of the head."""
        head = kept_heads(evaluation.network)[self.head]
        return head(output.features[self.block], output.condition)


@dataclass(frozen=True)
class RouteGuide(WeakGuide):
    """Guidance by dropping more tokens (TREAD, arXiv 2501.04765): both predictions drop some."""

    start: int
    """0-based first block of the route."""
    end: int
    """0-based last block of the route; it is part of it."""
    strong: float = 0.3
    """Share of the tokens that the network's own prediction drops."""
    weak: float = 0.7
    """Share that the weak prediction drops."""
    null_labels: bool = False
    """Whether both predictions drop all labels, as in the released sampler of TREAD."""

    def labels(self, y: Tensor, null: int) -> Tensor:
        """Return the labels (B,), or null labels."""
        return y.new_full(y.shape, null) if self.null_labels else y

    def inputs(self, evaluation: Evaluation) -> Mapping[str, Any]:
        """Return the route of the network's own prediction."""
        return {"routes": (Route(self.start, self.end, evaluation.keep(0, self.strong)),)}

    def weak_prediction(self, evaluation: Evaluation, output: Output) -> Tensor:
        """Return the prediction that drops more tokens, drawn independently."""
        route = Route(self.start, self.end, evaluation.keep(1, self.weak))
        found = evaluation.network.run(evaluation.x, evaluation.t, evaluation.y, routes=(route,)).prediction
        assert found is not None
        return found


@dataclass(frozen=True)
class Correction(Guide):
    """The affine correction velocity_weight v - weight image of a velocity, after all guidance.

    With image = E[x0] it undoes the bias of contrastive flow matching (gstoica27/DeltaFM), whose optimum is
    (v + weight E[x0]) / (1 - weight).
    """

    weight: float
    buffer: str
    """The image (C,H,W): a buffer of a head that stays with the network, as "HEAD.BUFFER"."""
    velocity_weight: float | None = None
    """Factor of v, which the released sampler takes too; 1 - weight unless given."""

    def apply(self, v: Tensor, network: Backbone) -> Tensor:
        """Return the corrected velocity (B,C,H,W)."""
        head, _, buffer = self.buffer.partition(".")
        image = kept_heads(network)[head].get_buffer(buffer).to(v.dtype)
        own = 1.0 - self.weight if self.velocity_weight is None else self.velocity_weight
        return own * v - self.weight * image
