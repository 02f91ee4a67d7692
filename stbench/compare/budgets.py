"""Choose the two budgets of a table, in training images: student only, and everything paid.

docs/protocol.md explains why both are reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from stbench.compare.rows import RowRuns


@dataclass(frozen=True)
class Budgets:
    """The images at which the rows of a table are compared."""

    student: int
    """Images of the last stage; 0 without rows."""
    paid: int
    """Images of all stages together."""


def choose_budgets(rows: Sequence[RowRuns], baseline: RowRuns | None) -> tuple[Budgets, list[str]]:
    """Choose both budgets; add a note if no evaluation is shared by all rows."""
    student, notes = _student_budget(rows, baseline)
    return Budgets(student, _paid_budget(rows, baseline, student)), notes


def _student_budget(rows: Sequence[RowRuns], baseline: RowRuns | None) -> tuple[int, list[str]]:
    """Return the last evaluation shared by all rows, in images of the last stage.

    If no evaluation is shared by all rows, the most common one is taken; ties go to evaluations of the
    baseline, then to the last.
    """
    counts = Counter(images for row in rows for images in row.step_at_images)
    if not counts:
        return 0, []
    if shared := [images for images, count in counts.items() if count == len(rows)]:
        return max(shared), []
    of_baseline = baseline.step_at_images if baseline else {}
    images = max(counts, key=lambda images: (counts[images], images in of_baseline, images))
    note = (
        f"no evaluation is shared by all rows; equal steps are taken at {images} images, "
        f"where {counts[images]} of {len(rows)} rows were evaluated"
    )
    return images, [note]


def _paid_budget(rows: Sequence[RowRuns], baseline: RowRuns | None, student: int) -> int:
    """Return the most images that a row with several stages has paid at the student-only budget.

    Of several such totals, it is the largest that the baseline was trained to, or the largest if it was
    trained to none. Without rows of several stages, it is the student-only budget.
    """
    totals = {student + row.earlier_images for row in rows if row.earlier_images}
    reached = {images for images in totals if baseline and baseline.fid_at_images(images)}
    return max(reached or totals or {student})
