"""The commands as a user runs them: what they print, how they end, and one clear sentence where they refuse."""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import io
import itertools
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Sequence, Tuple

import pytest

import certtool as program
from certtool import Refused
from tests import identities
from tests.pages import PageClient
from tests.stores import RAISE, Disk
from tests.support import CERTTOOL, SAMPLE, RunCerttool, Server, StartServer, child_env, listed, no_traceback

WIFI, BLUETOOTH = "a1SampleWf0", "a1SampleBt0"
COLUMNS = ["DeviceName", "ProductKey", "ProductID", "Batch", "Status", "DeviceID", "Station"]
COLUMNS += ["AllocatedAt", "WrittenAt", "CRC32"]
BARE = ("-I", "-S", "-B")  # for a copy, which is not the program whose coverage is measured
HEADER = "ProductKey,DeviceName,DeviceSecret\n"


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """An identity file with two good rows, and bad ones in lines 3, 4 and 6."""
    path = tmp_path / "bad.csv"
    path.write_text(HEADER + "a1X,good01,s1\na1X,good 02,s2\na1X,good03\na1X,good04,s4\na1X,good01,other\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def once_used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("used") / "store"
    running = Server("--import", str(SAMPLE), store=store)
    for device_id, actions in (("MAC-A", (0,)), ("MAC-W", (0, 1)), ("MAC-F", (0, 2)), ("=cmd|'/c calc'!A1", (0,))):
        for action in actions:
            assert running.report(WIFI, device_id, action)[0] == 200
    assert running.request(BLUETOOTH, "MAC-A")[0] == 200
    assert running.stop() == 0
    return store


@pytest.fixture
def used(once_used: Path, store: Path) -> Path:
    """A store with certificates in each state, and no server on it any more."""
    return Path(shutil.copytree(once_used, store))


def sentence(text: str) -> str:
    """Return the one line of stderr, without the program's name."""
    [line] = text.splitlines()
    assert line.startswith("certtool: "), line
    return line[len("certtool: ") :]


def unharmed(store: Path) -> Dict[str, bytes]:
    """All that a store holds, to compare."""
    return {str(path): path.read_bytes() for path in store.rglob("*") if path.is_file()}


# -- import ------------------------------------------------------------------------------------------------------------


def test_an_import_says_what_it_did(certtool: RunCerttool, store: Path) -> None:
    first = certtool("import", SAMPLE, "--data", store)
    assert first.stdout == "20 rows read: 20 imported, 0 in the store already, 0 rejected.\n"
    assert "A new, empty store was made" in sentence(first.stderr)
    again = certtool("import", SAMPLE, "--data", store)
    assert again.stdout == "20 rows read: 0 imported, 20 in the store already, 0 rejected.\n"
    assert again.stderr == ""


def test_an_import_with_bad_rows_lists_each_and_imports_nothing(certtool: RunCerttool, store: Path, bad: Path) -> None:
    done = certtool("import", bad, SAMPLE, "--data", store, ok=1)
    told = done.stderr.splitlines()[1:]
    assert [text.split(" ")[0] for text in told] == ["bad.csv:3:", "bad.csv:4:", "bad.csv:6:", "certtool:"]
    assert told[-1] == "certtool: Nothing was imported: mend the rows, or import the good ones with --skip-bad."
    assert listed_nothing(certtool, store)


def listed_nothing(certtool: RunCerttool, store: Path) -> bool:
    return certtool("query", "--data", store, "--format", "json", ok=1).stdout == "[]\n"


def test_the_good_rows_are_imported_when_the_bad_ones_may_be_skipped(
    certtool: RunCerttool, store: Path, bad: Path
) -> None:
    report = json.loads(certtool("import", bad, "--skip-bad", "--json", "--data", store).stdout)
    assert (report["read"], report["imported"], report["duplicates"], report["rejected"]) == (5, 2, 0, 3)
    assert [row["DeviceName"] for row in listed(certtool, store)] == ["good01", "good04"]


def test_the_report_as_json_is_one_object_also_when_it_refuses(certtool: RunCerttool, store: Path, bad: Path) -> None:
    done = certtool("import", bad, "--json", "--data", store, ok=1)
    report = json.loads(done.stdout)
    assert {"read", "imported", "duplicates", "rejected", "errors"} <= set(report)
    assert (report["read"], report["imported"], report["rejected"]) == (5, 0, 3)
    assert [set(error) for error in report["errors"]] == [{"file", "line", "message"}] * 3
    assert [(error["file"], error["line"]) for error in report["errors"]] == [("bad.csv", n) for n in (3, 4, 6)]
    done = certtool("import", "no.csv", "--json", "--data", store, ok=1)
    missing_file = json.loads(done.stdout)
    assert (missing_file["imported"], missing_file["ok"], len(missing_file["errors"])) == (0, False, 1)
    assert (missing_file["errors"][0]["file"], missing_file["errors"][0]["line"]) == ("", 0)
    assert done.stderr == f"certtool: {missing_file['errors'][0]['message']}\n"
    assert "no.csv cannot be read" in done.stderr


def test_a_file_without_any_certificate_is_not_skipped_as_a_bad_row(
    certtool: RunCerttool, store: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.csv").write_text("part,amount\nscrew,7\n", encoding="utf-8")
    done = certtool("import", SAMPLE, tmp_path / "other.csv", "--skip-bad", "--data", store, ok=1)
    assert "other.csv:1: The first line must name the columns" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("certtool: Nothing was imported: leave out, or mend, the file")
    assert listed_nothing(certtool, store)


@pytest.mark.parametrize(("options", "code"), [([], 1), (["--skip-bad"], 0)])
def test_a_dry_run_ends_as_the_import_would_and_changes_nothing(
    options: Sequence[str], code: int, certtool: RunCerttool, store: Path, bad: Path, tmp_path: Path
) -> None:
    for folder in (tmp_path / "none yet", store):
        if folder == store:
            certtool("import", SAMPLE, "--data", store)
        before = unharmed(folder)
        dry = json.loads(certtool("import", bad, *options, "--dry-run", "--json", "--data", folder, ok=code).stdout)
        assert unharmed(folder) == before
        assert folder.exists() == (folder == store)
    real = json.loads(certtool("import", bad, *options, "--json", "--data", store, ok=code).stdout)
    assert {**dry, "dry_run": False} == real
    assert "would be imported" in certtool("import", SAMPLE, "--dry-run", "--data", tmp_path / "none yet").stdout


def test_several_files_are_imported_together_or_not_at_all(
    certtool: RunCerttool, store: Path, tmp_path: Path, bad: Path
) -> None:
    files = [identities.write(tmp_path / f"{n}.csv", 5, first=5 * n) for n in range(3)]
    certtool("import", *files, bad, "--data", store, ok=1)
    certtool("import", *files, tmp_path / "missing.csv", "--data", store, ok=1)
    assert listed_nothing(certtool, store)
    assert "15 imported" in certtool("import", *files, "--data", store).stdout
    assert [row["Batch"] for row in listed(certtool, store)] == ["0"] * 5 + ["1"] * 5 + ["2"] * 5


def test_how_far_an_import_is_follows_its_rows_also_where_they_are_read_one_by_one(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Progress(program._ProgressLine):
        def __call__(self, what: str, done: int, total: int) -> None:
            if what == "importing":
                shown.append(done / total)

    quoted = tmp_path / "quoted.csv"
    quoted.write_text(HEADER + "".join(f'"a1X","lamp{n:06}","secret"\n' for n in range(20_000)), "utf-8")
    plain = identities.write(tmp_path / "plain.csv", 1000)
    monkeypatch.setattr(program, "_ProgressLine", Progress)
    for where in ("new", "in the store already"):
        shown: List[float] = []
        assert program.main(["import", str(quoted), str(plain), "--data", str(store)]) == 0
        assert shown == sorted(shown)
        assert shown[-1] == 1
        if where == "new":
            assert sum(part < 1 for part in shown) > 20_000 / program.ROWS_SLICE, "each step is a part of the way"


def test_a_line_of_progress_leaves_nothing_of_a_longer_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(program, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    progress = program._ProgressLine()
    for what in ("reading the journal", "importing"):
        progress(what, 1, 2)
    progress.done()
    width = len("reading the journal:  50% ")
    assert [len(shown) for shown in capsys.readouterr().err.split("\r")] == [0, width, width, width, 0]


def test_what_a_file_lacks_may_come_from_options(certtool: RunCerttool, store: Path, tmp_path: Path) -> None:
    path = tmp_path / "names.csv"
    path.write_text("Device Name;device_secret;note\nlamp-1;s3cret;x\n", encoding="utf-8")
    options = ("--product-key", "a1X", "--product-secret", "PS", "--product-id", "77", "--batch", "June")
    done = certtool("import", path, *options, "--data", store)
    assert "Columns not used: note.\n" in done.stdout
    [row] = listed(certtool, store, "--show-secrets")
    found = [row[c] for c in ("ProductKey", "ProductSecret", "ProductID", "Batch", "DeviceSecret")]
    assert found == ["a1X", "PS", "77", "June", "s3cret"]


def test_a_file_that_cannot_be_read_is_named(certtool: RunCerttool, store: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    paths = [tmp_path / "missing.csv", tmp_path / "folder.csv"]
    if os.path.exists("/proc/self/mem"):
        paths.append(Path("/proc/self/mem"))  # which not even root reads from its start
    for path in paths:
        refused = sentence(certtool("import", path, "--data", store, ok=1).stderr)
        assert re.match(rf"{re.escape(str(path))} cannot be read \(.+\): check the name", refused)
    assert not store.exists()


@pytest.mark.skipif(not os.path.exists("/dev/stdin"), reason="this system has no name for what is piped in")
def test_an_identity_file_may_come_through_a_pipe(certtool: RunCerttool, store: Path) -> None:
    piped = certtool("import", "/dev/stdin", "--data", store, stdin=SAMPLE.read_text("utf-8"))
    assert piped.stdout.startswith("20 rows read: 20 imported")


@pytest.mark.parametrize("size", [2, 4, 9])
def test_what_is_handed_to_a_server_is_never_more_or_less_than_was_said(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "FILE_PIECE", 2)
    sent: List[bytes] = []
    with pytest.raises(Refused, match="was changed while it was read"):
        sent.extend(program._contents(program.Upload("a.csv", lambda: io.BytesIO(b"seven b"), size)))
    assert len(b"".join(sent)) == min(size, 7)
    assert b"".join(program._contents(program.Upload.of("a.csv", b"seven b"))) == b"seven b"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "The file is empty"),
        (b"\xef\xbb\xbf \r\n", "The file is empty"),
        ("ProductKey,DeviceName,DeviceSecret\n".encode("utf-16-le"), "The text is neither UTF-8"),
        (b"PK\x03\x04zip", "save it as CSV"),
        (b"ProductKey,DeviceName,DeviceSecret\n", "only a header line"),
        (b"\xff\x00\xff" * 9, "The text is neither UTF-8"),
    ],
)
def test_a_file_that_is_no_identity_file_is_refused(
    content: bytes, said: str, certtool: RunCerttool, store: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    assert said in certtool("import", tmp_path / "x.csv", "--data", store, ok=1).stderr
    assert said in certtool("import", tmp_path / "x.csv", "--data", store, "--skip-bad", ok=1).stderr


def test_an_import_leaves_no_file_open(certtool: RunCerttool, store: Path, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a line,with no known column\n", encoding="utf-8")
    for file, ok in ((SAMPLE, 0), (SAMPLE, 0), (tmp_path / "x.csv", 1)):  # new, in the store already, refused
        done = certtool("import", file, "--data", store, ok=ok, python=[sys.executable, *BARE, "-X", "dev"])
        assert "ResourceWarning" not in done.stderr


def test_chinese_names_and_reasons_work_on_any_console(certtool: RunCerttool, tmp_path: Path) -> None:
    path = Path(shutil.copy(SAMPLE, tmp_path / "一月 批次.csv"))
    folder = tmp_path / "仓库"
    for encoding in ("gbk", "ascii"):
        env = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
        done = run_bytes(["import", str(path), "--data", str(folder)], env)
        assert b"20 rows read" in done.stdout
        name = listed(certtool, folder)[0]["DeviceName"]
        run_bytes(["void", name, "--reason", "标签 é 😀 脱落", "--data", str(folder)], env)
        for style in ("table", "csv", "json"):
            done = run_bytes(["query", name, "--format", style, "--data", str(folder)], env)
            shown = json.dumps("一月 批次").encode() if style == "json" else "一月 批次".encode(encoding, "replace")
            assert shown in done.stdout
    assert [row["Batch"] for row in listed(certtool, folder, "--batch", "一月 批次")] == ["一月 批次"] * 20
    assert "标签 é 😀 脱落" in (folder / "journal.csv").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="no file can be named so there")
def test_no_name_from_a_file_commands_the_terminal(certtool: RunCerttool, store: Path, tmp_path: Path) -> None:
    evil = "lot\x1b]0;X\x07\x9b2J"
    path = tmp_path / f"{evil}.csv"
    path.write_text(f"{HEADER[:-1]},{evil}\na1X,good01,s1,\na1X,bad,s2,\n", "utf-8")
    missing = tmp_path / f"{evil}.none"
    shown = [certtool("import", path, "--skip-bad", "--data", store), certtool("query", "--data", store)]
    shown.append(certtool("import", missing, "--data", store, ok=1))
    for done in shown:
        assert (done.stdout + done.stderr).replace("\n", "").isprintable()
        assert "lot?]0;X??2J" in done.stdout + done.stderr
    assert f",{evil}," in certtool("query", "--format", "csv", "--data", store).stdout, "data stays as it is"


def run_bytes(arguments: Sequence[str], env: Dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [sys.executable, str(CERTTOOL), *arguments], capture_output=True, env=child_env(**env), check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    return done


# -- query -------------------------------------------------------------------------------------------------------------


def test_query_lists_everything_in_the_order_of_import(certtool: RunCerttool, used: Path) -> None:
    rows = listed(certtool, used)
    assert [list(row) for row in rows] == [COLUMNS] * 20
    with open(SAMPLE, encoding="utf-8", newline="") as file:
        sample = list(csv.DictReader(file))
    assert [row["DeviceName"] for row in rows] == [row["DeviceName"] for row in sample]
    for row, bought in zip(rows, sample):
        payload = "".join(bought[c] for c in ("ProductKey", "DeviceName", "DeviceSecret", "ProductSecret", "ProductID"))
        assert row["CRC32"] == f"{zlib.crc32(payload.encode()):08X}"
    moment = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d"
    assert all(bool(re.fullmatch(moment, row["AllocatedAt"])) == (row["Status"] != "Unallocated") for row in rows)
    assert all(bool(re.fullmatch(moment, row["WrittenAt"])) == (row["Status"] == "Written") for row in rows)
    assert {row["Station"] for row in rows if row["AllocatedAt"]} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("filters", "device_ids"),
    [
        (["--device-id", "MAC-A"], ["MAC-A", "MAC-A"]),
        (["--device-id", " MAC-A\t"], ["MAC-A", "MAC-A"]),  # white space around it is no part of it on the wire either
        (["--device-id", "MAC-A", "--product-key", BLUETOOTH], ["MAC-A"]),
        (["--device-id", "MAC-A", "--status", "allocated", "--batch", "sample"], ["MAC-A", "MAC-A"]),
        (["--status", "WRITTEN"], ["MAC-W"]),
        (["--status", "Failed", "--product-key", WIFI], ["MAC-F"]),
        (["--product-key", WIFI, "--limit", "2"], ["MAC-A", "MAC-W"]),
        (["--device-id", "MAC-A", "--limit", "9"], ["MAC-A", "MAC-A"]),
    ],
)
def test_query_shows_what_passes_every_filter(
    filters: Sequence[str], device_ids: List[str], inline: RunCerttool, used: Path
) -> None:
    assert sorted(row["DeviceID"] for row in listed(inline, used, *filters)) == device_ids


def test_query_finds_a_certificate_by_its_name(certtool: RunCerttool, used: Path) -> None:
    name = listed(certtool, used, "--status", "written")[0]["DeviceName"]
    assert [row["DeviceID"] for row in listed(certtool, used, name)] == ["MAC-W"]
    assert [row["DeviceID"] for row in listed(certtool, used, name, "--device-id", "MAC-W")] == ["MAC-W"]
    certtool("query", name, "--device-id", "MAC-A", "--data", used, ok=1)


@pytest.mark.parametrize(
    "filters",
    [
        ["nobody"],
        ["--device-id", "nobody"],
        ["--product-key", "nobody"],
        ["--batch", "nobody"],
        ["--status", "void"],
        ["--device-id", "MAC-A", "--status", "written"],
        ["--device-id", "MAC-A", "--product-key", "nobody"],
        ["--device-id", "MAC-A", "--batch", "nobody"],
        ["--device-id", "MAC-A", "--status", "unallocated"],
        [""],  # a scan that failed
        ["--device-id", ""],
    ],
)
@pytest.mark.parametrize("style", ["table", "csv", "json"])
def test_query_ends_with_1_where_nothing_matches(
    filters: Sequence[str], style: str, inline: RunCerttool, used: Path
) -> None:
    done = inline("query", *filters, "--format", style, "--data", used, ok=1)
    assert sentence(done.stderr) == "No certificate matches: check the name and the filters."
    if style == "json":
        assert json.loads(done.stdout) == []
    else:
        assert done.stdout.splitlines()[0].replace(",", " ").split() == COLUMNS


def test_the_secrets_are_shown_only_when_asked_for(certtool: RunCerttool, used: Path) -> None:
    secrets = re.findall(r"[A-Za-z0-9]{32}|0lR8acRYSi4MDF8k", SAMPLE.read_text(encoding="utf-8"))
    for style in ("table", "csv", "json"):
        plain = certtool("query", "--format", style, "--data", used).stdout
        assert not any(secret in plain for secret in secrets)
        shown = certtool("query", "--format", style, "--show-secrets", "--data", used).stdout
        assert all(secret in shown for secret in secrets)
        assert (
            re.findall(r"\w+", shown.split("CRC32", 1)[1])[:2] == ["ProductSecret", "DeviceSecret"] or style == "json"
        )


def test_a_spreadsheet_runs_nothing_of_the_csv(certtool: RunCerttool, used: Path) -> None:
    text = certtool("query", "--format", "csv", "--data", used).stdout
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 20
    cells = [cell for row in rows for cell in row.values()]
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@")]
    assert "'=cmd|'/c calc'!A1" in cells
    assert "=cmd|'/c calc'!A1" in [row["DeviceID"] for row in listed(certtool, used)], "JSON has it as it is"


def test_a_spreadsheet_whose_cells_end_at_a_semicolon_runs_nothing_of_the_csv_and_of_the_download(
    server: StartServer, certtool: RunCerttool, store: Path
) -> None:
    running = server("--import", SAMPLE)
    device_id = 'x;=1+1; "@y";z'
    assert running.request(WIFI, device_id)[0] == 200
    download = PageClient(running).get("/certtool/export?status=Allocated")[1].decode("utf-8-sig")
    for text in (download, certtool("query", "--status", "allocated", "--format", "csv", "--data", store).stdout):
        [row] = csv.DictReader(io.StringIO(text))
        assert row["DeviceID"] == "x;'=1+1; \"'@y\";z"
    assert listed(certtool, store, "--status", "allocated")[0]["DeviceID"] == device_id, "JSON has it as it is"
    assert program.decode_cells((store / "journal.csv").read_text().splitlines()[-1])[5] == device_id, "and the journal"


def test_the_table_has_the_same_content_with_and_without_tabulate(used: Path) -> None:
    def run(*options: str) -> List[List[str]]:
        command = [sys.executable, *options, str(CERTTOOL), "query", "--limit", "9", "--data", str(used)]
        text = subprocess.run(command, capture_output=True, encoding="utf-8", env=child_env(), check=True).stdout
        header, ruler, *rows = text.splitlines()
        starts = [match.start() for match in re.finditer(r"-+", ruler)]
        cut = [slice(*pair) for pair in zip(starts, [*starts[1:], None])]
        return [[line[place].strip() for place in cut] for line in (header, *rows)]

    without = "import runpy, sys; sys.modules['tabulate'] = None; del sys.argv[0]; "
    without += "runpy.run_path(sys.argv[0], run_name='__main__')"
    with_tabulate, plain = run(), run("-c", without)
    assert subprocess.run([sys.executable, "-c", "import tabulate"], check=False).returncode == 0
    assert with_tabulate == plain
    assert with_tabulate[0] == COLUMNS
    assert len(plain) == 11, "the columns, nine rows, and that there are more"
    assert plain[-1][0].startswith("... only")


def test_a_table_on_a_terminal_ends_after_50_rows(certtool: RunCerttool, store: Path, tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("needs a pseudo-terminal")
    else:
        import pty  # noqa: PLC0415 - not everywhere

        certtool("import", identities.write(tmp_path / "pool.csv", 60), "--data", store)
        terminal, its_end = pty.openpty()
        command = [sys.executable, str(CERTTOOL), "query", "--data", str(store)]
        with subprocess.Popen(command, stdout=its_end, env=child_env()) as querying:
            os.close(its_end)
            seen, more = b"", b"-"
            with contextlib.suppress(OSError):  # how Linux tells the end
                while more:
                    more = os.read(terminal, 4096)
                    seen += more
            os.close(terminal)
        assert querying.returncode == 0
        assert seen.count(identities.PRODUCT.encode()) == 50
        assert b"... only the first 50 are shown: see --limit." in seen
        piped = certtool("query", "--data", store).stdout
        assert piped.count(identities.PRODUCT) == 60


def test_only_a_table_on_a_terminal_ends_early_and_only_one_that_does_says_so(
    used: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for limit in (19, 20):
        monkeypatch.setattr(program, "TABLE_LIMIT", limit)
        assert program.main(["query", "--data", str(used)]) == 0
        assert ("... only the first" in capsys.readouterr().out) == (limit == 19)
    monkeypatch.setattr(program, "TABLE_LIMIT", 5)
    for options, lines in ((["--format", "csv"], 21), (["--format", "json"], 20), (["--limit", "7"], 2 + 7 + 1)):
        assert program.main(["query", *options, "--data", str(used)]) == 0
        assert len(capsys.readouterr().out.splitlines()) == lines


@pytest.mark.parametrize("style", ["table", "csv", "json"])
def test_a_batch_whose_name_commands_a_terminal_is_obeyed_in_no_format(
    style: str,
    certtool: RunCerttool,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = "\x1b[2J\x1b]0;title\x07\x9b"
    certtool("import", identities.write(tmp_path / "pool.csv", 1), "--data", store, "--batch", batch)
    for terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)  # noqa: B023 - called at once
        assert program.main(["query", "--format", style, "--data", str(store)]) == 0
        shown = capsys.readouterr().out
        assert "[2J" in shown
        assert (batch in shown) == (style == "csv" and not terminal), "what is kept as CSV is as it is in the store"


def test_a_name_that_looks_like_a_number_is_shown_as_it_is(certtool: RunCerttool, store: Path, tmp_path: Path) -> None:
    (tmp_path / "numbers.csv").write_text("ProductKey,DeviceName,DeviceSecret\n00012,1e15,x\n", encoding="utf-8")
    certtool("import", tmp_path / "numbers.csv", "--data", store)
    assert certtool("query", "--data", store).stdout.splitlines()[2].split()[:2] == ["1e15", "00012"]


def test_a_torn_journal_is_read_up_to_the_tear_and_not_changed(certtool: RunCerttool, used: Path) -> None:
    journal = used / "journal.csv"
    whole = listed(certtool, used)
    journal.write_bytes(journal.read_bytes()[:-5])
    before = unharmed(used)
    done = certtool("query", "--format", "json", "--data", used)
    assert "journal.csv ends in half a line" in sentence(done.stderr)
    assert [a == b for a, b in zip(json.loads(done.stdout), whole)].count(False) == 1
    assert unharmed(used) == before
    mended = certtool("import", SAMPLE, "--data", used)
    assert "journal.csv ended in half a line, never acknowledged" in mended.stderr
    assert certtool("query", "--format", "json", "--data", used).stdout == done.stdout


def test_a_damaged_journal_is_refused_by_each_command_and_not_changed(certtool: RunCerttool, used: Path) -> None:
    journal = used / "journal.csv"
    name = listed(certtool, used)[0]["DeviceName"]
    journal.write_bytes(journal.read_bytes().replace(b"MAC-W", b"MAC-X", 1))
    before = unharmed(used)
    for command in (
        ["query"],
        ["import", SAMPLE],
        ["import", SAMPLE, "--dry-run"],
        ["serve", "0"],
        ["void", name, "--reason", "x"],
        ["release", name, "--reason", "x"],
    ):
        refused = sentence(certtool(*command, "--data", used, ok=1).stderr)
        assert re.match(r"journal\.csv line \d+ was changed", refused)
        assert {name: data for name, data in unharmed(used).items() if data} == {n: d for n, d in before.items() if d}


def test_a_lost_journal_is_refused_and_no_import_is_called_ignored(certtool: RunCerttool, used: Path) -> None:
    (used / "journal.csv").unlink()
    for command in (["release", "lamp-0001", "--reason", "x"], ["import", SAMPLE], ["serve", "0"]):
        lines = certtool(*command, "--data", used, ok=1).stderr.splitlines()
        assert len(lines) == 1
        assert "is missing or empty while imports were made. Nothing was changed." in lines[0]


# -- release and void --------------------------------------------------------------------------------------------------


def test_release_and_void_need_a_name_and_a_reason(certtool: RunCerttool, used: Path) -> None:
    name = listed(certtool, used, "--device-id", "MAC-F")[0]["DeviceName"]
    before = (used / "journal.csv").read_bytes()
    assert "sees this store for the first time" in sentence(certtool("import", SAMPLE, "--data", used).stderr)
    for command in ("release", "void"):
        assert "--reason" in certtool(command, name, "--data", used, ok=2).stderr
        assert "DEVICE_NAME" in certtool(command, "--reason", "x", "--data", used, ok=2).stderr
        assert "A reason is needed" in sentence(certtool(command, name, "--reason", " ", "--data", used, ok=1).stderr)
        assert "check the name." in sentence(certtool(command, "no-one", "--reason", "x", "--data", used, ok=1).stderr)
    assert (used / "journal.csv").read_bytes() == before
    assert certtool("release", name, "--reason", "new chip", "--data", used).stdout == (
        f"{name} was Failed and is Unallocated now.\n"
    )
    assert certtool("void", name, "--reason", "leaked", "--data", used).stdout == (
        f"{name} was Unallocated and is Void now.\n"
    )
    assert certtool("void", name, "--reason", "leaked", "--data", used).stdout == (
        f"{name} is Void already: nothing changed.\n"
    )


def test_a_name_that_two_products_have_must_be_told_apart(certtool: RunCerttool, store: Path, tmp_path: Path) -> None:
    path = tmp_path / "twins.csv"
    path.write_text(HEADER + "a1X,twin-1,s1\na1Y,twin-1,s2\n", encoding="utf-8")
    certtool("import", path, "--data", store)
    refused = sentence(certtool("void", "twin-1", "--reason", "x", "--data", store, ok=1).stderr)
    assert refused == "The name occurs in several products (a1X, a1Y): say which with --product-key."
    refused = certtool("void", "twin-1", "--reason", "x", "--product-key", "a1Z", "--data", store, ok=1).stderr
    assert sentence(refused).endswith("check the name and --product-key."), "the name is right"
    certtool("void", "twin-1", "--reason", "x", "--product-key", "a1Y", "--data", store)
    assert [row["Status"] for row in listed(certtool, store, "twin-1")] == ["Unallocated", "Void"]


# -- crc ---------------------------------------------------------------------------------------------------------------


def test_crc_prints_length_and_checksum(certtool: RunCerttool) -> None:
    fields = ("a1X", "名字", "s", "PS", "77")
    payload = "".join(fields).encode()
    value = zlib.crc32(payload)
    assert certtool("crc", *fields).stdout == f"length: {len(payload)}\ncrc32: {value:08X}\n"
    assert certtool("crc", *fields, "--format", "int").stdout == f"length: {len(payload)}\ncrc32: {value}\n"
    assert certtool("crc", *fields, "--format", "int", "--quiet").stdout == f"{value}\n"
    assert certtool("crc", "", "", "", "", "--quiet").stdout == "00000000\n"
    assert "the following arguments are required: PS" in certtool("crc", "a", "b", "c", ok=2).stderr


# -- the store's folder ------------------------------------------------------------------------------------------------


def test_the_store_is_beside_the_program_wherever_it_is_started(certtool: RunCerttool, tmp_path: Path) -> None:
    for place in ("program", "elsewhere"):
        (tmp_path / place).mkdir()
    copy = shutil.copy(CERTTOOL, tmp_path / "program")
    subprocess.run(
        [sys.executable, *BARE, copy, "import", str(SAMPLE)],
        cwd=tmp_path / "elsewhere",
        env=child_env(),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert not list((tmp_path / "elsewhere").iterdir())
    assert len(listed(certtool, tmp_path / "program" / "certtool-data")) == 20


def test_the_environment_names_the_store_and_the_option_wins(certtool: RunCerttool, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    env = {"CERTTOOL_DATA": str(one)}
    certtool("import", SAMPLE, env=env)
    certtool("import", SAMPLE, "--data", two, env=env)
    assert len(listed(certtool, one)) == len(listed(certtool, two)) == 20


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages", "[target]"])
def test_an_installed_copy_asks_where_its_store_is(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    if folder == "[target]":  # pip install --target
        (tmp_path / folder / "certtool-1.0.0.dist-info").mkdir()
    copy = shutil.copy(CERTTOOL, tmp_path / folder)
    for command in (["import", str(SAMPLE)], ["query"], ["serve", "0"]):
        done = subprocess.run(
            [sys.executable, *BARE, copy, *command], env=child_env(), capture_output=True, encoding="utf-8", check=False
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert "name the store with --data or CERTTOOL_DATA" in sentence(done.stderr)
    assert list((tmp_path / folder).glob("certtool-data*")) == []


def test_a_store_that_is_not_there_or_is_a_file_is_named(certtool: RunCerttool, store: Path, tmp_path: Path) -> None:
    name = ("a-name", "--reason", "x")
    assert f"There is no store at {store}" in sentence(certtool("query", "--data", store, ok=1).stderr)
    for about in (["release", *name], ["void", *name], ["accept-restore", *name[1:]]):
        assert f"There is no store at {store}: name it" in sentence(certtool(*about, "--data", store, ok=1).stderr)
    assert not store.exists()
    (tmp_path / "empty").mkdir()
    assert "There is no store at" in sentence(certtool("void", *name, "--data", tmp_path / "empty", ok=1).stderr)
    assert list((tmp_path / "empty").iterdir()) == []
    for command in (["query"], ["import", SAMPLE], ["serve", "0"], ["void", *name], ["import", SAMPLE, "--dry-run"]):
        for folder in (SAMPLE, SAMPLE / "below"):
            done = certtool(*command, "--data", folder, ok=1)
            assert f"{SAMPLE} is a file, not a folder: name another folder with --data." in sentence(done.stderr)


def test_a_folder_that_cannot_be_written_is_named(certtool: RunCerttool) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("there is no folder here that even its owner cannot write")
    done = certtool("import", SAMPLE, "--data", "/proc/self/store", ok=1)
    told = sentence(done.stderr)
    assert re.match(r"The store /proc/self/store cannot be written \(.*\): .*, or use another --data\.", told)


# -- usage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sell"],
        ["--verbose"],
        ["import"],
        ["import", "x.csv", "--product-key", "white space"],
        ["import", "x.csv", "--product-secret", "1.23E+15", "--json"],
        ["import", "x.csv", "--product-id", "é"],
        ["query", "--limit", "0"],
        ["query", "--limit", "many"],
        ["query", "--status", "Sold"],
        ["query", "--format", "xml"],
        ["query", "a", "b"],
        ["crc"],
        ["crc", "a", "b", "c", "d", "e", "f"],
        ["crc", "a", "b", "c", "d", "--format", "octal"],
        ["serve", "0", "--host", ""],
        ["serve", "0", "--mirror", ""],
        ["release", "a", "--reason"],
        ["void", "a", "--reason", "x", "--force"],
    ],
)
def test_a_wrong_command_line_ends_with_2_and_changes_nothing(
    arguments: Sequence[str], certtool: RunCerttool, store: Path
) -> None:
    where = [] if arguments[:1] in ([], ["sell"], ["--verbose"]) else ["--data", store]
    done = certtool(*arguments[:1], *where, *arguments[1:], ok=2)
    assert done.stdout == ""
    assert re.match(r"certtool( \w+)?: (error: )?\S", done.stderr.splitlines()[-1])
    assert not store.exists()


@pytest.mark.parametrize("option", ["--product-key", "--product-secret", "--product-id"])
def test_an_option_whose_value_no_certificate_can_have_is_named(
    option: str, capsys: pytest.CaptureFixture[str], store: Path
) -> None:
    assert program.main(["import", str(SAMPLE), option, "white space", "--data", str(store)]) == 2
    assert sentence(capsys.readouterr().err).startswith(f"{option}: ")


def test_a_store_without_a_name_is_not_taken_for_another_one(certtool: RunCerttool) -> None:
    assert "--data: the name of a folder" in certtool("query", "--data", "", ok=2).stderr


def test_a_number_that_is_none_is_not_told_to_be_of_something_else(certtool: RunCerttool) -> None:
    told = certtool("request", "a1SampleWf0", "--server", "192.0.2.1", "--count", "0", ok=2).stderr
    assert "argument --count: a whole number, 1 or more" in told


@pytest.mark.parametrize(
    ("kind", "last", "beyond"),
    [
        (program._port, ["0", "65535"], ["65536", "-1", "00000080", "8O", " 80"]),
        (program._count, ["1", "9" * 12], ["0", "00", "9" * 13, "1.0", "+1"]),
        (program._stations, ["1", "1000"], ["0", "1001", "00001", "two"]),
        (lambda text: program._server(f"pc:{text}")[1], ["1", "65535"], ["0", "65536", "", "+80"]),
    ],
)
def test_a_number_is_taken_up_to_its_limits_and_no_further(kind: Any, last: List[str], beyond: List[str]) -> None:
    assert [kind(text) for text in last] == list(map(int, last))
    for text in beyond:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("line-pc", ("line-pc", 8000)),
        ("192.168.1.10:80", ("192.168.1.10", 80)),
        ("[::1]", ("::1", 8000)),
        ("[fe80::1%eth0]:81", ("fe80::1%eth0", 81)),
    ],
)
def test_a_server_is_named_with_or_without_its_port(text: str, address: Tuple[str, int]) -> None:
    assert program._server(text) == address


@pytest.mark.skipif(sys.platform == "win32", reason="arguments are text there")
def test_a_host_that_is_no_text_is_refused_in_a_sentence(certtool: RunCerttool, store: Path) -> None:
    refused = sentence(certtool("serve", "0", "--host", "b\udcff", "--data", store, ok=1).stderr)
    assert refused.endswith("): is --host an address of this PC?")
    assert not store.exists()


@pytest.mark.parametrize(
    ("network", "meant"),
    [
        ("192.0.2.7/24", "192.0.2.0/24"),
        ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
        ("::ffff:192.0.2.7", "192.0.2.7/32"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::/0", "::/0"),
        ("fe80::/64", "fe80::/64"),
    ],
)
def test_a_network_of_ipv4_may_be_written_as_ipv6(network: str, meant: str) -> None:
    assert program._network(network) == meant


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("import x.csv --batch", "batch"),
        ("query --batch", "batch"),
        ("release lamp-0001 --reason", "reason"),
        ("void lamp-0001 --reason", "reason"),
        ("accept-restore --reason", "reason"),
    ],
)
def test_a_text_that_no_file_can_hold_is_kept_as_far_as_it_can_be(command: str, name: str) -> None:
    options = program._parser().parse_args([*command.split(), "scrap\udcff"])
    getattr(options, name).encode("utf-8")
    assert getattr(options, name).startswith("scrap")


@pytest.mark.skipif(sys.platform == "win32", reason="arguments are text there")
def test_a_text_in_another_locale_is_what_was_typed(certtool: RunCerttool, store: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(SAMPLE, tmp_path / "一月.csv"))
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert run_bytes(["import", str(path), "--data", str(store)], ascii_only).stderr.count(b"\n") == 1
    assert {row["Batch"] for row in listed(certtool, store)} == {"一月"}
    assert b"\n" in run_bytes(["query", "--batch", "一月", "--format", "csv", "--data", str(store)], ascii_only).stdout


def test_a_python_that_is_too_old_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 7, 16))
        assert program.main(["--version"]) == 1
    assert sentence(capsys.readouterr().err) == "This is Python 3.7: certtool needs 3.8 or newer."


def test_every_command_explains_itself(certtool: RunCerttool) -> None:
    overview = certtool("--help").stdout
    commands = re.findall(r"^    (\w+) ", overview, re.MULTILINE)
    assert {"serve", "import", "query", "crc", "release", "void"} <= set(commands)
    for command in commands:
        text = certtool(command, "--help").stdout
        assert text.startswith(f"usage: certtool {command} ")
        options = set(re.findall(r"\[(--[a-z-]+)", text))
        assert all(re.search(rf"^ +{option}\b.* \S", text, re.MULTILINE) for option in options)
    assert re.fullmatch(r"certtool \d+\.\d+\.\d+ \(CRC32: .+\)\n", certtool("--version").stdout)


# -- output that nobody takes ------------------------------------------------------------------------------------------


def many_rows(certtool: RunCerttool, store: Path, tmp_path: Path) -> List[str]:
    certtool("import", identities.write(tmp_path / "pool.csv", 3000), "--data", store)
    return [sys.executable, str(CERTTOOL), "query", "--data", str(store)]


@pytest.mark.parametrize("style", ["table", "csv", "json"])
def test_a_reader_that_had_enough_ends_the_query_quietly(
    style: str, certtool: RunCerttool, store: Path, tmp_path: Path
) -> None:
    command = [*many_rows(certtool, store, tmp_path), "--format", style]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=child_env()) as querying:
        assert querying.stdout
        assert querying.stderr
        querying.stdout.read(100)
        querying.stdout.close()
        assert querying.stderr.read() == b""
    assert querying.returncode in (0, 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device here that is always full")
def test_output_that_cannot_be_written_is_an_error(certtool: RunCerttool, store: Path, tmp_path: Path) -> None:
    command = many_rows(certtool, store, tmp_path)
    for arguments in (command, [*command, "--limit", "1"]):
        with open("/dev/full", "w", encoding="utf-8") as full:
            done = subprocess.run(
                arguments, stdout=full, stderr=subprocess.PIPE, env=child_env(), encoding="utf-8", check=False
            )
        no_traceback(done.stderr)
        assert done.returncode == 1
        assert "No space left on device" in sentence(done.stderr)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device here that is always full")
def test_what_is_done_is_said_to_be_done_though_the_output_cannot_be_written(certtool: RunCerttool, used: Path) -> None:
    name = listed(certtool, used)[0]["DeviceName"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        command = [sys.executable, str(CERTTOOL), "void", name, "--reason", "x", "--data", str(used)]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=child_env(), encoding="utf-8", check=False
        )
    assert done.returncode == 1
    assert "It is done, but the output could not be written (No space left on device)" in done.stderr
    assert listed(certtool, used, name)[0]["Status"] == "Void"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device here that is always full")
def test_what_may_be_done_is_said_to_be_so_where_output_is_written_at_once(certtool: RunCerttool, used: Path) -> None:
    name = listed(certtool, used)[0]["DeviceName"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        command = [sys.executable, "-u", str(CERTTOOL), "void", name, "--reason", "x", "--data", str(used)]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=child_env(), encoding="utf-8", check=False
        )
    assert done.returncode == 1
    assert "No space left on device: check the disk. What was under way may have happened" in done.stderr
    assert listed(certtool, used, name)[0]["Status"] == "Void"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell that closes a stream")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_does_not_change_how_a_command_ends(closed: str, certtool: RunCerttool, store: Path) -> None:
    def run(*arguments: Any) -> int:
        command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, str(CERTTOOL), *map(str, arguments)]
        done = subprocess.run([*command, "--data", str(store)], env=child_env(), capture_output=True, check=False)
        assert b"Traceback" not in done.stderr
        assert b"report" not in done.stderr
        return done.returncode

    assert run("import", SAMPLE) == 0
    assert run("query") == 0
    assert run("query", "nobody") == 1
    assert run("query", "--limit", "0") == 2
    assert len(listed(certtool, store)) == 20


def test_a_defect_is_told_in_a_sentence_without_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError("top secret")

    monkeypatch.setattr(program, "crc32", crash)
    assert program.main(["crc", "a", "b", "c", "d"]) == 1
    assert re.match(
        r"Please report this defect: ZeroDivisionError in crash, line \d+", sentence(capsys.readouterr().err)
    )


@pytest.mark.parametrize(
    ("command", "error", "told"),
    [
        ("query", KeyboardInterrupt(), "Interrupted."),
        ("verify", KeyboardInterrupt(), "Interrupted."),
        ("verify", OSError(errno.ENOSPC, "No space left"), "No space left: check the disk."),
        ("import --dry-run x.csv", KeyboardInterrupt(), "Interrupted."),
    ],
)
def test_a_command_that_only_looks_leaves_no_doubt_where_it_ends_early(
    command: str, error: BaseException, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(_options: object) -> None:
        raise error

    monkeypatch.setattr(program, f"run_{command.split()[0]}", end)
    assert program.main(command.split()) == 1
    assert sentence(capsys.readouterr().err) == told


# -- what cannot be arranged from outside ------------------------------------------------------------------------------


def test_a_store_that_another_command_writes_to_is_not_entered(certtool: RunCerttool, used: Path) -> None:
    name = listed(certtool, used)[0]["DeviceName"]
    with contextlib.closing(program.Store(str(used), "import")):
        for command in (["import", SAMPLE], ["void", name, "--reason", "x"], ["serve", "0"]):
            refused = sentence(certtool(*command, "--data", used, ok=1).stderr)
            holder = f"certtool import (process {os.getpid()})"
            assert refused == f"The store {used} is in use by {holder}: wait until it is done."
        assert len(listed(certtool, used)) == 20


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such rights")
def test_a_folder_that_is_closed_to_other_users_is_told_of_also_where_a_server_holds_the_store(
    certtool: RunCerttool, server: StartServer, store: Path
) -> None:
    server("--import", SAMPLE)
    name = listed(certtool, store)[0]["DeviceName"]
    changed = f"certtool: Other users of this PC could change {store}: from now on only you can.\n"
    for command in (["import", SAMPLE], ["void", name, "--reason", "scrap"]):
        for rights, told in ((0o777, changed), (0o755, "")):
            store.chmod(rights)
            assert certtool(*command, "--data", store).stderr == told
            assert stat.S_IMODE(store.stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("release", b""),
        ("void", b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"Status": "OK"'),
        ("import", b"HTTP/1.1 200 OK\r\n\r\nno JSON"),
    ],
)
def test_who_did_not_hear_whether_it_happened_is_told_to_look_before_it_is_done_again(
    command: str, answer: bytes, certtool: RunCerttool, used: Path
) -> None:
    """Meanwhile another device may have the certificate: a second release would give it to a third."""

    def record_and_end() -> None:
        with listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    name = listed(certtool, used, "--device-id", "MAC-A")[0]["DeviceName"]
    arguments = ["import", SAMPLE] if command == "import" else [command, name, "--reason", "x"]
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.closing(program.Store(str(used))) as server:
        assert server.lock
        server.lock.announce({"command": "serve", "port": listener.getsockname()[1], "token": "x"})
        ending = threading.Thread(target=record_and_end)
        ending.start()
        said = sentence(certtool(*arguments, "--data", used, ok=1).stderr)
        ending.join()
    assert said == (
        f"The running server ended before it answered, so the {command} may have happened: start it, and look with "
        "certtool.py query before you run this again."
    )


def test_files_that_are_too_long_for_a_running_server_are_told_to_be_so(
    used: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "MAX_UPLOAD", SAMPLE.stat().st_size)
    with contextlib.closing(program.Store(str(used))) as server:
        assert server.lock
        server.lock.announce({"command": "serve", "port": 9, "token": "x"})
        assert program.main(["import", str(SAMPLE), "--data", str(used)]) == 1
    assert sentence(capsys.readouterr().err) == (
        "A running server takes files of 256 MiB at most: stop it and import then."
    )


def test_an_operation_that_a_failed_sync_ends_is_not_told_to_have_changed_nothing(
    certtool: RunCerttool, used: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = Disk(lambda call: RAISE if disk.calls[-2:] == ["write", "fsync"] else "")  # as in a commit alone
    name = listed(certtool, used, "--device-id", "MAC-A")[0]["DeviceName"]
    with monkeypatch.context() as patch:
        patch.setattr(program, "os", disk)
        assert program.main(["release", name, "--reason", "x", "--data", str(used)]) == 1
    assert "so it may be lost or not: check the disk, and restart this PC." in capsys.readouterr().err
    assert listed(certtool, used, name)[0]["Status"] == "Unallocated"


@pytest.mark.parametrize("error", [KeyError("no password database entry"), OSError("the same"), ImportError("no pwd")])
def test_an_operator_whom_the_system_has_no_name_for_may_void(
    error: Exception, certtool: RunCerttool, used: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nameless() -> str:
        raise error

    monkeypatch.setattr("getpass.getuser", nameless)
    name = listed(certtool, used)[0]["DeviceName"]
    assert program.main(["void", name, "--reason", "x", "--data", str(used)]) == 0
    assert '""who"":""unknown""' in (used / "journal.csv").read_text(encoding="utf-8")


def test_the_default_store_follows_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CERTTOOL_DATA", raising=False)
    monkeypatch.setattr(program, "__file__", str(tmp_path / "certtool.py"))
    assert program.store_folder(None) == str(tmp_path / "certtool-data")
    monkeypatch.setattr(program, "__file__", str(tmp_path / "site-packages" / "certtool.py"))
    with pytest.raises(program.UsageError):
        program.store_folder(None)
