"""The ledger against a real PostgreSQL: it only grows, writers make one chain, and whoever changes it is found out."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ops_platform.errors import AccessDeniedError, ConflictError, OpsError, UnreachableError, UsageError
from ops_platform.inventory.values import Secret
from ops_platform.ledger import GENESIS, Draft, Entry, Ledger
from tests.ledger_rig import BEGIN, Database
from tests.rig import Cluster, eventually


@pytest.fixture(scope="module")
def one_database(shared_cluster: Cluster) -> Iterator[Database]:
    made = Database(shared_cluster)
    yield made
    made.drop()


@pytest.fixture
def database(one_database: Database) -> Database:
    """Without a ledger: each test begins by making it."""
    one_database.empty()
    return one_database


@pytest.fixture
def filled(database: Database) -> Database:
    with database.ledger() as ledger:
        for number in range(1, 8):
            ledger.append("test.entry", f"db-{number % 2}", {"number": number}, actor="tester")
    return database


def test_what_is_appended_can_be_read_and_verified(database: Database) -> None:
    body = {"zürich": "“quoted” \\ \n\t\x01 🜁", "list": [1, 2.5, True, None], "nested": {"b": 1, "a": 2}}
    with database.ledger() as ledger:
        first = ledger.append("test.kind", "app-db", body, actor="somebody's name")
        second = ledger.append("test.other", "app-db", {}, actor="other")
        assert (first.seq, first.prev_sha256, second.prev_sha256) == (1, GENESIS, first.sha256)
        assert ledger.entries() == [first, second]
        assert ledger.entries()[0].body == body
        check = ledger.verify(anchor=(first.seq, first.sha256))
        assert check.ok
        assert (check.entries, check.head_seq, check.head_sha256) == (2, 2, second.sha256)


def test_an_empty_ledger_is_unbroken(database: Database) -> None:
    with database.ledger() as ledger:
        check = ledger.verify()
        assert (check.ok, check.entries, ledger.entries()) == (True, 0, [])


def test_entries_are_chosen_by_subject_kind_time_and_number(filled: Database) -> None:
    with filled.ledger() as ledger:
        ledger.append("other.kind", "db-1", {}, actor="tester")

        def seqs(**choice: Any) -> list[int]:
            return [entry.seq for entry in ledger.entries(**choice)]

        assert seqs(subject="db-0") == [2, 4, 6]
        assert seqs(kind="test.entry", limit=2) == [1, 2]
        assert seqs(kind="other.") == [8]
        assert seqs(kind="test") == []
        assert seqs(after_seq=5) == [6, 7, 8]
        assert seqs(newest_first=True, limit=2) == [8, 7]
        assert seqs(since=ledger.entries()[4].at, subject="db-1") == [5, 7]
        assert ledger.entries()[0].at.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    "statement",
    [
        "update ops_ledger.entries set actor = 'nobody' where seq = 3",
        "update ops_ledger.entries set actor = actor where false",
        "delete from ops_ledger.entries where seq = 7",
        "truncate ops_ledger.entries",
        "insert into ops_ledger.entries select * from ops_ledger.entries where seq = 3 on conflict (seq) do update set actor = 'x'",
    ],
)
@pytest.mark.parametrize("replicating", [False, True])
def test_the_table_only_grows(filled: Database, statement: str, replicating: bool) -> None:
    with closing(filled.superuser()) as connection:
        if replicating:  # ordinary triggers do not fire then
            connection.execute("set session_replication_role = replica")
        with pytest.raises(psycopg.errors.RestrictViolation):
            connection.execute(statement)
    with filled.ledger() as ledger:
        assert ledger.verify().entries == 7


@pytest.mark.parametrize(
    ("seq", "prev"), [(9, "sha256"), (8, f"'{GENESIS}'")], ids=["leaves a number out", "names another predecessor"]
)
def test_an_entry_that_does_not_extend_the_chain_is_refused(filled: Database, seq: int, prev: str) -> None:
    with closing(filled.connect()) as connection, pytest.raises(psycopg.errors.RestrictViolation):
        connection.execute(
            f"insert into ops_ledger.entries select {seq}, at, kind, actor, subject, body, {prev}, sha256"
            " from ops_ledger.entries where seq = 7"
        )


@pytest.mark.parametrize(
    ("statement", "seq", "how"),
    [
        ("""update ops_ledger.entries set body = '{"number":99}' where seq = 4""", 4, "changed"),
        ("update ops_ledger.entries set actor = 'another' where seq = 1", 1, "changed"),
        ("update ops_ledger.entries set at = at + interval '1 microsecond' where seq = 7", 7, "changed"),
        ("update ops_ledger.entries set subject = 'db-9' where seq = 2", 2, "changed"),
        ("update ops_ledger.entries set kind = 'test.other' where seq = 2", 2, "changed"),
        # The same JSON, written otherwise: only the exact text gives the digest.
        ("""update ops_ledger.entries set body = '{ "number":4}' where seq = 4""", 4, "changed"),
        ("delete from ops_ledger.entries where seq = 3", 3, "missing"),
        ("delete from ops_ledger.entries where seq = 1", 1, "missing"),
        ("update ops_ledger.entries set seq = seq + 10 where seq = 7", 7, "missing"),
    ],
)
def test_tampering_behind_the_triggers_is_found_and_named(filled: Database, statement: str, seq: int, how: str) -> None:
    filled.tamper(statement)
    with filled.ledger() as ledger:
        check = ledger.verify()
    assert check.broken is not None
    assert (check.broken.seq, check.broken.how) == (seq, how)
    assert check.head_seq == seq - 1
    assert not check.ok


def test_an_entry_written_anew_with_a_fitting_digest_breaks_the_next(filled: Database) -> None:
    from ops_platform.ledger.chain import digest, entry_text, moment

    with filled.ledger() as ledger:
        old = ledger.entries()[3]
        forged = digest(
            old.prev_sha256, entry_text(4, moment(old.at), old.kind, old.actor, old.subject, '{"number":99}')
        )
        filled.tamper(f"""update ops_ledger.entries set body = '{{"number":99}}', sha256 = '{forged}' where seq = 4""")
        check = ledger.verify()
        assert check.broken is not None
        assert (check.broken.seq, check.broken.how) == (5, "wrong predecessor")


def test_newest_entries_that_were_cut_off_are_missed_by_an_anchor(filled: Database) -> None:
    with filled.ledger() as ledger:
        head = ledger.verify()
        filled.tamper("delete from ops_ledger.entries where seq > 5")
        assert ledger.verify().ok  # a shorter chain is a chain: this is why digests are noted elsewhere
        check = ledger.verify(anchor=(head.head_seq, head.head_sha256))
        assert check.broken is not None
        assert (check.broken.seq, check.broken.how) == (6, "missing")
        ledger.append("test.entry", "db-0", {"number": 6}, actor="tester")
        ledger.append("test.entry", "db-1", {"number": 70}, actor="tester")
        rewritten = ledger.verify(anchor=(head.head_seq, head.head_sha256))
        assert rewritten.broken is not None
        assert (rewritten.broken.seq, rewritten.broken.how) == (7, "changed")


# Transactions, batches, the outbox


def test_entries_and_rows_of_a_transaction_stand_there_together_or_not_at_all(filled: Database) -> None:
    with filled.ledger() as ledger:
        with ledger.transaction() as transaction:
            transaction.connection.execute("create table beside (seq bigint)")
            for number in (8, 9):
                entry = transaction.append("test.entry", "db-0", {"number": number}, actor="tester")
                transaction.connection.execute("insert into beside values (%s)", [entry.seq])
        with contextlib.suppress(ZeroDivisionError), ledger.transaction() as transaction:
            transaction.append("test.entry", "db-0", {"number": 10}, actor="tester")
            transaction.connection.execute("insert into beside values (10)")
            raise ZeroDivisionError
        check = ledger.verify()
        assert (check.ok, check.entries) == (True, 9)
    with closing(filled.connect()) as connection:
        assert connection.execute("select seq from beside order by seq").fetchall() == [(8,), (9,)]
        connection.execute("drop table beside")


def test_a_transaction_that_only_looks_keeps_nobody_waiting(filled: Database) -> None:
    with filled.ledger() as one, filled.ledger() as other, one.transaction() as transaction:
        transaction.connection.execute("select 1")
        assert other.append("test.entry", "db-0", {}, actor="tester").seq == 8
        assert transaction.append("test.entry", "db-0", {}, actor="tester").seq == 9


def test_a_batch_is_a_chain_as_if_its_entries_had_come_alone(filled: Database) -> None:
    drafts = [Draft("test.batch", f"db-{n}", {"n": n, "text": '“{},\\" \n🜁'}) for n in range(2500)]
    with filled.ledger() as ledger:
        written = ledger.append_all(iter(drafts), actor="tester")
        assert [(entry.kind, entry.subject, entry.body) for entry in written] == drafts
        assert ledger.entries(after_seq=7) == written
        check = ledger.verify(anchor=(written[-1].seq, written[-1].sha256))
        assert (check.ok, check.entries) == (True, 2507)
        assert ledger.append_all([], actor="tester") == []


def test_a_batch_is_written_whole_or_not_at_all(filled: Database) -> None:
    good = [Draft("test.batch", "db-1", {"n": n}) for n in range(1500)]
    with filled.ledger() as ledger:
        with pytest.raises(UsageError) as refused:
            ledger.append_all([*good, Draft("test.batch", "db-1", {"when": BEGIN})], actor="tester")
        assert refused.value.where == "$.when"
        assert ledger.verify().entries == 7


@pytest.mark.parametrize("seq", [3, 5000, 10_500])
def test_a_break_in_a_long_chain_ends_the_reading_of_it(database: Database, seq: int) -> None:
    """It is read page by page, and a page ahead."""
    with database.ledger() as ledger:
        ledger.append_all([Draft("test.batch", "db-1", {"n": n}) for n in range(11_000)], actor="tester")
        assert ledger.verify().entries == 11_000
        database.tamper(f"update ops_ledger.entries set actor = 'nobody' where seq = {seq}")
        check = ledger.verify()
        assert check.broken is not None
        assert (check.broken.seq, check.head_seq) == (seq, seq - 1)


def published(entries: list[Entry]) -> list[int]:
    return [entry.seq for entry in entries]


def test_the_outbox_holds_the_chosen_kinds_until_they_have_arrived(filled: Database) -> None:
    with filled.ledger() as ledger:
        ledger.append("action.plan", "db-0", {}, actor="tester")
        assert ledger.outbox() == [], "nothing is published unless somebody asks for it"
        ledger.publish(["action.", "backup.verification"])
        kinds = ("action.plan", "actions", "action.outcome", "backup.verification", "backup.verification.x", "backup.x")
        for kind in kinds:
            ledger.append(kind, "db-1", {"kind": kind}, actor="tester")
        assert published(ledger.outbox()) == [9, 11, 12]
        assert published(ledger.outbox(limit=2)) == [9, 11]
        ledger.published([9, 12])
        assert published(ledger.outbox()) == [11]
        ledger.publish([])
        ledger.append("action.plan", "db-0", {}, actor="tester")
        assert published(ledger.outbox()) == [11], "what stands there is not forgotten"
        ledger.append_all([], actor="tester")


def test_what_is_published_is_decided_in_the_entrys_own_transaction(filled: Database) -> None:
    with filled.ledger() as ledger:
        ledger.publish(["test."])
        with contextlib.suppress(ZeroDivisionError), ledger.transaction() as transaction:
            transaction.append("test.entry", "db-0", {}, actor="tester")
            raise ZeroDivisionError
        assert ledger.outbox() == []
        ledger.append_all([Draft("test.entry", "db-0", {})] * 1200, actor="tester")
        assert published(ledger.outbox(2000)) == list(range(8, 1208))


def test_who_ends_publishing_waits_for_those_who_are_about_to_fill_the_outbox(filled: Database) -> None:
    gone: list[int] = []
    with filled.ledger() as writer, filled.ledger() as other, filled.ledger() as third:
        third.publish(["test."])
        ending = threading.Thread(target=lambda: gone.append(other.publish_nothing(actor="tester")))
        with writer.transaction() as transaction:
            transaction.append("test.entry", "db-0", {}, actor="tester")
            ending.start()
            with closing(filled.connect()) as watching:
                waits = "select from pg_locks where locktype = 'advisory' and not granted"
                eventually(lambda: watching.execute(waits).fetchone() is not None)
        ending.join(60)
        assert (gone, third.outbox()) == ([1], [])


# Older ledgers


def as_version_1(database: Database) -> None:
    """A ledger as the first version made it, which had nothing but the entries."""
    from ops_platform.ledger import schema

    with closing(database.connect()) as connection:
        connection.execute(schema._STEPS[0])


def test_an_older_ledger_is_taken_up_with_what_stands_in_it(filled: Database) -> None:
    with closing(filled.superuser()) as connection:
        rows = connection.execute("select * from ops_ledger.entries order by seq").fetchall()
        connection.execute("drop schema ops_ledger cascade")
    as_version_1(filled)
    with closing(filled.connect()) as connection, connection.cursor() as cursor:
        cursor.executemany("insert into ops_ledger.entries values (%s, %s, %s, %s, %s, %s, %s, %s)", rows)
    start, failures = threading.Barrier(4), []

    def use() -> None:
        try:
            with filled.ledger() as ledger:
                start.wait(30)
                ledger.publish(["test."])
                ledger.append("test.entry", "db-0", {}, actor="tester")
        except OpsError as error:
            failures.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    with filled.ledger() as ledger:
        check = ledger.verify()
        assert (check.ok, check.entries) == (True, 11)
        assert published(ledger.outbox()) == [8, 9, 10, 11]


def test_a_role_that_may_not_change_an_older_ledger_uses_it_as_it_is(database: Database) -> None:
    as_version_1(database)
    writer = f"{database.name}_writer"
    database.cluster.sql(f"create role {writer} login")
    try:
        with closing(database.connect()) as connection:
            connection.execute(f"grant usage on schema ops_ledger to {writer}")
            connection.execute(f"grant select, insert on ops_ledger.entries to {writer}")
        with Ledger(lambda: database.cluster.server.connect(database.name, writer)) as ledger:
            assert ledger.append("test.entry", "db-0", {}, actor="tester").seq == 1
            assert ledger.verify().ok
            with pytest.raises(OpsError):
                ledger.outbox()
            assert ledger.publish_nothing(actor="tester") == 0
        with database.ledger() as owner:  # and the owner brings it up to date
            owner.publish(["test."])
        with Ledger(lambda: database.cluster.server.connect(database.name, writer)) as ledger:
            ledger.append("test.entry", "db-0", {}, actor="tester")
            assert ledger.publish_nothing(actor="tester") == 0, "and it empties none"
        with database.ledger() as owner:
            assert published(owner.outbox()) == [2], "a writer needs no rights on the outbox"
    finally:
        with closing(database.superuser()) as connection:
            connection.execute(f"drop owned by {writer}")
            connection.execute(f"drop role {writer}")


def test_a_disabled_trigger_is_reported(filled: Database) -> None:
    with closing(filled.superuser()) as connection:
        connection.execute("alter table ops_ledger.entries disable trigger append_only")
        connection.commit()
    with filled.ledger() as ledger:
        check = ledger.verify()
    assert check.broken is None
    assert not check.ok
    assert check.unprotected == ("the trigger append_only is not always on",)


def test_writers_at_once_make_one_chain_without_a_gap(database: Database) -> None:
    """Eight writers on an empty database: they also race to make the schema."""
    start, failures = threading.Barrier(8), []

    def write(number: int) -> None:
        try:
            with database.ledger() as ledger:
                start.wait(30)
                for turn in range(25):
                    ledger.append("test.race", f"writer-{number}", {"turn": turn}, actor="tester")
        except OpsError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    with database.ledger() as ledger:
        check = ledger.verify()
        assert (check.ok, check.entries) == (True, 200)
        for number in range(8):
            turns = [entry.body["turn"] for entry in ledger.entries(subject=f"writer-{number}")]
            assert turns == list(range(25))


def test_one_ledger_serves_several_threads(database: Database) -> None:
    with database.ledger() as ledger:
        threads = [
            threading.Thread(target=ledger.append, args=["test.thread", "x", {"n": n}], kwargs={"actor": "t"})
            for n in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert ledger.verify().entries == 12


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"a": {"password": Secret("hunter2")}}, "$.a.password"),
        ({"list": [1, Secret("hunter2")]}, "$.list[1]"),
        ({Secret("hunter2"): 1}, "$"),
        ({"when": BEGIN}, "$.when"),
        ({"nan": float("nan")}, "$.nan"),
        ({"nul": "a\0b"}, "$.nul"),
        ({"half": "\ud800"}, "$.half"),
        ({1: "x"}, "$"),
    ],
)
def test_secrets_and_what_is_no_json_are_refused_with_their_place(
    database: Database, body: dict[Any, Any], place: str
) -> None:
    with database.ledger() as ledger:
        with pytest.raises(UsageError) as refused:
            ledger.append("test.entry", "app-db", body, actor="tester")
        assert refused.value.where == place
        assert "hunter2" not in str(refused.value)
        assert ledger.entries() == []


@pytest.mark.parametrize("field", ["kind", "subject", "actor"])
def test_a_secret_is_no_actor_either(database: Database, field: str) -> None:
    named: dict[str, Any] = {"kind": "test.entry", "subject": "app-db", "actor": "tester", field: Secret("hunter2")}
    with database.ledger() as ledger, pytest.raises(UsageError, match="secret"):
        ledger.append(named["kind"], named["subject"], {}, actor=named["actor"])


def test_a_claim_is_held_by_one_and_freed_with_its_session(database: Database) -> None:
    with database.ledger() as one, database.ledger() as other:
        with one.claim("backup.expire/app-db") as mine, other.claim("backup.expire/app-db") as theirs:
            assert (mine, theirs) == (True, False)
            with other.claim("backup.expire/crm-db") as elsewhere:
                assert elsewhere
        with other.claim("backup.expire/app-db") as again:
            assert again


def test_a_database_that_does_not_answer_is_named(database: Database) -> None:
    def nowhere() -> psycopg.Connection[Any]:
        return psycopg.connect(host="127.0.0.1", port=1, dbname="ops", user="ops", password="hunter2")

    ledger = Ledger(nowhere)
    for use in (lambda: ledger.append("k", "s", {}, actor="a"), ledger.entries, ledger.verify):
        with pytest.raises(UnreachableError) as error:
            use()
        assert "hunter2" not in str(error.value)


def test_a_connection_that_was_cut_is_opened_again(database: Database) -> None:
    with database.ledger() as ledger:
        ledger.append("test.entry", "app-db", {}, actor="tester")
        with closing(database.superuser()) as connection:
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
            )
        assert ledger.append("test.entry", "app-db", {}, actor="tester").seq == 2


def test_a_role_without_rights_is_told_what_it_needs(filled: Database) -> None:
    reader = f"{filled.name}_reader"
    filled.cluster.sql(f"create role {reader} login")

    def connect() -> psycopg.Connection[Any]:
        return filled.cluster.server.connect(filled.name, reader)

    try:
        with Ledger(connect) as ledger, pytest.raises(AccessDeniedError, match="may not be used"):
            ledger.entries()
        with closing(filled.connect()) as connection:
            connection.execute(f"grant usage on schema ops_ledger to {reader}")
            connection.execute(f"grant select on ops_ledger.entries to {reader}")
        with Ledger(connect) as ledger:
            assert ledger.verify().entries == 7
            with pytest.raises(AccessDeniedError):
                ledger.append("test.entry", "app-db", {}, actor="tester")
    finally:
        with closing(filled.superuser()) as connection:
            connection.execute(f"drop owned by {reader}")
            connection.execute(f"drop role {reader}")


def test_a_writer_that_never_ends_is_named(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    from ops_platform.ledger import schema

    monkeypatch.setattr(schema, "LOCK_TIMEOUT", "50ms")
    with database.ledger() as ledger:
        ledger.append("test.entry", "app-db", {}, actor="tester")
        with closing(database.connect()) as connection, connection.transaction():
            connection.execute("select pg_advisory_xact_lock(%s, %s)", [schema.LOCK_SPACE, schema.APPEND])
            with pytest.raises(ConflictError, match="another writer"):
                ledger.append("test.entry", "app-db", {}, actor="tester")
        assert ledger.append("test.entry", "app-db", {}, actor="tester").seq == 2


def test_the_ledger_of_the_inventory(
    database: Database, new_platform: Callable[..., Any], shared_cluster: Cluster
) -> None:
    shared_cluster.sql(f"alter role {database.name} password 'pw'")
    platform = new_platform({"app-db": [shared_cluster]})
    (platform.home / "ledger").write_text("pw")
    (platform.home / "ledger").chmod(0o600)
    platform.body["platform"]["database"] = {
        "host": "127.0.0.1",
        "port": shared_cluster.port,
        "dbname": database.name,
        "user": database.name,
        "password": f"file://{platform.home}/ledger",
        "tls": {"mode": "disable"},
    }
    platform.reload()
    with Ledger(platform.access.platform_db) as ledger:
        assert ledger.append("test.entry", "app-db", {}, actor="tester").seq == 1


def _documented_query() -> str:
    text = (Path(__file__).parents[2] / "docs/reference/ledger.md").read_text()
    return text.partition("```sql\n")[2].partition("```")[0]


@pytest.mark.parametrize(
    ("statement", "broken"),
    [
        ("select 1", []),
        ("update ops_ledger.entries set actor = 'another' where seq = 3", [3]),
        ("delete from ops_ledger.entries where seq = 3", [4]),
        ("delete from ops_ledger.entries where seq = 1", [2]),
        (f"update ops_ledger.entries set sha256 = '{'a' * 64}' where seq = 3", [3, 4]),
    ],
)
def test_the_documented_query_finds_the_same_without_this_package(
    filled: Database, statement: str, broken: list[int]
) -> None:
    with filled.ledger() as ledger:
        ledger.append("test.kind", "app-db", {"zürich": '“x” \\ \n\t\x01\x1f\x7f 🜁 " /'}, actor='say "x" \\ \x02')
    filled.tamper(statement)
    with closing(filled.connect()) as connection:
        assert [row[0] for row in connection.execute(_documented_query())] == broken
