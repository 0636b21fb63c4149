"""The fixtures of all tests: a store, certtool as a command, certtool as a server."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional

import pytest

from tests.support import CERTTOOL, RunCerttool, Server, StartServer, child_env, no_traceback


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The folder of a store that does not exist yet."""
    return tmp_path / "store"


@pytest.fixture
def certtool() -> RunCerttool:
    """Run `certtool.py ARGS` to its end; it must exit with `ok` and show no traceback."""

    def run(
        *args: object,
        ok: int = 0,
        stdin: Optional[str] = None,
        cwd: Optional[Path] = None,
        env: Optional[Mapping[str, str]] = None,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, str(CERTTOOL), *map(str, args)],
            input=stdin or "",
            capture_output=True,
            encoding="utf-8",
            cwd=cwd,
            env=child_env(**(env or {})),
            check=False,
        )
        no_traceback(done.stdout + done.stderr)
        assert done.returncode == ok, f"exit {done.returncode}, not {ok}:\n{done.stdout}\n{done.stderr}"
        return done

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
