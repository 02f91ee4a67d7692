"""Extractors by name: timm, torchvision and plug-ins, their weights, and runs evaluated with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from stbench.config.plan import prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.core.errors import UserError
from stbench.core.files import hash_file
from stbench.core.registry import DATASETS, EXTRACTORS
from stbench.data.dataset import Dataset, get_dataset
from stbench.evaluate.extractors import extract_features, extractor_hash, get_extractor, run_extractor
from stbench.evaluate.metrics import compute_metrics
from stbench.runs.records import RunRecord
from stbench.train import engine
from tests.conftest import TINY
from tests.datafiles import make_images
from tests.measuring import with_extractor

IMAGES = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class MeanColour(nn.Module):
    """Features (B,12): the mean colours of four quarters. Draws random weights, and has no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


class Wrong(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float()


class Broken(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        raise IndexError("index 3 is out of bounds")


for name, kind in {"mean-colour": MeanColour, "wrong": Wrong, "broken": Broken}.items():
    if name not in EXTRACTORS.module_dict:
        EXTRACTORS.register_module(name=name, module=kind)


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier of ten classes with random weights."""
    file = tmp_path_factory.mktemp("timm") / "net.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), file)
    return file


def test_a_timm_classifier_gives_the_input_of_its_last_layer_and_logits(timm_file: Path) -> None:
    extractor: Any = get_extractor("timm/test_resnet", timm_file)
    features, logits = extract_features(extractor, IMAGES)
    network = extractor.network
    assert logits.shape == (6, 10) and features.shape == (6, network.num_features)
    head = network.get_classifier()
    assert torch.allclose(head(features.float()), logits.float(), atol=1e-5)
    grey, _ = extract_features(extractor, IMAGES[:, :1])
    assert grey.shape == features.shape


def test_the_batch_size_is_an_option_and_not_part_of_the_hash(timm_file: Path) -> None:
    extractor = get_extractor("timm/test_resnet", timm_file)
    one, _ = extract_features(extractor, IMAGES, batch=1)
    all_at_once, _ = extract_features(extractor, IMAGES)
    assert torch.allclose(one, all_at_once, atol=1e-5)


def test_a_torchvision_classifier(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        net = torchvision.models.get_model("shufflenet_v2_x0_5", weights=None, num_classes=7)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    extractor = get_extractor("torchvision/shufflenet_v2_x0_5", tmp_path / "net.pth")
    features, logits = extract_features(extractor, IMAGES[:2])
    assert features.shape == (2, 1024) and logits.shape == (2, 7)


def test_weights_size_and_layer_are_part_of_the_identity(timm_file: Path, tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=10).state_dict()
    save_file(state, tmp_path / "other.safetensors")
    first, other = (get_extractor("timm/test_resnet", f) for f in (timm_file, tmp_path / "other.safetensors"))
    assert extractor_hash(first) != extractor_hash(other)
    before = extractor_hash(first)
    first._size = 96  # type: ignore[attr-defined]
    assert extractor_hash(first) != before
    first._size = 160  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inception", "unknown feature extractor 'inception'; did you mean 'inception-v3-compat'"),
        ("vgg16", "unknown feature extractor 'vgg16'"),  # torch-fidelity would download and unpickle it
        ("timm/nothing", "unknown timm model 'nothing'"),
        ("torchvision/nothing", "unknown torchvision model 'nothing'"),
        (
            "timm/resnet18",
            r"weights of extractor 'timm/resnet18' are not in the local cache.*hf download timm/",
        ),
        ("torchvision/resnet18", r"torchvision/resnet18' are not in the local cache.*download.pytorch.org"),
        ("dinov2", r"vit_large_patch14_dinov2.lvd142m' are not in the local cache"),
        ("wrong", r"must return features \(2,D\) for 2 images, found \(2, 1, 32, 32\)"),
        ("broken", r"extractor 'broken' cannot measure images of 1x32x32 .IndexError: index 3 is out of"),
    ],
)
def test_what_cannot_be_used_is_said_before_training(
    digits: Dataset, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    settings = resolve(RunRequest("sit", "vanilla", overrides={"eval.extractor": name})).eval
    with pytest.raises(UserError, match=message) as caught:
        run_extractor(digits, settings)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_refused(timm_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not contain the weights of timm/test_vit"):
        get_extractor("timm/test_vit", timm_file)
    with pytest.raises(UserError, match=r"expected sha256 abc\.\.\., found"):
        get_extractor("timm/test_resnet", timm_file, "abc")
    assert get_extractor("timm/test_resnet", timm_file, hash_file(timm_file)[:8])
    state = timm.create_model("test_resnet", num_classes=10).state_dict()
    state["conv1.0.weight" if "conv1.0.weight" in state else "conv1.weight"][0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match="contain values that are not finite"):
        get_extractor("timm/test_resnet", tmp_path / "nan.safetensors")


def test_a_plug_in_does_not_change_the_random_numbers_of_a_run() -> None:
    before = torch.random.get_rng_state()
    get_extractor.cache_clear()
    get_extractor("mean-colour")
    assert torch.equal(torch.random.get_rng_state(), before)


def train(data: Path, output: Path, **settings: Any) -> RunRecord:
    options = TINY | {"eval.samples": 10, "eval.points": [2], "data.vae": "none", "backbone.patch": 4}
    options |= {f"eval.{name}": value for name, value in settings.items()}
    request = RunRequest("sit-ti/2", "vanilla", "custom", data=str(data), steps=2, overrides=options)
    return engine.run(prepare(resolve(request)), engine.RunOptions(output))[0]


def test_runs_on_photographs_with_a_plug_in_and_with_timm(timm_file: Path, tmp_path: Path) -> None:
    data = make_images(tmp_path / "photographs", 40, 16)
    mine = train(data, tmp_path / "mine", extractor="mean-colour")
    assert mine.curve[-1].metrics["fid"] > 0 and "is" not in mine.curve[-1].metrics
    theirs = train(
        data,
        tmp_path / "theirs",
        extractor="timm/test_resnet",
        extractor_file=str(timm_file),
        extractor_batch=8,
    )
    assert theirs.curve[-1].metrics.keys() >= {"fid", "fid_all", "is", "accuracy"}
    assert mine.curve[-1].protocol != theirs.curve[-1].protocol
    assert mine.setting_hash == theirs.setting_hash
    # Another batch size is the same run; another extractor is not.
    again = train(
        data,
        tmp_path / "theirs",
        extractor="timm/test_resnet",
        extractor_file=str(timm_file),
        extractor_batch=2,
    )
    assert len(again.curve) == len(theirs.curve)
    with pytest.raises(UserError, match="was started with other evaluation settings"):
        train(data, tmp_path / "theirs", extractor="mean-colour")


def test_metrics_that_do_not_apply_are_left_out(digits: Dataset, tmp_path: Path) -> None:
    images = digits.train_images()[:20]
    only = with_extractor(digits, "stbench-digits", references={"train": digits.train_images})
    assert compute_metrics(images, only, ["fid", "fid_all"], cache_dir=tmp_path).keys() == {"fid"}


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ({}, "must have a reference set 'train'"),
        ({"train": 3}, "must have a reference set 'train'"),
        (None, "has no attribute 'references'"),
        ([], "must have a reference set 'train'"),
    ],
)
def test_a_data_set_without_its_references_fails_when_it_is_opened(references: Any, message: str) -> None:
    digits = DATASETS.module_dict["digits"]

    class Odd(digits):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.references = references

    DATASETS.register_module(name="odd", module=Odd, force=True)
    try:
        with pytest.raises(UserError, match=message):
            get_dataset("odd")
    finally:
        del DATASETS.module_dict["odd"]
