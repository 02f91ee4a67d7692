"""The least memory that a run needs, checked before it starts."""

from __future__ import annotations

import math

import torch

from stbench.config.build import build_backbone
from stbench.config.plan import PreparedRun
from stbench.core.memory import require_memory

STATE_BYTES = 20
"""Bytes for each parameter: weight, gradient, two moments of AdamW and the EMA, in float32."""


def require_training_memory(prepared: PreparedRun, device: torch.device) -> None:
    """Raise a UserError if a run certainly does not fit its device.

    Counts the training state of all parameters, one activation per block and token, and the images that an
    evaluation keeps on the host.
    """
    spec, info = prepared.spec, prepared.info
    network = build_backbone(spec.backbone, spec.objective, prepared.dataset, "meta")
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        heads = prepared.stages[-1].supervision.heads(info)
    parameters = sum(p.numel() for module in (network, heads) for p in module.parameters())
    micro_batch = math.ceil(spec.train.batch / spec.train.accumulate)
    bytes_each = 2 if spec.train.precision == "bf16" else 4
    activations = micro_batch * info.tokens * info.width * info.depth * bytes_each
    require_memory(
        device,
        STATE_BYTES * parameters + activations,
        f"training {parameters / 1e6:.0f} million parameters with {micro_batch} images at a time takes",
        "use a smaller network, a smaller train.batch or a larger train.accumulate",
    )
    require_memory(
        torch.device("cpu"),
        spec.eval.samples * math.prod(prepared.dataset.image_shape),
        f"an evaluation with {spec.eval.samples} images takes",
        "use a smaller eval.samples",
    )
