"""The Grafana dashboard as code: what `ops metrics serve` and `ops wal receive` give, beside what was promised.

python deploy/grafana/dashboard.py writes ops-platform.json anew; so does `make docs`. The recording rules in
../prometheus/ops-platform.rules.yaml have to be loaded: some panels show what they record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FILE = Path(__file__).with_name("ops-platform.json")
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 24, 8  # of a row and of a panel, in Grafana's grid

# What 0 and 1 mean, with their colours.
_YES_NO = {"0": ("no", "red"), "1": ("yes", "green")}
_NO_YES = {"0": ("no", "green"), "1": ("yes", "red")}


@dataclass(frozen=True)
class Panel:
    """`queries`: a legend and its PromQL. `unit`: Grafana's name for it. `words`: what 0 and 1 mean. `says`: how to read it."""

    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    kind: Literal["timeseries", "stat", "state-timeline"] = "timeseries"
    words: dict[str, tuple[str, str]] | None = None
    says: str = ""


_T = 'target=~"$target"'

ROWS: dict[str, list[Panel]] = {
    "Promises and proofs": [
        Panel("Promise kept", [("{{target}} {{promise}}", f"ops_promise_kept{{{_T}}}")], "none", "state-timeline", _YES_NO,
              "Judged from the store. What cannot be judged is not kept."),
        Panel("Promise could be judged", [("{{target}} {{promise}}", f"ops_promise_known{{{_T}}}")], "none", "state-timeline",
              _YES_NO),
        Panel("Age of the newest backup and proof", [
            ("{{target}} backup", f"ops_backup_age_seconds{{{_T}}}"), ("{{target}} proof", f"ops_proof_age_seconds{{{_T}}}"),
        ], "s"),
    ],
    "RPO and RTO against their objectives": [
        Panel("Loss that was measured", [
            ("{{target}}", f"ops_rpo_seconds{{{_T}}}"),
            ("{{target}} objective", f'ops_objective_seconds{{objective="rpo", {_T}}}'),
        ], "s"),
        Panel("Time to restore", [
            ("{{target}} measured", f"ops_rto_seconds{{{_T}}}"),
            ("{{target}} worst moment", f"ops_rto_whole_seconds{{{_T}}}"),
            ("{{target}} objective", f'ops_objective_seconds{{objective="rto", {_T}}}'),
        ], "s"),
        Panel("Share of the objective", [
            ("{{target}} RPO", f"ops:rpo:ratio{{{_T}}}"), ("{{target}} RTO", f"ops:rto:ratio{{{_T}}}"),
        ], "percentunit", says="At 100 % the objective is missed."),
    ],
    "WAL": [
        Panel("Received", [("{{target}}", f"ops_wal_streaming{{{_T}}}")], "none", "state-timeline", _YES_NO),
        Panel("Not yet durable", [
            ("{{target}} receiver", f"ops_wal_lag_bytes{{{_T}}}"),
            ("{{target}} archive", f"ops_wal_archive_lag_bytes{{{_T}}}"),
        ], "bytes", says="By the receiver, and by a look into the store and at the server."),
        Panel("Age of what is not yet durable", [("{{target}}", f"ops_wal_lag_seconds{{{_T}}}")], "s"),
        Panel("Held back on the server by the slot", [("{{target}}", f"ops_wal_slot_retained_bytes{{{_T}}}")], "bytes"),
        Panel("Stored", [("{{target}}", f"rate(ops_wal_raw_bytes_total{{{_T}}}[$__rate_interval])")], "Bps"),
        Panel("Gaps and reconnects", [
            ("{{target}} gaps", f"ops_wal_archive_gaps{{{_T}}}"),
            ("{{target}} reconnects in an hour", f"increase(ops_wal_reconnects_total{{{_T}}}[1h])"),
        ]),
    ],
    "Incidents and actions": [
        Panel("Paused", [("paused", "ops_paused")], "none", "stat", _NO_YES),
        Panel("Open", [("{{state}}", "sum by (state) (ops_incidents_open)")]),
        Panel("Age of the oldest", [("{{state}}", "time() - min by (state) (ops_incidents_oldest_timestamp_seconds)")], "s"),
        Panel("Closed in a day", [("{{ending}}", "sum by (ending) (increase(ops_incidents_closed_total[1d]))")]),
        Panel("Actions in a day", [
            ("{{playbook}}, helped: {{helped}}", "sum by (playbook, helped) (increase(ops_actions_total[1d]))"),
        ]),
        Panel("Actions that did not help, in a day", [("{{playbook}}", "ops:actions:bad_ratio_1d")], "percentunit"),
        Panel("Messages that nobody has got yet", [("messages", "ops_messages_unsent")]),
        Panel("Age of the oldest message", [("oldest", "time() - ops_messages_oldest_timestamp_seconds")], "s"),
    ],
    "Guards": [
        Panel("Refusals a second", [("{{guard}}", "ops:guard_refusals:rate_1h")], "cps"),
        Panel("Refusals in a day", [("{{guard}}", "sum by (guard) (increase(ops_guard_refusals_total[1d]))")]),
    ],
    "Ledger": [
        Panel("Entries", [("entries", "ops_ledger_entries"), ("signed", "ops_ledger_checkpoint_entries")]),
        Panel("Entries that no checkpoint signs", [("entries", "ops_ledger_entries - ops_ledger_checkpoint_entries")]),
        Panel("Age of the newest", [
            ("entry", "time() - ops_ledger_newest_timestamp_seconds"),
            ("checkpoint", "time() - ops_ledger_checkpoint_timestamp_seconds"),
        ], "s"),
        Panel("Entries to publish", [("entries", "ops_outbox_entries")]),
        Panel("Age of the oldest to publish", [("oldest", "time() - ops_outbox_oldest_timestamp_seconds")], "s"),
    ],
    "Sensors, schedules, runs": [
        Panel("On", [("{{kind}} {{name}}", "ops_instigator_running")], "none", "state-timeline", _YES_NO),
        Panel("Newest tick failed", [("{{kind}} {{name}}", "ops_tick_failed")], "none", "state-timeline", _NO_YES),
        Panel("Since the newest tick of a sensor", [("{{name}}", 'time() - ops_tick_timestamp_seconds{kind="sensor"}')], "s"),
        Panel("Runs that are not over", [("{{status}}", "ops_runs")]),
    ],
    "Lag, and the watcher itself": [
        Panel("Events unread", [
            ("{{system}} {{topic}}", "sum by (system, topic) (ops_events_lag)"),
        ], says="What the newest tick left in the topic."),
        Panel("Since the watchdog alert was seen", [
            ("{{alertmanager}}", "time() - ops_watchdog_seen_timestamp_seconds"),
        ], "s"),
        Panel("Source could be read", [("{{source}}", "ops_source_up")], "none", "state-timeline", _YES_NO,
              "What cannot be read has no values: empty panels above are unknown, not good."),
        Panel("Since a source was read", [("{{source}}", "time() - ops_source_read_timestamp_seconds")], "s"),
    ],
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    return {
        "uid": "ops-platform",
        "title": "Operations platform",
        "description": "Promises, incidents, the ledger and the sensors, with the watcher itself at the end.",
        "tags": ["ops-platform"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "1m",
        "time": {"from": "now-24h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_datasource(), _target()]},
        "panels": list(_panels()),
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _target() -> dict[str, Any]:
    query = {"query": "label_values(ops_promise_known, target)", "refId": "target"}
    return {
        "name": "target", "label": "Target", "type": "query", "datasource": DATASOURCE, "query": query, "refresh": 2,
        "multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}, "sort": 1,
    }  # fmt: skip


def _panels() -> Iterator[dict[str, Any]]:
    """Three panels beside one another, under the title of their row."""
    number, y = 0, 0
    for title, panels in ROWS.items():
        number += 1
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        y += 1
        for at, panel in enumerate(panels):
            number += 1
            width = WIDTH // 3
            yield _panel(number, panel, {"x": at % 3 * width, "y": y + at // 3 * HEIGHT, "w": width, "h": HEIGHT})
        y += -(-len(panels) // 3) * HEIGHT


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.words:
        words = {value: {"text": text, "color": colour} for value, (text, colour) in panel.words.items()}
        defaults |= {"max": 1, "mappings": [{"type": "value", "options": words}]}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.says,
        "gridPos": place,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + at), "datasource": DATASOURCE, "expr": query, "legendFormat": legend}
            for at, (legend, query) in enumerate(panel.queries)
        ],
    }


def text() -> str:
    """The file as it should be."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
