"""The documents say what the code does: generated pages are current, links lead somewhere, commands and keys exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml
from pydantic import TypeAdapter

from ops_platform.backup.model import Lsn
from ops_platform.cli.main import cli
from ops_platform.drills.loader import read as read_runbook
from ops_platform.inventory import Inventory, json_schema

ROOT = Path(__file__).parents[2]
DOCS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of these languages, without the indentation of a list that they stand in."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [
        re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, language, body in found if language in languages
    ]


# Generated pages


def test_generated_pages_are_what_the_code_says() -> None:
    pages: dict[Path, str] = _generator().pages()
    assert {page.name for page in pages} == {
        "cli.md",
        "inventory.md",
        "json-output.md",
        "exit-codes.md",
        "playbooks.md",
        "runbooks.md",
        "ops-platform.json",
    }
    old = [_name(page) for page, text in pages.items() if not page.is_file() or page.read_text() != text]
    assert not old, f"make docs: {old}"


def test_an_old_page_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    generator = _generator()
    reference = tmp_path / "docs" / "reference"
    reference.mkdir(parents=True)
    monkeypatch.setattr(generator, "REFERENCE", reference)
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0
    with (reference / "cli.md").open("a") as file:
        file.write("an option that does not exist\n")
    assert generator.main(["--check"]) == 1


def test_each_key_of_the_inventory_says_what_it_means() -> None:
    silent = [
        f"{model.__name__}.{name}"
        for model in _generator().models()
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert not silent


def test_each_command_with_json_has_a_documented_schema() -> None:
    generator = _generator()
    page = (ROOT / "docs/reference/json-output.md").read_text()
    found = 0
    for words, command in generator.commands():
        if any(param.name == "as_json" for param in command.params):
            kinds = generator.emitted(command)
            assert kinds, f"{' '.join(words)} has --json and emits nothing"
            assert f"\n## {' '.join(words)}\n" in page
            found += 1
    assert found >= 12


def test_what_expiry_prints_is_what_the_page_names() -> None:
    from datetime import UTC, datetime

    from ops_platform.actions.model import ActionResult, Plan, Status

    plan = Plan("backup.expire", "app-db", (), datetime.now(UTC))
    printed = ActionResult("run", "actor", plan, (), Status.NOTHING).as_json()
    section = (ROOT / "docs/reference/json-output.md").read_text().split("## ops backup expire\n")[1].split("```")[0]
    assert set(printed) <= set(re.findall(r"`([^`]+)`", section))


def test_wal_positions_are_texts_in_json() -> None:
    adapter = TypeAdapter(list[Lsn])
    assert adapter.dump_json([Lsn(0x16_B374D848)]) == b'["16/B374D848"]'
    assert adapter.validate_json(b'["16/B374D848"]') == [0x16_B374D848]


# Links


def _links(path: Path) -> Iterator[str]:
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if not re.match(r"[a-z]+:", target):
            yield target


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=_name)
def test_each_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    broken: list[str] = []
    for link in _links(path):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_reached_from_the_readme() -> None:
    seen, ahead = set[Path](), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page in seen or page.suffix != ".md" or not page.is_file():
            continue
        seen.add(page)
        ahead += [(page.parent / link.partition("#")[0]).resolve() for link in _links(page) if link[0] != "#"]
    assert not [_name(page) for page in DOCS if page not in seen]


# Commands


def _quoted_commands(text: str) -> Iterator[str]:
    """Every `ops …` that a page quotes: lines of code blocks that are no YAML or SQL, and code in a sentence."""
    for block in _blocks(text, "", "sh", "bash", "console"):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            yield from _parts(line.strip().removeprefix("$ "))
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", prose):
        yield from _parts(code)


def _parts(line: str) -> Iterator[str]:
    for part in re.split(r"&&|\|\||;|\||<\(|\)$", line):
        if re.match(r"(\.venv/bin/)?ops( |$)", part.strip()):
            yield part.strip().removeprefix(".venv/bin/")


def _problem(line: str) -> str | None:
    """What is wrong with a command line, by the real commands; None where nothing is. An ellipsis leaves a value out."""
    if line.endswith("…"):
        return None
    words = shlex.split(line.replace("…", "").split(" > ")[0], comments=True)[1:]
    command: click.Command = cli
    context = click.Context(cli, info_name="ops", resilient_parsing=True, **cli.context_settings)
    while isinstance(command, click.Group):
        try:
            command.parse_args(context, words)
            words = [*context._protected_args, *context.args]
        except click.UsageError as error:
            return error.format_message()
        if not words:
            return None
        name, words = words[0], words[1:]
        found = command.get_command(context, name)
        if found is None:
            return f"there is no command {name}"
        command, context = found, click.Context(found, info_name=name, parent=context, resilient_parsing=True)
    if any(word in ("TARGET", "DIGEST", "BACKUP_ID") for word in words) and not any(w.startswith("-") for w in words):
        return None
    try:
        # Not resilient: values, choices and what is needed are checked; nothing is called.
        context.resilient_parsing = not words
        command.parse_args(context, list(words))
    except click.UsageError as error:
        return error.format_message()
    except click.exceptions.Exit:
        return None
    return None


@pytest.mark.parametrize("path", [path for path in DOCS if path.name != "cli.md"], ids=_name)  # made from the commands
def test_each_quoted_command_exists(path: Path) -> None:
    wrong = {line: problem for line in _quoted_commands(path.read_text()) if (problem := _problem(line))}
    assert not wrong


def test_the_commands_are_found_and_judged() -> None:
    quoted = [line for path in DOCS for line in _quoted_commands(path.read_text())]
    assert len(quoted) > 60
    assert any(line.startswith("ops restore app-db --to") for line in quoted)
    for wrong in (
        "ops backup verify app-db --restore",
        "ops bakcup list",
        "ops backup lst",
        "ops wal receive --listn x",
        "ops backup verify --pick best",
    ):
        assert _problem(wrong), wrong
    for good in (
        "ops backup verify app-db --pick oldest",
        "ops --inventory x.yaml inventory check",
        "ops ledger list -n 5",
    ):
        assert _problem(good) is None, good


@pytest.mark.parametrize("path", DOCS, ids=_name)
def test_each_make_target_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = path.read_text()
    code = [*re.findall(r"`make ([a-z-]+)[^`\n]*`", text)]
    code += [
        name
        for block in _blocks(text, "", "sh", "bash")
        for name in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)
    ]
    assert not set(code) - targets


# YAML


def _unknown(schema: dict[str, Any], node: Any, value: Any, where: str) -> Iterator[str]:
    """Keys of `value` that the schema does not know, wherever it says which keys there are."""
    if "$ref" in node:
        yield from _unknown(schema, schema["$defs"][node["$ref"].rpartition("/")[2]], value, where)
    elif ways := node.get("anyOf") or node.get("oneOf"):
        answers = [list(_unknown(schema, way, value, where)) for way in ways if _fits(schema, way, value)]
        yield from min(answers, key=len, default=[f"{where}: of the wrong type"])
    elif isinstance(value, dict):
        known = node.get("properties", {})
        for key, below in value.items():
            place = f"{where}.{key}"
            if key in known:
                yield from _unknown(schema, known[key], below, place)
            elif isinstance(node.get("additionalProperties"), dict):
                yield from _unknown(schema, node["additionalProperties"], below, place)
            elif node.get("additionalProperties") is not True:
                yield place
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _unknown(schema, node.get("items", {}), part, f"{where}[{number}]")


def _fits(schema: dict[str, Any], node: dict[str, Any], value: Any) -> bool:
    if "$ref" in node:
        return _fits(schema, schema["$defs"][node["$ref"].rpartition("/")[2]], value)
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "null": type(None),
        "boolean": bool,
        "integer": int,
        "number": float,
    }
    kind = node.get("type")
    return kind is None or isinstance(value, kinds[kind]) or (kind == "object" and isinstance(value, dict))


def _wrong_keys(block: str) -> list[str]:
    """A whole platform.yaml or some of it: top-level keys, or keys of a target, or of a suite of expectations."""
    value = yaml.safe_load(block)
    if isinstance(value, dict) and "scenario" in value:
        assert read_runbook(block.encode(), "a page").steps  # its own reader names what is wrong
        return []
    if value is None:
        return []
    if isinstance(value, list):
        return list(_unknown(json_schema(), {"items": {"$ref": "#/$defs/Target"}}, value, "targets"))
    if not isinstance(value, dict):
        return ["not a mapping"]
    if "apiVersion" in value or set(value) & {"template", "spec"}:
        return []  # Kubernetes
    if "expectations" in value and set(value) <= {"version", "expectations"}:
        return []
    schema = json_schema()
    if set(value) <= set(Inventory.model_fields):
        return list(_unknown(schema, schema, value, ""))
    return list(_unknown(schema, {"$ref": "#/$defs/Target"}, value, "target"))


@pytest.mark.parametrize("path", DOCS, ids=_name)
def test_each_key_in_quoted_yaml_is_a_key_of_the_inventory(path: Path) -> None:
    wrong = [found for block in _blocks(path.read_text(), "yaml") for found in _wrong_keys(block)]
    assert not wrong


def test_a_key_that_does_not_exist_is_found() -> None:
    assert _wrong_keys("targets: [{ id: a, backup: { policy: x, recovery_windw: 14d } }]") == [
        ".targets[0].backup.recovery_windw"
    ]
    assert _wrong_keys("conection: { hosts: [] }") == ["target.conection"]
    assert _wrong_keys("connection: { hosts: [{ host: a, prot: 1 }] }") == ["target.connection.hosts[0].prot"]
    assert _wrong_keys("stores: { x: { bucket: a, endpoint: b } }") == []


# What no file may hold


def test_no_path_of_a_machine_and_no_package_registry_stands_in_a_file() -> None:
    words = ["/wo" + "rk/", "/ro" + "ot/", "pypi" + ".org", "files.pythonhosted" + ".org", "registry.npmjs" + ".org"]
    words += ["proxy.golang" + ".org", "deb.debian" + ".org"]
    pattern = [part for word in words for part in ("-e", word)]
    listed = subprocess.run(
        ["git", "grep", "-nIF", *pattern, "--", "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode > 1:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    assert not listed.stdout.splitlines()
