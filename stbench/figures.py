"""The figure of a leaderboard: FID against images, those of the student alone and all that were paid for."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stbench.compare import BASELINE
from stbench.errors import UserError
from stbench.leaderboard import Leaderboard, Row, Table
from stbench.results import atomic_write
from stbench.sections import count, heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Style = tuple[str, str]
"""Colour and marker of a recipe."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c510a", "#5e3c99")
"""Okabe and Ito's colours, which colour-blind readers tell apart, and two more; the baseline is grey."""
MARKERS = "sD^vP*Xo"
GREY = "#555555"


def draw(board: Leaderboard, path: Path) -> None:
    """Write two panels for each table, 1200 pixels wide; the suffix of `path` gives the format (.png, .svg).

    Lines are means over seeds, bands their range; a recipe has one colour and marker throughout. UserError if
    there is nothing to draw or the format is unknown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not board.tables:
        raise UserError("expected finished runs to plot, found none; make one with `stbench run`")
    figure = Figure(figsize=(12, 5.4 * len(board.tables)), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.1))
    known = sorted(FigureCanvasAgg(figure).get_supported_filetypes())
    if path.suffix[1:] not in known:
        raise UserError(f"expected a file ending in one of {', '.join(known)}, found {path}; try curves.png")
    styles = _styles(board)
    panels = figure.subfigures(len(board.tables), 1, squeeze=False)[:, 0]
    for panel, table in zip(panels, board.tables, strict=True):
        _panel(panel, table, styles)
    image = BytesIO()
    figure.savefig(image, format=path.suffix[1:])
    atomic_write(path, image.getvalue())


def _styles(board: Leaderboard) -> dict[str, Style]:
    recipes = sorted({row.recipe for table in board.tables for row in table.rows} - {BASELINE})
    styles = {name: (COLOURS[i % 8], MARKERS[(i + i // 8) % 8]) for i, name in enumerate(recipes)}
    return {BASELINE: (GREY, "o"), **styles}


def _panel(panel: Any, table: Table, styles: dict[str, Style]) -> None:
    left, right = panel.subplots(1, 2, sharey=True)
    panel.suptitle(f"{heading(table)}\nprotocol {table.protocol}, mean over seeds, range shaded", fontsize=12)
    for row in sorted(table.rows, key=lambda row: (row.recipe != BASELINE, row.recipe, row.steps)):
        _line(left, row, 0, styles[row.recipe])
        _line(right, row, row.earlier_images, styles[row.recipe])
    _axes(left, "student only: training images of the last stage")
    _axes(right, "everything paid: training images of all stages")
    left.set_ylabel("FID without guidance (log scale)", fontsize=11)
    handles, labels = left.get_legend_handles_labels()
    columns = max(1, min(len(labels), 150 // (max(map(len, labels)) + 8)))
    panel.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=11)


def _line(axes: Axes, row: Row, earlier: int, style: Style) -> None:
    colour, marker = style
    images = [point.images + earlier for point in row.curve]
    seeds = "1 seed" if len(row.seeds) == 1 else f"{len(row.seeds)} seeds"
    means = [point.fid.mean for point in row.curve]
    label = f"{row.recipe} ({seeds})"
    axes.plot(images, means, label=label, color=colour, marker=marker, lw=2, ms=8, mec="white")
    low, high = ([end(point.fid.values) for point in row.curve] for end in (min, max))
    axes.fill_between(images, low, high, color=colour, alpha=0.2, linewidth=0)


def _axes(axes: Axes, label: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.set_xlim(left=0)
    axes.set_xlabel(label, fontsize=11)
    axes.tick_params(labelsize=10, labelleft=True)
    axes.grid(True, which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
