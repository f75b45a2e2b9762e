"""Which entries of the ledger are evidence for which control of an audit: the part `evidence` of platform.yaml, and what is built in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import Id

Kind = Annotated[str, Field(pattern=r"^[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?$")]


class Control(Strict):
    """A control, and the entries that show how it was kept."""

    id: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="As the framework numbers it, such as CC7.4 or A.8.13."
    )
    framework: str = Field(description="The framework, such as SOC 2.")
    title: str = Field(description="What it asks for, in a few words.")
    kinds: Annotated[list[Kind], Field(min_length=1)] = Field(
        description="Kinds of entries; one that ends in a dot stands for every kind below it."
    )
    subjects: list[Id] = Field(default=[], description="Of these targets and systems alone; empty: of all.")

    def holds(self, kind: str, subject: str) -> bool:
        """Whether an entry is evidence for it."""
        if self.subjects and subject not in self.subjects:
            return False
        return any(kind == each or (each.endswith(".") and kind.startswith(each)) for each in self.kinds)


SOC_2, ISO_27001 = "SOC 2", "ISO/IEC 27001:2022"
_ACTIONS, _INCIDENTS, _PROOFS = "action.", "incident.", "backup.verification"
_DRILLS, _CARDS = "drill.", "drill.scorecard"


def _control(framework: str, number: str, title: str, *kinds: str) -> Control:
    return Control(id=number, framework=framework, title=title, kinds=list(kinds))


# The titles are ours, in a few words each; the frameworks' own texts are their publishers'.
BUILT_IN: tuple[Control, ...] = (
    _control(SOC_2, "A1.2", "Backups and recovery are kept up", "backup.", _ACTIONS, _CARDS),
    _control(SOC_2, "A1.3", "Recovery is tested", _PROOFS, _DRILLS),
    _control(SOC_2, "CC7.2", "Anomalies are watched for", _INCIDENTS),
    _control(SOC_2, "CC7.3", "Events are judged", _INCIDENTS, "action.plan"),
    _control(SOC_2, "CC7.4", "Incidents are responded to", _INCIDENTS, _ACTIONS),
    _control(SOC_2, "CC7.5", "What was hit is recovered", _INCIDENTS, _ACTIONS, _PROOFS, _DRILLS),
    _control(SOC_2, "CC8.1", "Changes are authorised, made and checked", _ACTIONS),
    _control(ISO_27001, "A.5.24", "Handling of incidents is planned", _INCIDENTS),
    _control(ISO_27001, "A.5.25", "Events are assessed and decided on", _INCIDENTS, "action.plan"),
    _control(ISO_27001, "A.5.26", "Incidents are responded to", _INCIDENTS, _ACTIONS),
    _control(ISO_27001, "A.5.27", "Incidents are learned from", _INCIDENTS),
    _control(ISO_27001, "A.5.28", "Evidence is collected", _INCIDENTS, _ACTIONS, "backup."),
    _control(ISO_27001, "A.5.29", "Security holds during disruption", _INCIDENTS, _PROOFS, _DRILLS),
    _control(ISO_27001, "A.5.30", "Continuity is prepared and tested", _PROOFS, _DRILLS),
    _control(ISO_27001, "A.8.13", "Backups are kept and tested", "backup.", _ACTIONS, _CARDS),
    _control(ISO_27001, "A.8.14", "Facilities are redundant, and it is tested", _DRILLS),
    _control(ISO_27001, "A.8.15", "Activities are logged", _INCIDENTS, _ACTIONS, "backup."),
    _control(ISO_27001, "A.8.32", "Changes are controlled", _ACTIONS),
)


def controls(own: Iterable[Control]) -> list[Control]:
    """The built-in ones and a company's own, which count where both have the same number in the same framework."""
    merged = {(control.framework, control.id): control for control in (*BUILT_IN, *own)}
    return [merged[key] for key in sorted(merged)]
