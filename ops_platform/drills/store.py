"""Drills, their steps, what they made, what their probes saw and what they found, in the platform's PostgreSQL, schema `ops_drills`.

Every change of a drill and its entry in the ledger are one transaction, and asks for the version that its author holds: whoever was
killed, or is late, changes nothing and makes nothing. Two drills never hold one target, or one failure domain: the database says so.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, LiteralString

from psycopg.errors import UniqueViolation
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from ops_platform.actions import Ruling
from ops_platform.drills.model import (
    Checked,
    Drill,
    DrillState,
    Ending,
    Finding,
    FindingState,
    Measured,
    Resource,
    Sample,
    StepRecord,
    StepState,
    finding_id,
)
from ops_platform.errors import ConflictError, NotThereError, OpsError
from ops_platform.ledger import LedgerTransaction, Tables

_SPACE = 0x6F707364  # "opsd": advisory locks of drills
_ADMISSION = 2  # 1 is of `ledger.Tables`

_SCHEMA: LiteralString = """
create schema if not exists ops_drills;

create table if not exists ops_drills.drills (
  id text primary key,
  plan text not null,
  runbook text not null,
  body jsonb not null,
  body_sha256 text not null,
  subject text not null,
  domain text not null,
  environment text not null,
  scenario text not null,
  mode text not null check (mode in ('drill', 'real')),
  parameters jsonb not null,
  objectives jsonb not null,
  operator text not null,
  trigger text not null,
  approved_by text,
  digest text not null,
  state text not null,
  started_at timestamptz not null,
  updated_at timestamptz not null,
  version bigint not null default 1,
  ending text,
  reason text not null default '',
  abort jsonb,
  ended_at timestamptz,
  verdict text,
  card jsonb,
  check ((state = 'ended') = (ended_at is not null))
);
create unique index if not exists drills_one_a_target on ops_drills.drills (subject) where state <> 'ended';
create unique index if not exists drills_one_a_domain on ops_drills.drills (domain) where state <> 'ended';
create index if not exists drills_started on ops_drills.drills (started_at);

create table if not exists ops_drills.steps (
  drill text not null references ops_drills.drills,
  step text not null,
  state text not null,
  attempts int not null default 0,
  started_at timestamptz,
  ended_at timestamptz,
  said text not null default '',
  facts jsonb not null default '{}',
  checks jsonb not null default '[]',
  measured jsonb not null default '[]',
  primary key (drill, step)
);

create table if not exists ops_drills.resources (
  id bigint generated always as identity primary key,
  drill text not null references ops_drills.drills,
  step text not null,
  kind text not null,
  name text not null,
  host text not null,
  detail jsonb not null,
  keep boolean not null,
  made_at timestamptz not null,
  gone_at timestamptz,
  leftover text,
  unique (drill, kind, name)
);
create index if not exists resources_there on ops_drills.resources (drill) where gone_at is null;

create table if not exists ops_drills.samples (
  id bigint generated always as identity primary key,
  drill text not null references ops_drills.drills,
  probe text not null,
  at timestamptz not null,
  ok boolean not null,
  ms real not null,
  n bigint,
  error text
);
create index if not exists samples_of on ops_drills.samples (drill, probe, at);

create table if not exists ops_drills.answers (
  drill text not null references ops_drills.drills,
  step text not null,
  who text not null,
  at timestamptz not null,
  text text not null,
  evidence jsonb not null,
  primary key (drill, step)
);

create table if not exists ops_drills.approvals (
  id bigint generated always as identity primary key,
  digest text not null,
  who text not null,
  at timestamptz not null,
  expires_at timestamptz not null
);
create index if not exists approvals_digest on ops_drills.approvals (digest, id);

create table if not exists ops_drills.findings (
  id text primary key,
  key text not null,
  drill text not null references ops_drills.drills,
  plan text not null,
  subject text not null,
  runbook text not null,
  title text not null,
  detail text not null,
  owner text not null,
  due timestamptz not null,
  state text not null,
  opened_at timestamptz not null,
  seen int not null default 1,
  last_drill text not null,
  note text not null default '',
  closed_at timestamptz,
  closed_by text
);
create unique index if not exists findings_one_open on ops_drills.findings (key) where state = 'open';
"""

_DRILL: LiteralString = (
    "id, plan, runbook, body, body_sha256, subject, domain, environment, scenario, mode, parameters, objectives, operator, trigger,"
    " approved_by, digest, state, started_at, updated_at, version, ending, reason, abort, ended_at, verdict, card"
)
_STEP: LiteralString = "step, state, attempts, started_at, ended_at, said, facts, checks, measured"
_RESOURCE: LiteralString = "id, drill, step, kind, name, host, detail, keep, made_at, gone_at, leftover"
_FINDING: LiteralString = "id, key, drill, plan, subject, runbook, title, detail, owner, due, state, opened_at, seen, last_drill, note, closed_at, closed_by"
_SETTABLE = frozenset({"ending", "reason", "ended_at", "verdict", "card"})


class AbortedError(OpsError):
    """Somebody asked for the drill's end, or a condition of its runbook did."""


@dataclass(frozen=True)
class Approval:
    """A person's decision on exactly one plan."""

    digest: str
    who: str
    at: datetime
    expires_at: datetime


@dataclass(frozen=True)
class Answer:
    """What a person did. `evidence`: names of files and their SHA-256."""

    step: str
    who: str
    at: datetime
    text: str
    evidence: Mapping[str, str]


@dataclass(frozen=True)
class Wrong:
    """Something that a drill found wrong, before it is a finding."""

    key: str
    title: str
    detail: str


class Store(Tables):
    """The drills of one platform."""

    SCHEMA = _SCHEMA
    LOCKS = _SPACE

    # Drills

    def admit(
        self, drill: Drill, steps: Sequence[str], rule_on: Callable[[Sequence[Drill]], list[Ruling]]
    ) -> list[Ruling]:
        """Claim the target and begin, atomically over all drills: `rule_on` judges by those that go on. Begun where all allow."""
        with self.transaction() as t:
            t.connection.execute("select pg_advisory_xact_lock(%s, %s)", [_SPACE, _ADMISSION])
            rulings = rule_on(self._select(t, "state <> 'ended'"))
            if not all(ruling.allows for ruling in rulings):
                return rulings
            values = {
                **drill.__dict__,
                **{name: Jsonb(getattr(drill, name)) for name in ("body", "parameters", "objectives")},
                "abort": None, "card": None, "ending": None,
            }  # fmt: skip
            columns = _DRILL.split(", ")
            places = ", ".join(f"%({column})s" for column in columns)
            try:
                t.connection.execute(f"insert into ops_drills.drills ({_DRILL}) values ({places})", values)  # pyright: ignore[reportArgumentType] - our own columns
            except UniqueViolation:
                raise ConflictError(
                    "another drill holds this target or its failure domain", where=drill.subject
                ) from None
            with t.connection.cursor() as cursor:
                cursor.executemany(
                    "insert into ops_drills.steps (drill, step, state) values (%s, %s, 'pending')",
                    [(drill.id, step) for step in steps],
                )
            self._record(t, drill, "drill.begun", actor=drill.operator)
        return rulings

    def get(self, drill: str) -> Drill:
        """Raises NotThereError; a beginning that fits one alone is enough."""
        with self.transaction() as t:
            found = self._select(t, "starts_with(id, %s)", drill)
        exact = [one for one in found if one.id == drill]
        if len(found) > 1 and not exact:
            raise ConflictError(f"several drills begin with {drill!r}", remedy="write more of the id")
        if not found:
            raise NotThereError(f"there is no drill {drill!r}", remedy="ops drill list shows them")
        return (exact or found)[0]

    def list(
        self, *, subject: str | None = None, since: datetime | None = None, ended: bool | None = None, limit: int = 1000
    ) -> list[Drill]:
        """Oldest first; the newest `limit` of them."""
        with self.transaction() as t:
            found = self._select(
                t,
                "(%s::text is null or subject = %s) and (%s::timestamptz is null or started_at >= %s)"
                " and (%s::boolean is null or (state = 'ended') = %s)",
                subject, subject, since, since, ended, ended,
                order="started_at desc, id", limit=limit,
            )  # fmt: skip
        return found[::-1]

    def dead(self, *, lost_after: timedelta = timedelta(minutes=2)) -> list[Drill]:
        """Those that go on by their record, and on which nobody is at work: their workers were killed. One that waits for a person is not."""
        now = self.clock.now()
        with self.transaction() as t:
            held = self.ledger.claimed("'drill/' || d.id")
            rows = t.connection.execute(
                f"select d.id from ops_drills.drills d where d.state in ('running', 'ending') and not {held} and d.updated_at <= %s order by d.id",  # pyright: ignore[reportArgumentType] - constants alone
                [now - lost_after],
            ).fetchall()
            return [self._select(t, "id = %s", row[0])[0] for row in rows]

    def with_remains(self) -> list[Drill]:
        """Those that have ended, and left something that was to go."""
        with self.transaction() as t:
            return self._select(
                t,
                "state = 'ended' and exists (select from ops_drills.resources r where r.drill = ops_drills.drills.id"
                " and r.gone_at is null and not r.keep)",
            )

    def work_on(self, drill_id: str) -> contextlib.AbstractContextManager[bool]:
        """Whether this drill is ours alone, across machines, until the context ends."""
        return self.ledger.claim(f"drill/{drill_id}")

    def take_over(self, drill: Drill, *, actor: str) -> Drill:
        """Go on with it: from now on whoever still works on the older version changes nothing and makes nothing."""
        with self.transaction() as t:
            self._fenced(t, drill, "version = version + 1")
            t.append("drill.taken_over", drill.subject, {"drill": drill.id, "version": drill.version + 1}, actor=actor)
        return replace(drill, version=drill.version + 1)

    def move(self, drill: Drill, to: DrillState, *, actor: str, **fields: Any) -> Drill:
        """Change its state, with the ledger's entry. Raises ConflictError where somebody else went on with it."""
        if unknown := fields.keys() - _SETTABLE:
            raise TypeError(f"no such fields: {unknown}")
        moved = replace(drill, state=to, **fields)
        with self.transaction() as t:
            sets = "".join(f", {name} = %({name})s" for name in fields)
            values = {**fields, "card": Jsonb(fields["card"])} if fields.get("card") is not None else fields
            self._fenced(t, drill, f"state = %(to)s{sets}", {**values, "to": to})
            self._record(t, moved, f"drill.{to.value}", actor=actor)
        return moved

    def still_mine(self, drill: Drill) -> None:
        """Says that its worker lives. Raises ConflictError where somebody else went on with it, AbortedError where it is to end."""
        with self.transaction() as t:
            row = t.connection.execute(
                "update ops_drills.drills set updated_at = %s where id = %s and version = %s returning abort, state",
                [self.clock.now(), drill.id, drill.version],
            ).fetchone()
        if row is None:
            raise _moved_on(drill)
        if row[0] is not None and row[1] != DrillState.ENDING:
            raise AbortedError(f"aborted by {row[0]['who']}: {row[0]['why']}", where=drill.id)

    def abort(self, drill: Drill, why: str, *, who: str) -> bool:
        """Ask for its end; whoever works on it puts back what was broken. False: it ends or has ended already."""
        with self.transaction() as t:
            body = {"who": who, "why": why, "at": self.clock.now().isoformat()}
            done = t.connection.execute(
                "update ops_drills.drills set abort = %s where id = %s and abort is null and state in ('running', 'waiting')",
                [Jsonb(body), drill.id],
            )
            if done.rowcount:
                t.append("drill.abort", drill.subject, {"drill": drill.id, "why": why}, actor=who)
            return done.rowcount > 0

    def _fenced(self, t: LedgerTransaction, drill: Drill, sets: str, values: Mapping[str, Any] | None = None) -> None:
        done = t.connection.execute(
            f"update ops_drills.drills set {sets}, updated_at = %(now)s where id = %(id)s and version = %(held)s",  # pyright: ignore[reportArgumentType] - names of our own columns
            {**(values or {}), "now": self.clock.now(), "id": drill.id, "held": drill.version},
        )
        if done.rowcount != 1:
            raise _moved_on(drill)

    def _select(
        self, t: LedgerTransaction, where: LiteralString, *values: Any, order: LiteralString = "id", limit: int = 1000
    ) -> list[Drill]:
        with t.connection.cursor(row_factory=dict_row) as cursor:
            query = f"select {_DRILL} from ops_drills.drills where {where} order by {order} limit {int(limit)}"
            cursor.execute(query, values)  # pyright: ignore[reportArgumentType] - a number is put in
            return [_drill(row) for row in cursor]

    def _record(self, t: LedgerTransaction, drill: Drill, kind: str, *, actor: str) -> None:
        body: dict[str, Any] = {
            "drill": drill.id,
            "plan": drill.plan,
            "runbook": drill.runbook,
            "runbook_sha256": drill.body_sha256,
            "mode": drill.mode,
            "scenario": drill.scenario,
            "trigger": drill.trigger,
            "digest": drill.digest,
            "approved_by": drill.approved_by,
            "version": drill.version,
            "ending": drill.ending.value if drill.ending else None,
            "reason": drill.reason,
            "verdict": drill.verdict,
        }
        t.append(kind, drill.subject, body, actor=actor)

    # Steps

    def steps(self, drill_id: str) -> dict[str, StepRecord]:
        with self.transaction() as t:
            rows = t.connection.execute(f"select {_STEP} from ops_drills.steps where drill = %s", [drill_id]).fetchall()
        return {row[0]: _step(row) for row in rows}

    def begin_step(self, drill: Drill, step: str, state: StepState = StepState.RUNNING) -> StepRecord:
        """An attempt begins; the step's clock runs from its first one. Raises ConflictError, AbortedError."""
        self.still_mine(drill)
        with self.transaction() as t:
            self._fenced(t, drill, "version = version")
            row = t.connection.execute(
                "update ops_drills.steps set state = %s, attempts = attempts + 1, started_at = coalesce(started_at, %s)"
                f" where drill = %s and step = %s and state in ('pending', 'running', 'waiting', 'failed') returning {_STEP}",
                [state, self.clock.now(), drill.id, step],
            ).fetchone()
        if row is None:
            raise ConflictError(f"the step {step} has ended already", where=drill.id)
        return _step(row)

    def end_step(
        self,
        drill: Drill,
        step: str,
        state: StepState,
        said: str,
        *,
        actor: str,
        facts: Mapping[str, Any] | None = None,
        checks: Sequence[Checked] = (),
        measured: Sequence[Measured] = (),
    ) -> None:
        """With the ledger's entry. Raises ConflictError where somebody else went on with the drill."""
        looked, took = [c.model_dump(mode="json") for c in checks], [m.model_dump(mode="json") for m in measured]
        with self.transaction() as t:
            self._fenced(t, drill, "version = version")
            t.connection.execute(
                "update ops_drills.steps set state = %s, ended_at = %s, said = %s, facts = %s, checks = %s, measured = %s"
                " where drill = %s and step = %s",
                [state, self.clock.now(), said, Jsonb(dict(facts or {})), Jsonb(looked), Jsonb(took), drill.id, step],
            )  # fmt: skip
            body = {"drill": drill.id, "step": step, "state": state.value, "said": said, "measured": took}
            t.append("drill.step", drill.subject, body, actor=actor)

    # What is made

    def register(
        self, drill: Drill, step: str, kind: str, name: str, detail: Mapping[str, Any], *, keep: bool = False
    ) -> Resource:
        """Before it is made; the same again is the same one. Raises ConflictError where the drill is not ours any more."""
        with self.transaction() as t:
            self._fenced(t, drill, "version = version")
            row = t.connection.execute(
                "insert into ops_drills.resources (drill, step, kind, name, host, detail, keep, made_at)"
                " values (%s, %s, %s, %s, %s, %s, %s, %s) on conflict (drill, kind, name) do update"
                f" set detail = excluded.detail, gone_at = null, leftover = null returning {_RESOURCE}",
                [drill.id, step, kind, name, this_host(), Jsonb(dict(detail)), keep, self.clock.now()],
            ).fetchone()
        assert row is not None  # noqa: S101 - an insert returns its row
        return Resource(*row)

    def resources(self, drill_id: str) -> list[Resource]:
        """In the order in which they were registered."""
        with self.transaction() as t:
            rows = t.connection.execute(
                f"select {_RESOURCE} from ops_drills.resources where drill = %s order by id", [drill_id]
            ).fetchall()
        return [Resource(*row) for row in rows]

    def looked_at(self, resource: Resource, left: str | None) -> None:
        """What the look after its removal found; None: it is gone."""
        with self.transaction() as t:
            t.connection.execute(
                "update ops_drills.resources set gone_at = %s, leftover = %s where id = %s",
                [self.clock.now() if left is None else None, left, resource.id],
            )

    def wanted(self, drill_id: str, kind: str, name: str) -> bool:
        """Whether it is still to be there: what starts late asks this first, and ends where it is not."""
        with self.transaction() as t:
            row = t.connection.execute(
                "select 1 from ops_drills.resources r join ops_drills.drills d on d.id = r.drill where r.drill = %s and r.kind = %s"
                " and r.name = %s and r.gone_at is null and d.state <> 'ended'",
                [drill_id, kind, name],
            ).fetchone()
        return row is not None

    # Probes

    def saw(self, drill_id: str, probe: str, samples: Sequence[Sample]) -> None:
        with self.transaction() as t, t.connection.cursor() as cursor, cursor.copy(
            "copy ops_drills.samples (drill, probe, at, ok, ms, n, error) from stdin"
        ) as copy:  # fmt: skip
            for sample in samples:
                copy.write_row((drill_id, probe, sample.at, sample.ok, sample.ms, sample.n, sample.error))

    def samples(self, drill_id: str, probe: str, *, since: datetime | None = None) -> list[Sample]:
        """In the order in which the attempts began."""
        with self.transaction() as t:
            rows = t.connection.execute(
                "select at, ok, ms, n, error from ops_drills.samples where drill = %s and probe = %s"
                " and (%s::timestamptz is null or at >= %s) order by at, id",
                [drill_id, probe, since, since],
            ).fetchall()
        return [Sample(*row) for row in rows]

    def forget_samples(self, before: datetime) -> int:
        """Of drills that ended before that moment; their scorecards keep what was made of them. How many were forgotten."""
        with self.transaction() as t:
            return t.connection.execute(
                "delete from ops_drills.samples s using ops_drills.drills d where d.id = s.drill and d.ended_at < %s",
                [before],
            ).rowcount

    # People

    def approve(self, digest: str, subject: str, *, who: str, valid_for: timedelta) -> Approval:
        now = self.clock.now()
        made = Approval(digest, who, now, now + valid_for)
        with self.transaction() as t:
            t.connection.execute(
                "insert into ops_drills.approvals (digest, who, at, expires_at) values (%s, %s, %s, %s)",
                [digest, who, made.at, made.expires_at],
            )
            t.append("drill.approve", subject, {"digest": digest}, actor=who)
        return made

    def approvals(self, digest: str) -> list[Approval]:
        """Those of exactly this plan that still count."""
        with self.transaction() as t:
            rows = t.connection.execute(
                "select digest, who, at, expires_at from ops_drills.approvals where digest = %s and expires_at > %s order by id",
                [digest, self.clock.now()],
            ).fetchall()
        return [Approval(*row) for row in rows]

    def answer(self, drill: Drill, step: str, text: str, evidence: Mapping[str, str], *, who: str) -> Answer:
        """What a person did. Raises ConflictError where the drill is not waiting for it."""
        made = Answer(step, who, self.clock.now(), text, evidence)
        with self.transaction() as t:
            row = t.connection.execute(
                "select s.state from ops_drills.steps s join ops_drills.drills d on d.id = s.drill"
                " where s.drill = %s and s.step = %s and d.state <> 'ended' for update of s",
                [drill.id, step],
            ).fetchone()
            if row is None or row[0] != StepState.WAITING:
                raise ConflictError(
                    f"the drill is not waiting for the step {step!r}", where=drill.id,
                    remedy=f"ops drill show {drill.id} says what it waits for",
                )  # fmt: skip
            t.connection.execute(
                "insert into ops_drills.answers (drill, step, who, at, text, evidence) values (%s, %s, %s, %s, %s, %s)"
                " on conflict do nothing",
                [drill.id, step, who, made.at, text, Jsonb(dict(evidence))],
            )
            body = {"drill": drill.id, "step": step, "evidence": dict(evidence)}
            t.append("drill.answer", drill.subject, body, actor=who)
        return made

    def answers(self, drill_id: str) -> dict[str, Answer]:
        with self.transaction() as t:
            rows = t.connection.execute(
                "select step, who, at, text, evidence from ops_drills.answers where drill = %s order by at", [drill_id]
            ).fetchall()
        return {row[0]: Answer(*row) for row in rows}

    # Findings

    def found(
        self, drill: Drill, wrong: Sequence[Wrong], sound: Sequence[str], *, owner: str, due: datetime, actor: str
    ) -> list[tuple[Finding, bool]]:
        """Open a finding for each that is wrong, or count it where it is open already; those whose key was sound are gone.

        The findings that are open because of this drill, with whether each is new.
        """
        now, made = self.clock.now(), list[tuple[Finding, bool]]()
        with self.transaction() as t:
            for one in wrong:
                row = t.connection.execute(
                    f"update ops_drills.findings set seen = seen + (last_drill <> %s)::int, last_drill = %s, detail = %s"
                    f" where key = %s and state = 'open' returning {_FINDING}",
                    [drill.id, drill.id, one.detail, one.key],
                ).fetchone()
                if row is not None:
                    made.append((_finding(row), False))
                    continue
                finding = Finding(
                    finding_id(one.key, drill.id), one.key, drill.id, drill.plan, drill.subject, drill.runbook, one.title, one.detail,
                    owner, due, FindingState.OPEN, now, 1, drill.id,
                )  # fmt: skip
                columns = _FINDING.split(", ")
                places = ", ".join(f"%({column})s" for column in columns)
                t.connection.execute(
                    f"insert into ops_drills.findings ({_FINDING}) values ({places})", finding.__dict__
                )  # pyright: ignore[reportArgumentType] - our own columns
                self._told(t, "drill.finding", finding, actor)
                made.append((finding, True))
            rows = t.connection.execute(
                "update ops_drills.findings set state = 'gone', closed_at = %s, closed_by = %s where key = any(%s) and state = 'open'"
                f" returning {_FINDING}",
                [now, drill.id, list(sound)],
            ).fetchall()
            for row in rows:
                self._told(t, "drill.finding_gone", _finding(row), actor)
        return made

    def _told(self, t: LedgerTransaction, kind: str, finding: Finding, actor: str) -> None:
        body = {
            "finding": finding.id,
            "drill": finding.last_drill,
            "title": finding.title,
            "owner": finding.owner,
            "due": finding.due.isoformat(),
            "closed_by": finding.closed_by,
        }
        t.append(kind, finding.subject, body, actor=actor)

    def findings(self, *, all_: bool = False, subject: str | None = None) -> list[Finding]:
        """The open ones, the most urgent first; or all."""
        with self.transaction() as t:
            rows = t.connection.execute(
                f"select {_FINDING} from ops_drills.findings where (%s or state = 'open') and (%s::text is null or subject = %s)"
                " order by state, due, id",
                [all_, subject, subject],
            ).fetchall()
        return [_finding(row) for row in rows]

    def assign(self, finding: str, *, owner: str | None, due: datetime | None, note: str | None, actor: str) -> Finding:
        """Change who deals with it and until when. Raises NotThereError. It goes only when a drill shows that it is gone."""
        with self.transaction() as t:
            row = t.connection.execute(
                "update ops_drills.findings set owner = coalesce(%s, owner), due = coalesce(%s, due), note = coalesce(%s, note)"
                f" where id = %s returning {_FINDING}",
                [owner, due, note, finding],
            ).fetchone()
            if row is None:
                raise NotThereError(f"there is no finding {finding!r}", remedy="ops drill findings --all shows them")
            found = _finding(row)
            self._told(t, "drill.finding_assigned", found, actor)
        return found


def this_host() -> str:
    return socket.gethostname()


def _moved_on(drill: Drill) -> ConflictError:
    return ConflictError(
        f"the drill is not any more at version {drill.version}: somebody else went on with it", where=drill.id
    )


def _drill(row: Mapping[str, Any]) -> Drill:
    values: dict[str, Any] = {
        **row,
        "state": DrillState(row["state"]),
        "ending": Ending(row["ending"]) if row["ending"] else None,
    }
    return Drill(**values)


def _step(row: Sequence[Any]) -> StepRecord:
    step, state, attempts, started, ended, said, facts, checks, measured = row
    return StepRecord(
        step, StepState(state), attempts, started, ended, said, facts,
        tuple(Checked.model_validate(c) for c in checks), tuple(Measured.model_validate(m) for m in measured),
    )  # fmt: skip


def _finding(row: Sequence[Any]) -> Finding:
    values: dict[str, Any] = dict(zip(_FINDING.split(", "), row, strict=True))
    values["state"] = FindingState(values["state"])
    return Finding(**values)
