"""Read text and JSON as data, with limits. `stbench.core.safe_yaml` does the same for YAML.

Every file that somebody else may have written is read here: configs, suites, class maps, records. Refused are
files that are not regular, text that is not UTF-8, deep nesting, duplicate keys, numbers that are not finite
or do not fit 64 bits, and the characters NUL and lone surrogates, which no path or terminal accepts. A byte
order mark is skipped. Imports only the standard library.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stbench.core.errors import UserError

MAX_DEPTH = 64
"""Levels of lists and mappings in one another."""
MAX_INTEGER = 1 << 64
"""Integers must be smaller in magnitude."""


class MalformedError(UserError, ValueError):
    """Text that cannot be read. The message is the reason in one line, without the name of the file.

    It is a ValueError, too, so that code which handles the errors of `json.loads` handles it.
    """


# --- Files ---


def read_text(path: Path, *, limit: int | None = None) -> str:
    """The text of a regular file, decoded as UTF-8.

    Args:
        path: The file. A folder, device or named pipe is refused, because reading it could last forever.
        limit: Maximum size in bytes.

    Raises:
        MalformedError: If it is not a regular file, is larger than `limit`, or is not UTF-8.
        OSError: If it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe must not wait for its writer
    except ValueError as error:  # a NUL character
        raise MalformedError(f"{str(path)!r} is not a path: {error}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MalformedError("expected a regular file, found a folder, a device or a pipe")
        if limit is not None and status.st_size > limit:
            raise MalformedError(f"expected at most {limit} bytes, found {status.st_size}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return decode(file.read())
    finally:
        os.close(descriptor)


def decode(text: str | bytes) -> str:
    """Decode UTF-8 and drop a byte order mark. Raises MalformedError."""
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise MalformedError(
                f"expected UTF-8, found byte 0x{text[error.start]:02x} at {error.start}"
            ) from None
    return text.removeprefix("\ufeff")


# --- JSON ---


def parse_json(text: str | bytes, *, allow_nan: bool = False, max_depth: int = MAX_DEPTH) -> Any:
    """Parse a JSON text. `allow_nan` accepts NaN and Infinity, as Python writes them.

    Raises:
        MalformedError: If the text is malformed or contains something that is refused.
    """
    text = decode(text)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=float if allow_nan else _refuse_constant,
            parse_float=float if allow_nan else parse_finite,
            parse_int=parse_integer,
        )
    except json.JSONDecodeError as error:
        raise MalformedError(f"line {error.lineno}, column {error.colno}: {error.msg.lower()}") from None
    except RecursionError:
        raise MalformedError(f"expected at most {max_depth} levels, found more") from None
    if _may_contain_refused_text(text):
        check_texts(value)
    if text.count("[") + text.count("{") > max_depth and _depth(value, max_depth) > max_depth:
        raise MalformedError(f"expected at most {max_depth} levels, found more")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise MalformedError(f"key {shorten(twice)} is given twice in one mapping")
    return mapping


def _refuse_constant(text: str) -> float:
    raise MalformedError(f"expected finite numbers, found {text}")


def parse_finite(text: str) -> float:
    """A finite number from its text. Raises MalformedError."""
    value = float(text)
    if not math.isfinite(value):
        raise MalformedError(f"expected finite numbers, found {shorten(text)}")
    return value


def parse_integer(text: str, base: int = 10) -> int:
    """An integer of at most 64 bits from its text. Raises MalformedError."""
    # Python refuses integers of thousands of digits with an error of its own.
    value = int(text, base) if len(text) <= 100 else MAX_INTEGER
    if abs(value) >= MAX_INTEGER:
        raise MalformedError(f"expected integers of at most 64 bits, found {shorten(text)}")
    return value


def _may_contain_refused_text(text: str) -> bool:
    return re.search(r"\\u(?:0000|[dD][89a-fA-F])|[\ud800-\udfff]", text) is not None


def check_texts(value: Any) -> None:
    """Refuse NUL characters and lone surrogates in the strings of a value."""
    for item in _items(value):
        if isinstance(item, str) and re.search("[\0\ud800-\udfff]", item):
            raise MalformedError(f"found a NUL character or a lone surrogate in the text {shorten(item)}")


def _items(value: Any) -> Iterator[Any]:
    """Every key and value of nested lists and mappings, without recursion."""
    pending = [value]
    while pending:
        item = pending.pop()
        yield item
        if isinstance(item, dict):
            pending += item
            pending += item.values()
        elif isinstance(item, list):
            pending += item


def _depth(value: Any, limit: int) -> int:
    """Levels of nested lists and mappings, counted to `limit` + 1."""
    level, depth = [value], 0
    while depth <= limit:
        level = [item for item in level if isinstance(item, (dict, list))]
        if not level:
            break
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def shorten(text: str) -> str:
    """The text in quotes, cut to 40 characters, for a message."""
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def shown(value: object) -> str:
    """A value as Python writes it, cut to 80 characters, for a message."""
    try:
        text = repr(value)
    except ValueError:  # an integer beyond Python's limit of digits
        return "an integer of thousands of digits"
    except RecursionError:
        return "a value that is nested too deeply"
    return text if len(text) <= 80 else f"{text[:77]}..."
