"""The data of the section on features: what `stbench inspect` measured, averaged over seeds, and its maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stbench.core.text import visible
from stbench.report.numbers import short
from stbench.report.pictures import Album
from stbench.runs.inspection import (
    FILE,
    GUIDED_MEASURES,
    Inspection,
    Value,
    map_file,
    read_inspection,
    unique_names,
)

Tree = dict[str, Any]

MAPS = {
    "maps": "principal components of the tokens, blocks by evaluations",
    "guiding": "principal components of the features that can guide",
}
"""Kind of figure -> its description."""


def inspection_file(path: Path) -> Path:
    """Return the file of an inspection, which may be given as its folder."""
    return path / FILE if path.is_dir() else path


def features_content(file: Path, album: Album | None) -> Tree:
    """Return the data of the section.

    Args:
        file: The file written by `stbench inspect`, with its figures beside it.
        album: Takes the pictures; None for a page without pictures.

    Raises:
        UserError: If the file is missing or damaged.
    """
    found = read_inspection(file)
    labels = found.labels
    return {
        "times": found.times,
        "rows": [visible(label) for label in labels],
        "measures": {visible(key): visible(words) for key, words in found.measures.items()},
        "guided_measures": GUIDED_MEASURES,
        "common_step": found.common_step(),
        "points": {
            visible(key): [[_points(found, label, key, tau) for label in labels] for tau in found.times]
            for key in found.measures
        },
        "scales": {
            key: [
                [_columns("scale", found.by_scale(label, key, tau)) for label in labels]
                for tau in found.times
            ]
            for key in GUIDED_MEASURES
        },
        "notes": _notes(found),
        "maps": _maps(found, file.parent, album) if album else [],
    }


def _points(found: Inspection, label: str, measure: str, tau: float) -> list[Tree]:
    """Return a measure of all blocks of a row at every step: {step, images, mean: [block], std: [block]}."""
    steps = {point["step"]: point["images"] for run in found.members(label) for point in run["points"]}
    return [
        {"step": step, "images": images, **_statistics(found.by_block(label, measure, tau, step))}
        for step, images in sorted(steps.items())
    ]


def _columns(name: str, values: Mapping[float, Value | None]) -> Tree:
    return {name: list(values), **_statistics(list(values.values()))}


def _statistics(values: Sequence[Value | None]) -> Tree:
    return {
        "mean": [None if value is None else short(value.mean) for value in values],
        "std": [None if value is None else short(value.std) for value in values],
    }


def _notes(found: Inspection) -> list[str]:
    """Say how many images and seeds there are, and of which network the guided features are."""
    counts = {(run["train_images"], run["heldout_images"]) for run in found.runs}
    notes = [f"Probes: {train} training and {heldout} held-out images." for train, heldout in sorted(counts)]
    seeds = {label: len(found.members(label)) for label in found.labels}
    notes.append(f"Seeds: {', '.join(f'{label} {count}' for label, count in seeds.items())}.")
    sources: dict[str, None] = {}
    for run in found.runs:
        if guidance := run["guidance"]:
            owner = "the run itself" if guidance["network"] == "own" else f"the teacher {guidance['network']}"
            sources[f"{found.label(run)}: block {guidance['block']} of {owner}"] = None
    if sources:
        notes.append(f"Guided features: {'; '.join(sources)}.")
    return [visible(note) for note in notes]


def _maps(found: Inspection, folder: Path, album: Album) -> list[Tree]:
    """Return the figures of each run: {title, pictures: [[description, data URI]]}."""
    sets = []
    for name in unique_names(str(run["name"]) for run in found.runs):
        if Path(name).name != name:  # the name of another folder's file
            continue
        files = {words: folder / map_file(kind, name) for kind, words in MAPS.items()}
        pictures = [(words, album.embed(file)) for words, file in files.items() if file.exists()]
        if kept := [[words, uri] for words, uri in pictures if uri]:
            sets.append({"title": visible(name), "pictures": kept})
    return sets
