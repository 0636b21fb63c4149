"""The table of the faults, and what their tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable, List

import pytest
from _pytest.terminal import TerminalReporter  # pytest exports it from 8.4 on

from tests import identities
from tests.faults.oracle import Tally

HEADER = ("fault", "rounds", "injected", "acknowledged", "lost", "duplicated")
TALLIES: List[Tally] = []


@pytest.fixture
def tally() -> Callable[[str], Tally]:
    """Open a line of the table."""

    def begin(fault: str) -> Tally:
        TALLIES.append(Tally(fault))
        return TALLIES[-1]

    return begin


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """An identity file with 400 certificates."""
    return identities.write(tmp_path / "pool.csv", 400)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subprocesses start without measuring coverage: there are hundreds."""
    for name in [name for name in os.environ if name.startswith("COV_CORE_")]:
        monkeypatch.delenv(name)


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Print the table."""
    if not TALLIES:
        return
    rows = [HEADER, *(tally.cells() for tally in TALLIES)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    terminalreporter.section("faults")
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        terminalreporter.write_line("  ".join(cells))
