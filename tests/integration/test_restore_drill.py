"""The shipped restore drill on real servers: from the repository to a server that serves, and nothing of it left behind."""

from __future__ import annotations

import contextlib
import secrets
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

from ops_platform.backup.archive import archive_status
from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.opening import open_target_repository
from ops_platform.backup.receiver import Receiver
from ops_platform.backup.replicate import replicate
from ops_platform.clients.postgres import connect
from ops_platform.clients.processes import stop
from ops_platform.drills.begin import Beginner, in_earnest
from ops_platform.drills.model import DrillState
from ops_platform.drills.scorecard import card_of
from ops_platform.drills.steps.basics import processes_with
from ops_platform.inventory.model import at_copy
from tests.drill_rig import Held, held_on
from tests.rig import Cluster, Platform, eventually, small_disk


@pytest.fixture
def held(new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]) -> Held:
    return held_on(
        new_cluster(18), new_platform, [{"id": "monthly", "runbook": "restore-drill", "targets": ["app-db"]}]
    )


@contextlib.contextmanager
def receiving(held: Held) -> Iterator[None]:
    """A WAL receiver at work, which has stored what there is."""
    receiver = Receiver(held.platform.access, [held.platform.target], most_backoff=0.5)
    receiver.start()
    try:
        eventually(lambda: archive_status(held.platform.access, held.platform.target).slot, why="no slot")
        yield
    finally:
        receiver.stop()
        assert receiver.join(60)


def test_a_restore_drill_serves_measures_and_leaves_nothing(held: Held) -> None:
    held.cluster.sql("create table t as select generate_series(1, 20000) n")
    with receiving(held):
        run_backup(held.platform.access, held.platform.target)
        drill = held.drill("monthly", seconds_before=4)
    card = card_of(drill)
    assert card is not None
    assert drill.state is DrillState.ENDED
    assert (drill.verdict, card.ending) == ("PASS", "completed"), [(s.id, s.state, s.said) for s in card.steps]
    by_name = {objective.name: objective for objective in card.objectives}
    assert by_name["rto"].met is by_name["rpo"].met is True
    assert by_name["rto"].confidence == by_name["rpo"].confidence == "measured", by_name
    assert {check.step for check in card.checks} == {"repository", "rpo", "data"}
    (backup,) = card.backups
    assert backup["sha256"] == held.platform.repository.manifest_digest(backup["id"]), "as proofs name it"
    assert card.backups[0]["bytes"] > 0
    assert [probe.attempts > 10 for probe in card.probes] == [True]
    assert all(resource.gone for resource in card.teardown)
    assert not (held.platform.home / "drills" / drill.id).exists()
    assert held.cluster.sql("select count(*) from ops_canary.drill_writes") == 0
    entry = held.ledger.entries(kind="drill.scorecard")[-1]
    assert entry.body["verdict"] == "PASS"
    assert held.ledger.verify().ok


def test_the_first_site_is_gone_and_the_copy_serves(held: Held) -> None:
    """What came after the last copying is the loss, and nothing but the copy's store and keys is used."""
    platform = held.platform
    key = platform.home / "copy.key"
    key.write_text(secrets.token_hex(32))
    key.chmod(0o600)
    platform.body["key_services"]["c"] = {"kind": "file", "path": str(key)}
    platform.body["stores"]["c"] = {**platform.body["stores"]["s"], "prefix": f"{platform.prefix}-copy"}
    platform.body["targets"][0]["repository"]["copies"] = [{"id": "second-site", "store": "c", "keys": "c"}]
    platform.body["drills"]["plan"].append(
        {"id": "site", "runbook": "site-drill", "targets": ["app-db"], "mode": "enforce"}
    )
    platform.reload()
    held = Held(held.cluster, platform)
    held.cluster.sql("create table t as select generate_series(1, 20000) n")
    with receiving(held):
        run_backup(platform.access, platform.target)
        replicate(platform.access, platform.target, "second-site")
        drill = held.drill("site", seconds_before=4)
    card = card_of(drill)
    assert card is not None
    assert (drill.verdict, drill.scenario) == ("PASS", "site-gone"), [(s.id, s.state, s.said) for s in card.steps]
    (rpo,) = [objective for objective in card.objectives if objective.name == "rpo"]
    assert rpo.measured is not None
    assert rpo.measured >= 4  # all that was written while the drill let it run had not been copied
    assert (
        card.backups[0]["id"]
        == open_target_repository(platform.access, at_copy(platform.target, "second-site")).finished()[-1]
    )
    assert all(resource.gone for resource in card.teardown)


def test_a_recovery_in_earnest_leaves_a_server_that_serves(held: Held) -> None:
    """Approved by a second person; what it made stays, and the target is not asked."""
    held.cluster.sql("create table t as select generate_series(1, 1000) n")
    run_backup(held.platform.access, held.platform.target)
    access, into = held.platform.access, held.platform.home / "recovered"
    request = in_earnest(access, "restore-drill", "app-db", {"into": str(into)}, operator="ann")
    beginner = Beginner(access, held.store)
    digest = beginner.plan(request).plan.digest
    assert beginner.begin(request).drill is None
    held.store.approve(digest, "app-db", who="bob", valid_for=timedelta(hours=1))
    begun = beginner.begin(request).drill
    assert begun is not None
    held.cluster.server.stop("immediate")
    held.cluster.server.start()  # the ledger stands in the same cluster
    drill = held.engine.run(begun.id)
    card = card_of(drill)
    assert card is not None
    try:
        assert (drill.mode, drill.verdict) == ("real", "PASS"), [(s.id, s.state, s.said) for s in card.steps]
        assert {resource.kept for resource in card.teardown if resource.kind == "process"} == {True}
        port = int((into / "port").read_text())
        login = access.login(held.platform.target.connection)
        with connect(login, "127.0.0.1", port) as connection:
            assert connection.execute("select count(*) from t").fetchone() == (1000,)
    finally:
        for process in processes_with(str(into / "data")):
            assert stop(process, signal.SIGINT)


def test_a_drill_whose_target_has_no_backup_is_refused(held: Held) -> None:
    begun = held.begin("monthly")
    assert begun.drill is None
    refused = {ruling.guard: ruling.reason for ruling in begun.result.rulings if not ruling.allows}
    assert set(refused) == {"preflight"}
    assert not (held.platform.home / "drills").exists()


def test_a_disk_that_is_too_small_fails_the_drill_in_clear_words_and_nothing_stays(held: Held) -> None:
    run_backup(held.platform.access, held.platform.target)
    with small_disk("16m") as disk:
        held.platform.body["drills"]["workspace"] = str(disk / "drills")
        held.platform.reload()
        small = Held(held.cluster, held.platform)
        drill = small.drill("monthly", seconds_before=0.2)
        card = card_of(drill)
        assert card is not None
        assert (card.verdict, card.ending) == ("FAIL", "failed")
        assert "are needed" in card.reason
        assert "B are free: " in card.reason
        assert all(resource.gone for resource in card.teardown)
        assert list((disk / "drills").iterdir()) == []
    assert held.cluster.sql("select count(*) from ops_canary.drill_writes") == 0
