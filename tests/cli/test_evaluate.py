"""`stbench evaluate --reference` and `data statistics`: Inception's graph, files, scores, one-line errors."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stbench.cli.data import statistics
from stbench.cli.evaluate import evaluate
from stbench.core.errors import UserError
from stbench.evaluate.extractors import get_extractor
from stbench.evaluate.feature_networks import (
    INCEPTION_FILE,
    FeatureNetwork,
    Inception,
    load_dino,
    load_inception,
)
from stbench.evaluate.image_sets import open_images
from stbench.evaluate.metrics import frechet_distance
from stbench.evaluate.reference import load_reference, reference_from, write_statistics
from stbench.evaluate.score_images import score_images
from stbench.evaluate.scores import SCORES, compute_scores, score_name
from stbench.evaluate.statistics import ImageStatistics, evenly_spaced, measure_images
from stbench.runs.folder import RunFolder
from tests.conftest import Command, Runner
from tests.evaluate.test_image_sets import folder
from tests.weights import random_inception


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file of random Inception weights, and its sha256."""
    return random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="session")
def inception(weights: tuple[Path, str]) -> Inception:
    return load_inception(*weights)


@pytest.fixture(scope="session")
def dino_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224)
    file = tmp_path_factory.mktemp("dino") / "model.safetensors"
    save_file(net.state_dict(), file)
    return file


def pictures(seed: int, count: int, size: int = 24) -> np.ndarray:
    """Smooth noise, uint8 (count,size,size,3), brighter with the seed."""
    draws = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 4, 4, generator=draws) * 200 + 10 * seed
    large = nn.functional.interpolate(small, size=(size, size), mode="bilinear")
    return large.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


class Cheap(FeatureNetwork):
    """Features that cost nothing: "pool" are 48 fixed projections, "spatial" the first 40 of them."""

    spaces: ClassVar[Mapping[str, int | None]] = {"pool": 48, "spatial": 40}
    label = "cheap 0"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        draws = torch.Generator().manual_seed(0)
        flat = images.flatten(1).double() / 255.0
        pool = torch.tanh(flat @ torch.randn(flat.shape[1], 48, generator=draws, dtype=torch.float64) / 20)
        return {"pool": pool.float(), "spatial": pool[:, :40].float(), "logits": pool[:, :9].float() * 4}


@final
class Wide(FeatureNetwork):
    """Inception's dimensions, to read its references without it."""

    spaces = Inception.spaces
    label = "wide 0"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


def measured(
    images: np.ndarray, tmp_path: Path, name: str, network: FeatureNetwork, **options: int
) -> ImageStatistics:
    np.savez(tmp_path / f"{name}.npz", images)
    return measure_images(open_images(tmp_path / f"{name}.npz"), [network], **options)


def test_the_graph_gives_what_hooks_on_the_original_see(inception: Inception) -> None:
    """mixed_6/conv is the rectified 1x1 branch of Mixed_6d: 17x17, 7 channels, (height, width, channel)."""
    images, seen = torch.from_numpy(pictures(0, 2)).permute(0, 3, 1, 2), {}

    def keep(name: str) -> object:
        return lambda module, inputs, output: seen.update({name: output})

    branch = inception.net.Mixed_6d.branch1x1
    handles = [
        inception.net.AvgPool.register_forward_hook(keep("pool")),
        branch.bn.register_forward_hook(keep("normalised")),
        inception.net.Conv2d_1a_3x3.register_forward_pre_hook(
            lambda module, inputs: seen.update({"input": inputs[0]})
        ),
    ]
    with torch.no_grad():
        found = inception(images)
    for handle in handles:
        handle.remove()
    assert torch.equal(found["pool"], seen["pool"].flatten(1)) and found["pool"].shape == (2, 2048)
    spatial = seen["normalised"].relu()[:, :7]
    assert spatial.shape == (2, 7, 17, 17) and (spatial > 0).any() and (spatial == 0).any()
    assert torch.equal(found["spatial"], spatial.permute(0, 2, 3, 1).reshape(2, 2023))
    assert found["spatial"][1, 7 * (17 * 3 + 5) + 2] == spatial[1, 2, 3, 5]
    assert torch.allclose(found["logits"], found["pool"] @ inception.net.fc.weight.T)
    assert not torch.allclose(found["logits"], inception.net.fc(found["pool"]), atol=0.1)
    assert seen["input"].shape == (2, 3, 299, 299) and -1.0 <= seen["input"].min() < seen["input"].max() < 1.0


class StandIn(nn.Module):
    """The part of torch-fidelity's Inception that ours reads, in small."""

    def __init__(self) -> None:
        super().__init__()
        self.Mixed_6d = nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.Mixed_6d(images.float())
        return seen.mean((2, 3)), seen.amax((2, 3))


def tensors_alive() -> int:
    gc.collect()
    return sum(type(thing) is Tensor for thing in gc.get_objects())


def test_nothing_is_kept_of_images_that_passed() -> None:
    whole = Inception(StandIn(), "stand-in")  # type: ignore[arg-type]
    images = torch.arange(2 * 9 * 2 * 2).view(2, 9, 2, 2)
    before = tensors_alive()
    for _ in range(3):
        whole.net(images)  # as a training run's evaluations do, by `get_extractor`
        found = whole(images)
    expected = images[:, :7].permute(0, 2, 3, 1).flatten(1).float()
    assert torch.equal(found["spatial"], expected)
    del found, expected
    assert tensors_alive() == before and not whole.net.Mixed_6d._forward_hooks


def test_building_inception_leaves_the_random_state_alone(weights: tuple[Path, str]) -> None:
    before = torch.get_rng_state()
    load_inception(*weights)
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_inception_names_file_place_url_and_hash(
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
    with pytest.raises(UserError) as told:  # `stbench run` has no --inception
        get_extractor("inception-v3-compat")
    assert f"expected them at {place}; put https" in str(told.value) and "--inception" not in str(told.value)


def test_a_wrong_hash_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    file = tmp_path / INCEPTION_FILE
    file.write_bytes(b"cos\nsystem\n(S'touch harmed'\ntR.")
    with pytest.raises(
        UserError, match=r"expected sha256 6726825d..., found [0-9a-f]{16}...; fetch it again"
    ):
        load_inception(file)
    own = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(UserError, match="does not contain the weights of Inception"):
        load_inception(file, own)  # even where the hash was given, no pickle is run
    assert not Path("harmed").exists()
    torch.save({"fc.bias": torch.zeros(3)}, file)
    with pytest.raises(UserError, match="does not contain the weights of Inception .*Missing key"):
        load_inception(file, hashlib.sha256(file.read_bytes()).hexdigest())


def test_dino_is_timms_class_token_of_bicubic_224(dino_file: Path) -> None:
    net = load_dino(dino_file)
    assert net.label.startswith("vit_small_patch14_dinov2 ")
    images = torch.from_numpy(pictures(2, 1, 224)).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = net(images)["dino"]
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x = (images / 255.0 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
        expected = net.net.forward_features(x)[:, 0]
    assert found.shape == (1, 384) and torch.allclose(found, expected, atol=1e-5)


def test_dino_takes_metas_layout_at_518_pixels(dino_file: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        state = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    state["mask_token"] = torch.zeros(1, 384)
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    net = load_dino(tmp_path / "dinov2_vits14_pretrain.pth")
    assert net.net.pos_embed.shape == (1, 257, 384)


def test_missing_or_foreign_dino_is_one_line(tmp_path: Path, weights: tuple[Path, str]) -> None:
    with pytest.raises(
        UserError, match=r"`hf download timm/vit_large_patch14_dinov2.lvd142m model.safetensors"
    ):
        load_dino(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="does not contain the weights of DINOv2 .no cls_token"):
        load_dino(weights[0])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0")
    with pytest.raises(UserError, match="does not contain the weights of DINOv2"):
        load_dino(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("batch", [5, 64])
def test_a_survey_does_not_depend_on_the_batch(tmp_path: Path, batch: int) -> None:
    images = pictures(0, 33)
    found = measured(images, tmp_path, "a", Cheap(), batch=batch, keep=10)
    rows = Cheap()(torch.from_numpy(images).permute(0, 3, 1, 2))["pool"]
    assert (found.count, found.size) == (33, (24, 24))
    assert torch.equal(found.features, rows[evenly_spaced(33, 10)])
    assert np.allclose(found.moments["pool"][0], rows.double().mean(0))
    assert np.allclose(found.moments["pool"][1], np.cov(rows.double().numpy(), rowvar=False))
    again = measure_images(open_images(folder(tmp_path / "png", images)), [Cheap()])
    assert again.digest == found.digest


def test_a_survey_is_in_fp32_with_cudnn_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, matmul, seen = torch.backends.cudnn, torch.backends.cuda.matmul, set()
    forward = Cheap.forward

    def watched(self: Cheap, images: Tensor) -> dict[str, Tensor]:
        seen.add((cudnn.enabled, cudnn.allow_tf32, matmul.allow_tf32))
        return forward(self, images)

    monkeypatch.setattr(Cheap, "forward", watched)
    before = cudnn.enabled, cudnn.allow_tf32, matmul.allow_tf32
    measured(pictures(0, 12), tmp_path, "a", Cheap())
    assert seen == {(True, False, False)}
    assert before == (cudnn.enabled, cudnn.allow_tf32, matmul.allow_tf32)


def test_kept_rows_are_evenly_spaced() -> None:
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, 10).tolist() == evenly_spaced(3, None).tolist() == [0, 1, 2]


def test_the_number_of_samples_is_part_of_a_name() -> None:
    assert [score_name("fid", n) for n in (50_000, 10_000, 1234)] == ["fid50k", "fid10k", "fid1234"]
    assert score_name("fd_dinov2", 50_000) == "fd_dinov2_50k"


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


def test_an_adm_reference_gives_stored_statistics_and_rows_of_arr_0(tmp_path: Path) -> None:
    real = measured(pictures(1, 40), tmp_path, "real", Cheap())
    samples = measured(pictures(2, 20), tmp_path, "samples", Cheap())
    reference = load_reference(adm_file(tmp_path / "adm.npz", real, pictures(1, 40)[:15]), [Cheap()])
    assert reference.features is not None and len(reference.features) == 15 and reference.count is None
    found = compute_scores(samples, reference).metrics
    assert found.keys() == {score_name(name, 20) for name in SCORES if name != "fd_dinov2"}
    for name, space in (("fid20", "pool"), ("sfid20", "spatial")):
        assert found[name] == pytest.approx(frechet_distance(*samples.moments[space], *real.moments[space]))
    assert found["fid20"] != pytest.approx(found["sfid20"], rel=1e-3)


def test_an_adm_reference_of_statistics_alone_says_what_is_left_out(tmp_path: Path) -> None:
    real = measured(pictures(1, 40), tmp_path, "real", Cheap())
    mu, sigma = (tensor.numpy() for tensor in real.moments["pool"])
    np.savez(tmp_path / "adm.npz", mu=mu.astype(np.float32), sigma=sigma)
    reference = load_reference(tmp_path / "adm.npz", [Cheap()])
    verdict = compute_scores(measured(pictures(2, 20), tmp_path, "samples", Cheap()), reference)
    assert verdict.metrics.keys() == {"fid20", "is_adm20", "is_torch_fidelity20"}
    told = " / ".join(verdict.warnings)
    assert "has no arr_0: precision, recall and KID are left out" in told
    assert "has no statistics for sfid: left out" in told


WRONG = {
    "size": ({"mu": np.zeros(64), "sigma": np.eye(64)}, "expected mu float 2048, found float64 64"),
    "type": ({"mu": np.zeros(2048, int), "sigma": np.eye(2048)}, "expected mu float 2048, found int64 2048"),
    "shape": (
        {"mu": np.zeros(2048), "sigma": np.zeros(2048)},
        "expected sigma float 2048x2048, found float64",
    ),
    "no sigma": ({"mu": np.zeros(2048)}, "expected sigma, found mu"),
    "no numbers": (
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
        load_reference(tmp_path / "ref.npz", [Wide()])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_statistics_file_is_the_reference_it_was_made_from(tmp_path: Path) -> None:
    np.savez(tmp_path / "real.npz", pictures(1, 30))
    images = open_images(tmp_path / "real.npz")
    write_statistics(images, [Cheap()], tmp_path / "stats.npz", batch=8)
    stored = load_reference(tmp_path / "stats.npz", [Cheap()])
    direct = reference_from(measure_images(images, [Cheap()], batch=8))
    assert (stored.count, stored.size, stored.digest) == (30, (24, 24), direct.digest)
    samples = measured(pictures(2, 20), tmp_path, "samples", Cheap())
    assert compute_scores(samples, stored).metrics == compute_scores(samples, direct).metrics
    held = np.load(tmp_path / "stats.npz")
    assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(held.files) and held["mu_s"].shape == (40,)
    other = Cheap()
    other.label = "cheap 1"
    with pytest.raises(UserError, match=r"was made with cheap 0, not with cheap 1; make it again"):
        load_reference(tmp_path / "stats.npz", [other])


def test_a_damaged_statistics_file_is_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", about=np.array("{}"), mu=np.zeros(3))
    with pytest.raises(UserError, match="its description is incomplete"):
        load_reference(tmp_path / "stats.npz", [Cheap()])


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    samples = measured(pictures(0, 12, 16), tmp_path, "small", Cheap())
    with pytest.raises(UserError, match=r"of one size, found .*small.npz of 16x16 and .*large.npz of 24x24"):
        compute_scores(samples, reference_from(measured(pictures(0, 12), tmp_path, "large", Cheap())))


MISSING: dict[str, Any] = {"inception": Path("missing.pth"), "device": "cpu"}
"""Options that fail as soon as the networks are loaded."""


@pytest.mark.parametrize("kind", ["npz", "folder", "statistics"])
def test_another_size_is_refused_before_any_network_is_loaded(tmp_path: Path, kind: str) -> None:
    np.savez(tmp_path / "samples.npz", pictures(0, 12, 16))
    np.savez(tmp_path / "reference.npz", pictures(0, 12))
    reference = tmp_path / "reference.npz"
    if kind == "folder":
        reference = folder(tmp_path / "reference", pictures(0, 12))
    if kind == "statistics":
        write_statistics(open_images(reference), [Cheap()], tmp_path / "statistics.npz")
        reference = tmp_path / "statistics.npz"
    with pytest.raises(UserError, match="of one size, found .* of 16x16 and .* of 24x24"):
        evaluate(tmp_path / "samples.npz", reference, **MISSING)


def test_another_size_is_refused_before_a_run_is_sampled(tmp_path: Path, tiny: Runner) -> None:
    np.savez(tmp_path / "reference.npz", pictures(0, 12))
    run = Path(tiny(steps=1).path)
    with pytest.raises(UserError, match="of one size, found .* of 32x32 and .* of 24x24"):
        evaluate(run, tmp_path / "reference.npz", samples=20, **MISSING)
    with pytest.raises(UserError, match=r"expected them at missing.pth"):
        np.savez(tmp_path / "reference.npz", pictures(0, 12, 32))
        evaluate(run, tmp_path / "reference.npz", samples=20, **MISSING)
    assert not (run / "evaluation").exists()


def test_fewer_images_than_features_is_a_warning(tmp_path: Path) -> None:
    few = measured(pictures(0, 12), tmp_path, "few", Cheap())
    told = compute_scores(few, reference_from(few)).warnings
    assert len(told) == 4 and "fid: 12 images in" in told[0] and "no more than the 48 features" in told[0]
    as_many = measured(pictures(0, 48), tmp_path, "as-many", Cheap())
    assert "48 images in" in compute_scores(as_many, reference_from(as_many)).warnings[0]
    enough = measured(pictures(0, 49), tmp_path, "enough", Cheap())
    assert not [
        told for told in compute_scores(enough, reference_from(enough)).warnings if told.startswith("fid:")
    ]
    with pytest.raises(UserError, match="expected at least 10 images in .*four.npz, found 4"):
        compute_scores(measured(pictures(0, 4), tmp_path, "four", Cheap()), reference_from(few))


def test_scores_of_two_references_are_both_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from inside a folder of samples, which then has no name of its own."""
    samples = folder(tmp_path / "samples", pictures(0, 12))
    for seed in (1, 2):
        np.savez(tmp_path / f"{seed}.npz", pictures(seed, 12))
    monkeypatch.chdir(samples)
    for reference in ("1.npz", "2.npz", "2.npz", "1.npz"):
        score_images(Path("."), tmp_path / reference, [Cheap()])
    files = sorted(tmp_path.glob("samples*.json"), key=lambda file: -len(file.name))
    held = [json.loads(file.read_text())["protocol"] for file in files]
    assert [Path(one["reference"]).name for one in held] == ["2.npz", "1.npz"]
    assert [file.name for file in files] == [
        f"samples-{held[0]['reference_sha256'][:8]}.json",
        "samples.json",
    ]


def test_from_images_to_scores_by_commands(
    tmp_path: Path, weights: tuple[Path, str], dino_file: Path, stbench: Command
) -> None:
    file, digest = weights
    options = ("--inception", file, "--inception-sha256", digest[:8], "--dino", dino_file, "--device", "cpu")
    real = folder(tmp_path / "real", pictures(1, 10))
    code, out, err = stbench("data", "statistics", real, tmp_path / "stats.npz", *options)
    assert code == 0 and "10 images of 24x24" in out, err
    np.savez(tmp_path / "samples.npz", pictures(2, 10))
    asked = ("evaluate", tmp_path / "samples.npz", "--reference", tmp_path / "stats.npz", *options)
    code, out, err = stbench(*asked)
    assert code == 0 and "fid10" in out and "fd_dinov2_10" in out, err
    assert "warning: fid: 10 images" in err
    content = json.loads((tmp_path / "samples.json").read_text())
    assert content["metrics"].keys() == {score_name(name, 10) for name in SCORES}
    assert all(np.isfinite(value) for value in content["metrics"].values())
    protocol = content["protocol"]
    assert protocol["networks"]["pool"] == f"inception-v3-compat {digest[:16]}"
    assert protocol["networks"]["dino"].startswith("vit_small_patch14_dinov2 ")
    assert protocol["reference_count"] == 10 and protocol["sampling"] is None
    code, _, err = stbench("evaluate", tmp_path / "samples.npz")
    assert code == 2 and "to score images, add --reference REF" in err
    code, _, err = stbench(*asked, "--samples", 20)
    assert code == 2 and "--samples, --eval-guidance and --set apply to a run" in err
    code, _, err = stbench("evaluate", tmp_path / "samples.npz", "--reference", tmp_path / "gone", *options)
    assert code == 2 and err.count("\n") == 1 and "gone not found" in err


@pytest.mark.slow
def test_a_run_is_sampled_and_measured_at_every_scale(
    tiny: Runner, tmp_path: Path, weights: tuple[Path, str], stbench: Command
) -> None:
    record, (file, digest) = tiny(), weights
    options = ("--inception", file, "--inception-sha256", digest, "--device", "cpu")
    np.savez(tmp_path / "real.npz", pictures(1, 12, 32))
    command = ("evaluate", record.path, "--reference", tmp_path / "real.npz", *options)
    code, out, err = stbench(*command, "--samples", 12, "--eval-guidance", "1.0,1.5")
    assert code == 0 and out.count("fid12") == 4, err
    place = RunFolder(Path(record.path)).path / "evaluation"
    assert sorted(path.name for path in place.iterdir()) == [
        "g1-n12.json",
        "g1-n12.npz",
        "g1.5-n12.json",
        "g1.5-n12.npz",
    ]
    content = json.loads((place / "g1.5-n12.json").read_text())
    assert content["protocol"]["sampling"]["cfg"] == 1.5
    assert content["protocol"]["rounding"].startswith("clamp, round half to even")


def test_statistics_go_to_an_npz(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ends in .npz"):
        statistics(tmp_path, tmp_path / "stats.pt")
