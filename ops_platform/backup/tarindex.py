"""Notes each file's place in a tar stream while the stream passes by: what makes a restore parallel and a single file cheap.

Reads the subset of POSIX ustar that PostgreSQL's BASE_BACKUP writes (src/port/tar.c): 512-byte headers, names of at most 255
bytes, sizes above 8 GiB in GNU's base-256, no pax records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ops_platform.errors import CorruptionError

BLOCK = 512
Kind = Literal["file", "dir", "link"]
_KINDS: dict[bytes, Kind] = {b"0": "file", b"\0": "file", b"5": "dir", b"2": "link"}


@dataclass(frozen=True)
class Entry:
    """`offset`: where the content begins in the archive's raw bytes; `link`: target of a symbolic link."""

    archive: int
    path: str
    kind: Kind
    offset: int
    size: int
    mode: int
    mtime: int
    link: str = ""


class TarIndexer:
    """Feed it the stream in pieces of any size; it calls `found` for each entry. Raises CorruptionError for what is no tar."""

    def __init__(self, archive: int, found: Callable[[Entry], None]) -> None:
        self._archive = archive
        self._found = found
        self._position = 0  # of the next byte that is fed
        self._next_header = 0
        self._header = bytearray()

    def feed(self, data: memoryview | bytes) -> None:
        view, end = memoryview(data), self._position + len(data)
        while self._next_header < end:
            begin = max(self._next_header, self._position)  # a header that was begun goes on where the last piece ended
            take = view[begin - self._position : begin - self._position + BLOCK - len(self._header)]
            self._header += take
            if len(self._header) < BLOCK:
                break
            self._read(bytes(self._header))
            self._header.clear()
        self._position = end

    def finish(self) -> None:
        """Raises CorruptionError where the stream ended inside an entry."""
        if self._header or self._position < self._next_header:
            raise CorruptionError(
                f"the archive ends at {self._position} inside an entry", where=f"archive {self._archive}"
            )

    def _read(self, header: bytes) -> None:
        at, self._next_header = self._next_header, self._next_header + BLOCK
        if not any(header):  # the two empty records at the end; later ones change nothing
            return
        try:
            entry = _parse(header, self._archive, at + BLOCK)
        except (ValueError, KeyError) as error:
            raise CorruptionError(f"no tar header at byte {at}: {error}", where=f"archive {self._archive}") from error
        if entry.kind == "file":
            self._next_header += -(-entry.size // BLOCK) * BLOCK
        self._found(entry)


def _parse(header: bytes, archive: int, offset: int) -> Entry:
    if _number(header[148:156]) != sum(header[:148]) + 8 * 32 + sum(header[156:]):
        raise ValueError("its checksum does not fit")
    prefix, name = (_text(field) for field in (header[345:500], header[:100]))
    path = f"{prefix}/{name}" if prefix else name
    kind = _KINDS[header[156:157]]
    return Entry(
        archive=archive,
        path=path.rstrip("/"),
        kind=kind,
        offset=offset,
        size=_number(header[124:136]) if kind == "file" else 0,
        mode=_number(header[100:108]) & 0o7777,
        mtime=_number(header[136:148]),
        link=_text(header[157:257]) if kind == "link" else "",
    )


def _text(field: bytes) -> str:
    # Names on disk are bytes; surrogateescape brings back whatever they were.
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """Octal digits with padding around them, or GNU's base-256 where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.partition(b"\0")[0].strip(b" ")
    if text.strip(b"01234567"):  # int() would take signs and underscores, too
        raise ValueError(f"{text!r} is no octal number")
    return int(text or b"0", 8)
