"""DSSE envelopes (https://github.com/secure-systems-lab/dsse) around in-toto Statements v1 (https://in-toto.io), ed25519 signatures.

Pure functions: whoever signs gives a signature, whoever verifies gives a public key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from ops_platform.errors import CorruptionError, UsageError
from ops_platform.ledger.chain import canonical

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"


class Signer(Protocol):
    """Signs with the newest version of a key, and on request with older ones. `keyid` is name and version, `ops-ledger:v3`.

    Raises UnreachableError (no answer, sealed), AccessDeniedError (policy), NotThereError (no such key).
    """

    def public_keys(self) -> Mapping[str, bytes]:
        """The raw public keys (32 bytes) of every version that there still is, oldest first."""
        ...

    def sign(self, message: bytes, keyid: str) -> bytes | None:
        """64 bytes; None where that version does not sign any more."""
        ...


@dataclass(frozen=True)
class Envelope:
    """`payload` is what was signed, byte for byte; `signatures` by key id."""

    payload: bytes
    signatures: Mapping[str, bytes]

    @property
    def sha256(self) -> str:
        """Of the payload: another signature under the same statement does not make it another one."""
        return hashlib.sha256(self.payload).hexdigest()

    @property
    def statement(self) -> dict[str, Any]:
        """The Statement. Raises CorruptionError for anything else."""
        try:
            found = cast("object", json.loads(self.payload))
        except ValueError as error:
            raise CorruptionError(f"the payload is no JSON: {error}") from None
        if not isinstance(found, dict) or found.get("_type") != STATEMENT_TYPE:
            raise CorruptionError("the payload is no in-toto Statement v1")
        return cast("dict[str, Any]", found)

    def verified_by(self, keys: Mapping[str, bytes]) -> bytes | None:
        """One of these public keys that has signed it. A key id is a hint and no more: what counts is the key."""
        message = pae(PAYLOAD_TYPE, self.payload)
        for name, signature in self.signatures.items():
            for public in [keys[name]] if name in keys else set(keys.values()):
                if verify(public, message, signature):
                    return public
        return None

    def to_bytes(self) -> bytes:
        signatures = [{"keyid": name, "sig": _text(signature)} for name, signature in self.signatures.items()]
        whole = {"payload": _text(self.payload), "payloadType": PAYLOAD_TYPE, "signatures": signatures}
        return canonical(whole).encode()

    @classmethod
    def parse(cls, raw: bytes) -> Envelope:
        """Raises CorruptionError."""
        try:
            found = json.loads(raw)
            if found["payloadType"] != PAYLOAD_TYPE:
                raise CorruptionError(f"the envelope's payload is of type {found['payloadType']!r}")
            signatures = {str(each["keyid"]): _bytes(each["sig"]) for each in found["signatures"]}
            return cls(_bytes(found["payload"]), signatures)
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptionError(f"this is no DSSE envelope: {type(error).__name__}: {error}") from None


def signed(statement: Mapping[str, Any], signer: Signer, keyids: list[str]) -> Envelope:
    """The statement under the signature of each of these keys that still signs; the last of them must."""
    payload = canonical({"_type": STATEMENT_TYPE, **statement}).encode()
    message = pae(PAYLOAD_TYPE, payload)
    made = {name: signature for name in keyids if (signature := signer.sign(message, name)) is not None}
    if keyids[-1] not in made:
        raise UsageError(f"the key {keyids[-1]} does not sign", remedy="see its min_encryption_version in Vault")
    return Envelope(payload, made)


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed says how long each of its parts is."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def pem(public: bytes) -> str:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = Ed25519PublicKey.from_public_bytes(public)
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def from_pem(text: bytes, where: str) -> bytes:
    """The raw public key. Raises UsageError for what is no ed25519 public key in PEM."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    try:
        key = load_pem_public_key(text)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError("this is no ed25519 public key in PEM", where=where, remedy="ops ledger keys prints them")
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def fingerprint(public: bytes) -> str:
    """SHA-256 of the key's SubjectPublicKeyInfo, as `openssl pkey -pubin -outform DER | sha256sum` gives it."""
    # RFC 8410: the only SubjectPublicKeyInfo that an ed25519 key has.
    return hashlib.sha256(bytes.fromhex("302a300506032b6570032100") + public).hexdigest()


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:  # DSSE takes both alphabets
        return base64.b64decode(text, altchars=b"-_", validate=True)
