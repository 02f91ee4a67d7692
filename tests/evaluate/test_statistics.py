"""Statistics of image sets in one pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stbench.core.errors import UserError
from stbench.evaluate.image_sets import open_images
from stbench.evaluate.statistics import evenly_spaced, measure_images
from tests.datafiles import write_images
from tests.measuring import CheapNetwork, measured, pictures


@pytest.mark.parametrize("batch", [5, 64])
def test_statistics_do_not_depend_on_the_batch_size(tmp_path: Path, batch: int) -> None:
    images = pictures(0, 33)
    found = measured(images, tmp_path / "a.npz", CheapNetwork(), batch=batch, keep=10)
    rows = CheapNetwork()(torch.from_numpy(images).permute(0, 3, 1, 2))["pool"]
    assert (found.count, found.size) == (33, (24, 24))
    assert torch.equal(found.features, rows[evenly_spaced(33, 10)])
    assert np.allclose(found.moments["pool"][0], rows.double().mean(0))
    assert np.allclose(found.moments["pool"][1], np.cov(rows.double().numpy(), rowvar=False))
    again = measure_images(open_images(write_images(tmp_path / "png", images)), [CheapNetwork()])
    assert again.digest == found.digest


class SwitchRecorder(CheapNetwork):
    """Records torch's precision switches at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[bool, ...]] = set()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.seen.add(switches())
        return super().forward(images)


def switches() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return cudnn.enabled, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def test_networks_run_in_fp32_with_cudnn_on(tmp_path: Path) -> None:
    before, network = switches(), SwitchRecorder()
    measured(pictures(0, 12), tmp_path / "a.npz", network)
    assert network.seen == {(True, False, False)} and switches() == before


def test_kept_images_are_evenly_spaced() -> None:
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, 10).tolist() == evenly_spaced(3, None).tolist() == [0, 1, 2]


def test_one_image_has_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected at least 2 images in .*a.npz, found 1"):
        measured(pictures(0, 1), tmp_path / "a.npz", CheapNetwork())
