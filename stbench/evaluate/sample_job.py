"""Many images of a network: what is drawn, by which processes, and how a stopped job goes on."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stbench.core.device import pick_devices
from stbench.core.errors import UserError
from stbench.core.files import write_array
from stbench.core.registry import suggest
from stbench.diffusion.sample import Guidance, check_steps
from stbench.diffusion.sample import resolve as resolve_sampler
from stbench.evaluate import draw_labels
from stbench.evaluate.sample_batch import Order, Painter, rows
from stbench.evaluate.sample_parts import Parts, is_made, join
from stbench.evaluate.sample_source import PRECISIONS, Origin, Source, open_source
from stbench.runs.records import SCHEMA

Report = Callable[[int], None]
"""Called with the number of images drawn so far."""


@dataclass(frozen=True)
class Asked:
    """The options of `stbench sample`; None takes the run's own evaluation setting, or the published one."""

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


def origin(
    run: Path | None,
    checkpoint: Path | None,
    vae: str | None = None,
    original: str | None = None,
    heads: int | None = None,
    weights: str = "ema",
) -> Origin:
    """Where the network comes from. Raises UserError unless exactly one of run and checkpoint is given."""
    if (run is None) == (checkpoint is None):
        found = "neither" if run is None else "both"
        raise UserError(f"expected a run folder or --checkpoint FILE, found {found}; give one of them")
    if checkpoint is not None:
        if weights not in ("ema", "raw"):
            raise UserError(f"--weights wants ema or raw, got {weights!r}; leave it out for ema")
        return Origin(checkpoint, True, vae, original, heads, weights)  # type: ignore[arg-type]
    if (original, heads, weights) != (None, None, "ema"):
        raise UserError(
            "--original, --heads and --weights are for --checkpoint: a run knows its own; drop them"
        )
    return Origin(run or Path(), vae=vae)


def sample(where: Origin, asked: Asked, outputs: Sequence[Path], device: str) -> None:
    """`stbench sample`: draw to every output and say where it is."""
    for output in outputs:
        if output.suffix not in ("", ".npz"):
            raise UserError(
                f"--output wants a file that ends in .npz, or a folder, got {output}; "
                f"try {output.with_suffix('.npz')}"
            )
    if len({output.resolve() for output in outputs}) < len(outputs):
        raise UserError("--output names one place twice; give each once")
    draw(where, asked, outputs, pick_devices(device))
    for output in outputs:
        print(f"{asked.count} images: {output}")


def order_of(asked: Asked, source: Source) -> Order:
    """Fill in what was left open. Raises UserError for what the network cannot do."""
    chosen = {
        name: given if (given := getattr(asked, name)) is not None else source.defaults[name]
        for name in ("interval", "channels", "sampler", "steps", "labels")
    }
    check_steps(resolve_sampler(chosen["sampler"], source.objective).name, source.objective, chosen["steps"])
    low, high = chosen["interval"]
    info = source.backbone.info
    if (chosen["channels"] or 0) > info.channels:
        raise UserError(
            f"--channels wants 1..{info.channels}, got {chosen['channels']}; "
            f"type --channels {info.channels} for all"
        )
    if asked.precision not in PRECISIONS:
        raise UserError(f"unknown precision '{asked.precision}'{suggest(asked.precision, PRECISIONS)}")
    draw_labels(chosen["labels"], 1, info.classes, asked.seed)
    return Order(
        count=asked.count,
        guidance=Guidance(asked.scale, low, high, chosen["channels"]),
        sampler=chosen["sampler"],
        steps=chosen["steps"],
        labels=chosen["labels"],
        seed=asked.seed,
        batch=asked.batch,
        precision=asked.precision,
    )


def draw(
    origin: Origin, asked: Asked, outputs: Sequence[Path], devices: Sequence[torch.device]
) -> dict[str, Any]:
    """Draw what is asked for to every output; returns the settings, whatever was there already included.

    Raises UserError if an output, or the parts of it, was made with other settings.
    """
    source = open_source(origin)
    if source.note:
        print(f"drawing from {source.note}", file=sys.stderr)
    order = order_of(asked, source)
    settings = {"schema": SCHEMA, "device": devices[0].type, **order.fields(), **source.facts()}
    missing = [output for output in outputs if not is_made(output, settings)]
    if not missing:
        return settings
    parts = Parts(outputs[0], settings, shard_size(order, devices[0]))
    with parts.lock():
        parts.open()
        _fill(origin, source, order, devices, parts)
        labels = draw_labels(order.labels, order.count, source.backbone.info.classes, order.seed)
        for output in missing:
            join(parts, output, settings, labels.numpy())
        parts.close()
    return settings


def _fill(
    origin: Origin, source: Source, order: Order, devices: Sequence[torch.device], parts: Parts
) -> None:
    """Draw every shard that is missing."""
    todo = parts.missing()
    with _progress(order.count) as report:
        if len(devices) > 1 and todo:
            _draw_apart(origin, order, devices, parts, todo, report)
        elif todo:
            _draw_here(origin, source, order, devices[0], parts, todo, report)


def shard_size(order: Order, device: torch.device) -> int:
    """Images in one file: the batch, made up to whole network calls."""
    unit = rows(order, device)
    return -(-order.batch // unit) * unit


def _draw_here(
    origin: Origin,
    source: Source | None,
    order: Order,
    device: torch.device,
    parts: Parts,
    todo: Sequence[tuple[int, int]],
    report: Report,
) -> None:
    if source is None or device.type != "cpu":
        source = open_source(origin, device)
    painter = Painter(source, order, device)
    for start, stop in todo:
        write_array(parts.file(start), painter.paint(start, stop))
        report(parts.drawn())


def _draw_apart(
    origin: Origin,
    order: Order,
    devices: Sequence[torch.device],
    parts: Parts,
    todo: Sequence[tuple[int, int]],
    report: Report,
) -> None:
    """One process a device, each with every n-th of the missing shards; the first error stops all."""
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    threads = torch.get_num_threads()
    workers = [
        context.Process(
            target=_work,
            args=(origin, order, device, parts, todo[index :: len(devices)], threads, errors),
            daemon=True,
        )
        for index, device in enumerate(devices)
    ]
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            for worker in workers:
                worker.join(0.2)
            report(parts.drawn())
            if not errors.empty() or any(worker.exitcode for worker in workers):
                break
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
            if worker.pid is not None:
                worker.join()
    if not errors.empty():
        raise UserError(errors.get())
    for worker, device in zip(workers, devices, strict=True):
        if worker.exitcode:
            raise UserError(
                f"the process on {device} ended with code {worker.exitcode}; give the same command again"
            )


def _work(
    origin: Origin,
    order: Order,
    device: torch.device,
    parts: Parts,
    todo: Sequence[tuple[int, int]],
    threads: int,
    errors: Any,
) -> None:
    torch.set_num_threads(threads)
    try:
        _draw_here(origin, None, order, device, parts, todo, lambda drawn: None)
    except KeyboardInterrupt:
        return
    except UserError as error:
        errors.put(str(error))
    except Exception as error:  # the parent prints one line, whatever it was
        errors.put(f"the process on {device} failed: {type(error).__name__}: {error}")


@contextmanager
def _progress(total: int) -> Iterator[Report]:
    """A bar on standard error, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("images"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=total)
        yield lambda drawn: bar.update(task, completed=drawn)
