"""What is operated: the typed model of platform.yaml, its loader, references to secrets."""

from ops_platform.inventory.loader import InventoryMistakes, LoadedInventory, load
from ops_platform.inventory.model import (
    BackupPolicy,
    Environment,
    Inventory,
    KeyService,
    Mode,
    Objectives,
    PostgresConnection,
    Repository,
    Store,
    Target,
    Vault,
    Verification,
)
from ops_platform.inventory.schema import json_schema
from ops_platform.inventory.values import Secret, SecretRef, format_duration, parse_duration, parse_size

__all__ = [
    "BackupPolicy",
    "Environment",
    "Inventory",
    "InventoryMistakes",
    "KeyService",
    "LoadedInventory",
    "Mode",
    "Objectives",
    "PostgresConnection",
    "Repository",
    "Secret",
    "SecretRef",
    "Store",
    "Target",
    "Vault",
    "Verification",
    "format_duration",
    "json_schema",
    "load",
    "parse_duration",
    "parse_size",
]
