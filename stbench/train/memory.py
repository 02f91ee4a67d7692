"""The memory that training takes: a lower bound, checked before a run, and an estimate for its plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stbench.config.build import build_backbone
from stbench.config.plan import PlannedStage, PreparedRun
from stbench.core.memory import require_memory
from stbench.core.recipe import Supervision
from stbench.core.rng import Rng
from stbench.train.activations import Allocations, MetaKernels
from stbench.train.blocks import checkpoint_blocks
from stbench.train.cost import meta_batch, meta_model
from stbench.train.step import StageModel

META = torch.device("meta")

LARGEST_BATCH = 64
"""Images of the step that is measured; the activations of more are in proportion."""

STATE_BYTES = 20
"""Bytes for each parameter: weight, gradient, two moments of AdamW and the EMA, in float32."""


def require_training_memory(
    prepared: PreparedRun, device: torch.device, *, ranks: int = 1, shard: bool = False
) -> None:
    """Raise a UserError if a run certainly does not fit the device of a rank.

    Counts the training state of all parameters, divided among the ranks with `shard`, one activation per
    block and token, and the images that an evaluation keeps on the host.
    """
    spec, info = prepared.spec, prepared.info
    kept = prepared.stages[-1].definition.heads
    network = build_backbone(spec.backbone, spec.objective, prepared.dataset, "meta", heads=kept)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        heads = prepared.stages[-1].supervision.heads(info)
    parameters = sum(p.numel() for module in (network, heads) for p in module.parameters())
    micro_batch = math.ceil(spec.train.batch / (ranks * spec.train.accumulate))
    state = STATE_BYTES * parameters // (ranks if shard else 1)
    bytes_each = 2 if spec.train.precision == "bf16" else 4
    activations = micro_batch * info.tokens * info.width * info.depth * bytes_each
    require_memory(
        device,
        state + activations,
        f"training {parameters / 1e6:.0f} million parameters with {micro_batch} images at a time takes",
        "use a smaller network, a smaller train.batch or a larger train.accumulate",
    )
    require_memory(
        torch.device("cpu"),
        spec.eval.samples * math.prod(prepared.dataset.image_shape),
        f"an evaluation with {spec.eval.samples} images takes",
        "use a smaller eval.samples",
    )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device while a stage trains, by what takes them.

    Not included are the data set, where it is kept on the device, and what the driver, the communication
    library and the fragmentation of the allocator take.
    """

    batch: int
    """Images that a device processes at a time."""
    parameters: int
    """Of student and heads, in float32."""
    gradients: int
    optimizer: int
    """The two moments of AdamW."""
    ema: int
    teachers: int
    """Weights of teachers and encoders."""
    activations: int
    """What forward and backward pass of one micro-batch keep at most, temporary tensors included."""
    gathered: int
    """Whole parameters and gradients of the blocks that sharded training works on; 0 otherwise."""

    @property
    def total(self) -> int:
        """The sum. A step on one device takes less: it frees activations as the gradients appear."""
        state = self.parameters + self.gradients + self.optimizer + self.ema + self.teachers
        return state + self.activations + self.gathered


def estimate_memory(
    prepared: PreparedRun, stage: PlannedStage, *, devices: int = 1, shard: bool = False
) -> MemoryEstimate:
    """Estimate the memory of a stage on each of `devices` devices, which share the global batch.

    With `shard`, parameters, gradients, moments and EMA are divided among the devices as FSDP2 does. The
    activations are those of kernels as on a GPU, without compilation.
    """
    train = prepared.spec.train
    micro_batch = math.ceil(train.batch / (devices * train.accumulate))
    model = meta_model(prepared, stage)
    trained = model.trained_parameters()
    parameters = sharded_bytes(model.parameters(), devices if shard else 1)
    trained_bytes = sharded_bytes(trained, devices if shard else 1)
    return MemoryEstimate(
        batch=micro_batch,
        parameters=parameters,
        gradients=trained_bytes,
        optimizer=2 * trained_bytes,
        ema=sum(sharded_bytes(each.parameters(), devices if shard else 1) for each in model.averages()),
        teachers=sum(_bytes(tensors(network)) for network in stored_networks(stage.supervision)),
        activations=activation_bytes(prepared, stage, model, micro_batch),
        gathered=gathered_bytes(model) if shard and devices > 1 else 0,
    )


def activation_bytes(prepared: PreparedRun, stage: PlannedStage, model: StageModel, micro_batch: int) -> int:
    """Peak of what forward and backward pass of a micro-batch allocate on the device, without gradients.

    The passes run on the meta device, where tensors have sizes but no values. The model cannot be used again
    if the run recomputes its blocks.
    """
    spec, size = prepared.spec, min(micro_batch, LARGEST_BATCH)
    kernels = MetaKernels()
    if spec.train.checkpointing:
        for block in model.student.repeated_blocks():
            block.forward = kernels.covering(block.forward)
        checkpoint_blocks(model.student)
    rng = Rng(spec.seed, 0, size)
    with torch.no_grad():  # what is cached on first use, such as FLOPs, must not count
        model(meta_batch(prepared, stage, rng, size))
    with Allocations(META) as allocated, dropped_gradients(model):
        with kernels, torch.autocast("cpu", torch.bfloat16, enabled=spec.train.precision == "bf16"):
            losses = model(meta_batch(prepared, stage, rng, size))
        fixed = kernels.drop_converted()
        losses.total.backward()  # type: ignore[no-untyped-call]
    return fixed + (allocated.peak - fixed) * micro_batch // size


@contextmanager
def dropped_gradients(model: nn.Module) -> Iterator[None]:
    """Free the gradient of each parameter as soon as the backward pass has computed it."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters() if p.requires_grad]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stored_networks(supervision: Supervision) -> list[nn.Module]:
    """Networks that a supervision, or one inside it, stores as attributes, directly or in a list."""
    values = vars(supervision).values()
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    inner = [module for item in items if isinstance(item, Supervision) for module in stored_networks(item)]
    return [item for item in items if isinstance(item, nn.Module)] + inner


def sharded_bytes(parameters: Iterable[Tensor], devices: int) -> int:
    """Bytes of the largest shard if every tensor is split along its first dimension, as FSDP2 does."""
    return sum(
        math.ceil(p.shape[0] / devices) * math.prod(p.shape[1:]) * p.element_size() if p.ndim else _bytes([p])
        for p in parameters
    )


def gathered_bytes(model: StageModel) -> int:
    """Bytes that FSDP2 gathers at a time, if it shards block by block.

    Whole parameters of two blocks, the second of which is fetched early; gradients of one block, and the
    same again to reduce them; and all parameters outside of the blocks, which stay whole.
    """
    blocks = model.student.repeated_blocks()
    largest = max((_bytes(block.parameters()) for block in blocks), default=0)
    inside = sum(_bytes(block.parameters()) for block in blocks)
    return 4 * largest + _bytes(model.parameters()) - inside


def tensors(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*network.parameters(), *network.buffers()]


def _bytes(values: Iterable[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in values)
