"""What the tests share: a running server, a raw connection, other Pythons, what to do where a program is missing."""

from __future__ import annotations

import contextlib
import csv
import functools
import glob
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, Callable, Dict, List, Mapping, NoReturn, Optional, Sequence, Tuple, Union

import pytest

from tests import identities
from tests.wire import Reply

ROOT = Path(__file__).resolve().parent.parent
CERTTOOL = ROOT / "certtool.py"
SAMPLE = ROOT / "sample.csv"

if sys.platform == "win32":  # where only Ctrl-Break reaches another process, and only one with a group of its own
    INTERRUPT, NEW_GROUP = signal.CTRL_BREAK_EVENT, subprocess.CREATE_NEW_PROCESS_GROUP
else:
    INTERRUPT, NEW_GROUP = signal.SIGINT, 0

READY = "Waiting for client request"
START_SECONDS = 30.0  # for a server to be ready, on a busy machine
STOP_SECONDS = 20.0  # for an interrupted server to end

RunCerttool = Callable[..., "subprocess.CompletedProcess[str]"]
StartServer = Callable[..., "Server"]


def child_env(**extra: str) -> Dict[str, str]:
    """Return an environment for a subprocess that no setting of the caller's shell reaches, but coverage does."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CERTTOOL_", "PYTHON"))}
    return {**env, "PYTHONIOENCODING": "utf-8", **extra}


def no_traceback(text: str) -> None:
    """Fail where `text`, the output of a program, has a traceback."""
    assert "Traceback" not in text, text


@functools.lru_cache(maxsize=None)
def secrets() -> re.Pattern[str]:
    """Return what finds a secret of `identities.rows` or of the sample."""
    with open(SAMPLE, encoding="utf-8", newline="") as file:
        known = {row[column] for row in csv.DictReader(file) for column in ("DeviceSecret", "ProductSecret")}
    return re.compile("|".join([identities.SECRET, *map(re.escape, filter(None, known))]))


def no_secret(text: str) -> None:
    """Fail where `text`, which anybody may read, has a secret or a traceback."""
    no_traceback(text)
    found = secrets().search(text)
    assert not found, f"The secret {found[0]} is in:\n{text}"


def listed(certtool: RunCerttool, store: Path, *filters: object) -> List[Dict[str, str]]:
    """Return what `query` tells of the certificates that pass the filters."""
    rows: List[Dict[str, str]] = json.loads(certtool("query", *filters, "--format", "json", "--data", store).stdout)
    return rows


def missing(reason: str) -> NoReturn:
    """Skip the test and say why; fail it in CI, where nothing may be missing."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def need(program: str) -> str:
    """Return the path of `program`; where there is none, the test is `missing`."""
    return shutil.which(program) or missing(f"{program} is not installed")


def npm_package(name: str, version: str) -> Path:
    """Return the folder of a package that npm gets once; where it does not, the test is `missing`.

    Each is kept in a place of its own: in a common one npm removes what was got for another test.
    """
    place = ROOT / "tests" / ".npm" / f"{name}-{version}"
    folder = place / "node_modules" / name
    if not folder.exists():
        options = ["--no-save", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
        command = [need("npm"), "install", *options, "--prefix", str(place), f"{name}@{version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        if done.returncode:
            missing(f"npm did not install {name} {version}: {done.stderr.strip()[-300:]}")
    return folder


@functools.lru_cache(maxsize=None)
def pythons() -> Sequence[str]:
    """Return the CPython 3.8 to 3.14 executables found, oldest first, one of each version but the running one."""
    found: Dict[int, str] = {}
    for minor in range(8, 15):
        versions = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
        candidates = glob.glob(str(versions / f"3.{minor}.*" / "bin" / "python"))
        for candidate in filter(None, [*candidates, shutil.which(f"python3.{minor}")]):
            ask = [candidate, "-I", "-S", "-c", "import sys; print(sys.implementation.name, sys.version_info[1])"]
            answer = subprocess.run(ask, capture_output=True, text=True, check=False).stdout  # a pyenv shim may fail
            if answer.split() == ["cpython", str(minor)] and minor != sys.version_info[1]:
                found.setdefault(minor, candidate)
    return tuple(found.values())


def raw(port: int, data: bytes, shutdown: bool = False, timeout: float = 10) -> bytes:
    """Send `data` as it is, then no more if `shutdown`, and return all bytes until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        connection.sendall(data)
        if shutdown:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while True:
            chunk = connection.recv(65536)
            if not chunk:
                return received
            received += chunk


def launcher(python: Sequence[str], script: Path) -> List[str]:
    """Return the begin of a command that runs `script` in the folder ROOT.

    certtool.py runs as a module, whose compiled form Python keeps: a script is compiled at each start, which takes
    almost half of it. The tests of the starts themselves, and those on other Pythons, run it as a script.
    """
    if script == CERTTOOL and list(python) == [sys.executable]:
        return [sys.executable, "-m", script.stem]
    return [*python, str(script)]


class Server:
    """A `certtool.py serve` in a process of its own, ready for requests once made."""

    def __init__(
        self,
        *args: str,
        store: Path,
        python: Sequence[str] = (sys.executable,),
        script: Path = CERTTOOL,
        env: Optional[Mapping[str, str]] = None,
    ) -> None:
        command = [*launcher(python, script), "serve", "0", "--host", "127.0.0.1", "--data", str(store), *args]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            cwd=ROOT,
            env=child_env(**(env or {})),
            creationflags=NEW_GROUP,
        )
        self._texts: Tuple[List[str], List[str]] = ([], [])
        streams = (self.process.stdout, self.process.stderr)
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True) for pair in zip(streams, self._texts)
        ]
        for reader in self._readers:
            reader.start()
        try:
            self.wait_for(READY, START_SECONDS)
            self.port = self._port()
        except BaseException:
            self.kill()
            raise

    @staticmethod
    def _read(stream: Optional[IO[str]], lines: List[str]) -> None:
        assert stream, "a pipe"
        with stream:
            for line in stream:
                lines.append(line)

    def _port(self) -> int:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            address = re.search(r"(?:\d+\.\d+\.\d+\.\d+|\]):(\d+)\b", self.output)
            if address:
                return int(address[1])
            time.sleep(0.01)
        raise AssertionError(f"The server named no address:\n{self.output}")

    @property
    def output(self) -> str:
        """All that the server wrote to stdout so far."""
        return "".join(list(self._texts[0]))

    @property
    def errors(self) -> str:
        """All that the server wrote to stderr so far."""
        return "".join(list(self._texts[1]))

    def wait_for(self, text: str, seconds: float = 10) -> None:
        """Return once the server has written `text`, also to stderr; fail after `seconds` or when it ends without."""
        began = time.monotonic()
        while text not in self.output + self.errors:
            if self.process.poll() is not None:
                self.wait()
                seconds = 0
            if text not in self.output + self.errors and time.monotonic() - began >= seconds:
                raise AssertionError(f"No {text!r} in:\n{self.output}\n{self.errors}")
            time.sleep(0.01)

    def http(
        self,
        method: str,
        path: str = "/",
        body: Optional[bytes] = None,
        headers: Optional[Mapping[str, str]] = None,
        timeout: float = 30,
    ) -> Tuple[http.client.HTTPResponse, bytes]:
        """Send one request on a connection of its own; return the response (status and headers) and its body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def post(self, message: Union[bytes, Mapping[str, Any]], path: str = "/", **options: Any) -> Reply:
        """Post bytes as they are, or an object as JSON; return the HTTP status and the JSON of the reply."""
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        response, answer = self.http("POST", path, body, **options)
        reply = json.loads(answer.decode("utf-8"))
        assert isinstance(reply, dict), reply
        return response.status, reply

    def request(self, product_key: str, device_id: Optional[str] = None) -> Reply:
        """Ask for a certificate (Action 0)."""
        return self.post({"ProductKey": product_key, "DeviceID": device_id, "Action": 0})

    def report(self, product_key: str, device_id: str, action: int) -> Reply:
        """Report a burn that succeeded (Action 1) or failed (Action 2)."""
        return self.post({"ProductKey": product_key, "DeviceID": device_id, "Action": action})

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.process.send_signal(INTERRUPT)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Wait for the server to end, read the rest of its output, which has no secret, and return its exit code."""
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(seconds)
        no_secret(self.output + self.errors)
        return code

    def stop(self) -> int:
        """Interrupt the server and return its exit code.

        An idle server looks for Ctrl-C when a turn ends, up to certtool.TICK_SECONDS later: a connection ends its turn.
        Whether it ends without one is for a test that uses `interrupt`, and then `wait`.
        """
        self.interrupt()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            pass
        return self.wait()

    def kill(self) -> int:
        """End the server at once, as `kill -9` does."""
        self.process.kill()
        return self.wait()

    def close(self) -> None:
        """End the server after a test: it must end well, unless the test ended it."""
        if self.process.poll() is None:
            try:
                code = self.stop()
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            assert code == 0, f"The interrupted server ended with {code}:\n{self.output}\n{self.errors}"
        self.wait()
