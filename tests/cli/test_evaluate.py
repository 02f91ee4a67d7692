"""`stbench evaluate` and `stbench data statistics` on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stbench.cli.data import statistics
from stbench.cli.evaluate import evaluate
from stbench.core.errors import UserError
from stbench.evaluate.extractors import get_extractor
from stbench.evaluate.feature_networks import INCEPTION_FILE, load_inception
from stbench.evaluate.image_sets import open_images
from stbench.evaluate.reference import write_statistics
from stbench.evaluate.scores import SCORES, score_name
from tests.conftest import Command
from tests.datafiles import write_images
from tests.measuring import CheapNetwork, pictures

MEAN_COLOUR = """
import torch
from stbench.core.registry import EXTRACTORS

@EXTRACTORS.register_module(name="mean-of-image")
class Mean(torch.nn.Module):
    def forward(self, images):
        return images.float().mean((2, 3))
"""


def test_missing_inception_weights_are_named_with_path_url_and_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stbench: Command
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "hub" / "checkpoints" / INCEPTION_FILE
    np.savez(tmp_path / "a.npz", pictures(0, 12))
    for options, expected in (((), place), (("--inception", tmp_path / "x.pth"), tmp_path / "x.pth")):
        code, _, err = stbench(
            "evaluate", tmp_path / "a.npz", "--reference", tmp_path / "a.npz", *options, "--device", "cpu"
        )
        assert code == 2 and err.count("\n") == 1 and f"expected them at {expected};" in err
        assert f"weights {INCEPTION_FILE} (sha256 6726825d...) not found" in err
        assert (
            f"put https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}" in err
        )
    assert not (tmp_path / "a.json").exists()
    with pytest.raises(UserError, match=rf"expected them at {place}; put https.* --inception FILE"):
        get_extractor("inception-v3-compat")


MISSING: dict[str, Any] = {"inception": Path("missing.pth"), "device": "cpu"}
"""Options that fail as soon as the networks are loaded."""


@pytest.mark.parametrize("kind", ["npz", "folder", "statistics"])
def test_another_size_is_refused_before_any_network_is_loaded(tmp_path: Path, kind: str) -> None:
    np.savez(tmp_path / "samples.npz", pictures(0, 12, 16))
    np.savez(tmp_path / "reference.npz", pictures(0, 12))
    reference = tmp_path / "reference.npz"
    if kind == "folder":
        reference = write_images(tmp_path / "reference", pictures(0, 12))
    if kind == "statistics":
        write_statistics(open_images(reference), [CheapNetwork()], tmp_path / "statistics.npz")
        reference = tmp_path / "statistics.npz"
    with pytest.raises(UserError, match="of one size, found .* of 16x16 and .* of 24x24"):
        evaluate(tmp_path / "samples.npz", reference, **MISSING)


def test_a_run_is_not_sampled_if_its_scores_cannot_be_computed(tmp_path: Path, trained_run: Path) -> None:
    options = {"samples": 20, **MISSING}
    np.savez(tmp_path / "large.npz", pictures(0, 12, 48))
    with pytest.raises(UserError, match="of one size, found .* of 32x32 and .* of 48x48"):
        evaluate(trained_run, tmp_path / "large.npz", **options)
    np.savez(tmp_path / "same.npz", pictures(0, 12, 32))
    with pytest.raises(UserError, match="expected them at missing.pth"):
        evaluate(trained_run, tmp_path / "same.npz", **options)
    assert not (trained_run / "evaluation").exists()


def test_images_are_scored_against_an_adm_file(
    tmp_path: Path, inception_file: tuple[Path, str], stbench: Command
) -> None:
    """The file has statistics of one feature space and no images, as the smallest that ADM publishes."""
    file, digest = inception_file
    options = ("--inception", file, "--inception-sha256", digest[:8], "--device", "cpu")
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "samples.npz", pictures(2, 10))
    command = ("evaluate", tmp_path / "samples.npz", "--reference", tmp_path / "adm.npz", *options)
    code, out, err = stbench(*command, "--output", tmp_path / "scores.json")
    assert code == 0 and "fid10" in out and "scores and protocol: " in out, err
    assert "warning: fid: 10 images" in err and "no statistics for sfid: left out" in err
    code, _, err = stbench(*command[:2], "--adm-fp16", *options)
    assert code == 2 and "--adm-fp16 applies to scores against --reference REF" in err
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["metrics"].keys() == {"fid10", "is_adm10", "is_torch_fidelity10"}
    assert content["protocol"]["networks"]["pool"] == f"inception-v3-compat {digest[:16]}"


def test_the_protocol_says_that_distances_are_rounded_as_in_adm(
    tmp_path: Path, inception_file: tuple[Path, str], stbench: Command
) -> None:
    file, digest = inception_file
    options = ("--inception", file, "--inception-sha256", digest[:8], "--device", "cpu")
    for name, seed in (("a", 2), ("b", 3)):
        np.savez(tmp_path / f"{name}.npz", pictures(seed, 10))
    command = ("evaluate", tmp_path / "a.npz", "--reference", tmp_path / "b.npz", *options)
    for rounded in ((), ("--adm-fp16",)):
        code, _, err = stbench(*command, *rounded, "--output", tmp_path / "s.json")
        protocol = json.loads((tmp_path / "s.json").read_text())["protocol"]
        assert code == 0 and protocol.get("distances") == ("float16 as in ADM" if rounded else None), err
        (tmp_path / "s.json").unlink()


def test_mistakes_in_what_is_scored_are_one_line(tmp_path: Path, stbench: Command) -> None:
    np.savez(tmp_path / "samples.npz", pictures(2, 10))
    command = ("evaluate", tmp_path / "samples.npz", "--device", "cpu")
    both = ("--reference", tmp_path / "samples.npz", "--validation", tmp_path / "samples.npz")
    for options, message in (
        ((), "to score images, add --reference REF"),
        (both, "expected --fdr EXTRACTORS and --validation IMAGES together"),
        ((*both[:2], "--fdr", "fdr6"), "expected --fdr EXTRACTORS and --validation IMAGES together"),
        (("--fdr", "fdr6"), "for a run's own data, type --set eval.fdr=fdr6"),
        ((*both, "--fdr", "fdr6"), "fdr6/siglip2 are not in the Hugging Face cache; type `hf download timm/"),
        ((*both, "--fdr", "dino"), "unknown feature extractor 'dino'; did you mean 'dinov2'"),
        (
            ("--reference", tmp_path / "samples.npz", "--samples", 20),
            "--samples, --eval-guidance, --guide, --ema-decay, --set and --plugin apply to a run",
        ),
        (("--reference", tmp_path / "gone"), "gone not found; expected an ADM npz"),
    ):
        code, _, err = stbench(*command, *options)
        assert code == 2 and err.count("\n") == 1 and message in err


@pytest.mark.slow
def test_commands_from_images_to_scores(
    tmp_path: Path, inception_file: tuple[Path, str], dino_file: Path, stbench: Command
) -> None:
    file, digest = inception_file
    options = ("--inception", file, "--inception-sha256", digest[:8], "--dino", dino_file, "--device", "cpu")
    real = write_images(tmp_path / "real", pictures(1, 10))
    (tmp_path / "mean.py").write_text(MEAN_COLOUR)
    options = (*options, "--plugin", tmp_path / "mean.py", "--fdr", "inception-v3-compat,mean-of-image")
    code, out, err = stbench("data", "statistics", real, tmp_path / "stats.npz", *options)
    assert code == 0 and "10 images of 24x24" in out, err
    np.savez(tmp_path / "samples.npz", pictures(2, 10))
    np.savez(tmp_path / "other.npz", pictures(3, 10))
    command = ("evaluate", tmp_path / "samples.npz", "--reference", tmp_path / "stats.npz", *options)
    code, out, err = stbench(*command, "--validation", tmp_path / "other.npz")
    assert code == 0 and "fid10" in out and "fd_dinov2_10" in out, err
    assert "warning: fid: 10 images" in err
    content = json.loads((tmp_path / "samples.json").read_text())
    assert content["metrics"].keys() == {score_name(name, 10) for name in SCORES if name != "fdr6"}
    assert all(np.isfinite(value) for value in content["metrics"].values())
    protocol = content["protocol"]
    assert protocol["networks"]["pool"] == f"inception-v3-compat {digest[:16]}"
    assert protocol["networks"]["dino"].startswith("vit_small_patch14_dinov2 ")
    assert protocol["fdr"] == ["inception-v3-compat", "mean-of-image"] and protocol["validation_count"] == 10
    assert protocol["networks"]["fdr mean-of-image"].startswith("mean-of-image ")
    assert protocol["reference_count"] == 10 and protocol["sampling"] is None


@pytest.mark.slow
def test_a_run_is_sampled_and_scored_at_every_scale(
    trained_run: Path, tmp_path: Path, inception_file: tuple[Path, str], stbench: Command
) -> None:
    file, digest = inception_file
    run = shutil.copytree(trained_run, tmp_path / "run")
    np.savez(tmp_path / "real.npz", pictures(1, 10, 32))
    write_statistics(open_images(tmp_path / "real.npz"), [load_inception(file, digest)], tmp_path / "ref.npz")
    options = ("--inception", file, "--inception-sha256", digest, "--device", "cpu")
    command = ("evaluate", run, "--reference", tmp_path / "ref.npz", *options)
    code, out, err = stbench(*command, "--samples", 10, "--eval-guidance", "1.0,1.5")
    assert code == 0 and out.count("fid10") == 4, err
    names = ["g1-n10.json", "g1-n10.npz", "g1.5-n10.json", "g1.5-n10.npz"]
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == names
    content = json.loads((run / "evaluation" / "g1.5-n10.json").read_text())
    assert content["protocol"]["sampling"]["cfg"] == 1.5
    assert content["protocol"]["rounding"].startswith("clamp, round half to even")
    code, _, err = stbench(*command, "--output", tmp_path / "scores.json")
    assert code == 2 and "a run's scores are written to its folder evaluation/; drop --output" in err


def test_a_run_is_evaluated_again_on_its_own_data(
    trained_run: Path, tmp_path: Path, stbench: Command
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    before = (run / "curve.jsonl").read_text()
    command = ("evaluate", run, "--device", "cpu", "--samples", 12)
    code, out, err = stbench(*command, "--set", "eval.seed=1")
    assert code == 0 and "1 rows added to" in out, err
    assert (run / "curve.jsonl").read_text().startswith(before)
    code, out, err = stbench(*command, "--set", "eval.seed=1")
    assert code == 0 and "0 rows added to" in out, err
    code, _, err = stbench(*command, "--set", "train.lr=1")
    assert code == 2 and "can change eval.* only, except eval.points; found 'train.lr'" in err


def test_a_path_that_is_not_a_run_or_images_is_one_line(tmp_path: Path, stbench: Command) -> None:
    code, _, err = stbench("evaluate", tmp_path / "gone", "--device", "cpu")
    assert code == 2 and err.count("\n") == 1 and "gone" in err and "spec.json" in err


def test_statistics_go_to_an_npz(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ends in .npz"):
        statistics(tmp_path, tmp_path / "stats.pt")
