"""The pages in a real browser: they render, in light and dark, wide and narrow, and ask nothing of anybody."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import missing
from tests.unit.test_reports import SAMPLES, make_card

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("browser")]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ANSWER_WITHIN = 60.0
WIDE, NARROW = 1280, 400
PLACE = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """Chromium without a window, spoken to over its DevTools pipe: JSON messages that end in a zero byte."""

    def __init__(self, program: str, home: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # Above the descriptors 3 and 4, which the browser reads and writes.
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_browser, from_browser)]
        command = [
            sys.executable,
            "-c",
            PLACE,
            *map(str, theirs),
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
        ]
        command += ["--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
        command += [f"--user-data-dir={home}", "--remote-debugging-pipe", "about:blank"]
        with (home / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=theirs)
        for fd in (to_browser, from_browser, *theirs):
            os.close(fd)
        self._number = 0
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = None
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], ANSWER_WITHIN)
            assert ready, f"the browser said nothing for {ANSWER_WITHIN:.0f} s"
            chunk = os.read(self._in, 1 << 20)
            assert chunk, "the browser has ended"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def show(self, path: Path, *, width: int = WIDE, dark: bool = False) -> list[str]:
        """Open the file and wait until it is loaded. The addresses that were asked for."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media="screen", features=scheme)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """What the page brought to the browser's console, refusals of its own policy among it."""
        return [e["params"]["entry"]["text"] for e in self.events if e["method"] == "Log.entryAdded"]

    def ask(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._session = None
            self.call("Browser.close")
        self._process.wait(30)
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        missing("Chromium", "make services installs it")
    assert program is not None
    home = Path(tempfile.mkdtemp(prefix="ops-browser-"))
    started = Browser(program, home)
    yield started
    started.close()
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("reports")
    made = {name: directory / f"{name}.html" for name in SAMPLES}
    for name, path in made.items():
        path.write_text(SAMPLES[name](), "utf-8")
    return made


samples = pytest.mark.parametrize("sample", SAMPLES)
schemes = pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])


@samples
def test_the_page_renders_and_asks_nothing_of_anybody(browser: Browser, pages: dict[str, Path], sample: str) -> None:
    asked = browser.show(pages[sample])
    assert [url for url in asked if not url.startswith("data:")] == [pages[sample].as_uri()]
    assert browser.complaints() == []
    assert browser.ask("document.querySelector('h1').getBoundingClientRect().height") > 30
    verdict = browser.ask("document.querySelector('#verdict')?.innerText ?? null")
    assert verdict in {
        "PASS", "FAIL", "COULD NOT VERIFY", "NOTHING TO RESTORE", "1 of 7 proven", "To be verified", None,
    }  # fmt: skip
    assert (verdict is None) == (sample == "drills"), "only the index of drills has none"


def test_a_request_would_have_been_seen(browser: Browser, tmp_path: Path) -> None:
    """The control of the test above: without its own policy a page can ask, and with it the browser complains."""
    careless = tmp_path / "careless.html"
    careless.write_text("<h1>x</h1><img src='http://127.0.0.1:9/pixel.png'>")
    assert "http://127.0.0.1:9/pixel.png" in browser.show(careless)
    guarded = tmp_path / "guarded.html"
    head = SAMPLES["never"]().partition("<style>")[0]
    guarded.write_text(
        f"{head}</head><h1>x</h1><img src='http://127.0.0.1:9/pixel.png'><script>document.title='ran'</script>"
    )
    browser.show(guarded)
    stopped = [e["params"] for e in browser.events if e["method"] == "Network.loadingFailed"]
    assert [each.get("blockedReason") for each in stopped] == ["csp"]
    assert any("Content Security Policy" in text for text in browser.complaints())
    assert browser.ask("document.title") != "ran"


@samples
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_nothing_sticks_out_of_the_page(browser: Browser, pages: dict[str, Path], sample: str, width: int) -> None:
    browser.show(pages[sample], width=width)
    assert browser.ask("document.documentElement.scrollWidth") <= width
    # Neither does any text leave the paper at the right, where the page would clip it.
    out = browser.ask(
        """[...document.querySelectorAll('h1,h2,h3,p,li,td,th,dd,dt,span,code,time,text')]
           .filter(e => e.getBoundingClientRect().width > 1 && e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('pre'))
           .map(e => e.tagName + ' ' + e.textContent.slice(0, 60))"""
    )
    assert out == []


# The relative luminance and contrast of WCAG 2, over the nearest ground that is not transparent.
CONTRAST = """(() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return {rgb: m.slice(0, 3), a: m.length > 3 ? m[3] : 1}; };
  const light = rgb => { const [r, g, b] = rgb.map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
    return .2126 * r + .7152 * g + .0722 * b; };
  const ground = e => {
    for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c.a === 1) return c.rgb; }
    return [255, 255, 255];
  };
  const poor = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.tagName === 'title' || e.getBoundingClientRect().width <= 1) continue;
    const style = getComputedStyle(e), svg = e instanceof SVGElement;
    const a = light(parse(svg ? style.fill : style.color).rgb), b = light(ground(svg ? e.closest('svg').parentElement : e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) poor.push(`${e.tagName}.${e.className} ${ratio.toFixed(2)} ${e.textContent.trim().slice(0, 40)}`);
  }
  return poor;
})()"""


@samples
@schemes
def test_every_text_stands_out_from_its_ground(
    browser: Browser, pages: dict[str, Path], sample: str, dark: bool
) -> None:
    browser.show(pages[sample], dark=dark)
    page_is_dark = browser.ask("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert page_is_dark == dark
    assert browser.ask(CONTRAST) == []


@schemes
def test_only_a_pass_is_green(browser: Browser, pages: dict[str, Path], dark: bool) -> None:
    def stamp(sample: str) -> tuple[int, int, int]:
        browser.show(pages[sample], dark=dark)
        colour = browser.ask("getComputedStyle(document.querySelector('.stamp')).backgroundColor")
        red, green, blue = (int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
        return red, green, blue

    red, green, blue = stamp("pass")
    assert green > red
    assert green > blue
    for other in ("fail", "unverified", "never", "index"):
        red, green, _ = stamp(other)
        assert red > green


def evidence_in_sight(browser: Browser) -> list[str]:
    """The checks whose query and answer are shown. Asked for after a frame: the browser lays a page out before its next one."""
    return browser.ask(
        """new Promise(answer => requestAnimationFrame(() => requestAnimationFrame(() => answer(
             [...document.querySelectorAll('.gate')].filter(e => e.querySelector('.evidence').checkVisibility())
               .map(e => e.id.replace('gate-', ''))))))"""
    )


def test_what_failed_is_open_and_the_rest_opens_at_a_click(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["fail"])
    assert evidence_in_sight(browser) == ["checksums"]
    browser.ask("document.querySelector('#gate-canary summary').click()")
    assert evidence_in_sight(browser) == ["canary", "checksums"]
    assert "FROM ops_canary.beat" in browser.ask("document.querySelector('#gate-canary').innerText")


def test_on_paper_every_query_is_printed_and_the_ground_is_white(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["pass"], dark=True)
    assert evidence_in_sight(browser) == []
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.call("Emulation.setEmulatedMedia", media="print", features=dark)
    assert evidence_in_sight(browser) == [gate.id for gate in make_card().gates]
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_the_plots_fill_their_width_and_their_text_keeps_its_size(browser: Browser, pages: dict[str, Path]) -> None:
    for width in (WIDE, NARROW):
        browser.show(pages["pass"], width=width)
        strip = browser.ask("document.querySelector('.strip').getBoundingClientRect().width")
        room = browser.ask("document.querySelector('.strip').parentElement.getBoundingClientRect().width")
        assert strip == pytest.approx(room, abs=1)
        assert browser.ask("getComputedStyle(document.querySelector('.strip text')).fontSize") == "12px"
        bars = browser.ask("[...document.querySelectorAll('.gantt .bar')].map(e => e.getBoundingClientRect().width)")
        assert max(bars) > 0.3 * room * (0.5 if width == WIDE else 1)
        assert browser.ask("document.querySelectorAll('.strip .mark').length") > 10
