"""Named phases of a training step, which torch's profiler and `stbench bench` report."""

from __future__ import annotations

import torch

PHASES = ("data", "student", "teachers", "heads", "backward", "optimizer", "EMA")
"""The phases of a step. "optimizer" includes clipping the gradient norm."""

PREFIX = "stbench: "


def phase(name: str) -> torch.profiler.record_function:
    """Mark a block as one of PHASES. Without a profiler, entering it costs about a microsecond."""
    assert name in PHASES, name
    return torch.profiler.record_function(PREFIX + name)
