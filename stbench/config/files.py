"""Config and suite files: YAML and JSON are data; a Python file named on the command line is executed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stbench.core.errors import UserError
from stbench.core.files import absolute_path
from stbench.core.safe_load import MalformedError, check_texts, parse_json, read_text, shorten, shown
from stbench.core.safe_yaml import parse_yaml

PARSERS: Mapping[str, Callable[[str], Any]] = {".yaml": parse_yaml, ".yml": parse_yaml, ".json": parse_json}
"""Parsers of data files by the end of the file's name."""
MAX_BYTES = 1 << 18
"""Size of one data file."""
MAX_FILES = 32
"""Data files that one config may be merged from."""
MAX_DOTS = 8
"""Dots in the name of an option."""
BASE, DELETE = "_base_", "_delete_"
"""Keys of the files that a file extends, and of a mapping that replaces the one it would be merged into."""


def read_file(file: Path, what: str, option: str) -> dict[str, Any]:
    """Read a YAML, JSON or Python file. `what` and `option` name it in error messages.

    `_base_` names one or more files that the file extends, relative to its folder. Those of a data file must
    be data files within the folder of `file`. Mappings are merged key by key, and other values are replaced;
    a mapping with `_delete_: true` is not merged.

    Raises:
        UserError: If the file is missing or malformed.
    """
    if not file.is_file():
        raise UserError(f"{what} file not found: {file}; give a .yaml, .json or .py file after {option}")
    if file.suffix == ".py":
        return _run_python(file, what)
    content = _Reader(what, absolute_path(file.parent)).read(file, ())
    return _strip_delete(content)


class _Reader:
    """Reads a data file and the files that it extends."""

    def __init__(self, what: str, root: Path) -> None:
        self.what, self.root, self.files = what, root, 0

    def read(self, file: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
        """The content of a file that the files of `chain` extend, one the other."""
        chain = (*chain, absolute_path(file))
        content = self._parse(file)
        bases = content.pop(BASE, [])
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list) or not all(isinstance(base, str) and base for base in bases):
            raise self._error(file, f"'{BASE}' must be a file name or a list of them, got {shown(bases)}")
        merged: dict[str, Any] = {}
        for base in bases:
            found = self.read(self._base_file(file, base, chain), chain)
            twice = sorted(merged.keys() & found.keys())
            if twice:
                raise self._error(file, f"two files of '{BASE}' contain the key '{twice[0]}'; remove one")
            merged |= found
        try:
            return _merge(_nest_set(content), merged)
        except MalformedError as error:
            raise self._error(file, str(error)) from None

    def _parse(self, file: Path) -> dict[str, Any]:
        self.files += 1
        if self.files > MAX_FILES:
            raise self._error(file, f"a {self.what} can be merged from at most {MAX_FILES} files")
        if file.suffix not in PARSERS:
            raise self._error(file, f"expected a name that ends in {', '.join(PARSERS)}")
        try:
            content = PARSERS[file.suffix](read_text(file, limit=MAX_BYTES))
        except MalformedError as error:
            raise self._error(file, str(error)) from None
        except OSError as error:
            raise self._error(file, str(error.strerror)) from None
        if content is None:
            raise self._error(file, "the file is empty; expected options such as 'recipe: vanilla'")
        if not isinstance(content, dict):
            kind = "a list" if isinstance(content, list) else repr(content)[:40]
            raise self._error(file, f"expected a mapping of options, found {kind}")
        return content

    def _base_file(self, file: Path, base: str, chain: tuple[Path, ...]) -> Path:
        path = file.parent / base
        target = absolute_path(path)
        if not target.is_relative_to(self.root):
            raise self._error(file, f"'{BASE}: {base}' is outside of {self.root}; move it there")
        if not target.is_file():
            raise self._error(file, f"'{BASE}: {base}' is not a file; expected a path relative to this file")
        if target in chain:
            names = " -> ".join(each.name for each in (*chain[chain.index(target) :], target))
            raise self._error(file, f"'{BASE}' is a cycle: {names}; remove one of them")
        return path

    def _error(self, file: Path, message: str) -> UserError:
        return UserError(f"cannot read {self.what} file {file}: {message}")


# --- Merging ---


def _merge(child: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `child`: mappings are merged, unless they contain `_delete_: true`."""
    merged = dict(base)
    for key, value in child.items():
        if not isinstance(value, dict) or key not in base or value.get(DELETE) is True:
            merged[key] = value
        elif isinstance(base[key], dict):
            merged[key] = _merge(value, base[key])
        else:
            raise MalformedError(
                f"'{key}' is a mapping here and {shown(base[key])} in the file of '{BASE}'; "
                f"add '{DELETE}: true' to replace it"
            )
    return merged


def _nest_set(content: Any) -> Any:
    """Replace the dotted names of every `set` by mappings, so that they merge with mappings."""
    if isinstance(content, list):
        return [_nest_set(item) for item in content]
    if not isinstance(content, dict):
        return content
    nested = {key: _nest_set(value) for key, value in content.items()}
    if isinstance(nested.get("set"), dict):
        nested["set"] = _nested(nested["set"])
    return nested


def _nested(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in options.items():
        if name.count(".") > MAX_DOTS:
            raise MalformedError(f"unknown option {shorten(name)}; expected a name such as train.lr")
        first, dot, rest = name.partition(".")
        branch = {rest: value} if dot else value
        if isinstance(branch, dict):
            branch = _nested(branch, f"{prefix}{first}.")
        if first not in tree:
            tree[first] = branch
        elif isinstance(branch, dict) and isinstance(tree[first], dict):
            tree[first] = _joined(tree[first], branch, f"{prefix}{first}")
        else:
            raise MalformedError(f"option '{prefix}{first}' is given twice")
    return tree


def _joined(one: Mapping[str, Any], other: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Two parts of one mapping; a value may be in one of them only."""
    joined = dict(one)
    for key, value in other.items():
        if key not in joined:
            joined[key] = value
        elif isinstance(joined[key], dict) and isinstance(value, dict):
            joined[key] = _joined(joined[key], value, f"{place}.{key}")
        else:
            raise MalformedError(f"option '{place}.{key}' is given twice")
    return joined


def _strip_delete(content: Any) -> Any:
    if isinstance(content, list):
        return [_strip_delete(item) for item in content]
    if isinstance(content, dict):
        return {key: _strip_delete(value) for key, value in content.items() if key != DELETE}
    return content


# --- Python files ---


def _run_python(file: Path, what: str) -> dict[str, Any]:
    """Execute a Python config with mmengine; its variables are the options."""
    from mmengine.config import Config  # imports yapf and numpy, so only when such a file is given
    from mmengine.fileio import BaseFileHandler, register_handler

    @register_handler(["yaml", "yml"])
    class _SafeHandler(BaseFileHandler):
        """Reads the YAML files that a Python config extends; mmengine's handler executes their tags."""

        def load_from_fileobj(self, file: Any, **options: Any) -> Any:
            return parse_yaml(file.read())

        def dump_to_fileobj(self, obj: Any, file: Any, **options: Any) -> None:
            raise NotImplementedError

        def dump_to_str(self, obj: Any, **options: Any) -> str:
            raise NotImplementedError

    try:
        content = Config.fromfile(
            str(file), import_custom_modules=False, use_environment_variables=False
        ).to_dict()
        return {str(name): _plain(value, str(name)) for name, value in content.items()}
    except (Exception, SystemExit) as error:  # the file may raise anything
        raise UserError(f"cannot read {what} file {file}: {type(error).__name__}: {error}") from error


def _plain(value: Any, place: str) -> Any:
    """A value of a Python config as the plain data that a YAML file could contain."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, place) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        check_texts(value)
        return value
    raise MalformedError(f"'{place}' must be plain data, got {type(value).__name__}")
