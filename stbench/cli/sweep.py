"""What `stbench sweep` does: from its arguments to jobs, the slots of this machine, and what it says at the
end.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from stbench.config.overrides import parse_set
from stbench.core.device import default_precision, pick_device
from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.core.registry import BACKBONES, RECIPES, load_builtins, load_plugins, names
from stbench.runs.folder import RunFolder
from stbench.runs.journal import JournalEntry
from stbench.sweep import monitor, suite
from stbench.sweep import queue as sweep
from stbench.sweep.executor import Job, LocalExecutor, log_file
from stbench.train import engine


@dataclass(frozen=True)
class Invocation:
    """The arguments of `stbench sweep`."""

    given: Mapping[str, Any]
    """Options that were typed, of those that name runs: backbone, recipe, seeds, steps and so on."""
    overrides: Sequence[str]
    suite: str | None
    only: str | None
    jobs: int | None
    plugins: Sequence[Path]
    device: str
    output: Path
    keep: str


def sweep_runs(call: Invocation) -> int:
    """Make every run asked for that is not finished; returns the exit code, 1 if any failed."""
    expanded, device = _expanded(call)
    for run in expanded:  # a finished run is not started again, so nobody else would say it
        folder = RunFolder(call.output / run.entry.run_id)
        if folder.exists():
            engine.check_evaluation(folder, run.prepared.spec)
    jobs = [_job(call, run, device) for run in expanded]
    executor = LocalExecutor(call.output, slots(device, call.jobs))
    with sweep.lock_sweep(call.output), _terminable():
        for run in expanded:
            content = {**run.wanted.values, "set": dict(run.wanted.overrides)}
            atomic_write(_config_file(call.output, run.entry.run_id), json.dumps(content, indent=1) + "\n")
        with monitor.make_monitor(call.output) as watching:
            entries = sweep.Sweep(call.output, jobs, executor=executor, monitor=watching).run()
    return _summary(call.output, entries)


def dry_run(call: Invocation) -> None:
    """Print every run that would be made and how it stands; write nothing."""
    expanded, device = _expanded(call)
    asked = {run.entry.run_id for run in expanded}
    entries = [
        e for e in sweep.initial_entries(call.output, [run.entry for run in expanded]) if e.run_id in asked
    ]
    for entry in entries:
        print(f"{entry.state:8}  {entry.run_id}  {entry.steps} steps  {monitor.describe(entry)}")
    stages = [stage for run in expanded for stage in run.stages]
    print(
        f"{len(entries)} runs: {monitor.count_states(entries)}; "
        f"{len(stages)} stages, {len(set(stages))} of them different"
    )
    print(f"{len(slots(device, call.jobs))} at a time on {device.type}; run folders in {call.output}")


def _expanded(call: Invocation) -> tuple[list[suite.Expanded], torch.device]:
    """All runs asked for, resolved and checked."""
    load_builtins()
    load_plugins(call.plugins)
    device = pick_device(call.device)
    wanted = [
        replace(run, values={"precision": default_precision(device), **run.values}) for run in _wanted(call)
    ]
    expanded = suite.expand(wanted)
    if call.only is None:
        return expanded, device
    chosen = [
        run for run in expanded if call.only in run.entry.run_id or call.only in monitor.describe(run.entry)
    ]
    if not chosen:
        raise UserError(
            f"--only '{call.only}' fits none of the {len(expanded)} runs; "
            f"expected a part of a name such as {expanded[0].entry.run_id}, see --dry-run"
        )
    return chosen, device


def _wanted(call: Invocation) -> list[suite.Wanted]:
    given = dict(call.given)
    if call.suite is not None:
        typed = [f"--{name.replace('_', '-')}" for name in given] + ["--set"] * bool(call.overrides)
        if typed:
            raise UserError(
                f"--suite names its runs itself, found {typed[0]} beside it; "
                f"leave it out, or choose some of the runs with --only"
            )
        return suite.read_suite(suite.find_suite(call.suite))
    for required in ("backbone", "recipe"):
        if required not in given:
            raise UserError(f"expected --{required} or --suite, found none; for example --{required} all")
    backbones = _named(given.pop("backbone"), names(BACKBONES))
    recipes = _named(given.pop("recipe"), names(RECIPES))
    return suite.grid(backbones, recipes, seeds(given.pop("seeds", "1")), given, parse_set(call.overrides))


def _named(text: str, known: Sequence[str]) -> list[str]:
    """ "a,b" -> ["a", "b"]; "all" -> every known name, in alphabetical order."""
    return sorted(known) if text == "all" else [part.strip() for part in text.split(",")]


def seeds(text: str) -> list[int]:
    """ "3" -> [0, 1, 2]; "0,5,7" -> [0, 5, 7]; "7," -> [7]."""
    parts = text.removesuffix(",").split(",")
    if text == "0" or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"--seeds wants how many, or a list, got '{text}'; for example 3 or 0,5,7")
    return [int(part) for part in parts] if "," in text else list(range(int(text)))


def _job(call: Invocation, run: suite.Expanded, device: torch.device) -> Job:
    arguments = ["run", "--config", str(_config_file(call.output, run.entry.run_id))]
    arguments += ["--output", str(call.output), "--device", device.type, "--keep", call.keep]
    for plugin in call.plugins:
        arguments += ["--plugin", str(plugin)]
    return Job(run.entry, tuple(arguments), run.stages)


def _config_file(output: Path, run_id: str) -> Path:
    return output / sweep.SWEEP_FOLDER / f"{run_id}.json"


def slots(device: torch.device, jobs: int | None) -> list[dict[str, str]]:
    """The environment of each slot: an equal share of this process's cores and, on CUDA, one GPU (in turn,
    if there are more slots than GPUs). An OMP_NUM_THREADS that is set already is kept if it is smaller.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = _gpus(device)
    count = jobs or len(gpus) or cores
    share = max(1, cores // count)
    fixed = os.environ.get("OMP_NUM_THREADS", "")
    threads = str(min(share, int(fixed)) if fixed.isdecimal() and int(fixed) else share)
    base = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return [
        base | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}) for slot in range(count)
    ]


def _gpus(device: torch.device) -> list[str]:
    """The GPUs to use, as CUDA_VISIBLE_DEVICES names them; none on the CPU."""
    if device.type != "cuda":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = [name.strip() for name in visible.split(",") if name.strip()]
    gpus = gpus or [str(number) for number in range(torch.cuda.device_count())]
    return gpus if device.index is None else [gpus[device.index]]


@contextmanager
def _terminable() -> Iterator[None]:
    """Within it SIGTERM and SIGINT stop the sweep, also where a shell's `&` has SIGINT ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary(output: Path, entries: Sequence[JournalEntry]) -> int:
    failed = [entry for entry in entries if entry.state == "failed"]
    for entry in failed:
        print(f"failed: {entry.run_id}: {entry.error} (log: {log_file(output, entry.run_id)})")
    print(f"{len(entries) - len(failed)} finished, {len(failed)} failed", end="")
    print("; rerun the same command to retry the failed runs" if failed else "")
    print(f"next: stbench compare {output}")
    return 1 if failed else 0
