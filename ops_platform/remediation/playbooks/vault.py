"""Playbooks: vault."""

from __future__ import annotations

from typing import Any

from ops_platform.remediation.playbook import Playbook

PLAYBOOKS: tuple[Playbook[Any], ...] = ()
