"""How a run gets its ranks: from torchrun, from Slurm's srun, or started here for `--devices N`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from stbench.core.errors import UserError
from stbench.core.safe_load import shown
from stbench.core.world import ALONE, RankLostError, World

LAUNCHED = "STBENCH_LAUNCHED"
"""Set in the ranks that `launch` starts, whose parent reports what no rank can."""
TIMEOUT = "STBENCH_RANK_TIMEOUT"
"""Environment variable: seconds after which a rank that does not respond counts as lost."""
DEFAULT_TIMEOUT = 1800.0

GRACE = 3.0
"""Seconds that a rank which lost another one leaves to it to report its own error."""

_rank = 0
_store: Any = None
"""The key-value store of the ranks, in a rank and in the process that started them."""


def detect(environ: Mapping[str, str] = os.environ) -> World | None:
    """The rank of this process, from the variables of torchrun or of an srun step; None outside of them.

    A shell inside a Slurm allocation is not a step of several tasks, so a command typed there runs alone.

    Raises:
        UserError: If a variable is missing or is not a number.
    """
    if environ.get("WORLD_SIZE") and environ.get("RANK"):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif int_or_zero(environ.get("SLURM_STEP_NUM_TASKS")) > 1 and environ.get("SLURM_PROCID"):
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return None
    values = [environ.get(name, "0") for name in names]
    if not all(re.fullmatch("[0-9]{1,6}", value) for value in values) or int(values[0]) >= int(values[1]):
        found = ", ".join(f"{name}={shown(value)}" for name, value in zip(names, values, strict=True))
        raise UserError(f"expected the rank of this process in the environment, found {found}; unset them")
    rank, size, local_rank = map(int, values)
    return World(rank, size, local_rank)


def int_or_zero(text: str | None) -> int:
    """The number in a text, 0 if there is none."""
    return int(text) if text and re.fullmatch("[0-9]{1,18}", text) else 0


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list such as "gpu[03-05,9],login"."""
    if shutil.which("scontrol"):
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.split():
            return done.stdout.split()[0]
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    if match is None:
        raise UserError(f"expected a node list in SLURM_STEP_NODELIST, found {shown(nodes)}; set MASTER_ADDR")
    return match[1] + (match[2] or "")


def local_device(device: torch.device, world: World) -> torch.device:
    """The device of a rank: its own GPU, or the CPU.

    Raises:
        UserError: If the machine has fewer GPUs than ranks, or a GPU was chosen by number.
    """
    if world.size == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise UserError(
            f"expected --device cuda with {world.size} ranks, got {device}; each takes its own GPU"
        )
    count = torch.cuda.device_count()
    index = 0 if count == 1 and world.local_rank and _sees_own_gpu() else world.local_rank
    if index >= count:
        raise UserError(
            f"local rank {world.local_rank} needs its own GPU, found {count}; start at most {count} ranks "
            f"on this machine"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _sees_own_gpu() -> bool:
    """Whether Slurm shows each task only its own GPU (--gpus-per-task)."""
    return bool(os.environ.get("SLURM_STEP_NUM_TASKS")) and "LOCAL_WORLD_SIZE" not in os.environ


def timeout() -> float:
    """Seconds after which a rank that does not respond counts as lost. Raises UserError for anything else."""
    text = os.environ.get(TIMEOUT, "")
    if not text:
        return DEFAULT_TIMEOUT
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 1e6:
        raise UserError(f"{TIMEOUT} must be a number of seconds, at least 1, found {shown(text)}; unset it")
    return seconds


@contextlib.contextmanager
def joined(device: torch.device, devices: int | None = None) -> Iterator[World]:
    """Join the other ranks of this run for a `with` block; a world of one rank outside torchrun and srun.

    Collective operations use gloo on the host and NCCL between GPUs. Other ranks than rank 0 print nothing
    but errors of their own.

    Raises:
        UserError: If `devices` is given and there are more or fewer ranks, or if they do not connect.
    """
    world = detect()
    if world is None or world.size == 1:
        yield ALONE
        return
    if devices is not None and devices != world.size:
        raise UserError(
            f"expected --devices {world.size}, the number of running ranks, got --devices {devices}; "
            f"leave it out under torchrun and srun"
        )
    _connect(world, device)
    global _rank
    _rank = world.rank
    if not world.is_main:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - to the end of the process
        warnings.simplefilter("ignore")
    yield world
    torch.distributed.destroy_process_group()


def _connect(world: World, device: torch.device) -> None:
    """Create the process group. Raises UserError if the ranks do not find each other."""
    global _store
    if "RANK" not in os.environ:  # Slurm
        step = int_or_zero(os.environ.get("SLURM_JOB_ID")) + int_or_zero(os.environ.get("SLURM_STEP_ID"))
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "")
        one_node = os.environ.get("SLURM_STEP_NUM_NODES") == "1"  # whose name need not be known to a resolver
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1" if one_node else first_host(nodes))
        os.environ.setdefault("MASTER_PORT", str(20000 + step % 20000))
        os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.size)}
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"RANK is set but {name} is not; start the run with torchrun, or unset RANK")
    limit = timedelta(seconds=timeout())
    try:
        found = rendezvous("env://", world.rank, world.size, timeout=limit)
        _store = next(iter(found))[0]
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("stbench", _store),
            rank=world.rank,
            world_size=world.size,
            timeout=limit,
        )
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {world.rank} found no connection to the others at {address} "
            f"({str(error).splitlines()[0]}); check MASTER_ADDR and MASTER_PORT, or {TIMEOUT}"
        ) from error


def rank() -> int:
    """The rank of this process."""
    return _rank


def claims_error(*, lost: bool) -> bool:
    """Whether this process should report its error: always alone, otherwise one of the ranks.

    Args:
        lost: Whether the error is that another rank was lost. That rank may report its own error, and the
            parent of ranks started here knows more about its end.
    """
    if _store is None:
        return True
    name = os.environ.get("RANK", "launcher")
    try:
        if lost and name != "launcher":
            if LAUNCHED in os.environ:
                return False
            time.sleep(GRACE)
        return bool(_store.compare_set("error", "", name).decode() == name)
    except RuntimeError:  # the store has ended with rank 0 or with the launcher
        return LAUNCHED not in os.environ or not lost


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `python ARGUMENTS` in `count` processes on this machine, by the process manager of torchrun.

    Returns:
        The exit code: that of the rank that failed first.

    Raises:
        RankLostError: If a rank was killed or did not respond, so that none has reported an error.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    global _store
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _store = store
    threads = str(max(1, (os.cpu_count() or 1) // count))
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, not in rank 0
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        LAUNCHED: "1",
    }
    with _quiet():
        ranks = start_processes(
            "stbench",
            sys.executable,
            args=dict.fromkeys(range(count), tuple(arguments)),
            envs={rank: common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)},
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        )
        result = _wait(ranks)
    if not result.is_failed():
        return 0
    first = min(result.failures.values(), key=lambda failure: failure.timestamp)
    if store.check(["error"]):  # a rank has reported its error
        return max((f.exitcode for f in result.failures.values() if f.exitcode > 0), default=1)
    killed = [failure for failure in result.failures.values() if failure.exitcode < 0]
    if first.exitcode < 0:
        raise RankLostError(
            f"rank {first.local_rank} was killed by {signal.Signals(-first.exitcode).name}; the others were "
            f"stopped"
        )
    silent = f"rank {killed[0].local_rank}" if len(killed) == 1 else "another rank"
    raise RankLostError(
        f"rank {first.local_rank} waited for {silent}, which did not respond for {timeout():g} s"
    )


def _wait(ranks: Any) -> Any:
    """Wait for the processes. Passes on Ctrl-C and SIGTERM, upon which the ranks save and end."""

    def forward(number: int, frame: FrameType | None) -> None:
        for pid in ranks.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    result = None
    while result is None:
        result = ranks.wait(timeout=0)
        time.sleep(0.05)
    return result


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log messages of torchrun's process manager; what they say is in our messages."""
    import logging

    logger = logging.getLogger("torch.distributed.elastic")
    before, logger.disabled = logger.level, False
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
