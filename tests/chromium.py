"""A headless Chromium under the DevTools protocol, over its pipe: no driver, no port, no library."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless=new", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--remote-debugging-pipe"]
PATIENCE = 60.0  # seconds


class Page:
    """One page. Whatever it says on its console, throws, or asks the network for is kept."""

    def __init__(self, down: int, up: int) -> None:
        self._down, self._up, self._number, self._rest = down, up, 0, b""
        self._session: str | None = None
        self.complaints: list[str] = []
        self.asked: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Send a command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._down, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def open(self, file: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file and wait until it has drawn."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=file.resolve().as_uri())
        until = time.monotonic() + PATIENCE
        while self.value("document.readyState") != "complete":
            assert time.monotonic() < until, "the page did not load"

    def value(self, expression: str) -> Any:
        """What an expression gives in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def box(self, selector: str) -> dict[str, float]:
        """Where the first such element is, once it has been scrolled to."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{element}.scrollIntoView({{block: 'center'}})")
        return dict(self.value(f"{element}.getBoundingClientRect().toJSON()"))

    def mouse(self, x: float, y: float, kind: str = "mouseMoved") -> None:
        """Move there, or press or release there."""
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def click(self, x: float, y: float) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(x, y, kind)

    def screenshot(self, file: Path) -> None:
        """The whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._up], [], [], PATIENCE)[0], "Chromium does not answer"
            more = os.read(self._up, 1 << 20)
            assert more, "Chromium ended"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        parameters = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(parameters["args"]))
            case "Log.entryAdded":
                text = parameters["entry"]["text"]
                if "willReadFrequently" not in text:  # that is said of the tests' own reading of pixels
                    self.complaints.append(text)
            case "Network.requestWillBeSent":
                self.asked.append(parameters["request"]["url"])
        return message


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A page of a Chromium that keeps its files in `folder` and ends with the block."""
    assert PROGRAM is not None
    down_read, down = os.pipe()
    up, up_write = os.pipe()

    def as_three_and_four() -> None:
        # high numbers first: one of the pipes may have 3 or 4 already
        read, write = os.dup(down_read), os.dup(up_write)
        os.dup2(read, 3)
        os.dup2(write, 4)

    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # root cannot have one
    process = subprocess.Popen(
        [PROGRAM, *FLAGS, *sandbox, f"--user-data-dir={folder}"],
        preexec_fn=as_three_and_four,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(down_read)
    os.close(up_write)
    try:
        yield Page(down, up)
    finally:
        process.kill()
        process.wait()
        os.close(down)
        os.close(up)
