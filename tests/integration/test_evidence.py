"""Evidence packs: cut from a real ledger by the command line, verified without any server, and every part of them changed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from ops_platform.cli.main import cli
from ops_platform.errors import CorruptionError, CouldNotVerifyError, NotThereError, UsageError
from ops_platform.inventory.evidence import Control
from ops_platform.ledger import dsse
from ops_platform.ledger.chain import moment
from ops_platform.ledger.dsse import Envelope
from ops_platform.ledger.pack import ENTRIES, MANIFEST, Cover, PackCheck, verify_pack, write_pack
from tests.ledger_rig import BEGIN, Checkpoints, Database
from tests.rig import Cluster, Ground, Platform

CONTROL = Control(id="CC7.4", framework="SOC 2", title="Incidents are responded to", kinds=["incident.", "action."])
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@pytest.fixture(scope="module")
def database(shared_cluster: Cluster) -> Iterator[Database]:
    made = Database(shared_cluster)
    yield made
    made.drop()


@pytest.fixture(scope="module")
def rig(ground: Ground, database: Database) -> Iterator[Checkpoints]:
    """Ten days, each with ten entries (four of them evidence) and two checkpoints, and a rotation of the key in between."""
    made = Checkpoints(ground, database)
    for day in range(10):
        made.clock.at = BEGIN + day * DAY
        made.fill(3)
        made.fill(2, "action.outcome")
        made.anchored().write()
        made.clock.at += 12 * HOUR
        made.fill(3, "backup.verification")
        made.fill(2, "incident.opened")
        made.anchored().write()
        if day == 5:
            made.vault("rotate_key", made.key)
    made.clock.at = BEGIN + 20 * DAY
    yield made
    made.close()


def pack(rig: Checkpoints, path: Path, *, days: tuple[int, int] = (3, 7), whole: bool = True, **more: Any) -> Cover:
    begin = BEGIN.replace(hour=0, minute=0, second=0, microsecond=0)
    return write_pack(
        path, rig.anchored(), more.pop("control", CONTROL), begin + days[0] * DAY, begin + days[1] * DAY,
        whole=whole, made_by="tester", cover=lambda _cover: "<h1>cover</h1>", **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(rig: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A pack with the whole stretch (True), and one with the fitting entries alone (False)."""
    folder = tmp_path_factory.mktemp("packs")
    paths = {True: folder / "whole.zip", False: folder / "matching.zip"}
    for whole, path in paths.items():
        pack(rig, path, whole=whole)
    return paths


@pytest.fixture
def pinned(rig: Checkpoints) -> dict[str, bytes]:
    return {"v1": rig.signer.public_keys()[f"{rig.key}:v1"]}


both = pytest.mark.parametrize("whole", [True, False], ids=["whole", "matching"])


@both
def test_a_pack_is_good_by_itself_and_a_pinned_key(
    made: dict[bool, Path], pinned: dict[str, bytes], whole: bool
) -> None:
    found = verify_pack(made[whole], pinned=pinned)
    assert (found.verdict, found.findings) == ("good", ())
    assert (found.evidence, found.whole) == (16, whole)
    assert found.covered_until == found.until
    assert [key.pinned for key in found.keys] == [True, False], "the second is vouched for by the first"
    if whole:
        # The boundaries: from the checkpoint before the first day to the one behind the last.
        assert (found.first, found.last, found.entries) == (31, 75, 45)
    else:
        assert found.entries == 16


@both
def test_without_a_pinned_key_it_is_never_good(made: dict[bool, Path], whole: bool) -> None:
    assert verify_pack(made[whole]).verdict == "unpinned"


@both
def test_under_another_key_it_is_bad(rig: Checkpoints, made: dict[bool, Path], whole: bool) -> None:
    rig.vault("create_key", f"{rig.key}-other", key_type="ed25519")
    answer = rig.vault("read_key", f"{rig.key}-other")
    other = {"other": base64.b64decode(answer["data"]["keys"]["1"]["public_key"])}
    found = verify_pack(made[whole], pinned=other)
    assert found.verdict == "bad"
    assert {each.kind for each in found.findings} >= {"checkpoint forged", "pack altered"}


def test_the_files_are_what_the_format_says(made: dict[bool, Path]) -> None:
    with zipfile.ZipFile(made[False]) as file:
        names = file.namelist()
        lines = [json.loads(line) for line in file.read(ENTRIES).splitlines()]
        manifest = Envelope.parse(file.read(MANIFEST)).statement
    assert {name.partition("/")[0] for name in names} == {
        "entries.jsonl", "checkpoints", "consistency.json", "keys", "cover.html", "manifest.dsse.json",
    }  # fmt: skip
    assert {line["kind"] for line in lines} == {"action.outcome", "incident.opened"}
    assert all(line["proof"] for line in lines)
    assert {each["name"] for each in manifest["subject"]} == set(names) - {MANIFEST}


def test_few_checkpoints_stand_for_many(made: dict[bool, Path]) -> None:
    """One for each day, the ends, the newest of all, and the one that both keys signed; each proven to be the beginning of the next."""
    with zipfile.ZipFile(made[True]) as file:
        numbers = [int(name[12:-5]) for name in file.namelist() if name.startswith("checkpoints/")]
    assert numbers == [6, 8, 10, 12, 13, 14, 15, 20]


def rewritten(path: Path, to: Path, change: Callable[[str, bytes], bytes | None], *extra: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                new.writestr(name, content)
        for name, content in extra:
            new.writestr(name, content)
    return to


def lines(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Callable[[str, bytes], bytes]:
    def on(name: str, content: bytes) -> bytes:
        if name != ENTRIES:
            return content
        found = change([json.loads(line) for line in content.splitlines()])
        return b"".join(json.dumps(line).encode() + b"\n" for line in found)

    return on


def signed_by_the_exporter(rig: Checkpoints, path: Path, to: Path, **said: Any) -> Path:
    """The manifest made anew over what is in the file now, by somebody who may use the signing key."""
    with zipfile.ZipFile(path) as file:
        statement = Envelope.parse(file.read(MANIFEST)).statement
        names = [name for name in file.namelist() if name != MANIFEST]
        digests = {name: hashlib.sha256(file.read(name)).hexdigest() for name in names}
    statement["subject"] = [{"name": name, "digest": {"sha256": found}} for name, found in digests.items()]
    statement["predicate"] |= said
    statement.pop("_type")
    envelope = dsse.signed(statement, rig.signer, [list(rig.signer.public_keys())[-1]])
    return rewritten(path, to, lambda name, content: envelope.to_bytes() if name == MANIFEST else content)


def bad(path: Path, pinned: dict[str, bytes]) -> list[tuple[str, str]]:
    found = verify_pack(path, pinned=pinned)
    assert found.verdict == "bad"
    return [(each.kind, each.where) for each in found.findings]


@both
def test_a_changed_file_is_not_the_one_that_was_signed(
    made: dict[bool, Path], pinned: dict[str, bytes], tmp_path: Path, whole: bool
) -> None:
    with zipfile.ZipFile(made[whole]) as file:
        names = [name for name in file.namelist() if name != MANIFEST]
    for name in names:
        bent = rewritten(made[whole], tmp_path / "x.zip", lambda n, c, name=name: c + b"\n" if n == name else c)
        assert ("pack altered", name) in bad(bent, pinned)
        if not name.startswith("checkpoints/") and name != ENTRIES:
            gone = rewritten(made[whole], tmp_path / "x.zip", lambda n, c, name=name: None if n == name else c)
            assert ("pack altered", name) in bad(gone, pinned)
    more = rewritten(made[whole], tmp_path / "x.zip", lambda _n, c: c, ("extra.html", b"<h1>all is well</h1>"))
    assert ("pack altered", "extra.html") in bad(more, pinned)


def _changed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**line, "body": '{"number":99}'} if number == 5 else line for number, line in enumerate(found)]


CHANGES: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {
    "changed": _changed,
    "twice": lambda found: [*found[:5], found[4], *found[5:]],
    "swapped": lambda found: [*found[:5], found[6], found[5], *found[7:]],
    "back-dated": lambda found: [{**each, "at": "2026-02-04T00:00:00.000000Z"} for each in found],
}


@both
@pytest.mark.parametrize("what", CHANGES)
def test_entries_that_were_touched_are_found_even_if_the_exporter_signs_them(
    rig: Checkpoints, made: dict[bool, Path], pinned: dict[str, bytes], tmp_path: Path, whole: bool, what: str
) -> None:
    bent = rewritten(made[whole], tmp_path / "x.zip", lines(CHANGES[what]))
    again = signed_by_the_exporter(rig, bent, tmp_path / "y.zip")
    assert any(kind == "not proven" for kind, _ in bad(again, pinned))


def test_an_entry_that_is_left_out_of_the_whole_is_missed_even_if_the_exporter_says_so(
    rig: Checkpoints, made: dict[bool, Path], pinned: dict[str, bytes], tmp_path: Path
) -> None:
    for left_out in (0, 20, 44):
        bent = rewritten(
            made[True], tmp_path / "x.zip", lines(lambda found, out=left_out: [*found[:out], *found[out + 1 :]])
        )
        again = signed_by_the_exporter(rig, bent, tmp_path / "y.zip", entries=44)
        assert {kind for kind, _ in bad(again, pinned)} <= {"not proven", "truncated"}


def test_a_pack_of_matching_entries_cannot_say_that_none_is_missing_and_says_so(
    rig: Checkpoints, made: dict[bool, Path], pinned: dict[str, bytes], tmp_path: Path
) -> None:
    bent = rewritten(made[False], tmp_path / "x.zip", lines(lambda found: found[:-1]))
    again = signed_by_the_exporter(rig, bent, tmp_path / "y.zip", entries=15, evidence=15)
    found = verify_pack(again, pinned=pinned)
    assert found.verdict == "good"
    assert any("cannot be told" in line for line in found.lines())


def test_a_stretch_that_begins_too_late_is_named(
    rig: Checkpoints, made: dict[bool, Path], pinned: dict[str, bytes], tmp_path: Path
) -> None:
    again = signed_by_the_exporter(rig, made[True], tmp_path / "y.zip", since=moment(BEGIN))
    assert ("pack incomplete", "the period") in bad(again, pinned)


def test_a_period_that_is_not_over_is_covered_until_now(
    rig: Checkpoints, pinned: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "x.zip"
    cover = pack(rig, path, days=(8, 40))
    assert cover.evidence == 8
    found = verify_pack(path, pinned=pinned)
    assert found.verdict == "incomplete"
    assert found.covered_until < found.until
    assert [(each.kind, each.grave) for each in found.findings] == [("pack incomplete", False)]
    assert verify_pack(path).verdict == "unpinned"
    (tmp_path / "key.pem").write_text(dsse.pem(pinned["v1"]))
    told = CliRunner().invoke(cli, ["ledger", "verify", "--offline", str(path), "--key", str(tmp_path / "key.pem")])
    assert told.exit_code == 3
    assert told.stdout.startswith("INCOMPLETE")
    assert f"nothing is left out until {moment(found.covered_until)}" in told.stdout
    assert "GOOD" not in told.output
    assert "export it again" in told.stderr


def test_that_nothing_happened_can_be_proven(rig: Checkpoints, pinned: dict[str, bytes], tmp_path: Path) -> None:
    quiet = Control(id="X1", framework="Own", title="Nothing", kinds=["no.such"])
    assert pack(rig, tmp_path / "x.zip", control=quiet).evidence == 0
    found = verify_pack(tmp_path / "x.zip", pinned=pinned)
    assert (found.verdict, found.evidence, found.entries) == ("good", 0, 45)


def test_from_the_beginning_on(rig: Checkpoints, pinned: dict[str, bytes], tmp_path: Path) -> None:
    cover = pack(rig, tmp_path / "x.zip", days=(-5, 2))
    assert (cover.first, cover.start, cover.evidence) == (1, None, 8)
    assert verify_pack(tmp_path / "x.zip", pinned=pinned).verdict == "good"


def test_one_subject_alone(rig: Checkpoints, pinned: dict[str, bytes], tmp_path: Path) -> None:
    pack(rig, tmp_path / "x.zip", control=CONTROL.model_copy(update={"subjects": ["db-1"]}))
    assert verify_pack(tmp_path / "x.zip", pinned=pinned).evidence == 8


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"{}"])
def test_what_is_no_pack_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(CorruptionError, match="no pack"):
        verify_pack(tmp_path / "x.zip")
    with pytest.raises(NotThereError):
        verify_pack(tmp_path / "y.zip")


def contents(file: zipfile.ZipFile) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    for name in file.namelist():
        try:
            found[name] = file.read(name)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is not what was written
            found[name] = type(error).__name__
    return found


def test_a_cut_or_bent_file_is_never_good(made: dict[bool, Path], pinned: dict[str, bytes], tmp_path: Path) -> None:
    raw = made[False].read_bytes()
    for place in range(0, len(raw), 331):
        for bent in (raw[:place], raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]):
            (tmp_path / "x.zip").write_bytes(bent)
            try:
                found = verify_pack(tmp_path / "x.zip", pinned=pinned)
            except CorruptionError:
                continue
            with zipfile.ZipFile(made[False]) as one, zipfile.ZipFile(tmp_path / "x.zip") as other:
                same = contents(one) == contents(other)
            assert same or found.verdict == "bad", place


# The command line


def ops(platform: Platform, *words: str) -> Result:
    return CliRunner().invoke(cli, list(words), env={"OPS_INVENTORY": str(platform.file)}, standalone_mode=False)


def answer(result: Result) -> int:
    """The exit code: of `ctx.exit`, or of the error."""
    if isinstance(result.exception, click.exceptions.Exit):
        return result.exception.exit_code
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return getattr(result.exception, "exit_code", 99)
    return result.return_value if isinstance(result.return_value, int) else result.exit_code


@pytest.fixture
def platform(new_platform: Callable[..., Platform], shared_cluster: Cluster, database: Database) -> Platform:
    """An inventory with a ledger of its own, which works with the rights of the platform's own role in Vault."""
    shared_cluster.sql(f"alter role {database.name} password 'pw'")
    database.empty()
    made = new_platform({"app-db": [shared_cluster]})
    made.ground.component("s3")
    (made.home / "ledger").write_text("pw")
    (made.home / "ledger").chmod(0o600)
    made.body["platform"] |= {
        "database": {
            "host": "127.0.0.1", "port": shared_cluster.port, "dbname": database.name, "user": database.name,
            "password": f"file://{made.home}/ledger", "tls": {"mode": "disable"},
        },
        "ledger": {"id": made.prefix, "store": "locked", "vault": "v", "object_lock": {"mode": "GOVERNANCE", "retain": "1d"}},
    }  # fmt: skip
    made.body["platform"]["ledger"]["id"] = f"l{made.prefix}"
    made.body["stores"]["locked"] = {**made.body["stores"]["s"], "bucket": "ops-ledger"}
    made.reload()
    return made


def test_from_the_first_entry_to_an_auditor_by_the_command_line(platform: Platform, tmp_path: Path) -> None:
    from ops_platform.ledger import Ledger

    with Ledger(platform.access.platform_db) as ledger:
        for number in range(6):
            ledger.append("action.outcome", "app-db", {"object": f"x{number}", "outcome": "applied"}, actor="tester")
    first = ops(platform, "ledger", "checkpoint", "--json")
    assert json.loads(first.stdout)["size"] == 6
    with Ledger(platform.access.platform_db) as ledger:
        ledger.append("action.outcome", "app-db", {"object": "<script>alert(1)</script>"}, actor="tester")
        until = ledger.clock.now().isoformat()  # the checkpoint from after it is written below
    found = ops(platform, "ledger", "verify", "--json", "--no-checkpoint")
    assert answer(found) == 0
    assert (json.loads(found.stdout)["anchored_seq"], json.loads(found.stdout)["checkpoints"]) == (6, 1)
    sound = ops(platform, "ledger", "verify")
    assert "1 checkpoint fits, the newest covers entry 6, 1 entry behind it" in sound.stdout
    assert "checkpoint 2 written" in sound.stderr

    proof = json.loads(ops(platform, "ledger", "prove", "3", "--json").stdout)
    assert (proof["index"], proof["size"], proof["checkpoint"], len(proof["proof"])) == (2, 7, 2, 3)
    (key,) = json.loads(ops(platform, "ledger", "keys", "--json").stdout)
    pem = tmp_path / "key.pem"
    pem.write_text(key["pem"])
    digest = subprocess.run(
        ["sh", "-c", f"openssl pkey -pubin -in {pem} -outform DER | sha256sum"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        digest.returncode != 0
        or not digest.stdout
        or key["fingerprint"] in digest.stdout
        or "not found" in digest.stderr
    )

    path = tmp_path / "pack.zip"
    words = ["--control", "CC7.4", "--from", "2020-01-01T00:00Z", "--to", until, "-o", str(path)]
    written = json.loads(ops(platform, "evidence", "export", *words, "--json").stdout)
    assert (written["evidence"], written["entries"], written["whole"]) == (7, 7, True)
    with zipfile.ZipFile(path) as file:
        cover = file.read("cover.html").decode()
    assert key["fingerprint"] in cover
    assert "7 entries are evidence" in cover
    assert "<script>alert" not in cover
    pack = path.read_bytes()
    refused = ops(platform, "evidence", "export", *words).exception
    assert isinstance(refused, UsageError)
    assert refused.where == str(path)
    assert "this file exists" in str(refused)
    assert "--output" in str(refused)
    assert path.read_bytes() == pack

    # Away from everything: no inventory, no network. In a process of its own, so that nothing is held open.
    def offline(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ops_platform.cli.main", "ledger", "verify", "--offline", str(path), *more]
        env = {name: value for name, value in os.environ.items() if not name.startswith("OPS_")}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)

    good = offline("--key", str(pem), "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["verdict"] == "good"
    open_ = offline()
    assert open_.returncode == 3
    assert "nothing in it can say" in open_.stderr
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("more.txt", "more")
    worse = offline("--key", str(pem))
    assert worse.returncode == 1
    assert "PACK ALTERED, more.txt" in worse.stderr


def test_no_evidence_is_cut_from_a_ledger_that_was_rewritten(
    platform: Platform, database: Database, tmp_path: Path
) -> None:
    from dataclasses import replace

    from ops_platform.ledger import Ledger

    with Ledger(platform.access.platform_db) as ledger:
        for number in range(4):
            ledger.append("action.outcome", "app-db", {"n": number}, actor="tester")
        ops(platform, "ledger", "checkpoint")
        database.rewrite([replace(entry, actor="nobody") for entry in ledger.entries()])
    words = [
        "--control",
        "CC7.4",
        "--from",
        "2020-01-01T00:00Z",
        "--to",
        "2099-01-01T00:00Z",
        "-o",
        str(tmp_path / "x.zip"),
    ]
    result = ops(platform, "evidence", "export", *words)
    assert isinstance(result.exception, CouldNotVerifyError | CorruptionError)
    assert list(tmp_path.iterdir()) == []
    found = ops(platform, "ledger", "verify")
    assert answer(found) == 1
    assert "REWRITTEN, entries 1 to 4" in found.stderr


def test_controls_are_listed_and_a_wrong_one_is_named(platform: Platform) -> None:
    platform.body["evidence"] = [
        {"id": "CC7.4", "framework": "SOC 2", "title": "Our own words", "kinds": ["action."]},
        {"id": "A1.2", "framework": "House", "title": "Ours", "kinds": ["house.rule"], "subjects": ["app-db"]},
    ]
    platform.reload()
    listed = {(c["framework"], c["id"]): c for c in json.loads(ops(platform, "evidence", "controls", "--json").stdout)}
    assert listed["SOC 2", "CC7.4"]["title"] == "Our own words"
    assert {("SOC 2", "A1.3"), ("ISO/IEC 27001:2022", "A.8.13"), ("House", "A1.2")} <= set(listed)

    def refused(*words: str) -> str:
        result = ops(platform, "evidence", "export", "--from", "2026-01-01T00:00Z", "--to", "2026-02-01T00:00Z", *words)
        assert isinstance(result.exception, UsageError)
        return str(result.exception)

    assert "did you mean CC7.4" in refused("--control", "CC7.44")
    assert "several frameworks" in refused("--control", "A1.2")
    assert "ends before it begins" in str(
        ops(
            platform,
            "evidence",
            "export",
            "--control",
            "CC7.4",
            "--from",
            "2026-02-01T00:00Z",
            "--to",
            "2026-01-01T00:00Z",
        ).exception
    )


def test_a_ledger_without_checkpoints_says_what_to_declare(platform: Platform) -> None:
    del platform.body["platform"]["ledger"]
    platform.reload()
    for words in (["ledger", "checkpoint"], ["ledger", "prove", "1"], ["ledger", "keys"]):
        assert "platform.ledger" in str(ops(platform, *words).exception)
    assert answer(ops(platform, "ledger", "verify")) == 0


def test_what_is_no_key_is_refused(made: dict[bool, Path], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("no key")
    result = CliRunner().invoke(
        cli, ["ledger", "verify", "--offline", str(made[True]), "--key", str(tmp_path / "key")], standalone_mode=False
    )
    assert isinstance(result.exception, UsageError)
    assert "ed25519" in str(result.exception)


def test_the_job_signs_and_its_schedule_is_the_inventorys(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    from dagster import DagsterInstance

    from ops_platform.ledger import Ledger

    monkeypatch.setenv("OPS_INVENTORY", str(platform.file))
    from ops_platform.definitions import build_defs

    platform.body["platform"]["ledger"]["schedule"] = {"cron": "*/7 * * * *", "timezone": "Europe/Berlin"}
    platform.reload()
    with Ledger(platform.access.platform_db) as ledger:
        ledger.append("action.outcome", "app-db", {}, actor="tester")
    repository = build_defs(platform.access.loaded).get_repository_def()
    schedule = repository.get_schedule_def("ledger_checkpoints")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("*/7 * * * *", "Europe/Berlin")
    with DagsterInstance.ephemeral() as instance:
        for new in (True, False):
            result = repository.get_job("ledger_checkpoint").execute_in_process(instance=instance)
            assert result.success
            (event,) = [e for e in result.all_events if e.event_type_value == "STEP_OUTPUT"]
            metadata = event.step_output_data.metadata
            assert (metadata["entries"].value, metadata["new"].value) == (1, new)


def test_what_a_pack_check_says_is_what_its_lines_say(made: dict[bool, Path], pinned: dict[str, bytes]) -> None:
    found: PackCheck = verify_pack(made[True], pinned=pinned)
    text = "\n".join(found.lines())
    assert text.startswith("GOOD\nSOC 2 CC7.4")
    assert "nothing is left out: all 45 entries from 31 to 75" in text
