"""The folder of a stage's checkpoints: its paths, and the recorded sha256 of every weight file in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stbench.core.files import atomic_write
from stbench.runs import schema
from stbench.runs.schema import convert
from stbench.runs.sealed import Binding, parse, seal, unseal

CHECKPOINTS = "checkpoints"
"""Folder in a run folder that contains the folders of the stages."""


@dataclass(frozen=True)
class StageFolder:
    """The checkpoints of one stage of a run."""

    path: Path
    binding: Binding = field(default_factory=Binding)
    """Identity and schema of the run folder."""

    @property
    def state_index(self) -> Path:
        """JSON file that names the current training state."""
        return self.path / "state.json"

    @property
    def weight_index(self) -> Path:
        """JSON file with the sha256 of every weight file."""
        return self.path / "weights.json"

    @property
    def draft(self) -> Path:
        """Where an artifact is assembled before it is published."""
        return self.path / "artifact"

    def state(self, step: int) -> Path:
        """Tensors of the training state after a step."""
        return self.path / f"state-{step:08d}.safetensors"

    def states(self) -> list[Path]:
        """All files with tensors of a training state; more than one only after a crash."""
        return sorted(self.path.glob("state-*.safetensors"))

    def weights(self, kind: str, step: int) -> Path:
        """Network weights after a step; `kind` is "raw" or "ema"."""
        return self.path / f"{kind}-{step:08d}.safetensors"

    def weight_files(self, kind: str) -> dict[int, Path]:
        """The stored network weights by step; `kind` is "raw" or "ema"."""
        files = sorted(self.path.glob(f"{kind}-*.safetensors"))
        steps = {file.stem.rpartition("-")[2]: file for file in files}
        return {int(step): file for step, file in steps.items() if step.isdecimal()}

    def weight_hashes(self) -> dict[str, str]:
        """Read the sha256 of the weight files, by file name."""
        if not self.weight_index.is_file():
            return {}
        row = self.read(self.weight_index)
        return dict(convert(row, {"sha256": schema.digests}, self.weight_index)["sha256"])

    def record_weights(self, kind: str, step: int, sha256: str) -> None:
        """Record the sha256 of the weight file of a step, after it is written."""
        self.write(
            self.weight_index, {"sha256": {**self.weight_hashes(), self.weights(kind, step).name: sha256}}
        )

    def forget_missing(self) -> None:
        """Drop the records of weight files that were deleted on purpose."""
        known = {name: digest for name, digest in self.weight_hashes().items() if (self.path / name).exists()}
        self.write(self.weight_index, {"sha256": known})

    def read(self, file: Path) -> dict[str, Any]:
        """Read a JSON file of this folder.

        Raises:
            UserError: If it is damaged.
        """
        return unseal(parse(file.read_bytes(), file), self.binding, self._place(file), file)

    def write(self, file: Path, content: Mapping[str, Any]) -> None:
        """Replace a JSON file of this folder atomically."""
        record = seal(content, self.binding, self._place(file))
        atomic_write(file, json.dumps(record, indent=1, allow_nan=False) + "\n")

    def _place(self, file: Path) -> str:
        return f"{CHECKPOINTS}/{self.path.name}/{file.name}"
