"""The figure of a leaderboard: FID against images, those of the student alone and all that were paid for."""

from __future__ import annotations

import textwrap
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stbench.compare.format import count
from stbench.compare.leaderboard import Leaderboard, Row, Table
from stbench.compare.tables import heading
from stbench.compare.verdicts import BASELINE
from stbench.core.errors import UserError
from stbench.core.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Style = tuple[str, str, str]
"""Colour, marker and line of a recipe."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c510a", "#5e3c99")
"""Okabe and Ito's colours, which colour-blind readers tell apart, and two more; the baseline is grey."""
MARKERS = "sD^vPX<h"
GREY = "#555555"
HEIGHTS = (5.0, 4.4, 4.0)
"""Inches of a table's panels for one, two, and more tables."""
LABEL = 44
"""Letters of a legend's line."""


def draw(board: Leaderboard, path: Path) -> None:
    """Write two panels for each table, 1200 pixels wide; the suffix of `path` gives the format (.png, .svg).

    Lines are means over seeds, bands one standard deviation; a recipe has one colour, marker and line
    throughout. UserError if there is nothing to draw or the format is unknown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    tables = [table for table in board.tables if table.rows]
    if not tables:
        raise UserError("expected finished runs to plot, found none; make one with `stbench run`")
    styles = _styles(tables)
    columns = _columns(styles)
    legend = 0.25 * (1 + sum(label.count("\n") + 1 for label in map(_wrapped, styles)) / columns)
    heights = [HEIGHTS[min(len(tables), len(HEIGHTS)) - 1]] * len(tables)
    figure = Figure(
        figsize=(12, sum(heights) + legend), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    )
    known = sorted(FigureCanvasAgg(figure).get_supported_filetypes())
    if path.suffix[1:] not in known:
        raise UserError(f"expected a file ending in one of {', '.join(known)}, found {path}; try curves.png")
    panels = figure.subfigures(len(tables) + 1, 1, squeeze=False, height_ratios=[*heights, legend])[:, 0]
    for panel, table in zip(panels[:-1], tables, strict=True):
        _panel(panel, table, styles)
    _legend(panels[-1], styles, columns)
    image = BytesIO()
    figure.savefig(image, format=path.suffix[1:])
    atomic_write(path, image.getvalue())


def _styles(tables: list[Table]) -> dict[str, Style]:
    """The baseline grey; rows that differ from a recipe's defaults dashed."""
    recipes = sorted({row.recipe for table in tables for row in table.rows} - {BASELINE})
    styles = {BASELINE: (GREY, "o", "-")}
    for i, name in enumerate(recipes):
        styles[name] = (COLOURS[i % 8], MARKERS[(i + i // 8) % 8], "--" if "(" in name else "-")
    return styles


def _columns(styles: dict[str, Style]) -> int:
    longest = max(min(len(name), LABEL) for name in styles)
    return max(1, min(len(styles), 150 // (longest + 8)))


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, LABEL))


def _panel(panel: Any, table: Table, styles: dict[str, Style]) -> None:
    left, right = panel.subplots(1, 2, sharey=True)
    seeds = sorted({len(row.seeds) for row in table.rows})
    number = (
        f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seed{'s' * (seeds[0] > 1)}"
    )
    what = f"protocol {table.protocol}, mean of {number}, band one standard deviation"
    panel.suptitle(f"{heading(table)}\n{what}", fontsize=11)
    for row in sorted(table.rows, key=lambda row: (row.recipe != BASELINE, row.recipe, row.length)):
        _line(left, row, 0, styles[row.recipe])
        _line(right, row, row.earlier_images, styles[row.recipe])
    _axes(left, "student only: training images of the last stage", table.student_images)
    _axes(right, "everything paid: training images of all stages", table.paid_images)
    left.set_ylabel("FID without guidance (log scale)", fontsize=10)


def _legend(panel: Any, styles: dict[str, Style], columns: int) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=_wrapped(name), color=colour, marker=marker, ls=line, lw=2, ms=8, mec="white")
        for name, (colour, marker, line) in styles.items()
    ]
    panel.legend(handles=handles, loc="center", ncols=columns, frameon=False, fontsize=11, handlelength=3)


def _line(axes: Axes, row: Row, earlier: int, style: Style) -> None:
    colour, marker, line = style
    images = [point.images + earlier for point in row.curve]
    means = [point.fid.mean for point in row.curve]
    width, above = (2.6, 4) if row.recipe == BASELINE else (1.8, 3)
    axes.plot(images, means, color=colour, marker=marker, ls=line, lw=width, zorder=above, ms=8, mec="white")
    spreads = [point.fid.std or 0.0 for point in row.curve]
    low = [
        max(m - s, min(p.fid.values)) if s >= m else m - s
        for m, s, p in zip(means, spreads, row.curve, strict=True)
    ]
    high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    axes.fill_between(images, low, high, color=colour, alpha=0.15, linewidth=0)


def _axes(axes: Axes, label: str, budget: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.axvline(budget, color=GREY, lw=1, ls=":", zorder=0)
    axes.annotate(
        f"budget {count(budget)}", (budget, 1), (-4, -4), textcoords="offset points",
        xycoords=("data", "axes fraction"), ha="right", va="top", fontsize=9, color=GREY,
    )  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_xlabel(label, fontsize=10)
    axes.tick_params(labelsize=9, labelleft=True)
    axes.grid(True, which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
