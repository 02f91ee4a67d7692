"""Frozen encoders: preprocessing, identity, cached tokens and their checks."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from stbench.core.errors import UserError
from stbench.data.dataset import get_dataset
from stbench.models import encoders
from stbench.models.timm_models import DINOV2
from tests.weights import cache_digits, random_vit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_vit(tmp_path_factory.mktemp("vit") / "vit.safetensors")


def test_the_digits_encoder_reads_digits() -> None:
    data = get_dataset("digits")
    encoder = encoders.open_encoder(encoders.find_encoder("digits"), 16, CPU)
    assert isinstance(encoder, encoders.ImageEncoder)
    images = data.heldout_images()
    with torch.no_grad():
        features = encoder.network.forward_features(images.float() / 127.5 - 1.0)
        right = encoder.network.forward_head(features).argmax(1) == data.heldout()[1]
    assert right.double().mean() > 0.95


def test_encoder_input_normalises_and_enlarges() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    white = encoders.encoder_input(torch.full((1, 1, 32, 32), 255, dtype=torch.uint8), 64, mean, std)
    assert white.shape == (1, 3, 64, 64)
    expected = (1 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(white.mean((0, 2, 3)), expected)


def test_dinov2_is_normalised_as_imagenet() -> None:
    config = timm.create_model(DINOV2.replace("base", "small"), pretrained=False).pretrained_cfg
    assert (config["mean"], config["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_the_path_of_weights_is_no_part_of_a_source(vit: Path) -> None:
    moved = vit.with_name("moved.safetensors")
    moved.write_bytes(vit.read_bytes())
    assert encoders.find_encoder("vit_tiny_patch16_224", vit) == encoders.find_encoder(
        "vit_tiny_patch16_224", moved
    )


def test_weights_that_are_not_here_name_the_download() -> None:
    missing = encoders.find_encoder("vit_tiny_patch16_224.augreg_in21k")
    with pytest.raises(
        UserError, match=r"downloads nothing; type `hf download timm/vit_tiny_patch16_224\.augreg"
    ):
        encoders.open_encoder(missing, 16, CPU)


def test_nothing_is_downloaded_also_when_the_hub_is_online(monkeypatch: pytest.MonkeyPatch) -> None:
    contacted: list[object] = []

    def connect(self: socket.socket, address: object) -> None:
        contacted.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *host, **options: contacted.append(host))
    for name in ("vit_tiny_patch16_224", DINOV2, "hf-hub:timm", "hf_hub:timm", "local-dir:x"):
        with pytest.raises(UserError):
            encoders.open_encoder(encoders.find_encoder(name), 16, CPU)
    assert not contacted


def test_weights_in_the_hugging_face_cache_are_found(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = tmp_path / "models--timm--vit_tiny_patch16_224.augreg_in21k_ft_in1k" / "snapshots" / "0"
    revision.mkdir(parents=True)
    (revision / "model.safetensors").write_bytes(vit.read_bytes())
    (revision.parents[1] / "refs").mkdir()
    (revision.parents[1] / "refs" / "main").write_text("0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    name = "vit_tiny_patch16_224"
    cached = encoders.open_encoder(encoders.find_encoder(name), 16, CPU)
    given = encoders.open_encoder(encoders.find_encoder(name, vit), 16, CPU)
    assert isinstance(cached, encoders.ImageEncoder) and isinstance(given, encoders.ImageEncoder)
    states = cached.network.state_dict(), given.network.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_an_encoder_of_another_grid_is_refused() -> None:
    with pytest.raises(UserError, match="encoder 'digits' gives 16 tokens, the backbone has 64"):
        encoders.open_encoder(encoders.find_encoder("digits"), 64, CPU)


def test_a_cache_of_another_number_of_images_is_not_made(tmp_path: Path) -> None:
    encoder = encoders.open_encoder(encoders.find_encoder("digits"), 16, CPU)
    assert isinstance(encoder, encoders.ImageEncoder)
    images = get_dataset("digits").train_images()[:6]
    for count in (5, 7):
        with pytest.raises(UserError, match=f"expected {count} images, found"):
            encoders.cache_tokens(tmp_path, encoder, torch.split(images, 4), count)
        assert not (tmp_path / "tokens.json").exists()


def test_class_tokens_are_cached_before_the_patch_tokens(vit: Path, tmp_path: Path) -> None:
    encoder = encoders.open_encoder(encoders.find_encoder("vit_tiny_patch16_224", vit), 16, CPU)
    assert isinstance(encoder, encoders.ImageEncoder)
    images = torch.randint(256, (3, 3, 64, 64), generator=torch.manual_seed(0), dtype=torch.uint8)
    encoders.cache_tokens(tmp_path, encoder, [images], 3, class_token=True)
    cached = encoders.open_encoder(encoders.find_encoder(str(tmp_path)), 16, CPU)
    assert isinstance(cached, encoders.CachedTokens)
    with torch.no_grad():
        inputs = encoders.encoder_input(images, 64, (0.5,) * 3, (0.5,) * 3)
        expected = encoder.network.forward_features(inputs)
    torch.testing.assert_close(cached.rows(torch.arange(3), 3), expected[:, 1:], atol=2e-3, rtol=1e-3)
    both = cached.rows(torch.arange(3), 3, class_token=True)
    torch.testing.assert_close(both, expected, atol=2e-3, rtol=1e-3)


def test_a_cache_without_class_tokens_says_so(tmp_path: Path) -> None:
    folder = cache_digits(tmp_path / "tokens")
    manifest = json.loads((folder / "tokens.json").read_text())
    del manifest["class_token"]  # as earlier versions wrote it
    (folder / "tokens.json").write_text(json.dumps(manifest))
    cached = encoders.open_encoder(encoders.find_encoder(str(folder)), 16, CPU)
    assert isinstance(cached, encoders.CachedTokens)
    assert cached.rows(torch.arange(2), 1500).shape == (2, 16, 96)
    with pytest.raises(UserError, match=r"found patch tokens only; cache them again with .*--class-token"):
        cached.rows(torch.arange(2), 1500, class_token=True)
    encoder = encoders.open_encoder(encoders.find_encoder("digits"), 16, CPU)
    assert isinstance(encoder, encoders.ImageEncoder)
    with pytest.raises(UserError, match="encoder 'digits' has no class token; leave out --class-token"):
        encoders.cache_tokens(tmp_path, encoder, [], 0, class_token=True)


def test_damaged_caches_are_refused(tmp_path: Path) -> None:
    folder = cache_digits(tmp_path / "tokens")
    spec = encoders.find_encoder(str(folder))
    with pytest.raises(UserError, match=r"contains 16 tokens per image, the backbone has 64"):
        encoders.open_encoder(spec, 64, CPU)
    tokens = np.load(folder / "tokens.npy")
    np.save(folder / "tokens.npy", tokens[:-1])
    with pytest.raises(UserError, match="is damaged"):
        encoders.find_encoder(str(folder))
    (folder / "tokens.npy").unlink()
    with pytest.raises(UserError, match=r"lacks tokens\.npy"):
        encoders.find_encoder(str(folder))
    (folder / "tokens.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(UserError, match=r"tokens\.json is damaged"):
        encoders.find_encoder(str(folder))


class Malicious:
    """Would write a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("pwned", "w")


@pytest.mark.parametrize("place", ["value", "beside"])
def test_code_in_a_file_of_weights_is_not_executed(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """timm 1.0.21 unpickles a file with the code in it."""
    monkeypatch.chdir(tmp_path)
    state = load_file(vit)
    content = {"state_dict": state, "epoch": Malicious()} if place == "beside" else state | {"x": Malicious()}
    torch.save(content, "vit.pth")
    with pytest.raises(UserError, match="contains the Python object .*open, which could run code"):
        encoders.open_encoder(encoders.find_encoder("vit_tiny_patch16_224", Path("vit.pth")), 16, CPU)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("key", ["", "state_dict", "model", "state_dict_ema"])
def test_weights_load_from_every_layout_of_timm(vit: Path, tmp_path: Path, key: str) -> None:
    state = load_file(vit)
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "vit.pth")
    found, given = (
        encoders.open_encoder(encoders.find_encoder("vit_tiny_patch16_224", file), 16, CPU)
        for file in (tmp_path / "vit.pth", vit)
    )
    assert isinstance(found, encoders.ImageEncoder) and isinstance(given, encoders.ImageEncoder)
    states = found.network.state_dict(), given.network.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_weights_that_are_not_finite_or_are_damaged_are_refused(vit: Path, tmp_path: Path) -> None:
    state, file = load_file(vit), tmp_path / "vit.pth"
    torch.save(state | {"norm.bias": torch.full_like(state["norm.bias"], float("nan"))}, file)
    source = encoders.find_encoder("vit_tiny_patch16_224", file)
    with pytest.raises(UserError, match=r"vit\.pth contains NaN in 'norm\.bias'; use another file"):
        encoders.open_encoder(source, 16, CPU)
    torch.save(state, file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: the CRC of its record"):
        encoders.open_encoder(source, 16, CPU)
