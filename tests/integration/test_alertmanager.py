"""Alerts as they come in, from real Alertmanagers, and from ones that lie, stall, restart and disagree."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from ops_platform.clients.access import Access
from ops_platform.clients.alertmanager import Alertmanager, NoWatchdogError, Polled
from ops_platform.clients.http import BadAnswerError, HttpApi
from ops_platform.clients.prometheus import Prometheus, alert_history, fingerprint
from ops_platform.errors import AccessDeniedError, OpsError, UnreachableError
from ops_platform.inventory import load
from ops_platform.inventory.systems import AlertmanagerSystem, Watchdog
from ops_platform.remediation.model import Signal
from tests import prometheus_rig as rig
from tests.authority import Authority
from tests.integration.http_faults import FaultyProxy, cut_the_answer, never_answer, reply
from tests.rig import eventually

DISK = {"alertname": "DiskFull", "instance": "db1", "path": "/var/lib/ü"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[rig.Alertmanager]]:
    """Two that share silences. Tests use alerts of their own names."""
    with rig.alertmanagers(count=2) as made:
        yield made


def client(*members: Any, settled_after: timedelta = timedelta(0), **more: Any) -> Alertmanager:
    return Alertmanager(
        "am", [HttpApi(one.url, "Alertmanager", timeout=30) for one in members], settled_after=settled_after, **more
    )


def named(polled: Polled, name: str) -> list[Signal]:
    return [signal for signal in polled.signals if signal.name == name]


def alert(**more: Any) -> dict[str, Any]:
    """As Alertmanager lists it."""
    now = datetime.now(UTC)
    return {
        "labels": DISK,
        "annotations": {},
        "startsAt": now.isoformat(),
        "endsAt": (now + timedelta(minutes=5)).isoformat(),
        "updatedAt": now.isoformat(),
        "fingerprint": "0123456789abcdef",
        "receivers": [{"name": "nobody"}],
        "status": {"state": "active", "silencedBy": [], "inhibitedBy": []},
        **more,
    }


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in alert().items() if key != name}


# What a poll says


def test_an_alert_becomes_a_signal_with_everything_that_alertmanager_knows(cluster: list[rig.Alertmanager]) -> None:
    labels = {**DISK, "alertname": "Whole"}
    cluster[0].post(
        [{"labels": labels, "annotations": {"summary": "full"}, "startsAt": "2026-11-01T03:04:05.678Z",
          "endsAt": (datetime.now(UTC) + timedelta(hours=1)).isoformat(), "generatorURL": "http://prometheus/graph"}]
    )  # fmt: skip
    before = datetime.now(UTC)
    (signal,) = named(client(cluster[0]).poll(), "Whole")
    assert signal.source == "alertmanager"
    assert signal.labels == labels
    assert signal.fingerprint == fingerprint(labels)
    assert signal.starts_at == datetime(2026, 11, 1, 3, 4, 5, 678000, UTC)
    assert signal.seen_at >= before
    assert signal.ends_at is None
    assert signal.annotations == {"summary": "full"}
    assert signal.link == "http://prometheus/graph"
    assert (signal.silenced, signal.inhibited) == (False, False)
    assert Signal.from_json(json.loads(json.dumps(signal.as_json()))) == signal


def test_the_same_alert_from_two_alertmanagers_is_one_signal_with_the_earliest_start(
    cluster: list[rig.Alertmanager],
) -> None:
    labels, ends = {"alertname": "Twice"}, (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    later, earlier = "2026-11-01T10:00:00Z", "2026-11-01T09:00:00Z"
    cluster[0].post([{"labels": labels, "startsAt": earlier, "endsAt": ends, "annotations": {"text": "old"}}])
    time.sleep(0.05)  # an update's time has milliseconds, and two of the same one have no order
    cluster[1].post([{"labels": labels, "startsAt": later, "endsAt": ends, "annotations": {"text": "new"}}])
    for order in (cluster, cluster[::-1]):
        (signal,) = named(client(*order).poll(), "Twice")
        assert signal.starts_at == datetime(2026, 11, 1, 9, tzinfo=UTC)
        assert signal.annotations == {"text": "new"}


def test_what_fires_at_one_member_alone_fires(cluster: list[rig.Alertmanager]) -> None:
    cluster[1].fire({"alertname": "OneAlone"})
    polled = client(*cluster).poll()
    assert len(named(polled, "OneAlone")) == 1
    assert polled.complete


def test_a_resolved_alert_is_gone_from_a_complete_poll() -> None:
    with rig.alertmanager() as am:
        am.fire({"alertname": "Short"})
        assert named(client(am).poll(), "Short")
        am.resolve({"alertname": "Short"})
        polled = eventually(lambda: (found := client(am).poll()).signals == [] and found)
        assert polled.complete


def test_an_alert_silenced_later_is_seen_as_silenced_and_not_as_ended(cluster: list[rig.Alertmanager]) -> None:
    labels = {"alertname": "Later"}
    cluster[0].fire(labels)
    assert [one.silenced for one in named(client(*cluster).poll(), "Later")] == [False]
    silence = cluster[0].silence(labels)
    assert [one.silenced for one in named(client(*cluster).poll(), "Later")] == [True]
    cluster[0].expire(silence)
    assert [one.silenced for one in named(client(*cluster).poll(), "Later")] == [False]


def test_an_inhibited_alert_is_seen_as_inhibited() -> None:
    inhibits = {"source_matchers": ['severity="page"'], "target_matchers": ['severity="ticket"'], "equal": ["node"]}
    with rig.alertmanager({**rig.SILENT, "inhibit_rules": [inhibits]}) as am:
        am.fire(
            {"alertname": "Page", "severity": "page", "node": "n"},
            {"alertname": "Tick", "severity": "ticket", "node": "n"},
        )
        # What inhibits hears of a new alert in its own time.
        eventually(
            lambda: {one.name: one.inhibited for one in client(am).poll().signals} == {"Page": False, "Tick": True}
        )


def test_ten_thousand_alerts_at_once_are_ten_thousand_signals() -> None:
    with rig.alertmanager() as am:
        am.fire(*({"alertname": "Many", "instance": f"node-{n}"} for n in range(10_000)))
        polled = client(am).poll(budget=60)
        assert len({one.fingerprint for one in polled.signals}) == 10_000


# Members that are away


def test_a_member_that_is_away_is_noted_and_nothing_is_complete_any_more() -> None:
    with rig.alertmanagers(count=2) as (one, other):
        one.fire({"alertname": "Here"})
        other.daemon.stop()
        polled = client(one, other).poll()
        assert [signal.name for signal in polled.signals] == ["Here"]
        assert not polled.complete
        (away,) = polled.away
        assert away.url == other.url
        assert isinstance(away.failure, UnreachableError)


def test_with_all_members_away_a_poll_is_an_error_that_names_each() -> None:
    with rig.alertmanagers(count=2) as (one, other):
        poll = client(one, other).poll
        poll()
        one.daemon.stop()
        other.daemon.stop()
        with pytest.raises(UnreachableError) as caught:
            poll()
        assert str(one.port) in caught.value.what
        assert str(other.port) in caught.value.what
        assert caught.value.remedy


def test_a_member_that_restarted_with_lost_state_takes_nothing_for_resolved() -> None:
    """Alone it lists nothing, which is not to be read as an end; beside the other one, what that one lists counts."""
    with rig.alertmanagers(count=2) as (one, other):
        for member in (one, other):
            member.fire({"alertname": "Lasting"})
        other.daemon.stop()
        other.daemon.start()  # alerts are kept in memory alone
        assert other.alerts() == []
        union = client(one, other).poll()
        assert [signal.name for signal in union.signals] == ["Lasting"]
        alone = client(other, settled_after=timedelta(hours=1)).poll()
        assert alone.signals == []
        assert not alone.complete
        with pytest.raises(UnreachableError, match="whether this alert still fires cannot be said"):
            client(other, settled_after=timedelta(hours=1)).look({"alertname": "Lasting"})


def test_a_member_that_does_not_say_how_long_it_has_been_up_is_not_settled() -> None:
    with rig.alertmanager() as am, FaultyProxy(am.port) as proxy:
        proxy.faults.extend([None, reply(200, b'{"uptime": "a while"}')])
        polled = client(proxy).poll()
        assert not polled.complete
        assert polled.members[0].up_for is None
        assert client(proxy).poll().complete


def test_a_slow_member_does_not_hold_up_the_others() -> None:
    with rig.alertmanager() as am, FaultyProxy(am.port) as slow:
        am.fire({"alertname": "Quick"})
        slow.always = never_answer
        polled = client(slow, am).poll(budget=10)
        assert [signal.name for signal in polled.signals] == ["Quick"]
        assert not polled.complete
        assert [member.url for member in polled.away] == [slow.url]


def test_a_slow_cluster_is_an_error_within_the_budget() -> None:
    with FaultyProxy(None) as slow:
        slow.always = never_answer
        with pytest.raises(UnreachableError):
            client(slow, slow).poll(budget=0.5)


def test_a_member_that_dribbles_is_cut_off_at_the_deadline() -> None:
    """Each byte comes within the time limit of a read; the whole answer does not."""

    def dribble(handler: Any) -> None:
        handler.take()
        handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n[")
        while not handler.proxy.released.wait(0.02):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    with FaultyProxy(None) as slow:
        slow.always = dribble
        with pytest.raises(UnreachableError, match=r"did not answer in time|no answer within"):
            client(slow).poll(budget=0.5)


# Members that lie


LIES: list[tuple[str, Callable[[Any], None], str]] = [
    ("500", reply(500, b"oops"), "cannot answer: 500"),
    ("503 from a proxy", reply(503, b"<html>Service Unavailable</html>"), "503"),
    ("HTML", reply(200, b"<html><body>Please log in</body></html>", content_type="text/html"), "no JSON"),
    ("a redirect", reply(302, b"", location="http://127.0.0.1:1/login"), "302"),
    ("an empty body", reply(200, b""), "no JSON"),
    ("half a list", reply(200, b'[{"labels": {"alertname": "X"'), "no JSON"),
    ("an object", reply(200, b'{"status": "success", "data": []}'), "no list"),
    ("null", reply(200, b"null"), "no list"),
    ("NaN", reply(200, b"[NaN]"), "no JSON"),
    ("numbers", reply(200, b"[1, 2]"), "not well-formed"),
    ("an alert without labels", reply(200, json.dumps([alert(labels={})]).encode()), "labels"),
    ("a label that is a number", reply(200, json.dumps([alert(labels={"a": 1})]).encode()), "wrong type"),
    ("a fingerprint that is none", reply(200, json.dumps([alert(fingerprint=None)]).encode()), "fingerprint"),
    ("a start that is no time", reply(200, json.dumps([alert(startsAt="yesterday")]).encode()), "yesterday"),
    ("a start without a zone", reply(200, json.dumps([alert(startsAt="2026-11-01T00:00:00")]).encode()), "no zone"),
    ("an unknown state", reply(200, json.dumps([alert(status={"state": "fine", "silencedBy": [], "inhibitedBy": []})]).encode()), "state"),
    ("silencedBy as text", reply(200, json.dumps([alert(status={"state": "active", "silencedBy": "", "inhibitedBy": []})]).encode()), "silencedBy"),
    *((f"no {name}", reply(200, json.dumps([alert(), without(name)]).encode()), "missing")
      for name in ("labels", "annotations", "startsAt", "endsAt", "updatedAt", "fingerprint", "status")),
]  # fmt: skip


@pytest.mark.parametrize(("lie", "said"), [(lie, said) for _, lie, said in LIES], ids=[name for name, _, _ in LIES])
def test_a_lie_is_an_error_and_never_an_empty_list(lie: Callable[[Any], None], said: str) -> None:
    with FaultyProxy(None) as liar:
        liar.always = lie
        with pytest.raises(OpsError, match=said) as caught:
            client(liar).poll()
        assert caught.value.remedy


@pytest.mark.parametrize(("lie", "said"), [(lie, said) for _, lie, said in LIES], ids=[name for name, _, _ in LIES])
def test_a_lie_of_one_member_leaves_the_others_word_and_nothing_ends(
    cluster: list[rig.Alertmanager], lie: Callable[[Any], None], said: str
) -> None:
    cluster[0].fire({"alertname": "Truth"})
    with FaultyProxy(None) as liar:
        liar.always = lie
        polled = client(cluster[0], liar).poll()
        assert named(polled, "Truth")
        assert not polled.complete
        failure = polled.away[0].failure
        assert failure is not None
        assert said in failure.what


def test_an_answer_that_is_cut_in_the_middle_is_an_error(cluster: list[rig.Alertmanager]) -> None:
    cluster[0].fire({"alertname": "Cut"})
    with FaultyProxy(cluster[0].port) as proxy:
        proxy.always = cut_the_answer
        with pytest.raises(UnreachableError):
            client(proxy).poll()


def test_an_answer_above_the_limit_is_refused(cluster: list[rig.Alertmanager]) -> None:
    cluster[0].fire(*({"alertname": "Large", "n": str(n)} for n in range(50)))
    with pytest.raises(BadAnswerError, match="larger than 1000 bytes"):
        client(cluster[0], largest=1000).poll()


def test_one_fingerprint_for_two_alerts_is_refused() -> None:
    with FaultyProxy(None) as one, FaultyProxy(None) as other:
        one.always = reply(200, json.dumps([alert()]).encode())
        other.always = reply(200, json.dumps([alert(labels={"alertname": "Other"})]).encode())
        with pytest.raises(BadAnswerError, match="different alerts"):
            client(one, other).poll()


def test_a_kept_connection_that_the_server_closed_costs_nothing() -> None:
    with rig.alertmanager() as am:
        am.fire({"alertname": "Kept"})
        asking = client(am)
        assert len(asking.poll().signals) == 1
        am.daemon.stop()
        am.daemon.start()
        assert asking.poll().signals == []


# Looking again, and silences


def test_a_look_gives_the_alert_of_exactly_these_labels(cluster: list[rig.Alertmanager]) -> None:
    plain, more = {"alertname": "Look", "text": 'a "b" \\ c'}, {"alertname": "Look", "text": 'a "b" \\ c', "extra": "1"}
    cluster[0].fire(plain, more)
    found = client(*cluster).look(plain)
    assert found is not None
    assert found.labels == plain
    assert client(*cluster).look({"alertname": "Look"}) is None


def test_a_silence_is_seen_for_what_fires_and_for_what_never_fired(cluster: list[rig.Alertmanager]) -> None:
    fires, event = {"alertname": "Hush", "node": "n1"}, {"type": "com.example.hush", "node": "n2"}
    cluster[0].fire(fires)
    asking = client(*cluster)
    assert not asking.is_silenced(fires)
    assert not asking.is_silenced(event)
    now = datetime.now(UTC)
    cluster[1].call(
        "POST", "/api/v2/silences",
        {"matchers": [{"name": "node", "value": "n[12]", "isRegex": True, "isEqual": True},
                      {"name": "alertname", "value": "Loud", "isRegex": False, "isEqual": False}],
         "startsAt": now.isoformat(), "endsAt": (now + timedelta(hours=1)).isoformat(), "createdBy": "t", "comment": "t"},
    )  # fmt: skip
    eventually(lambda: asking.is_silenced(fires))
    assert asking.is_silenced(event)
    assert not asking.is_silenced({"alertname": "Loud", "node": "n1"})
    assert not asking.is_silenced({"alertname": "Hush", "node": "n3"})


def test_whoever_has_just_started_may_have_lost_its_silences_and_cannot_say_no() -> None:
    with rig.alertmanager() as am:
        young = client(am, settled_after=timedelta(hours=1))
        with pytest.raises(UnreachableError, match="cannot be said"):
            young.is_silenced(DISK)
        am.silence({"alertname": "DiskFull"})
        assert young.is_silenced(DISK)


def test_a_silence_that_cannot_be_read_decides_nothing(cluster: list[rig.Alertmanager]) -> None:
    silences = [{"status": {"state": "active"}, "matchers": [{"name": "a", "value": r"\pL", "isRegex": True}]}]
    with FaultyProxy(cluster[0].port) as proxy:
        proxy.faults.extend([None, None, reply(200, json.dumps(silences).encode())])
        with pytest.raises(BadAnswerError, match="a silence cannot be read"):
            client(proxy).is_silenced(DISK)


# Logging in, and from the inventory


def inventory(tmp_path: Path, system: dict[str, Any]) -> tuple[Access, AlertmanagerSystem]:
    (tmp_path / "password").write_text(rig.PASSWORD)
    (tmp_path / "password").chmod(0o600)
    body = {
        "version": 1, "platform": {"name": "t"}, "owners": {"o": {"name": "O"}}, "environments": {"e": {}},
        "systems": [{"id": "am", "kind": "alertmanager", "environment": "e", "owner": "o", **system}],
    }  # fmt: skip
    file = tmp_path / "platform.yaml"
    file.write_text(json.dumps(body))
    access = Access(load(file))
    found = access.inventory.systems[0]
    assert isinstance(found, AlertmanagerSystem)
    return access, found


def test_over_tls_with_a_password_from_the_inventory(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    chain, key = authority.issue("server", "alertmanager", hosts=["127.0.0.1"])
    web = {"tls_server_config": {"cert_file": str(chain), "key_file": str(key)}, "basic_auth_users": rig.BASIC_AUTH}
    with rig.alertmanager(web=web) as am:
        auth = {"user": rig.USER, "password": f"file://{tmp_path}/password"}
        access, system = inventory(tmp_path, {"urls": [am.url], "ca": str(authority.ca), "auth": auth})
        with access:
            assert access.alertmanager(system).poll().signals == []
            assert access.alertmanager(system) is access.alertmanager(system)
        (tmp_path / "password").write_text("wrong")
        with access, pytest.raises(AccessDeniedError, match="401") as caught:
            access.alertmanager(system).poll()
        assert "wrong" not in str(caught.value)
        access, system = inventory(tmp_path, {"urls": [am.url], "auth": auth})
        with access, pytest.raises(UnreachableError, match="TLS") as refused:
            access.alertmanager(system).poll()
        assert "certificate" in refused.value.what


def test_no_error_shows_what_we_logged_in_with(tmp_path: Path) -> None:
    """A server that says back what it was sent."""

    def echo(handler: Any) -> None:
        request = handler.take()
        said = request.headers["authorization"].encode()
        handler.wfile.write(b"HTTP/1.1 418 No\r\ncontent-length: %d\r\n\r\n%s" % (len(said), said))

    with FaultyProxy(None) as proxy:
        proxy.always = echo
        for auth in (
            {"user": "ops", "password": f"file://{tmp_path}/password"},
            {"token": f"file://{tmp_path}/password"},
        ):
            access, system = inventory(tmp_path, {"urls": [proxy.url], "auth": auth})
            with access, pytest.raises(OpsError, match=r"418.*\*\*\*") as caught:
                access.alertmanager(system).poll()
            assert rig.PASSWORD not in str(caught.value)
        assert proxy.seen[0].headers["authorization"].startswith("Basic ")
        assert proxy.seen[-1].headers["authorization"] == f"Bearer {rig.PASSWORD}"


def test_a_token_that_no_header_can_hold_is_refused_without_being_shown(tmp_path: Path) -> None:
    with FaultyProxy(None) as proxy:
        access, system = inventory(tmp_path, {"urls": [proxy.url], "auth": {"token": f"file://{tmp_path}/password"}})
        (tmp_path / "password").write_text("se\ncret")
        with access, pytest.raises(OpsError, match="cannot stand in an HTTP header") as caught:
            access.alertmanager(system).poll()
        assert "cret" not in str(caught.value).replace("secret", "")


def test_no_proxy_of_the_environment_is_used(cluster: list[rig.Alertmanager], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:1")
    assert client(*cluster).poll().complete


# The watchdog


def watched(*members: Any, settled_after: timedelta = timedelta(0), **watchdog: Any) -> Alertmanager:
    return client(*members, settled_after=settled_after, watchdog=Watchdog.model_validate(watchdog))


def ended(asking: Alertmanager, labels: dict[str, str]) -> bool:
    """By both ways to ask, which must agree where nothing changes."""
    try:
        looked = asking.look(labels) is None
    except NoWatchdogError:
        looked = False
    polled = asking.poll()
    assert (polled.complete and labels not in [one.labels for one in polled.signals]) == looked
    return looked


@pytest.mark.parametrize("match", ["alertname=Watchdog", "alertname=~Watch.*"])
def test_an_alert_has_ended_where_the_watchdog_is_there_and_is_not_known_to_have_where_it_is_not(match: str) -> None:
    with rig.alertmanager() as am:
        asking = watched(am, match=[match])
        am.fire(DISK, {"alertname": "Watchdog"})
        assert not ended(asking, DISK)
        am.resolve(DISK)
        eventually(lambda: ended(asking, DISK))
        am.resolve({"alertname": "Watchdog"})
        eventually(lambda: am.alerts() == [])
        assert not ended(asking, DISK)
        with pytest.raises(
            NoWatchdogError, match=r"whether this alert still fires cannot be said: the watchdog .*Watch"
        ) as caught:
            asking.look(DISK)
        assert "not listed" in caught.value.what
        assert "not listed" in str(asking.poll().doubt)
        assert ended(client(am), DISK), "where none is declared, it is not missed"
        am.fire(DISK)
        assert asking.look(DISK) is not None, "what is listed fires, with a watchdog or without"


def test_a_watchdog_that_was_not_sent_for_too_long_is_listed_and_vouches_for_nothing() -> None:
    with rig.alertmanager() as am:
        am.fire({"alertname": "Watchdog"})
        assert ended(watched(am), DISK)
        late = watched(am, fresh_for="1s")
        eventually(lambda: not late.poll().complete)
        assert not ended(late, DISK)
        with pytest.raises(NoWatchdogError, match="was sent"):
            late.look(DISK)
        assert ended(watched(am), DISK)


def test_one_member_that_hears_the_watchdog_is_enough() -> None:
    with rig.alertmanagers(count=2) as (one, other):
        one.fire({"alertname": "Watchdog"})
        for order in ((one, other), (other, one)):
            assert ended(watched(*order), DISK)


def test_a_watchdog_that_matches_what_is_looked_for_never_says_that_it_has_ended() -> None:
    with rig.alertmanager() as am:
        asking = watched(am, match=["alertname=~.+"])
        am.fire(DISK)
        assert not ended(asking, DISK)
        am.resolve(DISK)
        eventually(lambda: am.alerts() == [])
        assert not ended(asking, DISK)


def says(fires: float, *, sent: float = 0, fast: float = 0, date: str | None = None) -> list[Callable[[Any], None]]:
    """What a member whose clock is `fast`, and which began long ago, answers to a poll. With an empty `date` it says none."""
    now = datetime.now(UTC) + timedelta(seconds=fast)
    times = {
        "startsAt": (now - timedelta(seconds=fires)).isoformat(),
        "updatedAt": (now - timedelta(seconds=sent)).isoformat(),
        "endsAt": (now + timedelta(seconds=240 - sent)).isoformat(),
    }
    alerts = json.dumps([alert(labels={"alertname": "Watchdog"}, **times)]).encode()
    dated = format_datetime(now, usegmt=True) if date is None else date
    return [answered(alerts, dated), reply(200, b'{"uptime": "2026-01-01T00:00:00Z"}')]


def answered(body: bytes, date: str) -> Callable[[Any], None]:
    def answer(handler: Any) -> None:
        handler.take()
        dated = f"date: {date}\r\n" if date else ""
        handler.wfile.write(f"HTTP/1.1 200 OK\r\n{dated}content-length: {len(body)}\r\n\r\n".encode() + body)

    return answer


@pytest.mark.parametrize("fast", [-7200, 7200])
def test_the_watchdogs_age_is_by_the_clock_of_the_member_that_lists_it(fast: float) -> None:
    with FaultyProxy(None) as member:
        member.faults.extend(says(fires=3600, sent=100, fast=fast))
        assert watched(member).poll().complete
        member.faults.extend(says(fires=3600, sent=200, fast=fast))
        polled = watched(member).poll()
        assert not polled.complete
        assert "was sent" in str(polled.doubt)


def test_a_member_that_says_no_date_is_dated_by_our_clock_and_one_that_lies_about_it_is_away() -> None:
    with FaultyProxy(None) as member:
        member.faults.extend(says(fires=3600, sent=100, date=""))
        assert watched(member).poll().complete
        member.faults.extend(says(fires=3600, sent=200, date=""))
        assert not watched(member).poll().complete
        member.faults.extend(says(fires=3600, date="yesterday"))
        with pytest.raises(BadAnswerError, match="yesterday is no date"):
            watched(member).poll()
        member.faults.extend(says(fires=3600, date="yesterday"))
        assert client(member).poll().signals, "nobody asks for it where no watchdog is declared"


def test_a_watchdog_that_has_just_come_back_vouches_for_nothing_yet() -> None:
    """It arrives, but Prometheus may not have evaluated the rules of others so far."""
    with FaultyProxy(None) as member:
        asking = watched(member, settled_after=timedelta(minutes=5))
        member.faults.extend(says(fires=290))
        polled = asking.poll()
        assert polled.sees_watchdog
        assert not polled.complete
        assert "slower to come back" in str(polled.doubt)
        member.faults.extend(says(fires=302))
        assert asking.poll().complete


def test_alerts_of_a_prometheus_that_was_killed_go_away_and_have_not_ended() -> None:
    always = {"expr": "vector(1)", "labels": {"a": "b"}}
    rules = [{"name": "g", "interval": "1s", "rules": [{"alert": name, **always} for name in ("Disk", "Watchdog")]}]
    disk = {"alertname": "Disk", "a": "b"}
    with rig.alertmanager() as am:
        asking = watched(am)
        alerting = {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{am.port}"]}]}]}
        with rig.prometheus({"alerting": alerting}, rules=rules) as prometheus:
            eventually(lambda: named(asking.poll(), "Disk"))
            eventually(lambda: asking.poll().complete, why="it is sent again and again")
            prometheus.daemon.stop()

            def gone() -> bool:
                polled = asking.poll()
                assert named(polled, "Disk") or not polled.complete
                return polled.signals == []

            eventually(gone, why="nobody sends it any more")
            assert client(am).poll().complete, "without the watchdog it looks like an end"
            with pytest.raises(NoWatchdogError):
                asking.look(disk)
            prometheus.configure({"alerting": alerting}, rules=[{**rules[0], "rules": rules[0]["rules"][1:]}])
            prometheus.daemon.start()
            eventually(lambda: asking.poll().complete)
            assert asking.look(disk) is None


# With Prometheus in front


def test_alerts_of_a_real_prometheus_arrive_and_stand_in_its_history() -> None:
    rules = [{"name": "g", "interval": "1s", "rules": [{"alert": "Always", "expr": "vector(1)", "labels": {"a": "b"}}]}]
    with rig.alertmanager() as am:
        alerting = {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{am.port}"]}]}]}
        with rig.prometheus({"alerting": alerting}, rules=rules) as prometheus:
            began = datetime.now(UTC) - timedelta(seconds=30)
            (signal,) = eventually(lambda: client(am).poll().signals)
            asking = Prometheus(HttpApi(prometheus.url, "Prometheus"))
            (past,) = eventually(lambda: alert_history(asking, began, datetime.now(UTC), timedelta(seconds=1)))
            assert past.source == "history"
            assert past.labels == signal.labels == {"alertname": "Always", "a": "b"}
            assert past.fingerprint == signal.fingerprint
            assert past.ends_at is None


def test_nobody_waits_for_the_thread_of_a_member_that_hangs() -> None:
    with FaultyProxy(None) as slow:
        slow.always = never_answer
        with pytest.raises(UnreachableError):
            client(slow).poll(budget=0.2)
        assert all(one.daemon for one in threading.enumerate() if one.name.startswith("alertmanager-"))
