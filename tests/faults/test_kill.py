"""The process ends in the middle of its work, at random and at every point that has a name."""

from __future__ import annotations

import itertools
import random
import shutil
import sys
import time
from pathlib import Path
from typing import List

import pytest

from tests import identities
from tests.faults import victim
from tests.faults.oracle import NewTally, Oracle, judged
from tests.identities import rows
from tests.stations import Stations
from tests.support import Server, no_secret

VICTIM = str(Path(victim.__file__))


@pytest.mark.timeout(7200)
def test_nothing_is_lost_when_the_server_is_killed_at_random_under_16_clients(
    tally: NewTally, tmp_path: Path, profile: Path, thorough: bool
) -> None:
    line, chance = tally("kill -9 at random, 16 clients"), random.Random(5)
    pool = identities.write(tmp_path / "pool.csv", 3000)
    for series in range(100 if thorough else 10):
        store, oracle = tmp_path / f"store{series}", Oracle()
        for _ in range(20):
            line.rounds += 1
            running = Server("--import", str(pool), store=store)
            oracle.imported = 3000
            asked = [f"MAC-{number}" for number in chance.sample(range(10_000), 150)]
            known = chance.sample(list(oracle.devices), min(10, len(oracle.devices)))
            talk = {id_: chance.choice([(0,), (0, 1), (0, 2, 0), (0, 1, 0)]) for id_ in [*asked, *known]}
            clients = Stations(running.port, talk, 16, notice_at=chance.randrange(1, 150))
            assert clients.reached.wait(60)
            time.sleep(chance.random() * 0.005)
            running.kill()
            line.injected += 1
            oracle.hear(talk, clients.wait())
            judged(line, oracle, store, profile)
        line.acknowledged += oracle.acknowledged
        assert oracle.acknowledged > 1000


def lived(point: str, nth: int, pool: Path, store: Path, oracle: Oracle) -> bool:
    """One life of a server that is to be killed at this point: start, import, devices; say whether it was killed."""
    python = [sys.executable, VICTIM, point, str(nth)]
    talk = {f"MAC-{number}": (0, 1, 0) for number in range(4)}
    try:
        running = Server("--import", str(pool), store=store, python=python)
    except AssertionError as ended:
        no_secret(str(ended))
        return True
    oracle.imported = 400
    answers = Stations(running.port, talk, 2).wait()
    oracle.hear(talk, answers)
    killed = running.process.poll() is not None or any(len(got) < 3 for got in answers.values())
    code = running.wait() if killed else running.stop()
    assert code == (victim.KILLED if killed or code else 0)
    return bool(code)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("point", [*victim.POINTS, "half write"])
def test_nothing_is_lost_when_the_server_is_killed_at_every_named_point(
    point: str, tally: NewTally, tmp_path: Path, pool: Path, profile: Path
) -> None:
    line = tally(f"killed {point}")
    nth, step = 0, 1
    while True:
        line.rounds += 1
        oracle, store = Oracle(), tmp_path / "store"
        killed = lived(point, nth, pool, store, oracle)
        line.injected += killed
        judged(line, oracle, store, profile)
        line.acknowledged += oracle.acknowledged
        shutil.rmtree(store)
        if not killed:
            break
        nth += step
        step += nth > 8  # all of the start and the first requests, and ever fewer of those that are like them
    assert line.injected > 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("point", ["before fsync", "after fsync", "half write", "before ftruncate", "after ftruncate"])
def test_nothing_is_lost_when_recovery_itself_is_killed(
    point: str, tally: NewTally, tmp_path: Path, pool: Path, profile: Path
) -> None:
    line = tally(f"recovery killed {point}")
    template, oracle = tmp_path / "template", Oracle()
    running = Server("--import", str(pool), store=template)
    oracle.imported = 400
    talk = {f"MAC-{number}": (0, 1) for number in range(9)}
    oracle.hear(talk, Stations(running.port, talk, 2).wait())
    running.kill()
    with open(template / "journal.csv", "ab") as journal:
        journal.write(b"999,2026-11-24T08:00")
    for nth in itertools.count():
        line.rounds += 1
        store = Path(shutil.copytree(template, tmp_path / "store"))
        killed = recovered(point, nth, store)
        line.injected += killed
        judged(line, oracle, store, profile)
        shutil.rmtree(store)
        if not killed:
            break
    line.acknowledged = oracle.acknowledged
    assert line.injected > 0


def recovered(point: str, nth: int, store: Path) -> bool:
    """Start and end a server that is to be killed at this point; say whether it was."""
    try:
        running = Server(store=store, python=[sys.executable, VICTIM, point, str(nth)])
    except AssertionError as ended:
        no_secret(str(ended))
        return True
    return running.stop() == victim.KILLED


def test_the_oracle_sees_a_secret_where_none_may_be() -> None:
    row = next(rows(1))
    for answer in ((503, {"Message": f"no {row.device_secret}"}), (503, {"DeviceSecret": ""}), (400, {"Traceback": 1})):
        with pytest.raises(AssertionError):
            Oracle().hear({"MAC-1": (0,)}, {"MAC-1": [answer]})
    with pytest.raises(AssertionError):
        Oracle().hear({"MAC-1": (1,)}, {"MAC-1": [(200, {"DeviceSecret": row.device_secret})]})
    with pytest.raises(AssertionError, match="is in"):
        no_secret(f"{row.device_secret} was printed")
    no_secret(f"{row.device_name} was given out, and {'0' * 64} is a digest")


def test_the_oracle_sees_what_is_lost_and_what_is_given_twice(tmp_path: Path, pool: Path) -> None:
    """A harness that cannot fail proves nothing."""
    running = Server("--import", str(pool), store=tmp_path / "store")
    oracle, talk = Oracle(), {"MAC-1": (0, 1), "MAC-2": (0,)}
    answers = Stations(running.port, talk, 1).wait()
    running.close()
    oracle.hear(talk, answers)
    assert oracle.judge(tmp_path / "store") == ([], [])
    name: List[str] = [got[0][1]["DeviceName"] for got in answers.values()]
    for wrong in ({"MAC-3": (0,)}, {"MAC-2": (0, 1)}):
        other = Oracle()
        other.hear(talk, answers)
        [(device_id, actions)] = wrong.items()
        for action in actions:
            other.sent(device_id, action)
            other.told(device_id, action, name[1] if action == 0 else "")
        verdict = other.judge(tmp_path / "store")
        assert verdict.lost
        assert bool(verdict.duplicated) == (device_id == "MAC-3")
    other.imported = 401
    assert len(other.judge(tmp_path / "store").lost) == 2
