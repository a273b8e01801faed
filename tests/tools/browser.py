"""A headless Chromium, spoken to over a pipe by its DevTools protocol, for tests of pages.

https://chromedevtools.github.io/devtools-protocol: messages are JSON, each ended by a zero byte; the browser reads file
descriptor 3 and writes 4.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    *(
        "--headless=new",
        "--hide-scrollbars",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--remote-debugging-pipe",
    ),
    *("--no-first-run", "--disable-extensions", "--disable-component-update", "--disable-background-networking"),
)
_DEADLINE = 60.0  # seconds for an answer of the browser


@dataclass
class Page:
    """A page that was loaded. `failures` are exceptions, errors on the console and refusals of the policy; `requests`
    all addresses that were asked for."""

    browser: Browser
    session: str
    failures: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    loaded: bool = False

    def send(self, method: str, **params: Any) -> Any:
        return self.browser.send(method, self.session, **params)

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def size(self, width: int, height: int = 900) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        """Ask for colours: light or dark."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def point(self, selector: str, *, click: bool = False) -> None:
        """Move the mouse over the middle of an element, and click if asked."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{place}.scrollIntoView({{block: 'center'}})")
        x, y = self.evaluate(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({place}.getBoundingClientRect())")
        kinds = ["mouseMoved", *(["mousePressed", "mouseReleased"] if click else [])]
        for kind in kinds:
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def screenshot(self, path: Path | None = None) -> bytes:
        """Return all of the page as PNG, and write it if a path is given."""
        found = base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        if path is not None:
            path.write_bytes(found)
        return found


class Browser:
    """One process of Chromium, with a profile of its own."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        read, ours_out = os.pipe()
        ours_in, written = os.pipe()
        # High numbers, so that neither is 3 or 4 before the child has its own.
        there, answers = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in (read, written))
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        # The shell gives the two their numbers.
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{there} 4>&{answers}', "bash", *command],
            pass_fds=(there, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for fd in (read, written, there, answers):  # so that its end is seen
            os.close(fd)
        self._out, self._in, self._rest, self._number = ours_out, ours_in, b"", 0
        self._pages: dict[str, Page] = {}

    def close(self) -> None:
        """End the browser and all its processes."""
        with contextlib.suppress(OSError, TimeoutError, EOFError):
            self.send("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()
        os.close(self._out)
        os.close(self._in)

    def send(self, method: str, session: str | None = None, **params: Any) -> Any:
        """Return the answer to a command. What else is told meanwhile goes to the pages."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found)
                return found["result"]

    def open(self, url: str) -> Page:
        """Load an address, and return the page when it has loaded."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.send(f"{domain}.enable")
        page.send("Page.navigate", url=url)
        while not page.loaded:
            self._next()
        return page

    def _next(self) -> Any:
        """Return the next message, after telling the page that it is about."""
        ends = time.monotonic() + _DEADLINE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0, ends - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium does not answer")
            data = os.read(self._in, 1 << 20)
            if not data:
                raise EOFError("Chromium has ended")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        found = json.loads(line)
        if page := self._pages.get(found.get("sessionId", "")):
            _note(page, found.get("method"), found.get("params", {}))
        return found


def _note(page: Page, method: str | None, params: Any) -> None:
    if method == "Page.loadEventFired":
        page.loaded = True
    elif method == "Runtime.exceptionThrown":
        page.failures.append(str(params["exceptionDetails"]))
    elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
        page.failures.append(str(params["args"]))
    elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
        page.failures.append(params["entry"]["text"])
    elif method == "Page.javascriptDialogOpening":
        page.failures.append(f"a dialog: {params['message']}")
    elif method == "Network.requestWillBeSent":
        page.requests.append(params["request"]["url"])


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start a browser, and end it."""
    started = Browser(profile)
    try:
        yield started
    finally:
        started.close()
