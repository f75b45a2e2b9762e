"""Inventories with another store than PostgreSQL, over the ground: `store_platform(new_platform, {…})`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ops_platform.backup.model import StoreManifest
from ops_platform.backup.opening import open_target_repository
from ops_platform.backup.repository import Repository
from ops_platform.inventory.systems import StoreTarget
from ops_platform.recovery.model import Gate, Scorecard
from ops_platform.stores.dump import run_backup
from ops_platform.stores.kind import Kind, open_kind
from ops_platform.stores.verify import verify
from tests import kube_rig
from tests.rig import Platform

POLICY = {"schedule": {"cron": "15 2 * * *"}, "transfer": {"block_size": "64KiB"}}


def with_store(platform: Platform, system: Mapping[str, Any]) -> StoreTarget:
    """Put a store into the platform's inventory, with a policy and with data keys that a file wraps."""
    key = platform.home / "file-key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_text(secrets.token_hex(32))
    platform.body["key_services"]["file"] = {"kind": "file", "path": str(key)}
    entry = {
        "environment": "test",
        "owner": "team",
        "repository": {"store": "s", "keys": "file"},
        "backup": POLICY,
        "sandbox": {"directory": str(platform.home)},
        **system,
    }
    systems = [found for found in platform.body.get("systems", []) if found["id"] != entry["id"]]
    platform.body["systems"] = [*systems, entry]
    platform.reload()
    found = platform.access.inventory.backed(entry["id"])
    assert isinstance(found, StoreTarget)
    return found


def store_platform(new_platform: Callable[..., Platform], system: Mapping[str, Any]) -> tuple[Platform, StoreTarget]:
    platform = new_platform({})
    return platform, with_store(platform, system)


def dump(platform: Platform, system: Mapping[str, Any]) -> StoreManifest:
    """A backup of the store, which is put into the inventory."""
    target = with_store(platform, system)
    return run_backup(platform.access, target)


def prove(platform: Platform, system: Mapping[str, Any], **more: Any) -> Scorecard:
    """A verification of the store, which is put into the inventory."""
    target = with_store(platform, system)
    return verify(platform.access, target, **more)


def repository(platform: Platform, system: Mapping[str, Any]) -> Repository:
    """Of the store, which is put into the inventory: before the platform's access is asked for, which that makes anew."""
    target = with_store(platform, system)
    return open_target_repository(platform.access, target)


def kind(platform: Platform, system: Mapping[str, Any]) -> Kind:
    """The same for the store itself."""
    target = with_store(platform, system)
    return open_kind(platform.access, target)


def hand_over(kube: kube_rig.Kube, home: Path) -> None:
    """Its programs, for sandboxes, and its administrator's login, for `cluster_of`."""
    for name in ("etcd", "apiserver"):
        script = home / name
        script.write_text(f'#!/bin/sh\nexec {kube.home}/kube {name} "$@"\n')
        script.chmod(0o755)
    (home / "kubeconfig").touch(mode=0o600)
    (home / "kubeconfig").write_text(kube_rig.inline(kube.kubeconfig))


def cluster_of(home: Path, *namespaces: str) -> dict[str, Any]:
    """The system `cluster`, with what was handed over."""
    programs = {"etcd": str(home / "etcd"), "kube-apiserver": str(home / "apiserver")}
    return {
        "id": "cluster", "kind": "kubernetes", "kubeconfig": f"file://{home}/kubeconfig", "namespaces": list(namespaces),
        "sandbox": {"directory": str(home), "programs": programs},
    }  # fmt: skip


def gates(card: Scorecard) -> dict[str, str]:
    return {gate.id: gate.status.value for gate in card.gates}


def gate(card: Scorecard, gate_id: str) -> Gate:
    return next(found for found in card.gates if found.id == gate_id)


@dataclass
class MovedClock:
    """The real time and what a test adds to it."""

    ahead: timedelta

    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, 0.05))
