"""`stbench sample` and `stbench evaluate`: parse and call. No heavy import at the top."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sample(
    run: Annotated[Path | None, typer.Argument(help="A run folder.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Official weights (DiT, SiT, U-ViT, REPA, ...) instead of a run.")
    ] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Images to draw.")] = 1000,
    output: Annotated[
        list[Path],
        typer.Option(help="npz as ADM's (arr_0 uint8 (N,H,W,3), labels), or a folder for PNG; repeatable."),
    ] = [Path("samples.npz")],  # noqa: B006
    guidance: Annotated[
        float,
        typer.Option("--cfg", "--guidance", min=1.0, help="Classifier-free guidance scale; 1.0 is none."),
    ] = 1.0,
    interval: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Times between which guidance is on, noise at 1; default: the run's, or 0 1."),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(min=1, help="Leading channels that are guided; default: the run's, or as published."),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="Default: the run's, or as published.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Its steps; default as for --sampler.")] = None,
    labels: Annotated[str | None, typer.Option(help="balanced or random; default as for --sampler.")] = None,
    vae: Annotated[
        str | None,
        typer.Option(help="Decoder: a diffusers folder, a published name, or none; a run has its own."),
    ] = None,
    original: Annotated[
        str | None, typer.Option(help="Repository that --checkpoint is from, where its keys leave it open.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Its attention heads, where its width is no published one.")
    ] = None,
    weights: Annotated[str, typer.Option(help="Of a training checkpoint: ema or raw.")] = "ema",
    seed: Annotated[int, typer.Option(help="Sampling seed.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images in a network call on a GPU, and in a part.")] = 64,
    precision: Annotated[str, typer.Option(help="fp32, tf32 or bf16; the decoder is fp32.")] = "fp32",
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:N; several with commas, all: a process each.")
    ] = "auto",
) -> None:
    """Draw images from a run's final EMA weights, or from official ones; the same command resumes."""
    from stbench.evaluate import sample_job as sampling

    asked = sampling.Asked(
        count, guidance, interval, channels, sampler, steps, labels, seed, batch, precision
    )
    sampling.sample(sampling.origin(run, checkpoint, vae, original, heads, weights), asked, output, device)


def evaluate(
    samples_or_run: Annotated[
        Path, typer.Argument(metavar="SAMPLES", help="A run folder, an npz as ADM's, or a folder of images.")
    ],
    reference: Annotated[
        Path | None,
        typer.Option(help="ADM npz, file of `data statistics`, or images; left out: the run's own data."),
    ] = None,
    eval_guidance: Annotated[str | None, typer.Option(help="Guidance scales, such as 1.0,1.5,2.0.")] = None,
    samples: Annotated[int | None, typer.Option(min=10, help="Images to draw for each row.")] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", help="Other evaluation options, as eval.steps=50.")
    ] = [],  # noqa: B006
    inception: Annotated[
        Path | None, typer.Option(help="Inception weights; default: torch hub's cache.")
    ] = None,
    inception_sha256: Annotated[
        str | None, typer.Option(help="First digits of that file's sha256; default: the published file's.")
    ] = None,
    dino: Annotated[Path | None, typer.Option(help="DINOv2 weights, for FD-DINOv2 too.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON to write; default: beside the samples.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images measured at once.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Measure samples against a reference, or a run's kept weights again under another protocol."""
    from stbench.cli import evaluate as scoring

    weights = {"inception": inception, "inception_sha256": inception_sha256, "dino": dino}
    measuring = scoring.Measuring.of(weights, batch, device)
    protocol = scoring.Protocol(eval_guidance, samples, overrides)
    scoring.evaluate_samples(samples_or_run, reference, output, measuring, protocol)
