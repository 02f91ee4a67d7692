"""`stbench inspect` on runs and official weights: its JSON, figures, tables and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stbench.core.errors import UserError
from stbench.runs.inspection import Inspection, average, read_inspection
from tests.conftest import Command, train_tiny
from tests.networks import build


@pytest.fixture(scope="module")
def report(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one inspection of a run of one step."""
    from stbench.evaluate.run_plugins import PluginChoice
    from stbench.inspect.job import inspect, plan_files
    from stbench.inspect.measure import Settings
    from stbench.inspect.subjects import open_subject

    folder = tmp_path_factory.mktemp("inspect") / "out"
    subjects = [open_subject(trained_run, PluginChoice())]
    settings = Settings(times=(0.2, 0.6), images=60, scales=(0.0, 1.0, 4.0))
    inspect(subjects, settings, [], plan_files(folder, subjects, maps=True), lambda text: None)
    return folder


def test_a_report_has_every_block_time_and_similarity(report: Path) -> None:
    found = read_inspection(report / "inspect.json")
    (run,) = found.runs
    assert (run["label"], run["depth"], run["seed"], run["teacher"]) == ("vanilla", 3, 0, None)
    assert (run["train_images"], run["heldout_images"], found.times) == (60, 60, [0.2, 0.6])
    (point,) = run["points"]
    assert (point["step"], point["images"]) == (1, 8)
    for entry in point["times"]:
        assert [row["block"] for row in entry["blocks"]] == [0, 1, 2]
        assert all(
            0.0 <= row["probe"] <= 1.0 and 1.0 <= row["effective_rank"] <= 24 for row in entry["blocks"]
        )
        for kind in ("cka", "cknna"):
            matrix = torch.tensor(entry["between_blocks"][kind])
            torch.testing.assert_close(matrix.diagonal(), torch.ones(3))
            torch.testing.assert_close(matrix, matrix.T)
        assert len(entry["to_encoders"]["digits"]["cka"]) == 3  # the shipped encoder is always compared with


def test_an_untrained_adaln_network_has_equal_blocks_and_no_guidance(report: Path) -> None:
    # Zero gates make every block the identity; after one step they are still nearly closed.
    found = read_inspection(report / "inspect.json")
    values = found.by_block("vanilla", "norm", 0.6, None)
    assert [value and value.mean for value in values] == pytest.approx(
        [values[0] and values[0].mean] * 3, rel=0.05
    )
    scales = found.by_scale("vanilla", "norm", 0.2)
    assert list(scales) == [0.0, 1.0, 4.0]


def test_figures_are_written(report: Path) -> None:
    names = {path.name.partition("-digits")[0] for path in report.glob("*.png")}
    assert names == {"blocks.png", "training.png", "guidance.png", "maps", "guiding"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in report.glob("*.png"))


def test_the_command_prints_tables_and_replaces_its_own_files(
    report: Path, trained_run: Path, stbench: Command
) -> None:
    arguments = ("--images", 40, "--no-maps", "--device", "cpu", "-o", report.parent / "again")
    for _ in range(2):
        code, out, err = stbench("inspect", trained_run, *arguments)
        assert code == 0, err
    assert "linear-probe accuracy by block: step 1" in out
    assert "class separation of the guided features" in out
    assert not list((report.parent / "again").glob("maps*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "found neither"),
        (("RUN", "--times", "0.5,x"), "--times must be"),
        (("RUN", "--times", "1.5"), "in 0..1"),
        (("RUN", "--steps", "7"), "has no weights of step 7; it has those of 1"),
        (("RUN", "--steps", "a"), "--steps must be"),
        (("RUN", "-o", "RUN/features"), "an input of this command"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], message: str, trained_run: Path, stbench: Command
) -> None:
    code, _, err = stbench("inspect", *(text.replace("RUN", str(trained_run)) for text in arguments))
    assert code == 2
    assert message in err
    assert err.strip().count("\n") == 0


def test_a_file_of_somebody_else_is_not_replaced(trained_run: Path, tmp_path: Path, stbench: Command) -> None:
    (tmp_path / "inspect.json").write_text('{"mine": 1}')
    code, _, err = stbench("inspect", trained_run, "-o", tmp_path)
    assert (code, "was not written by this command" in err) == (2, True)
    assert (tmp_path / "inspect.json").read_text() == '{"mine": 1}'


def test_official_weights_on_the_digits(tmp_path: Path, stbench: Command) -> None:
    torch.manual_seed(0)
    network = build("sit", "ti/2", width=384, depth=1, heads=6, qk_norm=False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.03)
    torch.save(
        {"ema": network.state_dict(), "args": {"path_type": "linear", "prediction": "v"}}, tmp_path / "a.pt"
    )
    code, out, err = stbench(
        "inspect", "--checkpoint", tmp_path / "a.pt", "--original", "repa", "--images", 30,
        "--device", "cpu", "-o", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    assert "official weights" in out
    (run,) = read_inspection(tmp_path / "out/inspect.json").runs
    assert (run["name"], run["seed"], run["depth"]) == ("a.pt", None, 1)


@pytest.mark.slow
def test_a_student_is_compared_with_its_teacher_and_with_other_runs(tmp_path: Path, stbench: Command) -> None:
    taught = train_tiny(tmp_path, "self-transcendence", steps=2, recipe__teacher_steps=2)
    vanilla = train_tiny(tmp_path, steps=2)
    code, out, err = stbench(
        "inspect", taught.path, vanilla.path, "--images", 40, "--device", "cpu", "-o", tmp_path / "out"
    )
    assert code == 0, err
    found = read_inspection(tmp_path / "out/inspect.json")
    run = next(run for run in found.runs if run["teacher"])
    assert (run["teacher"]["name"], run["teacher"]["block"]) == ("vae-align", 2)
    assert len(run["points"][-1]["times"][0]["to_teacher"]["cka"]) == 3
    assert (run["guidance"]["network"], run["guidance"]["used"]) == ("vae-align", 10.0)
    assert set(found.labels) >= {"vanilla"} and len(found.labels) == 2
    assert "vanilla" in out


# --- The reader ---


def content(**changes: Any) -> dict[str, Any]:
    block = {
        "block": 0,
        "probe": 0.5,
        "probe_error": 0.1,
        "probe_train": 1.0,
        "norm": 2.0,
        "effective_rank": 3.0,
    }
    entry = {
        "tau": 0.5,
        "blocks": [block],
        "between_blocks": {},
        "to_encoders": {"e": {"cka": [[0.25]], "cknna": [[None]]}},
    }
    run = {
        "name": "run", "label": "a", "backbone": "sit-ti/2", "depth": 1, "train_images": 60,
        "heldout_images": 40, "guidance": None, "teacher": None,
        "points": [{"step": 5, "images": 40, "times": [entry]}],
    }  # fmt: skip
    second = json.loads(json.dumps(run))
    second["points"][0]["times"][0]["blocks"][0]["probe"] = 0.7
    settings = {"times": [0.5], "scales": [], "encoders": ["e"]}
    return {"kind": "stbench inspect", "schema": 1, "settings": settings, "runs": [run, second]} | changes


def test_similarity_to_the_block_of_the_teacher_that_is_used() -> None:
    runs = content()["runs"]
    for run, value in zip(runs, (0.25, 0.75), strict=True):
        run["teacher"] = {"name": "vae-align", "block": 1, "times": []}
        run["points"][0]["times"][0]["to_teacher"] = {"cka": [[0.1, value]], "cknna": [[0.0, None]]}
    found = Inspection(content()["settings"], runs)
    assert found.measures["cka::teacher"] == "CKA to the teacher's block"
    assert found.by_block("a", "cka::teacher", 0.5, 5) == [average([0.25, 0.75])]
    assert found.by_block("a", "cknna::teacher", 0.5, 5) == [None]
    runs[0]["teacher"] = None
    assert found.by_block("a", "cka::teacher", 0.5, 5) == [average([0.75])]


def test_rows_are_means_over_seeds() -> None:
    found = Inspection(content()["settings"], content()["runs"])
    assert (found.labels, found.common_step()) == (["a"], 5)
    (value,) = found.by_block("a", "probe", 0.5, 5)
    assert value is not None
    assert (value.mean, value.std, value.seeds) == (pytest.approx(0.6), pytest.approx(0.02**0.5), 2)
    assert found.by_block("a", "cka:e", 0.5, 5) == [average([0.25, 0.25])]
    assert list(found.measures) == ["probe", "norm", "effective_rank", "cka:e", "cknna:e"]
    assert found.by_step("a", "norm", 0.5, 0) == {40: average([2.0, 2.0])}
    assert found.by_scale("a", "separation", 0.5) == {}
    assert average([None]) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: row.update(kind="other"),
        lambda row: row.update(schema=9),
        lambda row: row.pop("runs"),
        lambda row: row["runs"][0].pop("points"),
        lambda row: row["runs"][1]["points"][0]["times"][0]["blocks"][0].pop("norm"),
        lambda row: row["runs"][1]["points"][0].update(times=[]),
        lambda row: row["runs"][1]["points"][0].update(step="<b>"),
        lambda row: row["runs"][0].update(label=5),
        lambda row: row["runs"][0]["points"][0]["times"][0]["blocks"][0].update(norm="large"),
    ],
)
def test_a_damaged_file_is_an_error_of_one_line(damage: Callable[[Any], Any], tmp_path: Path) -> None:
    row = content()
    damage(row)
    (tmp_path / "inspect.json").write_text(json.dumps(row))
    with pytest.raises(UserError, match="cannot be read"):
        read_inspection(tmp_path / "inspect.json")
