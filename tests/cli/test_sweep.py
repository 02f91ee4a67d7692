"""`stbench sweep`: its options, its slots, its summary, and one-line errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from stbench.cli.sweep import parse_seeds
from stbench.core.errors import UserError
from stbench.runs.journal import read_journal
from tests.conftest import TINY, Command

GRID = ("sweep", "--backbone", "sit", "--recipe", "vanilla", "--steps", 20)


def test_seeds_are_a_count_or_a_list() -> None:
    assert parse_seeds("3") == [0, 1, 2] and parse_seeds("0,5,7") == [0, 5, 7] and parse_seeds("7,") == [7]
    for wrong in ("0", "x", "", "-1"):
        with pytest.raises(UserError, match="--seeds must be"):
            parse_seeds(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partition", "gpu"], "--partition needs --executor slurm"),
        (["--slurm", "qos=a"], "--slurm needs --executor slurm"),
        (["--executor", "slurm", "--time-limit", "soon"], "--time-limit must be minutes"),
        (["--executor", "slurm", "--gpus-per-job", 3, "--nodes-per-job", 2], "must be a multiple of"),
        (["--executor", "slurm", "--device", "cuda:0"], "--device must be auto, cpu or cuda"),
        (["--executor", "slurm", "--device", "cuda", "--gpus-per-job", 0], "--device cuda needs GPUs"),
        (["--executor", "slurm", "--device", "cpu"], "sbatch was not found; use a login node"),
    ],
)
def test_options_of_slurm_are_checked(
    options: list[object], message: str, stbench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = stbench(*GRID, *options, "--output", tmp_path / "none")
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "none").exists()


def test_without_submitit_slurm_says_how_to_install_it(
    stbench: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, _, err = stbench(*GRID, "--executor", "slurm", "--device", "cpu", "--dry-run")
    assert code == 2 and "pip install 'stbench[slurm]'" in err


def test_dry_run_describes_the_jobs_of_slurm(
    stbench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    for name in ("sbatch", "srun", "squeue", "scancel"):
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    slurm = [*GRID, "--executor", "slurm", "--gpus-per-job", 4, "--jobs", 3, "--dry-run"]
    code, _, err = stbench(*slurm)
    assert code == 2 and "give --precision, such as bf16" in err
    code, out, err = stbench(*slurm, "--precision", "bf16")
    assert code == 0, err
    assert "Slurm jobs with 4 GPUs per run, at most 3 at a time, on cuda; run folders in" in out


@pytest.mark.slow
def test_a_sweep_records_a_failed_run_and_continues(stbench: Command, tmp_path: Path) -> None:
    defaults = {"dataset": "digits", "backbone": "sit", "steps": 2, "precision": "fp32", "set": TINY}
    runs = [{"recipe": "vanilla", "set": {"train.lr": 1.0e17}}, {"recipe": "vanilla"}]
    suite, output = tmp_path / "two.json", tmp_path / "runs"
    suite.write_text(json.dumps({"defaults": defaults, "groups": [{"runs": runs}]}))
    code, out, err = stbench("sweep", "--suite", suite, "--output", output, "--device", "cpu")
    assert code == 1, err
    assert "1 finished, 1 failed; rerun the same command to retry" in out
    assert f"next: stbench compare {output}" in out
    failed, finished = read_journal(output)
    assert failed.state == "failed" and "not finite" in failed.error
    assert finished.state == "finished" and len(list(output.glob("*/spec.json"))) == 2
    assert f"failed: {failed.run_id}: {failed.error}" in out and "running: " + finished.run_id in err
    text = suite.read_text()
    suite.write_text(text.replace('"eval.samples": 40', '"eval.samples": 50'))
    code, out, err = stbench("sweep", "--suite", suite, "--output", output, "--only", finished.run_id)
    assert code == 2 and "other evaluation settings" in err
    suite.write_text(text)
    code, out, err = stbench("sweep", "--suite", suite, "--output", output, "--only", finished.run_id)
    assert code == 0 and "1 finished, 0 failed\n" in out and "running" not in err.partition("\n")[2]


def test_dry_run_lists_the_runs_and_writes_nothing(stbench: Command, tmp_path: Path) -> None:
    code, out, err = stbench(
        *("sweep", "--backbone", "dit,sit", "--recipe", "all", "--seeds", 3, "--steps", 20),
        *("--output", tmp_path / "none", "--dry-run"),
    )
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("waiting")]
    assert len(lines) == len(set(lines)) >= 18 and not (tmp_path / "none").exists()
    assert f"{len(lines)} runs: 0 running, {len(lines)} waiting" in out
    total, different = (
        int(out.partition(mark)[0].split()[-1]) for mark in (" stages,", " of them different")
    )
    assert total - different >= 6  # Self-Transcendence's teacher is VAE alignment's run


SUITE = """
defaults: {dataset: digits, steps: 400, seeds: [0, 1], precision: fp32}
groups:
  - with: {backbone: dit, objective: iddpm, set: {eval.sampler: ddim}}
    runs:
      - {recipe: vanilla}
      - {recipe: self-transcendence, seeds: [7], set: {recipe.guidance: 1}}
  - runs:
      - {recipe: vanilla, backbone: sit, seed: 3}
"""


def test_only_selects_runs_by_folder_name_or_description(stbench: Command, tmp_path: Path) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(SUITE)
    for text, count in {"sit-ti-2-vanilla": 1, "dit-ti/2 iddpm": 3, "guidance=1.0": 1, "seed 7": 1}.items():
        code, out, err = stbench("sweep", "--suite", file, "--only", text, "--dry-run")
        assert code == 0 and f"\n{count} runs:" in out, err


SIT = ("sweep", "--backbone", "sit", "--recipe", "vanilla")
MISTAKES = {
    "no backbone": (("sweep", "--recipe", "all"), "--backbone or --suite is missing"),
    "no recipe": (("sweep", "--backbone", "all"), "--recipe or --suite is missing"),
    "recipe": ((*SIT[:-1], "vanilla,vanila"), "unknown recipe 'vanila'; did you mean 'vanilla'?"),
    "twice": ((*SIT[:-1], "vanilla,vanilla"), "is requested twice; remove one of them"),
    "seeds": ((*SIT, "--seeds", "none"), "--seeds must be a positive number or a list, got 'none'"),
    "jobs": ((*SIT, "--jobs", "0"), "Invalid value for '--jobs'"),
    "suite": (("sweep", "--suite", "nowhere"), "unknown suite 'nowhere'"),
    "suite file": (("sweep", "--suite", "gone.yaml"), "suite file not found: gone.yaml"),
    "both": ((*SIT, "--suite", "gone.yaml"), "cannot be combined with --backbone"),
    "set beside": (("sweep", "--suite", "gone.yaml", "--set", "train.lr=1"), "cannot be combined with --set"),
    "only": ((*SIT, "--only", "uvit"), "--only 'uvit' matches none of the 1 runs"),
    "option": ((*SIT, "--set", "train.lrr=1"), "unknown option 'train.lrr'; did you mean 'train.lr'?"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_trains_nothing(
    stbench: Command, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[name]
    code, _, err = stbench(*arguments)
    assert code == 2 and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []
