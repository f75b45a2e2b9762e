"""Which drills are held, on what and how often, and what keeps them from doing harm: the part `drills` of platform.yaml."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import Field

from ops_platform.inventory.base import AnyMode, Mode, Strict, Weekly
from ops_platform.inventory.values import Cron, Duration, Id, PositiveDuration, Zone


class Unavailability(Strict):
    """How long drills may keep a target from its users. Counted over all drills of the target in a sliding time."""

    most: Duration = Field(default=timedelta(minutes=5), description="Unavailable at most for this long …")
    per: PositiveDuration = Field(default=timedelta(days=30), description="… within this time.")


class DrillObjectives(Strict):
    """What a drill is measured against, where it differs from the target's own promise."""

    rto: Duration | None = Field(default=None, description="Recovery time; the target's own where not given.")
    rpo: Duration | None = Field(default=None, description="Loss; the target's own where not given.")


class PlannedDrill(Strict):
    """One runbook, on some targets, time and again."""

    id: Id = Field(description="Its name in commands, scorecards and the ledger.")
    runbook: Id = Field(description="The runbook's id: one that is shipped, or one of `drills.runbooks`.")
    targets: Annotated[list[Id], Field(min_length=1)] = Field(
        description="Targets and systems that it may be held on, and no others."
    )
    parameters: dict[str, Any] = Field(default={}, description="Of the runbook, where they differ from its defaults.")
    mode: AnyMode = Field(default=Mode.OBSERVE, description="observe says what would be done; enforce does it.")
    production: bool = Field(
        default=False, description="Whether it may be held on targets of environments that are production."
    )
    every: PositiveDuration = Field(
        default=timedelta(days=31), description="A target whose last good drill is older is overdue."
    )
    objectives: DrillObjectives = Field(default=DrillObjectives(), description="What it is measured against.")
    unavailability: Unavailability = Field(
        default=Unavailability(), description="The budget of downtime that drills of a target share."
    )
    approval: Literal["never", "production", "always"] = Field(
        default="production", description="Whether a second person approves the plan: never, in production, always."
    )
    owner: Id | None = Field(default=None, description="Who answers for its findings; the target's owner by default.")
    findings_due: PositiveDuration = Field(
        default=timedelta(days=30), description="Its findings are to be dealt with within this time."
    )


_WORKING_DAY = Weekly(
    days=["mon", "tue", "wed", "thu", "fri"], start="08:00", length=timedelta(hours=10), timezone="UTC"
)


class Drills(Strict):
    """Recovery, tried out."""

    plan: list[PlannedDrill] = Field(default=[], description="The drills that are held.")
    runbooks: str | None = Field(
        default=None, description="Folder of your own runbooks (*.yaml), relative to platform.yaml."
    )
    workspace: str = Field(
        default="{state}/drills",
        description="Folder in which drills restore; {state} and {inventory} are expanded. It needs room for a target.",
    )
    business_hours: list[Weekly] = Field(
        default=[_WORKING_DAY],
        description="When no drill begins. An empty list: a drill may begin at any time.",
    )
    samples_kept: PositiveDuration = Field(
        default=timedelta(days=400),
        description="What probes saw, attempt by attempt, is forgotten this long after its drill ended; scorecards stay.",
    )
    schedule: Cron | None = Field(
        default=None, description="When the most overdue drill is held, such as `0 20 1-7 * *`; none: by hand alone."
    )
    timezone: Zone = Field(default="UTC", description="The zone of `schedule`.")
    approvers: list[str] = Field(
        default=[], description="Who may approve, by the name that `ops` knows; empty: whoever may write the database."
    )
    approval_valid_for: PositiveDuration = Field(
        default=timedelta(hours=4), description="An approval that is older counts no more."
    )
    recover_alone: bool = Field(
        default=False,
        description="Whether one person alone may approve a recovery in earnest. It stands in the ledger who that was.",
    )
