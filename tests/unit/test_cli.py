"""The command line without servers: usage, help, exit codes, and that nothing heavy is imported for them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from ops_platform.actions import ActionResult, Plan, Status
from ops_platform.cli import main
from ops_platform.cli.common import action_exit_code, address, ago, parse_moment
from ops_platform.cli.inventory import inventory as inventory_group
from ops_platform.cli.ledger import _anchor
from ops_platform.cli.restore import _mapping, _names, _recovery
from ops_platform.errors import CouldNotVerifyError, OpsError, UsageError
from ops_platform.inventory import load
from ops_platform.inventory.template import Described, render, target_id_of
from ops_platform.inventory.values import SecretRef
from ops_platform.local.demo import check
from tests.rig import eventually

ROOT = Path(__file__).parents[2]
OPS = str(Path(sys.executable).with_name("ops"))


def ops(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OPS_")}
    return subprocess.run(
        [OPS, *words], capture_output=True, text=True, check=False, cwd="/", env={**clean, **env}, timeout=120
    )


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command, **main.cli.context_settings)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None, name
            yield from commands(found, (*path, name))


EVERY = list(commands(main.cli))


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_every_command_has_help(path: tuple[str, ...]) -> None:
    for word in ("--help", "-h"):
        done = CliRunner().invoke(main.cli, [*path, word])
        assert done.exit_code == 0, done.output
        assert done.output.startswith("Usage: ")


def test_help_says_the_same_as_the_command_itself() -> None:
    """What stands in the table of lazy commands is the first sentence that each shows of itself, in spirit: none is empty."""
    context = click.Context(main.cli, **main.cli.context_settings)
    assert {name for name, *_ in (path for path in EVERY if len(path) == 1)} == set(main.COMMANDS)
    for name in main.COMMANDS:
        command = main.cli.get_command(context, name)
        assert command is not None
        assert command.help


def test_help_imports_nothing_heavy() -> None:
    script = """
import sys
from ops_platform.cli.main import cli
for words in ([], ["--help"], ["--version"], ["backup", "--help"], ["restore", "--help"]):
    try:
        cli.main(words, prog_name="ops", standalone_mode=False)
    except Exception:
        pass
heavy = ("psycopg", "pydantic", "dagster", "rich", "boto3", "yaml", "jinja2", "cryptography", "hvac", "asyncio")
print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Exit codes: 0 good" in done.stdout


READING = [
    ("backup", "list"), ("backup", "show"), ("backup", "verify"), ("wal", "status"), ("inventory", "check"), ("inventory", "show"),
    ("ledger", "list"), ("ledger", "verify"), ("local", "status"), ("local", "logs"), ("doctor",), ("report",), ("restore",),
]  # fmt: skip


@pytest.mark.parametrize("path", READING, ids=" ".join)
def test_every_reading_command_has_json(path: tuple[str, ...]) -> None:
    assert "--json" in CliRunner().invoke(main.cli, [*path, "--help"]).output


# Wrong usage


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["bakcup"], "did you mean 'backup'?"),
        (["doktor"], "did you mean 'doctor'?"),
        (["backup", "lsit"], "did you mean 'list'?"),
        (["ledger", "verfy"], "did you mean 'verify'?"),
        (["zzzz"], "ops --help lists them"),
        (["wal", "zzzz"], "ops wal --help lists them"),
        (["backup", "run", "--incremntal"], "--incremental"),
    ],
)
def test_a_misspelt_word_is_guessed(words: list[str], meant: str) -> None:
    done = ops(*words)
    assert done.returncode == 2
    assert meant in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nonsense"], "No such option"),
        (["backup", "show"], "Missing argument"),
        (["restore", "app-db", "--to"], "requires an argument"),
        (["restore", "app-db", "--into", "/nowhere"], "exactly one of --to"),
        (["restore", "app-db", "--latest", "--lsn", "0/1", "--into", "/x"], "exactly one of --to"),
        (["restore", "app-db", "--to", "2026-11-23 02:59:59", "--into", "/x"], "'2026-11-23 02:59:59+00:00'"),
        (["restore", "app-db", "--to", "yesterday", "--into", "/x"], "is not a time"),
        (["restore", "app-db", "--lsn", "12", "--into", "/x"], "is not a WAL position"),
        (["restore", "app-db", "--xid", "0x1", "--into", "/x"], "is not a transaction"),
        (["restore", "app-db", "--latest"], "name where it goes"),
        (["restore", "app-db", "--latest", "--into", "/x", "--as-dump", "/y"], "belong together"),
        (["restore", "app-db", "--latest", "--exclusive", "--into", "/x"], "--exclusive belongs to"),
        (["restore", "app-db", "--latest", "--into", "/x", "--database", "d"], "--database belongs to"),
        (["restore", "app-db", "--latest", "--into", "/x", "--tablespace", "a=b"], "OLD=NEW"),
        (
            ["restore", "app-db", "--latest", "--tables", "t", "--as-dump", "/y", "--tablespace", "/a=/b"],
            "--tablespace",
        ),
        (["restore", "app-db", "--latest", "--timeline", "two", "--into", "/x"], "--timeline"),
        (["backup", "verify", "app-db", "--to", "2026-11-23T03:00"], "has no zone"),
        (["ledger", "list", "--since", "2026-11-23"], "has no zone"),
        (["ledger", "verify", "--anchor", "12"], "42:"),
        (["completion", "tcsh"], "'tcsh' is not one of"),
        (["init"], "Missing option '--host'"),
        (["init", "--host", "db.example.com:5433"], "write --host db.example.com --port 5433\n"),
        (["init", "--host", "db:5433"], "write --host db --port 5433\n"),
        (["init", "--host", "[2001:db8::1]:5433"], "write --host 2001:db8::1 --port 5433\n"),
        (["init", "--host", "[::1]"], "write --host ::1\n"),
        (["init", "--host", "postgres://db/x"], "the port has an option of its own"),
        (["init", "--host", "db", "--out", "/nowhere/p.yaml", "--password", "env://OPS_UNSET"], "export OPS_UNSET="),
        (
            ["init", "--host", "db", "--out", "/nowhere/p.yaml", "--password", "file:///nowhere/pw"],
            "holds the password alone",
        ),
        (["inventory", "check"], "ops init writes one"),
        (["-i", "/nowhere/platform.yaml", "inventory", "check"], "/nowhere/platform.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_exits_2_and_says_what_is_wrong(words: list[str], said: str) -> None:
    done = ops(*words)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OpsError("broken", where="here", remedy="mend it"), 1),
        (UsageError("broken", where="here", remedy="mend it"), 2),
        (CouldNotVerifyError("broken", where="here", remedy="mend it"), 3),
        (KeyboardInterrupt(), 130),
        (ValueError("here: broken, mend it"), 1),
    ],
)
def test_errors_have_their_exit_code_and_no_traceback(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**_: Any) -> None:
        raise error

    monkeypatch.setattr(main.cli, "main", broken)
    monkeypatch.setattr(main.signals, "watch", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.startswith("error: ")
    if code != 130:
        assert all(word in said for word in ("here", "broken", "mend it"))


def test_what_the_database_driver_logs_of_a_session_that_broke_off_is_not_printed(tmp_path: Path) -> None:
    file = tmp_path / "platform.yaml"
    file.write_text("version: 1\nplatform: {name: test}\nenvironments: {}\nowners: {}\n")
    script = """
import logging
from ops_platform.cli.common import opened
with opened():
    logging.getLogger("psycopg").warning("error ignored in rollback")
    logging.getLogger("ops_platform.metrics").warning("the ledger cannot be read")
"""
    env = {**os.environ, "OPS_INVENTORY": str(file)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == "the ledger cannot be read\n"


def test_what_the_web_ui_started_ends_with_it(tmp_path: Path) -> None:
    from ops_platform.cli.ui import _together

    note = tmp_path / "pid"
    leaves = f"trap '' TERM; (echo $BASHPID > {note}; exec sleep 600) & while [ ! -s {note} ]; do :; done"
    _together([["bash", "-c", leaves]], dict(os.environ))
    eventually(lambda: not runs(int(note.read_text())), why="it runs on")


def runs(pid: int) -> bool:
    """A dead one that nobody has collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


_SAYS = """
import sys, click
from ops_platform.cli import common, main
ways = {
    "click": lambda: click.echo("a line"),
    "rich": lambda: common.console().print("a line"),
    "print": lambda: print("a line", flush=True),
    "at the end": lambda: sys.stdout.write("a line"),
    "stderr": lambda: click.echo("a line", err=True),
    "nothing": lambda: None,
}

@click.command()
@click.argument("way")
def cli(way):
    ways[way]()
    click.get_current_context().exit(0)

main.cli = cli
main.run()
"""


@pytest.mark.parametrize(
    ("way", "code"),
    [("click", 141), ("rich", 141), ("print", 141), ("at the end", 141), ("stderr", 141), ("nothing", 0)],
)
def test_a_reader_that_goes_away_is_no_verdict(way: str, code: int) -> None:
    read, write = os.pipe()
    os.close(read)
    shown = {"stderr" if way == "stderr" else "stdout": write}
    other = {"stdout" if way == "stderr" else "stderr": subprocess.PIPE}
    with subprocess.Popen[bytes]([sys.executable, "-c", _SAYS, way], **shown, **other) as process:  # pyright: ignore[reportArgumentType, reportCallIssue]
        os.close(write)
        said = process.communicate(timeout=60)
    assert process.returncode == code
    assert not any(said), "and nobody is told of a broken pipe"


@pytest.mark.parametrize("way", ["click", "rich", "print", "at the end"])
def test_output_that_has_no_room_is_an_error(way: str) -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-c", _SAYS, way], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr.splitlines()) == (1, [
        "error: the output could not be written: No space left on device",
        "  what to do: make room where it goes, and call again",
    ])  # fmt: skip


def test_errors_that_have_no_room_end_as_an_error() -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        both = subprocess.run([sys.executable, "-c", _SAYS, "click"], stdout=full, stderr=full, check=False)
        errors = subprocess.run([OPS, "nothing"], stdout=subprocess.PIPE, stderr=full, check=False, cwd="/")
    assert (both.returncode, errors.returncode, errors.stdout) == (1, 1, b"")


def test_output_that_was_closed_from_the_beginning_changes_no_exit_code() -> None:
    for words, code in ((["inventory", "schema"], 0), (["nothing"], 2)):
        done = subprocess.run(["sh", "-c", '"$0" "$@" >&- 2>&-', OPS, *words], check=False, cwd="/", timeout=60)
        assert done.returncode == code


@pytest.mark.parametrize(
    ("there", "instead", "said"),
    [
        ("app-db", "our-db", "it has no target app-db"),
        ("host: local://platform-db", "host: db.example.com", "db.example.com is no server of the local stack"),
        ("{ host: local://app-db }", "{ host: 10.0.0.1 }", "10.0.0.1 is no server of the local stack"),
        ("endpoint: local://s3", "endpoint: https://s3.example.com", "https://s3.example.com is no server of"),
        ("- id: site-monthly", "- id: another", "it plans no drill site-monthly"),
    ],
)
def test_a_demo_in_somebody_elses_folder_starts_nothing(tmp_path: Path, there: str, instead: str, said: str) -> None:
    theirs, state = tmp_path / "platform.yaml", tmp_path / "state"
    theirs.write_text((ROOT / "platform.yaml").read_text().replace(there, instead))
    for name in ("app-db.yaml", "our-db.yaml"):
        (tmp_path / "expectations").mkdir(exist_ok=True)
        shutil.copy(ROOT / "expectations" / "app-db.yaml", tmp_path / "expectations" / name)
    done = ops("demo", OPS_INVENTORY=str(theirs), OPS_STATE_DIR=str(state))
    assert done.returncode == 2, done.stderr
    assert f"the demo is not held with this inventory: {said}" in done.stderr
    assert str(theirs) in done.stderr
    assert not state.exists()


def test_the_demos_own_inventory_is_that_of_the_checkout() -> None:
    check(load(ROOT / "platform.yaml"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_names_ops(shell: str) -> None:
    done = ops("completion", shell)
    assert done.returncode == 0
    assert "_OPS_COMPLETE" in done.stdout


def test_completion_completes_commands_and_says_nothing_without_an_inventory() -> None:
    asked = ops(_OPS_COMPLETE="bash_complete", COMP_WORDS="ops ba", COMP_CWORD="1")
    assert "backup" in asked.stdout
    asked = ops(_OPS_COMPLETE="bash_complete", COMP_WORDS="ops doctor ", COMP_CWORD="2")
    assert (asked.stdout.strip(), asked.stderr) == ("", "")


# Values


def test_a_moment_is_read_with_its_zone() -> None:
    expected = datetime(2026, 11, 23, 1, 59, 59, 500000, tzinfo=UTC)
    for text in ("2026-11-23 02:59:59.5+01:00", "2026-11-23T01:59:59.5Z", " 2026-11-23 01:59:59.500000+00:00 "):
        assert parse_moment(text, option="--to") == expected
    with pytest.raises(UsageError, match="no zone") as refused:
        parse_moment("2026-11-23 02:59", option="--to")
    assert "--to '2026-11-23 02:59+00:00'" in str(refused.value.remedy)


def test_table_names_are_separated_by_commas_outside_of_quotes() -> None:
    assert _names('a.b, c.d ,"x,y"."z ""q"", r"') == ["a.b", "c.d", '"x,y"."z ""q"", r"']
    assert _names(' ,, "open,quote') == ['"open,quote']
    assert _names("") == []


def test_targets_of_a_recovery() -> None:
    found = _recovery(None, "0/1A", None, None, False, True, "3")
    assert (found.kind, found.value, found.inclusive, found.timeline) == ("lsn", "0/1A", False, 3)
    assert _recovery(None, None, "point", None, False, False, None).timeline == "latest"
    assert _mapping(("/a=/b", "/c d=/e=f")) == {"/a": Path("/b"), "/c d": Path("/e=f")}


def test_addresses_and_anchors() -> None:
    assert address("127.0.0.1:9187") == ("127.0.0.1", 9187)
    assert address("[::1]:9187") == ("::1", 9187)
    assert _anchor(f"42:{'AB' * 32}") == (42, "ab" * 32)
    for text in ("9187", ":9187", "host:", "host:0", "host:65536", "host:http"):
        with pytest.raises(UsageError):
            address(text)
    for text in ("42", "0:" + "a" * 64, "42:abc", "x:" + "a" * 64):
        with pytest.raises(UsageError):
            _anchor(text)


def test_how_long_ago_for_people() -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    assert ago(now - timedelta(minutes=4, seconds=12), now) == "4 min 12 s ago"
    assert ago(None) == "never"


@pytest.mark.parametrize(
    ("status", "unrecorded", "code"),
    [
        (Status.NOTHING, None, 0), (Status.OBSERVED, None, 0), (Status.DONE, None, 0), (Status.DONE, "no ledger", 1),
        (Status.REFUSED, None, 1), (Status.INCOMPLETE, None, 1), (Status.FAILED, None, 1),
        (Status.UNVERIFIED, None, 3), (Status.UNVERIFIED, "no ledger", 1),
    ],
)  # fmt: skip
def test_the_exit_code_of_an_action(status: Status, unrecorded: str | None, code: int) -> None:
    plan = Plan("backup.expire", "app-db", (), datetime(2026, 11, 23, tzinfo=UTC))
    assert action_exit_code(ActionResult("run", "me", plan, (), status, unrecorded=unrecorded)) == code


def test_enforce_says_what_it_needs() -> None:
    said = " ".join(CliRunner().invoke(main.cli, ["backup", "expire", "--help"]).output.split())
    assert "Where the policy says observe it also needs --approve DIGEST" in said


# The inventory that init writes


@pytest.mark.parametrize(
    ("host", "expected"),
    [("db-1.example.com", "db-1"), ("Db_Main", "db-main"), ("10.0.0.5", "db"), ("/var/run", "db"), ("::1", "db")],
)
def test_an_id_from_a_host(host: str, expected: str) -> None:
    assert target_id_of(host) == expected


def test_what_init_writes_is_a_good_inventory(tmp_path: Path) -> None:
    nasty = 'it\'s: "#odd" {x}'
    found = Described(
        "app-db", [("db-1.example.com", 5432), ("::1", 5433)], nasty, nasty, SecretRef.parse("env://PGPASSWORD"),
        "verify-full", "/etc/ssl/my ca: #1.pem", "18.1", 5 << 30, True,
    )  # fmt: skip
    file = tmp_path / "platform.yaml"
    file.write_text(render(found))
    (target,) = load(file).inventory.targets
    assert (target.connection.user, target.connection.dbname) == (nasty, nasty)
    assert [host.port for host in target.connection.hosts] == [5432, 5433]
    assert target.connection.tls.ca == "/etc/ssl/my ca: #1.pem"
    done = ops("inventory", "check", "--json", OPS_INVENTORY=str(file))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"file": str(file), "targets": 1, "suites": 0, "drills": 0}
    shown = ops("-i", str(file), "inventory", "show", "app-db")
    assert json.loads(shown.stdout)["id"] == "app-db"
    listed = json.loads(ops("-i", str(file), "inventory", "show", "--json").stdout)
    assert [entry["id"] for entry in listed] == ["app-db"]
    unknown = ops("-i", str(file), "inventory", "show", "app-bd")
    assert (unknown.returncode, "app-db" in unknown.stderr) == (2, True)
    file.write_text(file.read_text().replace("owner: team", "ownr: team"))
    wrong = ops("-i", str(file), "inventory", "check")
    assert wrong.returncode == 2
    assert "ownr" in wrong.stderr
    assert "platform.yaml:16: " in wrong.stderr


def test_the_schema_is_json() -> None:
    done = CliRunner().invoke(inventory_group, ["schema"])
    assert done.exit_code == 0
    assert "targets" in json.loads(done.output)["properties"]
