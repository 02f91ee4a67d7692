"""What every sampler shares: guidance, the guided prediction at (x, t), and the sampler interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from stbench.core.backbone import Backbone
from stbench.core.errors import UserError
from stbench.core.objective import Objective


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance. Scale 1 is none; U-ViT's s is scale - 1."""

    scale: float = 1.0
    low: float = 0.0
    """Lowest flow-equivalent time at which it is on; the interval is closed."""
    high: float = 1.0
    channels: int | None = None
    """Leading latent channels that are guided; None is all of them, DiT and SiT published 3."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise UserError(
                f"expected a guidance interval with 0 <= low <= high <= 1, found [{self.low}, {self.high}]; "
                "set it to times such as 0.0 and 0.7"
            )
        if self.channels is not None and self.channels < 1:
            raise UserError(
                f"expected at least 1 guided channel, found {self.channels}; leave it out for all"
            )

    def active(self, tau: float) -> bool:
        """Whether it changes anything at this flow-equivalent time."""
        return self.scale != 1.0 and self.low <= tau <= self.high


def guide(cond: Tensor, uncond: Tensor, scale: float, channels: int | None = None) -> Tensor:
    """uncond + scale (cond - uncond) on the first `channels` channels (B,C,...), cond on the rest."""
    if channels is None:
        return uncond + scale * (cond - uncond)
    guided = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([guided, cond[:, channels:]], dim=1)


def host(t: float) -> Tensor:
    """A time as a host tensor (1,) float64."""
    return torch.tensor([t], dtype=torch.float64)


@final
class Denoiser:
    """The guided prediction of one network for one set of labels."""

    def __init__(self, backbone: Backbone, objective: Objective, y: Tensor, guidance: Guidance) -> None:
        latent = backbone.info.channels
        if guidance.channels is not None and guidance.channels > latent:
            raise UserError(
                f"expected at most {latent} guided channels, found {guidance.channels}; leave it out for all"
            )
        if guidance.scale != 1.0 and not backbone.info.null_label:
            raise UserError(
                f"{backbone.info.name}-{backbone.info.size} was made without a null label, so it has no "
                f"guidance: expected scale 1, found {guidance.scale}; leave it out"
            )
        self.backbone = backbone
        self.objective = objective
        self.guidance = guidance
        self._y = y
        self._both = torch.cat([y, torch.full_like(y, backbone.info.classes)])
        self._channels = guidance.channels or latent

    def active(self, t: float) -> bool:
        """Whether guidance is on at native time t."""
        return self.guidance.active(self.objective.tau(host(t)).item())

    def __call__(self, x: Tensor, t: float, *, guided: bool | None = None) -> Tensor:
        """The prediction (B,C_out,H,W) float64 at x (B,C,H,W), native time t; the network sees float32.

        Guidance doubles the batch, [cond; null], only where it is on; `guided` overrides the interval.
        """
        x = x.float()
        if not (self.active(t) if guided is None else guided):
            return self.backbone(x, self._times(x, t), self._y).double()
        doubled = torch.cat([x, x])
        prediction = self.backbone(doubled, self._times(doubled, t), self._both).double()
        cond, uncond = prediction.chunk(2)
        return guide(cond, uncond, self.guidance.scale, self._channels)

    def denoise(self, x: Tensor, t: float, *, guided: bool | None = None) -> tuple[Tensor, Tensor]:
        """The clean latent and the noise (x0, eps) float64 that the guided prediction implies."""
        return self.objective.denoise(self(x, t, guided=guided), x, host(t))

    def coefficients(self, t: float) -> tuple[float, float]:
        """alpha and sigma at native time t."""
        alpha, sigma = self.objective.alpha_sigma(host(t))
        return alpha.item(), sigma.item()

    def _times(self, x: Tensor, t: float) -> Tensor:
        return torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device)
