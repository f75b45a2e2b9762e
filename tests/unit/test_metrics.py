"""What is exported is described, is never older than it says, and is what rules and dashboard ask for."""

from __future__ import annotations

import re
import runpy
import socket
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import urllib3
import yaml
from click import BadParameter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ops_platform.backup import receiver_http
from ops_platform.cli.common import Seconds, address
from ops_platform.clients.access import Access
from ops_platform.errors import UnreachableError, UsageError
from ops_platform.metrics import METRICS, serve
from ops_platform.metrics.collect import Reader, Sample, need_known
from ops_platform.metrics.serve import HANGS_AFTER, Collector
from ops_platform.remediation.store import Store
from tests.remediation_rig import TurnedClock

DEPLOY = Path(__file__).parents[2] / "deploy"
NOBODY = cast("Any", None)  # the sources are played: neither access nor store is asked
OPEN: Sample = ("ops_incidents_open", ("open",), 3)
KEPT: Sample = ("ops_promise_kept", ("app-db", "proven"), 1)


class Sources:
    """One quick and one slow source. What is an error is raised."""

    def __init__(self) -> None:
        self.says: dict[str, Sample | Exception] = {"incidents": OPEN, "promises": KEPT}

    def readers(self, _access: Access, _store: Store) -> tuple[Mapping[str, Reader], Mapping[str, Reader]]:
        return {"incidents": lambda: self.read("incidents")}, {"promises": lambda: self.read("promises")}

    def read(self, source: str) -> Iterator[Sample]:
        said = self.says[source]
        if isinstance(said, Exception):
            raise said
        yield said


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> Sources:
    made = Sources()
    monkeypatch.setattr(sys.modules["ops_platform.metrics.serve"], "readers", made.readers)
    return made


def values(collector: Collector) -> dict[tuple[str, ...], float]:
    """As Prometheus would read them, without the times of reading."""
    registry = CollectorRegistry()
    registry.register(cast("Any", collector))
    text = generate_latest(registry).decode()
    return {
        (sample.name, *(text for _, text in sorted(sample.labels.items(), reverse=True))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name != "ops_source_read_timestamp_seconds"
    }


UP = {("ops_source_up", "incidents"): 1.0, ("ops_source_up", "promises"): 1.0}
ALL = {("ops_incidents_open", "open"): 3.0, ("ops_promise_kept", "app-db", "proven"): 1.0, **UP}


def test_what_can_be_read_is_told(sources: Sources) -> None:
    collector = Collector(NOBODY, NOBODY)
    assert values(collector) == {
        ("ops_incidents_open", "open"): 3.0, ("ops_source_up", "incidents"): 1.0, ("ops_source_up", "promises"): 0.0,
    }, "nothing is known of a slow source before it was read"  # fmt: skip
    collector.read("promises")
    assert values(collector) == ALL


@pytest.mark.parametrize("error", [UnreachableError("away"), KeyError("an answer of another kind")])
@pytest.mark.parametrize(("source", "name"), [("incidents", "ops_incidents_open"), ("promises", "ops_promise_kept")])
def test_a_source_that_cannot_be_read_has_no_values_and_says_so(
    source: str, name: str, error: Exception, sources: Sources, caplog: pytest.LogCaptureFixture
) -> None:
    collector = Collector(NOBODY, NOBODY)
    collector.read("promises")
    before = sources.says[source]
    assert values(collector) == ALL
    sources.says[source] = error
    for _ in range(2):
        collector.read("promises")
        found = values(collector)
    assert found == {key: value for key, value in ALL.items() if key[0] != name} | {("ops_source_up", source): 0.0}
    assert [record.message.split(":")[0] for record in caplog.records] == [f"{source} cannot be read"], "said once"
    sources.says[source] = before
    collector.read("promises")
    assert values(collector) == ALL


def test_a_reading_that_hangs_does_not_leave_old_values_for_ever(sources: Sources) -> None:
    clock = TurnedClock()
    collector = Collector(NOBODY, NOBODY, every=60, clock=clock)
    collector.read("promises")
    clock.at += timedelta(seconds=HANGS_AFTER)
    assert values(collector) == ALL
    clock.at += timedelta(seconds=61)
    found = values(collector)
    assert ("ops_promise_kept", "app-db", "proven") not in found
    assert found["ops_source_up", "promises"] == 0


def test_a_sample_that_is_not_described_is_not_exported(sources: Sources) -> None:
    with pytest.raises(UsageError, match="ops_unheard_of"):
        need_known([("ops_unheard_of", (), 1)])
    with pytest.raises(UsageError, match="ops_incidents_open with 0 labels"):
        need_known([("ops_incidents_open", (), 1)])
    sources.says["incidents"] = ("ops_unheard_of", (), 1)
    assert values(Collector(NOBODY, NOBODY))["ops_source_up", "incidents"] == 0


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_named_and_described_as_prometheus_wants_it(name: str) -> None:
    metric = METRICS[name]
    assert re.fullmatch(r"ops(_[a-z]+)+", name)
    assert not name.endswith("_total"), "the exposition adds it to a counter"
    assert metric.what.endswith(".")
    assert metric.source in ("", "incidents", "ledger", "promises", "dagster")
    assert len(set(metric.labels)) == len(metric.labels)


# Over HTTP


@pytest.mark.parametrize("listen", ["127.0.0.1", "::1"])
def test_it_listens_where_it_is_told_to(listen: str, sources: Sources) -> None:
    if listen == "::1" and not _has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    server = serve(NOBODY, NOBODY, listen, 0)
    try:
        port = server.server_address[1]
        url = f"http://{f'[{listen}]' if ':' in listen else listen}:{port}"
        answers = {path: urllib3.request("GET", url + path, retries=False) for path in ("/metrics", "/healthz", "/")}
        assert {path: answer.status for path, answer in answers.items()} == {"/metrics": 200, "/healthz": 200, "/": 404}
        assert 'ops_incidents_open{state="open"} 3.0' in answers["/metrics"].data.decode()
        with pytest.raises(UsageError, match="--listen") as refused:
            serve(NOBODY, NOBODY, listen, port)
        assert refused.value.where == f"{listen}:{port}"
    finally:
        server.shutdown()
        server.server_close()


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_an_address_is_read_with_brackets_or_refused() -> None:
    assert address("[::1]:9188") == ("::1", 9188)
    for text in ("9188", "localhost", "127.0.0.1:²", "127.0.0.1:-1"):
        with pytest.raises(UsageError, match="HOST:PORT"):
            address(text)
    for port in ("0", "65536", "99999", "9" * 5000):
        with pytest.raises(UsageError, match="1 to 65535") as refused:
            address(f"127.0.0.1:{port}")
        assert "HOST:PORT" not in str(refused.value)


def test_how_often_is_seconds_or_refused_in_plain_words() -> None:
    assert [Seconds().convert(text, None, None) for text in ("1", "1.5", "86400", 60.0)] == [1, 1.5, 86400, 60]
    for text in ("soon", "", "0.5", "-60", "nan", "inf", "1e300"):
        with pytest.raises(BadParameter) as refused:
            Seconds().convert(text, None, None)
        assert refused.value.message == f"{text!r} is given; seconds are expected, a number from 1 to 86400, such as 60"


# What is asked of them


def exported() -> set[str]:
    """Names as a Prometheus knows them: a counter ends in _total."""
    kinds = {name: metric.kind for name, metric in METRICS.items()}
    kinds |= {name: kind for name, (_, kind, _) in receiver_http.METRICS.items()}
    return {f"{name}_total" if kind == "counter" else name for name, kind in kinds.items()}


RULES = [rule for group in yaml.safe_load((DEPLOY / "prometheus/ops-platform.rules.yaml").read_text())["groups"]
         for rule in group["rules"]]  # fmt: skip
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
DASHBOARD: dict[str, Any] = runpy.run_path(str(DEPLOY / "grafana/dashboard.py"))["dashboard"]()
TARGETS = [(panel["title"], target) for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def names(query: str) -> set[str]:
    return set(re.findall(r"\bops[_:][a-z0-9_:]+", query))


def test_rules_ask_for_metrics_that_are_exported() -> None:
    asked = {name for rule in RULES for name in names(rule["expr"])}
    assert len(asked) > 15
    assert asked - exported() - RECORDED == set()


def test_the_dashboard_asks_for_metrics_that_are_exported() -> None:
    variables = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    asked = {name for query in (*variables, *(target["expr"] for _, target in TARGETS)) for name in names(query)}
    assert asked - exported() - RECORDED == set()
    missed = {name for name in exported() | RECORDED if name not in asked}
    assert missed == {
        "ops_wal_received_lsn_bytes", "ops_wal_durable_lsn_bytes", "ops_wal_timeline", "ops_wal_slot_lost", "ops_wal_gaps",
        "ops_wal_segments_total", "ops_wal_partials_total",
    }, "a metric that nobody sees: show it, or name it here"  # fmt: skip


def test_an_unknown_name_in_a_query_is_found() -> None:
    assert names('sum(rate(ops_unheard_of_total{a="ops"}[1h])) / ops:never:recorded') - exported() - RECORDED == {
        "ops_unheard_of_total", "ops:never:recorded",
    }  # fmt: skip


def test_every_panel_uses_the_chosen_datasource_and_has_a_place_of_its_own() -> None:
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert {panel["datasource"]["uid"], *(t["datasource"]["uid"] for t in panel["targets"])} == {
                "${datasource}"
            }


def test_every_alert_says_what_is_the_matter_and_what_to_do() -> None:
    alerts = [rule for rule in RULES if "alert" in rule]
    page = (DEPLOY.parent / "docs/how-to/watch-the-platform.md").read_text()
    for alert in alerts:
        assert set(alert["annotations"]) == {"summary", "what_to_do"}, alert["alert"]
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert f"| `{alert['alert']}` | {alert['labels']['severity']} |" in page, alert["alert"]
    assert len(alerts) == page.count("| `Ops")
