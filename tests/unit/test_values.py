"""The small types of platform.yaml: what they read back, what they refuse, and that a secret never shows its value."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import logging
import marshal
import pickle
import pprint
import traceback
from datetime import timedelta
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from ops_platform.clients.keys import DataKey
from ops_platform.clients.postgres import Login
from ops_platform.clients.s3 import S3Settings
from ops_platform.inventory import Secret, SecretRef, format_duration, parse_duration, parse_size
from ops_platform.inventory.values import Cron, Duration, Host, Id, PositiveDuration, Size, Url, Zone

VALUE = "Zq7-swordfish-Ünï"

# Durations and sizes


@given(st.integers(0, 100 * 365 * 86400))
def test_a_duration_reads_back_what_it_was_written_as(seconds: int) -> None:
    assert parse_duration(format_duration(timedelta(seconds=seconds))) == timedelta(seconds=seconds)


@given(st.lists(st.tuples(st.integers(0, 999), st.sampled_from("smhdw")), min_size=1, max_size=6))
def test_a_duration_is_the_sum_of_its_parts(parts: list[tuple[int, str]]) -> None:
    words = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
    total = sum((timedelta(**{words[unit]: number}) for number, unit in parts), timedelta())
    assert parse_duration("".join(f"{number}{unit}" for number, unit in parts)) == total


@given(st.timedeltas(timedelta(microseconds=1), timedelta(days=10_000)))
def test_a_duration_is_never_written_as_nothing_unless_it_is_nothing(value: timedelta) -> None:
    assert abs(parse_duration(format_duration(value)) - value) < timedelta(seconds=1)
    assert parse_duration(format_duration(value)) > timedelta(0)


@pytest.mark.parametrize(
    ("text", "written"), [("90s", "1m30s"), ("2w", "14d"), ("0s", "0s"), ("1h30m", "1h30m"), ("86400s", "1d")]
)
def test_durations_are_written_short(text: str, written: str) -> None:
    assert format_duration(parse_duration(text)) == written


@pytest.mark.parametrize(
    "text",
    ["", "5", 5, 5.0, None, True, "4 h", "h", "-4h", "4H", "1.5h", "4h ", "٤h", [], {}, "9999999999d", "1h" * 9 + "x"],
)
def test_what_is_no_duration_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"not a duration|longer than a century"):
        parse_duration(text)


@given(
    st.integers(0, 10**6),
    st.sampled_from(["", *(f"{p}{i}B" for p in "KMGT" for i in ("", "i"))]),
    st.sampled_from(["", " "]),
)
def test_a_size_reads_back_in_every_unit(number: int, unit: str, space: str) -> None:
    base, power = (1024 if "i" in unit else 1000), ("KMGT".index(unit[0]) + 1 if unit else 0)
    found = parse_size(f"{number}{space}{unit}")
    assert found == number * base**power
    adapter = TypeAdapter[int](Size)
    assert adapter.validate_json(adapter.dump_json(found)) == found


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", -1, 1.5, "1.5GiB", True, None, "1 mib", "1MiBB", "16 M", "٤MiB", "9" * 30, []]
)
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@given(st.one_of(st.text(), st.binary(), st.floats(), st.integers(), st.lists(st.integers()), st.none()))
def test_whatever_stands_there_the_error_is_a_value_error(value: Any) -> None:
    """Anything else would leave pydantic as a traceback."""
    for parse in (parse_duration, parse_size, TypeAdapter(SecretRef).validate_python):
        with contextlib.suppress(ValueError):
            parse(value)


# Names, zones, schedules, addresses


def accepts(kind: Any, value: str) -> bool:
    try:
        TypeAdapter[Any](kind).validate_python(value)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Id, ["a", "app-db", "db2", "a" * 63], ["", "A", "1a", "a_b", "a--b", "-a", "a-", "a b", "a" * 64, "é", "a\n"]),
        (Zone, ["UTC", "Europe/Berlin", "America/Argentina/Ushuaia"],
         ["", "Berlin", "Europe", "CEST+1", "../../etc/passwd", "/etc/localtime", "Europe/Berlin\n"]),
        (Cron, ["15 2 * * *", "*/5 * * * *", "0 0 29 2 *", "0 2 * * mon-fri", "0 3 L * *"],
         ["", "* * * *", "* * * * * *", "@daily", "60 * * * *", "0 0 31 2 *", "0 0 1W * *", "H 2 * * *", "0 2 * * 8", "a b c d e"]),
        (Url, ["https://a", "http://127.0.0.1:80", "https://[::1]:8200", "local://s3", "https://vault/below"],
         ["", "a", "a:80", "ftp://a", "https://", "https://u:p@a", "https://u@a", "https://a?b", "https://a#b", "https://a:b", "https://[a", "https://a:99999"]),
        (Host, ["db", "db.example.com", "10.0.0.1", "::1", "fe80::1%eth0", "/run/postgresql", "local://app-db", "a_b"],
         ["", "a,b", "a b", "u@a", "http://a", "a/b", "db;", "local://"]),
        (Duration, ["0s", "4h"], ["4"]),
        (PositiveDuration, ["1s"], ["0s", "0h0m"]),
    ],
)  # fmt: skip
def test_what_a_value_may_be(kind: Any, good: list[str], bad: list[str]) -> None:
    assert [value for value in good if not accepts(kind, value)] == []
    assert [value for value in bad if accepts(kind, value)] == []


# References


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("vault://secret/app-db/backup#password", ("vault", "secret/app-db/backup", "password")),
        ("env://PGPASSWORD", ("env", "PGPASSWORD", None)),
        ("file:///run/secrets/x", ("file", "/run/secrets/x", None)),
        ("file://{state}/secrets/a?b", ("file", "{state}/secrets/a?b", None)),
        ("file://{inventory}/key with space", ("file", "{inventory}/key with space", None)),
    ],
)
def test_a_reference_names_its_place_and_is_written_as_it_was(text: str, parts: tuple[str, str, str | None]) -> None:
    ref = SecretRef.parse(text)
    assert (ref.scheme, ref.path, ref.field) == parts
    assert str(ref) == text


@pytest.mark.parametrize(
    "text",
    ["", "x", "vault://", "vault://secret", "vault://secret/a", "vault://secret/#x", "vault:///#x", "env://", "env://A B", "env://A=b", "env://A#b",
     "file://relative", "file://../up", "file:///a#b", "http://x", "VAULT://secret/a#b", "file://{home}/x", "://x"],
)  # fmt: skip
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"reference|only a Vault"):
        SecretRef.parse(text)


# Secrets


@dataclasses.dataclass
class Holder:
    name: str
    secret: Secret


class Model(BaseModel):
    text: str


def raised(secret: Secret) -> str:
    try:
        raise ValueError(secret, f"{secret}", {"password": secret})
    except ValueError:
        return traceback.format_exc()


def logged(secret: Secret) -> str:
    stream = io.StringIO()
    logger = logging.Logger("test")
    logger.addHandler(logging.StreamHandler(stream))
    logger.error("%s %r %s", secret, secret, {"password": secret})
    logger.error(f"{secret}")
    logger.error(secret)
    return stream.getvalue()


SHOWN = {
    "str": str,
    "repr": repr,
    "ascii": ascii,
    "f-string": lambda s: f"{s} {s!r} {s!s} {s:>40} {s:.3}",
    "format": lambda s: "{} {!r} {:<9}".format(s, s, s),  # noqa: UP032
    "percent": lambda s: "%s %r" % (s, s),  # noqa: UP031
    "join and add": lambda s: ",".join([s, s]) + s + "x",
    "methods of str": lambda s: [s.upper(), s.encode(), s[:], s.strip(), s * 2, s.split("-"), list(s), s.casefold(), s.translate({})],
    "bytes": lambda s: bytes(s, "utf-8"),
    "in containers": lambda s: [repr([s]), str({"k": s}), pprint.pformat({s: [s]})],
    "in a dataclass": lambda s: Holder("a", s),
    "fields of a dataclass": lambda s: str(vars(Holder("a", s))),
    "json": lambda s: json.dumps({"password": s, "list": [s]}, indent=1),
    "json as a key": lambda s: json.dumps({s: 1}),
    "pydantic": lambda s: Model(text=s).model_dump_json(),
    "pydantic, by a serialiser": lambda s: TypeAdapter(dict[str, Any]).dump_json({"a": s}),
    "print": lambda s: print(s, file=(out := io.StringIO())) or out.getvalue(),
    "exceptions": raised,
    "logging": logged,
    "dir": lambda s: [name for name in dir(s) if VALUE in name],
    "login": lambda s: Login("db", "user", s),
    "store": lambda s: S3Settings("https://s3", "bucket", s, s, s),
}  # fmt: skip


@pytest.mark.parametrize("how", SHOWN)
def test_a_secret_shows_stars(how: str, capfd: pytest.CaptureFixture[str]) -> None:
    shown = SHOWN[how](Secret(VALUE))  # type: ignore[operator]
    text = f"{shown!r}{shown!s}" + "".join(capfd.readouterr())
    assert VALUE not in text
    assert "swordfish" not in text.lower()
    assert "swordfish" not in repr(text.encode()).lower()


@pytest.mark.parametrize(
    "write",
    [pickle.dumps, copy.copy, copy.deepcopy, marshal.dumps, yaml.dump, yaml.safe_dump, lambda s: dataclasses.asdict(Holder("a", s)), vars],
    ids=["pickle", "copy", "deepcopy", "marshal", "yaml", "safe yaml", "asdict", "vars"],
)  # fmt: skip
def test_a_secret_is_not_taken_apart(write: Any) -> None:
    with pytest.raises((TypeError, ValueError, yaml.YAMLError)) as caught:
        write(Secret(VALUE))
    assert VALUE not in f"{caught.value!r} {caught.value}"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_protocol_of_pickle_writes_a_secret(protocol: int) -> None:
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps({"a": [Secret(VALUE)]}, protocol=protocol)


def test_a_secret_hands_its_value_out_when_asked() -> None:
    assert repr(Secret(VALUE)) == "Secret(***)"
    assert Secret(VALUE).reveal() == VALUE


def test_secrets_are_compared_by_value_and_only_with_each_other() -> None:
    one, same, other = Secret(VALUE), Secret(VALUE), Secret("other")
    assert one == same
    assert not one != same  # noqa: SIM202 - str has a comparison of its own for each of the two
    assert one != other
    assert not one == other  # noqa: SIM201
    assert len({one, same, other}) == 2
    for text in (VALUE, "***", "Secret(***)"):
        assert one != text
        assert text != one
    assert Secret("x")
    assert not Secret("")


def test_a_data_key_shows_stars() -> None:
    key = DataKey(b"\x07" * 32, "wrapped-text")
    assert f"{key} {key!r} {[key]}" == "DataKey(***) DataKey(***) [DataKey(***)]"
