"""REG, entangled class token (arXiv 2507.01467; repository Martinser/REG).

The class token of a frozen image encoder is noised and denoised together with the latent, as one more token
of the network; REPA aligns one block with all tokens of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stbench.core.backbone import Backbone, BackboneInfo, Output, kept_heads
from stbench.core.device import upload
from stbench.core.errors import UnsupportedError
from stbench.core.frozen import frozen_forward
from stbench.core.objective import Batch, Noised, Objective
from stbench.core.ranges import Block, Name, NonNegativeReal, Width
from stbench.core.recipe import Stage, Step, Term, computed, computed_defaults
from stbench.core.registry import OBJECTIVES, RECIPES, name_of
from stbench.models import align, encoders
from stbench.recipes.repa import Repa, default_encoder, default_hidden, published_block

OUTPUT = "class-output"
"""Name of the kept head that predicts the class token."""


class ClassEmbedding(nn.Module):
    """Embeds noised class tokens (B,m,Dz) as tokens (B,m,D): Linear, and LayerNorm with affine parameters.

    As the kept head "prefix", it also lets samplers denoise the class token beside the latent.
    """

    def __init__(self, source: int, width: int, scale: float | None) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(source, width), nn.LayerNorm(width, eps=1e-6)
        self.scale = scale
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens (B,m,Dz) as (B,m,D)."""
        return self.norm(self.linear(tokens))

    def view(self, network: Backbone) -> Backbone:
        """Return the network with the class token in further channels."""
        return WithClassToken(network, self.linear.in_features, self.scale)


def class_output(width: int, source: int) -> nn.Linear:
    """The head that predicts class tokens (B,Dz) from modulated tokens (B,D), with zero weights."""
    linear = nn.Linear(width, source)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


class WithClassToken(Backbone):
    """A network with its class token as a second state, padded with zeros to whole channels (B,E,H,W)."""

    def __init__(self, network: Backbone, source: int, scale: float | None) -> None:
        super().__init__()
        pixels = network.info.input_size**2
        self.network, self.source, self.extra = network, source, -(-source // pixels)
        self.info = replace(
            network.info,
            channels=network.info.channels + self.extra,
            extra_channels=self.extra,
            extra_scale=scale,
            capabilities=(),
        )

    def pad(self, tokens: Tensor) -> Tensor:
        """Arrange class tokens (B,Dz) as channels (B,E,H,W)."""
        size = self.info.input_size
        padded = F.pad(tokens, (0, self.extra * size**2 - self.source))
        return padded.view(-1, self.extra, size, size)

    def forward_intermediates(
        self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int] = (), stop_early: bool = False
    ) -> Output:
        """See `Backbone.forward_intermediates`; x (B,C+E,H,W) contains latents and class token."""
        latents, extra = x[:, : -self.extra], x[:, -self.extra :]
        token = extra.flatten(1)[:, : self.source]
        found = self.network.run(latents, t, y, indices=indices, stop_early=stop_early, prefix=token[:, None])
        if found.prediction is None or found.prefix_out is None:
            return found
        predicted = self.pad(kept_heads(self.network)[OUTPUT](found.prefix_out[:, 0]))
        return replace(found, prediction=torch.cat([found.prediction, predicted], dim=1))


@dataclass
class Reg(Repa):
    """REPA over class and patch tokens, and the denoising loss of the class token."""

    takes_subsets: ClassVar[bool] = False  # type: ignore[misc]

    class_weight: float = 0.03
    _tokens: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    """Tokens (B,1+N,Dz) of this batch, the class token first."""
    _noised: Noised | None = field(default=None, init=False, repr=False, compare=False)
    """The class token (B,Dz,1,1) of this batch, corrupted."""

    def encode(self, batch: Batch) -> Tensor:
        """Return the encoder's tokens (B,1+N,Dz), float32, the class token first."""
        (source,), (encoder,) = self.sources, self._encoders
        own = source.name != encoders.DIGITS
        if isinstance(encoder, encoders.ImageEncoder):
            images = batch.extras["images"]
            with frozen_forward(images, self.teacher_precision):
                found = encoder.tokens(images, class_token=own).float()
        else:
            found = encoder.rows(batch.index, encoder.count, class_token=own)
            found = found.to(batch.x0.device, non_blocking=True)
        return found if own else torch.cat([found.mean(1, keepdim=True), found], dim=1)

    def require(self, objective: Objective) -> None:
        """Raise UnsupportedError for an objective with a learned variance."""
        if objective.out_channels(1) != 1:
            raise UnsupportedError(
                f"recipe 'reg' denoises a class token and needs an objective without learned variance, got "
                f"{name_of(OBJECTIVES, type(objective))}; use --objective linear, or another recipe"
            )

    def corrupt(self, objective: Objective, batch: Batch) -> Noised:
        """Corrupt the class token at the times of the latents, with its own noise."""
        noised, tokens = objective.draw(batch), self.encode(batch)
        noise = upload(batch.rng.normal("reg", (tokens.shape[2],)), tokens.device)
        self.corrupt_class(objective, tokens, noise, noised.t_host)
        return noised

    def corrupt_class(self, objective: Objective, tokens: Tensor, noise: Tensor, t: Tensor) -> None:
        """Keep the encoder's tokens (B,1+N,Dz), and the first with noise (B,Dz) at host times t (B,)."""
        self._tokens = tokens
        self._noised = objective.at(tokens[:, 0, :, None, None], noise[..., None, None], t)

    @property
    def noised_class(self) -> Noised:
        """The corrupted class token of this batch, with tensors (B,Dz,1,1)."""
        assert self._noised is not None, "corrupt() has not run"
        return self._noised

    def inputs(self, batch: Batch, noised: Noised) -> Mapping[str, Any]:
        """The corrupted class token of this batch as one prefix token."""
        return {"prefix": self.noised_class.x_t.flatten(1)[:, None]}

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compute the mean negative cosine over 1+N tokens, and the loss of the class token."""
        assert self._tokens is not None and step.prefix_out is not None
        self._count(step)
        predicted = step.project(OUTPUT, step.prefix_out[:, 0])
        of_class = step.objective.loss(predicted[..., None, None], self.noised_class)
        tokens = torch.cat([step.prefix[self.block], step.features[self.block]], dim=1)
        similarity = align.cosine(step.project("0", tokens), self._tokens)
        return {"reg": Term(-similarity, self.weight), "class": Term(of_class, self.class_weight)}

    def _count(self, step: Step) -> None:
        """Count the encoder, and check that cached tokens are of this data set."""
        for encoder in self._encoders:
            counted = True
            if isinstance(encoder, encoders.CachedTokens):
                encoder.rows(step.batch.index[:0], step.dataset_size)
                # A cache costs one forward pass per image of the data set, counted during the first epoch.
                counted = step.images_seen < step.dataset_size
            if counted:
                step.count_teacher(encoder.flops * len(step.batch.y))


@RECIPES.register_module(name="reg")
@computed_defaults
def reg(
    info: BackboneInfo,
    *,
    encoder: Name = computed(lambda c: default_encoder(c.info)),
    checkpoint: Name | None = None,
    block: Block = computed(lambda c: published_block(c.info)),
    weight: NonNegativeReal = 0.5,
    class_weight: NonNegativeReal = 0.03,
    class_scale: NonNegativeReal | None = None,
    hidden: Width = computed(lambda c: default_hidden(c.info)),
) -> Sequence[Stage]:
    """Denoise the class token of a frozen encoder together with the latent, and align one block as in REPA.

    Samples start from noise in both. The held-out loss is that of the network without its class token.

    encoder: a timm model, `digits`, whose class token is the mean of its tokens, or a folder of tokens cached
      with `stbench data tokens --class-token`. Default: `digits` on ti, else vit_base_patch14_dinov2.lvd142m
      (DINOv2-B).
    checkpoint: file with the weights of the timm model; without it, the Hugging Face cache.
    block: 0-based. Published, 1-based: 8 for XL and L, 4 for B.
    weight: weight of the alignment; 0.5 as published.
    class_weight: weight of the class token's denoising loss; 0.03 as published.
    class_scale: scale of classifier-free guidance of the class token, where the image is guided; 0 for its
      conditional prediction. Default: that of the image (published: 2.3 for both).
    hidden: hidden width of the projector. Default: 4 D on ti, else 2048 as published.
    """
    info.require("prefix", "recipe 'reg'")
    source = encoders.find_encoder(encoder, Path(checkpoint) if checkpoint else None)
    supervision = Reg(
        sources=(source,),
        block=info.block("recipe.block", block),
        weight=weight,
        hidden=hidden,
        tokens=info.tokens,
        class_weight=class_weight,
    )

    def heads(network: Backbone) -> Mapping[str, nn.Module]:
        width = network.info.width
        return {
            "prefix": ClassEmbedding(source.width, width, class_scale),
            OUTPUT: class_output(width, source.width),
        }

    return [Stage("reg", lambda earlier: supervision, heads=heads)]
