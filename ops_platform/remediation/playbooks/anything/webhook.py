"""Tells another program to act, by a signed HTTP request.

The signature, HMAC-SHA256 over the time, a dot and the body's bytes, lets the receiver know who asks and that nothing was changed;
the time lets it refuse what is replayed later, the key what it has done already. docs/how-to/receive-a-webhook.md has the other side.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Self
from urllib.parse import quote, urlsplit

from pydantic import Field, model_validator

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.counting import count_of
from ops_platform.errors import AccessDeniedError, NotThereError, OpsError, UnreachableError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import PositiveDuration, SecretRef, Url
from ops_platform.remediation.playbook import Context, Playbook

if TYPE_CHECKING:
    from ops_platform.clients.http import HttpApi

ANY_KIND = frozenset(
    {"postgresql", "kubernetes", "kafka", "redis", "elasticsearch", "vault", "prometheus", "alertmanager"}
)
SIGNATURE, TIMESTAMP, KEY = "Ops-Signature", "Ops-Timestamp", "Idempotency-Key"
_LONGEST_PAUSE = 30.0
_LARGEST_ANSWER = 1 << 20


class StatusCheck(Strict):
    """Where the receiver says how it stands: by another way than the answer to the request."""

    url: Url = Field(
        description="Asked with GET; `{incident}` and `{subject}` stand for their ids. 404 means: not yet."
    )
    field: str = Field(description="Field of the JSON that it answers; a.b is b in a.")
    equals: str | int | bool = Field(description="What the field says once it is done.")
    within: PositiveDuration = Field(default=timedelta(minutes=2), description="It must say so by then.")
    every: PositiveDuration = Field(default=timedelta(seconds=5), description="How often it is asked.")


class WebhookParameters(Strict):
    """Of `http.webhook`."""

    url: Url = Field(
        description="Where the request goes, with its path: https://queues.example.com/drain. Redirects are not followed."
    )
    secret: SecretRef = Field(description="The secret that receiver and sender share.")
    body: dict[str, Any] = Field(
        default={}, description="Stands in the request as `data`, and in plan and ledger: no secrets, no personal data."
    )
    ca: str | None = Field(default=None, description="PEM file of the receiver's certificate authority.")
    plain_http: bool = Field(
        default=False,
        description="Allow http:// to another machine, where a service mesh encrypts it. Otherwise only https://.",
    )
    timeout: PositiveDuration = Field(default=timedelta(seconds=10), description="One request takes at most this long.")
    attempts: Annotated[int, Field(ge=1, le=10)] = Field(
        default=4, description="Tries, with longer and longer pauses, while it does not answer or answers 429 or 5xx."
    )
    status: StatusCheck | None = Field(default=None, description="How it is found out that the receiver did it.")

    @model_validator(mode="after")
    def _encrypted(self) -> Self:
        for url in (self.url, *([self.status.url] if self.status else [])):
            parts = urlsplit(url)
            near = parts.scheme == "local" or parts.hostname in ("localhost", "127.0.0.1", "::1")
            if parts.scheme == "http" and not near and not self.plain_http:
                raise ValueError(
                    "http:// sends it in the clear: use https://, or set plain_http where a mesh encrypts it"
                )
        return self


def sign(secret: str, timestamp: int, body: bytes) -> str:
    """`v1=` and the HMAC-SHA256, in hex, of the seconds since 1970 as decimal digits, a dot, and the body."""
    return "v1=" + hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()


class WebhookAction:
    name = "http.webhook"

    def __init__(self, context: Context[WebhookParameters]) -> None:
        self.context, self.parameters = context, context.parameters

    @property
    def target_id(self) -> str:
        return self.context.subject.id

    def plan(self) -> Plan:
        change = Change("request", f"POST {self.parameters.url}", None, self._content(), reversible=False)
        facts = {"status": "there is no address to ask whether it was done"}
        if self.parameters.status is not None:
            done, said = self._status(self.parameters.status)
            facts = {"status": said}
            if done:
                return Plan(self.name, self.target_id, (), self.context.clock.now(), facts=facts)
        return Plan(self.name, self.target_id, (change,), self.context.clock.now(), {"request": 1}, facts)

    def check(self, change: Change) -> Applied | None:
        self.context.access.secret(self.parameters.secret)
        if self.parameters.status is not None and self._status(self.parameters.status)[0]:
            return Applied(Outcome.ALREADY_DONE, "the receiver says that it is done")
        return None

    def apply(self, change: Change) -> Applied:
        """Tried again with the same key: the receiver knows whether it has done it."""
        body = json.dumps(change.after, ensure_ascii=False, sort_keys=True).encode()
        clock, said = self.context.clock, ""
        for attempt in range(1, self.parameters.attempts + 1):
            try:
                status = self._post(body)
            except UnreachableError as error:
                said = error.what
                if attempt < self.parameters.attempts:
                    clock.sleep(min(_LONGEST_PAUSE, 2.0 ** (attempt - 1)))
            else:
                return Applied(Outcome.APPLIED, f"accepted with {status}", {"status": status, "attempts": attempt})
        raise UnreachableError(
            f"not accepted after {count_of(self.parameters.attempts, 'attempt')}, though one may have arrived: {said}",
            where=self.parameters.url,
            remedy="look at the receiver's log for the incident's id",
        )

    def _post(self, body: bytes) -> int:
        timestamp = int(self.context.clock.now().timestamp())
        secret = self.context.access.secret(self.parameters.secret)
        headers = {
            "content-type": "application/json",
            TIMESTAMP: str(timestamp),
            SIGNATURE: sign(secret.reveal(), timestamp, body),
            KEY: self.context.incident_id,
        }
        api, path = self._api(self.parameters.url)
        good = tuple(range(200, 300))
        try:
            return api.request("POST", path, body=body, headers=headers, good=good, largest=_LARGEST_ANSWER).status
        except AccessDeniedError as error:
            raise AccessDeniedError(
                error.what,
                where=error.where,
                remedy=f"compare its secret with {self.parameters.secret}, to the last byte (an end of line counts), and its clock with ours",
            ) from None

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        wanted, clock = self.parameters.status, self.context.clock
        if not any(a.outcome in (Outcome.APPLIED, Outcome.ALREADY_DONE) for a in outcomes.values()):
            return Verification((Check("receiver", True, "nothing was sent"),))
        if wanted is None:
            return Verification(
                (Check("receiver", None, "it accepted the request; there is no address to ask whether it was done"),)
            )
        deadline = clock.monotonic() + wanted.within.total_seconds()
        while True:
            try:
                found, said = self._status(wanted)
            except OpsError as error:
                found, said = None, str(error)
            if found or clock.monotonic() >= deadline:
                return Verification((Check("receiver", found, said),))
            clock.sleep(wanted.every.total_seconds())

    def _status(self, wanted: StatusCheck) -> tuple[bool, str]:
        """Whether it is done, and what was said. Raises OpsError where nobody answers."""
        url = wanted.url.replace("{incident}", quote(self.context.incident_id)).replace(
            "{subject}", quote(self.target_id)
        )
        api, path = self._api(url)
        try:
            answer: Any = api.get(path, largest=_LARGEST_ANSWER).json()
        except NotThereError:
            return False, "the receiver does not know of it yet"
        except AccessDeniedError as error:
            remedy = "let it answer: the status address is asked without login and signature"
            raise AccessDeniedError(error.what, where=error.where, remedy=remedy) from None
        found = answer
        for step in wanted.field.split("."):
            found = found.get(step) if isinstance(found, dict) else None
        # What else it answers may be anything, and stands in the ledger for ever: only a short word is repeated.
        shown = (
            repr(found)
            if isinstance(found, bool | int | None) or (isinstance(found, str) and len(found) < 40)
            else "something else"
        )
        return type(found) is type(wanted.equals) and found == wanted.equals, f"{wanted.field} is {shown}"

    def _api(self, url: str) -> tuple[HttpApi, str]:
        parts = urlsplit(self.context.access.url(url))
        origin = f"{parts.scheme}://{parts.netloc}"
        if origin not in self._apis:
            from ops_platform.clients.http import HttpApi

            self._apis[origin] = HttpApi(
                origin,
                "the receiver",
                ca=str(self.context.access.path(self.parameters.ca)) if self.parameters.ca else None,
                timeout=self.parameters.timeout.total_seconds(),
                clock=self.context.clock,
            )
        return self._apis[origin], parts.path

    @cached_property
    def _apis(self) -> dict[str, HttpApi]:
        return {}

    def _content(self) -> dict[str, Any]:
        subject = self.context.subject
        return {
            "incident": self.context.incident_id,
            "subject": subject.id,
            "kind": subject.kind,
            "signal_at": self.context.signal_at.isoformat(),
            "data": self.parameters.body,
        }


class Webhook(Playbook[WebhookParameters]):
    name = "http.webhook"
    title = "Send a signed request"
    kinds = ANY_KIND
    what = (
        "Sends a POST with JSON to an address, signed with HMAC-SHA256 over time and body, with the incident's id as the idempotency key. "
        "Only an answer 2xx counts as accepted; without one it is tried again. Where the rule names a status address, that has to say "
        "that it was done."
    )
    why_safe = "The receiver can tell that it is us, that nothing was changed or replayed, and that it has done this incident already."
    blast_radius = "Whatever the receiver does with it."
    rights = ("the secret that the receiver shares with us", "to reach its address; the certificate is checked")
    Parameters = WebhookParameters

    def action(self, context: Context[WebhookParameters]) -> Action:
        return WebhookAction(context)
