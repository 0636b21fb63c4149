"""The whole program against the oracle's model: requests over HTTP, failing disks and restarts in any order."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Dict, List, Tuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import certtool
from tests.faults.oracle import TALLIES, Oracle, Tally, judged
from tests.inside import Inside
from tests.stores import RAISE, SHORT, Disk
from tests.support import no_secret
from tests.wire import ask, replies

POOL = 6
LINE = Tally("the whole program against a model")
TURNS = st.lists(
    st.tuples(st.sampled_from([f"MAC-{number}" for number in range(POOL + 2)]), st.integers(0, 2)),
    min_size=1,
    max_size=4,
    unique_by=lambda asked: asked[0],
)
FAULTS: Dict[str, Dict[str, str]] = {
    "no write": {"write": RAISE},
    "half a write": {"write": SHORT},
    "half a write, no cut": {"write": SHORT, "ftruncate": RAISE},
    "no sync": {"fsync": RAISE},
}


class Program(RuleBasedStateMachine):
    """A server in this process, whose devices are followed by an oracle over all its lives."""

    def __init__(self) -> None:
        super().__init__()
        if LINE not in TALLIES:
            TALLIES.append(LINE)
        LINE.rounds += 1
        self.folder = Path(tempfile.mkdtemp())
        self.faults: Dict[str, str] = {}
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(certtool, "os", Disk(lambda call: self.faults.get(call, "")))
        self.oracle = Oracle()

    @initialize()
    def begin(self) -> None:
        """A pool that is too small for all devices."""
        self.server = Inside(self.folder / "inside", POOL, self.patch)
        self.oracle.imported = POOL

    @rule(turn=TURNS)
    def a_turn(self, turn: List[Tuple[str, int]]) -> None:
        """Requests of several devices in one packet, so that one commit takes them all."""
        with self.server.connect(b"".join(ask(device_id, action=action) for device_id, action in turn)) as client:
            received = self.server.receive(client, 1)
        answers = dict(zip((device_id for device_id, _ in turn), replies(received)))
        assert len(answers) == len(turn)
        talk = {device_id: [action] for device_id, action in turn}
        self.oracle.hear(talk, {device_id: [answer] for device_id, answer in answers.items()})

    @rule(turn=TURNS, fault=st.sampled_from(sorted(FAULTS)))
    def a_turn_while_the_disk_fails(self, turn: List[Tuple[str, int]], fault: str) -> None:
        """What needs a record is refused, and may be on the disk all the same."""
        LINE.injected += 1
        self.faults = FAULTS[fault]
        try:
            self.a_turn(turn)
        finally:
            self.faults = {}

    @rule()
    def a_restart(self) -> None:
        """Ctrl-C, and the oracle looks before the next start."""
        LINE.injected += 1
        self.server.close()
        no_secret("\n".join([*self.server.notices, *map(certtool._event_line, self.server.events)]))
        judged(LINE, self.oracle, self.folder / "inside")
        self.server = Inside(self.folder / "inside", 0, self.patch)

    def teardown(self) -> None:
        """The end is a restart too."""
        self.a_restart()
        self.server.close()
        self.patch.undo()
        shutil.rmtree(self.folder)
        LINE.acknowledged += self.oracle.acknowledged


Program.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestTheWholeProgram = Program.TestCase
