"""Every row of a table at one budget: its figures, and the two tests against the baseline there.

The tests are paired over seeds, on log ratios of FID: without guidance, and each side at its best guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from stbench.compare.leaderboard import Guided, Interval, Reach, Standing, Versus
from stbench.compare.rows import Group
from stbench.compare.stats import Cell, cell, crossing, holm, mean, paired_interval, paired_p

BASELINE = "vanilla"
"""The recipe, without options, that every other row is measured against."""
ALPHA = 0.05
"""Level of the verdicts, after Holm's correction over the rows of a table."""
MIN_SEEDS = 3
"""Seeds that a row and the baseline must share before there is a verdict."""

Grid = set[tuple[float, Interval]]
Fids = Mapping[int, float]
"""FID by seed."""


@dataclass(frozen=True)
class Place:
    """One row at one budget, before anything is compared."""

    group: Group
    images: int
    """Images of the last stage."""
    grid: Grid
    """The (scale, interval) pairs that are compared here."""

    @property
    def step(self) -> int | None:
        """The evaluation at exactly as many images."""
        return self.group.moments.get(self.images)

    @property
    def fids(self) -> Fids | None:
        """FID without guidance, between two evaluations interpolated."""
        return self.group.fid_near(self.images)

    def guided(self) -> Guided | None:
        """The best of the common grid; None for a row that was not sampled at all of it."""
        if self.step is None or len(self.grid) < 2 or not self.grid <= self.group.grid(self.step):
            return None
        fids = {how: cell(list(self.group.fid(self.step, how).values())) for how in self.grid}
        scale, interval = min(sorted(fids), key=lambda how: nan_last(fids[how].mean))
        scales = [how[0] for how in self.grid]
        return Guided(scale, interval, fids[scale, interval], edge=scale in (min(scales), max(scales)))

    def missing(self) -> str:
        """Why there is no figure here."""
        if self.images <= 0:
            return "paid more already"
        return "not trained that far" if self.images > max(self.group.moments) else "not evaluated there"


def nan_last(value: float) -> float:
    """A key that sorts NaN behind every number."""
    return math.inf if math.isnan(value) else value


def standings(
    groups: Sequence[Group], base: Group | None, images: Callable[[Group], int], notes: list[str]
) -> list[Standing]:
    """The rows where each has seen `images(group)` images of its last stage; notes on guidance are added."""
    grid = _common_grid(groups, images, notes)
    places = [Place(group, images(group), grid) for group in groups]
    anchor = next((place for place in places if place.group is base), None)
    found = [_standing(place, anchor) for place in places]
    found = _settle(found, lambda row: row.plain, lambda row, value: replace(row, plain=value))
    return _settle(found, lambda row: row.best, lambda row, value: replace(row, best=value))


def _common_grid(groups: Sequence[Group], images: Callable[[Group], int], notes: list[str]) -> Grid:
    """The (scale, interval) pairs that all rows share which were sampled with guidance at the budget."""
    steps = [(group, group.moments.get(images(group))) for group in groups]
    grids = [group.grid(step) for group, step in steps if step is not None]
    guided = [grid for grid in grids if len(grid) > 1]
    common = set.intersection(*guided) if guided else set()
    if guided and len(common) < 2:
        notes.append("best guidance: left out, the rows share no two scales; evaluate them at the same")
    return common


def _standing(place: Place, anchor: Place | None) -> Standing:
    group, step, fids = place.group, place.step, place.fids
    points = group.at(step) if step is not None else []
    runs = list(group.runs.values())
    earlier = [[stage for stage in run.stages if stage.index < run.final_stage] for run in runs]
    scores = [p.metrics["is"] for p in points if "is" in p.metrics]
    seconds, flops = [p.seconds for p in points], [p.flops for p in points]
    paid = list(zip(points, earlier, strict=False))
    return Standing(
        images=place.images,
        step=step,
        fid=cell(list(fids.values())) if fids else None,
        inception=_cell(scores if len(scores) == len(points) else []),
        val_loss=_cell([mean(p.val_loss) if p.val_loss else math.nan for p in points]),
        guided=place.guided(),
        plain=_plain(place, anchor),
        best=_best(place, anchor),
        flops_student=_cell(flops),
        flops_total=_cell([p.flops + sum(s.flops for s in stages) for p, stages in paid]),
        seconds_student=_cell(seconds),
        seconds_total=_cell([p.seconds + sum(s.seconds for s in stages) for p, stages in paid]),
        reach=_reach(place, anchor),
    )


def _cell(values: Sequence[float]) -> Cell | None:
    return cell(values) if values else None


def _plain(place: Place, anchor: Place | None) -> Versus:
    theirs = anchor.fids if anchor else None
    return _versus(place, anchor, place.fids, theirs, (place.missing(), f"no {BASELINE} there"))


def _best(place: Place, anchor: Place | None) -> Versus:
    """Each side at its own best guidance."""
    own, theirs = _at_best(place), _at_best(anchor) if anchor else None
    absent = "not sampled" if place.fids else place.missing()
    alone = f"{BASELINE} not sampled" if anchor and anchor.fids else f"no {BASELINE} there"
    return _versus(place, anchor, own, theirs, (absent, alone))


def _at_best(place: Place) -> Fids | None:
    guided = place.guided()
    if guided is None or place.step is None:
        return None
    return place.group.fid(place.step, (guided.scale, guided.interval))


def _versus(
    place: Place, anchor: Place | None, own: Fids | None, theirs: Fids | None, words: tuple[str, str]
) -> Versus:
    """The comparison of two sets of FIDs; its p-value is not yet corrected."""
    if own is None:
        return Versus(None, None, words[0])
    if anchor is None:
        return Versus(None, None, "no baseline")
    if place is anchor:
        return Versus(1.0, None, "baseline")
    if theirs is None:
        return Versus(None, None, words[1])
    logs = [math.log(own[seed]) - math.log(theirs[seed]) for seed in own if seed in theirs]
    ratio = math.exp(mean(logs)) if logs else None
    if any(claim.failed for group in (place.group, anchor.group) for claim in group.unfinished):
        return Versus(ratio, None, "a seed failed")
    if not all(map(math.isfinite, logs)):
        return Versus(ratio, None, "no finite FID")
    if len(logs) < MIN_SEEDS:
        return Versus(ratio, None, "too few seeds")
    low, high = paired_interval(logs)
    return Versus(ratio, paired_p(logs), "", (math.exp(low), math.exp(high)))


def _reach(place: Place, anchor: Place | None) -> Reach | None:
    """Images to the baseline's mean FID at its place, and how many times more the baseline needed."""
    theirs = anchor.fids if anchor else None
    if anchor is None or theirs is None:
        return None
    group, earlier = place.group, place.group.earlier_images
    target, needed, limit = mean(list(theirs.values())), anchor.images, max(group.moments)
    if place is anchor:
        return Reach(target, needed, float(needed), float(needed), len(group.runs), limit, 1.0, 1.0)
    crossings = [crossing(*group.curve(seed), target) for seed in group.runs]
    arrived = [images for images in crossings if images is not None]
    if len(arrived) < len(crossings):
        return Reach(target, needed, None, None, len(arrived), limit, None, None)
    student = mean(arrived)
    paid = student + earlier
    bound = any(group.curve(seed)[1][0] < target for seed in group.runs)
    return Reach(target, needed, student, paid, len(arrived), limit, needed / student, needed / paid, bound)


def _settle(
    rows: Sequence[Standing],
    get: Callable[[Standing], Versus],
    put: Callable[[Standing, Versus], Standing],
) -> list[Standing]:
    """The rows with Holm's correction and the verdicts of one column of tests."""
    tested = [(i, get(row).p) for i, row in enumerate(rows)]
    asked = [(i, p) for i, p in tested if p is not None]
    adjusted = dict(zip([i for i, _ in asked], holm([p for _, p in asked]), strict=True))
    return [put(row, _verdict(get(row), adjusted[i])) if i in adjusted else row for i, row in enumerate(rows)]


def _verdict(versus: Versus, p: float) -> Versus:
    ratio = versus.ratio or 1.0
    verdict = "not distinguishable" if p >= ALPHA else "better" if ratio < 1 else "worse"
    return replace(versus, p=p, verdict=verdict)
