"""Chromium without a window, told over a pipe what to do (the DevTools protocol).

with Browser() as browser:
    browser.open("file:///…/page.html")
    browser.evaluate("document.title"); browser.errors; browser.requested; browser.pdf()
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from typing import Any, Self

CHROMIUM = shutil.which("chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--no-first-run", "--remote-debugging-pipe", "--window-size=1100,1400")  # fmt: skip


class Browser:
    """One page, with what its console said was wrong and all that it asked for."""

    def __init__(self, timeout: float = 60.0) -> None:
        self.timeout, self.errors, self.requested = timeout, [], []
        self._count, self._rest, self._session = 0, b"", None
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)

    def __enter__(self) -> Self:
        theirs_in, self._write = os.pipe()
        self._read, theirs_out = os.pipe()
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(  # it reads from 3 and writes to 4
            ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._count:
                assert "error" not in found, found
                return found["result"]

    def _next(self) -> dict[str, Any]:
        """The next message; what it says of the page is noted."""
        deadline = time.monotonic() + self.timeout
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"the browser was silent for {self.timeout} s"
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "the browser has ended"
            self._rest += chunk
        text, _, self._rest = self._rest.partition(b"\0")
        found = json.loads(text)
        method, given = found.get("method"), found.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requested.append(given["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(given["exceptionDetails"]["text"])
        elif method == "Log.entryAdded" and given["entry"]["level"] in ("warning", "error"):
            self.errors.append(given["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.errors.append(str(given["args"]))
        return found

    def open(self, url: str) -> None:
        """Go to a page and wait until all of it is there."""
        self.call("Page.navigate", url=url)
        while self.evaluate("document.readyState + location.href") != f"complete{url}":
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """What an expression of JavaScript gives in the page, as plain values."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def pdf(self) -> bytes:
        """The page as printed on A4."""
        found = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        return base64.b64decode(found["data"])
