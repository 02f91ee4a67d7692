"""Stage fingerprints of the built-in recipes: finished stages of existing runs must still be recognised."""

from __future__ import annotations

import pytest

from stbench.config.plan import prepare
from stbench.config.resolve import RunRequest, resolve

FINGERPRINTS = {
    "dispersive": ["b42a012c9170"],
    "layersync": ["a6c64b4fbb52"],
    "repa": ["e10429637a72"],
    "vae-align": ["ad2057f93427"],
    "self-transcendence": ["ad2057f93427", "99e194d6c80f"],
    "sra": ["0ab72742919d"],
    "vanilla": ["7a7b057cb036"],
}
"""First 12 digits per stage of SiT ti/2 on the digits, 10 steps, as in the published runs.

A change means that rerunning a published command trains again instead of finding its finished stages.
"""


@pytest.mark.parametrize("recipe", FINGERPRINTS)
def test_fingerprints_do_not_change(recipe: str) -> None:
    prepared = prepare(resolve(RunRequest("sit", recipe, steps=10)))
    assert [stage.fingerprint[:12] for stage in prepared.stages] == FINGERPRINTS[recipe]
