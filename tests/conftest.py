"""The fixtures of all tests: a store, certtool as a command, certtool as a server."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, List, Mapping, Optional, Sequence, Tuple

import pytest
from _pytest.terminal import TerminalReporter  # pytest exports it from 8.4 on
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

import certtool as program
from tests.faults.oracle import TALLIES
from tests.inside import Inside
from tests.support import CERTTOOL, ROOT, RunCerttool, Server, StartServer, child_env, launcher, no_secret, no_traceback

# How long an example takes says something about the machine, which others share.
settings.register_profile("certtool", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("certtool")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the harnesses look for faults."""
    parser.addoption("--thorough", action="store_true", help="look for faults ten times as long, with all programs")


# -- the order of the files --------------------------------------------------------------------------------------------

# Those that take longest, the longest first: a long file that is started last leaves the other processor idle.
LONGEST = [
    f"tests/{name}.py"
    for name in (
        "test_client_c",
        "test_page_browser",
        "faults/test_kill",
        "test_client_node",
        "faults/test_network",
        "test_serve",
        "test_commands",
        "test_crc32",
        "test_request",
        "test_windows",
        "faults/test_disk",
        "test_journal",
        "test_vectors",
        "test_page",
        "faults/test_system_calls",
    )
]


class LongestFirst(LoadFileScheduling):  # type: ignore[misc]
    """`--dist=loadfile`, which itself begins with the files that have most tests, however short they are."""

    def _assign_work_unit(self, node: Any) -> None:
        for file in LONGEST:
            if file in self.workqueue:
                self.workqueue.move_to_end(file, last=False)
                break
        super()._assign_work_unit(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Optional[LongestFirst]:
    """Say in which order `--dist=loadfile` hands out the files."""
    return LongestFirst(config, log) if config.getvalue("dist") == "loadfile" else None


# -- the table of the faults -------------------------------------------------------------------------------------------

HEADER = ("fault", "rounds", "injected", "acknowledged", "lost", "duplicated")
ROWS: List[Tuple[str, ...]] = []  # of all workers


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand this worker's part of the table to the process that prints it."""
    rows = [list(tally.cells()) for tally in TALLIES]
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = rows
    else:
        ROWS.extend(map(tuple, rows))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take a worker's part of the table."""
    ROWS.extend(map(tuple, getattr(node, "workeroutput", {}).get("faults", ())))


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Print the table."""
    if not ROWS:
        return
    widths = [max(map(len, column)) for column in zip(HEADER, *ROWS)]
    terminalreporter.section("faults")
    for first, *others in [HEADER, *ROWS]:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        terminalreporter.write_line("  ".join(cells))


# -- fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether time does not matter."""
    return bool(request.config.getoption("--thorough"))


@pytest.fixture(autouse=True)
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which this test's certtool keeps its high-water marks, instead of the user's profile."""
    for name in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "profile"))
    return tmp_path / "profile" / "certtool"


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subprocesses start without measuring coverage, in half the time: others have covered what they do here."""
    for name in [name for name in os.environ if name.startswith("COV_CORE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The folder of a store that does not exist yet."""
    return tmp_path / "store"


@pytest.fixture
def certtool() -> RunCerttool:
    """Run `certtool.py ARGS` to its end; it must exit with `ok` and show no traceback, and no secret unless asked."""

    def run(
        *args: object,
        ok: int = 0,
        stdin: Optional[str] = None,
        cwd: Optional[Path] = None,
        env: Optional[Mapping[str, str]] = None,
        python: Sequence[str] = (sys.executable,),
        script: Path = CERTTOOL,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*(launcher(python, script) if cwd is None else (*python, str(script))), *map(str, args)],
            input=stdin or "",
            capture_output=True,
            encoding="utf-8",
            cwd=cwd or ROOT,
            env=child_env(**(env or {})),
            check=False,
        )
        shows = "--show-secrets" in args
        no_secret(done.stderr if shows else done.stdout + done.stderr)
        no_traceback(done.stdout)
        assert done.returncode == ok, f"exit {done.returncode}, not {ok}:\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def inline() -> RunCerttool:
    """Run `certtool.py ARGS` as `certtool` does, but in this process: where a test looks at something else with it."""

    def run(*args: object, ok: int = 0) -> subprocess.CompletedProcess[str]:
        arguments, out, errors = list(map(str, args)), io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = program.main(arguments)
        no_secret(out.getvalue() + errors.getvalue())
        assert code == ok, f"exit {code}, not {ok}:\n{out.getvalue()}\n{errors.getvalue()}"
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())

    return run


@pytest.fixture
def server(store: Path) -> Iterator[StartServer]:
    """Start `certtool.py serve ARGS` on a free port, over the test's store unless given another; see `Server`."""
    with contextlib.ExitStack() as running:

        def start(*args: object, **options: Any) -> Server:
            started = Server(*map(str, args), **{"store": store, **options})
            running.callback(started.close)
            return started

        yield start


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Inside]]:
    """Make a server inside the test, over a pool of `pool` certificates; see `Inside`."""
    with contextlib.ExitStack() as running:

        def make(pool: int = 10, **options: Any) -> Inside:
            made = Inside(tmp_path / "inside", pool, monkeypatch, **options)
            running.callback(made.close)
            return made

        yield make
