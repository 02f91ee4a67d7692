"""Scores of images against a reference: names, warnings, and the files they are written to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stbench.core.errors import UserError
from stbench.evaluate.reference import reference_from
from stbench.evaluate.score_images import score_images
from stbench.evaluate.scores import compute_scores, score_name
from tests.datafiles import write_images
from tests.measuring import CheapNetwork, measured, pictures


def test_score_names_contain_the_number_of_samples() -> None:
    assert [score_name("fid", n) for n in (50_000, 10_000, 1234)] == ["fid50k", "fid10k", "fid1234"]
    assert score_name("fd_dinov2", 50_000) == "fd_dinov2_50k"


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    samples = measured(pictures(0, 12, 16), tmp_path / "small.npz", CheapNetwork())
    large = measured(pictures(0, 12), tmp_path / "large.npz", CheapNetwork())
    with pytest.raises(UserError, match=r"of one size, found .*small.npz of 16x16 and .*large.npz of 24x24"):
        compute_scores(samples, reference_from(large))


def test_fewer_images_than_features_is_a_warning(tmp_path: Path) -> None:
    few = measured(pictures(0, 12), tmp_path / "few.npz", CheapNetwork())
    warnings = compute_scores(few, reference_from(few)).warnings
    assert len(warnings) == 4
    assert "fid: 12 images in" in warnings[0] and "no more than the 48 features" in warnings[0]
    as_many = measured(pictures(0, 48), tmp_path / "as-many.npz", CheapNetwork())
    assert "48 images in" in compute_scores(as_many, reference_from(as_many)).warnings[0]
    enough = measured(pictures(0, 49), tmp_path / "enough.npz", CheapNetwork())
    warnings = compute_scores(enough, reference_from(enough)).warnings
    assert not [warning for warning in warnings if warning.startswith("fid:")]
    with pytest.raises(UserError, match="expected at least 10 images in .*four.npz, found 4"):
        compute_scores(measured(pictures(0, 4), tmp_path / "four.npz", CheapNetwork()), reference_from(few))


def test_scores_of_two_references_are_both_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the samples are given as ".", the current folder."""
    samples = write_images(tmp_path / "samples", pictures(0, 12))
    for seed in (1, 2):
        np.savez(tmp_path / f"{seed}.npz", pictures(seed, 12))
    monkeypatch.chdir(samples)
    for reference in ("1.npz", "2.npz", "2.npz", "1.npz"):
        score_images(Path("."), tmp_path / reference, [CheapNetwork()])
    files = sorted(tmp_path.glob("samples*.json"), key=lambda file: -len(file.name))
    protocols = [json.loads(file.read_text())["protocol"] for file in files]
    assert [Path(protocol["reference"]).name for protocol in protocols] == ["2.npz", "1.npz"]
    digest = protocols[0]["reference_sha256"][:8]
    assert [file.name for file in files] == [f"samples-{digest}.json", "samples.json"]
