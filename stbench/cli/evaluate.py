"""`stbench evaluate`: score images against a reference, or evaluate a run under another protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stbench.cli import options
from stbench.cli.outputs import require_outputs
from stbench.core import limits
from stbench.core.errors import UserError
from stbench.core.outputs import Output
from stbench.core.text import print_line, visible

if TYPE_CHECKING:
    from stbench.config.spec import EvalSpec
    from stbench.evaluate.feature_networks import FeatureNetwork, NetworkFiles
    from stbench.evaluate.image_sets import ImageSet
    from stbench.evaluate.run_plugins import PluginChoice
    from stbench.evaluate.scores import ScoreReport


@dataclass(frozen=True)
class MeasureOptions:
    """How images are measured: the feature networks, the batch size, the device, ADM's rounding."""

    networks: NetworkFiles
    batch: int
    device: str
    adm_fp16: bool = False


@dataclass(frozen=True)
class RunOptions:
    """The options of `stbench evaluate` that apply to a run only."""

    guidance: str | None = None
    samples: int | None = None
    overrides: tuple[str, ...] = ()
    plugins: tuple[Path, ...] = ()
    allow_changed_plugin: bool = False
    inception: Path | None = None
    inception_sha256: str | None = None

    def choice(self) -> PluginChoice:
        """The plug-ins that may be executed."""
        from stbench.evaluate.run_plugins import PluginChoice

        return PluginChoice(self.plugins, self.allow_changed_plugin)


def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="SAMPLES", help="Run folder, ADM-style npz, or folder of images.")
    ],
    reference: Annotated[
        Path | None,
        typer.Option(help="ADM npz, file of `data statistics`, or images; default: the run's own data."),
    ] = None,
    eval_guidance: options.EvalGuidance = None,
    samples: Annotated[
        int | None, typer.Option(min=10, max=limits.MAX_SAMPLES, help="Number of generated images per row.")
    ] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", help="Other evaluation settings, such as eval.steps=50; repeatable.")
    ] = [],  # noqa: B006
    inception: options.Inception = None,
    inception_sha256: options.InceptionSha256 = None,
    dino: options.Dino = None,
    output: Annotated[Path | None, typer.Option(help="JSON to write; default: next to the samples.")] = None,
    batch: options.MeasureBatch = 64,
    adm_fp16: Annotated[
        bool,
        typer.Option(
            "--adm-fp16",
            help="Round the distances of precision and recall to float16, as ADM's evaluator does.",
        ),
    ] = False,
    device: options.Device = "auto",
    plugin: options.Plugins = [],  # noqa: B006
    allow_changed_plugin: options.AllowChangedPlugin = False,
) -> None:
    """Score images against a reference, or evaluate a run's stored weights under another protocol."""
    from stbench.evaluate.feature_networks import NetworkFiles
    from stbench.runs.folder import RunFolder

    measure = MeasureOptions(NetworkFiles(inception, inception_sha256, dino), batch, device, adm_fp16)
    run = RunOptions(eval_guidance, samples, tuple(overrides), tuple(plugin), allow_changed_plugin)
    if adm_fp16 and reference is None:
        raise UserError("--adm-fp16 applies to scores against --reference REF; add it, or drop --adm-fp16")
    if RunFolder(path).exists():
        if reference is None and output is not None:
            raise UserError("a run's scores are added to its curve; drop --output, or add --reference REF")
        if reference is None:
            if dino is not None:
                raise UserError(
                    f"--dino requires --reference; to evaluate a run with DINOv2, type "
                    f"--set eval.extractor=dinov2 --set eval.extractor_file={dino}"
                )
            run = replace(run, inception=inception, inception_sha256=inception_sha256)
            evaluate_run(path, run, device)
        elif output is not None:
            raise UserError("a run's scores are written to its folder evaluation/; drop --output")
        else:
            score_run(path, reference, measure, run)
        return
    if reference is None and path.exists():
        raise UserError(f"{path} is not a run folder; to score images, add --reference REF")
    if reference is None:
        evaluate_run(path, run, device)  # raises the error that says what a run folder is
    elif run != RunOptions():
        raise UserError(
            f"--samples, --eval-guidance, --set and --plugin apply to a run, but {path} is not a run folder; "
            f"drop them"
        )
    else:
        score_files(path, reference, output, measure)


def evaluate_run(path: Path, run_options: RunOptions, device: str) -> None:
    """Add evaluation rows to a run under another protocol and print them."""
    from stbench.cli.progress import point_line
    from stbench.core.device import pick_device
    from stbench.evaluate.past_run import open_run
    from stbench.evaluate.points import evaluate_again

    settings = _evaluation_settings(path, run_options)
    run = open_run(path, run_options.choice())
    added = evaluate_again(run, settings, pick_device(device))
    for point in added:
        print_line(point_line(point))
    print_line(f"{len(added)} rows added to {path}")


def score_run(path: Path, reference: Path, measure: MeasureOptions, run_options: RunOptions) -> None:
    """Sample from a run at every guidance scale, into its folder evaluation/, and score the images.

    Rerunning the command resumes, as `stbench sample` does.
    """
    from stbench.cli.progress import progress_bar
    from stbench.core.device import pick_device, pick_devices
    from stbench.evaluate.past_run import open_run
    from stbench.evaluate.reference import reference_size
    from stbench.evaluate.sample_job import SampleRequest, sample_images
    from stbench.evaluate.sample_model import ModelLocation
    from stbench.evaluate.scores import require_comparable

    # Fail before hours of sampling if the reference does not fit or weights are missing.
    settings = _evaluation_settings(path, run_options)
    height, width = open_run(path, run_options.choice()).prepared.dataset.image_shape[1:]
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
        location = ModelLocation(path, plugins=run_options.choice())
        sample_images(location, request, [output], devices, progress=progress_bar)
        _score_and_print(output, reference, None, networks, measure)


def score_files(samples: Path, reference: Path, output: Path | None, measure: MeasureOptions) -> None:
    """Score images against a reference, write the scores as JSON and print them."""
    from stbench.core.device import pick_device
    from stbench.evaluate.score_images import is_scores, open_samples, scores_file

    files = measure.networks
    target = output or scores_file(samples, "0" * 8)
    require_outputs([Output(target, is_own=is_scores)], [samples, reference, files.inception, files.dino])
    print_ignored(open_samples(samples, reference))
    networks = measure.networks.load(pick_device(measure.device))
    _score_and_print(samples, reference, output, networks, measure)


def _score_and_print(
    samples: Path,
    reference: Path,
    output: Path | None,
    networks: Sequence[FeatureNetwork],
    measure: MeasureOptions,
) -> None:
    from stbench.cli.progress import transient_progress_bar
    from stbench.core.device import pick_device
    from stbench.evaluate.score_images import score_images

    scores, target = score_images(
        samples,
        reference,
        networks,
        output,
        batch=measure.batch,
        adm_fp16=measure.adm_fp16,
        device=pick_device(measure.device),
        progress=transient_progress_bar,
    )
    _print_scores(scores, target)


def _evaluation_settings(path: Path, run_options: RunOptions) -> EvalSpec:
    """Return a run's evaluation settings with the options applied, validated."""
    from stbench.config.resolve import evaluation_spec, parse_scales
    from stbench.core.registry import load_builtins
    from stbench.evaluate.past_run import open_run

    load_builtins()
    spec = open_run(path, run_options.choice()).prepared.spec
    changes = _evaluation_overrides(run_options)
    if changes.get("extractor", spec.eval.extractor) != spec.eval.extractor:
        changes = {"extractor_file": None, "extractor_sha256": None} | changes  # those of the old extractor
    if run_options.guidance is not None:
        changes["guidance"] = parse_scales(run_options.guidance)
    if run_options.samples is not None:
        changes["samples"] = run_options.samples
    return evaluation_spec(spec.eval.model_dump() | changes, spec.objective, spec.train.steps)


def _evaluation_overrides(run_options: RunOptions) -> dict[str, Any]:
    """Return the values of --set without their prefix; UserError for anything but evaluation settings."""
    from stbench.config.overrides import parse_set

    settings = parse_set(run_options.overrides)
    settings |= options.inception_settings(run_options.inception, run_options.inception_sha256, settings)
    for name in settings:
        if not name.startswith("eval.") or name == "eval.points":
            raise UserError(
                f"`stbench evaluate` can change eval.* only, except eval.points; found '{name}'; "
                f"for example --set eval.steps=50"
            )
    return {name.removeprefix("eval."): value for name, value in settings.items()}


def print_ignored(images: ImageSet) -> None:
    """Print which files of a folder are not images, on standard error."""
    if images.ignored:
        others = ", ".join(f"{count} {suffix}" for suffix, count in sorted(images.ignored.items()))
        print_line(f"ignored, not images: {others}", error=True)


def _print_scores(scores: ScoreReport, target: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from stbench.evaluate.scores import SCORES, score_name

    count = scores.protocol["count"]
    title = f"{scores.protocol['samples']}: {count} images"
    table = Table("score", "value", "meaning", title=Text(visible(title)))
    for name, meaning in SCORES.items():
        if (full := score_name(name, count)) in scores.metrics:
            table.add_row(full, f"{scores.metrics[full]:.5g}", Text(meaning))
    Console().print(table)
    for warning in scores.warnings:
        print_line(f"warning: {warning}", error=True)
    print_line(f"scores and protocol: {target}")
