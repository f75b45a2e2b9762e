"""What is true of a database at a moment, asked with the same queries on the source and on the restored server.

The schema fingerprint is one SHA-256 for each kind of object over its definition in text, so that two servers of one major
agree on it; object ids and physical places are left out, because a restore may change neither meaning nor need them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, LiteralString, cast

if TYPE_CHECKING:
    import psycopg

# Exact counts of the source cost reads of production: only small tables, few of them, under a time limit.
_EXACT_PAGES = 1024
_EXACT_TABLES = 100

_NAMESPACES = "n.nspname !~ '^pg_' and n.nspname <> 'information_schema' and n.nspname <> 'ops_canary'"

FINGERPRINTS: dict[str, LiteralString] = {
    "columns": f"""select n.nspname, c.relname, c.relkind, c.relpersistence, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod),
        a.attnotnull, a.attidentity, a.attgenerated, pg_get_expr(d.adbin, d.adrelid)
        from pg_class c join pg_namespace n on n.oid = c.relnamespace join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
        left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum where c.relkind in ('r', 'p', 'v', 'm', 'f', 'c') and {_NAMESPACES}""",
    "views": f"""select n.nspname, c.relname, pg_get_viewdef(c.oid) from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.relkind in ('v', 'm') and {_NAMESPACES}""",
    "constraints": f"""select n.nspname, c.relname, o.conname, pg_get_constraintdef(o.oid), o.convalidated from pg_constraint o
        join pg_class c on c.oid = o.conrelid join pg_namespace n on n.oid = c.relnamespace where {_NAMESPACES}""",
    "indexes": f"""select n.nspname, c.relname, pg_get_indexdef(i.indexrelid), i.indisvalid from pg_index i join pg_class c on c.oid = i.indexrelid
        join pg_namespace n on n.oid = c.relnamespace where {_NAMESPACES}""",
    "functions": f"""select n.nspname, p.proname, pg_get_function_identity_arguments(p.oid), md5(p.prosrc), p.prokind, p.prosecdef from pg_proc p
        join pg_namespace n on n.oid = p.pronamespace where {_NAMESPACES}""",
    "triggers": f"""select n.nspname, c.relname, pg_get_triggerdef(t.oid), t.tgenabled from pg_trigger t join pg_class c on c.oid = t.tgrelid
        join pg_namespace n on n.oid = c.relnamespace where not t.tgisinternal and {_NAMESPACES}""",
    "policies": "select schemaname, tablename, policyname, cmd, qual, with_check from pg_policies",
    "partitions": f"""select n.nspname, c.relname, pg_get_expr(c.relpartbound, c.oid), pg_get_partkeydef(c.oid) from pg_class c
        join pg_namespace n on n.oid = c.relnamespace where (c.relispartition or c.relkind = 'p') and {_NAMESPACES}""",
    "grants": f"""select n.nspname, c.relname, c.relkind, pg_get_userbyid(c.relowner), (select array_agg(x::text order by x::text) from unnest(c.relacl) x)
        from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.relkind in ('r', 'p', 'v', 'm', 'S', 'f') and {_NAMESPACES}""",
    "types": f"""select n.nspname, t.typname, t.typtype, (select array_agg(e.enumlabel order by e.enumsortorder) from pg_enum e where e.enumtypid = t.oid)
        from pg_type t join pg_namespace n on n.oid = t.typnamespace where t.typtype in ('e', 'd', 'r') and {_NAMESPACES}""",
}  # fmt: skip

EXTENSIONS: LiteralString = "select extname, extversion from pg_extension order by 1"
DATABASES: LiteralString = (
    "select datname from pg_database where datallowconn and datname not in ('template0', 'template1') order by 1"
)
# Unlogged tables come back empty by design; foreign ones live elsewhere and are not touched; a materialized view that was
# never filled cannot be read.
TABLES: LiteralString = """
select format('%I.%I', n.nspname, c.relname), c.relpersistence = 'u', c.relpages, c.reltuples::bigint,
  case when s.last_analyze is null and s.last_autoanalyze is null then null else s.n_live_tup end
from pg_class c join pg_namespace n on n.oid = c.relnamespace left join pg_stat_all_tables s on s.relid = c.oid
where c.relkind in ('r', 'm') and c.relispopulated and c.relpersistence <> 't'
  and n.nspname not in ('pg_catalog', 'information_schema', 'pg_toast', 'ops_canary')
order by c.relpages
"""


@dataclass(frozen=True)
class Count:
    """Rows of a table on the source; `exact` False for the server's own estimate."""

    rows: int
    exact: bool


@dataclass(frozen=True)
class DatabaseFacts:
    fingerprint: dict[str, str] = field(default_factory=dict[str, str])
    extensions: dict[str, str] = field(default_factory=dict[str, str])
    counts: dict[str, Count] = field(default_factory=dict[str, Count])


def fingerprint(connection: psycopg.Connection[Any]) -> dict[str, str]:
    """Kind of object to the digest over all definitions of that kind, in a fixed order and an empty search path."""
    found: dict[str, str] = {}
    with connection.transaction():
        connection.execute("set local search_path to pg_catalog")
        connection.execute("set local datestyle to 'ISO, YMD'")
        for kind, query in FINGERPRINTS.items():
            rows = sorted(repr(row) for row in connection.execute(query))
            found[kind] = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    return found


def extensions(connection: psycopg.Connection[Any]) -> dict[str, str]:
    return dict(connection.execute(EXTENSIONS).fetchall())


def source_counts(connection: psycopg.Connection[Any]) -> dict[str, Count]:
    """Rows of the small tables exactly, of the larger ones as far as the server has counted them itself."""
    import psycopg

    counts: dict[str, Count] = {}
    exact = 0
    for name, unlogged, pages, _, live in connection.execute(TABLES).fetchall():
        if unlogged:
            continue
        if pages <= _EXACT_PAGES and exact < _EXACT_TABLES:
            try:
                with connection.transaction():
                    connection.execute("set local statement_timeout = '5s'")
                    connection.execute("set local lock_timeout = '200ms'")
                    # A policy that hides rows from us is an error then, and not a smaller number.
                    connection.execute("set local row_security = off")
                    row = connection.execute(cast(LiteralString, f"select count(*) from only {name}")).fetchone()
            except psycopg.Error:  # locked, or slower than production should be asked for
                row = None
            if row is not None:
                counts[name] = Count(row[0], exact=True)
                exact += 1
                continue
        if live is not None:
            counts[name] = Count(live, exact=False)
    return counts


def database_facts(connection: psycopg.Connection[Any]) -> DatabaseFacts:
    return DatabaseFacts(fingerprint(connection), extensions(connection), source_counts(connection))
