"""The command line as a user meets it: what the commands print, and one line for every mistake."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from stbench.cli import app as cli
from stbench.core.registry import RECIPES, SAMPLERS
from stbench.runs.folder import RunFolder
from tests.conftest import BLOCKS, TINY, Command


@pytest.fixture()
def finished(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run folder, which a test may change."""
    return shutil.copytree(trained_run, tmp_path / "runs" / trained_run.name)


def tiny_options(recipe: str = "vanilla") -> list[str]:
    blocks = BLOCKS if recipe == "self-transcendence" else {}
    pairs = (TINY | blocks).items()
    sets = [part for key, value in pairs for part in ("--set", f"{key}={json.dumps(value)}")]
    return ["run", "--backbone", "sit", "--recipe", recipe, "--steps", "2", "--device", "cpu", *sets]


def test_a_run_prints_its_curve_and_saves_a_picture(stbench: Command, tmp_path: Path) -> None:
    code, out, err = stbench(*tiny_options("self-transcendence"), "--output", tmp_path)
    assert code == 0, err
    assert "vae-align" in out and "self-transcendence" in out and "run folder:" in out
    (folder,) = (p.parent for p in tmp_path.glob("*/spec.json"))
    assert len(list(folder.glob("samples/1-*.png"))) == 1
    again, out, _ = stbench(*tiny_options("self-transcendence"), "--output", tmp_path)
    assert again == 0 and "is already finished at 2 steps; nothing to do" in out


def test_compare_show_sample_and_evaluate_read_a_run(
    stbench: Command, finished: Path, tmp_path: Path
) -> None:
    code, out, _ = stbench("compare", finished, "--format", "json", "--plot", tmp_path / "curves.png")
    assert code == 0 and json.loads(out)["tables"] and (tmp_path / "curves.png").stat().st_size > 5000
    assert stbench("show", finished)[0] == 0
    code, _, _ = stbench("sample", finished, "-n", 6, "--output", tmp_path / "six.npz", "--device", "cpu")
    file = np.load(tmp_path / "six.npz")
    assert code == 0 and file["arr_0"].shape == (6, 32, 32, 3) and file["arr_0"].dtype == np.uint8
    assert file["labels"].shape == (6,)
    code, out, err = stbench(
        "evaluate", finished, "--samples", 30, "--eval-guidance", "1.0,1.5", "--device", "cpu"
    )
    assert code == 0 and "2 rows added" in out, err
    assert len({p.protocol for p in RunFolder(finished).points()}) == 2
    for wrong in ("eval.smaples=9", "eval.steps=0", "train.lr=1"):
        code, _, err = stbench("evaluate", finished, "--set", wrong)
        assert code == 2 and err.count("\n") == 1 and wrong.split("=")[0] in err
    assert "0 rows added" in stbench("evaluate", finished, "--samples", 30, "--device", "cpu")[1]


def test_dry_run_prints_the_plan_and_writes_nothing(stbench: Command, tmp_path: Path) -> None:
    code, out, err = stbench(*tiny_options("self-transcendence"), "--output", tmp_path / "none", "--dry-run")
    assert code == 0, err
    assert "vae-align" in out and '"guidance": 10.0' in out and not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["datasets", "objectives", "samplers", "metrics"])
def test_list_as_table_and_as_json(stbench: Command, kind: str) -> None:
    code, out, _ = stbench("list", kind, "--json")
    assert code == 0 and len(json.loads(out)) >= 1
    assert stbench("list", kind)[0] == 0


def test_list_prints_square_brackets_and_options_of_a_plugin(stbench: Command, tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "from stbench.core.registry import SAMPLERS\nfrom stbench.diffusion.flow_samplers import Euler\n"
        "@SAMPLERS.register_module(name='bracketed', force=True)\n"
        "class Bracketed(Euler):\n    'Uses [bold] brackets.'\n"
    )
    code, out, _ = stbench("list", "samplers", "--plugin", plugin)
    del SAMPLERS.module_dict["bracketed"]
    assert code == 0 and "Uses [bold] brackets." in out


@pytest.mark.slow
def test_list_recipes_counts_their_overhead(stbench: Command) -> None:
    rows = {row["recipe"]: row for row in json.loads(stbench("list", "recipes", "--json")[1])}
    overhead = {name: list(row.values())[-1] for name, row in rows.items()}
    assert overhead["vanilla"] == "1.00" and "with its teacher" in overhead["self-transcendence"]


@pytest.mark.slow
def test_list_backbones_counts_what_the_papers_count(stbench: Command) -> None:
    rows = {row["backbone"]: row for row in json.loads(stbench("list", "backbones", "--json")[1])}
    assert rows["dit-xl/2"]["parameters"] == 675_129_632 and rows["dit-xl/2"]["GMACs"] == 118.62
    assert rows["uvit-l/2"]["parameters"] == 286_763_172


def test_the_command_line_overrides_the_config_file(stbench: Command, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "backbone: sit\nrecipe: vanilla\nsteps: 7\nset:\n  train:\n    lr: 1e-3\n  eval.samples: 50\n"
    )
    code, out, err = stbench("run", "--config", config, "--steps", 9, "--output", tmp_path, "--dry-run")
    assert code == 0, err
    assert '"steps": 9' in out and '"lr": 0.001' in out and '"samples": 50' in out


VANILLA = ("run", "--backbone", "sit", "--recipe", "vanilla", "--device", "cpu")
TAUGHT = ("run", "--backbone", "sit", "--recipe", "self-transcendence", "--device", "cpu")
MISTAKES = {
    # Names
    "backbone": (
        ("run", "--backbone", "sitt", "--recipe", "vanilla"),
        "unknown backbone 'sitt'; did you mean 'sit'?",
    ),
    "size": (("run", "--backbone", "sit-q/2", "--recipe", "vanilla"), "unknown size 'q/2' of backbone 'sit'"),
    "empty size": (("run", "--backbone", "sit-", "--recipe", "vanilla"), "unknown size ''"),
    "recipe": (
        ("run", "--backbone", "sit", "--recipe", "vanila"),
        "unknown recipe 'vanila'; did you mean 'vanilla'?",
    ),
    "no recipe": (("run", "--backbone", "sit"), "--recipe is missing"),
    "dataset": ((*VANILLA, "--dataset", "digit"), "unknown dataset 'digit'; did you mean 'digits'?"),
    "objective": ((*VANILLA, "--objective", "lineal"), "unknown objective 'lineal'; did you mean 'linear'?"),
    # Options of --set
    "option": ((*VANILLA, "--set", "train.lrr=1"), "unknown option 'train.lrr'; did you mean 'train.lr'?"),
    "section": ((*VANILLA, "--set", "trian.lr=1"), "unknown option 'trian.lr'"),
    "recipe option": ((*TAUGHT, "--set", "recipe.guidence=3"), "did you mean 'recipe.guidance'?"),
    "no recipe options": ((*VANILLA, "--set", "recipe.guidance=3"), "unknown option 'recipe.guidance'"),
    "backbone option": ((*VANILLA, "--set", "backbone.dept=3"), "did you mean 'backbone.depth'?"),
    "no value": ((*VANILLA, "--set", "train.lr"), "--set must be KEY=VALUE, got 'train.lr'"),
    # Values of the training
    "value": ((*VANILLA, "--set", "train.lr=fast"), "invalid value for 'train.lr'"),
    "negative rate": ((*VANILLA, "--set", "train.lr=-1"), "greater than 0, got -1"),
    "betas": ((*VANILLA, "--set", "train.betas=[0.9,1.0]"), "invalid value for 'train.betas'"),
    "micro-batches": ((*VANILLA, "--set", "train.accumulate=65"), "must be at most train.batch=64"),
    "steps": ((*VANILLA, "--steps", "0"), "invalid value for 'train.steps'"),
    "steps no number": ((*VANILLA, "--steps", "many"), "Invalid value for '--steps'"),
    "seed": ((*VANILLA, "--seed", "-1"), "--seed must be an integer in 0..9223372036854775807, got -1"),
    "precision": ((*VANILLA, "--precision", "fp8"), "invalid value for 'train.precision'"),
    # Values of the backbone and the recipe
    "heads": ((*VANILLA, "--set", "backbone.heads=5"), "heads must divide the width 96, got 5"),
    "heads zero": ((*VANILLA, "--set", "backbone.heads=0"), "greater than or equal to 1, got 0"),
    "no depth": ((*VANILLA, "--set", "backbone.depth=0"), "greater than or equal to 1, got 0"),
    "recipe value": ((*TAUGHT, "--set", "recipe.mask=all"), "invalid value for 'recipe.mask'"),
    "hidden": ((*TAUGHT, "--set", "recipe.hidden=-4"), "invalid value for 'recipe.hidden'"),
    "teacher steps": (
        (*TAUGHT, "--set", "recipe.teacher_steps=0"),
        "invalid value for 'recipe.teacher_steps'",
    ),
    "recipe interval": ((*TAUGHT, "--set", "recipe.interval=[0.7,0.4]"), "with low <= high"),
    "block": ((*TAUGHT, "--set", "recipe.student_block=6"), "recipe.student_block=6 is out of range"),
    "teacher block": ((*TAUGHT, "--set", "recipe.teacher_block=6"), "sit-ti/2 has blocks 0..5"),
    # Values of the evaluation
    "guidance": ((*VANILLA, "--eval-guidance", "1.0,two"), "--eval-guidance must be comma-separated numbers"),
    "low guidance": ((*VANILLA, "--eval-guidance", "0.5"), "eval.guidance': input should be greater"),
    "guided channels": ((*VANILLA, "--set", "eval.channels=9"), "eval.channels must be in 1..4"),
    "interval": ((*VANILLA, "--set", "eval.interval=[0.7,0.2]"), "eval.interval must be [low,high]"),
    "sampler": (
        (*VANILLA, "--set", "eval.sampler=ddpm"),
        "cannot invert objective 'linear'; use one of",
    ),
    "sampler steps": (
        ("run", "--backbone", "dit", "--recipe", "vanilla", "--set", "eval.steps=2000"),
        "must be 2 to 1000, got 2000",
    ),
    "points": ((*VANILLA, "--set", "eval.points=[900]"), "eval.points must be steps in 1..800"),
    "too few samples": ((*VANILLA, "--set", "eval.samples=5"), "invalid value for 'eval.samples'"),
    # Files and devices
    "plug-in file": ((*VANILLA, "--plugin", "gone.py"), "plug-in file not found: gone.py"),
    "config file": (("run", "--config", "gone.yaml"), "config file not found: gone.yaml"),
    "device": ((*VANILLA[:-1], "tpu9"), "unknown device 'tpu9'"),
    "no such GPU": ((*VANILLA[:-1], "cuda:99"), "device 'cuda:99' does not exist"),
    "no npz": (("sample", "nowhere", "--output", "x.png"), "ends in .npz"),
    # Commands and folders
    "command": (("runn",), "No such command 'runn'"),
    "flag": ((*VANILLA, "--stepz", "3"), "--stepz"),
    "kind": (("list", "backbone"), "'backbone' is not one of"),
    "no run": (("show", "nowhere"), "nowhere is not a run folder"),
    "nothing to compare": (("compare", "nowhere"), "no run folder"),
    "sample of nothing": (("sample", "nowhere"), "nowhere is not a run folder"),
    "evaluate of nothing": (("evaluate", "nowhere"), "nowhere is not a run folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    stbench: Command, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[name]
    code, out, err = stbench(*arguments)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert "Traceback" not in out + err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", ["set: 5", "backbone: [sit]", "recipe: vanilla\neval_guidance: 2", "- sit"]
)
def test_a_malformed_config_file_is_one_line(stbench: Command, tmp_path: Path, content: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(content)
    code, _, err = stbench("run", "--backbone", "sit", "--config", config, "--recipe", "vanilla", "--dry-run")
    expected = 0 if content.startswith("backbone") else 2  # --backbone overrides the file
    assert code == expected and err.count("\n") <= 1 and "Traceback" not in err


def test_a_path_that_cannot_be_written_is_one_line(stbench: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = stbench(*tiny_options(), "--output", tmp_path / "file")
    assert code == 2 and "is a file, expected a new path or a folder" in err.splitlines()[-1]


def test_a_broken_recipe_is_one_line(stbench: Command, tmp_path: Path) -> None:
    plugin = tmp_path / "broken_recipes.py"
    plugin.write_text(
        "from stbench.core.registry import RECIPES\n"
        "@RECIPES.register_module(name='raises', force=True)\ndef raises(info):\n    return 1 / 0\n"
        "@RECIPES.register_module(name='none', force=True)\ndef none(info):\n    return []\n"
    )
    for recipe, message in {"raises": "ZeroDivisionError", "none": "at least one Stage"}.items():
        code, _, err = stbench("run", "--plugin", plugin, "--backbone", "sit", "--recipe", recipe)
        assert code == 2 and err.count("\n") == 1 and message in err
        del RECIPES.module_dict[recipe]


def test_a_broken_plugin_is_one_line(stbench: Command, tmp_path: Path) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text("import nothing_of_that_name\n")
    code, _, err = stbench(*VANILLA, "--plugin", plugin)
    assert code == 2 and err.count("\n") == 1
    assert "broken.py failed to import: ModuleNotFoundError: No module named 'nothing_of_that_name'" in err


@pytest.mark.slow
def test_ctrl_c_prints_the_command_that_resumes(tmp_path: Path) -> None:
    run = [*tiny_options(), "--steps", "100000", "--output", str(tmp_path)]
    command = [sys.executable, "-m", "stbench", *run]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        while not (line := process.stderr.readline()).startswith("vanilla: 100000 steps"):
            assert line, "the run ended by itself"
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    last = rest.splitlines()[-1]
    assert last == f"stopped; rerun the same command to resume: {shlex.join(['stbench', *run])}"


def test_version(stbench: Command) -> None:
    assert stbench("--version")[1].startswith("stbench 0.")


def test_debug_shows_the_traceback(stbench: Command) -> None:
    code, _, err = stbench("run", "--backbone", "sitt", "--recipe", "vanilla", "--debug")
    assert code == 2 and "Traceback" in err and "unknown backbone 'sitt'" in err


def help_texts(group: object, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], list[str]]:
    """Help of every command and its parameters, by the words that are typed after `stbench`."""
    command: Any = group
    texts = {words: [command.help, *(getattr(p, "help", None) or "" for p in command.params)]}
    for name, child in getattr(command, "commands", {}).items():
        texts |= help_texts(child, (*words, name))
    return texts


def test_help_prints_every_text_in_full(stbench: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Square brackets in a help text would be taken for rich markup and disappear."""
    monkeypatch.setenv("COLUMNS", "1000")
    for words, texts in help_texts(typer.main.get_command(cli.app)).items():
        code, out, _ = stbench(*words, "--help")
        printed = " ".join(out.split())
        assert code == 0 and [text for text in texts if " ".join(text.split()) not in printed] == [], words


@pytest.mark.parametrize("name", ["spec.json", "curve.jsonl", "stages.jsonl", "status.json"])
def test_a_truncated_file_of_a_run_is_one_line(stbench: Command, finished: Path, name: str) -> None:
    file = finished / name
    file.write_bytes(file.read_bytes()[:-9])
    for command in ("show", "compare"):
        code, _, err = stbench(command, finished)
        assert code == 2 and err.count("\n") == 1 and name in err


def test_truncated_weights_are_one_line(stbench: Command, finished: Path, tmp_path: Path) -> None:
    (file,) = finished.glob("checkpoints/*/ema-*")
    file.write_bytes(file.read_bytes()[:-9])
    code, _, err = stbench("sample", finished, "--output", tmp_path / "x.npz", "--device", "cpu")
    assert code == 2 and err.count("\n") == 1 and "damaged: expected sha256" in err
    assert not (tmp_path / "x.npz").exists()
