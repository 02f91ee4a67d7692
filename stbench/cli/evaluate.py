"""`stbench evaluate` and `stbench data statistics`: score images or a run, print the results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stbench.cli.progress import progress_bar
from stbench.config.overrides import parse_set
from stbench.config.resolve import evaluation_spec, parse_scales
from stbench.config.spec import EvalSpec
from stbench.core.device import pick_device, pick_devices
from stbench.core.errors import UserError
from stbench.core.registry import load_builtins
from stbench.evaluate.feature_networks import FeatureNetwork, NetworkFiles
from stbench.evaluate.image_sets import ImageSet, open_images
from stbench.evaluate.past_run import open_run
from stbench.evaluate.points import evaluate_again
from stbench.evaluate.reference import reference_size, write_statistics
from stbench.evaluate.sample_job import SampleRequest, sample_images
from stbench.evaluate.sample_model import ModelLocation
from stbench.evaluate.score_images import open_samples, score_images
from stbench.evaluate.scores import SCORES, ScoreReport, require_comparable, score_name
from stbench.runs.folder import RunFolder
from stbench.train.progress import point_line

_progress = partial(progress_bar, transient=True)


@dataclass(frozen=True)
class MeasureOptions:
    """The options that `evaluate --reference` and `data statistics` share."""

    networks: NetworkFiles = NetworkFiles()  # noqa: RUF009 - frozen
    batch: int = 64
    device: str = "auto"


@dataclass(frozen=True)
class RunOptions:
    """The options of `stbench evaluate` that apply to a run only."""

    guidance: str | None = None
    samples: int | None = None
    overrides: Sequence[str] = ()


def evaluate(
    path: Path, reference: Path | None, output: Path | None, *, measure: MeasureOptions, run: RunOptions
) -> None:
    """Evaluate a run under another protocol, or score a run or images against a reference."""
    if RunFolder(path).exists():
        if reference is None:
            evaluate_run(path, run, measure.device)
        elif output is not None:
            raise UserError("a run's scores are written to its folder evaluation/; drop --output")
        else:
            score_run(path, reference, measure, run)
        return
    if reference is None and path.exists():
        raise UserError(f"{path} is not a run folder; to score images, add --reference REF")
    if reference is None:
        evaluate_run(path, run, measure.device)  # which says what a run folder is
    elif run != RunOptions():
        raise UserError(
            f"--samples, --eval-guidance and --set apply to a run, but {path} is not a run folder; drop them"
        )
    else:
        score_files(path, reference, output, measure)


def evaluate_run(path: Path, options: RunOptions, device: str) -> None:
    """Add evaluation rows to a run under another protocol and print them."""
    settings = _evaluation_settings(path, options)
    run = open_run(path)
    added = evaluate_again(run, settings, pick_device(device))
    for point in added:
        print(point_line(point))
    print(f"{len(added)} rows added to {path}")


def score_run(path: Path, reference: Path, measure: MeasureOptions, options: RunOptions) -> None:
    """Sample from a run at every guidance scale, into its folder evaluation/, and score the images.

    Rerunning the command resumes, as `stbench sample` does.
    """
    # Fail before hours of sampling if the reference does not fit or weights are missing.
    settings = _evaluation_settings(path, options)
    height, width = open_run(path).prepared.dataset.image_shape[1:]
    require_comparable(
        str(path),
        count=settings.samples,
        size=(height, width),
        reference=str(reference),
        reference_size=reference_size(reference),
    )
    networks = measure.networks.load(pick_device(measure.device))

    for scale in settings.guidance:
        request = SampleRequest(
            count=settings.samples,
            scale=scale,
            interval=settings.interval,
            channels=settings.channels,
            sampler=settings.sampler,
            steps=settings.steps,
            labels=settings.labels,
            seed=settings.seed,
        )
        output = path / "evaluation" / f"g{scale:g}-n{request.count}.npz"
        devices = pick_devices(measure.device)
        sample_images(ModelLocation(path), request, [output], devices, progress=progress_bar)
        _score_and_print(output, reference, None, networks, measure)


def score_files(samples: Path, reference: Path, output: Path | None, measure: MeasureOptions) -> None:
    """Score images against a reference, write the scores as JSON and print them."""
    _print_ignored(open_samples(samples, reference))
    networks = measure.networks.load(pick_device(measure.device))
    _score_and_print(samples, reference, output, networks, measure)


def _score_and_print(
    samples: Path,
    reference: Path,
    output: Path | None,
    networks: Sequence[FeatureNetwork],
    measure: MeasureOptions,
) -> None:
    scores, target = score_images(
        samples,
        reference,
        networks,
        output,
        batch=measure.batch,
        device=pick_device(measure.device),
        progress=_progress,
    )
    _print_scores(scores, target)


def statistics(images: Path, output: Path, size: int | None, options: MeasureOptions) -> None:
    """Measure real images and write a statistics file, centre-cropping the images of a folder to `size`."""
    if output.suffix != ".npz":
        raise UserError(f"the output must be a file that ends in .npz, found {output}; try {output}.npz")
    found = open_images(images, size)
    _print_ignored(found)
    device = pick_device(options.device)
    networks = options.networks.load(device)
    with _progress("images") as report:
        done = write_statistics(found, networks, output, batch=options.batch, device=device, report=report)
    print(f"{done.count} images of {done.size[1]}x{done.size[0]}: {output}")


def _evaluation_settings(path: Path, options: RunOptions) -> EvalSpec:
    """Return a run's evaluation settings with the options applied, validated."""
    load_builtins()
    run = open_run(path)
    changes = _evaluation_overrides(options.overrides)
    if options.guidance is not None:
        changes["guidance"] = parse_scales(options.guidance)
    if options.samples is not None:
        changes["samples"] = options.samples
    spec = run.prepared.spec
    return evaluation_spec(spec.eval.model_dump() | changes, spec.objective, spec.train.steps)


def _evaluation_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values of --set without their prefix; UserError for anything but evaluation settings."""
    settings = parse_set(overrides)
    for name in settings:
        if not name.startswith("eval.") or name == "eval.points":
            raise UserError(
                f"`stbench evaluate` can change eval.* only, except eval.points; found '{name}'; "
                f"for example --set eval.steps=50"
            )
    return {name.removeprefix("eval."): value for name, value in settings.items()}


def _print_ignored(images: ImageSet) -> None:
    if images.ignored:
        others = ", ".join(f"{count} {suffix}" for suffix, count in sorted(images.ignored.items()))
        print(f"ignored, not images: {others}", file=sys.stderr)


def _print_scores(scores: ScoreReport, target: Path) -> None:
    count = scores.protocol["count"]
    table = Table("score", "value", "meaning", title=escape(f"{scores.protocol['samples']}: {count} images"))
    for name, meaning in SCORES.items():
        if (full := score_name(name, count)) in scores.metrics:
            table.add_row(full, f"{scores.metrics[full]:.5g}", meaning)
    Console().print(table)
    for warning in scores.warnings:
        Console(stderr=True).print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    print(f"scores and protocol: {target}")
