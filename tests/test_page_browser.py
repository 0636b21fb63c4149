"""The management page in a real browser: a shift's work by clicking and typing, and what must never happen there."""

from __future__ import annotations

import contextlib
import csv
import http.server
import io
import json
import re
import secrets
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Tuple

import playwright.sync_api as playwright
import pytest

import certtool
from tests.firefox import Firefox
from tests.identities import PRODUCT, write
from tests.pages import PageClient, link
from tests.support import ROOT, SAMPLE, Server, StartServer, missing, need, npm_package

pytestmark = pytest.mark.usefixtures("fast")

AXE = "4.10.2"
SIZES = {"pc": (1366, 768), "phone": (390, 844)}
LANGUAGES = ("en-US", "zh-CN")
SHOTS = ROOT / "tests" / "screenshots"
WIFI = "a1SampleWf0"
IMAGE = "<img src=x onerror=document.title='broken'>"
VIEWS = ("line", "add", "query")
LAMPS = "DeviceName,DeviceSecret\nlamp-0001,9f2c51d07be34a68\nlamp-0002,1.23E+15\nlamp 0003,5b0de1f2a9c84736\n"

BROWSER_OPTIONS = ["--no-sandbox", "--host-resolver-rules=MAP rebound.example 127.0.0.1"]

Open = Callable[..., Any]


def until(page: Any, expression: str, arg: object = None, seconds: float = 15) -> None:
    """Wait for a truth in the page; its own policy forbids Playwright to wait inside of it."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression, arg):
        assert time.monotonic() < end, expression
        time.sleep(0.02)


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core, got with npm once."""
    return (npm_package("axe-core", AXE) / "axe.min.js").read_text("utf-8")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A running browser."""
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=need("chromium"), args=BROWSER_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Open]:
    """Open the page of a server as an operator does; fail on an error of its script or a request elsewhere."""
    faults: List[str] = []
    with contextlib.ExitStack() as contexts:

        def start(server: Server, size: str = "pc", locale: str = "en-US", scheme: str = "light") -> Any:
            width, height = SIZES[size]
            context = chromium.new_context(
                viewport={"width": width, "height": height}, locale=locale, color_scheme=scheme, accept_downloads=True
            )
            contexts.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(15_000)

            def seen(request: Any) -> None:
                if not request.url.startswith((f"http://127.0.0.1:{server.port}/", "data:,")):
                    faults.append(f"request to {request.url}")

            def said(message: Any) -> None:
                if message.type in ("error", "warning") and "ERR_CONNECTION" not in message.text:
                    faults.append(message.text)

            page.on("request", seen)
            page.on("console", said)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.goto(link(server))
            until(page, "snapshot !== null")
            return page

        yield start
        assert faults == []


def scan(page: Any, text: str) -> None:
    """Do what a scanner does: type, and press Enter, into whatever has the focus."""
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def choose(page: Any, file: Path) -> None:
    """Choose a file in the system's window, also one that was chosen before."""
    with page.expect_file_chooser() as window:
        page.click("#drop")
    window.value.set_files(str(file))


def burn_fifty(running: Server, page: Any) -> None:
    """Burn 50 devices, 2 of them in vain, and see it on the open page."""
    page.click("text=Line")
    for number in range(50):
        assert running.request(PRODUCT, f"A0B1C2D3{number:04X}")[0] == 200
        assert running.report(PRODUCT, f"A0B1C2D3{number:04X}", 2 if number in (7, 8) else 1)[0] == 200
    until(page, "document.querySelector('#tiles .big').textContent === '48'")
    until(page, "document.querySelector('#products').innerText.includes('Written 48')")
    assert "96.0 %" in page.inner_text("#tiles")
    assert "LOW STOCK: product a1Lamp has 2 left" in page.inner_text("#banners")
    assert "127.0.0.1" in page.inner_text("#stations")


def release_and_void(running: Server, page: Any) -> str:
    """Scan two devices; look at the secret of one, release it and make it void. Return its name."""
    until(page, "document.activeElement.id === 'text'")
    scan(page, "A0B1C2D30007")
    page.wait_for_selector("#details:not([hidden])")
    assert "burn failed" in page.inner_text("#details")
    scan(page, "A0B1C2D30008")  # the box still has the focus, and what was in it goes
    until(page, "document.querySelector('#details').innerText.includes('A0B1C2D30008')")
    name = page.inner_text("#details .key")
    secret = running.request(PRODUCT, "A0B1C2D30008")[1]["DeviceSecret"]
    assert secret not in page.content()
    page.click("#reveal")
    until(page, "text => document.querySelector('#details').innerText.includes(text)", arg=secret)
    assert "secrets shown" in page.inner_text("#details")
    page.click("text=Line")
    page.click("text=Device Query")
    assert secret not in page.content()  # nor for whoever comes to this view after others
    assert page.inner_text("#details .key") == name
    page.click("#void")
    page.go_back()  # a dialog does not wait over another view for its answer, which would no longer close it
    page.wait_for_selector("#dialog", state="hidden")
    page.click("text=Device Query")
    page.click("#release")
    page.click("#confirm")
    assert page.is_visible("#dialog")  # there is no reason yet
    page.keyboard.type("board scrapped")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#details').innerText.includes('board scrapped')")
    assert "Unallocated" in page.inner_text("#details .status")
    page.click("#void")
    page.fill("#reason", "label lost")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#details .status').innerText.includes('Void')")
    scan_box = page.locator("#text")
    scan_box.fill("nobody")
    scan_box.press("Enter")
    page.wait_for_selector("#missed:not([hidden])")
    assert "nobody" in page.inner_text("#missed")
    return str(name)


def page_and_download(page: Any) -> List[Dict[str, str]]:
    """Page through a batch, filter it and return what is downloaded."""
    page.select_option("#batchFilter", "march")
    until(page, "document.querySelector('#place').textContent === '1\\u201350 of 300'")
    page.click("#next")
    until(page, "document.querySelector('#place').textContent === '51\\u2013100 of 300'")
    page.select_option("#statusFilter", "Written")
    until(page, "document.querySelector('#place').textContent === '1\\u201348 of 48'")
    with page.expect_download() as download:
        page.click("#download")
    return list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text("utf-8-sig"))))


def test_the_work_of_a_shift_by_clicking_and_typing(server: StartServer, visit: Open, tmp_path: Path) -> None:
    running = server("--import", write(tmp_path / "march.csv", 300))
    page = visit(running)
    assert page.url == f"http://127.0.0.1:{running.port}/"

    page.click("text=Add Device")
    file = tmp_path / "lamps.csv"
    file.write_text(LAMPS)
    page.fill("[name=product_key]", "a1Lamp")
    choose(page, file)
    page.wait_for_selector("#bad")
    bad = page.eval_on_selector_all("#bad tbody tr", "rows => rows.map(row => row.innerText)")
    assert [row.split()[0] for row in bad] == ["3", "4"]
    assert "spreadsheet" in bad[0]
    assert running.request("a1Lamp", "too-early")[0] == 404
    file.write_text(LAMPS.replace("1.23E+15", "5c41ff0e9a7b2d36").replace("lamp 0003", "lamp-0003"))
    choose(page, file)
    page.click("text=Add 3 certificates")
    page.wait_for_selector("h2.done")
    assert "lamps.csv" in page.inner_text("#report")
    assert running.request("a1Lamp", "lamp-device")[0] == 200

    burn_fifty(running, page)
    page.click("text=Device Query")
    voided = release_and_void(running, page)
    table = page_and_download(page)
    assert [row["Status"] for row in table] == ["Written"] * 48
    assert voided not in {row["DeviceName"] for row in table}


@pytest.fixture
def firefox(tmp_path: Path) -> Iterator[Firefox]:
    """Another running browser."""
    browser = Firefox(tmp_path / "firefox")
    yield browser
    browser.close()


def add_lamps(firefox: Firefox, folder: Path) -> None:
    """Choose a file with bad rows, mend it and add it, with a ProductSecret."""
    firefox.fill("[name=product_secret]", "1nT5wq")
    secret = "document.querySelector('[name=product_secret]')"
    assert firefox.evaluate(f"{secret}.type") == "text", "for a password Firefox would make one up, and ask to keep it"
    assert firefox.evaluate(f"getComputedStyle({secret}).webkitTextSecurity") == "disc"
    firefox.fill("[name=product_key]", "a1Lamp")
    firefox.type("Tab")
    file = folder / "lamps.csv"
    file.write_text(LAMPS)
    firefox.fill("#file", str(file))
    firefox.until("document.querySelectorAll('#bad tbody tr').length === 2")
    file.write_text(LAMPS.replace("1.23E+15", "5c41ff0e9a7b2d36").replace("lamp 0003", "lamp-0003"))
    firefox.fill("#file", str(file))
    firefox.until("document.querySelector('#report').innerText.includes('Add 3 certificates')")
    firefox.click("#import")
    firefox.until("document.querySelector('h2.done') !== null")


def look_up(firefox: Firefox, device: str, secret: str) -> None:
    """Scan a device after a reload, and look at its secret, which is gone when the page was left."""
    firefox("WebDriver:Refresh")
    firefox.until("document.querySelector('#rows table') !== null")
    firefox.type(device, "Enter")
    firefox.until("document.querySelector('#details').innerText.includes('burn succeeded')")
    firefox.click("#reveal")
    firefox.until("document.querySelector('#details').innerText.includes(arguments[0])", secret)
    firefox("WebDriver:Navigate", url="about:blank")
    firefox("WebDriver:Back")
    firefox.until("document.querySelector('#rows table') !== null")
    assert not firefox.evaluate("document.body.innerHTML.includes(arguments[0])", secret)


def give_back_and_download(firefox: Firefox, device: str) -> List[Dict[str, str]]:
    """Scan a device, release it and make it void; return what is downloaded then."""
    firefox.click("nav [href='#query']")
    firefox.type(device, "Enter")
    firefox.until("document.querySelector('#release') !== null")
    for verb, status in (("release", "Unallocated"), ("void", "Void")):
        firefox.click(f"#{verb}")
        firefox.type("Enter")  # there is no reason yet
        assert firefox.evaluate("document.querySelector('#dialog').open")
        firefox.type("board scrapped", "Enter")
        firefox.until("document.querySelector('#details .status').innerText === arguments[0]", status)
    firefox.click("#download")
    end = time.monotonic() + 15
    while not [saved for saved in firefox.downloads.glob("*.csv") if saved.stat().st_size]:
        assert time.monotonic() < end
        time.sleep(0.02)
    return list(csv.DictReader(io.StringIO(next(firefox.downloads.glob("*.csv")).read_text("utf-8-sig"))))


def test_the_work_of_a_shift_in_firefox(server: StartServer, firefox: Firefox, tmp_path: Path) -> None:
    running = server("--import", SAMPLE)
    given = {device: running.request(WIFI, device)[1] for device in ("device-1", "device-2")}
    firefox("WebDriver:Navigate", url=link(running))
    firefox.until("document.querySelector('#tiles .big') !== null")
    firefox("WebDriver:SetWindowRect", width=900, height=500)
    for view in ("line", "add"):
        firefox.click(f"nav [href='#{view}']")
        firefox("WebDriver:Refresh")
        firefox.until("document.querySelector('#banners').innerText.includes('LOW STOCK')")
        assert firefox.evaluate("scrollY") == 0, "the warnings are under the header"
    firefox("WebDriver:SetWindowRect", width=1366, height=768)
    add_lamps(firefox, tmp_path)
    assert running.request("a1Lamp", "lamp-device")[1]["ProductSecret"] == "1nT5wq"

    firefox.click("nav [href='#line']")
    running.report(WIFI, "device-1", 1)
    running.report(WIFI, "device-2", 2)
    firefox.until("document.querySelector('#tiles').innerText.includes('50.0 %')")
    firefox.click("nav [href='#query']")
    look_up(firefox, "device-1", given["device-1"]["DeviceSecret"])
    table = give_back_and_download(firefox, "device-2")
    assert [row["Status"] for row in table if row["DeviceName"] == given["device-2"]["DeviceName"]] == ["Void"]
    running.stop()
    firefox.until("document.querySelector('#banners').innerText.includes('has not answered since')")
    assert firefox.complaints(running.port) == []


def test_the_page_says_so_when_the_server_is_gone_and_comes_back_by_the_new_link(
    server: StartServer, visit: Open
) -> None:
    running = server("--import", SAMPLE)
    page = visit(running)
    assert page.inner_text("#live") == "Live"
    running.stop()
    until(page, "document.querySelector('#banners').innerText.includes('has not answered since')")
    assert page.inner_text("#live") == "No server"


def test_the_page_says_so_when_the_server_hangs_and_shows_the_line_again_when_it_answers(
    server: StartServer, visit: Open
) -> None:
    page = visit(server("--import", SAMPLE))
    page.route("**/certtool/line", lambda _: None)  # the connection stays, and nothing comes
    until(page, "document.querySelector('#live').textContent === 'No server'")
    assert "has not answered since" in page.inner_text("#banners")
    page.unroute("**/certtool/line")
    until(page, "document.querySelector('#live').textContent === 'Live'")


def test_what_is_old_is_pale_and_the_sentence_that_says_so_is_not(server: StartServer, chromium: Any) -> None:
    running = server("--import", SAMPLE)
    context = chromium.new_context()
    page = context.new_page()
    page.goto(link(running))
    until(page, "snapshot !== null")
    opacity = "['#line', '#banners', 'main'].map(name => getComputedStyle(document.querySelector(name)).opacity).join()"
    assert page.evaluate(opacity) == "1,1,1"
    page.evaluate("localStorage.setItem('key', 'of before a restart')")
    until(page, "document.querySelector('#live').textContent === 'Locked'")
    assert page.evaluate(opacity) == "0.55,1,1"
    page.goto(link(running))
    until(page, "snapshot !== null && document.querySelector('#live').textContent === 'Live'")
    running.stop()
    until(page, "document.querySelector('#live').textContent === 'No server'")
    assert page.evaluate(opacity) == "0.55,1,1"
    context.close()


def test_the_file_that_open_hands_to_the_browser_opens_the_page(
    server: StartServer, store: Path, chromium: Any
) -> None:
    running = server("--open", "--import", SAMPLE, env={"BROWSER": "true %s"})
    context = chromium.new_context()
    page = context.new_page()
    page.goto((store / "open-page.html").as_uri())
    page.wait_for_url(f"http://127.0.0.1:{running.port}/")
    until(page, "typeof snapshot !== 'undefined' && snapshot !== null")
    assert page.evaluate("document.referrer") == ""
    context.close()


def test_a_reload_and_each_tab_work_and_the_link_opens_locked_tabs_again(server: StartServer, chromium: Any) -> None:
    running = server("--import", SAMPLE)
    context = chromium.new_context()
    first, second = context.new_page(), context.new_page()
    first.goto(link(running))
    until(first, "snapshot !== null")
    first.reload()
    second.goto(f"http://127.0.0.1:{running.port}/")
    for page in (first, second):
        until(page, "snapshot !== null")
    second.evaluate("localStorage.setItem('key', 'of before a restart')")
    for page in (first, second):
        until(page, "locked")
        assert "locked" in page.inner_text("#banners")
    second.goto(link(running))
    for page in (first, second):
        until(page, "snapshot !== null && !locked")
    assert second.url == f"http://127.0.0.1:{running.port}/"
    third = context.new_page()
    third.goto(f"http://127.0.0.1:{running.port}/#key=wrong")  # any web page may lead here
    until(third, "locked")
    third.reload()
    until(third, "snapshot !== null && !locked")
    context.close()


def test_a_browser_that_keeps_nothing_for_pages_is_not_locked_out_after_the_first_answer(
    server: StartServer, chromium: Any
) -> None:
    context = chromium.new_context()
    context.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied'); }})")
    page = context.new_page()
    page.goto(link(server("--import", SAMPLE)))
    until(page, "snapshot !== null")
    for _ in range(2):
        with page.expect_response("**/certtool/line") as answer:
            pass
        assert answer.value.status == 200
    assert page.inner_text("#live") == "Live"
    context.close()


@contextlib.contextmanager
def elsewhere(html: str) -> Iterator[Tuple[int, List[Mapping[str, str]]]]:
    """Another page of this PC while the block runs: its port, and what browsers tell it in their headers."""
    told: List[Mapping[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.append(dict(self.headers))
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(html.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        yield other.server_port, told
        other.shutdown()


def test_what_the_browser_tells_another_port_of_this_pc_does_not_open_the_page(
    server: StartServer, chromium: Any
) -> None:
    running = server("--import", SAMPLE)
    with elsewhere("another program's page") as (port, told):
        context = chromium.new_context()
        page = context.new_page()
        page.goto(link(running))
        until(page, "snapshot !== null")
        page.goto(f"http://127.0.0.1:{port}/")
        assert page.evaluate("localStorage.length") == 0
        context.close()
    client = PageClient(running)
    assert client.cookie in {headers.get("Cookie") for headers in told}, "browsers do not tell ports apart"
    assert client.key not in json.dumps(told)
    for operation in ("line", "reveal", "void"):
        assert client.ask(operation, {}, Certtool_Key=None)[0] == 403


def test_without_the_link_the_page_shows_nothing_and_says_how_to_open_it(server: StartServer, chromium: Any) -> None:
    running = server("--import", SAMPLE)
    page = chromium.new_page()
    page.goto(f"http://127.0.0.1:{running.port}/")
    until(page, "document.querySelector('#banners').innerText.includes('locked')")
    assert WIFI not in page.content()
    assert page.eval_on_selector_all("#first, #previous, #next", "all => all.map(each => each.disabled)") == [True] * 3
    page.close()


def test_a_browser_that_cannot_run_the_page_says_so_in_both_languages(server: StartServer, chromium: Any) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(link(server()))
    assert "Chrome 109" in page.inner_text("body")
    assert "此页面需要 JavaScript" in page.inner_text("body")
    context.close()


def test_a_browser_too_old_for_the_page_says_so_and_not_that_the_server_is_gone(
    server: StartServer, chromium: Any
) -> None:
    running = server()
    context = chromium.new_context()
    context.add_init_script("delete AbortSignal.timeout")  # which came with Chrome 103
    page = context.new_page()
    page.goto(link(running))
    page.wait_for_timeout(500)
    assert "Chrome 109" in page.inner_text("body")
    assert "has not answered" not in page.inner_text("body")
    context.close()


def fill(running: Server, tmp_path: Path) -> str:
    """Let all kinds of things have happened; return the DeviceID of one that failed."""
    PageClient(running).upload("Lamps.csv", write(tmp_path / "x.csv", 9_000).read_bytes(), batch="2026-11 Lamps")
    for number in range(70):
        running.request(PRODUCT, f"A0B1C2D3{number:04X}")
        if number < 66:
            running.report(PRODUCT, f"A0B1C2D3{number:04X}", 2 if number % 13 == 5 else 1)
    running.request("unknown", "A0B1C2D3FFFF")
    for number in range(6):
        running.request(WIFI, f"B0B1C2D3{number:04X}")
    return "A0B1C2D30005"


def check_view(page: Any, view: str, device: str, tmp_path: Path) -> None:
    """Bring a view to where most of it shows."""
    page.click(f'nav a[href="#{view}"]')
    if view == "add":
        file = tmp_path / "lamps.csv"
        file.write_text(LAMPS)
        page.fill("[name=product_key]", "a1Lamp")
        page.set_input_files("#file", str(file))
        page.wait_for_selector("#bad")
    elif view == "query":
        until(page, "document.activeElement.id === 'text'")
        scan(page, device)
        page.wait_for_selector("#details:not([hidden])")
        page.wait_for_selector("#rows table")
    else:
        page.wait_for_selector("#feed table")


def overlong(page: Any) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


@pytest.mark.parametrize("size", SIZES)
def test_every_view_is_accessible_fits_and_is_photographed(
    server: StartServer, visit: Open, axe: str, tmp_path: Path, size: str
) -> None:
    running = server("--import", SAMPLE)
    device = fill(running, tmp_path)
    SHOTS.mkdir(exist_ok=True)
    for locale, scheme in ((LANGUAGES[0], "light"), (LANGUAGES[1], "light"), (LANGUAGES[0], "dark")):
        page = visit(running, size, locale, scheme)
        for view in VIEWS:
            check_view(page, view, device, tmp_path)
            assert not overlong(page), f"{view} is wider than the screen"
            page.screenshot(path=str(SHOTS / f"{view}-{size}-{locale}-{scheme}.png"), full_page=size == "phone")
            found = page.evaluate(axe + "; axe.run()")["violations"]
            assert [(item["id"], [node["html"] for node in item["nodes"]]) for item in found] == []
        page.click("#release")
        page.screenshot(path=str(SHOTS / f"release-{size}-{locale}-{scheme}.png"))
        found = page.evaluate(axe + "; axe.run()")["violations"]
        assert [(item["id"], [node["html"] for node in item["nodes"]]) for item in found] == []


def test_every_view_fits_where_the_page_is_enlarged(server: StartServer, visit: Open, tmp_path: Path) -> None:
    running = server("--import", SAMPLE)
    device = fill(running, tmp_path)
    page = visit(running)
    for view in VIEWS:
        check_view(page, view, device, tmp_path)
        for percent in (100, 110, 125, 150, 175, 200):
            page.set_viewport_size({"width": SIZES["pc"][0] * 100 // percent, "height": SIZES["pc"][1]})
            assert not overlong(page), f"{view} is wider than the screen at {percent} %"


def test_long_names_and_what_is_typed_make_no_view_wider_than_the_screen(
    server: StartServer, visit: Open, tmp_path: Path
) -> None:
    page = visit(server(), "phone")
    page.click("text=Add Device")
    page.set_input_files("#file", str(write(tmp_path / f"{'n' * 120}.csv", 3)))
    page.click("#import")
    page.wait_for_selector("h2.done")
    assert not overlong(page)
    page.click("text=Device Query")
    page.fill("#text", "W" * 64)
    page.press("#text", "Enter")
    page.wait_for_selector("#missed:not([hidden])")
    assert not overlong(page)


def test_the_chart_tells_a_screen_reader_the_hours_that_it_shows(server: StartServer, chromium: Any) -> None:
    running = server("--import", SAMPLE)
    context = chromium.new_context(timezone_id="Asia/Kolkata")
    page = context.new_page()
    page.goto(link(running))
    until(page, "snapshot !== null")
    shown = page.eval_on_selector_all("#chart text:not(.value)", "all => all.map(each => each.textContent)")
    assert [text[-3:] for text in shown] == [":30"] * 12
    told = page.get_attribute("#chart svg", "aria-label")
    assert [part.split()[-2] for part in told.split(", ")[1:]] == [*shown]
    context.close()


def test_no_text_of_the_page_lacks_one_of_the_languages(server: StartServer, visit: Open, tmp_path: Path) -> None:
    running = server("--import", SAMPLE)
    device = fill(running, tmp_path)
    page = visit(running, locale="zh-CN")
    texts = page.evaluate("Object.entries(TEXT)")
    assert all(len(pair) == 2 and all(isinstance(text, str) and text for text in pair) for _, pair in texts)
    holes = [[re.findall(r"\{\d\}", text) for text in pair] for _, pair in texts]
    assert [[sorted(text) for text in pair] for pair in holes if sorted(pair[0]) != sorted(pair[1])] == []
    source = page.evaluate("document.scripts[0].textContent + document.body.innerHTML")
    used = set(re.findall(r"""\bt\("([^"]+)"|data-(?:text|label|hint)="([^"]+)\"""", source))
    assert {name for pair in used for name in pair if name} <= {key for key, _ in texts}
    known = re.compile(
        r"certtool|Product(Key|Secret|ID)|Device(Name|Secret|ID)|CSV|CRC32|ASCII|BOM|English|A-Z a-z|serve"
    )
    for view in VIEWS:
        check_view(page, view, device, tmp_path)
        page.wait_for_timeout(100)
        for line in page.inner_text("body").splitlines():
            words = re.findall(r"[A-Za-z]{4,}(?: [A-Za-z]{2,})+", known.sub("", line))
            assert words == [], line
    page.click("#language")
    assert page.inner_text("nav").split("\n") == ["Line", "Add Device", "Device Query"]
    assert not re.search(r"[\u4e00-\u9fff]", page.inner_text("main"))
    page.reload()
    assert page.inner_text("nav").split("\n") == ["Line", "Add Device", "Device Query"]


def test_every_sentence_of_the_server_that_the_page_may_show_is_there_in_chinese(
    server: StartServer, visit: Open
) -> None:
    page = visit(server("--import", SAMPLE), locale="zh-CN")
    sentences = [
        "DeviceName is missing.",
        "DeviceSecret was rewritten by a spreadsheet: export the file again and do not save it in a spreadsheet.",
        "DeviceName is not 4-32 characters of A-Z a-z 0-9 - _ @ . :",
        "ProductKey is not 1-64 printable ASCII characters without white space.",
        "The row has 2 cells where the header line has 3.",
        "lamp-0001 is in the store with another DeviceSecret.",
        "lamp-0001 stands in the file before, with another secret or id.",
        "The file is empty: export it again.",
        "The first line must name the columns; there is none for ProductKey (or --product-key).",
        "The first line names more than 1,000 columns: export the file again.",
        "More than 100,000 rows are wrong, so the rest was not read: is that the right file?",
        "The file names more than 1,000 ProductKeys: is that the right column?",
        "imports/000001-a.csv cannot be read (Permission denied): close it in other programs, or check its rights.",
        "journal.csv cannot be read (Input/output error): check the store's disk.",
        "journal.csv cannot be read (Permission denied): close it in other programs, or check its rights and disk.",
        "The import could not be written (Access denied): close it in other programs, or check its rights and disk.",
        "There is no certificate of this DeviceName in the store: check the name and --product-key.",
        "The record could not be written (no memory), so nothing was given out: close other programs.",
        "Another program changed imports/000002-b.csv at once: find out which, and import again.",
        "There is no certificate of this DeviceName in the store: check the name.",
        "It is void, and a void certificate is never given out again.",
        "It is Written, so its secret is in a device: release it with --force if that is scrap.",
        "Only 99 certificates of product a1 are left: import more.",
        "Imported 3 of 3 rows as batch {Void} constructor.",
        "The disk failed to keep a record (Input/output error), so it may be lost or not: check the disk, and restart "
        "this PC.",
        "A failed record could not be taken back: check the disk, and start again.",
        certtool.HELD_BACK,
        "Something unexpected happened here; the server's screen says where.",
        "Please report: KeyError in _row, line 4000",
        "THERE IS NO SECOND COPY: the mirror E:\\copy failed (Input/output error). The line goes on without it. "
        "Mend the disk and start again: what is missing is added then.",
        "This PC cannot remember how far the store has come (Input/output error: C:\\x), so an old copy put back would "
        "not be noticed.",
        "No connection can be taken (Too many open files): close other programs.",
        "A running server takes files of 256 MiB at most: stop it and import then.",
        "This PC has no memory for so long a request: split the file.",
        certtool.CLOSED,
    ]
    for sentence in sentences:
        assert re.search(r"[\u4e00-\u9fff]{2}", page.evaluate("sentence => say(sentence)", sentence)), sentence
    for word, meant in (("disk", "\u78c1\u76d8"), ("in other programs", "\u5176\u4ed6\u7a0b\u5e8f")):
        told = [page.evaluate("sentence => say(sentence)", sentence) for sentence in sentences if word in sentence]
        assert [chinese for chinese in told if meant not in chinese] == []
    event = page.evaluate("result('refused: It is not allocated: there is nothing to release.')")
    assert not re.search("[a-z]", event)


class Late:
    """Holds the next question of one kind back from the server, until `go`."""

    def __init__(self, page: Any, operation: str) -> None:
        self.page = page
        self.held: List[Any] = []
        page.route(f"**/certtool/{operation}", lambda route: self.held.append(route), times=1)

    def go(self) -> None:
        """Let it have its answer, after all that was asked since."""
        end = time.monotonic() + 15
        while not self.held and time.monotonic() < end:
            self.page.wait_for_timeout(20)
        self.page.wait_for_timeout(300)
        with self.page.expect_response(lambda response: response.url == self.held[0].request.url):
            self.held[0].continue_()
        self.page.wait_for_timeout(200)


def test_a_late_answer_shows_no_certificate_and_no_secret_in_the_place_of_another(
    server: StartServer, visit: Open
) -> None:
    running = server("--import", SAMPLE)
    given = {device: running.request(WIFI, device)[1] for device in ("device-1", "device-2")}
    page = visit(running)
    page.click("text=Device Query")
    details = "text => document.querySelector('#details').innerText.includes(text)"
    scan(page, "device-1")
    until(page, details, "device-1")
    late = Late(page, "reveal")
    page.click("#reveal")
    page.click("#text")
    until(page, "$('text').selectionStart === 0 && $('text').selectionEnd === $('text').value.length")
    scan(page, "device-2")
    until(page, details, "device-2")
    late.go()
    assert given["device-1"]["DeviceSecret"] not in page.content()
    assert given["device-2"]["DeviceName"] == page.inner_text("#details .key")
    late = Late(page, "reveal")
    page.click("#reveal")
    page.click("#closeDetails")
    late.go()
    assert not page.is_visible("#details")
    assert not page.is_visible("#missed")
    late = Late(page, "certificate")
    scan(page, "device-1")
    scan(page, "nobody")
    page.wait_for_selector("#missed:not([hidden])")
    late.go()
    assert not page.is_visible("#details")
    assert "nobody" in page.inner_text("#missed")


def test_the_list_is_what_the_filters_and_its_numbers_say_whichever_answer_comes_last(
    server: StartServer, visit: Open, tmp_path: Path
) -> None:
    running = server("--import", write(tmp_path / "march.csv", 300))
    for number in range(3):
        running.request(PRODUCT, f"device-{number}")
    running.report(PRODUCT, "device-0", 1)
    page = visit(running)
    page.click("text=Device Query")
    place = "text => document.querySelector('#place').textContent === text"
    until(page, place, "1\u201350 of 300")
    late = Late(page, "query")
    page.select_option("#statusFilter", "Written")
    page.select_option("#statusFilter", "Allocated")
    until(page, place, "1\u20132 of 2")
    late.go()
    assert page.inner_text("#place") == "1\u20132 of 2"
    assert page.eval_on_selector_all("#rows .status", "all => all.map(each => each.innerText)") == ["Allocated"] * 2
    page.select_option("#statusFilter", "")
    until(page, place, "1\u201350 of 300")
    third = page.evaluate("ask('query', {start: 50}).then(answer => answer.rows[0].DeviceName)")
    late = Late(page, "query")
    page.click("#next")
    page.click("#next")
    late.go()
    until(page, place, "51\u2013100 of 300")
    assert page.inner_text("#rows td") == third
    page.fill("#text", "nobody")
    page.press("#text", "Enter")
    page.wait_for_selector("#missed:not([hidden])")
    page.fill("#text", "")
    page.press("#text", "Enter")
    until(page, place, "1\u201350 of 300")
    assert not page.is_visible("#missed")


def test_a_late_answer_to_a_search_or_a_page_is_not_shown_under_other_filters(
    server: StartServer, visit: Open, tmp_path: Path
) -> None:
    running = server("--import", SAMPLE, "--import", write(tmp_path / "march.csv", 300))
    for product in (WIFI, PRODUCT):
        running.request(product, "device-1")
    name = running.request(PRODUCT, "device-2")[1]["DeviceName"]
    page = visit(running)
    page.click("text=Device Query")
    place = "text => document.querySelector('#place').textContent.startsWith(text)"
    until(page, place, "1\u201350 of")
    late = Late(page, "query")
    scan(page, "device-1")
    page.select_option("#productFilter", PRODUCT)
    until(page, place, "1\u201350 of 300")
    late.go()
    assert page.inner_text("#place") == "1\u201350 of 300"
    page.click("#next")
    until(page, place, "51\u2013100 of 300")
    late = Late(page, "query")
    page.select_option("#statusFilter", "Unallocated")
    page.click("#next")
    late.go()
    assert page.inner_text("#place") == "1\u201350 of 298"
    first = page.evaluate("ask('query', filters()).then(answer => answer.rows[0].DeviceName)")
    assert page.inner_text("#rows td") == first
    page.select_option("#statusFilter", "")
    until(page, place, "1\u201350 of 300")
    late = Late(page, "query")
    page.fill("#text", name)
    page.press("#text", "Enter")
    page.fill("#text", "")
    page.press("#text", "Enter")
    late.go()
    assert not page.is_visible("#details")


def test_what_is_typed_while_an_answer_is_awaited_stays_in_its_box(server: StartServer, visit: Open) -> None:
    running = server("--import", SAMPLE)
    given = {device: running.request(WIFI, device)[1]["DeviceName"] for device in ("device-1", "device-2")}
    page = visit(running)
    page.click("text=Device Query")
    for operation, button in (("certificate", f"#rows >> text={given['device-2']}"), ("reveal", "#reveal")):
        late = Late(page, operation)
        page.click(button)
        page.click("#text")
        until(page, "document.activeElement.id === 'text'")
        page.fill("#text", "devi")
        late.go()
        scan(page, "ce-1")
        assert page.input_value("#text") == "device-1"
        until(page, "name => document.querySelector('#details').innerText.includes(name)", given["device-1"])


def test_a_scan_replaces_the_last_one_and_nothing_that_is_half_typed(server: StartServer, visit: Open) -> None:
    running = server("--import", SAMPLE)
    page = visit(running)
    page.click("text=Device Query")
    until(page, "document.activeElement.id === 'text'")
    middle = {"x": 60, "y": 15}
    scan(page, "device-1")
    page.wait_for_selector("#missed:not([hidden])")
    page.click("#text", position=middle)  # the focus is there already
    scan(page, "device-2")
    assert page.input_value("#text") == "device-2"
    page.click("#text", position=middle)
    page.click("#text", position=middle)
    page.keyboard.type("!")
    assert page.input_value("#text").replace("!", "", 1) == "device-2"
    page.keyboard.type("?")
    page.click("#text", position=middle)
    page.keyboard.type("!")
    assert len(page.input_value("#text")) == len("device-2!?!")
    page.fill("#text", "devi")
    page.context.new_cdp_session(page).send("Emulation.setFocusEmulationEnabled", {"enabled": False})
    page.context.new_page().bring_to_front()  # to look the rest up
    until(page, "!document.hasFocus()")
    page.bring_to_front()
    until(page, "document.hasFocus()")
    page.wait_for_timeout(100)
    page.keyboard.type("ce-3")
    assert page.input_value("#text") == "device-3"


def test_a_history_that_is_not_shown_whole_says_so(server: StartServer, visit: Open) -> None:
    running = server("--import", SAMPLE)
    product = "a1SampleWf0"
    running.request(product, "device-1")
    for number in range(certtool.FIRST_SHOWN + certtool.LATEST_SHOWN):
        running.report(product, "device-1", 1 + number % 2)
    page = visit(running)
    page.click("text=Device Query")
    until(page, "document.activeElement.id === 'text'")
    scan(page, "device-1")
    page.wait_for_selector("#details:not([hidden])")
    assert "2 requests and reports of devices in between are not shown here." in page.inner_text("#details")


def test_a_scan_goes_into_its_box_after_a_reload_and_a_click_on_the_same_view(server: StartServer, visit: Open) -> None:
    page = visit(server("--import", SAMPLE))
    address = page.url + "#query"
    page.goto("data:,")
    for number, again in enumerate(
        (lambda: page.goto(address), page.reload, lambda: page.click("text=Device Query"), lambda: page.goto(address))
    ):
        again()
        page.wait_for_selector("#rows table")
        scan(page, f"nobody-{number}")
        until(page, "text => document.querySelector('#missed').innerText.includes(text)", f"nobody-{number}")


def test_a_release_that_a_burn_overtook_asks_whether_the_device_is_scrap(
    server: StartServer, store: Path, chromium: Any
) -> None:
    running = server("--import", SAMPLE)
    running.request(WIFI, "device-1")
    context = chromium.new_context()
    page = context.new_page()
    page.goto(f"{link(running)}#query")
    page.click("text=Device Query")
    until(page, "document.activeElement.id === 'text'")
    scan(page, "device-1")
    page.wait_for_selector("#release")
    running.report(WIFI, "device-1", 1)
    page.click("#release")
    assert not page.is_visible("#force")
    page.fill("#reason", "   ")
    page.keyboard.press("Enter")
    assert page.input_value("#reason") == ""
    page.fill("#reason", "board scrapped")
    page.keyboard.press("Enter")
    page.wait_for_selector("#force")
    assert "in a device: tick to release it if that is scrap." in page.inner_text("#dialogFail")
    page.check("#force")
    asked: List[str] = []
    page.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
    late = Late(page, "release")
    page.focus("#reason")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")  # a key that bounces
    late.go()
    until(page, "document.querySelector('#details .status').innerText === 'Unallocated'")
    assert asked.count("release") == 1
    assert "board scrapped" in (store / "journal.csv").read_text("utf-8")
    context.close()


def test_what_is_released_or_made_void_is_what_the_dialog_names_whichever_answer_comes_late(
    server: StartServer, chromium: Any
) -> None:
    running = server("--import", SAMPLE)
    given = {device: running.request(WIFI, device)[1]["DeviceName"] for device in ("device-1", "device-2", "device-3")}
    context = chromium.new_context()
    page = context.new_page()
    page.goto(link(running))
    page.click("text=Device Query")
    page.wait_for_selector("#rows table")
    until(page, "document.activeElement.id === 'text'")

    def look_for(device: str) -> None:
        page.fill("#text", device)
        page.press("#text", "Enter")
        until(page, "name => document.querySelector('#details').innerText.includes(name)", given[device])

    def make_void(device: str) -> None:
        assert page.inner_text("#dialogTitle") == f"Void {given[device]} of product {WIFI}?"
        page.fill("#reason", "label lost")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#details .status').innerText === 'Void'")
        assert page.inner_text("#details .key") == given[device]

    look_for("device-1")
    late = Late(page, "certificate")
    page.click(f"#rows >> text={given['device-2']}")
    page.click("#void")
    late.go()
    make_void("device-1")

    look_for("device-2")
    page.click("#release")
    running.report(WIFI, "device-2", 1)
    page.fill("#reason", "board scrapped")
    late = Late(page, "release")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    look_for("device-3")
    page.click("#void")
    late.go()
    assert page.inner_text("#dialogFail") == ""
    assert page.inner_text("#missed").startswith(f"{given['device-2']}: It is Written")
    make_void("device-3")

    look_for("device-2")
    page.click("#void")
    page.fill("#reason", "label lost")
    late = Late(page, "void")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    look_for("device-3")
    late.go()
    assert page.inner_text("#details .key") == given["device-3"]
    assert running.request(WIFI, "device-2")[1]["Status"] == "Voided"
    context.close()


def test_a_batch_that_was_typed_stays_and_needs_no_second_click(
    server: StartServer, visit: Open, tmp_path: Path
) -> None:
    running = server()
    page = visit(running)
    page.click("text=Add Device")
    file = tmp_path / "lamps.csv"
    file.write_text(LAMPS)
    page.fill("[name=product_key]", "a1Lamp")
    choose(page, file)
    page.wait_for_selector("#bad")
    assert page.input_value("[name=batch]") == "lamps"
    page.fill("[name=batch]", "order 117")
    file.write_text(LAMPS.replace("1.23E+15", "5c41ff0e9a7b2d36").replace("lamp 0003", "lamp-0003"))
    choose(page, file)
    page.wait_for_selector("text=Add 3 certificates")
    assert page.input_value("[name=batch]") == "order 117"
    page.fill("[name=batch]", "order 118")
    page.click("#import")
    page.wait_for_selector("h2.done")
    assert "Batch: order 118" in page.inner_text("#report")
    assert page.input_value("[name=batch]") == ""
    choose(page, file)
    until(page, "document.querySelector('[name=batch]').value === 'lamps'")


def test_the_other_language_tells_again_what_is_in_a_file_and_what_became_of_it(
    server: StartServer, visit: Open, tmp_path: Path
) -> None:
    page = visit(server())
    page.click("text=Add Device")
    file = tmp_path / "lamps.csv"
    file.write_text(LAMPS)
    page.fill("[name=product_key]", "a1Lamp")
    page.set_input_files("#file", str(file))
    page.wait_for_selector("text=Preview: nothing is added yet")
    page.click("#language")
    assert re.search(r"[a-z]{4,} [a-z]{2,}", page.inner_text("#report")) is None
    page.click("#import")
    page.wait_for_selector("h2.done")
    page.click("#language")
    report = page.inner_text("#report")
    assert "The certificates are added" in report
    assert "These rows were not added" in report
    assert "nothing is added" not in report
    page.click("text=Check the file")
    page.wait_for_selector("text=Choose a file first.")
    page.click("#language")
    assert "请先选择文件。" in page.inner_text("#report")


@pytest.mark.parametrize("locale", LANGUAGES)
def test_a_file_that_cannot_be_used_as_a_whole_is_told_so_in_words_of_this_page(
    server: StartServer, visit: Open, tmp_path: Path, locale: str
) -> None:
    page = visit(server(), locale=locale)
    page.click("[href='#add']")
    file = tmp_path / "lamps.csv"
    file.write_text(LAMPS)
    page.set_input_files("#file", str(file))
    page.wait_for_selector("#bad")
    report = page.inner_text("#report")
    assert "--" not in report, "no option of a command"
    assert page.evaluate("t('unusable')") in report
    assert page.evaluate("t('mend')") not in report, "its rows may be all right"
    field = {"en-US": "ProductKey (or fill in the field ProductKey).", "zh-CN": "填写 ProductKey 栏"}[locale]
    assert field in report
    page.fill("[name=product_key]", "a1Lamp")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('#bad tbody tr').length === 2")
    assert page.evaluate("t('mend')") in page.inner_text("#report")


def test_a_check_waits_for_the_one_before_and_is_not_refused_as_another_import(
    server: StartServer, visit: Open, tmp_path: Path
) -> None:
    page = visit(server())
    page.click("text=Add Device")
    file, big = tmp_path / "lamps.csv", write(tmp_path / "big.csv", 200_000)
    file.write_text(LAMPS)
    page.set_input_files("#file", str(file))
    page.wait_for_selector("#bad")
    page.focus("[name=product_key]")
    scan(page, "a1Lamp")  # a field that changed asks for a check, and Enter for another
    page.wait_for_selector("text=Add the good rows only (1)")
    page.set_input_files("#file", str(big))
    until(page, "document.querySelector('#chosen').textContent === 'big.csv'")
    page.set_input_files("#file", str(file))
    page.wait_for_selector("text=Add the good rows only (1)")
    assert page.inner_text("#chosen") == "lamps.csv"
    page.set_input_files("#file", str(big))
    until(page, "document.querySelector('#chosen').textContent === 'big.csv'")
    page.evaluate("choose({ name: 'gone.csv', arrayBuffer: () => Promise.reject(new Error()) })")
    page.wait_for_selector("text=The file cannot be read any more")
    page.evaluate("checking")
    assert page.locator("#import").count() == 0, "of a file that is not chosen any more"


def test_a_file_chosen_while_another_is_added_stays_chosen(server: StartServer, visit: Open, tmp_path: Path) -> None:
    page = visit(server())
    page.click("text=Add Device")
    page.set_input_files("#file", str(write(tmp_path / "march.csv", 3)))
    page.wait_for_selector("#import")
    late = Late(page, "import")
    page.click("#import")
    page.set_input_files("#file", str(write(tmp_path / "april.csv", 3, first=3)))
    until(page, "document.querySelector('#chosen').textContent === 'april.csv'")
    assert page.is_visible("#progress")
    late.go()
    page.wait_for_selector("h2.done")
    assert "File: march.csv" in page.inner_text("#report")
    assert "Batch: march" in page.inner_text("#report")
    page.click("text=Check the file")
    page.click("#import")
    until(page, "document.querySelector('#report').innerText.includes('File: april.csv')")


def test_of_two_files_chosen_the_later_is_the_one_also_where_the_first_takes_longer_to_read(
    server: StartServer, visit: Open
) -> None:
    page = visit(server())
    page.click("text=Add Device")
    for readable in (True, False):
        page.evaluate(
            """readable => {
              const slow = new File(["DeviceName"], "slow.csv"), bytes = new ArrayBuffer(3);
              slow.arrayBuffer = () => new Promise((done, fail) => setTimeout(readable ? done : fail, 300, bytes));
              choose(slow);
              choose(new File(["DeviceName"], "fast.csv"));
            }""",
            readable,
        )
        page.wait_for_timeout(600)
        assert page.inner_text("#chosen") == "fast.csv"
        assert page.input_value("[name=batch]") == "fast"
        assert "cannot be read" not in page.inner_text("#report")


def test_batches_that_have_certificates_left_are_not_told_to_have_none(
    server: StartServer, visit: Open, tmp_path: Path
) -> None:
    files = [write(tmp_path / f"batch-{n}.csv", 2, first=2 * n) for n in range(14)]
    running = server(*(arg for file in files for arg in ("--import", file)))
    page = visit(running)
    assert "2 more batches are not shown here." in page.inner_text("#products")
    for number in range(8):
        running.request(PRODUCT, f"device-{number}")
        running.report(PRODUCT, f"device-{number}", 1)
    until(page, "document.querySelector('#products').innerText.includes('4 batches with nothing left are not shown')")


def test_products_that_have_ended_leave_room_for_the_work(server: StartServer, visit: Open, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.csv", 2, f"product{n}") for n in range(20)]
    running = server(*(arg for file in files for arg in ("--import", file)))
    for number in range(12):
        for device in ("device-1", "device-2"):
            running.request(f"product{number}", device)
    page = visit(running)
    banners = "Array.from(document.querySelectorAll('.banner'), banner => banner.innerText)"
    until(page, f"{banners}[0].startsWith('STOCK IS EMPTY: no certificate of product product0, product1, product2')")
    empty, low = page.evaluate(banners)
    assert "product11 is left." in empty
    assert page.inner_text(".product").startswith("product0\n0 left\n0\n"), "not that it will run out"
    assert low.startswith("LOW STOCK: product product12 has 2 left, product product13 has 2 left, ")
    page.click("text=Device Query")
    assert page.evaluate("$('text').getBoundingClientRect().bottom") < SIZES["pc"][1] / 2


def test_hostile_names_in_every_field_are_only_text(server: StartServer, visit: Open, tmp_path: Path) -> None:
    running = server()
    client = PageClient(running)
    formula = "=cmd|' /C calc'!A0"
    columns = ["ProductKey", "DeviceName", "DeviceSecret", "ProductSecret", "ProductID", IMAGE]
    rows = [["<i>key</i>", f"lamp-000{n}", "<b>secret</b>", "=1+1", "<u>1</u>", "x"] for n in range(3)]
    with open(tmp_path / "hostile.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    hostile = tmp_path / f"{IMAGE.replace('/', '')}.csv"
    (tmp_path / "hostile.csv").rename(hostile)
    page = visit(running)
    page.click("text=Add Device")
    page.set_input_files("#file", str(hostile))
    page.wait_for_selector("#import")
    page.click("#import")
    page.wait_for_selector("h2.done")
    assert IMAGE in page.inner_text("#report")
    for device in (IMAGE, formula):
        assert running.request("<i>key</i>", device)[0] == 200
        assert running.report("<i>key</i>", device, 1)[0] == 200
    running.request(IMAGE, IMAGE)
    client.ask("void", {"product_key": "<i>key</i>", "device_name": "lamp-0002", "reason": IMAGE})
    page.click("text=Line")
    until(page, "text => document.querySelector('#feed').innerText.includes(text)", arg=IMAGE)
    assert "<i>key</i>" in page.inner_text("#products")
    page.click("text=Device Query")
    for text in (IMAGE, formula, "lamp-0002"):
        page.fill("#text", text)
        page.press("#text", "Enter")
        until(page, "text => document.querySelector('#details').innerText.includes(text)", arg=text)
        page.click("#reveal")
        until(page, "document.querySelector('#details').innerText.includes('<b>secret</b>')")
    assert f"(page): {IMAGE}" in page.inner_text("#details")
    assert page.locator("main img, main b b, dd b, dd u, .key i").count() == 0
    assert "broken" not in page.title()


EVIL = """<!DOCTYPE html><title>evil</title><iframe id=frame src="TARGET/"></iframe><script>
const done = [];
const attempt = async (name, path, options) => {
  try {
    const response = await fetch("TARGET" + path, {credentials: "include", ...options});
    done.push([name, await response.text()]);
  } catch { done.push([name, "failed"]); }
};
(async () => {
  const body = JSON.stringify({product_key: "PRODUCT", device_name: "DEVICE", reason: "evil"});
  for (const type of ["text/plain", "application/json"])
    for (const operation of ["line", "query", "reveal", "void"])
      await attempt(operation, "/certtool/" + operation, {method: "POST", body, headers: {"Content-Type": type}});
  await attempt("page", "/", {});
  await attempt("export", "/certtool/export", {});
  await attempt("blind", "/certtool/void", {method: "POST", body, mode: "no-cors"});
  const draw = JSON.stringify({ProductKey: "PRODUCT", Action: 0});
  for (const mode of ["cors", "no-cors"]) await attempt("draw", "/", {method: "POST", body: draw, mode});
  window.finished = done;
})();
</script>"""


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "rebound.example"])
def test_a_hostile_page_reads_nothing_and_changes_nothing(
    server: StartServer, chromium: Any, store: Path, name: str
) -> None:
    """From another port of this PC, from another name of it, and from a name that was rebound to it."""
    running = server("--import", SAMPLE)
    with open(SAMPLE, newline="", encoding="utf-8") as file:
        device = next(csv.DictReader(file))["DeviceName"]
    target = f"http://{name if 'example' in name else '127.0.0.1'}:{running.port}"
    evil = EVIL.replace("PRODUCT", WIFI).replace("DEVICE", device).replace("TARGET", target)
    with elsewhere(evil) as (port, _):
        context = chromium.new_context()
        page = context.new_page()
        page.goto(link(running))  # the operator is logged in, in this browser
        until(page, "snapshot !== null")
        before = (store / "journal.csv").read_bytes()
        page.goto(f"http://{name}:{port}/")
        until(page, "window.finished")
        done: List[Tuple[str, str]] = page.evaluate("window.finished")
        assert len(done) == 13
        for what, text in done:
            assert text in ("failed", "") or json.loads(text)["Status"] == "Forbidden", (what, text)
        assert all("certtool" not in frame.title() for frame in page.frames)
        page.goto(f"http://{name}:{running.port}/")  # from now on as rebound: what was elsewhere is here
        ask = "async body => (await fetch('/', {method: 'POST', body})).json()"
        answer = page.evaluate(ask, json.dumps({"ProductKey": WIFI, "Action": 0}))
        assert answer["Status"] == "Forbidden"
        context.close()
    assert (store / "journal.csv").read_bytes() == before


def test_the_keyboard_alone_is_enough(server: StartServer, visit: Open) -> None:
    running = server("--import", SAMPLE)
    name = running.request(WIFI, "device-1")[1]["DeviceName"]
    page = visit(running)
    focus = "document.activeElement.id || document.activeElement.getAttribute('href')"

    def tab_to(wanted: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate(focus) == wanted:
                return
        raise AssertionError(f"Tab does not reach {wanted}")

    tab_to("#query")
    page.keyboard.press("Enter")
    until(page, "document.activeElement.id === 'text'")
    scan(page, "device-1")
    page.wait_for_selector("#void")
    tab_to("void")
    page.keyboard.press("Enter")
    page.wait_for_selector("#dialog[open]")
    page.keyboard.press("Escape")
    assert not page.is_visible("#dialog")
    page.keyboard.press("Enter")
    scan(page, "label lost")
    until(page, "document.querySelector('#details .status').innerText === 'Void'")
    assert name in page.inner_text("#details")


def test_it_prints_without_its_buttons_on_white(server: StartServer, visit: Open, tmp_path: Path) -> None:
    running = server("--import", SAMPLE)
    device = fill(running, tmp_path)
    page = visit(running, scheme="dark")
    check_view(page, "query", device, tmp_path)
    page.emulate_media(media="print")
    assert not page.is_visible("#reveal")
    assert not page.is_visible("#search")
    assert page.is_visible("#details .key")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.screenshot(path=str(SHOTS / "print.png"), full_page=True)


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_a_lan_peer_gets_certificates_but_never_the_page(server: StartServer) -> None:
    ip = need("ip")
    space = f"certtool-{secrets.token_hex(3)}"
    veth, peer = f"ct{secrets.token_hex(3)}", f"cp{secrets.token_hex(3)}"

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=True)

    try:
        run(ip, "netns", "add", space)
    except subprocess.CalledProcessError as error:
        missing(f"no network namespace can be made: {error.stderr}")
    try:
        run(ip, "link", "add", veth, "type", "veth", "peer", "name", peer, "netns", space)
        run(ip, "addr", "add", "198.18.77.1/30", "dev", veth)
        run(ip, "link", "set", veth, "up")
        run(ip, "-n", space, "addr", "add", "198.18.77.2/30", "dev", peer)
        run(ip, "-n", space, "link", "set", peer, "up")
        running = server("--host", "0.0.0.0", "--import", SAMPLE)
        client = PageClient(running)
        script = (
            "import http.client, json, sys\n"
            "for method, path, body, headers in json.load(sys.stdin):\n"
            f"    c = http.client.HTTPConnection('198.18.77.1', {running.port}, timeout=10)\n"
            "    c.request(method, path, body, headers); print(c.getresponse().status)\n"
        )
        stolen: Dict[str, str] = client.headers(Host=f"127.0.0.1:{running.port}")
        token = link(running).partition(str(running.port))[2]
        requests: List[Any] = [("GET", path, None, stolen) for path in ("/", token, "/certtool/export", "/x")]
        requests += [("POST", f"/certtool/{name}", "{}", stolen) for name in ("line", "query", "void", "import", "x")]
        requests += [("GET", "/", None, {}), ("POST", "/certtool/line", "{}", {})]
        requests.append(("POST", "/", json.dumps({"ProductKey": WIFI, "DeviceID": "lan", "Action": 0}), {}))
        command = [ip, "netns", "exec", space, sys.executable, "-c", script]
        done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["403"] * 11 + ["200"]
        assert "198.18.77.2" in json.dumps(client.ask("line", {})[1]["stations"])
    finally:
        run(ip, "netns", "del", space)
