"""The estimate of memory: what the meta device counts is what a step allocates, and what FSDP2 keeps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from stbench.bench.workload import Case, Workload, prepare_case
from stbench.core.registry import load_builtins
from stbench.core.rng import Rng
from stbench.models import layers
from stbench.train.activations import Allocations
from stbench.train.batches import make_batch
from stbench.train.cost import meta_model
from stbench.train.memory import activation_bytes, dropped_gradients, estimate_memory, sharded_bytes

load_builtins()

CPU = torch.device("cpu")
BATCH = 4


def case(backbone: str, recipe: str, precision: str = "fp32", **options: object) -> Case:
    shape = {"backbone.depth": 5, "backbone.width": 96, "backbone.heads": 3}
    blocks = {"recipe.student_block": 1, "recipe.teacher_block": 2} if recipe in ("sra",) else {}
    return Case(
        backbone,
        recipe,
        batch=None if "train.batch" in options else BATCH,
        precision=precision,
        overrides={**shape, **blocks, **options},
    )


def allocated_on_cpu(workload: Workload) -> int:
    """Peak of what forward and backward pass of a batch really allocate."""
    spec, dataset, model = workload.prepared.spec, workload.dataset, workload.model
    rng = Rng(spec.seed, 0, BATCH)
    index = torch.arange(BATCH)

    def losses() -> Tensor:
        x0 = torch.zeros(BATCH, dataset.channels, dataset.input_size, dataset.input_size)
        extras = {"images": torch.zeros(BATCH, *dataset.image_shape, dtype=torch.uint8)}
        labels = torch.zeros(BATCH, dtype=torch.long)
        batch = make_batch(
            x0,
            labels,
            index,
            rng,
            spec.train.label_drop,
            dataset.classes,
            extras if model.supervision.images else {},
        )
        return model(batch).total

    with torch.no_grad():
        losses()
    with Allocations(CPU) as allocated, dropped_gradients(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.train.precision == "bf16"):
            total = losses()
        total.backward()
    return allocated.peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("backbone", "recipe"), [("sit", "vanilla"), ("sit", "sra"), ("uvit", "vanilla"), ("dit", "repa")]
)
def test_the_meta_device_counts_what_a_step_allocates(
    monkeypatch: pytest.MonkeyPatch, backbone: str, recipe: str, precision: str
) -> None:
    def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is None
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)

    monkeypatch.setattr(layers, "attend", fused)  # as on a GPU, also in bfloat16
    workload = Workload(case(backbone, recipe, precision), CPU)
    planned = prepare_case(case(backbone, recipe, precision))
    stage = planned.stages[-1]
    found = activation_bytes(planned, stage, meta_model(planned, stage), BATCH)
    assert found == pytest.approx(allocated_on_cpu(workload), rel=0.05)


def test_activations_are_in_proportion_to_the_batch() -> None:
    planned = prepare_case(case("sit", "vanilla", "bf16"))
    stage = planned.stages[-1]
    model = meta_model(planned, stage)
    one, two, many = (activation_bytes(planned, stage, model, size) for size in (32, 64, 128))
    assert many - two == pytest.approx(2 * (two - one), rel=0.01)


def test_checkpointing_keeps_the_inputs_of_blocks() -> None:
    found = {}
    for checkpointing in (False, True):
        planned = prepare_case(case("sit", "vanilla", **{"train.checkpointing": checkpointing}))
        found[checkpointing] = estimate_memory(planned, planned.stages[-1]).activations
    assert found[True] < 0.5 * found[False]


def test_devices_share_the_batch_and_shards_the_state() -> None:
    planned = prepare_case(case("sit", "vanilla", **{"train.batch": 32}))
    stage = planned.stages[-1]
    alone, replicas, shards = (
        estimate_memory(planned, stage, devices=devices, shard=shard)
        for devices, shard in [(1, False), (4, False), (4, True)]
    )
    assert (alone.batch, replicas.batch) == (32, 8)
    assert replicas.activations == pytest.approx(alone.activations / 4, rel=0.05)
    assert replicas.parameters == alone.parameters and not replicas.gathered
    for part in ("parameters", "gradients", "optimizer", "ema"):
        assert getattr(shards, part) == pytest.approx(getattr(alone, part) / 4, rel=0.05)
    assert shards.gathered > 0


@pytest.fixture
def no_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [8, 64, 1024])
def test_shards_have_the_sizes_that_fsdp_gives_them(ranks: int, no_process_group: None) -> None:
    planned = prepare_case(case("sit", "vanilla"))
    network: nn.Module = meta_model(planned, planned.stages[-1]).student
    expected = sharded_bytes(network.parameters(), ranks)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,))
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    local = [parameter.to_local() for parameter in network.parameters()]
    assert sum(value.numel() * value.element_size() for value in local) == expected
