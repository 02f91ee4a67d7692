"""`stbench sweep`: make many runs, several at a time, on this machine or on a cluster."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stbench.cli import executors, options
from stbench.cli.outputs import require_run_outputs
from stbench.core.errors import UnsupportedError, UserError
from stbench.core.limits import MAX_RUNS, MAX_SEED, MAX_SEEDS
from stbench.core.safe_load import shown
from stbench.core.text import print_line

if TYPE_CHECKING:
    from stbench.runs.journal import JournalEntry
    from stbench.sweep.executor import Executor
    from stbench.sweep.suite import SuiteRun, SweepRun


def sweep(
    backbone: Annotated[
        str | None,
        typer.Option(help="Families, or families and sizes, separated by commas: dit,sit-ti/2; or all."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipes separated by commas, or all.")] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Number of seeds, counted from 0, or a list such as 0,5,7; default: 1."),
    ] = None,
    dataset: options.Dataset = None,
    objective: options.Objective = None,
    steps: options.Steps = None,
    precision: options.Precision = None,
    eval_guidance: options.EvalGuidance = None,
    overrides: options.Overrides = [],  # noqa: B006
    suite: Annotated[
        str | None,
        typer.Option(help="YAML file that lists the runs, or the name of a shipped suite, such as digits."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="Only runs whose folder name, or description in --dry-run, contains this text."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_RUNS,
            help="Runs at a time; default: one per GPU, or one per core on the CPU; with Slurm, no limit.",
        ),
    ] = None,
    executor: executors.ExecutorOption = executors.ExecutorChoice.local,
    gpus_per_job: executors.GpusPerJob = None,
    nodes_per_job: executors.NodesPerJob = None,
    partition: executors.Partition = None,
    time_limit: executors.TimeLimit = None,
    slurm: executors.SlurmSettings = [],  # noqa: B006
    plugin: options.Plugins = [],  # noqa: B006
    device: options.Device = "auto",
    output: options.Output = options.RUNS,
    keep: options.Keep = options.KeepChoice.all,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs and exit.")] = False,
) -> None:
    """Make many runs, several at a time; rerun to resume and to retry failed runs."""
    from stbench.core.registry import load_builtins, load_plugins
    from stbench.sweep.suite import find_suite, prepare_runs, read_suite

    load_builtins()
    load_plugins(plugin)

    # Where: on this machine, or on a Slurm cluster.
    request = executors.slurm_request(
        executor,
        gpus=gpus_per_job,
        nodes=nodes_per_job,
        partition=partition,
        time_limit=time_limit,
        jobs=jobs,
        settings=slurm,
    )
    if request is None:
        place = executors.local_place(output, device, jobs)
    else:
        place = executors.slurm_place(output, device, request)

    # Which runs: those of a suite, or a grid of backbones, recipes and seeds.
    values = options.drop_missing(
        {
            "backbone": backbone,
            "recipe": recipe,
            "seeds": seeds,
            "dataset": dataset,
            "objective": objective,
            "steps": steps,
            "precision": precision,
            "eval_guidance": eval_guidance,
        }
    )
    if suite is None:
        requested = grid_runs(values, overrides)
    else:
        _require_suite_alone(values, overrides)
        requested = read_suite(find_suite(suite))
    skipped: list[UnsupportedError] = []
    skip = skipped.append if "all" in (backbone, recipe) else None
    runs = prepare_runs([_with_precision(run, place.precision) for run in requested], skip)
    for message in dict.fromkeys(map(str, skipped)):
        print_line(f"skipped: {message}")
    if only is not None:
        runs = _select(runs, only)

    if dry_run:
        _print_runs(runs, output)
        print_line(f"{place.description}; run folders in {output}")
        return
    for data in {run.prepared.spec.data.path if run.prepared.spec.data else None for run in runs}:
        require_run_outputs(output, data)
    arguments = ["--output", str(output), "--device", place.device, "--keep", keep.value]
    arguments += [part for file in plugin for part in ("--plugin", str(file))]
    entries = _execute(runs, output, place.executor, arguments)
    if not _print_summary(entries, output):
        raise typer.Exit(1)


# --- Which runs ---


def grid_runs(values: Mapping[str, Any], overrides: Sequence[str]) -> list[SuiteRun]:
    """Every combination of the backbones, recipes and seeds in `values`; the other values apply to all.

    Raises:
        UserError: --backbone or --recipe is missing, or --seeds or --set is malformed.
    """
    from stbench.config.overrides import parse_set
    from stbench.core.registry import BACKBONES, RECIPES, names
    from stbench.sweep.suite import grid

    for required in ("backbone", "recipe"):
        if required not in values:
            raise UserError(f"--{required} or --suite is missing; for example --{required} all")
    others = {name: value for name, value in values.items() if name not in ("backbone", "recipe", "seeds")}
    return grid(
        backbones=_split(values["backbone"], names(BACKBONES)),
        recipes=_split(values["recipe"], names(RECIPES)),
        seeds=parse_seeds(values.get("seeds", "1")),
        values=others,
        overrides=parse_set(overrides),
    )


def _with_precision(run: SuiteRun, default: str | None) -> SuiteRun:
    """The run with the default precision, if it names none."""
    if "precision" in run.values:
        return run
    if default is None:
        place = f"{run.place}: add precision" if run.place else "give --precision"
        raise UserError(
            f"{place}, such as bf16; it has no default, because the GPUs of the jobs are not in this machine"
        )
    return replace(run, values={"precision": default, **run.values})


def _require_suite_alone(values: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raise UserError if an option that describes runs was given together with --suite."""
    typed = [f"--{name.replace('_', '-')}" for name in values] + ["--set"] * bool(overrides)
    if typed:
        raise UserError(
            f"--suite already describes its runs, so it cannot be combined with {typed[0]}; "
            f"drop {typed[0]}, or select some of the runs with --only"
        )


def _split(text: str, known: Sequence[str]) -> list[str]:
    """Split "a,b" into ["a", "b"]; "all" is every known name, in alphabetical order."""
    return sorted(known) if text == "all" else [part.strip() for part in text.split(",")]


def parse_seeds(text: str) -> list[int]:
    """Parse --seeds: "3" -> [0, 1, 2]; "0,5,7" -> [0, 5, 7]; "7," -> [7].

    Raises:
        UserError: The text is anything else, or 0.
    """
    parts = [part.strip() for part in text.removesuffix(",").split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) <= len(str(MAX_SEED)) for part in parts):
        raise UserError(
            f"--seeds must be a positive number or a list, got {shown(text)}; for example 3 or 0,5,7"
        )
    count = len(parts) if "," in text else int(text)
    if not 1 <= count <= MAX_SEEDS:
        raise UserError(f"--seeds must be 1 to {MAX_SEEDS} seeds, got {count}; for example 3 or 0,5,7")
    return list(map(int, parts)) if "," in text else list(range(count))


def _select(runs: Sequence[SweepRun], text: str) -> list[SweepRun]:
    """The runs whose folder name or description contains a text; UserError if there are none."""
    from stbench.sweep.monitor import describe

    selected = [run for run in runs if text in run.entry.run_id or text in describe(run.entry)]
    if not selected:
        raise UserError(
            f"--only '{text}' matches none of the {len(runs)} runs; "
            f"expected part of a name such as {runs[0].entry.run_id}, see --dry-run"
        )
    return selected


def _print_runs(runs: Sequence[SweepRun], output: Path) -> None:
    """Print every run with its state, and the number of stages; writes nothing."""
    from stbench.sweep.monitor import count_states, describe
    from stbench.sweep.queue import initial_entries

    requested = [run.entry for run in runs]
    run_ids = {entry.run_id for entry in requested}
    entries = [entry for entry in initial_entries(output, requested) if entry.run_id in run_ids]
    for entry in entries:
        print_line(f"{entry.state:8}  {entry.run_id}  {entry.steps} steps  {describe(entry)}")
    stages = [stage for run in runs for stage in run.stages]
    print_line(
        f"{len(entries)} runs: {count_states(entries)}; "
        f"{len(stages)} stages, {len(set(stages))} of them different"
    )


# --- How they are made ---


def _execute(
    runs: Sequence[SweepRun],
    output: Path,
    executor: Executor,
    arguments: Sequence[str],
) -> list[JournalEntry]:
    """Make every run that is not finished; `arguments` are those of `stbench run` that all runs share.

    Raises:
        UserError: Another sweep is running in `output`, or an existing run has other evaluation settings.
        KeyboardInterrupt: After Ctrl-C or SIGTERM, when the running runs have saved or are left to Slurm.
    """
    from stbench.core.files import atomic_write
    from stbench.runs.folder import OutputFolder
    from stbench.sweep.executor import Job
    from stbench.sweep.monitor import make_monitor
    from stbench.sweep.queue import Sweep, lock_sweep
    from stbench.train.engine import check_evaluation

    # A finished run is not started again, so `run` would not report that its evaluation settings differ.
    folder = OutputFolder(output)
    for run in runs:
        run_folder = folder.run(run.entry.run_id)
        if run_folder.exists():
            check_evaluation(run_folder, run.prepared.spec)

    with lock_sweep(output), _signals_interrupt():
        jobs = []
        for run in runs:
            config = folder.run_config(run.entry.run_id)
            content = {**run.requested.values, "set": dict(run.requested.overrides)}
            atomic_write(config, json.dumps(content, indent=1) + "\n")
            jobs.append(Job(run.entry, ("run", "--config", str(config), *arguments), run.stages))
        with make_monitor(output) as monitor:
            return Sweep(output, jobs, executor=executor, monitor=monitor).run()


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and SIGINT, also where a shell's `&` made SIGINT ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_summary(entries: Sequence[JournalEntry], output: Path) -> bool:
    """Print the failed runs and what to do next; returns whether every run finished."""
    from stbench.runs.folder import OutputFolder

    failed = [entry for entry in entries if entry.state == "failed"]
    for entry in failed:
        log = OutputFolder(output).run_log(entry.run_id)
        print_line(f"failed: {entry.run_id}: {entry.error} (log: {log})")
    retry = "; rerun the same command to retry the failed runs" if failed else ""
    print_line(f"{len(entries) - len(failed)} finished, {len(failed)} failed{retry}")
    print_line(f"next: stbench compare {output}")
    return not failed
