"""The corruption processes and their training losses: flows, improved DDPM, and U-ViT's noise predictions."""

from stbench.diffusion.flow import CosineFlow, Flow, LinearFlow
from stbench.diffusion.noise_prediction import Discrete, ImprovedDdpm, VpContinuous, VpDiscrete
from stbench.diffusion.schedule import Schedule, linear_betas, respaced_steps, scaled_linear_betas

__all__ = [
    "CosineFlow",
    "Discrete",
    "Flow",
    "ImprovedDdpm",
    "LinearFlow",
    "Schedule",
    "VpContinuous",
    "VpDiscrete",
    "linear_betas",
    "respaced_steps",
    "scaled_linear_betas",
]
