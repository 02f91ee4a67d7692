"""Stage fingerprints of the built-in recipes: a later version must recognise the finished stages of a run."""

from __future__ import annotations

import pytest

from stbench.config.plan import prepare
from stbench.config.resolve import RunRequest, resolve

FINGERPRINTS = {
    "deep-supervision": ["ba96d67389d5"],
    "delta-fm": ["1514a9a709d4"],
    "dispersive": ["72362bec2547"],
    "internal-guidance": ["7a2a2ec9b18f"],
    "irepa": ["b6abb16ea408"],
    "layersync": ["195dc482bf16"],
    "repa": ["2739d8ac607f"],
    "sara": ["5aa2a7943c83"],
    "vae-align": ["9ec8dc584aa4"],
    "self-transcendence": ["9ec8dc584aa4", "f8eff961689b"],
    "sra2": ["43d33fc03667"],
    "sra": ["87ee121a2611"],
    "reg": ["0632c174ebc3"],
    "tread": ["d9e73a8d5b18"],
    "vanilla": ["c42714a14ac8"],
}
"""The first 12 digits per stage for SiT ti/2 on the digits with 10 steps, since schema 2.

A change means that rerunning a command trains its stages again. Renaming a supervision class or one of its
fields changes them.
"""


RUNS = {"repa": "c508167a", "sra": "267791e9"}
"""Train hashes of the same runs, since schema 2: repa has options that later versions added."""


@pytest.mark.parametrize("recipe", RUNS)
def test_hashes_of_runs_do_not_change(recipe: str) -> None:
    assert prepare(resolve(RunRequest("sit", recipe, steps=10))).hashes.train == RUNS[recipe]


def test_an_option_that_was_added_counts_once_it_is_set() -> None:
    def identity(**options: object) -> tuple[str, str]:
        overrides = {f"recipe.{name}": value for name, value in options.items()}
        prepared = prepare(resolve(RunRequest("sit", "repa", steps=10, overrides=overrides)))
        return prepared.hashes.train, prepared.stages[0].fingerprint

    assert identity(stop=None, structure=0.0) == identity()
    changed = [identity(), identity(stop=5), identity(structure=0.5), identity(normalise="spatial")]
    assert len({part for both in changed for part in both}) == 8


@pytest.mark.parametrize("recipe", FINGERPRINTS)
def test_fingerprints_do_not_change(recipe: str) -> None:
    prepared = prepare(resolve(RunRequest("sit", recipe, steps=10)))
    assert [stage.fingerprint[:12] for stage in prepared.stages] == FINGERPRINTS[recipe]
