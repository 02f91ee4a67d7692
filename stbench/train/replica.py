"""DDP: every rank has a copy of the model, and the gradients of all ranks are averaged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stbench.core.backbone import Backbone, kept_heads
from stbench.core.world import World


def replicate(model: nn.Module, heads: Iterable[nn.Module], *, find_unused: bool) -> nn.Module:
    """Return the model as a replica whose backward pass averages gradients, all but those of the heads.

    Starts from the weights of rank 0. A recipe may stop using its heads at some step, so their gradients are
    averaged after the backward pass, by `average_gradients`. `find_unused` is needed if a forward pass of the
    student does not use all of its parameters; it costs a traversal of the graph in every step.

    Args:
        model: The module whose forward pass computes the loss.
        heads: The heads, which are parts of the model.
        find_unused: Whether parameters besides those of the heads may be unused.
    """
    parameters = [parameter for head in heads for parameter in head.parameters()]
    own = set(map(id, parameters))
    names = [name for name, parameter in model.named_parameters() if id(parameter) in own]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        model, names
    )
    for parameter in parameters:
        torch.distributed.broadcast(parameter.data, src=0)
    return DistributedDataParallel(model, find_unused_parameters=find_unused, gradient_as_bucket_view=True)


def average_gradients(modules: Iterable[nn.Module], world: World) -> None:
    """Average the gradients of modules over all ranks, where the step has used their parameters."""
    gradients = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
    if not gradients:
        return
    total = world.total(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = torch.split(total / world.size, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def has_unused_parameters(student: Backbone) -> bool:
    """Whether a forward pass leaves parameters unused, besides heads. Takes a network on the meta device."""
    info = student.info
    x = torch.empty(2, info.channels, info.input_size, info.input_size, device="meta")
    prediction = student(x, x[:, 0, 0, 0], torch.zeros(2, dtype=torch.long, device="meta"))
    heads = {parameter for head in kept_heads(student).values() for parameter in head.parameters()}
    trained = [p for p in student.parameters() if p.requires_grad and p not in heads]
    return None in torch.autograd.grad(prediction.sum(), trained, allow_unused=True)


def local_gradients(replica: nn.Module | None, *, wanted: bool) -> contextlib.AbstractContextManager[None]:
    """A context in which a backward pass of a replica only accumulates gradients, without averaging them."""
    if wanted and isinstance(replica, DistributedDataParallel):
        return replica.no_sync()
    return contextlib.nullcontext()
