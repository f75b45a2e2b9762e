"""The commented platform.yaml that `ops init` writes, from what a live database says of itself."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import yaml

from ops_platform.counting import size
from ops_platform.inventory.values import SecretRef


@dataclass(frozen=True)
class Described:
    """What was asked and what the cluster answered."""

    target_id: str
    hosts: list[tuple[str, int]]
    user: str
    dbname: str
    password: SecretRef | None
    tls: str
    ca: str | None
    version: str
    size: int
    incremental: bool
    notes: list[str] = field(default_factory=list[str])


def target_id_of(host: str) -> str:
    """An id from a host name: `Db-1.example.com` becomes `db-1`; an address or a directory becomes `db`."""
    first = re.sub(r"[^a-z0-9]+", "-", host.split(".", maxsplit=1)[0].lower()).strip("-")
    return first if re.match(r"[a-z]", first) and not host.startswith("/") else "db"


def _text(value: object) -> str:
    """A YAML scalar, quoted where it must be, also between braces."""
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6).strip()[1:-1]


def render(found: Described) -> str:
    hosts = "\n".join(f"        - {{ host: {_text(host)}, port: {port} }}" for host, port in found.hosts)
    password = f"\n      password: {_text(str(found.password))}" if found.password else ""
    ca = f", ca: {_text(found.ca)}" if found.ca else ""
    incremental = "true" if found.incremental else "false"
    why = "" if found.incremental else " # PostgreSQL 17+ with summarize_wal = on"
    return f"""\
# What is operated. Check it with `ops inventory check`; every key is explained in docs/reference/inventory.md.
version: 1

platform:
  name: my-platform
  reports: reports # folder for HTML reports, relative to this file
  # The ledger's database. Without it expiry can only be observed.
  # database: {{ host: ledger.example.com, dbname: ops, user: ops, password: "vault://secret/ops/ledger#password" }}

owners:
  team: {{ name: Platform team, email: team@example.com }}

environments:
  production:
    defaults: # what every target of this environment has unless it says otherwise
      owner: team
      classification: confidential # public, internal, confidential, restricted
      objectives: {{ rto: 4h, rpo: 1h }}
      repository: {{ store: backups, keys: backups }}
      backup: nightly

# Secrets stand here by reference only: vault://mount/path#field, env://NAME, file:///path
vaults:
  main:
    url: https://vault.example.com:8200
    auth: {{ method: kubernetes, role: ops-platform }}

key_services:
  backups: {{ kind: vault-transit, vault: main, key: ops-backup }}

stores:
  backups:
    endpoint: https://s3.example.com
    bucket: my-backups
    access_key: vault://secret/ops/s3#access_key
    secret_key: vault://secret/ops/s3#secret_key
    # object_lock: {{ mode: COMPLIANCE, retain: 21d }} # the bucket must have been made with it

backup_policies:
  nightly:
    schedule: {{ cron: "15 2 * * *", timezone: UTC, spread: 2h }}
    recovery_window: 14d # every moment of this time stays restorable
    minimum_redundancy: 2 # full backups kept whatever their age
    incremental: {{ enabled: {incremental}, full_every: 7d, max_chain: 6 }}{why}
    verification:
      schedule: {{ cron: "30 5 * * *", timezone: UTC, spread: 2h }}
      proven_within: 2d
      pick: [newest, random, chain, oldest] # by turns
    expiry: {{ mode: observe, max_count: 10, max_percent: 34 }} # enforce deletes

targets:
  # PostgreSQL {found.version}, {size(found.size)} when this was written.
  - id: {_text(found.target_id)}
    environment: production
    connection:
      hosts: # every member; which one is the primary is asked
{hosts}
      dbname: {_text(found.dbname)}
      user: {_text(found.user)}{password}
      tls: {{ mode: {found.tls}{ca} }}
"""
