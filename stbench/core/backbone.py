"""The Backbone interface: a denoising network whose block outputs can be read.

Notation used throughout the project: B batch, C latent channels, H W latent height and width, N image tokens,
D width, K classes. Time t is in [0,1] and float64; t=0 is data and t=1 is noise. Labels are 0..K-1, and K is
the null label. Block indices are 0-based in executed order. The features of block k are the residual stream
right after that block, image tokens only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stbench.core.errors import UnsupportedError, UserError
from stbench.core.flops import forward_flops

Features = dict[int, Tensor]
"""0-based block index -> image tokens (B,N,D)."""

Capability = Literal["token-time", "attention", "route", "prefix"]
"""What a backbone may offer beyond the interface: times per token; attention logits and masks; routes; tokens
before those of the image."""

Weights = Literal["raw", "ema"]
"""Which weights of a trained network to load: the last iterate or the exponential moving average."""


@dataclass(frozen=True)
class BackboneInfo:
    """The facts about a network that the rest of the program may use."""

    name: str
    """Registered family name, such as "sit"."""
    size: str
    """Preset name, such as "ti/2" or "b/2"; "custom" if it is not a preset."""
    depth: int
    """Number of executed blocks (U-ViT: in + mid + out)."""
    width: int
    """Token width D."""
    tokens: int
    """Number of image tokens N, without prefix tokens."""
    patch: int
    """Patch side length, in latent pixels."""
    channels: int
    """Latent channels C of the input."""
    input_size: int
    """Latent height, equal to the width."""
    classes: int
    """Number of classes K; also the index of the null label."""
    null_label: bool = True
    """Whether the network accepts the null label. If not, it needs label_drop=0 and cannot be guided."""
    preset: str = ""
    """Preset that the options of a "custom" size start from; defaults of recipes may depend on it."""
    capabilities: tuple[Capability, ...] = ()
    """Which optional inputs of `Backbone.forward_intermediates` the network takes."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Why the family lacks a capability, for error messages."""
    extra_channels: int = 0
    """How many of the last channels are not latents, but a second state that is sampled with them."""
    extra_scale: float | None = None
    """Scale of classifier-free guidance in those channels, 0 for the conditional prediction; None for that of
    the latents."""

    def block(self, option: str, index: int) -> int:
        """Return `index` if the network has that block.

        Raises UserError naming `option` if it is out of range.
        """
        if not 0 <= index < self.depth:
            raise UserError(
                f"{option}={index} is out of range: {self.name}-{self.size} has blocks 0..{self.depth - 1}; "
                f"try --set {option}={self.depth - 1}"
            )
        return index

    def require(self, capability: Capability, what: str) -> None:
        """Raise UnsupportedError if the network lacks a capability that `what` ("recipe 'x'") needs."""
        if capability not in self.capabilities:
            reason = f" ({self.lacks[capability]})" if capability in self.lacks else ""
            raise UnsupportedError(
                f"{what} needs a backbone with the capability '{capability}', which {self.name} lacks"
                f"{reason}; use --backbone sit, or another recipe"
            )


@dataclass(frozen=True)
class Route:
    """Consecutive blocks that process only some of the tokens (TREAD, arXiv:2501.04765).

    The other tokens skip these blocks: after the last one they have the values from before the first one.
    """

    start: int
    """0-based first block of the route."""
    end: int
    """0-based last block of the route; it is part of it."""
    kept: Tensor
    """Indices (B,n) of the image tokens that the blocks process."""


@dataclass(frozen=True)
class Output:
    """The result of a forward pass. Unpacks as `prediction, features`."""

    prediction: Tensor | None
    """The prediction (B,C_out,H,W); None if the pass stopped early."""
    features: Features
    """Features of the blocks that were asked for: (B,N,D), or (B,n,D) inside a route."""
    condition: Tensor | None = None
    """Embedding of time and label (B,D), or (B,N,D) with a time per token; None if the family has none."""
    attention: Mapping[int, Tensor] = field(default_factory=dict)
    """Block -> attention logits (B,heads,N,N) between image tokens, scaled, before the softmax."""
    kept: Mapping[int, Tensor] = field(default_factory=dict)
    """Block inside a route -> indices (B,n) of its tokens."""
    prefix: Mapping[int, Tensor] = field(default_factory=dict)
    """Block that was asked for -> prefix tokens (B,m,D), if there are any."""
    prefix_out: Tensor | None = None
    """Prefix tokens (B,m,D) as the output layer sees them: after its norm and modulation."""

    def __iter__(self) -> Iterator[Any]:
        """Iterate over prediction and features."""
        return iter((self.prediction, self.features))


_KEPT = "kept_heads."
"""Start of the names of the heads' tensors in the state dict of a network."""


def kept_heads(network: nn.Module) -> Mapping[str, nn.Module]:
    """The heads that belong to a network besides its own output layer, by name; see `Stage.heads`."""
    heads: nn.ModuleDict | Mapping[str, nn.Module] = getattr(network, "kept_heads", {})
    return dict(heads.items())


def attach_heads(network: nn.Module, heads: Mapping[str, nn.Module]) -> None:
    """Let heads belong to a network, so that its averages and its state dict contain them."""
    if heads:
        network.kept_heads = nn.ModuleDict(heads)


def load_trunk(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict into a network, but for heads that only one of the two has.

    Raises:
        UserError: If a tensor has another shape than the network's.
    """
    own = network.state_dict()
    fitting = {name: value for name, value in state.items() if name in own or not name.startswith(_KEPT)}
    for name, value in fitting.items():
        if name in own and value.shape != own[name].shape:
            raise UserError(
                f"expected initial weights {name} of shape {tuple(own[name].shape)}, found "
                f"{tuple(value.shape)}; start from a checkpoint with the same options and encoder"
            )
    network.load_state_dict({**{k: v for k, v in own.items() if k.startswith(_KEPT)}, **fitting})


def trunk_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network without the heads that belong to it."""
    return {name: value for name, value in network.state_dict().items() if not name.startswith(_KEPT)}


def fit_heads(network: nn.Module, dataset: Any) -> None:
    """Call `fit(dataset)` of the heads that belong to a network and have this method."""
    for head in kept_heads(network).values():
        fit = getattr(head, "fit", None)
        if callable(fit):
            fit(dataset)


def sampling_view(network: Backbone) -> Backbone:
    """Return the network as samplers use it: itself, or what `view(network)` of one of its heads returns.

    A view may have further channels: a second state that is sampled with the latents.
    """
    for head in kept_heads(network).values():
        view = getattr(head, "view", None)
        if callable(view):
            return view(network)  # type: ignore[no-any-return]
    return network


class Backbone(nn.Module, ABC):
    """A denoiser: noisy latent in, prediction out, with readable block outputs.

    A pure function of (x, t, y): it never drops labels, because the engine does that once per step.
    Subclasses implement `forward_intermediates` and set `info`. They are constructed as
    `cls(channels=, input_size=, classes=, out_channels=, size=, **options)`.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Size name -> constructor options."""
    objective: ClassVar[str] = "linear"
    """Registered name of the objective it was published with; a preset may override it under "objective"."""

    info: BackboneInfo
    time_scale: float = 1.0
    """Factor applied to t in [0,1] before it is embedded."""

    @abstractmethod
    def forward_intermediates(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        indices: Sequence[int] = (),
        stop_early: bool = False,
    ) -> Output | tuple[Tensor | None, Features]:
        """Predict from x (B,C,H,W), t (B,) in [0,1] and y (B,) in 0..K, and return block features.

        Returns the prediction (B,C_out,H,W) and the features of the blocks in `indices`. With `stop_early`,
        no block after max(indices) runs and the prediction is None. A tuple of these two is enough for a
        network without capabilities.

        A network whose `info.capabilities` contain it also takes, as keyword arguments that are passed only
        where a recipe needs them: times t (B,N), one per token ("token-time"); `attention`, the blocks whose
        logits are returned, and `mask` (B,N,N), bool, true where a token may attend to another ("attention");
        `routes`, a sequence of disjoint `Route` ("route"); `prefix` (B,m,P), vectors that the kept head
        "prefix" embeds as m tokens before those of the image, without position ("prefix").
        """

    def run(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        indices: Sequence[int] = (),
        stop_early: bool = False,
        **inputs: Any,
    ) -> Output:
        """Call `forward_intermediates`, passing on the optional `inputs`."""
        found = self.forward_intermediates(x, t, y, indices=indices, stop_early=stop_early, **inputs)
        return found if isinstance(found, Output) else Output(*found)

    def output_head(self) -> nn.Module:
        """Return a new output layer of this family, for the tokens of a hidden block.

        It is called with tokens (B,N,D) and the condition and returns a prediction (B,C_out,H,W). Raises
        UserError if the family does not define one.
        """
        raise UserError(
            f"backbone '{self.info.name}' defines no output_head(), which this recipe needs; use "
            f"--backbone sit, or another recipe"
        )

    def repeated_blocks(self) -> Sequence[nn.Module]:
        """Return the blocks that are compiled and checkpointed one by one.

        By default those in every nn.ModuleList of the network itself; none means that the network has no
        repeated block.
        """
        lists = [child for child in self.children() if isinstance(child, nn.ModuleList)]
        return [block for blocks in lists for block in blocks]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the prediction (B,C_out,H,W) for x (B,C,H,W), t (B,) and y (B,)."""
        prediction = self.run(x, t, y).prediction
        assert prediction is not None
        return prediction

    def features(self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int], **inputs: Any) -> Features:
        """Return the features of the blocks `indices`; stops after the deepest requested block."""
        return self.run(x, t, y, indices=indices, stop_early=True, **inputs).features

    def flops(self, upto: int | None = None, *, token_times: bool = False, **inputs: Any) -> int:
        """Forward FLOPs for one image: of the whole network, or up to and including block `upto`.

        `inputs` are optional inputs of the forward pass; of tensors, only the shape counts.
        """
        given = {name: _for_one_image(value) for name, value in inputs.items()}

        def forward_one_image(network: nn.Module) -> object:
            info = self.info
            x = torch.empty(1, info.channels, info.input_size, info.input_size, device="meta")
            times = (1, info.tokens) if token_times else (1,)
            t, y = torch.empty(times, device="meta"), torch.empty(1, dtype=torch.long, device="meta")
            indices = () if upto is None else (upto,)
            return network.forward_intermediates(  # type: ignore[operator]
                x, t, y, indices=indices, stop_early=upto is not None, **given
            )

        return forward_flops(self, forward_one_image, ("backbone", upto, token_times, repr(given)))


def _for_one_image(value: Any) -> Any:
    """An optional input for a batch of one image on the meta device."""
    if isinstance(value, Tensor):
        return torch.empty(1, *value.shape[1:], dtype=value.dtype, device="meta")
    if isinstance(value, Route):
        return replace(value, kept=_for_one_image(value.kept))
    return [_for_one_image(part) for part in value] if isinstance(value, (list, tuple)) else value
