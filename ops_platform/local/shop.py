"""The operated database of the local stack: a shop, and the role that backs it up with the least rights that do."""

from __future__ import annotations

from pathlib import Path

from ops_platform.local.components import Place, admin, ensure_database, ensure_role

SHOP_SQL = Path(__file__).with_name("shop.sql")

_RIGHTS = """
grant pg_monitor, pg_read_all_data, pg_checkpoint to ops_backup;
grant execute on function pg_create_restore_point(text), pg_switch_wal() to ops_backup;
create schema if not exists ops_canary authorization ops_backup;
grant pg_signal_backend to ops_backup;
"""
# The shop's own application, whose sessions a playbook may end.
_APPLICATION = (
    "grant usage on schema shop to checkout; grant select, insert, update on all tables in schema shop to checkout;"
)


def prepare_shop(place: Place) -> None:
    """Database, role and shop; each only where it is missing, so that a killed `up` goes on where it was."""
    with admin(place, "app-db") as connection:
        ensure_role(connection, "ops_backup", place.secret("app-db.ops_backup.password"), "replication")
        ensure_role(connection, "checkout", place.secret("app-db.checkout.password"), "")
        ensure_database(connection, "shop", "postgres")
    with admin(place, "app-db", "shop") as connection:
        connection.execute(_RIGHTS)
        if not connection.execute("select 1 from pg_namespace where nspname = 'shop'").fetchone():
            with connection.transaction():
                connection.execute(SHOP_SQL.read_text())
        connection.execute(_APPLICATION)
