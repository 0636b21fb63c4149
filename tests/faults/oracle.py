"""The one oracle of all faults: what a store must hold after what its stations were told."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import certtool
from certtool import (
    ALLOCATED,
    BURN_FAILED,
    BURN_SUCCEEDED,
    FAILED,
    REQUEST,
    UNALLOCATED,
    WRITTEN,
    CertToolError,
    Service,
    State,
    Store,
)
from tests.identities import PRODUCT
from tests.support import no_secret
from tests.wire import Reply

NOTHING = (UNALLOCATED, "")
Held = Tuple[int, str]  # a device's status and the name of its certificate; "" where nobody was told


class Tally:
    """A line of the table: what one kind of fault did."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.rounds = self.injected = self.acknowledged = self.lost = self.duplicated = 0

    def cells(self) -> Tuple[str, ...]:
        """The line as texts."""
        counts = (self.rounds, self.injected, self.acknowledged, self.lost, self.duplicated)
        return (self.fault, *(f"{count:,}" for count in counts))


NewTally = Callable[[str], Tally]  # the fixture `tally`: opens a line for this fault
TALLIES: List[Tally] = []  # the table, as far as this process knows


class Verdict(NamedTuple):
    """What is wrong with a recovered store, in sentences."""

    lost: Sequence[str]
    duplicated: Sequence[str]


def after(held: Held, action: int, name: str = "") -> Held:
    """What a device holds after an action took effect."""
    status, before = held
    if action == REQUEST:
        return (WRITTEN if status == WRITTEN else ALLOCATED, name or before)
    return ({BURN_SUCCEEDED: WRITTEN, BURN_FAILED: FAILED}[action], before)


class Oracle:
    """Follows what each device was told. What was sent and not answered may have happened or not.

    No answer shows a secret but that to a request, and no output of a server does: `hear` and `Server.wait` see to it.
    """

    def __init__(self) -> None:
        self.devices: Dict[str, Set[Held]] = {}
        self.limbo: Dict[str, List[int]] = {}  # actions that may be on the disk, though nothing here knows of them
        self.imported = 0
        self.acknowledged = 0

    def sent(self, device_id: str, action: int) -> None:
        """An action is on its way: it may take effect from now on, whatever the sender hears."""
        before = self.devices.setdefault(device_id, {NOTHING})
        self.devices[device_id] = before | {
            after(held, action) for held in before if action == REQUEST or held != NOTHING
        }

    def told(self, device_id: str, action: int, name: str = "") -> None:
        """The latest action that was sent was acknowledged, with this certificate's name if it is a request."""
        self.acknowledged += 1
        happened = {after(held, action, name) for held in self.devices[device_id]}
        self.devices[device_id] = {
            (status, name or known) for status, known in happened if known in ("", name) or not name
        }

        for unknown in self.limbo.get(device_id, ()):
            self.sent(device_id, unknown)

    def refused(self, device_id: str, held: Set[Held]) -> None:
        """The latest action was refused in a way that promises that nothing changed: `held` is as before."""
        self.devices[device_id] = held

    def hear(self, talk: Mapping[str, Sequence[int]], answers: Mapping[str, List[Reply]]) -> None:
        """Take in the answers that `Stations` got for their `talk`; the first unanswered action was perhaps sent."""
        for device_id, actions in talk.items():
            for action, (status, reply) in zip(actions, answers[device_id]):
                if (status, action) != (200, REQUEST):
                    no_secret(json.dumps(reply))
                    assert not {"DeviceSecret", "ProductSecret"} & set(reply)
                before = self.devices.get(device_id, {NOTHING})
                self.sent(device_id, action)
                if status == 200:
                    self.told(device_id, action, reply.get("DeviceName", ""))
                elif status == 503:
                    self.limbo.setdefault(device_id, []).append(action)
                else:
                    self.refused(device_id, before)
            if len(answers[device_id]) < len(actions):
                self.sent(device_id, actions[len(answers[device_id])])

    def judge(self, folder: Path, marks: Optional[Path] = None) -> Verdict:
        """Recover the store as a start does, and say what is wrong."""
        store, state = Store(str(folder), "oracle", marks=str(marks) if marks else None), State()
        with contextlib.closing(store):
            try:
                store.load(state)
            except CertToolError as error:
                no_secret(str(error))
                return Verdict([f"The store is refused: {error}"], [])
            return self._judge(Service(store, state))

    def _judge(self, service: Service) -> Verdict:
        lost, duplicated = [], []
        state = service.state
        self.limbo = {}
        if len(state.names) < self.imported:
            lost.append(f"{self.imported} were imported, {len(state.names)} are there")
        product = state.products.get(PRODUCT, certtool.Product(PRODUCT))
        if sum(product.counts) != len(product.names) or min(product.counts) < 0:
            lost.append(f"the counts {product.counts} are not of {len(product.names)} certificates")
        records = {record.device_id: (name, record) for name, record in self._records(service) if record.device_id}
        if len(records) != sum(record.device_id != "" for _, record in self._records(service)):
            duplicated.append("a device holds two certificates")
        if set(records) - set(self.devices):
            lost.append("a device that never asked holds a certificate")
        holders: Dict[str, str] = {}
        for device_id, possible in self.devices.items():
            name, status = ("", UNALLOCATED)
            if device_id in records:
                name, status = records[device_id][0], records[device_id][1].status
            if any(status == known and told in ("", name) for known, told in possible):
                self.devices[device_id] = {(status, name)}  # now it is certain
            else:
                lost.append(f"{device_id} is {certtool.STATUS_NAMES[status]} with {name!r}, not one of {possible}")
            for told in {told for _, told in possible if told}:  # also one that it was only told of
                if holders.setdefault(told, device_id) != device_id:
                    duplicated.append(f"{told} was given to {holders[told]} and {device_id}")
            if name and holders.setdefault(name, device_id) != device_id:
                duplicated.append(f"{name} is held by {device_id} and was given to {holders[name]}")
            if name and self._asked_again(service, device_id) != name:
                lost.append(f"{device_id} gets another certificate than {name}")
        return Verdict(lost, duplicated)

    @staticmethod
    def _records(service: Service) -> List[Tuple[str, certtool.Record]]:
        state = service.state
        return [(name, state.record(number)) for number, name in enumerate(state.names)]

    @staticmethod
    def _asked_again(service: Service, device_id: str) -> str:
        given = service.request(PRODUCT, device_id, "192.0.2.7", 1)  # never committed: the store stays as it is
        return given.certificate.credential.device_name


def judged(tally: Tally, oracle: Oracle, folder: Path, marks: Optional[Path] = None) -> None:
    """Count the oracle's verdict, and fail where there is anything to count."""
    verdict = oracle.judge(folder, marks)
    tally.lost += len(verdict.lost)
    tally.duplicated += len(verdict.duplicated)
    assert verdict == Verdict([], []), f"{tally.fault}, round {tally.rounds}: {verdict}"
