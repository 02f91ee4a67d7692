"""A run's weights for other people's code: the published repositories', and diffusers' DiTTransformer2DModel.

Weights cannot be turned to the other direction of time, because 1-t goes through sines; so what is written
keeps the direction it was trained with, and is named after a repository whose code has that direction.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stbench.core.backbone import Backbone
from stbench.core.errors import UserError
from stbench.core.files import atomic_folder, atomic_write
from stbench.models.weights import State, save_weights

Kind = Literal["official", "diffusers"]


FLOWS = ("linear", "cosine", "linear-lognormal", "cosine-lognormal")


NATIVE = {"dit": {"iddpm": 999.0}, "sit": dict.fromkeys(FLOWS, 1.0)}


NATIVE["uvit"] = {"vp-discrete": 1000.0, "vp-continuous": 999.0}
"""Family -> objectives its repository trains with, and the time scale that each needs."""


def _require_native(network: Backbone, objective: str) -> None:
    family = network.info.name
    if family not in NATIVE:
        raise UserError(f"expected a backbone of {', '.join(NATIVE)}, found {family}; no other code loads it")
    scale = NATIVE[family].get(objective)
    if scale is None:
        raise UserError(
            f"expected a {family} trained with {' or '.join(NATIVE[family])}, found objective '{objective}'; "
            f"its published code cannot sample from that"
        )
    if network.time_scale != scale:
        raise UserError(
            f"expected backbone.time_scale={scale:g}, as {family}'s published code has it with {objective}, "
            f"found {network.time_scale:g}; train without --set backbone.time_scale"
        )


def _write_official(network: Backbone, options: dict[str, Any], output: Path, objective: str) -> list[str]:
    if output.suffix != ".pt":
        raise UserError(f"--output wants a file that ends in .pt, got {output}; try {output}.pt")
    state, whose = official_state(network, options)
    buffer = io.BytesIO()
    torch.save(state if network.info.name == "uvit" else {"ema": state}, buffer)
    atomic_write(output, buffer.getvalue())
    return [f"weights: {output}", f"for: {whose}; objective {objective}"]


def official_state(network: Backbone, options: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The state dict that the published code loads, and which code with which arguments that is."""
    family, qk_norm = network.info.name, bool(options.get("qk_norm"))
    state = {key: value.clone() for key, value in network.state_dict().items()}
    upstream = bool(options.get("noise_at_zero"))
    if qk_norm and (family == "dit" or upstream):
        raise UserError(
            f"expected no qk_norm in a {family} for its published code, found it; "
            f"train with --set backbone.qk_norm=false"
        )
    if family == "uvit":
        time = "1000 t" if network.time_scale == 1000.0 else "999 t"
        return state, f"baofff/U-ViT libs/uvit.py, flat, given {time}"
    if family == "dit":
        return state, "facebookresearch/DiT models.py (learn_sigma=True), under 'ema'"
    sigma = bool(options.get("learn_sigma"))
    if upstream:
        return state, f"willisma/SiT models.py (learn_sigma={sigma}), under 'ema'; t=0 is noise"
    if sigma:
        state |= _first_half(state, network)
    return state, (
        f"sihyun-yu/REPA models/sit.py (z_dims=[], qk_norm={qk_norm}), SRA and Self-Transcendence, under "
        f"'ema'; t=0 is data, so upstream SiT's samplers do not fit"
    )


def _first_half(state: State, network: Backbone) -> dict[str, Tensor]:
    """The final layer without the rows of the learned variance: each token is (p*p, 2C)."""
    cut = {}
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        value, positions = state[key], network.info.patch**2
        rows = value.reshape(positions, -1, *value.shape[1:])
        cut[key] = rows[:, : rows.shape[1] // 2].flatten(0, 1).clone()
    return cut


DIFFUSERS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out_2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
}


BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}


EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
"""Modules of DiT -> those of DiTTransformer2DModel; it keeps a copy of the embedders in every block."""


def diffusers_state(state: State, depth: int) -> dict[str, Tensor]:
    """A DiT's weights under the names of diffusers' DiTTransformer2DModel, which computes its positions."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if module in DIFFUSERS:
            renamed[f"{DIFFUSERS[module]}.{kind}"] = value
        elif module in EMBEDDERS:
            for block in range(depth):
                renamed[f"transformer_blocks.{block}.norm1.emb.{EMBEDDERS[module]}.{kind}"] = value.clone()
        elif module.startswith("blocks."):
            _, number, part = module.split(".", 2)
            prefix = f"transformer_blocks.{number}"
            if part == "attn.qkv":
                for name, rows in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{prefix}.attn1.to_{name}.{kind}"] = rows
            else:
                renamed[f"{prefix}.{BLOCK[part]}.{kind}"] = value
    return renamed


def _write_diffusers(network: Backbone, options: dict[str, Any], output: Path) -> list[str]:
    info = network.info
    if info.name != "dit" or options.get("qk_norm"):
        found = "a DiT with qk_norm" if info.name == "dit" else f"a {info.name}"
        raise UserError(
            f"expected a DiT without qk_norm for diffusers' DiTTransformer2DModel, found {found}; "
            f"try --format official"
        )
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
    return [
        f"weights: {output}",
        "for: diffusers' DiTTransformer2DModel.from_pretrained; it embeds time with other frequencies than "
        "DiT, so set transformer_blocks[i].norm1.emb.time_proj.downscale_freq_shift = 0 for every block i",
    ]
