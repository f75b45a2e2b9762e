"""platform.yaml: each mistake is named with file, line, key path and the nearest valid key, and none shows a secret."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from ops_platform.errors import InventoryError, UsageError
from ops_platform.inventory import Inventory, InventoryMistakes, json_schema, load
from ops_platform.inventory.document import Document
from ops_platform.inventory.loader import find

ROOT = Path(__file__).parents[2]
PASSWORD = "hunter2-of-the-shop"
BASE = """\
version: 1
platform:
  name: tests
owners:
  team: { name: Team }
environments:
  production:
    defaults:
      owner: team
      classification: internal
      objectives: { rto: 4h }
      connection:
        dbname: shop
        tls: { mode: verify-full }
      repository: { store: main, keys: transit }
      backup: nightly
vaults:
  central:
    url: https://vault.example.com:8200
    auth: { method: kubernetes, role: ops }
key_services:
  transit: { kind: vault-transit, vault: central }
stores:
  main:
    endpoint: https://s3.example.com
    bucket: backups
    access_key: env://S3_ACCESS
    secret_key: env://S3_SECRET
backup_policies:
  nightly:
    schedule: { cron: "15 2 * * *", timezone: Europe/Berlin }
    recovery_window: 14d
    verification:
      amcheck: sample
      pick: [newest]
targets:
  - id: app-db
    environment: production
    connection:
      hosts: [{ host: db.example.com }]
      user: ops_backup
      password: vault://secret/app-db/ops#password
  - id: billing-db
    environment: production
    connection:
      hosts: [{ host: billing.example.com }]
      user: ops_backup
    backup:
      policy: nightly
      verification:
        proven_within: 3d
"""


def written(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "platform.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def changed(*changes: tuple[str, str]) -> str:
    """BASE with each text replaced where it stands first; a text that is not there would make a test that cannot fail."""
    text = BASE
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


def line_of(text: str, part: str) -> int:
    return text[: text.index(part)].count("\n") + 1


def mistakes(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(InventoryMistakes) as caught:
        load(written(tmp_path, text))
    return [str(mistake) for mistake in caught.value.mistakes]


def refusal(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(InventoryError) as caught:
        load(written(tmp_path, text))
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_defaults_and_policies_stand_in_every_target(tmp_path: Path) -> None:
    inventory = load(written(tmp_path, BASE)).inventory
    app, billing = inventory.targets
    assert (app.owner, app.connection.dbname, app.connection.tls.mode) == ("team", "shop", "verify-full")
    assert app.backup.recovery_window.days == billing.backup.recovery_window.days == 14
    # What differs is replaced key by key; what stands beside it stays the policy's.
    assert (billing.backup.verification.proven_within.days, app.backup.verification.proven_within.days) == (3, 2)
    assert billing.backup.verification.pick == ["newest"]


# One mistake: (what is changed, the text at which the line is expected, the key path, words of the message)
ONE = [
    pytest.param(("bucket: backups", "bucked: backups"), "bucked", "stores.main.bucked",
                 "there is no key 'bucked' here; did you mean 'bucket'?", id="unknown key"),
    pytest.param(("user: ops_backup", "user: ops_backup\n      zzz: 1"), "zzz: 1", "targets[0].connection.zzz",
                 "valid keys: connect_timeout, credentials, dbname, hosts, password, tls, user", id="unknown key, none near"),
    pytest.param(("platform:\n  name: tests", "platform:\n  nam: tests"), "nam: tests", "platform.nam",
                 "did you mean 'name'?", id="unknown key at the top"),
    pytest.param(("proven_within: 3d", "provenwithin: 3d"), "provenwithin", "targets[1].backup.verification.provenwithin",
                 "did you mean 'proven_within'?", id="unknown key below a policy"),
    pytest.param(("policy: nightly\n", "polcy: nightly\n"), "polcy", "targets[1].backup.polcy", "did you mean 'policy'?",
                 id="policy misspelt"),
    pytest.param(("{ host: db.example.com }", "{ host: db.example.com, port: '5432' }"), "hosts: [{ host: db.",
                 "targets[0].connection.hosts[0].port", "this should be a whole number, not a text", id="text for a number"),
    pytest.param(("amcheck: sample", "canary: no"), "canary: no", "backup_policies.nightly.verification.canary",
                 "this should be true or false, not a text", id="no is a word"),
    pytest.param(("bucket: backups", "bucket: 17"), "bucket: 17", "stores.main.bucket", "this should be a text, not 17",
                 id="number for a text"),
    pytest.param(("bucket: backups", "bucket: 0o17\n    bucket_: 1"), "bucket_", "stores.main.bucket_", "no key",
                 id="an octal is a text"),
    pytest.param(("hosts: [{ host: db.example.com }]", "hosts: { host: db.example.com }"), "hosts: { host: db.",
                 "targets[0].connection.hosts", "this should be a list, not a mapping", id="mapping for a list"),
    pytest.param(("    auth: { method: kubernetes, role: ops }", "    auth: kubernetes"), "auth: kub", "vaults.central.auth",
                 "this should be a mapping, not a text", id="text for a mapping"),
    pytest.param(("mode: verify-full", "mode: verify"), "mode: verify }", "environments.production.defaults.connection.tls.mode",
                 "this should be 'disable', 'require', 'verify-ca' or 'verify-full'", id="value out of a set, in nested defaults"),
    pytest.param(("- id: billing-db", "- id: app-db"), "- id: app-db\n    environment: production\n    connection:\n      hosts: [{ host: bil",
                 "targets[1].id", "the id 'app-db' belongs to the target in line 37 already", id="duplicate id"),
    pytest.param(("- id: app-db", "- id: App_DB"), "- id: App_DB", "targets[0].id", "'App_DB' is not an id", id="bad id"),
    pytest.param(("  main:\n    endpoint", "  main:\n    bucket: b\n    endpoint"), "bucket: backups", "stores.main.bucket",
                 "this key stands here twice", id="duplicate key"),
    pytest.param(("15 2 * * *", "15 2 * *"), "cron", "backup_policies.nightly.schedule.cron", "'15 2 * *' is not a cron expression; five fields",
                 id="bad cron"),
    pytest.param(("15 2 * * *", "15 2 31 2 *"), "cron", "backup_policies.nightly.schedule.cron", "'15 2 31 2 *' never comes", id="a cron that never comes"),
    pytest.param(("15 2 * * *", "15 2 1W * *"), "cron", "backup_policies.nightly.schedule.cron", "is not a cron expression",
                 id="a cron that Dagster does not read"),
    pytest.param(("Europe/Berlin", "Europe/Berin"), "cron", "backup_policies.nightly.schedule.timezone",
                 "'Europe/Berin' is not a time zone; did you mean Europe/Berlin?", id="bad zone"),
    pytest.param(("rto: 4h", "rto: 4"), "rto: 4", "environments.production.defaults.objectives.rto",
                 "4 is not a duration; write a number with a unit", id="duration without a unit"),
    pytest.param(("14d", "fortnight"), "fortnight", "backup_policies.nightly.recovery_window", "'fortnight' is not a duration", id="bad duration"),
    pytest.param(("14d", "999999999d"), "999999999d", "backup_policies.nightly.recovery_window", "longer than a century", id="endless duration"),
    pytest.param(("window: 14d", "window: 14d\n    transfer: { block_size: 16 Mebi }"), "block_size",
                 "backup_policies.nightly.transfer.block_size", "'16 Mebi' is not a size", id="bad size"),
    pytest.param(("window: 14d", "window: 14d\n    transfer: { rate_limit: -5 }"), "rate_limit",
                 "backup_policies.nightly.transfer.rate_limit", "-5 is not a size", id="negative size"),
    pytest.param(("bucket: backups", "bucket: backups\n    timeout: 0s"), "timeout: 0s", "stores.main.timeout",
                 "must be longer than nothing", id="no time at all"),
    pytest.param(("owner: team", "owner: teem"), "owner: teem", "environments.production.defaults.owner",
                 "there is no owner 'teem'; did you mean 'team'?", id="unknown owner, in defaults"),
    pytest.param(("store: main", "store: minio"), "store: minio", "environments.production.defaults.repository.store",
                 "there is no store 'minio'; did you mean 'main'?", id="unknown store"),
    pytest.param(("keys: transit", "keys: files"), "keys: files", "environments.production.defaults.repository.keys",
                 "there is no key service 'files'; declared: transit", id="unknown key service"),
    pytest.param(("vault: central", "vault: centra"), "vault: centra", "key_services.transit.vault", "did you mean 'central'?", id="unknown vault"),
    pytest.param(("      policy: nightly\n", "      policy: nigthly\n"), "policy: nigthly", "targets[1].backup.policy",
                 "there is no backup policy 'nigthly'; did you mean 'nightly'?", id="unknown policy with overrides"),
    pytest.param(("      backup: nightly\n", "      backup: weekly\n"), "backup: weekly", "environments.production.defaults.backup",
                 "there is no backup policy 'weekly'", id="unknown policy, in defaults"),
    pytest.param(("- id: app-db\n    environment: production", "- id: app-db\n    environment: producton"), "environment: producton",
                 "targets[0].environment", "there is no environment 'producton'; did you mean 'production'?", id="unknown environment"),
    pytest.param(("classification: internal", "clasification: internal\n      classification: internal"), "clasification",
                 "environments.production.defaults.clasification", "did you mean 'classification'?", id="unknown key in defaults"),
    pytest.param(("    schedule: { cron: \"15 2 * * *\", timezone: Europe/Berlin }\n", ""), "nightly:\n", "backup_policies.nightly.schedule",
                 "the key 'schedule' is missing", id="missing in a policy"),
    pytest.param(("      classification: internal\n", ""), "- id: app-db", "targets[0].classification", "is missing", id="missing everywhere"),
    pytest.param(("role: ops", "mount: k"), "auth:", "vaults.central.auth", "kubernetes needs role", id="half a login"),
    pytest.param(("{ method: kubernetes, role: ops }", '{ method: token, token: "vault://secret/a#b" }'), "auth:", "vaults.central.auth",
                 "what opens Vault cannot stand in Vault", id="a login that needs itself"),
    pytest.param(("https://s3.example.com", "https://s3.example.com/minio"), "endpoint", "stores.main.endpoint", "without a path", id="store below a path"),
    pytest.param(("https://s3.example.com", "s3.example.com:9000"), "endpoint", "stores.main.endpoint", "not a usable address", id="address without a scheme"),
    pytest.param(("https://s3.example.com", "https://s3.example.com:port"), "endpoint", "stores.main.endpoint", "not a usable address",
                 id="bad port in an address"),
    pytest.param(("host: db.example.com", "host: 'db.example.com:5432,x'"), "hosts: [{ host: 'db",
                 "targets[0].connection.hosts[0].host", "not a host", id="bad host"),
    pytest.param(("host: db.example.com", "host: 'db:5432'"), "hosts: [{ host: 'db",
                 "targets[0].connection.hosts[0].host", "not a host", id="a host of hexadecimal digits with its port"),
    pytest.param(("  team: {", "  Team_1: {"), "Team_1", "owners.Team_1", "'Team_1' is not an id", id="bad id of a table"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "at", "key", "words"), ONE)
def test_a_mistake_is_named_where_it_was_written(
    tmp_path: Path, change: tuple[str, str], at: str, key: str, words: str
) -> None:
    text = changed(change)
    found = mistakes(tmp_path, text)
    expected = f"platform.yaml:{line_of(text, at)}: {key}: "
    assert any(mistake.startswith(expected) and words in mistake for mistake in found), (expected, words, found)


def test_a_mistake_in_a_policy_or_a_default_is_said_once_for_all_targets(tmp_path: Path) -> None:
    text = changed(
        ("amcheck: sample", "amcheck: some"), ("dbname: shop", "dbname: 7"), ("rto: 4h", "rto: 4h, rpo: soon")
    )
    found = mistakes(tmp_path, text)
    assert [mistake.split(": ")[1] for mistake in found] == [
        "environments.production.defaults.objectives.rpo",
        "environments.production.defaults.connection.dbname",
        "backup_policies.nightly.verification.amcheck",
    ]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (('    schedule: { cron: "15 2 * * *", timezone: Europe/Berlin }\n', ""), "backup_policies.nightly.schedule"),
        (("    recovery_window: 14d", "    recovery_windw: 14d"), "backup_policies.nightly.recovery_windw"),
        (
            ("classification: internal", "classification: internal\n      zzz: {}"),
            "environments.production.defaults.zzz",
        ),
        (("  nightly:\n", "  other:\n"), None),
    ],
    ids=["missing in a policy", "unknown in a policy", "unknown in defaults", "policy renamed"],
)
def test_one_mistake_is_one_whatever_hangs_on_it(tmp_path: Path, change: tuple[str, str], key: str | None) -> None:
    found = [mistake.split(": ")[1] for mistake in mistakes(tmp_path, changed(change))]
    # A policy that is gone is missed at both places that name it.
    assert found == [key] if key else ["environments.production.defaults.backup", "targets[1].backup.policy"]


def test_an_override_is_blamed_itself_and_not_its_policy(tmp_path: Path) -> None:
    text = changed(("proven_within: 3d", "amcheck: some"))
    (found,) = mistakes(tmp_path, text)
    assert found.startswith(f"platform.yaml:{line_of(text, 'amcheck: some')}: targets[1].backup.verification.amcheck: ")


def test_a_policy_of_an_environment_can_be_changed_there_and_is_blamed_there(tmp_path: Path) -> None:
    text = changed(("backup: nightly\n", "backup:\n        policy: nightly\n        max_age: soon\n"))
    (found,) = mistakes(tmp_path, text)
    assert found.startswith(
        f"platform.yaml:{line_of(text, 'max_age')}: environments.production.defaults.backup.max_age: "
    )


def test_mistakes_of_every_kind_come_at_once_in_the_order_of_the_lines(tmp_path: Path) -> None:
    text = changed(
        ("- id: billing-db", "- id: app-db"),  # a duplicate
        ("vault: central", "vault: centra"),  # a reference
        ("name: tests", "nmae: tests"),  # an unknown and a missing key
        ("14d", "14"),  # a value
        ("    bucket: backups\n", "    bucket: backups\n    bucket: again\n"),  # a key that stands twice
    )
    with pytest.raises(InventoryMistakes, match=r"^6 mistakes in the inventory:\n") as caught:
        load(written(tmp_path, text))
    found = [str(mistake) for mistake in caught.value.mistakes]
    lines = [int(mistake.split(":")[1]) for mistake in found]
    assert lines == sorted(lines)
    assert [mistake.split(": ")[1] for mistake in found] == [
        "platform.name",
        "platform.nmae",
        "key_services.transit.vault",
        "stores.main.bucket",
        "backup_policies.nightly.recovery_window",
        "targets[1].id",
    ]


def test_an_unknown_environment_is_one_mistake_and_not_one_for_each_of_its_defaults(tmp_path: Path) -> None:
    found = mistakes(
        tmp_path, changed(("- id: app-db\n    environment: production", "- id: app-db\n    environment: prod"))
    )
    assert [mistake.split(": ")[1] for mistake in found] == ["targets[0].environment"]


def test_an_unknown_policy_is_one_mistake(tmp_path: Path) -> None:
    found = mistakes(tmp_path, changed(("      policy: nightly\n", "      policy: [nightly]\n")))
    assert found == [
        f"platform.yaml:{line_of(BASE, '      policy: nightly')}: targets[1].backup.policy: this should be the id of a backup policy"
    ]


def test_a_thousand_mistakes_are_counted_and_fifty_are_shown(tmp_path: Path) -> None:
    target = BASE[BASE.index("  - id: billing-db") :]
    many = "".join(target.replace("billing-db", f"db-{n}").replace("policy:", "polcy:") for n in range(100))
    with pytest.raises(InventoryMistakes) as caught:
        load(written(tmp_path, BASE + many))
    assert len(caught.value.mistakes) == 200  # the misspelt key, and the schedule that it therefore lacks
    assert str(caught.value).endswith("… and 150 more")
    assert str(caught.value).count("platform.yaml:") == 50


def test_a_merged_key_keeps_its_line(tmp_path: Path) -> None:
    own = "    connection:\n      hosts: [{ host: billing.example.com }]\n"
    text = changed(
        ("    connection:\n      hosts: [{", "    connection: &login\n      connect_timeout: soon\n      hosts: [{"),
        (own, "    connection:\n      <<: *login\n"),
    )
    found = mistakes(tmp_path, text)
    line = line_of(text, "connect_timeout")
    assert [mistake.split(": ")[:2] for mistake in found] == [
        [f"platform.yaml:{line}", "targets[0].connection.connect_timeout"],
        [f"platform.yaml:{line}", "targets[1].connection.connect_timeout"],
    ]


# Files that are no inventory at all


@pytest.mark.parametrize(
    "content",
    [
        "root:$y$j9T$secret:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n",
        "password: secret\npassword: secret\n",
        "s3cr3t-secret: {}\n",
    ],
)
def test_nothing_is_quoted_of_a_file_that_is_no_inventory(tmp_path: Path, content: str) -> None:
    file = tmp_path / "shadow"
    file.write_text(content)
    with pytest.raises(InventoryError, match="this is no inventory") as caught:
        load(file)
    assert not [word for word in ("secret", "root", "password", "19000") if word in str(caught.value)]
    assert caught.value.remedy == "name a platform.yaml"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "platform.yaml:1: the inventory is a mapping that begins with `version: 1`", id="empty"),
        pytest.param(b"# later\n", "platform.yaml:1: the inventory is a mapping", id="only a comment"),
        pytest.param(b"- version: 1\n", "platform.yaml:1: the inventory is a mapping", id="a list"),
        pytest.param(b"version: 1\nname: [a\nb: c\n", "platform.yaml:3: this is not YAML: did not find expected", id="syntax"),
        pytest.param(b"version: 1\nplatform:\n\tname: x\n", "platform.yaml:3: this is not YAML: found character that cannot start any token", id="tab"),
        pytest.param(b"version: 1\nplatform:\n\tname: x\n", "indent with spaces, not with tabs", id="tab, remedy"),
        pytest.param(b"version: 1\nname: K\xf6ln\n", "platform.yaml:2: this is not UTF-8", id="latin-1"),
        pytest.param("version: 1\n".encode("utf-16"), "platform.yaml:1: this is not UTF-8", id="utf-16"),
        pytest.param(f"name: {'ö' * 99}\nbell: \x07\na:\nb:\nc:\n".encode() + b"d:\n" * 40, "platform.yaml:2: this is not YAML: control characters",
                     id="control character"),
        pytest.param(b"version: 1\n---\nversion: 1\n", "platform.yaml:2: a second document begins here", id="two documents"),
        pytest.param(b"? [a, b]\n: c\n", "platform.yaml:1: a key is a word or a number", id="structure as a key"),
        pytest.param(b"a: !!python/object/apply:os.system [id]\n", "platform.yaml:1: tags (!…) have no meaning here", id="tag"),
        pytest.param(b"a: !!int x\n", "have no meaning here", id="number that is none"),
        pytest.param(b"a: &a [*a]\n", "platform.yaml:1: this alias (*…) has no anchor above it", id="a list within itself"),
        pytest.param(b"a: &a\n  <<: *a\n", "platform.yaml:2: this alias", id="a mapping merged into itself"),
        pytest.param(b"a: &a 1\nb: { <<: *a }\n", "platform.yaml:2: << takes a mapping", id="merge of a number"),
        pytest.param(b"a: " + b"[" * 200_000 + b"]" * 200_000, "platform.yaml:1: this is nested more than 64 deep", id="deep lists"),
        pytest.param(b"a: " + b"{a: " * 100_000 + b"}" * 100_000, "this is nested more than 64 deep", id="deep mappings"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_refused_with_its_line(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in refusal(tmp_path, content)


@pytest.mark.parametrize("number", ["0899", "9" * 5000, "1_000", "0x10", "1e400", ".inf", "0o9"])
def test_numbers_that_are_none_are_texts(tmp_path: Path, number: str) -> None:
    found = mistakes(tmp_path, changed(("host: db.example.com", f"host: db.example.com, port: {number}")))
    assert len(found) == 1
    assert "this should be a whole number, not a text" in found[0]


@pytest.mark.parametrize("shape", ["[{}]", "{{<<: [{}]}}"], ids=["lists", "merges"])
def test_aliases_that_multiply_do_not_hang(tmp_path: Path, shape: str) -> None:
    first = "a0: &a0 " + ("{k: 1}" if "<<" in shape else "[x, x, x, x, x, x, x, x, x]")
    laughs = [f"a{n}: &a{n} " + shape.format(", ".join([f"*a{n - 1}"] * 9)) for n in range(1, 30)]
    assert "aliases unfold this to more than a million values" in refusal(tmp_path, "\n".join([first, *laughs, ""]))


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    assert len(load(written(tmp_path, b"\xef\xbb\xbf" + BASE.encode())).inventory.targets) == 2


def test_a_missing_file_names_itself_and_what_writes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InventoryError, match=r"nowhere\.yaml: the inventory cannot be read: No such file") as caught:
        load(tmp_path / "nowhere.yaml")
    assert caught.value.remedy == "ops init writes one"
    with pytest.raises(InventoryError, match="cannot be read: Is a directory") as caught:
        load(tmp_path)
    assert caught.value.remedy == "make it a file that you may read"
    monkeypatch.delenv("OPS_INVENTORY", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InventoryError, match=r"there is no platform\.yaml here or above"):
        find()


def test_the_file_is_found_by_its_variable_then_upwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    file, other = written(tmp_path, BASE), tmp_path / "other.yaml"
    monkeypatch.chdir(below)
    monkeypatch.delenv("OPS_INVENTORY", raising=False)
    assert find() == file
    monkeypatch.setenv("OPS_INVENTORY", str(other))
    assert find() == other
    assert find(file) == file


# Secrets


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(("vault://secret/app-db/ops#password", PASSWORD), id="in the place of a reference"),
        pytest.param(("vault://secret/app-db/ops#password", f"'vault://{PASSWORD}'"), id="behind a scheme"),
        pytest.param(("vault://secret/app-db/ops#password", f"'env://{PASSWORD}'"), id="as a variable"),
        pytest.param(("vault://secret/app-db/ops#password", f"'file://{PASSWORD}'"), id="as a file"),
        pytest.param(("vault://secret/app-db/ops#password", f"'https://[{PASSWORD}'"), id="as a broken address"),
        pytest.param(("vault://secret/app-db/ops#password", f"!{PASSWORD}"), id="as a tag"),
        pytest.param(("vault://secret/app-db/ops#password", f"*{PASSWORD}"), id="as an alias"),
        pytest.param(("vault://secret/app-db/ops#password", f"&{PASSWORD}"), id="as an anchor"),
        pytest.param(("vault://secret/app-db/ops#password", f"%{PASSWORD}"), id="as a syntax error"),
        pytest.param(("vault://secret/app-db/ops#password", f"{{ value: {PASSWORD} }}"), id="in a mapping"),
        pytest.param(("vault://secret/app-db/ops#password", f"[{PASSWORD}]"), id="in a list"),
        pytest.param(("host: db.example.com", f"host: 'postgresql://u:{PASSWORD}@db'"), id="in a host"),
        pytest.param(("host: db.example.com", f"host: 'u:{PASSWORD}@db'"), id="in a host without a scheme"),
        pytest.param(("https://s3.example.com", f"https://u:{PASSWORD}@s3.example.com"), id="in an address"),
        pytest.param(("https://s3.example.com", f"'https://s3.example.com?token={PASSWORD}'"), id="in a query"),
        pytest.param(("https://vault.example.com:8200", f"https://u:{PASSWORD}@[v"), id="in a broken address"),
        pytest.param(("auth: { method: kubernetes, role: ops }", f"auth: {PASSWORD}"), id="for a mapping"),
        pytest.param(("recovery_window: 14d", f"recovery_window: {{ password: {PASSWORD} }}"), id="within a duration"),
        pytest.param(("method: kubernetes, role: ops", f"method: {PASSWORD}"), id="for a word out of a set"),
        pytest.param(("host: db.example.com", f"host: db, port: {PASSWORD}"), id="for a number"),
    ],
)  # fmt: skip
def test_a_secret_in_clear_is_refused_and_not_repeated(tmp_path: Path, change: tuple[str, str]) -> None:
    file = written(tmp_path, changed(change))
    with pytest.raises(InventoryError) as caught:
        load(file)
    error: BaseException | None = caught.value
    assert "platform.yaml:" in str(error)
    while error is not None:  # a traceback would print the chain
        assert PASSWORD not in f"{error!s}{error!r}{getattr(error, 'mistakes', '')}{getattr(error, 'remedy', '')}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_a_vault_reference_needs_a_vault(tmp_path: Path) -> None:
    text = changed(
        (
            "vaults:\n  central:\n    url: https://vault.example.com:8200\n    auth: { method: kubernetes, role: ops }\n",
            "",
        ),
        ("{ kind: vault-transit, vault: central }", "{ kind: file, path: /etc/ops/key }"),
    )
    (found,) = mistakes(tmp_path, text)
    assert found.startswith(f"platform.yaml:{line_of(text, 'vault://')}: targets[0].connection.password: ")


# Using it


def test_a_target_that_is_not_there_is_answered_with_those_that_are_near(tmp_path: Path) -> None:
    inventory = load(written(tmp_path, BASE)).inventory
    assert inventory.target("app-db").id == "app-db"
    with pytest.raises(UsageError, match=r"there is no target 'ap-db'") as caught:
        inventory.target("ap-db")
    assert caught.value.remedy == "did you mean app-db?"


def test_a_loaded_inventory_reads_itself_back(tmp_path: Path) -> None:
    inventory = load(written(tmp_path, BASE)).inventory
    assert Inventory.model_validate_json(inventory.model_dump_json()) == inventory


# The schema for editors


def schema_errors(text: str) -> list[str]:
    return [
        error.message for error in Draft202012Validator(json_schema()).iter_errors(Document(text.encode(), "x").value)
    ]


def test_the_published_schema_is_that_of_the_model() -> None:
    file = ROOT / "docs" / "reference" / "platform.schema.json"
    assert json.loads(file.read_text()) == json_schema(), (
        "the model has changed: ops inventory schema > docs/reference/platform.schema.json"
    )


def test_the_schema_is_one_and_takes_what_the_loader_takes() -> None:
    Draft202012Validator.check_schema(json_schema())
    assert schema_errors(BASE) == []
    assert schema_errors((ROOT / "platform.yaml").read_text()) == []


def test_the_shipped_inventory_loads_and_names_its_schema() -> None:
    text = (ROOT / "platform.yaml").read_text()
    assert load(ROOT / "platform.yaml").inventory.targets
    assert text.startswith("# yaml-language-server: $schema=docs/reference/platform.schema.json\n")


@pytest.mark.parametrize(
    "change",
    [
        ("bucket: backups", "bucked: backups"),
        ("version: 1", "version: 2"),
        ("rto: 4h", "rto: 4"),
        ("dbname: shop", "dbnam: shop"),
        ("proven_within: 3d", "provenwithin: 3d"),
        ("  team: {", "  Team_1: {"),
        ("vault://secret/app-db/ops#password", PASSWORD),
        ('    schedule: { cron: "15 2 * * *", timezone: Europe/Berlin }\n', ""),
        ("{ host: db.example.com }", "{ port: 5432 }"),
        ("    environment: production\n", ""),
    ],
)
def test_the_schema_marks_in_the_editor_what_the_loader_refuses(tmp_path: Path, change: tuple[str, str]) -> None:
    text = changed(change)
    assert schema_errors(text) != []
    assert mistakes(tmp_path, text) != []


def test_every_object_of_the_schema_refuses_unknown_keys() -> None:
    def objects(value: Any) -> list[dict[str, Any]]:
        if isinstance(value, dict):
            inner = [found for item in value.values() for found in objects(item)]
            return [value, *inner] if value.get("type") == "object" and "properties" in value else inner
        return [found for item in value for found in objects(item)] if isinstance(value, list) else []

    found = objects(json_schema())
    assert len(found) > 30
    assert [entry.get("title") for entry in found if entry.get("additionalProperties") is not False] == []


def test_errors_are_ours_whatever_the_bytes(tmp_path: Path) -> None:
    """Each single byte of a good file broken in turn: it loads, or an InventoryError says why not; never another error."""
    data = BASE.encode()
    for position in range(0, len(data), 7):
        for byte in (0x00, 0x22, 0x3A, 0x7B, 0xFF):
            broken = data[:position] + bytes([byte]) + data[position + 1 :]
            with contextlib.suppress(InventoryError):
                load(written(tmp_path, broken))
