"""TREAD, token routing in training (arXiv 2501.04765; repository CompVis/tread).

In a route, some blocks process only some of the tokens. Any recipe can be trained this way. Sampling uses all
tokens in all blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stbench.core.backbone import BackboneInfo, Route
from stbench.core.device import upload
from stbench.core.errors import UserError
from stbench.core.guides import Guide, RouteGuide
from stbench.core.limits import MAX_ITEMS
from stbench.core.objective import Batch, Noised, Objective
from stbench.core.option_values import validate_options
from stbench.core.ranges import Block, FractionBelowOne, Name
from stbench.core.recipe import (
    Artifact,
    Stage,
    Step,
    Supervision,
    Term,
    computed,
    computed_defaults,
    effective_options,
    unset_fields,
)
from stbench.core.registry import RECIPES, lookup, plugin_hash
from stbench.models import align

OneRoute = tuple[Block, Block, FractionBelowOne]
Routes = OneRoute | Annotated[Sequence[OneRoute], Field(min_length=1, max_length=MAX_ITEMS)]


@dataclass
class Tread(Supervision):
    """The supervision of another recipe, with a student that drops tokens in its routes."""

    on: str
    """Name of the recipe."""
    inner: Supervision
    routes: Sequence[OneRoute]
    """0-based first and last block, and the share of the tokens that is dropped."""
    tokens: int
    """Image tokens N."""
    options: Mapping[str, Any]
    """Options of the recipe in the form that hashes contain."""

    @property
    def needs(self) -> str:
        """What the inner supervision needs."""
        return self.inner.needs

    @property
    def contents(self) -> Mapping[str, Any]:
        """All options of the recipe, with hashes in place of paths, and its file if it is a plug-in."""
        plugin = plugin_hash(lookup(RECIPES, self.on))
        return {"on": [self.on, plugin] if plugin else self.on, "on_options": self.options}

    @property
    def images(self) -> bool:
        """Whether the inner supervision needs the images."""
        return self.inner.images

    @property
    def taps(self) -> Sequence[int]:
        """The blocks of the inner supervision."""
        return self.inner.taps

    def require(self, objective: Objective) -> None:
        """Refuse what the inner supervision refuses."""
        self.inner.require(objective)

    def setup(self, device: torch.device) -> None:
        """Load the teachers of the inner supervision."""
        self.inner.setup(device)

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """The heads of the inner supervision."""
        return self.inner.heads(info)

    def corrupt(self, objective: Objective, batch: Batch) -> Noised:
        """Corrupt as the inner supervision does."""
        return self.inner.corrupt(objective, batch)

    def inputs(self, batch: Batch, noised: Noised) -> Mapping[str, Any]:
        """Draw the kept tokens of each sample and each route."""
        drawn = [batch.rng.normal(f"tread-{i}", (self.tokens,)) for i in range(len(self.routes))]
        return {"routes": self.routes_of(drawn, batch.x0.device)}

    def routes_of(self, draws: Sequence[Tensor], device: torch.device) -> tuple[Route, ...]:
        """Return the routes that keep the tokens with the smallest of the draws (B,N), one per route."""
        found = []
        for (start, end, rate), drawn in zip(self.routes, draws, strict=True):
            kept = drawn.argsort(1)[:, : self.tokens - int(self.tokens * rate)]
            found.append(Route(start, end, upload(kept, device)))
        return tuple(found)

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compute the terms of the inner supervision, inside a route on its kept tokens."""
        return self.inner.terms(step)


def published_route(info: BackboneInfo) -> OneRoute:
    """Return the default route.

    Published, 1-based: blocks 3 to 9 of B's 12, half of the tokens dropped. Other sizes use the same relative
    depths. A route of U-ViT ends as far from the last block as it starts from the first.
    """
    start = align.relative_block(info.depth, 3, 12)
    end = info.depth - 1 - start if info.name == "uvit" else align.relative_block(info.depth, 9, 12)
    return start, max(start, end), 0.5


@RECIPES.register_module(name="tread")
@computed_defaults
def tread(
    info: BackboneInfo,
    *,
    route: Routes = computed(lambda c: published_route(c.info)),
    on: Name = "vanilla",
    on_options: Mapping[str, Any] = {},
    guide_rates: tuple[FractionBelowOne, FractionBelowOne] = (0.3, 0.7),
    guide_labels: Literal["given", "released"] = "given",
) -> Sequence[Stage]:
    """Train a network that processes only some of the tokens in some of its blocks.

    With several stages, the last one is routed. A recipe that reads a block inside a route compares the kept
    tokens only; it is refused if its terms need all of them. Samples can be guided by dropping more tokens:
    `route`, or `route0`, `route1`, ... with several routes.

    route: [start,end,rate], 0-based first and last block and the share of dropped tokens; or a list of these.
      Published for B/2, 1-based: blocks 3 to 9 and rate 0.5; other sizes use the same relative depths.
    on: recipe whose supervision is used; its options are on_options.NAME.
    on_options: options of that recipe.
    guide_rates: shares of the tokens that the two predictions of the guide drop; 0.3 and 0.7 as published.
    guide_labels: `given`; or `released`, null labels in both predictions as in the released sampler.
    """
    info.require("route", "recipe 'tread'")
    routes = _listed(route, info)
    recipe = _other_recipe(on)
    given = validate_options(recipe, dict(on_options), "recipe.on_options", skip={"info"})
    options = effective_options(recipe, info, {name: given[name] for name in on_options})
    try:
        *earlier_stages, last = recipe(info, **options)
    except UserError as error:
        raise UserError(str(error).replace("recipe.", "recipe.on_options.")) from error

    def supervision(earlier: Mapping[str, Artifact]) -> Supervision:
        inner = last.supervision(earlier)
        require_fit(on, inner, routes)
        counted = {name: value for name, value in options.items() if name not in unset_fields(inner)}
        hashed = {name: inner.contents.get(name, value) for name, value in counted.items()}
        return Tread(on=on, inner=inner, routes=routes, tokens=info.tokens, options=hashed)

    guides = _guides(routes, guide_rates, guide_labels == "released")
    stage = replace(last, name="tread", supervision=supervision, guides={**last.guides, **guides})
    return [*earlier_stages, stage]


def _other_recipe(name: str) -> Any:
    """Return the recipe that `recipe.on` names. Raises UserError for an unknown name and for "tread"."""
    if name == "tread":
        raise UserError("recipe.on must be another recipe, got tread; give several routes with recipe.route")
    try:
        return lookup(RECIPES, name)
    except UserError as error:
        raise UserError(f"recipe.on: {error}") from error


def _listed(route: Routes, info: BackboneInfo) -> tuple[OneRoute, ...]:
    """Return the routes in order. Raises UserError if a block is missing or two routes overlap."""
    listed: Any = [route] if isinstance(route[0], int) else route
    routes: list[OneRoute] = sorted(tuple(one) for one in listed)
    for start, end, _ in routes:
        info.block("recipe.route", end)
        if start > end:
            raise UserError(f"recipe.route must be [start,end,rate] with start <= end, got {start} and {end}")
    for (_, end, _), (start, _, _) in pairwise(routes):
        if start <= end:
            raise UserError(f"routes must not share a block, got block {start} in two; change recipe.route")
    return tuple(routes)


def require_fit(on: str, inner: Supervision, routes: Sequence[OneRoute]) -> None:
    """Raise UserError if the supervision cannot be computed on the kept tokens of these routes."""
    if type(inner).inputs is not Supervision.inputs:
        raise UserError(f"recipe.on={on} changes the attention, which routes cannot; use --recipe {on}")
    inside = {tap: i for tap in inner.taps for i, (a, b, _) in enumerate(routes) if a <= tap <= b}
    if inside and not inner.takes_subsets:
        raise UserError(
            f"recipe.on={on} needs all tokens of block {min(inside)}, which is inside a route; change the "
            f"block with recipe.on_options, or recipe.route"
        )
    if len(set(inside.values())) > 1:
        raise UserError(
            f"recipe.on={on} reads blocks of different routes, which have no tokens in common; "
            f"change recipe.route"
        )


def _guides(routes: Sequence[OneRoute], rates: tuple[float, float], null_labels: bool) -> Mapping[str, Guide]:
    """The guides of the routes."""
    names = ["route"] if len(routes) == 1 else [f"route{i}" for i in range(len(routes))]
    return {
        name: RouteGuide(start, end, *rates, scale=1.5, null_labels=null_labels)
        for name, (start, end, _) in zip(names, routes, strict=True)
    }
