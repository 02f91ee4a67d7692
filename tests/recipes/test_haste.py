"""HASTE: pairs and stop for each size, both terms, what runs after the stop, cost, refusals."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from stbench.config.plan import prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.recipe import Step
from stbench.diffusion import LinearFlow
from stbench.models import align, encoders
from stbench.models.encoder_attention import flops_with_logits, tokens_and_logits
from stbench.recipes.haste import Haste, default_pairs, haste
from stbench.train.cost import expected_cost
from tests.steps import BATCH, info, network, only, step_of
from tests.weights import cache_digits


def made(backbone: str = "sit", images_seen: int = 0, **options: Any) -> tuple[Haste, Step]:
    net = network(backbone)
    supervision = cast(Haste, only(haste(net.info, stop=10, **options)))
    return supervision, step_of(supervision, net, LinearFlow(), images_seen=images_seen)


@pytest.mark.parametrize(
    ("where", "layers", "pairs", "block"),
    [
        (info("sit", "xl/2", 28), 12, [(4, 8), (5, 9), (6, 10), (7, 11)], 7),
        (info("sit", "l/2", 24), 12, [(4, 8), (5, 9), (6, 10), (7, 11)], 7),
        (info("dit", "b/2", 12), 12, [(4, 8), (5, 9), (6, 10), (7, 11)], 7),
        (info("uvit", "l/2", 21), 12, [(3, 9), (4, 10), (5, 11)], 5),
        (info("sit", "ti/2", 6), 3, [(1, 2)], 1),
        (info("sit", "xl/2", 28), 3, [(5, 0), (6, 1), (7, 2)], 7),
        (info("sit", "custom", 1), 3, [(0, 2)], 0),
    ],
)
def test_the_published_pairs_and_their_relatives(
    where: BackboneInfo, layers: int, pairs: list[tuple[int, int]], block: int
) -> None:
    assert default_pairs(where, layers) == pairs
    able = dataclasses.replace(where, capabilities=("attention",))
    assert only(haste(able, encoder="digits")).block == block


@pytest.mark.parametrize(
    ("backbone", "steps", "stop"),
    [("sit", 800, 400), ("sit-xl/2", 400_000, 250_000), ("sit-b/2", 400_000, 200_000)],
)
def test_the_stop_is_250k_for_xl_and_half_of_the_steps_elsewhere(
    backbone: str, steps: int, stop: int
) -> None:
    overrides = {"recipe.encoder": "digits", "recipe.pairs": [[1, 2]], "eval.samples": 50}
    spec = prepare(resolve(RunRequest(backbone, "haste", steps=steps, overrides=overrides))).spec
    assert spec.recipe.effective["stop"] == stop


@pytest.mark.parametrize("backbone", ["sit", "dit", "uvit"])
def test_both_terms_align_with_the_digits_encoder(backbone: str) -> None:
    supervision, step = made(backbone, pairs=[[0, 1], [2, 2]], attention_weight=0.3)
    assert supervision.needs == "encoder digits" and supervision.images
    assert supervision.inputs(step.batch, step.noised) == {"attention": (0, 2)}
    encoder = encoders.open_encoder(supervision.sources[0], 16, torch.device("cpu"))
    assert isinstance(encoder, encoders.ImageEncoder)
    with torch.no_grad():
        tokens, *logits = tokens_and_logits(encoder, step.batch.extras["images"], [1, 2])
    terms = supervision.terms(step)
    assert {name: term.weight for name, term in terms.items()} == {"repa": 0.5, "attention": 0.3}
    projected = step.heads["0"](step.features[supervision.block])
    torch.testing.assert_close(terms["repa"].value, -align.cosine(projected, tokens))
    student = [step.attention[block] for block in (0, 2)]
    assert all(maps.shape == (BATCH, 3, 16, 16) for maps in student)
    pairs = zip(logits, student, strict=True)
    expected = sum(-(t.softmax(-1) * s.log_softmax(-1)).sum(-1).mean((1, 2)) for t, s in pairs) / 2
    torch.testing.assert_close(terms["attention"].value, expected)
    assert step.cost.teachers == BATCH * flops_with_logits(encoder, (1, 2)) > BATCH * encoder.flops


def test_the_cross_entropy_of_a_map_with_itself_is_its_entropy_and_the_least() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    weights = teacher.softmax(-1)
    entropy = -(weights * weights.log()).sum(-1).mean((1, 2))
    torch.testing.assert_close(align.attention_cross_entropy(teacher, teacher), entropy)
    assert (align.attention_cross_entropy(student, teacher) > entropy).all()
    first = align.attention_cross_entropy(student[:, :3], teacher)
    assert torch.equal(align.attention_cross_entropy(student, teacher), first)  # the first heads only
    uniform = align.attention_cross_entropy(torch.zeros(2, 3, 5, 5), teacher)
    torch.testing.assert_close(uniform, torch.full((2,), math.log(5)))
    # The released log(softmax) is infinite here
    far = torch.tensor([0.0, 200.0]).expand(1, 1, 2, 2)
    assert align.attention_cross_entropy(far, torch.zeros(1, 1, 2, 2)).item() == pytest.approx(100.0)


def test_after_the_stop_neither_the_encoder_nor_the_logits_are_computed() -> None:
    supervision, last = made(images_seen=9 * BATCH)
    assert set(supervision.terms(last)) == {"repa", "attention"}
    supervision, step = made(images_seen=10 * BATCH)
    assert supervision.inputs(step.batch, step.noised) == {} and step.attention == {}
    assert supervision.terms(step) == {}
    assert step.cost.teachers == step.cost.heads == 0.0


def test_a_plan_counts_logits_and_encoder_up_to_the_stop() -> None:
    def cost(**options: Any) -> Any:
        overrides = {f"recipe.{name}": value for name, value in options.items()}
        prepared = prepare(resolve(RunRequest("sit", "haste", steps=40, overrides=overrides)))
        return expected_cost(prepared, prepared.stages[0])

    half, whole, none = cost(), cost(stop=40), cost(stop=0)
    assert half.teachers == pytest.approx(whole.teachers / 2) and none.teachers == 0
    more, less = (whole, none)
    assert more.student > less.student and half.student == pytest.approx((more.student + less.student) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": []}, r"recipe\.pairs must contain at least one pair, got none; for example \[\[1,2\]\]"),
        ({"pairs": [[0, 3]]}, r"recipe\.pairs contains \[0,3\], but .* the encoder layers 0\.\.2"),
        ({"pairs": [[6, 0]]}, r"recipe\.pairs contains \[6,0\], but sit-ti/2 has blocks 0\.\.5"),
        ({"block": 6}, r"recipe\.block=6 is out of range"),
        ({"checkpoint": "x"}, "cannot be used with encoder 'digits'"),
        ({"encoder": "resnet18"}, "encoder 'resnet18' has no patch tokens"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    overrides = {f"recipe.{name}": value for name, value in options.items()}
    with pytest.raises(UserError, match=message) as error:
        prepare(resolve(RunRequest("sit", "haste", steps=10, overrides=overrides)))
    assert "\n" not in str(error.value)


def test_cached_tokens_are_refused(tmp_path: Path) -> None:
    cache_digits(tmp_path / "tokens")
    with pytest.raises(UserError, match="contain no attention logits"):
        haste(network().info, encoder=str(tmp_path / "tokens"))


def test_a_backbone_without_attention_logits_is_refused() -> None:
    with pytest.raises(UserError, match="recipe 'haste' needs a backbone with the capability 'attention'"):
        haste(info("mixer", "ti/2", 6))
