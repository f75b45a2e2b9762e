"""What an entry is as a CloudEvent 1.0 (https://github.com/cloudevents/spec): made from the entry alone, whoever publishes it."""

from __future__ import annotations

from typing import Any

from ops_platform.ledger.chain import Entry, moment

TYPE_PREFIX = "dev.ops-platform."

PUBLISHED = ("action.", "backup.", "incident.", "ledger.")
"""The kinds that are told to others: actions, backups and their proofs, incidents, and what is found of the ledger itself."""


def cloudevent(entry: Entry, *, source: str) -> dict[str, Any]:
    """The event in JSON's shape. `id` is the entry's number: with `source` it is the same event however often it is sent.

    Two extensions: `actor`, and `ledgersha256`, the entry's digest, by which a receiver finds the entry that told it.
    """
    return {
        "specversion": "1.0",
        "id": str(entry.seq),
        "source": source,
        "type": TYPE_PREFIX + entry.kind,
        "subject": entry.subject,
        "time": moment(entry.at),
        "datacontenttype": "application/json",
        "actor": entry.actor,
        "ledgersha256": entry.sha256,
        "data": entry.body,
    }
