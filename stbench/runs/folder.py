"""Run folders: their paths, and reading and writing the files in them. No other module knows these paths.

Every write is atomic, so a reader never sees part of a file. The fields of the files are in schema.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from stbench.core.errors import UserError
from stbench.core.files import absolute_path, atomic_write, is_locked, lock_folder, remove_unfinished
from stbench.core.text import check_name
from stbench.runs import schema
from stbench.runs.records import SCHEMA, CurvePoint, RunRecord, StageRecord
from stbench.runs.schema import REMEDY, Fields, convert, parse, plain

RUN_FILES = frozenset(
    {
        *("spec.json", "env.json", "status.json", "curve.jsonl", "stages.jsonl", "protocols.json", ".lock"),
        *("checkpoints", "samples", "tensorboard"),
    }
)
"""What a run folder contains. Users may put other files into it."""
State = Literal["running", "stopped", "failed", "finished"]
Record = TypeVar("Record")


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


def require_no_run_file(path: Path, option: str) -> None:
    """Raise UserError for an output path that stbench itself uses, in a run folder or beside run folders."""
    resolved = Path(os.path.realpath(path))
    for folder in resolved.parents:
        if (folder / "spec.json").is_file() and resolved.relative_to(folder).parts[0] in RUN_FILES:
            raise UserError(
                f"{option} {path} belongs to the run folder {folder}; choose another name, such as "
                f"{path.with_stem('output')}"
            )
    if resolved.name == "sweep.json":
        raise UserError(f"{option} {path} has the name of a sweep's journal; choose another name")


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
        return self.artifacts / fingerprint[:16]

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

    def run_log(self, run_id: str) -> Path:
        """Log of a run that a sweep started. Every attempt appends to it."""
        return self.path / ".logs" / f"{_checked_id(run_id)}.log"


@dataclass(frozen=True)
class StageFolder:
    """The checkpoints of one stage of a run."""

    path: Path

    @property
    def state_index(self) -> Path:
        """JSON file that names the current training state."""
        return self.path / "state.json"

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
        return {int(file.stem.rpartition("-")[2]): file for file in files}


class RunFolder:
    """The files of one run, results/runs/<run-id>/. Writers must hold `lock()`; readers need no lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        """Whether a run was created here."""
        return (self.path / "spec.json").exists()

    def require(self) -> None:
        """Raise UserError if this is not a run folder."""
        if not self.exists():
            raise UserError(
                f"{self.path} is not a run folder (it has no spec.json); `stbench compare` lists run folders"
            )

    def stage(self, index: int, name: str) -> StageFolder:
        """The checkpoints of a stage."""
        return StageFolder(self.path / "checkpoints" / f"{index}-{name}")

    def sample_file(self, index: int, name: str, step: int, scale: float) -> Path:
        """Picture of generated images at an evaluation point."""
        return self.path / "samples" / f"{index}-{name}-{step:08d}-g{scale:g}.png"

    def sample_files(self, index: int) -> list[Path]:
        """The pictures of a stage, in order of steps."""
        return sorted(self.path.glob(f"samples/{index}-*.png"))

    @property
    def tensorboard(self) -> Path:
        """Event files of --tensorboard."""
        return self.path / "tensorboard"

    def create(self, spec: Mapping[str, Any], env: Mapping[str, Any]) -> None:
        """Write env.json, a first status.json and finally spec.json, which makes this a run folder.

        For a run that continues, this replaces spec and environment and keeps the rest.
        """
        self._write("env.json", env)
        if not (self.path / "status.json").exists():
            self.write_status("running")
        self._write("spec.json", spec)

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
        """Replace status.json by a state and fields that explain it, such as an error message."""
        self._write("status.json", {"state": state, **fields})

    def status(self) -> dict[str, Any]:
        """Read status.json: "state" and the fields written with it."""
        return self._read("status.json")

    def spec(self) -> dict[str, Any]:
        """Read spec.json: the resolved settings of the run."""
        return self._read("spec.json")

    def append_points(self, points: Iterable[CurvePoint]) -> None:
        """Append evaluations to curve.jsonl.

        An evaluation of the same stage, step, guidance and protocol is not replaced.
        """
        rows = {_identity(point): point for point in self.points()}
        for point in points:
            rows.setdefault(_identity(point), point)
        self._write_lines("curve.jsonl", list(rows.values()))

    def points(self) -> list[CurvePoint]:
        """Read the evaluations of all stages, in the order they were added."""
        return self._read_lines("curve.jsonl", CurvePoint, schema.POINT)

    def add_stage(self, stage: StageRecord) -> None:
        """Add a finished stage to stages.jsonl, replacing one of the same index."""
        rows = {known.index: known for known in self.stages()} | {stage.index: stage}
        self._write_lines("stages.jsonl", [rows[index] for index in sorted(rows)])

    def stages(self) -> list[StageRecord]:
        """Read the finished stages, ordered by index."""
        return self._read_lines("stages.jsonl", StageRecord, schema.STAGE)

    def add_protocol(self, digest: str, fields: Mapping[str, Any]) -> None:
        """Store the fields behind the hash of an evaluation protocol."""
        known = self.protocols()
        if digest not in known:
            self._write("protocols.json", {"protocols": {**known, digest: fields}})

    def protocols(self) -> dict[str, dict[str, Any]]:
        """Read the evaluation protocols: hash -> fields."""
        if not (self.path / "protocols.json").exists():
            return {}
        content = self._read("protocols.json")
        if not isinstance(content.get("protocols"), dict):
            raise UserError(f"{self.path / 'protocols.json'} has no field 'protocols'; {REMEDY}")
        return dict(content["protocols"])

    def record(self) -> RunRecord:
        """Read everything that `compare` needs.

        Raises:
            UserError: If a file is missing or damaged; the message names the file, line and field.
        """
        spec, file = self.spec(), self.path / "spec.json"
        fields = convert(spec, schema.SPEC, file)
        backbone = convert(fields["backbone"], {"name": schema.text, "size": schema.text}, file)
        recipe = convert(
            fields["recipe"], {"name": schema.text, "options": schema.mapping, "needs": schema.text}, file
        )
        train = convert(
            fields["train"], {"steps": schema.whole, "batch": schema.whole, "precision": schema.text}, file
        )
        return RunRecord(
            run_id=fields["run_id"],
            path=str(self.path),
            status=convert(self.status(), {"state": schema.text}, self.path / "status.json")["state"],
            dataset=fields["dataset"],
            backbone=f"{backbone['name']}-{backbone['size']}",
            objective=fields["objective"],
            recipe=recipe["name"],
            options=recipe["options"],
            needs=recipe["needs"],
            seed=fields["seed"],
            steps=train["steps"],
            batch=train["batch"],
            precision=train["precision"],
            setting_hash=fields["setting_hash"],
            train_hash=fields["train_hash"],
            stages=self.stages(),
            curve=self.points(),
            protocols=self.protocols(),
            spec=spec,
        )

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(plain({"schema": SCHEMA, **content}), indent=1, allow_nan=False)
        atomic_write(self.path / name, text + "\n")

    def _write_lines(self, name: str, records: Sequence[CurvePoint | StageRecord]) -> None:
        rows = [plain({"schema": SCHEMA, **asdict(record)}) for record in records]
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
        if lines:
            atomic_write(self.path / name, "".join(lines))

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            return parse(path.read_bytes(), path)
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}); {REMEDY}") from None

    def _read_lines(self, name: str, cls: Callable[..., Record], fields: Fields) -> list[Record]:
        path = self.path / name
        if not path.exists():
            return []
        *lines, rest = path.read_bytes().split(b"\n")
        if rest or not lines:
            raise UserError(f"{path} line {len(lines) + 1} is cut off; {REMEDY}")
        rows = []
        for number, line in enumerate(lines, start=1):
            where = f"{path} line {number}"
            row = parse(line, where)
            if unknown := sorted(row.keys() - fields.keys()):
                raise UserError(f"{where} has an unknown field '{unknown[0]}'; {REMEDY}")
            rows.append(cls(**convert(row, fields, where)))
        return rows


def _checked_id(run_id: str) -> str:
    """Return a run id, which a journal may contain, if it is the name of a folder."""
    return check_name(run_id, "the id of a run", length=200)


def _walk(path: Path) -> Iterator[Path]:
    if (path / "spec.json").is_file():
        yield path
        return
    if path.is_dir():
        for child in path.iterdir():
            if child.is_dir():
                yield from _walk(child)


def _identity(point: CurvePoint) -> tuple[object, ...]:
    return point.stage_index, point.step, point.guidance, tuple(point.interval), point.protocol
