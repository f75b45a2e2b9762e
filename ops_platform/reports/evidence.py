"""The cover of an evidence pack: what a person reads who is not going to run a program."""

from __future__ import annotations

from typing import Any

from ops_platform.ledger import Entry
from ops_platform.ledger.pack import Cover
from ops_platform.reports.html import render

# What a body says of itself in a word or two, in the order in which it is read.
_TELLING = (
    "title",
    "action",
    "rule",
    "runbook",
    "drill",
    "step",
    "playbook",
    "object",
    "backup_id",
    "copy",
    "store",
    "objects",
    "bytes",
    "until",
    "verdict",
    "outcome",
    "status",
    "state",
    "ending",
    "reason",
    "said",
    "summary",
    "owner",
    "due",
    "closed_by",
)
_MOST = 220


def evidence_cover(cover: Cover) -> str:
    """The page. Every text of an entry is escaped, and what is long is cut: the whole of it stands in the pack's entries."""
    return render("evidence.html.j2", cover=cover, now=cover.made_at, gist=gist)


def gist(entry: Entry) -> str:
    """`object pod/web-1 · outcome applied`: what an entry's body says that a person wants to know first."""
    body = entry.body
    plan = body.get("plan")
    told: dict[str, Any] = {**(plan if isinstance(plan, dict) else {}), **body}
    words = [
        f"{name} {told[name]}"
        for name in _TELLING
        if isinstance(told.get(name), str | int | float) and told[name] != ""
    ]
    text = " · ".join(words) or entry.text
    return text if len(text) <= _MOST else f"{text[: _MOST - 1]}…"
