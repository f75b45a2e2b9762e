"""When the newest transaction in a WAL segment ended: how far an archive of whole segments can be recovered by time.

Reads what `access/xlogrecord.h` and `access/xlog_internal.h` define, the same from PostgreSQL 14 to 18: pages with headers, and
records that run across them. Only the record's frame and the first field of commits and aborts are looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

_PAGE = struct.Struct("<HHIQI")  # magic, info, timeline, address, rest of a record that began on an earlier page
_SHORT, _LONG = 24, 40  # sizes of a page's header; the first page of a segment has the long one
_SIZES = struct.Struct("<QII")  # system identifier, segment size, page size: the long header's addition
_RECORD = struct.Struct("<IIQBBxxI")  # total length, transaction, previous record, info, resource manager, CRC
_TRANSACTION = 1  # RM_XACT_ID
_ENDS = {0x00, 0x20, 0x30, 0x40}  # commit, abort, and both of a prepared transaction
_SHORT_DATA, _LONG_DATA, _ORIGIN, _TOP_TRANSACTION = 255, 254, 253, 252
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


def newest_end(segment: bytes) -> datetime | None:
    """The newest commit or abort among the records that lie whole in this segment; None where there is none.

    Stops at the first bytes that are no continuation of what came before, so that what an earlier use of the file left is not read.
    """
    newest: int | None = None
    for info, manager, body in _records(segment):
        if manager == _TRANSACTION and info & 0x70 in _ENDS:
            at = _ended_at(body)
            newest = at if newest is None or (at is not None and at > newest) else newest
    return None if newest is None else _EPOCH + timedelta(microseconds=newest)


def segment_size(segment: bytes) -> int | None:
    """As the segment's own first page says it; None for bytes that are no WAL of this machine's byte order."""
    if len(segment) < _LONG or _PAGE.unpack_from(segment)[0] >> 8 != 0xD1:
        return None
    return _SIZES.unpack_from(segment, _SHORT)[1]


def _records(segment: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Info, resource manager, and what follows the record's header."""
    if segment_size(segment) is None:
        return
    _, _, _, start, rest = _PAGE.unpack_from(segment)
    page = _SIZES.unpack_from(segment, _SHORT)[2]
    stream = _without_headers(segment, start, page)
    at, previous = _aligned(rest), None
    while at + _RECORD.size <= len(stream):
        length, _, before, info, manager, _ = _RECORD.unpack_from(stream, at)
        if length < _RECORD.size or at + length > len(stream) or (previous is not None and before != previous):
            return
        yield info, manager, stream[at + _RECORD.size : at + length]
        previous = start + _place(at, page)
        at += _aligned(length)


def _without_headers(segment: bytes, start: int, page: int) -> bytes:
    """The records' bytes alone, page behind page, as far as each page says that it belongs here."""
    parts = [segment[_LONG:page]]
    for begin in range(page, len(segment) - page + 1, page):
        magic, _, _, address, _ = _PAGE.unpack_from(segment, begin)
        if magic >> 8 != 0xD1 or address != start + begin:
            break
        parts.append(segment[begin + _SHORT : begin + page])
    return b"".join(parts)


def _place(at: int, page: int) -> int:
    """Where in the segment the byte stands that is number `at` without the headers."""
    if at < page - _LONG:
        return at + _LONG
    number, inside = divmod(at - (page - _LONG), page - _SHORT)
    return (number + 1) * page + _SHORT + inside


def _aligned(length: int) -> int:
    return (length + 7) & ~7


def _ended_at(body: bytes) -> int | None:
    """The first field of a commit's or an abort's data: microseconds since 2000. Such records name no pages."""
    at = 0
    while at < len(body):
        kind = body[at]
        if kind in (_SHORT_DATA, _LONG_DATA):
            at += 2 if kind == _SHORT_DATA else 5
            return struct.unpack_from("<q", body, at)[0] if at + 8 <= len(body) else None
        if kind not in (_ORIGIN, _TOP_TRANSACTION):
            return None
        at += 3 if kind == _ORIGIN else 5
    return None
