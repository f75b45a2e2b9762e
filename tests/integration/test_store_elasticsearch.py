"""Elasticsearch: snapshots of a real node, restored under other names and compared. What it has no module for (SLM), and refusals, a proxy answers."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ops_platform.errors import AccessDeniedError, NotThereError, OpsError, RefusedError, UnreachableError
from ops_platform.ledger import Ledger
from ops_platform.proof import expire
from ops_platform.recovery.model import Verdict
from ops_platform.stores import elasticsearch_snapshots
from ops_platform.stores.dump import run_backup
from ops_platform.stores.elasticsearch import ElasticsearchStore, RestoredElasticsearch
from ops_platform.stores.kind import Saved
from tests import drill_rig, stores_rig
from tests.elasticsearch_rig import Elasticsearch
from tests.integration.http_faults import Answer, FaultyProxy, passing, reply
from tests.rig import Cluster, Ground, Platform
from tests.stores_rig import dump, gate, gates, prove, with_store


@pytest.fixture(scope="module")
def platform(ground: Ground, shared_cluster: Cluster) -> Iterator[Platform]:
    made = Platform(ground, {})
    made.body["platform"]["database"] = drill_rig.ledger_database(shared_cluster, made.home, "elasticsearch")
    yield made
    made.close()
    shared_cluster.sql("drop database elasticsearch with (force)")


@dataclass
class Shop:
    """Indices, an alias and a data stream of one test, and a repository of its own."""

    server: Elasticsearch
    platform: Platform
    name: str

    @property
    def orders(self) -> str:
        return f"{self.name}-orders"

    @property
    def stream(self) -> str:
        return f"{self.name}-logs"

    @property
    def where(self) -> Path:
        return self.server.repositories / self.name

    def register(self) -> None:
        body = {"type": "fs", "settings": {"location": str(self.where)}}
        self.server.call("PUT", f"/_snapshot/{self.name}", body)

    def entry(self, **more: Any) -> dict[str, Any]:
        snapshots = {"repository": self.name, **more.pop("snapshots", {})}
        return {
            "id": self.name, "kind": "elasticsearch", "urls": [self.server.url], "timeout": "20s", "indices": [f"{self.name}*"],
            "snapshots": snapshots, **more,
        }  # fmt: skip

    def store(self, kind: type[ElasticsearchStore] = ElasticsearchStore, **more: Any) -> ElasticsearchStore:
        target = with_store(self.platform, self.entry(**more))
        return kind(self.platform.access, target, target.system)  # type: ignore[arg-type]

    def proofs(self) -> list[str]:
        return list(self.server.call("GET", f"/ops-proof-{self.name}-*/_settings", expand_wildcards="all"))

    def snapshots(self) -> list[str]:
        return [one["snapshot"] for one in self.server.call("GET", f"/_snapshot/{self.name}/_all")["snapshots"]]

    def backups(self) -> int:
        return len(stores_rig.repository(self.platform, self.entry()).infos())

    def files(self) -> list[Path]:
        """Of the index's only shard, as its node keeps them."""
        self.server.call("POST", f"/{self.orders}/_flush")
        found = self.server.call("GET", f"/{self.orders}/_settings", flat_settings="true")[self.orders]["settings"]
        return list((self.server.home / "data" / "indices" / found["index.uuid"] / "0" / "index").glob("_*"))


@pytest.fixture
def shop(elasticsearch: Elasticsearch, platform: Platform) -> Iterator[Shop]:
    made = Shop(elasticsearch, platform, f"s{secrets.token_hex(4)}")
    elasticsearch.create_index(made.orders)
    lines = [line for n in range(40) for line in ({"index": {}}, {"customer": f"Müller {n}", "total": n / 4})]
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    _bulk(elasticsearch, f"/{made.orders}/_bulk", body)
    alias = {"index": made.orders, "alias": f"{made.name}-alias", "filter": {"term": {"customer": "müller"}}}
    elasticsearch.call("POST", "/_aliases", {"actions": [{"add": alias}]})
    template = {"index_patterns": [f"{made.stream}*"], "data_stream": {}, "priority": 500,
                "template": {"settings": {"index.number_of_replicas": 0}}}  # fmt: skip
    elasticsearch.call("PUT", f"/_index_template/{made.name}", template)
    for n in range(3):
        document = {"@timestamp": f"2026-01-0{n + 1}T00:00:00Z", "message": f"line {n}"}
        elasticsearch.call("PUT", f"/{made.stream}/_create/{n}", document, refresh="true")
    yield made
    for name in made.proofs():
        elasticsearch.call("DELETE", f"/{name}")
    elasticsearch.call("DELETE", f"/{made.orders}", ignore_unavailable="true")


def _bulk(server: Elasticsearch, path: str, body: bytes) -> None:
    import urllib.request

    request = urllib.request.Request(f"{server.url}{path}?refresh=true", body, {"Content-Type": "application/x-ndjson"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert not json.loads(answer.read())["errors"]


def test_indices_and_data_streams_come_back_under_other_names_and_are_the_same(shop: Shop) -> None:
    shop.register()
    manifest = dump(shop.platform, shop.entry())
    assert [part.name for part in manifest.parts] == ["indices", "cluster"]
    card = prove(shop.platform, shop.entry())
    assert card.verdict is Verdict.PASS, card.reason
    assert gates(card) == {
        "whole": "passed", "age": "passed", "indices": "passed", "snapshot": "passed", "restored": "passed", "mappings": "passed", "aliases": "not_applicable",
        "counts": "passed", "documents": "passed", "policy": "not_applicable", "policy-runs": "not_applicable", "teardown": "passed",
    }  # fmt: skip
    assert gate(card, "restored").result == "2 of 2 indices"
    assert gate(card, "counts").result == "43 documents"
    assert gate(card, "documents").result == "43 documents are the same"
    assert shop.proofs() == []
    # What other people ask for by its name is what it was.
    assert list(shop.server.call("GET", f"/_alias/{shop.name}-alias")) == [shop.orders]
    kept = shop.server.call("GET", f"/_snapshot/{shop.name}/{shop.snapshots()[0]}")["snapshots"][0]
    assert kept["data_streams"] == [shop.stream]
    assert "Müller" not in card.model_dump_json() + manifest.model_dump_json()


def test_a_sample_is_restored_in_the_cluster_that_is_named_for_it(shop: Shop) -> None:
    shop.register()
    with FaultyProxy(shop.server.port) as sandbox:
        restore = {"urls": [sandbox.url], "indices": [shop.orders], "sample": 1, "documents": 5, "timeout": "20s"}
        dump(shop.platform, shop.entry(restore=restore))
        assert sandbox.seen == []
        card = prove(shop.platform, shop.entry(restore=restore))
        assert card.verdict is Verdict.PASS, card.reason
        assert gate(card, "restored").result == "1 of 2 indices"
        assert gates(card)["aliases"] == "passed"
        assert [one.method for one in sandbox.seen if one.path.endswith("/_restore")] == ["POST"]
    assert shop.proofs() == []


def test_what_is_written_during_the_dump_makes_no_failure(shop: Shop) -> None:
    shop.register()

    class Meanwhile(ElasticsearchStore):
        def _take(self, *args: Any) -> Any:
            found = shop.server.call("GET", f"/{shop.orders}/_search", size="1")["hits"]["hits"][0]
            shop.server.call("PUT", f"/{shop.orders}/_doc/{found['_id']}", {"customer": "other", "new": {"field": 1}})
            shop.server.add(shop.orders, {"customer": "another"})
            return super()._take(*args)

    store = shop.store(Meanwhile)
    run_backup(shop.platform.access, store.target, kind=store)
    card = prove(shop.platform, shop.entry())
    assert card.verdict is Verdict.PASS, card.reason
    assert gate(card, "documents").result == "42 documents are the same"
    assert gate(card, "mappings").result == "2 indices; 1 changed meanwhile"


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ("document", ["documents"]),
        ("fewer", ["counts", "documents"]),
        ("mapping", ["mappings"]),
    ],
)
def test_what_is_restored_and_is_not_the_source_fails(shop: Shop, change: str, failed: list[str]) -> None:
    shop.register()
    dump(shop.platform, shop.entry())

    class Altered(ElasticsearchStore):
        def restore(self, saved: Saved, home: Path) -> Any:
            restored = super().restore(saved, home)

            class Context:
                def __enter__(self) -> Any:
                    found = restored.__enter__()
                    index = f"{found.prefix}{shop.orders}"
                    key = shop.server.call("GET", f"/{index}/_search", size="1")["hits"]["hits"][0]["_id"]
                    if change == "document":
                        shop.server.call("PUT", f"/{index}/_doc/{key}", {"customer": "x", "total": 1.5}, refresh="true")
                    elif change == "fewer":
                        shop.server.call("DELETE", f"/{index}/_doc/{key}", refresh="true")
                    else:
                        shop.server.call("PUT", f"/{index}/_mapping", {"properties": {"more": {"type": "keyword"}}})
                    return found

                def __exit__(self, *error: Any) -> Any:
                    return restored.__exit__(*error)

            return Context()

    card = prove(shop.platform, shop.entry(), kind=shop.store(Altered))
    assert card.verdict is Verdict.FAIL
    assert [name for name, status in gates(card).items() if status == "failed"] == failed
    assert "Müller" not in card.model_dump_json()


def test_a_partial_snapshot_is_no_backup_and_does_not_stay(shop: Shop) -> None:
    """The shard serves from what it has open; its files cannot be copied."""
    shop.register()
    files = shop.files()
    for file in files:
        file.chmod(0)
    try:
        with pytest.raises(OpsError, match=rf"not whole: PARTIAL, 1 of 2 shards failed: {shop.orders}\[0\]"):
            dump(shop.platform, shop.entry())
    finally:
        for file in files:
            file.chmod(0o644)
    assert shop.snapshots() == []
    assert shop.backups() == 0


def test_a_red_index_is_no_backup(shop: Shop) -> None:
    shop.register()
    shop.server.break_shard(shop.orders)
    try:
        with pytest.raises(UnreachableError, match=f"1 indices are red, {shop.orders} among them"):
            dump(shop.platform, shop.entry())
    finally:
        shop.server.mend_shard(shop.orders)
    assert shop.snapshots() == []


def test_a_snapshot_with_a_damaged_or_a_missing_file_fails(shop: Shop) -> None:
    shop.register()
    dump(shop.platform, shop.entry())
    for file in shop.where.rglob("__*"):
        file.write_bytes(file.read_bytes()[:-5] + b"other")
    card = prove(shop.platform, shop.entry())
    assert card.verdict is Verdict.FAIL
    assert "not restored" in gate(card, "restored").result
    assert shop.proofs() == []


def test_a_snapshot_that_somebody_deleted_fails_without_a_restore(shop: Shop) -> None:
    shop.register()
    dump(shop.platform, shop.entry())
    shop.server.call("DELETE", f"/_snapshot/{shop.name}/{shop.snapshots()[0]}")
    card = prove(shop.platform, shop.entry())
    assert card.verdict is Verdict.FAIL
    assert gates(card)["snapshot"] == "failed"
    assert "restored" not in gates(card)


def test_without_an_answer_or_a_login_there_is_neither_a_backup_nor_a_verdict(shop: Shop) -> None:
    shop.register()
    dump(shop.platform, shop.entry())
    with pytest.raises(UnreachableError, match="no node answers"):
        dump(shop.platform, shop.entry(urls=["http://127.0.0.1:1"]))
    assert prove(shop.platform, shop.entry(urls=["http://127.0.0.1:1"])).verdict is Verdict.COULD_NOT_VERIFY
    with FaultyProxy(shop.server.port) as proxy:
        proxy.always = reply(401, b'{"error": "unable to authenticate"}', content_type="application/json")
        with pytest.raises(AccessDeniedError):
            dump(shop.platform, shop.entry(urls=[proxy.url]))
        assert prove(shop.platform, shop.entry(urls=[proxy.url])).verdict is Verdict.COULD_NOT_VERIFY
    # One node that is away is no cluster that is away.
    dump(shop.platform, shop.entry(urls=["http://127.0.0.1:1", shop.server.url]))
    assert shop.backups() == 2


def test_indices_of_a_verification_that_was_killed_are_removed_by_a_later_one(shop: Shop) -> None:
    shop.register()
    dump(shop.platform, shop.entry())
    old, young = (f"ops-proof-{shop.name}-{when}-abcdef-x" for when in ("20200101t000000z", "29990101t000000z"))
    for name in (old, young):
        shop.server.create_index(name)
    assert prove(shop.platform, shop.entry()).verdict is Verdict.PASS
    assert shop.proofs() == [young]


def test_a_drill_of_the_full_stack_restores_it_and_one_that_was_killed_leaves_no_index(
    shop: Shop, shared_cluster: Cluster
) -> None:
    shop.register()
    dump(shop.platform, shop.entry())
    card = drill_rig.stack_of(shop.platform, shared_cluster, shop.name, RestoredElasticsearch)
    assert [(part.target, part.verdict) for part in card.stack] == [(shop.name, "PASS")]
    assert shop.proofs() == []


# The repository and the policy as code


def test_a_repository_is_registered_where_the_inventory_says_enforce_and_else_missed(shop: Shop) -> None:
    declared = {"type": "fs", "settings": {"location": str(shop.where), "compress": True}}
    with pytest.raises(NotThereError, match=f"no snapshot repository {shop.name}"):
        dump(shop.platform, shop.entry(snapshots=declared))
    with pytest.raises(NotThereError, match=f"no snapshot repository {shop.name}"):
        shop.store(snapshots=declared).look()
    assert not shop.where.exists()
    enforced = {**declared, "mode": "enforce"}
    dump(shop.platform, shop.entry(snapshots=enforced))
    found = shop.server.call("GET", f"/_snapshot/{shop.name}")[shop.name]
    assert (found["type"], found["settings"]) == ("fs", {"location": str(shop.where), "compress": "true"})
    assert shop.store(snapshots=declared).look().startswith("Elasticsearch 8")
    assert gates(prove(shop.platform, shop.entry(snapshots=enforced)))["policy"] == "passed"
    with Ledger(shop.platform.access.platform_db) as ledger:
        planned = [one.body["plan"]["target"] for one in ledger.entries(kind="action.plan")]
    assert shop.name in planned
    # Somebody changes it: that is reported, and left to whoever reads it.
    changed = {**declared, "settings": {"location": str(shop.where), "compress": False}}
    card = prove(shop.platform, shop.entry(snapshots=changed))
    assert card.verdict is Verdict.FAIL
    assert gate(card, "policy").result == f'repository {shop.name} settings: compress is "true", not "false"'


def test_snapshots_that_no_backup_names_go_and_the_others_stay(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.register()
    mine = {"taken_by": "ops_platform", "target": shop.name}
    manifest = dump(shop.platform, shop.entry())
    for name, metadata in (("dead", mine), ("somebodys", {"taken_by": "somebody"})):
        body = {"indices": shop.orders, "metadata": metadata}
        shop.server.call("PUT", f"/_snapshot/{shop.name}/{name}", body, wait_for_completion="true")
    [named] = [name for name in shop.snapshots() if name.startswith("ops-")]
    policy = {"schedule": {"cron": "15 2 * * *"}, "expiry": {"max_percent": 60}}
    enforced = shop.entry(snapshots={"mode": "enforce"}, backup=policy)
    dump(shop.platform, enforced)
    assert {"dead", "somebodys", named} < set(shop.snapshots())  # it may be a dump that still runs
    monkeypatch.setattr(elasticsearch_snapshots, "_DEAD_AFTER", timedelta(0))
    target = with_store(shop.platform, enforced)
    for mode, status in ((None, "observed"), ("enforce", "done")):
        backups, snapshots = expire(shop.platform.access, target, mode=mode, actor="ann")  # type: ignore[arg-type]
        assert (backups.status.value, snapshots.status.value) == ("nothing to do", status)
        assert [change.object for change in snapshots.plan.changes] == ["dead"]
        assert ("dead" in shop.snapshots()) is (mode is None)
    dump(shop.platform, enforced)
    left = shop.snapshots()
    assert "dead" not in left
    assert {"somebodys", named} < set(left)
    assert manifest.backup_id


def test_no_snapshot_goes_under_a_legal_hold(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.register()
    metadata = {"taken_by": "ops_platform", "target": shop.name}
    body = {"indices": shop.orders, "metadata": metadata}
    shop.server.call("PUT", f"/_snapshot/{shop.name}/dead", body, wait_for_completion="true")
    monkeypatch.setattr(elasticsearch_snapshots, "_DEAD_AFTER", timedelta(0))
    with pytest.raises(RefusedError, match="legal hold"):
        dump(shop.platform, shop.entry(snapshots={"mode": "enforce"}, legal_hold=True))
    assert shop.snapshots() == ["dead"]


class Slm:
    """Snapshot lifecycle management in front of a node that has no such module: it keeps what is put, as the documented API answers."""

    def __init__(self) -> None:
        self.policies: dict[str, Any] = {}

    def __call__(self, handler: Any) -> None:
        if "/_slm/policy/" not in handler.path:
            return passing(handler)
        request, name = handler.take(), handler.path.rpartition("/")[2]
        if request.method == "PUT":
            self.policies[name] = json.loads(request.body)
        if name in self.policies:
            status, body = 200, {name: {"version": 1, "policy": self.policies[name]}}
        else:
            status, body = 404, {"error": {"reason": f"snapshot lifecycle policy or policies [{name}] were not found"}}
        return handler.answer(Answer(status, {"content-type": "application/json"}, json.dumps(body).encode()))


def test_a_policy_is_put_as_declared_and_a_partial_snapshot_of_it_is_a_failure(shop: Shop) -> None:
    shop.register()
    slm = Slm()
    policy = {"id": "nightly", "schedule": "0 30 1 * * ?", "retention": {"expire_after": "30d", "min_count": 5}}
    with FaultyProxy(shop.server.port) as proxy:
        proxy.always = slm
        entry = shop.entry(urls=[proxy.url], snapshots={"policy": policy, "mode": "enforce"})
        dump(shop.platform, entry)
        assert slm.policies["nightly"] == {
            "name": "<nightly-{now/d}>", "schedule": "0 30 1 * * ?", "repository": shop.name,
            "config": {"indices": ["*"], "partial": False}, "retention": {"expire_after": "30d", "min_count": 5},
        }  # fmt: skip
        _of_policy(shop, "whole")
        assert prove(shop.platform, entry).verdict is Verdict.PASS
        slm.policies.clear()
        files = shop.files()
        for file in files:
            file.chmod(0)
        _of_policy(shop, "half")
        for file in files:
            file.chmod(0o644)
        card = prove(shop.platform, entry)
        assert card.verdict is Verdict.FAIL
        assert gate(card, "policy").result == "policy nightly is not there"
        assert gate(card, "policy-runs").result == "half is PARTIAL"


def _of_policy(shop: Shop, name: str) -> None:
    shop.server.add(shop.orders, {"for": name})  # a file that no snapshot has yet
    body = {"indices": shop.orders, "metadata": {"policy": "nightly"}}
    shop.server.call("PUT", f"/_snapshot/{shop.name}/{name}", body, wait_for_completion="true")
