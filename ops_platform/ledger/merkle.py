"""Merkle trees as in RFC 6962 section 2 and RFC 9162 section 2.1: hashing, proofs, and their verification. Pure functions.

A leaf is hashed with the prefix 0x00 and a node with 0x01, so that none can be taken for the other. The leaves of the ledger are
the 32 bytes of each entry's `sha256`, which covers its content: docs/reference/ledger.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Self

EMPTY_ROOT = hashlib.sha256(b"").digest()
_SIZE = 32


def leaf_hash(data: bytes) -> bytes:
    return hashlib.sha256(b"\0" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


class Frontier:
    """The right edge of a growing tree: the roots of its complete subtrees from left to right, 20 of them for a million leaves.

    It is all that is needed to append, and to know the root. Raises ValueError for a size that does not have that many peaks.
    """

    def __init__(self, size: int = 0, peaks: Iterable[bytes] = ()) -> None:
        self.size = size
        self.peaks = list(peaks)
        if size < 0 or len(self.peaks) != size.bit_count() or any(len(peak) != _SIZE for peak in self.peaks):
            raise ValueError(f"a tree of {size} leaves has {max(size, 0).bit_count()} peaks of {_SIZE} bytes")

    def append(self, data: bytes) -> None:
        """One more leaf. Written out instead of calling the functions above: a million of these are a verification."""
        sha256, peaks, carry = hashlib.sha256, self.peaks, self.size
        node = sha256(b"\0" + data).digest()
        while carry & 1:
            node = sha256(b"\1" + peaks.pop() + node).digest()
            carry >>= 1
        peaks.append(node)
        self.size += 1

    def root(self) -> bytes:
        if not self.peaks:
            return EMPTY_ROOT
        node = self.peaks[-1]
        for peak in self.peaks[-2::-1]:
            node = node_hash(peak, node)
        return node


class Tree:
    """A whole tree, for making proofs: 64 bytes for each leaf. Level k holds the nodes that cover 2^k leaves completely."""

    def __init__(self, levels: Sequence[bytes]) -> None:
        self._levels = levels

    @classmethod
    def of(cls, data: Iterable[bytes]) -> Self:
        sha256, leaves = hashlib.sha256, bytearray()
        for each in data:
            leaves += sha256(b"\0" + each).digest()
        levels = [bytes(leaves)]
        while len(levels[-1]) >= 2 * _SIZE:
            below, above = levels[-1], bytearray()
            for at in range(0, len(below) - 2 * _SIZE + 1, 2 * _SIZE):
                above += sha256(b"\1" + below[at : at + 2 * _SIZE]).digest()
            levels.append(bytes(above))
        return cls(levels)

    @property
    def size(self) -> int:
        return len(self._levels[0]) // _SIZE

    def root(self, size: int | None = None) -> bytes:
        """Of the first `size` leaves; of all by default."""
        count = self.size if size is None else self._within(size)
        return self._subtree(0, count) if count else EMPTY_ROOT

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """The audit path of leaf `index` (from 0) in the tree of the first `size` leaves: RFC 6962 section 2.1.1."""
        if not 0 <= index < self._within(size):
            raise ValueError(f"a tree of {size} leaves has no leaf {index}")
        path: list[bytes] = []
        low, high = 0, size
        while high - low > 1:
            middle = low + _split(high - low)
            if index < middle:
                path.append(self._subtree(middle, high))
                high = middle
            else:
                path.append(self._subtree(low, middle))
                low = middle
        return path[::-1]

    def consistency(self, first: int, second: int) -> list[bytes]:
        """That the tree of `first` leaves is the beginning of that of `second`: RFC 6962 section 2.1.2."""
        if not 0 < first <= self._within(second):
            raise ValueError(f"no proof leads from {first} to {second} leaves")
        path: list[bytes] = []
        low, high, known = 0, second, True  # known: whoever verifies has the root of this part already
        while first != high:
            middle = low + _split(high - low)
            if first <= middle:
                path.append(self._subtree(middle, high))
                high = middle
            else:
                path.append(self._subtree(low, middle))
                low, known = middle, False
        if not known:
            path.append(self._subtree(low, high))
        return path[::-1]

    def _within(self, size: int) -> int:
        if not 0 <= size <= self.size:
            raise ValueError(f"the tree has {self.size} leaves, not {size}")
        return size

    def _subtree(self, low: int, high: int) -> bytes:
        count = high - low
        level = count.bit_length() - 1
        if count == 1 << level and low % count == 0:
            at = (low >> level) * _SIZE
            return self._levels[level][at : at + _SIZE]
        middle = low + _split(count)
        return node_hash(self._subtree(low, middle), self._subtree(middle, high))


def _split(count: int) -> int:
    """The largest power of two below `count`, which is above 1."""
    return 1 << (count - 1).bit_length() - 1


def verify_inclusion(data: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether `data` is leaf `index` (from 0) of the tree of `size` leaves with this root: RFC 9162 section 2.1.3.2."""
    if not 0 <= index < size:
        return False
    at, last, node = index, size - 1, leaf_hash(data)
    for sibling in proof:
        if last == 0:
            return False
        if at & 1 or at == last:
            node = node_hash(sibling, node)
            while at and not at & 1:
                at, last = at >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        at, last = at >> 1, last >> 1
    return last == 0 and node == root


def verify_consistency(first: int, first_root: bytes, second: int, second_root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether the tree of `first` leaves is the beginning of that of `second`: RFC 9162 section 2.1.4.2."""
    if not 0 < first <= second:
        return False
    if first == second:
        return not proof and first_root == second_root
    path = list(proof)
    if first & (first - 1) == 0:
        path.insert(0, first_root)
    if not path:
        return False
    at, last = first - 1, second - 1
    while at & 1:
        at, last = at >> 1, last >> 1
    old = new = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if at & 1 or at == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while at and not at & 1:
                at, last = at >> 1, last >> 1
        else:
            new = node_hash(new, sibling)
        at, last = at >> 1, last >> 1
    return last == 0 and old == first_root and new == second_root
