"""Golden checks of guidance by a head, by routes and of the affine correction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stbench.core.backbone import Backbone, attach_heads
from stbench.core.guides import Correction, Guide, HeadGuide, RouteGuide
from stbench.diffusion import LinearFlow
from stbench.diffusion.guidance import FIRST_GUIDE_DRAW
from stbench.diffusion.sample import Euler, EulerMaruyama, Guidance, sample
from stbench.testing.golden.objectives import network
from stbench.testing.golden.run import Check, Golden, check
from stbench.testing.golden.samplers import TOLERANCE, effective_scale, recorded, repa_sampler

HEAD = "head/final_layer_xr."
"""Prefix of the intermediate head of Internal Guidance."""


class _Image(nn.Module):
    """A head that only holds the image of a correction."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.register_buffer("image", image)


def with_head(golden: Golden) -> tuple[Backbone, nn.Module]:
    """Return the network of an Internal Guidance file, and its head, which is attached as "head"."""
    net, _ = network(golden)
    head = net.output_head()
    head.load_state_dict(golden.weights().group(HEAD))
    attach_heads(net, {"head": head.eval().requires_grad_(False)})
    return net, head


def _guidance(run: Mapping[str, Any], *guides: Guide) -> Guidance:
    scale = effective_scale(run["cfg_scale"])
    return Guidance(scale, run["guidance_low"], run["guidance_high"], guides=guides)


@check("sampler_internal_guidance")
def internal_guidance_sampler(golden: Golden) -> Iterator[Check]:
    """Check each run as for REPA, and how often the head is applied."""
    net, head = with_head(golden)
    block = golden.weights().meta["settings"]["block"] - 1
    applied: list[int] = []
    head.register_forward_hook(lambda *_: applied.append(1))
    for name, run in golden.meta["runs"].items():
        applied.clear()
        guide = HeadGuide(
            "head", block, scale=effective_scale(run["ig_scale"]), low=run["ig_low"], high=run["ig_high"]
        )
        yield from recorded(golden, net, repa_sampler(name, run), name, run, _guidance(run, guide))
        yield golden.compare(f"{name} head", torch.tensor(len(applied)), torch.tensor(run["ig_calls"]), 0.0)


@check("sampler_delta_fm")
def delta_fm_sampler(golden: Golden) -> Iterator[Check]:
    """Check each run as for REPA; the correction has the interval of classifier-free guidance."""
    net, _ = network(golden)
    attach_heads(net, {"interference": _Image(golden.t["in/interference"])})
    for name, run in golden.meta["runs"].items():
        correction = Correction(
            run["interference_weight"],
            "interference.image",
            run["velocity_weight"],
            low=run["guidance_low"],
            high=run["guidance_high"],
        )
        guidance = _guidance(run, *([correction] if run["reduce"] else []))
        yield from recorded(golden, net, EulerMaruyama(), name, run, guidance)


def routed_sampler(golden: Golden) -> Iterator[Check]:
    """Check guidance by routes in the file of TREAD; the released sampler drops every label."""
    settings, (net, _) = golden.meta["settings"], network(golden)
    own, patch = settings["guided"], net.info.patch
    start, end = settings["start_block"] - 1, settings["end_block"] - 1
    guide = RouteGuide(start, end, own["gamma_strong"], own["gamma_weak"], scale=own["scale"])
    released = replace(guide, null_labels=True)
    z, y, draws = golden.t["guided/z"], golden.t["guided/y"], golden.t["guided/route_u"]

    def noise(index: int) -> Tensor:
        """Return the stored draw of each token on all of its pixels."""
        side = z.shape[-1] // patch
        tokens = draws[index - FIRST_GUIDE_DRAW].view(len(z), 1, side, side)
        return tokens.repeat_interleave(patch, 2).repeat_interleave(patch, 3).expand_as(z)

    for name, used in (("intended", guide), ("as_released", released)):
        guidance = Guidance(guides=(used,))
        out = sample(Euler(), net, LinearFlow(), z, y, steps=own["steps"], guidance=guidance, noise=noise)
        yield golden.compare(f"guided/out_{name}", out, golden.t[f"guided/out_{name}"], TOLERANCE)
