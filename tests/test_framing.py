"""HTTP as the server reads it: where a request ends is never guessed, and no client can stop the others."""

from __future__ import annotations

import contextlib
import errno
import json
import select
import socket
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Callable, Generator, Iterator, List, Optional, Sequence, Set, Tuple

import pytest

import certtool
from certtool import CertRequestHandler
from tests import identities
from tests.inside import PATIENCE, Inside
from tests.support import SAMPLE, Server, StartServer, raw
from tests.wire import ask, post, replies, split

BODY = b'{"ProductKey": "a1MadeUpPk0", "DeviceID": "burned?", "Action": 0}'
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
START = b"POST / HTTP/1.1\r\nHost: a\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("framing")


@pytest.fixture(scope="module")
def line(folder: Path) -> Iterator[Server]:
    """One server with a large pool, for all tests that use DeviceIDs of their own."""
    running = Server("--import", str(identities.write(folder / "pool.csv", 1000)), store=folder / "store")
    yield running
    running.close()


@pytest.fixture
def unchanged(folder: Path, line: Server) -> Iterator[None]:
    """The test must leave the store of `line` as it was."""
    assert line.process.poll() is None
    journal = folder / "store" / "journal.csv"
    before = journal.read_bytes()
    yield
    assert journal.read_bytes() == before


def head_of(body: bytes, *lines: bytes) -> bytes:
    return b"\r\n".join([b"POST / HTTP/1.1", b"Host: a", *lines, b"", b""]) + body


REFUSED = {
    "no Content-Length": (START + b"\r\n" + BODY, 400),
    "two equal Content-Lengths": (START + LENGTH + LENGTH + b"\r\n" + BODY, 400),
    "two Content-Lengths": (START + LENGTH + b"Content-Length: 5\r\n\r\n" + BODY, 400),
    "a list of Content-Lengths": (head_of(BODY, b"Content-Length: 65, 65"), 400),
    "a Content-Length with a plus": (head_of(BODY, b"Content-Length: +65"), 400),
    "a Content-Length with an underscore": (head_of(BODY, b"Content-Length: 6_5"), 400),
    "a negative Content-Length": (head_of(BODY, b"Content-Length: -1"), 400),
    "an empty Content-Length": (head_of(BODY, b"Content-Length:"), 400),
    "a hexadecimal Content-Length": (head_of(BODY, b"Content-Length: 0x41"), 400),
    "a Content-Length in other digits": (head_of(BODY, "Content-Length: ²".encode("latin-1")), 400),
    "a Content-Length of 4,000 digits": (head_of(BODY, b"Content-Length: " + b"9" * 4000), 400),
    "chunks": (head_of(b"41\r\n" + BODY + b"\r\n0\r\n\r\n", b"Transfer-Encoding: chunked"), 501),
    "chunks and a Content-Length": (START + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + BODY, 501),
    "an identity coding": (START + LENGTH + b"Transfer-Encoding: identity\r\n\r\n" + BODY, 501),
    "a folded header": (START + b"X: 1\r\n 2\r\n" + LENGTH + b"\r\n" + BODY, 400),
    "a space before the colon": (START + b"Content-Length : 65\r\n\r\n" + BODY, 400),
    "a header without a colon": (START + LENGTH + b"nonsense\r\n\r\n" + BODY, 400),
    "a bare CR in a header": (START + b"X: 1\rContent-Length: 1\r\n" + LENGTH + b"\r\n" + BODY, 400),
    "a NUL in a header": (START + b"X: \0\r\n" + LENGTH + b"\r\n" + BODY, 400),
    "two Hosts": (START + b"Host: b\r\n" + LENGTH + b"\r\n" + BODY, 400),
    "another expectation": (START + b"Expect: the moon\r\n" + LENGTH + b"\r\n" + BODY, 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "HTTP/1.2": (b"POST / HTTP/1.2\r\n" + LENGTH + b"\r\n" + BODY, 501),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 501),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), 400),
    "bytes that mean nothing": (b"\xff\xfe\x00" * 100, 400),
    "a lower-case method": (b"post / HTTP/1.1\r\n" + LENGTH + b"\r\n" + BODY, 400),
    "two spaces in the request line": (b"POST  / HTTP/1.1\r\n" + LENGTH + b"\r\n" + BODY, 400),
    "no path": (b"POST HTTP/1.1\r\n" + LENGTH + b"\r\n" + BODY, 400),
    "a body of 64 KiB and one byte": (head_of(b"", b"Content-Length: 65537"), 413),
    "a body of 10 TB": (head_of(b"", b"Content-Length: 9999999999999"), 413),
    "headers of 17 KiB": (START + b"X: " + b"x" * 17_000 + b"\r\n\r\n", 431),
    "101 headers": (START + LENGTH + b"".join(b"X%d:\r\n" % n for n in range(99)) + b"\r\n" + BODY, 431),
    "headers that never end": (START + b"X: 1\r\n" * 3000, 431),
    "PUT": (b"PUT / HTTP/1.1\r\nHost: a\r\n" + LENGTH + b"\r\n" + BODY, 501),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("unchanged")
def test_a_request_whose_end_is_in_doubt_is_refused_and_burns_no_certificate(name: str, line: Server) -> None:
    data, expected = REFUSED[name]
    for _ in range(2):  # a head that is known may be read in another way
        [(status, head, body)] = split(raw(line.port, data))
        assert (status, b'"Status": "BadRequest", "Message": "' in body) == (expected, True), body
        assert "\r\nConnection: close" in head, "what follows cannot be read as a request"


@pytest.mark.usefixtures("unchanged")
def test_a_body_that_ends_early_burns_no_certificate(line: Server) -> None:
    whole = post(BODY + b"   ")  # so that every cut of the last bytes is still good JSON
    for cut in (1, 20, len(whole) - len(BODY) - 3, len(whole) - 3, len(whole) - 1):
        [(status, reply)] = replies(raw(line.port, whole[:cut], shutdown=True))
        assert (status, reply["Status"]) == (400, "BadRequest")


def test_a_client_that_only_connects_gets_nothing(line: Server) -> None:
    assert raw(line.port, b"", shutdown=True) == b""


@pytest.mark.parametrize(
    "data",
    [
        ask("lf").replace(b"\r\n", b"\n"),
        ask("mixed").replace(b"\r\n\r\n", b"\r\n\n"),
        b"\r\n" + ask("empty line first"),
        ask("100 headers", *(f"X{number}: 1" for number in range(98))),
        b"\r\n\r\n" + ask("two empty lines"),
        ask("other types", "Content-Type: text/plain"),
        ask("no space").replace(b": ", b":", 2),
        ask("tabs", "X:\t1 \t"),
        ask("high bytes", "X: ä"),
        ask("names in capitals").replace(b"Content-Length", b"CONTENT-LENGTH"),
        ask("zeros first").replace(b"Content-Length: ", b"Content-Length: 000"),
        ask("no Host").replace(b"Host: 192.168.1.10\r\n", b""),
        ask("a long path", path="/" + "x" * 8000),
        ask("a full address", path="http://192.168.1.10/"),
    ],
)
def test_what_firmware_clients_send_is_understood(data: bytes, line: Server) -> None:
    for _ in range(2):  # a head that is known may be read in another way
        [(status, reply)] = replies(raw(line.port, data, shutdown=True))
        assert (status, reply["Status"]) == (200, "OK")


def test_more_kinds_of_head_than_are_remembered_are_all_understood(inside: Callable[..., Inside]) -> None:
    server = inside(1)
    for number in range(2 * certtool.USUAL_HEADS + 2):
        assert server.say(ask("the same", f"X: {number // 2}", "Connection: close"))[0] == 200
    assert 0 < len(server.server.usual_heads) < certtool.USUAL_HEADS


@pytest.mark.timeout(20)
@pytest.mark.parametrize("gap", [b" ", b"\t", b" \t", b"a", b": ", b", "])
@pytest.mark.parametrize("before", [b"", b"A", b"A:", b"A: b", b"Connection:"])
def test_a_long_head_that_is_wrong_only_at_its_end_is_refused_at_once(before: bytes, gap: bytes) -> None:
    long = gap * (2_000_000 // len(gap))  # which a search that begins anew at each byte would not end in hours
    with pytest.raises(certtool.BadRequest, match="A header line is malformed"):
        certtool.parse_head(b"POST / HTTP/1.1\r\n" + before + long + b"\x01")


def test_a_body_of_64_kib_is_taken(line: Server) -> None:
    whole = post(BODY + b" " * (64 * 1024 - len(BODY)))
    [(status, _)] = replies(raw(line.port, whole, shutdown=True))
    assert status == 200


@pytest.mark.parametrize(
    ("version", "header", "kept"),
    [
        ("HTTP/1.1", None, True),
        ("HTTP/1.1", "Connection: keep-alive", True),
        ("HTTP/1.1", "Connection: close", False),
        ("HTTP/1.1", "Connection: Upgrade, Close", False),
        ("HTTP/1.1", "Connection: close\r\nConnection: Upgrade", False),
        ("HTTP/1.0", None, False),
        ("HTTP/1.0", "Connection: Keep-Alive", True),
    ],
)
def test_the_connection_is_kept_as_the_client_asks(
    version: str, header: Optional[str], kept: bool, line: Server
) -> None:
    request = ask("kept", *([header] if header else []), version=version)
    answers = split(raw(line.port, request + request, shutdown=True))
    assert len(answers) == (2 if kept else 1)
    for status, head, _ in answers:
        assert status == 200
        assert f"\r\nConnection: {'keep-alive' if kept else 'close'}" in head


def test_a_client_that_asks_first_is_told_to_go_on(line: Server) -> None:
    head, _, body = ask("polite", "Expect: 100-continue").partition(b"\r\n\r\n")
    with socket.create_connection(("127.0.0.1", line.port), PATIENCE) as client:
        client.sendall(head + b"\r\n\r\n")
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        [(status, _)] = replies(client.recv(1000))
    assert status == 200


def test_a_client_that_asks_first_with_too_long_a_body_is_not_told_to_send_it(line: Server) -> None:
    answer = raw(line.port, head_of(b"", b"Content-Length: 70000", b"Expect: 100-continue"))
    assert [status for status, _ in replies(answer)] == [413]


def test_a_refused_upload_reaches_its_sender_as_a_reply_not_as_a_broken_connection(line: Server) -> None:
    with socket.create_connection(("127.0.0.1", line.port), PATIENCE) as client:
        client.sendall(head_of(b"x" * 500_000, b"Content-Length: 1000000"))
        client.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: client.recv(65536), b""))
    assert [status for status, _ in replies(received)] == [413]


def test_an_upload_of_somebody_who_may_not_manage_is_refused_before_it_is_read(inside: Callable[..., Inside]) -> None:
    server = inside()
    for host, token in (("192.168.1.10", server.server.token), ("localhost", "guessed")):
        lines = ["POST /certtool/import HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {token}"]
        status, reply = server.say("\r\n".join([*lines, "Content-Length: 100000000", "", ""]).encode())
        assert (status, reply["Status"]) == (403, "Forbidden")


def test_an_import_that_is_handed_over_is_taken_without_a_copy_of_it(
    inside: Callable[..., Inside], tmp_path: Path
) -> None:
    server = inside(0)
    one, two = (identities.write(tmp_path / f"{n}.csv", 20_000, first=n).read_bytes() for n in (0, 50_000))
    body = json.dumps({"options": {}, "files": [["1.csv", len(one)], ["2.csv", len(two)]]}).encode() + b"\n" + one + two
    lines = ["POST /certtool/import HTTP/1.1", "Host: localhost", f"Authorization: Bearer {server.server.token}"]
    with server.connect() as client:
        server.turn()
        [handler] = server.server.connections
        handler.buffer = bytearray("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        tracemalloc.start()
        try:
            handler.run()
            _, highest = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert highest < len(one) // 4
        status, reply = server.answer(client)
    assert (status, reply["Report"]["imported"]) == (200, 40_000)
    assert len(server.state.names) == 40_000


def test_half_requests_that_are_all_late_at_once_are_refused_a_part_in_each_sweep(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certtool, "EXPIRES", 2)
    monkeypatch.setattr(certtool, "TICK_SECONDS", 100.0)
    monkeypatch.setattr(certtool, "DRAIN_SECONDS", 10_000.0)
    server = inside(1)
    with contextlib.ExitStack() as clients:
        for _ in range(5):
            clients.enter_context(server.connect(START))
        server.turn()
        assert len(server.server.connections) == 5
        refused = []
        for _ in range(3):
            server.later(101)
            refused.append(len(server.events))
        assert refused == [2, 4, 5]
        assert {event.result for event in server.events} == {"refused: 408 BadRequest"}


def test_long_half_requests_that_together_take_too_much_memory_are_let_go_and_no_other(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certtool, "MAX_HELD", 100_000)
    server = inside(1)
    lines = ["POST /certtool/import HTTP/1.1", "Host: localhost", f"Authorization: Bearer {server.server.token}"]
    upload = "\r\n".join([*lines, "Content-Length: 300000", "", ""]).encode() + b"x" * 60_000
    half, long = ask("a station"), head_of(b"x" * 40_000, b"Content-Length: 60000")
    with contextlib.ExitStack() as clients:
        uploading, station, *hogs = (
            clients.enter_context(server.connect(data)) for data in (upload, half[:-1], long, long)
        )
        server.turn()
        server.later(certtool.TICK_SECONDS)
        assert len(server.server.connections) == 4, "80,000 bytes are not too much"
        hogs.append(clients.enter_context(server.connect(long)))
        server.turn()
        server.later(certtool.TICK_SECONDS)
        for hog in hogs:
            assert server.answer(hog)[0] == 413
        station.send(half[-1:])
        assert server.answer(station)[0] == 200
        uploading.send(b"x" * 60_000)
        server.turn()
        assert max(len(handler.buffer) for handler in server.server.connections) > 120_000, "the operator's goes on"
    assert "take too much memory here" in server.events[-2].why


def test_thousands_of_half_requests_that_hold_too_much_are_let_go_a_part_in_each_turn(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certtool, "MAX_HELD", 70_000)
    monkeypatch.setattr(certtool, "EXPIRES", 2)
    server = inside(1)
    with contextlib.ExitStack() as clients:
        server.later(certtool.TICK_SECONDS)
        for _ in range(6):
            clients.enter_context(server.connect(head_of(b"x" * 20_000, b"Content-Length: 60000")))
        server.turn()
        refused = []
        server._offset += certtool.TICK_SECONDS
        for _ in range(3):
            server.turn(1)
            refused.append(len(server.events))
        assert refused == [2, 4, 4], "and no longer than it is too much"


def test_what_a_half_request_holds_counts_whatever_it_is_called_and_its_headers_too(
    inside: Callable[..., Inside],
) -> None:
    server = inside(1)
    start = b" HTTP/1.1\r\nHost: a\r\nContent-Length: 60000\r\n"
    headers = b"".join(b"h%02d: value %02d\r\n" % (number, number) for number in range(90))
    for data, least in (
        (b"GET /certtool/import" + start + b"\r\n" + b"x" * 50_000, 50_000),
        (b"POST /" + start + headers + b"\r\n", 10_000),
    ):
        with server.connect(data):
            server.turn()
            (handler,) = server.server.connections
            assert handler.holds() > least
        server.turn()
        assert not server.server.connections


def test_a_refused_connection_keeps_no_headers_while_it_is_drained(inside: Callable[..., Inside]) -> None:
    server = inside(1)
    with server.connect(
        head_of(b"", b"Content-Length: 70000", *(b"h%02d: x" % number for number in range(90)))
    ) as client:
        assert server.answer(client)[0] == 413
        (handler,) = server.server.connections
        assert handler.draining
        assert handler.head is None


def test_replies_that_nobody_takes_are_let_go_where_they_take_too_much_memory(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certtool, "MAX_HELD", 10_000)
    server = inside(1)
    with server.connect(ask("a station")) as client:
        server.turn()
        (handler,) = server.server.connections
        handler.unsent = bytes(11_000)  # as where the system's own buffers are full
        handler.deadline += certtool.REPLY_SECONDS
        handler.waiting = True
        server.later(certtool.TICK_SECONDS)
        assert server.server.connections, "an operator's download goes on"
        handler.waiting = False
        server.later(certtool.TICK_SECONDS)
        assert server.receive(client)[:12] == b"HTTP/1.1 200"
        assert not server.server.connections


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (head_of(b" " * 60_000, b"Content-Length: 60000"), 400),
        (head_of(b" " * 60_000, b"Content-Length: 70000"), 413),
        (ask("long path").replace(b"/", b"/" + b"x" * 16_000, 1), 200),
    ],
    ids=["answered", "refused before its end", "of a long path"],
)
def test_a_connection_keeps_nothing_of_a_request_that_is_answered(
    data: bytes, status: int, inside: Callable[..., Inside]
) -> None:
    server = inside(1)
    with server.connect(data) as client:
        assert server.answer(client)[0] == status
        (handler,) = server.server.connections
        kept = handler.body, handler.buffer, handler.path, handler.request_head.headers
        assert not any(kept), "of thousands of connections it is all memory"


def test_who_waits_for_a_long_job_is_not_closed_as_idle(inside: Callable[..., Inside]) -> None:
    server = inside(1)
    with server.connect(ask("a station")) as client:
        server.answer(client)
        (handler,) = server.server.connections
        for handler.waiting in (True, False):
            server.later(certtool.IDLE_SECONDS + 1)
            assert handler.open == handler.waiting


def test_headers_and_body_may_come_in_packets_of_their_own(inside: Callable[..., Inside]) -> None:
    server = inside()
    head, end, body = ask("two packets").partition(b"\r\n\r\n")
    with server.connect(head + end) as client:
        server.turn()
        client.send(body)
        assert server.answer(client)[0] == 200


def test_a_request_may_be_split_anywhere(inside: Callable[..., Inside]) -> None:
    server = inside(1)
    request = ask("split")
    answers = set()
    for cut in range(1, len(request)):
        with server.connect(request[:cut]) as client:
            server.turn()
            client.send(request[cut:])
            answers.add(server.receive(client, 1))
    assert [status for answer in answers for status, _ in replies(answer)] == [200]


def test_a_head_that_was_seen_before_is_no_request_without_its_empty_line(
    inside: Callable[..., Inside],
) -> None:
    server = inside()
    head, end, _ = post(b"").partition(b"\r\n\r\n")
    with server.connect(head + end) as client:
        assert server.answer(client)[0] == 400
        client.send(head)
        server.turn()
        client.send(b"\r\nConnection: close" + end)
        ((status, told, _),) = split(server.receive(client))
    assert status == 400
    assert "Connection: close" in told
    assert len(server.events) == 2


def test_a_request_may_come_byte_by_byte(inside: Callable[..., Inside]) -> None:
    server = inside()
    request = ask("slow but steady")
    with server.connect() as client:
        for place in range(len(request)):
            client.send(request[place : place + 1])
            server.turn(1)
        assert server.answer(client)[0] == 200


@pytest.mark.parametrize("count", [2, 100])
def test_requests_in_one_packet_are_answered_in_their_order(count: int, line: Server) -> None:
    names = [f"piped-{count}-{number}" for number in range(count)]
    answers = replies(raw(line.port, b"".join(map(ask, names)), shutdown=True))
    assert [(status, reply["DeviceID"]) for status, reply in answers] == [(200, name) for name in names]
    assert len({reply["DeviceName"] for _, reply in answers}) == count


def test_a_refused_request_does_not_end_the_ones_behind_it(line: Server) -> None:
    data = post(b"{}") + ask("x", product="unknown") + ask("after the bad ones")
    assert [status for status, _ in replies(raw(line.port, data, shutdown=True))] == [400, 404, 200]


@pytest.mark.usefixtures("unchanged")
def test_nothing_is_run_behind_a_request_that_ends_the_connection(line: Server) -> None:
    data = b"GET / HTTP/1.1\r\n\r\n" + ask("smuggled")
    assert [status for status, _ in replies(raw(line.port, data, shutdown=True))] == [403]


Deaf = Tuple[Inside, socket.socket, CertRequestHandler]


@pytest.fixture
def deaf(request: pytest.FixtureRequest, inside: Callable[..., Inside]) -> Iterator[Deaf]:
    """A server, and a client that has asked many times and read nothing: the system buffers few of the replies."""
    server = inside(1)
    with socket.socket() as client:
        for end, receives, sends in ((client, 16_384, 200_000), (server.server.socket, 200_000, 16_384)):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sends)  # a connection inherits it from its listener
        client.connect(("127.0.0.1", server.server.server_port))
        client.settimeout(0)
        left = ask("deaf") * request.param
        while left:
            with contextlib.suppress(BlockingIOError):
                left = left[client.send(left) :]
            server.turn(1)
        server.turn(100)
        [handler] = server.server.connections
        assert len(handler.unsent) > certtool.MAX_UNSENT, "otherwise the tests show nothing"
        yield server, client, handler


@pytest.mark.parametrize("half_closed", [False, True])
@pytest.mark.parametrize(("deaf", "count"), [(700, 700), (1200, 1200)], indirect=["deaf"])
def test_a_client_that_reads_late_gets_every_reply(half_closed: bool, count: int, deaf: Deaf) -> None:
    server, client, _ = deaf
    if half_closed:
        client.shutdown(socket.SHUT_WR)
    received = more = server.receive(client, 1)
    while more and (received.count(b"HTTP/1.1 ") < count or not received.endswith(b"}")):
        more = server.receive(client, 1)
        received += more
    assert [status for status, _ in replies(received)] == [200] * count


@pytest.mark.parametrize("deaf", [1200], indirect=True)
def test_a_client_that_reads_late_costs_little_memory(deaf: Deaf) -> None:
    server, client, handler = deaf
    read = 0
    while read < 300_000:
        assert len(handler.unsent) < 2 * certtool.MAX_UNSENT
        assert len(handler.buffer) < certtool.RECEIVE + 1000
        server.turn(1)
        with contextlib.suppress(BlockingIOError):
            read += len(client.recv(2048))


@pytest.mark.parametrize("deaf", [700], indirect=True)
def test_a_client_that_never_reads_is_let_go(deaf: Deaf) -> None:
    server, _, _ = deaf
    for _ in range(10):  # the system may take some more of the replies, which counts as reading; it cannot go on so
        if server.server.connections:
            server.later(certtool.REPLY_SECONDS + 1)
    assert not server.server.connections
    assert server.say(ask("another"))[0] == 410


def connected(server: Inside, crowd: contextlib.ExitStack, count: int) -> List[socket.socket]:
    """Clients whose connections the server knows, and who have not asked yet."""
    clients = [crowd.enter_context(server.connect()) for _ in range(count)]
    server.turn()
    return clients


def answered(clients: Sequence[socket.socket]) -> List[socket.socket]:
    """Return who has got a reply, and take it."""
    has = select.select(clients, [], [], 0)[0]
    assert all(client.recv(65536).endswith(b"}") for client in has)
    return has


def test_what_a_turn_has_no_time_for_comes_first_in_the_next_one(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = inside()
    with contextlib.ExitStack() as crowd:
        clients = connected(server, crowd, 4)
        monkeypatch.setattr(certtool, "TURN_SECONDS", -1.0)  # it is over at once
        for client in clients:
            client.send(ask("x"))
        waiting = set(clients)
        while waiting:
            before = len(waiting)
            server.turn(1)
            for client in answered(clients):
                waiting.discard(client)
                client.send(ask("again"))
            assert len(waiting) == before - 1, "one more, although others have asked again"


def test_those_that_sent_very_many_requests_at_once_take_a_small_part_of_a_turn(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = inside()
    with contextlib.ExitStack() as crowd:
        clients = connected(server, crowd, 4)
        monkeypatch.setattr(certtool, "MAX_PIPELINED", 1)
        monkeypatch.setattr(certtool, "TURN_SECONDS", 100.0)
        monkeypatch.setattr(certtool, "AGAIN_SECONDS", -1.0)
        for client in clients:
            client.send(ask("x") * 9)
        server.turn(1)
        before = len(server.events)
        server.turn(1)
        assert len(server.events) == before + 1


def test_a_station_does_not_wait_for_all_connections_of_another_peer(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = inside()
    with contextlib.ExitStack() as crowd:
        clients = connected(server, crowd, 9)
        address = ("127.0.0.1", server.server.server_port)
        station = crowd.enter_context(socket.create_connection(address, PATIENCE, ("127.0.0.2", 0)))
        server.turn()
        monkeypatch.setattr(certtool, "TURN_SECONDS", -1.0)
        for client in clients:
            client.send(ask("x"))
        server.turn(1)
        station.send(ask("station"))
        server.turn(2)
        assert answered([station])
        server.turn(8)
        assert len(answered(clients)) == 9


def test_a_connection_that_ends_while_it_waits_for_its_turn_bothers_nobody(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = inside()
    with contextlib.ExitStack() as crowd:
        clients = connected(server, crowd, 3)
        monkeypatch.setattr(certtool, "TURN_SECONDS", -1.0)
        for client in clients:
            client.send(ask("x"))
        server.turn(1)
        assert len(answered(clients)) == 1
        server.later(certtool.IDLE_SECONDS + 1)
        assert len(server.server.connections) == 1, "the next one had its turn, the last one was closed before"
        assert server.say(ask("another"))[0] == 200
    assert server.notices == []


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [ask("slow")[:3], ask("slow")[:-1]], ids=["in the head", "in the body"])
def test_a_request_that_comes_too_slowly_is_refused_with_408(part: bytes, inside: Callable[..., Inside]) -> None:
    server = inside()
    before = server.journal.read_bytes()
    with server.connect(part) as client:
        server.turn()
        server.later(certtool.REQUEST_SECONDS - 1)
        client.send(b"")
        assert server.server.connections, "there is time left"
        server.later(2)
        status, reply = server.answer(client)
    assert (status, reply["Status"]) == (408, "BadRequest")
    assert server.journal.read_bytes() == before


def test_sending_a_byte_now_and_then_wins_no_time(inside: Callable[..., Inside]) -> None:
    server = inside()
    with server.connect() as client:
        for byte in ask("slowloris")[:6]:
            client.send(bytes([byte]))
            server.later(certtool.REQUEST_SECONDS / 5)
        assert server.answer(client)[0] == 408


def test_each_request_of_a_kept_connection_has_the_same_time(inside: Callable[..., Inside]) -> None:
    server = inside()
    with server.connect(ask("kept")) as client:
        assert server.answer(client)[0] == 200
        for silent, needed, status in ((certtool.IDLE_SECONDS, -1, 200), (0, 1, 408)):
            server.later(max(0, silent - 1))
            client.send(ask("kept")[:-1])
            server.turn()
            server.later(certtool.REQUEST_SECONDS + needed)
            client.send(ask("kept")[-1:])
            assert server.answer(client)[0] == status


@pytest.mark.parametrize(("seconds", "status"), [(-1, 200), (1, 408)])
def test_an_upload_has_more_time_than_a_request(seconds: int, status: int, inside: Callable[..., Inside]) -> None:
    server = inside()
    token = f"Authorization: Bearer {server.server.token}"
    upload = post(b'{"options": {}, "files": []}\n', token, path="/certtool/import").replace(
        b"192.168.1.10", b"localhost"
    )
    with server.connect(upload[:-1]) as client:
        server.turn()
        server.later(certtool.UPLOAD_SECONDS + seconds)
        client.send(upload[-1:])
        assert server.answer(client)[0] == status


def test_a_connection_that_says_nothing_is_closed(inside: Callable[..., Inside]) -> None:
    server = inside()
    with server.connect() as never, server.connect(ask("once")) as once:
        assert server.answer(once)[0] == 200
        server.later(certtool.REQUEST_SECONDS + 1)
        assert server.receive(never) == b"", "no request came at all"
        server.later(certtool.IDLE_SECONDS - certtool.REQUEST_SECONDS - 3)
        once.send(ask("once"))
        assert server.answer(once)[0] == 200, "the time counts from the request before"
        server.later(certtool.IDLE_SECONDS + 1)
        assert server.receive(once) == b""


def test_an_empty_line_behind_a_request_is_not_a_request(inside: Callable[..., Inside]) -> None:
    server = inside()
    with server.connect(ask("old client") + b"\r\n") as client:
        assert server.answer(client)[0] == 200
        server.later(certtool.REQUEST_SECONDS + 1)
        client.send(ask("old client"))
        assert server.answer(client)[0] == 200


# -- many and broken connections ---------------------------------------------------------------------------------------


def test_beyond_the_most_connections_the_one_that_was_silent_longest_gives_way(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certtool, "MAX_CONNECTIONS", 3)
    server = inside()
    with server.connect(ask("a")) as first, server.connect(ask("b")) as second, server.connect(ask("c")[:9]) as third:
        assert server.answer(first)[0] == server.answer(second)[0] == 200
        first.send(ask("a"))
        assert server.answer(first)[0] == 200
        assert server.say(ask("new"))[0] == 200
        assert server.receive(second) == b"", "it was silent longest"
        third.send(ask("c")[9:])
        assert server.answer(third)[0] == 200, "it was in the middle of a request"
        first.send(ask("a"))
        assert server.answer(first)[0] == 200


def test_a_crowd_of_new_clients_does_not_make_the_server_look_at_all_connections_for_each(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted(Set[CertRequestHandler]):
        looks = 0

        def __iter__(self) -> Iterator[CertRequestHandler]:
            Counted.looks += 1
            return super().__iter__()

    monkeypatch.setattr(certtool, "MAX_CONNECTIONS", 30)
    server = inside()
    server.server.connections = Counted()
    server.server._sweep_at = server.server.now + 10 * PATIENCE  # it looks at all too
    with contextlib.ExitStack() as crowd:
        clients = [crowd.enter_context(server.connect(ask("old"))) for _ in range(30)]
        server.turn()
        assert len(answered(clients)) == 30
        for _ in range(10):
            crowd.enter_context(server.connect())
        server.turn()
        closed = select.select(clients, [], [], 0)[0]
        assert len(closed) == 10
        spoke = next(client for client in clients if client not in closed)
        spoke.send(ask("old"))
        server.turn()
        for _ in range(19):
            crowd.enter_context(server.connect())
        server.turn()
        assert len(select.select(clients, [], [], 0)[0]) == 30
        assert answered([spoke])
        assert not select.select([spoke], [], [], 0)[0], "it is the one that was not closed"
        assert (len(server.server.connections), Counted.looks) == (30, 1)


def test_nobody_gives_way_whose_reply_is_on_its_way(inside: Callable[..., Inside]) -> None:
    def work() -> Generator[None, None, None]:
        while True:
            yield

    server = inside()
    with server.connect() as asks:
        server.turn()
        [asking] = server.server.connections
        asks.send(ask("asks"))
        asking.feed()
        assert not server.server._evict(), "its reply leaves at the end of the turn"
        assert server.answer(asks)[0] == 200
        server.server.start_job("import", work(), asking)
        assert not server.server._evict(), "it has handed an import over"
        server.turn()
        asking.waiting = False
        assert server.server._evict()
        assert server.receive(asks) == b""


def test_who_is_gone_already_makes_no_room(inside: Callable[..., Inside]) -> None:
    server = inside()
    with contextlib.ExitStack() as clients:
        for _ in range(3):
            clients.enter_context(server.connect())
        server.turn()
        first, second, third = server.server.connections
        for silent, handler in enumerate((third, second, first)):
            handler.deadline -= silent
        assert server.server._evict()
        second.close()
        assert server.server._evict()
        assert not server.server.connections
        assert not server.server._evict()


def test_a_server_full_of_half_requests_still_serves_a_new_client(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certtool, "MAX_CONNECTIONS", 3)
    server = inside()
    with contextlib.ExitStack() as attack:
        for _ in range(5):
            attack.enter_context(server.connect(b"POST / HT"))
            server.turn()
        assert len(server.server.connections) == 3
        assert server.say(ask("real"))[0] == 200


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_more_clients_than_the_system_allows_files_do_not_stop_the_line(server: StartServer) -> None:
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); del sys.argv[0]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    running = server("--import", SAMPLE, python=(sys.executable, "-c", limited))
    with contextlib.ExitStack() as crowd:
        for _ in range(100):
            crowd.enter_context(socket.create_connection(("127.0.0.1", running.port), PATIENCE))
        status, reply = running.request("a1SampleWf0", "in a crowd")
        assert (status, reply["Status"]) == (200, "OK")


def test_without_room_and_without_a_connection_to_close_the_operator_is_told(inside: Callable[..., Inside]) -> None:
    server = inside()

    class Listener:
        errors = iter((errno.ECONNABORTED, errno.EMFILE))

        def _accept(self) -> None:
            raise OSError(next(self.errors), "Too many open files")

    server.server._accept(Listener(), socket.AF_INET, 1)  # type: ignore[arg-type]
    assert server.notices == ["No connection can be taken (Too many open files): close other programs."]


@pytest.mark.parametrize("deaf", [700], indirect=True)
def test_a_client_that_is_gone_with_replies_on_their_way_bothers_nobody(deaf: Deaf) -> None:
    server, client, _ = deaf
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    server.turn()
    assert not server.server.connections


def test_a_connection_reset_by_its_client_bothers_nobody(inside: Callable[..., Inside]) -> None:
    server = inside()
    for data in (b"", ask("reset")[:20], ask("reset")):
        with server.connect(data) as client:
            server.turn(1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        server.turn()
    assert not server.server.connections
    assert server.notices == []
    assert server.say(ask("reset"))[0] == 200


def test_a_defect_in_the_server_answers_500_and_the_line_goes_on(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = inside()
    before = server.journal.read_bytes()

    def crash(*_: object) -> None:
        raise ZeroDivisionError("top secret")

    with monkeypatch.context() as broken:
        broken.setattr(certtool, "format_certificate", crash)
        broken.setattr(certtool, "parse_request", crash)
        status, reply = server.say(ask("unlucky"))
    assert (status, reply["Status"]) == (500, "InternalError")
    [notice] = server.notices
    assert notice.startswith("Please report: ZeroDivisionError in crash, line ")
    assert "secret" not in notice + str(reply)
    assert server.journal.read_bytes() == before
    assert server.say(ask("unlucky"))[0] == 200


def test_a_request_that_does_not_fit_into_memory_is_refused_and_the_line_goes_on(inside: Callable[..., Inside]) -> None:
    class Full(bytearray):
        def __iadd__(self, _: object) -> Full:
            raise MemoryError

    server = inside()
    with server.connect(ask("large")[:20]) as client:
        server.turn()
        [handler] = server.server.connections
        handler.buffer = Full(handler.buffer)
        client.send(ask("large")[20:])
        status, reply = server.answer(client)
    assert (status, reply["Status"]) == (413, "BadRequest")
    assert "no memory" in reply["Message"]
    assert server.say(ask("small"))[0] == 200


def test_a_request_for_whose_body_there_is_no_memory_is_refused_and_the_line_goes_on(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(_: object) -> None:
        raise MemoryError

    server = inside()
    with server.connect(ask("large")[:20]) as client, monkeypatch.context() as full:
        server.turn()
        full.setattr(certtool, "memoryview", no_memory, raising=False)
        client.send(ask("large")[20:])
        status, reply = server.answer(client)
    assert (status, reply["Status"]) == (413, "BadRequest")
    assert "no memory" in reply["Message"]
    assert server.say(ask("small"))[0] == 200


def test_a_defect_outside_of_a_request_is_told_and_the_line_goes_on(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError("top secret")

    server = inside()
    with server.connect(ask("first")) as unlucky, server.connect(ask("second")[:20]) as other:
        with monkeypatch.context() as broken:
            broken.setattr(certtool.CertRequestHandler, "send", crash)
            assert server.receive(unlucky) == server.receive(other) == b""
        assert [notice.split(",")[0] for notice in server.notices] == ["Please report: ZeroDivisionError in crash"]
        given = server.say(ask("first"))
        assert given[0] == 200
        assert server.say(ask("first")) == given
    assert server.journal.read_text().count(",first,") == 1
