"""Playbooks for Kafka.

Each module holds one of them; `shared` what they have in common.
"""

from __future__ import annotations

from typing import Any

from ops_platform.remediation.playbook import Playbook
from ops_platform.remediation.playbooks.kafka.leaders import ElectPreferredLeaders
from ops_platform.remediation.playbooks.kafka.poison import SkipPoisonRecord
from ops_platform.remediation.playbooks.kafka.retention import CutRetentionPlaybook

PLAYBOOKS: tuple[Playbook[Any], ...] = (CutRetentionPlaybook(), ElectPreferredLeaders(), SkipPoisonRecord())
