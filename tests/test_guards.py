"""What stands outside the store: the mark of how far it came, the mirror, the audit, and a limit for each peer."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest

import certtool as program
from certtool import HighWaterMark, Refused, Service, State, Store, StoreError
from tests import identities
from tests.identities import PRODUCT, rows
from tests.inside import Inside
from tests.stores import RAISE, SHORT, STATION, Disk, at_call, files, import_files, made_by_another_user, upload
from tests.support import SAMPLE, RunCerttool, StartServer
from tests.wire import ask

WIFI = "a1SampleWf0"
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs a mount, a mode or a device that Windows lacks")


@contextlib.contextmanager
def line(store: Path, **guards: Any) -> Iterator[Service]:
    """Open a store with guards; what it warns of is in its notes."""
    opened, state = Store(str(store), "test", **guards), State()
    with contextlib.closing(opened):
        opened.load(state)
        yield Service(opened, state, opened.notes.append)


def work(service: Service, *device_ids: str) -> None:
    """Give each device a certificate."""
    for device_id in device_ids:
        service.request(PRODUCT, device_id, STATION, 1000)
    service.commit()


@pytest.fixture
def marked(store: Path, profile: Path) -> Path:
    """A store with five certificates, of which two are given out; returns its mark's file."""
    with line(store, marks=str(profile)) as service:
        import_files(service, upload(list(rows(5))))
        work(service, "A")
        work(service, "B")
    [mark] = profile.iterdir()
    return mark


# -- high-water mark ---------------------------------------------------------------------------------------------------


def test_the_mark_costs_no_sync_and_stands_at_the_last_event(
    store: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with line(store, marks=str(profile)) as service:
        import_files(service, upload(list(rows(5))))
        disk = Disk(lambda call: "")
        monkeypatch.setattr(program, "os", disk)
        work(service, "A")
        assert disk.calls == ["write", "fsync", "write"]
        monkeypatch.undo()
        [mark] = profile.iterdir()
        last = (store / "journal.csv").read_text(encoding="utf-8").strip()[-16:]
        assert f"000000000003 {last} " in mark.read_text()


def test_each_line_of_the_mark_outlives_the_writing_of_the_other(profile: Path) -> None:
    for seq in range(1, 6):
        with contextlib.closing(HighWaterMark(str(profile), "0" * 16)) as mark:
            assert (mark.seq, mark.digest) == (seq - 1, f"{seq - 1:016x}" if seq > 1 else "")
            mark.put(seq, f"{seq:016x}")
        [path] = profile.iterdir()
        lines = path.read_text().splitlines()
        assert sorted(int(text[:12]) for text in lines) == [*range(max(1, seq - 1), seq + 1)]
        assert all(len(text) == program.MARK_LENGTH - 1 for text in lines)


def test_who_only_reads_makes_no_mark_and_needs_none(store: Path, profile: Path, marked: Path) -> None:
    marked.unlink()
    for folder_is_there in (True, False):
        state = State()
        with contextlib.closing(Store(str(store), writer=False, marks=str(profile))) as reader:
            reader.load(state)
            assert len(state.names) == 5
        assert list(profile.parent.rglob("*")) == [profile] * folder_is_there
        if folder_is_there:
            profile.rmdir()


@pytest.mark.parametrize("starts", [1, 2])  # each of them writes the other line of the mark
@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_copy_that_was_accepted_is_the_latest_from_then_on(
    lost: int, starts: int, store: Path, profile: Path, marked: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(store, tmp_path / "old"))
    for start in range(starts):
        with line(store, marks=str(profile)) as service:
            work(service, *"CDE"[: 0 if start else lost])
    shutil.rmtree(store)
    old.rename(store)
    with pytest.raises(StoreError, match="is not the latest copy"), line(store, marks=str(profile)):
        pass
    with line(store, marks=str(profile), accept={"who": "me", "reason": "disk died"}):
        pass
    for device_id in "FG":
        with line(store, marks=str(profile)) as service:
            work(service, device_id)
    with pytest.raises(Refused, match="nothing to accept"), line(store, marks=str(profile), accept={"reason": "x"}):
        pass
    assert marked.exists()


def test_an_old_copy_is_accepted_only_with_a_reason(store: Path, marked: Path, certtool: RunCerttool) -> None:
    journal = store / "journal.csv"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    before = files(store)
    refused = certtool("accept-restore", "--reason", " \t", "--data", store, ok=1)
    assert refused.stderr == "certtool: A reason is needed: give it with --reason.\n"
    assert (files(store), marked.is_file()) == (before, True)
    assert "with 4 free certificates" in certtool("accept-restore", "--reason", " burnt ", "--data", store).stdout
    assert '""reason"":""burnt""' in journal.read_text(encoding="utf-8")


def test_a_mark_that_cannot_be_synced_at_the_end_is_no_error(
    store: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with line(store, marks=str(profile)) as service:
        import_files(service, upload(list(rows(5))))
        monkeypatch.setattr(program, "os", Disk(lambda call: RAISE if call == "fsync" else ""))
    monkeypatch.undo()
    with line(store, marks=str(profile)) as service:
        assert service.store.notes == []


@posix_only
def test_only_their_owner_may_see_the_marks_and_the_mirror(store: Path, profile: Path, mirror: Path) -> None:
    with line(store, marks=str(profile), mirror=str(mirror)) as service:
        import_files(service, upload(list(rows(5))))
    for top in (profile, mirror):
        for path in [top, *top.rglob("*")]:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@posix_only
def test_rights_that_a_copy_brought_along_are_mended_in_the_mirror_or_told(
    store: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with line(store) as service:
        import_files(service, upload(list(rows(5))))
    shutil.copytree(store, mirror)
    for mends in (True, False):
        guarded = [mirror / "imports", *(mirror / "imports").iterdir(), mirror / "journal.csv"]
        for path in guarded:
            path.chmod(0o755)
        with monkeypatch.context() as patch:
            if not mends:  # FAT has no rights
                patch.setattr("certtool.os.chmod", lambda *_: None)
            with line(store, mirror=str(mirror)) as service:
                notes = [note for note in service.store.notes if note != same_disk(mirror)]
        assert [path.stat().st_mode & 0o077 for path in guarded] == [0o055 * (not mends), 0, 0]
        told = [f"Other users of this PC can read {mirror}: keep it where only you can."]
        assert notes == ([] if mends else told)


@posix_only
@pytest.mark.parametrize("planted", ["a file of his own", "a link"])
@pytest.mark.parametrize("at_start", [True, False])
def test_another_user_is_not_given_the_secrets_by_what_he_has_put_into_the_mirror(
    planted: str, at_start: bool, store: Path, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with line(store) as service:
        import_files(service, upload(list(rows(5)), "a.csv"))
    with line(store, mirror="" if at_start else str(mirror)) as service:
        if not at_start:
            mirror_failed = service.store.notes
        (mirror / "imports").mkdir(parents=True, exist_ok=True)
        (tmp_path / "elsewhere.csv").write_text("mine")
        trap = mirror / "imports" / ("000001-a.csv" if at_start else "000002-b.csv")
        if planted == "a link":
            trap.symlink_to(tmp_path / "elsewhere.csv")
        else:
            trap.touch()
            made_by_another_user(trap, monkeypatch)
        if not at_start:
            import_files(service, upload(list(rows(5, first=5)), "b.csv"))
    if at_start:
        with line(store, mirror=str(mirror)) as service:
            mirror_failed = service.store.notes
    assert (tmp_path / "elsewhere.csv").read_text() == "mine"
    assert trap.is_symlink() or trap.read_bytes() == b""
    assert any(note.startswith("THERE IS NO SECOND COPY") for note in mirror_failed)


def test_any_earlier_state_of_the_journal_is_refused(store: Path, profile: Path, marked: Path) -> None:
    assert marked.parent == profile
    lines = (store / "journal.csv").read_bytes().splitlines(keepends=True)
    for kept in range(2, len(lines)):
        (store / "journal.csv").write_bytes(b"".join(lines[:kept]))
        before = files(store)
        with pytest.raises(StoreError, match="is not the latest copy"), line(store, marks=str(profile)):
            pass
        assert files(store) == before
    (store / "journal.csv").write_bytes(b"".join(lines))
    with line(store, marks=str(profile)):
        pass


def test_a_copy_that_went_its_own_way_on_another_pc_is_refused_here(
    store: Path, profile: Path, marked: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    with line(store, marks=str(profile)) as service:
        work(service, "here")
    with line(copy, marks=str(tmp_path / "another PC")) as service:
        assert "sees this store for the first time" in service.store.notes[-1]
        work(service, "there", "and there")
    for _ in range(2):
        with pytest.raises(StoreError, match="has another one, up to 6"), line(copy, marks=str(profile)):
            pass
    accept = {"who": "me", "reason": "this one counts"}
    with line(copy, marks=str(profile), accept=accept):
        pass
    with line(copy, marks=str(profile)):
        pass
    with pytest.raises(StoreError, match="is not the latest copy"), line(store, marks=str(profile)):
        pass
    assert marked.exists()


def test_a_start_alone_moves_the_mark_to_the_end_of_the_journal(
    store: Path, profile: Path, marked: Path, tmp_path: Path
) -> None:
    shutil.copytree(store, tmp_path / "old")
    with line(store) as service:  # as on another PC
        work(service, "C")
    with line(store, marks=str(profile)) as service:
        assert service.store.notes == []
    old = pytest.raises(StoreError, match="is not the latest copy")
    with old, line(tmp_path / "old", marks=str(profile)):
        pass
    assert marked.exists()


@pytest.mark.usefixtures("marked")
def test_two_copies_of_a_store_are_not_served_at_once_on_one_pc(store: Path, profile: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    in_use = pytest.raises(StoreError, match="A copy of this store is in use on this PC")
    with line(store, marks=str(profile)), in_use, line(copy, marks=str(profile)):
        pass
    with line(copy, marks=str(profile)):
        pass


def test_a_mark_that_was_torn_anywhere_still_refuses_all_but_the_latest_events(
    store: Path, profile: Path, marked: Path, tmp_path: Path
) -> None:
    good = marked.read_bytes()
    journal = (store / "journal.csv").read_bytes()
    newest = max(range(0, len(good), program.MARK_LENGTH), key=lambda place: good[place : place + 12])
    (store / "journal.csv").write_bytes(b"".join(journal.splitlines(keepends=True)[:2]))
    for torn in range(program.MARK_LENGTH):
        marked.write_bytes(good[: newest + torn] + bytes(program.MARK_LENGTH - torn) + good[newest + 47 :])
        with pytest.raises(StoreError, match="is not the latest copy"), line(store, marks=str(profile)):
            pass
    for nothing in (b"", b"x" * 300, b"\n" * 300):
        marked.write_bytes(nothing)
        shutil.copytree(store, tmp_path / "copy")
        with line(tmp_path / "copy", marks=str(profile)) as service:
            assert service.state.names == []
        shutil.rmtree(tmp_path / "copy")


def test_the_mark_is_found_in_a_journal_however_many_of_its_lines_are_read_together(
    store: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with line(store, marks=str(profile)) as service:
        import_files(service, upload(list(rows(5))))
        work(service, *"ABCDE")
    for many in range(1, 8):
        monkeypatch.setattr(program, "JOURNAL_SLICE", many)
        with line(store, marks=str(profile)) as service:
            assert service.store.notes == []
            assert service.state.products[PRODUCT].devices.keys() == set("ABCDE")


@pytest.mark.parametrize("profile_is", ["none", "a file", "full"])
def test_a_profile_that_is_missing_or_broken_never_stops_the_line(
    profile_is: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    marks = {"none": "", "a file": str(tmp_path / "file"), "full": str(tmp_path / "full")}[profile_is]
    with line(store, marks=marks) as service:
        import_files(service, upload(list(rows(5))))
        if profile_is == "full":
            with monkeypatch.context() as patch:
                nth = iter(["", "", RAISE])
                patch.setattr(program, "os", Disk(lambda call: next(nth, ""), errno.ENOSPC))
                work(service, "A")
        work(service, "B")
        warned = [note for note in service.store.notes if "cannot remember how far the store has come" in note]
        assert len(warned) == 1
        assert f"{marks or 'no profile'}), so an old copy put back would not be noticed" in warned[0]


def test_a_folder_of_marks_that_may_not_be_listed_stops_no_new_store(
    store: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile.mkdir(parents=True)
    everywhere_else = os.listdir

    def listdir(folder: str) -> List[str]:
        if folder == str(profile):  # as after a first start with sudo
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return everywhere_else(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    with line(store, marks=str(profile)) as service:
        assert service.store.notes == [f"A new, empty store was made: {store}"]
        import_files(service, upload(list(rows(5))))
        work(service, "A")


def test_an_old_copy_whose_acceptance_cannot_be_recorded_stays_refused(
    store: Path, profile: Path, marked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Path(shutil.copytree(store, tmp_path / "old"))
    with line(store, marks=str(profile)) as service:
        work(service, "C")
    shutil.rmtree(store)
    old.rename(store)
    before, mark = files(store), marked.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(program, "os", Disk(at_call(1, RAISE, "write"), errno.ENOSPC))  # behind the lock's
        with pytest.raises(StoreError, match="could not be written"), line(
            store, marks=str(profile), accept={"who": "me", "reason": "disk died"}
        ):
            pass
    assert (files(store), marked.read_bytes()) == (before, mark)
    with pytest.raises(StoreError, match="is not the latest copy"), line(store, marks=str(profile)):
        pass


def test_where_there_is_no_profile_the_mark_is_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_STATE_HOME"
    assert program.marks_folder() == str(tmp_path / "profile" / "certtool")
    monkeypatch.setenv(name, "")
    if sys.platform != "win32":
        monkeypatch.setenv("HOME", str(tmp_path))
        assert program.marks_folder() == str(tmp_path / ".local" / "state" / "certtool")
        monkeypatch.setenv("HOME", "relative")
    assert program.marks_folder() == ""


def test_a_pc_that_had_another_store_says_what_a_new_one_would_do(store: Path, profile: Path, marked: Path) -> None:
    assert marked.parent == profile
    shutil.rmtree(store)
    for folder in (store, profile.parent / "one more"):
        with line(folder, marks=str(profile)) as service:
            made, other = service.store.notes
        assert made == f"A new, empty store was made: {folder}"
        assert other.startswith("This PC has had another store before. What was given out from that one")
    with line(store, marks=str(profile)) as service:
        assert service.store.notes == []


# -- mirror ------------------------------------------------------------------------------------------------------------


def same(store: Path, mirror: Path) -> bool:
    """Whether the mirror is the store, but for what only the store's own process needs."""
    kept = {name: data for name, data in files(store).items() if "torn" not in name}
    return kept == files(mirror)


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    return tmp_path / "other disk" / "mirror"


def same_disk(mirror: Path) -> str:
    return f"The mirror {mirror} is on the store's own disk, and ends with it: name another."


def test_a_mirror_is_always_a_whole_copy_that_can_be_served(
    server: StartServer, store: Path, mirror: Path, certtool: RunCerttool, tmp_path: Path
) -> None:
    running = server("--import", SAMPLE, "--mirror", mirror)
    for number in range(5):
        given = running.request(WIFI, f"MAC-{number}")
        assert same(store, mirror)
    certtool("import", identities.write(tmp_path / "pool.csv", 50), "--data", store)
    assert same(store, mirror)
    running.kill()
    assert server(store=mirror).request(WIFI, "MAC-4") == given


def test_what_a_start_has_mended_is_said_also_where_it_then_fails(
    store: Path, mirror: Path, certtool: RunCerttool
) -> None:
    for folder in (store, mirror):
        certtool("import", SAMPLE, "--data", folder)
    with open(store / "journal.csv", "ab") as journal:
        journal.write(b"3,half")
    *notes, refused = certtool("serve", 0, "--data", store, "--mirror", mirror, ok=1).stderr.splitlines()
    assert any("journal.csv ended in half a line" in note for note in notes)
    assert "journal.csv is no copy of" in refused


def test_a_mirror_that_is_behind_is_caught_up_at_the_start(store: Path, mirror: Path) -> None:
    with line(store, mirror=str(mirror)) as service:
        import_files(service, upload(list(rows(5))))
        work(service, "A")
    with line(store) as service:
        import_files(service, upload(list(rows(5, first=5))))
        work(service, "B")
    whole = (mirror / "journal.csv").read_bytes()
    [first] = (mirror / "imports").iterdir()
    rows_of_first = first.read_bytes()
    for cut in (0, 3, len(whole)):
        (mirror / "journal.csv").write_bytes(whole[:cut])
        first.write_bytes(rows_of_first[: cut or len(rows_of_first)])
        with line(store, mirror=str(mirror)) as service:
            assert same(store, mirror)
            assert service.store.notes == [same_disk(mirror)]
    (mirror / "journal.csv").write_bytes(whole + bytes(100))  # torn by a power cut
    with line(store, mirror=str(mirror)):
        assert same(store, mirror)


def test_a_mirror_that_is_whole_is_not_written_again_at_the_start(
    store: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with line(store, mirror=str(mirror)) as service:
        import_files(service, upload(list(rows(5))))
        work(service, "A")
    written: List[bytes] = []
    monkeypatch.setattr(program, "_write_all", lambda _, data: written.append(data))
    with line(store, mirror=str(mirror)):
        assert same(store, mirror)
    assert [data for data in written if b'"pid"' not in data] == []  # else it is no copy while that is under way


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="tells which files are open")
def test_a_store_that_imported_and_recorded_leaves_no_file_open(store: Path, profile: Path, mirror: Path) -> None:
    before = os.listdir("/dev/fd")
    for first in (0, 5):
        with line(store, marks=str(profile), mirror=str(mirror)) as service:
            import_files(service, upload(list(rows(5, first=first)), f"{first}.csv"))
            import_files(service, upload(list(rows(4, first=first)), "all rows are duplicates.csv"))
            work(service, f"A{first}")
            service.store.close()
    assert os.listdir("/dev/fd") == before


def test_a_mirror_that_is_no_copy_is_refused_with_what_to_do(
    store: Path, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with line(store, mirror=str(mirror)) as service:
        import_files(service, upload(list(rows(5))))
        work(service, "A")
    old = Path(shutil.copytree(store, tmp_path / "old"))
    with line(store, mirror=str(mirror)) as service:
        work(service, "B")
    with line(tmp_path / "another store") as service:
        import_files(service, upload(list(rows(3, first=5)), "other.csv"))
    before = files(mirror)
    for other, advice in ((old, "put the mirror's files into it"), (tmp_path / "another store", "or delete that file")):
        no_copy = pytest.raises(StoreError, match=rf"journal\.csv is no copy of .*{advice}")
        with no_copy, line(other, mirror=str(mirror)):
            pass
    shutil.rmtree(tmp_path / "another store" / "imports")
    (tmp_path / "another store" / "journal.csv").unlink()  # lost, and a new one would be made
    lost = pytest.raises(StoreError, match="or lost: put the mirror's files into it")
    with lost, line(tmp_path / "another store", mirror=str(mirror)):
        pass
    assert files(tmp_path / "another store") == {}
    in_it = pytest.raises(StoreError, match="The mirror is the store itself, or in it")
    for inside in (store, store / "below" / "mirror"):
        with in_it, line(store, mirror=str(inside)):
            pass
    with monkeypatch.context() as patch:  # as where a disk is mounted twice
        patch.setattr("certtool.os.path.realpath", lambda path: f"/unlike/{len(path)}")
        with pytest.raises(StoreError, match="The mirror is the store itself"), line(store, mirror=f"{store}/."):
            pass
    assert files(mirror) == before


@pytest.mark.parametrize("fault", [RAISE, SHORT])
def test_the_line_goes_on_without_a_mirror_that_fails_and_warns_again_and_again(
    fault: str, store: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with line(store, mirror=str(mirror)) as service:
        import_files(service, upload(list(rows(5))))
        with monkeypatch.context() as patch:
            calls: Iterator[str] = iter(["", "", fault])
            patch.setattr(program, "os", Disk(lambda call: next(calls, ""), errno.ENOSPC))
            work(service, "A")
        work(service, "B")
        import_files(service, upload(list(rows(5, first=5))))
        assert service.store.notes[1] == same_disk(mirror)
        assert [note for note in service.store.notes[2:] if "THERE IS NO SECOND COPY" not in note] == []
        assert len(service.store.notes) == 3
        monkeypatch.setattr(program, "MIRROR_REMINDER_SECONDS", 0.0)
        monkeypatch.setattr("certtool.time.monotonic", lambda: 1e12)
        work(service, "C")
        work(service, "D")
        assert len(service.store.notes) == 5
        assert service.state.products[PRODUCT].devices.keys() == {"A", "B", "C", "D"}
    monkeypatch.undo()
    with line(store, mirror=str(mirror)):
        assert same(store, mirror)


def test_an_import_that_the_mirror_does_not_take_is_imported_all_the_same(
    store: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with line(store, mirror=str(mirror)) as service:
        monkeypatch.setattr(service.store._mirror, "_complete", no_room)
        assert import_files(service, upload(list(rows(5)))).imported == 5
        assert "THERE IS NO SECOND COPY" in service.store.notes[-1]
    with line(store, mirror=str(mirror)):
        assert same(store, mirror)


def test_what_an_import_left_in_the_mirror_when_it_was_taken_back_is_in_no_other_ones_way(
    store: Path, mirror: Path
) -> None:
    with line(store, mirror=str(mirror)) as service:
        (mirror / "imports" / "000001-identities.csv").write_text("the rows\nof another\nfile\n" * 100)
        assert import_files(service, upload(list(rows(5)))).imported == 5
        assert service.store.notes[1:] == [same_disk(mirror)]
        assert same(store, mirror)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_start_writes_over_what_an_import_left_in_the_mirror_only_if_it_was_taken_back(
    recorded: bool, store: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken_back(_: object) -> None:
        raise Refused("A device of the file got another certificate meanwhile: import the file again.")

    with line(store, mirror=str(mirror)) as service:
        import_files(service, upload(list(rows(5))))
        if not recorded:
            monkeypatch.setattr(service, "_adopt", taken_back)
        with contextlib.nullcontext() if recorded else pytest.raises(Refused, match="import the file again"):
            import_files(service, upload(list(rows(5, first=5))))
    left = mirror / "imports" / "000002-identities.csv"
    assert left.exists()
    if recorded:
        left.write_bytes(left.read_bytes().replace(b"dn", b"DN"))
        with pytest.raises(StoreError, match=r"000002-identities\.csv is no copy of"), line(store, mirror=str(mirror)):
            pass
        return
    with line(store) as service:  # as by `import` while no server runs
        assert import_files(service, upload(list(rows(9, first=7)))).imported == 9
    with line(store, mirror=str(mirror)) as service:
        assert service.store.notes == [same_disk(mirror)]
        assert same(store, mirror)


@posix_only
def test_a_mirror_that_somebody_deletes_is_missed_at_the_next_record(store: Path, mirror: Path) -> None:
    with line(store, mirror=str(mirror)) as service:
        import_files(service, upload(list(rows(5))))
        shutil.rmtree(mirror)
        work(service, "A")
        assert "THERE IS NO SECOND COPY" in service.store.notes[-1]
    with line(store, mirror=str(mirror)):
        assert same(store, mirror)


def test_a_mirror_that_cannot_be_made_is_told_in_words(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with line(store, mirror=str(tmp_path / "file")) as service:
        import_files(service, upload(list(rows(5))))
        work(service, "A")
        [warning] = [note for note in service.store.notes if "THERE IS NO SECOND COPY" in note]
        assert f"the mirror {tmp_path / 'file'} failed (File exists)" in warning


def no_room(*_: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- verify ------------------------------------------------------------------------------------------------------------


def test_a_store_is_verified_beside_its_server_and_nothing_changes(
    server: StartServer, store: Path, certtool: RunCerttool
) -> None:
    running = server("--import", SAMPLE)
    running.request(WIFI, "MAC-1")
    running.report(WIFI, "MAC-1", 1)
    before = files(store)
    done = certtool("verify", "--data", store)
    counts = "19 Unallocated, 0 Allocated, 1 Written, 0 Failed, 0 Void"
    assert (done.stdout, done.stderr) == (f"{store}: 20 certificates ({counts}): all is right.\n", "")
    assert files(store) == before


def test_a_certificate_that_is_in_two_stores_is_found(
    store: Path, certtool: RunCerttool, tmp_path: Path, profile: Path
) -> None:
    other, third = tmp_path / "other", tmp_path / "third"
    certtool("import", identities.write(tmp_path / "a.csv", 5), "--data", store)
    certtool("import", identities.write(tmp_path / "b.csv", 5, first=3), "--data", other)
    certtool("import", identities.write(tmp_path / "c.csv", 5, first=8), SAMPLE, "--data", third)
    assert profile.is_dir()
    done = certtool("verify", other, third, store, "--data", store, ok=1)
    *good, found, last = done.stdout.splitlines()
    name = sorted(row.device_name for row in rows(2, first=3))[0]
    assert f"{other}: 2 certificates of product {PRODUCT} are also in {store}, such as {name}." in done.stdout
    assert len([text for text in (*good, found, last) if text.endswith("all is right.")]) == 2
    assert done.stderr == "certtool: 1 findings: see above, and do not serve these stores before you know why.\n"
    assert certtool("verify", third, "--data", store).stdout.count("all is right.") == 2


def test_a_certificate_is_found_in_whichever_two_of_the_stores_it_is(
    store: Path, certtool: RunCerttool, tmp_path: Path
) -> None:
    second, third, fourth = (tmp_path / name for name in ("second", "third", "fourth"))
    for folder, first in ((store, 0), (second, 10), (third, 14), (fourth, 30)):
        certtool("import", identities.write(tmp_path / "pool.csv", 5, first=first), "--data", folder)
    journal = fourth / "journal.csv"
    journal.write_bytes(journal.read_bytes() + b"half a line")
    done = certtool("verify", second, third, fourth, "--data", store, ok=1)
    [found] = [text for text in done.stdout.splitlines() if not text.endswith("all is right.")]
    assert found.startswith(f"{third}: 1 certificates of product {PRODUCT} are also in {second}, such as ")
    note, last = done.stderr.splitlines()
    assert note.startswith(f"certtool: {fourth}: ")
    assert last.startswith("certtool: 1 findings: see above")


@pytest.mark.skipif(sys.platform == "win32", reason="no folder has such a name there")
def test_a_store_whose_name_commands_a_terminal_is_not_obeyed_by_verify(
    store: Path, inline: RunCerttool, tmp_path: Path
) -> None:
    evil = tmp_path / "\x1b[2J"
    for folder in (evil, store):
        inline("import", SAMPLE, "--data", folder)
    right, *twice, gone = inline("verify", store, evil / "none", "--data", evil, ok=1).stdout.splitlines()
    assert right.endswith(": all is right.")
    assert {"are also in" in text for text in twice} == {True}
    assert "/?[2J/none: " in gone
    assert all("?[2J" in text and text.isprintable() for text in (right, *twice, gone))


def test_verify_finds_that_a_store_is_an_old_copy(store: Path, marked: Path, certtool: RunCerttool) -> None:
    assert marked.is_file()
    assert "all is right" in certtool("verify", "--data", store).stdout
    journal = store / "journal.csv"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    done = certtool("verify", "--data", store, ok=1)
    assert "is not the latest copy" in done.stdout
    assert "all is right" not in done.stdout


def test_verify_names_every_damaged_import_and_a_store_that_is_not_there(
    store: Path, certtool: RunCerttool, tmp_path: Path
) -> None:
    for number in range(3):
        certtool("import", identities.write(tmp_path / f"{number}.csv", 5, first=5 * number), "--data", store)
    for path in sorted((store / "imports").iterdir())[1:]:
        path.write_bytes(path.read_bytes().replace(b"dn", b"nd", 1))
    (tmp_path / "empty").mkdir()
    found = certtool("verify", tmp_path / "nowhere", tmp_path / "empty", "--data", store, ok=1).stdout.splitlines()
    assert len(found) == 4
    assert "000002-1.csv is not as it was imported" in found[0]
    assert "000003-2.csv is not as it was imported" in found[1]
    assert found[2].startswith(f"{tmp_path / 'nowhere'}: There is no store at")
    assert found[3].startswith(f"{tmp_path / 'empty'}: There is no store at")


def wrong_checksum(_: State, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(program, "crc32_many", lambda payloads: [7] * len(payloads))


def wrong_field(_: State, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(program, "check_field", lambda column, _: "It is bad." * (column == "ProductID"))


def twice(state: State, _: pytest.MonkeyPatch) -> None:
    names = state.products[PRODUCT].names
    names[next(iter(names))] = 1


def wrong_counts(state: State, _: pytest.MonkeyPatch) -> None:
    state.products[PRODUCT].counts[program.WRITTEN] += 1


def two_for_one(state: State, _: pytest.MonkeyPatch) -> None:
    state._device[1] = state._device[0]


def unknown_device(state: State, _: pytest.MonkeyPatch) -> None:
    state.products[PRODUCT].devices.pop(state._device[0])
    state._device[0] = ""


def wrong_stock(state: State, _: pytest.MonkeyPatch) -> None:
    state.products[PRODUCT].bound += 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (wrong_checksum, "its CRC32 is 00000007, and not as the import file has it"),
        (wrong_field, r"certificate 1 of all imports: It is bad\."),
        (twice, "was imported twice"),
        (wrong_counts, "the counts of its states are wrong"),
        (two_for_one, "a device holds two certificates"),
        (unknown_device, "a certificate is with a device that is not known"),
        (wrong_stock, "the number of free certificates is wrong"),
    ],
)
@pytest.mark.usefixtures("marked")
def test_an_audit_finds_what_no_file_shows(
    damage: Callable[[State, pytest.MonkeyPatch], None], said: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_and_damage(self: Store, state: State) -> None:
        load(self, state)
        damage(state, monkeypatch)

    load = Store.load
    monkeypatch.setattr(Store, "load", load_and_damage)
    found: List[str] = list(program.audit(Store(str(store), writer=False), State()))
    assert any(re.search(said, finding) for finding in found), found


# -- connections of one peer -------------------------------------------------------------------------------------------


def test_one_peer_holds_half_of_the_connections_and_loses_its_own_beyond_that(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "MAX_CONNECTIONS", 6)
    server = inside()
    monkeypatch.setattr(program, "is_loopback", lambda address: address != "127.0.0.1")
    with contextlib.ExitStack() as crowd:
        for _ in range(3):
            crowd.enter_context(server.connect(b"POST / HT"))
        server.turn()
        assert len(server.server.connections) == 3
        assert server.say(ask("one more of the same peer"))[0] == 200
        server.turn()
        assert server.server._of_peer == {"127.0.0.1": 2}, "one of its own gave way"
    server.turn()
    assert server.server._of_peer == {}


def test_the_programs_of_this_pc_such_as_a_tls_proxy_may_hold_all_connections(
    inside: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "MAX_CONNECTIONS", 6)
    server = inside()
    with contextlib.ExitStack() as crowd:
        for _ in range(6):
            crowd.enter_context(server.connect(b"POST / HT"))
        server.turn()
        assert len(server.server.connections) == 6
