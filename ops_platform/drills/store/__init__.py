"""Drills, their steps, what they made, what their probes saw and what they found, in the platform's PostgreSQL, schema `ops_drills`.

Every change of a drill and its entry in the ledger are one transaction, and asks for the version that its author holds: whoever was
killed, or is late, changes nothing and makes nothing. Two drills never hold one target, or one failure domain: the database says so.
"""

from __future__ import annotations

from ops_platform.drills.store.findings import Findings
from ops_platform.drills.store.people import People
from ops_platform.drills.store.resources import Resources
from ops_platform.drills.store.samples import Samples
from ops_platform.drills.store.steps import Steps


class Store(Steps, Resources, Samples, People, Findings):
    """The drills of one platform, whole. Each room of it is a module beside this one."""
