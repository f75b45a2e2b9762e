"""Playbooks: PostgreSQL."""

from __future__ import annotations

from typing import Any

from ops_platform.remediation.playbook import Playbook
from ops_platform.remediation.playbooks.postgres.archive import RebuildWalArchive
from ops_platform.remediation.playbooks.postgres.limits import RaiseLimit
from ops_platform.remediation.playbooks.postgres.reindex import ReindexInvalid
from ops_platform.remediation.playbooks.postgres.sessions import CancelQuery, EndIdleSessions
from ops_platform.remediation.playbooks.postgres.slots import DropInactiveSlot
from ops_platform.remediation.playbooks.postgres.vacuum import VacuumWraparound

PLAYBOOKS: tuple[Playbook[Any], ...] = (
    EndIdleSessions(),
    CancelQuery(),
    DropInactiveSlot(),
    VacuumWraparound(),
    ReindexInvalid(),
    RaiseLimit(),
    RebuildWalArchive(),
)
