"""A target's part of the object store: which key holds what, and reading and writing it with digests and seals checked.

Nothing outside the store is remembered; every question is answered from it. The layout is docs/reference/repository-format.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from pydantic import ValidationError

from ops_platform.backup.model import (
    AnyManifest,
    BackupInfo,
    BackupKind,
    Block,
    Lsn,
    Manifest,
    Proof,
    StoredPart,
    StoreManifest,
)
from ops_platform.backup.sealed import Compression, Sealed, seal, unseal
from ops_platform.clients.keys import DataKey, KeyService
from ops_platform.clients.objectstore import ObjectInfo, ObjectStore
from ops_platform.errors import ConflictError, CorruptionError, NotThereError, UsageError

M = TypeVar("M", Manifest, StoreManifest)
_BACKUP_ID = re.compile(r"\d{8}T\d{6}Z-[FI]-[0-9a-f]{8}")
_WAL_KEY = re.compile(
    r"(?P<sysid>\d+)/(?P<timeline>[0-9A-F]{8})(/(?P<name>[0-9A-F]{24})(?P<partial>\.partial)?|\.history)"
)


@dataclass(frozen=True)
class WalObject:
    """A stored WAL file as listed: `name` is PostgreSQL's file name, without `.partial`."""

    system_identifier: int
    timeline: int
    name: str
    partial: bool
    history: bool
    info: ObjectInfo


def new_backup_id(kind: BackupKind, now: datetime) -> str:
    """Sorts by time; the random part keeps two machines apart that begin in the same second."""
    return f"{now:%Y%m%dT%H%M%SZ}-{'F' if kind is BackupKind.FULL else 'I'}-{secrets.token_hex(4)}"


def is_backup_id(name: str) -> bool:
    return _BACKUP_ID.fullmatch(name) is not None


def canonical(value: object) -> bytes:
    """JSON with sorted keys, no spaces, UTF-8: what digests and codes are made of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _mac(key: bytes, purpose: str, body: Mapping[str, Any]) -> str:
    # A key of its own for each purpose, so that one code never passes for another.
    derived = hmac.new(key, b"ops_platform " + purpose.encode(), hashlib.sha256).digest()
    return hmac.new(derived, canonical(body), hashlib.sha256).hexdigest()


class Repository:
    """Everything stored for one target. Safe for several threads as far as the store and the key service are."""

    def __init__(self, store: ObjectStore, keys: KeyService, target_id: str) -> None:
        self.store = store
        self.keys = keys
        self.target_id = target_id

    # Backups

    def backup_ids(self) -> list[str]:
        """Every backup that has begun, finished or not, oldest first."""
        return sorted(self.store.list_folders(f"{self.target_id}/backup/"))

    def need_backup(self, backup_id: str) -> None:
        """Raises UsageError where none of this id has begun."""
        if backup_id not in self.backup_ids():
            raise UsageError(
                f"there is no backup {backup_id} of {self.target_id}", remedy=f"ops backup list {self.target_id}"
            )

    def manifest_key(self, backup_id: str) -> str:
        return f"{self.target_id}/backup/{backup_id}/manifest.json"

    def block_key(self, backup_id: str, archive: int, block: int) -> str:
        return f"{self.target_id}/backup/{backup_id}/data/{archive:03d}/{block:06d}"

    def part_key(self, backup_id: str, part: str) -> str:
        return f"{self.target_id}/backup/{backup_id}/{part}"

    def put_manifest(self, manifest: M, data_key: DataKey) -> M:
        """Write the manifest, authenticated: from this moment the backup exists. Returns it with its code."""
        body = manifest.model_dump(mode="json", exclude={"mac"})
        signed = manifest.model_copy(update={"mac": _mac(data_key.plain, "manifest", body)})
        text = json.dumps(signed.model_dump(mode="json"), indent=1, ensure_ascii=False).encode()
        self.store.put(self.manifest_key(manifest.backup_id), text, if_absent=True, retain=True)
        return signed

    def manifest(self, backup_id: str) -> Manifest:
        """Raises NotThereError, or CorruptionError where it is not what was written."""
        return self._manifest(Manifest, backup_id, self.store.get(self.manifest_key(backup_id)))

    def store_manifest(self, backup_id: str) -> StoreManifest:
        """The same of a store that is not PostgreSQL."""
        return self._manifest(StoreManifest, backup_id, self.store.get(self.manifest_key(backup_id)))

    def any_manifest(self, backup_id: str) -> AnyManifest:
        """Of whatever kind it says to be: a base backup's names no store."""
        return self.read_manifest(backup_id, self.store.get(self.manifest_key(backup_id)))

    def read_manifest(self, backup_id: str, raw: bytes) -> AnyManifest:
        """The same from the object's bytes."""
        if b'"store":' in raw:
            return self._manifest(StoreManifest, backup_id, raw)
        return self._manifest(Manifest, backup_id, raw)

    def _manifest(self, kind: type[M], backup_id: str, raw: bytes) -> M:
        key = self.manifest_key(backup_id)
        try:
            manifest = kind.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CorruptionError(f"the manifest cannot be read: {where} {first['msg']}", where=key) from error
        body = manifest.model_dump(mode="json", exclude={"mac"})
        try:
            data_key = self.keys.unwrap(manifest.key)
        except CorruptionError as error:
            raise CorruptionError(f"its data key does not open: {error.what}", where=key) from error
        if not hmac.compare_digest(_mac(data_key, "manifest", body), manifest.mac):
            raise CorruptionError("the manifest was changed after it was written (authentication failed)", where=key)
        if manifest.backup_id != backup_id or manifest.target_id != self.target_id:
            raise CorruptionError(f"this manifest belongs to {manifest.target_id}/{manifest.backup_id}", where=key)
        return manifest

    def manifest_digest(self, backup_id: str) -> str:
        """SHA-256 of the manifest object, which names the digest of every other one."""
        return hashlib.sha256(self.store.get(self.manifest_key(backup_id))).hexdigest()

    def backups(self) -> list[Manifest]:
        """The finished backups, oldest first. Raises on the first manifest that cannot be read; `infos` names each."""
        return sorted(map(self.manifest, self.finished()), key=lambda manifest: manifest.started_at)

    def infos(self) -> list[BackupInfo]:
        """The finished backups, oldest first; one whose manifest cannot be read is listed with its error, never left out.

        A proof that cannot be read proves nothing: its backup is listed as unproven, whatever older proofs say.
        """
        prefix, found = f"{self.target_id}/proof/", list[BackupInfo]()
        # Listed in the order of their keys, which is that of their times: the newest of each backup stays.
        newest = {info.key[len(prefix) :].partition("/")[0]: info.key for info in self.store.list(prefix)}
        for backup_id in self.finished():
            try:
                manifest, proof = self.any_manifest(backup_id), None
            except CorruptionError as error:
                found.append(_unreadable(backup_id, self.target_id, str(error)))
                continue
            with contextlib.suppress(CorruptionError):
                proof = self._proof(newest[backup_id]) if backup_id in newest else None
            found.append(info_of(manifest, proof))
        return sorted(found, key=lambda info: info.started_at)

    def finished(self) -> list[str]:
        """The ids of the backups that exist, oldest first."""
        return [i for i in self.backup_ids() if is_backup_id(i) and self.store.head(self.manifest_key(i)) is not None]

    def unfinished(self) -> list[str]:
        """Backups without a manifest: dead, or still being taken."""
        finished = set(self.finished())
        return [backup_id for backup_id in self.backup_ids() if backup_id not in finished]

    def objects_of(self, backup_id: str) -> Iterator[ObjectInfo]:
        return self.store.list(f"{self.target_id}/backup/{backup_id}/")

    def chain(self, backup_id: str) -> list[Manifest]:
        """The full backup and the incrementals up to `backup_id`, in the order in which they are combined."""
        chain = [self.manifest(backup_id)]
        while (parent := chain[0].parent_id) is not None:
            if any(manifest.backup_id == parent for manifest in chain):
                raise CorruptionError(
                    f"the chain of {backup_id} runs in a circle at {parent}", where=self.manifest_key(backup_id)
                )
            try:
                chain.insert(0, self.manifest(parent))
            except NotThereError as error:
                raise CorruptionError(
                    f"{chain[0].backup_id} builds on {parent}, which is not in the store",
                    where=self.manifest_key(parent),
                    remedy="take a full backup: ops backup run TARGET --full",
                ) from error
        return chain

    # Parts of a backup

    def put_part(self, backup_id: str, part: str, plain: bytes, data_key: DataKey) -> StoredPart:
        key = self.part_key(backup_id, part)
        stored = seal(plain, place=key, data_key=data_key)
        self.store.put(key, stored, retain=True)
        return StoredPart(key=key, stored=len(stored), sha256=hashlib.sha256(stored).hexdigest())

    def read_part(self, part: StoredPart) -> bytes:
        return self.authenticated(part.key, part.stored, part.sha256)

    def read_block(self, manifest: Manifest, archive: int, block: int) -> bytes:
        """One block's raw bytes, with size, digest and seal checked."""
        return self.open_block(manifest.archives[archive].blocks[block])

    def open_block(self, block: Block) -> bytes:
        return self.authenticated(block.key, block.stored, block.sha256)

    def pg_manifest(self, manifest: Manifest) -> bytes:
        """PostgreSQL's own backup_manifest, byte for byte."""
        return self.read_part(manifest.pg_manifest)

    def authenticated(self, key: str, size: int, sha256: str) -> bytes:
        """The plain bytes of an object that a manifest names. Raises CorruptionError for anything but what was written."""
        return unseal(self.checked(key, size, sha256), place=key, unwrap=self.keys.unwrap).plain

    def checked(self, key: str, size: int, sha256: str) -> bytes:
        """The stored bytes of an object that a manifest names, size and digest checked; raises CorruptionError."""
        try:
            stored = self.store.get(key)
        except NotThereError as error:
            raise CorruptionError(
                "the manifest names this object, and the store does not have it", where=key
            ) from error
        if len(stored) != size:
            raise CorruptionError(f"{len(stored)} bytes stand where {size} were written", where=key)
        if hashlib.sha256(stored).hexdigest() != sha256:
            raise CorruptionError("the bytes are not those that were written (SHA-256 differs)", where=key)
        return stored

    # WAL

    def wal_prefix(self, system_identifier: int | None = None) -> str:
        return f"{self.target_id}/wal/" + (f"{system_identifier}/" if system_identifier is not None else "")

    def wal_key(self, system_identifier: int, name: str, *, partial: bool = False) -> str:
        prefix = self.wal_prefix(system_identifier)
        return prefix + (name if name.endswith(".history") else f"{name[:8]}/{name}" + (".partial" if partial else ""))

    def put_wal(
        self,
        system_identifier: int,
        name: str,
        plain: bytes | bytearray | memoryview,
        *,
        data_key: DataKey,
        meta: Mapping[str, Any],
        partial: bool = False,
        compression: Compression = "zstd",
        level: int = 1,
    ) -> bool:
        """Store a segment, the unfinished one, or a history file. False: it was there with the same content.

        Raises ConflictError where a whole segment is there with other content; it is never overwritten.
        """
        key = self.wal_key(system_identifier, name, partial=partial)
        digest = hashlib.sha256(plain).hexdigest()
        noted = {**meta, "sha256": digest}
        stored = seal(plain, place=key, data_key=data_key, compression=compression, level=level, meta=noted)
        if partial:
            self.store.put(key, stored)
            return True
        try:
            self.store.put(key, stored, if_absent=True, retain=True)
        except ConflictError:
            there = self.get_wal(system_identifier, name)
            if there is not None and hashlib.sha256(there.plain).hexdigest() == digest:
                return False
            raise ConflictError(
                "the archive holds this WAL file with other content; it is not overwritten",
                where=key,
                remedy="two clusters with the same system identifier write here: give one of them its own target id",
            ) from None
        return True

    def get_wal(self, system_identifier: int, name: str, *, partial: bool = False) -> Sealed | None:
        """None only where the store said that it has no such object. Raises CorruptionError for changed bytes."""
        key = self.wal_key(system_identifier, name, partial=partial)
        try:
            stored = self.store.get(key)
        except NotThereError:
            return None
        return self.opened_wal(key, stored)

    def opened_wal(self, key: str, stored: bytes) -> Sealed:
        """What was stored under the key of a WAL file, opened. Raises CorruptionError for changed bytes."""
        sealed = unseal(stored, place=key, unwrap=self.keys.unwrap)
        if sealed.header.meta.get("sha256") != hashlib.sha256(sealed.plain).hexdigest():
            raise CorruptionError("the WAL is not what was sent (SHA-256 differs)", where=key)
        return sealed

    def wal_listing(self, system_identifier: int | None = None) -> list[WalObject]:
        """Every stored WAL file, in the order of system identifier, timeline, name."""
        listed = map(self.wal_object, self.store.list(self.wal_prefix(system_identifier)))
        return [found for found in listed if found is not None]

    def wal_object(self, info: ObjectInfo) -> WalObject | None:
        """The WAL file that is listed so; None for what stands beside them: notes of gaps, and what is not ours."""
        match = _WAL_KEY.fullmatch(info.key.removeprefix(self.wal_prefix()))
        if match is None:
            return None
        name = match["name"] or f"{match['timeline']}.history"
        sysid, timeline = int(match["sysid"]), int(match["timeline"], 16)
        return WalObject(sysid, timeline, name, bool(match["partial"]), match["name"] is None, info)

    # Proofs

    def put_record(self, key: str, body: bytes, data_key: DataKey) -> None:
        """A sealed record beside the backups: scorecards, proofs. Written once."""
        self.store.put(key, seal(body, place=key, data_key=data_key), if_absent=True, retain=True)

    def read_record(self, key: str) -> bytes:
        return unseal(self.store.get(key), place=key, unwrap=self.keys.unwrap).plain

    def put_proof(self, proof: Proof, verification_id: str, data_key: DataKey) -> None:
        key = f"{self.target_id}/proof/{proof.backup_id}/{proof.verified_at:%Y%m%dT%H%M%SZ}-{verification_id}.json"
        self.put_record(key, proof.model_dump_json().encode(), data_key)

    def proofs(self, backup_id: str | None = None) -> list[Proof]:
        """Every verdict on the backups, oldest first. Sealed, so that none can be made without the key service."""
        prefix = f"{self.target_id}/proof/" + (f"{backup_id}/" if backup_id else "")
        return sorted((self._proof(info.key) for info in self.store.list(prefix)), key=lambda proof: proof.verified_at)

    def _proof(self, key: str) -> Proof:
        try:
            return Proof.model_validate_json(self.read_record(key))
        except ValidationError as error:
            raise CorruptionError("this proof cannot be read", where=key) from error


def info_of(manifest: AnyManifest, proof: Proof | None) -> BackupInfo:
    if isinstance(manifest, StoreManifest):
        return BackupInfo(
            backup_id=manifest.backup_id,
            target_id=manifest.target_id,
            engine="native",
            kind=BackupKind.FULL,
            parent_id=None,
            started_at=manifest.started_at,
            ended_at=manifest.ended_at,
            timeline=0,
            start=Lsn(0),
            end=Lsn(0),
            server_version=0,
            system_identifier=0,
            raw=manifest.raw,
            stored=manifest.stored,
            proof=proof,
            store=manifest.store,
            server=manifest.server,
        )
    return BackupInfo(
        backup_id=manifest.backup_id,
        target_id=manifest.target_id,
        engine="native",
        kind=manifest.kind,
        parent_id=manifest.parent_id,
        started_at=manifest.started_at,
        ended_at=manifest.ended_at,
        timeline=manifest.timeline,
        start=manifest.start,
        end=manifest.end,
        server_version=manifest.server_version,
        system_identifier=manifest.system_identifier,
        raw=manifest.raw,
        stored=manifest.stored,
        proof=proof,
    )


def _unreadable(backup_id: str, target_id: str, error: str) -> BackupInfo:
    from datetime import UTC

    try:
        began = datetime.strptime(backup_id[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:  # an identifier that is none: somebody else's folder
        began = datetime.fromtimestamp(0, UTC)
    kind = BackupKind.FULL if backup_id[17] == "F" else BackupKind.INCREMENTAL
    return BackupInfo(
        backup_id=backup_id,
        target_id=target_id,
        engine="native",
        kind=kind,
        parent_id=None,
        started_at=began,
        ended_at=began,
        timeline=0,
        start=Lsn(0),
        end=Lsn(0),
        server_version=0,
        system_identifier=0,
        raw=0,
        stored=0,
        error=error,
    )
