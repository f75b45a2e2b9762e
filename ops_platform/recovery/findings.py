"""What a check found, and the record of all that were asked.

A gate that raises is not passed: damage that PostgreSQL itself names is a failure, everything else could not be checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ops_platform.errors import CorruptionError, OpsError
from ops_platform.recovery.model import Gate, GateStatus

PASSED, FAILED, UNCHECKED = GateStatus.PASSED, GateStatus.FAILED, GateStatus.COULD_NOT_CHECK
# SQLSTATE classes with which PostgreSQL names damage: data corrupted, index corrupted, internal error of a page's content.
_DAMAGE = ("XX001", "XX002", "XX000")


@dataclass(frozen=True)
class Finding:
    status: GateStatus
    result: str
    detail: dict[str, Any] = field(default_factory=dict[str, Any])


def finding_of(passed: bool, result: str, **detail: Any) -> Finding:
    return Finding(PASSED if passed else FAILED, result, detail)


BROKEN_OFF = "run"  # the gate of a verification that did not come to its end


class Record:
    """The gates of one verification, in the order in which they were asked."""

    def __init__(self, told: Callable[[str], None] = lambda title: None) -> None:
        self.gates: list[Gate] = []
        self._told = told

    def broken_off(self, status: GateStatus, error: OpsError) -> None:
        """The verification did not come to its end."""
        self.gates.append(
            Gate(
                id=BROKEN_OFF,
                title="The verification ran to its end",
                status=status,
                query="",
                result=error.line,
                seconds=0,
            )
        )

    def check(self, gate_id: str, title: str, query: str, ask: Callable[[], Finding]) -> Finding:
        """Ask, time it, write it down. Never raises for what the asking met; KeyboardInterrupt passes."""
        import psycopg

        self._told(title)
        began = time.monotonic()
        try:
            found = ask()
        except CorruptionError as error:
            found = Finding(FAILED, error.line)
        except OpsError as error:
            found = Finding(UNCHECKED, error.line)
        except psycopg.Error as error:
            said = " ".join(str(error).split())
            damage = error.sqlstate in _DAMAGE
            found = Finding(FAILED if damage else UNCHECKED, f"{error.sqlstate or 'no answer'}: {said}")
        except Exception as error:  # noqa: BLE001 - whatever it was: it is no pass, and the other gates are still asked
            found = Finding(UNCHECKED, f"{type(error).__name__}: {error}")
        self.gates.append(
            Gate(
                id=gate_id,
                title=title,
                status=found.status,
                query=query.strip(),
                result=found.result,
                detail=found.detail,
                seconds=round(time.monotonic() - began, 3),
            )
        )
        return found
