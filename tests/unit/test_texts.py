"""How numbers and errors read."""

from __future__ import annotations

import pytest

from ops_platform.counting import count_of
from ops_platform.errors import OpsError


@pytest.mark.parametrize(("number", "said"), [(0, "0 indices"), (1, "1 index"), (2, "2 indices")])
def test_one_thing_is_not_several(number: int, said: str) -> None:
    assert count_of(number, "index", "indices") == said
    assert count_of(number, "table") == said.replace("index", "table").replace("indices", "tables")


def test_an_error_is_one_line_in_a_record_and_two_on_a_terminal() -> None:
    error = OpsError("no answer", where="db-1:5432", remedy="start it")
    assert str(error) == "db-1:5432: no answer\n  what to do: start it"
    assert error.line == "db-1:5432: no answer; what to do: start it"
    assert OpsError("no answer").line == "no answer"
