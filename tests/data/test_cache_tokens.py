"""Cached tokens of an external encoder: written by `stbench data tokens`, used by the recipe repa."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from stbench.core.errors import UserError
from stbench.data.dataset import get_dataset
from stbench.data.prepare import PrepareOptions
from stbench.data.shards import open_array, read_manifest
from stbench.data.spec import DataSpec
from stbench.data.split import HELDOUT
from stbench.models.encoders import CachedTokens, ImageEncoder, find_encoder, open_encoder
from tests.conftest import Command
from tests.datafiles import column, make_repa, picture

ENCODER = "vit_tiny_patch16_224"
TOKENS = 4
"""32 pixels are 4x4 latents, which a backbone with patch size 2 sees as 2x2 tokens."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the encoder."""
    file = tmp_path_factory.mktemp("encoder") / "vit.safetensors"
    save_file(timm.create_model(ENCODER, num_classes=0).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def encoder(weights: Path) -> ImageEncoder:
    network = open_encoder(find_encoder(ENCODER, weights), TOKENS, torch.device("cpu"))
    assert isinstance(network, ImageEncoder)
    return network


def test_tokens_are_those_of_the_training_images_in_order(
    finished: PrepareOptions, weights: Path, encoder: ImageEncoder, tmp_path: Path, stbench: Command
) -> None:
    target = tmp_path / "tokens"
    command = ("data", "tokens", finished.source, finished.target, target)
    options = ("--encoder", ENCODER, "--checkpoint", weights, "--batch", 25)
    code, out, err = stbench(*command, *options)
    assert code == 0, err
    assert "tokens of 57 images" in out and f"--set recipe.encoder={target}" in out
    # Pixels of the references are in the data set: compare their tokens.
    manifest = read_manifest(finished.target)
    parts = [open_array(manifest, finished.target, shard, "split") for shard in manifest.shards]
    split = np.concatenate(parts)
    pixels = column(finished.target, "images")[split[split > 0] != HELDOUT]
    rows = np.flatnonzero(split[split != HELDOUT])
    with torch.no_grad():
        expected = encoder.tokens(torch.from_numpy(pixels))
    cached = open_encoder(find_encoder(str(target)), TOKENS, torch.device("cpu"))
    assert isinstance(cached, CachedTokens)
    assert torch.allclose(cached.rows(torch.from_numpy(rows), 57), expected, atol=2e-3)
    # With the class token, there is one row more per image.
    code, _, err = stbench(*command[:-1], tmp_path / "more", *options, "--class-token")
    assert code == 0, err
    more = np.load(tmp_path / "more" / "tokens.npy")
    assert np.array_equal(more[:, 1:], np.load(target / "tokens.npy"))
    # A second call does not overwrite them.
    code, _, err = stbench(*command, *options)
    assert code == 2 and "already contains tokens; delete it" in err


def test_tokens_of_an_imported_folder_are_read_from_its_images(
    vae: Path, weights: Path, encoder: ImageEncoder, tmp_path: Path, stbench: Command
) -> None:
    folder, prepared, target = (
        make_repa(tmp_path / "repa", 30, latent=4),
        tmp_path / "set",
        tmp_path / "tokens",
    )
    code, _, err = stbench("data", "import", folder, prepared, "--vae", vae, "--references", 5)
    assert code == 0, err
    code, _, err = stbench(
        "data", "tokens", folder, prepared, target, "--encoder", ENCODER, "--checkpoint", weights
    )
    assert code == 0, err
    data = get_dataset("custom", DataSpec(path=str(folder), vae=str(vae), flip=False))
    with torch.no_grad():
        expected = encoder.tokens(data.images(torch.arange(3)))
    found = torch.from_numpy(np.load(target / "tokens.npy"))
    assert torch.allclose(found[:3].float(), expected, atol=2e-3)


def test_images_of_repas_layout_are_mirrored_with_their_rows(vae: Path, tmp_path: Path) -> None:
    data = get_dataset("custom", DataSpec(path=str(make_repa(tmp_path / "repa", 30)), vae=str(vae)))
    rows = torch.arange(3)
    assert torch.equal(data.images(rows + data.size), data.images(rows).flip(-1))


def test_a_prepared_set_has_no_images_for_an_encoder(finished: PrepareOptions) -> None:
    data = get_dataset("custom", DataSpec(path=str(finished.target)))
    with pytest.raises(UserError, match=r"no images for an encoder; .* --set recipe\.encoder=FOLDER"):
        data.images(torch.arange(2))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("gone", r"'class0/.*' is missing \(6 of 57\); give the original source"),
        ("other", "is not the one that .* was made from; give the original source"),
        ("damaged", "is no longer readable .*; restore it"),
        ("patch", "--patch must be a divisor of 4, the size of the latents, got 3"),
        ("encoder", "unknown encoder 'vit_huge'"),
        ("full", "not enough disk space in .*tokens"),
    ],
)
def test_wrong_images_and_options_are_refused(
    finished: PrepareOptions,
    weights: Path,
    tmp_path: Path,
    stbench: Command,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    message: str,
) -> None:
    images, options = finished.source, ["--encoder", ENCODER, "--checkpoint", weights]
    if case in ("gone", "other", "damaged"):
        images = shutil.copytree(images, tmp_path / "images")
    for file in sorted(images.rglob("*.*g")):
        if case == "other":
            picture(999, 64, 64).save(file)
        elif case == "damaged":
            file.write_bytes(b"no image")
        elif case == "gone" and file.parent.name == "class0":
            file.unlink()
    if case == "patch":
        options += ["--patch", 3]
    if case == "encoder":
        options = ["--encoder", "vit_huge"]
    if case == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    code, _, err = stbench("data", "tokens", images, finished.target, tmp_path / "tokens", *options)
    assert code == 2 and re.search(message, err.replace("\n", " ")), err
    assert not (tmp_path / "tokens" / "tokens.json").exists()
