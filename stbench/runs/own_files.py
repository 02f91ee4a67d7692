"""The names that stbench uses in and beside run folders, which no other output may take."""

from __future__ import annotations

import os
from pathlib import Path

from stbench.core.errors import UserError
from stbench.runs.journal import JOURNAL_FILE

RUN_FILES = frozenset(
    {
        *("spec.json", "env.json", "status.json", "curve.jsonl", "stages.jsonl", "protocols.json", ".lock"),
        *("checkpoints", "samples", "tensorboard", "wandb", "mlflow"),
    }
)
"""What a run folder contains. Users may put other files into it."""


def require_no_run_file(path: Path, option: str) -> None:
    """Raise UserError for an output path that stbench itself uses, in a run folder or beside run folders."""
    resolved = Path(os.path.realpath(path))
    for folder in resolved.parents:
        if (folder / "spec.json").is_file() and resolved.relative_to(folder).parts[0] in RUN_FILES:
            raise UserError(
                f"{option} {path} belongs to the run folder {folder}; choose another name, such as "
                f"{path.with_stem('output')}"
            )
    if resolved.name == JOURNAL_FILE:
        raise UserError(f"{option} {path} has the name of a sweep's journal; choose another name")
