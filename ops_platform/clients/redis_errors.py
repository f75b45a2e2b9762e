"""What redis-py and Redis say, as errors of ours, with the right, the address or the name that is to be corrected."""

from __future__ import annotations

import re

from ops_platform.errors import AccessDeniedError, ConflictError, NotThereError, OpsError, UnreachableError


def redis_error(error: Exception, where: str, user: str) -> OpsError:  # noqa: PLR0911 - a table of cases
    """The error that redis-py's stands for. Neither repeats what was sent."""
    import redis.exceptions as kinds

    text = " ".join(str(error).split())
    if isinstance(error, kinds.NoPermissionError):
        command = re.search(r"'([^']+)'", text)
        right = f"ACL SETUSER {user} +{command[1]}" if command else f"ACL LIST shows what {user} may"
        return AccessDeniedError(f"Redis refuses: {text}", where=where, remedy=right)
    if isinstance(error, kinds.AuthenticationError) or "WRONGPASS" in text or text.startswith("NOAUTH"):
        return AccessDeniedError("Redis refuses the login", where=where, remedy="check user and password")
    if "SSL" in text or "certificate" in text:
        return UnreachableError(
            "TLS with Redis failed",
            where=where,
            remedy="set ca to the PEM file of its CA, and check tls and the address",
        )
    if isinstance(error, kinds.ConnectionError | kinds.TimeoutError | OSError):
        kind = "time is over" if isinstance(error, kinds.TimeoutError | TimeoutError) else "no connection"
        if isinstance(error, kinds.BusyLoadingError):
            kind = "it is loading its data"
        return UnreachableError(
            f"Redis does not answer: {kind}", where=where, remedy="check address, network and whether it runs"
        )
    if isinstance(error, kinds.MasterDownError | kinds.ClusterDownError | kinds.TryAgainError):
        return UnreachableError(f"Redis cannot answer: {text}", where=where, remedy="look at its own log")
    if text.startswith(("INPROG", "NOGOODSLAVE", "NOQUORUM")):
        return ConflictError(f"Redis refuses: {text}", where=where, remedy="look at the sentinels' logs")
    if isinstance(error, kinds.ResponseError) and "No such master" in text:
        return NotThereError(
            "Sentinel watches no master of that name", where=where, remedy="correct `master` in the inventory"
        )
    return OpsError(f"Redis: {text or type(error).__name__}", where=where)
