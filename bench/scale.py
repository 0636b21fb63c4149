"""`python -m bench.scale`: time and peak memory of large stores beside bare `csv.reader` passes and beside SQLite.

Each step is a process of its own; its peak memory is what the system saw.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple

from bench.allocate import device_name
from bench.pages import serving_page
from bench.rig import (
    ROOT,
    Curves,
    Effort,
    Goal,
    Part,
    Table,
    alone,
    child_env,
    median_ratio,
    number,
    progress,
    workplace,
)
from tests import identities

BARE_PASS = """
import csv, sys
for path in sys.argv[1:]:
    for row in csv.reader(open(path, newline='', encoding='utf-8')): pass
"""
MILLION = 1_000_000  # the size that the goals are for
LOOKS = 300  # queries to a running server

BARE, OURS, SQLITE = "csv.reader", "certtool", "SQLite"
FREE, HELD = "all free", "all allocated"
IMPORT = "import"


class Usage(NamedTuple):
    """What a process took: seconds, and MB at its peak."""

    seconds: float
    memory: float


Steps = Dict[Tuple[str, str], List[Usage]]  # by step and by who does it


def run(folder: Path, *command: str) -> Usage:
    """Run a Python to its end."""
    if sys.platform == "win32":
        raise NotImplementedError
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(ROOT / "bench" / "usage.py"), sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_env(folder),
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    seconds, memory, status = map(float, printed.split() or (0, 0, 1))
    if status:
        raise SystemExit(f"{' '.join(command)} failed: {errors}")
    return Usage(seconds, memory)


def start_up(folder: Path, store: Path) -> Usage:
    """Return the time until a server has answered its first request, and its peak until then."""
    began = time.perf_counter()
    with serving_page(folder, store) as (server, _, _):
        seconds = time.perf_counter() - began
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{server}/status").read_text("ascii"), re.MULTILINE)
    assert peak
    return Usage(seconds, int(peak[1]) / 1024)


def look_up(folder: Path, store: Path, names: Sequence[str]) -> float:
    """Return the ms of a query on the page of a running server: the median of many, client and all."""
    times = []
    with serving_page(folder, store) as (_, port, headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for turn in range(LOOKS):
            body = json.dumps({"text": names[turn % len(names)]})
            began = time.perf_counter()
            connection.request("POST", "/certtool/query", body, headers)
            answer = json.load(connection.getresponse())
            times.append(1000 * (time.perf_counter() - began))
            if answer.get("total") != 1:
                raise SystemExit(f"The page found no certificate: {answer}")
        connection.close()
    return statistics.median(times)


def steps_at(size: int, rounds: int, folder: Path) -> Tuple[Steps, Dict[str, float]]:
    """Measure all steps at one size; return them, and the ms of a query to a running server."""
    file = str(identities.write(folder / "identities.csv", size))
    store, database = folder / "store", folder / "database"
    name = next(identities.rows(1, first=size // 2)).device_name
    device = device_name(size // 2)
    steps: Steps = {}

    def step(what: str, who: str, usage: Usage) -> None:
        steps.setdefault((what, who), []).append(usage)

    def certtool(*command: str) -> Usage:
        return run(folder, "certtool.py", *command, "--data", str(store))

    def sqlite(*command: str) -> Usage:
        return run(folder, "-m", "bench.peers.sqlite", str(database), *command)

    def look(condition: str, *files: str) -> None:
        step(condition, BARE, run(folder, "-c", BARE_PASS, *files))
        step(f"start-up, {condition}", OURS, start_up(folder, store))
        step(f"start-up, {condition}", SQLITE, sqlite("start"))
        step(f"query by DeviceName, {condition}", OURS, certtool("query", name))
        step(f"query by DeviceName, {condition}", SQLITE, sqlite("name", identities.PRODUCT, name))

    for turn in range(rounds):
        progress(f"scale: {size:,} certificates, {FREE}, round {turn + 1} of {rounds}")
        shutil.rmtree(store, ignore_errors=True)
        for path in folder.glob("database*"):
            path.unlink()
        step(IMPORT, OURS, certtool("import", file))
        step(IMPORT, SQLITE, sqlite("import", file))
        look(FREE, file)
    looks = {f"by DeviceName, {FREE}": look_up(folder, store, [name])}
    progress(f"scale: {size:,} certificates are being allocated")
    run(folder, "-m", "bench.allocate", str(store))
    sqlite("allocate-all")
    files = [*map(str, (store / "imports").iterdir()), str(store / "journal.csv")]
    for turn in range(rounds):
        progress(f"scale: {size:,} certificates, {HELD}, round {turn + 1} of {rounds}")
        look(HELD, *files)
        step(f"query by DeviceID, {HELD}", OURS, certtool("query", "--device-id", device))
        step(f"query by DeviceID, {HELD}", SQLITE, sqlite("device", identities.PRODUCT, device))
    looks[f"by DeviceName, {HELD}"] = look_up(folder, store, [name])
    looks[f"by DeviceID, {HELD}"] = look_up(folder, store, [device])
    return steps, looks


def bare_of(what: str) -> str:
    """Return whose bare passes a step is compared with: over the identity file, or over the store's own files."""
    return HELD if what.endswith(HELD) else FREE


def middle(usages: Sequence[Usage]) -> Usage:
    """Return the median time, and the median peak."""
    return Usage(*map(statistics.median, zip(*usages)))


def ratio(steps: Steps, what: str, who: str, other_what: str, other: str) -> float:
    """Return the ratio of two steps' times."""
    return median_ratio(*([usage.seconds for usage in steps[key]] for key in ((what, who), (other_what, other))))


def table_of(size: int, steps: Steps) -> Table:
    """Return all steps at one size."""
    rows = []
    for what, who in steps:
        seconds, memory = middle(steps[what, who])
        passes = ratio(steps, what, who, bare_of(what), BARE)
        beside = number(ratio(steps, what, SQLITE, what, who)) if who == OURS else ""
        step = f"a bare pass over the files, {what}" if who == BARE else what
        rows.append([step, who, number(seconds), number(passes), number(memory), beside])
    head = ["step", "by", "seconds", "bare passes", "peak MB", "times as fast as SQLite"]
    return Table(f"{size:,} certificates", head, rows)


def goals_of(steps: Steps, looks: Dict[str, float]) -> Iterator[Goal]:
    """Yield what is promised for a million certificates."""

    def passes(what: str, limit: float) -> Goal:
        return Goal(f"1,000,000: {what}, in bare passes", False, limit, ratio(steps, what, OURS, bare_of(what), BARE))

    def peak(condition: str, *whats: str) -> float:
        return max(usage.memory for what in whats for usage in steps[f"{what}, {condition}", OURS])

    yield passes(IMPORT, 4)
    yield Goal("1,000,000: import, times as fast as SQLite", True, 3, ratio(steps, IMPORT, SQLITE, IMPORT, OURS))
    yield passes(f"start-up, {HELD}", 3)
    for what in (f"query by DeviceName, {FREE}", f"query by DeviceName, {HELD}", f"query by DeviceID, {HELD}"):
        yield passes(what, 2)
    importing = max(usage.memory for usage in steps[IMPORT, OURS])
    yield Goal("1,000,000 free: peak MB of import", False, 200, importing)
    yield Goal("1,000,000 free: peak MB of start-up", False, 200, peak(FREE, "start-up"))
    yield Goal("1,000,000 allocated: peak MB of start-up", False, 350, peak(HELD, "start-up"))
    for what, milliseconds in looks.items():
        yield Goal(f"1,000,000: query of a running server {what}, ms", False, 1, milliseconds)


def growth(measured: Dict[int, Steps]) -> Tuple[List[Curves], List[Goal]]:
    """Return curves over all sizes, and whether memory grows linearly from a million on."""
    sizes = sorted(measured)
    whole = [(IMPORT, OURS), (IMPORT, SQLITE), *((f"start-up, {condition}", OURS) for condition in (FREE, HELD))]
    times = [(FREE, BARE), *whole, (f"query by DeviceName, {FREE}", OURS), (f"query by DeviceID, {HELD}", OURS)]

    def label(what: str, who: str) -> str:
        return "a bare csv.reader pass" if who == BARE else f"{who}: {what}"

    def curves(name: str, title: str, keys: Sequence[Tuple[str, str]], field: int) -> Curves:
        series = {label(what, who): [middle(measured[size][what, who])[field] for size in sizes] for what, who in keys}
        return Curves(name, title, sizes, series)

    goals = []
    million, ten = (measured.get(size) for size in (MILLION, 10 * MILLION))
    if million and ten:
        for key in ((IMPORT, OURS), *((f"start-up, {condition}", OURS) for condition in (FREE, HELD))):
            grown = middle(ten[key]).memory / middle(million[key]).memory
            goals.append(Goal(f"10,000,000 beside 1,000,000: peak memory of {key[0]}, times", False, 10, grown))
    return [
        curves("time", "Seconds by size of the store", times, 0),
        curves("memory", "Peak MB by size of the store", whole, 1),
    ], goals


def measure(effort: Effort) -> Part:
    """Measure all sizes."""
    measured: Dict[int, Steps] = {}
    tables: List[Table] = []
    goals: List[Goal] = []
    shown: List[List[str]] = []
    for size in effort.sizes:
        with workplace() as folder:
            rounds = effort.rounds if size <= MILLION else 1
            measured[size], looks = steps_at(size, rounds, folder)
        tables.append(table_of(size, measured[size]))
        shown += [[f"{size:,}, {what}", number(milliseconds)] for what, milliseconds in looks.items()]
        if size == MILLION:
            goals += goals_of(measured[size], looks)
    curves, linear = growth(measured)
    looked = Table(f"A query of a running server, median of {LOOKS}, its client included", ["query", "ms"], shown)
    text = (
        f"Medians of {effort.rounds} rounds (one beyond a million), each step a process of its own, start of Python "
        "included. A bare pass is csv.reader over the identity file, and where all certificates are allocated over the "
        "store's import and its journal, which has an event for each. SQLite imports without validation or checksum."
    )
    return Part("Large stores", text, [*tables, looked], [*goals, *linear], curves)


if __name__ == "__main__":
    alone(str(__doc__), measure)
