"""The shipped weights of the digits networks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from stbench.core.errors import UserError
from stbench.models.assets import asset_folder, load_asset

ASSETS = ("digits_vae", "digits_classifier", "digits_encoder")


def copy_assets(folder: Path) -> Path:
    for name in ("digits.json", *(f"{asset}.safetensors" for asset in ASSETS)):
        shutil.copy(asset_folder() / name, folder / name)
    return folder


@pytest.mark.parametrize("name", ASSETS)
def test_a_changed_byte_is_refused(name: str, tmp_path: Path) -> None:
    path = copy_assets(tmp_path) / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=rf"asset {name}\.safetensors is damaged: expected sha256 [0-9a-f]{{64}}, found"
    ):
        load_asset(name, tmp_path)


def test_a_missing_asset_and_a_damaged_manifest_are_refused(tmp_path: Path) -> None:
    copy_assets(tmp_path)
    (tmp_path / "digits_vae.safetensors").unlink()
    with pytest.raises(UserError, match=r"digits_vae\.safetensors is missing"):
        load_asset("digits_vae", tmp_path)
    (tmp_path / "digits.json").write_text("{")
    with pytest.raises(UserError, match=r"digits\.json is missing or damaged"):
        load_asset("digits_vae", tmp_path)


def test_weights_load_as_float32_and_are_small() -> None:
    assert all(tensor.dtype == torch.float32 for name in ASSETS for tensor in load_asset(name).values())
    assert sum((asset_folder() / f"{name}.safetensors").stat().st_size for name in ASSETS) < 1.5e6
