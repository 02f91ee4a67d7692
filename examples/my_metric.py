"""A metric in one file.

stbench run --plugin examples/my_metric.py --backbone sit --recipe vanilla --set eval.metrics=energy
stbench compare results/runs --metric energy
"""

from __future__ import annotations

import torch

from stbench.core.registry import METRICS
from stbench.evaluate.registered_metrics import Samples


@METRICS.register_module(name="energy")
def energy(samples: Samples) -> float:
    """Energy distance of features to the training images: 2 E|X-Y| - E|X-X'| - E|Y-Y'|; lower is better.

    Zero only for equal distributions, whatever their shape (Szekely and Rizzo, 2013).
    """
    x, y = samples.features, samples.reference("train")["features"]
    between, within_x, within_y = (torch.cdist(a, b).mean() for a, b in ((x, y), (x, x), (y, y)))
    return float(2.0 * between - within_x - within_y)
