"""Write the README.md of a folder of `stbench bench` results; used by scripts/gpu_report.sh.

python scripts/throughput_table.py FOLDER
python scripts/throughput_table.py --device-name cuda
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

COLUMNS = (
    "case",
    "images/s",
    "ms per step",
    "GFLOPs per image",
    "of matmul peak",
    "peak memory, GiB",
    "x plain loop",
)

LAST_LINES = 40
"""Lines of the logs of tests and digits that the report contains."""


def device_name(device: str) -> str:
    """The name of a device as a part of a path, such as "NVIDIA-H200"."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: found no CUDA device; use --tiny to test this script on the CPU")
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def table(rows: list[list[str]]) -> list[str]:
    """A Markdown table with right-aligned columns after the first."""
    head = ["| " + " | ".join(COLUMNS) + " |", "| :-- |" + " --: |" * (len(COLUMNS) - 1)]
    return head + ["| " + " | ".join(row) + " |" for row in rows]


def cells(result: dict[str, Any]) -> list[str]:
    """One measured case as the cells of a row."""
    case, ratio = result["case"], result["ratio_to_plain"]
    words = f"{case['backbone']} {case['recipe']}, batch {result['batch']}, {case['precision']}"
    return [
        words + (", compiled" if case["compile"] else ""),
        f"{result['images_per_second']:.4g}",
        f"{1e3 * result['step_seconds']:.4g}",
        f"{result['flops_per_image'] / 1e9:.4g}",
        f"{result['peak_share']:.0%}",
        f"{result['peak_memory'] / 2**30:.2f}",
        "-" if ratio is None else f"{ratio:.2f}",
    ]


def write_report(folder: Path) -> None:
    """Write FOLDER/README.md from the JSON files and the steps that have ended."""
    reports = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    lines = [f"# Throughput: {folder.name}", "", "Written by `scripts/gpu_report.sh`.", ""]
    if reports:
        found = reports[0]["environment"]
        versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
        lines += [f"Device: {found['hardware']}. Versions: {versions}. Git: {found['git_revision']}.", ""]
        lines += [*table([cells(result) for report in reports for result in report["results"]]), ""]
    steps = (folder / "steps.txt").read_text().splitlines() if (folder / "steps.txt").exists() else []
    lines += ["## Commands", ""]
    for name, seconds, outcome, command in (line.split("\t", 3) for line in steps):
        lines += [f"- {name}: {outcome}, {seconds} s", f"  `{command}`"]
    for name in ("tests", "digits"):
        log = folder / f"{name}.log"
        if log.exists():
            lines += [
                "",
                f"## {name.capitalize()}",
                "",
                "```",
                *log.read_text().splitlines()[-LAST_LINES:],
                "```",
            ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--device-name":
        print(device_name(sys.argv[2]))
    else:
        write_report(Path(sys.argv[1]))
