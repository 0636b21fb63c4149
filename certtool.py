#!/usr/bin/env python3
"""certtool hands out each device certificate of a pool once, and never forgets to whom.

    python certtool.py serve --import identities.csv     give certificates to devices and programmers over HTTP
    python certtool.py import identities.csv             add certificates to the store, also beside a running server
    python certtool.py query [DEVICE_NAME]               what became of a certificate
    python certtool.py release | void DEVICE_NAME        what only a person may decide
    python certtool.py crc PK DN DS PS [PRODUCT_ID]      the checksum that devices verify

This one file is the whole product: copy it alone to a PC with CPython 3.8 or newer, nothing installed.

Map of the sections; each uses only those above it, and the pure ones know no file, socket or clock:

     2. Limits and constants                     8. Store: lock, import files, journal, recovery
     3. Errors                                   9. Service: decide, record, commit
     4. CRC32                                   10. Protocol messages (pure)
     5. Credential and state machine (pure)     11. HTTP server
     6. Identity-file reader (pure)             12. Console
     7. Journal codec (pure)                    13. Command line

The flow of one request. `CertServer` (11) is one thread that turns a loop. In a turn it reads every ready connection;
each whole request becomes a message (10), the service (9) asks the state machine (5) to `decide`, encodes the event as a
journal line (7) and applies it to the state. At the end of the turn the store (8) writes all lines with one write and one
fsync: a group commit. Only then do the replies of the turn leave. State is never saved: it is the import files plus the
journal, replayed through the same `apply`, so that the live and the recovered state cannot differ.
"""

from __future__ import annotations

import argparse
import bisect
import codecs
import contextlib
import csv
import errno
import functools
import getpass
import hashlib
import hmac
import http.client
import http.server
import io
import json
import os
import re
import secrets
import selectors
import signal
import socket
import sys
import sysconfig
import threading
import time
from array import array
from collections import deque
from datetime import datetime, timedelta, timezone
from json.encoder import encode_basestring_ascii as quote
from typing import (
    IO,
    Any,
    BinaryIO,
    Callable,
    Deque,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Tuple,
    Type,
    Union,
)

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__version__ = "1.0.0"

# ======================================================================================================================
# 2. Limits and constants
# ======================================================================================================================

DEFAULT_PORT = 8000  # the vendor's
DEFAULT_STORE = "certtool-data"  # beside certtool.py

MAX_HEAD = 16 * 1024  # bytes of request line and headers; a device sends about 150
MAX_BODY = 64 * 1024  # bytes of a protocol request (contract); a device sends about 70
MAX_UPLOAD = 256 * 1024 * 1024  # bytes of an import handed to a running server: about 3 million rows
MAX_CONNECTIONS = 500 if sys.platform == "win32" else 10_000  # select() on Windows takes 512 sockets
MAX_PIPELINED = 32  # requests of one connection in one turn, so that one client cannot hold up the others
MAX_UNSENT = 64 * 1024  # bytes of replies that a connection may leave unread before its requests wait
BACKLOG = 1024  # connections that the system holds until the next turn accepts them

REQUEST_SECONDS = 10.0  # from a request's first byte to its last
UPLOAD_SECONDS = 600.0  # the same for an import handed over on loopback
IDLE_SECONDS = 120.0  # a kept-alive connection with nothing to say
REPLY_SECONDS = 10.0  # for the peer to take a reply
DRAIN_SECONDS = 1.0  # to read on after a refusal, so that closing does not destroy the reply on its way
SLICE_SECONDS = 0.005  # of an import between two turns
TICK_SECONDS = 0.25  # longest wait in a turn: deadlines, Ctrl-C
STOP_SECONDS = 2.0  # for the last replies to be taken once serving ends

DEVICE_ID_LENGTH = 64  # characters (contract)
FIELD_LENGTH = 64  # characters (contract)
RECORD_LINES = 1000  # lines that a quoted field may span before its quote counts as never closed
IMPORT_SLICE = 500  # rows checked, checksummed and written in one step

LOW_STOCK = 100  # certificates of a product left: warn
LOW_STOCK_PERCENT = 5  # of all that were imported: warn
CONSOLE_LINES_A_SECOND = 50  # above it a summary replaces the single lines
CONSOLE_BACKLOG = 2000  # lines kept while the console does not take them

ANTIVIRUS_SECONDS = 2.0  # for which Windows may refuse a new file to us
LOCK_OFFSET = 0x7FFF_0000  # of the locked byte on Windows, far behind what the lock file tells its readers

# ======================================================================================================================
# 3. Errors
# ======================================================================================================================


class CertToolError(Exception):
    """Anything certtool refuses, in one sentence that says what to do and holds no secret.

    It carries what each edge needs: `http_status` and `code` (the reply's `Status`) for the server, `exit_code` for the
    command line. Whoever raises one has changed nothing, unless the docstring there says otherwise.
    """

    http_status = 500
    code = "InternalError"
    exit_code = 1


class UsageError(CertToolError):
    """The command line is incomplete in a way that argparse cannot see."""

    exit_code = 2


class BadRequest(CertToolError):
    """Not a request of the protocol, or framed so that its end cannot be trusted."""

    code = "BadRequest"

    def __init__(self, message: str, http_status: int = 400) -> None:
        super().__init__(message)
        self.http_status = http_status


class Forbidden(CertToolError):
    """The peer may not ask this."""

    http_status = 403
    code = "Forbidden"


class UnknownProduct(CertToolError):
    """No certificate of that ProductKey was ever imported."""

    http_status = 404
    code = "UnknownProduct"


class UnknownDevice(CertToolError):
    """A burn report for a DeviceID that holds no certificate."""

    http_status = 404
    code = "UnknownDevice"


class DeviceIDRequired(CertToolError):
    """The server runs with --require-device-id and the request has none."""

    http_status = 409
    code = "DeviceIDRequired"


class Voided(CertToolError):
    """The certificate that this DeviceID held was voided."""

    http_status = 409
    code = "Voided"


class PoolExhausted(CertToolError):
    """No certificate of the product is left to give."""

    http_status = 410
    code = "PoolExhausted"


class Refused(CertToolError):
    """An operator's command that the certificate's state does not allow."""

    http_status = 409
    code = "Refused"


class StoreUnavailable(CertToolError):
    """The record could not be made durable: nothing was given out, the state is as it was."""

    http_status = 503
    code = "StoreUnavailable"


class StoreError(CertToolError):
    """The store cannot be opened: in use, not readable, not writable, damaged. It was not changed."""

    http_status = 503
    code = "StoreUnavailable"


class StoreBusy(StoreError):
    """Another process holds the store's lock. `holder` is what it wrote about itself: pid, command, address, token."""

    def __init__(self, message: str, holder: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.holder = holder


# ======================================================================================================================
# 4. CRC32
# ======================================================================================================================
# The IEEE checksum: polynomial 04C11DB7, reflected (EDB88320), init and xor-out FFFFFFFF. Check value: "123456789" gives
# CBF43926. Table-driven, a byte a step.


def _crc_table() -> Tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC_TABLE = _crc_table()


def crc32(data: bytes, value: int = 0) -> int:
    """Return the CRC32 of `data`, continuing from `value` (an earlier result, 0 to begin), as an unsigned number."""
    table = _CRC_TABLE
    value ^= 0xFFFFFFFF
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFF


def crc32_many(payloads: Sequence[bytes]) -> List[int]:
    """Return the CRC32 of each payload, in order."""
    return [crc32(payload) for payload in payloads]


def crc32_name() -> str:
    """Say which routine runs, for --version and serve."""
    return "pure Python"


# ======================================================================================================================
# 5. Credential and state machine (pure)
# ======================================================================================================================
# Theory of operation. A certificate is known by its number: its position over all imports, from 0. Its secrets stay on
# disk; the state keeps what changes. A command is looked up in TABLE by the certificate's status. The cell is the kind of
# event to record, SAME (nothing new to record: the answer is as before), or the error that refuses it.
#
#   `decide` looks and never changes. `apply` changes and never refuses: an event is a fact. What `apply` changed can be
#   put back with `restore`, for the one case in which an event did not become durable after all.
#
# A DeviceID holds at most one certificate of a product, and a voided one for ever. A certificate goes back to the pool
# only by a person's release; a failed burn never frees one, because its secret may sit half-written in a chip.

UNALLOCATED, ALLOCATED, WRITTEN, FAILED, VOID = range(5)
STATUS_NAMES = ("Unallocated", "Allocated", "Written", "Failed", "Void")

REQUEST, BURN_SUCCEEDED, BURN_FAILED, RELEASE, MAKE_VOID = range(5)  # the commands, the columns of TABLE

SAME = ""
FORCED_RELEASE = "release --force"
Cell = Union[str, CertToolError]


def _no_device(verb: str) -> UnknownDevice:
    return UnknownDevice(f"This DeviceID holds no certificate of this product: request one before {verb}.")


_VOIDED = Voided("The certificate of this DeviceID was voided: ask the line's operator.")

# fmt: off
TABLE: Tuple[Tuple[Cell, ...], ...] = (
    #                request       burn succeeded                burn failed                   release           void
    # Unallocated
    (                "allocate",   _no_device("reporting"),      _no_device("reporting"),
                     Refused("It is not allocated: there is nothing to release."),                               "void"),
    # Allocated
    (                SAME,         "written",                    "failed",                     "release",        "void"),
    # Written
    (                "rerequest",  SAME,                         "failed",                     FORCED_RELEASE,   "void"),
    # Failed
    (                "allocate",   "written",                    SAME,                         "release",        "void"),
    # Void
    (                _VOIDED,      _VOIDED,                      _VOIDED,
                     Refused("It is void, and a void certificate is never given out again."),                    SAME),
)
# fmt: on


class Credential(NamedTuple):
    """One identity as it was bought. `product_secret`, `product_id` and `device_id` may be "": the product has none.

    `device_id` binds it in advance: only the device of that id gets it.
    """

    product_key: str
    device_name: str
    device_secret: str
    product_secret: str = ""
    product_id: str = ""
    device_id: str = ""

    def payload(self) -> bytes:
        """The bytes whose CRC32 the device verifies; the order is that of the vendor's reference code (CONTRACT 1)."""
        return f"{self.product_key}{self.device_name}{self.device_secret}{self.product_secret}{self.product_id}".encode()


class Command(NamedTuple):
    """What somebody wants. A device's names `device_id`, an operator's `device_name`; `verb` is a column of TABLE."""

    verb: int
    product_key: str
    device_id: str = ""
    device_name: str = ""
    station: str = ""
    force: bool = False
    detail: Mapping[str, Any] = {}


class Event(NamedTuple):
    """A fact, one line of the journal. `time` is in milliseconds since 1970 UTC; `detail` is what only its kind has."""

    kind: str
    time: int
    product_key: str = ""
    device_name: str = ""
    device_id: str = ""
    station: str = ""
    detail: Mapping[str, Any] = {}


class Record(NamedTuple):
    """What the state knows of one certificate: times in milliseconds since 1970 UTC, 0 where it did not happen."""

    status: int
    device_id: str = ""
    station: str = ""
    allocated_at: int = 0
    written_at: int = 0
    rerequests: int = 0


class Product:
    """The certificates of one ProductKey: by name, by the DeviceID that holds or is promised them, and free ones."""

    __slots__ = ("counts", "cursor", "devices", "key", "names", "pool", "returned")

    def __init__(self, key: str) -> None:
        self.key = key
        self.names: Dict[str, int] = {}
        self.devices: Dict[str, int] = {}
        self.pool = array("L")  # numbers in the order of import, without those bound in advance
        self.cursor = 0  # what stands before it in the pool is not free, except what `returned` has
        self.returned: Deque[int] = deque()  # released ones, given out last
        self.counts = [0] * len(STATUS_NAMES)

    @property
    def total(self) -> int:
        """All certificates of the product, whatever their status."""
        return sum(self.counts)


class Staged:
    """An import prepared beside the state, so that `apply` only has to take it over. `first` is its first number."""

    def __init__(self, first: int, batch: str) -> None:
        self.first = first
        self.batch = batch
        self.names: List[str] = []
        self.products: Dict[str, Product] = {}

    def add(self, credential: Credential) -> None:
        """Prepare one certificate; the caller has made sure that neither its name nor its device is taken."""
        product = self.products.get(credential.product_key)
        if product is None:
            product = self.products[credential.product_key] = Product(credential.product_key)
        number = self.first + len(self.names)
        self.names.append(credential.device_name)
        product.names[credential.device_name] = number
        product.counts[UNALLOCATED] += 1
        if credential.device_id:
            product.devices[credential.device_id] = number
        else:
            product.pool.append(number)


class State:
    """What became of every certificate. Columns by number; those of what never moved are not even stored."""

    def __init__(self) -> None:
        self.products: Dict[str, Product] = {}
        self.prepared: Deque[Staged] = deque()  # imports whose events come next
        self.batches: List[Tuple[int, str]] = []  # (first number, batch) of each import
        self.names: List[str] = []
        self._status = bytearray()
        self._device: List[str] = []
        self._station: List[str] = []
        self._allocated_at = array("q")
        self._written_at = array("q")
        self._rerequests: Dict[int, int] = {}
        self._stations: Dict[str, str] = {}  # one object for each address

    def record(self, number: int) -> Record:
        """Return what is known of the certificate `number`."""
        if number >= len(self._device):
            return Record(self._status[number])
        return Record(
            self._status[number],
            self._device[number],
            self._station[number],
            self._allocated_at[number],
            self._written_at[number],
            self._rerequests.get(number, 0),
        )

    def batch(self, number: int) -> str:
        """Return the batch that the certificate `number` was imported with."""
        return self.batches[bisect.bisect_right(self.batches, (number, "\U0010ffff")) - 1][1]

    def decide(self, command: Command, now: int) -> Tuple[int, Optional[Event]]:
        """Return the certificate's number and the event to record, None where the answer needs no new record.

        It changes nothing. Raises UnknownProduct, UnknownDevice, PoolExhausted, Voided or Refused.
        """
        product = self.products.get(command.product_key)
        if product is None:
            raise UnknownProduct("No certificate of this ProductKey was ever imported: check it, or import its file.")
        if command.device_name:
            number = product.names[command.device_name]
        else:
            held = product.devices.get(command.device_id)
            if held is None:
                if command.verb != REQUEST:
                    raise _no_device("reporting")
                held = self._next_free(product)
            number = held
        kind = TABLE[self._status[number]][command.verb]
        if isinstance(kind, CertToolError):
            raise type(kind)(*kind.args)
        if kind == SAME:
            return number, None
        if kind == FORCED_RELEASE:
            if not command.force:
                raise Refused("It is Written, so its secret is in a device: release it with --force if that is scrap.")
            kind = "release"
        device_id = command.device_id
        if command.device_name and number < len(self._device):
            device_id = self._device[number]
        name = self.names[number]
        return number, Event(kind, now, product.key, name, device_id, command.station, command.detail)

    def apply(self, event: Event) -> Optional[Tuple[Product, int, Record]]:
        """Make the event true. Returns what `restore` needs to take it back, None for an import.

        It never refuses. A KeyError means that the event names a certificate that no import holds.
        """
        if event.kind == "import":
            self._adopt(self.prepared.popleft())
            return None
        if event.kind == "store":
            return None
        product = self.products[event.product_key]
        number = product.names[event.device_name]
        before = self.record(number)
        self._set(product, number, EFFECTS[event.kind](before, event))
        return product, number, before

    def restore(self, undo: Tuple[Product, int, Record]) -> None:
        """Take back the latest event that was applied to this certificate."""
        self._set(*undo)

    def _next_free(self, product: Product) -> int:
        if product.cursor < len(product.pool):
            return product.pool[product.cursor]
        if product.returned:
            return product.returned[0]
        raise PoolExhausted("No certificate of this product is left: import more.")

    def _set(self, product: Product, number: int, record: Record) -> None:
        """The one place that changes a certificate; it keeps device map, counts and pool true."""
        missing = number + 1 - len(self._device)
        if missing > 0:
            self._device.extend([""] * missing)
            self._station.extend([""] * missing)
            self._allocated_at.extend([0] * missing)
            self._written_at.extend([0] * missing)
        status, device_id, station, allocated_at, written_at, rerequests = record
        old_status, old_device = self._status[number], self._device[number]
        if old_device != device_id:
            if old_device:
                del product.devices[old_device]
            if device_id:
                product.devices[device_id] = number
        self._status[number] = status
        self._device[number] = device_id
        self._station[number] = self._stations.setdefault(station, station)
        self._allocated_at[number] = allocated_at
        self._written_at[number] = written_at
        if rerequests:
            self._rerequests[number] = rerequests
        else:
            self._rerequests.pop(number, None)
        product.counts[old_status] -= 1
        product.counts[status] += 1
        if status == UNALLOCATED and not device_id:
            product.returned.append(number)
        pool, cursor = product.pool, product.cursor
        while cursor < len(pool) and self._status[pool[cursor]] != UNALLOCATED:
            cursor += 1
        product.cursor = cursor
        while product.returned and self._status[product.returned[0]] != UNALLOCATED:
            product.returned.popleft()

    def _adopt(self, staged: Staged) -> None:
        self.batches.append((staged.first, staged.batch))
        self.names.extend(staged.names)
        self._status.extend(bytes(len(staged.names)))
        for key, new in staged.products.items():
            product = self.products.get(key)
            if product is None:
                self.products[key] = new
            else:
                product.names.update(new.names)
                product.devices.update(new.devices)
                product.pool.extend(new.pool)
                product.counts[UNALLOCATED] += new.counts[UNALLOCATED]
            for device_id, number in new.devices.items():
                missing = number + 1 - len(self._device)
                if missing > 0:
                    self._device.extend([""] * missing)
                    self._station.extend([""] * missing)
                    self._allocated_at.extend([0] * missing)
                    self._written_at.extend([0] * missing)
                self._device[number] = device_id


# What each kind of event makes of a certificate's record. A kind that is not here and not an import is from the future.
EFFECTS: Mapping[str, Callable[[Record, Event], Record]] = {
    "allocate": lambda old, event: Record(ALLOCATED, event.device_id, event.station, event.time, 0, old.rerequests),
    "rerequest": lambda old, event: old._replace(rerequests=old.rerequests + 1),
    "written": lambda old, event: old._replace(status=WRITTEN, written_at=event.time),
    "failed": lambda old, event: old._replace(status=FAILED, written_at=0),
    "release": lambda old, event: Record(UNALLOCATED, rerequests=old.rerequests),
    "void": lambda old, event: old._replace(status=VOID),
}
KINDS = frozenset(EFFECTS) | {"store", "import"}
