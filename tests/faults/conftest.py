"""What the tests of the faults share. Their table is printed by tests/conftest.py, for all workers together."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import identities
from tests.faults.oracle import TALLIES, NewTally, Tally


@pytest.fixture
def tally() -> NewTally:
    """Open a line of the table."""

    def begin(fault: str) -> Tally:
        TALLIES.append(Tally(fault))
        return TALLIES[-1]

    return begin


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """An identity file with 400 certificates."""
    return identities.write(tmp_path / "pool.csv", 400)


@pytest.fixture(autouse=True)
def all_fast(fast: None) -> None:
    """There are hundreds of servers here, and most are killed."""
