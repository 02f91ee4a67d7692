"""Heads that stay with the network: averaged, saved, resumed, loaded; and optional inputs in the costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stbench.config.plan import prepare, unset_in_all
from stbench.config.resolve import RunRequest, resolve
from stbench.core.backbone import Backbone, BackboneInfo, attach_heads, fit_heads, kept_heads, load_trunk
from stbench.core.errors import UserError
from stbench.core.recipe import LATER, NoSupervision, Stage, Step, Supervision, Term
from stbench.core.registry import RECIPES, load_builtins, load_plugins
from stbench.diffusion import LinearFlow
from stbench.evaluate.past_run import PastRun
from stbench.runs.folder import RunFolder
from stbench.train import engine
from stbench.train.cost import expected_cost
from stbench.train.replica import has_unused_parameters
from stbench.train.step import StageModel
from tests.conftest import Runner, tiny_spec
from tests.networks import tiny as tiny_network
from tests.train.test_engine import StopAt, same, weights

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = [EXAMPLES / f"{name}_recipe.py" for name in ("head", "token_time", "attention", "route")]

load_builtins()


@pytest.fixture(scope="module", autouse=True)
def _examples() -> None:
    load_plugins(FILES)


@dataclass
class Exit(Supervision):
    """A second prediction by the kept head "exit"."""

    @property
    def taps(self) -> Sequence[int]:
        return (1,)

    def terms(self, step: Step) -> Mapping[str, Term]:
        early = step.project("exit", step.features[1], step.condition)
        return {"exit": Term(step.objective.loss(early, step.noised), 1.0)}


@pytest.mark.parametrize("backbone", ["sit", "dit", "uvit"])
def test_a_kept_head_is_trained_averaged_saved_and_resumed(
    tiny: Runner, tmp_path: Path, backbone: str
) -> None:
    options: dict[str, Any] = {"backbone": backbone, "recipe__block": 1, "train__save_every": 10}
    plain = tiny("early-exit", output="plain", **options)
    with pytest.raises(engine.Interrupted):
        tiny("early-exit", output="stopped", hooks=[StopAt(2)], **options)
    stopped = tiny("early-exit", output="stopped", **options)
    for kind in ("raw", "ema"):
        mine, others = weights(plain, kind), weights(stopped, kind)
        assert same(mine, others)
        heads = [name for name in mine if name.startswith("kept_heads.exit.")]
        assert heads and any(mine[name].any() for name in heads)
    run = PastRun(RunFolder(Path(plain.path)), prepare(tiny_spec("early-exit", **options)))
    network = run.load(run.final_file("ema"))
    assert same(network.state_dict(), weights(plain, "ema")) and list(kept_heads(network)) == ["exit"]


def test_a_recipe_that_keeps_a_head_trains_the_trunk_of_one_that_does_not(tiny: Runner) -> None:
    kept = weights(tiny("early-exit", recipe__weight=0.0, train__clip=None))
    plain = weights(tiny("vanilla", output="plain", train__clip=None))
    assert all(torch.equal(kept[name], value) for name, value in plain.items())
    assert {name.partition(".")[0] for name in kept.keys() - plain.keys()} == {"kept_heads"}


def test_the_next_stage_starts_from_the_trunk_alone(tiny: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_stages(info: BackboneInfo) -> Sequence[Stage]:
        """First with a kept head, then without."""
        first = Stage("first", lambda e: Exit(), heads=lambda n: {"exit": n.output_head()}, steps=2)
        return [first, Stage("second", lambda e: NoSupervision(), init="previous")]

    monkeypatch.setitem(RECIPES.module_dict, "two-stages", two_stages)
    record = tiny("two-stages", steps=1, train__lr=1e-12)
    first, second = weights(record, "ema", stage=0), weights(record)
    assert not any(name.startswith("kept_heads") for name in second)
    for name, value in second.items():
        torch.testing.assert_close(value, first[name], rtol=0, atol=1e-6)


class Mean(nn.Module):
    """A head whose buffer is filled from the data."""

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(()))

    def fit(self, dataset: Any) -> None:
        self.value.fill_(dataset.size)
        FITTED.append(dataset.name)


FITTED: list[str] = []


def test_a_head_fits_its_buffers_to_the_training_data(tiny: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fitted(info: BackboneInfo) -> Sequence[Stage]:
        """A buffer without parameters."""
        return [Stage("fitted", lambda e: NoSupervision(), heads=lambda n: {"mean": Mean()})]

    monkeypatch.setitem(RECIPES.module_dict, "fitted", fitted)
    FITTED.clear()
    with pytest.raises(engine.Interrupted):
        tiny("fitted", steps=3, hooks=[StopAt(2)])
    record = tiny("fitted", steps=3)
    expected = prepare(tiny_spec("fitted", steps=3)).dataset.size
    assert weights(record, "ema")["kept_heads.mean.value"] == expected
    assert len(FITTED) == 1  # the resumed run reads the value from its state


def test_a_trunk_is_loaded_whatever_heads_the_two_networks_have() -> None:
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    net.kept_heads = nn.ModuleDict({"mine": nn.Linear(2, 1)})
    other.kept_heads = nn.ModuleDict({"theirs": nn.Linear(2, 1)})
    before = net.kept_heads["mine"].weight.clone()
    load_trunk(net, other.state_dict())
    assert torch.equal(net.weight, other.weight) and torch.equal(net.kept_heads["mine"].weight, before)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_trunk(net, {**other.state_dict(), "more": before})
    other.kept_heads = nn.ModuleDict({"mine": nn.Linear(3, 1)})
    with pytest.raises(UserError, match=r"kept_heads\.mine\.weight of shape \(1, 2\), found \(1, 3\)"):
        load_trunk(net, other.state_dict())
    fit_heads(net, None)  # a head without `fit` is skipped


def student_flops(recipe: str, **options: Any) -> float:
    prepared = prepare(tiny_spec(recipe, **options))
    return expected_cost(prepared, prepared.stages[-1], draws=1).student


def test_costs_contain_what_runs() -> None:
    plain = student_flops("vanilla")
    assert student_flops("checkerboard") < plain
    assert student_flops("sharpen", recipe__block=1) > plain
    assert student_flops("half-clean") > plain  # a modulation per token


@pytest.mark.parametrize("recipe", ["half-clean", "sharpen", "checkerboard"])
def test_a_backbone_without_the_capability_is_refused_before_training(recipe: str) -> None:
    load_plugins([EXAMPLES / "my_backbone.py"])
    with pytest.raises(UserError, match=f"recipe '{recipe}' needs .* which mixer lacks; use"):
        prepare(resolve(RunRequest("mixer", recipe, steps=1)))


def test_a_family_says_why_it_lacks_a_capability() -> None:
    with pytest.raises(UserError, match=r"which uvit lacks \(it has one time token for all image tokens\)"):
        prepare(tiny_spec("half-clean", backbone="uvit"))


def test_a_backbone_without_an_output_head_is_refused() -> None:
    load_plugins([EXAMPLES / "my_backbone.py"])
    with pytest.raises(UserError, match=r"'mixer' defines no output_head\(\)"):
        prepare(resolve(RunRequest("mixer", "early-exit", steps=1)))


def test_two_heads_of_one_name_are_refused() -> None:
    class Two(Exit):
        def heads(self, info: BackboneInfo) -> nn.ModuleDict:
            return nn.ModuleDict({"exit": nn.Linear(2, 2)})

    network = tiny_network("sit")
    attach_heads(network, {"exit": network.output_head()})
    with pytest.raises(UserError, match="both name a head 'exit'; rename one"):
        StageModel(network, Two(), LinearFlow(), seed=0, dataset_size=8)


def test_heads_do_not_make_a_replica_search_for_unused_parameters() -> None:
    with torch.device("meta"):
        network = tiny_network("sit").requires_grad_(True)
        attach_heads(network, {"exit": network.output_head()})
        assert not has_unused_parameters(network)
        network.more = nn.Parameter(torch.zeros(2))
    assert has_unused_parameters(network)


def test_an_option_is_hashed_if_any_stage_has_another_value() -> None:
    @dataclass
    class Grown(NoSupervision):
        power: float = field(default=1.0, metadata=LATER)
        shift: float = field(default=0.0, metadata=LATER)

    assert unset_in_all([Grown(), NoSupervision()]) == {"power", "shift"}
    assert unset_in_all([Grown(), Grown(power=2.0)]) == {"shift"}


def test_every_backbone_without_heads_has_none() -> None:
    class Plain(Backbone):
        def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any: ...

    assert kept_heads(Plain()) == {}
