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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote, urlsplit
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
)
from ops_platform.inventory.values import Secret

_SAFE = "-._~"
_EMPTY_SHA = hashlib.sha256(b"").hexdigest()
_RETRY_CODES = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "ThrottlingException"}
_SKEW = timedelta(minutes=5)


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

    def put(self, key: str, body: bytes | memoryview, *, if_absent: bool = False, retain: bool = False) -> ObjectInfo:
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
        headers: dict[str, str] = {}
        if start is not None or length is not None:
            begin = start or 0
            headers["range"] = f"bytes={begin}-" + ("" if length is None else str(begin + length - 1))
        answer = self._call("GET", key, headers=headers)
        if answer.status == 416:
            return b""
        self._ok(answer, key)
        return answer.body

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
        for page in self._pages(query, "continuation-token", "NextContinuationToken"):
            for item in page.findall("Contents"):
                key = _unquote(_text(item, "Key"))
                modified = datetime.fromisoformat(_text(item, "LastModified"))
                yield ObjectInfo(
                    key[len(self._prefix) :], int(_text(item, "Size")), modified, _text(item, "ETag").strip('"')
                )

    def list_folders(self, prefix: str = "") -> Iterator[str]:
        whole = self._prefix + prefix
        query = {"list-type": "2", "prefix": whole, "delimiter": "/", "encoding-type": "url"}
        for page in self._pages(query, "continuation-token", "NextContinuationToken"):
            for item in page.findall("CommonPrefixes"):
                yield _unquote(_text(item, "Prefix"))[len(whole) :].rstrip("/")

    def delete(self, key: str) -> DeleteOutcome:
        info = self.head(key)
        if info is None:
            return DeleteOutcome.MISSING
        retention = self.retention(key) if self._settings.lock else None
        if retention and retention.until > self._clock.now():
            return DeleteOutcome.PINNED
        version = self._version(key) if self._settings.lock else None
        answer = self._call("DELETE", key, query={"versionId": version} if version else None)
        if answer.status == 403 and _is_lock(answer):
            return DeleteOutcome.PINNED
        self._ok(answer, key)
        return DeleteOutcome.DELETED

    def retention(self, key: str) -> Retention | None:
        answer = self._call("GET", key, query={"retention": ""})
        if answer.status in (400, 404, 405, 501):
            return None
        self._ok(answer, key)
        page = _parse(answer.body, self._where(key))
        mode, until = page.findtext("Mode"), page.findtext("RetainUntilDate")
        return Retention(mode, datetime.fromisoformat(until)) if mode and until else None

    def incomplete_uploads(self, prefix: str = "") -> Iterator[tuple[str, str, datetime]]:
        query = {"uploads": "", "prefix": self._prefix + prefix}
        for page in self._pages(query, "key-marker", "NextKeyMarker"):
            for item in page.findall("Upload"):
                begun = datetime.fromisoformat(_text(item, "Initiated"))
                yield _text(item, "Key")[len(self._prefix) :], _text(item, "UploadId"), begun

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
        self.put(probe, b"probe")
        self.get(probe)
        self.delete(probe)
        skew = 0.0
        answer = self._call("HEAD", None)
        if stamp := answer.headers.get("date"):
            skew = (email.utils.parsedate_to_datetime(stamp) - self._clock.now()).total_seconds()
        versioning = self._bucket_setting("versioning", "Status") or "off"
        return {
            "bucket": self._settings.bucket,
            "versioning": versioning,
            "object_lock": self._bucket_setting("object-lock", "ObjectLockEnabled") or "off",
            "clock_skew_seconds": round(skew, 1),
        }

    # What stands below

    def _bucket_setting(self, which: str, element: str) -> str | None:
        answer = self._call("GET", None, query={which: ""})
        return _parse(answer.body, self.name).findtext(element) if answer.status == 200 else None

    def _version(self, key: str) -> str | None:
        """The newest version's id: on a bucket with Object Lock a plain delete would only add a marker and free nothing."""
        answer = self._call("HEAD", key)
        version = answer.headers.get("x-amz-version-id")
        return version if version and version != "null" else None

    def _bucket_is_there(self, key: str) -> None:
        """HEAD has no body that would tell a missing key from a missing bucket."""
        if self._call("HEAD", None).status == 404:
            raise _no_bucket(self._settings.bucket, self._where(key))

    def _pages(self, query: dict[str, str], ask: str, found: str) -> Iterator[ElementTree.Element]:
        while True:
            answer = self._call("GET", None, query=query)
            self._ok(answer, None)
            page = _parse(answer.body, self.name)
            yield page
            token = page.findtext(found)
            if page.findtext("IsTruncated") != "true" or not token:
                return
            query = {**query, ask: token}

    def _where(self, key: str | None) -> str:
        return f"{self.name}: {key}" if key else self.name

    def _call(
        self,
        method: str,
        key: str | None,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | memoryview = b"",
    ) -> _Answer:
        """One request with retries. The last answer is returned whatever its status; no answer at all raises."""
        path = "/" + "/".join(quote(part, safe=_SAFE) for part in self._path(key).split("/"))
        for attempt in range(1, self._settings.retries + 2):
            try:
                answer = self._once(method, path, query or {}, dict(headers or {}), body, attempt)
            except urllib3.exceptions.SSLError as error:
                raise UnreachableError(
                    f"TLS with the store failed: {_reason(error)}",
                    where=self._where(key),
                    remedy="set ca to the PEM file of the store's CA",
                ) from error
            except urllib3.exceptions.HTTPError as error:
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
        inside = "" if key is None else self._prefix + key
        return (
            inside
            if self._settings.virtual
            else f"{self._settings.bucket}/{inside}"
            if key is not None
            else self._settings.bucket
        )

    def _once(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        headers: dict[str, str],
        body: bytes | memoryview,
        attempt: int,
    ) -> _Answer:
        payload = "UNSIGNED-PAYLOAD" if self._tls and body else hashlib.sha256(body).hexdigest() if body else _EMPTY_SHA
        text = "&".join(f"{quote(k, safe=_SAFE)}={quote(v, safe=_SAFE)}" for k, v in sorted(query.items()))
        signed = self._sign(method, path, text, headers, payload)
        url = self._base + path + (f"?{text}" if text else "")
        response = self._pool.request(
            method, url, headers=signed, body=bytes(body) if method == "PUT" else None, preload_content=True
        )
        found = {k.lower(): v for k, v in response.headers.items()}
        data = response.data
        if (
            method == "GET"
            and response.status < 300
            and "content-length" in found
            and int(found["content-length"]) != len(data)
        ):
            raise urllib3.exceptions.IncompleteRead(len(data), int(found["content-length"]) - len(data))
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
            raise AccessDeniedError(*self._denied(answer, said), where=where)
        if answer.status >= 500 or answer.status == 429:
            raise UnreachableError(
                f"the store refused {answer.tries} tries: {said}", where=where, remedy="look at the store's health"
            )
        raise OpsError(f"the store answered {said}", where=where)

    def _denied(self, answer: _Answer, said: str) -> tuple[str]:
        stamp = answer.headers.get("date")
        skew = email.utils.parsedate_to_datetime(stamp) - self._clock.now() if stamp else timedelta(0)
        if answer.code == "RequestTimeTooSkewed" or abs(skew) > _SKEW:
            return (
                f"the store refuses the signature: this machine's clock is {abs(skew.total_seconds()):.0f} s off; set it by NTP",
            )
        return (f"the store refuses access: {said}; check the access key and its policy",)


def _no_bucket(bucket: str, where: str) -> NotThereError:
    return NotThereError(
        f"there is no bucket {bucket!r}", where=where, remedy="create it, or correct `bucket` in the inventory"
    )


def _is_lock(answer: _Answer) -> bool:
    text = f"{answer.code} {answer.message}".lower()
    return any(word in text for word in ("lock", "retention", "worm", "legal hold", "protected"))


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


def _unquote(text: str) -> str:
    from urllib.parse import unquote_plus

    return unquote_plus(text)
