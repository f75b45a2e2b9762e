"""What is compared with what: each comparison by its name for `--only`, in the order in which they are measured."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import backups, copies, decisions, drills, events, ledger, remediation, restores, startup, stores, wal
from benchmarks.ground import World
from benchmarks.measure import Comparison
from benchmarks.sizes import Sizes

_SHORT_ROUNDS = 7  # of what takes a second

COMPARISONS: dict[str, Callable[[World, Sizes], Comparison]] = {
    "startup": startup.startup,
    "full-compressible": backups.full_compressible,
    "restore": restores.restore,
    "memory": backups.memory,
    "full-server-side": backups.full_server_side,
    "verify-sampled": restores.verify_sampled,
    "restore-replay": restores.restore_replay,
    "wal-backlog": wal.wal_backlog,
    "wal-burst": wal.wal_burst,
    "incremental": backups.incremental,
    "full-incompressible": backups.full_incompressible,
    "kafka-tick": lambda _, sizes: events.kafka_tick(sizes.events, max(sizes.rounds, _SHORT_ROUNDS)),
    "ledger-appends": lambda _, sizes: ledger.appends(sizes.entries // 50, max(sizes.rounds, _SHORT_ROUNDS)),
    "ledger-verification": lambda _, sizes: ledger.verification(sizes.entries, sizes.rounds),
    "alerts-to-signals": lambda _, sizes: decisions.alerts_to_signals(sizes.alerts, max(sizes.rounds, _SHORT_ROUNDS)),
    "reaction": lambda _, sizes: remediation.reaction(sizes.reactions),
    "redis-dump": lambda world, sizes: stores.redis_dump(world, sizes.redis, sizes.rounds),
    "kafka-dump": lambda world, sizes: stores.kafka_dump(world, sizes.records, sizes.rounds),
    "kubernetes-export": lambda world, sizes: stores.kubernetes_export(world, sizes.objects, sizes.rounds),
    "replicate": lambda world, sizes: copies.replication(world, sizes.copied, sizes.rounds),
    "replicate-memory": lambda world, sizes: copies.replication_memory(world, sizes.copied, sizes.rounds),
    "drill-overhead": lambda _, sizes: drills.overhead(max(sizes.rounds, 1)),
    "probe-resolution": lambda _, sizes: drills.resolution(sizes.rounds),
    "sensor-memory": lambda _, sizes: remediation.sensor_memory(sizes.ticks),
}
