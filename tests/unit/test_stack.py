"""The order in which things come back, and the longest way through it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ops_platform.drills.stack import advice, critical_path, needed_by
from ops_platform.drills.steps.stack import in_turn
from ops_platform.errors import InventoryError, OpsError
from ops_platform.inventory import load
from tests.remediation_rig import inventory_body


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[str, list[str]], dict[str, float]]:
    """Each may need some of those before it; the last one needs what is left over, too."""
    names = [f"n{number}" for number in range(draw(st.integers(1, 6)))]
    needs = {
        name: draw(st.lists(st.sampled_from(names[:at]), unique=True)) if at else [] for at, name in enumerate(names)
    }
    return needs, {name: draw(st.integers(0, 50)) / 2 for name in names}


@given(graphs())
def test_whatever_is_needed_comes_first_and_the_path_is_the_longest_of_all(
    made: tuple[dict[str, list[str]], dict[str, float]],
) -> None:
    needs, seconds = made
    subject = list(needs)[-1]
    order = needed_by(subject, needs)
    assert order[-1] == subject
    assert all(order.index(need) < order.index(name) for name in order for need in needs[name])
    way = critical_path(order, needs, seconds)
    assert way.seconds == max(sum(seconds[name] for name in one) for one in _ways(order, needs))
    assert sum(seconds[name] for name in way.path) == way.seconds
    for name, gain in way.gains.items():
        assert way.seconds - gain == critical_path(order, needs, {**seconds, name: 0.0}).seconds
        assert 0 <= gain <= seconds[name]


def _ways(order: list[str], needs: Mapping[str, list[str]]) -> list[list[str]]:
    """Every chain of the graph, by trying."""
    found = [[name] for name in order]
    for size in range(2, len(order) + 1):
        for chain in permutations(order, size):
            if all(chain[at] in needs[chain[at + 1]] for at in range(size - 1)):
                found.append(list(chain))
    return found


def test_it_says_what_to_make_faster() -> None:
    needs = {"vault": [], "db": ["vault"], "cache": [], "shop": ["db", "cache"]}
    way = critical_path(needed_by("shop", needs), needs, {"vault": 10, "db": 100, "cache": 60, "shop": 5})
    assert way.path == ("vault", "db", "shop")
    assert dict(way.gains) == {"vault": 10, "db": 50, "shop": 5}
    assert "it has to be 15 s shorter, and db alone could make up for it" in advice(way, 100)
    assert "no single one of them" in advice(way, 10)
    assert "1 min 25 s are left" in advice(way, 200)


def test_a_circle_of_dependencies_is_named(tmp_path: Path) -> None:
    file = tmp_path / "platform.yaml"
    body = inventory_body([])
    first, second = body["systems"][:2]
    first["depends_on"], second["depends_on"] = [second["id"]], [first["id"]]
    file.write_text(yaml.safe_dump(body))
    with pytest.raises(InventoryError, match=rf"circle: {first['id']} → {second['id']} → {first['id']}"):
        load(file)
    second["depends_on"] = ["nobody"]
    file.write_text(yaml.safe_dump(body))
    with pytest.raises(InventoryError, match="there is no target or system 'nobody'"):
        load(file)


def test_a_chain_of_thousands_is_followed_and_each_circle_named_once(tmp_path: Path) -> None:
    file = tmp_path / "platform.yaml"
    body = inventory_body([])
    one = body["systems"][0]
    body["systems"] = [{**one, "id": f"s{n}", "depends_on": [f"s{n + 1}"] if n < 2999 else []} for n in range(3000)]
    file.write_text(yaml.safe_dump(body))
    assert len(load(file).inventory.systems) == 3000
    for last, first in ((1, 0), (2999, 2998)):
        body["systems"][last]["depends_on"] = [f"s{first}"]
    file.write_text(yaml.safe_dump(body))
    with pytest.raises(InventoryError) as refused:
        load(file)
    said = str(refused.value)
    assert (said.count("circle:"), "circle: s0 → s1 → s0" in said, "circle: s2998 → s2999 → s2998" in said) == (
        2,
        True,
        True,
    )


def test_what_needs_nothing_of_another_is_done_side_by_side_and_the_rest_in_turn() -> None:
    together, log = threading.Barrier(2), list[str]()

    def work(name: str) -> str:
        if name in ("db", "cache"):
            together.wait(60)  # one alone would wait for the other for ever
        log.append(name)
        return name.upper()

    needs = {"vault": [], "db": ["vault"], "cache": ["vault"], "shop": ["db", "cache"]}
    assert in_turn(needs, 2, work) == {name: name.upper() for name in needs}
    assert (log[0], log[-1]) == ("vault", "shop")


def test_no_more_are_done_at_once_than_may_be() -> None:
    busy, most = list[str](), list[int]()

    def work(name: str) -> None:
        busy.append(name)
        most.append(len(busy))
        busy.remove(name)

    in_turn({name: [] for name in "abcdef"}, 1, work)
    assert most == [1] * 6


def test_one_that_raises_lets_the_others_end_and_no_other_begin() -> None:
    begun, raised = list[str](), threading.Event()

    def work(name: str) -> None:
        begun.append(name)
        if name == "a":
            raised.set()
            raise OpsError("it broke")
        assert raised.wait(60)
        begun.append(f"{name} ended")

    with pytest.raises(OpsError, match="it broke"):
        in_turn({"a": [], "b": [], "d": ["a"]}, 2, work)
    assert "b ended" in begun
    assert "d" not in begun
