"""What the parts of the inventory's model share: strictness, modes, classes of data, addresses, weekly windows."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ops_platform.inventory.values import Host, PositiveDuration, Zone


class Strict(BaseModel):
    # Strict also in its types: "no" is not false, "5432" is not 5432, true is not 1.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True)


class Classification(StrEnum):
    PUBLIC = "public"
    INTERNAL = "internal"
    CONFIDENTIAL = "confidential"
    RESTRICTED = "restricted"


class Mode(StrEnum):
    """Observe says what would be done; enforce does it."""

    OBSERVE = "observe"
    ENFORCE = "enforce"


# Strict mode would ask for the enumeration itself, and the file holds its text.
AnyClassification = Annotated[Classification, Field(strict=False)]
AnyMode = Annotated[Mode, Field(strict=False)]


class Tls(Strict):
    """How a connection to PostgreSQL is secured."""

    mode: Literal["disable", "require", "verify-ca", "verify-full"] = Field(
        default="verify-full", description="As libpq's sslmode; only verify-full knows whom it talks to."
    )
    ca: str | None = Field(
        default=None, description="PEM file of the certificate authority; {state} and {inventory} are expanded."
    )


class Weekly(Strict):
    """A window that comes back every week, in a named zone."""

    days: list[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]] = Field(
        default=["mon", "tue", "wed", "thu", "fri", "sat", "sun"], description="Days on which it begins."
    )
    start: Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")] = Field(
        description="Local time at which it begins, such as 22:00."
    )
    length: PositiveDuration = Field(description="How long it lasts.")
    timezone: Zone = Field(description="The zone of `start`.")


class HostPort(Strict):
    """One member of a cluster."""

    host: Host = Field(description="Where it is reached.")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(default=5432, description="Its port.")
