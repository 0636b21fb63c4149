"""Durable allocations a second beside the stock server that saves nothing: `python -m bench.serve [ROUNDS]`.

Both servers run all the time; wrk asks one and then the other, round after round. Printed are medians of the rounds,
and their ratio. Only the ratio means anything on another machine.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import identities  # noqa: E402 - the repository's root must be on the path

MOST = 30_000  # certificates a second that a round may take: the pool must not run dry
SECONDS = 3  # of load in one round
SCENARIOS = ((1, "keep-alive"), (16, "keep-alive"), (200, "keep-alive"), (16, "close"), (64, "close"), (200, "close"))
Sample = Tuple[float, str]  # requests a second, 99th percentile of latency as wrk prints it


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(*command: str, port: int) -> Iterator[None]:
    """Run a server in the background until the block ends; the block begins when it takes connections."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} ended before it served.")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()


def load(port: int, connections: int, kind: str, prefix: str) -> Sample:
    """Let wrk ask for certificates; an answer that is not 200 ends the benchmark."""
    script = ["-s", str(ROOT / "bench" / "load.lua"), f"http://127.0.0.1:{port}/", "--", prefix, kind]
    command = ["wrk", "-t1", f"-c{connections}", f"-d{SECONDS}", "--latency", *script]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in printed:
        raise SystemExit(f"Not every request got a certificate:\n{printed}")
    rate, p99 = re.search(r"Requests/sec: +([\d.]+)", printed), re.search(r"99% +(\S+)", printed)
    assert rate, printed
    assert p99, printed
    return float(rate[1]), p99[1]


def main(rounds: int) -> None:
    """Run all scenarios and print a table."""
    if not shutil.which("wrk"):
        raise SystemExit("The load comes from wrk: install it (Debian: apt-get install wrk).")
    ports = {"stock, saves nothing": free_port(), "certtool, durable": free_port()}
    stock, ours = ports.values()
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-") as folder:
        file = identities.write(Path(folder) / "identities.csv", rounds * len(SCENARIOS) * SECONDS * MOST // 2)
        store = str(Path(folder) / "store")
        serve = ("certtool.py", "serve", str(ours), "--host", "127.0.0.1", "--data", store, "--import", str(file))
        with running("-m", "bench.stock", str(stock), port=stock), running(*serve, port=ours):
            load(ours, 1, "keep-alive", "warm")  # a connection waits in the backlog while the import runs
            samples: Dict[Tuple[int, str, str], List[Sample]] = {}
            for turn in range(rounds):
                for connections, kind in SCENARIOS:
                    for name, port in ports.items():
                        sample = load(port, connections, kind, f"{turn}-{connections}-{kind}")
                        samples.setdefault((connections, kind, name), []).append(sample)
    print(f"requests a second, medians of {rounds} rounds of {SECONDS} s in turn")
    print(f"{'connections':<16}" + "".join(f"{name:>24}" for name in ports) + f"{'ratio':>8}")
    for connections, kind in SCENARIOS:
        rates = [statistics.median(rate for rate, _ in samples[connections, kind, name]) for name in ports]
        print(f"{connections:>4} {kind:<11}" + "".join(f"{rate:>24,.0f}" for rate in rates), end="")
        print(
            f"{rates[1] / rates[0]:>8.2f}   p99 {' / '.join(samples[connections, kind, name][-1][1] for name in ports)}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
