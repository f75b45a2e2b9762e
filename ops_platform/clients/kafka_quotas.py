"""Client quotas of Kafka, which librdkafka's admin client does not know: read and set over the wire protocol itself.

Messages: https://kafka.apache.org/protocol, DescribeClientQuotas (48) and AlterClientQuotas (49) in version 0, SaslHandshake (17) in version 1,
SaslAuthenticate (36) in version 0. SCRAM: RFC 5802, without channel binding.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import secrets
import socket
import ssl
import struct
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from ops_platform.clients.kafka import Kafka
from ops_platform.errors import AccessDeniedError, OpsError, UnreachableError

_HANDSHAKE, _AUTHENTICATE, _DESCRIBE, _ALTER = 17, 36, 48, 49
_DENIED = {29, 31, 58}  # TOPIC/CLUSTER_AUTHORIZATION_FAILED, SASL_AUTHENTICATION_FAILED
_LARGEST = 64 << 20


@dataclass(frozen=True)
class Quota:
    """`entity`: pairs of type (user, client-id, ip) and name, None for the default of the type. `limits`: pairs of key and value."""

    entity: tuple[tuple[str, str | None], ...]
    limits: tuple[tuple[str, float], ...]


def describe_quotas(kafka: Kafka) -> list[Quota]:
    """All of them. Our user needs describe configs on the cluster. Raises UnreachableError, AccessDeniedError, OpsError."""
    with _connected(kafka) as wire:
        answer = wire.ask(_DESCRIBE, 0, struct.pack(">i?", 0, False))
        answer.int32()
        code, said = answer.int16(), answer.text()
        if code:
            raise _refused(code, said, kafka)
        found = [Quota(_entity(answer), _limits(answer)) for _ in range(max(0, answer.int32()))]
    return sorted(found, key=lambda one: [(kind, name or "") for kind, name in one.entity])


def set_quotas(kafka: Kafka, quotas: Sequence[Quota]) -> None:
    """Set each of them; those that are there beside them stay."""
    body = [struct.pack(">i", len(quotas))]
    for quota in quotas:
        body.append(struct.pack(">i", len(quota.entity)))
        body += [_text(kind) + _text(name) for kind, name in quota.entity]
        body.append(struct.pack(">i", len(quota.limits)))
        body += [_text(key) + struct.pack(">d?", value, False) for key, value in quota.limits]
    with _connected(kafka) as wire:
        answer = wire.ask(_ALTER, 0, b"".join(body) + b"\0")
        answer.int32()
        for _ in range(answer.int32()):
            code, said = answer.int16(), answer.text()
            _entity(answer)
            if code:
                raise _refused(code, said, kafka)


def _entity(answer: _Answer) -> tuple[tuple[str, str | None], ...]:
    return tuple(
        sorted(((answer.text() or "", answer.text()) for _ in range(answer.int32())), key=lambda pair: pair[0])
    )


def _limits(answer: _Answer) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((answer.text() or "", answer.float64()) for _ in range(answer.int32())))


def _refused(code: int, said: str | None, kafka: Kafka) -> OpsError:
    kind = AccessDeniedError if code in _DENIED else OpsError
    return kind(f"Kafka refuses: error {code} {said or ''}".strip(), where=kafka.where)


# The wire


class _Answer:
    def __init__(self, content: bytes) -> None:
        self._left = BytesIO(content)

    def _unpack(self, form: str) -> Any:
        return struct.unpack(form, self._left.read(struct.calcsize(form)))[0]

    def int16(self) -> int:
        return self._unpack(">h")

    def int32(self) -> int:
        return self._unpack(">i")

    def float64(self) -> float:
        return self._unpack(">d")

    def text(self) -> str | None:
        size = self.int16()
        return None if size < 0 else self._left.read(size).decode()

    def data(self) -> bytes:
        return self._left.read(max(0, self.int32()))


class _Wire:
    """A connection to one broker."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._stream, self._number = connection, connection.makefile("rb"), 0

    def ask(self, api: int, version: int, body: bytes) -> _Answer:
        self._number += 1
        head = struct.pack(">hhi", api, version, self._number) + _text("ops-platform")
        self._connection.sendall(struct.pack(">i", len(head) + len(body)) + head + body)
        size = struct.unpack(">i", self._exactly(4))[0]
        if not 4 <= size <= _LARGEST:
            raise ConnectionError("the answer is not of Kafka's protocol")
        answer = _Answer(self._exactly(size))
        if answer.int32() != self._number:
            raise ConnectionError("the answer is not to what was asked")
        return answer

    def _exactly(self, size: int) -> bytes:
        found = self._stream.read(size)
        if len(found) != size:
            raise ConnectionError("the connection was closed")
        return found


def _text(content: str | None) -> bytes:
    if content is None:
        return struct.pack(">h", -1)
    encoded = content.encode()
    return struct.pack(">h", len(encoded)) + encoded


@contextlib.contextmanager
def _connected(kafka: Kafka) -> Generator[_Wire]:
    """Logged in at the first broker that answers."""
    settings, failures = kafka.settings(), list[str]()
    for server in str(settings["bootstrap.servers"]).split(","):
        host, _, port = server.rpartition(":")
        begun = False
        try:
            with _opened(host.strip("[]"), int(port), settings, kafka.timeout) as connection:
                wire = _Wire(connection)
                _log_in(wire, settings, kafka)
                begun = True
                yield wire
                return
        except (OSError, struct.error) as error:
            failures.append(f"{server}: {type(error).__name__}")
            if begun:  # nobody else is asked half of a question
                break
    raise UnreachableError(
        f"no broker answers: {'; '.join(failures)}", where=kafka.where, remedy="check `bootstrap`, `tls` and `ca`"
    )


@contextlib.contextmanager
def _opened(host: str, port: int, settings: dict[str, Any], timeout: float) -> Generator[socket.socket]:
    with socket.create_connection((host, port), timeout=timeout) as plain:
        if not str(settings["security.protocol"]).endswith("SSL"):
            yield plain
            return
        context = ssl.create_default_context(cafile=settings.get("ssl.ca.location"))
        with context.wrap_socket(plain, server_hostname=host) as secured:
            yield secured


def _log_in(wire: _Wire, settings: dict[str, Any], kafka: Kafka) -> None:
    mechanism = settings.get("sasl.mechanisms")
    if mechanism is None:
        return
    code = wire.ask(_HANDSHAKE, 1, _text(str(mechanism))).int16()
    if code:
        raise _refused(58, f"it does not take {mechanism}", kafka)

    def say(data: bytes) -> bytes:
        answer = wire.ask(_AUTHENTICATE, 0, struct.pack(">i", len(data)) + data)
        code, said = answer.int16(), answer.text()
        if code:
            raise _refused(code, said, kafka)
        return answer.data()

    user, password = str(settings["sasl.username"]), str(settings["sasl.password"])
    if mechanism == "PLAIN":
        say(f"\0{user}\0{password}".encode())
    else:
        _scram(say, "sha256" if mechanism == "SCRAM-SHA-256" else "sha512", user, password, kafka)


def _scram(say: Callable[[bytes], bytes], algorithm: str, user: str, password: str, kafka: Kafka) -> None:
    """RFC 5802: neither side says the password, and both show that they know it."""
    name, nonce = user.replace("=", "=3D").replace(",", "=2C"), secrets.token_urlsafe(24)
    bare = f"n={name},r={nonce}"
    first = say(f"n,,{bare}".encode()).decode()
    fields = dict(part.split("=", 1) for part in first.split(","))
    if not fields["r"].startswith(nonce):
        raise _refused(58, "the broker answers another login", kafka)
    salted = hashlib.pbkdf2_hmac(algorithm, password.encode(), base64.b64decode(fields["s"]), int(fields["i"]))
    final = f"c=biws,r={fields['r']}"
    words = f"{bare},{first},{final}".encode()
    client = hmac.digest(salted, b"Client Key", algorithm)
    signature = hmac.digest(hashlib.new(algorithm, client).digest(), words, algorithm)
    proof = base64.b64encode(bytes(a ^ b for a, b in zip(client, signature, strict=True))).decode()
    told = dict(part.split("=", 1) for part in say(f"{final},p={proof}".encode()).decode().split(","))
    expected = hmac.digest(hmac.digest(salted, b"Server Key", algorithm), words, algorithm)
    if not hmac.compare_digest(base64.b64decode(told.get("v", "")), expected):
        raise _refused(58, "the broker does not know our password itself", kafka)
