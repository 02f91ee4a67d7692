"""Weight files of run folders that a user names directly, as for `--init-from` and `--checkpoint`."""

from __future__ import annotations

from pathlib import Path

from stbench.core.errors import UserError
from stbench.core.files import hash_file
from stbench.runs.folder import RunFolder
from stbench.runs.stage_folder import CHECKPOINTS


def require_recorded(file: Path) -> None:
    """Verify a file against the sha256 in the records of the run folder that contains it, if there is one.

    Raises:
        UserError: If the file is damaged or not of that run.
    """
    stage = file.absolute().parent
    if stage.parent.name != CHECKPOINTS or not file.name.startswith(("raw-", "ema-")) or not file.is_file():
        return
    run = RunFolder(stage.parent.parent)
    if not run.exists():
        return
    expected = run.weights_sha256(stage / file.name)
    found = hash_file(file)
    if expected not in (None, found):
        raise UserError(f"{file} is damaged: expected sha256 {expected}, found {found}; restore the file")
