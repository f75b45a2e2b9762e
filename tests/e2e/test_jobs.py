"""The jobs as CI calls them, through `dagster job execute`: exit code 0 only where everything was done and proven."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from ops_platform.backup.archive import archive_status, read_archive
from ops_platform.backup.opening import open_target_repository
from ops_platform.clients.postgres_binaries import free_port
from ops_platform.recovery import records
from ops_platform.recovery.model import Scorecard, Verdict
from tests.integration.wal_rig import eventually
from tests.rig import Cluster, Platform

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
PROOF, BACKUP = "postgres__pitr_verification", "postgres__base_backup"


class Company:
    """Targets with their receiver, and a DAGSTER_HOME of their own."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        home = platform.home / "dagster"
        home.mkdir()
        (home / "dagster.yaml").write_text("telemetry: { enabled: false }\n")
        self.env = {**platform.env, "DAGSTER_HOME": str(home)}
        self._receiver: subprocess.Popen[bytes] | None = None

    def receive(self, *names: str) -> None:
        self.stop()
        command = [sys.executable, "-m", "ops_platform.cli.main", "wal", "receive", *names]
        self._receiver = subprocess.Popen(command, env=self.env, stderr=subprocess.DEVNULL)
        for name in names:
            eventually(lambda name=name: self._received(name), why=f"nobody receives the WAL of {name}")

    def _received(self, name: str) -> bool:
        slot = archive_status(self.platform.access, self.target(name)).slot
        return slot is not None and slot.active_pid is not None

    def stop(self) -> None:
        if self._receiver is not None:
            self._receiver.terminate()
            self._receiver.wait(60)
            self._receiver = None

    def target(self, name: str) -> Any:
        return self.platform.access.inventory.target(name)

    def execute(
        self, job: str, target: str | None = None, *, code: int = 0, config: dict[str, Any] | None = None
    ) -> str:
        """Its log. Without a target: a run over all of them."""
        command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "ops_platform.definitions", "-j", job]
        if target is not None:
            command += ["--tags", json.dumps({"dagster/partition": target})]
        if config is not None:
            file = self.platform.home / "run.yaml"
            file.write_text(yaml.safe_dump({"ops": {op: {"config": values} for op, values in config.items()}}))
            command += ["--config", str(file)]
        done = subprocess.run(command, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == code, done.stderr[-6000:]
        return done.stderr + done.stdout

    def kill(self, job: str, target: str, moment: Callable[[], object]) -> None:
        """Begin it, and kill it as soon as `moment` holds."""
        command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "ops_platform.definitions", "-j", job]
        command += ["--tags", json.dumps({"dagster/partition": target})]
        with (self.platform.home / "killed.log").open("wb") as log:
            run = subprocess.Popen(command, env=self.env, cwd=ROOT, stdout=log, stderr=log)
        try:
            said = lambda: (self.platform.home / "killed.log").read_text()[-3000:]  # noqa: E731
            eventually(lambda: moment() or run.poll() is not None, seconds=180, why=said)
            assert run.poll() is None, said()
        finally:
            run.kill()
            run.wait(30)

    def cards(self, name: str) -> list[Scorecard]:
        return records.scorecards(open_target_repository(self.platform.access, self.target(name)))

    def backups(self, name: str) -> list[str]:
        return [info.backup_id for info in open_target_repository(self.platform.access, self.target(name)).infos()]


@pytest.fixture
def company(
    new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]
) -> Iterator[Callable[[Sequence[str]], tuple[Company, Cluster]]]:
    """Targets that are one cluster under several names, each with its own slot and archive."""
    made: list[Company] = []

    def make(names: Sequence[str]) -> tuple[Company, Cluster]:
        cluster = new_cluster(18)
        cluster.sql("create table t as select generate_series(1, 1000) i")
        platform = new_platform({name: [cluster] for name in names})
        for target in platform.body["targets"]:
            target["wal"]["slot"] = target["id"].replace("-", "_")
        platform.reload()
        made.append(Company(platform))
        return made[-1], cluster

    yield make
    for one in made:
        one.stop()


def test_a_night_of_one_target_and_what_follows_it(company: Callable[..., tuple[Company, Cluster]]) -> None:
    it, cluster = company(["app-db"])
    it.receive("app-db")
    it.execute("nightly_backup", "app-db")
    (card,) = it.cards("app-db")
    assert (card.verdict, card.turn, [card.backup_id]) == (Verdict.PASS, None, it.backups("app-db"))
    it.execute("observe_sources", "app-db")
    it.execute("check_promises", "app-db")
    it.execute("verify_recovery", "app-db")
    assert [card.turn for card in it.cards("app-db")] == [None, 0], "the proof after the backup was no turn"
    said = it.execute("verify_recovery", "app-db", code=1, config={PROOF: {"at": "2026-01-01T00:00:00"}})
    assert "has no zone" in said

    (manifest,) = it.platform.repository.backups()
    it.platform.repository.store.delete(manifest.archives[0].blocks[0].key)
    said = it.execute("verify_recovery", "app-db", code=1, config={PROOF: {"pick": "newest"}})
    assert "FAIL: " in said
    assert it.cards("app-db")[-1].verdict is Verdict.FAIL

    for _ in range(4):
        cluster.sql("insert into t select generate_series(1, 1000)")
        cluster.sql("select pg_switch_wal()")
    position = cluster.sql("select pg_current_wal_flush_lsn()::text")
    status = lambda: archive_status(it.platform.access, it.target("app-db"))  # noqa: E731
    eventually(lambda: (status().lag_bytes or 0) == 0, why=f"{position} was not archived")
    archive = read_archive(it.platform.repository)
    assert archive is not None
    lost = [item for item in archive.listing if not item.partial and not item.history][-2]
    it.platform.repository.store.delete(lost.info.key)
    said = it.execute("check_promises", "app-db", code=1)
    assert "postgres/base_backup: wal_continuous" in said


def test_a_promise_that_is_not_kept_fails_the_night(company: Callable[..., tuple[Company, Cluster]]) -> None:
    """Nobody receives WAL: the blocking check keeps a single target from its proof, and CI from its green light."""
    it, _ = company(["app-db"])
    said = it.execute("nightly_backup", "app-db", code=1)
    assert "nobody receives WAL" in said
    assert len(it.backups("app-db")) == 1
    assert it.cards("app-db") == []


def test_a_night_of_all_targets_and_one_that_is_broken(company: Callable[..., tuple[Company, Cluster]]) -> None:
    it, _ = company(["a-shop", "b-shop", "c-shop"])
    it.receive("a-shop", "b-shop", "c-shop")
    it.execute("nightly_backup")
    for name in ("a-shop", "b-shop", "c-shop"):
        assert [(card.verdict, card.turn) for card in it.cards(name)] == [(Verdict.PASS, None)], name

    # In the middle there is one that cannot be backed up, and of the last one nobody receives the WAL.
    b_shop = next(target for target in it.platform.body["targets"] if target["id"] == "b-shop")
    b_shop["connection"]["hosts"][0]["port"] = free_port()
    it.platform.reload()
    it.receive("a-shop")
    said = it.execute("nightly_backup", code=1)
    assert len(it.backups("a-shop")) == 2
    assert len(it.backups("b-shop")) == 1
    assert len(it.backups("c-shop")) == 2, "the turn of the one after it came"
    assert [(card.verdict, card.backup_id) for card in it.cards("a-shop")] == [
        (Verdict.PASS, backup_id) for backup_id in it.backups("a-shop")
    ]
    assert len(it.cards("c-shop")) == 1, "its own blocking check kept it from its proof"
    assert "no primary of b-shop answers" in said
    assert "could not be judged: no primary" not in said.split("the steps of c-shop")[-1]
    it.execute("observe_sources", code=1)
    it.execute("check_promises", code=1)


def test_a_killed_night_leaves_nothing_that_the_next_one_stumbles_over(
    company: Callable[..., tuple[Company, Cluster]],
) -> None:
    """kill -9 of `dagster job execute` in the middle of a backup, then in the middle of a proof."""
    it, _ = company(["app-db"])
    it.platform.body["targets"][0]["backup"]["transfer"]["rate_limit"] = "8MiB"
    it.platform.reload()
    it.receive("app-db")
    it.kill("nightly_backup", "app-db", it.platform.repository.unfinished)
    assert it.backups("app-db") == []
    it.kill("nightly_backup", "app-db", lambda: list(it.platform.home.glob("ops-verify-*/data/postmaster.pid")))
    assert len(it.backups("app-db")) == 1
    assert it.cards("app-db") == []
    (left,) = it.platform.home.glob("ops-verify-*")
    it.execute("nightly_backup", "app-db")
    (card,) = it.cards("app-db")
    assert (card.verdict, card.backup_id) == (Verdict.PASS, it.backups("app-db")[-1])
    assert not list(it.platform.home.glob("ops-verify-*"))
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [words for words in running if str(left).encode() in words]
