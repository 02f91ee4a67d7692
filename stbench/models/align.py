"""Parts shared by recipes: token distances, heads, and losses on a subset of the batch chosen by time.

Distances take tokens (B,N,D), compute in float32 and return (B,) unless stated otherwise. Cosines are over D
unless the name says otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from typing import Annotated, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stbench.core.device import arithmetic
from stbench.core.errors import UserError
from stbench.core.objective import Objective
from stbench.models.layers import unpatchify
from stbench.models.routing import gather_tokens

M = TypeVar("M", bound=nn.Module)

Time = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[Time, Time]
Clock = Literal["flow", "native"]
"""Whether the times of a recipe are flow-equivalent (`objective.tau`) or the native t of the objective."""

# Distances


def token_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of each pair of tokens (B,N)."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine similarity over tokens (REPA, LayerSync); its negative is a loss."""
    return token_cosine(a, b).mean(1)


def cosine_released(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity along the token axis, averaged over D.

    This is what the "cos" option of SRA's released code computes, because `dim` is left at torch's default.
    """
    return F.cosine_similarity(a.float(), b.float(), dim=1).mean(1)


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (a.float() - b.float()).abs().flatten(1).mean(1)


def smooth_l1(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """Mean smooth-L1 loss: d^2/(2 beta) below `beta`, d - beta/2 above (SRA uses beta 0.05)."""
    return F.smooth_l1_loss(a.float(), b.float(), reduction="none", beta=beta).flatten(1).mean(1)


def structure(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of the cosine similarities between all pairs of tokens of a sample (SARA).

    a (B,N,D) and b (B,N,E) may have different widths; a token and itself count as a pair.
    """
    with arithmetic("fp32", a.device):
        first, second = (F.normalize(z.float(), dim=-1) for z in (a, b))
        difference = first @ first.mT - second @ second.mT
    return difference.square().flatten(1).mean(1)


def attention_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of two attention maps, given as logits (B,heads,N,N), averaged over heads and queries.

    Head i is compared with head i, as far as both have one (HASTE). The teacher's map is the target.
    """
    heads = min(student.shape[1], teacher.shape[1])
    target = teacher[:, :heads].float().softmax(-1)
    return -(target * student[:, :heads].float().log_softmax(-1)).sum(-1).mean((1, 2))


def pairwise(z: Tensor) -> Tensor:
    """Squared distance between every two samples of z (B,...), divided by the sample size; (B,B) float32."""
    flat = z.float().flatten(1)
    # torch's default computes distances by a matrix product, which loses the small ones of a collapsed batch.
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.square() / flat.shape[1]


def dispersive(z: Tensor, tau: float) -> Tensor:
    """Dispersive loss of one batch z (B,...), a scalar: log mean exp(-d/tau), the diagonal included.

    The InfoNCE form with L2 distance and without positives (Disperse-Loss).
    """
    return (-pairwise(z) / tau).flatten().logsumexp(0) - 2.0 * math.log(z.shape[0])


def dispersive_rows(z: Tensor, tau: float, batch: int | None = None) -> Tensor:
    """Dispersive loss of each local batch of `batch` samples of z (B,...), repeated for its samples (B,).

    The mean is the loss of a run in which each device has `batch` samples. None treats z as one batch.
    """
    parts = torch.split(z, batch or len(z))
    return torch.cat([dispersive(part, tau).expand(len(part)) for part in parts])


# Times and blocks


def at_kept(tokens: Tensor, kept: Tensor | None) -> Tensor:
    """Select the tokens `kept` (B,n) of tokens (B,N,D), to compare them with features inside a route.

    None, for features outside of a route, selects all.
    """
    return tokens if kept is None else gather_tokens(tokens, kept)


def check_interval(interval: tuple[float, float]) -> None:
    """Raise UserError if the bounds of `recipe.interval` are swapped."""
    if interval[0] > interval[1]:
        raise UserError(
            f"recipe.interval must be [low,high] with low <= high, got {list(interval)}; "
            f"for example --set recipe.interval=[0.4,0.7]"
        )


def in_interval(
    objective: Objective, t_host: Tensor, interval: tuple[float, float], *, native: bool = False
) -> Tensor:
    """Whether each host time (B,) is in the closed interval of flow-equivalent times; bool, on the host.

    With `native`, the interval is compared with the objective's own t.
    """
    value = t_host if native else objective.tau(t_host)
    # Compared in float32, so that a time stored as float32 0.7 is inside [0.4, 0.7].
    low, high = torch.tensor(interval, dtype=torch.float32)
    return (value.float() >= low) & (value.float() <= high)


def cleaner(objective: Objective, t_host: Tensor, *, amount: float, u: Tensor, clock: Clock) -> Tensor:
    """Move host times (B,) towards the data by `amount` * u, u (B,) in [0,1): the times of SRA's teacher.

    With clock "flow", clamp(tau - amount u, 0, 1) in flow-equivalent time, the same noise reduction under
    every objective. With "native", the same in the objective's own t, by whole steps if it is discrete.
    """
    if clock == "native":
        return objective.earlier(t_host, amount, u)
    return objective.t_of_tau((objective.tau(t_host) - amount * u).clamp(0.0, 1.0))


def relative_block(depth: int, block: int, of: int) -> int:
    """0-based block of a network of `depth` blocks at the relative depth of 1-based `block` among `of`."""
    return min(max(1, round(depth * block / of)), depth) - 1


# Losses on a subset of the batch


def masked(loss: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Scatter losses (n,) of the samples `rows` (n,) into zeros (B,), so that the mean divides by B."""
    return loss.new_zeros(batch).index_put((rows.to(loss.device, non_blocking=True),), loss)


def released_mask(loss: Tensor, inside: Tensor) -> Tensor:
    """Multiply all losses (B,) by the share of samples that are `inside` (B,).

    Self-Transcendence's released code multiplies a (B,) loss by a (B,1,1,1) mask. The mean of that broadcast
    is the mean loss times the mean mask.
    """
    return loss * inside.double().mean().item()


# Targets


def standardise(tokens: Tensor, alpha: float, eps: float = 1e-6) -> Tensor:
    """Return (z - alpha mean) / (std + eps) of tokens z (B,N,D), float32 (iREPA).

    Mean and standard deviation, without bias, are those of each channel over the tokens of a sample.
    """
    z = tokens.float()
    return (z - alpha * z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + eps)


# Heads


def projector(width: int, hidden: int, out: int, *, layers: int = 3) -> nn.Sequential:
    """MLP of `layers` linear layers on tokens with SiLU, Xavier weights and zero biases.

    REPA's has three, parameters 0, 2 and 4.
    """
    widths = [width, *[hidden] * (layers - 1), out]
    linear = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    parts = [part for layer in linear for part in (layer, nn.SiLU())]
    return _xavier(nn.Sequential(*parts[:-1]))


class ConvProjector(nn.Module):
    """One convolution over a square grid of tokens with zero padding, as torch initialises it (iREPA)."""

    def __init__(self, width: int, out: int, kernel: int) -> None:
        super().__init__()
        self.projection_layer = nn.Conv2d(width, out, kernel, padding=kernel // 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B,N,D) to (B,N,out)."""
        side = math.isqrt(tokens.shape[1])
        grid = tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)
        return self.projection_layer(grid).flatten(2).transpose(1, 2)


def sra_head(width: int) -> nn.Sequential:
    """SRA's head on student tokens: Linear(D,2D), SiLU, Linear(2D,D); parameters linear1 and linear2."""
    first, second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
    return _xavier(nn.Sequential(OrderedDict(linear1=first, act=nn.SiLU(), linear2=second)))


class VelocityHead(nn.Module):
    """Final layer that predicts a velocity (B,C,H,W) from tokens (B,N,D).

    Layer norm without affine parameters, Linear to p*p*C, unpatchify: the last layer of Self-Transcendence's
    VAE alignment. Unlike a backbone's output layer it is unconditioned, with Xavier instead of zero weights.
    """

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.patch = patch
        self.channels = channels
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        _xavier(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B,N,D) to a velocity (B,C,H,W)."""
        return unpatchify(self.linear(self.norm(tokens)), self.patch, self.channels)


def _xavier(module: M) -> M:
    """Initialise every linear layer with Xavier-uniform weights and zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return module
