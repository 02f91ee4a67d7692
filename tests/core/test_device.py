"""Devices and floating-point precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stbench.core.device import arithmetic, pick_devices, upload
from stbench.core.errors import UserError

CPU = torch.device("cpu")


def test_arithmetic_restores_torchs_switches() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with arithmetic("tf32", CPU):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
    with arithmetic("bf16", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_devices_must_exist_and_be_of_one_type() -> None:
    assert pick_devices("cpu, cpu") == [CPU, CPU]
    with pytest.raises(UserError, match="cuda|of one (kind|type)"):
        pick_devices("cpu,cuda")


def test_upload_keeps_the_values_and_goes_through_pinned_memory_to_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(4, 2)
    assert upload(x, torch.device("cpu")) is x
    assert upload(x, torch.device("meta")).is_meta
    seen = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: seen.append("pinned") or self)
    monkeypatch.setattr(Tensor, "to", lambda self, *where, **options: seen.append(options) or self)
    assert torch.equal(upload(x, torch.device("cuda")), x)
    assert seen == ["pinned", {"non_blocking": True}]
