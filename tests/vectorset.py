"""The vectors of tests/vectors (its README says what they mean), and how a script of states.json is played."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from tests.support import ROOT, SAMPLE, RunCerttool, Server, StartServer, listed

Vector = Dict[str, Any]


def load(name: str) -> List[Vector]:
    """Return the vectors of one file."""
    vectors = json.loads((ROOT / "tests" / "vectors" / name).read_text("utf-8"))
    assert isinstance(vectors, list), name
    return vectors


def name_of(vector: Vector) -> str:
    """Return what a parametrized test shows of a vector."""
    return str(vector["name"])


def content(vector: Vector) -> bytes:
    """Return the bytes of a body or reply."""
    if "hex" in vector:
        return bytes.fromhex(vector["hex"])
    if "parts" in vector:
        return "".join(text * times for text, times in vector["parts"]).encode()
    text = vector["text"]
    assert isinstance(text, str)
    return text.encode()


class Answer(NamedTuple):
    """What a client made of one exchange; `http` where it tells."""

    status: str
    fields: Dict[str, Any]
    http: Optional[int] = None


# Ask the server with this ProductKey, DeviceID and Action.
Ask = Callable[[Server, str, Optional[str], int], Answer]


class Play:
    """Plays one script with a client. With `killed`, the server is killed and started anew before every report."""

    def __init__(
        self, script: Vector, ask: Ask, killed: bool, store: Path, start: StartServer, run: RunCerttool
    ) -> None:
        self.ask, self.killed, self.store, self.start, self.run = ask, killed, store, start, run
        self.options: List[str] = script["serve"]
        self.kept: Dict[str, str] = {}
        with SAMPLE.open(encoding="utf-8", newline="") as file:
            self.rows = list(csv.DictReader(file))[: script["pool"]]
        identities = store.parent / "identities.csv"
        with identities.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        run("import", identities, "--data", store)
        self.server: Server = start(*self.options)
        for number, step in enumerate(script["steps"]):
            if killed and step["do"] == "report":
                self.server.kill()
                self.server = start(*self.options)
            try:
                getattr(self, "_" + step["do"])(step)
            except AssertionError as error:
                raise AssertionError(f"{script['name']}, step {number}: {step}") from error

    def _exchange(self, step: Vector, action: int) -> Answer:
        device = self.kept[step["kept"]] if "kept" in step else step["device"]
        answer = self.ask(self.server, self.rows[0]["ProductKey"], device, action)
        assert answer.status == step["status"], answer
        assert answer.http in (None, step["http"]), answer
        if step["status"] == "OK":
            assert answer.fields["ProductKey"] == self.rows[0]["ProductKey"]
            assert device in (None, answer.fields["DeviceID"]), answer
        return answer

    def _request(self, step: Vector) -> None:
        fields = self._exchange(step, 0).fields
        if "certificate" in step:
            row = self.rows[step["certificate"]]
            assert [fields[name] for name in ("DeviceName", "DeviceSecret", "ProductSecret")] == [
                row[name] for name in ("DeviceName", "DeviceSecret", "ProductSecret")
            ]
        if "keep" in step:
            assert fields["DeviceID"]
            assert fields["DeviceID"] not in self.kept.values()
            self.kept[step["keep"]] = fields["DeviceID"]

    def _report(self, step: Vector) -> None:
        self._exchange(step, {"succeeded": 1, "failed": 2}[step["burn"]])

    def _operate(self, step: Vector) -> None:
        force = ["--force"] if step.get("force") else []
        name = self.rows[step["certificate"]]["DeviceName"]
        command = [step["do"], name, "--reason", "a vector", *force, "--data", self.store]
        self.run(*command, ok=step["exit"])

    _release = _void = _operate

    def _query(self, step: Vector) -> None:
        name = self.rows[step["certificate"]]["DeviceName"]
        [found] = listed(self.run, self.store, name)
        assert (found["Status"], found["DeviceID"] or "") == (step["state"], step["device"])
