"""What one certain Kafka broker knows of the cluster: Metadata, version 1, of the Kafka protocol, in plain text.

A client of librdkafka asks whichever broker it likes, and each learns of a change at its own time; a rig wants to know that all
have. The format: https://kafka.apache.org/protocol#The_Messages_Metadata
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

_METADATA, _VERSION = 3, 1


@dataclass(frozen=True)
class Partition:
    """`leader` -1: there is none."""

    number: int
    leader: int
    replicas: tuple[int, ...]
    in_sync: tuple[int, ...]


@dataclass(frozen=True)
class Metadata:
    """`partitions` is empty for a topic that the broker does not know."""

    brokers: frozenset[int]
    controller: int
    partitions: dict[int, Partition]


def metadata(port: int, topic: str = "") -> Metadata:
    """Raises OSError where no broker answers."""
    wanted = [topic.encode()] if topic else []
    body = struct.pack(">hhih", _METADATA, _VERSION, 0, -1) + struct.pack(">i", len(wanted))
    body += b"".join(struct.pack(">h", len(name)) + name for name in wanted)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(struct.pack(">i", len(body)) + body)
        answer = connection.makefile("rb")
        return _Answer(_exactly(answer.read, struct.unpack(">i", _exactly(answer.read, 4))[0])).metadata()


class _Answer:
    def __init__(self, content: bytes) -> None:
        self._read = BytesIO(content).read
        self._int()  # the number of the request

    def metadata(self) -> Metadata:
        brokers = frozenset(self._broker() for _ in range(self._int()))
        controller = self._int()
        topics = [self._topic() for _ in range(self._int())]
        return Metadata(brokers, controller, topics[0] if topics else {})

    def _broker(self) -> int:
        number = self._int()
        self._string()
        self._int()
        self._string()
        return number

    def _topic(self) -> dict[int, Partition]:
        self._short()
        self._string()
        _exactly(self._read, 1)
        found = [self._partition() for _ in range(self._int())]
        return {partition.number: partition for partition in found}

    def _partition(self) -> Partition:
        self._short()
        return Partition(self._int(), self._int(), self._ints(), self._ints())

    def _ints(self) -> tuple[int, ...]:
        return tuple(self._int() for _ in range(self._int()))

    def _int(self) -> int:
        return struct.unpack(">i", _exactly(self._read, 4))[0]

    def _short(self) -> int:
        return struct.unpack(">h", _exactly(self._read, 2))[0]

    def _string(self) -> bytes:
        return _exactly(self._read, max(0, self._short()))


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    content = read(size)
    if len(content) != size:
        raise ConnectionError("the broker ended its answer early")
    return content
