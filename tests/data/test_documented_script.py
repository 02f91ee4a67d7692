"""The script in docs/imagenet.md runs, with small data and models."""

from __future__ import annotations

import json
import re
import shlex
import string
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stbench.cli import app as cli
from tests.conftest import BLOCKS, TINY
from tests.data.conftest import COUNT, SIZE
from tests.datafiles import EXTRACTOR, picture
from tests.weights import random_inception

STEPS = 6
SCRIPT = Path(__file__).parents[2] / "docs" / "imagenet.md"
SMALL = {"DATASET": "custom", "SIZE": str(SIZE), "BACKBONE": "sit-ti/2", "STEPS": str(STEPS)}


def script(paths: dict[str, Path], number: int) -> list[list[str]]:
    """Return the commands of a documented script, with small data and models."""
    block = re.findall(r"```bash\n(.*?)```", SCRIPT.read_text(), re.DOTALL)[number]
    options = TINY | BLOCKS | {"eval.extractor": EXTRACTOR, "eval.samples": 20, "train.clip": 1.0}
    vanilla = {name: value for name, value in options.items() if not name.startswith("recipe.")}
    commands = []
    for line in block.splitlines():
        if name := re.match(r"(\w+)=", line):
            assert name[1] in {*SMALL, "MORE", *paths}
            continue
        chosen = vanilla if "--recipe vanilla" in line else options
        more = " ".join(f"--set {shlex.quote(f'{k}={json.dumps(v)}')}" for k, v in chosen.items())
        values = SMALL | {name: str(path) for name, path in paths.items()} | {"MORE": more, "RUN": "$RUN"}
        if line.strip().startswith("stbench "):
            commands.append(shlex.split(string.Template(line).substitute(values))[1:])
    return commands


@pytest.fixture()
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Call a command that must succeed; what it prints stays in `capfd`."""

    def run(*command: str) -> None:
        monkeypatch.setattr(sys, "argv", ["stbench", *command])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, capfd.readouterr().err

    return run


@pytest.mark.slow
def test_the_documented_script_runs(
    images: Path,
    vae: Path,
    tmp_path: Path,
    call: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    paths = {
        "IMAGES": images,
        "VAE": vae,
        "DATA": tmp_path / "latents",
        "REFERENCE": tmp_path / "reference.npz",
        "RUNS": tmp_path / "runs",
    }
    commands = script(paths, 0)
    assert [command[0] for command in commands] == [
        *("data", "data", "run", "run", "compare", "sample", "evaluate")
    ]
    inception, digest = random_inception(tmp_path / "inception.pth")
    weights = ["--inception", str(inception), "--inception-sha256", digest]
    np.savez(paths["REFERENCE"], np.stack([np.asarray(picture(n, SIZE, SIZE)) for n in range(12)]))

    for command in commands[:5]:
        call(*command)
    (run,) = (path.parent for path in paths["RUNS"].glob("*vanilla*/spec.json"))
    drawing, measuring = ([part.replace("$RUN", str(run)) for part in command] for command in commands[5:])
    assert drawing[2:4] == ["-n", "50000"] and drawing[-4:-2] == ["--steps", "250"]
    call(*drawing, "-n", "12", "--steps", "3", "--device", "cpu")
    call(*measuring, *weights, "--device", "cpu")
    scores = json.loads((run / "cfg1.8.json").read_text())
    assert scores["protocol"]["sampling"]["cfg"] == 1.8 and np.isfinite(scores["metrics"]["fid12"])
    out = capfd.readouterr().out
    assert f"{COUNT} images in 10 classes; 1 shards of moments 8x4x4" in out
    assert f"{COUNT} images, 5 files, all intact" in out
    assert "self-transcendence" in out and "vanilla" in out


@pytest.mark.slow
def test_the_script_for_own_images_runs(
    images: Path, tmp_path: Path, call: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    names = {"DATA": "set", "REFERENCE": "reference.npz", "RUNS": "runs"}
    paths = {"IMAGES": images} | {name: tmp_path / file for name, file in names.items()}
    commands = script(paths, 1)
    assert [command[0] for command in commands] == [
        *("data", "data", "data", "run", "run", "compare", "sample", "evaluate")
    ]
    inception, digest = random_inception(tmp_path / "inception.pth")
    weights = ["--inception", str(inception), "--inception-sha256", digest]
    for command in commands[:6]:
        call(*command, *(weights if "statistics" in command else ()))
    (run,) = (path.parent for path in paths["RUNS"].glob("custom-sit-custom-sra-*/spec.json"))
    drawing, measuring = ([part.replace("$RUN", str(run)) for part in command] for command in commands[6:])
    assert drawing[2:4] == ["-n", "10000"]
    call(*drawing, "-n", "12", "--steps", "3", "--device", "cpu")
    call(*measuring, *weights, "--device", "cpu")
    assert np.isfinite(json.loads((run / "cfg1.5.json").read_text())["metrics"]["fid12"])
    assert "sra" in capfd.readouterr().out
