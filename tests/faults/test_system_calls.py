"""The system itself fails a real server's Nth write, fsync, ftruncate or open, for every N until a run is clean."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

import pytest

from tests.faults.oracle import NewTally, Oracle, judged
from tests.stations import Stations
from tests.support import Server, need, no_secret

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs LD_PRELOAD"),
    pytest.mark.usefixtures("fast"),
]
SHIM = Path(__file__).with_name("shim.c")
TALK = {f"MAC-{number}": (0, 1, 0) for number in range(4)}
FAULTS = {
    "write: no space": ("write", errno.ENOSPC),
    "write: I/O error": ("write", errno.EIO),
    "write: half": ("write", 0),
    "fsync: I/O error": ("fsync", errno.EIO),
    "fsync: no space": ("fsync", errno.ENOSPC),
    "ftruncate: I/O error": ("ftruncate", errno.EIO),
    "open: I/O error": ("open", errno.EIO),
    "open: no space": ("open", errno.ENOSPC),
}


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled shim."""
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    command = [need("cc"), "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library), str(SHIM), "-ldl"]
    subprocess.run(command, check=True)
    return library


def lived(pool: Path, store: Path, env: Dict[str, str], oracle: Oracle) -> None:
    """One life of a server whose disk fails: start, import, devices, end; early, perhaps, but never in a traceback."""
    try:
        running = Server("--import", str(pool), store=store, env=env)
    except AssertionError as ended:
        no_secret(str(ended))
        return
    oracle.imported = 400
    oracle.hear(TALK, Stations(running.port, TALK, 2).wait())
    assert running.stop() in (0, 1)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("forever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_when_a_system_call_of_a_real_server_fails(
    fault: str,
    forever: bool,
    shim: Path,
    tally: NewTally,
    tmp_path: Path,
    pool: Path,
    profile: Path,
    thorough: bool,
) -> None:
    line = tally(f"{fault}, {'for ever' if forever else 'once'}")
    call, number = FAULTS[fault]
    store, told = tmp_path / "store", tmp_path / "told"
    nth, step = 1, 1
    failed: List[int] = []
    while True:
        line.rounds += 1
        oracle = Oracle()
        facts = {"CALL": call, "NTH": nth, "ERRNO": number, "FOREVER": int(forever), "UNDER": store, "TOLD": told}
        settings = {f"SHIM_{name}": str(value) for name, value in facts.items()}
        lived(pool, store, {"LD_PRELOAD": str(shim), **settings}, oracle)
        injected = told.exists()
        judged(line, oracle, store, profile)
        line.acknowledged += oracle.acknowledged
        shutil.rmtree(store, ignore_errors=True)
        if not injected:
            break
        told.unlink()
        failed.append(nth)
        line.injected += 1
        nth += step
        step += not thorough and nth > 6  # all of the start, and ever fewer of the commits, which are alike
    assert failed or call == "ftruncate", "otherwise the shim does nothing"
    assert "LD_PRELOAD" not in os.environ
