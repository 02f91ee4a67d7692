"""Bad inputs to every command: exit code 2 and one line; never a traceback, an internal error or a hang."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import TINY, Command

pytestmark = pytest.mark.slow

RUN = ("run", "--backbone", "sit", "--recipe", "vanilla", "--device", "cpu", "--dry-run")
SWEEP = ("sweep", "--backbone", "sit", "--recipe", "vanilla", "--device", "cpu", "--dry-run")

# --- Paths that are wrong for every command ---

PLACES = (
    "missing",
    "file",
    "folder",
    "loop",
    "dangling",
    "pipe",
    "device",
    "~nouser/x",
    "x" * 300,
    "file/below",
)
"""Names below the folder that `places` creates; an absolute one stays as it is."""
PATHS = {
    "run config": (*RUN, "--config", "{}"),
    "run config yaml": (*RUN, "--config", "{}.yaml"),
    "run plugin": (*RUN, "--plugin", "{}"),
    "run data": (*RUN, "--data", "{}"),
    "run init": (*RUN, "--init-from", "{}"),
    "sweep suite": ("sweep", "--suite", "{}.yaml", "--dry-run"),
    "sweep plugin": (*SWEEP, "--plugin", "{}"),
    "list plugin": ("list", "samplers", "--plugin", "{}"),
    "show": ("show", "{}"),
    "compare": ("compare", "{}"),
    "reported": ("compare", "{runs}", "--reported-file", "{}"),
    "sample": ("sample", "{}", "--device", "cpu", "--output", "{new}.npz"),
    "sample checkpoint": ("sample", "--checkpoint", "{}", "--device", "cpu", "--output", "{new}.npz"),
    "evaluate": ("evaluate", "{}", "--device", "cpu"),
    "evaluate reference": ("evaluate", "{npz}", "--reference", "{}", "--device", "cpu"),
    "export": ("export", "{}", "--output", "{new}.pt"),
    "prepare": ("data", "prepare", "{}", "{new}", "--vae", "none", "--device", "cpu"),
    "prepare classes": (
        "data",
        "prepare",
        "{images}",
        "{new}",
        "--vae",
        "none",
        "--classes",
        "{}",
        "--device",
        "cpu",
    ),
    "prepare vae": ("data", "prepare", "{images}", "{new}", "--vae", "{}", "--device", "cpu"),
    "import": ("data", "import", "{}", "{new}"),
    "verify": ("data", "verify", "{}"),
    "statistics": ("data", "statistics", "{}", "{new}.npz", "--device", "cpu"),
    "tokens": ("data", "tokens", "{}", "{}", "{new}", "--device", "cpu"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, trained_run: Path) -> Path:
    """A folder with one path of every kind, a finished run, an npz and images."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "file").write_text("neither JSON {nor YAML: [\n")
    (folder / "file.yaml").write_text("neither JSON {nor YAML: [\n")
    (folder / "folder").mkdir()
    (folder / "folder.yaml").mkdir()
    for suffix in ("", ".yaml"):
        (folder / f"loop{suffix}").symlink_to(folder / f"loop{suffix}")
        (folder / f"dangling{suffix}").symlink_to(folder / "nowhere")
        os.mkfifo(folder / f"pipe{suffix}")
        (folder / f"device{suffix}").symlink_to("/dev/zero")
    shutil.copytree(trained_run, folder / "runs" / trained_run.name)
    np.savez(folder / "samples.npz", arr_0=np.zeros((12, 8, 8, 3), np.uint8))
    (folder / "images" / "a").mkdir(parents=True)
    from PIL import Image

    for number in range(3):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / "images" / "a" / f"{number}.png")
    return folder


def one_line(code: int, out: str, err: str, *, allowed: tuple[int, ...] = (2,)) -> str:
    assert code in allowed, (code, err)
    assert "Traceback" not in out + err
    errors = [line for line in err.splitlines() if line.startswith(("error:", "internal error:"))]
    assert len(errors) == (code != 0) and err.count("\n") <= 4, err
    line = errors[-1] if errors else ""
    assert line.isprintable() and len(line) < 2500 and "error: ;" not in line
    return line


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[:20])
@pytest.mark.parametrize("name", PATHS)
def test_a_wrong_path_is_one_line(
    stbench: Command, places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    monkeypatch.chdir(places)
    fields = {"runs": places / "runs", "npz": places / "samples.npz", "images": places / "images"}
    arguments = [part.format(place, new=tmp_path / "new", **fields) for part in PATHS[name]]
    one_line(*stbench(*arguments))
    assert list(tmp_path.iterdir()) == []


# --- Numbers and choices of the command line ---

NUMBERS = (
    "0",
    "-1",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "9" * 26,
    "9" * 5000,
    "1.5.2",
    "",
    " ",
    "x",
    "0x10",
    "[1]",
    "\u0663",
)
NUMERIC = {
    "run steps": (*RUN, "--steps"),
    "run seed": (*RUN, "--seed"),
    "run guidance": (*RUN, "--eval-guidance"),
    "run lr": (*RUN, "--set=train.lr={}"),
    "run batch": (*RUN, "--set=train.batch={}"),
    "run depth": (*RUN, "--set=backbone.depth={}"),
    "sweep seeds": (*SWEEP, "--seeds"),
    "sweep steps": (*SWEEP, "--steps"),
    "sweep jobs": (*SWEEP, "--jobs"),
    "sample count": ("sample", "{run}", "--device", "cpu", "--output", "{new}.npz", "-n"),
    "sample cfg": ("sample", "{run}", "--device", "cpu", "--output", "{new}.npz", "--cfg"),
    "sample interval": (
        "sample",
        "{run}",
        "--device",
        "cpu",
        "--output",
        "{new}.npz",
        "--interval",
        "{}",
        "1",
    ),
    "sample channels": ("sample", "{run}", "--device", "cpu", "--output", "{new}.npz", "--channels"),
    "sample steps": ("sample", "{run}", "--device", "cpu", "--output", "{new}.npz", "--steps"),
    "sample batch": ("sample", "{run}", "--device", "cpu", "--output", "{new}.npz", "--batch"),
    "sample heads": ("sample", "--checkpoint", "{npz}", "--output", "{new}.npz", "--heads"),
    "evaluate samples": ("evaluate", "{run}", "--device", "cpu", "--samples"),
    "evaluate guidance": ("evaluate", "{run}", "--device", "cpu", "--eval-guidance"),
    "evaluate steps": ("evaluate", "{run}", "--device", "cpu", "--set=eval.steps={}"),
    "prepare size": ("data", "prepare", "{images}", "{new}", "--vae", "none", "--device", "cpu", "--size"),
    "prepare shards": (
        "data",
        "prepare",
        "{images}",
        "{new}",
        "--vae",
        "none",
        "--device",
        "cpu",
        "--shards",
    ),
    "prepare batch": ("data", "prepare", "{images}", "{new}", "--vae", "none", "--device", "cpu", "--batch"),
    "statistics size": ("data", "statistics", "{images}", "{new}.npz", "--device", "cpu", "--size"),
}
ZERO_IS_A_VALUE = {"run seed", "sample interval"}


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:12] or "empty")
@pytest.mark.parametrize("name", NUMERIC)
def test_a_number_that_is_out_of_range_is_one_line(
    stbench: Command, places: Path, tmp_path: Path, name: str, number: str
) -> None:
    if number == "0" and name in ZERO_IS_A_VALUE:
        return
    (run,) = (path.parent for path in (places / "runs").glob("*/spec.json"))
    fields = {"run": run, "npz": places / "samples.npz", "images": places / "images", "new": tmp_path / "new"}
    arguments = [part.format(number, **fields) for part in NUMERIC[name]]
    if not any("{}" in part for part in NUMERIC[name]):
        arguments.append(number)
    one_line(*stbench(*arguments))
    assert list(tmp_path.iterdir()) == []


TEXTS = (
    "",
    "nonsense",
    "x" * 5000,
    "a,b",
    "../..",
    "\x1b[31mred",
    "a\nb",
    "\u202eright",
    "caf\xe9",
    "\udcff",
    "-",
    "{}",
)
TEXTUAL = {
    "backbone": (*RUN[:1], *RUN[3:], "--backbone"),
    "recipe": (*RUN[:3], *RUN[5:], "--recipe"),
    "dataset": (*RUN, "--dataset"),
    "objective": (*RUN, "--objective"),
    "precision": (*RUN, "--precision"),
    "set": (*RUN, "--set"),
    "set value": (*RUN, "--set=train.lr={}"),
    "set name": (*RUN, "--set={}=1"),
    "set recipe": (*RUN, "--set=recipe.{}=1"),
    "device": (*RUN[:5], "--dry-run", "--device"),
    "original": (*RUN, "--original"),
    "init weights": (*RUN, "--init-weights"),
    "sweep backbone": ("sweep", "--recipe", "vanilla", "--dry-run", "--backbone"),
    "sweep recipe": ("sweep", "--backbone", "sit", "--dry-run", "--recipe"),
    "suite": ("sweep", "--dry-run", "--suite"),
    "only": (*SWEEP, "--only"),
    "list": ("list",),
    "format": ("compare", "{runs}", "--format"),
    "sampler": ("sample", "{run}", "--device", "cpu", "--output", "{new}.npz", "--sampler"),
    "labels": ("sample", "{run}", "--device", "cpu", "--output", "{new}.npz", "--labels"),
    "sample precision": ("sample", "{run}", "--device", "cpu", "--output", "{new}.npz", "--precision"),
    "sample device": ("sample", "{run}", "--output", "{new}.npz", "--device"),
    "weights": ("sample", "--checkpoint", "{npz}", "--output", "{new}.npz", "--weights"),
    "export format": ("export", "{run}", "--output", "{new}.pt", "--format"),
    "prepare precision": ("data", "prepare", "{images}", "{new}", "--vae", "none", "--precision"),
    "command": (),
    "data command": ("data",),
}
MEANINGFUL = {("only", "-")}
"""Texts that select something."""


@pytest.mark.parametrize("number", range(len(TEXTS)))
@pytest.mark.parametrize("name", TEXTUAL)
def test_a_text_without_a_meaning_is_one_line(
    stbench: Command, places: Path, tmp_path: Path, name: str, number: int
) -> None:
    text = TEXTS[number]
    if (name, text) in MEANINGFUL:
        return
    (run,) = (path.parent for path in (places / "runs").glob("*/spec.json"))
    fields = {"run": run, "runs": places / "runs", "npz": places / "samples.npz", "images": places / "images"}
    arguments = [part.format(text, new=tmp_path / "new", **fields) for part in TEXTUAL[name]]
    if not any("{}" in part for part in TEXTUAL[name]):
        arguments.append(text)
    one_line(*stbench(*arguments))
    assert list(tmp_path.iterdir()) == []


DEVICES = (
    "cpu:5",
    "cpu:0",
    "cuda:-1",
    "cuda:x",
    "cuda:",
    "cuda:256",
    "cuda:99999999999999999999",
    "meta",
    "mps",
    ":0",
    "CPU",
    " cpu",
)


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_does_not_exist_is_named(stbench: Command, device: str) -> None:
    line = one_line(*stbench(*RUN[:5], "--dry-run", "--device", device))
    assert "device" in line and ("cpu, cuda or cuda:N" in line or "does not exist" in line)


# --- Sizes beyond the memory ---


@pytest.mark.parametrize(
    "settings",
    [
        {"backbone.width": 65_536, "backbone.heads": 1, "backbone.depth": 40},
        {"train.batch": 1_000_000, "backbone.width": 6144, "backbone.heads": 1, "backbone.depth": 99},
        {"recipe.hidden": 65_536, "backbone.width": 16_128, "backbone.depth": 101, "recipe.align_block": 0},
    ],
    ids=["width", "batch", "heads"],
)
def test_a_run_beyond_the_memory_is_refused_before_it_starts(
    stbench: Command, tmp_path: Path, settings: dict[str, int]
) -> None:
    recipe = "vae-align" if "recipe.hidden" in settings else "vanilla"
    sets = [f"--set={name}={json.dumps(value)}" for name, value in {**TINY, **settings}.items()]
    command = ("run", "--backbone", "sit", "--recipe", recipe, "--device", "cpu", "--steps", "2")
    line = one_line(*stbench(*command, *sets, "--output", tmp_path))
    assert "not enough memory on cpu: training" in line and "use a smaller network" in line
    assert list(tmp_path.iterdir()) == []


def test_the_families_are_large_enough() -> None:
    families = (
        itertools.product(PATHS, PLACES),
        itertools.product(NUMERIC, NUMBERS),
        itertools.product(TEXTUAL, TEXTS),
    )
    assert sum(len(list(family)) for family in families) >= 700
