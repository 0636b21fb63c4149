"""The store's files: who may write, what a failing disk or a power cut does to them, what other programs do to them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import certtool
from certtool import (
    BURN_SUCCEEDED,
    OPEN_IMPORTS,
    READ_AHEAD,
    Credential,
    Event,
    Service,
    State,
    Store,
    StoreBusy,
    StoreError,
    StoreUnavailable,
)
from tests.identities import PRODUCT, rows
from tests.stores import (
    IGNORE,
    RAISE,
    SHORT,
    STATION,
    Disk,
    Opened,
    at_call,
    files,
    import_files,
    made_by_another_user,
    open_store,
    read_store,
    rows_about,
    snapshot,
    upload,
)
from tests.support import ROOT, child_env

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such rights, and moves no file in use")


@contextlib.contextmanager
def opened_store(folder: Path) -> Iterator[Opened]:
    opened = open_store(folder)
    try:
        yield opened
    finally:
        opened.store.close()


@pytest.fixture
def line(store: Path) -> Iterator[Opened]:
    """A store with five certificates, of which device A has the first."""
    with opened_store(store) as opened:
        import_files(opened.service, upload(list(rows(5))))
        allocate(opened.service, "A")
        opened.service.commit()
        yield opened


def allocate(service: Service, device_id: str) -> str:
    """Request a certificate and return its name."""
    return service.request(PRODUCT, device_id, STATION, 1000).certificate.credential.device_name


def failing(monkeypatch: pytest.MonkeyPatch, faults: Dict[str, str], code: int = errno.EIO) -> Disk:
    """Let certtool meet these faults, by the name of the call."""
    disk = Disk(lambda call: faults.get(call, ""), code)
    monkeypatch.setattr(certtool, "os", disk)
    return disk


# -- opening -----------------------------------------------------------------------------------------------------------


def test_a_new_store_is_made_and_told(store: Path) -> None:
    with opened_store(store / "in" / "folders") as opened:
        assert opened.store.notes == [f"A new, empty store was made: {store / 'in' / 'folders'}"]
        assert opened.state.products == {}
    with opened_store(store / "in" / "folders") as opened:
        assert opened.store.notes == []


@posix_only
@pytest.mark.usefixtures("line")
def test_only_its_owner_may_see_a_store(store: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [store, *store.rglob("*")]}
    assert modes.pop("store") == modes.pop("imports") == 0o700
    assert set(modes) == {"lock", "journal.csv", "000001-identities.csv"}
    assert set(modes.values()) == {0o600}


def test_a_reader_needs_a_store_and_makes_none(store: Path) -> None:
    with pytest.raises(StoreError, match="There is no store at"):
        read_store(store)
    assert not store.exists()


def test_a_folder_with_nothing_in_it_is_no_store_to_a_reader_and_a_new_one_to_a_writer(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="There is no store at"):
        read_store(tmp_path)
    assert list(tmp_path.iterdir()) == []
    opened = open_store(tmp_path)
    opened.store.close()
    assert opened.store.notes == [f"A new, empty store was made: {tmp_path}"]


@posix_only
def test_a_store_that_one_may_not_look_into_is_not_taken_for_an_empty_one(line: Opened, store: Path) -> None:
    line.store.close()
    with tempfile.TemporaryDirectory() as name:
        moved = store.rename(Path(name) / "store")
        with unprivileged(), pytest.raises(StoreError, match=r"cannot be read \(Permission denied\): check its rights"):
            read_store(moved)


@posix_only
def test_a_folder_without_a_journal_whose_imports_one_may_not_list_is_not_taken_for_an_empty_store() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        imports = Path(name) / "imports"
        imports.mkdir(0)
        told = f"{imports} cannot be read (Permission denied): check its rights"
        with unprivileged(), pytest.raises(StoreError, match=re.escape(told)):
            Store(name, writer=False).is_new()


def test_what_a_server_reads_while_another_program_has_it_open_is_waited_for_between_the_requests_of_devices(
    line: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows no device would be answered for two seconds, in an import too: an antivirus looks at what is new."""
    refusals: List[str] = []

    def held(path: str, mode: str, **_: Any) -> BinaryIO:
        refusals.append(path)
        if len(refusals) % 3:
            raise PermissionError
        return open(path, mode)  # type: ignore[return-value]

    monkeypatch.setattr(certtool, "_patiently", pytest.fail)
    monkeypatch.setattr(certtool, "open", held, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    events = list(line.store.look_back([b",allocate,"]))
    assert events[:2] == [None, None]
    assert any(event and event.kind == "allocate" for event in events)
    assert len(list(line.store._imports[0].find_rows())) > 2
    assert len(refusals) == 6


@posix_only
@pytest.mark.parametrize("rights", [0o077, 0o070, 0o007], ids=["of all", "of a group", "of others"])
def test_rights_that_a_copy_brought_along_are_mended_or_told(
    rights: int, line: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line.store.close()
    guarded = [store / "imports", store / "lock", store / "journal.csv"]
    for mends in (True, False):
        for path in (store, *guarded):
            path.chmod(0o700 | rights)
        with monkeypatch.context() as patch:
            if not mends:  # FAT has no rights
                patch.setattr("certtool.os.chmod", lambda *_: None)
            opened = open_store(store)
        assert [path.stat().st_mode & 0o077 for path in guarded] == [rights * (not mends), 0, 0]
        left = rights & 0o055 if mends else rights
        assert store.stat().st_mode & 0o077 == left, "who may write there can take the lock away"
        mended = [f"Other users of this PC could change {store}: from now on only you can."]
        told = [f"Other users of this PC can {do} {store}: keep it where only you can." for do in ("change", "read")]
        assert opened.store.notes == (mended if mends else told)
        opened.store.close()


@posix_only
def test_a_folder_in_which_each_user_can_change_only_his_own_files_is_left_as_it_is(store: Path) -> None:
    store.mkdir()
    store.chmod(0o1777)
    with opened_store(store):
        assert stat.S_IMODE(store.stat().st_mode) == 0o1777


@posix_only
def test_a_lock_that_another_user_has_put_there_learns_no_token_and_leads_to_no_server(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.mkdir()
    (store / "lock").touch(0o666)
    with monkeypatch.context() as patch:
        made_by_another_user(store / "lock", patch)
        with pytest.raises(StoreError, match=r"lock was made by another user of this PC, .* delete it"):
            open_store(store)
    assert (store / "lock").read_bytes() == b""
    assert not (store / "journal.csv").exists()
    (store / "lock").unlink()
    with opened_store(store):
        pass


@posix_only
def test_root_works_on_the_store_of_the_user_whose_folder_it_is(line: Opened, store: Path) -> None:
    line.store.close()
    if sys.platform != "win32" and os.geteuid() == 0:
        for path in (store, store / "lock"):
            os.chown(path, 65534, -1)
    with opened_store(store) as opened:
        assert opened.state.products


@posix_only
def test_a_share_that_calls_each_file_one_of_the_same_user_may_hold_store_and_mirror(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fstat = os.fstat
    monkeypatch.setattr(os, "fstat", lambda file: os.stat_result((*fstat(file)[:4], 1024, *fstat(file)[5:])))
    for _ in ("made", "found"):
        with contextlib.closing(Store(str(store), mirror=str(tmp_path / "mirror"))) as opened:
            opened.load(State())
        assert not [note for note in opened.notes if "NO SECOND COPY" in note]


@posix_only
@pytest.mark.skipif(getattr(os, "geteuid", int)() != 0, reason="only root can give a file to another user")
def test_a_lock_that_root_has_made_is_taken_by_the_user_who_may_write_to_it() -> None:
    with tempfile.TemporaryDirectory() as name:
        store = Path(name)
        (store / "lock").touch()
        for path, rights in ((store, 0o777), (store / "lock", 0o666)):
            path.chmod(rights)
        with unprivileged(), opened_store(store):
            pass


@posix_only
def test_a_lock_that_leads_elsewhere_is_not_followed(line: Opened, store: Path, tmp_path: Path) -> None:
    line.store.close()
    (tmp_path / "mine.txt").write_text("mine")
    (store / "lock").unlink()
    (store / "lock").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(StoreError, match="cannot be written"):
        open_store(store)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_drive_that_is_not_there_is_refused_in_words(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for question in ("exists", "isdir"):
        monkeypatch.setattr(f"certtool.os.path.{question}", lambda path: False)
    with pytest.raises(StoreError, match="cannot be written"):
        open_store(store)
    with pytest.raises(StoreError, match="There is no store at"):
        read_store(store)
    monkeypatch.undo()
    assert not store.exists()


def test_a_file_is_no_store(store: Path) -> None:
    store.write_text("mine")
    for way in (open_store, read_store):
        with pytest.raises(StoreError, match="is a file, not a folder: name another folder with --data"):
            way(store)
    assert store.read_text() == "mine"


@posix_only
def test_a_store_that_may_not_be_written_is_refused() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        with unprivileged():
            for path in (folder, folder / "new"):
                with pytest.raises(StoreError, match=r"cannot be written \(Permission denied\): check its rights"):
                    open_store(path)
        folder.chmod(0o755)
        assert list(folder.iterdir()) == []


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Rights count for everybody but root."""
    if sys.platform == "win32" or os.geteuid() != 0:
        yield
    else:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("call", ["open", "mkdir"])
def test_a_store_that_cannot_be_made_is_refused_and_the_lock_is_free_again(
    call: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, {call: RAISE}, errno.EACCES)
    with pytest.raises(StoreError, match="cannot be written"):
        open_store(store)
    monkeypatch.undo()
    with opened_store(store) as opened:
        assert opened.state.products == {}


def test_a_journal_that_cannot_be_read_is_refused(store: Path) -> None:
    (store / "journal.csv").mkdir(parents=True)
    for way in (open_store, read_store):
        with pytest.raises(StoreError, match=r"journal\.csv cannot be read \(.+\): check "):
            way(store)


@posix_only
@pytest.mark.parametrize("name", ["journal.csv", "imports/000001-identities.csv"])
def test_a_file_that_another_user_has_written_is_not_told_to_be_put_back(name: str, line: Opened, store: Path) -> None:
    line.store.close()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        moved = store.rename(Path(folder) / "store")
        for path in (moved, moved / "imports", *moved.rglob("*.csv")):
            path.chmod(0o755)
        (moved / name).chmod(0)
        told = rf"{re.escape(str(moved / name))} cannot be read \(Permission denied\): check its rights\."
        with unprivileged(), pytest.raises(StoreError, match=told):
            read_store(moved)


def test_making_a_store_may_fail_at_any_call_and_the_next_start_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fault in (RAISE, SHORT):
        for nth in itertools.count():
            store = tmp_path / f"{fault}{nth}"
            disk = Disk(at_call(nth, fault))
            monkeypatch.setattr(certtool, "os", disk)
            with contextlib.suppress(StoreError), contextlib.ExitStack() as closing:
                opened = open_store(store)
                closing.callback(opened.store.close)
                closing.callback(monkeypatch.undo)
            monkeypatch.undo()
            with opened_store(store) as opened:
                assert opened.state.products == {}
            if len(disk.calls) <= nth:
                break
        assert nth > 5


# -- one writer --------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_told_who_is_first(line: Opened, store: Path) -> None:
    before = files(store)
    with pytest.raises(StoreBusy, match=rf"is in use by certtool test \(process {os.getpid()}\)") as busy:
        open_store(store)
    assert busy.value.holder == {"pid": os.getpid(), "command": "test"}
    assert line.store.lock
    line.store.lock.announce({"pid": 77, "command": "serve", "port": 8000, "token": "hush"})
    with pytest.raises(StoreBusy, match=r"by certtool serve \(process 77, port 8000\): stop that first") as busy:
        open_store(store)
    assert busy.value.holder["token"] == "hush"
    assert "hush" not in str(busy.value)
    assert files(store) == before


@posix_only
@pytest.mark.usefixtures("line")
def test_a_lock_file_that_tells_nothing_still_locks(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certtool, "TORN_SECONDS", 0.0)
    for told in ("", "{", '{"pid": 7'):
        (store / "lock").write_text(told)
        with pytest.raises(StoreBusy, match=r"is in use by certtool \(process unknown\)"):
            open_store(store)


def test_a_reader_needs_no_lock(line: Opened, store: Path) -> None:
    read = read_store(store)
    assert snapshot(read.state) == snapshot(line.state)
    assert allocate(read.service, "A") == allocate(line.service, "A")
    read.store.close()


def test_what_a_killed_server_left_in_the_lock_file_does_not_hide_who_holds_it_now(store: Path) -> None:
    open_store(store).store.close()
    assert (store / "lock").read_bytes() == b""
    (store / "lock").write_text('{"pid": 7, "command": "serve", "port": 8000, "token": "' + 100 * "x" + '"}')
    with opened_store(store), pytest.raises(StoreBusy, match=rf"by certtool test \(process {os.getpid()}\)") as busy:
        open_store(store)
    assert busy.value.holder == {"pid": os.getpid(), "command": "test"}


def test_the_lock_ends_with_its_process_also_by_kill(store: Path) -> None:
    code = "import certtool, sys; store = certtool.Store(sys.argv[1], 'serve'); print('locked', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(store)],
        cwd=ROOT,
        env=child_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    with holder:
        assert holder.stdout
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(StoreBusy, match=rf"certtool serve \(process {holder.pid}\)"):
            open_store(store)
        holder.kill()
        holder.wait()
    open_store(store).store.close()


@posix_only
def test_a_file_system_without_locks_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(certtool, "fcntl", SimpleNamespace(flock=no_locks, LOCK_EX=2, LOCK_NB=4))
    with pytest.raises(StoreError, match="cannot be written"):
        open_store(store)


def test_a_lock_that_cannot_be_wiped_is_given_back_all_the_same(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_store(store)
    failing(monkeypatch, {"ftruncate": RAISE})
    opened.store.close()
    monkeypatch.undo()
    open_store(store).store.close()


def test_closing_twice_is_harmless(store: Path) -> None:
    opened = open_store(store)
    opened.store.close()
    opened.store.close()


# -- a disk that fails -------------------------------------------------------------------------------------------------


def test_the_records_of_a_turn_take_one_write_and_one_sync_and_no_record_takes_none(
    line: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = failing(monkeypatch, {})
    for device_id in "BCD":
        allocate(line.service, device_id)
    line.service.commit()
    assert disk.calls == ["write", "fsync"]
    allocate(line.service, "B")
    line.service.commit()
    assert disk.calls == ["write", "fsync"]


@pytest.mark.parametrize("fault", [RAISE, SHORT])
def test_a_failed_write_gives_nothing_out_and_the_next_one_works(
    fault: str, line: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, on_disk = snapshot(line.state), files(store)
    failing(monkeypatch, {"write": fault}, errno.ENOSPC)
    for _ in range(2):
        allocate(line.service, "B")
        for device_id in "AB":
            line.service.report(PRODUCT, device_id, BURN_SUCCEEDED, STATION, 1001)
        with pytest.raises(StoreUnavailable, match=r"\(No space left on device\), so nothing was given out"):
            line.service.commit()
        assert snapshot(line.state) == before
        assert files(store) == on_disk
    monkeypatch.undo()
    allocate(line.service, "C")
    line.service.commit()
    assert snapshot(read_store(store).state) == snapshot(line.state)


@pytest.mark.parametrize("call", ["chain_digest", "_write_all"])  # in the middle of the lines, and behind them
def test_records_that_no_memory_is_left_for_give_nothing_out_and_the_next_ones_work(
    call: str, line: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, on_disk = snapshot(line.state), files(store)
    right: Callable[[object, bytes], object] = getattr(certtool, call)

    def full(first: object, data: bytes) -> object:
        if b",C," in data:
            raise MemoryError
        return right(first, data)

    monkeypatch.setattr(certtool, call, full)
    for device_id in "BC":
        allocate(line.service, device_id)
    with pytest.raises(StoreUnavailable, match=r"\(no memory\), so nothing was given out: close other programs"):
        line.service.commit()
    assert (snapshot(line.state), files(store)) == (before, on_disk)
    monkeypatch.undo()
    allocate(line.service, "C")
    line.service.commit()
    assert snapshot(read_store(store).state) == snapshot(line.state)


@pytest.mark.parametrize("cut", [RAISE, IGNORE])
def test_where_half_a_write_cannot_be_taken_back_nothing_is_recorded_until_a_restart(
    cut: str, line: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(line.state)
    failing(monkeypatch, {"write": SHORT, "ftruncate": cut})
    allocate(line.service, "B")
    with pytest.raises(StoreUnavailable):
        line.service.commit()
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="could not be taken back: check the disk, and start again"):
            allocate(line.service, "B")
    assert allocate(line.service, "A"), "what needs no record is still answered"
    line.service.commit()
    assert snapshot(line.state) == before
    line.store.close()
    with opened_store(store) as again:
        assert snapshot(again.state) == before
        assert "half a line" in again.store.notes[0]


def test_after_a_failed_sync_nothing_is_recorded_until_a_restart_finds_what_is_on_the_disk(
    line: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(line.state)
    disk = failing(monkeypatch, {"fsync": RAISE})
    given = allocate(line.service, "B")
    after = snapshot(line.state)
    with pytest.raises(StoreUnavailable, match="check the disk, and restart this PC"):
        line.service.commit()
    assert snapshot(line.state) == before
    disk.fault = lambda call: ""
    for device_id in "BC":
        with pytest.raises(StoreUnavailable, match="The disk failed to keep a record"):
            allocate(line.service, device_id)
    with pytest.raises(StoreUnavailable):
        import_files(line.service, upload(list(rows(2, "a1OtherPk"))))
    assert disk.calls[:2] == ["write", "fsync"]
    assert "ftruncate" not in disk.calls
    line.store.close()
    with opened_store(store) as again:
        assert snapshot(again.state) == after
        assert allocate(again.service, "B") == given


def test_what_was_appended_before_the_store_stopped_is_not_written(line: Opened, store: Path) -> None:
    before, on_disk = snapshot(line.state), files(store)
    allocate(line.service, "B")
    line.store.stop("The reason.")
    with pytest.raises(StoreUnavailable, match=r"The reason\."):
        line.service.commit()
    assert (snapshot(line.state), files(store)) == (before, on_disk)


def test_an_import_leaves_no_file_where_nothing_can_be_recorded(line: Opened, store: Path) -> None:
    on_disk = files(store)
    line.store.stop("The reason.")
    with pytest.raises(StoreUnavailable, match=r"The reason\."):
        import_files(line.service, upload(list(rows(2, "a1OtherPk"))))
    assert files(store) == on_disk


def test_a_defect_while_an_event_is_applied_stops_all_recording(
    line: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Event) -> None:
        raise RuntimeError

    on_disk = files(store)
    with monkeypatch.context() as patch:
        patch.setattr(line.state, "apply", broken)
        with pytest.raises(RuntimeError):
            allocate(line.service, "B")
    with pytest.raises(StoreUnavailable, match="Something unexpected"):
        line.service.commit()
    assert files(store) == on_disk


@pytest.mark.parametrize("fault", [(1, RAISE, "write"), (1, SHORT, "write"), (0, RAISE, "fsync")])
def test_a_torn_tail_is_not_cut_before_it_is_kept(
    fault: Tuple[int, str, str], line: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line.store.close()
    journal = store / "journal.csv"
    journal.write_bytes(journal.read_bytes() + b"half a line")
    torn = journal.read_bytes()
    monkeypatch.setattr(certtool, "os", Disk(at_call(*fault)))
    with pytest.raises(StoreError):
        open_store(store)
    monkeypatch.undo()
    assert journal.read_bytes() == torn
    with opened_store(store) as opened:
        assert snapshot(opened.state) == snapshot(line.state)


# -- other programs ----------------------------------------------------------------------------------------------------


def replace(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def move_aside(path: Path) -> None:
    path.rename(path.with_suffix(".old"))
    shutil.copy(path.with_suffix(".old"), path)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"7,")


MEDDLING: Dict[str, Callable[[Path], object]] = {
    "replaced": replace,
    "moved aside": move_aside,
    "removed": Path.unlink,
    "longer": append,
    "shorter": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
}


@posix_only
@pytest.mark.parametrize("meddle", MEDDLING.values(), ids=MEDDLING)
def test_a_journal_that_another_program_changed_is_not_written_to_any_more(
    meddle: Callable[[Path], object], line: Opened, store: Path
) -> None:
    before = snapshot(line.state)
    meddle(store / "journal.csv")
    on_disk = files(store)
    allocate(line.service, "B")
    with pytest.raises(StoreUnavailable, match=r"Another program changed journal\.csv"):
        line.service.commit()
    with pytest.raises(StoreUnavailable, match=r"Another program changed journal\.csv"):
        allocate(line.service, "B")
    assert (snapshot(line.state), files(store)) == (before, on_disk)


def certificate_file(store: Path) -> Path:
    (path,) = (store / "imports").iterdir()
    return path


@posix_only
@pytest.mark.parametrize("text", ["", "x\n", "é\n", '"\n', "a,b,c,d\n"])
def test_an_import_file_that_was_overwritten_gives_nothing_out(text: str, line: Opened, store: Path) -> None:
    line.store.close()
    with opened_store(store) as opened:
        before = snapshot(opened.state)
        certificate_file(store).write_text(text * 500, encoding="utf-8")
        with pytest.raises(StoreUnavailable, match="put it back"):
            allocate(opened.service, "B")
        opened.service.commit()
        assert snapshot(opened.state) == before


@posix_only
def test_an_import_file_whose_rows_moved_gives_nothing_out(line: Opened, store: Path) -> None:
    line.store.close()
    with opened_store(store) as opened:
        before = snapshot(opened.state)
        path = certificate_file(store)
        header, *lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([header, *reversed(lines)]))
        with pytest.raises(StoreUnavailable, match="An import file was changed while the server runs"):
            allocate(opened.service, "B")
        assert snapshot(opened.state) == before


def test_an_import_file_that_is_gone_gives_nothing_out_and_comes_back_when_it_is_back(
    line: Opened, store: Path
) -> None:
    line.store.close()
    with opened_store(store) as opened:
        path = certificate_file(store)
        aside = path.rename(store / "aside")
        with pytest.raises(StoreUnavailable, match=r"000001-identities\.csv cannot be read: put it back"):
            allocate(opened.service, "A")
        aside.rename(path)
        assert allocate(opened.service, "A")


@pytest.mark.parametrize(
    "data", [None, b"header\na,b\n", b"header\na,b,c,d,e,f,g,h\n", b"header\n\xff\n", b'header\n"\n']
)
def test_an_audit_says_which_import_file_it_cannot_read(data: Optional[bytes], line: Opened, store: Path) -> None:
    path = certificate_file(store)
    assert sum(map(len, line.store.all_certificates())) == 5
    path.unlink()
    if data:
        path.write_bytes(data)
    with pytest.raises(StoreUnavailable, match=r"000001-identities\.csv cannot be read: put it back"):
        list(line.store.all_certificates())


def test_a_record_has_the_time_of_this_pc() -> None:
    before = int(time.time() * 1000)
    assert before <= certtool._now() <= int(time.time() * 1000)


def test_files_that_are_no_imports_are_left_alone_and_orphans_are_told(line: Opened, store: Path) -> None:
    line.store.close()
    (store / "imports" / "000007-half.csv").write_text("Product")
    (store / "imports" / "notes.txt").write_text("mine")
    (store / "mine.txt").write_text("mine")
    assert read_store(store).store.notes == [], "it may be an import that is under way"
    opened = open_store(store)
    assert opened.store.notes == ["imports/000007-half.csv was never completed or taken back, so it is ignored."]
    import_files(opened.service, upload(list(rows(1, first=90)), "七.csv"))
    opened.store.close()
    names = {path.name for path in (store / "imports").iterdir()}
    assert names == {"000001-identities.csv", "000007-half.csv", "000008-import.csv", "notes.txt"}


# -- imports and certificates ------------------------------------------------------------------------------------------


def test_the_certificates_of_many_files_are_read_with_few_of_them_open(store: Path) -> None:
    many = 2 * OPEN_IMPORTS
    with opened_store(store) as opened:
        certificates = list(rows(3 * many))
        for first in range(0, 3 * many, 3):
            import_files(opened.service, upload(certificates[first : first + 3], f"{first}.csv"))
        for number in [*range(3 * many), *range(3 * many)]:
            found = opened.store.certificate(number)
            assert found.credential == certificates[number]
            assert found.crc32 == f"{certtool.crc32(found.credential.payload()):08X}"
            assert sum(imported.file is not None for imported in opened.store._imports) <= OPEN_IMPORTS


def test_who_imported_a_file_that_takes_many_steps_to_read_finds_each_certificate_in_it(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certtool, "READ_BYTES", 100)
    certificates = list(rows(20))
    with opened_store(store) as opened:
        import_files(opened.service, upload(certificates))
        for number in reversed(range(20)):  # in their order they would be read together
            assert opened.store.certificate(number).credential == certificates[number]


def test_an_import_file_can_be_read_by_a_person(line: Opened, store: Path) -> None:
    header, first, *_ = certificate_file(store).read_text().splitlines()
    assert header == "ProductKey,DeviceName,DeviceSecret,ProductSecret,ProductID,DeviceID,CRC32"
    certificate = line.store.certificate(0)
    assert first == ",".join([*certificate.credential, certificate.crc32])


CELLS = st.text("ab=+-@',\"", max_size=3)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS, CELLS, CELLS, CELLS), min_size=1, max_size=3))
@example([("key", "name", "=secret", "", "", "")])
@example([("key", "name", "a,b", "", "", "")])
@example([("=key", "name", "secret", "", "", "")])
def test_no_cell_of_an_import_file_is_a_formula_to_a_spreadsheet_and_all_are_read_back(
    credentials: List[Tuple[str, ...]],
) -> None:
    text = certtool.encode_rows(list(zip(*credentials)), [0xABC] * len(credentials))
    lines = [",".join(map(certtool.encode_cell, (*credential, "00000ABC"))) for credential in credentials]
    assert text.splitlines() == lines
    columns = certtool.decode_columns(text, 7)
    assert list(zip(*columns)) == [(*credential, "00000ABC") for credential in credentials]


def test_certificates_in_order_are_read_together_and_one_alone_by_itself(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: List[int] = []
    decode = certtool.decode_columns

    def counting(text: str, width: int) -> Sequence[Sequence[str]]:
        read.append(text.count("\n"))
        return decode(text, width)

    with opened_store(store) as opened:
        certificates = list(rows(120))
        import_files(opened.service, upload(certificates))
        monkeypatch.setattr(certtool, "decode_columns", counting)
        for number in [*range(120), 7, 90, 8]:
            assert opened.store.certificate(number).credential == certificates[number]
    assert read == [1, READ_AHEAD, READ_AHEAD, 120 - 1 - 2 * READ_AHEAD, 1, 1, 1]


@pytest.mark.parametrize(("end", "wide"), [((1 << 32) - 1, "I"), (1 << 32, "Q")])
def test_only_a_file_of_4_gib_needs_wide_offsets(end: int, wide: str) -> None:
    file = certtool.ImportFile("large.csv", 0)
    file.add_offsets(["header"], 0)
    file.add_offsets(["abc", "defgh"], end - 10)
    assert file.offsets.typecode == wide
    assert list(file.offsets) == [0, end - 10, end - 6]
    file.add_offsets(["more"], end)
    assert list(file.offsets) == [0, end - 10, end - 6, end]


def test_loading_reports_its_progress_to_the_end(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certtool, "JOURNAL_SLICE", 10)
    with opened_store(store) as opened:
        import_files(opened.service, upload(list(rows(100))))
        for number in range(100):
            allocate(opened.service, f"device{number}")
        opened.service.commit()
    told: List[Tuple[str, int, int]] = []
    Store(str(store), writer=False).load(State(), lambda *progress: told.append(progress))
    size = (store / "journal.csv").stat().st_size
    assert ("reading 000001-identities.csv", 100, 100) in told
    journal = [(done, total) for what, done, total in told if what == "reading the journal"]
    assert len(journal) == 12  # the import and 100 allocations make 11 slices
    assert journal == sorted(journal)
    assert journal[-1] == (size, size)
    assert {total for _, total in journal} == {size}


def test_a_name_of_many_products_in_one_file_is_found_in_each_with_its_own_secrets(store: Path) -> None:
    credentials = [
        Credential(f"a1Product{key}", f"lamp-{number:04d}", f"secret-{key}-{number}")
        for key in range(5)
        for number in range(70)
    ]
    with opened_store(store) as opened:
        import_files(opened.service, upload(credentials))
        opened.service.request("a1Product3", "A", STATION, 1)
        opened.service.commit()
    for text, products, number in (("lamp-0000", "01234", 0), ("lamp-0042", "01234", 42), ("A", "3", 0), ("B", "", 0)):
        few = read_store(store, text)
        assert len(few.state.names) in (0, 5)
        found = rows_about(few, text)
        assert [row[-1] for row in found] == [f"secret-{key}-{number}" for key in products]
        assert found == rows_about(read_store(store), text)


@pytest.fixture
def two(store: Path) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """A store whose device A has a certificate; the states before and after two files are imported."""
    with opened_store(store) as opened:
        import_files(opened.service, upload(list(rows(3))))
        allocate(opened.service, "A")
        opened.service.commit()
        before = snapshot(opened.state)
    shutil.copytree(store, store.with_name("after"))
    with opened_store(store.with_name("after")) as opened:
        import_two(opened.service)
        return before, snapshot(opened.state)


def import_two(service: Service) -> None:
    """Import two files of several slices in one command."""
    certtool_slice = certtool.IMPORT_SLICE
    try:
        certtool.IMPORT_SLICE = 2
        import_files(service, upload(list(rows(5, first=10)), "b.csv"), upload(list(rows(3, "a1OtherPk")), "c.csv"))
    finally:
        certtool.IMPORT_SLICE = certtool_slice


@pytest.mark.parametrize("fault", [RAISE, SHORT])
def test_an_import_of_two_files_may_fail_at_any_call_and_is_there_in_whole_or_not_at_all(
    fault: str, two: Tuple[Dict[str, Any], Dict[str, Any]], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = two
    for nth in itertools.count():
        folder = store.with_name(f"nth{nth}")
        shutil.copytree(store, folder)
        opened = open_store(folder)
        disk = Disk(at_call(nth, fault))
        monkeypatch.setattr(certtool, "os", disk)
        try:
            import_two(opened.service)
            assert snapshot(opened.state) == after
        except StoreUnavailable:
            assert snapshot(opened.state) == before
        monkeypatch.undo()
        live = snapshot(opened.state)
        try:
            allocate(opened.service, "B")
            stopped = False
        except StoreUnavailable:
            stopped = True
        opened.store.close()
        with opened_store(folder) as again:
            found = snapshot(again.state)
            assert found in (before, after)
            assert found == live or stopped
            import_two(again.service)
            assert {key: product.total for key, product in again.state.products.items()} == {PRODUCT: 8, "a1OtherPk": 3}
        if len(disk.calls) <= nth:
            break
    assert nth > 10


def test_a_power_cut_at_any_call_of_an_import_leaves_it_in_whole_or_not_at_all(
    two: Tuple[Dict[str, Any], Dict[str, Any]], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = two
    images = store.with_name("images")
    counter = itertools.count()

    def photograph(call: str) -> str:
        shutil.copytree(store, images / f"{next(counter):03d}{call}")
        return ""

    with opened_store(store) as opened:
        monkeypatch.setattr(certtool, "os", Disk(photograph))
        import_two(opened.service)
        monkeypatch.undo()
    states = []
    for image in sorted(images.iterdir()):
        with opened_store(image) as again:
            states.append(snapshot(again.state))
    assert states[0] == before
    assert all(state in (before, after) for state in states)
    assert len(states) > 10


# Among the writes and syncs: the header, the rows, the sync of the file, that of its folder.
@pytest.mark.parametrize("fault", [(0, RAISE), (0, SHORT), (1, RAISE), (1, SHORT), (2, RAISE), (3, RAISE)])
def test_an_import_that_cannot_be_written_leaves_no_file(
    fault: Tuple[int, str], line: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk, before = files(store), snapshot(line.state)
    monkeypatch.setattr(certtool, "os", Disk(at_call(*fault, "write", "fsync"), errno.ENOSPC))
    with pytest.raises(StoreUnavailable, match="free the store's disk"):
        import_files(line.service, upload(list(rows(3, "a1OtherPk"))))
    assert files(store) == on_disk
    assert snapshot(line.state) == before
    monkeypatch.undo()
    assert import_files(line.service, upload(list(rows(3, "a1OtherPk")))).imported == 3
