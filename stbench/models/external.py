"""Weight files of other programs: read as data, verified, and refused with one line if anything is odd.

Nothing in such a file is trusted. No code in it is executed, the checksums that its format has are verified
before a value is used, and no tensor may take more memory than the file has bytes.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from stbench.core.backbone import Weights
from stbench.core.errors import UserError
from stbench.models.weights import State, require_finite

CHECKPOINT_KEYS = {"ema": "ema", "raw": "model"}
"""Our name for a set of weights -> the key under which official training checkpoints store it."""

TIMM_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which timm's training script stores weights, the preferred first."""

ZIP_MAGIC = b"PK\x03\x04"
"""First bytes of a file that torch 1.6 or newer has written."""


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
    for a file that is missing, truncated or damaged, that contains another object or a tensor without plain
    dense values, or that lacks the chosen `weights`.
    """
    content = _read_mapping(file)

    # A flat state dict.
    found = [key for key in CHECKPOINT_KEYS.values() if isinstance(content.get(key), Mapping)]
    if not found:
        return ExternalWeights(_plain(content, str(file), file), str(file))

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
        _plain(content[key], where, file), where, settings if isinstance(settings, Mapping) else {}
    )


def read_pretrained(file: Path) -> State:
    """Read the weights of a timm model, flat or under the keys that timm's training script writes.

    Raises UserError as `read_external` does, and for NaN or infinite weights.
    """
    content = _read_mapping(file)
    found = next((content[key] for key in TIMM_KEYS if isinstance(content.get(key), Mapping)), content)
    state = _plain(found, str(file), file)
    require_finite(state, str(file), "use another file")
    return state


def _read_mapping(file: Path) -> Mapping[Any, Any]:
    """Return the content of a weight file. Raises UserError unless it is a mapping."""
    _require_file(file)
    content: Any = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    if not isinstance(content, Mapping):
        raise UserError(f"expected a state dict in {file}, found {type(content).__name__}; save one first")
    return content


def shown(name: object, limit: int = 80) -> str:
    """Return a name from a file for a message: escaped if it is not printable, and cut at `limit`."""
    if not isinstance(name, str):
        return f"<{type(name).__name__}>"  # repr() of an unknown object may be endless
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _require_file(file: Path) -> None:
    """Raise UserError unless `file` is a regular file with content."""
    if not file.is_file():
        found = "a folder" if file.is_dir() else "something else" if file.exists() else "nothing"
        raise UserError(f"weights not found: {file}; expected a .pt or .safetensors file, found {found}")
    if file.stat().st_size == 0:
        raise UserError(f"{file} is truncated or not a weight file of torch (0 bytes); fetch it again")


# --- Tensors ---


def _plain(content: Mapping[Any, Any], where: str, file: Path) -> State:
    """Return tensors by name, without the prefix that DistributedDataParallel adds to every name.

    Raises UserError for anything but dense tensors by name, which together fit into the file.
    """
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(
                f"expected tensors by name in {where}, found {type(value).__name__} under "
                f"'{shown(key)}'; give the file of a state dict"
            )
        if kind := _oddity(value):
            raise UserError(
                f"expected dense tensors in {where}, found {kind} under {shown(key)}; "
                f"save the state dict with plain tensors"
            )
    size = file.stat().st_size
    needed = sum(value.numel() * value.element_size() for value in content.values())
    if needed > size:
        raise UserError(
            f"expected at most {size} bytes of tensors, the size of the file, in {where}, found {needed}, "
            f"which repeat or share values; save a copy of each tensor"
        )
    wrapped = bool(content) and all(key.startswith("module.") for key in content)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in content.items()}


def _oddity(tensor: Tensor) -> str | None:
    """Return what a tensor is if it does not have plain dense values, else None."""
    if tensor.is_meta:
        return "a meta tensor, which has no values"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"a sparse tensor ({tensor.layout})"
    if tensor.is_quantized:
        return f"a quantised tensor ({tensor.dtype})"
    if tensor.numel() == 0:
        return f"an empty tensor {tuple(tensor.shape)}"
    return None


# --- File formats ---


def _read_safetensors(file: Path) -> State:
    """Read a safetensors file; its header must describe the rest of the file exactly."""
    try:
        return safetensors.torch.load_file(file)
    except Exception as error:  # damaged bytes may raise anything
        if isinstance(error, OSError) and error.filename is not None:
            raise  # a forbidden file is not a damaged one
        reason = shown(" ".join(str(error).split()) or type(error).__name__, 120)
        raise UserError(
            f"{file} is truncated or not a safetensors file ({reason}); fetch it again"
        ) from error


def _read_pickle(file: Path) -> Any:
    """Read a file of torch.save: first its checksums, then its content."""
    try:
        with file.open("rb") as opened:
            zipped = opened.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        if zipped:
            _verify_zip(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Files written before torch 1.6 cannot be memory-mapped.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except Exception as error:  # unpickling damaged bytes may raise anything
        if isinstance(error, OSError) and error.filename is not None:
            raise  # a missing or forbidden file is not a damaged one
        raise UserError(f"{file} {_explain(str(error) or type(error).__name__)}") from error


def _verify_zip(file: Path) -> None:
    """Verify the CRC of every record of a zip file; torch.load does not.

    Raises UserError for a wrong CRC, and for compressed or overlapping records: torch.save writes neither.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        packed = next((r.filename for r in records if r.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None or sum(r.file_size for r in records) > file.stat().st_size:
            found = "overlapping records" if packed is None else f"{shown(packed)} compressed"
            raise UserError(
                f"expected a file of torch.save, without compression, in {file}, found {found}; "
                f"fetch it again"
            )
        damaged = archive.testzip()
    if damaged is not None:
        raise UserError(f"{file} is damaged: the CRC of its record {shown(damaged)} is wrong; fetch it again")


def _explain(message: str) -> str:
    """Shorten torch's message about an unreadable file to one line that says what to do."""
    if named := re.search(r"GLOBAL ([A-Za-z_]\w*\.[\w.]*\w)", message):
        return (
            f"contains the Python object {named[1]}, which could run code, so it was refused; "
            f"expected tensors and argparse.Namespace only: save the state dict alone"
        )
    lines = message.rsplit("WeightsUnpickler error:", 1)[-1].strip().splitlines() or [""]
    return f"is truncated or not a weight file of torch ({shown(lines[0], 120)}); fetch it again"
