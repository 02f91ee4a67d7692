"""Scores of a set of images against a reference, named with their sample count: FID-50K is not FID-10K."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

from stbench.core.errors import UserError
from stbench.evaluate.adm_formulas import inception_score_in_order, precision_recall
from stbench.evaluate.metrics import MIN_IMAGES, frechet_distance, kernel_distance
from stbench.evaluate.reference import Reference
from stbench.evaluate.statistics import ImageStatistics

SCORES = {
    "fid": "Frechet distance of Inception's pool features (2048), as in ADM; lower is better",
    "sfid": "Frechet distance of mixed_6/conv's first 7 channels (2023), as in ADM; lower is better",
    "is_adm": "inception score as in ADM: no bias, splits of 5000 in file order; higher is better",
    "is_torch_fidelity": "inception score as in torch-fidelity: 10 shuffled splits; higher is better",
    "precision": "share of samples in the 3-nearest-neighbour balls of up to 10,000 reference images",
    "recall": "share of those reference images in the samples' 3-nearest-neighbour balls",
    "kid": "unbiased cubic MMD of pool features, 100 subsets of up to 1,000; lower is better",
    "fd_dinov2": "Frechet distance of DINOv2's class token; lower is better",
}
"""Every score of photographs, without the sample count in its name, and its description."""
FRECHET_SPACES = {"fid": "pool", "sfid": "spatial", "fd_dinov2": "dino"}
"""Frechet distances and their feature spaces."""


@dataclass(frozen=True)
class ScoreReport:
    """Scores by full name, the protocol behind them, and warnings for the reader."""

    metrics: Mapping[str, float]
    protocol: Mapping[str, Any]
    warnings: list[str]


def score_name(score: str, count: int) -> str:
    """Append the number of samples to a score's name.

    "fid", 50000 -> "fid50k"; "is_adm", 1234 -> "is_adm1234"; a name that ends in a digit gets an underscore.
    """
    number = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    return f"{score}_{number}" if score[-1].isdigit() else f"{score}{number}"


def require_comparable(
    samples: str,
    *,
    count: int,
    size: tuple[int, int],
    reference: str,
    reference_size: tuple[int, int] | None,
) -> None:
    """Raise UserError for too few images, or for a size (H,W) other than the reference's if that is known."""
    if reference_size not in (None, size):
        (h, w), (rh, rw) = size, reference_size  # type: ignore[misc]
        raise UserError(
            f"expected samples and reference of one size, found {samples} of {w}x{h} and {reference} of "
            f"{rw}x{rh}; name a reference of {w}x{h}"
        )
    if count < MIN_IMAGES:
        raise UserError(f"expected at least {MIN_IMAGES} images in {samples}, found {count}")


def compute_scores(
    samples: ImageStatistics,
    reference: Reference,
    device: torch.device | str = "cpu",
    *,
    adm_fp16: bool = False,
) -> ScoreReport:
    """Compute all scores that the samples and the reference allow; precision and recall on `device`.

    With `adm_fp16`, the distances of precision and recall are rounded as in ADM's evaluator. Scores that
    cannot be computed are named in the warnings. Raises UserError if the images differ in size.
    """
    require_comparable(
        samples.name,
        count=samples.count,
        size=samples.size,
        reference=reference.name,
        reference_size=reference.size,
    )
    found: dict[str, float] = {}
    warnings = []

    # Frechet distances in every feature space that both sides have.
    for name, space in FRECHET_SPACES.items():
        if space in samples.moments and space in reference.moments:
            found[name] = frechet_distance(*samples.moments[space], *reference.moments[space])
            warnings += _singular_warnings(name, space, samples, reference)

    # Inception scores need the samples' logits only.
    if len(samples.logits):
        found["is_adm"] = inception_score_in_order(samples.logits)
        found["is_torch_fidelity"] = isc_features_to_metric(samples.logits)[KEY_METRIC_ISC_MEAN]

    # Scores that need single features of both sides.
    if reference.features is not None and len(samples.features):
        found["precision"], found["recall"] = precision_recall(
            samples.features.to(device), reference.features.to(device), fp16=adm_fp16
        )
        found["kid"] = kernel_distance(samples.features, reference.features, subsets=100)
    elif len(samples.features):
        warnings.append(f"{reference.name} has no arr_0: precision, recall and KID are left out")

    missing = [n for n, s in FRECHET_SPACES.items() if s in samples.moments and s not in reference.moments]
    warnings += [f"{reference.name} has no statistics for {name}: left out" for name in missing]
    # In the order of SCORES, under their full names.
    metrics = {score_name(name, samples.count): found[name] for name in SCORES if name in found}
    arithmetic = {"distances": "float16 as in ADM"} if adm_fp16 and "precision" in found else {}
    return ScoreReport(metrics, _protocol(samples, reference) | arithmetic, warnings)


def _singular_warnings(name: str, space: str, samples: ImageStatistics, reference: Reference) -> list[str]:
    """Return a warning for each side with too few images for a covariance of full rank."""
    dimension = len(samples.moments[space][0])
    real = reference.other_counts.get(space, reference.count)
    return [
        f"{name}: {count} images in {where} are no more than the {dimension} features, so the covariance is "
        f"singular and the distance far too large; compare it only at this number of images"
        for where, count in ((samples.name, samples.count), (reference.name, real))
        if count is not None and count <= dimension  # N rows span N-1 directions
    ]


def _protocol(samples: ImageStatistics, reference: Reference) -> dict[str, Any]:
    return {
        "samples": samples.name,
        "samples_sha256": samples.digest,
        "count": samples.count,
        "size": list(samples.size),
        "reference": reference.name,
        "reference_sha256": reference.digest,
        "reference_count": reference.count,
        "reference_rows": 0 if reference.features is None else len(reference.features),
        "reference_counts_by_space": dict(reference.other_counts),
    }
