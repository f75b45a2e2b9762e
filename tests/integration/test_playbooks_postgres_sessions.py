"""Ending sessions idle in a transaction and cancelling runaway queries, on real servers."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from ops_platform.actions import Applied, Outcome, Status
from ops_platform.errors import AccessDeniedError
from ops_platform.remediation.playbook import playbook
from tests.integration.playbook_rig import Bench, bench
from tests.integration.wal_rig import eventually
from tests.rig import Cluster

END, CANCEL = playbook("postgres.end_idle_sessions"), playbook("postgres.cancel_query")
RIGHTS = "grant pg_read_all_stats, pg_signal_backend to {role}"
SECRET = "maria.muster@example.com"


@pytest.fixture
def at(shared_cluster: Cluster) -> Iterator[Bench]:
    with bench(shared_cluster, rights=RIGHTS) as made:
        yield made


class Client:
    """Somebody's session, which is told what to do."""

    def __init__(
        self, cluster: Cluster, application: str | None = None, user: str | None = None, dbname: str = "postgres"
    ) -> None:
        self.application = application or f"shop {secrets.token_hex(4)}"
        self.user = user or f"u_{secrets.token_hex(4)}"
        if user is None:
            cluster.sql(f'create role "{self.user}" login; grant pg_read_all_data, pg_write_all_data to "{self.user}"')
        self.connection = cluster.server.connect(dbname, self.user, autocommit=True, application_name=self.application)
        self.pid = self.connection.info.backend_pid

    def idle(self, *statements: str) -> Client:
        self.connection.execute("begin")
        for statement in statements or ("select 1",):
            self.connection.execute(statement)
        return self

    def runs(self, statement: str) -> threading.Thread:
        """Starts it and does not wait; what becomes of it is in `error`."""
        self.error: psycopg.Error | None = None

        def go() -> None:
            try:
                self.connection.execute(statement)
            except psycopg.Error as error:
                self.error = error

        thread = threading.Thread(target=go, daemon=True)
        thread.start()
        return thread

    def lost(self) -> bool:
        try:
            self.connection.execute("select 1")
        except psycopg.OperationalError:
            return True
        return False

    def close(self) -> None:
        with contextlib.suppress(psycopg.Error):
            self.connection.close()


@pytest.fixture
def client(shared_cluster: Cluster) -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def make(cluster: Cluster = shared_cluster, **more: Any) -> Client:
        made.append(Client(cluster, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


def activity(cluster: Cluster, pid: int, what: str = "state") -> Any:
    return cluster.sql(f"select {what} from pg_stat_activity where pid = %s", "postgres", pid)


def soon(**more: Any) -> dict[str, Any]:
    return {"older_than": "1s", **more}


def old(cluster: Cluster, client: Client) -> Client:
    """Waits until it has been as it is for more than a second."""
    eventually(lambda: activity(cluster, client.pid, "clock_timestamp() - state_change > interval '1.05 s'"))
    return client


@pytest.mark.majors
@pytest.mark.parametrize("major", [14, 18])
def test_an_idle_session_is_ended_by_a_role_with_the_stated_rights_alone(
    major: int, new_cluster: Callable[..., Cluster], client: Callable[..., Client]
) -> None:
    cluster = new_cluster(major)
    cluster.sql("create table orders (i int); insert into orders values (1)")
    cluster.sql('create role "Jürgen ""🛒""" login; grant update, select on orders to "Jürgen ""🛒"""')
    idle = client(cluster, application="sh'o\"p", user='Jürgen "🛒"').idle("update orders set i = 2")
    busy = client(cluster).idle()
    busy.connection.execute("commit")
    old(cluster, idle)
    with bench(cluster, rights=RIGHTS) as at:
        result = at.run(END, older_than="1s")
        assert (result.status, result.counts) == (Status.DONE, {"applied": 1}), result
        before = result.plan.changes[0].before
        assert (before["user"], before["application"]) == ('Jürgen "🛒"', "sh'o\"p")
        assert idle.lost()
        assert not busy.lost()
        assert cluster.sql("select i from orders") == 1
        again = at.run(END, older_than="1s")
        assert again.status is Status.NOTHING
        assert "action.verification" in [e.kind for e in at.ledger.entries() if e.seq in result.recorded]


def test_what_others_wait_for_comes_first_and_only_it_where_the_rule_says_so(
    at: Bench, client: Callable[..., Client], shared_cluster: Cluster
) -> None:
    table = f"t_{secrets.token_hex(4)}"
    shared_cluster.sql(f"create table {table} as select 1 as i")
    harmless = client().idle()
    blocker = client().idle(f"update {table} set i = 2")
    old(shared_cluster, harmless), old(shared_cluster, blocker)
    victim = client()
    thread = victim.runs(f"update {table} set i = 3")
    eventually(lambda: activity(shared_cluster, victim.pid, "wait_event_type") == "Lock")
    plan = at.action(END, **soon()).plan()
    assert plan.changes[0].before["pid"] == blocker.pid
    assert plan.facts["session"][0]["blocks"] == 1
    assert harmless.pid in [change.before["pid"] for change in plan.changes]
    first = at.action(END, **soon(at_most=1)).plan()
    assert [change.before["pid"] for change in first.changes] == [blocker.pid]
    assert first.facts["left_alone"]["beyond at_most"] >= 1
    result = at.run(END, **soon(only_blocking=True))
    assert [change.before["pid"] for change in result.plan.changes] == [blocker.pid]
    assert result.status is Status.DONE
    thread.join(30)
    assert victim.error is None
    assert shared_cluster.sql(f"select i from {table}") == 3
    assert not harmless.lost()


def test_a_session_that_went_back_to_work_is_left_alone(
    at: Bench, client: Callable[..., Client], shared_cluster: Cluster
) -> None:
    one = old(shared_cluster, client().idle())
    action = at.action(END, **soon())
    (change,) = [c for c in action.plan().changes if c.before["pid"] == one.pid]
    one.connection.execute("select 1")
    checked = action.check(change)
    assert checked is not None
    assert checked.outcome is Outcome.CONTENDED
    # The signal itself looks, too: between check and apply it may go back to work as well.
    assert action.apply(change).outcome is Outcome.CONTENDED
    assert not one.lost()


def test_a_process_id_that_was_given_to_another_session_is_never_hit(
    at: Bench, client: Callable[..., Client], shared_cluster: Cluster
) -> None:
    """The system gives a process id again when it likes: so the plan is changed to name another start instead."""
    one = old(shared_cluster, client().idle())
    action = at.action(END, **soon())
    (change,) = [c for c in action.plan().changes if c.before["pid"] == one.pid]
    for field in ("backend_start", "xact_start"):
        before = {**change.before, field: "2026-01-01T00:00:00.000000+00:00"}
        other = type(change)(change.kind, change.object, before, None, reversible=False)
        checked = action.check(other)
        assert checked is not None
        assert checked.outcome is Outcome.ALREADY_DONE
        assert action.apply(other).outcome is Outcome.CONTENDED
    assert not one.lost()


def test_a_transaction_that_ended_by_itself_is_done(
    at: Bench, client: Callable[..., Client], shared_cluster: Cluster
) -> None:
    one = old(shared_cluster, client().idle())
    action = at.action(END, **soon())
    plan = action.plan()
    (change,) = [c for c in plan.changes if c.before["pid"] == one.pid]
    one.connection.execute("commit")
    one.idle()
    checked = action.check(change)
    assert checked is not None
    assert checked.outcome is Outcome.ALREADY_DONE
    assert not one.lost()


def test_spared_users_and_applications_superusers_and_our_own_are_left_alone(
    at: Bench, client: Callable[..., Client], shared_cluster: Cluster
) -> None:
    user, dump, ours, root, base = (
        client(),
        client(application="pg_dump 18"),
        client(application="ops_platform"),
        client(user="postgres", application="root"),
        client(),
    )
    for one in (user, dump, ours, root, base):
        old(shared_cluster, one.idle())
    plan = at.action(END, older_than="1s", never_users=[user.user]).plan()
    planned = {change.before["pid"] for change in plan.changes}
    assert base.pid in planned
    assert planned & {user.pid, dump.pid, ours.pid, root.pid} == set()
    assert plan.facts["left_alone"]["of superusers"] >= 1
    assert plan.facts["left_alone"]["by the rule"] >= 3
    assert at.action(END, older_than="1s", databases=["other*"]).plan().changes == ()


@pytest.mark.parametrize("book", [END, CANCEL], ids=lambda book: book.name)
def test_without_a_right_it_says_which(book: Any, shared_cluster: Cluster, client: Callable[..., Client]) -> None:
    idle = old(shared_cluster, client().idle())
    running = client()
    running.runs("select pg_sleep(60)")
    old(shared_cluster, running)
    with bench(shared_cluster, rights="grant pg_signal_backend to {role}") as at:
        with pytest.raises(AccessDeniedError, match="not a member of pg_read_all_stats") as refused:
            at.run(book, **soon())
        assert f"GRANT pg_read_all_stats TO {at.role}" in str(refused.value)
    with bench(shared_cluster, rights="grant pg_read_all_stats to {role}") as at:
        result = at.run(book, **soon())
        assert "pg_signal_backend" in result.plan.facts["missing_right"]
        assert result.status is Status.FAILED
        assert {applied.outcome for _, applied in result.outcomes} == {Outcome.FAILED}
        assert f"GRANT pg_signal_backend TO {at.role}" in result.outcomes[0][1].reason
    assert not idle.lost()
    shared_cluster.sql("select pg_cancel_backend(%s)", "postgres", running.pid)


def test_killed_in_the_middle_the_next_run_ends_the_rest(
    at: Bench, client: Callable[..., Client], shared_cluster: Cluster
) -> None:
    both = [old(shared_cluster, client(application="again").idle()) for _ in range(2)]
    action = at.action(END, **soon())
    mine = [c for c in action.plan().changes if c.before["pid"] in {one.pid for one in both}]
    assert action.apply(mine[0]).outcome is Outcome.APPLIED
    rest = at.action(END, **soon()).plan()
    left = [c for c in rest.changes if c.before["pid"] in {one.pid for one in both}]
    assert [change.as_json() for change in left] == [mine[1].as_json()]
    assert action.check(mine[0]).outcome is Outcome.ALREADY_DONE  # type: ignore[union-attr]
    assert at.run(END, **soon()).status is Status.DONE
    assert all(one.lost() for one in both)


def test_verification_notices_a_session_that_is_still_there(
    at: Bench, client: Callable[..., Client], shared_cluster: Cluster
) -> None:
    old(shared_cluster, client().idle())
    action = at.action(END, **soon())
    plan = action.plan()
    claimed = {change.object: Applied(Outcome.APPLIED, "said so") for change in plan.changes}
    assert action.verify(plan, claimed).holds is False


# Runaway queries


@pytest.mark.majors
@pytest.mark.parametrize("major", [14, 18])
def test_a_runaway_query_is_cancelled_and_its_text_is_nowhere(
    major: int, new_cluster: Callable[..., Cluster], client: Callable[..., Client]
) -> None:
    cluster = new_cluster(major, {"compute_query_id": "on"})
    runaway, short = client(cluster), client(cluster)
    thread = runaway.runs(f"select '{SECRET}', pg_sleep(120)")
    old(cluster, runaway)
    with bench(cluster, rights=RIGHTS) as at:
        result = at.run(CANCEL, older_than="1s")
        assert (result.status, result.counts) == (Status.DONE, {"applied": 1}), result
        assert result.plan.changes[0].before["query_id"].lstrip("-").isdigit()
        thread.join(30)
        assert isinstance(runaway.error, psycopg.errors.QueryCanceled)
        assert not runaway.lost()
        assert not short.lost()
        assert SECRET not in at.written(result)
        assert SECRET not in str(result.as_json())
        assert "pg_sleep" not in str(result.as_json()) + at.written(result)
        assert at.run(CANCEL, older_than="1s").status is Status.NOTHING


def test_a_query_that_ended_before_is_done_and_the_next_one_of_its_session_is_not_hit(
    at: Bench, client: Callable[..., Client], shared_cluster: Cluster
) -> None:
    one = client()
    thread = one.runs("select pg_sleep(120)")
    old(shared_cluster, one)
    action = at.action(CANCEL, **soon())
    (change,) = [c for c in action.plan().changes if c.before["pid"] == one.pid]
    shared_cluster.sql("select pg_cancel_backend(%s)", "postgres", one.pid)
    thread.join(30)
    thread = one.runs("select pg_sleep(120)")
    eventually(lambda: activity(shared_cluster, one.pid) == "active")
    assert action.check(change).outcome is Outcome.ALREADY_DONE  # type: ignore[union-attr]
    assert action.apply(change).outcome is Outcome.CONTENDED
    assert activity(shared_cluster, one.pid) == "active"
    shared_cluster.sql("select pg_cancel_backend(%s)", "postgres", one.pid)
    thread.join(30)


def test_maintenance_is_left_alone_unless_the_rule_says_otherwise(
    at: Bench, client: Callable[..., Client], shared_cluster: Cluster
) -> None:
    table = f"t_{secrets.token_hex(4)}"
    shared_cluster.sql(f"create table {table} as select generate_series(1, 1000) as i")
    holder = client(application="holder").idle(f"insert into {table} values (0)")
    builder = client(user="postgres")
    thread = builder.runs(f"create index concurrently on {table} (i)")
    old(shared_cluster, builder)
    with bench(shared_cluster, rights=None) as root:
        planned = root.action(CANCEL, **soon()).plan()
        assert builder.pid not in [c.before["pid"] for c in planned.changes]
        planned = root.action(CANCEL, **soon(maintenance=True)).plan()
        assert builder.pid in [c.before["pid"] for c in planned.changes]
    holder.connection.execute("commit")
    thread.join(60)
    assert builder.error is None


def test_a_query_that_does_not_obey_loses_its_session_only_where_the_rule_says_so(
    new_cluster: Callable[..., Cluster], client: Callable[..., Client]
) -> None:
    """A function that catches the cancellation: PostgreSQL lets it do so where it is written to."""
    cluster = new_cluster(18)
    cluster.sql("""
        create function stubborn() returns void language plpgsql as $$
        begin
          loop
            begin perform pg_sleep(60); exception when query_canceled then null; end;
          end loop;
        end $$""")
    stubborn = client(cluster)
    stubborn.runs("select stubborn()")
    old(cluster, stubborn)
    with bench(cluster, rights=RIGHTS) as at:
        result = at.run(CANCEL, older_than="1s", wait="1s")
        assert result.status is Status.FAILED
        assert "does not obey" in result.outcomes[0][1].reason
        result = at.run(CANCEL, older_than="1s", wait="1s", terminate=True)
        assert result.status is Status.DONE, result
        assert "session was ended" in result.outcomes[0][1].reason


def test_only_queries_of_the_named_ids_are_cancelled(
    new_cluster: Callable[..., Cluster], client: Callable[..., Client]
) -> None:
    cluster = new_cluster(18, {"compute_query_id": "on"})
    one, other = client(cluster), client(cluster)
    one.runs("select pg_sleep(100)")
    other.runs("select 1, pg_sleep(100)")
    old(cluster, one), old(cluster, other)
    with bench(cluster, rights=RIGHTS) as at:
        wanted = activity(cluster, one.pid, "query_id")
        result = at.run(CANCEL, older_than="1s", query_ids=[wanted])
        assert [change.before["pid"] for change in result.plan.changes] == [one.pid]
        assert activity(cluster, other.pid) == "active"
