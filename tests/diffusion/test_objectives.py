"""Objectives: corruption, targets, losses and flow-equivalent time."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from stbench.core.errors import UserError
from stbench.core.objective import Batch, Noised, Objective
from stbench.core.registry import OBJECTIVES, lookup
from stbench.core.rng import Rng
from stbench.diffusion import (
    CosineFlow,
    Flow,
    ImprovedDdpm,
    LinearFlow,
    VpContinuous,
    VpDiscrete,
    linear_betas,
    respaced_steps,
)
from stbench.diffusion.flow import LinearX
from stbench.diffusion.guidance import guide
from stbench.diffusion.noise_prediction import NoisePrediction, discretised_log_likelihood

FLOWS = [LinearFlow(), CosineFlow(), LinearX()]
NOISE = [ImprovedDdpm(), VpDiscrete(), VpContinuous()]
ALL = [*FLOWS, *NOISE]


def name(objective: Objective) -> str:
    return type(objective).__name__


def pair(batch: int = 5) -> tuple[Tensor, Tensor]:
    """Clean latents and noise, float64 for tight tolerances."""
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, batch, 3, 4, 4, generator=g, dtype=torch.float64)
    return x0, eps


def truth(objective: Objective, noised: Noised) -> Tensor:
    """The prediction without error."""
    if isinstance(objective, LinearX):
        return noised.x0
    if isinstance(objective, Flow):
        return objective.velocity_target(noised)
    return torch.cat([noised.noise, torch.zeros_like(noised.noise)], 1)[:, : objective.out_channels(3)]


@pytest.mark.parametrize("objective", FLOWS, ids=name)
def test_a_flow_runs_from_data_to_noise(objective: Flow) -> None:
    x0, eps = pair(1)
    assert torch.equal(objective.at(x0, eps, torch.zeros(1)).x_t, x0)
    assert torch.allclose(objective.at(x0, eps, torch.ones(1)).x_t, eps, atol=1e-12)


@pytest.mark.parametrize("objective", NOISE, ids=name)
def test_a_diffusion_preserves_variance(objective: NoisePrediction) -> None:
    alpha, sigma = objective.alpha_sigma(objective.snap(torch.linspace(0, 1, 50)))
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(50, dtype=torch.float64), atol=1e-12)
    assert alpha[0] > 0.99
    assert alpha[-1] < 0.1


@pytest.mark.parametrize("objective", ALL, ids=name)
def test_t_of_tau_inverts_tau(objective: Objective) -> None:
    t = objective.snap(torch.linspace(0.02, 0.98, 33, dtype=torch.float64))
    assert torch.allclose(objective.t_of_tau(objective.tau(t)), t, atol=1e-9)


@pytest.mark.parametrize("objective", ALL, ids=name)
def test_t_of_tau_is_clamped_to_the_times_of_the_process(objective: Objective) -> None:
    ends = objective.t_of_tau(torch.tensor([-0.5, 0.0, 1.0, 2.0]))
    first, last = objective.snap(torch.zeros(1)), torch.ones(1)
    assert torch.allclose(ends.float(), torch.cat([first, first, last, last]).float())


def test_tau_is_the_same_noise_level_on_the_linear_flow() -> None:
    for objective in ALL:
        t = objective.snap(torch.tensor([0.3], dtype=torch.float64))
        alpha, sigma = objective.alpha_sigma(t)
        flow_alpha, flow_sigma = LinearFlow().alpha_sigma(objective.tau(t))
        assert torch.allclose(sigma / alpha, flow_sigma / flow_alpha)


@pytest.mark.parametrize("objective", FLOWS, ids=name)
def test_flow_velocity_is_the_derivative_of_the_path(objective: Flow) -> None:
    x0, eps = pair(3)
    t, h = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 1e-5
    ahead, behind = (objective.at(x0, eps, t + d).x_t for d in (h, -h))
    assert torch.allclose(
        objective.velocity_target(objective.at(x0, eps, t)), (ahead - behind) / (2 * h), atol=1e-8
    )


@pytest.mark.parametrize("objective", NOISE, ids=name)
def test_a_noise_prediction_has_the_velocity_of_the_linear_flow(objective: NoisePrediction) -> None:
    x0, eps = pair(2)
    noised = objective.at(x0, eps, torch.tensor([0.2, 0.6]))
    assert torch.equal(objective.velocity_target(noised), eps - x0)


@pytest.mark.parametrize("objective", ALL, ids=name)
def test_the_true_prediction_denoises_exactly(objective: Objective) -> None:
    x0, eps = pair()
    noised = objective.at(x0, eps, torch.linspace(0.1, 0.9, 5))
    prediction = truth(objective, noised)
    found_x0, found_eps = objective.denoise(prediction, noised.x_t, noised.t)
    assert torch.allclose(found_x0, x0, atol=1e-9)
    assert torch.allclose(found_eps, eps, atol=1e-9)


@pytest.mark.parametrize("objective", [*FLOWS[:2], VpDiscrete(), VpContinuous()], ids=name)
def test_the_loss_is_the_mean_square_per_sample_in_float32(objective: Objective) -> None:
    x0, eps = (v.bfloat16() for v in pair(2))
    noised = objective.at(x0, eps, torch.tensor([0.25, 0.75]))
    off = torch.tensor([1.0, 2.0], dtype=torch.bfloat16).view(2, 1, 1, 1)
    loss = objective.loss(truth(objective, noised) + off, noised)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, torch.tensor([1.0, 4.0]), rtol=0.02)


def test_only_discrete_processes_round_time() -> None:
    t = torch.tensor([0.50021], dtype=torch.float64)
    assert LinearFlow().snap(t) is t
    assert VpContinuous().snap(t) is t
    assert ImprovedDdpm().snap(t).item() == 500 / 999
    assert VpDiscrete().snap(t).item() == 0.5
    assert VpDiscrete().snap(torch.zeros(1)).item() == 1 / 1000


@pytest.mark.parametrize(
    ("objective", "low"), [(ImprovedDdpm(), 0.0), (VpDiscrete(), 1e-3)], ids=["iddpm", "vp"]
)
def test_discrete_training_times_are_all_the_whole_steps(objective: ImprovedDdpm, low: float) -> None:
    t = objective.sample_t(Rng(0, 0, 20000))
    assert torch.equal(objective.snap(t), t)
    assert (t.min().item(), t.max().item()) == (low, 1.0)
    assert len(t.unique()) == 1000


@pytest.mark.parametrize("objective", [*FLOWS, VpContinuous()], ids=name)
def test_continuous_training_times_are_the_uniform_draws(objective: Objective) -> None:
    rng = Rng(3, 7, 8, 2, 6)
    assert torch.equal(objective.sample_t(rng), rng.uniform("t"))


def test_draw_uses_the_noise_and_times_of_the_step() -> None:
    rng, x0 = Rng(1, 64, 6, 2, 5), pair(3)[0].float()
    noised = LinearFlow().draw(Batch(x0, torch.zeros(3), torch.zeros(3), torch.arange(3), rng))
    assert torch.equal(noised.noise, rng.normal("noise", (3, 4, 4)))
    assert torch.equal(noised.t_host, rng.uniform("t"))


def test_continuous_alpha_is_the_integral_of_beta() -> None:
    grid = torch.linspace(0, 0.7, 20001, dtype=torch.float64)
    integral = torch.trapezoid(0.1 + 19.9 * grid, grid)
    alpha, _ = VpContinuous().alpha_sigma(torch.tensor([0.7], dtype=torch.float64))
    assert alpha.item() == pytest.approx(math.exp(-0.5 * integral.item()), rel=1e-9)


def test_discrete_coefficients_are_the_tables_at_whole_steps() -> None:
    for objective in (ImprovedDdpm(), VpDiscrete()):
        alpha, _ = objective.alpha_sigma(objective.time(torch.arange(1000)))
        assert torch.allclose(alpha**2, objective.schedule.alphas_cumprod, rtol=1e-12)


def test_corruption_matches_diffusers() -> None:
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    x0, eps = (v.float() for v in pair(3))
    n = torch.tensor([0, 431, 999])
    noised = ImprovedDdpm().at(x0, eps, n / 999)
    assert torch.allclose(noised.x_t, scheduler.add_noise(x0, eps, n), atol=2e-5)


@pytest.mark.parametrize("n", [1, 17, 500, 999])
def test_model_posterior_matches_diffusers_learned_range(n: int) -> None:
    scheduler = DDPMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type="learned_range",
        clip_sample=False,
    )
    x_t, eps = (v.float() for v in pair(2))
    prediction = torch.cat([eps, 0.3 * x_t], 1)
    expected = scheduler.step(prediction, n, x_t, generator=torch.Generator().manual_seed(5)).prev_sample
    z = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5))
    mean, log_variance, _ = ImprovedDdpm().schedule.model_posterior(prediction, x_t, torch.tensor([n]))
    assert torch.allclose(mean + (0.5 * log_variance).exp() * z, expected, rtol=1e-3, atol=1e-3)


def test_the_clean_latent_is_rounded_as_in_the_published_code() -> None:
    """At step 0 the gradient of the likelihood magnifies the last bit of the mean up to a thousand times."""
    objective = ImprovedDdpm()
    x_t, eps = (v.float() for v in pair(2))
    bar = objective.schedule.alphas_cumprod[0]
    of_x_t, of_noise = ((1.0 / bar).sqrt().float(), (1.0 / bar - 1.0).sqrt().float())
    index = torch.zeros(2, dtype=torch.long)
    _, _, x0 = objective.schedule.model_posterior(torch.cat([eps, eps], 1), x_t, index)
    assert torch.equal(x0, of_x_t * x_t - of_noise * eps)


def test_the_bound_vanishes_where_model_and_posterior_agree() -> None:
    objective = ImprovedDdpm()
    x0, eps = (v.float() for v in pair(3))
    noised = objective.at(x0, eps, torch.tensor([1, 300, 999]) / 999)
    agreeing = torch.cat([eps, -torch.ones_like(eps)], 1)
    assert objective.bound(agreeing, noised).abs().max() < 1e-3
    assert objective.bound(torch.cat([eps + 1.0, -torch.ones_like(eps)], 1), noised).min() > 1e-3


def test_the_bound_at_step_zero_is_the_discretised_likelihood() -> None:
    objective = ImprovedDdpm()
    x0, eps = (v.float() for v in pair(2))
    noised = objective.at(x0, eps, torch.zeros(2))
    prediction = torch.cat([eps, torch.zeros_like(eps)], 1)
    mean, log_variance, _ = objective.schedule.model_posterior(
        prediction, noised.x_t, torch.zeros(2, dtype=torch.long)
    )
    nll = -discretised_log_likelihood(x0, mean, 0.5 * log_variance).flatten(1).mean(1) / math.log(2)
    assert torch.allclose(objective.bound(prediction, noised), nll)
    assert nll.max() < 2.0


def test_the_discretised_likelihood_sums_to_one_over_the_bins() -> None:
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_scale in ((0.2, -2.0), (-0.9, -1.0), (0.0, 0.5)):
        total = discretised_log_likelihood(bins, torch.tensor(mean), torch.tensor(log_scale)).exp().sum()
        assert total.item() == pytest.approx(1.0, abs=1e-4)


def test_the_bound_trains_the_variance_only() -> None:
    objective = ImprovedDdpm()
    x0, eps = (v.float() for v in pair(3))
    noised = objective.at(x0, eps, torch.tensor([0, 10, 900]) / 999)
    prediction = (0.5 * torch.cat([eps, x0], 1)).requires_grad_()
    (grad,) = torch.autograd.grad(objective.bound(prediction, noised).sum(), prediction)
    assert torch.all(grad[:, :3] == 0)
    assert torch.all(grad[:, 3:].flatten(1).abs().sum(1) > 0)


def test_hybrid_loss_is_mse_plus_bound() -> None:
    objective = ImprovedDdpm()
    x0, eps = (v.float() for v in pair(2))
    noised = objective.at(x0, eps, torch.tensor([0.0, 0.5]))
    prediction = torch.cat([eps + 0.5, x0], 1)
    extra = objective.loss(prediction, noised) - objective.bound(prediction, noised)
    assert torch.allclose(extra, torch.tensor([0.25, 0.25]), atol=1e-5)
    assert objective.out_channels(3) == 6


def test_the_posterior_variance_of_step_zero_borrows_from_step_one() -> None:
    schedule = ImprovedDdpm().schedule
    assert schedule.posterior_variance[0] == 0
    log_variance = schedule.posterior_log_variance_clipped
    assert log_variance[0] == log_variance[1] == schedule.posterior_variance[1].log()


def test_respacing_keeps_the_cumulative_products() -> None:
    schedule = ImprovedDdpm().schedule
    kept = respaced_steps("7")
    assert (kept[0].item(), kept[-1].item(), len(kept)) == (0, 999, 7)
    assert torch.allclose(schedule.respaced(kept).alphas_cumprod, schedule.alphas_cumprod[kept], rtol=1e-9)


def test_ddim_spacing_has_a_whole_stride() -> None:
    assert respaced_steps("ddim50").tolist() == list(range(0, 1000, 20))
    assert respaced_steps("ddim334").tolist() == list(range(0, 1000, 3))


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        ("ddim300", "no whole stride takes 300 of 1000 sampling steps; use 250 steps"),
        ("1", "the number of sampling steps must be 2 to 1000, got 1"),
        ("1001", "must be 2 to 1000, got 1001"),
        ("ddim0", "must be 2 to 1000, got 0"),
    ],
)
def test_impossible_spacings_are_user_errors(spacing: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        respaced_steps(spacing)


def test_linear_betas_scale_with_the_number_of_steps() -> None:
    assert linear_betas(100)[0].item() == pytest.approx(1e-3)
    assert linear_betas(100)[-1].item() == pytest.approx(0.2)


@pytest.mark.parametrize(("name", "plain"), [("linear", LinearFlow()), ("cosine", CosineFlow())])
def test_lognormal_times_have_a_normal_logarithm_of_noise_to_signal(name: str, plain: Flow) -> None:
    """REPA's `--weighting lognormal`: t = s/(1+s) on the linear path, 2/pi atan(s) on the cosine one."""
    objective = lookup(OBJECTIVES, f"{name}-lognormal")()
    t = objective.sample_t(Rng(0, 0, 20_000))
    alpha, sigma = plain.alpha_sigma(t)
    logarithm = (sigma / alpha).log()
    assert abs(logarithm.mean()) < 0.03 and abs(logarithm.std() - 1.0) < 0.03
    s = logarithm.exp()
    expected = s / (1 + s) if name == "linear" else 2 / math.pi * s.atan()
    torch.testing.assert_close(t, expected)
    assert plain.sample_t(Rng(0, 0, 20_000)).std() > t.std()


@pytest.mark.parametrize("objective", ALL, ids=name)
def test_the_true_prediction_implies_the_true_velocity(objective: Objective) -> None:
    x0, eps = pair()
    noised = objective.at(x0, eps, torch.linspace(0.1, 0.9, 5))
    found = objective.velocity(truth(objective, noised), noised.x_t, noised.t)
    assert torch.allclose(found, objective.velocity_target(noised), atol=1e-9)


def test_a_flow_keeps_the_bits_of_its_velocity() -> None:
    v = pair()[0].float()
    assert CosineFlow().velocity(v, v, torch.ones(5)) is v


def test_linear_x_has_the_loss_of_jit() -> None:
    """JiT's time is s = 1 - t, with data at s=1; it divides both velocities by the clamped time."""
    x, eps = (v.float() for v in pair())
    s = torch.tensor([0.0, 0.3, 0.9, 0.97, 1.0], dtype=torch.float64)
    noised = LinearX().at(x, eps, 1.0 - s)
    prediction, gap = 0.7 * x + 0.1 * eps, (1.0 - s).clamp(min=0.05).float().view(-1, 1, 1, 1)
    z = s.float().view(-1, 1, 1, 1) * x + (1.0 - s).float().view(-1, 1, 1, 1) * eps
    difference = (x - z) / gap - (prediction - z) / gap
    torch.testing.assert_close(LinearX().loss(prediction, noised), difference.square().mean((1, 2, 3)))
    torch.testing.assert_close(LinearX().velocity(prediction, noised.x_t, noised.t), -(prediction - z) / gap)


def test_the_clamp_of_linear_x_is_an_option() -> None:
    x, eps = (v.float() for v in pair(2))
    noised = LinearX().at(x, eps, torch.full((2,), 0.1))
    ratio = LinearX().loss(x + 1.0, noised) / LinearX(t_min=0.2).loss(x + 1.0, noised)
    torch.testing.assert_close(ratio, torch.full((2,), 4.0))


def test_guiding_the_clean_latent_guides_the_velocity() -> None:
    (a, b), x_t, t = pair(2), pair(1)[1], torch.tensor([0.02], dtype=torch.float64)
    objective = LinearX()
    velocities = [objective.velocity(p, x_t, t) for p in (a, b)]
    found = objective.velocity(guide(a, b, 2.5), x_t, t)
    torch.testing.assert_close(found, guide(velocities[0], velocities[1], 2.5))


def test_lognormal_times_have_the_location_and_scale_of_jit() -> None:
    """JiT draws its time 1 - t, which is 1 for data, from sigmoid(-0.8 + 0.8 n)."""
    t = lookup(OBJECTIVES, "linear-x-lognormal")().sample_t(Rng(0, 0, 20_000))
    logit = torch.logit(1.0 - t)
    assert logit.mean().item() == pytest.approx(-0.8, abs=0.02)
    assert logit.std().item() == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("name", ["linear", "linear-lognormal", "linear-x", "linear-x-lognormal"])
def test_a_shift_moves_the_training_times_as_in_stable_diffusion_3(name: str) -> None:
    rng, family = Rng(0, 0, 1000), lookup(OBJECTIVES, name)
    t = family().sample_t(rng)
    torch.testing.assert_close(family(shift=3.0).sample_t(rng), 3.0 * t / (1.0 + 2.0 * t))


def test_a_shift_multiplies_the_noise_to_signal_ratio_on_every_path() -> None:
    rng = Rng(0, 0, 1000)
    plain, shifted = (CosineFlow(s).alpha_sigma(CosineFlow(s).sample_t(rng)) for s in (1.0, 3.0))
    torch.testing.assert_close(shifted[1] / shifted[0], 3.0 * plain[1] / plain[0])


def test_a_shift_of_lognormal_times_is_a_location() -> None:
    rng, family = Rng(0, 0, 1000), lookup(OBJECTIVES, "linear-lognormal")
    moved = family(location=math.log(3.0)).sample_t(rng)
    torch.testing.assert_close(family(shift=3.0).sample_t(rng), moved)


def test_linear_x_takes_times_per_token() -> None:
    x, eps = (v.float() for v in pair(2))
    t = torch.tensor([[0.02, 0.3, 0.6, 0.9]] * 2, dtype=torch.float64)  # a 2x2 grid of tokens of 2x2 pixels
    noised = LinearX().at(x, eps, t)
    velocity = LinearX().velocity(x, noised.x_t, noised.t)
    expected = LinearFlow().velocity_target(noised)
    expected[:, :, :2, :2] *= 0.02 / 0.05
    torch.testing.assert_close(velocity, expected)
    assert LinearX().loss(x, noised).abs().max() == 0
