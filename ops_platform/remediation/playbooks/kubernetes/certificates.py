"""Certificates in Secrets that are about to end: renewed by cert-manager where that keeps them, else from Vault's PKI.

No key and no certificate ever stands in a plan or the ledger: what is told of them is a SHA-256 of the certificate, its names and its
end. What stood in the Secret before is kept in a Secret beside it, for the undo.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.clients.kubernetes_objects import CERTIFICATES, SECRETS, Json
from ops_platform.errors import ConflictError, NotThereError, OpsError
from ops_platform.inventory.values import Id, PositiveDuration, format_duration
from ops_platform.remediation.playbook import Context, Done, Playbook
from ops_platform.remediation.playbooks.kubernetes.shared import (
    KINDS,
    NOTHING_DONE,
    ClusterAction,
    Named,
    PatchAction,
    Waits,
    condition,
    detail_of,
    fence,
    is_true,
    mark,
    marked,
    time_to_look,
    title_of,
    waited,
)

if TYPE_CHECKING:
    from cryptography import x509

RENEWED, KEPT = "ops-platform/renewed-for", "ops-platform/kept-certificate"
_BY_CERT_MANAGER = "cert-manager.io/certificate-name"
_CERTIFICATE, _KEY, _CA = "tls.crt", "tls.key", "ca.crt"


class RenewParameters(Named, Waits):
    renew_before: PositiveDuration = Field(
        default=timedelta(days=30), description="A certificate that is valid for longer than this is left alone."
    )
    vault: Id | None = Field(
        default=None, description="The id under `vaults` whose PKI issues; not needed with cert-manager."
    )
    mount: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$")] = Field(
        default="pki", description="Where the PKI engine is mounted."
    )
    role: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] | None = Field(
        default=None, description="Its role that issues."
    )
    ttl: PositiveDuration | None = Field(
        default=None, description="How long it is to be valid; the role's own by default."
    )


# What a Secret holds


@dataclass(frozen=True)
class Held:
    """The certificate in a Secret of the type kubernetes.io/tls."""

    chain: tuple[x509.Certificate, ...]

    @classmethod
    def of(cls, secret: Json) -> Held:
        """Raises OpsError; what the Secret holds is never repeated."""
        from cryptography import x509

        try:
            chain = x509.load_pem_x509_certificates(part(secret, _CERTIFICATE))
        except ValueError:
            raise OpsError(
                "the Secret holds no certificate that can be read", where=secret["metadata"]["name"]
            ) from None
        return cls(tuple(chain))

    @property
    def leaf(self) -> x509.Certificate:
        return self.chain[0]

    @property
    def digest(self) -> str:
        from cryptography.hazmat.primitives import hashes

        return self.leaf.fingerprint(hashes.SHA256()).hex()

    @property
    def ends(self) -> datetime:
        return self.leaf.not_valid_after_utc

    @property
    def common_name(self) -> str | None:
        from cryptography.x509.oid import NameOID

        found = self.leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(found[0].value) if found else None

    @property
    def alternatives(self) -> x509.SubjectAlternativeName | None:
        from cryptography import x509

        try:
            return self.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return None

    @property
    def names(self) -> list[str]:
        """Common name and alternative names, in order."""
        found = {f"CN:{self.common_name}"} if self.common_name else set[str]()
        return sorted(found | {f"{type(each).__name__}:{each.value}" for each in self.alternatives or ()})

    def as_json(self) -> Json:
        return {"certificate": self.digest, "names": self.names, "ends": self.ends.astimezone(UTC).isoformat()}


def part(secret: Json, name: str) -> bytes:
    try:
        return base64.b64decode((secret.get("data") or {}).get(name) or "", validate=True)
    except binascii.Error:
        return b""


def _encoded(pem: str | bytes) -> str:
    return base64.b64encode(pem if isinstance(pem, bytes) else pem.encode()).decode()


# The two ways


class _Renewal(PatchAction[RenewParameters]):
    """What both have in common: whether it is due, and how one sees that it was done."""

    secret: Json

    def changes(self) -> Plan:
        given = self.parameters
        held = Held.of(self.secret)
        left = held.ends - self.context.clock.now()
        facts: Json = {"ends": held.ends.isoformat(), "names": held.names}
        if left > given.renew_before:
            return self.planned((), facts=facts)
        return self.planned([self.change(held)], facts=facts)

    def change(self, held: Held) -> Change:
        raise NotImplementedError

    def new_certificate(self, before: Json, secret: Json) -> tuple[bool | None, str]:
        """Whether the Secret holds another certificate than before, for the same names, that is valid and fits its key."""
        held, now = Held.of(secret), self.context.clock.now()
        if held.digest == before["certificate"]:
            return None, "the certificate is still the old one"
        if held.names != before["names"]:
            return False, f"the new certificate is for {', '.join(held.names)}"
        if not held.leaf.not_valid_before_utc <= now < held.ends or held.ends <= moment_of(before["ends"]):
            return False, f"the new certificate is valid from {held.leaf.not_valid_before_utc} to {held.ends}"
        if not fits(held, part(secret, _KEY)):
            return False, "the key does not belong to the certificate"
        return True, f"a new certificate for the same names, until {held.ends:%Y-%m-%d %H:%M} UTC"


def moment_of(text: str) -> datetime:
    return datetime.fromisoformat(text)


def fits(held: Held, key: bytes) -> bool:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        public = serialization.load_pem_private_key(key, None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return public == held.leaf.public_key()


class ManagerRenewal(_Renewal):
    """By cert-manager: its own condition says that the certificate is to be issued anew, as its command line sets it."""

    subresource = "status"

    def __init__(self, context: Context[RenewParameters], name: str, secret: Json, certificate: str) -> None:
        super().__init__(context, name)
        self.secret, self._certificate = secret, certificate

    def change(self, held: Held) -> Change:
        found = self.cluster.get(CERTIFICATES, self._certificate, self.parameters.namespace)
        if found["spec"].get("secretName") != self.parameters.name:
            raise self.refuse(
                f"the Certificate {self._certificate} is not for this Secret any more", "look who keeps the Secret"
            )
        detail = detail_of(CERTIFICATES, found)
        return Change("certificate", title_of(CERTIFICATES, found), held.as_json(), {"issuing": True}, False, detail)

    def decide(self, change: Change, found: Json) -> Json | None:
        if is_true(found, "Issuing"):
            return None
        secret = self.cluster.get(SECRETS, self.parameters.name, self.parameters.namespace)
        if Held.of(secret).digest != change.before["certificate"]:
            return None  # it was renewed meanwhile
        others = [each for each in (found.get("status") or {}).get("conditions") or [] if each["type"] != "Issuing"]
        issuing = {
            "type": "Issuing",
            "status": "True",
            "reason": "ManuallyTriggered",
            "message": f"asked for by ops-platform for the incident {self.context.incident_id}",
            "lastTransitionTime": self.context.clock.now().strftime("%Y-%m-%dT%H:%M:%SZ"),
            "observedGeneration": found["metadata"].get("generation", 1),
        }
        return {"status": {"conditions": [*others, issuing]}}

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        if (within := time_to_look(outcomes, self.parameters.within)) is None:
            return NOTHING_DONE
        given, change = self.parameters, plan.changes[0]
        with self.other_way() as cluster:

            def issued() -> tuple[bool | None, str]:
                certificate = self.read(cluster, change)
                if (found := condition(certificate, "Issuing")) and found.get("reason") == "Failed":
                    return False, f"cert-manager failed: {found.get('message', '')}"
                return self.new_certificate(change.before, cluster.get(SECRETS, given.name, given.namespace))

            fields = f"metadata.name={self._certificate}"
            return Verification(
                (
                    waited(
                        cluster,
                        "certificate",
                        issued,
                        CERTIFICATES,
                        given.namespace,
                        fields=fields,
                        within=within,
                    ),
                )
            )


class VaultRenewal(_Renewal):
    """From Vault's PKI: a new key of the same sort is made here, and Vault signs the same names for it."""

    def __init__(
        self, context: Context[RenewParameters], name: str, secret: Json | None, back: Sequence[Done] = ()
    ) -> None:
        super().__init__(context, name, back)
        self.secret = secret or {}
        self._issued: Json | None = None

    def change(self, held: Held) -> Change:
        given, secret = self.parameters, self.secret
        if secret.get("type") != "kubernetes.io/tls":
            raise self.refuse(f"the Secret {given.name} is of the type {secret.get('type')}, not kubernetes.io/tls")
        if secret.get("immutable"):
            raise self.refuse(f"the Secret {given.name} is immutable", "make a new one, and name that in the workloads")
        if given.vault is None or given.role is None:
            raise self.refuse(
                "no cert-manager keeps this Secret, and vault and role are not given", "give vault and role"
            )
        if given.vault not in self.context.access.inventory.vaults:
            raise self.refuse(f"the inventory has no Vault {given.vault}", "declare it under `vaults`")
        after = {"issued_by": f"{given.vault} {given.mount}/sign/{given.role}", "names": held.names}
        detail = detail_of(SECRETS, secret, kept_as=f"{given.name}-before-renewal"[-253:])
        return Change("secret", title_of(SECRETS, secret), held.as_json(), after, True, detail)

    def check(self, change: Change) -> Applied | None:
        """Without asking Vault for anything."""
        try:
            found = self.read(self.cluster, change)
            return (
                None
                if self._is_old(change, found)
                else Applied(Outcome.ALREADY_DONE, "it was renewed in this incident")
            )
        except NotThereError as error:
            return Applied(Outcome.MISSING, error.what)
        except ConflictError as error:
            return Applied(Outcome.CONTENDED, error.what)

    def apply(self, change: Change) -> Applied:
        if not self.back:
            self._keep(change)
        return super().apply(change)

    def _is_old(self, change: Change, found: Json) -> bool:
        """False: it is done. Raises ConflictError where the Secret holds what neither stood there before nor is ours."""
        digest, ours = Held.of(found).digest, marked(found, RENEWED, self.context.incident_id) is not None
        if self.back:
            if digest == change.after["certificate"]:
                return False
            if not ours:
                raise ConflictError("somebody else has renewed it since")
            return True
        if digest == change.before["certificate"]:
            return True
        if ours:
            return False
        raise ConflictError("somebody else has renewed it since the plan was made")

    def decide(self, change: Change, found: Json) -> Json | None:
        if not self._is_old(change, found):
            return None
        data = self._kept(change) if self.back else self._new(found)
        text = None if self.back else mark(self.context.incident_id, change)
        return {"metadata": {"annotations": {RENEWED: text}}, "data": data}

    # Before

    def _keep(self, change: Change) -> None:
        """What stands there now, under another name: whoever may read the one may read the other."""
        namespace, kept = change.detail["namespace"], change.detail["kept_as"]
        found = self.read(self.cluster, change)
        if Held.of(found).digest != change.before["certificate"]:
            return  # the write finds out why
        data = {name: found["data"][name] for name in (_CERTIFICATE, _KEY, _CA) if name in found["data"]}
        note = {"annotations": {KEPT: change.before["certificate"]}}
        try:
            body = {"metadata": {"name": kept, **note}, "type": "kubernetes.io/tls", "data": data}
            self.cluster.create(SECRETS, body, namespace)
        except ConflictError:
            self.cluster.change(SECRETS, kept, lambda old: self._unless_kept(old, change, note, data), namespace)

    def _unless_kept(self, old: Json, change: Change, note: Json, data: Json) -> Json | None:
        annotations = old["metadata"].get("annotations") or {}
        if KEPT not in annotations:
            raise ConflictError(
                f"there is a Secret {old['metadata']['name']} that is not ours", remedy="remove or rename it"
            )
        return None if annotations[KEPT] == change.before["certificate"] else {"metadata": note, "data": data}

    def _kept(self, change: Change) -> Json:
        kept = self.cluster.get(SECRETS, change.detail["kept_as"], change.detail["namespace"])
        held = Held.of(kept)
        if held.digest != change.after["certificate"]:
            raise ConflictError(f"{change.detail['kept_as']} does not hold the certificate from before")
        if held.ends <= self.context.clock.now():
            raise ConflictError("the certificate from before has ended: it would help nobody")
        return kept["data"]

    # Issuing

    def _new(self, found: Json) -> Json:
        """Asked once, however often the write is tried."""
        if self._issued is None:
            self._issued = self._issue(found)
        return self._issued

    def _issue(self, found: Json) -> Json:
        from cryptography.hazmat.primitives import serialization

        given, held = self.parameters, Held.of(found)
        key = new_key_like(held.leaf.public_key())
        where = f"{given.mount}/sign/{given.role}"
        ask = {"csr": request(held, key), "common_name": held.common_name or "", "exclude_cn_from_sans": True}
        ask |= {"ttl": format_duration(given.ttl)} if given.ttl else {}
        session = self.context.access.vault(given.vault or "")
        answer: Json = session.call(lambda client: client.write_data(where, data=ask), where)["data"]
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        above = [str(each) for each in answer.get("ca_chain") or [answer["issuing_ca"]]]
        data = {_CERTIFICATE: _encoded("\n".join([answer["certificate"], *above]) + "\n"), _KEY: _encoded(pem)}
        return data | ({_CA: _encoded(above[-1] + "\n")} if _CA in found["data"] else {})

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        if time_to_look(outcomes, self.parameters.within) is None:
            return NOTHING_DONE
        change = plan.changes[0]
        with self.other_way() as cluster:
            secret = self.read(cluster, change)
        if self.back:
            right = Held.of(secret).digest == change.after["certificate"] and fits(Held.of(secret), part(secret, _KEY))
            return Verification((Check("certificate", right, "the certificate from before"),))
        holds, said = self.new_certificate(change.before, secret)
        return Verification((Check("certificate", holds is True, said), self._signed(secret)))

    def _signed(self, secret: Json) -> Check:
        """Each certificate of the chain is signed by the next."""
        from cryptography.exceptions import InvalidSignature

        chain = Held.of(secret).chain
        try:
            for below, above in pairwise(chain):
                below.verify_directly_issued_by(above)
        except (InvalidSignature, ValueError, TypeError):
            return Check("chain", False, "a certificate of the chain is not signed by the next")
        return Check("chain", len(chain) > 1, f"{len(chain)} certificates, each signed by the next")


def new_key_like(public: Any) -> Any:
    """A private key of the same sort and size. Raises OpsError for sorts that no web server has."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    match public:
        case rsa.RSAPublicKey():
            return rsa.generate_private_key(65537, max(public.key_size, 2048))
        case ec.EllipticCurvePublicKey():
            return ec.generate_private_key(public.curve)
        case ed25519.Ed25519PublicKey():
            return ed25519.Ed25519PrivateKey.generate()
        case _:
            raise OpsError(
                f"a key of the sort {type(public).__name__} is not made here", remedy="renew it by hand, once"
            )


def request(held: Held, key: Any) -> str:
    """A request for the names of `held`, in PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    builder = x509.CertificateSigningRequestBuilder().subject_name(held.leaf.subject)
    if held.alternatives is not None:
        builder = builder.add_extension(held.alternatives, critical=False)
    signed = builder.sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


class RenewAction(ClusterAction[RenewParameters]):
    """Looks who keeps the Secret, and renews it in that way."""

    @cached_property
    def way(self) -> ManagerRenewal | VaultRenewal:
        given = self.parameters
        fence(self.system, given.namespace)
        secret = self.cluster.get(SECRETS, given.name, given.namespace)
        certificate = (secret["metadata"].get("annotations") or {}).get(_BY_CERT_MANAGER)
        if certificate:
            return ManagerRenewal(self.context, self.name, secret, certificate)
        return VaultRenewal(self.context, self.name, secret)

    def plan(self) -> Plan:
        self.__dict__.pop("way", None)  # a plan looks anew
        return self.way.plan()

    def check(self, change: Change) -> Applied | None:
        return self.way.check(change)

    def apply(self, change: Change) -> Applied:
        return self.way.apply(change)

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        return self.way.verify(plan, outcomes)


class RenewCertificateSecret(Playbook[RenewParameters]):
    name = "kubernetes.renew_certificate_secret"
    title = "Renew a certificate in a Secret"
    kinds = KINDS
    what = (
        "Renews the certificate of a Secret of the type kubernetes.io/tls that ends soon. Where cert-manager keeps it, cert-manager is"
        " asked to issue it anew; else a new key of the same sort is made, Vault's PKI signs the same names for it, and the Secret gets"
        " both. What stood there before is kept in a Secret beside it (NAME-before-renewal) until the next renewal."
    )
    why_safe = (
        "The new certificate has the same names, is checked against its key and its chain, and the old one is kept."
    )
    blast_radius = (
        "Whoever uses the Secret: a server that reads it only at its start needs a restart to show the new certificate."
    )
    rights = (
        "core/secrets: get, create, patch",
        "cert-manager.io/certificates: get, list, watch",
        "cert-manager.io/certificates/status: patch",
        "in Vault: update on MOUNT/sign/ROLE",
    )
    undo_text = "Puts the kept certificate back, unless it has ended or somebody has renewed the Secret since. Not with cert-manager."
    Parameters = RenewParameters

    def action(self, context: Context[RenewParameters]) -> Action:
        return RenewAction(context, self.name)

    def undo(self, context: Context[RenewParameters], done: Sequence[Done]) -> Action | None:
        ours = [each for each in done if each.change.kind == "secret"]
        return VaultRenewal(context, self.name, None, ours) if ours else None
