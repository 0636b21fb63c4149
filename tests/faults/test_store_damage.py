"""What people, spreadsheets and old copies do to a store's files: it is refused, or it is as it was."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Dict, List, Optional

import pytest

import certtool as program
from certtool import Service, State, Store, StoreError
from tests.faults.oracle import NewTally, Oracle, judged
from tests.faults.test_disk import TURNS, play
from tests.identities import rows
from tests.stores import files, import_files, lines_of, upload
from tests.support import RunCerttool, StartServer, need, no_secret

SECRET = "0012345678901234567890"  # which a spreadsheet would take for a number


DAMAGES: Dict[str, Callable[[bytes], bytes]] = {
    "cut in half": lambda data: data[: len(data) // 2],
    "cut at its last line": lambda data: data[: data.rindex(b"\n", 0, -1) + 1],
    "cut in its last line": lambda data: data[:-5],
    "emptied": lambda data: b"",
    "removed": lambda data: b"",
    "a bit flipped": lambda data: data[:150] + bytes([data[150] ^ 4]) + data[151:],
    "filled with zeros": lambda data: bytes(len(data)),
    "zeros in the middle": lambda data: data[:200] + bytes(64) + data[264:],
    "zeros for the last line": lambda data: data[: data.rindex(b"\n", 0, -1) + 1] + bytes(80),
    "two lines swapped": lines_of(lambda lines: lines.insert(2, lines.pop(3))),
    "a line dropped": lines_of(lambda lines: lines.pop(3)),
    "a line doubled": lines_of(lambda lines: lines.insert(3, lines[3])),
    "the last line doubled": lines_of(lambda lines: lines.append(lines[-1])),
    "saved with a BOM": lambda data: b"\xef\xbb\xbf" + data,
    "saved with CRLF": lambda data: data.replace(b"\n", b"\r\n"),
    "saved with semicolons": lambda data: data.replace(b",", b";"),
    "saved as UTF-16": lambda data: data.decode().encode("utf-16"),
    "quotes dropped": lambda data: data.replace(b'"', b"") + b"\n" * (b'"' not in data),
    "leading zeros gone": lambda data: re.sub(rb",0+(\d)", rb",\1", data) + b"\n" * (b",00" not in data),
    "dates rewritten": lambda data: re.sub(rb"(\d{4})-(\d\d)-(\d\d)T", rb"\3/\2/\1 ", data)
    + b"\n" * (b"T" not in data),
    "long numbers rewritten": lambda data: re.sub(rb"\d{16,}", b"1.23457E+19", data) + b"\n",
}


CSV = "Text - txt - csv (StarCalc)"
WAYS_TO_SAVE: Dict[str, List[str]] = {  # options of LibreOffice
    "as it comes": ["--convert-to", "csv"],
    "numbers and dates found": [f"--infilter={CSV}:44,34,76,1,,1033,false,true", "--convert-to", "csv"],
    "quoted": ["--convert-to", f"csv:{CSV}:44,34,76,1,,0,true,false"],
    "semicolons": ["--convert-to", f"csv:{CSV}:59,34,76"],
}


@pytest.fixture
def used(store: Path, profile: Path) -> Oracle:
    """What the stations of a used store were told; nobody serves it now."""
    oracle, state = Oracle(), State()
    opened = Store(str(store), "fault", marks=str(profile))
    with contextlib.closing(opened):
        opened.load(state)
        service = Service(opened, state)
        row = next(rows(1))
        import_files(service, upload([*rows(6, first=1), row._replace(device_secret=SECRET)]))
        oracle.imported = 7
        for turn in TURNS:
            play(service, turn, lambda told: told(oracle))
    return oracle


def is_refused(store: Path, profile: Path) -> Optional[str]:
    """Start on the store; return why it is refused, None where it is not."""
    opened = Store(str(store), "fault", marks=str(profile))
    with contextlib.closing(opened):
        try:
            opened.load(State())
        except StoreError as error:
            no_secret(str(error))
            return str(error)
    return None


@pytest.mark.parametrize("which", ["journal", "import file"])
def test_a_damaged_file_is_refused_and_left_as_it_is(
    which: str, tally: NewTally, store: Path, profile: Path, used: Oracle
) -> None:
    line = tally(f"{which} damaged")
    [path] = [store / "journal.csv"] if which == "journal" else (store / "imports").iterdir()
    good = path.read_bytes()
    for name, damage in DAMAGES.items():
        line.rounds += 1
        damaged = damage(good)
        assert damaged != good, name
        path.write_bytes(damaged)
        if name == "removed":
            path.unlink()
        before = files(store)
        refused = is_refused(store, profile)
        assert refused, name
        assert "\n" not in refused
        assert SECRET not in refused
        assert files(store) == before, name
        line.injected += 1
        path.write_bytes(good)
        judged(line, used, store, profile)
    line.acknowledged = used.acknowledged


def test_files_that_a_spreadsheet_program_saved_are_refused(
    tally: NewTally, store: Path, profile: Path, used: Oracle, tmp_path: Path, thorough: bool
) -> None:
    if not thorough:
        pytest.skip("LibreOffice takes long: --thorough runs it")
    office, line = need("soffice"), tally("saved by LibreOffice")
    [certificates] = (store / "imports").iterdir()
    changed = set()
    for path, (way, options) in itertools.product((store / "journal.csv", certificates), WAYS_TO_SAVE.items()):
        line.rounds += 1
        good, saved = path.read_bytes(), tmp_path / way
        home = f"-env:UserInstallation=file://{tmp_path}/office"
        command = [office, home, "--headless", *options, "--outdir", str(saved), str(path)]
        subprocess.run(command, check=True, capture_output=True, timeout=110)
        shutil.copy(saved / path.name, path)
        if path.read_bytes() != good:  # a journal may come through it unharmed
            changed.add((path, way))
            line.injected += 1
            before = files(store)
            refused = is_refused(store, profile)
            assert refused, (path, way)
            assert SECRET not in refused
            assert files(store) == before
        path.write_bytes(good)
        judged(line, used, store, profile)
    assert {way for path, way in changed if path == certificates} == set(WAYS_TO_SAVE)
    assert (store / "journal.csv", "quoted") in changed
    line.acknowledged = used.acknowledged


def test_an_old_copy_of_the_store_is_served_only_after_a_person_said_why(
    tally: NewTally, server: StartServer, store: Path, certtool: RunCerttool, pool: Path, tmp_path: Path, profile: Path
) -> None:
    line, oracle = tally("an old copy put back"), Oracle()
    product = next(rows(1)).product_key
    running = server("--import", pool)
    running.request(product, "MAC-0")
    running.stop()
    for kind in ("stopped", "killed"):
        line.rounds += 1
        old = Path(shutil.copytree(store, tmp_path / kind))
        running = server()
        for number in range(5):
            device_id = f"{kind}-{number}"
            oracle.hear({device_id: (0,)}, {device_id: [running.request(product, device_id)]})
        running.kill() if kind == "killed" else running.stop()
        latest = store.rename(tmp_path / f"latest {kind}")
        old.rename(store)
        before = files(store)
        served, imported = ["serve", "0", "--host", "127.0.0.1"], ["import", pool]
        for command in (served, imported, [*imported, "--dry-run"], ["void", "x", "--reason", "x"]):
            refused = certtool(*command, "--data", store, ok=1).stderr
            assert "is not the latest copy of this store" in refused
            assert refused.count("\n") == 1
            assert "accept-restore --reason TEXT" in refused
        assert files(store) == before
        line.injected += 1
        shutil.rmtree(store)
        latest.rename(store)
        oracle.devices.setdefault("MAC-0", {(program.ALLOCATED, "")})
        judged(line, oracle, store, profile)
    line.acknowledged = oracle.acknowledged


def test_a_person_may_accept_an_old_copy_with_a_reason_that_stays_in_the_journal(
    server: StartServer, store: Path, certtool: RunCerttool, pool: Path, tmp_path: Path
) -> None:
    product = next(rows(1)).product_key
    server("--import", pool).stop()
    shutil.copytree(store, tmp_path / "old")
    running = server()
    running.request(product, "MAC-1")
    assert "stop that first" in certtool("accept-restore", "--reason", "x", "--data", store, ok=1).stderr
    running.stop()
    assert "nothing to accept" in certtool("accept-restore", "--reason", "x", "--data", store, ok=1).stderr
    shutil.rmtree(store)
    (tmp_path / "old").rename(store)
    assert "A reason is needed" in certtool("accept-restore", "--reason", " ", "--data", store, ok=1).stderr
    assert "400 free certificates" in certtool("accept-restore", "--reason", "disk died", "--data", store).stdout
    assert "nothing to accept" in certtool("accept-restore", "--reason", "x", "--data", store, ok=1).stderr
    *_, last = (store / "journal.csv").read_text(encoding="utf-8").splitlines()
    assert re.search(r'^3,[^,]*,restore,.*""reason"":""disk died"",""marked"":3,""found"":2', last)
    assert server().request(product, "MAC-1")[0] == 200


@pytest.mark.parametrize("hours", [-24, 24])
def test_a_clock_that_jumps_changes_no_order_and_loses_nothing(
    hours: int, tally: NewTally, store: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, oracle = tally(f"clock set {'back' if hours < 0 else 'forward'} a day"), Oracle()
    jumped = 0.0
    clock = SimpleNamespace(time=lambda: time.time() + jumped, monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(program, "time", clock)
    for jumped in (0.0, 3600.0 * hours, 0.0):
        opened, state = Store(str(store), "fault", marks=str(profile)), State()
        with contextlib.closing(opened):
            opened.load(state)
            service = Service(opened, state)
            import_files(service, upload(list(rows(4, first=int(jumped) + 90_000)), f"{line.rounds}.csv"))
            for number, turn in enumerate(TURNS[:1]):
                play(service, [(f"{id_}{line.rounds}{number}", 0) for id_, _ in turn], lambda told: told(oracle))
        line.rounds += 1
        line.injected += jumped != 0
        judged(line, oracle, store, profile)
    line.acknowledged = oracle.acknowledged
