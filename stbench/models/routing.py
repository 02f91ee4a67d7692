"""Routes of a forward pass: consecutive blocks that process only some of the tokens.

Shapes are listed in `stbench.core.backbone`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from stbench.core.backbone import BackboneInfo, Route


class Routing:
    """The routes of one forward pass. Call `enter` before each block and `leave` after it, in order."""

    def __init__(self, info: BackboneInfo, routes: Sequence[Route], *, before: int = 0) -> None:
        """`before` tokens, which are in every route, precede those of the image.

        Raises ValueError for routes that overlap, are not in order, or name a block that does not exist.
        """
        _check_routes(info, routes)
        self._starts = {route.start: route for route in routes}
        self._ends = {route.end for route in routes}
        self._before = before
        self._inside: tuple[Tensor, Tensor] | None = None  # all tokens, and the indices of the kept ones

    def enter(self, block: int, tokens: Tensor) -> Tensor:
        """Return the tokens (B,n,D) that a block processes, given those (B,N,D) after the one before it."""
        if block in self._starts:
            self._inside = tokens, self._places(self._starts[block].kept)
            return gather_tokens(*self._inside)
        return tokens

    def leave(self, block: int, tokens: Tensor) -> Tensor:
        """Return all tokens (B,N,D) after the last block of a route, and `tokens` after other blocks."""
        if self._inside is None or block not in self._ends:
            return tokens
        (whole, places), self._inside = self._inside, None
        return scatter_tokens(whole, places, tokens)

    def of_tokens(self, condition: Tensor) -> Tensor:
        """Return a condition (B,D) itself, or that (B,n,D) of the tokens that the next block processes."""
        if self._inside is None or condition.ndim == 2:
            return condition
        return gather_tokens(condition, self._inside[1])

    def kept(self, blocks: Sequence[int]) -> dict[int, Tensor]:
        """Return the indices (B,n) of the image tokens in those of the blocks that are inside a route."""
        routes = self._starts.values()
        return {k: r.kept for r in routes for k in range(r.start, r.end + 1) if k in blocks}

    def _places(self, kept: Tensor) -> Tensor:
        """Return the indices (B,b+n) of all tokens in a route."""
        if not self._before:
            return kept
        before = torch.arange(self._before, device=kept.device).expand(len(kept), -1)
        return torch.cat([before, kept + self._before], dim=1)


def gather_tokens(tokens: Tensor, kept: Tensor) -> Tensor:
    """Select the tokens `kept` (B,n) of tokens (B,N,D); returns (B,n,D)."""
    return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))


def scatter_tokens(tokens: Tensor, kept: Tensor, values: Tensor) -> Tensor:
    """Replace the tokens `kept` (B,n) of tokens (B,N,D) by `values` (B,n,D)."""
    return tokens.scatter(1, kept[..., None].expand(-1, -1, tokens.shape[-1]), values.to(tokens.dtype))


def _check_routes(info: BackboneInfo, routes: Sequence[Route]) -> None:
    """Raise ValueError for routes that overlap, are not in order, or name a block that does not exist."""
    bounds = [-1, *(k for route in routes for k in (route.start, route.end)), info.depth]
    inner = list(pairwise(bounds))
    ordered = all(a < b for a, b in inner[::2]) and all(a <= b for a, b in inner[1::2])
    if not ordered:
        raise ValueError(f"routes must be disjoint, in order and within blocks 0..{info.depth - 1}")
