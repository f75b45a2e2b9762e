"""Dagster over the local stack: DAGSTER_HOME with the shipped dagster.yaml, its storage in the platform's PostgreSQL."""

from __future__ import annotations

from pathlib import Path

from ops_platform.clients.processes import without_libpq
from ops_platform.errors import UnreachableError
from ops_platform.local import endpoint, state_dir
from ops_platform.local.components import Place, inventory_file

SHIPPED = Path(__file__).resolve().parents[2] / "deploy" / "dagster.yaml"


def prepare() -> dict[str, str]:
    """Write DAGSTER_HOME; the environment for every Dagster process. Raises UnreachableError where the stack never ran."""
    state = state_dir()
    database = endpoint("platform-db")
    home = state / "dagster_home"
    home.mkdir(parents=True, exist_ok=True)
    (home / "dagster.yaml").write_text(_config())
    password = Place(state).secret_file("platform-db.password")
    if not password.exists():
        raise UnreachableError("the local stack has no platform database yet", where=str(state), remedy="ops local up")
    return {
        # A run is begun by a process that first loads everything: on a small machine that is busy this takes more than Dagster's minute.
        "DAGSTER_GRPC_TIMEOUT_SECONDS": "180",
        **without_libpq(),
        "DAGSTER_HOME": str(home),
        "DAGSTER_PG_HOST": database.host,
        "DAGSTER_PG_PORT": str(database.port),
        "DAGSTER_PG_USER": "ops",
        "DAGSTER_PG_PASSWORD": password.read_text(),
        "DAGSTER_PG_DB": "dagster",
        "DAGSTER_DISABLE_TELEMETRY": "yes",
        "OPS_STATE_DIR": str(state),
        "OPS_INVENTORY": str(inventory_file()),
    }


def _config() -> str:
    try:
        return SHIPPED.read_text()
    except OSError as error:
        raise UnreachableError(
            f"deploy/dagster.yaml cannot be read: {error.strerror}", where=str(SHIPPED), remedy="call from a checkout"
        ) from None
