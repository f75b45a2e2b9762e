"""Limits that stop something and that a reload, or the next session, can raise.

Only what stands in `SETTINGS` and the two connection limits: settings that take memory or disk within bounds that the rule gives.
What needs a restart (max_connections, max_replication_slots, shared_buffers) is no remedy for a night, and refused by name.

A connection limit belongs to the cluster: whoever leads has it. ALTER SYSTEM writes a file of one server, which no standby gets: a
change of a setting names that server, and is undone there, whoever leads by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.errors import AccessDeniedError, NotThereError, OpsError, RefusedError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import PositiveDuration, Size
from ops_platform.remediation.playbook import Context, Done
from ops_platform.remediation.playbooks.postgres.common import (
    PostgresAction,
    PostgresPlaybook,
    me,
    need_roles,
    one,
    refused,
)

if TYPE_CHECKING:
    import psycopg

    from ops_platform.clients.postgres import Member

# Of the whole server, by ALTER SYSTEM and a reload. Each counts bytes, in the unit that pg_settings names; -1 or 0 is no limit for some.
SETTINGS: Mapping[str, str] = {
    "max_slot_wal_keep_size": "-1",
    "max_wal_size": "",
    "wal_keep_size": "",
    "temp_file_limit": "-1",
    "work_mem": "",
    "maintenance_work_mem": "",
}
_UNITS = {"B": 1, "kB": 1 << 10, "8kB": 8 << 10, "MB": 1 << 20}
SERVER = "server"  # in a change's detail: host:port
_SETTLE = 15.0  # seconds until a reload has reached the server's processes


class RaiseLimitParameters(Strict):
    """Of `postgres.raise_limit`."""

    limit: str = Field(
        description="role_connections, database_connections, or one of the settings max_slot_wal_keep_size, max_wal_size, "
        "wal_keep_size, temp_file_limit, work_mem, maintenance_work_mem."
    )
    of: str | None = Field(default=None, description="The role or the database whose connections are limited.")
    to: Annotated[Size, Field(ge=1)] = Field(
        description="The new value: a number of connections, or a size such as 64GiB. Never lower than it is: then nothing is done."
    )
    at_most_times: Annotated[float, Field(gt=1, le=100)] = Field(
        default=4, description="Refused where that is more than so many times the present value."
    )
    undo_after: PositiveDuration | None = Field(
        default=None, description="Set back after this time although it helped; never where not given."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.limit in ("role_connections", "database_connections")) != (self.of is not None):
            raise ValueError("`of` names the role or the database, and belongs to connection limits alone")
        return self


@dataclass(frozen=True)
class Standing:
    """A limit as it is. `value` in connections or bytes; None: there is none. `own`: as it has to be set back to; None: reset it."""

    value: int | None
    own: str | None
    unit: int = 1

    def as_json(self) -> dict[str, Any]:
        return {"value": self.value, "set": self.own}


class _LimitAction(PostgresAction[RaiseLimitParameters]):
    """Reads and sets one limit; what of it differs stands in the functions below."""

    def _standing(self, connection: psycopg.Connection[Any]) -> Standing:
        wanted = self.parameters
        if wanted.limit == "role_connections":
            return _connections(connection, "select rolconnlimit from pg_roles where rolname = %s", "role", wanted.of)
        if wanted.limit == "database_connections":
            return _connections(
                connection, "select datconnlimit from pg_database where datname = %s", "database", wanted.of
            )
        return self._setting(connection)

    def _setting(self, connection: psycopg.Connection[Any]) -> Standing:
        name = self.parameters.limit
        need_roles(connection, {"pg_read_all_settings": "to see where a setting is made"})
        row = connection.execute(
            "select context, setting, unit, source, coalesce(sourcefile, ''), pending_restart from pg_settings where name = %s",
            [name],
        ).fetchone()
        if row is None:
            raise NotThereError(f"this server has no setting {name}", where=self.target_id)
        context, setting, unit, source, file, pending = row
        if context == "postmaster" or pending:
            raise refused(
                f"{name} takes effect at a restart of the server alone",
                self.target,
                "plan a restart; no playbook restarts a database",
            )
        if name not in SETTINGS:
            raise refused(
                f"{name} is none of the settings that this playbook raises",
                self.target,
                f"it raises {', '.join(SETTINGS)}",
            )
        if source not in ("configuration file", "default"):
            raise refused(
                f"{name} comes from {source}, which ALTER SYSTEM does not change",
                self.target,
                "change it where it is set",
            )
        value = None if setting == SETTINGS[name] else int(setting) * _UNITS[unit]
        return Standing(value, setting if file.endswith("postgresql.auto.conf") else None, _UNITS[unit])

    def _set(self, connection: psycopg.Connection[Any], own: str | None) -> None:
        """`own`: as PostgreSQL reads it; None sets a setting back to what the configuration files say."""
        wanted = self.parameters
        if wanted.limit in SETTINGS:
            # The name is one of ours, the value a number: neither can be a parameter of ALTER SYSTEM.
            name, value = wanted.limit, None if own is None else int(own)
            connection.execute(
                (f"alter system reset {name}" if value is None else f"alter system set {name} = {value}").encode()
            )
            one(connection, "select pg_reload_conf()")
            return
        kind = "role" if wanted.limit == "role_connections" else "database"
        quoted = one(connection, "select quote_ident(%s)", [wanted.of])
        connection.execute(f"alter {kind} {quoted} connection limit {int(own or '-1')}".encode())

    # The server of a change

    def _primary(self) -> Member:
        return self.context.access.member(self.target)

    def _at(self, change: Change) -> Member | None:
        """Where it was made; None: wherever the cluster is led. Raises NotThereError for a server that the inventory no longer names."""
        from ops_platform.clients.postgres import Member

        at = change.detail.get(SERVER)
        if at is None:
            return None
        for place in self.target.connection.hosts:
            member = Member(*self.context.access.address(place.host, place.port))
            if member.address == at:
                return member
        raise NotThereError(
            f"{change.object} was changed on {at}, which is not among the hosts any more", where=self.target_id,
            remedy="look there with SHOW and ALTER SYSTEM RESET, if that server still lives",
        )  # fmt: skip

    def _now(self, change: Change) -> Standing:
        with self.session(member=self._at(change)) as connection:
            return self._standing(connection)

    def _set_or_say_why(self, change: Change) -> None:
        from psycopg import errors

        with self.session(member=self._at(change)) as connection:
            ours = me(connection)
            try:
                self._set(connection, change.after["set"])
            except errors.InsufficientPrivilege as error:
                raise AccessDeniedError(
                    error.diag.message_primary or "permission denied", where=self.target_id, remedy=self._grant(ours)
                ) from None

    def _grant(self, ours: str) -> str:
        match self.parameters.limit:
            case "role_connections":
                return f"as a superuser: ALTER ROLE {ours} CREATEROLE; from PostgreSQL 16 on also GRANT the role TO {ours} WITH ADMIN OPTION"
            case "database_connections":
                return f"as a superuser: GRANT the role that owns the database TO {ours}"
            case name:
                return (
                    f"as a superuser, PostgreSQL 15 and later: GRANT ALTER SYSTEM ON PARAMETER {name} TO {ours};"
                    f" GRANT EXECUTE ON FUNCTION pg_reload_conf() TO {ours}"
                )

    def _settled(self, change: Change) -> Standing:
        """A reload reaches the server's processes a moment later: a new session each time, until it is there or too late."""
        clock = self.context.clock
        deadline = clock.monotonic() + _SETTLE
        while True:
            now = self._now(change)
            if now.value == change.after["value"] or clock.monotonic() >= deadline:
                return now
            clock.sleep(0.1)

    def _object(self) -> str:
        of = self.parameters.of
        return self.parameters.limit if of is None else f"{self.parameters.limit} of {of}"


class RaiseAction(_LimitAction):
    name = "postgres.raise_limit"

    def plan(self) -> Plan:
        primary = self._primary()
        with self.session(member=primary) as connection:
            now = self._standing(connection)
            facts = {"now": now.value, "to": self.parameters.to} | self._beside(connection)
        to = -(-self.parameters.to // now.unit) * now.unit
        if now.value is None or now.value >= to:
            return self.planned((), facts=facts)
        if to > max(now.value, now.unit) * self.parameters.at_most_times:
            raise refused(
                f"{self._object()} is {now.value}: {to} is more than {self.parameters.at_most_times:g} times as much",
                self.target, "raise it by hand, or allow more with at_most_times",
            )  # fmt: skip
        after = Standing(to, str(to // now.unit), now.unit)
        detail = {SERVER: primary.address} if self.parameters.limit in SETTINGS else {}
        change = Change("limit", self._object(), now.as_json(), after.as_json(), reversible=True, detail=detail)
        return self.planned([change], {"limit": 1}, facts)

    def check(self, change: Change) -> Applied | None:
        at = change.detail.get(SERVER)
        if at is not None and (leads := self._primary().address) != at:
            return Applied(Outcome.CONTENDED, f"{leads} leads by now")
        now = self._now(change)
        if now.value == change.after["value"]:
            return Applied(Outcome.ALREADY_DONE, "it is raised already")
        if now.as_json() != change.before:
            return Applied(Outcome.CONTENDED, f"somebody else set it to {now.value}")
        return None

    def apply(self, change: Change) -> Applied:
        self._set_or_say_why(change)
        now = self._settled(change)
        if now.value != change.after["value"]:
            raise OpsError(
                f"it was set, and the server still says {now.value}", where=f"{self.target_id}, {change.object}"
            )
        return Applied(Outcome.APPLIED, f"raised from {change.before['value']} to {now.value}")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        return _verified(self, plan.changes, outcomes)

    def _beside(self, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        """What a person wants to know beside it; of connections also whether the server has so many."""
        wanted = self.parameters
        if wanted.limit in SETTINGS:
            return {}
        room = one(
            connection,
            "select current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int",
        )
        if wanted.to > room:
            raise refused(
                f"the server takes {room} connections, and {wanted.to} were asked for",
                self.target, "max_connections needs a restart; a pooler helps without one",
            )  # fmt: skip
        column = "usename" if wanted.limit == "role_connections" else "datname"
        used = one(connection, f"select count(*) from pg_stat_activity where {column} = %s", [wanted.of])
        return {"used": used, "room_of_the_server": room}


class SetBackAction(_LimitAction):
    """The undo: what is still as we set it is set back, a setting on the server that has it."""

    name = "postgres.raise_limit.undo"

    def __init__(self, context: Context[RaiseLimitParameters], done: Sequence[Change]) -> None:
        super().__init__(context)
        self._done = done

    def plan(self) -> Plan:
        back = [
            Change("limit", change.object, change.after, change.before, reversible=True, detail=change.detail)
            for change in self._done
        ]
        return self.planned(back, {"limit": 1})

    def check(self, change: Change) -> Applied | None:
        now = self._now(change)
        if now.value == change.after["value"]:
            return Applied(Outcome.ALREADY_DONE, "it is as it was before")
        if now.value != change.before["value"]:
            return Applied(Outcome.CONTENDED, f"somebody else set it to {now.value}: it is left so")
        return None

    def apply(self, change: Change) -> Applied:
        self._set_or_say_why(change)
        now = self._settled(change)
        return Applied(Outcome.APPLIED, f"set back to {now.value}")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        return _verified(self, plan.changes, outcomes)


def _verified(action: _LimitAction, changes: Sequence[Change], outcomes: Mapping[str, Applied]) -> Verification:
    """By a session that begins after the change, as every client's next one does."""
    checks: list[Check] = []
    for change in changes:
        if (applied := outcomes.get(change.object)) is None or applied.outcome not in (
            Outcome.APPLIED,
            Outcome.ALREADY_DONE,
        ):
            continue
        now = action._settled(change)  # pyright: ignore[reportPrivateUsage]
        checks.append(Check(change.object, now.value == change.after["value"], f"a new session finds {now.value}"))
    return Verification(tuple(checks) or (Check("limit", True, "nothing was changed"),))


def _connections(connection: psycopg.Connection[Any], query: str, kind: str, name: str | None) -> Standing:
    row = connection.execute(query.encode(), [name]).fetchone()
    if row is None:
        raise NotThereError(f"there is no {kind} {name!r}", remedy="correct `of` in the rule")
    if row[0] == 0:
        raise RefusedError(f"the {kind} {name} is closed by a limit of 0: somebody did that on purpose")
    return Standing(None if row[0] < 0 else row[0], str(row[0]))


class RaiseLimit(PostgresPlaybook[RaiseLimitParameters]):
    name = "postgres.raise_limit"
    title = "Raise a limit that stops something"
    what = (
        "Raises one limit to a value that the rule gives: the connections of a role or database, or one of a short list of settings "
        "that take effect by a reload (ALTER SYSTEM). A setting that needs a restart is refused, and so is a raise beyond bounds."
    )
    why_safe = "The new value stands in the rule and is bounded; nothing is restarted, nobody is disconnected, and the old value is kept to be set back."
    blast_radius = "More connections, memory or disk may be used than before, up to the new value: of work_mem by each sort of each session."
    rights = (
        "CONNECT to the database of the inventory",
        "role_connections: CREATEROLE; from PostgreSQL 16 on also ADMIN OPTION on the role",
        "database_connections: membership in the role that owns the database",
        "settings: pg_read_all_settings, ALTER SYSTEM on the parameter (PostgreSQL 15 and later; before: superuser), EXECUTE on pg_reload_conf()",
    )
    undo_text = (
        "The old value is set back, a setting on the very server on which it was raised, unless somebody else changed it since; with "
        "`undo_after` after that time by itself."
    )
    Parameters = RaiseLimitParameters

    def action(self, context: Context[RaiseLimitParameters]) -> Action:
        return RaiseAction(context)

    def undo(self, context: Context[RaiseLimitParameters], done: Sequence[Done]) -> Action | None:
        return SetBackAction(context, [one.change for one in done])

    def undo_after(self, context: Context[RaiseLimitParameters]) -> timedelta | None:
        return context.parameters.undo_after
