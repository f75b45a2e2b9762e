"""Vault and OpenBao: secrets behind `vault://` references, and the Transit key that wraps data keys.

One session per server: logs in at first use, renews its token and its leases before they end, logs in again when the token
is gone, and gives dynamic credentials back when it is closed.
"""

from __future__ import annotations

import base64
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ops_platform.clients.keys import DataKey
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import AccessDeniedError, CorruptionError, NotThereError, OpsError, UnreachableError
from ops_platform.inventory.model import VaultAuth
from ops_platform.inventory.values import Secret, SecretRef


@dataclass
class _Lease:
    lease_id: str
    data: dict[str, Any]
    renewable: bool
    renew_at: datetime
    ends: datetime


class VaultSession:
    """Safe for threads. Raises UnreachableError (away, sealed), AccessDeniedError (login, policy), NotThereError (path, field)."""

    def __init__(
        self,
        url: str,
        auth: VaultAuth,
        resolve: Callable[[SecretRef], Secret],
        *,
        namespace: str | None = None,
        ca: str | None = None,
        timeout: float = 10.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.url = url
        self._auth = auth
        self._resolve = resolve
        self._namespace = namespace
        self._ca = ca
        self._timeout = timeout
        self._clock = clock
        self._lock = threading.RLock()
        self._client: Any = None
        self._token_renew_at: datetime | None = None
        self._leases: dict[str, _Lease] = {}

    # Reading secrets

    def read(self, path: str, field: str) -> Secret:
        """One field of a KV (version 2 or 1) secret, or of dynamic credentials."""
        data = self.credentials(path) if "/creds/" in path else self._kv(path)
        if field not in data:
            raise NotThereError(
                f"the secret has no field {field!r}; it has {', '.join(sorted(data)) or 'none'}",
                where=f"vault://{path}",
            )
        return Secret(str(data[field]))

    def _kv(self, path: str) -> dict[str, Any]:
        mount, _, rest = path.partition("/")
        where = f"vault://{path}"
        # Version 2 stands below `data/`; a version 1 mount has nothing there and answers the plain path.
        found = self.call(lambda client: client.read(f"{mount}/data/{rest}"), where)
        if found:
            return found["data"]["data"]
        found = self.call(lambda client: client.read(path), where)
        if not found:
            raise NotThereError(
                "Vault has nothing there", where=where, remedy="check mount and path, or write the secret"
            )
        return found["data"]

    def credentials(self, path: str) -> dict[str, Any]:
        """Dynamic credentials: user and password of one lease, renewed at two thirds of its time, replaced when it ends."""
        with self._lock:
            lease, now = self._leases.get(path), self._clock.now()
            if lease and lease.renewable and lease.renew_at <= now < lease.ends:
                lease_id = lease.lease_id
                with contextlib.suppress(OpsError):
                    answer = self.call(lambda client: client.sys.renew_lease(lease_id), f"vault://{path}")
                    lease = self._leases[path] = self._lease(answer, lease.data)
            if lease is None or lease.renew_at <= now:
                answer = self.call(lambda client: client.read(path), f"vault://{path}")
                if not answer:
                    raise NotThereError(
                        "there is no such role",
                        where=f"vault://{path}",
                        remedy="create it in the database secrets engine",
                    )
                lease = self._leases[path] = self._lease(answer, answer["data"])
            return lease.data

    def _lease(self, answer: dict[str, Any], data: dict[str, Any]) -> _Lease:
        seconds, now = answer["lease_duration"], self._clock.now()
        renew_at = now + timedelta(seconds=seconds * 2 / 3)
        return _Lease(answer["lease_id"], data, answer["renewable"], renew_at, now + timedelta(seconds=seconds))

    # Calls

    def call(self, ask: Callable[[Any], Any], where: str) -> Any:
        """Ask with a living token; a token that is refused is replaced once. Errors are turned into ours."""
        with self._lock:
            for attempt in (1, 2):
                client = self._logged_in()
                try:
                    return ask(client)
                except Exception as error:  # noqa: BLE001 - hvac and requests raise many kinds; `_translate` names them
                    found = self._translate(error, where)
                    if attempt == 2 or not isinstance(found, AccessDeniedError):
                        raise found from None
                    self._client = None
            raise AssertionError("the loop returns or raises")

    def _logged_in(self) -> Any:
        now = self._clock.now()
        if self._client is not None and self._token_renew_at is not None and now >= self._token_renew_at:
            try:
                self._note_ttl(self._client.auth.token.renew_self()["auth"])
            except Exception:  # noqa: BLE001 - then a new login decides
                self._client = None
        if self._client is None:
            self._client = self._login()
        return self._client

    def _login(self) -> Any:
        import hvac

        verify: bool | str = self._ca or True
        client: Any = hvac.Client(url=self.url, namespace=self._namespace, verify=verify, timeout=int(self._timeout))
        client.token = None  # never one that happens to stand in the environment
        auth, where = self._auth, f"{self.url} ({self._auth.method} login)"
        try:
            if auth.method == "token" and auth.token:
                client.token = self._resolve(auth.token).reveal()
                self._token_renew_at = None
                return client
            if auth.method == "approle" and auth.role_id and auth.secret_id:
                role, secret = self._resolve(auth.role_id).reveal(), self._resolve(auth.secret_id).reveal()
                answer = client.auth.approle.login(role, secret, mount_point=auth.mount or "approle")
            else:
                jwt = Path(auth.jwt_path).read_text()
                answer = client.auth.kubernetes.login(auth.role, jwt, mount_point=auth.mount or "kubernetes")
        except OpsError:
            raise
        except Exception as error:  # noqa: BLE001
            raise self._translate(error, where) from None
        client.token = answer["auth"]["client_token"]
        self._note_ttl(answer["auth"])
        return client

    def _note_ttl(self, auth: dict[str, Any]) -> None:
        seconds = auth.get("lease_duration") or 0
        self._token_renew_at = self._clock.now() + timedelta(seconds=seconds * 2 / 3) if seconds else None

    def _translate(self, error: Exception, where: str) -> OpsError:  # noqa: PLR0911 - a table of cases
        import hvac.exceptions as vault
        import requests

        text = " ".join(str(error).split(", on ")[0].split())
        if isinstance(error, OpsError):
            return error
        if "sealed" in text.lower() or isinstance(error, vault.VaultDown):
            return UnreachableError(
                "Vault is sealed", where=f"{self.url} {where}", remedy="unseal it; nothing can be read until then"
            )
        if isinstance(error, (vault.Forbidden, vault.Unauthorized)):
            return AccessDeniedError(
                f"Vault refuses: {text}", where=where, remedy="check the policy of this platform's role for that path"
            )
        if isinstance(error, vault.InvalidPath):
            return NotThereError("Vault has nothing there", where=where, remedy="check mount and path")
        if isinstance(error, vault.InvalidRequest):
            if "login" in where:
                return AccessDeniedError(
                    f"Vault refuses the login: {text}", where=where, remedy="check role_id, secret_id and their age"
                )
            return _InvalidRequestError(f"Vault refuses the request: {text}", where=where)
        if isinstance(error, (requests.RequestException, vault.VaultError, OSError)):
            reason = type(error).__name__ if isinstance(error, requests.RequestException) else text
            return UnreachableError(
                f"Vault does not answer: {reason}", where=f"{self.url} {where}", remedy="check address, TLS and network"
            )
        return OpsError(f"Vault: {type(error).__name__}: {text}", where=where)

    def close(self) -> None:
        """Give dynamic credentials back. Best effort: a lease that cannot be revoked ends by itself."""
        with self._lock:
            leases, self._leases = list(self._leases.values()), {}
            for lease in leases:
                with contextlib.suppress(OpsError):
                    self.call(lambda client, lease=lease: client.sys.revoke_lease(lease.lease_id), lease.lease_id)


class _InvalidRequestError(OpsError):
    """Status 400: for Transit a deleted key or a ciphertext that is not its own."""


class TransitKeys:
    """A `KeyService` over Vault's Transit engine. The wrapping key never leaves Vault."""

    def __init__(self, session: VaultSession, *, mount: str = "transit", key: str = "ops-backup") -> None:
        self._session = session
        self._mount = mount
        self._key = key
        self._known: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"{self._session.url}/{self._mount}/{self._key}"

    def new_data_key(self) -> DataKey:
        answer = self._ask(
            lambda client: client.secrets.transit.generate_data_key(self._key, "plaintext", mount_point=self._mount)
        )
        plain, wrapped = base64.b64decode(answer["data"]["plaintext"]), answer["data"]["ciphertext"]
        with self._lock:
            self._known[wrapped] = plain
        return DataKey(plain, wrapped)

    def unwrap(self, wrapped: str) -> bytes:
        with self._lock:
            if wrapped in self._known:
                return self._known[wrapped]
        try:
            answer = self._ask(
                lambda client: client.secrets.transit.decrypt_data(self._key, wrapped, mount_point=self._mount)
            )
        except _InvalidRequestError as error:
            raise CorruptionError(f"the wrapped data key does not open: {error.what}", where=self.name) from error
        plain = base64.b64decode(answer["data"]["plaintext"])
        with self._lock:
            self._known[wrapped] = plain
        return plain

    def check(self) -> dict[str, object]:
        data = self._ask(lambda client: client.secrets.transit.read_key(self._key, mount_point=self._mount))["data"]
        self.unwrap(self.new_data_key().wrapped)
        return {"key": self._key, "type": data["type"], "exportable": data["exportable"], "versions": len(data["keys"])}

    def _ask(self, ask: Callable[[Any], Any]) -> Any:
        try:
            return self._session.call(ask, self.name)
        except _InvalidRequestError as error:
            if "not found" in error.what:
                raise NotThereError(
                    f"the key {self._key!r} is gone",
                    where=self.name,
                    remedy="restore it from Vault's backup: without it no backup can be read",
                ) from error
            raise


class FileKeys:
    """A `KeyService` with a wrapping key in a local file, for places without a Vault. AES-256-GCM."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def name(self) -> str:
        return f"file://{self._path}"

    def _wrapping(self) -> Any:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        try:
            if self._path.stat().st_mode & 0o077:
                raise AccessDeniedError(
                    "others may read the key file", where=self.name, remedy=f"chmod 600 {self._path}"
                )
            raw = bytes.fromhex(self._path.read_text().strip())
        except FileNotFoundError:
            raise NotThereError(
                "there is no such key file", where=self.name, remedy="openssl rand -hex 32 makes one; keep a copy"
            ) from None
        except (OSError, ValueError) as error:
            raise OpsError(f"the key file cannot be read: {type(error).__name__}", where=self.name) from None
        if len(raw) != 32:
            raise OpsError(
                "the key file holds 32 bytes in hex", where=self.name, remedy="openssl rand -hex 32 makes one"
            )
        return AESGCM(raw)

    def new_data_key(self) -> DataKey:
        import os

        plain, nonce = os.urandom(32), os.urandom(12)
        wrapped = self._wrapping().encrypt(nonce, plain, b"ops_platform data key")
        return DataKey(plain, "file:v1:" + base64.b64encode(nonce + wrapped).decode())

    def unwrap(self, wrapped: str) -> bytes:
        from cryptography.exceptions import InvalidTag

        try:
            raw = base64.b64decode(wrapped.removeprefix("file:v1:"), validate=True)
            return self._wrapping().decrypt(raw[:12], raw[12:], b"ops_platform data key")
        except (InvalidTag, ValueError) as error:
            raise CorruptionError("the wrapped data key does not open with this key file", where=self.name) from error

    def check(self) -> dict[str, object]:
        self.unwrap(self.new_data_key().wrapped)
        return {"key": str(self._path), "type": "aes256-gcm", "exportable": True, "versions": 1}
