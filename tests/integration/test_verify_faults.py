"""The verification where something is wrong: damage is a FAIL, what could not be asked is neither, what was asked wrongly is refused."""

from __future__ import annotations

import contextlib
import functools
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from ops_platform.backup import engine as engines
from ops_platform.backup.archive import read_archive
from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.engine import NativeEngine, open_engine
from ops_platform.backup.model import BackupInfo, Lsn, RecoveryTarget, segment_start
from ops_platform.backup.receiver import receive_range
from ops_platform.backup.repository import Repository
from ops_platform.backup.walfetch import WalFetchAhead
from ops_platform.clients.postgres_binaries import free_port
from ops_platform.clients.vault import VaultSession
from ops_platform.errors import CouldNotVerifyError, NotThereError, OpsError, UnreachableError, UsageError
from ops_platform.ledger import Ledger
from ops_platform.local.components import COMPONENTS
from ops_platform.recovery import canary, choosing, gates, records
from ops_platform.recovery import verify as room
from ops_platform.recovery.model import GateStatus, Scorecard, Verdict
from ops_platform.recovery.restore import dump_tables, restore
from ops_platform.recovery.room import lacking, reserved
from ops_platform.recovery.sandbox import Sandbox
from ops_platform.recovery.verify import verify
from tests.integration.test_commands import ops
from tests.integration.test_verify import filled, result, statuses
from tests.integration.wal_rig import FaultyStore, eventually
from tests.ledger_rig import Database
from tests.rig import HBA, Cluster, Ground, Platform, missing

MakeCluster = Callable[..., Cluster]
MakePlatform = Callable[..., Platform]


def flip(platform: Platform, key: str) -> None:
    store = platform.repository.store
    body = bytearray(store.get(key))
    body[len(body) // 2] ^= 1
    store.put(key, bytes(body))


def archived(platform: Platform) -> Any:
    found = read_archive(platform.repository)
    assert found is not None
    return found


def receive_all(platform: Platform, cluster: Cluster) -> None:
    """Everything that is written so far into the store."""
    cluster.sql("select pg_switch_wal()")
    begin = max(item.end for item in archived(platform).ranges)
    receive_range(
        platform.access, platform.target, begin, Lsn.parse(cluster.sql("select pg_current_wal_flush_lsn()::text")), 1
    )


# Damage


def test_one_flipped_byte_in_a_block_fails(new_cluster: MakeCluster, new_platform: MakePlatform) -> None:
    platform = new_platform({"app-db": [filled(new_cluster(18))]})
    manifest = run_backup(platform.access, platform.target)
    block = manifest.archives[0].blocks[2]
    flip(platform, block.key)
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.FAIL, card.reason
    assert card.reason.startswith(f"the verification broke off: {block.key}: "), card.reason
    assert [o.how for o in card.objectives[1:]] == ["the restore did not come to its end"] * 2
    (proof,) = platform.repository.proofs(manifest.backup_id)
    assert proof.verdict == "FAIL"


def test_one_flipped_byte_in_wal_fails(
    new_cluster: MakeCluster, new_platform: MakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = filled(new_cluster(18))
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    take, spoilt = canary.take, []

    def then_spoilt(*args: Any) -> canary.SourceMoment:
        moment = take(*args)
        whole = [item for item in archived(platform).listing if not item.partial and not item.history]
        spoilt.append(whole[-1].info.key)
        flip(platform, spoilt[0])
        return moment

    monkeypatch.setattr(canary, "take", then_spoilt)
    cluster.sql("select pg_switch_wal()")
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.FAIL, card.reason
    assert spoilt[0] in card.reason


# What cannot be asked


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store or a key service that stays away is given up after a moment."""
    monkeypatch.setattr(engines, "WalFetchAhead", functools.partial(WalFetchAhead, retry_for=0.2))


def before_replay(monkeypatch: pytest.MonkeyPatch, work: Callable[[NativeEngine], None]) -> None:
    fetcher = NativeEngine.wal_fetcher

    def changed(self: NativeEngine, backup: BackupInfo, spool: Path) -> WalFetchAhead:
        made = fetcher(self, backup, spool)
        work(self)
        return made

    monkeypatch.setattr(NativeEngine, "wal_fetcher", changed)


@pytest.mark.parametrize("words", ["does not answer", "the archive has a gap, authentication, SHA-256 differs"])
def test_a_store_that_goes_away_during_replay_proves_nothing(
    words: str, new_cluster: MakeCluster, new_platform: MakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever words its answer has: that it is no damage is known by its type."""
    platform = new_platform({"app-db": [filled(new_cluster(18))]})
    run_backup(platform.access, platform.target)
    impatient(monkeypatch)

    class Away(FaultyStore):
        def get(self, key: str, *args: Any, **more: Any) -> bytes:
            raise UnreachableError(words, where=key)

    fetcher = NativeEngine.wal_fetcher

    def through(self: NativeEngine, backup: BackupInfo, spool: Path) -> WalFetchAhead:
        repository = Repository(Away(self.repository.store), self.repository.keys, "app-db")  # type: ignore[arg-type]
        made = fetcher(self, backup, spool)
        made._repository = repository
        return made

    monkeypatch.setattr(NativeEngine, "wal_fetcher", through)
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.COULD_NOT_VERIFY, card.reason
    assert words in card.reason
    assert "is starting up" not in card.reason, "an answer to our own asking"
    assert statuses(card)["teardown"] is GateStatus.PASSED


def root(ground: Ground) -> Any:
    import hvac

    place = ground.place
    return hvac.Client(url=f"http://127.0.0.1:{place.port('vault')}", token=place.secret("vault.root_token"))


@contextlib.contextmanager
def open_again(ground: Ground) -> Iterator[None]:
    """The key service that a test seals is everybody's: it is unsealed before the next one."""
    vault = next(component for component in COMPONENTS if component.name == "vault")
    try:
        yield
    finally:
        eventually(lambda: vault.ready(ground.place) and not root(ground).sys.is_sealed())


@pytest.mark.parametrize("when", ["during replay", "at its end"])
def test_a_key_service_that_is_sealed_in_the_middle_proves_nothing(
    when: str, ground: Ground, new_cluster: MakeCluster, new_platform: MakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its end all gates have passed: what cannot be stored is no proof all the same."""
    cluster = filled(new_cluster(18))
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    cluster.sql("select pg_switch_wal()")
    receive_all(platform, cluster)
    platform.reload()  # which has opened no data key yet
    if when == "during replay":
        impatient(monkeypatch)
        before_replay(monkeypatch, lambda _engine: root(ground).sys.seal())
    else:
        made = room.Verification._scorecard

        def then_sealed(self: room.Verification) -> Scorecard:
            card = made(self)
            assert card.verdict is Verdict.PASS, card.reason
            root(ground).sys.seal()
            return card

        monkeypatch.setattr(room.Verification, "_scorecard", then_sealed)
    with open_again(ground):
        card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.COULD_NOT_VERIFY, card.reason
    assert "sealed" in card.reason
    assert statuses(card)["record"] is GateStatus.COULD_NOT_CHECK
    assert platform.repository.proofs() == []


def test_where_no_key_is_to_be_had_the_ledger_says_why_nothing_was_verified(
    ground: Ground, new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    cluster = filled(new_cluster(18))
    platform = new_platform({"app-db": [cluster]})
    database = Database(cluster)
    cluster.sql(f"alter role {database.name} password 'pw'")
    (platform.home / "ledger").write_text("pw")
    (platform.home / "ledger").chmod(0o600)
    own = {"host": "127.0.0.1", "port": cluster.port, "dbname": database.name, "user": database.name}
    platform.body["platform"]["database"] = {**own, "password": f"file://{platform.home}/ledger", "tls": {"mode": "disable"}}  # fmt: skip
    platform.reload()
    run_backup(platform.access, platform.target)
    with open_again(ground):
        root(ground).sys.seal()
        sealed = ops(platform, "backup", "verify", "app-db", code=3)
    assert "COULD NOT VERIFY" in sealed.stdout.upper().replace("_", " ")
    assert "Vault is sealed" in sealed.stdout
    platform.body["vaults"]["v"]["url"] = f"http://127.0.0.1:{free_port()}"
    platform.reload()
    away = ops(platform, "backup", "verify", "app-db", "--json", code=3)
    assert '"verdict": "COULD_NOT_VERIFY"' in away.stdout
    with Ledger(platform.access.platform_db) as ledger:
        first, second = (entry.body for entry in ledger.entries(kind="backup.verification"))
    assert (first["verdict"], second["verdict"]) == ("COULD_NOT_VERIFY", "COULD_NOT_VERIFY")
    assert first["gates"] == {"run": "could_not_check", "record": "could_not_check"}
    assert all("Vault is sealed" in why for why in first["why"])
    assert all("does not answer" in why for why in second["why"])
    # No record either: that is said, and still no failure of the backup.
    platform.body["platform"]["database"]["port"] = free_port()
    platform.reload()
    assert "nor can the ledger be written" in ops(platform, "backup", "verify", "app-db", code=3).stderr


def test_a_sandbox_without_room_for_its_wal_proves_nothing(
    new_cluster: MakeCluster, new_platform: MakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL ended for want of room on the disk: that is no word on the backup."""
    platform = new_platform({"app-db": [filled(new_cluster(18))]})
    run_backup(platform.access, platform.target)
    why = 'FATAL:  could not extend file "base/5/1": No space left on device'
    real = Sandbox.log
    monkeypatch.setattr(Sandbox, "log", lambda self: f"{real(self)}\n2026-01-01 00:00:00.000 UTC [7] 53100 {why}\n")
    monkeypatch.setattr(Sandbox, "wait_paused", lambda self, **_: (self.stop("immediate"), ended(self)))
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.COULD_NOT_VERIFY, card.reason
    assert "No space left on device" in card.reason


def ended(sandbox: Sandbox) -> None:
    raise OpsError(f"recovery ended before its target: {sandbox.why()}")


@pytest.mark.parametrize(
    "said",
    [
        "server closed the connection unexpectedly",
        "connection failed: Connection refused",
        "FATAL:  the database system is shutting down",
    ],
)
def test_a_server_that_is_ending_is_waited_for_until_it_is_known_why(said: str) -> None:
    """Its process is there for a moment longer than its ear: that is no word on who may log in."""

    def refuse(*_: object, **__: object) -> None:
        raise psycopg.OperationalError(said)

    server = SimpleNamespace(pid=7, connect=refuse)
    sandbox = Sandbox.__new__(Sandbox)
    sandbox.server, sandbox.data = server, Path("data")  # type: ignore[assignment]
    sandbox.clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda _: setattr(server, "pid", None))  # type: ignore[assignment]
    sandbox.why = lambda: "the archive has a gap"  # type: ignore[method-assign]
    with pytest.raises(OpsError, match="recovery ended before its target: the archive has a gap") as ended:
        sandbox.find_superuser({"postgres": "postgres"})
    assert not isinstance(ended.value, CouldNotVerifyError)


def test_a_source_whose_clock_goes_back_between_the_rows_proves_nothing(
    new_cluster: MakeCluster, new_platform: MakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of NTP: the moment would lie before row A, or behind row B."""
    platform = new_platform({"app-db": [filled(new_cluster(18))]})
    run_backup(platform.access, platform.target)
    between = canary._between
    for step in (timedelta(hours=-1), timedelta(hours=1)):
        monkeypatch.setattr(canary, "_between", lambda connection, step=step: between(connection) + step)
        card = verify(platform.access, platform.target)
        assert card.verdict is Verdict.COULD_NOT_VERIFY, card.reason
        assert "the source's clock went back" in card.reason


# The key


def own_key(platform: Platform, ground: Ground) -> Callable[[], None]:
    """Give it a key of its own in Vault; what is handed back deletes that key."""
    client, mount = root(ground), f"t{secrets.token_hex(6)}"
    client.sys.enable_secrets_engine("transit", path=mount)
    client.secrets.transit.create_key("k", mount_point=mount)
    client.sys.create_or_update_policy(
        mount,
        f'path "{mount}/datakey/plaintext/k" {{ capabilities = ["update"] }}\n'
        f'path "{mount}/decrypt/k" {{ capabilities = ["update"] }}\npath "{mount}/keys/k" {{ capabilities = ["read"] }}\n',
    )
    client.auth.approle.create_or_update_approle(mount, token_policies=[mount], token_ttl="1h")
    for name, value in (
        ("role_id", client.auth.approle.read_role_id(mount)["data"]["role_id"]),
        ("secret_id", client.auth.approle.generate_secret_id(mount)["data"]["secret_id"]),
    ):
        (platform.home / name).write_text(value)
        (platform.home / name).chmod(0o600)
        platform.body["vaults"]["v"]["auth"][name] = f"file://{platform.home / name}"
    platform.body["key_services"]["k"] |= {"mount": mount, "key": "k"}
    platform.reload()

    def delete() -> None:
        client.secrets.transit.update_key_configuration("k", deletion_allowed=True, mount_point=mount)
        client.secrets.transit.delete_key("k", mount_point=mount)
        platform.reload()  # a process of its own, which has opened nothing yet

    return delete


def test_a_key_that_was_deleted_is_named_by_list_restore_and_verify(
    ground: Ground, new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    platform = new_platform({"app-db": [filled(new_cluster(18))]})
    delete = own_key(platform, ground)
    run_backup(platform.access, platform.target)
    delete()
    with pytest.raises(NotThereError, match="the key 'k' is gone") as listed:
        open_engine(platform.access, platform.target).list()
    assert "restore it from Vault's backup" in str(listed.value)
    with pytest.raises(NotThereError, match="the key 'k' is gone"):
        restore(platform.access, platform.target, RecoveryTarget("latest"), platform.home / "data")
    assert not (platform.home / "data").exists()
    card = verify(platform.access, platform.target)  # and where the key is gone, no scorecard can be sealed with it
    assert card.verdict is Verdict.COULD_NOT_VERIFY
    assert "the key 'k' is gone" in card.reason


def test_a_token_that_is_revoked_in_the_middle_of_a_backup_costs_nothing(
    ground: Ground, new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    platform = new_platform({"app-db": [filled(new_cluster(18))]})
    own_key(platform, ground)
    session: VaultSession = platform.access.vault("v")
    revoked: list[str] = []

    def revoke(step: str, done: int, total: int | None) -> None:
        if step == "backup" and not revoked:
            revoked.append(session._client.token)
            root(ground).auth.token.revoke(revoked[0])

    manifest = run_backup(platform.access, platform.target, progress=revoke)
    assert revoked
    assert session._client.token != revoked[0]
    platform.reload()
    assert [info.backup_id for info in open_engine(platform.access, platform.target).list()] == [manifest.backup_id]
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.PASS, card.reason


# What was asked wrongly


def test_a_moment_that_the_named_backup_cannot_reach_is_refused_and_no_verdict(
    new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    cluster = filled(new_cluster(18))
    platform = new_platform({"app-db": [cluster]})
    first = run_backup(platform.access, platform.target)
    between = cluster.sql("insert into t (body) values ('between') returning clock_timestamp()")
    cluster.sql("insert into t (body) values ('and a commit after it')")
    receive_all(platform, cluster)
    second = run_backup(platform.access, platform.target)
    for backup, at in (
        (first, first.ended_at - timedelta(seconds=1)),
        (second, between),
        (first, second.ended_at + timedelta(days=1)),
    ):
        with pytest.raises(UsageError, match="cannot be reached") as refused:
            verify(platform.access, platform.target, backup_id=backup.backup_id, at=at)
        assert f"{backup.ended_at:%Y-%m-%d %H:%M:%S} to " in str(refused.value.remedy)
    assert records.scorecards(platform.repository) == []
    assert platform.repository.proofs(second.backup_id) == []
    card = verify(platform.access, platform.target, backup_id=first.backup_id, at=between)
    assert card.verdict is Verdict.PASS, card.reason


# How far, and how much room


@pytest.mark.parametrize("to", ["latest", "a moment after the last commit"])
@pytest.mark.parametrize(("lost", "verdict"), [(0, Verdict.PASS), (3, Verdict.FAIL)])
def test_a_recovery_that_ends_a_few_small_segments_early_fails(
    to: str,
    lost: int,
    verdict: Verdict,
    new_cluster: MakeCluster,
    new_platform: MakePlatform,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Segments of 1 MiB: sixteen of them would fit into one of the usual size."""
    cluster = filled(new_cluster(18, initdb=("--wal-segsize=1",)))
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    for _ in range(6):
        cluster.sql("insert into t (body) select md5(i::text) from generate_series(1, 3000) i")
        cluster.sql("select pg_switch_wal()")
    after = cluster.sql("select clock_timestamp()")
    receive_all(platform, cluster)
    cluster.server.stop("immediate")
    names = sorted(item.name for item in archived(platform).listing if not item.partial and not item.history)
    segment = WalFetchAhead._segment

    def short(self: WalFetchAhead, name: str) -> bytes | None:
        return None if lost and name >= names[-lost] else segment(self, name)

    monkeypatch.setattr(WalFetchAhead, "_segment", short)
    if lost:
        monkeypatch.setattr(WalFetchAhead, "_fetch_ahead", lambda self, name: False)
    card = verify(platform.access, platform.target, at=None if to == "latest" else after)
    assert card.recovery_target == ("latest" if to == "latest" else f"time {after.isoformat()}")
    assert card.verdict is verdict, card.reason
    assert (statuses(card).get("reached") is GateStatus.PASSED) is (lost == 0)
    assert segment_start(names[0], 1 << 20)[1] % (1 << 20) == 0


def test_the_room_for_a_whole_chain_is_asked_for_before_anything_is_fetched(
    new_cluster: MakeCluster, new_platform: MakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = filled(new_cluster(18))
    platform = new_platform({"app-db": [cluster]})
    full = run_backup(platform.access, platform.target)
    increment = run_backup(platform.access, platform.target)
    assert increment.raw * 1.1 < full.raw
    small = shutil.disk_usage("/")._replace(free=full.raw)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: small)
    card = verify(platform.access, platform.target, backup_id=increment.backup_id)
    assert card.verdict is Verdict.COULD_NOT_VERIFY
    assert "no room for the sandbox" in card.reason
    assert not list(platform.home.glob("ops-verify-*"))


def test_a_proof_counts_the_room_that_others_still_need_and_they_count_its(
    new_cluster: MakeCluster, new_platform: MakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = filled(new_cluster(18))
    platform = new_platform({"app-db": [cluster]})
    full = run_backup(platform.access, platform.target)
    monkeypatch.setattr(tempfile, "tempdir", str(platform.home))  # where no other test notes what it restores
    enough = shutil.disk_usage("/")._replace(free=int(full.raw * 1.1) + 4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: enough)
    with reserved([platform.home / "another"], 1 << 20):
        card = verify(platform.access, platform.target, backup_id=full.backup_id)
    assert card.verdict is Verdict.COULD_NOT_VERIFY
    assert "for restores that are under way" in card.reason
    seen: list[str | None] = []

    def look(_step: str, _done: int, _total: int | None) -> None:
        if not seen:
            seen.append(lacking(platform.home, full.raw))

    assert verify(platform.access, platform.target, backup_id=full.backup_id, progress=look).verdict is Verdict.PASS
    assert "for restores that are under way" in str(seen[0])


# Moments


@pytest.mark.parametrize("asked", ["a backup", "a moment by chance"])
def test_a_moment_by_chance_has_a_commit_after_it_however_late_it_falls(
    asked: str, new_cluster: MakeCluster, new_platform: MakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive reaches a little further than the canary's second row, and there PostgreSQL would never stop."""
    monkeypatch.setattr(choosing, "_by_chance", lambda begin, end, _seed, _least, most: begin + (end - begin) * most)
    cluster = filled(new_cluster(18))
    platform = new_platform({"app-db": [cluster]})
    full = run_backup(platform.access, platform.target)
    what: dict[str, Any] = {"backup_id": full.backup_id} if asked == "a backup" else {"pick": "random"}
    card = verify(platform.access, platform.target, **what)
    assert (card.verdict, card.recovery_target[:5]) == (Verdict.PASS, "time "), card.reason
    assert card.reached is not None


# Names


@pytest.mark.parametrize("name", ["host=elsewhere dbname=other", "--version", "postgresql://elsewhere/other"])
def test_a_database_whose_name_looks_like_an_option_or_a_connection_string(
    name: str, new_cluster: MakeCluster, new_platform: MakePlatform
) -> None:
    cluster = filled(new_cluster(18))
    cluster.sql(f'create database "{name}"')
    cluster.sql("create table kept as select generate_series(1, 10) i", name)
    cluster.sql("create function f(int) returns int immutable language sql as 'select $1'", name)
    cluster.sql("create table d as select generate_series(1, 2000) i; create index d_i on d (f(i))", name)
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    card = verify(platform.access, platform.target, full=True)
    assert card.verdict is Verdict.PASS, card.reason
    file = platform.home / "kept.dump"
    dump_tables(platform.access, platform.target, RecoveryTarget("latest"), ["public.kept"], file, dbname=name)
    assert file.stat().st_size > 500
    # That pg_amcheck looks into it, and not into nothing: damage there is found.
    cluster.sql("create or replace function f(int) returns int immutable language sql as 'select -$1'", name)
    card = verify(platform.access, platform.target, full=True)
    assert statuses(card)["amcheck"] is GateStatus.FAILED, result(card, "amcheck")


# The sandbox is alone


def listening(pid: int) -> set[str]:
    """TCP ports on which a server's processes listen, whatever their network namespace is."""
    found: set[str] = set()
    for process in [pid, *children(pid)]:
        inodes = set[str]()
        with contextlib.suppress(FileNotFoundError):  # a child that has just ended
            for descriptor in Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    inodes.add(str(descriptor.readlink()))
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(FileNotFoundError):
                for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
                    words = line.split()
                    if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                        found.add(words[1])
    return found


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def elsewhere() -> Iterator[socket.socket]:
    """Somebody who listens on this machine, and to whom no sandbox may talk."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def test_the_sandbox_is_alone(
    elsewhere: socket.socket, new_cluster: MakeCluster, new_platform: MakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = elsewhere.getsockname()[1]
    cluster = filled(new_cluster(18))
    took = cluster.server.directory.parent / "took"
    archiving = {
        "archive_mode": "on",
        "archive_command": f"echo %f >> {took}",
        "primary_conninfo": f"host=127.0.0.1 port={port} user=x",
        "listen_addresses": "*",
    }
    cluster.server.stop()
    cluster.server.configure(archiving, hba=HBA, file="postgresql.conf")
    cluster.server.start()
    cluster.sql(f"""
        create extension postgres_fdw;
        create server elsewhere foreign data wrapper postgres_fdw options (host '127.0.0.1', port '{port}');
        create user mapping for public server elsewhere options (user 'x', password 'x');
        create foreign table far (i int) server elsewhere;
    """)
    assert listening(cluster.server.pid or 0)
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    cluster.server.configure({"archive_command": "true"}, file="postgresql.conf")
    cluster.sql("select pg_reload_conf()")
    before: list[str] = []
    seen: list[Mapping[str, Any]] = []
    real = gates.read_tables

    def looked(sandbox: Sandbox, *args: Any) -> Any:
        import psycopg

        pid = sandbox.server.pid or 0
        with sandbox.connect() as connection:
            names = ("listen_addresses", "archive_mode", "primary_conninfo", "primary_slot_name", "hba_file")
            settings = {name: connection.execute(f"show {name}").fetchone()[0] for name in names}
            rules = connection.execute("select distinct type, auth_method from pg_hba_file_rules").fetchall()
            connection.execute("select pg_switch_wal()")
            connection.commit()
            with pytest.raises(psycopg.OperationalError, match="could not connect to server"):
                connection.execute("select * from public.far")
        seen.append(
            {
                **settings,
                "rules": rules,
                "tcp": listening(pid),
                "namespace": Path(f"/proc/{pid}/ns/net").readlink(),
                "isolated": sandbox.isolated,
                "data": sandbox.work,
            }
        )
        return real(sandbox, *args)

    before = took.read_text().split() if took.exists() else []
    monkeypatch.setattr(gates, "read_tables", looked)
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.PASS, card.reason
    (found,) = seen
    if not found["isolated"]:
        missing("a network namespace", "the machine forbids it to this user; run as root")
    assert found["namespace"] != Path("/proc/self/ns/net").readlink()
    assert found["tcp"] == set()
    assert (found["listen_addresses"], found["archive_mode"]) == ("", "off")
    assert (found["primary_conninfo"], found["primary_slot_name"]) == ("", "")
    assert Path(found["hba_file"]).parent == found["data"]
    assert found["rules"] == [("local", "trust")]
    assert (took.read_text().split() if took.exists() else []) == before
    with pytest.raises(BlockingIOError):
        elsewhere.accept()
