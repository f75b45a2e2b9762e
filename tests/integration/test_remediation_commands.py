"""`ops incidents` and `ops rules` as their users call them, over a real PostgreSQL: answers, messages, exit codes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from ops_platform.remediation.explain import Explained
from ops_platform.remediation.model import Ending, Incident, State
from ops_platform.remediation.replay import Report
from tests import prometheus_rig, remediation_rig
from tests.integration.test_commands import OPS
from tests.remediation_rig import Desk, new_desk
from tests.rig import eventually

__all__ = ["new_desk"]
NewDesk = Callable[..., Desk]
HOOK = {
    "playbook": "http.webhook",
    "parameters": {"url": "https://hooks.example.com/x", "secret": "env://HOOK_SECRET"},
}


def a_rule(**more: Any) -> dict[str, Any]:
    """A desk goes by the real clock: what does not help is not waited for longer than it takes to see that."""
    return remediation_rig.a_rule(**{"verify": {"within": "2s", "every": "1s"}, **more})


def ops(desk: Desk, *words: str, code: int = 0, who: str = "ann", typed: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [OPS, *words], env={**desk.env, "OPS_ACTOR": who}, input=typed, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done


def answer(kind: Any, desk: Desk, *words: str, code: int = 0) -> Any:
    return TypeAdapter(kind).validate_json(ops(desk, *words, "--json", code=code).stdout)


# Incidents


@pytest.fixture
def waiting(new_desk: NewDesk) -> tuple[Desk, Incident]:
    desk = new_desk([a_rule(approval="always")], approvers=["ann", "bea", "rule dark"])
    (incident,) = desk.fire("a")
    waits = desk.work(incident)
    assert waits.state is State.WAITING
    return desk, waits


def digest(incident: Incident) -> str:
    assert incident.digest is not None
    return incident.digest


def test_an_approval_by_command_is_for_the_plan_that_was_read_and_leads_to_its_action(
    waiting: tuple[Desk, Incident],
) -> None:
    desk, incident = waiting
    said = ops(desk, "incidents", "approve", incident.id, "--digest", digest(incident)[:12]).stdout
    assert said.startswith("approved by ann, valid until ")
    assert [one.id for one in desk.store.due()] == [incident.id]
    put = desk.lamps.put

    def helps(lamp: str, state: str) -> None:
        put(lamp, state)
        desk.eyes.signals.clear()

    desk.lamps.put = helps  # type: ignore[method-assign]
    assert desk.work(incident).ending is Ending.HELPED
    done = answer(Incident, desk, "incidents", "show", incident.id)
    assert (done.state, done.ending) == (State.CLOSED, Ending.HELPED)


@pytest.mark.parametrize(
    ("words", "who", "code", "said"),
    [
        (["--digest", "0" * 12], "ann", 2, "and not 000000000000"),
        (["--digest", "short"], "ann", 2, "the plan is"),
        ([], "mallory", 1, "mallory is not among those who may approve"),
        ([], "rule dark", 1, "rule dark proposed it and cannot approve it"),
    ],
    ids=["an outdated plan", "too little of a digest", "a stranger", "the proposer"],
)
def test_an_approval_that_does_not_count_is_refused_with_its_reason(
    waiting: tuple[Desk, Incident], words: list[str], who: str, code: int, said: str
) -> None:
    desk, incident = waiting
    refused = ops(
        desk, "incidents", "approve", incident.id, *(words or ["--digest", digest(incident)]), code=code, who=who
    )
    assert said in refused.stderr
    assert desk.store.decision(incident) is None


def test_an_approval_that_was_given_and_has_expired_lets_nothing_be_applied(new_desk: NewDesk) -> None:
    desk = new_desk([a_rule(approval="always")], approval_valid_for="1s")
    (incident,) = desk.fire("a")
    waits = desk.work(incident)
    ops(desk, "incidents", "approve", waits.id, "--digest", digest(waits))
    with desk.store.transaction() as t:
        t.connection.execute("update ops_remediation.approvals set expires_at = expires_at - %s", [timedelta(hours=1)])
    assert desk.store.due() == []
    assert desk.work(waits).state is State.WAITING
    assert desk.lamps.switched == []


def test_without_a_digest_the_plan_is_shown_and_asked_about(waiting: tuple[Desk, Incident]) -> None:
    desk, incident = waiting
    asked = ops(desk, "incidents", "approve", incident.id, code=1, typed="n\n")
    assert "lamp" in asked.stdout
    assert "you said no" in asked.stderr
    nobody = ops(desk, "incidents", "approve", incident.id, code=2)
    assert f"give --digest {digest(incident)[:12]}" in nobody.stderr
    assert desk.store.decision(incident) is None
    ops(desk, "incidents", "approve", incident.id, typed="y\n")
    assert desk.store.decision(incident) is not None


def test_what_is_refused_by_command_is_closed_by_the_next_run_and_cannot_be_approved_any_more(
    waiting: tuple[Desk, Incident],
) -> None:
    desk, incident = waiting
    ops(desk, "incidents", "refuse", incident.id, "--digest", digest(incident), "--why", "the sale is on")
    assert desk.work(incident).ending is Ending.REFUSED
    assert "refuse: the sale is on  (ann" in ops(desk, "incidents", "show", incident.id).stdout
    for words in (["--digest", digest(incident)], []):  # without it nobody is asked first
        late = ops(desk, "incidents", "approve", incident.id, *words, code=1)
        assert "the incident is closed, and not waiting" in late.stderr


def test_list_and_show_answer_as_their_schema_says(waiting: tuple[Desk, Incident]) -> None:
    desk, incident = waiting
    (listed,) = answer(list[Incident], desk, "incidents", "list")
    assert listed == answer(Incident, desk, "incidents", "show", incident.id[:6]) == desk.store.get(incident.id)
    assert "there is no incident" in ops(desk, "incidents", "show", "i-none", code=1).stderr
    assert "--since goes with --all" in ops(desk, "incidents", "list", "--since", "2026-01-01T00:00Z", code=2).stderr


def test_pause_all_by_command_stops_a_run_before_its_next_change(new_desk: NewDesk) -> None:
    desk = new_desk([a_rule(parameters={"lamps": ["lamp", "second"]})])
    desk.lamps.put("second", "on")
    (incident,) = desk.fire("a")
    put = desk.lamps.put

    def paused_by_somebody(lamp: str, state: str) -> None:
        put(lamp, state)
        ops(desk, "incidents", "pause-all", "--why", "something is wrong")

    desk.lamps.put = paused_by_somebody  # type: ignore[method-assign]
    desk.work(incident)
    assert [lamp for _, lamp, to in desk.lamps.switched if to == "off"] == ["lamp"]
    assert desk.lamps.state("second") == "on"
    assert "PAUSED by ann" in ops(desk, "incidents", "list").stderr
    assert ops(desk, "incidents", "resume").stdout == "resumed\n"
    assert ops(desk, "incidents", "resume").stdout == "nothing was paused\n"


# Rules


def alert_file(desk: Desk, value: Any) -> str:
    path: Path = desk.home / "alert.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def test_rules_are_checked_and_a_wrong_playbook_is_named(new_desk: NewDesk) -> None:
    desk = new_desk([a_rule(playbook="vault.nothing", mode="observe")])
    wrong = ops(desk, "rules", "check", code=2)
    assert "vault.nothing" in wrong.stderr
    (problem,) = answer(list[str], desk, "rules", "check", code=2)
    assert problem.startswith("rule dark: ")


def test_a_misspelt_parameter_is_named_although_another_one_comes_from_the_signal(new_desk: NewDesk) -> None:
    right = {**HOOK["parameters"], "body": {"lamp": {"label": "lamp"}}}  # type: ignore[dict-item]
    desk = new_desk([a_rule(playbook="http.webhook", parameters={**right, "secrett": {"label": "lamp"}})])
    (problem,) = answer(list[str], desk, "rules", "check", code=2)
    assert "parameter 'secrett': there is no such parameter" in problem
    del right["secret"]
    desk = new_desk([a_rule(playbook="http.webhook", parameters={**right, "url": {"label": "url"}})])
    (problem,) = answer(list[str], desk, "rules", "check", code=2)
    assert "parameter 'secret': it is missing" in problem
    desk = new_desk([a_rule(playbook="http.webhook", parameters={**right, "secret": {"label": "secret"}})])
    assert answer(list[str], desk, "rules", "check") == []


def test_rules_that_are_good_are_counted(new_desk: NewDesk) -> None:
    desk = new_desk([a_rule(**HOOK)])
    assert ops(desk, "rules", "check").stdout == "1 rule, all good\n"
    assert answer(list[str], desk, "rules", "check") == []


def test_explaining_offline_says_which_rule_would_do_what(new_desk: NewDesk) -> None:
    desk = new_desk([a_rule(**HOOK)])
    file = alert_file(desk, {"alerts": [{"labels": {"alertname": "LampOn"}, "startsAt": "2026-03-01T03:00:00Z"}]})
    (found,) = answer(list[Explained], desk, "rules", "explain", file, "--offline")
    assert (found.rule, found.playbook, found.target, found.rulings) == ("dark", "http.webhook", "hall", None)
    other = alert_file(desk, {"labels": {"alertname": "Another"}})
    assert ops(desk, "rules", "explain", other, "--offline").stdout == "no rule is about it\n"


def test_explaining_says_which_guard_would_refuse_and_records_nothing(new_desk: NewDesk) -> None:
    desk = new_desk([a_rule(**HOOK)])
    desk.store.pause("a test", who="ann")
    before = len(list(desk.store.ledger.entries()))
    file = alert_file(desk, [{"labels": {"alertname": "LampOn"}, "startsAt": "2026-03-01T03:00:00Z"}])
    (found,) = answer(list[Explained], desk, "rules", "explain", file)
    refusing = {ruling["guard"] for ruling in found.rulings if not ruling["allows"]}
    assert "pause" in refusing
    assert found.would_apply is False
    assert len(list(desk.store.ledger.entries())) == before
    assert desk.store.list(all_=True) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "this is not JSON"),
        ('"text"', "neither an alert nor a CloudEvent"),
        ('{"labels": {"alertname": 1}}', "a mapping of texts"),
        ('{"labels": {}, "startsAt": "yesterday"}', "is not a time"),
        (None, "this file cannot be read"),
    ],
    ids=["bad JSON", "no alert", "bad labels", "bad time", "no file"],
)
def test_what_cannot_be_explained_is_said(new_desk: NewDesk, content: str | None, said: str) -> None:
    desk = new_desk([a_rule(**HOOK)])
    file = str(desk.home / "missing.json") if content is None else alert_file(desk, content)
    assert said in ops(desk, "rules", "explain", file, "--offline", code=2).stderr


def test_what_was_recorded_is_replayed_through_other_rules(new_desk: NewDesk) -> None:
    desk = new_desk([a_rule(**HOOK)])
    desk.fire("a", "b")
    now = desk.store.clock.now()
    span = ["--from", (now - timedelta(hours=1)).isoformat(), "--to", (now + timedelta(minutes=1)).isoformat()]
    report = answer(Report, desk, "rules", "replay", *span)
    assert report.signals == 2
    assert len(report.incidents) == 2
    other = desk.home / "other.yaml"
    other.write_text(desk.file.read_text().replace("alertname=LampOn", "alertname=Another"))
    changed = answer(Report, desk, "rules", "replay", *span, "--rules", str(other))
    assert (changed.unmatched, changed.incidents) == (2, ())
    assert "--to lies before --from" in ops(desk, "rules", "replay", "--from", span[3], "--to", span[1], code=2).stderr
    assert desk.store.claims(now - timedelta(days=1)) == [], "nothing is claimed for what is only played"


def test_the_history_of_a_prometheus_is_replayed(new_desk: NewDesk) -> None:
    labels = {"lamp": "a"}
    rules = [{"name": "g", "interval": "1s", "rules": [{"alert": "LampOn", "expr": "vector(1)", "labels": labels}]}]
    with prometheus_rig.prometheus(rules=rules) as prometheus:
        system = {"id": "metrics", "kind": "prometheus", "url": prometheus.url}
        desk = new_desk([a_rule(**HOOK)], systems=[system])
        since = (desk.store.clock.now() - timedelta(minutes=5)).isoformat()
        words = ("rules", "replay", "--from", since, "--prometheus", "metrics")
        report = eventually(lambda: found if (found := answer(Report, desk, *words)).signals else None)
        assert (report.signals, report.unmatched) == (1, 0)
        assert [one.rule for one in report.incidents] == ["dark"]


def test_the_run_of_an_incident_shows_its_guards_record_and_where_to_look_on(new_desk: NewDesk) -> None:
    from jobs.remediation import incident_metadata

    desk = new_desk([a_rule()])
    (incident,) = desk.fire("a")
    (other,) = desk.fire("b")
    done = desk.work(incident)
    record = desk.store.record_of(done)
    assert {"action.plan", "action.outcome", "action.verification", "incident.applying"} <= {e.kind for e in record}
    assert other.id not in {entry.body.get("incident") for entry in record}
    shown = incident_metadata(done, desk.store.history_of(done.id), record)
    text = {name: str(getattr(value, "value", value)) for name, value in shown.items()}
    assert "| mode | allows |" in text["guards"]
    assert all(f"| {entry.seq} |" in text["record"] and entry.sha256[:12] in text["record"] for entry in record)
    assert f"/runs?q%5B0%5D=tag%3Aops%2Fincident%3D{done.id}" in text["look on"]
    assert max(map(len, text["timeline"].splitlines())) < 60


def test_an_undo_is_asked_for_where_something_can_be_undone_alone(new_desk: NewDesk) -> None:
    desk = new_desk([a_rule(mode="observe")])
    (observed,) = desk.fire("a")
    desk.work(observed)
    refused = ops(desk, "incidents", "undo", observed.id, code=1)
    assert "nothing was applied here that can be undone" in refused.stderr
    assert desk.store.get(observed.id).state is State.OBSERVED
    desk = new_desk([a_rule(undo="ask", max_attempts=1)])
    (incident,) = desk.fire("a")
    assert desk.work(incident).can_be_undone
    for outcome in desk.store.get(incident.id).outcomes:
        assert outcome["change"]["reversible"]
    ops(desk, "incidents", "undo", incident.id)
    assert "it is being undone already" in ops(desk, "incidents", "undo", incident.id, code=1).stderr
