"""Object storage over the S3 REST API: SigV4 on urllib3, nothing more than backups need.

boto3 would do the same for a third more CPU per gigabyte (measured in docs/benchmarks.md), and CPU is what a backup spends.
Signature: AWS "Signature Version 4"; payloads are unsigned over TLS (the transport protects them) and signed over plain HTTP.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import random
import secrets
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, cast
from urllib.parse import quote, unquote_plus, urlsplit
from xml.etree import ElementTree

import urllib3

from ops_platform.clients.objectstore import DeleteOutcome, ObjectInfo, Retention
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import (
    AccessDeniedError,
    ConflictError,
    CorruptionError,
    NotThereError,
    OpsError,
    UnreachableError,
    UsageError,
)
from ops_platform.inventory.values import Secret

_SAFE = "-._~"
_EMPTY_SHA = hashlib.sha256(b"").hexdigest()
# BadDigest: what arrived is not what was sent; sent again it may be.
_RETRY_CODES = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "ThrottlingException", "BadDigest"}
_ENCODED = {"Key", "Prefix", "NextKeyMarker"}  # what `encoding-type=url` concerns; ids and tokens stay as they are
_SKEW = timedelta(minutes=15)  # S3's own limit for the age of a signature


@dataclass(frozen=True)
class Lock:
    """Object Lock that `retain` puts on an object: mode as S3 names it, and for how long from now."""

    mode: str
    retain: timedelta


@dataclass(frozen=True)
class S3Settings:
    endpoint: str
    bucket: str
    access_key: Secret
    secret_key: Secret
    session_token: Secret | None = None
    region: str = "us-east-1"
    prefix: str = ""
    virtual: bool = False
    ca: str | None = None
    timeout: float = 30.0
    retries: int = 5
    connections: int = 16
    lock: Lock | None = None


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes
    tries: int
    code: str = field(default="")
    message: str = field(default="")


class S3Store:
    """An `ObjectStore` in a bucket. Safe for threads; times out; retries what may be retried with back-off and jitter."""

    def __init__(self, settings: S3Settings, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._settings = settings
        self._clock = clock
        parts = urlsplit(settings.endpoint)
        self._tls = parts.scheme == "https"
        self._host = f"{settings.bucket}.{parts.netloc}" if settings.virtual else parts.netloc
        self._base = f"{parts.scheme}://{self._host}"
        self._prefix = f"{settings.prefix.strip('/')}/" if settings.prefix.strip("/") else ""
        tls: dict[str, Any] = {"cert_reqs": "CERT_REQUIRED", "ca_certs": settings.ca} if settings.ca else {}
        self._pool = urllib3.PoolManager(
            maxsize=settings.connections,
            block=True,
            retries=False,
            timeout=urllib3.Timeout(connect=min(settings.timeout, 10), read=settings.timeout),
            **tls,
        )

    @property
    def name(self) -> str:
        return f"s3://{self._settings.bucket}/{self._prefix.rstrip('/')} at {urlsplit(self._settings.endpoint).netloc}"

    def close(self) -> None:
        self._pool.clear()

    # Objects

    def put(
        self, key: str, body: bytes | bytearray | memoryview, *, if_absent: bool = False, retain: bool = False
    ) -> ObjectInfo:
        digest = hashlib.md5(body, usedforsecurity=False)
        headers = {
            "content-md5": base64.b64encode(digest.digest()).decode(),
            "content-type": "application/octet-stream",
        }
        if if_absent:
            headers["if-none-match"] = "*"
        if retain and (lock := self._settings.lock):
            headers["x-amz-object-lock-mode"] = lock.mode
            headers["x-amz-object-lock-retain-until-date"] = f"{self._clock.now() + lock.retain:%Y-%m-%dT%H:%M:%SZ}"
        answer = self._call("PUT", key, headers=headers, body=body)
        if answer.status in (409, 412) and if_absent:
            # An earlier try of ours may have arrived although its answer did not.
            if answer.tries > 1 and self.get(key) == bytes(body):
                return ObjectInfo(key, len(body), self._clock.now(), digest.hexdigest())
            raise ConflictError("this object exists already", where=self._where(key))
        self._ok(answer, key)
        etag = answer.headers.get("etag", "").strip('"')
        # A multipart-like or encrypted etag is no MD5; then the size check of the listing has to do.
        if (
            len(etag) == 32
            and "-" not in etag
            and "x-amz-server-side-encryption" not in answer.headers
            and etag != digest.hexdigest()
        ):
            raise CorruptionError(
                f"the store confirms other bytes (etag {etag}) than were sent", where=self._where(key)
            )
        return ObjectInfo(key, len(body), self._clock.now(), etag)

    def get(self, key: str, *, start: int | None = None, length: int | None = None) -> bytes:
        if start is None and length is None:
            answer = self._call("GET", key)
            self._ok(answer, key)
            return answer.body
        begin = start or 0
        if length == 0:
            return b""
        end = None if length is None else begin + length
        answer = self._call("GET", key, headers={"range": f"bytes={begin}-" + ("" if end is None else str(end - 1))})
        if answer.status == 416:
            return b""
        self._ok(answer, key)
        # A store or a proxy that knows no ranges answers 200 with everything.
        return answer.body if answer.status == 206 else answer.body[begin:end]

    def head(self, key: str) -> ObjectInfo | None:
        answer = self._call("HEAD", key)
        if answer.status == 404:
            self._bucket_is_there(key)
            return None
        self._ok(answer, key)
        modified = email.utils.parsedate_to_datetime(
            answer.headers.get("last-modified", "Thu, 01 Jan 1970 00:00:00 GMT")
        )
        return ObjectInfo(
            key, int(answer.headers.get("content-length", "0")), modified, answer.headers.get("etag", "").strip('"')
        )

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        query = {"list-type": "2", "prefix": self._prefix + prefix, "encoding-type": "url"}
        if start_after:
            query["start-after"] = self._prefix + start_after
        for page in self._pages(query, {"continuation-token": "NextContinuationToken"}):
            for item in page.findall("Contents"):
                yield ObjectInfo(
                    _key(page, item, "Key")[len(self._prefix) :],
                    int(_text(item, "Size")),
                    datetime.fromisoformat(_text(item, "LastModified")),
                    _text(item, "ETag").strip('"'),
                )

    def list_folders(self, prefix: str = "") -> Iterator[str]:
        whole = self._prefix + prefix
        query = {"list-type": "2", "prefix": whole, "delimiter": "/", "encoding-type": "url"}
        for page in self._pages(query, {"continuation-token": "NextContinuationToken"}):
            for item in page.findall("CommonPrefixes"):
                yield _key(page, item, "Prefix")[len(whole) :].rstrip("/")

    def delete(self, key: str) -> DeleteOutcome:
        if self.head(key) is None:
            return DeleteOutcome.MISSING
        if not self._settings.lock:
            self._ok(self._call("DELETE", key), key)
            return DeleteOutcome.DELETED
        if self._is_retained(key):
            return DeleteOutcome.PINNED
        # A plain delete on a bucket with Object Lock would only add a marker and free nothing, and the newest version
        # alone would bring the one before it back.
        outcome = DeleteOutcome.DELETED
        for version in list(self._versions(key)):
            answer = self._call("DELETE", key, query={"versionId": version})
            if answer.status == 403 and (_is_lock(answer) or self._is_retained(key, version)):
                outcome = DeleteOutcome.PINNED
            elif answer.status != 404:
                self._ok(answer, key)
        return outcome

    def _is_retained(self, key: str, version: str | None = None) -> bool:
        """By a date that has not come or by a legal hold: some stores refuse for both with a bare AccessDenied."""
        retention = self._retention(key, version)
        if retention and retention.until > self._clock.now():
            return True
        answer = self._call("GET", key, query={"legal-hold": ""} | ({"versionId": version} if version else {}))
        return answer.status == 200 and _parse(answer.body, self._where(key)).findtext("Status") == "ON"

    def _versions(self, key: str) -> Iterator[str]:
        """Every version and marker of a key, the newest first."""
        query = {"versions": "", "prefix": self._prefix + key}
        markers = {"key-marker": "NextKeyMarker", "version-id-marker": "NextVersionIdMarker"}
        for page in self._pages(query, markers):
            for item in (*page.findall("Version"), *page.findall("DeleteMarker")):
                if _key(page, item, "Key") == self._prefix + key:
                    yield _text(item, "VersionId")
            if any(_key(page, item, "Key") != self._prefix + key for item in page.findall("Version")):
                return  # longer keys follow the key itself

    def retention(self, key: str) -> Retention | None:
        return self._retention(key, None)

    def _retention(self, key: str, version: str | None) -> Retention | None:
        answer = self._call("GET", key, query={"retention": ""} | ({"versionId": version} if version else {}))
        if answer.status in (400, 404, 405, 501) and answer.code != "NoSuchBucket":
            return None
        self._ok(answer, key)
        page = _parse(answer.body, self._where(key))
        mode, until = page.findtext("Mode"), page.findtext("RetainUntilDate")
        return Retention(mode, datetime.fromisoformat(until)) if mode and until else None

    def incomplete_uploads(self, prefix: str = "") -> Iterator[tuple[str, str, datetime]]:
        # Without encoding-type: some stores answer that they encode these keys, and do not.
        query = {"uploads": "", "prefix": self._prefix + prefix}
        markers = {"key-marker": "NextKeyMarker", "upload-id-marker": "NextUploadIdMarker"}
        for page in self._pages(query, markers):
            for item in page.findall("Upload"):
                begun = datetime.fromisoformat(_text(item, "Initiated"))
                yield _key(page, item, "Key")[len(self._prefix) :], _text(item, "UploadId"), begun

    def abort_upload(self, key: str, upload_id: str) -> None:
        answer = self._call("DELETE", key, query={"uploadId": upload_id})
        if answer.status != 404:
            self._ok(answer, key)

    def create_bucket(self, *, object_lock: bool = False) -> None:
        """Make the bucket unless it is there already. Used by the local stack and by tests."""
        headers = {"x-amz-bucket-object-lock-enabled": "true"} if object_lock else {}
        answer = self._call("PUT", None, headers=headers)
        if answer.status != 409:
            self._ok(answer, None)

    def check(self) -> dict[str, object]:
        """Reads, writes and deletes a probe object; says what the bucket can do. Raises as every other call does."""
        probe = f".ops-probe-{secrets.token_hex(6)}"
        # Asked first: there are stores that make a bucket by the way when something is put into it.
        self._bucket_is_there(probe)
        self.put(probe, b"probe")
        self.get(probe)
        self.delete(probe)
        skew = 0.0
        answer = self._call("HEAD", None)
        if stamp := answer.headers.get("date"):
            skew = (email.utils.parsedate_to_datetime(stamp) - self._clock.now()).total_seconds()
        return {
            "bucket": self._settings.bucket,
            "versioning": self._bucket_setting("versioning", "Status"),
            "object_lock": self._bucket_setting("object-lock", "ObjectLockEnabled"),
            "clock_skew_seconds": round(skew, 1),
        }

    # What stands below

    def _bucket_setting(self, which: str, element: str) -> str:
        """`off` only where the store says so; a policy that does not let us ask is no answer."""
        answer = self._call("GET", None, query={which: ""})
        if answer.status == 200:
            return _parse(answer.body, self.name).findtext(element) or "off"
        return "off" if answer.status in (404, 501) else f"unknown ({answer.code or answer.status})"

    def _bucket_is_there(self, key: str) -> None:
        """HEAD has no body that would tell a missing key from a missing bucket."""
        answer = self._call("HEAD", None)
        if answer.status == 404:
            raise _no_bucket(self._settings.bucket, self._where(key))
        if answer.status >= 500:
            self._ok(answer, None)  # raises: nobody knows whether it is there

    def _pages(self, query: dict[str, str], markers: Mapping[str, str]) -> Iterator[ElementTree.Element]:
        """Page after page; `markers` says which parameter of the next call takes which element of the answer."""
        while True:
            answer = self._call("GET", None, query=query)
            self._ok(answer, None)
            page = _parse(answer.body, self.name)
            yield page
            found = {ask: _key(page, page, element) for ask, element in markers.items()}
            if page.findtext("IsTruncated") != "true":
                return
            after = query | {ask: value for ask, value in found.items() if value}
            if after == query:
                raise CorruptionError("the store says that there is more and not where it goes on", where=self.name)
            query = after

    def _where(self, key: str | None) -> str:
        return f"{self.name}: {key}" if key else self.name

    def _call(
        self,
        method: str,
        key: str | None,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | bytearray | memoryview = b"",
    ) -> _Answer:
        """One request with retries. The last answer is returned whatever its status; no answer at all raises."""
        path = "/" + "/".join(quote(part, safe=_SAFE) for part in self._path(key).split("/"))
        for attempt in range(1, self._settings.retries + 2):
            try:
                answer = self._once(method, path, query or {}, dict(headers or {}), body, attempt)
            except urllib3.exceptions.HTTPError as error:
                if isinstance(error, urllib3.exceptions.SSLError) and not _was_cut(error):
                    raise UnreachableError(
                        f"TLS with the store failed: {_reason(error)}",
                        where=self._where(key),
                        remedy="set ca to the PEM file of the store's CA",
                    ) from error
                if attempt > self._settings.retries:
                    raise UnreachableError(
                        f"the store did not answer in {attempt} tries: {_reason(error)}",
                        where=self._where(key),
                        remedy="check endpoint, network and the store's health; nothing was assumed about its content",
                    ) from error
            else:
                if answer.status < 500 and answer.status != 429 and answer.code not in _RETRY_CODES:
                    return answer
                if answer.status == 501 or attempt > self._settings.retries:
                    return answer
            self._clock.sleep(min(10.0, 0.1 * 2**attempt) * (0.5 + random.random() / 2))  # noqa: S311 - jitter
        raise AssertionError("the loop returns or raises")

    def _path(self, key: str | None) -> str:
        if key is not None and not {"", ".", ".."}.isdisjoint(key.split("/")):
            # The HTTP library and some stores fold such elements away: it would be another object, above the prefix even.
            raise UsageError("a key has no empty element, none that is . or ..", where=self._where(key))
        inside = "" if key is None else self._prefix + key
        if self._settings.virtual:
            return inside
        return self._settings.bucket if key is None else f"{self._settings.bucket}/{inside}"

    def _once(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        headers: dict[str, str],
        body: bytes | bytearray | memoryview,
        attempt: int,
    ) -> _Answer:
        payload = "UNSIGNED-PAYLOAD" if self._tls and body else hashlib.sha256(body).hexdigest() if body else _EMPTY_SHA
        text = "&".join(f"{quote(k, safe=_SAFE)}={quote(v, safe=_SAFE)}" for k, v in sorted(query.items()))
        signed = self._sign(method, path, text, headers, payload)
        url = self._base + path + (f"?{text}" if text else "")
        # It takes any buffer, without a copy, whatever it says of its types.
        sent = cast("bytes", body) if method == "PUT" else None
        # urllib3 itself refuses a body that is shorter than was announced.
        response = self._pool.request(method, url, headers=signed, body=sent, preload_content=True)
        found = {k.lower(): v for k, v in response.headers.items()}
        data = response.data
        code, message = _error_of(data) if response.status >= 300 and method != "HEAD" else ("", "")
        return _Answer(response.status, found, data, attempt, code, message)

    def _sign(self, method: str, path: str, query: str, headers: dict[str, str], payload: str) -> dict[str, str]:
        settings, now = self._settings, self._clock.now()
        stamp, day = f"{now:%Y%m%dT%H%M%SZ}", f"{now:%Y%m%d}"
        headers |= {"host": self._host, "x-amz-date": stamp, "x-amz-content-sha256": payload}
        if settings.session_token:
            headers["x-amz-security-token"] = settings.session_token.reveal()
        names = ";".join(sorted(headers))
        lines = "".join(f"{name}:{headers[name].strip()}\n" for name in sorted(headers))
        request = "\n".join([method, path, query, lines, names, payload])
        scope = f"{day}/{settings.region}/s3/aws4_request"
        to_sign = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(request.encode()).hexdigest()])
        key = b"AWS4" + settings.secret_key.reveal().encode()
        for part in (day, settings.region, "s3", "aws4_request"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        signature = hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
        credential = f"{settings.access_key.reveal()}/{scope}"
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders={names}, Signature={signature}"
        )
        return headers

    def _ok(self, answer: _Answer, key: str | None) -> None:
        """Raise the error that fits, with what to do."""
        if 200 <= answer.status < 300:
            return
        where, said = self._where(key), f"{answer.code or answer.status} {answer.message}".strip()
        if answer.status == 404:
            if answer.code == "NoSuchBucket":
                raise _no_bucket(self._settings.bucket, where)
            raise NotThereError(f"the store has no such object ({said})", where=where)
        if answer.status in (401, 403):
            raise self._denied(answer, said, where)
        if answer.status >= 500 or answer.status == 429:
            raise UnreachableError(
                f"the store refused {answer.tries} tries: {said}", where=where, remedy="look at the store's health"
            )
        raise OpsError(f"the store answered {said}", where=where)

    def _denied(self, answer: _Answer, said: str, where: str) -> AccessDeniedError:
        stamp = answer.headers.get("date")
        skew = abs(email.utils.parsedate_to_datetime(stamp) - self._clock.now()) if stamp else timedelta(0)
        if answer.code == "RequestTimeTooSkewed" or (not answer.code and skew > _SKEW):
            return AccessDeniedError(
                f"the store refuses the signature: this machine's clock is {skew.total_seconds():.0f} s off",
                where=where,
                remedy="set the clock by NTP",
            )
        if answer.code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"):
            remedy = "check the secrets that access_key, secret_key and session_token name, and `region`"
        else:
            remedy = "check the access key and its policy for that bucket"
        return AccessDeniedError(f"the store refuses access: {said}", where=where, remedy=remedy)


def _no_bucket(bucket: str, where: str) -> NotThereError:
    return NotThereError(
        f"there is no bucket {bucket!r}", where=where, remedy="create it, or correct `bucket` in the inventory"
    )


def _is_lock(answer: _Answer) -> bool:
    text = f"{answer.code} {answer.message}".lower()
    return any(word in text for word in ("lock", "retention", "worm", "legal hold", "protected"))


def _was_cut(error: urllib3.exceptions.SSLError) -> bool:
    """A TLS connection that ended in the middle, as against one that cannot be: a certificate that is not trusted."""
    cause = error.args[0] if error.args else None
    return isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError)


def _reason(error: BaseException) -> str:
    """The innermost cause, without addresses of objects."""
    inner = getattr(error, "reason", None) or error.__cause__ or error
    return f"{type(inner).__name__}: {inner}".split("object at 0x")[0].strip(" <(")


def _error_of(body: bytes) -> tuple[str, str]:
    try:
        page = _parse(body, "")
    except CorruptionError:
        return "", ""
    return page.findtext("Code") or "", page.findtext("Message") or ""


def _parse(body: bytes, where: str) -> ElementTree.Element:
    """XML without document types (so no entities), its namespace taken off."""
    if b"<!DOCTYPE" in body or b"<!ENTITY" in body:
        raise CorruptionError("the store's answer holds a document type; it is not read", where=where)
    try:
        root = ElementTree.fromstring(body)  # noqa: S314 - entities are refused above
    except ElementTree.ParseError as error:
        raise CorruptionError(f"the store's answer is not XML: {error}", where=where) from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def _text(element: ElementTree.Element, name: str) -> str:
    return element.findtext(name) or ""


def _key(page: ElementTree.Element, item: ElementTree.Element, name: str) -> str:
    """A key or a marker, decoded where the store says that it encoded them."""
    text = _text(item, name)
    return unquote_plus(text) if name in _ENCODED and page.findtext("EncodingType") == "url" else text
