"""`ops`: the command line. Groups are imported only when they are called, so that help answers at once.

Exit codes: 0 good, 1 failed, 2 wrong usage or inventory, 3 could not verify, 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import NoReturn, TextIO

import click

from ops_platform import __version__, signals
from ops_platform.cli.common import Commands
from ops_platform.errors import OpsError

# name: (module, function, what it does)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "backup": ("ops_platform.cli.backup", "backup", "Take, list, prove and expire backups."),
    "completion": ("ops_platform.cli.completion", "completion", "Print the completion script of a shell."),
    "demo": ("ops_platform.cli.demo", "demo", "Back up a real database, damage it, restore it, check it."),
    "doctor": ("ops_platform.cli.doctor", "doctor", "Look at everything a backup needs, and say what to do."),
    "incidents": (
        "ops_platform.cli.incidents",
        "incidents",
        "What fired, what is done about it; pause-all stops everything.",
    ),
    "events": ("ops_platform.cli.events", "events", "Where the reading of events stands; begin a topic anew."),
    "drill": ("ops_platform.cli.drill", "drill", "Drills: what is overdue, hold one, what they found."),
    "evidence": ("ops_platform.cli.evidence", "evidence", "Write evidence packs for auditors, from the ledger."),
    "init": ("ops_platform.cli.init", "init", "Write a commented platform.yaml by asking a live database."),
    "inventory": ("ops_platform.cli.inventory", "inventory", "Check and show platform.yaml; its JSON Schema."),
    "ledger": ("ops_platform.cli.ledger", "ledger", "List, sign, verify and prove the tamper-evident record."),
    "local": ("ops_platform.cli.local", "local", "The embedded stack: real servers on this machine."),
    "metrics": ("ops_platform.cli.metrics", "metrics", "Serve the platform's own metrics for Prometheus."),
    "recover": ("ops_platform.cli.drill", "recover", "Recover a target in earnest, by the runbook of its drill."),
    "report": ("ops_platform.cli.report", "report", "Write the HTML report of proofs and coverage."),
    "restore": ("ops_platform.cli.restore", "restore", "Restore a target to a moment, or some of its tables."),
    "rules": ("ops_platform.cli.rules", "rules", "Check rules; explain what they would do; replay them over the past."),
    "ui": ("ops_platform.cli.ui", "ui", "Dagster's web UI and daemon over the local stack."),
    "wal": ("ops_platform.cli.wal", "wal", "Receive WAL into the repository; the state of the archive."),
}


class LazyGroup(Commands):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        from importlib import import_module

        module, function, _ = COMMANDS[cmd_name]
        return getattr(import_module(module), function)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][2]) for name in sorted(COMMANDS)])


EXIT_CODES = "Exit codes: 0 good · 1 failed · 2 usage or inventory · 3 could not verify · 130 interrupted."


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.option(
    "-i",
    "--inventory",
    type=click.Path(dir_okay=False),
    help="platform.yaml; else OPS_INVENTORY, else the nearest one from here upwards.",
)
@click.version_option(__version__, prog_name="ops")
def cli(inventory: str | None) -> None:
    """Backups that prove themselves, safe changes, one tamper-evident record."""
    if inventory is not None:
        # For child processes too: whatever this command starts reads the same file.
        os.environ["OPS_INVENTORY"] = str(os.path.abspath(inventory))  # noqa: PTH100 - Path would cost an import


class _ReaderGoneError(BaseException):
    """Whoever read our output has gone (`ops … | head`): nothing more to say, and nothing to complain about."""


class _NotWrittenError(BaseException):
    """What we say cannot be written: the device is full, or broken."""


class _Output(io.TextIOWrapper):
    """Standard output or error. A broken pipe is told apart from every other error here: click and rich would end with 1, a verdict."""

    def write(self, text: str) -> int:
        with _told_apart():
            return super().write(text)

    def flush(self) -> None:
        with _told_apart():
            super().flush()


@contextmanager
def _told_apart() -> Generator[None]:
    try:
        yield
    except BrokenPipeError:
        raise _ReaderGoneError from None
    except OSError as error:
        raise _NotWrittenError(error.strerror) from None


def _guard_output() -> None:
    for name in ("stdout", "stderr"):
        stream: io.TextIOWrapper | None = getattr(sys, name)
        if stream is None:  # it was closed before we began: nobody reads it either
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - Path would cost an import
            continue
        setattr(sys, name, _Output(stream.buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering))


def run() -> NoReturn:
    """The entry point: errors without a traceback, each with its exit code."""
    signals.watch()
    _guard_output()
    try:
        _run()
    except _ReaderGoneError:
        _say_no_more(sys.stdout, sys.stderr)
        sys.exit(141)
    except _NotWrittenError as error:
        _say_no_more(sys.stdout)
        try:
            fail(f"the output could not be written: {error}\n  what to do: make room where it goes, and call again", 1)
        except (_NotWrittenError, _ReaderGoneError):
            _say_no_more(sys.stderr)
            sys.exit(1)
    finally:
        signals.unwound()


def _say_no_more(*streams: TextIO) -> None:
    """Also what is still in their buffers goes nowhere: Python would try it again at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())


def _run() -> NoReturn:
    try:
        result = cli.main(prog_name="ops", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(result if isinstance(result, int) else 0)
    except OpsError as error:
        fail(str(error), error.exit_code)
    except click.UsageError as error:
        if error.ctx is not None:
            click.echo(error.ctx.get_usage(), err=True)
        fail(error.format_message(), 2)
    except click.ClickException as error:
        fail(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted; what was started has been cleaned up", 130)
    except Exception as error:  # the last line of defence
        if os.environ.get("OPS_DEBUG"):
            raise
        fail(
            f"unexpected {type(error).__name__}: {error}\n"
            "  what to do: this is a defect; call again with OPS_DEBUG=1 and report what it prints",
            1,
        )


def fail(text: str, code: int) -> NoReturn:
    click.echo(f"{click.style('error:', fg='red', bold=True)} {text}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    run()
