"""MIND against assignment problems, closed forms, and torch-fidelity's formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from stbench.core.rng import generator
from stbench.evaluate.mind import BLOCK, PROJECTIONS, monge_distance


def rows(seed: int, count: int, width: int, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return mean + deviation * torch.randn(count, width, generator=draws, dtype=torch.float64)


def directions(seed: int, count: int, width: int) -> Tensor:
    drawn = torch.randn(count, width, generator=generator(seed, "mind"), dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


def transport_cost(a: np.ndarray, b: np.ndarray) -> float:
    """The squared 2-Wasserstein distance of two sets of numbers, as an assignment problem."""
    cost = (a[:, None] - b[None, :]) ** 2
    return float(cost[linear_sum_assignment(cost)].mean())


def test_mind_is_the_mean_optimal_assignment_over_directions() -> None:
    x, y = rows(0, 30, 7), rows(1, 30, 7, mean=0.4, deviation=1.5)
    u = directions(3, 20, 7)
    costs = [transport_cost((x @ d).numpy(), (y @ d).numpy()) for d in u]
    found = monge_distance(x, y, seed=3, projections=20)
    assert found == pytest.approx(3 * 7 * np.mean(costs), rel=1e-12)


def test_mind_of_shifted_features_is_three_times_the_squared_shift() -> None:
    """W2^2 along u is <u,s>^2, whose mean over the sphere is |s|^2 / D."""
    x, shift = rows(0, 100, 16), rows(5, 1, 16)
    u = directions(0, PROJECTIONS, 16)
    exact = 3 * 16 * float((u @ shift[0]).square().mean())
    assert monge_distance(x, x + shift) == pytest.approx(exact, rel=1e-10)
    assert monge_distance(x, x + shift) == pytest.approx(3 * float(shift.square().sum()), rel=0.15)


def test_mind_of_two_gaussians_is_their_closed_form() -> None:
    """W2^2 of N(m1,s1^2) and N(m2,s2^2) is (m1-m2)^2 + (s1-s2)^2, here in every direction."""
    width, mean, deviation = 8, 0.5, 2.0
    x, y = rows(0, 20_000, width), rows(1, 20_000, width, mean, deviation)
    u = directions(0, 200, width)
    expected = 3 * width * float(((mean * u.sum(1)).square() + (deviation - 1.0) ** 2).mean())
    assert monge_distance(x, y, projections=200) == pytest.approx(expected, rel=0.02)


def test_mind_agrees_with_torch_fidelity_up_to_the_spread_over_directions() -> None:
    """Its formula in numpy (main, 2026-05), with float32 and directions of another generator."""
    x, y = rows(0, 400, 64), rows(1, 400, 64, mean=0.1, deviation=1.2)
    drawn = np.random.default_rng(2020).standard_normal((1000, 64)).astype(np.float32)
    u = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    a, b = (np.sort(v.numpy().astype(np.float32) @ u.T, axis=0) for v in (x, y))
    costs = 3 * 64 * ((a - b) ** 2).mean(0).astype(float)
    spread = float(costs.std()) / math.sqrt(1000)
    assert spread < 0.05 * costs.mean()
    assert monge_distance(x, y) == pytest.approx(float(costs.mean()), abs=4 * spread)


def test_mind_uses_as_many_rows_of_the_larger_set() -> None:
    x, y = rows(0, 50, 5), rows(1, 80, 5)
    chosen = torch.randperm(80, generator=generator(4, "mind-rows"))[:50]
    assert monge_distance(x, y, seed=4) == monge_distance(x, y[chosen], seed=4)
    assert monge_distance(y, x, seed=4) == monge_distance(x, y, seed=4)


def test_mind_depends_on_the_seed_and_not_on_the_order_of_rows_or_on_global_generators() -> None:
    x, y = rows(0, 40, 6), rows(1, 40, 6)
    first = monge_distance(x, y)
    torch.manual_seed(123)
    assert monge_distance(x, y) == first
    assert monge_distance(x.flip(0), y[torch.randperm(40)]) == pytest.approx(first, rel=1e-12)
    assert monge_distance(x, y, seed=1) != first
    assert monge_distance(x, x) == 0.0
    assert monge_distance(x.float(), y.float()) == pytest.approx(first, rel=1e-5)
    assert PROJECTIONS % BLOCK == 0 and monge_distance(x, y, projections=BLOCK + 1) > 0.0
