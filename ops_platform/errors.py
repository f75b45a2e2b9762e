"""Every error that a person may see: what is wrong, where, and what to do about it.

The command line prints these without a traceback and exits with `exit_code`; Dagster ops raise them as failures.
Exit codes: 0 good, 1 failed, 2 usage or inventory, 3 could not verify.
"""

from __future__ import annotations


class OpsError(Exception):
    """Something failed for a known reason.

    `what` says what is wrong, `where` names the place (file:line key, host:port, object key), `remedy` what to do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(what)

    def __str__(self) -> str:
        return self._said("\n  ")

    @property
    def line(self) -> str:
        """The same as one line: a reason in a record, which is read in tables and messages."""
        return self._said("; ")

    def _said(self, between: str) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}{between}what to do: {self.remedy}" if self.remedy else text


class UsageError(OpsError):
    """The call itself is wrong: an unknown target, a time without a zone."""

    exit_code = 2


class InventoryError(UsageError):
    """platform.yaml cannot be used as it stands."""


class UnreachableError(OpsError):
    """A system did not answer. Never to be read as "there is nothing"."""


class AccessDeniedError(OpsError):
    """A system answered that we may not."""


class NotThereError(OpsError):
    """The system answered, and the thing asked for does not exist."""


class CorruptionError(OpsError):
    """Stored bytes are not what was written: digest, tag, size or place do not fit."""


class ConflictError(OpsError):
    """Somebody else holds it, or it exists already with other content."""


class NotOurTurnError(ConflictError):
    """Somebody else is at it, or was faster: nothing is wrong, and nothing is to be done here."""


class RefusedError(OpsError):
    """A guard refused."""


class CouldNotVerifyError(OpsError):
    """Nothing is proven, neither good nor bad. Never shown as a pass."""

    exit_code = 3
