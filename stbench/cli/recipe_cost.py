"""Training FLOPs of recipes with default options, relative to vanilla, for `stbench list recipes`."""

from __future__ import annotations

from functools import cache

COUNTED_ON = "sit-ti/2"
"""Backbone on which the overhead of a recipe is counted."""

COUNTED_IMAGES = 1024
"""Images that are counted."""


def relative_cost(recipe: str) -> str:
    """Return the FLOPs of the last stage of a recipe, and of all its stages, relative to vanilla."""
    costs = _stage_flops(recipe)
    if not costs:
        return "not counted"
    vanilla = sum(_stage_flops("vanilla"))
    with_teacher = f", {sum(costs) / vanilla:.2f} with its teacher" if len(costs) > 1 else ""
    return f"{costs[-1] / vanilla:.2f}{with_teacher}"


def extra_cost(recipe: str) -> str:
    """Return the FLOPs of all stages beyond those of vanilla in percent, as `stbench compare` does."""
    costs = _stage_flops(recipe)
    if not costs:
        return "-"
    extra = round(100 * (sum(costs) / sum(_stage_flops("vanilla")) - 1))
    return f"{extra:+d}%" if extra else "0%"


@cache
def _stage_flops(recipe: str) -> list[float]:
    """Training FLOPs of each stage with default options; [] for a plug-in that does not fit the network.

    Of two large batches, the first and one halfway, because a term may end. Counting takes the same time for
    any size, and samples are chosen at random.
    """
    from stbench.config.plan import prepare
    from stbench.config.resolve import RunRequest, resolve
    from stbench.core.errors import UserError
    from stbench.train.cost import expected_cost

    try:
        prepared = prepare(resolve(RunRequest(COUNTED_ON, recipe, overrides={"train.batch": COUNTED_IMAGES})))
        return [expected_cost(prepared, stage, draws=2).total for stage in prepared.stages]
    except (UserError, RuntimeError):  # RuntimeError: a plug-in that does not run on the meta device
        return []
