"""Report pages of synthetic runs, and reading them back."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from stbench.compare.build import build_leaderboard
from stbench.report.page import render_page
from stbench.runs.folder import RunFolder
from stbench.runs.records import RunRecord
from tests.fake_runs import LONG_STEPS, write_run

GUIDED = {1.5: 0.3, 2.0: 0.4}


@patch.object(os, "fsync", lambda file: None)  # durable writes take most of the time
def write_runs(root: Path) -> list[RunRecord]:
    """Write three recipes with three seeds, of which `taught` has an earlier stage; the first has samples."""
    records = []
    for seed, f in enumerate((1.0, 1.06, 0.97)):
        plain = [10.0 * f, 3.0 * f, 0.9 * f, 0.45 * f]
        records += [
            write_run(root, "vanilla", seed, plain, steps=LONG_STEPS, guided=GUIDED),
            write_run(root, "aligned", seed, [value * 0.8 for value in plain], steps=LONG_STEPS),
            write_run(root, "taught", seed, [value * 0.5 for value in plain], steps=LONG_STEPS, teacher=800),
        ]
    for step in (200, 400, 800):
        write_sample(records[0], step)
    return records


def write_sample(record: RunRecord, step: int, scale: float = 1.0) -> Path:
    """Write a picture of samples: noise that depends on the step, and is as large as a real picture."""
    path = RunFolder(Path(record.path)).sample_file(record.final_stage, "self-transcendence", step, scale)
    path.parent.mkdir(exist_ok=True)
    image = io.BytesIO()
    Image.fromarray(np.random.default_rng(step).integers(0, 256, (64, 64), np.uint8)).save(image, "png")
    path.write_bytes(image.getvalue())
    return path


def write_inspection(folder: Path, **changes: Any) -> Path:
    """Write what `stbench inspect` does: two seeds of `taught` and one of `vanilla`, and maps of two runs."""
    runs = [_inspected("vanilla", 0, 0.0), _inspected("taught", 0, 0.2), _inspected("taught", 1, 0.3)]
    settings = {"times": [0.25, 0.5], "scales": [0.0, 1.0, 10.0], "encoders": ["digits"], "neighbours": 10}
    content = {"kind": "stbench inspect", "schema": 1, "settings": settings, "runs": runs} | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "inspect.json").write_text(json.dumps(content))
    for run in content["runs"][:2]:
        image = io.BytesIO()
        Image.new("RGB", (640, 160), "teal").save(image, "png")
        (folder / f"maps-{Path(run['name']).name}.png").write_bytes(image.getvalue())
    return folder / "inspect.json"


def _inspected(recipe: str, seed: int, gain: float) -> dict[str, Any]:
    """An entry of "runs" with three blocks; the probe of block b at step s is 0.1 + b / 10 + gain s / 200."""

    def at(tau: float, step: int) -> dict[str, Any]:
        blocks = [
            {"block": b, "probe": 0.1 + b / 10 + gain * step / 200, "norm": 10.0 * tau, "effective_rank": 4.0}
            for b in range(3)
        ]
        similar = {"cka": [[0.5], [0.6], [None]], "cknna": [[0.1], [0.2], [0.3]]}
        return {"tau": tau, "blocks": blocks, "to_encoders": {"digits": similar}}

    scales = [
        {"scale": w, "separation": w + 0.5, "norm": 1.0, "effective_rank": 2.0} for w in (0.0, 1.0, 10.0)
    ]
    guidance = {"network": "own", "block": 1, "used": None}
    return {
        "name": f"digits-{recipe}-s{seed}", "label": recipe, "backbone": "sit-ti/2", "dataset": "digits",
        "seed": seed, "depth": 3, "train_images": 60, "heldout_images": 40, "teacher": None,
        "points": [
            {"step": step, "images": 64 * step, "times": [at(tau, step) for tau in (0.25, 0.5)]}
            for step in (100, 200)
        ],
        "guidance": guidance | {"times": [{"tau": tau, "scales": scales} for tau in (0.25, 0.5)]},
    }  # fmt: skip


def render(records: list[RunRecord], **options: Any) -> str:
    """Return the page of runs."""
    return render_page(build_leaderboard(records), records, **options)


def data_of(page: str) -> dict[str, Any]:
    """Return the data in a page."""
    found = re.search(r'<script type="text/plain" id="data">(.*?)</script>', page)
    assert found
    return json.loads(zlib.decompress(base64.b64decode(found[1])))


class Tags(HTMLParser):
    """The elements of a page with their attributes, and its text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not self.found or self.found[-1][0] not in ("script", "style"):
            self.text += data
