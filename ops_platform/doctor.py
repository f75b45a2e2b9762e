"""Looks at everything that a target's backups need, and says what to do about what is missing. Changes nothing but a probe object.

What the targets share is looked at in `doctor_platform`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ops_platform.clients.access import Access, choose_member
from ops_platform.clients.postgres_binaries import find_postgres
from ops_platform.counting import size
from ops_platform.errors import CouldNotVerifyError, OpsError, UnreachableError

if TYPE_CHECKING:
    from ops_platform.clients.postgres import Member
    from ops_platform.inventory.model import Backed, Target
    from ops_platform.inventory.systems import StoreTarget
    from ops_platform.stores.kind import Need

State = Literal["good", "warn", "bad", "unknown"]
_MAX_SKEW = 300


@dataclass(frozen=True)
class Found:
    """`found` is what was seen; `remedy` what to do where it is not good. What is good has none once it is reported."""

    what: str
    state: State
    found: str
    remedy: str | None = None


@dataclass(frozen=True)
class Examination:
    """`target_id`: the target's, or `platform` for what all of them share."""

    target_id: str
    findings: list[Found]


def examine(access: Access, target: Target) -> Examination:
    """Every part is asked, whatever the others answered: one look shows all that is to be done."""
    parts: list[tuple[str, Callable[[], Iterator[Found]]]] = [
        ("servers", lambda: _servers(access, target)),
        ("store", lambda: _store(access, target)),
        ("key service", lambda: _keys(access, target)),
        ("sandbox", lambda: _sandbox(access, target)),
    ]
    return Examination(target.id, asked(parts))


def examine_store(access: Access, target: StoreTarget) -> Examination:
    """A store of another kind: it answers, what a proof needs is there, its repository and key service work, and a backup of it could
    be restored here."""
    from ops_platform.stores.kind import Needing, open_kind

    def server() -> Iterator[Found]:
        yield Found("server", "good", open_kind(access, target).look())

    def needs() -> Iterator[Found]:
        if isinstance(kind := open_kind(access, target), Needing):
            yield from map(_need, kind.needs())

    def sandbox() -> Iterator[Found]:
        try:
            open_kind(access, target).need_programs()
        except CouldNotVerifyError as error:
            yield Found("sandbox", "bad", error.what, error.remedy)
        else:
            yield Found("sandbox", "good", "what a restore starts is on this machine")

    parts: list[tuple[str, Callable[[], Iterator[Found]]]] = [
        ("server", server),
        ("needs", needs),
        ("store", lambda: _store(access, target)),
        ("key service", lambda: _keys(access, target)),
        ("sandbox", sandbox),
    ]
    return Examination(target.id, asked(parts))


def asked(parts: Sequence[tuple[str, Callable[[], Iterator[Found]]]]) -> list[Found]:
    """What each part finds; what was found before one broke off is kept, and why it did."""
    import psycopg

    findings: list[Found] = []
    for name, part in parts:
        try:
            for found in part():  # one by one: `extend` would drop them all
                findings.append(replace(found, remedy=None) if found.state == "good" else found)
        except psycopg.Error as error:
            findings.append(Found(name, "unknown", " ".join(str(error).split()), "read the server's log"))
        except OpsError as error:
            findings.append(_failed(name, error))
    return findings


def _failed(what: str, error: OpsError, state: State = "bad") -> Found:
    return Found(what, state, f"{error.where}: {error.what}" if error.where else error.what, error.remedy)


def _need(need: Need) -> Found:
    """What nobody could say is not known, and so is not good."""
    try:
        found = need.ask()
    except UnreachableError as error:
        return _failed(need.what, error, "unknown")
    except OpsError as error:
        return _failed(need.what, error)
    return Found(need.what, "good" if found else "warn", found or "the inventory names none", need.remedy)


# The servers


def _servers(access: Access, target: Target) -> Iterator[Found]:
    members = access.members(target)
    for member in members:
        where = member.address
        if member.error is not None:
            yield Found(f"server {where}", "bad", member.error, "check host, port, network, password and pg_hba.conf")
        else:
            role = "standby" if member.in_recovery else "primary"
            yield Found(
                f"server {where}",
                "good",
                f"PostgreSQL {_version(member.server_version or 0)}, {role}, timeline {member.timeline}",
            )
    primary = yield from _primary(target, members)
    if primary is None:
        return
    yield from _settings(access, target, primary)
    yield from _rights(access, target, primary)
    if target.repository.engine == "native":
        yield from _slot(access, target)


def _primary(target: Target, members: Sequence[Member]) -> Generator[Found, None, Member | None]:
    """The one that everything else acts on: settings and rights are to be those of no other. None where nothing would act on any."""
    answered = [m for m in members if m.error is None]
    primaries = [m for m in answered if not m.in_recovery]
    clusters = {m.system_identifier for m in answered}
    if len(clusters) > 1:
        said = f"{len(clusters)} different clusters answer"
        yield Found("cluster", "bad", said, "correct connection.hosts: one cluster is one target")
        return None
    if not primaries:
        yield Found("primary", "bad", "no primary answers", "the WAL receiver and the lock of a backup need it")
        return None
    try:
        primary = choose_member(target.id, members)
    except OpsError as error:
        yield _failed("primary", error)
        return None
    if old := "; ".join(f"{m.address} on timeline {m.timeline}" for m in primaries if m is not primary):
        yield Found(
            "primary",
            "bad",
            f"{len(primaries)} servers say that they are the primary: {primary.address} on timeline {primary.timeline},"
            f" which is acted on; {old}",
            f"stop {old}, before an application writes there; let it follow after pg_rewind, or make it anew",
        )
    return primary


def _version(number: int) -> str:
    return f"{number // 10000}.{number % 10000}"


_SETTINGS = """
select current_setting('wal_level'), current_setting('max_wal_senders')::int, (select count(*) from pg_stat_replication)::int,
  current_setting('max_replication_slots')::int, (select count(*) from pg_replication_slots)::int, current_setting('max_slot_wal_keep_size'),
  coalesce(current_setting('summarize_wal', true), ''), current_setting('data_checksums'), current_setting('full_page_writes'),
  (select count(*) from pg_replication_slots where slot_name = %s)::int
"""


def _settings(access: Access, target: Target, member: Member) -> Iterator[Found]:
    with access.postgres(target, member=member) as connection:
        row = connection.execute(_SETTINGS, [target.wal.slot]).fetchone()
    assert row is not None  # noqa: S101 - a select without a table has a row
    level, sums, pages = row[0], row[7], row[8]
    major = (member.server_version or 0) // 10000
    supported = 14 <= major <= 18
    yield Found(
        "version",
        "good" if supported else "bad",
        f"major {major}",
        None if supported else "14 to 18 are supported; upgrade the server",
    )
    yield Found(
        "wal_level",
        "bad" if level == "minimal" else "good",
        level,
        "ALTER SYSTEM SET wal_level = 'replica', then restart",
    )
    if target.repository.engine == "native":
        yield from _room(target, major, row)
    yield Found(
        "data_checksums",
        "good" if sums == "on" else "warn",
        sums,
        "pg_checksums --enable on the stopped server: without them damage on disk is not noticed",
    )
    yield Found(
        "full_page_writes",
        "good" if pages == "on" else "bad",
        pages,
        "turn it on: a base backup of a live server needs it",
    )


def _room(target: Target, major: int, row: Sequence[Any]) -> Iterator[Found]:
    """What our own backups and our receiver take of the server, and other tools do not."""
    _, senders, sending, slots, used, keep, summarize, _, _, ours = row
    # A backup takes one sender, the receiver another.
    free = senders - sending
    yield Found(
        "max_wal_senders",
        "good" if free >= 2 else "bad",
        f"{sending} of {senders} in use",
        "raise max_wal_senders; a backup and the receiver take one each",
    )
    room = ours or used < slots
    yield Found(
        "max_replication_slots",
        "good" if room else "bad",
        f"{used} of {slots} in use",
        "raise max_replication_slots, or drop a slot that nobody needs",
    )
    capped = keep != "-1"
    yield Found(
        "max_slot_wal_keep_size",
        "good" if capped else "warn",
        keep,
        "without a cap an absent receiver fills the server's disk: ALTER SYSTEM SET max_slot_wal_keep_size = '64GB'",
    )
    if major >= 17 and target.backup.incremental.enabled:
        yield Found(
            "summarize_wal",
            "good" if summarize == "on" else "warn",
            summarize,
            "ALTER SYSTEM SET summarize_wal = on, then reload; until then every backup is a full one",
        )


@dataclass(frozen=True)
class _Rights:
    """What the server says of our session. `login` logged in, and replicates; `role` asks in SQL: another one after SET ROLE.

    Both are quoted. `mark`: of the canary's table, None where it does not exist, as `uses` and `makes` are of its schema.
    """

    login: str
    role: str
    replicates: bool
    monitors: bool
    reads: bool
    switches: bool
    creates: bool
    uses: bool | None
    makes: bool | None
    mark: bool | None


# Each right is asked for by itself: of several in one question PostgreSQL says whether there is any of them.
# The catalogs are asked for schema and table: to_regclass is refused where we may not look into the schema.
_RIGHTS = """
select quote_ident(session_user) as login, quote_ident(current_user) as role,
  (select rolreplication or rolsuper from pg_roles where rolname = session_user) as replicates,
  pg_has_role('pg_monitor', 'usage') as monitors, pg_has_role('pg_read_all_data', 'usage') as reads,
  has_function_privilege('pg_switch_wal()', 'execute') as switches, has_database_privilege(current_database(), 'create') as creates,
  has_schema_privilege(n.oid, 'usage') as uses, has_schema_privilege(n.oid, 'create') as makes,
  has_table_privilege(c.oid, 'select') and has_table_privilege(c.oid, 'insert') and has_table_privilege(c.oid, 'delete') as mark
from (select) as we left join pg_namespace n on n.nspname = 'ops_canary'
  left join pg_class c on c.relnamespace = n.oid and c.relname = 'canary'
"""


def _rights(access: Access, target: Target, member: Member) -> Iterator[Found]:
    from psycopg.rows import class_row

    from ops_platform.clients.postgres import give_attribute

    with access.postgres(target, member=member) as connection:
        rights = connection.cursor(row_factory=class_row(_Rights)).execute(_RIGHTS).fetchone()
    assert rights is not None  # noqa: S101 - a left join of one row has a row
    made_by = target.connection.made_by
    # A right that is given to a role of one session ends with it.
    lasts = made_by is None or rights.role != rights.login
    to = rights.role if lasts else "THE_GROUP"
    who = "" if lasts else f" (THE_GROUP: in which {made_by} makes its roles)"
    native = target.repository.engine == "native"
    if native:
        yield Found(
            "REPLICATION",
            "good" if rights.replicates else "bad",
            "granted" if rights.replicates else "missing",
            give_attribute("REPLICATION", rights.login, made_by),
        )
    else:
        yield Found(
            "pg_switch_wal",
            "good" if rights.switches else "bad",
            "granted" if rights.switches else "missing",
            f"in {target.connection.dbname}: GRANT EXECUTE ON FUNCTION pg_switch_wal() TO {to}{who}; without it nothing can be verified",
        )
    yield Found(
        "pg_monitor",
        "good" if rights.monitors else "warn",
        "granted" if rights.monitors else "missing",
        f"GRANT pg_monitor TO {to}{who}: slots and other sessions are seen with it",
    )
    yield Found(
        "pg_read_all_data",
        "good" if rights.reads else "warn",
        "granted" if rights.reads else "missing",
        f"GRANT pg_read_all_data TO {to}{who}: row counts are compared with it",
    )
    if target.backup.verification.canary:
        yield _canary(rights, target, to, who, made_by)
    if not native:
        return
    try:
        access.replication(target, member).finish()
        yield Found("replication login", "good", "a WAL sender answers")
    except OpsError as error:
        yield Found("replication login", "bad", error.what, error.remedy)


def _canary(rights: _Rights, target: Target, to: str, who: str, made_by: str | None) -> Found:
    """Whether the canary's rows can be written by this session, and by the next one."""

    def bad(found: str, remedy: str) -> Found:
        return Found("schema ops_canary", "bad", found, f"{remedy}; or verification.canary: false")

    here = f"in {target.connection.dbname}:"
    if rights.mark is not None:
        if rights.uses and rights.mark:
            return Found("schema ops_canary", "good", "ours to write")
        return bad(
            "exists, but not ours",
            f"{here} ALTER SCHEMA ops_canary OWNER TO {to}; ALTER TABLE ops_canary.canary OWNER TO {to}{who}",
        )
    if rights.uses is None and not rights.creates:
        return bad("missing", f"{here} CREATE SCHEMA ops_canary AUTHORIZATION {to}{who}")
    if rights.uses is not None and not (rights.uses and rights.makes):
        return bad("exists, but not ours", f"{here} ALTER SCHEMA ops_canary OWNER TO {to}{who}")
    if made_by is not None and rights.role == rights.login:
        # Vault could not drop the owner of a table, and the next session's role could not write into it.
        return bad(
            "what we write would belong to a role of one session",
            f"in Vault: end the creation_statements of {made_by} with ALTER ROLE \"{{{{name}}}}\" SET role = 'THE_GROUP'{who}",
        )
    return Found("schema ops_canary", "good", "will be made" if rights.uses is None else "ours to write")


def _slot(access: Access, target: Target) -> Iterator[Found]:
    from ops_platform.backup.archive import slot_state

    slot = slot_state(access, target)
    name = f"slot {target.wal.slot}"
    start = f"ops wal receive {target.id}, as a service of its own"
    if slot is None:
        yield Found(name, "warn", "does not exist: no WAL is being received", start)
    elif slot.wal_status == "lost":
        yield Found(
            name,
            "bad",
            "has lost its WAL",
            f"{start}; it names the gap and makes the slot anew; then ops backup run {target.id} --full",
        )
    elif slot.active_pid is None:
        yield Found(name, "bad", "nobody reads it: the server keeps all WAL for it", start)
    else:
        much = slot.retained is not None and slot.retained > target.wal.max_slot_wal
        yield Found(
            name,
            "warn" if much else "good",
            f"{slot.wal_status}, holds back {size(slot.retained or 0)}",
            "the receiver is behind: ops wal status",
        )


# Store, keys, sandbox


def _store(access: Access, target: Backed) -> Iterator[Found]:
    if target.repository.store is None:
        yield Found("store", "good", f"kept by {target.repository.engine}")
        return
    store = access.store(target.repository.store)
    checks: dict[str, Any] = store.check()
    yield Found("store", "good", f"{store.name} can be written, read and deleted from")
    skew = checks.get("clock_skew_seconds")
    if isinstance(skew, int | float):
        yield Found(
            "clock",
            "good" if abs(skew) < _MAX_SKEW else "bad",
            f"{skew:+.0f} s against the store",
            "look at NTP on this machine",
        )
    wanted = access.inventory.stores[target.repository.store].object_lock
    locked = checks.get("object_lock") == "Enabled"
    if wanted is not None:
        yield Found(
            "Object Lock",
            "good" if locked else "bad",
            "on" if locked else "off",
            "make a bucket with Object Lock: it cannot be turned on later everywhere",
        )


def _keys(access: Access, target: Backed) -> Iterator[Found]:
    if target.repository.keys is None:
        return
    service = access.keys(target.repository.keys)
    checks = service.check()
    key = service.new_data_key()
    if service.unwrap(key.wrapped) != key.plain:
        yield Found("key service", "bad", "it does not open what it wrapped", "look at the key's versions in Vault")
        return
    yield Found("key service", "good", f"{service.name} wraps and opens data keys")
    if checks.get("exportable"):
        yield Found(
            "key", "warn", "exportable: whoever may export it can read every backup", "make the key without exportable"
        )


def _sandbox(access: Access, target: Target) -> Iterator[Found]:
    from ops_platform.recovery.sandbox import network_namespace

    majors = {(m.server_version or 0) // 10000 for m in access.members(target) if m.error is None}
    for major in sorted(majors):
        install = find_postgres(major, target.sandbox.postgres.values())
        if install is None:
            yield Found(
                "sandbox",
                "bad",
                f"no PostgreSQL {major} server on this machine",
                f"install postgresql-{major}, or name its bin directory under sandbox.postgres",
            )
            continue
        yield Found("sandbox", "good", f"PostgreSQL {install.version} ({install.source})")
        for tool in ("pg_verifybackup", "pg_checksums", *(("pg_combinebackup",) if major >= 17 else ())):
            if install.tool(tool) is None:
                needed = tool == "pg_combinebackup"
                remedy = "chains cannot be restored here without it" if needed else "another way is used instead"
                yield Found(tool, "bad" if needed else "warn", f"not beside PostgreSQL {major}", remedy)
    alone = bool(network_namespace())
    yield Found(
        "isolation",
        "good" if alone else "warn",
        "own network namespace" if alone else "a unix socket alone",
        "allow user namespaces, so that restored servers have no network at all",
    )
