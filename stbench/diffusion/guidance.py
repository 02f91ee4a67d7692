"""Classifier-free guidance, and the guided prediction of a network that every sampler calls."""

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
    """Settings of classifier-free guidance.

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
        """Whether guidance changes the prediction at flow-equivalent time `tau`."""
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

    Raises UserError if the guidance does not fit the network.
    """

    def __init__(self, backbone: Backbone, objective: Objective, y: Tensor, guidance: Guidance) -> None:
        latent = backbone.info.channels
        if guidance.channels is not None and guidance.channels > latent:
            raise UserError(
                f"the number of guided channels must be at most {latent}, got {guidance.channels}; "
                f"leave it out for all"
            )
        if guidance.scale != 1.0 and not backbone.info.null_label:
            raise UserError(
                f"{backbone.info.name}-{backbone.info.size} has no null label and cannot be guided: "
                f"the guidance scale must be 1, got {guidance.scale}; leave it out"
            )
        self.backbone = backbone
        self.objective = objective
        self.guidance = guidance
        self._y = y
        self._both = torch.cat([y, torch.full_like(y, backbone.info.classes)])
        self._channels = guidance.channels or latent

    def active(self, t: float) -> bool:
        """Whether guidance is active at native time t."""
        return self.guidance.active(self.objective.tau(host(t)).item())

    def __call__(self, x: Tensor, t: float, *, guided: bool | None = None) -> Tensor:
        """Return the prediction (B,C_out,H,W), float64, at x (B,C,H,W) and native time t.

        The network itself receives float32. Where guidance is active the batch is doubled to [cond; null];
        `guided` overrides the interval.
        """
        x = x.float()
        if not (self.active(t) if guided is None else guided):
            return self.backbone(x, self._times(x, t), self._y).double()
        doubled = torch.cat([x, x])
        prediction = self.backbone(doubled, self._times(doubled, t), self._both).double()
        cond, uncond = prediction.chunk(2)
        return guide(cond, uncond, self.guidance.scale, self._channels)

    def denoise(self, x: Tensor, t: float, *, guided: bool | None = None) -> tuple[Tensor, Tensor]:
        """Return the clean latent and the noise (x0, eps), float64, that the guided prediction implies."""
        return self.objective.denoise(self(x, t, guided=guided), x, host(t))

    def coefficients(self, t: float) -> tuple[float, float]:
        """Return alpha and sigma at native time t."""
        alpha, sigma = self.objective.alpha_sigma(host(t))
        return alpha.item(), sigma.item()

    def _times(self, x: Tensor, t: float) -> Tensor:
        return torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device)
