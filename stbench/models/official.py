"""Checkpoints of the published repositories as networks of ours: what they are is read from keys and shapes.

DiT, SiT, REPA, SRA, LayerSync, Dispersive loss, Self-Transcendence and U-ViT. Where keys cannot tell two of
them apart (a DiT from an upstream SiT, or the direction of time), the user is asked, never guessed for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stbench.core.backbone import Backbone, Weights
from stbench.core.errors import UserError
from stbench.core.registry import BACKBONES, lookup, suggest
from stbench.models.weights import State, read_foreign, tensors_sha256


@dataclass(frozen=True)
class Original:
    """What one repository's checkpoints are."""

    title: str
    family: str
    noise_at_zero: bool = False
    """Whether its time runs from noise at 0 to data at 1."""
    objective: str | None = None
    """Set where it is not the family's, or the preset's, own."""
    time_scale: float | None = None
    guided: int | None = None
    """Leading channels that its sampler guides; None is all."""

    @property
    def convention(self) -> tuple[object, ...]:
        """What loading depends on; two repositories with equal ones need not be told apart."""
        return self.family, self.noise_at_zero, self.objective


ORIGINALS: Mapping[str, Original] = {
    "dit": Original("DiT", "dit", guided=3),
    "sit": Original("SiT", "sit", noise_at_zero=True, guided=3),
    "layersync": Original("LayerSync", "sit", noise_at_zero=True, guided=3),
    "dispersive": Original("Dispersive loss", "sit", noise_at_zero=True, guided=3),
    "repa": Original("REPA", "sit"),
    "sra": Original("SRA", "sit"),
    "sra-dit": Original("SRA on DiT", "dit", guided=3),
    "self-transcendence": Original("Self-Transcendence", "sit"),
    "uvit": Original("U-ViT", "uvit"),
    "uvit-discrete": Original("U-ViT, discrete steps (H)", "uvit", False, "vp-discrete", 1000.0),
    "uvit-continuous": Original("U-ViT, continuous time (S, M, L)", "uvit", False, "vp-continuous", 999.0),
}
"""What `--original` takes."""

HEADS = ("projectors.", "projectors_final.", "ap_head.")
"""Prefixes under which REPA, Self-Transcendence and SRA keep their heads beside the network."""

PATHS = {"linear": "linear", "cosine": "cosine", "gvp": "cosine"}
"""Path types of the SiT repositories' options -> our objectives."""


@dataclass(frozen=True)
class OfficialModel:
    """An official checkpoint as a network of ours, and what it was found to be."""

    backbone: Backbone
    """Frozen, in eval mode, on the host, in our direction of time."""
    objective: str
    family: str
    size: str
    """Preset name; "custom" for none."""
    dropped: tuple[str, ...]
    """Keys that are no part of the network: the heads of a recipe."""
    source: str
    """What it is, in words."""
    sha256: str
    """Of the network's tensors as stored, whatever lies beside them; see `tensors_sha256`."""
    options: Mapping[str, Any]
    """Constructor options of the backbone that the file decided."""
    guided: int | None = None
    """Leading channels that its repository guides; None is all."""


def load_official(
    path: Path,
    *,
    weights: Weights = "ema",
    heads: int | None = None,
    original: str | None = None,
    family: str | None = None,
) -> OfficialModel:
    """The network in an official .pt or .safetensors file, configured from its shapes.

    `weights` picks "ema" (official samples are made with it) or "raw" from a training checkpoint; a flat file
    has one set. `heads` is needed where neither shapes nor a published width tell it, `original` (a name in
    ORIGINALS) where the keys fit repositories that mean different things by them; `family` is a backbone that
    the user has named already. Raises UserError for an
    unreadable file, for keys or shapes that fit no family, and for whichever of the two it needs.
    """
    foreign = read_foreign(path, weights)
    return from_state(
        foreign.state, foreign.where, foreign.settings, heads=heads, original=original, family=family
    )


def from_state(
    state: State,
    where: str = "the weights",
    settings: Mapping[str, Any] | None = None,
    *,
    heads: int | None = None,
    original: str | None = None,
    family: str | None = None,
) -> OfficialModel:
    """As `load_official`, from tensors; `where` names them in messages, `settings` are the stored options."""
    settings = settings or {}
    found = _identify(state, settings, original, family, where)
    dropped = tuple(sorted(key for key in state if key.startswith(HEADS)))
    trunk = _renamed({key: value for key, value in state.items() if key not in dropped})
    net, options = _build(trunk, found, heads, where)
    objective = _objective(found, options, settings, where)
    if objective == "iddpm" and options["out_channels"] != 2 * options["channels"]:
        raise UserError(
            f"expected a DiT with learned variance, {2 * options['channels']} channels out, in {where}, "
            f"found {options['out_channels']}; use one trained with learn_sigma"
        )
    size = net.info.size
    return OfficialModel(
        backbone=net,
        objective=objective,
        family=found.family,
        size=size,
        dropped=dropped,
        source=f"{found.title}, {found.family}-{size}, {_direction(found)}{_without(dropped)}, from {where}",
        sha256=tensors_sha256(trunk),
        options=options,
        guided=found.guided,
    )


def _direction(found: Original) -> str:
    return "trained with noise at t=0, turned round" if found.noise_at_zero else "time as ours"


def _without(dropped: Sequence[str]) -> str:
    """ ", without its heads projectors" for keys under it."""
    heads = sorted({key.partition(".")[0] for key in dropped})
    return f", without its heads {' and '.join(heads)}" if heads else ""


def _identify(
    state: State, settings: Mapping[str, Any], said: str | None, wanted: str | None, where: str
) -> Original:
    """Which repository's conventions hold; UserError if keys and the user leave it open or disagree."""
    if said is not None and said not in ORIGINALS:
        raise UserError(f"unknown original '{said}'{suggest(said, ORIGINALS)}")
    names = _candidates(state, where)
    stored = str(settings.get("model", "")).partition("-")[0].lower()
    names = [name for name in names if ORIGINALS[name].family == stored] or names
    if wanted is not None and wanted not in {ORIGINALS[name].family for name in names}:
        raise UserError(
            f"expected the weights of a {wanted}, found those of {_either(names)} in {where}; "
            f"type --backbone {ORIGINALS[names[0]].family}"
        )
    names = [name for name in names if wanted in (None, ORIGINALS[name].family)]
    if said is None:
        if len({ORIGINALS[name].convention for name in names}) > 1 and names[0] != "uvit":
            raise UserError(
                f"{where} may come from {_either(names)}, whose keys are the same but mean other things; "
                f"say which: --original {_listed(names)}"
            )
        return ORIGINALS[names[0]]
    if ORIGINALS[said].convention not in [ORIGINALS[name].convention for name in names]:
        raise UserError(
            f"expected weights of {ORIGINALS[said].title}, as --original {said} says, found keys of "
            f"{_either(names)} in {where}; type --original {names[0]}"
        )
    return ORIGINALS[said]


def _either(names: Sequence[str]) -> str:
    return _listed([ORIGINALS[name].title for name in names])


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _candidates(state: State, where: str) -> list[str]:
    """The repositories that write such keys, the likeliest first."""
    if "patch_embed.proj.weight" in state and "in_blocks.0.norm1.weight" in state:
        return ["uvit", "uvit-discrete", "uvit-continuous"]
    embedder, last = "x_embedder.proj.weight", "final_layer.linear.weight"
    if embedder not in state or last not in state:
        raise UserError(
            f"expected keys of DiT, SiT or U-ViT in {where}, such as {embedder}, found {_named(state)}; "
            f"give an official checkpoint"
        )
    for key, axes in ((embedder, 4), (last, 2)):
        if state[key].ndim != axes:
            raise UserError(
                f"expected {axes} axes of {key} in {where}, found shape {tuple(state[key].shape)}; "
                f"give an official checkpoint"
            )
    _, channels, patch, _ = state[embedder].shape
    doubled = state[last].shape[0] == 2 * channels * patch**2
    if "ap_head.linear1.weight" in state:
        return ["sra-dit"] if doubled else ["sra"]
    if any(re.match(r"projectors\.\d+\.\d+\.|decoder_blocks\.", key) for key in state):
        return ["repa"]
    if any(key.startswith("projectors") for key in state):
        return ["self-transcendence"]
    if doubled:
        return ["dit", "sit", "layersync", "dispersive"]
    if "blocks.0.attn.q_norm.weight" in state:
        return ["self-transcendence", "repa", "sra"]
    return ["repa", "sra", "self-transcendence", "sit"]


def _renamed(state: State) -> dict[str, Tensor]:
    """REPA's early files number the blocks behind the projector anew: decoder_blocks.k, blocks.(k+depth)."""
    encoder = len({key.split(".")[1] for key in state if key.startswith("blocks.")})

    def name(key: str) -> str:
        if not key.startswith("decoder_blocks."):
            return key
        _, number, rest = key.split(".", 2)
        return f"blocks.{int(number) + encoder}.{rest}"

    return {name(key): value for key, value in state.items()}


def _build(state: State, found: Original, heads: int | None, where: str) -> tuple[Backbone, dict[str, Any]]:
    cls = lookup(BACKBONES, found.family)
    try:
        options: dict[str, Any] = cls.infer(state, heads)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"expected the weights of a {found.family} in {where}, found none under {error}; "
            f"give an official checkpoint"
        ) from error
    if found.noise_at_zero:
        options["noise_at_zero"] = True
    if found.time_scale is not None:
        options["time_scale"] = found.time_scale
    elif found.family == "uvit" and "time_scale" not in options:
        raise UserError(
            f"{where} is a U-ViT of no published size, and weights do not tell its time; say which, "
            f"as --original uvit-discrete or --original uvit-continuous"
        )
    with torch.device("meta"):
        net: Backbone = cls(**options)
    _require_same_keys(set(net.state_dict()), set(state), found.family, where)
    _require_same_shapes(net.state_dict(), state, found.family, where)
    net.load_state_dict({key: value.float().clone() for key, value in state.items()}, assign=True)
    return net.eval().requires_grad_(False), options


def _objective(found: Original, options: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> str:
    """The objective the weights were trained with; UserError for one that is not among ours."""
    cls = lookup(BACKBONES, found.family)
    preset = cls.presets.get(options["size"], {})
    if found.family != "sit":
        return found.objective or str(preset.get("objective", cls.objective))
    path = str(settings.get("path_type", "linear")).lower()
    predicted = str(settings.get("prediction", "v"))
    if path not in PATHS or predicted not in ("v", "velocity"):
        raise UserError(
            f"expected a velocity on one of the paths {', '.join(PATHS)} in {where}, found prediction "
            f"'{predicted}' on path '{path}'; use another checkpoint"
        )
    return PATHS[path]


def _require_same_keys(expected: set[str], found: set[str], family: str, where: str) -> None:
    for what, keys in (("unknown", found - expected), ("missing", expected - found)):
        if keys:
            raise UserError(
                f"expected the keys of a {family} in {where}, found {what} keys: {_named(keys)}; "
                f"give an official checkpoint"
            )


def _require_same_shapes(expected: State, found: State, family: str, where: str) -> None:
    for key, value in found.items():
        if value.shape != expected[key].shape or not value.is_floating_point():
            raise UserError(
                f"expected {key} {tuple(expected[key].shape)} of a {family} in {where}, "
                f"found {value.dtype} {tuple(value.shape)}; give an official checkpoint"
            )


def _named(keys: Sequence[str] | set[str] | State) -> str:
    ordered = sorted(keys)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
