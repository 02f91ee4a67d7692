"""Weight files: our own (safetensors, atomic, checked by hash), and the official ones of each family."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from stbench.contracts import Backbone, Features
from stbench.errors import UserError
from stbench.registry import BACKBONES, lookup

State = Mapping[str, Tensor]

HEADS = ("projectors.", "projectors_final.", "ap_head.")
"""Prefixes under which official checkpoints keep the heads of a recipe beside the network (REPA, SRA)."""


def save_weights(state: State, file: Path) -> str:
    """Write tensors to a safetensors file, whole or not at all; returns the file's sha256."""
    data = safetensors.torch.save({key: value.detach().cpu().contiguous() for key, value in state.items()})
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself survive a power cut
    finally:
        os.close(folder)
    return hashlib.sha256(data).hexdigest()


def load_weights(file: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file to the host.

    Raises UserError if it is missing, unreadable, or not the file whose `sha256` was recorded.
    """
    if not file.is_file():
        raise UserError(f"weights not found: {file}; expected a safetensors file")
    data = file.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        raise UserError(
            f"{file} is damaged: expected sha256 {sha256[:12]}, found {found[:12]}; delete it and run again"
        )
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise UserError(
            f"{file} is truncated or no safetensors file ({error}); delete it and run again"
        ) from error


class TimeReversed(Backbone):
    """A velocity network trained with noise at 0 and data at 1 (upstream SiT), in our direction of time.

    Time becomes 1-t and the velocity changes its sign; features are those of the network inside.
    """

    def __init__(self, inner: Backbone) -> None:
        super().__init__()
        self.inner, self.info, self.time_scale = inner, inner.info, inner.time_scale

    def forward_intermediates(
        self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int] = (), stop_early: bool = False
    ) -> tuple[Tensor | None, Features]:
        """See `Backbone.forward_intermediates`."""
        prediction, features = self.inner.forward_intermediates(
            x, 1.0 - t.double(), y, indices=indices, stop_early=stop_early
        )
        return None if prediction is None else -prediction, features


def load_official(
    source: Path | Mapping[str, Any], family: str, *, heads: int | None = None, noise_at_zero: bool = False
) -> tuple[Backbone, dict[str, Tensor]]:
    """A network with official weights, configured from their shapes, and the heads stored beside it.

    `source` is a .pt or .safetensors file or what it holds: a flat state dict, or one wrapped under "ema"
    (preferred) or "model". `heads` is needed where neither the shapes nor the published sizes tell it;
    `noise_at_zero` wraps a network of upstream SiT's direction of time. Raises UserError for an unreadable
    file and for keys or shapes that are not this family's.
    """
    state = _unwrap(_read(source) if isinstance(source, Path) else source)
    stored_heads = {key: value for key, value in state.items() if key.startswith(HEADS)}
    state = {key: value for key, value in state.items() if key not in stored_heads}
    cls = lookup(BACKBONES, family)
    try:
        net: Backbone = cls(**cls.infer(state, heads))
    except KeyError as error:
        raise UserError(
            f"expected the weights of a {family}, found none under {error}; name another family"
        ) from error
    _require_same_keys(set(net.state_dict()), set(state), family)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"weights do not fit {family}: {str(error).splitlines()[-1].strip()}") from error
    return TimeReversed(net) if noise_at_zero else net, stored_heads


def _require_same_keys(expected: set[str], found: set[str], family: str) -> None:
    for what, keys in (("unknown", found - expected), ("missing", expected - found)):
        if keys:
            named = ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise UserError(
                f"expected the weights of a {family}, found {what} keys: {named}; name another family"
            )


def _unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    for wrapper in ("ema", "model"):
        if isinstance(content.get(wrapper), Mapping):
            return dict(content[wrapper])
    return dict(content)


def _read(file: Path) -> Mapping[str, Any]:
    if file.suffix == ".safetensors":
        return load_weights(file)
    if not file.is_file():
        raise UserError(f"weights not found: {file}; expected a .pt or .safetensors file")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{file} is truncated or no plain weight file ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"expected a state dict in {file}, found {type(content).__name__}; export one first")
    return content
