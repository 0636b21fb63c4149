"""The power of a disk with a real file system is cut at any moment: what was acknowledged is there all the same.

The disk is a file of FUSE, which is spoken here, and writes down all that the kernel writes and flushes while a real
server works on a file system in it. What a flush has followed is there after a power cut; of the rest some, some of it
torn. Then the file system mends itself, and the store is opened.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import errno
import http.client
import itertools
import json
import mmap
import os
import random
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from operator import methodcaller
from pathlib import Path
from typing import Callable, Dict, Generator, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pytest

from certtool import BURN_SUCCEEDED, REQUEST
from tests import identities
from tests.faults.oracle import NewTally, Oracle, judged
from tests.identities import PRODUCT
from tests.support import CERTTOOL, RunCerttool, Server, missing, need

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs FUSE and mounts of Linux")

MAKE: Dict[str, Tuple[int, Sequence[str]]] = {  # megabytes, and what makes the file system
    "ext4": (64, ("mkfs.ext4", "-q", "-F")),
    "xfs": (300, ("mkfs.xfs", "-q", "-f")),
    "btrfs": (128, ("mkfs.btrfs", "-q", "-f")),
}
SECTOR = 4096  # bytes that a disk writes whole or not at all
MAX_WRITE = 1 << 17  # bytes of a request
NEW_MOUNTS = 0x20000  # CLONE_NEWNS of Linux

GETATTR, OPEN, READ, WRITE, FSYNC, INIT = 3, 14, 15, 16, 20, 26  # of the kernel's include/uapi/linux/fuse.h


class Step(NamedTuple):
    """What the disk was asked for: a write, or without data a flush; or what somebody was `told` meanwhile."""

    offset: int = 0
    data: bytes = b""
    told: Optional[Callable[[Oracle], None]] = None


Left = Generator[Tuple[Oracle, Path], None, None]  # what the oracle expects, and where the disk is mounted


class Disk:
    """A file at `path` with the content of `image`, which is changed; `steps` is what happened to it, in order."""

    def __init__(self, path: Path, image: mmap.mmap) -> None:
        self.steps: List[Step] = []
        self._path, self._image = path, image
        self._fuse = os.open("/dev/fuse", os.O_RDWR)
        path.touch()
        options = f"fd={self._fuse},rootmode=100000,user_id=0,group_id=0"
        mount = ["mount", "-i", "-t", "fuse", "-o", options, "certtool-power", str(path)]
        subprocess.run(mount, pass_fds=[self._fuse], check=True)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take the disk away."""
        subprocess.run(["umount", "--lazy", str(self._path)], check=True)
        self._thread.join(10)
        os.close(self._fuse)

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._fuse, MAX_WRITE + 8192)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                continue  # the request was taken back
            _, kind, unique = struct.unpack_from("<IIQ", request)
            answer = self._answer(kind, request[40:])
            error_code = 0 if answer or kind == FSYNC else -errno.ENOSYS
            with contextlib.suppress(OSError):  # the request was taken back
                os.write(self._fuse, struct.pack("<IiQ", 16 + len(answer), error_code, unique) + answer)

    def _answer(self, kind: int, body: bytes) -> bytes:
        if kind == INIT:
            return struct.pack("<4I2H2I2H32x", 7, 31, MAX_WRITE, 1 << 5, 16, 12, MAX_WRITE, 1, 0, 0)
        if kind == GETATTR:
            size = len(self._image)
            return struct.pack("<16x6Q10I", 1, size, size // 512, 0, 0, 0, 0, 0, 0, 0o100600, 1, 0, 0, 0, 4096, 0)
        if kind == OPEN:
            return struct.pack("<QII", 0, 1, 0)  # not cached: each write is here before it is done
        if kind == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return self._image[offset : offset + size]
        if kind == WRITE:
            _, offset, size = struct.unpack_from("<QQI", body)
            self.steps.append(Step(offset, body[40:]))
            self._image[offset : offset + size] = body[40:]
            return struct.pack("<II", size, 0)
        if kind == FSYNC:
            self.steps.append(Step())
        return b""


@contextlib.contextmanager
def mounted(kind: str, blocks: Path, folder: Path, changes: Sequence[Step] = ()) -> Iterator[List[Step]]:
    """Mount a copy of the file system in `blocks` with `changes` on `folder`; yield what happens to its disk."""
    path = blocks.with_name("disk.img")
    mount = ["mount", "-t", kind, "-o", "loop", str(path), str(folder)]
    with open(blocks, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as image:
        for offset, data, _ in changes:
            image[offset : offset + len(data)] = data
        with contextlib.closing(Disk(path, image)) as disk:
            subprocess.run(mount, check=True)
            try:
                yield disk.steps
            finally:
                subprocess.run(["umount", str(folder)], check=True)


def station(port: int, devices: Sequence[str], steps: List[Step]) -> None:
    """Ask for certificates and report burns; write down among the disk's steps what was sent and what was answered."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):  # it was killed
        for device_id, action in itertools.product(devices, (REQUEST, BURN_SUCCEEDED, REQUEST)):
            body = json.dumps({"ProductKey": PRODUCT, "DeviceID": device_id, "Action": action})
            steps.append(Step(told=methodcaller("sent", device_id, action)))
            connection.request("POST", "/", body)
            answer = json.loads(connection.getresponse().read())
            assert answer["Status"] == "OK"
            steps.append(Step(told=methodcaller("told", device_id, action, answer.get("DeviceName", ""))))


def live(folder: Path, pool: Path, certtool: RunCerttool, script: Path, steps: List[Step]) -> None:
    """Two lives of a server on the disk, the first one killed: devices come, and certificates are imported."""
    env = {"XDG_STATE_HOME": str(folder / "profile")}
    for life in (0, 1):
        running = Server("--import", str(pool), store=folder / "store", script=script, env=env)
        steps.append(Step(told=methodcaller("__setattr__", "imported", 400 + 3000 * life)))
        with ThreadPoolExecutor(8) as threads:
            names = [[f"MAC-{life}-{place}-{number}" for number in range(12)] for place in range(8)]
            work = [threads.submit(station, running.port, some, steps) for some in names]
            more = identities.write(pool.with_name("more.csv"), 3000, first=1000 + 3000 * life)
            certtool("import", more, "--data", folder / "store", env=env)
            steps.append(Step(told=methodcaller("__setattr__", "imported", 3400 + 3000 * life)))
            if life == 0:
                running.kill()
            for done in work:
                done.result(60)
    running.stop()


def torn(write: Step, chance: random.Random) -> List[Step]:
    """All sectors of a write, or some."""
    places = range(0, len(write.data), SECTOR)
    sectors = [Step(write.offset + place, write.data[place : place + SECTOR]) for place in places]
    return chance.sample(sectors, chance.choice([len(sectors), chance.randrange(len(sectors) + 1)]))


def power_cuts(steps: Sequence[Step], blocks: Path, often: int) -> Iterator[Tuple[Oracle, List[Step]]]:
    """Yield what the oracle expects at one in `often` moments, and what a power cut leaves but what is in `blocks`."""
    oracle, chance = Oracle(), random.Random(7)
    pending: List[Step] = []  # not flushed
    with open(blocks, "r+b", buffering=0) as file:
        for step in steps:
            if step.told:
                step.told(oracle)
                continue
            if chance.randrange(often) == 0:
                kept = chance.sample(pending, chance.randrange(len(pending) + 1))
                yield copy.deepcopy(oracle), [sector for write in kept for sector in torn(write, chance)]
            if step.data:
                pending.append(step)
                continue
            for offset, data, _ in pending:
                file.seek(offset)
                file.write(data)
            pending = []


@contextlib.contextmanager
def own_mounts() -> Iterator[None]:
    """Let no other process see what is mounted, and keep it mounted; what is left in the end goes away."""
    system, here = ctypes.CDLL(None), os.getcwd()
    with open("/proc/thread-self/ns/mnt", "rb") as others:
        if system.unshare(NEW_MOUNTS) or not os.path.exists("/dev/fuse"):
            missing("only root can mount disks, and only where the system has FUSE")
        try:
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            yield
        finally:
            assert system.setns(others.fileno(), NEW_MOUNTS) == 0
            os.chdir(here)


@pytest.fixture
def shift(thorough: bool, tmp_path: Path, pool: Path, certtool: RunCerttool) -> Iterator[Callable[..., Left]]:
    """Let a server work on a file system of some kind, and yield what each power cut leaves."""
    if not thorough:
        pytest.skip("hundreds of disks are mounted: --thorough runs it")

    def work(kind: str, often: int, script: Path = CERTTOOL) -> Left:
        megabytes, make = MAKE[kind]
        blocks, folder = tmp_path / "blocks", tmp_path / "disk"
        folder.mkdir()
        with open(blocks, "wb") as file:
            file.truncate(megabytes << 20)
        subprocess.run([need(make[0]), *make[1:], str(blocks)], check=True)
        with mounted(kind, blocks, folder) as steps:
            live(folder, pool, certtool, script, steps)
        for oracle, changes in power_cuts(steps, blocks, often):
            with mounted(kind, blocks, folder, changes):
                yield oracle, folder

    with own_mounts():
        yield work


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", MAKE)
def test_a_power_cut_under_a_real_file_system_loses_nothing_that_was_told(
    kind: str, shift: Callable[..., Left], tally: NewTally
) -> None:
    line = tally(f"power cut under {kind}")
    line.rounds = 1
    with contextlib.closing(shift(kind, often=3)) as left:
        for oracle, folder in left:
            line.injected += 1
            judged(line, oracle, folder / "store", folder / "profile" / "certtool")
            line.acknowledged = max(line.acknowledged, oracle.acknowledged)
    assert line.injected > 100


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", MAKE)
def test_a_server_that_does_not_sync_loses_what_was_told_in_a_power_cut(
    kind: str, shift: Callable[..., Left], tmp_path: Path
) -> None:
    """A harness that cannot fail proves nothing."""
    program, script = CERTTOOL.read_text(encoding="utf-8"), tmp_path / "certtool.py"
    sync = "            os.fsync(self._journal)\n"
    assert sync in program
    script.write_text(program.replace(sync, "            pass\n"), encoding="utf-8")
    with contextlib.closing(shift(kind, 1, script)) as left:
        assert any(any(oracle.judge(folder / "store")) for oracle, folder in left)
