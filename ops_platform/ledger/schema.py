"""The ledger's schema in steps: a new database goes through all of them, one that an older version made through the rest.

Which step a database is at stands in the comment on the table, where a role that may only read the entries sees it too.
"""

from __future__ import annotations

from typing import Any, LiteralString

import psycopg
from psycopg import errors

LOCK_SPACE = 0x6F70736C  # "opsl": advisory locks of the ledger
SETUP, APPEND = 1, 2
LOCK_TIMEOUT: LiteralString = "30s"

# The advisory lock in the trigger keeps writers apart even where somebody inserts without `append`.
_ENTRIES: LiteralString = """
create schema if not exists ops_ledger;

create table ops_ledger.entries (
  seq bigint primary key check (seq > 0),
  at timestamptz not null,
  kind text not null,
  actor text not null,
  subject text not null,
  body text not null check (jsonb_typeof(body::jsonb) = 'object'),
  prev_sha256 text not null check (prev_sha256 ~ '^[0-9a-f]{64}$'),
  sha256 text not null check (sha256 ~ '^[0-9a-f]{64}$')
);
create index entries_subject on ops_ledger.entries (subject, seq);
create index entries_kind on ops_ledger.entries (kind, seq);
comment on table ops_ledger.entries is 'Append-only and chained; format 1, see docs/reference/ledger.md';
comment on column ops_ledger.entries.body is 'Canonical JSON, kept as text because the digest is over these very bytes';

create function ops_ledger.refuse() returns trigger language plpgsql set search_path = '' as $$
begin
  raise exception 'the ledger is append-only: % is refused', tg_op using errcode = 'restrict_violation';
end $$;

create function ops_ledger.extend() returns trigger language plpgsql set search_path = '' as $$
declare last record;
begin
  perform pg_catalog.pg_advisory_xact_lock(1869640556, 2);
  select seq, sha256 into last from ops_ledger.entries order by seq desc limit 1;
  if new.seq <> coalesce(last.seq, 0) + 1 or new.prev_sha256 <> coalesce(last.sha256, pg_catalog.repeat('0', 64)) then
    raise exception 'entry % does not extend the chain, whose newest entry is %', new.seq, coalesce(last.seq, 0)
      using errcode = 'restrict_violation';
  end if;
  return new;
end $$;

create trigger append_only before update or delete or truncate on ops_ledger.entries
  for each statement execute function ops_ledger.refuse();
create trigger extends_chain before insert on ops_ledger.entries
  for each row execute function ops_ledger.extend();
-- Also for sessions that replicate, which skip ordinary triggers.
alter table ops_ledger.entries enable always trigger append_only;
alter table ops_ledger.entries enable always trigger extends_chain;
"""

# The outbox refers to entries by their number alone: a foreign key would cost every append a look, and entries never go.
# Its trigger has the rights of the owner, so that who may write entries needs none on the tables beside them.
_BESIDE: LiteralString = """
create table ops_ledger.publishing (
  kind text primary key
);
comment on table ops_ledger.publishing is 'Kinds of entries that are published; one that ends in a dot stands for every kind below it';

create table ops_ledger.outbox (
  seq bigint primary key
);
comment on table ops_ledger.outbox is 'Entries that are to be published, in the order of their numbers; gone once they are';

create function ops_ledger.note_for_publication() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  insert into ops_ledger.outbox (seq)
  select entry.seq from appended entry where exists (
    select from ops_ledger.publishing p
    where p.kind = entry.kind or (pg_catalog.right(p.kind, 1) = '.' and pg_catalog.starts_with(entry.kind, p.kind))
  );
  return null;
end $$;
create trigger noted_for_publication after insert on ops_ledger.entries
  referencing new table as appended for each statement execute function ops_ledger.note_for_publication();

create table ops_ledger.checkpoints (
  number bigint primary key check (number > 0),
  size bigint not null check (size > 0),
  root text not null,
  sha256 text not null,
  at timestamptz not null
);
comment on table ops_ledger.checkpoints is 'What was put into the store; the store is what counts, this finds what is missing there';

comment on table ops_ledger.entries is 'Append-only and chained; format 1, schema 2, see docs/reference/ledger.md';
"""

_STEPS: tuple[LiteralString, ...] = (_ENTRIES, _BESIDE)

# By the catalog as a query sees it: to_regclass may answer from before the wait for another's set-up, and needs rights.
_VERSION: LiteralString = """
select coalesce((regexp_match(d.description, 'schema ([0-9]+)'))[1]::int, 1)
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
left join pg_description d on d.objoid = c.oid and d.objsubid = 0 and d.classoid = 'pg_class'::regclass
where n.nspname = 'ops_ledger' and c.relname = 'entries'
"""


def one_at_a_time(connection: psycopg.Connection[Any], what: int) -> None:
    """Until the transaction ends. Raises LockNotAvailable when another one takes too long."""
    connection.execute(f"set local lock_timeout = '{LOCK_TIMEOUT}'")
    connection.execute("select pg_advisory_xact_lock(%s, %s)", [LOCK_SPACE, what])


def version(connection: psycopg.Connection[Any]) -> int:
    """The step that the database is at; 0: there is no ledger."""
    row = connection.execute(_VERSION).fetchone()
    return row[0] if row else 0


def set_up(connection: psycopg.Connection[Any]) -> None:
    """Bring the database to the newest step; one that is there, or further, stays as it is.

    A role that may not change the schema uses an older ledger as it is: entries are read and written in every version alike.
    """
    if version(connection) >= len(_STEPS):
        return
    try:
        with connection.transaction():
            one_at_a_time(connection, SETUP)
            for step in _STEPS[version(connection) :]:
                connection.execute(step)
    except errors.InsufficientPrivilege:
        if not version(connection):
            raise
