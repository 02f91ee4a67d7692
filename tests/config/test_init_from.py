"""Runs that start from an official checkpoint: what the file decides, what is refused, what is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stbench.config.init_from import describe_start
from stbench.config.plan import prepare
from stbench.config.resolve import resolve_options
from stbench.config.spec import RunSpec
from stbench.core.errors import UserError
from stbench.models.official import from_state
from stbench.train import engine
from tests.conftest import TINY, Command
from tests.models.test_official import key_table, recipe_heads, wrapped

QUICK = {key: value for key, value in TINY.items() if not key.startswith("backbone.")}
File = Callable[..., Path]


@pytest.fixture()
def file(tmp_path: Path) -> File:
    """A training checkpoint of an unpublished size for 4x8x8 latents; returns the file."""

    def write(*, classes: int = 10, width: int = 24, out: int = 4, **more: Tensor) -> Path:
        state = key_table(width, 2, out=out) | recipe_heads("repa", width) | more
        table = "y_embedder.embedding_table.weight"
        state[table] = torch.randn(classes + 1, width)
        torch.save(wrapped(state), tmp_path / "last.pt")
        return tmp_path / "last.pt"

    return write


def spec_from(path: Path, backbone: str = "sit", recipe: str = "vanilla", **more: Any) -> RunSpec:
    fields = {k: more.pop(k) for k in ("original", "objective", "init_weights", "seed") if k in more}
    overrides = {**QUICK, "backbone.heads": 4, **{k.replace("__", "."): v for k, v in more.items()}}
    values = {"backbone": backbone, "recipe": recipe, "steps": 2, "init_from": str(path), **fields}
    return resolve_options(values, overrides)


def first_step(spec: RunSpec, output: Path) -> tuple[dict[str, Tensor], str]:
    """The trained weights of a run, and its folder."""
    record, _ = engine.run(prepare(spec), engine.RunOptions(output))
    (raw,) = Path(record.path).glob("checkpoints/0-*/raw-*.safetensors")
    return load_file(raw), record.path


def test_the_student_starts_from_the_file_and_the_file_decides_its_shape(file: File, tmp_path: Path) -> None:
    path = file()
    spec = spec_from(path, train__lr=1e-9)
    weights, folder = first_step(spec, tmp_path / "runs")
    expected = from_state(
        torch.load(path, weights_only=False)["ema"], heads=4, objective="linear"
    ).backbone.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.allclose(weights[key], expected[key], atol=1e-6) for key in expected)
    stored = json.loads((Path(folder) / "spec.json").read_text())
    assert stored["init"]["sha256"] == spec.init.sha256 if spec.init else False
    assert stored["recipe"]["needs"] == "initial weights"


def test_the_tensors_and_not_the_name_of_the_file_are_in_the_hash(file: File, tmp_path: Path) -> None:
    path = file()
    spec = spec_from(path)
    first = prepare(spec).hashes
    moved = path.rename(tmp_path / "moved.pt")
    assert prepare(spec_from(moved)).hashes == first
    assert prepare(spec_from(moved, init_weights="raw")).hashes.setting != first.setting
    fresh = prepare(spec.model_copy(update={"init": None})).hashes
    assert fresh.setting != first.setting and fresh.train != first.train


def test_a_run_resumes_and_continues_with_its_file(file: File, tmp_path: Path) -> None:
    path = file()
    short, _ = first_step(spec_from(path), tmp_path / "a")
    longer = spec_from(path).model_copy()
    again, trained = engine.run(prepare(longer), engine.RunOptions(tmp_path / "a"))
    assert not trained and again.steps == 2
    other, _ = first_step(spec_from(path), tmp_path / "b")
    assert all(torch.equal(short[key], other[key]) for key in short)


def test_only_the_first_stage_starts_from_the_file(file: File, tmp_path: Path) -> None:
    blocks = {"recipe__teacher_block": 1, "recipe__student_block": 0, "train__lr": 1e-9}
    spec = spec_from(file(), recipe="self-transcendence", **blocks)
    record, _ = engine.run(prepare(spec), engine.RunOptions(tmp_path / "r"))
    first, second = (load_file(next(Path(record.path).glob(f"checkpoints/{k}-*/raw-*"))) for k in (0, 1))
    assert first["blocks.0.attn.qkv.bias"].abs().max() > 0.01
    assert second["blocks.0.attn.qkv.bias"].abs().max() < 0.001


def test_another_number_of_classes_keeps_the_null_row_and_says_so(file: File, tmp_path: Path) -> None:
    path = file(classes=3)
    spec = spec_from(path, train__lr=1e-9)
    assert spec.init is not None
    assert (
        "it has 3 classes and the data set has 10, so the label embedding is initialised anew"
        in describe_start(spec.init, 10)
    )
    weights, _ = first_step(spec, tmp_path / "runs")
    table, key = weights["y_embedder.embedding_table.weight"], "y_embedder.embedding_table.weight"
    held = torch.load(path, weights_only=False)["ema"][key]
    assert table.shape[0] == 11 and torch.allclose(table[-1], held[-1], atol=1e-6)
    assert table[:10].std() < 0.05 < held.std()


def test_what_does_not_fit_is_one_line_that_says_what_to_type(file: File, tmp_path: Path) -> None:
    path = file()
    with pytest.raises(UserError, match="weights of a dit, found those of REPA.*--backbone sit"):
        spec_from(path, "dit")
    with pytest.raises(UserError, match="backbone.depth=7 in .*, found 2; leave --set backbone.depth out"):
        spec_from(path, backbone__depth=7)
    with pytest.raises(UserError, match="objective 'iddpm' in .*, found 'linear'; use --objective linear"):
        spec_from(path, objective="iddpm")
    with pytest.raises(UserError, match="--original is only used with --init-from FILE"):
        resolve_options({"backbone": "sit", "recipe": "vanilla", "original": "repa"}, QUICK)
    with pytest.raises(UserError, match="--init-weights must be raw or ema, got 'best'"):
        spec_from(path, init_weights="best")
    large = file(pos_embed=torch.zeros(1, 64, 24))
    with pytest.raises(UserError, match="weights for 4x8x8 latents of data set 'digits', found 4x16x16"):
        spec_from(large)


def test_a_published_size_is_taken_from_the_file(tmp_path: Path) -> None:
    torch.save(key_table(96, 6, out=4, heads=3), tmp_path / "ti.pt")
    values = {"backbone": "sit", "recipe": "vanilla", "steps": 2, "init_from": str(tmp_path / "ti.pt")}
    with pytest.raises(UserError, match="path of a SiT in .*, found neither; type --objective linear"):
        resolve_options(values, QUICK)
    spec = resolve_options({**values, "objective": "linear"}, QUICK)
    assert spec.init is not None and "objective linear, from" in describe_start(spec.init, 10)
    assert (spec.backbone.size, spec.backbone.options) == ("ti/2", {})
    with pytest.raises(
        UserError, match="expected a sit-b/2 in .*, found a sit-ti/2; use --backbone sit-ti/2"
    ):
        spec_from(tmp_path / "ti.pt", "sit-b/2", backbone__heads=3, objective="linear")


def test_a_file_that_changes_before_training_is_refused(file: File, tmp_path: Path) -> None:
    spec = spec_from(file())
    file(pos_embed=torch.ones(1, 16, 24))  # other weights under the same name
    with pytest.raises(UserError, match="has changed: expected tensors with sha256"):
        engine.run(prepare(spec), engine.RunOptions(tmp_path / "runs"))


def test_the_command_says_what_it_starts_from(stbench: Command, file: File, tmp_path: Path) -> None:
    sets = [part for key, value in QUICK.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    words = ["run", "--backbone", "dit", "--recipe", "vanilla", "--steps", "2", "--device", "cpu", *sets]
    words += ["--set", "backbone.heads=4", "--output", tmp_path / "runs"]
    state = key_table(24, 2, out=8)
    torch.save(state, tmp_path / "dit.pt")
    code, out, err = stbench(*words, "--init-from", tmp_path / "dit.pt")
    assert code == 0, err
    assert "starts from DiT, dit-custom" in out.replace("\n", " ")
    code, _, err = stbench(*words, "--init-from", tmp_path / "none.pt")
    assert code == 2 and "weights not found" in err and len(err.strip().splitlines()) == 1
