"""A real browser for the reports: Debian's Chromium, driven through its DevTools pipe.

`python -m tests.support.browser PAGE.html PICTURE.png --width 390` makes a picture of a page.
"""

import argparse
import base64
import io
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

CHROMIUM = "chromium"
LEFT_OUT = (
    "no chromium on this machine: apt-get install -y --no-install-recommends "
    f"{CHROMIUM} fonts-dejavu-core"
)
PHONE, DESKTOP = (390, 844), (1280, 900)

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"),
)
_TIMEOUT_S = 60.0


def has_chromium() -> bool:
    """Whether there is a browser on this machine."""
    return shutil.which(CHROMIUM) is not None


class Browser:
    """A running Chromium. Messages and their answers: chromedevtools.github.io/devtools-protocol"""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out, self._in = to_browser, from_browser
        self._number = 0
        self._read = b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, *, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a message and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def wait(self, method: str, session: str) -> None:
        """Wait until an event has happened."""
        while not any(e["method"] == method and e.get("sessionId") == session for e in self.events):
            self._receive()

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + _TIMEOUT_S
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._in], [], [], deadline - time.monotonic())
            data = os.read(self._in, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError("the browser is gone, or does not answer")
            self._read += data
        first, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        if "method" in message:
            self.events.append(message)
        return message


class Page:
    """A page that is loaded in a window of `size`, in light or dark."""

    def __init__(
        self, browser: Browser, path: Path, *, size: tuple[int, int], dark: bool = False
    ) -> None:
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        width, height = size
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        browser.wait("Page.loadEventFired", self._session)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A message to this page."""
        return self._browser.call(method, session=self._session, **parameters)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        done = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"])
        return done["result"].get("value")

    def events(self, method: str) -> list[dict[str, Any]]:
        """The parameters of all events of a kind so far."""
        return [
            event["params"]
            for event in self._browser.events
            if event["method"] == method and event.get("sessionId") == self._session
        ]

    def complaints(self) -> list[Any]:
        """Whatever the page has put on the console, and what it refused."""
        return [
            *self.events("Runtime.consoleAPICalled"),
            *self.events("Runtime.exceptionThrown"),
            *self.events("Log.entryAdded"),
        ]

    def requests(self) -> list[str]:
        """URLs that the page has asked for, without what is part of it."""
        asked = [event["request"]["url"] for event in self.events("Network.requestWillBeSent")]
        return [url for url in asked if not url.startswith("data:")]

    def press(self, key: str) -> None:
        """Press a key, as somebody without a mouse does."""
        for kind in ("keyDown", "keyUp"):
            code = {"Tab": 9, "Enter": 13}[key]
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def picture(self, *, whole: bool = False) -> Image.Image:
        """What is seen, or all of the page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **self._clip(whole))
        return Image.open(io.BytesIO(base64.b64decode(data["data"]))).convert("RGB")

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {**size, "scale": 1}}

    def pdf(self) -> bytes:
        """The page as it is printed, on A4."""
        data = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"]
        return base64.b64decode(data)


@contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium with an empty profile, which ends with the block."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            # It expects its pipes as the files 3 and 4.
            ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{from_write}', "-", *command],
            pass_fds=(to_read, from_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": profile},
        )
        os.close(to_read)
        os.close(from_write)
        try:
            yield Browser(to_write, from_read)
        finally:
            os.close(to_write)
            os.close(from_read)
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main(argv: Sequence[str]) -> None:
    """Make a picture of a page, with few enough colours to be a small file."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.browser", description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=DESKTOP[0], help="of the window [pixels]")
    parser.add_argument("--height", type=int, default=DESKTOP[1], help="of the window [pixels]")
    parser.add_argument("--dark", action="store_true", help="in dark colours")
    parser.add_argument("--whole", action="store_true", help="all of the page, not what is seen")
    parser.add_argument("--section", help="id of what to scroll to")
    given = parser.parse_args(argv)
    with browser() as chromium:
        page = Page(chromium, given.page, size=(given.width, given.height), dark=given.dark)
        if given.section:
            page.run(f"document.getElementById({json.dumps(given.section)}).scrollIntoView()")
        picture = page.picture(whole=given.whole)
    picture.quantize(200).save(given.picture, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
