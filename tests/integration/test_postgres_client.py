"""What PostgreSQL says when it refuses, in our words: each against a server that really refuses so."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg import pq

from ops_platform.clients.postgres import Login, Member, ask_member, connect, connect_replication, connection_error
from ops_platform.clients.postgres_binaries import free_port
from ops_platform.errors import AccessDeniedError, ConflictError, NotThereError, OpsError, UnreachableError
from ops_platform.inventory import Secret
from tests.rig import PASSWORD, Cluster

HOST = "127.0.0.1"
AWKWARD = 'o\'dd "role" \\ ünï'


def login(user: str = "ops_backup", password: str | None = PASSWORD, dbname: str = "postgres", **more: Any) -> Login:
    return Login(dbname, user, None if password is None else Secret(password), **({"sslmode": "disable"} | more))


@pytest.fixture
def role(shared_cluster: Cluster) -> Iterator[Callable[[str, str], None]]:
    made: list[str] = []

    def make(name: str, options: str) -> None:
        quoted = '"' + name.replace('"', '""') + '"'
        made.append(quoted)
        shared_cluster.sql(f"create role {quoted} {options}")

    yield make
    for quoted in made:
        shared_cluster.sql(f"drop owned by {quoted}; drop role {quoted}")


def refused(kind: type[OpsError], ask: Callable[[], Any]) -> OpsError:
    with pytest.raises(kind) as caught:
        ask()
    assert type(caught.value) is kind
    assert PASSWORD not in f"{caught.value}{caught.value!r}"
    # psycopg's own error may quote parameters: no traceback leads to it.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value


def test_a_session_says_who_it_is_and_speaks_to_the_database_asked_for(shared_cluster: Cluster) -> None:
    with connect(login(), HOST, shared_cluster.port, dbname="template1") as connection:
        found = connection.execute(
            "select current_user, current_database(), current_setting('application_name')"
        ).fetchone()
    assert found == ("ops_backup", "template1", "ops_platform")
    conn = connect_replication(login(), HOST, shared_cluster.port)
    result = conn.exec_(b"IDENTIFY_SYSTEM")
    assert result.status == pq.ExecStatus.TUPLES_OK
    name = "select application_name from pg_stat_activity where pid = %s"
    assert shared_cluster.sql(name, "postgres", conn.backend_pid) == "ops_platform replication"
    conn.finish()


def test_awkward_names_and_passwords_pass_unharmed(shared_cluster: Cluster, role: Callable[[str, str], None]) -> None:
    password = "x' host=elsewhere \\ \" %s =;ünï"
    role(AWKWARD, "login password '{}'".format(password.replace("'", "''")))
    with connect(login(AWKWARD, password), HOST, shared_cluster.port) as connection:
        assert connection.execute("select current_user").fetchone() == (AWKWARD,)


def test_a_member_says_what_it_is(shared_cluster: Cluster) -> None:
    found = ask_member(login(), HOST, shared_cluster.port)
    assert (found.in_recovery, found.timeline, found.error) == (False, 1, None)
    assert found.system_identifier == shared_cluster.sql("select system_identifier from pg_control_system()")
    assert (found.server_version or 0) // 10000 == 18


def test_a_member_that_cannot_be_asked_has_the_reason(shared_cluster: Cluster) -> None:
    found = ask_member(login(password="wrong"), HOST, shared_cluster.port)
    assert found == Member(HOST, shared_cluster.port, error="the password of ops_backup is refused")
    assert isinstance(found.failure, AccessDeniedError)


@pytest.mark.parametrize("open_it", [connect, connect_replication])
def test_refusals_of_the_login(shared_cluster: Cluster, open_it: Callable[..., Any]) -> None:
    port = shared_cluster.port
    for password in ("wrong", None, ""):
        error = refused(AccessDeniedError, lambda password=password: open_it(login(password=password), HOST, port))
        assert error.what == "the password of ops_backup is refused"
        assert error.where == f"{HOST}:{port}"
        assert "rotated" in (error.remedy or "")
    # A role that is not there is answered like a wrong password, so that names cannot be tried out.
    assert (
        "the password of nobody is refused"
        in refused(AccessDeniedError, lambda: open_it(login("nobody"), HOST, port)).what
    )


def test_a_database_that_is_not_there(shared_cluster: Cluster) -> None:
    error = refused(NotThereError, lambda: connect(login(dbname="no such db"), HOST, shared_cluster.port))
    assert error.what == 'database "no such db" does not exist'


def test_a_role_that_may_not_log_in(shared_cluster: Cluster, role: Callable[[str, str], None]) -> None:
    role(AWKWARD, "nologin password 'x'")
    error = refused(AccessDeniedError, lambda: connect(login(AWKWARD, "x"), HOST, shared_cluster.port))
    assert "may not log in" in error.what
    quoted = '"' + AWKWARD.replace('"', '""') + '"'
    assert error.remedy == f"as a superuser: ALTER ROLE {quoted} LOGIN"


def test_a_role_that_may_not_replicate(shared_cluster: Cluster, role: Callable[[str, str], None]) -> None:
    role("plain_role", "login password 'x'")
    error = refused(AccessDeniedError, lambda: connect_replication(login("plain_role", "x"), HOST, shared_cluster.port))
    assert error.what == "the role plain_role may not replicate"
    assert error.remedy == "as a superuser: ALTER ROLE plain_role REPLICATION"


@pytest.mark.majors
@pytest.mark.parametrize("major", [14, 15])
def test_older_servers_say_it_in_other_words(new_cluster: Callable[..., Cluster], major: int) -> None:
    cluster = new_cluster(major, {"max_wal_senders": "1"})
    cluster.sql("create role plain_role login password 'x'")
    error = refused(AccessDeniedError, lambda: connect_replication(login("plain_role", "x"), HOST, cluster.port))
    assert error.what == "the role plain_role may not replicate"
    held = _in_the_end(lambda: connect_replication(login(), HOST, cluster.port))
    assert "WAL sender" in refused(ConflictError, lambda: connect_replication(login(), HOST, cluster.port)).what
    held.finish()
    member = ask_member(login(), HOST, cluster.port)
    assert (member.error, member.timeline, (member.server_version or 0) // 10000) == (None, 1, major)


def test_a_role_that_may_not_connect_to_the_database(shared_cluster: Cluster, role: Callable[[str, str], None]) -> None:
    role("plain_role", "login password 'x'")
    shared_cluster.sql("create database closed")
    try:
        shared_cluster.sql("revoke connect on database closed from public")
        error = refused(
            AccessDeniedError, lambda: connect(login("plain_role", "x", "closed"), HOST, shared_cluster.port)
        )
        assert "GRANT CONNECT ON DATABASE" in (error.remedy or "")
    finally:
        shared_cluster.sql("drop database closed")


def test_a_role_whose_connections_are_used_up(shared_cluster: Cluster, role: Callable[[str, str], None]) -> None:
    role("plain_role", "login password 'x' connection limit 1")
    with connect(login("plain_role", "x"), HOST, shared_cluster.port):
        error = refused(ConflictError, lambda: connect(login("plain_role", "x"), HOST, shared_cluster.port))
    assert error.what == "all connections are in use"


def test_a_server_that_is_full_closed_and_starting(new_cluster: Callable[..., Cluster]) -> None:
    """One cluster through its troubles."""
    cluster = new_cluster(18, {"max_connections": "6", "superuser_reserved_connections": "2", "max_wal_senders": "1"})
    held = [_in_the_end(lambda: connect(login(), HOST, cluster.port)) for _ in range(4)]
    assert refused(ConflictError, lambda: connect(login(), HOST, cluster.port)).what == "all connections are in use"
    for connection in held:
        connection.close()
    sender = _in_the_end(lambda: connect_replication(login(), HOST, cluster.port))
    error = refused(ConflictError, lambda: connect_replication(login(), HOST, cluster.port))
    assert error.what == "all WAL sender slots are in use"
    assert "pg_stat_replication" in (error.remedy or "")
    sender.finish()

    error = refused(UnreachableError, lambda: connect(login(sslmode="verify-full"), HOST, cluster.port))
    assert error.what.startswith("TLS failed: ")
    assert "tls.mode" in (error.remedy or "")

    cluster.server.configure({}, hba="local all all trust\nhost postgres all 127.0.0.1/32 scram-sha-256\n")
    cluster.sql("select pg_reload_conf()")
    # The server takes the reload, and back the only slot of the attempt before, in its own time.
    error = _refused_in_the_end(AccessDeniedError, lambda: connect_replication(login(), HOST, cluster.port))
    assert error.what == "pg_hba.conf has no line that lets ops_backup in"
    assert "`replication`" in (error.remedy or "")
    assert (
        "pg_hba.conf" in refused(AccessDeniedError, lambda: connect(login(dbname="template1"), HOST, cluster.port)).what
    )


def _in_the_end(ask: Callable[[], Any]) -> Any:
    """What is opened once the session before, ended or refused, has given its place back, which a server does in its own time."""
    opened = list[Any]()

    def is_open() -> bool:
        with contextlib.suppress(ConflictError):
            opened.append(ask())
        return bool(opened)

    _until(is_open)
    return opened[0]


def _refused_in_the_end(kind: type[OpsError], ask: Callable[[], Any]) -> OpsError:
    errors = list[OpsError]()

    def is_refused() -> bool:
        try:
            ask().finish()
        except OpsError as error:
            errors.append(error)
            return type(error) is kind
        return False

    _until(is_refused)
    return errors[-1]


def test_nobody_there_and_nobody_of_that_name() -> None:
    port = free_port()
    for open_it in (connect, connect_replication):
        error = refused(UnreachableError, lambda open_it=open_it: open_it(login(), HOST, port))
        assert "Connection refused" in error.what
        assert error.where == f"{HOST}:{port}"
        error = refused(UnreachableError, lambda open_it=open_it: open_it(login(), "no-such-host.invalid", 5432))
        assert "PostgreSQL does not answer" in error.what


def test_a_socket_that_is_not_there(tmp_path: Path) -> None:
    error = refused(UnreachableError, lambda: connect(login(), str(tmp_path), 5432))
    assert "No such file or directory" in error.what


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("FATAL:  the database system is starting up", UnreachableError),
        ("FATAL:  the database system is shutting down", UnreachableError),
        ("FATAL:  the database system is not yet accepting connections", UnreachableError),
        ("timeout expired", UnreachableError),
        ("server closed the connection unexpectedly", UnreachableError),
        ("something that no version has said so far", UnreachableError),
        ('FATAL:  role "x" does not exist', NotThereError),
        ("certificate verify failed", UnreachableError),
    ],
)
def test_words_that_are_hard_to_provoke(message: str, kind: type[OpsError]) -> None:
    error = connection_error(f'connection failed: connection to server at "h", port 1 failed: {message}\n', "h:1", "u")
    assert type(error) is kind
    assert error.remedy
    assert str(error).startswith("h:1: ")


def test_the_password_is_in_no_process_and_in_no_environment(shared_cluster: Cluster) -> None:
    with connect(login(), HOST, shared_cluster.port) as connection:
        pid = connection.info.backend_pid
        places = [Path("/proc/self/cmdline"), Path("/proc/self/environ"), Path(f"/proc/{pid}/cmdline")]
        texts = [place.read_bytes().decode(errors="replace") for place in places]
        assert connection.execute(
            "select count(*) from pg_stat_activity where query like %s", [f"%{PASSWORD[:12]}%"]
        ).fetchone() == (0,)
    assert [text for text in texts if PASSWORD in text] == []
    assert PASSWORD not in repr(os.environ)


def _until(holds: Callable[[], bool]) -> None:
    import time

    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in 30 s"
        time.sleep(0.02)
