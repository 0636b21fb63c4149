"""Requests as the bytes that a device sends, and replies as the bytes that it gets."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

from tests.identities import PRODUCT

Reply = Tuple[int, Dict[str, Any]]


def post(body: Union[bytes, Mapping[str, Any]], *headers: str, path: str = "/", version: str = "HTTP/1.1") -> bytes:
    """Return a POST with a Content-Length, and nothing else that a firmware client would leave out."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} {version}", "Host: 192.168.1.10", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + content


def ask(device_id: Optional[str], *headers: str, action: int = 0, product: str = PRODUCT, **options: Any) -> bytes:
    """Return a request of the protocol, Action 0 unless told otherwise."""
    return post({"ProductKey": product, "DeviceID": device_id, "Action": action}, *headers, **options)


def split(data: bytes) -> List[Tuple[int, str, bytes]]:
    """Cut a stream into replies: HTTP status, head, body. Fail where it does not end with a whole one."""
    found = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, head
        text = head.decode()
        length = re.search(r"\r\nContent-Length: (\d+)", text)
        size = int(length[1]) if length else 0
        assert len(data) >= size, "a reply was cut short"
        found.append((int(text.split()[1]), text, data[:size]))
        data = data[size:]
    return found


def replies(data: bytes) -> List[Reply]:
    """Cut a stream into replies: HTTP status and the JSON object."""
    return [(status, json.loads(body)) for status, _, body in split(data)]


def has_ipv6() -> bool:
    """Say whether this PC can listen on IPv6."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False
