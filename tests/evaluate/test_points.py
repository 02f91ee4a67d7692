"""The evaluation protocol."""

from __future__ import annotations

from dataclasses import fields, replace

from stbench.config.spec import EvalSpec
from stbench.data.dataset import Dataset
from stbench.evaluate.points import protocol_of


def test_every_field_of_a_protocol_changes_its_hash(digits: Dataset) -> None:
    protocol = protocol_of(digits, EvalSpec(points=[1], samples=1000, sampler="euler", steps=20))
    assert len(protocol.hash) == 8 and protocol.hash == replace(protocol).hash
    changed = [
        replace(protocol, **{f.name: 7 if f.type == "int" else "other"}).hash  # type: ignore[arg-type]
        for f in fields(protocol)
    ]
    assert len({protocol.hash, *changed}) == len(changed) + 1
    assert set(protocol.fields()) == {
        "reference",
        "extractor",
        "samples",
        "labels",
        "seed",
        "sampler",
        "steps",
        "channels",
        "decoder",
        "rounding",
        "weights",
    }


def test_the_protocol_of_the_committed_runs_keeps_its_hash(digits: Dataset) -> None:
    """Runs can only be compared with the committed ones while this hash is the same."""
    settings = EvalSpec(points=[1], samples=60, sampler="euler", steps=3)
    assert protocol_of(digits, settings).hash == "1dc1b5d7"
