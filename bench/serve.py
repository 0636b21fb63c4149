"""`python -m bench.serve`: requests a second beside servers that save nothing and beside Flask with SQLite.

All servers run all the time; wrk asks one after the other, round after round. In each round certtool and Flask have a
new store with the same certificates.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple

from bench.rig import (
    ROOT,
    Effort,
    Goal,
    Load,
    Part,
    Table,
    alone,
    free_port,
    load,
    median_load,
    median_ratio,
    need_wrk,
    number,
    progress,
    running,
    serve_command,
    workplace,
)
from tests import identities

OURS, STOCK, FLASK, NODE = "certtool", "stock echo", "Flask + SQLite", "Node echo"
REQUESTS = {
    "allocate": "allocation",
    "again": "repeated request",
    "report": "burn report",
    "unknown": "unknown product, refused",
    "bad": "half a JSON object, refused",
}
ASKED = {OURS: tuple(REQUESTS), FLASK: ("allocate", "again", "report")}
ECHOED = ("allocate",)  # an echo does the same for each request
PREPARED = 500  # devices that repeat a request or report a burn: DEVICES of load.lua
USED_UP = 30_000  # certificates that one second of load may take
KINDS = {"keep-alive": "kept alive", "close": "one a request"}

Scenario = Tuple[int, str, str]  # connections, their kind, request


def command_of(peer: str, folder: Path, file: Path, port: int) -> List[str]:
    """The command that serves a peer with a new store in `folder`."""
    python = [sys.executable, "-m"]
    return {
        OURS: serve_command(folder / "store", port, "--import", str(file)),
        STOCK: [*python, "bench.peers.stock", str(port)],
        FLASK: [*python, "bench.peers.flask_sqlite", str(port), str(folder / "database"), str(file)],
        NODE: ["node", str(ROOT / "bench" / "peers" / "node.js"), str(port)],
    }[peer]


def prepare(port: int) -> None:
    """Allocate for the devices that later ask again or report, one after the other."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for name in ("again", "report"):
        for device in range(PREPARED):
            message = {"ProductKey": identities.PRODUCT, "DeviceID": f"{name}-{device}", "Action": 0}
            connection.request("POST", "/", json.dumps(message))
            answer = json.load(connection.getresponse())
            if answer["Status"] != "OK":
                raise SystemExit(f"A certificate was refused: {answer}")
    connection.close()


@contextlib.contextmanager
def serving(peers: Sequence[str], file: Path) -> Iterator[Dict[str, int]]:
    """Run all peers until the block ends; gives their ports."""
    with workplace() as folder, contextlib.ExitStack() as stack:
        ports = {peer: free_port() for peer in peers}
        for peer, port in ports.items():
            stack.enter_context(running(command_of(peer, folder, file, port), folder, port))
            prepare(port)
        yield ports


class Samples(Dict[Tuple[str, Scenario], List[Load]]):
    """What was measured of each peer in each scenario, round after round."""

    def of(self, peer: str, scenario: Scenario) -> List[Load]:
        """Return a peer's rounds in a scenario; an echo does the same for each request, and was asked for one alone."""
        return self.get((peer, scenario)) or self[peer, (*scenario[:2], ECHOED[0])]

    def ratio(self, scenario: Scenario, peer: str) -> float:
        """Return how many times the rate of a peer certtool's is."""
        ours, theirs = ([sample.rate for sample in self.of(server, scenario)] for server in (OURS, peer))
        return median_ratio(ours, theirs)


def sample_all(effort: Effort, peers: Sequence[str], file: Path) -> Samples:
    """Measure all scenarios in all rounds."""
    samples = Samples()
    for turn in range(effort.rounds):
        progress(f"serve: round {turn + 1} of {effort.rounds}")
        with serving(peers, file) as ports:
            for request in REQUESTS:
                for connections in effort.connections:
                    for kind in KINDS:
                        for peer in (peer for peer in peers if request in ASKED.get(peer, ECHOED)):
                            prefix = f"{connections}-{kind}"
                            sample = load(ports[peer], effort.seconds, connections, kind, request, prefix)
                            samples.setdefault((peer, (connections, kind, request)), []).append(sample)
    return samples


def table_of(request: str, samples: Samples, peers: Sequence[str]) -> Table:
    """Return rates, latencies and ratios of one kind of request."""
    rows = []
    for peer, scenario in samples:
        if peer != OURS or scenario[2] != request:
            continue
        for other in peers:
            measured = samples.of(other, scenario)
            rate, p50, p99, _, lost = median_load(measured)
            name = other if measured == samples.get((other, scenario)) else f"{other}, {REQUESTS[ECHOED[0]]}"
            figures = [number(rate), number(p50), number(p99), str(lost)]
            ratio = "" if other == OURS else number(samples.ratio(scenario, other))
            rows.append([f"{scenario[0]}, {KINDS[scenario[1]]}", name, *figures, ratio])
    head = ["connections", "server", "a second", "p50 ms", "p99 ms", "unanswered", "certtool's rate beside it"]
    return Table(REQUESTS[request], head, rows)


def goals_of(samples: Samples, peers: Sequence[str]) -> Iterator[Goal]:
    """Yield the goals of durable allocation for which this run has figures."""
    for peer, connections, kind, limit, stretch in (
        (STOCK, 16, "keep-alive", 3.0, False),
        (STOCK, 200, "keep-alive", 5.0, False),
        (STOCK, 16, "close", 6.0, False),
        (STOCK, 200, "close", 6.0, False),
        (FLASK, 16, "keep-alive", 10.0, False),
        (NODE, 16, "keep-alive", 1.0, True),
        (NODE, 200, "keep-alive", 1.0, True),
    ):
        scenario = (connections, kind, "allocate")
        if peer in peers and (OURS, scenario) in samples:
            what = f"allocation, {connections} connections, {KINDS[kind]}: times the rate of {peer}"
            yield Goal(what, True, limit, samples.ratio(scenario, peer), stretch)
    crowd = (200, "keep-alive", "allocate")
    if (OURS, crowd) in samples:
        tails = ([sample.p99 for sample in samples[peer, crowd]] for peer in (OURS, STOCK))
        yield Goal(
            "allocation, 200 connections, kept alive: p99 beside stock echo's", False, 0.25, median_ratio(*tails)
        )


def beside_a_small_store(effort: Effort) -> Tuple[Table, List[Goal]]:
    """Measure the rate with a large store beside that with a small one.

    Repeated requests go to a store of 1,000. Allocations need free certificates, so there the small store has as many
    as one load may use up.
    """
    rows, goals = [], []
    for request, small in (("again", 2 * PREPARED), ("allocate", USED_UP * effort.seconds)):
        progress(f"serve: {REQUESTS[request]}, {effort.pool:,} certificates beside {small:,}")
        rates: Dict[int, List[float]] = {small: [], effort.pool: []}
        with workplace() as folder:
            files = {size: identities.write(folder / f"{size}.csv", size) for size in rates}
            for turn in range(effort.rounds):
                for size, found in list(rates.items())[:: -1 if turn % 2 else 1]:  # neither is always the first
                    with serving([OURS], files[size]) as ports:
                        found.append(load(ports[OURS], effort.seconds, 16, "keep-alive", request).rate)
        ratio = median_ratio(rates[effort.pool], rates[small])
        middle = [number(statistics.median(found)) for found in rates.values()]
        rows.append([REQUESTS[request], f"{small:,}", middle[0], f"{effort.pool:,}", middle[1], number(ratio)])
        what = f"{REQUESTS[request]}: the rate with {effort.pool:,} certificates beside {small:,}"
        goals.append(Goal(what, True, 0.9, ratio))
    head = ["request", "small store", "a second", "large store", "a second", "ratio"]
    return Table("A large store beside a small one, 16 connections kept alive", head, rows), goals


def measure(effort: Effort) -> Part:
    """Measure all requests with all peers, and the large store beside the small one."""
    need_wrk()
    peers = [OURS, STOCK, FLASK, NODE]
    if not all(map(importlib.util.find_spec, ("flask", "waitress"))):
        progress(f"serve: without {FLASK}, which this Python lacks: `python -m bench --only serve` installs it")
        peers.remove(FLASK)
    if not shutil.which("node"):
        progress(f"serve: without {NODE}: install Node.js (Debian: apt-get install nodejs)")
        peers.remove(NODE)
    with workplace() as folder:
        samples = sample_all(effort, peers, identities.write(folder / "identities.csv", effort.pool))
    sizes, size_goals = beside_a_small_store(effort)
    text = (
        f"Medians of {effort.rounds} rounds of {effort.seconds} s, by wrk on the same machine. certtool and {FLASK} "
        f"make each record durable first, over {effort.pool:,} certificates; the echoes save nothing. Where a peer was "
        "not asked for this kind of request, its line is that of an allocation."
    )
    tables = [*(table_of(request, samples, peers) for request in REQUESTS), sizes]
    return Part("Requests", text, tables, [*goals_of(samples, peers), *size_goals])


if __name__ == "__main__":
    alone(str(__doc__), measure)
