"""Read YAML as data, with limits: no tag creates an object, no alias bomb is expanded.

YAML follows the core schema of YAML 1.2: `no` is text and `1e-3` is a number. Anchors, aliases and merge keys
(`<<`) work. See `stbench.core.safe_load` for what else is refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from stbench.core.safe_load import (
    MAX_DEPTH,
    MalformedError,
    check_texts,
    decode,
    parse_finite,
    parse_integer,
    shorten,
)

MAX_NODES = 50_000
"""Keys and values, counted each time an alias repeats them."""
MAX_LENGTH = 1 << 18
"""Characters of a text; PyYAML needs seconds for as many."""

TAG = "tag:yaml.org,2002:"


class _CoreSchema(yaml.SafeLoader):
    """A loader that recognises the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _kind, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z", list("-+0123456789")),
    ("float", r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?)\Z", list("-+.0123456789")),
    ("float", r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z", list("-+.")),
):
    _CoreSchema.add_implicit_resolver(TAG + _kind, re.compile(_pattern), _first)


def parse_yaml(text: str | bytes, *, max_depth: int = MAX_DEPTH, max_nodes: int = MAX_NODES) -> Any:
    """Parse one YAML document; an empty one is None.

    Raises:
        MalformedError: If the text is malformed or contains something that is refused.
    """
    text = decode(text)
    if len(text) > MAX_LENGTH:
        raise MalformedError(f"expected at most {MAX_LENGTH} characters, found {len(text)}")
    try:
        _check_events(text, max_depth=max_depth, max_nodes=max_nodes)  # before anything is built
        root = yaml.compose(text, _CoreSchema)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise MalformedError(f"{place}{error.problem or error.context}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise MalformedError(" ".join(str(error).split())) from None
    except (ValueError, OverflowError) as error:  # PyYAML passes on those of an escape outside of Unicode
        raise error if isinstance(error, MalformedError) else MalformedError(str(error)) from None
    value = None if root is None else _Builder(max_depth, max_nodes).build(root, 1)
    check_texts(value)
    return value


def _check_events(text: str, *, max_depth: int, max_nodes: int) -> None:
    depth = nodes = 0
    for event in yaml.parse(text, _CoreSchema):
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.NodeEvent):
            nodes += 1
            depth += isinstance(event, yaml.CollectionStartEvent)
            if depth > max_depth:
                raise _at(event, f"expected at most {max_depth} levels, found more")
            if nodes > max_nodes:
                raise _at(event, f"expected at most {max_nodes} values, found more")


class _Builder:
    """Builds plain values from nodes. Counts the nodes while it does."""

    def __init__(self, max_depth: int, max_nodes: int) -> None:
        self.max_depth, self.max_nodes, self.nodes = max_depth, max_nodes, 0

    def build(self, node: yaml.Node, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > self.max_nodes:
            raise _at(node, f"expected at most {self.max_nodes} values with aliases expanded, found more")
        if depth > self.max_depth + 1:  # a list that contains itself
            raise _at(node, f"expected at most {self.max_depth} levels with aliases expanded, found more")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        is_list = isinstance(node, yaml.SequenceNode)
        if node.tag != f"{TAG}seq" if is_list else node.tag != f"{TAG}map":
            raise _unsupported_tag(node)
        if is_list:
            return [self.build(item, depth + 1) for item in node.value]
        return self._mapping(node, depth)

    def _mapping(self, node: yaml.Node, depth: int) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.build(key_node, depth + 1)
            value = self.build(value_node, depth + 1)
            if key == "<<" and key_node.style is None:
                for mapping in value if isinstance(value, list) else [value]:
                    if not isinstance(mapping, dict):
                        raise _at(value_node, "expected a mapping or a list of mappings after '<<'")
                    merged = {**mapping, **merged}
            elif not isinstance(key, str):
                raise _at(key_node, f"expected text as a key, found {shorten(str(key))}; put it in quotes")
            elif key in own:
                raise _at(key_node, f"key {shorten(key)} is given twice in one mapping")
            else:
                own[key] = value
        return {**merged, **own}


def _scalar(node: yaml.ScalarNode) -> Any:
    kind, text = node.tag.removeprefix(TAG), node.value
    try:
        if kind == "str":
            return text
        if kind == "null" and text.lower() in ("", "~", "null"):
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind == "int":
            return parse_integer(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if kind == "float":
            return parse_finite(text.replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError as error:
        raise _at(node, str(error)) from None
    raise _unsupported_tag(node)


def _unsupported_tag(node: yaml.Node) -> MalformedError:
    tag = node.tag.replace(TAG, "!!")
    return _at(node, f"tag {shorten(tag)} is not supported; write plain text, numbers, lists and mappings")


def _at(item: yaml.Node | yaml.Event, message: str) -> MalformedError:
    return MalformedError(f"line {item.start_mark.line + 1}, column {item.start_mark.column + 1}: {message}")
