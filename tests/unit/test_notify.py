"""Messages to Slack, against a server that answers as Slack's incoming webhooks do (https://api.slack.com/messaging/webhooks)."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ops_platform import notify
from ops_platform.errors import AccessDeniedError, OpsError, UnreachableError
from ops_platform.inventory.values import Secret, SecretRef
from ops_platform.notify import post, run_failed

PATH = "/services/T0000/B0000/secretsecretsecret"


class SlackFake:
    """`answers` are given one after the other, then "ok". None: the connection is closed without an answer."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, str, dict[str, str]] | None] = []
        self.got: list[dict[str, Any]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                planned = fake.answers.pop(0) if fake.answers else (200, "ok", {})
                if planned is None:
                    self.close_connection = True
                    return
                status, text, headers = planned
                if status == 200:
                    status, text = self.judged(body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(text.encode())

            def judged(self, body: bytes) -> tuple[int, str]:
                """As Slack: an unknown path is no service, what is no JSON a bad payload, a message without text has none."""
                if self.path != PATH:
                    return 404, "no_service"
                try:
                    message = json.loads(body)
                except ValueError:
                    return 400, "invalid_payload"
                if not message.get("text"):
                    return 400, "no_text"
                if any(len(block["text"]["text"]) > 3000 for block in message.get("blocks", [])):
                    return 400, "invalid_blocks"
                fake.got.append(message)
                return 200, "ok"

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def webhook(self) -> Secret:
        return Secret(f"http://127.0.0.1:{self.server.server_port}{PATH}")

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def slack() -> Iterator[SlackFake]:
    fake = SlackFake()
    yield fake
    fake.close()


@dataclass
class Waits:
    """A clock whose sleeps are noted and not slept."""

    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


def inventory() -> Any:
    from tests.unit.test_definitions import an_inventory

    return an_inventory("shop").inventory


def text_of(message: dict[str, Any]) -> str:
    return message["blocks"][0]["text"]["text"]


REF = SecretRef.parse("vault://secret/ops/slack#webhook")


def send(webhook: Secret, waits: Waits, message: dict[str, Any] | None = None) -> None:
    post(webhook, message or {"text": "hello"}, clock=waits, ref=REF)  # type: ignore[arg-type]


def test_a_message_arrives(slack: SlackFake) -> None:
    waits = Waits()
    send(slack.webhook, waits, run_failed(inventory(), "nightly_backup", "r-1", "shop", ["the disk is full"]))
    (message,) = slack.got
    assert message["text"] == "nightly_backup failed for shop"
    assert text_of(message).splitlines() == [
        "*nightly_backup failed for shop*", "the disk is full", "owner: Team Shop #shop-oncall", "run `r-1`",
    ]  # fmt: skip
    assert waits.slept == []


def test_a_webhook_that_is_gone_is_said_without_its_address(slack: SlackFake) -> None:
    gone = Secret(f"http://127.0.0.1:{slack.server.server_port}/services/T0/B0/otherothersecret")
    with pytest.raises(AccessDeniedError, match="404 no_service") as caught:
        send(gone, Waits())
    assert str(REF) in str(caught.value)
    assert_silent_about(caught.value, "otherothersecret", str(slack.server.server_port))


def test_slack_says_later_and_is_asked_later(slack: SlackFake) -> None:
    slack.answers = [(429, "rate_limited", {"Retry-After": "3"}), (503, "service_unavailable", {})]
    waits = Waits()
    send(slack.webhook, waits)
    assert waits.slept == [3.0, 1.0]
    assert len(slack.got) == 1


def test_slack_that_goes_on_saying_later_is_an_error_and_no_wait_is_longer_than_a_tick(slack: SlackFake) -> None:
    slack.answers = [(429, "rate_limited", {"Retry-After": "3600"})] * 3
    waits = Waits()
    with pytest.raises(UnreachableError, match="429 rate_limited"):
        send(slack.webhook, waits)
    assert len(waits.slept) == 2
    assert sum(waits.slept) <= 40
    assert slack.got == []


def test_a_refused_message_is_an_error_at_once(slack: SlackFake) -> None:
    waits = Waits()
    with pytest.raises(OpsError, match="400 no_text"):
        send(slack.webhook, waits, {"blocks": []})
    assert waits.slept == []


def test_a_connection_that_is_cut_is_tried_again(slack: SlackFake) -> None:
    slack.answers = [None]
    waits = Waits()
    send(slack.webhook, waits)
    assert (len(slack.got), len(waits.slept)) == (1, 1)


def test_nobody_listening_and_nobody_answering_are_unreachable_without_the_address(
    slack: SlackFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setattr(notify, "_TIMEOUT", 0.2)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        port = deaf.getsockname()[1]
        webhook = Secret(f"http://127.0.0.1:{port}{PATH}")
        with pytest.raises(UnreachableError) as refused:
            send(webhook, Waits())
        deaf.listen()
        with pytest.raises(UnreachableError, match="Timeout") as silent:
            send(webhook, Waits())
    for caught in (refused, silent):
        assert_silent_about(caught.value, "secretsecret", str(port))


def test_what_is_no_address_is_an_error_that_does_not_show_it() -> None:
    for nonsense in ("http://[half:secretsecret", "ftp://secretsecret/x"):
        with pytest.raises(OpsError) as caught:
            send(Secret(nonsense), Waits())
        assert_silent_about(caught.value, "secretsecret")


def assert_silent_about(error: BaseException, *words: str) -> None:
    """Neither the error nor what a traceback would print with it."""
    import traceback

    shown = str(error) + "".join(traceback.format_exception(error))
    assert [word for word in words if word in shown] == []


# The message


def test_a_run_over_all_targets_names_no_target_and_no_owner() -> None:
    message = run_failed(inventory(), "check_promises", "r-2", None, ["a: x", "a: x", "", "b: y"])
    assert text_of(message).splitlines() == ["*check_promises failed*", "a: x", "b: y", "run `r-2`"]


def test_a_target_that_left_the_inventory_is_named_all_the_same() -> None:
    message = run_failed(inventory(), "nightly_backup", "r-3", "gone", [])
    assert text_of(message).splitlines() == [
        "*nightly_backup failed for gone*", "the run was ended before it could say why", "run `r-3`",
    ]  # fmt: skip


def test_text_cannot_become_a_link_or_a_call_to_everybody() -> None:
    message = run_failed(inventory(), "j", "r", "a<b>", ["<!channel> & <https://evil|good>"])
    assert "<" not in text_of(message) + message["text"]
    assert "&lt;!channel&gt; &amp; &lt;https://evil|good&gt;" in text_of(message)


@pytest.mark.parametrize("reason", ["x" * 9000, "<" * 9000, "ab<" * 3000])
def test_a_long_reason_is_cut_and_owner_and_run_stay(slack: SlackFake, reason: str) -> None:
    send(slack.webhook, Waits(), run_failed(inventory(), "nightly_backup", "r-4", "shop", [reason]))
    lines = text_of(slack.got[0]).splitlines()
    assert lines[2:] == ["owner: Team Shop #shop-oncall", "run `r-4`"]
    assert lines[1].endswith(("x…", "b…", "&lt;…"))
