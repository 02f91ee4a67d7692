"""Options that several commands share. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from stbench.cli.completion import complete
from stbench.core import limits
from stbench.core.errors import UserError

RUNS = Path("results/runs")
"""Default folder of run folders."""


class KeepChoice(str, Enum):
    """Choices of --keep."""

    all = "all"
    last = "last"


class TrackChoice(str, Enum):
    """Choices of --track."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"


class VerifyChoice(str, Enum):
    """Choices of --verify."""

    fast = "fast"
    full = "full"


# --- What a run is: `run` and `sweep` ---

Dataset = Annotated[
    str | None,
    typer.Option(help="Data set; default: digits, which is included.", autocompletion=complete("dataset")),
]
Objective = Annotated[
    str | None,
    typer.Option(
        help="Corruption process and regression target; default: the one published for the backbone.",
        autocompletion=complete("objective"),
    ),
]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps of the last stage.")]
Precision = Annotated[
    str | None,
    typer.Option(help="fp32, tf32 or bf16; default: bf16 on a GPU that supports it, otherwise fp32."),
]
EvalGuidance = Annotated[
    str | None, typer.Option(help="Guidance scales to evaluate, separated by commas, such as 1.0,1.5,2.0.")
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        help="Any other option as KEY=VALUE: train.lr=1e-3, recipe.guidance=5, backbone.depth=4, "
        "eval.seed=1; repeatable.",
    ),
]
Keep = Annotated[
    KeepChoice, typer.Option(help="EMA weights to keep: those of all evaluation points, or only the last.")
]

# --- Where and with what ---

Output = Annotated[Path, typer.Option(help="Folder that contains the run folders.")]
Plugins = Annotated[
    list[Path], typer.Option("--plugin", help="Python file of a plug-in; repeatable. See docs/plugins.md.")
]
AllowChangedPlugin = Annotated[
    bool,
    typer.Option(
        "--allow-changed-plugin", help="Accept a plug-in that differs from the one the run was trained with."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Devices = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=limits.MAX_RANKS,
        help="Number of GPUs to use (with --device cpu: of processes), one rank each. Leave it out under "
        "torchrun and srun, which set it.",
    ),
]
Original = Annotated[
    str | None,
    typer.Option(
        help="Repository that the checkpoint comes from, if its keys are ambiguous: dit, sit, repa, sra, "
        "layersync, dispersive, self-transcendence, internal-guidance, uvit-discrete, uvit-continuous."
    ),
]

Verify = Annotated[
    VerifyChoice,
    typer.Option(
        help="Compare the data with their recorded hashes: fast, once per machine; or full, now in any case."
    ),
]

# --- How images are measured: `run`, `evaluate` and `data statistics` ---

Inception = Annotated[
    Path | None, typer.Option(help="Inception weights; default: the file in the torch hub cache.")
]
InceptionSha256 = Annotated[
    str | None,
    typer.Option(help="First digits of the sha256 of the Inception weights; default: the published file's."),
]
EmaDecays = Annotated[
    list[float],
    typer.Option(help="EMA decay to reconstruct, of a run with train.posthoc_ema=true; repeatable."),
]
Dino = Annotated[Path | None, typer.Option(help="DINOv2 weights; adds FD-DINOv2.")]
Fdr = Annotated[
    str | None,
    typer.Option("--fdr", help="Extractors of FDr, separated by commas; fdr6 for the six published ones."),
]
MeasureBatch = Annotated[int, typer.Option(min=1, max=limits.MAX_BATCH, help="Images measured at a time.")]


def finite(value: Any) -> Any:
    """Callback of an option with real numbers: refuse NaN and infinity, which no range excludes."""
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"expected finite numbers, got {number}")
    return value


def inception_settings(file: Path | None, sha256: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of --inception and --inception-sha256, by dotted name.

    Raises UserError if `settings`, those of --set, choose another extractor.
    """
    from stbench.data.spec import INCEPTION

    if file is None and sha256 is None:
        return {}
    if settings.get("eval.extractor", INCEPTION) != INCEPTION:
        raise UserError(
            f"--inception gives the weights of {INCEPTION}, but eval.extractor is another one; "
            f"give its weights with --set eval.extractor_file=FILE"
        )
    found = {"extractor": INCEPTION, "extractor_file": file and str(file), "extractor_sha256": sha256}
    return {f"eval.{name}": value for name, value in drop_missing(found).items()}


def drop_missing(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given: those that are not None."""
    return {name: value for name, value in values.items() if value is not None}
