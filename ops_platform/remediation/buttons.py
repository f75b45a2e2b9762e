"""What Slack's buttons send: verified, taken once, and turned into a decision on exactly the plan that was shown.

`POST /slack/interactive` takes Slack's form with `payload`; everything else is refused. It listens behind whatever brings Slack's requests
to it, with TLS there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qs

from ops_platform.clients.slack import need_signed
from ops_platform.errors import AccessDeniedError, ConflictError, OpsError, UnreachableError, UsageError
from ops_platform.remediation.rules import remediation_of
from ops_platform.remediation.store import Store
from ops_platform.serving import Handler, Page, Server, listen

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory.remediation import Chat
    from ops_platform.inventory.values import SecretRef

_LOG = logging.getLogger("ops_platform.slack")
LARGEST = 1 << 20
PATH = "/slack/interactive"


def take(access: Access, store: Store, headers: Mapping[str, str], body: bytes) -> str:
    """A request of Slack becomes a decision; the text that answers it. `headers` by their names in lower case.

    Raises AccessDeniedError for what Slack did not sign just now, what was taken before, and for people who may not decide; UsageError for
    what is no press of our buttons; ConflictError where the plan is another one by now.
    """
    _need_slack(access, store, headers, body)
    return _decided(access, store, body)


def _with_buttons(access: Access) -> tuple[Chat, SecretRef]:
    chat = remediation_of(access.inventory).slack
    if chat is None or chat.signing_secret is None:
        raise UsageError(
            "buttons are off", where="remediation.slack.signing_secret", remedy="set it to Slack's signing secret"
        )
    return chat, chat.signing_secret


def _need_slack(access: Access, store: Store, headers: Mapping[str, str], body: bytes) -> None:
    _, ref = _with_buttons(access)
    timestamp, signature = headers.get("x-slack-request-timestamp", ""), headers.get("x-slack-signature", "")
    need_signed(access.secret(ref), timestamp, signature, body, store.clock.now().timestamp(), named=str(ref))
    if not store.first_time(signature):
        raise AccessDeniedError("this request was taken before", where="x-slack-signature")


def _decided(access: Access, store: Store, body: bytes) -> str:
    whole, (chat, _) = remediation_of(access.inventory), _with_buttons(access)
    user, action, incident_id, digest = _pressed(body)
    who = chat.people.get(user)
    if who is None:
        raise AccessDeniedError(
            "your Slack account is not known here",
            where=f"Slack user {user}",
            remedy="add it to remediation.slack.people",
        )
    incident = store.get(incident_id)
    if action == "approve":
        need_approver(incident.proposed_by, who, whole.approvers, incident.id)
    store.decide(incident, digest, action, who=who, via="slack", valid_for=whole.approval_valid_for)
    return f"{who} has {'approved' if action == 'approve' else 'refused'} the plan {digest[:12]} of {incident.id}."


def need_approver(proposed_by: str, who: str, approvers: list[str], where: str) -> None:
    """Said at once; the guard judges again when the plan is applied. Raises AccessDeniedError."""
    if who == proposed_by:
        raise AccessDeniedError(f"{who} proposed it and cannot approve it", where=where)
    if approvers and who not in approvers:
        raise AccessDeniedError(
            f"{who} is not among those who may approve", where=where, remedy="remediation.approvers lists them"
        )


def _pressed(body: bytes) -> tuple[str, str, str, str]:
    """Slack user, action, incident, digest."""
    try:
        payload: Any = json.loads(parse_qs(body.decode(), strict_parsing=True)["payload"][0])
        pressed = payload["actions"][0]
        incident, _, digest = pressed["value"].partition("/")
        user, action = payload["user"]["id"], pressed["action_id"]
        if payload["type"] != "block_actions" or action not in ("approve", "refuse") or not incident or not digest:
            raise ValueError("not one of our buttons")
        return str(user), str(action), str(incident), str(digest)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UsageError(f"this is no press of a button of ours: {error}", where=PATH) from None


_STATUS: dict[type[OpsError], int] = {
    AccessDeniedError: 403,
    ConflictError: 409,
    UsageError: 400,
    UnreachableError: 503,
}


def _status(error: OpsError) -> int:
    return next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)


class _Refused:
    """Says why requests are refused, once until another reason or a good one comes: anybody may send them."""

    def __init__(self) -> None:
        self._known = ""

    def say(self, why: str) -> None:
        if why and why != self._known:
            _LOG.warning("a request is refused: %s", why)
        self._known = why


def serve(access: Access, store: Store, host: str, port: int) -> Server:
    """Serve in a thread of its own until `shutdown`. Raises UsageError for an address that cannot be had.

    Raises what `Access.secret` raises where the signing secret cannot be had: every press would be refused.
    """
    access.secret(_with_buttons(access)[1])
    refused = _Refused()

    class OfSlack(Handler):
        pages: ClassVar[Mapping[str, Page]] = {"/healthz": lambda: (200, b"ok\n", "text/plain")}

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if self.path != PATH or not length.isdecimal() or int(length) > LARGEST:
                self.answer(404 if self.path != PATH else 413, b"", "application/json")
                return
            body = self.rfile.read(int(length))
            try:
                _need_slack(access, store, {k.lower(): v for k, v in self.headers.items()}, body)
                refused.say("")
            except OpsError as error:
                # Who sent no signature is told nothing but the status, and whoever runs this what to do.
                refused.say(error.line)
                self.answer(_status(error), b"", "application/json")
                return
            try:
                self._say(200, _decided(access, store, body))
            except OpsError as error:
                # Slack shows people what comes with 200 alone.
                status = _status(error)
                self._say(200 if status in (409, 403) else status, error.what)

        def _say(self, status: int, text: str) -> None:
            said = {"response_type": "ephemeral", "replace_original": False, "text": text}
            self.answer(status, json.dumps(said).encode(), "application/json")

    return listen(OfSlack, host, port)
