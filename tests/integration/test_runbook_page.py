"""The runbook and the step of the how-to, as they stand on the page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import yaml

from ops_platform.clients.access import Access
from ops_platform.drills import registry
from ops_platform.drills.begin import check_plans
from ops_platform.drills.loader import read
from ops_platform.drills.model import StepState
from ops_platform.drills.registry import doings
from ops_platform.drills.scorecard import card_of
from ops_platform.errors import OpsError
from ops_platform.inventory import load
from tests.drill_rig import Bench
from tests.integration.test_how_tos import blocks
from tests.rig import Cluster

RUNBOOK, DECLARED = blocks("write-a-runbook.md", "yaml")
(OWN_STEP,) = blocks("write-a-runbook.md", "yml")
(MODULE,) = blocks("write-a-runbook.md", "python")


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """The module of the page, as the registry would import it, and forgotten afterwards."""
    exec(compile(MODULE, "write-a-runbook.md", "exec"), {"__name__": "cache_of_the_page"})
    assert "cache.empty" in doings()
    yield
    del registry._DOINGS["cache.empty"], registry._REMOVERS["moved"]  # pyright: ignore[reportPrivateUsage]


@pytest.fixture
def bench(shared_cluster: Cluster) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(shared_cluster, stack)


def test_the_runbook_of_the_page_can_be_read_with_the_step_of_the_page() -> None:
    before, teardown = RUNBOOK.rstrip("\n").rsplit("\n", 1)
    assert "teardown" in teardown
    found = read(f"{before}\n{OWN_STEP}{teardown}\n".encode(), "warm-cache.yaml")
    assert [step.id for step in found.steps_for("drill")] == ["fit", "writer", "watched", "emptied", "clean"]
    (plan,) = yaml.safe_load(DECLARED)["drills"]["plan"]
    assert (plan["runbook"], found.kinds) == (found.id, ["postgresql"])


def test_the_step_of_the_page_empties_the_cache_and_sets_it_back(bench: Bench) -> None:
    folder = bench.home / "cache"
    folder.mkdir()
    (folder / "a").write_text("warm")
    bench.both("warm", [{"id": "emptied", "kind": "inject", "does": "cache.empty", "with": {"folder": str(folder)}}])
    drill = bench.drill("warm")
    card = card_of(drill)
    assert card is not None
    assert [(r.kind, r.gone) for r in card.teardown] == [("moved", True)]
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [("a", "warm")]
    assert [path.name for path in bench.home.glob("cache*")] == ["cache"]


def test_a_kind_of_thing_that_nobody_puts_back_is_refused_before_it_is_made(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(registry._REMOVERS, "moved")  # pyright: ignore[reportPrivateUsage]
    folder = bench.home / "cache"
    folder.mkdir()
    bench.both("warm", [{"id": "emptied", "kind": "inject", "does": "cache.empty", "with": {"folder": str(folder)}}])
    drill = bench.drill("warm")
    record = bench.engine.store.steps(drill.id)["emptied"]
    assert record.state is StepState.FAILED
    assert "nobody knows how to take away a 'moved'" in record.said
    assert [path.name for path in bench.home.glob("cache*")] == ["cache"]


# What `ops inventory check` says of drills


def checked(bench: Bench) -> int:
    file = bench.home / "platform.yaml"
    file.write_text(yaml.safe_dump(bench.body, sort_keys=False))
    with Access(load(file)) as access:
        return check_plans(access)


NOTED = {"id": "noted", "kind": "act", "does": "drill.let_it_run", "with": {"seconds": 1}}
WAITED = {**NOTED, "kind": "wait_until"}


@pytest.mark.parametrize(
    ("steps", "plan", "said"),
    [
        ([{**WAITED, "does": "drill.let_it_rum"}], {}, "warm.yaml:"),
        ([NOTED], {}, "drill.let_it_run is for steps of kind wait_until"),
        ([WAITED], {"runbook": "worm"}, "drills.plan: warm: there is no runbook 'worm'"),
        ([WAITED], {"targets": ["row"]}, "drills.plan: warm: the runbook warm is for vault, and row is of kind kafka"),
        ([WAITED], {"parameters": {"much": 1}}, "drills.plan: warm: the runbook warm has no parameter 'much'"),
    ],
)
def test_a_mistake_in_a_runbook_or_in_its_drill_is_named_before_it_is_held(
    bench: Bench, steps: list[dict[str, Any]], plan: dict[str, Any], said: str
) -> None:
    if "targets" in plan:
        bench.body["systems"].append({
            "id": "row", "kind": "kafka", "environment": "test", "owner": "team", "tls": False,
            "bootstrap": [{"host": "127.0.0.1", "port": 9092}],
        })  # fmt: skip
    bench.both("warm", steps, **plan)
    with pytest.raises(OpsError) as caught:
        checked(bench)
    assert said in str(caught.value)


def test_good_drills_are_counted_and_a_parameter_may_wait_until_one_is_held(bench: Bench) -> None:
    bench.both("plain", [WAITED])
    waits = {**WAITED, "with": {"seconds": {"parameter": "seconds"}}}
    bench.runbook("waits", [waits], parameters={"seconds": {"description": "For how long."}})
    bench.plan("waits")
    assert checked(bench) == 2
