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

# What a person does about an incident that cannot be moved as they wish.
_AT_IT = "a run is at it: wait for its end, which ops incidents show {id} tells; ops incidents pause-all stops it"
_NEEDS = {
    State.APPLYING: _AT_IT,
    State.VERIFYING: _AT_IT,
    State.UNDOING: _AT_IT,
    State.HELD: "it is undone when its time is over; ops incidents undo {id} does it now",
    State.CLOSED: "nothing is to be done: ops incidents show {id} says how it ended",
}


def need_allowed(incident: Incident, there: State) -> None:
    """Raises ConflictError."""
    here = incident.state
    if there not in ALLOWED[here]:
        what = f"already {here.value}" if here is there else f"{here.value}, and cannot be {there.value} from there"
        remedy = _NEEDS.get(here, "ops incidents show {id} says what it waits for").format(id=incident.id)
        raise ConflictError(f"this incident is {what}", where=incident.id, remedy=remedy)
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
