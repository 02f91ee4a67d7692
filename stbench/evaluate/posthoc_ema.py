"""EMA lengths after training (Karras et al. 2024, arXiv:2312.02696, section 3 and appendix C).

A run with `train.posthoc_ema` keeps a second average of the weights, a power-function average, and stores
both at every evaluation point. Each stored average is a known linear combination of the weights theta(t)
after step t, t = 0..T. The combination that another EMA decay would have given is approximated by least
squares as a combination of the stored ones. The paper stores two power-function averages; here, the EMA that
every run has takes the place of one of them. Weightings are exact sums over steps, not integrals over time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from stbench.config.spec import TrainSpec
from stbench.core.errors import UserError
from stbench.evaluate.past_run import PastRun
from stbench.models.weights import load_weights

POSTHOC = "posthoc"
"""Kind of the files with power-function averages."""
RELATIVE_LENGTH = 0.05
"""Relative standard deviation sigma_rel of the power-function average, as in the paper."""
LARGEST_ERROR = 0.05
"""Largest relative error, in the 2-norm over steps, of a weighting that is called by the name of a decay."""
CHUNK = 8192
"""Steps of the least-squares problem in memory at a time."""

Array = npt.NDArray[np.float64]


def power_exponent(relative_length: float) -> float:
    """The exponent gamma with sigma_rel = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))), equation 3."""
    inverse = relative_length**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(np.max(roots.real))


GAMMA = power_exponent(RELATIVE_LENGTH)
"""Exponent of the stored power-function average, 16.97."""


def power_decay(step: int) -> float:
    """Decay of the power-function average at step 1, 2, ...: (1 - 1/step)^(gamma + 1), equation 2."""
    return (1.0 - 1.0 / step) ** (GAMMA + 1.0)


# --- Weightings ---


@dataclass(frozen=True)
class Average:
    """A stored average of the weights."""

    kind: str
    """ "ema" or "posthoc"."""
    step: int


def power_weighting(step: int, times: Array) -> Array:
    """Weight of theta(t) in the power-function average after a step, for each t in `times`.

    It is (t^(gamma+1) - (t-1)^(gamma+1)) / step^(gamma+1), and 0 for t = 0 and t > step.
    """
    upper, lower = times / step, np.maximum(times - 1.0, 0.0) / step
    return np.where(times <= step, upper ** (GAMMA + 1.0) - lower ** (GAMMA + 1.0), 0.0)


class EmaWeighting:
    """Weight of theta(t) in an EMA that starts as a copy of theta(0)."""

    def __init__(self, decay: float, steps: int, *, warmup: bool) -> None:
        """`warmup` is `train.ema_warmup`: the decay of step t is then at most t / (9 + t)."""
        times = np.arange(steps + 1, dtype=np.float64)
        self._decay = np.minimum(decay, times / (9.0 + times)) if warmup else np.full(steps + 1, float(decay))
        self._decay[0] = 0.0  # theta(0) enters whole
        # Sums of logarithms; a decay of 0 counts as one that nothing survives.
        logs = np.log(np.maximum(self._decay, 1e-300))
        logs[0] = 0.0
        self._survival = np.cumsum(logs)

    def __call__(self, step: int, times: Array) -> Array:
        """The weights after a step for each t in `times`."""
        index = times.astype(np.int64)
        kept = np.exp(np.minimum(self._survival[step] - self._survival[index], 0.0))
        return np.where(index <= step, (1.0 - self._decay[index]) * kept, 0.0)


# --- Least squares ---


def fit(
    averages: Sequence[Average], train: TrainSpec, decay: float, steps: int
) -> tuple[dict[Average, float], float]:
    """Fit the EMA of another decay after `steps` steps by a combination of stored averages.

    The coefficients add up to 1, so weights that do not change stay as they are.

    Returns:
        The coefficient of each average, and the relative error of the weighting in the 2-norm.
    """
    stored = EmaWeighting(train.ema_decay, steps, warmup=train.ema_warmup)
    wanted = EmaWeighting(decay, steps, warmup=train.ema_warmup)
    *others, last = averages

    def weighting(average: Average, times: Array) -> Array:
        if average.kind == POSTHOC:
            return power_weighting(average.step, times)
        return stored(average.step, times)

    # One row per step; the triangular factor of all rows so far replaces them.
    factor: Array = np.zeros((0, len(others) + 1))
    size = 0.0
    for times in _chunks(steps):
        base, target = weighting(last, times), wanted(steps, times)
        columns = [weighting(average, times) - base for average in others]
        rows = np.stack([*columns, target - base], axis=1)
        factor = np.asarray(np.linalg.qr(np.vstack([factor, rows]), mode="r"))
        size += float(target @ target)
    matrix, right = factor[:, :-1], factor[:, -1]
    solution = np.linalg.lstsq(matrix, right, rcond=1e-10)[0]
    error = float(np.linalg.norm(matrix @ solution - right)) / size**0.5
    found = {average: float(value) for average, value in zip(others, solution, strict=True)}
    return found | {last: 1.0 - float(solution.sum())}, error


def _chunks(steps: int) -> Iterator[Array]:
    """The times 0..steps in parts."""
    for start in range(0, steps + 1, CHUNK):
        yield np.arange(start, min(start + CHUNK, steps + 1), dtype=np.float64)


# --- Stored averages of a run ---


@dataclass(frozen=True)
class Reconstruction:
    """The EMA weights of a run for another decay."""

    decay: float
    step: int
    error: float
    """Relative error of the weighting."""
    coefficients: dict[Average, float]

    @property
    def label(self) -> str:
        """What the protocol calls these weights."""
        return f"ema {self.decay:.10g} (post hoc)"

    def describe(self) -> str:
        """Return one line on the quality of the reconstruction."""
        return (
            f"EMA decay {self.decay:.10g} after step {self.step}: from {len(self.coefficients)} averages, "
            f"error of the weighting {self.error:.2%}"
        )


def plan(run: PastRun, decays: Sequence[float]) -> list[Reconstruction]:
    """Find how to reconstruct EMA decays from what a run has stored, after its last stored step.

    Raises:
        UserError: If a decay is not in [0, 1), if the run has no stored averages, or if they are too few for
            one of the decays.
    """
    if not decays:
        return []
    for decay in decays:
        if not 0.0 <= decay < 1.0:
            raise UserError(f"--ema-decay must be in [0, 1), got {decay:g}; try --ema-decay 0.999")
    path, stage, train = run.folder.path, run.last_stage, run.prepared.spec.train
    folder = run.folder.stage(stage.index, stage.name)
    files = {kind: folder.weight_files(kind) for kind in (POSTHOC, "ema")}
    steps = sorted(files[POSTHOC].keys() & files["ema"].keys())
    if not steps:
        raise UserError(
            f"{path} has no stored averages for other EMA decays; train it with --set train.posthoc_ema=true"
        )
    averages = [Average(kind, step) for step in steps for kind in (POSTHOC, "ema")]
    found = []
    for decay in decays:
        coefficients, error = fit(averages, train, decay, steps[-1])
        if error > LARGEST_ERROR:
            raise UserError(
                f"EMA decay {decay:g} cannot be reconstructed from the averages at {len(steps)} evaluation "
                f"points (error {error:.0%}, at most {LARGEST_ERROR:.0%}); choose a decay nearer to "
                f"{train.ema_decay:g}, which the run was trained with, or train with more eval.points"
            )
        found.append(Reconstruction(decay, steps[-1], error, coefficients))
    return found


def reconstruct(run: PastRun, wanted: Reconstruction) -> dict[str, Tensor]:
    """Compute reconstructed weights: a state dict on the host.

    Raises:
        UserError: If a stored file is not the one that was recorded.
    """
    stage = run.last_stage
    folder = run.folder.stage(stage.index, stage.name)

    def read(average: Average) -> dict[str, Tensor]:
        file = folder.weights(average.kind, average.step)
        return load_weights(file, run.folder.weights_sha256(file))

    # Differences to the last EMA, summed in double precision, so that what never changed is exact.
    *others, last = wanted.coefficients
    base = read(last)
    total = {name: value.double() for name, value in base.items()}
    for average in others:
        for name, value in read(average).items():
            total[name] += wanted.coefficients[average] * (value.double() - base[name].double())
    return {name: value.to(base[name].dtype) for name, value in total.items()}
