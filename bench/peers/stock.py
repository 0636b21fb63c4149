"""The peer: stock `ThreadingHTTPServer` that echoes JSON and saves nothing. `python -m bench.peers.stock PORT`."""

from __future__ import annotations

import http.server
import json
import sys


class Echo(http.server.BaseHTTPRequestHandler):
    """What its documentation suggests, made fair: HTTP/1.1, one write an answer, no Nagle, no log."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        """Answer with the object that came."""
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({**message, "Status": "OK"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:  # wrk would send once more on a connection that is not said to close
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class Stock(http.server.ThreadingHTTPServer):
    """With a backlog that lets all connections of the benchmark in."""

    request_queue_size = 1024

    def handle_error(self, *_: object) -> None:
        """A client that closes is no news."""


if __name__ == "__main__":
    Stock(("127.0.0.1", int(sys.argv[1])), Echo).serve_forever()
