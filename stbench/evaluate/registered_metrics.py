"""Metrics that plug-ins register in `stbench.core.registry.METRICS`, for the evaluation points of a run.

A metric is a function of `Samples` that returns a number, and the first line of its docstring describes it.
`compare` works with ratios and takes low values as better, so it should be a positive error or distance.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from stbench.core.errors import UserError
from stbench.core.registry import METRICS, lookup, names, plugin_hash


@dataclass(frozen=True)
class Samples:
    """Generated images, their features, and what a metric may compare them with. On the CPU."""

    images: Tensor
    """Generated images, uint8 (N,c,H,W)."""
    labels: Tensor | None
    """Classes that the images were generated for (N,)."""
    features: Tensor
    """Features of the extractor (N,D), float64."""
    logits: Tensor
    """Logits of the extractor (N,K), float64; K is 0 if it does not classify."""
    reference: Callable[[str], Mapping[str, Tensor]]
    """Name of a reference set, such as "train" -> its "features" (M,D), "mu" (D,) and "sigma" (D,D)."""


def registered_formulas(samples: Samples) -> dict[str, Callable[[], float]]:
    """The registered metrics of the samples by name, each computed when it is called."""
    return {name: functools.partial(_compute, name, samples) for name in names(METRICS)}


def _compute(name: str, samples: Samples) -> float:
    """Call a metric. Raises UserError if it fails or does not return a number."""
    try:
        return float(lookup(METRICS, name)(samples))
    except Exception as error:  # the code of a plug-in may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"metric '{name}' failed: {reason}; fix it, or leave it out of eval.metrics"
        ) from error


def metric_hashes(chosen: Sequence[str]) -> dict[str, str]:
    """The start of the sha256 of the plug-in file of each metric: "metric NAME" -> 16 digits."""
    return {f"metric {name}": plugin_hash(lookup(METRICS, name))[:16] for name in chosen}


def metric_descriptions() -> dict[str, str]:
    """The first line of the docstring of each registered metric."""
    described = {name: inspect.getdoc(lookup(METRICS, name)) or "" for name in names(METRICS)}
    return {name: text.partition("\n")[0] for name, text in described.items()}
