"""The measures of representations on cases with known answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stbench.inspect import formulas


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(draws(width, width, seed=9))[0]


def test_cka_is_one_for_a_rotated_scaled_and_shifted_copy() -> None:
    x = draws(40, 6)
    assert formulas.linear_cka(x, 3.0 * x @ rotation(6) + 5.0) == pytest.approx(1.0)


def test_cka_of_uncorrelated_columns_is_zero_and_of_half_the_variance_is_known() -> None:
    # Orthonormal centred columns u, v, w: X=[u v], Y=[u w] share one of two directions.
    u, v, w = torch.linalg.qr((z := draws(30, 3)) - z.mean(0))[0].T
    assert formulas.linear_cka(u[:, None], v[:, None]) == pytest.approx(0.0, abs=1e-12)
    x, y = torch.stack([u, v], 1), torch.stack([u, w], 1)
    assert formulas.linear_cka(x, y) == pytest.approx(0.5)


def test_cka_of_a_constant_is_undefined() -> None:
    assert math.isnan(formulas.linear_cka(torch.ones(9, 2), draws(9, 2)))


def test_cknna_is_one_for_a_rotated_copy_and_near_zero_for_independent_features() -> None:
    x = draws(200, 8)
    assert formulas.cknna(x, 2.0 * x @ rotation(8)) == pytest.approx(1.0)
    assert abs(formulas.cknna(x, draws(200, 8, seed=1))) < 0.1


def test_cknna_with_all_neighbours_is_unbiased_cka() -> None:
    x, y = draws(12, 5), draws(12, 4, seed=1)
    unit = [z / z.norm(dim=1, keepdim=True) for z in (x, y)]
    k, m = (z @ z.T for z in unit)
    hsic = formulas.unbiased_hsic
    expected = hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()
    assert formulas.cknna(x, y, k=11) == pytest.approx(float(expected))


def test_unbiased_hsic_by_hand() -> None:
    # The mean of k_ij (m_ij + m_qr - 2 m_iq) over all tuples of four different images.
    k, m = ((z + z.T) for z in (draws(5, 5), draws(5, 5, seed=1)))
    total, count = 0.0, 0
    for i in range(5):
        for j in range(5):
            for q in range(5):
                for r in range(5):
                    if len({i, j, q, r}) == 4:
                        total += float(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]))
                        count += 1
    assert float(formulas.unbiased_hsic(k, m)) == pytest.approx(total / count)


@pytest.mark.parametrize(("count", "k"), [(3, 2), (10, 1), (10, 10)])
def test_cknna_refuses_too_few_images_or_neighbours(count: int, k: int) -> None:
    with pytest.raises(ValueError, match="found"):
        formulas.cknna(draws(count, 2), draws(count, 2), k=k)


def test_effective_rank_of_equal_one_and_mixed_singular_values() -> None:
    assert formulas.effective_rank(torch.eye(7)) == pytest.approx(7.0)
    assert formulas.effective_rank(torch.diag(torch.tensor([4.0, 0.0, 0.0]))) == pytest.approx(1.0)
    # Singular values 3 and 1: p = 3/4, 1/4.
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert formulas.effective_rank(torch.diag(torch.tensor([9.0, 1.0]))) == pytest.approx(math.exp(entropy))
    assert math.isnan(formulas.effective_rank(torch.zeros(3, 3)))


def test_class_separation_by_hand() -> None:
    # Class means 0 and 4, each image 1 away from its mean: between 4*4, within 4*1.
    x = torch.tensor([[-1.0], [1.0], [3.0], [5.0]])
    assert formulas.class_separation(x, torch.tensor([7, 7, 2, 2])) == pytest.approx(4.0)
    assert math.isnan(formulas.class_separation(x, torch.arange(4)))


def test_probe_is_perfect_on_separable_classes_and_at_chance_on_noise() -> None:
    labels = torch.arange(200) % 4
    x = torch.eye(4, dtype=torch.float64)[labels] + 0.05 * draws(200, 4)
    found = formulas.linear_probe(x[:100], labels[:100], x[100:], labels[100:], 4)
    assert (found.accuracy, found.error) == (1.0, 0.0)
    noise = formulas.linear_probe(
        draws(400, 3), torch.arange(400) % 4, draws(400, 3, seed=1), labels.repeat(2), 4
    )
    assert abs(noise.accuracy - 0.25) < 0.08
    assert noise.error == pytest.approx(math.sqrt(noise.accuracy * (1 - noise.accuracy) / 400))


def test_probe_agrees_with_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    labels = torch.arange(300) % 5
    x = draws(5, 12, seed=3)[labels] + 1.5 * draws(300, 12)
    train, test = x[:200], x[200:]
    mean, std = train.mean(0), train.std(0)
    a, b = ((z - mean) / std for z in (train, test))
    model = linear_model.LogisticRegression(C=1.0, max_iter=2000, tol=1e-8).fit(
        a.numpy(), labels[:200].numpy()
    )
    found = formulas.linear_probe(train, labels[:200], test, labels[200:], 5)
    assert found.accuracy == pytest.approx(model.score(b.numpy(), labels[200:].numpy()), abs=0.011)
    assert found.train_accuracy == pytest.approx(model.score(a.numpy(), labels[:200].numpy()), abs=0.006)


def test_pca_colours_follow_the_first_component_and_stay_in_range() -> None:
    line = torch.linspace(0, 1, 50, dtype=torch.float64)
    tokens = (line[:, None] * torch.tensor([3.0, 0.0, 0.1, 0.0])).view(2, 25, 4) + 1e-3 * draws(2, 25, 4)
    colours = formulas.pca_rgb(tokens)
    assert colours.shape == (2, 25, 3)
    assert float(colours.min()) >= 0.0 and float(colours.max()) <= 1.0
    first = colours[..., 0].flatten()
    assert torch.corrcoef(torch.stack([first, line]))[0, 1] > 0.99  # the largest weight is positive
    assert formulas.pca_rgb(draws(1, 9, 2))[..., 2].eq(0.5).all()
