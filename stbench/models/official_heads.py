"""The intermediate head that checkpoints of Internal Guidance contain, `final_layer_xr`.

Other heads in official files serve training only and are dropped. This one stays with the network, which can
be guided by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stbench.core.backbone import Backbone, attach_heads, kept_heads
from stbench.core.errors import UserError
from stbench.core.guides import HeadGuide
from stbench.models.external import shown
from stbench.models.fit import require_same_keys, require_same_shapes
from stbench.models.repositories import KEPT_HEAD
from stbench.models.weights import State, require_finite

HEAD = "head"
"""Name of this head in our networks, and of the guide that uses it."""

DEPTH = "encoder_depth"
"""Option that counts the blocks before the head; stored with the file by us, not by the repository."""

PUBLISHED_DEPTH = 8
"""Its value in every published file."""

SCALE = 1.4
"""Scale of the guide, unless another is asked for: that of the repository's SiT-XL/2."""


def head_guide(block: int) -> HeadGuide:
    """Return the guide by the head on a 0-based block."""
    return HeadGuide(HEAD, block, scale=SCALE)


def attach_head(net: Backbone, state: State, settings: Mapping[str, Any], where: str) -> HeadGuide:
    """Give a network, without gradient and in eval mode, the head of an official file; returns its guide.

    `state` are the head's tensors by their names in the file, `settings` the options stored with them. Raises
    UserError for tensors that do not fit and for a block that the network does not have.
    """
    blocks = settings.get(DEPTH, PUBLISHED_DEPTH)
    if type(blocks) is not int or not 1 <= blocks <= net.info.depth:
        found = blocks if blocks == PUBLISHED_DEPTH else shown(blocks)
        raise UserError(
            f"expected {DEPTH}, the block of {KEPT_HEAD[:-1]}, between 1 and {net.info.depth} in the args of "
            f"{where}, found {found}; use a file that stores it"
        )
    with torch.device("meta"):
        head = net.output_head()
    family = f"{net.info.name} with an intermediate head"
    own = {KEPT_HEAD + name: value for name, value in head.state_dict().items()}
    require_same_keys(set(own), set(state), family, where)
    require_same_shapes(own, state, family, where)
    values = {name.removeprefix(KEPT_HEAD): value.float().clone() for name, value in state.items()}
    require_finite(values, where, "it is damaged, or its training diverged: use another checkpoint")
    head.load_state_dict(values, assign=True)
    attach_heads(net, {HEAD: head.eval().requires_grad_(False)})
    return head_guide(blocks - 1)


def stored_head(network: Backbone) -> dict[str, Tensor]:
    """Return the parameters of a network's head by their names in official files; empty if it has none."""
    head = kept_heads(network).get(HEAD)
    return {} if head is None else {KEPT_HEAD + name: v.clone() for name, v in head.state_dict().items()}
