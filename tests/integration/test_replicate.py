"""The second site: a copy that opens with its own store and key service alone, whole or not there, and never taken for more than it is."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterInstance
from pydantic import TypeAdapter

from ops_platform.actions import Outcome
from ops_platform.backup import replicate as room
from ops_platform.backup.archive import read_archive
from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.copykeys import CopyKeys
from ops_platform.backup.expiry import ExpiryAction
from ops_platform.backup.model import Lsn, Proof, no_progress
from ops_platform.backup.opening import open_target_repository
from ops_platform.backup.receiver import receive_range
from ops_platform.backup.replicate import Inspected, Replicated, inspect, replicate, standing
from ops_platform.backup.repository import Repository
from ops_platform.backup.sealed import read_header, seal
from ops_platform.clients.keys import DataKey
from ops_platform.clients.vault import FileKeys
from ops_platform.clock import SystemClock
from ops_platform.definitions import build_defs
from ops_platform.errors import CorruptionError, OpsError, UnreachableError
from ops_platform.inventory.model import Target, at_copy
from ops_platform.promises import judge
from ops_platform.recovery.model import Verdict
from ops_platform.recovery.verify import verify
from tests.rig import Cluster, Ground, Platform, scratch
from tests.stores_rig import MovedClock

OPS = str(Path(sys.executable).with_name("ops"))
SITE = "second-site"


class Sites:
    """A cluster with a full backup, an incremental, and WAL after both, in a store and under keys that a copy knows nothing of."""

    def __init__(self, ground: Ground, home: Path) -> None:
        self.home = home
        self.cluster = Cluster(18, home, {"wal_keep_size": "1GB"})
        self.platform = Platform(ground, {"app-db": [self.cluster]})
        self.first = dict(self.platform.body["stores"]["s"])
        self.cluster.sql("create table t as select i, md5(i::text) from generate_series(1, 20000) i")
        self.full = run_backup(self.platform.access, self.platform.target)
        self.cluster.sql("insert into t select i, 'later' from generate_series(1, 5000) i")
        self.incremental = run_backup(self.platform.access, self.platform.target)
        self.archive_more()
        self.new_copy()

    def archive_more(self) -> None:
        self.cluster.sql("insert into t select i, 'more' from generate_series(1, 100) i")
        begin = max(item.end for item in self.archive.ranges)
        end = Lsn.parse(self.cluster.sql("select pg_current_wal_flush_lsn()::text"))
        receive_range(self.platform.access, self.platform.target, begin, end, 1)

    @property
    def archive(self) -> Any:
        archive = read_archive(self.source)
        assert archive is not None
        return archive

    def new_copy(self, **copy: Any) -> None:
        """An empty second site."""
        name = uuid.uuid4().hex[:12]
        key = self.home / f"{name}.key"
        key.write_text(random.Random(name).randbytes(32).hex())
        key.chmod(0o600)
        body = self.platform.body
        body["stores"]["c"] = {**self.first, "prefix": name}
        body["key_services"]["c"] = {"kind": "file", "path": str(key)}
        body["targets"][0]["repository"]["copies"] = [{"id": SITE, "store": "c", "keys": "c", **copy}]
        self.platform.reload()

    @property
    def target(self) -> Target:
        return self.platform.target

    @property
    def source(self) -> Repository:
        return open_target_repository(self.platform.access, self.platform.target)

    @property
    def copy(self) -> Repository:
        return open_target_repository(self.platform.access, at_copy(self.target, SITE))

    def replicate(self) -> Replicated:
        return replicate(self.platform.access, self.target, SITE)

    def inspect(self) -> Inspected:
        return inspect(self.platform.access, self.target, SITE)

    def ops(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [OPS, *words], env=self.platform.env, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == code, done.stderr + done.stdout
        assert "Traceback" not in done.stderr
        return done


@pytest.fixture(scope="module")
def made(ground: Ground) -> Iterator[Sites]:
    home = scratch("ops-pg-test-")
    sites = Sites(ground, home)
    yield sites
    sites.platform.close()
    sites.cluster.stop()
    shutil.rmtree(home)


@pytest.fixture
def sites(made: Sites) -> Sites:
    made.new_copy()
    return made


def flipped(body: bytes) -> bytes:
    return body[:-20] + bytes([body[-20] ^ 1]) + body[-19:]


# A copy of everything


def test_a_copy_is_the_repository_to_the_byte_but_for_its_proofs(sites: Sites) -> None:
    done = sites.replicate()
    assert done.whole
    assert done.backups == [sites.full.backup_id, sites.incremental.backup_id]
    assert (done.until, done.behind_seconds) == (done.source_until, 0)
    here = {info.key: info.size for info in sites.source.store.list("app-db/")}
    there = {info.key: info.size for info in sites.copy.store.list("app-db/")}
    own = {key for key in there if key.startswith("app-db/keys/")}
    assert own
    assert {key: size for key, size in there.items() if key not in own} == here
    assert all(sites.source.store.get(key) == sites.copy.store.get(key) for key in here)
    assert (done.objects, done.bytes) == (len(here), sum(here.values()))
    again = sites.replicate()
    assert (again.objects, again.backups, again.wrong) == (0, [], [])
    read = sites.inspect()
    assert read.whole
    assert read.objects == len(here) - 2  # the manifests are read, too


def test_the_first_sites_key_service_is_not_asked(sites: Sites) -> None:
    sites.replicate()
    body = sites.platform.body
    body["vaults"]["v"]["url"] = "http://127.0.0.1:1"
    body["stores"]["s"] = {**sites.first, "endpoint": "https://127.0.0.1:1"}
    sites.platform.reload()
    try:
        assert sites.inspect().whole
        card = verify(sites.platform.access, at_copy(sites.target, SITE), alone=True)
        assert card.verdict is Verdict.PASS, card.reason
        assert card.picked == "the newest backup and all WAL, with nothing but the repository"
        assert [proof.backup_id for proof in sites.copy.proofs()] == [sites.incremental.backup_id]
    finally:
        body["vaults"]["v"]["url"] = f"http://127.0.0.1:{sites.platform.ground.place.port('vault')}"
        body["stores"]["s"] = sites.first
        sites.platform.reload()


def test_on_the_day_without_the_first_site_the_copy_is_the_repository(sites: Sites, tmp_path: Path) -> None:
    """With an inventory that knows nothing else: backups go on there, under the keys of the copy itself."""
    sites.replicate()
    body, before = sites.platform.body, json.dumps(sites.platform.body)
    body["stores"] = {"c": body["stores"]["c"]}
    body["key_services"] = {"c": body["key_services"]["c"]}
    body["vaults"] = {}
    body["targets"][0]["repository"] = {"store": "c", "keys": "c", "is_copy": True}
    sites.platform.reload()
    try:
        into = scratch("ops-restore-") / "data"
        sites.ops("restore", "app-db", "--latest", "--into", str(into))
        assert (into / "PG_VERSION").read_text() == "18\n"
        shutil.rmtree(into.parent)
        taken = run_backup(sites.platform.access, sites.target)
        card = verify(sites.platform.access, sites.target, backup_id=taken.backup_id)
        assert card.verdict is Verdict.PASS, card.reason
    finally:
        sites.platform.body = json.loads(before)
        sites.platform.reload()


def test_the_stand_alone_script_reads_a_copy(sites: Sites, tmp_path: Path) -> None:
    sites.replicate()
    store = sites.copy.store
    for info in store.list("app-db/"):
        file = tmp_path / info.key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(store.get(info.key))
    script = Path(__file__).parents[2] / "docs" / "standalone_restore.py"
    words = [sys.executable, str(script), str(tmp_path), "app-db"]
    into = tmp_path / "data"
    full = ["--backup", sites.full.backup_id, "--into", str(into)]
    key = {"OPS_KEY_FILE": sites.platform.body["key_services"]["c"]["path"]}
    listed = subprocess.run(words, env=os.environ | key, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in listed.splitlines()] == [sites.full.backup_id, sites.incremental.backup_id]
    subprocess.run([*words, *full], env=os.environ | key, capture_output=True, check=True)
    assert (into / "PG_VERSION").read_text() == "18\n"


def test_proofs_stay_where_they_were_made(sites: Sites) -> None:
    source = sites.source
    moment = datetime.now(UTC)
    proof = Proof(
        target_id="app-db", backup_id=sites.full.backup_id, verdict="PASS", verified_at=moment, recovery_target="latest",
        proven_until=moment, rpo_seconds=1, rto_seconds=1, scorecard="app-db/scorecard/none.json",
    )  # fmt: skip
    source.put_proof(proof, "v1", source.keys.new_data_key())
    try:
        sites.replicate()
        assert [info.proof for info in sites.copy.infos()] == [None, None]
    finally:
        for info in list(source.store.list("app-db/proof/")):
            source.store.delete(info.key)


def test_what_comes_later_follows(sites: Sites) -> None:
    sites.replicate()
    before = standing(sites.platform.access, sites.target, SITE)
    sites.archive_more()
    done = sites.replicate()
    assert 0 < done.objects < 5
    assert before is not None
    assert done.until is not None
    assert done.until > before


def test_an_unfinished_segment_is_replaced_and_goes_when_the_whole_one_is_there(sites: Sites) -> None:
    sites.cluster.sql("select pg_switch_wal()")  # nothing else that writes may fill the segment meanwhile
    sites.archive_more()
    sites.replicate()
    partial = [item for item in sites.copy.wal_listing() if item.partial]
    assert len(partial) == 1
    sites.archive_more()
    sites.replicate()
    key = partial[0].info.key
    assert sites.copy.store.get(key) == sites.source.store.get(key)
    sites.cluster.sql("select pg_switch_wal()")
    sites.archive_more()
    sites.replicate()
    assert sites.source.store.head(key) is None
    assert sites.copy.store.head(key) is None
    assert sites.copy.store.head(key.removesuffix(".partial")) is not None


# Faults


class Failing:
    """The copy's store, which is gone after so many puts."""

    def __init__(self, store: Any, puts: int) -> None:
        self._store, self._left = store, puts

    def put(self, *words: Any, **more: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise UnreachableError("gone", where="the second site")
        return self._store.put(*words, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def copying(sites: Sites, puts: int) -> room._Copying:
    there = sites.copy
    store: Any = Failing(there.store, puts)
    keys = CopyKeys(sites.platform.access.keys("c"), store, "app-db")
    return room._Copying(sites.source, Repository(store, keys, "app-db"), 2, no_progress)


@pytest.mark.parametrize("puts", [0, 2, 6, 13])
def test_broken_off_anywhere_no_backup_is_there_in_part_and_the_next_run_completes_it(sites: Sites, puts: int) -> None:
    with pytest.raises(UnreachableError):
        copying(sites, puts).run()
    for manifest in sites.copy.backups():
        assert sites.copy.chain(manifest.backup_id)
        assert all(sites.copy.authenticated(part.key, part.stored, part.sha256) for part in manifest.named)
    done = sites.replicate()
    assert done.whole
    assert sites.copy.finished() == sites.source.finished()
    assert sites.inspect().whole


def test_a_damaged_block_is_not_copied_and_neither_is_what_builds_on_it(sites: Sites) -> None:
    store, block = sites.source.store, sites.full.archives[0].blocks[0]
    good = store.get(block.key)
    store.put(block.key, flipped(good))
    try:
        done = sites.replicate()
        assert sites.copy.finished() == []
        assert len(done.wrong) == 2
        assert block.key in done.wrong[0]
        assert "SHA-256 differs" in done.wrong[0]
        assert f"builds on {sites.full.backup_id}" in done.wrong[1]
        refused = sites.ops("backup", "replicate", "app-db", code=1)
        assert block.key in refused.stdout
    finally:
        store.put(block.key, good)
    assert sites.replicate().whole


def test_a_damaged_segment_is_named_and_the_others_are_copied(sites: Sites) -> None:
    store = sites.source.store
    key = next(item.info.key for item in sites.source.wal_listing() if not item.partial)
    good = store.get(key)
    store.put(key, flipped(good))
    try:
        (wrong,) = sites.replicate().wrong
        assert wrong.startswith(key)
        assert sites.copy.store.head(key) is None
    finally:
        store.put(key, good)
    assert sites.replicate().whole
    assert sites.copy.store.get(key) == good


@pytest.mark.parametrize("which", ["block", "wal", "manifest", "missing", "swapped"])
def test_damage_at_the_copy_is_found_by_reading_it(sites: Sites, which: str) -> None:
    sites.replicate()
    store = sites.copy.store
    blocks = sites.full.archives[0].blocks
    wal = next(item.info.key for item in sites.copy.wal_listing() if not item.partial)
    key = {"wal": wal, "manifest": sites.copy.manifest_key(sites.full.backup_id)}.get(which, blocks[0].key)
    if which == "missing":
        store.delete(key)
    elif which == "swapped":
        store.put(key, store.get(blocks[1].key))
    elif which == "manifest":
        store.put(key, store.get(key).replace(b'"seconds": ', b'"seconds": 1'))
    else:
        store.put(key, flipped(store.get(key)))
    (wrong,) = sites.inspect().wrong
    assert key in wrong
    done = sites.ops("backup", "replicate", "app-db", "--check", "--json", code=1)
    assert TypeAdapter(list[Inspected]).validate_json(done.stdout)[0].wrong == [wrong]


def test_another_thing_under_a_name_of_ours_is_not_overwritten(sites: Sites) -> None:
    key = next(item.info.key for item in sites.source.wal_listing() if not item.partial)
    sites.copy.store.put(key, b"of somebody else")
    (wrong,) = set(sites.replicate().wrong)
    assert wrong == f"{key}: the copy holds another thing under this name"
    assert sites.copy.store.get(key) == b"of somebody else"


def test_a_key_that_was_exchanged_opens_nothing(sites: Sites) -> None:
    sites.replicate()
    store = sites.copy.store
    held = [info.key for info in store.list("app-db/keys/")]
    assert len(held) >= 2
    bodies = [json.loads(store.get(key)) for key in held]
    for key, body, other in zip(held, bodies, bodies[1:] + bodies[:1], strict=True):
        store.put(key, json.dumps({**body, "here": other["here"]}).encode())
    assert len(sites.inspect().wrong) >= 2
    store.put(held[0], b"{}")
    with pytest.raises(CorruptionError, match="cannot be read"):
        sites.copy.keys.unwrap(bodies[0]["wrapped"])


def test_a_second_site_that_is_away_is_an_error_and_not_an_empty_copy(sites: Sites) -> None:
    sites.platform.body["stores"]["c"]["endpoint"] = "https://127.0.0.1:1"
    sites.platform.reload()
    for words in (["replicate", "app-db"], ["replicate", "app-db", "--check"], ["list", "app-db", "--copy", SITE]):
        done = sites.ops("backup", *words, code=1)
        assert "127.0.0.1:1" in done.stderr
        assert done.stdout == ""


def test_the_copys_keys_are_needed(sites: Sites) -> None:
    sites.replicate()
    path = Path(sites.platform.body["key_services"]["c"]["path"])
    path.write_text("00" * 32)
    sites.platform.reload()
    assert all("does not open" in line for line in sites.inspect().wrong)
    path.unlink()
    sites.platform.reload()
    with pytest.raises(OpsError, match="no such key file"):
        sites.inspect()


def test_what_the_copy_has_expired_is_not_brought_back(sites: Sites) -> None:
    newer = run_backup(sites.platform.access, sites.target, kind="full")
    sites.replicate()
    for backup_id in (sites.full.backup_id, sites.incremental.backup_id):
        for info in list(sites.copy.objects_of(backup_id)):
            sites.copy.store.delete(info.key)
    before = [item for item in sites.copy.wal_listing() if not item.partial and room._before(item, newer)]
    assert before
    for item in before:
        sites.copy.store.delete(item.info.key)
    done = sites.replicate()
    assert (done.objects, done.backups, done.wrong) == (0, [], [])
    for info in list(sites.source.objects_of(newer.backup_id)):
        sites.source.store.delete(info.key)


def test_expiring_a_copy_goes_by_the_same_promises(sites: Sites) -> None:
    sites.replicate()
    done = sites.ops("backup", "expire", "app-db", "--copy", SITE, "--dry-run", "--json")
    (plan,) = json.loads(done.stdout)
    assert plan["status"] == "nothing to do"


def held(sites: Sites) -> set[str]:
    """The data keys that the copy keeps, as the first site wraps them."""
    store = sites.copy.store
    return {json.loads(store.get(info.key))["wrapped"] for info in store.list("app-db/keys/")}


def sealed_with(sites: Sites) -> dict[str, str]:
    """Of each WAL file of the copy the key that it needs."""
    store = sites.copy.store
    keys = [item.info.key for item in sites.copy.wal_listing()]
    return {key: read_header(store.get(key), place=key).key for key in keys}


@dataclass
class Aged:
    """The copy a year later, when another full backup has made the first ones useless."""

    sites: Sites
    days: int = 400

    def action(self, repository: Repository | None = None) -> ExpiryAction:
        policy = self.sites.target.backup.model_copy(update={"minimum_redundancy": 1})
        target = at_copy(self.sites.target, SITE).model_copy(update={"backup": policy})
        return ExpiryAction(repository or self.sites.copy, target, clock=MovedClock(timedelta(days=self.days)))

    def expire(self, repository: Repository | None = None) -> dict[str, Outcome]:
        action = self.action(repository)
        return {
            change.object: (action.check(change) or action.apply(change)).outcome for change in action.plan().changes
        }


@pytest.fixture
def aged(sites: Sites) -> Iterator[Aged]:
    sites.cluster.sql("select pg_switch_wal()")
    sites.archive_more()
    newer = run_backup(sites.platform.access, sites.target, kind="full")
    sites.replicate()
    yield Aged(sites)
    for info in list(sites.source.objects_of(newer.backup_id)):
        sites.source.store.delete(info.key)


def test_data_keys_go_from_the_copy_with_the_last_that_needs_them_and_no_other_does(aged: Aged) -> None:
    sites = aged.sites
    before, needs = held(sites), sealed_with(sites)
    backups = {sites.copy.any_manifest(one.backup_id).key for one in (sites.full, sites.incremental)}
    done = aged.expire()
    assert set(done.values()) == {Outcome.APPLIED}
    assert {sites.full.backup_id, sites.incremental.backup_id, "keys"} < done.keys()
    left = sealed_with(sites)
    of_wal = {needs[key] for key in needs.keys() - left.keys()} - set(left.values())
    assert of_wal
    assert held(sites) == before - backups - of_wal
    assert sites.inspect().whole
    assert sites.replicate().objects == 0
    assert aged.expire() == {}


def test_a_data_key_stays_while_what_was_sealed_with_it_stays(aged: Aged) -> None:
    sites = aged.sites
    listed = [item.info.key for item in sites.copy.wal_listing()]
    old, young = sites.source.store.get(listed[0]), sites.source.store.get(listed[-1])
    # The newest file of the archive, sealed with the key of the oldest.
    plain, header = sites.source.opened_wal(listed[0], old), read_header(young, place=listed[-1])
    key = DataKey(sites.source.keys.unwrap(plain.header.key), plain.header.key)
    opened = sites.source.opened_wal(listed[-1], young).plain
    sites.copy.store.put(listed[-1], seal(opened, place=listed[-1], data_key=key, meta=header.meta))
    aged.expire()
    assert sites.copy.store.head(listed[0]) is None
    assert key.wrapped in held(sites)
    assert sites.inspect().whole


def test_no_data_key_goes_while_nobody_knows_what_needs_it(aged: Aged) -> None:
    sites = aged.sites
    newest = sites.copy.wal_listing()[-1].info.key
    good = sites.copy.store.get(newest)
    action = aged.action()
    plan = action.plan()
    sites.copy.store.put(newest, b"something else" * 1000)
    before = held(sites)
    (change,) = plan.of_kind("data-keys")
    with pytest.raises(CorruptionError, match="not a readable sealed object"):
        action.apply(change)
    assert held(sites) == before
    block = sites.full.archives[0].blocks[0].key
    sites.copy.store.put(newest, good)
    unfinished = block.replace(sites.full.backup_id, "20200101T000000Z-F-00000000")
    sites.copy.store.put(unfinished, sites.copy.store.get(block))  # it says that it belongs elsewhere
    plan = aged.action().plan()
    assert not plan.of_kind("data-keys")
    assert any("no data key is removed" in note and unfinished in note for note in plan.facts["notes"])


def test_a_young_data_key_may_be_there_for_what_is_on_its_way(aged: Aged) -> None:
    keys = aged.sites.copy.keys
    assert isinstance(keys, CopyKeys)
    keys.hold("on its way", os.urandom(32))
    assert [change.object for change in Aged(aged.sites, days=0).action().plan().of_kind("data-keys")] == []
    aged.expire()
    assert "on its way" not in held(aged.sites)


class Crossing:
    """The copy's store, into which something comes while its keys are deleted."""

    def __init__(self, store: Any, key: str, body: bytes) -> None:
        self._store, self._key, self._body = store, key, body

    def delete(self, key: str) -> Any:
        if "/keys/" in key:
            self._store.put(self._key, self._body)
        return self._store.delete(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_data_key_that_is_needed_again_while_it_goes_is_put_back(aged: Aged) -> None:
    sites = aged.sites
    oldest = sites.copy.wal_listing()[0].info.key
    body = sites.copy.store.get(oldest)
    store: Any = Crossing(sites.copy.store, oldest, body)
    aged.expire(Repository(store, CopyKeys(sites.platform.access.keys("c"), store, "app-db"), "app-db"))
    assert read_header(body, place=oldest).key in held(sites)
    assert sites.inspect().whole


class Away(Crossing):
    """It is unreachable, for one look, when the keys are gone."""

    gone = False

    def delete(self, key: str) -> Any:
        self.gone = self.gone or "/keys/" in key
        return super().delete(key)

    def list_folders(self, prefix: str) -> Any:
        if self.gone:
            raise UnreachableError("it does not answer")
        return self._store.list_folders(prefix)


def test_data_keys_come_back_where_what_needs_them_cannot_be_seen_once_they_are_gone(aged: Aged) -> None:
    sites = aged.sites
    before, oldest = held(sites), sites.copy.wal_listing()[0].info.key
    store: Any = Away(sites.copy.store, oldest, sites.copy.store.get(oldest))
    with pytest.raises(UnreachableError):
        aged.expire(Repository(store, CopyKeys(sites.platform.access.keys("c"), store, "app-db"), "app-db"))
    assert store.gone
    assert held(sites) == before


def test_a_copy_in_progress_puts_back_the_keys_that_an_expiry_took(sites: Sites) -> None:
    work = copying(sites, 1000)
    work._wal()
    store = sites.copy.store
    for info in list(store.list("app-db/keys/")):
        store.delete(info.key)
    work._wal()
    assert held(sites) == set(sealed_with(sites).values())
    assert sites.inspect().whole


# Commands


def test_commands_read_the_copy_where_they_are_told_to(sites: Sites) -> None:
    done = sites.ops("backup", "replicate", "--all", "--json")
    (result,) = TypeAdapter(list[Replicated]).validate_json(done.stdout)
    assert (result.copy_id, result.whole, len(result.backups)) == (SITE, True, 2)
    listed = json.loads(sites.ops("backup", "list", "app-db", "--copy", SITE, "--json").stdout)
    assert [info["backup_id"] for info in listed[0]["backups"]] == result.backups
    shown = json.loads(
        sites.ops("backup", "show", "app-db", sites.incremental.backup_id, "--copy", SITE, "--json").stdout
    )
    assert shown["chain"] == result.backups
    assert "all as written" in sites.ops("backup", "replicate", "app-db", "--check").stdout
    into = sites.home / "restored"
    sites.ops("restore", "app-db", "--latest", "--copy", SITE, "--into", str(into), "--dry-run")
    assert not into.exists()


def test_a_copy_that_is_not_declared_is_named_with_those_that_are(sites: Sites) -> None:
    done = sites.ops("backup", "replicate", "app-db", "--copy", "third-site", code=2)
    assert "no copy called 'third-site'" in done.stderr
    assert SITE in done.stderr
    sites.platform.body["targets"][0]["repository"]["copies"] = []
    sites.platform.reload()
    assert "declare one under repository.copies" in sites.ops("backup", "replicate", "app-db", code=2).stderr


@pytest.mark.parametrize(
    ("copies", "said"),
    [
        ([{"id": "a", "store": "s", "keys": "c"}], "would stand in the store of the backups"),
        ([{"id": "a", "store": "c", "keys": "nothing"}], "there is no key service 'nothing'"),
        ([{"id": "a", "store": "c", "keys": "c"}, {"id": "a", "store": "c", "keys": "c"}], "two copies are called a"),
    ],
)
def test_a_copy_that_would_be_none_is_refused_by_the_inventory(sites: Sites, copies: list[Any], said: str) -> None:
    sites.platform.body["targets"][0]["repository"]["copies"] = copies
    with pytest.raises(OpsError) as refused:
        sites.platform.reload()
    assert said in str(refused.value)


# Dagster


def test_the_job_copies_and_the_promise_is_judged_from_the_copy(sites: Sites) -> None:
    access, loaded = sites.platform.access, sites.platform.access.loaded
    assert judge("copied", access, sites.target).text == f"nothing can be restored from {SITE}"
    job = build_defs(loaded).resolve_job_def("replicate_backups")
    with DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance, partition_key="app-db")
        assert result.success
        (made,) = result.asset_materializations_for_node("postgres__copy")
        assert made.metadata[f"{SITE}: objects"].value > 0
        kept = judge("copied", access, sites.target)
        assert kept.kept
        assert f"{SITE} holds all" in kept.text
        late = judge("copied", access, sites.target, clock=Later())
        assert (late.kept, late.known) == (False, True)
        sites.platform.body["stores"]["c"]["endpoint"] = "https://127.0.0.1:1"
        sites.platform.reload()
        failed = build_defs(sites.platform.access.loaded).resolve_job_def("replicate_backups").execute_in_process(
            instance=instance, partition_key="app-db", raise_on_error=False
        )  # fmt: skip
        assert not failed.success
    away = judge("copied", sites.platform.access, sites.target)
    assert (away.kept, away.known) == (False, False)


class Later(SystemClock):
    def now(self) -> datetime:
        return super().now() + timedelta(hours=2)


# Keys


def test_a_key_is_held_once_and_opens_what_it_wrapped(sites: Sites, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(os.urandom(32).hex())
    path.chmod(0o600)
    store = sites.copy.store
    keys = CopyKeys(FileKeys(path), store, "app-db")
    plain = os.urandom(32)
    keys.hold("vault:v1:abc", plain)
    keys.hold("vault:v1:abc", plain)
    assert len(list(store.list("app-db/keys/"))) == 1
    fresh = CopyKeys(FileKeys(path), store, "app-db")
    assert fresh.unwrap("vault:v1:abc") == plain
    own = fresh.new_data_key()
    assert CopyKeys(FileKeys(path), store, "app-db").unwrap(own.wrapped) == own.plain
    with pytest.raises(CorruptionError, match="as another one"):
        CopyKeys(FileKeys(path), store, "app-db").hold("vault:v1:abc", os.urandom(32))


def test_transit_wraps_a_key_that_another_service_made(sites: Sites) -> None:
    sites.platform.body["key_services"]["k"]["key"] = "ops-copy"
    sites.platform.reload()
    keys = sites.platform.access.keys("k")
    sites.platform.body["key_services"]["k"]["key"] = "ops-backup"
    plain = os.urandom(32)
    assert keys.unwrap(keys.wrap(plain)) == plain
