"""The one container for every stored byte: compressed, encrypted, bound to its place.

Layout: `OPSSEAL1`, a big-endian u32 with the header's length, the header as canonical JSON, AES-256-GCM ciphertext and tag.
Everything before the ciphertext is the additional authenticated data, so that neither a moved object nor a changed header opens.
The format is part of docs/reference/repository-format.md.
"""

from __future__ import annotations

import base64
import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from ops_platform.clients.keys import DataKey
from ops_platform.errors import CorruptionError

MAGIC = b"OPSSEAL1"
_LENGTH = struct.Struct(">I")
_MAX_HEADER = 1 << 16
# A ranged read of this many bytes holds every header that `seal` writes.
HEADER_PREFIX = 4096
_MAX_RAW = 1 << 30
_NONCE, _TAG = 12, 16

Compression = Literal["zstd", "lz4", "none"]
Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Header:
    """`place`: the object's key; `raw`: bytes after decompression; `key`: the wrapped data key; `meta`: what the writer noted."""

    place: str
    comp: Compression
    raw: int
    key: str
    nonce: bytes
    meta: Mapping[str, Any]
    size: int


@dataclass(frozen=True)
class Sealed:
    plain: bytes
    header: Header


def seal(
    plain: Bytes,
    *,
    place: str,
    data_key: DataKey,
    compression: Compression = "zstd",
    level: int = 1,
    meta: Mapping[str, Any] | None = None,
    into: bytearray | None = None,
) -> bytearray | memoryview:
    """The stored form of `plain` (any length up to 1 GiB) for the object key `place`.

    `into`: a buffer for it, such as the one that `plain` is a view of, which is not needed any more when it is compressed. It is used, and
    a view of it returned, where that saves a copy worth speaking of: where it has room, and hardly anything was won by compressing.
    """
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    if len(plain) > _MAX_RAW:
        raise ValueError("a sealed object holds at most 1 GiB")
    nonce = os.urandom(_NONCE)  # random: far below 2**32 objects are sealed with one data key
    fields = {
        "v": 1,
        "place": place,
        "comp": compression,
        "raw": len(plain),
        "key": data_key.wrapped,
        "nonce": base64.b64encode(nonce).decode(),
        "meta": dict(meta or {}),
    }
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > _MAX_HEADER:
        raise ValueError("the header of a sealed object is limited to 64 KiB")
    head = MAGIC + _LENGTH.pack(len(text)) + text
    packed = compress(plain, compression, level)
    size = len(head) + len(packed) + _TAG
    reused = into is not None and packed is not plain and len(packed) > len(plain) / 2 and size <= len(into)
    # Encrypted into its place: each copy of a block would be another 16 MiB for each worker of the pool.
    stored = memoryview(into)[:size] if reused and into is not None else bytearray(size)
    stored[: len(head)] = head
    AESGCM(data_key.plain).encrypt_into(nonce, packed, head, memoryview(stored)[len(head) :])
    return stored


def read_header(stored: bytes | bytearray, *, place: str) -> Header:
    """The header of a sealed object from its first bytes. Not authenticated until the whole is unsealed."""
    try:
        if stored[:8] != MAGIC:
            raise ValueError("it does not begin as a sealed object")
        length = int.from_bytes(stored[8:12], "big")
        if length > _MAX_HEADER or len(stored) < 12 + length:
            raise ValueError("its header is cut off")
        header = _header(json.loads(stored[12 : 12 + length]), 12 + length)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"not a readable sealed object: {error}", where=place) from error
    if header.place != place:
        raise CorruptionError(f"this object belongs at {header.place}: it was moved or swapped", where=place)
    return header


def _header(fields: Any, size: int) -> Header:
    """Nothing of it is authenticated yet, so every type is looked at. Raises ValueError."""
    match fields:
        case {
            "v": 1,
            "place": str(place),
            "comp": "zstd" | "lz4" | "none" as comp,
            "raw": int(raw),
            "key": str(key),
            "nonce": str(text),
            "meta": dict(meta),
        } if 0 <= raw <= _MAX_RAW:
            nonce = base64.b64decode(text, validate=True)
            if len(nonce) != _NONCE:
                raise ValueError("its nonce has the wrong length")
            return Header(place, comp, raw, key, nonce, cast("dict[str, Any]", meta), size)
        case _:
            raise ValueError("its header has unknown values")


def unseal(stored: bytes | bytearray, *, place: str, unwrap: Callable[[str], bytes]) -> Sealed:
    """Open what `seal` wrote. Raises CorruptionError naming the place for anything that is not exactly what was written."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    header = read_header(stored, place=place)
    view = memoryview(stored)
    try:
        data_key = unwrap(header.key)
    except CorruptionError as error:
        raise CorruptionError(f"its data key does not open: {error.what}", where=place) from error
    try:
        packed = AESGCM(data_key).decrypt(header.nonce, view[header.size :], view[: header.size])
        plain = decompress(packed, header.comp, header.raw)
    except InvalidTag as error:
        raise CorruptionError(
            "the bytes were changed after they were written (authentication failed)", where=place
        ) from error
    except ValueError as error:
        raise CorruptionError(str(error), where=place) from error
    if len(plain) != header.raw:
        raise CorruptionError(f"{len(plain)} bytes came out where {header.raw} went in", where=place)
    return Sealed(plain, header)


def compress(plain: Bytes, compression: Compression, level: int) -> Bytes:
    """`plain` itself where nothing is to be compressed."""
    if compression == "zstd":
        import zstandard

        return zstandard.ZstdCompressor(level=level).compress(plain)
    if compression == "lz4":
        import lz4.frame

        return lz4.frame.compress(plain, compression_level=level, content_checksum=False)
    return plain


def decompress(packed: bytes, compression: Compression, raw: int) -> bytes:
    """Raises ValueError; never makes more than `raw` bytes."""
    if compression == "zstd":
        import zstandard

        try:
            if zstandard.frame_content_size(packed) != raw:  # believed by decompress, whatever the limit
                raise ValueError(f"zstd: its frame holds other than {raw} bytes")
            return zstandard.ZstdDecompressor().decompress(packed, max_output_size=raw)
        except zstandard.ZstdError as error:
            raise ValueError(f"zstd: {error}") from error
    if compression == "lz4":
        import lz4.frame

        reader = lz4.frame.LZ4FrameDecompressor()
        try:
            plain = reader.decompress(packed, max_length=raw)
        except RuntimeError as error:
            raise ValueError(f"lz4: {error}") from error
        if not reader.eof:
            raise ValueError(f"lz4: its frame does not end after {raw} bytes")
        return plain
    return packed
