"""npy and npz files with odd headers and contents are refused in one line; nothing is unpickled."""

from __future__ import annotations

import json
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stbench.core.errors import UserError
from stbench.core.npy import map_npy, read_npy
from stbench.data.open import open_data
from stbench.data.prepare import PrepareOptions
from stbench.data.shards import MANIFEST, Manifest, dump_manifest, read_manifest
from stbench.data.spec import DataSpec
from stbench.data.verify import verify
from stbench.evaluate.image_sets import open_images
from stbench.evaluate.reference import load_reference, reference_size
from stbench.evaluate.sample_parts import is_finished, read_settings
from tests.datafiles import make_images, make_repa, run_prepare
from tests.measuring import CheapNetwork, pictures

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def npy(header: str, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    text = header.encode("latin1") + b"\n"
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + data


def header(descr: str = "'|u1'", fortran: str = "False", shape: str = "(12, 8, 8, 3)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


DATA = bytes(12 * 8 * 8 * 3)
HEADERS = {
    "no dictionary": "[]",
    "no text": "",
    "unbalanced": "{'descr': '|u1', 'fortran_order': False, 'shape': (12, 8, 8, 3",
    "deep": "(" * 3000,
    "deep and closed": "(" * 900 + ")" * 900,
    "code": "__import__('os').system('true')",
    "call": header(shape="tuple([12, 8, 8, 3])"),
    "missing key": "{'descr': '|u1', 'shape': (12, 8, 8, 3)}",
    "another key": header()[:-1] + "'more': 1}",
    "object": header("'|O'"),
    "record": header("[('a', '<f4'), ('b', '|O')]"),
    "nested record": header("[('a', [('b', '<i2')])]"),
    "date": header("'<M8[s]'"),
    "void": header("'|V3'"),
    "complex": header("'<c16'"),
    "no dtype": header("'hello'"),
    "dtype of a number": header("7"),
    "aligned": header("('|u1', {'align': True})"),
    "fortran": header(fortran="True"),
    "fortran of text": header(fortran="'no'"),
    "fortran of a number": header(fortran="1"),
    "negative": header(shape="(-12, 8, 8, 3)"),
    "negative twice": header(shape="(-12, -8, 8, 3)"),
    "huge": header(shape="(99999999999999999999, 8, 8, 3)"),
    "large": header(shape="(1000000000, 8, 8, 3)"),
    "overflow": header(shape="(4294967296, 4294967296, 8, 3)"),
    "digits": header(shape=f"({'9' * 5000},)"),
    "boolean": header(shape="(True, 8, 8, 3)"),
    "real": header(shape="(12.0, 8, 8, 3)"),
    "list": header(shape="[12, 8, 8, 3]"),
    "none": header(shape="None"),
    "scalar": header(shape="()"),
    "too few": header(shape="(12, 8, 8)"),
    "many axes": header(shape="(" + "1, " * 100 + ")"),
    "smaller": header(shape="(6, 8, 8, 3)"),
    "empty": header(shape="(0, 8, 8, 3)"),
    "reals": header("'<f8'"),
    "words": header("'<U4'"),
    "long": header() + " " * 60_000,
    "tab": header() + "\t\x0c\x0b",
    "null": header() + "\0",
    "indent": "\n   " + header(),
    "comment": "# " + header(),
    "unknown unit": header("'<M8[parsec]'"),
    "bytes": "b'x'",
    "python 2": header(shape="(12L, 8L, 8L, 3L)") + " # ",
}


def write_npz(file: Path, arrays: dict[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in arrays.items():
            archive.writestr(name, content)


def refused_or_equal(read: Any, expected: Any = None) -> None:
    """Read; anything but a UserError of one line, or the expected value, fails the test."""
    try:
        found = read()
    except UserError as error:
        assert "\n" not in str(error) and 0 < len(str(error)) < 1000
        return
    assert found == expected


def everything(file: Path) -> list[list[int]]:
    return [list(part.shape) for part in open_images(file).batches(5)] + [list(reference_size(file) or ())]


SHAPES = [[5, 3, 8, 8], [5, 3, 8, 8], [2, 3, 8, 8], [8, 8]]


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0), (9, 9)], ids=str)
def test_images(tmp_path: Path, kind: str, version: tuple[int, int]) -> None:
    if version == (1, 0) and len(HEADERS[kind]) > 65_000:
        pytest.skip("does not fit")
    write_npz(tmp_path / "a.npz", {"arr_0.npy": npy(HEADERS[kind], DATA, version)})
    refused_or_equal(lambda: everything(tmp_path / "a.npz"), SHAPES)


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("name", ["mu", "about", "features", "settings"])
def test_other_arrays(tmp_path: Path, kind: str, name: str) -> None:
    file, network = tmp_path / "a.npz", CheapNetwork()
    np.savez(file, pictures(0, 12, 8), sigma=np.eye(48))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"{name}.npy", npy(HEADERS[kind], DATA))
    if name == "settings":
        refused_or_equal(lambda: read_settings(file))
        refused_or_equal(lambda: is_finished(file, {"count": 12}))
    elif name == "features":  # an ADM file without mu is refused whatever else it contains
        refused_or_equal(lambda: load_reference(file, [network]))
    else:
        refused_or_equal(lambda: load_reference(file, [network]))
        if name == "about":
            refused_or_equal(lambda: reference_size(file))


@pytest.mark.parametrize("kind", HEADERS)
def test_npy_files(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a.npy"
    file.write_bytes(npy(HEADERS[kind], DATA, (1, 0) if len(HEADERS[kind]) < 60_000 else (2, 0)))
    for read in (map_npy, read_npy):
        try:
            found = read(file)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert found.nbytes == len(DATA)


@pytest.mark.parametrize("array", ["arr_0", "about", "settings", "mu"])
def test_nothing_is_unpickled(tmp_path: Path, array: str) -> None:
    file, touched = tmp_path / "a.npz", tmp_path / "touched"
    np.savez(file, **{array: np.array([Payload(touched)], object)}, allow_pickle=True)
    for read in (open_images, reference_size, read_settings, lambda f: load_reference(f, [CheapNetwork()])):
        refused_or_equal(lambda read=read: read(file))
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Payload(touched)))
    for read in (map_npy, read_npy):
        with pytest.raises(ValueError, match="not an npy header"):
            read(tmp_path / "b.npy")
    assert not touched.exists()


ABOUT = [
    "",
    "[]",
    "null",
    "{",
    "{}",
    "[" * 100_000,
    json.dumps({"digest": 1, "count": 2, "size": [8, 8], "networks": {}}),
    json.dumps({"digest": "d", "count": "many", "size": [8, 8], "networks": {}}),
    json.dumps({"digest": "d", "count": 2, "size": [8], "networks": {}}),
    json.dumps({"digest": "d", "count": 2, "size": 8, "networks": {}}),
    json.dumps({"digest": "d", "count": 2, "size": [8, 8], "networks": []}),
    json.dumps({"digest": "d", "count": 2, "size": [8, 8], "networks": {"pool": 3}}),
    json.dumps({"digest": "d", "count": 2, "size": [8, 8], "networks": {"pool": "other 1"}}),
    json.dumps({"digest": "d", "count": 2, "size": [8, 8], "networks": {}, "arrays": ["mu"]}),
    json.dumps({"digest": "d", "count": 2, "size": ["\x1b[2J", 8], "networks": {}}),
]


@pytest.mark.parametrize("number", range(len(ABOUT)))
def test_odd_descriptions(tmp_path: Path, number: int) -> None:
    np.savez(tmp_path / "a.npz", about=np.array(ABOUT[number]))
    with pytest.raises(UserError) as caught:
        load_reference(tmp_path / "a.npz", [CheapNetwork()])
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "kind", ["encrypted", "method", "twice", "renamed", "folder", "no zip", "nested", "slip"]
)
def test_odd_archives(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, pictures(0, 12, 8))
    content = bytearray(file.read_bytes())
    central = content.index(b"PK\x01\x02")
    if kind == "encrypted":
        content[6] |= 1
        content[central + 8] |= 1
    elif kind == "method":
        content[8], content[central + 10] = 97, 97
    elif kind == "renamed":
        content[central + 46] ^= 1
    elif kind == "no zip":
        content = bytearray(b"PK\x03\x04" + bytes(500))
    file.write_bytes(content)
    if kind == "twice":
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("arr_0.npy", npy(header(), DATA))
    elif kind == "folder":
        write_npz(file, {"arr_0.npy/": b""})
    elif kind == "nested":
        write_npz(tmp_path / "b.npz", {"arr_0.npy": bytes(content)})
        file = tmp_path / "b.npz"
    elif kind == "slip":
        write_npz(file, {"../../arr_0.npy": npy(header(), DATA)})
    with pytest.raises(UserError, match=file.name):
        everything(file)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set")
    run_prepare(PrepareOptions(make_images(root / "images", 20, 16), root / "set", "none", 16, shards=2))
    return root / "set"


def test_verify_lists_every_file_that_cannot_be_read(prepared: Path, tmp_path: Path) -> None:
    files = sorted(prepared.glob("*.npy"))
    originals = {file: file.read_bytes() for file in files}
    kinds = [kind for kind in HEADERS if kind != "no text"]
    try:
        for file, kind in zip(files, kinds, strict=False):
            text = HEADERS[kind].encode("latin1")[: len(originals[file]) - 10]
            damaged = bytearray(originals[file])
            damaged[10 : 10 + len(text)] = text
            file.write_bytes(damaged)
        _, problems = verify(prepared)
        assert len(problems) == len(files) == 10
        refused_or_equal(lambda: open_data(DataSpec(path=str(prepared))))
    finally:
        for file, content in originals.items():
            file.write_bytes(content)
    assert verify(prepared)[1] == []


def changed(value: Any, draw: random.Random) -> Any:
    """Another JSON value of another type."""
    return draw.choice([v for v in (None, 7, -1, "x", [], {}, [[]], 0.5, True) if v != value])


@pytest.mark.parametrize("seed", range(60))
def test_manifests_with_other_types_and_a_valid_hash(prepared: Path, tmp_path: Path, seed: int) -> None:
    """The hash of a manifest only protects against damage: anyone can compute it."""
    draw = random.Random(seed)
    content = json.loads((prepared / MANIFEST).read_text())
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice([k for k in keys if k not in ("sha256", "count")] or keys)
        if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.3:
            break
        place = place[key]
    place[key] = changed(place[key], draw)
    from stbench.data.shards import _digest

    content["sha256"] = _digest(content)
    folder = tmp_path / "set"
    folder.mkdir()
    for file in prepared.glob("*.npy"):
        (folder / file.name).symlink_to(file)
    (folder / MANIFEST).write_text(json.dumps(content))
    try:
        found = read_manifest(folder)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert isinstance(found, Manifest) and dump_manifest(found)
    try:
        open_data(DataSpec(path=str(folder)))
    except UserError as error:
        assert "\n" not in str(error)


LISTS = [
    "",
    "[]",
    "null",
    "{}",
    '{"labels": null}',
    '{"labels": {}}',
    '{"labels": [1]}',
    '{"labels": [[]]}',
    '{"labels": [["a"]]}',
    '{"labels": [["a", 1, 2]]}',
    '{"labels": [[1, 1]]}',
    '{"labels": [["NAME", null]]}',
    '{"labels": [["NAME", "1"]]}',
    '{"labels": [["NAME", 1.5]]}',
    '{"labels": [["NAME", -1]]}',
    '{"labels": [["NAME", 99999999999999999999]]}',
    '{"labels": [["NAME", 9007199254740993]]}',
    '{"labels": [["NAME", NaN]]}',
    '{"labels": ' + "[" * 100_000,
]


@pytest.mark.parametrize("number", range(len(LISTS)))
def test_odd_label_lists_of_a_repa_folder(tmp_path: Path, number: int) -> None:
    folder = make_repa(tmp_path / "repa", 1, 2)
    text = LISTS[number].replace("NAME", "00000/img-mean-std-00000000.npy")
    (folder / "vae-sd" / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json") as caught:
        open_data(DataSpec(path=str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", HEADERS)
def test_moment_files_of_a_repa_folder(tmp_path: Path, kind: str) -> None:
    folder = make_repa(tmp_path / "repa", 4, 2)
    file = folder / "vae-sd" / "00000" / "img-mean-std-00000002.npy"
    content = npy(HEADERS[kind], DATA, (1, 0) if len(HEADERS[kind]) < 60_000 else (2, 0))
    file.write_bytes(content)

    def read() -> None:
        found = open_data(DataSpec(path=str(folder)))
        found.rows.read(np.arange(4), np.zeros(4, int))

    with pytest.raises(UserError) as caught:
        read()
    assert "\n" not in str(caught.value) and file.name in str(caught.value)
