"""`stbench bench`: time the training step, by phase, and compare it with a plain loop."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from stbench.cli import options
from stbench.cli.completion import complete
from stbench.cli.outputs import require_outputs
from stbench.core import limits
from stbench.core.text import print_line


def bench(
    backbone: Annotated[
        list[str],
        typer.Option(
            help="Backbone family, or family and size; repeatable.", autocompletion=complete("backbone")
        ),
    ] = ["sit"],  # noqa: B006
    recipe: Annotated[
        list[str],
        typer.Option(help="Recipe whose last stage is timed; repeatable.", autocompletion=complete("recipe")),
    ] = ["vanilla", "self-transcendence"],  # noqa: B006
    batch: Annotated[
        list[int], typer.Option(min=1, max=limits.MAX_BATCH, help="Images per step; repeatable.")
    ] = [],  # noqa: B006
    precision: Annotated[list[str], typer.Option(help="fp32, tf32 or bf16; repeatable.")] = ["fp32"],  # noqa: B006
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also time each combination with a compiled student.")
    ] = False,
    against_plain: Annotated[
        bool, typer.Option("--against-plain", help="Also time the loop of the published scripts, in turn.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="Time per case and loop.")] = 10.0,
    dataset: Annotated[
        str,
        typer.Option(
            help="Data set whose shapes are used: digits (default for size ti) or random-latents, those of "
            "images of 256x256 (default for other sizes)."
        ),
    ] = "",
    overrides: options.Overrides = [],  # noqa: B006
    plugin: options.Plugins = [],  # noqa: B006
    device: options.Device = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time the training step of each combination of backbone, recipe, batch and precision."""
    # Kineto, torch's profiler, reports its own start and end on standard error otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from rich.console import Console
    from rich.progress import track

    from stbench.bench import report
    from stbench.bench.measure import Measurement, measure
    from stbench.bench.throughput import rate_of, remember
    from stbench.bench.workload import Case, prepare_case
    from stbench.config.overrides import parse_set
    from stbench.core.device import pick_device
    from stbench.core.files import atomic_write
    from stbench.core.outputs import Output
    from stbench.core.registry import load_builtins, load_plugins

    load_builtins()
    load_plugins(plugin)
    torch_device, settings = pick_device(device), parse_set(overrides)
    sizes: list[int | None] = [*batch] or [None]
    cases = [
        Case(*values, dataset=dataset, overrides=settings)
        for values in itertools.product(
            backbone, recipe, sizes, precision, [False, True] if compiled else [False]
        )
    ]
    if output is not None:
        require_outputs([Output(output, is_own=report.is_report)])
    prepared = [prepare_case(case) for case in cases]  # find mistakes before anything is timed
    measured: list[Measurement] = []
    for case, planned in track(
        list(zip(cases, prepared, strict=True)),
        console=Console(stderr=True),
        description="timing",
        transient=True,
    ):
        found = measure(case, torch_device, seconds=seconds, against_plain=against_plain)
        measured.append(found)
        rate = rate_of(found, planned.spec, planned.dataset, torch_device, report.label(found))
        remember([rate])
        if output is not None:  # after every case, so that an interruption loses only the current one
            command = shlex.join(["stbench", *sys.argv[1:]])
            atomic_write(output, json.dumps(report.as_json(measured, torch_device, command), indent=1) + "\n")

    for table in report.tables(measured):
        Console().print(table)
    for line in report.loss_lines(measured):
        print_line(line)
    if output is not None:
        print_line(f"figures: {output}")
