"""All backbones side by side: the tables that share data, objective and evaluation protocol, in one.

FIDs of different settings stand beside each other and are not ranked; ratio and verdict are within a setting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stbench.compare.format import NONE, Section, count
from stbench.compare.leaderboard import Absent, Leaderboard, Row, Standing, Table, Versus
from stbench.compare.tables import best, fid, missing, names, ratio, sampling
from stbench.compare.verdicts import BASELINE

NO_RANKING = (
    f"FIDs of different settings stand side by side and are not ranked; ratio and verdict are against each "
    f"setting's own {BASELINE}. n.d.: not distinguishable."
)
SHORT = {
    "not distinguishable": "n.d.",
    "not trained that far": "not trained",
    "not evaluated there": "not evaluated",
    "too few seeds": "few seeds",
    f"no {BASELINE} there": f"no {BASELINE}",
    f"{BASELINE} not sampled": f"no {BASELINE}",
}
"""Verdicts that are too long for a column here."""


@dataclass(frozen=True)
class Summary:
    """One summary as text."""

    heading: str
    text: str
    sections: tuple[Section, ...]


def summaries(board: Leaderboard) -> list[Summary]:
    """One for each data set, objective and protocol that more than one setting was measured under."""
    groups: dict[tuple[str, str, str], list[Table]] = {}
    for table in board.tables:
        if table.protocol:
            groups.setdefault((table.dataset, table.objective, table.protocol), []).append(table)
    for (dataset, objective, _), tables in groups.items():
        tables += [
            t for t in board.tables if not t.protocol and (t.dataset, t.objective) == (dataset, objective)
        ]
    return [_summary(tables) for tables in groups.values() if len(tables) > 1]


def _summary(tables: Sequence[Table]) -> Summary:
    first = tables[0]
    distinct = len({table.backbone for table in tables}) == len(tables)
    what = f"all {'backbones' if distinct else 'settings'} under {first.objective}"
    parts = [first.dataset, what, *sampling(first.protocol_fields)]
    return Summary(
        heading=f"{', '.join(parts)} (protocol {first.protocol})",
        text=NO_RANKING,
        sections=(
            _section(
                "Equal last-stage steps (student only)",
                tables,
                lambda t: t.student_images,
                lambda r: r.student,
            ),
            _section("Everything paid", tables, lambda t: t.paid_images, lambda r: r.paid),
        ),
    )


def _section(
    title: str, tables: Sequence[Table], images: Callable[[Table], int], side: Callable[[Row], Standing]
) -> Section:
    budgets = {count(images(table)): None for table in tables if table.rows}
    title = f"{title}: {' or '.join(budgets)} images"
    lines = []
    for table, setting in zip(tables, _settings(tables), strict=True):
        apart = f"{setting} ({count(images(table))})" if len(budgets) > 1 and table.rows else setting
        lines += [(apart, *_line(row, name, side)) for row, name in names(table)]
    header = ("backbone", "recipe", "FID", f"to {BASELINE}", "FID, best guidance", f"to {BASELINE}")
    return Section(title, header, tuple(lines), frozenset({0, 1, 3, 5}))


def _settings(tables: Sequence[Table]) -> list[str]:
    """Backbones, with the setting's hash where two settings have the same."""
    backbones = [table.backbone for table in tables]
    return [
        f"{table.backbone} [{table.setting}]" if backbones.count(table.backbone) > 1 else table.backbone
        for table in tables
    ]


def _line(row: Row | Absent, name: str, side: Callable[[Row], Standing]) -> tuple[str, ...]:
    if isinstance(row, Absent):
        return f"{name} {missing(row.seeds)}", NONE, row.word, NONE, NONE
    here = side(row)
    return name, fid(here), _versus(here.plain), best(here.guided), _versus(here.best)


def _versus(versus: Versus) -> str:
    verdict = SHORT.get(versus.verdict, versus.verdict)
    return verdict if versus.ratio is None else f"{ratio(versus)} {verdict}"
