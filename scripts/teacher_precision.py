"""Compare teachers in float32 with teachers in bfloat16: final FID of paired runs on the digits.

    python scripts/teacher_precision.py --steps 300 --seeds 100 101 102 103 104 --output results/precision

Self-Transcendence with SiT-Ti and a bf16 student. The first stage has no teacher, so both runs of a pair
share its weights. FID is that of the final EMA weights without guidance, as in `stbench run`. The figures are
written after every pair.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from scipy import stats

from stbench.config.build import build_backbone, build_objective
from stbench.config.plan import PreparedRun, prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.core.backbone import Backbone
from stbench.core.files import atomic_write
from stbench.core.recipe import Artifact
from stbench.core.registry import load_builtins
from stbench.core.rng import key
from stbench.diffusion.sample import Guidance
from stbench.evaluate.extractors import run_extractor
from stbench.evaluate.generate import generate
from stbench.evaluate.metrics import compute_metrics
from stbench.train.step import StageModel, make_optimizer, training_step

CPU = torch.device("cpu")
CACHE = tempfile.TemporaryDirectory()
"""Statistics of the reference images."""


def train_stage(prepared: PreparedRun, index: int, earlier: dict[str, Artifact]) -> Backbone:
    """The EMA network of a stage, trained as in `stbench run`."""
    spec, stage = prepared.spec, prepared.stages[index]
    student = build_backbone(spec.backbone, spec.objective, prepared.dataset, seed=key(spec.seed, "backbone"))
    model = StageModel(
        student,
        stage.definition.supervision(earlier),
        build_objective(spec.objective),
        seed=spec.seed,
        dataset_size=prepared.dataset.size,
    )
    model.prepare(CPU, spec.train, stage.steps)
    optimizer = make_optimizer(model.trained_parameters(), spec.train, CPU)
    for step in range(stage.steps):
        training_step(model, optimizer, prepared.dataset, spec.train, seed=spec.seed, step=step, device=CPU)
    return model.ema


def fid(prepared: PreparedRun, network: Backbone) -> float:
    """FID of a network under the evaluation settings of the run."""
    settings = prepared.spec.eval
    images, labels, _ = generate(
        network,
        build_objective(prepared.spec.objective),
        prepared.dataset,
        n=settings.samples,
        labels=settings.labels,
        seed=settings.seed,
        sampler=settings.sampler,
        steps=settings.steps,
        guidance=Guidance(1.0, *settings.interval, channels=settings.channels),
        device=CPU,
    )
    extractor = run_extractor(prepared.dataset, settings)
    return compute_metrics(
        images,
        prepared.dataset,
        ("fid",),
        cache_dir=Path(CACHE.name),
        labels=labels,
        device=CPU,
        extractor=extractor,
    )["fid"]


def pair(seed: int, steps: int) -> dict[str, float]:
    """Final FIDs of one seed by precision of the teacher."""

    def planned(precision: str) -> PreparedRun:
        request = RunRequest(
            "sit",
            "self-transcendence",
            steps=steps,
            seed=seed,
            precision="bf16",
            overrides={"train.teacher_precision": precision},
        )
        return prepare(resolve(request))

    plan = planned("fp32")
    teacher = train_stage(plan, 0, {})
    first = plan.stages[0]
    earlier = {
        first.name: Artifact(
            first.name, "", "", {}, first.steps, first.images, 0.0, 0.0, lambda weights: teacher
        )
    }
    found = {}
    for precision in ("fp32", "bf16"):
        run = planned(precision)
        found[precision] = fid(run, train_stage(run, 1, earlier))
    return found


def summary(pairs: dict[int, dict[str, float]]) -> dict[str, float]:
    """Paired t-test on the logarithms of the FID ratios bf16 : fp32."""
    logs = [math.log(row["bf16"] / row["fp32"]) for row in pairs.values()]
    if len(logs) < 2:
        return {}
    mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    half = float(stats.t.ppf(0.975, len(logs) - 1)) * error
    p = float(stats.ttest_1samp(logs, 0.0).pvalue)
    low, high = math.exp(mean - half), math.exp(mean + half)
    return {"ratio": math.exp(mean), "ratio_low": low, "ratio_high": high, "p": p}


def main() -> None:
    """Train the pairs and write their figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102, 103, 104])
    parser.add_argument("--output", type=Path, default=Path("results/precision"))
    options = parser.parse_args()
    load_builtins()
    options.output.mkdir(parents=True, exist_ok=True)
    pairs: dict[int, dict[str, float]] = {}
    for seed in options.seeds:
        pairs[seed] = pair(seed, options.steps)
        content = {
            "command": shlex.join(["python", *sys.argv]),
            "torch": torch.__version__,
            "steps": options.steps,
            "fid": pairs,
            "bf16 : fp32": summary(pairs),
        }
        atomic_write(options.output / "teacher-precision.json", json.dumps(content, indent=1) + "\n")
        print(seed, pairs[seed], summary(pairs), flush=True)


if __name__ == "__main__":
    main()
