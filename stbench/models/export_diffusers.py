"""Export a DiT for diffusers: DiTTransformer2DModel, with the time frequencies of DiT, in DiTPipeline.

diffusers divides the exponents of its time frequencies by 127 where DiT divides them by 128, and its
configuration has no option for this. The folder therefore contains the class as a Python file, which
diffusers runs only with `trust_remote_code=True`. The configuration names a norm type that the plain class
refuses, so that it cannot compute another function of time without an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stbench.core.backbone import Backbone
from stbench.core.errors import UserError
from stbench.core.files import atomic_folder, atomic_write
from stbench.models.weights import State, save_weights

MODULE, CLASS_NAME = "dit_transformer", "OriginalDiTTransformer2DModel"
"""Python file in the folder, and the class in it."""

NORM_TYPE = "ada_norm_zero of DiT: load with AutoModel and trust_remote_code=True"
"""Norm type in the configuration. The plain class refuses it with an error that contains this text."""

SOURCE = f'''"""diffusers' DiTTransformer2DModel with the time frequencies of DiT, 10000^(-i/128)."""

from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config


class {CLASS_NAME}(DiTTransformer2DModel):
    """DiT as published; the arguments are those of DiTTransformer2DModel."""

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        sample_size: int = 32,
        patch_size: int = 2,
        num_embeds_ada_norm: int = 1000,
        norm_type: str = "{NORM_TYPE}",
        norm_eps: float = 1e-6,
    ):
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            sample_size=sample_size,
            patch_size=patch_size,
            num_embeds_ada_norm=num_embeds_ada_norm,
            norm_eps=norm_eps,
        )
        self.register_to_config(norm_type=norm_type)
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
'''
"""The Python file."""

PIPELINE_NULL_LABEL = 1000
"""The label that DiTPipeline takes as null. Tables with fewer classes are padded with the null label."""

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
}
"""Configuration of diffusers' DDIMScheduler for improved DDPM, the process that a DiT is trained with."""

TABLE = "y_embedder.embedding_table.weight"

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


def write_diffusers(network: Backbone, options: Mapping[str, Any], output: Path) -> list[str]:
    """Write the folder of a DiT for diffusers; returns lines that say what loads it.

    Raises UserError for another backbone, or a DiT with qk_norm.
    """
    info = network.info
    if info.name != "dit" or options.get("qk_norm"):
        found = "a DiT with qk_norm" if info.name == "dit" else f"a {info.name}"
        raise UserError(
            f"expected a DiT without qk_norm for diffusers' DiTTransformer2DModel, found {found}; "
            f"try --format official"
        )
    labels = max(info.classes, PIPELINE_NULL_LABEL)
    config = {
        "_class_name": CLASS_NAME,
        "auto_map": {"AutoModel": f"{MODULE}.{CLASS_NAME}"},
        "num_attention_heads": options["heads"],
        "attention_head_dim": info.width // options["heads"],
        "in_channels": info.channels,
        "out_channels": 2 * info.channels,
        "num_layers": info.depth,
        "sample_size": info.input_size,
        "patch_size": info.patch,
        "num_embeds_ada_norm": labels,
        "norm_type": NORM_TYPE,
        "norm_eps": 1e-6,
    }
    state = dict(network.state_dict())
    state[TABLE] = _padded(state[TABLE], labels + 1)
    with atomic_folder(output) as draft:
        tensors = diffusers_state(state, info.depth)
        save_weights(tensors, draft / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        for name, values in (("config", config), ("scheduler_config", SCHEDULER)):
            atomic_write(draft / f"{name}.json", json.dumps(values, indent=1) + "\n")
        atomic_write(draft / f"{MODULE}.py", SOURCE)
    loader = f"AutoModel.from_pretrained({str(output)!r}, trust_remote_code=True)"
    guided = "" if info.classes <= PIPELINE_NULL_LABEL else ", without guidance: its null label is 1000"
    return [
        f"weights: {output}",
        f"loaded by: diffusers' {loader}, with the outputs of this network",
        f"runs in: DiTPipeline with DDIMScheduler.from_pretrained({str(output)!r}){guided}",
    ]


def _padded(table: Tensor, rows: int) -> Tensor:
    """Repeat the last row of a label table, the null label, up to `rows` rows."""
    return torch.cat([table, table[-1:].expand(rows - len(table), -1)])
