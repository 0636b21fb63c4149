"""A Firefox of its own to click and type in, over its built-in remote protocol (Marionette).

Playwright knows only a Firefox that it has changed, Selenium needs a driver that Debian does not have, and the client
of Mozilla brings a dozen packages that warn when they are imported.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, List, Mapping

from tests.support import child_env, need

KEYS = {"Enter": "\ue007", "Tab": "\ue004"}
START_SECONDS = 60.0  # on a busy machine
SETTINGS: Mapping[str, object] = {
    "browser.aboutwelcome.enabled": False,
    "browser.download.folderList": 2,  # the folder that is named
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "dom.file.createInChild": True,  # or no file can be chosen over this protocol
    "intl.accept_languages": "en-US, en",
    "marionette.port": 0,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "services.settings.server": "data:,",
}


class Firefox:
    """A running Firefox without a window; `downloads` is where it saves. Call it with a command of the protocol."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("firefox-esr") or need("firefox")
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True)
        settings = {**SETTINGS, "browser.download.dir": str(self.downloads)}
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in settings.items()]
        (folder / "user.js").write_text("".join(lines), "utf-8")
        command = [program, "--headless", "--marionette", "--remote-allow-system-access", "--no-remote"]
        process = subprocess.Popen(
            [*command, "--profile", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=child_env(HOME=str(folder)),
        )
        self._asked = 0
        self._ends = contextlib.ExitStack()  # at once: its folder goes too
        self._ends.callback(process.wait)
        self._ends.callback(process.kill)
        try:
            port = self._port(process, folder / "MarionetteActivePort")
            self._socket = self._ends.enter_context(socket.create_connection(("127.0.0.1", port), 60))
            self._stream = self._ends.enter_context(self._socket.makefile("rb"))
            self._read()  # its greeting
            self("WebDriver:NewSession")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _port(process: subprocess.Popen[bytes], file: Path) -> int:
        end = time.monotonic() + START_SECONDS
        while not (file.exists() and file.read_text().strip()):
            assert process.poll() is None, "Firefox ended"
            assert time.monotonic() < end, "Firefox did not start"
            time.sleep(0.02)
        return int(file.read_text())

    def _read(self) -> Any:
        length = b""
        while not length.endswith(b":"):
            byte = self._stream.read(1)
            assert byte, "Firefox ended"
            length += byte
        return json.loads(self._stream.read(int(length[:-1])))

    def __call__(self, command: str, **parameters: Any) -> Any:
        """Send a command, and return what it answers."""
        self._asked += 1
        message = json.dumps([0, self._asked, command, parameters]).encode()
        self._socket.sendall(b"%d:%s" % (len(message), message))
        _, _, error, answer = self._read()
        assert error is None, f"{command}: {error}"
        return answer.get("value", answer)

    def close(self) -> None:
        """End it."""
        self._ends.close()

    def evaluate(self, expression: str, *args: object) -> Any:
        """Return the value of an expression in the page, which has `arguments`."""
        return self("WebDriver:ExecuteScript", script=f"return {expression}", args=list(args), sandbox=None)

    def until(self, expression: str, *args: object, seconds: float = 15) -> None:
        """Wait for a truth in the page."""
        end = time.monotonic() + seconds
        while not self.evaluate(expression, *args):
            assert time.monotonic() < end, (expression, args, self.text("body"))
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """Return the text of an element."""
        return str(self.evaluate("document.querySelector(arguments[0]).innerText", selector))

    def _find(self, selector: str) -> str:
        found = self("WebDriver:FindElement", using="css selector", value=selector)
        return str(next(iter(found.values())))

    def click(self, selector: str) -> None:
        """Click on what is there: it must be in sight."""
        self("WebDriver:ElementClick", id=self._find(selector))

    def fill(self, selector: str, text: str) -> None:
        """Type into a field, or choose a file."""
        self("WebDriver:ElementSendKeys", id=self._find(selector), text=text)

    def type(self, *parts: str) -> None:
        """Type texts, and press the keys of `KEYS`, wherever the focus is."""
        keys = [key for part in parts for key in ([KEYS[part]] if part in KEYS else part)]
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self("WebDriver:PerformActions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def complaints(self, port: int) -> List[str]:
        """Return the errors and warnings of the pages of a port, also of their policies."""
        script = """return Services.console.getMessageArray().filter(each => each instanceof Ci.nsIScriptError)
            .map(each => `${each.sourceName}: ${each.errorMessage}`)"""
        self("Marionette:SetContext", value="chrome")
        found = self("WebDriver:ExecuteScript", script=script, args=[], sandbox="system")
        self("Marionette:SetContext", value="content")
        return [text for text in found if f":{port}/" in text]
