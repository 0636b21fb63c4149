"""The disk fails at its Nth call, or the power fails at any moment: what was acknowledged is there all the same."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import itertools
import os
import shutil
import sys
from pathlib import Path
from typing import AbstractSet, Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple, Type

import pytest

import certtool
from certtool import (
    BURN_FAILED,
    BURN_SUCCEEDED,
    REQUEST,
    CertToolError,
    Service,
    State,
    Store,
    StoreUnavailable,
)
from tests.faults.oracle import NewTally, Oracle, judged
from tests.identities import PRODUCT, rows
from tests.stores import RAISE, SHORT, STATION, Disk, import_files, upload
from tests.support import no_secret

STORE, MIRROR = "line/store", "disk/mirror"  # below the folder whose disk loses its power
Told = Callable[[Oracle], None]
TURNS: Sequence[Sequence[Tuple[str, int]]] = (
    (("A", REQUEST), ("B", REQUEST)),
    (("A", BURN_SUCCEEDED),),
    (("B", BURN_FAILED), ("C", REQUEST), ("A", REQUEST)),
    (("B", REQUEST), ("D", REQUEST)),
    (("D", BURN_SUCCEEDED), ("C", BURN_FAILED)),
)


@contextlib.contextmanager
def told_why(expected: Type[CertToolError]) -> Iterator[None]:
    """What is refused in here is refused in words that anybody may read."""
    try:
        yield
    except expected as error:
        no_secret(str(error))


def live(folder: Path, marks: Path, tell: Callable[[Told], None], mirror: str = "", lives: int = 2) -> None:
    """The life of a store: two imports, turns of several devices, a restart; `tell` hears what anybody was told.

    A failure ends what failed, as it does in a server: the rest goes on.
    """
    for life in range(lives):
        store, state = Store(str(folder), "fault", marks=str(marks), mirror=mirror), State()
        with contextlib.closing(store):
            store.load(state)
            service = Service(store, state)
            with told_why(StoreUnavailable):
                import_files(service, upload(list(rows(6, first=6 * life)), f"{life}.csv"))
                total = len(state.names)
                tell(lambda oracle, total=total: setattr(oracle, "imported", total))  # type: ignore[misc]
            for number, turn in enumerate(TURNS):
                with told_why(CertToolError):
                    play(service, turn if not life else [(f"{id_}{number}", REQUEST) for id_, _ in turn], tell)
        no_secret("\n".join(store.notes))


def play(service: Service, turn: Sequence[Tuple[str, int]], tell: Callable[[Told], None]) -> None:
    """One turn of a server: decide all, commit once, and only then tell the devices."""
    answers = []
    for device_id, action in turn:
        tell(lambda oracle, d=device_id, a=action: oracle.sent(d, a))  # type: ignore[misc]
        name = ""
        if action == REQUEST:
            given = service.request(PRODUCT, device_id, STATION, 1000)
            name = given.certificate.credential.device_name
        else:
            service.report(PRODUCT, device_id, action, STATION, 1000)
        answers.append((device_id, action, name))
    service.commit()
    for answer in answers:
        tell(lambda oracle, answer=answer: oracle.told(*answer))  # type: ignore[misc]


# -- calls that fail ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize(
    ("name", "fault", "code"),
    [("EIO", RAISE, errno.EIO), ("ENOSPC", RAISE, errno.ENOSPC), ("short writes", SHORT, errno.ENOSPC)],
)
def test_any_call_to_the_disk_may_fail(
    name: str,
    fault: str,
    code: int,
    forever: bool,
    tally: NewTally,
    tmp_path: Path,
    profile: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = tally(f"{name} at the Nth call, {'for ever' if forever else 'once'}")
    for nth in itertools.count():
        line.rounds += 1
        counter, oracle, store = itertools.count(), Oracle(), tmp_path / f"store{nth}"

        def meets(_: str, counter: Iterator[int] = counter, nth: int = nth) -> str:
            place = next(counter)
            return fault if place == nth or (forever and place > nth) else ""

        disk = Disk(meets, code)
        with monkeypatch.context() as patch:
            patch.setattr(certtool, "os", disk)
            with told_why(CertToolError):
                live(store, profile, lambda told, oracle=oracle: told(oracle))  # type: ignore[misc]
        line.injected += len(disk.calls) > nth
        judged(line, oracle, store, profile)
        line.acknowledged += oracle.acknowledged
        if len(disk.calls) <= nth:
            break
    assert line.injected > 40


# -- power cuts --------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One call that changes the disk, or what somebody was told. `path` is relative to the recorded folder."""

    call: str
    path: str = ""
    place: int = 0
    data: bytes = b""
    told: Optional[Told] = None


class Killed(BaseException):
    """The process is gone, and nothing in it can do anything about it."""


class Recorder(Disk):
    """Stands in for `os`, does everything, and writes it down; syncs of what `unsynced` names are left out.

    Before its change number `dies_at` the process is killed.
    """

    def __init__(
        self, root: Path, unsynced: Callable[[str], bool] = lambda path: False, dies_at: Optional[int] = None
    ) -> None:
        super().__init__(lambda call: "")
        self.steps: List[Step] = []
        self.dies_at = dies_at
        self._root = root
        self._unsynced = unsynced
        self._paths: Dict[int, Tuple[str, bool]] = {}  # by descriptor, and whether it appends

    def tell(self, told: Told) -> None:
        """Write down that somebody was told something."""
        self.steps.append(Step("told", told=told))

    def changes(self) -> int:
        """Count the calls that changed the disk."""
        return sum(step.told is None for step in self.steps)

    def restart(self) -> None:
        """The system closes what a dead process had open; from now on another one lives."""
        self.dies_at = None
        for descriptor in list(self._paths):
            with contextlib.suppress(OSError):  # closed by a file object that had it
                self.close(descriptor)

    def _write_down(self, call: str, path: str, place: int = 0, data: bytes = b"") -> None:
        if self.dies_at is not None and self.changes() >= self.dies_at:
            raise Killed
        self.steps.append(Step(call, path, place, data))

    def _name(self, path: str) -> str:
        return os.path.relpath(path, self._root)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        """Open, and remember the descriptor's path."""
        if not os.path.exists(path):
            self._write_down("create", self._name(path))
        descriptor = os.open(path, flags, mode)
        self._paths[descriptor] = (self._name(path), bool(flags & os.O_APPEND))
        return descriptor

    def close(self, descriptor: int) -> None:
        """Close, and forget the descriptor."""
        self._paths.pop(descriptor, None)
        os.close(descriptor)

    def makedirs(self, path: str, mode: int = 0o777, exist_ok: bool = False) -> None:
        """Make a folder and those above it."""
        new = [path, *map(str, Path(path).parents)]
        for folder in reversed([folder for folder in new if not os.path.isdir(folder)]):
            self._write_down("mkdir", self._name(folder))
        os.makedirs(path, mode, exist_ok)

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        """Make a folder."""
        self._write_down("mkdir", self._name(path))
        os.mkdir(path, mode)

    def unlink(self, path: str) -> None:
        """Remove a file."""
        self._write_down("unlink", self._name(path))
        os.unlink(path)

    def write(self, descriptor: int, data: bytes) -> int:
        """Write, and remember where."""
        path, appends = self._paths[descriptor]
        place = os.fstat(descriptor).st_size if appends else os.lseek(descriptor, 0, os.SEEK_CUR)
        self._write_down("write", path, place, data)
        return os.write(descriptor, data)

    def ftruncate(self, descriptor: int, size: int) -> None:
        """Cut."""
        self._write_down("cut", self._paths[descriptor][0], size)
        os.ftruncate(descriptor, size)

    def fsync(self, descriptor: int) -> None:
        """Write down that this is durable from here on."""
        path = self._paths[descriptor][0]
        if not self._unsynced(path) and not path.startswith(".."):  # a folder above the disk is always there
            self._write_down("sync", path)


Contents = Dict[str, List[Step]]  # for each file the writes and cuts since it was created


class Platter:
    """What is durable, and what is pending, at one moment of a recording."""

    def __init__(self) -> None:
        self.names: Set[str] = set()  # files and folders whose names are durable
        self.folders: Set[str] = {"."}
        self.pending: List[Tuple[str, str]] = []  # creations and removals that no sync of the folder has followed
        self.durable: Contents = {}
        self.unsynced: Contents = {}

    def take(self, step: Step) -> None:
        """Let one more call happen."""
        if step.call in ("create", "mkdir", "unlink"):
            self.pending.append((step.call, step.path))
            if step.call == "mkdir":
                self.folders.add(step.path)
            elif step.call == "create":
                self.durable[step.path], self.unsynced[step.path] = [], []
        elif step.call in ("write", "cut"):
            self.unsynced[step.path].append(step)
        elif step.call == "sync" and step.path in self.folders:
            for call, path in [entry for entry in self.pending if os.path.dirname(entry[1]) in (step.path, "")]:
                if (os.path.dirname(path) or ".") == step.path:
                    self._settle(call, path)
        elif step.call == "sync":
            self.durable[step.path] += self.unsynced[step.path]
            self.unsynced[step.path] = []

    def _settle(self, call: str, path: str) -> None:
        self.pending.remove((call, path))
        if call == "unlink":
            self.names.discard(path)
        else:
            self.names.add(path)

    def synced(self) -> Dict[str, bytes]:
        """Return the disk that has nothing but what was synced."""
        return self._disk(self.names, nothing)

    def _disk(self, names: AbstractSet[str], fate: Callable[[List[Step]], List[Step]]) -> Dict[str, bytes]:
        return {
            path: rebuilt(steps + fate(self.unsynced[path]))
            for path, steps in self.durable.items()
            if path in names and all(str(up) in names | {"."} for up in Path(path).parents)
        }

    def images(self) -> Iterator[Dict[str, bytes]]:
        """Yield each disk that a power cut may leave: file contents by path; what is not there was lost."""
        kept = {path for call, path in self.pending if call != "unlink"}
        gone = {path for call, path in self.pending if call == "unlink"}
        for names in {frozenset(self.names), frozenset((self.names | kept) - gone), frozenset(self.names | kept)}:
            for fate in (nothing, everything, torn, only_the_last, zeros):
                yield self._disk(names, fate)


def nothing(_: List[Step]) -> List[Step]:
    return []


def everything(steps: List[Step]) -> List[Step]:
    return steps


def torn(steps: List[Step]) -> List[Step]:
    """The last write came half."""
    return [*steps[:-1], *(step._replace(data=step.data[: len(step.data) // 2]) for step in steps[-1:])]


def only_the_last(steps: List[Step]) -> List[Step]:
    """A later write reached the disk before an earlier one, which leaves a hole."""
    return steps[-1:]


def zeros(steps: List[Step]) -> List[Step]:
    """The length reached the disk and the content did not."""
    return [step._replace(data=bytes(len(step.data))) for step in steps]


def rebuilt(steps: Sequence[Step]) -> bytes:
    """A file's content after these writes and cuts."""
    content = bytearray()
    for step in steps:
        if step.call == "cut":
            content = content[: step.place].ljust(step.place, b"\0")
        else:
            end = step.place + len(step.data)
            content = content.ljust(end, b"\0")
            content[step.place : end] = step.data
    return bytes(content)


def power_cuts(
    root: Path, unsynced: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Tuple[Oracle, Dict[str, bytes]]]:
    """Record a life, then yield what the oracle expects and each possible disk, at each moment of it."""
    recorder = Recorder(root, unsynced)
    with monkeypatch.context() as patch:
        patch.setattr(certtool, "os", recorder)
        live(root / STORE, root / "profile" / "certtool", recorder.tell, str(root / MIRROR))
    seen: Set[Any] = set()
    platter, told = Platter(), 0
    for moment, step in enumerate(recorder.steps):
        if step.told:
            told = moment
        else:
            platter.take(step)
        for image in platter.images():
            key = (told, frozenset(image.items()))
            if key in seen:
                continue
            seen.add(key)
            oracle = Oracle()
            for earlier in recorder.steps[: moment + 1]:
                if earlier.told:
                    earlier.told(oracle)
            yield oracle, image


def lay_out(image: Dict[str, bytes], root: Path) -> None:
    """Write the files of a disk."""
    shutil.rmtree(root, ignore_errors=True)
    for folder in (STORE, MIRROR):
        (root / folder / "imports").mkdir(parents=True)
    for path, content in image.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


posix_only = pytest.mark.skipif(sys.platform == "win32", reason="there a folder cannot be synced")


@posix_only
@pytest.mark.timeout(600)
def test_a_power_cut_at_any_moment_loses_nothing_that_was_told(
    tally: NewTally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, root = tally("power cut, un-synced writes lost, torn, reordered"), tmp_path / "image"
    mirror = tally("the same, and only the mirror is left")
    line.rounds = mirror.rounds = 1
    (tmp_path / "life").mkdir()
    for oracle, image in power_cuts(tmp_path / "life", lambda path: False, monkeypatch):
        lay_out(image, root)
        for judgement, folder, marks in ((mirror, MIRROR, None), (line, STORE, root / "profile" / "certtool")):
            judgement.injected += 1
            judged(judgement, copy.deepcopy(oracle), root / folder, marks)
            judgement.acknowledged = max(judgement.acknowledged, oracle.acknowledged)
    assert line.injected > 200


@posix_only
@pytest.mark.timeout(600)
def test_a_power_cut_after_a_kill_and_a_restart_loses_nothing_that_was_told(
    tally: NewTally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = tally("killed at the Nth change, then a restart and a power cut")
    for dies_at in itertools.count(1):
        root = tmp_path / str(dies_at)
        recorder = Recorder(root / "life", dies_at=dies_at)
        (root / "life").mkdir(parents=True)
        disk = root / "life"
        lives = functools.partial(live, disk / STORE, disk / "profile" / "certtool", recorder.tell, str(disk / MIRROR))
        with monkeypatch.context() as patch:
            patch.setattr(certtool, "os", recorder)
            try:
                lives()
            except Killed:
                recorder.restart()
                end = len(recorder.steps)
                lives(lives=1)
            else:
                break
        line.rounds += 1
        for oracle, image in last_disks(recorder.steps, end):
            line.injected += 1
            lay_out(image, root / "image")
            for folder, marks in ((MIRROR, None), (STORE, root / "image" / "profile" / "certtool")):
                judged(line, copy.deepcopy(oracle), root / "image" / folder, marks)
            line.acknowledged = max(line.acknowledged, oracle.acknowledged)
        shutil.rmtree(root)
    assert line.rounds > 60


def last_disks(steps: Sequence[Step], begin: int) -> Iterator[Tuple[Oracle, Dict[str, bytes]]]:
    """Yield each disk that has what was synced and nothing else, and what the oracle expects at the end of its time."""
    platter, oracle = Platter(), Oracle()
    image, told = platter.synced(), False
    for moment, step in enumerate(steps):
        if step.told:
            step.told(oracle)
            told = moment >= begin
            continue
        platter.take(step)
        if platter.synced() != image:
            if told:
                yield copy.deepcopy(oracle), image
            image, told = platter.synced(), False
    yield oracle, image


@posix_only
@pytest.mark.parametrize(
    "without",
    [
        f"{STORE}/journal.csv",
        f"{STORE}/imports/000001-0.csv",
        f"{STORE}/imports",
        STORE,
        "line",
        ".",
        f"{MIRROR}/journal.csv",
        f"{MIRROR}/imports/000001-0.csv",
        f"{MIRROR}/imports",
        MIRROR,
        "disk",
    ],
)
def test_the_harness_notices_when_one_sync_is_missing(
    without: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "image"
    (tmp_path / "life").mkdir()
    for oracle, image in power_cuts(tmp_path / "life", lambda path: path == without, monkeypatch):
        lay_out(image, root)
        marks = root / "profile" / "certtool"
        if any(copy.deepcopy(oracle).judge(root / MIRROR)) or any(oracle.judge(root / STORE, marks)):
            return
    pytest.fail(f"without the sync of {without} nothing was lost: the harness is blind")
