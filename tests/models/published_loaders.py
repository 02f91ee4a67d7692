"""What the published sampling scripts load: their options and the keys and shapes that they require.

Written from the scripts' loading code (argument parser, table of models, class, `load_state_dict`), without
copying any of it. A shape table stands for the class: strict loading compares keys and shapes, nothing else.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}
MODELS = {f"{size}/{patch}": (*SIZES[size], patch) for size in SIZES for patch in (2, 4, 8)}


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def trunk(
    *,
    input_size: int,
    patch_size: int,
    hidden_size: int,
    depth: int,
    num_heads: int,
    num_classes: int,
    in_channels: int = 4,
    decoder_hidden_size: int | None = None,
    learn_sigma: bool = False,
    qk_norm: bool = False,
) -> Shapes:
    """The class DiT or SiT of every repository, without heads."""
    d, p, decoder = hidden_size, patch_size, decoder_hidden_size or hidden_size
    shapes: Shapes = {
        "pos_embed": (1, (input_size // p) ** 2, d),
        "x_embedder.proj.weight": (d, in_channels, p, p),
        "x_embedder.proj.bias": (d,),
        "y_embedder.embedding_table.weight": (num_classes + 1, d),
        **linear("t_embedder.mlp.0", 256, d),
        **linear("t_embedder.mlp.2", d, d),
        **linear("final_layer.linear", decoder, p * p * in_channels * (2 if learn_sigma else 1)),
        **linear("final_layer.adaLN_modulation.1", decoder, 2 * decoder),
    }
    for i in range(depth):
        block = f"blocks.{i}"
        shapes |= linear(f"{block}.attn.qkv", d, 3 * d) | linear(f"{block}.attn.proj", d, d)
        shapes |= linear(f"{block}.mlp.fc1", d, 4 * d) | linear(f"{block}.mlp.fc2", 4 * d, d)
        shapes |= linear(f"{block}.adaLN_modulation.1", d, 6 * d)
        for norm in ("q_norm", "k_norm") if qk_norm else ():
            shapes |= {f"{block}.attn.{norm}.{kind}": (d // num_heads,) for kind in ("weight", "bias")}
    return shapes


def mlp(name: str, width: int, hidden: int, out: int) -> Shapes:
    layers = ((width, hidden), (hidden, hidden), (hidden, out))
    return {k: v for i, (a, b) in enumerate(layers) for k, v in linear(f"{name}.{2 * i}", a, b).items()}


def repa(
    *, z_dims: Sequence[int] = (768,), projector_dim: int = 2048, encoder_depth: int = 8, **o: Any
) -> Shapes:
    """sihyun-yu/REPA models/sit.py; `encoder_depth` must be a block, or the forward pass fails."""
    assert 1 <= encoder_depth <= o["depth"]
    heads = [mlp(f"projectors.{j}", o["hidden_size"], projector_dim, z) for j, z in enumerate(z_dims)]
    return trunk(**o) | {key: shape for head in heads for key, shape in head.items()}


def sra(**o: Any) -> Shapes:
    """vvvvvjdy/SRA SiT-SRA/models/sit.py and DiT-SRA/models/dit.py."""
    d = o["hidden_size"]
    return trunk(**o) | linear("ap_head.linear1", d, 2 * d) | linear("ap_head.linear2", 2 * d, d)


def selftrans(*, projector_dim: int = 2048, **o: Any) -> Shapes:
    """csslc/Self-Transcendence models/sit_selftrans_model.py."""
    return trunk(**o) | mlp("projectors", o["hidden_size"], projector_dim, o["hidden_size"])


def vaeloss(*, encoder_depth: int = 8, **o: Any) -> Shapes:
    """csslc/Self-Transcendence models/sit_vaeloss_model.py, which its generate.py builds."""
    assert 1 <= encoder_depth <= o["depth"]
    out = o["patch_size"] ** 2 * o.get("in_channels", 4)
    return selftrans(**o) | linear("projectors_final.linear", o["hidden_size"], out)


def internal(*, encoder_depth: int = 8, **o: Any) -> Shapes:
    """CVL-UESTC/Internal-Guidance SiT/models/sit.py: a second final layer after a block."""
    assert 1 <= encoder_depth <= o["depth"]
    base = trunk(**o)
    return base | {
        key.replace("final_layer", "final_layer_xr"): shape
        for key, shape in base.items()
        if key.startswith("final_layer")
    }


CLASSES = {
    "SiT/models/sit.py of CVL-UESTC/Internal-Guidance": internal,
    "models/sit.py of sihyun-yu/REPA": repa,
    "SiT-SRA/models/sit.py of vvvvvjdy/SRA": sra,
    "DiT-SRA/models/dit.py of vvvvvjdy/SRA": lambda **o: sra(learn_sigma=True, **o),
    "models/sit_selftrans_model.py of csslc/Self-Transcendence": selftrans,
    "models/sit_vaeloss_model.py of csslc/Self-Transcendence": vaeloss,
    "models.py of facebookresearch/DiT": trunk,
    "models.py of willisma/SiT": trunk,
    "models.py of vita-epfl/LayerSync": trunk,
}


def parser(resolution: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options that the sampling scripts have in common."""
    found = argparse.ArgumentParser(exit_on_error=False)
    found.add_argument("--ckpt")
    found.add_argument("--model", default="XL/2")
    found.add_argument(resolution, dest="resolution", type=int, choices=[256, 512], default=256)
    found.add_argument("--num-classes", type=int, default=1000)
    found.set_defaults(**defaults)
    return found


def published_script(line: str) -> tuple[Shapes, bool, bool]:
    """The shapes that a script builds with these options, whether it needs "ema", whether it is strict."""
    script, _, rest = line.partition(" of ")
    repository, *words = shlex.split(rest)
    upstream = repository in ("facebookresearch/DiT", "willisma/SiT", "vita-epfl/LayerSync")
    options = parser("--image-size" if upstream else "--resolution")
    if not repository.endswith("/DiT") and not script.startswith("DiT-SRA"):
        options.add_argument(
            "--path-type", choices=["Linear", "GVP", "VP"] if upstream else ["linear", "cosine"]
        )
    if not upstream and not script.startswith("DiT-SRA"):
        default = repository == "csslc/Self-Transcendence"
        options.add_argument("--qk-norm", action=argparse.BooleanOptionalAction, default=default)
    if repository == "sihyun-yu/REPA":
        options.add_argument("--projector-embed-dims", default="768,1024")
    if repository == "CVL-UESTC/Internal-Guidance":
        options.add_argument("--encoder-depth", type=int, default=8)
    if repository in ("willisma/SiT", "vita-epfl/LayerSync"):
        options.add_argument("mode", choices=["ODE", "SDE"])
    args = options.parse_args(words)
    depth, width, heads, patch = MODELS[args.model.split("-")[1]]
    model: dict[str, Any] = dict(
        depth=depth, hidden_size=width, num_heads=heads, patch_size=patch, num_classes=args.num_classes
    )
    model |= {"input_size": args.resolution // 8, "qk_norm": getattr(args, "qk_norm", False)}
    # The tables of models of the repositories with t=0 for data leave SiT-S with the default, 768.
    table = model | ({"decoder_hidden_size": max(width, 768)} if not upstream else {})
    if script.startswith("DiT-SRA"):
        return sra(learn_sigma=True, **model), True, True
    if repository == "CVL-UESTC/Internal-Guidance":
        return internal(encoder_depth=args.encoder_depth, **table), False, True
    if repository == "vvvvvjdy/SRA":
        return sra(**table), False, True
    if repository == "sihyun-yu/REPA":
        dims = [int(dim) for dim in args.projector_embed_dims.split(",")]
        return repa(z_dims=dims, **table), True, True
    if repository == "csslc/Self-Transcendence":
        return vaeloss(encoder_depth=2, **table), True, False
    sigma = {"facebookresearch/DiT": True, "willisma/SiT": False, "vita-epfl/LayerSync": True}[repository]
    return trunk(learn_sigma=sigma, **model), False, True


def published_class(line: str) -> Shapes:
    """The shapes of the class that a line names with its arguments."""
    name, _, arguments = line.partition(" in ")[2].partition(" (")
    return CLASSES[name](**eval(f"dict({arguments.removesuffix(')')})"))


def load(line: str, content: Mapping[str, Any]) -> None:
    """Load a file's content as the code in a "loaded by" line does; AssertionError if that fails."""
    if line.startswith("class "):
        shapes, needs_ema, strict = published_class(line), True, True
    else:
        shapes, needs_ema, strict = published_script(line)
    assert "ema" in content or not needs_ema
    state: Mapping[str, Tensor] = content.get("ema", content)
    found = {key: tuple(value.shape) for key, value in state.items()}
    if strict:
        assert found.keys() == shapes.keys(), found.keys() ^ shapes.keys()
    else:
        assert shapes.keys() - found.keys() <= {key for key in shapes if key.startswith("projectors")}
    wrong = {key for key in found.keys() & shapes.keys() if found[key] != shapes[key]}
    assert not wrong, sorted(wrong)[:5]
