"""Volume claims: more room on a disk that gets full."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Self

from pydantic import Field, model_validator

from ops_platform.actions import Action, Applied, Change, Check, Plan, Verification
from ops_platform.clients.kubernetes_errors import QuotaError
from ops_platform.clients.kubernetes_objects import CLAIMS, QUOTAS, STORAGE_CLASSES, Json
from ops_platform.errors import ConflictError
from ops_platform.inventory.values import Size
from ops_platform.remediation.playbook import Context, Playbook
from ops_platform.remediation.playbooks.kubernetes.shared import (
    KINDS,
    NOTHING_DONE,
    Named,
    PatchAction,
    Waits,
    condition,
    detail_of,
    fence,
    mark,
    marked,
    quantity,
    time_to_look,
    title_of,
    waited,
)

GROWN = "ops-platform/grown-for"
_MIB = 1 << 20


class GrowParameters(Named, Waits):
    percent: int | None = Field(default=None, ge=1, le=100, description="By this share of what it asks for now …")
    by: Size | None = Field(default=None, description="… or by this much.")
    at_most: Size = Field(description="Never beyond this size.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.percent is None) == (self.by is None):
            raise ValueError("give either percent or by")
        return self


class GrowAction(PatchAction[GrowParameters]):
    def changes(self) -> Plan:
        given = self.parameters
        fence(self.system, given.namespace)
        claim = self.cluster.get(CLAIMS, given.name, given.namespace)
        now = asked(claim)
        facts: Json = {
            "asked": now,
            "has": has(claim),
            "at_most": given.at_most,
            "class": claim["spec"].get("storageClassName"),
        }
        if said := marked(claim, GROWN, self.context.incident_id):
            if has(claim) >= asked(claim):
                return self.planned((), facts={**facts, "grown": "in this incident, and complete"})
            before, after = said["before"], said["after"]
        else:
            before, after = {"bytes": now}, {"bytes": self._wanted(claim)}
        change = Change("claim", title_of(CLAIMS, claim), before, after, False, detail_of(CLAIMS, claim))
        return self.planned([change], facts=facts)

    def _wanted(self, claim: Json) -> int:
        given, now = self.parameters, asked(claim)
        if (phase := (claim.get("status") or {}).get("phase")) != "Bound":
            raise self.refuse(f"it is {phase}, not Bound")
        if has(claim) < now:
            raise self.refuse("it is being grown already", "wait for the storage, or look at the claim's conditions")
        self._refuse_unless_it_grows(claim)
        more = given.by if given.by is not None else now * (given.percent or 0) / 100
        wanted = ceil((now + more) / _MIB) * _MIB
        if wanted > given.at_most:
            raise self.refuse(
                f"it would be {in_words(wanted)}, and at most {in_words(given.at_most)} is allowed", "raise at_most"
            )
        self._refuse_without_room(wanted - now, claim["spec"].get("storageClassName"))
        return wanted

    def _refuse_unless_it_grows(self, claim: Json) -> None:
        name = claim["spec"].get("storageClassName")
        found = self.cluster.find(STORAGE_CLASSES, name) if name else None
        if not (found or {}).get("allowVolumeExpansion"):
            raise self.refuse(
                f"its storage class {name or '(none)'} does not allow volumes to grow", "allowVolumeExpansion: true"
            )

    def _refuse_without_room(self, more: int, storage_class: str | None) -> None:
        keys = {"requests.storage", f"{storage_class}.storageclass.storage.k8s.io/requests.storage"}
        for quota in self.cluster.list(QUOTAS, self.parameters.namespace):
            status = quota.get("status") or {}
            for key in keys & set(status.get("hard") or {}):
                left = quantity(status["hard"][key]) - quantity((status.get("used") or {}).get(key, 0))
                if more > left:
                    raise QuotaError(
                        f"the quota {quota['metadata']['name']} has {in_words(left)} of {key} left, {in_words(more)} more are asked for",
                        where=f"{self.system.id} namespace {self.parameters.namespace}",
                        remedy="raise the quota, or grow by less",
                    )

    def decide(self, change: Change, found: Json) -> Json | None:
        now, wanted = asked(found), int(change.after["bytes"])
        if now == wanted:
            return None
        if now != int(change.before["bytes"]):
            raise ConflictError(f"somebody else has asked for {in_words(now)} since the plan was made")
        note = {"annotations": {GROWN: mark(self.context.incident_id, change)}}
        return {"metadata": note, "spec": {"resources": {"requests": {"storage": in_words(wanted)}}}}

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        if (within := time_to_look(outcomes, self.parameters.within)) is None:
            return NOTHING_DONE
        given, change = self.parameters, plan.changes[0]
        wanted = int(change.after["bytes"])
        with self.other_way() as cluster:

            def grown() -> tuple[bool | None, str]:
                claim = self.read(cluster, change)
                for failed in ("ControllerResizeError", "NodeResizeError"):
                    if (found := condition(claim, failed)) and found.get("status") == "True":
                        return False, str(found.get("message") or failed)
                waits = condition(claim, "FileSystemResizePending")
                hint = (
                    ", and the file system waits for its pod to start again"
                    if waits and waits.get("status") == "True"
                    else ""
                )
                return has(
                    claim
                ) >= wanted or None, f"it has {in_words(has(claim))}, {in_words(wanted)} are asked for{hint}"

            request = Check("request", asked(self.read(cluster, change)) >= wanted, f"it asks for {in_words(wanted)}")
            fields = f"metadata.name={given.name}"
            return Verification(
                (request, waited(cluster, "size", grown, CLAIMS, given.namespace, fields=fields, within=within))
            )


def asked(claim: Json) -> int:
    return int(quantity(claim["spec"]["resources"]["requests"]["storage"]))


def has(claim: Json) -> int:
    return int(quantity(((claim.get("status") or {}).get("capacity") or {}).get("storage", 0)))


def in_words(size: float) -> str:
    """As a quantity: whole Gi or Mi where it is that."""
    number = int(size)
    for unit, each in (("Gi", 1 << 30), ("Mi", _MIB)):
        if number and number % each == 0:
            return f"{number // each}{unit}"
    return str(number)


class GrowVolumeClaim(Playbook[GrowParameters]):
    name = "kubernetes.grow_volume_claim"
    title = "Grow a volume claim"
    kinds = KINDS
    what = (
        "Asks for a larger volume, by a share or an amount, up to a maximum, once for each incident. It is refused when the storage"
        " class does not let volumes grow, when a quota has no room, and while an earlier growth is not complete."
    )
    why_safe = "A volume that grows keeps its data, and the size stays below the maximum that the rule names."
    blast_radius = "One volume, which never gets smaller again: it costs more from then on."
    rights = (
        "core/persistentvolumeclaims: get, list, watch, patch",
        "core/resourcequotas: list",
        "cluster storage.k8s.io/storageclasses: get",
    )
    Parameters = GrowParameters

    def action(self, context: Context[GrowParameters]) -> Action:
        return GrowAction(context, self.name)
