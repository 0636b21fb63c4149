"""The server and `certtool.py crc` against the vectors that both SDKs are tested with."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Optional

import pytest

from tests.support import SAMPLE, RunCerttool, Server, StartServer
from tests.vectorset import Answer, Play, Vector, content, load, name_of

pytestmark = pytest.mark.usefixtures("fast")


def ask(server: Server, product_key: str, device_id: Optional[str], action: int) -> Answer:
    http, reply = server.post({"ProductKey": product_key, "DeviceID": device_id, "Action": action})
    return Answer(reply["Status"], reply, http)


@pytest.mark.parametrize("vector", load("payloads.json"), ids=name_of)
def test_the_checksum_of_a_payload_is_the_one_that_devices_compute(vector: Vector, certtool: RunCerttool) -> None:
    fields = [vector[name] for name in ("pk", "dn", "ds", "ps", "product_id")]
    assert zlib.crc32("".join(fields).encode()) == vector["crc32_int"] == int(vector["crc32"], 16)
    arguments = fields if fields[4] else fields[:4]
    assert certtool("crc", "--quiet", "--", *arguments).stdout.split() == [vector["crc32"]]
    assert certtool("crc", "--quiet", "--format", "int", "--", *arguments).stdout.split() == [str(vector["crc32_int"])]


def test_every_good_request_is_served_and_every_bad_one_refused_and_not_recorded(
    server: StartServer, store: Path
) -> None:
    running = server("--import", SAMPLE)
    journal = store / "journal.csv"
    for vector in load("requests.json"):
        before = journal.read_bytes()
        http, reply = running.post(content(vector))
        expected = (vector["http"], vector["status"], vector.get("device", reply.get("DeviceID")))
        assert (http, reply.get("Status"), reply.get("DeviceID")) == expected, vector["name"]
        if vector["status"] == "OK":
            assert reply["DeviceID"], vector["name"]
        else:
            assert set(reply) == {"Status", "Message"}, vector["name"]
            assert reply["Message"], vector["name"]
            assert journal.read_bytes() == before, vector["name"]


def test_a_request_is_not_echoed_into_its_refusal(server: StartServer) -> None:
    running = server("--import", SAMPLE)
    for vector in load("requests.json"):
        _, reply = running.post(content(vector))
        if reply["Status"] != "OK":
            assert "a1SampleWf0" not in json.dumps(reply), vector["name"]


@pytest.mark.parametrize("killed", [False, True], ids=["kept running", "killed before every report"])
@pytest.mark.parametrize("script", load("states.json"), ids=name_of)
def test_every_row_of_the_state_table(
    script: Vector, killed: bool, store: Path, server: StartServer, certtool: RunCerttool
) -> None:
    Play(script, ask, killed, store, server, certtool)
