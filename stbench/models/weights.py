"""Weight files: ours (safetensors, atomic, verified by hash), and those of other programs, read as data."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from stbench.core.backbone import Weights
from stbench.core.errors import UserError
from stbench.core.files import atomic_write, hash_file

State = Mapping[str, Tensor]
"""Tensors by name."""
CHECKPOINT_KEYS = {"ema": "ema", "raw": "model"}
"""Our name for a set of weights -> the key under which official training checkpoints store it."""


# --- Our own files ---


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


# --- Files of other programs ---


@dataclass(frozen=True)
class ExternalWeights:
    """The contents of another program's weight file."""

    state: State
    """The chosen tensors by name, memory-mapped where the file format allows it."""
    where: str
    """The file and the key inside it, for messages."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The training options stored with the weights under "args"; empty if there are none."""


def read_external(file: Path, weights: Weights = "ema") -> ExternalWeights:
    """Read a .pt or .safetensors file that contains a state dict, or a training checkpoint.

    A training checkpoint has state dicts under "ema" and "model", and options under "args". No code in the
    file is executed: besides tensors, argparse.Namespace is the only Python object allowed. Raises UserError
    for a file that is missing or truncated, that contains another object, or that lacks the chosen `weights`.
    """
    if not file.is_file():
        raise UserError(f"weights not found: {file}; expected a .pt or .safetensors file")
    content: Any = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    if not isinstance(content, Mapping):
        raise UserError(f"expected a state dict in {file}, found {type(content).__name__}; save one first")

    # A flat state dict.
    found = [key for key in CHECKPOINT_KEYS.values() if isinstance(content.get(key), Mapping)]
    if not found:
        return ExternalWeights(_plain(content, str(file)), str(file))

    # A training checkpoint.
    key = CHECKPOINT_KEYS[weights]
    if key not in found:
        other = next(name for name, stored in CHECKPOINT_KEYS.items() if stored == found[0])
        raise UserError(
            f"expected '{key}' weights in {file}, found only '{found[0]}'; type --init-weights {other}, "
            f"or with `stbench sample` --weights {other}"
        )
    args = content.get("args")
    settings = vars(args) if isinstance(args, argparse.Namespace) else args
    where = f"{file} ({key})"
    return ExternalWeights(
        _plain(content[key], where), where, settings if isinstance(settings, Mapping) else {}
    )


def _plain(content: Mapping[Any, Any], where: str) -> State:
    """Return tensors by name, without the prefix that DistributedDataParallel adds to every name."""
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(
                f"expected tensors by name in {where}, found {type(value).__name__} under {key!r}; "
                f"give the file of a state dict"
            )
    wrapped = bool(content) and all(key.startswith("module.") for key in content)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in content.items()}


def _read_safetensors(file: Path) -> State:
    try:
        return safetensors.torch.load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or not a safetensors file ({error}); fetch it again") from error


def _read_pickle(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                # Files written before torch 1.6 cannot be memory-mapped.
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes may raise anything
        if isinstance(error, OSError) and error.filename is not None:
            raise  # a missing or forbidden file is not a damaged one
        raise UserError(f"{file} {_explain(str(error) or type(error).__name__)}") from error


def _explain(message: str) -> str:
    """Shorten torch's message about an unreadable file to one line that says what to do."""
    if named := re.search(r"GLOBAL ([A-Za-z_]\w*\.[\w.]*\w)", message):
        return (
            f"contains the Python object {named[1]}, which could run code, so it was refused; "
            f"expected tensors and argparse.Namespace only: save the state dict alone"
        )
    reason = message.rsplit("WeightsUnpickler error:", 1)[-1].strip().splitlines()[0][:120]
    return f"is truncated or not a weight file of torch ({reason}); fetch it again"
