"""The Node.js SDK, on the Node here and on Node 12: against a real server, a hostile one, and the vectors."""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest

from tests import hostile
from tests.support import ROOT, SAMPLE, RunCerttool, Server, StartServer, child_env, missing, need, no_traceback
from tests.vectorset import Answer, Play, Vector, content, load

FOLDER = ROOT / "client" / "NodeJS"
SDK = FOLDER / "devReqCert.js"
NODE_12 = "12.22.12"
KEY = "a1SampleWf0"
SLACK = 3.0  # seconds that a busy machine may add to a time limit

# Makes each call that a line of stdin names, and prints a line for each time its callback was called.
DRIVER = """
const sdk = require(process.argv[1]);
require('readline').createInterface({ input: process.stdin }).on('line', (line) => {
  const { call, args, options } = JSON.parse(line);
  sdk[call](...args, (text, error) => {
    console.log(JSON.stringify({ line, text, code: error && error.code, message: error && error.message }));
  }, options);
});
"""


@functools.lru_cache(maxsize=None)
def node_12() -> str:
    """Return the path of a Node 12, got with npm once and kept in tests/node_modules."""
    node, npm = need("node"), need("npm")
    here = subprocess.check_output([node, "-p", "process.platform + '-' + process.arch"], text=True).strip()
    package = "node-" + here.replace("win32", "win")
    folder = ROOT / "tests" / "node_modules" / package / "bin"
    if not folder.exists():
        options = ["--no-save", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
        command = [npm, "install", *options, "--prefix", str(ROOT / "tests"), f"{package}@{NODE_12}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        if done.returncode:
            missing(f"npm did not install Node {NODE_12}: {done.stderr.strip()[-300:]}")
    return str(next(folder.glob("node*")))


class Station:
    """A Node process with the SDK, which makes one call after another."""

    def __init__(self, node: str) -> None:
        command = [node, "-e", DRIVER, str(SDK)]
        pipe = subprocess.PIPE
        env = child_env(http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9", NODE_USE_ENV_PROXY="1")
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", env=env)

    def call(self, call: str, *args: Any, **options: Any) -> Dict[str, Any]:
        """Return what the callback got; the first line must be this call's, so none may call back twice."""
        assert self.process.stdin
        assert self.process.stdout
        line = json.dumps({"call": call, "args": args, "options": options, "at": time.monotonic()})
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        got = self.process.stdout.readline()
        assert got, self.process.communicate()
        answer: Dict[str, Any] = json.loads(got)
        assert answer.pop("line") == line, "a callback came twice"
        fields = json.loads(answer["text"])
        if answer["code"] is not None:
            assert fields == {"Status": answer["code"], "Message": answer["message"]}
        return answer

    def request(self, port: int, device_id: Optional[str], product_key: str = KEY, **options: Any) -> Dict[str, Any]:
        return self.call("req_dev_cert", f"127.0.0.1:{port}", product_key, device_id, **options)

    def report(self, port: int, device_id: Optional[str], result: bool, **options: Any) -> Dict[str, Any]:
        return self.call("send_burn_result_by_did", f"127.0.0.1:{port}", KEY, device_id, result, **options)

    def ask(self, server: Server, product_key: str, device_id: Optional[str], action: int) -> Answer:
        """Be the client of a script of states.json."""
        assert product_key == KEY
        if action:
            answer = self.report(server.port, device_id, action == 1, delay=10)
        else:
            answer = self.request(server.port, device_id, delay=10)
        fields = json.loads(answer["text"])
        return Answer(fields["Status"], fields)

    def close(self) -> None:
        """End it: no call is left running, nothing was printed to stderr, no rejection was unhandled."""
        out, err = self.process.communicate(timeout=20)
        assert (out, err, self.process.returncode) == ("", "", 0)


@pytest.fixture(scope="module", params=["node", "Node 12"])
def station(request: pytest.FixtureRequest) -> Iterator[Station]:
    made = Station(need("node") if request.param == "node" else node_12())
    with contextlib.closing(made):
        yield made


@contextlib.contextmanager
def replying(reply: bytes) -> Iterator[hostile.Hostile]:
    """Serve one reply to whatever is asked."""
    with hostile.serve("plain") as server:
        server.script = lambda _server, _request: [reply]
        yield server


def names(vector: Vector) -> str:
    return str(vector["name"])


@pytest.mark.parametrize("killed", [False, True], ids=["kept running", "killed before every step"])
@pytest.mark.parametrize("script", load("states.json"), ids=names)
def test_every_row_of_the_state_table(
    station: Station, script: Vector, killed: bool, store: Path, server: StartServer, certtool: RunCerttool
) -> None:
    Play(script, station.ask, killed, store, server, certtool)


def test_a_station_that_waits_through_a_restart_gets_the_certificate_it_had(
    station: Station, server: StartServer, store: Path
) -> None:
    first = server("--import", SAMPLE)
    before = station.request(first.port, "MAC-0001")
    first.kill()
    assert station.report(first.port, "MAC-0001", True, retries=0)["code"] == "Unreachable"
    second = server(store=store)
    assert station.request(second.port, "MAC-0001") == before
    assert station.report(second.port, "MAC-0001", True)["code"] is None


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_a_hostile_server_gives_the_right_certificate_or_one_error_in_time(station: Station, kind: str) -> None:
    began = time.monotonic()
    with hostile.serve(kind) as server:
        answer = station.request(server.port, "MAC-0001", timeout=1200, retries=1, delay=10)
        assert time.monotonic() - began < 1.2 + SLACK
        assert server.connections <= 2
    if hostile.VERDICT[kind] != hostile.EITHER:
        assert (answer["code"] is None) == (hostile.VERDICT[kind] == hostile.SUCCEEDS), answer
    if answer["code"] is None:
        got = json.loads(answer["text"])
        wanted = hostile.certificate({"ProductKey": KEY, "DeviceID": "MAC-0001", "Action": 0})
        for name in ("ProductKey", "DeviceName", "DeviceSecret", "ProductSecret", "DeviceID", "Status"):
            assert got[name] == wanted[name]


@pytest.mark.parametrize("kind", ["no Content-Length", "chunked valid", "100 Continue first", "two replies"])
def test_a_reply_is_taken_in_every_framing_that_http_allows(station: Station, kind: str) -> None:
    with hostile.serve(kind) as server:
        assert station.request(server.port, "MAC-0001", retries=0)["code"] is None


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_a_request_without_a_device_id_is_not_repeated_once_it_may_have_taken_a_certificate(
    station: Station, kind: str
) -> None:
    with hostile.serve(kind) as server:
        station.request(server.port, None, timeout=700, retries=3, delay=10)
        assert server.connections == (2 if kind == "status 503 then OK" else 1)


def test_a_request_without_a_device_id_is_repeated_while_the_server_is_not_up_yet(station: Station) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    began = time.monotonic()
    assert station.request(port, None, retries=2, delay=100)["code"] == "Unreachable"
    assert time.monotonic() - began >= 0.3, "two pauses, of 100 and 200 ms"


def test_a_request_that_cannot_be_repeated_is_waited_for_until_the_time_limit(station: Station) -> None:
    with hostile.serve("plain") as server:
        late = [0.6, hostile.http(json.dumps(hostile.certificate({"ProductKey": KEY})).encode())]
        server.script = lambda _server, _request: late
        assert station.request(server.port, None, timeout=1500, retries=9)["code"] is None
        assert server.connections == 1


@pytest.mark.parametrize("kind", ["status 503 then OK", "reset then OK", "cut then OK"])
def test_a_report_is_repeated_until_it_is_acknowledged(station: Station, kind: str) -> None:
    with hostile.serve(kind) as server:
        assert station.report(server.port, "MAC-0001", False, delay=10)["code"] is None
        sent = {"ProductKey": KEY, "DeviceID": "MAC-0001", "Action": 2}
        assert json.loads(server.requests[-1].decode()) == sent


@pytest.mark.parametrize("vector", load("replies.json"), ids=names)
def test_a_reply_is_taken_or_refused_as_every_client_must(station: Station, vector: Vector) -> None:
    with replying(hostile.http(content(vector), status=f"{vector['http']} Some")) as server:
        if vector["Action"]:
            answer = station.report(server.port, vector["DeviceID"], vector["Action"] == 1, retries=0)
        else:
            answer = station.request(server.port, vector["DeviceID"], vector["ProductKey"], retries=0)
    if "expect" in vector:
        assert answer["code"] is None, answer
        fields = json.loads(answer["text"])
        assert {name: fields.get(name, "") for name in vector["expect"]} == vector["expect"]
        assert answer["text"].encode() == content(vector)
    else:
        codes = {"NotJSON": "BadReply", "BadField": "BadReply"}
        assert answer["code"] == vector.get("status", codes.get(vector["error"], vector["error"]))


def test_the_checksum_of_every_payload(station: Station) -> None:
    del station  # which has shown that this Node runs
    code = "const {crc32} = require(process.argv[1]); for (const p of JSON.parse(process.argv[2])) console.log(crc32(Buffer.from(p)))"
    vectors = load("payloads.json")
    payloads = ["".join(vector[name] for name in ("pk", "dn", "ds", "ps", "product_id")) for vector in vectors]
    out = subprocess.check_output([need("node"), "-e", code, str(SDK), json.dumps(payloads)], text=True)
    assert [int(line) for line in out.split()] == [vector["crc32_int"] for vector in vectors]


def test_a_server_that_sends_the_checksum_as_a_number_is_understood(station: Station, server: StartServer) -> None:
    running = server("--import", SAMPLE, "--crc-format", "int")
    answer = station.request(running.port, "MAC-0001")
    assert answer["code"] is None
    assert isinstance(json.loads(answer["text"])["CRC32"], int)
    assert station.request(running.port, "MAC-0001", "a1SampleBt0")["code"] is None
