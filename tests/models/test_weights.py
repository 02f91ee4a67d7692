"""Weight files: round trips, hashes and damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stbench.core.errors import UserError
from stbench.models.weights import load_weights, save_weights


def test_saved_weights_are_loaded_by_hash(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 2).T, "b": torch.arange(4)}
    file = tmp_path / "w.safetensors"
    sha256 = save_weights(state, file)
    loaded = load_weights(file, sha256)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)
    assert [f.name for f in tmp_path.iterdir()] == ["w.safetensors"]


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    sha256 = save_weights({"a": torch.randn(50)}, file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="damaged: expected sha256"):
        load_weights(file, sha256)
    with pytest.raises(UserError, match="truncated"):
        load_weights(file)
    with pytest.raises(UserError, match="not found"):
        load_weights(tmp_path / "none.safetensors")
