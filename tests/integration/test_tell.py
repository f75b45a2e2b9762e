"""People hear of incidents: threads, masks, storms, a Slack that is away; and decide with buttons whose requests are verified."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode

import pytest

from ops_platform.clients.slack import sign
from ops_platform.errors import AccessDeniedError, ConflictError, NotThereError, UsageError
from ops_platform.inventory.values import Secret
from ops_platform.remediation.buttons import PATH, serve, take
from ops_platform.remediation.model import Ending, State
from ops_platform.remediation.tell import PER_TICK, masked, tell_everybody
from tests.remediation_rig import Engine, a_rule, a_signal, new_engine
from tests.slack_fake import TOKEN, SlackApi, words

__all__ = ["new_engine"]
SIGNING = "8f742231b10e8888abcd99yyyzzz85a5"


@pytest.fixture
def slack() -> Iterator[SlackApi]:
    fake = SlackApi()
    yield fake
    fake.close()


@pytest.fixture
def engine_with(
    new_engine: Callable[..., Engine], slack: SlackApi, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Engine]:
    monkeypatch.setenv("BOT_TOKEN", TOKEN)
    monkeypatch.setenv("SIGNING", SIGNING)

    def make(*rules: dict[str, Any], **more: Any) -> Engine:
        chat = {
            "api": slack.url, "bot_token": "env://BOT_TOKEN", "signing_secret": "env://SIGNING", "channel": "#incidents",
            "people": {"U1": "bea", "U2": "rule dark"},
        }  # fmt: skip
        return new_engine(list(rules) or None, slack=chat, **more)

    return make


def tell(engine: Engine) -> list[str]:
    return tell_everybody(engine.access, engine.store)


def test_an_incident_is_one_thread_that_says_what_why_and_how_to_stop_it(
    engine_with: Callable[..., Engine], slack: SlackApi
) -> None:
    engine = engine_with()
    incident = engine.fire()
    engine.clock.slept = engine.end
    engine.work(incident)
    assert tell(engine) == []
    first, *later = slack.messages
    text = words(first)
    for said in (
        "LampOn",
        "hall",
        "Switch off a lamp",
        "It can be switched on again",
        "Switches on again",
        "pause-all",
        "lamp",
    ):
        assert said in text
    assert "thread_ts" not in first
    assert later
    assert {message["thread_ts"] for message in later} == {first["ts"]}
    assert "it helped" in words(later[-1])
    assert tell(engine) == []
    assert len(slack.messages) == len(later) + 1, "nothing is told twice"


def test_labels_annotations_and_secrets_stay_out_of_messages(
    engine_with: Callable[..., Engine], slack: SlackApi
) -> None:
    engine = engine_with()
    labels = {"alertname": "LampOn", "customer": "jane.doe@example.com"}
    incident = engine.fire(a_signal(at=engine.clock.now(), labels=labels, annotations={"summary": "of Jane Doe"}))
    engine.lamps.fails = (
        "could not log in: password=hunter2 at https://ops:hunter2@db.example.com for jane.doe@example.com"
    )
    engine.work(incident)
    tell(engine)
    everything = json.dumps(slack.messages)
    for secret in ("hunter2", "jane.doe", "Jane Doe", TOKEN):
        assert secret not in everything
    assert "could not log in" in everything


@pytest.mark.parametrize(
    "secret",
    ["token: abcdef", "Authorization=Bearer", "hvs.CAESIJlongtokenoflength", "AKIAIOSFODNN7EXAMPLE", "a.b@c.example"],
)
def test_what_looks_like_a_secret_is_masked(secret: str) -> None:
    assert secret.split(maxsplit=1)[-1] not in masked(f"it failed with {secret} there")


def test_a_slack_that_is_away_holds_nothing_up_and_hears_later(
    engine_with: Callable[..., Engine], slack: SlackApi
) -> None:
    engine = engine_with(a_rule(mode="observe"))
    slack.failures = [(500, {}), (429, {"Retry-After": "30"})]
    engine.work(engine.fire())
    assert len(tell(engine)) == 1
    assert len(tell(engine)) == 1
    assert slack.messages == []
    assert tell(engine) == []
    assert len(slack.messages) == 1


def test_a_message_that_slack_refuses_does_not_keep_the_others(
    engine_with: Callable[..., Engine], slack: SlackApi
) -> None:
    engine = engine_with(a_rule(mode="observe"))
    engine.work(engine.fire(a_signal("a", at=engine.clock.now())))
    engine.work(engine.fire(a_signal("b", at=engine.clock.now())))
    slack.failures = ["channel_not_found"]
    (problem,) = tell(engine)
    assert "invite the bot" in problem
    assert len(slack.messages) == 1


def test_an_owner_has_a_channel_of_its_own(engine_with: Callable[..., Engine], slack: SlackApi) -> None:
    engine = engine_with(a_rule(mode="observe"))
    engine.inventory.owners["team"].__dict__["slack"] = "#team"
    engine.work(engine.fire())
    tell(engine)
    assert [message["channel"] for message in slack.messages] == ["#team"]


def test_a_storm_is_told_of_in_one_message(engine_with: Callable[..., Engine], slack: SlackApi) -> None:
    engine = engine_with(a_rule(mode="observe"))
    for number in range(30):
        engine.work(engine.fire(a_signal(f"f{number}", at=engine.clock.now())))
    assert tell(engine) == []
    assert len(slack.messages) == 1 < PER_TICK
    assert "30 incidents at once" in slack.messages[0]["text"]
    assert "dark: 30 observed" in words(slack.messages[0])


def test_without_slack_no_message_waits_for_the_day_that_has_it(
    engine_with: Callable[..., Engine], slack: SlackApi
) -> None:
    engine = engine_with(a_rule(mode="observe"))
    remediation = engine.inventory.remediation
    assert remediation is not None
    chat, remediation.__dict__["slack"] = remediation.slack, None
    incident = engine.work(engine.fire())
    assert engine.store.figures().unsent > 0
    assert tell(engine) == []
    assert engine.store.figures().unsent == 0
    assert engine.store.history_of(incident.id), "what happened is shown all the same"
    remediation.__dict__["slack"] = chat
    assert tell(engine) == []
    assert slack.messages == []
    engine.work(engine.fire(a_signal("later", at=engine.clock.now())))
    assert tell(engine) == []
    assert len(slack.messages) == 1


def test_what_is_old_is_not_told_as_if_it_were_new_unless_it_still_needs_somebody(
    engine_with: Callable[..., Engine], slack: SlackApi
) -> None:
    engine = engine_with(a_rule(approval="always"), a_rule(id="seen", mode="observe"))
    engine.work(engine.fire(a_signal("f2", at=engine.clock.now()), rule="seen"))
    needs = waiting(engine)
    since = engine.store.history_of(needs.id)[-1][0]
    engine.clock.at += timedelta(hours=25)
    assert tell(engine) == []
    (only,) = slack.messages
    assert needs.id in words(only)
    assert f"since {since:%Y-%m-%d %H:%M} UTC; it could not be told before" in words(only)
    assert engine.store.figures().unsent == 0


# Buttons


def press(
    engine: Engine, incident: Any, action: str = "approve", *, user: str = "U1", digest: str | None = None
) -> tuple[dict[str, str], bytes]:
    payload = {
        "type": "block_actions",
        "user": {"id": user},
        "actions": [{"action_id": action, "value": f"{incident.id}/{digest or incident.digest}"}],
    }
    body = urlencode({"payload": json.dumps(payload)}).encode()
    timestamp = str(int(engine.clock.now().timestamp()))
    signature = sign(Secret(SIGNING), timestamp, body)
    return {"x-slack-request-timestamp": timestamp, "x-slack-signature": signature}, body


def waiting(engine: Engine) -> Any:
    incident = engine.work(engine.fire())
    assert incident.state is State.WAITING
    return incident


def test_the_example_of_slacks_documentation_has_its_signature() -> None:
    body = (
        b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow&channel_id=G8PSS9T3V&channel_name=foobar"
        b"&user_id=U2CERLKJA&user_name=roadrunner&command=%2Fwebhook-collect&text=&response_url=https%3A%2F%2Fhooks.slack.com"
        b"%2Fcommands%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN&trigger_id=398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c"
    )
    expected = "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503"
    assert sign(Secret("8f742231b10e8888abcd99yyyzzz85a5"), "1531420618", body) == expected


def test_a_press_approves_exactly_the_plan_that_was_shown(engine_with: Callable[..., Engine], slack: SlackApi) -> None:
    engine = engine_with(a_rule(approval="always"))
    incident = waiting(engine)
    tell(engine)
    (actions,) = [block for block in slack.messages[-1]["blocks"] if block["type"] == "actions"]
    assert [element["value"] for element in actions["elements"]] == [f"{incident.id}/{incident.digest}"] * 2
    headers, body = press(engine, incident)
    assert "bea has approved" in take(engine.access, engine.store, headers, body)
    engine.clock.slept = engine.end
    assert engine.work(incident).ending is Ending.HELPED


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda h, b: ({**h, "x-slack-signature": "v0=" + "0" * 64}, b), "not signed by Slack"),
        (lambda h, b: (h, b + b"&x=1"), "not signed by Slack"),
        (lambda h, b: ({**h, "x-slack-signature": "v0=é"}, b), "not signed by Slack"),
        (lambda h, b: ({}, b), "not of now"),
        (lambda h, b: ({**h, "x-slack-request-timestamp": "1"}, b), "not of now"),
    ],
)
def test_a_forged_press_is_refused(engine_with: Callable[..., Engine], spoil: Any, why: str) -> None:
    engine = engine_with(a_rule(approval="always"))
    incident = waiting(engine)
    with pytest.raises(AccessDeniedError, match=why):
        take(engine.access, engine.store, *spoil(*press(engine, incident)))
    assert engine.store.decision(incident) is None


def test_the_same_press_again_is_refused(engine_with: Callable[..., Engine]) -> None:
    engine = engine_with(a_rule(approval="always"))
    incident = waiting(engine)
    pressed = press(engine, incident)
    take(engine.access, engine.store, *pressed)
    with pytest.raises(AccessDeniedError, match="before"):
        take(engine.access, engine.store, *pressed)


@pytest.mark.parametrize(("user", "why"), [("U9", "not known"), ("U2", "proposed it")])
def test_strangers_and_the_proposer_cannot_approve(engine_with: Callable[..., Engine], user: str, why: str) -> None:
    engine = engine_with(a_rule(approval="always"))
    incident = waiting(engine)
    with pytest.raises(AccessDeniedError, match=why):
        take(engine.access, engine.store, *press(engine, incident, user=user))


def test_a_press_on_an_outdated_plan_is_refused(engine_with: Callable[..., Engine]) -> None:
    engine = engine_with(a_rule(approval="always"))
    incident = waiting(engine)
    with pytest.raises(ConflictError, match="by now"):
        take(engine.access, engine.store, *press(engine, incident, digest="0" * 64))


def test_what_is_no_press_is_refused(engine_with: Callable[..., Engine]) -> None:
    engine = engine_with(a_rule(approval="always"))
    incident = waiting(engine)
    headers, body = press(engine, incident, action="explode")
    with pytest.raises(UsageError):
        take(engine.access, engine.store, headers, body)


def test_without_the_signing_secret_no_press_is_waited_for(
    engine_with: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with(a_rule(approval="always"))
    monkeypatch.delenv("SIGNING")
    with pytest.raises(NotThereError, match="env://SIGNING") as caught:
        serve(engine.access, engine.store, "127.0.0.1", 0)
    assert caught.value.remedy


def test_a_signing_secret_that_goes_away_is_told_to_nobody_outside(
    engine_with: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_with(a_rule(approval="always"))
    headers, body = press(engine, waiting(engine))
    server = serve(engine.access, engine.store, "127.0.0.1", 0)
    monkeypatch.delenv("SIGNING")
    try:
        url = f"http://127.0.0.1:{server.server_port}{PATH}"
        with pytest.raises(HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60)
        assert (refused.value.code, refused.value.read()) == (500, b"")
        assert "env://SIGNING: this environment variable is not set; what to do: export SIGNING" in caplog.text
    finally:
        server.shutdown()
        server.server_close()


def test_over_http_a_forger_learns_nothing(
    engine_with: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_with(a_rule(approval="always"))
    incident = waiting(engine)
    server = serve(engine.access, engine.store, "127.0.0.1", 0)
    try:
        url = f"http://127.0.0.1:{server.server_port}{PATH}"
        headers, body = press(engine, incident)
        engine.clock.at += timedelta(minutes=6)
        with pytest.raises(HTTPError) as late:
            urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60)
        assert (late.value.code, late.value.read()) == (403, b"")
        engine.clock.at -= timedelta(minutes=6)
        for _ in range(3):
            with pytest.raises(HTTPError) as forged:
                urllib.request.urlopen(urllib.request.Request(url, body + b"&x=1", headers), timeout=60)
            assert (forged.value.code, forged.value.read()) == (403, b"")
        # Whoever runs it hears where the secret stands, once.
        (said,) = [one.getMessage() for one in caplog.records if "not signed by Slack" in one.getMessage()]
        assert "into env://SIGNING" in said
        assert SIGNING not in caplog.text
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as good:
            assert "approved" in json.load(good)["text"]
    finally:
        server.shutdown()
        server.server_close()
