"""DPM-Solver in the two forms that U-ViT uses: single-step, order 3, with "fast" grouping of evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from stbench.core.registry import SAMPLERS
from stbench.diffusion.guidance import Denoiser, host
from stbench.diffusion.noise_prediction import Discrete
from stbench.diffusion.sampler import Noise, Sampler

_CONTINUOUS_END = 1e-4
"""Last time of a continuous process (U-ViT); a discrete one ends at its first step."""


@final
@SAMPLERS.register_module(name="dpm-solver")
@dataclass(frozen=True)
class DpmSolver(Sampler):
    """DPM-Solver-fast as used by U-ViT; `steps` counts evaluations, taken in groups of up to three.

    On a discrete process (U-ViT-H): data prediction (DPM-Solver++), nodes uniform in t, and a group of order
    o spans o intervals. On a continuous process (U-ViT-L): noise prediction, groups of equal length in
    log-SNR, with nodes at equal parts of each.
    """

    name = "dpm-solver"

    def run(self, denoiser: Denoiser, x: Tensor, *, steps: int, noise: Noise | None) -> Tensor:
        """Take one exponential-integrator step per group."""
        data = isinstance(denoiser.objective, Discrete)
        groups = _uniform_time_groups(denoiser, steps) if data else _uniform_snr_groups(denoiser, steps)
        for nodes in groups:
            x = _step(denoiser, x, nodes, data=data)
        return x


def fast_orders(steps: int) -> list[int]:
    """Return the order of each group, `steps` evaluations in total (DPM-Solver-fast, Lu et al. 2022)."""
    threes, rest = divmod(steps, 3)
    if rest:
        return [3] * threes + [rest]
    return [3] * (threes - 1) + [2, 1]


def _uniform_time_groups(denoiser: Denoiser, steps: int) -> list[list[float]]:
    """Return the nodes of each group on a grid that is uniform in t."""
    end = denoiser.objective.snap(host(0.0)).item()
    grid = torch.linspace(1.0, end, steps + 1, dtype=torch.float64).tolist()
    groups, start = [], 0
    for order in fast_orders(steps):
        groups.append(grid[start : start + order + 1])
        start += order
    return groups


def _uniform_snr_groups(denoiser: Denoiser, steps: int) -> list[list[float]]:
    """Return the nodes of each group, groups and nodes uniform in log-SNR."""
    orders = fast_orders(steps)
    ends = (_half_log_snr(denoiser, 1.0), _half_log_snr(denoiser, _CONTINUOUS_END))
    grid = torch.linspace(*ends, len(orders) + 1, dtype=torch.float64).tolist()
    groups = []
    for first, last, order in zip(grid, grid[1:], orders, strict=False):
        snr = torch.linspace(first, last, order + 1, dtype=torch.float64)
        # tau = sigma/(alpha+sigma) is the sigmoid of log(sigma/alpha)
        groups.append(denoiser.objective.t_of_tau(torch.sigmoid(-snr)).tolist())
    return groups


def _half_log_snr(denoiser: Denoiser, t: float) -> float:
    alpha, sigma = denoiser.coefficients(t)
    return math.log(alpha / sigma)


def _step(denoiser: Denoiser, x: Tensor, nodes: list[float], *, data: bool) -> Tensor:
    """Step x from nodes[0] to nodes[-1], with evaluations at all nodes but the last.

    DPM-Solver algorithms 1 and 2, DPM-Solver++ algorithm 1. The data form is the noise form with alpha and
    sigma swapped and the sign of the log-SNR flipped.
    """
    sign = -1.0 if data else 1.0
    start = _half_log_snr(denoiser, nodes[0])
    gaps = [sign * (_half_log_snr(denoiser, t) - start) for t in nodes[1:]]
    carried, gained = zip(*(_swap(denoiser.coefficients(t), data) for t in nodes), strict=True)
    model = [_evaluate(denoiser, x, nodes[0], data)]

    # The exponential integrator from nodes[0] to nodes[k], with what higher orders add to it
    def advance(k: int, correction: Tensor | float) -> Tensor:
        return carried[k] / carried[0] * x - gained[k] * (math.expm1(gaps[k - 1]) * model[0] + correction)

    # Each evaluation at an intermediate node improves the correction for the next
    correction: Tensor | float = 0.0
    for k in range(1, len(nodes) - 1):
        model.append(_evaluate(denoiser, advance(k, correction), nodes[k], data))
        slope = (model[k] - model[0]) / gaps[k - 1]
        correction = _correction(slope, gaps[k], midpoint=len(nodes) == 3)
    return advance(len(nodes) - 1, correction)


def _correction(slope: Tensor, gap: float, *, midpoint: bool) -> Tensor:
    """Contribution of the model's slope along the log-SNR over `gap`; order 2 uses the midpoint rule."""
    if midpoint:
        return 0.5 * gap * math.expm1(gap) * slope
    return (math.expm1(gap) - gap) * slope


def _evaluate(denoiser: Denoiser, x: Tensor, t: float, data: bool) -> Tensor:
    x0, eps = denoiser.denoise(x, t)
    return x0 if data else eps


def _swap(pair: tuple[float, float], swap: bool) -> tuple[float, float]:
    return (pair[1], pair[0]) if swap else pair
