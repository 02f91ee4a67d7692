"""FDr against torch-fidelity's Frechet distance, its names, its extractors, and runs evaluated with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_statistics_to_metric

from stbench.config.plan import prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.core.errors import UserError
from stbench.core.registry import EXTRACTORS
from stbench.data.dataset import Dataset
from stbench.data.spec import FDR6
from stbench.data.spec import ratio_extractors as ratio_names
from stbench.evaluate import fdr6
from stbench.evaluate.extractors import extract_features, get_extractor, ratio_extractors
from stbench.evaluate.fdr import frechet_ratio, mean_ratio, ratio_name
from stbench.evaluate.fdr6 import MODELS, TokenFeatures, load_tokens
from stbench.evaluate.image_sets import open_images
from stbench.evaluate.metrics import frechet_distance
from stbench.evaluate.ratio_networks import ExtractorNetwork
from stbench.evaluate.reference import load_reference, reference_from, write_statistics
from stbench.evaluate.score_images import score_images
from stbench.evaluate.scores import compute_scores
from stbench.runs.folder import RunFolder
from stbench.runs.records import RunRecord
from stbench.train import engine
from tests.conftest import TINY
from tests.measuring import CheapNetwork, measured, pictures

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
IMAGES = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Projections(nn.Module):
    """Features (B,6): bounded random projections of the pixels."""

    def forward(self, images: Tensor) -> Tensor:
        draws = torch.Generator().manual_seed(images.shape[-1])
        flat = images.flatten(1).float() / 255.0
        return torch.tanh(flat @ torch.randn(flat.shape[1], 6, generator=draws) / 10)


if "projections" not in EXTRACTORS.module_dict:
    EXTRACTORS.register_module(name="projections", module=Projections)


def theirs(a: Tensor, b: Tensor) -> float:
    """torch-fidelity's Frechet distance of two sets of features."""
    statistics = [{"mu": x.numpy().mean(0), "sigma": np.cov(x.numpy(), rowvar=False)} for x in (a, b)]
    return fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]


def test_fdr_is_the_mean_ratio_of_torch_fidelitys_distances(digits: Dataset, cache_dir: Path) -> None:
    images = 255 - digits.train_images()[:400]
    extractors = {name: get_extractor(name) for name in ("stbench-digits", "projections")}
    ratios = []
    for extractor in extractors.values():
        own, real, train = (
            extract_features(extractor, x)[0]
            for x in (images, digits.heldout_images(), digits.train_images())
        )
        ratios.append(theirs(own, train) / theirs(real, train))
    found = frechet_ratio(images, digits, extractors, cache_dir=cache_dir)
    assert found == {"fdr": pytest.approx(np.mean(ratios), rel=1e-4)}
    assert frechet_ratio(images, digits, extractors, cache_dir=cache_dir) == found
    for name, ratio in zip(extractors, ratios, strict=True):
        one = frechet_ratio(images, digits, {name: extractors[name]}, cache_dir=cache_dir)
        assert one["fdr"] == pytest.approx(ratio, rel=1e-4)


def test_the_heldout_images_have_a_ratio_of_one(digits: Dataset, cache_dir: Path) -> None:
    every = dict.fromkeys(FDR6, get_extractor("projections"))
    found = frechet_ratio(digits.heldout_images(), digits, every, cache_dir=cache_dir)
    assert found == {"fdr6": 1.0}


def test_only_exactly_the_six_published_extractors_are_called_fdr6() -> None:
    assert set(FDR6) == {"inception-v3-compat", *(f"fdr6/{name}" for name in MODELS)}
    assert ratio_name(reversed(FDR6)) == "fdr6"
    assert ratio_name(FDR6[:5]) == ratio_name([*FDR6, "dinov2"]) == ratio_name([*FDR6[:5], "dinov2"]) == "fdr"


def test_a_ratio_to_zero_is_nan() -> None:
    assert mean_ratio([2.0, 9.0], [4.0, 3.0]) == 1.75
    assert np.isnan(mean_ratio([1.0, 1.0], [1.0, 0.0]))


# Extractors


def normalised(size: int) -> Tensor:
    x = F.interpolate(IMAGES.float() / 255.0, (size, size), mode="bicubic", antialias=True)
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


@pytest.mark.parametrize("model", ["test_vit", "attention pool", "test_convnext"])
@torch.no_grad()
def test_features_are_the_class_token_the_attention_pool_or_the_mean(model: str) -> None:
    pooled: dict[str, Any] = {"class_token": False, "global_pool": "map", "embed_dim": 32, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if model == "attention pool":
            network: Any = VisionTransformer(160, 32, depth=1, num_classes=0, **pooled).eval()
        else:
            network = timm.create_model(model, num_classes=0).eval()
    found, logits = TokenFeatures(network, size=160, mean=MEAN, std=STD)(IMAGES)
    tokens = network.forward_features(normalised(160))
    expected = {
        "test_vit": lambda: tokens[:, 0],
        "attention pool": lambda: network.attn_pool(tokens),
        "test_convnext": lambda: tokens.flatten(2).mean(2),
    }[model]()
    assert torch.allclose(found, expected, atol=1e-5) and logits.shape == (3, 0)
    grey = TokenFeatures(network, size=160, mean=MEAN, std=STD)(IMAGES[:, :1])[0]
    assert grey.shape == found.shape


def test_a_transformer_reads_images_of_another_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Dataset
) -> None:
    """The size and the classifier of the file differ from those of the features; 40 is not whole patches."""
    monkeypatch.setitem(MODELS, "clip", ("vit_tiny_patch16_224", 40))
    save_file(
        timm.create_model("vit_tiny_patch16_224", num_classes=5).state_dict(), tmp_path / "net.safetensors"
    )
    extractor = load_tokens("clip", tmp_path / "net.safetensors")
    features, logits = extract_features(extractor, IMAGES)
    assert features.shape == (3, 192) and logits.shape == (3, 0) and bool(features.isfinite().all())
    with pytest.raises(UserError, match="does not contain the weights of timm/convnextv2_base"):
        load_tokens("convnext", tmp_path / "net.safetensors")
    overrides = {"eval.fdr": "fdr6/clip", "eval.fdr_files": {"fdr6/clip": str(tmp_path / "net.safetensors")}}
    get_extractor.cache_clear()
    assert list(
        ratio_extractors(digits, resolve(RunRequest("sit", "vanilla", overrides=overrides)).eval)
    ) == ["fdr6/clip"]
    get_extractor.cache_clear()


def test_the_published_models_exist_in_timm_with_their_inputs() -> None:
    for name, (model, _) in MODELS.items():
        with torch.device("meta"):
            network: Any = timm.create_model(model, num_classes=0)
        prefix = getattr(network, "num_prefix_tokens", None)
        assert prefix == {"convnext": None, "siglip2": 0}.get(name, 1)
        assert (getattr(network, "attn_pool", None) is not None) == (name == "siglip2")


# Scores of image files


def test_scores_contain_fdr_from_images_and_from_statistics_files(tmp_path: Path) -> None:
    extractor = get_extractor("projections")
    networks = [CheapNetwork(), ExtractorNetwork("projections", extractor)]
    files = {name: tmp_path / f"{name}.npz" for name in ("samples", "real", "other")}
    sides = {}
    for seed, (name, file) in enumerate(files.items()):
        images = pictures(4 - 2 * seed, 60)
        np.savez(file, images)
        rows = torch.from_numpy(images).permute(0, 3, 1, 2)
        sides[name] = extract_features(extractor, rows)[0]
    write_statistics(open_images(files["real"]), networks, tmp_path / "statistics.npz")
    expected = theirs(sides["samples"], sides["real"]) / theirs(sides["other"], sides["real"])
    for reference in (files["real"], tmp_path / "statistics.npz"):
        report, _ = score_images(
            files["samples"], reference, networks, validation=files["other"], ratio=["projections"]
        )
        assert report.metrics["fdr60"] == pytest.approx(expected, rel=1e-4)
        assert "fd_dinov2_60" not in report.metrics
        assert report.protocol["fdr"] == ["projections"] and report.protocol["validation_count"] == 60
        assert report.protocol["networks"]["fdr projections"] == networks[1].label

    # References without the features of the extractor.
    write_statistics(open_images(files["real"]), networks[:1], tmp_path / "plain.npz")
    with pytest.raises(UserError, match="was made without 'fdr projections' features, not with projections"):
        load_reference(tmp_path / "plain.npz", networks)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(48), sigma=np.eye(48))
    with pytest.raises(UserError, match="has neither statistics of extractor 'projections' nor images"):
        score_images(
            files["samples"], tmp_path / "adm.npz", networks, validation=files["other"], ratio=["projections"]
        )


def test_scores_of_the_published_six_are_fdr6_and_use_inceptions_pool(tmp_path: Path) -> None:
    extractors = [ExtractorNetwork(name, get_extractor("projections")) for name in FDR6[1:]]
    networks = [CheapNetwork(), *extractors]
    samples, real, other = (
        measured(pictures(seed, 60), tmp_path / f"{seed}.npz", *networks) for seed in (4, 2, 0)
    )
    found = compute_scores(
        samples, reference_from(real), validation=reference_from(other), ratio=ratio_names(["fdr6"])
    ).metrics
    ratios = [
        frechet_distance(*samples.moments[space], *real.moments[space])
        / frechet_distance(*other.moments[space], *real.moments[space])
        for space in ("pool", "fdr fdr6/clip")
    ]
    assert found["fdr6_60"] == pytest.approx((ratios[0] + 5 * ratios[1]) / 6, rel=1e-9)


# Settings


def missing(**settings: Any) -> str:
    overrides = {f"eval.{name}": value for name, value in settings.items()}
    with pytest.raises(UserError) as caught:
        fdr6.require_cached(resolve(RunRequest("sit", "vanilla", overrides=overrides)).eval.fdr, "wait")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_weights_are_one_line_with_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fdr6, "cached_weights", lambda name: None)
    text = missing(fdr="fdr6")
    for model, _ in MODELS.values():
        assert f"hf download timm/{model} model.safetensors" in text
    assert "fdr6/clip, fdr6/convnext, fdr6/dinov2, fdr6/mae, fdr6/siglip2 are not in" in text
    assert "timm/resnet18" in missing(fdr=["timm/resnet18", "stbench-digits"])
    monkeypatch.setattr(fdr6, "cached_weights", lambda name: None if "clip" in name else Path("there"))
    assert "the weights of fdr6/clip are not" in missing(fdr="fdr6")


def test_settings_are_checked_and_stored_as_they_are_used(digits: Dataset, tmp_path: Path) -> None:
    def settings(**values: Any) -> Any:
        return resolve(
            RunRequest("sit", "vanilla", overrides={f"eval.{k}": v for k, v in values.items()})
        ).eval

    assert settings().fdr == [] and settings(fdr="fdr6").fdr == sorted(FDR6)
    assert settings(fdr="dinov2,fdr6/clip,dinov2").fdr == ["dinov2", "fdr6/clip"]
    files = settings(fdr=["dinov2"], fdr_files={"dinov2": "net.pth"}).fdr_files
    assert files == {"dinov2": str(Path("net.pth").absolute())}
    with pytest.raises(UserError, match=r"fdr_files names 'dino', which is not in eval.fdr.*did you mean"):
        settings(fdr=["dinov2"], fdr_files={"dino": "net.pth"})
    with pytest.raises(UserError, match="unknown extractor 'fdr6/clap'; did you mean 'fdr6/clip'"):
        ratio_extractors(digits, settings(fdr="fdr6/clap"))


def train(output: Path, **settings: Any) -> RunRecord:
    overrides = TINY | {"eval.samples": 20, "eval.points": [2], "eval.steps": 2, "eval.guidance": [1.0]}
    overrides |= {f"eval.{name}": value for name, value in settings.items()}
    request = RunRequest("sit-ti/2", "vanilla", steps=2, overrides=overrides)
    return engine.run(prepare(resolve(request)), engine.RunOptions(output))[0]


def test_a_run_records_fdr_and_its_extractors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(tmp_path / "plain")
    with_ratio = train(tmp_path / "ratio", fdr="stbench-digits,projections")
    last = with_ratio.curve[-1]
    assert last.metrics["fdr"] > 1.0 and "fdr" not in plain.curve[-1].metrics
    assert {k: v for k, v in last.metrics.items() if k != "fdr"} == plain.curve[-1].metrics
    assert with_ratio.setting_hash == plain.setting_hash and last.protocol != plain.curve[-1].protocol
    assert set(with_ratio.protocols[last.protocol]["fdr"]) == {"projections", "stbench-digits"}
    assert "fdr" not in plain.protocols[plain.curve[-1].protocol]

    # A run that an earlier version started has no such setting and continues; other extractors are refused.
    stored = RunFolder(Path(plain.path)).spec()
    del stored["eval"]["fdr"], stored["eval"]["fdr_files"]
    monkeypatch.setattr(RunFolder, "spec", lambda folder: stored)
    assert len(train(tmp_path / "plain").curve) == len(plain.curve)
    with pytest.raises(UserError, match="was started with other evaluation settings"):
        train(tmp_path / "plain", fdr="stbench-digits")
