"""Backups as the inventory declares them, whatever is backed up: when, how, where to, how long, how they are proven."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ops_platform.inventory.base import AnyMode, Mode, Strict
from ops_platform.inventory.values import Cron, Duration, Id, PositiveDuration, Size, Zone


class Objectives(Strict):
    """What was promised; every verification measures against it."""

    rto: Duration = Field(
        default=timedelta(hours=4), description="Recovery time objective: the service is back within this time."
    )
    rpo: Duration = Field(
        default=timedelta(hours=1), description="Recovery point objective: at most this much is lost."
    )


class Schedule(Strict):
    """When something is due."""

    cron: Cron = Field(description="When it is due, in local time of the zone.")
    timezone: Zone = Field(default="UTC", description="The zone of the cron expression; daylight saving is followed.")
    spread: Duration = Field(
        default=timedelta(0),
        description="Targets start spread over this time, each at its own fixed moment, so that they do not start at once.",
    )


class Incremental(Strict):
    """Incremental backups: PostgreSQL 17 and later with summarize_wal; elsewhere a full one is taken, and says why."""

    enabled: bool = Field(default=True, description="Take them where the server can.")
    full_every: Duration = Field(default=timedelta(days=7), description="A full backup at least this often.")
    max_chain: Annotated[int, Field(ge=1, le=100)] = Field(
        default=7, description="Incrementals on top of one full at most."
    )


class Transfer(Strict):
    """How bytes travel from the server to the store."""

    compression: Literal["zstd", "lz4", "none"] = Field(default="zstd", description="Of each block.")
    level: Annotated[int, Field(ge=1, le=19)] = Field(default=1, description="Of the compression.")
    compress_at: Literal["client", "server"] = Field(
        default="client", description="server: PostgreSQL 15+; for thin networks."
    )
    block_size: Size = Field(default=16 << 20, description="Bytes of one block; a multiple of 512.")
    workers: Annotated[int, Field(ge=1, le=16)] = Field(
        default=2, description="Blocks that are compressed, encrypted and sent at once."
    )
    rate_limit: Annotated[Size, Field(ge=1)] | None = Field(
        default=None, description="Bytes a second read from the server, at most."
    )
    retries: Annotated[int, Field(ge=0, le=20)] = Field(
        default=5, description="Further tries of a block that the store did not take."
    )

    @model_validator(mode="after")
    def _block(self) -> Self:
        if self.block_size % 512 or not 1 << 16 <= self.block_size <= 1 << 28:
            raise ValueError(
                "block_size is a multiple of 512 from 64KiB to 256MiB, so that no tar header straddles blocks"
            )
        return self


class Expectations(Strict):
    """What the owners expect of the restored data."""

    suite: str = Field(description="YAML file with Great Expectations expectations, relative to platform.yaml.")


class Verification(Strict):
    """How backups of a target are proven."""

    schedule: Schedule | None = Field(
        default=None, description="When the store is proven, besides the proof that follows each scheduled backup."
    )
    proven_within: Duration = Field(default=timedelta(days=2), description="Older proof fails the check.")
    pick: list[Literal["newest", "oldest", "chain", "random"]] = Field(
        default=["newest"],
        description="What is restored, by turns: newest backup, the oldest promised one, the newest incremental with its chain, a random moment. "
        "A turn that could not be verified is taken again, once.",
    )
    amcheck: Literal["sample", "full", "off"] = Field(
        default="sample", description="Whether tables and indexes are checked page by page: some by chance, all, none."
    )
    full_every: Duration = Field(default=timedelta(days=7), description="Everything is checked at least this often.")
    canary: bool = Field(
        default=True, description="Write canary rows to the source; without, the proof is weaker and says so."
    )
    row_count_tolerance: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.02, description="Share by which the rows of a table may differ from what the source had."
    )
    expectations: Expectations | None = Field(default=None, description="What the owners expect of the data.")


class Expiry(Strict):
    """Deleting what no promise needs any more."""

    mode: AnyMode = Field(default=Mode.OBSERVE, description="observe says what would be deleted; enforce deletes it.")
    max_count: Annotated[int, Field(ge=1)] = Field(default=10, description="Backups that one run may delete at most.")
    max_percent: Annotated[float, Field(gt=0, le=100)] = Field(
        default=34, description="Share of the backups that one run may delete."
    )


class BackupPolicy(Strict):
    """When backups are taken, how long they are kept, how they are proven."""

    schedule: Schedule = Field(description="When backups are taken.")
    recovery_window: Duration = Field(
        default=timedelta(days=14), description="Every moment of this time stays restorable."
    )
    minimum_redundancy: Annotated[int, Field(ge=1)] = Field(
        default=2, description="Full backups kept whatever their age."
    )
    max_age: Duration = Field(
        default=timedelta(hours=26), description="An older newest backup fails the freshness check."
    )
    incremental: Incremental = Field(default=Incremental(), description="When a backup builds on an earlier one.")
    transfer: Transfer = Field(default=Transfer(), description="How bytes travel from the server to the store.")
    verification: Verification = Field(default=Verification(), description="How backups are proven.")
    expiry: Expiry = Field(default=Expiry(), description="How backups are deleted.")
    from_standby: bool = Field(
        default=False,
        description="Prefer a standby that streams and keeps up as the source of base backups; where none does, it is the primary.",
    )


class Copy(Strict):
    """A second site: every backup and all WAL once more, in another store, under another key service."""

    id: Id = Field(description="Its name in commands and reports, such as second-site.")
    store: Id = Field(description="The id under `stores`: another one than that of the backups.")
    keys: Id = Field(description="The id under `key_services`: wraps the data keys of the copy.")
    max_lag: PositiveDuration = Field(
        default=timedelta(hours=1), description="What the copy can restore may be older by this much at most."
    )


class Repository(Strict):
    """Where the backups of a target are and which engine wrote them."""

    engine: Literal["native", "pgbackrest"] = Field(
        default="native",
        description="native needs store and keys; pgbackrest, which is read and never written, stanza and config.",
    )
    store: Id | None = Field(default=None, description="The id under `stores`; pgbackrest: where its proofs are kept.")
    keys: Id | None = Field(default=None, description="The id under `key_services`.")
    stanza: str | None = Field(default=None, description="pgbackrest: the stanza.")
    config: str | None = Field(default=None, description="pgbackrest: its configuration file.")
    copies: list[Copy] = Field(default=[], description="native: second sites to which everything is copied.")
    copy_schedule: Schedule = Field(
        default=Schedule(cron="*/15 * * * *"), description="When the copies are brought up to date."
    )
    is_copy: bool = Field(
        default=False,
        description="native: what stands in `store` was copied there from another site, and `keys` is the key service of the copy. "
        "For the day on which that site is gone.",
    )

    @model_validator(mode="after")
    def _needs(self) -> Self:
        need = ("store", "keys") if self.engine == "native" else ("stanza", "config")
        missing = [name for name in need if getattr(self, name) is None]
        if missing:
            raise ValueError(f"engine {self.engine} needs {' and '.join(missing)}")
        if self.engine != "native" and (self.copies or self.is_copy):
            raise ValueError(f"copies are made of our own repositories alone; {self.engine} has its own way")
        seen: set[str] = set()
        for copy in self.copies:
            if copy.store == self.store:
                raise ValueError(f"copy {copy.id} would stand in the store of the backups: give it a store of its own")
            if copy.id in seen:
                raise ValueError(f"two copies are called {copy.id}")
            seen.add(copy.id)
        return self


class Sandbox(Strict):
    """Where restored servers run."""

    directory: str | None = Field(
        default=None, description="Parent of the restore directories; the system's temporary one by default."
    )
    postgres: dict[int, str] = Field(
        default={}, description="Major version to bin directory, where none is found by itself."
    )
    programs: dict[str, str] = Field(
        default={}, description="Name of another store's program, such as redis-server, to its path; else from PATH."
    )
