"""Inception and DINOv2: what they compute, and the files that they are loaded from."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from stbench.core.errors import UserError
from stbench.evaluate.feature_networks import INCEPTION_FILE, Inception, load_dino, load_inception
from tests.measuring import pictures


@pytest.fixture(scope="module")
def inception(inception_file: tuple[Path, str]) -> Inception:
    return load_inception(*inception_file)


def test_features_are_those_that_hooks_on_the_original_graph_see(inception: Inception) -> None:
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


class SmallInception(nn.Module):
    """The part of torch-fidelity's Inception that ours reads."""

    def __init__(self) -> None:
        super().__init__()
        self.Mixed_6d = nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.Mixed_6d(images.float())
        return seen.mean((2, 3)), seen.amax((2, 3))


def tensors_alive() -> int:
    gc.collect()
    return sum(type(thing) is Tensor for thing in gc.get_objects())


def test_no_features_accumulate_over_calls() -> None:
    network = Inception(SmallInception(), "small")  # type: ignore[arg-type]
    images = torch.arange(2 * 9 * 2 * 2).view(2, 9, 2, 2)
    before = tensors_alive()
    for _ in range(3):
        network.net(images)  # as the evaluations of a training run do, through `get_extractor`
        found = network(images)
    expected = images[:, :7].permute(0, 2, 3, 1).flatten(1).float()
    assert torch.equal(found["spatial"], expected)
    del found, expected
    assert tensors_alive() == before and not network.net.Mixed_6d._forward_hooks


def test_building_inception_leaves_the_random_state_unchanged(inception_file: tuple[Path, str]) -> None:
    before = torch.get_rng_state()
    load_inception(*inception_file)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_wrong_hash_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    file = tmp_path / INCEPTION_FILE
    file.write_bytes(b"cos\nsystem\n(S'touch harmed'\ntR.")
    with pytest.raises(
        UserError, match=r"expected sha256 6726825d..., found [0-9a-f]{16}...; fetch it again"
    ):
        load_inception(file)
    own = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(UserError, match="does not contain the weights of Inception"):
        load_inception(file, own)  # no pickle is run even if its hash was given
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


def test_dino_reads_metas_files_for_518_pixels(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        state = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    state["mask_token"] = torch.zeros(1, 384)
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    net = load_dino(tmp_path / "dinov2_vits14_pretrain.pth")
    assert net.net.pos_embed.shape == (1, 257, 384)


def test_missing_or_foreign_dino_is_one_line(tmp_path: Path, inception_file: tuple[Path, str]) -> None:
    with pytest.raises(
        UserError, match=r"`hf download timm/vit_large_patch14_dinov2.lvd142m model.safetensors"
    ):
        load_dino(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="does not contain the weights of DINOv2 .no cls_token"):
        load_dino(inception_file[0])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0")
    with pytest.raises(UserError, match="does not contain the weights of DINOv2"):
        load_dino(tmp_path / "cut.safetensors")
