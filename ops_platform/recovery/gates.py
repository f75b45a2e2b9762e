"""The checks on a restored server: each with its query and its result, each able to fail."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

from ops_platform.backup.model import Lsn, RecoveryTarget
from ops_platform.clients.postgres_binaries import find_tool, run_tool
from ops_platform.counting import count_of
from ops_platform.errors import OpsError
from ops_platform.recovery import facts
from ops_platform.recovery.findings import Finding, finding_of
from ops_platform.recovery.model import GateStatus
from ops_platform.recovery.pgmanifest import verify_manifest

if TYPE_CHECKING:
    from ops_platform.recovery.canary import SourceMoment
    from ops_platform.recovery.sandbox import Sandbox

PASSED, FAILED = GateStatus.PASSED, GateStatus.FAILED
UNCHECKED, NOT_APPLICABLE = GateStatus.COULD_NOT_CHECK, GateStatus.NOT_APPLICABLE
_SAMPLE_BYTES = 1 << 30
_SAMPLE_SHARE = 0.2


# Files


def manifest(sandbox: Sandbox, tablespaces: int) -> tuple[str, Callable[[], Finding]]:
    """Every file against PostgreSQL's own backup_manifest, before anything was started."""
    install = sandbox.install
    program = install.tool("pg_verifybackup")
    if program is None:
        return "size and CRC-32C of each file against backup_manifest (pg_verifybackup is not installed here)", (
            lambda: verify_manifest(sandbox.data)
        )
    # WAL is fetched on demand and read by the recovery itself; the map of tablespaces is replaced by links that are checked.
    command = [str(program), "--no-parse-wal", "--ignore=tablespace_map", "--ignore=pg_wal", str(sandbox.data)]

    def ask() -> Finding:
        done = run_tool(command, timeout=6 * 3600)
        return finding_of(done.returncode == 0, (done.stdout + done.stderr).strip()[-2000:], tablespaces=tablespaces)

    return "pg_verifybackup --no-parse-wal --ignore=tablespace_map --ignore=pg_wal DIRECTORY", ask


# Recovery


def reached(
    sandbox: Sandbox, recovery: RecoveryTarget, lsn: Lsn, newest: datetime | None
) -> tuple[str, Callable[[], Finding]]:
    query = "select pg_is_in_recovery(), case when pg_is_in_recovery() then pg_get_wal_replay_pause_state() end"
    wanted = recovery.value if isinstance(recovery.value, datetime) else None

    def ask() -> Finding:
        with sandbox.connect() as connection:
            recovering, pause = connection.execute(query).fetchone()
        because = sandbox.stopped_because()
        late = wanted is not None and newest is not None and newest > wanted
        good = bool(recovering) and pause == "paused" and because is not None and not late
        commit = newest.isoformat() if newest else "none replayed"
        text = f"in recovery: {recovering}, {pause}, at {lsn}, newest commit {commit}; "
        return finding_of(good, text + (because or "PostgreSQL did not say that it stopped at the target"))

    return query + "; the server's log: recovery stopping …", ask


def reached_end(
    lsn: Lsn, newest: datetime | None, archived: Lsn | None, segment_size: int
) -> tuple[str, Callable[[], Finding]]:
    """For a recovery without a target: all that the archive holds was replayed, but for the record that is cut off at its end."""

    def ask() -> Finding:
        if archived is None:
            return Finding(UNCHECKED, "how far the archive reaches is not known")
        text = f"replayed to {lsn}, the archive reaches {archived}, newest commit {newest.isoformat() if newest else 'none replayed'}"
        return finding_of(archived - lsn < segment_size, text)

    return "pg_last_wal_replay_lsn() against the end of the archive", ask


def canary_rows(sandbox: Sandbox, dbname: str, moment: SourceMoment) -> tuple[str, Callable[[], Finding]]:
    canary = moment.canary
    assert canary is not None  # noqa: S101 - asked only where there is one
    query = "select id, mark from ops_canary.canary where verification = %s"

    def ask() -> Finding:
        with sandbox.connect(dbname) as connection:
            rows = dict(connection.execute(query, [canary.verification_id]).fetchall())
        there = {mark: number for number, mark in rows.items()}
        text = f"A (committed before {canary.at.isoformat()}) is {'there' if 'A' in there else 'MISSING'}, "
        text += f"B (committed after it) is {'THERE' if 'B' in there else 'not there'}"
        return finding_of(there == {"A": canary.id_a}, text, id_a=canary.id_a, id_b=canary.id_b)

    return query.replace("%s", f"'{canary.verification_id}'"), ask


def canary_history(
    sandbox: Sandbox, dbname: str, wanted: datetime, source: dict[int, datetime]
) -> tuple[str, Callable[[], Finding]]:
    """For a moment in the past: of the canary rows of earlier verifications exactly those before it are there.

    `source`: id to time of the rows that the source holds now. Rows within a second of the moment decide nothing.
    """
    query = "select id, at from ops_canary.canary"
    near = timedelta(seconds=1)

    def ask() -> Finding:
        before = {number for number, at in source.items() if at < wanted - near}
        after = {number for number, at in source.items() if at > wanted + near}
        with sandbox.connect(dbname) as connection:
            if connection.execute("select to_regclass('ops_canary.canary')").fetchone()[0] is None:
                return finding_of(not before, f"no canary table at that moment; {len(before)} rows should be there")
            there = {number for number, _ in connection.execute(query).fetchall()}
        missing, early = before - there, after & there
        text = f"{len(before & there)} of {len(before)} earlier rows are there, {len(early)} of {len(after)} later ones"
        return finding_of(not missing and not early, text)

    return query, ask


def promotes(sandbox: Sandbox, timeline: int) -> tuple[str, Callable[[], Finding]]:
    def ask() -> Finding:
        new = sandbox.promote()
        with sandbox.connect() as connection:
            recovering = connection.execute("select pg_is_in_recovery()").fetchone()[0]
        return finding_of(new > timeline and not recovering, f"timeline {timeline} became {new}", timeline=new)

    return "select pg_promote(true, 300)", ask


def prepared(sandbox: Sandbox, wanted: datetime | None) -> tuple[str, Callable[[], Finding]]:
    query = "select gid, database, prepared from pg_prepared_xacts order by prepared"

    def ask() -> Finding:
        with sandbox.connect() as connection:
            rows = connection.execute(query).fetchall()
        old = [gid for gid, _, since in rows if wanted is None or since < wanted - timedelta(hours=1)]
        text = f"{len(rows)} prepared transactions" + (f", hanging for over an hour: {', '.join(old)}" if old else "")
        return finding_of(not old, text)

    return query, ask


# Data


def _databases(sandbox: Sandbox) -> list[str]:
    with sandbox.connect() as connection:
        return [row[0] for row in connection.execute(facts.DATABASES).fetchall()]


def read_tables(
    sandbox: Sandbox, counted: dict[str, dict[str, int]], workers: int = 2
) -> tuple[str, Callable[[], Finding]]:
    """Every table of every database to its end; the counts go into `counted` (database, table)."""

    def read(dbname: str, names: list[str]) -> dict[str, int]:
        with sandbox.connect(dbname) as connection:
            return {name: connection.execute(f"select count(*) from only {name}").fetchone()[0] for name in names}

    def ask() -> Finding:
        for dbname in _databases(sandbox):
            with sandbox.connect(dbname) as connection:
                names = [row[0] for row in connection.execute(facts.TABLES).fetchall()]
            # Smallest first in the list, so striding shares the large ones out.
            with ThreadPoolExecutor(workers) as pool:
                parts = list(pool.map(read, repeat(dbname), [names[i::workers] for i in range(workers)]))
            counted[dbname] = {name: rows for part in parts for name, rows in part.items()}
        tables = sum(len(found) for found in counted.values())
        rows = sum(sum(found.values()) for found in counted.values())
        return finding_of(
            True,
            f"{count_of(tables, 'table')} with {rows} rows in {count_of(len(counted), 'database')}",
            tables=tables,
            rows=rows,
        )

    return "select count(*) from only TABLE, for each table and materialized view", ask


def schema(sandbox: Sandbox, moment: SourceMoment | None) -> tuple[str, Callable[[], Finding]]:
    def ask() -> Finding:
        if moment is None:
            return Finding(
                NOT_APPLICABLE,
                "the source's schema at that moment is not known; proofs of the newest moment compare it",
            )
        if not moment.facts:
            return Finding(UNCHECKED, moment.note or "the source could not be read")
        differing: list[str] = []
        for dbname, known in moment.facts.items():
            with sandbox.connect(dbname) as connection:
                here = facts.fingerprint(connection)
            differing += [f"{dbname}: {kind}" for kind, digest in known.fingerprint.items() if here.get(kind) != digest]
        kinds = sum(len(known.fingerprint) for known in moment.facts.values())
        text = f"differs in {', '.join(differing)}" if differing else f"{kinds} kinds of objects are the same"
        return finding_of(not differing, text, fingerprint={d: f.fingerprint for d, f in moment.facts.items()})

    return f"SHA-256 over the definitions of {', '.join(facts.FINGERPRINTS)}", ask


def row_counts(
    moment: SourceMoment | None, counted: dict[str, dict[str, int]], tolerance: float
) -> tuple[str, Callable[[], Finding]]:
    """Against the source at the moment: its exact counts, and its own estimates where counting would have hurt it."""

    def ask() -> Finding:
        if moment is None:
            return Finding(NOT_APPLICABLE, "the source's counts at that moment are not known")
        if not moment.facts:
            return Finding(UNCHECKED, moment.note or "the source could not be read")
        wrong: list[str] = []
        compared = 0
        for dbname, known in moment.facts.items():
            here = counted.get(dbname, {})
            for name, count in known.counts.items():
                compared += 1
                if name not in here:
                    wrong.append(f"{dbname}.{name} is missing")
                elif abs(here[name] - count.rows) > _allowed(count.rows, tolerance, exact=count.exact):
                    wrong.append(
                        f"{dbname}.{name}: {here[name]} rows, the source has {'' if count.exact else 'about '}{count.rows}"
                    )
        text = "; ".join(wrong[:20]) if wrong else f"{count_of(compared, 'table')} within {tolerance:.0%}"
        return finding_of(not wrong, text, compared=compared)

    return "count(*) here against the source's count(*) or pg_stat_all_tables.n_live_tup", ask


def _allowed(rows: int, tolerance: float, *, exact: bool) -> float:
    # Rows come and go in the moment between counting and T; estimates are coarser, most of all for small tables.
    return rows * tolerance + (10 if exact else 1000)


# Foreign tables and views are not asked: that would reach out of the sandbox, or run what the source wrote.
_OWN = """(t.relkind = 'r' or t.relkind = 'p' and not exists (
  select from pg_partition_tree(t.oid) leaf join pg_class c on c.oid = leaf.relid where c.relkind = 'f'))"""
# One that cycles comes back to values that it has given.
_SEQUENCES = f"""
select format('%I.%I', sn.nspname, s.relname), format('%I.%I', tn.nspname, t.relname), quote_ident(a.attname), q.seqincrement > 0
from pg_class s join pg_namespace sn on sn.oid = s.relnamespace join pg_sequence q on q.seqrelid = s.oid and not q.seqcycle
join pg_depend d on d.objid = s.oid and d.classid = 'pg_class'::regclass and d.refclassid = 'pg_class'::regclass and d.deptype in ('a', 'i')
join pg_class t on t.oid = d.refobjid and {_OWN} join pg_namespace tn on tn.oid = t.relnamespace
join pg_attribute a on a.attrelid = t.oid and a.attnum = d.refobjsubid
union
select format('%I.%I', sn.nspname, s.relname), format('%I.%I', tn.nspname, t.relname), quote_ident(a.attname), q.seqincrement > 0
from pg_attrdef f join pg_depend d on d.objid = f.oid and d.classid = 'pg_attrdef'::regclass and d.refclassid = 'pg_class'::regclass
join pg_class s on s.oid = d.refobjid and s.relkind = 'S' join pg_namespace sn on sn.oid = s.relnamespace
join pg_sequence q on q.seqrelid = s.oid and not q.seqcycle join pg_class t on t.oid = f.adrelid and {_OWN}
join pg_namespace tn on tn.oid = t.relnamespace
join pg_attribute a on a.attrelid = t.oid and a.attnum = f.adnum
"""


def sequences(sandbox: Sandbox) -> tuple[str, Callable[[], Finding]]:
    def ask() -> Finding:
        behind: list[str] = []
        looked = 0
        for dbname in _databases(sandbox):
            with sandbox.connect(dbname) as connection:
                for sequence, table, column, rising in connection.execute(_SEQUENCES).fetchall():
                    last, called = connection.execute(f"select last_value, is_called from {sequence}").fetchone()
                    function = "max" if rising else "min"
                    edge = connection.execute(f"select {function}({column}) from {table}").fetchone()[0]
                    looked += 1
                    if isinstance(edge, int | Decimal) and not (isinstance(edge, Decimal) and edge.is_nan()):
                        ahead = last >= edge if rising else last <= edge
                        if not ahead or (last == edge and not called):
                            behind.append(f"{dbname}.{sequence} is at {last}, {table}.{column} at {edge}")
        return finding_of(
            not behind, "; ".join(behind[:20]) or f"{looked} sequences are ahead of their columns", looked=looked
        )

    return "last_value of each sequence against max(column)", ask


_COLLATIONS = """
select 'database ' || datname, datcollversion, pg_database_collation_actual_version(oid) from pg_database
where datname = current_database() and datcollversion is not null
union all
select 'collation ' || collname, collversion, pg_collation_actual_version(oid) from pg_collation
where collversion is not null and oid in (select unnest(indcollation) from pg_index)
"""
_COLLATIONS_14 = _COLLATIONS.split("union all")[1]


def extensions(sandbox: Sandbox, moment: SourceMoment | None) -> tuple[str, Callable[[], Finding]]:
    def ask() -> Finding:
        wrong: list[str] = []
        other: list[str] = []
        looked = 0
        for dbname in _databases(sandbox):
            with sandbox.connect(dbname) as connection:
                here = facts.extensions(connection)
                available = {
                    row[0] for row in connection.execute("select name from pg_available_extensions").fetchall()
                }
                query = _COLLATIONS if sandbox.install.major >= 15 else _COLLATIONS_14
                for what, recorded, actual in connection.execute(query).fetchall():
                    if recorded != actual:
                        other.append(f"{dbname}: {what} was made with version {recorded}, this machine has {actual}")
            looked += len(here)
            known = moment.facts.get(dbname) if moment else None
            if known is not None and known.extensions != here:
                wrong.append(f"{dbname}: {here} instead of {known.extensions}")
            other += [
                f"{dbname}: the extension {name} is not installed on this machine"
                for name in here
                if name not in available
            ]
        if wrong:
            return Finding(FAILED, "; ".join(wrong))
        if other:
            return Finding(
                UNCHECKED, "; ".join(other[:10]) + "; verify on a machine with the source's system libraries"
            )
        return finding_of(True, f"{count_of(looked, 'extension')}, versions as on the source; collation versions match")

    return "pg_extension, pg_available_extensions, datcollversion, collversion", ask


# Pages and indexes

_RELATIONS = """
select c.oid::int8, pg_relation_size(c.oid) from pg_class c join pg_am a on a.oid = c.relam
where c.relkind in ('r', 'm', 't') and a.amname = 'heap' and c.relpersistence = 'p' and pg_relation_size(c.oid) > 0
"""


def amcheck(sandbox: Sandbox, how: str, seed: str) -> tuple[str, Callable[[], Finding]]:
    """pg_amcheck over everything (heapallindexed, parent check, root descent), or over a sample chosen by chance."""
    from psycopg.conninfo import make_conninfo

    program = find_tool("pg_amcheck", sandbox.install.major, ())
    base = [
        program,
        "-h",
        sandbox.server.sockets,
        "-p",
        str(sandbox.server.socket_port),
        "-U",
        sandbox.superuser,
        "--jobs=2",
    ]
    thorough = ["--heapallindexed", "--parent-check", "--rootdescend"]

    def run(dbname: str, options: list[str]) -> str:
        # A name of its own could be taken for an option or for a connection string.
        words = [*base, "--install-missing=pg_catalog", *options, make_conninfo(dbname=dbname)]
        command = [part for part in words if part is not None]
        done = run_tool(command, timeout=12 * 3600)
        said = (done.stdout + done.stderr).strip()
        if done.returncode == 0:
            return ""
        if 'extension "amcheck" is not available' in said:
            raise OpsError("the extension amcheck is not installed here", remedy="install PostgreSQL's contrib package")
        return said

    def ask() -> Finding:
        if how == "off":
            return Finding(NOT_APPLICABLE, "the policy turns it off (verification.amcheck)")
        if program is None:
            raise OpsError(
                "pg_amcheck is not installed here", remedy=f"install postgresql-client-{sandbox.install.major}"
            )
        found: list[str] = []
        looked, total = 0, 0
        for dbname in _databases(sandbox):
            options = thorough
            if how == "sample":
                chosen, of = _sample(sandbox, dbname, f"{seed} {dbname}")
                looked, total = looked + len(chosen), total + of
                options = [f"--table={name}" for name in chosen]
                if not chosen:
                    continue
            if said := run(dbname, options):
                found.append(f"{dbname}: {said}")
        scope = (
            f"{looked} of {total} tables with their indexes"
            if how == "sample"
            else "all tables and indexes, heap against index"
        )
        return finding_of(not found, "\n".join(found)[-3000:] or f"{scope}: no damage", sampled=how == "sample")

    words = " ".join(thorough) if how == "full" else "--table=… (by chance, up to a fifth of the bytes)"
    return f"pg_amcheck --jobs=2 {words}", ask


def _sample(sandbox: Sandbox, dbname: str, seed: str) -> tuple[list[str], int]:
    """Tables by chance until a fifth of the bytes (1 GiB at most) is reached, at least one."""
    query = """select n.nspname, c.relname, pg_relation_size(c.oid) from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.relkind in ('r', 'm') and c.relpersistence = 'p' and pg_relation_size(c.oid) > 0 order by c.oid"""
    with sandbox.connect(dbname) as connection:
        tables = connection.execute(query).fetchall()
    limit = min(_SAMPLE_BYTES, sum(size for _, _, size in tables) * _SAMPLE_SHARE)
    random.Random(seed).shuffle(tables)  # noqa: S311 - a choice that can be repeated
    chosen: list[str] = []
    taken = 0
    for space, name, size in tables:
        if taken + size <= limit or not chosen:
            chosen.append(f"{_quoted(space)}.{_quoted(name)}")
            taken += size
    return chosen, len(tables)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def checksums(sandbox: Sandbox) -> tuple[str, Callable[[], Finding]]:
    """Every page's checksum: pg_checksums on the stopped server where this major has it, else by reading each page."""
    program = sandbox.install.tool("pg_checksums")
    if program is not None:

        def offline() -> Finding:
            sandbox.stop("fast")
            done = run_tool([program, "--check", "-D", sandbox.data], timeout=12 * 3600)
            said = (done.stdout + done.stderr).strip()
            if "data checksums are not enabled" in said:
                return Finding(NOT_APPLICABLE, "the cluster was made without data checksums (initdb --data-checksums)")
            blocks = re.search(r"Blocks scanned:\s+(\d+)", said)
            bad = re.search(r"Bad checksums:\s+(\d+)", said)
            good = done.returncode == 0 and bad is not None and int(bad[1]) == 0
            return finding_of(good, f"{blocks[1]} pages, {bad[1]} bad" if blocks and bad else said[-1500:])

        return "pg_checksums --check (server stopped)", offline
    return "pg_prewarm(RELATION, 'buffer', FORK) for each relation: reading a page checks it", lambda: _prewarm(sandbox)


_ALL_RELATIONS = """
select c.oid::regclass::text, f from pg_class c cross join unnest(array['main', 'fsm', 'vm', 'init']) f
where c.relkind in ('r', 'm', 't', 'i', 'S') and pg_relation_filenode(c.oid) is not null and pg_relation_size(c.oid, f) > 0
"""


def _prewarm(sandbox: Sandbox) -> Finding:
    with sandbox.connect() as connection:
        if connection.execute("show data_checksums").fetchone()[0] != "on":
            return Finding(NOT_APPLICABLE, "the cluster was made without data checksums (initdb --data-checksums)")
    pages = 0
    for dbname in _databases(sandbox):
        with sandbox.connect(dbname) as connection:
            connection.execute("create extension if not exists pg_prewarm with schema pg_catalog")
            for name, fork in connection.execute(_ALL_RELATIONS).fetchall():
                pages += connection.execute("select pg_prewarm(%s::regclass, 'buffer', %s)", [name, fork]).fetchone()[0]
    return finding_of(True, f"{pages} pages read, 0 bad")


# The end


def gone(sandbox: Sandbox, home: Path) -> tuple[str, Callable[[], Finding]]:
    def ask() -> Finding:
        left = sandbox.remains() + ([str(home)] if home.exists() else [])
        return finding_of(
            not left, f"left behind: {'; '.join(left)}" if left else "no process, no directory, no socket is left"
        )

    return "processes that name the directory, the directory, the socket directory", ask
