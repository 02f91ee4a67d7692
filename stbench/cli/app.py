"""The `stbench` command line: the Typer app and its entry point."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from stbench import __version__
from stbench.cli import bench, compare, data, evaluate, export, inspect, report, run, sample, show, sweep
from stbench.cli import list as list_registry
from stbench.cli.errors import (
    BROKEN_PIPE,
    INTERRUPTED,
    LOST_RANK,
    check_arguments,
    explain,
    one_line,
    place_in_plugin,
    stopped,
)
from stbench.cli.ranks import reports

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train diffusion transformers under feature-supervision recipes; compare how fast they converge.",
)
app.command()(run.run)
app.command()(sweep.sweep)
app.command()(compare.compare)
app.command()(report.report)
app.command()(show.show)
app.command(name="list")(list_registry.list_registry)
app.command()(sample.sample)
app.command()(evaluate.evaluate)
app.command()(inspect.inspect)
app.command()(export.export)
app.command()(bench.bench)
app.add_typer(data.app, name="data")


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


def main() -> None:
    """Run the command line.

    A mistake of the user is one line and exit code 2, an unexpected exception one line and exit code 70, with
    its traceback in a file; --debug prints the traceback of either.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    message = ""
    raised: BaseException | None = None
    try:
        check_arguments(arguments)
        code = app(args=arguments or ["--help"], prog_name="stbench", standalone_mode=False) or 0
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer returns it for a KeyboardInterrupt
            message = stopped(arguments) if reports(KeyboardInterrupt()) else ""
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and place_in_plugin(error) is None:
            raise  # of shell completion
        raised = error
        code, message = explain(error, arguments, debug=debug)
        if not reports(error):
            message = ""
        elif debug:
            traceback.print_exc()
    if message:
        typer.echo(one_line(message), err=True)
    if code == LOST_RANK and raised is not None:
        # Threads may still wait for the lost rank, and destroying what they belong to aborts the process. So
        # `raised` keeps it alive, and the interpreter is not shut down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code == BROKEN_PIPE:  # nothing can be printed, not even when Python flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
