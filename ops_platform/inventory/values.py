"""The small types of platform.yaml: durations, sizes, addresses, references to secrets, schedules."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, available_timezones

from pydantic import (
    AfterValidator,
    BeforeValidator,
    GetCoreSchemaHandler,
    PlainSerializer,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, core_schema

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZES = (
    {"": 1}
    | {f"{p}iB": 1 << 10 * n for n, p in enumerate("KMGT", 1)}
    | {f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}
)
_LONGEST = 100 * 366 * 86400
_ID = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def parse_duration(text: Any) -> timedelta:
    """`90s`, `15m`, `4h`, `14d`, `2w` or a sum such as `1h30m`. A bare number is refused: its unit would be a guess."""
    if isinstance(text, timedelta):
        return text
    if not isinstance(text, str) or not re.fullmatch(r"([0-9]{1,12}[smhdw])+", text):
        raise ValueError(
            f"{_shown(text)} is not a duration; write a number with a unit, such as 90s, 15m, 4h, 14d or 1h30m"
        )
    seconds = sum(int(n) * _UNITS[u] for n, u in re.findall(r"([0-9]+)([smhdw])", text))
    if seconds > _LONGEST:
        raise ValueError(f"{text!r} is longer than a century")
    return timedelta(seconds=seconds)


@lru_cache(maxsize=1024)
def format_duration(value: timedelta) -> str:
    """The shortest text that `parse_duration` reads back; below a second it is rounded up to one."""
    rest, text = max(int(value.total_seconds()), 1 if value else 0), ""
    for unit in ("d", "h", "m", "s"):
        number, rest = divmod(rest, _UNITS[unit])
        text += f"{number}{unit}" if number else ""
    return text or "0s"


def parse_size(text: Any) -> int:
    """`16MiB`, `100 GB`: bytes. A bare integer is bytes."""
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    match = re.fullmatch(r"([0-9]{1,18}) *([KMGT]i?B)?", text) if isinstance(text, str) else None
    if not match:
        raise ValueError(f"{_shown(text)} is not a size; write 16MiB, 20GB or a number of bytes")
    return int(match[1]) * _SIZES[match[2] or ""]


def _shown(value: Any) -> str:
    """A structure is named by its kind alone: what was pasted into the wrong place may hold a secret."""
    return repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _check_id(text: str) -> str:
    if not _ID.fullmatch(text) or len(text) > 63:
        raise ValueError(f"{text!r} is not an id; use lower-case letters, digits and single dashes, 63 at most")
    return text


def _check_positive(value: timedelta) -> timedelta:
    if value <= timedelta(0):
        raise ValueError("this duration must be longer than nothing")
    return value


def _check_zone(text: str) -> str:
    try:
        ZoneInfo(text)
    except (KeyError, ValueError, OSError):
        near = get_close_matches(text, available_timezones(), n=1)
        hint = f"did you mean {near[0]}?" if near else "use a name such as Europe/Berlin or UTC"
        raise ValueError(f"{text!r} is not a time zone; {hint}") from None
    return text


@lru_cache(maxsize=1024)
def _check_cron(text: str) -> str:
    from croniter import CroniterBadDateError, croniter

    # What Dagster reads too: five fields, no seconds, no @-words, no W (nearest weekday).
    fields = text.split()
    if len(fields) != 5 or "W" in fields[2].upper() or not croniter.is_valid(text):
        raise ValueError(
            f"{text!r} is not a cron expression; five fields: minute hour day month weekday, such as '15 2 * * *'"
        )
    try:
        croniter(text).get_next()
    except CroniterBadDateError:
        raise ValueError(f"{text!r} never comes: there is no such day") from None
    return text


Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, return_type=str),
    WithJsonSchema({"type": "string", "pattern": "^([0-9]{1,12}[smhdw])+$", "examples": ["15m", "4h", "14d"]}),
]
PositiveDuration = Annotated[Duration, AfterValidator(_check_positive)]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": "^[0-9]{1,18} *([KMGT]i?B)?$", "examples": ["16MiB", "20GB"]},
                {"type": "integer", "minimum": 0},
            ]
        }
    ),
]
Id = Annotated[
    str, AfterValidator(_check_id), WithJsonSchema({"type": "string", "pattern": f"^{_ID.pattern}$", "maxLength": 63})
]
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

    def __ne__(self, other: object) -> bool:
        return not self == other  # str brings its own, which would compare the stars

    def __hash__(self) -> int:
        return hash(("Secret", self._value))

    def __reduce__(self) -> str:
        raise TypeError("a Secret is not pickled: pass its reference and resolve it where it is used")


_BY_REFERENCE = "secrets stand here by reference only: vault://mount/path#field, env://NAME or file://path"


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
        """Raises ValueError. The text itself is never repeated: it may be a password that somebody wrote here."""
        scheme, found, rest = text.partition("://")
        path, _, field = rest.partition("#")
        if not found or scheme not in cls.SCHEMES or not path:
            raise ValueError(_BY_REFERENCE)
        if scheme == "vault" and (not field or "/" not in path.strip("/")):
            raise ValueError("a Vault reference names mount, path and field: vault://secret/app-db/backup#password")
        if scheme != "vault" and "#" in rest:
            raise ValueError("only a Vault reference has a field (#…): a variable or a file is one secret")
        if scheme == "env" and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", path):
            raise ValueError("an environment reference names a variable: env://NAME")
        if (
            scheme == "file"
            and not PurePosixPath(path).is_absolute()
            and not path.startswith(("{state}/", "{inventory}/"))
        ):
            raise ValueError(
                "a file reference is absolute (file:///run/secrets/x) or begins with {state}/ or {inventory}/"
            )
        return cls(scheme=scheme, path=path, field=field or None)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}" + (f"#{self.field}" if self.field else "")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def read(value: Any) -> SecretRef:
            if isinstance(value, SecretRef):
                return value
            if not isinstance(value, str):
                raise ValueError(_BY_REFERENCE)
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
    # Neither text is repeated: a user and a password may stand in it.
    try:
        parts = urlsplit(text)
        usable = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable, parts = False, urlsplit("")
    if not usable or parts.scheme not in ("http", "https", "local") or "@" in parts.netloc:
        raise ValueError("not a usable address: write https://host[:port] or local://NAME, without user or password")
    if parts.query or parts.fragment:
        raise ValueError("an address has neither ? nor #")
    return text


def _check_origin(text: str) -> str:
    if urlsplit(_check_url(text)).path.strip("/"):
        raise ValueError("write https://host[:port] without a path; the bucket and the prefix have keys of their own")
    return text


def is_host(text: str) -> bool:
    """A name, an address, or a socket directory; never with a port, which stands beside it."""
    if re.fullmatch(r"/.+|[A-Za-z0-9._-]+", text):
        return True
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _check_host(text: str) -> str:
    if not is_host(text) and not re.fullmatch(r"local://[a-z0-9-]+", text):
        raise ValueError(
            "not a host; write a name, an IPv4 or IPv6 address, a socket directory or local://NAME, and the port at `port`"
        )
    return text


# `local://NAME` is a component of the local stack, whose free port is chosen when it starts.
Url = Annotated[str, AfterValidator(_check_url)]
Origin = Annotated[str, AfterValidator(_check_origin)]
Host = Annotated[str, AfterValidator(_check_host)]
