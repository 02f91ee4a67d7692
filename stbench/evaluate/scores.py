"""Scores of a set of images against a reference, named with their sample count: FID-50K is not FID-10K."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

from stbench.core.errors import UserError
from stbench.evaluate.adm_formulas import inception_score_in_order, precision_recall
from stbench.evaluate.fdr import mean_ratio, ratio_name
from stbench.evaluate.metrics import MIN_IMAGES, frechet_distance, kernel_distance
from stbench.evaluate.mind import monge_distance
from stbench.evaluate.ratio_networks import ratio_space
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
    "mind": "sliced 2-Wasserstein distance of pool features, 3 x 2048 x mean of W2^2 over 1,000 directions; "
    "lower is better",
    "fd_dinov2": "Frechet distance of DINOv2's class token; lower is better",
    "fdr": "mean over the extractors of --fdr: Frechet distance of the samples / that of --validation; "
    "lower is better",
    "fdr6": "fdr of exactly the six published extractors; lower is better",
}
"""Every score of photographs, without the sample count in its name, and its description."""
PAIRS = "mind_pairs"
"""Entry of the protocol: the number of rows of either side that MIND compares, which is also in its name."""
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


def full_names(protocol: Mapping[str, Any]) -> dict[str, str]:
    """Return the full name of every score: with the number of samples, for MIND with that of the pairs."""
    return {
        name: score_name(name, protocol.get(PAIRS, 0) if name == "mind" else protocol["count"])
        for name in SCORES
    }


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


def require_spaces(reference: Reference, ratio: Sequence[str]) -> None:
    """Raise UserError if a reference lacks the statistics of an extractor in `ratio`, those of FDr."""
    for name in ratio:
        if ratio_space(name) not in reference.moments:
            raise UserError(
                f"{reference.name} has neither statistics of extractor '{name}' nor images; expected images, "
                f"or a file of `stbench data statistics --fdr`"
            )


def compute_scores(
    samples: ImageStatistics,
    reference: Reference,
    device: torch.device | str = "cpu",
    *,
    adm_fp16: bool = False,
    validation: Reference | None = None,
    ratio: Sequence[str] = (),
) -> ScoreReport:
    """Compute all scores that the samples and the reference allow; precision and recall on `device`.

    With `adm_fp16`, the distances of precision and recall are rounded as in ADM's evaluator. With
    `validation`, FDr is computed over the extractors `ratio`; see `require_spaces`. Scores that cannot
    be computed are named in the warnings. Raises UserError if the images differ in size.
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

    # Their ratios to those of the validation images.
    if validation is not None:
        name, spaces = ratio_name(ratio), [ratio_space(extractor) for extractor in ratio]
        found[name] = _mean_ratio(samples, reference, validation, spaces)
        for extractor, space in zip(ratio, spaces, strict=True):
            warnings += _singular_warnings(f"{name}, {extractor}", space, samples, reference, validation)

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
        found["mind"] = monge_distance(samples.features.to(device), reference.features.to(device))
    elif len(samples.features):
        warnings.append(f"{reference.name} has no arr_0: precision, recall, KID and MIND are left out")

    missing = [n for n, s in FRECHET_SPACES.items() if s in samples.moments and s not in reference.moments]
    warnings += [f"{reference.name} has no statistics for {name}: left out" for name in missing]
    # In the order of SCORES, under their full names.
    protocol = _protocol(samples, reference)
    if validation is not None:
        protocol |= _ratio_protocol(validation, ratio)
    if adm_fp16 and "precision" in found:
        protocol["distances"] = "float16 as in ADM"
    metrics = {full: found[name] for name, full in full_names(protocol).items() if name in found}
    return ScoreReport(metrics, protocol, warnings)


def _mean_ratio(
    samples: ImageStatistics, reference: Reference, validation: Reference, spaces: Sequence[str]
) -> float:
    """Return the mean over feature spaces of FD(samples, reference) / FD(validation, reference)."""
    distances, real = (
        [frechet_distance(*side.moments[space], *reference.moments[space]) for space in spaces]
        for side in (samples, validation)
    )
    return mean_ratio(distances, real)


def _singular_warnings(name: str, space: str, samples: ImageStatistics, *references: Reference) -> list[str]:
    """Return a warning for each side with too few images for a covariance of full rank."""
    dimension = len(samples.moments[space][0])
    real = [(side.name, side.other_counts.get(space, side.count)) for side in references]
    return [
        f"{name}: {count} images in {where} are no more than the {dimension} features, so the covariance is "
        f"singular and the distance far too large; compare it only at this number of images"
        for where, count in ((samples.name, samples.count), *real)
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
        PAIRS: 0 if reference.features is None else min(len(samples.features), len(reference.features)),
    }


def _ratio_protocol(validation: Reference, ratio: Sequence[str]) -> dict[str, Any]:
    """Return what the protocol records of FDr."""
    return {
        "fdr": list(ratio),
        "validation": validation.name,
        "validation_sha256": validation.digest,
        "validation_count": validation.count,
    }
