"""pgBackRest's repositories, real ones: listed, judged, restored and proven by ours, and never taken for whole when they are not."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ops_platform.backup.engine import open_engine
from ops_platform.backup.model import BackupInfo, BackupKind, Lsn, RecoveryTarget
from ops_platform.backup.pgbackrest import PgBackRestEngine, _backup_info
from ops_platform.backup.walcommits import newest_end, segment_size
from ops_platform.clients.postgres_binaries import PostgresServer, free_port, need_postgres, run_as, run_tool
from ops_platform.errors import (
    AccessDeniedError,
    CorruptionError,
    CouldNotVerifyError,
    NotThereError,
    OpsError,
    UnreachableError,
    UsageError,
)
from ops_platform.inventory import Target
from ops_platform.recovery import records
from ops_platform.recovery.restore import restore
from ops_platform.recovery.verify import verify
from tests.integration.wal_rig import eventually
from tests.rig import Cluster, Ground, Platform, missing, scratch

# The company is made once; other workers have other tests.
pytestmark = pytest.mark.xdist_group("pgbackrest")

NewCluster = Callable[..., Cluster]
SECRET = "a passphrase of the repository"


@dataclass
class Company:
    """A database whose backups pgBackRest takes, with a past: backups of each kind, a failover, a table lost at a known moment."""

    home: Path
    cluster: Cluster
    platform: Platform
    full: str
    incremental: str
    damaged: str
    moment: datetime
    lsn: Lsn
    digest: str

    @property
    def target(self) -> Target:
        return self.platform.target

    @property
    def engine(self) -> PgBackRestEngine:
        engine = open_engine(self.platform.access, self.target)
        assert isinstance(engine, PgBackRestEngine)
        return engine

    def pgbackrest(self, *words: str) -> str:
        done = run_tool(["pgbackrest", f"--config={self.home}/server.conf", "--stanza=demo", *words])
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def backup(self, kind: str) -> str:
        before = {backup.backup_id for backup in self.engine.list()}
        self.pgbackrest("backup", f"--type={kind}")
        (new,) = {backup.backup_id for backup in self.engine.list()} - before
        return new

    def archive(self) -> None:
        """Finish the segment and wait until it has been archived."""
        name = self.cluster.sql("select pg_walfile_name(pg_switch_wal())")
        done = "select coalesce(last_archived_wal >= %s, false) from pg_stat_archiver where last_archived_wal !~ 'history|backup'"
        eventually(lambda: self.cluster.sql(done, "postgres", name), why="archiving")

    def compress_with(self, kind: str) -> None:
        text = (self.home / "server.conf").read_text()
        (self.home / "server.conf").write_text(re.sub("compress-type=.*", f"compress-type={kind}", text))


REPOSITORY = """[global]
repo1-path={home}/repo
repo1-cipher-type=aes-256-cbc
repo1-cipher-pass={secret}
repo1-retention-full=9
"""
SERVER = """log-level-file=off
lock-path={home}/lock
spool-path={home}/spool
start-fast=y
compress-type=gz
[demo]
pg1-path={data}
pg1-port={port}
pg1-socket-path={sockets}
"""
# As it stands on a company's backup host: the database is elsewhere, and options for its own restores are set.
OURS = """link-all=y
delta=y
db-include=other
recovery-option=primary_conninfo=host=live.invalid
[demo]
pg1-host=db-0.invalid
pg1-path=/var/lib/postgresql/15/main
pg2-host=db-1.invalid
pg2-path=/var/lib/postgresql/15/main
"""
DIGEST = "select count(*) || ' ' || md5(string_agg(r::text, chr(10) order by r::text)) from t r"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o640)
    run_as().own(path)
    return path


@pytest.fixture(scope="module")
def company(ground: Ground) -> Iterator[Company]:
    if shutil.which("pgbackrest") is None:
        missing("pgBackRest", "make services installs it")
    home = scratch("ops-pgbackrest-")
    for name in ("pg", "repo", "space"):
        (home / name).mkdir(mode=0o750)
        run_as().own(home / name)
    run_as().own(home)
    archiving = {
        "archive_mode": "on",
        "archive_command": f"pgbackrest --config={home}/server.conf --stanza=demo archive-push %p",
        "track_commit_timestamp": "on",
    }
    cluster = Cluster(15, home / "pg", archiving)
    head = REPOSITORY.format(home=home, secret=SECRET)
    server = cluster.server
    written(
        home / "server.conf",
        head + SERVER.format(home=home, data=server.directory, port=server.port, sockets=server.sockets),
    )
    config = written(home / "ours.conf", head + OURS)
    platform = Platform(
        ground,
        {"app-db": [cluster]},
        extra={
            "repository": {"engine": "pgbackrest", "stanza": "demo", "config": str(config)},
            "sandbox": {"directory": str(home)},
        },
    )
    try:
        yield _with_a_past(Company(home, cluster, platform, "", "", "", datetime.now(UTC), Lsn(0), ""))
    finally:
        cluster.stop()
        platform.close()
        shutil.rmtree(home)


def _with_a_past(made: Company) -> Company:
    cluster = made.cluster
    cluster.sql(f"create tablespace space location '{made.home}/space'")
    cluster.sql("create table t tablespace space as select i, md5(i::text) as m from generate_series(1, 10000) i")
    made.pgbackrest("stanza-create")
    made.full = made.backup("full")
    cluster.sql("insert into t values (-1, 'archived as gz')")
    made.archive()
    made.incremental = made.backup("incr")
    made.compress_with("lz4")
    for text in ("archived as lz4", "and another"):
        cluster.sql("insert into t values (-2, %s)", "postgres", text)
        made.archive()
    _fail_over(cluster.server)
    made.compress_with("bz2")
    cluster.sql("insert into t values (-3, 'archived as bz2, on the second timeline')")
    made.archive()
    made.compress_with("none")
    (newest,) = [backup for backup in made.engine.list() if backup.backup_id == made.incremental]
    eventually(lambda: cluster.sql("select clock_timestamp()") > newest.ended_at)
    cluster.sql("insert into t values (-4, 'the last one that counts')")
    made.digest = cluster.sql(DIGEST)
    made.lsn = Lsn.parse(cluster.sql("select pg_current_wal_insert_lsn()::text"))
    made.moment = cluster.sql("select clock_timestamp()")
    cluster.sql("drop table t")
    made.archive()
    made.compress_with("zst")
    _damage_a_page(cluster)
    made.damaged = made.backup("diff")
    cluster.sql("drop table victim")
    made.archive()
    return made


def _fail_over(server: PostgresServer) -> None:
    """The server goes on on a new timeline, as a promoted standby does."""
    run_tool([server.install.bindir / "pg_ctl", "-D", server.directory, "-m", "fast", "stop"])
    (server.directory / "standby.signal").touch()
    server.start()
    with server.connect() as connection:
        assert connection.execute("select pg_promote(true, 60)").fetchone()[0]


def _damage_a_page(cluster: Cluster) -> None:
    cluster.sql("create table victim as select i from generate_series(1, 10000) i")
    cluster.sql("checkpoint")
    path = cluster.server.directory / cluster.sql("select pg_relation_filepath('victim')")
    flip(path, 8192 + 5000)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0xFF]))


@pytest.fixture
def place() -> Iterator[Path]:
    path = scratch("ops-restore-")
    run_as().own(path)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def by_id(engine: PgBackRestEngine, backup_id: str) -> BackupInfo:
    return next(backup for backup in engine.list() if backup.backup_id == backup_id)


# What is there


def test_backups_are_listed_with_kind_chain_and_errors(company: Company) -> None:
    backups = company.engine.list()
    assert [(b.backup_id, b.kind, b.parent_id) for b in backups] == [
        (company.full, BackupKind.FULL, None),
        (company.incremental, BackupKind.INCREMENTAL, company.full),
        (company.damaged, BackupKind.INCREMENTAL, company.full),
    ]
    assert [b.error is None for b in backups] == [True, True, False]
    assert "checksum" in str(backups[2].error)
    sysid = company.cluster.sql("select system_identifier from pg_control_system()")
    assert {(b.system_identifier, b.server_version, b.engine) for b in backups} == {(sysid, 150000, "pgbackrest")}
    assert [b.timeline for b in backups] == [1, 1, 2]
    assert backups[0].start < backups[0].end < backups[1].start < backups[1].end < company.lsn < backups[2].start
    assert backups[0].raw > 20 << 20 > backups[1].raw > 0
    for earlier, later in pairwise(backups):
        assert earlier.started_at < earlier.ended_at <= later.ended_at
    assert company.engine.expire() is None


def test_the_window_ends_just_before_the_newest_archived_commit(company: Company) -> None:
    company.cluster.sql("create table if not exists w (i int); insert into w values (1)")
    newest = company.cluster.sql("select timestamp from pg_last_committed_xact()")
    company.archive()
    company.cluster.sql("insert into w values (2)")  # its segment is not archived
    window = company.engine.window()
    assert window.pieces == [(by_id(company.engine, company.full).ended_at, newest - timedelta(microseconds=1))]
    assert (window.earliest, window.latest, window.gaps) == (*window.pieces[0], [])


def test_what_cannot_be_recovered_for_sure_is_listed_as_an_error() -> None:
    entry: dict[str, Any] = {
        "label": "20261124-042244F",
        "type": "full",
        "prior": None,
        "archive": {"start": "000000010000000000000002", "stop": "000000010000000000000002"},
        "database": {"id": 1, "repo-key": 1},
        "info": {"size": 100, "delta": 100, "repository": {"delta": 10}},
        "lsn": {"start": "0/2000028", "stop": "0/2000100"},
        "timestamp": {"start": 1795494164, "stop": 1795494169},
    }
    systems = {(1, 1): {"system-id": 7, "version": "9.6"}}
    good = _backup_info("app-db", entry, systems)
    assert (good.error, good.server_version, str(good.end)) == (None, 90600, "0/2000100")
    offline = _backup_info("app-db", {**entry, "archive": {"start": None, "stop": None}}, systems)
    assert "offline" in str(offline.error)
    old = _backup_info("app-db", {key: value for key, value in entry.items() if key != "lsn"}, systems)
    assert "before 2.36" in str(old.error)
    damaged = _backup_info("app-db", {**entry, "error": True}, systems)
    assert "checksum" in str(damaged.error)


# Choosing


def test_the_newest_backup_that_reaches_the_target_is_chosen(company: Company) -> None:
    def chosen(kind: str, value: object = None) -> str:
        return company.engine.choose(RecoveryTarget(kind, value)).backup_id  # type: ignore[arg-type]

    first, second = (by_id(company.engine, name) for name in (company.full, company.incremental))
    assert chosen("time", company.moment) == company.incremental
    assert chosen("time", second.ended_at - timedelta(microseconds=1)) == company.full
    assert chosen("latest") == chosen("immediate") == company.incremental  # the damaged one is promised to nobody
    assert chosen("xid", "800") == chosen("name", "a point") == company.full
    assert chosen("lsn", str(company.lsn)) == company.incremental
    assert chosen("lsn", str(first.end)) == company.full
    latest = company.engine.window().latest
    for backup in (first, second):
        assert company.engine.carried_until(backup, RecoveryTarget("latest")) == latest


def test_a_moment_outside_of_the_window_is_refused_with_the_window(company: Company) -> None:
    window = company.engine.window()
    assert window.earliest is not None
    assert window.latest is not None
    for moment, why in (
        (window.earliest - timedelta(seconds=1), "outside of what can be restored"),
        (window.latest + timedelta(microseconds=2), "outside of what can be restored"),
        (datetime.now(window.latest.tzinfo) + timedelta(hours=1), "in the future"),
    ):
        with pytest.raises(UsageError, match=f"(?s){why}.*{window.earliest:%Y-%m-%d %H:%M:%S} to ") as refused:
            company.engine.choose(RecoveryTarget("time", moment))
        assert "Traceback" not in str(refused.value)
    with pytest.raises(UsageError, match="before the end of the oldest backup"):
        company.engine.choose(RecoveryTarget("lsn", "0/1000000"))


# Restoring


def test_a_lost_table_comes_back_as_it_was_at_the_moment(company: Company, place: Path) -> None:
    """From the incremental, over WAL in four compressions and a failover, into mapped tablespaces."""
    seen: list[tuple[int, int | None]] = []
    done = restore(
        company.platform.access,
        company.target,
        RecoveryTarget("time", company.moment),
        place / "data",
        tablespaces={f"{company.home}/space": place / "space"},
        progress=lambda step, at, total: seen.append((at, total)) if step == "restore" else None,
    )
    assert (done.backup_id, done.timeline) == (company.incremental, 3)
    assert len(seen) > 10
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == done.bytes
    server = PostgresServer(need_postgres(15), place / "data")
    server.configure({"archive_mode": "off", "port": str(free_port())})
    try:
        server.start()
        with server.connect() as connection:
            assert connection.execute(DIGEST).fetchone()[0] == company.digest
    finally:
        server.stop("immediate")
    assert {link.readlink() for link in (place / "data" / "pg_tblspc").iterdir()} == {place / "space"}


def test_the_last_moment_of_the_window_can_be_reached(company: Company, place: Path) -> None:
    company.cluster.sql("create table if not exists w (i int); insert into w values (3)")
    company.archive()
    latest = company.engine.window().latest
    assert latest is not None
    spaces = {f"{company.home}/space": place / "space"}
    done = restore(
        company.platform.access, company.target, RecoveryTarget("time", latest), place / "data", tablespaces=spaces
    )
    assert "stopping before commit" in str(done.stopped_because)
    assert done.newest_commit is not None
    assert done.newest_commit <= latest


def test_an_unfinished_restore_is_resumed_and_other_files_are_never_overwritten(company: Company, place: Path) -> None:
    engine, spaces = company.engine, {f"{company.home}/space": place / "space"}
    backup = by_id(engine, company.incremental)

    def die(step: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.fetch_base(backup, place / "data", tablespaces=spaces, progress=die)
    assert not (place / "data" / "global" / "pg_control").exists()
    engine.fetch_base(backup, place / "data", tablespaces=spaces)
    assert (place / "data" / "global" / "pg_control").exists()
    assert "live.invalid" not in (place / "data" / "postgresql.auto.conf").read_text()
    before = sorted(place.rglob("*"))
    with pytest.raises(UsageError, match="not empty"):
        engine.fetch_base(backup, place / "data", tablespaces=spaces)
    with pytest.raises(UsageError, match="not empty"):  # unmapped, it would go where the live one is
        engine.fetch_base(backup, place / "other")
    assert sorted(path for path in place.rglob("*") if path != place / "other") == before


def test_a_verification_proves_it(company: Company) -> None:
    card = verify(company.platform.access, company.target)
    assert card.verdict.value == "PASS", card.reason
    assert (card.engine, card.backup_id, card.strength) == ("pgbackrest", company.incremental, "canary")
    repository = records.repository_of(company.platform.access, company.target)
    proven = {b.backup_id: b.proof for b in records.with_proofs(company.engine.list(), repository)}
    assert {name: proof.verdict if proof else None for name, proof in proven.items()} == {
        company.full: None,
        company.incremental: "PASS",
        company.damaged: None,
    }


def test_the_command_line_lists_and_plans_with_it_and_takes_nothing(company: Company) -> None:
    def ops(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("ops")), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=company.platform.env)

    listed = ops("backup", "list", "app-db")
    assert listed.returncode == 0, listed.stderr
    assert company.incremental in listed.stdout
    assert "restorable: every moment from" in listed.stdout
    into = f"{company.home}/nowhere"
    planned = ops("restore", "app-db", "--to", company.moment.isoformat(), "--into", into, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert company.incremental in planned.stdout
    assert not Path(into).exists()
    taken = ops("backup", "run", "app-db")
    assert (taken.returncode, "kept by pgbackrest, not by us" in taken.stderr) == (2, True), taken.stderr


# What is not whole is never taken for whole


@pytest.fixture
def copy(company: Company, place: Path) -> Callable[..., PgBackRestEngine]:
    """Makes an engine over a copy of the repository that may be damaged, with changes to its configuration file."""

    def make(*, replace: tuple[str, str] = ("", ""), stanza: str = "demo") -> PgBackRestEngine:
        done = run_tool(["cp", "-r", company.home / "repo", place / "repo"])
        assert done.returncode == 0, done.stderr
        text = (company.home / "ours.conf").read_text().replace(f"{company.home}/repo", f"{place}/repo")
        config = written(place / "copy.conf", text.replace(*replace) if replace[0] else text)
        assert replace[0] in text
        where = company.target.repository.model_copy(update={"config": str(config), "stanza": stanza})
        return PgBackRestEngine(company.target.model_copy(update={"repository": where}))

    return make


def archived(place: Path, segment: str) -> Path:
    (found,) = (place / "repo" / "archive" / "demo").rglob(f"{segment}-*")
    return found


def segment_after(company: Company) -> str:
    """A segment between the incremental's end and the moment."""
    end = by_id(company.engine, company.incremental).end
    return f"00000001{0:08X}{end // (16 << 20) + 1:08X}"


def recover(engine: PgBackRestEngine, company: Company, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops_platform.recovery.restore.open_engine", lambda *_, **__: engine)
    monkeypatch.setattr(engine, "choose", lambda _: by_id(engine, company.incremental))
    restore(
        company.platform.access,
        company.target,
        RecoveryTarget("latest"),
        place / "data",
        tablespaces={f"{company.home}/space": place / "space"},
    )


def test_a_missing_segment_cuts_the_window_and_stops_a_recovery(
    company: Company, place: Path, copy: Callable[..., PgBackRestEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, segment = copy(), segment_after(company)
    archived(place, segment).unlink()
    window = engine.window()
    assert [(gap.timeline, gap.first, gap.last) for gap in window.gaps] == [(1, segment, segment)]
    assert not window.holds(company.moment)
    with pytest.raises(UsageError, match=f"missing WAL {segment} to {segment}"):
        engine.choose(RecoveryTarget("time", company.moment))
    # Asked for the end of all WAL, the recovery must not take the gap for it.
    with pytest.raises(OpsError, match=f"the archive has a gap: {segment} is missing"):
        recover(engine, company, place, monkeypatch)


@pytest.mark.parametrize("how", ["a flipped byte", "another's content"])
def test_damage_in_the_archive_stops_a_recovery(
    how: str, company: Company, place: Path, copy: Callable[..., PgBackRestEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = copy()
    path = archived(place, segment_after(company))
    if how == "a flipped byte":
        flip(path, path.stat().st_size // 2)
    else:
        others = [
            other for other in path.parent.glob(f"*{path.suffix}") if other != path and "partial" not in other.name
        ]
        shutil.copyfile(others[0], path)
    words = "SHA-1 differs" if how == "another's content" else "does not open|SHA-1 differs|repo-get failed"
    with pytest.raises(OpsError, match=words):
        recover(engine, company, place, monkeypatch)


def test_what_one_repository_lacks_comes_from_the_other(
    company: Company, place: Path, copy: Callable[..., PgBackRestEngine]
) -> None:
    second = f"link-all=y\nrepo2-path={company.home}/repo\nrepo2-cipher-type=aes-256-cbc\nrepo2-cipher-pass={SECRET}"
    engine = copy(replace=("link-all=y", second))
    archived(place, segment_after(company)).unlink()
    assert engine.window().gaps == []
    assert [backup.backup_id for backup in engine.list()] == [company.full, company.incremental, company.damaged]
    # One of two that cannot be asked is said, and not passed over.
    shutil.rmtree(place / "repo")
    (place / "repo").mkdir(mode=0)
    with pytest.raises(OpsError, match=r"(?s)repo1 could not be read.*take repo1 out of the file"):
        engine.list()


@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_a_damaged_file_of_a_backup_is_found_when_it_is_restored(
    how: str, company: Company, place: Path, copy: Callable[..., PgBackRestEngine]
) -> None:
    engine = copy(replace=("link-all=y", "link-all=y\njob-retry=0"))
    files = (place / "repo" / "backup" / "demo" / company.full / "pg_data" / "base").rglob("*")
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    if how == "flipped":
        flip(largest, largest.stat().st_size // 2)
    else:
        largest.unlink()
    backup = by_id(engine, company.incremental)
    with pytest.raises(CorruptionError, match="pgbackrest restore failed"):
        engine.fetch_base(backup, place / "data", tablespaces={f"{company.home}/space": place / "space"})
    assert not (place / "data" / "global" / "pg_control").exists()


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (("repo1-path=", "repo1-path=/nowhere"), NotThereError, "no stanza demo.*is mounted"),
        (("repo1-path=", "repo1-host=127.0.0.1\nrepo1-host-type=tls\nrepo1-host-port=1\nio-timeout=0.1\nrepo1-path="), OpsError, "repo1"),
        (("repo1-path=", "repo1-type=s3\nrepo1-s3-bucket=b\nrepo1-s3-endpoint=127.0.0.1:1\nrepo1-s3-uri-style=path\n"
          "repo1-s3-region=r\nrepo1-s3-key=k\nrepo1-s3-key-secret=s\nio-timeout=0.1\nrepo1-path="), UnreachableError, "repo1 could not be read"),
        ((f"repo1-cipher-pass={SECRET}", "repo1-cipher-pass=another"), OpsError, "repo1 could not be read"),
        (("repo1-path=", "no-such-option=1\nrepo1-cipher-type=none\nrepo1-path="), OpsError, "pgbackrest info failed"),
    ],
)  # fmt: skip
def test_a_repository_that_cannot_be_asked_is_not_an_empty_one(
    change: tuple[str, str], kind: type[OpsError], words: str, copy: Callable[..., PgBackRestEngine]
) -> None:
    engine = copy(replace=change)
    for ask in (engine.list, engine.window, lambda: engine.choose(RecoveryTarget("latest"))):
        with pytest.raises(kind, match=f"(?s){words}") as refused:
            ask()
        assert str(refused.value).replace("\n", "").isprintable()
        assert SECRET not in str(refused.value)


def test_a_repository_without_permission_is_named(place: Path, copy: Callable[..., PgBackRestEngine]) -> None:
    engine = copy()
    (place / "repo").chmod(0)
    try:
        with pytest.raises(AccessDeniedError, match="repo1 could not be read"):
            engine.list()
    finally:
        (place / "repo").chmod(0o750)


def test_a_stanza_that_is_not_there_is_named(copy: Callable[..., PgBackRestEngine]) -> None:
    with pytest.raises(NotThereError, match="no stanza billing"):
        copy(stanza="billing").list()


def test_a_configuration_file_that_is_not_there_is_named(place: Path, copy: Callable[..., PgBackRestEngine]) -> None:
    engine = copy()
    (place / "copy.conf").unlink()
    with pytest.raises(UsageError, match=r"(?s)copy.conf.*absolute path"):
        engine.list()


def test_without_the_program_nothing_is_proven(company: Company, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = company.engine
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        CouldNotVerifyError, match=r"(?s)pgbackrest is needed here.*apt-get install pgbackrest"
    ) as refused:
        engine.list()
    assert refused.value.exit_code == 3


# The newest commit of a segment


@pytest.mark.majors
@pytest.mark.parametrize("major", [14, 15, 16, 17, 18])
def test_the_newest_commit_of_a_segment_is_the_servers(major: int, new_cluster: NewCluster) -> None:
    cluster = new_cluster(major, {"track_commit_timestamp": "on", "max_prepared_transactions": "5"})

    def switched() -> bytes:
        """The segment that ends now."""
        name = cluster.sql("select pg_walfile_name(pg_switch_wal())")
        return (cluster.server.directory / "pg_wal" / name).read_bytes()

    def newest() -> datetime:
        return cluster.sql("select timestamp from pg_last_committed_xact()")

    cluster.sql("create table t (i int, x text)")
    switched()
    cluster.sql("insert into t select i, repeat(md5(i::text), 100) from generate_series(1, 2000) i")
    first = newest()
    with cluster.server.connect() as connection:
        connection.execute("begin; insert into t values (1); prepare transaction 'p'")
        connection.execute("commit prepared 'p'")
    assert newest() > first
    segment = switched()
    assert newest_end(segment) == newest()
    assert segment_size(segment) == len(segment) == 16 << 20
    cluster.sql("select pg_create_restore_point('nothing ends here')")
    assert newest_end(switched()) is None
    # What an earlier use of the file left behind the last page is not read; neither is what is no WAL.
    cut = 8 * 8192
    stale = newest_end(segment[:cut] + segment[: len(segment) - cut])
    assert stale is None or stale < newest()
    assert newest_end(b"\0" * (1 << 20)) is None
    assert newest_end(b"") is None
