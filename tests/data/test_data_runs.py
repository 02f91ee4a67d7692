"""From images to a curve: prepare, train two recipes, sample, evaluate; and what a run remembers."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import string
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from stbench.cli import app as cli
from stbench.config.overrides import parse_set
from stbench.config.plan import prepare as prepare_run
from stbench.config.resolve import RunRequest, resolve
from stbench.core.errors import UserError
from stbench.data.dataset import get_dataset
from stbench.data.prepare import PrepareOptions, open_task, prepare
from stbench.data.repa_layout import Repa, convert, decoder_of
from stbench.data.shards import REFERENCE
from stbench.data.spec import DataSpec
from stbench.evaluate import past_run, points
from stbench.evaluate.sample_job import SampleRequest, sample_images
from stbench.evaluate.sample_model import ModelLocation
from stbench.models import encoders as teachers
from stbench.runs.records import RunRecord
from stbench.train import engine
from tests.conftest import BLOCKS, TINY, Command
from tests.datafiles import EXTRACTOR, make_images, make_repa, make_vae, picture
from tests.weights import random_inception

STEPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ (400 in 10 classes), vae/, and set/ prepared from them with mirror images."""
    root = tmp_path_factory.mktemp("runs")
    make_vae(root / "vae")
    make_images(root / "images", 400, 32, mixed=True)
    job = PrepareOptions(
        root / "images", root / "set", str(root / "vae"), 64, flip=True, shards=3, references=100
    )
    prepare(job, open_task(job), lambda count: None)
    return root


def request(path: Path, recipe: str = "vanilla", steps: int = STEPS, **data: Any) -> RunRequest:
    options = TINY | (BLOCKS if recipe == "self-transcendence" else {})
    options |= {"data.extractor": EXTRACTOR, "eval.samples": 20, "eval.points": [steps]}
    options |= {f"data.{name}": value for name, value in data.items()}
    return RunRequest("sit-ti/2", recipe, "custom", data=str(path), steps=steps, overrides=options)


def train(output: Path, *arguments: Any, **more: Any) -> RunRecord:
    return engine.run(prepare_run(resolve(request(*arguments, **more))), engine.RunOptions(output))[0]


def final_weights(record: RunRecord) -> dict[str, str]:
    """sha256 of the raw and the EMA weights of the last stage."""
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
    again: Any = run.dataset.to(device)
    assert run.spec.data is not None and run.spec.data.resident == "yes" and again._resident is None
    sample_images(ModelLocation(Path(records[1].path)), wanted, [tmp_path / "five.npz"], [device])
    with np.load(tmp_path / "five.npz") as found:
        assert (found["arr_0"].shape, found["arr_0"].dtype) == ((5, 64, 64, 3), np.uint8)
    changed = run.spec.eval.model_copy(update={"seed": 1})
    added = points.evaluate_again(run, changed, device)
    assert [point.step for point in added] == [STEPS]


def test_a_repa_folder_and_its_converted_set_give_the_same_weights(root: Path, tmp_path: Path) -> None:
    folder = make_repa(tmp_path / "repa", 60)
    repa = Repa(folder)
    convert(repa, tmp_path / "set", decoder_of(repa, str(root / "vae")), 4, 30, lambda count: None)
    direct = train(tmp_path / "a", folder, vae=str(root / "vae"))
    converted = train(tmp_path / "b", tmp_path / "set")
    assert len(final_weights(direct)) == 2
    assert final_weights(direct) == final_weights(converted)
    assert direct.curve[-1].val_loss == converted.curve[-1].val_loss


def test_repa_looks_at_images_where_there_are_any_and_else_takes_cached_tokens(
    root: Path, tmp_path: Path
) -> None:
    folder, vae = make_repa(tmp_path / "layout", 60), str(root / "vae")
    repa = Repa(folder)
    convert(repa, tmp_path / "set", decoder_of(repa, vae), 4, 30, lambda count: None)
    name, weights = "vit_tiny_patch16_224", tmp_path / "vit.safetensors"
    save_file(timm.create_model(name, num_classes=0).state_dict(), weights)
    options = {"recipe.encoder": name, "recipe.checkpoint": str(weights), "data.flip": False}

    def run(output: str, path: Path, **changed: Any) -> RunRecord:
        asked = request(path, "repa", vae=vae)
        asked = replace(asked, overrides={**asked.overrides, **options, **changed})
        return engine.run(prepare_run(resolve(asked)), engine.RunOptions(tmp_path / output))[0]

    assert run("online", folder).stages[0].flops_teachers > 0
    with pytest.raises(UserError, match=r"keeps latents and no images .* --set recipe\.encoder=FOLDER"):
        run("none", tmp_path / "set")
    source = teachers.find_encoder(name, weights)
    encoder = teachers.open_encoder(source, 16, torch.device("cpu"))
    assert isinstance(encoder, teachers.ImageEncoder)
    looked_at = get_dataset("custom", DataSpec(path=str(folder), vae=vae, flip=False))
    pixels = looked_at.images(torch.arange(looked_at.size))
    assert torch.equal(looked_at.images(torch.arange(3) + looked_at.size), pixels[:3].flip(-1))
    teachers.cache_tokens(tmp_path / "tokens", encoder, torch.split(pixels, 16), len(pixels))
    cached = {"recipe.encoder": str(tmp_path / "tokens"), "recipe.checkpoint": None}
    assert run("cached", tmp_path / "set", **cached).status == "finished"


@pytest.fixture(scope="module")
def vit(root: Path) -> tuple[str, Path]:
    """A timm model with weights in a file."""
    name, file = "vit_tiny_patch16_224", root / "vit.safetensors"
    save_file(timm.create_model(name, num_classes=0).state_dict(), file)
    return name, file


def test_the_tokens_of_a_prepared_set_are_those_of_its_training_images(
    root: Path, tmp_path: Path, vit: tuple[str, Path], stbench: Command
) -> None:
    name, file = vit
    tokens = ("data", "tokens", root / "images", root / "set")
    encoder = ("--encoder", name, "--checkpoint", file, "--batch", 100)
    code, out, err = stbench(*tokens, tmp_path / "tokens", *encoder)
    assert code == 0, err
    held = get_dataset("custom", DataSpec(path=str(root / "set")))
    assert f"tokens of {held.size} images" in out and "--set recipe.encoder=" in out
    network = teachers.open_encoder(teachers.find_encoder(name, file), 16, torch.device("cpu"))
    assert isinstance(network, teachers.ImageEncoder)
    written = torch.from_numpy(np.load(tmp_path / "tokens" / "tokens.npy"))
    rows = held._rows  # type: ignore[attr-defined]
    references = np.flatnonzero(held._found.split[rows] == REFERENCE)  # type: ignore[attr-defined]
    pixels = torch.from_numpy(held._found.pixels(rows[references][:5]))  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = network.tokens(pixels)
    assert torch.allclose(written[references[:5]].float(), expected, atol=2e-3)
    asked = request(root / "set", "repa", flip=False)
    taught = {"recipe.encoder": str(tmp_path / "tokens"), "recipe.checkpoint": None}
    asked = replace(asked, overrides={**asked.overrides, **taught})
    record = engine.run(prepare_run(resolve(asked)), engine.RunOptions(tmp_path / "runs"))[0]
    assert record.status == "finished"
    code, _, err = stbench(*tokens, tmp_path / "tokens", *encoder)
    assert code == 2 and "holds tokens already; delete it" in err


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("gone", "found no 'class0/.* are missing.; give the source it was made from"),
        ("other", "is not the one that .* was made from"),
        ("patch", "--patch wants a divisor of 8, the latents' side, got 3"),
        ("encoder", "unknown encoder 'vit_huge'"),
        ("full", "not enough disk space in .*tokens"),
    ],
)
def test_tokens_of_other_images_are_not_written(
    root: Path,
    tmp_path: Path,
    vit: tuple[str, Path],
    stbench: Command,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    message: str,
) -> None:
    name, file = vit
    images, more = root / "images", ["--encoder", name, "--checkpoint", file]
    if case in ("gone", "other"):
        images = shutil.copytree(images, tmp_path / "images")
        for victim in (path for path in sorted(images.rglob("*")) if path.is_file()):
            if case == "other":
                picture(999, 64, 64).save(victim)
            elif victim.parent.name == "class0":
                victim.unlink()
    if case == "patch":
        more += ["--patch", 3]
    if case == "encoder":
        more = ["--encoder", "vit_huge"]
    if case == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("U", (), {"free": 10}))
    code, _, err = stbench("data", "tokens", images, root / "set", tmp_path / "tokens", *more)
    assert code == 2 and re.search(message, err.replace("\n", " ")), err
    assert not (tmp_path / "tokens" / "tokens.json").exists()


def test_moments_in_memory_and_reading_in_stretches_give_the_same_weights(root: Path, tmp_path: Path) -> None:
    mapped = train(tmp_path / "a", root / "set")
    resident = train(tmp_path / "b", root / "set", resident="yes")
    assert final_weights(mapped) == final_weights(resident)
    assert mapped.train_hash == resident.train_hash


def test_flip_makes_another_setting_and_other_weights(root: Path, tmp_path: Path) -> None:
    mirrored, plain = train(tmp_path, root / "set"), train(tmp_path, root / "set", flip=False)
    assert mirrored.setting_hash != plain.setting_hash
    assert final_weights(mirrored) != final_weights(plain)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"size": 128}, "holds images of 64 pixels, data.size asks for 128; leave it out"),
        ({"vae": "none"}, "holds latents; data.vae=none is for images"),
    ],
)
def test_options_for_images_are_refused_where_they_are_encoded(
    root: Path, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve(request(root / "set", **data))
    assert resolve(request(root / "set", size=64)).data is not None


def test_shards_without_their_manifest_say_so(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "set", tmp_path / "set")
    (tmp_path / "set" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"holds shards of a prepared set, but no manifest.json"):
        resolve(request(tmp_path / "set"))


def test_pixels_train_without_an_autoencoder(root: Path, tmp_path: Path) -> None:
    record = train(tmp_path, root / "images", vae="none", size=16)
    assert record.status == "finished"
    spec = json.loads((Path(record.path) / "spec.json").read_text())
    assert (spec["dataset"], spec["data"]["vae"]) == ("custom", "none")


def test_a_moved_set_resumes_from_its_new_place_and_is_the_same_run(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "set", tmp_path / "old")
    half = train(tmp_path / "runs", tmp_path / "old", steps=STEPS // 2)
    (tmp_path / "old").rename(tmp_path / "new")
    get_dataset.__globals__["_built"].cache_clear()
    with pytest.raises(
        UserError, match=r"found nothing; if they moved, type `ln -s NEW_PLACE .*old`"
    ) as error:
        past_run.open_run(Path(half.path))
    assert "\n" not in str(error.value)
    whole = train(tmp_path / "runs", tmp_path / "new")
    assert whole.path == half.path
    assert past_run.open_run(Path(whole.path)).dataset.size == 380
    assert final_weights(whole) == final_weights(train(tmp_path / "once", root / "set"))


def test_a_run_notices_that_its_path_holds_other_data(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "set", tmp_path / "set")
    record = train(tmp_path / "runs", tmp_path / "set")
    shutil.rmtree(tmp_path / "set")
    job = PrepareOptions(root / "images", tmp_path / "set", str(root / "vae"), 64, shards=3, references=100)
    prepare(job, open_task(job), lambda count: None)
    get_dataset.__globals__["_built"].cache_clear()
    with pytest.raises(UserError, match="does not hold the data this run began with: expected fingerprint"):
        past_run.open_run(Path(record.path))


def test_a_missing_autoencoder_is_told_before_training(root: Path, tmp_path: Path) -> None:
    folder = make_repa(tmp_path / "repa", 30)
    with pytest.raises(UserError, match=r"sd-vae-ft-mse is not in the Hugging Face cache; .*data.vae=PATH"):
        train(tmp_path / "runs", folder)
    (run,) = (tmp_path / "runs").glob("custom-*")
    assert not list(run.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data.size": 64}, "data.size wants --data PATH beside it"),
        ({"data.path": "x"}, "data.path"),
        ({"data.flop": True}, "unknown option 'data.flop'; did you mean 'data.flip'"),
        ({"data.resident": "maybe"}, "bad value for 'data.resident'"),
    ],
)
def test_wrong_data_options_are_one_line(arguments: dict[str, Any], message: str, root: Path) -> None:
    path = None if "data.size" in arguments else str(root / "set")
    with pytest.raises(UserError, match=message):
        resolve(RunRequest("sit", "vanilla", "custom", data=path, overrides=arguments))


@pytest.mark.parametrize(("typed", "vae"), [("none", "none"), ("sd-vae-ft-ema", "sd-vae-ft-ema")])
def test_the_autoencoder_is_taken_as_typed(typed: str, vae: str, root: Path) -> None:
    options = parse_set([f"data.vae={typed}", "data.resident=no", "data.size=32"])
    if typed == "none":  # of images; latents are refused
        data = root / "images"
    else:
        data, options = root / "set", options | {"data.size": 64}
    spec = resolve(RunRequest("sit", "vanilla", "custom", data=str(data), overrides=options))
    assert spec.data is not None and (spec.data.vae, spec.data.resident) == (vae, "no")


def test_the_preset_follows_the_backbone(root: Path) -> None:
    sizes = {}
    for backbone in ("dit", "sit", "uvit"):
        spec = resolve(RunRequest(backbone, "vanilla", "custom", data=str(root / "set")))
        assert (spec.train.batch, spec.train.lr) == (128, 2e-4)
        sizes[backbone] = spec.backbone.size
    assert sizes == {"dit": "s/2", "sit": "s/2", "uvit": "s/2-latent"}
    assert spec.data is not None and spec.data.path == str(root / "set")


SCRIPT = Path(__file__).parents[2] / "docs" / "imagenet.md"
SMALL = {"DATASET": "custom", "SIZE": "64", "BACKBONE": "sit-ti/2", "STEPS": str(STEPS)}


def script(paths: dict[str, Path]) -> list[list[str]]:
    """The commands of the documented script, its paths and sizes changed for small ones."""
    (block,) = re.findall(r"```bash\n(.*?)```", SCRIPT.read_text(), re.DOTALL)
    options = TINY | BLOCKS | {"data.extractor": EXTRACTOR, "eval.samples": 20, "train.clip": 1.0}
    vanilla = {name: value for name, value in options.items() if not name.startswith("recipe.")}
    commands = []
    for line in block.splitlines():
        if name := re.match(r"(\w+)=", line):
            assert name[1] in {*SMALL, "MORE", *paths}
            continue
        chosen = vanilla if "--recipe vanilla" in line else options
        more = " ".join(f"--set {shlex.quote(f'{k}={json.dumps(v)}')}" for k, v in chosen.items())
        values = SMALL | {name: str(path) for name, path in paths.items()} | {"MORE": more, "RUN": "$RUN"}
        if line.strip().startswith("stbench "):
            commands.append(shlex.split(string.Template(line).substitute(values))[1:])
    return commands


def test_the_documented_script_runs_with_other_paths(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = {
        "IMAGES": root / "images",
        "VAE": root / "vae",
        "DATA": tmp_path / "latents",
        "REFERENCE": tmp_path / "reference.npz",
        "RUNS": tmp_path / "runs",
    }
    commands = script(paths)
    assert [command[0] for command in commands] == [
        *("data", "data", "run", "run", "compare", "sample", "evaluate")
    ]
    inception, digest = random_inception(tmp_path / "inception.pth")
    weights = ["--inception", str(inception), "--inception-sha256", digest]
    np.savez(paths["REFERENCE"], np.stack([np.asarray(picture(n, 64, 64)) for n in range(12)]))

    def call(*command: str) -> None:
        monkeypatch.setattr(sys, "argv", ["stbench", *command])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, capfd.readouterr().err

    for command in commands[:5]:
        call(*command)
    (run,) = (path.parent for path in paths["RUNS"].glob("*vanilla*/spec.json"))
    drawing, measuring = ([part.replace("$RUN", str(run)) for part in command] for command in commands[5:])
    assert drawing[2:4] == ["-n", "50000"] and drawing[-4:-2] == ["--steps", "250"]
    call(*drawing, "-n", "12", "--steps", "3", "--device", "cpu")
    call(*measuring, *weights, "--device", "cpu")
    scores = json.loads((run / "cfg1.8.json").read_text())
    assert scores["protocol"]["sampling"]["cfg"] == 1.8 and np.isfinite(scores["metrics"]["fid12"])
    out = capfd.readouterr().out
    assert "400 images in 10 classes; 1 shards of moments 8x8x8" in out
    assert "400 images, 5 files, all as written" in out
    assert "self-transcendence" in out and "vanilla" in out
