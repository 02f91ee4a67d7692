"""Every registered backbone and recipe conforms, and every violation is found and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from stbench.core.backbone import Backbone, BackboneInfo, Features
from stbench.core.recipe import Artifact, Stage, Step, Supervision, Term
from stbench.core.registry import BACKBONES, OBJECTIVES, RECIPES, load_builtins, names
from stbench.models import layers
from stbench.testing import check_backbone, check_recipe
from tests.refusals import skip_if_refused

load_builtins()


@pytest.mark.parametrize("name", names(BACKBONES))
def test_every_backbone_conforms(name: str) -> None:
    check_backbone(name)


def sample() -> list[tuple[str, str, str]]:
    """(recipe, backbone, objective) such that each recipe, backbone and objective occurs at least once."""
    recipes, backbones, objectives = names(RECIPES), names(BACKBONES), names(OBJECTIVES)
    count = max(len(recipes), len(backbones), len(objectives))
    return [
        (recipes[k % len(recipes)], backbones[k % len(backbones)], objectives[k % len(objectives)])
        for k in range(count)
    ]


@pytest.mark.parametrize(("recipe", "backbone", "objective"), sample())
def test_a_sample_of_recipes_on_backbones_under_objectives(
    recipe: str, backbone: str, objective: str
) -> None:
    with skip_if_refused():
        check_recipe(recipe, backbone=backbone, objective=objective)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", names(RECIPES))
@pytest.mark.parametrize("objective", names(OBJECTIVES))
@pytest.mark.parametrize("backbone", names(BACKBONES))
def test_every_recipe_trains_on_every_backbone_under_every_objective(
    recipe: str, objective: str, backbone: str
) -> None:
    with skip_if_refused():
        check_recipe(recipe, backbone=backbone, objective=objective)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("self-flow", {"teacher": "per-group", "separation": "both", "distance": "cosine-released"}),
    ("self-flow", {"teacher": "same", "separation": "student", "labels": "dropped"}),
    ("self-flow", {"teacher": "min-released", "distance": "smooth-l1"}),
    ("haste", {"pairs": [[0, 1], [1, 2], [2, 2]]}),
    ("sra", {"distance": "cosine"}),
    ("sra", {"distance": "cosine-released"}),
    ("sra", {"time": "native"}),
    ("layersync", {"pairs": [[0, 2], [1, 3]]}),
    ("layersync", {"pairs": [[0, 2], [1, 3]], "several": "released"}),
    ("dispersive", {"setting": "pytorch"}),
    ("dispersive", {"scope": "gathered"}),
    ("repa", {"encoder": ["digits", "digits"]}),
    ("repa", {"structure": 0.5, "normalise": "spatial"}),
    ("irepa", {"kernel": 1, "stop": 2}),
    ("tread", {"on": "sara"}),
    ("vae-align", {"mask": "released"}),
    ("vae-align", {"mask": "inside-mean"}),
    ("deep-supervision", {"interval": [0.4, 0.7], "target": "x0", "loss": "smooth-l1"}),
    ("deep-supervision", {"head": "output", "interval": [0.4, 0.7]}),
    ("deep-supervision", {"head": "output", "target": "x0"}),
    ("vae-align", {"time": "native"}),
    ("self-transcendence", {"teacher": "vanilla"}),
    ("self-transcendence", {"mask": "released", "teacher_weights": "raw"}),
    ("self-transcendence", {"guidance": 1.0}),
    ("tread", {"route": [[0, 1, 0.25], [3, 4, 0.5]]}),
    ("tread", {"on": "self-transcendence"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "options"), VARIANTS)
def test_every_variant_trains(recipe: str, options: dict[str, Any]) -> None:
    check_recipe(recipe, backbone="dit", options=options)


class Small(Backbone):
    """A backbone of linear layers; `flaw` violates the interface in one way."""

    presets: ClassVar[dict[str, Any]] = {"ti/2": {}}

    def __init__(
        self, *, channels: int, input_size: int, classes: int, out_channels: int, size: str, flaw: str = ""
    ) -> None:
        super().__init__()
        self.flaw, self.out_channels = flaw, out_channels
        info = layers.make_info(
            "small",
            size,
            channels=channels,
            input_size=input_size,
            classes=classes,
            patch=2,
            width=8,
            depth=4,
        )
        self.info = replace(info, tokens=info.tokens + (flaw == "tokens"), depth=4 + (flaw == "depth"))
        self.patch, self.dropout = nn.Conv2d(channels, 8, 2, 2), nn.Dropout(0.1)
        self.label = nn.Embedding(classes + 1, 8)
        self.time = nn.Linear(1, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.BatchNorm1d(8)
        self.norm.requires_grad_(flaw == "batch norm")
        self.out = nn.Linear(8, 4 * out_channels)
        self.unused = nn.Parameter(torch.ones(1), requires_grad=flaw == "unused")
        if flaw == "seed":
            nn.init.normal_(self.out.weight, generator=torch.Generator().manual_seed(torch.seed() % 1000))

    def forward_intermediates(
        self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int] = (), stop_early: bool = False
    ) -> tuple[Tensor | None, Features]:
        if self.flaw == "drop" and self.training:
            y = torch.where(torch.rand(len(y)) < 0.1, self.info.classes, y)
        if self.flaw == "null":
            y = torch.where(y == self.info.classes, 0, y)
        if self.flaw == "in place":
            x.mul_(1.0)
            t.add_(0.001)
        time = self.time(t[:, None].float() * (self.flaw != "no time"))
        h = self.patch(x).flatten(2).transpose(1, 2) + (self.label(y) + time)[:, None]
        if self.flaw == "batch norm":
            h = self.norm(h.transpose(1, 2)).transpose(1, 2)
        late = self.flaw == "runs on" or not stop_early
        features: Features = {}
        for k, block in enumerate(self.blocks[: 4 if late else max(indices) + 1]):
            if k in indices and self.flaw == "off by one":
                features[k] = h if stop_early else block(h)
            h = h + block(h).tanh()
            if k in indices:
                features.setdefault(k, torch.cat([h, h[:, :1]], 1) if self.flaw == "prefix" else h)
        if stop_early:
            return None, features
        out = self.out(h)[..., : 4 * (self.out_channels - (self.flaw == "channels"))]
        return layers.unpatchify(out, 2, out.shape[-1] // 4), features


FLAWS = {
    "tokens": "info.tokens is 17, but patch 2 gives 16",
    "depth": "expected features of blocks",
    "seed": "two networks built from the same seed differ",
    "channels": "the prediction has shape",
    "prefix": "expected image tokens only",
    "off by one": "differ with stop_early",
    "drop": "the network draws random numbers",
    "batch norm": "train and eval mode give different predictions",
    "in place": "the network changes its inputs|the prediction depends on indices",
    "null": "the null label and class 0 give the same prediction",
    "no time": "the prediction does not depend on time",
    "unused": "no gradient reaches unused",
    "runs on": "stop_early saves nothing",
}


def test_a_factory_is_checked_like_a_name() -> None:
    check_backbone(partial(Small, size="custom"))


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_broken_backbone_is_named(flaw: str) -> None:
    with pytest.raises(AssertionError, match=FLAWS[flaw]):
        check_backbone(partial(Small, size="custom", flaw=flaw))


@dataclass
class Flawed(Supervision):
    """Regresses a frozen network's features; `flaw` violates the interface in one way."""

    teacher: Artifact
    flaw: str = ""

    @property
    def taps(self) -> Sequence[int]:
        return (1,)

    def setup(self, device: torch.device) -> None:
        self.network = self.teacher.load("ema")
        if self.flaw == "train mode":
            self.network.train()
        if self.flaw == "not frozen":
            self.network.requires_grad_(True)

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        heads = nn.ModuleDict({"head": nn.Linear(info.width, info.width)})
        if self.flaw == "idle head":
            heads["idle"] = nn.Linear(1, 1)
        return heads

    def terms(self, step: Step) -> Mapping[str, Term]:
        x, t, y = step.noised.x_t, step.noised.t, step.batch.y
        if self.flaw == "free teacher":
            target = self.network.features(x, t, y, indices=(2,))[2]
        else:
            target = step.teach(self.network, x, t, y, block=2)
        tokens = step.features[1]
        projected = step.heads["head"](tokens) if self.flaw == "free head" else step.project("head", tokens)
        if self.flaw == "random":
            target = target + torch.randn_like(target)
        if self.flaw == "changes":
            next(self.network.parameters()).data.add_(0.1)
        error = (projected - target).square().mean((1, 2))
        if self.flaw == "shape":
            error = error[:, None]
        if self.flaw == "nan":
            error = error / 0.0
        return {"flawed": Term(error.double() if self.flaw == "double" else error, 0.5)}


RECIPE_FLAWS = {
    "train mode": "a teacher is in train mode",
    "not frozen": "a teacher is not frozen",
    "idle head": "no gradient reaches idle.weight, idle.bias",
    "free teacher": "the FLOPs of its teacher are not counted: use step.teach",
    "free head": "the FLOPs of its heads are not counted: use step.project",
    "random": "draws from torch's global generator",
    "changes": "changes the weights of its teacher",
    "shape": r"term 'flawed' has shape \(16, 1\)",
    "nan": "term 'flawed' is not finite",
    "double": "term 'flawed' is torch.float64",
}


@pytest.fixture()
def flawed() -> Iterator[Callable[[str], None]]:
    def check(flaw: str) -> None:
        def recipe(info: BackboneInfo) -> Sequence[Stage]:
            first = RECIPES.module_dict["vanilla"](info)[0]
            return [first, Stage("flawed", lambda earlier: Flawed(earlier["vanilla"], flaw))]

        RECIPES.register_module(name="flawed", module=recipe, force=True)
        check_recipe("flawed", backbone="small")

    BACKBONES.register_module(name="small", module=Small)
    yield check
    del BACKBONES.module_dict["small"], RECIPES.module_dict["flawed"]


def test_a_sound_recipe_passes(flawed: Callable[[str], None]) -> None:
    flawed("")


@pytest.mark.parametrize("flaw", RECIPE_FLAWS)
def test_a_broken_recipe_is_named(flaw: str, flawed: Callable[[str], None]) -> None:
    with pytest.raises(AssertionError, match=RECIPE_FLAWS[flaw]):
        flawed(flaw)
