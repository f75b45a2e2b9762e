"""The tar index: agrees with tarfile on every archive, however the stream is cut."""

from __future__ import annotations

import io
import tarfile
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops_platform.backup.tarindex import Entry, TarIndexer
from ops_platform.errors import CorruptionError

names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..")
)
paths = st.lists(names, min_size=1, max_size=3).map("/".join).filter(lambda path: len(path.encode()) <= 99)


@st.composite
def members(draw: st.DrawFn) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(draw(paths))
    info.mode = draw(st.integers(0, 0o7777))
    info.mtime = draw(st.integers(0, 2**33 - 1))
    info.type = draw(st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE]))
    content = b""
    if info.isreg():
        content = draw(st.binary(max_size=600) | st.integers(0, 5).map(lambda n: b"p" * (512 * n)))
    if info.issym():
        info.linkname = draw(paths)
    info.size = len(content)
    return info, content


archives = st.lists(members(), max_size=6)


def packed(archive: list[tuple[tarfile.TarInfo, bytes]], form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for info, content in archive:
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def indexed(stream: bytes, cuts: list[int]) -> list[Entry]:
    found: list[Entry] = []
    indexer = TarIndexer(3, found.append)
    borders = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    for begin, end in pairwise(borders):
        indexer.feed(memoryview(stream)[begin:end])
    indexer.finish()
    return found


def by_tarfile(stream: bytes) -> list[Entry]:
    kinds: dict[bytes, Any] = {tarfile.DIRTYPE: "dir", tarfile.SYMTYPE: "link"}
    with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
        return [
            Entry(
                3, m.name, kinds.get(m.type, "file"), m.offset_data, m.size, m.mode, int(m.mtime), m.linkname if m.issym() else ""
            )
            for m in tar
        ]  # fmt: skip


@given(archives, st.lists(st.integers(0, 10**6), max_size=12))
def test_the_index_agrees_with_tarfile_wherever_the_stream_is_cut(
    archive: list[tuple[tarfile.TarInfo, bytes]], cuts: list[int]
) -> None:
    stream = packed(archive, tarfile.GNU_FORMAT)
    assert indexed(stream, cuts) == by_tarfile(stream)


@given(archives)
def test_the_index_gives_back_every_files_bytes(archive: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    stream = packed(archive, tarfile.USTAR_FORMAT)
    contents = [
        stream[entry.offset : entry.offset + entry.size] for entry in indexed(stream, list(range(0, 9999, 511)))
    ]
    assert contents == [content for _, content in archive]


def test_a_stream_that_comes_byte_by_byte_is_read_the_same() -> None:
    info = tarfile.TarInfo("base/1/1259")
    info.size = 700
    stream = packed([(info, b"x" * 700)], tarfile.USTAR_FORMAT)
    assert indexed(stream, list(range(len(stream)))) == by_tarfile(stream)


def test_the_two_empty_records_at_the_end_may_be_missing() -> None:
    # As PostgreSQL 14 sends it.
    info = tarfile.TarInfo("PG_VERSION")
    info.size = 3
    stream = packed([(info, b"18\n")], tarfile.USTAR_FORMAT)[:1024]
    assert [entry.path for entry in indexed(stream, [])] == ["PG_VERSION"]


def test_a_name_longer_than_a_hundred_bytes_is_put_together_from_its_prefix() -> None:
    name = "pg_tblspc/16385/PG_18_202506291/" + "d" * 60 + "/" + "f" * 60
    assert [entry.path for entry in indexed(packed([(tarfile.TarInfo(name), b"")], tarfile.USTAR_FORMAT), [])] == [name]


def test_a_name_that_is_no_utf8_comes_back_as_its_bytes() -> None:
    info = tarfile.TarInfo("caf\udce9")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT, errors="surrogateescape") as tar:
        tar.addfile(info)
    assert indexed(out.getvalue(), [])[0].path.encode("utf-8", "surrogateescape") == b"caf\xe9"


def with_checksum(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def header(name: bytes = b"base/1/1259", size: bytes = b"00000000010\0", kind: bytes = b"0") -> bytes:
    fields = name.ljust(100, b"\0") + b"0000600\0" * 3 + size + b"00000000000\0" + b" " * 8 + kind
    return with_checksum(fields.ljust(512, b"\0"))


def test_a_size_beyond_eight_gigabytes_is_read_in_base_256() -> None:
    found: list[Entry] = []
    indexer = TarIndexer(0, found.append)
    size = 40 << 30
    indexer.feed(header(size=b"\x80" + size.to_bytes(11, "big")))
    assert found[0].size == size
    with pytest.raises(CorruptionError, match="inside an entry"):
        indexer.finish()


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (b"<html>" * 200, "checksum|octal"),
        (header()[:300] + b"x" + header()[301:] + bytes(512), "checksum"),
        (header(kind=b"x") + bytes(512), "no tar header at byte 0"),  # a pax record: PostgreSQL writes none
        (header(size=b"-0000000010\0"), "octal"),  # it would lead back to this very header
        (header(size=b"0000000_010\0"), "octal"),
        (header(size=b"0000000008\0\0"), "octal"),
        (header() + bytes(512) + header(kind=b"7"), "no tar header at byte 1024"),
    ],
)
def test_what_is_no_tar_is_refused_with_its_place(stream: bytes, said: str) -> None:
    with pytest.raises(CorruptionError, match=said) as caught:
        indexed(stream, [100, 600])
    assert caught.value.where == "archive 3"


@given(st.binary(min_size=512, max_size=2000), st.lists(st.integers(0, 2000), max_size=4))
def test_any_bytes_are_read_or_refused(noise: bytes, cuts: list[int]) -> None:
    if any(noise[:512]):
        with pytest.raises(CorruptionError):
            indexed(noise, cuts)


@given(archives.filter(bool), st.data())
def test_a_stream_that_ends_inside_an_entry_is_noticed(
    archive: list[tuple[tarfile.TarInfo, bytes]], data: st.DataObject
) -> None:
    stream = packed(archive, tarfile.USTAR_FORMAT)
    whole = {0}
    for entry in by_tarfile(stream):
        whole.add(entry.offset + -(-entry.size // 512) * 512)
    end = data.draw(st.integers(1, max(whole)).filter(lambda at: at not in whole))
    with pytest.raises(CorruptionError, match="inside an entry"):
        indexed(stream[:end], [])
