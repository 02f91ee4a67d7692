"""Autoencoders: rounding to uint8, finding them on disk, and refusing damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stbench.core.errors import UserError
from stbench.core.files import hash_file
from stbench.models.autoencoder import WEIGHTS, find_vae, to_float, to_uint8
from tests.datafiles import make_vae


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vae(tmp_path_factory.mktemp("vae"))


def test_rounding_clamps_and_rounds_to_the_nearest_level() -> None:
    levels = torch.tensor([-9.0, 0.4, 0.6, 1.4, 1.6, 127.4, 127.5, 254.4, 254.6, 300.0]) / 127.5 - 1.0
    assert to_uint8(levels).tolist() == [0, 0, 1, 1, 2, 127, 128, 254, 255, 255]


def test_rounding_inverts_the_conversion_of_every_level() -> None:
    levels = torch.arange(256).to(torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)


def test_a_folder_is_described_by_its_configuration(vae: Path) -> None:
    found = find_vae(str(vae))
    assert (found.channels, found.latent_channels, found.factor) == (3, 4, 8)
    assert (found.scale, found.shift) == (0.18215, 0.0)
    assert found.sha256 == hash_file(vae / "config.json", vae / WEIGHTS)


def test_a_folder_takes_precedence_over_a_published_name(
    tmp_path: Path, vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd-vae-ft-ema").symlink_to(vae)
    find_vae.cache_clear()
    found = find_vae("sd-vae-ft-ema")
    find_vae.cache_clear()
    assert (found.name, found.folder) == (str(vae), vae)


def test_truncated_weights_and_other_classes_are_refused(vae: Path, tmp_path: Path) -> None:
    config, weights = json.loads((vae / "config.json").read_text()), (vae / WEIGHTS).read_bytes()
    for name, change in (("truncated", {}), ("other", {"_class_name": "VQModel"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
        (tmp_path / name / WEIGHTS).write_bytes(weights[:-100])
    with pytest.raises(UserError, match="cannot load the autoencoder in .*truncated"):
        find_vae(str(tmp_path / "truncated")).load()
    with pytest.raises(UserError, match="expected diffusers' AutoencoderKL"):
        find_vae(str(tmp_path / "other"))
