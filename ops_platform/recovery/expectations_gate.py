"""The owners' own expectations as one gate of a verification."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ops_platform.recovery.findings import Finding, finding_of

if TYPE_CHECKING:
    from ops_platform.recovery.sandbox import Sandbox


def gate(
    runner: Any, sandbox: Sandbox, dbname: str, moment: datetime, data_docs: Path | None
) -> tuple[str, Callable[[], Finding]]:
    """`runner` is an `expectations.SuiteRunner` that has been entered."""

    def ask() -> Finding:
        result = runner.run(
            socket_directory=sandbox.server.sockets,
            port=sandbox.server.socket_port,
            user=sandbox.superuser,
            dbname=dbname,
            recovery_target=moment,
            data_docs=data_docs,
        )
        failed = [item for item in result.results if not item.success]
        text = (
            "; ".join(f"{item.title}: {item.why}" for item in failed[:10]) or f"{len(result.results)} expectations hold"
        )
        return finding_of(
            result.success,
            text,
            expectations=[item.as_dict() for item in result.results],
            data_docs=str(result.data_docs or ""),
        )

    return f"Great Expectations suite {runner.suite.name}", ask
