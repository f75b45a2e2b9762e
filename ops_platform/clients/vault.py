"""Vault and OpenBao: secrets behind `vault://` references, and the Transit key that wraps data keys.

One session per server: logs in at first use, renews its token and its leases before they end, logs in again when the token
is gone, asks again when no answer came, and gives dynamic credentials and its token back when it is closed.
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

_TRIES = 3


@dataclass(frozen=True)
class _Lease:
    lease_id: str
    data: dict[str, Secret]
    renewable: bool
    whole: timedelta
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
        socket: Path | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`socket`: a unix socket on which it listens, instead of the address."""
        self.url = url
        self._auth = auth
        self._resolve = resolve
        self._namespace = namespace
        self._ca = ca
        self._timeout = timeout
        self._socket = socket
        self._clock = clock
        self._lock = threading.RLock()
        self._client: Any = None
        self._token_renew_at: datetime | None = None
        self._leases: dict[str, _Lease] = {}
        self._given_up: list[str] = []  # leases that were replaced: still good for who uses them, revoked at the end

    # Reading secrets

    def read(self, path: str, field: str) -> Secret:
        """One field of a KV (version 2 or 1) secret, or of dynamic credentials."""
        data = self.credentials(path) if "/creds/" in path else self._kv(path)
        if field not in data:
            raise NotThereError(
                f"the secret has no field {field!r}; it has {', '.join(sorted(data)) or 'none'}",
                where=f"vault://{path}",
                remedy="name one of these behind the # of the reference, or write that one",
            )
        return data[field]

    def _kv(self, path: str) -> dict[str, Secret]:
        """Version 2 of the engine stands below `data/`; a version 1 mount has nothing there and answers the plain path."""
        mount, _, rest = path.partition("/")
        versioned, where = f"{mount}/data/{rest}", f"vault://{path}"
        denied: dict[str, _DeniedError] = {}
        for at in (versioned, path):
            try:
                found = self.call(lambda client, at=at: client.read(at), where)
            except _DeniedError as error:
                denied[at] = error
                continue
            if found:
                data = found["data"]
                return _secrets(data.get("data") or {} if at == versioned and "metadata" in data else data)
        if versioned in denied:
            # A policy for version 2 that forgets `data/` is the usual mistake, and would read as "nothing there".
            raise AccessDeniedError(
                denied[versioned].what,
                where=where,
                remedy=f"allow read on {versioned} (KV version 2) or on {path} (version 1) in the platform's policy",
            )
        raise NotThereError("Vault has nothing there", where=where, remedy="check mount and path, or write the secret")

    def credentials(self, path: str) -> dict[str, Secret]:
        """Dynamic credentials: user and password of one lease, renewed at two thirds of its time, replaced when it ends."""
        with self._lock:
            lease, now = self._leases.get(path), self._clock.now()
            if lease and lease.renewable and lease.renew_at <= now < lease.ends:
                lease = self._renewed(path, lease)
            if lease is None or lease.renew_at <= now:
                answer = self.call(lambda client: client.read(path), f"vault://{path}")
                if not answer:
                    raise NotThereError(
                        "there is no such role",
                        where=f"vault://{path}",
                        remedy="create it in the database secrets engine",
                    )
                whole = timedelta(seconds=answer["lease_duration"])
                lease = self._lease(answer, _secrets(answer["data"]), whole)
                self._replace(path, lease)
            return lease.data

    def _renewed(self, path: str, lease: _Lease) -> _Lease | None:
        """The same credentials for longer; None where Vault gives no more time worth speaking of (its max_ttl is near)."""
        try:
            answer = self.call(lambda client: client.sys.renew_lease(lease.lease_id), f"vault://{path}")
        except OpsError:
            return None
        if path not in self._leases:
            return None  # the login was renewed too, and the lease went with the old one
        renewed = self._lease(answer, lease.data, lease.whole)
        if renewed.ends - self._clock.now() < lease.whole / 2:
            return None
        self._leases[path] = renewed
        return renewed

    def _replace(self, path: str, lease: _Lease) -> None:
        if old := self._leases.get(path):
            self._given_up.append(old.lease_id)
        self._leases[path] = lease

    def _lease(self, answer: dict[str, Any], data: dict[str, Secret], whole: timedelta) -> _Lease:
        seconds, now = answer["lease_duration"], self._clock.now()
        renew_at = now + timedelta(seconds=seconds * 2 / 3)
        return _Lease(answer["lease_id"], data, answer["renewable"], whole, renew_at, now + timedelta(seconds=seconds))

    # Calls

    def call(self, ask: Callable[[Any], Any], where: str) -> Any:
        """Ask with a living token, and again when no answer comes. Errors are turned into ours."""
        with self._lock:
            for attempt in range(1, _TRIES + 1):
                try:
                    return self._with_token(ask, where)
                except VaultSealedError:
                    raise
                except UnreachableError:
                    if attempt == _TRIES:
                        raise
                    self._clock.sleep(0.2 * 2**attempt)
            raise AssertionError("the loop returns or raises")

    def _with_token(self, ask: Callable[[Any], Any], where: str) -> Any:
        """A token that is refused because it is dead is replaced, once; one that lives is refused by its policy."""
        client = self._logged_in()
        try:
            return ask(client)
        except Exception as error:  # noqa: BLE001 - hvac and requests raise many kinds; `_translate` names them
            found = self._translate(error, where)
            if not isinstance(found, _DeniedError) or self._lives(client):
                raise found from None
        self._client = None
        client = self._logged_in()
        try:
            return ask(client)
        except Exception as error:  # noqa: BLE001
            raise self._translate(error, where) from None

    def _lives(self, client: Any) -> bool:
        try:
            client.auth.token.lookup_self()
        except Exception:  # noqa: BLE001 - then a new login decides
            return False
        return True

    def _logged_in(self) -> Any:
        if self._client is not None and self._token_renew_at is not None and self._clock.now() >= self._token_renew_at:
            try:
                self._note_ttl(self._client.auth.token.renew_self()["auth"])
            except Exception as error:  # noqa: BLE001
                # Without an answer the token may live on, and with it the leases that hang on it.
                if not isinstance(self._translate(error, "token renewal"), UnreachableError):
                    self._client = None
        if self._client is None:
            self._client = self._login()
            # What the old token had leased ends with it, whatever the lease said.
            self._given_up += [lease.lease_id for lease in self._leases.values()]
            self._leases.clear()
        return self._client

    def _login(self) -> Any:
        import hvac

        verify: bool | str = self._ca or True
        more: dict[str, Any] = {}
        if self._socket is not None:
            from ops_platform.clients.unix_http import unix_session

            more = {"session": unix_session(self._socket, timeout=self._timeout)}
        client: Any = hvac.Client(url=self.url, namespace=self._namespace, verify=verify, timeout=self._timeout, **more)  # pyright: ignore[reportArgumentType] - requests takes fractions
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
                jwt = self._service_account(auth.jwt_path)
                answer = client.auth.kubernetes.login(auth.role, jwt, mount_point=auth.mount or "kubernetes")
        except OpsError:
            raise
        except Exception as error:  # noqa: BLE001
            raise self._translate(error, where, login=True) from None
        client.token = answer["auth"]["client_token"]
        self._note_ttl(answer["auth"])
        return client

    def _service_account(self, path: str) -> str:
        try:
            return Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise NotThereError(
                f"the pod's service account token cannot be read: {type(error).__name__}",
                where=path,
                remedy="mount it (automountServiceAccountToken), or set auth.jwt_path",
            ) from None

    def _note_ttl(self, auth: dict[str, Any]) -> None:
        seconds = auth.get("lease_duration") or 0
        self._token_renew_at = self._clock.now() + timedelta(seconds=seconds * 2 / 3) if seconds else None

    def _translate(self, error: Exception, where: str, *, login: bool = False) -> OpsError:  # noqa: PLR0911 - a table of cases
        import hvac.exceptions as vault
        import requests

        text = " ".join(str(error).split(", on ")[0].split())
        place = where if where.startswith(self.url) else f"{self.url} {where}"
        if isinstance(error, OpsError):
            return error
        if isinstance(error, vault.VaultError) and "sealed" in text.lower():
            return VaultSealedError("Vault is sealed", where=place, remedy="unseal it; nothing can be read until then")
        if login and isinstance(error, vault.Forbidden | vault.Unauthorized | vault.InvalidRequest):
            return AccessDeniedError(
                f"Vault refuses the login: {text}", where=where, remedy=_LOGIN_REMEDY[self._auth.method]
            )
        if isinstance(error, vault.Forbidden | vault.Unauthorized):
            return _DeniedError(
                f"Vault refuses: {text}", where=where, remedy="check the policy of this platform's role for that path"
            )
        if isinstance(error, vault.VaultError) and "SQLSTATE 42501" in text:
            return AccessDeniedError(
                f"Vault's own role in the database may not make ours: {text}",
                where=where,
                remedy="give it what docs/how-to/least-privilege-role.md says: CREATEROLE, REPLICATION, the group WITH ADMIN OPTION",
            )
        if isinstance(error, vault.InvalidPath):
            return NotThereError("Vault has nothing there", where=where, remedy="check mount and path")
        if isinstance(error, vault.InvalidRequest):
            return _InvalidRequestError(f"Vault refuses the request: {text}", where=where)
        if isinstance(error, vault.VaultError):
            return UnreachableError(
                f"Vault cannot answer: {text or type(error).__name__}", where=place, remedy="look at Vault's own log"
            )
        if isinstance(error, requests.exceptions.SSLError):
            return UnreachableError(
                "TLS with Vault failed",
                where=place,
                remedy="set ca to the PEM file of Vault's CA, and check the address",
            )
        if isinstance(error, requests.RequestException | OSError):
            return UnreachableError(
                f"Vault does not answer: {type(error).__name__}",
                where=place,
                remedy="check address, network and whether it runs",
            )
        return OpsError(f"Vault: {type(error).__name__}: {text}", where=where)

    def close(self) -> None:
        """Give dynamic credentials and our own token back. Best effort: what cannot be revoked ends by itself."""
        with self._lock:
            leases = [*self._given_up, *(lease.lease_id for lease in self._leases.values())]
            client, self._client = self._client, None
            self._leases, self._given_up = {}, []
            if client is None:
                return
            for lease_id in leases:
                with contextlib.suppress(Exception):
                    client.sys.revoke_lease(lease_id)
            if self._auth.method != "token":  # one that was handed to us is not ours to end
                with contextlib.suppress(Exception):
                    client.auth.token.revoke_self()


_LOGIN_REMEDY = {
    "approle": "check role_id, secret_id and their age",
    "kubernetes": "check auth.role, and the service account and namespace that it is bound to",
    "token": "check the token",
}


def _secrets(data: dict[str, Any]) -> dict[str, Secret]:
    return {name: Secret(str(value)) for name, value in data.items()}


class VaultSealedError(UnreachableError):
    """It answers and can read nothing: a person has to unseal it, asking again does not help."""


class _DeniedError(AccessDeniedError):
    """Status 403 to a request: the token is dead or its policy does not allow it. Not a login that was refused."""


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

    def wrap(self, plain: bytes) -> str:
        text = base64.b64encode(plain).decode()
        answer = self._ask(
            lambda client: client.secrets.transit.encrypt_data(self._key, plaintext=text, mount_point=self._mount)
        )
        return answer["data"]["ciphertext"]

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


class TransitSigner:
    """Signs with an ed25519 key of Vault's Transit engine, which never leaves it. A key's id is its name and version: `ops-ledger:v3`."""

    def __init__(self, session: VaultSession, *, mount: str = "transit", key: str = "ops-ledger") -> None:
        self._session = session
        self._mount = mount
        self._key = key

    @property
    def name(self) -> str:
        return f"{self._session.url}/{self._mount}/{self._key}"

    def public_keys(self) -> dict[str, bytes]:
        """The raw public keys (32 bytes) of every version that Vault has not archived, oldest first."""
        data = self._ask(lambda client: client.secrets.transit.read_key(self._key, mount_point=self._mount))["data"]
        if data["type"] != "ed25519":
            raise OpsError(
                f"the key is of type {data['type']}, and signing needs ed25519",
                where=self.name,
                remedy=f"vault write {self._mount}/keys/NAME type=ed25519, and name it in the inventory",
            )
        versions = sorted((int(version), found["public_key"]) for version, found in data["keys"].items())
        return {f"{self._key}:v{version}": base64.b64decode(public) for version, public in versions}

    def sign(self, message: bytes, keyid: str) -> bytes | None:
        """64 bytes; None where that version does not sign any more (`min_encryption_version`)."""
        version = self._version(keyid)
        text = base64.b64encode(message).decode()
        try:
            answer = self._ask(
                lambda client: client.secrets.transit.sign_data(
                    self._key, text, key_version=version, mount_point=self._mount
                )
            )
        except UnreachableError as error:  # Vault answers 500 to this
            if "minimum encryption key version" in error.what:
                return None
            raise
        found, _, signature = answer["data"]["signature"].removeprefix("vault:").partition(":")
        if found != f"v{version}":
            raise OpsError(f"Vault signed with {found} and was asked for v{version}", where=self.name)
        return base64.b64decode(signature)

    def verify(self, message: bytes, keyid: str, signature: bytes) -> bool:
        """What Vault itself says of a signature."""
        text = base64.b64encode(message).decode()
        whole = f"vault:v{self._version(keyid)}:{base64.b64encode(signature).decode()}"
        try:
            answer = self._ask(
                lambda client: client.secrets.transit.verify_signed_data(
                    self._key, text, signature=whole, mount_point=self._mount
                )
            )
        except _InvalidRequestError:
            return False
        return answer["data"]["valid"] is True

    def _version(self, keyid: str) -> int:
        name, _, version = keyid.rpartition(":v")
        if name != self._key or not version.isdigit():
            raise NotThereError(f"the key {keyid!r} is not a version of {self._key!r}", where=self.name)
        return int(version)

    def _ask(self, ask: Callable[[Any], Any]) -> Any:
        try:
            return self._session.call(ask, self.name)
        except (NotThereError, _InvalidRequestError) as error:
            # Asked for its public keys, Vault says 404 of a key that is not there; asked to sign, 400.
            if isinstance(error, _InvalidRequestError) and "not found" not in error.what:
                raise
            raise NotThereError(
                f"there is no signing key {self._key!r}",
                where=self.name,
                remedy=f"vault write -f {self._mount}/keys/{self._key} type=ed25519",
            ) from error


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

        plain = os.urandom(32)
        return DataKey(plain, self.wrap(plain))

    def wrap(self, plain: bytes) -> str:
        import os

        nonce = os.urandom(12)
        wrapped = self._wrapping().encrypt(nonce, plain, b"ops_platform data key")
        return "file:v1:" + base64.b64encode(nonce + wrapped).decode()

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
