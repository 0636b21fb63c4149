"""Stations of a production line: threads that ask for certificates over kept-alive connections."""

from __future__ import annotations

import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Dict, List, Mapping, Optional, Sequence

from tests.identities import PRODUCT
from tests.wire import Reply

Talk = Mapping[str, Sequence[int]]  # the actions of each DeviceID, in their order


class Stations:
    """`count` threads that talk to one server and share the DeviceIDs of `talk`; they end with the server.

    `answers` has the replies that each DeviceID got. `reached` is set once `notice_at` replies are there.
    """

    def __init__(self, port: int, talk: Talk, count: int, notice_at: int = 0) -> None:
        self.answers: Dict[str, List[Reply]] = {device_id: [] for device_id in talk}
        self.reached = threading.Event()
        self._port = port
        self._talk = talk
        self._missing = notice_at
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(count)
        devices = list(talk)
        self._running = [self._pool.submit(self._work, devices[place::count]) for place in range(count)]

    def _work(self, devices: Sequence[str]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            for device_id in devices:
                for action in self._talk[device_id]:
                    body = json.dumps({"ProductKey": PRODUCT, "DeviceID": device_id, "Action": action})
                    connection.request("POST", "/", body)
                    response = connection.getresponse()
                    self.answers[device_id].append((response.status, json.loads(response.read())))
                    self._count()
        except (OSError, http.client.HTTPException):
            pass  # the server ended: what it did not answer, nobody was told
        finally:
            connection.close()

    def _count(self) -> None:
        with self._lock:
            self._missing -= 1
            if self._missing == 0:
                self.reached.set()

    def wait(self, seconds: Optional[float] = 100) -> Dict[str, List[Reply]]:
        """Wait until all have got their answers, or the server has ended; return `answers`."""
        for work in self._running:
            work.result(seconds)
        self._pool.shutdown()
        return self.answers
