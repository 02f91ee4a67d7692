"""The options `--data` and `data.*`: how they are stored, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stbench.config.overrides import parse_set
from stbench.config.resolve import RunRequest, resolve
from stbench.config.spec import RunSpec
from stbench.core.errors import UserError
from stbench.data.prepare import PrepareOptions
from tests.data.conftest import SIZE


def resolve_data(path: Path, overrides: dict[str, Any]) -> RunSpec:
    return resolve(RunRequest("sit", "vanilla", "custom", data=str(path), overrides=overrides))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"size": 128}, "contains images of 32 pixels, data.size is 128; leave it out"),
        ({"vae": "none"}, "contains latents, data.vae=none is for images; leave it out"),
    ],
)
def test_options_for_images_are_refused_for_latents(
    finished: PrepareOptions, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve_data(finished.target, {f"data.{name}": value for name, value in data.items()})
    assert resolve_data(finished.target, {"data.size": SIZE}).data is not None


def test_shards_without_a_manifest_are_refused(copied: PrepareOptions) -> None:
    (copied.target / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"contains shards of a prepared data set but no manifest.json"):
        resolve_data(copied.target, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data.size": 64}, "data.size requires --data PATH; add it"),
        ({"data.path": "x"}, "data.path"),
        ({"data.flop": True}, "unknown option 'data.flop'; did you mean 'data.flip'"),
        ({"data.resident": "maybe"}, "invalid value for 'data.resident'"),
    ],
)
def test_wrong_data_options_are_refused(
    arguments: dict[str, Any], message: str, finished: PrepareOptions
) -> None:
    path = None if "data.size" in arguments else str(finished.target)
    with pytest.raises(UserError, match=message):
        resolve(RunRequest("sit", "vanilla", "custom", data=path, overrides=arguments))


@pytest.mark.parametrize(("typed", "stored"), [("none", "none"), ("sd-vae-ft-ema", "sd-vae-ft-ema")])
def test_the_autoencoder_is_stored_as_typed(typed: str, stored: str, finished: PrepareOptions) -> None:
    options = parse_set([f"data.vae={typed}", "data.resident=no", "data.size=32"])
    if typed == "none":  # for images; latents are refused
        data = finished.source
    else:
        data, options = finished.target, options | {"data.size": SIZE}
    spec = resolve(RunRequest("sit", "vanilla", "custom", data=str(data), overrides=options))
    assert spec.data is not None and (spec.data.vae, spec.data.resident) == (stored, "no")


def test_the_preset_follows_the_backbone(finished: PrepareOptions) -> None:
    sizes = {}
    for backbone in ("dit", "sit", "uvit"):
        spec = resolve(RunRequest(backbone, "vanilla", "custom", data=str(finished.target)))
        assert (spec.train.batch, spec.train.lr) == (128, 2e-4)
        sizes[backbone] = spec.backbone.size
    assert sizes == {"dit": "s/2", "sit": "s/2", "uvit": "s/2-latent"}
    assert spec.data is not None and spec.data.path == str(finished.target)


@pytest.mark.parametrize(
    ("steps", "overrides", "warmup"),
    [
        (None, {}, 1000),  # 50,000 steps
        (20_000, {}, 1000),
        (1000, {}, 50),
        (10, {}, 0),
        (None, {"train.steps": 200}, 10),
        (1000, {"train.warmup": 1000}, 1000),
        (1000, {"train.warmup": 0}, 0),
    ],
)
def test_the_warmup_of_a_custom_data_set_is_at_most_5_percent_of_the_steps(
    finished: PrepareOptions, steps: int | None, overrides: dict[str, int], warmup: int
) -> None:
    request = RunRequest(
        "sit", "vanilla", "custom", data=str(finished.target), steps=steps, overrides=overrides
    )
    assert resolve(request).train.warmup == warmup
