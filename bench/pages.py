"""`python -m bench.pages`: what open management pages cost the production line.

wrk asks for certificates while nobody looks, and then while all pages poll as their script does, round after round. How
much a server works that nobody asks for certificates is measured too, without a page and with all.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

from bench.rig import (
    ROOT,
    Effort,
    Part,
    Table,
    alone,
    child_env,
    load,
    median_ratio,
    need_wrk,
    number,
    progress,
    serve_command,
    workplace,
)
from tests import identities

POLL_SECONDS = 1.0  # as the page's script waits from an answer to the next question
MEASURED = ("certificates a second", "us of the server for one")


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
    """Return the headers of a page's request, with the cookie and the key that the link is exchanged for."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", link)
    answer = connection.getresponse()
    cookie = str(answer.getheader("Set-Cookie")).partition(";")[0]
    key = str(answer.getheader("Location")).partition("#key=")[2]
    connection.close()
    origin = f"http://127.0.0.1:{port}"
    return {"Cookie": cookie, "Certtool-Key": key, "Origin": origin, "Content-Type": "application/json"}


def processor_time(pid: int) -> float:
    """Return the seconds that a process has worked."""
    if sys.platform == "win32":
        raise NotImplementedError
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serving_page(folder: Path, store: Path, *options: str) -> Iterator[Tuple[int, int, Dict[str, str]]]:
    """Serve a store until the block ends; gives the server's process number, its port and the headers of a page."""
    log = folder / "page.log"
    with open(log, "wb") as errors:
        server = subprocess.Popen(
            serve_command(store, 0, *options),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=child_env(folder),
            start_new_session=True,
        )
    try:
        assert server.stdout
        found = next(filter(None, (re.search(r":(\d+)(/\?token=\S+)", line) for line in server.stdout)), None)
        if not found:
            raise SystemExit(f"certtool did not serve: {log.read_text(errors='replace')}")
        threading.Thread(target=server.stdout.read, daemon=True).start()
        yield server.pid, int(found[1]), log_in(int(found[1]), found[2])
    finally:
        server.terminate()
        server.wait()


def sample(server: int, port: int, effort: Effort, connections: int, prefix: str) -> Tuple[float, float]:
    """Return certificates a second, and the server's microseconds for one."""
    before = processor_time(server)
    rate = load(port, effort.seconds, connections, "keep-alive", "allocate", prefix).rate
    return rate, (processor_time(server) - before) / (rate * effort.seconds) * 1e6


def idle_share(server: int, seconds: int) -> float:
    """Return the percent of one processor that a server takes which only pages ask, if any."""
    before = processor_time(server)
    time.sleep(seconds)
    return (processor_time(server) - before) / seconds * 100


def measure(effort: Effort) -> Part:
    """Measure with no page and with all pages, in turn."""
    need_wrk()
    rows = []
    idle: List[Tuple[float, float]] = []
    with workplace() as folder:
        file = identities.write(folder / "identities.csv", effort.pool)
        for connections in (connections for connections in effort.connections if connections > 1):
            closed, watched = [], []
            progress(f"pages: {effort.pages} of them, {connections} connections")
            for turn in range(effort.rounds):
                store = folder / f"store-{connections}-{turn}"
                with serving_page(folder, store, "--import", str(file)) as (server, port, headers):
                    closed.append(sample(server, port, effort, connections, "closed"))
                    alone_share = idle_share(server, effort.seconds)
                    with looking(port, headers, effort.pages):
                        idle.append((alone_share, idle_share(server, effort.seconds)))
                        watched.append(sample(server, port, effort, connections, "open"))
                shutil.rmtree(store)
            for what, before, after in zip(MEASURED, zip(*closed), zip(*watched)):
                figures = [number(statistics.median(before)), number(statistics.median(after))]
                rows.append([f"{connections} connections, {what}", *figures, number(median_ratio(after, before))])
    nobody, all_pages = (statistics.median(shares) for shares in zip(*idle))
    rows.append(["no load, percent of one processor", number(nobody), number(all_pages), ""])
    text = (
        f"Medians of {effort.rounds} rounds of {effort.seconds} s. Each page asks once a second, as its script does. "
        "On a busy PC the server's own processor time for a certificate is the steadier figure."
    )
    head = ["", "no page", f"{effort.pages} pages", "ratio"]
    return Part("Open management pages", text, [Table("Allocation while nobody and while everybody looks", head, rows)])


if __name__ == "__main__":
    alone(str(__doc__), measure)
