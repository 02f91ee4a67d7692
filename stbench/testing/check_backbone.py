"""What every backbone must do, built-in or plug-in: each broken promise is one AssertionError line."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from stbench.config.build import build_backbone, build_objective
from stbench.config.resolve import RunRequest, resolve
from stbench.core.backbone import Backbone, BackboneInfo
from stbench.core.registry import DATASETS, load_builtins, lookup
from stbench.core.rng import generator

Factory = Callable[..., Backbone]
"""Called as `factory(channels=, input_size=, classes=, out_channels=)`."""

Inputs = tuple[Tensor, Tensor, Tensor]
"""x_t (B,C,H,W), t (B,) and labels (B,)."""


def require(holds: bool, broken: str) -> None:
    """Raise AssertionError with the line `broken` unless it holds."""
    if not holds:
        raise AssertionError(broken)


def check_backbone(network: str | Factory, *, objective: str | None = None) -> None:
    """Check a backbone, by name ("sit", "sit-b/2") or factory, on latents of the embedded digits' shape.

    `objective` decides how many channels it predicts; default: the one the name was published with, and
    "linear" for a factory. Raises AssertionError for the first promise of `Backbone` that is broken,
    UserError for an unknown name.
    """
    load_builtins()
    digits = lookup(DATASETS, "digits")
    spec = None if callable(network) else resolve(RunRequest(network, "vanilla", objective=objective))
    chosen = spec.objective if spec else objective or "linear"
    facts = {"channels": digits.channels, "input_size": digits.input_size, "classes": digits.classes}
    out_channels = build_objective(chosen).out_channels(digits.channels)

    def build(seed: int) -> Backbone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if callable(network):
                return network(**facts, out_channels=out_channels)
            assert spec is not None
            return build_backbone(spec.backbone, spec.objective, digits, str(torch.get_default_device()))

    _check_construction(build)
    net = _perturbed(build(0))
    _check_info(net.info, facts)
    inputs = _inputs(net.info)
    with torch.no_grad():
        _check_prediction(net, inputs, out_channels)
        _check_taps(net, inputs)
        _check_purity(net, inputs)
        _check_conditioning(net, inputs)
        _check_round_trip(net, build(1).eval(), inputs)
        _check_flops(net)
    _check_gradients(net, inputs)


def _perturbed(net: Backbone) -> Backbone:
    """In eval mode, every trained parameter moved a little, so that nothing starts at zero."""
    noise = generator(0, "conformance")
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    return net.eval()


def _inputs(info: BackboneInfo) -> Inputs:
    """x_t (B,C,H,W), t (B,) float64 and labels (B,) of every class and of none."""
    noise = generator(1, "conformance")
    x = torch.randn(64, info.channels, info.input_size, info.input_size, generator=noise)
    return x, torch.rand(64, generator=noise, dtype=torch.float64), torch.arange(64) % (info.classes + 1)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def _check_construction(build: Callable[[int], Backbone]) -> None:
    first, again = build(0).state_dict(), build(0).state_dict()
    require(
        all(torch.equal(first[name], again[name]) for name in first),
        "two networks built at one seed differ: initialise from torch's global generator only",
    )
    with torch.device("meta"):
        metas = {p.is_meta for p in build(0).parameters()}
    require(metas == {True}, "it cannot be built on the meta device: some parameters are made elsewhere")


def _check_info(info: BackboneInfo, facts: Mapping[str, int]) -> None:
    for name, value in facts.items():
        found = getattr(info, name)
        require(found == value, f"info.{name} is {found}, the network was built for {value}")
    require(info.depth >= 1, f"info.depth is {info.depth}")
    tokens = (info.input_size // info.patch) ** 2
    require(info.tokens == tokens, f"info.tokens is {info.tokens}, patch {info.patch} makes {tokens}")


def _check_prediction(net: Backbone, inputs: Inputs, out_channels: int) -> None:
    found = tuple(net(*inputs).shape)
    expected = (len(inputs[0]), out_channels, *inputs[0].shape[2:])
    require(found == expected, f"the prediction has shape {found}, expected {expected}")


def _check_taps(net: Backbone, inputs: Inputs) -> None:
    every = range(net.info.depth)
    prediction, full = net.forward_intermediates(*inputs, indices=tuple(every))
    require(prediction is not None and _close(prediction, net(*inputs)), "taps change the prediction")
    require(sorted(full) == list(every), f"blocks {list(every)} asked, {sorted(full)} returned")
    expected = (len(inputs[0]), net.info.tokens, net.info.width)
    for k, tokens in full.items():
        found = tuple(tokens.shape)
        require(found == expected, f"block {k} gives {found}, expected image tokens only, {expected}")
        early, alone = net.forward_intermediates(*inputs, indices=(k,), stop_early=True)
        require(early is None, "with stop_early the prediction must be None")
        require(list(alone) == [k], f"block {k} asked alone, {sorted(alone)} returned")
        require(_close(alone[k], tokens), f"block {k} differs when stopped early")
    backwards = net.features(*inputs, indices=tuple(reversed(every)))
    same = backwards.keys() == full.keys() and all(_close(backwards[k], full[k]) for k in full)
    require(same, "the order of indices changes the features")


def _check_purity(net: Backbone, inputs: Inputs) -> None:
    expected, before, random = net(*inputs), [x.clone() for x in inputs], torch.get_rng_state()
    net.train()
    first, second = net(*inputs), net(*inputs)
    net.eval()
    require(torch.equal(torch.get_rng_state(), random), "it draws random numbers: no dropout of any kind")
    require(_close(first, second), "two equal calls in train mode differ")
    require(_close(first, expected), "train mode differs from eval mode: labels are dropped by the engine")
    require(all(map(torch.equal, inputs, before)), "it changes its inputs in place")
    x, t, y = inputs
    require(_close(net(x[:1], t[:1], y[:1]), expected[:1]), "a sample depends on the others of its batch")


def _check_conditioning(net: Backbone, inputs: Inputs) -> None:
    x, t, y = inputs
    null = net(x, t, torch.full_like(y, net.info.classes))
    require(not _close(null, net(x, t, torch.zeros_like(y))), "the null label predicts what class 0 does")
    require(not _close(net(x, torch.zeros_like(t), y), net(x, torch.ones_like(t), y)), "time changes nothing")


def _check_gradients(net: Backbone, inputs: Inputs) -> None:
    prediction = net.train()(*inputs)
    (prediction * torch.randn(prediction.shape, generator=generator(2, "conformance"))).sum().backward()
    dead = [n for n, p in net.named_parameters() if p.requires_grad and not _moved(p)]
    require(not dead, f"no gradient reaches {', '.join(dead)}")


def _moved(parameter: nn.Parameter) -> bool:
    grad = parameter.grad
    return grad is not None and bool(grad.isfinite().all()) and bool(grad.any())


def _check_round_trip(net: Backbone, other: Backbone, inputs: Inputs) -> None:
    other.load_state_dict(net.state_dict())
    require(_close(other(*inputs), net(*inputs)), "a second network with the same state dict differs")


def _check_flops(net: Backbone) -> None:
    first, last, whole = net.flops(0), net.flops(net.info.depth - 1), net.flops()
    require(0 < last <= whole, f"flops() is {whole}, and {last} up to the last block")
    early = first < last or net.info.depth == 1
    require(early, "stop_early saves nothing: no block after max(indices) may run")
