"""The guides of a run: what was asked for, completed with what the stage declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from stbench.core.errors import UserError
from stbench.core.files import absolute_path
from stbench.core.guides import Guide, WeakGuide
from stbench.runs.guide_text import NETWORK, GuideTerm, format_guides, parse_guides

WHOLE = (0.0, 1.0)


def complete_guides(text: str, declared: Mapping[str, Guide], option: str = "--guide ") -> str:
    """Return the text of guides with the scales and intervals that are used, and absolute paths.

    `declared` are the guides of the stage by name; see `Stage.guides`. Raises UserError, which names
    `option`, for an unknown guide, or a scale that is missing or not taken.
    """
    return format_guides([_complete(term, declared, option) for term in parse_guides(text, option)])


def _complete(term: GuideTerm, declared: Mapping[str, Guide], option: str) -> GuideTerm:
    if term.name == NETWORK:
        if term.scale is None:
            raise UserError(
                f"guidance by another network must have a scale, got {term}; for example {option}{term}:1.5"
            )
        interval = None if term.interval == WHOLE else term.interval
        return replace(term, network=str(absolute_path(term.network)), interval=interval)
    if term.name not in declared:
        names = ", ".join([*declared, "network=PATH"])
        raise UserError(
            f"{option.strip(' =')} must name a guide of the run's recipe, got '{term.name}'; "
            f"choose from: {names}"
        )
    guide = declared[term.name]
    if not isinstance(guide, WeakGuide) and term.scale is not None:
        raise UserError(f"the guide '{term.name}' takes no scale, got {term}; for example {term.name}@0-0.7")
    scale = (term.scale or guide.scale) if isinstance(guide, WeakGuide) else None
    own = (guide.low, guide.high)
    interval = term.interval or own
    return replace(term, scale=scale, interval=None if interval == own == WHOLE else interval)


def build_guide(term: GuideTerm, declared: Guide) -> Guide:
    """Return a declared guide with the scale and interval of a completed term."""
    low, high = term.interval or WHOLE
    if isinstance(declared, WeakGuide) and term.scale is not None:
        return replace(declared, scale=term.scale, low=low, high=high)
    return replace(declared, low=low, high=high)
