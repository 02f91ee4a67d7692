"""Golden checks of token routing: training with routes, and guidance by routes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from stbench.core.backbone import Backbone, Route
from stbench.core.recipe import NoSupervision
from stbench.diffusion import LinearFlow
from stbench.recipes.tread import Tread
from stbench.testing.golden.baseline_losses import dropped
from stbench.testing.golden.guides import routed_sampler
from stbench.testing.golden.objectives import TOLERANCE, network, tolerated
from stbench.testing.golden.run import Check, Golden, check

EDM_LOCATION, EDM_SCALE, EDM_DATA = -1.2, 1.2, 0.5
"""Mean and standard deviation of ln sigma, and the standard deviation of the data (Karras et al., 2022)."""


def routed(net: Backbone, routes: Sequence[Sequence[float]]) -> Tread:
    """TREAD with routes given by 1-based blocks and the share of dropped tokens."""
    moved = tuple((int(start) - 1, int(end) - 1, rate) for start, end, rate in routes)
    return Tread(on="vanilla", inner=NoSupervision(), routes=moved, tokens=net.info.tokens, options={})


@check("forward_tread")
def tread(golden: Golden) -> Iterator[Check]:
    """Check the loss with one route, the features inside, two routes, EDM's loss, and guidance by routes."""
    settings, (net, _), t = golden.meta["settings"], network(golden), golden.t
    y, objective = dropped(golden, net.info.classes), LinearFlow()
    noised = objective.at(t["in/x0"], t["in/noise"], t["in/t"].double())
    one = routed(net, [(settings["start_block"], settings["end_block"], settings["drop_rate"])])
    several = routed(net, settings["multi"])

    (drawn,) = one.routes_of([t["in/route_u"]], noised.x_t.device)
    kept = t["mid/ids_keep"]
    yield Check("kept", abs(drawn.kept.shape[1] - settings["kept"]), 0.0)
    yield golden.compare("mid/ids_keep", drawn.kept.sort(1)[0], kept.sort(1)[0], 0.0)

    after: list[Tensor] = []
    following = [*net.repeated_blocks(), net.get_submodule("final_layer")][drawn.end + 1]
    hook = following.register_forward_pre_hook(lambda _module, inputs: after.append(inputs[0]))
    in_order = Route(drawn.start, drawn.end, kept)
    output = net.run(noised.x_t, noised.t, y, indices=range(net.info.depth), routes=(in_order,))
    hook.remove()
    both = several.routes_of(list(t["multi/route_u"]), noised.x_t.device)
    assert output.prediction is not None
    found = {
        "mid/x_t": noised.x_t,
        "mid/target": objective.velocity_target(noised),
        "mid/pred": output.prediction,
        "mid/restored": after[0],
        "out/denoise": objective.loss(output.prediction, noised),
        "out/eval": net(noised.x_t, noised.t, y),
        "multi/out": net.run(noised.x_t, noised.t, y, routes=both).prediction,
    }
    found |= {f"feat/block_{block + 1:02}": tokens for block, tokens in output.features.items()}
    yield from tolerated(golden, found)
    yield from _edm(golden, net, one, y)
    yield from routed_sampler(golden)


def _edm(golden: Golden, net: Backbone, supervision: Tread, y: Tensor) -> Iterator[Check]:
    """Check the routed forward pass under EDM's preconditioning, which is not an objective of stbench."""
    t, x0 = golden.t, golden.t["in/x0"]
    logarithm = EDM_SCALE * t["edm/in_normal"].double() + EDM_LOCATION
    sigma, data = logarithm.exp().view(-1, 1, 1, 1), EDM_DATA
    noised, total = x0 + sigma * t["edm/in_noise"], sigma**2 + data**2
    routes = supervision.routes_of([t["edm/in_route_u"]], x0.device)
    out = net.run((noised / total.sqrt()).float(), logarithm / 4, y, routes=routes).prediction
    assert out is not None
    denoised = data**2 / total * noised + sigma * data / total.sqrt() * out
    loss = (total / (sigma * data) ** 2 * (denoised - x0).square()).flatten(1).mean(1)
    yield from tolerated(golden, {"edm/denoised": denoised, "edm/loss": loss}, TOLERANCE)
