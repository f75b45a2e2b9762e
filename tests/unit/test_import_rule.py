"""Who may import whom. The rooms and their order stand in `RANK`; what a room shows to the others stands in `FACES`.

A module imports from rooms below its own, from its own room, and, between the domains, from another's face. Dagster is known
to resources.py, definitions.py and the Dagster layer alone; what takes seconds to import is imported inside functions.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYER = ("assets", "jobs", "schedules", "sensors")
SPEAKS_DAGSTER = ("ops_platform.resources", "ops_platform.definitions", *LAYER)

GROUND = ("errors", "clock", "counting")
DOMAINS = (
    "access",
    "backup",
    "capacity",
    "drills",
    "events",
    "local",
    "recovery",
    "remediation",
    "reports",
    "retention",
    "security",
)
RANK = dict.fromkeys(GROUND, 0) | {"inventory": 1, "clients": 2, "ledger": 3, "actions": 4} | dict.fromkeys(DOMAINS, 5)
# What puts the domains together: modules that stand beside the rooms; the rest of `ops_platform/*.py` is of this kind.
TOGETHER, ABOVE = 6, 7
# Traces are spoken by whoever works, and know the inventory alone.
RANK |= {"tracing": RANK["ledger"]}
# How pages are served is everybody's, and knows nothing but our errors.
RANK |= {"serving": RANK["inventory"]}
RANK |= {"cli": ABOVE, "resources": ABOVE, "definitions": ABOVE} | dict.fromkeys(LAYER, ABOVE)

# The modules that a domain's `__init__` names as its face; the package itself always is. The nouns (`model`) are plain data.
FACES = {
    "backup": {"archive", "basebackup", "durable", "engine", "expiry", "model", "opening", "receiver"},
    "events": {"cloudevents", "cursor", "publisher", "reader", "reset"},
    # A drill restores, serves and looks with the same hands as the nightly proof, and is kept away by incidents, freezes and the pause.
    "drills": {"begin", "engine", "forecast", "loader", "model", "overdue", "registry", "store"},
    "recovery": {"findings", "gates", "model", "records", "restore", "sandbox", "verify"},
    "remediation": {"guards", "model", "store"},
}
# Beside the rule, each with its reason. An entry that nothing uses any more fails the test.
ALLOWED = {
    # `local://NAME` in an inventory becomes an address: the light face of `local`, which imports nothing.
    ("clients", "local"),
    # What an Alertmanager or a Prometheus answers becomes signals: plain data, and everybody's.
    ("clients", "remediation.model"),
    # A restore fetches what the engine of the backup stored, and proofs and scorecards stand in the same repository.
    ("recovery", "backup.fetch"),
    ("recovery", "backup.pgbackrest"),
    ("recovery", "backup.repository"),
    # A drill of the full stack proves every store, and one of a lost Vault opens the database with the copy of it.
    ("drills", "stores.fetch"),
    ("drills", "stores.kind"),
    ("drills", "stores.vault"),
    ("drills", "stores.verify"),
}
HEAVY = set(
    tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]["flake8-tidy-imports"][
        "banned-module-level-imports"
    ]
)


@dataclass(frozen=True)
class Import:
    """`name` with everything that is known of it: for `from a import b` both `a` and `a.b` are looked at."""

    module: str
    line: int
    name: str
    at_load: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.name}"


def imports(module: str, source: str, known: set[str]) -> Iterator[Import]:
    """Every import of a module. `known` are our modules, so that `from room import module` is told from a name in it."""

    def visit(node: ast.AST, at_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module, child.lineno, alias.name, at_load)
            elif isinstance(child, ast.ImportFrom):
                base = "." * child.level + (child.module or "")
                for alias in child.names:
                    whole = f"{base}.{alias.name}"
                    yield Import(module, child.lineno, whole if whole in known else base, at_load)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from visit(child, False)
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                for part in child.body:
                    yield from visit(ast.Module([part], []), False)
                for part in child.orelse:
                    yield from visit(ast.Module([part], []), at_load)
            else:
                yield from visit(child, at_load)

    yield from visit(ast.parse(source), True)


def room(name: str) -> str:
    """`ops_platform.backup.engine` is in `backup`, `jobs.postgres` in `jobs`."""
    parts = name.split(".")
    return parts[0] if parts[0] in LAYER else parts[1] if len(parts) > 1 else ""


def rank(name: str) -> int:
    return RANK.get(room(name), 0 if name == "ops_platform" else TOGETHER)


def is_ours(name: str) -> bool:
    return name.partition(".")[0] in ("ops_platform", *LAYER)


def edge(found: Import) -> tuple[str, str]:
    return room(found.module), found.name.removeprefix("ops_platform.")


def breaks_the_order(found: Import) -> bool:
    """Upwards, or into another domain past its face."""
    if not is_ours(found.name) or room(found.module) == room(found.name):
        return False
    here, there = rank(found.module), rank(found.name)
    if here != there or here in (TOGETHER, ABOVE):
        return there > here
    return found.name.partition(f"{room(found.name)}.")[2] not in ("", *FACES.get(room(found.name), ()))


def speaks_dagster(found: Import) -> bool:
    return found.name.partition(".")[0].startswith("dagster") and not any(
        found.module == part or found.module.startswith(f"{part}.") for part in SPEAKS_DAGSTER
    )


def is_heavy(found: Import) -> bool:
    return found.at_load and found.name.partition(".")[0] in HEAVY


def is_relative(found: Import) -> bool:
    return found.name.startswith(".")


def our_modules() -> dict[str, str]:
    found: dict[str, str] = {}
    for top in ("ops_platform", *LAYER):
        for file in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = file.read_text()
    return found


MODULES = our_modules()
IMPORTS = [found for name, source in MODULES.items() for found in imports(name, source, set(MODULES))]


def test_rooms_import_downwards_and_domains_by_their_faces() -> None:
    broken = [found for found in IMPORTS if breaks_the_order(found)]
    assert [str(found) for found in broken if edge(found) not in ALLOWED] == []
    assert {edge(found) for found in broken} >= ALLOWED, "an exception that nothing uses any more: take it out"


def test_a_face_has_the_modules_that_it_is_said_to_have() -> None:
    assert [f"ops_platform.{domain}.{name}" for domain, names in FACES.items() for name in names
            if f"ops_platform.{domain}.{name}" not in MODULES] == []  # fmt: skip
    for domain, names in FACES.items():
        said = ast.get_docstring(ast.parse(MODULES[f"ops_platform.{domain}"])) or ""
        assert [name for name in names - {"model"} if f"`{name}" not in said] == [], (
            f"{domain}/__init__.py does not name it"
        )


def test_the_nouns_of_a_domain_lean_on_nothing() -> None:
    """They are everybody's: what they import, everybody loads."""
    nouns = [found for found in IMPORTS if found.module in {f"ops_platform.{domain}.model" for domain in DOMAINS}]
    assert nouns
    assert [str(found) for found in nouns if is_ours(found.name) and rank(found.name) > RANK["inventory"]] == []


def test_dagster_is_known_above_alone() -> None:
    assert [str(found) for found in IMPORTS if speaks_dagster(found)] == []


def test_what_takes_seconds_is_imported_inside_functions() -> None:
    assert {"great_expectations", "kubernetes", "dagster_k8s", "pandas", "polars", "duckdb", "plotly", "boto3", "dagster_postgres"} <= HEAVY  # fmt: skip
    assert [str(found) for found in IMPORTS if is_heavy(found)] == []


def test_imports_are_absolute() -> None:
    assert [str(found) for found in IMPORTS if is_relative(found)] == []


def test_the_rule_looks_at_everything() -> None:
    assert len(MODULES) > 30
    assert {name for name in MODULES if name in ("ops_platform.clients.s3", "ops_platform.inventory", "ops_platform")} == {
        "ops_platform.clients.s3", "ops_platform.inventory", "ops_platform",
    }  # fmt: skip
    assert len(IMPORTS) > 300


# The rule itself: what it must catch, and what it must let pass.

KNOWN = {
    "ops_platform.backup.engine",
    "ops_platform.backup.model",
    "ops_platform.backup.fetch",
    "ops_platform.cli.main",
}


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("ops_platform.recovery.x", "from ops_platform.backup.fetch import fetch", breaks_the_order),
        ("ops_platform.recovery.x", "from ops_platform.backup import fetch", breaks_the_order),
        ("ops_platform.recovery.x", "import ops_platform.backup.fetch as f", breaks_the_order),
        ("ops_platform.recovery.x", "def f():\n  from ops_platform.backup.fetch import a", breaks_the_order),
        ("ops_platform.recovery.x", "if TYPE_CHECKING:\n  from ops_platform.backup.fetch import a", breaks_the_order),
        ("ops_platform.inventory.x", "from ops_platform.clients.access import Access", breaks_the_order),
        ("ops_platform.clients.x", "from ops_platform.backup.model import Manifest", breaks_the_order),
        ("ops_platform.errors", "from ops_platform.inventory import load", breaks_the_order),
        ("ops_platform.backup.x", "from ops_platform.cli import main", breaks_the_order),
        ("ops_platform.backup.x", "from ops_platform.resources import R", breaks_the_order),
        ("ops_platform.backup.x", "import jobs.postgres", breaks_the_order),
        ("ops_platform.backup.x", "from ops_platform.proof import prove", breaks_the_order),
        ("ops_platform.proof", "from ops_platform.cli.main import run", breaks_the_order),
        ("ops_platform.ledger.x", "from ops_platform.actions import Plan", breaks_the_order),
        ("ops_platform.backup.x", "import dagster", speaks_dagster),
        ("ops_platform.backup.x", "def f():\n  from dagster._core import x", speaks_dagster),
        ("ops_platform.cli.x", "import dagster_postgres", speaks_dagster),
        ("ops_platform.resourceful", "import dagster", speaks_dagster),
        ("ops_platform.backup.x", "import pandas as pd", is_heavy),
        ("ops_platform.backup.x", "from great_expectations.core import x", is_heavy),
        ("ops_platform.backup.x", "try:\n  import boto3\nexcept ImportError:\n  boto3 = None", is_heavy),
        ("ops_platform.backup.x", "class A:\n  import plotly.express", is_heavy),
        ("ops_platform.backup.x", "if TYPE_CHECKING:\n  pass\nelse:\n  import pandas", is_heavy),
        ("assets.x", "import dagster_k8s", is_heavy),
        ("ops_platform.backup.x", "from . import engine", is_relative),
        ("ops_platform.backup.x", "from ..backup.engine import a", is_relative),
    ],
)  # fmt: skip
def test_the_rule_catches(module: str, source: str, rule: object) -> None:
    (found,) = imports(module, source, KNOWN)
    assert rule(found)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops_platform.recovery.x", "from ops_platform.backup.engine import open_engine"),
        ("ops_platform.recovery.x", "from ops_platform.backup import engine"),
        ("ops_platform.recovery.x", "from ops_platform.backup import SOMETHING"),
        ("ops_platform.recovery.x", "from ops_platform.recovery.insides import a"),
        ("ops_platform.recovery.x", "from ops_platform.backup.model import Manifest"),
        ("ops_platform.recovery.x", "from ops_platform import __version__"),
        ("ops_platform.backup.x", "from ops_platform.clients.s3 import S3Store"),
        ("ops_platform.actions.x", "from ops_platform.ledger import Ledger"),
        ("ops_platform.proof", "from ops_platform.recovery.insides import a"),
        ("ops_platform.cli.x", "from ops_platform.backup.fetch import fetch"),
        ("jobs.x", "from ops_platform.resources import R"),
        ("ops_platform.definitions", "from jobs.postgres import build_jobs"),
        ("ops_platform.resources", "import dagster"),
        ("sensors.deep.x", "from dagster import sensor"),
        ("ops_platform.backup.x", "def f():\n  import pandas"),
        ("ops_platform.backup.x", "if TYPE_CHECKING:\n  import pandas"),
        ("ops_platform.backup.x", "if typing.TYPE_CHECKING:\n  import pandas"),
        ("ops_platform.backup.x", "import pandasql"),
    ],
)  # fmt: skip
def test_the_rule_lets_pass(module: str, source: str) -> None:
    (found,) = imports(module, source, KNOWN)
    assert not any(rule(found) for rule in (breaks_the_order, speaks_dagster, is_heavy, is_relative))


# What the interpreter really loads: the rule above sees our files alone, not what they bring with them.


def loaded(*modules: str) -> set[str]:
    """The names in `sys.modules` of a fresh interpreter that imported these."""
    program = "import importlib, json, sys\n" + "".join(f"importlib.import_module({name!r})\n" for name in modules)
    env = {**os.environ, "OPS_INVENTORY": str(ROOT / "platform.yaml"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program + "sys.stdout.write(json.dumps(sorted(sys.modules)))"],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_a_fresh_interpreter_notices_what_is_heavy() -> None:
    assert loaded("boto3") & HEAVY == {"boto3"}


@pytest.mark.skipif("ops_platform.definitions" not in MODULES, reason="there are no definitions yet")
def test_the_definitions_load_without_what_is_heavy() -> None:
    found = loaded("ops_platform.definitions")
    assert {"dagster", "ops_platform"} <= found
    assert found & HEAVY == set()


def test_the_library_loads_without_dagster_and_without_what_is_heavy() -> None:
    library = [name for name in MODULES if rank(name) < ABOVE or room(name) == "cli"]
    found = loaded(*library)
    assert found & HEAVY == set()
    assert {name for name in found if name.startswith("dagster")} == set()


@pytest.mark.skipif("ops_platform.cli.main" not in MODULES, reason="there is no command line yet")
def test_the_command_line_begins_with_next_to_nothing() -> None:
    """Its help is to be there at once: what a command needs it imports when it runs."""
    found = loaded("ops_platform.cli.main")
    assert (
        found & (HEAVY | {"dagster", "psycopg", "pydantic", "yaml", "hvac", "cryptography", "rich", "croniter"})
        == set()
    )
