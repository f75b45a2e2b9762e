"""The shipped restore drill on real servers: from the repository to a server that serves, and nothing of it left behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from ops_platform.backup.archive import archive_status
from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.receiver import Receiver
from ops_platform.drills.model import DrillState
from ops_platform.drills.scorecard import card_of
from tests.drill_rig import Held, held_on
from tests.rig import Cluster, Platform, eventually


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
    assert card.backups[0]["sha256"]
    assert card.backups[0]["bytes"] > 0
    assert [probe.attempts > 10 for probe in card.probes] == [True]
    assert all(resource.gone for resource in card.teardown)
    assert not (held.platform.home / "drills" / drill.id).exists()
    assert held.cluster.sql("select count(*) from ops_canary.drill_writes") == 0
    entry = held.ledger.entries(kind="drill.scorecard")[-1]
    assert entry.body["verdict"] == "PASS"
    assert held.ledger.verify().ok
