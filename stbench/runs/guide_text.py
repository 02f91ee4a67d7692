"""The text form of guides: `head:1.4@0-0.7+correction`, as options and curves contain it. Opens no file.

NAME[:SCALE][@LOW-HIGH], joined with + and applied in this order. NAME is a guide of the run's recipe, or
network=PATH for another network. A curve names that network instead of its path: network=NAME#SHA256.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stbench.core.errors import UserError
from stbench.core.limits import MAX_GUIDANCE, MAX_NAME
from stbench.core.safe_load import shown

NETWORK = "network"
"""Name of the guide that every run has: another network."""

_NUMBER = r"[0-9]{1,6}(?:\.[0-9]{1,12})?"
_TERM = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:=(?P<network>.+?))?"
    rf"(?::(?P<scale>{_NUMBER}))?(?:@(?P<low>{_NUMBER})-(?P<high>{_NUMBER}))?"
)


@dataclass(frozen=True)
class GuideTerm:
    """One guide as it was asked for."""

    name: str
    network: str = ""
    """Path of the other network, or its name and hash; "" for other guides."""
    scale: float | None = None
    """None for the guide's own scale."""
    interval: tuple[float, float] | None = None
    """Flow-equivalent times between which it is on; None for the guide's own."""

    def __str__(self) -> str:
        """Return the text form."""
        network = f"={self.network}" if self.network else ""
        scale = "" if self.scale is None else f":{_short(self.scale)}"
        interval = "" if self.interval is None else "@{}-{}".format(*map(_short, self.interval))
        return f"{self.name}{network}{scale}{interval}"

    @property
    def network_name(self) -> str:
        """The name of the other network in a curve, without the hash of its weights."""
        return self.network.partition("#")[0]


def _short(value: float) -> str:
    return f"{value:.12g}"


def parse_guides(text: str, option: str = "--guide ") -> tuple[GuideTerm, ...]:
    """Parse the text form of guides; "" is none.

    Raises UserError, which names `option`, for anything else.
    """
    if len(text) > MAX_NAME:
        raise UserError(f"{option.strip(' =')} must have at most {MAX_NAME} characters, got {len(text)}")
    terms = tuple(_parse(part, option) for part in text.split("+")) if text else ()
    names = [term.name for term in terms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"{option.strip(' =')} must name each guide once, got {twice[0]} {names.count(twice[0])} times; "
            f"evaluate other scales one by one"
        )
    return terms


def _parse(text: str, option: str) -> GuideTerm:
    found = _TERM.fullmatch(text)
    if found is None or bool(found["network"]) is not (found["name"] == NETWORK):
        raise UserError(
            f"{option.strip(' =')} must be NAME[:SCALE][@LOW-HIGH] or network=PATH:SCALE[@LOW-HIGH], several "
            f"joined with +, got {shown(text)}; for example {option}head:1.4@0-0.7"
        )
    term = GuideTerm(found["name"], found["network"] or "")
    if found["scale"]:
        term = replace(term, scale=float(found["scale"]))
        if not 1.0 <= float(found["scale"]) <= MAX_GUIDANCE:
            raise UserError(
                f"the scale of a guide must be between 1 and {MAX_GUIDANCE:g}, got {found['scale']} for "
                f"{term.name}; for example {option}{term.name}:1.4"
            )
    if found["low"]:
        low, high = float(found["low"]), float(found["high"])
        if not 0.0 <= low <= high <= 1.0:
            raise UserError(
                f"the interval of a guide must be LOW-HIGH with 0 <= LOW <= HIGH <= 1, got "
                f"{found['low']}-{found['high']} for {term.name}; for example {term.name}@0-0.7"
            )
        term = replace(term, interval=(low, high))
    return term


def format_guides(terms: Sequence[GuideTerm]) -> str:
    """Return the text form of guides."""
    return "+".join(map(str, terms))


def guiding_network(text: str) -> str:
    """Return the name of the network among the guides of a point of a curve; "" if there is none."""
    return next((term.network_name for term in parse_guides(text) if term.network), "")


def without_hash(text: str) -> str:
    """Return guides without the hashes of weights, which tell apart the seeds of a guiding network."""
    return format_guides([replace(term, network=term.network_name) for term in parse_guides(text)])


def without_network(text: str) -> str:
    """Return guides without the name of the network, which is in the name of the row."""
    return format_guides([replace(term, network="") for term in parse_guides(text)])


def file_name(text: str) -> str:
    """Return the name under which the samples of guides are stored."""
    name = re.sub(r"[^A-Za-z0-9._+]+", "_", text)
    return name if len(name) <= 100 else f"{name[:80]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def recorded_guides(value: object) -> str:
    """Check the guides of a record; TypeError or ValueError for anything but the text form."""
    if type(value) is not str:
        raise TypeError
    try:
        parse_guides(value)
    except UserError as error:
        raise ValueError from error
    return value
