"""Expectations on a real PostgreSQL with the shop: good data passes, each damage makes its own expectation fail.

Great Expectations takes seconds to import, so one process of the tests imports it once and evaluates suite after suite; the
runner with its child is used for earnest where it is the one that is tested.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ops_platform.clients.processes import identify
from ops_platform.local.shop import SHOP_SQL
from ops_platform.recovery.expectations import SuiteResult, SuiteRunner, load_suite
from ops_platform.recovery.expectations_child import Outcome, Reply, Request
from ops_platform.recovery.expectations_views import Server
from tests.rig import Cluster

pytestmark = pytest.mark.xdist_group("expectations")  # one import of Great Expectations for all of them

SUITE = Path(__file__).parents[2] / "expectations/app-db.yaml"
LOOP = """
import sys
import great_expectations
from ops_platform.recovery.expectations_child import Request, evaluate
for line in sys.stdin:
    print("reply " + evaluate(Request.model_validate_json(line)).model_dump_json(), flush=True)
"""
ODD = """
create schema "Odd Schema";
create table "Odd Schema"."Tab ""x"" 100% :a" ("Spalte ""ä"" %s" int, "b.c" text, "数\n" int);
insert into "Odd Schema"."Tab ""x"" 100% :a" values (1, 'ann@example.com', 1), (2, null, 2);
create table public.empty (id int, word text);
create table public.nulls (id int, word text);
insert into public.nulls select from generate_series(1, 3);
create table public.words (id int, word text);
insert into public.words values (1, 'ann@example.com'), (2, 'bob@example.com');
"""


HOOK = """
import atexit, os, socket, sys
out = os.open({seen!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
ended = []
def note(event, arguments):
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    events = ("os.mkdir", "os.rename", "os.symlink", "socket.connect", "socket.getaddrinfo", "socket.sendto")
    if not ended and (writes or event in events):
        os.write(out, f"{{event}} {{arguments[0]}}\\n".encode())
@atexit.register
def connect():
    ended.append(True)
    try:
        socket.create_connection(("127.0.0.1", {port})).close()
    except PermissionError:
        os.write(out, b"refused\\n")
sys.addaudithook(note)
"""


class Evaluator:
    """Evaluates suites, written as text, in a process that has imported Great Expectations."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(directory / "log").open("wb"),
            text=True,
            cwd=directory,
        )

    def reply(self, suite: Path, server: Server, target: datetime, data_docs: Path | None = None) -> Reply:
        checks = load_suite(suite).checks
        docs = str(data_docs) if data_docs else None
        request = Request(title=suite.stem, checks=checks, server=server, recovery_target=target, data_docs=docs)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(request.model_dump_json() + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("reply "):
                return Reply.model_validate_json(line.removeprefix("reply "))
        raise AssertionError((self.directory / "log").read_text())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluator]:
    made = Evaluator(tmp_path_factory.mktemp("evaluator"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def shop(evaluator: Evaluator, shared_cluster: Cluster) -> Iterator[str]:
    """A database with the shop; it is copied, and never changed."""
    name = f"shop_{uuid.uuid4().hex[:8]}"
    shared_cluster.sql(f"create database {name}")
    shared_cluster.sql(SHOP_SQL.read_text() + ODD, name)
    yield name
    shared_cluster.sql(f"drop database {name} with (force)")


@pytest.fixture
def damaged(shared_cluster: Cluster, shop: str) -> Iterator[Callable[[str], str]]:
    """Makes a copy of the shop and runs the SQL that damages it."""
    name = f"{shop}_damaged"

    def damage(sql: str) -> str:
        shared_cluster.sql(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", "postgres", shop
        )
        shared_cluster.sql(f"create database {name} template {shop} strategy file_copy")
        shared_cluster.sql(f"set session_replication_role = replica; {sql}", name)
        return name

    yield damage
    shared_cluster.sql(f"drop database if exists {name} with (force)")


def server(cluster: Cluster, dbname: str) -> Server:
    return Server(str(cluster.server.sockets), cluster.server.socket_port, "postgres", dbname)


def failed(reply: Reply) -> set[str]:
    assert reply.could_not is None
    assert len(reply.outcomes) > 0
    return {outcome.title for outcome in reply.outcomes if not outcome.success}


# The shop's own suite


def test_on_good_data_all_holds_and_nothing_is_written_or_sent_elsewhere(
    shared_cluster: Cluster, shop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real child: what Python opens, makes or connects to in it is written down, and at its end it tries to connect."""
    seen = tmp_path / "seen"
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks/sitecustomize.py").write_text(HOOK.format(seen=str(seen), port=shared_cluster.port))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hooks"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here, docs = tmp_path / "here", tmp_path / "docs"
    here.mkdir()
    monkeypatch.chdir(here)
    with SuiteRunner(SUITE) as runner:
        pid = runner.pid
        result = run(runner, shared_cluster, shop, data_docs=docs)
    assert {outcome.title: outcome.why for outcome in result.results if not outcome.success} == {}
    assert result.success
    assert result.passed == len(load_suite(SUITE).checks) >= 10
    assert pid is not None
    assert identify(pid) is None
    assert_self_contained(docs, result)
    assert list(here.iterdir()) == []
    assert not (tmp_path / "home").exists()
    touched = [line.partition(" ") for line in seen.read_text().splitlines()]
    assert touched.pop()[0] == "refused"
    assert not [event for event, _, _ in touched if event.startswith("socket")]
    places = {Path(path) for _, _, path in touched if "__pycache__" not in path and path.startswith("/")}
    assert any(docs in place.parents for place in places)  # the hook sees what is written
    own = {
        place for place in places if place.parts[:2] == ("/", "tmp") and place.parts[2].startswith("ops-expectations-")
    }
    assert places - own - {place for place in places if docs in place.parents} <= {
        Path("/dev/null"),
        docs,
        *docs.parents,
    }


def run(runner: SuiteRunner, cluster: Cluster, dbname: str, data_docs: Path | None = None) -> SuiteResult:
    return runner.run(
        socket_directory=cluster.server.sockets,
        port=cluster.server.socket_port,
        user="postgres",
        dbname=dbname,
        recovery_target=datetime.now(UTC),
        data_docs=data_docs,
    )


def assert_self_contained(docs: Path, result: SuiteResult) -> None:
    assert result.data_docs == docs / "index.html"
    assert result.data_docs_error is None
    pages = sorted(docs.rglob("*.html"))
    assert len(pages) == 3
    assert sorted(path for path in docs.rglob("*") if path.is_file()) == pages
    for page in pages:
        text = page.read_text()
        assert "<script" not in text
        assert (
            text.index("default-src 'none'; style-src 'unsafe-inline'") < 200
        )  # and a browser would run and load nothing
        assert "http://" not in text
        assert "https://" not in text
    (page,) = docs.glob("validations/**/*.html")
    assert str(page.relative_to(docs)) in (docs / "index.html").read_text()
    for outcome in result.results:
        assert outcome.title in page.read_text()


DAMAGES = {
    "customers are lost": ("delete from shop.customers where id > 19000", {
        "All customers are there", "No order belongs to a customer that is not there",
    }),
    "products are lost": ("delete from shop.products where id = 7", {"All products are there"}),
    "orders are lost": ("delete from shop.orders where id = 59990", {
        "All orders are there", "No item belongs to an order that is not there", "Nobody paid more than the total of an order",
    }),
    "an item without order": ("insert into shop.order_items values (999999, 1, 1, 1, 1)", {
        "No item belongs to an order that is not there",
    }),
    "a null": ("alter table shop.customers alter email drop not null; update shop.customers set email = null where id = 5", {
        "Every customer has an email address",
    }),
    "an address twice": (
        "alter table shop.customers drop constraint customers_email_key; "
        "update shop.customers set email = 'CUSTOMER6@example.com' where id = 5",
        {"No two customers share an email address"},
    ),
    "an unknown status": (
        "alter table shop.orders drop constraint orders_status_check; update shop.orders set status = 'gone' where id = 4 and total > 0",
        {"Every order has a status that the application knows", "Every order that left the shop was paid"},
    ),
    "a wrong total": ("update shop.orders set total = total + 0.01 where id = 17", {"The total of each order is the sum of its items"}),
    "a payment too high": ("update shop.payments set amount = amount + 0.01 where order_id = 17", {
        "Nobody paid more than the total of an order",
    }),
    "a payment of nothing": ("update shop.payments set amount = 0 where order_id = 17", {"Every payment is more than nothing"}),
    "a payment is lost": ("delete from shop.payments where order_id = 17", {"Every order that left the shop was paid"}),
    "a scan is lost": ("select lo_unlink(scan) from shop.invoices where order_id = 9", {"Every invoice has its scan"}),
    "a sequence fell back": ("select setval('shop.orders_id_seq', 100)", {"Numbers that come next are higher than those in use"}),
}  # fmt: skip


# Damages whose expectations are not the same share a copy of the shop.
TOGETHER = [
    ["customers are lost", "a payment of nothing", "a scan is lost", "a wrong total"],
    ["products are lost", "orders are lost", "a null"],
    ["an item without order", "an address twice", "a payment too high", "a sequence fell back"],
    ["an unknown status"],
    ["a payment is lost"],
]


def test_every_damage_is_done_and_none_hides_behind_another() -> None:
    assert sorted(what for group in TOGETHER for what in group) == sorted(DAMAGES)
    for group in TOGETHER:
        expected = [title for what in group for title in DAMAGES[what][1]]
        assert len(expected) == len(set(expected)) > 0


@pytest.mark.parametrize("group", TOGETHER, ids=", ".join)
def test_each_damage_makes_its_own_expectations_fail(
    evaluator: Evaluator, shared_cluster: Cluster, damaged: Callable[[str], str], group: list[str]
) -> None:
    name = damaged("; ".join(DAMAGES[what][0] for what in group))
    reply = evaluator.reply(SUITE, server(shared_cluster, name), datetime.now(UTC))
    assert failed(reply) == {title for what in group for title in DAMAGES[what][1]}


def test_old_data_and_a_month_without_partition_fail(evaluator: Evaluator, shared_cluster: Cluster, shop: str) -> None:
    """The same data, judged at another recovery target: freshness is a question of the target, not of today."""
    fresh = "The newest order is not older than a week, and none is from the future"
    there = server(shared_cluster, shop)
    assert failed(evaluator.reply(SUITE, there, datetime.now(UTC) + timedelta(days=8))) == {fresh}
    assert failed(evaluator.reply(SUITE, there, datetime.now(UTC) - timedelta(days=2))) == {fresh}
    late = failed(evaluator.reply(SUITE, there, datetime.now(UTC) + timedelta(days=400)))
    assert late == {fresh, "Orders of this month and the next have a partition"}


def test_a_shop_that_is_gone_fails_everywhere(
    evaluator: Evaluator, shared_cluster: Cluster, damaged: Callable[[str], str]
) -> None:
    reply = evaluator.reply(SUITE, server(shared_cluster, damaged("drop schema shop cascade")), datetime.now(UTC))
    assert len(failed(reply)) == len(reply.outcomes) == len(load_suite(SUITE).checks)


def test_an_empty_shop_does_not_pass_where_nothing_was_looked_at(
    evaluator: Evaluator, shared_cluster: Cluster, damaged: Callable[[str], str]
) -> None:
    name = damaged(
        "truncate shop.customers, shop.products, shop.orders, shop.order_items, shop.payments, shop.invoices"
    )
    reply = evaluator.reply(SUITE, server(shared_cluster, name), datetime.now(UTC))
    assert {outcome.title for outcome in reply.outcomes if outcome.success and outcome.table is not None} == set()


# What suites can say


def evaluated(
    evaluator: Evaluator, cluster: Cluster, dbname: str, text: str, data_docs: Path | None = None
) -> tuple[Outcome, ...]:
    file = evaluator.directory / "suite.yaml"
    file.write_text("version: 1\nexpectations:\n" + textwrap.indent(textwrap.dedent(text).strip(), "  "))
    reply = evaluator.reply(file, server(cluster, dbname), datetime.now(UTC), data_docs)
    assert reply.could_not is None
    assert reply.refusals == ()
    assert reply.data_docs_error is None
    return reply.outcomes


def test_names_of_every_kind_work(evaluator: Evaluator, shared_cluster: Cluster, shop: str) -> None:
    outcomes = evaluated(
        evaluator,
        shared_cluster,
        shop,
        r"""
        - {table: 'shop."Notizen über Kunden"', expect: table_row_count_to_equal, value: 2}
        - {table: 'shop."Notizen über Kunden"', expect: column_to_exist, column: 'Text mit "Zitat"'}
        - {table: 'shop."Notizen über Kunden"', expect: column_values_to_be_unique, column: 'Text mit "Zitat"'}
        - {table: '"Odd Schema"."Tab ""x"" 100% :a"', expect: column_values_to_not_be_null, column: 'Spalte "ä" %s'}
        - {table: '"Odd Schema"."Tab ""x"" 100% :a"', expect: column_values_to_be_unique, column: 'Spalte "ä" %s'}
        - {table: '"Odd Schema"."Tab ""x"" 100% :a"', expect: column_max_to_be_between, column: 'Spalte "ä" %s', max_value: 2}
        - {table: '"Odd Schema"."Tab ""x"" 100% :a"', expect: column_values_to_not_be_null, column: b.c}
        - {table: '"Odd Schema"."Tab ""x"" 100% :a"', expect: column_values_to_be_unique, column: "数\n"}
        - table: '"Odd Schema"."Tab ""x"" 100% :a"'
          expect: compound_columns_to_be_unique
          column_list: ['Spalte "ä" %s', b.c]
        - table: '"Odd Schema"."Tab ""x"" 100% :a"'
          expect: table_row_count_to_equal_other_table
          other_table_name: 'shop."Notizen über Kunden"'
        - {table: words, expect: column_values_to_be_of_type, column: word, type_: TEXT}
    """,
    )
    assert [(outcome.success, outcome.error) for outcome in outcomes] == [(number != 6, None) for number in range(11)]
    assert outcomes[6].observed == "1 of 2 unexpected"
    assert outcomes[3].column == 'Spalte "ä" %s'


def test_queries_are_sql_as_postgresql_reads_it(evaluator: Evaluator, shared_cluster: Cluster, shop: str) -> None:
    outcomes = evaluated(
        evaluator,
        shared_cluster,
        shop,
        r"""
        - query: |
            with a as (select '50% :off' as text, 7 % 4 as rest, '{"a": 1}'::jsonb ? 'a' as has)  -- a remark
            select * from a;
          expect: column_values_to_be_in_set
          column: text
          value_set: ["50% :off"]
        - {query: "select 7 % 4 as rest, '10:30'::time as at", expect: column_values_to_be_between, column: rest, min_value: 3, max_value: 3}
        - {query: "select 7 % 4 as rest", expect: column_values_to_be_of_type, column: rest, type_: INTEGER}
        - {query: "select {recovery_target - 1m} as at", expect: column_values_to_be_between, column: at, max_value: "{recovery_target}"}
        - {query: "select {recovery_target + 1m} as at", expect: column_values_to_be_between, column: at, max_value: "{recovery_target}"}
        - {query: "select from shop.orders where id < 0", expect: table_row_count_to_equal, value: 0}
        - table: words
          expect: unexpected_rows_expectation
          unexpected_rows_query: select * from {batch} where id > 1
    """.replace("select * from a;", "select * from a"),
    )
    assert [outcome.success for outcome in outcomes] == [True, True, True, True, False, True, False]
    assert outcomes[6].observed == "1"
    assert datetime.fromisoformat(outcomes[3].kwargs["max_value"]).utcoffset() == timedelta(0)


def test_what_cannot_be_asked_has_failed_with_its_reason(
    evaluator: Evaluator, shared_cluster: Cluster, shop: str
) -> None:
    outcomes = evaluated(
        evaluator,
        shared_cluster,
        shop,
        """
        - {table: shop.nope, expect: table_row_count_to_equal, value: 0}
        - {table: nowhere.orders, expect: column_to_exist, column: id}
        - {table: shop.orders, expect: column_values_to_not_be_null, column: nope}
        - {table: shop.orders, expect: column_sum_to_be_between, column: status, min_value: 0}
        - {table: shop.orders, expect: column_max_to_be_between, column: status, min_value: 0}
        - {query: selekt 1, expect: table_row_count_to_equal, value: 1}
        - {query: select 1 as a; select 2 as b, expect: table_row_count_to_equal, value: 1}
        - {query: "select 1 as a, 2 as a", expect: table_row_count_to_equal, value: 1}
        - {query: select 1 / (id - 1) as a from words, expect: column_values_to_not_be_null, column: a}
        - {query: select word::int as a from words, expect: column_values_to_not_be_null, column: a}
        - {query: "insert into words values (3, 'c') returning id", expect: table_row_count_to_equal, value: 1}
        - {query: "select setval('shop.orders_id_seq', 1) as a", expect: column_values_to_not_be_null, column: a}
        - {table: words, expect: table_row_count_to_equal, value: 2}
    """,
    )
    assert [outcome.success for outcome in outcomes] == [False] * 12 + [True]
    errors = [outcome.error or "" for outcome in outcomes]
    assert errors[0] == 'PostgreSQL: relation "shop.nope" does not exist'
    assert errors[1] == 'PostgreSQL: relation "nowhere.orders" does not exist'
    assert '"nope"' in errors[2]
    assert errors[3] == "PostgreSQL: function sum(text) does not exist"
    assert "syntax error" in errors[5]
    assert "syntax error" in errors[6]
    assert errors[7] == 'PostgreSQL: column "a" specified more than once'
    assert errors[9] == "PostgreSQL: InvalidTextRepresentation"  # without the value
    assert "read-only transaction" in errors[11]
    assert all(errors[:12])
    assert outcomes[12].error is None


VACUOUS = [
    ("column_values_to_be_between", {"column": "id", "max_value": 9}),
    ("column_values_to_be_in_set", {"column": "word", "value_set": ["a"]}),
    ("column_values_to_be_unique", {"column": "id"}),
    ("column_values_to_match_regex", {"column": "word", "regex": "a"}),
    ("column_distinct_values_to_be_in_set", {"column": "word", "value_set": ["a"]}),
    ("compound_columns_to_be_unique", {"column_list": ["id", "word"]}),
    ("column_pair_values_to_be_equal", {"column_A": "id", "column_B": "id"}),
    ("column_max_to_be_between", {"column": "id", "max_value": 9}),
]


@pytest.mark.parametrize("table", ["empty", "nulls"])
def test_an_expectation_that_looked_at_nothing_has_failed(
    evaluator: Evaluator, shared_cluster: Cluster, shop: str, table: str
) -> None:
    entries = [json.dumps({"table": table, "expect": kind, **arguments}) for kind, arguments in VACUOUS]
    outcomes = evaluated(evaluator, shared_cluster, shop, "\n".join(f"- {entry}" for entry in entries))
    assert [outcome.success for outcome in outcomes] == [False] * len(VACUOUS)
    assert ["no value was looked at" in (outcome.error or "") for outcome in outcomes] == [True] * 7 + [False]
    allowed = [json.dumps({**json.loads(entry), "may_be_empty": True}) for entry in entries[:7]]
    outcomes = evaluated(evaluator, shared_cluster, shop, "\n".join(f"- {entry}" for entry in allowed))
    assert [outcome.success for outcome in outcomes] == [True] * 7
    nulls = [{"table": table, "expect": f"column_values_to_{what}be_null", "column": "id"} for what in ("", "not_")]
    outcomes = evaluated(evaluator, shared_cluster, shop, "\n".join(f"- {json.dumps(entry)}" for entry in nulls))
    assert [outcome.success for outcome in outcomes] == [table == "nulls", False]


def test_texts_of_the_data_stand_in_no_result_and_on_no_page(
    evaluator: Evaluator, shared_cluster: Cluster, shop: str, tmp_path: Path
) -> None:
    outcomes = evaluated(
        evaluator,
        shared_cluster,
        shop,
        """
        - {table: words, expect: column_values_to_be_in_set, column: word, value_set: [x]}
        - {table: words, expect: column_distinct_values_to_equal_set, column: word, value_set: [x]}
        - {table: words, expect: column_distinct_values_to_contain_set, column: word, value_set: [x]}
        - {table: words, expect: column_most_common_value_to_be_in_set, column: word, value_set: [x]}
        - {table: words, expect: column_values_to_match_regex, column: word, regex: "^x"}
        - {table: words, expect: unexpected_rows_expectation, unexpected_rows_query: "select * from {batch}"}
        - {query: select word::int as a from words, expect: column_values_to_not_be_null, column: a}
        - {query: select max(word) as newest from words, expect: column_values_to_be_in_set, column: newest, value_set: [x]}
        - {table: words, expect: column_max_to_be_between, column: id, max_value: 1}
        - {table: words, expect: column_quantile_values_to_be_between, column: id, quantile_ranges: {quantiles: [0.5], value_ranges: [[5, 9]]}}
        - {table: nope, expect: column_values_to_not_be_null, column: a, description: "Less < more & <b>bold</b>"}
    """,
        tmp_path / "docs",
    )
    assert [outcome.success for outcome in outcomes] == [False] * 11
    assert outcomes[8].observed == "2"
    told = " ".join(outcome.model_dump_json() for outcome in outcomes)
    pages = " ".join(page.read_text() for page in (tmp_path / "docs").rglob("*.html"))
    assert "example.com" not in told
    assert "example.com" not in pages
    assert "Traceback" not in told + pages
    assert "Less &lt; more &amp; &lt;b&gt;bold" in pages
    assert "<b>bold</b>" not in pages
    for outcome in outcomes[:10]:
        assert outcome.title in pages


def test_the_same_expectation_twice_is_evaluated_twice(
    evaluator: Evaluator, shared_cluster: Cluster, shop: str
) -> None:
    one = "- {table: words, expect: table_row_count_to_equal, value: 2}\n"
    assert [outcome.success for outcome in evaluated(evaluator, shared_cluster, shop, one * 2)] == [True, True]


def test_nothing_is_left_in_the_database(evaluator: Evaluator, shared_cluster: Cluster, shop: str) -> None:
    objects = "select count(*) from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname !~ '^pg_toast_temp|^pg_temp'"
    before = shared_cluster.sql(objects, shop)
    assert failed(evaluator.reply(SUITE, server(shared_cluster, shop), datetime.now(UTC))) == set()
    assert shared_cluster.sql(objects, shop) == before


# What proves nothing


def test_values_that_great_expectations_refuses_are_mistakes_of_the_suite(
    evaluator: Evaluator, shared_cluster: Cluster, shop: str
) -> None:
    file = evaluator.directory / "refused.yaml"
    file.write_text(
        "version: 1\nexpectations:\n"
        "  - {table: words, expect: column_values_to_be_between, column: id, min_value: soon}\n"
        "  - {table: words, expect: column_values_to_not_be_null, column: id, mostly: 7}\n"
        "  - {table: words, expect: column_values_to_be_between, column: id}\n"
    )
    reply = evaluator.reply(file, server(shared_cluster, shop), datetime.now(UTC))
    assert reply.outcomes == ()
    assert [(refusal.number, refusal.key) for refusal in reply.refusals] == [(0, "min_value"), (1, "mostly"), (2, "")]


def test_a_server_that_is_not_there_proves_nothing(
    evaluator: Evaluator, shared_cluster: Cluster, tmp_path: Path
) -> None:
    reply = evaluator.reply(SUITE, Server(str(tmp_path), 5432, "postgres", "shop"), datetime.now(UTC))
    assert "does not answer" in (reply.could_not or "")
    reply = evaluator.reply(SUITE, server(shared_cluster, "no such database"), datetime.now(UTC))
    assert "does not exist" in (reply.could_not or "")
    assert reply.outcomes == ()


def test_a_server_that_goes_away_meanwhile_proves_nothing(
    evaluator: Evaluator, shared_cluster: Cluster, damaged: Callable[[str], str]
) -> None:
    """The second question ends all sessions of the database and lets nobody in any more."""
    name = damaged("select 1")
    shared_cluster.sql(
        f"""
        create function leave() returns int language plpgsql as $$ begin
            perform pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}' and pid <> pg_backend_pid();
            perform pg_terminate_backend(pg_backend_pid()); return 1;
        end $$""",
        name,
    )
    file = evaluator.directory / "leaving.yaml"
    file.write_text(
        "version: 1\nexpectations:\n"
        "  - {table: words, expect: table_row_count_to_equal, value: 2}\n"
        "  - {query: select leave() as a, expect: column_values_to_not_be_null, column: a}\n"
    )
    reply = evaluator.reply(file, server(shared_cluster, name), datetime.now(UTC))
    assert reply.could_not is not None
    assert reply.outcomes == ()


def test_a_server_that_is_killed_meanwhile_proves_nothing(
    new_cluster: Callable[..., Cluster], evaluator: Evaluator
) -> None:
    """The session is cut without a word; only asking again tells that it was the server and not the data."""
    cluster = new_cluster(18)
    cluster.sql(f"""
        create table public.words as select 1 as id;
        create function leave() returns int language plpgsql as $$ begin
            execute format('copy (select 1) to program %L', 'kill -9 {cluster.server.pid} ' || pg_backend_pid());
            perform pg_sleep(60); return 1;
        end $$""")
    file = evaluator.directory / "killed.yaml"
    file.write_text(
        "version: 1\nexpectations:\n"
        "  - {table: words, expect: table_row_count_to_equal, value: 1}\n"
        "  - {query: select leave() as a, expect: column_values_to_not_be_null, column: a}\n"
    )
    reply = evaluator.reply(file, server(cluster, "postgres"), datetime.now(UTC))
    assert reply.could_not is not None
    assert reply.outcomes == ()


def test_a_server_in_recovery_is_not_asked(new_cluster: Callable[..., Cluster], evaluator: Evaluator) -> None:
    cluster = new_cluster(18)
    cluster.server.stop("fast")
    (cluster.server.directory / "standby.signal").touch()
    cluster.server.user.own(cluster.server.directory / "standby.signal")
    cluster.server.start()
    reply = evaluator.reply(SUITE, server(cluster, "postgres"), datetime.now(UTC))
    assert "still in recovery" in (reply.could_not or "")


def test_pages_that_cannot_be_written_do_not_undo_the_result(
    evaluator: Evaluator, shared_cluster: Cluster, shop: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    file = evaluator.directory / "one.yaml"
    file.write_text("version: 1\nexpectations:\n  - {table: words, expect: table_row_count_to_equal, value: 2}\n")
    reply = evaluator.reply(file, server(shared_cluster, shop), datetime.now(UTC), tmp_path / "file")
    assert [outcome.success for outcome in reply.outcomes] == [True]
    assert reply.data_docs is None
    assert reply.data_docs_error
