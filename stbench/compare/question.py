"""What a comparison asks: the metric, the baseline, the budget and the target."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from stbench.core.errors import UserError
from stbench.core.text import visible

BASELINE = "vanilla"
"""The recipe, without options, with which all other rows are compared by default."""

HIGHER_IS_BETTER = frozenset({"is", "accuracy", "precision", "recall"})
NO_DIRECTION = frozenset({"nn_distance", "nn_distance_heldout"})
"""Metrics of which neither a low nor a high value is better."""
NAMES = {
    "fid": "FID",
    "fid_all": "FID to all images",
    "is": "IS",
    "kid": "KID",
    "mind": "MIND",
    "fdr": "FDr",
    "fdr6": "FDr6",
}
"""Metrics whose printed name differs from that in a run folder."""


Unit = Literal["images", "seconds", "flops"]


@dataclass(frozen=True)
class Amount:
    """An amount of training."""

    unit: Unit
    value: float


@dataclass(frozen=True)
class Question:
    """The choices that change the numbers of a comparison. The default is that of a published leaderboard."""

    metric: str = "fid"
    """Name of the compared metric, as in curve.jsonl."""
    baseline: str = BASELINE
    """Label of the row with which the others are compared."""
    at: Amount | None = None
    """Student-only budget of the last stage; None for the images of the last shared evaluation."""
    target: float | None = None
    """Value of the metric to reach; None for the baseline's mean at each budget."""

    def __post_init__(self) -> None:
        if self.metric in NO_DIRECTION:
            raise UserError(
                f"--metric {self.metric}: neither low nor high values are better; try --metric fid"
            )

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of the metric is better."""
        return self.metric in HIGHER_IS_BETTER

    def falling(self, value: float) -> float:
        """Return the value itself, or its inverse if higher is better: learning curves of it fall."""
        if not self.higher_is_better:
            return value
        return 1.0 / value if value > 0 else math.inf


QUESTION = Question()
"""The default."""


def metric_name(metric: str) -> str:
    """Return the printed name of a metric."""
    return NAMES.get(metric, metric.replace("_", " "))


UNITS: dict[str, tuple[Unit, float]] = {
    "": ("images", 1.0),
    "k": ("images", 1e3),
    "M": ("images", 1e6),
    "min": ("seconds", 60.0),
    "h": ("seconds", 3600.0),
    **{
        f"{prefix}FLOP": ("flops", 10.0**power)
        for prefix, power in (("", 0), ("T", 12), ("P", 15), ("E", 18))
    },
}
"""Suffix of an amount -> its unit and factor."""
_AMOUNT = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?) ?([a-zA-Z]*)", re.ASCII)


def parse_amount(text: str) -> Amount:
    """Parse images such as "51200", "51.2k" or "1.28M", hours such as "2.5h", or FLOPs such as "3 EFLOP".

    Raises:
        UserError: It is not a positive amount, or not at least one image.
    """
    found = _AMOUNT.fullmatch(text)
    try:
        unit, factor = UNITS[found[2].removesuffix("s") if found else "?"]
        value = float(found[1] if found else "") * factor
    except (ValueError, KeyError):
        unit, value = "images", math.nan
    if unit == "images":
        value = round(value) if 1 <= value < 1e15 else math.nan
    if not 0 < value < math.inf:
        raise UserError(
            f"--at must be a positive number of images, hours or FLOPs, found '{visible(text, 40)}'; "
            "try --at 51.2k, --at 2.5h or --at 3EFLOP"
        )
    return Amount(unit, value)


def parse_target(text: str) -> float | None:
    """Parse a value of the metric, or "baseline" for the baseline's own mean (None).

    Raises:
        UserError: It is neither "baseline" nor a positive number.
    """
    if text == "baseline":
        return None
    try:
        target = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        target = math.nan
    if not 0 < target < math.inf:
        raise UserError(
            f"--target must be a positive number or 'baseline', found '{visible(text, 40)}'; try --target 10"
        )
    return target
