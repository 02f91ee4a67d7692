"""The `stbench` command line: the Typer app, its entry point, and one-line error messages."""

from __future__ import annotations

import shlex
import sys
import traceback
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from stbench import __version__
from stbench.cli import compare, sample, show
from stbench.cli import data_options as cli_data
from stbench.cli import samples_options as cli_samples
from stbench.cli.completion import complete
from stbench.cli.export_options import export
from stbench.cli.options import RUNS, Device, KeepChoice, Original, Output, Plugins
from stbench.cli.sweep_options import sweep
from stbench.core.errors import UserError

USER_ERROR, INTERRUPTED = 2, 130
"""Exit codes: a mistake that the user can fix, and Ctrl-C."""

click_exceptions = sys.modules[typer.BadParameter.__module__]
"""`click.exceptions`, or the copy of it that newer versions of typer bundle."""

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train diffusion transformers under feature-supervision recipes; compare how fast they converge.",
)

app.add_typer(cli_data.app, name="data")


class Kind(str, Enum):
    """What `list` lists."""

    backbones = "backbones"
    recipes = "recipes"
    datasets = "datasets"
    objectives = "objectives"
    samplers = "samplers"
    metrics = "metrics"


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"stbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Declares --debug for --help; main() reads it, because errors can occur before this function runs."""


@app.command()
def run(
    backbone: Annotated[
        str | None,
        typer.Option(help="Family, or family-size such as sit-b/2.", autocompletion=complete("backbone")),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Supervision recipe.", autocompletion=complete("recipe"))
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Data set; digits is embedded.", autocompletion=complete("dataset"))
    ] = None,
    data: Annotated[str | None, typer.Option(help="Prepared data, REPA's layout, or a few images.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="Corruption and target; default: the backbone's published one.",
            autocompletion=complete("objective"),
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of the last stage.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random in training.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, tf32 or bf16; default: bf16 on a GPU that has it, else fp32.")
    ] = None,
    eval_guidance: Annotated[
        str | None, typer.Option(help="Guidance scales to evaluate at, such as 1.0,1.5,2.0.")
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Official checkpoint that the first stage starts from.")
    ] = None,
    original: Original = None,
    init_weights: Annotated[
        str | None, typer.Option(help="Which of its weights: ema (default) or raw.")
    ] = None,
    overrides: Annotated[
        list[str],
        typer.Option(
            "--set",
            help="Any option: train.lr=1e-3, recipe.guidance=5, backbone.depth=4, eval.seed=1; repeatable.",
        ),
    ] = [],  # noqa: B006
    config: Annotated[
        Path | None,
        typer.Option(help="YAML, JSON or Python file with the options above; the command line wins."),
    ] = None,
    plugin: Plugins = [],  # noqa: B006
    device: Device = "auto",
    output: Output = RUNS,
    keep: Annotated[
        KeepChoice, typer.Option(help="EMA weights to keep: of all evaluation points, or the last.")
    ] = KeepChoice.all,
    reuse: Annotated[
        bool,
        typer.Option(
            "--reuse/--no-reuse", help="Take a stage that an equal run has finished; its cost still counts."
        ),
    ] = True,
    track: Annotated[
        bool,
        typer.Option("--tensorboard", help="Log losses and metrics to TensorBoard under the run folder."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Train a backbone under a recipe and evaluate it along the way; the same command resumes."""

    given = {
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
    from stbench.cli import run as commands

    request = commands.Invocation(
        given={name: value for name, value in given.items() if value is not None},
        overrides=overrides,
        config=config,
        plugins=plugin,
        device=device,
        output=output,
        keep=keep.value,
        reuse=reuse,
        track=track,
    )
    commands.dry_run(request) if dry_run else commands.run(request)


app.command()(sweep)
app.command()(export)


app.command()(compare.compare)


@app.command(name="list")
def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """List what is registered, with parameter counts, costs, options and defaults."""
    from stbench.cli import list as listing

    listing.list_registered(kind.value, as_json, plugin)


app.command()(show.show)
app.command()(sample.sample)
app.command()(cli_samples.evaluate)


def main() -> None:
    """Run the command line. An error is one line and exit code 2; --debug adds its traceback."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    stopped = f"stopped; rerun the same command to resume: {shlex.join(['stbench', *arguments])}"
    try:
        code = app(args=arguments or ["--help"], prog_name="stbench", standalone_mode=False)
        if code == INTERRUPTED:  # typer returns it for a KeyboardInterrupt
            _report(stopped, debug)
    except UserError as error:
        code = USER_ERROR
        _report(f"error: {error}", debug)
    except click_exceptions.UsageError as error:
        code = USER_ERROR
        command = error.ctx.command_path if error.ctx else "stbench"
        _report(f"error: {error.format_message().rstrip('.')}; see `{command} --help`", debug)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
        _report(stopped, debug)
    except OSError as error:
        code = USER_ERROR
        where = f": {error.filename}" if error.filename else ""
        _report(f"error: {error.strerror or error}{where}; choose another path", debug)
    sys.exit(code or 0)


def _report(message: str, debug: bool) -> None:
    """Print a message in one line on standard error, below the traceback with --debug."""
    if debug:
        traceback.print_exc()
    typer.echo(" ".join(message.split()), err=True)
