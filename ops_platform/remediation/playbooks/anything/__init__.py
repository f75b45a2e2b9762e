"""Playbooks: whatever has an HTTP address, and Dagster's own jobs."""

from __future__ import annotations

from typing import Any

from ops_platform.remediation.playbook import Playbook
from ops_platform.remediation.playbooks.anything.dagster_job import RunDagsterJob
from ops_platform.remediation.playbooks.anything.webhook import Webhook

PLAYBOOKS: tuple[Playbook[Any], ...] = (Webhook(), RunDagsterJob())
