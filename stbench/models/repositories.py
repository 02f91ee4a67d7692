"""The published repositories, and which of them wrote a checkpoint, judged by its keys and shapes.

Some repositories use the same keys with different meanings (a DiT and an upstream SiT, or the two directions
of time). In such cases identification raises an error that asks for --original; it never guesses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stbench.core.errors import UserError
from stbench.core.registry import suggest
from stbench.models.external import shown
from stbench.models.weights import State


@dataclass(frozen=True)
class Repository:
    """What the checkpoints of one repository contain."""

    title: str
    family: str
    """Registered name of the backbone."""
    noise_at_zero: bool = False
    """Whether its time runs from noise at t=0 to data at t=1."""
    objective: str | None = None
    """Objective, if it is not that of the family or of the preset."""
    time_scale: float | None = None
    """Time scale of the backbone; None for the family's own."""
    guided_channels: int | None = None
    """Number of leading channels that its sampler guides; None for all."""

    @property
    def convention(self) -> tuple[object, ...]:
        """Everything that loading depends on: repositories with equal conventions need no distinction."""
        return self.family, self.noise_at_zero, self.objective


REPOSITORIES: Mapping[str, Repository] = {
    "dit": Repository("DiT", "dit", guided_channels=3),
    "sit": Repository("SiT", "sit", noise_at_zero=True, guided_channels=3),
    "layersync": Repository("LayerSync", "sit", noise_at_zero=True, guided_channels=3),
    "dispersive": Repository("Dispersive loss", "sit", noise_at_zero=True, guided_channels=3),
    "repa": Repository("REPA", "sit"),
    "sra": Repository("SRA", "sit"),
    "sra-dit": Repository("SRA on DiT", "dit", guided_channels=3),
    "self-transcendence": Repository("Self-Transcendence", "sit"),
    "internal-guidance": Repository("Internal Guidance", "sit"),
    "uvit": Repository("U-ViT", "uvit"),
    "uvit-discrete": Repository(
        "U-ViT, discrete steps (H)", "uvit", objective="vp-discrete", time_scale=1000.0
    ),
    "uvit-continuous": Repository(
        "U-ViT, continuous time (S, M, L)", "uvit", objective="vp-continuous", time_scale=999.0
    ),
}
"""Values of --original."""

HEAD_PREFIXES = ("projectors.", "projectors_final.", "ap_head.")
"""Prefixes of the heads that REPA, Self-Transcendence and SRA store with the network."""

KEPT_HEAD = "final_layer_xr."
"""Prefix of the head of Internal Guidance, which is needed at sampling."""


def identify(
    state: State, settings: Mapping[str, Any], *, original: str | None, family: str | None, where: str
) -> Repository:
    """Return the repository whose conventions a state dict follows.

    `settings` are the options stored in the checkpoint; `original` and `family` are the user's --original and
    --backbone, if given; `where` names the file in messages. Raises UserError if keys and options leave the
    conventions open or contradict each other.
    """
    if original is not None and original not in REPOSITORIES:
        raise UserError(f"unknown original '{original}'{suggest(original, REPOSITORIES)}")

    # Narrow the candidates by the stored model name, then by the backbone that the user named.
    names = _candidates(state, where)
    stored = shown(settings.get("model", "")).partition("-")[0].lower()
    names = [name for name in names if REPOSITORIES[name].family == stored] or names
    if family is not None and family not in {REPOSITORIES[name].family for name in names}:
        raise UserError(
            f"expected the weights of a {family}, found those of {_titles(names)} in {where}; "
            f"type --backbone {REPOSITORIES[names[0]].family}"
        )
    names = [name for name in names if family in (None, REPOSITORIES[name].family)]

    # Without --original, the candidates must agree. U-ViT's are told apart later, by the published size.
    if original is None:
        if len({REPOSITORIES[name].convention for name in names}) > 1 and names[0] != "uvit":
            raise UserError(
                f"{where} may come from {_titles(names)}, which use the same keys with different meanings; "
                f"say which: --original {_either(names)}"
            )
        return REPOSITORIES[names[0]]

    # With --original, it must agree with one of the candidates.
    chosen = REPOSITORIES[original]
    if chosen.convention not in [REPOSITORIES[name].convention for name in names]:
        raise UserError(
            f"expected weights of {chosen.title}, as --original {original} says, found keys of "
            f"{_titles(names)} in {where}; type --original {names[0]}"
        )
    return chosen


def _candidates(state: State, where: str) -> list[str]:
    """Return the names of the repositories that write such keys, the most likely first."""
    if "patch_embed.proj.weight" in state and "in_blocks.0.norm1.weight" in state:
        return ["uvit", "uvit-discrete", "uvit-continuous"]

    # The DiT family: check the two layers whose shapes are needed below.
    embedder, last = "x_embedder.proj.weight", "final_layer.linear.weight"
    if embedder not in state or last not in state:
        raise UserError(
            f"expected keys of DiT, SiT or U-ViT in {where}, such as {embedder}, found {shorten(state)}; "
            f"give an official checkpoint"
        )
    for key, axes in ((embedder, 4), (last, 2)):
        if state[key].ndim != axes:
            raise UserError(
                f"expected {axes} axes of {key} in {where}, found shape {tuple(state[key].shape)}; "
                f"give an official checkpoint"
            )

    # Heads name the recipe. A doubled output is a learned variance: DiT, or an SiT trained like it.
    _, channels, patch, _ = state[embedder].shape
    doubled = state[last].shape[0] == 2 * channels * patch**2
    if "ap_head.linear1.weight" in state:
        return ["sra-dit"] if doubled else ["sra"]
    if any(key.startswith(KEPT_HEAD) for key in state):
        return ["internal-guidance"]
    if any(re.match(r"projectors\.\d+\.(\d+|projection_layer)\.|decoder_blocks\.", key) for key in state):
        return ["repa"]
    if any(key.startswith("projectors") for key in state):
        return ["self-transcendence"]
    if doubled:
        return ["dit", "sit", "layersync", "dispersive"]
    if "blocks.0.attn.q_norm.weight" in state:
        return ["self-transcendence", "repa", "sra"]
    return ["repa", "sra", "self-transcendence", "sit"]


def shorten(keys: Sequence[str] | set[str] | State) -> str:
    """List the first five keys in alphabetical order, and the number of others."""
    ordered = [shown(key) for key in sorted(keys)]
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def _titles(names: Sequence[str]) -> str:
    return _either([REPOSITORIES[name].title for name in names])


def _either(words: Sequence[str]) -> str:
    """Join words as in "a, b or c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
