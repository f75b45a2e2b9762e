"""Incidents, approvals, claims and the pause switch in the platform's PostgreSQL, schema `ops_remediation`.

Every change of an incident and its entry in the ledger are one transaction, and asks for the version that its author holds: whoever is
late changes nothing. What bounds actions (cooldown, budgets, circuit breaker, failure domains) is claimed here, one claim at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, LiteralString

from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from ops_platform.actions import Ruling
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import ConflictError, NotThereError
from ops_platform.ledger import Entry, Ledger, LedgerTransaction
from ops_platform.remediation.claims import Claim
from ops_platform.remediation.machine import ending_without_signal, need_allowed
from ops_platform.remediation.model import Ending, Incident, Signal, State, incident_id

_SPACE = 0x6F707372  # "opsr": advisory locks of remediation
_SETUP, _ADMISSION, _OPENING = 1, 2, 3

_SCHEMA: LiteralString = """
create schema if not exists ops_remediation;

create table if not exists ops_remediation.incidents (
  id text primary key,
  rule text not null,
  fingerprint text not null,
  subject text not null,
  playbook text not null,
  state text not null,
  signal jsonb not null,
  opened_at timestamptz not null,
  updated_at timestamptz not null,
  version bigint not null default 1,
  attempts int not null default 0,
  reason text not null default '',
  plan jsonb,
  digest text,
  rulings jsonb not null default '[]',
  outcomes jsonb not null default '[]',
  retry_at timestamptz,
  deadline timestamptz,
  undo_at timestamptz,
  signal_ended_at timestamptz,
  proposed_by text not null default '',
  ending text,
  closed_at timestamptz,
  thread text,
  check ((state = 'closed') = (closed_at is not null) and (state = 'closed') = (ending is not null))
);
create unique index if not exists incidents_one_open on ops_remediation.incidents (rule, fingerprint) where state <> 'closed';
create index if not exists incidents_open on ops_remediation.incidents (state, retry_at) where state <> 'closed';
create index if not exists incidents_opened on ops_remediation.incidents (opened_at);
create index if not exists incidents_event on ops_remediation.incidents
  ((signal -> 'labels' ->> 'source'), (signal -> 'labels' ->> 'id')) where signal ->> 'source' = 'kafka';

create table if not exists ops_remediation.approvals (
  id bigint generated always as identity primary key,
  incident text not null references ops_remediation.incidents,
  digest text not null,
  decision text not null check (decision in ('approve', 'refuse')),
  who text not null,
  via text not null,
  at timestamptz not null,
  expires_at timestamptz not null
);
create index if not exists approvals_incident on ops_remediation.approvals (incident, id);

create table if not exists ops_remediation.claims (
  incident text not null references ops_remediation.incidents,
  attempt int not null,
  rule text not null,
  subject text not null,
  domain text not null,
  playbook text not null,
  at timestamptz not null,
  ended_at timestamptz,
  helped boolean,
  primary key (incident, attempt)
);
create index if not exists claims_at on ops_remediation.claims (at);

create table if not exists ops_remediation.pauses (
  id bigint generated always as identity primary key,
  why text not null,
  who text not null,
  at timestamptz not null,
  ended_at timestamptz,
  ended_by text
);
create unique index if not exists pauses_one on ops_remediation.pauses ((true)) where ended_at is null;

-- What rules are replayed over: each time a signal began, changed (silenced, inhibited) or ended.
create table if not exists ops_remediation.signals (
  id bigint generated always as identity primary key,
  at timestamptz not null,
  source text not null,
  fingerprint text not null,
  signal jsonb not null
);
create index if not exists signals_at on ops_remediation.signals (at);
create index if not exists signals_newest on ops_remediation.signals (source, fingerprint, id desc);

-- What people are told: written with the state that it is about, sent when Slack takes it.
create table if not exists ops_remediation.messages (
  id bigint generated always as identity primary key,
  incident text not null references ops_remediation.incidents,
  version bigint not null,
  state text not null,
  reason text not null,
  at timestamptz not null,
  sent_at timestamptz
);
create index if not exists messages_unsent on ops_remediation.messages (id) where sent_at is null;

-- Requests of buttons that were taken: the same one is not taken again.
create table if not exists ops_remediation.requests (
  signature text primary key,
  at timestamptz not null
);

create table if not exists ops_remediation.lag (
  system text not null,
  topic text not null,
  part int not null,
  messages bigint not null,
  at timestamptz not null,
  primary key (system, topic, part)
);

create table if not exists ops_remediation.seen (
  name text primary key,
  at timestamptz not null
);
"""

_COLUMNS: LiteralString = (
    "id, rule, fingerprint, subject, playbook, state, signal, opened_at, updated_at, version, attempts, reason, plan, digest,"
    " rulings, outcomes, retry_at, deadline, undo_at, signal_ended_at, proposed_by, ending, closed_at, thread"
)
# What a change of state may set besides; `None` is a value, what is not named stays.
_SETTABLE = frozenset(
    {
        "plan", "digest", "rulings", "outcomes", "retry_at", "deadline", "undo_at", "signal_ended_at", "proposed_by",
        "ending", "closed_at", "attempts", "signal",
    }
)  # fmt: skip
_JSON = frozenset({"plan", "rulings", "outcomes", "signal"})


@dataclass(frozen=True)
class Opening:
    """A signal that a rule is about, to become an incident."""

    rule: str
    subject: str
    playbook: str
    signal: Signal
    proposed_by: str
    again_after: timedelta = timedelta(minutes=15)


@dataclass(frozen=True)
class Approval:
    """A person's decision on exactly one plan."""

    incident: str
    digest: str
    decision: str
    who: str
    via: str
    at: datetime
    expires_at: datetime


@dataclass(frozen=True)
class Pause:
    why: str
    who: str
    at: datetime


@dataclass(frozen=True)
class Message:
    """That an incident changed: what people are to be told."""

    id: int
    incident: str
    version: int
    state: State
    reason: str
    at: datetime


@dataclass(frozen=True)
class Figures:
    """For metrics. `open`: by state, how many and since when the oldest; `endings`: by rule; `actions`: by playbook and whether it helped."""

    open: Mapping[State, tuple[int, datetime]]
    endings: Mapping[tuple[str, str], int]
    actions: Mapping[tuple[str, str], int]
    unsent: int
    oldest_unsent: datetime | None
    seen: Mapping[str, datetime]
    paused: Pause | None
    lag: Mapping[tuple[str, str, int], int]


class Store:
    """The incidents of one platform. Safe for threads and for several machines. Raises UnreachableError where PostgreSQL is away."""

    def __init__(self, ledger: Ledger, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.ledger = ledger
        self.clock = clock
        self._ready = False

    @contextlib.contextmanager
    def transaction(self) -> Generator[LedgerTransaction]:
        if not self._ready:
            with self.ledger.transaction() as t:
                t.connection.execute("select pg_advisory_xact_lock(%s, %s)", [_SPACE, _SETUP])
                t.connection.execute(_SCHEMA)
            self._ready = True
        with self.ledger.transaction() as t:
            yield t

    # Incidents

    def open(self, opening: Opening) -> Incident | None:
        """As `open_all`, for one."""
        return next(iter(self.open_all([opening])[0]), None)

    def open_all(self, openings: Sequence[Opening], *, most: int | None = None) -> tuple[list[Incident], int]:
        """The open incident of each rule and fingerprint, made where there is none. The same signal never opens a second one.

        A signal whose incident is closed is left out, unless it helped or cleared and the signal goes on for longer than `again_after`;
        so is an event that was read before at another place, by its source and id as CloudEvents says, and that is recorded.
        At most `most` are made; the number is of those that are left to be made.
        """
        if not openings:
            return [], 0
        with self.transaction() as t:
            t.connection.execute("select pg_advisory_xact_lock(%s, %s)", [_SPACE, _OPENING])
            rules, fingerprints = [o.rule for o in openings], [o.signal.fingerprint for o in openings]
            known: dict[tuple[str, str], list[Incident]] = {}
            for one in self._select(
                t, "(rule, fingerprint) in (select * from unnest(%s::text[], %s::text[]))", rules, fingerprints,
                order="opened_at, id", limit=1_000_000,
            ):  # fmt: skip
                known.setdefault((one.rule, one.fingerprint), []).append(one)
            first = self._first_places(t, openings)
            found: list[Incident] = []
            made = left = 0
            for opening in openings:
                there = known.setdefault((opening.rule, opening.signal.fingerprint), [])
                incident = next((one for one in there if one.is_open), None)
                # What is closed and stays so is passed over, and takes no place from what is new.
                if incident is None and (number := self._number(opening, there)) is not None:
                    if most is not None and made >= most:
                        left += 1
                        continue
                    if opening.signal.is_event:
                        place = first.setdefault(_event(opening), opening.signal.fingerprint)
                        if place != opening.signal.fingerprint:
                            body = {"rule": opening.rule, "event": opening.signal.fingerprint, "first": place}
                            t.append("events.repeated", opening.subject, body, actor=opening.proposed_by)
                            continue
                    incident = self._made(t, opening, number)
                    there.append(incident)
                    made += 1
                if incident is not None:
                    found.append(incident)
            return found, left

    def _first_places(self, t: LedgerTransaction, openings: Sequence[Opening]) -> dict[tuple[str, str, str], str]:
        """Where the events of these openings were read first, as far as they have incidents: fingerprint by rule, source and id."""
        events = [_event(one) for one in openings if one.signal.is_event]
        if not events:
            return {}
        rows = t.connection.execute(
            "select distinct on (1, 2, 3) rule, signal -> 'labels' ->> 'source', signal -> 'labels' ->> 'id', fingerprint"
            " from ops_remediation.incidents where signal ->> 'source' = 'kafka'"
            " and (rule, signal -> 'labels' ->> 'source', signal -> 'labels' ->> 'id')"
            " in (select * from unnest(%s::text[], %s::text[], %s::text[])) order by 1, 2, 3, opened_at, id",
            [list(column) for column in zip(*events, strict=True)],
        ).fetchall()
        return {(row[0], row[1], row[2]): row[3] for row in rows}

    def _number(self, opening: Opening, before: Sequence[Incident]) -> int | None:
        """How many incidents of this very signal were closed before; None where it leads to no other one."""
        signal = opening.signal
        same = [one for one in before if one.signal.starts_at == signal.starts_at]
        if same and not (
            same[-1].ending in (Ending.HELPED, Ending.CLEARED)
            and same[-1].closed_at is not None
            and self.clock.now() - same[-1].closed_at >= opening.again_after
            and not signal.is_event
        ):
            return None
        return len(same)

    def _made(self, t: LedgerTransaction, opening: Opening, number: int) -> Incident:
        now, signal = self.clock.now(), opening.signal
        made = Incident(
            incident_id(opening.rule, signal.fingerprint, signal.starts_at, number), opening.rule, signal.fingerprint,
            opening.subject, opening.playbook, State.OPEN, signal, now, now, proposed_by=opening.proposed_by,
            reason=f"{signal.name} began at {signal.starts_at:%Y-%m-%d %H:%M:%S} UTC",
        )  # fmt: skip
        t.connection.execute(
            "insert into ops_remediation.incidents (id, rule, fingerprint, subject, playbook, state, signal, opened_at,"
            " updated_at, reason, proposed_by) values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            [made.id, made.rule, made.fingerprint, made.subject, made.playbook, made.state, Jsonb(signal.as_json()), now, now,
             made.reason, made.proposed_by],
        )  # fmt: skip
        self._record(t, made, actor=opening.proposed_by)
        return made

    def get(self, incident: str) -> Incident:
        """Raises NotThereError; a beginning that fits one alone is enough."""
        with self.transaction() as t:
            found = self._select(t, "starts_with(id, %s)", incident)
        if len(found) > 1 and not (found := [one for one in found if one.id == incident]):
            raise ConflictError(f"several incidents begin with {incident!r}", remedy="write more of the id")
        if not found:
            raise NotThereError(f"there is no incident {incident!r}", remedy="ops incidents list shows them")
        return found[0]

    def list(self, *, all_: bool = False, since: datetime | None = None, limit: int = 500) -> list[Incident]:
        """The open ones, oldest first; or the newest of all."""
        with self.transaction() as t:
            if not all_:
                return self._select(t, "state <> 'closed'", order="opened_at, id", limit=1_000_000)
            found = self._select(
                t, "(%s::timestamptz is null or opened_at >= %s)", since, since, order="opened_at desc, id", limit=limit
            )
            return found[::-1]

    def move(self, incident: Incident, to: State, reason: str, *, actor: str, **fields: Any) -> Incident:
        """Change it, with the ledger's entry. Raises ConflictError where somebody else was faster or the way is not allowed."""
        with self.transaction() as t:
            return self._move(t, incident, to, reason, actor=actor, **fields)

    def end_signal(self, incident: Incident, at: datetime, *, actor: str) -> Incident:
        """The alert ended. What was not begun is closed; what was begun is brought to its end by whoever works on it."""
        ending = ending_without_signal(incident)
        if ending is None:
            with self.transaction() as t:
                t.connection.execute(
                    "update ops_remediation.incidents set signal_ended_at = %s where id = %s and signal_ended_at is null",
                    [at, incident.id],
                )
            return replace(incident, signal_ended_at=incident.signal_ended_at or at)
        return self.close(incident, ending, f"{incident.signal.name} ended", actor=actor, signal_ended_at=at)

    def close(self, incident: Incident, ending: Ending, reason: str, *, actor: str, **fields: Any) -> Incident:
        now = self.clock.now()
        return self.move(incident, State.CLOSED, reason, actor=actor, ending=ending, closed_at=now, **fields)

    def take_over(self, incident: Incident, *, actor: str) -> Incident:
        """Go on with what somebody else began: from now on whoever still works on the older version changes nothing."""
        with self.transaction() as t:
            done = t.connection.execute(
                "update ops_remediation.incidents set version = version + 1, updated_at = %s where id = %s and version = %s",
                [self.clock.now(), incident.id, incident.version],
            )
            if done.rowcount != 1:
                raise _moved_on(incident)
            body = {"incident": incident.id, "state": incident.state.value, "version": incident.version + 1}
            t.append("incident.taken_over", incident.subject, body, actor=actor)
        return replace(incident, version=incident.version + 1)

    def put_off(self, incident: Incident, until: datetime, rulings: Sequence[Mapping[str, Any]]) -> Incident:
        """Refused again for the same reasons: looked at again later, and nobody is told once more."""
        with self.transaction() as t:
            t.connection.execute(
                "update ops_remediation.incidents set retry_at = %s, rulings = %s where id = %s and version = %s",
                [until, Jsonb(list(rulings)), incident.id, incident.version],
            )
        return replace(incident, retry_at=until, rulings=tuple(rulings))

    def note(self, incident: Incident, outcomes: Sequence[Mapping[str, Any]]) -> Incident:
        """What became of changes so far, while they are being made. Raises ConflictError where the incident moved on."""
        with self.transaction() as t:
            done = t.connection.execute(
                "update ops_remediation.incidents set outcomes = %s, updated_at = %s where id = %s and version = %s",
                [Jsonb(list(outcomes)), self.clock.now(), incident.id, incident.version],
            )
            if done.rowcount != 1:
                raise _moved_on(incident)
        return replace(incident, outcomes=tuple(outcomes))

    def still_mine(self, incident: Incident) -> Pause | None:
        """Right before a change: raises ConflictError where the incident moved on; the pause that holds, if one does."""
        with self.transaction() as t:
            row = t.connection.execute(
                "select version from ops_remediation.incidents where id = %s", [incident.id]
            ).fetchone()
            if row is None or row[0] != incident.version:
                raise _moved_on(incident)
            return _pause(t)

    def _move(
        self, t: LedgerTransaction, incident: Incident, to: State, reason: str, *, actor: str, **fields: Any
    ) -> Incident:
        need_allowed(incident, to)
        if unknown := fields.keys() - _SETTABLE:
            raise TypeError(f"no such fields: {unknown}")
        now = self.clock.now()
        values = {"state": to, "reason": reason, "updated_at": now, **fields}
        stored = {
            name: Jsonb(_plain(value)) if name in _JSON and value is not None else value
            for name, value in values.items()
        }
        sets = ", ".join(f"{name} = %({name})s" for name in stored)
        if not incident.is_open and self._select(
            t, "rule = %s and fingerprint = %s and state <> 'closed'", incident.rule, incident.fingerprint
        ):
            raise ConflictError(
                "another incident of the same rule and signal is open", where=incident.id,
                remedy="wait until that one is over, or close it",
            )  # fmt: skip
        done = t.connection.execute(
            f"update ops_remediation.incidents set {sets}, version = version + 1 where id = %(id)s and version = %(held)s",  # pyright: ignore[reportArgumentType] - names of our own columns
            {**stored, "id": incident.id, "held": incident.version},
        )
        if done.rowcount != 1:
            raise _moved_on(incident)
        if to in (State.ESCALATED, State.CLOSED):
            # Nobody acts on it any more: what it holds is free for others, whichever way it came here. What is known of how it
            # ended was said by `end_claim`.
            t.connection.execute(
                "update ops_remediation.claims set ended_at = %s where incident = %s and ended_at is null",
                [now, incident.id],
            )
        moved = replace(incident, version=incident.version + 1, **values)
        self._record(t, moved, actor=actor, was=incident.state)
        return moved

    def _record(self, t: LedgerTransaction, incident: Incident, *, actor: str, was: State | None = None) -> None:
        """In the ledger without labels and data, which may hold what must be erasable; for people with the reason."""
        body: dict[str, Any] = {
            "incident": incident.id,
            "rule": incident.rule,
            "playbook": incident.playbook,
            "was": was.value if was else None,
            "state": incident.state.value,
            "version": incident.version,
            "attempts": incident.attempts,
            "digest": incident.digest,
            "ending": incident.ending.value if incident.ending else None,
            "reason": incident.reason,
        }
        t.append(f"incident.{incident.state.value}", incident.subject, body, actor=actor)
        t.connection.execute(
            "insert into ops_remediation.messages (incident, version, state, reason, at) values (%s, %s, %s, %s, %s)",
            [incident.id, incident.version, incident.state, incident.reason, incident.updated_at],
        )

    def _select(
        self, t: LedgerTransaction, where: LiteralString, *values: Any, order: LiteralString = "id", limit: int = 500
    ) -> list[Incident]:
        with t.connection.cursor(row_factory=dict_row) as cursor:
            query = (
                f"select {_COLUMNS} from ops_remediation.incidents where {where} order by {order} limit {int(limit)}"
            )
            cursor.execute(query, values)  # pyright: ignore[reportArgumentType] - a number is put in
            return [_incident(row) for row in cursor]

    def history_of(self, incident_id: str) -> list[tuple[datetime, State, str]]:
        """When it came into which state, and why."""
        with self.transaction() as t:
            rows = t.connection.execute(
                "select at, state, reason from ops_remediation.messages where incident = %s order by id", [incident_id]
            ).fetchall()
        return [(row[0], State(row[1]), row[2]) for row in rows]

    def record_of(self, incident: Incident) -> list[Entry]:
        """The ledger's entries of an incident and of the actions that its plan led to, oldest first."""
        found: list[Entry] = []
        runs: set[str] = set()
        for entry in self.ledger.entries(subject=incident.subject, since=incident.opened_at):
            if entry.kind == "action.plan" and entry.body["plan"].get("digest") == incident.digest:
                runs.add(entry.body["run"])
            if entry.body.get("incident") == incident.id or entry.body.get("run") in runs:
                found.append(entry)
        return found

    # What is to be worked on

    def due(self, *, lost_after: timedelta = timedelta(minutes=2)) -> list[Incident]:
        """Incidents on which somebody has to go on and nobody is at work: retries, decisions of people, undoing in time, lost runs.

        What may be half changed comes first, then what people decided, then the rest by how long it has been due.
        What has just been opened is left to the run that was asked for then, for as long as `lost_after`.
        """
        now = self.clock.now()
        with self.transaction() as t:
            held = (
                "exists (select from pg_locks l where l.locktype = 'advisory' and l.granted and l.objsubid = 2"
                " and l.database = (select oid from pg_database where datname = current_database())"
                f" and l.classid::bigint = {self.ledger.claim_space}"
                " and l.objid::bigint = (hashtext('incident/' || i.id)::bigint & 4294967295))"
            )
            rows = t.connection.execute(
                f"""select i.id from ops_remediation.incidents i where i.state <> 'closed' and not {held} and (
                  (i.state in ('open', 'applying', 'verifying', 'undoing') and i.updated_at <= %(lost)s)
                  or (i.state = 'suppressed' and i.retry_at <= %(now)s)
                  or (i.state = 'held' and i.undo_at <= %(now)s)
                  or (i.state = 'waiting' and i.retry_at <= %(now)s)
                  or (i.state = 'waiting' and exists (select from ops_remediation.approvals a
                      where a.incident = i.id and a.digest = i.digest and a.expires_at > %(now)s)))
                order by i.state not in ('applying', 'verifying', 'undoing', 'held'), i.state <> 'waiting',
                  coalesce(i.retry_at, i.updated_at), i.id""",  # pyright: ignore[reportArgumentType] - constants alone
                {"lost": now - lost_after, "now": now},
            ).fetchall()
            return [self._select(t, "id = %s", row[0])[0] for row in rows[:500]]

    def work_on(self, incident_id: str) -> contextlib.AbstractContextManager[bool]:
        """Whether this incident is ours alone, across machines, until the context ends."""
        return self.ledger.claim(f"incident/{incident_id}")

    # Decisions of people

    def decide(
        self, incident: Incident, digest: str, decision: str, *, who: str, via: str, valid_for: timedelta
    ) -> Approval:
        """Approve or refuse exactly this plan. Raises ConflictError where the incident is not waiting for it any more."""
        now = self.clock.now()
        with self.transaction() as t:
            row = t.connection.execute(
                "select state, digest from ops_remediation.incidents where id = %s for update", [incident.id]
            ).fetchone()
            if row is None or row[0] != State.WAITING:
                raise ConflictError(f"the incident is {row[0] if row else 'gone'}, and not waiting", where=incident.id)
            if row[1] != digest:
                raise ConflictError(
                    f"the plan is {str(row[1])[:12]} by now, and not {digest[:12]}", where=incident.id,
                    remedy=f"look again: ops incidents show {incident.id}",
                )  # fmt: skip
            t.connection.execute(
                "insert into ops_remediation.approvals (incident, digest, decision, who, via, at, expires_at)"
                " values (%s, %s, %s, %s, %s, %s, %s)",
                [incident.id, digest, decision, who, via, now, now + valid_for],
            )
            body = {"incident": incident.id, "digest": digest, "decision": decision, "via": via}
            t.append(f"incident.{decision}", incident.subject, body, actor=who)
        return Approval(incident.id, digest, decision, who, via, now, now + valid_for)

    def decision(self, incident: Incident) -> Approval | None:
        """The newest decision on the plan that the incident waits with; None where it counts no more."""
        with self.transaction() as t:
            row = t.connection.execute(
                "select incident, digest, decision, who, via, at, expires_at from ops_remediation.approvals"
                " where incident = %s and digest = %s order by id desc limit 1",
                [incident.id, incident.digest],
            ).fetchone()
        found = Approval(*row) if row else None
        return found if found is not None and found.expires_at > self.clock.now() else None

    def void(self, incident: Incident) -> None:
        """Decisions on its plan that a guard did not accept count no more: another one is waited for."""
        with self.transaction() as t:
            now = self.clock.now()
            t.connection.execute(
                "update ops_remediation.approvals set expires_at = %s where incident = %s and digest = %s and expires_at > %s",
                [now, incident.id, incident.digest, now],
            )

    def pause(self, why: str, *, who: str) -> Pause:
        """Nothing is applied from now on. Idempotent."""
        with self.transaction() as t:
            if there := _pause(t):
                return there
            pause = Pause(why, who, self.clock.now())
            t.connection.execute(
                "insert into ops_remediation.pauses (why, who, at) values (%s, %s, %s)", [why, who, pause.at]
            )
            t.append("remediation.pause", "remediation", {"why": why}, actor=who)
            return pause

    def resume(self, *, who: str) -> bool:
        """Whether there was a pause to be ended."""
        with self.transaction() as t:
            done = t.connection.execute(
                "update ops_remediation.pauses set ended_at = %s, ended_by = %s where ended_at is null",
                [self.clock.now(), who],
            )
            if done.rowcount:
                t.append("remediation.resume", "remediation", {}, actor=who)
            return done.rowcount > 0

    def paused(self) -> Pause | None:
        with self.transaction() as t:
            return _pause(t)

    # Claims

    def admit(
        self, incident: Incident, claim: Claim, rule_on: Callable[[Sequence[Claim], datetime], list[Ruling]],
        *, since: datetime, actor: str, **fields: Any,
    ) -> tuple[list[Ruling], Incident | None]:  # fmt: skip
        """Claim the right to apply, atomically over all incidents: `rule_on` judges by all claims since `since` and all that go on.

        With the claim the incident is APPLYING. A claim that this very attempt holds already counts as held.
        """
        with self.transaction() as t:
            t.connection.execute("select pg_advisory_xact_lock(%s, %s)", [_SPACE, _ADMISSION])
            if pause := _pause(t):
                return [Ruling("pause", False, f"everything is paused by {pause.who}: {pause.why}")], None
            rows = t.connection.execute(
                "select incident, attempt, rule, subject, domain, playbook, at, ended_at, helped from ops_remediation.claims"
                " where (at >= %s or ended_at is null) and (incident, attempt) <> (%s, %s) order by at",
                [since, claim.incident, claim.attempt],
            ).fetchall()
            rulings = rule_on([Claim(*row) for row in rows], claim.at)
            if not all(ruling.allows for ruling in rulings):
                return rulings, None
            t.connection.execute(
                "insert into ops_remediation.claims (incident, attempt, rule, subject, domain, playbook, at)"
                " values (%s, %s, %s, %s, %s, %s, %s) on conflict do nothing",
                [claim.incident, claim.attempt, claim.rule, claim.subject, claim.domain, claim.playbook, claim.at],
            )
            reason = f"attempt {claim.attempt} of {claim.playbook}"
            moved = self._move(
                t, incident, State.APPLYING, reason, actor=actor, attempts=claim.attempt, outcomes=[], **fields
            )
            return rulings, moved

    def claims(self, since: datetime) -> list[Claim]:
        """For looking: those since `since`, and those that go on."""
        with self.transaction() as t:
            rows = t.connection.execute(
                "select incident, attempt, rule, subject, domain, playbook, at, ended_at, helped from ops_remediation.claims"
                " where at >= %s or ended_at is null order by at",
                [since],
            ).fetchall()
        return [Claim(*row) for row in rows]

    def end_claim(self, incident: Incident, *, helped: bool | None, free: bool = True) -> None:
        """`helped` None: it is not known, or nothing was tried. Without `free` the failure domain is kept, for the undo."""
        with self.transaction() as t:
            t.connection.execute(
                "update ops_remediation.claims set ended_at = %s, helped = %s where incident = %s and ended_at is null",
                [self.clock.now() if free else None, helped, incident.id],
            )

    def claim_again(self, incident: Incident) -> bool:
        """For an undo: whether the failure domain of what was applied is ours again. It ends with the incident, as every claim does."""
        with self.transaction() as t:
            t.connection.execute("select pg_advisory_xact_lock(%s, %s)", [_SPACE, _ADMISSION])
            busy = t.connection.execute(
                "select from ops_remediation.claims mine join ops_remediation.claims other using (domain)"
                " where mine.incident = %s and other.incident <> mine.incident and other.ended_at is null limit 1",
                [incident.id],
            ).fetchone()
            if busy is None:
                t.connection.execute(
                    "update ops_remediation.claims set ended_at = null where incident = %s and attempt = %s",
                    [incident.id, incident.attempts],
                )
            return busy is None

    # Signals, for replay and for what must always be there

    def saw(self, signals: Sequence[Signal]) -> int:
        """Keep what began, changed or ended since it was last kept; how many that were."""
        if not signals:
            return 0
        with self.transaction() as t:
            last: dict[tuple[str, str], dict[str, Any]] = {
                (row[0], row[1]): row[2]
                for row in t.connection.execute(
                    "select distinct on (source, fingerprint) source, fingerprint, signal from ops_remediation.signals"
                    " where fingerprint = any(%s) order by source, fingerprint, id desc",
                    [[signal.fingerprint for signal in signals]],
                )
            }
            news = [s for s in signals if _essence(s.as_json()) != _essence(last.get((s.source, s.fingerprint)))]
            with t.connection.cursor() as cursor:
                cursor.executemany(
                    "insert into ops_remediation.signals (at, source, fingerprint, signal) values (%s, %s, %s, %s)",
                    [(s.seen_at, s.source, s.fingerprint, Jsonb(s.as_json())) for s in news],
                )
        return len(news)

    def firing(self, source: str) -> list[Signal]:
        """What was kept last as not ended."""
        with self.transaction() as t:
            rows = t.connection.execute(
                "select signal from (select distinct on (fingerprint) signal from ops_remediation.signals where source = %s"
                " order by fingerprint, id desc) newest where signal ->> 'ends_at' is null",
                [source],
            ).fetchall()
        return [Signal.from_json(row[0]) for row in rows]

    def history(self, since: datetime, until: datetime) -> list[tuple[datetime, Signal]]:
        """What was kept, in the order in which it was seen."""
        with self.transaction() as t:
            rows = t.connection.execute(
                "select at, signal from ops_remediation.signals where at >= %s and at < %s order by at, id",
                [since, until],
            ).fetchall()
        return [(row[0], Signal.from_json(row[1])) for row in rows]

    def forget_signals(self, before: datetime) -> int:
        """Delete what is older, but for the newest of each; they hold labels, which people may ask to be erased."""
        with self.transaction() as t:
            return t.connection.execute(
                "delete from ops_remediation.signals s where at < %s and exists (select from ops_remediation.signals n"
                " where n.source = s.source and n.fingerprint = s.fingerprint and n.id > s.id)",
                [before],
            ).rowcount

    def mark_seen(self, name: str, at: datetime) -> None:
        with self.transaction() as t:
            t.connection.execute(
                "insert into ops_remediation.seen values (%s, %s) on conflict (name) do update set at = excluded.at"
                " where ops_remediation.seen.at < excluded.at",
                [name, at],
            )

    def last_seen(self, name: str) -> datetime | None:
        with self.transaction() as t:
            row = t.connection.execute("select at from ops_remediation.seen where name = %s", [name]).fetchone()
        return row[0] if row else None

    def keep_lag(self, system: str, lag: Sequence[tuple[str, int, int]]) -> None:
        """Topic, partition, messages that wait: as the newest tick left them, for metrics."""
        now = self.clock.now()
        with self.transaction() as t, t.connection.cursor() as cursor:
            cursor.executemany(
                "insert into ops_remediation.lag values (%s, %s, %s, %s, %s) on conflict (system, topic, part)"
                " do update set messages = excluded.messages, at = excluded.at",
                [(system, topic, part, messages, now) for topic, part, messages in lag],
            )

    # Messages

    def unsent(self, limit: int = 100) -> list[Message]:
        with self.transaction() as t:
            rows = t.connection.execute(
                "select id, incident, version, state, reason, at from ops_remediation.messages where sent_at is null"
                " order by id limit %s",
                [limit],
            ).fetchall()
        return [Message(row[0], row[1], row[2], State(row[3]), row[4], row[5]) for row in rows]

    def sent(self, message: Message, *, thread: str | None = None) -> None:
        """`thread`: of the first message about the incident; later ones are put below it."""
        with self.transaction() as t:
            t.connection.execute(
                "update ops_remediation.messages set sent_at = %s where id = %s", [self.clock.now(), message.id]
            )
            if thread is not None:
                t.connection.execute(
                    "update ops_remediation.incidents set thread = coalesce(thread, %s) where id = %s",
                    [thread, message.incident],
                )

    def first_time(self, signature: str, *, keep: timedelta = timedelta(hours=1)) -> bool:
        """Whether this request was never taken before; from now on it was."""
        now = self.clock.now()
        with self.transaction() as t:
            t.connection.execute("delete from ops_remediation.requests where at < %s", [now - keep])
            done = t.connection.execute(
                "insert into ops_remediation.requests values (%s, %s) on conflict do nothing", [signature, now]
            )
            return done.rowcount == 1

    # For metrics

    def figures(self) -> Figures:
        """What there is of everything, in one look."""
        with self.transaction() as t:
            states = t.connection.execute(
                "select state, count(*), min(opened_at) from ops_remediation.incidents where state <> 'closed' group by state"
            ).fetchall()
            endings = t.connection.execute(
                "select rule, ending, count(*) from ops_remediation.incidents where state = 'closed' group by 1, 2"
            ).fetchall()
            actions = t.connection.execute(
                "select playbook, coalesce(helped::text, 'unknown'), count(*) from ops_remediation.claims group by 1, 2"
            ).fetchall()
            unsent = t.connection.execute(
                "select count(*), min(at) from ops_remediation.messages where sent_at is null"
            ).fetchone()
            seen = t.connection.execute("select name, at from ops_remediation.seen").fetchall()
            lag = t.connection.execute("select system, topic, part, messages from ops_remediation.lag").fetchall()
            paused = _pause(t)
        count, oldest = unsent or (0, None)
        return Figures(
            {State(state): (number, since) for state, number, since in states},
            {(rule, ending): number for rule, ending, number in endings},
            {(book, helped): number for book, helped, number in actions},
            count, oldest, dict(seen), paused, {(row[0], row[1], row[2]): row[3] for row in lag},
        )  # fmt: skip

    def clock_offset(self) -> timedelta:
        """Our clock minus the database's."""
        with self.transaction() as t:
            row = t.connection.execute("select clock_timestamp()").fetchone()
        return self.clock.now() - (row or [self.clock.now()])[0]


def _event(opening: Opening) -> tuple[str, str, str]:
    labels = opening.signal.labels
    # Who made the signal by hand gave it no id: then its place is all that tells it apart.
    return opening.rule, labels.get("source", ""), labels.get("id") or opening.signal.fingerprint


def _pause(t: LedgerTransaction) -> Pause | None:
    row = t.connection.execute("select why, who, at from ops_remediation.pauses where ended_at is null").fetchone()
    return Pause(*row) if row else None


def _moved_on(incident: Incident) -> ConflictError:
    return ConflictError(
        f"the incident is not any more at version {incident.version}: somebody else went on with it", where=incident.id
    )


def _plain(value: Any) -> Any:
    return (
        value.as_json()
        if isinstance(value, Signal)
        else [dict(v) for v in value]
        if isinstance(value, list | tuple)
        else value
    )


def _incident(row: Mapping[str, Any]) -> Incident:
    values: dict[str, Any] = {
        **row,
        "state": State(row["state"]),
        "ending": Ending(row["ending"]) if row["ending"] else None,
        "signal": Signal.from_json(row["signal"]),
        "rulings": tuple(row["rulings"]),
        "outcomes": tuple(row["outcomes"]),
    }
    return Incident(**values)


def _essence(signal: Mapping[str, Any] | None) -> object:
    """What makes a signal another one than it was."""
    return signal and [signal[key] for key in ("starts_at", "ends_at", "silenced", "inhibited")]
