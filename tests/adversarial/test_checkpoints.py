"""Odd, hostile and damaged checkpoints: each is refused with one line, or loads exactly the right values."""

from __future__ import annotations

import argparse
import builtins
import collections
import functools
import io
import json
import os
import pickle
import random
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from stbench.core.errors import UserError
from stbench.models.official import OfficialModel, load_official
from tests.conftest import Command
from tests.models.test_official import key_table, wrapped

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {"heads": 4, "original": "repa", "objective": "linear"}
STATE = key_table(64, 1, out=4)
QKV, POSITIONS, LABELS = "blocks.0.attn.qkv.weight", "pos_embed", "y_embedder.embedding_table.weight"


def pt(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


FLAT, TRAINING, SAFE = pt(STATE), pt(wrapped(STATE)), save(STATE)
LEGACY = pt(STATE, _use_new_zipfile_serialization=False)


def load(file: Path, **options: Any) -> OfficialModel:
    return load_official(file, **(OPTIONS | options))


def is_right(model: OfficialModel) -> bool:
    """Whether a loaded network has exactly the values of STATE."""
    return all(torch.equal(value, STATE[key]) for key, value in model.backbone.state_dict().items())


def refused(file: Path, **options: Any) -> str:
    """The message of the UserError; one printable line of a bounded length."""
    with pytest.raises(UserError) as caught:
        load(file, **options)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000, message
    return message


@pytest.fixture()
def write(tmp_path: Path) -> Callable[..., Path]:
    def to_file(content: bytes, name: str = "last.pt") -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return to_file


# --- Objects and containers ---

OBJECTS: dict[str, Any] = {
    "none": None,
    "number": 3,
    "text": "weights",
    "bytes": b"weights",
    "list": [STATE],
    "tuple": (STATE, 1),
    "set": {1, 2},
    "tensor": torch.zeros(3),
    "namespace": argparse.Namespace(ema=STATE),
    "empty": {},
    "counter": collections.Counter("weights"),
    "numbers as names": dict(enumerate(STATE.values())),
    "tuples as names": {(key,): value for key, value in STATE.items()},
    "bytes as names": {key.encode(): value for key, value in STATE.items()},
    "none as a name": {**STATE, None: torch.zeros(1)},
    "nested once more": {"ema": {"ema": STATE}},
    "three levels": {"ema": {"module": {"state": STATE}}},
    "under another name": {"state_dict": STATE},
    "ema is a list": {"ema": [STATE], "model": [STATE]},
    "ema is none": {"ema": None},
    "ema is empty": {"ema": {}},
    "ema is a tensor": {"ema": torch.zeros(2)},
    "only raw weights": {"model": STATE},
    "optimiser": {"opt": {"state": {}, "param_groups": []}},
    "half a prefix": {f"module.{k}" if k == QKV else k: v for k, v in STATE.items()},
    "two prefixes": {f"module.module.{k}": v for k, v in STATE.items()},
    "both sets at once": {**STATE, **{f"ema.{k}": v for k, v in STATE.items()}},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", OBJECTS)
def test_another_object_is_refused(write: Callable[..., Path], name: str, zipped: bool) -> None:
    refused(write(pt(OBJECTS[name], _use_new_zipfile_serialization=zipped)))


ARGS: dict[str, Any] = {
    "list": [1],
    "text": "SiT-B/2",
    "numbers": {1: 2, None: 3},
    "model is a tensor": {"model": torch.zeros(2)},
    "model is deep": {"model": functools.reduce(lambda inner, _: [inner], range(200), 0)},
    "model is long": {"model": "S" * 10**6},
    "odd namespace": argparse.Namespace(model=["SiT"], **{"": 1}),
    "control characters": {"model": "DiT-\x1b[31m\n", "image_size": "\x00"},
}


@pytest.mark.parametrize("name", ARGS)
def test_odd_options_in_the_file_do_not_matter(write: Callable[..., Path], name: str) -> None:
    assert is_right(load(write(pt({"ema": STATE, "args": ARGS[name]}))))


PATHS: list[Any] = ["VP", "", "edm", 3, None, ["linear"], "\x1b[31mlinear\n", "l" * 5000, torch.zeros(1)]


@pytest.mark.parametrize("key", ["path_type", "prediction"])
@pytest.mark.parametrize("value", PATHS, ids=range(len(PATHS)))
def test_odd_paths_and_predictions_are_refused(write: Callable[..., Path], key: str, value: Any) -> None:
    args = {"path_type": "linear", "prediction": "v"} | {key: value}
    refused(write(pt({"ema": STATE, "args": args})))


# --- Tensors ---


def expanded(value: Tensor) -> Tensor:
    """One stored value that would take a terabyte."""
    return torch.zeros(1).expand(10**6, 10**6)


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "sparse coo": lambda v: v.flatten(1).to_sparse(),
    "sparse csr": lambda v: v.flatten(1).to_sparse_csr(),
    "sparse csc": lambda v: v.flatten(1).to_sparse_csc(),
    "sparse of a terabyte": lambda v: torch.sparse_coo_tensor(
        torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**6, 10**6)
    ),
    "meta": lambda v: v.to("meta"),
    "quantised": lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
    "quantised by channel": lambda v: torch.quantize_per_channel(
        v.flatten(1), torch.ones(len(v)), torch.zeros(len(v)), 0, torch.qint8
    ),
    "complex": lambda v: v.to(torch.complex64),
    "int64": lambda v: v.long(),
    "uint8": lambda v: v.to(torch.uint8),
    "bool": lambda v: v > 0,
    "empty": lambda v: v[:0],
    "wide without values": lambda v: torch.empty(0, 10**9, 4, 4),
    "scalar": lambda v: v.mean(),
    "one more axis": lambda v: v[None],
    "flat": lambda v: v.flatten(),
    "one row less": lambda v: v[..., :-1],
    "one row more": lambda v: torch.cat([v, v[..., :1]], -1),
    "transposed": lambda v: v.transpose(-1, -2).flatten(1),
    "expanded": expanded,
    "expanded a little": lambda v: torch.zeros(1).expand(64, 20000),
    "nan": lambda v: v * float("nan"),
    "one nan": lambda v: torch.cat([v[..., :-1], torch.full_like(v[..., -1:], float("nan"))], -1),
    "infinite": lambda v: v / 0.0,
    "minus infinite": lambda v: torch.full_like(v, -float("inf")),
    "beyond float32": lambda v: torch.full_like(v, 1e300, dtype=torch.float64),
    "none": lambda v: None,
    "number": lambda v: 0.5,
    "text": lambda v: "0.5",
    "list": lambda v: v.tolist(),
    "mapping": lambda v: {"weight": v},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("key", [QKV, POSITIONS, LABELS, "x_embedder.proj.weight"])
def test_an_odd_tensor_is_refused(write: Callable[..., Path], key: str, kind: str) -> None:
    refused(write(pt(STATE | {key: TENSORS[kind](STATE[key])})))


def test_tensors_that_share_values_are_refused(write: Callable[..., Path]) -> None:
    """Small on disk, large in memory: every tensor of a wide network views the same numbers."""
    shared = torch.zeros(4096 * 4096)
    views = {key: shared[: 16 * 10**6].view(4000, 4000) for key in STATE}
    assert "repeat or share values" in refused(write(pt(views)))


GOOD: dict[str, Callable[[Tensor], Tensor]] = {
    "half the network in float64": lambda v: v.double(),
    "negative strides": lambda v: v.flip(0).contiguous().flip(0),
    "not contiguous": lambda v: v.transpose(0, -1).contiguous().transpose(0, -1),
    "parameter": lambda v: torch.nn.Parameter(v),
    "slice of a larger storage": lambda v: torch.cat([v, v])[: len(v)],
    "needs a gradient": lambda v: v.clone().requires_grad_(),
}


@pytest.mark.parametrize("kind", GOOD)
def test_unusual_but_complete_tensors_load(write: Callable[..., Path], kind: str) -> None:
    assert is_right(load(write(pt({key: GOOD[kind](value) for key, value in STATE.items()}))))


# --- Keys and heads ---


@pytest.mark.parametrize("key", STATE)
def test_a_missing_key_is_refused(write: Callable[..., Path], key: str) -> None:
    refused(write(pt({name: value for name, value in STATE.items() if name != key})))


NAMES = [
    "",
    ".",
    "blocks",
    "blocks.",
    "blocks.x.attn.qkv.weight",
    "blocks.-1.attn.qkv.weight",
    "blocks.1",
    "decoder_blocks.0",
    "decoder_blocks.x.attn",
    f"decoder_blocks.{'9' * 5000}.attn",
    "decoder_blocks.٣.attn.qkv.weight",
    "\x1b[31mred",
    "line\nbreak",
    "nul\x00",
    "\u202ereversed",
    "x" * 10**5,
    "__class__",
    "blocks.0.attn.qkv.weight.weight",
    "info",
    "\ud800",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_an_unknown_key_is_refused(write: Callable[..., Path], name: str) -> None:
    refused(write(pt(STATE | {name: torch.zeros(3)})))


@pytest.mark.parametrize("heads", [0, -1, 3, 5, 63, 65, 128, 10**30])
def test_a_wrong_number_of_heads_is_refused(write: Callable[..., Path], heads: int) -> None:
    refused(write(FLAT), heads=heads)


@pytest.mark.parametrize("heads", [1, 2, 8, 16, 32, 64])
def test_a_number_of_heads_that_the_file_contradicts_is_refused(
    write: Callable[..., Path], heads: int
) -> None:
    assert "found 4, which follow from its q_norm" in refused(
        write(pt(key_table(64, 1, out=4, heads=4))), heads=heads
    )


@pytest.mark.parametrize("objective", ["iddpm", "vp-discrete", "vp-continuous", "Linear", "gvp", "", "x"])
def test_an_objective_that_no_sit_has_is_refused(write: Callable[..., Path], objective: str) -> None:
    assert "--objective" in refused(write(FLAT), objective=objective)


# --- Code ---


class Payload:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


PAYLOADS: dict[str, Payload] = {
    "system": Payload(os.system, "touch pwned"),
    "popen": Payload(subprocess.Popen, ["touch", "pwned"]),
    "eval": Payload(builtins.eval, "open('pwned', 'w')"),
    "exec": Payload(builtins.exec, "open('pwned', 'w')"),
    "open": Payload(builtins.open, "pwned", "w"),
    "getattr": Payload(getattr, "", "join"),
    "partial": Payload(functools.partial, print),
    "import": Payload(builtins.__import__, "this"),
    "torch load": Payload(torch.load, "pwned"),
    "torch save": Payload(torch.save, [], "pwned"),
    "hub": Payload(torch.hub.load, "a/b", "c"),
    "path": Payload(Path, "pwned"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["top", "value", "args", "opt"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_code_is_not_executed(
    write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    place: str,
    zipped: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    payload = PAYLOADS[name]
    content: Any = {
        "top": payload,
        "value": STATE | {QKV: payload},
        "args": {"ema": STATE, "args": payload},
        "opt": {"ema": STATE, "opt": payload},
    }[place]
    refused(write(pt(content, _use_new_zipfile_serialization=zipped)))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_plain_pickle_is_refused(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(write(pickle.dumps(PAYLOADS["system"], protocol)))
    assert not (tmp_path / "pwned").exists()


# --- Files ---


def zipped(method: int, records: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def repacked(method: int) -> bytes:
    """FLAT with its records compressed, which torch reads as well."""
    with zipfile.ZipFile(io.BytesIO(FLAT)) as archive:
        return zipped(method, {name: archive.read(name) for name in archive.namelist()})


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "../escaped"):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"abcd"))
    return buffer.getvalue()


def script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "one byte": lambda: b"\x80",
    "magic number of zip": lambda: b"PK\x03\x04",
    "zeros": lambda: bytes(4096),
    "text": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "html": lambda: b"<!DOCTYPE html><html>404</html>",
    "gzip": lambda: b"\x1f\x8b\x08" + bytes(100),
    "tar": tar,
    "npz": lambda: zipped(zipfile.ZIP_STORED, {"arr_0.npy": b"\x93NUMPY"}),
    "zip of nothing": lambda: zipped(zipfile.ZIP_STORED, {}),
    "zip without a pickle": lambda: zipped(zipfile.ZIP_STORED, {"archive/data/0": bytes(8)}),
    "zip bomb": lambda: zipped(zipfile.ZIP_DEFLATED, {"archive/data.pkl": bytes(10**8)}),
    "deflated": lambda: repacked(zipfile.ZIP_DEFLATED),
    "bzip2": lambda: repacked(zipfile.ZIP_BZIP2),
    "lzma": lambda: repacked(zipfile.ZIP_LZMA),
    "torchscript": script,
    "safetensors under another name": lambda: SAFE,
    "two files": lambda: FLAT[: len(FLAT) // 2] + TRAINING,
    "infinite pickle": lambda: b"\x80\x02" + b"(" * 10**6,
    "long number": lambda: b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + bytes(100),
    "bytearray of a terabyte": lambda: (
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + bytes([0, 0, 0, 0, 0, 1]) + b"\x85R."
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_another_file_is_refused(write: Callable[..., Path], name: str) -> None:
    refused(write(FILES[name]()))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_path_without_a_regular_file_is_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"loop{suffix}").symlink_to(tmp_path / f"loop{suffix}")
    (tmp_path / f"dangling{suffix}").symlink_to(tmp_path / "gone")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    for name in ("folder", "pipe", "loop", "dangling", "device", "gone", "a/b/c"):
        assert "weights not found" in refused(tmp_path / f"{name}{suffix}")


def test_a_symbolic_link_to_a_file_loads(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "link.pt").symlink_to(write(FLAT))
    assert is_right(load(tmp_path / "link.pt"))


HEADERS: dict[str, Any] = {
    "not json": b"{",
    "not an object": b"[]",
    "not utf-8": b'{"\xff":1}',
    "number": b"3",
    "null entry": {"a": None},
    "no fields": {"a": {}},
    "unknown type": {"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}},
    "negative shape": {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "huge shape": {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}},
    "shape of another size": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    "reversed offsets": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    "beyond the file": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4000]}},
    "a hole": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    "overlapping": {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    },
    "text as offsets": {"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}},
    "only metadata": {"__metadata__": {"format": "pt"}},
    "metadata of another type": {"__metadata__": [1]},
    "nested": b"{" + b'"a":{' * 5000 + b"}" * 5001,
}


@pytest.mark.parametrize("name", HEADERS)
def test_an_odd_safetensors_header_is_refused(write: Callable[..., Path], name: str) -> None:
    header = HEADERS[name] if isinstance(HEADERS[name], bytes) else json.dumps(HEADERS[name]).encode()
    refused(write(struct.pack("<Q", len(header)) + header + bytes(4), "w.safetensors"))


@pytest.mark.parametrize("length", [0, 1, 7, 10**8, 2**63, 2**64 - 1])
def test_a_wrong_length_of_a_safetensors_header_is_refused(write: Callable[..., Path], length: int) -> None:
    refused(write(struct.pack("<Q", length) + SAFE[8:], "w.safetensors"))


# --- Damage ---

ZIPPED = {"flat": FLAT, "training": TRAINING}


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("kind", ZIPPED)
def test_a_flipped_bit_in_a_pt_file_is_refused_or_harmless(
    write: Callable[..., Path], kind: str, seed: int
) -> None:
    content = bytearray(ZIPPED[kind])
    position = random.Random(seed).randrange(8 * len(content))
    content[position // 8] ^= 1 << position % 8
    file = write(bytes(content))
    try:
        model = load(file)
    except UserError as error:
        assert str(error).isprintable()
    else:
        assert is_right(model)  # a byte that no reader uses


@pytest.mark.parametrize("key", [QKV, POSITIONS, LABELS, "final_layer.linear.bias"])
@pytest.mark.parametrize("bit", [0, 7, 12, 31])
def test_a_flipped_bit_in_a_value_is_always_refused(write: Callable[..., Path], key: str, bit: int) -> None:
    content, value = bytearray(FLAT), STATE[key].numpy().tobytes()
    place = FLAT.index(value) + bit // 8
    content[place] ^= 1 << bit % 8
    assert "is damaged: the CRC of its record" in refused(write(bytes(content)))


@pytest.mark.parametrize("seed", range(30))
def test_a_flipped_bit_in_a_safetensors_header_is_refused_or_harmless(
    write: Callable[..., Path], seed: int
) -> None:
    content, (length,) = bytearray(SAFE), struct.unpack("<Q", SAFE[:8])
    position = random.Random(seed).randrange(8 * (length + 8))
    content[position // 8] ^= 1 << position % 8
    file = write(bytes(content), "w.safetensors")
    try:
        model = load(file)
    except UserError as error:
        assert str(error).isprintable()
    else:
        assert is_right(model)


@pytest.mark.parametrize("share", [k / 20 for k in range(20)])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_refused(write: Callable[..., Path], kind: str, share: float) -> None:
    content = {"zip": TRAINING, "legacy": LEGACY, "safetensors": SAFE}[kind]
    name = "w.safetensors" if kind == "safetensors" else "w.pt"
    refused(write(content[: int(share * len(content))], name))


@pytest.mark.parametrize("seed", range(20))
def test_a_zeroed_page_is_refused_or_harmless(write: Callable[..., Path], seed: int) -> None:
    content = bytearray(TRAINING)
    start = random.Random(seed).randrange(len(content) // 4096) * 4096
    content[start : start + 4096] = bytes(4096)
    file = write(bytes(content))
    try:
        model = load(file)
    except UserError as error:
        assert str(error).isprintable()
    else:
        assert bytes(content) == TRAINING and is_right(model)


# --- The command line ---


@pytest.mark.parametrize("command", ["run", "sample"])
@pytest.mark.parametrize("name", ["sparse coo", "meta", "complex", "nan", "expanded", "text"])
def test_the_commands_end_with_one_line(
    stbench: Command, write: Callable[..., Path], tmp_path: Path, command: str, name: str
) -> None:
    file = write(pt(STATE | {QKV: TENSORS[name](STATE[QKV])}))
    options: dict[str, list[Any]] = {
        "run": ["--backbone", "sit", "--recipe", "vanilla", "--init-from", file, "--set", "backbone.heads=4"],
        "sample": ["--checkpoint", file, "--vae", "none", "--heads", "4"],
    }
    common = ["--original", "repa", "--objective", "linear", "--output", tmp_path / "out"]
    code, _, err = stbench(command, *options[command], *common)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "internal" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("heads", ["x", "0", "-3", "1.5", "true", "[4]"])
def test_an_odd_number_of_heads_in_a_run_is_one_line(
    stbench: Command, write: Callable[..., Path], heads: str
) -> None:
    common = ["--backbone", "sit", "--recipe", "vanilla", "--init-from", write(FLAT), "--original", "repa"]
    code, _, err = stbench("run", *common, "--objective", "linear", "--set", f"backbone.heads={heads}")
    assert code == 2 and err.count("\n") == 1
