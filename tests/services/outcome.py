"""What became of one thing that the tests need."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class NotInstalledError(Exception):
    """Why a thing cannot be had, in one line."""


class State(StrEnum):
    FOUND = "found"
    INSTALLED = "installed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Outcome:
    """One line of the report. Skipped always says why."""

    thing: str
    state: State
    text: str

    def __str__(self) -> str:
        return f"{self.thing:<16} {self.state:<9} {self.text}"


def found(thing: str, text: str) -> Outcome:
    return Outcome(thing, State.FOUND, text)


def installed(thing: str, text: str) -> Outcome:
    return Outcome(thing, State.INSTALLED, text)


def skipped(thing: str, why: str) -> Outcome:
    return Outcome(thing, State.SKIPPED, why)
