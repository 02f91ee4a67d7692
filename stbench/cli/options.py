"""Options that several commands take. No heavy import: `--help` answers at once."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class KeepChoice(str, Enum):
    """Which EMA weights stay."""

    all = "all"
    last = "last"


Output = Annotated[Path, typer.Option(help="Folder that holds the run folders.")]
Plugins = Annotated[
    list[Path], typer.Option("--plugin", help="Python file that registers backbones or recipes; repeatable.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Original = Annotated[
    str | None,
    typer.Option(
        help="Repository a checkpoint is from, where its keys leave it open: dit, sit, repa, sra, layersync, "
        "dispersive, self-transcendence, uvit-discrete, uvit-continuous."
    ),
]
RUNS = Path("results/runs")
