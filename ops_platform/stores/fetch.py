"""Brings the parts of a store's backup back to disk: each block checked against the manifest, each part against its own digest."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ops_platform.backup.model import Block, Progress, StoredStream, StoreManifest, no_progress
from ops_platform.backup.repository import Repository
from ops_platform.errors import CorruptionError, CouldNotVerifyError
from ops_platform.stores.kind import Saved

_WORKERS = 4


def fetch_backup(
    repository: Repository, manifest: StoreManifest, into: Path, *, progress: Progress = no_progress
) -> Saved:
    """Every part as a file below `into`. Raises CorruptionError naming what is not as it was written, CouldNotVerifyError (disk full)."""
    into.mkdir(mode=0o700, parents=True, exist_ok=True)
    parts: dict[str, Path] = {}
    done = 0
    for number, part in enumerate(manifest.parts):
        path = into / f"{number:06d}"
        try:
            with path.open("wb") as out:
                for piece in read_part(repository, part):
                    out.write(piece)
                    done += len(piece)
                    progress("fetch", done, manifest.raw)
        except OSError as error:
            raise CouldNotVerifyError(
                f"the backup cannot be written to disk: {error.strerror}",
                where=str(into),
                remedy="free space, or set sandbox.directory",
            ) from None
        parts[part.name] = path
    facts = json.loads(repository.read_part(manifest.facts))
    return Saved(manifest.backup_id, manifest.moment, parts, facts, manifest.server)


def read_part(repository: Repository, part: StoredStream) -> Iterator[bytes]:
    """The raw bytes of a part, some blocks ahead. Raises CorruptionError at its end where they are not those that were read."""
    digest, size = hashlib.sha256(), 0
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="fetch") as pool:
        for piece in _ahead(pool, repository, part.blocks):
            digest.update(piece)
            size += len(piece)
            yield piece
    if (size, digest.hexdigest()) != (part.raw, part.sha256):
        raise CorruptionError(f"the part {part.name!r} is not what was read from the source (SHA-256 differs)")


def _ahead(pool: ThreadPoolExecutor, repository: Repository, blocks: list[Block]) -> Iterator[bytes]:
    coming: deque[Future[bytes]] = deque()
    for block in blocks:
        coming.append(pool.submit(repository.open_block, block))
        if len(coming) > _WORKERS:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()
