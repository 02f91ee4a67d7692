"""Where and on what a run is made. Imports nothing of the evaluation, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from stbench.core.world import ALONE, World

Keep = Literal["all", "last"]


@dataclass(frozen=True)
class RunOptions:
    """Where and on what a run is made. None of this enters a hash."""

    output: Path
    device: torch.device = torch.device("cpu")
    keep: Keep = "all"
    """EMA weights to keep: of all evaluation points, or of the last one."""
    reuse: bool = True
    """Whether finished stages of other runs are reused."""
    plugins: Mapping[str, str] = field(default_factory=dict)
    """Plug-in file -> its sha256."""
    world: World = ALONE
    """The ranks that train together."""
    shard: bool = False
    """Whether the networks are split over the ranks (FSDP2), instead of replicated (DDP)."""
