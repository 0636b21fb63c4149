"""The Node.js SDK, on the Node here and on Node 12: against a real server, a hostile one, and the vectors."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest

from tests import hostile, identities
from tests.support import ROOT, SAMPLE, RunCerttool, Server, StartServer, child_env, listed, need, npm_package
from tests.vectorset import Answer, Play, Vector, content, load, name_of

pytestmark = pytest.mark.usefixtures("fast")

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
    const fields = Object.assign(JSON.parse(text), { Extra: undefined });
    console.log(JSON.stringify({ line, text, fields, code: error && error.code, message: error && error.message }));
  }, options);
});
"""


@functools.lru_cache(maxsize=None)
def node_12() -> str:
    """Return the path of a Node 12, got with npm once."""
    ask = [need("node"), "-p", "process.platform + '-' + process.arch"]
    here = subprocess.check_output(ask, text=True).strip().replace("win32", "win")
    folder = npm_package(f"node-{here}", NODE_12) / "bin"
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
        if answer["code"] is not None:
            assert answer["fields"] == {"Status": answer["code"], "Message": answer["message"]}
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
        return Answer(answer["fields"]["Status"], answer["fields"])

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


@pytest.mark.parametrize("killed", [False, True], ids=["kept running", "killed before every report"])
@pytest.mark.parametrize("script", load("states.json"), ids=name_of)
def test_every_row_of_the_state_table(
    station: Station, script: Vector, killed: bool, store: Path, server: StartServer, inline: RunCerttool
) -> None:
    Play(script, station.ask, killed, store, server, inline)


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
    verdict = hostile.VERDICT[kind]
    limit = 0.8 if verdict == hostile.FAILS else 10.0  # seconds
    began = time.monotonic()
    with hostile.serve(kind) as server:
        answer = station.request(server.port, "MAC-0001", timeout=limit * 1000, retries=1, delay=10)
        assert time.monotonic() - began < limit + SLACK
        assert server.connections <= 2
    if verdict != hostile.EITHER:
        assert (answer["code"] is None) == (verdict == hostile.SUCCEEDS), answer
    if answer["code"] is None:
        wanted = hostile.certificate({"ProductKey": KEY, "DeviceID": "MAC-0001", "Action": 0})
        for name in ("ProductKey", "DeviceName", "DeviceSecret", "ProductSecret", "DeviceID", "Status"):
            assert answer["fields"][name] == wanted[name]


@pytest.mark.parametrize("kind", ["no Content-Length", "chunked valid", "100 Continue first", "two replies"])
def test_a_reply_is_taken_in_every_framing_that_http_allows(station: Station, kind: str) -> None:
    with hostile.serve(kind) as server:
        assert station.request(server.port, "MAC-0001", retries=0)["code"] is None


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_a_request_without_a_device_id_is_not_repeated_once_it_may_have_taken_a_certificate(
    station: Station, kind: str
) -> None:
    with hostile.serve(kind) as server:
        station.request(server.port, None, timeout=500, retries=3, delay=10)
        if kind == "status 503 then OK":  # nothing was given out, says the contract
            assert server.connections == 2
        elif kind != "reset at once":  # a connection that broke before anything was sent took no certificate
            assert server.connections == 1


def test_a_request_without_a_device_id_is_repeated_while_the_server_is_not_up_yet(station: Station) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    began = time.monotonic()
    assert station.request(port, None, retries=2, delay=100)["code"] == "Unreachable"
    assert time.monotonic() - began >= 0.3, "two pauses, of 100 and 200 ms"


def test_a_request_that_cannot_be_repeated_is_waited_for_until_the_time_limit(station: Station) -> None:
    with hostile.serve("plain") as server:
        late: List[hostile.Step] = [0.6, hostile.http(json.dumps(hostile.certificate({"ProductKey": KEY})).encode())]
        server.script = lambda _server, _request: late
        assert station.request(server.port, None, timeout=1500, retries=9)["code"] is None
        assert server.connections == 1


@pytest.mark.parametrize("kind", ["status 503 then OK", "reset then OK", "cut then OK"])
def test_a_report_is_repeated_until_it_is_acknowledged(station: Station, kind: str) -> None:
    with hostile.serve(kind) as server:
        assert station.report(server.port, "MAC-0001", False, delay=10)["code"] is None
        sent = {"ProductKey": KEY, "DeviceID": "MAC-0001", "Action": 2}
        assert json.loads(server.requests[-1].decode()) == sent


@pytest.mark.parametrize("vector", load("replies.json"), ids=name_of)
def test_a_reply_is_taken_or_refused_as_every_client_must(station: Station, vector: Vector) -> None:
    with replying(hostile.http(content(vector), status=f"{vector['http']} Some")) as server:
        if vector["Action"]:
            answer = station.report(server.port, vector["DeviceID"], vector["Action"] == 1, retries=0)
        else:
            answer = station.request(server.port, vector["DeviceID"], vector["ProductKey"], retries=0)
    if "expect" in vector:
        assert answer["code"] is None, answer
        assert {name: answer["fields"].get(name, "") for name in vector["expect"]} == vector["expect"]
        assert answer["text"].encode() == content(vector)
    else:
        codes = {"NotJSON": "BadReply", "BadField": "BadReply"}
        assert answer["code"] == vector.get("status", codes.get(vector["error"], vector["error"]))


def test_the_checksum_of_every_payload(station: Station) -> None:
    del station  # which has shown that this Node runs
    code = "JSON.parse(process.argv[2]).forEach((p) => console.log(require(process.argv[1]).crc32(Buffer.from(p))))"
    vectors = load("payloads.json")
    payloads = ["".join(vector[name] for name in ("pk", "dn", "ds", "ps", "product_id")) for vector in vectors]
    out = subprocess.check_output([need("node"), "-e", code, str(SDK), json.dumps(payloads)], text=True)
    assert [int(line) for line in out.split()] == [vector["crc32_int"] for vector in vectors]


def test_a_server_that_sends_the_checksum_as_a_number_is_understood(station: Station, server: StartServer) -> None:
    running = server("--import", SAMPLE, "--crc-format", "int")
    answer = station.request(running.port, "MAC-0001")
    assert answer["code"] is None
    assert isinstance(answer["fields"]["CRC32"], int)
    assert station.request(running.port, "MAC-0001", "a1SampleBt0")["code"] is None


@pytest.mark.parametrize(
    ("ip", "product_key", "device_id"),
    [
        ("", KEY, "MAC-0001"),
        (None, KEY, "MAC-0001"),
        (["::1"], KEY, "MAC-0001"),
        ("127.0.0.1:", KEY, "MAC-0001"),
        ("127.0.0.1:0", KEY, "MAC-0001"),
        ("127.0.0.1:65536", KEY, "MAC-0001"),
        ("http://127.0.0.1:8000/", KEY, "MAC-0001"),
        ("[127.0.0.1]:8000", KEY, "MAC-0001"),
        ("\u5de5\u5382:8000", KEY, "MAC-0001"),
        ("a\0b:8000", KEY, "MAC-0001"),
        ("127.0.0.1:1", None, "MAC-0001"),
        ("127.0.0.1:1", KEY, 123456),
        ("127.0.0.1:1", KEY, False),
        ("127.0.0.1:1", KEY, "  \r\n"),  # an empty scan, which is not "no id"
        ("127.0.0.1:1", KEY, "\ufeff"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_sent(
    station: Station, ip: Any, product_key: Any, device_id: Any
) -> None:
    for call in ("req_dev_cert", "send_burn_result_by_did"):
        result = [True] if call == "send_burn_result_by_did" else []
        assert station.call(call, ip, product_key, device_id, *result)["code"] == "BadRequest"


@pytest.mark.parametrize("options", [{"timeout": 1e10}, {"delay": 1e10}, {"retries": -1}, {"timeout": "5"}])
def test_an_option_that_no_timer_takes_is_refused(station: Station, options: Dict[str, Any]) -> None:
    assert station.request(1, "MAC-0001", **options)["code"] == "BadRequest"


def test_a_result_that_is_neither_true_nor_false_is_never_reported_as_success(station: Station) -> None:
    with hostile.serve("plain") as server:
        for result in ("failed", 0, 2, None):
            answer = station.call("send_burn_result_by_did", f"127.0.0.1:{server.port}", KEY, "MAC-0001", result)
            assert answer["code"] == "BadRequest"
        assert server.connections == 0


def test_the_result_is_success_unless_given(server: StartServer, certtool: RunCerttool, store: Path) -> None:
    running = server("--import", SAMPLE)
    running.request(KEY, "MAC-0001")
    code = "require(process.argv[1]).send_burn_result_by_did(process.argv[2], process.argv[3], 'MAC-0001')"
    run_node(code, SDK, f"127.0.0.1:{running.port}", KEY)
    [found] = listed(certtool, store, "--device-id", "MAC-0001")
    assert found["Status"] == "Written"


@pytest.mark.skipif(not socket.has_ipv6, reason="this system has no IPv6")
def test_an_ipv6_address_is_given_in_brackets(station: Station) -> None:
    with hostile.serve("plain", "::1") as server:
        assert station.call("req_dev_cert", f"[::1]:{server.port}", KEY, "MAC-0001")["code"] is None


def run_node(code: str, *args: object, ok: int = 0, node: str = "") -> str:
    """Run `code` with the Node here and return its stdout; `ok` is the exit code, and nothing goes to stderr."""
    command = [node or need("node"), "-e", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=60, env=child_env())
    assert (done.returncode, done.stderr) == (ok, ""), done
    return done.stdout


def test_a_name_is_looked_up_and_the_port_may_be_left_out() -> None:
    code = """
    const sdk = require(process.argv[1]);
    require('http').request = (options) => { console.log(options.host, options.port); process.exit(); };
    sdk.req_dev_cert(process.argv[2], 'k', 'd', () => {});
    """
    for ip, expected in (("line.local", "line.local 8000"), ("10.0.0.7", "10.0.0.7 8000"), ("::1", "::1 8000")):
        assert run_node(code, SDK, ip) == expected + "\n"


@pytest.mark.parametrize("which", ["node", "Node 12"])
def test_a_server_with_two_addresses_is_reached_at_the_one_that_answers(which: str) -> None:
    code = """
    const both = ['127.0.0.2', '127.0.0.1'].map((address) => ({ address, family: 4 }));
    require('dns').lookup = (_, { all }, done) => (all ? done(null, both) : done(null, both[0].address, 4));
    const show = (text) => console.log(JSON.parse(text).Status);
    require(process.argv[1]).req_dev_cert(process.argv[2], 'a1SampleWf0', 'MAC-0001', show, { delay: 10 });
    """
    node = node_12() if which == "Node 12" else need("node")
    with hostile.serve("plain") as server:
        assert run_node(code, SDK, f"two.test:{server.port}", node=node) == "OK\n"


def test_the_time_limit_counts_the_look_up_of_the_name() -> None:
    code = """
    const { lookup } = require('dns');
    require('dns').lookup = (name, ...rest) => setTimeout(() => lookup('127.0.0.1', ...rest), 3500);
    const begin = Date.now();
    const show = (text) => console.log(JSON.parse(text).Status, Date.now() - begin);
    require(process.argv[1]).req_dev_cert(process.argv[2], 'a1SampleWf0', null, show, { timeout: 4000, retries: 0 });
    """
    with hostile.serve("silent") as server:
        status, took = run_node(code, SDK, f"slow.test:{server.port}").split()
    assert status == "Timeout"
    assert int(took) < 4000 + 1000 * SLACK


def test_the_promise_has_what_the_callback_gets() -> None:
    code = """
    const sdk = require(process.argv[1]);
    sdk.req_dev_cert(process.argv[2], 'a1SampleWf0', 'MAC-0001').then((text) => console.log(JSON.parse(text).DeviceID));
    sdk.req_dev_cert('127.0.0.1:1', 'k', 'd', null, { retries: 0 }).catch((e) => console.log(e.name, e.code));
    """
    with hostile.serve("plain") as server:
        assert sorted(run_node(code, SDK, f"127.0.0.1:{server.port}").split("\n")) == [
            "",
            "CertError Unreachable",
            "MAC-0001",
        ]


def test_a_program_that_only_uses_the_callback_never_sees_an_unhandled_rejection() -> None:
    code = (
        "require(process.argv[1]).req_dev_cert('127.0.0.1:1', 'k', NaN, (text) => console.log(JSON.parse(text).Status))"
    )
    assert run_node(code, SDK) == "BadRequest\n"


def test_what_a_callback_throws_is_the_programs_own_error() -> None:
    code = """
    process.on('uncaughtException', (error) => console.log('uncaught', error.message));
    process.on('unhandledRejection', () => console.log('unhandled'));
    require(process.argv[1]).req_dev_cert(process.argv[2], 'a1SampleWf0', 'MAC-0001', () => { throw Error('mine'); });
    """
    with hostile.serve("plain") as server:
        assert run_node(code, SDK, f"127.0.0.1:{server.port}") == "uncaught mine\n"


@pytest.mark.parametrize("which", ["node", "Node 12"])
def test_a_reply_that_came_while_the_program_burned_another_device_is_not_late(which: str) -> None:
    code = """
    const sdk = require(process.argv[1]);
    let burnt = 0;
    const burn = (text) => {
      console.log(JSON.parse(text).Status);
      burnt += 1;
      if (burnt === 1) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1200);
    };
    sdk.req_dev_cert(process.argv[2], 'a1SampleWf0', null, burn, { timeout: 1000 });
    sdk.req_dev_cert(process.argv[2], 'a1SampleWf0', null, burn, { timeout: 1000 });
    """
    node = node_12() if which == "Node 12" else need("node")
    with hostile.serve("plain") as server:

        def second_later(_server: hostile.Hostile, request: Dict[str, Any]) -> Iterator[hostile.Step]:
            yield 0.2 * (len(server.requests) - 1)
            yield hostile.http(json.dumps(hostile.certificate(request)).encode())

        server.script = second_later
        assert run_node(code, SDK, f"127.0.0.1:{server.port}", node=node) == "OK\nOK\n"
        assert server.connections == 2


@pytest.mark.parametrize("which", ["node", "Node 12"])
def test_a_request_whose_time_passed_while_the_program_burned_another_device_takes_no_certificate(which: str) -> None:
    code = """
    const sdk = require(process.argv[1]);
    const done = (text) => console.log(text);
    sdk.req_dev_cert(process.argv[2], 'a1SampleWf0', null, done, { timeout: 500, retries: 0 });
    const burn = () => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1000);
    process.nextTick(() => process.nextTick(burn));  // the connection stands by then, and nobody has seen it yet
    """
    node = node_12() if which == "Node 12" else need("node")
    with hostile.serve("plain") as server:
        answer = json.loads(run_node(code, SDK, f"127.0.0.1:{server.port}", node=node))
        assert answer == {"Status": "Timeout", "Message": "The server could not be reached in time."}
        assert server.requests == []


# The calls of the vendor's page, with its ProductKey; only the server's port is ours.
VENDORS_SAMPLE = """
var http = require('http');
var devReq = require('./devReqCert');
var did = null;
function handler(devInfo) {
  var jsonObj = JSON.parse(devInfo);
  console.log("DevInfo:" + devInfo);
}
devReq.req_dev_cert('127.0.0.1',"a1RxxxxBm9",null, handler);
did = "123456";
devReq.req_dev_cert('127.0.0.1',"a1RxxxxBm9",did,handler);
"""


def test_the_sample_of_the_vendors_page_runs_as_it_stands(server: StartServer, tmp_path: Path) -> None:
    identities.write(tmp_path / "two.csv", 2, product="a1RxxxxBm9")
    running = server("--import", tmp_path / "two.csv")
    sample = VENDORS_SAMPLE.replace("127.0.0.1", f"127.0.0.1:{running.port}")
    code = sample.replace("./devReqCert", SDK.as_posix())
    for round_ in (1, 2):  # in the second round only the device with an id still gets one
        lines = run_node(code).splitlines()
        replies = [json.loads(line[len("DevInfo:") :]) for line in lines]
        assert sorted(reply["Status"] for reply in replies) == (
            ["OK", "OK"] if round_ == 1 else ["OK", "PoolExhausted"]
        )
        assert "123456" in [reply.get("DeviceID") for reply in replies]


def run_test_js(*args: object, node: str = "", ok: int = 0) -> List[Any]:
    command = [node or need("node"), str(FOLDER / "test.js"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=60, env=child_env())
    assert (done.returncode, done.stderr) == (ok, ""), done
    return [(line.partition(":")[0], json.loads(line.partition(":")[2])) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("which", ["node", "Node 12"])
def test_test_js_shows_two_certificates_and_reports_both_as_burnt(
    which: str, server: StartServer, certtool: RunCerttool, store: Path
) -> None:
    running = server("--import", SAMPLE)
    node = need("node") if which == "node" else node_12()
    printed = run_test_js(f"127.0.0.1:{running.port}", "a1SampleBt0", node=node)
    assert sorted(what for what, _ in printed) == ["Burn", "Burn", "DevInfo", "DevInfo"]
    assert {fields["Status"] for _, fields in printed} == {"OK"}
    found = listed(certtool, store, "--status", "Written")
    names_shown = {fields["DeviceName"] for what, fields in printed if what == "DevInfo"}
    assert {row["DeviceName"] for row in found} == names_shown


def test_test_js_says_why_it_got_nothing() -> None:
    with replying(hostile.http(b"<html>")) as server:
        printed = run_test_js(f"127.0.0.1:{server.port}", ok=1)
    assert [(what, fields["Status"]) for what, fields in printed] == [("DevInfo", "BadReply")] * 2


def test_the_readme_shows_what_test_js_prints(server: StartServer) -> None:
    def alike(lines: List[str]) -> List[str]:
        """The two exchanges run side by side: their order, and who gets which certificate, may change."""
        changing = r'"(auto-\w+|4bWYTI\w+|Bnu3mY\w+|4773D5E2|6A2AB5B4|WCBX\w+|Gvbt\w+)"'
        return sorted(re.sub(changing, "*", line.strip()) for line in lines)

    lines = (FOLDER / "README.md").read_text("utf-8").splitlines()
    [at] = [number for number, line in enumerate(lines) if line.startswith("    $ node test.js")]
    shown = lines[at + 1 : lines.index("", at)]
    running = server("--import", SAMPLE)
    command = lines[at].replace("127.0.0.1:8000", f"127.0.0.1:{running.port}").split()[1:]
    printed = subprocess.check_output([need("node"), *command[1:]], cwd=FOLDER, text=True).splitlines()
    assert alike(printed) == alike(shown)


def test_the_readmes_program_runs(server: StartServer) -> None:
    readme = (FOLDER / "README.md").read_text("utf-8")
    program = readme.partition("```js\n")[2].partition("```")[0].replace("./devReqCert", SDK.as_posix())
    running = server("--import", SAMPLE)
    out = run_node(program.replace("192.168.1.10", f"127.0.0.1:{running.port}"))
    assert json.loads(out) == {"ProductKey": KEY, "DeviceID": "A4C138000001", "Status": "OK"}
    running.kill()
    assert run_node(program.replace("192.168.1.10", f"127.0.0.1:{running.port}")).startswith("Unreachable ")
