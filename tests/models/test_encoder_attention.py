"""Attention logits of frozen encoders: equal to the attention they compute, patches only, counted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from stbench.core.errors import UserError
from stbench.data.dataset import get_dataset
from stbench.models import encoders
from stbench.models.encoder_attention import flops_with_logits, layers_of, tokens_and_logits
from tests.weights import cache_digits, random_vit

CPU = torch.device("cpu")


def digits_encoder() -> tuple[encoders.ImageEncoder, Tensor]:
    encoder = encoders.open_encoder(encoders.find_encoder("digits"), 16, CPU)
    assert isinstance(encoder, encoders.ImageEncoder)
    return encoder, get_dataset("digits").images(torch.arange(4))


def attention_of(network: Any, layer: int, call: Any) -> Tensor:
    """The attention (B,heads,tokens,tokens) that one layer of a timm model applies, found by unfusing it."""
    attention, found = network.blocks[layer].attn, []
    attention.fused_attn = False
    hook = attention.attn_drop.register_forward_hook(lambda module, inputs, output: found.append(output))
    call()
    hook.remove()
    attention.fused_attn = True
    return found[0]


def test_the_softmax_of_the_logits_is_the_attention_between_patches() -> None:
    encoder, images = digits_encoder()
    with torch.no_grad():
        tokens, *logits = tokens_and_logits(encoder, images, [0, 2])
        assert torch.equal(tokens, encoder.tokens(images))
        for layer, found in zip((0, 2), logits, strict=True):
            assert found.shape == (4, 3, 16, 16)
            prefix = encoder.network.num_prefix_tokens
            whole = attention_of(encoder.network, layer, lambda: encoder.tokens(images))
            among_patches = whole[:, :, prefix:, prefix:]
            expected = among_patches / among_patches.sum(-1, keepdim=True)
            torch.testing.assert_close(found.softmax(-1), expected, atol=1e-5, rtol=0)


def test_class_and_register_tokens_are_left_out(tmp_path: Path) -> None:
    spec = encoders.find_encoder("vit_tiny_patch16_224", random_vit(tmp_path / "vit.safetensors"))
    encoder = encoders.open_encoder(spec, 16, CPU)
    assert isinstance(encoder, encoders.ImageEncoder)
    images = get_dataset("digits").images(torch.arange(2))
    with torch.no_grad():
        tokens, logits = tokens_and_logits(encoder, images, [11])
        whole = attention_of(encoder.network, 11, lambda: encoder.tokens(images))
    assert tokens.shape == (2, 16, 192) and whole.shape == (2, 3, 17, 17)
    among_patches = whole[:, :, 1:, 1:]
    expected = among_patches / among_patches.sum(-1, keepdim=True)
    torch.testing.assert_close(logits.softmax(-1), expected, atol=1e-5, rtol=0)


def test_flops_contain_the_logits() -> None:
    encoder, _ = digits_encoder()
    width, tokens = encoder.spec.width, 16
    assert flops_with_logits(encoder, [1]) - encoder.flops == 2 * tokens**2 * width
    assert flops_with_logits(encoder, [0, 2]) - encoder.flops == 2 * 2 * tokens**2 * width
    assert not any(module._forward_hooks for module in encoder.network.modules())


def test_the_number_of_layers_is_known_without_weights() -> None:
    assert layers_of(encoders.find_encoder("digits")) == 3
    assert layers_of(encoders.find_encoder("vit_base_patch14_dinov2.lvd142m")) == 12


def test_encoders_without_logits_are_refused(tmp_path: Path) -> None:
    cache_digits(tmp_path / "tokens")
    with pytest.raises(UserError, match=r"cached tokens of digits contain no attention logits.*encoder=digi"):
        layers_of(encoders.find_encoder(str(tmp_path / "tokens")))
    name = "eva02_tiny_patch14_224"
    assert name in timm.list_models("eva02_tiny*")
    with pytest.raises(UserError, match="the attention logits of encoder 'eva02_tiny_patch14_224' cannot be"):
        layers_of(encoders.find_encoder(name))


def test_the_scale_is_that_of_the_head_width() -> None:
    encoder, images = digits_encoder()
    attention = encoder.network.blocks[1].attn
    inputs: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with torch.no_grad():
        _, found = tokens_and_logits(encoder, images, [1])
        q, k, _ = attention.qkv(inputs[0]).chunk(3, -1)
    hook.remove()
    first = slice(0, 32)  # the first of three heads of width 32
    expected = q[:, -16:, first] @ k[:, -16:, first].mT / math.sqrt(32)
    torch.testing.assert_close(found[:, 0], expected, atol=1e-5, rtol=1e-5)
