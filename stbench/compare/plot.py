"""Plot the learning curves of a leaderboard: the metric against images of the last and of all stages."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stbench.compare.format import count
from stbench.compare.leaderboard import Leaderboard, Row, Table
from stbench.compare.question import metric_name
from stbench.compare.tables import heading
from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.core.text import to_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c510a", "#5e3c99")
"""The colour-blind safe palette of Okabe and Ito, and two more colours. The baseline is grey."""
MARKERS = "sD^vPX<h"
GREY = "#555555"
PANEL_HEIGHTS = (5.0, 4.4)
"""Height of a table's panels in inches, for one and two tables."""
TABLES_PER_FILE = 2
"""Tables in one file, with two panels each."""
LABEL_WIDTH = 44
"""Characters after which a legend label is wrapped."""
LABEL_LENGTH, TITLE_LENGTH = 400, 300
"""Characters after which a legend label and the title of a table are cut."""
LEGEND_WIDTH = 150
"""Characters of a line of the legend."""

METADATA = {"png": "Software", "svg": "Title", "pdf": "Title"}
"""Format -> field of its metadata that contains `MARK`; other formats have none that matplotlib writes."""
MARK = "learning curves by stbench compare"

Style = tuple[str, str, str]
"""Colour, marker and line style."""


def plot_curves(leaderboard: Leaderboard, path: Path) -> None:
    """Plot two panels per table, 1200 pixels wide, and write them to the files of `plot_paths`.

    Lines are means over seeds, bands are one standard deviation. A recipe has the same style in all panels of
    all files. The suffix of `path` selects the format, such as .png or .svg.

    Raises:
        UserError: There are no finished runs, or the format is unknown.
    """
    tables = [table for table in leaderboard.tables if table.rows]
    if not tables:
        raise UserError("expected finished runs to plot, found none; make one with `stbench run`")
    styles = _styles(tables)

    # Render all files before the first one is written
    images = []
    for i, file in enumerate(plot_paths(leaderboard, path)):
        shown = tables[i * TABLES_PER_FILE : (i + 1) * TABLES_PER_FILE]
        names = {row.recipe for table in shown for row in table.rows}
        used = {name: style for name, style in styles.items() if name in names}
        images.append((file, _render(shown, used, path)))
    for file, image in images:
        atomic_write(file, image)


def plot_paths(leaderboard: Leaderboard, path: Path) -> list[Path]:
    """Return the files of a plot: `path`, and for more than two tables path-2, path-3 and so on."""
    count = -(-sum(bool(table.rows) for table in leaderboard.tables) // TABLES_PER_FILE)
    return [path, *(path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(2, count + 1))]


def _render(tables: Sequence[Table], styles: dict[str, Style], path: Path) -> bytes:
    """Return the image of up to two tables in the format of `path`."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Size: a pair of panels per table, and a legend below them
    legend_columns = _legend_columns(list(styles))
    legend_lines = sum(label.count("\n") + 1 for label in map(_wrapped, styles))
    legend_height = 0.25 * (1 + legend_lines / legend_columns)
    heights = [PANEL_HEIGHTS[len(tables) - 1]] * len(tables)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    figure = Figure(figsize=(12, sum(heights) + legend_height), dpi=100, layout=layout)

    # Check the format before anything is drawn
    formats = sorted(FigureCanvasAgg(figure).get_supported_filetypes())
    if path.suffix[1:] not in formats:
        raise UserError(
            f"expected a file ending in one of {', '.join(formats)}, found {path}; try curves.png"
        )

    # Panels and legend
    height_ratios = [*heights, legend_height]
    subfigures = figure.subfigures(len(height_ratios), 1, squeeze=False, height_ratios=height_ratios)[:, 0]
    for subfigure, table in zip(subfigures[:-1], tables, strict=True):
        _plot_table(subfigure, table, styles)
    _plot_legend(subfigures[-1], styles, legend_columns)

    image = BytesIO()
    kind = path.suffix[1:]
    with rc_context({"text.usetex": False}):  # names are not commands of TeX
        figure.savefig(image, format=kind, metadata={METADATA[kind]: MARK} if kind in METADATA else None)
    return image.getvalue()


def is_plot(path: Path) -> bool:
    """Whether a file is a plot of learning curves, which its metadata say in the formats of `METADATA`."""
    return path.suffix[1:] in METADATA and MARK.encode() in path.read_bytes()


def _styles(tables: Sequence[Table]) -> dict[str, Style]:
    """Assign a style to every row name; rows with options, as in "repa (weight=0.5)", are dashed."""
    baselines = {table.baseline for table in tables}
    names = sorted({row.recipe for table in tables for row in table.rows} - baselines)
    styles = {name: (GREY, "o", "-") for name in sorted(baselines)}
    for i, name in enumerate(names):
        # The marker shifts by one each time the colours repeat, so that no pair occurs twice.
        styles[name] = (COLOURS[i % 8], MARKERS[(i + i // 8) % 8], "--" if "(" in name else "-")
    return styles


def _plot_table(subfigure: Any, table: Table, styles: dict[str, Style]) -> None:
    """Plot a table: student only on the left, everything paid on the right."""
    left, right = subfigure.subplots(1, 2, sharey=True)
    counts = sorted({len(row.seeds) for row in table.rows})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    plural = "" if counts == [1] else "s"
    what = f"protocol {table.protocol}, mean over {seeds} seed{plural}, band: one standard deviation"
    subfigure.suptitle(f"{to_plot(heading(table), TITLE_LENGTH)}\n{to_plot(what)}", fontsize=11)
    for row in sorted(table.rows, key=lambda row: (row.recipe != table.baseline, row.recipe, row.length)):
        _plot_row(left, row, earlier_images=0, style=styles[row.recipe])
        _plot_row(right, row, earlier_images=row.earlier_images, style=styles[row.recipe])
    _format_axes(
        left, "student only: training images of the last stage", None if table.at else table.student_images
    )
    _format_axes(
        right, "everything paid: training images of all stages", None if table.at else table.paid_images
    )
    left.set_ylabel(f"{to_plot(metric_name(table.metric))} without guidance (log scale)", fontsize=10)


def _plot_row(axes: Axes, row: Row, *, earlier_images: int, style: Style) -> None:
    colour, marker, line = style
    images = [point.images + earlier_images for point in row.curve]
    means = [point.value.mean for point in row.curve]
    width, order = (2.6, 4) if colour == GREY else (1.8, 3)
    axes.plot(images, means, color=colour, marker=marker, ls=line, lw=width, zorder=order, ms=8, mec="white")
    low, high = [], []
    for point in row.curve:
        mean, std = point.value.mean, point.value.std or 0.0
        # A band that reaches zero has no logarithm: it then ends at the smallest value.
        low.append(max(mean - std, min(point.value.values)) if std >= mean else mean - std)
        high.append(mean + std)
    axes.fill_between(images, low, high, color=colour, alpha=0.15, linewidth=0)


def _format_axes(axes: Axes, label: str, budget: int | None) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    # FID on a log scale with plain numbers as ticks
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())

    # Images, with the budget as a vertical line
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    if budget is not None:
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


def _plot_legend(subfigure: Any, styles: dict[str, Style], columns: int) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=_wrapped(name), color=colour, marker=marker, ls=line, lw=2, ms=8, mec="white")
        for name, (colour, marker, line) in styles.items()
    ]
    subfigure.legend(handles=handles, loc="center", ncols=columns, frameon=False, fontsize=11, handlelength=3)


def _legend_columns(names: Sequence[str]) -> int:
    longest = max(min(len(name), LABEL_WIDTH) for name in names)
    return max(1, min(len(names), LEGEND_WIDTH // (longest + 8)))


def _wrapped(label: str) -> str:
    return to_plot(label, LABEL_LENGTH, width=LABEL_WIDTH)
