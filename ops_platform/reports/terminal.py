"""The scorecard and the list of backups in a terminal: 80 columns, with or without colour, in ASCII where it must be.

Nothing depends on colour: each verdict and status is a word too. What comes from a record is printed as text, never as
markup, and without the characters that a terminal obeys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ops_platform.backup.model import BackupInfo, RecoveryWindow
from ops_platform.counting import duration, size
from ops_platform.recovery.model import Gate, GateStatus, Objective, Scorecard, Step, Verdict
from ops_platform.reports.chains import listed
from ops_platform.reports.progress import progress_bar
from ops_platform.reports.standing import contradiction, holes_of, shown, verdict_words
from ops_platform.reports.words import capital, day, moment, plain, shortened, utc

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

__all__ = ["backups_table", "print_scorecard", "progress_bar", "window_lines"]

WIDEST = 110
WIDE = 104

_VERDICT_STYLES = {
    Verdict.PASS: "bold white on green",
    Verdict.FAIL: "bold white on red",
    Verdict.COULD_NOT_VERIFY: "bold black on yellow",
}
_WORD_STYLES = {Verdict.PASS: "bold green", Verdict.FAIL: "bold red", Verdict.COULD_NOT_VERIFY: "bold yellow"}
_GATE_WORDS = {
    GateStatus.PASSED: ("passed", "green"),
    GateStatus.FAILED: ("FAILED", "bold red"),
    GateStatus.COULD_NOT_CHECK: ("NOT CHECKED", "bold yellow"),
    GateStatus.NOT_APPLICABLE: ("n/a", "dim"),
}
_OBJECTIVES = {
    "rpo": "RPO, data that would be lost",
    "rto": "RTO, this restore",
    "rto-full": "RTO, whole target (estimate)",
}
_ASCII = str.maketrans(
    {"…": "...", "–": "-", "—": "-", "→": "->", "·": "-", "’": "'", "“": '"', "”": '"', "\u00a0": " "}
)


def print_scorecard(scorecard: Scorecard, console: Console) -> None:
    """The whole record of one verification: the verdict first, what stands in its way next, the evidence below."""
    page = _Page(console)
    page.verdict(scorecard)
    page.facts(scorecard)
    page.objectives(scorecard.objectives)
    page.steps(scorecard.steps)
    page.gates(scorecard.gates)
    page.notes(scorecard)


class _Page:
    def __init__(self, console: Console) -> None:
        self.console = console
        self.width = min(console.width, WIDEST)
        self.ascii = console.options.ascii_only

    def text(self, content: str, style: str = "") -> Text:
        from rich.text import Text

        content = plain(content)
        if self.ascii:
            content = content.translate(_ASCII).encode("ascii", "backslashreplace").decode()
        return Text(content, style, overflow="fold")

    def show(self, *what: RenderableType) -> None:
        self.console.print(*what, width=self.width, soft_wrap=False, highlight=False)

    def heading(self, title: str) -> None:
        self.show("")
        self.show(self.text(title, "bold"))

    def table(self, *columns: tuple[str, str], least: int | None = None) -> Table:
        """`columns`: title, and `l`, `r`, or `*` for the one that takes what is left, and is `least` wide."""
        from rich import box
        from rich.table import Table

        made = Table(
            box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, width=self.width, header_style="dim", show_edge=False
        )
        for title, kind in columns:
            right, grows = kind == "r", kind == "*"
            made.add_column(
                title,
                justify="right" if right else "left",
                no_wrap=right,
                overflow="fold",
                ratio=1 if grows else None,
                min_width=least if grows else None,
            )
        return made

    def verdict(self, card: Scorecard) -> None:
        from rich import box
        from rich.panel import Panel
        from rich.text import Text

        verdict = shown(card)
        lines = [self.text(verdict_words(verdict)), self.text(card.target_id), Text("")]
        lines.append(self.text(shortened(contradiction(card) or card.reason, 400)))
        frame = Panel(
            Text("\n").join(lines), box=box.HEAVY, style=_VERDICT_STYLES[verdict], padding=(1, 3), width=self.width
        )
        self.show("")
        self.show(frame)

    def facts(self, card: Scorecard) -> None:
        from rich.table import Table

        grid = Table.grid(padding=(0, 2), expand=False)
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        chain = f", a chain of {len(card.chain)}" if len(card.chain) > 1 else ""
        facts = [
            ("target", f"{card.target_id} ({card.environment}, {card.classification})"),
            ("verified", f"{moment(card.ended_at)}, in {duration(card.ended_at - card.started_at)}"),
            (
                "backup",
                f"{card.backup_id} ({card.backup_kind or 'unknown kind'}{chain}; picked: {card.picked})"
                if card.backup_id
                else "none",
            ),
            ("asked for", card.recovery_target),
            ("reached", card.reached or "not reached"),
            ("newest commit", moment(card.newest_commit) if card.newest_commit else "none found"),
            (
                "window",
                f"{moment(card.window_earliest)} to {moment(card.window_latest)}"
                if card.window_earliest and card.window_latest
                else "unknown",
            ),
            ("sandbox", card.server),
            (
                "strength",
                card.strength + (": weaker, no canary rows were written" if card.strength == "observed" else ""),
            ),
        ]
        for name, value in facts:
            grid.add_row(self.text(name), self.text(value))
        self.show("")
        self.show(grid)

    def objectives(self, objectives: Sequence[Objective]) -> None:
        self.heading("Objectives")
        table = self.table(("", "*"), ("measured", "r"), ("promised", "r"), ("", "l"))
        for each in objectives:
            word, style = _kept(each)
            value = "-" if each.measured_seconds is None else duration(each.measured_seconds)
            name = self.text(_OBJECTIVES.get(each.name, each.name)).append(self.text(f"\n{each.how}", "dim"))
            table.add_row(
                name, self.text(value, "bold"), self.text(duration(each.objective_seconds)), self.text(word, style)
            )
        self.show(table)

    def steps(self, steps: Sequence[Step]) -> None:
        if not steps:
            return
        total = max(step.started + step.seconds for step in steps)
        self.heading(f"Steps, {duration(total)} in all")
        table = self.table(("", "l"), ("", "*"), ("took", "r"), ("moved", "r"))
        longest = max(len(plain(step.name)) for step in steps)
        room = max(self.width - min(longest, 30) - 29, 10)
        for step in steps:
            bar = self.text(_bar(step, total, room, self.ascii), "blue")
            moved = "" if step.bytes is None else size(step.bytes)
            table.add_row(self.text(capital(step.name)), bar, self.text(duration(step.seconds)), self.text(moved))
        self.show(table)

    def gates(self, gates: Sequence[Gate]) -> None:
        counts = {status: sum(gate.status is status for gate in gates) for status in GateStatus}
        said = ", ".join(f"{number} {_GATE_WORDS[status][0]}" for status, number in counts.items() if number)
        self.heading(f"Checks: {said or 'none was made'}")
        if not gates:
            return
        table = self.table(("", "l"), ("check", "*"), ("took", "r"))
        for gate in gates:
            word, style = _GATE_WORDS[gate.status]
            about = self.text(gate.title)
            about.append(self.text(f"\n{_brief(gate)}", "" if gate.status in _LOUD else "dim"))
            table.add_row(self.text(word, style), about, self.text(duration(gate.seconds)))
        self.show(table)

    def proof(self, backup: BackupInfo) -> Text:
        if backup.proof is None:
            return self.text("not tried", "dim")
        verdict = Verdict(backup.proof.verdict)
        when = self.text(f" {day(backup.proof.verified_at)}", "default")
        return self.text(verdict_words(verdict), _WORD_STYLES[verdict]).append(when)

    def notes(self, card: Scorecard) -> None:
        if card.notes:
            self.heading("Notes")
            for note in card.notes:
                self.show(self.text(f"- {note}"))
        self.show("")
        self.show(self.text(f"record {card.verification_id}, written by {card.written_by}", "dim"))


def _kept(objective: Objective) -> tuple[str, str]:
    if objective.met is None:
        return ("not judged" if objective.measured_seconds is not None else "not measured"), "bold yellow"
    return ("kept", "green") if objective.met else ("MISSED", "bold red")


_LOUD = (GateStatus.FAILED, GateStatus.COULD_NOT_CHECK)


def _brief(gate: Gate) -> str:
    """A passed gate's result in one line; what stands in the way of a PASS with its id and at length."""
    result = shortened(gate.result, 600 if gate.status in _LOUD else 160)
    return f"{gate.id}: {result}" if gate.status in _LOUD else result


def _bar(step: Step, total: float, room: int, ascii_only: bool) -> str:
    """The step's place in the whole, as on a timeline. Every step has a mark, however short."""
    begin = min(int(room * step.started / total), room - 1) if total else 0
    length = max(round(room * step.seconds / total), 1) if total else 1
    length = min(length, room - begin)
    full, rest = ("#", ".") if ascii_only else ("█", "·")
    return rest * begin + full * length + rest * (room - begin - length)


def backups_table(infos: Sequence[BackupInfo], console: Console) -> None:
    """The backups, the newest chain first, each incremental below what it builds on."""
    page = _Page(console)
    if not infos:
        page.show(page.text("No backup is in the store."))
        return
    wide = page.width >= WIDE
    more = (("ended (UTC)", "l"), ("PostgreSQL", "l")) if wide else ()
    longest = max(len(plain(b.backup_id)) for b in infos) + 2
    table = page.table(
        ("backup", "*"),
        ("took", "r"),
        ("size", "r"),
        ("stored", "r"),
        *more,
        ("last proof", "l"),
        least=min(longest, 36),
    )
    for each in listed(infos):
        name = page.text("  " * min(each.depth, 1) + each.info.backup_id)
        if each.info.error:
            name.append(page.text(f"\nCANNOT BE READ: {each.info.error}", "bold red"))
        elif each.orphan:
            name.append(page.text("\nUSELESS ALONE: its full backup is not in the store", "bold red"))
        table.add_row(name, *(page.text(cell) for cell in _cells(each.info, wide)), page.proof(each.info))
    page.show(table)


def _cells(b: BackupInfo, wide: bool) -> list[str]:
    """The figures of a backup; none where it cannot be read, because a zero would be one."""
    if b.error:
        return [""] * (5 if wide else 3)
    cells = [duration(utc(b.ended_at) - utc(b.started_at)), size(b.raw), size(b.stored)]
    if wide:
        cells += [f"{utc(b.ended_at):%Y-%m-%d %H:%M}", f"{b.server_version // 10000}.{b.server_version % 10000}"]
    return cells


def window_lines(window: RecoveryWindow) -> list[str]:
    """The recovery window in words, with what is missing in it."""
    if window.earliest is None or window.latest is None:
        lines = ["nothing can be restored: the store holds no usable backup with its WAL"]
    else:
        lines = [
            f"restorable: {moment(begin)} to {moment(end)} ({duration(utc(end) - utc(begin))})"
            for begin, end in window.pieces
        ]
        lines += [
            f"not restorable: {moment(begin)} to {moment(end)} ({duration(end - begin)})"
            for begin, end in holes_of(window)
        ]
    for gap in window.gaps:
        again = (
            f"recovery is possible again from backup {gap.recovery_again_from}"
            if gap.recovery_again_from
            else "no later backup bridges it: take a new one"
        )
        lines.append(f"gap: WAL of timeline {gap.timeline} is missing from {gap.first} to {gap.last}; {again}")
    return lines
