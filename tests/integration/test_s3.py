"""The S3 client against a real store, and against what networks and stores do on bad days."""

from __future__ import annotations

import hashlib
import json
import logging
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops_platform.clients.objectstore import DeleteOutcome
from ops_platform.clients.s3 import Lock, S3Settings, S3Store
from ops_platform.clock import SystemClock
from ops_platform.errors import (
    AccessDeniedError,
    ConflictError,
    CorruptionError,
    NotThereError,
    OpsError,
    UnreachableError,
    UsageError,
)
from ops_platform.inventory import Secret
from ops_platform.local.components import s3_settings
from tests.integration import http_faults as faults
from tests.integration.http_faults import Answer, FaultyProxy, Request
from tests.rig import Ground

NASTY = [
    "plain", "a b", "a+b", "a%20b", "100%", "ünï/çødé", "日本/語", "it's (1)*!", "a&b<c>\"d\"", "q?x=1#y", "tab\tx", "~tilde",
    "a=b;c,d@e:f$g", "dots..x/.y",
]  # fmt: skip


class TestClock(SystemClock):
    """The real time, moved by `ahead`; sleeping takes no time and is written down."""

    __test__ = False

    def __init__(self, ahead: timedelta = timedelta(0)) -> None:
        self.ahead = ahead
        self.slept: list[float] = []

    def now(self) -> datetime:
        return super().now() + self.ahead

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.fixture
def store(ground: Ground, request: pytest.FixtureRequest) -> Iterator[S3Store]:
    made = ground.store(f"s3/{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}")
    yield made
    made.close()


@pytest.fixture
def proxy(ground: Ground) -> Iterator[FaultyProxy]:
    ground.component("s3")
    with FaultyProxy(ground.place.port("s3-http")) as made:
        yield made


@pytest.fixture
def tls_proxy(ground: Ground) -> Iterator[FaultyProxy]:
    ground.component("s3")
    secrets = ground.place.directory / "secrets"
    with FaultyProxy(ground.place.port("s3-http"), (secrets / "s3.crt", secrets / "s3.key")) as made:
        yield made


@pytest.fixture
def through(store: S3Store, ground: Ground) -> Iterator[Callable[..., S3Store]]:
    """The same bucket and prefix, by way of a proxy."""
    made: list[S3Store] = []

    def open_store(proxy: FaultyProxy, *, clock: TestClock | None = None, **more: Any) -> S3Store:
        asked = {"endpoint": proxy.url, "retries": 3, "timeout": 10.0, "prefix": store._settings.prefix, **more}
        made.append(S3Store(replace(s3_settings(ground.place, "tests"), **asked), clock=clock or TestClock()))
        return made[-1]

    yield open_store
    for one in made:
        one.close()


# What a store is for


def test_what_is_put_comes_back_whole_and_in_parts(store: S3Store) -> None:
    body = bytes(range(256)) * 40
    info = store.put("a/b", body)
    assert (info.size, info.etag) == (len(body), hashlib.md5(body, usedforsecurity=False).hexdigest())
    assert store.get("a/b") == body
    assert store.get("a/b", start=100, length=50) == body[100:150]
    assert store.get("a/b", start=len(body) - 5) == body[-5:]
    assert store.get("a/b", length=3) == body[:3]
    assert store.get("a/b", start=7, length=0) == b""
    assert store.get("a/b", start=len(body) + 1, length=10) == b""
    assert store.get("a/b", start=len(body) - 2, length=10) == body[-2:]
    head = store.head("a/b")
    assert head is not None
    assert (head.key, head.size, head.etag) == ("a/b", len(body), info.etag)
    assert abs(head.modified - datetime.now(UTC)) < timedelta(minutes=1)


def test_an_empty_object_and_a_memoryview_are_objects(store: S3Store) -> None:
    store.put("empty", b"")
    store.put("view", memoryview(b"0123456789")[2:5])
    assert (store.get("empty"), store.get("view")) == (b"", b"234")


def test_a_key_that_is_not_there_is_said_and_not_guessed(store: S3Store) -> None:
    assert store.head("nothing") is None
    with pytest.raises(NotThereError, match="the store has no such object"):
        store.get("nothing")
    assert store.delete("nothing") is DeleteOutcome.MISSING
    assert store.retention("nothing") is None
    assert list(store.list("nothing")) == []


def test_keys_of_any_text_are_written_read_listed_and_deleted(store: S3Store) -> None:
    for key in NASTY:
        store.put(key, key.encode())
    assert {info.key for info in store.list()} == set(NASTY)
    for key in NASTY:
        assert store.get(key) == key.encode()
        head = store.head(key)
        assert head is not None
        assert head.size == len(key.encode())
        assert [info.key for info in store.list(key)] == [key]
    assert set(store.list_folders()) == {"ünï", "日本", "dots..x"}
    assert [store.delete(key) for key in NASTY] == [DeleteOutcome.DELETED] * len(NASTY)
    assert list(store.list()) == []


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "./a", "a/../b", "..", "a/."])
def test_a_key_that_libraries_fold_into_another_is_refused(store: S3Store, key: str) -> None:
    with pytest.raises(UsageError, match="no empty element"):
        store.put(key, b"x")
    with pytest.raises(UsageError):
        store.delete(key)


def test_more_than_a_page_is_listed_to_its_end(store: S3Store) -> None:
    wanted = [f"page/{number:04d} +%" for number in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b""), wanted))
    store.put("beside", b"")
    assert [info.key for info in store.list("page/")] == wanted
    assert [info.key for info in store.list("page/", start_after=wanted[1001])] == wanted[1002:]
    assert list(store.list_folders()) == ["page"]


def test_more_than_a_page_of_folders_is_listed_to_its_end(store: S3Store) -> None:
    wanted = [f"{number:04d} +%" for number in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(f"{name}/x", b""), wanted))
    assert list(store.list_folders()) == wanted


def test_what_nobody_finished_is_listed_and_aborted(store: S3Store) -> None:
    for key in ("a b+c%/ü", "a b+c%/ü", "other"):
        assert store._call("POST", key, query={"uploads": ""}).status == 200
    found = list(store.incomplete_uploads())
    assert sorted(key for key, _, _ in found) == ["a b+c%/ü", "a b+c%/ü", "other"]
    assert all(abs(begun - datetime.now(UTC)) < timedelta(minutes=1) for _, _, begun in found)
    for key, upload_id, _ in store.incomplete_uploads("a b"):
        store.abort_upload(key, upload_id)
        store.abort_upload(key, upload_id)  # gone already: nothing is wrong
    assert [key for key, _, _ in store.incomplete_uploads()] == ["other"]


def test_more_than_a_page_of_unfinished_uploads_is_listed_to_its_end(store: S3Store) -> None:
    with ThreadPoolExecutor(8) as pool:  # several of one key, so that a page ends within a key
        list(pool.map(lambda n: store._call("POST", f"up/{n // 3:04d}", query={"uploads": ""}), range(1005)))
    found = list(store.incomplete_uploads("up/"))
    assert len(found) == len({upload_id for _, upload_id, _ in found}) == 1005


def test_only_the_first_writer_of_a_key_wins(store: S3Store) -> None:
    store.put("once", b"first", if_absent=True)
    with pytest.raises(ConflictError, match="exists already"):
        store.put("once", b"second", if_absent=True)
    with pytest.raises(ConflictError):
        store.put("once", b"first", if_absent=True)  # also with the same content: it was another writer
    assert store.get("once") == b"first"


def test_the_check_says_what_the_bucket_can_do_and_leaves_nothing(store: S3Store) -> None:
    found = store.check()
    assert (found["bucket"], found["versioning"], found["object_lock"]) == ("tests", "off", "off")
    assert abs(float(str(found["clock_skew_seconds"]))) < 30
    assert list(store.list()) == []


# Object Lock


@pytest.fixture
def locked(ground: Ground, request: pytest.FixtureRequest) -> Iterator[S3Store]:
    prefix = hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    made = ground.store(prefix, "locked", lock=Lock("COMPLIANCE", timedelta(hours=1)))
    yield made
    made.close()


def test_a_retained_object_is_pinned_and_stays(locked: S3Store) -> None:
    locked.put("kept", b"kept", retain=True)
    retention = locked.retention("kept")
    assert retention is not None
    assert retention.mode == "COMPLIANCE"
    assert timedelta(minutes=59) < retention.until - datetime.now(UTC) <= timedelta(hours=1)
    assert locked.delete("kept") is DeleteOutcome.PINNED
    assert locked.get("kept") == b"kept"
    check = locked.check()
    assert (check["object_lock"], check["versioning"]) == ("Enabled", "Enabled")


def test_a_clock_that_is_ahead_does_not_unpin(locked: S3Store, ground: Ground) -> None:
    """The date has come by our clock alone; the store refuses, and its refusal is the outcome."""
    locked.put("kept", b"kept", retain=True)
    asked = S3Store(locked._settings, clock=TestClock())
    asked._is_retained = lambda key, version=None, real=asked._is_retained: version is not None and real(key, version)  # type: ignore[method-assign]
    assert asked.delete("kept") is DeleteOutcome.PINNED
    assert locked.get("kept") == b"kept"


def test_a_version_under_a_newer_one_stays_pinned(locked: S3Store) -> None:
    locked.put("kept", b"old", retain=True)
    locked.put("kept", b"new")
    assert locked.delete("kept") is DeleteOutcome.PINNED
    assert locked.get("kept") == b"old"


def test_deleting_takes_every_version_and_no_neighbour(locked: S3Store) -> None:
    """The newest alone would bring the one before it back, and the space would stay used."""
    for number in range(3):
        locked.put("partial", b"%d" % number)
    locked.put("partial.next", b"neighbour")
    assert locked.delete("partial") is DeleteOutcome.DELETED
    assert locked.head("partial") is None
    assert list(locked._versions("partial")) == []
    assert locked.get("partial.next") == b"neighbour"


def test_a_legal_hold_pins(locked: S3Store) -> None:
    locked.put("held", b"held")
    body = b"<LegalHold><Status>ON</Status></LegalHold>"
    answer = locked._call("PUT", "held", query={"legal-hold": ""}, headers=_md5(body), body=body)
    assert answer.status == 200
    assert locked.delete("held") is DeleteOutcome.PINNED
    assert locked.get("held") == b"held"


def test_a_policy_that_forbids_deleting_is_no_lock(ground: Ground) -> None:
    store = ground.store("x", "locked-denied", lock=Lock("COMPLIANCE", timedelta(hours=1)))
    store.put("free", b"free")
    _deny(store, "locked-denied", "s3:DeleteObject", "s3:DeleteObjectVersion")
    with pytest.raises(AccessDeniedError):
        store.delete("free")
    assert store.get("free") == b"free"
    store.close()


def test_retention_is_put_on_what_is_asked_for_alone(locked: S3Store) -> None:
    locked.put("free", b"free")
    assert locked.retention("free") is None
    assert locked.delete("free") is DeleteOutcome.DELETED


def _deny(store: S3Store, bucket: str, *actions: str) -> None:
    resources = [f"arn:aws:s3:::{bucket}/*"]
    statement = {"Effect": "Deny", "Principal": "*", "Action": list(actions), "Resource": resources}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]}).encode()
    assert store._call("PUT", None, query={"policy": ""}, body=policy).status == 204


def _md5(body: bytes) -> dict[str, str]:
    import base64

    return {"content-md5": base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()}


# Who may


def test_wrong_keys_are_named_as_such_and_the_clock_is_not_blamed(store: S3Store, ground: Ground) -> None:
    good = s3_settings(ground.place, "tests")
    for wrong in (replace(good, secret_key=Secret("wrong")), replace(good, access_key=Secret("wrong"))):
        with pytest.raises(
            AccessDeniedError, match=r"refuses access: (InvalidAccessKeyId|SignatureDoesNotMatch)"
        ) as caught:
            S3Store(wrong).get("a")
        assert "check the secrets" in (caught.value.remedy or "")
        with pytest.raises(AccessDeniedError, match="refuses access: 403"):
            S3Store(wrong).head("a")
        with pytest.raises(AccessDeniedError):
            list(S3Store(wrong).list())


@pytest.mark.parametrize("minutes", [20, -20])
def test_a_clock_that_is_off_is_named_with_its_seconds(ground: Ground, store: S3Store, minutes: int) -> None:
    skewed = S3Store(store._settings, clock=TestClock(timedelta(minutes=minutes)))
    for ask in (lambda: skewed.put("a", b"x"), lambda: skewed.get("a"), lambda: skewed.head("a"), skewed.check):
        with pytest.raises(AccessDeniedError, match=r"this machine's clock is (1199|12\d\d) s off") as caught:
            ask()
        assert caught.value.remedy == "set the clock by NTP"


def test_a_policy_that_denies_is_access_denied(ground: Ground) -> None:
    store = ground.store("x", "denied")
    store.put("a", b"x")
    _deny(store, "denied", "s3:PutObject", "s3:GetObject", "s3:DeleteObject")
    for ask in (
        lambda: store.put("b", b"x"),
        lambda: store.get("a"),
        lambda: store.head("a"),
        lambda: store.delete("a"),
    ):
        with pytest.raises(AccessDeniedError, match="the store refuses access") as caught:
            ask()
        assert caught.value.remedy == "check the access key and its policy for that bucket"
    store.close()


def test_a_missing_bucket_is_named_whatever_is_asked(ground: Ground, store: S3Store) -> None:
    absent = S3Store(replace(store._settings, bucket="not-there"))
    asks: list[Callable[[], Any]] = [
        lambda: absent.get("a"), lambda: absent.head("a"), lambda: list(absent.list()), lambda: list(absent.list_folders()),
        lambda: absent.delete("a"), lambda: absent.retention("a"),
    ]  # fmt: skip
    for ask in asks:
        with pytest.raises(NotThereError, match="there is no bucket 'not-there'") as caught:
            ask()
        assert "correct `bucket` in the inventory" in (caught.value.remedy or "")


def test_a_missing_bucket_is_named_by_a_write_too(proxy: FaultyProxy, through: Callable[..., S3Store]) -> None:
    """This store makes a bucket that an administrator writes to; others answer so."""
    proxy.always = faults.error(404, "NoSuchBucket", "The specified bucket does not exist")
    store = through(proxy)
    for ask in (lambda: store.put("a", b"x"), store.check, lambda: list(store.incomplete_uploads())):
        with pytest.raises(NotThereError, match="there is no bucket 'tests'"):
            ask()


def test_a_certificate_that_nobody_vouches_for_is_refused_at_once(store: S3Store) -> None:
    clock = TestClock()
    stranger = S3Store(replace(store._settings, ca=None, retries=3), clock=clock)
    with pytest.raises(UnreachableError, match=r"TLS with the store failed: .*certificate") as caught:
        stranger.get("a")
    assert caught.value.remedy == "set ca to the PEM file of the store's CA"
    assert clock.slept == []
    missing = S3Store(replace(store._settings, ca="/nowhere/ca.pem", retries=0))
    with pytest.raises(UnreachableError, match="TLS with the store failed"):
        missing.get("a")


def test_nobody_there_is_unreachable_after_the_tries(store: S3Store) -> None:
    clock = TestClock()
    gone = S3Store(replace(store._settings, endpoint="http://127.0.0.1:9", retries=2), clock=clock)
    for ask in (lambda: gone.get("a"), lambda: gone.head("a"), lambda: list(gone.list()), lambda: gone.delete("a")):
        clock.slept.clear()
        with pytest.raises(UnreachableError, match="did not answer in 3 tries") as caught:
            ask()
        assert len(clock.slept) == 2
        assert "nothing was assumed" in (caught.value.remedy or "")
        assert "127.0.0.1:9" in str(caught.value)


# Bad days


@pytest.mark.parametrize("code", ["SlowDown", "ServiceUnavailable", "InternalError"])
def test_a_store_that_is_busy_for_a_while_is_waited_for(
    proxy: FaultyProxy, through: Callable[..., S3Store], code: str
) -> None:
    clock = TestClock()
    store = through(proxy, clock=clock)
    proxy.faults.extend([faults.error(503, code), faults.error(500, code)])
    store.put("a", b"body")
    assert store.get("a") == b"body"
    assert len(clock.slept) == 2
    assert 0.1 <= clock.slept[0] <= 0.2
    assert 0.2 <= clock.slept[1] <= 0.4
    assert [request.body for request in proxy.seen if request.method == "PUT"] == [b"body"] * 3


def test_a_store_that_stays_busy_is_unreachable_and_never_empty(
    proxy: FaultyProxy, through: Callable[..., S3Store]
) -> None:
    proxy.always = faults.error(503, "SlowDown", "Please reduce your request rate.")
    store = through(proxy)
    asks: list[Callable[[], Any]] = [
        lambda: store.put("a", b"x"), lambda: store.get("a"), lambda: store.head("a"), lambda: list(store.list()),
        lambda: list(store.list_folders()), lambda: store.delete("a"), lambda: list(store.incomplete_uploads()),
        lambda: store.retention("a"), lambda: store.abort_upload("a", "b"), store.check,
    ]  # fmt: skip
    for ask in asks:
        before = len(proxy.seen)
        with pytest.raises(UnreachableError, match="refused 4 tries"):
            ask()
        assert len(proxy.seen) - before == 4


def test_the_pause_between_tries_has_a_ceiling(proxy: FaultyProxy, through: Callable[..., S3Store]) -> None:
    clock = TestClock()
    proxy.always = faults.error(503, "SlowDown")
    with pytest.raises(UnreachableError):
        through(proxy, clock=clock, retries=12).get("a")
    assert len(clock.slept) == 12
    assert max(clock.slept) <= 10


@pytest.mark.parametrize("which", ["proxy", "tls_proxy"])
def test_a_connection_cut_in_the_middle_of_an_upload_is_made_again(
    which: str, through: Callable[..., S3Store], request: pytest.FixtureRequest
) -> None:
    proxy: FaultyProxy = request.getfixturevalue(which)
    store = through(proxy, retries=5)
    body = bytes(4 << 20)
    proxy.faults.extend([faults.reset_in_the_request, faults.lose_the_answer, faults.reset_in_the_request])
    store.put("big", body)
    assert store.get("big") == body
    assert [r.method for r in proxy.seen].count("PUT") == 4


@pytest.mark.parametrize("which", ["proxy", "tls_proxy"])
def test_a_connection_that_is_always_cut_is_unreachable(
    which: str, through: Callable[..., S3Store], request: pytest.FixtureRequest
) -> None:
    proxy: FaultyProxy = request.getfixturevalue(which)
    proxy.always = faults.reset_in_the_request
    with pytest.raises(UnreachableError, match="did not answer in 4 tries"):
        through(proxy).put("big", bytes(1 << 20))


@pytest.mark.parametrize("which", ["proxy", "tls_proxy"])
def test_a_truncated_answer_is_asked_for_again_and_never_taken_for_whole(
    which: str, store: S3Store, through: Callable[..., S3Store], request: pytest.FixtureRequest
) -> None:
    proxy: FaultyProxy = request.getfixturevalue(which)
    body = bytes(range(256)) * 400
    store.put("a", body)
    found = through(proxy)
    proxy.faults.extend([faults.cut_the_answer] * 2)
    assert found.get("a") == body
    proxy.faults.extend([faults.cut_the_answer] * 2)
    assert [info.key for info in found.list()] == ["a"]
    proxy.always = faults.cut_the_answer
    for ask in (lambda: found.get("a"), lambda: list(found.list()), lambda: found.get("a", start=5, length=100)):
        with pytest.raises(UnreachableError, match="did not answer in 4 tries"):
            ask()


def test_a_store_that_never_answers_times_out(proxy: FaultyProxy, through: Callable[..., S3Store]) -> None:
    proxy.always = faults.never_answer
    with pytest.raises(UnreachableError, match=r"did not answer in 2 tries: .*timed out"):
        through(proxy, timeout=0.2, retries=1).get("a")


def test_our_own_lost_answer_is_no_conflict(proxy: FaultyProxy, through: Callable[..., S3Store]) -> None:
    """The first try arrived and its answer did not: the second meets what we wrote ourselves."""
    store = through(proxy)
    proxy.faults.append(faults.lose_the_answer)
    info = store.put("once", b"ours", if_absent=True)
    assert info.size == 4
    assert store.get("once") == b"ours"


def test_somebody_elses_object_is_a_conflict_also_after_a_retry(
    store: S3Store, proxy: FaultyProxy, through: Callable[..., S3Store]
) -> None:
    store.put("once", b"theirs")
    proxy.faults.append(faults.error(503, "SlowDown"))
    with pytest.raises(ConflictError):
        through(proxy).put("once", b"ours", if_absent=True)
    assert store.get("once") == b"theirs"


def test_bytes_that_changed_on_the_way_are_not_stored(proxy: FaultyProxy, through: Callable[..., S3Store]) -> None:
    def flip(request: Request) -> Request:
        return replace(request, body=bytes([request.body[0] ^ 1]) + request.body[1:])

    store = through(proxy)
    proxy.faults.append(faults.change_request(flip))
    store.put("once-flipped", b"what was meant")
    assert store.get("once-flipped") == b"what was meant"
    proxy.always = faults.change_request(flip)
    with pytest.raises(OpsError):
        store.put("always-flipped", b"what was meant")
    proxy.always = None
    assert store.head("always-flipped") is None


def test_a_store_that_confirms_other_bytes_is_corruption(proxy: FaultyProxy, through: Callable[..., S3Store]) -> None:
    def other(answer: Answer) -> Answer:
        return replace(answer, headers={**answer.headers, "etag": f'"{"0" * 32}"'})

    proxy.always = faults.change_answer(other)
    with pytest.raises(CorruptionError, match="confirms other bytes"):
        through(proxy).put("a", b"body")


def test_a_tag_that_is_no_digest_is_not_taken_for_one(proxy: FaultyProxy, through: Callable[..., S3Store]) -> None:
    store = through(proxy)
    for headers in ({"etag": f'"{"0" * 32}-2"'}, {"etag": f'"{"0" * 32}"', "x-amz-server-side-encryption": "aws:kms"}):
        proxy.faults.append(
            faults.change_answer(lambda a, headers=headers: replace(a, headers={**a.headers, **headers}))
        )
        assert store.put("a", b"body").size == 4


def test_a_proxy_that_knows_no_ranges_does_not_spoil_a_part(
    store: S3Store, proxy: FaultyProxy, through: Callable[..., S3Store]
) -> None:
    store.put("a", b"0123456789")

    proxy.always = faults.reply(200, b"0123456789")
    found = through(proxy)
    assert found.get("a", start=3, length=4) == b"3456"
    assert found.get("a", start=8) == b"89"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"<html>Please log in</html", CorruptionError),
        (
            b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><ListBucketResult>&b;</ListBucketResult>',
            CorruptionError,
        ),
        (b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>", CorruptionError),
    ],
    ids=["no XML", "entities", "more, and no word where"],
)
def test_an_answer_that_is_no_listing_is_not_an_empty_one(
    proxy: FaultyProxy, through: Callable[..., S3Store], body: bytes, kind: type[OpsError]
) -> None:
    proxy.always = faults.reply(200, body, content_type="application/xml")
    with pytest.raises(kind):
        list(through(proxy).list())


def test_a_store_that_moved_is_an_error_with_its_words(proxy: FaultyProxy, through: Callable[..., S3Store]) -> None:
    proxy.always = faults.error(301, "PermanentRedirect", "must be addressed using the specified endpoint")
    with pytest.raises(OpsError, match="PermanentRedirect must be addressed"):
        through(proxy).get("a")


def test_many_threads_share_a_store(store: S3Store) -> None:
    def turn(number: int) -> bool:
        body = str(number).encode() * 100
        store.put(f"t/{number}", body)
        return store.get(f"t/{number}") == body

    with ThreadPoolExecutor(24) as pool:  # more than it has connections
        assert all(pool.map(turn, range(120)))


# The signature. The examples are those of the Amazon S3 documentation, "Authenticating Requests (AWS Signature Version 4)".

EXAMPLE = S3Settings(
    endpoint="https://s3.amazonaws.com",
    bucket="examplebucket",
    access_key=Secret("AKIAIOSFODNN7EXAMPLE"),
    secret_key=Secret("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
    virtual=True,
)
EMPTY = hashlib.sha256(b"").hexdigest()


class FixedClock(SystemClock):
    def now(self) -> datetime:
        return datetime(2013, 5, 24, tzinfo=UTC)


@pytest.mark.parametrize(
    ("method", "path", "query", "headers", "payload", "signature"),
    [
        ("GET", "/test.txt", "", {"range": "bytes=0-9"}, EMPTY, "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"),
        ("PUT", "/test%24file.text", "", {"date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY"},
         hashlib.sha256(b"Welcome to Amazon S3.").hexdigest(), "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"),
        ("GET", "/", "lifecycle=", {}, EMPTY, "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
        ("GET", "/", "max-keys=2&prefix=J", {}, EMPTY, "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
    ],
    ids=["get a range", "put", "get a setting", "list"],
)  # fmt: skip
def test_the_published_examples_are_signed_as_published(
    method: str, path: str, query: str, headers: dict[str, str], payload: str, signature: str
) -> None:
    signed = S3Store(EXAMPLE, clock=FixedClock())._sign(method, path, query, dict(headers), payload)
    assert signed["authorization"].endswith(f", Signature={signature}")
    assert signed["authorization"].startswith(
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, SignedHeaders="
    )


class Recorder:
    """Stands in for the connection pool: what would be sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, dict[str, str]]] = []

    def request(self, method: str, url: str, *, headers: dict[str, str], **_: Any) -> Any:
        self.sent.append((method, url, headers))
        return SimpleNamespace(status=200, headers={}, data=b"<x/>")


def _sent(settings: S3Settings, ask: Callable[[S3Store], Any]) -> tuple[str, str, dict[str, str]]:
    store = S3Store(settings, clock=FixedClock())
    recorder = store._pool = Recorder()  # type: ignore[assignment]
    ask(store)
    return recorder.sent[0]


@pytest.mark.parametrize("virtual", [True, False])
def test_the_bucket_stands_in_the_host_or_in_the_path(virtual: bool) -> None:
    example = replace(EXAMPLE, virtual=virtual, prefix="/pre/fix/", session_token=Secret("session-token"))
    host, base = ("examplebucket.s3.amazonaws.com", "/") if virtual else ("s3.amazonaws.com", "/examplebucket/")
    _, url, headers = _sent(example, lambda store: store.get("a b"))
    assert (urlsplit(url).netloc, urlsplit(url).path, headers["host"]) == (host, f"{base}pre/fix/a%20b", host)
    assert headers["x-amz-security-token"] == "session-token"
    assert "x-amz-security-token" in headers["authorization"]
    _, url, _ = _sent(example, lambda store: list(store.list("x")))
    assert urlsplit(url).path == (base if virtual else base.rstrip("/"))
    assert "prefix=pre%2Ffix%2Fx" in urlsplit(url).query


@settings(max_examples=60, deadline=None)
@given(
    key=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30).filter(
        lambda text: {"", ".", ".."}.isdisjoint(text.split("/"))
    ),
    prefix=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
    virtual=st.booleans(),
)
def test_every_request_is_signed_as_botocore_signs_it(key: str, prefix: str, virtual: bool) -> None:
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    for method, url, headers in (
        _sent(replace(EXAMPLE, virtual=virtual), lambda store: store.get(key, start=3)),
        _sent(replace(EXAMPLE, virtual=virtual), lambda store: list(store.list(prefix))),
    ):
        request = AWSRequest(method, url, {k: v for k, v in headers.items() if k not in ("authorization",)})
        request.context["timestamp"] = "20130524T000000Z"
        signer = S3SigV4Auth(Credentials(EXAMPLE.access_key.reveal(), EXAMPLE.secret_key.reveal()), "s3", "us-east-1")
        expected = signer.signature(signer.string_to_sign(request, signer.canonical_request(request)), request)
        assert headers["authorization"].endswith(f"Signature={expected}")


# Secrets


def test_no_error_log_or_repr_shows_the_keys(
    ground: Ground,
    proxy: FaultyProxy,
    through: Callable[..., S3Store],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    caplog.set_level(logging.DEBUG)
    token = Secret("session-token-that-nobody-may-see")
    store = through(proxy, session_token=token, retries=1)
    hidden = [secret.reveal() for secret in (store._settings.access_key, store._settings.secret_key, token)]
    texts = [repr(store._settings), repr(store), store.name]
    trouble: list[faults.Fault] = [
        faults.error(403, "AccessDenied"), faults.error(503, "SlowDown"), faults.error(404, "NoSuchKey"), faults.reset_in_the_request,
        faults.reply(200, b"no xml"), faults.error(400, "InvalidArgument"),
    ]  # fmt: skip
    for fault in trouble:
        proxy.always = fault
        for ask in (lambda: store.put("a", b"x"), lambda: store.get("a"), lambda: list(store.list())):
            try:
                ask()
            except OpsError as error:
                texts += [str(error), repr(error), "".join(traceback.format_exception(error))]
    assert len(texts) > 15
    everything = "\n".join([*texts, caplog.text])
    assert "/tests/" in caplog.text  # the library does log the requests
    assert [name for name in hidden if name in everything] == []
