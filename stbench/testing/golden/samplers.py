"""Golden checks of samplers with the stored noise; every call of the network is compared as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stbench.core.backbone import Backbone, Output, attach_heads, kept_heads
from stbench.core.objective import Objective
from stbench.diffusion import ImprovedDdpm, LinearFlow, VpContinuous, VpDiscrete
from stbench.diffusion.ddpm_samplers import Spacing
from stbench.diffusion.sample import (
    Ddim,
    Ddpm,
    DpmSolver,
    Euler,
    EulerMaruyama,
    Guidance,
    Heun,
    Sampler,
    sample,
)
from stbench.testing.golden.backbones import GUIDED_CHANNELS
from stbench.testing.golden.objectives import network
from stbench.testing.golden.run import Check, Golden, check

TOLERANCE = 1e-4
CONTINUOUS_SOLVER = 1e-3
"""Larger because the reference computes this solver's log-SNR grid in float32."""
ADAPTIVE = 2e-2
"""For Heun at the stored number of points, compared with an adaptive solver."""


class Recorder(Backbone):
    """A network that records the inputs of every call."""

    def __init__(self, inner: Backbone) -> None:
        super().__init__()
        self.inner, self.info = inner, inner.info
        attach_heads(self, kept_heads(inner))
        self.calls: list[tuple[Tensor, float]] = []

    def forward_intermediates(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        indices: Sequence[int] = (),
        stop_early: bool = False,
        **inputs: Any,
    ) -> Output:
        """See `Backbone.forward_intermediates`."""
        self.calls.append((x, t[0].item()))
        return self.inner.run(x, t, y, indices=indices, stop_early=stop_early, **inputs)

    @property
    def times(self) -> Tensor:
        """Time of each call (n,)."""
        return torch.tensor([t for _, t in self.calls])

    @property
    def batches(self) -> Tensor:
        """Batch size of each call (n,)."""
        return torch.tensor([len(x) for x, _ in self.calls])

    def states(self, batch: int) -> Tensor:
        """Input of each call (n,B,C,H,W), its conditional half if guided."""
        return torch.stack([x[:batch] for x, _ in self.calls])


def replay(
    golden: Golden,
    net: Backbone,
    objective: Objective,
    sampler: Sampler,
    *,
    steps: int,
    guidance: Guidance = Guidance(),  # noqa: B008 - frozen
    noise: str = "",
) -> tuple[Tensor, Recorder]:
    """Sample from the stored initial noise, with the draws stored under `noise`; returns the recorder too."""
    recorder, z = Recorder(net), golden.t["in/z"]
    draws = golden.t.get(noise)
    drawn = None if draws is None else (lambda i: draws[i, : len(z)])
    y = golden.t["in/y"]
    out = sample(sampler, recorder, objective, z, y, steps=steps, guidance=guidance, noise=drawn)
    return out, recorder


@check("sampler_ddpm")
def ddpm(golden: Golden) -> Iterator[Check]:
    """Check ancestral sampling without and with three-channel guidance, and DDIM on the same steps."""
    settings, objective, (net, _) = golden.meta["settings"], ImprovedDdpm(), network(golden)
    spacing = settings["respacing"]
    steps = int(spacing.removeprefix("ddim"))
    guided = Guidance(settings["cfg_scale"], channels=GUIDED_CHANNELS)
    kept: Spacing = "stride" if spacing.startswith("ddim") else "spread"
    for group, sampler, guidance in (
        ("plain", Ddpm(kept), Guidance()),
        ("cfg", Ddpm(kept), guided),
        ("ddim", Ddim(settings["ddim_eta"], kept), Guidance()),
    ):
        out, _ = replay(
            golden, net, objective, sampler, steps=steps, guidance=guidance, noise=f"{group}/noise"
        )
        yield golden.compare(f"{group}/out", out, golden.t[f"{group}/out"], TOLERANCE)


@check("sampler_sit_upstream")
def sit_upstream(golden: Golden) -> Iterator[Check]:
    """Check the SDE, including its trajectory, and the ODE; `num_steps` counts grid points."""
    settings, objective, (net, _) = golden.meta["settings"], LinearFlow(), network(golden)
    points, expected = settings["num_steps"], golden.t
    sde = EulerMaruyama(settings["last_step_size"])
    out, recorder = replay(golden, net, objective, sde, steps=points, noise="sde/noise")
    yield golden.compare("sde/out", out, expected["sde/out"], TOLERANCE)
    trajectory = torch.cat([recorder.states(len(out))[1:], out[None]])
    yield golden.compare("sde/trajectory", trajectory, expected["sde/trajectory"], TOLERANCE)
    for name, sampler, tolerance in (
        ("ode_euler", Euler(), TOLERANCE),
        ("ode_heun2", Heun(correct_last=True), TOLERANCE),
        ("ode_dopri5", Heun(correct_last=True), ADAPTIVE),
    ):
        out, _ = replay(golden, net, objective, sampler, steps=points - 1)
        yield golden.compare(f"{name}/out", out, expected[f"{name}/out"], tolerance)


def repa_sampler(name: str, run: Mapping[str, Any]) -> Sampler:
    """The sampler of one run in REPA's file."""
    if name.startswith("em"):
        return EulerMaruyama()
    return Heun() if run.get("heun", False) else Euler()


def effective_scale(scale: float) -> float:
    """The guidance scale of a run. The samplers of REPA and its successors do not guide below 1."""
    return max(scale, 1.0)


def recorded(
    golden: Golden,
    net: Backbone,
    sampler: Sampler,
    name: str,
    run: Mapping[str, Any],
    guidance: Guidance,
) -> Iterator[Check]:
    """Check the sample of a run, and the input, time and batch size of every call of the network."""
    steps = run["num_steps"]
    out, recorder = replay(
        golden, net, LinearFlow(), sampler, steps=steps, guidance=guidance, noise=f"{name}/noise"
    )
    calls = torch.tensor([sampler.nfe(steps), len(recorder.calls)])
    yield golden.compare(f"{name} calls", calls, torch.full_like(calls, run["model_calls"]), 0.0)
    yield golden.compare(f"{name}/batch", recorder.batches, golden.t[f"{name}/batch"], 0.0)
    found = {"out": out, "model_x": recorder.states(len(out)), "model_t": recorder.times}
    for key, value in found.items():
        yield golden.compare(f"{name}/{key}", value, golden.t[f"{name}/{key}"], TOLERANCE)


@check("sampler_repa")
def repa(golden: Golden) -> Iterator[Check]:
    """Check each run's sample, and the input, time and batch size of every call (guidance doubles it)."""
    net, _ = network(golden)
    for name, run in golden.meta["runs"].items():
        scale, low, high = (
            run.get(k, d) for k, d in (("cfg_scale", 1.0), ("guidance_low", 0.0), ("guidance_high", 1.0))
        )
        guidance = Guidance(effective_scale(scale), low, high)
        yield from recorded(golden, net, repa_sampler(name, run), name, run, guidance)


@check("sampler_dpm_solver")
def dpm_solver(golden: Golden) -> Iterator[Check]:
    """Check both forms of DPM-Solver and the times of evaluations; U-ViT's scale s is scale 1 + s here."""
    net, _ = network(golden)
    for name, run in golden.meta["runs"].items():
        discrete = name.startswith("pp")
        objective = VpDiscrete() if discrete else VpContinuous()
        net.time_scale, tolerance = (1000.0, TOLERANCE) if discrete else (999.0, CONTINUOUS_SOLVER)
        guidance = Guidance(1.0 + run["scale"])
        out, recorder = replay(golden, net, objective, DpmSolver(), steps=run["steps"], guidance=guidance)
        calls = torch.tensor(len(recorder.calls))
        yield golden.compare(f"{name} calls", calls, torch.full_like(calls, run["evaluations"]), 0.0)
        yield golden.compare(f"{name}/times", recorder.times, golden.t[f"{name}/times"], tolerance)
        yield golden.compare(f"{name}/out", out, golden.t[f"{name}/out"], tolerance)
