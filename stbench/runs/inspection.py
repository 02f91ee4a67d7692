"""Read what `stbench inspect` writes. Imports no torch, so that a report can show it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from stbench.core.errors import UserError
from stbench.core.safe_load import parse_json, read_text

FILE = "inspect.json"
KIND = "stbench inspect"
"""Value of the field "kind"."""
SCHEMA = 1
MEASURES = {
    "probe": "linear-probe accuracy",
    "norm": "feature norm",
    "effective_rank": "effective rank",
}
"""Field of a block -> its name in words."""
GUIDED_MEASURES = {
    "separation": "class separation",
    "norm": "feature norm",
    "effective_rank": "effective rank",
}
"""Field of the guided features at a scale -> its name in words."""
SIMILARITIES = {"cka": "CKA", "cknna": "CKNNA"}
TEACHER = ":teacher"
"""Name of the teacher where an encoder is named; no encoder has a colon in its name."""

Matrix = list[list[float | None]]
Number = float | None


@dataclass(frozen=True)
class Value:
    """A mean over seeds."""

    mean: float
    std: float | None
    """Standard deviation over seeds; None for one seed."""
    seeds: int


@dataclass(frozen=True)
class Inspection:
    """The contents of inspect.json."""

    settings: Mapping[str, Any]
    """Times, guidance scales, number of neighbours and encoders."""
    runs: Sequence[Mapping[str, Any]]
    """One entry per run or checkpoint, as documented in docs/inspect.md."""

    @property
    def times(self) -> list[float]:
        """The flow-equivalent times."""
        return list(self.settings["times"])

    @property
    def labels(self) -> list[str]:
        """Names of the rows: recipe with its options, and its backbone if there are several."""
        return list(dict.fromkeys(self.label(run) for run in self.runs))

    @property
    def measures(self) -> dict[str, str]:
        """Measures of a block that `by_block` takes, with their names in words."""
        others = {name: f"encoder {name}" for name in self.settings["encoders"]}
        if any(_taught_block(run) is not None for run in self.runs):
            others = {TEACHER: "the teacher's block"} | others
        similar = {
            f"{kind}:{name}": f"{word} to {other}"
            for name, other in others.items()
            for kind, word in SIMILARITIES.items()
        }
        return MEASURES | similar

    def label(self, run: Mapping[str, Any]) -> str:
        """The row of a run. Runs of one row differ in the seed."""
        several = len({each["backbone"] for each in self.runs}) > 1
        return f"{run['backbone']} {run['label']}" if several else str(run["label"])

    def members(self, label: str) -> list[Mapping[str, Any]]:
        """The runs of a row."""
        return [run for run in self.runs if self.label(run) == label]

    def common_step(self) -> int | None:
        """The last step that all runs have; None if there is none."""
        steps = [{point["step"] for point in run["points"]} for run in self.runs]
        return max(set.intersection(*steps), default=None)

    def by_block(self, label: str, measure: str, tau: float, step: int | None) -> list[Value | None]:
        """A measure of each block, over the runs of a row, at a step (None: the last one of each run).

        `measure` is a key of `measures`: a field of a block, or "cka:NAME" and "cknna:NAME" for the
        similarity to an encoder, or to the block of the teacher that the recipe uses.
        """
        columns = [_blocks(run, measure, tau, step) for run in self.members(label)]
        depth = max(map(len, columns))
        return [average([column[i] for column in columns if i < len(column)]) for i in range(depth)]

    def by_step(self, label: str, measure: str, tau: float, block: int) -> dict[float, Value | None]:
        """A measure of one block by training images, over the runs of a row."""
        found: dict[float, list[Number]] = {}
        for run in self.members(label):
            for point in run["points"]:
                column = _blocks(run, measure, tau, point["step"])
                found.setdefault(point["images"], []).append(column[block] if block < len(column) else None)
        return {images: average(values) for images, values in sorted(found.items())}

    def by_scale(self, label: str, measure: str, tau: float) -> dict[float, Value | None]:
        """A measure of the guided features by scale, over the runs of a row; empty without guidance."""
        found: dict[float, list[Number]] = {}
        for run in self.members(label):
            for row in _at(run["guidance"]["times"], tau)["scales"] if run["guidance"] else ():
                found.setdefault(row["scale"], []).append(row[measure])
        return {scale: average(values) for scale, values in sorted(found.items())}


def average(values: Sequence[Number]) -> Value | None:
    """Mean and standard deviation of the values that exist; None without one."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Value(mean(known), stdev(known) if len(known) > 1 else None, len(known))


def map_file(kind: str, name: str) -> str:
    """Return the name of a figure of one subject; `kind` is "maps" or "guiding"."""
    return f"{kind}-{name}.png"


def unique_names(names: Iterable[str]) -> list[str]:
    """Number the repetitions of a name: ["a", "b", "a"] becomes ["a", "b", "a-2"]."""
    counts: Counter[str] = Counter()
    unique = []
    for name in names:
        counts[name] += 1
        unique.append(f"{name}-{counts[name]}" if counts[name] > 1 else name)
    return unique


def read_inspection(path: Path) -> Inspection:
    """Read inspect.json.

    Raises:
        UserError: If it is missing, damaged, or another file.
    """
    try:
        content = parse_json(read_text(path))
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise ValueError(f"expected a file of `{KIND}`")
        if content.get("schema") != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA}, found {content.get('schema')!r:.20}")
        inspection = Inspection(dict(content["settings"]), list(content["runs"]))
        _require_complete(inspection)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); run `stbench inspect` again") from error
    return inspection


def is_inspection(path: Path) -> bool:
    """Whether a file was written by `stbench inspect`."""
    try:
        content = parse_json(read_text(path))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("kind") == KIND


def _require_complete(inspection: Inspection) -> None:
    """Compute all that the methods return; errors are those of a damaged file."""
    for run in inspection.runs:
        texts = [run["name"], run["label"], run["backbone"]]
        numbers = [run["depth"], run["train_images"], run["heldout_images"]]
        numbers += [point[name] for point in run["points"] for name in ("step", "images")]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("expected text as name, label and backbone")
        if not all(type(number) is int for number in numbers):
            raise ValueError("expected whole numbers as steps, images and depth")
    for label in inspection.labels:
        steps = {point["step"] for run in inspection.members(label) for point in run["points"]}
        for tau in inspection.times:
            for measure in inspection.measures:
                for step in (None, *steps):
                    inspection.by_block(label, measure, tau, step)
            for measure in GUIDED_MEASURES:
                inspection.by_scale(label, measure, tau)
    inspection.common_step()


def _blocks(run: Mapping[str, Any], measure: str, tau: float, step: int | None) -> list[Number]:
    points = [point for point in run["points"] if step in (None, point["step"])]
    if not points:
        return []
    entry = _at(points[-1]["times"], tau)
    kind, _, other = measure.partition(":")
    if not other:
        return [block[measure] for block in entry["blocks"]]
    taught = _taught_block(run)
    matrix = entry["to_encoders"].get(other) if other != TEACHER else entry.get("to_teacher")
    if matrix is None or (other == TEACHER and taught is None):
        return [None] * run["depth"]
    return [row[taught if other == TEACHER and taught is not None else 0] for row in matrix[kind]]


def _taught_block(run: Mapping[str, Any]) -> int | None:
    """Return the block of the teacher that the recipe uses; None without a teacher, or if it does not say."""
    return run["teacher"]["block"] if run["teacher"] else None


def _at(times: Sequence[Mapping[str, Any]], tau: float) -> Mapping[str, Any]:
    for entry in times:
        if abs(entry["tau"] - tau) < 1e-9:
            return entry
    raise ValueError(f"time {tau:g} is missing")
