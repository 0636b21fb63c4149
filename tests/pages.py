"""A browser's side of the management page, as bytes: what the page itself sends."""

from __future__ import annotations

import json
import re
from typing import Any, Dict, Mapping, Optional, Tuple

from tests.support import Server


def link(server: Server) -> str:
    """Return the link that `serve` printed."""
    found = re.search(r"http://\S+/\?token=\S+", server.output)
    assert found, server.output
    return found[0]


class PageClient:
    """Holds the cookie and the key that the link was exchanged for; `ask` sends what the page's own script sends."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.host = f"127.0.0.1:{server.port}"
        response, _ = server.http("GET", link(server).partition(self.host)[2])
        assert response.status == 303, response.status
        self.cookie = str(response.getheader("Set-Cookie")).partition(";")[0]
        self.key = str(response.getheader("Location")).partition("#key=")[2]

    def headers(self, **changes: Optional[str]) -> Dict[str, str]:
        """Return the headers of a request of the page, with changes; None leaves one out."""
        ours = {"Cookie": self.cookie, "Certtool-Key": self.key, "Origin": f"http://{self.host}"}
        ours["Content-Type"] = "application/json"
        changed = {**ours, **{name.replace("_", "-"): value for name, value in changes.items()}}
        return {name: value for name, value in changed.items() if value is not None}

    def ask(self, operation: str, fields: Mapping[str, Any], **headers: Optional[str]) -> Tuple[int, Dict[str, Any]]:
        """Post to /certtool/OPERATION."""
        return self.server.post(fields, f"/certtool/{operation}", headers=self.headers(**headers))

    def upload(self, name: str, data: bytes, **options: Any) -> Tuple[int, Dict[str, Any]]:
        """Hand over an identity file; the answer comes when all of it is imported."""
        head = json.dumps({"options": options, "files": [[name, len(data)]]}).encode()
        headers = self.headers(Content_Type="application/octet-stream")
        return self.server.post(head + b"\n" + data, "/certtool/import", headers=headers, timeout=100)

    def get(self, path: str, **headers: Optional[str]) -> Tuple[int, bytes]:
        """Get a path with the cookie."""
        ours = self.headers(Certtool_Key=None, Origin=None, Content_Type=None, **headers)
        response, body = self.server.http("GET", path, headers=ours)
        return response.status, body
