"""Stage fingerprints of the built-in recipes: a later version must recognise the finished stages of a run."""

from __future__ import annotations

import pytest

from stbench.config.plan import prepare
from stbench.config.resolve import RunRequest, resolve

FINGERPRINTS = {
    "dispersive": ["72362bec2547"],
    "layersync": ["195dc482bf16"],
    "repa": ["2739d8ac607f"],
    "vae-align": ["9ec8dc584aa4"],
    "self-transcendence": ["9ec8dc584aa4", "f8eff961689b"],
    "sra": ["87ee121a2611"],
    "vanilla": ["c42714a14ac8"],
}
"""The first 12 digits per stage for SiT ti/2 on the digits with 10 steps, since schema 2.

A change means that rerunning a command trains its stages again. Renaming a supervision class or one of its
fields changes them.
"""


@pytest.mark.parametrize("recipe", FINGERPRINTS)
def test_fingerprints_do_not_change(recipe: str) -> None:
    prepared = prepare(resolve(RunRequest("sit", recipe, steps=10)))
    assert [stage.fingerprint[:12] for stage in prepared.stages] == FINGERPRINTS[recipe]
