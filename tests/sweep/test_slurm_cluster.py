"""A sweep on a real Slurm gives the runs and the table of a local one, also if its jobs are requeued.

Skipped unless Slurm and munge are installed; `make slurm-test` installs them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stbench.core.errors import UserError
from stbench.runs.folder import OutputFolder, RunFolder, find_runs
from stbench.runs.journal import read_journal
from stbench.sweep.slurm_commands import Slurm, job_name
from stbench.sweep.slurm_request import SlurmRequest
from tests.conftest import BLOCKS
from tests.sweep.slurm_cluster import Cluster, missing_programs, running_cluster
from tests.sweep.test_sweep_kill import digests, table, write_suite

STEPS = 200
VANILLA, TAUGHT = 0, 1
"""Places of the runs in the job array."""


def why_skipped() -> str:
    if missing := missing_programs():
        return f"Slurm is not installed ({', '.join(missing)} not found); run `make slurm-test`"
    if importlib.util.find_spec("submitit") is None:
        return "submitit is not installed; run `pip install 'stbench[slurm]'`"
    return "" if os.geteuid() == 0 else "the daemons of Slurm are started as root"


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_skipped()), reason=why_skipped())]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as started:
        yield started


class Command:
    """`stbench sweep` of a suite, with the output of its own process."""

    def __init__(self, suite: Path, output: Path, environment: dict[str, str], *options: str) -> None:
        command = [sys.executable, "-m", "stbench", "sweep", "--suite", str(suite), "--output", str(output)]
        self.process = subprocess.Popen(
            [*command, "--device", "cpu", "--jobs", "2", *options],
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_until(self, due: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not due():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self, code: int) -> str:
        """What it printed until its end, which has this exit code."""
        printed, _ = self.process.communicate()
        assert self.process.returncode == code, printed[-3000:]
        return printed


@pytest.fixture()
def start() -> Iterator[Callable[..., Command]]:
    """Starts a sweep, which is killed at the end of the test if it still runs."""
    started: list[Command] = []

    def start_one(*arguments: Any) -> Command:
        started.append(Command(*arguments))
        return started[-1]

    yield start_one
    for command in started:
        command.process.kill()
        command.process.wait()


def has_saved(output: Path, recipe: str) -> bool:
    return any(output.glob(f"*-{recipe}-s0-*/checkpoints/*/state.json"))


def job_ids(cluster: Cluster, output: Path) -> list[str]:
    """Ids of all jobs of a sweep, running or not, such as 1_0."""
    names = ",".join(job_name(folder.name) for folder in OutputFolder(output).slurm.iterdir())
    command = ("squeue", "--noheader", "--array", "--states=all", f"--name={names}", "--format=%i")
    return sorted(cluster.call(*command).split())


def test_requeued_jobs_and_an_interrupted_sweep_give_the_table_of_a_local_sweep(
    cluster: Cluster, start: Callable[..., Command], tmp_path: Path
) -> None:
    suite = write_suite(
        tmp_path, [{"recipe": "vanilla"}, {"recipe": "self-transcendence", "set": BLOCKS}], STEPS
    )
    output, local = tmp_path / "slurm", tmp_path / "local"
    options = ("--executor", "slurm", "--partition", "main", "--gpus-per-job", "1", "--time-limit", "15")

    # One job is requeued by hand, the other one as at its time limit; then the sweep is interrupted.
    sweep = start(suite, output, cluster.environment, *options)
    sweep.wait_until(lambda: has_saved(output, "vanilla"))
    jobs = job_ids(cluster, output)
    cluster.call("scontrol", "requeue", jobs[VANILLA])
    sweep.wait_until(lambda: has_saved(output, "self-transcendence"))
    cluster.call("scancel", "--signal=USR2", jobs[TAUGHT])
    sweep.process.send_signal(signal.SIGINT)
    printed = sweep.end(130)
    assert "the jobs stay in Slurm" in printed and "rerun the same command to resume" in printed
    assert {entry.state for entry in read_journal(output)} == {"running"}

    printed = start(suite, output, cluster.environment, *options).end(0)
    assert "2 finished, 0 failed" in printed
    assert len(jobs) == 2 and job_ids(cluster, output) == jobs  # nothing was submitted twice
    shown = cluster.call("scontrol", "show", "job", jobs[VANILLA].partition("_")[0])
    assert re.findall(r"Restarts=(\d+)", shown) == ["1", "1"]
    for log in (output / ".logs").glob("*.log"):
        assert "from step" in log.read_text()

    assert "2 finished, 0 failed" in start(suite, local, dict(os.environ)).end(0)
    assert digests(output) == digests(local)
    assert read_journal(output) == read_journal(local)
    assert table(output) == table(local)


def test_a_job_with_two_gpus_is_a_run_of_two_ranks(
    cluster: Cluster, start: Callable[..., Command], tmp_path: Path
) -> None:
    output = tmp_path / "runs"
    suite = write_suite(tmp_path, [{"recipe": "vanilla"}], 4)
    sweep = start(suite, output, cluster.environment, "--executor", "slurm", "--gpus-per-job", "2")
    assert "1 finished, 0 failed" in sweep.end(0)
    (run,) = find_runs(output)
    assert "2 ranks" in RunFolder(run).environment()["hardware"]
    assert OutputFolder(output).run_log(run.name).read_text().count("run folder: ") == 1  # only rank 0 prints


def test_an_error_of_sbatch_is_one_line(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment[name])
    with pytest.raises(
        UserError, match="sbatch refused the jobs: .*[Ii]nvalid partition.*--partition"
    ) as error:
        Slurm().submit(tmp_path, SlurmRequest(partition="nope"), [print])  # type: ignore[list-item]
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")
