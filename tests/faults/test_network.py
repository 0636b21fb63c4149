"""What comes over the network, made up without mercy: no bytes burn a certificate unasked, stop the line or leak."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Iterator, List

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.oracle import NewTally, Oracle, judged
from tests.identities import PRODUCT
from tests.stations import Stations
from tests.support import Server, StartServer, missing, no_secret, raw
from tests.wire import ask, post, replies, split

DEVICES = [f"MAC-{number}" for number in range(8)]
WHOLE = st.builds(lambda device_id, action: ask(device_id, action=action), st.sampled_from(DEVICES), st.integers(0, 3))
HEADS = st.sampled_from(
    [
        "Content-Length: 5",
        "Content-Length: -1",
        "Transfer-Encoding: chunked",
        "Expect: 100-continue",
        "Connection: close",
        "X: " + "x" * 9000,
        " folded",
        "Host: a\0b",
    ]
)
ODD = st.builds(lambda device_id, lines: ask(device_id, *lines), st.sampled_from(DEVICES), st.lists(HEADS, max_size=3))
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["ProductKey", "Action", "x"]), inner),
    max_leaves=8,
)
BODIES = st.builds(lambda value: post({"ProductKey": PRODUCT, "DeviceID": "MAC-9", "Action": value}), JSON)
NOISE = st.binary(max_size=60) | st.sampled_from(
    [b"\r\n", b"\x16\x03\x01\x02", b"PRI * HTTP/2.0\r\n\r\n", b"GET /\r\n\r\n", b"[" * 3000, b"POST / HTTP/1.1\r\n"]
)
CUT = st.builds(lambda data, place: data[: place % len(data)], WHOLE | ODD, st.integers(0, 400))
STREAMS = st.lists(WHOLE | WHOLE | ODD | BODIES | NOISE | CUT, max_size=6).map(b"".join)


@pytest.mark.timeout(2400)
def test_no_stream_of_bytes_gives_out_a_certificate_that_is_not_in_a_reply(
    tally: NewTally, server: StartServer, store: Path, pool: Path, thorough: bool
) -> None:
    line, running = tally("made-up byte streams"), server("--import", pool)
    journal = store / "journal.csv"
    end = time.monotonic() + (1800 if thorough else 60 if os.environ.get("CI") else 10)

    @settings(max_examples=200, database=None)
    @given(STREAMS, st.integers(1, 2000), st.booleans())
    def stream(data: bytes, piece: int, shutdown: bool) -> None:
        before = journal.stat().st_size
        got = in_pieces(running.port, data, piece, shutdown)
        answers = [(status, body) for status, _, body in split(got) if status != 100]
        with open(journal, "rb") as file:
            file.seek(before)
            allocated = file.read().count(b",allocate,")
        for status, body in answers:
            if status != 200:
                no_secret(body.decode())
        told = sum(status == 200 and b'"DeviceSecret"' in body for status, body in answers)
        assert allocated <= told
        line.injected += 1
        line.acknowledged += told

    while time.monotonic() < end:
        line.rounds += 1
        stream()
        [(status, _)] = replies(raw(running.port, ask("a real client"), shutdown=True))
        assert status == 200
    assert "Please report" not in running.output


def in_pieces(port: int, data: bytes, piece: int, shutdown: bool) -> bytes:
    """Send data in pieces, end it at once or after a pause, and read until the server closes."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), 30) as client:
        with contextlib.suppress(OSError):  # refused in the middle: what it answered before is still to be read
            for place in range(0, len(data), piece):
                client.sendall(data[place : place + piece])
            if not shutdown:
                time.sleep(0.05)
            client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while True:
                more = client.recv(65536)
                if not more:
                    break
                received += more
    return received


@contextlib.contextmanager
def crowd(port: int, count: int) -> Iterator[List[socket.socket]]:
    """Hold this many connections that say nothing."""
    if sys.platform == "win32":
        pytest.skip("there a server takes 500 connections")
    import resource  # noqa: PLC0415 - not everywhere

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count + 500:
        missing(f"this system lets a process have only {hard} connections")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + 500, hard))
    try:
        with contextlib.ExitStack() as held:
            yield [held.enter_context(socket.create_connection(("127.0.0.1", port), 30)) for _ in range(count)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ten_thousand_idle_connections_do_not_hold_up_a_device(
    tally: NewTally, server: StartServer, store: Path, profile: Path, pool: Path
) -> None:
    line, oracle, running = tally("10,000 idle connections"), Oracle(), server("--import", pool)
    line.rounds = 1
    with crowd(running.port, 10_000) as idle:
        line.injected = len(idle)
        talk = {f"MAC-{number}": (0, 1) for number in range(50)}
        began = time.monotonic()
        oracle.hear(talk, Stations(running.port, talk, 4).wait())
        took = time.monotonic() - began
        assert oracle.acknowledged == 100
        assert took < 10
    assert running.stop() == 0
    judged(line, oracle, store, profile)
    line.acknowledged = oracle.acknowledged


def resources(running: Server) -> List[int]:
    """The server's memory in KB, and its open files."""
    status = Path(f"/proc/{running.process.pid}/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found
    return [int(found[1]), len(os.listdir(f"/proc/{running.process.pid}/fd"))]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.timeout(2400)
def test_memory_and_descriptors_stay_flat_under_mixed_traffic(
    tally: NewTally, server: StartServer, store: Path, profile: Path, pool: Path, thorough: bool
) -> None:
    line, oracle, running = tally("soak, mixed traffic"), Oracle(), server("--import", pool)
    end = time.monotonic() + (1800 if thorough else 10)
    samples: List[List[int]] = []
    while time.monotonic() < end or len(samples) < 4:
        line.rounds += 1
        talk = {f"MAC-{number}": (0, 1, 0, 2, 0) for number in range(40)}
        oracle.hear(talk, Stations(running.port, talk, 4).wait())
        for data in (b"\x16\x03", b"{}", ask("x")[:30], post(b"[" * 9000), ask("nobody", product="none")):
            raw(running.port, data, shutdown=True)
            line.injected += 1
        with socket.create_connection(("127.0.0.1", running.port)) as reset:
            reset.sendall(ask("x")[:40])
        samples.append(resources(running))
    steady = samples[len(samples) // 3 :]
    assert steady[-1][1] <= steady[0][1] + 2, "descriptors leak"
    assert max(memory for memory, _ in steady) - steady[0][0] < 2048, f"memory leaks: {steady}"
    assert running.stop() == 0
    judged(line, oracle, store, profile)
    line.acknowledged = oracle.acknowledged
