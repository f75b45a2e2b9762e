"""The pool that turns a stream into blocks: nothing lost, nothing in the wrong place, bounded memory, failures noticed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops_platform.backup.blocks import BlockWriter
from ops_platform.backup.model import Block
from ops_platform.backup.repository import Repository
from ops_platform.backup.sealed import Compression, unseal
from ops_platform.clients.keys import DataKey
from ops_platform.clients.objectstore import ObjectInfo
from ops_platform.errors import AccessDeniedError, UnreachableError

KEY = DataKey(plain=bytes(32), wrapped="k")
BACKUP = "20260101T000000Z-F-00000000"


class Shelf:
    """Where the blocks arrive, with a fault in front: no store, only what the pool needs to be watched."""

    def __init__(self, fault: Callable[[str], None] = lambda key: None) -> None:
        self.held: dict[str, bytes] = {}
        self.tries: list[str] = []
        self.retained: set[str] = set()
        self._fault = fault

    def put(self, key: str, body: bytes, *, retain: bool = False) -> ObjectInfo:
        self.tries.append(key)
        self._fault(key)
        assert key not in self.held, "a block was put twice"
        self.held[key] = bytes(body)
        if retain:
            self.retained.add(key)
        return ObjectInfo(key, len(body), datetime(2026, 1, 1, tzinfo=UTC), f"etag of {key}")


class NoTime:
    """A clock on which waiting costs nothing and is noted."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)

    def monotonic(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)


def writer(shelf: Shelf, *, size: int = 512, workers: int = 3, retries: int = 2, **more: Any) -> BlockWriter:
    options: dict[str, Any] = {"compression": "zstd", "level": 1, "clock": NoTime(), **more}
    repository = Repository(shelf, None, "app-db")  # type: ignore[arg-type]
    return BlockWriter(repository, BACKUP, KEY, block_size=size, workers=workers, retries=retries, **options)


def opened(shelf: Shelf, blocks: list[Block]) -> bytes:
    return b"".join(
        unseal(shelf.held[block.key], place=block.key, unwrap=lambda _: KEY.plain).plain for block in blocks
    )


pieces = st.lists(st.binary(max_size=1500), max_size=6)


@settings(max_examples=60)
@given(st.lists(pieces, min_size=1, max_size=3), st.sampled_from([1, 7, 512]), st.sampled_from(["zstd", "lz4", "none"]))
def test_archives_come_back_from_their_blocks(archives: list[list[bytes]], size: int, compression: Compression) -> None:
    shelf, told = Shelf(), list[int]()
    with writer(shelf, size=size, compression=compression, stored=told.append) as out:
        for number, stream in enumerate(archives):
            out.begin(number)
            for piece in stream:
                out.write(memoryview(piece))
            raw, blocks = out.end()
            whole = b"".join(stream)
            assert raw == len(whole) == sum(block.raw for block in blocks)
            assert opened(shelf, blocks) == whole
            assert [block.key[-10:] for block in blocks] == [f"{number:03d}/{n:06d}" for n in range(len(blocks))]
            assert all(block.raw == size for block in blocks[:-1]), (
                "blocks are cut at one size, or offsets would not fit"
            )
            for block in blocks:
                stored = shelf.held[block.key]
                assert (block.stored, block.sha256) == (len(stored), hashlib.sha256(stored).hexdigest())
    assert sum(told) == sum(map(len, shelf.held.values()))
    assert shelf.retained == set(shelf.held), "a block without the store's Object Lock"


def test_a_block_that_fails_for_a_moment_is_put_again() -> None:
    left = {"000001": 2}

    def fault(key: str) -> None:
        if left.get(key[-6:], 0):
            left[key[-6:]] -= 1
            raise UnreachableError("503 SlowDown")

    shelf, clock, content = Shelf(fault), NoTime(), os.urandom(2000)
    with writer(shelf, clock=clock) as out:
        out.begin(0)
        out.write(memoryview(content))
        _, blocks = out.end()
    assert opened(shelf, blocks) == content
    assert [key[-6:] for key in shelf.tries].count("000001") == 3
    assert clock.waits == [1.0, 2.0]


@pytest.mark.parametrize("error", [UnreachableError("the store is away"), AccessDeniedError("403")])
def test_a_block_that_cannot_be_stored_fails_the_archive(error: Exception) -> None:
    def fault(key: str) -> None:
        if key.endswith("000002"):
            raise error

    def stream() -> None:
        out.write(memoryview(os.urandom(2000)))
        out.end()

    shelf = Shelf(fault)
    with writer(shelf) as out:
        out.begin(0)
        with pytest.raises(type(error)):
            stream()
    tries = [key[-6:] for key in shelf.tries].count("000002")
    assert tries == (3 if isinstance(error, UnreachableError) else 1), (
        "what trying again cannot mend is not tried again"
    )


def test_a_failure_stops_the_stream_long_before_its_end() -> None:
    def fault(_key: str) -> None:
        raise AccessDeniedError("403")

    def stream() -> None:
        for _ in range(10_000):
            out.write(memoryview(bytes(512)))

    with writer(Shelf(fault)) as out:
        out.begin(0)
        with pytest.raises(AccessDeniedError):
            stream()


def test_the_reader_waits_where_the_store_is_slow() -> None:
    """At most `workers + 1` blocks wait in memory: the rest stays with the server."""
    gate, written = threading.Event(), list[int]()
    shelf = Shelf(lambda _key: gate.wait(30) or None)

    def read() -> None:
        for number in range(20):
            out.write(memoryview(bytes(512)))
            written.append(number)

    with writer(shelf, workers=3) as out:
        out.begin(0)
        reader = threading.Thread(target=read)
        reader.start()
        # Three blocks hang in the store's hands; their buffers are free again once they are sealed.
        while len(shelf.tries) < 3 or len(written) < 7:
            assert reader.is_alive()
            reader.join(0.01)
        reader.join(0.2)
        assert len(written) == 7, "three being put, four waiting in the buffers"
        gate.set()
        reader.join(30)
        assert len(out.end()[1]) == 20


def test_leaving_by_an_error_does_not_go_on_trying() -> None:
    tried = threading.Event()

    def fault(_key: str) -> None:
        tried.set()
        raise UnreachableError("the store is away")

    class Waits(NoTime):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            left.wait(30)

    left, clock = threading.Event(), Waits()
    out = writer(Shelf(fault), workers=1, retries=1000, clock=clock)
    closing = threading.Thread(target=lambda: out.__exit__(None, None, None))
    out.begin(0)
    out.write(memoryview(bytes(1000)))
    assert tried.wait(30)
    closing.start()
    while not out._left:
        closing.join(0.01)
    left.set()
    closing.join(30)
    assert not closing.is_alive()
    assert len(clock.waits) <= 2


_LARGE_BLOCKS = """
import os
from tests.unit.test_blocks import Shelf, writer

def resident():
    status = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

with writer(Shelf(), size=512):
    noise, kept, before = os.urandom(16 << 20), [], resident()
    for _ in range(4):
        blocks = []
        for _ in range(8):
            blocks.append(bytearray(noise))
            kept.append(bytearray(100_000))  # what a process allocates meanwhile and goes on to use
        del blocks
    print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_a_block_that_is_done_with_is_given_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", _LARGE_BLOCKS], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 16, "large blocks stay in the heap, under what is allocated after them"
