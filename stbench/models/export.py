"""Export a network for other codebases: the published repositories, and diffusers' DiT.

Exported weights keep the direction of time they were trained with: time enters through sines of t, so weights
cannot be converted from t to 1-t. Each export names a repository whose code uses that direction.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stbench.core.backbone import Backbone, trunk_state
from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.models.export_diffusers import write_diffusers
from stbench.models.export_loaders import Exported, loaded_by
from stbench.models.official_heads import DEPTH, PUBLISHED_DEPTH
from stbench.models.repositories import KEPT_HEAD
from stbench.models.weights import State

Kind = Literal["official", "diffusers"]

_FLOWS = ("linear", "cosine", "linear-lognormal", "cosine-lognormal")
TIME_SCALES: Mapping[str, Mapping[str, float]] = {
    "dit": {"iddpm": 999.0},
    "sit": dict.fromkeys(_FLOWS, 1.0),
    "uvit": {"vp-discrete": 1000.0, "vp-continuous": 999.0},
}
"""Family -> objectives that its published code can sample from -> time scale that the code assumes."""


def export_network(
    network: Backbone,
    options: Mapping[str, Any],
    objective: str,
    *,
    kind: Kind,
    output: Path,
    heads: State | None = None,
    head_block: int = PUBLISHED_DEPTH - 1,
) -> list[str]:
    """Write a network's weights for another codebase.

    `options` are the constructor options of the backbone; `heads` are stored with an official file, under the
    names of their repository (see `export_heads`), and `head_block` is the 0-based block of the head of
    Internal Guidance. The network's own heads are left out. Returns lines that say what was written and which
    code loads it. Raises UserError for a network that the other code cannot express.
    """
    _require_published(network, objective)
    if kind == "diffusers":
        return write_diffusers(network, options, output)
    if output.suffix != ".pt":
        raise UserError(f"--output must be a file that ends in .pt, found {output}; try {output}.pt")
    content, loaders = official_file(
        network, options, objective, heads=heads or {}, head_block=head_block, name=output.name
    )
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(output, buffer.getvalue())
    return [f"weights: {output}", *(f"loaded by: {loader}" for loader in loaders)]


def _require_published(network: Backbone, objective: str) -> None:
    """Raise UserError unless published code can sample from this backbone and objective."""
    family = network.info.name
    if family not in TIME_SCALES:
        raise UserError(
            f"expected a backbone of {', '.join(TIME_SCALES)}, found {family}; no other code loads it"
        )
    # Published code hard-codes objective and time scale, so neither can be passed along with the weights.
    scale = TIME_SCALES[family].get(objective)
    if scale is None:
        raise UserError(
            f"expected a {family} trained with {' or '.join(TIME_SCALES[family])}, found objective "
            f"'{objective}'; the published code cannot sample from it"
        )
    if network.time_scale != scale:
        raise UserError(
            f"expected backbone.time_scale={scale:g}, as in the published code of {family} with {objective}, "
            f"found {network.time_scale:g}; train without --set backbone.time_scale"
        )


# --- Published repositories ---


def official_file(
    network: Backbone,
    options: Mapping[str, Any],
    objective: str,
    *,
    heads: State,
    head_block: int = PUBLISHED_DEPTH - 1,
    name: str = "run.pt",
) -> tuple[dict[str, Any], list[str]]:
    """Return the content of an official file called `name`, and what loads it; see `export_network`.

    Raises UserError for heads whose repository has no such network.
    """
    family, noise_at_zero = network.info.name, bool(options.get("noise_at_zero"))
    sra_only = family == "dit" and any(not key.startswith("ap_head.") for key in heads)
    if heads and (family == "uvit" or noise_at_zero or sra_only):
        found = f"a {family}{' with noise at t=0' if noise_at_zero else ''}"
        raise UserError(
            f"expected a network whose repository stores these heads, found {found}; "
            f"use --with-heads none{', or sra' if sra_only else ''}"
        )
    kept = any(key.startswith(KEPT_HEAD) for key in heads)
    depth = {DEPTH: min(head_block + 1, network.info.depth)} if kept else {}
    state = official_state(network, options) | dict(heads)
    exported = Exported(
        info=network.info,
        objective=objective,
        heads=heads,
        head_depth=depth,
        attention_heads=int(options["heads"]),
        qk_norm=bool(options.get("qk_norm")),
        noise_at_zero=noise_at_zero,
        learn_sigma=bool(options.get("learn_sigma")),
    )
    args = {**_training_options(network, objective), **depth}
    content = state if family == "uvit" else {"ema": state, "args": args}
    return content, loaded_by(exported, name)


def _training_options(network: Backbone, objective: str) -> dict[str, str]:
    """Return what the repositories store under "args", as far as it says how the weights must be used."""
    info = network.info
    args = {"model": f"{'DiT' if info.name == 'dit' else 'SiT'}-{info.size.upper()}"}
    if info.name == "sit":
        upstream = bool(getattr(network, "noise_at_zero", False))
        names = {"linear": "Linear", "cosine": "GVP"} if upstream else {}
        path = objective.partition("-")[0]
        args |= {"path_type": names.get(path, path), "prediction": "velocity" if upstream else "v"}
    return args


def official_state(network: Backbone, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict that published code loads, without heads.

    Raises UserError for qk_norm where the published code has none.
    """
    family = network.info.name
    state = {key: value.clone() for key, value in trunk_state(network).items()}
    noise_at_zero = bool(options.get("noise_at_zero"))
    if options.get("qk_norm") and (family == "dit" or noise_at_zero):
        raise UserError(
            f"expected a {family} without qk_norm, which its published code lacks, found one with it; "
            f"train with --set backbone.qk_norm=false"
        )
    # Upstream SiT may predict a variance; the code of REPA, SRA and Self-Transcendence does not.
    if family == "sit" and options.get("learn_sigma") and not noise_at_zero:
        state |= _without_variance(state, network)
    return state


def _without_variance(state: State, network: Backbone) -> dict[str, Tensor]:
    """Return the final layer without the rows of the learned variance; each token is (p*p, 2C)."""
    cut = {}
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        value, positions = state[key], network.info.patch**2
        rows = value.reshape(positions, -1, *value.shape[1:])
        cut[key] = rows[:, : rows.shape[1] // 2].flatten(0, 1).clone()
    return cut
