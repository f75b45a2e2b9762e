"""Vault is gone, and with it the keys of the backups: it comes back first, and the database after it, opened by the key of what came back."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, cast

from pydantic import Field

from ops_platform.clients.vault import VaultSession
from ops_platform.drills.model import Checked, Confidence, Done
from ops_platform.drills.registry import Context, NothingGiven, does
from ops_platform.drills.steps.basics import measure, moment_of
from ops_platform.drills.steps.stack import look_of, part_of, register_sandbox
from ops_platform.errors import CouldNotVerifyError, OpsError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.systems import StoreTarget, VaultSystem
from ops_platform.inventory.values import Id
from ops_platform.recovery.model import GateStatus


def _vault_of(context: Context) -> StoreTarget:
    """The Vault that wraps the data keys of the target's backups, as a store that is backed up. Raises CouldNotVerifyError."""
    target, inventory = context.target, context.access.inventory
    service = inventory.key_services.get(target.repository.keys or "")
    if service is None or service.kind != "vault-transit":
        raise CouldNotVerifyError(
            "no Vault wraps the data keys of its backups", where=target.id, remedy="hold restore-drill instead"
        )
    for stored in inventory.store_targets():
        if isinstance(stored.system, VaultSystem) and stored.system.vault == service.vault:
            return stored
    raise CouldNotVerifyError(
        f"its data keys are wrapped by the Vault {service.vault!r}, and the inventory names no backup of that",
        where=target.id,
        remedy="declare it under systems, with backup, repository and restore",
    )


def _name_of(stored: StoreTarget) -> str:
    return cast("VaultSystem", stored.system).vault


@does("vault.possible", "check")
def possible(context: Context, given: NothingGiven) -> Done:
    """Both have a backup: the database, and the Vault that wraps its data keys."""
    from ops_platform.backup.opening import open_target_repository

    title = "Database and Vault have a backup"
    try:
        stored = _vault_of(context)
        found = {one.id: open_target_repository(context.access, one).finished() for one in (stored, context.target)}
    except OpsError as error:
        return Done(error.what, checks=(Checked(title=title, holds=None, query="ops backup list", result=error.line),))
    said = "; ".join(f"{name}: {ids[-1] if ids else 'none'}" for name, ids in found.items())
    check = Checked(title=title, holds=all(found.values()), query="ops backup list", result=said)
    return Done(said, checks=(check,))


@does("vault.restore_first", "act", changes=lambda _given: "a sandbox of Vault and one of the database, which go again")
def restore_first(context: Context, given: NothingGiven) -> Done:
    """The newest snapshot of Vault into a sandbox, unsealed by what the inventory names; then the newest backup of the database, its data key
    unwrapped by the Transit key of that copy and its secrets read there: the live Vault is not asked."""
    from ops_platform.recovery.verify import verify

    stored, target = _vault_of(context), context.target
    began = context.clock.monotonic()
    with _restored(context, stored) as (session, part):
        part["seconds"] = part["took"] = round(context.clock.monotonic() - began, 3)
        opened = Checked(
            title=f"{stored.id} is restored and unsealed", holds=True, query="sys/unseal, auth/token/lookup-self",
            result=f"{part['server']}, {part['backup']}",
        )  # fmt: skip
        register_sandbox(context, target)
        began = context.clock.monotonic()
        with context.access.with_vault(_name_of(stored), session) as there:
            card = verify(there, target, pick="newest", alone=True)
        took = context.clock.monotonic() - began
    parts = [part, part_of(target, card, [stored.id], took)]
    look = look_of(target.id, card, took)
    versions = {part["target"]: part["server"] for part in parts}
    latest = card.window_latest.isoformat() if card.window_latest else None
    return Done(look.result, {"parts": parts, "versions": versions, "restorable_until": latest}, (opened, look))


class Lost(Strict):
    """Of `vault.lost`."""

    restored: Id = Field(description="The step that restored both.")
    loss: Id = Field(description="The step at which the loss was supposed.")


@does("vault.lost", "measure", given=Lost)
def lost(context: Context, given: Lost) -> Done:
    """What of the database would have been lost: from the newest moment that its repository holds to the moment of loss, which is a bound. And
    the age of Vault's snapshot then, against what was promised for Vault: what was written there since, keys too, is gone."""
    stored, at = _vault_of(context), moment_of(context.fact(given.loss, "at"))
    vault, _database = context.fact(given.restored, "parts")
    age, allowed = at - moment_of(vault["taken"]), stored.objectives.rpo
    young = Checked(
        title=f"The snapshot of {stored.id} is as young as was promised", holds=age <= allowed,
        query=f"ops backup list {stored.id}", result=f"{vault['backup']}, {age.total_seconds():.1f} s old at the loss, {allowed} are allowed",
    )  # fmt: skip
    until = context.fact(given.restored, "restorable_until")
    if until is None:
        return Done("not measured", checks=(young,), measured=(measure(context, None, "nothing was restorable"),))
    seconds = max(0.0, (at - moment_of(until)).total_seconds())
    found = measure(context, seconds, f"from the newest moment that is restorable ({until})", Confidence.BOUND)
    return Done(f"{seconds:.1f} s at most; {young.result}", checks=(young,), measured=(found,))


@contextlib.contextmanager
def _restored(context: Context, stored: StoreTarget) -> Generator[tuple[VaultSession, dict[str, Any]]]:
    """A copy of Vault that is open to us, until the block ends. Raises CouldNotVerifyError where it does not open."""
    from ops_platform.backup.opening import open_target_repository
    from ops_platform.stores.fetch import fetch_backup
    from ops_platform.stores.vault import open_store

    home = context.workspace / "vault"
    context.register("directory", str(context.workspace), path=str(context.workspace))
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    repository = open_target_repository(context.access, stored)
    manifest = repository.store_manifest(repository.finished()[-1])
    saved = fetch_backup(repository, manifest, home / "parts")
    with open_store(context.access, stored).restore(saved, home) as copy:
        if copy.opened.status is not GateStatus.PASSED:
            raise CouldNotVerifyError(f"the copy does not open: {copy.opened.result}", where=stored.id)
        copy.session.call(lambda client: client.auth.token.lookup_self(), stored.id)
        yield copy.session, {
            "target": stored.id, "kind": stored.kind, "needs": [], "verdict": "PASS", "said": copy.opened.result,
            "backup": manifest.backup_id, "server": copy.server, "taken": manifest.moment.isoformat(),
        }  # fmt: skip
