"""Our own weight files: safetensors, written atomically and verified by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from stbench.core.errors import UserError
from stbench.core.files import atomic_write, hash_file

State = Mapping[str, Tensor]
"""Tensors by name."""


def save_weights(state: State, file: Path, metadata: dict[str, str] | None = None) -> str:
    """Write tensors to a safetensors file atomically; returns the file's sha256."""
    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    data = safetensors.torch.save(plain, metadata)
    atomic_write(file, data)
    return hashlib.sha256(data).hexdigest()


def load_weights(file: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU.

    Raises UserError if the file is missing, unreadable, or not the one whose `sha256` was recorded.
    """
    if not file.is_file():
        raise UserError(f"weights not found: {file}; expected a safetensors file")
    data = file.read_bytes()
    if sha256 is not None:
        _require_hash(file, hashlib.sha256(data).hexdigest(), sha256)
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise UserError(
            f"{file} is truncated or not a safetensors file ({error}); delete it and run again"
        ) from error


def verify_file(file: Path, sha256: str | None) -> None:
    """Raise UserError unless the bytes of a file have the recorded `sha256`; None accepts any."""
    if sha256 is not None:
        _require_hash(file, hash_file(file), sha256)


def _require_hash(file: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"{file} is damaged: expected sha256 {expected[:12]}, found {found[:12]}; "
            f"restore the file, or delete the run folder and run again"
        )


def require_finite(state: State, where: str, remedy: str) -> None:
    """Raise UserError, which names the first tensor, if a tensor contains NaN or an infinite value."""
    for name, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            kind = "NaN" if bool(value.isnan().any()) else "infinite values"
            raise UserError(f"{where} contains {kind} in '{name}'; {remedy}")


def tensors_sha256(state: State) -> str:
    """Return a hash of names, types, shapes and values, independent of the file format and the order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
