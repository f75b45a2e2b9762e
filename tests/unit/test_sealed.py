"""The sealed format: what goes in comes out, and nothing else opens."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops_platform.backup.sealed import HEADER_PREFIX, MAGIC, Compression, read_header, seal, unseal
from ops_platform.clients.keys import DataKey
from ops_platform.errors import CorruptionError, UnreachableError

KEY = DataKey(plain=bytes(range(32)), wrapped="vault:v1:wrapped")
PLACE = "app-db/wal/7/00000001/000000010000000000000001"

compressions = st.sampled_from(["zstd", "lz4", "none"])
# Random bytes that no compression shortens, and bytes that every one does.
contents = st.binary(max_size=4000) | st.builds(
    lambda piece, times: piece * times, st.binary(max_size=9), st.integers(0, 999)
)


def unwrap(wrapped: str) -> bytes:
    assert wrapped == KEY.wrapped
    return KEY.plain


def sealed(plain: bytes = b"pages of WAL " * 40, *, place: str = PLACE, compression: Compression = "zstd") -> bytes:
    return bytes(seal(plain, place=place, data_key=KEY, compression=compression, meta={"end_lsn": "0/2000000"}))


def header_of(stored: bytes) -> dict[str, Any]:
    return json.loads(stored[12 : 12 + int.from_bytes(stored[8:12], "big")])


def with_header(fields: object, rest: bytes = bytes(64)) -> bytes:
    text = json.dumps(fields).encode()
    return MAGIC + struct.pack(">I", len(text)) + text + rest


@given(
    contents,
    compressions,
    st.dictionaries(st.text(max_size=9), st.integers() | st.text(max_size=9) | st.none(), max_size=4),
)
def test_what_goes_in_comes_out(plain: bytes, compression: Compression, meta: dict[str, Any]) -> None:
    stored = seal(plain, place=PLACE, data_key=KEY, compression=compression, meta=meta)
    opened = unseal(stored, place=PLACE, unwrap=unwrap)
    assert opened.plain == plain
    assert (opened.header.raw, opened.header.comp, opened.header.meta) == (len(plain), compression, meta)
    assert read_header(stored[:HEADER_PREFIX], place=PLACE) == opened.header


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("compression", ["zstd", "lz4", "none"])
def test_every_buffer_can_be_sealed(kind: Any, compression: Compression) -> None:
    assert (
        unseal(
            seal(kind(b"abc" * 9), place=PLACE, data_key=KEY, compression=compression), place=PLACE, unwrap=unwrap
        ).plain
        == b"abc" * 9
    )


@given(st.data(), contents, compressions)
def test_one_flipped_bit_anywhere_is_noticed(data: st.DataObject, plain: bytes, compression: Compression) -> None:
    stored = bytearray(sealed(plain, compression=compression))
    bit = data.draw(st.integers(0, len(stored) * 8 - 1))
    stored[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptionError) as caught:
        unseal(bytes(stored), place=PLACE, unwrap=lambda _: KEY.plain)
    assert caught.value.where == PLACE


def test_every_single_byte_is_guarded() -> None:
    stored = sealed(b"short")
    for at in range(len(stored)):
        changed = stored[:at] + bytes([stored[at] ^ 0x20]) + stored[at + 1 :]
        with pytest.raises(CorruptionError):
            unseal(changed, place=PLACE, unwrap=lambda _: KEY.plain)


@given(st.data(), contents, compressions)
def test_a_truncated_or_longer_object_is_noticed(data: st.DataObject, plain: bytes, compression: Compression) -> None:
    stored = sealed(plain, compression=compression)
    cut = data.draw(st.integers(0, len(stored) - 1))
    for changed in (stored[:cut], stored + data.draw(st.binary(min_size=1, max_size=40)), stored + stored):
        with pytest.raises(CorruptionError):
            unseal(changed, place=PLACE, unwrap=unwrap)


def test_two_swapped_objects_do_not_open() -> None:
    places = ["app-db/backup/b/data/000/000000", "app-db/backup/b/data/000/000001"]
    first, second = (sealed(place=place) for place in places)
    for stored, place, other in ((second, places[0], places[1]), (first, places[1], places[0])):
        with pytest.raises(CorruptionError, match=f"belongs at {other}"):
            unseal(stored, place=place, unwrap=unwrap)


def test_a_header_that_claims_the_other_place_does_not_open_either() -> None:
    stored, other = sealed(), PLACE[:-1] + "2"
    moved = stored.replace(PLACE.encode(), other.encode())
    assert read_header(moved, place=other).place == other
    with pytest.raises(CorruptionError, match="authentication failed"):
        unseal(moved, place=other, unwrap=unwrap)


def test_a_header_with_other_notes_does_not_open() -> None:
    changed = sealed().replace(b"0/2000000", b"0/3000000")
    with pytest.raises(CorruptionError, match="authentication failed"):
        unseal(changed, place=PLACE, unwrap=unwrap)


def test_another_key_does_not_open_it() -> None:
    with pytest.raises(CorruptionError, match="authentication failed"):
        unseal(sealed(), place=PLACE, unwrap=lambda _: bytes(32))


def test_a_key_service_that_is_away_is_not_taken_for_damage() -> None:
    def away(_wrapped: str) -> bytes:
        raise UnreachableError("Vault is sealed")

    with pytest.raises(UnreachableError, match="sealed"):
        unseal(sealed(), place=PLACE, unwrap=away)


def test_neither_key_nor_content_stands_in_the_stored_bytes() -> None:
    secret = b"4111 1111 1111 1111 in clear"
    for compression in ("zstd", "lz4", "none"):
        stored = sealed(secret, compression=compression)
        assert secret not in stored
        assert KEY.plain not in stored
    assert sealed(secret) != sealed(secret), "a nonce was used twice"


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_refused_as_damage_and_by_nothing_else(noise: bytes, begins_well: bool) -> None:
    with pytest.raises(CorruptionError):
        read_header(MAGIC + noise if begins_well else noise, place=PLACE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from(["v", "place", "comp", "raw", "key", "nonce", "meta"]), json_values, max_size=7)
    | json_values
)
def test_a_header_of_any_json_is_refused_as_damage(fields: Any) -> None:
    whole = header_of(sealed()) | fields if isinstance(fields, dict) else fields
    stored = with_header(whole)
    with pytest.raises(CorruptionError):
        unseal(stored, place=PLACE, unwrap=lambda _: KEY.plain)


@pytest.mark.parametrize(
    "fields",
    [
        {"v": 2},
        {"comp": "brotli"},
        {"raw": -1},
        {"raw": (1 << 30) + 1},
        {"raw": 1.5},
        {"raw": "5"},
        {"nonce": "AAAA"},
        {"nonce": "not base64!"},
        {"nonce": 7},
        {"meta": []},
        {"key": None},
        {"place": ["app-db"]},
    ],
)
def test_a_header_with_a_value_of_another_kind_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(CorruptionError):
        read_header(with_header(header_of(sealed()) | fields), place=PLACE)


@pytest.mark.parametrize(
    "text", [b"[" * 65000, b'{"v":' * 13000, b"9" * 65000, b"\xff\xfe", b"", b"null", b'"v"', b'{"v":1e999}']
)
def test_json_that_would_choke_the_reader_is_refused(text: bytes) -> None:
    with pytest.raises(CorruptionError):
        read_header(MAGIC + struct.pack(">I", len(text)) + text, place=PLACE)


def test_a_header_that_claims_to_be_huge_is_not_waited_for() -> None:
    with pytest.raises(CorruptionError, match="cut off"):
        read_header(MAGIC + b"\xff\xff\xff\xff" + bytes(100), place=PLACE)


def test_what_could_not_be_read_again_is_never_written() -> None:
    with pytest.raises(ValueError, match="64 KiB"):
        seal(b"", place=PLACE, data_key=KEY, meta={"note": "x" * (1 << 16)})

    class Huge(bytes):
        def __len__(self) -> int:
            return (1 << 30) + 1

    with pytest.raises(ValueError, match="1 GiB"):
        seal(Huge(), place=PLACE, data_key=KEY)


def test_the_longest_key_of_s3_still_fits_into_the_first_read() -> None:
    place = "a/" * 512
    assert read_header(seal(b"x", place=place, data_key=KEY)[:HEADER_PREFIX], place=place).place == place


def test_more_than_the_header_says_never_comes_out() -> None:
    """The one who holds the key and lies about the size gains nothing, either: the check does not rest on the tag alone."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    from ops_platform.backup.sealed import compress

    for compression in ("zstd", "lz4", "none"):
        fields = header_of(sealed(compression=compression)) | {"raw": 10}
        head = with_header(fields, b"")
        import base64

        nonce = base64.b64decode(fields["nonce"])
        for plain in (b"x" * 1000, b"x" * 9):
            body = AESGCM(KEY.plain).encrypt(nonce, compress(plain, compression, 1), head)
            with pytest.raises(CorruptionError):
                unseal(head + body, place=PLACE, unwrap=unwrap)


@pytest.mark.parametrize(("compression", "reused"), [("zstd", True), ("lz4", True), ("none", False)])
def test_a_block_that_hardly_compresses_is_sealed_in_its_own_buffer(compression: Any, reused: bool) -> None:
    """Not where it is the very bytes that are encrypted, and not where there is no room."""
    content = random.Random(5).randbytes(1 << 16)
    for room in (HEADER_PREFIX, 0):
        buffer = bytearray(content + bytes(room))
        stored = seal(memoryview(buffer)[: 1 << 16], place=PLACE, data_key=KEY, compression=compression, into=buffer)
        assert isinstance(stored, memoryview) is (reused and room > 0)
        assert unseal(bytes(stored), place=PLACE, unwrap=unwrap).plain == content
    small = seal(bytes(1 << 16), place=PLACE, data_key=KEY, compression="zstd", into=bytearray(1 << 17))
    assert isinstance(small, bytearray), "the reader gets its buffer back at once"
