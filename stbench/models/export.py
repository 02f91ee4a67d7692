"""Export a network for other codebases: the published repositories, and diffusers' DiTTransformer2DModel.

Exported weights keep the direction of time they were trained with: time enters through sines of t, so weights
cannot be converted from t to 1-t. Each export names a repository whose code uses that direction.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stbench.core.backbone import Backbone
from stbench.core.errors import UserError
from stbench.core.files import atomic_folder, atomic_write
from stbench.models.weights import State, save_weights

Kind = Literal["official", "diffusers"]

_FLOWS = ("linear", "cosine", "linear-lognormal", "cosine-lognormal")
TIME_SCALES: Mapping[str, Mapping[str, float]] = {
    "dit": {"iddpm": 999.0},
    "sit": dict.fromkeys(_FLOWS, 1.0),
    "uvit": {"vp-discrete": 1000.0, "vp-continuous": 999.0},
}
"""Family -> objectives that its published code can sample from -> time scale that the code assumes."""


def export_network(
    network: Backbone, options: Mapping[str, Any], objective: str, *, kind: Kind, output: Path
) -> list[str]:
    """Write a network's weights for another codebase.

    `options` are the constructor options of the backbone. Returns lines that say what was written and which
    code loads it. Raises UserError for a network that the other code cannot express.
    """
    _require_published(network, objective)
    if kind == "diffusers":
        return _write_diffusers(network, options, output)
    return _write_official(network, options, objective, output)


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


def _write_official(network: Backbone, options: Mapping[str, Any], objective: str, output: Path) -> list[str]:
    if output.suffix != ".pt":
        raise UserError(f"--output must be a file that ends in .pt, found {output}; try {output}.pt")
    state, code = official_state(network, options)
    buffer = io.BytesIO()
    args = _training_options(network, objective)
    torch.save(state if network.info.name == "uvit" else {"ema": state, "args": args}, buffer)
    atomic_write(output, buffer.getvalue())
    return [f"weights: {output}", f"for: {code}; objective {objective}"]


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


def official_state(network: Backbone, options: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Return the state dict that published code loads, and which code with which arguments that is.

    Raises UserError for qk_norm where the published code has none.
    """
    family, qk_norm = network.info.name, bool(options.get("qk_norm"))
    state = {key: value.clone() for key, value in network.state_dict().items()}
    noise_at_zero = bool(options.get("noise_at_zero"))
    if qk_norm and (family == "dit" or noise_at_zero):
        raise UserError(
            f"expected a {family} without qk_norm, which its published code lacks, found one with it; "
            f"train with --set backbone.qk_norm=false"
        )
    if family == "uvit":
        time = "1000 t" if network.time_scale == 1000.0 else "999 t"
        return state, f"baofff/U-ViT libs/uvit.py, flat, given {time}"
    if family == "dit":
        return state, "facebookresearch/DiT models.py (learn_sigma=True), under 'ema'"

    # A SiT: upstream code starts at noise and predicts a variance, REPA's code does neither.
    learn_sigma = bool(options.get("learn_sigma"))
    if noise_at_zero:
        return state, f"willisma/SiT models.py (learn_sigma={learn_sigma}), under 'ema'; t=0 is noise"
    if learn_sigma:
        state |= _without_variance(state, network)
    return state, (
        f"sihyun-yu/REPA models/sit.py (z_dims=[], qk_norm={qk_norm}), SRA and Self-Transcendence, under "
        f"'ema'; t=0 is data, so upstream SiT's samplers do not fit"
    )


def _without_variance(state: State, network: Backbone) -> dict[str, Tensor]:
    """Return the final layer without the rows of the learned variance; each token is (p*p, 2C)."""
    cut = {}
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        value, positions = state[key], network.info.patch**2
        rows = value.reshape(positions, -1, *value.shape[1:])
        cut[key] = rows[:, : rows.shape[1] // 2].flatten(0, 1).clone()
    return cut


# --- diffusers ---

DIFFUSERS_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out_2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
}
"""Modules of DiT outside the blocks -> those of DiTTransformer2DModel."""
DIFFUSERS_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
"""Modules of a block of DiT -> those of a block of DiTTransformer2DModel."""
DIFFUSERS_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
"""Embedders of DiT -> those of DiTTransformer2DModel, which keeps a copy of them in every block."""


def diffusers_state(state: State, depth: int) -> dict[str, Tensor]:
    """Rename a DiT's weights to diffusers' DiTTransformer2DModel, which computes its position embedding."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if module in DIFFUSERS_OUTER:
            renamed[f"{DIFFUSERS_OUTER[module]}.{kind}"] = value
        elif module in DIFFUSERS_EMBEDDERS:
            embedder = DIFFUSERS_EMBEDDERS[module]
            for block in range(depth):
                renamed[f"transformer_blocks.{block}.norm1.emb.{embedder}.{kind}"] = value.clone()
        elif module.startswith("blocks."):
            _, number, part = module.split(".", 2)
            prefix = f"transformer_blocks.{number}"
            # DiT computes queries, keys and values in one layer, diffusers in three.
            if part == "attn.qkv":
                for name, rows in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{prefix}.attn1.to_{name}.{kind}"] = rows
            else:
                renamed[f"{prefix}.{DIFFUSERS_BLOCK[part]}.{kind}"] = value
    return renamed


def _write_diffusers(network: Backbone, options: Mapping[str, Any], output: Path) -> list[str]:
    info = network.info
    if info.name != "dit" or options.get("qk_norm"):
        found = "a DiT with qk_norm" if info.name == "dit" else f"a {info.name}"
        raise UserError(
            f"expected a DiT without qk_norm for diffusers' DiTTransformer2DModel, found {found}; "
            f"try --format official"
        )
    # The arguments of DiTTransformer2DModel.
    config = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": options["heads"],
        "attention_head_dim": info.width // options["heads"],
        "in_channels": info.channels,
        "out_channels": 2 * info.channels,
        "num_layers": info.depth,
        "sample_size": info.input_size,
        "patch_size": info.patch,
        "num_embeds_ada_norm": info.classes,
        "norm_eps": 1e-6,
    }
    state = diffusers_state(network.state_dict(), info.depth)
    with atomic_folder(output) as draft:
        save_weights(state, draft / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        atomic_write(draft / "config.json", json.dumps(config, indent=1) + "\n")
    # diffusers divides the exponents of its frequencies by 127 by default, DiT by 128.
    return [
        f"weights: {output}",
        "for: diffusers' DiTTransformer2DModel.from_pretrained; it embeds time with other frequencies than "
        "DiT, so set transformer_blocks[i].norm1.emb.time_proj.downscale_freq_shift = 0 for every block i",
    ]
