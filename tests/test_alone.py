"""certtool.py is the whole product: copied alone to an empty folder it works on every supported Python."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import List

import pytest

from tests.support import CERTTOOL, StartServer, child_env, no_traceback, pythons

VENDOR = ("a2xxxx8HZ", "ouxxxxemo", "GD4JauYxxxxsICazhIzb", "4I3xxxxyF96")  # PK DN DS PS of the vendor's page
COMMANDS = ("serve", "import", "query", "crc", "release", "void")
BARE = ("-I", "-S", "-B")  # no environment, no site-packages, nothing written beside it


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """certtool.py, copied to a folder that holds nothing else."""
    folder = tmp_path / "alone"
    folder.mkdir()
    return Path(shutil.copy(CERTTOOL, folder))


@pytest.fixture(params=[sys.executable, *pythons()])
def python(request: pytest.FixtureRequest) -> List[str]:
    """A Python that has nothing but its standard library."""
    return [request.param, *BARE]


def run(python: List[str], alone: Path, *args: str) -> str:
    """Run the lone certtool.py to its end and return what it printed."""
    command = [*python, str(alone), *args]
    done = subprocess.run(command, env=child_env(), capture_output=True, encoding="utf-8", check=False)
    no_traceback(done.stdout + done.stderr)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_checksum_is_that_of_zlib(python: List[str], alone: Path) -> None:
    expected = f"{zlib.crc32(''.join(VENDOR).encode()):08X}"
    assert run(python, alone, "crc", *VENDOR, "--quiet").split() == [expected]


def test_it_tells_its_version_and_explains_each_command(python: List[str], alone: Path) -> None:
    assert "pure Python" in run(python, alone, "--version")
    for command in COMMANDS:
        assert re.match(rf"usage: .*\b{command}\b", run(python, alone, command, "--help"))
    assert list(alone.parent.iterdir()) == [alone], "asking changes nothing"


def test_it_serves_a_certificate_and_ends_on_ctrl_c(
    python: List[str], alone: Path, store: Path, tmp_path: Path, server: StartServer
) -> None:
    identities = tmp_path / "identities.csv"
    identities.write_text("ProductKey,DeviceName,DeviceSecret\na1MadeUp,lonely01,secret01\n", encoding="utf-8")
    line = server("--import", identities, python=python, script=alone)
    assert line.request("a1MadeUp", "AA:BB") == (
        200,
        {
            "ProductKey": "a1MadeUp",
            "ProductSecret": "",
            "DeviceSecret": "secret01",
            "CRC32": f"{zlib.crc32(b'a1MadeUplonely01secret01'):08X}",
            "DeviceName": "lonely01",
            "DeviceID": "AA:BB",
            "Status": "OK",
        },
    )
    assert line.stop() == 0
    listed = run(python, alone, "query", "--device-id", "AA:BB", "--format", "csv", "--data", str(store))
    assert "lonely01,a1MadeUp" in listed


def test_a_warning_leaves_at_once(python: List[str], alone: Path, tmp_path: Path, server: StartServer) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    running = server("--mirror", tmp_path / "file", python=python, script=alone)
    running.wait_for("THERE IS NO SECOND COPY")
