"""The trained heads of a finished run: they are stored in its training state only."""

from __future__ import annotations

from torch import Tensor

from stbench.models.weights import load_weights
from stbench.runs import schema
from stbench.runs.stage_folder import StageFolder

PREFIX = "heads."
"""Prefix of the heads' parameters in a training state."""


def stored_heads(folder: StageFolder, step: int) -> dict[str, Tensor]:
    """Return the parameters of the heads after `step` steps, by name; empty if there is no such state.

    Raises UserError if the state is damaged.
    """
    index = folder.state_index
    if not index.is_file():
        return {}
    values = schema.convert(folder.read(index), schema.STATE, index)
    if values["step"] != step:
        return {}
    tensors = load_weights(folder.state(step), values["sha256"])
    return {key.removeprefix(PREFIX): value for key, value in tensors.items() if key.startswith(PREFIX)}
