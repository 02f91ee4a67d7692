"""The arguments of `stbench sweep`. No heavy import: `--help` answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from stbench.cli.options import RUNS, Device, KeepChoice, Output, Plugins


def sweep(
    backbone: Annotated[
        str | None, typer.Option(help="Families or family-sizes with commas, as dit,sit-ti/2; or all.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipes with commas, or all.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many, counted from 0, or a list as 0,5,7; default: 1.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set of every run.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="Corruption and target; default: each backbone's published one.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of the last stage.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, tf32 or bf16.")] = None,
    eval_guidance: Annotated[str | None, typer.Option(help="Guidance scales, such as 1.0,1.5.")] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", help="Any option of every run, as in `stbench run`; repeatable.")
    ] = [],  # noqa: B006
    suite: Annotated[
        str | None, typer.Option(help="YAML file that names the runs, or a shipped one by its bare name.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Only the runs whose folder name or words in --dry-run hold this text.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default: one a GPU, or one a CPU core.")
    ] = None,
    plugin: Plugins = [],  # noqa: B006
    device: Device = "auto",
    output: Output = RUNS,
    keep: Annotated[
        KeepChoice, typer.Option(help="EMA weights to keep: of all evaluation points, or the last.")
    ] = KeepChoice.all,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs and stop.")] = False,
) -> None:
    """Make many runs, several at a time; the same command goes on, and tries again what failed."""
    from stbench.cli import sweep as sweeping

    given = {
        "backbone": backbone,
        "recipe": recipe,
        "seeds": seeds,
        "dataset": dataset,
        "objective": objective,
        "steps": steps,
        "precision": precision,
        "eval_guidance": eval_guidance,
    }
    request = sweeping.Invocation(
        given={name: value for name, value in given.items() if value is not None},
        overrides=overrides,
        suite=suite,
        only=only,
        jobs=jobs,
        plugins=plugin,
        device=device,
        output=output,
        keep=keep.value,
    )
    if dry_run:
        sweeping.dry_run(request)
    elif code := sweeping.sweep_runs(request):
        raise typer.Exit(code)
