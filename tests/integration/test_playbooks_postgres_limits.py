"""Raising limits and setting them back, on real servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from ops_platform.actions import Applied, Outcome, Status
from ops_platform.errors import AccessDeniedError, NotThereError, OpsError, RefusedError, UsageError
from ops_platform.ledger import Ledger
from ops_platform.remediation.playbook import Done, playbook
from tests.integration.playbook_rig import bench
from tests.integration.test_playbooks_postgres_slots import Standby
from tests.rig import Cluster

RAISE = playbook("postgres.raise_limit")
NAME = 'Kü"che'
SYSTEM = (
    "grant pg_read_all_settings to {{role}}; grant alter system on parameter {0} to {{role}};"
    " grant execute on function pg_reload_conf() to {{role}}"
)
ROLE: dict[str, Any] = {"limit": "role_connections", "of": NAME, "to": 4}
DATABASE: dict[str, Any] = {"limit": "database_connections", "of": NAME, "to": 4}


def prepare(cluster: Cluster) -> Cluster:
    cluster.sql('create role cook; create role "Kü""che" login connection limit 2')
    cluster.sql('create database "Kü""che" owner cook connection limit 2')
    return cluster


@pytest.fixture
def make(new_cluster: Callable[..., Cluster]) -> Callable[..., Cluster]:
    return lambda major=18, **settings: prepare(new_cluster(major, settings))


@pytest.fixture
def server(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The server that other tests share; left as it was found."""
    auto = shared_cluster.server.directory / "postgresql.auto.conf"
    found = auto.read_text()
    _clear(shared_cluster)  # a test that broke off in its preparation left something
    yield prepare(shared_cluster)
    auto.write_text(found)
    shared_cluster.sql("select pg_reload_conf()")
    _clear(shared_cluster)


def _clear(cluster: Cluster) -> None:
    cluster.sql('drop database if exists "Kü""che" with (force)')
    for role in ('"Kü""che"', "cook"):
        if cluster.sql("select 1 from pg_roles where quote_ident(rolname) = %s", "postgres", role):
            cluster.sql(f"drop owned by {role}; drop role {role}")


class Hurried:
    """A clock by which every wait is over at once."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        self._seconds += 1000
        return self._seconds

    def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing waits")


def limits(cluster: Cluster) -> tuple[int, int]:
    return (
        cluster.sql("select rolconnlimit from pg_roles where rolname = %s", "postgres", NAME),
        cluster.sql("select datconnlimit from pg_database where datname = %s", "postgres", NAME),
    )


@pytest.mark.majors
@pytest.mark.parametrize(
    ("major", "parameters", "rights", "attributes"),
    [
        (14, ROLE, "", "createrole"),
        (18, ROLE, 'grant "Kü""che" to {role} with admin option', "createrole"),
        (14, DATABASE, "grant cook to {role}", ""),
        (18, DATABASE, "grant cook to {role}", ""),
    ],
)
def test_connections_are_raised_and_set_back_by_a_role_with_the_stated_rights_alone(
    major: int, parameters: dict[str, Any], rights: str, attributes: str, make: Callable[..., Cluster]
) -> None:
    cluster = make(major)
    with bench(cluster, rights=rights, attributes=attributes) as at:
        result = at.run(RAISE, **parameters)
        assert (result.status, result.counts) == (Status.DONE, {"applied": 1}), result.as_json()
        assert sorted(limits(cluster)) == [2, 4]
        assert result.plan.facts["now"] == 2
        assert result.plan.changes[0].reversible
        assert at.run(RAISE, **parameters).status is Status.NOTHING
        back = at.undo(RAISE, result, **parameters)
        assert (back.status, limits(cluster)) == (Status.DONE, (2, 2))
        assert at.undo(RAISE, result, **parameters).counts == {"already_done": 1}


@pytest.mark.parametrize(
    "name", ["max_slot_wal_keep_size", "max_wal_size", "wal_keep_size", "work_mem", "maintenance_work_mem"]
)
def test_a_setting_is_raised_and_set_back_by_a_role_with_the_stated_rights_alone(
    name: str, make: Callable[..., Cluster]
) -> None:
    cluster = make(max_slot_wal_keep_size="64MB", wal_keep_size="64MB")
    before = cluster.sql(f"show {name}")
    to = 1 << 28 if "wal" in name else 1 << 23
    times = 100 if name == "maintenance_work_mem" else 4
    to = 100 << 20 if name == "maintenance_work_mem" else to
    to = 300 << 20 if name == "max_wal_size" else to
    with bench(cluster, rights=SYSTEM.format(name)) as at:
        parameters = {"limit": name, "to": to, "at_most_times": times}
        result = at.run(RAISE, **parameters)
        assert (result.status, result.counts) == (Status.DONE, {"applied": 1}), result.as_json()
        assert cluster.sql("select pg_size_bytes(current_setting(%s))", "postgres", name) == to
        assert at.run(RAISE, **parameters).status is Status.NOTHING
        assert at.undo(RAISE, result, **parameters).status is Status.DONE
        assert cluster.sql(f"show {name}") == before


def test_undo_leaves_no_trace_of_a_setting_that_had_none(server: Cluster) -> None:
    """Had it been set to its old value instead, a later change of postgresql.conf would do nothing, and nobody would know why."""
    with bench(server, rights=None) as at:
        result = at.run(RAISE, limit="work_mem", to="8MiB")
        auto = server.server.directory / "postgresql.auto.conf"
        assert "work_mem" in auto.read_text()
        assert at.undo(RAISE, result, limit="work_mem", to="8MiB").status is Status.DONE
        assert "work_mem" not in auto.read_text()


def test_a_setting_is_set_back_on_the_server_that_has_it_whoever_leads_by_then(
    make: Callable[..., Cluster], shared_cluster: Cluster
) -> None:
    cluster, wanted = make(), {"limit": "work_mem", "to": "8MiB"}
    cluster.sql("select pg_create_physical_replication_slot('standby_1', true)")
    with closing(Standby(cluster, "standby_1")) as standby, bench(cluster, standby, rights=None) as at:  # type: ignore[arg-type]
        at.ledger.close()
        at.ledger = Ledger(lambda: shared_cluster.server.connect(autocommit=False))
        result = at.run(RAISE, **wanted)
        ((change, applied),) = result.outcomes
        cluster.server.stop("fast")
        with standby.server.connect() as connection:
            connection.execute("select pg_promote()")
        back = at.undo(RAISE, result, **wanted)
        assert back.status is Status.FAILED
        assert f"127.0.0.1:{cluster.port}: PostgreSQL does not answer" in back.outcomes[0][1].reason
        assert at.action(RAISE, **wanted).check(change).outcome is Outcome.CONTENDED  # type: ignore[union-attr]

        (cluster.server.directory / "standby.signal").touch()
        cluster.server.user.own(cluster.server.directory / "standby.signal")
        cluster.server.start()
        assert (cluster.sql("select pg_is_in_recovery()"), cluster.sql("show work_mem")) == (True, "8MB")
        # An older version's record does not say where: the server that leads is asked.
        older = RAISE.undo(at.context(RAISE, **wanted), [Done(replace(change, detail={}), applied)])
        assert older is not None
        assert at.go(older).counts == {"already_done": 1}
        assert at.undo(RAISE, result, **wanted).status is Status.DONE
        assert cluster.sql("show work_mem") == "4MB"
        assert "work_mem" not in (cluster.server.directory / "postgresql.auto.conf").read_text()


def test_a_record_that_does_not_say_where_is_undone_where_the_cluster_is_led(server: Cluster) -> None:
    with bench(server, rights=None) as at:
        result = at.run(RAISE, limit="work_mem", to="8MiB")
        ((change, applied),) = result.outcomes
        older = RAISE.undo(at.context(RAISE, limit="work_mem", to="8MiB"), [Done(replace(change, detail={}), applied)])
        assert older is not None
        assert at.go(older).status is Status.DONE
        assert server.sql("show work_mem") == "4MB"


def test_the_undo_on_a_server_that_the_inventory_has_no_longer_is_no_success(server: Cluster) -> None:
    with bench(server, rights=None) as at:
        result = at.run(RAISE, limit="work_mem", to="8MiB")
        ((change, applied),) = result.outcomes
        elsewhere = replace(change, detail={"server": "db-9.example:5432"})
        back = RAISE.undo(at.context(RAISE, limit="work_mem", to="8MiB"), [Done(elsewhere, applied)])
        assert back is not None
        found = at.go(back)
        assert found.status is Status.FAILED
        assert "work_mem was changed on db-9.example:5432, which is not among the hosts" in found.outcomes[0][1].reason


def test_undo_leaves_alone_what_somebody_else_changed_since(server: Cluster) -> None:
    with bench(server, rights=None) as at:
        result = at.run(RAISE, **ROLE)
        server.sql('alter role "Kü""che" connection limit 7')
        back = at.undo(RAISE, result, **ROLE)
        assert (back.status, back.counts) == (Status.INCOMPLETE, {"contended": 1})
        assert limits(server)[0] == 7


def test_what_changed_after_the_plan_is_left_alone(server: Cluster) -> None:
    with bench(server, rights=None) as at:
        action = at.action(RAISE, **ROLE)
        (change,) = action.plan().changes
        server.sql('alter role "Kü""che" connection limit 3')
        assert action.check(change).outcome is Outcome.CONTENDED  # type: ignore[union-attr]
        server.sql('alter role "Kü""che" connection limit 4')
        assert action.check(change).outcome is Outcome.ALREADY_DONE  # type: ignore[union-attr]
        server.sql('drop role "Kü""che"')
        with pytest.raises(NotThereError, match="there is no role"):
            action.check(change)


def test_killed_between_setting_and_reloading_the_next_run_finishes(server: Cluster) -> None:
    with bench(server, rights=None) as at:
        server.sql("alter system set work_mem = 8192")
        result = at.run(RAISE, limit="work_mem", to="8MiB")
        assert (result.status, server.sql("show work_mem")) == (Status.DONE, "8MB")


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"limit": "max_connections", "to": 500}, "takes effect at a restart"),
        ({"limit": "max_wal_senders", "to": 50}, "takes effect at a restart"),
        ({"limit": "statement_timeout", "to": 50}, "is none of the settings"),
        ({"limit": "no_such_thing", "to": 50}, "has no setting"),
        ({"limit": "work_mem", "to": "64GiB"}, "more than 4 times as much"),
        ({**ROLE, "to": 100000, "at_most_times": 100}, "the server takes"),
        ({**ROLE, "to": 50}, "more than 4 times as much"),
        ({**ROLE, "of": "nobody"}, "there is no role 'nobody'"),
        ({**DATABASE, "of": "nothing"}, "there is no database 'nothing'"),
    ],
)
def test_what_cannot_or_must_not_be_raised_is_refused_with_the_reason(
    parameters: dict[str, Any], why: str, server: Cluster
) -> None:
    with bench(server, rights=None) as at, pytest.raises(OpsError, match=why):
        at.run(RAISE, **parameters)


def test_a_closed_door_and_what_stands_on_the_command_line_are_left(make: Callable[..., Cluster]) -> None:
    cluster = make()
    cluster.sql('alter role "Kü""che" connection limit 0')
    with bench(cluster, rights=None) as at:
        with pytest.raises(RefusedError, match="closed by a limit of 0"):
            at.run(RAISE, **ROLE)
        cluster.sql('alter role "Kü""che" connection limit -1')
        assert at.run(RAISE, **ROLE).status is Status.NOTHING
        assert at.run(RAISE, limit="max_slot_wal_keep_size", to="1GiB").status is Status.NOTHING
        cluster.server.stop()
        cluster.server.start({"work_mem": "6MB"})
        with pytest.raises(RefusedError, match="comes from command line"):
            at.run(RAISE, limit="work_mem", to="8MiB")


def test_parameters_that_do_not_go_together() -> None:
    for wrong in (
        {"limit": "work_mem", "of": "x", "to": 1},
        {"limit": "role_connections", "to": 1},
        {"limit": "work_mem"},
    ):
        with pytest.raises(UsageError):
            RAISE.read_parameters(wrong)


def test_it_is_meant_for_a_time_where_the_rule_says_so(server: Cluster) -> None:
    with bench(server, rights=None) as at:
        assert RAISE.undo_after(at.context(RAISE, **ROLE, undo_after="2h")) == timedelta(hours=2)
        assert RAISE.undo_after(at.context(RAISE, **ROLE)) is None


@pytest.mark.majors
@pytest.mark.parametrize(
    ("major", "parameters", "rights", "said"),
    [
        (14, ROLE, "", "CREATEROLE"),
        (18, ROLE, "", "CREATEROLE"),
        (18, DATABASE, "", "owns the database"),
        (
            18,
            {"limit": "work_mem", "to": "8MiB"},
            "grant pg_read_all_settings to {role}",
            "GRANT ALTER SYSTEM ON PARAMETER work_mem",
        ),
        (14, {"limit": "work_mem", "to": "8MiB"}, "grant pg_read_all_settings to {role}", "PostgreSQL 15 and later"),
    ],
)
def test_without_a_right_it_says_which(
    major: int, parameters: dict[str, Any], rights: str, said: str, make: Callable[..., Cluster]
) -> None:
    cluster = make(major)
    with bench(cluster, rights=rights) as poor:
        result = poor.run(RAISE, **parameters)
        assert result.status is Status.FAILED
        assert said in result.outcomes[0][1].reason
    assert limits(cluster) == (2, 2)
    with bench(cluster, rights="") as poor, pytest.raises(AccessDeniedError, match="pg_read_all_settings"):
        poor.run(RAISE, limit="work_mem", to="8MiB")


def test_verification_notices_what_was_not_raised(server: Cluster) -> None:
    with bench(server, rights=None) as at:
        action = RAISE.action(at.context(RAISE, Hurried(), **ROLE))
        plan = action.plan()
        assert action.verify(plan, {plan.changes[0].object: Applied(Outcome.APPLIED, "said so")}).holds is False


def test_the_raised_limit_lets_the_client_in(server: Cluster) -> None:
    clients = [server.server.connect(user=NAME) for _ in range(2)]
    with bench(server, rights=None) as at:
        with pytest.raises(psycopg.OperationalError, match="too many connections for role"):
            server.server.connect(user=NAME)
        assert at.run(RAISE, **ROLE).status is Status.DONE
        clients.append(server.server.connect(user=NAME))
    for client in clients:
        client.close()
