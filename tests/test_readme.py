"""Each command that README.md shows runs as it stands there, and prints what it shows."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest

from tests.support import CERTTOOL, ROOT, SAMPLE, RunCerttool, StartServer, child_env, need

README = (ROOT / "README.md").read_text(encoding="utf-8")
LAMPS = "DeviceName,DeviceSecret\nlamp-0001,9f2c51d07be34a68\nlamp-0002,1.23E+15\nlamp 0003,5b0de1f2a9c84736\n"
BY_HAND = {  # what is shown indented, as text to type, and not run here
    "python -m tests": "is this very run",
    "python -m bench": "takes half an hour: test_bench runs its pieces",
}
VARYING = (
    (r"(http://127\.0\.0\.1:8000)  http://.*", r"\1"),
    (r"token=[\w-]{43}", "token=TOKEN"),
    (r"auto-[0-9a-f]{20}", "auto-ID"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", "TIME"),
    (r"in [\d.]+ s: [\d,]+ a second", "in S s: N a second"),
    (r"Latency in ms: p50 [\d.]+, p90 [\d.]+, p99 [\d.]+, max [\d.]+", "Latency in ms: ..."),
    (r"process \d+", "process PID"),
    (r"CRC32 by (pure Python|C extension)", "CRC32 by ROUTINE"),
)


def steps() -> Iterator[Tuple[str, str]]:
    """Yield each command of the console blocks with the output that stands below it."""
    for block in re.findall(r"^```console\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = step.partition("\n")
            yield command, output


def alike(text: str) -> List[str]:
    """Replace what differs from run to run."""
    for pattern, replacement in VARYING:
        text = re.sub(pattern, replacement, text)
    return text.strip().splitlines()


@pytest.mark.skipif(sys.platform == "win32", reason="the README's commands are written for a POSIX shell")
def test_every_command_of_the_readme_prints_what_the_readme_shows(tmp_path: Path) -> None:
    need("curl")
    folder = tmp_path / "factory"
    folder.mkdir()
    for file in (CERTTOOL, SAMPLE):
        shutil.copy(file, folder)
    (folder / "lamps.csv").write_text(LAMPS, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])

    def as_run(command: str) -> str:
        return command.replace("8000", port).replace("python ", f'"{sys.executable}" ', 1)

    def as_shown(text: str) -> List[str]:
        return alike(text.replace(port, "8000").replace(str(folder), "/factory"))

    (first, shown), *others = steps()
    assert first == "python certtool.py serve --import sample.csv"
    env = child_env(PYTHONUNBUFFERED="1")
    server = subprocess.Popen(
        "exec " + as_run(first.replace("serve", f"serve {port}", 1)),
        shell=True,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env=env,
    )
    try:
        assert server.stdout
        printed = "".join(server.stdout.readline() for _ in shown.splitlines())
        assert as_shown(printed) == as_shown(shown)
        for command, shown in others:
            done = subprocess.run(
                as_run(command),
                shell=True,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                env=env,
                check=False,
                timeout=60,
            )
            assert as_shown(done.stdout) == as_shown(shown), command
    finally:
        server.send_signal(signal.SIGINT)
        rest, _ = server.communicate(timeout=20)
    assert server.returncode == 0, rest
    assert "Stopped. Everything that was answered is on the disk." in rest


def test_every_indented_command_of_the_readme_is_known_to_these_tests() -> None:
    indented = re.findall(r"^    (python .*)$", README, re.MULTILINE)
    assert set(indented) == set(BY_HAND)


def test_what_a_windows_console_runs_instead_of_curl_does_the_same(
    server: StartServer, certtool: RunCerttool, store: Path
) -> None:
    [instead] = re.findall(r"`python certtool\.py (request .*)`", README)
    running = server("--import", SAMPLE)
    certtool(*instead.replace("8000", str(running.port)).split())
    asked, reported = (json.loads(sent) for sent in re.findall(r"^\$ curl -s -d '(.*)' ", README, re.MULTILINE))
    wanted = {"ProductKey": asked["ProductKey"], "DeviceID": reported["DeviceID"], "Status": "Written"}
    [row] = json.loads(certtool("query", "--status", "Written", "--format", "json", "--data", store).stdout)
    assert row.items() >= wanted.items()


def test_the_readme_names_every_subcommand_and_every_option_of_serve() -> None:
    def words_of_help(*arguments: str) -> str:
        command = [sys.executable, str(CERTTOOL), *arguments, "--help"]
        return subprocess.run(command, capture_output=True, encoding="utf-8", env=child_env(), check=True).stdout

    commands = set(re.findall(r"^    ([a-z-]+)(?: |$)", words_of_help(), re.MULTILINE))
    assert {"serve", "import", "query", "crc", "release", "void", "request", "verify", "accept-restore"} <= commands
    for command in commands:
        assert f"certtool.py {command}" in README, command
    for option in re.findall(r"^  (--[a-z-]+)", words_of_help("serve"), re.MULTILINE):
        assert option in README, option


@pytest.mark.skipif(sys.platform == "win32", reason="stunnel of a POSIX system")
def test_stunnel_before_the_server_gives_certificates_over_tls(
    server: StartServer, store: Path, tmp_path: Path, certtool: RunCerttool
) -> None:
    stunnel, openssl = need("stunnel"), need("openssl")
    running = server("--import", SAMPLE)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    [recipe] = re.findall(r"^```ini\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    config = recipe.replace("8443", f"127.0.0.1:{port}").replace("8000", str(running.port))
    (tmp_path / "stunnel.conf").write_text(config, encoding="utf-8")
    key = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    pem = str(tmp_path / "certtool.pem")
    subprocess.run([*key, "-keyout", pem, "-out", pem + ".crt"], check=True, capture_output=True)
    (tmp_path / "certtool.pem").write_text(Path(pem).read_text() + Path(pem + ".crt").read_text())
    context = ssl.create_default_context(cafile=pem + ".crt")
    body = b'{"ProductKey": "a1SampleWf0", "DeviceID": "over TLS", "Action": 0}'
    with subprocess.Popen([stunnel, "stunnel.conf"], cwd=tmp_path, stderr=subprocess.PIPE) as proxy:
        try:
            assert proxy.stderr
            while b"Configuration successful" not in proxy.stderr.readline():
                assert proxy.poll() is None
            connection = http.client.HTTPSConnection("localhost", port, timeout=20, context=context)
            connection.request("POST", "/", body)
            answer = connection.getresponse().read()
            connection.close()
        finally:
            proxy.terminate()
    assert b'"DeviceID": "over TLS"' in answer
    listed = certtool("query", "--device-id", "over TLS", "--data", store).stdout
    assert "127.0.0.1" in listed
