"""Output paths that would destroy something: every command with an output, every kind of path.

Each command is refused with one line and exit code 2 before it computes anything, and what was at the path is
still there, byte for byte.
"""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stbench.compare.build import build_leaderboard
from stbench.compare.writers import render
from stbench.core.text import visible
from tests.conftest import TINY, Command
from tests.fake_runs import make_digits_records, write_run

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """A command with an output: how it is called, what it reads and which names its outputs have."""

    arguments: Callable[[Path, Path], tuple[object, ...]]
    """From the folder of the inputs and the output path to the command line."""
    suffix: str
    """Ending of the output; "" for a folder."""
    inputs: tuple[str, ...] = ()
    """Files that it reads, under the folder of the inputs."""
    folder_may_exist: bool = False


def png(path: Path) -> None:
    """Write a picture of 8x8 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of all commands: a run, published values, images, samples, weights."""
    folder = tmp_path_factory.mktemp("inputs")
    write_run(folder / "runs", "vanilla", 0, [16.0, 4.0, 1.0])
    (folder / "runs" / "digits-sit-vanilla-s0-800").rename(folder / "run")
    (folder / "reported.csv").write_text("model\n")
    for number in range(3):
        png(folder / "images" / "a" / f"{number}.png")
    images = np.zeros((12, 8, 8, 3), np.uint8)
    np.savez(folder / "samples.npz", arr_0=images)
    np.savez(folder / "reference.npz", arr_0=images)
    (folder / "weights.pt").write_bytes(b"weights")
    (folder / "encoder.safetensors").write_bytes(b"weights")
    (folder / "map.json").write_text("{}")
    return folder


CASES = {
    "compare": Case(lambda i, o: ("compare", i / "run", "--output", o), ".md", ("run/spec.json",)),
    "compare csv": Case(
        lambda i, o: ("compare", i / "run", "--format", "csv", "--output", o), ".csv", ("run/curve.jsonl",)
    ),
    "compare reported": Case(
        lambda i, o: ("compare", i / "run", "--reported-file", i / "reported.csv", "--output", o),
        ".csv",
        ("reported.csv", "run/spec.json"),
    ),
    "plot": Case(lambda i, o: ("compare", i / "run", "--plot", o), ".png", ("run/spec.json",)),
    "report": Case(lambda i, o: ("report", i / "run", "--output", o), ".html", ("run/spec.json",)),
    "sample npz": Case(
        lambda i, o: ("sample", "--checkpoint", i / "weights.pt", "--vae", "none", "--output", o),
        ".npz",
        ("samples.npz",),
    ),
    "sample folder": Case(
        lambda i, o: ("sample", "--checkpoint", i / "weights.pt", "--vae", "none", "--output", o),
        "",
        ("weights.pt", "images"),
    ),
    "sample run": Case(lambda i, o: ("sample", i / "run", "--output", o), ".npz", ("samples.npz",)),
    "evaluate": Case(
        lambda i, o: ("evaluate", i / "samples.npz", "--reference", i / "reference.npz", "--output", o),
        ".json",
        ("samples.npz", "reference.npz"),
    ),
    "evaluate folder": Case(
        lambda i, o: ("evaluate", i / "images/a", "--reference", i / "reference.npz", "--output", o),
        ".json",
        ("images/a", "images/a/0.png", "reference.npz"),
    ),
    "export": Case(lambda i, o: ("export", i / "run", "--output", o), ".pt", ("run/spec.json", "run")),
    "export diffusers": Case(
        lambda i, o: ("export", i / "run", "--format", "diffusers", "--output", o),
        "",
        ("run", "run/spec.json"),
    ),
    "prepare": Case(
        lambda i, o: ("data", "prepare", i / "images", o, "--vae", "none", "--size", 8),
        "",
        ("images", "images/a"),
        folder_may_exist=True,
    ),
    "import": Case(
        lambda i, o: ("data", "import", i / "images", o), "", ("images", "images/a"), folder_may_exist=True
    ),
    "tokens": Case(
        lambda i, o: ("data", "tokens", i / "images", i / "run", o, "--encoder", "digits"),
        "",
        ("images", "images/a", "run"),
        folder_may_exist=True,
    ),
    "statistics": Case(
        lambda i, o: ("data", "statistics", i / "images/a", o), ".npz", ("samples.npz", "images/a")
    ),
    "statistics npz": Case(
        lambda i, o: ("data", "statistics", i / "samples.npz", o), ".npz", ("samples.npz",)
    ),
    "bench": Case(lambda i, o: ("bench", "--output", o), ".json", ("run/spec.json", "run")),
    "run": Case(
        lambda i, o: ("run", "--backbone", "sit", "--recipe", "vanilla", "--steps", 1, "--output", o),
        "",
        ("weights.pt",),
        folder_may_exist=True,
    ),
    "sweep": Case(
        lambda i, o: ("sweep", "--backbone", "sit", "--recipe", "vanilla", "--steps", 1, "--output", o),
        "",
        ("weights.pt",),
        folder_may_exist=True,
    ),
}


def fingerprint(path: Path) -> object:
    """What is at a path, without following links."""
    if not os.path.lexists(path):
        return None
    found = path.lstat()
    kind = stat.S_IFMT(found.st_mode)
    if stat.S_ISLNK(kind):
        return kind, os.readlink(path), path.exists() and fingerprint(Path(os.path.realpath(path)))
    if stat.S_ISREG(kind):
        return kind, path.read_bytes(), found.st_mode
    if stat.S_ISDIR(kind):
        return kind, sorted((child.name, fingerprint(child)) for child in path.iterdir())
    return kind, found.st_rdev, found.st_ino


# --- Paths: from an empty folder and the ending of the output to the output path ---


def _fifo(folder: Path, suffix: str) -> Path:
    os.mkfifo(folder / f"out{suffix}")
    return folder / f"out{suffix}"


def _socket(folder: Path, suffix: str) -> Path:
    here = os.getcwd()
    os.chdir(folder)  # the path of a socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(f"out{suffix}")
    os.chdir(here)
    return folder / f"out{suffix}"


def _other_type(folder: Path, suffix: str) -> Path:
    path = folder / f"out{suffix}"
    if suffix:
        (path / "inside").mkdir(parents=True)
    else:
        path.write_text("notes")
    return path


def _link(folder: Path, suffix: str) -> Path:
    target = folder / f"precious{suffix}"
    target.write_text("precious")
    (folder / f"out{suffix}").symlink_to(target)
    return folder / f"out{suffix}"


def _link_to_folder(folder: Path, suffix: str) -> Path:
    (folder / "precious").mkdir()
    (folder / "precious" / "file").write_text("precious")
    (folder / f"out{suffix}").symlink_to(folder / "precious", target_is_directory=True)
    return folder / f"out{suffix}"


def _dangling(folder: Path, suffix: str) -> Path:
    (folder / f"out{suffix}").symlink_to(folder / "nowhere")
    return folder / f"out{suffix}"


def _loop(folder: Path, suffix: str) -> Path:
    (folder / f"out{suffix}").symlink_to(folder / f"out{suffix}")
    return folder / f"out{suffix}"


def _parent_loop(folder: Path, suffix: str) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop" / f"out{suffix}"


def _parent_file(folder: Path, suffix: str) -> Path:
    (folder / "parent").write_text("precious")
    return folder / "parent" / f"out{suffix}"


def _grandparent_file(folder: Path, suffix: str) -> Path:
    (folder / "parent").write_text("precious")
    return folder / "parent" / "deep" / f"out{suffix}"


def _dangling_parent(folder: Path, suffix: str) -> Path:
    (folder / "parent").symlink_to(folder / "nowhere")
    return folder / "parent" / f"out{suffix}"


def _foreign(folder: Path, suffix: str) -> Path:
    path = folder / f"out{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps({"schema": 1, "notes": "precious"}))
    elif suffix == ".npz":
        np.savez(path, mine=np.arange(3))
    elif suffix == ".png":
        png(path)
    elif suffix:
        path.write_text("## Notes\n\nprecious\n")
    else:
        path.mkdir()
        (path / "file").write_text("precious")
    return path


def _garbage(folder: Path, suffix: str) -> Path:
    path = folder / f"out{suffix}"
    if suffix:
        path.write_bytes(b"\x00\xffprecious")
    else:
        path.mkdir()
        (path / "settings.json").write_bytes(b"\xff")
    return path


def _unwritable(folder: Path, suffix: str) -> Path:
    return Path("/proc/self") / f"out{suffix}"


def _long(folder: Path, suffix: str) -> Path:
    return folder / f"{'x' * (256 - len(suffix))}{suffix}"


PATHS = {
    "fifo": _fifo,
    "socket": _socket,
    "other type": _other_type,
    "link": _link,
    "link to a folder": _link_to_folder,
    "dangling link": _dangling,
    "loop": _loop,
    "parent is a loop": _parent_loop,
    "parent is a file": _parent_file,
    "grandparent is a file": _grandparent_file,
    "parent is a dangling link": _dangling_parent,
    "not of our kind": _foreign,
    "garbage": _garbage,
    "unwritable": _unwritable,
    "name too long": _long,
    "/dev/null": lambda folder, suffix: Path("/dev/null"),
    "/dev/stdout": lambda folder, suffix: Path("/dev/stdout"),
    "/dev/fd/1": lambda folder, suffix: Path("/dev/fd/1"),
    "/dev/tty": lambda folder, suffix: Path("/dev/tty"),
    "root": lambda folder, suffix: Path("/"),
    "here": lambda folder, suffix: Path("."),
    "above": lambda folder, suffix: folder / "..",
    "nul": lambda folder, suffix: folder / f"a\0b{suffix}",
}
BESIDE = {"root", "here", "above", "not of our kind", "garbage", "link to a folder"}
ALLOWED = {"run": BESIDE, "sweep": BESIDE, "prepare": {"here"}}
"""Paths at which a command can write without a risk: beside what is there, or into an empty folder."""


def refused(command: Command, case: Case, inputs: Path, output: Path) -> str:
    """Call a command that must be refused; returns its message."""
    code, out, err = command(*case.arguments(inputs, output), "--device", "cpu")[:3]
    assert code == 2, (code, out, err)
    assert err.count("\n") == 1 and "Traceback" not in err
    assert visible(str(output)) in err or "NUL" in err, err
    return err


@pytest.fixture
def command(stbench: Command) -> Command:
    """Call the command line without --device where a command has no such option."""

    def call(*arguments: object) -> tuple[int, str, str]:
        without = arguments[0] in ("compare", "export", "report") or arguments[:2] == ("data", "import")
        return stbench(*(arguments[:-2] if without else arguments))

    return call


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name in CASES for path in PATHS if path not in ALLOWED.get(name, ())],
)
def test_nothing_is_destroyed(
    name: str, path: str, command: Command, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    output = PATHS[path](tmp_path, case.suffix)
    protected = [tmp_path, inputs, *([output] if str(output).startswith("/dev") else [])]
    before = [fingerprint(part) for part in protected]
    refused(command, case, inputs, output)
    assert [fingerprint(part) for part in protected] == before


SPELLINGS: dict[str, Callable[[Path, Path], Path]] = {
    "same": lambda path, folder: path,
    "dots": lambda path, folder: path.parent / "." / ".." / path.parent.name / path.name,
    "relative": lambda path, folder: Path(os.path.relpath(path)),
    "through a link": lambda path, folder: linked_parent(path, folder),
    "hard link": lambda path, folder: hard_link(path, folder),
}


def linked_parent(path: Path, folder: Path) -> Path:
    """The path through a symbolic link to its folder."""
    (folder / "link").symlink_to(path.parent, target_is_directory=True)
    return folder / "link" / path.name


def hard_link(path: Path, folder: Path) -> Path:
    """Another name of a file; a folder has none."""
    if path.is_dir():
        return path
    os.link(path, folder / path.name)
    return folder / path.name


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", CASES)
def test_no_input_is_an_output(
    name: str, spelling: str, command: Command, inputs: Path, tmp_path: Path
) -> None:
    case, before = CASES[name], fingerprint(inputs)
    for file in case.inputs:
        folder = tmp_path / file.replace("/", "-")
        folder.mkdir()
        refused(command, case, inputs, SPELLINGS[spelling](inputs / file, folder))
    assert fingerprint(inputs) == before


TWO = {
    "same": ("out.npz", "out.npz"),
    "dots": ("out.npz", "./deep/../out.npz"),
    "link": ("out.npz", "link/out.npz"),
    "nested": ("out", "out/x.npz"),
    "nested deep": ("out/a/b.npz", "out"),
    "in shards": ("out", "out.parts/x.npz"),
    "hard links": ("one.npz", "two.npz"),
}


@pytest.mark.parametrize("name", TWO)
def test_two_outputs_of_sample_are_different_paths(
    name: str, stbench: Command, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    np.savez(tmp_path / "one.npz", settings=np.array("{}"))
    os.link(tmp_path / "one.npz", tmp_path / "two.npz")
    before = sorted(os.listdir()), (tmp_path / "one.npz").read_bytes()
    first, second = TWO[name]
    outputs = ("--output", first, "--output", second)
    code, _, err = stbench("sample", inputs / "run", *outputs, "--device", "cpu")
    assert code == 2 and "give each output a path of its own" in err
    assert (sorted(os.listdir()), (tmp_path / "one.npz").read_bytes()) == before


@pytest.mark.parametrize(
    "pair", [("out.png", "out.png"), ("out.png", "./out.png"), ("a/out.svg", "a/../a/out.svg")]
)
def test_table_and_plot_are_different_paths(
    pair: tuple[str, str], stbench: Command, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = stbench("compare", inputs / "run", "--output", pair[0], "--plot", pair[1])
    assert code == 2 and "--output and --plot" in err
    assert not list(tmp_path.iterdir())


# --- What is allowed ---


@pytest.mark.parametrize("form", ["md", "csv", "json", "tex"])
@pytest.mark.parametrize("first", ["md", "csv", "json", "tex", "empty", "nothing", "no runs"])
def test_a_leaderboard_replaces_a_leaderboard(
    first: str, form: str, stbench: Command, inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "deep" / "out"
    if first != "nothing":
        output.parent.mkdir()
        form_before: object = "md" if first in ("empty", "no runs") else first
        records = [] if first == "no runs" else make_digits_records()
        text = "" if first == "empty" else render(build_leaderboard(records), form_before)  # type: ignore[arg-type]
        output.write_text(text)
    code, _, err = stbench("compare", inputs / "run", "--format", form, "--output", output)
    assert code == 0, err
    assert "vanilla" in output.read_text()
    assert [path.name for path in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_plot_replaces_a_plot(suffix: str, stbench: Command, inputs: Path, tmp_path: Path) -> None:
    for _ in range(2):
        code, _, err = stbench("compare", inputs / "run", "--plot", tmp_path / f"out.{suffix}")
        assert code == 0, err


@pytest.mark.parametrize(
    "name", ["spec.json", "curve.jsonl", "checkpoints/x.json", "samples/x.md", "sweep.json"]
)
def test_a_run_folder_keeps_its_own_names(name: str, stbench: Command, inputs: Path) -> None:
    before = fingerprint(inputs)
    code, _, err = stbench("compare", inputs / "run", "--format", "json", "--output", inputs / "run" / name)
    assert code == 2 and fingerprint(inputs) == before, err


def test_a_link_in_place_of_the_shards_is_refused(stbench: Command, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("precious")
    (tmp_path / "out.npz.parts").symlink_to(tmp_path / "precious", target_is_directory=True)
    before = fingerprint(tmp_path)
    code, _, err = stbench("sample", inputs / "run", "--output", tmp_path / "out.npz", "--device", "cpu")
    assert code == 2 and "out.npz.parts" in err
    assert fingerprint(tmp_path) == before


# --- Full disks ---


FULL = {
    "compare": lambda i, o: ("compare", i / "run", "--output", o / "x.md"),
    "compare deep": lambda i, o: ("compare", i / "run", "--format", "json", "--output", o / "a" / "x.json"),
    "plot": lambda i, o: ("compare", i / "run", "--plot", o / "x.png"),
    "run": lambda i, o: ("run", *RUN, "--output", o),
    "sweep": lambda i, o: ("sweep", *RUN, "--output", o),
    "prepare": lambda i, o: ("data", "prepare", i / "images", o / "x", "--vae", "none", "--size", 8),
}
TINY_OPTIONS = [part for name, value in TINY.items() for part in ("--set", f"{name}={json.dumps(value)}")]
RUN = ("--backbone", "sit", "--recipe", "vanilla", "--steps", 1, "--device", "cpu", *TINY_OPTIONS)


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_named_with_the_file_and_what_is_missing(
    name: str, stbench: Command, inputs: Path, tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        code, _, err = stbench(*FULL[name](inputs, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert re.search(
        r"error: cannot write \S+: File too large \((more than )?\S+ (.iB|bytes) needed\)", err
    ), err
