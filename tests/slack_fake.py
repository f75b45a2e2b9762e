"""Slack over HTTP as its documentation describes chat.postMessage and auth.test: what cannot run here. Strict where Slack is strict."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

TOKEN = "xoxb-1234-secret-of-the-bot"


class SlackApi:
    """`failures` are given one after the other before it answers well: an error's name, or a status with its headers."""

    def __init__(self, channels: tuple[str, ...] = ("#incidents", "#team")) -> None:
        self.channels = channels
        self.failures: list[str | tuple[int, dict[str, str]]] = []
        self.messages: list[dict[str, Any]] = []
        self._numbers = count(1)
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, headers, answer = fake.answer(self.path, dict(self.headers.items()), body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {
                    **headers,
                    "Content-Type": "application/json",
                    "Content-Length": str(len(data)),
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], dict[str, Any]]:
        if path not in ("/api/chat.postMessage", "/api/auth.test"):
            return 404, {}, {"ok": False, "error": "unknown_method"}
        if self.failures:
            failure = self.failures.pop(0)
            return (*failure, {"ok": False, "error": "ratelimited"}) if isinstance(failure, tuple) else _error(failure)
        if {k.lower(): v for k, v in headers.items()}.get("authorization") != f"Bearer {TOKEN}":
            return _error("invalid_auth")
        if path == "/api/auth.test":
            return 200, {}, {"ok": True, "url": "https://t.slack.com/", "team": "Tests", "user": "ops", "bot_id": "B0"}
        try:
            message = json.loads(body)
        except ValueError:
            return _error("invalid_json")
        return self._judged(message)

    def _judged(self, message: dict[str, Any]) -> tuple[int, dict[str, str], dict[str, Any]]:
        if message.get("channel") not in self.channels:
            return _error("channel_not_found")
        if not message.get("text"):
            return _error("no_text")
        texts = [block["text"]["text"] for block in message.get("blocks", []) if block["type"] == "section"]
        if len(message.get("blocks", [])) > 50 or any(not text or len(text) > 3000 for text in texts):
            return _error("invalid_blocks")
        thread = message.get("thread_ts")
        if thread is not None and thread not in [one["ts"] for one in self.messages]:
            return _error("thread_not_found")
        ts = f"1770000000.{next(self._numbers):06}"
        self.messages.append({**message, "ts": ts})
        return 200, {}, {"ok": True, "channel": "C0000", "ts": ts, "message": {"text": message["text"]}}


def _error(name: str) -> tuple[int, dict[str, str], dict[str, Any]]:
    return 200, {}, {"ok": False, "error": name}


def words(message: dict[str, Any]) -> str:
    """All that a person reads of a message."""
    found: list[str] = []
    for block in message["blocks"]:
        if block["type"] == "section":
            found.append(block["text"]["text"])
        found += [element.get("text", "") for element in block.get("elements", []) if block["type"] == "context"]
    return "\n".join(found)
