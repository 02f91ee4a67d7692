"""Scores of images against a reference for `stbench evaluate`: networks, scores, and the printed table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stbench.cli.outputs import require_outputs
from stbench.core.errors import UserError
from stbench.core.outputs import Output
from stbench.core.text import print_line, visible

if TYPE_CHECKING:
    from stbench.evaluate.feature_networks import FeatureNetwork, NetworkFiles
    from stbench.evaluate.image_sets import ImageSet
    from stbench.evaluate.scores import ScoreReport


@dataclass(frozen=True)
class MeasureOptions:
    """How images are measured: the feature networks, the batch size, the device, ADM's rounding, FDr."""

    files: NetworkFiles
    batch: int
    device: str
    adm_fp16: bool = False
    ratio: tuple[str, ...] = ()
    """Extractors of FDr."""
    validation: Path | None = None
    """Real images outside the reference, for FDr."""

    def networks(self) -> list[FeatureNetwork]:
        """Load the networks on the device. Raises UserError for missing weights."""
        from stbench.core.device import pick_device
        from stbench.evaluate.ratio_networks import load_networks

        return load_networks(self.files, self.ratio, pick_device(self.device))


def ratio_options(fdr: str | None, validation: Path | None, reference: Path | None) -> tuple[str, ...]:
    """Return the extractors that --fdr names. Raises UserError without the options that it needs."""
    from stbench.data.spec import ratio_extractors

    if fdr is not None and reference is None:
        raise UserError(f"--fdr requires --reference; for a run's own data, type --set eval.fdr={fdr}")
    if (fdr is None) != (validation is None):
        raise UserError(
            "expected --fdr EXTRACTORS and --validation IMAGES together; add the other one, or drop both"
        )
    return tuple(ratio_extractors(fdr.split(","))) if fdr is not None else ()


def score_files(samples: Path, reference: Path, output: Path | None, measure: MeasureOptions) -> None:
    """Score images against a reference, write the scores as JSON and print them."""
    from stbench.evaluate.score_images import is_scores, open_samples, scores_file

    files = measure.files
    target = output or scores_file(samples, "0" * 8)
    inputs = [samples, reference, measure.validation, files.inception, files.dino]
    require_outputs([Output(target, is_own=is_scores)], inputs)
    print_ignored(open_samples(samples, reference, measure.validation))
    score_and_print(samples, reference, output, measure.networks(), measure)


def score_and_print(
    samples: Path,
    reference: Path,
    output: Path | None,
    networks: Sequence[FeatureNetwork],
    measure: MeasureOptions,
) -> None:
    """Score images against a reference with loaded networks, as `score_files`."""
    from stbench.cli.progress import transient_progress_bar
    from stbench.core.device import pick_device
    from stbench.evaluate.score_images import score_images

    scores, target = score_images(
        samples,
        reference,
        networks,
        output,
        batch=measure.batch,
        adm_fp16=measure.adm_fp16,
        device=pick_device(measure.device),
        validation=measure.validation,
        ratio=measure.ratio,
        progress=transient_progress_bar,
    )
    _print_scores(scores, target)


def print_ignored(images: ImageSet) -> None:
    """Print which files of a folder are not images, on standard error."""
    if images.ignored:
        others = ", ".join(f"{count} {suffix}" for suffix, count in sorted(images.ignored.items()))
        print_line(f"ignored, not images: {others}", error=True)


def _print_scores(scores: ScoreReport, target: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from stbench.evaluate.scores import SCORES, full_names

    title = f"{scores.protocol['samples']}: {scores.protocol['count']} images"
    table = Table("score", "value", "meaning", title=Text(visible(title)))
    for name, full in full_names(scores.protocol).items():
        if full in scores.metrics:
            table.add_row(full, f"{scores.metrics[full]:.5g}", Text(SCORES[name]))
    Console().print(table)
    for warning in scores.warnings:
        print_line(f"warning: {warning}", error=True)
    print_line(f"scores and protocol: {target}")
