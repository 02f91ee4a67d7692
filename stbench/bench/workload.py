"""What is timed: the last stage of a recipe, built as the engine builds it, on random latents."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from stbench.config.build import build_backbone, build_objective
from stbench.config.plan import PlannedStage, PreparedRun, prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.core.backbone import Backbone
from stbench.core.recipe import Artifact
from stbench.core.registry import DATASETS
from stbench.core.rng import generator
from stbench.data.dataset import Dataset
from stbench.data.presets import IMAGENET, IMAGENET256
from stbench.train.step import StageModel, make_optimizer, training_step

BANK = 512
"""Number of different latents and images; row i of the data set is number i % BANK."""


@dataclass(frozen=True)
class Case:
    """One combination to time."""

    backbone: str
    """Family, or family and size."""
    recipe: str
    batch: int | None = None
    """Images per step; None for the default of the data set."""
    precision: str = "fp32"
    compile: bool = False
    dataset: str = ""
    """Registered data set; "" for the digits with size ti, otherwise random latents of 256x256 images."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Other options by dotted name, as with --set."""


@final
@DATASETS.register_module(name="random-latents")
class RandomLatents(Dataset):
    """Random latents, labels and images with the shapes of ImageNet at 256 pixels. Only for timing steps."""

    name = "random-latents"
    channels = 4
    input_size = 32
    classes = 1000
    size = 1_281_167
    image_shape = (3, 256, 256)
    preset = IMAGENET
    published = IMAGENET256
    extractor = ""
    decoder = ""
    fingerprint = "random-latents"

    def __init__(self) -> None:
        draw = generator(0, "random-latents")
        self._latents = torch.randn(BANK, self.channels, self.input_size, self.input_size, generator=draw)
        self._labels = torch.randint(self.classes, (BANK,), generator=draw)
        self._images = torch.randint(256, (BANK, *self.image_shape), generator=draw, dtype=torch.uint8)
        self.references = {"train": self.train_images}

    def latents(self, index: Tensor, posterior_noise: Tensor) -> Tensor:
        """Return latents (B,4,32,32); the noise of the posterior is added at a tenth of their scale."""
        found = self._latents[(index % BANK).to(self._latents.device, non_blocking=True)]
        return found + 0.1 * posterior_noise.to(found.device, non_blocking=True)

    def labels(self, index: Tensor) -> Tensor:
        """Return labels (B,)."""
        return self._labels[(index % BANK).to(self._labels.device, non_blocking=True)]

    def images(self, index: Tensor) -> Tensor:
        """Return images, uint8 (B,3,256,256)."""
        return self._images[(index % BANK).to(self._images.device, non_blocking=True)]

    def heldout(self) -> tuple[Tensor, Tensor]:
        """Return no latents and no labels: nothing is held out."""
        return self._latents[:0], self._labels[:0]

    def decode(self, z: Tensor) -> NoReturn:
        """Raise NotImplementedError: there is no decoder."""
        raise NotImplementedError("random latents have no decoder")

    def train_images(self) -> Tensor:
        """Return the images."""
        return self._images.cpu()

    def heldout_images(self) -> Tensor:
        """Return no images."""
        return self._images[:0].cpu()

    def order(self, seed: int, images_seen: int, count: int) -> Tensor:
        """Return random rows."""
        return torch.randint(self.size, (count,), generator=generator(seed, "data", images_seen))

    def to(self, device: torch.device | str) -> RandomLatents:
        """Return a copy on `device`."""
        moved = copy.copy(self)
        for name in ("_latents", "_labels", "_images"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved


class Workload:
    """The last stage of a case, ready to take steps."""

    def __init__(self, case: Case, device: torch.device) -> None:
        """Raises UserError if the options of the case do not fit together."""
        self.case, self.device = case, device
        self.prepared = prepare_case(case)
        self.stage = self.prepared.stages[-1]
        self.dataset = self.prepared.dataset.to(device)
        self.model = build_model(self.prepared, self.stage, device)
        self.optimizer = make_optimizer(self.model.trained_parameters(), self.prepared.spec.train, device)
        self.steps = 0

    @property
    def batch(self) -> int:
        """Images per step."""
        return self.prepared.spec.train.batch

    def step(self) -> dict[str, Tensor]:
        """Take the next optimiser step, as a run does; returns the losses."""
        spec = self.prepared.spec
        losses = training_step(
            self.model,
            self.optimizer,
            self.dataset,
            spec.train,
            seed=spec.seed,
            step=self.steps,
            device=self.device,
        )
        self.steps += 1
        return losses

    @contextmanager
    def counting(self) -> Iterator[dict[str, float]]:
        """Count the FLOPs of the steps in the block, by what spends them: student, heads, teachers."""
        before = copy.copy(self.model.cost)
        counted: dict[str, float] = {}
        yield counted
        after = self.model.cost
        for name in ("student", "heads", "teachers"):
            counted[name] = getattr(after, name) - getattr(before, name)


def prepare_case(case: Case) -> PreparedRun:
    """Resolve the options of a case. Raises UserError if they do not fit together."""
    size = case.backbone.partition("-")[2]
    dataset = case.dataset or ("digits" if not size or size.startswith("ti") else RandomLatents.name)
    overrides = {**case.overrides, "train.precision": case.precision, "train.compile": case.compile}
    if case.batch is not None:
        overrides["train.batch"] = case.batch
    return prepare(resolve(RunRequest(case.backbone, case.recipe, dataset=dataset, overrides=overrides)))


def build_model(prepared: PreparedRun, stage: PlannedStage, device: torch.device) -> StageModel:
    """The networks of a stage on the device.

    Every weight is random, so that no block is the identity. The artifacts of earlier stages are networks
    with random weights as well: what a step costs does not depend on the values.
    """
    spec = prepared.spec

    def network(of: PlannedStage, seed: int) -> Backbone:
        heads = of.definition.heads
        backbone = build_backbone(spec.backbone, spec.objective, prepared.dataset, seed=seed, heads=heads)
        return perturb(backbone, seed)

    def artifact(earlier: PlannedStage) -> Artifact:
        return earlier.artifact(lambda weights: network(earlier, seed=earlier.index + 1))

    artifacts = {earlier.name: artifact(earlier) for earlier in prepared.stages[: stage.index]}
    model = StageModel(
        network(stage, seed=0),
        stage.definition.supervision(artifacts),
        build_objective(spec.objective, spec.objective_options),
        seed=spec.seed,
        dataset_size=prepared.dataset.size,
    )
    model.prepare(device, spec.train, stage.steps)
    return model


def perturb(backbone: Backbone, seed: int) -> Backbone:
    """Add noise to every trained parameter: adaLN-zero blocks are the identity at initialisation."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    return backbone
