"""PNG figures of `stbench inspect`: runs compared by block, along training and by guidance scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stbench.compare.plot import COLOURS, GREY, MARKERS
from stbench.core.files import atomic_write
from stbench.core.text import to_plot
from stbench.inspect.maps import Guiding, Progress, spread_with_ends
from stbench.runs.inspection import Inspection, Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARK = "features by stbench inspect"
"""In the metadata of every figure, so that it can be replaced."""
LABEL_LENGTH = 60
PANELS = 4
"""Most panels of a figure."""

Series = Mapping[float, Value | None]
Panels = dict[str, Mapping[str, Series]]
"""Title -> row -> x -> value."""


def is_figure(path: Path) -> bool:
    """Whether a PNG file was written by `stbench inspect`."""
    return MARK.encode() in path.read_bytes()


def plot_blocks(inspection: Inspection, tau: float, path: Path) -> None:
    """Plot probe, effective rank, norm and CKNNA to an encoder against the block, at the last common step."""
    step = inspection.common_step()
    measures = {
        "probe": "linear-probe accuracy, held-out images",
        "effective_rank": "effective rank of the tokens",
        "norm": "mean norm of a token",
    }
    for name in inspection.settings["encoders"][:1]:
        measures[f"cknna:{name}"] = f"CKNNA to encoder {name}"
    panels: Panels = {}
    for measure, title in measures.items():
        rows = {label: inspection.by_block(label, measure, tau, step) for label in inspection.labels}
        panels[title] = {label: _by_index(values) for label, values in rows.items()}
    when = "last weights of each" if step is None else f"step {step}" if step else "official weights"
    _plot(panels, f"{when}, time {tau:g}, without labels", "block", path)


def plot_training(inspection: Inspection, tau: float, path: Path) -> None:
    """Plot the probe accuracy of up to four blocks against the training images."""
    depth = min(run["depth"] for run in inspection.runs)
    panels: Panels = {}
    for block in spread_with_ends(depth, PANELS):
        panels[f"linear-probe accuracy, block {block}"] = {
            label: inspection.by_step(label, "probe", tau, block) for label in inspection.labels
        }
    _plot(panels, f"time {tau:g}, without labels", "training images of the last stage", path)


def plot_guidance(inspection: Inspection, tau: float, path: Path) -> None:
    """Plot class separation, norm and effective rank of the guided features against the scale."""
    measures = {
        "separation": "class separation tr(S_b) / tr(S_w)",
        "norm": "mean norm of a token",
        "effective_rank": "effective rank of the tokens",
    }
    panels: Panels = {}
    for measure, title in measures.items():
        rows = {label: inspection.by_scale(label, measure, tau) for label in inspection.labels}
        panels[title] = {label: values for label, values in rows.items() if values}
    _plot(
        panels,
        f"guided features of the teacher, or of a run without one itself, time {tau:g}",
        "guidance scale (0 unconditional, 1 conditional)",
        path,
    )


def plot_progress(found: Progress, title: str, path: Path) -> None:
    """Show the maps of one run: a row per block, a column per evaluation point, several images in a cell."""
    columns = [np.concatenate([_padded(image) for image in found.images], 1)]
    figure = _figure(1.9 * (len(found.steps) + 1), 0.62 * len(found.blocks) + 0.8)
    axes = figure.subplots(len(found.blocks), len(found.steps) + 1, squeeze=False)
    for row, block in enumerate(found.blocks):
        _show(axes[row][0], columns[0] if row == 0 else None, "images" if row == 0 else "")
        axes[row][0].set_ylabel(f"block {block}", fontsize=8, rotation=0, ha="right", va="center")
        for column, step in enumerate(found.steps, start=1):
            cell = np.concatenate([_padded(picture) for picture in found.maps[block, step]], 1)
            _show(axes[row][column], cell, (f"step {step}" if step else "weights") if row == 0 else "")
    figure.suptitle(to_plot(f"{title}: principal components of tokens, time {found.tau:g}", 200), fontsize=9)
    _save(figure, path)


def plot_guiding(found: Guiding, title: str, path: Path) -> None:
    """Show the maps of what could guide: a row per image, a column per source."""
    figure = _figure(1.15 * (len(found.columns) + 1) + 0.4, 1.1 * len(found.images) + 1.0)
    axes = figure.subplots(len(found.images), len(found.columns) + 1, squeeze=False)
    for row, image in enumerate(found.images):
        _show(axes[row][0], image, "image" if row == 0 else "")
        for column, (name, pictures) in enumerate(found.columns.items(), start=1):
            _show(axes[row][column], pictures[row], to_lines(name) if row == 0 else "")
    figure.suptitle(to_plot(f"{title}: guiding features, time {found.tau:g}", 200), fontsize=9)
    _save(figure, path)


def to_lines(text: str) -> str:
    """A column heading, whose line breaks are kept."""
    return "\n".join(to_plot(line, 40, width=18) for line in text.split("\n"))


def _plot(panels: Mapping[str, Mapping[str, Series]], title: str, x: str, path: Path) -> None:
    """Plot up to four panels of lines with bands, two in a row, and one legend."""
    labels = list(dict.fromkeys(label for rows in panels.values() for label in rows))
    rows = -(-len(panels) // 2)
    figure = _figure(10, 3.3 * rows + 0.5 + 0.22 * -(-len(labels) // 2))
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for panel, (name, series) in zip(axes, panels.items(), strict=False):
        for label, values in series.items():
            _line(panel, values, labels.index(label), label)
        panel.set_title(to_plot(name), fontsize=10)
        panel.set_xlabel(x, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(True, alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(to_plot(title), fontsize=10)
    _save(figure, path)


def _by_index(values: Sequence[Value | None]) -> Series:
    return {float(i): value for i, value in enumerate(values)}


def _line(panel: Axes, values: Series, index: int, label: str) -> None:
    known = {x: value for x, value in values.items() if value is not None}
    x, means = list(known), np.array([value.mean for value in known.values()])
    bands = np.array([value.std or 0.0 for value in known.values()])
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    seeds = max((value.seeds for value in known.values()), default=1)
    name = to_plot(label, LABEL_LENGTH) + (f" (mean of {seeds} seeds, band: std)" if seeds > 1 else "")
    panel.plot(x, means, color=colour, marker=marker, ms=6, mec="white", lw=1.8, label=name)
    if bands.any():
        panel.fill_between(x, means - bands, means + bands, color=colour, alpha=0.15, linewidth=0)


def _show(axes: Axes, picture: np.ndarray | None, title: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if picture is not None:
        axes.imshow(picture, interpolation="nearest")
    if title:
        axes.set_title(title, fontsize=8, color=GREY)


def _padded(picture: np.ndarray) -> np.ndarray:
    """A picture as floats in [0,1], enlarged by whole pixels to about 64, with a white right edge."""
    values = picture / 255.0 if picture.dtype == np.uint8 else picture
    factor = max(1, 64 // len(values))
    large = np.kron(values, np.ones((factor, factor, 1)))
    return np.concatenate([large, np.ones((len(large), 4, 3))], axis=1)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    from matplotlib import rc_context

    image = BytesIO()
    with rc_context({"text.usetex": False}):
        figure.savefig(image, format="png", metadata={"Software": MARK})
    atomic_write(path, image.getvalue())
