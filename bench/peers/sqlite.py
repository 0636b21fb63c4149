"""The peer: certificates in SQLite by a primary key, durable (WAL, synchronous=FULL), neither validated nor summed.

`python -m bench.peers.sqlite DATABASE import FILE | start | name PRODUCT NAME | device PRODUCT ID | allocate-all`
"""

from __future__ import annotations

import csv
import sqlite3
import sys
from typing import List, Optional, Tuple

SCHEMA = """
    CREATE TABLE IF NOT EXISTS certificates (
        product TEXT, name TEXT, secret TEXT, product_secret TEXT, product_id TEXT,
        status INTEGER DEFAULT 0, device TEXT, station TEXT, time TEXT, PRIMARY KEY (product, name)
    );
    CREATE UNIQUE INDEX IF NOT EXISTS devices ON certificates (product, device) WHERE device IS NOT NULL;
"""
FIND = "SELECT product, name, secret, product_secret, product_id, status FROM certificates WHERE"


def connect(database: str) -> sqlite3.Connection:
    """Open a database, for one thread at a time; what is committed survives a power cut."""
    connection = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.executescript(SCHEMA)
    return connection


def import_file(connection: sqlite3.Connection, file: str) -> None:
    """Add all rows of an identity file in one transaction."""
    with open(file, newline="", encoding="utf-8") as lines:
        rows = (row[:5] for row in csv.reader(lines))
        next(rows)  # the header
        connection.execute("BEGIN IMMEDIATE")
        insert = "INSERT INTO certificates (product, name, secret, product_secret, product_id) VALUES (?, ?, ?, ?, ?)"
        connection.executemany(insert, rows)
        connection.execute("COMMIT")


def start(connection: sqlite3.Connection) -> List[Tuple[str, int, int]]:
    """Return what a server prints when it starts: product, free and all certificates."""
    ask = "SELECT product, sum(status = 0), count(*) FROM certificates GROUP BY product"
    return connection.execute(ask).fetchall()


def find(connection: sqlite3.Connection, where: str, *values: str) -> Optional[Tuple[object, ...]]:
    """Return one certificate."""
    row: Optional[Tuple[object, ...]] = connection.execute(f"{FIND} {where}", values).fetchone()
    return row


def main(database: str, what: str, *values: str) -> None:
    """Do one thing, as a process of its own that can be measured."""
    connection = connect(database)
    if what == "import":
        import_file(connection, *values)
    elif what == "start":
        print(start(connection))
    elif what == "allocate-all":
        connection.execute("UPDATE certificates SET status = 1, device = 'all-' || (rowid - 1)")
    else:
        found = find(connection, f"product = ? AND {what} = ?", *values)
        assert found
        print(*found)
    connection.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
