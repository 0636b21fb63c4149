"""What people import: each right file is read whatever wrote it, each wrong row is named by its line and not quoted."""

from __future__ import annotations

import codecs
import csv
import io
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import certtool
from certtool import COLUMNS, BadFile, Credential, IdentityFile, PlainRows, check_field, sniff_encoding
from tests.support import SAMPLE

HEADER = "ProductKey,DeviceName,DeviceSecret"
PLAIN = Credential("a1Key", "lamp-0001", "hush0001")
GOOD = "a1Key,lamp-0001,hush0001"

ENCODINGS: Dict[str, Callable[[str], bytes]] = {
    "UTF-8": lambda text: text.encode(),
    "UTF-8 with BOM": lambda text: text.encode("utf-8-sig"),
    "UTF-16 little endian": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "UTF-16 big endian": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "GB18030": lambda text: text.encode("gb18030"),
}


def identity_file(data: bytes, options: Optional[Mapping[str, str]] = None) -> IdentityFile:
    """Open a file at one go, as a server does in slices."""
    stream = io.BytesIO(data)
    sniffing = sniff_encoding(stream)
    while True:
        try:
            next(sniffing)
        except StopIteration as found:
            return IdentityFile(stream, found.value, options or {})


def rows_of(file: IdentityFile) -> List[Tuple[int, Any]]:
    """Return the rows of a file: line number, and the certificate or the reason against it."""
    return [row for block in file.blocks() for row in (block.rows() if isinstance(block, PlainRows) else block)]


def read(data: bytes, options: Optional[Mapping[str, str]] = None) -> List[Tuple[int, Any]]:
    """Open a file and return its rows."""
    return rows_of(identity_file(data, options))


def refusal(data: bytes, options: Optional[Mapping[str, str]] = None) -> Tuple[int, str]:
    """Return the line and the reason for which the file as a whole is refused."""
    with pytest.raises(BadFile) as refused:
        read(data, options)
    return refused.value.line, str(refused.value)


# -- right files -------------------------------------------------------------------------------------------------------


def test_the_sample_has_twenty_certificates_and_no_fault() -> None:
    file = identity_file(SAMPLE.read_bytes())
    rows = rows_of(file)
    assert [line for line, _ in rows] == list(range(2, 22))
    assert all(isinstance(row, Credential) for _, row in rows)
    assert file.ignored == []


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("separator", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_separator_and_line_end_is_read(encoding: str, separator: str, end: str) -> None:
    lines = [f"id,{HEADER},备注", f"1,{GOOD},一号灯", "", "3,a1Key,lamp-0002,hush0002,", f"4,{GOOD[:-1]} ,坏"]
    file = identity_file(ENCODINGS[encoding](end.join(lines).replace(",", separator)))
    first, second, third = rows_of(file)
    assert (first, second) == ((2, PLAIN), (4, PLAIN._replace(device_name="lamp-0002", device_secret="hush0002")))
    assert third[0] == 5
    assert "DeviceSecret" in str(third[1])
    assert file.ignored == ["id", "备注"]


@pytest.mark.parametrize(
    "header",
    [
        "DeviceName,DeviceSecret,ProductKey",
        "id,DeviceName,DeviceSecret,ProductKey,ProductSecret",
        "device_name, Device Secret ,PRODUCT-KEY",
        '"DeviceName","DeviceSecret","ProductKey"',
        "ProductID,DeviceID,ProductSecret,DeviceSecret,DeviceName,ProductKey",
        "\n\nDeviceName,DeviceSecret,ProductKey",
    ],
)
def test_columns_are_found_by_name_in_any_order_and_spelling(header: str) -> None:
    cells = {"productkey": "a1Key", "devicename": "lamp-0001", "devicesecret": "hush0001"}
    names = [name.strip('" ').lower() for name in header.strip().split(",")]
    row = ",".join(cells.get(name.replace("_", "").replace("-", "").replace(" ", ""), "") for name in names)
    assert read(f"{header}\n{row}\n".encode()) == [(2 + header.count("\n"), PLAIN)]


def test_all_six_columns_are_used() -> None:
    row = ("a1Key", "lamp-0001", "hush0001", "hushProduct", "1048577", "AA:BB")
    assert read(f"{','.join(COLUMNS)}\n{','.join(row)}\n".encode()) == [(2, Credential(*row))]


def test_options_fill_what_the_file_has_no_column_for() -> None:
    options = {"ProductKey": "a1Option", "ProductSecret": "hushOption", "ProductID": "77"}
    expected = Credential("a1Option", "lamp-0001", "hush0001", "hushOption", "77")
    assert read(b"DeviceName,DeviceSecret\nlamp-0001,hush0001\n", options) == [(2, expected)]


def test_a_column_of_the_file_wins_over_an_option_also_where_its_cell_is_empty() -> None:
    options = {"ProductKey": "a1Option", "ProductSecret": "hushOption"}
    data = f"{HEADER},ProductSecret\n{GOOD},\n,lamp-0002,hush0002,x\n".encode()
    assert read(data, options) == [(2, PLAIN), (3, "ProductKey is missing.")]


def test_a_quoted_cell_may_hold_separators_quotes_and_line_ends() -> None:
    note = '"red, ""old"",\r\nfrom\nshelf 3"'
    data = f'{HEADER},note\n{GOOD},{note}\n\n"a1Key","lamp-0002","hu,""sh",\n'.encode()
    assert read(data) == [(2, PLAIN), (6, PLAIN._replace(device_name="lamp-0002", device_secret='hu,"sh'))]


@pytest.mark.parametrize("blank", ["", "   ", ",,", '"","",""', " , ,\t"])
def test_blank_lines_are_skipped_but_counted(blank: str) -> None:
    assert read(f"{HEADER}\n{blank}\n{GOOD}\n{blank}".encode()) == [(3, PLAIN)]


def test_every_character_that_the_contract_allows_is_read() -> None:
    printable = "".join(map(chr, range(33, 127)))
    rows = [
        Credential(printable[:60], "-_@.:", printable[34:], printable[:1], printable[30:], printable[50:]),
        Credential("k", "ABCD", "s" * 64, "", "", "'"),
        Credential("=1+1", "z" * 32, "-", "@", "0", "+"),
    ]
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *rows])
    assert read(text.getvalue().encode()) == list(enumerate(rows, 2))


def test_a_header_alone_has_no_rows() -> None:
    assert read(HEADER.encode()) == []


# -- wrong rows --------------------------------------------------------------------------------------------------------

FULL = ",".join(COLUMNS)
SCIENTIFIC = "rewritten by a spreadsheet"
UNMATCHED = "A quotation mark is not closed, or text follows one that is."
WRONG_ROWS = {
    ",lamp-0002,hush,,,": "ProductKey is missing.",
    "a1Key,,hush,,,": "DeviceName is missing.",
    "a1Key,lamp-0002,,hush,,": "DeviceSecret is missing.",
    "a1Key,abc,hush,,,": "DeviceName is not 4-32 characters of A-Z a-z 0-9 - _ @ . :",
    f"a1Key,{'n' * 33},hush,,,": "DeviceName is not 4-32",
    "a1Key,lamp 0002,hush,,,": "DeviceName is not 4-32",
    "a1Key,lämp-0002,hush,,,": "DeviceName is not 4-32",
    "a1Key,lamp/0002,hush,,,": "DeviceName is not 4-32",
    "a1Key, lamp-0002,hush,,,": "DeviceName is not 4-32",
    "a1 Key,lamp-0002,hush,,,": "ProductKey is not 1-64 printable ASCII characters without white space.",
    f"a1Key,lamp-0002,hush{'x' * 61},,,": "DeviceSecret is not 1-64",
    "a1Key,lamp-0002,hush\x7f,,,": "DeviceSecret is not 1-64",
    "a1Key,lamp-0002,hush\x00,,,": "DeviceSecret is not 1-64",
    "a1Key,lamp-0002,hush\ufeff,,,": "DeviceSecret is not 1-64",
    "a1Key,lamp-0002,hush秘密,,,": "DeviceSecret is not 1-64",
    "a1Key,lamp-0002,hush,hush\u00a0,,": "ProductSecret is not 1-64",
    "a1Key,lamp-0002,hush,,10 48,": "ProductID is not 1-64",
    "a1Key,lamp-0002,hush,,,AA BB": "DeviceID is not 1-64",
    '"a1\nKey",lamp-0002,hush,,,': "ProductKey is not 1-64",
    "1.23E+15,lamp-0002,hush,,,": SCIENTIFIC,
    "a1Key,1.23E+15,hush,,,": SCIENTIFIC,
    "a1Key,1E+15,hush,,,": SCIENTIFIC,
    "a1Key,lamp-0002,1.23457E+14,,,": SCIENTIFIC,
    "a1Key,lamp-0002,4E-05,,,": SCIENTIFIC,
    "a1Key,lamp-0002,1.23e+15,,,": SCIENTIFIC,
    "a1Key,lamp-0002,1.23E15,,,": SCIENTIFIC,
    "a1Key,lamp-0002,#####,,,": SCIENTIFIC,
    "a1Key,lamp-0002,hush,#NAME?,,": SCIENTIFIC,
    "a1Key,lamp-0002,hush,,#N/A,": SCIENTIFIC,
    "a1Key,lamp-0002,hush,,,#DIV/0!": SCIENTIFIC,
    "a1Key,lamp-0002,hush,,": "The row has 5 cells where the header line has 6.",
    "a1Key,lamp-0002,hush,,,,": "The row has 7 cells where the header line has 6.",
    "hush": "The row has 1 cells where the header line has 6.",
    "a1Key;lamp-0002;hush;;;": "The row has 1 cells where the header line has 6.",
    '"a1Key",lamp-0002,"hush,,,': UNMATCHED,
    'a1Key,lamp-0002,hu"sh,,,': UNMATCHED,
    'a1Key,lamp-0002,"hu"sh,,,': UNMATCHED,
    'a1Key,lamp-0002,"hush" ,,,': UNMATCHED,
}


@pytest.mark.parametrize("row", WRONG_ROWS)
@pytest.mark.parametrize("characters", [certtool.IMPORT_SLICE, 1], ids=["all at once", "alone"])
def test_a_wrong_row_is_named_by_its_line_with_the_reason_and_hides_no_row_after_it(
    row: str, characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certtool, "IMPORT_SLICE", characters)
    lines = [FULL, f"{GOOD},,,", row, "", f"{GOOD},,,", "a1Key,abc,hush,,,"]
    found = read("\n".join(lines).encode())
    after = len("\n".join(lines[:4]).split("\n")) + 1
    assert [line for line, _ in found] == [2, 3, after, after + 1]
    assert [found[0][1], found[2][1]] == [PLAIN, PLAIN]
    assert WRONG_ROWS[row] in found[1][1]
    assert "hush" not in found[1][1], "a message never holds a secret"
    assert "DeviceName" in found[3][1]


@pytest.mark.parametrize("cell", ["1,23E+15", "-1.23E+15", "#REF!", "#VALUE!", "#NUM!", "#NULL!"])
def test_a_number_that_a_spreadsheet_mangled_in_other_ways_is_refused(cell: str) -> None:
    ((_, reason),) = read(f"ProductKey;DeviceName;DeviceSecret\na1Key;lamp-0001;{cell}\n".encode())
    assert SCIENTIFIC in str(reason)


@pytest.mark.parametrize("cell", ["1.2E+15", "4E-05", "1e+15", "4.1e-05", "1.23E15", "####", "#NAME?", "#DIV/0!"])
def test_a_mangled_cell_is_refused_among_rows_that_are_read_many_at_once(
    cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certtool, "IMPORT_SLICE", 1)
    for separator in ",;\t":
        for row in (f"{cell},lamp-0002,hush,", f"a1Key,lamp-0002,{cell},", f"a1Key,lamp-0002,hush,{cell}"):
            lines = [f"{HEADER},ProductSecret", f"{GOOD},", row]
            blocks = list(identity_file("\r\n".join([*lines, ""]).replace(",", separator).encode()).blocks())
            assert isinstance(blocks[0], PlainRows)
            assert blocks[0].rows() == [(2, PLAIN)]
            assert isinstance(blocks[1], list)
            ((line, reason),) = blocks[1]
            assert line == 3
            assert SCIENTIFIC in str(reason)


def test_what_only_looks_like_a_mangled_number_is_read() -> None:
    rows = [
        Credential("12E+1x", "1E5E", "E+15", "1.5E+3", "#N/A1", "1.E+15"),
        Credential("1E15", "1e-05", "1e15", "1.5e15", "#1", "1.5E1"),
    ]
    for row in rows:
        assert read(f"{FULL}\n{','.join(row)}\n".encode()) == [(2, row)]


def test_an_unclosed_quote_is_named_where_its_row_starts_however_many_rows_follow() -> None:
    rows = [f"a1Key,name{number:04d},hush{number}" for number in range(3000)]
    rows[1000] = 'a1Key,name1000,"hush1000'
    found = read("\n".join([HEADER, *rows]).encode())
    assert len(found) == 3000
    assert [(line, row) for line, row in found if isinstance(row, str)] == [(1002, UNMATCHED)]


def test_two_rows_with_a_stray_quote_each_are_two_errors() -> None:
    rows = ['a1Key,lamp-0002,hu"sh', GOOD, 'a1Key,lamp-0003,"hush', GOOD]
    assert read("\n".join([HEADER, *rows]).encode()) == [(2, UNMATCHED), (3, PLAIN), (4, UNMATCHED), (5, PLAIN)]


def test_a_stray_quote_in_a_column_that_is_not_used_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certtool, "IMPORT_SLICE", 1)
    for end in ("", "\n", f"\n{GOOD},\n"):
        assert read(f'{HEADER},note\n{GOOD},"x{end}'.encode())[0] == (2, UNMATCHED)


@pytest.mark.parametrize("quote", ['"', ""], ids=["quoted", "plain"])
@pytest.mark.parametrize("separator", certtool.SEPARATORS)
def test_a_huge_cell_is_refused_and_hides_no_row_after_it(separator: str, quote: str) -> None:
    data = f"{HEADER},note\n{GOOD},{quote}{'x' * 1_000_000}{quote}\n{GOOD},\n".replace(",", separator).encode()
    (first, refused), second = read(data)
    assert first == 2
    assert isinstance(refused, str)
    assert second == (3, PLAIN)


@pytest.mark.parametrize("end", ["\r\n", "\r", "\r\n\n"], ids=["CRLF", "CR", "CRLF and an empty line"])
@pytest.mark.parametrize("steps", [1, 2], ids=["a long line", "a line that is too long"])
def test_a_line_end_of_which_a_step_reads_the_first_half_ends_one_line(steps: int, end: str) -> None:
    start = f"{HEADER},note\n{GOOD},"
    long = "x" * (certtool.IMPORT_SLICE + steps * certtool.LINE_LENGTH - len(start) - 1)
    rows = read(f"{start}{long}{end}{GOOD},{end}{GOOD}\n".encode())
    lines = 2 if end.endswith("\n\n") else 1
    assert [line for line, _ in rows] == [2, 2 + lines, 2 + 2 * lines]
    assert [isinstance(row, str) for _, row in rows] == [steps == 2, False, True]


class KeptOpen(io.BytesIO):
    """A file that tells how far it was read, also when its reader is gone."""

    def close(self) -> None:
        """Stay open."""


MOST_AT_ONCE = 2 * (certtool.IMPORT_SLICE + certtool.LINE_LENGTH)  # bytes of a file that one step may read


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{GOOD},{'x' * 5_000_000}", "The row has "),
        (",".join([GOOD, *["x"] * 1_000_000]), "The row has "),
        ('a1Key,name0001,"hush1,\n' * 400_000 + GOOD, UNMATCHED),
        ('"\n' + ("x" * 60_000 + "\n") * 500 + GOOD, UNMATCHED),
    ],
    ids=["a huge cell", "a million cells", "a stray quote in each row", "a quote before huge lines"],
)
def test_a_file_made_to_take_long_is_read_in_steps_that_devices_can_wait_for(body: str, reason: str) -> None:
    data = io.BytesIO(f"{HEADER},note\n{body},\n{GOOD},\n".encode())
    rows, read = [], [0]  # bytes, at the end of each step
    file = IdentityFile(data, "utf-8", {})
    for block in file.blocks():
        read.append(data.tell())
        assert isinstance(block, PlainRows) or len(block) <= certtool.ROWS_SLICE
        rows += block.rows() if isinstance(block, PlainRows) else block
    assert max(end - start for start, end in zip(read, read[1:])) <= MOST_AT_ONCE, "meanwhile no device is answered"
    assert rows[-1] == (body.count("\n") + 3, PLAIN)
    assert rows[0][0] == 2
    assert str(rows[0][1]).startswith(reason)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("\n" * 3_000_000 + f"{HEADER}\n{GOOD}\n", "The file is empty"),
        (" " * 10_000_000 + f"{HEADER}\n{GOOD}\n", "more than 1,000 columns"),
        ("a," * 20_000 + f"{HEADER}\n", "more than 1,000 columns"),
    ],
    ids=["empty lines", "a line of spaces", "very many columns"],
)
def test_a_file_whose_first_line_takes_long_to_find_or_to_read_is_refused_at_once(data: str, message: str) -> None:
    stream = KeptOpen(data.encode())
    with pytest.raises(BadFile, match=message):
        IdentityFile(stream, "utf-8-sig", {})
    assert stream.tell() <= MOST_AT_ONCE


def test_the_line_of_wrong_bytes_is_looked_for_in_steps() -> None:
    data = f"{HEADER}\r\n".encode() + b"a1Key,lamp-0001,hush0001\r\n" * 100_000 + b"\xff"
    steps: List[None] = []
    with pytest.raises(BadFile) as refused:
        steps.extend(sniff_encoding(io.BytesIO(data)))
    assert refused.value.line == 100_002
    assert len(steps) >= 4 * (len(data) // certtool.FILE_PIECE)


def test_no_value_stands_in_a_reason_of_check_field() -> None:
    for column in COLUMNS:
        for value in ("hush hush", "hush" * 17, "hush\x00", "geheim\u00e9"):
            reason = check_field(column, value)
            assert reason.startswith(column)
            assert value not in reason


# -- wrong files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "line", "message"),
    [
        (b"", 1, "The file is empty"),
        (b"\n\r\n \n", 1, "The file is empty"),
        (b"hush\n", 1, "there is none for ProductKey (or --product-key), DeviceName, DeviceSecret"),
        (b"a1Key,lamp-0001,hush0001\n", 1, "The first line must name the columns"),
        (b"\nDeviceName,DeviceSecret\n", 2, "there is none for ProductKey (or --product-key)."),
        (b"ProductKey,DeviceName\n", 1, "there is none for DeviceSecret."),
        (b"ProductKey,DeviceSecret\n", 1, "there is none for DeviceName."),
        (b"ProductKey,DeviceName,DeviceSecret,device_name\n", 1, "names DeviceName twice"),
        (b"ProductKey,DeviceName,DeviceSecret,ProductID,Product ID\n", 1, "names ProductID twice"),
        (b'ProductKey,DeviceName,"DeviceSecret\n', 1, UNMATCHED),
        (b'\nProductKey;DeviceName;DeviceSecret;"note\na;b;hush;n\n', 2, UNMATCHED),
        (b"ProductKey\xef\xbb\xbf,DeviceName,DeviceSecret\n", 1, "there is none for ProductKey"),
        (b"PK\x03\x04\x14\x00\x06\x00", 1, "This is a spreadsheet, not a CSV file"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", 1, "This is a spreadsheet, not a CSV file"),
        (b"ProductKey,DeviceName,DeviceSecret\na,b,c\na,\xff,c\n", 3, "neither UTF-8, UTF-16 with BOM nor GB18030"),
        ("ProductKey,DeviceName,DeviceSecret\n灯,b,c\na,".encode() + b"\xff,c\n", 3, "neither UTF-8"),
        ("ProductKey,DeviceName,DeviceSecret\r\n灯,b,c\r\ra,b,".encode() + b"\xe7", 4, "neither UTF-8"),
        (b"ProductKey,DeviceName,DeviceSecret\ra,b,c\r\xff", 3, "neither UTF-8"),
        (codecs.BOM_UTF16_LE + b"P\x00r", 1, "neither UTF-8"),
        (codecs.BOM_UTF16_BE + b"\xd8\x00\x00P", 1, "neither UTF-8"),
        ("\nProductKey,DeviceName,DeviceSecret\n".encode("utf-16-be"), 1, "neither UTF-8"),
    ],
)
def test_what_is_no_identity_file_is_refused_with_the_line_that_shows_it(
    data: bytes, line: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for piece in (certtool.FILE_PIECE, 1, 3):
        monkeypatch.setattr(certtool, "FILE_PIECE", piece)
        where, reason = refusal(data)
        assert where == line
        assert message in reason
        assert "hush" not in reason


def test_the_options_that_could_fill_a_column_are_named_only_where_they_can() -> None:
    _, reason = refusal(b"DeviceSecret\n", {"ProductKey": "a1Key"})
    assert reason.endswith("there is none for DeviceName.")


def test_a_column_that_is_not_used_may_have_a_quotation_mark_in_its_name() -> None:
    assert read(f'{HEADER},size 5"\n{GOOD},x\n'.encode()) == [(2, PLAIN)]


def test_a_column_whose_name_starts_with_pk_does_not_make_a_file_a_spreadsheet() -> None:
    assert read(b"PKI,DeviceName,DeviceSecret\n,lamp-0001,hush0001\n", {"ProductKey": "a1Key"}) == [(2, PLAIN)]


# -- any file ----------------------------------------------------------------------------------------------------------

PRINTABLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
DEVICE_NAMES = st.text("AZaz09-_@.:", min_size=4, max_size=32)
CELLS = [PRINTABLE, DEVICE_NAMES, PRINTABLE, *[st.just("") | PRINTABLE] * 3]
CREDENTIALS = st.builds(Credential, *CELLS).filter(lambda row: not any(map(check_field, COLUMNS, row)))
NOTES = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), max_size=20)


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(CREDENTIALS, NOTES), max_size=5),
    order=st.permutations(range(7)),
    encoding=st.sampled_from(sorted(ENCODINGS)),
    delimiter=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    quote_all=st.booleans(),
)
def test_what_a_csv_writer_wrote_is_read_back_the_same(
    rows: Sequence[Tuple[Credential, str]],
    order: Sequence[int],
    encoding: str,
    delimiter: str,
    end: str,
    quote_all: bool,
) -> None:
    text = io.StringIO()
    quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
    for row in [(*COLUMNS, "备注"), *((*credential, note) for credential, note in rows)]:
        cells = row if quote_all else [*row[:-1], row[-1].replace("\r", "").replace("\n", "")]
        writer.writerow([cells[place] for place in order])
    found = read(ENCODINGS[encoding](text.getvalue()))
    assert [row for _, row in found] == [credential for credential, _ in rows]


PIECES = st.sampled_from(
    [
        GOOD,
        GOOD,
        HEADER,
        *',;\t "\n\r\0\x1c\x85\u2028\ufeffé灯',
        '""',
        "\r\n",
        "E+15",
        "1.2E+15",
        "#N/A",
        "lamp",
        "x" * 65,
    ]
)
TEXTS = st.lists(PIECES, max_size=30).map("".join)


@given(st.binary(max_size=60) | TEXTS.map(str.encode) | TEXTS.map(lambda text: f"{HEADER}\n{text}".encode()))
@example(b"DeviceName,DeviceSecret\nlamp,a\r")
@example(b'DeviceName;DeviceSecret;"')
def test_any_bytes_are_read_or_refused_and_the_short_way_agrees_with_the_long_one(data: bytes) -> None:
    results: List[Any] = []
    for long_way, characters, piece in ((True, 1 << 16, 1), (False, 1 << 16, 1 << 16), (False, 20, 5), (False, 1, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(certtool, "IMPORT_SLICE", characters)
            patch.setattr(certtool, "FILE_PIECE", piece)
            try:
                file = identity_file(data, {"ProductKey": "a1Key"})
                if long_way:
                    file._plain = lambda text: None
                results.append(rows_of(file))
            except BadFile as refused:
                results.append((refused.line, str(refused)))
    assert results == [results[0]] * len(results)


@given(TEXTS)
def test_the_lines_of_the_rows_are_those_that_an_editor_shows(text: str) -> None:
    physical = io.StringIO(f"{HEADER}\n{text}", newline="").readlines()
    lines: Dict[int, str] = dict(enumerate(physical, 1))
    found = read(f"{HEADER}\n{text}".encode())
    assert [line for line, _ in found] == sorted({line for line, _ in found})
    for line, row in found:
        if isinstance(row, Credential):
            assert row.device_name in lines[line]
