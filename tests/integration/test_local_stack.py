"""The local stack as its user meets it: `ops local …` on real servers, killed, moved, crowded out of its ports and of its disk.

One stack serves the tests of this file, in their order: it is brought up by commands that are killed on the way, then looked at,
then its servers are killed one by one, then it is moved.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ops_platform.clients.processes import Process, spawn, stop
from ops_platform.clients.s3 import S3Store
from ops_platform.errors import OpsError
from ops_platform.local.components import COMPONENTS, Component, Place, admin, s3_settings
from ops_platform.local.stack import Stack, opened, present
from tests.integration.wal_rig import eventually
from tests.rig import Cluster, missing, scratch
from tests.servers import accepts

ROOT = Path(__file__).parents[2]
NAMES = [component.name for component in present()]
pytestmark = [pytest.mark.xdist_group("local-stack"), pytest.mark.timeout(600)]

MOMENTS = [
    "before the first state",
    "started: vault",
    "before the unseal key is written",
    "while initdb is at work",
    "before the cluster is configured",
    "started: platform-db",
    "when the database shop is made",
    "started: wal-receiver",
    "started: kafka",
    "started: supervisor",
]


class Local:
    """`ops local` on one state directory."""

    def __init__(self, directory: Path, **env: str) -> None:
        self.directory = directory
        self.extra = env

    @property
    def env(self) -> dict[str, str]:
        here = {"OPS_STATE_DIR": str(self.directory), "OPS_INVENTORY": str(ROOT / "platform.yaml")}
        return {**os.environ, **here, **self.extra}

    def ops(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ops_platform.cli.main", "local", *words]
        done = subprocess.run(command, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert code is None or done.returncode == code, done.stderr + done.stdout
        assert "Traceback" not in done.stderr + done.stdout
        return done

    def killed(self, moment: str) -> int:
        command = [sys.executable, "-m", "tests.integration.killed_up", moment]
        return subprocess.run(command, env=self.env, cwd=ROOT, timeout=300, check=False).returncode

    @property
    def place(self) -> Place:
        return Stack.load(self.directory).place

    def status(self) -> dict[str, dict[str, Any]]:
        return {item["name"]: item for item in json.loads(self.ops("status", "--json", code=None).stdout)}

    def pid(self, name: str) -> int | None:
        """None between two attempts to start it."""
        process = Stack.load(self.directory).running.get(name)
        return process.pid if process is not None else None

    def query(self, text: str, name: str = "app-db", dbname: str = "shop") -> Any:
        with admin(self.place, name, dbname) as connection:
            cursor = connection.execute(text)
            return cursor.fetchone()[0] if cursor.description else None


def processes_of(directory: Path) -> dict[int, str]:
    """Every process in whose arguments, folder or environment that directory stands, this one apart."""
    found: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            told += os.fsencode((entry / "cwd").readlink())
            if os.fsencode(directory) in told and int(entry.name) != os.getpid():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


@pytest.fixture(scope="module")
def local(shared_cluster: Cluster) -> Iterator[Local]:
    """Up after kills at every moment, beside another PostgreSQL to which this user's environment points."""
    other = {"PGHOST": "127.0.0.1", "PGHOSTADDR": "127.0.0.1", "PGPORT": str(shared_cluster.port), "PGUSER": "nobody"}
    other |= {"PGDATABASE": "nowhere", "PGDATA": str(shared_cluster.server.directory), "PGSSLMODE": "require"}
    home = scratch("ops-local-test-")
    made = Local(home / "state", **other)
    try:
        yield made
    finally:
        made.ops("down", code=None)
        shutil.rmtree(home)


# Coming up


def test_up_goes_on_after_a_kill_at_any_moment(local: Local) -> None:
    for moment in MOMENTS:
        assert local.killed(moment) == -signal.SIGKILL, f"up got past: {moment}"
    local.ops("up")
    found = local.status()
    assert [name for name in NAMES if found[name]["ready"]] == NAMES
    # One process for each, and nothing half: what the killed commands had started was taken up or is gone.
    servers = [pid for pid, command in processes_of(local.directory).items() if not command.startswith("postgres: ")]
    assert sorted(servers) == sorted([*(item["pid"] for item in found.values()), local.pid("supervisor")])
    assert not list(local.directory.glob("*.new*")), "an unfinished cluster or state was left"
    assert not list(local.directory.glob(".*.pw")), "a password was left"
    assert local.query("show wal_level") == "replica"
    assert local.query("show max_slot_wal_keep_size") == "2GB"


def test_up_again_changes_nothing(local: Local) -> None:
    before = local.status()
    local.ops("up")
    local.ops("up")
    assert local.status() == before


def test_status_names_kind_url_pid_and_readiness(local: Local) -> None:
    done = local.ops("status", "--json")
    found = {item["name"]: item for item in json.loads(done.stdout)}
    assert list(found) == NAMES
    for name, item in found.items():
        assert set(item) == {"name", "kind", "url", "pid", "ready", "skipped"}
        assert item["ready"] is True
        assert Path(f"/proc/{item['pid']}").exists()
        assert f"127.0.0.1:{local.place.port(name)}" in item["url"]
    assert {name: item["kind"] for name, item in found.items()} == {
        "vault": "openbao", "s3": "seaweedfs", "platform-db": "postgresql", "app-db": "postgresql", "wal-receiver": "ops",
        "metrics": "ops", "kafka": "tansu", "redis": "redis", "alertmanager": "alertmanager", "prometheus": "prometheus",
    }  # fmt: skip
    assert "wal-receiver" in local.ops("status").stdout


def test_logs_show_the_end_of_a_servers_log(local: Local) -> None:
    assert "ready to accept connections" in local.ops("logs", "app-db", "-n", "500").stdout
    assert len(local.ops("logs", "vault", "-n", "3").stdout.splitlines()) == 3
    assert len(json.loads(local.ops("logs", "vault", "-n", "3", "--json").stdout)) == 3
    refused = local.ops("logs", "nobody", code=2)
    assert "platform-db" in refused.stderr


def test_a_second_stack_is_another_one(local: Local) -> None:
    """Where nothing was started nothing runs, whatever runs elsewhere on the machine; and looking makes no folder."""
    elsewhere = Local(local.directory.parent / "elsewhere")
    assert {item["pid"] for item in json.loads(elsewhere.ops("status", "--json", code=1).stdout)} == {None}
    assert "nothing was running" in elsewhere.ops("down").stderr
    assert not elsewhere.directory.exists()
    assert all(item["ready"] for item in local.status().values())


def test_a_folder_with_other_things_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    tmp_path.chmod(0o750)
    for words in (["up"], ["down"], ["reset", "--yes"]):
        refused = Local(tmp_path).ops(*words, code=1)
        assert "is no state of a local stack" in refused.stderr
        assert str(tmp_path) in refused.stderr
        assert "OPS_STATE_DIR" in refused.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o750


# What it holds


def test_secrets_are_the_owners_alone_and_stand_nowhere_else(local: Local) -> None:
    folder = local.directory / "secrets"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = list(folder.iterdir())
    assert {"vault.unseal_key", "vault.root_token", "s3.secret_key", "app-db.ops_backup.password"} <= {
        f.name for f in files
    }
    assert {f.name: oct(stat.S_IMODE(f.stat().st_mode)) for f in files if stat.S_IMODE(f.stat().st_mode) != 0o600} == {}
    public = {
        "s3.crt",
        "s3-ca.pem",
        "s3.json",
        "redis.conf",
        "s3.key",
        "vault.role_id",
        "s3.access_key",
    }  # s3.json and redis.conf hold what stands in files of its own; PEM has lines
    secrets = {file.name: file.read_text().strip() for file in files if file.name not in public}
    assert all(len(value) >= 20 for value in secrets.values())
    told = {f"process {pid}": text for pid, text in processes_of(local.directory).items()}
    assert len(told) > len(NAMES)
    texts = [*(local.directory / "logs").iterdir(), local.directory / "stack.json", local.directory / "vault.json"]
    told |= {str(file): file.read_text(errors="replace") for file in texts}
    shown = [(name, where) for name, value in secrets.items() for where, text in told.items() if value in text]
    assert shown == []


def test_the_stores_certificate_passes_the_strictest_check(local: Local) -> None:
    """Python 3.13 asks for it by default; so does every other client that follows RFC 5280 to the letter."""
    context = ssl.create_default_context(cafile=str(local.directory / "secrets" / "s3-ca.pem"))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    for name in ("localhost", "127.0.0.1"):
        with (
            socket.create_connection(("127.0.0.1", local.place.port("s3")), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname=name) as wrapped,
        ):
            assert wrapped.version() in ("TLSv1.2", "TLSv1.3")


def test_the_shop_has_what_a_restore_must_bring_back(local: Local) -> None:
    assert local.query("select count(*) from shop.customers") == 20000
    assert local.query("select count(*) from shop.orders") >= 60000
    assert local.query("select count(*) > 40000 and sum(amount) > 0 from shop.payments") is True
    types = local.query("""
        select json_object_agg(table_name || '.' || column_name, data_type) from information_schema.columns
        where table_schema = 'shop'""")
    assert types["payments.amount"] == "numeric"
    assert types["payments.paid_at"] == "timestamp with time zone"
    assert types["customers.address"] == "jsonb"
    assert local.query("select partstrat from pg_partitioned_table where partrelid = 'shop.orders'::regclass") == "r"
    assert local.query("select count(*) from pg_inherits where inhparent = 'shop.orders'::regclass") >= 8
    assert local.query("select count(*) from pg_sequences where schemaname = 'shop' and last_value is not null") >= 3
    assert local.query("select count(*) from pg_constraint where contype = 'f' and conparentid = 0") >= 1
    assert (
        local.query(
            "select count(*) from pg_index where indexprs is not null and indrelid = 'shop.customers'::regclass"
        )
        == 2
    )
    assert local.query("select count(*) from pg_extension where extname in ('citext', 'pg_trgm')") == 2
    assert local.query("select sum(length(lo_get(scan))) from shop.invoices") == 50 * 200 * 16
    assert local.query("select count(*) from pg_largeobject_metadata") == 50
    assert local.query('select count(*) from shop."Notizen über Kunden"') == 2
    # The trigger works: an item changes its order's total.
    total = """
        with item as (insert into shop.order_items select id, 99, 1, 1, 10.50 from shop.orders order by id limit 1 returning order_id)
        select order_id from item"""
    order = local.query(total)
    lines = local.query(f"select sum(quantity * price) from shop.order_items where order_id = {order}")
    assert local.query(f"select total from shop.orders where id = {order}") == lines


# Killed


def write_everywhere(local: Local, word: str) -> None:
    local.query(f"create table if not exists noted (word text); insert into noted values ('{word}')")
    local.query(
        f"create table if not exists noted (word text); insert into noted values ('{word}')", "platform-db", "ops"
    )
    vault(local).secrets.kv.v2.create_or_update_secret(path=f"noted/{word}", secret={"word": word})
    with contextlib.closing(S3Store(s3_settings(local.place))) as store:
        store.put(f"noted/{word}", word.encode())


def read_everywhere(local: Local, word: str) -> dict[str, bool]:
    text = f"select count(*) from noted where word = '{word}'"
    kept = vault(local).secrets.kv.v2.read_secret_version(path=f"noted/{word}", raise_on_deleted_version=True)
    with contextlib.closing(S3Store(s3_settings(local.place))) as store:
        stored = store.get(f"noted/{word}")
    return {
        "app-db": local.query(text) == 1,
        "platform-db": local.query(text, "platform-db", "ops") == 1,
        "vault": kept["data"]["data"]["word"] == word,
        "s3": bytes(stored) == word.encode(),
    }


def vault(local: Local) -> Any:
    import hvac

    place = local.place
    return hvac.Client(
        url=f"http://127.0.0.1:{place.port('vault')}", token=place.secret("vault.root_token"), timeout=60
    )


def kill(local: Local, name: str) -> int:
    pid = local.pid(name)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


@pytest.mark.parametrize("name", NAMES)
def test_the_supervisor_brings_back_what_was_killed_with_its_data(local: Local, name: str) -> None:
    write_everywhere(local, f"before-{name}")
    before = kill(local, name)

    def back() -> bool:
        return local.pid(name) not in (None, before) and all(
            item.ready for item in Stack.load(local.directory).status()
        )

    eventually(back, seconds=120, why=lambda: (local.directory / "logs" / "supervisor.log").read_text()[-2000:])
    assert set(read_everywhere(local, f"before-{name}").values()) == {True}


def test_a_key_service_that_was_killed_opens_what_it_sealed_before(local: Local) -> None:
    def sealed() -> str:
        return vault(local).secrets.transit.encrypt_data("ops-backup", base64.b64encode(b"payroll").decode())["data"][
            "ciphertext"
        ]

    text = sealed()
    before = kill(local, "vault")
    eventually(lambda: local.pid("vault") not in (None, before) and local.status()["vault"]["ready"], seconds=120)
    assert vault(local).sys.is_sealed() is False
    plain = vault(local).secrets.transit.decrypt_data("ops-backup", text)["data"]["plaintext"]
    assert base64.b64decode(plain) == b"payroll"


def test_up_brings_back_the_supervisor_and_what_died_with_it(local: Local) -> None:
    write_everywhere(local, "unwatched")
    others = {name: local.pid(name) for name in NAMES if name not in ("app-db", "wal-receiver")}
    supervisor = local.pid("supervisor")
    for name in ("supervisor", "app-db", "wal-receiver"):
        kill(local, name)
    found = local.ops("status", "--json", code=1)
    assert {item["name"]: item["pid"] for item in json.loads(found.stdout)}["app-db"] is None
    local.ops("up")
    assert all(item["ready"] for item in local.status().values())
    assert local.pid("supervisor") != supervisor
    assert {name: local.pid(name) for name in others} == others
    assert set(read_everywhere(local, "unwatched").values()) == {True}


NEGLIGENT = """
import sys
from pathlib import Path
from ops_platform.local.components import COMPONENTS
from ops_platform.local.stack import opened
with opened(Path(sys.argv[1])) as stack:
    stack.ensure(next(c for c in COMPONENTS if c.name == "app-db"), lambda text: None)
print("started", flush=True)
sys.stdin.read()
"""


def test_a_server_starts_although_nobody_has_collected_its_dead_predecessor(local: Local) -> None:
    """PostgreSQL takes a zombie for a living server, and the first process of some containers collects none."""
    local.ops("down")
    command = [sys.executable, "-c", NEGLIGENT, str(local.directory)]
    parent = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=local.env, cwd=ROOT
    )
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        dead = kill(local, "app-db")
        local.ops("up")
        assert Path(f"/proc/{dead}/stat").read_text().split()[2] == "Z", "it was collected: this shows nothing"
        assert local.status()["app-db"]["ready"]
    finally:
        parent.communicate("")


# Down, moved, crowded


def test_down_leaves_no_process_and_up_finds_the_data_at_another_place_and_at_other_ports(
    local: Local, shared_cluster: Cluster
) -> None:
    write_everywhere(local, "moved")
    ports = dict(local.place.ports)
    # As after a killed command: neither the state nor `down` is told of the processes.
    state = local.directory / "stack.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "running": {}}))
    assert f"stopped: supervisor, {', '.join(reversed(NAMES))}" in local.ops("down").stderr
    assert processes_of(local.directory) == {}
    assert [item["pid"] for item in json.loads(local.ops("status", "--json", code=1).stdout)] == [None] * len(NAMES)

    with contextlib.ExitStack() as taken:
        for port in ports.values():
            taken.enter_context(socket.create_server(("127.0.0.1", port)))
        # Longer than a socket's path may be, too.
        local.directory = local.directory.rename(local.directory.parent / f"moved-{'far-' * 20}away")
        local.ops("up")
    assert all(item["ready"] for item in local.status().values())
    assert not set(ports.values()) & set(local.place.ports.values())
    assert len(set(local.place.ports.values())) == len(local.place.ports)
    assert set(read_everywhere(local, "moved").values()) == {True}
    assert shared_cluster.sql("select 1") == 1


def test_down_ends_the_web_ui_first_which_says_so_in_one_line(local: Local, tmp_path: Path) -> None:
    local.ops("up")
    out = tmp_path / "ui.log"
    command = [sys.executable, "-m", "ops_platform.cli.main", "ui"]
    env = {name: value for name, value in local.env.items() if not name.startswith("PG")}
    with out.open("wb") as log, subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log) as ui:
        try:
            # The daemon's heartbeats are in the stack's database by then, and the web server serves.
            eventually(lambda: {"Serving dagster-webserver", "Instance is configured"} <= said(out), seconds=120)
            assert "web UI" in local.ops("down").stderr
            assert ui.wait(60) == 0
        finally:
            ui.terminate()
    text = out.read_text()
    assert text.count("the web UI ends") == 1
    assert "Traceback" not in text
    assert "Error" not in text
    assert not (local.directory / "ui.json").exists()


def said(log: Path) -> set[str]:
    return {each for each in ("Serving dagster-webserver", "Instance is configured") if each in log.read_text()}


def test_reset_stops_and_removes_everything_even_with_a_broken_state(local: Local) -> None:
    local.ops("up")
    state = local.directory / "stack.json"
    sockets = Path(re.findall(r"unix_socket_directories=(\S+)", " ".join(processes_of(local.directory).values()))[0])
    assert sockets.exists()
    state.write_text(state.read_text()[:100])
    broken = local.ops("status", code=1)
    assert str(state) in broken.stderr
    assert "ops local reset" in broken.stderr
    local.ops("reset", "--yes")
    assert processes_of(local.directory) == {}
    assert not local.directory.exists()
    assert not sockets.exists()
    local.ops("reset", "--yes")  # where nothing is, nothing is to do


def test_a_port_that_is_taken_between_its_choice_and_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    home, said, taken = scratch("ops-local-test-"), list[str](), list[socket.socket]()
    stack = Stack(Place(home), {})
    choose = stack._free_ports

    def start(place: Place) -> Process:
        words = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(place.port("web"))]
        return spawn(words, place.log("web"))

    def ready(place: Place) -> bool:
        return accepts(place.port("web"))

    web = Component("web", "web", lambda _: "", start, ready, lambda _: None, lambda _: "", port_names=("web",))

    def crowded(component: Component) -> None:
        choose(component)
        if len(taken) < crowds:
            taken.append(socket.socket())
            taken[-1].bind(("127.0.0.1", stack.place.port("web")))

    monkeypatch.setattr(stack, "_free_ports", crowded)
    try:
        crowds = 2
        stack.ensure(web, said.append)
        assert len([text for text in said if "another port" in text]) == 2
        assert stack.place.port("web") not in [one.getsockname()[1] for one in taken]
        stop(stack.running.pop("web"), signal.SIGKILL)
        crowds = 99  # where somebody takes every port, it ends with the server's own words
        with pytest.raises(OpsError, match="Address already in use"):
            stack.ensure(web, said.append)
    finally:
        for process in stack.running.values():
            stop(process, signal.SIGKILL)
        for one in taken:
            one.close()
        shutil.rmtree(home)


# A machine with little


@pytest.fixture
def small_disk() -> Iterator[Path]:
    if os.geteuid() != 0:
        missing("a small disk", "mounting one takes root")
    home = scratch("ops-small-disk-")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=500m,mode=755", "tmpfs", str(home)], check=False, capture_output=True
    )
    if done.returncode:
        home.rmdir()
        missing(f"a small disk ({done.stderr.decode().strip()})", "allow root to mount a tmpfs")
    try:
        yield home
    finally:
        state = home / "state"
        if (state / "stack.json").exists():
            for process in Stack.load(state).running.values():
                stop(process, signal.SIGKILL)
        eventually(lambda: subprocess.run(["umount", str(home)], check=False, capture_output=True).returncode == 0)
        home.rmdir()


def fill(home: Path, leave: int) -> Path:
    room = os.statvfs(home)
    file = home / "filler"
    file.unlink(missing_ok=True)
    with file.open("wb") as out:
        os.posix_fallocate(out.fileno(), 0, room.f_bavail * room.f_frsize - leave)
    return file


def test_a_full_disk_is_named_and_leaves_nothing_half(small_disk: Path) -> None:
    local = Local(small_disk / "state")
    filler = fill(small_disk, leave=0)
    full = local.ops("up", code=1)
    assert re.search("No space left on device", full.stderr)
    assert str(local.directory) in full.stderr
    assert processes_of(local.directory) == {}

    app = next(component for component in COMPONENTS if component.name == "app-db")

    def ensure() -> None:
        with opened(local.directory, create=True) as stack:
            stack.ensure(app, lambda _text: None)

    filler.unlink()
    filler = fill(small_disk, leave=20 << 20)  # an empty cluster takes 40 MB
    # PostgreSQL says it in one of two ways: no byte was written, or only a part of a page was.
    with pytest.raises(OpsError, match=r"No space left on device|wrote only \d+ of \d+ bytes") as no_cluster:
        ensure()
    assert "disk space" in str(no_cluster.value)
    assert not list(local.directory.glob("app-db*"))
    assert not (local.directory / ".app-db.pw").exists()

    filler.unlink()
    filler = fill(small_disk, leave=75 << 20)  # the cluster fits, the shop does not
    with pytest.raises(OpsError, match="app-db") as no_shop:
        ensure()
    assert "disk" in str(no_shop.value)
    filler.unlink()
    ensure()
    assert local.query("select count(*) from shop.customers") == 20000
    assert local.query("select count(*) from shop.invoices") == 50


WITHOUT_IPV6 = """
set -e
ip link set lo up
echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6
exec "$@"
"""
UP = """
import sys, signal
from pathlib import Path
from ops_platform.clients.processes import Process, spawn, stop
from ops_platform.local.components import COMPONENTS
from ops_platform.local.stack import opened
with opened(Path(sys.argv[1]), create=True) as stack:
    try:
        for component in COMPONENTS[:3]:
            stack.ensure(component, lambda text: None)
        print([item.name for item in stack.status() if item.ready])
    finally:
        for process in stack.running.values():
            stop(process, signal.SIGKILL)
"""


def test_ipv6_is_not_needed(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = scratch("ops-no-ipv6-")
    alone = ["unshare", "--net", "sh", "-c", WITHOUT_IPV6, "sh"]
    try:
        if subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
            missing("a network namespace without IPv6", "making one takes root")
        command = [*alone, sys.executable, "-c", UP, str(home / "state")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
        assert done.stdout.strip() == "['vault', 's3', 'platform-db']", done.stderr
        assert processes_of(home) == {}
    finally:
        shutil.rmtree(home)
