"""A client on the wrong side: it stays with a primary that is cut off from everybody else, and writes on for as long as that one lets it.

What it was told is committed is what an application beside the old primary would have been told. Where commits wait for a replica none of it is
acknowledged; where they do not, all of it is lost when the old primary follows again.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Any

from ops_platform.clients.listeners import listens
from ops_platform.clients.postgres import asking
from ops_platform.drills.askers import TABLE
from ops_platform.drills.model import Checked, Done, Measured, Sample
from ops_platform.drills.probing import word_of
from ops_platform.drills.registry import Context, TimedOutError, does
from ops_platform.drills.steps.basics import moment_of
from ops_platform.drills.steps.injection import noted
from ops_platform.drills.steps.patroni import primary
from ops_platform.drills.steps.postgres import begin_rows
from ops_platform.drills.steps.probes import Attempts, start_probe
from ops_platform.drills.steps.writes import Lost, count, ranges, ranges_told
from ops_platform.errors import CouldNotVerifyError

_TELLS_WITHIN = 30.0
_QUERY = f"select n from {TABLE} where drill = %s"


@does(
    "patroni.wrong_side_write", "probe", given=Attempts, changes=lambda given: f"rows in {TABLE}, which go at the end"
)
def write(context: Context, given: Attempts) -> Done:
    """A writer of numbered rows in the network of the primary's own process (setns): when that is cut off it is on the same side. One commit at a time,
    each for as long as its connection lasts. Where none can stand there the drill goes on, and `patroni.wrong_side_lost` could not be looked at."""
    try:
        before = noted(context)
        where = {k: v for k, v in before.detail.items() if k != "target"} if before else _where(context)
        begin_rows(context, f"{TABLE} of {context.target.id}, beside {where['member']}", **where)
        return replace(start_probe(context), facts={"member": where["member"]})
    except TimedOutError:
        raise
    except CouldNotVerifyError as error:
        return Done(f"nobody writes beside the primary: {error.line}", {"why": error.line})


def _where(context: Context) -> dict[str, Any]:
    """Beside whom: what the writer's process has to know."""
    server = primary(context)
    process = listens(server.host, server.port)
    address = _address(server.host, server.port)
    known = [place.host for place in context.target.connection.hosts if _address(place.host, place.port) == address]
    return {
        "writer": word_of(context.held.id, context.step.id), "member": server.name, "address": address[0], "port": server.port,
        "host": known[0] if known else server.host,  # its certificate is for the name by which clients know it
        **asdict(process),
    }  # fmt: skip


def _address(host: str, port: int) -> tuple[Any, ...]:
    """The first that its name has, with the port."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][:2]
    except OSError:
        return ("", port)


@does("patroni.wrong_side_lost", "check", given=Lost)
def lost(context: Context, given: Lost) -> Done:
    """Every number that the old primary acknowledged to the client beside it stands in the table of whoever leads now; and for how long after the cut
    it went on to acknowledge what nobody else has. An answer that warns of a wait for replicas that was cancelled is no acknowledgement."""
    at, cut = moment_of(context.fact(given.injected, "at")), str(context.fact(given.injected, "member"))
    record, now = context.results.get(given.writer), context.clock.now()
    facts = record.facts if record else {}
    if "member" in facts:
        until = context.clock.monotonic() + _TELLS_WITHIN
        context.wait(
            lambda: told_all(context.samples(given.writer), now) or context.clock.monotonic() > until, every=0.2
        )
    samples = context.samples(given.writer)
    if (why := not_known(facts, samples, cut, at, now)) is not None:
        return Done(why, checks=(_check(None, why),))
    acknowledged = {s.n: _answered(s) for s in samples if s.ok and s.n is not None}
    writer = word_of(context.held.id, given.writer)
    with asking(context.access.postgres(context.target, role="primary"), context.target.id) as connection:
        there = {row[0] for row in connection.execute(_QUERY, [writer]).fetchall()}
    gone = sorted(acknowledged.keys() - there)
    seconds = max([0.0, *((acknowledged[n] - at).total_seconds() for n in gone)])
    refused = min((_answered(s) for s in samples if not s.ok and _answered(s) >= at), default=None)
    said = f"{len(gone)} of {len(acknowledged)} writes that the old primary acknowledged to a client beside it are lost"
    said += f": {ranges_told(gone)}" if gone else ""
    said += f"; it went on to acknowledge them for {seconds:.1f} s after the cut"
    said += f", and first ended or refused one {(refused - at).total_seconds():.1f} s after it" if refused else ""
    numbers = (
        Measured(
            name="wrong_side", value=round(seconds, 3),
            how="from the cut to the last acknowledgement, by the old primary, of a write that is lost",
        ),
        count("wrong_side_lost", len(gone), "writes that the old primary acknowledged to a client beside it, and that are not there"),
    )  # fmt: skip
    return Done(said, checks=(_check(len(gone) <= given.most, said, gone),), measured=numbers)


def _check(holds: bool | None, result: str, gone: Sequence[int] = ()) -> Checked:
    title = "Writes acknowledged beside the old primary are there"
    return Checked(title=title, holds=holds, query=_QUERY, result=result, detail={"lost": ranges(gone)})


def told_all(samples: Sequence[Sample], now: datetime) -> bool:
    """Attempts come one after the other: who tells of one that began just now has told of all before it."""
    return any(sample.at >= now for sample in samples)


def not_known(facts: Mapping[str, Any], samples: Sequence[Sample], cut: str, at: datetime, now: datetime) -> str | None:
    """Why it is not known what a client beside the one that was cut off was told; None where it is. That nothing was lost says nothing then. Pure."""
    if facts.get("member") != cut:
        why = facts.get("why") or f"it was beside {facts.get('member', 'nobody')}"
        return f"nobody wrote beside {cut} when it was cut off: {why}"
    if not told_all(samples, now):
        return f"who wrote beside {cut} tells nothing any more, so what it was told is not known"
    before = [sample for sample in samples if _answered(sample) < at]
    if not before or not before[-1].ok:
        return f"nobody wrote beside {cut} when it was cut off: {before[-1].error if before else 'it had not begun'}"
    return None


def _answered(sample: Sample) -> datetime:
    return sample.at + timedelta(milliseconds=sample.ms)
