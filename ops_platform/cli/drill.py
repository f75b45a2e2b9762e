"""`ops drill` and `ops recover`."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ops_platform.cli.common import Commands, actor, ago, emit, json_option, opened, parse_moment, stamp, table
from ops_platform.counting import count_of, duration
from ops_platform.errors import UsageError

if TYPE_CHECKING:
    from ops_platform.actions import ActionResult
    from ops_platform.clients.access import Access
    from ops_platform.drills.begin import Request
    from ops_platform.drills.model import Drill
    from ops_platform.drills.store import Store

_EXITS = {"PASS": 0, "FAIL": 1, "COULD_NOT_VERIFY": 3}
_SET = click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A parameter of the runbook.")


@click.group(cls=Commands)
def drill() -> None:
    """Drills: what is overdue, hold one, what they found."""


@contextmanager
def _store() -> Generator[tuple[Access, Store]]:
    from ops_platform.drilling import open_store

    with opened() as access, open_store(access) as store:
        yield access, store


def _settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`--set port=5433`: numbers and true or false are what they look like in a runbook."""
    from ops_platform.inventory.document import Document

    found: dict[str, Any] = {}
    for pair in pairs:
        name, mark, value = pair.partition("=")
        if not mark or not name:
            raise UsageError(f"--set: {pair!r} is not NAME=VALUE")
        found[name] = Document(value.encode(), "--set").value if value else ""
    return found


@drill.command(name="list")
@click.option(
    "--held", is_flag=True, help="The drills that were held, newest last, in place of those that are declared."
)
@click.option("--target", help="With --held: of this target alone.")
@json_option
def list_(held: bool, target: str | None, as_json: bool) -> None:
    """Every declared drill on each of its targets: when it was proven, and what is most overdue."""
    from ops_platform.drilling import standing
    from ops_platform.drills.model import Drill
    from ops_platform.drills.overdue import Standing

    with _store() as (access, store):
        drills = store.list(subject=target) if held else []
        found = [] if held else standing(access, store)
    if as_json and held:
        emit(list[Drill], drills)
        return
    if as_json:
        emit(list[Standing], found)
        return
    if held:
        _list_held(drills)
        return
    rows = [
        [s.plan, s.target, s.scenario, "OVERDUE" if s.overdue else "proven", ago(s.proven), s.last_verdict or "-", f"{s.risk:.1f}"]
        for s in found
    ]  # fmt: skip
    table(rows, ["drill", "target", "scenario", "standing", "proven", "last verdict", "risk"])


def _list_held(drills: list[Drill]) -> None:
    rows = [[d.id, d.runbook, d.subject, d.mode, d.state.value, d.verdict or "-", ago(d.started_at)] for d in drills]
    table(rows, ["drill", "runbook", "target", "mode", "state", "verdict", "began"])


@drill.command()
@click.argument("name")
@click.argument("target", required=False)
@_SET
@json_option
@click.pass_context
def plan(ctx: click.Context, name: str, target: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """What the drill NAME would do on TARGET, with its digest and every guard's word. Nothing is begun."""
    from ops_platform.drills.begin import Beginner, planned

    with _store() as (access, store):
        request = planned(access, name, target, _settings(settings), operator=actor(), trigger="by hand")
        result = Beginner(access, store).plan(request)
    if as_json:
        emit(dict[str, Any], result.as_json())
    else:
        _say_plan(result)
    ctx.exit(1 if result.refusals else 0)


def _say_plan(result: ActionResult) -> None:
    change = result.plan.changes[0]
    click.echo(f"{change.object}; plan {result.plan.digest}")
    rows = [[s["step"], s["kind"], s["does"], s["changes"] or "nothing"] for s in change.after["steps"]]
    table(rows, ["step", "kind", "does", "changes"])
    for ruling in result.rulings:
        if ruling.guard != "mode":
            word = click.style("allows ", fg="green") if ruling.allows else click.style("REFUSES", fg="red")
            click.echo(f"{word} {ruling.guard}: {ruling.reason}")


@drill.command()
@click.argument("name", required=False)
@click.argument("target", required=False)
@_SET
@click.option(
    "--go-on", "drill_id", metavar="DRILL", help="Go on with one that waits for a person, or whose worker died."
)
@json_option
@click.pass_context
def run(
    ctx: click.Context,
    name: str | None,
    target: str | None,
    settings: tuple[str, ...],
    drill_id: str | None,
    as_json: bool,
) -> None:
    """Hold the drill NAME on TARGET to its end, in this process."""
    from ops_platform.drills.begin import planned
    from ops_platform.drills.scorecard import card_of

    if (name is None) == (drill_id is None):
        raise UsageError("name a drill of the inventory, or give --go-on with one that was begun")
    with _store() as (access, store):
        if drill_id is not None:
            held = _held_to_its_end(access, store, store.get(drill_id).id)
        else:
            request = planned(access, name or "", target, _settings(settings), operator=actor(), trigger="by hand")
            held = _held(access, store, request)
    if as_json:
        from ops_platform.drills.model import DrillCard

        emit(DrillCard, card_of(held))
    else:
        say_card(held)
    ctx.exit(_EXITS.get(held.verdict or "", 3))


def _held(access: Access, store: Store, request: Request) -> Drill:
    from ops_platform.drilling import begin

    begun = begin(access, store, request)
    more = "" if begun.real else "; Ctrl-C breaks it off, and what it broke is put back"
    click.echo(f"drill {begun.id} began{more}", err=True)
    return _held_to_its_end(access, store, begun.id)


def _held_to_its_end(access: Access, store: Store, drill_id: str) -> Drill:
    from ops_platform.drilling import hold

    try:
        held, report = hold(access, store, drill_id, actor())
    except (KeyboardInterrupt, SystemExit):
        click.echo(_interrupted(store.get(drill_id)), err=True)
        raise
    click.echo(f"report: {report}", err=True)
    return held


def _interrupted(held: Drill) -> str:
    from ops_platform.drills.model import DrillState

    if held.state is DrillState.ENDED:
        return f"{held.id} is {held.ending.value if held.ending else 'ended'}: ops drill show {held.id}"
    if held.state is DrillState.ENDING:
        return f"{held.id} was broken off, and not all of it is put back: ops drill sweep"
    word = f"recover {held.subject}" if held.real else "drill run"
    return f"{held.id} stands as it is ({held.state.value}): ops {word} --go-on {held.id}"


@drill.command()
@click.argument("digest")
def approve(digest: str) -> None:
    """Approve exactly the plan with this DIGEST (whole, as `plan` prints it), as a second person."""
    from ops_platform.drills.workspace import drills_of

    if len(digest) != 64 or any(sign not in "0123456789abcdef" for sign in digest):
        raise UsageError("a digest has 64 hexadecimal digits", remedy="take the whole of it from `ops drill plan`")
    with _store() as (access, store):
        declared = drills_of(access)
        if declared.approvers and actor() not in declared.approvers:
            raise UsageError(f"{actor()} is not among drills.approvers", remedy="ask one of them")
        made = store.approve(digest, "drills", who=actor(), valid_for=declared.approval_valid_for)
    click.echo(f"approved by {made.who}, valid until {stamp(made.expires_at)}")


@drill.command()
@click.argument("drill_id", metavar="DRILL")
@click.option("--why", required=True, help="Stands in the record.")
def abort(drill_id: str, why: str) -> None:
    """Break DRILL off: what was broken is put back, what was made is taken away."""
    from ops_platform.drills.engine import Engine
    from ops_platform.drills.model import Ending
    from ops_platform.errors import ConflictError

    with _store() as (access, store):
        held = store.get(drill_id)
        if not store.abort(held, why, who=actor()):
            click.echo(f"{held.id} is {held.state.value}: there is nothing to break off")
            return
        try:
            # Nobody may be at work on it: then its end is ours.
            Engine(access, store, actor()).end(held.id, Ending.ABORTED, why)
            click.echo(f"{held.id} is aborted, and everything is put back")
        except ConflictError:
            click.echo(f"{held.id} will be put back by whoever works on it; ops drill show {held.id}")


@drill.command()
@json_option
def sweep(as_json: bool) -> None:
    """End drills whose worker died, and take away what they left on this machine."""
    from ops_platform.drills.engine import Engine
    from ops_platform.drills.model import Drill

    with _store() as (access, store):
        done = Engine(access, store, actor()).sweep()
    if as_json:
        emit(list[Drill], done)
    else:
        click.echo("\n".join(f"{one.id} on {one.subject}" for one in done) or "nothing was left")


@drill.command()
@click.argument("drill_id", metavar="DRILL")
@json_option
def show(drill_id: str, as_json: bool) -> None:
    """One drill: its steps, what was measured, what was found, what became of what it made."""
    from ops_platform.drills.model import Drill

    with _store() as (_access, store):
        found = store.get(drill_id)
        steps = store.steps(found.id)
    if as_json:
        emit(Drill, found)
        return
    if found.card is not None:
        say_card(found)
        return
    click.echo(f"{found.id} {found.runbook} on {found.subject}: {found.state.value} {found.reason}")
    rows = [
        [r.step, r.state.value, duration(r.seconds) if r.seconds is not None else "-", r.said] for r in steps.values()
    ]
    table(rows, ["step", "state", "took", "said"])


def say_card(found: Drill) -> None:
    from ops_platform.drills.scorecard import card_of

    card = card_of(found)
    if card is None:
        click.echo(f"{found.id} is {found.state.value}")
        return
    color = {"PASS": "green", "FAIL": "red"}.get(card.verdict, "yellow")
    click.echo(f"{click.style(card.verdict.replace('_', ' '), fg=color, bold=True)}  {card.title}")
    click.echo(f"{card.target}, {card.drill}, {card.ending}: {card.reason}\n")
    table(
        [[s.title, s.state, duration(s.seconds) if s.seconds is not None else "-", "*" if s.critical else "", s.said.splitlines()[0] if s.said else ""]
         for s in card.steps],
        ["step", "state", "took", "critical", "said"],
    )  # fmt: skip
    for objective in card.objectives:
        kept = {True: "kept", False: "MISSED", None: "not judged"}[objective.met]
        measured = duration(objective.measured) if objective.measured is not None else "not measured"
        click.echo(
            f"\n{objective.name.upper()} {measured} of {duration(objective.objective)}: {kept} ({objective.how})",
            nl=False,
        )
    click.echo()
    if card.stack:
        table(
            [[p.target, p.verdict.replace("_", " "), duration(p.seconds) if p.seconds is not None else "-", ", ".join(p.needs) or "-",
              "*" if p.critical else "", duration(p.gain) if p.gain is not None else ""] for p in card.stack],
            ["restored", "verdict", "served after", "needs", "critical", "gain at most"],
        )  # fmt: skip
    for probe in card.probes:
        click.echo(
            f"{probe.step}: {count_of(probe.attempts, 'attempt')}, unavailable for {duration(probe.unavailable_seconds)}"
        )
    for finding in card.findings:
        click.echo(f"finding {finding.id}: {finding.title}; {finding.owner} until {stamp(finding.due)}")


@drill.command()
@click.argument("drill_id", metavar="DRILL")
@click.argument("step")
@click.option("--text", required=True, help="What was done, and what came of it.")
@click.option(
    "--evidence",
    "files",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file; its SHA-256 is recorded.",
)
def answer(drill_id: str, step: str, text: str, files: tuple[Path, ...]) -> None:
    """Say that the STEP that DRILL waits for is done."""
    from ops_platform.drills.runbook import runbook_of

    try:
        evidence = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    except OSError as error:
        raise UsageError(f"the evidence cannot be read: {error.strerror}", where=str(error.filename)) from None
    with _store() as (_access, store):
        held = store.get(drill_id)
        found: Any = next((s for s in runbook_of(held).steps if s.id == step), None)
        if found is not None and found.kind == "human" and found.evidence and not evidence:
            raise UsageError(f"the step {step} asks for evidence", remedy="--evidence FILE")
        store.answer(held, step, text, evidence, who=actor())
    click.echo(f"recorded; where nobody holds the drill: ops drill run --go-on {held.id}")


@drill.command()
@click.option("--all", "everything", is_flag=True, help="Those that are gone, too.")
@click.option("--target", help="Of this target alone.")
@click.option("--assign", "finding", metavar="FINDING", help="Change this finding: with --owner, --due, --note.")
@click.option("--owner", help="Who deals with it.")
@click.option("--due", metavar="TIME", help="Until when, with its zone.")
@click.option("--note", help="What is being done about it.")
@json_option
def findings(
    everything: bool,
    target: str | None,
    finding: str | None,
    owner: str | None,
    due: str | None,
    note: str | None,
    as_json: bool,
) -> None:
    """What drills found wrong, the most urgent first. A finding goes when a later drill shows that it is gone."""
    from ops_platform.drills.model import Finding

    if finding is None and (owner or due or note):
        raise UsageError("--owner, --due and --note go with --assign")
    at = parse_moment(due, option="--due") if due else None
    with _store() as (_access, store):
        if finding is not None:
            found = [store.assign(finding, owner=owner, due=at, note=note, actor=actor())]
        else:
            found = store.findings(all_=everything, subject=target)
    if as_json:
        emit(list[Finding], found)
        return
    rows = [[f.id, f.state.value, f.subject, f.title, f.owner, stamp(f.due), str(f.seen), f.note] for f in found]
    table(rows, ["finding", "state", "target", "what", "owner", "due", "seen", "note"])


@click.command()
@click.argument("target")
@click.option(
    "--runbook", default="restore-drill", show_default=True, help="The runbook, which has to be meant for earnest."
)
@_SET
@click.option("--go", is_flag=True, help="Do it; without, it is only said what would be done, and what its digest is.")
@click.option(
    "--approve", "digest", help="Approve this very plan yourself; counts where drills.recover_alone allows it."
)
@click.option("--go-on", "drill_id", metavar="DRILL", help="Go on with a recovery that broke off.")
@json_option
@click.pass_context
def recover(
    ctx: click.Context, target: str, runbook: str, settings: tuple[str, ...], go: bool, digest: str | None,
    drill_id: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Recover TARGET in earnest: the same runbook as the drill, without what breaks things, with an approval."""
    from ops_platform.drills.begin import Beginner, in_earnest
    from ops_platform.drills.scorecard import card_of
    from ops_platform.drills.workspace import drills_of

    with _store() as (access, store):
        if drill_id is not None:
            held = _held_to_its_end(access, store, store.get(drill_id).id)
        else:
            request = in_earnest(access, runbook, target, _settings(settings), operator=actor())
            if digest is not None:
                valid = drills_of(access).approval_valid_for
                store.approve(digest, request.subject.id, who=actor(), valid_for=valid)
            if not go:
                result = Beginner(access, store).plan(request)
                if as_json:
                    emit(dict[str, Any], result.as_json())
                else:
                    _say_plan(result)
                ctx.exit(1 if result.refusals else 0)
            held = _held(access, store, request)
    if as_json:
        from ops_platform.drills.model import DrillCard

        emit(DrillCard, card_of(held))
    else:
        say_card(held)
    ctx.exit(_EXITS.get(held.verdict or "", 3))
