"""The training state of an unfinished stage, and the artifacts of finished ones.

A state is a safetensors file and a small JSON file that names it with its sha256. The JSON file is replaced
only when the tensors are on disk, and the previous tensors are deleted only after that. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.core.recipe import Cost
from stbench.models.weights import load_weights, require_finite, save_weights
from stbench.runs import schema
from stbench.runs.folder import OutputFolder
from stbench.runs.records import StageRecord
from stbench.runs.sealed import Binding, parse, seal, unseal
from stbench.runs.stage_folder import StageFolder
from stbench.train.sharding import split_like

ARTIFACT = "artifact.json"
"""Record of a published stage, next to its weights."""


@dataclass(frozen=True)
class TrainingState:
    """The counters of a stage that is being trained; its tensors are in a separate file."""

    step: int = 0
    seconds: float = 0.0
    warmup_seconds: float = 0.0
    """The part of `seconds` that the first step took (compilation, allocation)."""
    cost: Mapping[str, float] = field(default_factory=lambda: asdict(Cost()))


def state_tensors(networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of a training state: those of the networks, and the moments of the optimiser."""
    tensors = {
        f"{name}.{key}": value
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    return tensors


def save_state(folder: StageFolder, state: TrainingState, tensors: Mapping[str, Tensor]) -> None:
    """Save tensors and counters. The previous state stays valid until this one is complete."""
    file = folder.state(state.step)
    digest = save_weights(tensors, file)
    folder.write(folder.state_index, {"file": file.name, "sha256": digest, **asdict(state)})
    for old in folder.states():
        if old != file:
            old.unlink()


def load_state(
    folder: StageFolder, networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> TrainingState | None:
    """Restore what `save_state` wrote; None if there is no state.

    Raises:
        UserError: If the state is damaged.
    """
    index = folder.state_index
    if not index.is_file():
        return None
    values = schema.convert(folder.read(index), schema.STATE, index)
    file, expected = values.pop("file"), folder.state(values["step"]).name
    if file != expected:
        raise UserError(
            f"{index} is damaged: expected the file {expected}, found {file!r}; {_remedy(folder)}"
        )
    try:
        tensors = load_weights(folder.path / file, values.pop("sha256"))
    except UserError as error:
        raise UserError(f"{str(error).rsplit(';', 1)[0]}; {_remedy(folder)}") from error
    require_finite(tensors, str(folder.path / file), _remedy(folder))
    try:
        values["cost"] = asdict(Cost(**values["cost"]))
        for name, network in networks.items():
            targets = network.state_dict()
            found = _with_prefix(tensors, f"{name}.")
            network.load_state_dict({k: split_like(v, targets.get(k, v)) for k, v in found.items()})
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in _with_prefix(tensors, "optimizer.").items():
            number, name = key.split(".", 1)
            moments.setdefault(int(number), {})[name] = split_like(value, parameters[int(number)])
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{index} is not a state of this run ({reason}); {_remedy(folder)}") from error
    return TrainingState(**values)


def _remedy(folder: StageFolder) -> str:
    return f"delete {folder.path} to train this stage again"


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def publish_artifact(output: OutputFolder, folder: StageFolder, record: StageRecord) -> None:
    """Offer a finished stage to later runs under the same output folder; it appears atomically."""
    target = output.artifact(record.fingerprint)
    if target.is_dir():
        return
    output.artifacts.mkdir(exist_ok=True)
    shutil.rmtree(folder.draft, ignore_errors=True)
    folder.draft.mkdir()
    for kind in ("raw", "ema"):
        link(folder.weights(kind, record.steps), folder.draft / f"{kind}.safetensors")
    write_artifact(folder.draft, record)
    try:
        folder.draft.rename(target)
    except OSError:  # another process has published the same stage; its bits are the same
        shutil.rmtree(folder.draft, ignore_errors=True)


def reuse_artifact(output: OutputFolder, folder: StageFolder, fingerprint: str) -> StageRecord | None:
    """Link the weights of an equal finished stage into `folder`; returns its record, or None without one.

    Raises:
        UserError: If the artifact is damaged.
    """
    source = output.artifact(fingerprint)
    if not source.is_dir():
        return None
    record = read_artifact(source, fingerprint)
    folder.path.mkdir(parents=True, exist_ok=True)
    for kind in ("raw", "ema"):
        file = source / f"{kind}.safetensors"
        load_weights(file, record.sha256[kind])  # raises if the file is damaged
        link(file, folder.weights(kind, record.steps))
    return record


def write_artifact(folder: Path, record: StageRecord) -> None:
    """Write the record of a finished stage next to its raw.safetensors and ema.safetensors."""
    content = seal(asdict(record), Binding(record.fingerprint), ARTIFACT)
    atomic_write(folder / ARTIFACT, json.dumps(content, indent=1) + "\n")


def read_artifact(folder: Path, fingerprint: str) -> StageRecord:
    """Read the record of the finished stage with this fingerprint.

    Raises:
        UserError: If it is missing, damaged, of another version or of another stage.
    """
    file = folder / ARTIFACT
    if not file.is_file():
        raise UserError(f"{folder} contains no {ARTIFACT}; delete the folder and run the command again")
    try:
        content = parse(file.read_bytes(), file)
        binding = Binding(fingerprint, content["schema"])
        record = StageRecord(**schema.convert(unseal(content, binding, ARTIFACT, file), schema.STAGE, file))
    except UserError as error:
        raise UserError(
            f"{str(error).rsplit(';', 1)[0]}; delete {folder} and run the command again"
        ) from error
    if record.fingerprint != fingerprint or not {"raw", "ema"} <= record.sha256.keys():
        raise UserError(f"{file} is of another stage; delete {folder} and run the command again")
    return record


def link(source: Path, target: Path) -> None:
    """Create a hard link, or a copy if the file system has none. An existing target is replaced."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
