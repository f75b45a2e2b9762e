"""Vacuuming what nears wraparound, on real servers whose transaction ids were used up a little."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from ops_platform.actions import Applied, Outcome, Status
from ops_platform.errors import AccessDeniedError, RefusedError
from ops_platform.remediation.playbook import playbook
from tests.integration.playbook_rig import Bench, bench
from tests.integration.wal_rig import eventually
from tests.rig import Cluster

VACUUM = playbook("postgres.vacuum_wraparound")
DB = 'Kü"che'
TABLE = '"Bestel""lung"'
RIGHTS = {14: "grant pg_read_all_stats, cook to {role}", 18: "grant pg_read_all_stats, pg_maintain to {role}"}
LOW: dict[str, Any] = {"xid_age": 1000, "mxid_age": 2_000_000_000, "databases": ["K*"], "freeze": True}
BURN = """
do $$ begin
  for i in 1..3000 loop begin insert into burnt values (i); exception when others then null; end; end loop;
end $$"""


@pytest.fixture
def make(new_cluster: Callable[..., Cluster]) -> Callable[..., Cluster]:
    return lambda major=18, **settings: prepared(new_cluster(major, settings))


def prepared(cluster: Cluster) -> Cluster:
    """A database in which the table is old, and the catalog is not."""
    cluster.sql("create role cook")
    cluster.sql('create database "Kü""che" owner cook')
    cluster.sql(f"create table {TABLE} as select i, i::text as t from generate_series(1, 1000) i", DB)
    cluster.sql(f"alter table {TABLE} owner to cook; create table burnt (i int)", DB)
    burn(cluster)
    return cluster


def burn(cluster: Cluster) -> None:
    cluster.sql(BURN, DB)
    young = cluster.sql(
        "select string_agg(c.oid::regclass::text, ', ') from pg_class c where relkind in ('r', 'm') and relname <> %s",
        DB,
        'Bestel"lung',
    )
    with cluster.server.connect(DB) as connection:
        for name in young.split(", "):
            connection.execute(f"vacuum (freeze) {name}")


def age(cluster: Cluster) -> int:
    return cluster.sql(f"select age(relfrozenxid) from pg_class where oid = '{TABLE}'::regclass", DB)


@contextlib.contextmanager
def on(cluster: Cluster, major: int = 18, **more: Any) -> Iterator[Bench]:
    with bench(cluster, **{"rights": RIGHTS[major], **more}) as made:
        yield made


@pytest.mark.majors
@pytest.mark.parametrize("major", [14, 18])
def test_the_oldest_table_is_vacuumed_by_a_role_with_the_stated_rights_alone(
    major: int, make: Callable[..., Cluster]
) -> None:
    cluster = make(major)
    with on(cluster, major) as at:
        result = at.run(VACUUM, **LOW)
        assert [change.object for change in result.plan.changes] == [f"{DB}: public.{TABLE}"]
        assert (result.status, result.counts) == (Status.DONE, {"applied": 1}), result.as_json()
        assert result.plan.facts["tables"][0]["xid_age"] > 1000
        assert result.plan.population["table"] > 50
        assert age(cluster) < 1000
        assert at.run(VACUUM, **LOW).status is Status.NOTHING


def test_without_freeze_it_moves_the_age_all_the_same_where_it_can(make: Callable[..., Cluster]) -> None:
    cluster = make(vacuum_freeze_min_age="0")
    with on(cluster) as at:
        result = at.run(VACUUM, **LOW | {"freeze": False, "emergency": True})
        assert result.status is Status.DONE
        assert result.plan.changes[0].after == {"vacuumed": ["index_cleanup off", "truncate off"]}
        assert age(cluster) < 1000


def test_it_refuses_to_promise_what_the_setting_keeps_from_happening(make: Callable[..., Cluster]) -> None:
    with on(make()) as at, pytest.raises(RefusedError, match="leaves what is younger than 50000000"):
        at.run(VACUUM, **LOW | {"freeze": False})


def holding_transaction(cluster: Cluster) -> Any:
    connection = cluster.server.connect(DB, autocommit=True, application_name="report")
    connection.execute("begin isolation level repeatable read")
    connection.execute("select 1")
    return connection


@pytest.mark.parametrize("holder", ["transaction", "prepared", "slot", "transaction of another database"])
def test_what_holds_the_horizon_is_named_and_vacuuming_in_vain_is_refused(
    holder: str, make: Callable[..., Cluster]
) -> None:
    cluster = make(max_prepared_transactions="5")
    if holder == "prepared":
        with cluster.server.connect(DB) as connection:
            connection.execute("begin; insert into burnt values (0); prepare transaction 'forgotten'")
        named = "prepared transaction forgotten of postgres"
    elif holder == "slot":
        # A standby with hot_standby_feedback that went away leaves its xmin in its slot.
        from tests.integration.test_playbooks_postgres_slots import Standby

        cluster.sql("select pg_create_physical_replication_slot('standby_1', true)")
        standby = Standby(cluster, "standby_1")
        with standby.server.connect() as connection:
            connection.execute("alter system set hot_standby_feedback = on")
            connection.execute("alter system set wal_receiver_status_interval = 1")
            connection.execute("select pg_reload_conf()")
        held = standby.server.connect(DB)
        held.execute("begin isolation level repeatable read; select 1")
        eventually(lambda: cluster.sql("select xmin is not null from pg_replication_slots"))
        standby.close()
        eventually(lambda: not cluster.sql("select active from pg_replication_slots"))
        named = "replication slot standby_1, inactive"
    else:
        other = "postgres" if "another" in holder else DB
        connection = cluster.server.connect(other, autocommit=True, application_name="report")
        connection.execute("begin isolation level repeatable read; select 1")
        named = f"transaction of pid {connection.info.backend_pid} (postgres, report) since 2"
    burn(cluster)
    with on(cluster) as at:
        if "another" in holder:
            # It holds its own database's horizon and that of the shared catalogs, and not this one's.
            result = at.run(VACUUM, **LOW)
            assert (result.status, len(result.plan.changes)) == (Status.DONE, 1)
            assert f"{DB}: pg_catalog.pg_database" in result.plan.facts["left_alone"]
            assert named in str(result.plan.facts["holds_the_horizon"])
            return
        with pytest.raises(RefusedError) as refused:
            at.run(VACUUM, **LOW)
        assert "vacuum could not help" in refused.value.what
        assert named in refused.value.what
        assert age(cluster) > 1000


def test_a_horizon_that_is_held_after_the_plan_refuses_the_table(make: Callable[..., Cluster]) -> None:
    cluster = make()
    with on(cluster) as at:
        action = at.action(VACUUM, **LOW)
        (change,) = action.plan().changes
        holder = holding_transaction(cluster)
        burn(cluster)
        checked = action.check(change)
        assert checked is not None
        assert (checked.outcome, "held by transaction" in checked.reason) == (Outcome.REFUSED, True)
        holder.close()


def test_what_somebody_else_vacuumed_is_done(make: Callable[..., Cluster]) -> None:
    cluster = make()
    with on(cluster) as at:
        action = at.action(VACUUM, **LOW)
        (change,) = action.plan().changes
        with cluster.server.connect(DB) as connection:
            connection.execute(f"vacuum (freeze) {TABLE}")
        assert action.check(change).outcome is Outcome.ALREADY_DONE  # type: ignore[union-attr]
        cluster.sql(f"drop table {TABLE}", DB)
        assert action.check(change).outcome is Outcome.ALREADY_DONE  # type: ignore[union-attr]


def test_a_locked_table_is_left_alone(make: Callable[..., Cluster]) -> None:
    cluster = make()
    holder = cluster.server.connect(DB, autocommit=True)
    holder.execute(f"begin; lock table {TABLE} in share update exclusive mode")
    with on(cluster) as at:
        result = at.run(VACUUM, **LOW, lock_timeout="1s")
        assert (result.status, result.counts) == (Status.INCOMPLETE, {"contended": 1}), result.as_json()
    holder.close()


def test_a_table_that_another_vacuum_works_on_is_left_alone(make: Callable[..., Cluster]) -> None:
    """Killed in the middle, a vacuum of ours that goes on is such a one, too."""
    cluster = make()
    # Of a few pages even the slowest vacuum would have its end before a busy machine has looked twice.
    cluster.sql(f"insert into {TABLE} select i, i::text from generate_series(1, 50000) i", DB)
    slow = cluster.server.connect(DB, autocommit=True)
    slow.execute("set vacuum_cost_delay = 100; set vacuum_cost_limit = 1")
    with on(cluster) as at:
        action = at.action(VACUUM, **LOW)
        (change,) = action.plan().changes

        def vacuum() -> None:
            with contextlib.suppress(psycopg.errors.QueryCanceled):
                slow.execute(f"vacuum (freeze) {TABLE}")

        thread = threading.Thread(target=vacuum, daemon=True)
        thread.start()
        eventually(lambda: cluster.sql("select count(*) from pg_stat_progress_vacuum"))
        checked = action.check(change)
        assert checked is not None
        assert (checked.outcome, checked.reason) == (Outcome.CONTENDED, "another vacuum works on it")
        plan = at.action(VACUUM, **LOW).plan()
        assert plan.changes == ()
        assert plan.facts["left_alone"] == {change.object: "another vacuum works on it"}
        cluster.sql("select pg_cancel_backend(pid) from pg_stat_progress_vacuum")
        thread.join(30)


def test_a_temporary_table_is_left_to_its_session_and_at_most_so_many_are_vacuumed(
    make: Callable[..., Cluster],
) -> None:
    cluster = make()
    somebody = cluster.server.connect(DB, autocommit=True)
    somebody.execute("create temporary table mine as select 1")
    cluster.sql("create table second as select 1", DB)
    cluster.sql(BURN, DB)
    with on(cluster) as at:
        plan = at.action(VACUUM, **LOW, at_most=1).plan()
        assert len(plan.changes) == 1
        assert plan.changes[0].object == f"{DB}: public.{TABLE}"
        left = plan.facts["left_alone"]
        assert "temporary: it goes with its session" in left.values()
        assert left[f"{DB}: public.second"] == "beyond at_most"
    somebody.close()


@pytest.mark.majors
@pytest.mark.parametrize("major", [14, 18])
def test_without_a_right_it_says_which(major: int, make: Callable[..., Cluster]) -> None:
    cluster = make(major)
    with (
        on(cluster, major, rights="") as poor,
        pytest.raises(AccessDeniedError, match="not a member of pg_read_all_stats"),
    ):
        poor.run(VACUUM, **LOW)
    with on(cluster, major, rights="grant pg_read_all_stats to {role}") as poor:
        result = poor.run(VACUUM, **LOW)
        assert result.status is Status.FAILED
        assert result.plan.facts["missing_right"] == [f"{DB}: public.{TABLE}"]
        grant = "pg_maintain" if major >= 17 else "cook"
        assert f"GRANT {grant} TO {poor.role}" in result.outcomes[0][1].reason
        assert age(cluster) > 1000
        cluster.sql('revoke connect on database "Kü""che" from public')
        assert poor.action(VACUUM, **LOW).plan().facts["not_looked_at"] == [DB]


def test_verification_notices_a_table_that_is_as_old_as_before(make: Callable[..., Cluster]) -> None:
    with on(make()) as at:
        action = at.action(VACUUM, **LOW)
        plan = action.plan()
        assert action.verify(plan, {plan.changes[0].object: Applied(Outcome.APPLIED, "said so")}).holds is False
