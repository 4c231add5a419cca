"""A real Chromium without a screen, driven through its own protocol; skips where there is none."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    "--remote-debugging-pipe",
)


class Tab:
    """One page of the browser, with cookies of its own."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser = browser
        self.session = session
        self.send("Page.enable")
        self.send("Runtime.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.send(method, self.session, **params)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        made = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in made, made
        return made["result"].get("value")

    def wait(self, script: str, seconds: float = 90) -> Any:
        """The value of an expression once it is true."""
        end = time.monotonic() + seconds
        while True:
            if value := self.run(script):
                return value
            assert time.monotonic() < end, f"{script}\n{self.text()[-3000:]}"
            time.sleep(0.05)

    def comes(self, script: str, seconds: float) -> bool:
        """Whether an expression becomes true in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.run(script):
                return True
            time.sleep(0.05)
        return False

    def text(self) -> str:
        return str(self.run("document.body ? document.body.innerText : ''"))

    def wait_text(self, text: str, seconds: float = 90) -> None:
        self.wait(f"document.body && document.body.innerText.includes({json.dumps(text)})", seconds)

    def open(self, url: str, width: int = 1280, height: int = 900) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.send("Page.navigate", url=url)
        self.wait("document.querySelector('#box textarea') !== null")

    def drop_file(self, path: Path) -> None:
        """Give a file to the input box."""
        made = self.send(
            "Runtime.evaluate", expression="document.querySelector('#box input[type=file]')"
        )
        held = made["result"]["objectId"]
        self.send("DOM.setFileInputFiles", files=[str(path)], objectId=held)
        self.wait("document.querySelector('#box .thumbnail-item, #box .thumbnails img') !== null")

    def ask(self, text: str) -> None:
        """Type into the input box and press Enter."""
        self.wait("document.querySelector('#box .submit-button') !== null")
        self.run("document.querySelector('#box textarea').focus()")
        self.send("Input.insertText", text=text)
        self.wait(f"document.querySelector('#box textarea').value === {json.dumps(text)}")
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Enter",
                code="Enter",
                windowsVirtualKeyCode=13,
                **({"text": "\r"} if kind == "keyDown" else {}),
            )

    def screenshot(self) -> bytes:
        return base64.b64decode(self.send("Page.captureScreenshot")["data"])


class Browser:
    """The running program, spoken to through a pair of pipes."""

    def __init__(self, commands: BinaryIO, replies: BinaryIO) -> None:
        self._commands = commands
        self._replies = replies
        self._ids = itertools.count(1)

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """A command's result; events that come meanwhile are not looked at."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            reply = json.loads(self._read())
            if reply.get("id") == number:
                assert "error" not in reply, (method, reply)
                return reply["result"]

    def _read(self) -> bytes:
        out = bytearray()
        while (byte := self._replies.read(1)) not in (b"\0", b""):
            out += byte
        assert out, "the browser has ended"
        return bytes(out)

    def tab(self) -> Tab:
        """A page in a context of its own, as another visitor's."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        made = self.send("Target.createTarget", url="about:blank", browserContextId=context)
        target = made["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        return Tab(self, attached["sessionId"])


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A Chromium that reaches this machine alone."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("there is no Chromium")
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    words = [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    shell = f"exec {shlex.join(words)} 3<&{theirs_in} 4>&{theirs_out}"
    process = subprocess.Popen(
        ["bash", "-c", shell],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(theirs_in, theirs_out),
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        with os.fdopen(ours_out, "wb") as commands, os.fdopen(ours_in, "rb") as replies:
            yield Browser(commands, replies)
    finally:
        process.terminate()
        process.wait()
