"""Contrastive flow matching: negatives and their pools, the correction, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from stbench.config.plan import prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.core.backbone import Backbone, attach_heads, kept_heads
from stbench.core.errors import UserError
from stbench.core.guides import Correction
from stbench.core.recipe import Stage, Step
from stbench.core.rng import Rng
from stbench.core.world import World
from stbench.data.dataset import get_dataset
from stbench.diffusion import LinearFlow
from stbench.recipes.delta_fm import DeltaFm, MeanLatent, delta_fm
from stbench.train import engine
from tests.conftest import Runner, tiny_spec
from tests.steps import BATCH, network, only, step_of, value
from tests.train.test_engine import StopAt, same, weights


@pytest.fixture(scope="module")
def net() -> Backbone:
    return network()


def supervision_of(net: Backbone, **options: Any) -> DeltaFm:
    return cast(DeltaFm, only(delta_fm(net.info, **options)))


def sources(found: Tensor, pool: Tensor) -> Tensor:
    """For each negative, the row of the pool that it is."""
    same = (found[:, None] == pool[None]).flatten(2).all(2)
    assert bool((same.sum(1) == 1).all())
    return same.int().argmax(1)


def test_the_term_is_the_distance_to_the_target_of_another_sample(net: Backbone) -> None:
    supervision = supervision_of(net)
    step = step_of(supervision, net, LinearFlow())
    targets = step.noised.noise - step.noised.x0
    other = sources(supervision.negatives(step), targets)
    assert bool((other != torch.arange(BATCH)).all())
    (term,) = supervision.terms(step).values()
    expected = (step.prediction - targets[other]).square().flatten(1).mean(1)
    torch.testing.assert_close(term.value, expected)
    assert term.weight == -0.05


def test_every_other_sample_is_drawn_equally_often(net: Backbone) -> None:
    supervision = supervision_of(net)
    step = step_of(supervision, net, LinearFlow())
    targets, counts = step.noised.noise - step.noised.x0, torch.zeros(BATCH, BATCH)
    for seen in range(700):
        batch = dataclasses.replace(step.batch, rng=Rng(0, seen, BATCH))
        other = sources(supervision.negatives(dataclasses.replace(step, batch=batch)), targets)
        counts[torch.arange(BATCH), other] += 1
    assert not counts.diagonal().any()
    counts += 100 * torch.eye(BATCH)
    assert counts.min() > 60 and counts.max() < 140  # expected 100, standard deviation 9


@dataclasses.dataclass(frozen=True)
class Ranks(World):
    """Ranks whose gathered rows are known."""

    rows: Tensor | None = None

    def gather(self, rows: Tensor) -> Tensor:
        assert self.rows is not None
        return self.rows


def half(step: Step, rank: int) -> Step:
    """The part of a step that one of two ranks sees."""
    rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    noised = dataclasses.replace(
        step.noised, **{f.name: getattr(step.noised, f.name)[rows] for f in dataclasses.fields(step.noised)}
    )
    batch = dataclasses.replace(
        step.batch,
        y=step.batch.y[rows],
        rng=dataclasses.replace(step.batch.rng, start=rows.start, stop=rows.stop),
    )
    world = Ranks(rank=rank, size=2, rows=step.noised.noise - step.noised.x0)
    return dataclasses.replace(step, noised=noised, batch=batch, world=world)


def test_the_global_pool_does_not_depend_on_the_ranks(net: Backbone) -> None:
    supervision = supervision_of(net, pool="global")
    step = step_of(supervision, net, LinearFlow())
    whole = supervision.negatives(step)
    parts = [supervision.negatives(half(step, rank)) for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_pool_of_a_rank_is_its_own_samples(net: Backbone) -> None:
    supervision = supervision_of(net, pool="rank")
    step = half(step_of(supervision, net, LinearFlow()), 1)
    targets = step.noised.noise - step.noised.x0
    other = sources(supervision.negatives(step), targets)
    assert bool((other != torch.arange(BATCH // 2)).all())


def test_skipping_averages_over_the_labelled_samples(net: Backbone) -> None:
    supervision = supervision_of(net)
    step = step_of(supervision, net, LinearFlow(), label_drop=0.5)
    labelled = step.batch.y != 10
    assert 0 < int(labelled.sum()) < BATCH
    all_values, skipped = (
        value(dataclasses.replace(supervision, unconditional=option), step) for option in ("contrast", "skip")
    )
    torch.testing.assert_close(skipped.mean(), all_values[labelled].mean())
    assert not skipped[~labelled].any()
    nothing = dataclasses.replace(step.batch, y=torch.full_like(step.batch.y, 10))
    unlabelled = dataclasses.replace(step, batch=nothing)
    assert not value(dataclasses.replace(supervision, unconditional="skip"), unlabelled).any()


@pytest.mark.parametrize(
    ("pool", "rows", "message"),
    [
        ("rank", 4, r"pool=rank needs all 8 images of a step at once, found 4 on each of 1 rank"),
        ("global", 4, r"pool=global needs all 8 images .*; use --set train\.accumulate=1"),
        ("micro-batch", 1, r"pool=micro-batch needs at least 2 samples, got 1; increase train\.batch"),
    ],
)
def test_a_pool_that_is_not_there_is_refused(net: Backbone, pool: str, rows: int, message: str) -> None:
    supervision = supervision_of(net, pool=pool)
    step = step_of(supervision, net, LinearFlow())
    noised = dataclasses.replace(
        step.noised, **{f.name: getattr(step.noised, f.name)[:rows] for f in dataclasses.fields(step.noised)}
    )
    batch = dataclasses.replace(step.batch, y=step.batch.y[:rows])
    with pytest.raises(UserError, match=message):
        supervision.negatives(dataclasses.replace(step, noised=noised, batch=batch))


@pytest.mark.parametrize("objective", ["iddpm", "vp-discrete", "linear-x"])
def test_objectives_without_a_predicted_velocity_are_refused_before_training(objective: str) -> None:
    with pytest.raises(UserError, match=r"needs an objective that predicts one, got .*; use --objective"):
        prepare(resolve(RunRequest("dit", "delta-fm", objective=objective)))


def test_a_checkpoint_without_an_encoder_is_refused(net: Backbone) -> None:
    with pytest.raises(UserError, match=r"recipe\.checkpoint has no effect without recipe\.encoder"):
        delta_fm(net.info, checkpoint="weights.safetensors")


def test_the_correction_undoes_the_bias_of_the_optimum(net: Backbone) -> None:
    (stage,) = delta_fm(net.info, weight=0.3)
    guide = stage.guides["correction"]
    assert isinstance(guide, Correction) and guide.weight == 0.3
    assert stage.heads is not None
    attach_heads(net, stage.heads(net))
    (head,) = kept_heads(net).values()
    assert isinstance(head, MeanLatent)
    data = get_dataset("digits")
    head.fit(data)
    torch.testing.assert_close(head.image, data.mean_latent())
    v = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guide.apply((v + 0.3 * head.image) / 0.7, net), v)
    del net.kept_heads


def test_the_mean_latent_is_stored_with_both_weights(tiny: Runner) -> None:
    record = tiny("delta-fm", steps=1)
    expected = prepare(tiny_spec("delta-fm")).dataset.mean_latent()
    for kind in ("raw", "ema"):
        assert torch.equal(weights(record, kind)["kept_heads.interference.image"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["dit", "uvit"])
def test_it_resumes_to_the_same_bits(tiny: Runner, backbone: str) -> None:
    options: dict[str, Any] = {"backbone": backbone, "objective": "linear", "steps": 3, "reuse": False}
    options |= {"train__save_every": 10, "recipe__encoder": "digits", "recipe__pool": "global"}
    plain = tiny("delta-fm", output="plain", **options)
    with pytest.raises(engine.Interrupted):
        tiny("delta-fm", output="stopped", hooks=[StopAt(2)], **options)
    stopped = tiny("delta-fm", output="stopped", **options)
    for kind in ("raw", "ema"):
        assert same(weights(plain, kind), weights(stopped, kind))


def test_with_an_encoder_repa_is_added(net: Backbone) -> None:
    supervision = supervision_of(net, encoder="digits")
    assert (supervision.needs, supervision.images, supervision.taps) == ("encoder digits", True, (1,))
    step = step_of(supervision, net, LinearFlow())
    terms = supervision.terms(step)
    assert {name: term.weight for name, term in terms.items()} == {"delta-fm": -0.05, "repa": 0.5}
    assert step.cost.teachers > 0 and step.cost.heads > 0
    plain: Stage = delta_fm(net.info)[0]
    assert plain.supervision({}).needs == "" and not len(plain.supervision({}).heads(net.info))
