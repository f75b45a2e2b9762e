"""Dropping replication slots that nobody reads from, on real servers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import pq

from ops_platform.actions import Applied, Outcome, Status
from ops_platform.errors import AccessDeniedError, UsageError
from ops_platform.remediation.playbook import playbook
from tests.integration.playbook_rig import bench
from tests.integration.wal_rig import eventually
from tests.rig import Cluster

DROP = playbook("postgres.drop_inactive_slot")
RIGHTS: dict[str, Any] = {"rights": "grant pg_monitor to {role}", "attributes": "replication"}
LOW: dict[str, Any] = {"slots": ["*"], "inactive_for": "1s", "retained_above": 1000}


def slot(cluster: Cluster, name: str = "abandoned", *, logical: bool = False, dbname: str = "postgres") -> None:
    """A slot that keeps a little WAL."""
    kind = "create_logical" if logical else "create_physical"
    arguments = "%s, 'test_decoding'" if logical else "%s, true"
    cluster.sql(f"select pg_{kind}_replication_slot({arguments})", dbname, name)
    cluster.sql("create table if not exists w as select 1; insert into w select generate_series(1, 1000)")


def waited(cluster: Cluster, name: str = "abandoned") -> None:
    if cluster.server.install.major >= 17:
        what = "clock_timestamp() - inactive_since > interval '1.05 s'"
        eventually(
            lambda: cluster.sql(f"select {what} from pg_replication_slots where slot_name = %s", "postgres", name)
        )


def there(cluster: Cluster, name: str = "abandoned") -> bool:
    return cluster.sql("select count(*) = 1 from pg_replication_slots where slot_name = %s", "postgres", name)


@contextlib.contextmanager
def connected(cluster: Cluster, name: str) -> Iterator[None]:
    """Somebody who streams from a physical slot."""
    conn = pq.PGconn.connect(
        f"host={cluster.server.sockets} port={cluster.port} user=postgres replication=true".encode()
    )
    conn.exec_(f"START_REPLICATION SLOT {name} PHYSICAL {cluster.sql('select pg_current_wal_lsn()')}".encode())
    try:
        eventually(
            lambda: cluster.sql("select active from pg_replication_slots where slot_name = %s", "postgres", name)
        )
        yield
    finally:
        conn.finish()
        # The server hears of the end in its own time, and until then the slot can neither be dropped nor used.
        eventually(
            lambda: not cluster.sql("select active from pg_replication_slots where slot_name = %s", "postgres", name)
        )


@pytest.mark.majors
@pytest.mark.parametrize(("major", "logical"), [(14, False), (14, True), (18, False), (18, True)])
def test_an_abandoned_slot_is_dropped_by_a_role_with_the_stated_rights_alone(
    major: int, logical: bool, new_cluster: Callable[..., Cluster]
) -> None:
    cluster = new_cluster(major, {"wal_level": "logical"})
    cluster.sql('create database "Kü""che"')
    slot(cluster, logical=logical, dbname='Kü"che' if logical else "postgres")
    waited(cluster)
    with bench(cluster, **RIGHTS) as at:
        if major < 17:
            plan = at.action(DROP, **LOW).plan()
            assert plan.changes == ()
            assert "nobody can say since when" in plan.facts["left_alone"]["abandoned"]
            # The file at the slot's position is finished, as it is where gigabytes are kept; the next one is written to.
            cluster.sql("select pg_switch_wal()")
            age = "clock_timestamp() - min(modification) > interval '1.05 s' from pg_ls_waldir()"
            eventually(lambda: cluster.sql(f"select {age}"))
        result = at.run(DROP, **LOW, before_17="by_wal_age")
        assert (result.status, result.counts) == (Status.DONE, {"applied": 1}), result.as_json()
        assert result.plan.facts["retained_bytes"] > 1000
        assert result.plan.facts["slots"][0]["inactive_seconds"] >= 1
        assert not there(cluster)
        assert at.run(DROP, **LOW, before_17="by_wal_age").status is Status.NOTHING


@pytest.fixture(scope="module")
def at(module_cluster: Cluster) -> Iterator[Any]:
    with bench(module_cluster, **RIGHTS) as made:
        yield made


@pytest.fixture(scope="module")
def module_cluster() -> Iterator[Cluster]:
    import shutil

    from tests.rig import scratch

    directory = scratch("ops-pg-test-")
    cluster = Cluster(18, directory, {"wal_level": "logical"})
    yield cluster
    cluster.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def server(module_cluster: Cluster) -> Iterator[Cluster]:
    yield module_cluster
    module_cluster.sql("select pg_drop_replication_slot(slot_name) from pg_replication_slots")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"slots": ["other_*"]}, "the rule does not allow it"),
        ({"never": ["aband*"]}, "the rule does not allow it"),
        ({"inactive_for": "1h"}, "inactive for"),
        ({"retained_above": "1GiB"}, "bytes of WAL"),
    ],
)
def test_what_the_rule_does_not_mean_is_left_alone_with_the_reason(
    change: dict[str, Any], why: str, at: Any, server: Cluster
) -> None:
    slot(server)
    waited(server)
    plan = at.action(DROP, **(LOW | change)).plan()
    assert plan.changes == ()
    assert why in plan.facts["left_alone"]["abandoned"]


def test_the_rule_has_to_name_slots() -> None:
    with pytest.raises(UsageError, match="slots"):
        DROP.read_parameters({})


def test_the_receivers_own_slot_and_an_active_one_are_never_dropped(at: Any, server: Cluster) -> None:
    slot(server, "ops_wal")
    slot(server, "used")
    waited(server, "used")
    with connected(server, "used"):
        plan = at.action(DROP, **LOW, at_most=20).plan()
        assert plan.changes == ()
        assert plan.facts["left_alone"] == {"ops_wal": "the receiver's own", "used": "somebody is connected to it"}


def test_a_slot_that_became_active_after_the_plan_is_left_alone(at: Any, server: Cluster) -> None:
    slot(server)
    waited(server)
    action = at.action(DROP, **LOW)
    (change,) = action.plan().changes
    with connected(server, "abandoned"):
        checked = action.check(change)
        assert checked is not None
        assert checked.outcome is Outcome.CONTENDED
        assert "connected" in checked.reason
        assert action.apply(change).outcome is Outcome.CONTENDED
    assert there(server)


def test_a_slot_that_moved_or_was_made_anew_is_left_alone(at: Any, server: Cluster) -> None:
    slot(server)
    waited(server)
    action = at.action(DROP, **LOW)
    (change,) = action.plan().changes
    server.sql("select pg_drop_replication_slot('abandoned')")
    assert action.check(change).outcome is Outcome.ALREADY_DONE  # type: ignore[union-attr]
    slot(server)
    waited(server)
    checked = action.check(change)
    assert checked is not None
    assert (checked.outcome, "moved" in checked.reason) == (Outcome.CONTENDED, True)
    assert action.apply(change).outcome is Outcome.CONTENDED
    assert there(server)


def test_the_largest_comes_first_and_at_most_so_many_are_dropped(at: Any, server: Cluster) -> None:
    for name in ("a_large", "b_small", "c_small"):
        slot(server, name)
    waited(server, "c_small")
    result = at.run(DROP, **LOW, at_most=2)
    assert [change.object for change in result.plan.changes] == ["a_large", "b_small"]
    assert result.plan.facts["left_alone"] == {"c_small": "beyond at_most"}
    assert result.plan.population == {"slot": 3}
    assert result.status is Status.DONE
    assert there(server, "c_small")


def test_killed_in_the_middle_the_next_run_drops_the_rest(at: Any, server: Cluster) -> None:
    for name in ("first", "second"):
        slot(server, name)
    waited(server, "second")
    action = at.action(DROP, **LOW, at_most=2)
    plan = action.plan()
    assert action.apply(plan.changes[0]).outcome is Outcome.APPLIED
    assert action.check(plan.changes[0]).outcome is Outcome.ALREADY_DONE  # type: ignore[union-attr]
    assert [c.as_json() for c in at.action(DROP, **LOW, at_most=2).plan().changes] == [plan.changes[1].as_json()]
    assert at.run(DROP, **LOW, at_most=2).status is Status.DONE
    assert not there(server, "second")


def test_verification_notices_a_slot_that_is_still_there(at: Any, server: Cluster) -> None:
    slot(server)
    waited(server)
    action = at.action(DROP, **LOW)
    plan = action.plan()
    assert action.verify(plan, {"abandoned": Applied(Outcome.APPLIED, "said so")}).holds is False


def test_without_a_right_it_says_which(server: Cluster) -> None:
    slot(server)
    waited(server)
    with (
        bench(server, rights="", attributes="replication") as poor,
        pytest.raises(AccessDeniedError, match="not a member of pg_monitor"),
    ):
        poor.run(DROP, **LOW)
    with bench(server, rights="grant pg_monitor to {role}") as poor:
        result = poor.run(DROP, **LOW)
        assert "REPLICATION" in result.plan.facts["missing_right"]
        assert result.status is Status.FAILED
        assert f"ALTER ROLE {poor.role} REPLICATION" in result.outcomes[0][1].reason
    assert there(server)


def test_a_login_that_acts_as_its_group_drops_with_the_replication_of_its_own(server: Cluster) -> None:
    """As docs/how-to/least-privilege-role.md sets up roles that Vault makes: the group has no REPLICATION, and needs none."""
    slot(server)
    waited(server)
    server.sql("create role ops_group nologin; grant pg_monitor to ops_group")
    rights = "grant ops_group to {role}; alter role {role} set role = 'ops_group'"
    with bench(server, rights=rights, attributes="replication") as grouped:
        result = grouped.run(DROP, **LOW)
        assert (result.status, result.counts) == (Status.DONE, {"applied": 1}), result.as_json()
    assert not there(server)


class Standby:
    """A member of the inventory that streams from the primary by a slot of its own, or is down."""

    def __init__(self, primary: Cluster, slot_name: str) -> None:
        from ops_platform.clients.postgres_binaries import PostgresServer, free_port, run_as, run_tool
        from tests.rig import HBA, scratch

        install = primary.server.install
        self.directory = scratch("ops-pg-test-")
        run_as().own(self.directory)
        self.server = PostgresServer(install, self.directory / "data", port=free_port())
        tool = install.tool("pg_basebackup")
        assert tool is not None
        done = run_tool([tool, "-D", self.server.directory, "-X", "stream", "-c", "fast", "-R",
                         "-d", f"host={primary.server.sockets} port={primary.port} user=postgres"])  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.server.configure({"primary_slot_name": slot_name}, hba=HBA)
        self.server.start()

    @property
    def port(self) -> int:
        return self.server.port

    def close(self) -> None:
        import shutil

        self.server.stop("immediate")
        shutil.rmtree(self.directory, ignore_errors=True)


def test_a_standbys_slot_is_left_alone_and_while_one_is_silent_every_physical_one(server: Cluster) -> None:
    slot(server, "standby_1")
    slot(server, "unknown")
    slot(server, "logical", logical=True)
    standby = Standby(server, "standby_1")
    try:
        eventually(lambda: server.sql("select active from pg_replication_slots where slot_name = 'standby_1'"))
        with bench(server, standby, **RIGHTS) as at:
            peers = DROP.peers(at.context(DROP, **LOW))
            assert (peers.healthy, peers.total) == (1, 1)  # type: ignore[union-attr]
            # It is set to use its slot, even while it is not connected.
            standby.server.connect().execute(
                "alter system set primary_conninfo = 'host=127.0.0.1 port=1'"
            ).connection.execute("select pg_reload_conf()")
            server.sql("select pg_terminate_backend(active_pid) from pg_replication_slots where active_pid is not null")
            eventually(lambda: not server.sql("select active from pg_replication_slots where slot_name = 'standby_1'"))
            waited(server, "standby_1")
            plan = at.action(DROP, **LOW, at_most=20).plan()
            assert sorted(change.object for change in plan.changes) == ["logical", "unknown"]
            assert plan.facts["left_alone"] == {"standby_1": "a standby of the inventory is set to use it"}
            assert DROP.peers(at.context(DROP, **LOW)).healthy == 0  # type: ignore[union-attr]
            standby.server.stop("immediate")
            plan = at.action(DROP, **LOW, at_most=20).plan()
            assert [change.object for change in plan.changes] == ["logical"]
            assert "does not answer" in plan.facts["left_alone"]["unknown"]
    finally:
        standby.close()


def test_the_server_itself_refuses_an_active_slot(server: Cluster) -> None:
    """What the playbook leans on in the last moment."""
    slot(server)
    with connected(server, "abandoned"), pytest.raises(psycopg.errors.ObjectInUse):
        server.sql("select pg_drop_replication_slot('abandoned')")
