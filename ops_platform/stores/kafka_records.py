"""The records of a Kafka topic: read as they are committed, and their stored form.

Only committed records are read, up to where each partition stood when its reading began. A part `records-N` of a backup is one partition: for
each record offset and timestamp (64 bits, ms since 1970), lengths of key and value (32 bits, -1: there is none), the number of headers (16 bits),
then key, value, and each header's name and value with their lengths (16 and 32 bits), all big-endian.
"""

from __future__ import annotations

import contextlib
import secrets
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from ops_platform.clients.kafka import Kafka, Said
from ops_platform.errors import ConflictError, CorruptionError, UnreachableError

_HEAD, _HEADER = struct.Struct(">qqiiH"), struct.Struct(">Hi")
_BATCH = 2000
# Fewer and larger answers than librdkafka asks for by itself, no more than some of them held; where so many were held that it paused, it
# would go on after a second, which is longer than they last.
_FETCH = {
    "fetch_message_max_bytes": 4 << 20,
    "queued_max_messages_kbytes": 64 << 10,
    "queued_min_messages": 100_000,
    "fetch_queue_backoff_ms": 1,
}
_GATHERING = 0.1  # seconds
_SILENT = 60.0  # seconds without a record or an end


@dataclass(frozen=True)
class Record:
    """`timestamp` in milliseconds since 1970. Two at different offsets may be the same record."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


def read_partition(
    kafka: Kafka, said: Said, topic: str, partition: int, write: Callable[[bytes], None]
) -> dict[str, int]:
    """Everything that is committed up to now."""
    count, first, last = 0, -1, -1
    for batch in _batches_of(kafka, said, topic, partition):
        # Without a `Record` for each: there are many, and each costs.
        write(b"".join([_stored(m.offset(), m.timestamp()[1], m.key(), m.value(), m.headers() or ()) for m in batch]))
        first, last, count = (first if count else batch[0].offset()), batch[-1].offset(), count + len(batch)
    return {"count": count, "first": first, "last": last}


def records_of(kafka: Kafka, said: Said, topic: str, partition: int) -> Iterator[Record]:
    """The committed records of one partition, up to where it stands now. Raises ConflictError where some went meanwhile."""
    for batch in _batches_of(kafka, said, topic, partition):
        yield from map(_record, batch)


def _batches_of(kafka: Kafka, said: Said, topic: str, partition: int) -> Iterator[list[Any]]:
    """The same as librdkafka's messages, some at once; none of the lists is empty."""
    from confluent_kafka import TopicPartition

    settings = {
        "group_id": f"ops-backup-{secrets.token_hex(4)}", "enable_auto_commit": False, "auto_offset_reset": "error",
        "isolation_level": "read_committed", "enable_partition_eof": True, "check_crcs": True, **_FETCH,
    }  # fmt: skip
    with contextlib.closing(kafka.consumer(said, **settings)) as consumer:
        low, high = kafka.watermarks(consumer, said, topic, partition)
        if low >= high:
            return
        consumer.assign([TopicPartition(topic, partition, low)])
        heard_at, ended = kafka.clock.monotonic(), False
        while not ended:
            with kafka.named(said, topic):
                # It waits for as many as were asked for, or for all of this time, also behind the last one.
                batch = consumer.consume(_BATCH, timeout=_GATHERING)
            if batch:
                heard_at = kafka.clock.monotonic()
            elif kafka.clock.monotonic() - heard_at > _SILENT:
                raise UnreachableError(
                    f"{topic}/{partition} was not read to its end: no answer for {_SILENT:.0f} s", where=kafka.where
                )
            good, ended = _until(batch, high, kafka, said, f"{topic}/{partition}")
            if good:
                yield good


def _until(batch: list[Any], high: int, kafka: Kafka, said: Said, where: str) -> tuple[list[Any], bool]:
    """The messages below an offset, and whether that was all of them."""
    from confluent_kafka import KafkaError

    good: list[Any] = []
    for message in batch:
        error = message.error()
        if error is None or error.code() == KafkaError._PARTITION_EOF:  # pyright: ignore[reportPrivateUsage] - its published name
            if cast("int", message.offset()) >= high:
                return good, True
            # An end before it: of a leader that has just taken over, and does not know yet that its followers have more.
            good += [message] if error is None else []
            continue
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):  # pyright: ignore[reportPrivateUsage]
            raise ConflictError(
                f"records of {where} were removed before they were read", where=kafka.where,
                remedy="its retention was faster: take it again, or give it more time",
            )  # fmt: skip
        raise kafka.error(error, said, where.rpartition("/")[0])
    return good, False


def _record(message: Any) -> Record:
    _, timestamp = message.timestamp()
    headers = tuple((name, value) for name, value in message.headers() or ())
    return Record(message.offset(), timestamp, message.key(), message.value(), headers)


def packed(record: Record) -> bytes:
    """The stored form of a record; see the module's text."""
    return _stored(record.offset, record.timestamp, record.key, record.value, record.headers)


def _stored(
    offset: int, timestamp: int, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes | None]]
) -> bytes:
    lengths = -1 if key is None else len(key), -1 if value is None else len(value)
    found = _HEAD.pack(offset, timestamp, *lengths, len(headers)) + (key or b"") + (value or b"")
    for name, content in headers:
        encoded = name.encode()
        found += _HEADER.pack(len(encoded), -1 if content is None else len(content)) + encoded + (content or b"")
    return found


def read_records(file: Path) -> Iterator[Record]:
    """Raises CorruptionError for what is cut off."""
    with file.open("rb") as stored:
        while head := stored.read(_HEAD.size):
            try:
                offset, timestamp, key, value, headers = _HEAD.unpack(head)
                body = _optional(stored, key), _optional(stored, value)
                yield Record(offset, timestamp, *body, tuple(_read_header(stored) for _ in range(headers)))
            except (struct.error, EOFError, UnicodeDecodeError):
                raise CorruptionError("the records are cut off or no records", where=file.name) from None


def _read_header(stored: IO[bytes]) -> tuple[str, bytes | None]:
    name, value = _HEADER.unpack(stored.read(_HEADER.size))
    return _exactly(stored, name).decode(), _optional(stored, value)


def _optional(stored: IO[bytes], size: int) -> bytes | None:
    return None if size < 0 else _exactly(stored, size)


def _exactly(stored: IO[bytes], size: int) -> bytes:
    found = stored.read(size)
    if len(found) != size:
        raise EOFError
    return found
