"""The bounded pool that turns a stream of bytes into stored blocks: compress, encrypt, put, with a retry for each block.

Memory is constant: there are `workers + 1` buffers, and the reader waits for a free one; beside them each worker holds one block's copy
at most, compressed or encrypted. The store client repeats what may be
repeated within seconds; here a whole block is tried again for minutes, so that a store which restarts does not cost a backup.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ops_platform.backup.model import Block
from ops_platform.backup.repository import Repository
from ops_platform.backup.sealed import HEADER_PREFIX, Compression, seal
from ops_platform.clients.keys import DataKey
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import UnreachableError

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc


@functools.cache
def _give_back_large_blocks() -> bool:
    """Have glibc take what is larger than 1 MiB from the system and give it back at once. Returns whether it does (musl has no such setting).

    By itself it raises the limit to the size of what is freed, up to 32 MiB, and keeps the blocks that come later in a heap for
    each thread: with data that hardly compresses, 44 MiB more than are in use at any moment.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20))
    except (AttributeError, OSError, TypeError):
        return False


@dataclass
class _Writing:
    """The archive whose bytes are arriving."""

    number: int
    raw: int
    blocks: list[Future[Block]]


class BlockWriter:
    """Cuts each archive into blocks whatever its files' borders. Use as a context manager; leaving it by an error stops the pool."""

    def __init__(
        self,
        repository: Repository,
        backup_id: str,
        data_key: DataKey,
        *,
        block_size: int,
        workers: int,
        compression: Compression,
        level: int,
        retries: int,
        clock: Clock = SYSTEM_CLOCK,
        stored: Callable[[int], None] = lambda size: None,
    ) -> None:
        _give_back_large_blocks()
        self._repository = repository
        self._backup_id = backup_id
        self._key = data_key
        self._size = block_size
        self._compression: Compression = compression
        self._level = level
        self._retries = retries
        self._clock = clock
        self._stored = stored
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="block")
        self._free: queue.Queue[bytearray] = queue.Queue()
        for _ in range(workers + 1):
            self._free.put(bytearray(block_size + HEADER_PREFIX))
        self._buffer: bytearray | None = None
        self._filled = 0
        self._archive: _Writing | None = None
        self._left = False
        self.etags: dict[str, str] = {}  # what the store confirmed, by key

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def begin(self, archive: int) -> None:
        """A new archive begins with a block of its own."""
        self._archive = _Writing(archive, 0, [])

    def write(self, data: memoryview) -> None:
        while data:
            if self._buffer is None:
                self._buffer, self._filled = self._take(), 0
            piece = data[: self._size - self._filled]
            self._buffer[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            data = data[len(piece) :]
            if self._filled == self._size:
                self._send()

    def end(self) -> tuple[int, list[Block]]:
        """Wait until the archive is stored whole. Returns its raw bytes and its blocks. Raises what a block raised."""
        if self._filled:
            self._send()
        archive = self._current()
        return archive.raw, [future.result() for future in archive.blocks]

    def _current(self) -> _Writing:
        if self._archive is None:
            raise RuntimeError("begin comes before write")
        return self._archive

    def _take(self) -> bytearray:
        """A free buffer; while waiting for one, a block that failed is noticed."""
        while True:
            for future in self._current().blocks[-8:]:
                if future.done():
                    future.result()
            try:
                return self._free.get(timeout=1)
            except queue.Empty:
                continue

    def _send(self) -> None:
        archive, buffer, size = self._current(), self._buffer, self._filled
        if buffer is None:
            return
        number = len(archive.blocks)
        archive.raw += size
        archive.blocks.append(self._pool.submit(self._store, archive.number, number, buffer, size))
        self._buffer, self._filled = None, 0

    def _store(self, archive: int, number: int, buffer: bytearray, size: int) -> Block:
        key = self._repository.block_key(self._backup_id, archive, number)
        sealed = seal(
            memoryview(buffer)[:size],
            place=key,
            data_key=self._key,
            compression=self._compression,
            level=self._level,
            into=buffer,
        )
        there = isinstance(sealed, memoryview)  # in the buffer, which is free when it is stored
        if not there:
            self._free.put(buffer)
        self._put(key, sealed)
        digest = hashlib.sha256(sealed).hexdigest()
        if there:
            self._free.put(buffer)
        self._stored(len(sealed))
        return Block(key=key, raw=size, stored=len(sealed), sha256=digest)

    def _put(self, key: str, sealed: bytearray | memoryview) -> None:
        for attempt in range(self._retries + 1):
            try:
                self.etags[key] = self._repository.store.put(key, sealed, retain=True).etag
                return
            except UnreachableError:
                if attempt == self._retries or self._left:  # nobody waits for it any more
                    raise
                self._clock.sleep(min(30.0, 2.0**attempt))
