"""`stbench evaluate`: score images against a reference, or evaluate a run under another protocol."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from stbench.cli import options
from stbench.cli.evaluation_settings import RunOptions, evaluation_settings
from stbench.cli.ranks import start_ranks
from stbench.cli.scoring import MeasureOptions, ratio_options, score_and_print, score_files
from stbench.core import limits
from stbench.core.errors import UserError
from stbench.core.text import print_line


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
    guide: Annotated[
        list[str],
        typer.Option(
            help="Guides to evaluate a run with at every guidance scale, such as head:1.4@0-0.7 or "
            "network=RUN:1.5, joined with +; repeatable, one evaluation each.",
        ),
    ] = [],  # noqa: B006
    ema_decay: options.EmaDecays = [],  # noqa: B006
    inception: options.Inception = None,
    inception_sha256: options.InceptionSha256 = None,
    dino: options.Dino = None,
    fdr: options.Fdr = None,
    validation: Annotated[
        Path | None, typer.Option(help="Real images outside the reference, or their statistics, for --fdr.")
    ] = None,
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
    devices: options.Devices = None,
    plugin: options.Plugins = [],  # noqa: B006
    allow_changed_plugin: options.AllowChangedPlugin = False,
) -> None:
    """Score images against a reference, or evaluate a run's stored weights under another protocol."""
    from stbench.core.registry import load_plugins
    from stbench.evaluate.feature_networks import NetworkFiles
    from stbench.runs.folder import RunFolder

    start_ranks(devices, device)
    files = NetworkFiles(inception, inception_sha256, dino)
    ratio = ratio_options(fdr, validation, reference)
    measure = MeasureOptions(files, batch, device, adm_fp16, ratio, validation)
    run = RunOptions(
        eval_guidance,
        samples,
        tuple(overrides),
        tuple(plugin),
        allow_changed_plugin,
        ema_decays=tuple(dict.fromkeys(ema_decay)),
        guides=tuple(dict.fromkeys(guide)),
    )
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
        elif ema_decay:
            raise UserError("--ema-decay uses the run's own reference; drop --reference, or drop --ema-decay")
        elif output is not None:
            raise UserError("a run's scores are written to its folder evaluation/; drop --output")
        else:
            score_run(path, reference, measure, run)
        return
    if reference is None and path.exists():
        raise UserError(f"{path} is not a run folder; to score images, add --reference REF")
    if reference is None:
        evaluate_run(path, run, device)  # raises the error that says what a run folder is
    elif (run if fdr is None else replace(run, plugins=())) != RunOptions():
        raise UserError(
            f"--samples, --eval-guidance, --guide, --ema-decay, --set and --plugin apply to a run, but "
            f"{path} is not a run folder; drop them"
        )
    else:
        load_plugins(plugin)  # extractors of FDr
        score_files(path, reference, output, measure)


def evaluate_run(path: Path, run_options: RunOptions, device: str) -> None:
    """Add evaluation rows to a run under another protocol and print them."""
    from stbench.cli.progress import point_line
    from stbench.core.device import pick_device
    from stbench.evaluate.again import evaluate_again
    from stbench.evaluate.past_run import open_run
    from stbench.evaluate.posthoc_ema import Reconstruction, plan
    from stbench.train import launch

    settings = evaluation_settings(path, run_options)
    run = open_run(path, run_options.choice())
    reconstructions = plan(run, run_options.ema_decays)
    wanted: list[Reconstruction | None] = [*reconstructions] or [None]
    for planned in reconstructions:
        print_line(planned.describe())
    with launch.joined(pick_device(device)) as world:
        own = launch.local_device(pick_device(device), world)
        added = [
            (each, evaluate_again(run, guided, own, world, reconstruction=each))
            for each in wanted
            for guided in settings
        ]
    for reconstruction, points in added:
        for point in points:
            suffix = "" if reconstruction is None else f"  {reconstruction.label}"
            print_line(point_line(point) + suffix)
    print_line(f"{sum(len(points) for _, points in added)} rows added to {path}")


def score_run(path: Path, reference: Path, measure: MeasureOptions, run_options: RunOptions) -> None:
    """Sample from a run at every guidance scale, into its folder evaluation/, and score the images.

    Rerunning the command resumes, as `stbench sample` does.
    """
    from stbench.cli.progress import progress_bar
    from stbench.core.device import pick_devices
    from stbench.evaluate.past_run import open_run
    from stbench.evaluate.reference import reference_size
    from stbench.evaluate.sample_job import SampleRequest, sample_images
    from stbench.evaluate.sample_model import ModelLocation
    from stbench.evaluate.scores import require_comparable
    from stbench.runs.guide_text import file_name

    # Fail before hours of sampling if the reference does not fit or weights are missing.
    by_guides = evaluation_settings(path, run_options)
    settings = by_guides[0]
    height, width = open_run(path, run_options.choice()).prepared.dataset.image_shape[1:]
    for real in (reference, measure.validation):
        if real is not None:
            require_comparable(
                str(path),
                count=settings.samples,
                size=(height, width),
                reference=str(real),
                reference_size=reference_size(real),
            )
    networks = measure.networks()

    for scale, guides in product(settings.guidance, [each.guides for each in by_guides]):
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
        guided = f"+{file_name(guides)}" if guides else ""
        output = path / "evaluation" / f"g{scale:g}{guided}-n{request.count}.npz"
        devices = pick_devices(measure.device)
        location = ModelLocation(path, plugins=run_options.choice(), guides=guides)
        sample_images(location, request, [output], devices, progress=progress_bar)
        score_and_print(output, reference, None, networks, measure)
