"""Compare every row with the baseline at one budget: ratio, test, verdict, and images to the baseline's FID.

The tests are paired over seeds, on log ratios of FID. One compares both sides without guidance, the other
each side at its best guidance. Holm's correction covers the rows of a table, separately for each of the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from stbench.compare.at_budget import BudgetPoint
from stbench.compare.leaderboard import Comparison, ImagesToTarget, RowAtBudget
from stbench.compare.rows import BASELINE, FidBySeed, RowRuns
from stbench.compare.stats import crossing, holm, mean, paired_interval, paired_p, seed_stats

ALPHA = 0.05
"""Significance level of the verdicts, after Holm's correction."""
MIN_SEEDS = 3
"""Seeds that a row and the baseline must share for a test."""


def compare_with_baseline(points: Sequence[BudgetPoint], baseline: RowRuns | None) -> list[RowAtBudget]:
    """Return the values and verdicts of all rows at a budget, in the order of `points`."""
    reference = next((point for point in points if point.row is baseline), None)
    plain = _with_verdicts([_compare_plain(point, reference) for point in points])
    best = _with_verdicts([_compare_best(point, reference) for point in points])
    return [
        RowAtBudget(
            images=point.images,
            step=point.step,
            fid=seed_stats(list(point.fid.values())) if point.fid else None,
            inception=point.inception(),
            val_loss=point.val_loss(),
            guided=point.best_guidance,
            plain=plain_comparison,
            best=best_comparison,
            flops_student=point.flops(all_stages=False),
            flops_total=point.flops(all_stages=True),
            seconds_student=point.seconds(all_stages=False),
            seconds_total=point.seconds(all_stages=True),
            reach=_images_to_target(point, reference),
        )
        for point, plain_comparison, best_comparison in zip(points, plain, best, strict=True)
    ]


def unpaired_notes(rows: Sequence[RowRuns], baseline: RowRuns | None) -> list[str]:
    """Name the seeds that enter a row's means but, without a baseline run of the same seed, not its tests."""
    if baseline is None:
        return []
    unpaired = [(row.label, sorted(row.runs.keys() - baseline.runs.keys())) for row in rows]
    return [
        f"{label}: no {BASELINE} run with seed {', '.join(map(str, seeds))}; "
        "included in the means, not in ratio and verdict"
        for label, seeds in unpaired
        if seeds
    ]


def _compare_plain(point: BudgetPoint, reference: BudgetPoint | None) -> Comparison:
    """Compare both sides without guidance."""
    return _compare(
        point,
        reference,
        fid=point.fid,
        reference_fid=reference.fid if reference else None,
        without_fid=point.missing_reason(),
        without_reference_fid=f"no {BASELINE} there",
    )


def _compare_best(point: BudgetPoint, reference: BudgetPoint | None) -> Comparison:
    """Compare each side at its own best guidance."""
    unsampled = reference is not None and reference.fid
    return _compare(
        point,
        reference,
        fid=point.fid_at_best_guidance,
        reference_fid=reference.fid_at_best_guidance if reference else None,
        without_fid="not sampled" if point.fid else point.missing_reason(),
        without_reference_fid=f"{BASELINE} not sampled" if unsampled else f"no {BASELINE} there",
    )


def _compare(
    point: BudgetPoint,
    reference: BudgetPoint | None,
    *,
    fid: FidBySeed | None,
    reference_fid: FidBySeed | None,
    without_fid: str,
    without_reference_fid: str,
) -> Comparison:
    """Compare the FIDs of a row and the baseline, before Holm's correction.

    A comparison that is tested has a p-value and an empty verdict. Without a test, the verdict is the reason.
    """
    # Nothing to compare
    if fid is None:
        return Comparison(None, None, without_fid)
    if reference is None:
        return Comparison(None, None, "no baseline")
    if point is reference:
        return Comparison(1.0, None, "baseline")
    if reference_fid is None:
        return Comparison(None, None, without_reference_fid)

    # The ratio, over the seeds that both sides have
    logs = [math.log(fid[seed]) - math.log(reference_fid[seed]) for seed in fid if seed in reference_fid]
    ratio = math.exp(mean(logs)) if logs else None

    # No test: after a failure the remaining seeds are a biased selection
    if any(run.failed for row in (point.row, reference.row) for run in row.unfinished):
        return Comparison(ratio, None, "a seed failed")
    if not all(map(math.isfinite, logs)):
        return Comparison(ratio, None, "no finite FID")
    if len(logs) < MIN_SEEDS:
        return Comparison(ratio, None, "too few seeds")

    # The test
    low, high = paired_interval(logs)
    return Comparison(ratio, paired_p(logs), "", (math.exp(low), math.exp(high)))


def _with_verdicts(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Apply Holm's correction to the tested comparisons and give them their verdicts."""
    adjusted = iter(holm([comparison.p for comparison in comparisons if comparison.p is not None]))
    return [
        comparison if comparison.p is None else _with_verdict(comparison, next(adjusted))
        for comparison in comparisons
    ]


def _with_verdict(comparison: Comparison, p: float) -> Comparison:
    if p >= ALPHA:
        return replace(comparison, p=p, verdict="not distinguishable")
    ratio = comparison.ratio or 1.0
    return replace(comparison, p=p, verdict="better" if ratio < 1 else "worse")


def _images_to_target(point: BudgetPoint, reference: BudgetPoint | None) -> ImagesToTarget | None:
    """Return the images that a row needs to reach the baseline's mean FID; None if there is none."""
    if reference is None or reference.fid is None:
        return None
    row, target, needed = point.row, mean(list(reference.fid.values())), reference.images

    # The first crossing of every seed. The baseline needs its own budget, whatever its seeds do individually.
    curves = [row.curve(seed) for seed in row.runs]
    if point is reference:
        crossings: list[float | None] = [float(needed)] * len(curves)
        bound = False
    else:
        crossings = [crossing(images, fid, target) for images, fid in curves]
        bound = any(fid[0] < target for _, fid in curves)

    # The mean over seeds. If one seed never reaches the target, there is none.
    arrived = [images for images in crossings if images is not None]
    student = mean(arrived) if len(arrived) == len(crossings) else None
    paid = None if student is None else student + row.earlier_images
    return ImagesToTarget(
        target=target,
        needed=needed,
        student=student,
        paid=paid,
        arrived=len(arrived),
        limit=row.last_images,
        speedup_student=needed / student if student else None,
        speedup_paid=needed / paid if paid else None,
        bound=bound and student is not None,
    )
