"""The split of a data set into training, held-out and reference images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from stbench.core.errors import UserError

TRAIN, HELDOUT, REFERENCE = 0, 1, 2
"""Values of a split: used for training; never used for training, pixels kept; used for training, pixels kept
as a reference of the evaluation.
"""

HELDOUT_SHARE, HELDOUT_MAX = 0.05, 1000
"""This share of the images is held out, at least one and at most `HELDOUT_MAX`."""

REFERENCES = 10_000
"""Default number of reference images."""


def assign_split(ids: Sequence[str], references: int) -> np.ndarray:
    """Return TRAIN, HELDOUT or REFERENCE, uint8 (N,), for the images named `ids`.

    Images are ordered by a hash of their names, so neither their order nor their labels matter. The first
    min(1000, 5 %), at least one, are held out; the next `references` are references. Raises UserError for
    fewer than two images.
    """
    if len(ids) < 2:
        raise UserError(f"expected at least 2 images (one is held out), found {len(ids)}; add images")
    keys = [hashlib.sha256(b"stbench-split/" + os.fsencode(name)).digest() for name in ids]
    order = sorted(range(len(ids)), key=keys.__getitem__)
    heldout = max(1, min(HELDOUT_MAX, round(HELDOUT_SHARE * len(ids))))
    split = np.full(len(ids), TRAIN, np.uint8)
    split[order[:heldout]] = HELDOUT
    split[order[heldout : heldout + references]] = REFERENCE
    return split
