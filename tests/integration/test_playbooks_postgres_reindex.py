"""Rebuilding invalid indexes and dropping what interrupted rebuilds left, on real servers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from ops_platform.actions import Applied, Outcome, Status
from ops_platform.remediation.playbook import playbook
from tests.integration.playbook_rig import Bench, bench
from tests.integration.wal_rig import eventually
from tests.rig import Cluster

REINDEX = playbook("postgres.reindex_invalid")
DB = 'Kü"che'
TABLE = '"Bestel""lung"'
INDEX = '"Nach ""i"""'
OBJECT = f"{DB}: public.{INDEX}"
OWNER = "grant cook to {role}"


@pytest.fixture
def make(new_cluster: Callable[..., Cluster]) -> Callable[..., Cluster]:
    return lambda major=18: prepared(new_cluster(major))


def prepared(cluster: Cluster) -> Cluster:
    """A table whose unique index could not be built because of a duplicate, which then was removed."""
    cluster.sql("create role cook")
    cluster.sql('create database "Kü""che" owner cook')
    cluster.sql(f"create table {TABLE} as select i from generate_series(1, 1000) i; insert into {TABLE} values (7)", DB)
    cluster.sql(f"alter table {TABLE} owner to cook", DB)
    with pytest.raises(psycopg.errors.UniqueViolation):
        cluster.sql(f"create unique index concurrently {INDEX} on {TABLE} (i)", DB)
    cluster.sql(f"delete from {TABLE} where ctid = (select max(ctid) from {TABLE} where i = 7)", DB)
    return cluster


@contextlib.contextmanager
def on(cluster: Cluster, rights: str | None = OWNER) -> Iterator[Bench]:
    with bench(cluster, rights=rights) as made:
        yield made


def indexes(cluster: Cluster) -> dict[str, bool]:
    with cluster.server.connect(DB) as connection:
        query = "select c.relname, indisvalid from pg_index join pg_class c on c.oid = indexrelid where indrelid = %s::regclass"
        return dict(connection.execute(query, [TABLE]).fetchall())


@contextlib.contextmanager
def writer(cluster: Cluster) -> Iterator[Any]:
    """An open transaction that wrote to the table: what is done concurrently waits for it."""
    connection = cluster.server.connect(DB, autocommit=True)
    connection.execute(f"begin; insert into {TABLE} values (-1)")
    try:
        yield connection
    finally:
        connection.close()


@pytest.mark.majors
@pytest.mark.parametrize(("major", "rights"), [(14, OWNER), (18, OWNER), (18, "grant pg_maintain to {role}")])
def test_an_invalid_index_is_rebuilt_by_a_role_with_the_stated_rights_alone(
    major: int, rights: str, make: Callable[..., Cluster]
) -> None:
    cluster = make(major)
    assert indexes(cluster) == {'Nach "i"': False}
    with on(cluster, rights) as at:
        result = at.run(REINDEX)
        assert [change.object for change in result.plan.changes] == [OBJECT]
        assert (result.status, result.counts) == (Status.DONE, {"applied": 1}), result.as_json()
        assert indexes(cluster) == {'Nach "i"': True}
        assert at.run(REINDEX).status is Status.NOTHING


def test_what_cannot_become_valid_fails_without_quoting_data_and_leaves_nothing_more_behind(
    make: Callable[..., Cluster],
) -> None:
    cluster = make()
    cluster.sql(f"insert into {TABLE} values (424242), (424242)", DB)
    with on(cluster) as at:
        result = at.run(REINDEX)
        assert result.status is Status.FAILED
        reason = result.outcomes[0][1].reason
        assert "could not create unique index" in reason
        assert "what it left was dropped" in reason
        assert "424242" not in at.written(result)
        assert indexes(cluster) == {'Nach "i"': False}


def test_waiting_for_too_long_is_given_up_and_cleaned_up(make: Callable[..., Cluster]) -> None:
    cluster = make()
    with on(cluster) as at, writer(cluster):
        result = at.run(REINDEX, lock_timeout="1s")
        assert (result.status, result.counts) == (Status.INCOMPLETE, {"contended": 1}), result.as_json()
        assert all(not name.endswith("_ccnew") or not valid for name, valid in indexes(cluster).items())
    with on(cluster) as at:
        eventually(lambda: at.run(REINDEX).status is Status.NOTHING)
    assert indexes(cluster) == {'Nach "i"': True}


def test_killed_in_the_middle_the_next_run_drops_what_it_left_and_rebuilds(make: Callable[..., Cluster]) -> None:
    cluster = make()
    with on(cluster) as at, writer(cluster) as blocking:
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(at.run(REINDEX)), daemon=True)
        thread.start()
        waiting = "select pid from pg_stat_activity where query ilike 'reindex%%' and wait_event_type = 'Lock'"
        pid = eventually(lambda: cluster.sql(waiting))
        # While it is at work nobody else begins, and what is half made is not taken for a leftover.
        plan = at.action(REINDEX).plan()
        assert plan.changes == ()
        assert set(plan.facts["left_alone"].values()) == {f"pid {pid} works on its table"}
        cluster.sql("select pg_terminate_backend(%s, 10000)", "postgres", pid)
        thread.join(60)
        assert results[0].status is Status.FAILED
        blocking.execute("commit")
    left = indexes(cluster)
    assert len(left) == 2
    assert not any(left.values())
    with on(cluster) as at:
        result = at.run(REINDEX)
        assert [(change.after is None, "_ccnew" in change.object) for change in result.plan.changes] == [
            (True, True),
            (False, False),
        ]
        assert (result.status, result.counts) == (Status.DONE, {"applied": 2}), result.as_json()
    assert indexes(cluster) == {'Nach "i"': True}


def test_what_changed_after_the_plan_is_left_alone(make: Callable[..., Cluster]) -> None:
    cluster = make()
    with on(cluster) as at:
        action = at.action(REINDEX)
        (change,) = action.plan().changes
        with cluster.server.connect(DB) as builder:
            builder.execute(f"begin; lock table {TABLE} in share update exclusive mode")
            checked = action.check(change)
            assert checked is not None
            assert (checked.outcome, "works on its table" in checked.reason) == (Outcome.CONTENDED, True)
            builder.execute("rollback")
        cluster.sql(f"reindex index {INDEX}", DB)
        assert action.check(change).outcome is Outcome.ALREADY_DONE  # type: ignore[union-attr]
        cluster.sql(f"drop index {INDEX}", DB)
        assert action.check(change).outcome is Outcome.ALREADY_DONE  # type: ignore[union-attr]
        done = {change.object: Applied(Outcome.ALREADY_DONE, "it is valid by now, or gone")}
        assert action.verify(action.plan(), done).holds is True


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"room": 1000}, "it might take"),
        ({"indexes": ["other.*"]}, "the rule does not allow it"),
        ({"databases": ["x*"]}, None),
    ],
)
def test_what_the_rule_does_not_mean_is_left_alone_with_the_reason(
    parameters: dict[str, Any], why: str | None, make: Callable[..., Cluster]
) -> None:
    with on(make()) as at:
        plan = at.action(REINDEX, **parameters).plan()
        assert plan.changes == ()
        assert why is None or why in plan.facts["left_alone"][OBJECT]


@pytest.mark.majors
@pytest.mark.parametrize("major", [14, 18])
def test_without_the_right_it_says_which(major: int, make: Callable[..., Cluster]) -> None:
    cluster = make(major)
    with on(cluster, "") as poor:
        result = poor.run(REINDEX)
        assert result.status is Status.FAILED
        assert result.plan.facts["missing_right"] == [OBJECT]
        assert f"GRANT {'pg_maintain' if major >= 17 else 'cook'} TO {poor.role}" in result.outcomes[0][1].reason
        cluster.sql('revoke connect on database "Kü""che" from public')
        assert poor.action(REINDEX).plan().facts["not_looked_at"] == [DB]
    assert indexes(cluster) == {'Nach "i"': False}


def test_verification_notices_an_index_that_is_still_invalid(make: Callable[..., Cluster]) -> None:
    with on(make()) as at:
        action = at.action(REINDEX)
        plan = action.plan()
        assert action.verify(plan, {OBJECT: Applied(Outcome.APPLIED, "said so")}).holds is False


def test_at_most_so_many_are_rebuilt(make: Callable[..., Cluster]) -> None:
    cluster = make()
    cluster.sql("create table other as select 1 as i from generate_series(1, 5)", DB)
    with contextlib.suppress(psycopg.errors.UniqueViolation):
        cluster.sql("create unique index concurrently second on other (i)", DB)
    with on(cluster, None) as at:
        plan = at.action(REINDEX, at_most=1).plan()
        assert [change.object for change in plan.changes] == [f"{DB}: public.second"]
        assert plan.facts["left_alone"] == {OBJECT: "beyond at_most"}
