"""Checks restored files against PostgreSQL's backup_manifest, for majors whose pg_verifybackup is not installed here.

Format: PostgreSQL documentation, "Backup Manifest Format". Checks what pg_verifybackup does without its look at the WAL: every
file is there with its size and its CRC-32C, no file is there that the manifest does not know, and the manifest's own SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

from ops_platform.recovery.findings import Finding, finding_of
from ops_platform.recovery.model import GateStatus

# Written after the backup by the restore itself, or never part of a manifest.
_UNKNOWN = {"backup_manifest", "tablespace_map", "recovery.signal", "standby.signal", "postgresql.auto.conf"}


def verify_manifest(directory: Path, workers: int = 2) -> Finding:
    raw = (directory / "backup_manifest").read_bytes()
    try:
        manifest = json.loads(raw)
        # The checksum covers everything up to and including the newline before its own line.
        body = raw[: raw.rindex(b'"Manifest-Checksum"')]
        known = manifest["Manifest-Checksum"]
    except (ValueError, LookupError, TypeError) as error:
        return Finding(GateStatus.FAILED, f"backup_manifest cannot be read: {error}")
    if hashlib.sha256(body).hexdigest() != known:
        return Finding(GateStatus.FAILED, "the manifest's own SHA-256 differs")
    files = {
        entry.get("Path") or bytes.fromhex(entry["Encoded-Path"]).decode(errors="surrogateescape"): entry
        for entry in manifest["Files"]
    }
    with ThreadPoolExecutor(workers) as pool:
        looked = pool.map(_differs, repeat(directory), files, files.values())
        wrong = [found for found in looked if found]
    extra = sorted(name for name in _names(directory) if name not in files and name not in _UNKNOWN)
    wrong += [f'"{name}" is present on disk but not in the manifest' for name in extra]
    size = sum(entry["Size"] for entry in files.values())
    return finding_of(
        not wrong, "; ".join(wrong[:20]) or f"{len(files)} files, {size} bytes: all as the server sent them"
    )


def _differs(directory: Path, name: str, entry: dict[str, Any]) -> str | None:
    path = directory / name
    if name in _UNKNOWN:
        return None
    try:
        actual = path.stat().st_size
        if actual != entry["Size"]:
            return f'"{name}" has {actual} bytes, the manifest says {entry["Size"]}'
        if entry.get("Checksum-Algorithm") != "CRC32C":
            return f'"{name}" has no CRC-32C in the manifest'
        found = _crc32c(path)
    except FileNotFoundError:
        return f'"{name}" is present in the manifest but not on disk'
    return None if found == entry["Checksum"] else f'"{name}" has another checksum than the manifest says'


def _crc32c(path: Path) -> str:
    """As PostgreSQL writes it: the four bytes of the value in the machine's order, little endian here."""
    import google_crc32c

    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value = google_crc32c.extend(value, chunk)
    return value.to_bytes(4, "little").hex()


def _names(directory: Path) -> set[str]:
    found: set[str] = set()
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and not name.startswith("pg_wal/"):
            found.add(name)
    for link in (directory / "pg_tblspc").glob("*"):
        place = link.resolve()  # rglob does not go through links
        found |= {f"pg_tblspc/{link.name}/{p.relative_to(place).as_posix()}" for p in place.rglob("*") if p.is_file()}
    return found
