"""The Dagster resources: thin wrappers over `clients`. They hold no secret and open nothing when the code location loads."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from dagster import ConfigurableResource

from ops_platform import signals
from ops_platform.clients.access import Access
from ops_platform.inventory import load


class PlatformResource(ConfigurableResource[None]):
    """The inventory and everything that it names. `inventory_path` empty: OPS_INVENTORY, else the nearest platform.yaml."""

    inventory_path: str = ""

    @contextmanager
    def access(self) -> Generator[Access]:
        """Read afresh for each use, so that a changed platform.yaml counts from the next run on."""
        with signals.insisting(), Access(load(Path(self.inventory_path) if self.inventory_path else None)) as access:
            yield access
