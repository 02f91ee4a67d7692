"""Compilation, checkpointing and the precision of teachers: each is trained with and without."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stbench.bench.workload import Case, Workload
from stbench.config.plan import prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.config.spec import TrainSpec
from stbench.core.errors import UserError
from stbench.core.frozen import PADDED_SHARES, pad_rows
from stbench.core.registry import BACKBONES, load_builtins, names
from stbench.train.blocks import COMPILE_PAYS_FROM, should_compile
from tests.refusals import skip_if_refused

load_builtins()
CPU = torch.device("cpu")
TINY = {"backbone.width": 24, "backbone.heads": 2, "backbone.depth": 5, "recipe.hidden": 24}
STEPS = 3


def case(backbone: str, recipe: str = "self-transcendence", precision: str = "fp32", **train: Any) -> Case:
    changes = {k: v for k, v in TINY.items() if k != "recipe.hidden" or recipe == "self-transcendence"}
    changes |= {f"train.{name}": value for name, value in train.items() if name != "compile"}
    return Case(backbone, recipe, 16, precision, bool(train.get("compile")), overrides=changes)


def trained(work: Workload) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The losses of some steps, and the weights after them."""
    losses = [{name: float(loss) for name, loss in work.step().items()} for _ in range(STEPS)]
    return losses, work.model.state_dict()


def require_close(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)


@pytest.mark.parametrize("recipe", ["self-transcendence", "sra"])
@pytest.mark.parametrize("backbone", names(BACKBONES))
def test_checkpointing_gives_the_same_bits(backbone: str, recipe: str) -> None:
    losses, weights = trained(Workload(case(backbone, recipe), CPU))
    same, same_weights = trained(Workload(case(backbone, recipe, checkpointing=True), CPU))
    assert same == losses and same_weights.keys() == weights.keys()
    assert all(torch.equal(same_weights[name], weight) for name, weight in weights.items())


def test_checkpointing_keeps_fewer_activations() -> None:
    def saved(work: Workload) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            x = torch.randn(16, 4, 8, 8)
            work.model.student(x, torch.rand(16), torch.zeros(16, dtype=torch.long))
        weights = {p.untyped_storage().data_ptr() for p in work.model.parameters()}
        return sum(size for where, size in sizes.items() if where not in weights)

    plain = saved(Workload(case("sit", "vanilla"), CPU))
    assert saved(Workload(case("sit", "vanilla", checkpointing=True), CPU)) < plain / 2


def test_checkpointing_repeats_the_draws_of_a_block() -> None:
    """A plug-in's block may draw: the backward pass must see the same dropout."""
    from stbench.train.blocks import checkpoint_blocks

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(2))

        def repeated_blocks(self) -> list[nn.Module]:
            return list(self.blocks)

    torch.manual_seed(0)
    network = Dropping()
    other = copy.deepcopy(network)
    checkpoint_blocks(other)  # type: ignore[arg-type]
    gradients = []
    for net in (network, other):
        torch.manual_seed(1)
        x = torch.ones(4, 8)
        for block in net.blocks:
            x = block(x)
        x.sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)


def test_checkpointing_needs_a_repeated_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKBONES.get("sit"), "repeated_blocks", lambda self: [])
    request = RunRequest("sit", "vanilla", overrides={"train.checkpointing": True})
    with pytest.raises(UserError, match=r"train\.checkpointing.*no repeated block.*false"):
        prepare(resolve(request))


def test_teachers_in_bf16_change_the_losses_little() -> None:
    """2 % of the auxiliary loss, whose target is a guided difference times 10."""
    losses, _ = trained(Workload(case("sit", precision="bf16", teacher_precision="fp32"), CPU))
    found, _ = trained(Workload(case("sit", precision="bf16", teacher_precision="bf16"), CPU))
    require_close(found, losses, 0.02)
    assert found != losses


def test_an_encoder_that_runs_before_the_student_has_the_precision_of_teachers() -> None:
    def tokens(precision: str, teachers: str) -> Tensor:
        work = Workload(case("sit", "reg", precision=precision, teacher_precision=teachers), CPU)
        work.step()
        found = work.model.supervision._tokens
        assert isinstance(found, Tensor)
        return found

    expected = tokens("fp32", "fp32")
    assert torch.equal(tokens("bf16", "fp32"), expected)
    assert not torch.equal(tokens("bf16", "bf16"), expected)


@pytest.mark.parametrize(("precision", "teachers"), [("fp32", "fp32"), ("tf32", "fp32"), ("bf16", "bf16")])
def test_teachers_compute_in_bf16_where_the_student_does(precision: str, teachers: str) -> None:
    train = resolve(RunRequest("sit", "sra", precision=precision)).train
    assert train.teacher_precision == teachers
    same = resolve(RunRequest("sit", "sra", overrides={"train.precision": precision})).train
    assert same.teacher_precision == teachers


def test_teachers_in_bf16_need_a_student_in_bf16() -> None:
    with pytest.raises(UserError, match="teacher_precision=bf16 needs --precision bf16, got fp32"):
        resolve(RunRequest("sit", "sra", overrides={"train.teacher_precision": "bf16"}))


@pytest.mark.parametrize("rows", [1, 3, 4, 9, 10, 16, 17, 32])
def test_the_rows_of_a_compiled_teacher_have_three_sizes(rows: int) -> None:
    x = torch.randn(rows, 2, 3)
    padded = pad_rows(x, 32)
    assert len(padded) in [32 * share for share in PADDED_SHARES]
    assert torch.equal(padded[:rows], x) and (padded[rows:] == x[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", names(BACKBONES))
@pytest.mark.parametrize("recipe", ["self-transcendence", "sra", "self-flow", "haste"])
def test_compiled_blocks_give_the_same_losses(
    backbone: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced by dynamo and run by autograd's eager backend: the graphs that inductor would receive."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile_module(self, backend=backend, **options)
    )
    torch._dynamo.reset()
    with skip_if_refused():
        losses, weights = trained(Workload(case(backbone, recipe), CPU))
    work = Workload(case(backbone, recipe, compile=True), CPU)
    found, compiled = trained(work)
    require_close(found, losses, 1e-5)
    assert compiled.keys() == weights.keys()
    kinds = 2 if backbone == "uvit" else 1
    assert kinds < len(graphs) <= 4 * kinds, "one graph of the student, and at most three of a teacher"
    assert copy.deepcopy(work.model.student)._compiled_call_impl is None


@pytest.mark.slow
def test_inductor_compiles_a_block_and_checkpointing_with_it() -> None:
    torch._dynamo.reset()
    losses, _ = trained(Workload(case("sit"), CPU))
    found, _ = trained(Workload(case("sit", compile=True, checkpointing=True), CPU))
    require_close(found, losses, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", names(BACKBONES))
def test_inductor_gives_the_losses_of_bf16_with_256_tokens(backbone: str) -> None:
    """Fails where inductor is given the transposed view of a patch embedding: then these losses are NaN."""
    torch._dynamo.reset()
    of = Case(f"{backbone}-s/2", "vanilla", 2, "bf16", overrides={"backbone.depth": 3})
    losses, _ = trained(Workload(of, CPU))
    found, _ = trained(Workload(dataclasses.replace(of, compile=True), CPU))
    require_close(found, losses, 1e-3)


@pytest.mark.parametrize(("given", "word"), [(True, "on"), (False, "off"), ("on", "on"), ("auto", "auto")])
def test_compile_takes_words_and_the_values_of_earlier_versions(given: Any, word: str) -> None:
    assert resolve(RunRequest("sit", "sra", overrides={"train.compile": given})).train.compile == word


@pytest.mark.parametrize(
    ("train", "hashes"),
    [
        ({}, ("335fdcda", "58371bf6", "1853da31")),
        ({"compile": "auto", "checkpointing": True}, ("335fdcda", "58371bf6", "1853da31")),
        ({"compile": "on"}, ("f1a5aa50", "49e97e69", "c8b384f9")),
        ({"compile": True}, ("f1a5aa50", "49e97e69", "c8b384f9")),
    ],
)
def test_runs_with_teachers_in_fp32_keep_their_hashes(train: dict[str, Any], hashes: tuple[str, ...]) -> None:
    """The hashes that version 0.1 gave to bf16 runs, whose teachers computed in fp32."""
    overrides = {f"train.{name}": value for name, value in ({"teacher_precision": "fp32"} | train).items()}
    found = prepare(
        resolve(RunRequest("sit", "self-transcendence", precision="bf16", overrides=overrides))
    ).hashes
    assert (found.train, found.row, found.setting) == hashes
    other = prepare(
        resolve(
            RunRequest(
                "sit",
                "self-transcendence",
                precision="bf16",
                overrides=overrides | {"train.teacher_precision": "bf16"},
            )
        )
    ).hashes
    assert other.train != found.train and other.setting != found.setting


def test_auto_compiles_only_long_stages_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)

    def decide(word: str, device: str, flops: float) -> bool:
        spec = resolve(RunRequest("sit", "sra", overrides={"train.compile": word})).train
        assert isinstance(spec, TrainSpec)
        return should_compile(spec, torch.device(device), flops)

    assert decide("auto", "cuda", COMPILE_PAYS_FROM) and decide("on", "cpu", 0.0)
    assert not decide("auto", "cuda", COMPILE_PAYS_FROM / 2)
    assert not decide("auto", "cpu", COMPILE_PAYS_FROM) and not decide("off", "cuda", COMPILE_PAYS_FROM)
