"""Incidents: opened, moved from state to state with the ledger's entry, and which of them are due."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, LiteralString

from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from ops_platform.errors import ConflictError, NotOurTurnError, NotThereError
from ops_platform.ledger import Entry, LedgerTransaction
from ops_platform.remediation.machine import ending_without_signal, need_allowed
from ops_platform.remediation.model import Ending, Incident, Opening, Pause, Signal, State, incident_id, moment_text
from ops_platform.remediation.store.schema import OPENING, SPACE
from ops_platform.remediation.store.tables import Tables, pause_of

_COLUMNS: LiteralString = (
    "id, rule, fingerprint, subject, playbook, state, signal, opened_at, updated_at, version, attempts, reason, plan, digest,"
    " rulings, outcomes, earlier, retry_at, deadline, undo_at, signal_ended_at, proposed_by, ending, closed_at, thread"
)
# What a change of state may set besides; `None` is a value, what is not named stays.
_SETTABLE = frozenset(
    {
        "plan", "digest", "rulings", "outcomes", "earlier", "retry_at", "deadline", "undo_at", "signal_ended_at", "proposed_by",
        "ending", "closed_at", "attempts", "signal",
    }
)  # fmt: skip
_JSON = frozenset({"plan", "rulings", "outcomes", "earlier", "signal"})


class Incidents(Tables):
    """Every change asks for the version that its author holds: whoever is late changes nothing."""

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
            t.connection.execute("select pg_advisory_xact_lock(%s, %s)", [SPACE, OPENING])
            known: dict[tuple[str, str], list[Incident]] = {}
            for one in self._about(t, openings):
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

    def _about(self, t: LedgerTransaction, openings: Sequence[Opening]) -> list[Incident]:
        """What these openings have to know, the oldest first: what is closed of the very same signals, and what is open. Not all that ever was: a
        tick is to cost the same however long the history is."""
        rules, fingerprints = [o.rule for o in openings], [o.signal.fingerprint for o in openings]
        began = [moment_text(o.signal.starts_at) for o in openings]
        closed = self._select(
            t, "state = 'closed' and (rule, fingerprint, signal ->> 'starts_at')"
            " in (select * from unnest(%s::text[], %s::text[], %s::text[]))", rules, fingerprints, began,
            order="opened_at, id", limit=1_000_000,
        )  # fmt: skip
        still = self._select(
            t, "state <> 'closed' and (rule, fingerprint) in (select * from unnest(%s::text[], %s::text[]))", rules,
            fingerprints, order="opened_at, id", limit=1_000_000,
        )  # fmt: skip
        return closed + still

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

    def note_undone(self, incident: Incident, place: int) -> Incident:
        """That the attempt at this place of `standing` was undone. Raises ConflictError where the incident moved on."""
        whole = [*incident.earlier, incident.outcomes]
        whole[place] = tuple({**entry, "undone": True} for entry in whole[place])
        with self.transaction() as t:
            done = t.connection.execute(
                "update ops_remediation.incidents set outcomes = %s, earlier = %s, updated_at = %s where id = %s and version = %s",
                [Jsonb(whole[-1]), Jsonb(whole[:-1]), self.clock.now(), incident.id, incident.version],
            )
            if done.rowcount != 1:
                raise _moved_on(incident)
        return replace(incident, outcomes=whole[-1], earlier=tuple(whole[:-1]))

    def still_mine(self, incident: Incident) -> Pause | None:
        """Right before a change: raises ConflictError where the incident moved on; the pause that holds, if one does."""
        with self.transaction() as t:
            row = t.connection.execute(
                "select version from ops_remediation.incidents where id = %s", [incident.id]
            ).fetchone()
            if row is None or row[0] != incident.version:
                raise _moved_on(incident)
            return pause_of(t)

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
            held = self.ledger.claimed("'incident/' || i.id")
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


def _event(opening: Opening) -> tuple[str, str, str]:
    labels = opening.signal.labels
    # Who made the signal by hand gave it no id: then its place is all that tells it apart.
    return opening.rule, labels.get("source", ""), labels.get("id") or opening.signal.fingerprint


def _moved_on(incident: Incident) -> NotOurTurnError:
    return NotOurTurnError(
        f"the incident is not any more at version {incident.version}: somebody else went on with it", where=incident.id
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Signal):
        return value.as_json()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return dict(value) if isinstance(value, Mapping) else value


def _incident(row: Mapping[str, Any]) -> Incident:
    values: dict[str, Any] = {
        **row,
        "state": State(row["state"]),
        "ending": Ending(row["ending"]) if row["ending"] else None,
        "signal": Signal.from_json(row["signal"]),
        "rulings": tuple(row["rulings"]),
        "outcomes": tuple(row["outcomes"]),
        "earlier": tuple(map(tuple, row["earlier"])),
    }
    return Incident(**values)
