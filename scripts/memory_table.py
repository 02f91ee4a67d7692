"""Print the tables of docs/scaling.md: memory per GPU and communication per step, computed without a GPU.

python scripts/memory_table.py [BACKBONE] [RECIPE]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from stbench.bench.workload import Case, prepare_case
from stbench.config.build import build_backbone
from stbench.core.registry import load_builtins
from stbench.train.cost import expected_cost
from stbench.train.memory import estimate_memory

SIZES = ("s/2", "b/2", "l/2", "xl/2")
BATCH = 256
LAYOUTS = ((1, False), (8, False), (8, True), (32, False), (32, True))
"""Number of GPUs, and whether parameters, gradients, moments and EMA are sharded."""
LINKS = {"NVLink 4": 450e9, "8 x 400 Gb/s per node": 400e9, "400 Gb/s per node": 50e9}
"""Bytes per second and direction between the GPUs of a ring, or between two nodes."""
GIB = 2**30


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table with right-aligned columns after the first."""
    print("| " + " | ".join(head) + " |")
    print("| :-- |" + " --: |" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def memory_rows(backbone: str, recipe: str, checkpointing: bool) -> list[list[str]]:
    """One row per size: memory in GiB for each layout, at a global batch of 256."""
    rows = []
    for size in SIZES:
        case = Case(
            f"{backbone}-{size}",
            recipe,
            batch=BATCH,
            precision="bf16",
            overrides={"train.checkpointing": checkpointing},
        )
        prepared = prepare_case(case)
        stage = prepared.stages[-1]
        totals = [
            estimate_memory(prepared, stage, devices=devices, shard=shard).total for devices, shard in LAYOUTS
        ]
        rows.append([size, *(f"{total / GIB:.1f}" for total in totals)])
    return rows


def traffic_rows(backbone: str, recipe: str) -> list[list[str]]:
    """One row per size: parameters, FLOPs, bytes that a GPU sends in a step, and the time on each link."""
    rows = []
    for size in SIZES:
        prepared = prepare_case(Case(f"{backbone}-{size}", recipe, batch=BATCH))
        spec, stage = prepared.spec, prepared.stages[-1]
        network = build_backbone(spec.backbone, spec.objective, prepared.dataset, "meta")
        count = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        per_image = expected_cost(prepared, stage, draws=1).total / stage.images
        all_reduce = 2.0 * 4 * count  # times (N - 1) / N
        times = (f"{all_reduce / speed * 1e3:.1f}" for speed in LINKS.values())
        volumes = (f"{volume / GIB:.2f}" for volume in (all_reduce, 1.5 * all_reduce))
        rows.append([size, f"{count / 1e6:.0f}", f"{per_image / 1e9:.0f}", *volumes, *times])
    return rows


def main(backbone: str = "sit", recipe: str = "vanilla") -> None:
    """Print all tables for a backbone under a recipe."""
    load_builtins()
    layouts = [
        f"{devices} GPU{'s' if devices > 1 else ''}{', sharded' if shard else ''}"
        for devices, shard in LAYOUTS
    ]
    for checkpointing in (False, True):
        print(f"{backbone}, {recipe}, GiB per GPU{', with checkpointing' if checkpointing else ''}\n")
        print_table(["size", *layouts], memory_rows(backbone, recipe, checkpointing))
    head = ["size", "million parameters", "GFLOPs per image", "replicated, GiB", "sharded, GiB"]
    print("communication per GPU and step\n")
    print_table([*head, *(f"{link}, ms" for link in LINKS)], traffic_rows(backbone, recipe))


if __name__ == "__main__":
    main(*sys.argv[1:])
