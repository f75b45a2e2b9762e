"""The Elasticsearch of the tests does what the tests of others rely on."""

from __future__ import annotations

import urllib.error

import pytest

from tests.elasticsearch_rig import Elasticsearch
from tests.rig import eventually


def test_it_is_an_8_that_finds_what_was_indexed(elasticsearch: Elasticsearch) -> None:
    assert elasticsearch.version.startswith("8.")
    elasticsearch.create_index("orders")
    key = elasticsearch.add("orders", {"customer": "Müller", "total": 12.5})
    query = {"query": {"match": {"customer": "müller"}}}
    found = elasticsearch.call("POST", "/orders/_search", query)["hits"]["hits"]
    assert [hit["_id"] for hit in found] == [key]
    assert elasticsearch.health("orders")["status"] == "green"


def test_a_blocked_index_takes_nothing_until_the_block_is_lifted(elasticsearch: Elasticsearch) -> None:
    elasticsearch.create_index("blocked")
    elasticsearch.configure_index("blocked", blocks__read_only_allow_delete=True)
    with pytest.raises(urllib.error.HTTPError) as refused:
        elasticsearch.add("blocked", {"a": 1})
    assert refused.value.code == 429
    assert elasticsearch.index_setting("blocked", "blocks.read_only_allow_delete") == "true"
    elasticsearch.configure_index("blocked", blocks__read_only_allow_delete=None)
    assert elasticsearch.index_setting("blocked", "blocks.read_only_allow_delete") is None
    elasticsearch.add("blocked", {"a": 1})
    assert elasticsearch.count("blocked") == 1


def test_a_shard_that_failed_comes_back_when_it_is_tried_again(elasticsearch: Elasticsearch) -> None:
    elasticsearch.create_index("failing")
    elasticsearch.add("failing", {"a": 1})
    elasticsearch.break_shard("failing")
    assert elasticsearch.health("failing")["status"] == "red"
    elasticsearch.mend_shard("failing")
    elasticsearch.call("POST", "/_cluster/reroute")
    assert elasticsearch.health("failing")["status"] == "red"
    elasticsearch.call("POST", "/_cluster/reroute", retry_failed="true")
    eventually(lambda: elasticsearch.health("failing")["status"] == "green")
    assert elasticsearch.count("failing") == 1


def test_a_snapshot_restores_what_was_deleted(elasticsearch: Elasticsearch) -> None:
    elasticsearch.create_index("kept")
    elasticsearch.add("kept", {"a": 1})
    where = {"type": "fs", "settings": {"location": str(elasticsearch.repositories / "one")}}
    elasticsearch.call("PUT", "/_snapshot/one", where)
    made = elasticsearch.call("PUT", "/_snapshot/one/first", {"indices": "kept"}, wait_for_completion="true")
    assert made["snapshot"]["state"] == "SUCCESS"
    elasticsearch.call("DELETE", "/kept")
    elasticsearch.call("POST", "/_snapshot/one/first/_restore", {}, wait_for_completion="true")
    assert elasticsearch.count("kept") == 1


def test_a_killed_node_comes_back_with_its_data(elasticsearch: Elasticsearch) -> None:
    elasticsearch.create_index("lasting")
    elasticsearch.add("lasting", {"a": 1})
    elasticsearch.daemon.stop()
    with pytest.raises(OSError, match=r"refused|reset"):
        elasticsearch.health()
    elasticsearch.daemon.start()
    eventually(lambda: elasticsearch.health("lasting")["status"] == "green")
    assert elasticsearch.count("lasting") == 1
