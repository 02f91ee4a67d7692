"""The queue of a sweep: slots, shared stages, failures, interruptions, folders in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from stbench.core.errors import UserError
from stbench.runs.folder import RunFolder
from stbench.runs.journal import JournalEntry, read_journal, write_journal
from stbench.sweep.executor import Executor, Job, Outcome
from stbench.sweep.queue import Monitor, Sweep, lock_sweep
from tests import fake_runs
from tests.fake_jobs import job


class FakeExecutor(Executor):
    """Finishes one stage of every running job at each poll, then its run folder; jobs in `errors` fail.

    `events` records what happens: starts and ends of jobs, and stages that are trained or reused.
    """

    def __init__(self, root: Path, slots: int, errors: Mapping[str, str] | None = None) -> None:
        self._root, self._slots, self._errors = root, slots, errors or {}
        self._remaining: dict[str, tuple[Job, list[str]]] = {}
        self.events: list[str] = []
        self.most_at_once = 0

    def has_free_slot(self) -> bool:
        return len(self._remaining) < self._slots

    def submit(self, job: Job) -> None:
        self._remaining[job.run_id] = (job, list(job.stages))
        self.most_at_once = max(self.most_at_once, len(self._remaining))
        self.events.append(f"start {job.entry.recipe}-{job.entry.seed}")

    def poll(self) -> list[Outcome]:
        outcomes = []
        for run_id, (current, stages) in list(self._remaining.items()):
            if stages and run_id not in self._errors:
                artifact = self._root / ".artifacts" / stages.pop(0)[:16]
                if artifact.is_dir() and stages:
                    self.events.append(f"reuse {artifact.name}")
                elif stages:
                    self.events.append(f"train {artifact.name}")
                artifact.mkdir(parents=True, exist_ok=True)
                continue
            del self._remaining[run_id]
            if run_id not in self._errors:
                fake_runs.write_run(self._root, current.entry.recipe, current.entry.seed, [9.0, 4.0, 2.0])
            self.events.append(f"end {current.entry.recipe}-{current.entry.seed}")
            outcomes.append(Outcome(run_id, self._errors.get(run_id, "")))
        return outcomes

    def stop(self) -> None:
        self.events.append("stop")


class RecordingMonitor(Monitor):
    """Keeps the reasons of every update."""

    def __init__(self) -> None:
        self.reasons: list[dict[str, str]] = []

    def update(self, entries: Sequence[JournalEntry], reasons: Mapping[str, str]) -> None:
        self.reasons.append(dict(reasons))

    def stopping(self, message: str) -> None:
        self.reasons.append({"stopping": "yes"})


def execute(
    root: Path,
    jobs: Sequence[Job],
    *,
    slots: int = 2,
    errors: Mapping[str, str] | None = None,
    pause: Callable[[], None] = lambda: None,
) -> tuple[list[JournalEntry], FakeExecutor, RecordingMonitor]:
    executor, monitor = FakeExecutor(root, slots, errors), RecordingMonitor()
    sweep = Sweep(root, jobs, executor=executor, monitor=monitor, pause=pause)
    return sweep.run(), executor, monitor


def states(root: Path) -> dict[str, str]:
    return {entry.run_id: entry.state for entry in read_journal(root)}


def test_runs_start_in_order_and_never_exceed_the_slots(tmp_path: Path) -> None:
    jobs = [job("vanilla", seed) for seed in range(5)]
    entries, executor, _ = execute(tmp_path, jobs)
    assert [e for e in executor.events if "start" in e] == [f"start vanilla-{n}" for n in range(5)]
    assert executor.most_at_once == 2
    assert [e.state for e in entries] == ["finished"] * 5
    assert read_journal(tmp_path) == entries


def test_a_failed_run_is_recorded_and_the_others_continue(tmp_path: Path) -> None:
    jobs = [job("vanilla", seed) for seed in range(3)]
    wrong = jobs[0].run_id
    entries, executor, _ = execute(tmp_path, jobs, errors={wrong: "loss is not finite at step 50"})
    assert [(e.state, e.error) for e in entries] == [
        ("failed", "loss is not finite at step 50"),
        ("finished", ""),
        ("finished", ""),
    ]
    assert executor.events.count("start vanilla-0") == 1
    assert read_journal(tmp_path) == entries


def test_a_second_sweep_skips_finished_runs_and_retries_failed_ones(tmp_path: Path) -> None:
    jobs = [job("vanilla", seed) for seed in range(3)]
    execute(tmp_path, jobs, errors={jobs[1].run_id: "killed"})
    entries, executor, _ = execute(tmp_path, jobs)
    assert [e for e in executor.events if e != "stop"] == ["start vanilla-1", "end vanilla-1"]
    assert [e.state for e in entries] == ["finished"] * 3
    assert execute(tmp_path, jobs)[1].events == ["stop"]


def test_a_finished_run_folder_is_recognised_without_a_journal(tmp_path: Path) -> None:
    fake_runs.write_run(tmp_path, "vanilla", 0, [9.0, 4.0, 2.0])
    longer = job("vanilla", 0)
    longer = replace(longer, entry=replace(longer.entry, steps=2 * longer.entry.steps))
    assert execute(tmp_path, [job("vanilla", 0)])[1].events == ["stop"]
    assert "start vanilla-0" in execute(tmp_path, [longer])[1].events


def test_a_damaged_folder_is_started_so_that_its_error_is_reported(tmp_path: Path) -> None:
    record = fake_runs.write_run(tmp_path, "vanilla", 0, [9.0, 4.0, 2.0])
    (Path(record.path) / "stages.jsonl").write_text("{")
    damaged = job("vanilla", 0)
    entries, executor, _ = execute(tmp_path, [damaged], errors={damaged.run_id: "line 1 is cut off"})
    assert "start vanilla-0" in executor.events and entries[0].error == "line 1 is cut off"


def test_runs_of_earlier_sweeps_stay_in_the_journal(tmp_path: Path) -> None:
    other = replace(job("sra").entry, state="failed", error="killed")
    stale = replace(job("repa").entry, state="running")
    write_journal(tmp_path, [other, stale])
    execute(tmp_path, [job("vanilla")])
    assert read_journal(tmp_path)[:2] == [other, replace(stale, state="waiting")]
    assert states(tmp_path)[job("vanilla").run_id] == "finished"


def test_a_stage_of_two_runs_is_trained_once_and_blocks_only_these_runs(tmp_path: Path) -> None:
    first, second = (job(name, 0, ["teacher", name]) for name in ("taught", "taught-too"))
    _, executor, monitor = execute(tmp_path, [first, second, job("vanilla")])
    assert executor.events[:3] == ["start taught-0", "start vanilla-0", "train teacher"]
    assert executor.events.count("reuse teacher") == 1
    assert monitor.reasons[0] == {second.run_id: f"needs a stage of {first.run_id}"}


def test_the_second_run_starts_as_soon_as_the_stage_is_published(tmp_path: Path) -> None:
    first, second = (job(name, 0, ["teacher", name]) for name in ("taught", "taught-too"))
    _, executor, _ = execute(tmp_path, [first, second])
    assert executor.events.index("start taught-too-0") < executor.events.index("end taught-0")
    assert executor.events.count("train teacher") == 1


def test_a_run_whose_last_stage_another_run_needs_goes_first(tmp_path: Path) -> None:
    taught, teacher = job("taught", 0, ["teacher", "taught"]), job("vae-align", 0, ["teacher"])
    _, executor, _ = execute(tmp_path, [taught, teacher])
    assert executor.events[0] == "start vae-align-0"
    assert "train teacher" not in executor.events and "reuse teacher" in executor.events


def test_a_run_trains_the_stage_itself_if_the_run_it_waits_for_fails(tmp_path: Path) -> None:
    taught, teacher = job("taught", 0, ["teacher", "taught"]), job("vae-align", 0, ["teacher"])
    entries, executor, _ = execute(tmp_path, [taught, teacher], errors={teacher.run_id: "killed"})
    assert "train teacher" in executor.events
    assert [e.state for e in entries] == ["finished", "failed"]


def test_a_run_waits_while_another_process_uses_its_folder(tmp_path: Path) -> None:
    busy, sibling = job("taught", 0, ["teacher", "a"]), job("taught", 1, ["teacher", "b"])
    lock = RunFolder(tmp_path / busy.run_id).lock()
    lock.__enter__()
    polls = iter(range(10))

    def pause() -> None:
        if next(polls) == 3:
            lock.__exit__(None, None, None)

    entries, executor, monitor = execute(tmp_path, [busy, sibling], pause=pause)
    assert monitor.reasons[2] == {
        busy.run_id: "its run folder is in use",
        sibling.run_id: f"needs a stage of {busy.run_id}",
    }
    assert [e.state for e in entries] == ["finished"] * 2 and executor.events[0] == "start taught-0"


def test_a_run_that_lost_its_folder_to_another_process_waits(tmp_path: Path) -> None:
    taken = job("vanilla")
    lock = RunFolder(tmp_path / taken.run_id).lock()
    errors = {taken.run_id: "in use"}
    polls = iter(range(10))

    def pause() -> None:
        poll = next(polls)
        if poll == 0:
            lock.__enter__()
        elif poll == 2:
            errors.clear()
            lock.__exit__(None, None, None)

    entries, executor, _ = execute(tmp_path, [taken], errors=errors, pause=pause)
    assert entries[0].state == "finished" and executor.events.count("start vanilla-0") == 2


def test_an_interruption_stops_the_running_runs_and_sets_them_back_to_waiting(tmp_path: Path) -> None:
    jobs = [job("vanilla", seed) for seed in range(3)]
    errors = {jobs[0].run_id: "exit code 130", jobs[1].run_id: "exit code 130"}
    executor, monitor = FakeExecutor(tmp_path, 2, errors), RecordingMonitor()

    def pause() -> None:
        assert sorted(states(tmp_path).values()) == ["running", "running", "waiting"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sweep(tmp_path, jobs, executor=executor, monitor=monitor, pause=pause).run()
    assert "stop" in executor.events and monitor.reasons[-1] == {"stopping": "yes"}
    assert list(states(tmp_path).values()) == ["waiting"] * 3


def test_two_sweeps_into_one_folder_are_refused(tmp_path: Path) -> None:
    with (
        lock_sweep(tmp_path),
        pytest.raises(UserError, match="in use by process .*; wait for that sweep"),
        lock_sweep(tmp_path),
    ):
        pass
    with lock_sweep(tmp_path):
        pass
