"""Sampling jobs: complete a request and generate its images, in one or more processes, resumably."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from stbench.core.backbone import sampling_view
from stbench.core.errors import UserError
from stbench.core.registry import suggest
from stbench.core.text import print_line
from stbench.core.world import ALONE, World
from stbench.diffusion.guides import require_fit
from stbench.diffusion.sample import Guidance, check_steps, resolve_sampler
from stbench.evaluate.generate import draw_labels
from stbench.evaluate.progress import ProgressBar, Report, ignore, no_progress
from stbench.evaluate.sample_batch import BatchSampler, SampleSpec, rows_per_call
from stbench.evaluate.sample_model import ModelLocation, SamplingModel, load_model
from stbench.evaluate.sample_parts import SETTINGS_SCHEMA, PartsFolder, is_finished, join_parts

PRECISIONS = ("fp32", "tf32", "bf16")
"""Arithmetic that the network may use."""


@dataclass(frozen=True)
class SampleRequest:
    """What was requested. None takes the run's own evaluation setting, or the published value."""

    count: int
    scale: float = 1.0
    interval: tuple[float, float] | None = None
    channels: int | None = None
    sampler: str | None = None
    steps: int | None = None
    labels: str | None = None
    seed: int = 0
    batch: int = 64
    precision: str = "fp32"


@dataclass(frozen=True)
class Job:
    """What a process needs to generate images into a parts folder."""

    location: ModelLocation
    spec: SampleSpec
    parts: PartsFolder


def resolve_request(request: SampleRequest, model: SamplingModel) -> SampleSpec:
    """Complete a request with the model's defaults.

    Raises UserError if the sampler cannot invert the objective or cannot take that many steps, and for an
    unknown precision or kind of labels, or more guided channels than the network has.
    """
    chosen = {
        name: given if (given := getattr(request, name)) is not None else model.defaults[name]
        for name in ("interval", "channels", "sampler", "steps", "labels")
    }

    # Fail now rather than in the middle of a long job, or in a worker process.
    sampler = resolve_sampler(chosen["sampler"], model.objective)
    check_steps(sampler.name, model.objective, chosen["steps"], option="--steps ")
    info = model.backbone.info
    if (chosen["channels"] or 0) > info.channels:
        raise UserError(
            f"--channels must be between 1 and {info.channels}, found {chosen['channels']}; "
            f"use --channels {info.channels} for all"
        )
    if request.precision not in PRECISIONS:
        raise UserError(f"unknown precision '{request.precision}'{suggest(request.precision, PRECISIONS)}")
    draw_labels(chosen["labels"], 1, classes=info.classes, seed=request.seed)
    require_fit(model.guides.guides, sampling_view(model.backbone), model.objective)

    low, high = chosen["interval"]
    return SampleSpec(
        count=request.count,
        guidance=Guidance(request.scale, low, high, chosen["channels"]),
        sampler=chosen["sampler"],
        steps=chosen["steps"],
        labels=chosen["labels"],
        seed=request.seed,
        batch=request.batch,
        precision=request.precision,
    )


def sample_images(
    location: ModelLocation,
    request: SampleRequest,
    outputs: Sequence[Path],
    devices: Sequence[torch.device],
    *,
    progress: ProgressBar = no_progress,
    world: World = ALONE,
) -> dict[str, Any]:
    """Generate the requested images into every output, an npz file or a folder of PNG files.

    One process runs per device; several ranks have one device each. An interrupted job resumes from the
    shards in `<output>.parts/`; a finished output is not written again. Returns the settings that are stored
    with the images. Raises UserError if an output, or its parts, was made with other settings.
    """
    model = load_model(location)
    if model.description and world.is_main:
        print_line(f"sampling from {model.description}", error=True)
    spec = resolve_request(request, model)
    settings = {"schema": SETTINGS_SCHEMA, "device": devices[0].type, **spec.fields(), **model.identity()}
    missing = world.from_main(lambda: [output for output in outputs if not is_finished(output, settings)])
    if not missing:
        return settings

    # All outputs are joined from the shards of the first one.
    parts = PartsFolder(outputs[0], settings, shard_size(spec, devices[0]))
    job = Job(location, spec, parts)
    with contextlib.ExitStack() as stack:
        parts.token, shards = world.from_main(lambda: _open_parts(parts, stack))
        with progress("images", spec.count) as report:
            _generate(job, model, devices, shards[world.rank :: world.size], report)
        world.wait()
        labels = draw_labels(spec.labels, spec.count, classes=model.backbone.info.classes, seed=spec.seed)
        world.from_main(lambda: _join_parts(parts, missing, labels))
    return settings


def _open_parts(parts: PartsFolder, stack: contextlib.ExitStack) -> tuple[str, list[tuple[int, int]]]:
    """Lock the parts until `stack` is closed; returns the token of the job and the missing shards."""
    stack.enter_context(parts.lock())
    parts.open()
    return parts.token, list(parts.missing())


def _join_parts(parts: PartsFolder, outputs: Sequence[Path], labels: torch.Tensor) -> None:
    """Write the outputs and delete the parts."""
    for output in outputs:
        join_parts(parts, output, labels.numpy())
    parts.delete()


def shard_size(spec: SampleSpec, device: torch.device) -> int:
    """Return the number of images per shard: the batch, rounded up to whole network calls."""
    rows = rows_per_call(spec, device)
    return -(-spec.batch // rows) * rows


def _generate(
    job: Job,
    model: SamplingModel,
    devices: Sequence[torch.device],
    shards: Sequence[tuple[int, int]],
    report: Report,
) -> None:
    """Generate shards (start, stop) on one or several devices."""
    if not shards:
        return
    if len(devices) > 1:
        generate_in_processes(job, devices, shards, report=report)
        return
    if devices[0].type != "cpu":
        model = load_model(job.location, devices[0])
    _generate_shards(job, model, shards, device=devices[0], report=report)


def _generate_shards(
    job: Job,
    model: SamplingModel,
    shards: Sequence[tuple[int, int]],
    *,
    device: torch.device,
    report: Report,
) -> None:
    """Generate shards (start, stop) one after the other in this process."""
    sampler = BatchSampler(model, job.spec, device)
    for start, stop in shards:
        job.parts.write(start, sampler.sample(start, stop))
        report(job.parts.done())


def generate_in_processes(
    job: Job,
    devices: Sequence[torch.device],
    shards: Sequence[tuple[int, int]],
    *,
    report: Report = ignore,
) -> None:
    """Generate shards in one process per device, each with every n-th shard.

    The first error terminates all processes and is raised as a UserError; finished shards remain.
    """
    # Start. "spawn", because a forked process cannot use CUDA.
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    threads = torch.get_num_threads()
    workers = [
        context.Process(
            target=_work,
            args=(job, device, shards[index :: len(devices)]),
            kwargs={"threads": threads, "errors": errors},
            daemon=True,
        )
        for index, device in enumerate(devices)
    ]
    try:
        for worker in workers:
            worker.start()

        # Watch, until all have ended or one has failed.
        while any(worker.is_alive() for worker in workers):
            for worker in workers:
                worker.join(0.2)
            report(job.parts.done())
            if not errors.empty() or any(worker.exitcode for worker in workers):
                break
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
            if worker.pid is not None:
                worker.join()

    # Report the first error; a worker killed by a signal leaves none, only its exit code.
    if not errors.empty():
        raise UserError(errors.get())
    for worker, device in zip(workers, devices, strict=True):
        if worker.exitcode:
            raise UserError(
                f"the process on {device} ended with exit code {worker.exitcode}; "
                "rerun the same command to resume"
            )


def _end_with_parent() -> None:
    """End this worker process at once when its parent no longer exists, even if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        # A pipe whose other end the parent holds: the kernel closes it, however the parent ends.
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(
    job: Job, device: torch.device, shards: Sequence[tuple[int, int]], *, threads: int, errors: Any
) -> None:
    """Run in a worker process: load the model on its device and generate its shards."""
    _end_with_parent()
    torch.set_num_threads(threads)
    try:
        _generate_shards(job, load_model(job.location, device), shards, device=device, report=ignore)
    except KeyboardInterrupt:
        return
    except UserError as error:
        errors.put(str(error))
    except Exception as error:  # the parent process prints one line, whatever went wrong
        errors.put(f"the process on {device} failed: {type(error).__name__}: {error}")
