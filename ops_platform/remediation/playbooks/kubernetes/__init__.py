"""Playbooks: kubernetes.

Each module holds the playbooks of one kind of object; `shared` what they have in common.
"""

from __future__ import annotations

from typing import Any

from ops_platform.remediation.playbook import Playbook
from ops_platform.remediation.playbooks.kubernetes.argo import ArgoAbort, ArgoRetry
from ops_platform.remediation.playbooks.kubernetes.certificates import RenewCertificateSecret
from ops_platform.remediation.playbooks.kubernetes.nodes import CordonDrain
from ops_platform.remediation.playbooks.kubernetes.pods import CleanFinishedJobs, DeleteStuckPod
from ops_platform.remediation.playbooks.kubernetes.restart import RolloutRestart
from ops_platform.remediation.playbooks.kubernetes.rollback import Rollback
from ops_platform.remediation.playbooks.kubernetes.scale import Scale
from ops_platform.remediation.playbooks.kubernetes.storage import GrowVolumeClaim

PLAYBOOKS: tuple[Playbook[Any], ...] = (
    ArgoAbort(),
    ArgoRetry(),
    CleanFinishedJobs(),
    CordonDrain(),
    DeleteStuckPod(),
    GrowVolumeClaim(),
    RenewCertificateSecret(),
    Rollback(),
    RolloutRestart(),
    Scale(),
)
