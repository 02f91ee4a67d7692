"""Run folders: their paths, and reading and writing the files in them. No other module knows these paths.

Every write is atomic, so a reader never sees part of a file. The fields of the files are in schema.py.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stbench.core.errors import UserError
from stbench.core.files import absolute_path, is_locked, lock_folder, remove_unfinished
from stbench.core.text import check_name, visible
from stbench.runs import schema
from stbench.runs.consistency import require_consistent
from stbench.runs.guide_text import file_name
from stbench.runs.record_folder import RecordFolder
from stbench.runs.records import SCHEMA, CurvePoint, RunRecord, StageRecord, network_name, row_label
from stbench.runs.schema import REMEDY, Fields, convert
from stbench.runs.sealed import Binding
from stbench.runs.stage_folder import CHECKPOINTS, StageFolder

State = Literal["running", "stopped", "failed", "finished"]
_SCALE = re.compile(r"g\d{1,6}(\.\d{1,6})?")
COUNTED = ("curve", "stages")
"""Files whose number of lines status.json records, so that missing lines are noticed."""


def find_runs(root: Path | Sequence[Path]) -> list[Path]:
    """Find the run folders (those with a spec.json) at or below the given paths, sorted, each once.

    Raises:
        UserError: If there is none at or below a path.
    """
    found: dict[Path, Path] = {}
    for path in [root] if isinstance(root, Path) else root:
        runs = list(_walk(path))
        if not runs:
            raise UserError(
                f"no run folder (with a spec.json) found at or below {path}; create one with `stbench run`"
            )
        found.update((absolute_path(run), run) for run in runs)
    return sorted(found.values())


def read_runs(paths: Iterable[Path]) -> list[RunRecord]:
    """Read the records of run folders in the given order.

    Raises:
        UserError: If a folder is damaged.
    """
    return [RunFolder(path).record() for path in paths]


@dataclass(frozen=True)
class OutputFolder:
    """The folder that contains run folders (`--output`), and what the runs in it share."""

    path: Path

    @property
    def artifacts(self) -> Path:
        """Finished stages by fingerprint, which later runs reuse."""
        return self.path / ".artifacts"

    @property
    def reference_statistics(self) -> Path:
        """Cached statistics of the reference sets."""
        return self.path / ".cache"

    def artifact(self, fingerprint: str) -> Path:
        """Folder of the finished stage with this fingerprint."""
        return self.artifacts / check_name(fingerprint[:16], "the fingerprint of a stage")

    def run(self, run_id: str) -> RunFolder:
        """The folder of a run. Raises UserError for a run id that is not the name of a folder."""
        return RunFolder(self.path / _checked_id(run_id))

    @property
    def sweep(self) -> Path:
        """Files of `stbench sweep`: its lock and the config files of its runs."""
        return self.path / ".sweep"

    def run_config(self, run_id: str) -> Path:
        """Config file with which a sweep starts a run."""
        return self.sweep / f"{_checked_id(run_id)}.json"

    @property
    def slurm(self) -> Path:
        """Files of the jobs that sweeps submitted to Slurm, one folder per submission."""
        return self.sweep / "slurm"

    def run_log(self, run_id: str) -> Path:
        """Log of a run that a sweep started. Every attempt appends to it."""
        return self.path / ".logs" / f"{_checked_id(run_id)}.log"


class RunFolder(RecordFolder):
    """The files of one run, results/runs/<run-id>/. Writers must hold `lock()`; readers need no lock."""

    def require(self) -> None:
        """Raise UserError if this is not a run folder."""
        if not self.exists():
            raise UserError(
                f"{self.path} is not a run folder (it has no spec.json); `stbench compare` lists run folders"
            )

    def stage(self, index: int, name: str) -> StageFolder:
        """The checkpoints of a stage. Raises UserError for a name that is not that of a folder."""
        check_name(name, "the name of a stage")
        return StageFolder(self.path / CHECKPOINTS / f"{index}-{name}", self.binding)

    def sample_file(self, index: int, name: str, step: int, scale: float, guides: str = "") -> Path:
        """Picture of generated images at an evaluation point."""
        guided = f"+{file_name(guides)}" if guides else ""
        return self.path / "samples" / f"{index}-{name}-{step:08d}-g{scale:g}{guided}.png"

    def sample_files(self, index: int) -> list[Path]:
        """The pictures of a stage, in order of steps."""
        return sorted(self.path.glob(f"samples/{index}-*.png"))

    def samples(self, index: int) -> dict[tuple[int, float], Path]:
        """The pictures of a stage by step and guidance scale."""
        found = {}
        for path in self.sample_files(index):
            _, step, scale = path.stem.rsplit("-", 2)
            if step.isdecimal() and _SCALE.fullmatch(scale):
                found[int(step), float(scale[1:])] = path
        return found

    def tracking(self, service: str) -> Path:
        """Local files of a tracking service: "tensorboard", "wandb" or "mlflow"."""
        return self.path / service

    def create(self, content: Mapping[str, Any], env: Mapping[str, Any]) -> None:
        """Write a first status.json, env.json and finally spec.json, which makes this a run folder.

        For a run that continues, this replaces spec and environment and keeps the rest.
        """
        if not self.exists():
            self._binding = Binding(secrets.token_hex(8))
            self.write_status("running")
        self.write("env.json", env)
        identity = {"identity": self.binding.identity} if self.binding.schema == SCHEMA else {}
        self.write("spec.json", {**content, **identity})

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder for a `with` block and delete unfinished files.

        Raises:
            UserError: If another process uses the folder.
        """
        with lock_folder(self.path, "wait for it or choose another --output"):
            remove_unfinished(self.path, recursive=True)
            yield

    def in_use(self) -> bool:
        """Whether a process has locked the folder."""
        return is_locked(self.path)

    def write_status(self, state: State, **fields: Any) -> None:
        """Replace status.json by a state and fields that explain it, as visible text, such as an error."""
        shown = {name: visible(value) if isinstance(value, str) else value for name, value in fields.items()}
        self._write_status({"state": state, **shown})

    def status(self) -> dict[str, Any]:
        """Read status.json: "state" and the fields written with it."""
        content = self.read("status.json")
        content.pop("counts", None)
        convert(content, {"state": schema.text}, self.path / "status.json")
        return content

    def spec(self) -> dict[str, Any]:
        """Read spec.json: the resolved settings of the run."""
        content = self.read_spec()
        convert(content, schema.SPEC, self.path / "spec.json")
        present = {name: check for name, check in schema.OPTIONAL.items() if name in content}
        convert(content, present, self.path / "spec.json")
        return content

    def environment(self) -> dict[str, Any]:
        """Read env.json: where the run was made."""
        return self.read("env.json")

    def append_points(self, points: Iterable[CurvePoint]) -> None:
        """Append evaluations to curve.jsonl.

        An evaluation of the same stage, step, guidance and protocol is not replaced.
        """
        rows = {_identity(point): point for point in self.points()}
        for point in points:
            rows.setdefault(_identity(point), point)
        self.write_lines("curve.jsonl", list(rows.values()))
        self._update_counts()

    def points(self) -> list[CurvePoint]:
        """Read the evaluations of all stages, in the order they were added."""
        return self.read_lines("curve.jsonl", CurvePoint, schema.POINT, schema.OPTIONAL_POINT)

    def add_stage(self, stage: StageRecord) -> None:
        """Add a finished stage to stages.jsonl, replacing one of the same index."""
        rows = {known.index: known for known in self.stages()} | {stage.index: stage}
        self.write_lines("stages.jsonl", [rows[index] for index in sorted(rows)])
        self._update_counts()

    def stages(self) -> list[StageRecord]:
        """Read the finished stages, ordered by index."""
        return self.read_lines("stages.jsonl", StageRecord, schema.STAGE)

    def add_protocol(self, digest: str, fields: Mapping[str, Any]) -> None:
        """Store the fields behind the hash of an evaluation protocol."""
        known = self.protocols()
        if digest not in known:
            self.write("protocols.json", {"protocols": {**known, digest: fields}})

    def protocols(self) -> dict[str, dict[str, Any]]:
        """Read the evaluation protocols: hash -> fields."""
        if not (self.path / "protocols.json").exists():
            return {}
        fields: Fields = {"protocols": schema.mappings}
        found = convert(self.read("protocols.json"), fields, self.path / "protocols.json")
        return dict(found["protocols"])

    def weights_sha256(self, file: Path) -> str | None:
        """The recorded sha256 of a weight file in a stage's folder; None if schema 2 recorded none.

        Raises:
            UserError: If there is no record of the file, or if two records differ.
        """
        index, _, name = file.parent.name.partition("-")
        found = self.stage(int(index), name).weight_hashes().get(file.name)
        kind, _, step = file.stem.partition("-")
        for stage in self.stages():
            if (stage.index, stage.steps) == (int(index), int(step)) and kind in stage.sha256:
                if found not in (None, stage.sha256[kind]):
                    raise UserError(
                        f"the records of {file} differ: {found} and {stage.sha256[kind]}; {REMEDY}"
                    )
                found = stage.sha256[kind]
        if found is None and self.binding.schema == SCHEMA:
            raise UserError(f"the sha256 of {file} is not recorded, so it is not of this run; {REMEDY}")
        return found

    def record(self) -> RunRecord:
        """Read everything that `compare` needs.

        Raises:
            UserError: If a file is missing or damaged; the message names the file, line and field.
        """
        # Counts are written after the records, and protocols before them: a run may be under way.
        spec, status = self.spec(), self.read("status.json")
        state = convert(status, {"state": schema.text}, self.path / "status.json")["state"]
        record = RunRecord(
            run_id=spec["run_id"],
            path=str(self.path),
            status=state,
            dataset=spec["dataset"],
            backbone=network_name(spec["backbone"]),
            objective=row_label(spec["objective"], spec.get("objective_options", {})),
            recipe=spec["recipe"]["name"],
            options=spec["recipe"]["options"],
            needs=spec["recipe"]["needs"],
            seed=spec["seed"],
            steps=spec["train"]["steps"],
            batch=spec["train"]["batch"],
            precision=spec["train"]["precision"],
            setting_hash=spec["setting_hash"],
            train_hash=spec["train_hash"],
            stages=self.stages(),
            curve=self.points(),
            protocols=self.protocols(),
            spec=spec,
            schema=self.binding.schema,
        )
        if self.binding.schema == SCHEMA:
            fields: Fields = {"counts": schema.section(**dict.fromkeys(COUNTED, schema.whole))}
            require_consistent(record, convert(status, fields, self.path / "status.json")["counts"])
        return record

    def _write_status(self, content: Mapping[str, Any]) -> None:
        counts = {"curve": len(self.points()), "stages": len(self.stages())}
        extra = {"counts": counts} if self.binding.schema == SCHEMA else {}
        self.write("status.json", {**content, **extra})

    def _update_counts(self) -> None:
        if (self.path / "status.json").exists():
            self._write_status(self.status())


def _checked_id(run_id: str) -> str:
    """Return a run id, which a journal may contain, if it is the name of a folder."""
    return check_name(run_id, "the id of a run", length=200)


def _walk(path: Path, seen: set[str] | None = None) -> Iterator[Path]:
    """Find run folders; a folder that links lead to again is searched once."""
    seen = set() if seen is None else seen
    if (path / "spec.json").is_file():
        yield path
        return
    if path.is_dir() and (real := os.path.realpath(path)) not in seen:
        seen.add(real)
        for child in path.iterdir():
            if child.is_dir():
                yield from _walk(child, seen)


def _identity(point: CurvePoint) -> tuple[object, ...]:
    guidance = point.guidance, tuple(point.interval), point.guides
    return point.stage_index, point.step, *guidance, point.protocol
