"""REPA, representation alignment (repository sihyun-yu/REPA): a frozen external encoder teaches one block.

Its options contain what iREPA and SARA add; `irepa.py` and `sara.py` register these with their own defaults.
The leaderboard row names the encoder, whose training cost is not included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.ranges import Block, Fraction, Name, NonNegativeReal, Pixels, StepsOrZero, Width
from stbench.core.recipe import (
    LATER,
    OptionContext,
    Stage,
    Step,
    Supervision,
    Term,
    computed,
    computed_defaults,
)
from stbench.core.registry import RECIPES
from stbench.core.rng import Rng
from stbench.models import align, encoders
from stbench.models.timm_models import DINOV2

Projector = Literal["mlp", "conv"]
Normalise = Literal["none", "spatial"]
Names = Name | Sequence[Name]


@dataclass
class Repa(Supervision):
    """-weight * cosine(projector_j(h_k), z_j) over channels, averaged over tokens and encoders j, float32.

    `structure` weighs a second term: the squared difference between the cosines of all pairs of projected
    tokens and those of the encoder's tokens. `normalise` applies to the targets of both.
    """

    sources: Sequence[encoders.EncoderSpec]
    """The encoders, or caches of their tokens."""
    block: int
    weight: float
    hidden: int | None
    """Hidden width of the MLP; None for a convolution."""
    tokens: int
    projector: Projector = field(default="mlp", metadata=LATER)
    kernel: int | None = field(default=None, metadata=LATER)
    """Kernel of the convolution; None for an MLP."""
    normalise: Normalise = field(default="none", metadata=LATER)
    alpha: float | None = field(default=None, metadata=LATER)
    """Share of the mean that is subtracted; None without normalisation."""
    structure: float = field(default=0.0, metadata=LATER)
    stop: int | None = field(default=None, metadata=LATER)
    """Step from which on there is no term and the encoders do not run; None for never."""
    _encoders: list[encoders.ImageEncoder | encoders.CachedTokens] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    @property
    def needs(self) -> str:
        """The names of the encoders."""
        return ", ".join(source.needs for source in self.sources)

    @property
    def contents(self) -> Mapping[str, Any]:
        """Names of encoders and hashes of files, in place of the paths that the options contain."""
        return {
            "encoder": [s.sha256 if s.kind == "cached" else s.name for s in self.sources],
            "checkpoint": [s.sha256 for s in self.sources],
        }

    @property
    def images(self) -> bool:
        """Whether an encoder runs on the images; cached tokens do not need them."""
        return any(source.kind != "cached" for source in self.sources)

    @property
    def takes_subsets(self) -> bool:  # type: ignore[override]
        """Whether the projector is no convolution, which needs the whole grid."""
        return self.projector == "mlp"

    @property
    def taps(self) -> Sequence[int]:
        """The aligned block."""
        return (self.block,)

    def setup(self, device: torch.device) -> None:
        """Load the encoders."""
        self._encoders = [encoders.open_encoder(source, self.tokens, device) for source in self.sources]

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """One projector per encoder."""
        return nn.ModuleDict(
            {str(j): self._projector(info.width, s.width) for j, s in enumerate(self.sources)}
        )

    def _projector(self, width: int, out: int) -> nn.Module:
        if self.kernel is not None:
            return align.ConvProjector(width, out, self.kernel)
        assert self.hidden is not None
        return align.projector(width, self.hidden, out)

    def targets(self, step: Step) -> list[Tensor]:
        """Return the tokens (B,N,Dz) of each encoder."""
        found = []
        for encoder in self._encoders:
            if isinstance(encoder, encoders.ImageEncoder):
                found.append(step.encode(encoder, step.batch.extras["images"]))
                continue
            # A cache costs one forward pass per image of the data set, counted during the first epoch.
            if step.images_seen < step.dataset_size:
                step.count_teacher(encoder.flops * len(step.batch.y))
            tokens = encoder.rows(step.batch.index, step.dataset_size)
            found.append(tokens.to(step.noised.x_t.device, non_blocking=True))
        return found

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compute the mean negative cosine, in [-1,1], and the structural term if it has a weight.

        There are no terms after `stop` steps.
        """
        return {} if self.is_over(step.batch.rng) else self.aligned(step, self.targets(step))

    def is_over(self, rng: Rng) -> bool:
        """Whether the step with these random numbers is after the last aligned one."""
        return self.stop is not None and rng.images_seen >= self.stop * rng.global_batch

    def aligned(self, step: Step, targets: Sequence[Tensor]) -> dict[str, Term]:
        """Compare the block's projected tokens with the tokens (B,N,Dz) of each encoder."""
        tokens, kept = step.features[self.block], step.kept.get(self.block)
        targets = [align.at_kept(self.normalised(z), kept) for z in targets]
        pairs = [(step.project(str(j), tokens), z) for j, z in enumerate(targets)]
        cosines = torch.stack([-align.cosine(projected, z) for projected, z in pairs])
        terms = {"repa": Term(cosines.mean(0), self.weight)}
        if self.structure:
            differences = torch.stack([align.structure(projected, z) for projected, z in pairs])
            terms["structure"] = Term(differences.mean(0), self.structure)
        return terms

    def normalised(self, z: Tensor) -> Tensor:
        """Return the targets (B,N,Dz) for the tokens z (B,N,Dz) of an encoder."""
        return z if self.alpha is None else align.standardise(z, self.alpha)


def published_block(info: BackboneInfo) -> int:
    """Return the default block, 0-based.

    Published, 1-based: 8 of XL's 28 (README) and of L's 24, 4 of B's 12. Other sizes use XL's relative depth.
    """
    published = {24: 8, 12: 4}
    if info.depth in published:
        return published[info.depth] - 1
    return align.relative_block(info.depth, 8, 28)


def _is_tiny(info: BackboneInfo) -> bool:
    return (info.preset or info.size).startswith("ti")


def default_encoder(info: BackboneInfo) -> str:
    """Return the default encoder: the shipped one for ti, else DINOv2-B."""
    return encoders.DIGITS if _is_tiny(info) else DINOV2


def default_hidden(info: BackboneInfo) -> int:
    """Return the default hidden width of a projector: 4 D for ti, else 2048 as published."""
    return 4 * info.width if _is_tiny(info) else 2048


def hidden_of(c: OptionContext) -> int | None:
    """Return the default hidden width of the chosen projector; None for a convolution."""
    return None if c.options["projector"] == "conv" else default_hidden(c.info)


def kernel_of(c: OptionContext) -> int | None:
    """Return the default kernel of the chosen projector; None for an MLP."""
    return 3 if c.options["projector"] == "conv" else None


def alpha_of(c: OptionContext) -> float | None:
    """Return the default share of the mean that is subtracted; None without normalisation."""
    return 0.6 if c.options["normalise"] == "spatial" else None


@RECIPES.register_module(name="repa")
@computed_defaults
def repa(
    info: BackboneInfo,
    *,
    encoder: Names = computed(lambda c: default_encoder(c.info)),
    checkpoint: Name | Sequence[Name | None] | None = None,
    block: Block = computed(lambda c: published_block(c.info)),
    weight: NonNegativeReal = 0.5,
    projector: Projector = "mlp",
    hidden: Width | None = computed(hidden_of),
    kernel: Pixels | None = computed(kernel_of),
    normalise: Normalise = "none",
    alpha: Fraction | None = computed(alpha_of),
    structure: NonNegativeReal = 0.0,
    stop: StepsOrZero | None = None,
) -> Sequence[Stage]:
    """Align one block with the tokens of a frozen external encoder on the clean image.

    encoder: a timm model, `digits` (the shipped encoder), a folder of cached tokens, or a list of these.
      Default: `digits` on ti, else vit_base_patch14_dinov2.lvd142m (DINOv2-B, one token per latent patch).
    checkpoint: file with the weights of each timm model; without it, the Hugging Face cache. Nothing is
      downloaded: get them with `hf download timm/MODEL model.safetensors`.
    block: 0-based. Published, 1-based: 8 for XL and L, 4 for B.
    weight: weight of the loss; 0.5 as published.
    projector: `mlp` of three layers as published, or `conv`, a convolution over the token grid (iREPA).
    hidden: hidden width of the MLP. Default: 4 D on ti, else 2048 as published.
    kernel: kernel of the convolution, an odd number; default 3.
    normalise: `spatial` normalises the encoder's tokens over the image (iREPA); `none` as published.
    alpha: share of the mean that `spatial` subtracts; default 0.6.
    structure: weight of SARA's structural term.
    stop: step after which the alignment ends and the encoder no longer runs. Default: never.
    """
    return stages(
        "repa",
        info,
        encoder,
        checkpoint,
        block=block,
        weight=weight,
        projector=projector,
        hidden=hidden,
        kernel=kernel,
        normalise=normalise,
        alpha=alpha,
        structure=structure,
        stop=stop,
    )


def stages(
    name: str,
    info: BackboneInfo,
    encoder: Names,
    checkpoint: str | Sequence[str | None] | None,
    *,
    block: int,
    **options: Any,
) -> Sequence[Stage]:
    """Return the only stage of a recipe; `options` are fields of its supervision.

    Raises UserError for options that do not fit together.
    """
    supervision = Repa(
        sources=encoders.find_encoders(encoder, checkpoint),
        block=info.block("recipe.block", block),
        tokens=info.tokens,
        **options,
    )
    _check_options(supervision)
    return [Stage(name, lambda earlier: supervision)]


def _check_options(repa: Repa) -> None:
    """Raise UserError for options without effect and for values that the network does not allow."""
    for option, value, other in (
        ("hidden", repa.hidden, "projector=mlp"),
        ("kernel", repa.kernel, "projector=conv"),
        ("alpha", repa.alpha, "normalise=spatial"),
    ):
        name, _, needed = other.partition("=")
        if value is not None and getattr(repa, name) != needed:
            raise UserError(
                f"recipe.{option}={value} has no effect with recipe.{name}={getattr(repa, name)}; leave it "
                f"out, or use --set recipe.{other}"
            )
    if repa.kernel is not None and repa.kernel % 2 == 0:
        raise UserError(f"recipe.kernel must be odd, got {repa.kernel}; for example --set recipe.kernel=3")
    if repa.alpha is not None and repa.tokens == 1:
        raise UserError(
            "recipe.normalise=spatial needs more than one token per image, got 1; use a smaller patch, or "
            "--set recipe.normalise=none"
        )
