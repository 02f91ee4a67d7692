"""The JSON output conforms to docs/leaderboard.schema.json, which names every field."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from stbench.cli.compare import read_leaderboard
from stbench.compare import leaderboard as data
from stbench.compare.build import build_leaderboard
from stbench.compare.published import read_published
from stbench.compare.question import Amount, Question
from stbench.compare.writers import LEADERBOARD_SCHEMA, render
from tests.fake_runs import make_digits_records, make_entry, make_record, make_seeds

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "leaderboard.schema.json").read_text())
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
KEYWORDS = {"type", "properties", "required", "additionalProperties", "items", "minItems", "maxItems"}
KEYWORDS |= {"anyOf", "enum", "const", "$ref", "description", "title", "$schema", "$defs"}


def errors(value: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """Return what is wrong with a value, for the keywords of JSON Schema that the file uses."""
    assert schema.keys() <= KEYWORDS, f"unknown keyword in {schema.keys()}"
    if "$ref" in schema:
        return errors(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], where)
    if "anyOf" in schema:
        found = [errors(value, option, where) for option in schema["anyOf"]]
        return [] if [] in found else [f"{where}: {value!r} fits none of {schema['anyOf']}"]
    wrong = []
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        wrong.append(f"{where}: {value!r}")
    if "type" in schema:
        fits = isinstance(value, TYPES[schema["type"]]) and (
            type(value) is not bool or schema["type"] == "boolean"
        )
        if not fits:
            return [f"{where}: {value!r} is not of type {schema['type']}"]
    if isinstance(value, dict):
        known = schema.get("properties", {})
        wrong += [f"{where}: {name} is missing" for name in schema.get("required", ()) if name not in value]
        if schema.get("additionalProperties") is False:
            wrong += [f"{where}: {name} is unknown" for name in value if name not in known]
        for name, item in value.items():
            wrong += errors(item, known.get(name, {}), f"{where}/{name}")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
            wrong.append(f"{where}: {len(value)} items")
        for i, item in enumerate(value):
            wrong += errors(item, schema.get("items", {}), f"{where}/{i}")
    return wrong


def test_committed_leaderboards_conform() -> None:
    for name in ("digits", "digits-published"):
        content = json.loads((ROOT / "results" / name / "leaderboard.json").read_text())
        assert errors(content, SCHEMA) == []


def test_unusual_leaderboards_conform() -> None:
    unfinished = [make_entry("a"), make_entry("b", setting_hash="other")]
    diverged = [*make_digits_records(), make_record("sra", 0, [1.0, math.nan, math.inf])]
    for records, entries in (([], []), (diverged, unfinished), (make_seeds("sra", [1.0]), [])):
        text = render(
            build_leaderboard(records, entries), "json", read_published(ROOT / "results" / "reported.csv")
        )
        assert errors(json.loads(text), SCHEMA) == []
    at_hours = build_leaderboard(make_digits_records(), question=Question(at=Amount("seconds", 40.0)))
    assert errors(json.loads(render(at_hours, "json")), SCHEMA) == []


def test_the_schema_finds_errors() -> None:
    content = json.loads(render(read_leaderboard([ROOT / "results" / "digits" / "runs"]), "json"))
    content["tables"][0]["rows"][0]["student"]["value"]["mean"] = "1.0"
    content["tables"][0]["rows"][1].pop("seeds")
    content["tables"][0]["rows"][2]["extra"] = 1
    content["schema"] = 1
    assert len(errors(content, SCHEMA)) == 4


@pytest.mark.parametrize("name", [name for name in SCHEMA["$defs"] if hasattr(data, name)])
def test_the_schema_names_every_field(name: str) -> None:
    fields = [field.name for field in dataclasses.fields(getattr(data, name))]
    assert list(SCHEMA["$defs"][name]["properties"]) == fields == SCHEMA["$defs"][name]["required"]


def test_the_version_agrees() -> None:
    assert SCHEMA["properties"]["schema"]["const"] == LEADERBOARD_SCHEMA
