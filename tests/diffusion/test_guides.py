"""Guides: order, intervals, batches, tokens that do not depend on the batch, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stbench.core.backbone import Backbone, BackboneInfo, Output, attach_heads
from stbench.core.errors import UserError
from stbench.core.guides import Correction, Guide, HeadGuide, RouteGuide
from stbench.core.objective import Objective
from stbench.diffusion import ImprovedDdpm, LinearFlow
from stbench.diffusion.flow import LinearX
from stbench.diffusion.guidance import FIRST_GUIDE_DRAW, Denoiser, Guidance
from stbench.diffusion.guides import NetworkGuide, kept_tokens
from stbench.diffusion.sample import sample

LABELS = torch.tensor([3, 5])
NULL = 10


class Head(nn.Module):
    """Predicts a tenth of the label that the condition holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((4, 8, 8), 2.0))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        return 0.1 * condition.view(-1, 1, 1, 1).expand(-1, 4, 8, 8)


class ByLabel(Backbone):
    """Predicts the label, plus the number of kept tokens if a route drops some."""

    def __init__(self, factor: float = 1.0, **changes: Any) -> None:
        super().__init__()
        facts: dict[str, Any] = {"input_size": 8, "classes": 10, "capabilities": ("route",), **changes}
        self.info = BackboneInfo("by-label", "custom", 4, 1, 16, 2, 4, **facts)
        self.factor, self.rows = factor, []
        attach_heads(self, {"deep": Head()})

    def forward_intermediates(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        indices: Sequence[int] = (),
        stop_early: bool = False,
        routes: Sequence[Any] = (),
    ) -> Output:
        self.rows.append(len(x))
        kept = sum(route.kept.shape[1] for route in routes)
        prediction = (self.factor * y.view(-1, 1, 1, 1) + kept).expand_as(x).float()
        return Output(prediction, {k: x.flatten(2).mT for k in indices}, condition=y.float()[:, None])


def predict(*guides: Guide, scale: float = 1.0, t: float = 0.5, **options: Any) -> Tensor:
    """Return the guided prediction of the two labels (2,)."""
    guidance = Guidance(scale, guides=guides, **options)
    noise = lambda index: torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(index))  # noqa: E731
    denoiser = Denoiser(ByLabel(), LinearFlow(), LABELS, guidance, noise)
    found = denoiser(torch.zeros(2, 4, 8, 8), t)
    assert found.dtype == torch.float64
    assert (found == found[:, :1, :1, :1]).all()
    return found[:, 0, 0, 0]


def deep(scale: float, **interval: float) -> HeadGuide:
    return HeadGuide("deep", 1, scale=scale, **interval)


def test_a_head_guides_each_half_before_classifier_free_guidance() -> None:
    # v = weak + 2 (v - weak) with weak = 0.1 v in each half, so both halves grow by 1.9.
    assert torch.allclose(predict(deep(2.0)), 1.9 * LABELS.double())
    guided = NULL + 3.0 * (LABELS.double() - NULL)
    assert torch.allclose(predict(deep(2.0), scale=3.0), 1.9 * guided)


def test_guides_are_applied_in_order_and_the_correction_last() -> None:
    other = NetworkGuide(ByLabel(0.5), "half", "0" * 64, scale=3.0)
    correction = Correction(0.25, "deep.mean")
    # Head: 1.9 y; network: 0.5 y + 3 (1.9 - 0.5) y = 4.7 y; correction: 0.75 v - 0.25 * 2
    expected = 0.75 * 4.7 * LABELS.double() - 0.5
    assert torch.allclose(predict(deep(2.0), other, correction), expected)
    assert torch.allclose(predict(correction, deep(2.0), other), expected)
    # The other way round: 0.5 y + 3 (1 - 0.5) y = 2 y, then 0.1 y + 2 (2 - 0.1) y = 3.9 y
    assert torch.allclose(predict(other, deep(2.0)), 3.9 * LABELS.double())
    # A correction may name the weight of v: 0.9 v - 0.25 * 2
    assert torch.allclose(predict(Correction(0.25, "deep.mean", 0.9)), 0.9 * LABELS.double() - 0.5)


@pytest.mark.parametrize(
    ("t", "guided", "doubled"),
    [(0.2, False, True), (0.3, True, True), (0.8, True, False), (0.9, False, False)],
)
def test_each_guide_has_its_own_closed_interval(t: float, guided: bool, doubled: bool) -> None:
    network = ByLabel()
    guidance = Guidance(3.0, 0.0, 0.5, guides=(deep(2.0, low=0.3, high=0.8),))
    denoiser = Denoiser(network, LinearFlow(), LABELS, guidance)
    found = denoiser(torch.zeros(2, 4, 8, 8), t)[:, 0, 0, 0]
    plain = NULL + 3.0 * (LABELS.double() - NULL) if doubled else LABELS.double()
    assert torch.allclose(found, (1.9 if guided else 1.0) * plain)
    assert network.rows == [4 if doubled else 2]


def test_scale_one_is_the_plain_prediction_bit_by_bit() -> None:
    assert torch.equal(predict(deep(1.0)), predict())
    network = ByLabel()
    denoiser = Denoiser(network, LinearFlow(), LABELS, Guidance(guides=(RouteGuide(1, 2, scale=1.0),)))
    denoiser(torch.zeros(2, 4, 8, 8), 0.5)  # draws no tokens
    assert network.rows == [2]


def test_both_predictions_of_a_route_drop_tokens() -> None:
    # 16 tokens: 12 remain at rate 0.25 and 6 at 0.625. v = y + 6 + 1.5 * (12 - 6)
    guide = RouteGuide(1, 2, 0.25, 0.625, scale=1.5)
    assert torch.allclose(predict(guide), LABELS.double() + 15)
    with pytest.raises(ValueError, match="noise"):
        Denoiser(ByLabel(), LinearFlow(), LABELS, Guidance(guides=(guide,)))(torch.zeros(2, 4, 8, 8), 0.5)


def test_kept_tokens_depend_on_the_own_noise_only() -> None:
    noise = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    kept = kept_tokens(noise, 2, 0.7)
    assert kept.shape == (5, 5)
    assert torch.equal(kept[1:3], kept_tokens(noise[1:3], 2, 0.7))
    assert not torch.equal(kept[0].sort()[0], kept[1].sort()[0])
    assert all(len(set(row)) == 5 and max(row) < 16 for row in kept.tolist())


def test_guides_draw_where_no_sampler_draws() -> None:
    asked: list[int] = []

    def noise(index: int) -> Tensor:
        asked.append(index)
        return torch.zeros(2, 4, 8, 8)

    guidance = Guidance(2.0, 0.0, 0.5, guides=(RouteGuide(0, 1, scale=1.5, high=0.5),))
    z = torch.zeros(2, 4, 8, 8)
    sample("euler-maruyama", ByLabel(), LinearFlow(), z, LABELS, steps=4, guidance=guidance, noise=noise)
    # Evaluations at 1, 0.68, 0.36 and 0.04: the guide acts at the last two.
    drawn = [index - FIRST_GUIDE_DRAW for index in asked if index >= FIRST_GUIDE_DRAW]
    assert drawn == [4, 5, 6, 7]
    assert [index for index in asked if index < FIRST_GUIDE_DRAW] == [0, 1, 2]


def test_guides_leave_the_learned_variance_alone() -> None:
    network = ByLabel()
    network.forward_intermediates = lambda x, t, y, **_: Output(  # type: ignore[method-assign]
        torch.cat([x + 1.0, x + 2.0], 1), {1: x}, condition=y.float()[:, None]
    )
    network.kept_heads["deep"].forward = lambda tokens, condition: torch.zeros(len(tokens), 8, 8, 8)
    denoiser = Denoiser(network, ImprovedDdpm(), LABELS, Guidance(guides=(deep(3.0),)))
    found = denoiser(torch.zeros(2, 4, 8, 8), 0.5)
    assert (found[:, :4] == 3.0).all() and (found[:, 4:] == 2.0).all()


@pytest.mark.parametrize(
    ("guides", "network", "objective", "message"),
    [
        ([HeadGuide("other", 1)], ByLabel(), LinearFlow(), "needs a network with that head, found deep"),
        ([deep(2.0), RouteGuide(1, 2)], ByLabel(), LinearFlow(), "reads block 1, in which a route drops"),
        ([RouteGuide(1, 2)], ByLabel(capabilities=()), LinearFlow(), "capability 'route'"),
        ([RouteGuide(0, 0), RouteGuide(1, 2)], ByLabel(), LinearFlow(), "takes one route, got 2"),
        ([Correction(0.05, "deep.mean")], ByLabel(), LinearX(), "predicts a velocity, got linear-x"),
        ([Correction(0.05, "deep.other")], ByLabel(), LinearFlow(), "the buffer 'deep.other', found none"),
        (
            [NetworkGuide(ByLabel(input_size=16), "big", "")],
            ByLabel(),
            LinearFlow(),
            "same input_size as the guided one, expected 8, got 16",
        ),
        (
            [NetworkGuide(ByLabel(null_label=False), "big", "")],
            ByLabel(),
            LinearFlow(),
            "same null_label as the guided one",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    guides: list[Guide], network: Backbone, objective: Objective, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Denoiser(network, objective, LABELS, Guidance(guides=tuple(guides)))
    assert "\n" not in str(caught.value)
