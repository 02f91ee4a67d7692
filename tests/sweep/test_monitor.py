"""What the monitors of a sweep print: lines in a log, a table on a terminal."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

from rich.console import Console

from stbench.runs.folder import OutputFolder
from stbench.sweep.monitor import LineMonitor, TableMonitor, format_duration
from tests.fake_jobs import job


def test_lines_print_each_change_once() -> None:
    output = StringIO()
    lines = LineMonitor(Console(file=output, width=40))
    first, second = job("vanilla").entry, job("taught").entry
    lines.update([first, second], {})
    lines.update([replace(first, state="running"), second], {})
    lines.update([replace(first, state="running"), second], {})
    lines.update([replace(first, state="failed", error="loss [0] is nan"), second], {})
    printed = output.getvalue().splitlines()
    assert printed[0] == "sweep of 2 runs: 0 running, 2 waiting, 0 failed, 0 finished"
    assert printed[1] == f"running: {first.run_id}"
    assert printed[2].startswith(f"failed: {first.run_id}  0:0") and printed[2].endswith("loss [0] is nan")
    assert len(printed) == 3


def test_the_table_shows_running_runs_and_why_others_wait(tmp_path: Path) -> None:
    running, held, failed = (job(name).entry for name in ("vanilla", "held", "lost"))
    OutputFolder(tmp_path).run_log(running.run_id).parent.mkdir()
    OutputFolder(tmp_path).run_log(running.run_id).write_text("vanilla step 100/800: denoise 0.4\n")
    output = StringIO()
    console = Console(file=output, width=140)
    table = TableMonitor(tmp_path, console).table(
        [replace(running, state="running"), held, replace(failed, state="failed", error="loss is nan")],
        {held.run_id: "needs a stage of that run"},
    )
    console.print(table)
    for text in ("step 100/800: denoise 0.4", "needs a stage of that run", "loss is nan", "1 failed"):
        assert text in output.getvalue()


def test_durations_are_formatted() -> None:
    assert [format_duration(s) for s in (4.4, 75, 3675)] == ["0:04", "1:15", "1:01:15"]
