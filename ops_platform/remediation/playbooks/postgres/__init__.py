"""Playbooks: PostgreSQL."""

from __future__ import annotations

from typing import Any

from ops_platform.remediation.playbook import Playbook
from ops_platform.remediation.playbooks.postgres.sessions import CancelQuery, EndIdleSessions

PLAYBOOKS: tuple[Playbook[Any], ...] = (EndIdleSessions(), CancelQuery())
