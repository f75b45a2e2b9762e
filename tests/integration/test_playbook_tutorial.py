"""The playbook of the tutorial, and its tests, as they stand on the page."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from ops_platform.inventory.remediation import Remediation

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "write-a-playbook.md").read_text()
PLAYBOOK, TESTS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
(RULE,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
NAME = "ops_platform.remediation.playbooks.postgres.login"


@pytest.fixture(scope="module")
def page() -> Iterator[ModuleType]:
    """The module of the page where its tests look for it, and the tests."""
    sys.modules[NAME] = module = ModuleType(NAME)
    exec(compile(PLAYBOOK, "write-a-playbook.md", "exec"), module.__dict__)
    tests = ModuleType("test_of_the_page")
    exec(compile(TESTS, "write-a-playbook.md", "exec"), tests.__dict__)
    yield tests
    del sys.modules[NAME]


def test_the_playbook_of_the_page_passes_the_tests_of_the_page(
    page: ModuleType, request: pytest.FixtureRequest
) -> None:
    written = {name: value for name, value in vars(page).items() if name.startswith("test_")}
    assert len(written) == 3
    for function in written.values():
        function(**{name: request.getfixturevalue(name) for name in inspect.signature(function).parameters})


def test_the_playbook_of_the_page_has_everything_that_the_reference_shows(page: ModuleType) -> None:
    book = page.CLOSE
    assert all(
        (book.name, book.title, book.kinds, book.what, book.why_safe, book.blast_radius, book.rights, book.undo_text)
    )


def test_the_rule_of_the_page_is_one() -> None:
    (rule,) = Remediation.model_validate(yaml.safe_load(RULE)["remediation"]).rules
    assert rule.playbook == "postgres.close_login"
