"""Fixtures: servers shared by a test process, and makers of clusters and platforms that clean up after the test."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from ops_platform.clients import postgres_binaries
from tests import elasticsearch_rig, kafka_rig, kube_rig, prometheus_rig, redis_rig, registry_rig
from tests.rig import Cluster, Ground, Platform, scratch

# How long something takes is measured in benchmarks/: on a machine that is busy no test is wrong because it is slow.
# Where a failure refuses a change (OPS_REQUIRE_SERVICES) the examples are the same each time; elsewhere new ones are looked for.
settings.register_profile(
    "here",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=os.environ.get("OPS_REQUIRE_SERVICES") == "1",
)
settings.load_profile("here")

# A port is picked some time before it is bound, and left for a while by a server that a test has killed: processes that test side by
# side have ports of their own.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    postgres_binaries.PORTS = postgres_binaries.PORTS[int(worker[2:]) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]

# Nor does a test that starts a program wait for its modules to be compiled anew: as in every installation in use, once is enough.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell starts what it puts into the background deaf to Ctrl-C, and so would be all that the tests start and interrupt.
with contextlib.suppress(ValueError):  # not the main thread
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

# All tests of one of these run in one process: a second one would cost more than it wins.
ONE_PROCESS = ("three_brokers", "kafka", "elasticsearch", "kube", "registry")
LONGEST = "demo"


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # the order is the one below


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if _group(item) is None and (group := _common(item)):
            item.add_marker(pytest.mark.xdist_group(group))
    if config.getoption("loadgroup", default=False):
        # Begun last, the two tests of the demo would be waited for by processes that have nothing left to do. Then the larger groups.
        sizes = {**Counter(map(_group, items)), LONGEST: len(items), None: 0}
        items.sort(key=lambda item: -sizes[_group(item)])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """The servers of a group end with its last test here: unasked, three brokers alone take a tenth of a core from the others."""
    yield
    if item.config.getoption("loadgroup", default=False) and (nextitem is None or _group(nextitem) != _group(item)):
        for name in ONE_PROCESS:
            for made in _fixtures(item).get(name, ()):
                made.finish(item._request)  # pyright: ignore


def _group(item: pytest.Item) -> str | None:
    marker = item.get_closest_marker("xdist_group")
    return marker.args[0] if marker else None


def _common(item: pytest.Item) -> str | None:
    """The server that it shares with other files; else its own file, if something is made once for the tests of that."""
    fixtures = _fixtures(item)
    if server := next((name for name in ONE_PROCESS if name in fixtures), None):
        return server
    once = any(made.scope == "module" for found in fixtures.values() for made in found)
    return item.nodeid.partition("::")[0] if once else None


def _fixtures(item: pytest.Item) -> Mapping[str, Sequence[Any]]:
    return item._fixtureinfo.name2fixturedefs  # pyright: ignore


@pytest.fixture(scope="session")
def ground() -> Iterator[Ground]:
    made = Ground()
    yield made
    made.close()


@pytest.fixture
def new_cluster() -> Iterator[Callable[..., Cluster]]:
    """Makes clusters that are stopped and removed after the test: `new_cluster(18, {"work_mem": "8MB"})`."""
    made: list[Cluster] = []
    directories = []

    def make(major: int = 18, settings: Mapping[str, str] | None = None, initdb: tuple[str, ...] = ()) -> Cluster:
        directories.append(scratch("ops-pg-test-"))
        made.append(Cluster(major, directories[-1], settings, initdb))
        return made[-1]

    yield make
    for cluster in made:
        cluster.stop()
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    """A PostgreSQL 18 that many tests read and none reconfigures."""
    directory = scratch("ops-pg-test-")
    cluster = Cluster(18, directory)
    yield cluster
    cluster.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def new_platform(ground: Ground) -> Iterator[Callable[..., Platform]]:
    """Makes inventories over the ground: `new_platform({"app-db": [cluster]}, extra={…})`."""
    made: list[Platform] = []

    def make(clusters: Mapping[str, list[Cluster]], **more: Any) -> Platform:
        made.append(Platform(ground, clusters, **more))
        return made[-1]

    yield make
    for platform in made:
        platform.close()


@pytest.fixture(scope="session")
def kube() -> Iterator[kube_rig.Kube]:
    """A Kubernetes control plane that many tests use, each in namespaces and on nodes of its own."""
    with kube_rig.control_plane() as made:
        yield made


@pytest.fixture
def new_redis() -> Iterator[Callable[..., redis_rig.Replicated]]:
    """Makes a Redis with replicas, and with sentinels on request: `new_redis(replicas=2, sentinels=3)`."""
    with ExitStack() as made:
        yield lambda **more: made.enter_context(redis_rig.replicated(**more))


@pytest.fixture
def new_redis_cluster() -> Iterator[Callable[..., redis_rig.RedisCluster]]:
    """Makes clusters of three shards with a replica each."""
    with ExitStack() as made:
        yield lambda **more: made.enter_context(redis_rig.cluster(**more))


@pytest.fixture
def new_prometheus() -> Iterator[Callable[..., prometheus_rig.Prometheus]]:
    """Makes a Prometheus: `new_prometheus({"scrape_configs": […]}, rules=[…])`."""
    with ExitStack() as made:
        yield lambda *args, **more: made.enter_context(prometheus_rig.prometheus(*args, **more))


@pytest.fixture
def new_alertmanager() -> Iterator[Callable[..., prometheus_rig.Alertmanager]]:
    with ExitStack() as made:
        yield lambda *args, **more: made.enter_context(prometheus_rig.alertmanager(*args, **more))


@pytest.fixture
def new_alertmanagers() -> Iterator[Callable[..., list[prometheus_rig.Alertmanager]]]:
    """Makes clusters of two, or as many as are asked for."""
    with ExitStack() as made:
        yield lambda *args, **more: made.enter_context(prometheus_rig.alertmanagers(*args, **more))


@pytest.fixture(scope="session")
def kafka() -> Iterator[kafka_rig.Kafka]:
    """One broker, which many tests use, each with topics of its own; it is not killed."""
    with kafka_rig.cluster() as made:
        yield made


@pytest.fixture(scope="session")
def three_brokers() -> Iterator[kafka_rig.Kafka]:
    with kafka_rig.cluster(brokers=3) as made:
        yield made


@pytest.fixture
def kafka_cluster(three_brokers: kafka_rig.Kafka) -> kafka_rig.Kafka:
    """Three brokers, all of them alive and without topics when the test begins, whatever the one before has killed and left."""
    three_brokers.start()
    three_brokers.delete_topics()
    return three_brokers


@pytest.fixture(scope="session")
def elasticsearch() -> Iterator[elasticsearch_rig.Elasticsearch]:
    """One node, which many tests use, each with indices of its own."""
    with elasticsearch_rig.node() as made:
        yield made


@pytest.fixture(scope="session")
def registry() -> Iterator[registry_rig.Registry]:
    """A schema registry with Confluent's REST API, which many tests use, each with subjects of its own."""
    with registry_rig.registry() as made:
        yield made
