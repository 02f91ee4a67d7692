"""Distances, heads and masks shared by recipes, compared with values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stbench.diffusion import ImprovedDdpm, LinearFlow, VpContinuous
from stbench.models import align

A = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [1.0, 1.0]]])
B = torch.tensor([[[1.0, 1.0], [0.0, 1.0]], [[4.0, -3.0], [-1.0, -1.0]]])
R = math.sqrt(0.5)


def test_cosine_is_taken_over_channels() -> None:
    assert torch.allclose(align.token_cosine(A, B), torch.tensor([[R, 1.0], [0.0, -1.0]]))
    assert torch.allclose(align.cosine(A, B), torch.tensor([(R + 1) / 2, -0.5]))


def test_token_cosine_has_one_value_per_token() -> None:
    assert align.token_cosine(torch.randn(2, 5, 7), torch.randn(2, 5, 7)).shape == (2, 5)


def test_released_cosine_is_taken_over_tokens() -> None:
    first = (1.0 + 2.0 / (2.0 * math.sqrt(2.0))) / 2
    second = ((12 - 1) / (math.sqrt(10) * math.sqrt(17)) + (-12 - 1) / (math.sqrt(17) * math.sqrt(10))) / 2
    assert torch.allclose(align.cosine_released(A, B), torch.tensor([first, second]))


def test_mse_and_l1_are_means_over_tokens_and_channels() -> None:
    assert torch.allclose(align.mse(A, B), torch.tensor([0.5, (1 + 49 + 4 + 4) / 4]))
    assert torch.allclose(align.l1(A, B), torch.tensor([0.5, (1 + 7 + 2 + 2) / 4]))


def test_smooth_l1_is_quadratic_below_beta() -> None:
    a, b = torch.zeros(1, 1, 2), torch.tensor([[[0.1, 1.0]]])
    assert align.smooth_l1(a, b, 0.2).item() == pytest.approx((0.1**2 / 0.4 + 0.9) / 2)


@pytest.mark.parametrize("distance", [align.cosine, align.cosine_released, align.mse, align.l1])
def test_distances_compute_in_float32(distance: object) -> None:
    assert callable(distance)
    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    found = distance(a.bfloat16(), b.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, distance(a.bfloat16().float(), b.bfloat16().float()))


def test_structure_compares_the_cosines_of_all_pairs_of_tokens() -> None:
    a = torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [1.0, 1.0]]])  # cosines 0 and R
    b = torch.tensor([[[1.0, 0.0, 0.0], [5.0, 0.0, 0.0]], [[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0]]])  # 1 and -R
    assert torch.allclose(align.structure(a, b), torch.tensor([2 * 1.0 / 4, 2 * (2 * R) ** 2 / 4]))
    with torch.autocast("cpu", torch.bfloat16):
        assert align.structure(a, b).dtype == torch.float32


def test_standardise_removes_a_share_of_the_mean_over_the_tokens() -> None:
    z = torch.tensor([[[1.0, 10.0], [2.0, 10.0], [6.0, 40.0]]])
    mean, std = torch.tensor([3.0, 20.0]), torch.tensor([math.sqrt(7.0), math.sqrt(300.0)])
    torch.testing.assert_close(align.standardise(z, 0.6), (z - 0.6 * mean) / std)
    assert torch.allclose(align.standardise(z, 1.0).mean(1), torch.zeros(2), atol=1e-6)
    assert align.standardise(torch.ones(1, 4, 2), 1.0).abs().max() == 0  # eps keeps it finite


def test_the_convolution_sees_neighbours_on_the_grid() -> None:
    projector = align.ConvProjector(1, 1, 3)
    nn.init.ones_(projector.projection_layer.weight)
    nn.init.zeros_(projector.projection_layer.bias)
    found = projector(torch.arange(9.0).view(1, 9, 1))
    assert found.flatten()[:5].tolist() == [0 + 1 + 3 + 4, 0 + 1 + 2 + 3 + 4 + 5, 1 + 2 + 4 + 5, 21, 36]
    assert align.ConvProjector(2, 5, 1)(torch.randn(3, 4, 2)).shape == (3, 4, 5)


def test_dispersive_is_the_log_mean_over_all_pairs_with_the_diagonal() -> None:
    z = torch.tensor([[[0.0, 0.0]], [[2.0, 0.0]], [[0.0, 4.0]]])
    near, far, both = 4 / 2, 16 / 2, 20 / 2
    expected = math.log((3 + 2 * (math.exp(-near) + math.exp(-far) + math.exp(-both))) / 9)
    assert align.dispersive(z, 1.0).item() == pytest.approx(expected)
    halved = math.log((3 + 2 * sum(math.exp(-2 * d) for d in (near, far, both))) / 9)
    assert align.dispersive(z, 0.5).item() == pytest.approx(halved)


def test_dispersive_of_a_collapsed_batch_is_zero_with_a_finite_gradient() -> None:
    z = torch.ones(4, 2, 3, requires_grad=True)
    loss = align.dispersive(z, 1.0)
    (grad,) = torch.autograd.grad(loss, z)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert torch.isfinite(grad).all()


def test_the_interval_is_closed_for_times_stored_in_float32() -> None:
    t = torch.tensor([0.4, 0.6, 0.7, 0.3999, 0.7001]).double()
    inside = align.in_interval(LinearFlow(), t, (0.4, 0.7))
    assert inside.tolist() == [True, True, True, False, False]
    assert t[1].item() > 0.6
    assert align.in_interval(LinearFlow(), t, (0.4, 0.6)).tolist()[:2] == [True, True]


def test_the_interval_is_closed_for_times_in_float64() -> None:
    t = torch.tensor([0.4, 0.7], dtype=torch.float64)
    assert align.in_interval(LinearFlow(), t, (0.4, 0.7)).all()


@pytest.mark.parametrize("objective", [ImprovedDdpm(), VpContinuous()], ids=["iddpm", "vp-continuous"])
def test_the_interval_is_in_flow_equivalent_time_unless_native(objective: VpContinuous) -> None:
    t = torch.linspace(0, 1, 500, dtype=torch.float64)
    tau = objective.tau(t)
    assert torch.equal(align.in_interval(objective, t, (0.4, 0.7)), (tau >= 0.4) & (tau <= 0.7))
    assert torch.equal(align.in_interval(objective, t, (0.4, 0.7), native=True), (t >= 0.4) & (t <= 0.7))


def test_masked_scatters_losses_and_divides_by_the_full_batch() -> None:
    loss = torch.tensor([3.0, 5.0], requires_grad=True)
    found = align.masked(loss, torch.tensor([3, 0]), 4)
    assert found.tolist() == [5.0, 0.0, 0.0, 3.0]
    (grad,) = torch.autograd.grad(found.mean(), loss)
    assert grad.tolist() == [0.25, 0.25]


def test_masked_without_rows_is_zero() -> None:
    assert align.masked(torch.zeros(0), torch.zeros(0, dtype=torch.long), 3).tolist() == [0.0, 0.0, 0.0]


def test_released_mask_equals_the_broadcast_of_the_released_code() -> None:
    loss, inside = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, False, False])
    broadcast = inside.float().view(3, 1, 1, 1) * loss
    assert align.released_mask(loss, inside).mean().item() == pytest.approx(broadcast.mean().item())
    assert align.released_mask(loss, inside).mean() != (loss * inside).mean()


def linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize(
    ("head", "names"),
    [
        (align.projector(8, 16, 4), {"0", "2", "4"}),
        (align.sra_head(8), {"linear1", "linear2"}),
        (align.VelocityHead(8, 2, 3), {"linear"}),
    ],
    ids=["projector", "sra", "velocity"],
)
def test_heads_have_the_released_names_and_xavier_weights(head: nn.Module, names: set[str]) -> None:
    assert {key.rsplit(".", 1)[0] for key in head.state_dict()} == names
    for layer in linears(head):
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.7 * bound < layer.weight.abs().max() <= bound
        assert torch.all(layer.bias == 0)


def test_head_shapes() -> None:
    tokens = torch.randn(2, 16, 8)
    assert [(m.in_features, m.out_features) for m in linears(align.projector(8, 16, 4))] == [
        (8, 16),
        (16, 16),
        (16, 4),
    ]
    assert align.sra_head(8)(tokens).shape == (2, 16, 8)
    assert align.VelocityHead(8, 2, 3)(tokens).shape == (2, 3, 8, 8)


def test_the_velocity_head_normalises_and_unpatchifies_row_by_row() -> None:
    head = align.VelocityHead(4, 2, 1)
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(4))
    tokens = torch.randn(1, 4, 4)

    def image(scaled: Tensor) -> Tensor:
        normal = (scaled - scaled.mean(-1, keepdim=True)) / scaled.std(-1, correction=0, keepdim=True)
        top, bottom = (torch.cat([normal[0, i].view(2, 2), normal[0, i + 1].view(2, 2)], 1) for i in (0, 2))
        return torch.cat([top, bottom], 0)

    assert torch.allclose(head(tokens)[0, 0], image(tokens), atol=1e-4)
