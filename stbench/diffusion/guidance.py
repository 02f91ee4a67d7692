"""Guidance, and the guided prediction of a network that every sampler calls.

All guidance is v <- weak + scale (v - weak). The weak prediction comes from the null label (classifier-free
guidance) or from a guide: a head, a route, another network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from stbench.core.backbone import Backbone, BackboneInfo
from stbench.core.errors import UserError
from stbench.core.guides import Correction, Evaluation, Guide, WeakGuide
from stbench.core.limits import MAX_SAMPLER_STEPS
from stbench.core.objective import Objective
from stbench.diffusion.guides import kept_tokens, require_fit

Noise = Callable[[int], Tensor]
"""Index of the draw -> standard normal noise (B,C,H,W)."""

FIRST_GUIDE_DRAW = 10 * MAX_SAMPLER_STEPS
"""Index of the first draw of guides; samplers take one draw per step."""


@dataclass(frozen=True)
class Guidance:
    """Settings of classifier-free guidance, and the guides that act beside it.

    Scale 1 is no guidance. U-ViT's scale s corresponds to s + 1 here. Raises UserError for a bad interval or
    number of channels.
    """

    scale: float = 1.0
    low: float = 0.0
    """Start of the closed interval of flow-equivalent times in which guidance is active."""
    high: float = 1.0
    """End of that interval."""
    channels: int | None = None
    """Number of leading latent channels that are guided (3 in DiT and SiT); None guides all."""
    guides: tuple[Guide, ...] = ()
    """Applied in this order to each half of the batch, before classifier-free guidance; corrections follow.
    Guides act on all latent channels."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise UserError(
                f"the guidance interval must be [low,high] with 0 <= low <= high <= 1, "
                f"got [{self.low}, {self.high}]; for example [0.0, 0.7]"
            )
        if self.channels is not None and self.channels < 1:
            raise UserError(
                f"the number of guided channels must be at least 1, got {self.channels}; leave it out for all"
            )

    def active(self, tau: float) -> bool:
        """Whether classifier-free guidance changes the prediction at flow-equivalent time `tau`."""
        return self.scale != 1.0 and self.low <= tau <= self.high


def guide(cond: Tensor, uncond: Tensor, scale: float, channels: int | None = None) -> Tensor:
    """Return uncond + scale (cond - uncond) in the first `channels` channels (B,C,...), else cond."""
    if channels is None:
        return uncond + scale * (cond - uncond)
    guided = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([guided, cond[:, channels:]], dim=1)


def host(t: float) -> Tensor:
    """Return a time as a host tensor (1,), float64."""
    return torch.tensor([t], dtype=torch.float64)


@final
class Denoiser:
    """The guided prediction of one network for fixed labels y (B,).

    Guides that draw tokens take them from `noise`. Raises UserError if the guidance does not fit the network,
    ValueError if a guide draws tokens and there is no `noise`.
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        y: Tensor,
        guidance: Guidance,
        noise: Noise | None = None,
    ) -> None:
        _require_fit(guidance, backbone.info)
        require_fit(guidance.guides, backbone, objective)
        self.backbone = backbone
        self.objective = objective
        self.guidance = guidance
        self._noise = noise
        self._evaluations = 0
        self._y = y
        self._both = torch.cat([y, torch.full_like(y, backbone.info.classes)])
        self._latents = backbone.info.channels - backbone.info.extra_channels
        self._channels = guidance.channels or self._latents

    def active(self, t: float) -> bool:
        """Whether classifier-free guidance is active at native time t, so that the batch is doubled."""
        return self.guidance.active(self._tau(t))

    def __call__(self, x: Tensor, t: float, *, as_at: float | None = None) -> Tensor:
        """Return the prediction (B,C_out,H,W), float64, at x (B,C,H,W) and native time t.

        The network itself receives float32. Where classifier-free guidance is active the batch is doubled to
        [cond; null]. Intervals are compared with the time `as_at` if it is given, otherwise with t.
        """
        tau, x = self._tau(t if as_at is None else as_at), x.float()
        guides = [found for found in self.guidance.guides if found.active(tau)]
        if self.guidance.active(tau):
            prediction = self._predict(torch.cat([x, x]), t, self._both, guides)
            cond, uncond = prediction.chunk(2)
            prediction = self._guided(cond, uncond)
        else:
            prediction = self._predict(x, t, self._y, guides)
        self._evaluations += 1
        for found in guides:
            if isinstance(found, Correction):
                prediction = found.apply(prediction, self.backbone)
        return prediction

    def _guided(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """Return the predictions of both halves (B,C_out,H,W) guided, each state with its own scale."""
        scale, own, n = self.guidance.scale, self.backbone.info.extra_scale, self._latents
        if self.backbone.info.extra_channels == 0:
            return guide(cond, uncond, scale, self._channels)
        latents = guide(cond[:, :n], uncond[:, :n], scale, self._channels)
        own = scale if own is None else own
        extra = guide(cond[:, n:], uncond[:, n:], own) if own else cond[:, n:]
        return torch.cat([latents, extra], dim=1)

    def denoise(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Return the clean latent and the noise (x0, eps), float64, that the guided prediction implies."""
        return self.objective.denoise(self(x, t), x, host(t))

    def velocity(self, x: Tensor, t: float, *, as_at: float | None = None) -> Tensor:
        """Return the velocity (B,C,H,W), float64, that the guided prediction implies."""
        return self.objective.velocity(self(x, t, as_at=as_at), x, host(t))

    def coefficients(self, t: float) -> tuple[float, float]:
        """Return alpha and sigma at native time t."""
        alpha, sigma = self.objective.alpha_sigma(host(t))
        return alpha.item(), sigma.item()

    def _tau(self, t: float) -> float:
        return self.objective.tau(host(t)).item()

    def _predict(self, x: Tensor, t: float, y: Tensor, guides: Sequence[Guide]) -> Tensor:
        """Return the prediction (B,C_out,H,W), float64, guided by the weak guides among `guides` in order."""
        times = torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device)
        weak = [found for found in guides if isinstance(found, WeakGuide)]
        if not weak:
            return self.backbone(x, times, y).double()
        for found in weak:
            y = found.labels(y, self.backbone.info.classes)
        evaluation = Evaluation(self.backbone, x, times, y, lambda i, rate: self._keep(i, rate, x))
        inputs = {name: value for found in weak for name, value in found.inputs(evaluation).items()}
        blocks = sorted({block for found in weak for block in found.blocks})
        output = self.backbone.run(x, times, y, indices=blocks, **inputs)
        assert output.prediction is not None
        v = output.prediction.double()
        for found in weak:
            weaker = found.weak_prediction(evaluation, output).double()
            v = guide(v, weaker, found.scale, self.backbone.info.channels)
        return v

    def _keep(self, index: int, rate: float, x: Tensor) -> Tensor:
        """Return the tokens (B,n) that a guide keeps, the same for both halves of a doubled batch."""
        if self._noise is None:
            raise ValueError("a guide draws tokens: pass noise=, a function from the draw's index to noise")
        # On the device of the noise, which is the host, so that rounding does not depend on the device.
        noise = self._noise(FIRST_GUIDE_DRAW + 2 * self._evaluations + index)
        kept = kept_tokens(noise, self.backbone.info.patch, rate).to(x.device)
        return kept.repeat(len(x) // len(kept), 1)


def _require_fit(guidance: Guidance, info: BackboneInfo) -> None:
    """Raise UserError if classifier-free guidance does not fit a network."""
    latents = info.channels - info.extra_channels
    if guidance.channels is not None and guidance.channels > latents:
        raise UserError(
            f"the number of guided channels must be at most {latents}, got {guidance.channels}; "
            f"leave it out for all"
        )
    if guidance.scale != 1.0 and not info.null_label:
        raise UserError(
            f"{info.name}-{info.size} has no null label and cannot be guided: "
            f"the guidance scale must be 1, got {guidance.scale}; leave it out"
        )
