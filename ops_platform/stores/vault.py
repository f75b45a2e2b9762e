"""Vault and OpenBao with raft storage: the snapshot of the API, restored into a server that is alone, unsealed, and read.

Format: the snapshot is a gzipped tar of meta.json, state.bin and SHA256SUMS (and SHA256SUMS.sealed, which only the unsealed server can
check). API: /v1/sys/storage/raft/snapshot and -force. What it holds is encrypted by the barrier, and the key shares open it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import tarfile
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from ops_platform.backup.repository import Repository
from ops_platform.clients.vault import TransitKeys, VaultSession
from ops_platform.errors import (
    AccessDeniedError,
    CorruptionError,
    CouldNotVerifyError,
    NotThereError,
    OpsError,
    UsageError,
)
from ops_platform.stores.kind import (
    FAILED,
    NOT_APPLICABLE,
    PASSED,
    UNCHECKED,
    Check,
    Dumped,
    Finding,
    Need,
    Parts,
    Saved,
)
from ops_platform.stores.servers import Server, find_program, need_own_network, socket_path

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory.model import Backed, KeyService
    from ops_platform.inventory.systems import StoreTarget, VaultSystem
    from ops_platform.inventory.values import Secret, SecretRef

SNAPSHOT = "snapshot"
_RAFT = "sys/storage/raft/snapshot"
_MEMBERS = ("meta.json", "state.bin", "SHA256SUMS")
_PIECE = 1 << 20
_SEALED_FOR = 20.0  # seconds; a seal that fits opens it at once, one over the network after a few tries
# In the sandbox's own network nobody else has these.
_API, _CLUSTER = "http://127.0.0.1:8200", "http://127.0.0.1:8201"
_ACTS = "a restored Vault would revoke at the live databases what its leases say"


def open_store(access: Access, target: StoreTarget) -> VaultStore:
    return VaultStore(access, target, cast("VaultSystem", target.system))


@dataclass(frozen=True)
class VaultStore:
    """`stores.kind.Kind` over one Vault."""

    access: Access
    target: StoreTarget
    system: VaultSystem

    # What has to be there

    def needs(self) -> Iterator[Need]:
        """`stores.kind.Needing`: what opens a copy, and the secret that is looked for in it."""
        restore = self.system.restore
        opens = "seal" if restore.seal is not None else "key shares"
        without = "name restore.shares, or restore.seal: nobody can look into a copy without them"
        yield Need(opens, self._can_be_opened, without)
        yield Need(
            "canary", self._can_be_known_again, f"{_write('secret/ops/canary', 'value')}; and name it: restore.canary"
        )

    def _can_be_opened(self) -> str | None:
        restore = self.system.restore
        if restore.seal is not None:
            _seal_stanza(self.access.secret(restore.seal).reveal(), restore.seal)
            return "its stanza can be read"
        for ref in restore.shares:
            self.access.secret(ref)
        if not restore.shares:
            return None
        needed, named = int(_seal_status(self.access.vault(self.system.vault))["t"]), len(restore.shares)
        if named < needed:
            raise CouldNotVerifyError(f"{named} named, and it takes {needed}", remedy="name as many as the threshold")
        return f"{named} can be read, and it takes {needed}"

    def _can_be_known_again(self) -> str | None:
        """A dump reads it with the platform's login, a proof with the one for the copy."""
        ref, other = self.system.restore.canary, self.system.restore.auth
        if ref is None:
            return None
        _need_canary(self.access.vault(self.system.vault), ref, "the platform's policy")
        if other is not None:
            with closing(self.access.vault_as(self.system.vault, other)) as session:
                _need_canary(session, ref, "the policy of restore.auth")
        return f"{ref} can be read"

    # Dump

    def look(self) -> str:
        """It is open, knows us, and lets us take a snapshot: its version it would tell to anybody, sealed as well."""
        session = self.access.vault(self.system.vault)
        status = self._status(session)
        found = session.call(lambda client: client.sys.get_capabilities([_RAFT]), session.url)["data"][_RAFT]
        if not {"read", "root"} & set(found):
            raise AccessDeniedError(
                "it lets us in, and we may not take a snapshot",
                where=session.url,
                remedy=f"allow read on {_RAFT} in the platform's policy",
            )
        return _server(status)

    def dump(self, parts: Parts) -> Dumped:
        session = self.access.vault(self.system.vault)
        status = self._status(session)
        facts: dict[str, Any] = {name: status.get(name) for name in ("type", "t", "n", "cluster_id")}
        facts["canary"] = self._canary(session)
        where = f"{session.url}/v1/{_RAFT}"
        response = session.call(lambda client: client.sys.take_raft_snapshot(), where)
        with parts.part(SNAPSHOT) as write:
            facts |= _read_snapshot(cast("IO[bytes]", _Tee(_stream(response), write)), where)
        return Dumped(source=session.url, server=_server(status), facts=facts)

    def _status(self, session: VaultSession) -> Any:
        """Raises UsageError for a server without snapshots."""
        status = _seal_status(session)
        if status["storage_type"] != "raft":
            raise UsageError(
                f"its storage is {status['storage_type']}, and only raft storage has snapshots",
                where=session.url,
                remedy="migrate it to raft (operator migrate), or back that storage up itself",
            )
        return status

    def _canary(self, session: VaultSession) -> dict[str, str] | None:
        """A salted digest of the canary secret, to know it again."""
        ref = self.system.restore.canary
        if ref is None:
            return None
        salt = secrets.token_hex(16)
        value = session.read(ref.path, ref.field or "value").reveal()
        return {"salt": salt, "digest": _salted(salt, value)}

    # Level 1

    def files(self, saved: Saved) -> Iterator[Check]:
        def sums() -> Finding:
            with saved.part(SNAPSHOT).open("rb") as stored:
                found = _read_snapshot(stored, saved.backup_id)
            text = f"state of {found['state_bytes']} bytes at raft index {found['index']}, term {found['term']}"
            return Finding(PASSED, text, {"index": found["index"], "term": found["term"]})

        yield Check("sums", "The snapshot's own sums are right", "SHA256SUMS in the snapshot", sums)

    # Level 2

    def need_programs(self) -> None:
        self._program()

    def _program(self) -> str:
        need_own_network(_ACTS)
        programs = self.target.sandbox.programs
        return find_program("vault" if "vault" in programs else "bao", programs, "openbao")

    @contextmanager
    def restore(self, saved: Saved, home: Path) -> Generator[RestoredVault]:
        program = self._program()
        # What cannot be read is said before anything is started.
        shares = [self.access.secret(ref) for ref in self.system.restore.shares]
        place = home / "vault"
        place.mkdir(mode=0o700)
        listening = socket_path(place, "s")
        client = _client(listening)
        server = Server(
            "vault",
            [program, "server", f"-config={self._configuration(place, listening)}"],
            place,
            lambda: _answers(client),
            env={"VAULT_TOKEN": "", "BAO_TOKEN": ""},
            clock=self.access.clock,
        )
        with server:
            version = _load(client, server, saved, auto=self.system.restore.seal is not None)
            opened = _unsealed(client, server, saved, shares, auto=self.system.restore.seal is not None)
            auth = self.system.restore.auth or self.access.inventory.vaults[self.system.vault].auth
            session = VaultSession(
                _API, auth, self.access.secret, socket=listening, timeout=30, clock=self.access.clock
            )
            try:
                yield RestoredVault(self, saved, session, opened, version)
            finally:
                session.close()

    def _configuration(self, place: Path, listening: Path) -> Path:
        data = place / "raft"
        data.mkdir(mode=0o700)
        config: dict[str, Any] = {
            "storage": {"raft": {"path": str(data), "node_id": "sandbox", "performance_multiplier": "1"}},
            # Over TCP it calls itself, in its own network; we come through the socket.
            "listener": [
                {"unix": {"address": str(listening), "socket_mode": "600"}},
                {"tcp": {"address": _API.removeprefix("http://"), "tls_disable": True}},
            ],
            "api_addr": _API,
            "cluster_addr": _CLUSTER,
            "ui": False,
        }
        if self.system.restore.seal is not None:
            config["seal"] = _seal_stanza(
                self.access.secret(self.system.restore.seal).reveal(), self.system.restore.seal
            )
        file = place / "config.json"
        file.touch(mode=0o600)
        file.write_text(json.dumps(config))
        return file

    def wrapped_here(self) -> list[tuple[Backed, KeyService]]:
        """Whatever is backed up with data keys that this Vault's Transit wraps."""
        inventory = self.access.inventory
        found: list[tuple[Backed, KeyService]] = []
        for backed in inventory.all_backed():
            service = inventory.key_services.get(backed.repository.keys or "")
            if service is None or backed.repository.engine != "native":
                continue
            if service.kind == "vault-transit" and service.vault == self.system.vault:
                found.append((backed, service))
        return found


@dataclass(frozen=True)
class RestoredVault:
    """The copy, unsealed where `opened` says so."""

    store: VaultStore
    saved: Saved
    session: VaultSession
    opened: Finding
    server: str

    def checks(self) -> Iterator[Check]:
        seal = "the seal that the inventory names" if self.store.system.restore.seal else "the key shares"
        yield Check("unseal", f"It opens with {seal}", "sys/unseal, sys/seal-status", lambda: self.opened)
        if self.opened.status is not PASSED:
            return
        yield Check("login", "The platform's own login works in it", "auth/token/lookup-self", self._login)
        yield Check("canary", "The canary secret reads as in the original", "salted SHA-256 of its value", self._canary)
        wrapped = self.store.wrapped_here()
        if not wrapped:
            nobody = Finding(NOT_APPLICABLE, "no backup in the inventory has its data keys wrapped by this Vault")
            yield Check("data-keys", "Backups open with its Transit key", "", lambda: nobody)
        for backed, service in wrapped:
            yield Check(
                f"data-key-{backed.id}",
                f"The newest backup of {backed.id} opens with its Transit key",
                f"{service.mount}/decrypt/{service.key} of the manifest's data key, then the manifest's own code",
                lambda backed=backed, service=service: self._data_key(backed, service),
            )

    def _login(self) -> Finding:
        found = self.session.call(lambda client: client.auth.token.lookup_self(), _API)["data"]
        return Finding(PASSED, f"logged in by {found.get('path', 'a token')}")

    def _canary(self) -> Finding:
        ref, known = self.store.system.restore.canary, self.saved.facts.get("canary")
        if ref is None:
            return Finding(NOT_APPLICABLE, "the inventory names none (restore.canary)")
        if known is None:
            return Finding(UNCHECKED, "it was not named yet when this backup was taken")
        try:
            value = self.session.read(ref.path, ref.field or "value").reveal()
        except NotThereError as error:
            return Finding(FAILED, str(error))
        same = _salted(known["salt"], value) == known["digest"]
        return Finding(
            PASSED if same else FAILED, "the same" if same else "its value is not the one that was backed up"
        )

    def _data_key(self, backed: Backed, service: KeyService) -> Finding:
        keys = TransitKeys(self.session, mount=service.mount, key=service.key)
        repository = Repository(self.store.access.store(backed.repository.store or ""), keys, backed.id)
        for backup_id in reversed(repository.backup_ids()):
            if repository.store.head(repository.manifest_key(backup_id)) is None:
                continue
            try:
                repository.any_manifest(backup_id)  # unwraps its data key, and checks its code with it
            except NotThereError as error:
                return Finding(FAILED, str(error))
            return Finding(PASSED, f"{backup_id} opens", {"backup": backup_id})
        return Finding(NOT_APPLICABLE, f"there is no backup of {backed.id} yet")


# The canary


def _need_canary(session: VaultSession, ref: SecretRef, policy: str) -> None:
    """Raises NotThereError and AccessDeniedError with what to type."""
    field = ref.field or "value"
    try:
        session.read(ref.path, field)
    except NotThereError as error:
        # Where the secret is there it may hold more, which is left alone.
        remedy = _write(ref.path, field, how="patch" if "has no field" in error.what else "put")
        raise NotThereError(error.what, where=str(ref), remedy=remedy) from None
    except AccessDeniedError as error:
        if error.where != f"vault://{ref.path}":  # the login itself was refused
            raise
        mount, _, rest = ref.path.partition("/")
        line = f'path "{mount}/data/{rest}" {{ capabilities = ["read"] }}'
        raise AccessDeniedError(
            error.what, where=str(ref), remedy=f"write into {policy}: {line} (KV version 1: without data/)"
        ) from None


def _write(path: str, field: str, *, how: str = "put") -> str:
    mount, _, rest = path.partition("/")
    return f"openssl rand -hex 16 | tr -d '\\n' | vault kv {how} -mount={mount} {rest} {field}=-"


# The snapshot's own form


class _Tee:
    """A file to read from, whose bytes are also written on."""

    def __init__(self, source: Iterator[bytes], write: Callable[[bytes], None]) -> None:
        self._source, self._write, self._left = source, write, b""

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._left) < size:
            piece = next(self._source, b"")
            if not piece:
                break
            self._write(piece)
            self._left += piece
        found, self._left = (self._left, b"") if size < 0 else (self._left[:size], self._left[size:])
        return found


class _Gunzip:
    """The plain bytes of a gzip stream; `ended`: its trailer was there, and fits."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed, self._left = packed, b""
        self._unpack = zlib.decompressobj(31)

    @property
    def ended(self) -> bool:
        return self._unpack.eof

    def read(self, size: int) -> bytes:
        while len(self._left) < size and not self.ended:
            piece = self._unpack.unconsumed_tail or self._packed.read(1 << 16)
            if not piece:
                break
            self._left += self._unpack.decompress(piece, _PIECE)
        found, self._left = self._left[:size], self._left[size:]
        return found


def _stream(response: Any) -> Iterator[bytes]:
    import requests

    try:
        yield from response.iter_content(_PIECE)
    except (requests.RequestException, OSError) as error:
        raise CorruptionError(f"the snapshot broke off: {type(error).__name__}", where=str(response.url)) from None
    finally:
        response.close()


def _read_snapshot(stored: IO[bytes], where: str) -> dict[str, Any]:
    """Its index, term and size. Raises CorruptionError for one that is cut off, and for contents that are not what its sums say."""
    digests: dict[str, str] = {}
    texts: dict[str, bytes] = {}
    size = 0
    try:
        plain = _Gunzip(stored)
        with tarfile.open(fileobj=cast("IO[bytes]", plain), mode="r|") as tar:
            for member in tar:
                content, digest = tar.extractfile(member), hashlib.sha256()
                while content is not None and (piece := content.read(_PIECE)):
                    digest.update(piece)
                    if member.name == "state.bin":
                        size += len(piece)
                    else:
                        texts[member.name] = (texts.get(member.name, b"") + piece)[: 1 << 20]
                digests[member.name] = digest.hexdigest()
        while plain.read(_PIECE):  # behind the tar's end there is padding, and the trailer
            pass
        if not plain.ended:
            raise EOFError("its end is missing")
        while stored.read(_PIECE):
            pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise CorruptionError(
            f"the snapshot is cut off or no snapshot: {error}",
            where=where,
            remedy="take it again; nothing of it counts",
        ) from None
    missing = [name for name in _MEMBERS if name not in digests]
    if missing:
        raise CorruptionError(f"the snapshot has no {missing[0]}: it is cut off", where=where)
    sums = {line.split()[1]: line.split()[0] for line in _lines(texts["SHA256SUMS"]) if len(line.split()) == 2}
    wrong = [name for name in ("meta.json", "state.bin") if sums.get(name) != digests[name]]
    if wrong:
        raise CorruptionError(f"{wrong[0]} in the snapshot is not what its sums say", where=where)
    meta = json.loads(texts["meta.json"])
    return {"index": meta.get("Index"), "term": meta.get("Term"), "state_bytes": size}


def _lines(text: bytes) -> list[str]:
    return text.decode("utf-8", "replace").splitlines()


# The sandbox


def _client(listening: Path) -> Any:
    import hvac

    from ops_platform.clients.unix_http import unix_session

    # A restore answers when all of it is in.
    client: Any = hvac.Client(url=_API, session=unix_session(listening, timeout=3600), timeout=3600)
    client.token = None
    return client


def _answers(client: Any) -> bool:
    try:
        client.sys.is_initialized()
    except Exception:  # noqa: BLE001 - whatever it is, it is not ready
        return False
    return True


def _is_active(client: Any) -> bool:
    try:
        return bool(client.sys.read_leader_status()["is_self"])
    except Exception:  # noqa: BLE001 - sealed, or before its election
        return False


def _load(client: Any, server: Server, saved: Saved, *, auto: bool) -> str:
    """Initialise an empty one, and bring the snapshot in. Returns product and version."""
    import hvac.exceptions
    import requests

    shares = "recovery" if auto else "secret"
    try:
        made = client.sys.initialize(**{f"{shares}_shares": 1, f"{shares}_threshold": 1})
        if not auto:
            client.sys.submit_unseal_key(made["keys_base64"][0])
    except (hvac.exceptions.VaultError, requests.RequestException) as error:
        raise CouldNotVerifyError(f"an empty Vault does not open here: {_said(error)}: {server.tail()}") from None
    server.wait(lambda: _is_active(client), "become active")
    client.token = made["root_token"]
    version = _server(client.sys.read_seal_status())
    if _major(version) < _major(saved.server):
        raise CouldNotVerifyError(
            f"the snapshot is of {saved.server}, and the sandbox has {version}",
            remedy="name a program of the same major under sandbox.programs",
        )
    try:
        with saved.part(SNAPSHOT).open("rb") as stored:
            client.sys.force_restore_raft_snapshot(stored)
    except hvac.exceptions.VaultError as error:
        raise CorruptionError(f"it does not take the snapshot: {_said(error)}", where=saved.backup_id) from None
    except requests.RequestException as error:
        raise CouldNotVerifyError(f"the restore broke off: {type(error).__name__}: {server.tail()}") from None
    client.token = None
    return version


def _unsealed(client: Any, server: Server, saved: Saved, shares: list[Secret], *, auto: bool) -> Finding:
    """Open the copy as the inventory says. A refusal is a finding: so would the recovery in earnest end."""
    if auto:
        return _opened_by_seal(client, server, saved)
    if not shares:
        return Finding(UNCHECKED, "the inventory names no key shares and no seal (restore): nobody looked into it")
    needed = int(saved.facts.get("t") or 0)
    if len(shares) < needed:
        return Finding(UNCHECKED, f"{len(shares)} key shares are named, and it takes {needed}")
    # It seals itself when it finds that the keys are others.
    server.wait(lambda: _sealed(client) is True, "seal itself over the restored state")
    import hvac.exceptions
    import requests

    for share in shares:
        try:
            status = client.sys.submit_unseal_key(share.reveal())
        except hvac.exceptions.VaultError as error:
            return Finding(FAILED, f"the key shares do not open it: {_said(error)}; were they changed (rekey) since?")
        except requests.RequestException as error:
            raise CouldNotVerifyError(f"the unsealing broke off: {type(error).__name__}: {server.tail()}") from None
        if not status["sealed"]:
            break
    else:
        return Finding(FAILED, f"{len(shares)} key shares do not open it")
    server.wait(lambda: _is_active(client), "become active")
    return Finding(PASSED, f"opened by {needed} of {saved.facts.get('n')} shares")


def _opened_by_seal(client: Any, server: Server, saved: Saved) -> Finding:
    """It seals itself over the restored state, and opens again where the seal is the one of the source."""
    known, since = saved.facts.get("cluster_id"), list[float]()

    def decided() -> bool:
        if not _sealed(client):
            since.clear()
            # Before it seals itself it is still the empty one.
            return _is_active(client) and client.sys.read_seal_status().get("cluster_id") == known
        since.append(time.monotonic())
        return since[-1] - since[0] > _SEALED_FOR

    server.wait(decided, "open by its seal")
    if since:
        return Finding(FAILED, f"its seal does not open it: {server.tail(2)}")
    return Finding(PASSED, "opened by its seal")


def _sealed(client: Any) -> bool | None:
    try:
        return bool(client.sys.read_seal_status()["sealed"])
    except Exception:  # noqa: BLE001 - in between it answers nothing
        return None


def _seal_stanza(text: str, where: object) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        raise OpsError(
            "the seal stanza is no JSON", where=str(where), remedy='{"static": {"current_key": "file:///…"}}'
        ) from None
    if not isinstance(found, dict) or len(cast("dict[str, Any]", found)) != 1:
        raise OpsError("the seal stanza is one object with the seal's type as its key", where=str(where))
    return cast("dict[str, Any]", found)


def _seal_status(session: VaultSession) -> dict[str, Any]:
    return session.call(lambda client: client.sys.read_seal_status(), session.url)


def _server(status: dict[str, Any]) -> str:
    return f"Vault-compatible server {status['version']}"


def _major(server: str) -> int:
    number = server.rpartition(" ")[2].partition(".")[0]
    return int(number) if number.isdigit() else 0


def _salted(salt: str, value: str) -> str:
    return hashlib.sha256(f"{salt}{value}".encode()).hexdigest()


def _said(error: Exception) -> str:
    return " ".join(str(error).split(", on ")[0].split())[:300]
