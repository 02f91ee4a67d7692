"""Sample pictures of runs as data URIs, within limits."""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stbench.runs.folder import RunFolder
from stbench.runs.records import RunRecord

MAX_BYTES = 4 << 20
"""Size of one picture."""
MAX_TOTAL = 48 << 20
"""Size of all pictures of a page."""
MAX_STEPS = 10
"""Evaluations of a run that are shown, evenly spaced with the first and the last."""
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass
class Album:
    """Embeds pictures within the limits of a page."""

    total: int = 0
    """Bytes of the pictures so far."""
    left_out: int = 0
    """Pictures that cannot be read, or exceed the limits."""

    def embed(self, path: Path) -> str | None:
        """Return a PNG file as a data URI; None if it is left out."""
        content = _read_png(path)
        if content is None or self.total + len(content) > MAX_TOTAL:
            self.left_out += 1
            return None
        self.total += len(content)
        return "data:image/png;base64," + base64.b64encode(content).decode()


def read_samples(rows: Sequence[tuple[str, RunRecord]], album: Album) -> list[dict[str, Any]]:
    """Embed the sample pictures of rows, given as titles and runs.

    Returns:
        For every row with pictures its title, and "pictures": [step, images, guidance scale, data URI] each.
    """
    sets = []
    for title, record in rows:
        found = RunFolder(Path(record.path)).samples(record.final_stage)
        kept = _evenly(sorted({step for step, _ in found}))
        pictures = [
            (step, step * record.batch, scale, uri)
            for (step, scale), path in found.items()
            if step in kept and (uri := album.embed(path)) is not None
        ]
        if pictures:
            sets.append({"title": title, "pictures": pictures})
    return sets


def _evenly(steps: Sequence[int]) -> set[int]:
    """Return at most `MAX_STEPS` of `steps`."""
    if len(steps) <= MAX_STEPS:
        return set(steps)
    return {steps[round(i * (len(steps) - 1) / (MAX_STEPS - 1))] for i in range(MAX_STEPS)}


def _read_png(path: Path) -> bytes | None:
    """Return a PNG file of at most `MAX_BYTES`; None for anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe must not wait for its writer
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        content = file.read(MAX_BYTES + 1)
    return content if content.startswith(PNG) and len(content) <= MAX_BYTES else None
