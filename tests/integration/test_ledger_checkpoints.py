"""Checkpoints against a real PostgreSQL, S3 store and OpenBao: whoever changes ledger or checkpoints is found out, and what was done is named."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ops_platform.clients.objectstore import ObjectInfo
from ops_platform.clients.vault import TransitSigner
from ops_platform.errors import (
    ConflictError,
    CorruptionError,
    CouldNotVerifyError,
    NotThereError,
    OpsError,
    UnreachableError,
)
from ops_platform.ledger import Entry, Ledger, LedgerCheck
from ops_platform.ledger.chain import digest, entry_text, moment
from ops_platform.ledger.checkpoint import Checkpoint, Checkpointer, CheckpointStore
from ops_platform.ledger.dsse import PAYLOAD_TYPE, Envelope, pae, verify
from ops_platform.ledger.merkle import Tree
from tests.ledger_rig import Checkpoints, Database, root_session
from tests.rig import Cluster, Ground, eventually


@pytest.fixture(scope="module")
def database(shared_cluster: Cluster) -> Iterator[Database]:
    made = Database(shared_cluster)
    yield made
    made.drop()


@pytest.fixture
def rig(ground: Ground, database: Database) -> Iterator[Checkpoints]:
    database.empty()
    made = Checkpoints(ground, database)
    yield made
    made.close()


@pytest.fixture
def signed(rig: Checkpoints) -> Checkpoints:
    """Twelve entries under three checkpoints, of 4, 8 and 12."""
    for _ in range(3):
        rig.fill(4)
        assert rig.anchored().write()[1]
    return rig


def kinds(found: LedgerCheck, *, grave: bool = True) -> list[tuple[str, str]]:
    return [(each.kind, each.where) for each in found.findings if each.grave == grave]


def put(entry: Entry, **changed: Any) -> Entry:
    return replace(entry, **changed)


# What is written


def test_a_checkpoint_is_a_signed_statement_of_what_the_ledger_holds(rig: Checkpoints) -> None:
    entries = rig.fill(5)
    made, new = rig.anchored().write()
    assert made is not None
    assert new
    raw = json.loads(rig.raw(1))
    payload = base64.b64decode(raw["payload"])
    statement = json.loads(payload)
    root = Tree.of(bytes.fromhex(entry.sha256) for entry in entries).root().hex()
    assert raw["payloadType"] == "application/vnd.in-toto+json"
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [{"name": f"ledger:{rig.ledger_id}", "digest": {"rfc6962-sha256": root}}]
    said = statement["predicate"]
    assert (said["number"], said["size"], said["root"], said["head"]) == (1, 5, root, entries[-1].sha256)
    assert said["previous"] is None
    assert list(said["keys"]) == [f"{rig.key}:v1"]

    (signature,) = raw["signatures"]
    message = b"DSSEv1 28 application/vnd.in-toto+json %d %b" % (len(payload), payload)
    assert message == pae(PAYLOAD_TYPE, payload)
    assert rig.signer.verify(message, signature["keyid"], base64.b64decode(signature["sig"])), "Vault says so itself"
    assert not rig.signer.verify(message + b" ", signature["keyid"], base64.b64decode(signature["sig"]))
    assert verify(rig.signer.public_keys()[signature["keyid"]], message, base64.b64decode(signature["sig"]))


def test_each_goes_on_from_the_one_before_and_is_locked(signed: Checkpoints) -> None:
    line = [Checkpoint.parse(signed.raw(number)) for number in (1, 2, 3)]
    assert [each.size for each in line] == [4, 8, 12]
    assert [each.previous for each in line] == [None, line[0].sha256, line[1].sha256]
    for number in (1, 2, 3):
        kept = signed.s3.retention(signed.store.key(number))
        assert kept is not None
        assert kept.until > datetime.now(UTC) + timedelta(hours=23)
    found = signed.anchored().verify()
    assert (found.ok, found.checkpoints, found.anchored_seq, found.findings) == (True, 3, 12, ())


def test_without_new_entries_there_is_no_new_one(signed: Checkpoints) -> None:
    made, new = signed.anchored().write()
    assert made is not None
    assert (made.number, new) == (3, False)
    assert len(signed.store.all()) == 3


def test_an_empty_ledger_has_no_checkpoint(rig: Checkpoints) -> None:
    assert rig.anchored().write() == (None, False)
    assert rig.anchored().verify().ok


def test_only_what_came_since_is_read(signed: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    from ops_platform.ledger.ledger import Reading

    asked: list[int] = []
    rows = Reading.rows
    monkeypatch.setattr(
        Reading, "rows", lambda self, *, after=0, upto=None: asked.append(after) or rows(self, after=after, upto=upto)
    )
    signed.fill(2)
    made, _ = signed.anchored().write()
    assert made is not None
    assert (made.size, asked) == (14, [12])


# The entries


def test_a_ledger_without_a_checkpoint_is_said_to_have_none(rig: Checkpoints) -> None:
    rig.fill(3)
    found = rig.anchored().verify()
    assert found.ok
    assert kinds(found, grave=False) == [("not anchored", "the ledger")]


@pytest.mark.parametrize(
    ("statements", "seq", "how"),
    [
        (["""update ops_ledger.entries set body = '{"number":99}' where seq = 6"""], 6, "changed"),
        (["update ops_ledger.entries set at = at - interval '30 days' where seq = 6"], 6, "changed"),
        (["delete from ops_ledger.entries where seq = 6"], 6, "missing"),
        (["delete from ops_ledger.entries where seq between 5 and 8"], 5, "missing"),
        ([f"update ops_ledger.entries set seq = {to} where seq = {of}" for of, to in ((6, 99), (7, 6), (99, 7))], 6, "reordered"),
    ],
    ids=["changed", "back-dated", "dropped", "dropped in a row", "reordered"],
)  # fmt: skip
def test_entries_that_were_touched_are_named(signed: Checkpoints, statements: list[str], seq: int, how: str) -> None:
    signed.database.tamper(*statements)
    found = signed.anchored().verify()
    assert found.broken is not None
    assert (found.broken.seq, found.broken.how, found.ok) == (seq, how, False)
    assert found.anchored_seq == 4, "what stands before it is still good"


REWRITTEN: dict[str, tuple[Callable[[list[Entry]], list[Entry]], str]] = {
    "one changed": (lambda all_: [put(e, text='{"number":99}') if e.seq == 6 else e for e in all_], "entries 5 to 8"),
    "one dropped": (lambda all_: [e for e in all_ if e.seq != 6], "entries 5 to 8"),
    "two swapped": (lambda all_: [*all_[:5], all_[6], all_[5], *all_[7:]], "entries 5 to 8"),
    "one back-dated": (lambda all_: [put(e, at=e.at - timedelta(days=30)) if e.seq == 6 else e for e in all_], "entries 5 to 8"),
    "one put in": (lambda all_: [*all_[:5], put(all_[5], subject="db-9"), *all_[5:]], "entries 5 to 8"),
    "the newest changed": (lambda all_: [*all_[:-1], put(all_[-1], actor="nobody")], "entries 9 to 12"),
    "everything": (lambda all_: [put(e, actor="nobody") for e in all_], "entries 1 to 4"),
}  # fmt: skip


@pytest.mark.parametrize("what", REWRITTEN)
def test_a_table_that_its_owner_wrote_anew_is_no_longer_what_was_signed(signed: Checkpoints, what: str) -> None:
    change, where = REWRITTEN[what]
    signed.database.rewrite(change(signed.ledger.entries()))
    assert signed.ledger.verify().ok, "nothing in the database shows it: this is what checkpoints are for"
    found = signed.anchored().verify()
    assert not found.ok
    assert ("rewritten", where) in kinds(found)
    signed.fill(1)
    with pytest.raises(CorruptionError):
        signed.anchored().write()


def test_a_tail_that_was_cut_off_is_missed(signed: Checkpoints) -> None:
    signed.database.tamper("delete from ops_ledger.entries where seq > 9")
    assert signed.ledger.verify().ok
    found = signed.anchored().verify()
    assert kinds(found) == [("truncated", "entries 10 to 12")]
    assert found.anchored_seq == 8
    with pytest.raises(CorruptionError, match="entry 12 is not the one"):
        signed.anchored().write()
    assert len(signed.store.all()) == 3


def test_a_ledger_that_was_emptied_is_missed(signed: Checkpoints) -> None:
    signed.database.tamper("delete from ops_ledger.entries")
    assert kinds(signed.anchored().verify()) == [("truncated", "entries 1 to 12")]
    signed.database.empty()  # with all that the database itself remembered of it
    signed.ledger.close()
    assert kinds(signed.anchored().verify()) == [("truncated", "entries 1 to 12")]


@contextmanager
def at(rig: Checkpoints, moved: timedelta) -> Generator[None]:
    rig.clock.at += moved
    yield
    rig.clock.at -= moved


def test_an_entry_that_says_it_is_older_than_the_checkpoint_before_it_is_back_dated(signed: Checkpoints) -> None:
    with at(signed, -timedelta(days=1)):
        signed.fill(1)
    signed.fill(1)
    assert signed.ledger.verify().ok
    found = signed.anchored().verify()
    assert kinds(found) == [("back-dated", "entry 13")]
    assert "checkpoint 3" in found.findings[0].what


def test_clocks_that_differ_a_little_are_not_told(signed: Checkpoints) -> None:
    with at(signed, -timedelta(seconds=50)):
        signed.fill(1)
    assert signed.anchored().verify().findings == ()


def test_a_clock_that_was_set_is_told_and_breaks_nothing(signed: Checkpoints) -> None:
    with at(signed, timedelta(hours=1)):
        signed.fill(2)
    signed.fill(1)
    signed.anchored().write()
    found = signed.anchored().verify()
    assert found.ok
    assert sorted(kinds(found, grave=False)) == [("clock stepped back", "entry 15"), ("post-dated", "entry 14")]


def test_many_findings_of_one_kind_are_counted(signed: Checkpoints) -> None:
    with at(signed, -timedelta(days=1)):
        signed.fill(30)
    found = signed.anchored().verify()
    assert len(found.findings) == 11
    assert kinds(found)[-1] == ("back-dated", "20 more entries")


# The checkpoints


def test_checkpoints_that_were_swapped_are_named(signed: Checkpoints) -> None:
    first, second = signed.raw(1), signed.raw(2)
    signed.overwrite(1, second)
    signed.overwrite(2, first)
    found = signed.anchored().verify()
    assert not found.ok
    assert kinds(found) == [("checkpoint swapped", signed.store.key(1)), ("checkpoint swapped", signed.store.key(2))]


def test_one_that_was_put_over_another_leaves_a_gap(signed: Checkpoints) -> None:
    signed.overwrite(2, signed.raw(1))
    found = signed.anchored().verify()
    assert kinds(found) == [("checkpoint swapped", signed.store.key(2)), ("checkpoint missing", "checkpoint 2")]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_that_was_deleted_is_missed(signed: Checkpoints, number: int) -> None:
    signed.remove(number)
    found = signed.anchored().verify()
    assert kinds(found) == [("checkpoint missing", f"checkpoint {number}")]
    if number == 3:
        signed.fill(1)
        with pytest.raises(NotThereError, match="checkpoint 3 was put here"):
            signed.anchored().write()


def test_a_listing_that_lags_behind_makes_no_checkpoint_gone(
    signed: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_ = signed.s3.list

    def behind(prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        return (info for info in list_(prefix, start_after=start_after) if info.key != signed.store.key(3))

    monkeypatch.setattr(signed.s3, "list", behind)
    signed.fill(1)
    made, new = signed.anchored().write()
    assert made is not None
    assert (made.number, new) == (4, True)
    assert made.previous == Checkpoint.parse(signed.raw(3)).sha256


def test_all_of_them_deleted_are_missed(signed: Checkpoints) -> None:
    for number in (1, 2, 3):
        signed.remove(number)
    assert kinds(signed.anchored().verify()) == [("checkpoint missing", "checkpoints 1 to 3")]


def forged(rig: Checkpoints, number: int, signer: TransitSigner, keyid: str | None = None, **said: Any) -> bytes:
    """The checkpoint with something else in it, signed anew; `keyid`: the name under which the signature stands."""
    statement = Envelope.parse(rig.raw(number)).statement
    statement["predicate"] |= said
    payload = json.dumps(statement).encode()
    name = list(signer.public_keys())[-1]
    signature = signer.sign(pae(PAYLOAD_TYPE, payload), name)
    assert signature is not None
    return Envelope(payload, {keyid or name: signature}).to_bytes()


def another_key(rig: Checkpoints) -> TransitSigner:
    name = f"{rig.key}-other"
    rig.vault("create_key", name, key_type="ed25519")
    return TransitSigner(rig.session, key=name)


def test_a_checkpoint_under_another_key_counts_for_nothing(signed: Checkpoints) -> None:
    """Also where it names that key as one of ours, and where it gives our name to the signature."""
    other = another_key(signed)
    theirs = {name: public.hex() for name, public in other.public_keys().items()}
    signed.overwrite(3, forged(signed, 3, other, keys=theirs, at="2026-03-01T00:00:00.000000Z"))
    found = signed.anchored().verify()
    assert kinds(found) == [("checkpoint forged", signed.store.key(3)), ("checkpoint missing", "checkpoint 3")]
    assert "nobody vouches" in found.findings[0].what
    ours = f"{signed.key}:v1"
    signed.overwrite(3, forged(signed, 3, other, ours, keys={ours: next(iter(theirs.values()))}))
    found = signed.anchored().verify()
    assert kinds(found) == [("checkpoint forged", signed.store.key(3)), ("checkpoint missing", "checkpoint 3")]
    assert "has not" in found.findings[0].what
    signed.fill(1)
    with pytest.raises(CorruptionError, match="not signed by our key"):
        signed.anchored().write()


def test_one_that_our_own_key_signed_later_does_not_stand_in_the_line(signed: Checkpoints) -> None:
    """Whoever may use the key can sign anything: what they signed before, and where, stays."""
    signed.overwrite(2, forged(signed, 2, signed.signer, at="2026-02-02T00:00:00.000000Z"))
    found = signed.anchored().verify()
    assert ("checkpoint out of line", "checkpoint 3") in kinds(found)


def test_one_of_another_ledger_does_not_count(signed: Checkpoints) -> None:
    signed.overwrite(
        2,
        forged(
            signed,
            2,
            signed.signer,
            ledger="other",
        ),
    )
    # Its subject still names this ledger: it contradicts itself.
    assert kinds(signed.anchored().verify())[0] == ("checkpoint unreadable", signed.store.key(2))


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"[]", b'{"payload":"e30=","payloadType":"text/plain","signatures":[]}', b"\xff"]
)
def test_what_is_no_checkpoint_is_named(signed: Checkpoints, raw: bytes) -> None:
    signed.overwrite(2, raw)
    found = signed.anchored().verify()
    assert kinds(found) == [("checkpoint unreadable", signed.store.key(2)), ("checkpoint missing", "checkpoint 2")]


def test_one_flipped_byte_anywhere_is_found(signed: Checkpoints) -> None:
    raw = signed.raw(2)
    for place in range(5, len(raw) - 5, 97):
        bent = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        signed.overwrite(2, bent)
        assert not signed.anchored().verify().ok, place


# Two at once, and what breaks off


def test_a_second_checkpointer_waits_for_its_turn(rig: Checkpoints) -> None:
    rig.fill(1)
    with rig.database.ledger() as other, other.claim(f"ledger.checkpoint/{rig.ledger_id}") as ours:
        assert ours
        with pytest.raises(ConflictError, match="another process"):
            rig.anchored().write()
    assert rig.store.all() == []


def test_writers_and_checkpointers_at_once_make_one_line(rig: Checkpoints) -> None:
    rig.fill(1)
    stop, failures = threading.Event(), []

    def work(what: Callable[[Ledger], object]) -> None:
        try:
            with rig.database.ledger(rig.clock) as ledger:
                while not stop.is_set():
                    what(ledger)
        except OpsError as error:
            failures.append(error)
        finally:
            stop.set()

    def sign(ledger: Ledger) -> None:
        try:
            Checkpointer(ledger, rig.store, rig.signer, clock=rig.clock).write()
        except ConflictError:
            return
        if len(rig.store.all()) >= 8:
            stop.set()

    def append(ledger: Ledger) -> None:
        ledger.append("test.race", "db-1", {}, actor="tester")

    threads = [threading.Thread(target=work, args=[what], daemon=True) for what in (append, append, sign, sign, sign)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    found = rig.anchored().verify()
    assert found.ok
    assert found.checkpoints >= 8


def test_without_the_claim_the_store_keeps_the_line_from_forking(
    signed: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim is lost with its session, and its holder may not have noticed: two write the same number."""

    @contextmanager
    def nobody_minds(_self: Ledger, _name: str) -> Generator[bool]:
        yield True

    monkeypatch.setattr(Ledger, "claim", nobody_minds)
    signed.fill(1)
    put_ = CheckpointStore.put

    def late(self: CheckpointStore, made: Checkpoint) -> None:
        monkeypatch.setattr(CheckpointStore, "put", put_)
        signed.fill(1)
        signed.anchored().write()
        put_(self, made)

    monkeypatch.setattr(CheckpointStore, "put", late)
    with pytest.raises(ConflictError, match="another process wrote checkpoint 4"):
        signed.anchored().write()
    found = signed.anchored().verify()
    assert (found.ok, found.checkpoints, found.anchored_seq) == (True, 4, 14)


def test_one_whose_writer_was_killed_before_it_was_noted_is_taken_up(
    signed: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed.fill(1)
    note = Ledger.note_checkpoint

    def killed(self: Ledger, number: int, *rest: Any) -> None:
        if number == 4:
            raise KeyboardInterrupt
        note(self, number, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "note_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            signed.anchored().write()
    signed.fill(1)
    made, _ = signed.anchored().write()
    assert made is not None
    assert made.number == 5
    with signed.ledger.reading() as reading:
        assert reading.noted_checkpoints() == [1, 2, 3, 4, 5]
    assert signed.anchored().verify().ok


def test_nothing_is_signed_over_a_broken_chain(signed: Checkpoints) -> None:
    signed.fill(3)
    signed.database.tamper("update ops_ledger.entries set actor = 'nobody' where seq = 14")
    with pytest.raises(CorruptionError, match="broken at entry 14, nothing is signed"):
        signed.anchored().write()
    assert len(signed.store.all()) == 3


def test_a_sealed_vault_leaves_nothing_half(database: Database) -> None:
    """A server of its own: it is sealed in the middle of the test."""
    database.empty()
    ground = Ground()
    try:
        ground.component("s3")
        rig = Checkpoints(ground, database)
        rig.fill(2)
        rig.anchored().write()
        rig.fill(2)
        root_session(ground).call(lambda client: client.sys.seal(), "seal")
        with pytest.raises(UnreachableError, match="sealed"):
            rig.anchored().write()
        assert len(rig.store.all()) == 1
        with pytest.raises(CouldNotVerifyError, match="sealed") as unknown:
            rig.anchored().verify()
        assert unknown.value.exit_code == 3
        unseal = ground.place.secret("vault.unseal_key")
        root_session(ground).call(lambda client: client.sys.submit_unseal_key(unseal), "unseal")

        def elected() -> bool:
            with suppress(UnreachableError):
                return bool(rig.signer.public_keys())
            return False

        eventually(elected, why="a raft node is not elected anew")
        made, new = rig.anchored().write()
        assert made is not None
        assert (made.number, made.size, new) == (2, 4, True)
        rig.close()
    finally:
        ground.close()


def test_a_key_that_is_not_there_is_said_with_what_to_do(rig: Checkpoints) -> None:
    rig.fill(1)
    with pytest.raises(NotThereError, match="no signing key") as missing:
        rig.anchored(signer=TransitSigner(rig.session, key="no-such-key")).write()
    assert "type=ed25519" in str(missing.value)
    with pytest.raises(OpsError, match="aes256-gcm96"):
        rig.anchored(signer=TransitSigner(rig.session, key="ops-backup")).write()
    assert rig.store.all() == []


# Keys


def test_after_a_rotation_both_keys_sign_once_and_either_leads_to_the_other(signed: Checkpoints) -> None:
    first = signed.signer.public_keys()
    signed.vault("rotate_key", signed.key)
    for _ in range(2):
        signed.fill(1)
        signed.anchored().write()
    v1, v2 = (f"{signed.key}:v{version}" for version in (1, 2))
    signers = [list(Checkpoint.parse(signed.raw(number)).envelope.signatures) for number in (3, 4, 5)]
    assert signers == [[v1], [v1, v2], [v2]]
    assert list(Checkpoint.parse(signed.raw(5)).keys) == [v1, v2]
    both = signed.signer.public_keys()
    assert list(both) == [v1, v2]
    for pinned in ({"first": first[v1]}, {"second": both[v2]}, both):
        found = signed.anchored(pinned=pinned).verify()
        assert (found.ok, found.checkpoints) == (True, 5), list(pinned)


def test_what_an_archived_key_signed_stays_good(signed: Checkpoints) -> None:
    signed.vault("rotate_key", signed.key)
    signed.fill(1)
    signed.anchored().write()
    signed.vault("update_key_configuration", signed.key, min_encryption_version=2)
    signed.vault("update_key_configuration", signed.key, min_decryption_version=2)
    assert list(signed.signer.public_keys()) == [f"{signed.key}:v2"]
    assert signed.signer.sign(b"x", f"{signed.key}:v1") is None
    signed.fill(1)
    signed.anchored().write()
    found = signed.anchored().verify()
    assert (found.ok, found.checkpoints) == (True, 5)


def test_a_key_that_nobody_introduced_is_not_trusted(signed: Checkpoints) -> None:
    """Pinned is another key: then nothing here is good, whatever the checkpoints say of themselves."""
    other = another_key(signed).public_keys()
    found = signed.anchored(pinned=other).verify()
    assert not found.ok
    assert [kind for kind, _ in kinds(found)] == ["checkpoint forged"] * 3 + ["checkpoint missing"]


def test_a_key_that_was_made_anew_under_its_name_is_refused(signed: Checkpoints) -> None:
    signed.vault("rotate_key", signed.key)
    signed.fill(1)
    signed.anchored().write()
    signed.vault("update_key_configuration", signed.key, deletion_allowed=True)
    signed.vault("delete_key", signed.key)
    signed.vault("create_key", signed.key, key_type="ed25519")
    signed.fill(1)
    with pytest.raises(CorruptionError):
        signed.anchored().write()
    assert not signed.anchored().verify().ok
    assert len(signed.store.all()) == 4


# Proofs


def test_an_entry_is_proven_by_its_path_to_the_signed_root(signed: Checkpoints) -> None:
    signed.fill(2)
    for seq in (1, 6, 12):
        found = signed.anchored().prove(seq)
        assert found.holds
        assert (found.entry.seq, found.checkpoint, found.size) == (seq, 3, 12)
        changed = put(found.entry, text='{"number":99}')
        text = entry_text(seq, moment(changed.at), changed.kind, changed.actor, changed.subject, changed.text)
        bent = replace(found, entry=put(changed, sha256=digest(changed.prev_sha256, text)))
        assert not bent.holds, "the digest covers the content, and the path leads from the digest"
    with pytest.raises(NotThereError, match="no checkpoint covers entry 13"):
        signed.anchored().prove(13)
    signed.anchored().write()
    assert signed.anchored().prove(13).holds


def test_an_entry_that_does_not_exist_is_no_reason_to_write_a_checkpoint(rig: Checkpoints) -> None:
    with pytest.raises(NotThereError, match="there is no entry 1: the ledger is empty"):
        rig.anchored().prove(1)
    rig.fill(2)
    rig.anchored().write()
    for seq in (3, 10**30):
        with pytest.raises(NotThereError, match=f"there is no entry {seq}: the last is 2") as refused:
            rig.anchored().prove(seq)
        assert refused.value.remedy == "ops ledger list shows them"


def test_a_ledger_that_was_written_anew_proves_nothing(signed: Checkpoints) -> None:
    signed.database.rewrite([put(entry, actor="nobody") for entry in signed.ledger.entries()])
    with pytest.raises(CouldNotVerifyError):
        signed.anchored().prove(3)


def test_an_older_ledger_gets_its_first_checkpoint(rig: Checkpoints) -> None:
    from ops_platform.ledger import schema

    with closing(rig.database.connect()) as connection:
        connection.execute(schema._STEPS[0])
    with closing(rig.database.connect()) as connection:
        text = entry_text(1, moment(rig.clock.now()), "old.kind", "tester", "db-1", "{}")
        connection.execute(
            "insert into ops_ledger.entries values (1, %s, 'old.kind', 'tester', 'db-1', '{}', %s, %s)",
            [rig.clock.at, "0" * 64, digest("0" * 64, text)],
        )
    made, _ = rig.anchored().write()
    assert made is not None
    assert made.size == 1
    assert rig.anchored().verify().ok
