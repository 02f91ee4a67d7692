"""The `stbench` command line: the Typer app, its entry point, and one-line error messages."""

from __future__ import annotations

import shlex
import sys
import traceback
from typing import Annotated

import typer

from stbench import __version__
from stbench.cli import compare, data, evaluate, export, run, sample, show, sweep
from stbench.cli import list as list_registry
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
app.command()(run.run)
app.command()(sweep.sweep)
app.command()(compare.compare)
app.command()(show.show)
app.command(name="list")(list_registry.list_registry)
app.command()(sample.sample)
app.command()(evaluate.evaluate)
app.command()(export.export)
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
