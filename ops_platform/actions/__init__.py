"""The one way to change something: plan, guard, apply, verify, record.

`model` holds the nouns, `guards` what may refuse, `run.run_action` puts them together. A domain writes an `Action` and nothing else.
"""

from ops_platform.actions.guards import (
    Approval,
    CountLimit,
    LegalHold,
    MaintenanceWindow,
    ModeGuard,
    PercentLimit,
    next_opening,
)
from ops_platform.actions.model import (
    Action,
    ActionResult,
    Applied,
    Case,
    Change,
    Check,
    Guard,
    Outcome,
    Plan,
    Ruling,
    Status,
    Verification,
)
from ops_platform.actions.run import run_action

__all__ = [
    "Action",
    "ActionResult",
    "Applied",
    "Approval",
    "Case",
    "Change",
    "Check",
    "CountLimit",
    "Guard",
    "LegalHold",
    "MaintenanceWindow",
    "ModeGuard",
    "Outcome",
    "PercentLimit",
    "Plan",
    "Ruling",
    "Status",
    "Verification",
    "next_opening",
    "run_action",
]
