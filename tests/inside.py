"""A server inside the test, which turns its loop itself: for faults that cannot be caused from outside."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, List

import pytest

import certtool
from certtool import CertServer, ImportReport, RequestEvent, Service, State, Store, Upload
from tests import identities
from tests.stores import import_files
from tests.wire import Reply, replies

PATIENCE = 10.0  # seconds for what should take milliseconds


class Inside:
    """A CertServer on a free port over a store with `pool` certificates; `events` and `notices` are its console."""

    def __init__(self, folder: Path, pool: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.journal = folder / "journal.csv"
        self.events: List[RequestEvent] = []
        self.notices: List[str] = []
        self.store, self.state = Store(str(folder), "serve"), State()
        self.store.load(self.state)
        self.server = CertServer("127.0.0.1", 0, self.events.extend, self.notices.append, **options)
        self.server.service = Service(self.store, self.state, self.notices.append)
        self._offset = 0.0
        clock = SimpleNamespace(
            monotonic=lambda: time.monotonic() + self._offset, time=time.time, sleep=time.sleep, strftime=time.strftime
        )
        monkeypatch.setattr(certtool, "time", clock)
        if pool:
            self.add(identities.write(folder.parent / "pool.csv", pool))

    def add(self, path: Path) -> ImportReport:
        """Import a file at once."""
        return import_files(self.server.service, Upload.of(path.name, path.read_bytes()))

    @contextlib.contextmanager
    def connect(self, data: bytes = b"") -> Iterator[socket.socket]:
        """A client's connection, with `data` sent."""
        with socket.create_connection(("127.0.0.1", self.server.server_port)) as connection:
            connection.settimeout(0)
            connection.send(data)
            yield connection

    def later(self, seconds: float) -> None:
        """Let time pass at once, and the server see it."""
        self._offset += seconds
        self.turn()

    def turn(self, times: int = 3) -> None:
        """Turn the loop: once to accept, once to read, once for what is left over."""
        for _ in range(times):
            self.server.turn(0)

    def receive(self, connection: socket.socket, size: int = 0) -> bytes:
        """Turn the loop until the server has closed the connection, or until `size` bytes of replies are there."""
        received = b""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self.server.turn(0.001)
            try:
                data = connection.recv(65536)
            except BlockingIOError:
                continue
            received += data
            if not data or (size and len(received) >= size):
                return received
        raise AssertionError(f"The server neither closed nor sent more than {received!r}")

    def answer(self, connection: socket.socket) -> Reply:
        """Turn the loop until one reply is there, and return it."""
        received = self.receive(connection, 1)
        [reply] = replies(received)
        return reply

    def say(self, data: bytes) -> Reply:
        """Send on a connection of its own, and return the one reply."""
        with self.connect(data) as connection:
            return self.answer(connection)

    def close(self) -> None:
        """End the server as Ctrl-C does."""
        self.server.stopping = True
        with self.server:
            self.server.serve_forever()
        self.store.close()
