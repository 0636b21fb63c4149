"""What the tests of the faults share. Their table is printed by tests/conftest.py, for all workers together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable

import pytest

from tests import identities
from tests.faults.oracle import TALLIES, Tally


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
