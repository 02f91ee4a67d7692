"""Published training settings of each backbone on ImageNet."""

from __future__ import annotations

import pytest

from stbench.data.dataset import Dataset
from stbench.data.path_sets import ImageNet256, ImageNet512

PUBLISHED = [
    (ImageNet256, "dit", "xl/2", (256, 1e-4, (0.9, 0.999), 0.0, 0, None, 0.1, 400_000)),
    (ImageNet512, "sit", "xl/2", (256, 1e-4, (0.9, 0.999), 0.0, 0, None, 0.1, 400_000)),
    (ImageNet256, "uvit", "h/2", (1024, 2e-4, (0.99, 0.99), 0.03, 5000, None, 0.1, 500_000)),
    (ImageNet256, "uvit", "l/2", (1024, 2e-4, (0.99, 0.99), 0.03, 5000, None, 0.15, 300_000)),
    (ImageNet512, "uvit", "h/4", (1024, 2e-4, (0.99, 0.99), 0.03, 5000, None, 0.1, 500_000)),
    (ImageNet512, "uvit", "l/4", (1024, 2e-4, (0.99, 0.99), 0.03, 5000, None, 0.15, 500_000)),
]


@pytest.mark.parametrize(("dataset", "family", "size", "expected"), PUBLISHED)
def test_presets_are_the_published_settings(
    dataset: type[Dataset], family: str, size: str, expected: tuple[object, ...]
) -> None:
    p = dataset.preset_for(family, size)
    found = (p.batch, p.lr, p.betas, p.weight_decay, p.warmup, p.clip, p.label_drop, p.steps)
    assert found == expected
    assert p.warmup_share is None  # the published warm-up, however long the run is
    assert (p.ema_decay, p.ema_warmup, p.adam_eps) == (0.9999, False, 1e-8)
    if size[0] in "xh":
        assert dataset.preset_for(family).size == size
