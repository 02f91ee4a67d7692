"""`stbench sample`: check the options, generate the images, print where they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stbench.cli.progress import progress_bar
from stbench.core.device import pick_devices
from stbench.core.errors import UserError
from stbench.evaluate.sample_job import SampleRequest, sample_images
from stbench.evaluate.sample_model import ModelLocation


def model_location(
    run: Path | None,
    checkpoint: Path | None,
    *,
    vae: str | None = None,
    original: str | None = None,
    heads: int | None = None,
    weights: str = "ema",
) -> ModelLocation:
    """Turn the options into the location of a network.

    Raises UserError unless exactly one of run and checkpoint is given, and for options of the other one.
    """
    if (run is None) == (checkpoint is None):
        found = "neither" if run is None else "both"
        raise UserError(f"expected a run folder or --checkpoint FILE, found {found}; give one of them")
    if checkpoint is not None:
        if weights not in ("ema", "raw"):
            raise UserError(f"--weights must be ema or raw, found '{weights}'; the default is ema")
        return ModelLocation(checkpoint, True, vae, original, heads, weights)  # type: ignore[arg-type]
    if (original, heads, weights) != (None, None, "ema"):
        raise UserError("--original, --heads and --weights apply to --checkpoint, not to a run; drop them")
    return ModelLocation(run or Path(), vae=vae)


def sample(location: ModelLocation, request: SampleRequest, outputs: Sequence[Path], device: str) -> None:
    """Generate images into every output and print where they are."""
    for output in outputs:
        if output.suffix not in ("", ".npz"):
            raise UserError(
                f"--output must be a folder or a file that ends in .npz, found {output}; "
                f"try {output.with_suffix('.npz')}"
            )
    if len({output.resolve() for output in outputs}) < len(outputs):
        raise UserError("--output names the same path twice; give each path once")
    sample_images(location, request, outputs, pick_devices(device), progress=progress_bar)
    for output in outputs:
        print(f"{request.count} images: {output}")
