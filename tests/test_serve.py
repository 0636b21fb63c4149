"""The server over its life: traffic, kills and restarts, other commands beside it, what the operator sees."""

from __future__ import annotations

import contextlib
import errno
import http.server
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Generator, Iterator, List, Mapping, Sequence, Tuple

import pytest

import certtool as program
from tests import identities
from tests.identities import PRODUCT
from tests.inside import PATIENCE, Inside
from tests.stations import Stations
from tests.support import CERTTOOL, ROOT, SAMPLE, RunCerttool, Server, StartServer, child_env, listed, no_traceback, raw
from tests.wire import Reply, ask, has_ipv6, post, replies

WIFI = "a1SampleWf0"


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An identity file with 100,000 certificates of a product of its own."""
    return identities.write(tmp_path_factory.mktemp("big") / "big.csv", 100_000, "a1BigPk0000")


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An identity file whose import takes long enough that something can come in between: 600,000 certificates."""
    return identities.write(tmp_path_factory.mktemp("huge") / "huge.csv", 600_000, "a1HugePk000")


def until(true: Any, what: str) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


# -- restarts ----------------------------------------------------------------------------------------------------------


def test_a_restart_gives_the_same_answers(server: StartServer, store: Path, certtool: RunCerttool) -> None:
    def talk(running: Server) -> List[Reply]:
        return [running.request(WIFI, f"MAC-{number}") for number in range(6)]

    running = server("--import", SAMPLE)
    first = talk(running)
    running.report(WIFI, "MAC-1", 1)
    running.report(WIFI, "MAC-2", 2)
    for end in ("stop", "kill", "stop"):
        before = listed(certtool, store)
        getattr(running, end)()
        assert listed(certtool, store) == before
        running = server("--import", SAMPLE)
        assert listed(certtool, store) == before
        assert talk(running) == first


def end_by_kill(running: Server) -> None:
    running.kill()


def end_by_interrupt(running: Server) -> None:
    assert running.stop() == 0


def end_by_sigterm(running: Server) -> None:
    if sys.platform == "win32":
        pytest.skip("on Windows nothing but Ctrl-C and Ctrl-Break asks a program to end")
    running.process.send_signal(signal.SIGTERM)
    assert running.wait() == 0


@pytest.mark.parametrize("end", [end_by_kill, end_by_interrupt, end_by_sigterm])
def test_what_was_acknowledged_in_the_middle_of_traffic_is_true_after_a_restart(
    end: Any, server: StartServer, store: Path, tmp_path: Path, certtool: RunCerttool
) -> None:
    pool = identities.write(tmp_path / "pool.csv", 2000)
    running = server("--import", pool)
    line = Stations(running.port, {f"MAC-{number}": (0, 1, 0) for number in range(2000)}, 16, notice_at=500)
    assert line.reached.wait(60)
    end(running)
    answers = {device_id: got for device_id, got in line.wait().items() if got}
    assert 100 < len(answers) < 2000, "the end came in the middle"
    assert {status for got in answers.values() for status, _ in got} == {200}
    rows = {row["DeviceID"]: row for row in listed(certtool, store)}
    restarted = server()
    given = [restarted.request(PRODUCT, device_id) for device_id in answers]
    assert given == [got[0] for got in answers.values()], "each device still has the certificate that it was sent"
    assert len({reply["DeviceName"] for _, reply in given}) == len(given)
    for device_id, got in answers.items():
        if len(got) > 1:
            assert rows[device_id]["Status"] == "Written"


@pytest.mark.parametrize("killed", [False, True], ids=["not killed", "killed in the middle"])
def test_32_stations_share_9000_certificates_among_10000_devices(
    killed: bool, server: StartServer, tmp_path: Path, certtool: RunCerttool, store: Path
) -> None:
    running = server("--import", identities.write(tmp_path / "pool.csv", 9000))
    talk = {f"MAC-{number}": (0,) for number in range(10_000)}
    line = Stations(running.port, talk, 32, notice_at=4000)
    sent: Mapping[str, List[Reply]] = {}
    if killed:
        assert line.reached.wait(60)
        running.kill()
        sent = {device_id: got for device_id, got in line.wait().items() if got}
        assert 4000 <= len(sent) < 9000
        running = server()
        line = Stations(running.port, talk, 32)
    answers = line.wait()
    assert all(answers[device_id] == got for device_id, got in sent.items()), "each kept what it was sent"
    assert Counter(status for got in answers.values() for status, _ in got) == {200: 9000, 410: 1000}
    assert len({reply["DeviceName"] for [(status, reply)] in answers.values() if status == 200}) == 9000
    assert running.stop() == 0
    allocated = {row["DeviceID"]: row["DeviceName"] for row in listed(certtool, store)}
    assert allocated == {id_: reply["DeviceName"] for id_, [(status, reply)] in answers.items() if status == 200}


def test_an_idle_server_ends_by_an_interrupt_alone(server: StartServer) -> None:
    running = server()
    running.interrupt()
    assert running.wait() == 0


def test_the_last_replies_leave_before_the_server_ends(server: StartServer) -> None:
    running = server("--import", SAMPLE)
    with socket.create_connection(("127.0.0.1", running.port), PATIENCE) as client:
        client.sendall(ask("MAC-1", product=WIFI) * 20)
        assert client.recv(1)
        assert running.stop() == 0
        received = b"".join(iter(lambda: client.recv(65536), b""))
    assert received.count(b'"Status": "OK"') == 20


# -- starting ----------------------------------------------------------------------------------------------------------


def one_line(text: str) -> str:
    """Return the one line of an error output."""
    [line] = text.splitlines()
    assert line.startswith("certtool: ")
    return line


def test_a_second_server_on_the_same_store_is_refused(server: StartServer, store: Path, certtool: RunCerttool) -> None:
    running = server("--import", SAMPLE)
    for port in (0, running.port):
        refused = one_line(certtool("serve", port, "--host", "127.0.0.1", "--data", store, ok=1).stderr)
        assert f"certtool serve (process {running.process.pid}, port {running.port})" in refused
        assert "stop that first" in refused
    assert running.request(WIFI, "MAC-1")[0] == 200


def test_a_second_server_on_the_same_port_is_refused_and_leaves_no_store(
    server: StartServer, tmp_path: Path, certtool: RunCerttool
) -> None:
    running = server("--import", SAMPLE)
    for host in ("127.0.0.1", "0.0.0.0"):
        other = ("--host", host, "--data", tmp_path / "other")
        refused = one_line(certtool("serve", running.port, *other, ok=1).stderr)
        assert f"Port {running.port} is in use by another program: stop it, or choose another port" in refused
    assert not (tmp_path / "other").exists()
    with contextlib.closing(program.Store(str(tmp_path / "other"), "import")):
        refused = one_line(certtool("serve", running.port, *other, ok=1).stderr)
        assert f"Port {running.port} is in use by another program" in refused, "not by the import"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["http"], 2, "a port is a number from 0 to 65535"),
        (["70000"], 2, "a port is a number from 0 to 65535"),
        (["-1"], 2, "port"),
        (["8000", "9000"], 2, "9000"),
        (["0", "--allow", "192.168.1.x"], 2, "such as 192.168.1.0/24"),
        (["0", "--allow", "10.0.0.0/33"], 2, "such as 192.168.1.0/24"),
        (["0", "--crc-format", "octal"], 2, "octal"),
        (["0", "--hos", "127.0.0.1"], 2, "--hos"),
        (["0", "--host", "192.0.2.77"], 1, "is --host an address of this PC?"),
        (["0", "--host", "no such host"], 1, "is --host an address of this PC?"),
        (["0", "--host", "2001:db8::77"], 1, "is --host an address of this PC?"),
        (["0", "--host", "x" * 300], 1, "is --host an address of this PC?"),
        (["0", "--import", "missing.csv"], 1, "missing.csv cannot be read"),
        (["0", "--import", str(CERTTOOL)], 1, "so the server does not start"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    arguments: Sequence[str], code: int, said: str, certtool: RunCerttool, store: Path
) -> None:
    done = certtool("serve", *arguments, "--data", store, ok=code)
    assert said in done.stderr.splitlines()[-1]
    assert not store.exists() or not list((store / "imports").iterdir())


def test_the_start_shows_the_addresses_and_the_stock_of_each_product(
    server: StartServer, store: Path, tmp_path: Path
) -> None:
    running = server("--import", SAMPLE, "--import", identities.write(tmp_path / "pool.csv", 200), "--host", "0.0.0.0")
    for product, stock in ((WIFI, "10 of 10"), ("a1SampleBt0", "10 of 10")):
        assert f"Product {product}: {stock} certificates left  *** LOW: import more\n" in running.output
    assert f"Product {PRODUCT}: 200 of 200 certificates left\n" in running.output
    assert re.search(rf"^certtool \S+, CRC32 by .+, store {re.escape(str(store))}$", running.output, re.MULTILINE)
    [ready] = [text for text in running.output.splitlines() if text.startswith("Waiting for client request")]
    addresses = re.findall(r"http://([0-9.]+):(\d+)", ready)
    assert addresses[0] == ("127.0.0.1", str(running.port))
    for address, port in addresses:
        with socket.create_connection((address, int(port)), PATIENCE) as client:
            client.sendall(ask("MAC-1", "Connection: close"))
            [(status, _)] = replies(b"".join(iter(lambda: client.recv(65536), b"")))
        assert status == 200


@pytest.mark.skipif(sys.platform not in ("linux", "win32"), reason="the addresses are not known there")
def test_the_address_that_devices_on_the_network_use_is_among_those_that_are_shown(lan: str) -> None:
    shown = program._lan_addresses()
    assert lan in shown
    assert not [address for address in shown if address.startswith("127.")], "for no other PC"


def test_a_server_without_certificates_says_what_to_do_and_serves_them_once_imported(
    server: StartServer, store: Path, certtool: RunCerttool
) -> None:
    running = server()
    assert "There is no certificate yet: add some with certtool.py import FILE" in running.output
    assert running.request(WIFI, "MAC-1")[0] == 404
    certtool("import", SAMPLE, "--data", store)
    assert running.request(WIFI, "MAC-1")[0] == 200


def test_a_start_script_may_import_the_same_file_each_time(server: StartServer) -> None:
    for already in (0, 20):
        running = server("--import", SAMPLE)
        assert f"{20 - already} imported, {already} in the store already" in running.output
        running.stop()


def test_a_server_on_one_address_of_the_lan_is_reached_by_the_commands_of_its_pc(
    server: StartServer, store: Path, certtool: RunCerttool, lan: str
) -> None:
    running = server("--host", lan)
    certtool("import", SAMPLE, "--data", store)
    with socket.create_connection((lan, running.port), PATIENCE) as client:
        client.sendall(ask("MAC-1", "Connection: close", product=WIFI))
        assert b"200 OK" in client.recv(1000)


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "localhost", "::", "::ffff:127.0.0.1", "::FFFF:7F00:1"])
def test_a_server_on_any_address_of_this_pc_is_reached_by_its_commands(
    host: str, server: StartServer, store: Path, certtool: RunCerttool
) -> None:
    if ":" in host and not has_ipv6():
        pytest.skip("this PC has no IPv6")
    running = server("--host", host)
    certtool("import", SAMPLE, "--data", store)
    running.wait_for("Imported 20 of 20 rows")
    shown = re.findall(r"http://(\S+):\d+[/ \n]", running.output)
    assert len(shown) >= 2, "the page and the devices"
    for address in shown:
        assert address.startswith("[") == (":" in address), "as a browser and a firmware want it"
        with socket.create_connection((address.strip("[]"), running.port), PATIENCE) as client:
            client.sendall(ask("MAC-1", "Connection: close", product=WIFI))
            assert b"200 OK" in client.recv(1000)


@pytest.mark.usefixtures("fast")  # an interrupt may come while coverage holds its own lock, and then nothing ends
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_end_in_the_middle_of_the_start_leaves_nothing_behind(number: int, store: Path, tmp_path: Path) -> None:
    pool = identities.write(tmp_path / "pool.csv", 300_000)
    command = [sys.executable, str(CERTTOOL), "serve", "0", "--import", str(pool), "--data", str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as starting:
        while not list(store.glob("imports/*")):
            assert starting.poll() is None
            time.sleep(0.01)
        starting.send_signal(number)
        told, wrong = starting.communicate(timeout=PATIENCE)
    assert (starting.returncode, told) == (0, "Stopped before it was ready: nothing was given out.\n")
    assert wrong == f"certtool: A new, empty store was made: {store}\n"
    assert not list((store / "imports").iterdir())


@pytest.fixture
def lan() -> str:
    """This PC's own address on a network."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        address: str = probe.getsockname()[0]
        if not address.startswith("127."):
            return address
    pytest.skip("this PC is on no network")


# -- commands beside the server ----------------------------------------------------------------------------------------


def test_an_import_beside_the_server_hands_the_rows_over(
    server: StartServer, store: Path, certtool: RunCerttool, tmp_path: Path
) -> None:
    running = server("--import", SAMPLE)
    pool = identities.write(tmp_path / "more.csv", 30)
    report = json.loads(certtool("import", pool, SAMPLE, "--batch", "B7", "--json", "--data", store).stdout)
    assert (report["read"], report["imported"], report["duplicates"], report["rejected"]) == (50, 30, 20, 0)
    running.wait_for("Imported 30 of 50 rows as batch B7.")
    assert running.request(PRODUCT, "MAC-1")[0] == 200
    assert len(listed(certtool, store, "--batch", "B7")) == 30
    running.kill()
    assert server().request(PRODUCT, "MAC-1")[0] == 200


def test_an_import_with_bad_rows_beside_the_server_reports_them_as_one_without(
    server: StartServer, store: Path, certtool: RunCerttool, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("ProductKey,DeviceName,DeviceSecret\na1X,good01,s1\na1X,b,s2\na1X,good02,\n", encoding="utf-8")
    alone = certtool("import", bad, "--data", tmp_path / "other", "--json", ok=1).stdout
    running = server()
    before = (store / "journal.csv").read_bytes()
    assert json.loads(certtool("import", bad, "--data", store, "--json", ok=1).stdout) == json.loads(alone)
    told = certtool("import", bad, "--data", store, ok=1).stderr
    assert [text.split(" ")[0] for text in told.splitlines()] == ["bad.csv:3:", "bad.csv:4:", "certtool:"]
    assert (store / "journal.csv").read_bytes() == before
    assert list((store / "imports").iterdir()) == []
    done = certtool("import", bad, "--data", store, "--skip-bad")
    assert "1 imported" in done.stdout
    assert running.request("a1X", "MAC-1")[1]["DeviceName"] == "good01"


def test_the_line_goes_on_while_100000_rows_are_imported(server: StartServer, store: Path, big: Path) -> None:
    running = server("--import", SAMPLE)
    command = [sys.executable, str(CERTTOOL), "import", str(big), "--data", str(store)]
    longest, count = 0.0, 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=child_env(), encoding="utf-8") as importing:
        with socket.create_connection(("127.0.0.1", running.port), 60) as client:
            while importing.poll() is None:
                began = time.monotonic()
                client.sendall(ask(f"MAC-{count % 9}", product=WIFI))
                [(status, _)] = replies(client.recv(65536))
                longest = max(longest, time.monotonic() - began)
                assert status == 200
                count += 1
        assert importing.stdout
        assert "100,000 imported" in importing.stdout.read()
        assert importing.returncode == 0
    print(f"{count:,} requests during the import, the longest took {1000 * longest:.0f} ms")
    assert count > 20
    assert longest < 10
    assert running.request("a1BigPk0000", "MAC-1")[0] == 200


class Manager:
    """Management requests as another program on this PC would make them."""

    def __init__(self, store: Path, running: Server) -> None:
        holder = json.loads((store / "lock").read_bytes())
        assert holder["port"] == running.port
        self.token: str = holder["token"]
        self.port = running.port

    def bytes_of(self, operation: str, body: bytes, token: str = "", host: str = "127.0.0.1") -> bytes:
        head = post(body, f"Authorization: Bearer {token or self.token}", path=f"/certtool/{operation}")
        return head.replace(b"Host: 192.168.1.10", f"Host: {host}".encode())

    def importing(self, path: Path) -> bytes:
        data = path.read_bytes()
        head = {"options": {"who": "me"}, "files": [[path.name, len(data)]]}
        return self.bytes_of("import", json.dumps(head).encode() + b"\n" + data)


@pytest.mark.parametrize("sent", ["half of it", "all of it"])
def test_an_import_whose_client_is_killed_changes_nothing(
    sent: str, server: StartServer, store: Path, huge: Path, certtool: RunCerttool
) -> None:
    running = server("--import", SAMPLE)
    before = (store / "journal.csv").read_bytes()
    request = Manager(store, running).importing(huge)
    with socket.create_connection(("127.0.0.1", running.port), 60) as client:
        client.sendall(request if sent == "all of it" else request[: len(request) // 2])
        if sent == "all of it":
            until(lambda: len(list((store / "imports").iterdir())) == 2, "the import begins")
    until(lambda: len(list((store / "imports").iterdir())) == 1, "the import is taken back")
    assert running.request(WIFI, "MAC-1")[0] == 200
    running.stop()
    after = (store / "journal.csv").read_bytes()
    assert after.startswith(before)
    assert after[len(before) :].count(b"\n") == 1, "the request alone"
    assert len(listed(certtool, store)) == 20


@pytest.mark.parametrize("end", ["the disk has written it", "the server is stopped"])
def test_an_import_whose_client_goes_while_the_disk_is_slow_holds_up_nobody(
    end: str, inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    syncing, written = threading.Event(), threading.Event()

    def slow_sync(_: program.ImportWriter) -> None:
        syncing.set()
        assert written.wait(PATIENCE)

    server = inside()
    before = sorted(path.name for path in (server.journal.parent / "imports").iterdir())
    monkeypatch.setattr(program.ImportWriter, "sync", slow_sync)
    data = b"ProductKey,DeviceName,DeviceSecret\na1X,good01,s1\n"
    body = json.dumps({"options": {}, "files": [["x.csv", len(data)]]}).encode() + b"\n" + data
    request = post(body, f"Authorization: Bearer {server.server.token}", path="/certtool/import")
    request = request.replace(b"Host: 192.168.1.10", b"Host: localhost")
    with server.connect(request):
        while not syncing.is_set():
            server.turn()
    assert server.say(ask("MAC-1"))[0] == 200
    assert "Another import is under way" in server.say(request)[1]["Message"]
    assert not written.is_set()
    if end == "the server is stopped":
        threading.Timer(0.1, written.set).start()
        server.close()
    else:
        written.set()
        while server.server.jobs:
            server.turn()
    assert sorted(path.name for path in (server.journal.parent / "imports").iterdir()) == before
    assert "a1X" not in server.state.products
    assert server.notices == []


def test_a_second_import_while_one_is_under_way_is_refused(
    server: StartServer, store: Path, huge: Path, certtool: RunCerttool
) -> None:
    running = server()
    with socket.create_connection(("127.0.0.1", running.port), 60) as client:
        client.sendall(Manager(store, running).importing(huge))
        until(lambda: list((store / "imports").iterdir()), "the import begins")
        refused = certtool("import", SAMPLE, "--data", store, ok=1)
        assert "Another import is under way: wait until it is done, and try again." in refused.stderr
        [(status, reply)] = replies(client.recv(65536))
    assert (status, reply["Report"]["imported"]) == (200, 600_000)
    certtool("import", SAMPLE, "--data", store)


def test_an_import_that_the_server_does_not_live_to_finish_is_refused_and_changes_nothing(
    server: StartServer, store: Path, huge: Path, certtool: RunCerttool
) -> None:
    running = server("--import", SAMPLE)
    command = [sys.executable, str(CERTTOOL), "import", str(huge), "--data", str(store)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=child_env(), encoding="utf-8") as importing:
        until(lambda: len(list((store / "imports").iterdir())) == 2, "the import begins")
        assert running.stop() == 0
        assert importing.stderr
        assert "The running server ended before it answered" in one_line(importing.stderr.read())
    assert importing.returncode == 1
    assert len(listed(certtool, store)) == 20


def test_a_defect_in_an_import_is_told_and_the_line_goes_on(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError("top secret")

    server = inside()
    before = server.journal.read_bytes()
    monkeypatch.setattr(program, "IdentityFile", crash)
    body = b'{"options": {}, "files": [["x.csv", 1]]}\nx'
    request = post(body, f"Authorization: Bearer {server.server.token}", path="/certtool/import")
    status, reply = server.say(request.replace(b"Host: 192.168.1.10", b"Host: localhost"))
    assert (status, reply["Message"]) == (500, "Something unexpected happened here; the server's screen says where.")
    assert re.match("Please report: ZeroDivisionError in crash", server.notices[-1])
    assert server.journal.read_bytes() == before
    assert server.say(ask("MAC-1"))[0] == 200


def test_a_new_job_begins_at_once_and_one_that_nobody_waits_for_takes_one_step_a_turn(
    inside: Callable[..., Inside],
) -> None:
    server = inside().server
    steps: List[str] = []

    def endless(name: str) -> Generator[None, None, None]:
        while True:
            steps.append(name)
            yield

    server.start_job("old", endless("old"), None)
    server.turn(0)
    server.turn(0)
    server.start_job("new", endless("new"), None)
    for _ in range(3):
        server.turn(0)
    assert steps == ["old", "old", "new", "old", "new"]


def test_a_port_for_administrators_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(program.CertServer, "server_bind", denied)
    with pytest.raises(program.CertToolError, match="Port 80 is not free for us: choose one above 1023"):
        program.CertServer("127.0.0.1", 80, print, print)


@pytest.mark.skipif(sys.platform == "win32", reason="no SO_REUSEPORT")
def test_no_other_program_shares_the_port_whatever_the_standard_library_lets_its_servers_do(
    monkeypatch: pytest.MonkeyPatch, lan: str
) -> None:
    monkeypatch.setattr(http.server.HTTPServer, "allow_reuse_port", True, raising=False)
    with program.CertServer(lan, 0, print, print) as server, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, vars(socket)["SO_REUSEPORT"], 1)
        for address in (lan, server.own_address):
            with pytest.raises(OSError, match="in use"):
                other.bind((address, server.server_port))


def test_an_import_beside_the_server_needs_no_room_that_is_not_there(
    server: StartServer, store: Path, big: Path
) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux lets another process's limits be set")
    else:
        import resource  # noqa: PLC0415 - not everywhere

        running = server("--import", SAMPLE)
        unlimited = resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (1_000_000, unlimited[1]))
        reply = json.loads(raw_last(running, Manager(store, running).importing(big)))
        assert reply["Status"] == "StoreUnavailable"
        assert "free the store's disk" in reply["Message"]
        assert len(list((store / "imports").iterdir())) == 1
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, unlimited)
        assert running.request(WIFI, "MAC-1")[0] == 200


def raw_last(running: Server, data: bytes) -> bytes:
    return raw(running.port, data.replace(b"\r\n", b"\r\nConnection: close\r\n", 1), timeout=60).partition(b"\r\n\r\n")[
        2
    ]


def test_release_and_void_do_the_same_beside_a_server_and_without(
    server: StartServer, store: Path, tmp_path: Path, certtool: RunCerttool
) -> None:
    def operate(folder: Path) -> List[Tuple[int, str, str]]:
        done = []
        for code, command in (
            (1, ["release", names[0], "--reason", "never asked"]),
            (0, ["release", names[1], "--reason", "chip lost"]),
            (1, ["release", names[2], "--reason", "board scrapped"]),
            (0, ["release", names[2], "--reason", "board scrapped", "--force"]),
            (0, ["void", names[3], "--reason", "泄露"]),
            (1, ["release", names[3], "--reason", "no", "--force"]),
            (1, ["void", "nobody", "--reason", "typing error"]),
        ):
            ended = certtool(*command, "--data", folder, ok=code)
            done.append((code, ended.stdout, ended.stderr))
        return done

    names = [row.split(",")[1] for row in SAMPLE.read_text(encoding="utf-8").splitlines()[1:]]
    results, states = [], []
    for folder in (store, tmp_path / "other"):
        running = server("--import", SAMPLE, store=folder)
        for device_id, action in (("used", 0), ("lost", 0), ("scrap", 0), ("scrap", 1), ("leak", 0)):
            assert running.report(WIFI, device_id, action)[0] == 200
        if folder != store:
            running.stop()
        [names[0]] = [row["DeviceName"] for row in listed(certtool, folder) if not row["DeviceID"]][:1]
        names[1:4] = [
            listed(certtool, folder, "--device-id", id_)[0]["DeviceName"] for id_ in ("lost", "scrap", "leak")
        ]
        results.append(operate(folder))
        kept = ("DeviceName", "Status", "DeviceID")
        states.append([[row[column] for column in kept] for row in listed(certtool, folder)])
        assert running.process.poll() is not None or running.request(WIFI, "leak")[0] == 409
        journal = (folder / "journal.csv").read_text(encoding="utf-8")
        assert '""reason"":""泄露""' in journal
        assert journal.count(f'""who"":""{program._who()}""') == 4, "the import, two releases, one void"
    assert results[0] == results[1]
    assert states[0] == states[1]


def test_a_released_certificate_is_given_to_the_next_device_when_no_other_is_left(
    server: StartServer, store: Path, tmp_path: Path, certtool: RunCerttool
) -> None:
    running = server("--import", identities.write(tmp_path / "one.csv", 1))
    first = running.request(PRODUCT, "MAC-1")[1]
    assert running.request(PRODUCT, "MAC-2")[0] == 410
    certtool("release", first["DeviceName"], "--reason", "wrong device", "--data", store)
    assert running.request(PRODUCT, "MAC-2") == (200, {**first, "DeviceID": "MAC-2"})
    assert running.request(PRODUCT, "MAC-1")[0] == 410


def test_query_reads_beside_the_server_and_changes_nothing(
    server: StartServer, store: Path, certtool: RunCerttool
) -> None:
    running = server("--import", SAMPLE)
    running.request(WIFI, "MAC-1")
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    [row] = listed(certtool, store, "--device-id", "MAC-1")
    assert (row["Status"], row["Station"]) == ("Allocated", "127.0.0.1")
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    assert running.report(WIFI, "MAC-1", 1)[0] == 200


def test_only_this_pc_with_the_token_manages(server: StartServer, store: Path, certtool: RunCerttool, lan: str) -> None:
    running = server("--import", SAMPLE, "--host", "0.0.0.0")
    manager = Manager(store, running)
    name = listed(certtool, store)[0]["DeviceName"]
    body = json.dumps({"device_name": name, "reason": "because"}).encode()
    head = b'{"options": {}, "files": [["x.csv", 4]]}\nx,y\n'
    before = (store / "journal.csv").read_bytes()
    for operation, content in (("void", body), ("release", body), ("import", head), ("import", b"x" * 100_000)):
        for address, data in {
            "a wrong token": ("127.0.0.1", manager.bytes_of(operation, content, token="x" * 43)),
            "a token that is no ASCII": ("127.0.0.1", manager.bytes_of(operation, content, token="ä")),
            "no token": ("127.0.0.1", post(content, path=f"/certtool/{operation}")),
            "a page of another site": ("127.0.0.1", manager.bytes_of(operation, content, host="evil.example")),
            "a name that a site may own": ("127.0.0.1", manager.bytes_of(operation, content, host="127.0.0.1.evil")),
            "another PC": (lan, manager.bytes_of(operation, content)),
        }.values():
            with socket.create_connection((address, running.port), PATIENCE) as client:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                [(status, reply)] = replies(b"".join(iter(lambda c=client: c.recv(65536), b"")))  # type: ignore[misc]
            assert (status, reply["Status"]) == (403, "Forbidden")
    assert (store / "journal.csv").read_bytes() == before
    [(status, _)] = replies(raw(running.port, manager.bytes_of("void", body), shutdown=True))
    assert status == 200, "the right token from here is let in"
    assert running.stop() == 0
    assert manager.token not in running.output + running.errors + (store / "journal.csv").read_text(encoding="utf-8")
    assert (store / "lock").read_bytes() == b"", "the token is gone with the server"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX rights")
def test_nobody_else_on_this_pc_can_read_the_store(server: StartServer, store: Path) -> None:
    running = server("--import", SAMPLE)
    running.request(WIFI, "MAC-1")
    assert store.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in store.rglob("*")} == {0}


VOID = b'{"device_name": "WCBX1KpeZUaLJ4d8jOCs", "reason": %s}'


@pytest.mark.parametrize(
    ("operation", "body", "expected"),
    [
        ("destroy", b"{}", (400, "There is no such management request.")),
        ("void", b"[]", (400, "The body is not a JSON object.")),
        ("void", b"{}", (409, "There is no certificate of this DeviceName in the store: check the name.")),
        ("void", VOID % b"null", (409, "A reason is needed: give it with --reason.")),
        ("void", VOID % b'" "', (409, "A reason is needed: give it with --reason.")),
        ("import", b"{}\n", (400, "The import request is malformed.")),
        ("import", b'{"options": {"x": 1}, "files": []}\n', (400, "The import request is malformed.")),
        ("import", b'{"options": {}, "files": [["a", "b"]]}\n', (400, "The import request is malformed.")),
        ("import", b'{"options": {}, "files": [["a", 9]]}\n1', (400, "does not hold the files that it names.")),
        ("import", b'{"options": {}, "files": []}\nmore', (400, "does not hold the files that it names.")),
        ("import", b'{"options": {"batch": 5}, "files": []}\n', (400, "The import request is malformed.")),
        ("import", b'{"options": {"skip_bad": "no"}, "files": []}\n', (400, "The import request is malformed.")),
        ("import", b'{"options": {"batch": "\\ud800"}, "files": []}\n', (400, "The body is not one JSON object.")),
        ("import", b'{"options": {"product_key": "a b"}, "files": []}\n', (400, "characters without white space.")),
        ("import", b'{"options": {"product_secret": "1.2E+15"}, "files": []}\n', (400, "save it in a spreadsheet.")),
        ("import", b'{"options": {"product_id": "\xc3\xa9"}, "files": []}\n', (400, "characters without white space.")),
    ],
)
def test_a_management_request_that_means_nothing_is_refused(
    operation: str, body: bytes, expected: Tuple[int, str], server: StartServer, store: Path
) -> None:
    running = server("--import", SAMPLE)
    [(status, reply)] = replies(raw(running.port, Manager(store, running).bytes_of(operation, body), shutdown=True))
    assert (status, reply["Message"][-len(expected[1]) :]) == expected


# -- the operator's console --------------------------------------------------------------------------------------------


def test_the_console_shows_a_line_for_each_event_and_never_a_secret(
    server: StartServer, store: Path, certtool: RunCerttool
) -> None:
    running = server("--import", SAMPLE)
    name = running.request(WIFI, "MAC-1")[1]["DeviceName"]
    running.request(WIFI, "MAC-1")
    running.report(WIFI, "MAC-1", 1)
    running.report(WIFI, "MAC-1", 1)
    running.request(WIFI, "MAC-1")
    running.report(WIFI, "MAC-1", 2)
    running.report(WIFI, "MAC-9", 2)
    running.request("a1Nobody", "MAC-9")
    running.post(b"{}")
    raw(running.port, b"\x16\x03")
    certtool("void", "no-one", "--reason", "scrap", "--data", store, ok=1)
    certtool("void", name, "--reason", "scrap", "--data", store)
    running.request(WIFI, "MAC-1")
    running.stop()
    shown = [text for text in running.output.splitlines() if re.match(r"\d\d:\d\d:\d\d  ", text)]
    unknown = "(a1Nobody): No certificate of this ProductKey was ever imported: check it, or import its file."
    no_device = "This DeviceID holds no certificate of this product: request one before reporting."
    no_key = "ProductKey must be a string of 1-64 printable ASCII characters."
    no_http = "This is not an HTTP request: send POST / HTTP/1.1 with a JSON body."
    voided = "The certificate of this DeviceID was voided: ask the line's operator."
    no_name = "There is no certificate of this DeviceName in the store: check the name."
    assert [re.split(" {2,}", text, maxsplit=1)[1].split(None, 4) for text in shown] == [
        ["127.0.0.1", "request", "MAC-1", name, "allocated"],
        ["127.0.0.1", "request", "MAC-1", name, "same again"],
        ["127.0.0.1", "burned", "MAC-1", name, "Written"],
        ["127.0.0.1", "burned", "MAC-1", name, "same again"],
        ["127.0.0.1", "request", "MAC-1", name, "same again, is Written"],
        ["127.0.0.1", "failed", "MAC-1", name, "Failed"],
        ["127.0.0.1", "failed", "MAC-9", "-", f"refused: UnknownDevice ({WIFI}): {no_device}"],
        ["127.0.0.1", "request", "MAC-9", "-", f"refused: UnknownProduct {unknown}"],
        ["127.0.0.1", "?", "-", "-", f"refused: BadRequest: {no_key}"],
        ["127.0.0.1", "-", "-", "-", f"refused: 400 BadRequest: {no_http}"],
        ["127.0.0.1", "void", "-", "no-one", f"refused: Refused: {no_name}"],
        ["127.0.0.1", "void", "-", name, "voided"],
        ["127.0.0.1", "request", "MAC-1", "-", f"refused: Voided ({WIFI}): {voided}"],
    ]
    secrets = re.findall(r"[A-Za-z0-9]{32}|0lR8acRYSi4MDF8k", SAMPLE.read_text(encoding="utf-8"))
    assert not any(secret in running.output + running.errors for secret in secrets)
    assert running.output.endswith("Stopped. Everything that was answered is on the disk.\n")


def test_the_operator_is_warned_once_of_a_low_stock_and_once_of_an_empty_one(
    server: StartServer, tmp_path: Path
) -> None:
    running = server("--import", identities.write(tmp_path / "pool.csv", 103))
    low, empty = f"Only 99 certificates of product {PRODUCT} are left", f"No certificate of product {PRODUCT} is left"
    for number in range(3):
        running.request(PRODUCT, f"MAC-{number}")
    time.sleep(0.6)
    assert low not in running.output
    for number in range(3, 110):
        running.request(PRODUCT, f"MAC-{number % 105}")
    running.wait_for(empty)
    running.stop()
    assert (running.output.count(low), running.output.count(empty)) == (1, 1)


def test_many_events_are_summed_up_and_none_is_lost(server: StartServer, tmp_path: Path) -> None:
    running = server("--import", identities.write(tmp_path / "pool.csv", 900))
    Stations(running.port, {f"line-{number}": (0, 1) for number in range(900)}, 8).wait()
    running.wait_for("many at once: ")
    time.sleep(2.5)
    running.request(PRODUCT, "a quiet minute later")
    running.wait_for("a quiet minute later")
    running.stop()
    sums = re.findall(r"  many at once: (.*)", running.output)
    for kind in ("allocated", "Written"):
        lines = len(re.findall(rf"line-\S+ +\S+ +{kind}$", running.output, re.MULTILINE))
        summed = sum(int(count) for text in sums for count in re.findall(rf"(\d+) {kind}", text))
        assert lines + summed == 900
    assert len(running.output.splitlines()) < 300


def test_what_a_stuck_screen_missed_is_counted_when_it_goes_on() -> None:
    class Screen(io.StringIO):
        stuck, goes_on = threading.Event(), threading.Event()

        def write(self, text: str) -> int:
            self.stuck.set()
            assert self.goes_on.wait(PATIENCE)
            return super().write(text)

    screen = Screen()
    console = program.Console(screen)
    event = program.RequestEvent(1, "127.0.0.1", "request", "MAC-1", "name", "allocated")
    console.events([event])
    assert screen.stuck.wait(PATIENCE)
    total = program.CONSOLE_BACKLOG + 500
    for _ in range(total):
        console.events([event])
    console.notify("This matters.")
    screen.goes_on.set()
    assert console.close()
    shown = screen.getvalue()
    assert "*** This matters." in shown
    counts = [int(count.replace(",", "")) for count in re.findall(r"([\d,]+) (?:allocated|not shown)", shown)]
    assert sum(counts) + len(re.findall(r"MAC-1 .*allocated", shown)) == total + 1
    assert " not shown" in shown


@pytest.mark.parametrize("gone", [False, True], ids=["full disk", "reader gone"])
def test_the_console_goes_on_after_an_error_unless_nobody_reads_it_any_more(gone: bool) -> None:
    class Screen(io.StringIO):
        failed = threading.Event()

        def write(self, text: str) -> int:
            if not self.failed.is_set():
                self.failed.set()
                raise BrokenPipeError if gone else OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    screen = Screen()
    console = program.Console(screen)
    console.notify("This is lost.")
    assert screen.failed.wait(PATIENCE)
    console.notify("This is shown.")
    assert console.close()
    assert ("This is shown." in screen.getvalue()) == (not gone)


class Unread:
    """A server whose output is read only until it is ready."""

    def __init__(self, store: Path) -> None:
        command = [sys.executable, str(CERTTOOL), "serve", "0", "--host", "127.0.0.1", "--data", str(store)]
        self.process = subprocess.Popen(
            [*command, "--import", str(SAMPLE)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=child_env()
        )
        assert self.process.stdout
        self.stdout = self.process.stdout
        line = b""
        while b"Waiting" not in line:
            line = self.stdout.readline()
        self.port = int(line.rpartition(b":")[2])

    def stop(self) -> int:
        """Interrupt it; return its exit code. It must have had nothing to complain about."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.stderr
        with self.process.stderr as errors:
            [_] = errors.read().splitlines()  # a new store was made
        self.stdout.close()
        return self.process.wait(20)


@pytest.fixture
def unread(store: Path) -> Iterator[Unread]:
    if sys.platform == "win32":
        pytest.skip("a pipe's size cannot be set there")
    running = Unread(store)
    yield running
    running.process.kill()
    running.process.wait()


def test_a_screen_that_takes_no_output_holds_up_no_request_and_no_end(unread: Unread) -> None:
    if sys.platform != "linux":
        pytest.skip("a pipe's size cannot be set here")
    else:
        import fcntl  # noqa: PLC0415 - not everywhere

        fcntl.fcntl(unread.stdout, 1031, 4096)  # F_SETPIPE_SZ, which 3.8 has no name for
        for _ in range(5):
            began = time.monotonic()
            for _ in range(40):
                [(status, _)] = replies(raw(unread.port, ask("x" * 60, product=WIFI), shutdown=True))
                assert status == 200
            time.sleep(max(0, 0.3 - (time.monotonic() - began)))
        assert unread.stop() == 0


def test_a_screen_that_is_gone_holds_up_no_request_and_no_end(unread: Unread) -> None:
    unread.stdout.close()
    for _ in range(3):
        [(status, _)] = replies(raw(unread.port, ask("MAC-1", product=WIFI), shutdown=True))
        assert status == 200
        time.sleep(0.4)
    assert unread.stop() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell that closes a stream")
def test_a_server_without_any_screen_serves(store: Path) -> None:
    command = [sys.executable, str(CERTTOOL), "serve", "0", "--host", "127.0.0.1", "--data", str(store)]
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *command, "--import", str(SAMPLE)]
    with subprocess.Popen(shell, stderr=subprocess.PIPE, env=child_env(), encoding="utf-8") as running:
        until(lambda: (store / "lock").exists() and b"port" in (store / "lock").read_bytes(), "it is ready")
        port = json.loads((store / "lock").read_bytes())["port"]
        [(status, _)] = replies(raw(port, ask("MAC-1", product=WIFI), shutdown=True))
        assert status == 200
        time.sleep(0.5)
        running.send_signal(signal.SIGTERM)
        assert running.stderr
        errors = running.stderr.read()
    no_traceback(errors)
    assert (running.returncode, len(errors.splitlines())) == (0, 1), "a new store was made, and nothing else is told"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_long_import_shows_its_progress_on_a_terminal_and_wipes_it(store: Path, huge: Path) -> None:
    if sys.platform != "win32":
        import pty  # noqa: PLC0415 - not everywhere

        terminal, its_end = pty.openpty()
        command = [sys.executable, str(CERTTOOL), "import", str(huge), "--data", str(store)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=its_end, env=child_env()) as importing:
            os.close(its_end)
            seen, more = b"", b"-"
            with contextlib.suppress(OSError):  # how Linux tells the end
                while more:
                    more = os.read(terminal, 4096)
                    seen += more
            os.close(terminal)
        assert importing.returncode == 0
        assert re.search(rb"\rimporting[^\r]*: +\d+% ", seen)
        assert re.search(rb"% +\r +\r$", seen)
        assert b"\x1b" not in seen, "a Windows console shows it as it is"


SLOW_DISK = """
import signal, sys, time, certtool
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
write = certtool.ImportWriter.write
certtool.ImportWriter.write = lambda *rows: (time.sleep(0.05), write(*rows))
sys.exit(certtool.main())
"""


@pytest.mark.usefixtures("fast")  # an interrupt may come while coverage holds its own lock, and then nothing ends
@pytest.mark.skipif(sys.platform == "win32", reason="needs a signal to one process")
def test_an_import_that_is_interrupted_changes_nothing(store: Path, big: Path, certtool: RunCerttool) -> None:
    command = [sys.executable, "-c", SLOW_DISK, "import", str(big), "--data", str(store)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=child_env(), encoding="utf-8", cwd=ROOT) as importing:
        until(lambda: (store / "imports").exists() and list((store / "imports").iterdir()), "the import begins")
        importing.send_signal(signal.SIGINT)
        assert importing.stderr
        errors = importing.stderr.read()
    assert importing.returncode == 1
    assert "Interrupted. What was under way may have happened: look with certtool.py query." in errors.splitlines()[-1]
    no_traceback(errors)
    assert list((store / "imports").iterdir()) == []
    assert "No certificate matches" in certtool("query", "--data", store, ok=1).stderr
