"""`stbench show`: print one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def show(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Show the settings, stages, costs and curve of a run."""
    from stbench.compare import terminal
    from stbench.core.text import print_line
    from stbench.runs.folder import RunFolder
    from stbench.runs.records import SCHEMA

    folder = RunFolder(run)
    folder.require()
    record = folder.record()
    folder.environment()  # not shown, but damage in it should be noticed here
    if record.schema < SCHEMA:
        print_line(
            f"schema {record.schema}: these records have no checksums, so damage may go unnoticed; "
            f"`python scripts/migrate_records.py FOLDER` converts the folder that contains the run folders"
        )
    terminal.print_run(record)
