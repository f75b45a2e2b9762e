"""`ops demo`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from ops_platform.counting import count_of, duration, size
from ops_platform.errors import OpsError

if TYPE_CHECKING:
    from pathlib import Path

    from ops_platform.clients.access import Access
    from ops_platform.local.parts import Place

from ops_platform.cli.common import actor, console, opened


@click.command()
def demo() -> None:
    """Back up a live shop, prove the backup, lose its payments, bring them back; help a blocked shop; lose the whole site."""
    from ops_platform.inventory import load
    from ops_platform.local import demo as story
    from ops_platform.local import stack
    from ops_platform.proof import reports_directory
    from ops_platform.reports.terminal import print_scorecard, progress_bar

    story.check(load())
    began = time.monotonic()
    _step(1, "Real servers on this machine")
    stack.up(say=lambda name, text: click.echo(f"   {name:13} {text}") if text.startswith("ready") else None)
    with opened() as access:
        if (left := story.unfinished()) is not None:
            _say("an earlier demo was interrupted after its damage: the payments are brought back first")
            with progress_bar(story.TARGET) as progress:
                story.bring_back(access, left, progress)

        _step(2, "The shop sells; the main job backs it up and proves the backup")
        story.trade(100)
        story.execute("nightly_backup", {}, _say)
        print_scorecard(story.newest_card(access), console())

        _step(3, "Damage")
        loss = story.damage(_say)
        _say(f"{loss.before} payments were there at {loss.moment:%H:%M:%S.%f} UTC, {loss.after} are there now")

        _step(4, "Restore to the second before, and check the data")
        config = {"ops": {"postgres__pitr_verification": {"config": {"at": loss.moment.isoformat()}}}}
        story.execute("verify_recovery", config, _say)
        print_scorecard(story.newest_card(access), console())

        _step(5, "Bring the payments back")
        with progress_bar(story.TARGET) as progress:
            count, total = story.bring_back(access, loss, progress)
        _say(f"all {count} payments are back, to the cent: {total}")
        report = reports_directory(access) / f"{story.TARGET}.html"
        _blocked(access, story.place())
        page = _second_site(access)
        _record(access)
    click.echo()
    click.secho(f"Done in {duration(time.monotonic() - began)}.", bold=True)
    click.echo(f"report:  {report}")
    click.echo(f"drill:   {page}")
    click.echo("web UI:  make ui")
    click.echo("stop:    .venv/bin/ops local down")


def _blocked(access: Access, place: Place) -> None:
    """A session blocks the shop; the daemon sees the event, ends the session, verifies, records."""
    from ops_platform.ledger import Ledger
    from ops_platform.local import blocked
    from ops_platform.remediation.store import Store
    from ops_platform.remediation.words import lines

    _step(6, "A session blocks the shop; the platform sees to it")
    with Ledger(access.platform_db) as ledger, blocked.blocking(place), blocked.daemon(place):
        store = Store(ledger)
        event = blocked.report(place)
        _say(f"event {event[:8]}… of type {blocked.EVENT} is in Kafka; Dagster's daemon reads it (half a minute)")
        incident = blocked.await_end(store, event, _say, place)
        blocked.await_run(place)
        for line in lines(incident, [], None):
            _say(line)
        if incident.ending is None or incident.ending.value != "helped":
            raise OpsError(f"the incident is {incident.state.value}: {incident.reason}", where=incident.id)
        if blocked.orders_wait(place):
            raise OpsError("the shop still waits", where=incident.id)


def _second_site(access: Access) -> Path:
    """The repository is copied, and the database restored from the copy alone. The path of the drill's page."""
    from ops_platform.cli.drill import say_card
    from ops_platform.drilling import begin, hold, open_store
    from ops_platform.drills.begin import planned
    from ops_platform.local import demo as story
    from ops_platform.proof import copy_over
    from ops_platform.reports.terminal import progress_bar

    _step(7, "The whole site is lost; the database comes back from the copy alone")
    target = access.inventory.target(story.TARGET)
    _say(f"ops backup replicate {target.id}")
    for copy in target.repository.copies:
        with progress_bar(f"{target.id} to {copy.id}") as progress:
            copied = copy_over(access, target, copy.id, actor=actor(), progress=progress)
        if not copied.whole:
            raise OpsError("; ".join(copied.wrong), where=f"{target.id} at {copy.id}")
        _say(f"{count_of(copied.objects, 'object')} ({size(copied.bytes)}) copied, under another key")
    _say(f"ops drill run {story.SITE_DRILL}")
    with open_store(access) as store:
        request = planned(access, story.SITE_DRILL, None, {}, operator=actor(), trigger="ops demo")
        held, page = hold(access, store, begin(access, store, request).id, actor())
    say_card(held)
    if held.verdict != "PASS":
        raise OpsError(f"the drill ended with {held.verdict}: {held.reason}", where=held.id)
    return page


def _record(access: Access) -> None:
    from ops_platform.ledger.anchored import open_anchored

    _step(8, "The record of all that")
    with open_anchored(access) as anchored:
        found = anchored.verify()
        if not found.ok:
            raise OpsError(f"the ledger is not whole: {found.broken or found.unprotected}", remedy="ops ledger verify")
        anchored.write()
    _say(
        f"{count_of(found.entries, 'entry', 'entries')}, unbroken; a checkpoint is signed by the key service and locked in the store"
    )


def _step(number: int, title: str) -> None:
    click.echo()
    click.secho(f"{number}. {title}", bold=True, fg="cyan")


def _say(text: str) -> None:
    click.echo(f"   {text}")
