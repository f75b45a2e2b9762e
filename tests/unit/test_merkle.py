"""Merkle trees against the published vectors of Certificate Transparency, a plain reading of the RFC, and every small proof changed."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops_platform.ledger.merkle import EMPTY_ROOT, Frontier, Tree, leaf_hash, verify_consistency, verify_inclusion

# The inputs and roots that the reference implementation of RFC 6962 tests with.
LEAVES = [
    bytes.fromhex(text)
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
INCLUSION = {  # (leaf, size): path
    (0, 1): [],
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
    (1, 5): [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
CONSISTENCY = {  # (first, second): proof
    (1, 1): [],
    (1, 8): INCLUSION[0, 8],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}


def raw(proof: list[str]) -> list[bytes]:
    return [bytes.fromhex(node) for node in proof]


def plain_root(leaves: list[bytes]) -> bytes:
    """MTH of RFC 6962 section 2.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + plain_root(leaves[:k]) + plain_root(leaves[k:])).digest()


def test_the_published_roots() -> None:
    tree, frontier = Tree.of(LEAVES), Frontier()
    assert tree.root(0) == frontier.root() == EMPTY_ROOT
    for size, root in enumerate(ROOTS, 1):
        frontier.append(LEAVES[size - 1])
        assert tree.root(size).hex() == frontier.root().hex() == root


@pytest.mark.parametrize("which", INCLUSION)
def test_the_published_inclusion_proofs(which: tuple[int, int]) -> None:
    index, size = which
    proof = Tree.of(LEAVES).inclusion(index, size)
    assert [node.hex() for node in proof] == INCLUSION[which]
    assert verify_inclusion(LEAVES[index], index, size, proof, bytes.fromhex(ROOTS[size - 1]))


@pytest.mark.parametrize("which", CONSISTENCY)
def test_the_published_consistency_proofs(which: tuple[int, int]) -> None:
    first, second = which
    proof = Tree.of(LEAVES).consistency(first, second)
    assert [node.hex() for node in proof] == CONSISTENCY[which]
    roots = bytes.fromhex(ROOTS[first - 1]), bytes.fromhex(ROOTS[second - 1])
    assert verify_consistency(first, roots[0], second, roots[1], raw(CONSISTENCY[which]))


@settings(deadline=None)  # a loaded machine is no defect
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=130, unique=True), st.data())
def test_every_proof_holds_and_for_nothing_else(leaves: list[bytes], data: st.DataObject) -> None:
    tree = Tree.of(leaves)
    size = data.draw(st.integers(1, len(leaves)))
    index = data.draw(st.integers(0, size - 1))
    first = data.draw(st.integers(1, size))
    root, first_root = plain_root(leaves[:size]), plain_root(leaves[:first])
    assert (tree.root(size), tree.root(first)) == (root, first_root)

    proof = tree.inclusion(index, size)
    assert verify_inclusion(leaves[index], index, size, proof, root)
    assert not verify_inclusion(leaves[index] + b"x", index, size, proof, root)
    assert not verify_inclusion(leaves[index], index, size, [*proof, root], root)
    assert not any(verify_inclusion(leaves[index], index, size, proof[:n], root) for n in range(len(proof)))
    other = data.draw(st.integers(0, size - 1))
    assert verify_inclusion(leaves[index], other, size, proof, root) == (other == index)

    grown = tree.consistency(first, size)
    assert verify_consistency(first, first_root, size, root, grown)
    assert not verify_consistency(first, leaf_hash(first_root), size, root, grown)
    assert not verify_consistency(first, first_root, size, leaf_hash(root), grown)
    assert not verify_consistency(first, first_root, size, root, [*grown, root])
    for number in range(len(grown)):
        bent = [*grown[:number], leaf_hash(grown[number]), *grown[number + 1 :]]
        assert not verify_consistency(first, first_root, size, root, bent)
        assert not verify_consistency(first, first_root, size, root, grown[:number])


@settings(deadline=None)  # a loaded machine is no defect
@given(st.lists(st.binary(max_size=8), max_size=80), st.lists(st.binary(max_size=8), max_size=80))
def test_a_frontier_that_was_written_down_goes_on_where_it_stopped(before: list[bytes], after: list[bytes]) -> None:
    first = Frontier()
    for leaf in before:
        first.append(leaf)
    assert first.root() == plain_root(before)
    second = Frontier(first.size, first.peaks)
    for leaf in after:
        second.append(leaf)
    assert second.root() == plain_root(before + after)


@pytest.mark.parametrize(("size", "peaks"), [(0, 1), (3, 1), (4, 2), (-1, 0)])
def test_a_frontier_with_another_number_of_peaks_is_refused(size: int, peaks: int) -> None:
    with pytest.raises(ValueError, match="peaks"):
        Frontier(size, [EMPTY_ROOT] * peaks)


@pytest.mark.parametrize(("index", "size"), [(-1, 3), (3, 3), (0, 0), (2, 9)])
def test_what_is_not_in_the_tree_has_no_proof(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="leaves"):
        Tree.of(LEAVES).inclusion(index, size)
    assert not verify_inclusion(b"", index, min(size, 1), [], EMPTY_ROOT) or index == 0
