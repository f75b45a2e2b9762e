"""The tamper-evident record: an append-only table whose entries are chained by SHA-256, and signed checkpoints of it elsewhere.

Format: docs/reference/ledger.md; who is kept from what: docs/reference/ledger-threat-model.md. `anchored` holds what verifies and
signs, `pack` the evidence that is verified without us.
"""

from ops_platform.ledger.audit import check_chain
from ops_platform.ledger.chain import GENESIS, Break, Entry, Finding, LedgerCheck, canonical
from ops_platform.ledger.ledger import Draft, Ledger, LedgerTransaction
from ops_platform.ledger.tables import Tables

__all__ = [
    "GENESIS",
    "Break",
    "Draft",
    "Entry",
    "Finding",
    "Ledger",
    "LedgerCheck",
    "LedgerTransaction",
    "Tables",
    "canonical",
    "check_chain",
]
