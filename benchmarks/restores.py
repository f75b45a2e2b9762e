"""Restores beside pgBackRest, with and without replay, and the checks of a verification beside pg_dump."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.ground import OURS, PEER, Database, Talk, World, drop_caches, empty_folder, stored_by_peer, timed, until
from benchmarks.measure import Comparison, Goal, measured
from benchmarks.sizes import GB, Sizes, gib
from ops_platform.clients.postgres_binaries import PostgresServer, find_tool

_BOUND_BY_DISK = "writing and syncing the same bytes is common to both, and the rounds spread widely"
_BOUND_BY_REPLAY = "the replay of 1 GiB by the server is common to both, and about half of the time"


def restore(world: World, sizes: Sizes) -> Comparison:
    database = world.database("pgbench", 15, "compressible", sizes.large)
    database.transfer()
    mine = database.ours(do="backup", kind="full").said["backup_id"]
    database.pgbackrest("backup", "--type=full")
    label = database.backup_label()
    found = Comparison(
        "restore",
        f"restore of {database.size() / GB:.1f} GiB from S3",
        "seconds",
        "From the start of the process to its end, without replay. The page cache is dropped before each. Both are on disk at the end:"
        " pgBackRest (two processes) syncs each file, ours syncs the file system once.",
        [Goal("≤ 0.65 × pgBackRest", OURS, PEER, most=0.65, if_missed=_BOUND_BY_DISK)],
    )

    def cold(work: Callable[[Path], float]) -> float:
        into = empty_folder(database, "restored")
        drop_caches()
        try:
            return work(into)
        finally:
            shutil.rmtree(into, ignore_errors=True)

    def ours(into: Path) -> float:
        return database.ours(do="fetch", backup=mine, into=str(into)).seconds

    def theirs(into: Path) -> float:
        return database.pgbackrest("restore", f"--set={label}", f"--pg1-path={into}").seconds

    measured(found, sizes.rounds, {OURS: lambda: cold(ours), PEER: lambda: cold(theirs)})
    return found


def restore_replay(world: World, sizes: Sizes) -> Comparison:
    database = world.database("pgbench", 15, "compressible", sizes.large)
    talk = Talk(database, {"do": "receive"})
    talk.ask("start")
    database.transfer()
    database.ours(do="backup", kind="full")
    database.pgbackrest("backup", "--type=full")
    begin = database.lsn()
    database.write_wal(sizes.wal, table="replayed")
    moment = database.cluster.sql("select clock_timestamp()")
    end = database.write_wal(1, table="replayed")
    talk.ask(str(end))
    talk.end()
    stored_by_peer(database, database.segments(begin, end))
    rows = database.cluster.sql("select count(*) from replayed where at < %s", "postgres", moment)
    found = Comparison(
        "restore-replay",
        f"restore of {database.size() / GB:.1f} GiB and replay of {gib(sizes.wal)} of WAL to a time",
        "seconds",
        "From the start of the process until a server that has left recovery holds the data, on disk. The page cache is dropped before each. Ours"
        " replays without fsync and syncs at the end; pgBackRest's restored server runs with fsync, as a user would start it,"
        " and fetches by `archive-get` async with two processes. Rows at the target are counted on both.",
        [Goal("≤ 0.75 × pgBackRest", OURS, PEER, most=0.75, if_missed=_BOUND_BY_REPLAY)],
    )

    def ours() -> float:
        into = database.home / "replayed"
        shutil.rmtree(into, ignore_errors=True)
        drop_caches()
        try:
            seconds = database.ours(do="restore", to=moment.isoformat(), into=str(into)).seconds
            _check_rows(database, into, rows)
            return seconds
        finally:
            shutil.rmtree(into, ignore_errors=True)

    def theirs() -> float:
        into = empty_folder(database, "replayed")
        drop_caches()
        try:
            return _peer_replay(database, into, moment.isoformat(sep=" "), rows)
        finally:
            shutil.rmtree(into, ignore_errors=True)

    measured(found, sizes.rounds, {OURS: ours, PEER: theirs})
    return found


def _check_rows(database: Database, into: Path, rows: int) -> None:
    server = PostgresServer(database.cluster.server.install, into, log=database.home / "check.log")
    server.start({"archive_mode": "off", "fsync": "off"})
    try:
        _assert_rows(server, rows)
    finally:
        server.stop("immediate")


def _assert_rows(server: PostgresServer, rows: int) -> None:
    with server.connect() as connection:
        there = connection.execute("select count(*) from replayed").fetchone()[0]
    if there != rows:
        raise RuntimeError(f"{there} rows were restored, {rows} were there at that time")


def _peer_replay(database: Database, into: Path, moment: str, rows: int) -> float:
    began = time.monotonic()
    spool = f"--spool-path={database.home}/spool-get"
    database.pgbackrest(
        "restore", f"--pg1-path={into}", "--type=time", f"--target={moment}", "--target-action=promote", spool
    )
    server = PostgresServer(database.cluster.server.install, into, log=database.home / "replay.log")
    server.start({"archive_mode": "off", "fsync": "on"}, wait=600)
    try:

        def promoted() -> bool:
            with server.connect() as connection:
                return not connection.execute("select pg_is_in_recovery()").fetchone()[0]

        until(promoted)
        server_ready = time.monotonic() - began
        _assert_rows(server, rows)
        return server_ready
    finally:
        server.stop("immediate")
        shutil.rmtree(database.home / "spool-get", ignore_errors=True)


# Verification


def verify_sampled(world: World, sizes: Sizes) -> Comparison:
    database = world.database("pgbench", 15, "compressible", sizes.large)
    database.transfer()
    talk = Talk(database, {"do": "receive"})
    talk.ask("start")
    database.ours(do="backup", kind="full")
    found = Comparison(
        "verify-sampled",
        "the checks of one sampled verification, on top of its restore",
        "seconds",
        "The sum of all gates of a verification by the default policy (every file against the manifest, page checksums, pg_amcheck of a"
        " sample, every table read to its end, and the rest), without fetch and replay, beside `pg_dump` of the same database to nowhere.",
        [Goal("≤ 0.5 × pg_dump to nowhere", OURS, "pg_dump to nowhere", most=0.5)],
    )
    last: dict[str, Any] = {}

    def ours() -> float:
        last.update(database.ours(do="verify").said)
        if last["verdict"] != "PASS":
            raise RuntimeError(f"{last['verdict']}: {last['reason']}")
        return sum(last["gates"].values())

    def theirs() -> float:
        server = database.cluster.server
        command = [str(find_tool("pg_dump", 15)), "-h", str(server.sockets), "-p", str(server.port), "-U", "postgres"]
        return timed([*command, "-f", "/dev/null", "postgres"], as_server=True).seconds

    try:
        measured(found, sizes.rounds, {OURS: ours, "pg_dump to nowhere": theirs})
    finally:
        talk.kill()
    longest = sorted(last["gates"].items(), key=lambda item: -item[1])[:5]
    found.notes.append(
        "Every verdict was PASS. The longest gates of the last one: "
        + ", ".join(f"{k} {v:.1f} s" for k, v in longest)
        + "."
    )
    return found
