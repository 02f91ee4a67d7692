"""Pieces that recipes share: distances between tokens, heads, and losses on a subset of the batch by time.

Distances take tokens (B,N,D), compute in float32 and return (B,) unless stated; cosines are over D unless
named otherwise.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Annotated, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stbench.core.errors import UserError
from stbench.core.objective import Objective
from stbench.models.layers import unpatchify

M = TypeVar("M", bound=nn.Module)

Time = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[Time, Time]
Clock = Literal["flow", "native"]
"""Whether a recipe's times are flow-equivalent (`objective.tau`), or the raw t of the objective."""


def token_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of each pair of tokens (B,N)."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine similarity over tokens (REPA, LayerSync); its negative is a loss."""
    return token_cosine(a, b).mean(1)


def cosine_released(a: Tensor, b: Tensor) -> Tensor:
    """Mean over D of the cosine along the token axis: what SRA's released "cos" option computes."""
    return F.cosine_similarity(a.float(), b.float(), dim=1).mean(1)


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (a.float() - b.float()).abs().flatten(1).mean(1)


def smooth_l1(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """Mean smooth-L1: d^2/(2 beta) below `beta`, d - beta/2 above (SRA, beta 0.05)."""
    return F.smooth_l1_loss(a.float(), b.float(), reduction="none", beta=beta).flatten(1).mean(1)


def pairwise(z: Tensor) -> Tensor:
    """Squared distance of every two samples of z (B,...), divided by their size; (B,B) float32."""
    flat = z.float().flatten(1)
    # The matrix-product form loses the small distances of a batch that has collapsed.
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.square() / flat.shape[1]


def dispersive(z: Tensor, tau: float) -> Tensor:
    """Dispersive loss, a scalar of the batch it is given: log mean exp(-d/tau), the diagonal included.

    InfoNCE form with L2 distance, without positives (Disperse-Loss).
    """
    return (-pairwise(z) / tau).flatten().logsumexp(0) - 2.0 * math.log(z.shape[0])


def dispersive_rows(z: Tensor, tau: float, batch: int | None = None) -> Tensor:
    """The dispersive loss of each local batch of `batch` samples of z (B,...), given to its rows (B,).

    Their mean is the loss of a run whose devices hold `batch` samples each; None takes z as one batch.
    """
    parts = torch.split(z, batch or len(z))
    return torch.cat([dispersive(part, tau).expand(len(part)) for part in parts])


def check_interval(interval: tuple[float, float]) -> None:
    """UserError for an interval whose ends are swapped."""
    if interval[0] > interval[1]:
        raise UserError(f"recipe.interval wants low <= high, got {interval}; for example [0.4,0.7]")


def in_interval(
    objective: Objective, t_host: Tensor, interval: tuple[float, float], native: bool = False
) -> Tensor:
    """Which times (B,) lie in the closed interval of flow-equivalent times (`native`: raw t); on the host."""
    value = t_host if native else objective.tau(t_host)
    # Bounds and times are compared in float32: a time stored as 0.7 in float32 is inside [0.4, 0.7].
    low, high = torch.tensor(interval, dtype=torch.float32)
    return (value.float() >= low) & (value.float() <= high)


def cleaner(objective: Objective, t_host: Tensor, amount: float, u: Tensor, clock: Clock) -> Tensor:
    """Host times (B,) with up to `amount` less noise, u (B,) in [0,1): SRA's teacher.

    `flow`: clamp(tau - amount u, 0, 1) in flow-equivalent time, the same on every objective. `native`: the
    same in raw t, by whole steps where the process is discrete.
    """
    if clock == "native":
        return objective.earlier(t_host, amount, u)
    return objective.t_of_tau((objective.tau(t_host) - amount * u).clamp(0.0, 1.0))


def relative_block(depth: int, block: int, of: int) -> int:
    """0-based block of a network of `depth` blocks that lies where the 1-based `block` lies among `of`."""
    return min(max(1, round(depth * block / of)), depth) - 1


def masked(loss: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Losses (n,) of the samples `rows` (n,) among `batch` zeros (B,): the mean divides by the full batch."""
    return loss.new_zeros(batch).index_put((rows.to(loss.device, non_blocking=True),), loss)


def released_mask(loss: Tensor, inside: Tensor) -> Tensor:
    """All losses (B,) times the share that is `inside`: what Self-Transcendence's released code computes."""
    return loss * inside.double().mean().item()


def projector(width: int, hidden: int, out: int) -> nn.Sequential:
    """Linear-SiLU-Linear-SiLU-Linear on tokens, Xavier weights, zero biases (REPA; parameters 0, 2, 4)."""
    layers = [
        nn.Linear(width, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, out),
    ]
    return _xavier(nn.Sequential(*layers))


def sra_head(width: int) -> nn.Sequential:
    """SRA's head on student tokens: Linear(D,2D)-SiLU-Linear(2D,D), parameters linear1 and linear2."""
    first, second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
    return _xavier(nn.Sequential(OrderedDict(linear1=first, act=nn.SiLU(), linear2=second)))


class VelocityHead(nn.Module):
    """Tokens (B,N,D) to a velocity (B,C,H,W): layer norm without affine, Linear to p*p*C, unpatchify.

    The last layer of Self-Transcendence's VAE alignment; Xavier, not zero, and unconditioned.
    """

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.patch = patch
        self.channels = channels
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        _xavier(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        return unpatchify(self.linear(self.norm(tokens)), self.patch, self.channels)


def _xavier(module: M) -> M:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return module
