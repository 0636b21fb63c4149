"""A full disk, no descriptors, little memory, a read-only folder, a second server: refused in words, nothing lost."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import pytest

from tests import identities
from tests.faults.oracle import NewTally, Oracle, judged
from tests.identities import PRODUCT
from tests.stations import Stations
from tests.support import RunCerttool, Server, StartServer, missing, need
from tests.wire import Reply

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs mounts and limits of Linux")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 1 MB, which only root can mount."""
    folder.mkdir()
    mount = [need("mount"), "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        missing("only root can mount a file system of 1 MB")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class Client:
    """One kept-alive connection whose answers the oracle hears."""

    def __init__(self, running: Server, oracle: Oracle) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
        self.oracle = oracle

    def ask(self, device_id: str, action: int = 0) -> Reply:
        """Send one request and return its answer."""
        body = json.dumps({"ProductKey": PRODUCT, "DeviceID": device_id, "Action": action})
        self.connection.request("POST", "/", body)
        response = self.connection.getresponse()
        answer = response.status, json.loads(response.read())
        self.oracle.hear({device_id: (action,)}, {device_id: [answer]})
        return answer

    def close(self) -> None:
        """Close the connection; the next request makes another."""
        self.connection.close()


@pytest.fixture
def connect() -> Iterator[Callable[[Server, Oracle], Client]]:
    """Make a `Client`, closed after the test."""
    with contextlib.ExitStack() as clients:

        def make(running: Server, oracle: Oracle) -> Client:
            return clients.enter_context(contextlib.closing(Client(running, oracle)))

        yield make


Connect = Callable[[Server, Oracle], Client]


@linux_only
def test_a_full_disk_gives_nothing_out_and_the_line_goes_on_once_it_is_freed(
    connect: Connect, tally: NewTally, tmp_path: Path, profile: Path, server: StartServer, pool: Path
) -> None:
    line, oracle = tally("a full disk, freed again"), Oracle()
    with small_disk(tmp_path / "disk") as disk:
        running = server("--import", pool, store=disk / "store")
        oracle.imported = 400
        client = connect(running, oracle)
        for number in range(3):
            line.rounds += 1
            with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as ballast:
                while ballast.write(b"x" * 4096):
                    pass
            answers = [client.ask(f"full-{number}-{place}") for place in range(60)]
            refused = [reply for status, reply in answers if status == 503]
            assert refused
            assert "free the store's disk" in refused[0]["Message"]
            line.injected += len(refused)
            (disk / "ballast").unlink()
            assert client.ask(f"freed-{number}")[0] == 200
        assert running.stop() == 0
        judged(line, oracle, disk / "store", profile)
    line.acknowledged = oracle.acknowledged


@linux_only
def test_a_read_only_disk_is_refused_in_a_sentence(
    connect: Connect,
    tally: NewTally,
    tmp_path: Path,
    profile: Path,
    server: StartServer,
    pool: Path,
    certtool: RunCerttool,
) -> None:
    line, oracle = tally("a read-only disk"), Oracle()
    with small_disk(tmp_path / "disk") as disk:
        running = server("--import", pool, store=disk / "store")
        connect(running, oracle).ask("MAC-1")
        running.stop()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for command in (["serve", "0", "--host", "127.0.0.1"], ["import", pool]):
            line.rounds += 1
            line.injected += 1
            refused = certtool(*command, "--data", disk / "store", ok=1).stderr
            assert "cannot be written (Read-only file system): check its rights.\n" in refused
        assert "MAC-1" in certtool("query", "--data", disk / "store").stdout, "who only reads needs no more"
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        judged(line, oracle, disk / "store", profile)
    line.acknowledged = oracle.acknowledged


def limit(running: Server, what: str, value: int) -> int:
    """Set a running server's limit, and return the one before."""
    if sys.platform != "linux":
        pytest.skip("only Linux lets another process's limits be set")
    else:
        import resource  # noqa: PLC0415 - not everywhere

        number = getattr(resource, what)
        soft, hard = resource.prlimit(running.process.pid, number)
        resource.prlimit(running.process.pid, number, (value, hard))
        return soft


@linux_only
def test_without_a_free_descriptor_nothing_is_given_out_and_the_line_goes_on_afterwards(
    connect: Connect, tally: NewTally, store: Path, profile: Path, server: StartServer, pool: Path
) -> None:
    line, oracle = tally("no descriptors left"), Oracle()
    running = server("--import", pool)
    client = connect(running, oracle)
    client.ask("before", 1)  # connects, and opens no import file
    most = limit(running, "RLIMIT_NOFILE", 3)
    for number in range(20):
        line.rounds += 1
        status, _ = client.ask(f"none-{number}")
        assert status == 503
        line.injected += 1
    late = socket.create_connection(("127.0.0.1", running.port), 10)
    limit(running, "RLIMIT_NOFILE", most)
    with late:
        assert connect(running, oracle).ask("afterwards")[0] == 200
    assert running.stop() == 0
    judged(line, oracle, store, profile)
    line.acknowledged = oracle.acknowledged


@linux_only
def test_with_little_memory_nothing_is_lost_and_no_traceback_is_shown(
    connect: Connect,
    tally: NewTally,
    store: Path,
    profile: Path,
    server: StartServer,
    pool: Path,
    tmp_path: Path,
    certtool: RunCerttool,
) -> None:
    line, oracle = tally("little memory"), Oracle()
    running = server("--import", pool)
    client = connect(running, oracle)
    client.ask("before")
    status_file = Path(f"/proc/{running.process.pid}/statm")
    big = identities.write(tmp_path / "big.csv", 600_000, "a1BigPk0000")
    for spare in (0, 1 << 20, 4 << 20):
        line.rounds += 1
        size = int(status_file.read_text().split()[0]) * 4096
        unlimited = limit(running, "RLIMIT_AS", size + spare)
        line.injected += 1
        for number in range(10):
            client.ask(f"{spare}-{number}")
        refused = certtool("import", big, "--data", store, ok=1).stderr
        assert refused.count("\n") == 1
        limit(running, "RLIMIT_AS", unlimited)
        assert client.ask(f"afterwards {spare}")[0] in (200, 503)
    running.kill()
    judged(line, oracle, store, profile)
    line.acknowledged = oracle.acknowledged


def test_two_servers_on_one_store_or_one_port_never_serve_at_once(
    tally: NewTally, store: Path, profile: Path, server: StartServer, pool: Path, tmp_path: Path, certtool: RunCerttool
) -> None:
    lines = {"store": tally("two servers, one store"), "port": tally("two servers, one port")}
    running, oracle = server("--import", pool), Oracle()
    oracle.imported = 400
    for number in range(3):
        talk: Dict[str, List[int]] = {f"MAC-{number}-{place}": [0, 1] for place in range(40)}
        clients = Stations(running.port, talk, 4)
        for what, port, data in (("store", 0, store), ("port", running.port, tmp_path / "other")):
            line = lines[what]
            line.rounds += 1
            line.injected += 1
            refused = certtool("serve", port, "--host", "127.0.0.1", "--data", data, ok=1).stderr
            assert refused.count("\n") == 1
        oracle.hear(talk, clients.wait())
    assert running.stop() == 0
    for line in lines.values():
        judged(line, oracle, store, profile)
        line.acknowledged = oracle.acknowledged
    assert not (tmp_path / "other").exists()
