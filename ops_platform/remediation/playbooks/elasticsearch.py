"""Playbooks for Elasticsearch: let indices be written again once there is room, and have failed shards tried again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pydantic import Field

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.clients.elasticsearch import Elasticsearch
from ops_platform.clients.http import BadAnswerError
from ops_platform.clock import wait_until
from ops_platform.errors import AccessDeniedError, NotThereError, OpsError, RefusedError, UnreachableError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.systems import ElasticsearchSystem
from ops_platform.inventory.values import PositiveDuration
from ops_platform.remediation.playbook import Context, Done, Playbook

INDEX, SHARD = "index", "shard"
BLOCK = "index.blocks.read_only_allow_delete"
_BLOCK_ID = "12"  # of this block in the cluster's state: IndexMetadata.INDEX_READ_ONLY_ALLOW_DELETE_BLOCK
_WATERMARK = "cluster.routing.allocation.disk.watermark.high"
_SETTLES = 10.0
_MOVED = {Outcome.APPLIED, Outcome.ALREADY_DONE}
_UNITS = {"b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40, "pb": 1 << 50}


class _Desk(Elasticsearch):
    """Calls to one cluster, as the playbooks ask."""

    def __init__(self, context: Context[Any]) -> None:
        super().__init__(context.access.http(context.access.inventory.system(context.subject.id, ElasticsearchSystem)))

    def state(self, metric: str, wanted: str) -> Any:
        """A part of the cluster's state; None where it is empty."""
        right = "the cluster privilege monitor"
        found = self.ask(right, "GET", f"/_cluster/state/{metric}", {"filter_path": f"cluster_uuid,{wanted}"})
        if "cluster_uuid" not in found:
            raise BadAnswerError("the answer is no cluster state", where=self._apis[0].host)
        for step in wanted.split("."):
            found = (found or {}).get(step)
        return found

    def blocked(self, patterns: Sequence[str]) -> list[str]:
        """Indices with the block, by their settings; hidden ones (those of data streams are) and closed ones, too."""
        path = f"/{','.join(patterns)}/_settings/{BLOCK}"
        found = self.ask(_READS, "GET", path, {"flat_settings": "true", "expand_wildcards": "all"})
        try:
            return sorted(index for index, each in found.items() if each["settings"].get(BLOCK) == "true")
        except (KeyError, TypeError, AttributeError):
            raise BadAnswerError("the answer holds no settings of indices", where=self._apis[0].host) from None

    def streams(self, patterns: Sequence[str]) -> dict[str, str]:
        """The data stream of each index that belongs to one."""
        found = self.ask(_READS, "GET", f"/_resolve/index/{','.join(patterns)}", {"expand_wildcards": "all"})
        return {one["name"]: one["data_stream"] for one in found["indices"] if one.get("data_stream")}

    def without_room(self) -> dict[str, str | None]:
        """Every node by id: why it is not below the high watermark, None where it is."""
        watermark = self._watermark()
        query = {"filter_path": "_nodes,nodes.*.name,nodes.*.fs.data.total_in_bytes,nodes.*.fs.data.available_in_bytes"}
        found = self.ask("the cluster privilege monitor", "GET", "/_nodes/stats/fs", query)
        return {node_id: watermark.exceeded(node) for node_id, node in found.get("nodes", {}).items()}

    def _watermark(self) -> Watermark:
        query = {"include_defaults": "true", "flat_settings": "true"}
        found = self.ask("the cluster privilege monitor", "GET", "/_cluster/settings", query)
        whole: dict[str, str] = {
            **found.get("defaults", {}),
            **found.get("persistent", {}),
            **found.get("transient", {}),
        }
        return Watermark.parse(whole[_WATERMARK], whole.get(f"{_WATERMARK}.max_headroom", "-1"))


_READS = "the index privilege view_index_metadata on the indices"


@dataclass(frozen=True)
class Watermark:
    """`share` of the disk that may be used, or `free` bytes that must be; `headroom`: more free bytes than this are not needed."""

    share: float | None
    free: int | None
    headroom: int | None

    @classmethod
    def parse(cls, text: str, headroom: str) -> Watermark:
        """`90%`, `0.9` or `20gb`; `150GB`, or -1 for none. Raises BadAnswerError."""
        most = None if headroom == "-1" else _bytes(headroom)
        if percent := re.fullmatch(r"([0-9.]+)%", text):
            return cls(float(percent[1]) / 100, None, most)
        if re.fullmatch(r"[01](\.[0-9]+)?", text):
            return cls(float(text), None, most)
        return cls(None, _bytes(text), None)

    def needed(self, total: int) -> int:
        """Bytes that must be free on a disk of this size."""
        if self.share is None:
            return self.free or 0
        needed = round(total * (1 - self.share))
        return needed if self.headroom is None else min(needed, self.headroom)

    def exceeded(self, node: Mapping[str, Any]) -> str | None:
        """Why a node has no room, by the fullest of its disks; None where it has. What it does not say is no room."""
        for disk in node.get("fs", {}).get("data") or [{}]:
            total, free = disk.get("total_in_bytes", 0), disk.get("available_in_bytes", 0)
            if free <= (needed := self.needed(total)):
                return f"{node.get('name')} has {free} of {total} bytes free, and more than {needed} are needed"
        return None


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+)([kmgtp]?b)", text.lower())
    if match is None:
        raise BadAnswerError(f"{text!r} is not a size that Elasticsearch writes")
    return int(float(match[1]) * _UNITS[match[2]])


# The read-only block


class Blocked(Strict):
    indices: list[str] = Field(default=["*"], description="Indices, data streams or patterns of them.")


class _Blocks:
    """Lifting the block and setting it again. In a change `read_only` is whether it is there."""

    name = "elasticsearch.lift_read_only"

    def __init__(self, context: Context[Blocked]) -> None:
        self.context = context
        self.desk = _Desk(context)

    @property
    def target_id(self) -> str:
        return self.context.subject.id

    def check(self, change: Change) -> Applied | None:
        try:
            now = change.object in self.desk.blocked([change.object])
        except NotThereError:
            return Applied(Outcome.MISSING, "there is no such index any more")
        if now == change.after["read_only"]:
            return Applied(Outcome.ALREADY_DONE, "it is so by now")
        return None

    def apply(self, change: Change) -> Applied:
        body = {BLOCK: True if change.after["read_only"] else None}
        right = "the index privilege manage on the indices"
        answer = self.desk.ask(right, "PUT", f"/{change.object}/_settings", None, body)
        if answer.get("acknowledged") is not True:
            return Applied(Outcome.FAILED, "not every node has confirmed it in time")
        return Applied(Outcome.APPLIED, "blocked" if change.after["read_only"] else "writes are let in")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        """By the settings, and by the blocks in the cluster's state, which are what refuses a write."""
        moved = [change for change in plan.changes if outcomes[change.object].outcome in _MOVED]
        if not moved:
            return Verification((Check("blocks", True, "none was touched"),))
        wrong: list[str] = []

        def good() -> bool:
            blocks: Mapping[str, Any] = self.desk.state("blocks", "blocks.indices") or {}
            settings = set(self.desk.blocked([change.object for change in moved]))
            wrong[:] = [
                one.object
                for one in moved
                if not (one.object in settings) == (_BLOCK_ID in blocks.get(one.object, {})) == one.after["read_only"]
            ]
            return not wrong

        wait_until(good, clock=self.context.clock, seconds=_SETTLES)
        said = f"{len(moved)} indices are as they should be" if not wrong else f"not so: {', '.join(wrong)}"
        return Verification((Check("blocks", not wrong, said),))


class LiftBlock(_Blocks):
    """`actions.Action`: the block that the flood stage set is taken off the indices whose nodes have room again."""

    def plan(self) -> Plan:
        patterns = self.context.parameters.indices
        blocked = self.desk.blocked(patterns)
        if not blocked:
            # That was an empty answer, which whatever stands in front of the cluster can give, too.
            self.desk.state("blocks", "blocks.indices")
            return Plan(self.name, self.target_id, (), self.context.clock.now())
        streams, held = self.desk.streams(patterns), self._held_back(blocked)
        if len(held) == len(blocked):
            raise RefusedError(
                f"there is no room yet: {'; '.join(sorted(set(held.values())))}", where=self.target_id,
                remedy="delete what is not needed, or add room: the block comes back by itself otherwise",
            )  # fmt: skip
        changes = tuple(
            Change(
                INDEX, index, {"read_only": True}, {"read_only": False}, reversible=True,
                detail={"data_stream": streams[index]} if index in streams else {},
            )
            for index in blocked
            if index not in held
        )  # fmt: skip
        # No population: a disk that was full blocks every index that it holds, however many of all these are.
        return Plan(self.name, self.target_id, changes, self.context.clock.now(), facts={"no_room_yet": held})

    def check(self, change: Change) -> Applied | None:
        if (found := super().check(change)) is not None:
            return found
        held = self._held_back([change.object])
        return Applied(Outcome.REFUSED, f"there is no room any more: {held[change.object]}") if held else None

    def _held_back(self, indices: Iterable[str]) -> dict[str, str]:
        """Indices that have a shard on a node without room, or on one that does not say, each with why."""
        said = self.desk.without_room()
        on: Mapping[str, Sequence[Mapping[str, Any]]] = self.desk.state("routing_nodes", "routing_nodes.nodes") or {}
        bad = {
            node: why for node in on if (why := said.get(node, "a node does not say how full its disk is")) is not None
        }
        held = {shard["index"]: why for node, why in bad.items() for shard in on[node]}
        return {index: held[index] for index in indices if index in held}


class SetBlock(_Blocks):
    """`actions.Action`: the block is there again."""

    name = "elasticsearch.lift_read_only.undo"

    def __init__(self, context: Context[Blocked], done: Sequence[Done]) -> None:
        super().__init__(context)
        self._done = done

    def plan(self) -> Plan:
        names = [one.change.object for one in self._done]
        blocked = self.desk.blocked(names)
        changes = [
            Change(INDEX, name, {"read_only": False}, {"read_only": True}, reversible=True)
            for name in names
            if name not in blocked
        ]
        return Plan(self.name, self.target_id, tuple(changes), self.context.clock.now())


class LiftReadOnly(Playbook[Blocked]):
    name = "elasticsearch.lift_read_only"
    title = "Lift the read-only block"
    kinds = frozenset({"elasticsearch"})
    what = (
        "Takes the block that Elasticsearch set when a disk reached the flood stage off the indices, those of data streams included, "
        "once every node that holds a shard of them is below the high watermark again. No document is written to try it."
    )
    why_safe = "Only where there is room below the high watermark; should a disk fill up again, Elasticsearch blocks again by itself."
    blast_radius = "The indices take writes again, and disks fill on."
    rights = (
        "cluster privilege monitor",
        "index privileges view_index_metadata and manage on the indices (of manage, indices:admin/settings/update alone is used; "
        "for system indices with allow_restricted_indices)",
    )
    undo_text = "Sets the block again."
    Parameters = Blocked

    def action(self, context: Context[Blocked]) -> Action:
        return LiftBlock(context)

    def undo(self, context: Context[Blocked], done: Sequence[Done]) -> Action | None:
        return SetBlock(context, done)


# Failed shards


class FailedShards(Strict):
    within: PositiveDuration = Field(
        default=timedelta(minutes=1), description="They have been opened, or failed again, by then."
    )


@dataclass
class RetryShards:
    """`actions.Action`: one more try for shards that were given up after too many failures.

    The call is for the whole cluster; after the first one the others are found in progress and left alone.
    """

    context: Context[FailedShards]
    name = "elasticsearch.retry_failed_shards"

    def __post_init__(self) -> None:
        self._desk = _Desk(self.context)

    @property
    def target_id(self) -> str:
        return self.context.subject.id

    def plan(self) -> Plan:
        changes: list[Change] = []
        others: dict[str, str] = {}
        attempts: dict[str, int] = {}
        for name, shard in self._failed().items():
            attempts[name] = shard["unassigned_info"].get("failed_attempts", 0)
            if (why := self._held_by_others(shard)) is not None:
                others[name] = why
                continue
            before = {"state": "unassigned", "reason": "ALLOCATION_FAILED"}
            changes.append(Change(SHARD, name, before, {"state": "assigned"}, reversible=False, detail=_which(shard)))
        facts = {"failed_attempts": attempts, "not_helped_by_a_retry": others}
        population = {SHARD: self._shards()}
        return Plan(self.name, self.target_id, tuple(changes), self.context.clock.now(), population, facts)

    def check(self, change: Change) -> Applied | None:
        return None if change.object in self._failed() else Applied(Outcome.ALREADY_DONE, "it is tried already")

    def apply(self, change: Change) -> Applied:
        query = {"retry_failed": "true", "metric": "none"}
        answer = self._desk.ask("the cluster privilege manage", "POST", "/_cluster/reroute", query)
        if answer.get("acknowledged") is not True:
            return Applied(Outcome.FAILED, "not every node has confirmed it in time")
        return Applied(Outcome.APPLIED, "it is tried again")

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        """By the health of the indices, shard by shard, once none of them is being opened any more."""
        moved = [change for change in plan.changes if outcomes[change.object].outcome in _MOVED]
        if not moved:
            return Verification((Check("shards", True, "none was tried"),))
        seconds, health = self.context.parameters.within.total_seconds(), dict[str, Any]()

        def settled() -> bool:
            health.clear()
            health.update(self._health({change.detail["index"] for change in moved}))
            checks = [_look(change, health) for change in moved]
            return all(holds for holds, _ in checks) or not any(holds is None for holds, _ in checks)

        wait_until(settled, clock=self.context.clock, seconds=seconds)
        return Verification(tuple(Check(change.object, *_look(change, health)) for change in moved))

    def _failed(self) -> dict[str, dict[str, Any]]:
        """Shards that are unassigned because opening them failed: one of the copies of each kind."""
        unassigned = self._desk.state("routing_nodes", "routing_nodes.unassigned") or []
        failed = [shard for shard in unassigned if shard["unassigned_info"]["reason"] == "ALLOCATION_FAILED"]
        return {_name(shard): shard for shard in sorted(failed, key=_name)}

    def _held_by_others(self, shard: Mapping[str, Any]) -> str | None:
        """Why a retry would not help; None where on some node the number of failures stands in the way.

        Elasticsearch asks nothing else as long as that does: what else may be in the way shows after the retry.
        """
        right = "the cluster privilege monitor"
        try:
            found = self._desk.ask(right, "POST", "/_cluster/allocation/explain", None, _which(shard))
        except (AccessDeniedError, UnreachableError):
            raise
        except OpsError as error:  # 400: it is assigned by now
            return error.what
        nodes: list[dict[str, Any]] = found.get("node_allocation_decisions", [])
        for node in nodes:
            if "max_retry" in {one["decider"] for one in node.get("deciders", []) if one["decision"] == "NO"}:
                return None
        return str(found.get("allocate_explanation") or found.get("can_allocate") or "no node is named")

    def _shards(self) -> int:
        health = self._desk.ask("the cluster privilege monitor", "GET", "/_cluster/health")
        return sum(health[f"{kind}_shards"] for kind in ("active", "initializing", "unassigned"))

    def _health(self, indices: set[str]) -> dict[str, Any]:
        path = f"/_cluster/health/{','.join(sorted(indices))}"
        query = {"level": "shards", "expand_wildcards": "all"}
        return self._desk.ask("the cluster privilege monitor", "GET", path, query)["indices"]


def _which(shard: Mapping[str, Any]) -> dict[str, Any]:
    return {"index": shard["index"], "shard": shard["shard"], "primary": shard["primary"]}


def _name(shard: Mapping[str, Any]) -> str:
    return f"{shard['index']}[{shard['shard']}] {'primary' if shard['primary'] else 'replica'}"


def _look(change: Change, health: Mapping[str, Any]) -> tuple[bool | None, str]:
    """Whether it is open now; None while it is being opened."""
    index = health.get(change.detail["index"])
    if index is None:
        return False, "there is no such index any more"
    one = index["shards"][str(change.detail["shard"])]
    good = (
        one["primary_active"]
        if change.detail["primary"]
        else one["unassigned_shards"] + one["initializing_shards"] == 0
    )
    if good:
        return True, "it is open"
    opening = one["initializing_shards"] > 0
    return (None, "it is still being opened") if opening else (False, f"it is not open: {one['status']}")


class RetryFailedShards(Playbook[FailedShards]):
    name = "elasticsearch.retry_failed_shards"
    title = "Retry failed shards"
    kinds = frozenset({"elasticsearch"})
    what = (
        "Has Elasticsearch try once more to open shards that it gave up after too many failures. Helps once the cause is gone, such as "
        "a full disk."
    )
    why_safe = (
        "Nothing is thrown away and no stale copy is taken: a shard whose cause remains fails again, and that is all."
    )
    blast_radius = "Opening shards loads disks and network of the nodes, within the limits of the cluster's settings for recoveries."
    rights = ("cluster privileges monitor and manage (of manage, cluster:admin/reroute alone is used)",)
    Parameters = FailedShards

    def action(self, context: Context[FailedShards]) -> Action:
        return RetryShards(context)


PLAYBOOKS: tuple[Playbook[Any], ...] = (LiftReadOnly(), RetryFailedShards())
