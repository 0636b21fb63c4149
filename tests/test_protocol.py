"""The wire protocol of CONTRACT 1, byte by byte, and every way in which it refuses."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import sys
import zlib
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import certtool
from certtool import BadRequest, CertRequestHandler, parse_object, parse_request
from tests import identities
from tests.inside import PATIENCE, Inside
from tests.support import SAMPLE, RunCerttool, Server, StartServer, listed, raw
from tests.wire import Reply, ask, has_ipv6, post, replies, split

WIFI = ("a1SampleWf0", "WCBX1KpeZUaLJ4d8jOCs", "4bWYTI6wLqeeHq1PkCJVuoYqLRqrxZKi", "0lR8acRYSi4MDF8k")
SECRETS = re.compile("|".join(re.findall(r"[A-Za-z0-9]{32}|0lR8acRYSi4MDF8k", SAMPLE.read_text(encoding="utf-8"))))


def text_of(server: Server, device_id: Optional[str], product: str = "a1SampleWf0", action: int = 0) -> str:
    """Send one request; return the body of the reply as it came."""
    [(_, _, body)] = split(raw(server.port, ask(device_id, product=product, action=action), shutdown=True))
    return body.decode()


# -- requests ----------------------------------------------------------------------------------------------------------


def read_request(body: bytes) -> object:
    """What `parse_request` makes of a body, or the sentence that refuses it."""
    try:
        return parse_request(body)
    except BadRequest as error:
        return str(error)


ODD = st.sampled_from(['"', "\\", "\\u0041", " ", "\t", "", "é", "\x7f", "0", "x" * 64, "a1Key", ",", "}", "\n"])
TEXTS = st.lists(ODD, max_size=3).map("".join)


@given(
    key=TEXTS,
    device=TEXTS,
    action=st.sampled_from("0 1 2 3 -1 1.0 01 true".split()),
    gap=st.sampled_from(["", " ", "  "]),
)
@example(key="a1Key", device="A0B1", action="1", gap=" ")
def test_the_short_way_through_a_usual_request_means_what_the_long_one_does(
    key: str, device: str, action: str, gap: str
) -> None:
    body = f'{{"ProductKey":{gap}"{key}",{gap}"DeviceID":{gap}"{device}",{gap}"Action":{gap}{action}}}'.encode()
    short = read_request(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certtool, "_USUAL_REQUEST", re.compile(b"never"))
        assert read_request(body) == short


def nesting(value: object) -> int:
    """How many arrays and objects stand in each other."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(nesting, inner), default=0)


LEAVES = st.sampled_from([None, 0, "", "[{", '"]}', "\\"])
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4))


@given(st.dictionaries(TEXTS, VALUES, max_size=3))
def test_an_object_is_read_unless_it_is_nested_too_deep(value: Dict[str, object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certtool, "MAX_NESTING", 3)
        if nesting(value) > 3:
            with pytest.raises(BadRequest, match="nested too deep"):
                parse_object(json.dumps(value).encode())
        else:
            assert parse_object(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (b' \t\r\n{"a": "\\ud83d\\ude00"}\n', True),
        (b'\x0b{"a": 1}', False),
        (b'{"a": 1}\x1c', False),
        ('\u00a0{"a": 1}'.encode(), False),
        (b'{"a": "\\ud83d"}', False),
        (b'{"\\ude00": 1}', False),
    ],
)
def test_only_what_is_white_space_and_text_in_json_is_taken_as_json_means_it(text: bytes, read: bool) -> None:
    if read:
        assert parse_object(text) == {"a": "\U0001f600"}
    else:
        with pytest.raises(BadRequest, match="not one JSON object"):
            parse_object(text)


@pytest.mark.parametrize(
    ("data", "head", "body"),
    [
        (b"A\r\nB\r\n\r\nC", b"A\r\nB", b"C"),
        (b"A\nB\n\nC", b"A\nB", b"C"),
        (b"A\nB\n\nC\r\n\r\nD", b"A\nB", b"C\r\n\r\nD"),
        (b"A\r\nB\r\n\r\nC\n\nD", b"A\r\nB", b"C\n\nD"),
        (b"A\r\nB\n\r\nC", b"A\r\nB", b"C"),
        (b"A\r\nB\r\n\nC", b"A\r\nB", b"C"),
    ],
)
def test_the_first_empty_line_ends_the_head_whatever_the_body_holds(data: bytes, head: bytes, body: bytes) -> None:
    end, start = certtool._head_end(data)
    assert (data[:end], data[start:]) == (head, body)
    for cut in range(1, start):
        assert certtool._head_end(data[:cut]) == (0, 0)


# -- replies -----------------------------------------------------------------------------------------------------------


def test_a_reply_is_the_contracts_byte_for_byte(server: StartServer) -> None:
    running = server("--import", SAMPLE)
    key, name, secret, product_secret = WIFI
    checksum = f"{zlib.crc32((key + name + secret + product_secret).encode()):08X}"
    expected = (
        f'{{"ProductKey": "{key}", "ProductSecret": "{product_secret}", "DeviceSecret": "{secret}", '
        f'"CRC32": "{checksum}", "DeviceName": "{name}", "DeviceID": "MAC-1", "Status": "OK"}}'
    )
    assert raw(running.port, ask("MAC-1", product=key), shutdown=True).decode() == (
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(expected)}\r\nConnection: keep-alive\r\n\r\n{expected}"
    )
    for action in (1, 2):
        acknowledged = f'{{"ProductKey": "{key}", "DeviceID": "MAC-1", "Status": "OK"}}'
        assert text_of(running, "MAC-1", action=action) == acknowledged


def test_a_bluetooth_reply_has_its_product_id_before_the_status(server: StartServer) -> None:
    running = server("--import", SAMPLE)
    reply = json.loads(text_of(running, "MAC-1", "a1SampleBt0"))
    assert list(reply)[-3:] == ["DeviceID", "ProductID", "Status"]
    payload = "".join(
        reply[field] for field in ("ProductKey", "DeviceName", "DeviceSecret", "ProductSecret", "ProductID")
    )
    assert reply["CRC32"] == f"{zlib.crc32(payload.encode()):08X}"


def test_older_firmware_gets_the_checksum_as_a_number(server: StartServer) -> None:
    running = server("--import", SAMPLE, "--crc-format", "int")
    assert f', "CRC32": {zlib.crc32("".join(WIFI).encode())}, ' in text_of(running, "MAC-1")


def test_text_that_json_must_escape_comes_back_as_it_was(server: StartServer) -> None:
    running = server("--import", SAMPLE)
    odd = 'q"uo\\te</script>'
    status, reply = running.request("a1SampleWf0", odd)
    assert (status, reply["DeviceID"]) == (200, odd)
    assert running.report("a1SampleWf0", odd, 1) == (
        200,
        {"ProductKey": "a1SampleWf0", "DeviceID": odd, "Status": "OK"},
    )


@pytest.mark.parametrize("written", ["  MAC-1", "MAC-1\t", "\r\n MAC-1 \n", "\u3000MAC-1"])
def test_white_space_around_a_device_id_is_not_part_of_it(written: str, server: StartServer) -> None:
    running = server("--import", SAMPLE)
    first = running.request("a1SampleWf0", "MAC-1")
    assert running.request("a1SampleWf0", written) == first
    assert running.report("a1SampleWf0", written, 1)[1]["DeviceID"] == "MAC-1"


def test_every_path_carries_requests(server: StartServer) -> None:
    running = server("--import", SAMPLE)
    message = {"ProductKey": "a1SampleWf0", "DeviceID": "MAC-1", "Action": 0}
    answers = [running.post(message, path) for path in ("/", "/burn", "/a/b.jsp?x=1&y=%20", "//", "/certtool", "*")]
    assert answers == [answers[0]] * len(answers)
    assert answers[0][0] == 200


# -- devices -----------------------------------------------------------------------------------------------------------


def test_a_device_without_an_id_gets_one_made_up_with_which_its_burn_is_reported(
    server: StartServer, certtool: RunCerttool, store: Path
) -> None:
    running = server("--import", SAMPLE)
    made_up: List[str] = []
    for device_id in (None, "", "   "):
        status, reply = running.request("a1SampleWf0", device_id)
        assert status == 200
        made_up.append(reply["DeviceID"])
        assert running.report("a1SampleWf0", made_up[-1], 1)[0] == 200
        again = running.request("a1SampleWf0", made_up[-1])
        assert again == (200, reply), "also a made-up id keeps its certificate"
    assert len(set(made_up)) == 3
    assert all(re.fullmatch(r"[!-~]{1,64}", device_id) for device_id in made_up)
    written = listed(certtool, store, "--status", "written")
    assert [row["DeviceID"] for row in written] == made_up


def test_one_device_may_hold_a_certificate_of_each_product(server: StartServer) -> None:
    running = server("--import", SAMPLE)
    names = {running.request(product, "MAC-1")[1]["DeviceName"] for product in ("a1SampleWf0", "a1SampleBt0")}
    assert len(names) == 2


def test_a_device_keeps_its_certificate_whatever_it_reports_and_however_often(
    server: StartServer, store: Path, certtool: RunCerttool
) -> None:
    running = server("--import", SAMPLE)
    first = running.request("a1SampleWf0", "MAC-1")
    for action in (2, 2, 1, 1, 2, 1):
        acknowledged = running.report("a1SampleWf0", "MAC-1", action)
        assert acknowledged == (200, {"ProductKey": "a1SampleWf0", "DeviceID": "MAC-1", "Status": "OK"})
        before = (store / "journal.csv").read_bytes()
        assert running.request("a1SampleWf0", "MAC-1") == first
        [row] = listed(certtool, store, "--device-id", "MAC-1")
        assert row["Status"] == ("Written" if action == 1 else "Allocated")
        line = (store / "journal.csv").read_bytes()[len(before) :].split(b",")
        assert line[2] == (b"rerequest" if action == 1 else b"allocate"), "what the operator should see is recorded"


def test_a_repeated_report_is_acknowledged_and_recorded_once(server: StartServer, store: Path) -> None:
    running = server("--import", SAMPLE)
    running.request("a1SampleWf0", "MAC-1")
    for action in (1, 2):
        running.report("a1SampleWf0", "MAC-1", action)
        before = (store / "journal.csv").read_bytes()
        assert running.report("a1SampleWf0", "MAC-1", action)[0] == 200
        assert (store / "journal.csv").read_bytes() == before


def test_no_reply_leaves_before_the_record_of_its_turn_is_synced(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = inside()
    log: List[str] = []
    fsync, send = os.fsync, CertRequestHandler.send

    def logged_fsync(descriptor: int) -> None:
        fsync(descriptor)
        log.append("synced")

    def logged_send(handler: CertRequestHandler, data: bytes, last: bool) -> None:
        log.append("sent")
        send(handler, data, last)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(CertRequestHandler, "send", logged_send)
    with server.connect(ask("MAC-1")), server.connect(ask("MAC-1")), server.connect(ask("MAC-2")):
        server.turn(1)
    assert log == ["synced", "sent", "sent", "sent"], "one group commit, then the replies, also the repeated one's"


# -- refusals ----------------------------------------------------------------------------------------------------------


def refusal(answer: Reply) -> Tuple[int, str]:
    """Check what every refusal has in common; return its HTTP status and its Status."""
    status, reply = answer
    assert list(reply) == ["Status", "Message"]
    assert re.fullmatch(r"[^\n]+\.", reply["Message"]), "one sentence"
    assert not SECRETS.search(reply["Message"])
    return status, reply["Status"]


def test_every_row_of_the_error_table_that_a_running_server_answers(
    server: StartServer, store: Path, certtool: RunCerttool
) -> None:
    running = server("--import", SAMPLE, "--require-device-id")
    product = "a1SampleWf0"
    _, voided = running.request(product, "voided")
    certtool("void", voided["DeviceName"], "--reason", "scrap", "--data", store)
    number = 0
    while running.request(product, f"MAC-{number}")[0] == 200:
        number += 1
    before = (store / "journal.csv").read_bytes()
    table = {
        "not JSON": (post(b"hello"), (400, "BadRequest")),
        "a field of another type": (post({"ProductKey": product, "Action": "0"}), (400, "BadRequest")),
        "a report without DeviceID": (ask(None, product=product, action=1), (400, "BadRequest")),
        "an unknown product": (ask("MAC-1", product="a1Nobody"), (404, "UnknownProduct")),
        "an unknown product and no DeviceID": (ask(None, product="a1Nobody"), (404, "UnknownProduct")),
        "a report for an unknown product": (ask("MAC-1", product="a1Nobody", action=1), (404, "UnknownProduct")),
        "a report of a device that has none": (ask("nobody", product=product, action=1), (404, "UnknownDevice")),
        "a failure of a device that has none": (ask("nobody", product=product, action=2), (404, "UnknownDevice")),
        "no DeviceID where it is required": (ask(None, product="a1SampleBt0"), (409, "DeviceIDRequired")),
        "a request of a voided device": (ask("voided", product=product), (409, "Voided")),
        "a report of a voided device": (ask("voided", product=product, action=1), (409, "Voided")),
        "a failure of a voided device": (ask("voided", product=product, action=2), (409, "Voided")),
        "an empty pool": (ask("late", product=product), (410, "PoolExhausted")),
        "a body over 64 KiB": (post(b" " * (64 * 1024 + 1)), (413, "BadRequest")),
        "large headers": (ask("MAC-1", "X: " + "x" * 17_000), (431, "BadRequest")),
        "chunks": (ask("MAC-1", "Transfer-Encoding: chunked"), (501, "BadRequest")),
        "management by a stranger": (post(b"{}", path="/certtool/void"), (403, "Forbidden")),
    }
    for name, (data, expected) in table.items():
        [answer] = replies(raw(running.port, data, shutdown=True))
        assert refusal(answer) == expected, name
        assert (store / "journal.csv").read_bytes() == before, name
    assert running.request(product, "MAC-0")[0] == 200, "an empty pool still knows its devices"


def from_address(address: str, port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), PATIENCE, (address, 0)) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.parametrize(
    "allow",
    [["127.0.0.2"], ["127.0.0.2/31"], ["10.0.0.0/8", "127.0.0.2/32"], ["127.0.0.3/30"]],
    ids=" ".join,
)
def test_only_the_allowed_stations_are_served(allow: Sequence[str], server: StartServer, store: Path) -> None:
    running = server("--import", SAMPLE, *[word for network in allow for word in ("--allow", network)])
    request = ask("MAC-1", product="a1SampleWf0")
    [(status, _)] = replies(from_address("127.0.0.2", running.port, request))
    assert status == 200
    before = (store / "journal.csv").read_bytes()
    [answer] = replies(from_address("127.0.0.9", running.port, request + request))
    assert refusal(answer) == (403, "Forbidden")
    assert (store / "journal.csv").read_bytes() == before


@pytest.mark.parametrize(
    "header",
    [
        "Origin: http://evil.example",
        "Origin: null",
        "ORIGIN:",
        "Origin: http://192.168.1.10",  # as the address is written here: the page's name was rebound to it
        "Sec-Fetch-Site: cross-site",
        "Sec-Fetch-Site: same-origin",
    ],
)
def test_a_web_page_in_a_browser_draws_no_certificate(header: str, server: StartServer, store: Path) -> None:
    running = server("--import", SAMPLE)
    plain = [ask(device_id, product="a1SampleWf0") for device_id in ("MAC-1", None)]
    assert replies(raw(running.port, plain[0], shutdown=True))[0][0] == 200
    before = (store / "journal.csv").read_bytes()
    paged = [ask(device_id, header, product="a1SampleWf0") for device_id in ("MAC-1", None)]
    for data in [*paged, *paged, ask("MAC-1", header, product="a1SampleWf0", action=1), plain[0] + paged[0]]:
        answer = replies(raw(running.port, data, shutdown=True))[-1]
        assert refusal(answer) == (403, "Forbidden"), "also where the head was seen before"
        assert "ask from a program" in answer[1]["Message"]
    assert (store / "journal.csv").read_bytes() == before


def test_an_ipv4_network_also_lets_in_those_that_come_over_ipv6_sockets(server: StartServer) -> None:
    if not has_ipv6():
        pytest.skip("this PC has no IPv6")
    running = server("--import", SAMPLE, "--allow", "127.0.0.1", "--host", "::")
    [(status, _)] = replies(raw(running.port, ask("MAC-1", product="a1SampleWf0"), shutdown=True))
    assert status == 200


# -- a disk that fails -------------------------------------------------------------------------------------------------


def write_nothing(_descriptor: int, _data: bytes) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def write_a_part(descriptor: int, data: bytes, write: Callable[[int, bytes], int] = os.write) -> int:
    return write(descriptor, data[:-9])


@pytest.mark.parametrize("fault", [write_nothing, write_a_part])
def test_what_cannot_be_written_is_not_given_out_and_the_next_may_be(
    fault: Callable[[int, bytes], int], inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = inside(3)
    assert server.say(ask("before"))[0] == 200
    before = server.journal.read_bytes()
    with monkeypatch.context() as full:
        full.setattr(os, "write", fault)
        for device_id, action in (("MAC-1", 0), ("MAC-1", 0), (None, 0), ("before", 1), ("before", 2)):
            assert refusal(server.say(ask(device_id, action=action))) == (503, "StoreUnavailable")
            assert server.journal.read_bytes() == before
    assert [event.result for event in server.events[1:]] == ["refused: StoreUnavailable"] * 5
    assert len([notice for notice in server.notices if "free the store's disk" in notice]) == 1, "told once"
    assert refusal(server.say(ask("MAC-1", action=1))) == (404, "UnknownDevice")
    assert server.say(ask("before", action=1))[0] == 200
    first, second = (server.say(ask(device_id)) for device_id in ("MAC-1", "MAC-2"))
    names = [credential.device_name for credential in identities.rows(3)]
    assert [first[1]["DeviceName"], second[1]["DeviceName"]] == names[1:], "none was lost"
    assert server.server.failing == ""
    with monkeypatch.context() as full:
        full.setattr(os, "write", fault)
        assert refusal(server.say(ask("before", action=2))) == (503, "StoreUnavailable")
    assert len([notice for notice in server.notices if "free the store's disk" in notice]) == 2, "told again"


def test_after_a_failed_sync_nothing_is_acknowledged_until_a_restart(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = inside(3)
    assert server.say(ask("before"))[0] == 200

    def failing_fsync(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", failing_fsync)
        assert refusal(server.say(ask("MAC-1"))) == (503, "StoreUnavailable")
    after = server.journal.read_bytes()
    for device_id, action in (("MAC-1", 0), ("MAC-2", 0), ("before", 1)):
        assert refusal(server.say(ask(device_id, action=action))) == (503, "StoreUnavailable")
    assert server.say(ask("before"))[0] == 200, "this was durable before, and needs no record"
    assert "check the disk, and restart this PC" in server.server.failing, "the page says so until then"
    assert server.journal.read_bytes() == after
    assert len(server.notices) == 1
    assert "check the disk, and restart this PC" in server.notices[0]


def test_a_reply_of_a_turn_whose_commit_fails_acknowledges_nothing_of_it(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = inside(1)
    with monkeypatch.context() as full, server.connect(ask("a") + ask("a") + ask("b") + post(b"{}")) as client:
        full.setattr(os, "write", write_nothing)
        received = server.receive(client, 1)
    assert [refusal(answer)[0] for answer in replies(received)] == [503, 503, 503, 400]
    assert server.say(ask("b"))[0] == 200, "the certificate is free again"


def test_an_operator_is_not_told_of_what_was_done_in_a_turn_whose_commit_fails(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = inside(1)
    assert server.say(ask("a"))[0] == 200
    [credential] = identities.rows(1)
    release = post(
        {"device_name": credential.device_name, "reason": "scrap"},
        f"Authorization: Bearer {server.server.token}",
        path="/certtool/release",
    ).replace(b"Host: 192.168.1.10", b"Host: localhost")
    with monkeypatch.context() as full, server.connect(release + release) as client:
        full.setattr(os, "write", write_nothing)
        received = server.receive(client, 1)
    assert [refusal(answer)[0] for answer in replies(received)] == [503, 503], "it is neither released nor free"
    with server.connect(release + release) as client:
        received = server.receive(client, 1)
    assert [status for status, _ in replies(received)] == [200, 409]


def test_a_journal_that_another_program_changes_stops_the_recording(inside: Callable[..., Inside]) -> None:
    server = inside()
    with open(server.journal, "ab") as other:
        other.write(b"1")
    for _ in range(2):
        status, reply = server.say(ask("MAC-1"))
        assert refusal((status, reply)) == (503, "StoreUnavailable")
        assert "Another program changed journal.csv" in reply["Message"]
    server.journal.write_bytes(server.journal.read_bytes()[:-1])  # so that the store can be opened again


def test_an_import_file_that_disappears_gives_out_nothing(inside: Callable[..., Inside]) -> None:
    server = inside()
    [file] = (server.journal.parent / "imports").iterdir()
    before = server.journal.read_bytes()
    file.rename(file.with_suffix(".away"))
    assert refusal(server.say(ask("MAC-1"))) == (503, "StoreUnavailable")
    assert server.journal.read_bytes() == before
    file.with_suffix(".away").rename(file)
    assert server.say(ask("MAC-1"))[0] == 200


def test_an_import_file_that_is_edited_while_served_gives_out_nothing(inside: Callable[..., Inside]) -> None:
    server = inside()
    [file] = (server.journal.parent / "imports").iterdir()
    good = file.read_bytes()
    lines = good.splitlines(True)
    file.write_bytes(b"".join([lines[0], *reversed(lines[1:])]))
    assert refusal(server.say(ask("MAC-1"))) == (503, "StoreUnavailable")
    file.write_bytes(good)


def test_a_full_disk_refuses_and_a_freed_one_goes_on(server: StartServer, store: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux lets another process's limits be set")
    else:
        import resource  # noqa: PLC0415 - not everywhere

        running = server("--import", SAMPLE)
        first = running.request("a1SampleWf0", "MAC-1")
        before = (store / "journal.csv").read_bytes()
        pid, unlimited = running.process.pid, resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (len(before) + 84, unlimited[1]))
        for _ in range(3):
            assert refusal(running.request("a1SampleWf0", "MAC-2")) == (503, "StoreUnavailable")
        assert (store / "journal.csv").read_bytes() == before
        running.wait_for("free the store's disk")
        assert running.request("a1SampleWf0", "MAC-1") == first
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
        assert running.request("a1SampleWf0", "MAC-2")[0] == 200
        running.kill()
        assert server("--import", SAMPLE).request("a1SampleWf0", "MAC-1") == first
