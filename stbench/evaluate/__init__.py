"""Draw images from a network, measure them with torch-fidelity, and name the protocol of it."""

from __future__ import annotations

from stbench.evaluate.extractors import DigitsClassifier, DigitsExtractor, extract, get_extractor
from stbench.evaluate.generate import draw_labels, generate, grid, image_noise, validation_loss
from stbench.evaluate.metrics import (
    BASIC,
    EXTRAS,
    METRICS,
    frechet_distance,
    kernel_distance,
    metrics,
    nearest_distance,
    reference_statistics,
    statistics,
)
from stbench.evaluate.points import Protocol, protocol_of

__all__ = [
    "BASIC",
    "EXTRAS",
    "METRICS",
    "DigitsClassifier",
    "DigitsExtractor",
    "Protocol",
    "draw_labels",
    "extract",
    "frechet_distance",
    "generate",
    "get_extractor",
    "grid",
    "image_noise",
    "kernel_distance",
    "metrics",
    "nearest_distance",
    "protocol_of",
    "reference_statistics",
    "statistics",
    "validation_loss",
]
