"""The data checks of a verification: a suite of Great Expectations, evaluated on the restored server.

`SuiteRunner` starts a child process that imports Great Expectations (8 s, 240 MB) while the restore is still going on, and gives
it its one request when the server is there. A child that dies, hangs or says less than it was asked proves nothing.
"""

from __future__ import annotations

import contextlib
import os
import site
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from ops_platform.errors import CouldNotVerifyError, UsageError
from ops_platform.inventory import InventoryMistakes
from ops_platform.recovery.expectations_child import PREFIX, Outcome, Reply, Request
from ops_platform.recovery.expectations_views import Server
from ops_platform.recovery.suite import Suite, load_suite

__all__ = ["Outcome", "Suite", "SuiteResult", "SuiteRunner", "load_suite", "run_suite"]

TIMEOUT = 1800.0


@dataclass(frozen=True)
class SuiteResult:
    """What became of each expectation, in the order of the suite. `data_docs` is the index page."""

    suite: str
    results: tuple[Outcome, ...]
    seconds: float
    data_docs: Path | None
    data_docs_error: str | None
    version: str

    @property
    def success(self) -> bool:
        return bool(self.results) and self.failed == 0

    @property
    def passed(self) -> int:
        return sum(outcome.success for outcome in self.results)

    @property
    def failed(self) -> int:
        return len(self.results) - self.passed


class SuiteRunner:
    """One evaluation of a suite. A context manager that starts the child; the suite is read, and refused, before that."""

    def __init__(self, suite_file: Path, *, timeout: float = TIMEOUT) -> None:
        self.suite = load_suite(suite_file)
        self.timeout = timeout
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the child, which imports Great Expectations and then waits for its request. Returns at once."""
        if self._process is not None:
            return
        home = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX)))
        self._answer, self._log = home / "answer", home / "log"
        work = home / "work"
        work.mkdir()
        with self._answer.open("wb") as answer, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ops_platform.recovery.expectations"],
                stdin=subprocess.PIPE,
                stdout=answer,
                stderr=log,
                cwd=work,
                env=_environment(work),
                start_new_session=True,  # Ctrl-C at the terminal is handled here, and ends it through `stop`
            )

    def run(
        self,
        *,
        socket_directory: Path,
        port: int,
        user: str,
        dbname: str,
        recovery_target: datetime,
        data_docs: Path | None = None,
        timeout: float | None = None,
    ) -> SuiteResult:
        """Evaluate on the server behind the socket. Data Docs go to a folder that may exist.

        Raises CouldNotVerifyError where the child or the server ended or took too long, and InventoryMistakes for values that
        Great Expectations refuses. A failed expectation is not an error but a result.
        """
        if recovery_target.tzinfo is None:
            raise UsageError("the recovery target has no zone", where=self.suite.name)
        if data_docs is not None:
            data_docs = data_docs.absolute()
            data_docs.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        reply = self._ask(
            Request(
                title=self.suite.file.stem,
                checks=self.suite.checks,
                server=Server(str(socket_directory), port, user, dbname),
                recovery_target=recovery_target.astimezone(UTC),
                data_docs=str(data_docs) if data_docs else None,
            ),
            self.timeout if timeout is None else timeout,
        )
        self._judge(reply)
        return SuiteResult(
            suite=self.suite.name,
            results=reply.outcomes,
            seconds=round(time.monotonic() - began, 3),
            data_docs=Path(reply.data_docs) if reply.data_docs else None,
            data_docs_error=reply.data_docs_error,
            version=reply.version,
        )

    def stop(self) -> None:
        """End the child, if it still runs, and remove what it had for itself."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        self._stack.close()

    def _ask(self, request: Request, timeout: float) -> Reply:
        self.start()
        process = self._process
        assert process is not None  # noqa: S101 - start makes it
        # In a thread, because a pipe holds 64 KiB and the child may still be importing, or hang.
        threading.Thread(target=_send, args=(process, request), daemon=True).start()
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self._no_result(f"took longer than {timeout:g} s") from None
        if code:
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            raise self._no_result(f"ended {how}: {self._last_words()}")
        try:
            return Reply.model_validate_json(self._answer.read_bytes())
        except ValidationError:
            raise self._no_result(f"gave no answer: {self._last_words()}") from None

    def _judge(self, reply: Reply) -> None:
        """Nothing that was not evaluated passes."""
        if reply.could_not is not None:
            raise CouldNotVerifyError(reply.could_not, where=self.suite.name)
        if reply.refusals:
            raise InventoryMistakes([self.suite.mistake(one.number, one.key, one.what) for one in reply.refusals])
        if not reply.outcomes or len(reply.outcomes) != len(self.suite.checks):
            raise self._no_result(f"evaluated {len(reply.outcomes)} of {len(self.suite.checks)} expectations")

    def _no_result(self, what: str) -> CouldNotVerifyError:
        return CouldNotVerifyError(f"the evaluation of the expectations {what}", where=self.suite.name)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:400] if lines else "it said nothing"


def run_suite(
    suite_file: Path,
    *,
    socket_directory: Path,
    port: int,
    user: str,
    dbname: str,
    recovery_target: datetime,
    data_docs: Path | None = None,
    timeout: float = TIMEOUT,
) -> SuiteResult:
    """Read a suite and evaluate it, for those who have no time to hide."""
    with SuiteRunner(suite_file, timeout=timeout) as runner:
        return runner.run(
            socket_directory=socket_directory,
            port=port,
            user=user,
            dbname=dbname,
            recovery_target=recovery_target,
            data_docs=data_docs,
        )


def _send(process: subprocess.Popen[bytes], request: Request) -> None:
    """The pipe stays open: the child ends when it closes, and with it whoever wanted to know."""
    if process.stdin is not None:
        with contextlib.suppress(OSError, ValueError):
            process.stdin.write(request.model_dump_json().encode() + b"\n")
            process.stdin.flush()


def _environment(work: Path) -> dict[str, str]:
    """What a Python program needs to run, and no more: no secrets, no settings of libpq or Great Expectations, no home."""
    kept = {key: value for key, value in os.environ.items() if key in _KEPT or key.startswith(("LC_", "PYTHON"))}
    private = {"HOME": str(work), "TMPDIR": str(work), "PYTHONUSERBASE": site.getuserbase()}
    return {**kept, **private, "GX_ANALYTICS_ENABLED": "False"}


_KEPT = frozenset(["PATH", "LANG", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV"])


if __name__ == "__main__":
    from ops_platform.recovery import expectations_child

    sys.exit(expectations_child.main())
