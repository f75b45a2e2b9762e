"""The verification of one target: restore into a sandbox to a moment, look at the data, say what was found.

Three verdicts. One failed gate makes FAIL; one gate that could not be checked makes COULD_NOT_VERIFY, which is never shown as a
pass. The scorecard is stored whatever the verdict, and the sandbox goes whatever happens; that it went is the last gate.
"""

from __future__ import annotations

import random
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ops_platform import __version__
from ops_platform.backup.archive import open_target_repository, read_archive
from ops_platform.backup.engine import open_engine, span
from ops_platform.backup.model import (
    BackupEngine,
    BackupInfo,
    BackupKind,
    Lsn,
    Progress,
    RecoveryTarget,
    RecoveryWindow,
    no_progress,
)
from ops_platform.clients.postgres_binaries import PgInstall, need_postgres, run_as
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import CorruptionError, CouldNotVerifyError, OpsError, UnreachableError, UsageError
from ops_platform.recovery import canary, gates, records
from ops_platform.recovery.canary import SourceMoment
from ops_platform.recovery.findings import Finding, Record
from ops_platform.recovery.model import Gate, GateStatus, Objective, Scorecard, Verdict
from ops_platform.recovery.restore import needed_bytes, sandbox_tablespaces
from ops_platform.recovery.sandbox import Sandbox, network_namespace, temporary_home
from ops_platform.recovery.steps import Steps

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory import Target
    from ops_platform.inventory.model import Backed

Pick = Literal["newest", "oldest", "chain", "random"]
REPLAY_TIMEOUT = 24 * 3600.0


@dataclass(frozen=True)
class Choice:
    """What is restored, to which moment, and why this one."""

    backup: BackupInfo
    recovery: RecoveryTarget
    moment: datetime
    picked: str
    newest: bool = False  # to the moment at which the source was looked at, so that it is known as it was then


def verdict_of(found: list[Gate]) -> tuple[Verdict, str]:
    """The verdict over the gates, with the gates that decided it. No gate at all proves nothing."""
    failed = [gate for gate in found if gate.status is GateStatus.FAILED]
    unchecked = [gate for gate in found if gate.status is GateStatus.COULD_NOT_CHECK]
    if failed:
        return Verdict.FAIL, "; ".join(f"{gate.title}: {gate.result}" for gate in failed)
    if unchecked:
        return Verdict.COULD_NOT_VERIFY, "; ".join(f"{gate.title}: {gate.result}" for gate in unchecked)
    passed = [gate for gate in found if gate.status is GateStatus.PASSED]
    if not passed:
        return Verdict.COULD_NOT_VERIFY, "nothing was checked"
    return Verdict.PASS, f"all {len(passed)} checks passed"


class Verification:
    """One verification from beginning to end. Use `verify`."""

    def __init__(
        self,
        access: Access,
        target: Target,
        *,
        pick: Pick | None,
        at: datetime | None,
        backup_id: str | None,
        full: bool,
        alone: bool,
        data_docs: Path | None,
        progress: Progress,
        clock: Clock,
    ) -> None:
        self.access, self.target, self.clock, self.progress = access, target, clock, progress
        self.policy = target.backup.verification
        self.pick, self.at, self.backup_id, self.full, self.data_docs = pick, at, backup_id, full, data_docs
        self.alone = alone
        self.started_at = clock.now()
        self.id = records.new_verification_id(self.started_at)
        self.record = Record(lambda title: progress(title, 0, None))
        self.steps = Steps()
        self.notes: list[str] = []
        self.backups: list[BackupInfo] = []
        self.choice: Choice | None = None
        self.chain: list[str] = []
        self.backup_digest: str | None = None
        self.turn: int | None = None
        self.moment: SourceMoment | None = None
        self.window: RecoveryWindow | None = None
        self.install: PgInstall | None = None
        self.reached: tuple[Lsn, datetime | None] | None = None
        self.because: str | None = None
        self._sandbox: Sandbox | None = None
        self.rto_seconds: float | None = None
        self.fetched = (0, 0.0)  # bytes, seconds
        self.replayed = (0, 0.0)

    # The whole

    def run(self) -> Scorecard:
        home: Path | None = None
        try:
            self.engine: BackupEngine = open_engine(self.access, self.target, clock=self.clock)
            self._backups()
            self._source()
            self._choose()
            self.install = need_postgres(
                self._chosen.backup.server_version // 10000, self.target.sandbox.postgres.values()
            )
            home = self._home()
            self._sandboxed(home)
        except UsageError as error:
            if self.at is not None or self.backup_id is not None:
                raise  # what was asked for does not exist: that is no verdict on anything
            self.record.broken_off(GateStatus.COULD_NOT_CHECK, error)
        except CorruptionError as error:
            self.record.broken_off(GateStatus.FAILED, error)
        except OpsError as error:
            self.record.broken_off(GateStatus.COULD_NOT_CHECK, error)
        finally:
            if home is not None:
                shutil.rmtree(home, ignore_errors=True)
        if home is not None and (sandbox := self._sandbox) is not None:
            self.record.check("teardown", "The sandbox is gone", *gates.gone(sandbox, home))
        return self._scorecard()

    # The source and the choice

    def _source(self) -> None:
        if self.alone:
            self.notes.append("nothing but the repository was used: nothing is compared with the source")
            return

        try:
            with self.steps.timed("canary"):
                if self.policy.canary:
                    self.moment = canary.take(self.access, self.target, self.id, self.clock)
                else:
                    self.moment = canary.observe(self.access, self.target, self.id, self.clock)
                    self.notes.append(
                        "no canary rows (verification.canary: false): nothing marks the moment, the proof is weaker"
                    )
        except UnreachableError as error:
            # The database is away: what stands in the store is still worth proving, and this is when it matters most.
            self.notes.append(f"the source could not be asked, so nothing is compared with it: {error}")

    def _backups(self) -> list[BackupInfo]:
        """Those that can be read. Raises CouldNotVerifyError where there are none."""
        found = self.engine.list()
        good = [b for b in found if b.error is None]
        self.notes += [f"{b.backup_id} cannot be read: {b.error}" for b in found if b.error]
        if not good:
            raise CouldNotVerifyError(
                f"there is no backup of {self.target.id} that can be read", remedy=f"ops backup run {self.target.id}"
            )
        return good

    def _choose(self) -> None:
        self.backups = self._backups()
        self.window = self.engine.window()
        self.choice = self._decide(self.backups, self.window)
        self._note_chosen(self.choice.backup)

    def _note_chosen(self, backup: BackupInfo) -> None:
        """Its chain, and its digest. Ours alone have them."""
        if self.engine.name != "native":
            return
        repository = open_target_repository(self.access, self.target)
        self.backup_digest = repository.manifest_digest(backup.backup_id)
        if backup.parent_id is not None:
            self.chain = [manifest.backup_id for manifest in repository.chain(backup.backup_id)]

    def _decide(self, backups: list[BackupInfo], window: RecoveryWindow) -> Choice:
        if self.backup_id is not None or self.at is not None:
            return self._asked(backups, window)
        if self.moment is None:
            return self._all_there_is(backups[-1], window)
        return self._by_policy(backups, window, self.moment)

    def _asked(self, backups: list[BackupInfo], window: RecoveryWindow) -> Choice:
        if self.backup_id is None and self.at is not None:
            recovery = RecoveryTarget("time", self.at)
            return Choice(self.engine.choose(recovery), recovery, self.at, "a moment that was asked for")
        found = [b for b in backups if b.backup_id == self.backup_id]
        if not found:
            raise UsageError(f"there is no backup {self.backup_id}", remedy=f"ops backup list {self.target.id}")
        if self.at is not None:
            return self._asked_both(found[0], RecoveryTarget("time", self.at), self.at)
        return self._soon_after(found[0], window, "asked for")

    def _asked_both(self, backup: BackupInfo, recovery: RecoveryTarget, moment: datetime) -> Choice:
        """A moment that this backup cannot reach is no verdict on it: it is refused before anything is restored."""
        until = self.engine.carried_until(backup, recovery)
        if until is None or not backup.ended_at <= moment <= until:
            reaches = "none: its own WAL is not whole" if until is None else span((backup.ended_at, until))
            raise UsageError(
                f"{moment.isoformat()} cannot be reached from {backup.backup_id}",
                where=self.target.id,
                remedy=f"moments that can be reached from it: {reaches}; without --backup the right one is chosen",
            )
        return Choice(backup, recovery, moment, "asked for")

    def _by_policy(self, backups: list[BackupInfo], window: RecoveryWindow, seen: SourceMoment) -> Choice:
        how = self.pick or self._turn()
        if how == "chain":
            chains = [b for b in backups if b.kind is BackupKind.INCREMENTAL]
            if chains:
                return self._to_now(chains[-1], window, "the newest incremental, with its chain")
            self.notes.append("there is no incremental backup: the newest one is restored instead of a chain")
        if how == "oldest" and len(backups) > 1:
            return self._soon_after(backups[0], window, "the oldest backup that is still promised")
        if how == "random" and window.pieces and seen.canary is not None:
            moment = _random_moment(window, self.id)
            recovery = RecoveryTarget("time", moment)
            return Choice(self.engine.choose(recovery), recovery, moment, "a moment by chance in the recovery window")
        return self._to_now(backups[-1], window, "the newest backup")

    def _turn(self) -> Pick:
        """The next of the policy's list; noted even where the proof fails, so that it does not come again and again."""
        self.turn = records.next_turn(records.repository_of(self.access, self.target))
        return self.policy.pick[self.turn % len(self.policy.pick)]

    def _to_now(self, backup: BackupInfo, window: RecoveryWindow, why: str) -> Choice:
        """That backup, to the moment at which the source was looked at."""
        moment = self.moment
        if moment is None or moment.at <= backup.ended_at:
            return self._soon_after(backup, window, why)
        if moment.recovery.kind == "lsn" and Lsn.parse(str(moment.recovery.value)) < backup.end:
            # Nothing was written since the backup: its own end is the newest moment that there is.
            return Choice(backup, RecoveryTarget("immediate"), moment.at, why, newest=True)
        return Choice(backup, moment.recovery, moment.at, why, newest=True)

    def _all_there_is(self, backup: BackupInfo, window: RecoveryWindow) -> Choice:
        """Without the source: as far as the archive reaches, which is what a recovery in earnest would do now."""
        until = window.latest or backup.ended_at
        why = "with nothing but the repository" if self.alone else "because the source is away"
        return Choice(backup, RecoveryTarget("latest"), until, f"the newest backup and all WAL, {why}")

    def _soon_after(self, backup: BackupInfo, window: RecoveryWindow, why: str) -> Choice:
        """A moment by chance in the hour after the backup's end; its very end where no more WAL is at hand."""
        piece = next((p for p in window.pieces if p[0] <= backup.ended_at <= p[1]), None)
        if piece is None:
            raise CorruptionError(
                f"the WAL that {backup.backup_id} needs is not whole",
                where=self.target.id,
                remedy=f"ops wal status {self.target.id} names what is missing; take a new backup",
            )
        end = min(piece[1], backup.ended_at + timedelta(hours=1))
        # In a piece that ends at a gap or long ago, nothing promises a commit after the moment, and PostgreSQL stops at one only then.
        last = piece == window.pieces[-1] and self.moment is not None and self.moment.canary is not None
        if not last or window.gaps:
            return Choice(backup, RecoveryTarget("immediate"), backup.ended_at, f"{why}, to its own end")
        moment = backup.ended_at + (end - backup.ended_at) * random.Random(self.id).uniform(0.3, 0.9)  # noqa: S311 - no secret
        return Choice(backup, RecoveryTarget("time", moment), moment, why)

    @property
    def _chosen(self) -> Choice:
        assert self.choice is not None  # noqa: S101 - chosen before anything uses it
        return self.choice

    # The sandbox

    def _home(self) -> Path:
        home = temporary_home(self.target, "verify")
        home.chmod(0o700)
        run_as().own(home)
        free, needed = shutil.disk_usage(home).free, needed_bytes(self.backups, self._chosen.backup)
        if free < needed * 1.1:
            shutil.rmtree(home)
            raise CouldNotVerifyError(
                f"the sandbox needs {needed * 1.1 / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
                where=str(home.parent),
                remedy="free space, or set sandbox.directory of the target",
            )
        return home

    def _sandboxed(self, home: Path) -> None:
        choice, install = self._chosen, self.install
        assert install is not None  # noqa: S101 - found before the sandbox is made
        data, work = home / "data", home / "work"
        with ExitStack() as stack:
            runner = self._expectations_begin(stack)
            began = time.monotonic()
            with self.steps.timed("fetch") as moved:
                moved.bytes = self._fetch(data, home)
            self._sandbox = sandbox = Sandbox(install, data, work, clock=self.clock)
            stack.callback(sandbox.stop, "immediate")
            # The check of the files is no part of a recovery in earnest: its time is not counted as RTO.
            paused = time.monotonic()
            with self.steps.timed("check files"):
                self._check_files(sandbox)
            aside = time.monotonic() - paused
            with self.steps.timed("replay") as moved:
                moved.bytes = self._replay(stack, sandbox, home)
            self._gates_at_target(sandbox)
            asked = gates.promotes(sandbox, choice.backup.timeline)
            with self.steps.timed("promote"):
                self.record.check("promotes", "It leaves recovery on a new timeline", *asked)
            self.rto_seconds = round(time.monotonic() - began - aside, 3)
            with self.steps.timed("checks"):
                self._look(sandbox, runner)

    def _fetch(self, data: Path, home: Path) -> int:
        choice = self._chosen
        spaces = sandbox_tablespaces(self.access, self.target, choice.recovery, home, choice.backup)
        base = self.engine.fetch_base(choice.backup, data, tablespaces=spaces, progress=self.progress)
        self.fetched = (base.raw, base.seconds)
        return base.raw

    def _check_files(self, sandbox: Sandbox) -> None:
        title = "Every file is as the server sent it"
        if self.engine.name == "pgbackrest":
            said = "there is no backup_manifest; pgBackRest compared the SHA-1 of each file with its own while it restored them"
            found = Finding(GateStatus.NOT_APPLICABLE, said)
            self.record.check("manifest", title, "pgbackrest restore", lambda: found)
            return
        spaces = len(list((sandbox.data / "pg_tblspc").glob("*")))
        self.record.check("manifest", title, *gates.manifest(sandbox, spaces))

    def _replay(self, stack: ExitStack, sandbox: Sandbox, home: Path) -> int:
        choice, began = self._chosen, time.monotonic()
        spool = home / "spool"
        spool.mkdir(mode=0o700)
        run_as().own(spool)
        fetcher = stack.enter_context(self.engine.wal_fetcher(choice.backup, spool))
        sandbox.prepare(choice.recovery, fetcher.restore_command)
        try:
            sandbox.start()
            sandbox.find_superuser(
                {self.target.connection.user or "postgres": self.target.connection.dbname, "postgres": "postgres"}
            )
            wait = sandbox.wait_ended if choice.recovery.kind == "latest" else sandbox.wait_paused
            self.reached = wait(
                timeout=REPLAY_TIMEOUT,
                progress=lambda lsn: self.progress("replay", max(0, lsn - choice.backup.start), None),
            )
        except OpsError as error:
            raise self._replay_error(sandbox, fetcher.failure, error) from error
        finally:
            self.notes += sandbox.notes
        self.because = sandbox.stopped_because()
        replayed = max(0, self.reached[0] - choice.backup.start)
        self.replayed = (replayed, time.monotonic() - began)
        return replayed

    def _replay_error(self, sandbox: Sandbox, failure: BaseException | None, error: OpsError) -> OpsError:
        """Whether the backup is to blame for a recovery that did not arrive, or only the circumstances. `failure`: the fetcher's."""
        if isinstance(error, CouldNotVerifyError):
            return error
        why = sandbox.why()
        if failure is None and (circumstance := sandbox.circumstance()) is not None:
            return CouldNotVerifyError(
                f"the recovery was kept from its work ({circumstance}): {why}", where=self.target.id
            )
        if failure is not None and not isinstance(failure, CorruptionError):
            return CouldNotVerifyError(f"the WAL could not be asked for: {why}", where=self.target.id)
        return CorruptionError(
            f"recovery did not reach {self._chosen.recovery}: {why}", where=self._chosen.backup.backup_id
        )

    # The gates

    def _gates_at_target(self, sandbox: Sandbox) -> None:
        choice = self._chosen
        assert self.reached is not None  # noqa: S101 - replay came here
        lsn, newest = self.reached
        if choice.recovery.kind == "latest":
            asked = gates.reached_end(lsn, newest, *self._archived())
            self.record.check("reached", "It replayed all that is archived", *asked)
        else:
            asked = gates.reached(sandbox, choice.recovery, lsn, newest)
            self.record.check("reached", "It stopped at the moment, still in recovery", *asked)
        dbname = self.target.connection.dbname
        if choice.newest and self.moment is not None and self.moment.canary is not None:
            self.record.check(
                "canary", "Row A is there, row B is not", *gates.canary_rows(sandbox, dbname, self.moment)
            )
        elif self.moment is not None and self.moment.canary is not None:
            history = self._canary_history()
            self.record.check(
                "canary",
                "Earlier canary rows are there, later ones are not",
                *gates.canary_history(sandbox, dbname, choice.moment, history),
            )

    def _archived(self) -> tuple[Lsn | None, int]:
        """How far the archive reaches on its newest timeline (None where another engine keeps it), and the bytes of a segment."""
        if self.target.repository.engine != "native":
            return None, 0
        archive = read_archive(open_target_repository(self.access, self.target))
        if archive is None or not archive.ranges:
            return None, 0
        return max((item.timeline, item.end) for item in archive.ranges)[1], archive.segment_size

    def _canary_history(self) -> dict[int, datetime]:
        from ops_platform.clients.postgres import asking

        with asking(self.access.postgres(self.target, role="primary"), self.target.id) as connection:
            return dict(connection.execute("select id, at from ops_canary.canary").fetchall())

    def _look(self, sandbox: Sandbox, runner: object) -> None:
        choice, check = self._chosen, self.record.check
        known = self.moment if choice.newest else None
        counted: dict[str, dict[str, int]] = {}
        check("prepared", "No prepared transaction is left hanging", *gates.prepared(sandbox, choice.moment))
        check("reads", "Every table reads to its end", *gates.read_tables(sandbox, counted))
        check(
            "row-counts",
            "Row counts are the source's",
            *gates.row_counts(known, counted, self.policy.row_count_tolerance),
        )
        check("schema", "The schema is the source's", *gates.schema(sandbox, known))
        check("sequences", "Sequences are ahead of their columns", *gates.sequences(sandbox))
        check("extensions", "Extensions and collations match", *gates.extensions(sandbox, known))
        check("amcheck", "Tables and indexes are sound", *gates.amcheck(sandbox, self._amcheck(), self.id))
        self._expectations(sandbox, runner)
        # Last, because it needs the server stopped.
        check("checksums", "Page checksums are right", *gates.checksums(sandbox))

    def _amcheck(self) -> str:
        if self.policy.amcheck == "off" or self.full or self.policy.amcheck == "full":
            return "full" if self.full and self.policy.amcheck != "off" else self.policy.amcheck
        repository = records.repository_of(self.access, self.target)
        recent = records.scorecards(repository, newest=60) if repository else []
        since = self.clock.now() - self.policy.full_every
        looked = [
            c
            for c in recent
            if c.ended_at > since
            and any(
                g.id == "amcheck" and g.status is GateStatus.PASSED and not g.detail.get("sampled", True)
                for g in c.gates
            )
        ]
        return "sample" if looked else "full"

    def _expectations_begin(self, stack: ExitStack) -> object:
        if self.policy.expectations is None:
            return None
        from ops_platform.recovery.expectations import SuiteRunner

        suite = self.access.path(self.policy.expectations.suite)
        return stack.enter_context(SuiteRunner(suite))

    def _expectations(self, sandbox: Sandbox, runner: object) -> None:
        from ops_platform.recovery.expectations_gate import gate

        title = "The data is as the owners expect it"
        if runner is None:
            self.record.check(
                "expectations",
                title,
                "",
                lambda: Finding(GateStatus.NOT_APPLICABLE, "the target names no expectation suite"),
            )
            return
        self.record.check(
            "expectations",
            title,
            *gate(runner, sandbox, self.target.connection.dbname, self._chosen.moment, self.data_docs),
        )

    # The scorecard

    def _scorecard(self) -> Scorecard:
        verdict, reason = verdict_of(self.record.gates)
        choice, window = self.choice, self.window
        isolation = (
            "its own network namespace"
            if network_namespace()
            else "no network namespace (the machine forbids it), a unix socket alone"
        )
        notes = [*self.notes, f"the sandbox ran in {isolation}"]
        return Scorecard(
            verification_id=self.id,
            target_id=self.target.id,
            environment=self.target.environment,
            classification=self.target.classification.value,
            engine=self.target.repository.engine,
            verdict=verdict,
            reason=reason,
            started_at=self.started_at,
            ended_at=self.clock.now(),
            backup_id=choice.backup.backup_id if choice else None,
            backup_kind=choice.backup.kind.value if choice else None,
            backup_ended_at=choice.backup.ended_at if choice else None,
            chain=self.chain,
            picked=choice.picked if choice else "nothing",
            turn=self.turn,
            recovery_target=str(choice.recovery) if choice else "none",
            reached=self.because,
            reached_lsn=str(self.reached[0]) if self.reached else None,
            newest_commit=self.reached[1] if self.reached else None,
            server=f"PostgreSQL {self.install.version} ({self.install.source})" if self.install else "none",
            strength="canary" if self.moment is not None and self.moment.canary is not None else "observed",
            objectives=self._objectives(),
            steps=self.steps.taken,
            gates=self.record.gates,
            notes=list(dict.fromkeys(notes)),
            backup_digest=self.backup_digest,
            window_earliest=window.earliest if window else None,
            window_latest=window.latest if window else None,
            written_by=f"ops_platform {__version__}",
        )

    def _objectives(self) -> list[Objective]:
        promised = self.target.objectives
        return [
            Objective.judged("rpo", promised.rpo, *self._rpo()),
            Objective.judged("rto", promised.rto, self.rto_seconds, "fetch, replay and promotion of this restore"),
            Objective.judged("rto-full", promised.rto, *self._rto_full()),
        ]

    def _rpo(self) -> tuple[float | None, str]:
        if self.moment is not None and self.moment.canary is not None:
            return round(
                self.moment.canary.durable_seconds, 3
            ), "from the commit of canary row B until the store held it"
        if self.window is None or self.window.latest is None:
            return None, "nothing can be restored"
        behind = max(0.0, (self.started_at - self.window.latest).total_seconds())
        return round(
            behind, 3
        ), f"now minus the newest moment that the archive holds whole ({self.window.latest:%Y-%m-%d %H:%M:%SZ})"

    def _rto_full(self) -> tuple[float | None, str]:
        """The worst moment of a day: this size at this rate, and all WAL that gathers between two backups at the replay's rate."""
        size, seconds = self.fetched
        wal, replay = self.replayed
        if self.choice is None or self.rto_seconds is None or size == 0:
            return None, "not measured: the restore did not come to its end"
        between = self._wal_between_backups()
        if between is None:
            return None, "not measured: too little WAL has been archived to know its rate"
        # What was replayed is taken out and the worst case is put in; a replay shorter than a segment says nothing of its rate.
        rate = wal / replay if wal >= 16 << 20 and replay > 0 else None
        if rate is None:
            return round(self.rto_seconds, 3), "this restore; too little WAL was replayed to know the rate for more"
        estimate = self.rto_seconds - replay + max(replay, between / rate)
        return (
            round(estimate, 3),
            f"fetch at {size / max(seconds, 1e-3) / 2**20:.0f} MiB/s, replay of {between / 2**20:.0f} MiB of WAL at {rate / 2**20:.0f} MiB/s",
        )

    def _wal_between_backups(self) -> float | None:
        """Bytes of WAL that gather in the greatest age that the policy allows a backup, by the rate of the last day.

        None where less than an hour is known: a few busy minutes say nothing of a day.
        """
        if self.choice is None or self.reached is None:
            return None
        lsn, moment = self.reached[0], self.choice.moment
        known = [b for b in self.backups if b.system_identifier == self.choice.backup.system_identifier]
        day = [b for b in known if timedelta(hours=1) <= moment - b.ended_at <= timedelta(days=1) and b.end < lsn]
        if not day:
            return None
        rate = (lsn - day[0].end) / (moment - day[0].ended_at).total_seconds()
        return rate * self.target.backup.max_age.total_seconds()


def _random_moment(window: RecoveryWindow, seed: str) -> datetime:
    """Uniform over the newest piece: after its moments there is a commit, the canary's, and PostgreSQL stops only before one."""
    begin, end = window.pieces[-1]
    return begin + (end - begin) * random.Random(seed).uniform(0.02, 0.98)  # noqa: S311 - a choice that can be repeated


def verify(
    access: Access,
    target: Target,
    *,
    pick: Pick | None = None,
    at: datetime | None = None,
    backup_id: str | None = None,
    full: bool = False,
    alone: bool = False,
    data_docs: Path | None = None,
    progress: Progress = no_progress,
    clock: Clock = SYSTEM_CLOCK,
) -> Scorecard:
    """Prove a target's backups: what the policy picks, or a backup or a moment that is asked for. `full`: everything is looked at.

    `alone`: as on the day on which the database is gone, and with it what the proof is compared with.

    Never raises for what is wrong with the backup, the store, the keys or the source: that is the verdict. Raises UsageError for a moment
    or a backup that does not exist. A scorecard that cannot be stored makes COULD_NOT_VERIFY: a proof that nobody can read later is none.
    """
    running = Verification(
        access, target, pick=pick, at=at, backup_id=backup_id, full=full, alone=alone, data_docs=data_docs,
        progress=progress, clock=clock,
    )  # fmt: skip
    return stored(access, target, running.run())


def stored(access: Access, target: Backed, card: Scorecard) -> Scorecard:
    """The scorecard, kept in the target's repository; one that could not be kept says so, and proves nothing."""
    try:
        repository = records.repository_of(access, target)
        if repository is not None:
            records.keep(repository, card)
    except OpsError as error:
        return _not_stored(card, error)
    return card


def _not_stored(card: Scorecard, error: OpsError) -> Scorecard:
    gate = Gate(
        id="record", title="The scorecard is stored", status=GateStatus.COULD_NOT_CHECK, query="", result=error.line, seconds=0
    )  # fmt: skip
    found = [*card.gates, gate]
    verdict, reason = verdict_of(found)
    return card.model_copy(update={"gates": found, "verdict": verdict, "reason": reason})
