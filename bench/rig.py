"""What all benchmarks share: how long to measure, a place to work in, servers, wrk's load, and what a result is."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, NoReturn, Sequence, Tuple

ROOT = Path(__file__).resolve().parent.parent
SETTLE_SECONDS = 30.0  # for a server to have done what clients that are gone had asked for
START_SECONDS = 600.0  # for a server to be ready, with ten million certificates on a busy PC


class Effort(NamedTuple):
    """How much to measure: rounds, seconds of load in each, certificates of the loaded servers, sizes of the stores.

    The sizes are ten times apart, so that growth is drawn evenly.
    """

    rounds: int
    seconds: int
    pool: int
    sizes: Tuple[int, ...]
    connections: Tuple[int, ...]
    pages: int


QUICK = Effort(1, 1, 60_000, (1_000, 10_000), (16,), 3)
NORMAL = Effort(5, 3, 1_000_000, (10_000, 100_000, 1_000_000), (1, 16, 200), 20)
THOROUGH = NORMAL._replace(sizes=(*NORMAL.sizes, 10_000_000))


class Table(NamedTuple):
    """A table as text: the first column says what, the others are numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Goal(NamedTuple):
    """A limit on a measured figure: at least `limit`, or else at most."""

    what: str
    at_least: bool
    limit: float
    measured: float
    stretch: bool = False  # wished for, not promised

    @property
    def holds(self) -> bool:
        """Whether it was reached in this run."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


class Curves(NamedTuple):
    """What grows with the number of certificates: for each name one figure a size."""

    name: str
    title: str
    sizes: Sequence[int]
    series: Dict[str, List[float]]


class Part(NamedTuple):
    """The results of one benchmark: tables with a sentence on how they came about, goals, and growth curves."""

    title: str
    text: str
    tables: Sequence[Table]
    goals: Sequence[Goal] = ()
    curves: Sequence[Curves] = ()


class Load(NamedTuple):
    """What wrk measured: requests a second, latency in ms, and how many answers were refusals or did not come."""

    rate: float
    p50: float
    p99: float
    refused: int = 0
    lost: int = 0


def progress(text: str) -> None:
    """Say what is being measured, for whoever waits."""
    print(f"-- {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder that is gone afterwards, on the disk of the repository: /tmp may be memory."""
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-") as folder:
        yield Path(folder)


def child_env(folder: Path) -> Dict[str, str]:
    """The environment of a measured program: no setting reaches it, and its high-water marks stay in `folder`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CERTTOOL_", "PYTHON"))}
    return {**env, "XDG_STATE_HOME": str(folder / "profile")}


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def serve_command(store: Path, port: int, *options: str) -> List[str]:
    """The command that serves a store to this PC."""
    where = [str(port), "--host", "127.0.0.1", "--data", str(store)]
    return [sys.executable, "certtool.py", "serve", *where, *options]


@contextlib.contextmanager
def running(command: Sequence[str], folder: Path, port: int) -> Iterator[None]:
    """Run a server until the block ends, which begins when a request is answered."""
    log = folder / f"{port}.log"
    with open(log, "wb") as errors:  # in a session of its own: Ctrl-C reaches this program alone, which then ends it
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=child_env(folder),
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(port, START_SECONDS):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(command[1:3])} did not serve: {log.read_text(errors='replace')}")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


def answers(port: int, seconds: float) -> bool:
    """Say whether a server answers a request within this time."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as connection:
        connection.settimeout(seconds)
        connection.sendall(b"POST / HTTP/1.1\r\nHost: bench\r\nContent-Length: 2\r\n\r\n{}")
        return connection.recv(1) != b""
    return False


def need_wrk() -> None:
    """End here where there is no wrk."""
    if not shutil.which("wrk"):
        raise SystemExit("The load comes from wrk: install it (Debian: apt-get install wrk).")


def load(port: int, seconds: int, connections: int, kind: str, request: str, prefix: str = "") -> Load:
    """Let wrk send requests as load.lua makes them, over connections that are of the `kind` keep-alive or close.

    It begins when the server answers, so when it has done what an earlier load left over.
    """
    answers(port, SETTLE_SECONDS)
    script = ["-s", str(ROOT / "bench" / "load.lua"), f"http://127.0.0.1:{port}/", "--", kind, request, prefix]
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "--latency", *script]
    measured = parse_wrk(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    if measured.refused and request not in REFUSED:
        raise SystemExit(f"{measured.refused} of the requests ({request}) were refused.")
    return measured


REFUSED = ("unknown", "bad")  # what load.lua sends to be refused
_MILLISECONDS = {"us": 0.001, "ms": 1, "s": 1000, "m": 60_000}


def parse_wrk(printed: str) -> Load:
    """Read what `wrk --latency` prints."""

    def latency(percentile: int) -> float:
        found = re.search(rf"^ +{percentile}% +([\d.]+)(us|ms|s|m) *$", printed, re.MULTILINE)
        if not found:
            raise ValueError(f"wrk printed no {percentile}th percentile:\n{printed}")
        return float(found[1]) * _MILLISECONDS[found[2]]

    rate = re.search(r"^Requests/sec: +([\d.]+)$", printed, re.MULTILINE)
    if not rate:
        raise ValueError(f"wrk printed no rate:\n{printed}")
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", printed)
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", printed)
    lost = sum(map(int, errors.groups())) if errors else 0
    return Load(float(rate[1]), latency(50), latency(99), int(refused[1]) if refused else 0, lost)


def median_load(loads: Sequence[Load]) -> Load:
    """Return the median of each figure over the rounds; of what went wrong the sum."""
    rate, p50, p99, *_ = map(statistics.median, zip(*loads))
    return Load(rate, p50, p99, sum(load.refused for load in loads), sum(load.lost for load in loads))


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of each round's ratio: what slows the whole machine for a round slows both."""
    return statistics.median(own / other if other else math.inf for own, other in zip(ours, theirs))


def number(value: float) -> str:
    """Write a figure with three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.095 else f"{value:.3f}"


def efforts(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how much to measure; `effort` is what was chosen."""
    how = parser.add_mutually_exclusive_group()
    for option, effort, meaning in (
        ("--quick", QUICK, "only see that it works: the figures mean nothing"),
        ("--thorough", THOROUGH, "also a store of 10,000,000 certificates"),
    ):
        how.add_argument(option, dest="effort", action="store_const", const=effort, default=NORMAL, help=meaning)


def interruptible(run: Callable[[], int]) -> NoReturn:
    """Run and exit; Ctrl-C and SIGTERM end it with one line, after all folders and processes have been removed."""
    if not sys.platform.startswith("linux"):
        sys.exit("The benchmarks need wrk, /proc and wait4: run them on Linux.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(run())
    except KeyboardInterrupt:
        sys.exit("Interrupted: nothing was written.")


def alone(description: str, measure: Callable[[Effort], Part]) -> NoReturn:
    """The command line of one benchmark: measure and print."""
    from bench.report import as_text  # noqa: PLC0415 - report needs what is defined here

    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    efforts(parser)
    options = parser.parse_args()

    def run() -> int:
        print(as_text(measure(options.effort)))
        return 0

    interruptible(run)
