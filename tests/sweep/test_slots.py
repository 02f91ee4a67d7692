"""The slots of a sweep share the cores and GPUs of the machine."""

from __future__ import annotations

import os

import pytest
import torch

from stbench.sweep.slots import local_slots


@pytest.mark.parametrize(("jobs", "threads"), [(1, 4), (2, 2), (3, 1), (9, 1), (None, 1)])
def test_slots_share_the_cores(monkeypatch: pytest.MonkeyPatch, jobs: int | None, threads: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = local_slots(torch.device("cpu"), jobs)
    assert found == [{"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}] * (jobs or 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert {slot["OMP_NUM_THREADS"] for slot in local_slots(torch.device("cpu"), jobs)} == {"1"}


def test_slots_use_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    cuda = torch.device("cuda")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in local_slots(cuda, None)] == ["2", "5"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in local_slots(cuda, 3)] == ["2", "5", "2"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in local_slots(torch.device("cuda:1"), None)] == ["5"]
