"""One small way to speak to an HTTP API of the inventory: TLS with the CA that is named, login, a limit for time and for size.

No proxy of the environment and no redirect is followed: both would carry the login somewhere else.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote, urlencode, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, NewConnectionError, ProtocolError, SSLError

from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import AccessDeniedError, ConflictError, NotThereError, OpsError, UnreachableError, UsageError
from ops_platform.inventory.systems import HttpAuth
from ops_platform.inventory.values import Secret, SecretRef

LARGEST = 16 << 20
_PIECE = 1 << 16
_SAID = 200  # characters of an error's body that are shown
Scheme = Literal["Bearer", "ApiKey"]
Query = Mapping[str, str] | Sequence[tuple[str, str]]


class BadAnswerError(OpsError):
    """It answered, and not as its protocol says. Never to be read as "there is nothing"."""


@dataclass(frozen=True)
class Answer:
    """`headers` by their names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    where: str

    def json(self) -> Any:
        """Raises BadAnswerError for what is no JSON, NaN and half a document included."""
        import orjson

        try:
            return orjson.loads(self.body)
        except ValueError:
            kind = self.headers.get("content-type", "no content type")
            raise BadAnswerError(
                f"the answer is no JSON ({len(self.body)} bytes, {kind})",
                where=self.where,
                remedy="check that the address is the one of the API, and what stands in front of it",
            ) from None


@dataclass(frozen=True)
class Login:
    """How we show who we are. The secrets are resolved for each request, so that a rotated one is used at once."""

    auth: HttpAuth = field(default_factory=HttpAuth)
    resolve: Callable[[SecretRef], Secret] | None = None
    scheme: Scheme = "Bearer"

    def headers(self) -> tuple[dict[str, str], tuple[str, ...]]:
        """The header, and what of it must not be shown."""
        auth, resolve = self.auth, self.resolve
        if resolve is None or (auth.token is None and auth.password is None):
            return {}, ()
        if auth.token is not None:
            token = _header_value(resolve(auth.token), auth.token)
            return {"authorization": f"{self.scheme} {token}"}, (token,)
        password = resolve(auth.password).reveal() if auth.password is not None else ""
        basic = base64.b64encode(f"{auth.user}:{password}".encode()).decode()
        return {"authorization": f"Basic {basic}"}, (password, basic)


def _header_value(secret: Secret, ref: SecretRef) -> str:
    """http.client would say the value in its error."""
    value = secret.reveal()
    if not (value.isascii() and value.isprintable()):
        raise UsageError("this token holds characters that cannot stand in an HTTP header", where=str(ref))
    return value


class HttpApi:
    """The API at one address. Safe for threads.

    `request` raises UnreachableError (no answer in time, TLS, status 429 and 5xx), AccessDeniedError (401, 403), NotThereError (404),
    ConflictError (409), BadAnswerError (too large, not HTTP, a redirect), OpsError for any other status that was not asked for. No error
    shows a query, a header or a secret.
    """

    def __init__(
        self,
        url: str,
        what: str,
        *,
        login: Login | None = None,
        ca: str | None = None,
        timeout: float = 10.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.url = url.rstrip("/")
        self.what = what
        self._login = login or Login()
        self._timeout = timeout
        self.clock = clock
        tls: dict[str, Any] = {"ca_certs": ca} if ca else {}
        self.pool = urllib3.PoolManager(maxsize=4, retries=False, cert_reqs="CERT_REQUIRED", **tls)

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    def close(self) -> None:
        self.pool.clear()

    def get(self, path: str, query: Query = (), **more: Any) -> Answer:
        return self.request("GET", path, query, **more)

    def request(
        self,
        method: str,
        path: str,
        query: Query = (),
        *,
        body: Any = None,
        form: Query | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        largest: int = LARGEST,
        good: Sequence[int] = (200,),
    ) -> Answer:
        """`body` is sent as JSON, `form` as a form. `timeout`: seconds for the whole request, at most what the inventory says."""
        seconds = min(timeout, self._timeout) if timeout is not None else self._timeout
        until = self.clock.monotonic() + seconds
        shown, hidden = self._login.headers()
        sent = {"accept": "application/json", **shown, **(headers or {})}
        data: bytes | None = None
        if form is not None:
            data = urlencode(form).encode()
            sent["content-type"] = "application/x-www-form-urlencoded"
        elif body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            sent.setdefault("content-type", "application/json")
        url = self.url + quote(path, safe="/%:@,*_-.~") + (f"?{urlencode(query)}" if query else "")
        call = _Call(self, method, f"{self.host}{urlsplit(url).path}", until, largest)
        answer = call.run(url, data, sent)
        if answer.status not in good:
            raise self._refused(answer, hidden)
        return answer

    def _refused(self, answer: Answer, hidden: tuple[str, ...]) -> OpsError:
        said = " ".join(answer.body.decode(errors="replace").split())
        for secret in hidden:
            said = said.replace(secret, "***") if secret else said
        said = f"{answer.status} {said[:_SAID]}".strip()
        what, where = f"{self.what} answers {said}", answer.where
        if answer.status in (401, 403):
            return AccessDeniedError(what, where=where, remedy="check the login (`auth`) and what it may do")
        if answer.status == 404:
            return NotThereError(what, where=where, remedy="check the address and its path")
        if answer.status == 409:
            return ConflictError(what, where=where)
        if 300 <= answer.status < 400:
            return BadAnswerError(
                what, where=where, remedy="write the address to which it sends on: no redirect is followed"
            )
        if answer.status == 429 or answer.status >= 500:
            return UnreachableError(f"{self.what} cannot answer: {said}", where=where, remedy="look at its own log")
        return OpsError(what, where=where)


@dataclass(frozen=True)
class _Call:
    """One request, to its end or to its deadline, whatever the server does in between."""

    api: HttpApi
    method: str
    where: str
    until: float
    largest: int

    def run(self, url: str, data: bytes | None, headers: dict[str, str]) -> Answer:
        try:
            try:
                return self._once(url, data, headers)
            except ProtocolError:
                # A kept connection that the server has just closed. What changes nothing may be asked again.
                if self.method != "GET" or self._left() <= 0:
                    raise
                return self._once(url, data, headers)
        except HTTPError as error:
            raise self._named(error) from None

    def _once(self, url: str, data: bytes | None, headers: dict[str, str]) -> Answer:
        left = max(self._left(), 0.001)
        response = self.api.pool.request(
            self.method,
            url,
            body=data,
            headers=headers,
            redirect=False,
            preload_content=False,
            decode_content=False,
            timeout=urllib3.Timeout(total=left),
        )
        done = False
        try:
            body = self._read(response)
            done = True
        finally:
            if done:
                response.release_conn()
            else:
                response.close()
        return Answer(response.status, {k.lower(): v for k, v in response.headers.items()}, body, self.where)

    def _read(self, response: urllib3.BaseHTTPResponse) -> bytes:
        """Piece by piece: a server that dribbles would get a new time limit with each of its bytes."""
        body = bytearray()
        while piece := response.read1(_PIECE):
            body += piece
            if len(body) > self.largest:
                raise BadAnswerError(
                    f"the answer is larger than {self.largest} bytes",
                    where=self.where,
                    remedy="raise the limit if that is right",
                )
            if self._left() <= 0:
                raise self._late()
        return bytes(body)

    def _left(self) -> float:
        return self.until - self.api.clock.monotonic()

    def _late(self) -> UnreachableError:
        return UnreachableError(
            f"{self.api.what} did not answer in time",
            where=self.where,
            remedy="look whether it is overloaded, or raise `timeout`",
        )

    def _named(self, error: HTTPError) -> OpsError:
        cause = error
        if isinstance(cause, NewConnectionError):
            return self._away("no connection")
        if isinstance(cause, SSLError) or isinstance(getattr(cause, "reason", None), SSLError):
            return UnreachableError(
                f"TLS with {self.api.what} failed: {_tls_reason(error)}",
                where=self.where,
                remedy="set `ca` to the PEM file of its certificate authority, and check that the address is the certificate's name",
            )
        if isinstance(cause, urllib3.exceptions.TimeoutError):
            return self._late()
        return self._away(type(error).__name__)

    def _away(self, why: str) -> UnreachableError:
        return UnreachableError(
            f"{self.api.what} does not answer: {why}",
            where=self.where,
            remedy="check address, network and whether it runs",
        )


def _tls_reason(error: Exception) -> str:
    """OpenSSL's words, which hold no secret, without the place in its source."""
    text = " ".join(str(error).split())
    return text.partition("] ")[2].partition(" (_ssl")[0] or text[:_SAID]
