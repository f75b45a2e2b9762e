"""Who an asset belongs to, as Dagster shows it."""

from collections.abc import Iterable

from ops_platform.inventory.model import Backed
from ops_platform.inventory.systems import System


def owners_of(operated: Iterable[Backed | System]) -> list[str]:
    return [f"team:{owner}" for owner in sorted({one.owner for one in operated})]
