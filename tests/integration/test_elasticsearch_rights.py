"""The rights that playbooks and backups of Elasticsearch state, on a real node that asks for them: with them all goes, without one it is named."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from ops_platform.actions import Outcome, Status
from ops_platform.errors import AccessDeniedError, NotThereError
from ops_platform.recovery.model import Verdict
from ops_platform.remediation.playbook import playbook
from tests import drill_rig, elasticsearch_rig
from tests.elasticsearch_rig import Elasticsearch
from tests.integration.systems_rig import Bench, bench
from tests.rig import Cluster, Ground, Platform, eventually
from tests.stores_rig import dump, prove

pytestmark = pytest.mark.xdist_group("elasticsearch")
LIFT, RETRY = playbook("elasticsearch.lift_read_only"), playbook("elasticsearch.retry_failed_shards")
BLOCK = "blocks.read_only_allow_delete"
# What alone is used of the privileges manage.
REROUTE, UPDATE = "cluster:admin/reroute", "indices:admin/settings/update"


@pytest.fixture(scope="module")
def node() -> Iterator[Elasticsearch]:
    with elasticsearch_rig.node(secured=True) as made:
        room = {f"cluster.routing.allocation.disk.watermark.{name}": "1b" for name in ("low", "high", "flood_stage")}
        made.call("PUT", "/_cluster/settings", {"persistent": room})
        yield made


@pytest.fixture
def index(node: Elasticsearch) -> Iterator[str]:
    name = f"t{secrets.token_hex(4)}"
    node.create_index(name)
    yield name
    node.call("DELETE", f"/{name}")


@pytest.fixture
def may(node: Elasticsearch, shared_cluster: Cluster, index: str) -> Iterator[Callable[..., Bench]]:
    """A bench whose login has these privileges: of the cluster, and of the test's index alone."""
    with ExitStack() as stack:

        def made(cluster: list[str], indices: list[str]) -> Bench:
            on = [{"names": [index], "privileges": indices}] if indices else []
            user, password = node.user({"cluster": cluster, "indices": on})
            system = {
                "kind": "elasticsearch",
                "urls": [node.url],
                "timeout": "20s",
                "auth": {"user": user, "password": "file://{inventory}/password"},
            }
            return stack.enter_context(bench(shared_cluster, system, files={"password": password}))

        yield made


def test_the_block_is_lifted_and_set_again_with_the_stated_rights_alone(
    node: Elasticsearch, index: str, may: Callable[..., Bench]
) -> None:
    node.configure_index(index, blocks__read_only_allow_delete=True)
    it = may(["monitor"], ["view_index_metadata", UPDATE])
    result = it.run(LIFT, indices=[index])
    assert result.status is Status.DONE, result.as_json()
    assert node.index_setting(index, BLOCK) is None
    assert it.undo(LIFT, result.plan.changes, indices=[index]).status is Status.DONE
    assert node.index_setting(index, BLOCK) == "true"


@pytest.mark.parametrize(
    ("cluster", "indices", "right"),
    [
        ([], ["view_index_metadata", "manage"], "the cluster privilege monitor"),
        (["monitor"], [], "the index privilege view_index_metadata"),
    ],
)
def test_without_a_right_to_look_it_is_named(
    node: Elasticsearch, index: str, may: Callable[..., Bench], cluster: list[str], indices: list[str], right: str
) -> None:
    node.configure_index(index, blocks__read_only_allow_delete=True)
    with pytest.raises(AccessDeniedError) as refused:
        may(cluster, indices).run(LIFT, indices=[index])
    assert f"give our role {right}" in str(refused.value)
    assert node.index_setting(index, BLOCK) == "true"


def test_without_the_right_to_change_the_block_stays_and_the_right_is_named(
    node: Elasticsearch, index: str, may: Callable[..., Bench]
) -> None:
    node.configure_index(index, blocks__read_only_allow_delete=True)
    result = may(["monitor"], ["view_index_metadata"]).run(LIFT, indices=[index])
    assert result.status is Status.FAILED
    ((_, applied),) = result.outcomes
    assert (applied.outcome, "the index privilege manage" in applied.reason) == (Outcome.FAILED, True), applied
    assert node.index_setting(index, BLOCK) == "true"


def test_shards_are_retried_with_the_stated_rights_alone(
    node: Elasticsearch, index: str, may: Callable[..., Bench]
) -> None:
    node.break_shard(index)
    node.mend_shard(index)
    poor = may(["monitor"], []).run(RETRY)
    assert poor.status is Status.FAILED
    ((_, applied),) = poor.outcomes
    assert (applied.outcome, "the cluster privilege manage" in applied.reason) == (Outcome.FAILED, True), applied
    assert node.health(index)["status"] == "red"
    with pytest.raises(AccessDeniedError, match="give our role the cluster privilege monitor"):
        may([REROUTE], []).run(RETRY)
    result = may(["monitor", REROUTE], []).run(RETRY)
    assert result.status is Status.DONE, result.as_json()
    eventually(lambda: node.health(index)["status"] == "green")


# Backups


@pytest.fixture
def platform(ground: Ground, shared_cluster: Cluster) -> Iterator[Platform]:
    made = Platform(ground, {})
    made.body["platform"]["database"] = drill_rig.ledger_database(shared_cluster, made.home, "rights")
    yield made
    made.close()
    shared_cluster.sql("drop database rights with (force)")


def test_a_snapshot_is_taken_restored_and_compared_with_the_documented_rights_alone(
    node: Elasticsearch, index: str, platform: Platform
) -> None:
    for number in range(3):
        node.add(index, {"customer": f"Müller {number}"})
    node.call("PUT", f"/_snapshot/{index}", {"type": "fs", "settings": {"location": str(node.repositories / index)}})

    def entry(name: str, cluster: list[str], *indices: tuple[str, list[str]]) -> dict[str, Any]:
        role = {"cluster": cluster, "indices": [{"names": [on], "privileges": may} for on, may in indices]}
        user, password = node.user(role)
        (platform.home / name).write_text(password)
        (platform.home / name).chmod(0o600)
        return {
            "id": name, "kind": "elasticsearch", "urls": [node.url], "timeout": "20s", "indices": [f"{index}*"],
            "snapshots": {"repository": index}, "auth": {"user": user, "password": f"file://{platform.home}/{name}"},
        }  # fmt: skip

    reads, proofs = (
        (f"{index}*", ["read", "monitor", "maintenance", "view_index_metadata"]),
        ("ops-proof-*", ["manage", "read"]),
    )
    cluster = ["monitor", "create_snapshot", "manage"]
    enough = entry("enough", cluster, reads, proofs)
    dump(platform, enough)
    card = prove(platform, enough)
    assert card.verdict is Verdict.PASS, card.reason
    without: dict[str, tuple[Any, ...]] = {
        "monitor": (["create_snapshot"], reads, proofs),
        "create_snapshot": (["monitor"], reads, proofs),
        "maintenance": (cluster, (reads[0], ["read", "monitor", "view_index_metadata"]), proofs),
        "on the indices": (cluster, (reads[0], ["view_index_metadata"]), proofs),
    }
    for right, role in without.items():
        with pytest.raises(AccessDeniedError) as refused:
            dump(platform, entry(f"without-{secrets.token_hex(4)}", *role))
        assert re.search(f"give our role the .*{right}", str(refused.value)), right
    with pytest.raises(NotThereError, match="our role may see them"):
        dump(platform, entry("blind", cluster, proofs))
