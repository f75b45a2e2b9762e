"""Elasticsearch: snapshots into its own repository, restored under other names and compared.

The data does not pass through us: a snapshot is the only copy that is whole and can be taken of terabytes, and Elasticsearch moves it between
its nodes and its repository. What we keep, sealed, says which snapshot it is and what was seen in each index: mapping, aliases, number of
documents, and salted digests of some. A part `indices` has a line of JSON for each index, `cluster` what rules new indices.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import secrets
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ops_platform.clients.elasticsearch import Elasticsearch
from ops_platform.clock import Clock
from ops_platform.counting import count_of
from ops_platform.errors import (
    ConflictError,
    CorruptionError,
    CouldNotVerifyError,
    NotThereError,
    OpsError,
    UnreachableError,
)
from ops_platform.inventory.base import Mode
from ops_platform.stores.elasticsearch_snapshots import Repository, agree, awaited, expire_snapshots, policy_failure
from ops_platform.stores.kind import FAILED, NOT_APPLICABLE, PASSED, Check, Dumped, Finding, Parts, Saved

if TYPE_CHECKING:
    from ops_platform.actions import ActionResult
    from ops_platform.clients.access import Access
    from ops_platform.inventory.systems import ElasticsearchSystem, Snapshots, StoreTarget

Json = dict[str, Any]
_READS = "the index privileges read, monitor, maintenance and view_index_metadata on the indices"
_MONITOR = "the cluster privilege monitor"
_RESTORES = "the cluster privilege manage, and the index privilege manage on ops-proof-*"
_PROOF = "ops-proof-"
_NOTED = "indices-begin-with"
_LEFT_AFTER = timedelta(days=1)
_SNAPSHOT_SECONDS = 24 * 3600.0
_RULES = ("_index_template", "_component_template", "_ingest/pipeline")


def open_store(access: Access, target: StoreTarget) -> ElasticsearchStore:
    return ElasticsearchStore(access, target, cast("ElasticsearchSystem", target.system))


@dataclass(frozen=True)
class ElasticsearchStore:
    """`stores.kind.Kind` over one cluster."""

    access: Access
    target: StoreTarget
    system: ElasticsearchSystem

    @property
    def snapshots(self) -> Snapshots:
        found = self.system.snapshots
        assert found is not None  # noqa: S101 - the inventory refuses a backup without it
        return found

    @property
    def repository(self) -> Repository:
        return Repository(self.cluster, self.snapshots.repository)

    @property
    def cluster(self) -> Elasticsearch:
        return Elasticsearch(self.access.http(self.system))

    @property
    def has_sandbox(self) -> bool:
        return bool(self.system.restore.urls)

    # Dump

    def look(self) -> str:
        if self.repository.registered() is None and self.snapshots.mode is not Mode.ENFORCE:
            raise NotThereError(
                f"there is no snapshot repository {self.snapshots.repository}", where=self.cluster.where,
                remedy="register it, or declare its type and settings with snapshots.mode: enforce",
            )  # fmt: skip
        return f"Elasticsearch {_version(self.cluster)}"

    def dump(self, parts: Parts) -> Dumped:
        cluster = self.cluster
        differs = agree(self.access, self.target, self.snapshots, cluster)
        before = self._look(cluster)
        if not before:
            raise NotThereError(
                "there is no index that was asked for",
                where=cluster.where,
                remedy="look at `indices` in the inventory, and whether our role may see them",
            )
        snapshot = self._take(_chosen(before.values()))
        after = self._look(cluster, known=before)
        with parts.part("indices") as write:
            for name in sorted(before):
                write(_line(_kept(before[name], after[name])))
        with parts.part("cluster") as write:
            write(_line({path: _rules(cluster, path) for path in _RULES}))
        facts = {
            "repository": self.snapshots.repository, "snapshot": snapshot["snapshot"], "uuid": snapshot["uuid"],
            "indices": len(before), "streams": sorted({i["stream"] for i in before.values() if i["stream"]}), "differs": differs,
        }  # fmt: skip
        return Dumped(source=cluster.where, server=f"Elasticsearch {_version(cluster)}", facts=facts)

    def _look(self, cluster: Elasticsearch, known: Mapping[str, Json] | None = None) -> dict[str, Json]:
        """Every index that is asked for; of `known` exactly those, with the documents that were sampled then."""
        found = cluster.ask(_READS, "GET", "/_resolve/index/*", {"expand_wildcards": "all"})["indices"]
        names = {one["name"]: one for one in found if self._is_wanted(one)}
        if known is not None:
            if gone := sorted(known.keys() - names.keys()):
                raise ConflictError(
                    f"the index {gone[0]} was deleted during the dump", where=cluster.where, remedy="take it again"
                )
            names = {name: names[name] for name in known}
        _refuse_red(cluster, names)
        return {name: self._index(cluster, one, (known or {}).get(name)) for name, one in names.items()}

    def _is_wanted(self, one: Json) -> bool:
        stream, name = one.get("data_stream"), str(one["name"])
        called = str(stream or name)
        hidden = called.startswith(".") or "system" in one.get("attributes", ()) or name.startswith(_PROOF)
        return not hidden and any(fnmatchcase(called, pattern) for pattern in self.system.indices)

    def _index(self, cluster: Elasticsearch, one: Json, was: Json | None) -> Json:
        name = str(one["name"])
        whole = cluster.ask(_READS, "GET", f"/{name}", {"flat_settings": "true"})[name]
        settings = whole["settings"]
        out: Json = {
            "name": name, "stream": one.get("data_stream"), "uuid": settings["index.uuid"], "open": "open" in one["attributes"],
            "mapping": whole["mappings"], "aliases": whole["aliases"], "shards": settings["index.number_of_shards"],
        }  # fmt: skip
        if was is not None and was["uuid"] != out["uuid"]:
            raise ConflictError(f"the index {name} was made anew during the dump", where=cluster.where)
        if out["open"]:
            # What is not refreshed is in a snapshot, and in no count.
            cluster.ask(_READS, "POST", f"/{name}/_refresh")
            salt = secrets.token_hex(16) if was is None else was["salt"]
            query = {"function_score": {"random_score": {}}} if was is None else _by_id(was["documents"])
            size = self.system.restore.documents if was is None else len(was["documents"])
            out |= {"salt": salt, **_counted(cluster, name), "documents": _documents(cluster, name, query, size, salt)}
        return out

    def _take(self, names: Sequence[str]) -> Json:
        """A snapshot that is whole. Raises OpsError for one that is not, which is gone again then."""
        repository, clock = self.repository, self.access.clock
        name = f"ops-{self.target.id}-{clock.now():%Y%m%dt%H%M%Sz}-{secrets.token_hex(4)}".lower()
        repository.begin(name, names, self.target.id)
        found = repository.finished(name, clock, _SNAPSHOT_SECONDS)
        if why := _not_whole(found):
            repository.delete(name)
            raise OpsError(
                f"the snapshot is not whole: {why}",
                where=self.cluster.where,
                remedy="look at the failed shard in the node's log, and take it again",
            )
        return found

    def expire(self, *, enforce: bool, actor: str) -> ActionResult:
        """`stores.kind.KeptElsewhere`: the snapshots of backups that have expired."""
        return expire_snapshots(self.access, self.target, self.snapshots, self.cluster, enforce=enforce, actor=actor)

    # Level 1

    def files(self, saved: Saved) -> Iterator[Check]:
        def readable() -> Finding:
            found = sum(1 for _ in read_indices(saved))
            same = found == saved.facts["indices"]
            return Finding(PASSED if same else FAILED, count_of(found, "index", "indices"))

        def there() -> Finding:
            facts = saved.facts
            try:
                found = Repository(self.cluster, facts["repository"]).snapshot(facts["snapshot"])
            except NotThereError as error:
                return Finding(FAILED, str(error))
            if found["uuid"] != facts["uuid"]:
                return Finding(FAILED, "there is another snapshot of its name")
            why = _not_whole(found)
            return Finding(FAILED if why else PASSED, why or f"{found['shards']['successful']} shards")

        yield Check("indices", "What was seen of every index can be read", "JSON, counted", readable)
        yield Check("snapshot", "The snapshot is in its repository, and whole", "_snapshot of its name", there)

    # Level 2

    def need_programs(self) -> None:
        """A cluster restores it, and no program of this machine."""

    @contextmanager
    def restore(self, saved: Saved, home: Path) -> Generator[RestoredElasticsearch]:
        sandbox = Elasticsearch(self.access.http_sandbox(self.system))
        chosen = self._sampled(saved)
        clock = self.access.clock
        _sweep(sandbox, self.target.id, clock)
        prefix = f"{_PROOF}{self.target.id}-{clock.now():%Y%m%dt%H%M%Sz}-{secrets.token_hex(3)}-".lower()
        (home / _NOTED).write_text(prefix)
        try:
            names = [one["name"] for one in chosen]
            failed = _restored(sandbox, saved, names, prefix, aliases=self.has_sandbox, clock=clock)
            yield RestoredElasticsearch(
                self, sandbox, saved, prefix, chosen, failed, f"Elasticsearch {_version(sandbox)}"
            )
        finally:
            _remove(sandbox, _named(sandbox, prefix))

    def clear(self, home: Path) -> None:
        """`stores.kind.MadeElsewhere`: the indices of a verification that was killed."""
        if (noted := home / _NOTED).exists():
            sandbox = Elasticsearch(self.access.http_sandbox(self.system))
            _remove(sandbox, _named(sandbox, noted.read_text()))

    def _sampled(self, saved: Saved) -> list[Json]:
        """Those that are restored this time."""
        restore = self.system.restore
        found = [
            one
            for one in read_indices(saved)
            if any(fnmatchcase(one["stream"] or one["name"], pattern) for pattern in restore.indices)
        ]
        if not found:
            raise CouldNotVerifyError("no index is to be restored", remedy="look at restore.indices in the inventory")
        if restore.sample is not None and restore.sample < len(found):
            found = random.sample(found, restore.sample)
        return found


@dataclass(frozen=True)
class RestoredElasticsearch:
    """Indices under other names. `failed`: those whose shards could not be restored, and why."""

    store: ElasticsearchStore
    cluster: Elasticsearch
    saved: Saved
    prefix: str
    chosen: Sequence[Json]
    failed: Mapping[str, str]
    server: str

    def checks(self) -> Iterator[Check]:
        yield Check("restored", "Every shard is restored", "_restore, then _cat/shards", self._restored)
        if self.failed:
            return
        yield Check("mappings", "Mappings are the source's", "GET of each index", lambda: self._described("mapping"))
        yield Check("aliases", "Aliases are the source's", "GET of each index", self._aliases)
        yield Check(
            "counts", "There are as many documents as in the source", "_count, within what changed", self._counted
        )
        yield Check("documents", "Documents are the source's", "salted SHA-256 of _source by _id", self._documents)
        yield Check("policy", "The repository and the policy are as declared", "_snapshot, _slm/policy", self._policy)
        yield Check("policy-runs", "The policy's newest snapshot is whole", "_snapshot, by its policy", self._runs)

    def _restored(self) -> Finding:
        if self.failed:
            some = "; ".join(f"{name}: {why}" for name, why in list(self.failed.items())[:5])
            return Finding(FAILED, f"{len(self.failed)} of {len(self.chosen)} indices were not restored: {some}")
        return Finding(PASSED, f"{len(self.chosen)} of {self.saved.facts['indices']} indices")

    def _aliases(self) -> Finding:
        if not self.store.has_sandbox:
            why = (
                "they are not restored in the cluster itself, where other people use them: restore.urls names a sandbox"
            )
            return Finding(NOT_APPLICABLE, why)
        return self._described("aliases")

    def _described(self, what: str) -> Finding:
        wrong, moved = list[str](), 0
        for known in self.chosen:
            name = self.prefix + known["name"]
            here = self.cluster.ask(_READS, "GET", f"/{name}")[name]
            if not known["steady"][what]:
                moved += 1
            elif here["mappings" if what == "mapping" else what] != known[what]:
                wrong.append(known["name"])
        text = f"differ: {', '.join(wrong[:10])}" if wrong else count_of(len(self.chosen), "index", "indices")
        return Finding(FAILED if wrong else PASSED, text + (f"; {moved} changed meanwhile" if moved else ""))

    def _counted(self) -> Finding:
        wrong, total = list[str](), 0
        for known in self._open():
            here = int(_counted(self.cluster, self.prefix + known["name"])["count"])
            total += here
            if abs(here - known["count"]) > known["changed"]:
                wrong.append(f"{known['name']}: {here}, not {known['count']} (± {known['changed']})")
        return Finding(FAILED if wrong else PASSED, "; ".join(wrong[:10]) if wrong else f"{total} documents")

    def _documents(self) -> Finding:
        wrong, compared = list[str](), 0
        for known in self._open():
            wanted, name = known["documents"], self.prefix + known["name"]
            here = _documents(self.cluster, name, _by_id(wanted), len(wanted), known["salt"])
            wrong += [f"{known['name']}: {key}" for key, document in wanted.items() if here.get(key) != document]
            compared += len(wanted)
        if wrong:
            return Finding(FAILED, f"{len(wrong)} of {compared} are others or missing: {', '.join(wrong[:5])}")
        return Finding(PASSED if compared else NOT_APPLICABLE, f"{compared} documents are the same")

    def _open(self) -> list[Json]:
        return [known for known in self.chosen if known["open"]]

    def _policy(self) -> Finding:
        store = self.store
        if store.snapshots.type is None and store.snapshots.policy is None:
            return Finding(NOT_APPLICABLE, "the inventory declares neither")
        differs = store.repository.differs(store.snapshots)
        return Finding(FAILED if differs else PASSED, "; ".join(differs) or "as declared")

    def _runs(self) -> Finding:
        policy = self.store.snapshots.policy
        if policy is None:
            return Finding(NOT_APPLICABLE, "the inventory declares no policy")
        failure = policy_failure(self.store.repository.all(), policy.id)
        return Finding(FAILED if failure else PASSED, failure or "SUCCESS")


# What is looked at


def _refuse_red(cluster: Elasticsearch, names: Iterable[str]) -> None:
    found = cluster.ask(_MONITOR, "GET", "/_cluster/health", {"level": "indices", "expand_wildcards": "all"})["indices"]
    # One that health does not name was deleted just now, or is not known to be well.
    red = sorted(name for name in names if found.get(name, {}).get("status") not in ("green", "yellow"))
    if red:
        raise UnreachableError(
            f"{len(red)} indices are red, {red[0]} among them: a snapshot of them would not be whole",
            where=cluster.where,
            remedy="GET _cluster/allocation/explain says why a primary shard is not there",
        )


def _counted(cluster: Elasticsearch, name: str) -> Json:
    """How many documents there are, and how many writes there have been."""
    count = cluster.ask(_READS, "GET", f"/{name}/_count")
    stats = cluster.ask(_READS, "GET", f"/{name}/_stats/indexing")
    for answer in (count, stats):
        if answer["_shards"]["failed"]:
            raise UnreachableError(f"not every shard of {name} answers", where=cluster.where)
    writes = stats["_all"]["primaries"]["indexing"]
    return {"count": count["count"], "writes": writes["index_total"] + writes["delete_total"]}


def _documents(cluster: Elasticsearch, name: str, query: Json, size: int, salt: str) -> dict[str, list[Any]]:
    """Sequence number, primary term and salted digest of each document, by its id. A restore keeps all three."""
    if size == 0:
        return {}
    body = {"query": query, "size": size, "seq_no_primary_term": True}
    found = cluster.ask(_READS, "POST", f"/{name}/_search", {"allow_partial_search_results": "false"}, body)
    return {
        hit["_id"]: [hit["_seq_no"], hit["_primary_term"], _digest(salt, hit.get("_source"))]
        for hit in found["hits"]["hits"]
    }


def _by_id(documents: Iterable[str]) -> Json:
    return {"ids": {"values": list(documents)}}


def _digest(salt: str, source: Any) -> str:
    return hashlib.sha256(salt.encode() + json.dumps(source, sort_keys=True).encode()).hexdigest()


def _kept(before: Json, after: Json) -> Json:
    """What holds of the snapshot that was taken in between: only what was the same on both sides of it has to be found in it."""
    out = {key: before[key] for key in ("name", "stream", "shards", "mapping", "aliases")}
    out["open"] = before["open"] and after["open"]
    out["steady"] = {what: before[what] == after[what] for what in ("mapping", "aliases")}
    if out["open"]:
        same = {key: found for key, found in before["documents"].items() if after["documents"].get(key) == found}
        # Writes are counted by a shard where it is: one that moved begins anew.
        writes = after["writes"] - before["writes"]
        changed = max(writes, 0) + abs(after["count"] - before["count"])
        out |= {"count": before["count"], "changed": changed, "documents": same, "salt": before["salt"]}
    return out


def _chosen(found: Iterable[Json]) -> list[str]:
    """What a snapshot is asked for: a data stream by its own name, or it would not be one in it."""
    return sorted({one["stream"] or one["name"] for one in found})


def _not_whole(snapshot: Json) -> str | None:
    shards, failures = snapshot.get("shards") or {}, snapshot.get("failures") or []
    if snapshot.get("state") == "SUCCESS" and not failures and shards.get("failed") == 0:
        return None
    some = "; ".join(
        f"{one.get('index')}[{one.get('shard_id')}]: {str(one.get('reason'))[:150]}" for one in failures[:3]
    )
    return f"{snapshot.get('state')}, {shards.get('failed')} of {shards.get('total')} shards failed: {some}"


def _rules(cluster: Elasticsearch, path: str) -> Json:
    """Templates and pipelines. Where there is none, some of these are answered with 404."""
    try:
        return cluster.ask(_MONITOR, "GET", f"/{path}")
    except NotThereError:
        return {}


def _version(cluster: Elasticsearch) -> str:
    found = cluster.ask(_MONITOR, "GET", "/_nodes/_all/_none")["nodes"].values()
    return "/".join(sorted({str(node["version"]) for node in found}))


def _line(body: Json) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def read_indices(saved: Saved) -> Iterator[Json]:
    """What was seen of each index. Raises CorruptionError."""
    with saved.part("indices").open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise CorruptionError(f"line {number} of the indices cannot be read", where=saved.backup_id) from None


# The restore


def _restored(
    cluster: Elasticsearch, saved: Saved, names: list[str], prefix: str, *, aliases: bool, clock: Clock
) -> dict[str, str]:
    """Restore those under other names; the ones that failed, and why. Raises CouldNotVerifyError where it does not come to an end."""
    body = {
        "indices": names, "include_global_state": False, "include_aliases": aliases, "partial": False,
        # Nothing of it may be found under a name that anybody else asks for.
        "rename_pattern": "(.+)", "rename_replacement": f"{prefix}$1",
        "index_settings": {
            "index.number_of_replicas": 0, "index.auto_expand_replicas": False, "index.hidden": True,
        },
        "ignore_index_settings": ["index.lifecycle.name", "index.lifecycle.rollover_alias", "index.blocks.*"],
    }  # fmt: skip
    where = f"/_snapshot/{saved.facts['repository']}/{saved.facts['snapshot']}/_restore"
    try:
        cluster.ask(_RESTORES, "POST", where, None, body)
    except NotThereError as error:
        raise CorruptionError(error.what, where=error.where) from None

    def ended() -> dict[str, str] | None:
        started, failed = _shards(cluster, prefix)
        return failed if failed or started >= set(names) else None

    return awaited(ended, "the restore", cluster, clock=clock, seconds=_SNAPSHOT_SECONDS)


def _shards(cluster: Elasticsearch, prefix: str) -> tuple[set[str], dict[str, str]]:
    """By their names in the source: indices whose primaries all serve, and those of which one was given up, with the reason."""
    columns = {
        "format": "json",
        "h": "index,prirep,state,unassigned.reason,unassigned.details",
    }
    found = cluster.ask_any(_MONITOR, "GET", f"/_cat/shards/{prefix}*", columns)
    waiting, failed, names = set[str](), dict[str, str](), set[str]()
    for shard in found:
        name = str(shard["index"]).removeprefix(prefix)
        names.add(name)
        if shard["prirep"] == "p" and shard["state"] not in ("STARTED", "RELOCATING"):
            waiting.add(name)
            if shard["unassigned.reason"] == "ALLOCATION_FAILED":
                failed[name] = _cause(str(shard["unassigned.details"]))
    return names - waiting, failed


def _cause(details: str) -> str:
    """The last of Java's causes, without where it was thrown."""
    causes = re.findall(r"(?:^|Caused by: |nested: )([A-Za-z_.$]+(?:Exception|Error)[^\n]*)", details)
    return (causes[-1] if causes else details.splitlines()[0])[:200]


def _named(cluster: Elasticsearch, prefix: str) -> list[str]:
    try:
        return sorted(cluster.ask(_RESTORES, "GET", f"/{prefix}*/_settings/index.uuid", {"expand_wildcards": "all"}))
    except NotThereError:
        return []


def _remove(cluster: Elasticsearch, names: Sequence[str]) -> None:
    """Raises whatever keeps one of them there: a proof that leaves something behind is none."""
    for name in names:
        if not name.startswith(_PROOF):
            raise OpsError(f"{name} is none of the indices of a verification", where=cluster.where)
        try:
            cluster.ask(_RESTORES, "DELETE", f"/{name}")
        except NotThereError:
            continue


def _sweep(cluster: Elasticsearch, target_id: str, clock: Clock) -> None:
    """What verifications left that were killed on another machine, or whose directory is gone: by the time in its name."""
    left: list[str] = []
    for name in _named(cluster, f"{_PROOF}{target_id}-"):
        made = re.match(r"(\d{8}t\d{6}z)-", name.removeprefix(f"{_PROOF}{target_id}-".lower()))
        if made and clock.now() - datetime.strptime(made[1], "%Y%m%dt%H%M%Sz").replace(tzinfo=UTC) > _LEFT_AFTER:
            left.append(name)
    _remove(cluster, left)
