"""A server that misbehaves in one chosen way, for tests of clients.

    with hostile.serve("cut body") as server:
        ...  # point a client at 127.0.0.1:server.port
    assert len(server.requests) == 1

What it would say if it behaved is `certificate(request)`: right CRC32, the DeviceID that was asked with. `KINDS` says
what each kind does, `VERDICT` what a correct client makes of it: SUCCEEDS, it takes the certificate; FAILS, it must
refuse; EITHER, both are correct, but it neither crashes nor takes anything else than that certificate.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import socketserver
import struct
import sys
import threading
import zlib
from typing import Any, Callable, Dict, Iterable, Iterator, List, Tuple, Union

SUCCEEDS, FAILS, EITHER = "succeeds", "fails", "either"

RESET = "reset"  # a step of a script: drop the connection with RST
CLOSE = "close"  # a step: close it, also where the script's kind would keep it
WAIT = 0.05  # seconds between the pieces of a slow kind

Step = Union[bytes, float, str]  # bytes are sent, a number is waited for
Script = Callable[["Hostile", Dict[str, Any]], Iterable[Step]]


def certificate(request: Dict[str, Any], **changes: Any) -> Dict[str, Any]:
    """The reply of a server that behaves, with some fields changed before (not after) the checksum is taken."""
    if request.get("Action"):
        return {"ProductKey": request.get("ProductKey"), "DeviceID": request.get("DeviceID"), "Status": "OK", **changes}
    reply = {
        "ProductKey": request.get("ProductKey", "a1SampleWf0"),
        "ProductSecret": "HostileSecret0",
        "DeviceSecret": "HostileDeviceSecret0",
        "CRC32": "",
        "DeviceName": "HostileDevice",
        "DeviceID": request.get("DeviceID") or "made-up-by-the-server",
        "Status": "OK",
        **changes,
    }
    names = ("ProductKey", "DeviceName", "DeviceSecret", "ProductSecret")
    reply["CRC32"] = f"{zlib.crc32(''.join(reply[name] for name in names).encode()):08X}"
    return {**reply, **{name: changes[name] for name in ("CRC32",) if name in changes}}


def http(body: bytes, status: str = "200 OK", headers: str = "", version: str = "1.1", length: Any = None) -> bytes:
    """A whole reply; `length` is what it claims to have, "" for no Content-Length."""
    head = f"HTTP/{version} {status}\r\nContent-Type: application/json\r\n{headers}"
    if length != "":
        head += f"Content-Length: {len(body) if length is None else length}\r\n"
    return head.encode() + b"\r\n" + body


def chunked(body: bytes) -> bytes:
    pieces = (body[at : at + 40] for at in range(0, len(body), 40))
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


class Hostile(socketserver.ThreadingTCPServer):
    """One kind on a free port, and `elsewhere`, a port that no client may follow a redirect to."""

    allow_reuse_address = False
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, kind: str, host: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), _Connection)
        _, _, self.script, self.reads = _TABLE[kind]
        self.port: int = self.server_address[1]
        self.elsewhere = self.port
        self.requests: List[bytes] = []  # bodies, in the order in which they arrived whole
        self.heads: List[bytes] = []
        self.connections = 0
        self.ended = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no error; its test says what it should have done."""


class _Connection(socketserver.BaseRequestHandler):
    server: Hostile
    request: socket.socket

    def handle(self) -> None:
        self.server.connections += 1
        with contextlib.suppress(OSError):
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            request = self._read() if self.server.reads else {}
            for step in self.server.script(self.server, request):
                if self.server.ended.is_set() or step == CLOSE:
                    break
                if isinstance(step, bytes):
                    self.request.sendall(step)
                elif step == RESET:
                    self.request.setsockopt(
                        socket.SOL_SOCKET,
                        socket.SO_LINGER,
                        struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0),
                    )
                    self.request.close()
                    return
                elif isinstance(step, float):
                    self.server.ended.wait(step)

    def finish(self) -> None:
        """Close like a server that has said all: the reply is not destroyed by what it did not read."""
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_WR)

    def _read(self) -> Dict[str, Any]:
        """Read one request; {} where it is not what a client of ours sends."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._receive()
        head, _, body = data.partition(b"\r\n\r\n")
        lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        while len(body) < int(lengths[0]):
            body += self._receive()
        self.server.heads.append(head)
        self.server.requests.append(body)
        request = json.loads(body.decode())
        return request if isinstance(request, dict) else {}

    def _receive(self) -> bytes:
        data = self.request.recv(65536)
        if not data:
            raise ConnectionError("the client left before its request was whole")
        return data


# Scripts: what a kind does once it has the request. Those that never end are ended by the client's leaving.


def _forever(*first: bytes, piece: bytes = b"", wait: float = WAIT) -> Iterator[Step]:
    yield from first
    while True:
        yield wait
        yield piece


def _good(request: Dict[str, Any], **changes: Any) -> bytes:
    return json.dumps(certificate(request, **changes)).encode()


def _body(make: Callable[[Dict[str, Any]], bytes], **form: Any) -> Script:
    return lambda _, r: [http(make(r), **form)]


def _fixed(*steps: Step) -> Script:
    return lambda _, _r: steps


def _changed(**changes: Any) -> Script:
    return _body(lambda request: _good(request, **changes))


def _drip(_: Hostile, _request: Dict[str, Any]) -> Iterator[Step]:
    yield from _forever(b"HTTP/1.1 200 OK\r\nX-Pad: ", piece=b"a")


def _drip_body(_: Hostile, _request: Dict[str, Any]) -> Iterator[Step]:
    yield from _forever(http(b"{", length=60000), piece=b" ")


def _byte_by_byte(_: Hostile, request: Dict[str, Any]) -> Iterator[Step]:
    for byte in http(_good(request)):
        yield bytes([byte])
        yield 0.0005


def _cut(where: Callable[[bytes], int], then: Step) -> Script:
    def script(_: Hostile, request: Dict[str, Any]) -> Iterable[Step]:
        reply = http(_good(request))
        return [reply[: where(reply)], 0.05, then]

    return script


def _redirect(status: str) -> Script:
    def script(server: Hostile, _request: Dict[str, Any]) -> Iterable[Step]:
        location = f"Location: http://127.0.0.1:{server.elsewhere}/\r\n"
        return [http(b"", status=status, headers=location)]

    return script


def _then_good(first: Iterable[Step]) -> Script:
    return lambda s, r: [http(_good(r))] if s.connections > 1 else first


def _refusal(http_status: str, code: str) -> bytes:
    return http(json.dumps({"Status": code, "Message": "A sentence."}).encode(), status=http_status)


def _duplicate(request: Dict[str, Any]) -> bytes:
    return _good(request)[:-1] + b', "DeviceName": "AnotherDevice"}'


def _with_field(text: bytes) -> Callable[[Dict[str, Any]], bytes]:
    return lambda request: _good(request)[:-1] + b', "Extra": ' + text + b"}"


def _replaced(old: bytes, new: bytes) -> Script:
    return _body(lambda request: _good(request).replace(old, new))


_HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Welcome to the guest network</body></html>"
_ERROR = json.dumps({"Status": "InternalError", "Message": "A sentence."}).encode()

# name: (what it does, verdict, script, whether it reads the request first)
_TABLE: Dict[str, Tuple[str, str, Script, bool]] = {
    # Behaves, in every form that HTTP allows
    "plain": ("Content-Length, then closes", SUCCEEDS, _body(_good), True),
    "keep-alive": (
        "keeps the connection open after the reply",
        SUCCEEDS,
        lambda _, r: _forever(http(_good(r), headers="Connection: keep-alive\r\n")),
        True,
    ),
    "close": ("says Connection: close and closes", SUCCEEDS, _body(_good, headers="Connection: close\r\n"), True),
    "HTTP/1.0": ("answers in HTTP/1.0", SUCCEEDS, _body(_good, version="1.0"), True),
    "CRC32 as a number": (
        "sends the checksum as older servers do",
        SUCCEEDS,
        _body(lambda r: json.dumps({**certificate(r), **_number(r)}).encode()),
        True,
    ),
    "byte by byte": ("sends each byte in its own packet", SUCCEEDS, _byte_by_byte, True),
    "slow but in time": (
        "pauses a moment in head and body",
        SUCCEEDS,
        lambda _, r: [
            http(_good(r))[:20],
            0.1,
            http(_good(r))[20:150],
            0.1,
            http(_good(r))[150:],
        ],
        True,
    ),
    "many headers": (
        "sends 30 headers, some long",
        SUCCEEDS,
        _body(_good, headers=f"X-Some: {'a' * 60}\r\n" * 30),
        True,
    ),
    "no Content-Length": ("ends the reply by closing", EITHER, _body(_good, length="", version="1.0"), True),
    "chunked valid": (
        "chunked, complete",
        EITHER,
        lambda _, r: [http(chunked(_good(r)) + b"0\r\n\r\n", headers="Transfer-Encoding: chunked\r\n", length="")],
        True,
    ),
    "100 Continue first": (
        "sends an interim reply before the reply",
        EITHER,
        lambda _, r: [b"HTTP/1.1 100 Continue\r\n\r\n", http(_good(r))],
        True,
    ),
    "bare LF": ("ends its lines with LF alone", EITHER, lambda _, r: [http(_good(r)).replace(b"\r\n", b"\n")], True),
    "garbage after the reply": (
        "sends on after Content-Length",
        EITHER,
        lambda _, r: [http(_good(r)) + b"\0x" * 99],
        True,
    ),
    "two replies": ("answers twice", EITHER, lambda _, r: [http(_good(r)) + http(_good(r, DeviceName="Other"))], True),
    "early reply": (
        "answers without having read the request",
        EITHER,
        lambda _, _r: [http(_good({"ProductKey": "a1SampleWf0", "DeviceID": "MAC-0001"})), 0.2],
        False,
    ),
    # Slow, silent, gone
    "silent": ("reads the request and says nothing", FAILS, lambda _, _r: _forever(), True),
    "silent accept": ("accepts, reads and says nothing", FAILS, lambda _, _r: _forever(), False),
    "slow start": ("answers after a minute", FAILS, lambda _, r: [60.0, http(_good(r))], True),
    "slow drip": ("drips an endless header", FAILS, _drip, True),
    "slow drip body": ("drips an endless body", FAILS, _drip_body, True),
    "no reply": ("closes without a byte", FAILS, _fixed(CLOSE), True),
    "closes at once": ("closes before it read", FAILS, _fixed(CLOSE), False),
    "reset": ("resets once it has the request", FAILS, _fixed(RESET), True),
    "reset at once": ("resets before it read", FAILS, _fixed(RESET), False),
    "reset in the body": ("resets in the middle of the body", FAILS, _cut(lambda reply: len(reply) - 40, RESET), True),
    "cut body": ("closes in the middle of the body", FAILS, _cut(lambda reply: len(reply) - 40, CLOSE), True),
    "cut last byte": ("closes before the last byte", FAILS, _cut(lambda reply: len(reply) - 1, CLOSE), True),
    "cut head": ("closes in the middle of the head", FAILS, _cut(lambda _: 30, CLOSE), True),
    "cut before the body": ("closes after the head", FAILS, _cut(lambda reply: reply.index(b"{"), CLOSE), True),
    # Too much
    "huge body": (
        "sends 64 MB",
        FAILS,
        lambda _, r: [http(b"", length=64 << 20), *[b" " * 65536] * 1024, _good(r)],
        True,
    ),
    "huge body without a length": (
        "sends spaces for ever",
        FAILS,
        lambda _, _r: _forever(http(b"", length="", version="1.0"), piece=b" " * 65536, wait=0.0),
        True,
    ),
    "huge header": ("sends a header of 1 MB", FAILS, _body(_good, headers="X-Pad: " + "a" * (1 << 20) + "\r\n"), True),
    "endless headers": (
        "sends headers for ever",
        FAILS,
        lambda _, _r: _forever(b"HTTP/1.1 200 OK\r\n", piece=b"X-Pad: a\r\n" * 5000, wait=0.0),
        True,
    ),
    "chunked endless": (
        "sends chunks for ever",
        FAILS,
        lambda _, _r: _forever(
            http(b"", headers="Transfer-Encoding: chunked\r\n", length=""),
            piece=b"1000\r\n" + b" " * 4096 + b"\r\n",
            wait=0.0,
        ),
        True,
    ),
    "long fields": ("gives a DeviceName of 5,000 characters", FAILS, _changed(DeviceName="D" * 5000), True),
    "long DeviceID": ("gives a DeviceID of 5,000 characters", FAILS, _changed(DeviceID="D" * 5000), True),
    "field of 65 characters": (
        "gives a DeviceSecret that is one too long",
        FAILS,
        _changed(DeviceSecret="D" * 65),
        True,
    ),
    "deep JSON": (
        "nests 20,000 arrays in an unknown field",
        EITHER,
        _body(_with_field(b"[" * 20000 + b"]" * 20000)),
        True,
    ),
    "deep JSON never closed": ("nests 30,000 arrays", FAILS, _body(lambda _: b'{"Extra": ' + b"[" * 30000), True),
    # Framing that lies
    "Content-Length too large": ("claims 10 bytes more and closes", FAILS, lambda _, r: [_claims(r, 10)], True),
    "Content-Length too small": ("claims 10 bytes fewer", FAILS, lambda _, r: [_claims(r, -10)], True),
    "Content-Length negative": ("claims -1 bytes", EITHER, _body(_good, length=-1), True),
    "Content-Length beyond 64 bits": ("claims 10^30 bytes", EITHER, _body(_good, length=10**30), True),
    "Content-Length no number": ("claims 'many' bytes", EITHER, _body(_good, length="many"), True),
    "two Content-Lengths": ("claims two different lengths", FAILS, _body(_good, headers="Content-Length: 5\r\n"), True),
    "chunked cut": (
        "chunked, and closes before the last chunk",
        FAILS,
        lambda _, r: [http(chunked(_good(r))[:90], headers="Transfer-Encoding: chunked\r\n", length="")],
        True,
    ),
    "chunked with a bad size": (
        "chunked, and a size is no number",
        FAILS,
        lambda _, r: [http(b"zz\r\n" + _good(r), headers="Transfer-Encoding: chunked\r\n", length="")],
        True,
    ),
    "not HTTP": ("speaks another protocol", FAILS, _fixed(b"SSH-2.0-OpenSSH_9.2\r\n", 0.05), True),
    "HTTP/0.9": ("sends the body alone", FAILS, lambda _, r: [_good(r)], True),
    "gzip": (
        "compresses, which nobody asked for",
        FAILS,
        _body(lambda r: gzip.compress(_good(r)), headers="Content-Encoding: gzip\r\n"),
        True,
    ),
    # Says something else
    "redirect": ("answers 302 with another port", FAILS, _redirect("302 Found"), True),
    "redirect 307": ("answers 307, which keeps the POST", FAILS, _redirect("307 Temporary Redirect"), True),
    "HTML": ("is a router's sign-in page", FAILS, _fixed(http(_HTML)), True),
    "not JSON": ("answers OK", FAILS, _fixed(http(b"OK")), True),
    "empty body": ("answers 200 with nothing", FAILS, _fixed(http(b"")), True),
    "no body": ("answers 204", FAILS, _fixed(http(b"", status="204 No Content", length="")), True),
    "JSON array": ("puts the certificate into an array", FAILS, _body(lambda r: b"[" + _good(r) + b"]"), True),
    "JSON null": ("answers null", FAILS, _fixed(http(b"null")), True),
    "JSON cut short": ("sends half a JSON text, with its length", FAILS, _body(lambda r: _good(r)[:120]), True),
    "JSON twice": ("sends two JSON texts in one body", FAILS, _body(lambda r: _good(r) * 2), True),
    "duplicate keys": ("names DeviceName twice, the checksum is of the first", EITHER, _body(_duplicate), True),
    "invalid UTF-8": ("puts FF into a name", FAILS, _replaced(b"HostileDevice", b"Hostile\xffDevice"), True),
    "NUL bytes": ("puts NUL into a name", FAILS, _replaced(b"HostileDevice", b"Hostile\0Device"), True),
    "escaped NUL": ("puts an escaped NUL into a name, checksum right", FAILS, _changed(DeviceName="Host\0ile"), True),
    "control characters": (
        "puts a line end into a name, checksum right",
        FAILS,
        _changed(DeviceName="Host\r\nile"),
        True,
    ),
    "UTF-16": ("sends the body in UTF-16", FAILS, _body(lambda r: _good(r).decode().encode("utf-16")), True),
    "byte order mark": ("puts a BOM before the body", EITHER, _body(lambda r: b"\xef\xbb\xbf" + _good(r)), True),
    "wrong CRC": ("sends a checksum that does not fit", FAILS, _changed(CRC32="00000000"), True),
    "no CRC": ("sends null for the checksum", FAILS, _changed(CRC32=None), True),
    "bit flip": (
        "a character of the secret is another",
        FAILS,
        _replaced(b"HostileDeviceSecret0", b"HostileDeviceSecret1"),
        True,
    ),
    "another product": ("gives a certificate of another product", FAILS, _changed(ProductKey="a1Another"), True),
    "another device": ("answers with another DeviceID", FAILS, _changed(DeviceID="MAC-9999"), True),
    "no Status": ("leaves Status out", FAILS, _replaced(b'"Status": "OK"', b'"State": "OK"'), True),
    "refusal with 200": ("refuses, with HTTP status 200", FAILS, _fixed(http(_ERROR)), True),
    "certificate with 500": ("sends a certificate, with HTTP status 500", FAILS, _body(_good, status="500 Oops"), True),
    "status 404": ("knows no such product", FAILS, _fixed(_refusal("404 Not Found", "UnknownProduct")), True),
    "status 410": ("has no certificate left", FAILS, _fixed(_refusal("410 Gone", "PoolExhausted")), True),
    "status 500": ("fails, in JSON", FAILS, _fixed(http(_ERROR, status="500 Internal Server Error")), True),
    "status 502 HTML": ("is a gateway's error page", FAILS, _fixed(http(_HTML, status="502 Bad Gateway")), True),
    # Well the second time: a client that retries succeeds (with a DeviceID: only then a retry wastes nothing)
    "status 503 then OK": (
        "cannot save the first time",
        SUCCEEDS,
        _then_good([_refusal("503 Service Unavailable", "StoreUnavailable")]),
        True,
    ),
    "reset then OK": ("resets the first time", SUCCEEDS, _then_good([RESET]), True),
    "cut then OK": (
        "closes in the middle the first time",
        SUCCEEDS,
        _then_good([b"HTTP/1.1 200 OK\r\nConte", CLOSE]),
        True,
    ),
}


def _number(request: Dict[str, Any]) -> Dict[str, Any]:
    crc = certificate(request).get("CRC32")
    return {"CRC32": int(crc, 16)} if crc else {}


def _claims(request: Dict[str, Any], more: int) -> bytes:
    body = _good(request)
    return http(body, length=len(body) + more)


KINDS: Dict[str, str] = {name: what for name, (what, _, _, _) in _TABLE.items()}
VERDICT: Dict[str, str] = {name: verdict for name, (_, verdict, _, _) in _TABLE.items()}


@contextlib.contextmanager
def serve(kind: str, host: str = "127.0.0.1") -> Iterator[Hostile]:
    """Serve one kind while the block runs; `requests`, `heads` and `connections` stay readable after it."""
    with Hostile(kind, host) as server, Hostile("plain", "127.0.0.1") as elsewhere:
        server.elsewhere = elsewhere.port
        for each in (server, elsewhere):
            threading.Thread(target=each.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server
        finally:
            server.ended.set()
            for each in (server, elsewhere):
                each.shutdown()
    assert not elsewhere.connections, "the client followed a redirect to another server"
