"""Runs on a user's data: prepare, train, sample and evaluate; moved, replaced and refused data."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from safetensors.torch import save_file

from stbench.config.plan import prepare as prepare_run
from stbench.config.resolve import RunRequest, resolve
from stbench.core.errors import UserError
from stbench.data.dataset import _built
from stbench.data.prepare import PrepareOptions
from stbench.data.repa_convert import convert
from stbench.data.repa_layout import RepaFolder, find_decoder
from stbench.evaluate import past_run
from stbench.evaluate.again import evaluate_again
from stbench.evaluate.sample_job import SampleRequest, sample_images
from stbench.evaluate.sample_model import ModelLocation
from stbench.runs.records import RunRecord
from stbench.train import engine
from tests.conftest import BLOCKS, TINY, Command
from tests.datafiles import EXTRACTOR, make_images, make_repa, run_prepare

STEPS = 6
COUNT, SIZE, REFERENCES = 120, 32, 40


@pytest.fixture(scope="module")
def root(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ (120 in 10 classes), and set/ prepared from them with mirror images."""
    root = tmp_path_factory.mktemp("runs")
    make_images(root / "images", COUNT, 24, mixed=True)
    run_prepare(options_for(root, vae))
    return root


def options_for(root: Path, vae: Path) -> PrepareOptions:
    return PrepareOptions(
        root / "images", root / "set", str(vae), SIZE, flip=True, shards=3, references=REFERENCES
    )


def request(path: Path, recipe: str = "vanilla", steps: int = STEPS, **data: Any) -> RunRequest:
    options = TINY | (BLOCKS if recipe == "self-transcendence" else {})
    options |= {"eval.extractor": EXTRACTOR, "eval.samples": 20, "eval.points": [steps]}
    options |= {f"data.{name}": value for name, value in data.items()}
    return RunRequest("sit-ti/2", recipe, "custom", data=str(path), steps=steps, overrides=options)


def train(output: Path, *arguments: Any, **more: Any) -> RunRecord:
    return engine.run(prepare_run(resolve(request(*arguments, **more))), engine.RunOptions(output))[0]


def final_weights(record: RunRecord) -> dict[str, str]:
    """Hash the raw and the EMA weights of the last stage."""
    files = sorted(Path(record.path).glob(f"checkpoints/*/*-{STEPS:08d}.safetensors"))
    return {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if not f.name.startswith("state")
    }


def test_two_recipes_train_on_a_prepared_set_and_are_sampled_and_evaluated(
    root: Path, tmp_path: Path
) -> None:
    recipes = ("vanilla", "self-transcendence")
    records = [train(tmp_path, root / "set", recipe, resident="yes") for recipe in recipes]
    assert len({record.setting_hash for record in records}) == 1
    for record in records:
        assert record.status == "finished"
        last = record.curve[-1]
        assert last.metrics.keys() >= {"fid", "fid_all", "is", "kid", "nn_distance"}
        assert all(np.isfinite(value) for value in last.val_loss)
    run = past_run.open_run(Path(records[1].path))
    device, wanted = engine.RunOptions(tmp_path).device, SampleRequest(5, 1.5)
    again: Any = run.prepared.dataset.to(device)
    assert again._resident is None  # although the run was trained with data.resident=yes
    sample_images(ModelLocation(Path(records[1].path)), wanted, [tmp_path / "five.npz"], [device])
    with np.load(tmp_path / "five.npz") as found:
        assert (found["arr_0"].shape, found["arr_0"].dtype) == ((5, SIZE, SIZE, 3), np.uint8)
    changed = run.prepared.spec.eval.model_copy(update={"seed": 1})
    added = evaluate_again(run, changed, device)
    assert [point.step for point in added] == [STEPS]


def test_a_repa_folder_and_its_converted_set_give_the_same_weights(vae: Path, tmp_path: Path) -> None:
    folder, target = RepaFolder(make_repa(tmp_path / "repa", 60, latent=4)), tmp_path / "set"
    decoder = find_decoder(folder, str(vae))
    convert(folder, target, decoder, shards=4, references=30, advance=lambda count: None)
    direct = train(tmp_path / "a", folder.path, vae=str(vae))
    converted = train(tmp_path / "b", target)
    assert len(final_weights(direct)) == 2
    assert final_weights(direct) == final_weights(converted)
    assert direct.curve[-1].val_loss == converted.curve[-1].val_loss


@pytest.mark.slow
def test_repa_trains_on_images_or_on_cached_tokens(
    root: Path, vae: Path, tmp_path: Path, stbench: Command
) -> None:
    name, weights, tokens = "vit_tiny_patch16_224", tmp_path / "vit.safetensors", tmp_path / "tokens"
    save_file(timm.create_model(name, num_classes=0).state_dict(), weights)
    encoder = {"recipe.encoder": name, "recipe.checkpoint": str(weights)}

    def run(output: str, path: Path, options: dict[str, Any], **data: Any) -> RunRecord:
        plain = request(path, "repa", flip=False, **data)
        changed = replace(plain, overrides={**plain.overrides, **options})
        return engine.run(prepare_run(resolve(changed)), engine.RunOptions(tmp_path / output))[0]

    # Latents without images: an encoder has nothing to run on.
    with pytest.raises(UserError, match=r"no images for an encoder; .* --set recipe\.encoder=FOLDER"):
        run("none", root / "set", encoder)
    # Images: the encoder runs during training, and its cost is counted.
    repa = make_repa(tmp_path / "layout", 30, latent=4)
    assert run("online", repa, encoder, vae=str(vae)).stages[0].flops_teachers > 0
    # Cached tokens.
    more = ("--encoder", name, "--checkpoint", weights)
    code, _, err = stbench("data", "tokens", root / "images", root / "set", tokens, *more)
    assert code == 0, err
    cached = {"recipe.encoder": str(tokens), "recipe.checkpoint": None}
    assert run("cached", root / "set", cached).status == "finished"


def test_resident_and_mapped_moments_give_the_same_weights(root: Path, tmp_path: Path) -> None:
    mapped = train(tmp_path / "a", root / "set")
    resident = train(tmp_path / "b", root / "set", resident="yes")
    assert final_weights(mapped) == final_weights(resident)
    assert mapped.train_hash == resident.train_hash


def test_flip_changes_setting_and_weights(root: Path, tmp_path: Path) -> None:
    mirrored, plain = train(tmp_path, root / "set"), train(tmp_path, root / "set", flip=False)
    assert mirrored.setting_hash != plain.setting_hash
    assert final_weights(mirrored) != final_weights(plain)


def test_pixels_train_without_an_autoencoder(root: Path, tmp_path: Path) -> None:
    record = train(tmp_path, root / "images", vae="none", size=16)
    assert record.status == "finished"
    spec = json.loads((Path(record.path) / "spec.json").read_text())
    assert (spec["dataset"], spec["data"]["vae"]) == ("custom", "none")


def test_a_run_on_a_moved_set_resumes_with_the_new_path(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "set", tmp_path / "old")
    half = train(tmp_path / "runs", tmp_path / "old", steps=STEPS // 2)
    (tmp_path / "old").rename(tmp_path / "new")
    _built.clear()
    with pytest.raises(
        UserError, match=r"found nothing; if they were moved, type `ln -s NEW_PLACE .*old`"
    ) as error:
        past_run.open_run(Path(half.path))
    assert "\n" not in str(error.value)
    whole = train(tmp_path / "runs", tmp_path / "new")
    assert whole.path == half.path
    assert past_run.open_run(Path(whole.path)).prepared.dataset.size == COUNT - 6
    assert final_weights(whole) == final_weights(train(tmp_path / "once", root / "set"))


def test_a_run_on_replaced_data_is_refused(root: Path, vae: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "set", tmp_path / "set")
    record = train(tmp_path / "runs", tmp_path / "set")
    shutil.rmtree(tmp_path / "set")
    shutil.copytree(root / "images", tmp_path / "images")
    next((tmp_path / "images").rglob("*.png")).unlink()
    run_prepare(replace(options_for(root, vae), source=tmp_path / "images", target=tmp_path / "set"))
    _built.clear()
    with pytest.raises(UserError, match="changed since the run started: expected fingerprint"):
        past_run.open_run(Path(record.path))


def test_a_missing_autoencoder_is_reported_before_training(root: Path, tmp_path: Path) -> None:
    folder = make_repa(tmp_path / "repa", 30)
    with pytest.raises(UserError, match=r"sd-vae-ft-mse is not in the Hugging Face cache; .*data.vae=PATH"):
        train(tmp_path / "runs", folder)
    (run,) = (tmp_path / "runs").glob("custom-*")
    assert not list(run.rglob("*.safetensors"))
