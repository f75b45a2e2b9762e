"""How a kubeconfig's context, or a pod's service account, becomes a session of the official client.

The client's own reader of kubeconfig files writes certificates and keys to /tmp, where a killed process leaves them; here they
go from memory into the TLS context. A kubeconfig that starts a program (`exec`) or does not check the server is refused.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import logging
import os
import ssl
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from ops_platform.errors import NotThereError, UsageError
from ops_platform.inventory.values import Secret


@dataclass(frozen=True)
class Login:
    """What a kubeconfig's context comes to."""

    server: str
    ca: bytes | None
    server_name: str | None
    proxy: str | None
    certificate: bytes | None
    key: bytes | None
    authorization: Callable[[], str] | None


def in_cluster(system_id: str) -> Any:
    """By the pod's service account; its token is read again each minute, as it is rotated."""
    from kubernetes import client, config

    configuration = _configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException as error:
        raise NotThereError(
            f"this is no pod of a cluster: {error}",
            where=system_id,
            remedy="name a kubeconfig for the system, or run where a service account is mounted",
        ) from None
    return _named(client.ApiClient(configuration))


def _configuration(server: str | None = None) -> Any:
    """The client's own, which asks nothing twice by itself and leaves the logs of the whole process as they are."""
    from kubernetes import client

    # Its constructor sets the levels of these, and who looks into urllib3's log for secrets would see nothing any more.
    levels = {name: logging.getLogger(name).level for name in ("client", "urllib3")}
    configuration: Any = client.Configuration(host=server)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    configuration.retries = False  # asking again is decided in `Kubernetes`, with its clock
    return configuration


def api_client(login: Login) -> Any:
    from kubernetes import client

    configuration = _configuration(login.server)
    configuration.tls_server_name = login.server_name
    configuration.proxy = login.proxy or configuration.proxy
    if login.authorization:
        read = login.authorization

        def refresh(into: Any) -> None:
            into.api_key["authorization"] = read()

        refresh(configuration)
        configuration.refresh_api_key_hook = refresh
    api = _named(client.ApiClient(configuration))
    if login.server.startswith("https://"):
        api.rest_client.pool_manager.connection_pool_kw["ssl_context"] = _tls(login)
    return api


def _named(api: Any) -> Any:
    from ops_platform import __version__

    api.user_agent = f"ops-platform/{__version__}"
    return api


def _tls(login: Login) -> ssl.SSLContext:
    """Always checks the server. The client's key passes through a file without a name, as OpenSSL reads files alone."""
    try:
        context = ssl.create_default_context(cadata=login.ca.decode("ascii") if login.ca else None)
        if login.certificate and login.key:
            with ExitStack() as held:
                certificate, key = (held.enter_context(_nameless(part)) for part in (login.certificate, login.key))
                context.load_cert_chain(f"/dev/fd/{certificate.fileno()}", f"/dev/fd/{key.fileno()}")
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(
            f"a certificate or key of the kubeconfig cannot be used: {getattr(error, 'reason', None) or type(error).__name__}",
            where=login.server,
            remedy="check that they are PEM and belong together",
        ) from None
    return context


def _nameless(data: bytes) -> IO[bytes]:
    file = os.fdopen(os.memfd_create("key"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()  # noqa: SIM115 - the caller does
    file.write(data)
    file.flush()
    file.seek(0)
    return file


def read_kubeconfig(content: Secret, context: str | None, where: str) -> Login:
    """The login of one context. No part of the content ever stands in an error."""
    import yaml

    def wrong(
        what: str, remedy: str = "kubectl config view --minify --flatten --raw writes one that can be used"
    ) -> UsageError:
        return UsageError(what, where=where, remedy=remedy)

    try:
        config = yaml.safe_load(content.reveal())
    except yaml.YAMLError:
        raise wrong("the kubeconfig is no YAML") from None
    if not isinstance(config, dict):
        raise wrong("the kubeconfig is no mapping")

    def named(kind: str, name: Any) -> Mapping[str, Any]:
        entries = config.get(f"{kind}s")
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("name") == name and isinstance(entry.get(kind), dict):
                return entry[kind]
        raise wrong(f"the kubeconfig has no {kind} {name!r}" if name else f"the kubeconfig names no {kind}")

    chosen = named("context", context or config.get("current-context"))
    cluster, user = named("cluster", chosen.get("cluster")), named("user", chosen.get("user"))
    if "exec" in user or "auth-provider" in user:
        raise wrong(
            "the kubeconfig starts a program to log in, which is refused",
            "use a service account's token or a client certificate",
        )
    if cluster.get("insecure-skip-tls-verify"):
        raise wrong("the kubeconfig does not check the server, which is refused", "give certificate-authority-data")
    server = str(cluster.get("server") or "").rstrip("/")
    if not server.startswith("https://") and not _is_loopback(server):
        raise wrong("the kubeconfig's server is no https:// address", "only a loopback address may do without TLS")
    certificate, key = (_bytes_of(user, name, wrong) for name in ("client-certificate", "client-key"))
    if (certificate is None) != (key is None):
        raise wrong("client-certificate and client-key go together")
    return Login(
        server,
        _bytes_of(cluster, "certificate-authority", wrong),
        cluster.get("tls-server-name"),
        cluster.get("proxy-url"),
        certificate,
        key,
        _authorization(user, wrong),
    )


def _is_loopback(server: str) -> bool:
    parts = urlsplit(server)
    try:
        return parts.scheme == "http" and ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def _bytes_of(entry: Mapping[str, Any], name: str, wrong: Callable[..., UsageError]) -> bytes | None:
    """`NAME-data` in base64, or the file that `NAME` names."""
    if data := entry.get(f"{name}-data"):
        try:
            return base64.b64decode(data, validate=True)
        except (TypeError, binascii.Error):
            raise wrong(f"{name}-data of the kubeconfig is no base64") from None
    if not (path := entry.get(name)):
        return None
    file = Path(str(path))
    if not file.is_absolute():
        raise wrong(f"{name} of the kubeconfig is a relative path")
    try:
        return file.read_bytes()
    except OSError as error:
        raise wrong(f"{name} of the kubeconfig cannot be read: {error.strerror}", f"check {file}") from None


def _authorization(user: Mapping[str, Any], wrong: Callable[..., UsageError]) -> Callable[[], str] | None:
    """What the header says; a token's file is read each time, as it is rotated."""
    if token := user.get("token"):
        return lambda: f"Bearer {token}"
    if path := user.get("tokenFile"):

        def read() -> str:
            try:
                return f"Bearer {Path(str(path)).read_text().strip()}"
            except OSError as error:
                raise wrong(f"tokenFile of the kubeconfig cannot be read: {error.strerror}", f"check {path}") from None

        return read
    if "username" in user and "password" in user:
        basic = base64.b64encode(f"{user['username']}:{user['password']}".encode()).decode()
        return lambda: f"Basic {basic}"
    return None
