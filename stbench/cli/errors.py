"""What the command line says about an exception: one line and an exit code."""

from __future__ import annotations

import errno
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from stbench.cli.ranks import describe, is_lost_rank
from stbench.core.disk import DISK_FULL
from stbench.core.errors import UserError
from stbench.core.safe_load import shorten, shown
from stbench.core.text import visible

USER_ERROR, INTERNAL_ERROR, LOST_RANK, INTERRUPTED, BROKEN_PIPE = 2, 70, 75, 130, 141
"""Exit codes: a mistake that the user can fix; an unexpected exception (EX_SOFTWARE of sysexits.h); a rank
that died or did not respond (EX_TEMPFAIL); Ctrl-C; standard output that was closed, as by `head`."""

click_exceptions = sys.modules[typer.BadParameter.__module__]
"""`click.exceptions`, or the copy of it that newer versions of typer bundle."""

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""Parts of the messages of torch's allocators, whose exceptions are RuntimeErrors."""

REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EMFILE: "raise the limit on open files with `ulimit -n`",
    errno.ENAMETOOLONG: "use a shorter path",
    **dict.fromkeys(DISK_FULL, "free some space and rerun the same command"),
}
"""What to do about an error of the operating system, by its number."""


def explain(error: BaseException, arguments: Sequence[str], *, debug: bool) -> tuple[int, str]:
    """Exit code and message of an exception that ended a command.

    An exception that is not a known kind of mistake is an internal error: its traceback is written to a file,
    which the message names.

    Args:
        error: The exception.
        arguments: The command line, without `stbench` and `--debug`.
        debug: Whether the traceback is printed, so that no file is needed if none can be written.
    """
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return INTERRUPTED, stopped(arguments)
    if is_lost_rank(error):
        return LOST_RANK, f"error: a rank was lost: {describe(error)}; rerun the same command to resume"
    if isinstance(error, UserError):
        return USER_ERROR, f"error: {error}"
    if isinstance(error, click_exceptions.ClickException):
        return USER_ERROR, _explain_usage(error)
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE, ""
    if _is_out_of_memory(error):
        return USER_ERROR, (
            f"error: out of memory: {str(error) or 'an allocation failed'}; use a smaller batch, fewer "
            f"samples or a smaller network"
        )
    if (place := place_in_plugin(error)) is not None:
        details = _details(error, arguments, debug)
        return USER_ERROR, f"error: plug-in {place} failed: {type(error).__name__}: {error}; {details}"
    if isinstance(error, OSError) and error.errno is not None:
        names = [str(name) for name in (error.filename, error.filename2) if name]
        where = f": {' -> '.join(names)}" if names else ""
        remedy = REMEDIES.get(error.errno, "choose another path")
        return USER_ERROR, f"error: {error.strerror or error}{where}; {remedy}"
    return (
        INTERNAL_ERROR,
        f"internal error: {type(error).__name__}: {error}; {_details(error, arguments, debug)}",
    )


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise UserError for an argument that no command can use: an empty one, or one that is not text."""
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if not argument:
            place = f"after {shorten(arguments[index - 1])}" if index else "after stbench"
            raise UserError(f"expected a value {place}, got an empty one; give it or leave the option out")
        if option.startswith("--") and equals and not value:
            raise UserError(f"expected a value after {shorten(argument)}, got none; give it or leave it out")
        if "\0" in argument:
            raise UserError(f"expected an argument without a NUL character, got {shown(argument)}; remove it")
        if not argument.isascii() and _has_surrogate(argument):
            raise UserError(f"expected an argument in UTF-8, got {shown(argument)}; rename the file")


def _has_surrogate(text: str) -> bool:
    """Whether the text has a lone surrogate, by which Python represents a byte that is not UTF-8."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def stopped(arguments: Sequence[str]) -> str:
    """The message after Ctrl-C, with the command that resumes."""
    return f"stopped; rerun the same command to resume: {shlex.join(['stbench', *arguments])}"


def one_line(message: str) -> str:
    """A message in one line of printable characters; others are shown as escape sequences."""
    return visible(" ".join(message.split()))


def _explain_usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "stbench"
    message = error.format_message().rstrip(".")
    if not message or "NoArgs" in type(error).__name__:  # its message is the help page
        message = f"`{command}` needs a command or an argument"
    return f"error: {message}; see `{command} --help`"


def place_in_plugin(error: BaseException) -> str | None:
    """File and line of the innermost frame of a plug-in in the traceback, if there is one."""
    registry = sys.modules.get("stbench.core.registry")
    modules = registry.plugin_modules if registry is not None else ()
    places = [
        f"{frame.f_code.co_filename} line {line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") in modules
    ]
    return places[-1] if places else None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in message for part in OUT_OF_MEMORY)


def _details(error: BaseException, arguments: Sequence[str], debug: bool) -> str:
    """Write the traceback to a temporary file and say where it is."""
    command = one_line(shlex.join(["stbench", *arguments]))
    text = f"{command}\n\n{''.join(traceback.format_exception(error))}"
    try:
        descriptor, name = tempfile.mkstemp(prefix="stbench-error-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return "details above" if debug else "rerun with --debug for details"
    return f"details in {name}"
