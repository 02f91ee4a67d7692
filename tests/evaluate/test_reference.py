"""References from ADM files, statistics files and images; mistakes in them in one line."""

from __future__ import annotations

from pathlib import Path
from typing import final

import numpy as np
import pytest
from torch import Tensor

from stbench.core.errors import UserError
from stbench.evaluate.feature_networks import FeatureNetwork, Inception
from stbench.evaluate.image_sets import open_images
from stbench.evaluate.metrics import frechet_distance
from stbench.evaluate.reference import load_reference, reference_from, reference_size, write_statistics
from stbench.evaluate.scores import SCORES, compute_scores, score_name
from stbench.evaluate.statistics import ImageStatistics, measure_images
from tests.measuring import CheapNetwork, measured, pictures


@final
class InceptionShaped(FeatureNetwork):
    """Inception's dimensions, to read references without its weights."""

    spaces = Inception.spaces
    label = "shaped 0"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


def adm_file(path: Path, found: ImageStatistics, images: np.ndarray | None) -> Path:
    """A reference as ADM's evaluator reads it: statistics of all images, arr_0 for precision and recall."""
    arrays = {}
    for space, suffix in (("pool", ""), ("spatial", "_s")):
        arrays |= {
            f"mu{suffix}": found.moments[space][0].numpy(),
            f"sigma{suffix}": found.moments[space][1].numpy(),
        }
    np.savez(path, **(arrays if images is None else {"arr_0": images, **arrays}))
    return path


def test_an_adm_file_gives_its_statistics_and_the_features_of_arr_0(tmp_path: Path) -> None:
    real = measured(pictures(1, 40), tmp_path / "real.npz", CheapNetwork())
    samples = measured(pictures(2, 20), tmp_path / "samples.npz", CheapNetwork())
    reference = load_reference(adm_file(tmp_path / "adm.npz", real, pictures(1, 40)[:15]), [CheapNetwork()])
    assert reference.features is not None and len(reference.features) == 15 and reference.count is None
    found = compute_scores(samples, reference).metrics
    without_others = SCORES.keys() - {"fd_dinov2", "fdr", "fdr6"}
    assert found.keys() == {score_name(n, 15 if n == "mind" else 20) for n in without_others}
    for name, space in (("fid20", "pool"), ("sfid20", "spatial")):
        assert found[name] == pytest.approx(frechet_distance(*samples.moments[space], *real.moments[space]))
    assert found["fid20"] != pytest.approx(found["sfid20"], rel=1e-3)


def test_an_adm_file_without_images_warns_of_missing_scores(tmp_path: Path) -> None:
    real = measured(pictures(1, 40), tmp_path / "real.npz", CheapNetwork())
    mu, sigma = (tensor.numpy() for tensor in real.moments["pool"])
    np.savez(tmp_path / "adm.npz", mu=mu.astype(np.float32), sigma=sigma)
    reference = load_reference(tmp_path / "adm.npz", [CheapNetwork()])
    report = compute_scores(measured(pictures(2, 20), tmp_path / "samples.npz", CheapNetwork()), reference)
    assert report.metrics.keys() == {"fid20", "is_adm20", "is_torch_fidelity20"}
    warnings = " / ".join(report.warnings)
    assert "has no arr_0: precision, recall, KID and MIND are left out" in warnings
    assert "has no statistics for sfid: left out" in warnings


WRONG = {
    "size": ({"mu": np.zeros(64), "sigma": np.eye(64)}, "expected mu float 2048, found float64 64"),
    "type": ({"mu": np.zeros(2048, int), "sigma": np.eye(2048)}, "expected mu float 2048, found int64 2048"),
    "shape": (
        {"mu": np.zeros(2048), "sigma": np.zeros(2048)},
        "expected sigma float 2048x2048, found float64",
    ),
    "no sigma": ({"mu": np.zeros(2048)}, "expected sigma, found mu"),
    "not finite": (
        {"mu": np.full(2048, np.nan), "sigma": np.eye(2048)},
        "mu contains values that are not finite",
    ),
    "spatial": (
        {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2048), "sigma_s": np.eye(2048)},
        "expected mu_s float 2023, found float64 2048",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_reference_is_one_line(tmp_path: Path, name: str) -> None:
    arrays, message = WRONG[name]
    np.savez(tmp_path / "ref.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        load_reference(tmp_path / "ref.npz", [InceptionShaped()])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_statistics_file_equals_the_images_it_was_made_from(tmp_path: Path) -> None:
    np.savez(tmp_path / "real.npz", pictures(1, 30))
    images = open_images(tmp_path / "real.npz")
    write_statistics(images, [CheapNetwork()], tmp_path / "stats.npz", batch=8)
    stored = load_reference(tmp_path / "stats.npz", [CheapNetwork()])
    direct = reference_from(measure_images(images, [CheapNetwork()], batch=8))
    assert (stored.count, stored.size, stored.digest) == (30, (24, 24), direct.digest)
    samples = measured(pictures(2, 20), tmp_path / "samples.npz", CheapNetwork())
    assert compute_scores(samples, stored).metrics == compute_scores(samples, direct).metrics
    arrays = np.load(tmp_path / "stats.npz")
    assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(arrays.files) and arrays["mu_s"].shape == (40,)
    with pytest.raises(UserError, match=r"was made with cheap 0, not with cheap 1; make it again"):
        load_reference(tmp_path / "stats.npz", [CheapNetwork("cheap 1")])


def test_a_damaged_statistics_file_is_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", about=np.array("{}"), mu=np.zeros(3))
    with pytest.raises(UserError, match="its description is incomplete"):
        load_reference(tmp_path / "stats.npz", [CheapNetwork()])


def test_the_size_of_a_reference_is_read_without_measuring(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", pictures(1, 12))
    write_statistics(open_images(tmp_path / "images.npz"), [CheapNetwork()], tmp_path / "stats.npz")
    np.savez(tmp_path / "adm.npz", mu=np.zeros(48), sigma=np.eye(48))
    assert reference_size(tmp_path / "images.npz") == reference_size(tmp_path / "stats.npz") == (24, 24)
    assert reference_size(tmp_path / "adm.npz") is None
    with pytest.raises(UserError, match="reference .*gone not found; expected an ADM npz"):
        reference_size(tmp_path / "gone")
    with pytest.raises(UserError, match="reference .*gone not found; expected an ADM npz"):
        load_reference(tmp_path / "gone", [CheapNetwork()])
