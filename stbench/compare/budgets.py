"""The two budgets of a table, in training images, and the notes on rows that fall short of them.

Equal steps of the last stage, and equal images of all stages. docs/protocol.md says why both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from stbench.compare.leaderboard import Standing
from stbench.compare.rows import Group


def student_budget(groups: Sequence[Group], base: Group | None, notes: list[str]) -> int:
    """Images at the last evaluation that all rows share; where they share none, that most rows have.

    Of several such the one that the baseline has, then the last. 0 without rows.
    """
    counts = Counter(images for group in groups for images in group.moments)
    if not counts:
        return 0
    common = [images for images, rows in counts.items() if rows == len(groups)]
    if common:
        return max(common)
    theirs = base.moments if base else {}
    images = max(counts, key=lambda images: (counts[images], images in theirs, images))
    notes.append(
        f"no evaluation is common to all rows; equal steps are those at {images} images, "
        f"which {counts[images]} of {len(groups)} rows have"
    )
    return images


def paid_budget(groups: Sequence[Group], base: Group | None, student: int) -> int:
    """Images of all stages at which rows are compared: the most that a row of several stages has paid.

    Paid is what it costs at the student's budget; of several sums the largest that the baseline was trained
    to, or the largest. Without rows of several stages it is the student's budget.
    """
    sums = {student + group.earlier_images for group in groups if group.earlier_images}
    reached = {images for images in sums if base and base.fid_near(images)}
    return max(reached or sums or {student})


def edges(groups: Sequence[Group], rows: Sequence[Standing]) -> list[str]:
    """The rows whose best guidance may lie outside the common grid."""
    named = [
        f"{group.label} @{row.guided.scale:g}*"
        for group, row in zip(groups, rows, strict=True)
        if row.guided and row.guided.edge
    ]
    return [f"best guidance at the edge of the common grid: {_listed(named)}"] if named else []


def gaps(groups: Sequence[Group], rows: Sequence[Standing], batch: int) -> list[str]:
    """What to train so that every row has a place at the budget, and which FIDs are interpolated."""
    pairs = list(zip(groups, rows, strict=True))
    short: dict[int, list[str]] = {}
    for group, row in pairs:
        if row.fid is None and row.images > max(group.moments):
            short.setdefault(row.images, []).append(group.label)
    notes = [
        f"no point at {images} images of the last stage: {_listed(labels)}; "
        f"train with --steps {math.ceil(images / batch)}"
        for images, labels in sorted(short.items())
    ]
    if paid := [group.label for group, row in pairs if row.fid is None and row.images <= 0]:
        notes.append(f"more images than that in earlier stages alone: {_listed(paid)}")
    if between := [group.label for group, row in pairs if row.interpolated]:
        notes.append(f"FID marked ~ lies between two evaluations: {_listed(between)}")
    return notes


def _listed(labels: Iterable[str]) -> str:
    return ", ".join(sorted(labels))
