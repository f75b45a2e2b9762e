"""The verification of one target: restore into a sandbox to a moment, look at the data, say what was found.

Three verdicts. One failed gate makes FAIL; one gate that could not be checked makes COULD_NOT_VERIFY, which is never shown as a
pass. The scorecard is stored whatever the verdict, and the sandbox goes whatever happens; that it went is the last gate.
"""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ops_platform import __version__
from ops_platform.backup.archive import read_archive
from ops_platform.backup.engine import open_engine
from ops_platform.backup.model import BackupEngine, BackupInfo, Lsn, Progress, RecoveryWindow, no_progress
from ops_platform.backup.opening import open_target_repository
from ops_platform.clients.postgres_binaries import PgInstall, need_postgres, run_as
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import CorruptionError, CouldNotVerifyError, OpsError, UnreachableError, UsageError
from ops_platform.recovery import canary, gates, records
from ops_platform.recovery.canary import SourceMoment
from ops_platform.recovery.choosing import Choice, Choosing, Pick
from ops_platform.recovery.findings import Finding, Record
from ops_platform.recovery.model import GateStatus, Objective, Scorecard
from ops_platform.recovery.replay import replay
from ops_platform.recovery.restore import needed_bytes, sandbox_tablespaces
from ops_platform.recovery.room import lacking, reserved
from ops_platform.recovery.sandbox import Sandbox, network_namespace, take_away, temporary_home
from ops_platform.recovery.steps import Steps
from ops_platform.recovery.verdict import NOT_RESTORED, stored, verdict_of

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory import Target


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
        self.pick: Pick | None = pick
        self.at, self.backup_id, self.full, self.data_docs = at, backup_id, full, data_docs
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
        self.choosing: Choosing | None = None
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
                take_away(home)
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
        self.choosing = Choosing(
            self.access, self.target, self.engine, self.id, self.moment,
            pick=self.pick, at=self.at, backup_id=self.backup_id, alone=self.alone, notes=self.notes,
        )  # fmt: skip
        self.choice = self.choosing.decide(self.backups, self.window)
        self._note_chosen(self.choice.backup)

    def _note_chosen(self, backup: BackupInfo) -> None:
        """Its chain, and its digest. Ours alone have them."""
        if self.engine.name != "native":
            return
        repository = open_target_repository(self.access, self.target)
        self.backup_digest = repository.manifest_digest(backup.backup_id)
        if backup.parent_id is not None:
            self.chain = [manifest.backup_id for manifest in repository.chain(backup.backup_id)]

    @property
    def _chosen(self) -> Choice:
        assert self.choice is not None  # noqa: S101 - chosen before anything uses it
        return self.choice

    # The sandbox

    def _home(self) -> Path:
        home = temporary_home(self.target, "verify")
        home.chmod(0o700)
        run_as().own(home)
        if problem := lacking(home, self._room):
            shutil.rmtree(home)
            raise CouldNotVerifyError(
                f"no room for the sandbox: {problem}",
                where=str(home.parent),
                remedy="free space, or set sandbox.directory of the target",
            )
        return home

    @property
    def _room(self) -> float:
        return needed_bytes(self.backups, self._chosen.backup) * 1.1

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
        with reserved([home], self._room):
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
        last_segment = self.engine.last_segment(choice.backup, choice.recovery)
        sandbox.prepare(choice.recovery, fetcher.restore_command)
        try:
            self.reached = replay(
                sandbox, choice.recovery, self.target, last_segment=last_segment,
                progress=lambda lsn: self.progress("replay", max(0, lsn - choice.backup.start), None),
            )  # fmt: skip
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
            turn=self.choosing.turn if self.choosing else None,
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
        served = "fetch, replay and promotion of this restore" if self.rto_seconds is not None else NOT_RESTORED
        return [
            Objective.judged("rpo", promised.rpo, *self._rpo()),
            Objective.judged("rto", promised.rto, self.rto_seconds, served),
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
            return None, NOT_RESTORED
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
