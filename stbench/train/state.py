"""What training leaves on disk: the state of a stage under way, and the artifact of a finished one.

A state is a safetensors file and a small JSON that names it with its sha256; the JSON is replaced only when
the file is whole, and the file it named before is deleted only after that. Nothing here is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.core.recipe import Cost
from stbench.models.weights import load_weights, save_weights
from stbench.runs import schema
from stbench.runs.records import SCHEMA, StageRecord


@dataclass(frozen=True)
class TrainingState:
    """How far a stage is; the tensors lie in the file beside it."""

    step: int = 0
    seconds: float = 0.0
    warmup_seconds: float = 0.0
    cost: Mapping[str, float] = field(default_factory=lambda: asdict(Cost()))


def save_state(
    place: Path, state: TrainingState, networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """Write the networks by name, the optimiser and the counters; the previous state stays until this one is
    whole.
    """
    tensors = {
        f"{name}.{key}": value for name, net in networks.items() for key, value in net.state_dict().items()
    }
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    file = place / f"state-{state.step:08d}.safetensors"
    digest = save_weights(tensors, file)
    content = {"schema": SCHEMA, "file": file.name, "sha256": digest, **asdict(state)}
    atomic_write(place / "state.json", json.dumps(content, indent=1) + "\n")
    for old in place.glob("state-*.safetensors"):
        if old != file:
            old.unlink()


def load_state(
    place: Path, networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> TrainingState | None:
    """Restore what `save_state` wrote; None if nothing was. Raises UserError for a damaged state."""
    index = place / "state.json"
    if not index.is_file():
        return None
    row = schema.parse(index.read_bytes(), index)
    fields = {"file": schema.text, "sha256": schema.text, "step": schema.whole, "seconds": float}
    fields |= {"warmup_seconds": float, "cost": schema.mapping}
    values = schema.convert(row, fields, index)
    try:
        tensors = load_weights(place / values.pop("file"), values.pop("sha256"))
    except UserError as error:
        raise UserError(
            f"{str(error).rsplit(';', 1)[0]}; delete {place} to train this stage again"
        ) from error
    for name, net in networks.items():
        net.load_state_dict(_under(tensors, f"{name}."))
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in _under(tensors, "optimizer.").items():
        number, name = key.split(".", 1)
        moments.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return TrainingState(**values)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def write_artifact(folder: Path, record: StageRecord) -> None:
    """The record of a finished stage beside its raw.safetensors and ema.safetensors."""
    atomic_write(folder / "artifact.json", json.dumps({"schema": SCHEMA, **asdict(record)}, indent=1) + "\n")


def read_artifact(folder: Path) -> StageRecord:
    """Read it back. Raises UserError for a damaged or foreign file."""
    file = folder / "artifact.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no artifact.json; delete the folder and run again")
    return StageRecord(**schema.convert(schema.parse(file.read_bytes(), file), schema.STAGE, file))
