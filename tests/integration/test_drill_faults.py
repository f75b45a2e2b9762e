"""Drills that go wrong: what was to go stays, a probe says that it is enough. Real servers and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest

from ops_platform.drills.model import Done, Drill, Ending, Resource, StepState
from ops_platform.drills.registry import Context, Remover, does, removes
from ops_platform.drills.scorecard import card_of
from ops_platform.errors import CouldNotVerifyError
from ops_platform.inventory.base import Strict
from tests.drill_rig import TRIED, Bench
from tests.redis_rig import Redis, Replicated
from tests.rig import Cluster

SERVER: dict[str, Any] = {"id": "server", "kind": "act", "does": "toy.process"}


@does("toy.key", "act")
def key(context: Context, given: Strict) -> Done:
    """What a reader of Redis asks for."""
    context.register("redis key", f"ops-drill:{context.held.id}", subject="cache")
    return Done("a key")


STAYS: set[str] = set()


@does("toy.stubborn", "act")
def stubborn(context: Context, given: Strict) -> Done:
    """Something that will not go while its name is in `STAYS`."""
    context.register("stubborn", "thing")
    return Done("it is there")


def _cannot(_access: object, resource: Resource) -> None:
    if resource.name in STAYS:
        raise CouldNotVerifyError("it is held by somebody else")


removes("stubborn", Remover(_cannot, lambda _access, _resource: None))


@pytest.fixture
def bench(shared_cluster: Cluster) -> Iterator[Bench]:
    TRIED.clear()
    STAYS.clear()
    with ExitStack() as stack:
        yield Bench(shared_cluster, stack)


@pytest.fixture
def cache(bench: Bench, new_redis: Callable[..., Replicated]) -> Redis:
    server = new_redis(replicas=0).master
    bench.body["systems"].append({
        "id": "cache", "kind": "redis", "environment": "test", "owner": "team", "tls": False, "timeout": "1s",
        "hosts": [{"host": "127.0.0.1", "port": server.port}],
    })  # fmt: skip
    return server


def reason(drill: Drill) -> str:
    card = card_of(drill)
    assert card is not None
    return card.reason


def test_what_will_not_go_fails_the_drill_and_the_next_start_takes_it_away(bench: Bench) -> None:
    bench.both("toys", [{"id": "thing", "kind": "act", "does": "toy.stubborn"}, SERVER])
    STAYS.add("thing")
    drill = bench.drill("toys")
    assert (drill.verdict, drill.ending) == ("FAIL", Ending.COMPLETED)
    assert "the teardown failed: stubborn thing is still there: it is held by somebody else" in reason(drill)
    assert bench.remains() == ["stubborn thing"], "and nothing else stays for it"
    begun = bench.begin(bench.engine, "toys")
    assert begun.drill is not None
    assert begun.left == [drill.id]
    assert bench.remains() == ["stubborn thing"]
    STAYS.clear()
    bench.engine.run(begun.drill.id)
    assert bench.engine.sweep(lost_after=timedelta(0))
    assert bench.remains() == []
    (finding,) = bench.engine.store.findings(all_=True)
    assert (finding.title, finding.state.value, finding.closed_by) == ("The teardown failed", "gone", begun.drill.id)


def frozen_cache(bench: Bench, cache: Redis, plan: dict[str, Any], **book: Any) -> Drill:
    """A drill that freezes the cache and would wait for minutes."""
    bench.runbook("toys", [
        {"id": "key", "kind": "act", "does": "toy.key"},
        {"id": "reader", "kind": "probe", "does": "redis.read", "with": {"timeout_ms": 300}, "needs": ["key"]},
        {"id": "loss", "kind": "inject", "does": "toy.break", "with": {"address": f"127.0.0.1:{cache.port}", "how": "freeze"}, "needs": ["reader"]},
        {"id": "long", "kind": "wait_until", "does": "toy.say", "with": {"seconds": 500.0}, "needs": ["loss"]},
    ], kinds=["redis"], **book)  # fmt: skip
    bench.plan("toys", targets=["cache"], **plan)
    drill = bench.drill("toys")
    assert (drill.verdict, drill.ending) == ("COULD_NOT_VERIFY", Ending.ABORTED)
    assert bench.engine.store.steps(drill.id)["loss"].state is StepState.DONE, "not while the probe was starting"
    assert cache.ping(), "it goes on"
    assert bench.remains() == []
    return drill


def test_a_condition_of_the_runbook_breaks_the_drill_off_and_puts_back(bench: Bench, cache: Redis) -> None:
    condition = {"probe": "reader", "unavailable_for": "1s"}
    drill = frozen_cache(bench, cache, {}, abort_when=[condition])
    assert "aborted by its probe: reader failed for" in reason(drill)
    assert "the runbook's limit" in reason(drill)


def test_a_budget_of_unavailability_that_is_used_up_breaks_the_drill_off_and_refuses_the_next_one(
    bench: Bench, cache: Redis
) -> None:
    """Nothing was expected, so the drill began."""
    drill = frozen_cache(bench, cache, {"unavailability": {"most": "1s"}})
    assert "the budget of unavailability is used up" in reason(drill)
    begun = bench.begin(bench.engine, "toys")
    assert begun.drill is None
    assert [r.guard for r in begun.result.rulings if not r.allows] == ["budget of unavailability"]
