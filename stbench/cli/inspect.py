"""`stbench inspect`: what the blocks of trained networks contain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stbench.cli import options
from stbench.cli.outputs import require_outputs
from stbench.core import limits
from stbench.core.errors import UserError
from stbench.core.outputs import Output
from stbench.core.safe_load import shorten
from stbench.core.text import print_line

if TYPE_CHECKING:
    from stbench.data.dataset import Dataset
    from stbench.inspect.job import Files
    from stbench.inspect.subjects import Subject
    from stbench.runs.inspection import Inspection, Value


def inspect(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, or folders of them.")] = [],  # noqa: B006
    checkpoint: Annotated[
        list[Path], typer.Option(help="Official weights (DiT, SiT, U-ViT, REPA, ...); repeatable.")
    ] = [],  # noqa: B006
    dataset: Annotated[str, typer.Option(help="Data set on which --checkpoint is inspected.")] = "digits",
    data: Annotated[str | None, typer.Option(help="Path of the data of --checkpoint.")] = None,
    original: options.Original = None,
    heads: Annotated[
        int | None,
        typer.Option(
            min=1, max=limits.MAX_WIDTH, help="Attention heads of --checkpoint, if its width is unpublished."
        ),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="Objective of --checkpoint, if it does not say the path of its SiT.")
    ] = None,
    encoder: Annotated[
        list[str],
        typer.Option(
            help="External encoder to compare with, a timm model; repeatable. Default: the run's own."
        ),
    ] = [],  # noqa: B006
    times: Annotated[
        str, typer.Option(help="Flow-equivalent times in 0..1, t=1 is noise, separated by commas.")
    ] = "0.5",
    steps: Annotated[
        str, typer.Option(help="Evaluation points, separated by commas, or last; default: all.")
    ] = "",
    scales: Annotated[
        str, typer.Option(help="Guidance scales of the features; 0 is unconditional, 1 conditional.")
    ] = "0,1,1.5,2,3,5,10,20,30",
    images: Annotated[
        int,
        typer.Option(min=20, max=limits.MAX_SAMPLES, help="At most so many training and held-out images."),
    ] = 2000,
    maps: Annotated[bool, typer.Option(help="Write PCA maps of the tokens.")] = True,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for inspect.json and figures.")
    ] = Path("inspect"),
    device: options.Device = "auto",
    plugin: options.Plugins = [],  # noqa: B006
    allow_changed_plugin: options.AllowChangedPlugin = False,
) -> None:
    """Measure the features of every block: linear probe, rank, norm, similarities, guidance, PCA maps."""
    from stbench.core.device import pick_device
    from stbench.core.registry import load_builtins
    from stbench.evaluate.run_plugins import PluginChoice
    from stbench.inspect.job import inspect as run_job
    from stbench.inspect.job import plan_files
    from stbench.inspect.measure import Settings, chosen_steps
    from stbench.inspect.subjects import official_subject, open_subject
    from stbench.models.encoders import find_encoder
    from stbench.models.official import load_official
    from stbench.runs.folder import find_runs

    # What is inspected
    load_builtins()
    if not runs and not checkpoint:
        raise UserError("expected run folders or --checkpoint FILE, found neither; give at least one")
    subjects = [
        open_subject(path, PluginChoice(tuple(plugin), allow_changed_plugin))
        for path in (find_runs(runs) if runs else [])
    ]
    if checkpoint:
        opened = _dataset(dataset, data)
        for path in checkpoint:
            model = load_official(path, heads=heads, original=original, objective=objective)
            subjects.append(official_subject(path, model, opened))

    # Settings and files, checked before anything is computed
    settings = Settings(
        times=_numbers("times", times, 1.0),
        images=images,
        steps=_steps(steps, subjects),
        scales=_numbers("scales", scales, limits.MAX_GUIDANCE),
        device=pick_device(device),
    )
    for subject in subjects:
        chosen_steps(subject, settings.steps)
    files = plan_files(output, subjects, maps=maps)
    _require_outputs(files, [*runs, *checkpoint])

    inspection = run_job(subjects, settings, [find_encoder(name) for name in encoder], files, _progress)
    _print(inspection)
    print_line(f"{len(inspection.runs)} inspected: {output}")


def _dataset(name: str, path: str | None) -> Dataset:
    """The data set of official weights."""
    from stbench.data.dataset import get_dataset
    from stbench.data.spec import DataSpec, data_fields

    fields = data_fields(path, {})
    if fields is None:
        return get_dataset(name)
    data = DataSpec(**{**fields, "resident": "no"})
    return get_dataset("custom" if name == "digits" else name, data)


def _numbers(option: str, text: str, largest: float) -> tuple[float, ...]:
    """Parse different numbers in 0..largest, separated by commas, ascending."""
    try:
        found = sorted({float(part.encode("ascii")) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or len(found) > 100 or not all(0.0 <= value <= largest for value in found):
        raise UserError(
            f"--{option} must be up to 100 comma-separated numbers in 0..{largest:g}, got {shorten(text)}; "
            f"for example --{option} 0.25,0.5"
        )
    return tuple(found)


def _steps(text: str, subjects: Sequence[Subject]) -> tuple[int, ...]:
    """Parse --steps; "last" is the last step that all subjects have."""
    if not text:
        return ()
    if text == "last":
        common = set.intersection(*(set(subject.points) for subject in subjects))
        if not common:
            raise UserError("--steps last needs a step that all runs have, found none; leave it out")
        return (max(common),)
    try:
        return tuple(sorted({int(part.encode("ascii")) for part in text.split(",")}))
    except ValueError as error:
        raise UserError(
            f"--steps must be comma-separated steps, or last, got {shorten(text)}; for example --steps 200"
        ) from error


def _require_outputs(files: Files, inputs: Sequence[Path]) -> None:
    from stbench.inspect.figures import is_figure
    from stbench.runs.inspection import is_inspection

    outputs = [
        Output(path, is_own=is_inspection if path == files.report else is_figure) for path in files.all()
    ]
    require_outputs(outputs, inputs)


def _progress(text: str) -> None:
    print_line(text, error=True)


def _print(inspection: Inspection) -> None:
    """Print one table per measure: a line per row, a column per block; then the guided features."""
    times, step = inspection.times, inspection.common_step()
    tau = times[len(times) // 2]
    when = "last weights of each run" if step is None else f"step {step}" if step else "official weights"
    for measure, words in inspection.measures.items():
        rows = {label: inspection.by_block(label, measure, tau, step) for label in inspection.labels}
        depth = max(map(len, rows.values()))
        shown = sorted({round(i * (depth - 1) / 7) for i in range(8)})
        cells = {label: [row[i] if i < len(row) else None for i in shown] for label, row in rows.items()}
        _print_table(f"{words} by block: {when}, time {tau:g}", [str(i) for i in shown], cells)
    guided = {label: inspection.by_scale(label, "separation", tau) for label in inspection.labels}
    found = [scale for values in guided.values() for scale in values]
    columns = sorted(set(found))[:9]
    if columns:
        cells = {label: [values.get(scale) for scale in columns] for label, values in guided.items()}
        title = f"class separation of the guided features by scale: time {tau:g}"
        _print_table(title, [f"{scale:g}" for scale in columns], cells)


def _print_table(title: str, columns: Sequence[str], rows: dict[str, list[Value | None]]) -> None:
    from stbench.compare.format import NONE, Section
    from stbench.compare.terminal import print_section

    lines = []
    for label, values in rows.items():
        seeds = max((value.seeds for value in values if value is not None), default=1)
        name = label + (f" ({seeds} seeds)" if seeds > 1 else "")
        lines.append((name, *(NONE if value is None else f"{value.mean:.3g}" for value in values)))
    print_section(Section(title, ("row", *columns), tuple(lines)))
