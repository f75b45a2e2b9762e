"""Evaluates a suite with Great Expectations, in a process of its own: reads one request from stdin, writes one reply to stdout."""

from __future__ import annotations

import html
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from pydantic import BaseModel, ConfigDict

from ops_platform.recovery.expectations_docs import write_data_docs
from ops_platform.recovery.expectations_views import (
    CouldNotAskError,
    Frame,
    Server,
    alias,
    frames_of,
    has_values,
    reason,
    try_views,
    views_in_every_session,
)
from ops_platform.recovery.suite import Check, expanded

if TYPE_CHECKING:
    from great_expectations.core.expectation_validation_result import ExpectationValidationResult
    from great_expectations.data_context.data_context.abstract_data_context import AbstractDataContext
    from great_expectations.datasource.fluent.interfaces import Batch
    from great_expectations.datasource.fluent.postgres_datasource import PostgresDatasource
    from great_expectations.expectations.expectation import Expectation

PREFIX = "ops-expectations-"  # of the directory in which the child works

# GX counts the values that are not as expected; which ones they are stays in the database.
_RESULT_FORMAT: Any = {"result_format": "BASIC", "partial_unexpected_count": 0}
_COLUMN_ARGUMENTS = ("column", "column_A", "column_B", "column_list", "column_set")
_FOR_READERS = ("description", "notes")
_URL = "postgresql+psycopg://sandbox@localhost/sandbox"  # GX wants one of this form; every part of it is overridden
_NETWORK = frozenset(
    ["socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"]
)


class Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Request(Wire):
    """What to evaluate, on which server. `title` heads the Data Docs, which go to the folder `data_docs`."""

    title: str
    checks: tuple[Check, ...]
    server: Server
    recovery_target: datetime
    data_docs: str | None


class Outcome(Wire):
    """What became of one expectation. Holds counts, numbers and times, but no text of the data."""

    title: str
    table: str | None
    query: str | None
    column: str | None
    kind: str
    kwargs: dict[str, Any]
    success: bool
    observed: str
    error: str | None
    seconds: float

    @property
    def why(self) -> str:
        return self.error or self.observed

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


class Refusal(Wire):
    """A value in the suite that GX's own model does not take."""

    number: int
    key: str
    what: str


class Reply(Wire):
    """Outcomes in the order of the suite; or `refusals`; or `could_not`: why nothing can be said."""

    outcomes: tuple[Outcome, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    could_not: str | None = None
    data_docs: str | None = None
    data_docs_error: str | None = None
    version: str = ""


def main() -> int:
    """The child. GX is imported before there is a request, so that a restore can go on meanwhile."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints to stderr
    os.environ["GX_ANALYTICS_ENABLED"] = "False"
    sys.addaudithook(refuse_network)
    import great_expectations as gx

    line = sys.stdin.readline()
    if not line:
        _orphaned()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    reply = evaluate(Request.model_validate_json(line)).model_copy(update={"version": gx.__version__})
    out.write(reply.model_dump_json())
    out.close()
    return 0


def refuse_network(event: str, _arguments: tuple[Any, ...]) -> None:
    """The server is reached by libpq over its unix socket; nothing else in this process has anybody to talk to."""
    if event in _NETWORK:
        raise PermissionError("the process that checks data opens no network connections")


def _end_with_parent() -> None:
    sys.stdin.read()
    _orphaned()


def _orphaned() -> NoReturn:
    """Whoever asked was killed and could not tidy up: remove what was made for this process, and end."""
    home = Path.cwd().parent
    if home.name.startswith(PREFIX):
        shutil.rmtree(home, ignore_errors=True)
    os._exit(1)


def evaluate(request: Request) -> Reply:
    """Everything that can be said of the suite on this server."""
    frames = frames_of(request.checks, request.recovery_target)
    models, refusals = _models(request, frames)
    if refusals:
        return Reply(refusals=tuple(refusals))
    try:
        try_views(request.server, frames.values())
        with views_in_every_session(frames.values()):
            return _Evaluation(request, frames).run(models)
    except CouldNotAskError as error:
        return Reply(could_not=str(error))


def _models(request: Request, frames: dict[str, Frame]) -> tuple[list[Expectation], list[Refusal]]:
    """GX's own models of the checks, and what they refuse."""
    from great_expectations.compatibility.pydantic import ValidationError  # pyright: ignore[reportPrivateImportUsage]
    from great_expectations.expectations.registry import get_expectation_impl

    models: list[Expectation] = []
    refusals: list[Refusal] = []
    for check in request.checks:
        arguments = expanded(check, request.recovery_target)
        arguments["description"] = html.escape(
            _described(check, request), quote=False
        )  # GX puts it into pages as it is
        for key in _COLUMN_ARGUMENTS:
            if key in arguments:
                given = arguments[key]
                arguments[key] = [alias(str(c)) for c in given] if isinstance(given, list) else alias(str(given))
        if (other := arguments.get("other_table_name")) in frames:
            arguments["other_table_name"] = frames[other].view
        try:
            models.append(get_expectation_impl(check.kind)(**arguments))
        except ValidationError as error:
            refusals += _refusals(check, error.errors())
    return models, refusals


def _refusals(check: Check, errors: list[Any]) -> Iterator[Refusal]:
    """One for each key: a union of types refuses once for each of them. The whole is blamed only if no part of it is."""
    messages: dict[str, list[str]] = {}
    for error in errors:
        key = str(error["loc"][0]) if error["loc"] and error["loc"][0] != "__root__" else ""
        messages.setdefault(key, []).append(error["msg"])
    if len(messages) > 1:
        messages.pop("", None)
    for key, several in messages.items():
        yield Refusal(number=check.number, key=key, what="; ".join(dict.fromkeys(several)))


def _described(check: Check, request: Request) -> str:
    """All tables stand on one page of the Data Docs: each line says which one it is about, in the owners' words or in ours."""
    told = [f"{key} {value}" for key, value in _kwargs(check, request).items() if key not in _COLUMN_ARGUMENTS]
    return check.title if "description" in check.arguments or not told else f"{check.title} ({', '.join(told)})"


class _Evaluation:
    """One run over a server whose views are made."""

    def __init__(self, request: Request, frames: dict[str, Frame]) -> None:
        import great_expectations as gx

        self.request, self.frames = request, frames
        self.context: AbstractDataContext = gx.get_context(mode="ephemeral", project_config=_config())
        self.source = self._source()
        self.batches: dict[str, Batch | None] = {}

    def run(self, models: list[Expectation]) -> Reply:
        outcomes: list[Outcome] = []
        results: list[ExpectationValidationResult] = []
        for check, model in zip(self.request.checks, models, strict=True):
            began = time.monotonic()
            results.append(self._result(check, model))
            outcomes.append(_outcome(check, self.request, results[-1], time.monotonic() - began))
        if any(outcome.error for outcome in outcomes):
            # An expectation that met an error has failed; unless it was the server that was lost.
            with self.request.server.session():
                pass
        return self._documented(Reply(outcomes=tuple(outcomes)), results)

    def _source(self) -> PostgresDatasource:
        arguments = {"hide_parameters": True, "connect_args": self.request.server.parameters}
        sources = cast(Any, self.context.data_sources)  # its types lack the arguments of SQLAlchemy's engine
        return sources.add_postgres(
            "restored server", connection_string=_URL, create_temp_table=False, kwargs=arguments
        )

    def _batch(self, frame: Frame) -> Batch | None:
        """All rows of a frame; None for one that cannot be read, which GX tries here."""
        if frame.error is None and frame.view not in self.batches:
            try:
                asset = self.source.add_table_asset(frame.view, table_name=frame.view)
                self.batches[frame.view] = asset.add_batch_definition_whole_table("whole").get_batch()
            except Exception as error:  # noqa: BLE001 - as below
                frame.error = reason(str(error))
        return self.batches.get(frame.view)

    def _result(self, check: Check, model: Expectation) -> ExpectationValidationResult:
        """One at a time: of a suite, GX drops what stands there twice and asks in bundles that fail together."""
        frame = self.frames[check.table or check.query or ""]
        batch = self._batch(frame)
        if batch is None:
            return _failed(model, frame.error or "it cannot be read")
        try:
            result = batch.validate(model, result_format=_RESULT_FORMAT)
        except Exception as error:  # noqa: BLE001 - whatever GX raises, the expectation was not seen to hold
            return _failed(model, reason(str(error)))
        result.success = bool(result.success)  # sometimes it is numpy's
        if errors := _errors(result.exception_info or {}):
            _blame(result, errors)
        found = dict(result.result or {})
        if result.success and not check.may_be_empty and self._looked_at_nothing(found, check, frame):
            _blame(result, "no value was looked at: there is no row, or all values are null (may_be_empty allows that)")
        result.result = _without_texts(found, check.kind)
        return result

    def _looked_at_nothing(self, found: dict[str, Any], check: Check, frame: Frame) -> bool:
        if "element_count" in found:
            return not found["element_count"] - (found.get("missing_count") or 0)
        if "column" not in check.arguments or "observed_value" not in found or found["observed_value"] is not None:
            return False
        # Sets of distinct values: GX counts only what is missing or too much.
        return not has_values(self.request.server, frame, alias(str(check.arguments["column"])))

    def _documented(self, reply: Reply, results: list[ExpectationValidationResult]) -> Reply:
        request = self.request
        if request.data_docs is None:
            return reply
        try:
            index = write_data_docs(
                self.context,
                Path(request.data_docs),
                title=request.title,
                subject=f"{request.server.dbname}, restored to {request.recovery_target:%Y-%m-%d %H:%M:%S}Z",
                target=request.recovery_target,
                results=results,
            )
        except Exception as error:  # noqa: BLE001 - pages that cannot be written do not undo what was seen
            return reply.model_copy(update={"data_docs_error": f"{type(error).__name__}: {error}"})
        return reply.model_copy(update={"data_docs": str(index)})


def _config() -> Any:
    """Nothing on disk, nothing sent, nothing printed."""
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    return DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        analytics_enabled=False,
        progress_bars=ProgressBarsConfig(globally=False),
    )


# Results in our words


def _failed(model: Expectation, why: str) -> ExpectationValidationResult:
    from great_expectations.core.expectation_validation_result import ExpectationValidationResult

    result = ExpectationValidationResult(success=False, expectation_config=model.configuration, result={}, meta={})
    _blame(result, why)
    return result


def _blame(result: ExpectationValidationResult, why: str) -> None:
    result.success = False
    result.exception_info = {"raised_exception": True, "exception_message": why, "exception_traceback": ""}


def _errors(info: dict[str, Any]) -> str:
    """GX gives one exception, or one for each metric that it could not get."""
    each = [info] if "raised_exception" in info else list(info.values())
    texts = [reason(str(one.get("exception_message"))) for one in each if one.get("raised_exception")]
    return "; ".join(dict.fromkeys(texts))


def _without_texts(found: dict[str, Any], kind: str) -> dict[str, Any]:
    """What GX observed, without texts of the data: not in the record, and not in the Data Docs."""
    kept = {key: value for key, value in found.items() if key != "details"}
    if "observed_value" in kept:
        about_schema = kind.startswith("expect_table_") or "type" in kind
        kept["observed_value"] = _shown(kept["observed_value"], text=about_schema)
    return kept


def _shown(value: Any, *, text: bool) -> Any:
    """Numbers and times are told; texts only where they are names of columns and types."""
    if isinstance(value, datetime):
        return (value.astimezone(UTC) if value.tzinfo else value).isoformat(sep=" ")
    if isinstance(value, dict):
        return {str(key): _shown(item, text=text) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        items = [_shown(item, text=text) for item in value]
        return items if text or not any(isinstance(item, str) for item in value) else f"{len(items)} values"
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value) if text or isinstance(value, Decimal | date) else "a text"


def _outcome(check: Check, request: Request, result: ExpectationValidationResult, seconds: float) -> Outcome:
    info = result.exception_info or {}
    return Outcome(
        title=check.title,
        table=check.table,
        query=check.query,
        column=check.column,
        kind=check.kind,
        kwargs=_kwargs(check, request),
        success=result.success is True,
        observed=_observed(result.result or {}),
        error=str(info["exception_message"]) if info.get("raised_exception") else None,
        seconds=round(seconds, 3),
    )


def _observed(found: dict[str, Any]) -> str:
    if "element_count" in found:
        missing = found.get("missing_count") or 0
        text = f"{found.get('unexpected_count') or 0} of {found['element_count'] - missing} unexpected"
        return f"{text}, {missing} null" if missing else text
    parts = [str(found["observed_value"])] if found.get("observed_value") is not None else []
    parts += [
        f"{found[key]} {key.removesuffix('_count')}" for key in ("unexpected_count", "missing_count") if key in found
    ]
    return ", ".join(parts)


def _kwargs(check: Check, request: Request) -> dict[str, Any]:
    """The arguments with their parameters filled in, in types of JSON; without what is only meant for readers."""
    arguments = expanded(check, request.recovery_target)
    return {key: _in_json(value) for key, value in arguments.items() if key not in _FOR_READERS}


def _in_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _in_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_json(item) for item in value]
    return value.isoformat(sep=" ") if isinstance(value, datetime) else value
