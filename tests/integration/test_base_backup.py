"""Base backups against real servers: what is taken comes back, file by file and row by row, and what cannot be taken says why."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ops_platform.backup.basebackup import run_backup
from ops_platform.backup.engine import open_engine
from ops_platform.backup.model import BackupInfo, BackupKind, Lsn, Manifest
from ops_platform.backup.receiver import receive_range
from ops_platform.clients.postgres_binaries import (
    PgInstall,
    PostgresServer,
    find_postgres,
    free_port,
    need_postgres,
    run_as,
    run_tool,
)
from ops_platform.clock import SystemClock
from ops_platform.errors import (
    AccessDeniedError,
    ConflictError,
    CouldNotVerifyError,
    NotThereError,
    OpsError,
    UnreachableError,
    UsageError,
)
from ops_platform.recovery.model import Verdict
from ops_platform.recovery.verify import verify
from tests.integration.wal_rig import eventually
from tests.rig import HBA, PASSWORD, Cluster, Platform, missing, scratch

NewCluster = Callable[..., Cluster]
NewPlatform = Callable[..., Platform]

DIGEST = "select count(*) || ' ' || coalesce(md5(string_agg(r::text, chr(10) order by r::text)), '') from {} r"


@pytest.fixture
def place() -> Iterator[Path]:
    """Where restores go: a folder that the servers' user can pass through."""
    path = scratch("ops-restore-")
    yield path
    shutil.rmtree(path, ignore_errors=True)


def digest(server: Cluster | PostgresServer, table: str, dbname: str = "postgres") -> str:
    connect = server.server.connect if isinstance(server, Cluster) else server.connect
    with connect(dbname) as connection:
        return connection.execute(DIGEST.format(table)).fetchone()[0]


def archive_up_to_now(platform: Platform, cluster: Cluster, manifest: Manifest) -> None:
    """What the receiver would have done by now: the WAL after the backup is in the store."""
    now = Lsn.parse(cluster.sql("select pg_current_wal_flush_lsn()::text"))
    receive_range(platform.access, platform.target, manifest.start, now, manifest.timeline)


@contextmanager
def recovered(
    platform: Platform, backup: BackupInfo, place: Path, tablespaces: dict[str, Path] | None = None
) -> Generator[PostgresServer]:
    """The backup restored and recovered to the end of its WAL, serving on a socket alone."""
    engine = open_engine(platform.access, platform.target)
    place.mkdir(exist_ok=True)
    run_as().own(place)
    engine.fetch_base(backup, place / "data", tablespaces=tablespaces)
    check_files(place / "data", backup)
    (place / "spool").mkdir()
    run_as().own(place / "spool")
    server = PostgresServer(need_postgres(backup.server_version // 10000), place / "data")
    with ExitStack() as stack:
        fetcher = stack.enter_context(engine.wal_fetcher(backup, place / "spool"))
        server.configure({"restore_command": fetcher.restore_command, "archive_mode": "off"})
        (place / "data" / "recovery.signal").touch()
        (place / "data" / "standby.signal").unlink(missing_ok=True)  # comes along from a standby
        stack.callback(server.stop, "immediate")
        server.start()
        with server.connect() as connection:
            eventually(
                lambda: not connection.execute("select pg_is_in_recovery()").fetchone()[0], why=server.log_tail()
            )
        assert fetcher.fetched_segments > 0
        yield server


def check_files(data: Path, backup: BackupInfo) -> None:
    """Against the manifest that the server itself sent with the files, where this machine has the tool for it."""
    install = need_postgres(backup.server_version // 10000)
    if verify := install.tool("pg_verifybackup"):
        done = run_tool([verify, "-n", "-i", "tablespace_map", data])
        assert done.returncode == 0, done.stderr


def only(platform: Platform) -> BackupInfo:
    (backup,) = open_engine(platform.access, platform.target).list()
    return backup


def no_backup_counts(platform: Platform) -> bool:
    return open_engine(platform.access, platform.target).list() == []


# What is taken comes back


@pytest.mark.majors
@pytest.mark.parametrize("major", [14, 15, 16, 17, 18])
def test_what_is_taken_comes_back(major: int, new_cluster: NewCluster, new_platform: NewPlatform, place: Path) -> None:
    cluster = new_cluster(major)
    cluster.sql("create table t as select i, md5(i::text) from generate_series(1, 20000) i")
    cluster.sql("create unlogged table scratchpad as select i from generate_series(1, 1000) i")
    platform = new_platform({"app-db": [cluster]})
    manifest = run_backup(platform.access, platform.target)
    assert (manifest.kind, manifest.major, manifest.source_role) == (BackupKind.FULL, major, "primary")
    backup = only(platform)
    assert backup.backup_id == manifest.backup_id
    cluster.sql("update t set md5 = 'after the backup' where i % 7 = 0")
    archive_up_to_now(platform, cluster, manifest)
    with recovered(platform, backup, place) as server:
        assert digest(server, "t") == digest(cluster, "t")
        assert digest(server, "scratchpad") == "0 "  # unlogged tables come back, and come back empty
        assert digest(cluster, "scratchpad").startswith("1000 ")


@pytest.mark.majors
@pytest.mark.parametrize("major", [17, 18])
def test_incrementals_come_back_with_their_chain(
    major: int, new_cluster: NewCluster, new_platform: NewPlatform, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, platform, old = _three_in_a_chain(major, new_cluster, new_platform, place)
    last = open_engine(platform.access, platform.target).list()[-1]
    with monkeypatch.context() as bare:
        # A server without its tools: the chain is refused, not half restored.
        tool = PgInstall.tool
        bare.setattr(PgInstall, "tool", lambda self, name: None if name == "pg_combinebackup" else tool(self, name))
        with pytest.raises(CouldNotVerifyError, match="has no pg_combinebackup") as refused:
            open_engine(platform.access, platform.target).fetch_base(
                last, place / "data", tablespaces={str(old): place / "space"}
            )
    assert f"postgresql-client-{major}" in str(refused.value)
    assert not (place / "data").exists()
    with recovered(platform, last, place, {str(old): place / "space"}) as server:
        for table in ("kept", "elsewhere", "added"):
            assert digest(server, table) == digest(cluster, table), table
        with server.connect() as connection:
            assert connection.execute("select to_regclass('dropped')").fetchone()[0] is None
            assert connection.execute("select spcname, pg_tablespace_location(oid) from pg_tablespace where oid > 9999").fetchone() == (
                "space",
                str(place / "space"),
            )  # fmt: skip
    assert not list(place.glob(".data.parts*"))


def _three_in_a_chain(
    major: int, new_cluster: NewCluster, new_platform: NewPlatform, place: Path
) -> tuple[Cluster, Platform, Path]:
    """A full backup and two incrementals, with tables changed, dropped, made and vacuumed away in between."""
    cluster = new_cluster(major)
    old = place / "old space"
    old.mkdir()
    run_as().own(old)
    cluster.sql(f"create tablespace space location '{old}'")
    for table, where in (("kept", ""), ("dropped", ""), ("elsewhere", "tablespace space")):
        cluster.sql(f"create table {table} {where} as select i, md5(i::text) as m from generate_series(1, 30000) i")
    platform = new_platform({"app-db": [cluster]})
    full = run_backup(platform.access, platform.target)
    cluster.sql("update kept set m = 'changed' where i between 100 and 200")
    cluster.sql("drop table dropped")
    cluster.sql("update elsewhere set m = 'changed' where i < 50")
    first = run_backup(platform.access, platform.target)
    cluster.sql("create table added as select i from generate_series(1, 5000) i")
    cluster.sql("delete from elsewhere where i > 10000")
    cluster.sql("vacuum elsewhere")  # cuts the file's end off
    second = run_backup(platform.access, platform.target, kind="incremental")
    kinds = [(manifest.kind, manifest.parent_id) for manifest in (full, first, second)]
    assert kinds == [
        (BackupKind.FULL, None),
        (BackupKind.INCREMENTAL, full.backup_id),
        (BackupKind.INCREMENTAL, first.backup_id),
    ]
    assert first.raw < full.raw / 2
    return cluster, platform, old


def test_tables_of_more_than_one_segment_come_back(
    new_cluster: NewCluster, new_platform: NewPlatform, place: Path
) -> None:
    """A file of a table ends at 1 GiB and the next begins. The first is filled with empty pages, which cost no time to make."""
    cluster = new_cluster(18)
    cluster.sql("create table big as select i, md5(i::text) as m from generate_series(1, 5000) i")
    file = cluster.server.directory / cluster.sql("select pg_relation_filepath('big')")
    run_tool([cluster.server.install.bindir / "pg_ctl", "-D", cluster.server.directory, "-m", "fast", "stop"])
    os.truncate(file, 1 << 30)
    cluster.server.start()
    cluster.sql("insert into big select i, md5(i::text) from generate_series(5001, 20000) i")
    assert file.with_name(f"{file.name}.1").stat().st_size > 0
    platform = new_platform({"app-db": [cluster]}, extra={"backup": {"transfer": {"block_size": "16MiB"}}})
    run_backup(platform.access, platform.target)
    cluster.sql("update big set m = 'changed' where i % 1000 = 0")
    assert run_backup(platform.access, platform.target).kind is BackupKind.INCREMENTAL
    with recovered(platform, open_engine(platform.access, platform.target).list()[-1], place) as server:
        assert digest(server, "big") == digest(cluster, "big")
        assert digest(server, "big").startswith("20000 ")


@pytest.mark.majors
@pytest.mark.parametrize("major", [14, 18])
def test_tablespaces_come_back_where_they_are_mapped_to(
    major: int, new_cluster: NewCluster, new_platform: NewPlatform, place: Path
) -> None:
    old = place / "spaces" / 'a "quoted" name, žluťoučký kůň'
    old.mkdir(parents=True)
    run_as().own(old)
    cluster = new_cluster(major)
    cluster.sql("create tablespace \"Sp'ace\" location '" + str(old) + "'")
    cluster.sql('create table t tablespace "Sp\'ace" as select i from generate_series(1, 5000) i')
    # The rate is given in each of the two grammars of BASE_BACKUP.
    platform = new_platform({"app-db": [cluster]}, extra={"backup": {"transfer": {"rate_limit": "200MiB"}}})
    manifest = run_backup(platform.access, platform.target)
    assert [archive.location for archive in manifest.archives if archive.oid] == [str(old)]
    # Unmapped it would go where the source lives; that place is not empty, and nothing is restored over files.
    engine = open_engine(platform.access, platform.target)
    with pytest.raises(UsageError, match="is not empty"):
        engine.fetch_base(only(platform), place / "unmapped")
    with recovered(platform, only(platform), place, {str(old): place / "new"}) as server:
        assert digest(server, "t") == digest(cluster, "t")
        (link,) = (place / "data" / "pg_tblspc").iterdir()
        assert link.readlink() == place / "new"
        with server.connect() as connection:
            path = place / "data" / connection.execute("select pg_relation_filepath('t')").fetchone()[0]
        assert path.resolve().is_relative_to((place / "new").resolve())


@contextmanager
def standby_of(primary: Cluster, new_platform: NewPlatform, place: Path) -> Generator[tuple[PostgresServer, Platform]]:
    """A standby that we restored ourselves, and an inventory that prefers it."""
    alone = new_platform({"app-db": [primary]})
    run_backup(alone.access, alone.target)
    standby = PostgresServer(need_postgres(18), place / "standby", port=free_port())
    run_as().own(place)
    open_engine(alone.access, alone.target).fetch_base(only(alone), place / "standby")
    secret = PASSWORD.replace("\\", "\\\\").replace("'", "\\'")
    standby.configure(
        {"primary_conninfo": f"host=127.0.0.1 port={primary.port} user=ops_backup password='{secret}'"}, hba=HBA
    )
    (place / "standby" / "standby.signal").touch()
    with ExitStack() as stack:
        stack.callback(standby.stop, "immediate")
        standby.start()
        streams = "select count(*) from pg_stat_replication where state = 'streaming'"
        eventually(lambda: primary.sql(streams) == 1, why=standby.log_tail)
        hosts = [{"host": "127.0.0.1", "port": port} for port in (primary.port, standby.port)]
        yield (
            standby,
            new_platform(
                {"app-db": [primary]}, extra={"connection": {"hosts": hosts}, "backup": {"from_standby": True}}
            ),
        )


def test_a_standby_is_a_source_as_good_as_the_primary(
    new_cluster: NewCluster, new_platform: NewPlatform, place: Path
) -> None:
    primary = new_cluster(18)
    primary.sql("create table t as select i, md5(i::text) from generate_series(1, 20000) i")
    with standby_of(primary, new_platform, place) as (standby, both):
        primary.sql("update t set md5 = 'before the backup' where i < 100")
        manifest = run_backup(both.access, both.target)
        assert (manifest.source_role, manifest.source) == ("standby", f"127.0.0.1:{standby.port}")
        assert "primary" not in manifest.why
        primary.sql("update t set md5 = 'after the backup' where i > 19900")
        archive_up_to_now(both, primary, manifest)
        with recovered(both, only(both), place / "again") as server:
            assert digest(server, "t") == digest(primary, "t")


class Hasty(SystemClock):
    """Whoever sleeps has slept."""

    slept = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


def test_a_standby_that_does_not_keep_up_is_not_read_and_the_manifest_says_why(
    new_cluster: NewCluster, new_platform: NewPlatform, place: Path
) -> None:
    primary = new_cluster(18)
    with standby_of(primary, new_platform, place) as (standby, both):

        def taken() -> str:
            manifest = run_backup(both.access, both.target, kind="full", clock=Hasty())
            assert (manifest.source_role, manifest.source) == ("primary", f"127.0.0.1:{primary.port}")
            return manifest.why.removeprefix(f"asked for; of the primary, because 127.0.0.1:{standby.port} ")

        with standby.connect() as connection:
            connection.execute("select pg_wal_replay_pause()")
            primary.sql("create table t as select 1 as i")
            assert taken() == "is more than 60 s behind"
            primary.sql("revoke pg_monitor from ops_backup")
            connection.execute("select pg_wal_replay_resume()")
            may = "select pg_has_role('ops_backup', 'pg_read_all_stats', 'usage')"
            eventually(lambda: connection.execute(may).fetchone() == (False,), why=standby.log_tail)
            assert taken() == "does not show our role whether it streams: GRANT pg_monitor"
            connection.execute("alter system set primary_conninfo = ''")
            connection.execute("select pg_reload_conf()")
            gone = "select count(*) from pg_stat_wal_receiver"
            eventually(lambda: connection.execute(gone).fetchone() == (0,), why=standby.log_tail)
        assert taken() == "receives no WAL"
        primary.server.stop()
        with pytest.raises(UnreachableError, match="no primary of app-db answers"):
            run_backup(both.access, both.target)
        (primary.server.directory / "standby.signal").touch()
        primary.server.start()
        primary.sql("select pg_promote()")
        assert taken() == "is on timeline 1, the primary on 2"


def test_an_idle_database_comes_back(new_cluster: NewCluster, new_platform: NewPlatform, place: Path) -> None:
    cluster = new_cluster(16)
    cluster.sql("create table t as select 1 as i")
    platform = new_platform({"app-db": [cluster]})
    for _ in range(2):
        run_backup(platform.access, platform.target)
    backups = open_engine(platform.access, platform.target).list()
    assert len(backups) == 2
    with recovered(platform, backups[-1], place) as server:
        assert digest(server, "t") == digest(cluster, "t")


def test_five_thousand_tables_come_back(new_cluster: NewCluster, new_platform: NewPlatform, place: Path) -> None:
    cluster = new_cluster(18)
    cluster.sql(
        "do $$ begin for n in 1 .. 5000 loop execute format('create table many_%s (i int)', n);"
        " if n % 100 = 0 then execute format('insert into many_%s values (%s)', n, n); end if; end loop; end $$"
    )
    platform = new_platform({"app-db": [cluster]})
    run_backup(platform.access, platform.target)
    with recovered(platform, only(platform), place) as server, server.connect() as connection:
        assert connection.execute("select count(*) from pg_class where relname like 'many_%'").fetchone()[0] == 5000
        assert connection.execute("select i from many_4900").fetchone()[0] == 4900
    card = verify(platform.access, platform.target)
    assert card.verdict is Verdict.PASS, card.reason
    (reads,) = (gate for gate in card.gates if gate.id == "reads")
    assert reads.detail["tables"] >= 5000


def test_names_with_quotes_spaces_and_other_scripts(
    new_cluster: NewCluster, new_platform: NewPlatform, place: Path
) -> None:
    name, role = "we\"ird 'dätabase' ☃", "röle o'\"backup"
    quoted, quoted_role = (text.replace('"', '""') for text in (name, role))
    cluster = new_cluster(18)
    cluster.sql(f'create database "{quoted}"')
    cluster.sql(
        f"create role \"{quoted_role}\" login replication in role pg_monitor password '{PASSWORD.replace(chr(39), chr(39) * 2)}'"
    )
    cluster.sql(f'grant pg_read_all_data to "{quoted_role}"')
    cluster.sql(f'create schema ops_canary authorization "{quoted_role}"', name)
    cluster.sql('create schema "Шема"; create table "Шема"."a table; --" as select i from generate_series(1, 100) i', name)  # fmt: skip
    platform = new_platform({"app-db": [cluster]}, extra={"connection": {"dbname": name, "user": role}})
    run_backup(platform.access, platform.target)
    with recovered(platform, only(platform), place) as server:
        assert digest(server, '"Шема"."a table; --"', name) == digest(cluster, '"Шема"."a table; --"', name)
    card = verify(platform.access, platform.target, full=True)
    assert card.verdict is Verdict.PASS, card.reason


# How bytes travel


@pytest.mark.parametrize("compression", ["lz4", "none"])
def test_compression_of_our_side_is_a_choice(
    compression: str, shared_cluster: Cluster, new_platform: NewPlatform, place: Path
) -> None:
    transfer = {"compression": compression}
    platform = new_platform({"app-db": [shared_cluster]}, extra={"backup": {"transfer": transfer}})
    manifest = run_backup(platform.access, platform.target)
    assert (manifest.compression, manifest.compress_at) == (compression, "client")
    assert (manifest.stored < manifest.raw / 2) == (compression == "lz4")
    open_engine(platform.access, platform.target).fetch_base(only(platform), place / "data")
    check_files(place / "data", only(platform))


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compression_at_the_server(
    compression: str, new_cluster: NewCluster, new_platform: NewPlatform, place: Path
) -> None:
    debian = find_postgres(15)
    if debian is None or debian.source != "debian":
        missing("a PostgreSQL that is built with zstd", "Debian's postgresql-15 is: make services, as root")
    cluster = new_cluster(15)
    old = place / "old"
    old.mkdir()
    run_as().own(old)
    cluster.sql(f"create tablespace space location '{old}'")
    cluster.sql("create table t tablespace space as select i, md5(i::text) from generate_series(1, 20000) i")
    transfer = {"compression": compression, "compress_at": "server"}
    platform = new_platform({"app-db": [cluster]}, extra={"backup": {"transfer": transfer}})
    manifest = run_backup(platform.access, platform.target)
    assert (manifest.compression, manifest.compress_at, manifest.index) == (compression, "server", None)
    assert manifest.raw < 15 << 20 < cluster.sql("select sum(pg_database_size(oid)) from pg_database")
    with recovered(platform, only(platform), place, {str(old): place / "new"}) as server:
        assert digest(server, "t") == digest(cluster, "t")


def test_a_server_that_cannot_compress_says_so(shared_cluster: Cluster, new_platform: NewPlatform) -> None:
    transfer = {"compression": "zstd", "compress_at": "server"}
    platform = new_platform({"app-db": [shared_cluster]}, extra={"backup": {"transfer": transfer}})
    with pytest.raises(OpsError, match=r"(?is)support compression with zstd.*compress_at: client"):
        run_backup(platform.access, platform.target)
    assert no_backup_counts(platform)


def test_before_15_the_server_does_not_compress(new_cluster: NewCluster, new_platform: NewPlatform) -> None:
    platform = new_platform({"app-db": [new_cluster(14)]}, extra={"backup": {"transfer": {"compress_at": "server"}}})
    with pytest.raises(UsageError, match=r"(?s)needs PostgreSQL 15.*compress_at: client"):
        run_backup(platform.access, platform.target)


# Full instead of incremental, with the reason


@pytest.mark.parametrize(
    ("major", "settings", "why"),
    [(16, {}, "PostgreSQL 16 has no incremental backups"), (18, {"summarize_wal": "off"}, "summarize_wal is off")],
)
def test_where_no_incremental_can_be_taken_a_full_one_says_why(
    major: int, settings: dict[str, str], why: str, new_cluster: NewCluster, new_platform: NewPlatform
) -> None:
    platform = new_platform({"app-db": [new_cluster(major, settings)]})
    run_backup(platform.access, platform.target)
    second = run_backup(platform.access, platform.target, kind="incremental")
    assert (second.kind, why in second.why) == (BackupKind.FULL, True), second.why


# What cannot be taken says why, and leaves nothing that counts


def test_of_two_backups_at_once_the_second_is_refused(shared_cluster: Cluster, new_platform: NewPlatform) -> None:
    platform = new_platform({"app-db": [shared_cluster]})
    refused: list[ConflictError] = []

    def meanwhile(step: str, done: int, total: int | None) -> None:
        if step == "waiting for its WAL":
            with pytest.raises(ConflictError) as error:
                run_backup(platform.access, platform.target)
            refused.append(error.value)

    manifest = run_backup(platform.access, platform.target, progress=meanwhile)
    assert len(refused) == 1
    assert "another backup of app-db is running: pid " in refused[0].what
    assert only(platform).backup_id == manifest.backup_id
    run_backup(platform.access, platform.target)  # the lock went with its holder


def test_the_lock_of_a_backup_that_died_is_gone_with_it(shared_cluster: Cluster, new_platform: NewPlatform) -> None:
    platform = new_platform({"app-db": [shared_cluster]})

    def die(step: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_backup(platform.access, platform.target, progress=die)
    assert no_backup_counts(platform)
    assert len(platform.repository.unfinished()) == 1
    run_backup(platform.access, platform.target)


def _extra(**connection: Any) -> dict[str, Any]:
    return {"connection": connection}


def test_a_role_without_replication_is_named(shared_cluster: Cluster, new_platform: NewPlatform) -> None:
    shared_cluster.sql(
        f"drop role if exists reader; create role reader login in role pg_monitor password '{PASSWORD.replace(chr(39), chr(39) * 2)}'"
    )
    platform = new_platform({"app-db": [shared_cluster]}, extra=_extra(user="reader"))
    with pytest.raises(
        AccessDeniedError, match=r"(?s)the role reader may not replicate.*ALTER ROLE reader REPLICATION"
    ):
        run_backup(platform.access, platform.target)
    assert no_backup_counts(platform)


def test_a_wrong_password_is_named_and_not_shown(shared_cluster: Cluster, new_platform: NewPlatform) -> None:
    platform = new_platform({"app-db": [shared_cluster]})
    (platform.home / "password").write_text("wrong-password")
    platform.reload()
    with pytest.raises(AccessDeniedError, match="the password of ops_backup is refused") as refused:
        run_backup(platform.access, platform.target)
    assert "wrong-password" not in str(refused.value)
    assert no_backup_counts(platform)


def test_a_host_that_does_not_answer_is_named(shared_cluster: Cluster, new_platform: NewPlatform) -> None:
    port = free_port()
    hosts = [{"host": "127.0.0.1", "port": port}]
    platform = new_platform({"app-db": [shared_cluster]}, extra=_extra(hosts=hosts))
    with pytest.raises(UnreachableError, match=f"127.0.0.1:{port}"):
        run_backup(platform.access, platform.target)


def test_a_database_that_is_not_there_is_named(shared_cluster: Cluster, new_platform: NewPlatform) -> None:
    platform = new_platform({"app-db": [shared_cluster]}, extra=_extra(dbname="nowhere"))
    with pytest.raises((NotThereError, UnreachableError), match='database "nowhere" does not exist'):
        run_backup(platform.access, platform.target)


def test_wal_senders_that_are_used_up_are_named(new_cluster: NewCluster, new_platform: NewPlatform) -> None:
    platform = new_platform({"app-db": [new_cluster(18, {"max_wal_senders": "1"})]})
    taken = platform.access.replication(platform.target)
    try:
        with pytest.raises(ConflictError, match=r"(?s)all WAL sender slots are in use.*raise max_wal_senders"):
            run_backup(platform.access, platform.target)
    finally:
        taken.finish()
    assert no_backup_counts(platform)


def test_wal_level_minimal_is_refused(new_cluster: NewCluster, new_platform: NewPlatform) -> None:
    cluster = new_cluster(15, {"wal_level": "minimal", "max_wal_senders": "0"})
    platform = new_platform({"app-db": [cluster]})
    with pytest.raises(UsageError, match=r"(?s)wal_level is minimal.*wal_level = replica"):
        run_backup(platform.access, platform.target)
    assert no_backup_counts(platform)


@pytest.mark.parametrize("version", [130014, 190000])
def test_a_major_that_is_not_supported_is_refused(
    version: int, shared_cluster: Cluster, new_platform: NewPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such server is here: a real one answers, and what it says of its version is changed on the way."""
    from ops_platform.backup import basebackup

    asked = basebackup._DESCRIBE
    assert "current_setting('server_version_num')::int" in asked
    monkeypatch.setattr(
        basebackup, "_DESCRIBE", asked.replace("current_setting('server_version_num')::int", str(version))
    )
    platform = new_platform({"app-db": [shared_cluster]})
    with pytest.raises(UsageError, match=rf"PostgreSQL {version // 10000} is not supported"):
        run_backup(platform.access, platform.target)
    assert no_backup_counts(platform)
