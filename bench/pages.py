"""What open management pages cost the production line: `python -m bench.pages [ROUNDS [PAGES]]`.

One server runs all the time; wrk asks it for certificates while nobody looks, and then while all pages poll as their
script does, round after round. Printed are medians of the rounds, and the median of each round's ratio: only that means
anything elsewhere. On a busy PC the server's own processor time is the steadier figure.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

from bench.serve import MOST, ROOT, SECONDS, load
from tests import identities

PAGES = 20
POLL_SECONDS = 1.0  # as the page's script waits from an answer to the next question
CONNECTIONS = (16, 200)
IDLE_SECONDS = 10.0  # of looking at a server that has nothing else to do

if sys.platform == "win32":
    raise SystemExit("wrk and /proc are not for Windows: measure on Linux.")
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")  # a second


@contextlib.contextmanager
def looking(port: int, headers: Dict[str, str], pages: int) -> Iterator[None]:
    """Keep pages open until the block ends; one that is not answered ends the benchmark."""
    stop = threading.Event()
    refused: List[str] = []

    def page() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        while not stop.wait(POLL_SECONDS):
            connection.request("POST", "/certtool/line", "{}", headers)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                refused.append(f"{answer.status} {text!r}")
                return
        connection.close()

    threads = [threading.Thread(target=page) for _ in range(pages)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if refused:
        raise SystemExit(f"A page was not answered: {refused[0]}")


def log_in(port: int, link: str) -> Dict[str, str]:
    """Return the headers of a page's request, with the cookie that the link is exchanged for."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", link)
    cookie = str(connection.getresponse().getheader("Set-Cookie")).partition(";")[0]
    connection.close()
    origin = f"http://127.0.0.1:{port}"
    return {"Cookie": cookie, "Origin": origin, "Content-Type": "application/json"}


def processor_time(pid: int) -> float:
    """Return the seconds that a process has worked."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def sample(server: int, port: int, connections: int, prefix: str) -> Tuple[float, float]:
    """Return certificates a second, and the server's microseconds for one."""
    before = processor_time(server)
    rate, _ = load(port, connections, "keep-alive", prefix)
    return rate, (processor_time(server) - before) / (rate * SECONDS) * 1e6


def idle_share(server: int) -> float:
    """Return the percent of one processor that a server takes which only pages ask, if any."""
    before = processor_time(server)
    time.sleep(IDLE_SECONDS)
    return (processor_time(server) - before) / IDLE_SECONDS * 100


def main(rounds: int, pages: int) -> None:
    """Run all rounds and print a table."""
    samples: Dict[int, List[List[Tuple[float, float]]]] = {connections: [[], []] for connections in CONNECTIONS}
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-") as folder:
        pool = (rounds * 2 * len(CONNECTIONS) + 1) * SECONDS * MOST
        file = identities.write(Path(folder) / "identities.csv", pool)
        store = str(Path(folder) / "store")
        command = [sys.executable, "-u", "certtool.py", "serve", "0", "--host", "127.0.0.1", "--data", store]
        server = subprocess.Popen([*command, "--import", str(file)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout
            found = next(filter(None, (re.search(r":(\d+)(/\?token=\S+)", line) for line in server.stdout)))
            port = int(found[1])
            threading.Thread(target=server.stdout.read, daemon=True).start()
            headers = log_in(port, found[2])
            load(port, 16, "keep-alive", "warm")
            shares = [idle_share(server.pid)]
            with looking(port, headers, pages):
                shares.append(idle_share(server.pid))
            for turn in range(rounds):
                for connections, (alone, watched) in samples.items():
                    alone.append(sample(server.pid, port, connections, f"{turn}-{connections}-alone"))
                    with looking(port, headers, pages):
                        watched.append(sample(server.pid, port, connections, f"{turn}-{connections}-watched"))
        finally:
            server.terminate()
            server.wait()
    print("no load: {:.2f} % of one processor without a page, {:.2f} % with {} pages".format(*shares, pages))
    print(f"medians of {rounds} rounds in turn: no page, {pages} pages, ratio")
    for connections, (alone, watched) in samples.items():
        for number, unit in enumerate(("certificates a second", "us of the server for one")):
            pairs = [(before[number], after[number]) for before, after in zip(alone, watched)]
            before, after = (statistics.median(column) for column in zip(*pairs))
            ratio = statistics.median(after / before for before, after in pairs)
            print(f"{connections:>4} connections, {unit:<26}{before:>10,.1f}{after:>10,.1f}{ratio:>8.3f}")


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]]
    main(*numbers, *(5, PAGES)[len(numbers) :])
