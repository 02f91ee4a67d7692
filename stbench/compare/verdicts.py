"""Compare every row with the baseline at one budget: ratio, test and verdict.

The tests are paired over seeds, on log ratios of the metric. One compares both sides without guidance, the
other each side at its best guidance. Holm's correction covers the rows of a table, separately for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from stbench.compare.at_budget import BudgetPoint
from stbench.compare.leaderboard import Comparison, RowAtBudget
from stbench.compare.question import metric_name
from stbench.compare.rows import RowRuns, ValueBySeed
from stbench.compare.stats import holm, mean, paired_interval, paired_p, safe_log, seed_stats
from stbench.compare.targets import MIN_SEEDS, images_to_target

ALPHA = 0.05
"""Significance level of the verdicts, after Holm's correction."""


def compare_with_baseline(points: Sequence[BudgetPoint], baseline: RowRuns | None) -> list[RowAtBudget]:
    """Return the values and verdicts of all rows at a budget, in the order of `points`."""
    reference = next((point for point in points if point.row is baseline), None)
    plain = _with_verdicts([_compare_plain(point, reference) for point in points])
    best = _with_verdicts([_compare_best(point, reference) for point in points])
    return [
        RowAtBudget(
            images=point.images,
            step=point.step,
            value=seed_stats(list(point.values.values())) if point.values else None,
            inception=point.inception(),
            val_loss=point.val_loss(),
            guided=point.best_guidance,
            plain=plain_comparison,
            best=best_comparison,
            flops_student=point.flops(all_stages=False),
            flops_total=point.flops(all_stages=True),
            seconds_student=point.seconds(all_stages=False),
            seconds_total=point.seconds(all_stages=True),
            reach=images_to_target(point, reference),
        )
        for point, plain_comparison, best_comparison in zip(points, plain, best, strict=True)
    ]


def unpaired_notes(rows: Sequence[RowRuns], baseline: RowRuns | None) -> list[str]:
    """Name the seeds that enter a row's means but, without a baseline run of the same seed, not its tests."""
    if baseline is None:
        return []
    unpaired = [(row.label, sorted(row.runs.keys() - baseline.runs.keys())) for row in rows]
    return [
        f"{label}: no {baseline.label} run with seed {', '.join(map(str, seeds))}; "
        "included in the means, not in ratio and verdict"
        for label, seeds in unpaired
        if seeds
    ]


def _compare_plain(point: BudgetPoint, reference: BudgetPoint | None) -> Comparison:
    """Compare both sides without guidance."""
    return _compare(
        point,
        reference,
        values=point.values,
        reference_values=reference.values if reference else None,
        without_value=point.missing_reason(),
        without_reference_value=f"no {reference.row.label} there" if reference else "",
    )


def _compare_best(point: BudgetPoint, reference: BudgetPoint | None) -> Comparison:
    """Compare each side at its own best guidance."""
    baseline = reference.row.label if reference else ""
    unsampled = reference is not None and reference.values
    return _compare(
        point,
        reference,
        values=point.values_at_best_guidance,
        reference_values=reference.values_at_best_guidance if reference else None,
        without_value="not sampled" if point.values else point.missing_reason(),
        without_reference_value=f"{baseline} not sampled" if unsampled else f"no {baseline} there",
    )


def _compare(
    point: BudgetPoint,
    reference: BudgetPoint | None,
    *,
    values: ValueBySeed | None,
    reference_values: ValueBySeed | None,
    without_value: str,
    without_reference_value: str,
) -> Comparison:
    """Compare the values of a row and the baseline, before Holm's correction.

    A comparison that is tested has a p-value, and as verdict the side on which it is if it is significant.
    Without a test, the verdict is the reason.
    """
    # Nothing to compare
    if values is None:
        return Comparison(None, None, without_value)
    if reference is None:
        return Comparison(None, None, "no baseline")
    if point is reference:
        return Comparison(1.0, None, "baseline")
    if reference_values is None:
        return Comparison(None, None, without_reference_value)

    # The ratio, over the seeds that both sides have
    common = [seed for seed in values if seed in reference_values]
    logs = [safe_log(values[seed]) - safe_log(reference_values[seed]) for seed in common]
    ratio = math.exp(mean(logs)) if logs else None

    # No test: after a failure the remaining seeds are a biased selection
    if any(run.failed for row in (point.row, reference.row) for run in row.unfinished):
        return Comparison(ratio, None, "a seed failed")
    if not all(map(math.isfinite, logs)):
        return Comparison(ratio, None, f"no finite {metric_name(point.row.question.metric)}")
    if len(logs) < MIN_SEEDS:
        return Comparison(ratio, None, "too few seeds")

    # The test
    low, high = paired_interval(logs)
    better = (ratio < 1) is not point.row.question.higher_is_better if ratio else False
    side = "better" if better else "worse"
    return Comparison(ratio, paired_p(logs), side, (math.exp(low), math.exp(high)))


def _with_verdicts(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Apply Holm's correction to the tested comparisons and give them their verdicts."""
    adjusted = iter(holm([comparison.p for comparison in comparisons if comparison.p is not None]))
    return [
        comparison if comparison.p is None else _with_verdict(comparison, next(adjusted))
        for comparison in comparisons
    ]


def _with_verdict(comparison: Comparison, p: float) -> Comparison:
    """Return the comparison with its adjusted p-value; its side stays if that is significant."""
    return replace(comparison, p=p, verdict="not distinguishable" if p >= ALPHA else comparison.verdict)
