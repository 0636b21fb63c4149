"""CRC32 is zlib's on every path, in C and in Python; a broken extension costs speed, never a checksum."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import itertools
import random
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, List, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import certtool
from tests.support import CERTTOOL, ROOT, child_env, missing, need, no_traceback, pythons

DATA = random.Random(1).getrandbits(8 * (1 << 20)).to_bytes(1 << 20, "little")
CHECK = b"123456789"
VENDOR = ("a2xxxx8HZ", "ouxxxxemo", "GD4JauYxxxxsICazhIzb", "4I3xxxxyF96")  # PK DN DS PS of the vendor's page
SOURCES = ("certtool.py", "build_ext.py", "_crc32.c", "pyproject.toml")
WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-Wconversion", "-Wpedantic", "-Werror")
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FORMS = ("CRC32_FAST", "CRC32_SMALL", "CRC32_BITWISE")  # the first is no macro: the routine as it is
FOLDED = 6400  # bytes from which a buffer is folded


def built() -> Any:
    """Return the extension that stands beside certtool.py, as a module."""
    try:
        return importlib.import_module(certtool.CRC_EXTENSION)
    except ImportError as error:
        return missing(f"The C extension is not there, build_ext.py makes it: {error}")


@functools.lru_cache(maxsize=None)
def routine(name: str) -> certtool._Crc32:
    """Return the routine of that name, whichever of them certtool has chosen."""
    if name == "pure Python":
        return certtool._Crc32(name, certtool.crc32_pure, certtool._crc32_many_pure)
    return certtool._load_crc32(built().__file__)


EACH = pytest.mark.parametrize("name", ["C extension", "pure Python"])


def run(*command: object, cwd: Path, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; it must exit with `code` and show no traceback."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=child_env(**env), capture_output=True, encoding="utf-8", check=False
    )
    no_traceback(done.stdout + done.stderr)
    assert done.returncode == code, f"exit {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def copy_to(folder: Path) -> Path:
    """Copy what the extension is built from, and certtool.py, to `folder`."""
    folder.mkdir(exist_ok=True)
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").touch()  # pyproject.toml names it
    return folder


# -- Equal to zlib -----------------------------------------------------------------------------------------------------


@EACH
def test_the_check_value_and_the_empty_string(name: str) -> None:
    crc = routine(name)
    assert crc.one(CHECK, 0) == 0xCBF43926
    assert crc.one(b"", 0) == 0
    assert crc.one(b"", 0x12345678) == 0x12345678, "nothing more to checksum"
    assert crc.many([CHECK, b"", b""]) == [0xCBF43926, 0, 0]
    assert crc.many([]) == []
    assert crc.one(bytearray(CHECK), 0) == 0xCBF43926


def test_the_extension_runs_where_it_is_built() -> None:
    built()
    assert (certtool.crc32_name(), certtool.crc32_warning) == ("C extension", "")
    assert certtool.crc32(CHECK[4:], certtool.crc32(CHECK[:4])) == 0xCBF43926
    assert certtool.crc32_many([CHECK]) == [0xCBF43926]


def test_in_c_every_length_at_every_alignment() -> None:
    module = built()
    start = module.ffi.from_buffer(DATA)
    start += -int(module.ffi.cast("uintptr_t", start)) % 16
    view = memoryview(DATA)[start - module.ffi.from_buffer(DATA) :]
    around_folding = range(FOLDED - 20, FOLDED + 20), range(FOLDED + 3980, FOLDED + 4020)
    for length in itertools.chain(range(4097), *around_folding):
        for alignment in range(16):
            expected = zlib.crc32(view[alignment : alignment + length])
            assert module.lib.crc32_update(0, start + alignment, length) == expected, (length, alignment)


def test_in_python_every_short_length_and_some_long_ones() -> None:
    for length in itertools.chain(range(400), range(400, 4097, 97)):
        assert certtool.crc32_pure(DATA[:length]) == zlib.crc32(DATA[:length])


@EACH
def test_a_checksum_goes_on_from_every_split(name: str) -> None:
    one = routine(name).one
    whole = DATA[: 300 if name == "pure Python" else FOLDED + 600]
    for split in range(len(whole) + 1):
        assert one(whole[split:], one(whole[:split], 0)) == zlib.crc32(whole), split


@EACH
@settings(max_examples=1000, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=12), st.integers(0, 2**32 - 1))
def test_anything_alone_and_in_a_batch(name: str, payloads: List[bytes], value: int) -> None:
    crc = routine(name)
    assert crc.many(payloads) == [zlib.crc32(payload) for payload in payloads]
    assert crc.one(b"".join(payloads), value) == zlib.crc32(b"".join(payloads), value)


@EACH
@pytest.mark.parametrize("lengths", [[84], range(70, 100), range(3), [0], [*[84] * 500, 9000], range(0, 3000, 7)])
def test_a_batch_of_thousands(name: str, lengths: Sequence[int]) -> None:
    payloads = [DATA[place : place + length] for place, length in zip(range(2345), itertools.cycle(lengths))]
    assert routine(name).many(payloads) == [zlib.crc32(payload) for payload in payloads]


@EACH
def test_a_gibibyte_in_pieces(name: str) -> None:
    one, value, expected, total = routine(name).one, 0, 0, 0
    pieces = itertools.cycle([DATA, DATA[:999_983], DATA[5:FOLDED], DATA[:1]])
    while total < (1 << 20 if name == "pure Python" else 1 << 30):
        piece = next(pieces)
        value, expected, total = one(piece, value), zlib.crc32(piece, expected), total + len(piece)
    assert value == expected


def test_threads_do_not_disturb_one_another() -> None:
    crc = routine("C extension")
    pieces = [DATA[place : place + 50_000] for place in range(400)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda piece: crc.one(piece, 0), pieces)) == [zlib.crc32(piece) for piece in pieces]
        batches = pool.map(lambda place: crc.many([DATA[place : place + 84]] * 1000), range(64))
        assert list(batches) == [[zlib.crc32(DATA[place : place + 84])] * 1000 for place in range(64)]


# -- The C source ------------------------------------------------------------------------------------------------------


def compile_driver(folder: Path, *command: str) -> Path:
    driver = folder / "driver"
    run(*command, *WARNINGS, f"-I{ROOT}", ROOT / "tests" / "crc32_driver.c", "-o", driver, cwd=folder)
    return driver


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_each_form_in_c_is_clean_and_right_under_the_sanitizers(compiler: str, form: str, tmp_path: Path) -> None:
    driver = compile_driver(tmp_path, need(compiler), f"-D{form}", *SANITIZERS)
    assert run(driver, cwd=tmp_path).stdout == "ok\n"


def test_the_routine_is_right_on_a_big_endian_machine(tmp_path: Path) -> None:
    driver = compile_driver(tmp_path, need("s390x-linux-gnu-gcc"), "-O2", "-static")
    assert run(need("qemu-s390x"), driver, cwd=tmp_path).stdout == "ok\n"


@pytest.mark.parametrize("form", FORMS[1:])
def test_the_small_forms_need_no_library(form: str, tmp_path: Path) -> None:
    run(need("gcc"), "-Os", "-ffreestanding", *WARNINGS, f"-D{form}", "-c", ROOT / "_crc32.c", cwd=tmp_path)
    assert run(need("nm"), "--undefined-only", "_crc32.o", cwd=tmp_path).stdout == ""
    symbols = run(need("nm"), "--defined-only", "--extern-only", "--format=posix", "_crc32.o", cwd=tmp_path).stdout
    assert [line.split()[0] for line in symbols.splitlines()] == ["crc32_update"]


# -- Building ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["3.8", "3.13"])
def test_it_builds_and_runs_on_the_oldest_python_and_a_new_one(version: str, tmp_path: Path) -> None:
    ask = "import sys; print('{}.{}'.format(*sys.version_info))"
    all_of_them = (sys.executable, *pythons())
    found = [python for python in all_of_them if run(python, "-c", ask, cwd=tmp_path).stdout.strip() == version]
    if not found:
        pytest.skip(f"CPython {version} is not installed")
    folder = copy_to(tmp_path / "clone")
    run(found[0], "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    run(python, "-m", "pip", "install", "-q", "cffi", "setuptools", cwd=tmp_path)
    assert run(python, "build_ext.py", cwd=folder).stdout.startswith("Built _certtool_crc32.")
    agree = (
        "import certtool, os, zlib; payloads = [os.urandom(n) for n in (*range(300), 7000, 70000)]; "
        "expected = [zlib.crc32(payload) for payload in payloads]; "
        "assert certtool.crc32_many(payloads) == list(map(certtool.crc32, payloads)) == expected; "
        "print(certtool.crc32_name())"
    )
    assert run(python, "-c", agree, cwd=folder).stdout == "C extension\n"


def pip_install(tmp_path: Path, compiler: str) -> str:
    """Install certtool, its build requirements being here already, into a folder; return which CRC32 it runs."""
    clone, target = copy_to(tmp_path / "clone"), tmp_path / "site"
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", target)
    run(sys.executable, "-m", "pip", "install", *offline, clone, cwd=tmp_path, CC=compiler)
    return run(sys.executable, target / "certtool.py", "--version", cwd=tmp_path).stdout


def test_pip_installs_the_extension_with_certtool(tmp_path: Path) -> None:
    built()
    assert "C extension" in pip_install(tmp_path, need("gcc"))


@pytest.mark.skipif(sys.platform == "win32", reason="CC names no compiler there")
def test_pip_installs_certtool_where_nothing_can_be_compiled(tmp_path: Path) -> None:
    assert "pure Python" in pip_install(tmp_path, "no-such-compiler")


@pytest.mark.skipif(sys.platform == "win32", reason="CC names no compiler there")
def test_without_a_compiler_a_sentence_says_what_still_works(tmp_path: Path) -> None:
    built()
    folder = copy_to(tmp_path / "clone")
    said = run(sys.executable, "build_ext.py", cwd=folder, code=1, CC="no-such-compiler").stderr.splitlines()[-1]
    assert "no-such-compiler" in said
    assert "checksums in Python" in said
    assert "pure Python" in run(sys.executable, "certtool.py", "--version", cwd=folder).stdout


def test_without_cffi_a_sentence_says_what_still_works(tmp_path: Path) -> None:
    said = run(sys.executable, "-I", "-S", copy_to(tmp_path) / "build_ext.py", cwd=tmp_path, code=1).stderr
    assert said.count("\n") == 1
    assert "pip install cffi" in said
    assert "checksums in Python" in said


# -- Broken extensions -------------------------------------------------------------------------------------------------

OWN_NAME = certtool.CRC_EXTENSION + importlib.machinery.EXTENSION_SUFFIXES[0]


def for_another_python(folder: Path) -> None:
    shutil.copy(built().__file__, folder / f"{certtool.CRC_EXTENSION}.cpython-27-sparc.so")


def garbage(folder: Path) -> None:
    (folder / OWN_NAME).write_bytes(DATA[:5000])


def cut_short(folder: Path) -> None:
    whole = Path(built().__file__).read_bytes()
    (folder / OWN_NAME).write_bytes(whole[: len(whole) // 4])


def nothing_in_it(folder: Path) -> None:
    (folder / OWN_NAME).touch()


def another_module(folder: Path) -> None:
    shutil.copy(importlib.import_module("_cffi_backend").__file__ or "", folder / OWN_NAME)


def wrong_tables(folder: Path) -> None:
    build_with(folder, "0xB8BC6765", "0xB8BC6764")


def wrong_folding(folder: Path) -> None:
    build_with(folder, "FOLD2 = 183", "FOLD2 = 184")


def wrong_continuation(folder: Path) -> None:
    build_with(folder, "return ~run(~crc,", "return ~run(crc ? 0 : ~crc,")


def wrong_batch(folder: Path) -> None:
    build_with(folder, "out[i] =", "out[i ? i - 1 : 0] =")


def build_with(folder: Path, right: str, wrong: str) -> None:
    """Build an extension from a source with a mistake in it."""
    source = copy_to(folder) / "_crc32.c"
    text = source.read_text(encoding="utf-8")
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    built()
    run(sys.executable, "build_ext.py", cwd=folder)


@pytest.mark.parametrize(
    "breaking",
    [
        for_another_python,
        garbage,
        cut_short,
        nothing_in_it,
        another_module,
        wrong_tables,
        wrong_folding,
        wrong_continuation,
        wrong_batch,
    ],
)
def test_a_broken_extension_costs_one_line_and_no_checksum(breaking: Callable[[Path], None], tmp_path: Path) -> None:
    breaking(tmp_path)
    assert_falls_back(tmp_path, [sys.executable], "build_ext.py")


def test_an_extension_without_cffi_costs_one_line_and_no_checksum(tmp_path: Path) -> None:
    shutil.copy(built().__file__, tmp_path)
    assert_falls_back(tmp_path, [sys.executable, "-I", "-S"], "pip install cffi")


def assert_falls_back(folder: Path, python: Sequence[str], remedy: str) -> None:
    shutil.copy(CERTTOOL, folder)
    done = run(*python, "certtool.py", "crc", *VENDOR, "--quiet", cwd=folder)
    assert done.stdout == f"{zlib.crc32(''.join(VENDOR).encode()):08X}\n"
    assert done.stderr.count("\n") == 1
    assert certtool.CRC_EXTENSION in done.stderr
    assert remedy in done.stderr
    assert "pure Python" in run(*python, "certtool.py", "--version", cwd=folder).stdout


def test_certtool_installed_without_accel_is_silent_about_it(tmp_path: Path) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    shutil.copy(built().__file__, folder)
    shutil.copy(CERTTOOL, folder)
    done = run(sys.executable, "-I", "-S", folder / "certtool.py", "--version", cwd=tmp_path)
    assert ("pure Python" in done.stdout, done.stderr) == (True, "")


def test_an_isolated_python_finds_the_extension(tmp_path: Path) -> None:
    built()
    assert "C extension" in run(sys.executable, "-I", CERTTOOL, "--version", cwd=tmp_path).stdout
