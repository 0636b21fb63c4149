"""Runs certtool.py and ends it, as kill -9 does, at a chosen call: `victim.py POINT NTH certtool.py ARGUMENTS`.

POINT is "before CALL", "after CALL" or "half CALL" of one of POINTS; NTH counts such calls from 0. It exits with 99.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any, Callable, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import certtool
from certtool import CertRequestHandler, State
from tests.stores import Disk

KILLED = 99
CALLS = ("write", "fsync", "ftruncate", "open", "reply", "apply")
POINTS = tuple(f"{when} {call}" for call in CALLS for when in ("before", "after"))


def main(point: str, nth: int, arguments: Sequence[str]) -> int:
    """Run certtool with one call prepared."""
    when, _, call = point.partition(" ")
    counter = itertools.count()

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any) -> Any:
            mine = next(counter) == nth
            if mine and when == "before":
                os._exit(KILLED)
            if mine and when == "half":
                os.write(args[0], args[1][: len(args[1]) // 2])
                os._exit(KILLED)
            result = real(*args)
            if mine:
                os._exit(KILLED)
            return result

        return act

    if call == "reply":
        CertRequestHandler.send = deadly(CertRequestHandler.send)  # type: ignore[method-assign]
    elif call == "apply":
        State.apply = deadly(State.apply)  # type: ignore[method-assign]
    else:
        disk = Disk(lambda _: "")
        setattr(disk, call, deadly(getattr(os, call)))
        setattr(certtool, "os", disk)  # noqa: B010 - a name that certtool only imports
    return certtool.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[4:]))
