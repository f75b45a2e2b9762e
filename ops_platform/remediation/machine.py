"""Which state of an incident may follow which. Pure: the store refuses whatever does not stand here."""

from __future__ import annotations

from ops_platform.errors import ConflictError
from ops_platform.remediation.model import Ending, Incident, State

_LOOK = {State.OBSERVED, State.SUPPRESSED, State.WAITING, State.APPLYING, State.ESCALATED, State.CLOSED}

ALLOWED: dict[State, frozenset[State]] = {
    State.OPEN: frozenset(_LOOK),
    State.SUPPRESSED: frozenset(_LOOK | {State.OPEN}),
    State.OBSERVED: frozenset({State.OPEN, State.CLOSED}),
    State.WAITING: frozenset(_LOOK | {State.OPEN}),  # WAITING again: with another plan
    # Out of APPLYING there is no way that forgets that something was changed: see `need_allowed`.
    State.APPLYING: frozenset({State.VERIFYING, State.UNDOING, State.ESCALATED, State.SUPPRESSED}),
    State.VERIFYING: frozenset({State.OPEN, State.HELD, State.UNDOING, State.ESCALATED, State.CLOSED}),
    State.HELD: frozenset({State.UNDOING, State.ESCALATED}),
    State.UNDOING: frozenset({State.OPEN, State.ESCALATED, State.CLOSED}),
    State.ESCALATED: frozenset({State.OPEN, State.UNDOING, State.CLOSED}),
    State.CLOSED: frozenset({State.UNDOING}),  # somebody asks for the undo of what helped
}

# States in which something of ours may be changed, or half changed, on the live system.
TOUCHED = frozenset({State.APPLYING, State.VERIFYING, State.HELD, State.UNDOING})


def need_allowed(incident: Incident, there: State) -> None:
    """Raises ConflictError."""
    here = incident.state
    if there not in ALLOWED[here]:
        raise ConflictError(f"an incident that is {here.value} cannot become {there.value}", where=incident.id)
    if here is State.APPLYING and there is State.SUPPRESSED and incident.touched:
        raise ConflictError("changes were begun: this incident cannot be put off any more", where=incident.id)
    if here is State.CLOSED and incident.ending is not Ending.HELPED:
        raise ConflictError("nothing of it stands that could be undone", where=incident.id)


def ending_without_signal(incident: Incident) -> Ending | None:
    """How an incident ends when its signal does; None where it goes on: what was begun is brought to its end first.

    What was meant for a time and could not be undone then stays with people: that the signal is gone does not take it back.
    """
    state, attempts = incident.state, incident.attempts
    if state in TOUCHED or (state is State.ESCALATED and incident.undo_at is not None):
        return None
    if state is State.ESCALATED:
        return Ending.BY_HAND
    if state is State.OBSERVED:
        return Ending.OBSERVED
    if state is State.SUPPRESSED:
        return Ending.SUPPRESSED
    # Tried before, looked at again, and meanwhile the signal ended: the earlier action helped, if late.
    return Ending.HELPED if attempts else Ending.CLEARED
