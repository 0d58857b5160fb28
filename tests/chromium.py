"""A real headless Chromium over its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from tests.baton_process import until

START_S = 60.0
FLAGS = (
    "--headless=new",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--mute-audio",
)


class Chromium:
    """One tab.

    Args:
        program: path of the browser.
        directory: its profile; fresh.
    """

    def __init__(self, program: str, directory: Path) -> None:
        sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()
        command = [
            program,
            *FLAGS,
            *sandbox,
            "--remote-debugging-port=0",
            f"--user-data-dir={directory}",
            "about:blank",
        ]
        with (directory / "log").open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._open = contextlib.ExitStack()
        self._numbers = itertools.count(1)
        self.problems: list[str] = []  # exceptions, console errors, refused requests
        try:
            self._socket = self._connect(directory / "DevToolsActivePort")
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def _connect(self, port_file: Path) -> ClientConnection:
        until(lambda: port_file.is_file() and port_file.read_text().count("\n"), START_S)
        port = port_file.read_text().split()[0]
        tabs = until(lambda: [t for t in httpx.get(f"http://127.0.0.1:{port}/json").json() if t["type"] == "page"])
        return self._open.enter_context(connect(tabs[0]["webSocketDebuggerUrl"], max_size=1 << 26))

    def close(self) -> None:
        self._open.close()
        self._process.terminate()
        self._process.wait(20)

    def call(self, method: str, **params: Any) -> Any:
        """One command; events that come meanwhile are looked at for problems."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        """Light or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def js(self, expression: str) -> Any:
        """Value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 30) -> Any:
        """Wait until an expression is true."""
        return until(lambda: self.js(expression), seconds)

    def until_equal(self, expression: str, expected: Callable[[], Any], seconds: float = 30) -> None:
        """Wait until the page says what `expected` does."""
        until(lambda: self.js(expression) == expected(), seconds)

    def key(self, name: str, text: str = "") -> None:
        """Press a key."""
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        event = {
            "key": name,
            "windowsVirtualKeyCode": codes.get(name, 0),
            "text": text or {"Enter": "\r"}.get(name, ""),
        }
        self.call("Input.dispatchKeyEvent", type="keyDown", **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **{**event, "text": ""})

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """The whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message["method"] == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif message["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
