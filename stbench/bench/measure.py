"""Measure a workload: throughput, time by phase, memory, and the share of the device's matmul peak."""

from __future__ import annotations

import gc
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stbench.bench.plain import PlainLoop
from stbench.bench.workload import Case, Workload
from stbench.core.device import arithmetic
from stbench.core.memory import keep_freed_memory, return_freed_memory
from stbench.core.phases import PHASES, PREFIX

WARMUP_STEPS = 3
PROFILED_STEPS = 3
PEAK_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices whose product measures the peak."""
PEAK_SECONDS = 1.0

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
"""Linux resets VmHWM, the peak of the resident memory, when 5 is written to the former (man 5 proc)."""


@dataclass(frozen=True)
class Measurement:
    """The figures of one case on one device."""

    case: Case
    parameters: int
    """Parameters of the student."""
    batch: int
    step_seconds: float
    """Median time of a step."""
    steps: int
    """Steps that were timed."""
    phases: dict[str, float]
    """Phase -> share of the profiled step; "other" is what no phase covers."""
    peak_memory: int
    """Bytes: of the device where it is a GPU, otherwise resident memory of the process, torch included."""
    peak_memory_reset: bool
    """Whether `peak_memory` is of this case alone; otherwise earlier cases of the process are in it."""
    flops_per_image: float
    """Student, heads and teachers, backward included (docs/protocol.md)."""
    peak_flops: float
    """FLOPs per second of a large matrix product in this precision, measured in the same process."""
    plain_step_seconds: float | None = None
    """Median time of a step of the plain loop, measured in turn with the engine's."""
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    """"engine" and "plain" -> mean of each loss over the first steps, from equal weights, data and noise."""

    @property
    def images_per_second(self) -> float:
        """Images trained on per second."""
        return self.batch / self.step_seconds

    @property
    def peak_share(self) -> float:
        """Share of the measured peak that the FLOPs of the step reach."""
        return self.flops_per_image * self.images_per_second / self.peak_flops

    @property
    def ratio(self) -> float | None:
        """How many times faster a step is than the plain loop's; None if that was not measured."""
        return None if self.plain_step_seconds is None else self.plain_step_seconds / self.step_seconds


def measure(
    case: Case, device: torch.device, *, seconds: float = 10.0, rounds: int = 4, against_plain: bool = False
) -> Measurement:
    """Measure one case for about `seconds`, in `rounds` parts that take turns with the plain loop's.

    Raises:
        UserError: If the options of the case do not fit together, or no plain loop of the recipe is known.
    """
    # Build and warm up. The plain loop comes later, so that it does not count as memory of the engine.
    workload = Workload(case, device)
    was_reset = reset_peak_memory(device)
    losses = {"engine": first_losses(workload.step)}
    peak = peak_memory(device, was_reset=was_reset)
    plain = PlainLoop(Workload(case, device)) if against_plain else None
    if plain is not None:
        losses["plain"] = first_losses(plain.step)

    # Time: engine and plain loop in turn.
    engine_times: list[float] = []
    plain_times: list[float] = []
    with workload.counting() as flops:
        first = workload.steps
        for _ in range(rounds):
            engine_times += time_steps(workload.step, device, seconds / rounds)
            if plain is not None:
                with _default_allocator(workload.step):
                    plain_times += time_steps(plain.step, device, seconds / rounds)
        trained = (workload.steps - first) * workload.batch

    return Measurement(
        case=case,
        parameters=sum(parameter.numel() for parameter in workload.model.student.parameters()),
        batch=workload.batch,
        step_seconds=statistics.median(engine_times),
        steps=len(engine_times),
        phases=profile_phases(workload),
        peak_memory=peak,
        peak_memory_reset=was_reset,
        flops_per_image=sum(flops.values()) / trained,
        peak_flops=matmul_peak(case.precision, device),
        plain_step_seconds=statistics.median(plain_times) if plain_times else None,
        losses=losses,
    )


@contextmanager
def _default_allocator(step: Callable[[], object]) -> Iterator[None]:
    """Return freed memory to the kernel in a block, as the published loops do; then refill it by one step."""
    keep_freed_memory(False)
    yield
    keep_freed_memory()
    step()


def first_losses(step: Callable[[], Mapping[str, Tensor]]) -> dict[str, float]:
    """Take WARMUP_STEPS steps; returns the mean of each loss over them."""
    found = [step() for _ in range(WARMUP_STEPS)]
    return {name: statistics.fmean(float(losses[name]) for losses in found) for name in found[0]}


def time_steps(step: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Call `step` for about `seconds`, at least twice; returns the seconds of each call."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        _synchronize(device)
        started = time.perf_counter()
        step()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return times


def profile_phases(workload: Workload) -> dict[str, float]:
    """Share of the time of a step that each phase takes, from torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = workload.device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        started = time.perf_counter()
        for _ in range(PROFILED_STEPS):
            workload.step()
        _synchronize(workload.device)
        whole = time.perf_counter() - started
    events = {event.key: event for event in profiler.key_averages()}
    shares = dict.fromkeys(PHASES, 0.0)
    for name in PHASES:
        event = events.get(PREFIX + name)
        if event is not None:
            micros = event.device_time_total if on_gpu else event.cpu_time_total
            shares[name] = micros / 1e6 / whole
    return shares | {"other": max(0.0, 1.0 - sum(shares.values()))}


def matmul_peak(precision: str, device: torch.device, seconds: float = PEAK_SECONDS) -> float:
    """FLOPs per second of a large square matrix product in a training precision."""
    size = PEAK_SIZE.get(device.type, 1024)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))

    def product() -> Tensor:
        return a @ b

    with arithmetic("tf32" if precision == "tf32" else "fp32", device):
        for _ in range(3):
            product()
        times = time_steps(product, device, seconds)
    return 2.0 * size**3 / min(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> bool:
    """Start a new measurement of peak memory; returns False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    gc.collect()  # the networks of an earlier case may be part of reference cycles
    return_freed_memory()
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device, *, was_reset: bool) -> int:
    """Peak memory in bytes since `reset_peak_memory`, or of the process so far if that returned False."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if was_reset:
        found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kibibytes on Linux
