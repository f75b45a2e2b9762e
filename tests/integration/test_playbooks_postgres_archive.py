"""Rebuilding the archive after its slot was lost, with a real server, store and key service."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from ops_platform.actions import Action, Applied, Change, Outcome, Status, run_action
from ops_platform.backup.archive import archive_status
from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.engine import open_engine
from ops_platform.backup.receiver import Receiver
from ops_platform.errors import AccessDeniedError, RefusedError
from ops_platform.ledger import Ledger
from ops_platform.remediation.playbook import Context, playbook
from tests.integration.playbook_rig import ENFORCE, INCIDENT
from tests.integration.wal_rig import eventually
from tests.rig import PASSWORD, Cluster, Platform

REBUILD = playbook("postgres.rebuild_wal_archive")
SMALL = {"max_slot_wal_keep_size": "2MB", "max_wal_size": "4MB", "min_wal_size": "2MB", "wal_keep_size": "0"}


class Site:
    """A target with one backup, on which playbooks run as a role that has the given rights and no more."""

    def __init__(self, cluster: Cluster, new_platform: Callable[..., Platform], rights: str, attributes: str) -> None:
        self.cluster = cluster
        self.role = f"ops_{secrets.token_hex(4)}"
        cluster.sql(f"create role {self.role} login {attributes} password '{PASSWORD.replace(chr(39), chr(39) * 2)}'")
        if rights:
            cluster.sql(f"grant {rights} to {self.role}")
        self.platform = new_platform({"app-db": [cluster]}, extra={"connection": {"user": self.role}})
        self.access, self.target = self.platform.access, self.platform.target
        self.ledger = Ledger(lambda: cluster.server.connect(autocommit=False))

    def action(self, **parameters: Any) -> Action:
        read = REBUILD.read_parameters(parameters)
        return REBUILD.action(Context(self.access, self.target, read, INCIDENT, datetime(2026, 3, 2, tzinfo=UTC)))

    def run(self, **parameters: Any) -> Any:
        return run_action(self.action(**parameters), ledger=self.ledger, guards=[ENFORCE], actor="tester")

    def slot(self) -> None:
        self.cluster.sql("select pg_create_physical_replication_slot('ops_wal', true)")

    def write(self) -> None:
        self.cluster.sql("create table if not exists noise (t text)")
        self.cluster.sql("insert into noise select md5(i::text) || repeat('x', 150) from generate_series(1, 60000) i")
        self.cluster.sql("checkpoint")

    def lose(self) -> None:
        self.slot()
        self.write()
        assert self.slot_status() == "lost"

    def slot_status(self) -> str | None:
        return self.cluster.sql("select wal_status from pg_replication_slots where slot_name = 'ops_wal'")


@pytest.fixture
def site(new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]) -> Callable[..., Site]:
    def make(major: int = 18, *, rights: str = "pg_monitor", attributes: str = "replication", **settings: str) -> Site:
        cluster = new_cluster(major, {**SMALL, **settings}, initdb=("--wal-segsize=1",))
        return Site(cluster, new_platform, rights, attributes)

    return make


@pytest.mark.majors
@pytest.mark.parametrize("major", [14, 18])
def test_a_lost_slot_is_made_anew_and_a_backup_reaches_behind_the_gap_with_the_stated_rights_alone(
    major: int, site: Callable[..., Site]
) -> None:
    at = site(major)
    first = run_backup(at.access, at.target)
    at.lose()
    result = at.run()
    assert [change.kind for change in result.plan.changes] == ["slot", "backup"]
    assert "lost" in result.plan.facts["slot"]
    assert "can be restored" in result.plan.facts["lost"]
    assert (result.status, result.counts) == (Status.DONE, {"applied": 2}), result.as_json()
    assert {check.name for check in result.verification.checks} == {"slot", "backup", "gaps"}
    assert at.slot_status() == "reserved"
    window = open_engine(at.access, at.target).window()
    (gap,) = window.gaps
    assert gap.recovery_again_from == result.outcomes[1][1].detail["backup_id"] != first.backup_id
    assert at.run().status is Status.NOTHING


def test_a_receiver_takes_the_new_slot_up_and_streams(site: Callable[..., Site]) -> None:
    at = site()
    run_backup(at.access, at.target)
    at.lose()
    assert at.run().status is Status.DONE
    receiver = Receiver(at.access, [at.target], most_backoff=0.5)
    receiver.start()
    try:
        eventually(lambda: receiver.states[0].phase == "streaming", why=lambda: receiver.states)
        action = at.action()
        plan = action.plan()
        assert plan.changes == ()
        slot = Change("slot", "slot ops_wal", None, None, reversible=False)
        whole = type(plan)(plan.action, plan.target_id, (slot,), plan.created_at)
        checked = action.verify(whole, {"slot ops_wal": Applied(Outcome.APPLIED, "made")})
        assert (checked.holds, "streams from it" in checked.checks[0].detail) == (True, True)
    finally:
        receiver.stop()
        assert receiver.join(30)


def test_with_nothing_to_mend_nothing_is_done(site: Callable[..., Site]) -> None:
    at = site()
    at.slot()
    run_backup(at.access, at.target)
    assert at.run().status is Status.NOTHING


def test_a_missing_slot_is_made_and_where_nothing_was_lost_no_backup_is_taken(site: Callable[..., Site]) -> None:
    at = site()
    run_backup(at.access, at.target)
    result = at.run()
    assert [change.kind for change in result.plan.changes] == ["slot", "backup"]
    assert result.plan.facts["slot"] == "missing"
    assert result.status is Status.DONE
    assert at.slot_status() == "reserved"
    # The new slot begins within what is archived: the backup that was there is good.
    assert result.counts in ({"applied": 1, "already_done": 1}, {"applied": 2})


def test_a_slot_that_keeps_too_much_is_given_up_only_where_the_rule_says_so(site: Callable[..., Site]) -> None:
    at = site(max_slot_wal_keep_size="-1")
    run_backup(at.access, at.target)
    at.slot()
    at.write()
    assert at.run().status is Status.NOTHING
    result = at.run(give_up_lag_above="4MiB")
    assert "nobody reads from it" in result.plan.facts["slot"]
    assert result.plan.facts["retained_bytes"] > 4 << 20
    assert (result.status, result.counts) == (Status.DONE, {"applied": 2}), result.as_json()


def test_a_slot_that_became_active_after_the_plan_is_left_alone(site: Callable[..., Site]) -> None:
    at = site(max_slot_wal_keep_size="-1")
    run_backup(at.access, at.target)
    at.slot()
    at.write()
    action = at.action(give_up_lag_above="4MiB")
    slot = action.plan().changes[0]
    receiver = Receiver(at.access, [at.target], most_backoff=0.5)
    receiver.start()
    try:
        eventually(lambda: at.cluster.sql("select active from pg_replication_slots"), why=lambda: receiver.states)
        assert action.check(slot).outcome is Outcome.ALREADY_DONE  # type: ignore[union-attr]
        assert action.apply(slot).outcome is Outcome.CONTENDED
        assert at.slot_status() != "lost"
    finally:
        receiver.stop()
        assert receiver.join(30)


def test_killed_between_slot_and_backup_the_next_run_takes_the_backup(site: Callable[..., Site]) -> None:
    at = site()
    run_backup(at.access, at.target)
    at.lose()
    action = at.action()
    slot, backup = action.plan().changes
    assert action.apply(slot).outcome is Outcome.APPLIED
    assert action.check(slot).outcome is Outcome.ALREADY_DONE  # type: ignore[union-attr]
    rest = at.action().plan()
    assert [change.as_json() for change in rest.changes] == [backup.as_json()]
    result = at.run()
    assert (result.status, result.counts) == (Status.DONE, {"applied": 1})


def test_a_logical_slot_of_that_name_is_somebody_elses(site: Callable[..., Site]) -> None:
    at = site(wal_level="logical")
    at.cluster.sql("select pg_create_logical_replication_slot('ops_wal', 'test_decoding')")
    with pytest.raises(RefusedError, match="is a logical one"):
        at.run()


def test_a_login_that_acts_as_its_group_makes_the_slot_with_the_replication_of_its_own(
    site: Callable[..., Site],
) -> None:
    """As docs/how-to/least-privilege-role.md sets up roles that Vault makes: the group has no REPLICATION, and needs none."""
    at = site(rights="")
    at.cluster.sql("create role ops_group nologin; grant pg_monitor to ops_group")
    at.cluster.sql(f"grant ops_group to {at.role}; alter role {at.role} set role = 'ops_group'")
    run_backup(at.access, at.target)
    at.lose()
    result = at.run()
    assert (result.status, result.counts) == (Status.DONE, {"applied": 2}), result.as_json()
    assert at.slot_status() == "reserved"


def test_without_a_right_it_says_which(site: Callable[..., Site]) -> None:
    at = site(rights="", attributes="replication")
    with pytest.raises(AccessDeniedError, match="pg_monitor"):
        at.run()
    at = site(attributes="")
    result = at.run()
    assert "REPLICATION" in result.plan.facts["missing_right"]
    assert result.status is Status.FAILED
    assert f"ALTER ROLE {at.role} REPLICATION" in result.outcomes[0][1].reason


def test_verification_notices_a_slot_and_a_backup_that_are_not_there(site: Callable[..., Site]) -> None:
    at = site()
    run_backup(at.access, at.target)
    at.lose()
    action = at.action()
    plan = action.plan()
    claimed = {change.object: Applied(Outcome.APPLIED, "said so") for change in plan.changes}
    checked = action.verify(plan, claimed)
    assert {check.name: check.holds for check in checked.checks}["slot"] is False
    at.cluster.sql("select pg_drop_replication_slot('ops_wal'), pg_create_physical_replication_slot('ops_wal', true)")
    checked = action.verify(plan, claimed)
    assert {check.name: check.holds for check in checked.checks} == {"slot": True, "gaps": False}
    assert archive_status(at.access, at.target).slot is not None
