"""The demonstration's second act: a session blocks the shop, the shop says so, and the platform's daemon sees to it.

Nothing is played: the session holds its lock, the event goes through Kafka, Dagster's daemon reads it by its sensor and runs the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Generator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ops_platform.clients.processes import spawn, stop
from ops_platform.clock import SYSTEM_CLOCK
from ops_platform.errors import OpsError
from ops_platform.local import dagster_home
from ops_platform.local.components import admin, postgres_server
from ops_platform.local.parts import HOST, Place

if TYPE_CHECKING:
    import psycopg

TARGET, TOPIC, EVENT = "app-db", "ops.events", "com.example.shop.blocked"
PATIENCE = 240.0  # seconds


@contextlib.contextmanager
def blocking(place: Place) -> Generator[psycopg.Connection[Any]]:
    """The application takes a lock in a transaction and then says nothing more; somebody else waits for it."""
    session = _session(place)
    waiting = _session(place)
    try:
        session.execute("select from shop.orders order by id desc limit 1 for update")
        waiting.pgconn.send_query(b"begin; select from shop.orders order by id desc limit 1 for update")
        yield session
    finally:
        for connection in (session, waiting):
            with contextlib.suppress(Exception):
                connection.close()


def _session(place: Place) -> psycopg.Connection[Any]:
    import psycopg

    return psycopg.connect(
        host=HOST,
        port=postgres_server(place, TARGET).port,
        dbname="shop",
        user="checkout",
        password=place.secret("app-db.checkout.password"),
        application_name="checkout",
    )


def report(place: Place) -> str:
    """The shop says what happens to it: a CloudEvent. Returns its id."""
    from confluent_kafka import Producer

    name = uuid.uuid4().hex
    event = {
        "specversion": "1.0",
        "id": name,
        "source": "/shop",
        "type": EVENT,
        "time": datetime.now(UTC).isoformat(),
        "datacontenttype": "application/json",
        "data": {"database": TARGET},
    }
    failed: list[Any] = []
    producer = Producer({"bootstrap.servers": f"{HOST}:{place.port('kafka')}", "log_level": 0})
    producer.produce(
        TOPIC,
        json.dumps(event).encode(),
        headers=[("content-type", b"application/cloudevents+json")],
        on_delivery=lambda error, _message: failed.append(error) if error else None,
    )
    if producer.flush(30) or failed:
        raise OpsError(
            "the event did not reach Kafka", where=f"{HOST}:{place.port('kafka')}", remedy="ops local logs kafka"
        )
    return name


@contextlib.contextmanager
def daemon(place: Place) -> Generator[None]:
    """Dagster's daemon, which evaluates schedules and sensors and launches runs; ended with everything that it started."""
    log = place.log("demo-daemon")
    command = [sys.executable, "-m", "dagster._daemon", "run", "-m", "ops_platform.definitions"]
    # Of its own, for what a killed code server or run leaves in it.
    scratch = tempfile.mkdtemp(prefix="ops-demo-daemon-")
    process = spawn(command, log, env={**dagster_home.prepare(), "TMPDIR": scratch})
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)  # it leads a session of its own
        ended = stop(process)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started and left
        shutil.rmtree(scratch, ignore_errors=True)
        if not ended:
            raise OpsError("Dagster's daemon did not end", where=f"pid {process.pid}", remedy="end it by hand")


def await_end(store: Any, event_id: str, tell: Callable[[str], None], place: Place) -> Any:
    """The incident of that event, once it has come to rest; each of its states is told. Raises OpsError where it does not end.

    Where an event of a demonstration that was broken off came first, its incident ended the session, and it is that one.
    """
    until, told = SYSTEM_CLOCK.monotonic() + PATIENCE, 0
    while SYSTEM_CLOCK.monotonic() < until:
        found = [one for one in store.list(all_=True) if one.signal.labels.get("id") == event_id]
        if found:
            steps = store.history_of(found[0].id)
            for _, state, reason in steps[told:]:
                tell(f"{state.value:10} {reason}")
            told = len(steps)
            if not found[0].is_open or found[0].state.value in ("escalated", "waiting", "observed"):
                return _of_the_same_session(store, found[0])
        SYSTEM_CLOCK.sleep(0.5)
    raise OpsError(
        f"the daemon did not see to it within {PATIENCE:.0f} s", where=str(place.log("demo-daemon")),
        remedy="read this log from its end upwards",
    )  # fmt: skip


def _of_the_same_session(store: Any, incident: Any) -> Any:
    """The incident that an earlier event opened meanwhile, where it left nothing to do for this one."""
    if incident.ending is None or incident.ending.value != "cleared":
        return incident
    since = incident.signal.starts_at
    others = [one for one in store.list(all_=True) if one.rule == incident.rule and one.opened_at >= since]
    return next((one for one in others if one.ending and one.ending.value == "helped"), incident)


def await_run(place: Place) -> None:
    """Until Dagster has written down how the run ended, so that whoever looks at it finds no run that was broken off."""
    until = SYSTEM_CLOCK.monotonic() + 60
    with admin(place, "platform-db", "dagster") as connection:
        while SYSTEM_CLOCK.monotonic() < until:
            row = connection.execute(
                "select count(*) from runs where pipeline_name = 'remediate' and status in ('STARTING', 'STARTED')"
            ).fetchone()
            if row is not None and row[0] == 0:
                return
            SYSTEM_CLOCK.sleep(0.5)


def orders_wait(place: Place) -> int:
    """Sessions of the shop that wait for a lock."""
    with admin(place, TARGET, "shop") as connection:
        row = connection.execute(
            "select count(*) from pg_stat_activity where application_name = 'checkout' and wait_event_type = 'Lock'"
        ).fetchone()
    return row[0] if row else 0
