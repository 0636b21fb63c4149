"""`certtool.py request`, a station on the command line: against a real server, a hostile one, and the vectors."""

from __future__ import annotations

import _thread
import csv
import json
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NoReturn, Optional

import pytest

import certtool as product
from tests import hostile
from tests.support import SAMPLE, RunCerttool, Server, StartServer, listed
from tests.vectorset import Answer, Play, Vector, content, load, name_of

KEY = "a1SampleWf0"
SLACK = 3.0  # seconds that a busy machine may add to a time limit

with SAMPLE.open(encoding="utf-8", newline="") as file:
    FIRST = next(csv.DictReader(file))


def ask(server: Server, product_key: str, device_id: Optional[str], action: int) -> Answer:
    """Be the client of a script of states.json."""
    station = product.Station("127.0.0.1", server.port)
    try:
        if action:
            station.report(product_key, device_id or "", action == 1)
            return Answer("OK", {"ProductKey": product_key, "DeviceID": device_id})
        return Answer("OK", station.request(product_key, device_id or ""))
    except product.ServerRefused as refusal:
        http, status = re.findall(r"refused: (\d+) (\w+)", str(refusal))[0]
        return Answer(status, {}, int(http))


def patient(monkeypatch: pytest.MonkeyPatch, seconds: float, attempts: int) -> None:
    monkeypatch.setattr(product, "STATION_SECONDS", seconds)
    monkeypatch.setattr(product, "STATION_ATTEMPTS", attempts)
    monkeypatch.setattr(product, "STATION_PAUSE", 0.01)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("script", load("states.json"), ids=name_of)
def test_a_station_sees_every_row_of_the_state_table(
    script: Vector, store: Path, server: StartServer, inline: RunCerttool
) -> None:
    Play(script, ask, True, store, server, inline)


def test_an_address_of_ipv6_is_told_apart_from_its_port(certtool: RunCerttool) -> None:
    assert "certtool: [::1]:1 is not reachable" in certtool("request", KEY, "--server", "[::1]:1", ok=1).stderr


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_a_hostile_server_gives_a_station_the_right_certificate_or_one_error_in_time(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = hostile.VERDICT[kind]
    limit = 0.3 if verdict == hostile.FAILS else 5.0  # seconds
    patient(monkeypatch, limit, 2)
    began = time.monotonic()
    got: Dict[str, Any] = {}
    error = None
    with hostile.serve(kind) as server:
        try:
            got = product.Station("127.0.0.1", server.port).request(KEY, "MAC-0001")
        except product.CertToolError as refusal:
            error = refusal
        assert time.monotonic() - began < 2 * limit + SLACK
    if verdict != hostile.EITHER:
        assert (error is None) == (verdict == hostile.SUCCEEDS), error or got
    if error is None:
        wanted = hostile.certificate({"ProductKey": KEY, "DeviceID": "MAC-0001", "Action": 0})
        for name in ("ProductKey", "DeviceName", "DeviceSecret", "ProductSecret", "DeviceID", "Status"):
            assert got[name] == wanted[name]
    else:
        assert str(error).isprintable(), "one line, whatever the server sent"


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("silent", "did not answer within 0 s: check its address and port, the cable and the firewall."),
        ("cut body", "sent something that is no whole HTTP answer: check its address and port"),
        ("reset", "is not reachable ("),
        ("wrong CRC", "is wrong: do not burn it."),
        ("HTML", "and no JSON object: is that a certtool?"),
        ("status 500", "500"),
        ("slow drip", "did not answer within 0 s: "),
        ("another product", "answered for another product or device: do not burn it."),
        ("long DeviceID", "answered for another product or device: do not burn it."),
        ("status 503 then OK", "could not record it: "),
    ],
)
def test_a_station_without_a_device_id_asks_once_since_each_request_may_take_a_certificate(
    kind: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch, 0.3 if "within" in told else 5.0, 3)
    with hostile.serve(kind) as server:
        with pytest.raises(product.CertToolError, match=re.escape(told)):
            product.Station("127.0.0.1", server.port).request(KEY, "")
        assert server.connections == 1


def test_a_station_with_a_device_id_asks_again_as_often_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch, 5.0, 3)
    with hostile.serve("cut body") as server:
        with pytest.raises(product.NoAnswer):
            product.Station("127.0.0.1", server.port).request(KEY, "MAC-0001")
        assert server.connections == 3


def test_a_station_that_reached_nobody_asks_again_also_without_a_device_id(monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch, 5.0, 3)
    tries = []

    def refused(*_: object) -> NoReturn:
        tries.append("no certificate can have been taken")
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refused)
    with pytest.raises(product.NoAnswer):
        product.Station("127.0.0.1", 1).request(KEY, "")
    assert len(tries) == 3


@pytest.mark.parametrize(
    ("message", "told"), [("\x1b[2J\n" + "x" * 9000, "?[2J?" + "x" * 195), (None, "without a reason"), (7, "7")]
)
def test_what_a_server_says_of_its_refusal_is_shown_on_one_line_of_some_length(message: object, told: str) -> None:
    with hostile.serve("plain") as server:
        refusal = {"Status": "Forbidden", "Message": message}
        server.script = lambda _server, _request: [hostile.http(json.dumps(refusal).encode(), status="403 Forbidden")]
        with pytest.raises(product.ServerRefused) as refused:
            product.Station("127.0.0.1", server.port).request(KEY, "MAC-0001")
    assert str(refused.value) == f"127.0.0.1:{server.port} refused: 403 Forbidden: {told}"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"[]", "answered 200, and no JSON object: is that a certtool?"),
        (b"<html>", "answered 200, and no JSON object: is that a certtool?"),
        (f'{{"Status": "OK", "ProductKey": "{KEY}", "DeviceID": "MAC-0001"}}'.encode(), "sent no valid DeviceName: "),
    ],
)
def test_a_station_says_what_is_wrong_with_an_answer(body: bytes, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch, 5.0, 1)
    with hostile.serve("plain") as server:
        server.script = lambda _server, _request: [hostile.http(body)]
        with pytest.raises(product.NoAnswer) as refused:
            product.Station("127.0.0.1", server.port).request(KEY, "MAC-0001")
    assert str(refused.value).startswith(f"127.0.0.1:{server.port} {told}")


def test_a_station_takes_no_answer_that_is_longer_than_any_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch, 5.0, 1)
    with hostile.serve("plain") as server:
        server.script = lambda _server, request: [
            hostile.http(json.dumps(hostile.certificate(request)).encode().ljust(2 * product.MAX_ANSWER))
        ]
        with pytest.raises(product.NoAnswer, match="no whole HTTP answer"):
            product.Station("127.0.0.1", server.port).request(KEY, "MAC-0001")


@pytest.mark.parametrize("vector", load("replies.json"), ids=name_of)
def test_a_station_takes_or_refuses_a_reply_as_every_client_must(
    vector: Vector, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch, 5.0, 1)
    with hostile.serve("plain") as server:
        reply = hostile.http(content(vector), status=f"{vector['http']} Some")
        server.script = lambda _server, _request: [reply]
        station = product.Station("127.0.0.1", server.port)
        got: Dict[str, Any] = {}
        error = None
        try:
            if vector["Action"]:
                station.report(vector["ProductKey"], vector["DeviceID"], vector["Action"] == 1)
            else:
                got = station.request(vector["ProductKey"], vector["DeviceID"] or "")
        except product.CertToolError as refusal:
            error = refusal
    if "expect" not in vector:
        assert error, got
        assert vector["error"] != "WrongCRC32" or "CRC32" in str(error)
    elif vector["Action"] == 0:
        assert {name: got.get(name, "") for name in vector["expect"]} == vector["expect"], error
    else:
        assert error is None


def test_the_secrets_are_masked_unless_they_are_asked_for(server: StartServer, certtool: RunCerttool) -> None:
    at = f"127.0.0.1:{server('--import', SAMPLE).port}"
    for flags in ([], ["--json"]):
        masked = certtool("request", KEY, "MAC-0001", "--server", at, *flags).stdout
        assert FIRST["DeviceName"] in masked
        assert FIRST["DeviceSecret"] not in masked
        assert FIRST["ProductSecret"] not in masked
        shown = certtool("request", KEY, "MAC-0001", "--server", at, "--show-secrets", *flags).stdout
        assert FIRST["DeviceSecret"] in shown
        assert FIRST["ProductSecret"] in shown


def test_the_json_is_the_servers_reply_and_what_was_reported(server: StartServer, certtool: RunCerttool) -> None:
    running = server("--import", SAMPLE)
    options = ["--server", f"127.0.0.1:{running.port}", "--json", "--show-secrets"]
    got = json.loads(certtool("request", KEY, "MAC-0001", *options).stdout)
    _, reply = running.request(KEY, "MAC-0001")
    assert got == {**reply, "Reported": None}
    assert json.loads(certtool("request", KEY, "MAC-0001", *options, "--report", "ok").stdout)["Reported"] == "ok"


@pytest.mark.parametrize(("report", "status"), [(None, "Allocated"), ("ok", "Written"), ("failed", "Failed")])
@pytest.mark.parametrize("device", ["MAC-0001", None])
def test_the_burn_is_reported_as_asked(
    report: Optional[str], status: str, device: Optional[str], store: Path, server: StartServer, certtool: RunCerttool
) -> None:
    at = f"127.0.0.1:{server('--import', SAMPLE).port}"
    identity = [device] if device else []
    options = ["--report", report] if report else []
    got = json.loads(certtool("request", KEY, *identity, "--server", at, "--json", *options).stdout)
    found = listed(certtool, store, got["DeviceName"])
    assert [(row["Status"], row["DeviceID"]) for row in found] == [(status, device or got["DeviceID"])]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_certificate_is_shown_also_where_the_report_fails(flags: List[str], certtool: RunCerttool) -> None:
    with hostile.serve("plain") as server:
        good = server.script
        server.script = lambda hostile_server, request: (
            [hostile.RESET] if request["Action"] else good(hostile_server, request)
        )
        done = certtool("request", KEY, "--server", f"127.0.0.1:{server.port}", "--report", "ok", *flags, ok=1)
    assert "made-up-by-the-server" in done.stdout
    assert "The burn is reported" not in done.stdout
    assert not flags or json.loads(done.stdout)["Reported"] is None
    assert done.stderr.count("\n") == 1


def test_a_server_that_tells_no_id_gets_the_report_for_the_one_that_was_sent(certtool: RunCerttool) -> None:
    with hostile.serve("plain") as server:
        good, asked = server.script, []

        def nameless(hostile_server: hostile.Hostile, request: Dict[str, Any]) -> Iterator[hostile.Step]:
            asked.append(request)
            for step in good(hostile_server, request):
                yield step.replace(b'"DeviceID"', b'"deviceID"') if isinstance(step, bytes) else step

        server.script = nameless
        certtool("request", KEY, "MAC-0001", "--server", f"127.0.0.1:{server.port}", "--report", "ok")
    assert [request["DeviceID"] for request in asked] == ["MAC-0001"] * 2


def test_both_forms_of_the_checksum_and_a_product_id_are_understood(server: StartServer, certtool: RunCerttool) -> None:
    at = f"127.0.0.1:{server('--import', SAMPLE, '--crc-format', 'int').port}"
    assert isinstance(json.loads(certtool("request", KEY, "D", "--server", at, "--json").stdout)["CRC32"], int)
    assert "1048577" in certtool("request", "a1SampleBt0", "D", "--server", at).stdout


def test_a_refusal_is_one_line_that_names_its_status_and_exit_1(server: StartServer, certtool: RunCerttool) -> None:
    at = f"127.0.0.1:{server('--import', SAMPLE).port}"
    done = certtool("request", "a1Unknown00", "MAC-0001", "--server", at, ok=1)
    assert done.stdout == ""
    assert "404 UnknownProduct" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_server_that_is_not_there_is_one_line_and_exit_1(certtool: RunCerttool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for server, why in ((f"127.0.0.1:{port}", "("), ("192.168..1.10:8000", "(no such host)")):
        done = certtool("request", KEY, "MAC-0001", "--server", server, ok=1)
        assert done.stdout == ""
        assert f"{server} is not reachable {why}" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [KEY],
        ["--server", "127.0.0.1:1"],
        [KEY, "--server", ""],
        [KEY, "--server", "127.0.0.1:0"],
        [KEY, "--server", "127.0.0.1:65536"],
        [KEY, "--server", "127.0.0.1:port"],
        ["", "--server", "127.0.0.1:1"],
        ["k" * 65, "--server", "127.0.0.1:1"],
        [KEY, "x" * 65, "--server", "127.0.0.1:1"],
        [KEY, "M\u00c4C", "--server", "127.0.0.1:1"],
        [KEY, " \t", "--server", "127.0.0.1:1"],
        [KEY, "", "--server", "127.0.0.1:1"],
        [KEY, "D", "--server", "127.0.0.1:1", "--report", "maybe"],
        [KEY, "D", "--server", "127.0.0.1:1", "--count", "0"],
        [KEY, "D", "--server", "127.0.0.1:1", "--count", "1", "--stations", "0"],
    ],
)
def test_a_wrong_argument_is_a_usage_error(arguments: Any, certtool: RunCerttool) -> None:
    done = certtool("request", *arguments, ok=2)
    assert done.stderr.strip()


@pytest.mark.parametrize("report", [[], ["--report", "ok"]])
def test_a_played_line_gives_every_device_a_certificate_of_its_own(
    report: Any, store: Path, server: StartServer, certtool: RunCerttool
) -> None:
    at = f"127.0.0.1:{server('--import', SAMPLE).port}"
    line = ["request", KEY, "--server", at, "--count", "10", "--stations", "4", *report]
    played = json.loads(certtool(*line, "--json").stdout)
    assert (played["answers"], played["certificates"], played["duplicates"], played["failures"]) == (10, 10, 0, {})
    assert played["rate"] > 0
    assert 0 < played["latency_ms"]["p50"] <= played["latency_ms"]["p99"] <= played["latency_ms"]["max"]
    assert played["latency_ms"]["max"] <= 1000 * played["seconds"] + 1, "no answer takes longer than the whole line"
    found = listed(certtool, store, "--product-key", KEY)
    assert {row["Status"] for row in found} == {"Written" if report else "Allocated"}
    assert len({row["DeviceID"] for row in found}) == 10


def test_a_played_line_that_runs_dry_says_how_often_and_exits_1(server: StartServer, certtool: RunCerttool) -> None:
    at = f"127.0.0.1:{server('--import', SAMPLE).port}"
    done = certtool("request", KEY, "--server", at, "--count", "13", "--stations", "2", ok=1)
    assert re.search(r"^10 answers in .*: .* a second\.$", done.stdout, re.MULTILINE), done.stdout
    latencies = "p50 X, p90 X, p99 X, max X".replace("X", r"\d+\.\d")
    assert re.search(rf"^Latency in ms: {latencies}\.$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^3 times: .*410 PoolExhausted", done.stdout, re.MULTILINE), done.stdout
    assert done.stderr == "certtool: The line did not run clean: see above.\n"
    assert "10 different certificates, 0 given to two devices." in done.stdout


def test_a_played_line_finds_a_server_that_gives_a_certificate_twice(certtool: RunCerttool) -> None:
    with hostile.serve("plain") as server:
        line = ["request", KEY, "--server", f"127.0.0.1:{server.port}", "--count", "5"]
        done = certtool(*line, "--stations", "2", "--json", ok=1)
    played = json.loads(done.stdout)
    assert (played["answers"], played["certificates"], played["duplicates"]) == (5, 1, 1)


def test_the_report_of_a_line_counts_each_certificate_that_only_two_devices_got() -> None:
    report = product.LineReport()
    report.latencies = [number / 1000 for number in range(100, 0, -1)]
    report.devices = {"lamp-0001": ["line-1"], "lamp-0002": ["line-2", "line-3"], "lamp-0003": ["line-4", "line-5"]}
    report.seconds = 2.0
    told = report.as_json()
    assert (told["certificates"], told["duplicates"], told["answers"], told["rate"]) == (3, 2, 100, 50.0)
    assert told["latency_ms"] == {"p50": 51.0, "p90": 91.0, "p99": 100.0, "max": 100.0}


def test_the_devices_of_a_played_line_are_named_as_asked_and_else_as_in_no_other_line() -> None:
    with hostile.serve("plain") as server:
        line = ["--server", f"127.0.0.1:{server.port}", "--count", "2"]
        for device_id in ([" pilot "], [], []):
            product.main(["request", KEY, *device_id, *line])
        asked = [json.loads(request)["DeviceID"] for request in server.requests]
    assert asked[:2] == ["pilot-1", "pilot-2"]
    assert len(set(asked)) == 6, "the second line would get the certificates of the first again"


def test_a_line_of_more_stations_than_the_pc_has_room_for_is_not_played(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    starts = iter(range(10))

    def scarce(thread: threading.Thread) -> None:
        if threading.current_thread() is threading.main_thread() and next(starts) == 3:
            raise RuntimeError("can't start new thread")
        start(thread)

    with hostile.serve("plain") as server, monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", scarce)
        line = ["request", KEY, "--server", f"127.0.0.1:{server.port}", "--count", "1000000", "--stations", "10"]
        assert product.main(line) == 1
    assert capsys.readouterr().err == (
        "certtool: This PC has no room for so many stations: name fewer with --stations.\n"
    )


def test_a_played_line_that_is_interrupted_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    with hostile.serve("plain") as server:
        good = server.script

        def script(hostile_server: hostile.Hostile, request: Dict[str, Any]) -> Iterable[hostile.Step]:
            if len(hostile_server.requests) == 5:
                _thread.interrupt_main()
            return good(hostile_server, request)

        server.script = script
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
        try:
            line = ["request", KEY, "--server", f"127.0.0.1:{server.port}", "--count", "1000000"]
            assert product.main([*line, "--stations", "2"]) == 1
        finally:
            signal.signal(signal.SIGINT, before)
        asked = len(server.requests)
    told = capsys.readouterr()
    assert told.out.startswith(f"{asked:,} answers in ")
    assert told.err == "certtool: Interrupted: the rest was not asked for.\n"


def test_a_played_line_that_is_interrupted_while_its_stations_start_forgets_no_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    with hostile.serve("plain") as server, monkeypatch.context() as interrupted:
        good = server.script

        def script(hostile_server: hostile.Hostile, request: Dict[str, Any]) -> Iterable[hostile.Step]:
            time.sleep(0.3)
            return good(hostile_server, request)

        def start_and_press(thread: threading.Thread) -> None:
            start(thread)
            if threading.current_thread() is threading.main_thread():
                while not server.requests:
                    time.sleep(0.01)
                raise KeyboardInterrupt

        server.script = script
        interrupted.setattr(threading.Thread, "start", start_and_press)
        line = ["request", KEY, "--server", f"127.0.0.1:{server.port}", "--count", "1000000", "--stations", "2"]
        assert product.main(line) == 1
    assert capsys.readouterr().out.startswith("1 answers in ")


def test_a_played_line_that_is_interrupted_before_its_first_request_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(_: threading.Thread) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(threading.Thread, "start", press)
        assert product.main(["request", KEY, "--server", "127.0.0.1:1", "--count", "3"]) == 1
    told = capsys.readouterr()
    assert told.out.startswith("0 answers in 0.0 s: 0 a second.\n")
    assert told.err == "certtool: Interrupted: the rest was not asked for.\n"


def test_a_defect_in_one_of_the_stations_ends_the_line_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    request = product.Station.request

    def defective(station: product.Station, product_key: str, device_id: str) -> Dict[str, Any]:
        if device_id == "d-3":
            raise MemoryError
        return request(station, product_key, device_id)

    reports: List[product.LineReport] = []
    with hostile.serve("plain") as server:
        monkeypatch.setattr(product.Station, "request", defective)
        line = (product.Station("127.0.0.1", server.port), KEY, "d", 8, 2, "")
        playing = threading.Thread(target=lambda: reports.append(product.play_line(*line)), daemon=True)
        playing.start()
        playing.join(20)
    assert [len(report.latencies) for report in reports] == [7]
    (failure,) = reports[0].failures
    assert failure.startswith("Please report: MemoryError in ")
