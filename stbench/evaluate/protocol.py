"""The evaluation protocol: what must agree before two numbers may stand in one table."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from stbench.data import Dataset
from stbench.evaluate.extractors import extractor_hash, get_extractor, tensors_hash
from stbench.latents import ROUNDING


@dataclass(frozen=True)
class Protocol:
    """Every choice that moves a metric and is not the network; guidance is a column of the tables instead."""

    reference: str
    """Main reference set: data set, name and hash of its images."""
    extractor: str
    """Name and hash of its weights."""
    samples: int
    labels: str
    """ "balanced" or "random"."""
    seed: int
    sampler: str
    steps: int
    channels: int | None
    """Leading latent channels that guidance acts on; None for all."""
    decoder: str
    """Hash of the decoder's weights."""
    rounding: str
    weights: str
    """ "ema" or "raw"."""

    def fields(self) -> dict[str, Any]:
        """All fields as plain data."""
        return asdict(self)

    @property
    def hash(self) -> str:
        """8 hex digits over all fields."""
        return hashlib.sha256(json.dumps(self.fields(), sort_keys=True).encode()).hexdigest()[:8]


def protocol_of(
    dataset: Dataset,
    *,
    samples: int,
    labels: str,
    seed: int,
    sampler: str,
    steps: int,
    channels: int | None = None,
    weights: str = "ema",
) -> Protocol:
    """The protocol of these settings on a data set, with its reference, extractor and decoder filled in."""
    images = dataset.references["train"]()
    return Protocol(
        reference=f"{dataset.name}/train {tensors_hash([images])[:16]}",
        extractor=f"{dataset.extractor} {extractor_hash(get_extractor(dataset.extractor))[:16]}",
        samples=samples,
        labels=labels,
        seed=seed,
        sampler=sampler,
        steps=steps,
        channels=channels,
        decoder=dataset.decoder[:16],
        rounding=ROUNDING,
        weights=weights,
    )
