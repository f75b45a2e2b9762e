"""Make room on full disks: a shorter retention for a time, and exactly the old one afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.clock import wait_until
from ops_platform.errors import RefusedError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import PositiveDuration, Size
from ops_platform.remediation.playbook import Context, Done, Playbook
from ops_platform.remediation.playbooks.kafka.shared import MOVED, SETTING, SETTLES, Desk

if TYPE_CHECKING:
    from confluent_kafka.admin import AdminClient


class Retention(Strict):
    topic: str = Field(description="The topic.")
    to: PositiveDuration | None = Field(default=None, description="retention.ms while it is cut.")
    to_bytes: Size | None = Field(default=None, description="retention.bytes, of each partition, while it is cut.")
    minimum: PositiveDuration = Field(default=timedelta(hours=1), description="`to` is never shorter.")
    minimum_bytes: Size = Field(default=1 << 30, description="`to_bytes` is never smaller.")
    hold: PositiveDuration = Field(default=timedelta(hours=4), description="After this time it is as it was.")
    readers: list[str] = Field(
        default=[], description="Consumer groups that must have read whatever `to` cuts off; else nothing is done."
    )

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.to is None and self.to_bytes is None:
            raise ValueError("give to, to_bytes or both")
        if self.to is not None and self.to < self.minimum:
            raise ValueError("to is shorter than minimum")
        if self.to_bytes is not None and self.to_bytes < self.minimum_bytes:
            raise ValueError("to_bytes is smaller than minimum_bytes")
        if self.readers and self.to_bytes is not None:
            raise ValueError("which records to_bytes cuts off is not known before: readers goes with `to` alone")
        return self


class _Settings:
    """Settings of one topic that are set or taken back. In a change `own` says whether the topic itself has a value."""

    name = "kafka.cut_retention"

    def __init__(self, context: Context[Retention]) -> None:
        self.context = context
        self.desk = Desk(context)
        self.topic = context.parameters.topic

    @property
    def target_id(self) -> str:
        return self.context.subject.id

    def check(self, change: Change) -> Applied | None:
        now = self.now(change)
        if _same(now, change.after):
            return Applied(Outcome.ALREADY_DONE, "it is so by now")
        if not _same(now, change.before):
            return Applied(Outcome.CONTENDED, f"somebody set it to {now['value']} meanwhile")
        return None

    def apply(self, change: Change) -> Applied:
        from confluent_kafka.admin import (  # pyright: ignore[reportPrivateImportUsage]
            AlterConfigOpType,  # pyright: ignore[reportPrivateImportUsage]
            ConfigEntry,  # pyright: ignore[reportPrivateImportUsage]
            ConfigResource,  # pyright: ignore[reportPrivateImportUsage]
            ResourceType,  # pyright: ignore[reportPrivateImportUsage]
        )

        own = change.after["own"]
        entry = ConfigEntry(
            change.object.rpartition(" ")[2],
            change.after["value"] if own else None,  # pyright: ignore[reportArgumentType] - nothing is deleted to
            incremental_operation=AlterConfigOpType.SET if own else AlterConfigOpType.DELETE,
        )
        resource = ConfigResource(ResourceType.TOPIC, self.topic, incremental_configs=[entry])

        def ask(admin: AdminClient) -> None:
            seconds = self.desk.seconds
            admin.incremental_alter_configs([resource], request_timeout=seconds)[resource].result(seconds + 1)

        self.desk.ask("AlterConfigs", f"topic {self.topic}", ask)
        return Applied(
            Outcome.APPLIED, f"set to {change.after['value']}" if own else "taken back: the brokers' default counts"
        )

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        """Asked anew, of whichever broker answers."""
        checks: list[Check] = []
        for change in plan.changes:
            if outcomes[change.object].outcome in MOVED:
                good = wait_until(
                    lambda change=change: _same(self.now(change), change.after),
                    clock=self.context.clock,
                    seconds=SETTLES,
                )
                checks.append(Check(change.object, good, f"it is {self.now(change)['value']}"))
        return Verification(tuple(checks) or (Check("settings", True, "none was changed"),))

    def now(self, change: Change) -> dict[str, Any]:
        return _stands(self.desk.settings(self.topic)[change.object.rpartition(" ")[2]])


def _stands(entry: Any) -> dict[str, Any]:
    from confluent_kafka.admin import ConfigSource  # pyright: ignore[reportPrivateImportUsage]

    return {"value": entry.value, "own": entry.source == ConfigSource.DYNAMIC_TOPIC_CONFIG.value}


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """What the default is where the topic has no value of its own does not matter."""
    return one["own"] == other["own"] and (not one["own"] or one["value"] == other["value"])


class CutRetention(_Settings):
    """`actions.Action`: a topic keeps its records for a shorter time."""

    def plan(self) -> Plan:
        settings, given = self.desk.settings(self.topic), self.context.parameters
        self._need_deleting(settings)
        wanted: list[tuple[str, int]] = []
        if given.to is not None:
            wanted.append(("retention.ms", int(given.to.total_seconds() * 1000)))
        if given.to_bytes is not None:
            wanted.append(("retention.bytes", given.to_bytes))
        changes: list[Change] = []
        for key, to in wanted:
            before = _stands(settings[key])
            if int(before["value"]) < 0 or int(before["value"]) > to:  # -1: without end
                after = {"value": str(to), "own": True}
                changes.append(Change(SETTING, f"{self.topic} {key}", before, after, reversible=True))
        if changes:
            self._need_read()
        return Plan(self.name, self.target_id, tuple(changes), self.context.clock.now())

    def check(self, change: Change) -> Applied | None:
        if (found := super().check(change)) is not None:
            return found
        self._need_deleting(self.desk.settings(self.topic))
        self._need_read()
        return None

    def _need_deleting(self, settings: Mapping[str, Any]) -> None:
        policy = settings["cleanup.policy"].value
        if policy != "delete" or self.topic.startswith("__"):
            raise RefusedError(
                f"it is not a topic whose records only expire (cleanup.policy {policy})", where=self.topic,
                remedy="make room in another way: what a compacted topic holds is its data",
            )  # fmt: skip

    def _need_read(self) -> None:
        """Raises RefusedError where a reader would lose what it has not read."""
        readers, to = self.context.parameters.readers, self.context.parameters.to
        if not readers or to is None:
            return
        kept = self._kept(self.context.clock.now() - to)
        for group in readers:
            committed = self.desk.committed(group, self.topic, sorted(kept), "Describe")
            for number, (first, keep) in kept.items():
                at = committed.get(number)
                if max(first, at if at is not None else first) < keep:
                    raise RefusedError(
                        f"the group {group} has read up to {at}, and everything below {keep} would go",
                        where=f"{self.topic}/{number}", remedy="let it catch up, or choose a longer `to`",
                    )  # fmt: skip

    def _kept(self, since: datetime) -> dict[int, tuple[int, int]]:
        """By partition: the first offset that is there, and the first that is younger than `since` (else the next one)."""
        from confluent_kafka import TopicPartition
        from confluent_kafka.admin import OffsetSpec  # pyright: ignore[reportPrivateImportUsage]

        where = [TopicPartition(self.topic, one.number) for one in self.desk.partitions([self.topic])]

        def offsets(spec: Any) -> dict[int, int]:
            wanted: dict[TopicPartition, Any] = dict.fromkeys(where, spec)

            def ask(admin: AdminClient) -> dict[int, int]:
                asked = admin.list_offsets(wanted, request_timeout=self.desk.seconds)
                return {place.partition: answer.result(self.desk.seconds + 1).offset for place, answer in asked.items()}

            return self.desk.ask("Describe", f"topic {self.topic}", ask)

        first, end = offsets(OffsetSpec.earliest()), offsets(OffsetSpec.latest())
        young = offsets(OffsetSpec.for_timestamp(int(since.timestamp() * 1000)))
        return {number: (first[number], young[number] if young[number] >= 0 else end[number]) for number in first}


class RestoreRetention(_Settings):
    """`actions.Action`: exactly what stood there before. What somebody set meanwhile stays, and the undo is then not complete."""

    name = "kafka.cut_retention.undo"

    def __init__(self, context: Context[Retention], done: Sequence[Done]) -> None:
        super().__init__(context)
        self._done = done

    def plan(self) -> Plan:
        changes = [
            Change(SETTING, one.change.object, one.change.after, one.change.before, reversible=True)
            for one in self._done
        ]
        return Plan(self.name, self.target_id, tuple(changes), self.context.clock.now())

    def check(self, change: Change) -> Applied | None:
        """That it is so already is one broker's word, which may not have heard of the cut yet: set again it is for certain, and harms nothing."""
        found = super().check(change)
        return None if found is not None and found.outcome is Outcome.ALREADY_DONE else found


class CutRetentionPlaybook(Playbook[Retention]):
    name = "kafka.cut_retention"
    title = "Cut a topic's retention for a time"
    kinds = frozenset({"kafka"})
    what = (
        "On a disk that fills up: has a topic keep its records for a shorter time or in fewer bytes, within the rule's bounds, and sets "
        "back exactly what stood there when the time is over."
    )
    why_safe = (
        "Never a compacted topic, never below the rule's minimum, and nothing that the named readers have not read yet."
    )
    blast_radius = "Records older than the new retention are deleted for good within minutes; setting it back does not bring them back."
    rights = (
        "AlterConfigs on the topic (which brings DescribeConfigs)",
        "with `readers` also Describe on the topic and on those groups",
    )
    undo_text = "Sets the old value, or takes the topic's own value back where it had none; by itself after `hold`."
    Parameters = Retention

    def action(self, context: Context[Retention]) -> Action:
        return CutRetention(context)

    def undo(self, context: Context[Retention], done: Sequence[Done]) -> Action | None:
        return RestoreRetention(context, done)

    def undo_after(self, context: Context[Retention]) -> timedelta | None:
        return context.parameters.hold
