"""The command line as a user meets it: what works, and one line for every mistake."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stbench.core.registry import RECIPES
from stbench.runs.folder import RunFolder
from tests.conftest import BLOCKS, TINY, Command, Runner


def tiny_options(recipe: str = "vanilla") -> list[str]:
    blocks = BLOCKS if recipe == "self-transcendence" else {}
    pairs = (TINY | blocks).items()
    sets = [part for key, value in pairs for part in ("--set", f"{key}={json.dumps(value)}")]
    return ["run", "--backbone", "sit", "--recipe", recipe, "--steps", "2", "--device", "cpu", *sets]


def test_a_run_prints_its_curve_and_leaves_a_picture(stbench: Command, tmp_path: Path) -> None:
    code, out, err = stbench(*tiny_options("self-transcendence"), "--output", tmp_path)
    assert code == 0, err
    assert "vae-align" in out and "self-transcendence" in out and "run folder:" in out
    (folder,) = (p.parent for p in tmp_path.glob("*/spec.json"))
    assert len(list(folder.glob("samples/1-*.png"))) == 1
    again, out, _ = stbench(*tiny_options("self-transcendence"), "--output", tmp_path)
    assert again == 0 and "already finished" in out


def test_compare_show_sample_and_evaluate_read_a_run(stbench: Command, tiny: Runner, tmp_path: Path) -> None:
    record = tiny()
    code, out, _ = stbench("compare", tmp_path, "--format", "json", "--plot", tmp_path / "curves.png")
    assert code == 0 and json.loads(out)["tables"] and (tmp_path / "curves.png").stat().st_size > 5000
    assert stbench("show", record.path)[0] == 0
    code, _, _ = stbench("sample", record.path, "-n", 6, "--output", tmp_path / "six.npz", "--device", "cpu")
    held = np.load(tmp_path / "six.npz")
    assert code == 0 and held["arr_0"].shape == (6, 32, 32, 3) and held["arr_0"].dtype == np.uint8
    assert held["labels"].shape == (6,)
    code, out, err = stbench(
        "evaluate", record.path, "--samples", 30, "--eval-guidance", "1.0,1.5", "--device", "cpu"
    )
    assert code == 0 and "2 rows added" in out, err
    assert len({p.protocol for p in RunFolder(Path(record.path)).points()}) == 2
    for wrong in ("eval.smaples=9", "eval.steps=0", "train.lr=1"):
        code, _, err = stbench("evaluate", record.path, "--set", wrong)
        assert code == 2 and err.count("\n") == 1 and wrong.split("=")[0] in err
    assert "0 rows added" in stbench("evaluate", record.path, "--samples", 30, "--device", "cpu")[1]


def test_dry_run_prints_the_plan_and_writes_nothing(stbench: Command, tmp_path: Path) -> None:
    code, out, err = stbench(*tiny_options("self-transcendence"), "--output", tmp_path / "none", "--dry-run")
    assert code == 0, err
    assert "vae-align" in out and '"guidance": 10.0' in out and not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["recipes", "datasets", "objectives", "samplers", "metrics"])
def test_list_as_table_and_as_json(stbench: Command, kind: str) -> None:
    code, out, _ = stbench("list", kind, "--json")
    assert code == 0 and len(json.loads(out)) >= 1
    assert stbench("list", kind)[0] == 0


def test_list_backbones_counts_what_the_papers_count(stbench: Command) -> None:
    rows = {row["backbone"]: row for row in json.loads(stbench("list", "backbones", "--json")[1])}
    assert rows["dit-xl/2"]["parameters"] == 675_129_632 and rows["dit-xl/2"]["GMACs"] == 118.62
    assert rows["uvit-l/2"]["parameters"] == 286_763_172


def test_a_config_file_gives_what_the_command_line_does_not(stbench: Command, tmp_path: Path) -> None:
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
    "no recipe": (("run", "--backbone", "sit"), "expected --recipe, found none"),
    "backbone": (
        ("run", "--backbone", "sitt", "--recipe", "vanilla"),
        "unknown backbone 'sitt'; did you mean 'sit'?",
    ),
    "recipe": (
        ("run", "--backbone", "sit", "--recipe", "vanila"),
        "unknown recipe 'vanila'; did you mean 'vanilla'?",
    ),
    "dataset": ((*VANILLA, "--dataset", "digit"), "unknown dataset 'digit'; did you mean 'digits'?"),
    "size": (("run", "--backbone", "sit-q/2", "--recipe", "vanilla"), "unknown size 'q/2' of backbone 'sit'"),
    "objective": ((*VANILLA, "--objective", "lineal"), "unknown objective 'lineal'; did you mean 'linear'?"),
    "option": ((*VANILLA, "--set", "train.lrr=1"), "unknown option 'train.lrr'; did you mean 'train.lr'?"),
    "section": ((*VANILLA, "--set", "trian.lr=1"), "unknown option 'trian.lr'"),
    "recipe option": ((*TAUGHT, "--set", "recipe.guidence=3"), "did you mean 'recipe.guidance'?"),
    "no recipe options": ((*VANILLA, "--set", "recipe.guidance=3"), "recipe takes: no options"),
    "backbone option": ((*VANILLA, "--set", "backbone.dept=3"), "did you mean 'backbone.depth'?"),
    "value": ((*VANILLA, "--set", "train.lr=fast"), "invalid value for 'train.lr'"),
    "recipe value": ((*TAUGHT, "--set", "recipe.mask=all"), "invalid value for 'recipe.mask'"),
    "negative rate": ((*VANILLA, "--set", "train.lr=-1"), "greater than 0, got -1"),
    "no value": ((*VANILLA, "--set", "train.lr"), "--set wants KEY=VALUE, got 'train.lr'"),
    "heads": ((*VANILLA, "--set", "backbone.heads=5"), "heads that divide the width 96, found 5"),
    "plug-in file": ((*VANILLA, "--plugin", "gone.py"), "plug-in file not found: gone.py"),
    "device": ((*VANILLA[:-1], "tpu9"), "unknown device 'tpu9'"),
    "no such GPU": ((*VANILLA[:-1], "cuda:99"), "is not here"),
    "steps": ((*VANILLA, "--steps", "0"), "invalid value for 'train.steps'"),
    "steps no number": ((*VANILLA, "--steps", "many"), "Invalid value for '--steps'"),
    "seed": ((*VANILLA, "--seed", "-1"), "--seed wants a whole number of at least 0, got -1"),
    "precision": ((*VANILLA, "--precision", "fp8"), "invalid value for 'train.precision'"),
    "block": ((*TAUGHT, "--set", "recipe.student_block=6"), "recipe.student_block=6 is out of range"),
    "teacher block": ((*TAUGHT, "--set", "recipe.teacher_block=6"), "sit-ti/2 has blocks 0..5"),
    "guidance": ((*VANILLA, "--eval-guidance", "1.0,two"), "--eval-guidance wants numbers"),
    "low guidance": ((*VANILLA, "--eval-guidance", "0.5"), "guidance scales are at least 1.0"),
    "sampler": ((*VANILLA, "--set", "eval.sampler=ddpm"), "cannot invert objective 'linear'; it takes euler"),
    "points": ((*VANILLA, "--set", "eval.points=[900]"), "eval.points wants steps in 1..800"),
    "micro-batches": (
        (*VANILLA, "--set", "train.accumulate=65"),
        "at most train.batch=64 micro-batches",
    ),
    "too few samples": ((*VANILLA, "--set", "eval.samples=5"), "invalid value for 'eval.samples'"),
    "heads zero": ((*VANILLA, "--set", "backbone.heads=0"), "cannot be built with {'heads': 0}"),
    "no depth": ((*VANILLA, "--set", "backbone.depth=0"), "wants at least one block, got 0"),
    "empty size": (("run", "--backbone", "sit-", "--recipe", "vanilla"), "unknown size ''"),
    "hidden": ((*TAUGHT, "--set", "recipe.hidden=-4"), "invalid value for 'recipe.hidden'"),
    "teacher steps": (
        (*TAUGHT, "--set", "recipe.teacher_steps=0"),
        "invalid value for 'recipe.teacher_steps'",
    ),
    "recipe interval": (
        (*TAUGHT, "--set", "recipe.interval=[0.7,0.4]"),
        "must be [low,high] with low <= high",
    ),
    "betas": ((*VANILLA, "--set", "train.betas=[0.9,1.0]"), "invalid value for 'train.betas'"),
    "guided channels": ((*VANILLA, "--set", "eval.channels=9"), "eval.channels wants 1..4"),
    "interval": ((*VANILLA, "--set", "eval.interval=[0.7,0.2]"), "eval.interval wants low <= high"),
    "sampler steps": (
        ("run", "--backbone", "dit", "--recipe", "vanilla", "--set", "eval.steps=2000"),
        "2000",
    ),
    "no npz": (("sample", "nowhere", "--output", "x.png"), "ends in .npz"),
    "config file": (("run", "--config", "gone.yaml"), "config file not found: gone.yaml"),
    "command": (("runn",), "No such command 'runn'"),
    "flag": ((*VANILLA, "--stepz", "3"), "No such option: --stepz"),
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
def test_a_config_file_of_another_shape_is_one_line(stbench: Command, tmp_path: Path, content: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(content)
    code, _, err = stbench("run", "--backbone", "sit", "--config", config, "--recipe", "vanilla", "--dry-run")
    expected = 0 if content.startswith("backbone") else 2  # the command line wins over the file
    assert code == expected and err.count("\n") <= 1 and "Traceback" not in err


def test_a_path_that_cannot_be_written_is_one_line(stbench: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = stbench(*tiny_options(), "--output", tmp_path / "file")
    assert code == 2 and "error: Not a directory" in err.splitlines()[-1]


def test_a_broken_method_is_one_line(stbench: Command, tmp_path: Path) -> None:
    plugin = tmp_path / "methods.py"
    plugin.write_text(
        "from stbench.core.registry import RECIPES\n"
        "@RECIPES.register_module(name='raises', force=True)\ndef raises(info):\n    return 1 / 0\n"
        "@RECIPES.register_module(name='none', force=True)\ndef none(info):\n    return []\n"
    )
    for recipe, message in {"raises": "ZeroDivisionError", "none": "at least one Stage"}.items():
        code, _, err = stbench("run", "--plugin", plugin, "--backbone", "sit", "--recipe", recipe)
        assert code == 2 and err.count("\n") == 1 and message in err
        del RECIPES.module_dict[recipe]


def test_ctrl_c_prints_the_command_that_goes_on(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "stbench",
        *tiny_options(),
        "--steps",
        "100000",
        "--output",
        str(tmp_path),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        while "step 100/" not in (line := process.stderr.readline()):
            assert line, "the run ended by itself"
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-1].startswith(
        "stopped; rerun the same command to resume: stbench run --backbone sit"
    )


def test_version(stbench: Command) -> None:
    assert stbench("--version")[1].startswith("stbench 0.")


def test_debug_shows_the_traceback(stbench: Command) -> None:
    code, _, err = stbench("run", "--backbone", "sitt", "--recipe", "vanilla", "--debug")
    assert code == 2 and "Traceback" in err and "unknown backbone 'sitt'" in err


def test_a_broken_plugin_is_one_line(stbench: Command, tmp_path: Path) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text("import nothing_of_that_name\n")
    code, _, err = stbench(*VANILLA, "--plugin", plugin)
    assert code == 2 and err.count("\n") == 1
    assert "broken.py failed to import: ModuleNotFoundError: No module named 'nothing_of_that_name'" in err


@pytest.mark.parametrize("name", ["spec.json", "curve.jsonl", "stages.jsonl", "status.json"])
def test_a_truncated_file_of_a_run_is_one_line(stbench: Command, tiny: Runner, name: str) -> None:
    record = tiny()
    file = Path(record.path) / name
    file.write_bytes(file.read_bytes()[:-9])
    for command in ("show", "compare"):
        code, _, err = stbench(command, record.path)
        assert code == 2 and err.count("\n") == 1 and name in err


def test_truncated_weights_are_one_line(stbench: Command, tiny: Runner, tmp_path: Path) -> None:
    record = tiny()
    (file,) = Path(record.path).glob("checkpoints/*/ema-*")
    file.write_bytes(file.read_bytes()[:-9])
    code, _, err = stbench("sample", record.path, "--output", tmp_path / "x.npz", "--device", "cpu")
    assert code == 2 and err.count("\n") == 1 and "is truncated or no safetensors file" in err
    assert not (tmp_path / "x.npz").exists()
