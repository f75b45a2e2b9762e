"""Expiry against a real store: what is removed is gone, what stays is whole, and what cannot be removed is said.

The backups are made by hand, so that weeks fit into seconds: day 0 is now, and the clock of the action runs ahead of the store's.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ops_platform.actions import ActionResult, Applied, Change, Outcome, Plan, Status
from ops_platform.backup.expiry import ExpiryAction, expire
from ops_platform.backup.gapnotes import GapNote, put_gap
from ops_platform.backup.model import Archive, BackupKind, Block, Lsn, Manifest, Proof, segment_name
from ops_platform.backup.repository import Repository
from ops_platform.backup.running import backup_lock, backup_running
from ops_platform.backup.sealed import seal
from ops_platform.clients.s3 import Lock, S3Store
from ops_platform.errors import RefusedError, UnreachableError, UsageError
from ops_platform.ledger import Ledger
from tests.rig import Cluster, Ground, Platform

SIZE = 1 << 20
DAY = timedelta(days=1)
CLUSTER = 7_000_000_000_000_000_001


@dataclass
class At:
    at: datetime

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        raise AssertionError("expiry does not wait")


@dataclass
class Shop:
    """A target's part of the store, filled by hand; one WAL segment a day."""

    platform: Platform
    zero: datetime = field(default_factory=lambda: datetime.now(UTC))
    ids: dict[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        self.key = self.repository.keys.new_data_key()

    @property
    def repository(self) -> Repository:
        return self.platform.repository

    def day(self, number: float) -> datetime:
        return self.zero + number * DAY

    def clock(self, number: float) -> At:
        return At(self.day(number))

    def backup(
        self,
        name: str,
        parent: str | None = None,
        *,
        cluster: int = CLUSTER,
        timeline: int = 1,
        finish: bool = True,
        redundancy: int = 0,
    ) -> str:
        """`F7` is a full backup of day 7, `I8` an incremental. Two blocks, an index, PostgreSQL's manifest, the manifest last."""
        on, full = float(name[1:]), name.startswith("F")
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        backup_id = f"{self.day(on):%Y%m%dT%H%M%SZ}-{'F' if full else 'I'}-{digest}"
        self.ids[name] = backup_id
        repository, blocks = self.repository, list[Block]()
        for number in range(2):
            place = repository.block_key(backup_id, 0, number)
            stored = seal(f"{name} {number}".encode() * 50, place=place, data_key=self.key)
            repository.store.put(place, stored, retain=True)
            blocks.append(Block(key=place, raw=1024, stored=len(stored), sha256=hashlib.sha256(stored).hexdigest()))
        index = repository.put_part(backup_id, "index", b"{}", self.key)
        pg_manifest = repository.put_part(backup_id, "pg_manifest", b"{}", self.key)
        manifest = Manifest(
            format=1,
            backup_id=backup_id,
            target_id="app-db",
            kind=BackupKind.FULL if full else BackupKind.INCREMENTAL,
            parent_id=self.ids.get(parent, parent) if parent else None,
            why="asked for",
            system_identifier=cluster,
            server_version=180000,
            timeline=timeline,
            start_lsn=str(Lsn(int(on * SIZE) + 40)),
            end_lsn=str(Lsn(int(on * SIZE) + 400)),
            started_at=self.day(on),
            ended_at=self.day(on + 0.1),
            source="127.0.0.1:5432",
            source_role="primary",
            wal_segment_size=SIZE,
            data_checksums=True,
            compression="zstd",
            compress_at="client",
            block_size=1 << 20,
            archives=[Archive(oid=None, location=None, raw=2048, blocks=blocks)],
            index=index,
            pg_manifest=pg_manifest,
            raw=2048,
            stored=sum(block.stored for block in blocks),
            seconds=1.0,
            key=self.key.wrapped,
            written_by="test",
        )
        if finish:
            repository.put_manifest(manifest, self.key)
        return backup_id

    def backups(self, text: str) -> None:
        """`F0 I1<F0 F7`"""
        for word in text.split():
            name, _, parent = word.partition("<")
            self.backup(name, parent or None)

    def wal(self, first: int, last: int, *, timeline: int = 1, cluster: int = CLUSTER) -> None:
        for number in range(first, last + 1):
            meta = {"segment_size": SIZE, "complete_at": self.day(number + 1).isoformat()}
            name = segment_name(timeline, number * SIZE, SIZE)
            self.repository.put_wal(cluster, name, name.encode(), data_key=self.key, meta=meta)

    def proof(self, name: str, verdict: str = "PASS", on: float = 29) -> None:
        body = {
            "target_id": "app-db",
            "backup_id": self.ids[name],
            "verdict": verdict,
            "verified_at": self.day(on),
            "recovery_target": "latest",
            "proven_until": None,
            "rpo_seconds": None,
            "rto_seconds": None,
            "scorecard": "x",
        }
        self.repository.put_proof(Proof.model_validate(body), os.urandom(4).hex(), self.key)

    def left(self) -> set[str]:
        """The finished backups by their names."""
        names = {backup_id: name for name, backup_id in self.ids.items()}
        return {names[info.backup_id] for info in self.repository.infos()}

    def objects(self, name: str) -> int:
        return len(list(self.repository.objects_of(self.ids[name])))

    def segments(self, cluster: int = CLUSTER, timeline: int = 1) -> list[int]:
        found = self.repository.wal_listing(cluster)
        return [int(item.name[16:], 16) for item in found if item.timeline == timeline and not item.history]

    def expire(self, on: float = 30, **more: Any) -> ActionResult:
        platform = self.platform
        return expire(platform.access, platform.target, actor="tester", clock=self.clock(on), **more)

    def action(self, on: float = 30, **more: Any) -> ExpiryAction:
        return ExpiryAction(self.repository, self.platform.target, clock=self.clock(on), **more)

    def ledger(self) -> Ledger:
        return Ledger(self.platform.access.platform_db)


@pytest.fixture(scope="module")
def database(shared_cluster: Cluster) -> Iterator[str]:
    """The platform's database, for the ledger."""
    name = "expiry_ledger"
    shared_cluster.sql(f"create database {name} owner ops_backup")
    yield name
    shared_cluster.sql(f"drop database {name} with (force)")


@pytest.fixture
def new_shop(new_platform: Callable[..., Platform], shared_cluster: Cluster, database: str) -> Callable[..., Shop]:
    """A target whose policy enforces, keeps a week and one full backup, and has no limits worth the name."""
    with closing(shared_cluster.server.connect(database)) as connection:
        connection.execute("drop schema if exists ops_ledger cascade")

    def make(*, expiry: dict[str, Any] | None = None, target: dict[str, Any] | None = None, **more: Any) -> Shop:
        rules = {"mode": "enforce", "max_count": 100, "max_percent": 100, **(expiry or {})}
        backup = {"recovery_window": "7d", "minimum_redundancy": 1, "expiry": rules}
        platform = new_platform({"app-db": [shared_cluster]}, extra={"backup": backup, **(target or {})}, **more)
        platform.body["platform"]["database"] = {
            "host": "127.0.0.1",
            "port": shared_cluster.port,
            "dbname": database,
            "user": "ops_backup",
            "password": f"file://{platform.home}/password",
            "tls": {"mode": "disable"},
        }
        platform.reload()
        return Shop(platform)

    return make


def outcomes(result: ActionResult, shop: Shop) -> dict[str, str]:
    names = {backup_id: name for name, backup_id in shop.ids.items()}
    return {names.get(change.object, change.object): applied.outcome.value for change, applied in result.outcomes}


# The whole way


def test_what_nothing_promises_goes_and_the_rest_stays_whole(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    shop.backups("F0 I1<F0 F7 I8<F7 F14 I15<F14 F21 I22<F21")
    shop.wal(0, 29)
    put_gap(shop.repository, CLUSTER, GapNote(1, *[segment_name(1, 3 * SIZE, SIZE)] * 2, "lost", shop.day(4)))
    put_gap(shop.repository, CLUSTER, GapNote(1, *[segment_name(1, 40 * SIZE, SIZE)] * 2, "lost", shop.day(40)))
    shop.proof("I8")
    result = shop.expire()
    assert (result.status, result.ok) == (Status.DONE, True), result.verification
    assert shop.left() == {"F7", "I8", "F21", "I22"}
    assert [shop.objects(name) for name in ("F0", "I1", "F14", "I15")] == [0, 0, 0, 0]
    assert [shop.objects(name) for name in ("F7", "I8", "F21", "I22")] == [5, 5, 5, 5]
    assert shop.segments() == list(range(7, 30)), "the proven backup needs its WAL from day 7 on"
    notes = [info.key for info in shop.repository.store.list(f"app-db/wal/{CLUSTER}/gaps/")]
    assert len(notes) == 1
    assert notes[0].endswith(f"{segment_name(1, 40 * SIZE, SIZE)}.json")
    assert outcomes(result, shop)["F14"] == "applied"
    assert result.plan.facts["last_proven"] == shop.ids["I8"]
    with shop.ledger() as ledger:
        assert ledger.verify().ok
        kinds = [entry.kind for entry in ledger.entries(subject="app-db")]
        assert kinds == ["action.plan", *["action.outcome"] * 5, "action.verification"]
        assert {check["name"]: check["holds"] for check in ledger.entries()[-1].body["verification"]["checks"]} == {
            "removed": True,
            "kept backups": True,
            "recovery window": True,
            "redundancy": True,
            "last proven backup": True,
        }
    again = shop.expire()
    assert (again.status, again.plan.changes) == (Status.NOTHING, ())


def test_timelines_are_followed_and_histories_stay(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    shop.backup("F0")
    shop.wal(0, 10)
    history = f"1\t{Lsn(10 * SIZE + 500)}\tno reason\n".encode()
    shop.repository.put_wal(CLUSTER, "00000002.history", history, data_key=shop.key, meta={})
    shop.wal(10, 29, timeline=2)
    shop.backup("F12", timeline=2)
    shop.backup("F21", timeline=2)
    assert shop.expire(18).plan.changes == (), "the window begins before the second full backup"
    result = shop.expire(30)
    assert result.status is Status.DONE, result.verification
    assert (shop.left(), shop.segments(timeline=1), shop.segments(timeline=2)) == ({"F21"}, [], list(range(21, 30)))
    assert [item.name for item in shop.repository.wal_listing(CLUSTER) if item.history] == ["00000002.history"]


def test_the_wal_of_a_cluster_that_is_no_more_goes_as_a_whole(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    old = CLUSTER - 1
    shop.backup("F0", cluster=old)
    shop.wal(0, 3, cluster=old)
    shop.repository.put_wal(old, "00000002.history", b"1\t0/5000000\tx\n", data_key=shop.key, meta={})
    shop.backups("F4 F21")
    shop.wal(4, 29)
    result = shop.expire()
    assert result.status is Status.DONE, result.verification
    assert outcomes(result, shop)[f"wal/{old}"] == "applied"
    assert list(shop.repository.store.list(f"app-db/wal/{old}/")) == []
    assert shop.left() == {"F21"}


def test_real_backups_expire_and_the_last_can_be_restored(
    new_platform: Callable[..., Platform], shared_cluster: Cluster
) -> None:
    from ops_platform.backup.basebackup import run_backup
    from ops_platform.backup.engine import open_engine
    from tests.rig import scratch

    platform = new_platform({"app-db": [shared_cluster]}, extra={"backup": {"minimum_redundancy": 1}})
    first = run_backup(platform.access, platform.target, kind="full")
    second = run_backup(platform.access, platform.target, kind="full")
    clock = At(datetime.now(UTC) + 30 * DAY)
    engine = open_engine(platform.access, platform.target)
    make = engine.expire()
    assert make is not None
    action: Any = make(platform.repository, platform.target, clock=clock)
    plan: Plan = action.plan()
    assert [change.object for change in plan.of_kind("backup")] == [first.backup_id]
    done = {change.object: action.check(change) or action.apply(change) for change in plan.changes}
    assert {applied.outcome for applied in done.values()} == {Outcome.APPLIED}
    assert action.verify(plan, done).holds
    (left,) = engine.list()
    assert left.backup_id == second.backup_id
    assert engine.window().pieces
    place = scratch("ops-restore-")
    try:
        engine.fetch_base(left, place / "data")
    finally:
        import shutil

        shutil.rmtree(place)


# Guards


def test_observing_removes_nothing_and_the_shown_plan_can_be_approved(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop(expiry={"mode": "observe"})
    shop.backups("F0 F7 F14 F21")
    shop.wal(0, 29)
    shown = shop.expire()
    assert (shown.status, shop.left()) == (Status.OBSERVED, {"F0", "F7", "F14", "F21"})
    assert len(shop.segments()) == 30
    alone = shop.expire(mode="enforce")
    assert alone.status is Status.REFUSED, "the inventory says observe"
    assert [ruling.guard for ruling in alone.refusals] == ["approval"]
    assert shop.expire(mode="enforce", approve="0" * 64).status is Status.REFUSED
    assert len(shop.left()) == 4
    # A day later the plan is the same, because nothing else would be removed.
    done = shop.expire(30.5, mode="enforce", approve=shown.plan.digest)
    assert (done.status, shop.left()) == (Status.DONE, {"F21"})
    with shop.ledger() as ledger:
        verdicts = [entry.body["verdict"] for entry in ledger.entries(kind="action.plan")]
    assert verdicts == ["observed", "refused", "refused", "apply"]


def test_what_is_enforced_can_be_looked_at_first(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    shop.backups("F0 F21")
    assert (shop.expire(mode="observe").status, shop.left()) == (Status.OBSERVED, {"F0", "F21"})
    with pytest.raises(UsageError, match="no mode"):
        shop.expire(mode="force")


@pytest.mark.parametrize(
    ("expiry", "target", "guard"),
    [
        ({"max_count": 2}, {}, "count of backup"),
        ({"max_percent": 74}, {}, "share of backup"),
        ({}, {"legal_hold": True}, "legal hold"),
    ],
)
def test_a_limit_refuses_the_whole_plan_and_never_the_preview(
    new_shop: Callable[..., Shop], expiry: dict[str, Any], target: dict[str, Any], guard: str
) -> None:
    shop = new_shop(expiry=expiry, target=target)
    shop.backups("F0 F7 F14 F21")
    shop.wal(0, 29)
    result = shop.expire()
    assert (result.status, [ruling.guard for ruling in result.refusals]) == (Status.REFUSED, [guard])
    assert (len(shop.left()), len(shop.segments())) == (4, 30)
    preview = shop.expire(mode="observe")
    assert (preview.status, len(preview.plan.changes)) == (Status.OBSERVED, 4)
    assert [ruling.guard for ruling in preview.refusals] == [guard]


def test_without_a_ledger_nothing_is_removed(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    shop.backups("F0 F21")
    shop.platform.body["platform"].pop("database")
    shop.platform.reload()
    assert shop.expire(mode="observe").status is Status.OBSERVED
    with pytest.raises((UsageError, RefusedError), match="database"):
        shop.expire()
    shop.platform.body["platform"]["database"] = {
        "host": "127.0.0.1",
        "port": 1,
        "user": "ops_backup",
        "password": f"file://{shop.platform.home}/password",
        "tls": {"mode": "disable"},
    }
    shop.platform.reload()
    with pytest.raises(UnreachableError):
        shop.expire()
    assert shop.left() == {"F0", "F21"}


def test_the_last_proven_backup_is_never_removed(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    shop.backups("F0 I1<F0 F7 F21")
    shop.proof("I1", on=5)
    shop.proof("F7", "FAIL", on=8)
    shop.proof("F21", "COULD_NOT_VERIFY", on=22)
    shop.expire()
    assert shop.left() == {"F0", "I1", "F21"}
    shop.proof("F21", on=31)
    shop.expire(32)
    assert shop.left() == {"F21"}


# What cannot be read, what died


def test_a_manifest_that_cannot_be_read_is_reported_and_left_alone(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    shop.backups("F0 F7 F14 F21")
    shop.wal(0, 29)
    key = shop.repository.manifest_key(shop.ids["F7"])
    raw = shop.repository.store.get(key)
    shop.repository.store.put(key, raw.replace(b'"raw": 2048', b'"raw": 2049'))
    result = shop.expire()
    assert result.status is Status.DONE, result.verification
    assert result.plan.facts["unreadable"] == [shop.ids["F7"]]
    assert "authentication failed" in " ".join(result.plan.facts["notes"])
    assert shop.left() == {"F7", "F21"}
    assert len(shop.segments()) == 30, "nobody knows what it needs"


def test_a_proof_that_cannot_be_read_keeps_its_backup(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    shop.backups("F0 F7 F21")
    shop.repository.store.put(f"app-db/proof/{shop.ids['F7']}/20260101T000000Z-x.json", b"spoiled")
    shop.expire()
    assert shop.left() == {"F7", "F21"}


def upload(shop: Shop, key: str) -> None:
    """A multipart upload that nobody finishes."""
    answer = shop.repository.store._call("POST", key, query={"uploads": ""})  # type: ignore[attr-defined]
    assert answer.status == 200, answer.body


def test_what_dead_runs_left_goes_unless_a_backup_is_running(
    new_shop: Callable[..., Shop], shared_cluster: Cluster
) -> None:
    shop = new_shop()
    shop.backup("F3", finish=False)
    shop.backup("F21")
    shop.backup("F29.5", finish=False)  # less than a day ago
    upload(shop, "app-db/backup/x/data")
    store = shop.repository.store
    store.put("app-db/backup/somebody-elses/file", b"x")
    platform = shop.platform

    with backup_lock(platform.access, platform.target):
        assert backup_running(platform.access, platform.target)
        held = shop.expire()
        assert (held.status, shop.objects("F3")) == (Status.NOTHING, 4)
        assert "a backup is running" in " ".join(held.plan.facts["notes"])
    assert backup_running(platform.access, platform.target) is None

    fresh = shop.action(0.5, running=lambda: None).plan()
    assert fresh.changes == (), "the upload has just begun"
    action = shop.action()
    assert "was not asked" in " ".join(action.plan().facts["notes"])

    hosts = platform.body["targets"][0]["connection"]["hosts"]
    hosts.append({"host": "127.0.0.1", "port": 1})
    platform.reload()
    unknown = shop.expire()
    assert (unknown.status, shop.objects("F3")) == (Status.NOTHING, 4)
    assert "cannot be told" in " ".join(unknown.plan.facts["notes"])
    hosts.pop()
    platform.reload()

    result = shop.expire()
    assert result.status is Status.DONE, result.verification
    assert sorted(change.kind for change, _ in result.outcomes) == ["dead-run", "upload"]
    assert (shop.objects("F3"), shop.objects("F29.5"), shop.left()) == (0, 4, {"F21"})
    assert list(platform.repository.store.incomplete_uploads("app-db/")) == []
    assert platform.repository.store.head("app-db/backup/somebody-elses/file") is not None
    assert "somebody-elses" in " ".join(result.plan.facts["notes"])


def test_a_backup_that_begins_after_the_plan_keeps_dead_runs_alive(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    shop.backup("F3", finish=False)
    shop.backup("F21")
    running: list[str] = []
    action = shop.action(running=lambda: running[0] if running else None)
    clock: Any = action._clock
    (change,) = action.plan().changes
    assert action.check(change) is None
    running.append("pid 17")
    assert_contended(action.check(change), "pid 17")
    running.clear()
    clock.at = shop.day(0.5)  # by which it was put half a day ago
    assert_contended(action.check(change), "was put into it")
    clock.at = shop.day(30)
    shop.backup("F3")  # it was not dead: it has just finished
    assert_contended(action.check(change), "a manifest")


# The moment before each removal


def assert_contended(applied: Applied | None, why: str) -> None:
    assert applied is not None
    assert applied.outcome is Outcome.CONTENDED
    assert why in applied.reason


def changes(plan: Plan, shop: Shop) -> dict[str, Change]:
    names = {backup_id: name for name, backup_id in shop.ids.items()}
    return {names.get(change.object, change.kind): change for change in plan.changes}


def test_a_backup_on_which_a_new_one_builds_is_not_removed(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    shop.backups("F0 F7 F21")
    shop.wal(0, 29)
    action = shop.action()
    planned = changes(action.plan(), shop)
    assert action.check(planned["F0"]) is None
    shop.backup("I29", "F7")
    assert_contended(action.check(planned["F7"]), shop.ids["I29"])
    assert action.check(planned["F0"]) is None
    assert_contended(action.check(planned["wal"]), "needs it")


def test_a_verdict_that_comes_in_stops_the_plan(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    shop.backups("F0 F7 F21")
    action = shop.action()
    planned = changes(action.plan(), shop)
    shop.proof("F21", "FAIL")
    assert_contended(action.check(planned["F0"]), "a verdict")


def test_a_kept_backup_that_vanishes_stops_the_plan(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    shop.backups("F0 F7 F21")
    action = shop.action()
    planned = changes(action.plan(), shop)
    shop.repository.store.delete(shop.repository.manifest_key(shop.ids["F21"]))
    assert_contended(action.check(planned["F0"]), shop.ids["F21"])
    # And a new plan keeps the newest of those that are left.
    assert set(changes(shop.action().plan(), shop)) == {"F0"}


def test_a_backup_that_cannot_be_read_stops_the_plan(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    shop.backups("F0 F7 F21")
    action = shop.action()
    planned = changes(action.plan(), shop)
    shop.repository.store.put(shop.repository.manifest_key(f"{shop.day(22):%Y%m%dT%H%M%SZ}-I-00000000"), b"{")
    assert_contended(action.check(planned["F0"]), "cannot be read")


def test_wal_waits_for_the_backups_that_need_it(new_shop: Callable[..., Shop]) -> None:
    """The plan removes F0 and then its WAL: a WAL that went first would leave a backup that restores nothing."""
    shop = new_shop()
    shop.backups("F0 F21")
    shop.wal(0, 29)
    action = shop.action()
    planned = changes(action.plan(), shop)
    assert_contended(action.check(planned["wal"]), shop.ids["F0"])
    action.apply(planned["F0"])
    assert action.check(planned["wal"]) is None


def test_what_is_gone_already_is_done(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    shop.backups("F0 F21")
    first, second = shop.action(), shop.action()
    change, same = changes(first.plan(), shop)["F0"], changes(second.plan(), shop)["F0"]
    assert first.apply(change).outcome is Outcome.APPLIED
    applied = second.check(same)
    assert applied is not None
    assert applied.outcome is Outcome.ALREADY_DONE


def test_nothing_is_removed_without_a_plan(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    shop.backups("F0 F21")
    change = changes(shop.action().plan(), shop)["F0"]
    with pytest.raises(RefusedError):
        shop.action().check(change)


# Faults

_KILLED = """
import os, signal, sys
from pathlib import Path
from datetime import datetime
from ops_platform.backup.expiry import expire
from ops_platform.clients.access import Access
from ops_platform.clients.s3 import S3Store
from ops_platform.inventory import load
from tests.integration.test_expiry import At

delete, left = S3Store.delete, [int(sys.argv[2])]
def dying(self, key):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return delete(self, key)
S3Store.delete = dying
access = Access(load(Path(os.environ["OPS_INVENTORY"])))
expire(access, access.inventory.targets[0], actor="doomed", clock=At(datetime.fromisoformat(sys.argv[1])))
"""


def test_a_run_that_is_killed_leaves_nothing_that_counts_and_the_next_finishes(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    shop.backups("F0 F7 F21")
    shop.wal(0, 29)
    died = subprocess.run(
        [sys.executable, "-c", _KILLED, shop.day(30).isoformat(), "1"], env=shop.platform.env, check=False
    )
    assert died.returncode == -signal.SIGKILL
    # The manifest of the first was removed, and nothing more: half a backup is none.
    assert shop.left() == {"F0", "F21"}
    assert (shop.objects("F7"), shop.objects("F0"), len(shop.segments())) == (4, 5, 30)
    with shop.ledger() as ledger:
        assert [entry.kind for entry in ledger.entries(kind="action.")] == ["action.plan"]
    result = shop.expire()
    assert result.status is Status.DONE, result.verification
    assert outcomes(result, shop) == {"F0": "applied", "F7": "applied", f"wal/{CLUSTER}/00000001": "applied"}
    assert (shop.left(), shop.objects("F7"), shop.segments()[0]) == ({"F21"}, 0, 21)


def test_a_store_that_does_not_answer_is_not_an_empty_one(new_shop: Callable[..., Shop]) -> None:
    shop = new_shop()
    store: Any = shop.repository.store
    nowhere = S3Store(replace(store._settings, endpoint="https://127.0.0.1:1", retries=0))
    repository = Repository(nowhere, shop.repository.keys, "app-db")
    with pytest.raises(UnreachableError):
        ExpiryAction(repository, shop.platform.target, clock=shop.clock(30)).plan()


@pytest.mark.parametrize(
    ("harm", "check", "said"),
    [
        ("block", "kept backups", "1 objects are not there"),
        ("manifest", "kept backups", "the manifest cannot be read"),
        ("full", "kept backups", "its manifest is gone"),
        ("full", "kept backups", "on which it builds, is gone"),
        ("full", "redundancy", "0 full backups are there"),
        ("full", "last proven backup", "is gone"),
        ("wal", "recovery window", "lost"),
        ("rest", "removed", "something is still there"),
    ],
)
def test_verification_finds_what_is_missing(new_shop: Callable[..., Shop], harm: str, check: str, said: str) -> None:
    shop = new_shop()
    shop.backups("F0 F7 F21 I22<F21")
    shop.wal(0, 29)
    shop.proof("F21")
    action, store = shop.action(), shop.repository.store
    plan = action.plan()
    done = {change.object: action.check(change) or action.apply(change) for change in plan.changes}
    assert action.verify(plan, done).holds
    if harm == "block":
        store.delete(shop.repository.block_key(shop.ids["I22"], 0, 1))
    elif harm == "manifest":
        store.put(shop.repository.manifest_key(shop.ids["I22"]), b"{}")
    elif harm == "wal":
        store.delete(shop.repository.wal_key(CLUSTER, segment_name(1, 25 * SIZE, SIZE)))
    elif harm == "full":
        store.delete(shop.repository.manifest_key(shop.ids["F21"]))
    else:
        store.put(shop.repository.block_key(shop.ids["F0"], 0, 1), b"x")
    found = action.verify(plan, done)
    assert found.holds is False
    assert said in {one.name: one.detail for one in found.checks if one.holds is False}[check]


# Object Lock


def test_what_the_store_locks_is_pinned_and_nothing_around_it_breaks(
    new_shop: Callable[..., Shop], ground: Ground
) -> None:
    ground.store("", "expiry-locked", lock=Lock("COMPLIANCE", timedelta(hours=1))).close()
    lock = {"object_lock": {"mode": "COMPLIANCE", "retain": "1h"}, "bucket": "expiry-locked"}
    shop = new_shop(store=lock)
    shop.backups("F0 I1<F0 F21")
    shop.wal(0, 29)
    result = shop.expire()
    assert (result.status, result.ok) == (Status.DONE, True), result.verification
    assert outcomes(result, shop) == {"I1": "pinned", "F0": "pinned", f"wal/{CLUSTER}/00000001": "pinned"}
    assert "Object Lock keeps it until" in result.outcomes[0][1].reason
    assert (shop.left(), shop.objects("I1"), len(shop.segments())) == ({"F0", "I1", "F21"}, 5, 30)


def test_wal_that_is_locked_stops_the_removal_where_it_begins(new_shop: Callable[..., Shop], ground: Ground) -> None:
    """The WAL of the first days was put without a lock; what follows must not be taken out from behind what is locked."""
    ground.store("", "expiry-locked", lock=Lock("COMPLIANCE", timedelta(hours=1))).close()
    lock = {"object_lock": {"mode": "COMPLIANCE", "retain": "1h"}, "bucket": "expiry-locked"}
    shop = new_shop(store=lock)
    store: Any = shop.repository.store
    locked, store._settings = store._settings, replace(store._settings, lock=None)
    shop.backups("F21")
    shop.wal(0, 5)
    store._settings = locked
    shop.wal(6, 29)
    result = shop.expire()
    assert result.status is Status.DONE, result.verification
    ((_, applied),) = result.outcomes
    assert (applied.outcome, applied.detail) == (Outcome.PINNED, {"deleted": 6, "pinned": 15, "left": 0})
    assert shop.segments() == list(range(6, 30))
