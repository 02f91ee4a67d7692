"""Measure blocks: probe, norm, effective rank, and similarity to blocks, teacher and encoders."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stbench.core.backbone import Backbone
from stbench.core.errors import UserError
from stbench.inspect import formulas
from stbench.inspect.features import (
    ImageSet,
    Reduced,
    all_blocks,
    branches,
    heldout_images,
    reduce_tokens,
    spread,
    training_images,
    unlabelled,
)
from stbench.inspect.subjects import Subject
from stbench.models.encoders import EncoderSpec, ImageEncoder, open_encoder

SIMILARITY_IMAGES = 500
"""Held-out images between whose features CKA and CKNNA are computed, as far as there are as many."""
NEIGHBOURS = 10
"""Nearest neighbours of CKNNA, as in REPA."""
FEWEST = 20
"""Fewest held-out images."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    times: tuple[float, ...] = (0.5,)
    """Flow-equivalent times."""
    images: int = 2000
    """Largest number of training images of the probe, and of held-out images."""
    steps: tuple[int, ...] = ()
    """Evaluation points; all for none."""
    scales: tuple[float, ...] = (0.0, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0)
    """Guidance scales of the features; 0 is unconditional and 1 conditional."""
    device: torch.device = torch.device("cpu")


@dataclass(frozen=True)
class Images:
    """The images that all networks on one data set are shown, and their tokens under the encoders."""

    train: ImageSet
    heldout: ImageSet
    similar: Tensor
    """Positions among the held-out images between which similarities are computed."""
    encoded: Mapping[str, Tensor]
    """Encoder name -> mean tokens (S,Dz) of those images."""
    encoders: Mapping[str, ImageEncoder]


def load_images(subject: Subject, settings: Settings, encoders: Sequence[EncoderSpec]) -> Images:
    """Load the images of a subject's data set.

    Raises:
        UserError: If there are too few held-out images, or an encoder does not fit.
    """
    dataset = subject.dataset.to(settings.device)
    if (found := len(dataset.heldout()[1])) < FEWEST:
        raise UserError(
            f"expected at least {FEWEST} held-out images in {dataset.name}, found {found}; use more data"
        )
    heldout = heldout_images(dataset, settings.images)
    similar = spread(len(heldout.rows), SIMILARITY_IMAGES)
    opened = {}
    for spec in encoders:
        encoder = open_encoder(spec, subject.info.tokens, settings.device)
        if isinstance(encoder, ImageEncoder):  # cached tokens are those of training images
            opened[spec.name] = encoder
    pixels = dataset.heldout_images()[heldout.rows[similar]] if opened else torch.empty(0)
    encoded = {name: _encode(encoder, pixels, settings.device) for name, encoder in opened.items()}
    return Images(training_images(dataset, settings.images), heldout, similar, encoded, opened)


def measure(subject: Subject, images: Images, settings: Settings, progress: Progress) -> dict[str, Any]:
    """Measure all chosen points of a subject; the result is one entry of "runs" in the JSON file.

    Raises:
        UserError: If a chosen step has no weights.
    """
    teacher = None if subject.teacher is None else subject.teacher.load().to(settings.device)
    taught: dict[float, list[Tensor]] = {}
    teacher_times = []
    for tau in settings.times:
        if teacher is None:
            break
        progress(f"{subject.label}: teacher, time {tau:g}")
        blocks, taught[tau] = measure_blocks(teacher, subject, images, tau)
        teacher_times.append({"tau": tau, "blocks": blocks})

    points = []
    network: Backbone | None = None
    for step in chosen_steps(subject, settings.steps):
        network = subject.points[step]().to(settings.device)
        times = []
        for tau in settings.times:
            progress(f"{subject.label}: step {step}, time {tau:g}")
            blocks, pooled = measure_blocks(network, subject, images, tau)
            entry = {"tau": tau, "blocks": blocks, "between_blocks": similarity(pooled, pooled)}
            if tau in taught:
                entry["to_teacher"] = similarity(pooled, taught[tau])
            entry["to_encoders"] = {
                name: similarity(pooled, [tokens]) for name, tokens in images.encoded.items()
            }
            times.append(entry)
        points.append({"step": step, "images": step * subject.images_per_step, "times": times})

    assert network is not None
    progress(f"{subject.label}: guidance")
    return {
        "path": str(subject.path),
        "name": subject.name,
        "label": subject.label,
        "backbone": subject.backbone,
        "dataset": subject.dataset.name,
        "seed": subject.seed,
        "depth": subject.info.depth,
        "train_images": len(images.train.rows),
        "heldout_images": len(images.heldout.rows),
        "similarity_images": len(images.similar),
        "points": points,
        "teacher": subject.teacher
        and {"name": subject.teacher.name, "block": subject.teacher.block, "times": teacher_times},
        "guidance": measure_guidance(subject, teacher if teacher is not None else network, images, settings),
    }


def chosen_steps(subject: Subject, steps: Sequence[int]) -> list[int]:
    """The steps to inspect. Raises UserError for one without weights."""
    for step in steps:
        if step not in subject.points:
            known = ", ".join(map(str, sorted(subject.points)))
            raise UserError(f"{subject.path} has no weights of step {step}; it has those of {known}")
    return sorted(steps or subject.points)


def measure_blocks(
    network: Backbone, subject: Subject, images: Images, tau: float
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Measure every block without labels; also return the pooled features (S,D) for similarities."""
    found = []
    for part in (images.train, images.heldout):
        labels = unlabelled(network.info, len(part.rows), part.latents.device)
        found.append(all_blocks(network, subject.objective, part, tau, labels))
    rows = []
    for block, (train, heldout) in enumerate(zip(*found, strict=True)):
        probe = formulas.linear_probe(
            train.pooled, images.train.labels, heldout.pooled, images.heldout.labels, network.info.classes
        )
        rows.append(
            {
                "block": block,
                "probe": probe.accuracy,
                "probe_error": probe.error,
                "probe_train": probe.train_accuracy,
                **_spectrum(heldout),
            }
        )
    return rows, [heldout.pooled[images.similar] for heldout in found[1]]


def similarity(a: Sequence[Tensor], b: Sequence[Tensor]) -> dict[str, list[list[float | None]]]:
    """CKA and CKNNA between every feature (S,D) of `a` (rows) and of `b` (columns)."""
    k = min(NEIGHBOURS, len(a[0]) - 1)
    return {
        "cka": [[_finite(formulas.linear_cka(x, y)) for y in b] for x in a],
        "cknna": [[_finite(formulas.cknna(x, y, k)) for y in b] for x in a],
    }


def measure_guidance(
    subject: Subject, network: Backbone, images: Images, settings: Settings
) -> dict[str, Any] | None:
    """The guided features f_u + w (f_c - f_u) of the teacher, or of the last weights without a teacher.

    Held-out images with their true labels; None without a null label. "difference" is f_c - f_u, the limit of
    a large scale: class separation does not depend on the length of a feature.
    """
    if not network.info.null_label:
        return None
    teacher = subject.teacher
    block = teacher.block if teacher is not None else None
    block = network.info.depth // 2 if block is None else block
    times = []
    for tau in settings.times:
        conditional, unconditional = branches(network, subject.objective, images.heldout, tau, block)
        labels, difference = images.heldout.labels, conditional - unconditional
        scales = [
            {"scale": scale, **_guided(unconditional + scale * difference, labels)}
            for scale in settings.scales
        ]
        times.append({"tau": tau, "scales": scales, "difference": _guided(difference, labels)})
    return {
        "network": teacher.name if teacher is not None else "own",
        "block": block,
        "used": teacher.guidance if teacher is not None else None,
        "times": times,
    }


def _guided(tokens: Tensor, labels: Tensor) -> dict[str, float | None]:
    reduced = reduce_tokens([tokens])
    separation = formulas.class_separation(reduced.pooled, labels)
    tokenwise = formulas.class_separation(tokens.flatten(1), labels)
    return {"separation": _finite(separation), "separation_tokens": _finite(tokenwise), **_spectrum(reduced)}


def _spectrum(reduced: Reduced) -> dict[str, float | None]:
    rank = formulas.effective_rank(reduced.covariance)
    return {"norm": _finite(reduced.norm), "effective_rank": _finite(rank)}


def _finite(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return value if math.isfinite(value) else None


@torch.no_grad()
def _encode(encoder: ImageEncoder, pixels: Tensor, device: torch.device) -> Tensor:
    parts = [encoder.tokens(part.to(device)).double().mean(1) for part in torch.split(pixels, 64)]
    return torch.cat(parts)
