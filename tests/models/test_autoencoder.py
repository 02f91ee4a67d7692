"""Autoencoders: rounding to uint8, finding them on disk, and refusing damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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


def changed(vae: Path, folder: Path, change: Callable[[dict[str, Tensor]], object], **config: Any) -> Path:
    """A copy of an autoencoder with other weights or another configuration."""
    folder.mkdir()
    state = load_file(vae / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(json.loads((vae / "config.json").read_text()) | config))
    return folder


KEY = "decoder.conv_in.weight"
CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda state: state.pop(KEY), f"has missing weights, {KEY}; download it again"),
    "unknown": (lambda state: state.update(extra=torch.zeros(1)), "has unexpected weights, extra"),
    "nan": (lambda state: state[KEY].fill_(float("nan")), f"contains NaN in '{KEY}'"),
    "infinite": (lambda state: state[KEY].fill_(float("inf")), f"contains infinite values in '{KEY}'"),
    "another shape": (lambda state: state.update({KEY: torch.zeros(3, 3)}), "cannot load the autoencoder"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_do_not_fill_the_network_are_refused(vae: Path, tmp_path: Path, name: str) -> None:
    """diffusers draws missing weights at random and only warns."""
    change, message = CHANGES[name]
    with pytest.raises(UserError, match=message):
        find_vae(str(changed(vae, tmp_path / "changed", change))).load()


@pytest.mark.parametrize(
    "config,message",
    [
        ({"block_out_channels": [10**6] * 4}, "weights, more than "),
        ({"layers_per_block": 60}, "weights, more than "),
        ({"layers_per_block": 10**9}, "unexpected layers_per_block"),
        ({"norm_num_groups": 7}, "does not describe an AutoencoderKL"),
        ({"down_block_types": ["X"] * 4}, "does not describe an AutoencoderKL"),
    ],
)
def test_a_configuration_beyond_its_weights_is_refused_before_it_is_built(
    vae: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        find_vae(str(changed(vae, tmp_path / "changed", lambda state: None, **config))).load()


def test_attention_under_its_former_names_is_loaded(vae: Path, tmp_path: Path) -> None:
    """The published files have these names, which diffusers translates."""

    def rename(state: dict[str, Tensor]) -> None:
        former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for key in [key for key in state if ".attentions." in key]:
            name = next((new for new in former if f".{new}." in key), None)
            if name is not None:
                state[key.replace(f".{name}.", f".{former[name]}.")] = state.pop(key)
        assert any("proj_attn" in key for key in state)

    renamed, images = changed(vae, tmp_path / "former", rename), torch.randn(1, 3, 64, 64)
    found, expected = (find_vae(str(folder)).load().moments(images) for folder in (renamed, vae))
    assert torch.equal(found, expected)
