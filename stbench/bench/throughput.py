"""The speed of the cases that `stbench bench` has measured, kept for `stbench run --dry-run`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from stbench.bench.measure import Measurement
from stbench.config.spec import RunSpec
from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.core.safe_load import parse_json, read_text
from stbench.data.dataset import Dataset
from stbench.train.environment import environment

SCHEMA = 1
MOST_RATES = 1000
"""Measurements that are kept; the oldest are dropped."""


@dataclass(frozen=True)
class Rate:
    """The speed of one measured case."""

    network: str
    """The backbone with its effective options and the shape of its latents, as JSON."""
    arithmetic: str
    """Device, version of torch, precision and compilation."""
    recipe: str
    label: str
    """The case in words."""
    batch: int
    """Images per micro-batch."""
    flops_per_second: float
    """Training FLOPs of student, heads and teachers."""


def network_key(spec: RunSpec, dataset: Dataset) -> str:
    """Identify a backbone and the shape of its latents."""
    fields = spec.backbone.model_dump(include={"name", "effective"})
    return json.dumps([fields, dataset.channels, dataset.input_size], sort_keys=True)


def arithmetic_key(spec: RunSpec, device: torch.device) -> str:
    """Identify what decides the speed of a network: device, version of torch, and settings of training.

    Automatic compilation counts as compilation on a GPU, where all but short runs use it.
    """
    found, train = environment(device, {}), spec.train
    compiled = train.compile == "on" or (train.compile == "auto" and device.type == "cuda")
    words = [found.hardware, f"torch {found.versions['torch']}", train.precision]
    words += [f"teachers {train.teacher_precision}", "compiled" if compiled else "eager"]
    return ", ".join(words + ["checkpointing"] * train.checkpointing)


def rate_of(found: Measurement, spec: RunSpec, dataset: Dataset, device: torch.device, label: str) -> Rate:
    """The speed of a measured case."""
    return Rate(
        network=network_key(spec, dataset),
        arithmetic=arithmetic_key(spec, device),
        recipe=spec.recipe.name,
        label=label,
        batch=math.ceil(found.batch / spec.train.accumulate),
        flops_per_second=found.flops_per_image * found.images_per_second,
    )


def store() -> Path:
    """The file with the measurements of this user on this machine's file system."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return cache / "stbench" / "throughput.json"


def remember(rates: Sequence[Rate]) -> None:
    """Add measurements to the store. A newer one of an equal case replaces an older one.

    A folder that cannot be written to is no error: nothing is kept then.
    """
    replaced = {_case(rate) for rate in rates}
    kept = [rate for rate in read_rates() if _case(rate) not in replaced]
    content = {"schema": SCHEMA, "rates": [asdict(rate) for rate in [*kept, *rates][-MOST_RATES:]]}
    with suppress(OSError, UserError):
        atomic_write(store(), json.dumps(content, indent=1) + "\n")


def read_rates() -> list[Rate]:
    """Return the measurements in the store; none if there is no store or it is damaged."""
    try:
        content = parse_json(read_text(store()))
        if content["schema"] != SCHEMA:
            return []
        return [_rate(row) for row in content["rates"]]
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return []


def _rate(row: Mapping[str, Any]) -> Rate:
    texts = {name: str(row[name]) for name in ("network", "arithmetic", "recipe", "label")}
    rate = Rate(**texts, batch=int(row["batch"]), flops_per_second=float(row["flops_per_second"]))
    if not rate.flops_per_second > 0.0 or rate.batch < 1:
        raise ValueError(f"a rate of {rate.flops_per_second} FLOPs per second")
    return rate


def _case(rate: Rate) -> tuple[str, str, str, int]:
    return rate.network, rate.arithmetic, rate.recipe, rate.batch


def find_rate(spec: RunSpec, dataset: Dataset, device: torch.device, batch: int) -> Rate | None:
    """Return the measurement that is closest to a run; None if its network was not measured on the device.

    The recipe of the run is preferred to others, then the number of images that is closest to `batch`.
    """
    network, arithmetic = network_key(spec, dataset), arithmetic_key(spec, device)
    found = [rate for rate in read_rates() if (rate.network, rate.arithmetic) == (network, arithmetic)]
    return min(found, key=lambda r: (r.recipe != spec.recipe.name, abs(r.batch - batch)), default=None)
