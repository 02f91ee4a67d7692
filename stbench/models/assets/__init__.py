"""The shipped weights of the digits networks, checked against their hashes when they are loaded."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from stbench.core.errors import UserError


def asset_folder() -> Path:
    """Return the folder of the shipped weights."""
    return Path(str(files("stbench.models.assets")))


def asset_manifest(folder: Path | None = None) -> dict[str, Any]:
    """Read digits.json: hash, training settings and measured quality of every shipped network."""
    path = (folder or asset_folder()) / "digits.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"asset digits.json is missing or damaged ({error}); reinstall stbench") from error


def load_asset(name: str, folder: Path | None = None) -> dict[str, Tensor]:
    """Load the weights of a shipped network as float32.

    Raises UserError if the file is missing, or if its sha256 is not the one in digits.json.
    """
    from safetensors.torch import load

    folder = folder or asset_folder()
    expected = asset_manifest(folder)["assets"][name]["sha256"]
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise UserError(f"asset {path.name} is missing: expected it in {folder}; reinstall stbench")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise UserError(
            f"asset {path.name} is damaged: expected sha256 {expected}, found {found}; reinstall stbench"
        )
    return {key: tensor.float() for key, tensor in load(content).items()}
