"""What depends on what, in which order it comes back, and how long that takes at the least. Pure.

The critical path is the longest way through the dependencies, each with the time of its own restore: were everything restored as soon as
all that it needs serves, side by side, the whole would take as long as that way, and nothing that is off it would make it shorter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ops_platform.counting import duration

_TOLD = 0.05  # seconds; what gains less is not worth a word


def needed_by(subject: str, needs: Mapping[str, Sequence[str]]) -> list[str]:
    """The subject and all that it depends on, whatever is needed before what needs it, and else by name. `needs` has no cycle."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name not in order:
            for need in sorted(needs.get(name, ())):
                visit(need)
            order.append(name)

    visit(subject)
    return order


@dataclass(frozen=True)
class Way:
    """`starts`: when each could begin, in seconds. `gains`: by how much the whole would be shorter if that one took no time."""

    path: tuple[str, ...]
    seconds: float
    starts: Mapping[str, float]
    gains: Mapping[str, float]


def critical_path(order: Sequence[str], needs: Mapping[str, Sequence[str]], seconds: Mapping[str, float]) -> Way:
    """Of `order` (see `needed_by`) with the seconds of each; one without any counts as none."""
    path, whole, starts = _longest(order, needs, seconds)
    gains = {name: whole - _longest(order, needs, {**seconds, name: 0.0})[1] for name in path}
    return Way(path, whole, starts, gains)


def _longest(
    order: Sequence[str], needs: Mapping[str, Sequence[str]], seconds: Mapping[str, float]
) -> tuple[tuple[str, ...], float, dict[str, float]]:
    ends: dict[str, float] = {}
    before: dict[str, str | None] = {}
    for name in order:
        last = max((need for need in needs.get(name, ()) if need in ends), key=lambda need: ends[need], default=None)
        before[name] = last
        ends[name] = (ends[last] if last is not None else 0.0) + seconds.get(name, 0.0)
    here: str | None = max(order, key=lambda name: ends[name], default=None)
    whole, path = (ends[here] if here is not None else 0.0), list[str]()
    while here is not None:
        path.append(here)
        here = before[here]
    return tuple(reversed(path)), whole, {name: ends[name] - seconds.get(name, 0.0) for name in order}


def advice(way: Way, objective: float | None) -> str:
    """What to make faster, in words."""
    if not way.path or not way.seconds:
        return "nothing was measured"
    ranked = sorted(way.gains.items(), key=lambda item: -item[1])
    told = [one for one in ranked[:3] if one[1] >= _TOLD] or ranked[:1]
    first = "; ".join(f"{name}: at most {duration(gain)} shorter" for name, gain in told)
    said = f"{' → '.join(way.path)} takes {duration(way.seconds)}"
    if objective is None:
        return f"{said}. Make faster first: {first}"
    over = way.seconds - objective
    if over <= 0:
        return f"{said}, {duration(objective)} are allowed, {duration(-over)} are left. Make faster first, were it to grow: {first}"
    enough = next((name for name, gain in ranked if gain >= over), None)
    which = f"{enough} alone could make up for it" if enough else "no single one of them makes up for it"
    return f"{said}, {duration(objective)} are allowed: it has to be {duration(over)} shorter, and {which}. Make faster first: {first}"
