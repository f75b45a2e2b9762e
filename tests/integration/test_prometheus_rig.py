"""Prometheus and Alertmanager of the tests do what the tests of others rely on."""

from __future__ import annotations

import urllib.error
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.authority import Authority
from tests.prometheus_rig import BASIC_AUTH, Alertmanager, Prometheus
from tests.rig import eventually

LABELS = {"alertname": "Stuck", "target": "app-db"}


def test_a_prometheus_evaluates_its_rules_and_tells_its_alertmanager(
    new_prometheus: Callable[..., Prometheus], new_alertmanager: Callable[..., Alertmanager]
) -> None:
    alertmanager = new_alertmanager()
    static = [{"targets": [f"127.0.0.1:{alertmanager.port}"]}]
    rules = [{"name": "tests", "rules": [{"alert": "Always", "expr": "vector(1)", "labels": {"severity": "page"}}]}]
    config = {
        "scrape_configs": [{"job_name": "itself", "static_configs": static}],
        "alerting": {"alertmanagers": [{"static_configs": static}]},
    }
    prometheus = new_prometheus(config, rules=rules)
    eventually(lambda: prometheus.query('up{job="itself"} == 1'))
    eventually(lambda: [alert["labels"]["severity"] for alert in alertmanager.alerts()] == ["page"])
    assert [alert["labels"]["alertname"] for alert in prometheus.alerts()] == ["Always"]
    prometheus.configure(config)
    prometheus.reload()
    eventually(lambda: not prometheus.alerts())


def test_an_alert_is_there_until_it_is_resolved(new_alertmanager: Callable[..., Alertmanager]) -> None:
    alertmanager = new_alertmanager()
    alertmanager.fire(LABELS, summary="stuck")
    alert = eventually(alertmanager.alerts)[0]
    assert alert["labels"] == LABELS
    assert alert["annotations"] == {"summary": "stuck"}
    silence = alertmanager.silence({"target": "app-db"})
    eventually(lambda: alertmanager.alerts()[0]["status"]["silencedBy"] == [silence])
    alertmanager.expire(silence)
    eventually(lambda: alertmanager.alerts()[0]["status"]["silencedBy"] == [])
    alertmanager.resolve(LABELS)
    eventually(lambda: alertmanager.alerts() == [])


def test_the_members_of_a_cluster_share_their_silences(
    new_alertmanagers: Callable[..., list[Alertmanager]],
) -> None:
    first, second = new_alertmanagers()
    silence = first.silence({"target": "app-db"})
    eventually(lambda: [each["id"] for each in second.silences()] == [silence])
    first.fire(LABELS)
    assert second.alerts() == []  # alerts are sent to each of them, and not shared


def test_users_and_tls_are_asked_for_where_a_test_wants_them(
    new_alertmanager: Callable[..., Alertmanager], tmp_path: Path
) -> None:
    chain, key = Authority(tmp_path).issue("server", "alertmanager", hosts=["127.0.0.1"])
    web = {"basic_auth_users": BASIC_AUTH, "tls_server_config": {"cert_file": str(chain), "key_file": str(key)}}
    alertmanager = new_alertmanager(web=web)
    assert alertmanager.alerts() == []
    alertmanager.password = "wrong"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        alertmanager.alerts()
