"""Lead from the preferred replicas again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.clients.kafka import Said
from ops_platform.clock import wait_until
from ops_platform.errors import NotThereError
from ops_platform.inventory.base import Strict
from ops_platform.remediation.model import Peers
from ops_platform.remediation.playbook import Context, Playbook
from ops_platform.remediation.playbooks.kafka.shared import MOVED, PARTITION, SETTLES, Desk, Partition

if TYPE_CHECKING:
    from confluent_kafka.admin import AdminClient


class PreferredLeaders(Strict):
    topics: list[str] = Field(default=[], description="In these topics alone; empty: in all that our user may see.")


@dataclass
class ElectPreferred:
    """`actions.Action`: an election for each partition that is not led by its preferred replica, although that is in sync."""

    context: Context[PreferredLeaders]
    name = "kafka.elect_preferred_leaders"

    def __post_init__(self) -> None:
        self._desk = Desk(self.context)

    @property
    def target_id(self) -> str:
        return self.context.subject.id

    def partitions(self) -> list[Partition]:
        return self._desk.partitions(self.context.parameters.topics or self._desk.names())

    def plan(self) -> Plan:
        partitions = self.partitions()
        changes = [
            Change(PARTITION, one.name, {"leader": one.leader}, {"leader": one.preferred}, reversible=False)
            for one in partitions
            if one.may_be_led_better
        ]
        facts = {
            "without_leader": [one.name for one in partitions if one.leader is None],
            "preferred_not_in_sync": [one.name for one in partitions if one.preferred not in one.in_sync],
        }
        population = {PARTITION: len(partitions)}
        return Plan(self.name, self.target_id, tuple(changes), self.context.clock.now(), population, facts)

    def check(self, change: Change) -> Applied | None:
        now = self._look(change)
        if now.leader == change.after["leader"]:
            return Applied(Outcome.ALREADY_DONE, "it leads by now")
        if now.preferred != change.after["leader"] or now.leader != change.before["leader"]:
            return Applied(Outcome.CONTENDED, f"led by {now.leader} and with {now.preferred} preferred by now")
        if not now.may_be_led_better:
            return Applied(Outcome.REFUSED, f"the preferred replica {now.preferred} is not in sync any more")
        return None

    def apply(self, change: Change) -> Applied:
        from confluent_kafka import ElectionType, TopicPartition

        topic, _, number = change.object.rpartition("/")
        where = TopicPartition(topic, int(number))

        def ask(admin: AdminClient) -> dict[Any, Any]:
            # Without request_timeout, at which the binding (2.16) fails; it is socket.timeout.ms then, which is the same.
            return admin.elect_leaders(ElectionType.PREFERRED, [where]).result(self._desk.seconds + 1)

        for error in self._desk.ask("Alter", "the cluster", ask).values():
            if error is None:
                continue
            name = error.args[0].name()
            if name == "ELECTION_NOT_NEEDED":
                return Applied(Outcome.ALREADY_DONE, "it leads by now")
            if name in ("PREFERRED_LEADER_NOT_AVAILABLE", "ELIGIBLE_LEADERS_NOT_AVAILABLE"):
                return Applied(Outcome.REFUSED, "the preferred replica cannot lead now")
            raise self._desk.kafka.error(error.args[0], Said(), change.object)
        return Applied(Outcome.APPLIED, f"led by {change.after['leader']}")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        """By the metadata that every client goes by."""
        moved = [change for change in plan.changes if outcomes[change.object].outcome in MOVED]
        if not moved:
            return Verification((Check("leaders", True, "none was elected"),))
        wrong: list[str] = []

        def good() -> bool:
            leaders = {one.name: one.leader for one in self._desk.partitions(sorted({_topic_of(one) for one in moved}))}
            wrong[:] = [one.object for one in moved if leaders.get(one.object) != one.after["leader"]]
            return not wrong

        wait_until(good, clock=self.context.clock, seconds=SETTLES)
        said = (
            f"{len(moved)} partitions are led by their preferred replica"
            if not wrong
            else f"not led so: {', '.join(wrong)}"
        )
        return Verification((Check("leaders", not wrong, said),))

    def _look(self, change: Change) -> Partition:
        topic = _topic_of(change)
        for one in self._desk.partitions([topic]):
            if one.name == change.object:
                return one
        raise NotThereError("there is no such partition any more", where=change.object)


def _topic_of(change: Change) -> str:
    return change.object.rpartition("/")[0]


class ElectPreferredLeaders(Playbook[PreferredLeaders]):
    name = "kafka.elect_preferred_leaders"
    title = "Elect the preferred leaders"
    kinds = frozenset({"kafka"})
    what = (
        "Has partitions led by their preferred replica again, as after a broker's restart, so that brokers carry the load that they were "
        "meant to. Only where that replica is in sync."
    )
    why_safe = "Only a replica that has every record becomes the leader; clients follow it by themselves."
    blast_radius = "Writes and reads of each partition pause for some milliseconds while its leader changes."
    rights = ("Describe on the topics", "Alter on the cluster")
    Parameters = PreferredLeaders

    def action(self, context: Context[PreferredLeaders]) -> Action:
        return ElectPreferred(context)

    def peers(self, context: Context[PreferredLeaders]) -> Peers | None:
        """Of the partition that has the fewest: in-sync replicas besides its leader."""
        moving = [one for one in ElectPreferred(context).partitions() if one.may_be_led_better]
        if not moving:
            return None
        least = min(moving, key=lambda one: len(one.in_sync))
        return Peers(len(least.in_sync) - 1, len(least.replicas) - 1, "in-sync replicas besides the leader")

    def min_healthy(self, context: Context[PreferredLeaders]) -> int:
        return 1
