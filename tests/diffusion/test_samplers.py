"""Samplers on Gaussian data with label-dependent mean, for which the exact answer is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from stbench.core.backbone import Backbone, BackboneInfo, Features
from stbench.core.errors import UserError
from stbench.core.objective import Objective
from stbench.core.registry import SAMPLERS, names
from stbench.diffusion import (
    CosineFlow,
    Flow,
    ImprovedDdpm,
    LinearFlow,
    VpContinuous,
    VpDiscrete,
    respaced_steps,
)
from stbench.diffusion.ddpm_samplers import visited_steps
from stbench.diffusion.dpm_solver import fast_orders
from stbench.diffusion.flow import LinearX
from stbench.diffusion.sample import Ddim, Ddpm, EulerMaruyama, Guidance, Heun, Sampler, guide, nfe, sample

FLOWS = [LinearFlow(), CosineFlow()]
X_PREDICTION = LinearX(t_min=1e-4)
CASES: list[tuple[str | Sampler, Objective]] = [
    *[(name, flow) for flow in (*FLOWS, X_PREDICTION) for name in ("euler", "heun", "euler-maruyama")],
    ("ddpm", ImprovedDdpm()),
    ("ddim", ImprovedDdpm()),
    ("ddim", VpDiscrete()),
    ("dpm-solver", VpDiscrete()),
    ("dpm-solver", VpContinuous()),
]
MEANS = torch.tensor([0.5, -0.25, 0.1], dtype=torch.float64)
"""Means of classes 0 and 1, and of the null label."""


class Gaussian(Backbone):
    """The exact network for x0 ~ N(mean of the label, spread^2) under an objective; it records its calls."""

    def __init__(self, objective: Objective, spread: float = 0.0) -> None:
        super().__init__()
        self.info = BackboneInfo("gaussian", "custom", 0, 1, 4, 1, 2, 2, 2)
        self.process, self.spread = objective, spread
        self.labels: list[Tensor] = []
        self.dtypes: set[torch.dtype] = set()

    def forward_intermediates(
        self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int] = (), stop_early: bool = False
    ) -> tuple[Tensor | None, Features]:
        self.labels.append(y)
        self.dtypes |= {x.dtype, t.dtype}
        x = x.double()
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in self.process.alpha_sigma(t))
        mean = MEANS[y].view(-1, 1, 1, 1)
        gain = alpha * self.spread**2 / (alpha**2 * self.spread**2 + sigma**2)
        eps = sigma / (alpha**2 * self.spread**2 + sigma**2) * (x - alpha * mean)
        x0 = mean + gain * (x - alpha * mean)
        if isinstance(self.process, LinearX):
            return x0, {}
        if isinstance(self.process, Flow):
            d_alpha, d_sigma = (c.view(-1, 1, 1, 1) for c in self.process.rates(t))
            return d_alpha * x0 + d_sigma * eps, {}
        return torch.cat([eps, -torch.ones_like(eps)], 1)[:, : self.process.out_channels(2)], {}


def z(batch: int = 4) -> Tensor:
    return torch.randn(batch, 2, 2, 2, generator=torch.Generator().manual_seed(1))


def noise(batch: int = 4, seed: int = 0) -> object:
    def draw(index: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + index + 7)
        return torch.randn(batch, 2, 2, 2, generator=generator)

    return draw


def run(name: str | Sampler, net: Gaussian, steps: int, batch: int = 4, **options: object) -> Tensor:
    y = torch.arange(batch) % 2
    return sample(name, net, net.process, z(batch), y, steps=steps, noise=noise(batch), **options)  # type: ignore[arg-type]


def ids(case: object) -> str:
    return case if isinstance(case, str) else type(case).__name__


def means(batch: int = 4) -> Tensor:
    return MEANS[torch.arange(batch) % 2].view(-1, 1, 1, 1).expand(-1, 2, 2, 2).float()


def flow_answer(objective: Objective, spread: float, end: float) -> Tensor:
    """Where the probability-flow ODE carries z from time 1 to `end`, in closed form."""
    (a1, s1), (a0, s0) = (
        (c.item() for c in objective.alpha_sigma(torch.tensor([t]).double())) for t in (1.0, end)
    )
    width = math.sqrt((a0**2 * spread**2 + s0**2) / (a1**2 * spread**2 + s1**2))
    return a0 * means() + width * (z() - a1 * means())


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_ode_samplers_are_exact_on_a_point_for_the_straight_flow(name: str) -> None:
    assert torch.allclose(run(name, Gaussian(LinearFlow()), 3), means(), atol=1e-5)


@pytest.mark.parametrize(("name", "objective"), CASES[9:12], ids=ids)
def test_step_samplers_are_exact_on_a_point(name: str, objective: Objective) -> None:
    assert torch.allclose(run(name, Gaussian(objective), 5), means(), atol=1e-4)


@pytest.mark.parametrize(("objective", "end"), [(VpDiscrete(), 1e-3), (VpContinuous(), 1e-4)], ids=ids)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9])
def test_dpm_solver_is_exact_on_a_point(objective: Objective, end: float, steps: int) -> None:
    found = run("dpm-solver", Gaussian(objective), steps)
    assert torch.allclose(found, flow_answer(objective, 0.0, end), atol=1e-4)


def error(name: str | Sampler, objective: Objective, steps: int, end: float = 0.0) -> float:
    answer = flow_answer(objective, 0.5, end)
    return (run(name, Gaussian(objective, 0.5), steps) - answer).abs().max().item()


@pytest.mark.parametrize("objective", FLOWS, ids=ids)
def test_halving_the_step_halves_the_error_of_euler(objective: Flow) -> None:
    assert error("euler", objective, 40) / error("euler", objective, 80) == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("objective", FLOWS, ids=ids)
def test_halving_the_step_quarters_the_error_of_heun(objective: Flow) -> None:
    corrected = Heun(correct_last=True)
    assert error(corrected, objective, 20) / error(corrected, objective, 40) == pytest.approx(4.0, abs=0.6)


def test_an_uncorrected_last_step_costs_accuracy() -> None:
    assert error("heun", LinearFlow(), 40) > 3 * error(Heun(correct_last=True), LinearFlow(), 40)


def test_halving_the_step_halves_the_error_of_ddim() -> None:
    end = 0.0  # the last step goes to the clean latent
    ratio = error("ddim", VpDiscrete(), 50, end) / error("ddim", VpDiscrete(), 100, end)
    assert ratio == pytest.approx(2.0, abs=0.4)


@pytest.mark.parametrize(
    ("objective", "end", "steps"), [(VpDiscrete(), 1e-3, 240), (VpContinuous(), 1e-4, 60)], ids=ids
)
def test_dpm_solver_converges_with_order_three(objective: Objective, end: float, steps: int) -> None:
    coarse, fine = (error("dpm-solver", objective, n + 2, end) for n in (steps, 2 * steps))
    assert coarse / fine == pytest.approx(8.0, abs=1.2)


@pytest.mark.parametrize(
    ("sampler", "objective"),
    [("euler-maruyama", LinearFlow()), ("euler-maruyama", CosineFlow()), ("ddpm", ImprovedDdpm())],
    ids=ids,
)
def test_stochastic_samplers_draw_the_data_distribution(sampler: str, objective: Objective) -> None:
    found = run(sampler, Gaussian(objective, 0.5), 250, batch=4096)
    residual = found - means(4096)
    assert residual.mean().item() == pytest.approx(0.0, abs=0.015)
    assert residual.std().item() == pytest.approx(0.5, abs=0.015)


def test_ddim_with_eta_one_is_ancestral_sampling() -> None:
    net = Gaussian(ImprovedDdpm(), 0.5)
    ancestral = run("ddpm", net, 12)
    assert torch.allclose(run(Ddim(1.0, "spread"), net, 12), ancestral, atol=1e-4)
    assert not torch.allclose(run(Ddim(0.0, "spread"), net, 12), ancestral, atol=1e-2)


@pytest.mark.parametrize(("name", "objective"), CASES, ids=ids)
def test_nfe_counts_the_calls(name: str, objective: Objective) -> None:
    net = Gaussian(objective, 0.5)
    run(name, net, 10)
    assert len(net.labels) == nfe(name, 10) == (19 if name == "heun" else 10)


def test_nfe_of_a_fully_corrected_heun() -> None:
    net = Gaussian(LinearFlow(), 0.5)
    run(Heun(correct_last=True), net, 10)
    assert len(net.labels) == nfe(Heun(correct_last=True), 10) == 20


@pytest.mark.parametrize(("name", "objective"), CASES, ids=ids)
def test_the_network_sees_float32_and_times_float64(name: str, objective: Objective) -> None:
    net = Gaussian(objective, 0.5)
    out = run(name, net, 4)
    assert net.dtypes == {torch.float32, torch.float64}
    assert out.dtype == torch.float32


@pytest.mark.parametrize(("name", "objective"), CASES, ids=ids)
def test_guidance_shifts_the_mean_by_the_scale(name: str, objective: Objective) -> None:
    net = Gaussian(objective)
    steps = 200 if name == "euler-maruyama" or isinstance(objective, CosineFlow) else 10
    guided = run(name, net, steps, guidance=Guidance(3.0)) - run(name, net, steps)
    expected = 2.0 * (means() - MEANS[2])
    assert torch.allclose(guided, expected.float(), atol=0.03)


@pytest.mark.parametrize(("name", "objective"), CASES, ids=ids)
def test_the_null_label_is_used_inside_the_interval_only(name: str, objective: Objective) -> None:
    net, interval = Gaussian(objective, 0.5), Guidance(2.0, 0.3, 0.6)
    run(name, net, 20, guidance=interval)
    sizes = [len(y) for y in net.labels]
    assert set(sizes) == {4, 8}
    for y in net.labels:
        assert torch.equal(y[:4], torch.arange(4) % 2)
        assert torch.all(y[4:] == 2)


def test_guidance_is_on_at_both_ends_of_the_interval() -> None:
    net = Gaussian(LinearFlow(), 0.5)
    run("euler", net, 8, guidance=Guidance(2.0, 0.25, 0.75))
    assert [len(y) for y in net.labels] == [4, 4, 8, 8, 8, 8, 8, 4]


def test_heun_is_guided_as_at_the_start_of_each_step() -> None:
    net = Gaussian(LinearFlow(), 0.5)
    run("heun", net, 4, guidance=Guidance(2.0, 0.0, 0.5))
    assert [len(y) for y in net.labels] == [4, 4, 4, 4, 8, 8, 8]


def test_scale_one_does_not_guide() -> None:
    net = Gaussian(LinearFlow(), 0.5)
    run("euler", net, 4, guidance=Guidance(1.0))
    assert {len(y) for y in net.labels} == {4}


def test_guide_by_hand() -> None:
    cond, uncond = torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, 1.0]])
    assert guide(cond, uncond, 2.0).tolist() == [[5.0, 9.0]]
    assert guide(cond, uncond, 2.0, 1).tolist() == [[5.0, 5.0]]


def test_unguided_channels_keep_the_conditional_prediction() -> None:
    net = Gaussian(LinearFlow())
    found = run("euler", net, 4, guidance=Guidance(3.0, channels=1))
    assert torch.allclose(found[:, 1], means()[:, 1], atol=1e-5)
    assert not torch.allclose(found[:, 0], means()[:, 0], atol=0.1)


def test_the_learned_variance_is_never_guided() -> None:
    class Loud(Gaussian):
        def forward_intermediates(
            self, x: Tensor, t: Tensor, y: Tensor, **rest: object
        ) -> tuple[Tensor, Features]:
            prediction, _ = super().forward_intermediates(x, t, y)
            assert prediction is not None
            eps, v = prediction.chunk(2, 1)
            return torch.cat([eps, v + 2.0 * (y == 2).view(-1, 1, 1, 1)], 1), {}

    quiet, loud = (
        run("ddpm", cls(ImprovedDdpm(), 0.5), 6, guidance=Guidance(2.0)) for cls in (Gaussian, Loud)
    )
    assert torch.equal(quiet, loud)


def test_equal_noise_gives_equal_samples() -> None:
    net = Gaussian(LinearFlow(), 0.5)
    assert torch.equal(run("euler-maruyama", net, 8), run("euler-maruyama", net, 8))
    other = sample(
        "euler-maruyama",
        net,
        net.process,
        z(),
        torch.arange(4) % 2,
        steps=8,
        noise=noise(seed=1),  # type: ignore[arg-type]
    )
    assert not torch.allclose(other, run("euler-maruyama", net, 8), atol=1e-2)


@pytest.mark.parametrize(
    ("sampler", "objective"),
    [("euler-maruyama", LinearFlow()), ("ddpm", ImprovedDdpm()), (Ddim(0.5), ImprovedDdpm())],
    ids=ids,
)
def test_a_stochastic_sampler_needs_noise(sampler: str | Sampler, objective: Objective) -> None:
    with pytest.raises(ValueError, match="draws noise"):
        sample(sampler, Gaussian(objective), objective, z(), torch.arange(4) % 2, steps=5)


def test_the_last_step_of_the_sde_has_no_noise() -> None:
    drawn: list[int] = []

    def record(index: int) -> Tensor:
        drawn.append(index)
        return torch.zeros(4, 2, 2, 2)

    net = Gaussian(LinearFlow(), 0.5)
    sample(EulerMaruyama(), net, net.process, z(), torch.arange(4) % 2, steps=6, noise=record)
    assert drawn == [0, 1, 2, 3, 4]


def test_a_sampler_that_cannot_invert_the_objective_lists_those_that_can() -> None:
    with pytest.raises(UserError, match="'ddpm' cannot invert objective 'linear'; use one of: euler, heun"):
        run("ddpm", Gaussian(LinearFlow()), 10)


def test_an_unknown_sampler_is_suggested() -> None:
    with pytest.raises(UserError, match="did you mean 'euler'"):
        run("eular", Gaussian(LinearFlow()), 10)


@pytest.mark.parametrize(
    ("name", "objective", "steps"), [("euler", LinearFlow(), 0), ("ddpm", ImprovedDdpm(), 1)]
)
def test_too_few_steps_are_a_user_error(name: str, objective: Objective, steps: int) -> None:
    with pytest.raises(UserError, match="at least"):
        run(name, Gaussian(objective), steps)


@pytest.mark.parametrize(("low", "high"), [(0.7, 0.4), (-0.1, 0.5), (0.2, 1.5)])
def test_a_wrong_guidance_interval_is_a_user_error(low: float, high: float) -> None:
    with pytest.raises(UserError, match="the guidance interval must be"):
        Guidance(2.0, low, high)


@pytest.mark.parametrize("channels", [0, 3])
def test_a_wrong_number_of_guided_channels_is_a_user_error(channels: int) -> None:
    with pytest.raises(UserError, match="guided channel"):
        run("euler", Gaussian(LinearFlow()), 4, guidance=Guidance(2.0, channels=channels))


@pytest.mark.parametrize("steps", range(1, 13))
def test_fast_groups_add_up(steps: int) -> None:
    orders = fast_orders(steps)
    assert sum(orders) == steps
    assert len(orders) == (steps // 3 + 1)
    assert set(orders) <= {1, 2, 3}


def test_every_objective_lists_registered_samplers() -> None:
    for objective in {objective for _, objective in CASES}:
        assert set(objective.samplers) <= set(names(SAMPLERS))


def test_ddpm_and_ddim_take_either_spacing() -> None:
    assert visited_steps("spread", 10, ImprovedDdpm()).tolist() == respaced_steps("10").tolist()
    assert visited_steps("stride", 10, ImprovedDdpm()).tolist() == list(range(0, 1000, 100))
    net = Gaussian(ImprovedDdpm(), 0.5)
    seen = [run(Ddpm(spacing), net, 10) for spacing in ("spread", "stride")]
    assert not torch.equal(*seen)


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
def test_x_prediction_and_velocity_prediction_give_the_same_samples(sampler: str) -> None:
    guidance = Guidance(2.0, 0.1, 0.9, channels=1)
    velocity, clean = (
        run(sampler, Gaussian(flow, 0.5), 20, guidance=guidance) for flow in (LinearFlow(), X_PREDICTION)
    )
    assert torch.allclose(velocity, clean, atol=1e-4)


def test_the_clamp_of_linear_x_shortens_the_last_steps() -> None:
    """As in JiT: the last of 50 Euler steps goes 0.02/0.05 of the way to the predicted latent."""
    found = run("euler", Gaussian(LinearX()), 50)
    start = run("euler", Gaussian(LinearX(t_min=1e-4)), 50)
    assert torch.allclose(start, means(), atol=1e-5)
    assert 1e-3 < (found - means()).abs().max() < 0.1


def test_a_sampler_may_invert_objectives_that_do_not_name_it() -> None:
    class Own(Heun):
        name = "own"

        def inverts(self, objective: Objective) -> bool:
            return "heun" in objective.samplers

    with pytest.raises(UserError, match="'own' cannot invert objective 'iddpm'; use one of: ddpm, ddim"):
        run(Own(), Gaussian(ImprovedDdpm()), 3)
    net = Gaussian(LinearFlow(), 0.5)
    assert torch.equal(run(Own(), net, 4), run("heun", net, 4))
