"""The memory and the time that a planned run is expected to take, for `stbench run --dry-run`."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from stbench.core.text import print_line, visible

if TYPE_CHECKING:
    import torch

    from stbench.config.plan import PreparedRun

PARTS = ("parameters", "gradients", "optimizer", "ema", "teachers", "activations", "gathered", "total")
"""Rows of the table: attributes of `MemoryEstimate`."""


def print_estimates(
    prepared: PreparedRun, device: torch.device, *, devices: int = 1, shard: bool = False
) -> None:
    """Print a table with the memory of each stage on each device, and the expected training time."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from stbench.train.memory import estimate_memory

    estimates = [estimate_memory(prepared, s, devices=devices, shard=shard) for s in prepared.stages]
    unit, size = ("GiB", 2**30) if estimates[-1].total >= 2**30 else ("MiB", 2**20)
    print_line(f"memory per device, {unit}, with {estimates[0].batch} images at a time")
    table = Table("stage")
    for stage in prepared.stages:
        table.add_column(Text(visible(stage.name)), justify="right")
    for name in PARTS:
        values = [getattr(found, name) for found in estimates]
        if any(values):
            cells = [f"{value / size:.2f}" for value in values]
            table.add_row({"ema": "EMA"}.get(name, name), *cells)
    Console().print(table)
    print_line(_expected_time(prepared, device, devices=devices, batch=estimates[0].batch))


def _expected_time(prepared: PreparedRun, device: torch.device, *, devices: int, batch: int) -> str:
    """The training time in one sentence, or how to measure the speed."""
    from stbench.bench.throughput import find_rate
    from stbench.train.cost import expected_cost

    spec = prepared.spec
    rate = find_rate(spec, prepared.dataset, device, batch)
    if rate is None:
        return f"expected time: not known; measure the speed with `{_bench_command(prepared, batch)}`"
    flops = sum(expected_cost(prepared, stage).total for stage in prepared.stages)
    seconds = flops / (rate.flops_per_second * devices)
    note = ", without communication between the devices" if devices > 1 else ""
    return f"expected time: {_duration(seconds)} without evaluation{note}, at the speed of {rate.label}"


def _bench_command(prepared: PreparedRun, batch: int) -> str:
    """The command that times the steps of a run."""
    spec = prepared.spec
    words = ["stbench", "bench", "--backbone", f"{spec.backbone.name}-{spec.backbone.size}"]
    words += ["--recipe", spec.recipe.name, "--batch", str(batch), "--precision", spec.train.precision]
    if spec.dataset == "digits" and not spec.backbone.size.startswith("ti"):
        words += ["--dataset", "digits"]
    words += ["--compile"] * (spec.train.compile == "on")
    for section, given in (("backbone", spec.backbone.options), ("recipe", spec.recipe.options)):
        for name, value in given.items():
            words += ["--set", f"{section}.{name}={json.dumps(value)}"]
    return shlex.join(words)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
