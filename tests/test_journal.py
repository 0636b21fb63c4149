"""The journal tells the truth or is refused: its codec, and a small store damaged at every byte."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import certtool
from certtool import (
    BURN_FAILED,
    BURN_SUCCEEDED,
    JOURNAL_HEADER,
    KINDS,
    MAKE_VOID,
    RELEASE,
    Credential,
    Event,
    Events,
    JournalReader,
    JournalWriter,
    StoreError,
    chain_digest,
    decode_cells,
    encode_cell,
    format_row,
    format_time,
    parse_times,
)
from tests.stores import STATION, Opened, files, import_files, lines_of, open_store, read_store, snapshot, upload

FULL_WIDTH = "\uff1d\uff0b\uff0d\uff20"  # = + - @
TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), max_size=20)
CELL = TEXT | st.sampled_from(["=1+1", *FULL_WIDTH, "'", "''=", '"', "-", "a,b", "\r\n", " ", "@x\n", '=cmd|"/c"!A1'])

IN_A_LINE = CELL.filter(lambda text: "\n" not in text)


# -- the codec ---------------------------------------------------------------------------------------------------------


@given(st.lists(CELL, min_size=2))
def test_any_cells_are_read_back_and_no_spreadsheet_takes_one_for_a_formula(cells: List[str]) -> None:
    line = ",".join(map(encode_cell, cells))
    assert decode_cells(line) == cells
    (shown,) = csv.reader([line], strict=True)
    assert [cell for cell in shown if cell[:1] in {*"=+-@", *FULL_WIDTH}] == []
    assert [cell[cell[:1] == "'" :] for cell in shown] == cells


PIECES = st.lists(st.sampled_from([*";=+-@\"', x", *FULL_WIDTH]), max_size=8).map("".join)


@given(st.lists(PIECES), st.booleans())
@example(['x; "=1+1'], True)
def test_no_part_of_a_cell_is_a_formula_where_cells_end_at_a_semicolon(cells: List[str], blanks: bool) -> None:
    line = format_row(["lamp-0001", *cells])
    (shown,) = csv.reader([line], delimiter=";", skipinitialspace=blanks)
    assert [cell for cell in shown if cell.lstrip()[:1] in {*"=+-@", *FULL_WIDTH}] == []
    (shown,) = csv.reader([line], strict=True)
    assert len(shown) == 1 + len(cells)
    assert [cell.replace("'", "") for cell in shown[1:]] == [cell.replace("'", "") for cell in cells]


KIND = st.sampled_from(sorted(KINDS - {"store"}))
MOMENT = st.integers(1, 4_000_000_000_000)
DETAIL: st.SearchStrategy[Dict[str, Any]] = st.just({}) | st.dictionaries(
    TEXT, TEXT | st.integers() | st.booleans() | st.none() | st.lists(TEXT), max_size=3
)
EVENTS = st.builds(Event, KIND, MOMENT, IN_A_LINE, IN_A_LINE, IN_A_LINE, IN_A_LINE, DETAIL)
START = Event("store", 1_800_000_000_000, detail={"version": 1})


@given(st.lists(st.tuples(IN_A_LINE, IN_A_LINE), min_size=1))
@example([("a", ""), ("b", "c")])
def test_many_lines_are_read_as_each_of_them_is(rows: List[Tuple[str, str]]) -> None:
    text = "".join(f"{encode_cell(one)},{encode_cell(other)}\n" for one, other in rows)
    one, other = certtool.decode_columns(text, 2)
    assert list(zip(one, other)) == rows


@pytest.mark.parametrize("text", ["", "a,b", "a\n", "a,b,c\n", 'a,"b"\n"a"\n', '"a,b\n', '"a""b,c\n'])
def test_lines_that_have_other_cells_are_no_columns(text: str) -> None:
    with pytest.raises((ValueError, csv.Error)):
        certtool.decode_columns(text, 2)


@pytest.mark.parametrize("first", "=+-@'\t\r\n" + FULL_WIDTH)
def test_no_cell_begins_as_a_formula_does(first: str) -> None:
    assert encode_cell(f"{first}1").lstrip('"')[0] == "'"


def journal(*events: Event) -> List[bytes]:
    """The lines of a journal with these events."""
    writer = JournalWriter()
    return [JOURNAL_HEADER, *(writer.encode([event]).replace(JOURNAL_HEADER, b"") for event in events)]


def told(reader: JournalReader, lines: Sequence[bytes]) -> List[Any]:
    """All that a reader says of a journal, up to its end or its damage."""
    found: List[Any] = []
    try:
        for event in reader.events(lines):
            found.append((event, reader.seq, reader.digest, reader.offset))
    except StoreError as damage:
        found.append(str(damage))
    return [*found, reader.seq, reader.digest, reader.offset, reader.torn]


LINES_OF_OTHERS = st.sampled_from(
    [b"", b"2,", b"2,2026-11-24T08:00:00.000+08:00,void,,,,,[],", b'"', b"2,2026-11-24T08:00:00.000+08:00,store,,,,,,"]
)


@given(st.lists(EVENTS, max_size=6), st.integers(1, 7), st.integers(0, 900), LINES_OF_OTHERS)
def test_lines_that_are_read_together_are_read_as_each_of_them_is(
    events: List[Event], slice_: int, place: int, other: bytes
) -> None:
    good = journal(START, *events)
    whole = b"".join(good)
    flipped = bytearray(whole)
    flipped[place % len(whole)] ^= 1
    sealed = other + certtool.chain_digest(good[1][-17:-1].decode(), other[:-1]).encode() + b"\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certtool, "JOURNAL_SLICE", slice_)
        for data in (whole, whole[: place % len(whole)], bytes(flipped), b"".join([*good[:2], sealed, *good[2:]])):
            lines, one_by_one = io.BytesIO(data).readlines(), JournalReader()
            patch.setattr(one_by_one, "_decode_many", lambda lines: (None, []))
            assert told(JournalReader(), lines) == told(one_by_one, lines)


def test_lines_as_devices_make_them_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    alone: List[bytes] = []
    decode = JournalReader._decode

    def slowly(reader: JournalReader, line: bytes) -> Event:
        alone.append(line)
        return decode(reader, line)

    monkeypatch.setattr(JournalReader, "_decode", slowly)
    events = [Event("written", 1_800_000_000_000 + n, "a1Key", f"lamp-{n}", f"MAC-{n}", STATION) for n in range(1200)]
    lines = journal(START, *events)
    assert list(JournalReader().events(lines)) == [START, *events]
    assert alone == [lines[1]]


@given(st.lists(EVENTS, max_size=9), st.lists(st.integers(0, 3), min_size=9, max_size=9))
def test_what_is_taken_together_is_not_read_again(events: List[Event], shares: List[int]) -> None:
    lines = journal(START, *events)
    told_alone = told(JournalReader(), lines)
    reader, taken = JournalReader(), []
    places: List[int] = []

    def take(many: Optional[Events]) -> int:
        assert many
        share = shares[len(places)]
        places.append(reader.seq)
        taken.extend(list(many.rows())[:share])
        return min(share, len(many.kinds))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certtool, "JOURNAL_SLICE", 3)
        for event in reader.events(lines, take):
            taken.append(event)
            assert (event, reader.seq, reader.digest, reader.offset) == told_alone[len(taken) - 1]
    assert taken == [START, *events]
    assert [reader.seq, reader.digest, reader.offset, reader.torn] == told_alone[-4:]


@given(st.lists(EVENTS, max_size=9), IN_A_LINE, st.integers(0, 2000))
def test_lines_that_are_passed_over_are_checked_all_the_same(events: List[Event], name: str, place: int) -> None:
    wanted = [event._replace(device_name=name) for event in events[::4]]
    lines = journal(START, *wanted, *events, *wanted)
    whole = b"".join(lines)
    flipped = bytearray(whole)
    flipped[place % len(whole)] ^= 1
    part = f",{encode_cell(name)},".encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certtool, "JOURNAL_SLICE", 3)
        found = [event for event, *_ in told(JournalReader([part]), lines)[:-4]]
        assert [event for event in found if event in wanted] == [e for e in [*wanted, *events, *wanted] if e in wanted]
        for data in (whole, whole[: place % len(whole)], bytes(flipped)):
            pieces = io.BytesIO(data).readlines()
            ends = [told(JournalReader(about), pieces)[-5:] for about in ([], [part], [b"not there"])]
            assert [[end for end in each if not isinstance(end, tuple)] for each in ends] == 3 * [
                [end for end in ends[0] if not isinstance(end, tuple)]
            ]


def test_no_byte_of_a_line_that_is_passed_over_can_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certtool, "JOURNAL_SLICE", 2)
    events = [Event("written", 1_800_000_000_000, "a1Key", f"lamp-{n}", "MAC", STATION) for n in range(6)]
    lines = journal(START, *events)
    whole = b"".join(lines)
    assert list(JournalReader([b"none"]).events(lines)) == [START]
    for place in range(len(b"".join(lines[:4])), len(b"".join(lines[:6]))):  # they make one slice
        for other in (whole[place] ^ 1, whole[place] ^ 128):
            changed = io.BytesIO(whole[:place] + bytes([other]) + whole[place + 1 :])
            with pytest.raises(StoreError, match=r"journal\.csv line [56] was changed"):
                list(JournalReader([b"none"]).events(changed))


@pytest.mark.parametrize("place", [1, 3, 4, 5, 9])
def test_a_kind_from_the_future_is_refused_also_in_a_line_that_could_be_passed_over(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certtool, "JOURNAL_SLICE", 4)
    events = [Event("written", 1_800_000_000_000, "a1Key", f"lamp-{n}", "MAC", STATION) for n in range(10)]
    told_of: List[Optional[Events]] = []

    def together(many: Optional[Events]) -> int:
        told_of.append(many)
        return 0

    assert list(JournalReader([b"none"]).events(journal(START, *events), together)) == [START]
    assert told_of == [None, None, None]
    events[place] = events[place]._replace(kind="borrow")
    with pytest.raises(StoreError, match=f"line {place + 3} .'borrow'. was written by a newer certtool"):
        list(JournalReader([b"none"]).events(journal(START, *events)))


@given(st.lists(EVENTS, max_size=5))
def test_any_events_are_read_back_line_by_line(events: List[Event]) -> None:
    lines = journal(START, *events)
    assert all(line.count(b"\n") == 1 and line.endswith(b"\n") for line in lines)
    reader = JournalReader()
    assert list(reader.events(lines)) == [START, *events]
    assert (reader.seq, reader.offset, reader.torn) == (len(events) + 1, len(b"".join(lines)), b"")
    assert JournalWriter(reader.seq, reader.digest).encode([START]) == journal(START, *events, START)[-1]
    assert JournalWriter().encode([START, *events]) == b"".join(lines)


def test_a_line_reads_as_the_documentation_shows_it_and_its_digest_seals_all_lines_before() -> None:
    moment = 1_800_000_000_005
    event = Event("allocate", moment, "a1Key", "-lamp-1", "AA,BB", "192.0.2.7", {"why": 'a "reason"', "n": 1})
    _, first, second = journal(START, event)
    time_text = format_time(moment)
    assert time_text[19:23] == ".005"
    detail = r'"{""why"":""a \""reason\"""",""n"":1}"'
    body = f'2,{time_text},allocate,a1Key,\'-lamp-1,"AA,BB",192.0.2.7,{detail}'
    assert second.decode() == body + second.decode()[-18:]
    digest = b""
    for line in (JOURNAL_HEADER, first.rpartition(b",")[0], second.rpartition(b",")[0]):
        digest = hashlib.sha256(digest + line).hexdigest()[:16].encode()
    assert second.endswith(b"," + digest + b"\n")


def test_what_is_no_utf8_is_written_as_a_question_mark_and_never_stops_the_line() -> None:
    line = JournalWriter().encode([Event("void", 1, "a", detail={"who": "\udc80"})])
    assert b"?" in line


if sys.platform != "win32":  # where a process cannot choose its time zone

    @pytest.mark.parametrize(
        ("zone", "shown"),
        [
            ("UTC", "2027-01-15T08:00:00.005+00:00"),
            ("CST-8", "2027-01-15T16:00:00.005+08:00"),
            ("NST3:30", "2027-01-15T04:30:00.005-03:30"),
            ("CET-1CEST,M3.5.0,M10.5.0/3", "2027-01-15T09:00:00.005+01:00"),
        ],
    )
    def test_a_time_is_read_back_in_every_time_zone_and_when_clocks_change(
        zone: str, shown: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clocks_change = 1_792_890_000_000  # on 2026-10-25 at 01:00 UTC
        caches = (certtool._second_as_text, format_time)
        for cache in caches:
            cache.cache_clear()
        try:
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            assert format_time(1_800_000_000_005) == shown
            moments = [1, 999, 1000, 1_800_000_000_123, *range(clocks_change - 7_200_000, clocks_change, 599_999)]
            moments += [moment + 7_200_000 for moment in moments]
            texts = [format_time(moment) for moment in moments]
            assert parse_times(texts) == moments
            assert len(set(texts)) == len(set(moments))
        finally:
            monkeypatch.undo()
            time.tzset()
            for cache in caches:
                cache.cache_clear()


def test_what_never_happened_has_no_time() -> None:
    assert format_time(0) == ""


@given(st.text("0123456789-:.+TZ ", max_size=32))
@example("2026-11-24T08:00:00+08:00")
@example("2026-11-24T08:00:00.000")
def test_any_other_text_is_no_time(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(parse_times([text])[0], int)


# -- a small store that can be damaged ---------------------------------------------------------------------------------


class Small(NamedTuple):
    """A store of a few certificates: its folder and journal, and the state at each length of the journal."""

    folder: Path
    journal: bytes
    states: Dict[int, Any]

    @property
    def path(self) -> Path:
        return self.folder / "journal.csv"


CERTIFICATES = [
    Credential("a1Key", "lamp-0001", "hush1", "hushP"),
    Credential("a1Key", "lamp-0002", "=hush2,", "hushP"),
    Credential("a1Key", "lamp-0003", 'hu"sh3', "hushP", device_id="DD"),
    Credential("b2Key", "lamp-0001", "hush4", "", "1048577"),
]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("template") / "store"
    opened = open_store(folder)
    service = opened.service
    steps: List[Callable[[], object]] = [
        lambda: None,
        lambda: import_files(service, upload(CERTIFICATES)),
        lambda: service.request("a1Key", "AA", STATION, 1_800_000_000_000),
        lambda: service.request("a1Key", "DD", STATION, 1_800_000_000_001),
        lambda: service.report("a1Key", "AA", BURN_SUCCEEDED, STATION, 1_800_000_000_002),
        lambda: service.request("a1Key", "AA", STATION, 1_800_000_000_003),
        lambda: service.report("a1Key", "DD", BURN_FAILED, STATION, 1_800_000_000_004),
        lambda: service.operate(RELEASE, "lamp-0001", "a1Key", 'a "scrap", =1', "grüße", True, 1_800_000_000_005),
        lambda: service.operate(MAKE_VOID, "lamp-0003", "a1Key", "lost", "me", False, 1_800_000_000_006),
        lambda: opened.store.append(Event("restore", 1_800_000_000_007, detail={"who": "me", "reason": "lost"})),
        lambda: service.reveal("lamp-0002", "a1Key", "me", 1_800_000_000_008),
    ]
    states = {}
    for step in steps:
        step()
        service.commit()
        states[(folder / "journal.csv").stat().st_size] = snapshot(opened.state)
    opened.store.close()
    return Small(folder, (folder / "journal.csv").read_bytes(), states)


@pytest.fixture
def small(template: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """A copy of the small store to damage, whose readers lose no time waiting for a writer."""
    monkeypatch.setattr(certtool, "TORN_SECONDS", 0.0)
    shutil.copytree(template.folder, tmp_path / "store")
    return template._replace(folder=tmp_path / "store")


def look(folder: Path) -> Dict[str, Any]:
    """All that can be seen of the files: bytes, and when they were last written to."""
    paths = [folder, *folder.rglob("*")]
    return {str(path): (path.is_file() and path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@contextlib.contextmanager
def nothing_changes(folder: Path) -> Iterator[None]:
    before = look(folder)
    yield
    assert look(folder) == before


def test_the_small_store_has_a_line_of_each_kind(small: Small) -> None:
    kinds = [line.split(b",")[2].decode() for line in small.journal.splitlines()[1:]]
    assert set(kinds) == KINDS
    assert len(small.states) == len(kinds)


def test_a_journal_cut_at_any_byte_is_the_state_before_the_torn_line_or_is_refused(small: Small) -> None:
    for size in range(len(small.journal) + 1):
        small.path.write_bytes(small.journal[:size])
        whole = small.journal.rfind(b"\n", 0, size) + 1
        torn = size - whole
        if whole not in small.states:
            for way in (read_store, open_store):
                with pytest.raises(StoreError, match="Put back the journal"):
                    way(small.folder)
            assert small.path.read_bytes() == small.journal[:size]
            continue
        with nothing_changes(small.folder):
            read = read_store(small.folder)
        assert snapshot(read.state) == small.states[whole]
        opened = open_store(small.folder)
        opened.store.close()
        assert snapshot(opened.state) == small.states[whole]
        assert small.path.read_bytes() == small.journal[:whole]
        side = small.folder / f"journal.torn-{whole}"
        for notes in (read.store.notes, opened.store.notes):
            assert [f"{torn} bytes" in note for note in notes if "half a line" in note] == [True] * bool(torn)
        if torn:
            assert side.read_bytes() == small.journal[whole:size]
            side.unlink()
        assert not side.exists()


def about_one(folder: Path) -> Opened:
    """Load what is about one name, as a query does."""
    return read_store(folder, "lamp-0003")


def test_a_journal_with_any_bit_flipped_is_refused_or_is_torn_at_its_very_end(small: Small) -> None:
    *_, before, _ = small.states
    for place in range(len(small.journal)):
        for bit in range(8):
            damaged = bytearray(small.journal)
            damaged[place] ^= 1 << bit
            small.path.write_bytes(damaged)
            ways = (read_store, about_one, open_store) if bit == place % 8 else (read_store,)
            if place == len(small.journal) - 1:
                read = read_store(small.folder)
                assert snapshot(read.state) == small.states[before]
                assert "half a line" in read.store.notes[0]
                continue
            for way in ways:
                with pytest.raises(StoreError, match=r"^journal\.csv line \d+ .*"):
                    way(small.folder)
            if way is open_store:
                assert small.path.read_bytes() == damaged
    assert files(small.folder).keys() == {"journal.csv", os.path.join("imports", "000001-identities.csv")}


def test_an_import_file_with_any_byte_changed_is_refused_by_name(small: Small) -> None:
    (path,) = (small.folder / "imports").iterdir()
    data = path.read_bytes()
    for place in range(len(data)):
        for value in {0, 0x0A, data[place] ^ 1, data[place] ^ 0x80} - {data[place]}:
            path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
            for way in (read_store, about_one):
                with pytest.raises(StoreError, match=r"000001-identities\.csv is not as it was imported"):
                    way(small.folder)
        path.write_bytes(data[:place])
        with pytest.raises(StoreError, match="is not as it was imported"):
            open_store(small.folder)
    path.write_bytes(data + b"x")
    with pytest.raises(StoreError, match="is not as it was imported"):
        read_store(small.folder)
    path.unlink()
    for way in (read_store, open_store):
        with pytest.raises(StoreError, match=r"000001-identities\.csv cannot be read .*: put it back"):
            way(small.folder)


DAMAGES: Dict[str, Callable[[bytes], bytes]] = {
    "line 4 dropped": lines_of(lambda lines: lines.pop(3)),
    "line 5 doubled": lines_of(lambda lines: lines.insert(4, lines[4])),
    "the last line doubled": lines_of(lambda lines: lines.append(lines[-1])),
    "lines 4 and 5 swapped": lines_of(lambda lines: lines.insert(3, lines.pop(4))),
    "the header dropped": lines_of(lambda lines: lines.pop(0)),
    "an empty line at the end": lambda data: data + b"\n",
    "an empty line in the middle": lines_of(lambda lines: lines.insert(4, b"\n")),
    "saved with CRLF": lambda data: data.replace(b"\n", b"\r\n"),
    "saved with CR": lambda data: data[:-1].replace(b"\n", b"\r") + b"\n",
    "saved with BOM": lambda data: b"\xef\xbb\xbf" + data,
    "saved as UTF-16": lambda data: data.decode().encode("utf-16") + b"\n",
    "saved by a spreadsheet": lambda data: data.replace(b"T", b" ", 1),
    "edited": lambda data: data.replace(b"DD", b"EE", 1),
    "zeros inside": lambda data: data[:400] + bytes(100) + data[500:],
    "zeros and a line end": lambda data: data + bytes(511) + b"\n",
    "another file": lambda data: b"DeviceName,DeviceSecret\nlamp-0001,hush\n" * bool(data),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_journal_that_was_changed_in_any_other_way_is_refused_and_left_alone(
    damage: Callable[[bytes], bytes], small: Small
) -> None:
    damaged = damage(small.journal)
    assert damaged != small.journal
    small.path.write_bytes(damaged)
    before = files(small.folder)
    for way in (read_store, open_store):
        with pytest.raises(StoreError, match=r"^journal\.csv line \d+ .*Nothing was changed\. Put back"):
            way(small.folder)
    assert files(small.folder) == before


def test_the_line_that_was_changed_is_named(small: Small) -> None:
    lines = small.journal.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        changed = line[:-20] + bytes([line[-20] ^ 1]) + line[-19:]
        small.path.write_bytes(b"".join(lines[: number - 1]) + changed + b"".join(lines[number:]))
        with pytest.raises(StoreError, match=rf"^journal\.csv line {number} "):
            read_store(small.folder)


def test_a_tail_of_zeros_that_a_power_cut_left_is_cut_and_kept_beside(small: Small) -> None:
    small.path.write_bytes(small.journal + bytes(512))
    opened = open_store(small.folder)
    opened.store.close()
    assert small.path.read_bytes() == small.journal
    assert (small.folder / f"journal.torn-{len(small.journal)}").read_bytes() == bytes(512)


def test_a_line_after_a_cut_tail_continues_the_chain(small: Small) -> None:
    small.path.write_bytes(small.journal[:-5])
    opened = open_store(small.folder)
    opened.service.request("b2Key", "NEW", STATION, 1_800_000_000_010)
    opened.service.commit()
    opened.store.close()
    assert snapshot(read_store(small.folder).state) == snapshot(opened.state)


def test_a_reader_waits_for_a_line_that_a_writer_is_just_writing(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    small.path.write_bytes(small.journal[:-5])
    naps = []

    def write_the_rest(seconds: float) -> None:
        naps.append(seconds)
        small.path.write_bytes(small.journal)

    monkeypatch.setattr(time, "sleep", write_the_rest)
    read = read_store(small.folder)
    assert (snapshot(read.state), read.store.notes, len(naps)) == (small.states[len(small.journal)], [], 1)


# -- lines whose digest is right ---------------------------------------------------------------------------------------


def sealed(small: Small, *bodies: str) -> bytes:
    """The small journal continued by lines that seal themselves, whatever they say."""
    data, digest = small.journal, small.journal[-17:-1].decode()
    for body in bodies:
        digest = chain_digest(digest, body.encode())
        data += f"{body},{digest}\n".encode()
    return data


NOW = "2026-11-24T08:00:00.000+00:00"
NEXT = 12  # the sequence number after the small journal's last
NOT_AN_EVENT = "is not an event"
NEWER = "was written by a newer certtool: use that one."
UNKNOWN = "names a certificate that no import holds"
WRONG_EVENTS = {
    f"{NEXT},{NOW},split,,,,,": NEWER,
    f"{NEXT},{NOW},split,,,,,{{}}": NEWER,
    f"{NEXT + 1},{NOW},allocate,a1Key,lamp-0001,AA,x,": NOT_AN_EVENT,
    f"x,{NOW},allocate,a1Key,lamp-0001,AA,x,": NOT_AN_EVENT,
    f"{NEXT},2026-11-24,allocate,a1Key,lamp-0001,AA,x,": NOT_AN_EVENT,
    f"{NEXT},yesterday,allocate,a1Key,lamp-0001,AA,x,": NOT_AN_EVENT,
    f"{NEXT},{NOW},allocate,a1Key,lamp-0001,AA,x": NOT_AN_EVENT,
    f"{NEXT},{NOW},allocate,a1Key,lamp-0001,AA,x,,": NOT_AN_EVENT,
    f'{NEXT},{NOW},allocate,a1Key,lamp-0001,"AA,x,': NOT_AN_EVENT,
    f"{NEXT},{NOW},allocate,a1Key,lamp-0001,AA,x,nonsense": NOT_AN_EVENT,
    f'{NEXT},{NOW},store,,,,,"{{""version"":1}}"': NOT_AN_EVENT,
    f"{NEXT},{NOW},written,a1Key,nobody00,AA,x,": UNKNOWN,
    f"{NEXT},{NOW},written,c3Key,lamp-0001,AA,x,": UNKNOWN,
    f"{NEXT},{NOW},import,,,,,": "the import at .* lacks its details",
}


@pytest.mark.parametrize("body", WRONG_EVENTS)
def test_a_line_that_is_sealed_but_makes_no_sense_is_refused_by_its_number(body: str, small: Small) -> None:
    small.path.write_bytes(sealed(small, body))
    with pytest.raises(StoreError, match=rf"^journal\.csv.*({WRONG_EVENTS[body]})"):
        read_store(small.folder)
    if "lacks its details" not in WRONG_EVENTS[body]:
        with pytest.raises(StoreError, match=f"line {NEXT + 1} "):
            read_store(small.folder)


ODD_DETAILS = [
    "import,,,,,[]",
    "import,,,,,5",
    'import,,,,,"{""file"":5,""rows"":1,""sha256"":"""",""batch"":""""}"',
    "allocate,a1Key,lamp-0001,AA,x,[]",
]


@pytest.mark.parametrize("event", ODD_DETAILS)
def test_a_detail_of_another_shape_is_refused_and_no_traceback(event: str, small: Small) -> None:
    small.path.write_bytes(sealed(small, f"{NEXT},{NOW},{event}"))
    with pytest.raises(StoreError, match=r"^journal\.csv"):
        read_store(small.folder)


def test_a_store_of_a_newer_format_is_refused_as_such(small: Small) -> None:
    small.path.write_bytes(b"".join(journal(START._replace(detail={"version": 2}))))
    for way in (read_store, open_store):
        with pytest.raises(StoreError, match="newer certtool"):
            way(small.folder)


def test_a_journal_must_begin_with_its_store_event(small: Small) -> None:
    small.path.write_bytes(b"".join(journal(Event("allocate", 1, "a1Key", "lamp-0001", "AA"))))
    with pytest.raises(StoreError, match="line 2 is not an event"):
        read_store(small.folder)


def test_an_empty_journal_is_refused_where_certificates_were_imported(small: Small) -> None:
    small.path.unlink()
    for way in (read_store, open_store):
        with pytest.raises(StoreError, match="Put back the journal"):
            way(small.folder)
    assert not small.path.exists()
    small.path.write_bytes(JOURNAL_HEADER)
    with pytest.raises(StoreError, match="Put back the journal"):
        open_store(small.folder)
