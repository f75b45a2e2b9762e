"""What the parts of the inventory's model share: strictness, modes, classes of data, addresses, weekly windows, logins to Vault."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ops_platform.inventory.values import Host, PositiveDuration, SecretRef, Zone


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


class VaultAuth(Strict):
    """How we log in to Vault."""

    method: Literal["approle", "kubernetes", "token"] = Field(
        description="approle needs role_id and secret_id, kubernetes needs role, token needs token."
    )
    mount: str | None = Field(default=None, description="Path of the auth method; its name by default.")
    role: str | None = Field(default=None, description="kubernetes: the role.")
    role_id: SecretRef | None = Field(default=None, description="approle: its role id; not from Vault itself.")
    secret_id: SecretRef | None = Field(default=None, description="approle: its secret id; not from Vault itself.")
    token: SecretRef | None = Field(default=None, description="token: the token; not from Vault itself.")
    jwt_path: str = Field(
        default="/var/run/secrets/kubernetes.io/serviceaccount/token",
        description="kubernetes: file of the service account's token.",
    )

    @model_validator(mode="after")
    def _needs(self) -> Self:
        need = {"approle": ("role_id", "secret_id"), "kubernetes": ("role",), "token": ("token",)}[self.method]
        missing = [name for name in need if getattr(self, name) is None]
        if missing:
            raise ValueError(f"{self.method} needs {' and '.join(missing)}")
        if any(ref and ref.scheme == "vault" for ref in (self.role_id, self.secret_id, self.token)):
            raise ValueError("what opens Vault cannot stand in Vault: use file:// or env://")
        return self
