"""What certtool does for whoever asks: requests without an id, operators' commands, warnings, and whole imports."""

from __future__ import annotations

import codecs
import csv
import errno
import os
import re
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Generator, Iterator, List, Optional, Set

import pytest

import certtool
from certtool import (
    ALLOCATED,
    BURN_FAILED,
    BURN_SUCCEEDED,
    MAKE_VOID,
    RELEASE,
    SAME,
    Credential,
    DeviceIDRequired,
    IdentityFile,
    ImportOptions,
    PlainRows,
    PoolExhausted,
    Refused,
    Service,
    State,
    Store,
    StoreUnavailable,
    UnknownProduct,
    Upload,
)
from tests.identities import PRODUCT, rows
from tests.stores import (
    RAISE,
    SKIP_BAD,
    STATION,
    Disk,
    Opened,
    files,
    import_files,
    open_store,
    read_store,
    snapshot,
    upload,
)

OTHER = "a1OtherPk"


@pytest.fixture
def line(store: Path) -> Iterator[Opened]:
    """A store with five certificates, of which device A has the first."""
    opened = open_store(store)
    import_files(opened.service, upload(list(rows(5)), "first.csv"))
    opened.service.request(PRODUCT, "A", STATION, 1000)
    opened.service.commit()
    yield opened
    opened.store.close()


def name(number: int) -> str:
    """The DeviceName of certificate `number` in `line`."""
    return next(rows(1, first=number)).device_name


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_request_without_an_id_gets_one_that_the_burn_can_be_reported_by(line: Opened) -> None:
    given = line.service.request(PRODUCT, "", STATION, 1000)
    assert given.device_id.startswith("auto-")
    assert given.certificate.credential.device_name == name(1)
    reported = line.service.report(PRODUCT, given.device_id, BURN_SUCCEEDED, STATION, 1001)
    assert reported == (name(1), "written")


def test_a_report_that_comes_twice_is_answered_twice_and_recorded_once(line: Opened, store: Path) -> None:
    reports = {BURN_SUCCEEDED: "written", BURN_FAILED: "failed"}
    for verb, kind in reports.items():
        assert line.service.report(PRODUCT, "A", verb, STATION, 1001) == (name(0), kind)
        line.service.commit()
        on_disk = files(store)
        assert line.service.report(PRODUCT, "A", verb, STATION, 1002) == (name(0), SAME)
        line.service.commit()
        assert files(store) == on_disk


def test_no_id_is_made_up_twice(line: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = iter(["11", "11", "22"])
    monkeypatch.setattr("certtool.secrets.token_hex", lambda size: next(made_up))
    ids = [line.service.request(PRODUCT, "", STATION, 1000).device_id for _ in range(2)]
    assert ids == ["auto-11", "auto-22"]


def test_a_server_may_insist_on_an_id(line: Opened) -> None:
    service = Service(line.store, line.state, require_device_id=True)
    before = snapshot(line.state)
    with pytest.raises(DeviceIDRequired):
        service.request(PRODUCT, "", STATION, 1000)
    with pytest.raises(UnknownProduct):
        service.request(OTHER, "", STATION, 1000)
    assert snapshot(line.state) == before
    assert service.request(PRODUCT, "A", STATION, 1000).kind == SAME


def test_a_low_stock_is_told_once_and_an_empty_one_again(store: Path) -> None:
    said: List[str] = []
    opened = open_store(store, notify=said.append)
    import_files(opened.service, upload(list(rows(102))))
    told_after = {}
    for number in range(102):
        before = len(said)
        opened.service.request(PRODUCT, f"device{number}", STATION, 1000)
        if len(said) > before:
            told_after[101 - number] = said[-1]
    with pytest.raises(PoolExhausted):
        opened.service.request(PRODUCT, "one more", STATION, 1000)
    opened.store.close()
    assert told_after == {
        99: f"Only 99 certificates of product {PRODUCT} are left: import more.",
        0: f"No certificate of product {PRODUCT} is left: import more now.",
    }


def test_the_stock_of_a_large_product_is_low_below_five_percent() -> None:
    limits = {total: certtool.low_stock_limit(total) for total in (1, 2000, 2001, 10_000)}
    assert limits == {1: 100, 2000: 100, 2001: 101, 10_000: 500}


# -- what an operator does ---------------------------------------------------------------------------------------------


def operate(opened: Opened, verb: int, device_name: str, **how: Any) -> Any:
    """Release or void as `me`, for a reason."""
    given = {"product_key": "", "reason": " broken \n", "who": "me", "force": False, **how}
    return opened.service.operate(verb, device_name, now=2000, **given)


def test_who_released_and_why_stays_in_the_journal(line: Opened, store: Path) -> None:
    said = operate(line, RELEASE, name(0), force=True)
    assert said == (f"{name(0)} was Allocated and is Unallocated now.", "release")
    line.service.commit()
    *_, last = csv.reader((store / "journal.csv").read_text().splitlines())
    assert last[2:8] == [
        "release", PRODUCT, name(0), "A", "", '{"who":"me","reason":"broken","force":true}',
    ]  # fmt: skip


def test_what_an_operator_may_not_do_changes_nothing(line: Opened, store: Path) -> None:
    import_files(line.service, upload([Credential(OTHER, name(0), "secret")], "other.csv"))
    before, on_disk = snapshot(line.state), files(store)
    for verb in (RELEASE, MAKE_VOID):
        with pytest.raises(Refused, match="no certificate of this DeviceName"):
            operate(line, verb, "nobody00")
        with pytest.raises(Refused, match="no certificate of this DeviceName"):
            operate(line, verb, name(1), product_key=OTHER)
        with pytest.raises(Refused, match=rf"\({PRODUCT}, {OTHER}\): say which with --product-key"):
            operate(line, verb, name(0))
        with pytest.raises(Refused, match="A reason is needed"):
            operate(line, verb, name(1), reason=" \n")
    line.service.commit()
    assert (snapshot(line.state), files(store)) == (before, on_disk)
    assert operate(line, RELEASE, name(0), product_key=PRODUCT)[1] == "release"


def test_to_void_twice_is_told_and_recorded_once(line: Opened, store: Path) -> None:
    assert operate(line, MAKE_VOID, name(0)) == (f"{name(0)} was Allocated and is Void now.", "void")
    line.service.commit()
    on_disk = files(store)
    assert operate(line, MAKE_VOID, name(0)) == (f"{name(0)} is Void already: nothing changed.", SAME)
    line.service.commit()
    assert files(store) == on_disk


@pytest.mark.parametrize("size", [1, 130_000, 200_000])
def test_however_long_a_reason_is_the_journal_can_be_read_again(size: int, line: Opened, store: Path) -> None:
    operate(line, MAKE_VOID, name(0), reason="x" * size)
    line.service.commit()
    assert snapshot(read_store(store).state) == snapshot(line.state)


# -- imports -----------------------------------------------------------------------------------------------------------


def counts(report: certtool.ImportReport) -> Dict[str, int]:
    """The counts of a report."""
    return {name: getattr(report, name) for name in ("read", "imported", "duplicates", "rejected")}


BAD = Credential(PRODUCT, "bad", "hush")
NEW = Credential(PRODUCT, "new-0001", "hush")


def test_with_one_bad_row_nothing_is_imported_and_every_bad_row_is_listed(line: Opened, store: Path) -> None:
    before, on_disk = snapshot(line.state), files(store)
    good, mixed = upload([NEW], "good.csv"), upload([*rows(1), BAD, NEW._replace(device_name="new-0002"), BAD], "m.csv")
    for order in ([good, mixed], [mixed, good]):
        report = import_files(line.service, *order)
        assert not report.ok
        assert counts(report) == {"read": 5, "imported": 0, "duplicates": 1, "rejected": 2}
        wrong = "DeviceName is not 4-32 characters of A-Z a-z 0-9 - _ @ . :"
        assert report.errors == [{"file": "m.csv", "line": at, "message": wrong} for at in (3, 5)]
        assert (snapshot(line.state), files(store)) == (before, on_disk)


def test_the_good_rows_are_imported_if_the_bad_ones_may_be_skipped(line: Opened, store: Path) -> None:
    report = import_files(line.service, upload([NEW, BAD, *rows(2)]), how=SKIP_BAD)
    assert report.ok
    assert counts(report) == {"read": 4, "imported": 1, "duplicates": 2, "rejected": 1}
    assert snapshot(read_store(store).state) == snapshot(line.state)
    again = import_files(line.service, upload([NEW, BAD, *rows(2)]), how=SKIP_BAD)
    assert counts(again) == {"read": 4, "imported": 0, "duplicates": 3, "rejected": 1}
    assert len(again.errors) == 1, "a file with bad rows is never taken for one that was imported whole"


def test_a_file_that_is_no_identity_file_is_not_skipped(line: Opened) -> None:
    before = snapshot(line.state)
    for data, at in ((b"\n\nnonsense\n", 3), (b"PK\x03\x04", 1), (b"ProductKey,DeviceName,DeviceSecret\n", 1)):
        report = import_files(line.service, upload([NEW]), Upload.of("wrong.csv", data), how=SKIP_BAD)
        assert not report.ok
        assert [(error["file"], error["line"]) for error in report.errors] == [("wrong.csv", at)]
        assert counts(report)["imported"] == 0
    assert snapshot(line.state) == before


def test_a_file_of_nothing_but_wrong_rows_is_not_read_to_its_end_and_takes_no_memory_without_limit(
    line: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(line.state)
    monkeypatch.setattr(certtool, "MAX_WRONG", 1000)
    wrong = Upload.of("wrong.csv", b"ProductKey,DeviceName,DeviceSecret\n" + b"x\n" * 1_000_000)
    for how in (ImportOptions(), SKIP_BAD, ImportOptions(dry_run=True)):
        report = import_files(line.service, upload([NEW]), wrong, how=how)
        assert not report.ok
        assert report.imported == 0
        assert 1000 < report.rejected < 2 * 1000
        assert len(report.errors) == report.rejected + 1
        last = report.errors[-1]
        assert last["line"] == report.errors[-2]["line"]
        assert last["message"].startswith("More than 1,000 rows are wrong, so the rest was not read")
        assert snapshot(line.state) == before
    several = [Upload.of(f"{n}.csv", b"ProductKey,DeviceName,DeviceSecret\n" + n * b"x\n") for n in range(600, 650)]
    report = import_files(line.service, *several)
    assert 1000 < report.rejected < 1200, "many files may hold as many together as one"
    assert [error["file"] for error in report.errors[-1:]] == ["601.csv"]
    few = Upload.of("few.csv", b"ProductKey,DeviceName,DeviceSecret\n" + b"x\n" * 1000)
    assert import_files(line.service, few, upload([NEW]), how=SKIP_BAD).imported == 1


def test_a_file_whose_product_keys_are_another_column_is_refused_before_the_page_must_show_them_all(
    line: Opened,
) -> None:
    before = snapshot(line.state)
    swapped = [row._replace(product_key=row.device_name, device_name=PRODUCT) for row in rows(10_000)]
    for how in (ImportOptions(), SKIP_BAD, ImportOptions(dry_run=True)):
        report = import_files(line.service, upload([NEW]), upload(swapped, "swapped.csv"), how=how)
        assert not report.ok
        assert report.imported == 0
        assert report.read < 5000, "the rest is not read"
        told = "The file names more than 1,000 ProductKeys: is that the right column?"
        assert report.errors == [{"file": "swapped.csv", "line": 1, "message": told}]
        assert snapshot(line.state) == before
    assert import_files(line.service, upload(swapped[:1000])).imported == 1000


@pytest.mark.parametrize("moment", ["_open", "_write_all"])
def test_an_interrupt_in_the_moment_in_which_the_file_of_an_import_is_made_leaves_none(
    moment: str, line: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, action = sorted((store / "imports").iterdir()), getattr(certtool, moment)

    def interrupted(*args: Any) -> None:
        done = action(*args)
        if done is not None:
            os.close(done)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(certtool, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            import_files(line.service, upload([NEW]))
    assert sorted((store / "imports").iterdir()) == before
    assert import_files(line.service, upload([NEW])).imported == 1


def test_a_file_that_another_program_has_put_in_the_place_of_a_new_import_is_left_there(
    line: Opened, store: Path
) -> None:
    there = store / "imports" / f"000002-{Path(upload([NEW]).name).stem}.csv"
    there.write_text("mine")
    with pytest.raises(StoreUnavailable, match="An import file could not be made"):
        import_files(line.service, upload([NEW]))
    assert there.read_text() == "mine"


@pytest.mark.parametrize("bad", [[], [BAD]])
def test_a_dry_run_reports_what_the_import_would_and_changes_nothing(
    bad: List[Credential], line: Opened, store: Path, tmp_path: Path
) -> None:
    before, on_disk = snapshot(line.state), files(store)
    file = upload([NEW, *rows(2), *bad, NEW], "dry.csv")
    reader = read_store(store)
    dry = import_files(reader.service, file, how=ImportOptions(dry_run=True)).as_json()
    reader.store.close()
    missing = Service(Store(str(tmp_path / "missing"), writer=False), State())
    assert import_files(missing, file, how=ImportOptions(dry_run=True)).duplicates == 1
    assert (snapshot(line.state), files(store)) == (before, on_disk)
    real = import_files(line.service, file).as_json()
    assert dry.pop("dry_run")
    assert not real.pop("dry_run")
    assert dry == real


def test_a_report_says_what_the_contract_promises(line: Opened) -> None:
    data = f"id,ProductKey,DeviceName,DeviceSecret,note\n1,{PRODUCT},new-0001,hush,\n".encode()
    report = import_files(line.service, Upload.of("march.csv", data), Upload.of("april.csv", data)).as_json()
    assert {"read": 2, "imported": 1, "duplicates": 1, "rejected": 0, "errors": []}.items() <= report.items()
    assert (report["ignored"], report["batches"], report["ok"]) == (["id", "note"], ["march"], True)


@pytest.mark.parametrize("end", ["", ",", "\u2028"])
def test_a_header_line_that_lost_its_end_shows_no_cell_as_a_column(end: str, line: Opened) -> None:
    text = f"ProductKey,DeviceName,DeviceSecret,note{end}{PRODUCT},new-0001,SECRET1,x\n{PRODUCT},new-0002,SECRET2,x\n"
    for data in (text, text.replace("\n", "\u2028")):
        report = import_files(line.service, Upload.of("x.csv", data.encode())).as_json()
        assert (report["ok"], report["imported"], report["ignored"]) == (False, 0, [])
        assert "SECRET" not in str(report)


def test_a_file_that_was_imported_before_names_its_unused_columns_again(line: Opened) -> None:
    names = [f"note {number}" for number in range(30)]
    header = ",".join(["ProductKey", "DeviceName", "DeviceSecret", "x" * 41, *names])
    data = f"{header}\n{PRODUCT},new-0001,hush{',' * 31}\n".encode()
    for _ in range(2):
        report = import_files(line.service, Upload.of("x.csv", data))
        assert (report.ok, report.ignored) == (True, names[:20])


def test_a_file_is_its_certificates_batch_unless_another_is_named(line: Opened) -> None:
    import_files(line.service, upload([NEW], "march.2026.csv"))
    import_files(line.service, upload([NEW._replace(device_name="new-0002")]), how=ImportOptions(batch="Q2"))
    assert [line.state.batch(number) for number in range(7)] == ["first"] * 5 + ["march.2026", "Q2"]


CONFLICTS = {
    "another secret": (NEW._replace(device_secret="other"), "stands in the file before, with another secret or id."),
    "another ProductSecret": (NEW._replace(product_secret="other"), "stands in the file before, with another secret"),
    "another ProductID": (NEW._replace(product_id="other"), "stands in the file before, with another secret or id."),
    "another device": (NEW._replace(device_id="X"), "stands in the file before, with another secret or id."),
    "the same device twice": (Credential(PRODUCT, "new-0002", "x", device_id="N"), "DeviceID N stands in the file"),
    "in the store": (Credential(PRODUCT, name(1), "x"), "is in the store with another DeviceSecret."),
    "all other": (Credential(PRODUCT, name(1), "x", "y", "z", "D"), "another DeviceSecret and ProductSecret and Pro"),
    "a device of the store": (Credential(PRODUCT, "new-0002", "x", device_id="A"), "DeviceID A has another certificat"),
}


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_a_certificate_that_contradicts_another_is_refused(conflict: str, line: Opened) -> None:
    row, message = CONFLICTS[conflict]
    before = snapshot(line.state)
    bound = Credential(PRODUCT, "new-0003", "x", device_id="N")
    for uploads in ([upload([NEW, bound, row])], [upload([NEW, bound], "a.csv"), upload([row], "b.csv")]):
        report = import_files(line.service, *uploads)
        assert [message in error["message"] for error in report.errors] == [True], report.errors
        assert counts(report)["rejected"] == 1
        assert snapshot(line.state) == before


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"device_id": "N"}, {"device_id": "N"}, "DeviceID N stands in the file before"),
        ({}, {"device_id": "A"}, "DeviceID A has another certificate in the store"),
        ({}, {"device_name": name(1)}, "is in the store with another DeviceSecret"),
        ({"product_key": OTHER}, {"device_name": name(1)}, "is in the store with another DeviceSecret"),
        ({"product_key": OTHER}, {"device_name": "plain-0001"}, ""),
        ({}, {"device_name": "plain-0001", "device_secret": "other"}, "stands in the file before"),
    ],
)
def test_a_contradiction_is_found_also_where_rows_are_taken_together(
    first: Dict[str, str], second: Dict[str, str], message: str, line: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = [
        Credential(PRODUCT, "plain-0001", "secret", "product-secret")._replace(**first),
        Credential(PRODUCT, "plain-0002", "secret", "product-secret")._replace(**second),
    ]
    file = upload(credentials)
    monkeypatch.setattr(certtool, "IMPORT_SLICE", file.open().read().index(b"\n"))
    (block,) = IdentityFile(file.open(), "utf-8", {}).blocks()
    assert isinstance(block, PlainRows)
    report = import_files(line.service, file)
    assert [message in error["message"] for error in report.errors] == [True] * bool(message), report.errors


def test_the_same_name_in_another_product_is_another_certificate(line: Opened) -> None:
    report = import_files(line.service, upload([Credential(OTHER, name(0), "other", device_id="A")]))
    assert (report.ok, report.imported) == (True, 1)


def test_an_identical_row_is_a_duplicate_whatever_became_of_its_certificate(line: Opened) -> None:
    bound = Credential(PRODUCT, "new-0001", "hush", device_id="BOUND")
    assert counts(import_files(line.service, upload([bound, bound])))["duplicates"] == 1
    line.service.request(PRODUCT, "BOUND", STATION, 1000)
    operate(line, RELEASE, "new-0001")
    line.service.request(PRODUCT, "BOUND", STATION, 1000)
    assert counts(import_files(line.service, upload([bound, NEW._replace(device_name="new-9")]))) == {
        "read": 2,
        "imported": 1,
        "duplicates": 1,
        "rejected": 0,
    }


def test_no_row_of_a_file_that_was_imported_whole_is_read_again(
    line: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    file = upload(list(rows(2000, OTHER)))
    import_files(line.service, file)
    line.store.close()
    opened = open_store(store)
    before, on_disk = snapshot(opened.state), files(store)
    with monkeypatch.context() as patch:
        patch.setattr(certtool.IdentityFile, "blocks", never)
        again = import_files(opened.service, file)
    assert (again.ok, counts(again)) == (True, {"read": 2000, "imported": 0, "duplicates": 2000, "rejected": 0})
    other_options = import_files(opened.service, file, how=ImportOptions(product_secret="other"))
    assert counts(other_options) == counts(again), "a column of the file wins over the option"
    assert (snapshot(opened.state), files(store)) == (before, on_disk)
    opened.store.close()


@pytest.mark.parametrize("changed", [1, 2])
def test_a_file_that_changes_while_it_is_read_is_refused_and_changes_nothing(
    changed: int, line: Opened, store: Path
) -> None:
    before, on_disk = snapshot(line.state), files(store)
    old, new = upload([NEW]), upload([NEW._replace(device_name="new-0002")])
    contents = iter([old.open() if opening < changed else new.open() for opening in range(3)])
    changing = Upload("changing.csv", lambda: next(contents), old.size)
    with pytest.raises(Refused, match=r"^changing\.csv was changed while it was read: close it elsewhere"):
        import_files(line.service, upload([NEW._replace(device_name="new-0003")], "a.csv"), changing)
    assert (snapshot(line.state), files(store)) == (before, on_disk)


def test_options_fill_columns_and_another_option_is_another_import(line: Opened) -> None:
    file = Upload.of("bare.csv", codecs.BOM_UTF8 + b"DeviceName;DeviceSecret\nbare0001;hush\n")
    for key in ("a1First", "a1Second"):
        report = import_files(line.service, file, how=ImportOptions(product_key=key, product_id="7"))
        assert report.imported == 1
        certificate = line.store.certificate(len(line.state.names) - 1)
        assert certificate.credential == Credential(key, "bare0001", "hush", "", "7")
        assert certificate.crc32 == f"{certtool.crc32(certificate.credential.payload()):08X}"


def test_the_line_goes_on_during_an_import_and_its_records_come_first(
    line: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certtool, "IMPORT_SLICE", 10)
    job = line.service.import_files([upload(list(rows(200, first=100)))], ImportOptions())
    given: List[str] = []
    for turn, _ in enumerate(job):
        if turn % 10 == 3 and len(given) < 4:
            given.append(line.service.request(PRODUCT, f"B{turn}", STATION, 1000).certificate.credential.device_name)
    assert given == [name(number) for number in range(1, 1 + len(given))]
    assert len(given) > 1
    assert snapshot(read_store(store).state) == snapshot(line.state), "all of it was committed"


def staged(line: Opened, credential: Credential) -> Generator[None, None, certtool.ImportReport]:
    """An import whose only row was read and written; what is left is to make it part of the store."""
    job = line.service.import_files([upload([credential])], ImportOptions())
    for _ in range(3):  # the file is known by its digest, its encoding was found, its rows were read
        next(job)
    return job


@pytest.mark.parametrize("rows_left", [0, 1])
def test_an_import_file_that_another_program_changes_at_once_is_not_taken(
    rows_left: int, line: Opened, store: Path
) -> None:
    before, on_disk = snapshot(line.state), files(store)
    job = line.service.import_files([upload([NEW, NEW._replace(device_name="new-0002")], "b.csv")], ImportOptions())
    path = store / "imports" / "000002-b.csv"
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        next(job)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[: 1 + rows_left]))
    with pytest.raises(
        StoreUnavailable, match=r"^Another program changed imports/000002-b\.csv at once: find out which"
    ):
        list(job)
    assert (snapshot(line.state), files(store)) == (before, on_disk)


@pytest.mark.skipif(sys.platform == "win32", reason="there an open file is not removed")
@pytest.mark.parametrize("instead", [None, b"another file"])
def test_an_import_file_that_is_not_in_its_place_any_more_is_not_taken(
    instead: Optional[bytes], line: Opened, store: Path
) -> None:
    before, on_disk = snapshot(line.state), files(store)
    service = Service(line.store, line.state, serving=False)
    job = service.import_files([upload([NEW], "b.csv")], ImportOptions())
    path = store / "imports" / "000002-b.csv"
    while not path.exists():
        next(job)
    path.unlink()
    if instead:
        path.write_bytes(instead)
    with pytest.raises(StoreUnavailable, match=r"^Another program changed imports/000002-b\.csv at once"):
        list(job)
    assert (snapshot(line.state), files(store)) == (before, on_disk)


def test_what_a_command_imported_can_be_read_by_it_all_the_same(line: Opened) -> None:
    service = Service(line.store, line.state, serving=False)
    import_files(service, upload([NEW, NEW._replace(device_name="new-0002")], "b.csv"))
    number = line.state.products[PRODUCT].names["new-0002"]
    assert service.row(number)[:2] == ("new-0002", PRODUCT)
    assert service.row(number - 1)[0] == "new-0001"


def test_an_import_is_refused_where_its_device_got_another_certificate_meanwhile(line: Opened, store: Path) -> None:
    on_disk = files(store)
    job = staged(line, Credential(PRODUCT, "new-0001", "x", device_id="B"))
    line.service.request(PRODUCT, "B", STATION, 1000)
    with pytest.raises(Refused, match="import the file again"):
        list(job)
    line.service.commit()
    after = files(store)
    assert after.keys() == on_disk.keys(), "no file is left"
    assert line.state.record(1).status == ALLOCATED
    assert snapshot(read_store(store).state) == snapshot(line.state)


def test_an_import_that_is_given_up_at_any_step_leaves_nothing(
    line: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certtool, "IMPORT_SLICE", 1)
    before, on_disk = snapshot(line.state), files(store)
    uploads = [upload([NEW], "a.csv"), upload([NEW._replace(device_name="new-0002")], "b.csv")]
    for steps in range(1, 6):
        job = line.service.import_files(uploads, ImportOptions())
        for _ in range(steps):
            next(job)
        job.close()
        assert (snapshot(line.state), files(store)) == (before, on_disk)
    assert import_files(line.service, *uploads).imported == 2


def test_a_pending_record_that_cannot_be_written_stops_the_import_too(
    line: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, on_disk = snapshot(line.state), files(store)
    job = staged(line, NEW)
    line.service.request(PRODUCT, "B", STATION, 1000)
    monkeypatch.setattr(certtool, "os", Disk(lambda call: RAISE if call == "write" else "", errno.ENOSPC))
    with pytest.raises(StoreUnavailable):
        list(job)
    monkeypatch.undo()
    assert (snapshot(line.state), files(store)) == (before, on_disk)


def test_an_import_file_that_cannot_be_made_is_told(line: Opened, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, on_disk = snapshot(line.state), files(store)
    monkeypatch.setattr(certtool, "os", Disk(lambda call: RAISE if call == "open" else "", errno.ENOSPC))
    with pytest.raises(StoreUnavailable, match=r"could not be made \(No space left on device\): free the store's disk"):
        import_files(line.service, upload([NEW]))
    monkeypatch.undo()
    assert (snapshot(line.state), files(store)) == (before, on_disk)


def test_a_name_of_a_file_does_not_leave_the_imports_folder(line: Opened, store: Path) -> None:
    for number, odd in enumerate(["../../evil.csv", "a/b\\c:d.csv", "", ".csv", "七.csv", "x" * 200, "con\n.csv"]):
        import_files(line.service, upload([NEW._replace(device_name=f"odd-{number:04d}")], odd))
    names = sorted(path.name for path in (store / "imports").iterdir())
    assert len(names) == 8
    assert all(re.fullmatch(r"\d{6}-[A-Za-z0-9._-]{1,40}\.csv", name) for name in names)
    assert snapshot(read_store(store).state) == snapshot(line.state)


def no_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("start", [no_thread, lambda run, args: 0], ids=["none is to be had", "it dies unborn"])
def test_an_import_needs_no_thread_where_memory_is_short(
    start: Any, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("certtool._thread.start_new_thread", start)
    monkeypatch.setattr(certtool, "THREAD_SECONDS", 0.0)
    opened = open_store(store)
    assert import_files(opened.service, upload(list(rows(5)))).imported == 5
    opened.store.close()
    assert snapshot(read_store(store).state) == snapshot(opened.state)


# -- defects that nobody foresaw ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Store, "append"),
        (certtool._Import, "hand_over"),
        (State, "_adopt_stocks"),
        (certtool, "low_stock_limit"),
        (Store, "adopt"),
    ],
)
def test_after_an_import_that_broke_off_nothing_is_given_out_until_the_store_is_read_again(
    owner: Any, name: str, line: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, no_memory)
        with pytest.raises(MemoryError):
            import_files(line.service, upload([NEW], "b.csv"))
    refuses_everything(line)
    line.store.close()
    again = open_store(store)
    assert_all_is_right(again, {"A"})
    again.store.close()


def test_after_a_record_that_broke_off_nothing_is_given_out_until_the_store_is_read_again(
    line: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(State, "_set", half_done)
        with pytest.raises(MemoryError):
            line.service.request(PRODUCT, "B", STATION, 1000)
    refuses_everything(line)
    with pytest.raises(StoreUnavailable):
        line.service.commit()
    line.store.close()
    again = open_store(store)
    assert_all_is_right(again, {"A"})
    again.store.close()


def test_after_a_record_that_broke_off_not_even_what_needs_no_record_is_confirmed(
    line: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burned_again() -> object:
        return line.service.report(PRODUCT, "A", BURN_SUCCEEDED, STATION, 1000)

    def voided_again() -> object:
        return line.service.operate(MAKE_VOID, line.state.names[4], PRODUCT, "scrap", "me", False, 1000)

    for _ in range(2):
        burned_again()
        voided_again()
    line.service.commit()
    with monkeypatch.context() as patch:
        patch.setattr(State, "_set", half_done)
        with pytest.raises(MemoryError):
            line.service.request(PRODUCT, "B", STATION, 1000)
    for again in (burned_again, voided_again):
        with pytest.raises(StoreUnavailable, match="Something unexpected stopped the recording"):
            again()


def no_memory(*_: Any) -> None:
    raise MemoryError


def half_done(*arguments: Any, change: Callable[..., Any] = State._set) -> None:
    change(*arguments)
    raise MemoryError


def refuses_everything(line: Opened) -> None:
    """Neither a new device nor one that has a certificate gets an answer."""
    for device_id in ("A", "B", "C"):
        with pytest.raises(StoreUnavailable, match="Something unexpected stopped the recording"):
            line.service.request(PRODUCT, device_id, STATION, 1000)
    with pytest.raises(StoreUnavailable, match="Something unexpected stopped the recording"):
        line.service.report(PRODUCT, "A", BURN_SUCCEEDED, STATION, 1000)


def assert_all_is_right(line: Opened, holding: Set[str]) -> None:
    """The devices hold one certificate each, and the rest of the pool goes to as many others."""
    product = line.state.products[PRODUCT]
    assert product.devices.keys() == holding
    given = [line.service.request(PRODUCT, f"new-{n}", STATION, 1000) for n in range(product.total - len(holding))]
    line.service.commit()
    names = [allocation.certificate.credential.device_name for allocation in given]
    assert len({*names, *map(line.state.names.__getitem__, product.devices.values())}) == product.total
    with pytest.raises(PoolExhausted):
        line.service.request(PRODUCT, "one more", STATION, 1000)
