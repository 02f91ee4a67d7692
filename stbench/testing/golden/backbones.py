"""Golden checks of backbones: outputs, features, embeddings and initialisation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stbench.core.backbone import Backbone
from stbench.core.registry import BACKBONES, load_builtins, lookup
from stbench.diffusion.sample import guide
from stbench.models.align import projector
from stbench.models.layers import sincos_2d, timestep_sinusoid, unpatchify
from stbench.models.official import from_state
from stbench.testing.golden.run import Check, Golden, check

TOLERANCE = 2e-5
GUIDED_CHANNELS = 3
"""Number of channels that DiT and upstream SiT guide."""


def family(meta: Mapping[str, Any]) -> str:
    """The backbone family of a golden file, from its sidecar."""
    if "embed_dim" in meta["config"]:
        return "uvit"
    return "dit" if "/DiT" in meta["reference"] else "sit"


def noise_at_zero(meta: Mapping[str, Any]) -> bool:
    """Whether t=0 is noise in the file, as in upstream SiT."""
    return "willisma/SiT" in meta["reference"]


def original(meta: Mapping[str, Any]) -> str:
    """The value of --original for the file; U-ViT's files do not name a size, so their times are given."""
    if family(meta) == "sit":
        return "sit" if noise_at_zero(meta) else "repa"
    return {"dit": "dit", "uvit": "uvit-discrete"}[family(meta)]


def load_network(golden: Golden) -> tuple[Backbone, dict[str, Tensor]]:
    """The file's network in our direction of time, in eval mode, and the heads stored with it."""
    load_builtins()
    state = golden.group("sd/")
    model = from_state(
        state,
        golden.name,
        heads=int(golden.meta["config"]["num_heads"]),
        original=original(golden.meta),
        objective="linear" if family(golden.meta) == "sit" else None,
    )
    return model.backbone, {key: state[key] for key in model.dropped}


def load_in_native_time(golden: Golden) -> tuple[Backbone, dict[str, Tensor]]:
    """As `load_network`, but in the file's own direction of time."""
    net, stored = load_network(golden)
    if noise_at_zero(golden.meta):
        net.noise_at_zero = False  # type: ignore[assignment]
    return net, stored


def native_time(net: Backbone, t: Tensor) -> Tensor:
    """The file's times, which are inputs of the sinusoid, mapped to [0,1]."""
    return t.double() / net.time_scale


def captured(net: nn.Module, names: list[str], call: Callable[[], object]) -> dict[str, Tensor]:
    """The outputs of the submodules `names` during one call."""
    outputs: dict[str, Tensor] = {}

    def catch(name: str) -> Any:
        return net.get_submodule(name).register_forward_hook(lambda _m, _i, out: outputs.update({name: out}))

    hooks = [catch(name) for name in names]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


@check("backbone_")
def backbone(golden: Golden) -> Iterator[Check]:
    """Check the output, the tokens of every block, intermediate values, guidance and projectors."""
    net, stored = load_in_native_time(golden)
    x, y, t = golden.t["in/x"], golden.t["in/y"], native_time(net, golden.t["in/t"])
    out, features = net.forward_intermediates(x, t, y, indices=range(net.info.depth))
    assert out is not None
    yield golden.compare("out/model", out, golden.t["out/model"], TOLERANCE)
    blocks = [key for key in golden.t if key.startswith("feat/block_")]
    yield Check("blocks", abs(len(blocks) - net.info.depth), 0.0)
    for key in sorted(blocks):
        expected = golden.t[key][:, -net.info.tokens :]  # without U-ViT's label and time tokens
        yield golden.compare(key, features[int(key.rsplit("_", 1)[1]) - 1], expected, TOLERANCE)
    yield from _intermediate_values(golden, net)
    if noise_at_zero(golden.meta):
        reversed_out = load_network(golden)[0](x, 1.0 - t, y)
        yield golden.compare("time-reversed", reversed_out, -golden.t["out/model"], TOLERANCE)
    if "cfg/out" in golden.t:
        yield from _guided(golden, net)
    yield from _projected(golden, stored, features)


def _intermediate_values(golden: Golden, net: Backbone) -> Iterator[Check]:
    """Check the tokens before the first and after the last block, and the two conditioning vectors."""
    names = {"feat/final_tokens": "final_layer", "cond/t_emb": "t_embedder", "cond/y_emb": "y_embedder"}
    if family(golden.meta) == "uvit":
        names = {"feat/decoder_pred": "decoder_pred"}
    x, y, t = golden.t["in/x"], golden.t["in/y"], native_time(net, golden.t["in/t"])
    first = "in_blocks.0" if family(golden.meta) == "uvit" else "blocks.0"
    entering: list[Tensor] = []
    hook = net.get_submodule(first).register_forward_pre_hook(lambda _m, inputs: entering.append(inputs[0]))
    outputs = captured(net, list(names.values()), lambda: net(x, t, y))
    hook.remove()
    yield golden.compare("feat/embed", entering[0], golden.t["feat/embed"], TOLERANCE)
    for key, name in names.items():
        yield golden.compare(key, outputs[name], golden.t[key], TOLERANCE)
    if "out/raw" in golden.t:
        yield golden.compare("out/raw", _raw(net, outputs["final_layer"]), golden.t["out/raw"], TOLERANCE)


def _raw(net: Backbone, tokens: Tensor) -> Tensor:
    patch = net.info.patch
    return unpatchify(tokens, patch, tokens.shape[-1] // patch**2)


def _guided(golden: Golden, net: Backbone) -> Iterator[Check]:
    """Check the published guided forward pass, which guides three channels in both halves of the batch."""
    found = re.search(r"scale (\d+(?:\.\d+)?)", golden.meta["cfg_note"])
    assert found is not None, "cfg_note names no scale"
    half = golden.t["cfg/x"][: len(golden.t["cfg/x"]) // 2]
    t = native_time(net, golden.t["cfg/t"])
    cond, uncond = net(torch.cat([half, half]), t, golden.t["cfg/y"]).chunk(2)
    guided = guide(cond, uncond, float(found[1]), channels=GUIDED_CHANNELS)
    own = torch.cat([guided[:, :GUIDED_CHANNELS], uncond[:, GUIDED_CHANNELS:]], dim=1)
    yield golden.compare("cfg/out", torch.cat([guided, own]), golden.t["cfg/out"], TOLERANCE)


def _projected(golden: Golden, stored: dict[str, Tensor], features: dict[int, Tensor]) -> Iterator[Check]:
    """Check REPA's projectors on the tokens after 1-based block `encoder_depth`."""
    for key in sorted(k for k in golden.t if k.startswith("out/z_tilde_")):
        z = features[int(golden.meta["config"]["encoder_depth"]) - 1]
        state = _below(stored, f"projectors.{key.rsplit('_', 1)[1]}.")
        head = _projector(state)
        head.load_state_dict(state)
        yield golden.compare(key, head(z), golden.t[key], TOLERANCE)


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _projector(state: Mapping[str, Tensor]) -> nn.Sequential:
    """A new projector with the shapes of a stored one."""
    hidden, width = state["0.weight"].shape
    return projector(width, hidden, state["4.weight"].shape[0])


@check("embeddings")
def embeddings(golden: Golden) -> Iterator[Check]:
    """Check position and time embeddings of the sizes in their names."""
    for key, expected in golden.t.items():
        if position := re.fullmatch(r"pos/sincos_d(\d+)_g(\d+)", key):
            actual = sincos_2d(int(position[1]), int(position[2]))
        elif width := re.fullmatch(r"time/\w+_(\d+)", key):
            actual = timestep_sinusoid(golden.t["time/t"], int(width[1]))
        else:
            continue
        yield golden.compare(key, actual, expected, TOLERANCE)


@check("init_statistics")
def init_statistics(golden: Golden) -> Iterator[Check]:
    """Check new networks: shapes, trainable flags, exact zeros and ones, and moments of the rest."""
    load_builtins()
    for kind, entries in golden.meta.items():
        if not isinstance(entries, dict):
            continue
        shapes = {key: torch.empty(entry["shape"], device="meta") for key, entry in entries.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            actual = _fresh(kind.split("_")[0], shapes)
        yield Check(f"{kind} keys", float(len(actual.keys() ^ entries.keys())), 0.0)
        for key, entry in entries.items():
            yield _moments(f"{kind}/{key}", actual[key], entry)


def _fresh(family: str, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a new network, and of its projectors if any, under their official names."""
    cls = lookup(BACKBONES, family)
    parameters: dict[str, Tensor] = dict(cls(**cls.infer(shapes, heads=1)).named_parameters())
    for index in {key.split(".")[1] for key in shapes if key.startswith("projectors.")}:
        prefix = f"projectors.{index}."
        head = _projector(_below(shapes, prefix))
        parameters |= {prefix + key: value for key, value in head.named_parameters()}
    return parameters


def _moments(name: str, actual: Tensor, entry: Mapping[str, Any]) -> Check:
    """Compare mean and std, relative to the allowed deviation; exact properties must be equal."""
    exact = (
        list(actual.shape) == entry["shape"],
        actual.requires_grad == entry["trainable"],
        bool((actual == 0).all()) == entry["zero"],
        bool((actual == 1).all()) == entry["one"],
    )
    if not all(exact):
        return Check(name, math.inf, 1.0, "shape, trainable flag, zeros or ones differ")
    actual = actual.detach()
    mean, std, n = entry["mean"], entry["std"], actual.numel()
    if std == 0.0:
        return Check(name, float((actual - mean).abs().max()), 0.0)
    of_std = abs(actual.std().item() / std - 1) / (0.05 + 3 / math.sqrt(n))
    of_mean = abs(actual.mean().item() - mean) / (5 * std / math.sqrt(n))
    return Check(name, max(of_std, of_mean), 1.0)
