"""The benchmarks measure what they say and clean up after themselves. How fast anything is, is not tested here."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List

import pytest

from bench import __main__ as command
from bench import report, rig, scale, serve
from bench.peers import sqlite
from bench.rig import QUICK, THOROUGH, Curves, Goal, Load, Part, Table
from tests import identities
from tests.support import ROOT, RunCerttool, StartServer, child_env, need

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmarks need Linux"),
    pytest.mark.usefixtures("fast"),
]

PRINTED = """Running 1s test @ http://127.0.0.1:8000/
  1 threads and 200 connections
  Latency Distribution
     50%    2.50ms
     75%    3.10ms
     90%    9.00ms
     99%    1.33s
  20123 requests in 1.10s, 4.00MB read
  Socket errors: connect 0, read 3, write 0, timeout 2
  Non-2xx or 3xx responses: 17
Requests/sec:  18293.64
Transfer/sec:      3.64MB
"""


def test_the_output_of_wrk_is_read_with_units_refusals_and_lost_answers() -> None:
    assert rig.parse_wrk(PRINTED) == Load(18293.64, 2.5, 1330.0, 17, 5)


@pytest.mark.parametrize(
    ("latency", "milliseconds"), [("870.00us", 0.87), ("2.50ms", 2.5), ("1.33s ", 1330), ("1.00m ", 60_000)]
)
def test_each_unit_of_a_latency_becomes_milliseconds(latency: str, milliseconds: float) -> None:
    assert rig.parse_wrk(PRINTED.replace("1.33s", latency)).p99 == pytest.approx(milliseconds)


@pytest.mark.parametrize("line", ["     99%    1.33s\n", "Requests/sec:  18293.64\n"])
def test_output_without_a_figure_is_an_error_and_not_a_zero(line: str) -> None:
    with pytest.raises(ValueError, match="wrk printed no"):
        rig.parse_wrk(PRINTED.replace(line, ""))


def test_rounds_become_medians_and_what_went_wrong_is_added_up() -> None:
    loads = [Load(10, 3, 9, 1, 0), Load(30, 1, 7, 0, 2), Load(20, 2, 8, 0, 0)]
    assert rig.median_load(loads) == Load(20, 2, 8, 1, 2)


def test_a_goal_for_memory_is_held_by_the_highest_peak_and_the_page_says_so() -> None:
    rounds, states = [scale.Usage(1, memory) for memory in (10, 30, 20)], (scale.FREE, scale.HELD)
    whats = [scale.IMPORT, *(f"{what}, {held}" for what in ("start-up", "query by DeviceName") for held in states)]
    whats += [*states, f"query by DeviceID, {scale.HELD}"]
    steps = {(what, who): rounds for what in whats for who in (scale.OURS, scale.SQLITE, scale.BARE)}
    peaks = [goal.measured for goal in scale.goals_of(steps, {}) if "peak MB" in goal.what]
    assert peaks == [30, 30, 30]
    assert "a goal's peak memory is the highest of the rounds" in report.markdown([PART], [])


def test_a_ratio_is_the_median_of_each_rounds_ratio() -> None:
    assert rig.median_ratio([10, 40, 12], [5, 10, 4]) == 3
    assert rig.median_ratio([10, 40, 12], [5, 0, 4]) == 3  # a peer that gave no answer in one round


@pytest.mark.parametrize(
    ("value", "text"), [(18293.64, "18,294"), (99.96, "100.0"), (12.34, "12.3"), (0.457, "0.46"), (0.0412, "0.041")]
)
def test_a_figure_has_as_many_digits_as_count(value: float, text: str) -> None:
    assert rig.number(value) == text


@pytest.mark.parametrize(
    ("at_least", "measured", "holds"), [(True, 3.0, True), (True, 2.9, False), (False, 3.0, True), (False, 3.1, False)]
)
def test_a_goal_holds_at_its_limit_and_not_beyond(at_least: bool, measured: float, holds: bool) -> None:
    assert Goal("goal", at_least, 3.0, measured).holds is holds


PART = Part(
    "Part",
    "How it came about.",
    [Table("Rates", ["who", "a second"], [["us | them", "5"], ["peer", "12"]])],
    [Goal("rate", True, 3, 2.5), Goal("wish", False, 1, 0.5, stretch=True)],
    [Curves("time", "Seconds", [10, 100], {"us": [1.0, 2.0]})],
)


def test_the_page_states_a_goal_that_does_not_hold_and_shows_tables_and_curves() -> None:
    page = report.markdown([PART], [("processor", "two cores")])
    assert "| rate | at least 3 | 2.50 | does not hold |" in page
    assert "| wish (stretch) | at most 1 | 0.50 | holds |" in page
    assert "| who | a second |\n| --- | ---: |\n| us \\| them | 5 |\n| peer | 12 |\n" in page
    assert "| processor | two cores |" in page
    assert "![Seconds](growth-time.svg)" in page


def test_the_terminal_shows_the_same_in_columns() -> None:
    lines = report.as_text(PART).splitlines()
    assert lines[3:7] == ["Rates", "who        a second", "us | them         5", "peer             12"]
    assert lines[-2].split() == ["rate", "at", "least", "3", "2.50", "does", "not", "hold"]


def test_the_machine_is_described_without_its_name() -> None:
    facts = dict(report.machine())
    assert {"date", "processor", "system", "Python", "SQLite", "Flask", "Node.js", "wrk"} <= facts.keys()
    assert not any(socket.gethostname() in fact.split() for fact in facts.values())


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        ([], ROOT / "bench"),
        (["--thorough"], ROOT / "bench"),
        (["--quick"], None),
        (["--only", "crc", "scale"], None),
        (["--quick", "--output", "there"], Path("there")),
    ],
)
def test_only_a_whole_run_writes_unless_told_where(arguments: List[str], output: Path) -> None:
    assert command.parse(arguments).output == output


def test_quick_and_thorough_say_how_much_is_measured() -> None:
    assert command.parse(["--quick"]).effort == QUICK
    assert command.parse(["--thorough", "--only", "scale"]).effort == THOROUGH


def test_a_part_is_printed_as_the_whole_benchmark_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.measure(QUICK, ["crc"], None) == 0
    printed = capsys.readouterr().out
    assert "CRC32 beside zlib's" in printed
    assert "certtool.py crc" in printed


def test_without_wrk_one_line_says_what_to_install(tmp_path: Path) -> None:
    started = [sys.executable, "-m", "bench.serve", "--quick"]
    done = subprocess.run(
        started, cwd=ROOT, env=child_env(PATH=str(tmp_path)), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "The load comes from wrk: install it (Debian: apt-get install wrk).\n"


@pytest.mark.parametrize("kind", serve.KINDS)
def test_each_request_of_the_load_does_in_the_store_what_it_is_called(
    kind: str, server: StartServer, store: Path, tmp_path: Path, certtool: RunCerttool
) -> None:
    need("wrk")
    running = server("--import", identities.write(tmp_path / "identities.csv", 60_000))
    serve.prepare(running.port)
    what = [("allocate", "new"), ("again",), ("report",), *((request,) for request in rig.REFUSED)]
    with ThreadPoolExecutor(len(what)) as at_once:
        loads = at_once.map(lambda words: rig.load(running.port, 1, 2, kind, *words), what)
        allocating, again, reporting, *refused = loads
    assert allocating.rate > 0
    assert again.refused == 0
    assert reporting.refused == 0
    assert len(refused) == len(rig.REFUSED)
    assert all(each.refused > 0 for each in refused)
    running.stop()
    listed = certtool("query", "--data", store, "--format", "csv").stdout
    assert len(re.findall(r",Allocated,new-\d+,", listed)) > 1
    assert len(re.findall(r",Allocated,again-\d+,", listed)) == serve.PREPARED
    assert len(re.findall(r",(?:Written|Failed),report-\d+,", listed)) > 1


def test_a_refusal_that_was_not_asked_for_ends_the_benchmark(server: StartServer, tmp_path: Path) -> None:
    need("wrk")
    running = server("--import", identities.write(tmp_path / "identities.csv", 5))
    with pytest.raises(SystemExit, match="were refused"):
        rig.load(running.port, 1, 1, "keep-alive", "allocate", "new")


def test_the_load_asks_again_for_the_devices_that_were_prepared() -> None:
    devices = re.search(r"^local DEVICES = (\d+)$", (ROOT / "bench" / "load.lua").read_text(), re.MULTILINE)
    assert devices
    assert int(devices[1]) == serve.PREPARED


def test_the_sqlite_peer_holds_the_whole_file(tmp_path: Path) -> None:
    connection = sqlite.connect(str(tmp_path / "database"))
    sqlite.import_file(connection, str(identities.write(tmp_path / "identities.csv", 5)))
    [last] = identities.rows(1, first=4)
    assert sqlite.start(connection) == [(identities.PRODUCT, 5, 5)]
    assert sqlite.find(connection, "product = ? AND name = ?", identities.PRODUCT, last.device_name) == (*last[:5], 0)
    connection.close()


def test_an_interrupted_run_leaves_no_folder_and_no_process() -> None:
    need("wrk")
    before = set(ROOT.glob(".bench-*"))
    started = [sys.executable, "-m", "bench.pages", "--quick"]
    with subprocess.Popen(started, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=child_env()) as process:
        assert process.stderr
        assert "pages" in process.stderr.readline()
        [folder] = set(ROOT.glob(".bench-*")) - before
        while not list(folder.glob("store*/lock")):  # until a server runs
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read() == "Interrupted: nothing was written.\n"
    assert process.returncode == 1
    assert set(ROOT.glob(".bench-*")) == before
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(str(folder).encode() in words for words in commands)
