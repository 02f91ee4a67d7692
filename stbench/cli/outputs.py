"""Check the output paths of a command before it starts. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from stbench.core.outputs import Output, check_outputs
from stbench.runs.own_files import require_no_run_file


def require_outputs(outputs: Sequence[Output], inputs: Iterable[Path | None] = ()) -> None:
    """Check that a command can write its outputs and that they destroy nothing; see `check_outputs`.

    Raises:
        UserError: As `check_outputs` does, and for a file that belongs to a run folder.
    """
    check_outputs(outputs, [path for path in inputs if path is not None])
    for output in outputs:
        require_no_run_file(output.path, output.option)


def require_run_outputs(folder: Path, data: str | None) -> None:
    """Check that run folders can be created in `--output`, which is not in the data that are trained on."""
    inputs = [Path(data)] if data is not None else []
    check_outputs([Output(folder, kind="folder", remedy="choose another --output")], inputs)
