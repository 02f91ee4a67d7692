"""Text, JSON and YAML are read as data, with limits."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from stbench.core.errors import UserError
from stbench.core.safe_load import MalformedError, parse_json, read_text
from stbench.core.safe_yaml import parse_yaml

YAML = """\
number: 1e-3
text: no
date: 2001-01-01
octal: 010
nothing:
base: &base {lr: 0.1, list: [1, -2.5, true]}
merged: {<<: *base, lr: 0.2}
"""
MALFORMED_YAML = {
    "object": (
        "!!python/object/apply:os.mkdir [hacked]",
        "line 1, column 1: tag '!!python/object/apply:os.mk",
    ),
    "name": ("a: !!python/name:os.system ''", "is not supported"),
    "own tag": ("%TAG ! tag:example,2000:\n---\na: !b 1", "is not supported"),
    "binary": ("a: !!binary eA==", "'!!binary' is not supported"),
    "set": ("a: !!set {x}", "'!!set' is not supported"),
    "ordered map": ("!!omap [a: 1]", "is not supported"),
    "timestamp": ("a: !!timestamp 2001-01-01", "'!!timestamp' is not supported"),
    "tag of another kind": ("a: !!map [1]", "'!!map' is not supported"),
    "bad integer": ("a: !!int x", "line 1, column 4: "),
    "alias bomb": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
        "with aliases expanded, found more",
    ),
    "bomb of merge keys": (
        "a0: &a0 {x: 1}\n"
        + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)),
        "with aliases expanded, found more",
    ),
    "endless list": ("&a [*a]", "expected at most 64 levels"),
    "endless mapping": ("&a {b: *a}", "expected at most 64 levels"),
    "deep list": ("[" * 200_000, "line 1, column 65: expected at most 64 levels"),
    "deep block": ("- " * 1000 + "x", "expected at most 64 levels"),
    "deep mapping": ("{a: " * 1000, "expected at most 64 levels"),
    "long": ("x" * 2_000_000, "expected at most 262144 characters, found 2000000"),
    "many": ("[" + "1," * 60_000 + "]", "expected at most 50000 values"),
    "twice": ("a: 1\na: 2", "line 2, column 1: key 'a' is given twice"),
    "number as key": ("1: 2", "line 1, column 1: expected text as a key, found '1'"),
    "list as key": ("? [1]\n: 2", "expected text as a key"),
    "not a number": ("a: .nan", "expected finite numbers"),
    "infinity": ("a: -.inf", "expected finite numbers"),
    "beyond float": ("a: 1e999", "expected finite numbers"),
    "beyond 64 bits": ("a: 18446744073709551616", "expected integers of at most 64 bits"),
    "thousands of digits": (f"a: {'9' * 10_000}", "expected integers of at most 64 bits"),
    "hexadecimal": (f"a: 0x{'f' * 10_000}", "expected integers of at most 64 bits"),
    "escaped NUL": ('a: "x\\0"', "found a NUL character"),
    "NUL": ("a: x\0", "unacceptable character"),
    "surrogate": ('a: "\\ud800"', "a lone surrogate"),
    "beyond Unicode": ('a: "\\UFFFFFFFF"', ""),
    "tab": ("a:\n\tb: 1", "line 2, column 1: "),
    "open quote": ("a: 'x", "found unexpected end of stream"),
    "two documents": ("--- 1\n--- 2", "line 2, column 1: but found another document"),
    "no such anchor": ("a: *b", "found undefined alias 'b'"),
    "merge of text": ("<<: x", "expected a mapping or a list of mappings after '<<'"),
    "not UTF-8": (b"a: \xff", "expected UTF-8, found byte 0xff at 3"),
    "UTF-16": ("a: 1".encode("utf-16"), "expected UTF-8"),
}
MALFORMED_JSON = {
    "empty": ("", "line 1, column 1: expecting value"),
    "cut": ('{"a": [1', "line 1, column 9: "),
    "deep list": ("[" * 1_000_000, "expected at most 64 levels"),
    "deep mapping": ('{"a":' * 100_000, "expected at most 64 levels"),
    "65 levels": ("[" * 65 + "]" * 65, "expected at most 64 levels"),
    "twice": ('{"a": 1, "b": 2, "a": 3}', "key 'a' is given twice"),
    "NaN": ("[NaN]", "expected finite numbers, found NaN"),
    "infinity": ("[-Infinity]", "expected finite numbers"),
    "beyond float": ("[1e999]", "expected finite numbers"),
    "beyond 64 bits": ("[-18446744073709551616]", "expected integers of at most 64 bits"),
    "thousands of digits": ("9" * 10_000, "expected integers of at most 64 bits"),
    "NUL": ('["\\u0000"]', "found a NUL character"),
    "surrogate": ('{"\\udc00": 1}', "a lone surrogate"),
    "not UTF-8": (b'["\xff"]', "expected UTF-8, found byte 0xff at 2"),
}


def test_yaml_is_read_by_the_core_schema() -> None:
    assert parse_yaml(YAML) == {
        "number": 0.001,
        "text": "no",
        "date": "2001-01-01",
        "octal": 10,
        "nothing": None,
        "base": {"lr": 0.1, "list": [1, -2.5, True]},
        "merged": {"lr": 0.2, "list": [1, -2.5, True]},
    }
    assert parse_yaml("") is None and parse_yaml("\ufeffa: 1") == {"a": 1}
    assert parse_yaml(b"a: 0x1F\nb: '3'\nc: '<<'\nd: 18446744073709551615") == {
        "a": 31,
        "b": "3",
        "c": "<<",
        "d": (1 << 64) - 1,
    }


@pytest.mark.parametrize("name", MALFORMED_YAML)
def test_malformed_yaml(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, message = MALFORMED_YAML[name]
    start = time.perf_counter()
    with pytest.raises(MalformedError) as error:
        parse_yaml(text)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 200
    assert time.perf_counter() - start < 20 and list(tmp_path.iterdir()) == []


def test_json_is_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, 2.5, null, true, "\\ud83d\\ude00"]}') == {
        "a": [1, 2.5, None, True, "\U0001f600"]
    }
    assert str(parse_json("[NaN, -Infinity]", allow_nan=True)) == "[nan, -inf]"
    assert parse_json("[" * 64 + "]" * 64) is not None


@pytest.mark.parametrize("name", MALFORMED_JSON)
def test_malformed_json(name: str) -> None:
    text, message = MALFORMED_JSON[name]
    with pytest.raises(MalformedError) as error:
        parse_json(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_one_key_twice_among_many_is_found_in_linear_time() -> None:
    text = "{" + ",".join(f'"{i}": 0' for i in range(200_000)) + ',"199999": 1}'
    with pytest.raises(MalformedError, match="key '199999' is given twice"):
        parse_json(text)


def test_a_malformed_text_is_a_mistake_of_the_user_and_a_value_error() -> None:
    assert issubclass(MalformedError, UserError) and issubclass(MalformedError, ValueError)


def test_only_regular_files_of_limited_size_are_read(tmp_path: Path) -> None:
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_bytes(b"\xef\xbb\xbftext")
    os.mkfifo(pipe)
    assert read_text(file) == read_text(file, limit=7) == "text"
    wrong: list[tuple[Any, Any, str]] = [
        (file, 6, "expected at most 6 bytes, found 7"),
        (pipe, None, "expected a regular file"),
        (tmp_path, None, "expected a regular file"),
        (Path("/dev/zero"), None, "expected a regular file"),
        (tmp_path / "a\0b", None, "is not a path"),
    ]
    for path, limit, message in wrong:
        with pytest.raises(MalformedError, match=message):
            read_text(path, limit=limit)
    with pytest.raises(OSError):
        read_text(tmp_path / "none")
