"""A store opened in this process, its state as plain data, and a disk that fails where a test wants it to."""

from __future__ import annotations

import csv
import errno
import io
import itertools
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import pytest

from certtool import (
    UNALLOCATED,
    Credential,
    ImportOptions,
    ImportReport,
    Service,
    State,
    Store,
    Undo,
    Upload,
)
from tests.identities import COLUMNS

STATION = "192.0.2.7"
SKIP_BAD = ImportOptions(skip_bad=True)


class Opened(NamedTuple):
    """A store with the state that it holds, and the service over both."""

    store: Store
    state: State
    service: Service


def open_store(folder: Path, **options: Any) -> Opened:
    """Open and load a store for writing; the caller closes it, unless opening or loading raises."""
    store, state = Store(str(folder), "test"), State()
    try:
        store.load(state)
    except BaseException:
        store.close()
        raise
    return Opened(store, state, Service(store, state, **options))


def read_store(folder: Path, *about: str) -> Opened:
    """Load a store as `query` does, changing nothing: all of it, or what is about DeviceNames and DeviceIDs."""
    store, state = Store(str(folder), writer=False), State()
    store.load(state, about=about)
    return Opened(store, state, Service(store, state))


def made_by_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file be another user's, who lets all others write to it; only root can really do so."""
    path.chmod(0o666)
    if sys.platform != "win32" and os.geteuid() == 0:
        os.chown(path, 65534, -1)
    else:
        monkeypatch.setattr("certtool._is_of_stranger", lambda _, opened: opened == str(path))


def rows_about(opened: Opened, text: str) -> List[Tuple[str, ...]]:
    """All that a store tells of the certificates that have this DeviceName or DeviceID; its files are closed then."""
    held = [product.devices[text] for product in opened.state.products.values() if text in product.devices]
    named = [number for _, number in opened.state.find(text)]
    try:
        return sorted(opened.service.row(number) for number in {*held, *named})
    finally:
        opened.store.close()


def upload(credentials: Sequence[Credential], name: str = "identities.csv") -> Upload:
    """An identity file with these certificates."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(credentials)
    return Upload.of(name, text.getvalue().encode())


def import_files(service: Service, *uploads: Upload, how: Optional[ImportOptions] = None) -> ImportReport:
    """Import at one go what a server would import in slices."""
    job = service.import_files(uploads, how or ImportOptions())
    while True:
        try:
            next(job)
        except StopIteration as done:
            report: ImportReport = done.value
            return report


def snapshot(state: State) -> Dict[str, Any]:
    """All that a state knows, as plain data that later changes do not reach: two are equal if the states are."""
    return {
        "products": {
            key: {
                "names": dict(product.names),
                "devices": dict(product.devices),
                "counts": list(product.counts),
                "free": [
                    number
                    for number in [*product.pool[product.cursor :], *product.returned]
                    if state.record(number).status == UNALLOCATED
                ],
            }
            for key, product in state.products.items()
        },
        "records": [state.record(number) for number in range(len(state.names))],
        "names": list(state.names),
        "batches": list(state.batches),
        "sources": dict(state.sources),
    }


def files(folder: Path) -> Dict[str, bytes]:
    """All files of a store but the lock, which tells who opened it last."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def lines_of(change: Callable[[List[bytes]], object]) -> Callable[[bytes], bytes]:
    """A damage that changes the list of lines."""

    def damage(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        change(lines)
        return b"".join(lines)

    return damage


def undo(state: State, steps: Sequence[Optional[Undo]]) -> None:
    """Take back the latest events, the last one first."""
    for step in reversed(steps):
        assert step
        state.restore(step)


RAISE, SHORT, IGNORE = "raise", "short", "ignore"
WATCHED = ("fsync", "ftruncate", "open", "mkdir", "makedirs")


class Disk:
    """Stands in for `os` in certtool. `fault(call)` says what happens to each call that changes the disk.

    It is given the call's name and returns RAISE (the OSError of `code`), SHORT (a write takes half and says so),
    IGNORE (the call does nothing and says nothing) or "".
    """

    def __init__(self, fault: Callable[[str], str], code: int = errno.EIO) -> None:
        self.fault = fault
        self.code = code
        self.calls: List[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._watched(name, real) if name in WATCHED else real

    def _meets(self, call: str) -> str:
        self.calls.append(call)
        fault = self.fault(call)
        if fault == RAISE:
            raise OSError(self.code, os.strerror(self.code))
        return fault

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **named: None if self._meets(name) == IGNORE else real(*args, **named)

    def write(self, descriptor: int, data: bytes) -> int:
        """Write all, a part, or nothing."""
        return os.write(descriptor, data[: len(data) // 2] if self._meets("write") == SHORT else data)


def at_call(nth: int, fault: str, *names: str) -> Callable[[str], str]:
    """The fault of a disk that fails at its call `nth` from 0, counting only the calls of these names, if any."""
    counter = itertools.count()
    return lambda call: fault if (not names or call in names) and next(counter) == nth else ""
