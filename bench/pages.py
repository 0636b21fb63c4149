"""What open management pages cost the production line: `python -m bench.pages [ROUNDS [PAGES]]`.

One server runs all the time; wrk asks it for certificates while nobody looks, and then while all pages poll as their
script does, round after round. Printed are medians of the rounds, and their ratio: only that means anything elsewhere.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Dict, Iterator, List

from bench.serve import CERTIFICATES, ROOT, load
from tests import identities

PAGES = 20
POLL_SECONDS = 1.0  # as the page's script waits from an answer to the next question
CONNECTIONS = (16, 200)


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


def main(rounds: int, pages: int) -> None:
    """Run all rounds and print a table."""
    samples: Dict[int, List[List[float]]] = {connections: [[], []] for connections in CONNECTIONS}
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-") as folder:
        file = identities.write(Path(folder) / "identities.csv", CERTIFICATES)
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
            for turn in range(rounds):
                for connections, (alone, watched) in samples.items():
                    alone.append(load(port, connections, "keep-alive", f"{turn}-{connections}-alone")[0])
                    with looking(port, headers, pages):
                        watched.append(load(port, connections, "keep-alive", f"{turn}-{connections}-watched")[0])
        finally:
            server.terminate()
            server.wait()
    print(f"requests a second, medians of {rounds} rounds in turn")
    print(f"{'connections':<16}{'no page':>12}{f'{pages} pages':>12}{'ratio':>8}")
    for connections, both in samples.items():
        before, after = map(statistics.median, both)
        print(f"{connections:<16}{before:>12,.0f}{after:>12,.0f}{after / before:>8.3f}")


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]]
    main(*numbers, *(5, PAGES)[len(numbers) :])
