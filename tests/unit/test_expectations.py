"""Suites of expectations: their mistakes, their parameters, and the child that must never be believed when it said nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ops_platform.clients.processes import identify
from ops_platform.errors import CouldNotVerifyError, InventoryError, UsageError
from ops_platform.inventory import InventoryMistakes, format_duration
from ops_platform.recovery.expectations import SuiteResult, SuiteRunner, load_suite, run_suite
from ops_platform.recovery.expectations_views import CouldNotAskError, reason, said
from ops_platform.recovery.suite import Check, expand, expand_sql, expanded, kinds, names

ROOT = Path(__file__).parents[2]
TARGET = datetime(2026, 3, 1, 2, 59, 59, 500_000, tzinfo=UTC)
GOOD = """\
version: 1
expectations:
  - table: shop.orders
    expect: column_values_to_not_be_null
    column: customer_id
  - query: select max(placed_at) as newest from shop.orders
    expect: expect_column_values_to_be_between
    column: newest
    min_value: "{recovery_target - 10m}"
    max_value: "{recovery_target}"
"""


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        file = tmp_path / "suite.yaml"
        file.write_text(text)
        return file

    return write


def entry(text: str) -> str:
    """A suite of one expectation, whose keys begin in line 3."""
    return "version: 1\nexpectations:\n  - " + textwrap.indent(textwrap.dedent(text), "    ").strip() + "\n"


# Reading


def test_a_suite_is_read_with_and_without_the_prefix(written: Callable[[str], Path]) -> None:
    suite = load_suite(written(GOOD))
    assert suite.name == "suite.yaml"
    assert [check.kind for check in suite.checks] == [
        "expect_column_values_to_not_be_null",
        "expect_column_values_to_be_between",
    ]
    assert suite.checks[0] == Check(
        number=0, kind="expect_column_values_to_not_be_null", arguments={"column": "customer_id"}, table="shop.orders"
    )
    assert suite.checks[0].title == "shop.orders: column values to not be null of customer_id"
    assert suite.checks[1].title == "query: column values to be between of newest"


def test_the_description_is_the_title(written: Callable[[str], Path]) -> None:
    suite = load_suite(
        written(
            entry("""
        table: t
        expect: compound_columns_to_be_unique
        column_list: [a, b]
        description: No row stands here twice
    """)
        )
    )
    assert suite.checks[0].title == "No row stands here twice"
    assert suite.checks[0].column == "a, b"


def test_the_shop_has_a_suite_with_a_title_for_each_expectation() -> None:
    suite = load_suite(ROOT / "expectations/app-db.yaml")
    titles = [check.title for check in suite.checks]
    assert 10 <= len(titles) == len(set(titles))
    assert all("description" in check.arguments for check in suite.checks)


def test_what_great_expectations_knows_is_read_without_importing_it() -> None:
    known = kinds()
    assert len(known) > 50
    assert known["expect_column_values_to_be_between"].required == ("column",)
    assert {"min_value", "max_value", "mostly", "strict_min"} <= set(
        known["expect_column_values_to_be_between"].arguments
    )
    assert "unexpected_rows_expectation" in known
    assert "expect_query_results_to_match_comparison" not in known  # there is no second data source


def test_reading_a_suite_imports_nothing_heavy(written: Callable[[str], Path]) -> None:
    code = f"""
        import sys
        from pathlib import Path
        from ops_platform.recovery.expectations import load_suite
        load_suite(Path({str(written(GOOD))!r}))
        print([name for name in ("great_expectations", "pandas", "numpy", "sqlalchemy", "dagster") if name in sys.modules])
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=60
    )
    assert out.stdout.strip() == "[]"


ENTRY = "table: shop.orders\nexpect: column_values_to_be_between\ncolumn: total\n"
MISTAKES = [
    # what is written, line, key, words of the message
    ("", 1, "", "a suite is a mapping that begins with `version: 1`"),
    ("- version: 1", 1, "", "a suite is a mapping"),
    ("expectations: []", 1, "version", "the key 'version' is missing"),
    ("version: 2\nexpectations: []", 1, "version", "this should be 1"),
    ("version: 1\nexpectations: []", 2, "expectations", "a suite without expectations proves nothing"),
    ("version: 1", 1, "expectations", "the key 'expectations' is missing"),
    ("version: 1\nexpectation: []", 2, "expectation", "did you mean 'expectations'?"),
    ("version: 1\nexpectations: {}", 2, "expectations", "this should be a list, not a mapping"),
    ("version: 1\nexpectations:\n  - words", 3, "expectations[0]", "this should be a mapping, not a text"),
    (entry("table: shop.orders"), 3, "expectations[0].expect", "the key 'expect' is missing"),
    (entry("expect: table_row_count_to_equal\nvalue: 1"), 3, "expectations[0]", "either a table or a query"),
    (
        entry("table: t\nquery: select 1\nexpect: table_row_count_to_equal\nvalue: 1"),
        3, "expectations[0]", "either a table or a query",
    ),
    (entry("table: 5\nexpect: table_row_count_to_equal\nvalue: 1"), 3, "expectations[0].table", "a text, not 5"),
    (entry("table: a.b.c\nexpect: table_row_count_to_equal\nvalue: 1"), 3, "expectations[0].table", "is not the name of a table"),
    (entry("table: shop.my orders\nexpect: table_row_count_to_equal\nvalue: 1"), 3, "expectations[0].table", "in double quotes"),
    (entry("table: t\nexpect: column_values_not_null\ncolumn: c"), 4, "expectations[0].expect", "column_values_to_not_be_null"),
    (entry("table: t\nexpect: zzzz"), 4, "expectations[0].expect", "there is no expectation 'zzzz'"),
    (entry("table: t\nexpect: column_values_to_not_be_null\ncolum: c"), 5, "expectations[0].colum", "did you mean 'column'?"),
    (entry("table: t\nexpect: column_values_to_not_be_null"), 3, "expectations[0]", "needs the key 'column'"),
    (entry(ENTRY + "severity: info"), 6, "expectations[0].severity", "there is no key 'severity' here"),
    (entry(ENTRY + "catch_exceptions: true"), 6, "expectations[0].catch_exceptions", "there is no key"),
    (entry(ENTRY + "min_value:"), 6, "expectations[0].min_value", "nothing stands here"),
    (entry(ENTRY + "may_be_empty: perhaps"), 6, "expectations[0].may_be_empty", "true or false, not a text"),
    (entry(ENTRY + "min_value: 1\nmin_value: 2"), 7, "expectations[0].min_value", "stands here twice"),
    (entry(ENTRY + 'min_value: "{recovery_targt}"'), 6, "expectations[0].min_value", "is not a parameter"),
    (entry(ENTRY + 'min_value: "{Recovery_target}"'), 6, "expectations[0].min_value", "is not a parameter"),
    (entry(ENTRY + 'min_value: "{recovery_target - 10}"'), 6, "expectations[0].min_value", "is not a duration"),
    (entry(ENTRY + 'min_value: "{recovery_target * 2}"'), 6, "expectations[0].min_value", "is not a parameter"),
    (entry(ENTRY + 'min_value: "{recovery_target - 10m"'), 6, "expectations[0].min_value", "is not a parameter"),
    (entry(ENTRY + 'min_value: "after {recovery_target}"'), 6, "expectations[0].min_value", "stands alone"),
    (entry(ENTRY + 'min_value: "{recovery_target - 200000w}"'), 6, "expectations[0].min_value", "longer than a century"),
    (entry(ENTRY + 'min_value: "{recovery_target - 99999999999999999w}"'), 6, "expectations[0].min_value", "is not a duration"),
    (
        entry("table: t\nexpect: column_values_to_be_in_set\ncolumn: c\nvalue_set:\n  - a\n  - '{recovery_target + x}'"),
        8, "expectations[0].value_set[1]", "is not a duration",
    ),
    (
        entry("query: select {recovery_targets}\nexpect: table_row_count_to_equal\nvalue: 1"),
        3, "expectations[0].query", "is not a parameter",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "key", "words"), MISTAKES)
def test_a_mistake_is_named_by_file_line_and_key(
    written: Callable[[str], Path], text: str, line: int, key: str, words: str
) -> None:
    with pytest.raises(InventoryError) as raised:
        load_suite(written(text))
    said = str(raised.value)
    assert words in said
    assert f"suite.yaml:{line}:" in said
    if key:
        assert isinstance(raised.value, InventoryMistakes)
        found = [mistake for mistake in raised.value.mistakes if words in str(mistake)]
        assert [(mistake.where, mistake.key) for mistake in found] == [(f"suite.yaml:{line}", key)]


def test_all_mistakes_are_said_at_once_in_the_order_of_the_lines(written: Callable[[str], Path]) -> None:
    text = (
        GOOD.replace("column: customer_id", "colunm: customer_id")
        .replace("10m", "10")
        .replace("shop.orders\n    e", "a b\n    e")
    )
    with pytest.raises(InventoryMistakes) as raised:
        load_suite(written(text))
    where = [int(mistake.where.rpartition(":")[2]) for mistake in raised.value.mistakes]
    assert where == sorted(where)
    assert {mistake.key for mistake in raised.value.mistakes} == {
        "expectations[0]", "expectations[0].table", "expectations[0].colunm", "expectations[1].min_value",
    }  # fmt: skip


def test_a_suite_that_is_not_there_says_where_its_name_stands(tmp_path: Path) -> None:
    with pytest.raises(InventoryError, match=r"verification\.expectations\.suite"):
        load_suite(tmp_path / "none.yaml")


@pytest.mark.parametrize("kind", ["expect_column_values_to_be_between", "column_values_to_be_between"])
def test_braces_that_are_no_parameters_are_left_alone(written: Callable[[str], Path], kind: str) -> None:
    text = entry("table: t\nexpect: column_values_to_match_regex\ncolumn: c\nregex: '^[a-z]{3,5}{x}$'")
    assert load_suite(written(text)).checks[0].arguments["regex"] == "^[a-z]{3,5}{x}$"
    rows = entry(
        "table: t\nexpect: unexpected_rows_expectation\nunexpected_rows_query: select * from {batch} where at > {recovery_target}"
    )
    check = load_suite(written(rows)).checks[0]
    assert expanded(check, TARGET)["unexpected_rows_query"] == (
        "select * from {batch} where at > timestamptz '2026-03-01T02:59:59.500000+00:00'"
    )


# Names


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=2
    )
)
def test_every_name_can_be_written_in_quotes(parts: list[str]) -> None:
    table = ".".join('"' + part.replace('"', '""') + '"' for part in parts)
    assert names(table) == tuple(parts)


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        ("orders", ("orders",)),
        ("Shop.Orders", ("shop", "orders")),
        ("größe.ÄRGER", ("größe", "Ärger")),
        ('shop."Notizen über Kunden"', ("shop", "Notizen über Kunden")),
        ('"a.b".c', ("a.b", "c")),
        ('"a""b"', ('a"b',)),
        ("t$1", ("t$1",)),
        ("", ()),
        (".t", ()),
        ("t.", ()),
        ("a.b.c", ()),
        ("a b", ()),
        ('"a', ()),
        ('"a"b', ()),
        ("1t", ()),
        ("a; drop table b", ()),
    ],
)
def test_names_are_read_as_postgresql_reads_them(table: str, parts: tuple[str, ...]) -> None:
    assert names(table) == parts


# Parameters

moments = st.datetimes(datetime(1990, 1, 1), datetime(2200, 1, 1), timezones=st.timezones())  # noqa: DTZ001 - zones are drawn
spans = st.timedeltas(timedelta(0), timedelta(days=3000)).map(lambda span: timedelta(seconds=int(span.total_seconds())))
spaces = st.text(" ", max_size=2)


@given(moments, spans, st.sampled_from("+-"), spaces, spaces)
def test_a_parameter_becomes_an_aware_time_in_utc(moment: datetime, span: timedelta, sign: str, a: str, b: str) -> None:
    found = expand(f"{{{a}recovery_target{b}{sign}{a}{format_duration(span)}{b}}}", moment)
    assert found == moment.astimezone(UTC) + (span if sign == "+" else -span)
    assert found.tzinfo is UTC


@given(
    moments,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
)
def test_values_without_parameters_stay_as_they_are(moment: datetime, value: object) -> None:
    assume("recovery_target" not in repr(value))
    assert expand(value, moment) == value


@given(moments)
def test_parameters_are_found_in_lists_and_mappings(moment: datetime) -> None:
    value = {"a": ["{recovery_target}", 1], "b": {"c": "{recovery_target + 1h30m}"}}
    utc = moment.astimezone(UTC)
    assert expand(value, moment) == {"a": [utc, 1], "b": {"c": utc + timedelta(minutes=90)}}


@given(moments, spans)
def test_in_sql_a_parameter_is_a_literal_with_its_zone(moment: datetime, span: timedelta) -> None:
    sql = expand_sql(f"select {{recovery_target}}, {{recovery_target - {format_duration(span)}}}, '{{a}}' %", moment)
    literals = [datetime.fromisoformat(text) for text in re.findall(r"timestamptz '([^']+)'", sql)]
    assert literals == [moment.astimezone(UTC), moment.astimezone(UTC) - span]
    assert all(literal.utcoffset() == timedelta(0) for literal in literals)
    assert sql.endswith(", '{a}' %")


def test_a_target_in_another_zone_is_the_same_moment() -> None:
    berlin = TARGET.astimezone(timezone(timedelta(hours=1)))
    assert expand("{recovery_target}", berlin) == TARGET
    assert expand_sql("{recovery_target}", berlin) == "timestamptz '2026-03-01T02:59:59.500000+00:00'"


# Errors


def test_an_error_says_what_postgresql_said_without_the_query() -> None:
    text = (
        '(psycopg.errors.UndefinedTable) relation "shop.nope" does not exist\nLINE 1: select 1\n[SQL: select 1 from shop.nope]\n'
        "(Background on this error at: https://sqlalche.me/e/21/f405)"
    )
    assert reason(text) == 'PostgreSQL: relation "shop.nope" does not exist'
    assert (
        reason('Error: The column "nope" in BatchData does not exist.\nmore')
        == 'Error: The column "nope" in BatchData does not exist.'
    )
    assert reason("") == "no reason was given"


@pytest.mark.parametrize("name", ["InvalidTextRepresentation", "NumericValueOutOfRange", "UniqueViolation"])
def test_an_error_that_quotes_a_value_is_only_named(name: str) -> None:
    assert reason(f'(psycopg.errors.{name}) something with the value "ann@example.com"') == f"PostgreSQL: {name}"


@pytest.mark.parametrize(
    "name", ["DiskFull", "OutOfMemory", "TooManyConnections", "AdminShutdown", "CrashShutdown", "QueryCanceled"]
)
def test_a_server_that_gives_up_says_nothing_of_the_data(name: str) -> None:
    with pytest.raises(CouldNotAskError):
        reason(f"(psycopg.errors.{name}) it is over")


@pytest.mark.parametrize(
    ("sqlstate", "message"), [("XX001", "invalid page in block 3"), ("58P01", "could not open file"), (None, "eh")]
)
def test_damage_is_told_as_it_is(sqlstate: str | None, message: str) -> None:
    assert said("Error", sqlstate, message) == f"PostgreSQL: {message}"


# The child

RUN = {"socket_directory": Path("/nowhere"), "port": 1, "user": "postgres", "dbname": "shop", "recovery_target": TARGET}


@pytest.fixture
def acting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a module where the child finds it first: `sitecustomize` runs at its start, others stand in for heavy imports."""
    place = tmp_path / "acting"
    place.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(place))

    def act(module: str, code: str) -> None:
        (place / f"{module}.py").write_text(textwrap.dedent(code))

    return act


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while identify(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    return identify(pid) is None


def test_a_killed_child_proves_nothing(written: Callable[[str], Path]) -> None:
    with SuiteRunner(written(GOOD)) as runner:
        assert runner.pid is not None
        os.kill(runner.pid, signal.SIGKILL)
        with pytest.raises(CouldNotVerifyError, match="ended by signal 9"):
            runner.run(**RUN)


def test_a_child_that_takes_too_long_is_ended_and_proves_nothing(written: Callable[[str], Path]) -> None:
    with SuiteRunner(written(GOOD)) as runner:
        pid = runner.pid
        assert pid is not None
        with pytest.raises(CouldNotVerifyError, match=r"took longer than 0\.05 s"):
            runner.run(**RUN, timeout=0.05)
    assert gone(pid)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os._exit(0)", "gave no answer"),
        ("import os; os._exit(7)", "exit code 7"),
        ("import sys, os; print('no memory left', file=sys.stderr); os._exit(3)", "no memory left"),
        ("import os; os.write(1, b'{\"success\": true}'); os._exit(0)", "gave no answer"),
        ("import os; os.write(1, b'{}'); os._exit(0)", "evaluated 0 of 2 expectations"),
        (
            'import os; os.write(1, b\'{"could_not": "the restored server does not answer"}\'); os._exit(0)',
            "does not answer",
        ),
    ],
)
def test_a_child_that_says_less_than_it_was_asked_proves_nothing(
    written: Callable[[str], Path], acting: Callable[[str, str], None], code: str, words: str
) -> None:
    acting("sitecustomize", "import sys\nif sys.argv[:1] == ['-m']:\n    " + code)
    with SuiteRunner(written(GOOD)) as runner, pytest.raises(CouldNotVerifyError, match=words):
        runner.run(**RUN)


def outcome(success: bool) -> dict[str, object]:
    return {
        "title": "t", "table": "t", "query": None, "column": None, "kind": "expect_table_row_count_to_equal", "kwargs": {},
        "success": success, "observed": "3", "error": None, "seconds": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given_outcomes", "success"), [([True, True], True), ([True, False], False), ([False, False], False)]
)
def test_a_result_is_good_when_every_expectation_held(
    written: Callable[[str], Path], acting: Callable[[str, str], None], given_outcomes: list[bool], success: bool
) -> None:
    answer = json.dumps({"outcomes": [outcome(held) for held in given_outcomes], "version": "1"})
    acting(
        "sitecustomize",
        f"import os, sys\nif sys.argv[:1] == ['-m']:\n    os.write(1, {answer.encode()!r}); os._exit(0)",
    )
    result = run_suite(written(GOOD), **RUN)
    assert (result.success, result.passed, result.failed) == (success, sum(given_outcomes), 2 - sum(given_outcomes))
    assert result.results[0].as_dict()["observed"] == result.results[0].why == "3"


def test_no_outcome_at_all_is_no_success() -> None:
    assert not SuiteResult("s", (), 1.0, None, None, "1").success


def test_values_that_great_expectations_refuses_are_named_by_their_line(
    written: Callable[[str], Path], acting: Callable[[str, str], None]
) -> None:
    answer = json.dumps({"refusals": [{"number": 1, "key": "min_value", "what": "value is not a valid float"}]})
    acting(
        "sitecustomize",
        f"import os, sys\nif sys.argv[:1] == ['-m']:\n    os.write(1, {answer.encode()!r}); os._exit(0)",
    )
    with SuiteRunner(written(GOOD)) as runner, pytest.raises(InventoryMistakes) as raised:
        runner.run(**RUN)
    assert str(raised.value) == "suite.yaml:9: expectations[1].min_value: value is not a valid float"


def test_a_target_without_a_zone_is_refused(written: Callable[[str], Path]) -> None:
    with SuiteRunner(written(GOOD)) as runner, pytest.raises(UsageError, match="no zone"):
        runner.run(**{**RUN, "recovery_target": TARGET.replace(tzinfo=None)})


def test_a_broken_suite_is_refused_before_a_child_is_started(written: Callable[[str], Path]) -> None:
    with pytest.raises(InventoryMistakes):
        SuiteRunner(written("version: 1\nexpectations: []"))


def test_the_child_gets_no_secrets_and_tells_none(
    written: Callable[[str], Path], acting: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    monkeypatch.setenv("VAULT_TOKEN", "hunter2")
    monkeypatch.setenv("GX_CLOUD_ACCESS_TOKEN", "hunter2")
    seen = tmp_path / "seen"
    acting(
        "sitecustomize",
        f"""
        import json, os, pathlib
        pathlib.Path({str(seen)!r}).write_text(json.dumps([dict(os.environ), pathlib.Path('/proc/self/cmdline').read_text(), os.getcwd()]))
        os._exit(1)
    """,
    )
    with SuiteRunner(written(GOOD)) as runner, pytest.raises(CouldNotVerifyError):
        runner.run(**RUN)
    environment, arguments, work = json.loads(seen.read_text())
    assert "hunter2" not in str(environment)
    assert environment["GX_ANALYTICS_ENABLED"] == "False"
    assert environment["HOME"] == environment["TMPDIR"] == work
    assert arguments.split("\0")[1:] == ["-m", "ops_platform.recovery.expectations", ""]
    assert not Path(work).exists()  # gone with the runner


@pytest.mark.parametrize("asked", [False, True])
def test_the_child_ends_with_its_parent(
    written: Callable[[str], Path], acting: Callable[[str, str], None], tmp_path: Path, asked: bool
) -> None:
    """While it waits for its request, and while it works on it: here, on an import that does not end."""
    ready = tmp_path / "ready"
    acting(
        "great_expectations",
        f"""
        import pathlib
        __version__, __path__ = "0", []
        def __getattr__(name):
            raise AttributeError(name)
        if not {asked}:
            pathlib.Path({str(ready)!r}).touch()
    """,
    )
    acting(
        "sitecustomize",
        f"""
        import sys, time, pathlib
        class Never:
            def find_spec(self, name, path=None, target=None):
                if name == "great_expectations.compatibility":
                    pathlib.Path({str(ready)!r}).touch()
                    time.sleep(300)
        sys.meta_path.insert(0, Never())
    """,
    )
    code = f"""
        import time
        from pathlib import Path
        from datetime import UTC, datetime
        from ops_platform.recovery.expectations import SuiteRunner
        import ops_platform.recovery.suite as suite
        with SuiteRunner(Path({str(written(GOOD))!r})) as runner:
            print(runner.pid, flush=True)
            if {asked}:
                runner.run(socket_directory=Path("/"), port=1, user="u", dbname="d", recovery_target=datetime.now(UTC))
            time.sleep(300)
    """
    # The kinds of expectations are read from the real package; only the child is to meet the other one.
    real = {**os.environ, "PYTHONPATH": ""}
    script = textwrap.dedent(code).replace(
        "with SuiteRunner", f"import os; os.environ['PYTHONPATH'] = {os.environ['PYTHONPATH']!r}\nwith SuiteRunner", 1
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=real) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        deadline = time.monotonic() + 60
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert ready.exists()
        assert identify(child) is not None
        work = Path(f"/proc/{child}/cwd").readlink()
        assert work.parent.name.startswith("ops-expectations-")
        parent.kill()
    assert gone(child)
    assert not work.parent.exists()


def test_the_child_cannot_open_network_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"""
            import socket, sys
            from ops_platform.recovery.expectations_child import refuse_network
            address = ("127.0.0.1", {server.getsockname()[1]})
            socket.create_connection(address).close()
            sys.addaudithook(refuse_network)
            for attempt in (lambda: socket.create_connection(address), lambda: socket.getaddrinfo("localhost", 1),
                            lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", address)):
                try:
                    attempt()
                except PermissionError as error:
                    print(error)
        """
        out = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=60
        )
    assert out.stdout.splitlines() == ["the process that checks data opens no network connections"] * 3
