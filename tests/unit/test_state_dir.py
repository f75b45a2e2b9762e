"""Where the local stack lives when nobody says so: beside the inventory, unless the servers' user could not come there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ops_platform.clients.access import Access
from ops_platform.errors import UsageError
from ops_platform.inventory import LoadedInventory
from ops_platform.local import SHARED, STATE_FILE, closed_folder, dagster_home, state_dir, told_web_ui, web_ui
from tests.remediation_rig import inventory as an_inventory


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in somebody's home, below folders that all can pass through."""
    monkeypatch.delenv("OPS_STATE_DIR", raising=False)
    monkeypatch.delenv("OPS_INVENTORY", raising=False)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    made = tmp_path / "home" / "ops_platform"
    made.mkdir(parents=True)
    (made / "platform.yaml").touch()
    monkeypatch.chdir(made)
    return made


def test_it_stands_beside_the_inventory(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for user in (0, 1000):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        assert state_dir() == checkout / ".state" / "local"


def test_roots_checkout_in_a_closed_home_has_it_where_the_servers_user_can_come(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout.parent.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = state_dir()
    assert found.parent == SHARED
    assert closed_folder(found) is None
    assert state_dir() == found, "it is found again"
    other = checkout.with_name("another")
    other.mkdir()
    (other / "platform.yaml").touch()
    monkeypatch.setenv("OPS_INVENTORY", str(other / "platform.yaml"))
    assert state_dir() != found, "two checkouts do not share one"
    monkeypatch.setenv("OPS_STATE_DIR", "/somewhere/else")
    assert state_dir() == Path("/somewhere/else")


def test_an_ordinary_user_has_it_in_their_own_home_however_closed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout.parent.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert state_dir() == checkout / ".state" / "local"


def test_the_web_ui_is_found_while_it_runs_and_by_its_own_inventory_alone(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPS_STATE_DIR", str(checkout.parent))
    mine, another = checkout / "platform.yaml", checkout / "another.yaml"
    access = Access(LoadedInventory(an_inventory([]), mine))
    with pytest.raises(UsageError, match="ops ui"):
        access.dagster()
    with told_web_ui("http://127.0.0.1:3001", mine):
        assert access.dagster().host == "127.0.0.1:3001"
        assert web_ui(another) is None
    assert web_ui(mine) is None


def test_what_points_libpq_elsewhere_does_not_reach_dagster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPS_STATE_DIR", str(tmp_path))
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "platform-db.password").write_text("x")
    database = {"host": "127.0.0.1", "port": 5433, "url": "postgresql://127.0.0.1:5433"}
    (tmp_path / STATE_FILE).write_text(json.dumps({"components": {"platform-db": database}}))
    for name in ("PGHOST", "PGHOSTADDR", "PGPORT", "PGSERVICE", "PGOPTIONS", "PGSSLMODE", "PGPASSFILE"):
        monkeypatch.setenv(name, "elsewhere")
    kept = {"PGPASSWORD": "an inventory may name it", "PG_APP_PASSWORD": "and this", "HOME": str(tmp_path)}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    found = dagster_home.prepare()
    assert {name: value for name, value in found.items() if name.startswith("PG") or name == "HOME"} == kept
