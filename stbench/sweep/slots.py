"""The slots of this machine: how the runs of a sweep share its cores and GPUs."""

from __future__ import annotations

import os

import torch


def local_slots(device: torch.device, jobs: int | None) -> list[dict[str, str]]:
    """Environment variables of each slot: its share of the cores and, on CUDA, its GPU.

    Without `jobs` there is one slot per GPU, or per core on the CPU; if there are more slots than GPUs, the
    GPUs are shared in turn. An OMP_NUM_THREADS that is already set is an upper limit.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = _gpus(device)
    count = jobs or len(gpus) or cores
    share = max(1, cores // count)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    threads = str(min(share, int(limit)) if limit.isdecimal() and int(limit) else share)
    base = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return [
        base | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}) for slot in range(count)
    ]


def _gpus(device: torch.device) -> list[str]:
    """GPUs to use, as in CUDA_VISIBLE_DEVICES; [] on the CPU."""
    if device.type != "cuda":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = [name.strip() for name in visible.split(",") if name.strip()]
    gpus = gpus or [str(number) for number in range(torch.cuda.device_count())]
    return gpus if device.index is None else [gpus[device.index]]
