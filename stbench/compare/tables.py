"""What is printed of a leaderboard's table: titled sections of at most 100 columns.

Each budget has two, quality and verdicts; then come the curve, images to target, and cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any

from stbench.compare.format import NONE, Section, count, duration, flop, number, spread
from stbench.compare.leaderboard import Absent, Guided, Reach, Row, Standing, Table, Versus
from stbench.compare.stats import Cell
from stbench.compare.verdicts import BASELINE

STATE = 60
"""Letters of the state of a row without figures; the whole of it is in the notes."""
MOMENTS = 5
"""Points of a curve that fit in 100 columns."""
NEEDS = "†"
"""Marks a row that needs something from outside the model."""

Side = Callable[[Row], Standing]


def heading(table: Table) -> str:
    """What the runs of a table have in common, in one line."""
    parts = [table.dataset, table.backbone, table.objective]
    parts += [f"batch {table.batch}"] if table.batch else []
    parts += [table.precision] if table.precision else []
    return ", ".join([*parts, *sampling(table.protocol_fields)])


def sampling(fields: Mapping[str, Any]) -> list[str]:
    """The sampler and its network evaluations per image, as far as the protocol names them."""
    if "sampler" not in fields or "steps" not in fields:
        return []
    steps = fields["steps"]
    evaluations = 2 * steps - 1 if fields["sampler"] == "heun" else steps
    return [f"{fields['sampler']} sampler with {evaluations} function evaluations"]


def protocol(table: Table) -> str:
    """The hashes of a table, and what the evaluation protocol's stands for."""
    fields = ", ".join(f"{name} {_short(value)}" for name, value in table.protocol_fields.items())
    hashes = f"setting {table.setting}" + (f", protocol {table.protocol}" if table.protocol else "")
    return f"{hashes}{': ' if fields else ''}{fields}"


def _short(value: Any) -> str:
    """A digest by its first 8 digits, everything else as it is."""
    text = str(value)
    return text[:8] if len(text) >= 40 and " " not in text else text


def names(table: Table) -> list[tuple[Row | Absent, str]]:
    """What each row is called: its recipe, its length where two have the same name, its needs' mark."""
    everyone: list[Row | Absent] = [*table.rows, *table.absent]
    times = Counter(row.recipe for row in everyone)
    named = []
    for row in everyone:
        length = f" [{row.length} steps]" if times[row.recipe] > 1 else ""
        named.append((row, row.recipe + length + (NEEDS if isinstance(row, Row) and row.needs else "")))
    return named


def sections(table: Table) -> list[Section]:
    """The sections of one table."""
    if not table.rows:
        asked = [
            (name, missing(row.seeds), row.state) for row, name in names(table) if isinstance(row, Absent)
        ]
        header = ("recipe", "seeds", "state")
        return [Section("Asked for, nothing finished", header, _lines(asked), frozenset({0, 1, 2}))]
    steps = f"step {table.student_images // (table.batch or 1)}, {count(table.student_images)} images"
    title = f"Equal last-stage steps (student only): {steps}"
    same = table.paid_images == table.student_images
    if same:
        title += "; no row has an earlier stage, so this is also everything paid"
    budgets = [_quality(table, title), *_verdict_pair(table, lambda row: row.student)]
    races, costs = [_race(table, lambda row: row.student)], [_cost(table)]
    if not same:
        title = f"Everything paid: {count(table.paid_images)} images of all stages together"
        budgets += [_quality_paid(table, title), *_verdict_pair(table, lambda row: row.paid)]
        races += [_race(table, lambda row: row.paid)]
        costs += [_cost_paid(table)]
    return [*budgets, _along(table), *(race for race in races if race), *costs]


def needs(table: Table) -> list[str]:
    """A note for the rows that need something from outside the model."""
    return [f"{name} needs {row.needs}" for row, name in _finished(table) if row.needs]


def missing(seeds: Sequence[int]) -> str:
    """Seeds that are in no figure."""
    return f"({' '.join(map(str, seeds))})"


def fid(standing: Standing) -> str:
    """FID without guidance; ~ marks one between two evaluations."""
    return ("~" if standing.interpolated else "") + spread(standing.fid)


def best(guided: Guided | None) -> str:
    """FID at the best guidance with its scale; * marks the edge of the grid."""
    return f"{spread(guided.fid)} @{guided.scale:g}{'*' if guided.edge else ''}" if guided else NONE


def ratio(versus: Versus) -> str:
    """The ratio to the baseline with two decimals."""
    return NONE if versus.ratio is None else f"{versus.ratio:.2f}"


def _figures(standing: Standing) -> tuple[str, ...]:
    loss = NONE if standing.val_loss is None else number(standing.val_loss.mean)
    return fid(standing), spread(standing.inception), best(standing.guided), loss


def _quality(table: Table, title: str) -> Section:
    lines = []
    for row, name in names(table):
        if isinstance(row, Absent):
            lines.append((name, f"{missing(row.seeds)} {row.word}", *[NONE] * 4))
            continue
        seeds = [" ".join(map(str, row.seeds)), *(missing([seed]) for seed in row.unfinished)]
        lines.append((name, " ".join(seeds), *_figures(row.student)))
    header = ("recipe", "seeds", "FID", "IS", "FID, best guidance", "val loss")
    return Section(title, header, _lines(lines), frozenset({0, 1}))


def _quality_paid(table: Table, title: str) -> Section:
    lines = []
    for row, name in names(table):
        if isinstance(row, Absent):
            lines.append((name, *[NONE] * 5))
        else:
            stage = count(row.paid.images) if row.paid.fid else NONE
            lines.append((name, stage, *_figures(row.paid)))
    return Section(
        title, ("recipe", "last stage", "FID", "IS", "FID, best guidance", "val loss"), _lines(lines)
    )


def _verdict_pair(table: Table, side: Side) -> list[Section]:
    return [_verdicts(table, side, guided=guided) for guided in (False, True)]


def _verdicts(table: Table, side: Side, guided: bool) -> Section:
    lines = []
    for row, name in names(table):
        if isinstance(row, Absent):
            lines.append((name, *[NONE] * 3, shorten(row.state, STATE, placeholder=" ...")))
        else:
            lines.append((name, *_versus(side(row).best if guided else side(row).plain)))
    how = "both at their own best guidance" if guided else "without guidance"
    header = ("recipe", "ratio", "95 % interval", "p (Holm)", "verdict")
    return Section(f"Against {BASELINE} at the same budget, {how}", header, _lines(lines), frozenset({0, 4}))


def _versus(versus: Versus) -> tuple[str, ...]:
    p = NONE if versus.p is None else "<0.001" if versus.p < 0.001 else f"{versus.p:.3f}"
    interval = NONE if versus.interval is None else "{:.2f} to {:.2f}".format(*versus.interval)
    return ratio(versus), interval, p, versus.verdict


def _along(table: Table) -> Section:
    """FID at the last images and, going back, at the nearest points to their half, quarter and eighth."""
    chosen: list[int] = []
    for images in sorted({point.images for row in table.rows for point in row.curve}, reverse=True):
        if len(chosen) < MOMENTS and (not chosen or images <= chosen[-1] / 2):
            chosen.append(images)
    moments = chosen[::-1]
    lines = []
    for row, name in _finished(table):
        known = {point.images: point.fid for point in row.curve}
        lines.append((name, *(spread(known.get(images)) for images in moments)))
    header = ("recipe", *(f"at {count(images)}" for images in moments))
    return Section("FID along training, images of the last stage", header, _lines(lines))


def _race(table: Table, side: Side) -> Section | None:
    """Images to the baseline's FID at a budget, both ways of counting."""
    rows = [(row, name, side(row).reach) for row, name in _finished(table)]
    known = next((reach for _, _, reach in rows if reach), None)
    if known is None:
        return None
    lines = [(name, *(_arrival(reach, row) if reach else [NONE] * 4)) for row, name, reach in rows]
    title = f"Images to {BASELINE}'s FID of {number(known.target)} (at {count(known.needed)} images)"
    return Section(
        title, ("recipe", "student only", "speed-up", "everything paid", "speed-up"), _lines(lines)
    )


def _arrival(reach: Reach, row: Row) -> tuple[str, ...]:
    if reach.student is None or reach.paid is None:
        some = f" ({reach.arrived} of {len(row.seeds)} seeds)" if reach.arrived else ""
        limits = (reach.limit, reach.limit + row.earlier_images)
        return f"> {count(limits[0])}{some}", NONE, f"> {count(limits[1])}{some}", NONE
    most, least = ("<= ", ">= ") if reach.bound else ("", "")
    return (
        f"{most}{count(reach.student)}",
        f"{least}{_times(reach.speedup_student)}",
        f"{most}{count(reach.paid)}",
        f"{least}{_times(reach.speedup_paid)}",
    )


def _times(speedup: float | None) -> str:
    return NONE if speedup is None else f"{speedup:.2f}x"


def _cost(table: Table) -> Section:
    lines = [(name, row.needs or NONE, *_price(row, row.student)) for row, name in _finished(table)]
    header = ("recipe", "needs", "images", "FLOPs", "time")
    return Section("Cost of equal steps: last stage / all stages", header, _lines(lines), frozenset({0, 1}))


def _cost_paid(table: Table) -> Section:
    lines = [(name, *_price(row, row.paid)) for row, name in _finished(table)]
    header = ("recipe", "images", "FLOPs", "time")
    return Section("Cost of everything paid: last stage / all stages", header, _lines(lines))


def _finished(table: Table) -> list[tuple[Row, str]]:
    return [(row, name) for row, name in names(table) if isinstance(row, Row)]


def _price(row: Row, standing: Standing) -> tuple[str, str, str]:
    seen = standing.images if standing.step else None
    return (
        _pair(seen, None if seen is None else seen + row.earlier_images, count),
        _pair(_mean(standing.flops_student), _mean(standing.flops_total), flop),
        _pair(_mean(standing.seconds_student), _mean(standing.seconds_total), duration),
    )


def _mean(cell: Cell | None) -> float | None:
    return cell.mean if cell else None


def _pair(last: float | None, total: float | None, unit: Callable[[float], str]) -> str:
    if last is None or total is None:
        return NONE
    one, both = unit(last), unit(total)
    return one if one == both else f"{one} / {both}"


def _lines(lines: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(map(tuple, lines))
