"""Diffusion processes: objectives (corruption and training loss), samplers and guidance.

Re-exports the objectives and schedules; `stbench.diffusion.sample` contains samplers and guidance. Knows the
interfaces of `stbench.core` only.
"""

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
