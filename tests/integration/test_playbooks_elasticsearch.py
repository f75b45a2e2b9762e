"""Playbooks of Elasticsearch on a real node. What they may and may not do with which privileges: test_elasticsearch_rights."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops_platform.actions import CountLimit, Outcome, Status
from ops_platform.clients.http import BadAnswerError
from ops_platform.errors import AccessDeniedError, NotThereError, OpsError, RefusedError, UnreachableError
from ops_platform.inventory.model import Mode
from ops_platform.remediation.playbook import Playbook, playbook
from ops_platform.remediation.playbooks.elasticsearch import Watermark
from tests import elasticsearch_rig
from tests.elasticsearch_rig import Elasticsearch
from tests.integration import http_faults as faults
from tests.integration.http_faults import FaultyProxy
from tests.integration.incident_rig import solved
from tests.integration.systems_rig import Bench, Between, KilledError, bench, killed, outcomes
from tests.rig import Cluster, eventually

LIFT, RETRY = playbook("elasticsearch.lift_read_only"), playbook("elasticsearch.retry_failed_shards")
BLOCK = "blocks.read_only_allow_delete"


class Site:
    """A node, and indices of this test on it. `room`: where the high watermark lies, above or below what is used."""

    def __init__(self, server: Elasticsearch, cluster: Cluster, stack: ExitStack) -> None:
        self.server, self._cluster, self._stack = server, cluster, stack
        self.prefix = f"t{secrets.token_hex(4)}"
        self.room(True)

    def settings(self, **settings: str | None) -> None:
        self.server.call("PUT", "/_cluster/settings", {"persistent": settings})

    def room(self, there_is: bool) -> None:
        mark = "1b" if there_is else "0.1%"
        self.settings(
            **{f"cluster.routing.allocation.disk.watermark.{name}": mark for name in ("low", "high", "flood_stage")}
        )

    def index(self, *, blocked: bool = True, **settings: Any) -> str:
        name = f"{self.prefix}-{secrets.token_hex(4)}"
        self.server.create_index(name, **settings)
        if blocked:
            self.server.configure_index(name, blocks__read_only_allow_delete=True)
        return name

    def is_blocked(self, index: str) -> bool:
        return self.server.index_setting(index, BLOCK) == "true"

    def bench(self, *urls: str) -> Bench:
        body = {"kind": "elasticsearch", "urls": list(urls or [self.server.url]), "timeout": "20s"}
        return self._stack.enter_context(bench(self._cluster, body))

    def lift(self, it: Bench | None = None) -> Any:
        return (it or self.bench()).run(LIFT, indices=[f"{self.prefix}-*"])

    def close(self) -> None:
        for name in self.server.call("GET", f"/{self.prefix}-*/_settings", expand_wildcards="all"):
            self.server.call("DELETE", f"/{name}")
        self.room(True)


@pytest.fixture
def site(elasticsearch: Elasticsearch, shared_cluster: Cluster) -> Iterator[Site]:
    with ExitStack() as stack:
        made = Site(elasticsearch, shared_cluster, stack)
        stack.callback(made.close)
        yield made


# The read-only block


def test_the_block_is_lifted_once_there_is_room_and_set_again_by_undo(site: Site) -> None:
    blocked, free = site.index(), site.index(blocked=False)
    hidden = site.index(hidden=True)
    it = site.bench()
    result = site.lift(it)
    assert result.status is Status.DONE, result.as_json()
    assert sorted(outcomes(result)) == sorted([(blocked, Outcome.APPLIED), (hidden, Outcome.APPLIED)])
    assert [site.is_blocked(name) for name in (blocked, free, hidden)] == [False, False, False]
    site.server.add(blocked, {"a": 1})
    assert site.lift(it).status is Status.NOTHING
    back = it.undo(LIFT, result.plan.changes)
    assert back.status is Status.DONE, back.as_json()
    assert [site.is_blocked(name) for name in (blocked, free, hidden)] == [True, False, True]
    assert it.undo(LIFT, result.plan.changes).status is Status.NOTHING


def test_an_alert_about_blocked_indices_leads_to_a_closed_incident(site: Site, shared_cluster: Cluster) -> None:
    blocked = site.index()
    given = {"indices": [f"{site.prefix}-*"]}
    solved(shared_cluster, site.bench().access, LIFT.name, given, lambda: site.is_blocked(blocked))


def test_no_document_is_written_to_try_it(site: Site) -> None:
    blocked = site.index()
    assert site.lift().status is Status.DONE
    assert site.server.count(blocked) == 0


def test_without_room_nothing_is_lifted(site: Site) -> None:
    blocked = site.index()
    site.room(False)
    with pytest.raises(RefusedError, match="there is no room yet: node has"):
        site.lift()
    assert site.is_blocked(blocked)


def test_room_that_went_away_after_the_plan_is_noticed(site: Site) -> None:
    blocked = site.index()
    it = site.bench()
    result = it.go(Between(it.action(LIFT, indices=[blocked]), planned=lambda: site.room(False)))
    assert outcomes(result) == [(blocked, Outcome.REFUSED)]
    assert site.is_blocked(blocked)


def test_a_node_that_does_not_say_how_full_it_is_has_no_room(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = site.index()
    it = site.bench()
    action = it.action(LIFT, indices=[blocked])
    monkeypatch.setattr(type(action.desk), "without_room", lambda _self: {})  # type: ignore[attr-defined]
    with pytest.raises(RefusedError, match="does not say how full"):
        it.go(action)
    assert site.is_blocked(blocked)


def test_what_changed_after_the_plan_is_told_apart(site: Site) -> None:
    lifted, deleted = sorted([site.index(), site.index()])
    it = site.bench()

    def change() -> None:
        site.server.configure_index(lifted, blocks__read_only_allow_delete=None)
        site.server.call("DELETE", f"/{deleted}")

    result = it.go(Between(it.action(LIFT, indices=[f"{site.prefix}-*"]), planned=change))
    assert outcomes(result) == [(lifted, Outcome.ALREADY_DONE), (deleted, Outcome.MISSING)]


@pytest.mark.parametrize("killing", ["before", "after"])
def test_a_killed_lift_is_made_again(site: Site, killing: str) -> None:
    blocked = site.index()
    it = site.bench()
    with pytest.raises(KilledError):
        it.go(Between(it.action(LIFT, indices=[blocked]), **{killing: killed}))
    assert site.is_blocked(blocked) is (killing == "before")
    assert site.lift(it).status is (Status.DONE if killing == "before" else Status.NOTHING)


def test_limits_and_observing_leave_the_blocks(site: Site) -> None:
    names = [site.index(), site.index()]
    it = site.bench()
    action = it.action(LIFT, indices=[f"{site.prefix}-*"])
    assert it.go(action, CountLimit(1, "index")).status is Status.REFUSED
    assert it.go(action, mode=Mode.OBSERVE).status is Status.OBSERVED
    assert all(site.is_blocked(name) for name in names)


def test_an_index_that_is_not_there_is_not_one_without_a_block(site: Site) -> None:
    with pytest.raises(NotThereError):
        site.bench().run(LIFT, indices=["nowhere"])


def test_another_block_is_no_matter_of_this(site: Site) -> None:
    name = site.index(blocked=False)
    site.server.configure_index(name, blocks__read_only=True)
    assert site.lift().status is Status.NOTHING
    site.server.configure_index(name, blocks__read_only=None)


def test_a_block_that_the_flood_stage_set_is_lifted(shared_cluster: Cluster) -> None:
    """By Elasticsearch itself, on a disk that is too full by its settings."""
    looks = {"cluster.routing.allocation.disk.threshold_enabled": "true", "cluster.info.update.interval": "10s"}
    with elasticsearch_rig.node(settings=looks) as server, ExitStack() as stack:
        site = Site(server, shared_cluster, stack)
        name = site.index(blocked=False)
        site.room(False)
        eventually(lambda: site.is_blocked(name))
        site.room(True)
        result = site.lift()
        # As soon as there is room Elasticsearch may have lifted it, too.
        assert result.status in (Status.DONE, Status.NOTHING), result.as_json()
        assert not site.is_blocked(name)


@pytest.mark.parametrize(
    ("text", "headroom", "total", "needed"),
    [
        ("90%", "-1", 1000, 100),
        ("0.9", "-1", 1000, 100),
        ("90%", "150GB", 10 << 40, 150 << 30),
        ("90%", "150GB", 1000, 100),
        ("20gb", "-1", 1 << 40, 20 << 30),
        ("1b", "-1", 5, 1),
    ],
)
def test_a_watermark_is_read_in_each_of_its_forms(text: str, headroom: str, total: int, needed: int) -> None:
    assert Watermark.parse(text, headroom).needed(total) == needed


@pytest.mark.parametrize("text", ["", "much", "9x", "-1"])
def test_a_watermark_that_cannot_be_read_is_no_room(text: str) -> None:
    with pytest.raises(BadAnswerError):
        Watermark.parse(text, "-1")


@given(st.integers(1, 1 << 50), st.integers(1, 99), st.integers(1, 1 << 40))
def test_the_fullest_disk_of_a_node_decides(total: int, percent: int, headroom: int) -> None:
    mark = Watermark(percent / 100, None, headroom)
    needed = mark.needed(total)
    assert 0 <= needed <= min(total, headroom)
    good, bad = ({"total_in_bytes": total, "available_in_bytes": needed + more} for more in (1, 0))
    assert mark.exceeded({"name": "n", "fs": {"data": [good]}}) is None
    assert mark.exceeded({"name": "n", "fs": {"data": [good, bad]}}) is not None
    assert mark.exceeded({"name": "n"}) is not None


# Failed shards


@pytest.fixture
def broken(site: Site) -> Iterator[str]:
    """An index whose only shard was given up."""
    name = site.index(blocked=False)
    site.server.add(name, {"a": 1})
    site.server.break_shard(name)
    yield name
    site.server.mend_shard(name)


def test_a_shard_whose_cause_is_gone_is_opened_again(site: Site, broken: str) -> None:
    site.server.mend_shard(broken)
    it = site.bench()
    result = it.run(RETRY)
    assert result.status is Status.DONE, result.as_json()
    assert (f"{broken}[0] primary", Outcome.APPLIED) in outcomes(result)
    assert result.plan.facts["failed_attempts"][f"{broken}[0] primary"] == 5
    assert site.server.count(broken) == 1
    assert it.run(RETRY).status is Status.NOTHING


def test_a_shard_whose_cause_remains_is_seen(site: Site, broken: str) -> None:
    result = site.bench().run(RETRY, within="30s")
    assert result.status is Status.FAILED
    assert "it is not open: red" in result.verification.checks[0].detail


def test_one_call_tries_all_of_them(site: Site, broken: str) -> None:
    other = site.index(blocked=False)
    site.server.break_shard(other)
    for name in (broken, other):
        site.server.mend_shard(name)
    result = site.bench().run(RETRY)
    assert result.status is Status.DONE, result.as_json()
    assert sorted(outcome for _, outcome in outcomes(result)) == [Outcome.ALREADY_DONE, Outcome.APPLIED]


def test_a_shard_that_something_else_holds_back_is_not_retried(
    site: Site, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the only node that has its data is away: one node cannot be away and answer."""
    it = site.bench()
    action = it.action(RETRY)
    ask = action._desk.ask  # type: ignore[attr-defined]

    def explained(right: str, method: str, path: str, *more: Any) -> dict[str, Any]:
        if path == "/_cluster/allocation/explain":
            return {"can_allocate": "no_valid_shard_copy", "node_allocation_decisions": [{"node_name": "node"}]}
        return ask(right, method, path, *more)

    monkeypatch.setattr(action._desk, "ask", explained)  # type: ignore[attr-defined]
    result = it.go(action)
    assert result.status is Status.NOTHING
    assert result.plan.facts["not_helped_by_a_retry"] == {f"{broken}[0] primary": "no_valid_shard_copy"}


def test_a_shard_that_was_retried_after_the_plan_is_already_done(site: Site, broken: str) -> None:
    site.server.mend_shard(broken)
    it = site.bench()
    action = Between(
        it.action(RETRY), planned=lambda: site.server.call("POST", "/_cluster/reroute", retry_failed="true")
    )
    result = it.go(action)
    assert (result.status, {outcome for _, outcome in outcomes(result)}) == (Status.DONE, {Outcome.ALREADY_DONE})


@pytest.mark.parametrize("killing", ["before", "after"])
def test_a_killed_retry_is_made_again(site: Site, broken: str, killing: str) -> None:
    site.server.mend_shard(broken)
    it = site.bench()
    with pytest.raises(KilledError):
        it.go(Between(it.action(RETRY), **{killing: killed}))
    assert it.run(RETRY).status is (Status.DONE if killing == "before" else Status.NOTHING)
    eventually(lambda: site.server.health(broken)["status"] == "green")


def test_a_replica_without_a_place_has_not_failed(site: Site) -> None:
    site.index(blocked=False, number_of_replicas=1)
    assert site.bench().run(RETRY).status is Status.NOTHING


# Who cannot be asked, and who may not


@pytest.mark.parametrize("book", [LIFT, RETRY], ids=lambda book: book.name)
def test_a_cluster_that_is_away_is_never_nothing_to_do(site: Site, book: Playbook[Any]) -> None:
    with pytest.raises(UnreachableError, match="no node answers"):
        site.bench("http://127.0.0.1:1", "http://127.0.0.1:2").run(book)


def test_another_node_is_asked_when_one_is_away(site: Site) -> None:
    site.index()
    assert site.lift(site.bench("http://127.0.0.1:1", site.server.url)).status is Status.DONE


def _says(status: int, body: Any) -> faults.Fault:
    return faults.reply(status, json.dumps(body).encode(), content_type="application/json")


@pytest.mark.parametrize("body", [{}, [], {"status": 200}, "yes"])
@pytest.mark.parametrize("book", [LIFT, RETRY], ids=lambda book: book.name)
def test_an_answer_of_something_else_is_never_nothing_to_do(site: Site, book: Playbook[Any], body: Any) -> None:
    with FaultyProxy(None, always=_says(200, body)) as server, pytest.raises(OpsError):
        site.bench(server.url).run(book)


def test_a_refused_login_is_no_matter_of_privileges(site: Site) -> None:
    refused = _says(401, {"error": {"type": "security_exception"}, "status": 401})
    with FaultyProxy(None, always=refused) as server, pytest.raises(AccessDeniedError) as caught:
        site.bench(server.url).run(LIFT)
    assert "check the login" in str(caught.value)


def test_retrying_cannot_be_undone() -> None:
    undo: Callable[..., Any] = RETRY.undo
    assert (undo(None, []), RETRY.undo_text) == (None, None)
