"""Time and peak memory at a large store beside a bare `csv.reader` pass: `python -m bench.scale [ROWS]` (Linux).

Each step is a process of its own; its peak memory is what the system saw (ru_maxrss).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import List, Tuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.serve import free_port  # noqa: E402 - the repository's root must be on the path
from tests import identities  # noqa: E402

if sys.platform == "win32":
    raise SystemExit("Peak memory is measured by a call that only Linux has.")

Measured = Tuple[float, float]  # seconds, MB
BARE_PASS = "import csv, sys\nfor row in csv.reader(open(sys.argv[1], newline='', encoding='utf-8')): pass"


def run(*command: str) -> Measured:
    """Run a Python to its end; return its seconds and its peak memory."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.WEXITSTATUS(status)
    if process.returncode:
        raise SystemExit(f"{command} failed.")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def serve(store: str, device: str) -> Tuple[Measured, float]:
    """Start a server and ask it twice; return seconds until it is ready, peak memory, and the second answer's ms."""
    port = free_port()
    body = json.dumps({"ProductKey": identities.PRODUCT, "DeviceID": device, "Action": 0}).encode()
    began = time.perf_counter()
    command = [sys.executable, "certtool.py", "serve", str(port), "--host", "127.0.0.1", "--data", store]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    while "Waiting for client request" not in process.stdout.readline():
        pass
    seconds = time.perf_counter() - began
    for _ in range(2):
        began = time.perf_counter()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", body) as reply:
            assert json.load(reply)["Status"] == "OK"
        answer = time.perf_counter() - began
    process.terminate()
    process.stdout.close()
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    return (seconds, usage.ru_maxrss / 1024), 1000 * answer


def main(rows: int) -> None:
    """Measure all steps and print a table."""
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-") as folder:
        file = str(identities.write(Path(folder) / "identities.csv", rows))
        store = str(Path(folder) / "store")
        bare = min(run("-c", BARE_PASS, file) for _ in range(3))
        table: List[Tuple[str, Measured]] = [("bare csv.reader pass", bare)]
        table.append(("import", run("certtool.py", "import", file, "--data", store)))
        table.append(("import again", run("certtool.py", "import", file, "--data", store)))
        started, answer = serve(store, "A0B1C2D3E4F5")
        table.append(("serve, until it is ready", started))
        name = next(identities.rows(1, first=rows // 2)).device_name
        table.append(("query DEVICE_NAME", run("certtool.py", "query", name, "--data", store)))
        table.append(("query --device-id", run("certtool.py", "query", "--device-id", "A0B1C2D3E4F5", "--data", store)))
        print(f"{rows:,} certificates, {os.path.getsize(file) / 1e6:.0f} MB")
        print(f"{'':<26}{'seconds':>9}{'passes':>9}{'peak MB':>9}")
        for step, (seconds, memory) in table:
            print(f"{step:<26}{seconds:>9.2f}{seconds / bare[0]:>9.1f}{memory:>9.0f}")
        print(f"a request to that server, repeated: {answer:.1f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
