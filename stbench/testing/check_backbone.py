"""`check_backbone`: the conformance check of backbones, built-in or plug-in.

Every violation of the `Backbone` interface raises an AssertionError with a one-line message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from stbench.config.build import build_backbone, build_objective
from stbench.config.resolve import RunRequest, resolve
from stbench.core.backbone import Backbone, BackboneInfo
from stbench.core.registry import DATASETS, load_builtins, lookup
from stbench.core.rng import generator
from stbench.testing.check_capabilities import check_capabilities
from stbench.testing.require import Inputs, close, require

Factory = Callable[..., Backbone]
"""Called as `factory(channels=, input_size=, classes=, out_channels=)`."""


def check_backbone(network: str | Factory, *, objective: str | None = None) -> None:
    """Check that a backbone conforms to the `Backbone` interface.

    `network` is a registered name ("sit", "sit-b/2") or a factory; it is built for latents with the shape of
    the embedded digits. `objective` determines the number of predicted channels; it defaults to the one the
    backbone was published with, and to "linear" for a factory.

    Checked are construction (from the seed alone, also on the meta device), `info`, the shape of the
    prediction, features and `stop_early`, purity in (x, t, y), the effect of label and time, state dict round
    trips, FLOPs, the capabilities that `info` names, and gradients. Raises AssertionError for the first
    violation, UserError for an unknown name.
    """
    load_builtins()
    # What to build: the shape of the data, and the channels that the objective needs
    digits = lookup(DATASETS, "digits")
    spec = None if callable(network) else resolve(RunRequest(network, "vanilla", objective=objective))
    chosen = spec.objective if spec else objective or "linear"
    shape = {"channels": digits.channels, "input_size": digits.input_size, "classes": digits.classes}
    out_channels = build_objective(chosen).out_channels(digits.channels)

    def build(seed: int) -> Backbone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if callable(network):
                return network(**shape, out_channels=out_channels)
            assert spec is not None
            return build_backbone(spec.backbone, spec.objective, digits, str(torch.get_default_device()))

    # The checks, from construction to gradients
    _check_construction(build)
    net = _perturbed(build(0))
    _check_info(net.info, shape)
    inputs = _inputs(net.info)
    with torch.no_grad():
        _check_prediction(net, inputs, out_channels)
        _check_features(net, inputs)
        _check_purity(net, inputs)
        _check_conditioning(net, inputs)
        _check_round_trip(net, build(1).eval(), inputs)
        _check_flops(net)
        check_capabilities(net, inputs)
    _check_gradients(net, inputs)


def _perturbed(net: Backbone) -> Backbone:
    """Add noise to every trained parameter, so that no layer is zero; returns the network in eval mode."""
    noise = generator(0, "conformance")
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    return net.eval()


def _inputs(info: BackboneInfo) -> Inputs:
    """Random x_t (64,C,H,W), t (64,) float64, and labels (64,) with every class and the null label."""
    noise = generator(1, "conformance")
    x = torch.randn(64, info.channels, info.input_size, info.input_size, generator=noise)
    return x, torch.rand(64, generator=noise, dtype=torch.float64), torch.arange(64) % (info.classes + 1)


def _check_construction(build: Callable[[int], Backbone]) -> None:
    first, again = build(0).state_dict(), build(0).state_dict()
    require(
        all(torch.equal(first[name], again[name]) for name in first),
        "two networks built from the same seed differ: initialise from torch's global generator only",
    )
    with torch.device("meta"):
        on_meta = {p.is_meta for p in build(0).parameters()}
    require(on_meta == {True}, "the network cannot be built on the meta device: some parameters ignore it")


def _check_info(info: BackboneInfo, shape: Mapping[str, int]) -> None:
    for name, expected in shape.items():
        found = getattr(info, name)
        require(found == expected, f"info.{name} is {found}, but the network was built for {expected}")
    require(info.depth >= 1, f"info.depth is {info.depth}, expected at least 1")
    tokens = (info.input_size // info.patch) ** 2
    require(info.tokens == tokens, f"info.tokens is {info.tokens}, but patch {info.patch} gives {tokens}")


def _check_prediction(net: Backbone, inputs: Inputs, out_channels: int) -> None:
    found = tuple(net(*inputs).shape)
    expected = (len(inputs[0]), out_channels, *inputs[0].shape[2:])
    require(found == expected, f"the prediction has shape {found}, expected {expected}")


def _check_features(net: Backbone, inputs: Inputs) -> None:
    # All blocks at once: the prediction is unchanged and every block is returned
    blocks = range(net.info.depth)
    prediction, full = net.forward_intermediates(*inputs, indices=tuple(blocks))
    require(
        prediction is not None and close(prediction, net(*inputs)),
        "the prediction depends on indices: reading features must not change it",
    )
    require(sorted(full) == list(blocks), f"expected features of blocks {list(blocks)}, got {sorted(full)}")
    # Each block alone, with stop_early: the same features and no prediction
    expected = (len(inputs[0]), net.info.tokens, net.info.width)
    for k, tokens in full.items():
        found = tuple(tokens.shape)
        require(
            found == expected, f"features of block {k} are {found}, expected image tokens only, {expected}"
        )
        early, alone = net.forward_intermediates(*inputs, indices=(k,), stop_early=True)
        require(early is None, "the prediction must be None with stop_early")
        require(list(alone) == [k], f"expected features of block {k} alone, got {sorted(alone)}")
        require(close(alone[k], tokens), f"features of block {k} differ with stop_early")
    # Any order of indices
    reversed_ = net.features(*inputs, indices=tuple(reversed(blocks)))
    same = reversed_.keys() == full.keys() and all(close(reversed_[k], full[k]) for k in full)
    require(same, "the order of indices changes the features")


def _check_purity(net: Backbone, inputs: Inputs) -> None:
    """The output depends on (x, t, y) only: not on the mode, random numbers or other samples."""
    expected, before, random = net(*inputs), [x.clone() for x in inputs], torch.get_rng_state()
    net.train()
    first, second = net(*inputs), net(*inputs)
    net.eval()
    require(
        torch.equal(torch.get_rng_state(), random),
        "the network draws random numbers from torch's global generator. It is seeded at every step, so runs "
        "resume exactly, but a backbone must be a function of (x, t, y): remove any dropout",
    )
    require(close(first, second), "two equal calls in train mode give different predictions")
    require(
        close(first, expected),
        "train and eval mode give different predictions: the engine drops labels, not the network",
    )
    require(all(map(torch.equal, inputs, before)), "the network changes its inputs in place")
    x, t, y = inputs
    require(
        close(net(x[:1], t[:1], y[:1]), expected[:1]), "a prediction depends on other samples of the batch"
    )


def _check_conditioning(net: Backbone, inputs: Inputs) -> None:
    x, t, y = inputs
    null = net(x, t, torch.full_like(y, net.info.classes))
    require(
        not close(null, net(x, t, torch.zeros_like(y))),
        "the null label and class 0 give the same prediction",
    )
    require(
        not close(net(x, torch.zeros_like(t), y), net(x, torch.ones_like(t), y)),
        "the prediction does not depend on time",
    )


def _check_gradients(net: Backbone, inputs: Inputs) -> None:
    prediction = net.train()(*inputs)
    (prediction * torch.randn(prediction.shape, generator=generator(2, "conformance"))).sum().backward()
    dead = [name for name, p in net.named_parameters() if p.requires_grad and not _has_gradient(p)]
    require(not dead, f"no gradient reaches {', '.join(dead)}")


def _has_gradient(parameter: nn.Parameter) -> bool:
    grad = parameter.grad
    return grad is not None and bool(grad.isfinite().all()) and bool(grad.any())


def _check_round_trip(net: Backbone, other: Backbone, inputs: Inputs) -> None:
    other.load_state_dict(net.state_dict())
    require(
        close(other(*inputs), net(*inputs)),
        "a network loaded from the state dict differs: some state is not in it",
    )


def _check_flops(net: Backbone) -> None:
    first, last, whole = net.flops(0), net.flops(net.info.depth - 1), net.flops()
    require(0 < last <= whole, f"flops() is {whole}, but {last} up to the last block")
    saves = first < last or net.info.depth == 1
    require(saves, "stop_early saves nothing: no block after max(indices) may run")
