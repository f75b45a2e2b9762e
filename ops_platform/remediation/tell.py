"""Telling people: the messages that were written with each change of an incident go to Slack, one thread for each incident.

A message says what fires, what will be done, why that is safe, and how to stop it. Labels, annotations and data of a signal are left
out, and whatever looks like an address of a person or a secret in a reason is masked: a channel is no place for either.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ops_platform.clients.slack import LONGEST, escape, fitting
from ops_platform.counting import count_of
from ops_platform.errors import OpsError, UnreachableError
from ops_platform.remediation.model import Incident, Message, State
from ops_platform.remediation.playbook import playbook
from ops_platform.remediation.rules import remediation_of
from ops_platform.remediation.store import Store

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.clients.slack import Slack
    from ops_platform.inventory.model import Inventory

PER_TICK = 40  # Slack takes about one message a second in a channel
STORM = 20  # incidents of which nobody was told yet: more than these are told of in one message
OLD = timedelta(days=1)  # by then whoever has to know has heard of it elsewhere
# Nobody needs to hear that something was opened, nor that what nobody heard of is over.
_QUIET = frozenset({State.OPEN})
_PRESSING = frozenset({State.WAITING, State.ESCALATED})
_MASKS = (
    (re.compile(r"(?i)\b(pass(?:word|wd)?|secret|token|api[_-]?key|authorization)\b(\s*[=:]\s*)\S+"), r"\1\2***"),
    (re.compile(r"://[^\s/@:]+:[^\s/@]+@"), "://***@"),
    (re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b"), "***@***"),
    (re.compile(r"\b(?:hv[sbr]\.|s\.|xox[a-z]-|gh[pousr]_|AKIA|eyJ)[A-Za-z0-9._-]{12,}"), "***"),
)
_HEADS = {
    State.OBSERVED: ":eyes: Only observed",
    State.SUPPRESSED: ":hourglass: Not done now",
    State.WAITING: ":raised_hand: Needs your approval",
    State.APPLYING: ":wrench: Being done",
    State.VERIFYING: ":mag: Done, being verified",
    State.HELD: ":white_check_mark: It helped, for a time",
    State.UNDOING: ":leftwards_arrow_with_hook: Being undone",
    State.ESCALATED: ":rotating_light: You are needed",
    State.CLOSED: ":white_check_mark: Over",
    State.OPEN: ":bell: It fires",
}


def tell_everybody(access: Access, store: Store) -> list[str]:
    """Send what is unsent, in order for each incident. Returns what could not be sent, and why; it is tried again.

    Without Slack nothing waits: the day that has it does not begin with what happened before.
    """
    slack = access.slack()
    if slack is None:
        store.pass_over_unsent()
        return []
    teller = _Teller(access, store, slack)
    unsent = teller.without_old(store.unsent(limit=1000))
    untold = {m.incident for m in unsent if teller.incident(m).thread is None and m.state not in _QUIET}
    if len(untold) > STORM:
        unsent = teller.digest(unsent, untold)
    return teller.send(unsent)


class _Teller:
    def __init__(self, access: Access, store: Store, slack: Slack) -> None:
        self._access, self._store, self._slack = access, store, slack
        self._incidents: dict[str, Incident] = {}

    def incident(self, message: Message) -> Incident:
        if message.incident not in self._incidents:
            self._incidents[message.incident] = self._store.get(message.incident)
        return self._incidents[message.incident]

    def without_old(self, messages: Sequence[Message]) -> list[Message]:
        """Old ones are passed over, but for the last of an incident that still needs somebody."""
        last = {m.incident: m.id for m in messages}
        left: list[Message] = []
        for m in messages:
            needed = m.state in _PRESSING and m.state is self.incident(m).state and m.id == last[m.incident]
            if needed or self._age(m) <= OLD:
                left.append(m)
            else:
                self._store.sent(m)
        return left

    def _age(self, message: Message) -> timedelta:
        return self._store.clock.now() - message.at

    def send(self, messages: Sequence[Message]) -> list[str]:
        failed: dict[str, str] = {}
        sent = 0
        for message in messages:
            incident = self.incident(message)
            if message.incident in failed:
                continue
            if message.state in _QUIET or (message.state is State.CLOSED and incident.thread is None):
                self._store.sent(message)
                continue
            if sent >= PER_TICK:
                break
            try:
                self._send(message, incident)
                sent += 1
            except UnreachableError as error:
                return [*failed.values(), str(error)]  # nothing else gets through either
            except OpsError as error:
                failed[message.incident] = f"{message.incident}: {error}"
        return list(failed.values())

    def _send(self, message: Message, incident: Incident) -> None:
        channel, _, thread = (incident.thread or "").partition("/")
        if not thread:
            channel = channel_of(self._access.inventory, incident)
        blocks = render(self._access.inventory, incident, message, old=self._age(message) > OLD)
        ts = self._slack.post(channel, headline(incident, message), blocks, thread=thread or None)
        self._store.sent(message, thread=f"{channel}/{ts}")
        del self._incidents[incident.id]

    def digest(self, messages: Sequence[Message], untold: set[str]) -> list[Message]:
        """One message for a storm; those that need somebody are told of one by one all the same."""
        pressing = {m.incident for m in messages if m.state in _PRESSING}
        told = [m for m in messages if m.incident in untold - pressing]
        newest = {m.incident: m.state for m in told}
        rules = Counter(
            (self.incident(m).rule, newest[m.incident].value) for m in {m.incident: m for m in told}.values()
        )
        lines = [f"• {escape(rule)}: {number} {state}" for (rule, state), number in rules.most_common(20)]
        text = f"{count_of(len(newest), 'incident')} at once"
        body = "\n".join(
            [
                f":warning: *{text}*",
                *lines,
                "`ops incidents list` shows them, `ops incidents pause-all` stops everything",
            ]
        )
        self._slack.post(remediation_channel(self._access.inventory), text, [_section(body[:LONGEST])])
        for message in told:
            self._store.sent(message)
        done = {m.id for m in told}
        return [m for m in messages if m.id not in done]


def remediation_channel(inventory: Inventory) -> str:
    chat = remediation_of(inventory).slack
    return chat.channel if chat is not None else ""


def channel_of(inventory: Inventory, incident: Incident) -> str:
    """The owner's own channel, else that for incidents."""
    try:
        owner = inventory.owners[inventory.subject(incident.subject).owner]
    except (OpsError, KeyError):
        return remediation_channel(inventory)
    return owner.slack or remediation_channel(inventory)


def masked(text: str) -> str:
    """Without what looks like a secret or a person's address."""
    for pattern, instead in _MASKS:
        text = pattern.sub(instead, text)
    return text


def headline(incident: Incident, message: Message) -> str:
    """For the notification on a phone."""
    head = _HEADS[message.state].partition(": ")[2]
    return escape(f"{head}: {masked(incident.signal.name)} on {incident.subject}")


def render(inventory: Inventory, incident: Incident, message: Message, *, old: bool = False) -> list[dict[str, Any]]:
    """Slack's blocks. The first message of an incident says all; later ones what changed, and old ones since when."""
    state = message.state
    text = [f"*{_HEADS[state]}*: {escape(masked(incident.signal.name))} on *{escape(incident.subject)}*"]
    if old:
        text.append(f"So it has been since {message.at:%Y-%m-%d %H:%M} UTC; it could not be told before.")
    text.append(fitting(masked(message.reason), 1200))
    blocks = [_section("\n".join(text))]
    if incident.thread is None or state is State.WAITING:
        blocks.append(_section(_what(incident)))
    if state is State.WAITING and message.version == incident.version and _has_buttons(inventory):
        blocks.append(_buttons(incident))
    blocks.append({"type": "context", "elements": [{"type": "mrkdwn", "text": _foot(incident)}]})
    return blocks


def _what(incident: Incident) -> str:
    lines = [f"Rule `{escape(incident.rule)}`, since {incident.signal.starts_at:%Y-%m-%d %H:%M} UTC"]
    try:
        book = playbook(incident.playbook)
        lines += [f"*What*: {escape(book.title)}", f"*Why it is safe*: {escape(book.why_safe)}"]
        lines.append(f"*Way back*: {escape(book.undo_text or 'none: it cannot be undone')}")
    except OpsError:
        lines.append(f"Playbook `{escape(incident.playbook)}`")
    if incident.plan is not None:
        changes = incident.plan["changes"]
        shown = [
            f"• {escape(masked(str(change['kind'])))} `{fitting(masked(str(change['object'])), 120)}`"
            for change in changes[:8]
        ]
        more = [f"… and {len(changes) - 8} more"] if len(changes) > 8 else []
        lines += [f"*Plan* `{(incident.digest or '')[:12]}`:", *shown, *more]
    return "\n".join(lines)[:LONGEST]


def _foot(incident: Incident) -> str:
    stop = "`ops incidents pause-all --why …` stops everything"
    return f"`{incident.id}` · `ops incidents show {incident.id}` · {stop}"


def _has_buttons(inventory: Inventory) -> bool:
    chat = remediation_of(inventory).slack
    return chat is not None and chat.signing_secret is not None


def _buttons(incident: Incident) -> dict[str, Any]:
    def button(action: str, style: str) -> dict[str, Any]:
        return {
            "type": "button",
            "action_id": action,
            "style": style,
            "text": {"type": "plain_text", "text": action.capitalize()},
            "value": f"{incident.id}/{incident.digest}",
        }

    return {"type": "actions", "elements": [button("approve", "primary"), button("refuse", "danger")]}


def _section(text: str) -> dict[str, Any]:
    return {"type": "section", "text": {"type": "mrkdwn", "text": text}}
