"""What is measured and how it is read. A source that cannot be asked has no values at all, never old ones and never zeros.

Each source is read by one function that gives samples; `ops_source_up` says of each whether it could be read at this scrape. What is
slow to read (the promises, which look into every store; Dagster) is read in the background and says when: `ops_source_read_timestamp_seconds`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ops_platform.errors import OpsError, UsageError
from ops_platform.promises import judge, promises_of
from ops_platform.remediation.model import State
from ops_platform.remediation.store import Store

if TYPE_CHECKING:
    from ops_platform.clients.access import Access

Labels = tuple[str, ...]
Sample = tuple[str, Labels, float]
"""Metric, values of its labels, value."""


@dataclass(frozen=True)
class Metric:
    """`source`: which of the readers gives it."""

    kind: Literal["gauge", "counter"]
    what: str
    labels: Labels = ()
    source: str = ""


METRICS: Mapping[str, Metric] = {
    "ops_source_up": Metric("gauge", "1 where the source could be read.", ("source",)),
    "ops_source_read_timestamp_seconds": Metric("gauge", "When the source was read last.", ("source",)),
    # Incidents
    "ops_incidents_open": Metric("gauge", "Incidents that are not closed.", ("state",), "incidents"),
    "ops_incidents_oldest_timestamp_seconds": Metric(
        "gauge", "When the oldest incident of this state was opened.", ("state",), "incidents"
    ),
    "ops_incidents_closed": Metric("counter", "Closed incidents.", ("rule", "ending"), "incidents"),
    "ops_actions": Metric(
        "counter", "Actions that were admitted; helped is true, false or unknown.", ("playbook", "helped"), "incidents"
    ),
    "ops_paused": Metric("gauge", "1 while everything is paused.", (), "incidents"),
    "ops_messages_unsent": Metric("gauge", "Messages that nobody has got yet.", (), "incidents"),
    "ops_messages_oldest_timestamp_seconds": Metric(
        "gauge", "When the oldest message that is unsent was written.", (), "incidents"
    ),
    "ops_events_lag": Metric(
        "gauge", "Events that the newest tick left unread.", ("system", "topic", "partition"), "incidents"
    ),
    "ops_watchdog_seen_timestamp_seconds": Metric(
        "gauge", "When the alert that must always fire was seen last.", ("alertmanager",), "incidents"
    ),
    "ops_guard_refusals": Metric(
        "counter", "Plans that a guard refused, since this process began.", ("guard",), "ledger"
    ),
    # Ledger
    "ops_ledger_entries": Metric("gauge", "Entries of the ledger.", (), "ledger"),
    "ops_ledger_newest_timestamp_seconds": Metric("gauge", "When the newest entry was written.", (), "ledger"),
    "ops_ledger_checkpoint_entries": Metric("gauge", "Entries that the newest checkpoint signs.", (), "ledger"),
    "ops_ledger_checkpoint_timestamp_seconds": Metric("gauge", "When the newest checkpoint was written.", (), "ledger"),
    "ops_outbox_entries": Metric("gauge", "Entries that are to be published and are not yet.", (), "ledger"),
    "ops_outbox_oldest_timestamp_seconds": Metric("gauge", "When the oldest of them was written.", (), "ledger"),
    # Promises
    "ops_promise_kept": Metric("gauge", "1 where the promise is kept.", ("target", "promise"), "promises"),
    "ops_promise_known": Metric("gauge", "1 where the promise could be judged.", ("target", "promise"), "promises"),
    "ops_backup_age_seconds": Metric("gauge", "Age of the newest backup.", ("target",), "promises"),
    "ops_proof_age_seconds": Metric("gauge", "Age of the newest proof.", ("target",), "promises"),
    "ops_rpo_seconds": Metric("gauge", "Loss that the newest verification measured.", ("target",), "promises"),
    "ops_rto_seconds": Metric(
        "gauge", "Time to restore that the newest verification measured.", ("target",), "promises"
    ),
    "ops_rto_whole_seconds": Metric(
        "gauge", "Estimate of the time to restore the worst moment.", ("target",), "promises"
    ),
    "ops_wal_archive_lag_bytes": Metric("gauge", "WAL that is not durable in the store.", ("target",), "promises"),
    "ops_wal_archive_gaps": Metric("gauge", "Gaps in the archive.", ("target",), "promises"),
    "ops_objective_seconds": Metric("gauge", "What was promised.", ("target", "objective"), "promises"),
    # Dagster
    "ops_instigator_running": Metric("gauge", "1 where a schedule or sensor is on.", ("name", "kind"), "dagster"),
    "ops_tick_timestamp_seconds": Metric("gauge", "Its newest tick.", ("name", "kind"), "dagster"),
    "ops_tick_failed": Metric("gauge", "1 where its newest tick failed.", ("name", "kind"), "dagster"),
    "ops_runs": Metric("gauge", "Runs that are not over.", ("status",), "dagster"),
}

# The promise's numbers, by the names that `promises` gives them.
_NUMBERS = {
    "backup_age_seconds": "ops_backup_age_seconds",
    "proof_age_seconds": "ops_proof_age_seconds",
    "rpo_seconds": "ops_rpo_seconds",
    "rto_seconds": "ops_rto_seconds",
    "rto-full_seconds": "ops_rto_whole_seconds",
    "lag_bytes": "ops_wal_archive_lag_bytes",
    "gaps": "ops_wal_archive_gaps",
}


# Incidents and the ledger: quick, read at each scrape


def read_incidents(store: Store) -> Iterator[Sample]:
    found = store.figures()
    for state in State:
        if state is not State.CLOSED:
            yield "ops_incidents_open", (state.value,), found.open.get(state, (0, None))[0]
    for state, (_, since) in found.open.items():
        yield "ops_incidents_oldest_timestamp_seconds", (state.value,), since.timestamp()
    for (rule, ending), number in found.endings.items():
        yield "ops_incidents_closed", (rule, ending), number
    for (book, helped), number in found.actions.items():
        yield "ops_actions", (book, helped), number
    yield "ops_paused", (), float(found.paused is not None)
    yield "ops_messages_unsent", (), found.unsent
    if found.oldest_unsent is not None:
        yield "ops_messages_oldest_timestamp_seconds", (), found.oldest_unsent.timestamp()
    for (system, topic, part), messages in found.lag.items():
        yield "ops_events_lag", (system, topic, str(part)), messages
    for name, at in found.seen.items():
        if name.startswith("watchdog/"):
            yield "ops_watchdog_seen_timestamp_seconds", (name.partition("/")[2],), at.timestamp()


class LedgerReader:
    """Counts refusals in the entries that were written since it began. For one thread at a time."""

    def __init__(self, store: Store) -> None:
        self._ledger = store.ledger
        self._after: int | None = None
        self._refused: Counter[str] = Counter()

    def __call__(self) -> Iterator[Sample]:
        found = self._ledger.standing()
        newest = found.newest[0] if found.newest else 0
        if self._after is None:
            self._after = newest
        for entry in self._ledger.entries(kind="action.plan", after_seq=self._after, limit=5000):
            self._after = entry.seq
            rulings = entry.body["rulings"]
            self._refused.update(r["guard"] for r in rulings if not r["allows"] and r["guard"] != "mode")
        yield "ops_ledger_entries", (), newest
        if found.newest is not None:
            yield "ops_ledger_newest_timestamp_seconds", (), found.newest[1].timestamp()
        if found.checkpoint is not None:
            yield "ops_ledger_checkpoint_entries", (), found.checkpoint[0]
            yield "ops_ledger_checkpoint_timestamp_seconds", (), found.checkpoint[1].timestamp()
        yield "ops_outbox_entries", (), found.waiting[0] if found.waiting else 0
        if found.waiting is not None:
            yield "ops_outbox_oldest_timestamp_seconds", (), found.waiting[1].timestamp()
        for guard, number in self._refused.items():
            yield "ops_guard_refusals", (guard,), number


# Promises: they look into stores and servers


def read_promises(access: Access) -> Iterator[Sample]:
    for target in access.inventory.all_backed():
        yield "ops_objective_seconds", (target.id, "rpo"), target.objectives.rpo.total_seconds()
        yield "ops_objective_seconds", (target.id, "rto"), target.objectives.rto.total_seconds()
        numbers: dict[str, float] = {}
        for name in promises_of(target):
            kept = judge(name, access, target, access.clock)
            yield "ops_promise_kept", (target.id, name), float(kept.kept)
            yield "ops_promise_known", (target.id, name), float(kept.known)
            if kept.known:
                numbers |= kept.numbers
        for name, value in numbers.items():
            if name in _NUMBERS:
                yield _NUMBERS[name], (target.id,), value


# Dagster, over its GraphQL API

_QUERY = """
query Watch {
  repositoriesOrError {
    __typename
    ... on PythonError { message }
    ... on RepositoryConnection {
      nodes {
        schedules { name scheduleState { status ticks(limit: 1) { status timestamp } } }
        sensors { name sensorState { status ticks(limit: 1) { status timestamp } } }
      }
    }
  }
  queued: runsOrError(filter: {statuses: [QUEUED, NOT_STARTED]}, limit: 1000) { ... on Runs { count } }
  started: runsOrError(filter: {statuses: [STARTING, STARTED, CANCELING]}, limit: 1000) { ... on Runs { count } }
}
"""


def read_dagster(access: Access) -> Iterator[Sample]:
    """Raises OpsError where the web server does not answer as its API promises."""
    answer = access.dagster().request("POST", "/graphql", body={"query": _QUERY}).json()
    try:
        data: dict[str, Any] = answer["data"]
        for repository in data["repositoriesOrError"]["nodes"]:
            for kind in ("schedule", "sensor"):
                for one in repository[f"{kind}s"]:
                    yield from _instigator(one["name"], kind, one[f"{kind}State"])
        for status in ("queued", "started"):
            yield "ops_runs", (status,), float(data[status]["count"])
    except (KeyError, TypeError) as error:
        raise OpsError(f"Dagster does not answer as its API promises: {error!r}", where="platform.dagster") from None


def _instigator(name: str, kind: str, state: dict[str, Any]) -> Iterator[Sample]:
    yield "ops_instigator_running", (name, kind), float(state["status"] == "RUNNING")
    for tick in state["ticks"][:1]:
        yield "ops_tick_timestamp_seconds", (name, kind), float(tick["timestamp"])
        yield "ops_tick_failed", (name, kind), float(tick["status"] == "FAILURE")


Reader = Callable[[], Iterator[Sample]]


def readers(access: Access, store: Store) -> tuple[dict[str, Reader], dict[str, Reader]]:
    """By source: what is read at each scrape, and what is read in the background."""
    quick: dict[str, Reader] = {"incidents": lambda: read_incidents(store), "ledger": LedgerReader(store)}
    slow: dict[str, Reader] = {"promises": lambda: read_promises(access)}
    if access.inventory.platform.dagster is not None:
        slow["dagster"] = lambda: read_dagster(access)
    return quick, slow


def need_known(samples: list[Sample]) -> list[Sample]:
    """Raises UsageError for a sample that no metric describes: what is not described is not exported."""
    for name, labels, _ in samples:
        if name not in METRICS or len(labels) != len(METRICS[name].labels):
            raise UsageError(f"{name} with {len(labels)} labels is not described in METRICS")
    return samples
