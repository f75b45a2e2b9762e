"""Whether the clocks of a cluster's servers are ours. A drill's times are by our clock alone; a recovery to a moment goes by the primary's."""

from __future__ import annotations

from datetime import timedelta

from ops_platform.clients.postgres import Login, asking, connect
from ops_platform.drills.model import Checked
from ops_platform.drills.registry import Context
from ops_platform.errors import OpsError

TITLE, QUERY = "The servers' clocks are ours", "select clock_timestamp()"


def clocks_agree(context: Context, most: timedelta) -> Checked:
    """Of each server that answers; whether all of them should is for others to say. Where none does it could not be looked at."""
    apart: dict[str, timedelta] = {}
    silent: list[str] = []
    try:
        login = context.access.login(context.target.connection)
    except OpsError as error:
        return Checked(title=TITLE, holds=None, query=QUERY, result=error.line)
    for place in context.target.connection.hosts:
        host, port = context.access.address(place.host, place.port)
        try:
            apart[f"{host}:{port}"] = _apart(context, login, host, port)
        except OpsError as error:
            silent.append(f"{host}:{port} did not answer: {error.what}")
    wrong = [f"{name} is {_told(off)}" for name, off in apart.items() if abs(off) > most]
    said = wrong or [f"at most {_told(max(apart.values(), key=abs))}"] if apart else []
    allowed = f"{most / timedelta(seconds=1):.0f} s are allowed"
    return Checked(
        title=TITLE, holds=not wrong if apart else None, query=QUERY, result="; ".join([*said, *silent, allowed])
    )


def _apart(context: Context, login: Login, host: str, port: int) -> timedelta:
    """How much its clock is surely ahead of ours (behind it: less than nothing), whenever within the round trip it was read."""
    with asking(connect(login, host, port), f"{host}:{port}") as connection:
        began = context.clock.now()
        row = connection.execute(QUERY).fetchone()
        ended = context.clock.now()
    assert row is not None  # noqa: S101 - a select without a table has one
    return max(row[0] - ended, min(row[0] - began, timedelta(0)))


def _told(off: timedelta) -> str:
    seconds = off / timedelta(seconds=1)
    return f"{abs(seconds):.1f} s {'behind us' if seconds < 0 else 'ahead of us'}"
