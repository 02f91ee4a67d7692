"""What the supervision of a stage reads and returns in one training step.

Shapes and conventions are listed in `stbench.core.backbone`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stbench.core.backbone import Backbone, BackboneInfo, Features
from stbench.core.flops import forward_flops
from stbench.core.frozen import frozen_forward, pad_rows
from stbench.core.objective import Batch, Noised, Objective
from stbench.core.phases import phase
from stbench.core.world import ALONE, World


@dataclass(frozen=True)
class Term:
    """One auxiliary loss and its weight in the total loss."""

    value: Tensor
    """Loss per sample (B,), float32; the engine takes the mean."""
    weight: float


class Encoder(Protocol):
    """A frozen external image encoder that returns one token per latent patch."""

    flops: float
    """Forward FLOPs for one image."""

    def tokens(self, images: Tensor) -> Tensor:
        """Encode uint8 images (B,c,H,W) as tokens (B,N,Dz)."""


@dataclass
class Cost:
    """FLOPs spent so far, by what spent them."""

    student: float = 0.0
    heads: float = 0.0
    teachers: float = 0.0
    """Teachers and encoders."""

    @property
    def total(self) -> float:
        """Sum over student, heads and teachers."""
        return self.student + self.heads + self.teachers


@dataclass(frozen=True)
class Step:
    """Everything a supervision can read in one training step.

    Read-only: trained heads, teachers and encoders run through its methods, which count their FLOPs.
    """

    batch: Batch
    noised: Noised
    prediction: Tensor
    """The student's prediction (B,C_out,H,W)."""
    features: Features
    """Features of the student's tapped blocks."""
    heads: Mapping[str, nn.Module] | nn.ModuleDict
    """The modules that `Supervision.heads` returned, and the heads that stay with the student."""
    ema: Backbone
    """Exponential moving average of the student, frozen."""
    objective: Objective
    info: BackboneInfo
    """Facts about the student."""
    images_seen: int
    """Images that this stage has processed before this step."""
    dataset_size: int
    """Images in the training set."""
    global_batch: int
    """Images per optimiser step, over all devices and micro-batches."""
    cost: Cost
    world: World = ALONE
    """The ranks, between which the global batch is split."""
    teacher_precision: str = "fp32"
    """Arithmetic of teachers and encoders: "fp32", or "bf16" for bfloat16 autocast."""
    padded: bool = False
    """Whether teachers see one of three numbers of rows only, because their blocks are compiled."""
    condition: Tensor | None = None
    """The student's embedding of time and label (B,D), or (B,N,D); None if its family has none."""
    attention: Mapping[int, Tensor] = field(default_factory=dict)
    """Block -> attention logits (B,heads,N,N), where `Supervision.inputs` asks for them."""
    kept: Mapping[int, Tensor] = field(default_factory=dict)
    """Block inside a route -> indices (B,n) of the tokens in `features`."""
    prefix: Mapping[int, Tensor] = field(default_factory=dict)
    """Tapped block -> prefix tokens (B,m,D), where `Supervision.inputs` adds such tokens."""
    prefix_out: Tensor | None = None
    """Prefix tokens (B,m,D) as the student's output layer sees them."""

    def project(self, head: str, tokens: Tensor, *others: Tensor | None) -> Tensor:
        """Apply the trained head `head` to tokens (b,N,D) and its other inputs, such as the condition.

        Counts one forward and one backward pass per row.
        """
        module, given = self.heads[head], (tokens, *others)
        shapes = [None if value is None else tuple(value.shape[1:]) for value in given]

        def one_row(m: nn.Module) -> object:
            return m(*[None if s is None else torch.empty(1, *s, device="meta") for s in shapes])

        self.cost.heads += 3.0 * forward_flops(module, one_row, ("head", *shapes)) * tokens.shape[0]
        with phase("heads"):
            return module(*given)

    def teach(
        self,
        teacher: Backbone,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        block: int,
        most: int | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Return the features (b,N,D) of one block of a frozen network, float32.

        Runs without gradient and in the precision of teachers, stops after `block`, and counts one forward
        pass per row. `most` is the largest b of any step, by default the batch; a compiled teacher is padded
        to shares of it. `inputs` are optional inputs of the forward pass, which are not padded.
        """
        # An empty selection (no sample inside an interval) must not reach the network.
        if x.shape[0] == 0:
            return x.new_zeros(0, self.info.tokens, teacher.info.width)
        one = teacher.flops(block, token_times=t.ndim == 2, **inputs)
        self.count_teacher(float(one) * x.shape[0])
        rows = x.shape[0]
        if self.padded and not inputs:
            x, t, y = (pad_rows(part, most or len(self.batch.y)) for part in (x, t, y))
        with frozen_forward(x, self.teacher_precision):
            return teacher.features(x, t, y, indices=(block,), **inputs)[block][:rows].float()

    def encode(self, encoder: Encoder, images: Tensor) -> Tensor:
        """Return the tokens (B,N,Dz) of clean images, uint8 (B,c,H,W), under a frozen encoder, float32.

        Runs without gradient and in the precision of teachers, and counts one forward pass per image.
        """
        return self.run_frozen(lambda x: [encoder.tokens(x)], images, encoder.flops)[0]

    def run_frozen(
        self, call: Callable[[Tensor], Sequence[Tensor]], x: Tensor, flops: float
    ) -> Sequence[Tensor]:
        """Return the outputs of a frozen network for x (B,...), float32, where `encode` is not enough.

        Runs without gradient and in the precision of teachers, and counts `flops` per row of x.
        """
        self.count_teacher(flops * len(x))
        with frozen_forward(x, self.teacher_precision):
            return [value.float() for value in call(x)]

    def count_teacher(self, flops: float) -> None:
        """Add `flops` to the cost of teachers and encoders; `teach` and `encode` call it themselves."""
        self.cost.teachers += flops
