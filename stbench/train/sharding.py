"""FSDP2: student, heads and EMA split over the ranks, for models that do not fit one device.

Each rank keeps a part of every parameter, of its gradient and of its optimiser state, and collects a block's
parameters while it runs. What is saved is whole, so a sharded run resumes on any number of ranks, sharded or
not. Teachers are not split.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stbench.core.backbone import Backbone, kept_heads
from stbench.core.flops import keep_twin
from stbench.core.world import World


def shard(networks: Sequence[Backbone], heads: nn.ModuleDict, device: torch.device, world: World) -> None:
    """Split the student, its averages and the heads over the ranks and move the parts to the device."""
    # Imported here, because it takes a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # A prediction is a view of the tokens; nothing changes it in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    mesh = init_device_mesh(device.type, (world.size,))
    for network in networks:
        for module in (network, *kept_heads(network).values()):
            keep_twin(module)
    for head in heads.values():
        keep_twin(head)
    for network in networks:
        for part in (*network.repeated_blocks(), *kept_heads(network).values()):
            if next(part.parameters(), None) is not None:
                fully_shard(part, mesh=mesh)
        # Also after the forward pass of the outermost module: no backward pass follows that of the EMA.
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(network, "forward_intermediates")  # type: ignore[arg-type]
    for head in heads.values():
        fully_shard(head, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether the parameters of a module are split."""
    return any(is_split(parameter) for parameter in module.parameters())


def is_split(tensor: Any) -> bool:
    """Whether a tensor is split over the ranks."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank keeps; the tensor itself if it is not split."""
    part: Any = tensor
    return part.to_local() if is_split(tensor) else tensor


def whole_value(tensor: Tensor) -> Tensor:
    """A tensor, such as a norm, whole on every rank."""
    part: Any = tensor
    return part.full_tensor() if is_split(tensor) else tensor


def whole(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors on the host of rank 0, from their parts; what is not split stays as it is.

    Every rank must call it; other ranks than 0 get empty tensors for those that are split.
    """

    def collect(tensor: Tensor) -> Tensor:
        if not is_split(tensor):
            return tensor
        full = whole_value(tensor)
        return full.cpu() if world.is_main else full.new_empty(0)

    return {name: collect(tensor) for name, tensor in tensors.items()}


def whole_network(sharded: Backbone, empty: Backbone) -> Backbone:
    """A whole copy of a split network on every rank, in eval mode; `empty` is one on the meta device."""
    state = {name: whole_value(value) for name, value in sharded.state_dict().items()}
    empty.load_state_dict(state, assign=True)
    return empty.eval().requires_grad_(False)


def split_like(tensor: Tensor, target: Tensor) -> Tensor:
    """A tensor, equal on all ranks, split as `target` is, if that is split and has the same shape."""
    if not is_split(target) or tensor.shape != target.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    split: Any = target
    return distribute_tensor(tensor.to(target.device), split.device_mesh, split.placements)
