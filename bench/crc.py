"""`python -m bench.crc`: CRC32 by certtool and by zlib, and the start-up of the command.

Build the extension first (python build_ext.py).
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import time
import zlib
from array import array
from typing import Callable, List, Optional, Tuple

import certtool
from bench.rig import ROOT, Effort, Goal, Part, Table, alone, median_ratio, number, progress

PAYLOADS, LENGTH = 100_000, 84

Case = Tuple[str, Optional[float], Callable[[], object], Callable[[], object]]  # what, goal, zlib's side, ours


def cases() -> List[Case]:
    """Return what is compared; where the extension is not there, only what runs in Python."""
    buffer = os.urandom(1 << 20)
    payloads = [os.urandom(LENGTH) for _ in range(PAYLOADS)]
    few = payloads[:2000]

    def one_by_one() -> None:
        crc = zlib.crc32
        for payload in payloads:
            crc(payload)

    def all_of_zlib(some: List[bytes]) -> List[int]:
        return [zlib.crc32(payload) for payload in some]

    expected = all_of_zlib(payloads)
    in_python: List[Case] = [
        (
            f"pure Python, {len(few):,} payloads in a batch",
            None,
            lambda: all_of_zlib(few),
            lambda: certtool._crc32_many_pure(few),
        ),
        (
            f"pure Python, {len(few):,} payloads one by one",
            None,
            lambda: all_of_zlib(few),
            lambda: list(map(certtool.crc32_pure, few)),
        ),
    ]
    if certtool.crc32_name() != "C extension":
        return in_python
    module = sys.modules[certtool.CRC_EXTENSION]
    joined, offsets = b"".join(payloads), array("Q", itertools.accumulate(map(len, payloads), initial=0))
    checksums = array("I", bytes(4 * PAYLOADS))
    from_buffer = module.ffi.from_buffer
    arguments = joined, from_buffer("uint64_t[]", offsets), PAYLOADS, from_buffer("uint32_t[]", checksums)
    module.lib.crc32_batch(*arguments)
    assert checksums.tolist() == certtool.crc32_many(payloads) == expected
    return [
        ("one buffer of 1 MiB", 1.0, lambda: zlib.crc32(buffer), lambda: certtool.crc32(buffer)),
        (
            f"{PAYLOADS:,} payloads of {LENGTH} bytes, the batch call; joining in neither",
            5.0,
            one_by_one,
            lambda: module.lib.crc32_batch(*arguments),
        ),
        (
            f"{PAYLOADS:,} payloads, list in, list out, with all that takes: crc32_many",
            None,
            lambda: all_of_zlib(payloads),
            lambda: certtool.crc32_many(payloads),
        ),
        (
            f"{len(few):,} payloads, list in, list out: crc32_many",
            None,
            lambda: all_of_zlib(few),
            lambda: certtool.crc32_many(few),
        ),
        *in_python,
    ]


def seconds(call: Callable[[], object]) -> float:
    """Return the processor time that one call takes, over enough calls for a tenth of a second."""
    started, calls = time.process_time(), 0
    while time.process_time() - started < 0.1:
        call()
        calls += 1
    return (time.process_time() - started) / calls


def start_ups(rounds: int) -> Tuple[Table, Goal]:
    """Measure the command beside a Python that only imports what a command line and a checksum need."""
    commands = {
        'python -c "import argparse, zlib"': ["-c", "import argparse, zlib"],
        "certtool.py crc": ["certtool.py", "crc", "a2xxxx8HZ", "ouxxxxemo", "GD4JauYxxxxsICazhIzb", "4I3xxxxyF96"],
    }
    times: List[List[float]] = [[] for _ in commands]
    for _ in range(rounds):
        for command, found in zip(commands.values(), times):
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
            found.append(1000 * (time.perf_counter() - began))
    ratio = median_ratio(times[1], times[0])
    rows = [[name, number(statistics.median(found))] for name, found in zip(commands, times)]
    goal = Goal('certtool.py crc, times the start-up of python -c "import argparse, zlib"', False, 1.5, ratio)
    return Table("The command", ["", "ms"], rows), goal


def measure(effort: Effort) -> Part:
    """Measure all cases, and the command's start-up."""
    progress("crc")
    rows, goals = [], []
    for what, goal, theirs, ours in cases():
        pairs = [(seconds(theirs), seconds(ours)) for _ in range(effort.rounds)]
        zlib_times, own_times = zip(*pairs)
        ratio = median_ratio(zlib_times, own_times)
        medians = [number(1000 * statistics.median(times)) for times in (zlib_times, own_times)]
        rows.append([what, *medians, number(ratio)])
        if goal:
            goals.append(Goal(f"CRC32, {what}: times as fast as zlib", True, goal, ratio))
    command, start = start_ups(4 * effort.rounds + 1)
    text = (
        f"Processor time, medians of {effort.rounds} rounds; zlib {zlib.ZLIB_RUNTIME_VERSION}, certtool by "
        f"{certtool.crc32_name()}. A ratio above 1 means faster than zlib."
    )
    table = Table("CRC32 beside zlib's", ["", "zlib, ms", "certtool, ms", "ratio"], rows)
    return Part("Checksums", text, [table, command], [*goals, start])


if __name__ == "__main__":
    alone(str(__doc__), measure)
