"""Vault's snapshots: taken from a real server, restored into another one, opened, and read."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from ops_platform.backup.basebackup import run_backup as back_up_database
from ops_platform.backup.expiry import ExpiryAction
from ops_platform.backup.model import Proof
from ops_platform.backup.opening import open_target_repository
from ops_platform.cli.main import cli
from ops_platform.clients.postgres_binaries import free_port
from ops_platform.clients.vault import TransitKeys
from ops_platform.doctor import Found, examine_store
from ops_platform.drills.begin import Beginner, planned
from ops_platform.drills.model import Ending
from ops_platform.drills.runbook import runbook_of
from ops_platform.drills.steps.basics import moment_of
from ops_platform.drills.steps.vault import Lost, lost
from ops_platform.errors import AccessDeniedError, CorruptionError, InventoryError, UsageError
from ops_platform.inventory.systems import StoreTarget
from ops_platform.local.parts import program
from ops_platform.promises import judge
from ops_platform.recovery import gates as gates_of_a_database
from ops_platform.recovery.model import Verdict
from ops_platform.stores import servers, vault
from ops_platform.stores.dump import run_backup
from ops_platform.stores.kind import Check, Saved
from ops_platform.stores.verify import verify
from tests.drill_rig import Held, die, held_on, killed, passed
from tests.rig import Cluster, Ground, Platform, eventually, typed
from tests.servers import Daemon, answers
from tests.stores_rig import POLICY, MovedClock, dump, gate, gates, prove, store_platform, with_store

CANARY = "vault://secret/ops/canary#value"


@pytest.fixture(scope="session")
def desk(ground: Ground) -> Any:
    """Root's hands on the server of the tests."""
    import hvac

    ground.component("vault")
    token = (ground.place.directory / "secrets" / "vault.root_token").read_text()
    client = hvac.Client(url=f"http://127.0.0.1:{ground.place.port('vault')}", token=token, timeout=20)
    client.secrets.kv.v2.create_or_update_secret(path="ops/canary", secret={"value": "a bird"})
    return client


def entry(ground: Ground, **restore: Any) -> dict[str, Any]:
    shares = [f"file://{ground.place.directory}/secrets/vault.unseal_key"]
    return {"id": "vault", "kind": "vault", "vault": "v", "restore": {"shares": shares, "canary": CANARY, **restore}}


def test_a_snapshot_is_restored_unsealed_and_opens_the_newest_backup_of_a_database(
    ground: Ground, desk: Any, new_platform: Callable[..., Platform], shared_cluster: Cluster
) -> None:
    """The snapshot that is older than the database's key does not open its backup; the next one does."""
    platform = new_platform({"app-db": [shared_cluster]})
    vault_target = with_store(platform, entry(ground))
    first = run_backup(platform.access, vault_target)
    late = f"ops-backup-{secrets.token_hex(4)}"
    desk.secrets.transit.create_key(late, key_type="aes256-gcm96")
    desk.sys.create_or_update_policy("late", _LATE.replace("KEY", late))
    token = desk.auth.token.create(policies=["late", "ops-platform"], ttl="1h")["auth"]["client_token"]
    (platform.home / "token").write_text(token)
    (platform.home / "token").chmod(0o600)
    # As in earnest the copy is logged in to by AppRole, which it holds; its policy is the one that it was backed up with.
    platform.body["vaults"]["w"] = {
        **platform.body["vaults"]["v"], "auth": {"method": "token", "token": f"file://{platform.home}/token"},
    }  # fmt: skip
    platform.body["key_services"]["late"] = {"kind": "vault-transit", "vault": "w", "key": late}
    platform.body["targets"][0]["repository"]["keys"] = "late"
    vault_target = with_store(platform, {**entry(ground), "vault": "w"})
    back_up_database(platform.access, platform.target)

    card = verify(platform.access, vault_target)
    assert card.backup_id == first.backup_id
    assert card.verdict is not Verdict.PASS
    assert gates(card)["unseal"] == "passed"
    assert gates(card).get("data-key-app-db", "failed") != "passed"

    run_backup(platform.access, vault_target)
    card = verify(platform.access, vault_target)
    assert card.verdict is Verdict.PASS, card.reason
    assert gates(card) == {
        "whole": "passed", "age": "passed", "sums": "passed", "unseal": "passed", "login": "passed", "canary": "passed",
        "data-key-app-db": "passed", "teardown": "passed",
    }  # fmt: skip
    assert card.strength.startswith("level 2")
    assert {o.name for o in card.objectives if o.met} == {"rpo", "rto"}
    assert [proof.verdict for proof in records_of(platform, vault_target)][-1] == "PASS"


def test_a_database_is_restored_with_the_key_of_a_restored_vault(
    ground: Ground,
    desk: Any,
    new_platform: Callable[..., Platform],
    new_cluster: Callable[..., Cluster],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The drill of a Vault that is gone: refused until there is a backup of it; then the live one is not asked, which could not answer."""
    plan = {"id": "keys", "runbook": "vault-drill", "targets": ["app-db"]}
    held = held_on(new_cluster(18), new_platform, [plan])
    platform = held.platform
    back_up_database(platform.access, platform.target)
    request = planned(platform.access, "keys", None, {}, operator="ann", trigger="a test")
    refused = Beginner(platform.access, held.store).plan(request)
    assert "names no backup of that" in next(r.reason for r in refused.rulings if r.guard == "preflight")
    vault_target = with_store(platform, entry(ground))
    run_backup(platform.access, vault_target)

    held = Held(held.cluster, platform)
    asked: list[str] = []
    unwrap = TransitKeys.unwrap
    monkeypatch.setattr(TransitKeys, "unwrap", lambda keys, wrapped: asked.append(keys.name) or unwrap(keys, wrapped))
    begun = held.begin("keys").drill
    assert begun is not None
    card = passed(held.engine.run(begun.id))
    assert [part.target for part in card.stack] == ["vault", "app-db"]
    assert all(part.critical and part.seconds for part in card.stack)
    (rpo,) = [objective for objective in card.objectives if objective.name == "rpo"]
    assert (rpo.met, rpo.confidence) == (True, "bound")
    assert rpo.measured is not None
    assert {resource.kind: resource.gone for resource in card.teardown} == {"directory": True, "sandbox": True}
    assert asked
    assert not [name for name in asked if f":{ground.place.port('vault')}/" in name]
    # The same measured for a loss that comes later than the snapshot's promise: it does not hold, so that the drill would fail.
    ended, records = held.store.get(begun.id), dict(held.store.steps(begun.id))
    later = moment_of(records["loss"].facts["at"]) + vault_target.objectives.rpo
    records["loss"] = replace(records["loss"], facts={"at": later.isoformat()})
    context = held.engine.context(ended, runbook_of(ended).step("rpo"), records)
    (young,) = lost(context, Lost(restored="restored", loss="loss")).checks
    assert (young.holds, young.title) == (False, "The snapshot of vault is as young as was promised")
    for does, moment in KILLED:
        assert held.killed_when(does, moment, "keys"), f"{does} {moment}"
        held.nothing_left()

    def until_the_database_serves() -> None:
        monkeypatch.setattr(gates_of_a_database, "read_tables", die)
        held.elsewhere().drill("keys")

    assert killed(until_the_database_serves)
    assert list(platform.home.glob("ops-verify-app-db-*"))
    held.nothing_left()
    assert [drill.ending for drill in held.store.list()].count(Ending.LOST) == len(KILLED) + 1
    assert held.ledger.verify().ok


# Before there is a copy of Vault; while it and the database serve is the one above.
KILLED = (
    ("vault.possible", "ended"),
    ("vault.restore_first", "registered directory"),
)


_LATE = """
path "transit/datakey/plaintext/KEY" { capabilities = ["update"] }
path "transit/decrypt/KEY" { capabilities = ["update"] }
path "transit/keys/KEY" { capabilities = ["read"] }
"""


def records_of(platform: Platform, target: StoreTarget) -> list[Proof]:
    return open_target_repository(platform.access, target).proofs()


@pytest.fixture(scope="module")
def taken(ground: Ground, desk: Any) -> Iterator[Platform]:
    """A platform with one snapshot, for the tests that only look at it in other ways."""
    platform = Platform(ground, {})
    dump(platform, entry(ground))
    yield platform
    platform.close()


def test_shares_that_do_not_open_it_are_a_failure_at_level_1(ground: Ground, taken: Platform) -> None:
    wrong = taken.home / "wrong-share"
    wrong.touch(mode=0o600)
    wrong.write_text(base64.b64encode(secrets.token_bytes(32)).decode())
    target = with_store(taken, entry(ground, shares=[f"file://{wrong}"]))
    card = verify(taken.access, target)
    assert card.verdict is Verdict.FAIL
    assert gates(card)["unseal"] == "failed"
    assert "do not open it" in gate(card, "unseal").result
    assert gates(card)["teardown"] == "passed"
    assert card.strength.startswith("level 1")
    assert "canary" not in gates(card)
    assert wrong.read_text() not in card.model_dump_json()


@pytest.mark.parametrize(
    ("shares", "said"),
    [([], "names no key shares"), (["file:///nowhere/share"], "cannot be read")],
)
def test_without_the_shares_nothing_is_proven_beyond_level_1(
    ground: Ground, taken: Platform, shares: list[str], said: str
) -> None:
    card = prove(taken, entry(ground, shares=shares))
    assert card.verdict is Verdict.COULD_NOT_VERIFY
    assert said in card.reason
    assert "(level 1)" in card.reason
    assert gates(card)["teardown"] == "passed"


def test_a_machine_that_gives_no_network_of_its_own_starts_no_copy(
    ground: Ground, taken: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would revoke at the live databases what its leases say."""
    monkeypatch.setattr(servers, "own_network", tuple)
    card = prove(taken, entry(ground))
    assert card.verdict is Verdict.COULD_NOT_VERIFY
    assert "revoke at the live databases" in card.reason


def test_a_canary_that_is_another_one_fails(ground: Ground, desk: Any, taken: Platform) -> None:
    desk.secrets.kv.v2.create_or_update_secret(path="ops/other", secret={"value": "a stone"})
    target = with_store(taken, entry(ground, canary="vault://secret/ops/other#value"))
    run_backup(taken.access, target)
    desk.secrets.kv.v2.delete_metadata_and_all_versions(path="ops/other")
    dump(taken, entry(ground))  # after the first: it is the newest one, and holds no such secret

    class Mixed(vault.VaultStore):
        """The newest snapshot, and the canary of the one before."""

        def files(self, saved: Saved) -> Iterator[Check]:
            saved.facts["canary"] = {"salt": "s", "digest": "0" * 64}  # type: ignore[index]
            return super().files(saved)

    mixed = Mixed(taken.access, target, target.system)  # type: ignore[arg-type]
    card = prove(taken, entry(ground), kind=mixed)
    assert card.verdict is Verdict.FAIL
    assert gates(card)["canary"] == "failed"


def test_a_snapshot_of_a_newer_major_is_not_judged_by_an_older_server(ground: Ground, taken: Platform) -> None:
    target = with_store(taken, entry(ground))

    class Newer(vault.VaultStore):
        def restore(self, saved: Saved, home: Path) -> Any:
            return super().restore(replace(saved, server="Vault-compatible server 99.0.0"), home)

    card = verify(taken.access, target, kind=Newer(taken.access, target, target.system))  # type: ignore[arg-type]
    assert card.verdict is Verdict.COULD_NOT_VERIFY
    assert "99.0.0" in card.reason


def test_a_changed_byte_in_the_repository_fails_before_anything_is_started(ground: Ground, taken: Platform) -> None:
    target = with_store(taken, entry(ground))
    manifest = run_backup(taken.access, target)
    repository = open_target_repository(taken.access, target)
    block = manifest.parts[0].blocks[0]
    body = bytearray(repository.store.get(block.key))
    body[-1] ^= 1
    repository.store.put(block.key, bytes(body))
    card = verify(taken.access, target, backup_id=manifest.backup_id)
    assert card.verdict is Verdict.FAIL
    assert gates(card)["whole"] == "failed"
    assert card.strength.startswith("level 0")
    assert block.key in card.reason


def snapshot(ground: Ground, desk: Any) -> bytes:
    response = desk.sys.take_raft_snapshot()
    return b"".join(response.iter_content(1 << 20))


def test_a_snapshot_that_is_cut_off_anywhere_is_noticed(ground: Ground, desk: Any) -> None:
    whole = snapshot(ground, desk)
    found = vault._read_snapshot(io.BytesIO(whole), "here")
    assert found["index"] > 0
    for cut in [0, 1, 10, 1000, *range(len(whole) // 2, len(whole) - 1024, max(1, len(whole) // 20))]:
        with pytest.raises(CorruptionError, match="cut off"):
            vault._read_snapshot(io.BytesIO(whole[:cut]), "here")


def test_a_snapshot_whose_contents_are_not_what_its_sums_say_is_noticed(ground: Ground, desk: Any) -> None:
    plain = bytearray(gzip.decompress(snapshot(ground, desk)))
    at = plain.index(b'"Index":') + 8
    plain[at : at + 1] = b"9" if plain[at : at + 1] != b"9" else b"8"
    with pytest.raises(CorruptionError, match=r"meta\.json in the snapshot"):
        vault._read_snapshot(io.BytesIO(gzip.compress(bytes(plain))), "here")


def test_a_dump_that_breaks_off_leaves_nothing_that_counts(
    ground: Ground, taken: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = with_store(taken, entry(ground))
    repository = open_target_repository(taken.access, target)
    before = [info.backup_id for info in repository.infos()]
    whole = vault._stream

    def cut(response: Any) -> Iterator[bytes]:
        yield b"".join(whole(response))[:20_000]

    monkeypatch.setattr(vault, "_stream", cut)
    with pytest.raises(CorruptionError, match="cut off"):
        run_backup(taken.access, target)
    assert [info.backup_id for info in repository.infos()] == before


def test_a_vault_that_a_seal_opens_is_restored_and_opened_by_it(
    ground: Ground, new_platform: Callable[..., Platform], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shares there are: the stanza names the key by reference, and is read when the copy is started."""
    import hvac

    port = free_port()
    (tmp_path / "raft").mkdir()
    key, other = tmp_path / "seal.key", tmp_path / "other.key"
    for file in (key, other):
        file.touch(mode=0o600)
        file.write_bytes(secrets.token_bytes(32))
    stanza = {"static": {"current_key_id": "one", "current_key": f"file://{key}"}}
    config = {
        "storage": {"raft": {"path": str(tmp_path / "raft"), "node_id": "one", "performance_multiplier": "1"}},
        "listener": [{"tcp": {"address": f"127.0.0.1:{port}", "tls_disable": True}}],
        "api_addr": f"http://127.0.0.1:{port}", "cluster_addr": f"http://127.0.0.1:{free_port()}", "seal": stanza,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [program("bao", "openbao"), "server", f"-config={tmp_path / 'config.json'}"]
    url = f"http://127.0.0.1:{port}"
    daemon = Daemon("bao", [str(word) for word in command], lambda: answers(f"{url}/v1/sys/seal-status"),
                    log=tmp_path / "log", env={"HOME": str(tmp_path)})  # fmt: skip
    daemon.start()
    try:
        client: Any = hvac.Client(url=url, timeout=20)
        client.token = client.sys.initialize(recovery_shares=1, recovery_threshold=1)["root_token"]
        eventually(lambda: client.sys.read_leader_status()["is_self"], why="it becomes active")
        client.sys.enable_secrets_engine("kv", path="secret", options={"version": "2"})
        eventually(lambda: _written(client), why="the engine comes up")
        platform = new_platform({})
        for name, content in (("token", client.token), ("seal", json.dumps(stanza))):
            (platform.home / name).touch(mode=0o600)
            (platform.home / name).write_text(content)
        login = {"method": "token", "token": f"file://{platform.home}/token"}
        platform.body["vaults"]["sealed"] = {"url": url, "auth": login}
        restore = {"shares": [], "seal": f"file://{platform.home}/seal", "canary": CANARY}
        system = {**entry(ground), "vault": "sealed", "restore": restore}
        dump(platform, system)
        card = prove(platform, system)
        assert card.verdict is Verdict.PASS, card.reason
        assert gate(card, "unseal").result == "opened by its seal"
        assert gates(card)["canary"] == "passed"
        # With another key it is another seal: the copy does not open, and nobody says that it did.
        (platform.home / "seal").write_text(
            json.dumps({"static": {**stanza["static"], "current_key": f"file://{other}"}})
        )
        monkeypatch.setattr(vault, "_SEALED_FOR", 2.0)
        card = prove(platform, system)
        assert card.verdict is Verdict.FAIL, card.reason
        assert "its seal does not open it" in gate(card, "unseal").result
        assert "canary" not in gates(card)
        assert gates(card)["teardown"] == "passed"
        assert looked_at(platform, system)[0] == "good"
        client.sys.seal()
        state, found = looked_at(platform, system)
        assert state != "good"
        assert "sealed" in found
    finally:
        daemon.stop()


def looked_at(platform: Platform, system: dict[str, Any]) -> tuple[str, str]:
    """What `ops doctor` says of the server, for which it asks `look()`."""
    target = with_store(platform, system)
    found = examine_store(platform.access, target).findings[0]
    return found.state, found.found


def test_the_doctor_says_whether_the_server_answers_and_lets_us_in(ground: Ground, desk: Any, taken: Platform) -> None:
    state, found = looked_at(taken, entry(ground))
    assert (state, found.rpartition(" ")[0]) == ("good", "Vault-compatible server")
    nowhere = {**taken.body["vaults"]["v"], "url": f"http://127.0.0.1:{free_port()}"}
    wrong = taken.home / "wrong-token"
    wrong.touch(mode=0o600)
    wrong.write_text("s.nobody")
    stranger = {**taken.body["vaults"]["v"], "auth": {"method": "token", "token": f"file://{wrong}"}}
    taken.body["vaults"] |= {"nowhere": nowhere, "stranger": stranger}
    state, found = looked_at(taken, {**entry(ground), "vault": "nowhere"})
    assert (state, "does not answer" in found) == ("bad", True), found
    state, found = looked_at(taken, {**entry(ground), "vault": "stranger"})
    assert state != "good", found
    assert "s.nobody" not in found
    poor = desk.auth.token.create(policies=["default"], ttl="1h")["auth"]["client_token"]
    wrong.write_text(poor)
    state, found = looked_at(taken, {**entry(ground), "vault": "stranger"})
    assert state != "good"
    assert "may not take a snapshot" in found


# What the doctor says of what a proof needs

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "back-up-other-stores.md"


def block(language: str) -> str:
    """The block of the page's part about Vault in that language."""
    part = PAGE.read_text().partition("\n## Vault\n")[2].partition("\n## ")[0]
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
    return found


def needs(platform: Platform, system: dict[str, Any]) -> dict[str, Found]:
    target = with_store(platform, system)
    return {found.what: found for found in examine_store(platform.access, target).findings}


def login(desk: Any, platform: Platform, policy: str) -> dict[str, Any]:
    """An AppRole with that policy and Vault's own default one."""
    name = f"test-{secrets.token_hex(4)}"
    desk.sys.create_or_update_policy(name, policy)
    desk.auth.approle.create_or_update_approle(name, token_policies=[name], **{"token_ttl": "1h"})
    halves = {
        "role_id": desk.auth.approle.read_role_id(name)["data"]["role_id"],
        "secret_id": desk.auth.approle.generate_secret_id(name)["data"]["secret_id"],
    }
    for half, value in halves.items():
        file = platform.home / f"{name}.{half}"
        file.touch(mode=0o600)
        file.write_text(value)
    return {"method": "approle", **{half: f"file://{platform.home}/{name}.{half}" for half in halves}}


def test_the_policy_and_the_canary_of_the_how_to_are_enough_for_a_proof(
    ground: Ground, desk: Any, new_platform: Callable[..., Platform], tmp_path: Path
) -> None:
    desk.secrets.kv.v2.delete_metadata_and_all_versions(path="ops/canary")
    try:
        platform = new_platform({})
        platform.body["vaults"]["v"]["auth"] = login(desk, platform, block("hcl"))
        system = yaml.safe_load(block("yaml"))["systems"][0]
        assert system["restore"]["canary"] == CANARY
        system = {**entry(ground), "restore": entry(ground)["restore"] | {"canary": system["restore"]["canary"]}}
        found = needs(platform, system)["canary"]
        assert (found.state, "nothing there" in found.found) == ("bad", True)
        # What it says is what the page says, and is typed.
        assert found.remedy == block("sh").strip()
        typed(str(found.remedy), desk, tmp_path)
        found = needs(platform, system)
        assert (found["server"].state, found["canary"].state, found["key shares"].state) == ("good",) * 3
        dump(platform, system)
        card = prove(platform, system)
        assert card.verdict is Verdict.PASS, card.reason
        assert gates(card)["canary"] == "passed"
    finally:
        desk.secrets.kv.v2.create_or_update_secret(path="ops/canary", secret={"value": "a bird"})


def test_a_canary_that_a_backup_could_not_read_is_bad_with_what_to_do(
    ground: Ground, desk: Any, new_platform: Callable[..., Platform], tmp_path: Path
) -> None:
    platform = new_platform({})
    found = needs(platform, entry(ground, canary="vault://secret/ops/canary#name"))["canary"]
    assert (found.state, "no field 'name'" in found.found) == ("bad", True)
    typed(str(found.remedy), desk, tmp_path)
    assert needs(platform, entry(ground, canary="vault://secret/ops/canary#name"))["canary"].state == "good"
    assert needs(platform, entry(ground))["canary"].state == "good"  # what was there is there

    # The policy that lets it take a snapshot, and read nothing.
    (line,) = [line for line in block("hcl").splitlines() if "secret/" in line]
    poor = block("hcl").replace(line, "")
    platform.body["vaults"]["v"]["auth"] = login(desk, platform, poor)
    found = needs(platform, entry(ground))
    assert (found["server"].state, found["canary"].state) == ("good", "bad")
    assert f"write into the platform's policy: {line} " in str(found["canary"].remedy)
    with pytest.raises(AccessDeniedError):
        dump(platform, entry(ground))

    # The login of the copy reads it as well.
    platform.body["vaults"]["v"]["auth"] = login(desk, platform, block("hcl"))
    assert needs(platform, entry(ground, auth=login(desk, platform, block("hcl"))))["canary"].state == "good"
    found = needs(platform, entry(ground, auth=login(desk, platform, poor)))["canary"]
    assert (found.state, f"the policy of restore.auth: {line} " in str(found.remedy)) == ("bad", True)


def test_what_nobody_can_say_of_the_canary_is_not_known(ground: Ground, taken: Platform) -> None:
    nowhere = {**taken.body["vaults"]["v"], "url": f"http://127.0.0.1:{free_port()}"}
    taken.body["vaults"]["nowhere"] = nowhere
    found = needs(taken, {**entry(ground), "vault": "nowhere"})
    assert {name: found[name].state for name in ("server", "canary", "key shares")} == {
        "server": "bad", "canary": "unknown", "key shares": "unknown",
    }  # fmt: skip
    assert found["canary"].remedy
    done = CliRunner().invoke(cli, ["--inventory", str(taken.file), "doctor", "vault"])
    assert "?    canary: " in done.stdout


def test_what_the_inventory_does_not_name_is_no_good_either(ground: Ground, taken: Platform) -> None:
    found = needs(taken, entry(ground, canary=None, shares=[]))
    assert {name: (found[name].state, found[name].found) for name in ("canary", "key shares")} == dict.fromkeys(
        ("canary", "key shares"), ("warn", "the inventory names none")
    )
    assert "restore.canary" in str(found["canary"].remedy)
    assert "restore.shares" in str(found["key shares"].remedy)
    found = needs(taken, entry(ground, shares=["file:///nowhere/share"]))["key shares"]
    assert (found.state, "file:///nowhere/share" in found.found) == ("bad", True)
    stanza = taken.home / "no-stanza"
    stanza.touch(mode=0o600)
    stanza.write_text("a secret that is no JSON")
    found = needs(taken, entry(ground, shares=[], seal=f"file://{stanza}"))["seal"]
    assert (found.state, "is no JSON" in found.found, "a secret" in found.found) == ("bad", True, False)


def test_fewer_shares_than_the_threshold_do_not_open_it(
    ground: Ground, new_platform: Callable[..., Platform], tmp_path: Path
) -> None:
    import hvac

    port = free_port()
    (tmp_path / "raft").mkdir()
    config = {
        "storage": {"raft": {"path": str(tmp_path / "raft"), "node_id": "one", "performance_multiplier": "1"}},
        "listener": [{"tcp": {"address": f"127.0.0.1:{port}", "tls_disable": True}}],
        "api_addr": f"http://127.0.0.1:{port}", "cluster_addr": f"http://127.0.0.1:{free_port()}",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    url = f"http://127.0.0.1:{port}"
    command = [str(program("bao", "openbao")), "server", f"-config={tmp_path / 'config.json'}"]
    daemon = Daemon(
        "bao", command, lambda: answers(f"{url}/v1/sys/seal-status"), log=tmp_path / "log", env={"HOME": str(tmp_path)}
    )
    daemon.start()
    try:
        client: Any = hvac.Client(url=url, timeout=20)
        made = client.sys.initialize(secret_shares=3, secret_threshold=2)
        client.sys.submit_unseal_keys(made["keys_base64"][:2])
        platform = new_platform({})
        for name, content in (
            ("token", made["root_token"]),
            ("one", made["keys_base64"][0]),
            ("two", made["keys_base64"][1]),
        ):
            (platform.home / name).touch(mode=0o600)
            (platform.home / name).write_text(content)
        platform.body["vaults"]["two"] = {
            "url": url,
            "auth": {"method": "token", "token": f"file://{platform.home}/token"},
        }
        one, two = (f"file://{platform.home}/{name}" for name in ("one", "two"))
        found = needs(platform, {**entry(ground, shares=[one]), "vault": "two"})["key shares"]
        assert (found.state, found.found) == ("bad", "1 named, and it takes 2")
        found = needs(platform, {**entry(ground, shares=[one, two]), "vault": "two"})["key shares"]
        assert (found.state, found.found) == ("good", "2 can be read, and it takes 2")
    finally:
        daemon.stop()


def _written(client: Any) -> bool:
    """Whether the canary could be written: an engine of version 2 is made ready for a moment."""
    import hvac.exceptions

    try:
        client.secrets.kv.v2.create_or_update_secret(path="ops/canary", secret={"value": "a bird"})
    except hvac.exceptions.VaultError:
        return False
    return True


def test_a_server_without_raft_is_told_what_to_do(
    ground: Ground, new_platform: Callable[..., Platform], tmp_path: Path
) -> None:
    port = free_port()
    command = [
        program("bao", "openbao"),
        "server",
        "-dev",
        "-dev-root-token-id=root",
        f"-dev-listen-address=127.0.0.1:{port}",
    ]
    daemon = Daemon("bao", [str(word) for word in command], lambda: answers(f"http://127.0.0.1:{port}/v1/sys/health"),
                    log=tmp_path / "log", env={"HOME": str(tmp_path)})  # fmt: skip
    daemon.start()
    try:
        platform = new_platform({})
        (platform.home / "token").touch(mode=0o600)
        (platform.home / "token").write_text("root")
        login = {"method": "token", "token": f"file://{platform.home}/token"}
        platform.body["vaults"]["dev"] = {"url": f"http://127.0.0.1:{port}", "auth": login}
        with pytest.raises(UsageError, match="only raft storage has snapshots"):
            dump(platform, {**entry(ground), "vault": "dev"})
        state, found = looked_at(platform, {**entry(ground), "vault": "dev"})
        assert state != "good"
        assert "only raft storage has snapshots" in found
    finally:
        daemon.stop()


def test_a_backup_that_only_its_own_vault_could_open_is_refused_by_the_inventory(
    ground: Ground, new_platform: Callable[..., Platform]
) -> None:
    with pytest.raises(InventoryError, match="a key that stands in this very Vault"):
        store_platform(new_platform, {**entry(ground), "repository": {"store": "s", "keys": "k"}})


# What is the same for every kind: the commands, the catalog, the promises, expiry


def test_the_commands_take_list_show_prove_and_expire_a_store(ground: Ground, desk: Any, taken: Platform) -> None:
    with_store(taken, entry(ground))

    def ops(*words: str, code: int = 0) -> Any:
        done = CliRunner().invoke(cli, ["--inventory", str(taken.file), *words, "--json"])
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    (made,) = ops("backup", "run", "vault")
    assert made["store"] == "vault"
    (listed,) = ops("backup", "list", "vault")
    assert listed["backups"][-1]["backup_id"] == made["backup_id"]
    assert listed["window"]["latest"] is not None
    assert ops("backup", "show", "vault", made["backup_id"])["manifest"]["mac"] == made["mac"]
    (card,) = ops("backup", "verify", "vault", "--no-report")
    assert (card["verdict"], card["backup_id"]) == ("PASS", made["backup_id"])
    (expired,) = ops("backup", "expire", "vault")
    assert expired["status"] == "nothing to do"
    done = CliRunner().invoke(cli, ["--inventory", str(taken.file), "backup", "list"])
    assert "moments, from" in done.output
    done = CliRunner().invoke(cli, ["--inventory", str(taken.file), "backup", "run", "vault", "--incremental"])
    assert isinstance(done.exception, UsageError)
    done = CliRunner().invoke(
        cli, ["--inventory", str(taken.file), "backup", "verify", "vault", "--to", "2026-01-01T00:00Z"]
    )
    assert isinstance(done.exception, UsageError)
    done = CliRunner().invoke(cli, ["--inventory", str(taken.file), "report", "vault"])
    assert done.exit_code == 0, done.output
    assert "level 2" in (taken.home / "reports" / "vault.html").read_text()


def test_the_promises_are_judged_from_the_store(ground: Ground, taken: Platform) -> None:
    target = with_store(taken, entry(ground))
    run_backup(taken.access, target)
    assert judge("backup_fresh", taken.access, target).kept
    late = with_store(taken, {**entry(ground), "backup": {**POLICY, "max_age": "1s"}})
    clock = MovedClock(timedelta(days=1))
    assert not judge("backup_fresh", taken.access, late, clock).kept


def test_expiry_keeps_the_window_and_the_proven_one(ground: Ground, taken: Platform) -> None:
    target = with_store(taken, entry(ground))
    repository = open_target_repository(taken.access, target)
    while len(repository.infos()) < 4:
        run_backup(taken.access, target)
    action = ExpiryAction(repository, target, clock=MovedClock(timedelta(days=30)))
    plan = action.plan()
    kept = {item["backup"] for item in plan.facts["kept"]}
    assert {info.backup_id for info in repository.infos()[-2:]} <= kept
    assert {change.object for change in plan.changes} == {info.backup_id for info in repository.infos()} - kept
    assert plan.changes
