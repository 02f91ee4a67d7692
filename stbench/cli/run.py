"""`stbench run`: train a backbone under a recipe, or print the plan."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stbench.cli import options
from stbench.cli.completion import complete
from stbench.cli.estimates import print_estimates
from stbench.cli.outputs import require_run_outputs
from stbench.cli.ranks import start_ranks
from stbench.core.errors import UserError
from stbench.core.text import print_line, visible

if TYPE_CHECKING:
    from stbench.config.plan import PreparedRun
    from stbench.train.options import RunOptions


def run(
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Backbone family, or family and size such as sit-b/2.", autocompletion=complete("backbone")
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe; see `stbench list recipes`.", autocompletion=complete("recipe")),
    ] = None,
    dataset: options.Dataset = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Data to train on: prepared by `stbench data prepare`, in REPA's layout, or a small folder "
            "of images."
        ),
    ] = None,
    objective: options.Objective = None,
    steps: options.Steps = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all randomness in training.")] = None,
    precision: options.Precision = None,
    eval_guidance: options.EvalGuidance = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Official checkpoint that initialises the first stage.")
    ] = None,
    original: options.Original = None,
    init_weights: Annotated[
        str | None, typer.Option(help="Weights of that checkpoint to use: ema (default) or raw.")
    ] = None,
    overrides: options.Overrides = [],  # noqa: B006
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML, JSON or Python file with the options above, or a run folder to take them from; the "
            "command line takes precedence."
        ),
    ] = None,
    plugin: options.Plugins = [],  # noqa: B006
    device: options.Device = "auto",
    devices: options.Devices = None,
    shard: Annotated[
        bool,
        typer.Option("--shard", help="Split the networks over the ranks (FSDP2), not copy them (DDP)."),
    ] = False,
    output: options.Output = options.RUNS,
    keep: options.Keep = options.KeepChoice.all,
    reuse: Annotated[
        bool,
        typer.Option(
            "--reuse/--no-reuse",
            help="Reuse a stage that an equal run has finished; its cost is counted either way.",
        ),
    ] = True,
    track: Annotated[
        list[options.TrackChoice],
        typer.Option(help="Send curves, samples, settings and cost to a tracking service; repeatable."),
    ] = [],  # noqa: B006
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="The same as --track tensorboard.")
    ] = False,
    inception: options.Inception = None,
    inception_sha256: options.InceptionSha256 = None,
    verify: options.Verify = options.VerifyChoice.fast,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and exit.")] = False,
) -> None:
    """Train a backbone under a recipe and evaluate it at regular points; rerun to resume."""
    from stbench.config.overrides import parse_set, read_config
    from stbench.config.plan import prepare
    from stbench.config.resolve import resolve_options
    from stbench.core.device import default_precision, pick_device
    from stbench.core.registry import load_builtins, load_plugins
    from stbench.core.verified import full_verification
    from stbench.train import launch as ranks
    from stbench.train.options import RunOptions

    start_ranks(devices, device, dry_run=dry_run)
    load_builtins()
    plugins = load_plugins(plugin)
    torch_device = pick_device(device)

    # Precedence: the command line, then the config file, then what suits the device.
    typed = {
        "backbone": backbone,
        "recipe": recipe,
        "dataset": dataset,
        "data": data,
        "objective": objective,
        "steps": steps,
        "seed": seed,
        "precision": precision,
        "eval_guidance": eval_guidance,
        "init_from": init_from and str(init_from),
        "original": original,
        "init_weights": init_weights,
    }
    values: dict[str, Any] = {"precision": default_precision(torch_device)}
    values |= read_config(config, options.drop_missing(typed)) if config else {}
    settings = values.pop("set", {}) | parse_set(overrides)
    settings |= options.inception_settings(inception, inception_sha256, settings)
    values |= options.drop_missing(typed)

    with full_verification(verify is options.VerifyChoice.full):
        prepared = prepare(resolve_options(values, settings))
    if dry_run:
        _print_start(prepared)
        planned = RunOptions(output, torch_device, keep.value, reuse, plugins, shard=shard)
        _print_plan(prepared, planned, devices or 1)
        return
    require_run_outputs(output, prepared.spec.data.path if prepared.spec.data else None)
    with ranks.joined(torch_device, devices) as world:
        if shard and world.size == 1:
            raise UserError("--shard needs several ranks, found one; add --devices N, or use torchrun")
        _print_start(prepared)
        rank_device = ranks.local_device(torch_device, world)
        run_options = RunOptions(output, rank_device, keep.value, reuse, plugins, world, shard)
        services = [choice.value for choice in track] + (["tensorboard"] if tensorboard else [])
        _train(prepared, run_options, services)


def _print_start(prepared: PreparedRun) -> None:
    """Print what the run starts from, if that is a checkpoint."""
    from stbench.config.init_from import describe_start

    if prepared.spec.init is not None:
        print_line(describe_start(prepared.spec.init, prepared.dataset.classes))


def _train(prepared: PreparedRun, run_options: RunOptions, services: list[str]) -> None:
    """Train what is left of a run, tracked by services; print its curve and where its files are."""
    from stbench.cli.progress import training_progress
    from stbench.compare import terminal
    from stbench.runs.folder import OutputFolder
    from stbench.train import engine
    from stbench.train.hooks import Hook
    from stbench.train.tracking import open_trackers

    folder, world = OutputFolder(run_options.output).run(prepared.run_id), run_options.world
    hooks: list[Hook] = [training_progress(prepared.spec.train.batch)] if world.is_main else []
    world.from_main(lambda: hooks.extend(open_trackers(services, prepared, folder)))  # fails on every rank
    try:
        record, trained = engine.run(prepared, run_options, hooks)
    except engine.Interrupted as stopped:
        raise KeyboardInterrupt from stopped  # main() prints the command that resumes
    finally:
        for hook in hooks:
            hook.close()

    if not trained:
        print_line(
            f"{record.path} is already finished at {record.steps} steps; nothing to do. "
            f"Use a larger --steps to continue it"
        )
    terminal.print_curve(record)
    pictures = folder.sample_files(record.final_stage)
    if pictures:
        print_line(f"samples: {pictures[-1].parent}")
    print_line(f"run folder: {record.path}")


def _print_plan(prepared: PreparedRun, run_options: RunOptions, devices: int) -> None:
    """Print the stages with their cost, all settings, and the run folder."""
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from stbench.train.cost import disk_bytes, expected_cost

    table = Table(
        Column("stage", no_wrap=True, overflow="fold"),
        "steps",
        "images",
        "taps",
        Column("teachers", overflow="fold"),
        "evaluated at",
        "TFLOPs",
        "disk MiB",
        title="plan",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for stage in prepared.stages:
        cells = (
            stage.name,
            str(stage.steps),
            str(stage.images),
            ", ".join(map(str, stage.supervision.taps)) or "-",
            _teachers(stage.supervision) or "-",
            ", ".join(map(str, stage.points)),
            f"{expected_cost(prepared, stage).total / 1e12:.2f}",
            f"{disk_bytes(prepared, stage, run_options.keep) / 2**20:.0f}",
        )
        # Text, because a str would be parsed as rich markup.
        table.add_row(*(Text(visible(cell)) for cell in cells))
    Console().print(table)
    print_estimates(prepared, run_options.device, devices=devices, shard=run_options.shard)
    settings = prepared.spec.model_dump(mode="json") | {"stages": prepared.description()}
    print(json.dumps(settings, indent=1))
    print_line(f"run folder: {run_options.output / prepared.run_id}")


def _teachers(supervision: Any) -> str:
    """Earlier stages and external networks that supervise a stage, separated by commas."""
    from stbench.core.recipe import Artifact

    values = (getattr(supervision, field.name) for field in fields(supervision))
    names = [value.name for value in values if isinstance(value, Artifact)]
    return ", ".join(filter(None, [*names, supervision.needs]))
