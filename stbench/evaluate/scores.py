"""From the survey of samples and a reference to named numbers: FID-50K and FID-10K are different metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

from stbench.core.errors import UserError
from stbench.evaluate.adm_formulas import inception_score_in_order, precision_recall
from stbench.evaluate.metrics import FEWEST, frechet_distance, kernel_distance
from stbench.evaluate.reference import Reference
from stbench.evaluate.statistics import Survey

SCORES = {
    "fid": "Frechet distance of Inception's pool features (2048), as ADM; lower is better",
    "sfid": "the same of mixed_6/conv's first 7 channels (2023), as ADM; lower is better",
    "is_adm": "inception score as ADM: no bias, splits of 5000 in file order; higher is better",
    "is_torch_fidelity": "inception score as torch-fidelity: 10 splits, shuffled; higher is better",
    "precision": "share of samples in the 3-nearest-neighbour balls of up to 10,000 reference images",
    "recall": "share of those reference images in the samples' 3-nearest-neighbour balls",
    "kid": "unbiased cubic MMD of pool features, 100 subsets of up to 1,000; lower is better",
    "fd_dinov2": "Frechet distance of DINOv2's class token; lower is better",
}
"""Every score of photographs, without the number of samples that stands in its name."""
SPACES = {"fid": "pool", "sfid": "spatial", "fd_dinov2": "dino"}
"""Frechet distances and their feature spaces."""


@dataclass(frozen=True)
class Verdict:
    """Scores by full name, what they rest on, and what should make a reader careful."""

    metrics: Mapping[str, float]
    protocol: Mapping[str, Any]
    warnings: list[str]


def full_name(score: str, count: int) -> str:
    """ "fid", 50000 -> "fid50k"; "is_adm", 1234 -> "is_adm1234"; a name that ends in a digit gets "_"."""
    number = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    return f"{score}_{number}" if score[-1].isdigit() else f"{score}{number}"


def require_comparable(
    samples: str, count: int, size: tuple[int, int], reference: str, expected: tuple[int, int] | None
) -> None:
    """Raise a UserError for too few images, or another size (H,W) than the reference's if that is known."""
    if expected not in (None, size):
        (h, w), (rh, rw) = size, expected  # type: ignore[misc]
        raise UserError(
            f"{samples} holds images of {w}x{h}, {reference} of {rw}x{rh}; expected one size: "
            "name a reference of that size"
        )
    if count < FEWEST:
        raise UserError(f"{samples} holds {count} images; an inception score wants {FEWEST}")


def score(samples: Survey, reference: Reference, device: torch.device | str = "cpu") -> Verdict:
    """All scores that samples and reference allow. Raises UserError if the images differ in size."""
    require_comparable(samples.name, samples.count, samples.size, reference.name, reference.size)
    found: dict[str, float] = {}
    warnings = []
    for name, space in SPACES.items():
        if space in samples.fits and space in reference.fits:
            found[name] = frechet_distance(*samples.fits[space], *reference.fits[space])
            warnings += _caution(name, space, samples, reference)
    if len(samples.logits):
        found["is_adm"] = inception_score_in_order(samples.logits)
        found["is_torch_fidelity"] = isc_features_to_metric(samples.logits)[KEY_METRIC_ISC_MEAN]
    if reference.rows is not None and len(samples.rows):
        rows = [rows.to(device) for rows in (samples.rows, reference.rows)]
        found["precision"], found["recall"] = precision_recall(rows[0], rows[1])
        found["kid"] = kernel_distance(samples.rows, reference.rows, subsets=100)
    elif len(samples.rows):
        warnings.append(f"{reference.name} has no arr_0: no precision, recall and KID")
    missing = [n for n, s in SPACES.items() if s in samples.fits and s not in reference.fits]
    warnings += [f"{reference.name} has no statistics for {name}: left out" for name in missing]
    metrics = {full_name(name, samples.count): found[name] for name in SCORES if name in found}
    return Verdict(metrics, _protocol(samples, reference), warnings)


def _caution(name: str, space: str, samples: Survey, reference: Reference) -> list[str]:
    dimension = len(samples.fits[space][0])
    real = reference.fitted_on.get(space, reference.count)
    return [
        f"{name}: {count} images in {where} are no more than the {dimension} features, so the covariance is "
        f"singular and the distance far too large; compare it only at this number"
        for where, count in ((samples.name, samples.count), (reference.name, real))
        if count is not None and count <= dimension  # N rows span N-1 directions
    ]


def _protocol(samples: Survey, reference: Reference) -> dict[str, Any]:
    rows = 0 if reference.rows is None else len(reference.rows)
    return {
        "samples": samples.name,
        "samples_sha256": samples.digest,
        "count": samples.count,
        "size": list(samples.size),
        "reference": reference.name,
        "reference_sha256": reference.digest,
        "reference_count": reference.count,
        "reference_rows": rows,
        "reference_counts_by_space": dict(reference.fitted_on),
    }
