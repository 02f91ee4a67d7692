"""`stbench sample`: generate images with a run's weights or with official weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stbench.cli import options
from stbench.core import limits
from stbench.core.errors import UserError
from stbench.core.text import print_line

if TYPE_CHECKING:
    from stbench.evaluate.sample_model import ModelLocation


def sample(
    run: Annotated[Path | None, typer.Argument(help="Run folder.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Official weights (DiT, SiT, U-ViT, REPA, ...) instead of a run.")
    ] = None,
    count: Annotated[int, typer.Option("-n", min=1, max=limits.MAX_SAMPLES, help="Number of images.")] = 1000,
    output: Annotated[
        list[Path],
        typer.Option(help="ADM-style npz (arr_0 uint8 (N,H,W,3), labels), or a folder of PNGs; repeatable."),
    ] = [Path("samples.npz")],  # noqa: B006
    guidance: Annotated[
        float,
        typer.Option(
            "--cfg",
            "--guidance",
            min=1.0,
            max=limits.MAX_GUIDANCE,
            callback=options.finite,
            help="Classifier-free guidance scale; 1.0 is none.",
        ),
    ] = 1.0,
    interval: Annotated[
        tuple[float, float] | None,
        typer.Option(
            callback=options.finite,
            help="Times between which guidance is on, t=1 is noise; default: the run's, or 0 1.",
        ),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=limits.MAX_WIDTH,
            help="Number of guided leading channels; default: the run's, or as published.",
        ),
    ] = None,
    guide: Annotated[
        str,
        typer.Option(help="Guides beside --cfg, such as head:1.4@0-0.7 or network=RUN:1.5, joined with +."),
    ] = "",
    sampler: Annotated[str | None, typer.Option(help="Sampler; default: the run's, or as published.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=limits.MAX_SAMPLER_STEPS, help="Sampler steps; default as for --sampler."),
    ] = None,
    labels: Annotated[str | None, typer.Option(help="balanced or random; default as for --sampler.")] = None,
    vae: Annotated[
        str | None,
        typer.Option(help="Decoder: a diffusers folder, a published name, or none; default: the run's own."),
    ] = None,
    original: Annotated[
        str | None, typer.Option(help="Repository that --checkpoint comes from, if its keys are ambiguous.")
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(
            min=1, max=limits.MAX_WIDTH, help="Attention heads of --checkpoint, if its width is unpublished."
        ),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="Objective of --checkpoint, if it does not say the path of its SiT.")
    ] = None,
    weights: Annotated[str, typer.Option(help="Weights of a training checkpoint: ema or raw.")] = "ema",
    seed: Annotated[int, typer.Option(min=0, max=limits.MAX_SEED, help="Sampling seed.")] = 0,
    batch: Annotated[
        int,
        typer.Option(min=1, max=limits.MAX_BATCH, help="Images per network call on a GPU, and per shard."),
    ] = 64,
    precision: Annotated[str, typer.Option(help="fp32, tf32 or bf16; the decoder runs in fp32.")] = "fp32",
    device: Annotated[
        str,
        typer.Option(help="auto, cpu, cuda or cuda:N; all or a comma-separated list: one process each."),
    ] = "auto",
    plugin: options.Plugins = [],  # noqa: B006
    allow_changed_plugin: options.AllowChangedPlugin = False,
) -> None:
    """Generate images with a run's final EMA weights or with official weights; rerun to resume."""
    from stbench.cli.progress import progress_bar
    from stbench.core.device import pick_devices
    from stbench.evaluate.run_plugins import PluginChoice
    from stbench.evaluate.sample_job import SampleRequest, sample_images
    from stbench.train import launch

    location = model_location(
        run,
        checkpoint,
        vae=vae,
        original=original,
        heads=heads,
        objective=objective,
        weights=weights,
    )
    location = replace(location, plugins=PluginChoice(tuple(plugin), allow_changed_plugin), guides=guide)
    _require_valid_outputs(output, checkpoint)
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
    devices = pick_devices(device)
    with launch.joined(devices[0]) as world:
        if world.size > 1:
            devices = [launch.local_device(devices[0], world)]
        sample_images(location, request, output, devices, progress=progress_bar, world=world)
    for path in output:
        print_line(f"{count} images: {path}")


def model_location(
    run: Path | None,
    checkpoint: Path | None,
    *,
    vae: str | None = None,
    original: str | None = None,
    heads: int | None = None,
    objective: str | None = None,
    weights: str = "ema",
) -> ModelLocation:
    """Turn the options into the location of a network.

    Raises UserError unless exactly one of run and checkpoint is given, and for options of the other one.
    """
    from stbench.evaluate.sample_model import ModelLocation

    if (run is None) == (checkpoint is None):
        found = "neither" if run is None else "both"
        raise UserError(f"expected a run folder or --checkpoint FILE, found {found}; give one of them")
    if checkpoint is not None:
        if weights not in ("ema", "raw"):
            raise UserError(f"--weights must be ema or raw, found '{weights}'; the default is ema")
        return ModelLocation(
            checkpoint,
            official=True,
            vae=vae,
            original=original,
            heads=heads,
            weights=weights,  # type: ignore[arg-type]
            objective=objective,
        )
    if (original, heads, objective, weights) != (None, None, None, "ema"):
        raise UserError(
            "--original, --heads, --objective and --weights apply to --checkpoint, not to a run; drop them"
        )
    return ModelLocation(run or Path(), vae=vae)


def _require_valid_outputs(outputs: Sequence[Path], checkpoint: Path | None) -> None:
    """Raise UserError for outputs of another form, and as `require_outputs` does."""
    from stbench.cli.outputs import require_outputs
    from stbench.core.outputs import Output
    from stbench.evaluate.sample_parts import is_parts, is_samples, parts_folder

    for output in outputs:
        if output.name in ("", ".."):
            raise UserError(
                f"--output must name an npz file or a new folder, found {output}; try samples.npz"
            )
        if output.suffix not in ("", ".npz"):
            raise UserError(
                f"--output must be a folder or a file that ends in .npz, found {output}; "
                f"try {output.with_suffix('.npz')}"
            )

    # The shards of all outputs are beside the first one.
    checked = [
        Output(path, kind="file" if path.suffix else "new folder", is_own=is_samples) for path in outputs
    ]
    parts = Output(parts_folder(outputs[0]), kind="folder", is_own=is_parts)
    require_outputs([*checked, parts], [checkpoint])
