"""An incident engine for tests: a real PostgreSQL for incidents and ledger, a lamp in it as the system that is acted on, a clock to turn.

The lamp is a row of a table: the playbook `toy.switch_off` turns it off, and its undo on again. Moments of a kill are named, so that a
test can end a run wherever something is written or changed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import psycopg
import pytest
import yaml
from pydantic import Field

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.clients.access import Access
from ops_platform.clients.prometheus import Measured
from ops_platform.errors import OpsError, UnreachableError
from ops_platform.inventory import LoadedInventory, load
from ops_platform.inventory.base import Strict
from ops_platform.inventory.model import Inventory
from ops_platform.inventory.remediation import MetricCheck
from ops_platform.ledger import Ledger
from ops_platform.remediation import playbook as playbook_module
from ops_platform.remediation.intake import take
from ops_platform.remediation.model import Incident, Opening, Peers, Signal
from ops_platform.remediation.playbook import Context, Done, Playbook
from ops_platform.remediation.rules import resolve, rule_named, subject_id
from ops_platform.remediation.sources import alertmanagers
from ops_platform.remediation.store import Store
from ops_platform.remediation.worker import Worker, proposer
from tests.rig import PASSWORD, Cluster, eventually, scratch

BEGIN = datetime(2026, 3, 1, 3, 0, tzinfo=UTC)


class KilledError(BaseException):
    """The end of a run in the middle, which nothing catches."""


class TurnedClock:
    def __init__(self, at: datetime = BEGIN) -> None:
        self.at = at
        self.slept: Callable[[], None] = lambda: None

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return (self.at - BEGIN).total_seconds()

    def sleep(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)
        self.slept()


class LampParameters(Strict):
    lamps: list[str] = Field(default=["lamp"])
    undo_after_seconds: int | None = None


@dataclass
class Lamps:
    """The system that is acted on, and everything that may go wrong with it."""

    connection: psycopg.Connection[Any]
    kill_at: str | None = None  # before, applied: a run ends there
    fails: str | None = None  # why apply fails
    undo_fails: str | None = None
    away: bool = False
    peers: Peers | None = None
    switched: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])  # incident, lamp, to

    def state(self, lamp: str) -> str:
        if self.away:
            raise UnreachableError("the lamp does not answer", where=lamp)
        row = self.connection.execute("select state from lamps where name = %s", [lamp]).fetchone()
        return row[0] if row else "gone"

    def put(self, lamp: str, state: str) -> None:
        self.connection.execute(
            "insert into lamps values (%s, %s) on conflict (name) do update set state = excluded.state", [lamp, state]
        )


class _Switch:
    """The action: every lamp of the parameters to `to`."""

    def __init__(self, lamps: Lamps, context: Context[LampParameters], names: Sequence[str], to: str) -> None:
        self.lamps, self.context, self.names, self.to = lamps, context, names, to
        self.name, self.target_id = f"toy.switch_{to}", context.subject.id

    def plan(self) -> Plan:
        states = {name: self.lamps.state(name) for name in self.names}
        changes = tuple(
            Change("lamp", name, state, self.to, reversible=True)
            for name, state in states.items()
            if state not in (self.to, "gone")
        )
        return Plan(self.name, self.target_id, changes, self.context.clock.now(), population={"lamp": 100})

    def check(self, change: Change) -> Applied | None:
        state = self.lamps.state(change.object)
        return None if state == change.before else Applied(Outcome.CONTENDED, f"it is {state} by now")

    def apply(self, change: Change) -> Applied:
        if self.lamps.kill_at == "before":
            raise KilledError
        if self.to == "off" and self.lamps.fails:
            raise OpsError(self.lamps.fails)
        if self.to == "on" and self.lamps.undo_fails:
            raise OpsError(self.lamps.undo_fails)
        self.lamps.put(change.object, self.to)
        self.lamps.switched.append((self.context.incident_id, change.object, self.to))
        if self.lamps.kill_at == "applied":
            raise KilledError
        return Applied(Outcome.APPLIED, f"switched {self.to}")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        return Verification(
            tuple(
                Check(change.object, self.lamps.state(change.object) == self.to, self.lamps.state(change.object))
                for change in plan.changes
                if outcomes[change.object].outcome is Outcome.APPLIED
            )
            or (Check("nothing", True, "nothing was switched"),)
        )


class SwitchOff(Playbook[LampParameters]):
    name = "toy.switch_off"
    title = "Switch off a lamp"
    kinds = frozenset({"vault"})
    what = "Switches off."
    why_safe = "It can be switched on again."
    blast_radius = "Darkness."
    rights = ("a hand",)
    undo_text = "Switches on again what was switched off."
    Parameters = LampParameters
    lamps: ClassVar[Lamps]

    def action(self, context: Context[LampParameters]) -> Action:
        return _Switch(self.lamps, context, context.parameters.lamps, "off")

    def undo(self, context: Context[LampParameters], done: Sequence[Done]) -> Action | None:
        return _Switch(self.lamps, context, [one.change.object for one in done], "on")

    def undo_after(self, context: Context[LampParameters]) -> timedelta | None:
        seconds = context.parameters.undo_after_seconds
        return timedelta(seconds=seconds) if seconds is not None else None

    def peers(self, context: Context[LampParameters]) -> Peers | None:
        return self.lamps.peers


class SwitchOffForGood(SwitchOff):
    name = "toy.switch_off_for_good"
    undo_text = None

    def undo(self, context: Context[LampParameters], done: Sequence[Done]) -> Action | None:
        return None


@dataclass
class FakeEyes:
    """What the sources say, as the test decides."""

    signals: dict[str, Signal | None] = field(default_factory=dict[str, Signal | None])
    away: str | None = None
    metric: tuple[Measured, str] = (Measured.GOOD, "good")
    looked: int = 0

    def look(self, incident: Incident) -> Signal | None:
        self.looked += 1
        if self.away is not None:
            raise UnreachableError(self.away, where="http://alertmanager.example")
        return self.signals.get(incident.fingerprint)

    def measure(self, check: MetricCheck, incident: Incident) -> tuple[Measured, str]:
        return self.metric


def inventory(
    rules: Sequence[Mapping[str, Any]], *, platform: Mapping[str, Any] | None = None, **more: Any
) -> Inventory:
    """`platform` and `more` are merged over what the tests have of the platform and of the remediation."""
    return Inventory.model_validate(inventory_body(rules, platform=platform, **more))


def inventory_body(
    rules: Sequence[Mapping[str, Any]], *, platform: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """As it would stand in a file."""
    return {
        "version": 1,
        "platform": {"name": "tests", **(platform or {})},
        "owners": {"team": {"name": "Team"}},
        "environments": {"test": {}},
        "vaults": {"v": {"url": "http://127.0.0.1:1", "auth": {"method": "token", "token": "env://X"}}},
        "systems": [
            {"id": name, "kind": "vault", "vault": "v", "environment": "test", "owner": "team", **extra}
            for name, extra in (
                ("hall", {}),
                ("attic", {"classification": "restricted"}),
                ("cellar", {"failure_domain": "hall"}),
            )
        ],
        "remediation": {"rules": [dict(rule) for rule in rules], **more},
    }


class Desk:
    """platform.yaml over a database of its own, as the sensors, the jobs and the commands read it; the lamps are beside it."""

    def __init__(
        self, cluster: Cluster, stack: contextlib.ExitStack, rules: Sequence[Mapping[str, Any]], **more: Any
    ) -> None:
        database = fresh_database(cluster, stack)
        cluster.sql(f'alter database "{database}" owner to ops_backup')
        self.home = scratch("ops-desk-")
        stack.callback(shutil.rmtree, self.home, ignore_errors=True)
        (self.home / "password").write_text(PASSWORD)
        (self.home / "password").chmod(0o600)
        own = {
            "host": "127.0.0.1", "port": cluster.port, "dbname": database, "user": "ops_backup",
            "password": f"file://{self.home}/password", "tls": {"mode": "disable"},
        }  # fmt: skip
        systems = more.pop("systems", [])
        body = inventory_body(rules, platform={"database": own, **more.pop("platform", {})}, **more)
        body["systems"] += [{"environment": "test", "owner": "team", **system} for system in systems]
        self.file = self.home / "platform.yaml"
        self.file.write_text(yaml.safe_dump(body, sort_keys=False))
        self.access = Access(load(self.file))
        stack.callback(self.access.close)
        self.store = Store(stack.enter_context(Ledger(self.access.platform_db)))
        self.eyes = FakeEyes()
        self.lamps = Lamps(stack.enter_context(cluster.server.connect(fresh_database(cluster, stack))))
        self.lamps.connection.autocommit = True
        self.lamps.connection.execute("create table lamps (name text primary key, state text not null)")
        self.lamps.put("lamp", "on")
        SwitchOff.lamps = self.lamps

    @property
    def env(self) -> dict[str, str]:
        """For a command that works on this inventory."""
        return {**os.environ, "OPS_INVENTORY": str(self.file), "OPS_ACTOR": "ann"}

    def fire(self, *names: str) -> list[Incident]:
        """Signals that fire now, and their incidents."""
        signals = [a_signal(name, at=self.store.clock.now()) for name in names]
        self.eyes.signals |= {signal.fingerprint: signal for signal in signals}
        return list(take(self.store, self.access.inventory, signals, complete=False).opened)

    def work(self, incident: Incident) -> Incident:
        return Worker(self.access, self.store, self.eyes, "run 1").work(incident.id)


def settled(desk: Desk) -> None:
    """Every Alertmanager has been up for the second after which the tests take its word."""
    systems = alertmanagers(desk.access)

    def up() -> list[timedelta]:
        polls = [desk.access.alertmanager(system).poll() for system in systems]
        return [member.up_for or timedelta(0) for polled in polls for member in polled.members]

    eventually(lambda: min(up()) >= timedelta(seconds=1), why=up)


def a_rule(**more: Any) -> dict[str, Any]:
    return {
        "id": "dark",
        "alert": ["alertname=LampOn"],
        "target": "hall",
        "playbook": "toy.switch_off",
        "mode": "enforce",
        "cooldown": "10m",
        "verify": {"within": "2m", "every": "10s"},
        **more,
    }


def a_signal(fingerprint: str = "f1", *, at: datetime = BEGIN, **more: Any) -> Signal:
    more.setdefault("labels", {"alertname": "LampOn", "lamp": fingerprint})
    return Signal("alertmanager", fingerprint, "LampOn", starts_at=at, seen_at=at, **more)


class Engine:
    """Incidents over a database of their own."""

    def __init__(self, cluster: Cluster, database: str, rules: Sequence[Mapping[str, Any]], **more: Any) -> None:
        self.clock = TurnedClock()
        self._connect = lambda: cluster.server.connect(database)
        self.ledger = Ledger(self._connect, clock=self.clock)
        self.store = _SteadyStore(self.ledger, clock=self.clock)
        self.lamps = Lamps(self._connect())
        self.lamps.connection.execute("create table if not exists lamps (name text primary key, state text not null)")
        self.lamps.put("lamp", "on")
        SwitchOff.lamps = self.lamps
        self.eyes = FakeEyes()
        self.change(rules, **more)

    def change(self, rules: Sequence[Mapping[str, Any]], **more: Any) -> None:
        self.access = Access(LoadedInventory(inventory(rules, **more), Path("/platform.yaml")))

    @property
    def inventory(self) -> Inventory:
        return self.access.inventory

    def worker(self, actor: str = "run 1") -> Worker:
        return Worker(self.access, self.store, self.eyes, actor, self.clock)

    def fire(self, signal: Signal | None = None, rule: str = "dark") -> Incident:
        """The signal fires, and its incident is open."""
        fired = signal or a_signal(at=self.clock.now())
        self.eyes.signals[fired.fingerprint] = fired
        found = rule_named(self.inventory, rule)
        decision = resolve(self.inventory, found, fired)
        incident = self.store.open(Opening(rule, subject_id(decision), found.playbook, fired, proposer(found)))
        assert incident is not None
        return incident

    def end(self, fingerprint: str = "f1") -> None:
        self.eyes.signals[fingerprint] = None

    def work(self, incident: Incident | str, version: int | None = None) -> Incident:
        return self.worker().work(incident if isinstance(incident, str) else incident.id, version)

    def kinds(self) -> list[str]:
        return [entry.kind for entry in self.ledger.entries()]

    def close(self) -> None:
        self.lamps.connection.close()
        self.ledger.close()


class _SteadyStore(Store):
    """The turned clock is meant: it is not compared with the database's. The guard for that has a test of its own."""

    def clock_offset(self) -> timedelta:
        return timedelta(0)


@pytest.fixture
def new_engine(shared_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    """Makes engines: `new_engine([a_rule(…)], budget={…})`."""
    toys: dict[str, Playbook[Any]] = {"toy.switch_off": SwitchOff(), "toy.switch_off_for_good": SwitchOffForGood()}
    monkeypatch.setattr(playbook_module, "playbooks", lambda: toys)
    with contextlib.ExitStack() as made:

        def make(rules: Sequence[Mapping[str, Any]] | None = None, **more: Any) -> Engine:
            engine = Engine(shared_cluster, fresh_database(shared_cluster, made), rules or [a_rule()], **more)
            made.callback(engine.close)
            return engine

        yield make


@pytest.fixture
def new_desk(shared_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Desk]]:
    """Makes desks: `new_desk([a_rule(…)], alertmanagers=["am"], systems=[…])`."""
    from ops_platform.remediation.playbook import playbooks

    known: dict[str, Playbook[Any]] = {**playbooks(), "toy.switch_off": SwitchOff()}
    monkeypatch.setattr(playbook_module, "playbooks", lambda: known)
    with contextlib.ExitStack() as made:
        yield lambda rules=None, **more: Desk(shared_cluster, made, rules or [a_rule()], **more)


def fresh_database(cluster: Cluster, stack: contextlib.ExitStack) -> str:
    import uuid

    name = f"ops_{uuid.uuid4().hex[:12]}"
    with cluster.server.connect("postgres") as connection:
        connection.autocommit = True
        connection.execute(f'create database "{name}"')

    def drop() -> None:
        with cluster.server.connect("postgres") as connection:
            connection.autocommit = True
            connection.execute(f'drop database "{name}" with (force)')

    stack.callback(drop)
    return name
