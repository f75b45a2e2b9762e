"""The verdict over the gates of a verification, of PostgreSQL or of another store, and the scorecard that is kept with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ops_platform.errors import OpsError
from ops_platform.recovery import records
from ops_platform.recovery.findings import BROKEN_OFF
from ops_platform.recovery.model import Gate, GateStatus, Scorecard, Verdict

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory.model import Backed

NOT_RESTORED = "the restore did not come to its end"


def verdict_of(found: list[Gate]) -> tuple[Verdict, str]:
    """The verdict over the gates, with the gates that decided it. No gate at all proves nothing."""
    failed = [gate for gate in found if gate.status is GateStatus.FAILED]
    unchecked = [gate for gate in found if gate.status is GateStatus.COULD_NOT_CHECK]
    if failed:
        return Verdict.FAIL, "; ".join(map(_against, failed))
    if unchecked:
        return Verdict.COULD_NOT_VERIFY, "; ".join(map(_against, unchecked))
    passed = [gate for gate in found if gate.status is GateStatus.PASSED]
    if not passed:
        return Verdict.COULD_NOT_VERIFY, "nothing was checked"
    return Verdict.PASS, f"all {len(passed)} checks passed"


def _against(gate: Gate) -> str:
    # Its title says that all went well, which nobody is to read beside a FAIL.
    return f"the verification broke off: {gate.result}" if gate.id == BROKEN_OFF else f"{gate.title}: {gate.result}"


def stored(access: Access, target: Backed, card: Scorecard) -> Scorecard:
    """The scorecard, kept in the target's repository; one that could not be kept says so, and proves nothing."""
    try:
        repository = records.repository_of(access, target)
        if repository is not None:
            records.keep(repository, card)
    except OpsError as error:
        return _not_stored(card, error)
    return card


def _not_stored(card: Scorecard, error: OpsError) -> Scorecard:
    gate = Gate(
        id="record", title="The scorecard is stored", status=GateStatus.COULD_NOT_CHECK, query="", result=error.line, seconds=0
    )  # fmt: skip
    found = [*card.gates, gate]
    verdict, reason = verdict_of(found)
    return card.model_copy(update={"gates": found, "verdict": verdict, "reason": reason})
