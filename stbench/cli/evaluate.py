"""`stbench evaluate SAMPLES --reference REF` and `stbench data statistics`: measure, print, write JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from stbench.config.overrides import parse_set
from stbench.config.resolve import evaluation_spec, parse_scales
from stbench.config.spec import EvalSpec
from stbench.core.device import pick_device, pick_devices
from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.core.registry import load_builtins
from stbench.evaluate import past_run, points
from stbench.evaluate.feature_networks import INCEPTION_SHA256, Network, load_dino, load_inception
from stbench.evaluate.image_sets import ImageSet, open_images
from stbench.evaluate.past_run import open_run
from stbench.evaluate.reference import load_reference, size_of, write_statistics
from stbench.evaluate.sample_job import Asked, draw
from stbench.evaluate.sample_parts import settings_of
from stbench.evaluate.sample_source import Origin
from stbench.evaluate.scores import SCORES, Verdict, full_name, require_comparable, score
from stbench.evaluate.statistics import survey
from stbench.runs.folder import RunFolder
from stbench.runs.records import SCHEMA
from stbench.train.progress import point_line


@dataclass(frozen=True)
class Measuring:
    """The options that `evaluate --reference` and `data statistics` share."""

    inception: Path | None = None
    """Weights; None for the file in torch hub's cache."""
    inception_sha256: str = INCEPTION_SHA256
    dino: Path | None = None
    """Weights; None for no FD-DINOv2."""
    batch: int = 64
    device: str = "auto"

    @classmethod
    def of(cls, weights: Mapping[str, Any], batch: int, device: str) -> Measuring:
        """From options of the command line, None where one was not given."""
        given = {name: value for name, value in weights.items() if value is not None}
        return cls(**given, batch=batch, device=device)

    def open(self) -> list[Network]:
        """The networks on their device."""
        device = pick_device(self.device)
        networks: list[Network] = [load_inception(self.inception, self.inception_sha256)]
        if self.dino is not None:
            networks.append(load_dino(self.dino))
        return [network.to(device) for network in networks]


@dataclass(frozen=True)
class Protocol:
    """The options of `stbench evaluate` that are for a run."""

    guidance: str | None
    samples: int | None
    overrides: Sequence[str]


def evaluate_samples(
    samples: Path, reference: Path | None, output: Path | None, measuring: Measuring, protocol: Protocol
) -> None:
    """What `stbench evaluate` does with a run, with or without a reference, and with images."""
    run = RunFolder(samples).exists()
    if reference is None:
        if not run and samples.exists():
            raise UserError(f"{samples} is no run folder; images are measured against --reference REF")
        device = measuring.device
        evaluate(samples, protocol.guidance, protocol.samples, protocol.overrides, device)
    elif run:
        if output is not None:
            raise UserError("a run's scores go to its folder evaluation/; leave --output out")
        _evaluate_run(samples, reference, measuring, protocol)
    else:
        if protocol != Protocol(None, None, []):
            raise UserError(
                f"{samples} is no run folder: leave out --samples, --eval-guidance and --set, "
                "which are for a run"
            )
        evaluate_images(samples, reference, output, measuring)


def evaluate_images(samples: Path, reference: Path, output: Path | None, measuring: Measuring) -> Verdict:
    """Measure a finished set of samples against a reference; prints the scores and writes them as JSON.

    Without `output` they go beside the samples; scores against another reference stay.

    Raises UserError for whatever is missing, before the first image is measured where that can be.
    """
    if samples.name in ("", ".."):  # such as `stbench evaluate .`
        samples = samples.resolve()
    images = open_images(samples)
    _require_reference(reference)
    require_comparable(str(samples), len(images), images.size, str(reference), size_of(reference))
    _say_ignored(images)
    networks = measuring.open()
    device = pick_device(measuring.device)
    options: dict[str, Any] = {"batch": measuring.batch, "device": device}
    with _progress("reference") as report:
        real = load_reference(reference, networks, report=report, **options)
    with _progress("samples") as report:
        found = survey(images, networks, report=report, **options)
    verdict = score(found, real, device)
    settings = settings_of(samples)
    protocol = {
        **verdict.protocol,
        "networks": {space: network.label for network in networks for space in network.spaces},
        "rounding": (settings or {}).get("rounding", "not known: the samples are not from `stbench sample`"),
        "sampling": settings,
    }
    verdict = Verdict(verdict.metrics, protocol, verdict.warnings)
    target = output or _beside(samples, real.digest)
    _write(target, verdict)
    _print(verdict, target)
    return verdict


def _beside(samples: Path, digest: str) -> Path:
    """`<samples>.json`; where that holds scores against another reference, the digest is in the name."""
    name = samples.name.removesuffix(".npz")
    first = samples.parent / f"{name}.json"
    if not first.exists():
        return first
    try:
        same = json.loads(first.read_text())["protocol"]["reference_sha256"] == digest
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    return first if same else samples.parent / f"{name}-{digest[:8]}.json"


def _evaluate_run(run: Path, reference: Path, measuring: Measuring, protocol: Protocol) -> None:
    """Draw from a run at every guidance scale, into its folder, and measure that; resumes like `sample`."""
    _require_reference(reference)
    measuring.open()  # missing weights are told before hours of sampling
    settings = evaluation_of(run, protocol.guidance, protocol.samples, protocol.overrides)
    height, width = open_run(run).prepared.dataset.image_shape[1:]
    require_comparable(str(run), settings.samples, (height, width), str(reference), size_of(reference))
    for scale in settings.guidance:
        asked = Asked(
            count=settings.samples,
            scale=scale,
            interval=settings.interval,
            channels=settings.channels,
            sampler=settings.sampler,
            steps=settings.steps,
            labels=settings.labels,
            seed=settings.seed,
        )
        output = run / "evaluation" / f"g{scale:g}-n{asked.count}.npz"
        draw(Origin(run), asked, [output], pick_devices(measuring.device))
        evaluate_images(output, reference, None, measuring)


def statistics(images: Path, output: Path, size: int | None, measuring: Measuring) -> None:
    """Measure a set of real images once, for any number of evaluations; `size` crops a folder's."""
    if output.suffix != ".npz":
        raise UserError(f"statistics go to a file that ends in .npz, got {output}; try {output}.npz")
    found = open_images(images, size)
    _say_ignored(found)
    networks = measuring.open()
    with _progress("images") as report:
        done = write_statistics(
            found,
            networks,
            output,
            batch=measuring.batch,
            device=pick_device(measuring.device),
            report=report,
        )
    print(f"{done.count} images of {done.size[1]}x{done.size[0]}: {output}")


def _say_ignored(images: ImageSet) -> None:
    if images.ignored:
        others = ", ".join(f"{count} {suffix}" for suffix, count in sorted(images.ignored.items()))
        print(f"not taken for images: {others}", file=sys.stderr)


def _require_reference(reference: Path) -> None:
    if not reference.exists():
        raise UserError(
            f"reference {reference} is not there; expected an ADM npz, a file of `stbench data statistics`, "
            "a prepared data set, or a folder of images"
        )


def _write(target: Path, verdict: Verdict) -> None:
    content = {
        "schema": SCHEMA,
        "metrics": dict(verdict.metrics),
        "warnings": verdict.warnings,
        "protocol": dict(verdict.protocol),
    }
    atomic_write(target, json.dumps(content, indent=1) + "\n")


def _print(verdict: Verdict, target: Path) -> None:
    count = verdict.protocol["count"]
    table = Table("score", "value", "meaning", title=f"{verdict.protocol['samples']}: {count} images")
    for name, meaning in SCORES.items():
        if (full := full_name(name, count)) in verdict.metrics:
            table.add_row(full, f"{verdict.metrics[full]:.5g}", meaning)
    Console().print(table)
    for warning in verdict.warnings:
        Console(stderr=True).print(f"warning: {warning}", highlight=False, soft_wrap=True)
    print(f"scores and protocol: {target}")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int], None]]:
    """A bar without an end on standard error, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done: bar.update(task, completed=done)


def evaluate(
    path: Path, guidance: str | None, samples: int | None, overrides: Sequence[str], device: str
) -> None:
    """Add evaluation rows to a run under another protocol."""
    checked = evaluation_of(path, guidance, samples, overrides)
    run = past_run.open_run(path)
    added = points.evaluate_again(run, checked, pick_device(device))
    for point in added:
        print(point_line(point))
    print(f"{len(added)} rows added to {path}")


def evaluation_of(
    path: Path, guidance: str | None, samples: int | None, overrides: Sequence[str]
) -> EvalSpec:
    """A run's evaluation settings with these changes, checked."""
    load_builtins()
    run = past_run.open_run(path)
    settings = _evaluation_settings(overrides)
    if guidance is not None:
        settings["guidance"] = parse_scales(guidance)
    if samples is not None:
        settings["samples"] = samples
    spec = run.prepared.spec
    return evaluation_spec(spec.eval.model_dump() | settings, spec.objective, spec.train.steps)


def _evaluation_settings(overrides: Sequence[str]) -> dict[str, Any]:
    settings = parse_set(overrides)
    for name in settings:
        if not name.startswith("eval.") or name == "eval.points":
            raise UserError(
                f"evaluate changes how the kept points are evaluated: expected eval.*, got '{name}'; "
                f"for example --set eval.steps=50"
            )
    return {name.removeprefix("eval."): value for name, value in settings.items()}
