"""Stage fingerprints of the built-in recipes: finished stages of existing runs must still be recognised."""

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
"""First 12 digits per stage of SiT ti/2 on the digits, 10 steps, since schema 2.

A change means that rerunning a published command trains again instead of finding its finished stages.
"""


@pytest.mark.parametrize("recipe", FINGERPRINTS)
def test_fingerprints_do_not_change(recipe: str) -> None:
    prepared = prepare(resolve(RunRequest("sit", recipe, steps=10)))
    assert [stage.fingerprint[:12] for stage in prepared.stages] == FINGERPRINTS[recipe]
