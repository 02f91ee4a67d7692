"""Evaluate the stored weights of a past run under other settings."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from stbench.config.spec import EvalSpec
from stbench.core.memory import keep_freed_memory
from stbench.core.world import ALONE, World
from stbench.evaluate.past_run import PastRun
from stbench.evaluate.points import PointEvaluator
from stbench.evaluate.posthoc_ema import Reconstruction, reconstruct
from stbench.runs.records import CurvePoint


def evaluate_again(
    run: PastRun,
    settings: EvalSpec,
    device: torch.device,
    world: World = ALONE,
    *,
    reconstruction: Reconstruction | None = None,
) -> Sequence[CurvePoint]:
    """Evaluate the stored weights of a run's last stage under other settings; returns the added rows.

    With a `reconstruction`, the EMA weights of that decay are evaluated, after its step only.
    """
    spec = run.prepared.spec.model_copy(update={"eval": settings})
    prepared, stage = replace(run.prepared, spec=spec), run.last_stage
    known = {(p.stage_index, p.step): p for p in run.folder.record().curve}
    added: list[CurvePoint] = []
    if device.type == "cpu":
        keep_freed_memory()
    with contextlib.ExitStack() as stack:
        world.from_main(lambda: stack.enter_context(run.folder.lock()) and None)
        dataset = prepared.dataset.to(device)
        evaluator = PointEvaluator(
            prepared,
            stage,
            run.folder,
            dataset=dataset,
            device=device,
            world=world,
            changed=run.changed,
            weights="ema" if reconstruction is None else reconstruction.label,
        )
        files = run.point_files()
        for step in files if reconstruction is None else [reconstruction.step]:
            before = known.get((stage.index, step))
            if before is not None:  # only points that training has reached have a cost
                network = run.load(files[step])
                if reconstruction is not None:
                    network.load_state_dict(reconstruct(run, reconstruction))
                network = network.to(device)
                added += evaluator.evaluate(network, step, seconds=before.seconds, flops=before.flops)
    return added
