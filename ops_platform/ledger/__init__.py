"""The tamper-evident record: an append-only table whose entries are chained by SHA-256. Format: docs/reference/ledger.md."""

from ops_platform.ledger.chain import GENESIS, Break, Entry, LedgerCheck, canonical, check_chain
from ops_platform.ledger.ledger import Ledger, LedgerTransaction

__all__ = ["GENESIS", "Break", "Entry", "Ledger", "LedgerCheck", "LedgerTransaction", "canonical", "check_chain"]
