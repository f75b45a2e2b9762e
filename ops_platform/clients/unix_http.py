"""HTTP over a unix socket, for `requests`: how a server is reached that is alone in a network of its own."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool


class _Connection(HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout if isinstance(self.timeout, int | float) else None)
        self.sock.connect(str(self._path))


class _Pool(HTTPConnectionPool):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost")
        self._path, self._seconds = path, timeout

    def _new_conn(self) -> Any:
        return _Connection(self._path, self._seconds)


class _Adapter(HTTPAdapter):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__()
        self._pool = _Pool(path, timeout)

    def get_connection_with_tls_context(self, *_: Any, **__: Any) -> Any:
        return self._pool

    def request_url(self, request: Any, proxies: Any) -> str:
        return str(request.path_url)

    def close(self) -> None:
        self._pool.close()


def unix_session(path: Path, *, timeout: float = 60.0) -> requests.Session:
    """A session whose every request goes to that socket, whatever host it names. Nothing of the environment counts."""
    session = requests.Session()
    session.trust_env = False
    session.mount("http://", _Adapter(path, timeout))
    return session
