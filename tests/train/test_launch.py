"""Ranks from the environment, and the errors of a wrong one."""

from __future__ import annotations

import pytest
import torch

from stbench.core.errors import UserError
from stbench.core.world import ALONE, RankLostError, SharedStop, World, describe_lost_rank, is_lost_rank
from stbench.train import launch
from tests.conftest import Command

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
}


def test_ranks_of_torchrun_and_of_srun() -> None:
    assert launch.detect(TORCHRUN) == World(3, 8, 1)
    assert launch.detect(SRUN) == World(5, 8, 1)
    assert launch.detect({**SRUN, **TORCHRUN}) == World(3, 8, 1)


@pytest.mark.parametrize("without", ["SLURM_STEP_NUM_TASKS", "SLURM_PROCID"])
def test_a_shell_inside_an_allocation_is_not_a_rank(without: str) -> None:
    assert launch.detect({name: value for name, value in SRUN.items() if name != without}) is None
    assert launch.detect({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert launch.detect({}) is None


@pytest.mark.parametrize(
    "wrong", [{"RANK": "8"}, {"RANK": "x"}, {"WORLD_SIZE": "-1"}, {"LOCAL_RANK": "1e3"}, {"RANK": "9" * 30}]
)
def test_a_wrong_rank_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(UserError, match="expected the rank of this process in the environment, found RANK="):
        launch.detect({**TORCHRUN, **wrong})


@pytest.mark.parametrize(
    ("nodes", "host"), [("gpu[03-05,9],login", "gpu03"), ("a1", "a1"), ("n[1,4]", "n1"), ("x-1,y", "x-1")]
)
def test_first_host_of_a_node_list(nodes: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert launch.first_host(nodes) == host


def test_devices_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, world = torch.device("cpu"), World(3, 8, 1)
    assert launch.local_device(cpu, world) == cpu
    assert launch.local_device(torch.device("cuda", 1), ALONE) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="expected --device cuda with 8 ranks, got cuda:1"):
        launch.local_device(torch.device("cuda", 1), world)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="local rank 1 needs its own GPU, found 1"):
        launch.local_device(torch.device("cuda"), world)


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
def test_a_wrong_timeout_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.TIMEOUT, text)
    with pytest.raises(UserError, match=f"{launch.TIMEOUT} must be a number of seconds"):
        launch.timeout()


def test_options_that_do_not_fit_the_ranks(stbench: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = stbench("run", "--backbone", "sit", "--recipe", "vanilla", "--steps", "2", "--shard")
    assert code == 2 and "--shard needs several ranks, found one; add --devices N" in err
    for name, value in {**TORCHRUN, "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    command = ("run", "--backbone", "sit", "--recipe", "vanilla", "--steps", "2", "--device", "cpu")
    code, _, err = stbench(*command, "--devices", "2")
    assert code == 2 and "expected --devices 8, the number of running ranks, got --devices 2" in err
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    code, _, err = stbench(*command)
    assert code == 2 and "RANK is set but MASTER_ADDR is not; start the run with torchrun" in err


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_parts_cover_all_rows_once(size: int) -> None:
    parts = [World(rank, size).part(5, 18) for rank in range(size)]
    assert [row for start, stop in parts for row in range(start, stop)] == list(range(5, 18))
    lengths = [stop - start for start, stop in parts]
    assert max(lengths) - min(lengths) <= 1


def test_one_process_needs_no_others() -> None:
    rows = torch.arange(3)
    assert ALONE.total(rows) is rows and ALONE.collect(rows) is rows and ALONE.gather(rows) is rows
    assert ALONE.from_main(lambda: 5) == 5 and ALONE.gather_objects("x") == ["x"]
    assert ALONE.any(True) and not ALONE.any(False)
    stop = SharedStop(ALONE)
    assert stop(True) and not stop(False) and not stop.finish()


def test_lost_ranks_are_recognised() -> None:
    assert is_lost_rank(RankLostError("rank 1 was killed"))
    assert describe_lost_rank(RankLostError("rank 1 was killed")) == "rank 1 was killed"
    assert not is_lost_rank(RuntimeError("Connection closed by peer"))  # there is no process group
    assert "did not respond" in describe_lost_rank(RuntimeError("Timed out waiting 1800000ms"))
    assert "has ended" in describe_lost_rank(RuntimeError("Connection reset by peer"))
