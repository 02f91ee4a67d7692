"""One line and an exit code for whatever ends a command."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
import typer

from stbench.cli import app as cli
from stbench.cli.errors import BROKEN_PIPE, INTERNAL_ERROR, INTERRUPTED, USER_ERROR, explain, one_line
from stbench.core.errors import UserError
from tests.conftest import Command


@pytest.fixture()
def broken(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """A command line with a command `break`, which raises the last item of this list."""
    errors: list[BaseException] = []
    app = typer.Typer()

    @app.command("break")
    def _break() -> None:
        raise errors[-1]

    @app.callback()
    def _root() -> None:
        pass

    monkeypatch.setattr(cli, "app", app)
    return errors


def test_an_unexpected_exception_is_one_line_with_its_traceback_in_a_file(
    stbench: Command, broken: list[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    broken.append(KeyError("two\nlines"))
    code, out, err = stbench("break")
    assert code == INTERNAL_ERROR == 70 and out == "" and err.count("\n") == 1
    found = re.fullmatch(r"internal error: KeyError: 'two\\nlines'; details in (\S+)\n", err)
    assert found, err
    details = Path(found[1]).read_text()
    assert details.startswith("stbench break\n") and "raise errors[-1]" in details


def test_debug_prints_the_traceback_of_an_internal_error(
    stbench: Command, broken: list[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    broken.append(ValueError("odd"))
    code, _, err = stbench("break", "--debug")
    assert code == INTERNAL_ERROR
    assert "raise errors[-1]" in err and err.splitlines()[-1].startswith("internal error: ValueError: odd")


def test_an_internal_error_is_reported_where_no_file_can_be_written(
    stbench: Command, broken: list[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken.append(ValueError("odd"))
    with monkeypatch.context() as patched:  # pytest's capture creates temporary files, too
        patched.setattr("tempfile.tempdir", str(tmp_path / "gone"))
        code, _, err = stbench("break")
    assert (code, err) == (70, "internal error: ValueError: odd; rerun with --debug for details\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("x"), USER_ERROR, "error: x"),
        (typer.BadParameter("y."), USER_ERROR, "error: Invalid value: y; see `stbench --help`"),
        (KeyboardInterrupt(), INTERRUPTED, "stopped; rerun the same command to resume: stbench run 'a b'"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), BROKEN_PIPE, ""),
        (MemoryError(), USER_ERROR, "error: out of memory: an allocation failed; use a smaller batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), USER_ERROR, "error: out of memory: "),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), USER_ERROR, "error: out of memory: "),
        (FileNotFoundError(errno.ENOENT, "No such file", "f"), USER_ERROR, "error: No such file: f; check"),
        (OSError(errno.ENOSPC, "No space left", "f"), USER_ERROR, "No space left: f; free some space"),
        (OSError(errno.ELOOP, "Too many links", "f"), USER_ERROR, "Too many links: f; choose another path"),
        (OSError("image file is truncated"), INTERNAL_ERROR, "internal error: OSError: image file is tr"),
        (RecursionError("too deep"), INTERNAL_ERROR, "internal error: RecursionError: too deep; details in"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_exit_code_and_message(
    error: BaseException, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found, line = explain(error, ["run", "a b"], debug=False)
    assert found == code and message in line


def test_characters_that_do_not_print_are_escaped() -> None:
    assert one_line("a\nb\x1b[31m \u202e\ud800\x00é") == r"a b\x1b[31m \u202e\ud800\x00é"


def test_a_command_without_arguments_names_what_is_missing(stbench: Command) -> None:
    code, _, err = stbench("data")
    assert code == 2 and err.count("\n") <= 1 and "error: ;" not in err
