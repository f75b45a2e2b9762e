"""What `ops doctor` finds in what the targets share, against the real servers: each broken in its turn, and named with what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from ops_platform.clients.s3 import Lock
from ops_platform.doctor import Found
from ops_platform.doctor_platform import examine_platform
from tests import kafka_rig
from tests import prometheus_rig as rig
from tests.remediation_rig import Desk, a_rule, new_desk
from tests.rig import Cluster, Ground, Platform, eventually
from tests.slack_fake import TOKEN, SlackApi

__all__ = ["new_desk"]
NewDesk = Callable[..., Desk]


def looked(at: Desk | Platform) -> dict[str, Found]:
    return {item.what: item for item in examine_platform(at.access).findings}


def bad(found: dict[str, Found], *, state: str = "bad") -> list[str]:
    some = [item for item in found.values() if item.state == state]
    assert all(item.remedy for item in some)
    return [item.what for item in some]


# Ledger


def test_it_says_whether_our_role_may_rewrite_the_ledger_and_that_a_trigger_is_off(
    new_desk: NewDesk, shared_cluster: Cluster
) -> None:
    desk = new_desk()
    at = desk.access.inventory.platform.database
    assert at is not None

    def sql(text: str) -> None:
        with shared_cluster.server.connect(at.dbname) as connection:
            connection.autocommit = True
            connection.execute(text.encode())

    assert "is not there yet" in looked(desk)["ledger"].found
    assert "are not there yet" in looked(desk)["tables of incidents"].found
    desk.fire("a")
    found = looked(desk)
    assert bad(found, state="warn") == ["rights on the ledger", "checkpoints"]
    assert "may rewrite" in found["rights on the ledger"].found
    sql("alter table ops_ledger.entries owner to postgres; grant select, insert on ops_ledger.entries to ops_backup")
    assert looked(desk)["rights on the ledger"].state == "good"
    sql("grant truncate on ops_ledger.entries to ops_backup")
    assert looked(desk)["rights on the ledger"].state == "warn"
    sql(
        "revoke insert on ops_ledger.entries from ops_backup; alter table ops_ledger.entries disable trigger append_only"
    )
    found = looked(desk)
    assert bad(found) == ["ledger", "triggers of the ledger"]
    assert "append_only" in found["triggers of the ledger"].found


# Checkpoints


@pytest.fixture
def anchored(new_platform: Callable[..., Platform], ground: Ground, shared_cluster: Cluster) -> Platform:
    ground.store("", bucket="tests-ledger", lock=Lock("GOVERNANCE", timedelta(days=1))).close()  # makes the bucket
    ledger = {
        "store": "s", "vault": "v", "key": "ops-ledger", "object_lock": {"mode": "GOVERNANCE", "retain": "1d"},
    }  # fmt: skip
    platform = new_platform({"app-db": [shared_cluster]}, platform={"ledger": ledger})
    platform.body["stores"]["s"]["bucket"] = "tests-ledger"
    platform.reload()
    return platform


def test_the_checkpoints_key_signs_and_their_bucket_locks(anchored: Platform) -> None:
    found = looked(anchored)
    assert {item.state for item in found.values()} == {"good"}
    assert "ed25519" in found["checkpoint key"].found
    assert "the bucket's lock is on" in found["checkpoints' Object Lock"].found


@pytest.mark.parametrize(
    ("store", "ledger", "what", "state", "says"),
    [
        ({"bucket": "tests"}, {}, "checkpoints' Object Lock", "bad", "lock is off"),
        ({}, {"object_lock": None}, "checkpoints' Object Lock", "warn", "none is declared"),
        ({"bucket": "never-heard-of"}, {}, "checkpoint store", "bad", "never-heard-of"),
        ({}, {"key": "never-made"}, "checkpoint key", "bad", "never-made"),
        ({}, {"key": "ops-backup"}, "checkpoint key", "bad", "ops-backup"),
    ],
    ids=["unlocked", "undeclared", "bucket", "no key", "another key"],
)
def test_it_finds_what_is_wrong_with_the_checkpoints(
    anchored: Platform, store: dict[str, Any], ledger: dict[str, Any], what: str, state: str, says: str
) -> None:
    anchored.body["stores"]["s"] |= store
    anchored.body["platform"]["ledger"] |= ledger
    anchored.reload()
    found = looked(anchored)[what]
    assert (found.state, says in found.found) == (state, True), found
    assert found.remedy


# Remediation


@pytest.fixture
def slack() -> Iterator[SlackApi]:
    made = SlackApi()
    yield made
    made.close()


def test_it_finds_what_remediation_listens_to_and_speaks_with_and_names_what_is_missing(
    new_desk: NewDesk, kafka: kafka_rig.Kafka, slack: SlackApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOT", TOKEN)
    monkeypatch.setenv("SIGNING", "x")
    monkeypatch.setenv("HOOK", "x")
    hook = {"url": "https://queues.example.com/drain", "secret": "env://HOOK"}
    drain = a_rule(id="drain", alert=["alertname=Full"], playbook="http.webhook", parameters=hook)
    topic, dead, out = kafka.create_topic(partitions=2), kafka.create_topic(), kafka.create_topic()
    with rig.alertmanager() as am, rig.alertmanager() as other:
        desk = new_desk(
            [a_rule(), drain],
            systems=[
                {"id": "k", "kind": "kafka", "bootstrap": [{"host": "127.0.0.1", "port": kafka.brokers[0].port}], "tls": False},
                {"id": "am", "kind": "alertmanager", "urls": [am.url, other.url], "watchdog": {}},
            ],
            alertmanagers=["am"],
            events=[{"kafka": "k", "topics": [topic], "dead_letter": dead}],
            publish={"kafka": "k", "topic": out},
            slack={"api": slack.url, "bot_token": "env://BOT", "signing_secret": "env://SIGNING", "channel": "#incidents"},
        )  # fmt: skip
        am.fire({"alertname": "Watchdog"})
        desk.fire("a")
        found = looked(desk)
        assert bad(found) == []
        assert found[f"Kafka k, topic {topic}"].found == "2 partitions"
        assert found["Slack"].found == "knows the bot: ops in Tests"
        assert found["Slack, buttons"].state == found["Alertmanager am, watchdog"].state == "good"
        assert found["webhook of drain"].state == "good"

        other.daemon.stop()
        am.resolve({"alertname": "Watchdog"})
        kafka.delete_topic(dead)
        kafka.delete_topic(out)
        monkeypatch.setenv("BOT", "xoxb-another")
        monkeypatch.delenv("SIGNING")
        monkeypatch.delenv("HOOK")
        found = looked(desk)
        assert set(bad(found)) == {
            "Alertmanager am, watchdog", f"Kafka k, topic {dead}", f"Kafka k, topic {out}", "Slack", "Slack, buttons",
            "webhook of drain",
        }  # fmt: skip
        assert "env://HOOK cannot be had" in found["webhook of drain"].found
        assert found["Alertmanager am, watchdog"].found == 'the watchdog {alertname="Watchdog"} is not listed'
        assert found[f"Alertmanager am, {other.url}"].state == "warn"
    assert looked(desk)["Alertmanager am"].state == "bad"


def test_it_warns_of_an_alertmanager_without_a_watchdog_and_finds_one_that_is_not_sent_any_more(
    new_desk: NewDesk,
) -> None:
    with rig.alertmanager() as am:
        am.fire({"alertname": "Watchdog"})
        system = {"kind": "alertmanager", "urls": [am.url]}
        systems = [{**system, "id": "none"}, {**system, "id": "stale", "watchdog": {"fresh_for": "1s"}}]
        desk = new_desk(alertmanagers=["none", "stale"], systems=systems)
        none = looked(desk)["Alertmanager none, watchdog"]
        assert none.state == "warn"
        assert "an alerting that has broken looks like alerts that ended" in none.found
        stale = eventually(lambda: (found := looked(desk)["Alertmanager stale, watchdog"]).state == "bad" and found)
        assert "was sent" in stale.found
