"""`stbench show`: print one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def show(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Show the settings, stages, costs and curve of a run."""
    from stbench.compare import terminal
    from stbench.runs.folder import RunFolder

    folder = RunFolder(run)
    folder.require()
    terminal.print_run(folder.record())
