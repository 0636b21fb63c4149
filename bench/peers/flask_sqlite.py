"""The peer: durable allocation by Flask and waitress over SQLite, one transaction a request.

`python -m bench.peers.flask_sqlite PORT DATABASE FILE`
"""

from __future__ import annotations

import logging
import sys
import zlib
from typing import Any, Dict, Tuple

import flask
import waitress

from bench.peers import sqlite

FREE = "CREATE INDEX IF NOT EXISTS free ON certificates (product) WHERE status = 0"
THREADS = 1  # with more it is slower, and some requests wait long: SQLite lets one write at a time


def main(port: int, database: str, file: str) -> None:
    """Import the file and serve."""
    connection = sqlite.connect(database)

    def allocate(product: str, device: str) -> Tuple[Dict[str, Any], int]:
        found = sqlite.find(connection, "product = ? AND device = ?", product, device)
        if not found:
            with connection:  # commits, or rolls back
                connection.execute("BEGIN IMMEDIATE")
                found = sqlite.find(connection, "product = ? AND device = ?", product, device)
                found = found or sqlite.find(connection, "product = ? AND status = 0 LIMIT 1", product)
                if not found:
                    return {"Status": "UnknownProduct", "Message": "No certificate of this product is left."}, 404
                taken = "UPDATE certificates SET status = 1, device = ?, station = ?, time = datetime('now')"
                where = "WHERE product = ? AND name = ?"
                connection.execute(f"{taken} {where}", (device, flask.request.remote_addr, product, found[1]))
        _, name, secret, product_secret, product_id, _ = map(str, found)
        checksum = zlib.crc32((product + name + secret + product_secret + product_id).encode())
        return {
            "ProductKey": product,
            "ProductSecret": product_secret,
            "DeviceSecret": secret,
            "CRC32": f"{checksum:08X}",
            "DeviceName": name,
            "DeviceID": device,
            "Status": "OK",
        }, 200

    def report(product: str, device: str, status: int) -> Tuple[Dict[str, Any], int]:
        change = "UPDATE certificates SET status = ?, time = datetime('now') WHERE product = ? AND device = ?"
        if not connection.execute(change, (status, product, device)).rowcount:
            return {"Status": "UnknownDevice", "Message": "This DeviceID holds no certificate."}, 404
        return {"ProductKey": product, "DeviceID": device, "Status": "OK"}, 200

    def answer() -> Tuple[Dict[str, Any], int]:
        message = flask.request.get_json(force=True)
        try:
            product, device, action = message["ProductKey"], message["DeviceID"], message["Action"]
        except KeyError:
            return {"Status": "BadRequest", "Message": "A field is missing."}, 400
        return report(product, device, 1 + action) if action else allocate(product, device)

    sqlite.import_file(connection, file)
    connection.execute(FREE)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns whenever all threads are busy
    app = flask.Flask("bench")
    app.add_url_rule("/", view_func=answer, methods=["POST"])
    waitress.serve(app, host="127.0.0.1", port=port, threads=THREADS, connection_limit=1024, backlog=1024, _quiet=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
