"""What the rest needs of a key service: data keys that are wrapped by a key which never leaves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class DataKey:
    """`plain`: 32 bytes for AES-256-GCM, kept in memory alone. `wrapped`: text that only the key service can open."""

    plain: bytes
    wrapped: str

    def __repr__(self) -> str:
        return "DataKey(***)"


class KeyService(Protocol):
    """Raises UnreachableError (no answer, sealed), AccessDeniedError (token, policy), NotThereError (key deleted)."""

    @property
    def name(self) -> str: ...

    def new_data_key(self) -> DataKey: ...

    def wrap(self, plain: bytes) -> str:
        """A data key that another service made, wrapped by this one: for a copy of what was sealed with it."""
        ...

    def unwrap(self, wrapped: str) -> bytes:
        """The plain key. Cached for the life of the object: a backup of 10,000 blocks asks once."""
        ...

    def check(self) -> dict[str, object]:
        """For `ops doctor`: reachable, unsealed, key there and not exportable, our rights."""
        ...
