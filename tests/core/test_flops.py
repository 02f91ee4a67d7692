"""FLOP counts of modules, two per multiply-add."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import nn

from stbench.core.flops import count, forward_flops


def linear_flops(module: nn.Module, rows: int) -> int:
    return forward_flops(module, lambda m: m(torch.empty(rows, 8, device="meta")), ("rows", rows))


def test_a_matrix_product_costs_two_flops_per_multiply_add() -> None:
    assert linear_flops(nn.Linear(8, 5), rows=3) == 2 * 3 * 8 * 5


def test_attention_is_counted() -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q)

    q = torch.empty(1, 2, 16, 4, device="meta")
    assert forward_flops(Attention(), lambda m: m(q), ()) == 2 * (2 * 2 * 16 * 16 * 4)


def test_backward_costs_twice_the_forward() -> None:
    layer, x = nn.Linear(8, 5), torch.randn(3, 8, requires_grad=True)
    assert count(lambda: layer(x).sum().backward()) == 3 * linear_flops(layer, rows=3)


def test_the_module_is_neither_moved_nor_called() -> None:
    layer = nn.Linear(8, 5)
    called: list[nn.Module] = []
    layer.register_forward_hook(lambda module, *_: called.append(module))
    linear_flops(layer, rows=3)
    assert layer.weight.device.type == "cpu"
    assert called and called[0] is not layer


def test_counts_are_cached_by_module_and_key() -> None:
    layer = nn.Linear(8, 5)
    assert linear_flops(layer, rows=3) == linear_flops(layer, rows=3) == 240
    assert linear_flops(layer, rows=1) == 80
    assert forward_flops(layer, lambda m: 1 / 0, ("rows", 3)) == 240


def test_the_cache_does_not_keep_a_module_alive() -> None:
    layer = nn.Linear(8, 5)
    linear_flops(layer, rows=3)
    reference = weakref.ref(layer)
    del layer
    gc.collect()
    assert reference() is None


class Repeated(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(8, 8), times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = self.layer(x)
        return x


def test_modules_of_one_structure_share_a_count() -> None:
    assert linear_flops(Repeated(2), rows=3) == 2 * 2 * 3 * 8 * 8
    assert forward_flops(Repeated(2), lambda m: 1 / 0, ("rows", 3)) == 2 * 2 * 3 * 8 * 8


def test_modules_that_differ_in_an_attribute_are_counted_apart() -> None:
    assert [linear_flops(Repeated(times), rows=3) // (2 * 3 * 8 * 8) for times in (1, 4)] == [1, 4]


def test_a_module_with_a_function_as_attribute_is_counted_alone() -> None:
    class Applied(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.function(x)

    once, twice = nn.Linear(8, 8, device="meta"), nn.Linear(8, 16, device="meta")
    counts = [linear_flops(Applied(layer.forward), rows=3) for layer in (once, twice)]
    assert counts == [2 * 3 * 8 * 8, 2 * 3 * 8 * 16]
