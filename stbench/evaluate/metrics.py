"""The metrics: torch-fidelity's formulas on features extracted once; cached reference statistics.

Images are measured as uint8 in memory, in one process; every draw inside a metric has its own seed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.core.registry import suggest
from stbench.data.dataset import Dataset
from stbench.evaluate.extractors import extract, extractor_hash, get_extractor, tensors_hash

BASIC = ("fid", "fid_all", "is", "accuracy")
"""Metrics of every evaluation point."""
EXTRAS = ("kid", "precision", "recall", "nn_distance", "nn_distance_heldout")
"""Metrics that a preset may leave to the last point."""

PIXELS = 3 * 64 * 64
"""Values of an image up to which nearest neighbours are looked for: beyond, they cost much and say little."""
FEWEST = 10
"""Images below which the inception score's ten splits are empty."""

METRICS = {
    "fid": "Frechet distance of features to the training images; lower is better",
    "fid_all": "the same to all images, held-out ones included",
    "is": "inception score: exp of the mean KL of predictions to their average, 10 splits; higher is better",
    "accuracy": "share of samples that the extractor's classifier gives the label they were asked for",
    "kid": "kernel distance: unbiased cubic MMD of features to the training images; lower is better",
    "precision": "share of samples inside the training images' 3-nearest-neighbour balls",
    "recall": "share of training images inside the samples' 3-nearest-neighbour balls",
    "nn_distance": "mean distance of a sample to its nearest training image, RMS over pixels in [0,1]; "
    "of images up to 64x64",
    "nn_distance_heldout": "the same for held-out images: samples far below it have been memorised",
}
"""Every metric and what it means."""


def statistics(features: Tensor) -> dict[str, Tensor]:
    """The features (N,D) with their mean (D,) and covariance (D,D), all float64."""
    found = fid_features_to_statistics(features)
    return {"features": features, **{key: torch.from_numpy(found[key]) for key in ("mu", "sigma")}}


def reference_statistics(
    dataset: Dataset,
    reference: str,
    extractor: FeatureExtractorBase,
    cache_dir: Path,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """`statistics` of a reference set, computed once and kept under the hash of images and extractor.

    The features are taken on `device`; everything returned is on the host.

    A cache file that is missing, unreadable or changed is made anew.
    """
    images = dataset.references[reference]()
    key = hashlib.sha256(f"{tensors_hash([images])}{extractor_hash(extractor)}".encode()).hexdigest()
    path = cache_dir / f"reference-{key[:16]}.safetensors"
    found = _read_cache(path)
    if found is None:
        found = statistics(extract(extractor, images, device=device)[0])
        atomic_write(path, save(found, {"sha256": tensors_hash(list(found.values()))}))
    return found


def _read_cache(path: Path) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get("sha256")
            found = {key: file.get_tensor(key) for key in ("features", "mu", "sigma")}
    except (OSError, SafetensorError):
        return None
    return found if tensors_hash(list(found.values())) == expected else None


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """|mu1-mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), clipped at 0 (Heusel et al. 2017, eq. 6).

    The trace of the root is that of the symmetric root of a sigma2 a with a = sigma1^(1/2), so two symmetric
    eigendecompositions in float64 are enough.
    """
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0.0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2.0 * cross
    return max(0.0, float(distance))


def nearest_distance(images: Tensor, references: Tensor) -> float:
    """Mean over uint8 images of the distance to the nearest reference: RMS over pixels in units of [0,1]."""
    a, b = (x.flatten(1).double() / 255.0 for x in (images, references))
    nearest = torch.cat([torch.cdist(part, b).amin(1) for part in torch.split(a, 250)])
    return float(nearest.mean()) / math.sqrt(a.shape[1])


def metrics(
    images: Tensor,
    dataset: Dataset,
    names: Sequence[str],
    cache_dir: Path,
    labels: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """The metrics `names` of uint8 images (N,c,H,W); `labels` (N,) are what they were asked to show;
    the extractor works on `device`, the formulas on the host.

    "accuracy" is left out without labels and where the extractor's classes are not the data set's,
    "nn_distance*" for images of more than 64x64 pixels. Raises UserError for an unknown name and for fewer
    than 10 images.
    """
    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric '{name}'{suggest(name, METRICS)}")
    if len(images) < FEWEST:
        raise UserError(
            f"expected at least {FEWEST} images, found {len(images)}; use --set eval.samples=1000"
        )
    images = images.cpu()
    extractor = get_extractor(dataset.extractor)
    features, logits = extract(extractor, images, device=device)
    own = statistics(features)

    def distance(reference: str) -> float:
        other = reference_statistics(dataset, reference, extractor, cache_dir, device)
        return frechet_distance(own["mu"], own["sigma"], other["mu"], other["sigma"])

    def main_features() -> Tensor:
        return reference_statistics(dataset, "train", extractor, cache_dir, device)["features"]

    @cache
    def precision_recall() -> dict[str, float]:
        return prc_features_to_metric(features, main_features(), verbose=False)

    compute: dict[str, Callable[[], float]] = {
        "fid": lambda: distance("train"),
        "fid_all": lambda: distance("all"),
        "is": lambda: isc_features_to_metric(logits)[KEY_METRIC_ISC_MEAN],
        "kid": lambda: kernel_distance(features, main_features()),
        "precision": lambda: precision_recall()[KEY_METRIC_PRECISION],
        "recall": lambda: precision_recall()[KEY_METRIC_RECALL],
    }
    if images[0].numel() <= PIXELS:
        compute["nn_distance"] = lambda: nearest_distance(images, dataset.train_images())
        compute["nn_distance_heldout"] = lambda: nearest_distance(
            dataset.heldout_images(), dataset.train_images()
        )
    if labels is not None and logits.shape[1] == dataset.classes:
        compute["accuracy"] = lambda: float((logits.argmax(1) == labels.cpu()).double().mean())
    return {name: compute[name]() for name in names if name in compute}


def kernel_distance(features: Tensor, references: Tensor, subsets: int = 10) -> float:
    """KID: mean over seeded subsets of up to 1,000 rows of the unbiased cubic-kernel MMD, in float32.

    The usual 100 subsets would overlap almost wholly in sets of the digits' size, at ten times the cost.
    """
    size = min(1000, len(features), len(references))
    # float64 costs twice the time and agrees to five digits.
    found = kid_features_to_metric(
        features.float(), references.float(), kid_subsets=subsets, kid_subset_size=size, verbose=False
    )
    return found[KEY_METRIC_KID_MEAN]
