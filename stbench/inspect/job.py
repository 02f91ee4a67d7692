"""Inspect several runs and checkpoints: measure them, and write inspect.json and the figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stbench import __version__
from stbench.core.files import atomic_write
from stbench.inspect import figures
from stbench.inspect.maps import guiding_maps, middle_time, progress_maps
from stbench.inspect.measure import NEIGHBOURS, Images, Settings, load_images, measure
from stbench.inspect.subjects import Subject
from stbench.models.encoders import DIGITS, EncoderSpec, find_encoder
from stbench.runs.inspection import FILE, KIND, SCHEMA, Inspection, map_file, read_inspection, unique_names


@dataclass(frozen=True)
class Files:
    """The files of one inspection, in one folder."""

    folder: Path
    names: tuple[str, ...]
    """Names of the subjects, which differ."""
    maps: bool
    """Whether there are figures of PCA maps."""

    @property
    def report(self) -> Path:
        """The JSON file."""
        return self.folder / FILE

    def figure(self, kind: str) -> Path:
        """A figure that compares all subjects: "blocks", "training" or "guidance"."""
        return self.folder / f"{kind}.png"

    def map(self, kind: str, name: str) -> Path:
        """A figure of one subject: "maps" or "guiding"."""
        return self.folder / map_file(kind, name)

    def all(self) -> list[Path]:
        """All paths that may be written."""
        pictures = [self.map(kind, name) for kind in ("maps", "guiding") for name in self.names]
        shared = [self.figure(kind) for kind in ("blocks", "training", "guidance")]
        return [self.report, *shared, *(pictures if self.maps else [])]


def plan_files(folder: Path, subjects: Sequence[Subject], *, maps: bool) -> Files:
    """Name the files that `inspect` writes; subjects of equal names are numbered."""
    return Files(folder, tuple(unique_names(subject.name for subject in subjects)), maps)


def choose_encoders(subject: Subject, given: Sequence[EncoderSpec]) -> list[EncoderSpec]:
    """The encoders to compare with: those given, the run's own, and the shipped one for the digits."""
    shipped = [find_encoder(DIGITS)] if subject.dataset.name == DIGITS else []
    found = {spec.name: spec for spec in (*given, *subject.encoders, *shipped) if spec.kind != "cached"}
    return list(found.values())


def inspect(
    subjects: Sequence[Subject],
    settings: Settings,
    encoders: Sequence[EncoderSpec],
    files: Files,
    progress: Callable[[str], None],
) -> Inspection:
    """Measure all subjects, write the files and return what was written to the JSON file.

    Raises:
        UserError: If a step has no weights, an encoder does not fit, or there are too few held-out images.
    """
    runs: list[dict[str, Any]] = []
    used: dict[str, None] = {}
    opened: dict[tuple[str, ...], Images] = {}
    files.folder.mkdir(parents=True, exist_ok=True)
    for subject, name in zip(subjects, files.names, strict=True):
        specs = choose_encoders(subject, encoders)
        used |= dict.fromkeys(spec.name for spec in specs)
        # Runs on the same data share the images and the tokens of the encoders.
        key = (subject.dataset.fingerprint, str(subject.info.tokens), *(spec.name for spec in specs))
        if key not in opened:
            opened[key] = load_images(subject, settings, specs)
        images = opened[key]
        runs.append(measure(subject, images, settings, progress))
        if files.maps:
            found = progress_maps(subject, images, settings, progress)
            figures.plot_progress(found, name, files.map("maps", name))
            guiding = guiding_maps(subject, images, settings, progress)
            figures.plot_guiding(guiding, name, files.map("guiding", name))

    content = {
        "kind": KIND,
        "schema": SCHEMA,
        "version": __version__,
        "settings": {
            "times": list(settings.times),
            "scales": list(settings.scales),
            "neighbours": NEIGHBOURS,
            "encoders": list(used),
        },
        "runs": runs,
    }
    atomic_write(files.report, json.dumps(content, indent=1, allow_nan=False) + "\n")
    inspection = read_inspection(files.report)
    tau = middle_time(settings)
    figures.plot_blocks(inspection, tau, files.figure("blocks"))
    figures.plot_training(inspection, tau, files.figure("training"))
    if any(run["guidance"] for run in runs):
        figures.plot_guidance(inspection, tau, files.figure("guidance"))
    return inspection
