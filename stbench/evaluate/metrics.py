"""The metrics of a run's evaluation: torch-fidelity's formulas on features extracted once.

Owns the table of metrics and the cache of reference statistics. Images are uint8 tensors in memory, in one
process. Every random draw inside a metric has a fixed seed. Scores of image files against an external
reference are in `scores`.
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
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from stbench.config.spec import EvalSpec
from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.core.registry import suggest
from stbench.data.dataset import Dataset
from stbench.evaluate.extractors import (
    EXTRACTOR_BATCH,
    extract_features,
    extractor_hash,
    get_extractor,
    tensors_hash,
)
from stbench.evaluate.fdr6 import FDR_METRICS
from stbench.evaluate.mind import monge_distance
from stbench.evaluate.registered_metrics import Samples, metric_descriptions, registered_formulas

BASIC_METRICS = ("fid", "fid_all", "is", "accuracy")
"""Metrics computed at every evaluation point."""
EXTRA_METRICS = ("kid", "mind", "precision", "recall", "nn_distance", "nn_distance_heldout")
"""Costlier metrics, which a run may compute at its last evaluation point only."""

MAX_PIXEL_VALUES = 3 * 64 * 64
"""Largest image, in values, for the pixel distances: in larger images they are slow and say little."""
MIN_IMAGES = 10
"""Fewest images for the inception score: each of its ten splits needs one."""

METRICS = {
    "fid": "Frechet distance of features to the training images; lower is better",
    "fid_all": "Frechet distance to all images, held-out images included; lower is better",
    "is": "inception score: exp of the mean KL divergence of predictions from their average, 10 splits; "
    "higher is better",
    "accuracy": "share of samples that the extractor's classifier assigns to the requested label",
    "kid": "kernel distance: unbiased cubic MMD of features to the training images; lower is better",
    "mind": "sliced 2-Wasserstein distance of features to the training images: 3 x dimension x mean of W2^2 "
    "over 1,000 directions; lower is better",
    "precision": "share of samples inside the training images' 3-nearest-neighbour balls",
    "recall": "share of training images inside the samples' 3-nearest-neighbour balls",
    "nn_distance": "mean distance of a sample to its nearest training image, RMS over pixels in [0,1]; "
    "for images up to 64x64",
    "nn_distance_heldout": "nn_distance of the held-out images: samples far below it have been memorised",
}
"""Every built-in metric and its description."""


def feature_statistics(features: Tensor) -> dict[str, Tensor]:
    """Return the features (N,D) with their mean `mu` (D,) and covariance `sigma` (D,D), all float64."""
    found = fid_features_to_statistics(features)
    return {"features": features, **{key: torch.from_numpy(found[key]) for key in ("mu", "sigma")}}


def reference_statistics(
    dataset: Dataset,
    reference: str,
    extractor: nn.Module,
    *,
    cache_dir: Path,
    device: torch.device | str = "cpu",
    batch: int = EXTRACTOR_BATCH,
) -> dict[str, Tensor]:
    """Return the `feature_statistics` of a reference set, cached by the hash of its images and the extractor.

    The extractor runs on `device`; the returned tensors are on the CPU. A cache file that is missing,
    unreadable or modified is recomputed.
    """
    images = dataset.references[reference]()
    return image_statistics(images, extractor, cache_dir=cache_dir, device=device, batch=batch)


def image_statistics(
    images: Tensor,
    extractor: nn.Module,
    *,
    cache_dir: Path,
    device: torch.device | str = "cpu",
    batch: int = EXTRACTOR_BATCH,
) -> dict[str, Tensor]:
    """Return the `feature_statistics` of uint8 images (N,c,H,W); as `reference_statistics`."""
    key = hashlib.sha256(f"{tensors_hash([images])}{extractor_hash(extractor)}".encode()).hexdigest()
    path = cache_dir / f"reference-{key[:16]}.safetensors"
    found = _read_cache(path)
    if found is None:
        found = feature_statistics(extract_features(extractor, images, batch=batch, device=device)[0])
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
    """Compute |mu1-mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), clipped at 0.

    Means are (D,), covariances (D,D), all float64 (Heusel et al. 2017, eq. 6).
    """
    # tr((sigma1 sigma2)^(1/2)) equals tr((a sigma2 a)^(1/2)) with a = sigma1^(1/2). Both roots are of
    # symmetric matrices, so two symmetric eigendecompositions replace a general matrix square root.
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0.0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2.0 * cross
    return max(0.0, float(distance))


def kernel_distance(features: Tensor, references: Tensor, subsets: int = 10) -> float:
    """Compute the KID of features (N,D) to references (M,D): the unbiased cubic-kernel MMD, in float32.

    The mean over seeded subsets of up to 1,000 rows (Binkowski et al. 2018).
    """
    # The usual 100 subsets would overlap almost completely in sets as small as the digits, at ten times the
    # cost. float64 takes twice the time and agrees to five digits.
    size = min(1000, len(features), len(references))
    found = kid_features_to_metric(
        features.float(), references.float(), kid_subsets=subsets, kid_subset_size=size, verbose=False
    )
    return found[KEY_METRIC_KID_MEAN]


def nearest_distance(images: Tensor, references: Tensor) -> float:
    """Return the mean distance of uint8 images (N,c,H,W) to their nearest reference image (M,c,H,W).

    The distance is the RMS over pixel values in [0,1].
    """
    a, b = (x.flatten(1).double() / 255.0 for x in (images, references))
    nearest = torch.cat([torch.cdist(part, b).amin(1) for part in torch.split(a, 250)])
    return float(nearest.mean()) / math.sqrt(a.shape[1])


def _require_computable(names: Sequence[str], count: int) -> None:
    """Raise UserError for an unknown or ambiguous metric, or too few images."""
    registered = metric_descriptions()
    for name in names:
        if name in (METRICS | FDR_METRICS) and name in registered:
            raise UserError(f"metric '{name}' exists already; rename the one of the plug-in")
        if name not in METRICS and name not in registered:
            raise UserError(f"unknown metric '{name}'{suggest(name, [*METRICS, *registered])}")
    if count < MIN_IMAGES:
        raise UserError(f"expected at least {MIN_IMAGES} images, found {count}; use --set eval.samples=1000")


def compute_metrics(
    images: Tensor,
    dataset: Dataset,
    names: Sequence[str],
    *,
    cache_dir: Path,
    labels: Tensor | None = None,
    device: torch.device | str = "cpu",
    extractor: nn.Module | None = None,
    batch: int = EXTRACTOR_BATCH,
    seed: int = 0,
) -> dict[str, float]:
    """Compute the metrics `names` of uint8 images (N,c,H,W), in the given order.

    `labels` (N,) are the classes the images were generated for. `extractor`, by default that of the data set,
    runs on `device` on `batch` images at a time, the formulas on the CPU. MIND draws from `seed`. Metrics
    that do not apply are left out: "accuracy" without labels or if the extractor has other classes than the
    data set, "is" if it does not classify, "fid_all" if the data set has no reference "all", "nn_distance*"
    for images larger than 64x64. Raises UserError for an unknown name and for fewer than MIN_IMAGES images.
    """
    _require_computable(names, len(images))

    # Extract the features of the samples once.
    images = images.cpu()
    network = get_extractor(dataset.extractor) if extractor is None else extractor
    features, logits = extract_features(network, images, batch=batch, device=device)

    # Formulas, evaluated only for the requested names.
    @cache
    def statistics_of(reference: str) -> dict[str, Tensor]:
        return reference_statistics(
            dataset, reference, network, cache_dir=cache_dir, device=device, batch=batch
        )

    compute = _feature_formulas(
        features, logits, statistics_of, has_all="all" in dataset.references, seed=seed
    )
    if images[0].numel() <= MAX_PIXEL_VALUES:
        compute["nn_distance"] = lambda: nearest_distance(images, dataset.train_images())
        compute["nn_distance_heldout"] = lambda: nearest_distance(
            dataset.heldout_images(), dataset.train_images()
        )
    if labels is not None and logits.shape[1] == dataset.classes:
        compute["accuracy"] = lambda: float((logits.argmax(1) == labels.cpu()).double().mean())
    host_labels = None if labels is None else labels.cpu()
    compute |= registered_formulas(Samples(images, host_labels, features, logits, statistics_of))
    return {name: compute[name]() for name in names if name in compute}


def try_metrics(
    dataset: Dataset, settings: EvalSpec, extractor: nn.Module, cache_dir: Path, device: torch.device
) -> None:
    """Compute the metrics of plug-ins on a few training images, so that a faulty one fails before training.

    Raises UserError as `compute_metrics` does.
    """
    if settings.metrics:
        compute_metrics(
            dataset.train_images()[:MIN_IMAGES],
            dataset,
            settings.metrics,
            cache_dir=cache_dir,
            labels=torch.arange(MIN_IMAGES) % dataset.classes,
            device=device,
            extractor=extractor,
            batch=settings.extractor_batch,
        )


def _feature_formulas(
    features: Tensor,
    logits: Tensor,
    statistics_of: Callable[[str], dict[str, Tensor]],
    *,
    has_all: bool,
    seed: int,
) -> dict[str, Callable[[], float]]:
    """The formulas on features (N,D) and logits (N,K) by name, each computed when it is called."""
    own = feature_statistics(features)

    def distance(reference: str) -> float:
        other = statistics_of(reference)
        return frechet_distance(own["mu"], own["sigma"], other["mu"], other["sigma"])

    @cache
    def precision_recall() -> dict[str, float]:
        # Not adm_formulas.precision_recall: torch-fidelity averages in float32 and compares distances instead
        # of their squares, and recorded runs contain its digits.
        return prc_features_to_metric(features, statistics_of("train")["features"], verbose=False)

    compute: dict[str, Callable[[], float]] = {
        "fid": lambda: distance("train"),
        "kid": lambda: kernel_distance(features, statistics_of("train")["features"]),
        "mind": lambda: monge_distance(features, statistics_of("train")["features"], seed=seed),
        "precision": lambda: precision_recall()[KEY_METRIC_PRECISION],
        "recall": lambda: precision_recall()[KEY_METRIC_RECALL],
    }
    # Formulas that only some data sets and extractors have.
    if has_all:
        compute["fid_all"] = lambda: distance("all")
    if logits.shape[1]:
        compute["is"] = lambda: isc_features_to_metric(logits)[KEY_METRIC_ISC_MEAN]
    return compute
