"""Great Expectations' Data Docs of one evaluation, as pages that need nothing but themselves.

As GX writes them they load styles and scripts from ten public hosts, are empty where these cannot be reached, and bring 4 MB of
fonts and pictures. What was found stands in the page itself; the rest is taken out and a small style put in.
"""

from __future__ import annotations

import html
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from great_expectations.core.expectation_validation_result import ExpectationValidationResult
    from great_expectations.data_context.data_context.abstract_data_context import AbstractDataContext

# GX escapes few of the names that it shows: nothing on these pages may run or load anything.
_HEAD = """<head><meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
_STYLE = """<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem }
th, td { border: 1px solid #d5dae1; padding: .4rem .6rem; text-align: left; vertical-align: top }
a { color: #1f5fa8 } .text-success { color: #1a7f37 } .text-danger { color: #b3261e } .text-warning { color: #9a6700 }
i { font-style: normal; font-weight: bold } .fa-check-circle::before { content: "✔ holds" }
.fa-times::before { content: "✘ fails" } .fa-exclamation-triangle::before { content: "✘ error" }
td { overflow-wrap: anywhere } .navbar.sticky-top, .card.mb-3, a[data-toggle] { display: none }
@media (prefers-color-scheme: dark) { body { background: #14181f; color: #e3e7ee } a { color: #7db3ef } th, td { border-color: #3a4352 } }
</style>
</head>"""
_FOREIGN = re.compile(
    r"<script\b.*?</script>|<link\b[^>]*>|<img\b[^>]*>|<footer\b.*?</footer>|<button\b.*?</button>|<form\b.*?</form>",
    re.DOTALL,
)


def write_data_docs(
    context: AbstractDataContext,
    folder: Path,
    *,
    title: str,
    subject: str,
    target: datetime,
    results: list[ExpectationValidationResult],
) -> Path:
    """The index page. Raises OSError or what GX raises where pages cannot be written."""
    context.add_data_docs_site("proof", _site(folder))
    name = re.sub("[^a-zA-Z0-9_-]+", "_", title)
    _keep(context, name, subject, f"{name}-at-{target.astimezone(UTC):%Y%m%dT%H%M%SZ}", results)
    before = _pages(folder)
    context.build_data_docs()
    # GX only logs what it could not write.
    written = sorted(_pages(folder) - before)
    if len(written) != 1:
        raise OSError(f"{len(written)} pages of results were written to {folder}")
    shutil.rmtree(folder / "static", ignore_errors=True)
    for page in folder.glob("**/*.html"):
        page.write_text(_without_the_foreign(page.read_text()))
    return _index(folder, title, written[0])


def _pages(folder: Path) -> set[Path]:
    return set(folder.glob("validations/**/*.html"))


def _without_the_foreign(page: str) -> str:
    kept = _FOREIGN.sub("", re.sub("<style>.*?</style>", "", page, flags=re.DOTALL))
    return kept.replace("<head>", _HEAD, 1).replace("</head>", _STYLE, 1)


def _index(folder: Path, title: str, page: Path) -> Path:
    link = html.escape(str(page.relative_to(folder)))
    index = folder / "index.html"
    index.write_text(
        f'<!doctype html><html lang="en">{_HEAD}<meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta http-equiv="refresh" content="0; url={link}">{_STYLE}'
        f'<body><p><a href="{link}">What was expected of {html.escape(title)}, and what was found</a></p></body></html>\n'
    )
    return index


def _site(folder: Path) -> Any:
    return {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(folder)},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
    }


def _keep(
    context: AbstractDataContext, name: str, subject: str, run_name: str, results: list[ExpectationValidationResult]
) -> None:
    """Hand all results, as of one suite, to the store from which the pages are made."""
    import great_expectations as gx
    from great_expectations.core import ExpectationSuiteValidationResult, RunIdentifier
    from great_expectations.data_context.types.resource_identifiers import (
        ExpectationSuiteIdentifier,
        ValidationResultIdentifier,
    )

    good = sum(bool(result.success) for result in results)
    counted: Any = {
        "evaluated_expectations": len(results),
        "successful_expectations": good,
        "unsuccessful_expectations": len(results) - good,
        "success_percent": 100 * good / len(results),
    }
    run = RunIdentifier(run_name=run_name, run_time=datetime.now(UTC))
    meta: Any = {
        "great_expectations_version": gx.__version__,
        "batch_spec": {"data_asset_name": subject},
        "run_id": run,
    }
    kept = ExpectationSuiteValidationResult(
        success=good == len(results), results=results, suite_name=name, statistics=counted, meta=meta
    )
    expected: Any = [result.expectation_config for result in results]
    context.suites.add(gx.ExpectationSuite(name=name, expectations=expected))
    key = ValidationResultIdentifier(ExpectationSuiteIdentifier(name), run, name)
    context.validation_results_store.set(key, kept)
