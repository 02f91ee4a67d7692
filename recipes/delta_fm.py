"""DeltaFM, contrastive flow matching (repository gstoica27/DeltaFM): a loss across the samples of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stbench.core.backbone import Backbone, BackboneInfo
from stbench.core.device import upload
from stbench.core.errors import UnsupportedError, UserError
from stbench.core.guides import Correction
from stbench.core.objective import Objective
from stbench.core.ranges import FractionBelowOne, Name
from stbench.core.recipe import Stage, Step, Supervision, Term
from stbench.core.registry import OBJECTIVES, RECIPES, name_of
from stbench.models import align
from stbench.recipes.repa import Repa, repa

Pool = Literal["micro-batch", "rank", "global"]
"""Among which samples of a step a negative is drawn: those of a forward pass, of a rank, or all."""
Unconditional = Literal["contrast", "skip"]


@dataclass
class DeltaFm(Supervision):
    """-weight * |v_i - u_j|^2, with the velocity target u_j of another sample of the pool.

    j is uniform over the other samples, drawn for each i independently; the classes of i and j may coincide.
    u_j has its own noise and time.
    """

    weight: float
    pool: Pool
    unconditional: Unconditional
    alignment: Repa | None
    """REPA, whose terms are added; None for none."""

    @property
    def needs(self) -> str:
        """What REPA needs."""
        return self.alignment.needs if self.alignment else ""

    @property
    def contents(self) -> Mapping[str, Any]:
        """Hashes of REPA's files."""
        return self.alignment.contents if self.alignment else {}

    @property
    def images(self) -> bool:
        """Whether REPA needs the images."""
        return self.alignment is not None and self.alignment.images

    @property
    def takes_subsets(self) -> bool:  # type: ignore[override]
        """Whether REPA takes them."""
        return self.alignment is not None and self.alignment.takes_subsets

    @property
    def taps(self) -> Sequence[int]:
        """REPA's block."""
        return self.alignment.taps if self.alignment else ()

    def require(self, objective: Objective) -> None:
        """Raise UnsupportedError unless the network predicts the velocity of a flow."""
        if not objective.predicts_velocity:
            raise UnsupportedError(
                f"recipe 'delta-fm' contrasts velocities and needs an objective that predicts one, got "
                f"{name_of(OBJECTIVES, type(objective))}; use --objective linear, or another recipe"
            )

    def setup(self, device: torch.device) -> None:
        """Load REPA's encoders."""
        if self.alignment:
            self.alignment.setup(device)

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """REPA's projectors."""
        return self.alignment.heads(info) if self.alignment else nn.ModuleDict()

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compute the distances to the negatives (B,), and REPA's terms.

        Raises UserError if the pool is split over several forward passes or has a single sample.
        """
        distance = align.mse(step.prediction, self.negatives(step))
        if self.unconditional == "skip":
            labelled = step.batch.y != step.info.classes
            # The mean over the batch is then the mean over its labelled samples.
            distance = distance * labelled * (len(labelled) / labelled.sum().clamp(min=1))
        terms = self.alignment.terms(step) if self.alignment else {}
        return {"delta-fm": Term(distance, -self.weight), **terms}

    def negatives(self, step: Step) -> Tensor:
        """Return the velocity target (B,C,H,W) of one other sample of the pool for each sample."""
        pool = step.objective.velocity_target(step.noised)
        own = torch.arange(len(pool))
        if self.pool != "micro-batch":
            self._require_whole_pool(step)
        if self.pool == "global":
            pool, own = step.world.gather(pool), own + step.batch.rng.start
        if len(pool) < 2:
            raise UserError(
                f"recipe.pool={self.pool} needs at least 2 samples, got {len(pool)}; increase "
                f"train.batch, or decrease train.accumulate"
            )
        # A draw among the others: from a sample's own place on, the next one.
        drawn = step.batch.rng.integers("delta-fm", len(pool) - 1)
        return pool[upload(drawn + (drawn >= own), pool.device)]

    def _require_whole_pool(self, step: Step) -> None:
        """Raise UserError if a forward pass sees only a part of what the pool is taken from."""
        start, stop = step.world.part(0, step.global_batch)
        found, ranks = len(step.batch.y), step.world.size
        if found != stop - start or (self.pool == "global" and found * ranks != step.global_batch):
            raise UserError(
                f"recipe.pool={self.pool} needs all {step.global_batch} images of a step at once, found "
                f"{found} on each of {ranks} rank(s); use --set train.accumulate=1 and a batch that the "
                f"ranks divide, or --set recipe.pool=micro-batch"
            )


class MeanLatent(nn.Module):
    """The mean normalised training latent, in the buffer `image` (C,H,W): DeltaFM's interference vector.

    It is computed before the first step, which reads the training data once.
    """

    image: Tensor

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.register_buffer("image", torch.zeros(channels, size, size))

    def fit(self, dataset: Any) -> None:
        """Compute it from a `stbench.data.dataset.Dataset`."""
        self.image.copy_(dataset.mean_latent())


@RECIPES.register_module(name="delta-fm")
def delta_fm(
    info: BackboneInfo,
    *,
    weight: FractionBelowOne = 0.05,
    pool: Pool = "micro-batch",
    unconditional: Unconditional = "contrast",
    encoder: Name | Sequence[Name] | None = None,
    checkpoint: Name | Sequence[Name | None] | None = None,
) -> Sequence[Stage]:
    """Push the predicted velocity away from the velocity targets of other samples (flows only).

    The optimum is (v + weight E[x0]) / (1 - weight), where v is that of flow matching. The mean training
    latent E[x0] is stored with the network, and the guide `correction` undoes the bias at sampling. This is
    exact on the linear path, and on the cosine path with uniform times.

    weight: weight of the contrast; 0.05 as published. From 1 on, the default of the released parser, the loss
      has no lower bound.
    pool: samples among which the other one is drawn. `micro-batch` are those of one forward pass, as in the
      released code; `rank` and `global` are those of a rank and of all ranks, and need train.accumulate=1.
    unconditional: `contrast` also contrasts samples without a label; `skip` averages the contrast over those
      with a label (the released option dont-contrast-on-unconditional).
    encoder: adds REPA with this encoder, as released, at REPA's published block and weight. Default: none.
    checkpoint: weights of the encoder, as in repa.
    """
    if encoder is None and checkpoint is not None:
        raise UserError("recipe.checkpoint has no effect without recipe.encoder; give both, or neither")
    alignment = None
    if encoder is not None:
        (aligned,) = repa(info, encoder=encoder, checkpoint=checkpoint)
        found = aligned.supervision({})
        assert isinstance(found, Repa)
        alignment = found
    supervision = DeltaFm(weight, pool, unconditional, alignment)

    def heads(network: Backbone) -> Mapping[str, nn.Module]:
        return {"interference": MeanLatent(info.channels, info.input_size)}

    guides = {"correction": Correction(weight=weight, buffer="interference.image")}
    return [Stage("delta-fm", lambda earlier: supervision, heads=heads, guides=guides)]
