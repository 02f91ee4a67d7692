"""The options of `stbench sample` and `stbench evaluate`.

Heavy modules are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sample(
    run: Annotated[Path | None, typer.Argument(help="A run folder.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Official weights (DiT, SiT, U-ViT, REPA, ...) instead of a run.")
    ] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Number of images.")] = 1000,
    output: Annotated[
        list[Path],
        typer.Option(help="ADM-style npz (arr_0 uint8 (N,H,W,3), labels), or a folder of PNGs; repeatable."),
    ] = [Path("samples.npz")],  # noqa: B006
    guidance: Annotated[
        float,
        typer.Option("--cfg", "--guidance", min=1.0, help="Classifier-free guidance scale; 1.0 is none."),
    ] = 1.0,
    interval: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Times between which guidance is on, t=1 is noise; default: the run's, or 0 1."),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(min=1, help="Number of guided leading channels; default: the run's, or as published."),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="Default: the run's, or as published.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps; default as for --sampler.")] = None,
    labels: Annotated[str | None, typer.Option(help="balanced or random; default as for --sampler.")] = None,
    vae: Annotated[
        str | None,
        typer.Option(help="Decoder: a diffusers folder, a published name, or none; default: the run's own."),
    ] = None,
    original: Annotated[
        str | None, typer.Option(help="Repository that --checkpoint comes from, if its keys are ambiguous.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads of --checkpoint, if its width is unpublished.")
    ] = None,
    weights: Annotated[str, typer.Option(help="Weights of a training checkpoint: ema or raw.")] = "ema",
    seed: Annotated[int, typer.Option(help="Sampling seed.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images per network call on a GPU, and per shard.")] = 64,
    precision: Annotated[str, typer.Option(help="fp32, tf32 or bf16; the decoder runs in fp32.")] = "fp32",
    device: Annotated[
        str,
        typer.Option(help="auto, cpu, cuda or cuda:N; all or a comma-separated list: one process each."),
    ] = "auto",
) -> None:
    """Generate images with a run's final EMA weights or with official weights; rerun to resume."""
    from stbench.cli import sample as command
    from stbench.evaluate.sample_job import SampleRequest

    location = command.model_location(
        run, checkpoint, vae=vae, original=original, heads=heads, weights=weights
    )
    request = SampleRequest(
        count=count,
        scale=guidance,
        interval=interval,
        channels=channels,
        sampler=sampler,
        steps=steps,
        labels=labels,
        seed=seed,
        batch=batch,
        precision=precision,
    )
    command.sample(location, request, output, device)


def evaluate(
    samples_or_run: Annotated[
        Path, typer.Argument(metavar="SAMPLES", help="A run folder, an ADM-style npz, or a folder of images.")
    ],
    reference: Annotated[
        Path | None,
        typer.Option(help="ADM npz, file of `data statistics`, or images; default: the run's own data."),
    ] = None,
    eval_guidance: Annotated[str | None, typer.Option(help="Guidance scales, e.g. 1.0,1.5,2.0.")] = None,
    samples: Annotated[int | None, typer.Option(min=10, help="Number of generated images per row.")] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", help="Other evaluation settings, e.g. eval.steps=50.")
    ] = [],  # noqa: B006
    inception: Annotated[
        Path | None, typer.Option(help="Inception weights; default: torch hub's cache.")
    ] = None,
    inception_sha256: Annotated[
        str | None, typer.Option(help="First digits of the file's sha256; default: the published file's.")
    ] = None,
    dino: Annotated[Path | None, typer.Option(help="DINOv2 weights; adds FD-DINOv2.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON to write; default: next to the samples.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per measured batch.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Score samples against a reference, or evaluate a run's stored weights under another protocol."""
    from stbench.cli import evaluate as command
    from stbench.evaluate.feature_networks import NetworkFiles

    networks = NetworkFiles(inception, inception_sha256, dino)
    measure = command.MeasureOptions(networks, batch, device)
    run = command.RunOptions(eval_guidance, samples, tuple(overrides))
    command.evaluate(samples_or_run, reference, output, measure=measure, run=run)
