"""The management page as HTTP: who may ask, and what it answers. What it looks like is in test_page_browser.py."""

from __future__ import annotations

import base64
import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import re
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Generator, List, Optional, cast

import pytest

import certtool
from tests.identities import PRODUCT, rows, write
from tests.inside import Inside
from tests.pages import PageClient, link
from tests.support import SAMPLE, Server, StartServer, raw
from tests.wire import ask, post

HOSTILE = "<img src=x onerror=alert(1)>"
WIFI = "a1SampleWf0"


def journal(store: Path) -> List[Dict[str, str]]:
    """Return the events of the store's journal."""
    with open(store / "journal.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def certificates(page: PageClient, **filters: Any) -> List[Dict[str, str]]:
    """Return the first rows that pass the filters."""
    status, answer = page.ask("query", filters)
    assert status == 200, answer
    found = answer["rows"]
    assert isinstance(found, list)
    return found


# -- who may ask -------------------------------------------------------------------------------------------------------


def test_the_link_that_serve_prints_is_exchanged_for_a_cookie_and_leaves_the_address_bar(server: StartServer) -> None:
    running = server()
    response, body = running.http("GET", link(running).partition(str(running.port))[2])
    assert (response.status, body) == (303, b"")
    key = re.fullmatch(r"/#key=([\w-]{43})", str(response.getheader("Location")))
    cookie = str(response.getheader("Set-Cookie"))
    assert cookie.startswith(f"certtool-{running.port}="), "a browser does not tell the ports of this PC apart"
    assert cookie.endswith("; Path=/; HttpOnly; SameSite=Strict")
    token = link(running).partition("token=")[2]
    assert token not in cookie
    assert key
    assert key[1] not in cookie + token
    assert response.getheader("Referrer-Policy") == "no-referrer"


def test_the_link_of_a_server_on_an_address_of_ipv6_is_one_that_a_browser_opens(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = inside(0).server
    monkeypatch.setattr(certtool.CertServer, "own_address", "::1")
    assert certtool.Page(server, "me").link().startswith(f"http://[::1]:{server.server_port}/?token=")


def test_the_token_of_the_link_is_printed_once_and_shown_nowhere_else(server: StartServer, store: Path) -> None:
    running = server("--import", SAMPLE)
    page = PageClient(running)
    page.get("/?token=wrong")
    page.ask("line", {})
    running.request(WIFI, "device-1")
    running.wait_for("device-1")
    token = link(running).partition("token=")[2]
    assert running.output.count(token) == 1
    assert token not in running.errors
    assert all(token not in path.read_text("utf-8") for path in store.rglob("*") if path.is_file())
    assert token not in page.get("/")[1].decode()


@pytest.mark.parametrize("token", ["", "wrong", "%ff%00", "%F0%9F%98%80"])
def test_a_wrong_token_gets_no_cookie_and_no_key(server: StartServer, token: str) -> None:
    response, _ = server().http("GET", f"/?token={token}")
    assert response.status in (200, 303)
    assert response.getheader("Set-Cookie") is None
    assert response.getheader("Location") in (None, "/")


def test_the_page_may_load_nothing_run_nothing_else_and_be_framed_by_nobody(server: StartServer) -> None:
    response, body = server().http("GET", "/")
    assert response.status == 200
    html = body.decode()
    policy = str(response.getheader("Content-Security-Policy"))
    for part, tag in (("script-src", "script"), ("style-src", "style")):
        (source,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{part} 'sha256-{digest}'" in policy
    directives = {words.split()[0]: words.split()[1:] for words in policy.split(";")}
    assert directives["default-src"] == ["'none'"]
    assert directives["frame-ancestors"] == ["'none'"]
    assert directives["connect-src"] == ["'self'"]
    assert "unsafe" not in policy
    assert "http:" not in html.replace("http://www.w3.org/2000/svg", "")
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    assert headers.items() <= dict(response.getheaders()).items()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", html)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 200),
        ({"Cookie": None}, 403),
        ({"Cookie": "certtool-1=x"}, 403),
        ({"Cookie": "certtool-PORT=wrong"}, 403),
        ({"Cookie": "other=1; OURS; last=2"}, 200),
        ({"Certtool_Key": None}, 403),  # another user's program on this PC, which the browser told the cookie
        ({"Certtool_Key": "wrong"}, 403),
        ({"Certtool_Key": "COOKIE"}, 403),
        ({"Origin": None}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "https://HOST"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:PORT", "Origin": "http://evil.example:PORT"}, 403),
        ({"Host": "localhost:PORT"}, 403),
        ({"Host": "localhost:PORT", "Origin": "http://localhost:PORT"}, 200),
        ({"Content_Type": "text/plain"}, 400),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 400),
        ({"Content_Type": None}, 400),
        ({"Authorization": "Bearer wrong"}, 403),
    ],
)
def test_only_our_own_page_with_its_cookie_and_its_key_may_ask(
    server: StartServer, store: Path, changes: Dict[str, Optional[str]], status: int
) -> None:
    running = server("--import", SAMPLE)
    page = PageClient(running)
    name = certificates(page, product_key=WIFI)[0]["DeviceName"]
    before = journal(store)
    words = {"PORT": str(running.port), "HOST": page.host, "OURS": page.cookie}
    words["COOKIE"] = page.cookie.partition("=")[2]
    filled = changes
    for word, meant in words.items():
        filled = {key: value and value.replace(word, meant) for key, value in filled.items()}
    for operation in ("line", "query", "certificate", "reveal", "release", "void"):
        fields = {"product_key": WIFI, "device_name": name, "reason": "test"}
        got, answer = page.ask(operation, fields, **filled)
        if status != 200:
            assert (got, set(answer)) == (status, {"Status", "Message"})
        else:
            assert got == (409 if operation == "release" else 200), answer
    assert (journal(store) == before) == (status != 200)


def test_a_file_is_taken_only_as_the_page_sends_it_and_nothing_of_an_answer_is_kept_by_the_browser(
    server: StartServer,
) -> None:
    running = server()
    page = PageClient(running)
    data = SAMPLE.read_bytes()
    body = json.dumps({"options": {}, "files": [["sample.csv", len(data)]]}).encode() + b"\n" + data
    for kind in ("application/json", "text/plain", None):  # a form of another page can send the latter two
        assert running.post(body, "/certtool/import", headers=page.headers(Content_Type=kind))[0] == 400
    assert certificates(page) == []
    assert page.upload("sample.csv", data)[0] == 200
    name = certificates(page, product_key=WIFI)[0]["DeviceName"]
    asked = json.dumps({"product_key": WIFI, "device_name": name}).encode()
    for operation in ("line", "query", "certificate", "reveal"):
        response, _ = running.http("POST", f"/certtool/{operation}", asked, page.headers())
        assert (response.status, response.getheader("Cache-Control")) == (200, "no-store"), operation


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Cookie": None}, 403),
    ],
)
def test_the_download_is_for_our_own_page_only(
    server: StartServer, headers: Dict[str, Optional[str]], status: int
) -> None:
    assert PageClient(server("--import", SAMPLE)).get("/certtool/export", **headers)[0] == status


def test_a_rebinding_host_name_does_not_even_get_the_page(server: StartServer) -> None:
    running = server()
    for path in ("/", "/?token=x", "/certtool/export"):
        response, body = running.http("GET", path, headers={"Host": f"evil.example:{running.port}"})
        assert response.status == 403
        assert json.loads(body)["Status"] == "Forbidden"


def test_an_unknown_path_is_not_found_and_other_methods_are_refused(server: StartServer) -> None:
    running = server()
    page = PageClient(running)
    assert page.get("/favicon.ico")[0] == 404
    assert page.ask("nonsense", {})[0] == 400
    assert raw(running.port, b"OPTIONS /certtool/line HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").startswith(b"HTTP/1.1 501")


def test_no_page_turns_all_of_it_off_and_the_protocol_goes_on(server: StartServer) -> None:
    running = server("--no-page", "--import", SAMPLE)
    assert "token" not in running.output
    response, body = running.http("GET", "/")
    assert response.status == 501
    assert json.loads(body)["Status"] == "BadRequest"
    assert running.post({}, "/certtool/line")[0] == 403
    assert running.request(WIFI, "device-1")[0] == 200


def test_the_page_is_there_where_only_other_stations_are_allowed(server: StartServer) -> None:
    running = server("--import", SAMPLE, "--allow", "192.0.2.0/24")
    assert PageClient(running).ask("line", {})[0] == 200
    assert running.request(WIFI, "device-1")[0] == 403


# -- what it answers ---------------------------------------------------------------------------------------------------


def test_the_line_shows_stock_rates_stations_and_events(server: StartServer) -> None:
    running = server("--import", SAMPLE)
    page = PageClient(running)
    for number in range(4):
        running.request(WIFI, f"device-{number}")
    running.report(WIFI, "device-0", 1)
    running.report(WIFI, "device-1", 2)
    running.request("unknown", "device-9")
    _, line = page.ask("line", {})
    wifi = next(product for product in line["products"] if product["key"] == WIFI)
    assert wifi["counts"] == [6, 2, 1, 1, 0]
    assert wifi["low"] is True
    assert 0 < wifi["hours_left"] < 6 / 4
    assert {"product": WIFI, "batch": "sample", "counts": [6, 2, 1, 1, 0]} in line["stocks"]
    assert (line["shift"]["written"], line["shift"]["failed"]) == (1, 1)
    assert (line["hours"][-1]["written"], line["hours"][-1]["failed"], len(line["hours"])) == (1, 1, 12)
    ((station, _, *counts),) = line["stations"]
    assert (station, counts) == ("127.0.0.1", [4, 1, 1, 1])
    assert [event[2] for event in line["feed"][:3]] == ["refused: UnknownProduct", "Failed", "Written"]
    assert (line["problem"], line["importing"]) == ("", None)


def test_the_events_say_why_what_a_person_wanted_was_refused(server: StartServer) -> None:
    page = PageClient(server("--import", SAMPLE))
    with open(SAMPLE, newline="", encoding="utf-8") as file:
        name = next(csv.DictReader(file))["DeviceName"]
    page.ask("release", {"product_key": WIFI, "device_name": name, "reason": "board scrapped"})
    assert page.ask("line", {})[1]["feed"][0][2] == "refused: It is not allocated: there is nothing to release."


def test_made_up_products_of_refused_requests_hide_no_station_and_no_forecast(server: StartServer) -> None:
    running = server("--import", SAMPLE)
    made_up = b"".join(ask("device-9", product=f"made up {number}") for number in range(certtool.MAX_SUMS))
    assert raw(running.port, made_up, shutdown=True).count(b"UnknownProduct") == certtool.MAX_SUMS
    for number in range(4):
        running.request(WIFI, f"device-{number}")
    _, line = PageClient(running).ask("line", {})
    assert line["products"][0]["hours_left"]
    assert [station[2:] for station in line["stations"]] == [[4, 0, 0, certtool.MAX_SUMS]]


def test_a_shift_that_is_over_counts_no_more_for_a_station_either() -> None:
    activity = certtool.Activity()
    friday = 500_000 * certtool.HOUR
    for station, at in (("192.0.2.7", friday), ("192.0.2.8", friday + 8 * certtool.HOUR)):
        for action, result in (("request", "allocated"), ("burned", "Written")):
            activity.add([certtool.RequestEvent(at, station, action, "device", "name", result, PRODUCT)])
    evening = friday + 8 * certtool.HOUR
    assert activity.snapshot([], evening)["stations"] == [
        ["192.0.2.8", evening, 1, 1, 0, 0],
        ["192.0.2.7", friday, 1, 1, 0, 0],
    ]
    assert activity.snapshot([], friday + 12 * certtool.HOUR)["stations"] == [["192.0.2.8", evening, 1, 1, 0, 0]]
    assert activity.snapshot([], friday + 72 * certtool.HOUR)["stations"] == []


def happened(at: int, result: str = "allocated", station: str = "192.0.2.7", **more: str) -> certtool.RequestEvent:
    """What the server tells the page of a request."""
    action = {"Written": "burned", "Failed": "failed"}.get(result, "request")
    return certtool.RequestEvent(at, station, more.get("action", action), "device", "name", result, PRODUCT)


NOON = 500_000 * certtool.HOUR


def test_only_what_a_station_did_counts_and_each_of_many_at_once() -> None:
    activity = certtool.Activity()
    activity.add([happened(NOON)] * 5 + [happened(NOON, "Written")] * 3 + [happened(NOON, "Failed")] * 2)
    activity.add([happened(NOON, "same again"), happened(NOON, "same again, is Written")])
    activity.add([happened(NOON, "refused: PoolExhausted")] * 4)
    activity.add([happened(NOON, "voided", "127.0.0.1", action="void"), happened(NOON, "The disk is full.", "")])
    shown = activity.snapshot([], NOON)
    assert shown["stations"] == [["192.0.2.7", NOON, 5, 3, 2, 4]]
    assert shown["hours"][-1] == {"start": NOON, "written": 3, "failed": 2}
    assert [line[2] for line in shown["feed"][:3]] == ["The disk is full.", "voided", "refused: PoolExhausted"]


def test_the_shift_is_twelve_hours_long_and_its_present_rate_is_of_the_last_quarter() -> None:
    activity = certtool.Activity()
    first, early = NOON - 12 * certtool.HOUR, NOON - 11 * certtool.HOUR
    for at in (first, early, NOON - 15 * certtool.MINUTE, NOON - 14 * certtool.MINUTE, NOON):
        activity.add([happened(at, "Written"), happened(at, "Failed")])
        activity.count()
    shown = activity.snapshot([], NOON)
    assert [hour["start"] for hour in shown["hours"]] == [early + hour * certtool.HOUR for hour in range(12)]
    assert (shown["shift"]["written"], shown["shift"]["failed"]) == (4, 4)
    assert shown["shift"]["rate"] == pytest.approx(2 / (14 / 60))
    for other in (NOON + certtool.HOUR, NOON - certtool.HOUR):  # nothing in the last quarter, and a clock set back
        assert activity.snapshot([], other)["shift"]["rate"] == 0


def test_a_first_minute_makes_no_rate_that_nobody_could_burn_at() -> None:
    activity = certtool.Activity()
    activity.add([happened(NOON, "Written")])
    assert activity.snapshot([], NOON + 1)["shift"]["rate"] == 60


def test_the_forecast_is_that_of_the_stock_that_runs_out_first_and_not_of_one_that_has() -> None:
    activity = certtool.Activity()
    stocks = []
    for key, taken, left in (("quick", 6, 60), ("slow", 3, 60), ("still", 0, 10), ("ended", 9, 0)):
        product = certtool.Product(key)
        product.counts[0] = left
        product.put(range(left))
        product.low = 60
        stocks.append(product)
        activity.add([happened(NOON)._replace(product_key=key)] * taken)
    shown = activity.snapshot(stocks, NOON + 6 * certtool.MINUTE)
    assert [row["low"] for row in shown["products"]] == [False, False, True, True]
    assert [row["hours_left"] for row in shown["products"]] == [pytest.approx(1), pytest.approx(2), None, 0]
    assert shown["shift"]["hours_left"] == pytest.approx(1)


def test_a_station_is_shown_from_its_first_request_in_an_hour_on() -> None:
    activity = certtool.Activity()
    for hour in range(3):
        activity.add([happened(NOON + hour * certtool.HOUR, station=f"192.0.2.{hour}")])
        shown = activity.snapshot([], NOON + hour * certtool.HOUR)["stations"]
        assert [station[0] for station in shown] == [f"192.0.2.{number}" for number in range(hour, -1, -1)]


def test_what_the_page_keeps_of_the_past_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certtool, "MAX_SUMS", 3)
    monkeypatch.setattr(certtool, "STATIONS_SHOWN", 5)
    activity = certtool.Activity()
    for hour in range(100):
        for number in range(10):
            activity.add([happened(NOON + hour * certtool.HOUR, station=f"{hour}-{number}")])
        activity.count()
    assert len(activity.hours) == 12
    assert len(activity.minutes) == 1
    assert len(activity.seen) <= 12 * 10
    assert len(activity.snapshot([], NOON + 99 * certtool.HOUR)["stations"]) == 5
    assert {len(counts) for counts in activity.hours.values()} == {4}
    assert len(activity.events) == certtool.FEED_LENGTH
    last = activity.hours[NOON // certtool.HOUR + 99]
    assert sum(map(sum, last.values())) == 10, "the rest is counted together"
    activity.add([happened(NOON + 99 * certtool.HOUR, station="99-0")])
    activity.count()
    assert last[PRODUCT, "99-0"] == [2, 0, 0, 0]


def test_a_client_with_very_many_addresses_takes_no_more_memory_and_hides_no_station_that_asks_on() -> None:
    activity = certtool.Activity()
    for number in range(5000):
        if number % 500 == 0:
            activity.add([happened(NOON + number, station="192.0.2.7")])
        activity.add([happened(NOON + number, "refused: BadRequest", f"2001:db8::{number:x}")])
        if number % 500 == 499:
            activity.count()
            assert "192.0.2.7" in activity.seen
    assert len(activity.seen) == certtool.MAX_SEEN
    assert activity.seen["2001:db8::1387"] == NOON + 4999
    assert activity.seen["192.0.2.7"] == NOON + 4500


def test_a_program_that_asks_for_the_page_many_times_and_reads_nothing_costs_little_memory(
    inside: Callable[..., Inside],
) -> None:
    server = inside(1)
    server.server.site = certtool.Page(server.server, "operator")
    page = len(server.server.site._html)
    asked = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with socket.socket() as client:
        for end in (client, server.server.socket):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        client.connect(("127.0.0.1", server.server.server_port))
        client.settimeout(0)
        client.send(asked * 30)
        server.turn(40)
        [handler] = server.server.connections
        assert page / 2 < len(handler.unsent) < certtool.MAX_UNSENT + page + 2000
        received = server.receive(client, 1)
        while received.count(b"HTTP/1.1 200 OK") < 30 or not received.endswith(b"</html>"):
            received += server.receive(client, 1)


def test_events_are_counted_also_while_no_page_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certtool, "COUNTED_TOGETHER", 3)
    activity = certtool.Activity()
    for _ in range(4):
        activity.add([happened(NOON)])
    assert len(activity._uncounted) < 3, "which would else take memory without end"


def test_what_was_there_before_a_start_is_added_to_what_came_since(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certtool, "RECOVERY_SLICE", 2)
    server = inside()
    for number in range(5):
        server.say(ask(f"device-{number}"))
    now = certtool._now()
    activity = certtool.Activity()
    activity.add([happened(now + 1, station="127.0.0.1")])
    activity.count()
    for _ in activity.recover(server.store, now):
        pass
    shown = activity.snapshot([], now)
    assert shown["stations"] == [["127.0.0.1", now + 1, 6, 0, 0, 0]]
    assert [line[3] for line in shown["feed"]] == ["device", *(f"device-{number}" for number in range(4, -1, -1))]
    activity.add([happened(now)] * certtool.FEED_LENGTH)
    assert len(activity.events) == certtool.FEED_LENGTH
    for clock in (now + 13 * certtool.HOUR, now - certtool.HOUR):  # long over, or of a clock that was set back
        later = certtool.Activity()
        for _ in later.recover(server.store, clock):
            pass
        assert (later.hours, later.minutes, later.seen, list(later.events)) == ({}, {}, {}, [])


def test_after_a_restart_the_line_still_shows_the_shift(server: StartServer) -> None:
    running = server("--import", SAMPLE)
    for number in range(4):
        running.request(WIFI, f"device-{number}")
        running.report(WIFI, f"device-{number}", 1)
    running.stop()
    page = PageClient(server())
    _, line = page.ask("line", {})
    while not line["feed"]:
        _, line = page.ask("line", {})
    assert line["shift"]["written"] == 4
    assert [station[2:] for station in line["stations"]] == [[4, 4, 0, 0]]
    assert line["products"][0]["counts"] == [6, 0, 4, 0, 0]


def test_a_query_finds_a_certificate_by_its_name_or_by_its_device(server: StartServer) -> None:
    running = server("--import", SAMPLE)
    page = PageClient(running)
    name = running.request(WIFI, "A0:B1")[1]["DeviceName"]
    for text in (name, "A0:B1"):
        (row,) = certificates(page, text=text, status="Void", start=7)
        assert (row["DeviceName"], row["DeviceID"], row["Status"]) == (name, "A0:B1", "Allocated")
        assert set(row) == set(certtool.QUERY_COLUMNS)
    assert certificates(page, text="nobody") == []


def test_paging_shows_every_certificate_that_passes_the_filters_once(server: StartServer, tmp_path: Path) -> None:
    first = write(tmp_path / "first.csv", 130)
    second = write(tmp_path / "second.csv", 7, "a1OtherPk00")
    running = server("--import", first, "--import", second, "--import", SAMPLE)
    page = PageClient(running)
    for number in range(60):
        running.request(PRODUCT, f"device-{number}")

    def pages(**filters: str) -> List[str]:
        names: List[str] = []
        start: Optional[int] = 0
        while start is not None:
            _, answer = page.ask("query", {**filters, "start": start})
            names += [row["DeviceName"] for row in answer["rows"]]
            start = answer["next"]
        assert answer["total"] == len(names)
        return names

    made_up = [row.device_name for row in rows(130)]
    assert pages(product_key=PRODUCT) == pages(batch="first") == made_up
    assert pages(batch="first", status="Allocated") == made_up[:60]
    assert pages(product_key=PRODUCT, status="Unallocated") == made_up[60:]
    assert len(pages()) == 157
    assert len(pages(batch="second")) == 7
    assert len(pages(batch="sample", product_key=WIFI)) == 10
    assert pages(batch="first", product_key=WIFI) == pages(status="Void") == []


@pytest.mark.parametrize(
    "fields", [{"start": -1}, {"start": "x"}, {"status": ["Void"]}, {"product_key": {}}, {"text": ["x"]}]
)
def test_a_query_that_makes_no_sense_harms_nothing(server: StartServer, fields: Dict[str, Any]) -> None:
    running = server("--import", SAMPLE)
    status, answer = PageClient(running).ask("query", fields)
    assert status == 200, answer
    assert "Please report" not in running.output


def test_the_details_tell_the_whole_history_of_a_certificate(server: StartServer) -> None:
    running = server("--import", SAMPLE)
    page = PageClient(running)
    name = running.request(WIFI, "device-1")[1]["DeviceName"]
    running.request(WIFI, "device-2")
    running.report(WIFI, "device-1", 2)
    fields = {"product_key": WIFI, "device_name": name}
    assert page.ask("release", {**fields, "reason": "board broken"})[0] == 200
    assert page.ask("void", {**fields, "reason": "label lost"})[0] == 200
    _, answer = page.ask("certificate", fields)
    assert [event["kind"] for event in answer["history"]] == ["import", "allocate", "failed", "release", "void"]
    assert answer["history"][1]["device_id"] == answer["history"][2]["device_id"] == "device-1"
    assert [event["reason"] for event in answer["history"][3:]] == ["board broken", "label lost"]
    assert answer["history"][4]["who"].endswith(" (page)")
    assert answer["row"]["Status"] == "Void"
    assert page.ask("certificate", {"product_key": WIFI, "device_name": "nobody"})[0] == 409


def test_a_history_of_very_many_events_tells_the_first_the_latest_and_all_that_a_person_did(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certtool, "FIRST_SHOWN", 3)
    monkeypatch.setattr(certtool, "LATEST_SHOWN", 4)
    server = inside(1)
    service = server.server.service
    name = service.request(PRODUCT, "a device", "station", 1).certificate.credential.device_name
    for moment in range(2, 500):
        service.report(PRODUCT, "a device", 1 + moment % 2, "station", moment)
        if moment == 250:
            service.operate(certtool.RELEASE, name, PRODUCT, "scrap", "a person", True, moment)
            service.request(PRODUCT, "a device", "station", moment)
    service.commit()
    page = certtool.Page(server.server, "who")
    answers: List[bytes] = []
    handler = cast("certtool.CertRequestHandler", SimpleNamespace(reply=lambda _, body, **__: answers.append(body)))
    steps = sum(1 for _ in page._certificate(handler, name, PRODUCT))
    answer = json.loads(answers[0])
    kinds = [event["kind"] for event in answer["history"]]
    assert kinds == ["import", "allocate", "written", "release", "written", "failed", "written", "failed"]
    assert (answer["Status"], answer["left_out"]) == ("OK", 502 - len(kinds))
    assert answer["history"][-1]["time"] == certtool.format_time(499)
    assert steps > 500 / certtool.RECOVERY_SLICE, "nor is the line held up by all of them at once"


def test_hundreds_that_ask_for_the_page_at_once_get_it_a_part_in_each_turn_and_a_device_waits_for_none(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certtool, "MAX_GETS", 2)
    monkeypatch.setattr(certtool, "TURN_SECONDS", 100.0)
    monkeypatch.setattr(certtool, "GATHER_SECONDS", 100.0)
    server = inside(1)
    certtool.Page(server.server, "who")
    get = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with contextlib.ExitStack() as clients:
        for _ in range(60):
            clients.enter_context(server.connect())
        server.turn()
        hostile = list(server.server.connections)
        device = clients.enter_context(server.connect())
        server.turn()
        for handler in hostile:
            handler.buffer = get * 5
            handler.more = True
            server.server.again.append(handler)
        device.send(ask("a device"))
        server.server.turn(0)
        assert server.server.gets <= 3 * certtool.MAX_GETS
        assert device.recv(1000)[:12] == b"HTTP/1.1 200", "a device is not behind them"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows moves no file in use")
def test_a_history_that_cannot_be_read_is_no_defect_to_report(server: StartServer, store: Path) -> None:
    running = server("--import", SAMPLE)
    page = PageClient(running)
    fields = {"product_key": WIFI, "device_name": running.request(WIFI, "device-1")[1]["DeviceName"]}
    (store / "journal.csv").rename(store / "elsewhere.csv")
    told = "journal.csv cannot be read (No such file or directory): check the store's disk."
    assert page.ask("certificate", fields) == (503, {"Status": "StoreUnavailable", "Message": told})


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/mem, which can be opened and not be read")
def test_nor_is_a_history_on_a_bad_spot_of_the_disk(inside: Callable[..., Inside]) -> None:
    server = inside(1)
    given = server.server.service.request(PRODUCT, "device", "station", certtool._now())
    name = given.certificate.credential.device_name
    server.server.service.commit()
    server.journal.rename(server.journal.with_name("elsewhere.csv"))
    server.journal.symlink_to("/proc/self/mem")
    page = certtool.Page(server.server, "who")
    server.turn()
    told = "journal.csv cannot be read (Input/output error): check the store's disk."
    assert server.notices[-1:] == [told]
    with pytest.raises(certtool.StoreUnavailable, match=re.escape(told)):
        list(page._certificate(cast("certtool.CertRequestHandler", None), name, PRODUCT))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows moves no file in use")
def test_a_start_that_cannot_look_back_tells_why_the_shift_begins_with_it(inside: Callable[..., Inside]) -> None:
    server = inside(1)
    server.server.service.request(PRODUCT, "before the start", "station", certtool._now())
    server.server.service.commit()
    elsewhere = server.journal.with_name("elsewhere.csv")
    server.journal.rename(elsewhere)  # as where another program holds it for a moment
    certtool.Page(server.server, "who")
    server.turn()
    elsewhere.rename(server.journal)
    told = "journal.csv cannot be read (No such file or directory): check the store's disk."
    assert server.notices[-1:] == [told]
    assert not server.server.jobs


def test_the_details_of_a_certificate_tell_nothing_of_one_that_another_product_has_by_that_name(
    server: StartServer,
) -> None:
    page = PageClient(server())
    for batch, key, names in (("1", "a1First", "AB"), ("2", "a1Second", "AB"), ("3", "a1Third", "AB")):
        text = "ProductKey,DeviceName,DeviceSecret\n" + "".join(f"{key},lamp-{name},{key}{name}\n" for name in names)
        assert page.upload(f"{batch}.csv", text.encode())[1]["Report"]["imported"] == 2
        for name in names:
            page.server.request(key, f"{key} {name}")
    times = set()
    for key in ("a1First", "a1Second", "a1Third"):
        for name in "AB":
            _, answer = page.ask("certificate", {"product_key": key, "device_name": f"lamp-{name}"})
            imported, given = answer["history"]
            assert (imported["kind"], given["kind"], given["device_id"]) == ("import", "allocate", f"{key} {name}")
            times.add((key, imported["time"]))
    assert len(times) == 3, "both of a file tell of its import alone"


def test_a_written_certificate_is_released_only_on_purpose_and_never_without_a_reason(server: StartServer) -> None:
    running = server("--import", SAMPLE)
    page = PageClient(running)
    fields = {"product_key": WIFI, "device_name": running.request(WIFI, "device-1")[1]["DeviceName"]}
    running.report(WIFI, "device-1", 1)
    assert page.ask("release", {**fields, "reason": "scrap"})[0] == 409
    assert page.ask("release", {**fields, "reason": " ", "force": True})[0] == 409
    status, answer = page.ask("release", {**fields, "reason": "scrap", "force": True})
    assert (status, answer["Status"]) == (200, "OK")


def test_every_look_at_a_secret_is_recorded_and_survives_a_restart(server: StartServer, store: Path) -> None:
    running = server("--import", SAMPLE)
    page = PageClient(running)
    (row,) = certificates(page, text=running.request(WIFI, "device-1")[1]["DeviceName"])
    fields = {"product_key": WIFI, "device_name": row["DeviceName"]}
    _, answer = page.ask("reveal", fields)
    secret = answer["Secrets"]["DeviceSecret"]
    assert secret == running.request(WIFI, "device-1")[1]["DeviceSecret"]
    event = journal(store)[-1]
    assert (event["Event"], event["ProductKey"], event["DeviceName"]) == ("reveal", WIFI, row["DeviceName"])
    assert json.loads(event["Detail"])["who"].endswith(" (page)")
    assert secret not in (store / "journal.csv").read_text("utf-8")
    free = certificates(page, product_key=WIFI, status="Unallocated")[0]["DeviceName"]
    page.ask("reveal", {"product_key": WIFI, "device_name": free})
    running.stop()
    again = server()
    after = [again.request(WIFI, f"other-{number}") for number in range(10)]
    assert [status for status, _ in after] == [200] * 9 + [410]
    assert len({answer["DeviceName"] for status, answer in after if status == 200}) == 9
    _, answer = PageClient(again).ask("certificate", fields)
    assert [event["kind"] for event in answer["history"]] == ["import", "allocate", "reveal"]


def test_no_secret_is_shown_where_the_look_cannot_be_recorded(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    server = inside(1)
    server.server.site = certtool.Page(server.server, "me")
    [credential] = rows(1)
    fields = {"product_key": PRODUCT, "device_name": credential.device_name}
    reveal = post(fields, f"Authorization: Bearer {server.server.token}", path="/certtool/reveal")
    reveal = reveal.replace(b"Host: 192.168.1.10", b"Host: localhost")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        status, answer = server.say(reveal)
        assert (status, answer["Status"]) == (503, "StoreUnavailable")
        assert credential.device_secret not in str(answer)
    assert server.say(reveal)[1]["Secrets"]["DeviceSecret"] == credential.device_secret


def test_no_secret_is_in_any_answer_but_a_reveal(server: StartServer) -> None:
    running = server("--import", SAMPLE)
    page = PageClient(running)
    with open(SAMPLE, newline="", encoding="utf-8") as file:
        secrets = [row["DeviceSecret"] for row in csv.DictReader(file)]
    name = running.request(WIFI, "device-1")[1]["DeviceName"]
    told = [page.get("/")[1], page.get("/certtool/export")[1]]
    for operation, fields in (("line", {}), ("query", {}), ("certificate", {"product_key": WIFI, "device_name": name})):
        told.append(json.dumps(page.ask(operation, fields)).encode())
    assert not any(secret.encode() in text for secret in secrets for text in told)


def test_the_download_has_what_is_filtered_and_no_spreadsheet_runs_it(server: StartServer, tmp_path: Path) -> None:
    file = write(tmp_path / "file.csv", 250)
    running = server("--import", SAMPLE)
    page = PageClient(running)
    assert page.upload("x.csv", file.read_bytes(), batch="=cmd|' /C calc'!A0")[1]["Report"]["imported"] == 250
    formulas = ["=cmd|' /C calc'!A0", "+1+1", "-2", "@SUM(A1)", HOSTILE]
    for formula in formulas:
        assert running.request(PRODUCT, formula)[0] == 200
    status, body = page.get("/certtool/export?product_key=" + PRODUCT)
    text = body.decode("utf-8-sig")
    assert (status, text == body.decode()) == (200, False), "the mark tells a spreadsheet that it is UTF-8"
    assert text.splitlines()[0].split(",") == list(certtool.QUERY_COLUMNS), "and no secret"
    assert {len(row) for row in csv.reader(io.StringIO(text))} == {len(certtool.QUERY_COLUMNS)}
    table = list(csv.DictReader(io.StringIO(text)))
    assert [row["DeviceName"] for row in table] == [row.device_name for row in rows(250)]
    assert [row["DeviceID"].lstrip("'") for row in table[:5]] == formulas
    assert not [cell for row in csv.reader(io.StringIO(text)) for cell in row if cell[:1] in tuple("=+-@")]
    _, body = page.get("/certtool/export?status=Allocated")
    assert len(body.splitlines()) == 6
    get = f"GET /certtool/export HTTP/1.1\r\nHost: {page.host}\r\nCookie: {page.cookie}\r\nConnection: close\r\n\r\n"
    assert raw(running.port, get.encode()).endswith(b"\r\n0\r\n\r\n"), "and the connection is closed as it was asked"


def test_a_download_that_is_broken_off_ends_its_work_and_the_line_goes_on(server: StartServer, tmp_path: Path) -> None:
    running = server("--import", write(tmp_path / "file.csv", 20_000))
    page = PageClient(running)
    request = "GET /certtool/export HTTP/1.1\r\n" + "".join(
        f"{name}: {value}\r\n" for name, value in {**page.headers(), "Host": page.host}.items()
    )
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.sendall(request.encode() + b"\r\n")
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
    assert running.request(PRODUCT, "device-1")[0] == 200
    assert page.get("/certtool/export?status=Allocated")[1].count(b"\n") == 2


def test_work_goes_on_beside_downloads_that_nobody_takes(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(name: str) -> Generator[None, None, None]:
        for _ in range(3):
            done.append(name)
            yield

    done: List[str] = []
    server = inside(10)
    monkeypatch.setattr(certtool.Job, "can_go_on", lambda job: job.name == "recover")
    for name in ("export", "export", "recover", "export"):
        server.server.start_job(name, work(name), None)
    server.turn(5)
    assert done == ["recover"] * 3
    assert [job.name for job in server.server.jobs] == ["export"] * 3
    assert server.say(ask("A"))[0] == 200


def test_a_dry_run_on_the_page_shows_each_bad_row_and_changes_nothing(server: StartServer, store: Path) -> None:
    running = server()
    page = PageClient(running)
    data = b"DeviceName,DeviceSecret\nlamp-0001,9f2c51d07be34a68\nlamp-0002,1.23E+15\nlamp 0003,5b0de1f2a9c84736\n"
    before = journal(store)
    status, answer = page.upload("lamps.csv", data, dry_run=True, product_key="a1Lamp")
    report = answer["Report"]
    assert status == 200
    assert (report["read"], report["rejected"], report["ok"]) == (3, 2, False)
    assert [error["line"] for error in report["errors"]] == [3, 4]
    assert journal(store) == before
    status, answer = page.upload("lamps.csv", data, product_key="a1Lamp", skip_bad=True)
    assert answer["Report"]["imported"] == 1
    assert json.loads(journal(store)[-1]["Detail"])["who"].endswith(" (page)")
    assert page.upload("lamps.csv", data, nonsense=1)[0] == 400


def test_the_page_sees_how_far_an_import_is_and_devices_are_served_meanwhile(
    server: StartServer, tmp_path: Path
) -> None:
    running = server("--import", SAMPLE)
    page = PageClient(running)
    data = write(tmp_path / "big.csv", 900_000).read_bytes()  # figures are a second old
    seen = set()
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(page.upload, "big.csv", data, batch="big")
        while not upload.done():
            assert running.request(WIFI, "device-1")[0] == 200
            seen.add(page.ask("line", {})[1]["importing"])
    assert upload.result()[1]["Report"]["imported"] == 900_000
    assert seen - {None, 0}
    assert page.upload("big.csv", data, batch="big")[1]["Report"]["duplicates"] == 900_000


def test_open_hands_the_link_to_the_browser_and_to_nobody_else(
    server: StartServer, store: Path, tmp_path: Path
) -> None:
    server().stop()
    if os.name == "posix":
        (tmp_path / "mine.txt").write_text("mine")
        (store / "open-page.html").symlink_to(tmp_path / "mine.txt")
    seen = tmp_path / "seen"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$@" > {seen}\n')
    browser.chmod(0o700)
    running: Server = server("--open", env={"BROWSER": f"{browser} %s"})
    for _ in range(100):
        if seen.exists() and seen.read_text():
            break
        threading.Event().wait(0.05)
    arguments = seen.read_text().strip()
    assert arguments == (store / "open-page.html").as_uri(), "any user of the PC sees a command line"
    assert f'url={link(running)}"' in (store / "open-page.html").read_text()
    assert (store / "open-page.html").stat().st_mode & 0o077 == 0
    running.stop()
    assert not (store / "open-page.html").exists()
    assert os.name != "posix" or (tmp_path / "mine.txt").read_text() == "mine"


def test_open_without_room_for_its_file_says_so_and_serves(server: StartServer, store: Path) -> None:
    (store / "open-page.html").mkdir(parents=True)
    running = server("--open", "--import", SAMPLE)
    assert running.request(WIFI, "A0B1")[0] == 200
    running.stop()
    assert "The browser was not opened (Is a directory): open the link." in running.errors


class Downloader:
    """Takes what a job streams to it, and counts the pieces."""

    unsent = b""
    keep_alive = True

    def __init__(self) -> None:
        self.pieces: List[bytes] = []

    def stream(self, data: bytes, last: bool = False) -> None:  # noqa: ARG002
        """Take a piece."""
        self.pieces.append(data)


def test_a_download_that_finds_nothing_looks_through_a_large_store_in_steps(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certtool, "SELECT_SLICE", 10)
    server = inside(100)
    taker = Downloader()
    steps = list(certtool.Page(server.server, "me")._export(taker, {"status": "Void"}))  # type: ignore[arg-type]
    assert len(steps) >= 10
    assert len(taker.pieces) == 2, "the header line, and the end"


def test_the_journal_is_looked_back_into_whatever_the_size_of_a_step(
    store: Path, monkeypatch: pytest.MonkeyPatch, server: StartServer
) -> None:
    running = server("--import", SAMPLE)
    names = [running.request(WIFI, f"device-{number}")[1]["DeviceName"] for number in range(5)]
    running.stop()
    opened = certtool.Store(str(store))
    opened.load(certtool.State())
    size = (store / "journal.csv").stat().st_size
    for step in (1, 7, 100, 1000, size):
        monkeypatch.setattr(certtool, "LOOK_BACK_BYTES", step)
        found = [event.device_name for event in opened.look_back([b",allocate,"]) if event]
        assert found == names
        for within in range(0, size, 97):
            found = [event.device_name for event in opened.look_back([b",allocate,"], within) if event]
            assert found == names[len(names) - len(found) :]
    opened.close()
