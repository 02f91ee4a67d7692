"""The results of `stbench bench` as a table for the terminal and as JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stbench.bench.measure import Measurement
from stbench.train.environment import environment

if TYPE_CHECKING:
    from rich.table import Table

Column = Callable[[Measurement], str]

SCHEMA = 1
"""Version of the JSON layout."""


def as_json(measurements: Sequence[Measurement], device: torch.device, command: str) -> dict[str, Any]:
    """All figures in SI units, with the machine and the command that made them."""
    return {
        "schema": SCHEMA,
        "command": command,
        "environment": asdict(environment(device, {})),
        "cpu": _cpu_features(),
        "results": [_row(measurement) for measurement in measurements],
    }


def is_report(path: Path) -> bool:
    """Whether a file begins as the JSON files with figures do."""
    with path.open("rb") as file:
        return re.match(rb'\{\s*"schema":\s*\d+,\s*"command":\s*"stbench ', file.read(256)) is not None


def _row(measurement: Measurement) -> dict[str, Any]:
    derived = {
        "images_per_second": measurement.images_per_second,
        "peak_share": measurement.peak_share,
        "ratio_to_plain": measurement.ratio,
    }
    return asdict(measurement) | derived


def _cpu_features() -> dict[str, Any]:
    """The vector instructions of the processor that decide the speed of reduced precision."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{name: name in flags for name in ("avx512_bf16", "amx_bf16")},
    }


def tables(measurements: Sequence[Measurement]) -> list[Table]:
    """Two tables with one row per case: speed and memory, and the share of each phase in the step."""
    speed = {
        "images/s": lambda m: f"{m.images_per_second:.4g}",
        "ms/step": lambda m: f"{m.step_seconds * 1e3:.4g}",
        "GFLOPs/image": lambda m: f"{m.flops_per_image / 1e9:.4g}",
        "of peak": lambda m: f"{m.peak_share:.0%}",
        "GiB": lambda m: f"{'' if m.peak_memory_reset else '<='}{m.peak_memory / 2**30:.2f}",
    }
    if any(m.ratio is not None for m in measurements):
        speed["x plain"] = lambda m: "-" if m.ratio is None else f"{m.ratio:.2f}"
    phases = {name: lambda m, name=name: f"{m.phases[name]:.0%}" for name in measurements[0].phases}
    return [_table("speed", measurements, speed), _table("phases", measurements, phases)]


def _table(title: str, measurements: Sequence[Measurement], columns: Mapping[str, Column]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("case", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)  # only the case may be broken into lines
    for m in measurements:
        table.add_row(Text(label(m)), *(Text(column(m)) for column in columns.values()))
    return table


def label(m: Measurement) -> str:
    """The case in words: "sit-b/2 vanilla, batch 256, bf16, compiled"."""
    words = [f"{m.case.backbone} {m.case.recipe}", f"batch {m.batch}", m.case.precision]
    return ", ".join(words + (["compiled"] if m.case.compile else []))


def loss_lines(measurements: Sequence[Measurement]) -> list[str]:
    """The losses of engine and plain loop over the first steps, one line per case that compares them."""
    lines = []
    for m in measurements:
        if "plain" in m.losses:
            engine, plain = (
                ", ".join(f"{name} {value:.6g}" for name, value in m.losses[who].items())
                for who in ("engine", "plain")
            )
            lines.append(f"losses of {label(m)}: {engine}; plain loop: {plain}")
    return lines
