"""Choose the two budgets of a table: student only, and everything paid.

docs/protocol.md explains why both are reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from stbench.compare.question import Amount, Unit
from stbench.compare.rows import Cost, RowRuns

COSTS: dict[Unit, Cost] = {"seconds": lambda spent: spent.seconds, "flops": lambda spent: spent.flops}


@dataclass(frozen=True)
class Budgets:
    """The images at which the rows of a table are compared."""

    student: int
    """Images of the last stage; 0 without rows. Those of the baseline for a cost."""
    paid: int
    """Images of all stages together. Those of the baseline for a cost."""
    cost: Amount | None = None
    """Seconds or FLOPs that are equal for all rows instead: of the last stage, and of all stages."""

    def images_of(self, row: RowRuns, *, all_stages: bool) -> int:
        """Return the images of a row's last stage at the student-only or the everything-paid budget."""
        if self.cost:
            return row.images_at_cost(self.cost.value, COSTS[self.cost.unit], all_stages=all_stages)
        return self.paid - row.earlier_images if all_stages else self.student


def choose_budgets(
    rows: Sequence[RowRuns], baseline: RowRuns | None, at: Amount | None = None
) -> tuple[Budgets, list[str]]:
    """Choose both budgets, the first of which may be given with `at`.

    Adds a note if no evaluation is shared by all rows.
    """
    if at and at.unit != "images" and rows:
        reference = baseline or rows[0]
        student, paid = (
            reference.images_at_cost(at.value, COSTS[at.unit], all_stages=b) for b in (False, True)
        )
        return Budgets(student, paid + reference.earlier_images, at), []
    student, notes = (int(at.value), []) if at and rows else _student_budget(rows, baseline)
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
    reached = {images for images in totals if baseline and baseline.values_at_images(images)}
    return max(reached or totals or {student})
