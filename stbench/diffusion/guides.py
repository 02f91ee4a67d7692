"""Guidance by another network, and whether guides fit the network that they guide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from stbench.core.backbone import Backbone, Output, kept_heads
from stbench.core.errors import UserError
from stbench.core.guides import Correction, Evaluation, Guide, HeadGuide, RouteGuide, WeakGuide
from stbench.core.objective import Objective
from stbench.core.registry import OBJECTIVES, name_of


@dataclass(frozen=True)
class NetworkGuide(WeakGuide):
    """Guidance by a weaker network, such as a smaller or less trained one (autoguidance, arXiv 2406.02507).

    It sees the same latents, times and labels and predicts what the guided network does.
    """

    network: Backbone = field(compare=False)
    """Frozen, in eval mode, on the device of the guided network."""
    name: str
    """Name for leaderboards."""
    sha256: str
    """Hash of its weights."""

    def weak_prediction(self, evaluation: Evaluation, output: Output) -> Tensor:
        """Return the prediction of the other network."""
        return self.network(evaluation.x, evaluation.t, evaluation.y)


def kept_tokens(noise: Tensor, patch: int, rate: float) -> Tensor:
    """Return the indices (B,n) of the n = N - int(N rate) tokens with the smallest mean noise (B,C,H,W)."""
    means = F.avg_pool2d(noise.double().mean(1, keepdim=True), patch).flatten(1)
    return means.argsort(1)[:, : means.shape[1] - int(means.shape[1] * rate)]


def require_fit(guides: Sequence[Guide], network: Backbone, objective: Objective) -> None:
    """Raise UserError if a guide does not fit the network, its objective or the other guides."""
    routes = [guide for guide in guides if isinstance(guide, RouteGuide)]
    if len(routes) > 1:
        raise UserError(f"guidance takes one route, got {len(routes)}; evaluate them one by one")
    for guide in guides:
        if isinstance(guide, HeadGuide):
            _require_head(guide, network, routes)
        elif isinstance(guide, RouteGuide):
            network.info.require("route", "guidance by routes")
        elif isinstance(guide, NetworkGuide):
            _require_same_shape(guide, network)
        elif isinstance(guide, Correction):
            _require_velocity(objective)
            _require_buffer(guide, network)


def _require_head(guide: HeadGuide, network: Backbone, routes: Sequence[RouteGuide]) -> None:
    if guide.head not in kept_heads(network):
        found = ", ".join(kept_heads(network)) or "none"
        raise UserError(
            f"guidance by the head '{guide.head}' needs a network with that head, found {found}; "
            f"use a run whose recipe trains it"
        )
    if any(route.start <= guide.block <= route.end for route in routes):
        raise UserError(
            f"the head '{guide.head}' reads block {guide.block}, in which a route drops tokens; "
            f"use one of the two guides"
        )


def _require_same_shape(guide: NetworkGuide, network: Backbone) -> None:
    own, other = network.info, guide.network.info
    for what in ("channels", "input_size", "classes", "null_label"):
        if getattr(own, what) != getattr(other, what):
            raise UserError(
                f"the guiding network {guide.name} must have the same {what} as the guided one, expected "
                f"{getattr(own, what)}, got {getattr(other, what)}; use another network"
            )


def _require_buffer(guide: Correction, network: Backbone) -> None:
    head, _, buffer = guide.buffer.partition(".")
    if head not in kept_heads(network) or buffer not in dict(kept_heads(network)[head].named_buffers()):
        raise UserError(
            f"the correction needs a network with the buffer '{guide.buffer}', found none; "
            f"use a run whose recipe stores it"
        )


def _require_velocity(objective: Objective) -> None:
    if not objective.predicts_velocity:
        raise UserError(
            f"a correction needs an objective whose network predicts a velocity, got "
            f"{name_of(OBJECTIVES, type(objective))}; leave it out, or use --objective linear"
        )
