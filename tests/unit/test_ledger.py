"""Envelopes, statements, controls and the judgement of times: what of the ledger needs no server."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ops_platform.errors import CorruptionError, InventoryError, UsageError
from ops_platform.inventory import load
from ops_platform.inventory.evidence import BUILT_IN, Control, controls
from ops_platform.inventory.values import Secret
from ops_platform.ledger.audit import Mark, check_chain
from ops_platform.ledger.chain import GENESIS, Row, canonical, digest, entry_text, moment
from ops_platform.ledger.dsse import Envelope, fingerprint, from_pem, pae, pem, verify
from ops_platform.ledger.merkle import Frontier
from tests.unit.test_definitions import body

BEGIN = datetime(2026, 2, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)

# RFC 8032, section 7.1, tests 1 and 2.
SECRET_1 = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
PUBLIC_1 = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
SIGNATURE_1 = (
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
    "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
)


def test_what_is_signed_says_how_long_its_parts_are() -> None:
    """The example of DSSE's protocol description."""
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_signatures_are_those_of_rfc_8032() -> None:
    public, signature = bytes.fromhex(PUBLIC_1), bytes.fromhex(SIGNATURE_1)
    assert verify(public, b"", signature)
    assert not verify(public, b"x", signature)
    assert not verify(public, b"", signature[:-1])
    assert not verify(public[:-1], b"", signature)


def test_a_key_is_the_same_in_pem_and_by_its_fingerprint() -> None:
    import hashlib

    key = Ed25519PrivateKey.generate().public_key()
    raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert from_pem(pem(raw).encode(), "x") == raw
    assert fingerprint(raw) == hashlib.sha256(der).hexdigest()
    with pytest.raises(UsageError, match="no ed25519 public key"):
        from_pem(b"-----BEGIN PUBLIC KEY-----\nMCowBQ==\n-----END PUBLIC KEY-----\n", "x")


def test_an_envelope_survives_the_way_through_the_store() -> None:
    made = Envelope(b'{"_type":"https://in-toto.io/Statement/v1"}', {"k:v1": bytes(64), "k:v2": bytes(range(64))})
    assert Envelope.parse(made.to_bytes()) == made
    url_safe = json.loads(made.to_bytes())
    url_safe["signatures"][1]["sig"] = base64.urlsafe_b64encode(bytes(range(192, 256))).decode()
    assert Envelope.parse(json.dumps(url_safe).encode()).signatures["k:v2"] == bytes(range(192, 256))


@settings(deadline=None)  # a loaded machine is no defect
@given(st.binary(max_size=200))
def test_what_is_no_envelope_is_refused_and_nothing_else_happens(raw: bytes) -> None:
    with pytest.raises(CorruptionError):
        Envelope.parse(raw)


@pytest.mark.parametrize("payload", [b"[]", b"{}", b"\xff", b'{"_type":"https://in-toto.io/Statement/v0.1"}'])
def test_a_payload_that_is_no_statement_is_refused(payload: bytes) -> None:
    with pytest.raises(CorruptionError):
        _ = Envelope(payload, {}).statement


# Times and marks


def chain(times: list[datetime]) -> list[Row]:
    rows, prev = list[Row](), GENESIS
    for seq, at in enumerate(times, 1):
        sha256 = digest(prev, entry_text(seq, moment(at), "k", "a", "s", "{}"))
        rows.append((seq, moment(at), "k", "a", "s", "{}", prev, sha256))
        prev = sha256
    return rows


def mark(rows: list[Row], number: int, size: int, at: datetime) -> Mark:
    frontier = Frontier()
    for row in rows[:size]:
        frontier.append(bytes.fromhex(row[7]))
    return Mark(number, size, frontier.root().hex(), rows[size - 1][7], at)


@settings(deadline=None)  # a loaded machine is no defect
@given(st.data())
def test_honest_clocks_within_the_tolerance_are_never_told(data: st.DataObject) -> None:
    """Each writer's clock is off by at most half the tolerance, and so is the one that signs."""
    off = st.integers(-29, 29).map(lambda seconds: timedelta(seconds=seconds))
    true = list(itertools.accumulate(data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=25))))
    times = [BEGIN + timedelta(seconds=at) + data.draw(off) for at in true]
    rows = chain(times)
    sizes = sorted(data.draw(st.sets(st.integers(1, len(rows)))))
    marks = [mark(rows, n, s, BEGIN + timedelta(seconds=true[s - 1]) + data.draw(off)) for n, s in enumerate(sizes, 1)]
    found = check_chain(rows, marks=marks, tolerance=MINUTE)
    assert (found.ok, found.findings, found.checkpoints) == (True, (), len(marks))


@settings(deadline=None)  # a loaded machine is no defect
@given(st.data())
def test_whatever_is_rewritten_below_a_mark_is_found(data: st.DataObject) -> None:
    rows = chain([BEGIN + n * MINUTE for n in range(data.draw(st.integers(1, 40)))])
    sizes = sorted(data.draw(st.sets(st.integers(1, len(rows)), min_size=1)))
    marks = [mark(rows, n, s, BEGIN + s * MINUTE) for n, s in enumerate(sizes, 1)]
    victim = data.draw(st.integers(1, sizes[-1]))
    times = [
        BEGIN + n * MINUTE + (timedelta(microseconds=1) if n + 1 == victim else timedelta()) for n in range(len(rows))
    ]
    found = check_chain(chain(times), marks=marks)
    assert not found.ok
    (why,) = [each for each in found.findings if each.kind == "rewritten"]
    covering = next(size for size in sizes if size >= victim)
    assert why.where.endswith(f"to {covering}")
    shorter = check_chain(rows[: sizes[-1] - 1], marks=marks)
    assert "truncated" in {each.kind for each in shorter.findings}


# Controls and the inventory


def test_built_in_controls_are_each_there_once_and_hold_what_they_say() -> None:
    names = [(control.framework, control.id) for control in BUILT_IN]
    assert len(names) == len(set(names))
    responded = next(control for control in BUILT_IN if control.id == "CC7.4")
    assert responded.holds("action.outcome", "app-db")
    assert not responded.holds("actions", "app-db")
    assert not responded.holds("backup.verification", "app-db")
    own = Control(id="CC7.4", framework="SOC 2", title="Ours", kinds=["x"], subjects=["a"])
    merged = controls([own])
    assert len(merged) == len(BUILT_IN)
    assert own in merged
    assert own.holds("x", "a")
    assert not own.holds("x", "b")


def written(folder: Path, **changes: Any) -> Iterator[str]:
    content = body("a", **changes.pop("platform", {})) | changes
    (folder / "platform.yaml").write_text(yaml.safe_dump(content))
    try:
        load(folder / "platform.yaml")
    except InventoryError as error:
        yield str(error)


@pytest.mark.parametrize(
    ("ledger", "what"),
    [
        ({"store": "s", "vault": "v"}, "there is no vault 'v'"),
        ({"store": "x", "vault": "v"}, "there is no store 'x'; did you mean"),
        ({"store": "s", "vault": "v", "schedule": {"cron": "every minute"}}, "is not a cron expression"),
        (
            {"store": "s", "vault": "v", "object_lock": {"mode": "SOFT", "retain": "1d"}},
            "platform.ledger.object_lock.mode",
        ),
        ({"store": "s", "vault": "v", "id": "Main ledger"}, "is not an id"),
        ({"stroe": "s"}, "did you mean 'store'?"),
    ],
)
def test_mistakes_in_the_ledgers_part_are_named(tmp_path: Path, ledger: dict[str, Any], what: str) -> None:
    (said,) = written(tmp_path, platform={"ledger": ledger})
    assert what.removesuffix("; did you mean") in said


@pytest.mark.parametrize(
    ("control", "what"),
    [
        ({"id": "X", "framework": "F", "title": "T", "kinds": []}, "evidence[0].kinds"),
        ({"id": "X", "framework": "F", "title": "T", "kinds": ["Action Plan"]}, "evidence[0].kinds[0]"),
        ({"id": "../x", "framework": "F", "title": "T", "kinds": ["a."]}, "evidence[0].id"),
    ],
)
def test_mistakes_in_the_evidence_part_are_named(tmp_path: Path, control: dict[str, Any], what: str) -> None:
    (said,) = written(tmp_path, evidence=[control])
    assert what in said


PLAIN = st.none() | st.booleans() | st.integers() | st.text(max_size=5).filter(lambda text: "\0" not in text)
JSON = st.recursive(
    PLAIN | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\u00e9", max_size=2), inner, max_size=3),
    max_leaves=8,
)
NO_JSON = st.sampled_from(
    [Secret("x"), b"x", "a\0b", "\ud800", float("nan"), float("inf"), {1: "x"}, {None: 1}, {"a\0": 1}, {Secret("x"): 1}, {1, 2}, object()]
)  # fmt: skip


@given(JSON)
def test_canonical_json_says_what_it_was_made_of(value: Any) -> None:
    assert json.loads(canonical({"value": value})) == {"value": value}


@given(JSON)
@example({"z": '\x00\x1f\b\f\n\r\t"\\/\x7f'[1:], "a": [2**63, 2**64, -(2**63) - 1], "A": {"": None}})
@example([1e16, 5e-324, -0.0, 0.1, 1.0])
@example(["\u2028é😀"])
def test_canonical_json_is_the_same_to_the_letter_whichever_writer_had_its_turn(value: Any) -> None:
    assert canonical(value) == json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@given(JSON, NO_JSON, st.integers(0, 3))
def test_what_is_not_plain_is_refused_however_deep_it_lies_beside_what_is(good: Any, bad: Any, depth: int) -> None:
    for number in range(depth):
        bad = [good, bad] if number % 2 else {"good": good, "z": bad}
    with pytest.raises(UsageError):
        canonical({"good": good, "rest": [good, {"bad": bad}]})
