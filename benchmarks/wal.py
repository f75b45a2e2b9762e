"""The WAL archive beside pgBackRest's archive-push and pg_receivewal: a backlog, and a live burst."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable

from benchmarks.ground import OURS, PEER, Database, Talk, World, drained, empty_folder, stored_by_peer, timed
from benchmarks.measure import Comparison, Goal, measured
from benchmarks.sizes import MB, Sizes, gib
from ops_platform.backup.model import Lsn
from ops_platform.clients.postgres_binaries import find_tool

_BOUND_BY_WAL = "both are as fast as pg_receivewal writes to local disk"


def _wal_database(world: World) -> Database:
    database = world.database("wal", 15, "", 0)
    if not database.cluster.sql("select count(*) from pg_replication_slots"):
        talk = Talk(database, {"do": "receive"})
        talk.ask("start")
        talk.end()
        database.cluster.sql("select pg_create_physical_replication_slot('bench_plain', true)")
    return database


def wal_backlog(world: World, sizes: Sizes) -> Comparison:
    to_disk = "pg_receivewal to local disk"
    found = Comparison(
        "wal-backlog",
        f"archiving a backlog of {gib(sizes.wal)} of WAL",
        "seconds",
        "The same WAL for all: it is written first, then one after the other takes it. Ours: the receiver, from the start of its connection"
        " until the store has confirmed the last segment (its interpreter runs already: it is long-lived). pgBackRest: `archive-push` async"
        " with two processes, from the moment at which PostgreSQL's archiver may go on until the last segment is confirmed in its"
        " spool; until then the archiver is held inside of its command, so that it does not pause. pg_receivewal syncs each segment.",
        [
            Goal("≤ 0.75 × pgBackRest async", OURS, PEER, most=0.75, if_missed=_BOUND_BY_WAL),
            Goal("≥ 0.85 × the rate of pg_receivewal, so ≤ 1.18 × its time", OURS, to_disk, most=1 / 0.85),
        ],
    )
    database = _wal_database(world)
    for number in range(sizes.rounds):
        drained(database)
        _take_up(database)
        database.gate(open_=False)
        begin = database.lsn()
        sides = _backlog_sides(database, begin, database.write_wal(sizes.wal), to_disk)
        names = list(sides)
        found.load.append(os.getloadavg()[0])
        for side in names[number % 3 :] + names[: number % 3]:
            found.add(side, sides[side]())
        shutil.rmtree(database.home / "received", ignore_errors=True)
    rate = sizes.wal / MB
    found.notes.append(
        "; ".join(f"{side}: {rate / found.spread(side).median:.0f} MiB/s" for side in found.rounds) + "."
    )
    return found


def _backlog_sides(database: Database, begin: int, end: int, to_disk: str) -> dict[str, Callable[[], float]]:
    def ours() -> float:
        talk = Talk(database, {"do": "receive"})
        began = time.time()
        seconds = talk.ask(str(end))["at"] - began
        talk.end()
        return seconds

    def theirs() -> float:
        began = time.time()
        database.gate(open_=True)
        return stored_by_peer(database, database.segments(begin, end)) - began

    def plain() -> float:
        into, server = empty_folder(database, "received"), database.cluster.server
        command = [
            str(find_tool("pg_receivewal", 15)),
            "-D",
            str(into),
            "-S",
            "bench_plain",
            f"--endpos={Lsn(end - 1)}",
            "-n",
        ]
        command += ["-h", str(server.sockets), "-p", str(server.port), "-U", "postgres"]
        return timed(command, as_server=True).seconds

    return {OURS: ours, PEER: theirs, to_disk: plain}


def _take_up(database: Database) -> None:
    """Ours and the plain slot are at the newest position: nothing of an earlier round is taken twice."""
    talk = Talk(database, {"do": "receive"})
    talk.ask(str(database.write_wal(1)))
    talk.end()
    database.cluster.sql("select pg_replication_slot_advance('bench_plain', pg_current_wal_flush_lsn())")


def wal_burst(world: World, sizes: Sizes) -> Comparison:
    found = Comparison(
        "wal-burst",
        f"after a live burst of {gib(sizes.wal // 2)} of WAL: seconds until its last segment is durable",
        "seconds",
        "Each archives alone while the WAL is being written, ours by a receiver that streams, pgBackRest by `archive-push` async. The clock"
        " begins when the segment has been switched.",
        [Goal("≤ 0.5 s", OURS, most=0.5)],
    )
    database = _wal_database(world)

    def ours() -> float:
        database.gate(open_=False)
        talk = Talk(database, {"do": "receive"})
        talk.ask("start")
        talk.ask(str(database.write_wal(1)))
        end = database.write_wal(sizes.wal // 2)
        began = time.time()
        seconds = talk.ask(str(end))["at"] - began
        talk.end()
        return max(0.0, seconds)

    def theirs() -> float:
        database.gate(open_=True)
        drained(database)
        begin = database.lsn()
        end = database.write_wal(sizes.wal // 2)
        began = time.time()
        return stored_by_peer(database, database.segments(begin, end)) - began

    measured(found, sizes.rounds, {OURS: ours, PEER: theirs})
    database.gate(open_=True)
    return found
