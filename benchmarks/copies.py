"""The copy at the second site beside boto3 that moves the same objects, and its memory."""

from __future__ import annotations

import contextlib
import secrets
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks.ground import World, ours
from benchmarks.measure import Comparison, Goal, measured
from ops_platform.backup.opening import open_target_repository
from ops_platform.inventory.model import at_copy
from ops_platform.inventory.systems import StoreTarget
from ops_platform.stores.dump import run_backup
from ops_platform.stores.kind import Dumped, Parts
from tests.rig import Platform
from tests.stores_rig import with_store

OURS, BOTO = "ours", "boto3, get and put"
SMALL, LARGE = "a quarter of it", "ours, the whole"
SITE, WORKERS = "second-site", 2
_MB = 1 << 20


class Noise:
    """A store that is nothing but random bytes: what is dumped of it does not compress."""

    def __init__(self, size: int) -> None:
        self.size = size

    def dump(self, parts: Parts) -> Dumped:
        with parts.part("noise") as write:
            for _ in range(self.size // _MB):
                write(secrets.token_bytes(_MB))
        return Dumped("nowhere", "noise", {})

    files: Any = None
    restore: Any = None


@dataclass
class Sites:
    """A repository with one backup of random bytes, and an empty second site for each run."""

    platform: Platform
    size: int

    def __post_init__(self) -> None:
        target = self.target()
        run_backup(self.platform.access, target, kind=Noise(self.size))

    def target(self, prefix: str = "") -> StoreTarget:
        """With a copy under a prefix and a key of its own."""
        platform = self.platform
        system: dict[str, Any] = {"id": "noise", "kind": "vault", "vault": "v"}
        policy = {"schedule": {"cron": "15 2 * * *"}, "transfer": {"block_size": "16MiB", "workers": WORKERS}}
        repository: dict[str, Any] = {"store": "s", "keys": "file"}
        if prefix:
            key = platform.home / f"{prefix}.key"
            key.touch(mode=0o600)
            key.write_text(secrets.token_hex(32))
            platform.body["stores"]["c"] = {**platform.body["stores"]["s"], "prefix": prefix}
            platform.body["key_services"]["c"] = {"kind": "file", "path": str(key)}
            repository["copies"] = [{"id": SITE, "store": "c", "keys": "c"}]
        return with_store(platform, {**system, "backup": policy, "repository": repository})

    def ours(self) -> tuple[float, int, float]:
        """Seconds, bytes, and MiB at the peak, of one run to an empty site; every object of the backup is looked for there."""
        target = self.target(prefix := f"copy-{secrets.token_hex(4)}")
        ran = ours(self.platform, do="replicate", target=target.id, copy=SITE)
        there = open_target_repository(self.platform.access, at_copy(target, SITE))
        here = open_target_repository(self.platform.access, target)
        sizes = [{info.key: info.size for info in one.store.list(f"{target.id}/backup/")} for one in (here, there)]
        if not ran.said["whole"] or sizes[0] != sizes[1]:
            raise RuntimeError(f"the copy {prefix} is not whole: {ran.said}")
        self._forget(prefix)
        return ran.said["seconds"], ran.said["bytes"], ran.peak_mb

    def boto(self) -> float:
        """Seconds for the same objects: got and put by as many threads, at once as in boto3's own examples, each with its own MD5."""
        import time

        client, prefix = self._client(), f"plain-{secrets.token_hex(4)}"
        base = self.platform.prefix
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="tests", Prefix=f"{base}/noise/backup/")
        keys = [item["Key"] for page in pages for item in page["Contents"]]
        began = time.perf_counter()

        def move(key: str) -> None:
            body = client.get_object(Bucket="tests", Key=key)["Body"].read()
            client.put_object(Bucket="tests", Key=prefix + key.removeprefix(base), Body=body)

        waiting: deque[Future[None]] = deque()
        with ThreadPoolExecutor(WORKERS) as pool:
            for key in keys:
                waiting.append(pool.submit(move, key))
            while waiting:
                waiting.popleft().result()
        seconds = time.perf_counter() - began
        self._forget(prefix)
        return seconds

    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        place = self.platform.ground.place
        folder = place.directory / "secrets"
        return boto3.client(
            "s3", endpoint_url=f"https://127.0.0.1:{place.port('s3')}", region_name="us-east-1", verify=str(folder / "s3-ca.pem"),
            aws_access_key_id=(folder / "s3.access_key").read_text().strip(),
            aws_secret_access_key=(folder / "s3.secret_key").read_text().strip(),
            config=Config(s3={"addressing_style": "path"}),
        )  # fmt: skip

    def _forget(self, prefix: str) -> None:
        with contextlib.closing(self.platform.ground.store(prefix)) as store:
            for info in list(store.list()):
                store.delete(info.key)


@contextlib.contextmanager
def sites(world: World, size: int) -> Iterator[Sites]:
    platform = Platform(world.ground, {})
    try:
        yield Sites(platform, size)
    finally:
        platform.close()


def replication(world: World, size: int, rounds: int) -> Comparison:
    """The same bytes, from the same store into the same store."""
    with sites(world, size) as made:
        found = Comparison(
            "replicate",
            f"a backup of {size / _MB:,.0f} MiB of random bytes copied to the second site",
            "MiB a second",
            f"Both sites are buckets' folders of one object store on this machine, over TLS; {WORKERS} threads on each side. Ours in a process of its own, "
            "by the time of the run itself: every object is compared with the manifest's SHA-256 on its way, its keys are wrapped for the copy, and the "
            "copy's listing is compared before its manifest is put. boto3 gets and puts the same objects and looks at nothing.",
            [Goal("at the store's speed: ≥ 0.9 × a plain copy by boto3", OURS, BOTO, least=0.9)],
        )

        def mine() -> float:
            seconds, moved, _ = made.ours()
            return moved / _MB / seconds

        measured(found, rounds, {OURS: mine, BOTO: lambda: size / _MB / made.boto()})
    return found


def replication_memory(world: World, size: int, rounds: int) -> Comparison:
    with sites(world, size // 4) as small, sites(world, size) as large:
        found = Comparison(
            "replicate-memory",
            f"peak resident memory of copying {size // 4 / _MB:,.0f} and {size / _MB:,.0f} MiB to the second site",
            "MiB",
            "The process that copies, interpreter and all (VmHWM).",
            [Goal("flat: four times the size takes ≤ 1.1 × the memory", LARGE, SMALL, most=1.1)],
        )
        sides = {SMALL: lambda: small.ours()[2], LARGE: lambda: large.ours()[2]}
        measured(found, rounds, sides)
    return found
