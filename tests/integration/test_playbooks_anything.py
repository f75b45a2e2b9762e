"""A webhook against a receiver that verifies as the how-to says, and Dagster's jobs against a real web server."""

from __future__ import annotations

import contextlib
import datetime as dt
import http.server
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ops_platform.actions import Outcome, Status
from ops_platform.clients.http import BadAnswerError
from ops_platform.clients.postgres_binaries import free_port
from ops_platform.errors import AccessDeniedError, ConflictError, NotThereError, OpsError, UnreachableError, UsageError
from ops_platform.remediation.playbook import playbook
from ops_platform.remediation.playbooks.anything.webhook import sign
from tests.integration.incident_rig import solved
from tests.integration.playbook_rig import INCIDENT, Bench, bench
from tests.integration.wal_rig import eventually
from tests.rig import Cluster

ROOT = Path(__file__).parents[2]
HOOK, RUN = playbook("http.webhook"), playbook("dagster.run_job")
SECRET = "a shared secret"


def from_the_how_to() -> Callable[[dict[str, str], bytes, str], bool]:
    text = (ROOT / "docs" / "how-to" / "receive-a-webhook.md").read_text()
    (block,) = re.findall(r"^   ```python\n(.*?)^   ```$", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(re.sub(r"^   ", "", block, flags=re.MULTILINE), names)
    return names["is_ours"]


IS_OURS = from_the_how_to()


class Receiver:
    """A program that is told to act: verifies, does each incident once, and says how it stands. `answers`: of the coming requests."""

    def __init__(self, tls: tuple[Path, Path] | None = None) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int] = []
        self.done: set[str] = set()
        self.state: Any = "done"
        self.status_code = 200
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.got.append((headers, body))
                status = receiver.answers.pop(0) if receiver.answers else 202
                if not IS_OURS(headers, body, SECRET):
                    status = 401
                if 200 <= status < 300:
                    receiver.done.add(headers["idempotency-key"])
                self.send_response(status)
                if status == 302:
                    self.send_header("location", "/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                known = self.path.rpartition("/")[2] in receiver.done
                body = json.dumps({"job": {"state": receiver.state}}).encode()
                self.send_response(receiver.status_code if known else 404)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.scheme = "http"
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
            self.scheme = "https"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def at(shared_cluster: Cluster) -> Iterator[Bench]:
    with bench(shared_cluster) as made:
        yield made


class Quick:
    """Waits for nothing, and remembers how long it would have waited."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def now(self) -> dt.datetime:
        return dt.datetime.now(dt.UTC)

    def monotonic(self) -> float:
        return time.monotonic() + sum(self.slept)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


def hook(at: Bench, url: str, **more: Any) -> dict[str, Any]:
    return {"url": f"{url}/drain", "secret": f"file://{at.home}/webhook", "body": {"queue": "Küche \"a'b"}, **more}


def status(receiver: Receiver, **more: Any) -> dict[str, Any]:
    return {"url": receiver.url + "/jobs/{incident}", "field": "job.state", "equals": "done", "every": "1s", **more}


# The webhook


def test_a_request_is_signed_accepted_and_verified(at: Bench, receiver: Receiver) -> None:
    result = at.run(HOOK, **hook(at, receiver.url, status=status(receiver)))
    assert (result.status, result.counts) == (Status.DONE, {"applied": 1}), result.as_json()
    ((headers, body),) = receiver.got
    assert headers["idempotency-key"] == INCIDENT
    assert json.loads(body) == {
        "incident": INCIDENT,
        "subject": "app-db",
        "kind": "postgresql",
        "signal_at": "2026-03-02T00:00:00+00:00",
        "data": {"queue": "Küche \"a'b"},
    }
    assert SECRET not in at.written(result) + str(result.as_json())
    # Run again, as after a kill: the receiver says that it is done, and gets no second request.
    assert at.run(HOOK, **hook(at, receiver.url, status=status(receiver))).status is Status.NOTHING
    assert len(receiver.got) == 1


def test_an_event_leads_to_one_request_and_a_closed_incident(
    at: Bench, receiver: Receiver, shared_cluster: Cluster
) -> None:
    given = hook(at, receiver.url, status=status(receiver))
    done = solved(
        shared_cluster, at.access, HOOK.name, given, lambda: not receiver.done, source="kafka", secrets=[SECRET]
    )
    assert receiver.done == {done.id}
    assert len(receiver.got) == 1


def test_without_a_status_address_nobody_claims_that_it_was_done(at: Bench, receiver: Receiver) -> None:
    result = at.run(HOOK, **hook(at, receiver.url))
    assert (result.status, result.counts) == (Status.UNVERIFIED, {"applied": 1})


def test_done_between_plan_and_apply_it_is_not_sent(at: Bench, receiver: Receiver) -> None:
    action = at.action(HOOK, **hook(at, receiver.url, status=status(receiver)))
    (change,) = action.plan().changes
    assert action.check(change) is None
    receiver.done.add(INCIDENT)
    assert action.check(change).outcome is Outcome.ALREADY_DONE  # type: ignore[union-attr]


def test_it_is_tried_again_with_the_same_key_and_longer_and_longer_pauses(at: Bench, receiver: Receiver) -> None:
    receiver.answers = [503, 500, 429]
    clock = Quick()
    result = at.go(HOOK.action(at.context(HOOK, clock, **hook(at, receiver.url, status=status(receiver)))))
    assert result.status is Status.DONE
    assert len(receiver.got) == 4
    assert clock.slept == [1.0, 2.0, 4.0]
    assert {headers["idempotency-key"] for headers, _ in receiver.got} == {INCIDENT}
    assert result.outcomes[0][1].detail == {"status": 202, "attempts": 4}


def test_it_gives_up_and_says_that_one_may_have_arrived(at: Bench, receiver: Receiver) -> None:
    receiver.answers = [503] * 9
    result = at.go(HOOK.action(at.context(HOOK, Quick(), **hook(at, receiver.url, attempts=2))))
    assert result.status is Status.FAILED
    assert "not accepted after 2 attempts, though one may have arrived" in result.outcomes[0][1].reason
    assert len(receiver.got) == 2


@pytest.mark.parametrize(("answer", "said"), [(302, "302"), (400, "400"), (404, "404"), (409, "409"), (401, "401")])
def test_no_is_no_and_a_redirect_is_not_followed(answer: int, said: str, at: Bench, receiver: Receiver) -> None:
    receiver.answers = [answer]
    result = at.run(HOOK, **hook(at, receiver.url))
    assert result.status is Status.FAILED
    assert said in result.outcomes[0][1].reason
    assert len(receiver.got) == 1


def test_nobody_there_is_a_failure_with_the_place(at: Bench) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    result = at.go(HOOK.action(at.context(HOOK, Quick(), **hook(at, url))))
    assert result.status is Status.FAILED
    with pytest.raises(UnreachableError):
        at.run(HOOK, **hook(at, url, status={"url": url, "field": "a", "equals": 1}))


@pytest.mark.parametrize(
    ("state", "code", "holds"),
    [
        ("done", 200, True),
        ("failed", 200, False),
        ({"a": "secret thing"}, 200, False),
        (True, 200, False),
        ("done", 500, None),
    ],
)
def test_only_the_very_value_is_good_and_no_answer_is_none(
    state: Any, code: int, holds: bool | None, at: Bench, receiver: Receiver
) -> None:
    wanted = status(receiver, within="2s")
    action = HOOK.action(at.context(HOOK, Quick(), **hook(at, receiver.url, status=wanted)))
    plan = action.plan()
    applied = action.apply(plan.changes[0])
    receiver.state, receiver.status_code = state, code
    found = action.verify(plan, {plan.changes[0].object: applied})
    assert found.holds is holds
    assert "secret thing" not in str(found.as_json())


def test_the_secret_is_needed_before_anything_is_sent(at: Bench, receiver: Receiver) -> None:
    result = at.run(HOOK, **hook(at, receiver.url) | {"secret": f"file://{at.home}/nothing"})
    assert result.status is Status.FAILED
    assert "cannot be read" in result.outcomes[0][1].reason
    assert receiver.got == []


@pytest.mark.parametrize("field", ["url", "status"])
def test_it_is_not_sent_in_the_clear_to_another_machine(field: str, at: Bench) -> None:
    far = "http://queues.example.com"
    given = (
        hook(at, far)
        if field == "url"
        else hook(at, "https://queues.example.com", status={"url": far, "field": "a", "equals": 1})
    )
    with pytest.raises(UsageError, match="in the clear"):
        HOOK.read_parameters(given)
    assert HOOK.read_parameters({**given, "plain_http": True})


def test_the_receiver_refuses_what_was_changed_replayed_or_signed_by_somebody_else() -> None:
    now, body = int(time.time()), b'{"a": 1}'
    good = {"ops-timestamp": str(now), "ops-signature": sign(SECRET, now, body)}
    assert IS_OURS(good, body, SECRET)
    assert not IS_OURS(good, body + b" ", SECRET)
    assert not IS_OURS(good, body, "another secret")
    assert not IS_OURS({**good, "ops-timestamp": str(now + 1)}, body, SECRET)
    assert not IS_OURS({}, body, SECRET)
    old = now - 301
    assert not IS_OURS({"ops-timestamp": str(old), "ops-signature": sign(SECRET, old, body)}, body, SECRET)


def test_what_is_no_signature_is_refused_and_does_not_break_the_receiver() -> None:
    now, body = int(time.time()), b'{"a": 1}'
    good = {"ops-timestamp": str(now), "ops-signature": sign(SECRET, now, body)}
    assert not IS_OURS({**good, "ops-signature": "v1=\xe9"}, body, SECRET)
    assert not IS_OURS({**good, "ops-timestamp": "9" * 5000}, body, SECRET)
    assert not IS_OURS({**good, "ops-timestamp": "\u0661"}, body, SECRET)
    forged = {**good, "ops-signature": sign("", now, body)}
    with pytest.raises(ValueError, match="empty"):
        IS_OURS(forged, body, "")


def test_a_request_that_is_signed_by_hand_as_the_how_to_says_is_accepted(receiver: Receiver) -> None:
    """Nothing of ours signs it: what the page defines is what the playbook sends and the receiver verifies."""
    text = (ROOT / "docs" / "how-to" / "receive-a-webhook.md").read_text()
    found = re.findall(r"^   ```sh\n(.*?)^   ```$", text, re.MULTILINE | re.DOTALL)
    (block,) = [re.sub("^   ", "", one, flags=re.MULTILINE) for one in found if "curl" in one]
    command = block.replace("https://queues.example.com", receiver.url)
    for secret, code in ((SECRET, "202"), (SECRET + "x", "401")):
        told = command.replace("$(bao kv get -mount=secret -field=secret queues/webhook)", f"'{secret}'")
        assert told != command
        done = subprocess.run(["bash", "-euc", told], capture_output=True, text=True, check=True, timeout=60)
        assert f" {code} " in done.stdout.splitlines()[0]
    assert receiver.done == {"by-hand"}


@pytest.mark.parametrize("answer", [401, 403])
def test_a_receiver_with_another_secret_makes_the_refusal_name_ours(answer: int, at: Bench, receiver: Receiver) -> None:
    (at.home / "webhook").write_text("another secret")
    receiver.answers = [answer] if answer == 403 else []
    try:
        result = at.run(HOOK, **hook(at, receiver.url))
    finally:
        (at.home / "webhook").write_text(SECRET)
    assert result.status is Status.FAILED
    reason = result.outcomes[0][1].reason
    assert f"compare its secret with file://{at.home}/webhook" in reason
    assert "another secret" not in reason
    assert "`auth`" not in reason


def test_a_status_that_wants_a_login_is_no_matter_of_the_secret(at: Bench, receiver: Receiver) -> None:
    receiver.done.add(INCIDENT)
    receiver.status_code = 401
    with pytest.raises(AccessDeniedError, match="without login and signature"):
        at.run(HOOK, **hook(at, receiver.url, status=status(receiver)))


def certificate(directory: Path) -> tuple[Path, Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "receiver")]),
    )
    now, local = dt.datetime.now(dt.UTC), __import__("ipaddress").ip_address("127.0.0.1")
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(local)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    pem, secret = directory / "cert.pem", directory / "key.pem"
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem, secret


def test_the_receivers_certificate_is_checked(at: Bench, tmp_path: Path) -> None:
    pem, key = certificate(tmp_path)
    receiver = Receiver((pem, key))
    try:
        result = at.run(HOOK, **hook(at, receiver.url, attempts=1))
        assert result.status is Status.FAILED
        assert "TLS with the receiver failed" in result.outcomes[0][1].reason
        assert receiver.got == []
        assert at.run(HOOK, **hook(at, receiver.url, ca=str(pem))).counts == {"applied": 1}
    finally:
        receiver.close()


# Dagster

# Runs start at once: there is no daemon here that would take them out of a queue.
INSTANCE = """
telemetry: {enabled: false}
run_coordinator: {module: dagster._core.run_coordinator, class: DefaultRunCoordinator}
"""
JOBS = """
import os, pathlib, time
import dagster as dg

targets = dg.StaticPartitionsDefinition(["app-db"])
HERE = pathlib.Path(os.environ["DAGSTER_HOME"])

@dg.op
def note(context: dg.OpExecutionContext):
    with (HERE / "ran").open("a") as out:
        out.write(context.partition_key + "\\n" if context.has_partition_key else "none\\n")

@dg.op(config_schema={"fail": bool})
def may_fail(context: dg.OpExecutionContext):
    if context.op_config["fail"] and not (HERE / "mended").exists():
        raise Exception("not today")

@dg.op
def wait():
    while not (HERE / "go").exists():
        time.sleep(0.05)

@dg.job(partitions_def=targets)
def tidy():
    note()

@dg.job
def plain():
    note()

@dg.job
def fragile():
    may_fail()

@dg.job
def slow():
    wait()

# As ours: no process of its own for each step.
defs = dg.Definitions(jobs=[tidy, plain, fragile, slow], executor=dg.in_process_executor)
"""


class Web:
    """A real dagster-webserver over an instance of its own."""

    def __init__(self, home: Path, *options: str) -> None:
        self.home, self.port = home, free_port()
        (home / "dagster.yaml").write_text(INSTANCE)
        (home / "shop_jobs.py").write_text(JOBS)
        program = Path(sys.executable).with_name("dagster-webserver")
        self.process = subprocess.Popen(
            [program, "-h", "127.0.0.1", "-p", str(self.port), "-f", str(home / "shop_jobs.py"), *options],
            env={**os.environ, "DAGSTER_HOME": str(home)}, cwd=home,
            stdout=subprocess.DEVNULL, stderr=(home / "log").open("wb"), start_new_session=True,
        )  # fmt: skip
        eventually(self.answers, seconds=240, why=lambda: (home / "log").read_text()[-2000:])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answers(self) -> bool:
        import urllib3

        assert self.process.poll() is None, (self.home / "log").read_text()[-2000:]
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            return urllib3.request("GET", f"{self.url}/server_info", timeout=2, retries=False).status == 200
        return False

    def ran(self) -> list[str]:
        file = self.home / "ran"
        return file.read_text().split() if file.exists() else []

    def close(self) -> None:
        """With its code servers, which otherwise may stay when it is killed."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    made = Web(tmp_path_factory.mktemp("dagster"))
    yield made
    made.close()


@pytest.fixture
def on(web: Web, shared_cluster: Cluster) -> Iterator[Bench]:
    body = {"platform": {"name": "tests", "dagster": {"url": web.url, "timeout": "60s"}}}
    with bench(shared_cluster, body=body) as made:
        yield made
    for name in ("ran", "go", "mended"):
        (web.home / name).unlink(missing_ok=True)


def another(at: Bench, incident: str, **parameters: Any) -> Any:
    """The playbook's action for another incident."""
    return RUN.action(replace(at.context(RUN, **{"within": "2m", **parameters}), incident_id=incident))


@pytest.mark.xdist_group("dagster-web")
def test_a_job_is_run_for_the_target_and_only_once_for_an_incident(on: Bench, web: Web) -> None:
    result = on.run(RUN, job="tidy", within="2m")
    assert (result.status, result.counts) == (Status.DONE, {"applied": 1}), result.as_json()
    assert web.ran() == ["app-db"]
    assert result.plan.changes[0].object == "job tidy, partition app-db"
    again = on.run(RUN, job="tidy", within="2m")
    assert (again.status, again.counts) == (Status.DONE, {"already_done": 1})
    assert again.plan.digest == result.plan.digest
    assert again.outcomes[0][1].detail["run"] == result.outcomes[0][1].detail["run"]
    assert web.ran() == ["app-db"]


@pytest.mark.xdist_group("dagster-web")
def test_an_event_leads_to_one_run_of_the_job_and_a_closed_incident(
    on: Bench, web: Web, shared_cluster: Cluster
) -> None:
    given = {"job": "tidy", "within": "2m"}
    solved(shared_cluster, on.access, RUN.name, given, lambda: not web.ran(), source="kafka")
    assert web.ran() == ["app-db"]


@pytest.mark.xdist_group("dagster-web")
def test_another_incident_is_another_run_and_a_job_without_partitions_gets_none(on: Bench, web: Web) -> None:
    for incident in ("i-one", "i-two"):
        assert on.go(another(on, incident, job="plain", partition=None)).status is Status.DONE
    assert web.ran() == ["none", "none"]


@pytest.mark.xdist_group("dagster-web")
def test_killed_while_it_waits_the_next_one_finds_the_run_that_is_on_its_way(on: Bench, web: Web) -> None:
    late = another(on, "i-late", job="slow", partition=None, within="1s")
    plan = late.plan()
    left = late.apply(plan.changes[0])
    assert left.outcome is Outcome.FAILED
    assert "goes on after 1s" in left.reason
    (web.home / "go").touch()
    found = another(on, "i-late", job="slow", partition=None).apply(plan.changes[0])
    assert (found.outcome, found.detail["run"]) == (Outcome.APPLIED, left.detail["run"])


@pytest.mark.xdist_group("dagster-web")
def test_a_launch_whose_answer_was_lost_is_found_and_not_repeated(
    on: Bench, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    action = another(on, "i-lost", job="plain", partition=None)
    launch = action._launch

    def lost(change: Any) -> Any:
        launch(change)
        raise UnreachableError("Dagster did not answer in time")

    monkeypatch.setattr(action, "_launch", lost)
    result = on.go(action)
    assert (result.status, web.ran()) == (Status.DONE, ["none"])

    def never(change: Any) -> Any:
        raise UnreachableError("Dagster did not answer in time")

    action = RUN.action(replace(on.context(RUN, Quick(), job="plain", partition=None), incident_id="i-never"))
    monkeypatch.setattr(action, "_launch", never)
    result = on.go(action)
    assert (result.status, web.ran()) == (Status.FAILED, ["none"])


@pytest.mark.xdist_group("dagster-web")
def test_a_run_that_fails_is_a_failure_and_may_be_tried_again(on: Bench, web: Web) -> None:
    config = {"ops": {"may_fail": {"config": {"fail": True}}}}
    action = another(on, "i-fragile", job="fragile", partition=None, config=config)
    result = on.go(action)
    assert result.status is Status.FAILED
    assert "ended with FAILURE" in result.outcomes[0][1].reason
    (web.home / "mended").touch()
    result = on.go(another(on, "i-fragile", job="fragile", partition=None, config=config))
    assert result.status is Status.DONE
    assert len(result.plan.facts["runs_of_this_incident"]) == 1


@pytest.mark.xdist_group("dagster-web")
def test_what_dagster_refuses_is_named(on: Bench) -> None:
    with pytest.raises(NotThereError, match="there is no job 'nothing'"):
        on.run(RUN, job="nothing")
    with pytest.raises(NotThereError, match="there is no job"):
        on.run(RUN, job="tidy", location="elsewhere")
    result = on.go(another(on, "i-wrong", job="fragile", partition=None, config={"nonsense": 1}))
    assert result.status is Status.FAILED
    assert "RunConfigValidationInvalid" in result.outcomes[0][1].reason
    assert result.verification is not None
    assert result.verification.holds is None
    with pytest.raises(NotThereError, match="has no partition 'no-such-target'"):
        on.run(RUN, job="tidy", partition="no-such-target")
    with pytest.raises(NotThereError, match="has no partition 'app-db'"):
        on.run(RUN, job="plain")
    with pytest.raises(NotThereError, match="is run by partition, and none is given"):
        on.run(RUN, job="tidy", partition=None)


@pytest.mark.xdist_group("dagster-web")
def test_a_web_server_that_only_reads_says_so(shared_cluster: Cluster, tmp_path: Path) -> None:
    web = Web(tmp_path, "--read-only")
    try:
        with bench(
            shared_cluster, body={"platform": {"name": "tests", "dagster": {"url": web.url, "timeout": "60s"}}}
        ) as at:
            result = at.run(RUN, job="plain", partition=None)
            assert result.status is Status.FAILED
            assert "must not run with --read-only" in result.outcomes[0][1].reason
    finally:
        web.close()


def test_without_a_dagster_in_the_inventory_or_behind_its_address_it_says_so(
    at: Bench, receiver: Receiver, shared_cluster: Cluster
) -> None:
    with pytest.raises(UsageError, match="names no Dagster"):
        at.action(RUN, job="tidy")
    for url, error in ((receiver.url, OpsError), (f"http://127.0.0.1:{free_port()}", UnreachableError)):
        with (
            bench(shared_cluster, body={"platform": {"name": "tests", "dagster": {"url": url}}}) as made,
            pytest.raises(error),
        ):
            made.run(RUN, job="tidy")


def test_an_answer_that_is_not_dagsters_is_refused(at: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two code locations with one job, and answers that mean nothing: over the playbook's own parsing."""
    from ops_platform.remediation.playbooks.anything.dagster_job import RunJobAction

    class Api:
        host, said = "dagster", b""

        def request(self, *_: Any, **__: Any) -> Any:
            from ops_platform.clients.http import Answer

            return Answer(200, {}, self.said, self.host)

    api = Api()
    monkeypatch.setattr(type(at.access), "dagster", lambda _self: api)
    action = RUN.action(at.context(RUN, job="tidy"))
    assert isinstance(action, RunJobAction)
    for api.said in (b"[]", b"{}", b'{"data": null}', b'{"data": {"repositoriesOrError": 7}}', b"<html>"):
        with pytest.raises(BadAnswerError):
            action.plan()
    nodes = [
        {"name": "__repository__", "location": {"name": name}, "pipelines": [{"name": "tidy"}]} for name in ("a", "b")
    ]
    api.said = json.dumps(
        {"data": {"repositoriesOrError": {"__typename": "RepositoryConnection", "nodes": nodes}}}
    ).encode()
    with pytest.raises(ConflictError, match="several have a job 'tidy': a, b"):
        action.plan()
