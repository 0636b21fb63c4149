"""The C SDK, built by gcc and clang, for 32 bits and big-endian: on real and hostile servers, vectors and a fuzzer."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

import pytest

from tests import hostile
from tests.support import ROOT, SAMPLE, RunCerttool, Server, StartServer, child_env, listed, need
from tests.vectorset import Answer, Play, Vector, content, load, name_of

pytestmark = pytest.mark.usefixtures("fast")

SDK = ROOT / "client" / "C-SDK"
HERE = ROOT / "tests" / "c_sdk"
README = SDK / "README.md"
HEADER = SDK / "triple_burn.h"
CRC32 = ROOT / "_crc32.c"
KEY = "a1SampleWf0"
SLACK = 3.0  # seconds that a busy machine may add to a time limit

# The results of triple_burn.h.
OK, ARGUMENT, BUFFER, MEMORY, NETWORK, TIMEOUT, HTTP, REPLY, REFUSED, CRC, MISMATCH = range(0, -11, -1)

STRICT = "-std=c99 -Wall -Wextra -Wconversion -Wpedantic -Wshadow -Wcast-qual -Wwrite-strings -Werror".split()
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
HURRIED = ["-DTRIPLE_TOTAL_MS=1500u", "-DTRIPLE_ATTEMPT_MS=600u", "-DTRIPLE_ATTEMPTS=2u", "-DTRIPLE_PAUSE_MS=10u"]

# A program of the tests: its sources and flags.
POSIX = [HERE / "driver.c", SDK / "triple_burn.c", SDK / "hal_posix.c", CRC32]
LWIP = [HERE / "driver.c", SDK / "triple_burn.c", SDK / "hal_template.c", CRC32, "-D_GNU_SOURCE", "-DCRC32_SMALL"]
REPLAY = [HERE / "driver.c", SDK / "triple_burn.c", HERE / "hal_memory.c", CRC32, "-DREPLAY", "-DCRC32_SMALL"]
DEVICE = [
    HERE / "fake_aos.c",
    SDK / "app_entry.c",
    SDK / "triple_burn.c",
    SDK / "hal_template.c",
    CRC32,
    "-DBUILD_AOS",
    "-D_GNU_SOURCE",
]
# As the headers of the vendor's device SDK have them: without the NUL.
VENDORS_LENGTHS = [
    "-DPRODUCT_KEY_LEN=20",
    "-DDEVICE_NAME_LEN=32",
    "-DDEVICE_SECRET_LEN=64",
    "-DPRODUCT_SECRET_LEN=64",
]

# Where the vectors run: the compiler, and what runs a program of that machine.
MACHINES: Dict[str, Tuple[str, ...]] = {
    "gcc": ("gcc",),
    "clang": ("clang",),
    "32 bits": ("arm-linux-gnueabi-gcc", "qemu-arm", "-L", "/usr/arm-linux-gnueabi"),
    "big-endian": ("s390x-linux-gnu-gcc", "qemu-s390x", "-L", "/usr/s390x-linux-gnu"),
}

Program = List[str]  # how it is run
Build = Callable[..., Program]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build a program once, without a warning, and return the command that runs it."""
    folder = tmp_path_factory.mktemp("c_sdk")
    built: Dict[Tuple[str, ...], Path] = {}

    def make(sources: Iterable[object], *flags: str, machine: str = "gcc") -> Program:
        compiler, *runner = MACHINES[machine]
        include = [f"-I{path}" for path in (SDK, HERE, HERE / "fake")]
        command = (need(compiler), *STRICT, *include, *map(str, sources), *(flags or ["-Os", "-g"]))
        if command not in built:
            program = folder / f"program{len(built)}"
            done = subprocess.run([*command, "-o", program], capture_output=True, encoding="utf-8", check=False)
            assert (done.returncode, done.stderr) == (0, ""), done.stderr
            built[command] = program
        return [*(need(part) if part == runner[0] else part for part in runner), str(built[command])]

    return make


def run(program: Program, *args: object, ok: Sequence[int] = (0, 1), env: Optional[Dict[str, str]] = None) -> str:
    """Run it to its end and return what it printed. What a sanitizer finds ends it with a code that is never `ok`."""
    sanitizers = {"ASAN_OPTIONS": "exitcode=99", "UBSAN_OPTIONS": "exitcode=99:print_stacktrace=1"}
    done = subprocess.run(
        [*program, *map(str, args)],
        capture_output=True,
        encoding="utf-8",  # which also makes "\r\n" a line end
        errors="replace",
        env=child_env(**sanitizers, **(env or {})),
        timeout=300,
        check=False,
    )
    assert done.returncode in ok, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


class Reply(NamedTuple):
    """A line of the driver: the result, and triple_reply."""

    result: int
    ProductKey: str
    DeviceName: str
    ProductSecret: str
    DeviceSecret: str
    DeviceID: str
    ProductID: str
    status: str


def reply(line: str) -> Reply:
    result, *fields = line.split("\t")
    return Reply(int(result), *fields)


def request(program: Program, port: int, device_id: str, action: int = 0, product_key: str = KEY) -> Reply:
    out = run(program, "request", action, product_key, device_id, f"127.0.0.1:{port}")
    return reply(out.rstrip("\n").split("\n")[-1])  # on FreeRTOS the log comes before it


def replay(program: Program, args: Sequence[object], files: Iterable[Path], **env: str) -> List[Tuple[Reply, int]]:
    """Return what the SDK made of each of the replies, and with how many connections."""
    lines = run(program, "replay", *args, *files, env=env).splitlines()
    return [(reply(line), int(count)) for line, count in zip(lines[::2], lines[1::2])]


# ---- The build -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", MACHINES)
def test_every_file_compiles_without_a_warning_in_every_configuration(machine: str, tmp_path: Path) -> None:
    compiler = need(MACHINES[machine][0])
    include = [f"-I{path}" for path in (SDK, HERE, HERE / "fake")]
    for source, *flags in (
        *(
            (name, *option)
            for name in ("triple_burn.c", "app_entry.c", "hal_posix.c")
            for option in ([], ["-funsigned-char"])
        ),
        ("hal_template.c", "-D_GNU_SOURCE"),
        ("hal_template.c", "-D_GNU_SOURCE", "-DBUILD_AOS"),
        ("hal_template.c", "-D_GNU_SOURCE", "-DTRIPLE_HAL_FROM_SDK", "-DBUILD_AOS"),
        ("hal_template.c", "-D_GNU_SOURCE", "-DTRIPLE_HAL_FROM_SDK"),
        ("hal_template.c", "-D_GNU_SOURCE", "-DLWIP_DNS=0"),
        ("../../_crc32.c", "-DCRC32_SMALL"),
        ("../../_crc32.c", "-DCRC32_BITWISE"),
    ):
        for level in ("-O0", "-Os"):
            command = [compiler, *STRICT, *include, level, *flags, "-c", str(SDK / source), "-o", tmp_path / "x.o"]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
            assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_the_headers_serve_cpp_too(tmp_path: Path) -> None:
    source = tmp_path / "main.cpp"
    calls = 'HAL_Free(send_req(0, text, text, "server")); return parse_data("", 0, 0, 0, 0, 0);'
    source.write_text(f'#include "triple_burn.h"\nint f(char *text) {{ {calls} }}\n', "utf-8")
    subprocess.run([need("clang"), "-x", "c++", "-Werror", "-fsyntax-only", f"-I{SDK}", source], check=True)


def test_the_build_line_of_the_readme_builds_the_sdk(tmp_path: Path) -> None:
    copied = tmp_path / "client" / "C-SDK"
    shutil.copytree(SDK, copied)
    shutil.copy(CRC32, tmp_path)
    [line] = re.findall(r"^    (cc .*)$", README.read_text("utf-8"), re.MULTILINE)
    need("cc")
    subprocess.run(line.split(), cwd=copied, check=True)
    assert {"triple_burn.o", "hal_posix.o", "_crc32.o"} <= {path.name for path in copied.iterdir()}


def test_the_sdk_calls_nothing_but_its_platform_layer_and_what_every_compiler_needs(tmp_path: Path) -> None:
    compiler = need("gcc")
    subprocess.run([compiler, "-Os", "-c", SDK / "triple_burn.c", "-o", tmp_path / "x.o"], check=True)
    listed = subprocess.check_output([need("nm"), "-u", tmp_path / "x.o"], text=True)
    calls = {line.split()[-1] for line in listed.splitlines()}
    calls -= {"crc32_update", "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}
    library = {name for name in calls if not name.startswith("HAL_")}
    assert library <= {"memchr", "memcmp", "memcpy", "memmove", "memset", "strchr", "strcmp", "strlen"}, library


# ---- A real server ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed", [False, True], ids=["kept running", "killed before every step"])
@pytest.mark.parametrize("script", load("states.json"), ids=name_of)
def test_every_row_of_the_state_table(
    build: Build, script: Vector, killed: bool, store: Path, server: StartServer, inline: RunCerttool
) -> None:
    program = build(POSIX, *SANITIZED, "-DCRC32_SMALL")

    def ask(running: Server, product_key: str, device_id: Optional[str], action: int) -> Answer:
        got = request(program, running.port, device_id or "", action, product_key)
        assert got.result in (OK, REFUSED)
        return Answer(got.status, got._asdict())

    Play(script, ask, killed, store, server, inline)


@pytest.mark.parametrize("crc_format", ["hex", "int"])
@pytest.mark.parametrize("machine", MACHINES)
def test_every_machine_gets_the_same_certificates_in_both_forms_of_the_checksum(
    build: Build, machine: str, crc_format: str, server: StartServer
) -> None:
    program = build(POSIX, "-O2", "-DCRC32_BITWISE", machine=machine)
    port = server("--import", SAMPLE, "--crc-format", crc_format).port
    for product in (KEY, "a1SampleBt0"):
        got = request(program, port, "MAC-0001", product_key=product)
        assert got.result == OK
        assert (got.ProductKey, got.DeviceID, bool(got.ProductID)) == (product, "MAC-0001", product != KEY)
        assert request(program, port, "MAC-0001", product_key=product) == got
        assert request(program, port, "MAC-0001", 1, product).result == OK


def test_send_req_returns_the_text_of_the_server_and_parse_data_takes_it(
    build: Build, server: StartServer, tmp_path: Path
) -> None:
    program = build(POSIX, *SANITIZED, "-DCRC32_SMALL")
    running = server("--import", SAMPLE)
    text = run(program, "send_req", 0, KEY, "MAC-0001", f"127.0.0.1:{running.port}")
    assert json.loads(text) == running.request(KEY, "MAC-0001")[1]
    (tmp_path / "reply").write_text(text, "utf-8")
    fields = json.loads(text)
    wanted = [fields[name] for name in ("ProductKey", "DeviceName", "ProductSecret", "DeviceSecret", "DeviceID")]
    assert run(program, "parse", tmp_path / "reply").splitlines()[0].split("\t") == ["0", *wanted]
    assert run(program, "send_req", 1, KEY, "MAC-0002", f"127.0.0.1:{running.port}") == "NULL\n"


def test_a_made_up_id_may_be_passed_on_from_the_reply_that_told_it(build: Build, server: StartServer) -> None:
    running = server("--import", SAMPLE)
    out = run(build(POSIX, *SANITIZED, "-DCRC32_SMALL"), "again", KEY, f"127.0.0.1:{running.port}")
    first, again, report, no_buffer = map(reply, out.rstrip("\n").split("\n"))
    assert first.DeviceID.startswith("auto-")
    assert again == first, "and not a second certificate"
    assert (report.result, report.DeviceID) == (OK, first.DeviceID)
    assert no_buffer == (ARGUMENT, "", "", "", "", "", "", "")


def test_a_server_with_two_addresses_is_reached_at_the_one_that_answers(build: Build) -> None:
    with hostile.serve("plain") as server, contextlib.ExitStack() as full:
        silent = full.enter_context(socket.socket())
        silent.bind(("127.0.0.2", server.port))
        silent.listen(0)
        for _ in range(3):  # which it never accepts; with these the system answers nobody there
            client = full.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.2", server.port))
        program = build([*POSIX, HERE / "two_addresses.c"], "-O1", "-DCRC32_SMALL", "-Wl,--wrap=getaddrinfo", *HURRIED)
        out = run(program, "request", 0, KEY, "MAC-0001", f"two.test:{server.port}")
    assert reply(out.rstrip("\n")).result == OK


def test_a_socket_that_is_not_ready_after_all_is_waited_for_again(build: Build) -> None:
    wrapped = ["-Wl,--wrap=send", "-Wl,--wrap=recv"]
    program = build([*POSIX, HERE / "not_yet.c"], *SANITIZED, "-DCRC32_SMALL", *wrapped)
    with hostile.serve("byte by byte") as server:
        assert request(program, server.port, "").result == OK, "which no second request may repair"
        assert server.connections == 1


def test_a_device_id_with_quotes_and_spaces_arrives_as_it_is(build: Build, server: StartServer) -> None:
    program = build(POSIX, *SANITIZED, "-DCRC32_SMALL")
    port = server("--import", SAMPLE).port
    odd = 'SN "7\\8" {x}'
    assert request(program, port, odd).DeviceID == odd
    assert request(program, port, f" \t{odd}\r\n", 1).DeviceID == odd


@pytest.mark.parametrize("apart", [[], ["apart"]], ids=["HTTP/1.0 with no Content-Type", "headers and body apart"])
def test_a_client_that_writes_the_old_spelling_on_a_socket_is_served(
    build: Build, apart: List[str], server: StartServer
) -> None:
    program = build([HERE / "old_client.c"])
    running = server("--import", SAMPLE)
    body = json.dumps({"ProductKey": KEY, "DeviceID": "MAC-0001", "Action": 0})
    head, _, got = run(program, running.port, body, *apart, ok=[0]).partition("\n\n")
    assert " 200 " in head.splitlines()[0]
    assert json.loads(got) == running.request(KEY, "MAC-0001")[1]


# ---- A hostile server ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_a_hostile_server_gives_the_right_certificate_or_one_error_in_time(build: Build, kind: str) -> None:
    program = build(POSIX, *SANITIZED, *HURRIED, "-DCRC32_SMALL")
    began = time.monotonic()
    with hostile.serve(kind) as server:
        got = request(program, server.port, "MAC-0001")
        assert time.monotonic() - began < 1.5 + SLACK
        assert server.connections <= 2
    if hostile.VERDICT[kind] != hostile.EITHER:
        assert (got.result == OK) == (hostile.VERDICT[kind] == hostile.SUCCEEDS), got
    wanted = hostile.certificate({"ProductKey": KEY, "DeviceID": "MAC-0001", "Action": 0})
    for name in ("ProductKey", "DeviceName", "DeviceSecret", "ProductSecret", "DeviceID"):
        assert getattr(got, name) == (wanted[name] if got.result == OK else "")


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_a_request_without_a_device_id_is_never_repeated_once_it_was_sent(build: Build, kind: str) -> None:
    program = build(POSIX, "-O2", *HURRIED, "-DCRC32_SMALL")
    with hostile.serve(kind) as server:
        request(program, server.port, "")
        # "reset at once" may drop the connection before the request could leave: then, and only then, it may try again.
        assert server.connections == 1 or (kind == "reset at once" and not server.heads)


def test_a_request_that_cannot_be_repeated_is_waited_for_until_the_time_limit(build: Build) -> None:
    program = build(POSIX, "-O2", *HURRIED, "-DCRC32_SMALL")
    with hostile.serve("plain") as server:
        late: List[hostile.Step] = [0.9, hostile.http(json.dumps(hostile.certificate({"ProductKey": KEY})).encode())]
        server.script = lambda _server, _request: late
        assert request(program, server.port, "").result == OK
        assert server.connections == 1


@pytest.mark.parametrize(
    ("kind", "result"),
    [
        ("no Content-Length", OK),
        ("chunked valid", HTTP),
        ("100 Continue first", HTTP),
        ("bare LF", HTTP),
        ("not HTTP", HTTP),
        ("redirect", HTTP),
        ("HTML", REPLY),
        ("wrong CRC", CRC),
        ("another device", MISMATCH),
        ("another product", MISMATCH),
        ("huge body", BUFFER),
        ("Content-Length beyond 64 bits", HTTP),
        ("huge header", HTTP),
        ("endless headers", HTTP),
        ("cut body", NETWORK),
        ("silent", TIMEOUT),
        ("status 410", REFUSED),
    ],
)
def test_the_result_says_what_was_wrong(build: Build, kind: str, result: int) -> None:
    program = build(POSIX, "-O2", *HURRIED, "-DCRC32_SMALL")
    with hostile.serve(kind) as server:
        assert request(program, server.port, "MAC-0001").result == result


# ---- No network: replies from memory ---------------------------------------------------------------------------------


def http_files(folder: Path, vectors: Iterable[Tuple[int, bytes]]) -> List[Path]:
    files = []
    for number, (status, body) in enumerate(vectors):
        file = folder / f"{number}.http"
        file.write_bytes(hostile.http(body, status=f"{status} Some"))
        files.append(file)
    return files


@pytest.mark.parametrize("piece", [1, 100, 5000])
@pytest.mark.parametrize("machine", MACHINES)
def test_a_reply_is_taken_or_refused_as_every_client_must(
    build: Build, machine: str, piece: int, tmp_path: Path
) -> None:
    program = build(REPLAY, "-O2", machine=machine)
    codes = {"NotJSON": (REPLY,), "BadField": (REPLY, BUFFER), "WrongCRC32": (CRC,), "Refused": (REFUSED,)}
    groups: Dict[Tuple[object, ...], List[Vector]] = {}
    for vector in load("replies.json"):
        asked: Tuple[object, ...] = (vector["Action"], vector["ProductKey"], vector["DeviceID"] or "", piece)
        groups.setdefault(asked, []).append(vector)
    for common, vectors in groups.items():
        files = http_files(tmp_path, ((vector["http"], content(vector)) for vector in vectors))
        for vector, (got, _) in zip(vectors, replay(program, common, files)):
            if "expect" in vector:
                fields = got._asdict()
                assert got.result == OK, vector["name"]
                assert {name: fields[name] for name in vector["expect"]} == vector["expect"]
            else:
                assert got.result in codes[vector["error"]], vector["name"]
                assert got[1:] == ("", "", "", "", "", "", vector.get("status", "")), vector["name"]


@pytest.mark.parametrize("machine", MACHINES)
def test_the_checksum_of_every_payload(build: Build, machine: str, tmp_path: Path) -> None:
    program = build(POSIX, "-O2", "-DCRC32_SMALL", machine=machine)
    files: List[Path] = []
    wanted: List[str] = []
    for vector in load("payloads.json"):
        fields = [vector[name] for name in ("pk", "dn", "ps", "ds", "product_id")]
        for crc, right in (
            (vector["crc32"], True),
            (vector["crc32_int"], True),
            (vector["crc32"].lower(), True),
            (vector["crc32_int"] ^ 1, False),
            (vector["crc32_int"] + (1 << 64), False),
            (f"{vector['crc32_int'] ^ 1 << 31:08X}", False),
        ):
            body = dict(zip(("ProductKey", "DeviceName", "ProductSecret", "DeviceSecret", "ProductID"), fields))
            files.append(tmp_path / str(len(files)))
            files[-1].write_text(json.dumps({**body, "CRC32": crc, "Status": "OK"}), "utf-8")
            wanted += (
                ["\t".join(["0", *fields[:4], ""]), "\t".join(["0", *fields[:4], "", fields[4], "OK"])]
                if right
                else [
                    f"{CRC}\t?????",
                    f"{CRC}\t\t\t\t\t\t\t",
                ]
            )
    assert run(program, "parse", *files).splitlines() == wanted


GOOD = hostile.http(json.dumps(hostile.certificate({"ProductKey": KEY, "DeviceID": "MAC-0001", "Action": 0})).encode())


GOOD_JSON = GOOD.partition(b"\r\n\r\n")[2].decode()
DUPLICATES = [f'"{name}": {value}' for name, value in json.loads(GOOD_JSON).items() for value in ("null", '"OK"')]
VALUES = (
    r"""0 -0 1.5e+3 1E-2 "" "\u00e9\ud83d\ude00" "é" true null [] {} [[],{}] [1,"]"] {"a":{"b":[1]},"a":2}""".split()
)
NO_VALUES = r"""01 1. .5 +1 - 1e 1e+ tru nul "\x" "\u12g4" "\ud83d" "\ude00" "\ude00\ude00" "\ud83d\u0041"
    " [ [1 [1,] [,1] [1} [{] { {"a"} {"a":} {"a":1,} {1:2} {a:1} {"a":[} {"a":1]""".split()


@pytest.mark.parametrize(
    ("member", "result"),
    [
        *((duplicate, REPLY) for duplicate in DUPLICATES),
        *((f'"X": {value}', OK) for value in VALUES),
        *((f'"X": {value}', REPLY) for value in NO_VALUES),
        ('"X": ' + "[" * 32 + "]" * 32, OK),
        ('"X": ' + "[" * 33 + "]" * 33, REPLY),
        ('"X": ' + '{"a":' * 33 + "1" + "}" * 33, REPLY),
        ('"Device\\u0049D": "MAC-0001"', REPLY),
        ('"DeviceID\\u0000": "MAC-0001"', OK),
        ('"DeviceIDDeviceIDDeviceID": "MAC-0001"', OK),
    ],
)
def test_the_json_is_read_to_the_letter(build: Build, member: str, result: int, tmp_path: Path) -> None:
    (tmp_path / "reply").write_text(f"{{{member}, {GOOD_JSON[1:]}", "utf-8")
    out = run(build(POSIX, *SANITIZED, "-DCRC32_SMALL"), "parse", tmp_path / "reply").splitlines()
    assert [int(line.split("\t")[0]) for line in out] == [result, result]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A file with the reply of a server that behaves."""
    (tmp_path / "good.http").write_bytes(GOOD)
    return tmp_path / "good.http"


@pytest.mark.parametrize(
    ("device_id", "env", "result", "connections"),
    [
        ("MAC-0001", {}, OK, 1),
        ("MAC-0001", {"REFUSE": "3"}, OK, 4),
        ("MAC-0001", {"REFUSE": "4"}, NETWORK, 4),
        ("MAC-0001", {"BREAK": "2"}, OK, 3),
        ("", {"REFUSE": "3"}, OK, 4),
        ("", {"BREAK": "1"}, NETWORK, 1),
    ],
)
def test_what_failed_on_the_way_is_repeated_where_that_wastes_nothing(
    build: Build, good: Path, device_id: str, env: Dict[str, str], result: int, connections: int
) -> None:
    [(got, count)] = replay(build(REPLAY, *SANITIZED), [0, KEY, device_id, 99], [good], **env)
    assert (got.result, count) == (result, connections)


@pytest.mark.parametrize(("length", "spare"), [(None, 1), ("", 2)], ids=["Content-Length", "no Content-Length"])
def test_a_body_may_fill_the_buffer_but_for_its_nul(
    build: Build, length: Optional[str], spare: int, tmp_path: Path
) -> None:
    size = int(re.findall(r"define TRIPLE_BUFFER_SIZE (\d+)", HEADER.read_text("utf-8"))[0])
    for used, result in ((size - spare, OK), (size - spare + 1, BUFFER), (size + 1, BUFFER)):
        (tmp_path / "reply").write_bytes(hostile.http(GOOD_JSON.ljust(used).encode(), length=length))
        for piece in (1, 2000):
            [(got, _)] = replay(build(REPLAY, *SANITIZED), [0, KEY, "MAC-0001", piece], [tmp_path / "reply"])
            assert got.result == result, used


@pytest.mark.parametrize("action", [0, 1])
def test_a_request_is_not_answered_by_an_acknowledgement_nor_a_report_by_a_certificate(
    build: Build, action: int, tmp_path: Path
) -> None:
    other = hostile.certificate({"ProductKey": KEY, "DeviceID": "MAC-0001", "Action": 1 - action})
    (tmp_path / "reply").write_bytes(hostile.http(json.dumps(other).encode()))
    [(got, _)] = replay(build(REPLAY, *SANITIZED), [action, KEY, "MAC-0001", 99], [tmp_path / "reply"])
    assert got == (REPLY, "", "", "", "", "", "", "")


def test_no_attempt_is_waited_for_that_the_time_limit_would_end(build: Build, good: Path) -> None:
    program = build(REPLAY, *SANITIZED, "-DTRIPLE_PAUSE_MS=15000u")
    [(got, count)] = replay(program, [0, KEY, "MAC-0001", 99], [good], REFUSE="1")
    assert (got.result, count) == (NETWORK, 1)


def test_time_limits_end_the_attempts(build: Build, tmp_path: Path) -> None:
    (tmp_path / "half").write_bytes(GOOD[:-5])
    [(got, count)] = replay(build(REPLAY, *SANITIZED), [0, KEY, "MAC-0001", 99], [tmp_path / "half"], SILENT="1")
    assert (got.result, count) == (TIMEOUT, 3), "3 attempts of 5 s with pauses fill the 15 s"


def test_a_clock_that_goes_back_makes_no_wait_longer(build: Build, tmp_path: Path) -> None:
    (tmp_path / "half").write_bytes(GOOD[:-5])
    env = {"SILENT": "1", "CLOCK": str((1 << 32) - 10)}
    [(got, count)] = replay(build(REPLAY, *SANITIZED), [0, KEY, "MAC-0001", 99], [tmp_path / "half"], **env)
    assert (got.result, count) == (TIMEOUT, 1)


def test_a_clock_that_is_set_right_meanwhile_wastes_no_certificate(build: Build, good: Path) -> None:
    env = {"CLOCK": "1000000", "BACK": "14000"}
    [(got, count)] = replay(build(REPLAY, *SANITIZED), [0, KEY, "", 99], [good], **env)
    assert (got.result, got.DeviceName, count) == (0, "HostileDevice", 1)


@pytest.mark.parametrize(
    ("action", "product_key", "device_id"),
    [
        (3, KEY, "MAC-0001"),
        (-1, KEY, "MAC-0001"),
        (1, KEY, ""),
        (2, KEY, ""),
        (0, "", "MAC-0001"),
        (0, "a1 Sample", "MAC-0001"),
        (0, "k" * 65, "MAC-0001"),
        (0, "k\u00e9", "MAC-0001"),
        (0, KEY, "d" * 65),
        (0, KEY, "MAC\n0001"),
        (0, KEY, "MAC-\u4e2d"),
        (0, KEY, "  "),
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_sent(
    build: Build, good: Path, action: int, product_key: str, device_id: str
) -> None:
    [(got, count)] = replay(build(REPLAY, *SANITIZED), [action, product_key, device_id, 99], [good])
    assert (got.result, count) == (ARGUMENT, 0)


@pytest.mark.parametrize(
    "server", ["", ":8000", "a b", "a:", "a:0", "a:65536", "a:1x", "a\r\nX-Y: z", "h" * 64, "[::1]:80"]
)
def test_a_server_address_that_is_none_is_refused(build: Build, server: str) -> None:
    got = reply(run(build(POSIX, *SANITIZED, "-DCRC32_SMALL"), "request", 0, KEY, "MAC-0001", server).rstrip("\n"))
    assert got.result == ARGUMENT


def test_parse_data_keeps_to_the_smaller_buffers_of_a_platform_header(build: Build, tmp_path: Path) -> None:
    small = build(POSIX, *SANITIZED, "-DCRC32_SMALL", "-DPRODUCT_KEY_LEN=11", "-DDEVICE_NAME_LEN=14")
    enough = build(POSIX, *SANITIZED, "-DCRC32_SMALL", "-DPRODUCT_KEY_LEN=12", "-DDEVICE_NAME_LEN=14")
    (tmp_path / "reply").write_text(GOOD_JSON, "utf-8")
    assert run(small, "parse", tmp_path / "reply").splitlines()[0] == f"{BUFFER}\t?????"
    assert run(enough, "parse", tmp_path / "reply").splitlines()[0].startswith(f"0\t{KEY}\tHostileDevice\t")


# ---- Whatever comes --------------------------------------------------------------------------------------------------

TARGETS = {"parse": "fuzz_parse.c", "http": "fuzz_http.c"}


def target(name: str) -> List[object]:
    return [HERE / TARGETS[name], SDK / "triple_burn.c", HERE / "hal_memory.c", CRC32, "-DCRC32_SMALL"]


def corpus(name: str) -> List[Path]:
    files = sorted((HERE / "corpus" / name).iterdir())
    assert files
    return files


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TARGETS)
def test_the_fuzzer_finds_no_write_past_a_buffer(build: Build, name: str, tmp_path: Path) -> None:
    seconds = int(os.environ.get("FUZZ_SECONDS", "60" if os.environ.get("CI") else "5"))
    fuzz = build(
        target(name), "-O1", "-g", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all", machine="clang"
    )
    for number, vector in enumerate(load("replies.json")):
        body = content(vector)
        if name == "http":
            body = b"\xff\x3f" + hostile.http(body, status=f"{vector['http']} Some")
        (tmp_path / str(number)).write_bytes(body[:2000])
    options = [f"-max_total_time={seconds}", "-max_len=2048", "-timeout=10", f"-artifact_prefix={tmp_path}/"]
    run(fuzz, *options, tmp_path, HERE / "corpus" / name, ok=[0])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_of_the_fuzzer_passes_on_every_machine(build: Build, name: str, machine: str) -> None:
    flags = SANITIZED if len(MACHINES[machine]) == 1 else ["-O2"]
    program = build([HERE / "corpus_main.c", *target(name)], *flags, machine=machine)
    assert run(program, *corpus(name), ok=[0]) == f"{len(corpus(name))} files\n"


def test_valgrind_finds_no_error_and_no_leak(build: Build, server: StartServer, tmp_path: Path) -> None:
    options = ["--quiet", "--error-exitcode=99", "--leak-check=full", "--errors-for-leak-kinds=all", "--track-fds=no"]
    valgrind = [need("valgrind"), *options]
    for name in TARGETS:
        run([*valgrind, *build([HERE / "corpus_main.c", *target(name)])], *corpus(name), ok=[0])
    files = http_files(tmp_path, ((vector["http"], content(vector)) for vector in load("replies.json")))
    run([*valgrind, *build(REPLAY)], "replay", 0, KEY, "MAC-0001", 33, *files)
    address = f"127.0.0.1:{server('--import', SAMPLE).port}"
    program = [*valgrind, *build([*POSIX, "-DCRC32_SMALL"])]
    assert run(program, "send_req", 0, KEY, "MAC-0001", address) != "NULL\n"
    assert run(program, "send_req", 1, KEY, "MAC-0001", address) != "NULL\n"
    assert run(program, "send_req", 1, KEY, "MAC-0002", address) == "NULL\n"
    device = [*valgrind, *build([*DEVICE, "-DCRC32_SMALL"])]
    assert "Burnt:" in run(device, "linkkey", address, KEY, "/", "linkkey")


# ---- A device: app_entry.c on AliOS Things, the template on FreeRTOS -------------------------------------------------


@pytest.fixture
def device(build: Build) -> Callable[..., str]:
    """Type lines at the console of a device with an empty store; return what it printed."""
    program = build(DEVICE, *SANITIZED, "-DCRC32_BITWISE")

    def type_lines(*lines: Sequence[object], **env: str) -> str:
        words: List[object] = []
        for line in lines:
            words += ["/", *line] if words else line
        return run(program, *words, ok=[0], env=env)

    return type_lines


def shown(pk: str, dn: str, ds: str, ps: str) -> str:
    return f"Product Key={pk}.\nDevice Name={dn}.\nDevice Secret={ds}.\nProduct Secret={ps}.\n"


def state_of(certtool: RunCerttool, store: Path, name: str) -> Tuple[str, str]:
    [found] = listed(certtool, store, name)
    return found["Status"], found["DeviceID"]


@pytest.mark.parametrize("device_id", ["", "MAC-0001"], ids=["no DeviceID", "a DeviceID"])
def test_a_device_requests_burns_and_reports_its_certificate(
    device: Callable[..., str], device_id: str, server: StartServer, store: Path, certtool: RunCerttool
) -> None:
    running = server("--import", SAMPLE)
    out = device(["linkkey", f"127.0.0.1:{running.port}", KEY, *filter(None, [device_id])], ["linkkey"])
    found = re.search(r"Burnt: pk=(\S+) dn=(\S+) did=(\S+)", out)
    assert found, out
    assert found[3] == device_id or not device_id
    cert = running.request(KEY, found[3])[1]
    assert out.endswith(shown(*(cert[name] for name in ("ProductKey", "DeviceName", "DeviceSecret", "ProductSecret"))))
    assert state_of(certtool, store, cert["DeviceName"]) == ("Written", found[3])


@pytest.mark.parametrize("fault", ["KV_FAILS", "KV_FORGETS"])
@pytest.mark.parametrize("key", ["linkkit_product_key", "linkkit_device_secret", "linkkit_product_secret"])
def test_a_device_whose_store_fails_reports_a_failed_burn(
    device: Callable[..., str], fault: str, key: str, server: StartServer, store: Path, certtool: RunCerttool
) -> None:
    running = server("--import", SAMPLE)
    out = device(["linkkey", f"127.0.0.1:{running.port}", KEY, "MAC-0001"], **{fault: key})
    assert out.startswith("Not burnt")
    with SAMPLE.open(encoding="utf-8", newline="") as file:
        first = next(csv.DictReader(file))["DeviceName"]
    assert state_of(certtool, store, first) == ("Failed", "MAC-0001")


def test_a_device_without_an_id_that_dies_while_it_burns_gets_its_certificate_again(
    device: Callable[..., str], server: StartServer, store: Path, certtool: RunCerttool
) -> None:
    line = ["linkkey", f"127.0.0.1:{server('--import', SAMPLE).port}", KEY]
    out = device(line, KV_DIES="linkkit_device_secret")
    [made_up] = re.findall(r"calls this device (auto-\w+)\.", out)
    assert "Burnt:" in device([*line, made_up])
    [row] = listed(certtool, store, "--device-id", made_up)
    assert row["Status"] == "Written"
    assert len(listed(certtool, store, "--product-key", KEY, "--status", "Unallocated")) == 9


def test_a_certificate_is_written_by_hand_and_shown(device: Callable[..., str]) -> None:
    out = device(["linkkey", "pk", "dn", "ds", "ps"], ["linkkey"])
    assert out == "Done\n" + shown("pk", "dn", "ds", "ps")


def test_a_certificate_of_the_longest_values_is_shown(device: Callable[..., str]) -> None:
    longest = ("p" * 64, "n" * 32, "d" * 64, "s" * 64)
    assert device(["linkkey", *longest], ["linkkey"]) == "Done\n" + shown(*longest)


@pytest.mark.parametrize("sizes", [(65, 2, 2, 2), (2, 33, 2, 2), (2, 2, 65, 2), (2, 2, 2, 65)])
def test_of_a_certificate_that_is_too_long_nothing_is_written(device: Callable[..., str], sizes: Sequence[int]) -> None:
    longer = ["x" * size for size in sizes]
    out = device(["linkkey", "pk", "dn", "ds", "ps"], ["linkkey", *longer], ["linkkey"])
    assert out.startswith("Done\nNot written")
    assert out.endswith("\n" + shown("pk", "dn", "ds", "ps"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["linkkey", "a", "b", "c", "d", "e"], "Usage:"),
        (["linkkey", "a"], "Usage:"),
        (["linkkey", "p" * 65, "dn", "ds", "ps"], "Not written"),
        (["linkkey", "127.0.0.1:1", "a b"], "triple: Bad argument"),
        (["linkkey"], "Product Key=."),
    ],
)
def test_a_line_that_cannot_be_done_says_so(device: Callable[..., str], line: List[str], said: str) -> None:
    assert device(line).startswith(said)


def test_a_device_without_an_address_asks_for_nothing(device: Callable[..., str], server: StartServer) -> None:
    running = server("--import", SAMPLE)
    assert "no IP address" in device(["linkkey", f"127.0.0.1:{running.port}", KEY], NO_IP="1")


def test_the_longest_certificate_is_burnt_also_beside_the_lengths_of_the_vendors_headers(build: Build) -> None:
    program = build(DEVICE, *SANITIZED, *VENDORS_LENGTHS, "-DCRC32_SMALL")
    longest = {"ProductKey": "p" * 64, "DeviceName": "n" * 32, "DeviceSecret": "d" * 64, "ProductSecret": "s" * 64}
    with hostile.serve("plain") as server:
        server.script = lambda _server, asked: [
            hostile.http(json.dumps(hostile.certificate(asked, **({} if asked["Action"] else longest))).encode())
        ]
        line = ["linkkey", f"127.0.0.1:{server.port}", "p" * 64, "MAC-0001"]
        out = run(program, *line, "/", "linkkey", ok=[0])
    assert out.endswith(shown(*longest.values()))
    assert json.loads(server.requests[-1])["Action"] == 1


def test_a_burn_that_cannot_be_reported_is_not_said_to_be_worth_another_request(device: Callable[..., str]) -> None:
    with hostile.serve("plain") as server:
        certificate = hostile.certificate({"ProductKey": KEY, "Action": 0}, DeviceID="")
        server.script = lambda _server, _request: [hostile.http(json.dumps(certificate).encode())]
        out = device(["linkkey", f"127.0.0.1:{server.port}", KEY])
    assert "Burnt:" in out
    assert out.endswith("Do not repeat the command.\n")
    assert server.connections == 1


def test_a_report_that_did_not_arrive_is_said_with_the_device_id(device: Callable[..., str]) -> None:
    with hostile.serve("plain") as server:
        good = hostile.http(json.dumps(hostile.certificate({"ProductKey": KEY, "DeviceID": "MAC-0001"})).encode())
        server.script = lambda _server, asked: [
            hostile.http(b'{"Status": "StoreUnavailable"}', status="503 No") if asked["Action"] else good
        ]
        out = device(["linkkey", f"127.0.0.1:{server.port}", KEY, "MAC-0001"])
    assert "Burnt:" in out
    assert "repeat the command with the DeviceID MAC-0001" in out


def test_the_freertos_template_runs_the_exchange_also_while_its_tick_counter_wraps(
    build: Build, server: StartServer
) -> None:
    program = build(LWIP, *SANITIZED, *HURRIED)
    port = server("--import", SAMPLE).port
    assert request(program, port, "MAC-0001").result == OK
    assert request(program, port, "MAC-0001", 1).result == OK
    for kind, result in (("silent", TIMEOUT), ("reset", NETWORK), ("byte by byte", OK), ("reset then OK", OK)):
        with hostile.serve(kind) as bad:
            began = time.monotonic()
            assert request(program, bad.port, "MAC-0001").result == result, kind
            assert time.monotonic() - began < 1.5 + SLACK
    assert request(program, bad.port, "MAC-0001").result == NETWORK, "nobody listens there any more"


def test_the_template_needs_no_dns_where_the_server_is_given_by_its_address(build: Build) -> None:
    program = build(LWIP, *SANITIZED, *HURRIED, "-DLWIP_DNS=0")
    with hostile.serve("plain") as server:
        assert request(program, server.port, "MAC-0001").result == OK
        named = run(program, "request", 0, KEY, "MAC-0001", f"localhost:{server.port}")
    assert reply(named.rstrip("\n").split("\n")[-1]).result == NETWORK


# ---- Size ------------------------------------------------------------------------------------------------------------

ARM = ["-std=c99", "-Os", "-mcpu=cortex-m3", "-mthumb", "-fno-asynchronous-unwind-tables", "-fcallgraph-info=su"]


def stack(graphs: Iterable[Path], start: str) -> int:
    """Return the deepest sum of frames from `start` on; what has no frame in the graphs counts as 0."""
    frames: Dict[str, int] = {}
    calls: Dict[str, Set[str]] = {}
    for graph in graphs:
        text = graph.read_text("utf-8")
        for title, size in re.findall(
            r'node: { title: "([^"]+)" label: "[^"]*\\n(\d+) bytes \((?:static|dynamic,bounded)\)', text
        ):
            frames[title.rpartition(":")[2]] = int(size)  # of a static function the file's name comes before it
        for source, called in re.findall(r'edge: { sourcename: "([^"]+)" targetname: "([^"]+)"', text):
            calls.setdefault(source.rpartition(":")[2], set()).add(called.rpartition(":")[2])
        assert "bytes (dynamic)" not in text, "alloca or a variable-length array"

    def depth(name: str, path: Tuple[str, ...] = ()) -> int:
        assert name not in path, f"{name} calls itself"
        return frames.get(name, 0) + max((depth(called, (*path, name)) for called in calls.get(name, ())), default=0)

    assert start in frames
    return depth(start)


def test_the_readme_states_the_size_and_the_stack_that_are_measured(tmp_path: Path) -> None:
    compiler, size = need("arm-linux-gnueabi-gcc"), need("arm-linux-gnueabi-size")
    measured: Dict[str, int] = {}
    fake = [f"-I{HERE / 'fake'}", "-D_GNU_SOURCE"]
    for name, source, flags in (
        ("triple_burn.c", SDK / "triple_burn.c", []),
        ("_crc32.c, CRC32_SMALL", CRC32, ["-DCRC32_SMALL"]),
        ("_crc32.c, CRC32_BITWISE", CRC32, ["-DCRC32_BITWISE"]),
        ("hal_template.c", SDK / "hal_template.c", fake),
        ("app_entry.c", SDK / "app_entry.c", fake),
    ):
        made = tmp_path / f"{len(measured)}.o"
        subprocess.run([compiler, *ARM, *flags, "-c", source, "-o", made], check=True, cwd=tmp_path)
        measured[name] = int(subprocess.check_output([size, made], text=True).splitlines()[1].split()[0])
    graphs = list(tmp_path.glob("*.ci"))
    for function in ("send_req", "triple_request", "triple_parse_data", "get_triple"):
        measured[function] = stack(graphs, function)
    readme = README.read_text("utf-8")
    for name, bytes_ in measured.items():
        stated = re.search(rf"^\| `{re.escape(name)}`[^|]*\| ([\d,]+) \|", readme, re.MULTILINE)
        assert stated, f"README.md does not state {name}: {bytes_}"
        assert abs(int(stated[1].replace(",", "")) - bytes_) <= bytes_ * 0.1, f"{name} is {bytes_} now"


def test_the_readme_names_every_result_and_every_setting() -> None:
    readme = README.read_text("utf-8")
    header = HEADER.read_text("utf-8")
    for name in re.findall(r"#define (TRIPLE_\w+) ", header):
        assert f"`{name}`" in readme, name
