"""Progress displays: bars of images, and the bar and the lines of training."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console
from rich.progress import Progress

from stbench.cli.progress import (
    RateColumn,
    TrainingBar,
    TrainingLog,
    counting_progress_bar,
    point_line,
    progress_bar,
    training_progress,
)
from stbench.config.plan import PlannedStage, prepare
from tests.conftest import tiny_spec
from tests.fake_runs import make_point, make_stage


@pytest.fixture(scope="module")
def stage() -> PlannedStage:
    return prepare(tiny_spec(steps=4)).stages[0]


def terminal() -> Console:
    return Console(file=StringIO(), force_terminal=True, width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_progress_bar_is_hidden_if_standard_error_is_not_a_terminal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with progress_bar("encode", 10) as report:
        report(10)
    assert capfd.readouterr() == ("", "")


def test_a_progress_bar_shows_label_count_and_rate(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes standard error for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    with counting_progress_bar("encode", 10) as advance:
        advance(4)
        advance(6)
    err = capfd.readouterr().err
    assert "encode" in err and "10/10" in err and "images/s" in err


def test_the_rate_is_unknown_before_the_first_image() -> None:
    progress = Progress()
    progress.add_task("encode", total=10)
    assert RateColumn().render(progress.tasks[0]).plain == "- images/s"


def test_the_training_bar_shows_stage_loss_and_evaluations(stage: PlannedStage) -> None:
    console = terminal()
    bar = TrainingBar(8, console)
    bar.on_stage(stage, 0)
    bar.on_step(stage, 4, {"denoise": 0.4567})
    bar.on_point(stage, make_point(4, 12.3456))
    bar.close()
    for text in ("vanilla", "loss 0.457", "4/4", "images/s", "student step 4: fid 12.346  is 5.000"):
        assert text in printed(console)


def test_the_training_log_prints_a_line_for_each_event(stage: PlannedStage) -> None:
    console = Console(file=StringIO(), width=40)
    log = TrainingLog(8, console)
    log.on_stage(stage, 2)
    log.on_step(stage, 4, {"denoise": 0.4, "align[0]": 0.25})
    log.on_point(stage, make_point(4, 12.3456))
    log.on_stage_end(stage, make_stage(0, 4))
    log.on_stage_end(stage, replace(make_stage(0, 4), reused=True))
    lines = printed(console).splitlines()
    assert lines[0] == "vanilla: 4 steps, from step 2"
    assert lines[1].startswith("vanilla step 4/4: denoise 0.4000  align[0] 0.2500  ")
    assert lines[2] == "student step 4: fid 12.346  is 5.000"
    assert lines[3].startswith("vanilla: done, ") and lines[4].startswith("vanilla: reused, ")
    assert len(lines) == 5


def test_an_evaluation_with_guidance_names_its_scale() -> None:
    assert point_line(make_point(4, 1.0, 1.5)).endswith("  guidance 1.5")


def test_training_prints_lines_if_standard_error_is_not_a_terminal() -> None:
    assert isinstance(training_progress(8), TrainingLog)
