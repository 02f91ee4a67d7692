"""Guides of runs: evaluation with them, other networks, stored samples, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stbench.config.build import build_objective
from stbench.config.overrides import read_config
from stbench.config.plan import prepare
from stbench.core.backbone import Backbone, BackboneInfo
from stbench.core.errors import UserError
from stbench.core.guides import Correction, Guide, HeadGuide, RouteGuide
from stbench.core.recipe import NoSupervision, Stage
from stbench.core.registry import RECIPES
from stbench.data.dataset import Dataset
from stbench.diffusion.guidance import Guidance
from stbench.diffusion.guides import NetworkGuide
from stbench.evaluate.again import evaluate_again
from stbench.evaluate.generate import generate
from stbench.evaluate.guides import load_guides, stage_guides
from stbench.evaluate.image_sets import read_npz_text
from stbench.evaluate.past_run import open_run
from stbench.models.export import export_network
from stbench.runs.folder import RunFolder
from stbench.runs.records import CurvePoint, RunRecord
from tests.conftest import Command, Runner, tiny_spec
from tests.networks import batch
from tests.networks import tiny as tiny_network

GRID = {"eval__guidance": [1.0, 1.5]}


class Image(nn.Module):
    """A head that only holds an image."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(1, 8, 8))


def headed(info: BackboneInfo) -> Sequence[Stage]:
    """A head that stays and is not trained, so that it predicts zero, and an image."""
    guides = {"deep": HeadGuide("deep", 1, scale=2.0), "correction": Correction(0.05, "image.mean")}

    def heads(network: Backbone) -> dict[str, nn.Module]:
        return {"deep": network.output_head(), "image": Image()}

    return [Stage("student", lambda e: NoSupervision(), heads=heads, guides=guides)]


headed.__module__ = "stbench.recipes.headed"  # a recipe of stbench, not of a plug-in


@pytest.fixture(autouse=True)
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES.module_dict, "headed", headed)


def settings(points: Sequence[CurvePoint]) -> list[tuple[int, float, str]]:
    return [(point.step, point.guidance, point.guides) for point in points]


def again(record: RunRecord, guides: str) -> Sequence[CurvePoint]:
    """Evaluate a run with guides; returns the added points."""
    run = open_run(Path(record.path))
    wanted = run.prepared.spec.eval.model_copy(update={"guides": guides})
    return evaluate_again(run, wanted, torch.device("cpu"))


def test_guides_are_evaluated_where_the_grid_is_and_resume(tiny: Runner) -> None:
    more: dict[str, Any] = GRID | {"eval__guides": "deep", "eval__points": [2, 4]}
    record = tiny("headed", **more)
    stored = RunFolder(Path(record.path))
    assert stored.spec()["eval"]["guides"] == "deep:2"  # the value that was used
    expected = [(2, 1.0, ""), (4, 1.0, ""), (4, 1.5, ""), (4, 1.0, "deep:2"), (4, 1.5, "deep:2")]
    assert settings(record.curve) == expected
    pictures = {path.stem.rpartition("-")[2] for path in (stored.path / "samples").iterdir()}
    assert pictures == {"g1", "g1.5", "g1+deep_2", "g1.5+deep_2"}
    assert set(stored.samples(0)) == {(2, 1.0), (4, 1.0), (4, 1.5)}

    # The head predicts zero, so that the guided prediction is twice the plain one.
    plain, guided = (
        point.metrics["fid"] for point in record.curve if point.guidance == 1.0 and point.step == 4
    )
    assert plain != guided
    assert again(record, "deep:2") == []

    # The folder as a config file: the names of guides belong to the recipe.
    assert read_config(stored.path)["set"]["eval.guides"] == "deep:2"
    assert "eval.guides" not in read_config(stored.path, typed=("recipe",))["set"]
    assert settings(again(record, "deep:1.5@0-0.7")) == [
        (4, 1.0, "deep:1.5@0-0.7"),
        (4, 1.5, "deep:1.5@0-0.7"),
    ]


def test_guides_enter_no_hash_and_old_records_have_none(tiny: Runner) -> None:
    spec = tiny_spec("headed")
    plain, guided = (prepare(each) for each in (spec, tiny_spec("headed", eval__guides="deep:1.5")))
    assert plain.hashes == guided.hashes
    record = tiny("headed", steps=1)
    assert record.curve[0].guides == "" and record.curve[0].guide_cost == {}
    line = (Path(record.path) / "curve.jsonl").read_text()
    assert "guide" not in line.replace('"guidance"', "")
    assert "eval.guides" not in read_config(Path(record.path))["set"]


def test_another_network_guides_and_its_cost_is_recorded(tiny: Runner) -> None:
    run, other = tiny("vanilla", steps=1), tiny("vanilla", steps=2, output="weak")
    points = again(run, f"network={other.path}:1.5")
    row = other.spec["row_hash"]
    assert [point.guidance for point in points] == [1.0]
    assert f"-vanilla-2-{row}#" in points[0].guides
    last = other.final_points[-1]
    assert dict(points[0].guide_cost) == {
        "images": last.images,
        "seconds": pytest.approx(last.seconds),
        "flops": pytest.approx(last.flops),
    }
    # A network that is guided by itself is not changed, whatever the scale; it costs nothing more.
    itself = again(run, f"network={run.path}:3")[0]
    assert itself.metrics["fid"] == pytest.approx(run.final_points[0].metrics["fid"], rel=1e-3)
    assert dict(itself.guide_cost) == {"images": 0.0, "seconds": 0.0, "flops": 0.0}
    file = next(Path(other.path).glob("checkpoints/*/ema-*.safetensors"))
    assert again(run, f"network={file}:1.5") == []  # the same weights


def test_sampling_with_guides_stores_them_and_only_then(
    tiny: Runner, tmp_path: Path, stbench: Command
) -> None:
    run = tiny("headed", steps=1).path
    files = [tmp_path / f"{name}.npz" for name in ("plain", "guided", "network")]
    guides = ["", "deep@0-0.9", f"network={run}:1.5"]
    for file, guide in zip(files, guides, strict=True):
        options = ["--guide", guide] if guide else []
        code, _, err = stbench("sample", run, "-n", 10, "--output", file, "--device", "cpu", *options)
        assert code == 0, err
    stored = [read_npz_text(file, "settings") for file in files]
    assert "guides" not in stored[0]
    assert '"guides": "deep:2@0-0.9"' in stored[1] and '"guides": "network=sit-' in stored[2]
    plain, guided, _ = (np.load(file)["arr_0"] for file in files)
    assert not np.array_equal(plain, guided)


def test_evaluate_takes_several_guides(tiny: Runner, stbench: Command) -> None:
    run = tiny("headed", steps=1).path
    code, out, err = stbench("evaluate", run, "--guide", "deep@0-0.7", "--guide", "deep:3+correction@0-0.65")
    assert code == 0, err
    assert "deep:2@0-0.7" in out and "deep:3+correction@0-0.65" in out and "2 rows added" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("other:1.5", "got 'other'; choose from: deep, correction, network=PATH"),
        ("correction:2", "takes no scale, got correction:2; for example correction@0-0.7"),
        ("deep:0.5", "the scale of a guide must be between 1 and 1000, got 0.5"),
        ("deep@0.7-0.2", "0 <= LOW <= HIGH <= 1, got 0.7-0.2"),
        ("deep:", "must be NAME"),
        ("deep:1.5+", "must be NAME"),
        ("deep=x:1.5", "must be NAME"),
        ("network:1.5", "must be NAME"),
        ("deep+deep:3", "must name each guide once, got deep 2 times"),
        ("network=gone", "must have a scale"),
        ("network=gone:1.5", "must be a run folder or a file of weights, found neither"),
        ("x" * 5000, "at most 4096 characters"),
    ],
)
def test_mistakes_are_one_line(text: str, message: str) -> None:
    declared = headed(prepare(tiny_spec()).info)[0].guides
    with pytest.raises(UserError) as caught:
        load_guides(text, declared, build_objective("linear"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_network_of_another_objective_or_shape_is_refused(tiny: Runner) -> None:
    noise = tiny("vanilla", steps=1, objective="vp-discrete").path
    with pytest.raises(
        UserError, match="trained with VpDiscrete, expected the prediction and noise of Linear"
    ):
        load_guides(f"network={noise}:1.5", {}, build_objective("linear"))


def test_official_weights_guide_at_unknown_cost(trained_run: Path, tmp_path: Path) -> None:
    run = open_run(trained_run)
    file, backbone = tmp_path / "my weights.pt", run.prepared.spec.backbone
    network = run.load(run.final_file("ema"))
    export_network(network, backbone.effective, "linear", kind="official", output=file)
    loaded = load_guides(f"network={file}:1.5@0-0.5", {}, build_objective("linear"))
    (guide,) = loaded.guides
    assert isinstance(guide, NetworkGuide) and (guide.scale, guide.low, guide.high) == (1.5, 0.0, 0.5)
    assert loaded.text.startswith(f"network=my-weights-{guide.sha256[:8]}#") and loaded.cost == {}
    x, t, y = batch()
    assert torch.allclose(guide.network(x, t, y), network(x, t, y), atol=1e-6)


def test_tokens_of_a_route_do_not_depend_on_the_batch(digits: Dataset) -> None:
    network = tiny_network("sit")
    guide = RouteGuide(1, 3, scale=1.5)

    def images(n: int, batch: int, *guides: Guide) -> torch.Tensor:
        settings: dict[str, Any] = {"labels": "balanced", "seed": 0, "sampler": "euler", "steps": 2}
        guidance = Guidance(1.5, guides=guides)
        objective = build_objective("linear")
        found, _, _ = generate(
            network, objective, digits, n=n, batch=batch, guidance=guidance, device="cpu", **settings
        )
        return found.int()

    several = images(60, 100, guide)
    assert (several - images(60, 50, guide)).abs().max() <= 1
    assert (several[:20] - images(20, 50, guide)).abs().max() <= 1
    assert (several - images(60, 100)).abs().max() > 1


def test_a_run_fails_before_training_if_its_guides_do_not_fit(tmp_path: Path, stbench: Command) -> None:
    options = ("--backbone", "sit-ti/2", "--recipe", "headed", "--steps", 1, "--output", tmp_path)
    for guides, message in (
        ("other", "--set eval.guides must name a guide"),
        ("network=gone:2", "found neither"),
    ):
        code, _, err = stbench("run", *options, "--set", f"eval.guides={guides}")
        assert code == 2 and err.count("\n") == 1 and message in err


def test_a_network_does_not_guide_one_with_a_second_state(tiny: Runner) -> None:
    other = tiny("vanilla", steps=1).path
    prepared = prepare(tiny_spec("reg", eval__guides=f"network={other}:1.5"))
    with pytest.raises(UserError, match="same channels as the guided one"):
        stage_guides(prepared, prepared.stages[-1], "cpu")
