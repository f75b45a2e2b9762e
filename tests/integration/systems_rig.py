"""An inventory of systems, a ledger in a real database, and playbooks run on them with everything written down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import yaml

from ops_platform.actions import (
    Action,
    ActionResult,
    Applied,
    Change,
    Guard,
    ModeGuard,
    Outcome,
    Plan,
    Verification,
    run_action,
)
from ops_platform.clients.access import Access
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.inventory import load
from ops_platform.inventory.model import Mode
from ops_platform.ledger import Ledger
from ops_platform.remediation.playbook import Context, Done, Playbook
from tests.rig import Cluster, scratch

INCIDENT = "i-abcdefghijklm"


class KilledError(BaseException):
    """The end of a run in the middle, which nothing catches."""


class Bench:
    """`system` as in platform.yaml, without what all have. `files` become `file://{inventory}/NAME` secrets."""

    def __init__(
        self,
        cluster: Cluster,
        system: Mapping[str, Any],
        *,
        files: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        self.home = scratch("ops-bench-")
        for name, content in (files or {}).items():
            (self.home / name).write_text(content)
            (self.home / name).chmod(0o600)
        whole: dict[str, Any] = {
            "version": 1,
            "platform": {"name": "tests"},
            "owners": {"team": {"name": "Team"}},
            "environments": {"test": {}},
            "systems": [{"id": "it", "environment": "test", "owner": "team", **system}],
            **(body or {}),
        }
        file = self.home / "platform.yaml"
        file.write_text(yaml.safe_dump(whole, sort_keys=False))
        self.access = Access(load(file))
        self.signal_at = datetime.now(UTC)
        self.ledger = Ledger(lambda: cluster.server.connect(autocommit=False))

    def context(self, playbook: Playbook[Any], *, clock: Clock = SYSTEM_CLOCK, **parameters: Any) -> Context[Any]:
        read = playbook.read_parameters(parameters)
        return Context(self.access, self.access.inventory.subject("it"), read, INCIDENT, self.signal_at, clock)

    def action(self, playbook: Playbook[Any], *, clock: Clock = SYSTEM_CLOCK, **parameters: Any) -> Action:
        return playbook.action(self.context(playbook, clock=clock, **parameters))

    def run(self, playbook: Playbook[Any], *guards: Guard, **parameters: Any) -> ActionResult:
        return self.go(self.action(playbook, **parameters), *guards)

    def go(self, action: Action, *guards: Guard, mode: Mode = Mode.ENFORCE) -> ActionResult:
        return run_action(action, ledger=self.ledger, guards=[ModeGuard(mode), *guards], actor="tester")

    def undo(self, playbook: Playbook[Any], changes: Sequence[Change], **parameters: Any) -> ActionResult:
        """As the incident does it that knows of its changes only that they were begun."""
        done = [Done(change, Applied(Outcome.APPLIED, "begun")) for change in changes]
        action = playbook.undo(self.context(playbook, **parameters), done)
        assert action is not None
        return self.go(action)

    def written(self, result: ActionResult) -> str:
        """All that the ledger holds of a run, as text."""
        entries = [entry for entry in self.ledger.entries() if entry.seq in result.recorded]
        assert len(entries) == len(result.recorded) > 0
        return "\n".join(json.dumps(entry.body) for entry in entries)

    def close(self) -> None:
        self.ledger.close()
        self.access.close()
        shutil.rmtree(self.home, ignore_errors=True)


@contextmanager
def bench(cluster: Cluster, system: Mapping[str, Any], **more: Any) -> Iterator[Bench]:
    made = Bench(cluster, system, **more)
    try:
        yield made
    finally:
        made.close()


class Between:
    """An action to which something happens: `planned` after it was planned, `before` and `after` around each change."""

    def __init__(
        self,
        inner: Action,
        *,
        planned: Callable[[], object] = lambda: None,
        before: Callable[[], object] = lambda: None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        self.inner, self._planned, self._before, self._after = inner, planned, before, after
        self.name, self.target_id = inner.name, inner.target_id

    def plan(self) -> Plan:
        plan = self.inner.plan()
        self._planned()
        return plan

    def check(self, change: Change) -> Applied | None:
        return self.inner.check(change)

    def apply(self, change: Change) -> Applied:
        self._before()
        applied = self.inner.apply(change)
        self._after()
        return applied

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        return self.inner.verify(plan, outcomes)


def killed() -> None:
    raise KilledError


def outcomes(result: ActionResult) -> list[tuple[str, Outcome]]:
    return [(change.object, applied.outcome) for change, applied in result.outcomes]
