"""The queue of a sweep: slots, shared stages, failures, interruptions, folders in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from stbench.core.errors import UserError
from stbench.runs.folder import RunFolder
from stbench.runs.journal import JournalEntry, read_journal, write_journal
from stbench.sweep import queue as sweep
from stbench.sweep.executor import Executor, Job, Outcome
from tests import fake_runs as runs


def job(recipe: str, seed: int = 0, stages: Sequence[str] = ()) -> Job:
    """A job whose run folder is one of stbench.testing.runs; its last stage is its own unless named."""
    spec = runs.spec(recipe, seed, runs.STEPS[-1], {})
    entry = JournalEntry(
        run_id=spec["run_id"],
        dataset="digits",
        backbone="sit-ti/2",
        objective="linear",
        recipe=recipe,
        options={},
        seed=seed,
        steps=runs.STEPS[-1],
        setting_hash="1" * 8,
        row_hash="2" * 8,
    )
    return Job(entry, ("run",), tuple(stages) or (f"{recipe}-{seed}-last",))


class Scripted(Executor):
    """Makes one stage of every running job at each look, then its run folder; `errors` fail at once."""

    def __init__(self, root: Path, size: int, errors: Mapping[str, str] | None = None) -> None:
        self._root, self._size, self._errors = root, size, errors or {}
        self._left: dict[str, tuple[Job, list[str]]] = {}
        self.events: list[str] = []
        self.most = 0

    def free(self) -> bool:
        return len(self._left) < self._size

    def submit(self, job: Job) -> None:
        self._left[job.run_id] = (job, list(job.stages))
        self.most = max(self.most, len(self._left))
        self.events.append(f"start {job.entry.recipe}-{job.entry.seed}")

    def poll(self) -> list[Outcome]:
        outcomes = []
        for run_id, (job, stages) in list(self._left.items()):
            if stages and run_id not in self._errors:
                store = self._root / ".artifacts" / stages.pop(0)[:16]
                if store.is_dir() and stages:
                    self.events.append(f"reuse {store.name}")
                elif stages:
                    self.events.append(f"train {store.name}")
                store.mkdir(parents=True, exist_ok=True)
                continue
            del self._left[run_id]
            if run_id not in self._errors:
                runs.build(self._root, job.entry.recipe, job.entry.seed, [9.0, 4.0, 2.0])
            self.events.append(f"end {job.entry.recipe}-{job.entry.seed}")
            outcomes.append(Outcome(run_id, self._errors.get(run_id, "")))
        return outcomes

    def stop(self) -> None:
        self.events.append("stop")


class Silent(sweep.Monitor):
    """Keeps the reasons it was told."""

    def __init__(self) -> None:
        self.reasons: list[dict[str, str]] = []

    def update(self, entries: Sequence[JournalEntry], reasons: Mapping[str, str]) -> None:
        self.reasons.append(dict(reasons))

    def stopping(self) -> None:
        self.reasons.append({"stopping": "yes"})


def carry_out(
    root: Path,
    jobs: Sequence[Job],
    size: int = 2,
    errors: Mapping[str, str] | None = None,
    pause: Callable[[], None] = lambda: None,
) -> tuple[list[JournalEntry], Scripted, Silent]:
    executor, monitor = Scripted(root, size, errors), Silent()
    return sweep.Sweep(root, jobs, executor, monitor, pause).run(), executor, monitor


def states(root: Path) -> dict[str, str]:
    return {entry.run_id: entry.state for entry in read_journal(root)}


def test_every_run_is_made_in_order_and_never_more_at_a_time_than_there_are_slots(tmp_path: Path) -> None:
    jobs = [job("vanilla", seed) for seed in range(5)]
    entries, executor, _ = carry_out(tmp_path, jobs)
    assert [e for e in executor.events if "start" in e] == [f"start vanilla-{n}" for n in range(5)]
    assert executor.most == 2
    assert [e.state for e in entries] == ["finished"] * 5
    assert read_journal(tmp_path) == entries


def test_a_failed_run_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    jobs = [job("vanilla", seed) for seed in range(3)]
    wrong = jobs[0].run_id
    entries, executor, _ = carry_out(tmp_path, jobs, errors={wrong: "loss is not finite at step 50"})
    assert [(e.state, e.error) for e in entries] == [
        ("failed", "loss is not finite at step 50"),
        ("finished", ""),
        ("finished", ""),
    ]
    assert executor.events.count("start vanilla-0") == 1
    assert read_journal(tmp_path) == entries


def test_the_same_command_skips_what_is_finished_and_tries_the_failed_once_more(tmp_path: Path) -> None:
    jobs = [job("vanilla", seed) for seed in range(3)]
    carry_out(tmp_path, jobs, errors={jobs[1].run_id: "killed"})
    entries, executor, _ = carry_out(tmp_path, jobs)
    assert [e for e in executor.events if e != "stop"] == ["start vanilla-1", "end vanilla-1"]
    assert [e.state for e in entries] == ["finished"] * 3
    assert carry_out(tmp_path, jobs)[1].events == ["stop"]


def test_a_finished_run_is_known_without_a_journal(tmp_path: Path) -> None:
    runs.build(tmp_path, "vanilla", 0, [9.0, 4.0, 2.0])
    longer = job("vanilla", 0)
    longer = replace(longer, entry=replace(longer.entry, steps=2 * longer.entry.steps))
    assert carry_out(tmp_path, [job("vanilla", 0)])[1].events == ["stop"]
    assert "start vanilla-0" in carry_out(tmp_path, [longer])[1].events


def test_a_damaged_folder_is_run_again_so_that_its_error_is_seen(tmp_path: Path) -> None:
    record = runs.build(tmp_path, "vanilla", 0, [9.0, 4.0, 2.0])
    (Path(record.path) / "stages.jsonl").write_text("{")
    damaged = job("vanilla", 0)
    entries, executor, _ = carry_out(tmp_path, [damaged], errors={damaged.run_id: "line 1 is cut off"})
    assert "start vanilla-0" in executor.events and entries[0].error == "line 1 is cut off"


def test_what_earlier_sweeps_asked_for_stays_in_the_journal(tmp_path: Path) -> None:
    other = replace(job("sra").entry, state="failed", error="killed")
    stale = replace(job("repa").entry, state="running")
    write_journal(tmp_path, [other, stale])
    carry_out(tmp_path, [job("vanilla")])
    assert read_journal(tmp_path)[:2] == [other, replace(stale, state="waiting")]
    assert states(tmp_path)[job("vanilla").run_id] == "finished"


def test_a_stage_of_two_runs_is_trained_once_and_others_need_not_wait(tmp_path: Path) -> None:
    first, second = (job(name, 0, ["teacher", name]) for name in ("taught", "taught-too"))
    _, executor, monitor = carry_out(tmp_path, [first, second, job("vanilla")])
    assert executor.events[:3] == ["start taught-0", "start vanilla-0", "train teacher"]
    assert executor.events.count("reuse teacher") == 1
    assert monitor.reasons[0] == {second.run_id: f"for a stage of {first.run_id}"}


def test_the_second_starts_as_soon_as_the_stage_is_published(tmp_path: Path) -> None:
    first, second = (job(name, 0, ["teacher", name]) for name in ("taught", "taught-too"))
    _, executor, _ = carry_out(tmp_path, [first, second])
    assert executor.events.index("start taught-too-0") < executor.events.index("end taught-0")
    assert executor.events.count("train teacher") == 1


def test_a_run_whose_last_stage_is_needed_goes_first(tmp_path: Path) -> None:
    taught, teacher = job("taught", 0, ["teacher", "taught"]), job("vae-align", 0, ["teacher"])
    _, executor, _ = carry_out(tmp_path, [taught, teacher])
    assert executor.events[0] == "start vae-align-0"
    assert "train teacher" not in executor.events and "reuse teacher" in executor.events


def test_who_waits_for_a_failed_run_trains_the_stage_itself(tmp_path: Path) -> None:
    taught, teacher = job("taught", 0, ["teacher", "taught"]), job("vae-align", 0, ["teacher"])
    entries, executor, _ = carry_out(tmp_path, [taught, teacher], errors={teacher.run_id: "killed"})
    assert "train teacher" in executor.events
    assert [e.state for e in entries] == ["finished", "failed"]


def test_a_folder_in_use_is_waited_for(tmp_path: Path) -> None:
    busy, friend = job("taught", 0, ["teacher", "a"]), job("taught", 1, ["teacher", "b"])
    lock = RunFolder(tmp_path / busy.run_id).lock()
    lock.__enter__()
    looks = iter(range(10))

    def pause() -> None:
        if next(looks) == 3:
            lock.__exit__(None, None, None)

    entries, executor, monitor = carry_out(tmp_path, [busy, friend], pause=pause)
    assert monitor.reasons[2] == {
        busy.run_id: "its folder is in use",
        friend.run_id: f"for a stage of {busy.run_id}",
    }
    assert [e.state for e in entries] == ["finished"] * 2 and executor.events[0] == "start taught-0"


def test_a_run_that_lost_its_folder_to_another_process_waits(tmp_path: Path) -> None:
    taken = job("vanilla")
    folder = RunFolder(tmp_path / taken.run_id)
    errors = {taken.run_id: "in use"}
    locks = [folder.lock()]
    looks = iter(range(10))

    def pause() -> None:
        look = next(looks)
        if look == 0:
            locks[0].__enter__()
        elif look == 2:
            errors.clear()
            locks[0].__exit__(None, None, None)

    entries, executor, _ = carry_out(tmp_path, [taken], errors=errors, pause=pause)
    assert entries[0].state == "finished" and executor.events.count("start vanilla-0") == 2


def test_an_interruption_stops_the_running_and_says_so(tmp_path: Path) -> None:
    jobs = [job("vanilla", seed) for seed in range(3)]
    executor = Scripted(tmp_path, 2, {jobs[0].run_id: "exit code 130", jobs[1].run_id: "exit code 130"})

    def pause() -> None:
        assert sorted(states(tmp_path).values()) == ["running", "running", "waiting"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.Sweep(tmp_path, jobs, executor, monitor := Silent(), pause).run()
    assert "stop" in executor.events and monitor.reasons[-1] == {"stopping": "yes"}
    assert list(states(tmp_path).values()) == ["waiting"] * 3


def test_two_sweeps_into_one_folder_are_refused(tmp_path: Path) -> None:
    with (
        sweep.alone(tmp_path),
        pytest.raises(UserError, match="another sweep is at work"),
        sweep.alone(tmp_path),
    ):
        pass
    with sweep.alone(tmp_path):
        pass
