"""The repeated blocks of a network: compiled one by one, and recomputed in the backward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch.utils.checkpoint import checkpoint

from stbench.config.spec import TrainSpec
from stbench.core.backbone import Backbone
from stbench.core.recipe import Supervision

COMPILE_PAYS_FROM = 6e16
"""Training FLOPs of a stage from which `train.compile=auto` compiles on a GPU.

They take ten minutes at 100 TFLOP/s, about a third of what an H100 reaches in bf16. Compiling the two to four
graphs of a block takes about a minute and must save at least a tenth of the time to pay back.
"""
GRAPHS = 64
"""Graphs of one function that torch keeps: a U-ViT has two kinds of block, a teacher three batch sizes."""


def should_compile(train: TrainSpec, device: torch.device, flops: float) -> bool:
    """Whether the blocks are compiled in a stage with that many training FLOPs of the student.

    "auto" never compiles on a CPU, where it gains little or nothing (docs/performance.md).
    """
    if train.compile != "auto":
        return train.compile == "on"
    if device.type != "cuda" or flops < COMPILE_PAYS_FROM:
        return False
    from torch.utils._triton import has_triton

    return bool(has_triton())


def compile_blocks(network: Backbone) -> None:
    """Compile each repeated block in place, for fixed shapes; blocks of one class and shape share a graph.

    The names in the state dict stay, and a copy of the network is not compiled. A network without repeated
    blocks is compiled as a whole.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    blocks = network.repeated_blocks()
    for block in blocks:
        block.compile(dynamic=False)
    if not blocks:
        network.forward_intermediates = torch.compile(network.forward_intermediates, dynamic=False)  # type: ignore[method-assign]


@contextlib.contextmanager
def eager(compiled: bool) -> Iterator[None]:
    """Run compiled blocks as they were written, if there are any: an evaluation has other batch sizes."""
    if not compiled:  # the import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def checkpoint_blocks(network: Backbone) -> None:
    """Let each repeated block keep its input only, and recompute the rest in the backward pass.

    Draws of a plug-in's block, such as dropout, are repeated as well.
    """
    for block in network.repeated_blocks():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def teachers(supervision: Supervision) -> list[Backbone]:
    """The backbones that a supervision, or one inside it, has stored as attributes after its `setup`."""
    values = list(vars(supervision).values())
    inner = [network for value in values if isinstance(value, Supervision) for network in teachers(value)]
    return [value for value in values if isinstance(value, Backbone)] + inner
