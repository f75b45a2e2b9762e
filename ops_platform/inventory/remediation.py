"""Which alerts and events lead to which playbook, under which guards: the part `remediation` of platform.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from ops_platform.inventory.base import AnyMode, Mode, Strict
from ops_platform.inventory.matchers import AlertMatcher
from ops_platform.inventory.values import Duration, Id, PositiveDuration, SecretRef, Size, Url


def _moment(value: Any) -> datetime:
    """YAML's own timestamps lose a zone that was not written: only a text with a zone, or an aware moment, is taken."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a time; write it like '2026-12-24T18:00:00+01:00'") from None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError("a time needs a zone, such as '2026-12-24T18:00:00+01:00'")
    return value


Moment = Annotated[datetime, BeforeValidator(_moment)]


class Budget(Strict):
    """At most so many actions in a sliding time. Claimed atomically in PostgreSQL, and kept over every restart."""

    count: Annotated[int, Field(ge=1)] = Field(description="Actions at most …")
    per: PositiveDuration = Field(description="… within this time.")


class CircuitBreaker(Strict):
    """Stops a playbook that does not help: after so many bad ends it is not applied for a while."""

    failures: Annotated[int, Field(ge=1)] = Field(
        default=3, description="Actions of one playbook that failed or did not help …"
    )
    within: PositiveDuration = Field(default=timedelta(hours=24), description="… within this time open the circuit.")
    open_for: PositiveDuration = Field(
        default=timedelta(hours=4), description="For this long nothing is applied; then one is tried, and decides."
    )


class Freeze(Strict):
    """A time in which nothing is changed."""

    starts: Moment = Field(description="From this moment …")
    ends: Moment = Field(description="… until this one.")
    why: str = Field(description="Shown wherever it refuses.")
    environments: list[Id] = Field(default=[], description="In these alone; empty: everywhere.")

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.ends <= self.starts:
            raise ValueError("a freeze ends after it starts")
        return self


class EventMatch(Strict):
    """Which CloudEvents a rule is about."""

    type: str = Field(description="The CloudEvent's type, such as com.example.disk.full.")
    source: str | None = Field(default=None, description="The CloudEvent's source.")
    match: list[AlertMatcher] = Field(
        default=[],
        description="Conditions on its attributes and, as data.NAME (data.a.b below it), on the fields of its data.",
    )


class FromLabel(Strict):
    """A value that the alert or event brings."""

    label: str = Field(description="Label of the alert, or of an event: an attribute, or data.NAME.")
    strip: str | None = Field(default=None, description="A suffix that is taken off, such as :9187 of an instance.")


AN_ID, A_LABEL = "an id", "a label"
_Target = Annotated[
    Annotated[Id, Tag(AN_ID)] | Annotated[FromLabel, Tag(A_LABEL)],
    Discriminator(lambda value: A_LABEL if isinstance(value, dict | FromLabel) else AN_ID),
]


class MetricCheck(Strict):
    """A metric that must be good after the action."""

    prometheus: Id = Field(description="The system that is asked.")
    query: str = Field(
        description="PromQL. `$target` and `$label_NAME` are filled in, quoted as PromQL strings inside."
    )
    holds: Annotated[str, Field(pattern=r"^(<|<=|>|>=|==|!=) *-?[0-9.]+([eE]-?[0-9]+)?$")] = Field(
        description="What every value of the answer must fulfil, such as `< 0.9`. An empty answer fulfils nothing."
    )
    worse: Annotated[str, Field(pattern=r"^(<|<=|>|>=|==|!=) *-?[0-9.]+([eE]-?[0-9]+)?$")] | None = Field(
        default=None, description="A value that means that it got worse: the action is undone at once."
    )
    empty_is_good: bool = Field(default=False, description="For queries of the form `metric > 3`: no answer is good.")


class VerifyRule(Strict):
    """How a rule finds out that its action helped. The playbook's own look at the system always comes first."""

    metric: MetricCheck | None = Field(default=None, description="A metric; the alert must end where none is given.")
    within: PositiveDuration = Field(default=timedelta(minutes=10), description="It must be good by then.")
    every: PositiveDuration = Field(default=timedelta(seconds=15), description="How often it is looked at.")


Approvals = Literal["never", "classified", "always"]


class Rule(Strict):
    """One kind of alert or event, and what is done about it."""

    id: Id = Field(description="Its name in incidents, messages and the ledger.")
    description: str = Field(default="", description="For people.")
    alert: Annotated[list[AlertMatcher], Field(min_length=1)] | None = Field(
        default=None, description="Alerts that fulfil all of these, as Alertmanager's matchers."
    )
    event: EventMatch | None = Field(default=None, description="Or events that fulfil these.")
    firing_for: Duration = Field(
        default=timedelta(0), description="Only alerts that have been firing for this long: what flaps is left alone."
    )
    target: _Target = Field(description="The target or system, or the label that names it.")
    playbook: str = Field(description="What is done, such as postgres.end_idle_sessions; docs/reference/playbooks.md.")
    parameters: dict[str, Any] = Field(default={}, description="Of the playbook; a value may be `{label: NAME}`.")
    mode: AnyMode = Field(default=Mode.OBSERVE, description="observe says what would be done; enforce does it.")
    cooldown: Duration = Field(
        default=timedelta(minutes=30), description="After an action of this rule on a target no other for this long."
    )
    budget: Budget = Field(
        default=Budget(count=5, per=timedelta(days=1)), description="Actions of this rule, over all targets."
    )
    approval: Approvals = Field(
        default="classified",
        description="Whether a person approves each plan: never, for confidential and restricted targets, always.",
    )
    maintenance: Literal["anytime", "inside", "outside"] = Field(
        default="anytime", description="Inside or outside of the target's maintenance windows alone."
    )
    min_healthy: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Peers that must be healthy besides what is acted on; the playbook's own by default."
    )
    max_changes: Annotated[int, Field(ge=1)] = Field(default=20, description="A plan with more changes is refused.")
    max_percent: Annotated[float, Field(gt=0, le=100)] = Field(
        default=34, description="A plan that touches a larger share of its kind is refused, beyond a single one."
    )
    max_attempts: Annotated[int, Field(ge=1, le=10)] = Field(
        default=2, description="Actions in one incident; then it is escalated."
    )
    verify: VerifyRule = Field(default=VerifyRule(), description="How it is found out that the action helped.")
    undo: Literal["auto", "ask", "never"] = Field(
        default="auto", description="When it did not help or got worse: undo by itself, when somebody asks, not at all."
    )
    give_up_after: PositiveDuration = Field(
        default=timedelta(hours=4), description="An incident that is still open then is escalated and closed."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.alert is None) == (self.event is None):
            raise ValueError("give either alert or event")
        if self.event is not None and self.verify.metric is None and "verify" in self.model_fields_set:
            raise ValueError("an event does not end: verify needs a metric")
        return self


class EventSchema(Strict):
    """What the data of an event must look like."""

    type: str = Field(description="The CloudEvent's type.")
    json_schema: str = Field(description="File of a JSON Schema (2020-12), relative to platform.yaml.")


class EventSource(Strict):
    """Topics that are read, exactly once into runs."""

    kafka: Id = Field(description="The Kafka system.")
    topics: Annotated[list[str], Field(min_length=1)] = Field(description="Their names.")
    group: str = Field(
        default="ops-platform", description="Consumer group that offsets are committed to, for lag exporters."
    )
    start: Literal["earliest", "latest"] = Field(
        default="latest", description="Where a topic is begun that was never read; a gap is never skipped by this."
    )
    made_anew: Literal["stand", "begin"] = Field(
        default="stand",
        description="A topic that was deleted and made anew: reading stands until a person decides, or it begins as `start` says. "
        "`begin` is for brokers that keep nothing when they end, as in development: what was not read is lost without a word.",
    )
    dead_letter: str = Field(description="Topic for what cannot be read; it must exist.")
    schemas: list[EventSchema] = Field(default=[], description="By type of event; without one any data is taken.")
    largest: Size = Field(default=10 << 20, description="A message above this many bytes goes to the dead letters.")


class Publishing(Strict):
    """Where our own events go."""

    kafka: Id = Field(description="The Kafka system.")
    topic: str = Field(description="The topic; the subject is the key, so that order holds for each subject.")
    source: str = Field(default="/ops-platform", description="The CloudEvents' source.")


class Chat(Strict):
    """Slack as an app: threads, buttons."""

    api: Url = Field(default="https://slack.com", description="Address of Slack's API.")
    bot_token: SecretRef = Field(description="Token of the bot (scope chat:write).")
    signing_secret: SecretRef | None = Field(default=None, description="Verifies what buttons send; none: no buttons.")
    channel: str = Field(description="Channel for incidents; an owner's own one comes first.")
    people: dict[str, str] = Field(
        default={}, description="Slack user id to the name by which `ops` and the inventory know the person."
    )


class Remediation(Strict):
    """Alerts and events turned into safe action."""

    alertmanagers: list[Id] = Field(default=[], description="Systems whose alerts are polled.")
    events: list[EventSource] = Field(default=[], description="Topics whose events are read.")
    publish: Publishing | None = Field(
        default=None, description="Where backups, proofs, incidents and actions are told."
    )
    slack: Chat | None = Field(default=None, description="Where people hear of incidents.")
    rules: list[Rule] = Field(default=[], description="Every rule that matches counts: one incident each.")
    freezes: list[Freeze] = Field(default=[], description="Times in which nothing is changed.")
    budget: Budget = Field(
        default=Budget(count=20, per=timedelta(hours=1)), description="Actions of all rules together."
    )
    breaker: CircuitBreaker = Field(default=CircuitBreaker(), description="For each playbook.")
    signals_kept: PositiveDuration = Field(
        default=timedelta(days=400),
        description="Alerts and events as they were seen, for `ops rules replay`; they are forgotten after this time, but for what still "
        "fires.",
    )
    approval_valid_for: PositiveDuration = Field(
        default=timedelta(hours=1), description="An approval that is older counts no more."
    )
    approvers: list[str] = Field(
        default=[], description="Who may approve, by the name that `ops` knows; empty: whoever may write the database."
    )

    @cached_property
    def by_alertname(self) -> Mapping[str | None, tuple[Rule, ...]]:
        """The rules that may be about an alert of this name, in the order of the file; under None those for all other names.

        Ten thousand alerts at once then meet a few rules each, not all of them.
        """
        asked = [(rule, _alertname(rule)) for rule in self.rules]
        names = {None, *(name for _, name in asked)}
        return {name: tuple(rule for rule, wanted in asked if wanted in (None, name)) for name in names}


def _alertname(rule: Rule) -> str | None:
    """The one alertname that the rule asks for; None where it takes several, or is about events."""
    return next((one.value for one in rule.alert or () if one.name == "alertname" and one.operator == "="), None)
