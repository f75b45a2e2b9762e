"""What the reports say, read back from the pages and the terminal: nothing left out, nothing made better than it is."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import BaseModel
from rich.cells import cell_len
from rich.console import Console

from ops_platform.backup.model import BackupInfo, BackupKind, Lsn, Proof, RecoveryWindow, WalGap
from ops_platform.counting import duration, no_room, size
from ops_platform.errors import OpsError, UsageError
from ops_platform.inventory.evidence import Control
from ops_platform.inventory.model import Target
from ops_platform.ledger import Entry
from ops_platform.ledger.checkpoint import Checkpoint
from ops_platform.ledger.dsse import Envelope
from ops_platform.ledger.pack import Cover, Key
from ops_platform.recovery.model import Gate, GateStatus, Objective, Scorecard, Step, Verdict
from ops_platform.reports.chains import listed
from ops_platform.reports.charts import coverage, gantt, history_plot
from ops_platform.reports.drills import drill_report, drills_report
from ops_platform.reports.evidence import evidence_cover
from ops_platform.reports.html import Row, index_report, page_name, target_report, write_report
from ops_platform.reports.pictures import LOOKED_BACK, as_markdown, history_picture, proof_picture
from ops_platform.reports.progress import progress_bar
from ops_platform.reports.standing import Standing, proven_moment, standing, story
from ops_platform.reports.terminal import backups_table, print_scorecard, window_lines
from ops_platform.reports.words import moment, plain
from tests.unit.test_drills import a_card

NOW = datetime(2026, 1, 15, 8, 30, 2, tzinfo=UTC)

# Samples: what a believable night looks like, and what goes wrong.

GATES = [
    ("backup-manifest", "Files match the backup's own manifest", "pg_verifybackup --no-parse-wal /sandbox/data",
     "backup successfully verified (1,284 files)", 1.02),
    ("reached", "Recovery stopped at the moment asked for", "SELECT pg_is_in_recovery(), pg_get_wal_replay_pause_state()",
     "in recovery, paused at 2026-01-15 05:30:00.412 UTC", 0.004),
    ("canary", "The row before the moment is there, the row after it is not",
     "SELECT id, written_at\nFROM ops_canary.beat\nWHERE id IN ('a41f…', 'b07c…')\nORDER BY written_at",
     "a41f… is there, b07c… is not", 0.011),
    ("promotes", "The server promotes to a new timeline", "SELECT pg_promote(wait => true)", "timeline 2", 0.62),
    ("prepared", "No prepared transaction was left hanging", "SELECT count(*) FROM pg_prepared_xacts", "0", 0.003),
    ("checksums", "Every page's checksum is right", "pg_checksums --check -D /sandbox/data",
     "402,113 blocks in 1,204 files, 0 bad", 1.1),
    ("amcheck", "Tables and indexes are sound inside",
     "pg_amcheck --heapallindexed --no-dependent-toast --exclude-schema=pg_catalog shop", "sample of 41 relations, no finding", 3.4),
    ("reads", "Every table reads to its end", "COPY (SELECT * FROM …) TO '/dev/null'", "64 tables, 12,804,112 rows", 1.7),
    ("schema", "The schema is the one of that moment", "SELECT fingerprint FROM ops_canary.schema_at(…)",
     "sha256 7f0c…e9 on both sides", 0.21),
    ("row-counts", "Row counts are within 2 % of the source's", "SELECT relname, n_live_tup FROM pg_stat_user_tables",
     "largest deviation 0.4 % (orders)", 0.09),
    ("sequences", "Sequences stand ahead of their columns",
     "SELECT max(id) <= last_value FROM orders, orders_id_seq", "18 of 18 sequences", 0.06),
    ("extensions", "Extensions are the source's, in version too", "SELECT extname, extversion FROM pg_extension",
     "pgcrypto 1.3, pg_trgm 1.6, plpgsql 1.0", 0.005),
    ("collations", "Collation versions match the sandbox's libraries",
     "SELECT collname FROM pg_collation WHERE collversion <> pg_collation_actual_version(oid)", "none differs", 0.007),
    ("expectations", "The shop's own expectations hold", "Great Expectations suite expectations/app-db.yaml",
     "23 of 23 expectations hold", 2.9),
    ("teardown", "Nothing is left of the sandbox", "ls /sandbox; ps --no-headers -u ops-sandbox; SELECT slot_name FROM pg_replication_slots",
     "no process, no directory, no slot", 0.08),
]  # fmt: skip

STEPS = [
    Step(name="canary", started=0.0, seconds=6.2),
    Step(name="fetch", started=6.2, seconds=64.0, bytes=3_170_000_000),
    Step(name="fetch WAL ahead", started=20.0, seconds=98.5, bytes=1_073_741_824),
    Step(name="replay", started=70.4, seconds=151.8),
    Step(name="promote", started=222.2, seconds=0.7),
    Step(name="checks", started=222.9, seconds=29.4),
    Step(name="tear down", started=252.3, seconds=1.1),
]


def make_target(**changes: Any) -> Target:
    return Target.model_validate(
        {
            "id": "app-db",
            "description": "The shop: customers, orders, payments.",
            "environment": "production",
            "owner": "shop-team",
            "classification": "confidential",
            "objectives": {},
            "connection": {"hosts": [{"host": "db1.example.com"}], "user": "ops_backup"},
            "repository": {"store": "s3", "keys": "vault"},
            "backup": {"schedule": {"cron": "15 2 * * *"}},
        }
        | changes
    )


def make_gate(number: int, status: GateStatus = GateStatus.PASSED, **changes: Any) -> Gate:
    name, title, query, result, seconds = GATES[number]
    fields = {"id": name, "title": title, "query": query, "result": result, "seconds": seconds, "status": status}
    return Gate.model_validate(fields | changes)


def make_gates() -> list[Gate]:
    return [make_gate(n) for n in range(len(GATES))]


def make_objectives(rpo: float | None = 1.8, rto: float | None = 222.9, full: float | None = 1420.0) -> list[Objective]:
    def one(name: str, promised: float, value: float | None, how: str) -> Objective:
        met = None if value is None else value <= promised
        return Objective(name=name, objective_seconds=promised, measured_seconds=value, met=met, how=how)

    return [
        one("rpo", 3600, rpo, "from the commit of canary row B until the store held it"),
        one("rto", 14400, rto, "fetch, replay and promotion of this restore"),
        one("rto-full", 14400, full, "fetch at 102 MiB/s, replay of 2,310 MiB of WAL at 14 MiB/s"),
    ]


def make_card(**changes: Any) -> Scorecard:
    ended = changes.pop("ended_at", datetime(2026, 1, 15, 5, 36, 21, tzinfo=UTC))
    fields: dict[str, Any] = {
        "verification_id": f"{ended:%Y%m%dT%H%M%SZ}-V-5c0ffee5",
        "target_id": "app-db",
        "environment": "production",
        "classification": "confidential",
        "engine": "native",
        "verdict": Verdict.PASS,
        "reason": "all 15 checks passed",
        "started_at": ended - timedelta(seconds=253.4),
        "ended_at": ended,
        "backup_id": "20260115T021500Z-I-0d15ea5e",
        "backup_kind": "incremental",
        "backup_ended_at": datetime(2026, 1, 15, 2, 17, 44, tzinfo=UTC),
        "chain": ["20260112T021500Z-F-1a2b3c4d", "20260113T021500Z-I-2b3c4d5e", "20260115T021500Z-I-0d15ea5e"],
        "picked": "newest",
        "recovery_target": f"time {(ended - timedelta(seconds=381)).isoformat()}",
        "reached": f"{ended - timedelta(seconds=381):%Y-%m-%d %H:%M:%S.412} UTC",
        "reached_lsn": "2A/7F00C1D8",
        "newest_commit": ended - timedelta(seconds=382),
        "server": "PostgreSQL 17.7 at /usr/lib/postgresql/17/bin",
        "strength": "canary",
        "objectives": make_objectives(),
        "steps": STEPS,
        "gates": make_gates(),
        "notes": ["pg_cron was taken out of shared_preload_libraries: the sandbox does not have it."],
        "backup_digest": "sha256:9f2c4e1ab7d05c3386e21f9a0b4c7d8e5f60718293a4b5c6d7e8f90a1b2c3d4e",
        "window_earliest": datetime(2026, 1, 1, 2, 19, 3, tzinfo=UTC),
        "window_latest": datetime(2026, 1, 15, 5, 30, 1, tzinfo=UTC),
        "written_by": "ops_platform 0.1.0",
    }
    return Scorecard.model_validate(fields | changes)


def make_failed(**changes: Any) -> Scorecard:
    gates = make_gates()
    gates[5] = make_gate(
        5,
        GateStatus.FAILED,
        result="2 of 402,113 blocks are bad: base/16402/24601 block 118, base/16402/24601 block 119",
        detail={"blocks": 402113, "bad": 2, "files": ["base/16402/24601"], "relation": "public.orders"},
    )
    gates[13] = make_gate(
        13, GateStatus.NOT_APPLICABLE, query="", result="turned off: no suite is declared for this target", seconds=0
    )
    return make_card(
        **{
            "verdict": Verdict.FAIL,
            "reason": "page checksums: 2 blocks of public.orders are bad",
            "gates": gates,
            "objectives": make_objectives(rto=16250, full=88000),
        }
        | changes
    )


def make_unverified(**changes: Any) -> Scorecard:
    gates = [
        make_gate(0),
        make_gate(
            1,
            GateStatus.COULD_NOT_CHECK,
            result="no PostgreSQL 18 is installed here; install postgresql-18 or set sandbox.postgres",
        ),
    ]
    return make_card(
        **{
            "verdict": Verdict.COULD_NOT_VERIFY,
            "reason": "no server of major 18 was found to restore into",
            "gates": gates,
            "steps": STEPS[:2],
            "objectives": make_objectives(rto=None, full=None),
            "reached": None,
            "reached_lsn": None,
            "newest_commit": None,
            "strength": "observed",
        }
        | changes
    )


def make_history(days: int = 20) -> list[Scorecard]:
    """A night each, with a missed objective, a failure and one that could not be verified among them."""
    cards: list[Scorecard] = []
    for n in range(days):
        ended = datetime(2026, 1, 14, 5, 36, 21, tzinfo=UTC) - timedelta(days=days - 1 - n, minutes=n * 7 % 23)
        if n == 6:
            cards.append(make_unverified(ended_at=ended))
        elif n == 11:
            cards.append(make_failed(ended_at=ended))
        else:
            rpo, rto = 1.2 + n * 37 % 11 * 0.4, 190 + n * 53 % 90
            cards.append(make_card(ended_at=ended, objectives=make_objectives(5400 if n == 3 else rpo, rto)))
    return cards


def make_backups(days: int = 14) -> list[BackupInfo]:
    """A full one each week, incrementals on top, the last of them proven."""
    infos: list[BackupInfo] = []
    for n in range(days + 1):
        full = n % 7 == 0
        began = datetime(2026, 1, 1, 2, 15, tzinfo=UTC) + timedelta(days=n)
        ended = began + (timedelta(minutes=4, seconds=3) if full else timedelta(seconds=44 + n))
        backup_id = f"{began:%Y%m%dT%H%M%SZ}-{'F' if full else 'I'}-{0x1A2B3C4D + n * 0x01010101:08x}"
        infos.append(
            BackupInfo(
                backup_id=backup_id,
                target_id="app-db",
                engine="native",
                kind=BackupKind.FULL if full else BackupKind.INCREMENTAL,
                parent_id=None if full else infos[-1].backup_id,
                started_at=began,
                ended_at=ended,
                timeline=1,
                start=Lsn(0x2A00000000 + n * 0x10000000),
                end=Lsn(0x2A00010000 + n * 0x10000000),
                server_version=170007,
                system_identifier=7461234567890123456,
                raw=44_238_000_000 if full else 1_900_000_000 + n * 90_000_000,
                stored=13_100_000_000 if full else 610_000_000 + n * 20_000_000,
                proof=make_proof(backup_id, began, "FAIL" if n == 5 else "PASS") if n in (0, 5, 7, 13) else None,
            )
        )
    return infos


def make_proof(backup_id: str, began: datetime, verdict: str) -> Proof:
    verified = began + timedelta(hours=3, minutes=21)
    fields = {"target_id": "app-db", "backup_id": backup_id, "verdict": verdict, "verified_at": verified}
    more = {"recovery_target": "latest", "proven_until": verified, "rpo_seconds": 1.8, "rto_seconds": 222.9}
    return Proof.model_validate(fields | more | {"scorecard": f"app-db/proof/{backup_id}.json"})


EARLIEST, LATEST = datetime(2026, 1, 1, 2, 19, 3, tzinfo=UTC), datetime(2026, 1, 15, 8, 30, tzinfo=UTC)
WINDOW = RecoveryWindow(EARLIEST, LATEST, [(EARLIEST, LATEST)], [])
HOLE = (datetime(2026, 1, 9, 14, 2, tzinfo=UTC), datetime(2026, 1, 10, 2, 16, 7, tzinfo=UTC))
TORN = RecoveryWindow(
    EARLIEST,
    LATEST,
    [(EARLIEST, HOLE[0]), (HOLE[1], LATEST)],
    [WalGap(1, "000000010000002A0000004C", "000000010000002A00000051", "20260110T021500Z-I-23344556")],
)
EMPTY = RecoveryWindow(None, None, [], [])


def page(
    latest: Scorecard | None,
    history: list[Scorecard] | None = None,
    window: RecoveryWindow | None = WINDOW,
    backups: list[BackupInfo] | None = None,
    target: Target | None = None,
) -> Page:
    found = make_backups() if backups is None else backups
    return read(target_report(target or make_target(), latest, history or [], window, found, generated_at=NOW))


VOID = {"meta", "link", "br", "rect", "line", "path", "circle"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return one_line(self.raw)

    @property
    def raw(self) -> str:
        return "".join(child if isinstance(child, str) else child.raw for child in self.children)

    def all(self, tag: str | None = None, **attributes: str) -> list[Element]:
        """Every element below, in the order of the page."""
        found: list[Element] = []
        for child in self.children:
            if isinstance(child, Element):
                wanted = attributes.items() <= {k: v for k, v in child.attributes.items() if v is not None}.items()
                found += ([child] if tag in (None, child.tag) and wanted else []) + child.all(tag, **attributes)
        return found

    def one(self, tag: str | None = None, **attributes: str) -> Element:
        (found,) = self.all(tag, **attributes)
        return found

    def classes(self) -> set[str]:
        return set((self.attributes.get("class") or "").split())


@dataclass
class Page(Element):
    source: str = ""


class Reader(HTMLParser):
    """Builds the tree, and refuses what a browser would silently repair."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Page("", {})
        self.open: list[Element] = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in <{tag}>: {attrs}"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(html: str) -> Page:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == [reader.root], f"never closed: {[element.tag for element in reader.open[1:]]}"
    reader.root.source = html
    return reader.root


def one_line(text: str) -> str:
    return " ".join(text.split())


# The words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.0041, "4 ms"), (0.9996, "1 s"), (1.84, "1.8 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min"),
        (252, "4 min 12 s"), (240, "4 min"), (3599.6, "1 h"), (11100, "3 h 5 min"), (86399, "24 h"), (88000, "24 h 27 min"),
        (172800, "2 d"), (1231200, "14 d 6 h"),
        (-90, "-1 min 30 s"), (timedelta(hours=4), "4 h"),
    ],
)  # fmt: skip
def test_a_duration_is_written_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (512, "512 B"), (1000, "1.0 KiB"), (1 << 20, "1.0 MiB"), (245 << 20, "245 MiB"), (3_328_599_654, "3.1 GiB"),
     (1023.6 * 2**20, "1.0 GiB"), (1 << 60, "1024 PiB")],
)  # fmt: skip
def test_a_size_has_three_digits_and_a_binary_unit(count: float, text: str) -> None:
    assert size(count) == text


def test_what_lacks_is_told_apart_from_what_is_there_on_a_small_disk_too() -> None:
    assert no_room(40 << 20, 30 << 20) == "40.0 MiB are needed and 30.0 MiB are free: 10.0 MiB too few"
    assert no_room((5 << 30) + 1, 5 << 30) == "5.0 GiB are needed and 5.0 GiB are free: 1 B too few"
    assert no_room(5, 5) is None


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="no zone"):
        moment(datetime(2026, 1, 1))  # noqa: DTZ001
    with pytest.raises(ValueError, match="no zone"):
        page(make_card(newest_commit=datetime(2026, 1, 1), recovery_target="latest"))  # noqa: DTZ001


def test_times_of_other_zones_are_shown_in_utc() -> None:
    from zoneinfo import ZoneInfo

    assert moment(datetime(2026, 7, 1, 2, 0, tzinfo=ZoneInfo("Europe/Berlin"))) == "2026-07-01 00:00:00 UTC"


# Where a target stands

STANDINGS: list[tuple[str, Scorecard | None, RecoveryWindow | None, Standing]] = [
    ("fresh", make_card(), WINDOW, Standing.PROVEN),
    ("window unknown", make_card(), None, Standing.PROVEN),
    ("failed", make_failed(), WINDOW, Standing.FAILED),
    ("unverified", make_unverified(), WINDOW, Standing.UNKNOWN),
    ("never", None, WINDOW, Standing.NEVER),
    ("old", make_card(ended_at=NOW - timedelta(days=2, seconds=1)), WINDOW, Standing.STALE),
    ("from the future", make_card(ended_at=NOW + timedelta(hours=1)), WINDOW, Standing.STALE),
    ("a clock that is a little off", make_card(ended_at=NOW + timedelta(minutes=1)), WINDOW, Standing.PROVEN),
    ("nothing left", make_card(), EMPTY, Standing.LOST),
    ("nothing at all", None, EMPTY, Standing.LOST),
    ("PASS over a failed gate", make_card(gates=[make_gate(0), make_gate(1, GateStatus.FAILED)]), WINDOW, Standing.UNKNOWN),
    ("PASS over a gate that was not made", make_card(gates=[make_gate(0, GateStatus.COULD_NOT_CHECK)]), WINDOW, Standing.UNKNOWN),
    ("PASS without a gate", make_card(gates=[]), WINDOW, Standing.UNKNOWN),
    ("PASS, nothing applied", make_card(gates=[make_gate(0, GateStatus.NOT_APPLICABLE)]), WINDOW, Standing.UNKNOWN),
]  # fmt: skip
standings = pytest.mark.parametrize(
    ("latest", "window", "expected"), [case[1:] for case in STANDINGS], ids=[case[0] for case in STANDINGS]
)


@standings
def test_only_a_fresh_pass_that_its_gates_bear_out_is_a_pass(
    latest: Scorecard | None, window: RecoveryWindow | None, expected: Standing
) -> None:
    assert standing(latest, window, timedelta(days=2), NOW) is expected


@standings
def test_the_page_never_shows_another_standing_as_a_pass(
    latest: Scorecard | None, window: RecoveryWindow | None, expected: Standing
) -> None:
    shown = page(latest, window=window)
    stamp = shown.one("h2", id="verdict")
    assert stamp.text == expected.value
    assert shown.one("head").one("title").text == f"app-db: {expected.value} – recovery report"
    tone = next(section for section in shown.all("section") if "verdict" in section.classes()).classes()
    assert ("tone-good" in tone) == (expected is Standing.PROVEN)
    assert ("PASS" in stamp.text) == (expected is Standing.PROVEN)
    claims = "can be restored to any moment" in shown.one("main").text
    assert claims == (expected is Standing.PROVEN and window is not None)


def test_the_first_sentence_is_the_news() -> None:
    said = story("app-db", make_card(), [], WINDOW, timedelta(days=2), NOW)
    assert said == [
        "app-db can be restored to any moment from 1 Jan 2026, 02:19 UTC to 15 Jan 2026, 08:30 UTC.",
        "The last proof, of 15 Jan 2026, 05:36 UTC (2 h 54 min old when this page was written), restored it to "
        "15 Jan 2026, 05:30:00 UTC in 3 min 43 s and found nothing wrong in 15 checks.",
    ]
    (fresh,) = story("app-db", make_card(ended_at=NOW), [], WINDOW, timedelta(days=2), NOW)[1:]
    assert "(just before this page was written)" in fresh
    failed = story("app-db", make_failed(), make_history(), WINDOW, timedelta(days=2), NOW)
    assert failed[0].endswith("failed in 1 of 15 checks.")
    assert failed[1].startswith("The last good proof is of 14 Jan 2026")
    assert "the time to restore is 4 h 31 min where 4 h at most were promised" in failed[2]
    unverified = story("app-db", make_unverified(), [], WINDOW, timedelta(days=2), NOW)
    assert "could not come to a verdict: 1 of 2 checks could not be made." in unverified[0]
    assert "No earlier proof is on record." in unverified


def test_without_gates_the_reason_of_the_record_is_told() -> None:
    for make in (make_failed, make_unverified):
        said = story(
            "app-db", make(gates=[], reason="the restore stopped: no space left"), [], WINDOW, timedelta(days=2), NOW
        )
        assert said[0].endswith(": the restore stopped: no space left.")


def test_a_window_of_minutes_is_told_to_the_second() -> None:
    begin = LATEST - timedelta(minutes=3)
    said = story(
        "app-db", make_card(), [], RecoveryWindow(begin, LATEST, [(begin, LATEST)], []), timedelta(days=2), NOW
    )
    assert "from 15 Jan 2026, 08:27:00 UTC to 15 Jan 2026, 08:30:00 UTC" in said[0]


def test_a_gap_in_the_window_is_part_of_the_claim() -> None:
    said = story("app-db", make_card(), [], TORN, timedelta(days=2), NOW)
    assert said[0].endswith(", except for 1 gap of 12 h 14 min.")


def test_a_later_pass_is_not_the_last_good_proof_of_an_earlier_failure() -> None:
    later = make_card(ended_at=NOW + timedelta(minutes=1))
    assert "No earlier proof is on record." in story("app-db", make_failed(), [later], WINDOW, timedelta(days=2), NOW)


@pytest.mark.parametrize(
    "text",
    ["time 2026-01-15T05:30:00+00:00", "time 2026-01-15T06:30:00.000000+01:00", "2026-01-15 05:30:00 UTC", "2026-01-15T05:30:00Z"],
)  # fmt: skip
def test_the_proven_moment_is_read_from_the_recovery_target(text: str) -> None:
    assert proven_moment(make_card(recovery_target=text)) == datetime(2026, 1, 15, 5, 30, tzinfo=UTC)


def test_without_a_time_the_proven_moment_is_the_newest_commit() -> None:
    card = make_card(recovery_target="lsn 2A/7F00C1D8")
    assert proven_moment(card) == card.newest_commit
    assert proven_moment(make_unverified(recovery_target="none")) is None


# The page of a target


@pytest.mark.parametrize("card", [make_card(), make_failed(), make_unverified()], ids=lambda card: card.verdict)
def test_every_gate_is_on_the_page_with_its_query_and_its_result(card: Scorecard) -> None:
    shown = page(card, make_history())
    gates = [each for each in shown.all("details") if "gate" in each.classes()]
    assert [each.attributes["id"] for each in gates] == [f"gate-{gate.id}" for gate in card.gates]
    words = {
        "passed": "Passed",
        "failed": "Failed",
        "could_not_check": "Could not check",
        "not_applicable": "Not applicable",
    }
    for gate, element in zip(card.gates, gates, strict=True):
        for text in (gate.id, gate.title, gate.query, gate.result, words[gate.status], duration(gate.seconds)):
            assert one_line(text) in element.text
        assert ("open" in element.attributes) == (gate.status in (GateStatus.FAILED, GateStatus.COULD_NOT_CHECK))


def test_what_failed_is_linked_at_the_top() -> None:
    shown = page(make_failed())
    trouble = next(each for each in shown.all("ul") if "troubles" in each.classes())
    assert [link.attributes["href"] for link in trouble.all("a")] == ["#gate-checksums"]
    assert "2 of 402,113 blocks are bad" in trouble.text
    assert not any("troubles" in each.classes() for each in page(make_card()).all("ul"))


def test_the_detail_of_a_gate_is_shown_and_its_data_docs_are_linked() -> None:
    detail = {
        "expectations": [{"title": "newest order"}, {"title": "no negative amount"}],
        "data_docs": "/srv/reports/app-db/data-docs/index.html",
    }
    gate = page(make_card(gates=[make_gate(13, detail=detail)])).one("details", id="gate-expectations")
    assert "newest order" in gate.text
    assert "no negative amount" in gate.text
    assert [link.attributes["href"] for link in gate.all("a")] == ["app-db/data-docs/index.html"]


def test_the_three_figures_stand_beside_their_promise() -> None:
    figures = [e for e in page(make_failed()).all("div") if "figure" in e.classes()]
    texts = [figure.text for figure in figures]
    assert "1.8 s promised: 1 h at most kept" in texts[0]
    assert "4 h 31 min promised: 4 h at most missed" in texts[1]
    assert "24 h 27 min promised: 4 h at most missed" in texts[2]
    assert ["tone-good" in figure.classes() for figure in figures] == [True, False, False]


def test_what_was_not_measured_is_not_kept() -> None:
    texts = [e.text for e in page(make_unverified()).all("div") if "figure" in e.classes()]
    assert "not measured promised: 4 h at most not judged" in texts[1]
    never = [e.text for e in page(None).all("div") if "figure" in e.classes()]
    assert all("not measured" in text and "kept" not in text for text in never)


def test_the_timeline_has_every_step_with_its_time_and_bytes() -> None:
    rows = [item.text for item in page(make_card()).one("section", **{"aria-labelledby": "timeline"}).all("li")]
    assert rows[1].startswith("Fetch 1 min 4 s 3.0 GiB, 47.2 MiB/s")
    assert [row.split()[0] for row in rows[:-1]] == ["Canary", "Fetch", "Fetch", "Replay", "Promote", "Checks", "Tear"]
    chart = gantt(STEPS)
    assert chart.bars[3].longest
    assert chart.bars[-1].left + chart.bars[-1].width == pytest.approx(100)
    assert gantt([]).bars == []
    assert gantt([Step(name="none", started=0, seconds=0)]).bars[0].width == 0


def test_the_history_marks_each_verification_with_its_verdict() -> None:
    history = make_history()
    section = page(make_failed(), history).one("section", **{"aria-labelledby": "history"})
    plots = section.all("figure")
    for plot in plots:
        marks = [e for e in plot.all("svg") if "mark" in e.classes()]
        assert len(marks) == len(history) + 1
        assert sum("tone-bad" in mark.classes() for mark in marks) == 2
        assert sum("tone-warn" in mark.classes() for mark in marks) == 1
    assert "not measured, COULD NOT VERIFY" in plots[1].text
    assert [len(plot.all("line", **{"class": "curve"})) for plot in plots] == [20, 18]
    assert len(section.one("table").all("tr")) == 1 + 21


def test_the_objective_line_lies_between_what_kept_and_what_missed_it() -> None:
    plot = history_plot(make_history(), "rpo", 3600, lane=False)
    over = [mark for mark in plot.marks if mark.y < plot.objective.y]
    assert [mark.title.split(": ")[1] for mark in over] == ["1 h 30 min, PASS"]


def test_a_zero_and_a_thousand_days_fit_one_plot() -> None:
    cards = [
        make_card(ended_at=NOW - timedelta(days=n), objectives=make_objectives(rpo, rpo))
        for n, rpo in enumerate((0.0, 1e8))
    ]
    plot = history_plot(cards, "rpo", 3600, lane=True)
    assert all(0 <= mark.y <= plot.floor and 0 <= mark.x <= 100 for mark in plot.marks)


def test_an_axis_over_the_turn_of_a_year_says_which_year_it_is() -> None:
    labels = [tick.label for tick in history_plot(make_history(40), "rpo", 3600, lane=True).ticks]
    assert [label[-5:] for label in labels if re.search(r" \d{4}$", label)] == [" 2025", " 2026"]
    within = [tick.label for tick in history_plot(make_history(9), "rpo", 3600, lane=True).ticks]
    assert not any("2026" in label for label in within)


def test_a_verification_is_counted_once_though_it_is_the_latest_too() -> None:
    card = make_card()
    assert page(card, [card, *make_history(3)]).source.count("<tr") == page(card, make_history(3)).source.count("<tr")


def test_an_empty_history_is_said_and_not_drawn() -> None:
    section = page(make_card(), []).one("section", **{"aria-labelledby": "history"})
    assert "This is the first verification on record" in section.text
    assert not section.all("figure")
    never = page(None, [], EMPTY, [])
    assert "No verification is on record" in never.one("section", **{"aria-labelledby": "history"}).text
    assert not never.all("section", **{"aria-labelledby": "identifiers"})


def test_the_coverage_shows_backups_gaps_and_proven_moments() -> None:
    section = page(make_failed(), make_history(), TORN).one("section", **{"aria-labelledby": "coverage"})
    strip = next(e for e in section.all("svg") if "strip" in e.classes())
    assert len([e for e in strip.all("line") if "backup" in e.classes()]) == 15
    assert len([e for e in strip.all("line") if "full" in e.classes()]) == 3
    assert len(strip.all("rect", **{"class": "covered"})) == 2
    assert "gap, cannot be restored: 2026-01-09 14:02:00 UTC to 2026-01-10 02:16:07 UTC (12 h 14 min)" in strip.text
    assert "000000010000002A0000004C" in section.text
    assert "possible again from backup 20260110T021500Z-I-23344556" in section.text
    assert "the newest 14 Jan 2026" in section.text


def test_a_failed_verification_proves_no_moment() -> None:
    drawn = coverage(WINDOW, [], [make_failed(), make_unverified()], timedelta(days=14), NOW)
    assert drawn is not None
    assert "No moment of the window is proven." in drawn.facts
    assert sorted(mark.tone for mark in drawn.proofs) == ["bad", "warn"]


def test_a_proof_outside_the_window_proves_none_of_its_moments() -> None:
    drawn = coverage(
        TORN,
        [],
        [make_card(recovery_target=f"time {(HOLE[0] + timedelta(hours=1)).isoformat()}")],
        timedelta(days=14),
        NOW,
    )
    assert drawn is not None
    assert "No moment of the window is proven." in drawn.facts


def test_a_young_target_is_drawn_at_its_own_size() -> None:
    begin = NOW - timedelta(minutes=3)
    drawn = coverage(RecoveryWindow(begin, NOW, [(begin, NOW)], []), [], [], timedelta(days=14), NOW)
    assert drawn is not None
    assert drawn.pieces[0].width > 90
    assert drawn.promised is None
    assert "the store reaches back 3 min, as far as the oldest backup." in drawn.facts[0]


def test_an_unknown_window_is_not_an_empty_one() -> None:
    unknown = page(make_card(), window=None).one("section", **{"aria-labelledby": "coverage"}).text
    assert "could not be determined" in unknown
    assert "Nothing can be restored" not in unknown
    assert "Nothing can be restored" in page(None, window=EMPTY, backups=[]).one("main").text


def test_backups_are_listed_by_chain_with_their_last_verdict() -> None:
    backups = make_backups()
    table = page(make_card()).one("section", **{"aria-labelledby": "backups"}).one("table")
    rows = table.all("tr")[1:]
    assert [row.all("code")[0].text for row in rows[:3]] == [
        backups[14].backup_id,
        backups[7].backup_id,
        backups[8].backup_id,
    ]
    assert {row.all("code")[0].text for row in rows} == {backup.backup_id for backup in backups}
    assert "FAIL" in next(row.text for row in rows if backups[5].backup_id in row.text)
    assert "not tried yet" in rows[0].text
    assert "12.2 GiB of 41.2 GiB" in rows[0].text


def test_an_unreadable_backup_is_shown_with_its_error_and_without_figures() -> None:
    broken = replace(
        make_backups()[3], parent_id=None, stored=0, raw=0, error="the manifest was changed after it was written"
    )
    text = (
        page(make_card(), backups=[*make_backups()[:3], broken]).one("section", **{"aria-labelledby": "backups"}).text
    )
    assert f"{broken.backup_id} Incremental" in text
    assert "Cannot be read the manifest was changed after it was written" in text
    assert "0 B" not in text


def test_an_incremental_without_its_full_backup_is_called_out() -> None:
    section = page(make_card(), backups=make_backups()[9:12]).one("section", **{"aria-labelledby": "backups"})
    assert section.text.count("its full backup is not in the store") == 3
    assert not any(each.orphan for each in listed(make_backups()))


def test_two_incrementals_on_one_full_backup_name_what_they_build_on() -> None:
    first, second, third = make_backups()[:3]
    third = replace(third, parent_id=first.backup_id)
    assert [each.under_parent for each in listed([third, second, first])] == [False, True, False]


def test_a_chain_that_runs_in_a_circle_is_listed_and_ends() -> None:
    first, second = make_backups()[1:3]
    circle = [replace(first, parent_id=second.backup_id), replace(second, parent_id=first.backup_id)]
    assert {each.info.backup_id for each in listed(circle)} == {first.backup_id, second.backup_id}


def test_notes_identifiers_and_digests_are_at_the_end() -> None:
    card = make_card()
    text = page(card).one("main").text
    for value in (
        *card.notes,
        card.verification_id,
        card.backup_digest,
        card.reached_lsn,
        *card.chain,
        card.server,
        card.written_by,
    ):
        assert str(value) in text


def test_a_proof_without_canary_rows_says_that_it_is_weaker() -> None:
    assert "This proof is weaker" in page(make_card(strength="observed")).one("main").text
    assert "This proof is weaker" not in page(make_card()).one("main").text


# Escaping

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)> \"q\" 'a' & {{ 7*7 }} Größe </details></style>"


def poisoned(value: Any) -> Any:
    """The same record with the hostile text in every place that holds free text."""
    if isinstance(value, BaseModel):
        return value.model_copy(update={name: poisoned(getattr(value, name)) for name in type(value).model_fields})
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    if isinstance(value, dict):
        return {poisoned(key): poisoned(item) for key, item in value.items()} or {
            HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]
        }
    return f"{value} {HOSTILE}" if type(value) is str else value


TAGS = {
    "html", "head", "meta", "link", "title", "style", "body", "header", "main", "footer", "section", "div", "p", "h1", "h2", "h3", "a", "span",
    "dl", "dt", "dd", "ul", "ol", "li", "abbr", "time", "code", "pre", "details", "summary", "figure", "figcaption", "table", "caption", "thead",
    "tbody", "tr", "th", "td", "svg", "defs", "pattern", "rect", "line", "path", "circle", "text",
}  # fmt: skip


def test_no_text_of_a_record_becomes_markup() -> None:
    card, other = poisoned(make_card()), poisoned(make_failed(ended_at=NOW - timedelta(days=1)))
    gaps = [replace(gap, first=HOSTILE, last=HOSTILE, recovery_again_from=HOSTILE) for gap in TORN.gaps]
    backups = [
        replace(b, backup_id=f"{b.backup_id} {HOSTILE}", parent_id=HOSTILE, error=HOSTILE if n else None)
        for n, b in enumerate(make_backups(2))
    ]
    target = make_target().model_copy(
        update=dict.fromkeys(("description", "environment", "owner", "classification"), HOSTILE)
    )
    shown = page(card, [other], replace(TORN, gaps=gaps), backups, target)
    index = read(index_report([Row(target, card, TORN, HOSTILE), Row(target, other, None)], NOW))
    for each in (shown, index):
        assert {element.tag for element in each.all()} <= TAGS
        assert not [name for element in each.all() for name in element.attributes if name.startswith("on")]
        assert one_line(HOSTILE) in each.one("main").text
    # Every place: whatever was poisoned is there as text, as often as it is printed.
    assert shown.one("main").text.count("<script>alert('x')</script>") > 100


def test_characters_that_turn_the_text_are_shown_by_number() -> None:
    shown = page(make_card(reason="x", notes=["all \u202edoog\u202c and \x1b[2J"]))
    assert "all \\u202edoog\\u202c and \\x1b[2J" in shown.one("main").text
    assert plain("Größe\n\t→") == "Größe\n\t→"


# The page as a file


SAMPLES: dict[str, Callable[[], str]] = {
    "pass": lambda: page(make_card(), make_history()).source,
    "fail": lambda: page(make_failed(), make_history(), TORN).source,
    "unverified": lambda: page(make_unverified(), [], WINDOW, make_backups(3), LONG).source,
    "never": lambda: page(None, [], EMPTY, []).source,
    "index": lambda: index_report(make_rows(), NOW),
    "evidence": lambda: evidence_cover(make_cover()),
    "no-evidence": lambda: evidence_cover(make_cover(0)),
    "drill": lambda: drill_report(a_card(1, "FAIL"), NOW),
    "drills": lambda: drills_report([], [a_card(62), a_card(31, "FAIL", None), a_card(1)], [], [], NOW),
}


def make_cover(count: int = 40, *, whole: bool = True) -> Cover:
    kinds = ("incident.opened", "action.plan", "action.outcome", "action.verification", "incident.closed")
    long = "k8s/production/" + "a-very-long-name-of-a-deployment-that-nobody-can-break-" * 3
    bodies: list[dict[str, Any]] = [
        {"rule": "restart-on-oom", "state": "open", "reason": "<b>bold</b> & \u202ereversed"},
        {"plan": {"action": "kubernetes.rollout_restart", "digest": "0" * 64}, "verdict": "apply"},
        {"object": long, "outcome": "applied", "reason": "restarted"},
        {"status": "done"},
        {"nothing": ["that", "tells"], "of": {"itself": 1}},
    ]
    entries = [
        Entry(
            n + 1000, NOW - timedelta(days=30) + timedelta(hours=n), kinds[n % 5], "dagster run 9e1b5e1c-0f5f-4c5e-8f8a", "checkout-api",
            json.dumps(bodies[n % 5]), "0" * 64, "f" * 64,
        )
        for n in range(count)
    ]  # fmt: skip
    end, newest = (
        Checkpoint("platform", n, size, "5d" * 32, "ab" * 32, (), at, "cd" * 32, {}, Envelope(b"", {}))
        for n, size, at in ((812, 4321, NOW - timedelta(minutes=1)), (815, 4400, NOW))
    )
    shown = entries[:30]
    control = Control(id="CC7.4", framework="SOC 2", title="Incidents are responded to", kinds=["incident.", "action."])
    return Cover(
        "platform", control, NOW - timedelta(days=90), NOW, whole, NOW, "auditor-liaison", 3321, count, 1001, 4321,
        Counter(entry.kind for entry in entries), shown, None, end, newest,
        [Key("ops-ledger:v1", "c0ffee42" * 8), Key("ops-ledger:v2", "1234abcd" * 8)], 92,
    )  # fmt: skip


LONG = make_target(
    id="warehouse-of-the-northern-region-archive-copy-for-the-auditors",
    description="The archive that the auditors of the northern region read twice a year, and that nobody else may change. "
    * 2,
)


def make_rows() -> list[Row]:
    return [
        Row(make_target(), make_card(), WINDOW),
        Row(make_target(id="billing", description="Invoices."), make_failed(), TORN),
        Row(LONG, make_unverified(), WINDOW),
        Row(make_target(id="away"), None, None, "s3.example.com:443: the store does not answer"),
        Row(make_target(id="new-db", description=""), None, WINDOW),
        Row(make_target(id="stale"), make_card(ended_at=NOW - timedelta(days=5)), WINDOW),
        Row(make_target(id="lost"), make_card(), EMPTY),
    ]


samples = pytest.mark.parametrize("sample", SAMPLES)


@samples
def test_a_page_asks_nothing_of_anybody(sample: str) -> None:
    html = SAMPLES[sample]()
    shown = read(html)
    assert (
        shown.one("meta", **{"http-equiv": "Content-Security-Policy"})
        .attributes["content"]
        .startswith("default-src 'none'")
    )  # type: ignore[union-attr]
    for element in shown.all():
        assert not {"src", "srcset", "action", "data", "xlink:href"} & set(element.attributes)
        link = element.attributes.get("href")
        assert link is None or re.fullmatch(r"#[\w-]+|data:,|(\.\./)?[\w-]+\.html", link), link
    assert not re.search(r"@import|url\((?!#)|https?:|<script", html)


@samples
def test_a_page_can_be_read_without_seeing_it(sample: str) -> None:
    shown = read(SAMPLES[sample]())
    assert shown.one("html").attributes["lang"] == "en"
    assert len(shown.all("h1")) == 1
    levels = [int(e.tag[1]) for e in shown.all() if re.fullmatch(r"h[1-6]", e.tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [element.attributes["id"] for element in shown.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    named = [name for e in shown.all() for name in (e.attributes.get("aria-labelledby") or "").split()]
    assert set(named) <= set(ids)
    assert {e.attributes["href"] for e in shown.all("a") if (e.attributes["href"] or "").startswith("#")} <= {
        f"#{each}" for each in ids
    }
    for table in shown.all("table"):
        assert table.one("caption").text
        assert all("scope" in cell.attributes for cell in table.all("th"))
        heads, cells = table.one("thead").all("th"), table.one("tbody").all("tr")
        assert all(len(row.all("td") + row.all("th")) == len(heads) for row in cells)
    for svg in shown.all("svg"):
        hidden = svg.attributes.get("aria-hidden") == "true"
        assert hidden or svg.all("title"), svg.attributes


def test_a_colour_never_stands_alone() -> None:
    for sample in SAMPLES.values():
        for element in read(sample()).all("span"):
            if "state" in element.classes():
                assert element.text


# The cover of a pack


def test_the_cover_says_what_is_in_the_pack_and_claims_no_more() -> None:
    text = " ".join(read(evidence_cover(make_cover())).one("main").text.split())
    assert "40 entries are evidence for this control and period" in text
    assert "Nothing is left out" in text
    assert "covered until" in text
    assert "This page proves nothing by itself" in text
    assert "10 more stand in entries.jsonl" in text
    assert "object k8s/production/" in text
    assert "\u202e" not in text
    matching = " ".join(read(evidence_cover(make_cover(whole=False))).one("main").text.split())
    assert "Nothing is left out" not in matching
    assert "That none is missing cannot be told from it" in matching
    assert "No entry fits. That none does is itself verified." in read(evidence_cover(make_cover(0))).one("main").text


def test_the_cover_names_runs_and_copies_as_people_do() -> None:
    body = {"backups": ["b1"], "bytes": 512, "copy": "second-site", "objects": 18, "store": "s3://copies", "wrong": []}
    copied = Entry(
        7, NOW, "backup.copied", "dagster run b19aecbf-520b-4337-a723-a5746bfba407", "app-db", json.dumps(body), "0" * 64, "f" * 64
    )  # fmt: skip
    main = read(evidence_cover(replace(make_cover(0), shown=[copied]))).one("main").text
    assert "copy second-site · store s3://copies · objects 18 · bytes 512" in main
    assert "dagster run b19aecbf" in main
    assert "b19aecbf-520b" not in main
    assert "incident.*, action.*" in main


def test_the_cover_says_of_findings_and_steps_what_a_person_wants_to_know() -> None:
    bodies = [
        ("drill.finding", {"closed_by": None, "drill": "d1", "finding": "f1", "owner": "team", "title": "The teardown failed"}),
        ("drill.step", {"drill": "d1", "measured": [], "said": "it will not go", "state": "failed", "step": "clean"}),
    ]  # fmt: skip
    entries = [
        Entry(n, NOW, kind, "ann", "app-db", json.dumps(body), "0" * 64, "f" * 64)
        for n, (kind, body) in enumerate(bodies)
    ]
    main = read(evidence_cover(replace(make_cover(0), shown=entries))).one("main").text
    assert "title The teardown failed · drill d1 · owner team" in main
    assert "drill d1 · step clean · state failed · said it will not go" in main
    assert "{" not in main


def test_the_cover_of_a_whole_pack_foretells_that_it_is_incomplete() -> None:
    cover = make_cover()
    assert "its verification calls it incomplete" in evidence_cover(cover)
    assert "calls it incomplete" not in evidence_cover(replace(cover, whole=False))
    assert "calls it incomplete" not in evidence_cover(replace(cover, until=cover.end.at))


# The index


def test_the_index_has_the_worst_first() -> None:
    shown = read(index_report(make_rows(), NOW))
    rows = shown.one("tbody").all("tr")
    order = [(row.all("a")[0].text, row.all("td")[0].all("span")[0].text) for row in rows]
    assert order == [
        ("lost", "NOTHING TO RESTORE"),
        ("billing", "FAIL"),
        ("away", "COULD NOT VERIFY"),
        (LONG.id, "COULD NOT VERIFY"),
        ("new-db", "NEVER PROVEN"),
        ("stale", "PROOF OUT OF DATE"),
        ("app-db", "PASS"),
    ]
    assert shown.one("h2", id="verdict").text == "1 of 7 proven"
    assert "the store does not answer" in rows[2].text
    assert "promised within 2 d" in rows[5].text
    assert "missed: of 4 h" in rows[1].text
    assert [row.all("a")[0].attributes["href"] for row in rows][-1] == "app-db.html"


def test_the_index_leads_to_the_drills_where_there_are_any() -> None:
    for drills in (True, False):
        links = [
            link.attributes["href"]
            for link in read(index_report(make_rows(), NOW, drills=drills)).one("header").all("a")
        ]
        assert links == ["drills/index.html"] * drills


def test_a_target_that_could_not_be_looked_at_is_not_proven() -> None:
    shown = read(index_report([Row(make_target(), make_card(), WINDOW, "the store does not answer")], NOW))
    assert shown.one("h2", id="verdict").text == "0 of 1 proven"
    assert shown.one("tbody").all("td")[0].text.startswith("COULD NOT VERIFY")


def test_an_index_of_nothing_is_no_success() -> None:
    shown = read(index_report([], NOW))
    assert "tone-good" not in shown.all("section")[0].classes()
    assert shown.one("h2", id="verdict").text == "0 of 0 proven"


# Writing


def test_a_report_is_written_under_a_stable_name_for_everybody_to_read(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        path = write_report(tmp_path / "reports", "app-db", "<p>one</p>")
    finally:
        os.umask(before)
    assert path == tmp_path / "reports" / "app-db.html"
    assert path.stat().st_mode & 0o777 == 0o644
    write_report(tmp_path / "reports", "app-db", "<p>zwei – two</p>")
    assert path.read_text("utf-8") == "<p>zwei – two</p>"
    assert [each.name for each in path.parent.iterdir()] == ["app-db.html"]


def test_a_write_that_fails_leaves_the_old_report_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(tmp_path, "app-db", "old")

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OpsError, match="No space left on device") as caught:
        write_report(tmp_path, "app-db", "new")
    assert caught.value.where == str(path)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["app-db.html"]


def test_a_folder_that_is_a_file_is_an_error_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "reports").write_text("")
    with pytest.raises(OpsError, match="cannot be written"):
        write_report(tmp_path / "reports", None, "x")


def test_a_target_called_index_does_not_replace_the_index(tmp_path: Path) -> None:
    assert write_report(tmp_path, None, "all").name == "index.html"
    assert write_report(tmp_path, "index", "one").name == "index_.html"


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".", "..", ".hidden"])
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        page_name(name)


# The terminal

CARDS = [make_card(), make_failed(), make_unverified()]
cards = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.verdict)


def printed(draw: Callable[[Console], None], **how: Any) -> str:
    out = io.StringIO()
    draw(Console(file=out, **({"width": 80, "legacy_windows": False} | how)))
    return out.getvalue()


@cards
def test_the_scorecard_fits_80_columns_and_has_no_escapes_outside_a_terminal(card: Scorecard) -> None:
    text = printed(lambda console: print_scorecard(card, console))
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text
    flat = one_line(text)
    for value in (
        card.target_id,
        card.backup_id,
        card.recovery_target,
        card.verification_id,
        *(gate.title for gate in card.gates),
    ):
        assert str(value) in flat
    for step in card.steps:
        assert re.search(rf"{step.name} .*█+.* {re.escape(duration(step.seconds))}", text, re.IGNORECASE)


@cards
def test_the_verdict_is_the_first_word_and_never_a_better_one(card: Scorecard) -> None:
    words = printed(lambda console: print_scorecard(card, console)).replace("┃", " ").split()
    first = " ".join(word for word in words[1:4] if word.isupper())
    assert first == {"PASS": "PASS", "FAIL": "FAIL", "COULD_NOT_VERIFY": "COULD NOT VERIFY"}[card.verdict]


@cards
def test_the_verdict_has_its_colour_and_yellow_is_never_green(card: Scorecard) -> None:
    text = printed(lambda console: print_scorecard(card, console), force_terminal=True, color_system="standard")
    frame = text[: text.index("target")]
    found = {code for code in ("41", "42", "43") if re.search(rf"\x1b\[[\d;]*\b{code}m", frame)}
    assert found == {{"PASS": "42", "FAIL": "41", "COULD_NOT_VERIFY": "43"}[card.verdict]}


@cards
def test_without_colour_nothing_is_lost(card: Scorecard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = printed(lambda console: print_scorecard(card, console), force_terminal=True, color_system="standard")
    assert not re.search(r"\x1b\[[\d;]*\b[349][0-7]m", text)
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == printed(lambda console: print_scorecard(card, console))


def test_a_terminal_without_unicode_gets_ascii() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="latin-1")
    card = make_card(notes=["Größe → 日本 …"], gates=[make_gate(0, title="tables größer – ü", result="日本")])
    print_scorecard(card, Console(file=out, width=80))
    backups_table(make_backups(), Console(file=out, width=80))
    out.flush()
    text = raw.getvalue().decode("ascii")
    assert "- Gr\\xf6\xdfe".replace("\xdf", "\\xdf") + " -> \\u65e5\\u672c ..." in text
    assert re.search(r"Replay +\| *\.+#+", text)


def test_a_record_cannot_steer_the_terminal() -> None:
    card = make_failed(reason="\x1b[2Jgone [red]x[/red]", notes=["\x9b31m \r overwritten"])
    text = printed(lambda console: print_scorecard(card, console))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert "\\x1b[2Jgone [red]x[/red]" in text


def test_what_failed_is_printed_at_length_with_its_id() -> None:
    long = "block " + ", ".join(str(n) for n in range(100))
    flat = one_line(
        printed(
            lambda console: print_scorecard(make_failed(gates=[make_gate(5, GateStatus.FAILED, result=long)]), console)
        )
    )
    assert f"checksums: {long}" in flat
    assert "1 FAILED" in flat


def test_a_pass_that_its_gates_deny_is_not_printed_as_one() -> None:
    card = make_card(gates=[make_gate(0), make_gate(5, GateStatus.FAILED)])
    text = printed(lambda console: print_scorecard(card, console))
    assert "COULD NOT VERIFY" in text
    assert "its own gates do not: checksums" in one_line(text)
    assert "PASS " not in text.split("target")[0]


def test_a_missed_objective_is_named_and_an_unmeasured_one_is_not_kept() -> None:
    failed = printed(lambda console: print_scorecard(make_failed(), console))
    assert re.search(r"RTO, this restore +4 h 31 min +4 h +MISSED", failed)
    unverified = printed(lambda console: print_scorecard(make_unverified(), console))
    assert re.search(r"RTO, this restore +- +4 h +not measured", unverified)


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_of_backups_fits_and_names_each(width: int) -> None:
    broken = replace(make_backups()[3], parent_id=None, error="the manifest was changed after it was written")
    infos = [*make_backups()[:3], broken, *make_backups()[8:9]]
    text = printed(lambda console: backups_table(infos, console), width=width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    flat = one_line(text)
    for info in infos:
        assert info.backup_id in flat
    assert "CANNOT BE READ: the manifest was changed" in flat
    assert "USELESS ALONE: its full backup" in flat
    assert "PASS 1 Jan" in flat
    assert ("PostgreSQL" in text) == (width == 120)


def test_no_backup_is_said() -> None:
    assert printed(lambda console: backups_table([], console)).strip() == "No backup is in the store."


def test_the_window_in_lines() -> None:
    assert window_lines(WINDOW) == ["restorable: 2026-01-01 02:19:03 UTC to 2026-01-15 08:30:00 UTC (14 d 6 h)"]
    assert window_lines(TORN)[2] == "not restorable: 2026-01-09 14:02:00 UTC to 2026-01-10 02:16:07 UTC (12 h 14 min)"
    assert window_lines(TORN)[3].endswith("recovery is possible again from backup 20260110T021500Z-I-23344556")
    assert window_lines(EMPTY) == ["nothing can be restored: the store holds no usable backup with its WAL"]


# Progress


class HandClock:
    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> datetime:
        return NOW

    def monotonic(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds


def test_progress_in_a_pipe_is_a_line_every_ten_seconds() -> None:
    out, clock = io.StringIO(), HandClock()
    with progress_bar("app-db", stream=out, clock=clock) as progress:
        for second in range(26):
            clock.at = float(second)
            progress("restore", second * (4 << 20), 100 << 20)
        progress("syncing to disk", 0, None)
    assert out.getvalue().splitlines() == [
        "app-db restore: 0 B of 100 MiB (0 %)",
        "app-db restore: 40.0 MiB of 100 MiB (40 %), 4.0 MiB/s, 15 s left",
        "app-db restore: 80.0 MiB of 100 MiB (80 %), 4.0 MiB/s, 5 s left",
        "app-db restore: 100 MiB of 100 MiB (100 %), 4.0 MiB/s",
        "app-db syncing to disk",
    ]


def test_a_resumed_step_does_not_count_what_was_there_as_speed() -> None:
    out, clock = io.StringIO(), HandClock()
    with progress_bar(stream=out, clock=clock) as progress:
        progress("restore", 1 << 30, 2 << 30)
        clock.at = 10.0
        progress("restore", (1 << 30) + (10 << 20), 2 << 30)
    assert "1.0 MiB/s" in out.getvalue()


def test_no_rate_is_made_of_blocks_that_end_together() -> None:
    out, clock = io.StringIO(), HandClock()
    with progress_bar(stream=out, clock=clock) as progress:
        progress("restore", 16 << 20, 72 << 20)
        clock.at = 0.0001
        progress("restore", 72 << 20, 72 << 20)
    assert out.getvalue().splitlines() == [
        "restore: 16.0 MiB of 72.0 MiB (22 %)",
        "restore: 72.0 MiB of 72.0 MiB (100 %)",
    ]


def test_the_last_that_was_heard_is_said_when_it_ends_with_an_error() -> None:
    out, clock = io.StringIO(), HandClock()

    def run() -> None:
        with progress_bar(stream=out, clock=clock) as progress:
            progress("restore", 0, 100)
            clock.at = 2.0
            progress("restore", 60, 100)
            raise OpsError("the store is away")

    with pytest.raises(OpsError):
        run()
    assert out.getvalue().splitlines()[-1].startswith("restore: 60 B of 100 B (60 %)")


def test_progress_in_a_terminal_is_a_bar_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with progress_bar("app-db", stream=out) as progress:
        progress("restore", 10 << 20, 100 << 20)
        progress("[red]WAL", 0, None)
        progress("restore", 100 << 20, 100 << 20)
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", out.getvalue())
    assert "app-db restore" in shown
    assert "100 MiB of 100 MiB" in shown
    assert "[red]WAL" in shown
    assert "━" in shown


# Pictures for Dagster's metadata


def drawn(svg: str) -> ElementTree.Element:
    """Well-formed on its own, as an image has to be; an entity or a name space that only a page knows would show nothing."""
    return ElementTree.fromstring(svg)


def words_of(picture: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in picture.iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_of_a_proof_has_each_step_and_each_promise() -> None:
    said = words_of(drawn(proof_picture(make_target(), make_card())))
    assert said[:2] == ["Canary", "6.2 s"]
    assert said[-6:] == [
        "RPO", "1.8 s of 1 h, kept", "RTO, this restore", "3 min 43 s of 4 h, kept", "RTO, whole target", "23 min 40 s of 4 h, kept",
    ]  # fmt: skip


def test_the_picture_of_a_verification_that_broke_off_claims_nothing() -> None:
    said = words_of(drawn(proof_picture(make_target(), make_unverified(steps=[], objectives=[]))))
    assert said == ["RPO", "not measured", "RTO, this restore", "not measured", "RTO, whole target", "not measured"]


def test_the_picture_of_the_history_has_a_mark_for_each_verification_and_stays_small() -> None:
    picture = history_picture(make_target(), make_history(300))
    marks = [e for e in drawn(picture).iter("{http://www.w3.org/2000/svg}svg") if "mark" in e.get("class", "")]
    assert len(marks) == 2 * LOOKED_BACK
    assert len(picture) < 60_000
    assert words_of(drawn(history_picture(make_target(), [make_card()])))[0] == "Data that would be lost (RPO)"


def test_a_picture_stands_within_the_text() -> None:
    svg = proof_picture(make_target(), make_card(steps=[Step(name="a<b", started=0, seconds=1)]))
    text = as_markdown(svg, "the steps")
    head, _, body = text.partition("base64,")
    assert head == "![the steps](data:image/svg+xml;"
    assert base64.b64decode(body.removesuffix(")")).decode() == svg
    assert "A&lt;b" in svg
