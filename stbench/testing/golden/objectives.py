"""Golden checks of objectives and schedules, and helpers for checks of losses and samplers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from stbench.core.backbone import Backbone
from stbench.core.objective import Noised
from stbench.diffusion import (
    ImprovedDdpm,
    LinearFlow,
    Schedule,
    VpContinuous,
    VpDiscrete,
    linear_betas,
    respaced_steps,
    scaled_linear_betas,
)
from stbench.testing.golden.backbones import load_network
from stbench.testing.golden.run import Check, Golden, check

TOLERANCE = 2e-5
SCHEDULE = 1e-10
GRADIENT = 1e-4
"""For gradients divided by their largest entry."""


def network(golden: Golden) -> tuple[Backbone, dict[str, Tensor]]:
    """The network that a golden file refers to, in our direction of time, and the heads stored with it."""
    return load_network(golden.weights())


def run(net: Backbone, noised: Noised, y: Tensor, *blocks: int) -> tuple[Tensor, list[Tensor]]:
    """Return the prediction and the features of 1-based blocks."""
    prediction, features = net.forward_intermediates(
        noised.x_t, noised.t, y, indices=[block - 1 for block in blocks]
    )
    assert prediction is not None
    return prediction, [features[block - 1] for block in blocks]


def tolerated(golden: Golden, found: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> Iterator[Check]:
    """Compare each named value with the stored tensor of that name."""
    for name, value in found.items():
        yield golden.compare(name, value, golden.t[name], tolerance)


def gradient(golden: Golden, name: str, value: Tensor, leaf: Tensor) -> Check:
    """Compare the gradient of a scalar, divided by its largest entry, which is far below 1 for means."""
    (actual,), expected = torch.autograd.grad(value, leaf, retain_graph=True), golden.t[name]
    scale = expected.abs().max()
    return golden.compare(name, actual / scale, expected / scale, GRADIENT)


@check("schedules")
def schedules(golden: Golden) -> Iterator[Check]:
    """Check betas and derived quantities, respaced schedules, and U-ViT's arrays, which have a step 0."""
    objective = ImprovedDdpm()
    for name, expected in golden.t.items():
        group, *rest = name.split("/")
        if group == "iddpm":
            yield golden.compare(name, getattr(objective.schedule, rest[0]), expected, SCHEDULE)
        elif group == "spaced":
            kept = respaced_steps(rest[0])
            actual = kept if rest[1] == "timestep_map" else Schedule(linear_betas()).respaced(kept).betas
            yield golden.compare(name, actual, expected, SCHEDULE)
        else:
            betas = torch.cat([torch.zeros(1, dtype=torch.float64), scaled_linear_betas()])
            bars = torch.cat([torch.ones(1, dtype=torch.float64), VpDiscrete().schedule.alphas_cumprod])
            actual = {"betas": betas, "cum_alphas": bars, "cum_betas": 1.0 - bars}[rest[0]]
            yield golden.compare(name, actual, expected, SCHEDULE)


@check("loss_iddpm_hybrid")
def iddpm_hybrid(golden: Golden) -> Iterator[Check]:
    """Check MSE + variational bound, the intermediate values of the bound, and the gradient of the output."""
    objective, t = ImprovedDdpm(), golden.t
    noised = objective.at(t["in/x_start"], t["in/noise"], objective.time(t["in/t"]))
    net, _ = network(golden)
    index = objective.index(noised.t_host)
    output = run(net, noised, t["in/y"])[0]
    mean, log_variance, x0 = objective.schedule.model_posterior(output, noised.x_t, index)
    q_mean, q_log_variance = objective.schedule.posterior(noised.x0, noised.x_t, index)
    leaf = t["mid/model_output"].clone().requires_grad_()
    yield gradient(golden, "grad/model_output", objective.loss(leaf, noised).mean(), leaf)
    found = {
        "mid/x_t": noised.x_t,
        "mid/model_output": output,
        "mid/p_mean": mean,
        "mid/p_log_variance": log_variance,
        "mid/p_pred_xstart": x0,
        "mid/q_mean": q_mean,
        "mid/q_log_variance": q_log_variance.expand_as(q_mean),
        "out/mse": objective.mse(output, noised),
        "out/vb": objective.bound(output, noised),
        "out/loss": objective.loss(output, noised),
    }
    yield from tolerated(golden, found)


@check("loss_sit_upstream")
def sit_upstream(golden: Golden) -> Iterator[Check]:
    """Check the velocity loss at converted times; upstream's velocity has the opposite sign."""
    objective, t = LinearFlow(), golden.t
    noised = objective.at(t["in/data"], t["in/noise"], 1.0 - t["in/t"].double())
    prediction, _ = run(network(golden)[0], noised, t["in/y"])
    found = {
        "mid/x_t": noised.x_t,
        "mid/target": -objective.velocity_target(noised),
        "mid/pred": -prediction,
        "out/loss": objective.loss(prediction, noised),
    }
    yield from tolerated(golden, found)


@check("loss_uvit")
def uvit(golden: Golden) -> Iterator[Check]:
    """Check noise prediction on the discrete schedule (network input n) and on the VP-SDE (999 t)."""
    t, net = golden.t, network(golden)[0]
    discrete = VpDiscrete()
    cases = (
        ("disc", "x_n", 1000.0, discrete, discrete.time(t["disc/n"] - 1)),
        ("cont", "x_t", 999.0, VpContinuous(), t["cont/t"]),
    )
    for group, x_name, scale, objective, times in cases:
        net.time_scale = scale
        noised = objective.at(t["in/z0"], t["in/noise"], times)
        prediction, _ = run(net, noised, t["in/y"])
        found = {
            f"{group}/{x_name}": noised.x_t,
            f"{group}/pred": prediction,
            f"{group}/loss": objective.loss(prediction, noised),
        }
        yield from tolerated(golden, found)
