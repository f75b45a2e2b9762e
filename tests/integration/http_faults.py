"""A small HTTP proxy in front of a real server, which does to single requests what networks and stores do on bad days.

`proxy.faults` holds what happens to the next requests, in order (None lets one pass); with none left everything passes.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


Fault = Callable[["_Handler"], None]


@dataclass
class FaultyProxy:
    """Listens on a free port of 127.0.0.1; `certificate` (chain, key) makes it speak TLS. Without `port` nothing passes.

    `upstream`: how the real server is spoken to where that one speaks TLS.
    """

    port: int | None
    certificate: tuple[Path, Path] | None = None
    upstream: ssl.SSLContext | None = None
    faults: deque[Fault | None] = field(default_factory=deque)
    always: Fault | None = None
    seen: list[Request] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> FaultyProxy:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.proxy = self  # type: ignore[attr-defined]
        self._server.daemon_threads = True
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self.certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self._server.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def proxy(self) -> FaultyProxy:
        return self.server.proxy  # type: ignore[attr-defined]

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ssl.SSLError):
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing: the tests look at `seen`."""

    def any_method(self) -> None:
        fault = self.proxy.faults.popleft() if self.proxy.faults else self.proxy.always
        (fault or passing)(self)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = do_PATCH = any_method

    def take(self) -> Request:
        """The whole request."""
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        request = Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
        self.proxy.seen.append(request)
        return request

    def forward(self, request: Request) -> Answer:
        with self.ask(request) as found:
            return Answer(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())

    @contextmanager
    def ask(self, request: Request) -> Iterator[http.client.HTTPResponse]:
        """The real server's answer, of which only the head has been read."""
        assert self.proxy.port is not None, "nothing passes here"
        if self.proxy.upstream is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.proxy.port, timeout=20)
        else:
            connection = http.client.HTTPSConnection(
                "127.0.0.1", self.proxy.port, timeout=20, context=self.proxy.upstream
            )
        try:
            connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                connection.putheader(name, value)
            connection.endheaders(request.body)
            yield connection.getresponse()
        finally:
            connection.close()

    def answer(self, answer: Answer, *, only: int | None = None) -> None:
        """`only`: promise everything, send that many bytes, and hang up."""
        headers = {
            k: v for k, v in answer.headers.items() if k not in ("transfer-encoding", "connection", "date", "server")
        }
        if self.command != "HEAD":
            headers["content-length"] = str(len(answer.body))
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:only])
        if only is not None:
            self.hang_up()

    def hang_up(self) -> None:
        """At once and without a goodbye, as a crashed peer does: a reset, over TLS an end that nobody announced."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.socket(fileno=self.connection.detach()).close()  # detached, so that TLS says no goodbye either


def passing(handler: _Handler) -> None:
    handler.answer(handler.forward(handler.take()))


def streaming(lines: int | None = None) -> Fault:
    """Hands on line by line as they come; hangs up after so many."""

    def fault(handler: _Handler) -> None:
        request = handler.take()
        with handler.ask(request) as found:
            handler.send_response(found.status)
            handler.send_header("content-type", found.headers.get("content-type", "application/json"))
            handler.send_header("connection", "close")
            handler.end_headers()
            sent = 0
            while sent != lines and (line := found.readline()):
                handler.wfile.write(line)
                handler.wfile.flush()
                sent += 1
        if lines is not None and sent == lines:
            handler.hang_up()
        handler.close_connection = True

    return fault


def error(status: int, code: str, message: str = "said the test") -> Fault:
    """An S3 error instead of an answer."""

    def fault(handler: _Handler) -> None:
        handler.take()
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        handler.answer(Answer(status, {"content-type": "application/xml"}, body if status >= 300 else b""))

    return fault


def reply(status: int, body: bytes, **headers: str) -> Fault:
    def fault(handler: _Handler) -> None:
        handler.take()
        handler.answer(Answer(status, {name.replace("_", "-"): value for name, value in headers.items()}, body))

    return fault


def reset_in_the_request(handler: _Handler) -> None:
    """Reads a part of what is sent, then hangs up."""
    handler.rfile.read(min(1000, int(handler.headers.get("content-length") or 0)))
    handler.proxy.seen.append(Request(handler.command, handler.path, {}, b""))
    handler.hang_up()


def lose_the_answer(handler: _Handler) -> None:
    """The server did what was asked; nobody hears of it."""
    handler.forward(handler.take())
    handler.hang_up()


def cut_the_answer(handler: _Handler) -> None:
    answer = handler.forward(handler.take())
    handler.answer(answer, only=len(answer.body) // 2)


def never_answer(handler: _Handler) -> None:
    handler.take()
    handler.proxy.released.wait(30)
    handler.hang_up()


def change_request(change: Callable[[Request], Request]) -> Fault:
    return lambda handler: handler.answer(handler.forward(change(handler.take())))


def change_answer(change: Callable[[Answer], Answer]) -> Fault:
    return lambda handler: handler.answer(change(handler.forward(handler.take())))
