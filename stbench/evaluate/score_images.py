"""Score a set of image files against a reference, and write the scores as JSON next to the images."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from stbench.core.files import atomic_write
from stbench.evaluate.feature_networks import FeatureNetwork
from stbench.evaluate.image_sets import ImageSet, open_images
from stbench.evaluate.progress import ProgressBar, no_progress
from stbench.evaluate.reference import load_reference, reference_size
from stbench.evaluate.sample_parts import read_settings
from stbench.evaluate.scores import ScoreReport, compute_scores, require_comparable, require_spaces
from stbench.evaluate.statistics import measure_images

SCORES_SCHEMA = 1
"""Version of the files that contain scores."""
LARGEST_SCORES = 1 << 24
"""Bytes of a file that may contain scores."""


def open_samples(samples: Path, *references: Path | None) -> ImageSet:
    """Open the images at `samples` and check, before anything is measured, that the references fit them.

    Raises UserError if any is missing or unreadable, for too few images, or if their sizes differ.
    """
    images = open_images(samples)
    for reference in references:
        if reference is not None:
            require_comparable(
                str(samples),
                count=len(images),
                size=images.size,
                reference=str(reference),
                reference_size=reference_size(reference),
            )
    return images


def score_images(
    samples: Path,
    reference: Path,
    networks: Sequence[FeatureNetwork],
    output: Path | None = None,
    *,
    batch: int = 64,
    device: torch.device | str = "cpu",
    adm_fp16: bool = False,
    validation: Path | None = None,
    ratio: Sequence[str] = (),
    progress: ProgressBar = no_progress,
) -> tuple[ScoreReport, Path]:
    """Measure samples and reference, compute all scores and write them; returns them and the JSON file.

    With `validation`, real images outside the reference or their statistics, FDr over `ratio` is among them.

    The networks must be on `device`. Without `output` the file is `<samples>.json`, or
    `<samples>-<digest>.json` if the former contains scores against another reference. Raises UserError as
    `open_samples` does, and if the disk is full.
    """
    images = open_samples(samples, reference, validation)

    # Measure.
    with progress("reference", None) as report:
        real = load_reference(reference, networks, batch=batch, device=device, report=report)
    other = None
    if validation is not None:
        with progress("validation", None) as report:
            other = load_reference(validation, networks, batch=batch, device=device, report=report)
        for side in (real, other):
            require_spaces(side, ratio)
    with progress("samples", None) as report:
        measured = measure_images(images, networks, batch=batch, device=device, report=report)
    scores = compute_scores(measured, real, device, adm_fp16=adm_fp16, validation=other, ratio=ratio)

    # Record how the samples were made, if `stbench sample` made them.
    settings = read_settings(samples)
    unknown = "not known: the samples are not from `stbench sample`"
    protocol = {
        **scores.protocol,
        "networks": {space: network.label for network in networks for space in network.spaces},
        "rounding": (settings or {}).get("rounding", unknown),
        "sampling": settings,
    }
    scores = ScoreReport(scores.metrics, protocol, scores.warnings)
    target = output or scores_file(samples, real.digest)
    _write_scores(target, scores)
    return scores, target


def scores_file(samples: Path, digest: str) -> Path:
    """Return the file for scores against the reference with this digest: other files are kept."""
    samples = samples.resolve() if samples.name in ("", "..") else samples  # as in `stbench evaluate .`
    name = samples.name.removesuffix(".npz")
    endings = chain(["", f"-{digest[:8]}"], (f"-{digest[:8]}-{number}" for number in count(2)))
    for file in (samples.parent / f"{name}{ending}.json" for ending in endings):
        if not os.path.lexists(file) or _reference_digest(file) == digest:
            return file
    raise AssertionError("unreachable: the names never end")


def is_scores(path: Path) -> bool:
    """Whether a file contains scores."""
    return _reference_digest(path) is not None


def _reference_digest(path: Path) -> str | None:
    """The hash of the reference behind a file of scores; None for any other file."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_SCORES:
        return None
    try:
        content = json.loads(path.read_text())
        return str(content["protocol"]["reference_sha256"]) if "metrics" in content else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write_scores(target: Path, scores: ScoreReport) -> None:
    content: dict[str, Any] = {
        "schema": SCORES_SCHEMA,
        "metrics": dict(scores.metrics),
        "warnings": scores.warnings,
        "protocol": dict(scores.protocol),
    }
    atomic_write(target, json.dumps(content, indent=1) + "\n")
