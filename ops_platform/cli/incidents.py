"""`ops incidents`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ops_platform.cli.common import (
    Commands,
    actor,
    address,
    ago,
    confirm,
    emit,
    json_option,
    opened,
    parse_moment,
    stamp,
    table,
)
from ops_platform.errors import ConflictError, RefusedError, UsageError

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.remediation.store import Store


@click.group(cls=Commands)
def incidents() -> None:
    """What fired, what is done about it, and the switch that stops everything: pause-all."""


@contextmanager
def _store() -> Generator[tuple[Access, Store]]:
    from ops_platform.ledger import Ledger
    from ops_platform.remediation.store import Store

    with opened() as access, Ledger(access.platform_db) as ledger:
        yield access, Store(ledger)


@incidents.command(name="pause-all")
@click.option("--why", required=True, help="Shown to everybody whose action is stopped.")
def pause_all(why: str) -> None:
    """Stop everything: nothing is begun from now on, and what is being applied stops before its next change."""
    with _store() as (_access, store):
        pause = store.pause(why, who=actor())
    click.echo(f"paused by {pause.who} since {stamp(pause.at)}: {pause.why}")
    click.echo("ops incidents resume ends it")


@incidents.command()
def resume() -> None:
    """End the pause."""
    with _store() as (_access, store):
        ended = store.resume(who=actor())
    click.echo("resumed" if ended else "nothing was paused")


@incidents.command(name="list")
@click.option("--all", "everything", is_flag=True, help="Closed ones, too.")
@click.option("--since", metavar="TIME", help="With --all: opened from this moment on, with its zone.")
@json_option
def list_(everything: bool, since: str | None, as_json: bool) -> None:
    """The open incidents, oldest first."""
    at = parse_moment(since, option="--since") if since else None
    if at is not None and not everything:
        raise UsageError("--since goes with --all")
    with _store() as (_access, store):
        found = store.list(all_=everything, since=at)
        pause = store.paused()
    if as_json:
        from ops_platform.remediation.model import Incident

        emit(list[Incident], found)
        return
    if pause is not None:
        click.secho(f"PAUSED by {pause.who} since {stamp(pause.at)}: {pause.why}", fg="yellow", err=True)
    rows = [[i.id, i.state.value, i.rule, i.subject, ago(i.opened_at), _short(i.reason)] for i in found]
    table(rows, ["incident", "state", "rule", "target", "opened", "why"])


@incidents.command()
@click.argument("incident")
@json_option
def show(incident: str, as_json: bool) -> None:
    """One incident: what fired, the plan, what each guard said, what was done, its record."""
    from ops_platform.remediation.words import lines

    with _store() as (_access, store):
        found = store.get(incident)
        if as_json:
            from ops_platform.remediation.model import Incident

            emit(Incident, found)
            return
        record = [
            entry
            for entry in store.ledger.entries(subject=found.subject, kind="incident.", since=found.opened_at)
            if entry.body.get("incident") == found.id
        ]
        click.echo("\n".join(lines(found, record, store.decision(found))))


@incidents.command()
@click.argument("incident")
@click.option("--digest", help="Of the plan as you read it; without it the plan is shown and asked about.")
def approve(incident: str, digest: str | None) -> None:
    """Approve exactly the plan that it waits with. It is made anew before it is applied, and must still be the same."""
    _decide(incident, digest, "approve")


@incidents.command()
@click.argument("incident")
@click.option("--digest", help="Of the plan as you read it; without it the plan is shown and asked about.")
@click.option("--why", default="", help="For whoever reads the record.")
def refuse(incident: str, digest: str | None, why: str) -> None:
    """Refuse the plan: the incident is closed."""
    _decide(incident, digest, "refuse", why)


def _decide(incident: str, digest: str | None, decision: str, why: str = "") -> None:
    from ops_platform.remediation.buttons import need_approver
    from ops_platform.remediation.model import State
    from ops_platform.remediation.rules import remediation_of
    from ops_platform.remediation.words import plan_lines

    with _store() as (access, store):
        found = store.get(incident)
        if found.state is not State.WAITING or found.digest is None:
            raise ConflictError(f"the incident is {found.state.value}, and not waiting", where=found.id)
        if digest is None:
            click.echo("\n".join(plan_lines(found)))
            confirm(f"{decision} this plan?", otherwise=f"--digest {found.digest[:12]}")
            digest = found.digest
        if not found.digest.startswith(digest) or len(digest) < 8:
            raise UsageError(
                f"the plan is {found.digest[:12]} by now, and not {digest[:12]}", where=found.id,
                remedy=f"look again: ops incidents show {found.id}",
            )  # fmt: skip
        whole = remediation_of(access.inventory)
        who = actor()
        if decision == "approve":
            need_approver(found.proposed_by, who, whole.approvers, found.id)
        valid_for = whole.approval_valid_for
        made = store.decide(found, found.digest, decision, who=who, via="ops", valid_for=valid_for, why=why)
    click.echo(
        f"{decision}d by {made.who}, valid until {stamp(made.expires_at)}"
        if decision == "approve"
        else f"refused by {made.who}"
    )


@incidents.command()
@click.argument("incident")
def undo(incident: str) -> None:
    """Ask for the undo of what was applied; the next run does it. Refused where nothing was applied that can be undone."""
    from ops_platform.remediation.model import State

    with _store() as (_access, store):
        found = store.get(incident)
        if found.state is State.UNDOING:
            raise ConflictError("it is being undone already", where=found.id, remedy=f"ops incidents show {found.id}")
        if not found.can_be_undone:
            raise RefusedError(
                "nothing was applied here that can be undone",
                where=found.id,
                remedy=f"ops incidents show {found.id} says what was done",
            )
        store.move(found, State.UNDOING, f"{actor()} asked for the undo", actor=actor(), ending=None, closed_at=None)
    click.echo(f"{found.id} is being undone; ops incidents show {found.id}")


@incidents.command()
@click.argument("incident")
@click.option("--why", required=True, help="What was done about it.")
def close(incident: str, why: str) -> None:
    """Close an escalated incident: people have dealt with it."""
    from ops_platform.remediation.model import Ending

    with _store() as (_access, store):
        found = store.get(incident)
        store.close(found, Ending.BY_HAND, why, actor=actor())
    click.echo(f"{found.id} is closed")


@incidents.command()
@click.argument("incident")
@json_option
def run(incident: str, as_json: bool) -> None:
    """Work on one incident now, in this process, as a run of the job `remediate` would."""
    from ops_platform.remediation.model import Incident
    from ops_platform.remediation.sources import Sources
    from ops_platform.remediation.words import lines
    from ops_platform.remediation.worker import Worker

    with _store() as (access, store):
        found = Worker(access, store, Sources(access, store), actor()).work(store.get(incident).id)
    if as_json:
        emit(Incident, found)
    else:
        click.echo("\n".join(lines(found, [], None)))


@incidents.command()
@click.option(
    "--listen", required=True, metavar="HOST:PORT", help="Where Slack's requests arrive; [::1]:8443 for IPv6."
)
def serve(listen: str) -> None:
    """Take the presses of Slack's buttons until told to stop (SIGTERM, Ctrl-C)."""
    import signal
    import threading

    from ops_platform.remediation.buttons import serve as run

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: ended.set())
    with _store() as (access, store):
        server = run(access, store, *address(listen))
        click.echo(f"buttons are taken at http://{listen}/slack/interactive", err=True)
        ended.wait()
        server.shutdown()


def _short(text: str) -> str:
    return text if len(text) <= 90 else f"{text[:89]}…"
