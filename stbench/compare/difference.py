"""How two runs differ, and whether they may meet in a row or a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stbench.compare.format import Section
from stbench.runs.records import RunRecord

Effect = Literal["setting", "plugin", "row", "seed", "protocol", "none"]
"""What a field decides: the table or the row of a run, its seed, the table of its evaluations, or nothing."""

EFFECTS: Mapping[Effect, str] = {
    "setting": "another table",
    "protocol": "another table",
    "plugin": "another table or row",
    "row": "another row",
    "seed": "another seed",
    "none": "none",
}
HASHES = ("train_hash", "row_hash", "setting_hash")
NOT_FIELDS = frozenset(("schema", "run_id", "identity", "checksum", "stages", "stage_count", *HASHES))
"""Fields of spec.json that follow from the others."""
ABSENT = "(absent)"
LONGEST = 60
"""Characters of a value."""


@dataclass(frozen=True)
class Explanation:
    """The answer in one line, and the fields that differ."""

    verdict: str
    section: Section


def explain_runs(first: RunRecord, second: RunRecord) -> Explanation:
    """Compare the settings and evaluation protocols of two runs.

    The hashes decide whether they meet; the fields say why.
    """
    left, right = _fields(first), _fields(second)
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys((*left, *right)):
        if _text(left, name) != _text(right, name):
            effect = _true_effect(effect_of(name), first, second)
            rows.append((name, _text(left, name), _text(right, name), EFFECTS[effect]))
    shared = [protocol for protocol in first.protocols if protocol in second.protocols]
    if not shared and first.protocols and second.protocols:
        rows += _protocol_rows(first, second)
    header = ("field", "A", "B", "consequence")
    section = Section(f"A: {first.run_id}, B: {second.run_id}", header, tuple(rows), frozenset({0, 1, 2, 3}))
    return Explanation(_verdict(first, second, bool(shared)), section)


def _verdict(first: RunRecord, second: RunRecord, shared: bool) -> str:
    if first.setting_hash != second.setting_hash:
        hashes = f"{first.setting_hash} and {second.setting_hash}"
        return f"not in one table: the settings differ ({hashes})"
    if not shared:
        known = bool(first.protocols and second.protocols)
        reason = "they share no evaluation protocol" if known else "a run has no evaluation yet"
        return f"not in one table: the settings agree, but {reason}; see `stbench evaluate RUN`"
    if first.row_key != second.row_key:
        return "in one table, as different rows"
    if first.seed == second.seed:
        return "the same row and seed: only the first by path counts"
    return "in one row, as two of its seeds"


def _true_effect(effect: Effect, first: RunRecord, second: RunRecord) -> Effect:
    """Return "none" where the hashes agree: a field that an old record lacks may have its default value."""
    same_setting = first.setting_hash == second.setting_hash
    agreed = (effect == "setting" and same_setting) or first.row_key == second.row_key
    return "none" if agreed and effect in ("setting", "row", "plugin") else effect


def effect_of(name: str) -> Effect:
    """Return what a field of spec.json decides."""
    section, _, option = name.partition(".")
    if name == "seed":
        return "seed"
    if section == "plugins":
        return "plugin"
    if section == "recipe" or name == "train.steps":
        return "none" if option == "needs" else "row"
    if section == "eval":  # when a run is evaluated; how is in the protocol
        return "none"
    if name == "train.save_every" or option in ("path", "resident"):
        return "none"
    return "setting"


def _protocol_rows(first: RunRecord, second: RunRecord) -> list[tuple[str, ...]]:
    """Compare the last protocols of both runs."""
    left, right = (list(record.protocols.values())[-1] for record in (first, second))
    return [
        (f"protocol.{name}", _text(left, name), _text(right, name), EFFECTS["protocol"])
        for name in dict.fromkeys((*left, *right))
        if _text(left, name) != _text(right, name)
    ]


def _fields(record: RunRecord) -> dict[str, Any]:
    """Return the settings of a run by dotted name, with effective options where they are recorded."""
    fields: dict[str, Any] = {}
    for name, value in record.spec.items():
        if name in NOT_FIELDS:
            continue
        if name in ("recipe", "backbone"):
            value = _options(value)
        fields |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return fields


def _options(section: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in section.items() if name not in ("options", "effective")}
    return {**rest, **(section.get("effective") or section.get("options") or {})}


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _text(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        return ABSENT
    value = fields[name]
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
