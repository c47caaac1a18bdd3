"""A headless Chromium for tests, driven through its DevTools protocol with nothing but the standard
library: the browser reads commands from its file descriptor 3 and answers on 4, JSON ended by NUL.

    with Browser() as browser:
        page = browser.open(path)
        page.move(300, 200)
        page.run("document.title")

Which browser: what REPRISE_BROWSER names, or the first of NAMES on PATH.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

VARIABLE = "REPRISE_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless --remote-debugging-pipe --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage --hide-scrollbars --force-device-scale-factor=1"
).split()
_PATIENCE = 120.0  # seconds for one answer, on a machine that does other things as well


def find() -> str | None:
    """The path of a browser, or None."""
    for name in (os.environ.get(VARIABLE), *NAMES):
        path = shutil.which(name) if name else None
        if path:
            return path
    return None


class Browser:
    """A browser process with a profile of its own; both go at the end of the block."""

    def __init__(self) -> None:
        executable = find()
        if executable is None:
            raise FileNotFoundError(f"no browser: {VARIABLE} or one of {', '.join(NAMES)} on PATH")
        self._profile = tempfile.mkdtemp(prefix="reprise-browser-")
        log = os.path.join(self._profile, "log")
        to_browser, self._send = os.pipe()
        self._receive, from_browser = os.pipe()
        # Out of the way of 3 and 4, which they become in the browser.
        ours = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (to_browser, from_browser)]
        actions = [
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            (os.POSIX_SPAWN_DUP2, ours[0], 3),
            (os.POSIX_SPAWN_DUP2, ours[1], 4),
        ]
        self._pid = os.posix_spawn(
            executable,
            [executable, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            {**os.environ, "HOME": self._profile},
            file_actions=actions,
            setpgroup=0,
        )
        for fd in (to_browser, from_browser, *ours):
            os.close(fd)
        self._numbers = itertools.count(1)
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._send)  # the end of its commands is the end of the browser
        os.close(self._receive)
        deadline = time.monotonic() + 10
        while os.waitpid(self._pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.killpg(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                break
            time.sleep(0.02)
        try:
            os.killpg(self._pid, signal.SIGKILL)  # helpers that outlive it
        except ProcessLookupError:
            pass
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Sends one command and waits for its answer; events on the way go to ``events``."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._send, data) :]
        while True:
            answer = self._next()
            if answer.get("id") != number:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._receive], [], [], _PATIENCE)
            data = os.read(self._receive, 1 << 20) if ready else b""
            if not data:
                log = Path(self._profile, "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the browser does not answer; it said:\n{log}")
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, path: Path, width: int = 1280, height: int = 1000, dark: bool = False) -> Page:
        """Loads a file in a tab of its own, with a window of this size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        page.dark(dark)
        page.call("Page.navigate", url=path.resolve().as_uri())
        page.wait_for("document.readyState === 'complete' && location.protocol === 'file:'")
        return page


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser = browser
        self._session = session
        self._target = target

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; an error of it is raised."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Until the expression is true."""
        deadline = time.monotonic() + _PATIENCE
        while not self.run(f"Boolean({expression})"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"never true: {expression}")
            time.sleep(0.02)

    def dark(self, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def mouse(self, what: str, x: float, y: float) -> None:
        """``what``: Moved, Pressed or Released; in the coordinates of the window."""
        button = {"button": "left", "clickCount": 1} if what != "Moved" else {}
        self.call("Input.dispatchMouseEvent", type=f"mouse{what}", x=x, y=y, **button)

    def key(self, key: str) -> None:
        for what in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=what, key=key, code=key)

    def click(self, selector: str) -> None:
        """In the middle of the element, which is scrolled into view."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            " return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        )
        self.mouse("Moved", x, y)
        self.mouse("Pressed", x, y)
        self.mouse("Released", x, y)

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def events(self, method: str) -> list[dict[str, Any]]:
        """What the browser has told of this page so far."""
        self.run("0")  # what came before it has arrived
        return [
            event["params"]
            for event in self._browser.events
            if event.get("sessionId") == self._session and event.get("method") == method
        ]
