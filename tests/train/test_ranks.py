"""Runs on several gloo ranks: the curve of one process, resuming on another number of ranks, lost ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from stbench.runs.folder import RunFolder
from stbench.runs.records import RunRecord
from tests.datafiles import content, make_images, make_vae

pytestmark = pytest.mark.slow
needs_children = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir() or not Path(f"/proc/self/task/{os.getpid()}/children").exists(),
    reason="needs /proc/PID/task/PID/children, which Linux provides",
)

SMALL = {
    "backbone.width": 24,
    "backbone.depth": 5,
    "backbone.heads": 2,
    "train.batch": 16,
    "train.save_every": 2,
    "train.posthoc_ema": True,
    "eval.points": [3, 6],
    "eval.samples": 600,
    "eval.steps": 2,
    "eval.guidance": [1.0],
}
CASES = {
    "self-transcendence": ("sit", "self-transcendence", (1, 2, 4), {}),
    "a term that ends": ("sit", "self-transcendence", (1, 2), {"recipe.guidance_stop": 3}),
    "gathered": ("uvit", "dispersive", (1, 4), {"recipe.scope": "gathered"}),
    "local": ("uvit", "dispersive", (1, 2), {"recipe.local_batch": 4}),
    "uneven": ("dit", "sra", (1, 4), {"train.batch": 14, "train.accumulate": 2, "train.clip": 1.0}),
    "encoder": ("sit", "repa", (1, 2), {}),
    "a head that stays": ("sit", "internal-guidance", (1, 2), {}),
    "a time per token": ("sit", "self-flow", (1, 2), {}),
    "routes": ("uvit", "tread", (1, 2), {}),
    "a second state": ("sit", "reg", (1, 2), {}),
    "contrast": ("sit", "delta-fm", (1, 2), {"recipe.pool": "global"}),
}
"""Name -> backbone, recipe, numbers of ranks and options."""

TOLERANCE = 1e-5
"""Relative difference that is allowed between losses and metrics on different numbers of ranks: sums in
float32 are rounded in another order."""


def case(name: str, ranks: int, output: Path, **extra: Any) -> dict[str, Any]:
    backbone, recipe, _, options = CASES[name]
    request = {"backbone": backbone, "recipe": recipe, "steps": 6, "overrides": {**SMALL, **options}}
    return {"name": name, "ranks": ranks, "output": str(output), "request": request, **extra}


def drive(folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the cases one after the other; returns the reports of their ranks 0, and "exitcodes" on failure."""
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    driver = Path(__file__).with_name("rank_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr
    if any("exitcodes" in report for report in reports):
        print(done.stderr)  # pytest shows it if the test fails
    return reports


def record(output: Path) -> RunRecord:
    (folder,) = output.glob("digits-*")
    return RunFolder(folder).record()


def weights(output: Path, kind: str = "raw") -> dict[str, torch.Tensor]:
    run = record(output)
    (file,) = Path(run.path).glob(f"checkpoints/{run.final_stage}-*/{kind}-{run.steps:08d}.safetensors")
    return load_file(file)


def require_equal(output: Path, other: Path, tolerance: float = TOLERANCE) -> None:
    """Assert that two runs have the same weights, curve and cost to a relative tolerance."""
    for kind in ("raw", "ema", "posthoc"):
        mine, others = weights(output, kind), weights(other, kind)
        assert mine.keys() == others.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, others[name], rtol=1e-3, atol=2e-5, msg=f"{kind} {name}")
    first, second = record(output), record(other)
    assert len(first.curve) == len(second.curve) > 0
    for point, expected in zip(first.curve, second.curve, strict=True):
        assert (point.stage, point.step, point.guidance) == (expected.stage, expected.step, expected.guidance)
        assert point.flops == pytest.approx(expected.flops, rel=1e-12)
        assert point.val_loss == pytest.approx(expected.val_loss, rel=tolerance)
        assert point.metrics["fid"] == pytest.approx(expected.metrics["fid"], rel=10 * tolerance)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    """Every case on every number of ranks: (name, ranks) -> report, with its output folder."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = [
        case(name, ranks, folder / f"{name}-{ranks}")
        for name, (_, _, counts, _) in CASES.items()
        for ranks in counts
    ]
    reports = drive(folder, cases)
    assert [report.get("exitcodes") for report in reports] == [None] * len(cases)
    return {
        (c["name"], c["ranks"]): {**report, "output": Path(c["output"])}
        for c, report in zip(cases, reports, strict=True)
    }


@pytest.mark.parametrize(
    ("name", "ranks"), [(name, n) for name, (_, _, counts, _) in CASES.items() for n in counts if n > 1]
)
def test_every_number_of_ranks_gives_the_curve_of_one(
    trained: dict[tuple[str, int], dict[str, Any]], name: str, ranks: int
) -> None:
    alone, many = trained[name, 1], trained[name, ranks]
    assert len(alone["losses"]) == len(many["losses"]) >= 6
    for expected, found in zip(alone["losses"], many["losses"], strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)
    require_equal(many["output"], alone["output"])


def test_a_run_resumes_on_another_number_of_ranks(
    trained: dict[tuple[str, int], dict[str, Any]], tmp_path: Path
) -> None:
    name, output = "self-transcendence", tmp_path / "runs"
    reports = drive(
        tmp_path,
        [case(name, 2, output, stop=3), case(name, 4, output, stop=5), case(name, 1, output)],
    )
    assert [report["stopped"] for report in reports] == [True, True, False]
    require_equal(output, trained[name, 1]["output"])
    steps = [len(report["losses"]) for report in reports]
    assert sum(steps) == len(trained[name, 1]["losses"]), steps


def test_an_error_of_one_rank_ends_all(tmp_path: Path) -> None:
    """A batch of 14 on 4 ranks gives two of them 3 images, which local_batch=4 does not divide."""
    options = {"train.batch": 14, "recipe.local_batch": 4}
    broken = case("local", 4, tmp_path / "runs")
    broken["request"]["overrides"] |= options
    small = case("uneven", 4, tmp_path / "runs")
    small["request"]["overrides"] |= {"train.batch": 3, "train.accumulate": 1}
    reports = drive(tmp_path, [broken, small])
    errors = [report["error"] for report in reports if report.get("error")]
    assert any("must divide the" in error for error in errors), errors
    assert any("at least one image per rank" in error for error in errors), errors
    assert [code for report in reports for code in report.get("exitcodes", ())] == [1] * 8


@pytest.mark.parametrize("name", ["self-transcendence", "uneven", "gathered", "a head that stays"])
def test_a_sharded_run_equals_one_process_and_resumes_there(
    trained: dict[tuple[str, int], dict[str, Any]], tmp_path: Path, name: str
) -> None:
    output = tmp_path / "runs"
    reports = drive(tmp_path, [case(name, 2, output, shard=True, stop=3), case(name, 1, output)])
    assert [report.get("stopped") for report in reports] == [True, False], reports
    losses = [losses for report in reports for losses in report["losses"]]
    for expected, found in zip(trained[name, 1]["losses"], losses, strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)
    require_equal(output, trained[name, 1]["output"])


# --- Other commands ---


def on_one_and_two(folder: Path, *arguments: str | Path) -> list[Path]:
    """Run a command on one rank and on two; {} in its arguments is replaced by the folder of each."""
    folders = [folder / f"{ranks}" for ranks in (1, 2)]
    cases = []
    for ranks, target in enumerate(folders, 1):
        target.mkdir(exist_ok=True)
        command = [str(argument).replace("{}", str(target)) for argument in arguments]
        cases.append({"name": command[0], "ranks": ranks, "command": command})
    reports = drive(folder, cases)
    assert [report.get("exitcodes") for report in reports] == [None, None]
    return folders


def test_images_are_those_of_one_rank(trained_run: Path, tmp_path: Path) -> None:
    options = ["-n", "150", "--steps", "2", "--batch", "16", "--cfg", "1.5"]
    folders = on_one_and_two(tmp_path, "sample", trained_run, *options, "--output", "{}/samples.npz")
    one, two = (np.load(folder / "samples.npz") for folder in folders)
    assert np.array_equal(one["arr_0"], two["arr_0"]) and len(one["arr_0"]) == 150


def test_an_evaluation_is_that_of_one_rank(trained_run: Path, tmp_path: Path) -> None:
    for ranks in ("1", "2"):
        shutil.copytree(trained_run, tmp_path / ranks / trained_run.name)
    command = ["evaluate", f"{{}}/{trained_run.name}", "--samples", "600", "--eval-guidance", "1.0,1.5"]
    one, two = (
        RunFolder(folder / trained_run.name).points() for folder in on_one_and_two(tmp_path, *command)
    )
    assert len(one) == len(two) > len(RunFolder(trained_run).points())
    assert [(p.metrics, p.val_loss, p.protocol) for p in one] == [
        (p.metrics, p.val_loss, p.protocol) for p in two
    ]


def test_a_prepared_set_and_its_tokens_are_those_of_one_rank(tmp_path: Path) -> None:
    images, vae = make_images(tmp_path / "images", 60), make_vae(tmp_path / "vae")
    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), weights)
    options = ["--vae", vae, "--size", "32", "--shards", "3", "--references", "10"]
    one, two = on_one_and_two(tmp_path, "data", "prepare", images, "{}/set", *options)
    assert content(one / "set") == content(two / "set")
    options = ["--encoder", "vit_tiny_patch16_224", "--checkpoint", weights, "--batch", "25"]
    on_one_and_two(tmp_path, "data", "tokens", images, one / "set", "{}/tokens", *options)
    assert content(one / "tokens") == content(two / "tokens")


# --- The command line ---


class Launched:
    """`stbench run --devices 2`, which trains for longer than the test takes."""

    def __init__(self, output: Path, *, timeout: int) -> None:
        settings = {**SMALL, "eval.points": [100000], "train.save_every": 10}
        options = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
        where = ["--device", "cpu", "--devices", "2", "--output", str(output)]
        command = ["run", "--backbone", "sit", "--recipe", "vanilla", "--steps", "100000", *where, *options]
        self.output = output
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stbench", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "STBENCH_RANK_TIMEOUT": str(timeout)},
        )

    def ranks(self) -> list[int]:
        """The processes of the ranks, in order, once a training state is saved."""
        deadline = time.monotonic() + 180
        while not list(self.output.glob("*/checkpoints/*/state-*")):
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, "no state was saved"
            time.sleep(0.2)
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        pids = [int(pid) for pid in children.read_text().split()]
        by_rank = {environment(pid).get("RANK"): pid for pid in pids}
        return [by_rank["0"], by_rank["1"]]

    def end(self) -> tuple[int, str]:
        """Exit code and standard error."""
        _, errors = self.process.communicate(timeout=120)
        return self.process.returncode, errors


def environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


@needs_children
def test_a_killed_rank_ends_all_with_one_message(tmp_path: Path) -> None:
    run = Launched(tmp_path / "runs", timeout=60)
    ranks = run.ranks()
    os.kill(ranks[1], signal.SIGKILL)
    code, errors = run.end()
    assert code == 75
    assert errors.count("error:") == 1
    assert "rank 1 was killed by SIGKILL" in errors and "rerun the same command to resume" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@needs_children
def test_a_frozen_rank_ends_all_within_the_timeout(tmp_path: Path) -> None:
    run = Launched(tmp_path / "runs", timeout=5)
    ranks = run.ranks()
    os.kill(ranks[1], signal.SIGSTOP)
    began = time.monotonic()
    code, errors = run.end()
    assert time.monotonic() - began < 5 + 30 + 25  # the timeout, the time to end, and some for a busy machine
    assert code == 75
    assert errors.count("error:") == 1 and "rank 1, which did not respond for 5 s" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@needs_children
def test_ctrl_c_saves_once_and_stops_all(tmp_path: Path) -> None:
    run = Launched(tmp_path / "runs", timeout=60)
    ranks = run.ranks()
    run.process.send_signal(signal.SIGINT)
    code, errors = run.end()
    assert code == 130
    assert errors.count("stopped; rerun the same command") == 1 and "Traceback" not in errors
    (folder,) = (tmp_path / "runs").glob("digits-*")
    assert RunFolder(folder).status()["state"] == "stopped"
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
