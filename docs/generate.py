"""Writes docs/reference/{cli,inventory,json-output,exit-codes,playbooks,runbooks}.md and Grafana's dashboard from the code, or says (--check)
which of them are old.

python docs/generate.py [--check]
"""

from __future__ import annotations

import ast
import inspect
import json
import runpy
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from enum import Enum
from functools import cache
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import click
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ops_platform import errors
from ops_platform.cli.main import COMMANDS, EXIT_CODES, cli
from ops_platform.inventory import format_duration, values
from ops_platform.inventory.matchers import AlertMatcher
from ops_platform.inventory.model import BackupPolicy, Environment, Inventory, Target
from ops_platform.remediation.playbook import Playbook, playbooks
from ops_platform.remediation.playbooks.anything.webhook import ANY_KIND

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
# A command keeps the help option of the first context in which it was asked for: the one that `ops` gives it.
HELP = cli.context_settings["help_option_names"]
MADE = "<!-- Made by docs/generate.py from the code; `make docs` makes it anew. -->"


# The command line


def commands() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with its words, groups before what is in them."""

    def below(words: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command]]:
        yield words, command
        if isinstance(command, click.Group):
            context = click.Context(command, help_option_names=HELP)
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                assert found is not None
                yield from below((*words, name), found)

    return below(("ops",), cli)


def cli_page() -> str:
    parts = [
        "# The command line",
        MADE,
        "`ops` stands in the virtual environment: `.venv/bin/ops`. Results go to standard output, progress and errors to standard error. "
        "`-h` or `--help` explains every command. [Exit codes](exit-codes.md); [the JSON of `--json`](json-output.md).",
        "| command | |\n|---|---|\n"
        + "\n".join(f"| [`ops {name}`](#ops-{name}) | {COMMANDS[name][2]} |" for name in sorted(COMMANDS)),
    ]
    for words, command in commands():
        parts += _command(words, command)
    parts.append(_ENVIRONMENT)
    return "\n\n".join(parts) + "\n"


_ENVIRONMENT = """\
## Environment

| variable | |
|---|---|
| `OPS_INVENTORY` | The inventory, where `--inventory` does not name one. Without both it is the nearest `platform.yaml` from here upwards. |
| `OPS_STATE_DIR` | Where the local stack lives; `.state/local` beside `platform.yaml` by default, below `/var/lib/ops_platform` for root in a closed home. |
| `OPS_ACTOR` | Who is asking, for the ledger; the login name by default. |
| `OPS_DEBUG` | `1` shows the traceback of an unexpected error. |"""


def _command(words: tuple[str, ...], command: click.Command) -> Iterator[str]:
    yield f"{'##' if len(words) < 3 else '###'} {' '.join(words)}"
    yield inspect.cleandoc(command.help or "")
    if not isinstance(command, click.Group) or len(words) == 1:
        context = click.Context(command, info_name=" ".join(words), help_option_names=HELP)
        yield f"```\n{context.get_usage().removeprefix('Usage: ')}\n```"
    rows = [_option(option) for option in command.params if isinstance(option, click.Option) and not option.hidden]
    if rows:
        yield "| option | |\n|---|---|\n" + "\n".join(rows)


def _option(option: click.Option) -> str:
    names = ", ".join((*option.opts, *option.secondary_opts))
    if not option.is_flag and option.flag_value is None:
        names += f" {_cell(option.make_metavar(click.Context(cli)))}"
    text = option.help or ""
    if option.show_default and option.default is not None:
        text += f" Default: `{option.default}`."
    notes = [note for note, holds in (("needed", option.required), ("may be repeated", option.multiple)) if holds]
    return f"| `{names}` | {_cell(text)}{' (' + ', '.join(notes) + ')' if notes else ''} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# The inventory

_NAMED: list[tuple[Any, str]] = [
    (values.PositiveDuration, "[duration](#values), longer than nothing"),
    (values.Duration, "[duration](#values)"),
    (values.Size, "[size](#values)"),
    (values.Id, "[id](#values)"),
    (values.Zone, "[time zone](#values)"),
    (values.Cron, "[cron](#values)"),
    (values.Url, "[address](#values)"),
    (values.Origin, "[address](#values)"),
    (values.Host, "[host](#values)"),
    (values.SecretRef, "[reference](#values)"),
    (AlertMatcher, "[matcher](#values)"),
    (datetime, "[moment](#values)"),
    (str, "text"),
    (int, "whole number"),
    (float, "number"),
    (bool, "`true` or `false`"),
    (Any, "anything"),
]

_INVENTORY = """\
`platform.yaml` is the only place where targets, objectives and policies are declared. `ops inventory check` reads it strictly: an unknown
key, a wrong type, a reference to something that is not declared is an error with file, line, key path and the nearest valid key.
`ops inventory schema` prints [its JSON Schema](platform.schema.json) for editors; name it in the first line of the file:

```yaml
# yaml-language-server: $schema=docs/reference/platform.schema.json
```

## What is filled in

A target says what is its own. Everything else comes, in this order, from the target, from `defaults` of its environment, and from the defaults
of the tables below; mappings are merged key by key, lists are taken whole. `backup` is the id of a policy, or `{policy: id, …}` with
what differs from it. `ops inventory show TARGET` prints a target with everything filled in.

## Values

| | |
|---|---|
| duration | `90s`, `15m`, `4h`, `14d`, `2w`, or a sum such as `1h30m`. A bare number is refused. |
| size | `16MiB`, `20GB`, or a number of bytes. |
| id | Lower-case letters, digits and single dashes, 63 characters at most. |
| time zone | A name such as `Europe/Berlin` or `UTC`. |
| cron | Five fields: minute, hour, day, month, weekday. |
| address | `https://host[:port][/path]` without user and password (some take no path and say so); `local://NAME` is a server of the local stack. |
| host | A name, an IPv4 or IPv6 address, a socket directory, or `local://NAME`. |
| matcher | A condition on a label as Alertmanager writes it: `severity=~"page\\|ticket"`; `=`, `!=`, `=~`, `!~`. |
| moment | A time with its zone, in quotes: `'2026-12-24T18:00:00+01:00'`. |
| reference | Where a secret stands: `vault://MOUNT/PATH#FIELD`, `env://NAME`, `file:///path`. |

A reference is resolved when the secret is used. `vault://` asks the first server under `vaults`. A file must be readable by its owner
alone; its path may begin with `{state}/`, the local stack's state directory, or `{inventory}/`, the folder of `platform.yaml`."""


def models() -> list[type[BaseModel]]:
    """The inventory and everything in it, in the order in which a reader meets it."""
    return _below(Inventory)


def _below(first: type[BaseModel]) -> list[type[BaseModel]]:
    found = [first]
    for model in found:
        for name in model.model_fields:
            for part in _parts(_hint(model, name)):
                if inspect.isclass(part) and issubclass(part, BaseModel) and part not in found:
                    found.append(part)
    return found


@cache
def _hints(model: type[BaseModel]) -> dict[str, Any]:
    return get_type_hints(model, include_extras=True)


def _hint(model: type[BaseModel], name: str) -> Any:
    return _hints(model)[name]


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from _parts(argument)


def inventory_page() -> str:
    parts = ["# platform.yaml", MADE, _INVENTORY, *(_model(model) for model in models())]
    return "\n\n".join(parts) + "\n"


def _title(model: type[BaseModel]) -> str:
    return "The whole file" if model is Inventory else model.__name__


def _anchor(model: type[BaseModel]) -> str:
    return _title(model).lower().replace(" ", "-")


def _model(model: type[BaseModel]) -> str:
    rows = [_field(model, name, field) for name, field in model.model_fields.items()]
    if model is BackupPolicy:
        rows.insert(0, "| `policy` | [id](#values) | – | In a target: the policy from which the rest is taken. |")
    about = inspect.cleandoc(model.__dict__.get("__doc__") or "")
    table = "| key | type | default | |\n|---|---|---|---|\n" + "\n".join(rows)
    return "\n\n".join(filter(None, [f"## {_title(model)}", about, table]))


def _field(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    kind = _words(_hint(model, name))
    if model is Environment:
        kind = "any part of a [Target](#target)" if name == "defaults" else kind
    if model is Target and name == "backup":
        kind = f"[id](#values) of a policy, or {kind}"
    return f"| `{name}` | {kind} | {_default(model, name, field)} | {_cell(field.description or '')} |"


def _default(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    if field.is_required():
        by_environment = model is Target and name not in ("id", "environment")
        return "needed, here or in the environment" if by_environment else "needed"
    value = field.default
    assert value is not PydanticUndefined, f"{model.__name__}.{name} has a default that is made by a function"
    if value is None:
        return "–"
    if isinstance(value, BaseModel):
        return "its own defaults"
    if isinstance(value, timedelta):
        return f"`{format_duration(value)}`"
    if isinstance(value, Enum):
        return f"`{value.value}`"
    if value in ("", [], {}):
        return "empty"
    if isinstance(value, int) and not isinstance(value, bool) and values.Size in _parts(_hint(model, name)):
        return f"`{_size(value)}`"
    if isinstance(value, list) and all(isinstance(item, BaseModel) for item in value):
        items = ", ".join(_flow(item) for item in value)
        return f"`[{items}]`"
    return f"`{_yaml(value)}`"


def _flow(value: BaseModel) -> str:
    """As it would be written in YAML, in one line."""
    parts = (
        f"{key}: {_yaml(format_duration(one) if isinstance(one, timedelta) else one)}"
        for key, one in dict(value).items()
    )
    return "{" + ", ".join(parts) + "}"


def _size(value: int) -> str:
    for unit, length in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value % length == 0:
            return f"{value // length}{unit}"
    return str(value)


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _words(annotation: Any) -> str:
    """A type as a person says it."""
    for known, words in _NAMED:
        if annotation == known:
            return words
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        # Nested Annotated types are one flat list: a size with a limit is a size, and the limit.
        rest = tuple(part for part in arguments[1:] if not isinstance(part, FieldInfo))
        limits = [text for part in arguments[1:] if (text := _limits(part))]
        kinds = [Annotated[(arguments[0], *rest[:length])] for length in range(len(rest), 0, -1)]  # type: ignore[valid-type]
        kind = next((words for kind in kinds for known, words in _NAMED if kind == known), None) or _words(arguments[0])
        return ", ".join([kind, *limits])
    if origin in (Union, UnionType):
        return " or ".join(_words(part) for part in arguments if part is not NoneType)
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {_words(arguments[0])}"
    if origin is dict:
        return f"mapping of {_words(arguments[0])} to {_words(arguments[1])}"
    if issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{_anchor(annotation)})"
    assert issubclass(annotation, Enum), annotation
    return " \\| ".join(f"`{member.value}`" for member in annotation)


def _limits(part: Any) -> str:
    if not isinstance(part, FieldInfo):
        return ""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{signs[n]} {v}" for m in part.metadata for n in signs if (v := getattr(m, n, None)) is not None]
    if any(getattr(m, "min_length", None) for m in part.metadata):
        found.append("not empty")
    found += [f"`{p}`".replace("|", "\\|") for m in part.metadata if (p := getattr(m, "pattern", None))]
    return ", ".join(found)


# JSON output

_JSON = """\
Every command that answers with data has `--json`. It prints one JSON value to standard output; progress and errors go to standard error, and the
[exit code](exit-codes.md) is the same as without it. An error before there is anything to print leaves standard output empty.

- Times are ISO 8601 in UTC. Sizes are bytes. Names that end in `_seconds`, `seconds` and `rate` mean seconds and bytes a second.
- WAL positions are texts as PostgreSQL writes them, `16/B374D848`.
- `system_identifier` has more than 53 bits: a reader that keeps numbers as doubles, as `jq` before 1.7 and JavaScript do, rounds it.
- `null` means unknown or not measured, never nothing.
- Keys may be added in a later version; keys that are here keep their meaning.

The schemas are JSON Schema (2020-12)."""

# What a command prints that has no type of its own.
_UNTYPED = {
    (
        "ops",
        "backup",
        "expire",
    ): "One object for each target: `run`, `actor`, `status`, `ok`, `plan`, `rulings`, `outcomes`, "
    "`verification`, `ledger` (the numbers of its entries) and `unrecorded`. Plan, rulings, outcomes and verification are those of "
    "[the ledger's entries](ledger.md#what-stands-in-it); `status` is one of {statuses}.",
    ("ops", "events", "cursor", "reset"): "As an object of `ops backup expire`.",
    (
        "ops",
        "drill",
        "plan",
    ): "As of `ops backup expire`: `run`, `actor`, `status`, `ok`, `plan`, `rulings` and the rest of an action's result.",
    ("ops", "recover"): "With `--go` or `--go-on` the scorecard; without, the plan as `ops drill plan` gives it.",
    ("ops", "report"): "`index` is the path of the page over all targets, `pages` the paths of the targets' pages.",
    ("ops", "local", "logs"): "The lines, oldest first.",
    (
        "ops",
        "inventory",
        "check",
    ): "`file` is the path of the inventory; `targets`, `suites` and `drills` count what is in it.",
}


def json_page() -> str:
    from ops_platform.actions.model import Status

    parts = ["# JSON output", MADE, _JSON]
    statuses = ", ".join(f"`{status.value}`" for status in Status)
    for words, command in commands():
        kinds = emitted(command)
        if not kinds:
            continue
        parts.append(f"## {' '.join(words)}")
        if note := _UNTYPED.get(words):
            parts.append(note.format(statuses=statuses))
        for source, kind in kinds.items():
            if len(kinds) > 1:
                parts.append(f"`{source}`:")
            schema = TypeAdapter(kind).json_schema(mode="serialization")
            parts.append(f"```json\n{_json(_plain(schema))}\n```")
    return "\n\n".join(parts) + "\n"


def emitted(command: click.Command) -> dict[str, Any]:
    """The types that a command's function gives to `emit`, by what stands in its source."""
    if command.callback is None or not any(p.name == "as_json" for p in command.params):
        return {}
    function = inspect.unwrap(command.callback)
    tree, names = _module(function.__module__)
    (body,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function.__name__)
    calls = (n for n in ast.walk(body) if isinstance(n, ast.Call) and getattr(n.func, "id", None) == "emit")
    sources = [ast.unparse(call.args[0]) for call in calls]
    return {source: eval(source, names) for source in sources}


@cache
def _module(name: str) -> tuple[ast.Module, dict[str, Any]]:
    """A module's syntax, and all that it imports anywhere: in functions too."""
    source = inspect.getsource(import_module(name))
    tree = ast.parse(source)
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            exec(ast.unparse(node), names)
    return tree, names


def _plain(node: Any) -> Any:
    """Without the titles that pydantic makes from names."""
    if isinstance(node, dict):
        return {k: _plain(v) for k, v in node.items() if k != "title" or not isinstance(v, str)}
    return [_plain(part) for part in node] if isinstance(node, list) else node


def _json(node: Any, indent: int = 0) -> str:
    """As `json.dumps` with an indent, but what fits on a line stands on one."""
    flat = json.dumps(node, ensure_ascii=False)
    if not isinstance(node, dict | list) or len(flat) + indent <= 120:
        return flat
    pad = " " * (indent + 2)
    if isinstance(node, list):
        return "[\n" + ",\n".join(pad + _json(part, indent + 2) for part in node) + f"\n{' ' * indent}]"
    rows = (f"{pad}{json.dumps(key)}: {_json(value, indent + 2)}" for key, value in node.items())
    return "{\n" + ",\n".join(rows) + f"\n{' ' * indent}}}"


# Exit codes


def exit_codes_page() -> str:
    return "\n\n".join(["# Exit codes", MADE, _codes(), _errors(), _special()]) + "\n"


def _codes() -> str:
    _, _, text = EXIT_CODES.partition(": ")
    rows = [part.split(" ", 1) for part in text.rstrip(".").split(" · ")]
    table = "\n".join(f"| {code} | {meaning} |" for code, meaning in rows)
    return (
        f"| code | |\n|---|---|\n{table}\n\n"
        "143 says that SIGTERM ended the command, 141 that the reader of its output went away (`ops ledger list | head`). "
        "What was begun is cleaned up all the same. **3 is not a success**: nothing was proven, neither good "
        "nor bad. Of several targets the worst "
        "counts, and 1 is worse than 3."
    )


def _errors() -> str:
    kinds = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, errors.OpsError)]
    kinds.sort(key=lambda kind: (kind.exit_code, kind.__name__))
    rows = [
        f"| {kind.exit_code} | `{kind.__name__}` | {_cell((kind.__doc__ or '').split(chr(10) * 2)[0])} |"
        for kind in kinds
    ]
    return (
        "## Errors\n\nAn error names what is wrong, where, and what to do about it, on standard error:\n\n"
        "```\nerror: there is no target 'app-bd' in the inventory\n  what to do: did you mean app-db?\n```\n\n"
        "| code | kind | |\n|---|---|---|\n" + "\n".join(rows)
    )


def _special() -> str:
    """Commands whose help says what their exit codes mean."""
    rows = [
        f"| `{' '.join(words)}` | {_cell(text)} |"
        for words, command in commands()
        if "Exit " in (text := command.help or "") and len(words) > 1
    ]
    return "## Commands that say more with them\n\n| command | |\n|---|---|\n" + "\n".join(rows)


# Playbooks

_PLAYBOOKS = """\
What a rule of the inventory can do about an alert or an event ([`remediation.rules`](inventory.md#rule)). Each is planned, guarded, applied,
verified and recorded in the same way. `ops rules explain` says what a rule would do, and why it is safe; the rights are the least that its login needs,
and are tested: with them it works, and without one it says which. [How to write one](../how-to/write-a-playbook.md)."""


def playbooks_page() -> str:
    known = playbooks()
    rows = [
        f"| [`{name}`](#{name.replace('.', '')}) | {_cell(book.title)} | {_kinds(book)} | {'yes' if book.undo_text else 'no'} |"
        for name, book in known.items()
    ]
    index = "| playbook | | acts on | can be undone |\n|---|---|---|---|\n" + "\n".join(rows)
    return "\n\n".join(["# Playbooks", MADE, _PLAYBOOKS, index, *(_playbook(book) for book in known.values())]) + "\n"


def _kinds(book: Playbook[Any]) -> str:
    return "everything" if book.kinds >= ANY_KIND else ", ".join(f"`{kind}`" for kind in sorted(book.kinds))


def _playbook(book: Playbook[Any]) -> str:
    facts = {
        "acts on": _kinds(book),
        "why it is safe": _cell(book.why_safe),
        "at worst": _cell(book.blast_radius),
        "rights": "<br>".join(_cell(right) for right in book.rights),
        "undo": _cell(book.undo_text or "There is none."),
    }
    table = "| | |\n|---|---|\n" + "\n".join(f"| {name} | {text} |" for name, text in facts.items())
    parts = [f"## {book.name}", f"**{book.title}.** {book.what}", table]
    for model in _below(book.Parameters):
        if model.model_fields:
            if model is not book.Parameters:
                parts += [f"### {model.__name__}", inspect.cleandoc(model.__doc__ or "")]
            rows = "\n".join(_field(model, name, field) for name, field in model.model_fields.items())
            title = "parameter" if model is book.Parameters else "key"
            parts.append(
                f"| {title} | type | default | |\n|---|---|---|---|\n{rows}".replace(
                    "(#values)", "(inventory.md#values)"
                )
            )
    return "\n\n".join(parts)


# Runbooks

_RUNBOOKS = """\
A runbook is a graph of typed steps. [How to write one](../how-to/write-a-runbook.md); [the first drill](../how-to/run-your-first-drill.md).
What a step does is a name under which Python is registered."""


def runbooks_page() -> str:
    from ops_platform.drills.loader import shipped
    from ops_platform.drills.registry import doings
    from ops_platform.drills.runbook import AbortWhen, Parameter, Runbook

    parts = ["# Runbooks", MADE, _RUNBOOKS, "## Shipped"]
    for name, book in shipped().items():
        parts += [f"### {name}", f"**{book.title}.** {book.description}"]
        parts.append(
            f"Scenario `{book.scenario}`; for {', '.join(f'`{k}`' for k in book.kinds)}; {' and '.join(book.modes)}."
        )
        rows = [
            f"| `{key}` | {_cell(repr(p.default))} | {_cell(p.description)} |" for key, p in book.parameters.items()
        ]
        if rows:
            parts.append("| parameter | default | |\n|---|---|---|\n" + "\n".join(rows))
        steps = [f"| `{s.id}` | {s.kind} | {_cell(s.name)} | `{s.does}` |" for s in book.steps]
        parts.append("| step | kind | | does |\n|---|---|---|---|\n" + "\n".join(steps))
    parts.append("## The file")
    kinds = [get_args(get_args(Runbook.model_fields["steps"].annotation)[0])[0]]
    for model in (Runbook, Parameter, AbortWhen, *get_args(kinds[0])):
        rows = [_runbook_field(model, key, field) for key, field in model.model_fields.items()]
        parts += [f"### {model.__name__}", inspect.cleandoc(model.__doc__ or "")]
        parts.append("| key | type | default | |\n|---|---|---|---|\n" + "\n".join(rows))
    parts.append("## What steps can do")
    for name, doing in doings().items():
        if name.startswith("toy."):
            continue
        parts += [f"### {name}", f"For {', '.join(f'`{k}`' for k in sorted(doing.kinds))}. {doing.what}"]
        rows = [_runbook_field(doing.given, key, field) for key, field in doing.given.model_fields.items()]
        if rows:
            parts.append("| with | type | default | |\n|---|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _runbook_field(model: type[BaseModel], key: str, field: FieldInfo) -> str:
    """In the words of the file: `with` and `is` are keywords of Python."""
    return (
        _field(model, key, field)
        .replace(f"`{key}`", f"`{field.alias or key}`", 1)
        .replace("(#values)", "(inventory.md#values)")
    )


# Grafana


def dashboard() -> str:
    """What deploy/grafana/dashboard.py makes: a script beside its file, and no package."""
    return str(runpy.run_path(str(ROOT / "deploy" / "grafana" / "dashboard.py"))["text"]())


def pages() -> dict[Path, str]:
    return {
        REFERENCE.parents[1] / "deploy" / "grafana" / "ops-platform.json": dashboard(),
        REFERENCE / "cli.md": cli_page(),
        REFERENCE / "inventory.md": inventory_page(),
        REFERENCE / "json-output.md": json_page(),
        REFERENCE / "exit-codes.md": exit_codes_page(),
        REFERENCE / "playbooks.md": playbooks_page(),
        REFERENCE / "runbooks.md": runbooks_page(),
    }


def main(arguments: list[str]) -> int:
    old = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    if arguments == ["--check"]:
        for path in old:
            print(f"{path.relative_to(REFERENCE.parents[1])} is not what the code says: make docs", file=sys.stderr)
        return 1 if old else 0
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    for path in old:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pages()[path])
        print(f"wrote {path.relative_to(REFERENCE.parents[1])}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
