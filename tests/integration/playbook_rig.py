"""A target of a test with a role that has exactly the rights that are given to it, and a ledger, to run playbooks on."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from ops_platform.actions import Action, ActionResult, Guard, ModeGuard, run_action
from ops_platform.clients.access import Access
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.inventory import load
from ops_platform.inventory.model import Mode
from ops_platform.ledger import Ledger
from ops_platform.remediation.playbook import Context, Done, Playbook
from tests.rig import PASSWORD, Cluster, scratch

ENFORCE = ModeGuard(Mode.ENFORCE)
INCIDENT = "i-abcdefghijklm"


class Bench:
    """`rights` is SQL in which {role} stands for the role that the playbooks log in as; None logs in as a superuser."""

    def __init__(
        self,
        *members: Cluster,
        rights: str | None = "",
        attributes: str = "",
        dbname: str = "postgres",
        body: Mapping[str, Any] | None = None,
    ) -> None:
        self.cluster = members[0]
        self.role = f"ops_{secrets.token_hex(4)}"
        attributes = "superuser" if rights is None else attributes
        self.cluster.sql(
            f"create role {self.role} login {attributes} password '{PASSWORD.replace(chr(39), chr(39) * 2)}'"
        )
        if rights:
            self.cluster.sql(rights.format(role=self.role), dbname)
        self.home = scratch("ops-bench-")
        for name, content in (("password", PASSWORD), ("webhook", "a shared secret")):
            (self.home / name).write_text(content)
            (self.home / name).chmod(0o600)
        hosts = [{"host": "127.0.0.1", "port": member.port} for member in members]
        self.access = Access(load(_inventory(self.home, hosts, self.role, dbname, body or {})))
        self.ledger = Ledger(lambda: self.cluster.server.connect(autocommit=False))

    def context(self, playbook: Playbook[Any], clock: Clock = SYSTEM_CLOCK, **parameters: Any) -> Context[Any]:
        target = self.access.inventory.targets[0]
        read = playbook.read_parameters(parameters)
        return Context(self.access, target, read, INCIDENT, datetime(2026, 3, 2, tzinfo=UTC), clock)

    def action(self, playbook: Playbook[Any], **parameters: Any) -> Action:
        return playbook.action(self.context(playbook, **parameters))

    def run(self, playbook: Playbook[Any], *guards: Guard, **parameters: Any) -> ActionResult:
        return self.go(self.action(playbook, **parameters), *guards)

    def go(self, action: Action, *guards: Guard) -> ActionResult:
        return run_action(action, ledger=self.ledger, guards=[ENFORCE, *guards], actor="tester")

    def undo(self, playbook: Playbook[Any], result: ActionResult, **parameters: Any) -> ActionResult:
        action = playbook.undo(self.context(playbook, **parameters), [Done(*pair) for pair in result.outcomes])
        assert action is not None
        return self.go(action)

    def written(self, result: ActionResult) -> str:
        """All that the ledger holds of a run, as text."""
        entries = [entry for entry in self.ledger.entries() if entry.seq in result.recorded]
        assert len(entries) == len(result.recorded) > 0
        return "\n".join(str(entry.body) for entry in entries)

    def close(self) -> None:
        self.ledger.close()
        self.access.close()
        shutil.rmtree(self.home, ignore_errors=True)


def _inventory(home: Path, hosts: Sequence[Mapping[str, Any]], role: str, dbname: str, body: Mapping[str, Any]) -> Path:
    """No backup is taken from it: store and key service are named and never asked."""
    whole: dict[str, Any] = {
        "version": 1,
        "platform": {"name": "tests"},
        "owners": {"team": {"name": "Team"}},
        "environments": {"test": {}},
        "key_services": {"k": {"kind": "file", "path": "{inventory}/key"}},
        "stores": {
            "s": {
                "endpoint": "https://127.0.0.1:1",
                "bucket": "none",
                "access_key": "file://{inventory}/password",
                "secret_key": "file://{inventory}/password",
            }
        },
        "targets": [
            {
                "id": "app-db",
                "environment": "test",
                "owner": "team",
                "classification": "internal",
                "objectives": {},
                "connection": {
                    "hosts": list(hosts),
                    "dbname": dbname,
                    "user": role,
                    "password": "file://{inventory}/password",
                    "tls": {"mode": "disable"},
                },
                "repository": {"store": "s", "keys": "k"},
                "backup": {"schedule": {"cron": "15 2 * * *"}},
            }
        ],
        **body,
    }
    file = home / "platform.yaml"
    file.write_text(yaml.safe_dump(whole, sort_keys=False))
    return file


@contextmanager
def bench(*members: Cluster, **more: Any) -> Iterator[Bench]:
    made = Bench(*members, **more)
    try:
        yield made
    finally:
        made.close()
