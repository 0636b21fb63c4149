"""`python -m bench.crc`: CRC32 by certtool and by zlib: one run, in turn, medians of processor time.

A ratio above 1 means faster than zlib. Build the extension first (python build_ext.py).
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
import zlib
from array import array
from typing import Callable, List, Optional, Tuple

import certtool

ROUNDS = 9
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


def main() -> int:
    """Print the table."""
    print(f"CPython {sys.version.split()[0]}, zlib {zlib.ZLIB_RUNTIME_VERSION}, certtool by {certtool.crc32_name()}")
    print(f"{'':68} {'zlib, ms':>9} {'ours, ms':>9} {'ratio':>6}  goal")
    for what, goal, theirs, ours in cases():
        pairs = [(seconds(theirs), seconds(ours)) for _ in range(ROUNDS)]
        zlib_time, own_time = (1000 * statistics.median(times) for times in zip(*pairs))
        ratio = statistics.median(theirs / ours for theirs, ours in pairs)
        print(f"{what:68} {zlib_time:9.3f} {own_time:9.3f} {ratio:6.2f}  {goal or ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
