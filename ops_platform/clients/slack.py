"""Slack's Web API, and what its buttons send (https://docs.slack.dev/reference/methods/chat.postMessage, …/authentication/verifying-requests).

Slack answers 200 with `{"ok": false, "error": …}` for what it does not do: a message counts as sent when `ok` is true.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Any

from ops_platform.clients.http import HttpApi
from ops_platform.errors import AccessDeniedError, OpsError
from ops_platform.inventory.values import Secret

OLDEST = 300  # seconds: an older request is taken for one that was kept and sent again
LONGEST = 2900  # characters of one block of text; Slack takes 3000
_DENIED = frozenset(
    {"invalid_auth", "not_authed", "account_inactive", "token_revoked", "token_expired", "missing_scope", "not_in_channel"}
)  # fmt: skip
_REMEDIES = {
    "channel_not_found": "check the channel's name, and invite the bot",
    "not_in_channel": "invite the bot into the channel",
    "missing_scope": "the bot needs chat:write",
}


class Slack:
    """Messages as a bot. Raises OpsError naming Slack's reason; UnreachableError where it does not answer or asks us to wait."""

    def __init__(self, api: HttpApi) -> None:
        self._api = api

    def close(self) -> None:
        self._api.close()

    def post(self, channel: str, text: str, blocks: list[dict[str, Any]], *, thread: str | None = None) -> str:
        """The message's `ts`, which names it and, where it is the first, its thread."""
        body: dict[str, Any] = {"channel": channel, "text": text, "blocks": blocks, "unfurl_links": False}
        if thread is not None:
            body["thread_ts"] = thread
        answer = self._api.request("POST", "/api/chat.postMessage", body=body)
        said = answer.json()
        if not isinstance(said, dict) or said.get("ok") is not True or not isinstance(said.get("ts"), str):
            error = str(said.get("error", "no reason")) if isinstance(said, dict) else "no reason"
            kind = AccessDeniedError if error in _DENIED else OpsError
            raise kind(
                f"Slack does not take the message: {error}",
                where=f"channel {channel}",
                remedy=_REMEDIES.get(error, "look the error up in Slack's documentation of chat.postMessage"),
            )
        return said["ts"]

    def who(self) -> str:
        """The bot's name and its workspace's, by auth.test, which any token may call. Raises as `post` does."""
        said = self._api.request("POST", "/api/auth.test", body={}).json()
        if not isinstance(said, dict) or said.get("ok") is not True:
            error = str(said.get("error", "no reason")) if isinstance(said, dict) else "no reason"
            kind = AccessDeniedError if error in _DENIED else OpsError
            raise kind(f"Slack does not know the bot: {error}", where="auth.test", remedy="look at slack.bot_token")
        return f"{said.get('user')} in {said.get('team')}"


def escape(text: str) -> str:
    """Slack's three control characters."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fitting(text: str, most: int) -> str:
    """Escaped, and cut where it is too long, not in the middle of an entity."""
    shown = escape(text)
    return shown if len(shown) <= most else re.sub("&[a-z]*$", "", shown[: most - 1]) + "…"


def sign(secret: Secret, timestamp: str, body: bytes) -> str:
    """`v0=` and the HMAC-SHA256 of `v0:TIMESTAMP:BODY`, in hex."""
    base = b"v0:" + timestamp.encode() + b":" + body
    return "v0=" + hmac.new(secret.reveal().encode(), base, hashlib.sha256).hexdigest()


def need_signed(secret: Secret, timestamp: str, signature: str, body: bytes, now: float, *, named: str) -> None:
    """That Slack sent it, and just now. `now`: seconds since 1970; `named`: where the secret stands. Raises AccessDeniedError."""
    if not re.fullmatch("[0-9]{1,12}", timestamp) or abs(now - int(timestamp)) > OLDEST:
        raise AccessDeniedError(
            "this request is not of now", where="x-slack-request-timestamp", remedy="check this machine's clock"
        )
    if not hmac.compare_digest(sign(secret, timestamp, body).encode(), signature.encode()):
        raise AccessDeniedError(
            "this request was not signed by Slack",
            where="x-slack-signature",
            remedy=f"where Slack did send it: put the app's Signing Secret (Basic Information) into {named}",
        )
