"""Drills for tests: an inventory over a platform's database of its own, and hands to begin, hold and look."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from ops_platform.clients.access import Access
from ops_platform.clients.processes import Process, spawn
from ops_platform.drills.begin import Beginner, Begun, planned
from ops_platform.drills.engine import Engine
from ops_platform.drills.model import Checked, Done, Drill, DrillCard, Ending
from ops_platform.drills.registry import Context, does
from ops_platform.drills.scorecard import card_of
from ops_platform.drills.steps import injection
from ops_platform.drills.steps.basics import measure, processes_with
from ops_platform.drills.steps.injection import Break, at, break_server, cut_server
from ops_platform.drills.store import Store
from ops_platform.errors import CouldNotVerifyError, OpsError
from ops_platform.inventory import load
from ops_platform.inventory.base import Strict
from ops_platform.ledger import Ledger
from tests.remediation_rig import fresh_database, inventory_body
from tests.rig import PASSWORD, Cluster, Platform, eventually, scratch
from tests.servers import Daemon


class Held:
    """A platform with drills on one target. The ledger's database stands in the same cluster."""

    def __init__(self, cluster: Cluster, platform: Platform) -> None:
        self.cluster, self.platform = cluster, platform
        self.ledger = Ledger(platform.access.platform_db)
        self.store = Store(self.ledger)
        self.engine = Engine(platform.access, self.store, "ann")

    def begin(self, plan: str, subject: str | None = None, **parameters: Any) -> Begun:
        request = planned(self.platform.access, plan, subject, parameters, operator="ann", trigger="a test")
        return Beginner(self.platform.access, self.store).begin(request)

    def drill(self, plan: str, subject: str | None = None, **parameters: Any) -> Drill:
        """Begun and held to its end."""
        begun = self.begin(plan, subject, **parameters)
        assert begun.drill is not None, [ruling.as_json() for ruling in begun.result.rulings if not ruling.allows]
        return self.engine.run(begun.drill.id)

    def killed_when(self, does: str, moment: str, plan: str) -> bool:
        """The same in a child that kills itself at a moment of the step that does this, see `Bench.killed_when`."""

        def child() -> None:
            held = self.elsewhere()
            _watch_steps(held.store, does, moment)
            held.drill(plan)

        return killed(child)

    def elsewhere(self) -> Held:
        """As a process of its own has it, with connections of its own."""
        self.platform.access = Access(load(self.platform.file))
        return Held(self.cluster, self.platform)

    def nothing_left(self) -> None:
        """The next start ends what a killed worker left, and takes it away."""
        eventually(
            lambda: self.engine.sweep(lost_after=timedelta(0)) is not None and not self.store.list(ended=False),
            why="its worker holds it still",
        )
        assert [r for drill in self.store.list() for r in self.store.resources(drill.id) if r.gone_at is None] == []
        home = self.platform.home
        places = (str(home / "drills"), str(home / "ops-verify-"))
        assert [*home.glob("drills/*"), *home.glob("ops-verify-*")] == []
        eventually(lambda: not [found for p in places for found in processes_naming(p)], why="a process is left")


def ledger_database(cluster: Cluster, home: Any, name: str = "ops") -> dict[str, Any]:
    """A database for the platform in the cluster, as `platform.database` names it."""
    cluster.sql(f"create database {name} owner ops_backup")
    return {
        "host": "127.0.0.1", "port": cluster.port, "dbname": name, "user": "ops_backup",
        "password": f"file://{home}/password", "tls": {"mode": "disable"},
    }  # fmt: skip


def declare_drills(platform: Platform, plan: Sequence[Mapping[str, Any]], **drills: Any) -> None:
    """With drills in its inventory, none of which anything refuses."""
    platform.body["environments"]["test"] = {"production": False}
    platform.body["drills"] = {
        "plan": [{"mode": "enforce", **one} for one in plan],
        "business_hours": [],
        "workspace": "{inventory}/drills",
        **drills,
    }
    platform.reload()


def stack_of(platform: Platform, cluster: Cluster, subject: str, restored: type[Any]) -> DrillCard:
    """The full-stack drill of one store: killed while its sandbox serves, and after the next start has taken that away held to its end."""
    declare_drills(platform, [{"id": "stack", "runbook": "full-stack-drill", "targets": [subject]}])

    def until_it_serves() -> None:
        restored.checks = die
        platform.access = Access(load(platform.file))  # a process of its own has connections of its own
        Held(cluster, platform).drill("stack")

    assert killed(until_it_serves)
    held = Held(cluster, platform)
    try:
        (home,) = platform.home.glob(f"ops-verify-{subject}-*")
        eventually(lambda: held.engine.sweep(lost_after=timedelta(0)), why="its worker holds it still")
        assert not home.exists()
        eventually(lambda: not processes_naming(str(home)), why=lambda: processes_naming(str(home)))
        (lost,) = held.store.list()
        assert lost.ending is Ending.LOST
        assert [r.gone_at is not None for r in held.store.resources(lost.id)] == [True]
        return passed(held.drill("stack"))
    finally:
        held.ledger.close()


def processes_naming(word: str) -> list[str]:
    """Command lines that name it."""
    found: list[str] = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word in (line := file.read_bytes().decode(errors="replace")):
                found.append(line)
    return found


def held_on(
    cluster: Cluster, new_platform: Callable[..., Platform], plan: Sequence[Mapping[str, Any]], **drills: Any
) -> Held:
    platform = new_platform({"app-db": [cluster]})
    platform.body["platform"]["database"] = ledger_database(cluster, platform.home)
    declare_drills(platform, plan, **drills)
    return Held(cluster, platform)


# What a drill of real servers is judged by


@contextlib.contextmanager
def supervised(daemons: Sequence[Daemon], replaced: Callable[[], bool]) -> Iterator[None]:
    """What systemd is in production, with a pause that lets others take over first."""
    over = threading.Event()

    def supervise() -> None:
        while not over.wait(0.1):
            for daemon in daemons:
                if not daemon.alive and replaced():
                    daemon.start()

    thread = threading.Thread(target=supervise, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(60)


def passed(drill: Drill) -> DrillCard:
    card = card_of(drill)
    assert card is not None
    assert card.verdict == "PASS", (card.reason, [(s.id, s.state, s.said) for s in card.steps])
    return card


def measured(card: DrillCard) -> dict[str, float]:
    return {one.name: one.value for one in card.measured if one.value is not None}


def preflight(bench: Bench, plan: str, **parameters: Any) -> str:
    """Why it is refused by what it looks at before it begins; empty where it is not."""
    engine = bench.engine
    request = planned(engine.access, plan, None, parameters, operator=engine.actor, trigger="a test")
    result = Beginner(engine.access, engine.store).plan(request)
    return next((r.reason for r in result.rulings if r.guard == "preflight" and not r.allows), "")


def preflight_elsewhere(bench: Bench, plan: str, port: int, **parameters: Any) -> str:
    """The same while whoever serves this port is of another machine."""
    real = injection.listens

    def listens(host: str, at: int) -> Process:
        if at == port:
            raise CouldNotVerifyError(f"{host} is another machine's address", where=f"{host}:{at}")
        return real(host, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(injection, "listens", listens)
        return preflight(bench, plan, **parameters)


# Toys: steps that make, start, freeze and break things of this machine, so that it can be seen whether they are gone


class Folder(Strict):
    """Of `toy.folder`."""

    name: str = "folder"


@does("toy.folder", "act", given=Folder, changes=lambda given: f"the folder {given.name}")
def folder(context: Context, given: Folder) -> Done:
    """A folder with something in it."""
    path = context.workspace / given.name
    moment()
    context.register("directory", str(context.workspace), path=str(context.workspace))
    context.register("directory", str(path), path=str(path))
    moment()
    path.mkdir(parents=True, exist_ok=True)
    moment()
    (path / "file").write_text("something")
    moment()
    return Done(f"made {given.name}", {"path": str(path)})


@does("toy.process", "act", "inject", given=Folder)
def process(context: Context, given: Folder) -> Done:
    """A process that would go on for ever."""
    word = f"{context.held.id}/{given.name}"
    context.register("process", word, word=word)
    moment()
    if not any(processes_with(word)):
        spawn([sys.executable, "-c", "import time\nwhile True: time.sleep(1)", word], Path("/dev/null"))
    moment()
    found = eventually(lambda: list(processes_with(word)), why="it does not run")
    return Done("it runs", {"word": word, "pid": found[0].pid})


class Freeze(Strict):
    """Of `toy.freeze`."""

    step: str


@does("toy.freeze", "inject", given=Freeze)
def freeze(context: Context, given: Freeze) -> Done:
    """Stop the process of another step."""
    found = list(processes_with(context.fact(given.step, "word")))
    context.register("frozen", context.fact(given.step, "word"), processes=[[p.pid, p.started] for p in found])
    moment()
    for one in found:
        os.kill(one.pid, signal.SIGSTOP)
    moment()
    return Done("it is frozen")


class Broken(Break):
    """Of `toy.break`."""

    address: str


@does("toy.break", "inject", given=Broken)
def break_it(context: Context, given: Broken) -> Done:
    """Kill or freeze whoever serves an address."""
    return break_server(context, given.how, lambda: at("it", given.address))


class Cut(Strict):
    """Of `toy.cut`."""

    address: str


@does("toy.cut", "inject", given=Cut)
def cut(context: Context, given: Cut) -> Done:
    """Unplug the network of whoever serves an address."""
    return cut_server(context, lambda: at("it", given.address))


# A process of ours that is frozen, until the drill is torn down.
FROZEN: list[dict[str, Any]] = [
    {"id": "server", "kind": "act", "does": "toy.process"},
    {"id": "cold", "kind": "inject", "does": "toy.freeze", "with": {"step": "server"}, "needs": ["server"]},
]


class Say(Strict):
    """Of the toys that say how it went."""

    holds: bool = True
    error: str = ""
    times: int = 0
    seconds: float = 0.0
    once: bool = False  # it takes so long when it is tried first


TRIED: Counter[str] = Counter()


@does("toy.say", "act", "check", "wait_until", "teardown", given=Say)
def say(context: Context, given: Say) -> Done:
    """Hold, or not; fail so many times; take so long."""
    TRIED[context.step.id] += 1
    if given.seconds and not (given.once and TRIED[context.step.id] > 1):
        until = time.monotonic() + given.seconds
        context.wait(lambda: time.monotonic() > until)
    if given.error and (not given.times or TRIED[context.step.id] <= given.times):
        raise OpsError(given.error)
    check = Checked(title="it is so", holds=given.holds, query="is it so?", result="yes" if given.holds else "no")
    return Done("said", checks=(check,) if context.step.kind == "check" else ())


@does("toy.number", "measure", given=Say)
def number(context: Context, given: Say) -> Done:
    """So many seconds."""
    return Done("measured", measured=(measure(context, given.seconds, "by a toy"),))


_left = 0  # moments until this process ends itself


def moment() -> None:
    """A point in time at which a test may kill whoever comes here."""
    global _left  # noqa: PLW0603
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def killed(work: Callable[[], object]) -> bool:
    """Do it in a child of this process. Whether it was killed; it must not fail otherwise."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - a child that ends otherwise would go on as a second test run
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return os.WIFSIGNALED(status)


def interrupted_when(holds: Callable[[], bool], number: signal.Signals = signal.SIGINT) -> threading.Thread:
    """Ctrl-C for this process, or another signal, once that holds."""

    def tell() -> None:
        eventually(holds, why="it does not come that far")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=tell)
    thread.start()
    return thread


def die(*_: object, **__: object) -> None:
    """Kill -9 of whoever comes here."""
    os.kill(os.getpid(), signal.SIGKILL)


class Bench:
    """Drills with toys on a system that is only a name. What a child process does here may be killed at any of its moments."""

    def __init__(self, cluster: Cluster, stack: ExitStack, **drills: Any) -> None:
        database = fresh_database(cluster, stack)
        cluster.sql(f'alter database "{database}" owner to ops_backup')
        self.home = scratch("ops-drills-")
        stack.callback(shutil.rmtree, self.home, ignore_errors=True)
        (self.home / "password").write_text(PASSWORD)
        (self.home / "password").chmod(0o600)
        (self.home / "runbooks").mkdir()
        own = {
            "host": "127.0.0.1", "port": cluster.port, "dbname": database, "user": "ops_backup",
            "password": f"file://{self.home}/password", "tls": {"mode": "disable"},
        }  # fmt: skip
        self.body = inventory_body([], platform={"database": own})
        self.body["environments"] = {"test": {"production": False}, "live": {}}
        self.body["systems"].append(
            {"id": "throne", "kind": "vault", "vault": "v", "environment": "live", "owner": "team"}
        )
        self.body["drills"] = {
            "plan": [], "business_hours": [], "workspace": "{inventory}/drills", "runbooks": "runbooks", **drills,
        }  # fmt: skip
        self._mine: Engine | None = None
        stack.callback(self.close)

    def runbook(self, name: str, steps: Sequence[Mapping[str, Any]], **more: Any) -> None:
        """A runbook and a drill of the same name, on `hall`."""
        teardown = {"id": "clean", "kind": "teardown"}
        body = {
            "version": 1, "id": name, "title": name, "scenario": "toys", "kinds": ["vault"],
            "steps": [*steps, *([] if any(s["kind"] == "teardown" for s in steps) else [teardown])], **more,
        }  # fmt: skip
        (self.home / "runbooks" / f"{name}.yaml").write_text(yaml.safe_dump(body, sort_keys=False))

    def plan(self, name: str, **more: Any) -> None:
        self.body["drills"]["plan"].append(
            {"id": name, "runbook": name, "targets": ["hall"], "mode": "enforce", **more}
        )

    def both(self, name: str, steps: Sequence[Mapping[str, Any]], **more: Any) -> None:
        self.runbook(name, steps)
        self.plan(name, **more)

    @property
    def engine(self) -> Engine:
        """Of this process, over the inventory as it is now."""
        self.close()
        self._mine = self.open()
        return self._mine

    def open(self, actor: str = "ann") -> Engine:
        """From the file, as every process does."""
        file = self.home / "platform.yaml"
        file.write_text(yaml.safe_dump(self.body, sort_keys=False))
        access = Access(load(file))
        return Engine(access, Store(Ledger(access.platform_db)), actor)

    def begin(self, engine: Engine, name: str, subject: str | None = None, **parameters: Any) -> Begun:
        request = planned(engine.access, name, subject, parameters, operator=engine.actor, trigger="a test")
        return Beginner(engine.access, engine.store).begin(request)

    def drill(self, name: str, subject: str | None = None, **parameters: Any) -> Drill:
        """Begun and held to its end. Fails with the refusals where it is refused."""
        engine = self.engine
        begun = self.begin(engine, name, subject, **parameters)
        assert begun.drill is not None, [r.as_json() for r in begun.result.rulings if not r.allows]
        return engine.run(begun.drill.id)

    def killed_at(self, number: int, work: Callable[[Engine], object]) -> bool:
        """Do it in a child that kills itself at its moment of this number. Whether it was killed, or had no such moment."""

        def child() -> None:
            global _left  # noqa: PLW0603
            _left = number
            engine = self.open("the killed one")
            _watch(engine.store)
            work(engine)

        return killed(child)

    def killed_when(self, does: str, moment: str, work: Callable[[Engine], object]) -> bool:
        """Do it in a child that kills itself at a moment of the step that does this: begun, registered KIND, removed KIND, ended."""

        def child() -> None:
            engine = self.open("the killed one")
            _watch_steps(engine.store, does, moment)
            work(engine)

        return killed(child)

    def sweep(self) -> None:
        """Until nothing of a dead drill is left to be ended."""
        engine = self.engine
        eventually(
            lambda: engine.sweep(lost_after=timedelta(0)) is not None and not engine.store.list(ended=False),
            why=lambda: engine.store.list(ended=False),
        )

    def remains(self) -> list[str]:
        """What is left on this machine of any drill of this bench."""
        engine = self.engine
        left = [str(path) for path in (self.home / "drills").glob("*")]
        for drill in engine.store.list():
            for resource in engine.store.resources(drill.id):
                left += [f"{resource.kind} {resource.name}"] if resource.gone_at is None else []
                if resource.kind == "process":
                    left += [f"process {one.pid}" for one in processes_with(resource.detail["word"])]
        return left

    def close(self) -> None:
        if self._mine is not None:
            self._mine.store.ledger.close()
            self._mine.access.close()
            self._mine = None


def _watch(store: Store) -> None:
    """Every transaction has two moments: before it begins, and once it is durable."""
    real = store.transaction

    @contextlib.contextmanager
    def watched() -> Iterator[Any]:
        moment()
        with real() as t:
            yield t
        moment()

    store.transaction = watched  # type: ignore[method-assign]


def _watch_steps(store: Store, does: str, moment: str) -> None:
    """Whoever works with this store dies once that stands in the database: `Bench.killed_when`."""

    def watched(name: str, moments: Callable[..., str]) -> None:
        real = getattr(store, name)

        def wrapped(*args: Any, **more: Any) -> Any:
            done = real(*args, **more)
            if moments(*args) == f"{does} {moment}":
                die()
            return done

        setattr(store, name, wrapped)

    def doing(held: Drill, step: str) -> str:
        return str(next(one["does"] for one in held.body["steps"] if one["id"] == step))

    watched("begin_step", lambda held, step, *_: f"{doing(held, step)} begun")
    watched("register", lambda held, step, kind, *_: f"{doing(held, step)} registered {kind}")
    watched("end_step", lambda held, step, *_: f"{doing(held, step)} ended")
    watched("looked_at", lambda resource, *_: f"drill.remove_what_was_made removed {resource.kind}")
