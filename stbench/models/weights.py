"""Weight files: our own (safetensors, atomic, checked by hash), and those of other programs, read as data."""

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
from stbench.core.files import atomic_write

State = Mapping[str, Tensor]


CONTAINER = {"ema": "ema", "raw": "model"}
"""Our word for a set of weights -> the key under which official training checkpoints keep it."""


def save_weights(state: State, file: Path, metadata: dict[str, str] | None = None) -> str:
    """Write tensors to a safetensors file, whole or not at all; returns the file's sha256."""
    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    data = safetensors.torch.save(plain, metadata)
    atomic_write(file, data)
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


@dataclass(frozen=True)
class Foreign:
    """What a weight file of another program holds."""

    state: State
    """The chosen tensors by name, still mapped from the file where it allows that."""
    where: str
    """The file, and the key inside it, for messages."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The training options stored beside the weights ("args"), if there were any."""


def tensors_sha256(state: State) -> str:
    """Hash of names, types, shapes and values, whatever file they lie in and in whatever order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_foreign(file: Path, weights: Weights = "ema") -> Foreign:
    """Read a .pt or .safetensors file: a flat state dict, or one under "ema" and "model" with "args" beside.

    Nothing in the file is run: of all Python objects argparse.Namespace alone is allowed beside tensors.
    Raises UserError for a file that is missing, truncated, asks for another object, or lacks `weights`.
    """
    if not file.is_file():
        raise UserError(f"weights not found: {file}; expected a .pt or .safetensors file")
    content: Any = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
    if not isinstance(content, Mapping):
        raise UserError(f"expected a state dict in {file}, found {type(content).__name__}; save one first")
    held = [key for key in CONTAINER.values() if isinstance(content.get(key), Mapping)]
    if not held:
        return Foreign(_plain(content, str(file)), str(file))
    asked = CONTAINER[weights]
    if asked not in held:
        other = next(name for name, key in CONTAINER.items() if key == held[0])
        raise UserError(
            f"expected '{asked}' weights in {file}, found only '{held[0]}'; type --init-weights {other}, "
            f"or with `stbench sample` --weights {other}"
        )
    args = content.get("args")
    settings = vars(args) if isinstance(args, argparse.Namespace) else args
    where = f"{file} ({asked})"
    return Foreign(_plain(content[asked], where), where, settings if isinstance(settings, Mapping) else {})


def _plain(content: Mapping[Any, Any], where: str) -> State:
    """Tensors by name, without the prefix that DistributedDataParallel puts before every name."""
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(
                f"expected tensors by name in {where}, found {type(value).__name__} under {key!r}; "
                f"give the file of a state dict"
            )
    wrapped = bool(content) and all(key.startswith("module.") for key in content)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in content.items()}


def _safetensors(file: Path) -> State:
    try:
        return safetensors.torch.load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or no safetensors file ({error}); fetch it again") from error


def _pickled(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:  # files of torch before 1.6 cannot be mapped
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise UserError(f"{file} {_refusal(str(error) or type(error).__name__)}") from error


def _refusal(message: str) -> str:
    """What is wrong with a file and what to do, from torch's long message."""
    if named := re.search(r"GLOBAL ([A-Za-z_]\w*\.[\w.]*\w)", message):
        return (
            f"asks for the Python object {named[1]}, which could run code: refused; "
            f"expected tensors and argparse.Namespace, so save its state dict alone"
        )
    reason = message.rsplit("WeightsUnpickler error:", 1)[-1].strip().splitlines()[0][:120]
    return f"is truncated or no weight file of torch ({reason}); fetch it again"
