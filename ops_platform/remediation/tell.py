"""Telling people: the messages that were written with each change of an incident go out when their receiver takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.remediation.store import Store


def tell_everybody(access: Access, store: Store) -> list[str]:
    """Send what is unsent, in order for each incident. Returns what could not be sent, and why; it is tried again."""
    return []
