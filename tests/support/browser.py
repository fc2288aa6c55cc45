"""Chromium without a screen, driven over its own pipe: no driver, no package is needed.

    with Chromium(folder) as browser:
        browser.open(url)
        browser.wait_for("document.querySelector('h1')?.textContent", "the page has a heading")
        browser.screenshot("page")

Chromium speaks its DevTools protocol on descriptors 3 and 4 (--remote-debugging-pipe): JSON, each
message ended by a zero byte.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.relay import POLL_S

#: Where the screenshots are copied to, for whoever wants to look at them.
SCREENSHOTS = "RELAY_TEST_SCREENSHOTS"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ANSWER_TIMEOUT_S = 60.0
#: Pages load their scripts, ask the server and draw; a second or two on an idle machine.
PAGE_TIMEOUT_S = 60.0

_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing but loopback
    "--window-size=1600,1000",
)

#: Moves the pipes to the descriptors where Chromium looks for them.
_MOVE_PIPES = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """Return the path of a Chromium; None: there is none on this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One browser with one page; a context manager.

    Args: folder: for its profile, its log and the screenshots.
    """

    def __init__(self, folder: Path, binary: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._received = b""
        self._next_id = 0
        to_browser, self._out = _high_pipe()
        self._in, from_browser = _high_pipe()
        command = [binary, *_FLAGS, f"--user-data-dir={folder / 'profile'}"]
        pipes = [str(to_browser), str(from_browser)]
        with (folder / "chromium.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", _MOVE_PIPES, *pipes, *command],
                pass_fds=(to_browser, from_browser),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        os.close(to_browser)
        os.close(from_browser)
        self._session: str | None = None

    def __enter__(self) -> Chromium:
        try:
            target = self._ask("Target.createTarget", url="about:blank")["targetId"]
            attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, and all processes of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its group has its id
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def open(self, url: str) -> None:
        """Go to an address; what the page shows must be waited for."""
        self._ask("Page.navigate", url="about:blank")  # the same page again is loaded again
        answer = self._ask("Page.navigate", url=url)
        assert not answer.get("errorText"), f"{url}: {answer['errorText']}"

    def value(self, expression: str) -> Any:
        """Return what a JavaScript expression is in the page."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str, what: str, timeout_s: float = PAGE_TIMEOUT_S) -> None:
        """Return as soon as an expression is true in the page; a page under way is no error."""
        until_s = time.monotonic() + timeout_s
        while not self._is_true(expression):
            if time.monotonic() > until_s:
                path = self.screenshot("too-late")
                raise AssertionError(f"not within {timeout_s:g} s: {what}; the page: {path}")
            time.sleep(POLL_S)

    def click(self, expression: str) -> None:
        """Click in the middle of the element that an expression gives, as a mouse would."""
        box = self.value(
            f"(() => {{ const e = {expression}; e.scrollIntoView({{block: 'center'}});"
            " const r = e.getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._ask(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0],
                y=box[1],
                button="left",
                clickCount=1,
            )

    def screenshot(self, name: str) -> Path:
        """Write what the page looks like to <folder>/<name>.png, and return the path."""
        data = base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"])
        path = self._folder / f"{name}.png"
        path.write_bytes(data)
        if os.environ.get(SCREENSHOTS):
            wanted = Path(os.environ[SCREENSHOTS])
            wanted.mkdir(parents=True, exist_ok=True)
            (wanted / path.name).write_bytes(data)
        return path

    def _is_true(self, expression: str) -> bool:
        try:
            return self.value(f"Boolean({expression})") is True
        except (AssertionError, ProtocolError):
            return False  # the page is not there yet, or another is coming

    # ── the pipe ──

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events on the way are passed over."""
        self._next_id += 1
        message = {"id": self._next_id, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        _write_all(self._out, json.dumps(message).encode() + b"\0")
        until_s = time.monotonic() + ANSWER_TIMEOUT_S
        while (answer := self._receive(until_s)).get("id") != self._next_id:
            pass
        if "error" in answer:
            raise ProtocolError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self, until_s: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            readable, _, _ = select.select([self._in], [], [], max(0.0, until_s - time.monotonic()))
            data = os.read(self._in, 1 << 20) if readable else b""
            if not data:
                log = (self._folder / "chromium.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"Chromium {'has gone' if readable else 'is silent'}:\n{log}")
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer


class ProtocolError(Exception):
    """Chromium refused a command."""


def _high_pipe() -> tuple[int, int]:
    """Return a pipe whose descriptors are none of those that are to be overwritten."""
    low = os.pipe()
    high = tuple(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in low)
    for fd in low:
        os.close(fd)
    return high[0], high[1]


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
