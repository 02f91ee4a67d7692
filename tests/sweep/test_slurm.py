"""The Slurm executor without Slurm: arrays, limits, outcomes, lost jobs, jobs of an earlier sweep."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from stbench.core.errors import UserError
from stbench.runs.folder import OutputFolder
from stbench.sweep.executor import Outcome
from stbench.sweep.queue import Sweep
from stbench.sweep.slurm import ASK_SECONDS, GRACE_SECONDS, LOOK_SECONDS, SlurmExecutor
from stbench.sweep.slurm_commands import Found, Slurm
from stbench.sweep.slurm_job import RunJob
from stbench.sweep.slurm_request import SlurmRequest, parse_extra, parse_minutes
from tests import fake_runs
from tests.fake_jobs import job
from tests.sweep.test_queue import RecordingMonitor, states


class FakeSlurm(Slurm):
    """Keeps submissions and their states; nothing is executed."""

    def __init__(self) -> None:
        self.arrays: dict[str, list[RunJob]] = {}
        self.states: dict[tuple[str, int], str] = {}
        self.cancelled: list[str] = []
        self.answers = True
        self.error: BaseException | None = None

    def submit(self, folder: Path, request: SlurmRequest, jobs: Sequence[RunJob]) -> None:
        if self.error is not None:
            raise self.error
        self.arrays[folder.name] = list(jobs)
        self.states |= {(folder.name, index): "PENDING" for index in range(len(jobs))}

    def find(self, tokens: Iterable[str]) -> list[Found] | None:
        wanted = set(tokens)
        found = [
            Found(token, index, f"7_{index}", state)
            for (token, index), state in self.states.items()
            if token in wanted
        ]
        return found if self.answers else None

    def cancel(self, token: str) -> None:
        self.cancelled.append(token)

    def end(self, run_id: str, error: str = "", state: str = "COMPLETED") -> None:
        """End the job of a run with an outcome."""
        token, index, function = self.place(run_id)
        self.states[token, index] = state
        function.outcome.write_text(json.dumps({"error": error}))

    def place(self, run_id: str) -> tuple[str, int, RunJob]:
        places = [
            (token, index, function)
            for token, functions in self.arrays.items()
            for index, function in enumerate(functions)
            if function.log.stem == run_id
        ]
        return places[-1]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture()
def slurm() -> FakeSlurm:
    return FakeSlurm()


@pytest.fixture()
def clock() -> Clock:
    return Clock()


def executor(root: Path, slurm: FakeSlurm, clock: Clock, **request: object) -> SlurmExecutor:
    return SlurmExecutor(root, SlurmRequest(**request), slurm=slurm, clock=clock)  # type: ignore[arg-type]


def poll(target: SlurmExecutor, clock: Clock, seconds: float = LOOK_SECONDS) -> list[Outcome]:
    clock.now += seconds
    return target.poll()


def test_runs_that_can_start_are_one_array_and_end_by_their_outcomes(
    tmp_path: Path, slurm: FakeSlurm, clock: Clock
) -> None:
    target = executor(tmp_path, slurm, clock)
    jobs = [job("vanilla", seed) for seed in range(3)]
    for each in jobs:
        assert target.has_free_slot()
        target.submit(each)
    assert not slurm.arrays
    target.flush()
    ((token, functions),) = slurm.arrays.items()
    assert [function.log for function in functions] == [
        OutputFolder(tmp_path).run_log(j.run_id) for j in jobs
    ]
    assert functions[0].arguments == jobs[0].arguments
    target.flush()
    assert list(slurm.arrays) == [token] and poll(target, clock) == []
    slurm.end(jobs[1].run_id)
    slurm.end(jobs[2].run_id, "training diverged", "FAILED")
    assert poll(target, clock, LOOK_SECONDS / 2) == []
    assert set(poll(target, clock)) == {
        Outcome(jobs[1].run_id),
        Outcome(jobs[2].run_id, "training diverged"),
    }
    assert poll(target, clock, 1000) == []


def test_a_limit_holds_for_all_arrays_together(tmp_path: Path, slurm: FakeSlurm, clock: Clock) -> None:
    target = executor(tmp_path, slurm, clock, most=2)
    for seed in range(5):  # Slurm keeps to the limit within the first array
        assert target.has_free_slot()
        target.submit(job("vanilla", seed))
    target.flush()
    assert not target.has_free_slot()
    for seed in range(3):
        slurm.end(job("vanilla", seed).run_id)
    poll(target, clock)
    assert not target.has_free_slot()
    slurm.end(job("vanilla", 3).run_id)
    poll(target, clock)
    assert target.has_free_slot()
    target.submit(job("vanilla", 6))
    assert not target.has_free_slot()
    assert SlurmRequest(most=2).parameters()["slurm_array_parallelism"] == 2


def test_a_job_that_ends_without_an_outcome_failed_after_a_while(
    tmp_path: Path, slurm: FakeSlurm, clock: Clock
) -> None:
    target = executor(tmp_path, slurm, clock)
    lost, forgotten = job("lost"), job("forgotten")
    log = OutputFolder(tmp_path).run_log(lost.run_id)
    log.parent.mkdir()
    log.write_text("an earlier attempt\n")
    for each in (lost, forgotten):
        target.submit(each)
    target.flush()
    with log.open("a") as file:
        file.write("step 7/30\n")
    token, index, _ = slurm.place(lost.run_id)
    slurm.states[token, index] = "CANCELLED"
    del slurm.states[token, 1]
    assert poll(target, clock, ASK_SECONDS) == []
    outcomes = {outcome.run_id: outcome.error for outcome in poll(target, clock, GRACE_SECONDS)}
    assert outcomes[lost.run_id] == "Slurm job 7_0 ended as CANCELLED after: step 7/30"
    assert outcomes[forgotten.run_id].startswith("its Slurm job disappeared before it started the run; see ")


def test_a_requeued_job_and_a_silent_controller_are_no_failures(
    tmp_path: Path, slurm: FakeSlurm, clock: Clock
) -> None:
    target = executor(tmp_path, slurm, clock)
    target.submit(job("vanilla"))
    target.flush()
    token, index, _ = slurm.place(job("vanilla").run_id)
    for state in ("RUNNING", "PREEMPTED", "PENDING", "NODE_FAIL", "REQUEUED", "COMPLETING", "RUNNING"):
        slurm.states[token, index] = state
        assert poll(target, clock, ASK_SECONDS) == []
    slurm.answers = False
    assert poll(target, clock, 10 * GRACE_SECONDS) == [] == poll(target, clock, 10 * GRACE_SECONDS)
    slurm.end(job("vanilla").run_id)
    assert poll(target, clock) == [Outcome(job("vanilla").run_id)]


def test_a_later_sweep_finds_the_jobs_again(tmp_path: Path, slurm: FakeSlurm, clock: Clock) -> None:
    jobs = [job("vanilla", seed) for seed in range(4)]
    first = executor(tmp_path, slurm, clock)
    for each in jobs:
        first.submit(each)
    first.flush()
    first.stop()
    token, _, _ = slurm.place(jobs[0].run_id)
    slurm.states[token, 1] = "RUNNING"
    slurm.states[token, 2] = "CANCELLED"
    slurm.end(jobs[3].run_id, "diverged", "FAILED")

    second = executor(tmp_path, slurm, clock)
    assert second.adopt(jobs[:1] + jobs[2:]) == [
        jobs[0].run_id
    ]  # the cancelled and the failed one are retried
    third = executor(tmp_path, slurm, clock)
    assert third.adopt(jobs) == [jobs[0].run_id, jobs[1].run_id]
    slurm.end(jobs[0].run_id)
    assert poll(third, clock) == [Outcome(jobs[0].run_id)]

    copied = tmp_path / "copy"
    shutil.copytree(tmp_path / ".sweep", copied / ".sweep")
    assert executor(copied, slurm, clock).adopt(jobs) == []

    slurm.answers = False
    with pytest.raises(UserError, match="squeue does not answer"):
        executor(tmp_path, slurm, clock).adopt(jobs)
    slurm.answers = True
    slurm.states[token, 1] = "FAILED"
    assert executor(tmp_path, slurm, clock).adopt(jobs) == []
    assert list(OutputFolder(tmp_path).slurm.iterdir()) == []


def test_damaged_submissions_are_ignored(tmp_path: Path, slurm: FakeSlurm, clock: Clock) -> None:
    folder = OutputFolder(tmp_path).slurm
    for name, text in (("a" * 12, "[1]"), ("b" * 12, "no json"), ("c" * 12, '{"output": "x", "runs": 3}')):
        (folder / name).mkdir(parents=True)
        (folder / name / "runs.json").write_text(text)
        slurm.states[name, 0] = "RUNNING"
    (tmp_path / "elsewhere").mkdir()
    (folder / ("d" * 12)).symlink_to(tmp_path / "elsewhere")
    assert executor(tmp_path, slurm, clock).adopt([job("vanilla")]) == []
    assert (tmp_path / "elsewhere").is_dir() and (folder / ("d" * 12)).is_symlink()


def test_the_queue_of_a_sweep_over_slurm(tmp_path: Path, slurm: FakeSlurm, clock: Clock) -> None:
    jobs = [job("teacher", stages=["a"]), job("vanilla"), job("student", stages=["a", "b"])]

    def pause() -> None:
        clock.now += 1
        for (token, index), state in list(slurm.states.items()):
            run = next(each for each in jobs if each.run_id == slurm.arrays[token][index].log.stem)
            if state == "PENDING":
                fake_runs.write_run(tmp_path, run.entry.recipe, run.entry.seed, [9.0, 4.0, 2.0])
                (tmp_path / ".artifacts" / run.stages[-1]).mkdir(parents=True)
                slurm.end(run.run_id)

    target = executor(tmp_path, slurm, clock)
    entries = Sweep(tmp_path, jobs, executor=target, monitor=RecordingMonitor(), pause=pause).run()
    assert [entry.state for entry in entries] == ["finished"] * 3
    assert [len(functions) for functions in slurm.arrays.values()] == [2, 1]


def test_an_interrupted_sweep_leaves_its_jobs_running_and_goes_on(
    tmp_path: Path, slurm: FakeSlurm, clock: Clock
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def finish() -> None:
        clock.now += 1
        for each in jobs:
            if slurm.states[slurm.place(each.run_id)[:2]] == "PENDING":
                slurm.end(each.run_id)

    jobs = [job("vanilla", seed) for seed in range(2)]
    monitor = RecordingMonitor()
    with pytest.raises(KeyboardInterrupt):
        Sweep(
            tmp_path, jobs, executor=executor(tmp_path, slurm, clock), monitor=monitor, pause=interrupt
        ).run()
    assert set(states(tmp_path).values()) == {"running"} and monitor.reasons[-1] == {"stopping": "yes"}
    again = executor(tmp_path, slurm, clock)
    entries = Sweep(tmp_path, jobs, executor=again, monitor=RecordingMonitor(), pause=finish).run()
    assert [entry.state for entry in entries] == ["finished"] * 2 and len(slurm.arrays) == 1


@pytest.mark.parametrize("error", [UserError("sbatch refused the jobs"), KeyboardInterrupt()])
def test_jobs_that_were_not_submitted_are_waiting(
    error: BaseException, tmp_path: Path, slurm: FakeSlurm, clock: Clock
) -> None:
    slurm.error = error
    monitor = RecordingMonitor()
    with pytest.raises(type(error)):
        Sweep(tmp_path, [job("vanilla")], executor=executor(tmp_path, slurm, clock), monitor=monitor).run()
    assert states(tmp_path) == {job("vanilla").run_id: "waiting"} and monitor.reasons == []
    assert len(slurm.cancelled) == isinstance(error, KeyboardInterrupt)


# --- What is asked of Slurm ---


def test_the_request_has_one_task_per_gpu() -> None:
    values = SlurmRequest(gpus=8, nodes=2, partition="main", minutes=90).parameters()
    assert values["nodes"] == 2 and values["tasks_per_node"] == values["gpus_per_node"] == 4
    assert values["timeout_min"] == 90 and values["slurm_partition"] == "main"
    assert values["slurm_additional_parameters"] == {"requeue": True}
    assert SlurmRequest(gpus=0).parameters()["tasks_per_node"] == 1
    assert "gpus_per_node" not in SlurmRequest(gpus=0).parameters()
    extra = parse_extra(
        ["cpus_per_task=8", "--account=me", "gres=gpu:a100:4", "exclusive=true", "signal_delay_s=300"]
    )
    values = SlurmRequest(gpus=4, extra=extra).parameters()
    assert values["tasks_per_node"] == 4 and "gpus_per_node" not in values
    assert values["slurm_signal_delay_s"] == 300
    assert "--cpus-per-task=8" in values["slurm_srun_args"]
    assert values["slurm_additional_parameters"] == {
        **{"requeue": True, "cpus-per-task": "8", "account": "me", "gres": "gpu:a100:4", "exclusive": True}
    }


def test_submitit_accepts_the_request(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    request = SlurmRequest(
        gpus=2, partition="main", most=3, extra=parse_extra(["qos=high", "setup=module load cuda"])
    )
    target = submitit.SlurmExecutor.__new__(submitit.SlurmExecutor)
    target.folder, target.parameters = tmp_path, {}
    values = {name.removeprefix("slurm_"): value for name, value in request.parameters().items()}
    target._internal_update_parameters(**target._convert_parameters({"name": "x", **values}))
    text = target._make_submission_file_text("python", "0")
    for line in (
        "gpus-per-node=2",
        "ntasks-per-node=2",
        "time=1440",
        "qos=high",
        "requeue",
        "partition=main",
    ):
        assert f"#SBATCH --{line}\n" in text
    assert "\nmodule load cuda\n" in text and "--kill-on-bad-exit=1" in text


def test_time_limits() -> None:
    found = {text: parse_minutes(text) for text in ("90", "12:30:00", "2-00:00:00", "0:00:01")}
    assert found == {"90": 90, "12:30:00": 750, "2-00:00:00": 2880, "0:00:01": 1}
    for wrong in ("", "0", "1:30", "a day", "-5", "9999-00:00:00", "1:60:00"):
        with pytest.raises(UserError, match="--time-limit must be"):
            parse_minutes(wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["account"], "--slurm must be KEY=VALUE"),
        (["account="], "--slurm must be KEY=VALUE"),
        (["a b=c"], "--slurm must be KEY=VALUE"),
        (["account=a\nb"], "--slurm must be KEY=VALUE"),
        (["partition=gpu"], "use --partition"),
        (["time=5"], "use --time-limit"),
        (["output=x"], "is set by the sweep"),
        (["qos=a", "--qos=b"], "given twice"),
        (["signal_delay_s=soon"], "number of seconds"),
    ],
)
def test_other_parameters_are_checked(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_extra(settings)


def test_gpus_must_fill_the_nodes() -> None:
    with pytest.raises(UserError, match="--gpus-per-job 4"):
        SlurmRequest(gpus=5, nodes=4)
    with pytest.raises(UserError, match="needs GPUs"):
        SlurmRequest(gpus=0, nodes=2)
