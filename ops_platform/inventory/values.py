"""The small types of platform.yaml: durations, sizes, addresses, references to secrets, schedules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import (
    AfterValidator,
    BeforeValidator,
    GetCoreSchemaHandler,
    PlainSerializer,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, core_schema

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZES = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_ID = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def parse_duration(text: Any) -> timedelta:
    """`90s`, `15m`, `4h`, `14d`, `2w` or a sum such as `1h30m`. A bare number is refused: its unit would be a guess."""
    if isinstance(text, timedelta):
        return text
    if not isinstance(text, str) or not re.fullmatch(r"(\d+[smhdw])+", text):
        raise ValueError(f"{text!r} is not a duration; write a number with a unit, such as 90s, 15m, 4h, 14d or 1h30m")
    return timedelta(seconds=sum(int(n) * _UNITS[u] for n, u in re.findall(r"(\d+)([smhdw])", text)))


def format_duration(value: timedelta) -> str:
    """The shortest text that `parse_duration` reads back; below a second it is rounded up to one."""
    rest, text = max(int(value.total_seconds()), 1 if value else 0), ""
    for unit in ("d", "h", "m", "s"):
        number, rest = divmod(rest, _UNITS[unit])
        text += f"{number}{unit}" if number else ""
    return text or "0s"


def parse_size(text: Any) -> int:
    """`16MiB`, `100 GB`: bytes. A bare integer is bytes."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = re.fullmatch(r"(\d+)\s*([KMGT]i?B)?", text) if isinstance(text, str) else None
    if not match or (match[2] or "") not in _SIZES:
        raise ValueError(f"{text!r} is not a size; write 16MiB, 20GB or a number of bytes")
    return int(match[1]) * _SIZES[match[2] or ""]


def _check_id(text: str) -> str:
    if not _ID.fullmatch(text) or len(text) > 63:
        raise ValueError(f"{text!r} is not an id; use lower-case letters, digits and single dashes, 63 at most")
    return text


def _check_zone(text: str) -> str:
    try:
        ZoneInfo(text)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{text!r} is not a time zone; use a name such as Europe/Berlin or UTC") from error
    return text


def _check_cron(text: str) -> str:
    from croniter import croniter

    # Five fields only: seconds and the @-words are read differently by Dagster.
    if len(text.split()) != 5 or not croniter.is_valid(text):
        raise ValueError(
            f"{text!r} is not a cron expression; five fields: minute hour day month weekday, such as '15 2 * * *'"
        )
    return text


Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^(\d+[smhdw])+$", "examples": ["15m", "4h", "14d"]}),
]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": r"^\d+\s*([KMGT]i?B)?$"}, {"type": "integer"}]}),
]
Id = Annotated[str, AfterValidator(_check_id)]
Zone = Annotated[str, AfterValidator(_check_zone)]
Cron = Annotated[str, AfterValidator(_check_cron)]


class Secret(str):
    """A resolved secret. Shows `Secret(***)` wherever it is printed, formatted or logged; `reveal()` hands the value out.

    As a string it is `***`, so that a JSON or YAML writer that meets one by mistake writes the stars.
    """

    __slots__ = ("_value",)
    _value: str

    def __new__(cls, value: str) -> Secret:
        self = super().__new__(cls, "***")
        self._value = value
        return self

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(("Secret", self._value))

    def __reduce__(self) -> str:
        raise TypeError("a Secret is not pickled: pass its reference and resolve it where it is used")


@dataclass(frozen=True)
class SecretRef:
    """Where a secret stands: `vault://MOUNT/PATH#FIELD`, `env://NAME`, `file://PATH`. In YAML it is written as that text.

    In `file://` paths `{state}` stands for the local stack's state directory, `{inventory}` for the folder of platform.yaml.
    """

    SCHEMES: ClassVar[tuple[str, ...]] = ("vault", "env", "file")

    scheme: Literal["vault", "env", "file"]
    path: str
    field: str | None = None

    @classmethod
    def parse(cls, text: str) -> SecretRef:
        parts = urlsplit(text.replace("{", "%7B").replace("}", "%7D"))
        path = (parts.netloc + parts.path).replace("%7B", "{").replace("%7D", "}")
        if parts.scheme not in cls.SCHEMES or not path:
            # The text itself is not repeated: it may be a password that somebody wrote here.
            raise ValueError(
                "secrets stand here by reference only: vault://mount/path#field, env://NAME or file://path"
            )
        if parts.scheme == "vault" and (not parts.fragment or "/" not in path):
            raise ValueError("a Vault reference names mount, path and field: vault://secret/app-db/backup#password")
        if (
            parts.scheme == "file"
            and not PurePosixPath(path).is_absolute()
            and not path.startswith(("{state}/", "{inventory}/"))
        ):
            raise ValueError(
                "a file reference is absolute (file:///run/secrets/x) or begins with {state}/ or {inventory}/"
            )
        return cls(scheme=parts.scheme, path=path, field=parts.fragment or None)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}" + (f"#{self.field}" if self.field else "")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def read(value: Any) -> SecretRef:
            if isinstance(value, SecretRef):
                return value
            if not isinstance(value, str):
                raise ValueError(
                    "secrets stand here by reference only: vault://mount/path#field, env://NAME or file://path"
                )
            return cls.parse(value)

        return core_schema.no_info_plain_validator_function(
            read, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        return {
            "type": "string",
            "pattern": "^(vault|env|file)://",
            "examples": ["vault://secret/app-db/backup#password"],
        }


def _check_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https", "local") or not parts.netloc or parts.username or parts.password:
        raise ValueError("not a usable address: write https://host[:port] or local://NAME, without user or password")
    return text


def _check_host(text: str) -> str:
    if "://" in text and not text.startswith("local://"):
        raise ValueError(
            f"{text!r} is not a host; write a name, an IPv4 or IPv6 address, a socket directory or local://NAME"
        )
    return text


# `local://NAME` is a component of the local stack, whose free port is chosen when it starts.
Url = Annotated[str, AfterValidator(_check_url)]
Host = Annotated[str, AfterValidator(_check_host)]
