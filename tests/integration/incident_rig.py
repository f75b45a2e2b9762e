"""A playbook on the real system of another rig, taken all the way: signal, rule, incident, worker, guards, apply, verify, ledger.

The signal is what Alertmanager would say, or an event; the alert fires for as long as the system itself is in trouble.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from ops_platform.clients.access import Access
from ops_platform.clients.prometheus import Measured
from ops_platform.inventory import LoadedInventory
from ops_platform.inventory.model import Inventory
from ops_platform.inventory.remediation import MetricCheck, Remediation
from ops_platform.ledger import Ledger
from ops_platform.remediation.intake import take
from ops_platform.remediation.model import Ending, Incident, Signal, State
from ops_platform.remediation.store import Store
from ops_platform.remediation.worker import Worker
from tests.remediation_rig import fresh_database
from tests.rig import Cluster

STEPS = [
    "incident.open", "incident.applying", "action.plan", "action.outcome", "action.verification", "incident.verifying",
    "incident.closed",
]  # fmt: skip


@dataclass(frozen=True)
class _Alerting:
    """Prometheus and Alertmanager, as far as this one alert goes."""

    signal: Signal
    troubled: Callable[[], bool]

    def look(self, incident: Incident) -> Signal | None:
        return self.signal if self.signal.is_event or self.troubled() else None

    def measure(self, check: MetricCheck, incident: Incident) -> tuple[Measured, str]:
        return Measured.UNKNOWN, "no rule here asks for a metric"


def solved(
    cluster: Cluster,
    access: Access,
    playbook: str,
    parameters: Mapping[str, Any],
    troubled: Callable[[], bool],
    *,
    source: Literal["alertmanager", "kafka"] = "alertmanager",
    secrets: Sequence[str] = (),
) -> Incident:
    """Solve the trouble of the inventory's only system or target.

    Under a pause nothing is touched; after it everything happens once, and stands in the ledger in its order.
    """
    with ExitStack() as stack:
        given, subject = _with_rule(access.inventory, playbook, parameters, source)
        ours = stack.enter_context(Access(LoadedInventory(given, access.loaded.path)))
        database = fresh_database(cluster, stack)
        store = Store(stack.enter_context(Ledger(lambda: cluster.server.connect(database))))
        signal = _signal(source, subject)
        (opened,) = take(store, given, [signal], complete=False).opened
        worker = Worker(ours, store, _Alerting(signal, troubled), "run 1")

        assert troubled(), "there is nothing to solve"
        store.pause("a look first", who="ann")
        paused = worker.work(opened.id)
        assert (paused.state, paused.reason.partition(":")[0]) == (State.SUPPRESSED, "pause"), paused.reason
        assert troubled()
        assert store.resume(who="ann")

        with store.transaction() as t:
            t.connection.execute("update ops_remediation.incidents set retry_at = now() where id = %s", [opened.id])
        done = worker.work(opened.id)
        assert (done.state, done.ending, done.attempts) == (State.CLOSED, Ending.HELPED, 1), done.reason
        assert not troubled()

        entries = list(store.ledger.entries())
        kinds = [entry.kind for entry in entries if entry.subject == subject]
        once = list(dict.fromkeys(kind for kind in kinds[kinds.index("incident.suppressed") + 1 :]))
        assert once == STEPS[1:]
        assert kinds.count("incident.applying") == 1
        assert {entry.body["playbook"] for entry in entries if entry.kind == "incident.closed"} == {playbook}
        assert all(secret not in entry.text for entry in entries for secret in secrets)
        assert store.ledger.verify().ok
        assert [(claim.helped, claim.playbook) for claim in store.claims(opened.opened_at)] == [(True, playbook)]
        assert take(store, given, [signal], complete=False).opened == ()
        return done


def _with_rule(
    inventory: Inventory, playbook: str, parameters: Mapping[str, Any], source: str
) -> tuple[Inventory, str]:
    (subject,) = inventory.systems or inventory.targets
    about = {"event": {"type": "com.example.broken"}} if source == "kafka" else {"alert": ["alertname=Broken"]}
    verify = {} if source == "kafka" else {"verify": {"within": "1m", "every": "1s"}}
    rule = {
        "id": "mend", "target": {"label": "it"}, "playbook": playbook, "parameters": dict(parameters), "mode": "enforce",
        **about, **verify,
    }  # fmt: skip
    whole = Remediation.model_validate({"rules": [rule]})
    return inventory.model_copy(update={"remediation": whole}), subject.id


def _signal(source: Literal["alertmanager", "kafka"], subject: str) -> Signal:
    now = datetime.now(UTC)
    labels = {"alertname": "Broken", "it": subject}
    if source == "kafka":
        labels = {"type": "com.example.broken", "source": "/tests", "id": "1", "it": subject}
    return Signal(source, "broken/0/0", "Broken", labels, now, now)
