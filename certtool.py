#!/usr/bin/env python3
"""certtool hands out each device certificate of a pool once, and never forgets to whom.

    python certtool.py serve --import identities.csv     give certificates to devices and programmers over HTTP
    python certtool.py import identities.csv             add certificates to the store, also beside a running server
    python certtool.py query [DEVICE_NAME]               what became of a certificate
    python certtool.py release | void DEVICE_NAME        what only a person may decide
    python certtool.py verify [OTHER_STORE ...]          audit stores, and that no certificate is in two of them
    python certtool.py accept-restore --reason TEXT      serve an old copy that was put back, after all
    python certtool.py request PRODUCT_KEY --server IP   what a station does: check the link, or play a whole line
    python certtool.py crc PK DN DS PS [PRODUCT_ID]      the checksum that devices verify

This one file is the whole product: copy it alone to a PC with CPython 3.8 or newer, nothing installed.

Map of the sections; each uses only those above it, and the pure ones know no file, socket or clock:

     2. Limits and constants                     9. Service: decide, record, commit
     3. Errors                                  10. Protocol messages (pure)
     4. CRC32                                   11. HTTP server
     5. Credential and state machine (pure)     12. Management page
     6. Identity-file reader (pure)             13. Console
     7. Journal codec (pure)                    14. Station
     8. Store: lock, import files, journal      15. Command line

The flow of one request. `CertServer` (11) is one thread that turns a loop. In a turn it reads every ready connection;
each whole request becomes a message (10), the service (9) asks the state machine (5) to `decide`, hands the event to
the store (8) and applies it to the state. At the end of the turn the store encodes all events as journal lines (7) and
makes them durable with one write and one fsync: a group commit. Only then do the replies of the turn leave. State is
never saved: it is the import files plus the journal, replayed through the same `apply`, so that the live and the
recovered state cannot differ. Many plain events at once go through `apply_together`; tests hold the two to the same
result.
"""

from __future__ import annotations

import _thread
import argparse
import base64
import bisect
import codecs
import contextlib
import csv
import errno
import functools
import gc
import getpass
import glob
import hashlib
import hmac
import http.client
import http.server
import importlib.machinery
import importlib.util
import io
import ipaddress
import itertools
import json
import operator
import os
import re
import secrets
import selectors
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
import urllib.parse
from array import array
from collections import Counter, deque
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
    Set,
    Sized,
    Tuple,
    Union,
)

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl
    import resource

__version__ = "1.0.0"

# ======================================================================================================================
# 2. Limits and constants
# ======================================================================================================================

DEFAULT_PORT = 8000  # the vendor's
DEFAULT_STORE = "certtool-data"  # beside certtool.py

MAX_HEAD = 16 * 1024  # bytes of request line and headers; a device sends about 150
MAX_HEADERS = 100  # lines of them; a device sends about 5, and thousands of short ones take 20 times their length
MAX_BODY = 64 * 1024  # bytes of a protocol request (contract); a device sends about 70
MAX_NESTING = 100  # arrays and objects of a request in each other; a device sends 1
MAX_PARTS = 1000  # commas and opening brackets of a request, in strings too: 20,000 hold up all others for 10 ms
MAX_DIGITS = 20  # of an integer in JSON, with its sign: a CPython before 3.8.14 takes long for 65,000
MAX_UPLOAD = 256 * 1024 * 1024  # bytes of an import handed to a running server: about 3 million rows
MAX_CONNECTIONS = 500 if sys.platform == "win32" else 10_000  # select() on Windows takes 512 sockets
PEER_SHARE = 2  # one peer may hold this part of them; many stations may stand behind one address
OTHER_FILES = 40  # that the process may open beside its connections: the store's
MAX_PIPELINED = 32  # requests of one connection in one turn, so that one client cannot hold up the others
MAX_UNSENT = 64 * 1024  # bytes of replies that a connection may leave unread before its requests wait
MAX_HELD = 64 * 1024 * 1024  # bytes of half requests and untaken replies of all connections together
LONG_HELD = 4 * 1024  # bytes of one connection beyond which it is let go where they are more
HEADER_HELD = 150  # bytes that a header which was read takes besides its own, while the body is awaited
BACKLOG = 1024  # connections that the system holds until the next turn accepts them

REQUEST_SECONDS = 10.0  # from a request's first byte to its last
UPLOAD_SECONDS = 600.0  # the same for an import handed over on loopback
IDLE_SECONDS = 120.0  # a kept-alive connection with nothing to say
REPLY_SECONDS = 10.0  # for the peer to take a reply
DRAIN_SECONDS = 1.0  # to read on after a refusal, so that closing does not destroy the reply on its way
THREAD_SECONDS = 1.0  # in which a new thread begins its work
SLICE_SECONDS = 0.005  # of a job that somebody waits for, between two turns
TICK_SECONDS = 0.25  # longest wait in a turn: deadlines, Ctrl-C
STOP_SECONDS = 2.0  # for the last replies to be taken once serving ends

DEVICE_ID_LENGTH = 64  # characters (contract)
FIELD_LENGTH = 64  # characters (contract)
RECORD_LINES = 1000  # lines in which a header must stand, and that a field may span before its quote is called open
LINE_LENGTH = 1 << 18  # characters of a line of an identity file that are looked at, and about that many of a row
MAX_WRONG = 100_000  # rows of the files of an import that are listed; each takes about 1 KB of memory
MAX_PRODUCTS = 1000  # of an identity file; where there are far more, the wrong column is named ProductKey
MAX_COLUMNS = 1000  # of an identity file; those of the cloud have about 5
SELECT_SLICE = 10_000  # certificates looked through in one step
JSON_SLICE = 1000  # tokens of JSON written in one step
ROWS_SLICE = 100  # rows of an identity file checked one by one in one step
IMPORT_SLICE = 1 << 16  # characters of an identity file whose rows are checked, checksummed and written in one step
FILE_PIECE = 1 << 18  # bytes of an identity file that are digested, decoded or handed over in one step

LOW_STOCK = 100  # certificates of a product left: warn
LOW_STOCK_PERCENT = 5  # of all that were imported: warn
CONSOLE_LINES_A_SECOND = 50  # above it a summary replaces the single lines
CONSOLE_BACKLOG = 2000  # lines kept while the console does not take them

ANTIVIRUS_SECONDS = 2.0  # for which Windows may refuse a new file to us
MIRROR_REMINDER_SECONDS = 60.0  # between two warnings that there is no second copy
LOCK_BYTES = 4096  # of the lock file that its readers look at
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
    """The store cannot be opened: in use, not readable, not writable, damaged. It was not changed.

    But its folder may have been closed to other users: `notes` say so, where there is no Store to ask.
    """

    http_status = 503
    code = "StoreUnavailable"
    notes: Sequence[str] = ()


class StoreBusy(StoreError):
    """Another process holds the store's lock. `holder` is what it wrote about itself: see `Lock.announce`."""

    def __init__(self, message: str, holder: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.holder = holder


# ======================================================================================================================
# 4. CRC32
# ======================================================================================================================
# The IEEE checksum: polynomial 04C11DB7, reflected (EDB88320), init and xor-out FFFFFFFF. Check value: "123456789"
# gives CBF43926. Table-driven, in the C extension (_crc32.c, built by build_ext.py) where one stands beside this file
# and computes what the Python below computes, else in Python.

CRC_EXTENSION = "_certtool_crc32"


def _crc_table() -> Tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC_TABLE = _crc_table()
_CRC_PLANES = [bytes(entry >> shift & 0xFF for entry in _CRC_TABLE) for shift in (0, 8, 16, 24)]


def crc32_pure(data: bytes, value: int = 0) -> int:
    """`crc32` in Python, a byte a step."""
    table = _CRC_TABLE
    value ^= 0xFFFFFFFF
    for byte in data:
        value = table[value & 0xFF ^ byte] ^ value >> 8
    return value ^ 0xFFFFFFFF


@functools.lru_cache(maxsize=1024)
def _crc32_of_zeros(length: int) -> int:
    return crc32_pure(bytes(length))


def _crc32_many_pure(payloads: Sequence[bytes]) -> List[int]:
    """`crc32_many` in Python. A step takes one byte of each of a thousand payloads: 8 times faster than one by one.

    The four bytes of all registers are four large numbers, and looking a byte up in the table is bytes.translate. All
    begin at 0 instead of FFFFFFFF, so that zeros in front, which make them of one length, change nothing; what FFFFFFFF
    contributes depends on the length alone, and the checksum of that many zeros is just that.
    """
    checksums: List[int] = []
    for start in range(0, len(payloads), 1000):
        part = payloads[start : start + 1000]
        count, lengths = len(part), [len(payload) for payload in part]
        longest = max(lengths)
        if longest * (count + 150) > 8 * sum(lengths):  # too few of them, or too unlike in length
            checksums.extend(map(crc32_pure, part))
            continue
        padded = b"".join([payload.rjust(longest, b"\0") for payload in part])
        number = int.from_bytes
        table0, table1, table2, table3 = _CRC_PLANES
        plane0 = plane1 = plane2 = plane3 = 0
        for place in range(longest):
            index = (plane0 ^ number(padded[place::longest], "little")).to_bytes(count, "little")
            plane0 = plane1 ^ number(index.translate(table0), "little")
            plane1 = plane2 ^ number(index.translate(table1), "little")
            plane2 = plane3 ^ number(index.translate(table2), "little")
            plane3 = number(index.translate(table3), "little")
        registers = bytearray(4 * count)
        for byte, plane in enumerate((plane0, plane1, plane2, plane3)):
            registers[byte::4] = plane.to_bytes(count, "little")
        for register, length in zip(struct.unpack(f"<{count}I", registers), lengths):
            checksums.append(register ^ _crc32_of_zeros(length))
    return checksums


class _Crc32(NamedTuple):
    """One of the two routines. `warning` says why an extension that is there is not used."""

    name: str
    one: Callable[[bytes, int], int]
    many: Callable[[Sequence[bytes]], List[int]]
    warning: str = ""


def _load_crc32(path: str) -> _Crc32:
    """Return the routine in the extension at `path`. Raises whatever loading it raises; ValueError if it is wrong."""
    with open(path, "rb") as file:
        head = file.read(64).ljust(64)
    if head.startswith(b"\x7fELF"):
        # It ends with its section headers. Loading one that was cut short would be a bus error.
        start, entry, count = struct.unpack_from("=40xQ10xHH" if sys.maxsize > 2**32 else "=32xI10xHH", head)
        if os.path.getsize(path) < start + entry * count:
            raise ImportError("the file is cut short")
    loader = importlib.machinery.ExtensionFileLoader(CRC_EXTENSION, path)
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(CRC_EXTENSION, loader, origin=path))
    loader.exec_module(module)
    update: Callable[[int, bytes, int], int] = module.lib.crc32_update
    batch, view = module.lib.crc32_batch, module.ffi.from_buffer

    def one(data: bytes, value: int) -> int:
        return update(value, bytes(data), len(data))

    def many(payloads: Sequence[bytes]) -> List[int]:
        checksums: List[int] = []
        for start in range(0, len(payloads), 4000):  # what a processor's cache holds
            part = payloads[start : start + 4000]
            offsets = array("Q", itertools.accumulate(map(len, part), initial=0))
            found = array("I", bytes(4 * len(part)))
            batch(b"".join(part), view("uint64_t[]", offsets), len(part), view("uint32_t[]", found))
            checksums.extend(found)
        return checksums

    # Each entry of each table once, each length of a tail, and one that is long enough to be folded.
    sample = bytes(range(251)) * 26
    payloads = [b"123456789", *(sample[:size] for size in range(32)), *(bytes([n]) * 16 for n in range(256)), sample]
    expected = _crc32_many_pure(payloads)
    if many(payloads) != expected or [one(payload, 0) for payload in payloads] != expected:
        raise ValueError("its checksums are wrong")
    if one(sample[7:], one(sample[:7], 0)) != expected[-1]:
        raise ValueError("it does not continue a checksum")
    return _Crc32("C extension", one, many)


def _choose_crc32() -> _Crc32:
    """Return the extension's routine where there is one that is right, else Python's with the reason as its warning."""
    pure = _Crc32("pure Python", crc32_pure, _crc32_many_pure)
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        files = [name for name in os.listdir(folder) if re.match(CRC_EXTENSION + r"\..*(so|pyd)$", name)]
    except OSError:
        files = []
    if not files:
        return pure
    path, why, remedy = os.path.join(folder, files[0]), "it is for another Python", "Rebuild it with build_ext.py"
    # Not by `import`: with `python -I` the folder of this file is not searched.
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if CRC_EXTENSION + suffix in files:
            path = os.path.join(folder, CRC_EXTENSION + suffix)
            try:
                return _load_crc32(path)
            except Exception as error:
                why = " ".join(str(error).split()) or type(error).__name__
                if isinstance(error, ImportError) and error.name == "_cffi_backend":
                    remedy = "Install cffi (python -m pip install cffi)"
                    if os.path.basename(folder) in ("site-packages", "dist-packages"):
                        return pure  # pip installed certtool without [accel]: as it was asked to
    return pure._replace(warning=f"{path} is not used, checksums run in Python: {why}. {remedy}, or delete that file.")


_CRC32 = _choose_crc32()
crc32_warning = _CRC32.warning  # one line for stderr, "" where all is well


def crc32(data: bytes, value: int = 0) -> int:
    """Return the CRC32 of `data`, continuing from `value` (an earlier result, 0 to begin), as an unsigned number."""
    return _CRC32.one(data, value)


def crc32_many(payloads: Sequence[bytes]) -> List[int]:
    """Return the CRC32 of each payload, in order: one call of the extension for thousands."""
    return _CRC32.many(payloads)


def crc32_name() -> str:
    """Say which routine runs, for --version and serve."""
    return _CRC32.name


# ======================================================================================================================
# 5. Credential and state machine (pure)
# ======================================================================================================================
# Theory of operation. A certificate is known by its number: its position over all imports, from 0. Its secrets stay on
# disk; the state keeps what changes. A command is looked up in TABLE by the certificate's status. The cell is the kind
# of event to record, SAME (nothing new to record: the answer is as before), or the error that refuses it.
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

_NO_DEVICE = UnknownDevice("This DeviceID holds no certificate of this product: request one before reporting.")
_VOIDED = Voided("The certificate of this DeviceID was voided: ask the line's operator.")
_NOT_ALLOCATED = Refused("It is not allocated: there is nothing to release.")
_VOID_FOR_EVER = Refused("It is void, and a void certificate is never given out again.")

# fmt: off
TABLE: Tuple[Tuple[Cell, ...], ...] = (
    #                request       burn succeeded   burn failed   release          void
    # Unallocated
    (                "allocate",   _NO_DEVICE,      _NO_DEVICE,   _NOT_ALLOCATED,  "void"),
    # Allocated
    (                SAME,         "written",       "failed",     "release",       "void"),
    # Written
    (                "rerequest",  SAME,            "failed",     FORCED_RELEASE,  "void"),
    # Failed
    (                "allocate",   "written",       SAME,         "release",       "void"),
    # Void
    (                _VOIDED,      _VOIDED,         _VOIDED,      _VOID_FOR_EVER,  SAME),
)
# fmt: on


_new = tuple.__new__  # a NamedTuple in two fifths of the time of its own call
NO_DETAIL: Mapping[str, Any] = {}


def _fresh(error: CertToolError) -> CertToolError:
    """A table's error without the traceback of whoever raised it before."""
    return type(error)(*error.args)


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
        return "".join(self[:5]).encode()


class Command(NamedTuple):
    """What somebody wants. A device's names `device_id`, an operator's `device_name`; `verb` is a column of TABLE."""

    verb: int
    product_key: str
    device_id: str = ""
    device_name: str = ""
    station: str = ""
    force: bool = False
    detail: Mapping[str, Any] = NO_DETAIL


class Event(NamedTuple):
    """A fact, one line of the journal. `time` is in milliseconds since 1970 UTC; `detail` is what only its kind has."""

    kind: str
    time: int
    product_key: str = ""
    device_name: str = ""
    device_id: str = ""
    station: str = ""
    detail: Mapping[str, Any] = NO_DETAIL


class Events(NamedTuple):
    """Consecutive events as columns, each one a field of Event."""

    kinds: Sequence[str]
    times: Sequence[int]
    product_keys: Sequence[str]
    device_names: Sequence[str]
    device_ids: Sequence[str]
    stations: Sequence[str]
    details: Sequence[Mapping[str, Any]]

    def rows(self, start: int = 0) -> Iterator[Event]:
        """The same, event by event."""
        return map(Event._make, zip(*(column[start:] for column in self)))


class Record(NamedTuple):
    """What the state knows of one certificate: times in milliseconds since 1970 UTC, 0 where it did not happen."""

    status: int
    device_id: str = ""
    station: str = ""
    allocated_at: int = 0
    written_at: int = 0
    rerequests: int = 0


NEVER_MOVED = tuple(map(Record, range(len(STATUS_NAMES))))  # without a device there is nothing else to know


class Undo(NamedTuple):
    """What `State.restore` needs: how the certificate and the pool's cursor were before an event, and which numbers
    left the head of `Product.returned` with it."""

    product: Product
    number: int
    record: Record
    cursor: int
    gone: Sequence[int]


NOBODY = (None, 1 << 32)  # behind the last of `Product.order`


class Product:
    """The certificates of one ProductKey: by name, by the DeviceID that holds or is promised them, and free ones."""

    __slots__ = ("bound", "counts", "cursor", "devices", "due", "key", "low", "names", "order", "pool", "returned")

    def __init__(self, key: str) -> None:
        self.key = key
        self.names: Dict[str, int] = {}
        self.devices: Dict[str, int] = {}
        self.pool: Union[range, array[int]] = range(0)  # numbers in the order of import, without those bound in advance
        self.cursor = 0  # what stands before it in the pool is not free, except what `returned` has
        self.returned: Deque[int] = deque()  # released ones, given out last
        self.counts = [0] * len(STATUS_NAMES)
        self.bound = 0  # Unallocated ones that wait for the device they are bound to
        self.low = LOW_STOCK  # see `low_stock_limit`
        self.restart()

    def restart(self) -> None:
        """Let `order` begin again: names and numbers as they were imported, to be met without a look-up."""
        self.order: Iterator[Tuple[Optional[str], int]] = iter(self.names.items())
        self.due = next(self.order, NOBODY)  # what `order` is at

    def put(self, numbers: Union[range, array[int]]) -> None:
        """Add certificates to the pool's end. A pool of consecutive ones is a range, which keeps no number for each."""
        pool = self.pool
        if isinstance(pool, range) and isinstance(numbers, range) and pool.stop in (0, numbers.start):
            self.pool = range(pool.start if pool else numbers.start, numbers.stop)
            return
        if isinstance(pool, range):
            self.pool = pool = array("I", pool)
        pool.extend(numbers)

    @property
    def free(self) -> int:
        """Certificates that any device may get."""
        return self.counts[UNALLOCATED] - self.bound

    @property
    def total(self) -> int:
        """All certificates of the product, whatever their status."""
        return sum(self.counts)


class Stock(NamedTuple):
    """The certificates of one product in one batch; `counts` by status."""

    product_key: str
    batch: str
    counts: List[int]


class Staged:
    """An import prepared beside the state, so that `apply` only has to take it over. `first` is its first number."""

    def __init__(self, first: int, batch: str) -> None:
        self.first = first
        self.batch = batch
        self.names: List[str] = []
        self.products: Dict[str, Product] = {}

    def add(self, keys: Sequence[str], names: Sequence[str], device_ids: Sequence[str]) -> None:
        """Prepare certificates, given as columns; the caller has made sure that no name and no device is taken."""
        if keys.count(keys[0]) == len(keys):
            self._add_run(keys[0], names, device_ids)
            return
        start = 0
        for key, run in itertools.groupby(keys):
            end = start + sum(1 for _ in run)
            self._add_run(key, names[start:end], device_ids[start:end])
            start = end

    def _add_run(self, product_key: str, names: Sequence[str], device_ids: Sequence[str]) -> None:
        product = self.products.get(product_key)
        if product is None:
            product = self.products[product_key] = Product(product_key)
        first = self.first + len(self.names)
        numbers = range(first, first + len(names))
        self.names.extend(names)
        product.names.update(zip(names, numbers))
        product.counts[UNALLOCATED] += len(names)
        if not any(device_ids):
            product.put(numbers)
            return
        for number, device_id in zip(numbers, device_ids):
            if device_id:
                product.devices[device_id] = number
                product.bound += 1
            else:
                product.put(range(number, number + 1))


def low_stock_limit(total: int) -> int:
    """Fewer free certificates than this are a low stock, of a product that has `total`."""
    return max(LOW_STOCK, -(-total * LOW_STOCK_PERCENT // 100))


class State:
    """What became of every certificate. Columns by number; those of what never moved are not even stored."""

    def __init__(self) -> None:
        self.products: Dict[str, Product] = {}
        self.prepared: Deque[Staged] = deque()  # imports whose events come next
        self.batches: List[Tuple[int, str]] = []  # (first number, batch) of each import
        self.stocks: List[Stock] = []
        self._stock_of = array("I")  # of each certificate, an index of `stocks`
        self.sources: Dict[str, int] = {}  # digest of each file that was imported whole, with its number of rows
        self.names: List[str] = []
        self._status = bytearray()
        self._device: List[str] = []
        self._station: List[str] = []
        self._allocated_at = array("q")
        self._written_at = array("q")
        self._rerequests: Dict[int, int] = {}
        self._stations: Dict[str, str] = {}  # one object for each address

    def find(self, device_name: str, product_key: str = "") -> List[Tuple[Product, int]]:
        """Return product and number of each certificate of that name; a name may occur once in each product."""
        return [
            (product, product.names[device_name])
            for key, product in self.products.items()
            if device_name in product.names and product_key in ("", key)
        ]

    def record(self, number: int) -> Record:
        """Return what is known of the certificate `number`."""
        device_id = self._device[number] if number < len(self._device) else ""
        if not device_id and number not in self._rerequests:
            return NEVER_MOVED[self._status[number]]
        return Record(
            self._status[number],
            device_id,
            self._station[number],
            self._allocated_at[number],
            self._written_at[number],
            self._rerequests.get(number, 0),
        )

    def batch(self, number: int) -> str:
        """Return the batch that the certificate `number` was imported with."""
        return self.batches[bisect.bisect_right(self.batches, (number, "\U0010ffff")) - 1][1]

    def select(
        self,
        product_key: Optional[str] = None,
        batch: Optional[str] = None,
        status: Optional[int] = None,
        start: int = 0,
    ) -> Iterator[Optional[int]]:
        """Yield the numbers from `start` on that pass the filters, and None now and then: a place to pause."""
        wanted = [product_key in (None, stock.product_key) and batch in (None, stock.batch) for stock in self.stocks]
        while start < len(self.names) and any(wanted):
            end = min(start + SELECT_SLICE, len(self.names))
            wanted += [False] * (len(self.stocks) - len(wanted))  # what was imported meanwhile
            for number in range(start, end):
                if wanted[self._stock_of[number]] and status in (None, self._status[number]):
                    yield number
            yield None
            start = end

    def decide(self, command: Command, now: int) -> Tuple[int, Optional[Event]]:
        """Return the certificate's number and the event to record, None where the answer needs no new record.

        It changes nothing. Raises UnknownProduct, UnknownDevice, PoolExhausted, Voided or Refused.
        """
        verb, product_key, device_id, device_name, station, force, detail = command
        product = self.products.get(product_key)
        if product is None:
            raise UnknownProduct("No certificate of this ProductKey was ever imported: check it, or import its file.")
        if device_name:
            number = product.names[device_name]
        elif device_id in product.devices:
            number = product.devices[device_id]
        elif verb == REQUEST:
            number = self._next_free(product)
        else:
            raise _fresh(_NO_DEVICE)
        kind = TABLE[self._status[number]][verb]
        if isinstance(kind, CertToolError):
            raise _fresh(kind)
        if kind == SAME:
            return number, None
        if kind == FORCED_RELEASE:
            if not force:
                raise Refused("It is Written, so its secret is in a device: release it with --force if that is scrap.")
            kind = "release"
        if device_name and number < len(self._device):
            device_id = self._device[number]
        return number, _new(Event, (kind, now, product.key, self.names[number], device_id, station, detail))

    def apply(self, event: Event) -> Optional[Undo]:
        """Make the event true. Returns what `restore` needs to take it back, None where no certificate changed.

        It never refuses. A KeyError means that the event names a certificate that no import holds.
        """
        effect = EFFECTS.get(event.kind)
        if effect is None:
            if event.kind == "import":
                self._adopt(self.prepared.popleft(), event.detail)
            return None
        product = self.products[event.product_key]
        number = product.names[event.device_name]
        old, cursor = self.record(number), product.cursor
        gone = self._set(product, number, old, effect(old, event))
        return _new(Undo, (product, number, old, cursor, gone))

    def apply_together(self, events: Events) -> int:
        """`apply` events in their order, at a fraction of the time; return how many, from the first on, were applied.

        First allocations and reports of success, as nearly all events are, change here what `apply` changes. It takes
        only events of one product, up to one that names a certificate that no import holds.
        """
        keys = events.product_keys
        product = self.products.get(keys[0])
        if product is None or keys.count(keys[0]) != len(keys) or not EFFECTS.keys() >= set(events.kinds):
            return 0
        if self._allocate_in_order(product, events):
            return len(keys)
        status, device, station_of, same = self._status, self._device, self._station, self._stations
        numbers, devices, order = product.names, product.devices, product.order
        due, due_number = product.due
        allocated: List[int] = []
        written: List[int] = []
        done = 0
        with contextlib.suppress(KeyError):  # `apply` will raise it
            for kind, moment, _, name, device_id, station, _ in zip(*events):
                if name == due:  # as most are given out: in the order of import
                    number = due_number
                    due, due_number = next(order, NOBODY)
                else:
                    number = numbers[name]
                    if number > due_number and kind == "allocate":
                        due, due_number = next((pair for pair in order if pair[1] > number), NOBODY)
                if number >= len(device):
                    self._grow(number)
                now = status[number]
                if now == UNALLOCATED and kind == "allocate" and device_id and not device[number]:
                    status[number] = ALLOCATED
                    device[number] = device_id
                    devices[device_id] = number
                    station_of[number] = same.setdefault(station, station)
                    self._allocated_at[number] = moment
                    allocated.append(number)
                elif now == ALLOCATED and kind == "written" and device[number]:
                    status[number] = WRITTEN
                    self._written_at[number] = moment
                    written.append(number)
                else:
                    self._pass_over(product)
                    self.apply(Event(kind, moment, product.key, name, device_id, station))
                done += 1
        product.due = due, due_number
        self._pass_over(product)
        for moved, old, new in ((allocated, UNALLOCATED, ALLOCATED), (written, ALLOCATED, WRITTEN)):
            for stock, many in Counter(map(self._stock_of.__getitem__, moved)).items():
                self._count(product, stock, old, new, many)
        return done

    def _allocate_in_order(self, product: Product, events: Events) -> bool:
        """Apply events that all give free certificates away in the order of import; else change nothing: False."""
        many, device_ids, first = len(events.kinds), events.device_ids, product.due[1]
        numbers, pool = range(first, first + many), product.pool
        if (
            events.kinds.count("allocate") != many
            or self.names[first : numbers.stop] != events.device_names
            or not (isinstance(pool, range) and first in pool and numbers[-1] in pool)
            or self._status.count(UNALLOCATED, first, numbers.stop) != many
            or not all(device_ids)
        ):
            return False
        self._grow(numbers[-1])
        self._status[first : numbers.stop] = bytes((ALLOCATED,)) * many
        self._device[first : numbers.stop] = device_ids
        self._station[first : numbers.stop] = map(self._stations.setdefault, events.stations, events.stations)
        self._allocated_at[first : numbers.stop] = array("q", events.times)
        pairs = [product.due, *itertools.islice(product.order, many - 1)]
        product.devices.update(zip(device_ids, map(operator.itemgetter(1), pairs)))  # one object for each number
        product.due = next(product.order, NOBODY)
        self._pass_over(product)
        for stock, moved in Counter(self._stock_of[first : numbers.stop]).items():
            self._count(product, stock, UNALLOCATED, ALLOCATED, moved)
        return True

    def restore(self, undo: Undo) -> None:
        """Take back the latest event: the certificate, its device, and its place among the free ones are as before."""
        product, number, record, cursor, gone = undo
        now = self.record(number)
        released = now.status == UNALLOCATED
        at_head = bool(self._set(product, number, now, record))
        product.cursor = cursor
        if (released and not at_head) or (record.status == UNALLOCATED and not record.device_id):
            product.returned.pop()
        product.returned.extendleft(reversed(gone))

    def _next_free(self, product: Product) -> int:
        if product.cursor < len(product.pool):
            return product.pool[product.cursor]
        if product.returned:
            return product.returned[0]
        raise PoolExhausted("No certificate of this product is left: import more.")

    def _set(self, product: Product, number: int, old: Record, new: Record) -> Sequence[int]:
        """The one place that changes a certificate; it keeps device map, counts and pool true.

        Returns the numbers that left the head of `returned`, because they are no longer free.
        """
        if number >= len(self._device):
            self._grow(number)
        status, device_id, station, allocated_at, written_at, rerequests = new
        old_status, old_device, _, _, _, old_rerequests = old
        if old_device != device_id:
            if old_device:
                del product.devices[old_device]
            if device_id:
                product.devices[device_id] = number
        self._device[number] = device_id
        self._station[number] = self._stations.setdefault(station, station)
        self._allocated_at[number] = allocated_at
        self._written_at[number] = written_at
        if rerequests:
            self._rerequests[number] = rerequests
        elif old_rerequests:
            del self._rerequests[number]
        if status == old_status:
            return ()
        self._status[number] = status
        self._count(product, self._stock_of[number], old_status, status, 1)
        if status == UNALLOCATED:
            if device_id:
                product.bound += 1
            else:
                product.returned.append(number)
        if old_status != UNALLOCATED:
            return ()
        if old_device:
            product.bound -= 1
        return self._pass_over(product)

    def _count(self, product: Product, place: int, old: int, new: int, many: int) -> None:
        """Note that `many` certificates of a product and of the stock at `place` changed their status."""
        for counts in (product.counts, self.stocks[place].counts):
            counts[old] -= many
            counts[new] += many

    def _pass_over(self, product: Product) -> Sequence[int]:
        """Let cursor and `returned` stand at free certificates again; return the numbers that left `returned`."""
        pool, cursor, returned = product.pool, product.cursor, product.returned
        if isinstance(pool, range):
            found = self._status.find(UNALLOCATED, pool.start + cursor, pool.stop)
            cursor = len(pool) if found < 0 else found - pool.start
        else:
            while cursor < len(pool) and self._status[pool[cursor]] != UNALLOCATED:
                cursor += 1
        product.cursor = cursor
        if not returned:
            return ()
        gone: List[int] = []
        while returned and self._status[returned[0]] != UNALLOCATED:
            gone.append(returned.popleft())
        return gone

    def _adopt(self, staged: Staged, detail: Mapping[str, Any]) -> None:
        if detail.get("source"):
            self.sources[detail["source"]] = detail["read"]
        self.batches.append((staged.first, staged.batch))
        self._adopt_stocks(staged)
        if self.names:
            self.names.extend(staged.names)
        else:
            self.names = staged.names  # a first, large import needs no second list
        self._status.extend(bytes(len(staged.names)))
        for key, new in staged.products.items():
            product = self.products.setdefault(key, new)
            if product is not new:
                product.names.update(new.names)
                product.devices.update(new.devices)
                product.put(new.pool)
                product.bound += new.bound
                product.counts[UNALLOCATED] += new.counts[UNALLOCATED]
            product.low = low_stock_limit(product.total)
            product.restart()
            if new.devices:
                self._grow(max(new.devices.values()))
            for device_id, number in new.devices.items():
                self._device[number] = device_id

    def _adopt_stocks(self, staged: Staged) -> None:
        places: List[int] = []
        known = {stock.product_key: place for place, stock in enumerate(self.stocks) if stock.batch == staged.batch}
        for key, product in staged.products.items():
            place = known.get(key, len(self.stocks))
            places.append(place)
            if place == len(self.stocks):
                self.stocks.append(Stock(key, staged.batch, [0] * len(STATUS_NAMES)))
            self.stocks[place].counts[UNALLOCATED] += product.total
        self._stock_of.extend(array("I", places[:1]) * len(staged.names))
        for place, product in list(zip(places, staged.products.values()))[1:]:
            for number in product.names.values():
                self._stock_of[number] = place

    def _grow(self, number: int) -> None:
        """Make the columns long enough for `number`, and for some that will follow."""
        missing = max(0, min(number + 1000, len(self.names)) - len(self._device))
        self._device.extend([""] * missing)
        self._station.extend([""] * missing)
        self._allocated_at.frombytes(bytes(8 * missing))
        self._written_at.frombytes(bytes(8 * missing))


# What each kind of event makes of a certificate's record. A kind that is not in KINDS is from the future.
EFFECTS: Mapping[str, Callable[[Record, Event], Record]] = {
    "allocate": lambda old, event: _new(
        Record, (ALLOCATED, event.device_id, event.station, event.time, 0, old.rerequests)
    ),
    "rerequest": lambda old, event: old._replace(rerequests=old.rerequests + 1),
    "written": lambda old, event: old._replace(status=WRITTEN, written_at=event.time),
    "failed": lambda old, event: old._replace(status=FAILED, written_at=0),
    "release": lambda old, event: Record(UNALLOCATED, rerequests=old.rerequests),
    "void": lambda old, event: old._replace(status=VOID),
}
KINDS = frozenset(EFFECTS) | {"store", "import", "restore", "reveal"}  # these change no certificate but "import"

# ======================================================================================================================
# 6. Identity-file reader (pure)
# ======================================================================================================================
# CSV from the cloud console or a spreadsheet (CONTRACT 4): bytes in, a credential or a reason for each row out. A
# message never quotes a cell: in a file without a header line, or with shifted columns, any cell may be a secret.

Row = Tuple[int, Union[Credential, str]]  # physical line from 1, and the credential or the reason against it
Columns = Sequence[Sequence[str]]  # of many credentials, in the order of COLUMNS

COLUMNS = ("ProductKey", "DeviceName", "DeviceSecret", "ProductSecret", "ProductID", "DeviceID")  # as in Credential
REQUIRED = COLUMNS[:3]
OPTIONAL_FROM = {"ProductKey": "--product-key", "ProductSecret": "--product-secret", "ProductID": "--product-id"}
SEPARATORS = ",;\t"
NO_ENCODING = "The text is neither UTF-8, UTF-16 with BOM nor GB18030: save it as CSV UTF-8."
UNMATCHED = "A quotation mark is not closed, or text follows one that is."
UNUSED_NAMED = 20  # columns at most that a report names as not used
COLUMN_NAME_LENGTH = 40  # characters; a longer one is no column's name

_PRINTABLE = re.compile(rf"[!-~]{{1,{FIELD_LENGTH}}}")
_DEVICE_NAME = re.compile(r"[A-Za-z0-9\-_@.:]{4,32}")
_MANGLED = re.compile(
    r"-?\d([.,]\d+)?(E[+-]|e\+)\d{2,}|-?\d\.\d+(e-|E)\d{2,}|#+|#(NAME\?|VALUE!|REF!|DIV/0!|NUM!|NULL!|N/A)"
)
_MANGLED_SIGNS = ("E+", "E-", "e+", "e-", "#")  # one of them is in each
_MANGLED_POINT = re.compile(r"\.\d+E\d")  # or this
_MANGLED_CELL = re.compile(rf"(?<![^,;\t\n])(?:{_MANGLED.pattern})(?![^,;\t\r\n])")  # somewhere in plain lines
_COLUMN_KEYS = {column.lower() for column in COLUMNS}  # a name is compared without its case, spaces, `_` and `-`
_LINE_END = "\r\n"


class PlainRows(NamedTuple):
    """Rows that stand in consecutive lines, from `line` on, and are all right."""

    line: int
    columns: Columns

    def rows(self) -> List[Row]:
        """The same, row by row."""
        return list(enumerate(map(Credential._make, zip(*self.columns)), self.line))


class BadFile(CertToolError):
    """A file that is no identity file at all. `line` is the physical line that shows it."""

    http_status = 400
    code = "BadRequest"

    def __init__(self, message: str, line: int = 1) -> None:
        super().__init__(message)
        self.line = line


def check_field(column: str, value: str) -> str:
    """Return "" for a value that may stand in this column, else the reason against it, which does not quote it."""
    if not value:
        return f"{column} is missing." if column in REQUIRED else ""
    if _MANGLED.fullmatch(value):
        return f"{column} was rewritten by a spreadsheet: export the file again and do not save it in a spreadsheet."
    if column == "DeviceName":
        if not _DEVICE_NAME.fullmatch(value):
            return "DeviceName is not 4-32 characters of A-Z a-z 0-9 - _ @ . :"
    elif not _PRINTABLE.fullmatch(value):
        return f"{column} is not 1-{FIELD_LENGTH} printable ASCII characters without white space."
    return ""


class IdentityFile:
    """The rows of one identity file. `ignored` names the columns that are not used.

    Tell nobody of them before a row is right: where the header's line end is lost, they are cells with secrets.
    Construction reads the header line; it raises BadFile where the bytes are no such file. `data` is a stream that can
    be read again, in the encoding that `sniff_encoding` found; it is closed with this. `options` fills ProductKey,
    ProductSecret and ProductID where the file has no such column; its values have passed `check_field`.
    """

    def __init__(self, data: BinaryIO, encoding: str, options: Mapping[str, str]) -> None:
        self._text = io.TextIOWrapper(data, encoding, newline="")
        self._read = 1  # the line that the next block begins with
        self._pending: Deque[Tuple[int, str]] = deque()  # lines of the present block, numbered
        self._cut = False  # the last line was, and the rest of it comes next
        self._split = False  # so may its line end be: a line feed that comes next is of it
        lines = itertools.islice(iter(self._next_line, None), RECORD_LINES)
        start, header = next(((n, text) for n, text in lines if text.strip()), (1, ""))
        if not header:
            raise BadFile("The file is empty: export it again.")
        if "\0" in header:  # UTF-16 without BOM
            raise BadFile(NO_ENCODING, start)
        self._separator, names, keys = _sniff_separator(header)
        self._width = len(names)
        if self._width > MAX_COLUMNS:
            raise BadFile(f"The first line names more than {MAX_COLUMNS:,} columns: export the file again.", start)
        places: List[int] = []  # for each of COLUMNS the index of its cell; behind a row's cells stand the fixed ones
        self._fixed: List[str] = []
        missing = []
        for column in COLUMNS:
            found = [index for index, key in enumerate(keys) if key == column.lower()]
            if len(found) > 1:
                raise BadFile(f"The header line names {column} twice: leave one of them out.", start)
            if not found and column in REQUIRED and not options.get(column):
                missing.append(column + (f" (or {OPTIONAL_FROM[column]})" if column in OPTIONAL_FROM else ""))
            if not found:
                found = [self._width + len(self._fixed)]
                self._fixed.append(options.get(column, ""))
            places += found
        if missing and header.count('"') % 2:
            raise BadFile(UNMATCHED, start)
        if missing:
            raise BadFile(f"The first line must name the columns; there is none for {', '.join(missing)}.", start)
        unused = (name.strip() or "(no name)" for name, key in zip(names, keys) if key not in _COLUMN_KEYS)
        self.ignored = [name for name in unused if len(name) <= COLUMN_NAME_LENGTH][:UNUSED_NAMED]
        self._pick = operator.itemgetter(*places)
        self._plain = self._plain_pattern(places)

    def blocks(self) -> Iterator[Union[PlainRows, List[Row]]]:
        """Yield the rows that are not blank, some hundreds at a time; a bad one never hides those after it.

        Where all are plain and right they come as columns, which is far quicker.
        """
        while True:
            if not self._pending:
                text = self._next_block()
                columns = self._plain_columns(text)
                if columns:
                    yield PlainRows(self._read, columns)
                    self._read += len(columns[0])
                    continue
                self._take_lines(text)
            if not self._pending:
                return
            yield list(itertools.islice(self._pending_rows(), ROWS_SLICE))

    def _pending_rows(self) -> Iterator[Row]:
        while self._pending:
            line, text = self._pending.popleft()
            cells = self._cells(text)
            if isinstance(cells, str):
                yield line, cells
            elif "".join(cells).strip():
                yield line, self._credential(cells)

    def _next_block(self) -> str:
        """Return whole lines, "" at the end of the file.

        Of a line that is far too long comes the beginning, with more cells than a row may have, and then blank lines
        that do not count, since no step may take long.
        """
        was_cut, was_split = self._cut, self._split
        text = "" if was_cut else self._text.read(IMPORT_SLICE)
        end = self._text.readline(LINE_LENGTH)
        self._cut = len(end) == LINE_LENGTH and end[-1] not in _LINE_END
        self._split = end[-1:] == "\r"
        if was_cut:
            self._read -= 1
            return "\n"
        if was_split and text[:1] == "\n":
            text = text[1:]
        return text + end + (SEPARATORS * MAX_COLUMNS + "\n") * self._cut

    def _take_lines(self, text: str) -> None:
        lines = io.StringIO(text, newline="").readlines()
        self._pending.extend(enumerate(lines, self._read))
        self._read += len(lines)

    def _next_line(self) -> Optional[Tuple[int, str]]:
        if not self._pending:
            self._take_lines(self._next_block())
        return self._pending.popleft() if self._pending else None

    def _plain_pattern(self, places: Sequence[int]) -> Callable[[str], Optional[re.Match[str]]]:
        """One expression that accepts only plain and right lines; all others go the long way."""
        characters = (chr(code) for code in range(33, 127) if chr(code) not in self._separator + '"')
        plain = f"[{re.escape(''.join(characters))}]"
        cells = [f'[^{re.escape(self._separator)}"\r\n]*'] * self._width
        for column, place in zip(COLUMNS, places):
            if place < self._width:
                lowest = 1 if column in REQUIRED else 0
                cells[place] = _DEVICE_NAME.pattern if column == "DeviceName" else f"{plain}{{{lowest},{FIELD_LENGTH}}}"
        return re.compile(f"(?:{re.escape(self._separator).join(cells)}\r?\n)+").fullmatch

    def _plain_columns(self, text: str) -> Optional[Columns]:
        """Split lines that are all plain and right; None where one is not."""
        if text[-1:] != "\n":
            text += "\n"
        if not self._plain(text) or (_may_be_mangled(text) and _MANGLED_CELL.search(text)):
            return None
        cells = text.replace("\r", "").replace("\n", self._separator).split(self._separator)
        rows = len(cells) // self._width
        columns = [cells[place : -1 : self._width] for place in range(self._width)]
        picked: Columns = self._pick([*columns, *([value] * rows for value in self._fixed)])
        return picked

    def _cells(self, text: str) -> Union[List[str], str]:
        """Split a row, which a quoted cell may carry over several lines; a reason where its quotes do not match."""
        taken: List[Tuple[int, str]] = []
        quotes, length = text.count('"'), len(text)
        while quotes % 2:
            more = self._next_line() if len(taken) < RECORD_LINES and length < LINE_LENGTH else None
            if more is None:
                break
            taken.append(more)
            quotes += more[1].count('"')
            length += len(more[1])
        record = text + "".join(line for _, line in taken)
        if '"' not in record:
            return record.rstrip(_LINE_END).split(self._separator)
        if quotes % 2 == 0:
            with contextlib.suppress(csv.Error):
                return next(csv.reader([record], delimiter=self._separator, strict=True))
        self._pending.extendleft(reversed(taken))
        return UNMATCHED

    def _credential(self, cells: Sequence[str]) -> Union[Credential, str]:
        if len(cells) != self._width:
            return f"The row has {len(cells)} cells where the header line has {self._width}."
        values = self._pick([*cells, *self._fixed])
        for column, value in zip(COLUMNS, values):
            reason = check_field(column, value)
            if reason:
                return reason
        return Credential(*values)


def _may_be_mangled(text: str) -> bool:
    """Say whether one of the signs is in the text; one character is found in far less time than two."""
    signs = any(sign[-1] in text and sign in text for sign in _MANGLED_SIGNS)
    return signs or ("." in text and bool(_MANGLED_POINT.search(text)))


def in_pieces(data: BinaryIO) -> Iterator[bytes]:
    """Yield all bytes of a stream, from where it stands."""
    return iter(functools.partial(data.read, FILE_PIECE), b"")


def sniff_encoding(data: BinaryIO) -> Generator[None, None, str]:
    """Return the encoding of a stream, which stands at its start again, a part in each step. Raises BadFile."""
    start = data.read(4)
    data.seek(0)
    if start in (b"PK\x03\x04", b"\xd0\xcf\x11\xe0"):
        raise BadFile("This is a spreadsheet, not a CSV file: save it as CSV and import that.")
    lines, utf16 = 0, start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    for encoding in ["utf-16"] if utf16 else ["utf-8-sig", "gb18030"]:
        wrong = yield from _undecodable_line(data, encoding)
        data.seek(0)
        if not wrong:
            return encoding
        lines = max(lines, wrong)
    raise BadFile(NO_ENCODING, lines)


def _undecodable_line(data: BinaryIO, encoding: str) -> Generator[None, None, int]:
    """Return the line that cannot be decoded, 0 where all can."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for piece in in_pieces(data):
            decoder.decode(piece)
            yield
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        left = data.tell() - len(error.object) + error.start
    else:
        return 0
    data.seek(0)
    counter = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)("ignore"), translate=True)
    line = 1
    while left:
        piece = data.read(min(left, FILE_PIECE))
        left -= len(piece)
        line += counter.decode(piece, final=not left).count("\n")
        yield
    return line


def _sniff_separator(header: str) -> Tuple[str, List[str], List[str]]:
    """Return the separator that shows the most known columns, the names of the columns, and the key of each."""
    best: Tuple[int, str, List[str], List[str]] = (-1, ",", [], [])
    for separator in SEPARATORS:
        try:
            names = next(csv.reader([header], delimiter=separator, strict=True))
        except csv.Error:
            continue
        keys = [re.sub(r"[\s_-]", "", name).lower() for name in names]
        score = len(_COLUMN_KEYS.intersection(keys))
        if score > best[0]:
            best = (score, separator, names, keys)
    return best[1:]


# ======================================================================================================================
# 7. Journal codec (pure)
# ======================================================================================================================
# journal.csv, append-only, UTF-8, lines end in LF:
#
#     Seq,Time,Event,ProductKey,DeviceName,DeviceID,Station,Detail,Digest
#     1,2026-11-24T08:00:00.000+08:00,store,,,,,"{""id"":""5f0c..."",""version"":1}",9a0364b9e99bb480
#     2,2026-11-24T08:00:00.120+08:00,import,,,,127.0.0.1,"{""file"":""000001-sample.csv"",""rows"":20,...}",3fc1...
#     3,2026-11-24T08:00:07.561+08:00,allocate,a1SampleWf0,lamp-0001,A0B1C2D3E4F5,192.168.1.20,,77de...
#
#   Seq     counts from 1 without a gap: it is the order of events, clocks jump
#   Time    local time with its offset, milliseconds
#   Event   store, import, a change of a certificate, reveal: a person has seen its secrets, or restore: a person has
#           accepted an old copy of the store
#   Detail  a JSON object, only for kinds that need more than the columns
#   Digest  first 16 hex digits of SHA-256(digest of the line before + this line up to its last comma): the last one
#           seals all history
#
# A cell that a spreadsheet would take for a formula carries a leading apostrophe, which reading takes off again.
# Only a last line without its LF may be cut: a write that a power cut tore. Nothing in it was ever acknowledged.

FORMAT_VERSION = 1
JOURNAL_HEADER = b"Seq,Time,Event,ProductKey,DeviceName,DeviceID,Station,Detail,Digest\n"
DIGEST_LENGTH = 16
COMMA = b","[0]  # between a line's body and its digest, and in neither
JOURNAL_SLICE = 500  # lines decoded in one step
EPOCH, MILLISECOND = datetime(1970, 1, 1, tzinfo=timezone.utc), timedelta(milliseconds=1)

csv.field_size_limit(0x7FFF_FFFF)  # what we wrote we must be able to read; csv's own limit is 131,072 characters

_SIGNS = r"=+\-@\uff1d\uff0b\uff0d\uff20"  # a formula begins with one, to some spreadsheets also in full width
_BEGINS_AS_FORMULA = re.compile(rf"[{_SIGNS}'\t\r\n]").match
_PLAIN_CELL = rf"[^{_SIGNS}'\",\t\r\n][^\",\r\n]*"  # one that stands in a line as it is
_PLAIN = re.compile(_PLAIN_CELL).fullmatch
_PLAIN_CELLS = re.compile(4 * f"{_PLAIN_CELL},").fullmatch  # four of them, and an empty one
_OTHER_KIND = re.compile(rf"\n\d+,[^,\n]*,(?!({'|'.join(KINDS)}),)".encode()).search  # behind a line end
_PART_THAT_RUNS = re.compile(rf";[\s\"]*(?=[{_SIGNS}])")  # to a spreadsheet whose cells end at `;`


def encode_cell(text: str) -> str:
    """Write one cell so that any CSV reader reads it back, and no spreadsheet runs it."""
    if not text or _PLAIN(text):
        return text
    if _BEGINS_AS_FORMULA(text):
        text = "'" + text
    if '"' in text or "," in text or "\n" in text or "\r" in text:
        return '"' + text.replace('"', '""') + '"'
    return text


def format_row(cells: Iterable[str]) -> str:
    """Write a line that is only for people: no spreadsheet runs it, not even one whose cells end at `;`."""
    line = ",".join(map(encode_cell, cells))
    return _PART_THAT_RUNS.sub(r"\g<0>'", line) if ";" in line else line


def decode_cells(text: str) -> List[str]:
    """Read a line of cells that `encode_cell` wrote. Raises csv.Error where the quotes do not match."""
    cells = next(csv.reader([text], strict=True)) if '"' in text else text.split(",")
    if "'" in text:
        cells = [cell[1:] if cell[:1] == "'" else cell for cell in cells]
    return cells


def decode_columns(text: str, width: int) -> Columns:
    """Read whole lines of `width` cells that `encode_cell` wrote, as columns. Raises ValueError or csv.Error.

    A cell too many in one line and one too few in another may pass: a digest has to say that the lines are right.
    """
    if '"' in text or "'" in text:
        rows = list(map(decode_cells, text.split("\n")[:-1]))
        cells = list(itertools.chain.from_iterable(rows))
        right = all(len(row) == width for row in rows)
    else:
        cells = text.replace("\n", ",").split(",")[:-1]
        right = len(cells) == width * text.count("\n")
    if not right or text[-1:] != "\n":
        raise ValueError("a line has another number of cells")
    return [cells[place::width] for place in range(width)]


@functools.lru_cache(maxsize=4)
def _second_as_text(second: int) -> Tuple[str, str]:
    text = datetime.fromtimestamp(second, timezone.utc).astimezone().isoformat()
    return text[:19], text[19:]


@functools.lru_cache(maxsize=64)
def format_time(milliseconds: int) -> str:
    """Return ISO 8601 local time with offset, from milliseconds since 1970 UTC; "" for 0, which never happened."""
    if not milliseconds:
        return ""
    second, rest = divmod(milliseconds, 1000)
    date, offset = _second_as_text(second)
    return f"{date}.{rest:03d}{offset}"


def parse_times(texts: Sequence[str]) -> List[int]:
    """Return the milliseconds since 1970 UTC of what `format_time` wrote. Raises ValueError."""
    try:
        return [(moment - EPOCH) // MILLISECOND for moment in map(datetime.fromisoformat, texts)]
    except TypeError:
        raise ValueError("a time without its offset") from None


def chain_digest(previous: str, body: bytes) -> str:
    """Return the digest of a line whose predecessor has the digest `previous`; `body` ends before the last comma."""
    return hashlib.sha256(previous.encode() + body).digest()[: DIGEST_LENGTH // 2].hex()


class JournalWriter:
    """Encodes events one after the other. `seq` and `digest` are those of the last line; a caller may put them back."""

    def __init__(self, seq: int = 0, digest: str = "") -> None:
        self.seq = seq
        self.digest = digest or chain_digest("", JOURNAL_HEADER)

    def encode(self, events: Iterable[Event]) -> bytes:
        """Return the lines of consecutive events; a journal's first follow its header."""
        seq, digest = self.seq, self.digest
        parts = [] if seq else [JOURNAL_HEADER]
        for kind, moment, product_key, device_name, device_id, station, detail in events:
            cells = f"{product_key},{device_name},{device_id},{station},"
            if detail or not _PLAIN_CELLS(cells):
                text = json.dumps(detail, ensure_ascii=False, separators=(",", ":")) if detail else ""
                cells = ",".join(map(encode_cell, (product_key, device_name, device_id, station, text)))
            seq += 1
            body = f"{seq},{format_time(moment)},{kind},{cells}".encode("utf-8", "replace")
            digest = chain_digest(digest, body)
            parts += (body, b",", digest.encode(), b"\n")
        self.seq, self.digest = seq, digest
        return b"".join(parts)


def decode_event(body: bytes) -> Tuple[str, Event]:
    """Return number and event of a line; `body` ends before the last comma. Raises ValueError or csv.Error."""
    seq, moment, kind, product_key, device_name, device_id, station, detail = decode_cells(body.decode())
    details = json.loads(detail) if detail else {}
    return seq, Event(kind, parse_times([moment])[0], product_key, device_name, device_id, station, details)


class JournalReader:
    """Decodes a journal line by line. At each event `seq` and `digest` are those of its line; `offset` moves behind it
    when the next one is asked for.

    `torn` is what follows the last line end: a write that was cut short. Iterating raises StoreError at any other
    damage and names the line. With `about`, parts of lines, most of the other lines are passed over: they are only
    checked to be what was written.
    """

    def __init__(self, about: Sequence[bytes] = ()) -> None:
        self.about = about
        self.offset = 0
        self.seq = 0
        self.digest = ""
        self.torn = b""

    def events(
        self, lines: Iterable[bytes], together: Callable[[Optional[Events]], int] = lambda events: 0
    ) -> Iterator[Event]:
        """Yield the event of each whole line; `lines` are the file's, each with its LF.

        `together` is offered those of many lines at once, before `seq` and the others move; as many as it says, from
        the first on, are not yielded. It is told None of many lines that are passed over.
        """
        lines = iter(lines)
        for block in iter(lambda: list(itertools.islice(lines, JOURNAL_SLICE if self.seq else 1)), []):
            many, digests = self._decode_many(block) if self.seq else (None, [])
            taken = together(many) if digests else 0
            done = taken if many else len(digests)
            if done:
                self.offset += sum(map(len, block[:done]))
                self.seq += done
                self.digest = digests[done - 1]
            left = zip(many.rows(done), digests[done:]) if many else itertools.repeat(None)
            for line, decoded in zip(block[done:], left):
                if decoded:
                    event, self.digest = decoded
                    self.seq += 1
                    yield event
                elif line[-1:] != b"\n":
                    self.torn = line
                    return
                elif self.offset:
                    yield self._decode(line)
                elif line == JOURNAL_HEADER:
                    self.digest = chain_digest("", line)
                else:
                    raise self._damage("is not the header of a journal")
                self.offset += len(line)

    def _decode_many(self, lines: Sequence[bytes]) -> Tuple[Optional[Events], List[str]]:
        """Return events and digests of the lines; no digests where one is not in order, which `_decode` finds out.

        No events, where nothing in these lines is what the reader is `about`.
        """
        end = -DIGEST_LENGTH - 2  # of a line's body
        told = [line[end + 1 : -1] for line in lines]
        links = map(operator.add, [self.digest.encode(), *told], (line[:end] for line in lines))
        digests = [link.hexdigest()[:DIGEST_LENGTH] for link in map(hashlib.sha256, links)]
        if "".join(digests).encode() != b"".join(told) or lines[-1][-1:] != b"\n":
            return None, []
        whole = b"".join(lines)
        if self.about and not any(part in whole for part in self.about) and not _OTHER_KIND(b"\n" + whole):
            return None, digests if all(line[end] == COMMA for line in lines) else []
        try:
            columns = decode_columns(whole.decode(), JOURNAL_HEADER.count(b",") + 1)
            seqs, moments, kinds, product_keys, device_names, device_ids, stations, texts, ends = columns
            times = parse_times(moments)
            details = [json.loads(text) if text else {} for text in texts] if any(texts) else [{}] * len(lines)
        except (ValueError, csv.Error):
            return None, []
        expected = list(map(str, range(self.seq + 1, self.seq + 1 + len(lines))))
        in_order = seqs == expected and ends == digests and set(kinds) <= KINDS - {"store"}
        if not in_order or set(map(type, details)) != {dict}:
            return None, []
        return Events(kinds, times, product_keys, device_names, device_ids, stations, details), digests

    def _decode(self, line: bytes) -> Event:
        body, _, digest = line[:-1].rpartition(b",")
        expected = chain_digest(self.digest, body)
        if digest != expected.encode():
            raise self._damage("was changed, or a line before it is missing")
        try:
            seq, event = decode_event(body)
            kind = event.kind
            if int(seq) != self.seq + 1 or (kind == "store") != (self.seq == 0) or not isinstance(event.detail, dict):
                raise ValueError("out of order, or its detail is no object")
        except (ValueError, csv.Error):
            raise self._damage("is not an event") from None
        if kind not in KINDS or (kind == "store" and event.detail.get("version") != FORMAT_VERSION):
            raise StoreError(
                f"journal.csv line {self.seq + 2} ({kind[:40]!a}) was written by a newer certtool: use that one."
            )
        self.seq += 1
        self.digest = expected
        return event

    def _damage(self, what: str) -> StoreError:
        line = self.seq + 2 if self.offset else 1
        return StoreError(
            f"journal.csv line {line} {what}. Nothing was changed. Put back the last good copy of the whole store, and "
            "ask which certificates were given out since then before serving."
        )


# ======================================================================================================================
# 8. Store: lock, import files, journal
# ======================================================================================================================
# A folder; nothing in it is ever overwritten but what the lock file tells.
#
#     imports/000001-NAME.csv   what was imported, canonical columns, never changed again
#     journal.csv               one line an event (7), append-only
#     journal.torn-OFFSET       bytes that recovery cut off the journal there, for the curious
#     lock                      held by the one writer; tells who that is
#     open-page.html            leads the browser to the page (12) while serve --open runs
#
# Crash windows. An import file is complete and synced before its event is written; without the event it is an orphan
# that nobody reads. An event counts once its line is whole and synced; a torn last line was never acknowledged, so the
# next writer cuts it. After a failed write the file is cut back to the last good line. After a failed fsync nobody
# knows what is on the disk, so this process records nothing any more; the next start reads what is there.
#
# Two guards stand outside the folder. The high-water mark, in the user's profile, knows how far the store has come: an
# old copy that was put back is refused. The mirror, where one is wanted, is a second copy on another disk, written
# after the store and before the reply; it may fall behind, never run ahead.

IMPORT_COLUMNS = (*COLUMNS, "CRC32")
IMPORT_HEADER = ",".join(IMPORT_COLUMNS).encode() + b"\n"
MARK_LENGTH = 12 + 1 + DIGEST_LENGTH + 1 + DIGEST_LENGTH + 1  # bytes of a line: seq, digest, and a digest over both
OPEN_IMPORTS = 16  # import files kept open for reading
READ_BYTES = 1 << 17  # of an import file, or of a file that the mirror copies, in one step
READ_AHEAD = 50  # certificates read together where they are given out in order
LOOK_BACK_BYTES = 1 << 18  # of the journal in one step
TORN_READS = 5  # a reader beside a writer may meet half a line: look again before calling it torn
TORN_SECONDS = 0.05  # between two such looks
NOT_THROUGH_LINKS = getattr(os, "O_NOFOLLOW", 0)  # to open no file elsewhere; Windows has no such flag

Progress = Callable[[str, int, int], None]  # what is being done, units done, units in all


class Certificate(NamedTuple):
    """A credential with its checksum as 8 upper-case hex digits."""

    credential: Credential
    crc32: str


def _patiently(action: Callable[[], int]) -> int:
    """On Windows an antivirus may hold a new file for a moment: try again for a while."""
    if sys.platform == "win32":
        deadline = time.monotonic() + ANTIVIRUS_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(PermissionError):
                return action()
            time.sleep(0.05)
    return action()


def _open(path: str, flags: int) -> int:
    return _patiently(lambda: os.open(path, flags | getattr(os, "O_BINARY", 0), 0o600))


def _restrict(descriptor: int) -> None:
    """Close a file to other users, where a copy of the store brought other rights along."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, 0o600)


def _keep_private(folder: str) -> str:
    """Close imports/ to other users, whatever rights a copy brought along; say so where they can still look.

    Windows knows no such mode.
    """
    imports = os.path.join(folder, "imports")
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            os.chmod(imports, 0o700)
        if os.stat(imports).st_mode & 0o077:
            return f"Other users of this PC can read {folder}: keep it where only you can."
    return ""


def _forbid_changes(folder: str) -> str:
    """Let no other user put a file in the place of the store's; say so where one could, or still can.

    Where a folder's sticky bit does it, it is left.
    """
    mode = os.stat(folder).st_mode
    if sys.platform == "win32" or not mode & 0o022 or mode & 0o1000:
        return ""
    with contextlib.suppress(OSError):
        os.chmod(folder, mode & 0o7755)
    if os.stat(folder).st_mode & 0o022:
        return f"Other users of this PC can change {folder}: keep it where only you can."
    return f"Other users of this PC could change {folder}: from now on only you can."


def _is_of_stranger(descriptor: int, path: str) -> bool:
    """Say whether a file was put here by another user, who can read and change it whatever its mode.

    Not root, whom nothing is hidden from; and root may work for the user whose folder it is in. A share may call each
    file one of the same user, ours too.
    """
    if sys.platform == "win32":
        return False
    folder, owner, user = os.path.dirname(path), os.fstat(descriptor).st_uid, os.geteuid()
    if owner in (0, user) or (user == 0 and owner == os.stat(folder).st_uid):
        return False
    import tempfile  # noqa: PLC0415 - hardly ever needed

    with tempfile.TemporaryFile(dir=folder) as ours:
        return owner != os.fstat(ours.fileno()).st_uid


def _open_to_read(path: str) -> BinaryIO:
    """Open a file that an antivirus may hold for a moment: it looks at what is new, and at what is read again."""
    return open(path, "rb", opener=_open)


def _open_in_steps(path: str) -> Generator[None, None, BinaryIO]:
    """As `_open_to_read`, for what a server reads: it answers devices meanwhile."""
    deadline = time.monotonic() + ANTIVIRUS_SECONDS
    while True:
        try:
            return open(path, "rb")
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() > deadline:
                raise
        yield
        time.sleep(0.002)


def _remedy(error: OSError) -> str:
    """Say what to do where the store's disk refused a call."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free the store's disk"
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "check the store's disk"
    # Windows calls it the same where another program, such as a spreadsheet, has it open, or the disk has a fault.
    return "close it in other programs, or check its rights and disk" if sys.platform == "win32" else "check its rights"


def _in_place(facts: os.stat_result, path: str) -> bool:
    """Say whether the file that is open is still the one at this path."""
    try:
        return os.path.samestat(facts, os.stat(path))
    except FileNotFoundError:
        return False


def _write_all(descriptor: int, data: bytes) -> None:
    """Write all or raise OSError: a full disk takes a part without an error."""
    if os.write(descriptor, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _sync_folder(path: str) -> None:
    """Make a new name in a folder durable. Windows has no such call."""
    if sys.platform != "win32":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _make_folder(path: str) -> None:
    """Make a folder for this user alone, and those above it, and make their names durable."""
    if not os.path.isdir(path):
        parent = os.path.dirname(os.path.abspath(path))
        if parent != path:  # else its drive is missing
            _make_folder(parent)
        os.mkdir(path, 0o700)
        _sync_folder(parent)


def _sync_with_those_above(path: str) -> None:
    """Make the names in a folder durable, and its own name and theirs, whoever made them."""
    _sync_folder(path)
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        with contextlib.suppress(OSError):  # not ours to open, so not made by us
            _sync_folder(path)


def _try_lock(descriptor: int) -> bool:
    """Take the exclusive lock; False where another process has it. It ends with the descriptor or the process."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, LOCK_OFFSET, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True


class Lock:
    """The right to write to a store, held until `release` or the end of the process.

    Raises StoreBusy where another process holds it. The file tells others who the holder is and how to reach it; that
    is true only while the lock is held, and nobody else reads it, since it is 0600. Raises StoreError where another
    user made it: its owner could read our token in it, or tell us of a server that only takes what it is handed.
    """

    def __init__(self, path: str, command: str) -> None:
        self._descriptor = _open(path, os.O_RDWR | os.O_CREAT | NOT_THROUGH_LINKS)
        try:
            if _is_of_stranger(self._descriptor, path):
                raise StoreError(
                    f"{path} was made by another user of this PC, who could learn the secrets by it: find out who, "
                    "delete it, and keep the store where only you can write."
                )
            _restrict(self._descriptor)
            if not _try_lock(self._descriptor):
                raise self._busy(path)
            self.announce({"pid": os.getpid(), "command": command})
        except BaseException:
            os.close(self._descriptor)
            raise

    def announce(self, facts: Mapping[str, Any]) -> None:
        """Tell others about the holder: `pid`, `command`, and of a server `address`, `port` and `token`."""
        there = min(os.fstat(self._descriptor).st_size, LOCK_BYTES)  # Windows cuts no file that a scanner has mapped
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        _write_all(self._descriptor, json.dumps(facts).encode().ljust(there))

    def release(self) -> None:
        """Give the lock back."""
        with contextlib.suppress(OSError):  # then it tells about us, but holds nobody up
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def _busy(self, path: str) -> StoreBusy:
        holder: Mapping[str, Any] = {}
        for _ in range(TORN_READS):
            with contextlib.suppress(OSError, ValueError):
                os.lseek(self._descriptor, 0, os.SEEK_SET)
                holder = json.loads(os.read(self._descriptor, LOCK_BYTES))
                break
            time.sleep(TORN_SECONDS)
        who = f"certtool {holder.get('command', '')}".strip() + f" (process {holder.get('pid', 'unknown')}"
        who += f", port {holder['port']}): stop that first." if "port" in holder else "): wait until it is done."
        return StoreBusy(f"The store {os.path.dirname(path)} is in use by {who}", holder)


def _parts(texts: Iterable[str]) -> List[bytes]:
    """The parts of lines, of the journal or an import file, in which one of these texts is a cell."""
    return [f",{encode_cell(text)},".encode("utf-8", "replace") for text in texts]


def _certificates_of(data: bytes) -> Iterator[Certificate]:
    *columns, checksums = decode_columns(data.decode("ascii"), len(IMPORT_COLUMNS))
    credentials = map(functools.partial(_new, Credential), zip(*columns))
    return map(functools.partial(_new, Certificate), zip(credentials, checksums))


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.read(READ_BYTES) + file.readline(), b"")


class ImportFile:
    """One file in imports/, known by where each row starts."""

    def __init__(self, path: str, first: int) -> None:
        self.path = path
        self.first = first
        self.offsets = array("I")
        self.file: Optional[BinaryIO] = None
        self._ahead: Dict[int, Certificate] = {}
        self._in_order = -1  # the number that follows the last one that was read
        self._whole = True  # all rows are certificates of ours

    def load(self, staged: Staged, sha256: str, rows: int, progress: Progress, about: Sequence[bytes] = ()) -> None:
        """Read all rows, or only those with one of the parts `about`, into `staged`.

        Raises StoreError unless the file is, byte for byte, what was imported.
        """
        self._whole = not about
        digest = hashlib.sha256(IMPORT_HEADER)
        offset = len(IMPORT_HEADER)
        count = 0
        try:
            with _open_to_read(self.path) as file:
                right = file.readline() == IMPORT_HEADER
                for data in _whole_lines(file):
                    digest.update(data)
                    count += data.count(b"\n")
                    if not about:
                        self._stage(staged, data, offset)
                    elif any(part in data for part in about):
                        place = offset
                        for line in data.splitlines(keepends=True):
                            if any(part in line for part in about):
                                self._stage(staged, line, place)
                            place += len(line)
                    offset += len(data)
                    progress(f"reading {os.path.basename(self.path)}", count, rows)
        except OSError as error:
            lost = isinstance(error, FileNotFoundError)
            raise StoreError(
                f"{self.path} cannot be read ({error.strerror}): "
                f"{'put it back, it holds certificates' if lost else _remedy(error)}."
            ) from None
        except (ValueError, TypeError, csv.Error):
            right = False
        if not right or digest.hexdigest() != sha256 or count != rows:
            raise StoreError(f"{self.path} is not as it was imported. Nothing was changed. Put the good copy back.")

    def _stage(self, staged: Staged, data: bytes, offset: int) -> None:
        text = data.decode("ascii")
        self.add_offsets(text.splitlines(), offset)
        keys, names, _, _, _, device_ids, _ = decode_columns(text, len(IMPORT_COLUMNS))
        staged.add(keys, names, device_ids)

    def find_rows(self) -> Generator[None, None, None]:
        """Note where the rows of a new file start, a part in each step. Raises OSError."""
        with (yield from _open_in_steps(self.path)) as file:
            offset = len(file.readline())
            for data in _whole_lines(file):
                self.add_offsets(data.splitlines(), offset)
                offset += len(data)
                yield

    def add_offsets(self, lines: Sequence[Sized], offset: int) -> None:
        """Note where rows start, the first at `offset`; `lines` are without their line ends."""
        starts = itertools.accumulate(map(len, lines), initial=offset)  # line ends not counted
        if self.offsets.typecode == "I" and offset + sum(map(len, lines)) + len(lines) >= 1 << 32:
            self.offsets = array("Q", self.offsets)
        self.offsets.extend(array(self.offsets.typecode, map(operator.add, starts, range(len(lines)))))

    def certificate(self, number: int) -> Certificate:
        """Return one of them. Raises OSError, ValueError or csv.Error where the file was changed.

        The pool is given out in order: whoever asks for the next one gets it from those that were read together.
        """
        found = self._ahead.get(number)
        if found is None:
            if not self.offsets:
                deque(self.find_rows(), 0)
            if self.file is None:
                self.file = open(self.path, "rb")  # noqa: SIM115 - kept open, closed by the store
            self.file.seek(self.offsets[number - self.first])
            rows = READ_AHEAD if self._whole and number == self._in_order else 1
            data = b"".join(itertools.islice(self.file, rows))
            self._ahead = dict(enumerate(_certificates_of(data), number))
            self._in_order = number + len(self._ahead)
            found = self._ahead[number]
        return found

    def close(self) -> None:
        """Close the file; reading opens it again."""
        self._ahead = {}
        if self.file:
            self.file.close()
            self.file = None


def encode_rows(columns: Columns, checksums: Sequence[int]) -> str:
    """Return the lines of an import file for these certificates."""
    hexadecimal = struct.pack(f">{len(checksums)}I", *checksums).hex(",", 4).upper()
    cells = [*columns, hexadecimal.split(",")]
    text = "\n".join(["", *map(",".join, zip(*cells)), ""])
    guarded = [sign for sign in "=+-@'" if sign in text and ("," + sign in text or "\n" + sign in text)]
    if guarded or '"' in text or text.count(",") != len(COLUMNS) * len(checksums):
        text = "\n".join(["", *(",".join(map(encode_cell, row)) for row in zip(*cells)), ""])
    return text[1:]


class ImportWriter:
    """A new file in imports/. It becomes part of the store when the event with its `detail` is committed."""

    def __init__(self, folder: str, number: int, name: str, first: int, mirror: Optional[Mirror]) -> None:
        self._mirror = mirror
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", os.path.splitext(name)[0]).strip("._")[:40] or "import"
        self.name = f"{number:06d}-{stem}.csv"
        self.imported = ImportFile(os.path.join(folder, self.name), first)
        self._digest = hashlib.sha256(IMPORT_HEADER)
        self._rows = 0
        self._descriptor = -1
        try:
            self._descriptor = _open(self.imported.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            _write_all(self._descriptor, IMPORT_HEADER)
        except FileExistsError:  # not ours
            raise
        except BaseException:  # Ctrl-C too, in the moment in which the file is made
            self.discard()
            raise

    def write(self, columns: Columns, checksums: Sequence[int]) -> None:
        """Append rows. Raises OSError; the file is then only good to be discarded."""
        data = encode_rows(columns, checksums).encode("ascii")
        self._rows += len(checksums)
        self._digest.update(data)
        _write_all(self._descriptor, data)

    def sync(self) -> None:
        """Make the file and its name durable, and close it. It may run in another thread.

        Raises OSError, or StoreUnavailable where it is not in its place any more.
        """
        os.fsync(self._descriptor)
        facts = os.fstat(self._descriptor)
        self._close()
        _sync_folder(os.path.dirname(self.imported.path))
        if not _in_place(facts, self.imported.path):
            raise changed_at_once(self.imported.path)
        if self._mirror:
            self._mirror.add_import(self.imported.path)

    def detail(self) -> Dict[str, Any]:
        """What the import's event says of this file."""
        return {"file": self.name, "rows": self._rows, "sha256": self._digest.hexdigest()}

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def discard(self) -> None:
        """Remove the file of an import that will not be committed."""
        with contextlib.suppress(OSError):
            self._close()
        with contextlib.suppress(OSError):  # an orphan is harmless, and the next start says that it is there
            os.unlink(self.imported.path)


def changed_at_once(path: str) -> StoreUnavailable:
    """What to raise where a new import file is not as it was written."""
    name = os.path.basename(path)
    return StoreUnavailable(f"Another program changed imports/{name} at once: find out which, and import again.")


class HighWaterMark:
    """How far the store `store_id` has come on this PC, kept in `folder`, which no copy of a store brings back.

    Two lines, overwritten in turn and not synced before the end: a torn write leaves the other line whole, and a power
    cut leaves the mark at worst behind the journal, which is harmless. Raises OSError, or StoreError where a copy of
    the store is in use: the mark is locked as the store is.
    """

    def __init__(self, folder: str, store_id: str, writer: bool = True) -> None:
        self.seq, self.digest = 0, ""
        if writer:
            os.makedirs(folder, 0o700, exist_ok=True)
        self._descriptor = _open(os.path.join(folder, store_id), os.O_RDWR | os.O_CREAT if writer else os.O_RDONLY)
        try:
            if writer and not _try_lock(self._descriptor):
                raise StoreError("A copy of this store is in use on this PC: stop the certtool that serves it.")
            self._read()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _read(self) -> None:
        self._place = 0  # of the line to overwrite next
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        data = os.read(self._descriptor, 2 * MARK_LENGTH)
        for place in (0, MARK_LENGTH):
            body, _, check = data[place : place + MARK_LENGTH - 1].rpartition(b" ")
            if body and chain_digest("", body).encode() == check and int(body[:12]) > self.seq:
                self.seq, self.digest = int(body[:12]), body[13:].decode()
                self._place = MARK_LENGTH - place

    def put(self, seq: int, digest: str) -> None:
        """Move the mark, without waiting for the disk. Raises OSError."""
        body = b"%012d %s" % (seq, digest.encode())
        line = body + b" " + chain_digest("", body).encode() + b"\n"
        os.lseek(self._descriptor, self._place, os.SEEK_SET)
        _write_all(self._descriptor, line)
        self._place = MARK_LENGTH - self._place
        self.seq, self.digest = seq, digest

    def reset(self) -> None:
        """Forget the mark, so that a lower one can be put. Raises OSError."""
        os.ftruncate(self._descriptor, 0)

    def close(self) -> None:
        """Sync and close the file."""
        with contextlib.suppress(OSError):  # then the mark may stay behind the journal
            os.fsync(self._descriptor)
        os.close(self._descriptor)


def marks_folder() -> str:
    """The folder of the high-water marks in the user's profile; "", which cannot be made, where there is no profile."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "")
    else:
        base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(base, "certtool") if os.path.isabs(base) else ""


class Mirror:
    """A second copy of journal and imports, on another disk. It never raises OSError: without it the line goes on.

    `failure` is "" while the copy is whole; then `warn` is told, again and again, until a restart catches up.
    """

    def __init__(self, folder: str, warn: Callable[[str], None]) -> None:
        self.failure = ""
        self._folder = folder
        self._warn = warn
        self._remind_at = 0.0
        self._journal = -1

    def catch_up(self, store: str, imports: Sequence[str]) -> None:
        """Compare with the store's files and add what is missing. Raises StoreError where this is no copy of them."""
        try:
            ours, theirs = (os.path.normcase(os.path.realpath(path)) + os.sep for path in (store, self._folder))
            if theirs.startswith(ours):
                raise StoreError("The mirror is the store itself, or in it: name a folder on another disk.")
            _make_folder(os.path.join(self._folder, "imports"))
            if os.path.samefile(self._folder, store):  # by another name, such as that of a share or a bind mount
                raise StoreError("The mirror is the store itself: name a folder on another disk.")
            if os.stat(self._folder).st_dev == os.stat(store).st_dev:
                self._warn(f"The mirror {self._folder} is on the store's own disk, and ends with it: name another.")
            readable = _keep_private(self._folder)
            if readable:
                self._warn(readable)
            self._complete(os.path.join(store, "journal.csv"), os.path.join(self._folder, "journal.csv"), lines=2)
            for name in [*(os.path.join("imports", name) for name in imports), "journal.csv"]:
                self._complete(os.path.join(store, name), os.path.join(self._folder, name))
            _sync_folder(os.path.join(self._folder, "imports"))
            _sync_with_those_above(self._folder)
            self._journal = _open(os.path.join(self._folder, "journal.csv"), os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            self._fail(error)

    def _complete(self, path: str, copy: str, lines: Optional[int] = None) -> None:
        """Make `copy` what `path` is, where it is a beginning of it, but for a torn last line.

        With `lines` so many are only compared: two of a journal tell whether it is of this store.
        """
        with _open_to_read(path) as source:
            descriptor = _open(copy, os.O_RDWR | os.O_CREAT | NOT_THROUGH_LINKS)
            with open(descriptor, "rb") as target:
                if _is_of_stranger(descriptor, copy):
                    raise PermissionError(errno.EPERM, f"another user made {copy}")
                _restrict(descriptor)
                same = 0  # bytes of whole lines that are equal
                for line in itertools.islice(target, lines):
                    if line != source.read(len(line)):
                        if line[-1:] == b"\n" and self._counts(copy):
                            raise self._no_copy(path, copy)
                        break
                    same += len(line)
                if lines:
                    return
                source.seek(same)
                os.ftruncate(descriptor, same)
                os.lseek(descriptor, 0, os.SEEK_END)
                for data in iter(lambda: source.read(READ_BYTES), b""):
                    _write_all(descriptor, data)
                os.fsync(descriptor)

    def _counts(self, copy: str) -> bool:
        """Say whether a file is more than what an import left here that was taken back: our journal does not name that.

        The store gives its number to another import then, which may be made without this mirror.
        """
        journal, name = os.path.join(self._folder, "journal.csv"), os.path.basename(copy).encode()
        if copy == journal:
            return True
        with _open_to_read(journal) as file:
            return any(name in line for line in file)

    def check_unused(self, store: str) -> None:
        """Raise StoreError where this holds a journal, before the store gets a new one."""
        path, copy = (os.path.join(folder, "journal.csv") for folder in (store, self._folder))
        if os.path.exists(copy) and os.path.getsize(copy):
            raise self._no_copy(path, copy)

    def _no_copy(self, path: str, copy: str) -> StoreError:
        return StoreError(
            f"{copy} is no copy of {path}. Nothing was changed. If the mirror is the newer one, the store is an old "
            "copy, or lost: put the mirror's files into it. Else name another folder with --mirror, or delete that "
            "file."
        )

    def add_import(self, path: str) -> None:
        """Copy an import file whose event comes next. It may run in another thread."""
        if self.failure:
            return
        try:
            copy = os.path.join(self._folder, "imports", os.path.basename(path))
            how = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | NOT_THROUGH_LINKS
            os.close(_open(copy, how))  # what an import left that was taken back
            self._complete(path, copy)
            _sync_folder(os.path.dirname(copy))
        except OSError as error:
            self._fail(error)

    def write(self, data: bytes) -> None:
        """Append the journal lines that the store has just made durable, and make them durable here."""
        if self.failure:
            self._remind()
        if self.failure or self._journal < 0:  # what came before `catch_up` is added there
            return
        try:
            if not _in_place(os.fstat(self._journal), os.path.join(self._folder, "journal.csv")):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            _write_all(self._journal, data)
            os.fsync(self._journal)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.failure = (
            f"THERE IS NO SECOND COPY: the mirror {self._folder} failed ({error.strerror}). The line goes on without "
            "it. Mend the disk and start again: what is missing is added then."
        )
        self._remind()

    def _remind(self) -> None:
        if time.monotonic() >= self._remind_at:
            self._remind_at = time.monotonic() + MIRROR_REMINDER_SECONDS
            self._warn(self.failure)

    def close(self) -> None:
        """Close the journal's copy."""
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1


class Store:
    """The files. What the service asks of it is what a store on a database server would have to offer:

    `load` once; `certificate` to read one, `all_certificates` to audit; `append`, `commit` and `stop` to record;
    `new_import` and `adopt` to add certificates; `look_back` for what happened; `close`. `notes` are sentences for
    the operator about what was found.

    A writer takes the lock, makes a new store where there is none, and repairs a torn tail. A reader (`writer=False`)
    changes nothing and may run beside a writer. Construction and `load` raise StoreError (StoreBusy) and change
    nothing.

    `marks` is the folder of the high-water marks, None for no such guard; `mirror` that of the second copy, "" for
    none. `accept`, who and why, lets an old copy be opened, and records that; it is refused where there is none.
    """

    def __init__(
        self,
        folder: str,
        command: str = "",
        writer: bool = True,
        marks: Optional[str] = None,
        mirror: str = "",
        accept: Optional[Mapping[str, Any]] = None,
    ) -> None:
        self.folder = folder
        self.writer = writer
        self.notes: List[str] = []
        self.warn: Callable[[str], None] = self.notes.append  # of what happens later
        self._marks = marks
        self._mark: Optional[HighWaterMark] = None
        self._digest_at_mark = ""
        self._accept = accept
        self._mirror = Mirror(mirror, lambda sentence: self.warn(sentence)) if mirror else None  # as `warn` is then
        self.lock: Optional[Lock] = None
        self._imports_folder = os.path.join(folder, "imports")
        self._journal_path = os.path.join(folder, "journal.csv")
        self._imports: List[ImportFile] = []
        self._firsts: List[int] = []
        self._open_imports: Deque[ImportFile] = deque()
        self._journal = -1
        self._offset = 0
        self._codec = JournalWriter()
        self._committed = (self._codec.seq, self._codec.digest)
        self._events: List[Event] = []  # of the next commit
        self.broken = ""
        self._last_import = 0  # the highest number of a file in imports/
        try:
            self._open_folder(command)
        except StoreError as error:
            error.notes = self.notes
            raise

    # -- opening and recovery ------------------------------------------------------------------------------------------

    def _open_folder(self, command: str) -> None:
        folder = self.folder
        nearest = folder
        while not os.path.exists(nearest) and nearest != os.path.dirname(nearest):
            nearest = os.path.dirname(nearest)
        if os.path.exists(nearest) and not os.path.isdir(nearest):
            raise StoreError(f"{nearest} is a file, not a folder: name another folder with --data.")
        if not self.writer:
            return
        try:
            new = not os.path.isdir(folder)
            _make_folder(folder)
            self.notes += filter(None, [_forbid_changes(folder)])
            self.lock = Lock(os.path.join(folder, "lock"), command)
            _make_folder(self._imports_folder)
            self.notes += filter(None, [_keep_private(folder)])
        except OSError as error:
            self.close()
            other = ", or use another --data" if new else ""  # else what was given out from this one would go out again
            raise StoreError(
                f"The store {folder} cannot be written ({error.strerror}): {_remedy(error)}{other}."
            ) from None

    def is_new(self) -> bool:
        """Say whether a writer makes a new store here. Raises StoreError where one may not look."""
        try:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.stat(self._journal_path)
                return False
            return not self._numbered_imports()
        except OSError as error:
            what = error.filename if error.filename == self._imports_folder else f"The store {self.folder}"
            raise StoreError(f"{what} cannot be read ({error.strerror}): check its rights.") from None

    def _numbered_imports(self) -> Dict[str, int]:
        """Return the files in imports/ that are or were to be a part of a store, with their numbers."""
        names = os.listdir(self._imports_folder) if os.path.isdir(self._imports_folder) else []
        return {name: int(name[:6]) for name in names if re.match(r"\d{6}-", name)}

    def load(self, state: State, progress: Progress = lambda *told: None, about: Sequence[str] = ()) -> None:
        """Bring a new `state` to what the files say. Raises StoreError and changes nothing where they are damaged.

        A reader may be `about` some DeviceNames or DeviceIDs: the state then knows only what concerns these, in far
        less time.
        """
        try:
            if not self.writer and self.is_new():
                raise StoreError(
                    f"There is no store at {self.folder}: import a file first, or name the store with --data."
                )
            reader = self._replay(state, progress, self._names_of(about))
            self._last_import = max(self._numbered_imports().values(), default=0)
            if reader.seq == 0 and self._last_import:
                raise StoreError(
                    f"{self._journal_path} is missing or empty while imports were made. Nothing was changed. Put back "
                    "the journal: without it certificates that are in devices would be given out again."
                )
            self._note_orphans()
            lost = self._check_mark(reader)
            if self.writer:
                self._open_journal(reader)
                self._move_mark(lost)
                if self._mirror:
                    self._mirror.catch_up(self.folder, [os.path.basename(imported.path) for imported in self._imports])
            elif reader.torn:
                self.notes.append(f"journal.csv ends in half a line ({len(reader.torn)} bytes), which was not read.")
        except StoreUnavailable as error:
            raise StoreError(str(error)) from None
        except OSError as error:
            told = f"{error.filename or f'The store {self.folder}'} cannot be read ({error.strerror})"
            raise StoreError(f"{told}: {_remedy(error)}.") from None

    def _names_of(self, about: Sequence[str]) -> Set[str]:
        """Add the DeviceNames that events had together with one of `about`."""
        names = set(about)
        if about and os.path.exists(self._journal_path):
            self._offset = os.path.getsize(self._journal_path)
            names.update(event.device_name for event in self.look_back(_parts(about)) if event and event.device_name)
        return names

    def _replay(self, state: State, progress: Progress, names: Set[str]) -> JournalReader:
        about = _parts(names)
        reader = JournalReader([b",import,", *about] if about else ())
        if not os.path.exists(self._journal_path):
            return reader
        with _open_to_read(self._journal_path) as file:
            size = os.fstat(file.fileno()).st_size

            def together(events: Optional[Events]) -> int:
                progress("reading the journal", reader.offset, size)
                if events is None or about:
                    return 0
                marked = self._mark and reader.seq < self._mark.seq <= reader.seq + len(events.kinds)
                return 0 if marked else state.apply_together(events)

            for look in range(TORN_READS):
                for event in reader.events(file, together):
                    if event.kind == "import":
                        self._load_import(event, state, progress, about)
                    elif event.kind == "store":
                        self._open_mark(str(event.detail.get("id")))
                    if self._mark and reader.seq == self._mark.seq:
                        self._digest_at_mark = reader.digest
                    try:
                        if not about or event.device_name in names or not event.device_name:
                            state.apply(event)
                    except (KeyError, IndexError):
                        raise StoreError(
                            f"journal.csv line {reader.seq + 1} names a certificate that no import holds. Nothing was "
                            "changed. Put back the last good copy of the whole store."
                        ) from None
                if self.writer or not reader.torn or look == TORN_READS - 1:
                    break
                time.sleep(TORN_SECONDS)
                reader.torn = b""
                file.seek(reader.offset)
        progress("reading the journal", size, size)
        return reader

    def _load_import(self, event: Event, state: State, progress: Progress, about: Sequence[bytes]) -> None:
        try:
            name, rows, sha256, batch = (event.detail[key] for key in ("file", "rows", "sha256", "batch"))
            path = os.path.join(self._imports_folder, name)
        except (KeyError, TypeError):
            raise StoreError(f"journal.csv: the import at {format_time(event.time)} lacks its details.") from None
        imported = ImportFile(path, len(state.names))
        staged = Staged(imported.first, batch)
        imported.load(staged, sha256, rows, progress, about)
        state.prepared.append(staged)
        self.adopt(imported)

    def _note_orphans(self) -> None:
        if self.writer:  # to a reader it may be an import under way
            used = {os.path.basename(imported.path) for imported in self._imports}
            for name in sorted(self._numbered_imports().keys() - used):
                self.notes.append(f"imports/{name} was never completed or taken back, so it is ignored.")

    def _open_journal(self, reader: JournalReader) -> None:
        if self._mirror and not reader.seq:
            self._mirror.check_unused(self.folder)
        self._journal = _open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        _restrict(self._journal)
        if reader.torn:
            self._cut_torn_tail(reader)
        if reader.seq:
            self._offset = reader.offset
            self._codec = JournalWriter(reader.seq, reader.digest)
            self._committed = (reader.seq, reader.digest)
            os.fsync(self._journal)  # its last writer may have ended before it was told that this is on the disk
            self._sync_folders()
            return
        os.ftruncate(self._journal, 0)
        store_id = secrets.token_hex(8)
        self.append(Event("store", _now(), detail={"id": store_id, "version": FORMAT_VERSION}))
        self.commit()
        self._sync_folders()
        self.notes.append(f"A new, empty store was made: {self.folder}")
        with contextlib.suppress(OSError):  # where it matters, _open_mark says so
            if self._marks and os.listdir(self._marks):
                self.notes.append(
                    "This PC has had another store before. What was given out from that one and is imported here goes "
                    "out again: if it was the store of this line, stop, and put it back."
                )
        self._open_mark(store_id)

    def _sync_folders(self) -> None:
        """Make the store's names durable, also those by a process that ended before its own sync."""
        _sync_folder(self._imports_folder)
        _sync_with_those_above(self.folder)

    def _cut_torn_tail(self, reader: JournalReader) -> None:
        name = f"journal.torn-{reader.offset}"
        side = _open(os.path.join(self.folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            _write_all(side, reader.torn)
            os.fsync(side)
        finally:
            os.close(side)
        os.ftruncate(self._journal, reader.offset)
        self.notes.append(
            f"journal.csv ended in half a line, never acknowledged: its {len(reader.torn)} bytes are in {name} now."
        )

    # -- high-water mark -----------------------------------------------------------------------------------------------

    def _open_mark(self, store_id: str) -> None:
        if self._marks is None or not re.fullmatch("[0-9a-f]{16}", store_id):
            return
        try:
            self._mark = HighWaterMark(self._marks, store_id, self.writer)
        except OSError as error:
            if self.writer:
                self._lose_mark(error)

    def _check_mark(self, reader: JournalReader) -> Mapping[str, Any]:
        """Refuse an old copy, or return what an accepted one lacks, for its event."""
        mark = self._mark
        if mark and reader.seq > 1 and not mark.seq:
            self.notes.append(
                "This PC sees this store for the first time. If it is a copy, no other PC may serve it from now on: "
                "each would give out the same certificates."
            )
        old = mark and mark.seq and mark.digest != self._digest_at_mark
        if self._accept is not None and not old:
            raise Refused("This store is not an old copy: there is nothing to accept.")
        if not mark or not old:
            return {}
        if self._accept is None:
            raise StoreError(
                f"{self.folder} is not the latest copy of this store: this PC recorded event {mark.seq}, and the "
                f"journal {'ends with' if reader.seq < mark.seq else 'has another one, up to'} {reader.seq}. Serving "
                "it would give out again what is in devices. Put the latest copy back; if there is none, find those "
                "devices, and say so with certtool.py accept-restore --reason TEXT."
            )
        return {**self._accept, "marked": mark.seq, "found": reader.seq}

    def _move_mark(self, lost: Mapping[str, Any]) -> None:
        """Put the mark at the end of the journal; after an old copy was accepted, behind the event that says so."""
        if lost:
            self.append(Event("restore", _now(), detail=lost))
            self.commit()
        elif self._mark:
            self._advance_mark(self._mark)

    def _advance_mark(self, mark: HighWaterMark) -> None:
        seq, digest = self._committed
        try:
            if seq <= mark.seq and digest != mark.digest:
                mark.reset()
            mark.put(seq, digest)
        except OSError as error:
            self._lose_mark(error)

    def _lose_mark(self, error: OSError) -> None:
        if self._mark:
            self._mark.close()
            self._mark = None
        self.warn(
            f"This PC cannot remember how far the store has come ({error.strerror}: {self._marks or 'no profile'}), so "
            "an old copy put back would not be noticed."
        )

    # -- reading and recording -----------------------------------------------------------------------------------------

    def certificate(self, number: int) -> Certificate:
        """Read one certificate from its import file. Raises StoreUnavailable where that is no longer possible."""
        imported = self._imports[bisect.bisect_right(self._firsts, number) - 1]
        if imported.file is None:
            self._open_imports.append(imported)
            if len(self._open_imports) > OPEN_IMPORTS:
                self._open_imports.popleft().close()
        try:
            return imported.certificate(number)
        except (OSError, ValueError, csv.Error) as error:
            imported.close()
            name = os.path.basename(imported.path)
            if isinstance(error, PermissionError):
                raise StoreUnavailable(f"imports/{name} cannot be read ({error.strerror}): {_remedy(error)}.") from None
            raise StoreUnavailable(f"imports/{name} cannot be read: put it back and start again.") from None

    def all_certificates(self) -> Iterator[List[Certificate]]:
        """Yield the certificates of all import files, in order, some thousands at a time. Raises as `certificate`."""
        for imported in self._imports:
            try:
                with _open_to_read(imported.path) as file:
                    file.readline()
                    for data in _whole_lines(file):
                        yield list(_certificates_of(data))
            except (OSError, ValueError, csv.Error):
                raise StoreUnavailable(f"{imported.path} cannot be read: put it back.") from None

    def append(self, event: Event) -> None:
        """Add an event to the next commit. Raises StoreUnavailable where nothing can be recorded any more."""
        if self.broken:
            raise StoreUnavailable(self.broken)
        self._events.append(event)

    def commit(self) -> None:
        """Make all appended events durable: one write, one fsync. Raises StoreUnavailable: then none of them counts."""
        if not self._events:
            return
        events, self._events = self._events, []
        if self.broken:
            raise StoreUnavailable(self.broken)
        try:
            if not self._is_untouched():
                self.stop("Another program changed journal.csv: find out which, and start again.")
                raise StoreUnavailable(self.broken)
            data = self._codec.encode(events)
            _write_all(self._journal, data)
        except OSError as error:
            self._cut_back()
            raise StoreUnavailable(
                f"The record could not be written ({error.strerror}), so nothing was given out: {_remedy(error)}."
            ) from None
        except MemoryError:
            self._cut_back()
            raise StoreUnavailable(
                "The record could not be written (no memory), so nothing was given out: close other programs."
            ) from None
        try:
            os.fsync(self._journal)
        except OSError as error:
            # Until the PC restarts, the system may go on showing what is not on the disk.
            why = f"The disk failed to keep a record ({error.strerror}), so it may be lost or not"
            self.stop(f"{why}: check the disk, and restart this PC.")
            raise StoreUnavailable(self.broken) from None
        self._offset += len(data)
        self._committed = (self._codec.seq, self._codec.digest)
        if self._mark:
            self._advance_mark(self._mark)
        if self._mirror:
            self._mirror.write(data)

    def look_back(self, needles: Sequence[bytes], within: Optional[int] = None) -> Iterator[Optional[Event]]:
        """Yield the committed events whose lines hold one of `needles`, oldest first, and None as a place to pause.

        `within` limits it to that many bytes at the journal's end. Raises StoreUnavailable where it cannot be read.
        """
        end = self._offset
        offset = 0 if within is None else max(0, end - within)
        rest = None if offset else b""  # None: in the middle of a line
        try:
            with (yield from _open_in_steps(self._journal_path)) as file:
                file.seek(offset)
                while offset < end:
                    data = file.read(min(LOOK_BACK_BYTES, end - offset))
                    if not data:
                        return
                    offset += len(data)
                    whole, _, tail = ((rest or b"") + data).rpartition(b"\n")
                    if any(needle in whole for needle in needles):
                        for line in whole.split(b"\n")[rest is None :]:
                            if any(needle in line for needle in needles):
                                with contextlib.suppress(ValueError, csv.Error):  # the header
                                    yield decode_event(line.rpartition(b",")[0])[1]
                    rest = tail
                    yield None
        except OSError as error:
            raise StoreUnavailable(f"journal.csv cannot be read ({error.strerror}): {_remedy(error)}.") from None

    def _is_untouched(self) -> bool:
        """No other program has changed the journal, or put another file in its place."""
        facts = os.fstat(self._journal)
        if facts.st_size != self._offset:
            return False
        return sys.platform == "win32" or _in_place(facts, self._journal_path)  # there it cannot be moved

    def stop(self, reason: str) -> None:
        """Record nothing any more in this process: what is on the disk is no longer known."""
        self.broken = self.broken or reason

    def _cut_back(self) -> None:
        """Take back a failed write, so that the next line follows a whole one."""
        self._codec.seq, self._codec.digest = self._committed
        try:
            os.ftruncate(self._journal, self._offset)
            if os.fstat(self._journal).st_size != self._offset:
                raise OSError
        except OSError:
            self.stop("A failed record could not be taken back: check the disk, and start again.")

    # -- importing -----------------------------------------------------------------------------------------------------

    def new_import(self, name: str, first: int) -> ImportWriter:
        """Start a file for certificates numbered from `first`. Raises StoreUnavailable."""
        self._last_import += 1
        try:
            return ImportWriter(self._imports_folder, self._last_import, name, first, self._mirror)
        except OSError as error:
            raise StoreUnavailable(f"An import file could not be made ({error.strerror}): {_remedy(error)}.") from None

    def adopt(self, imported: ImportFile) -> None:
        """Take a file whose event is durable among those that `certificate` reads."""
        self._imports.append(imported)
        self._firsts.append(imported.first)

    def close(self) -> None:
        """Close all files and give the lock back. What was appended and not committed is lost."""
        for imported in self._open_imports:
            imported.close()
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1
        if self._mark:
            self._mark.close()
            self._mark = None
        if self._mirror:
            self._mirror.close()
        if self.lock:
            self.lock.release()
            self.lock = None


def _now() -> int:
    return max(1, int(time.time() * 1000))  # 0 is no time


# ======================================================================================================================
# 9. Service: decide, record, commit
# ======================================================================================================================
# Every change goes one way: `decide`, `append`, `apply`; then `commit` makes all of a turn durable. Who answers before
# `commit` has returned lies. When it raises, everything since the last commit is taken back.

QUERY_COLUMNS = (
    "DeviceName",
    "ProductKey",
    "ProductID",
    "Batch",
    "Status",
    "DeviceID",
    "Station",
    "AllocatedAt",
    "WrittenAt",
    "CRC32",
)
SECRET_COLUMNS = ("ProductSecret", "DeviceSecret")
HELD_BACK = "Something unexpected stopped the recording: keep the log, and start again."


class _InMemory(io.RawIOBase):
    """A stream of bytes that are in memory, without the copy that io.BytesIO makes of a part of them."""

    def __init__(self, data: Union[bytes, memoryview]) -> None:
        self._data = memoryview(data)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, len(self._data))[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        piece = self._data[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


class Upload(NamedTuple):
    """An identity file to import: its name without folder, what opens its bytes, and how many there are.

    `open` gives a stream that starts anew each time. It and the stream say with a CertToolError what cannot be read.
    """

    name: str
    open: Callable[[], BinaryIO]
    size: int

    @classmethod
    def of(cls, name: str, data: Union[bytes, memoryview]) -> Upload:
        """Bytes that are in memory."""
        return cls(name, lambda: io.BufferedReader(_InMemory(data)), len(data))


class ImportOptions(NamedTuple):
    """How to import. Empty texts mean that the option was not given; `who` is the operator, for the journal."""

    batch: str = ""
    product_key: str = ""
    product_secret: str = ""
    product_id: str = ""
    skip_bad: bool = False
    dry_run: bool = False
    who: str = ""

    def fixed(self) -> Dict[str, str]:
        """Return by column what fills it in every row, where the file has no such column."""
        return dict(zip(OPTIONAL_FROM, self[1:4]))

    def wrong(self) -> Tuple[str, str]:
        """Return the first column of `fixed` with a value that is wrong, and why; two empty texts if there is none."""
        wrong = ((column, check_field(column, value)) for column, value in self.fixed().items() if value)
        return next(((column, reason) for column, reason in wrong if reason), ("", ""))


class ImportReport:
    """What an import did: counts of rows, and what is wrong with each bad row or file. `ok`: it took effect."""

    def __init__(self, dry_run: bool) -> None:
        self.read = self.imported = self.duplicates = self.rejected = 0
        self.errors: List[Dict[str, Any]] = []
        self.ignored: List[str] = []  # columns that are not used
        self.batches: List[str] = []
        self.dry_run = dry_run
        self.ok = True

    def reject(self, file: str, line: int, message: str) -> None:
        """Note what is wrong with a row, or with a whole file."""
        self.errors.append({"file": file, "line": line, "message": message})

    def ignore(self, columns: Sequence[str]) -> None:
        """Note columns that are not used, each once."""
        self.ignored.extend(name for name in columns if name not in self.ignored)

    def as_json(self) -> Dict[str, Any]:
        """The object that `import --json` prints."""
        return dict(vars(self))


class Allocation(NamedTuple):
    """The answer to a request. `device_id` is the caller's own, or the one that was made up for it."""

    certificate: Certificate
    device_id: str
    kind: str  # of the event that it took, SAME for none


def _made_up_id(product: Product) -> str:
    """A DeviceID for a device that has none, never used before for this product."""
    while True:
        device_id = "auto-" + secrets.token_hex(10)
        if device_id not in product.devices:
            return device_id


def _digest_of_source(upload: Upload, options: ImportOptions) -> Generator[None, None, str]:
    """Name a file's bytes and the options that shape its rows, so that the same import is recognized at once."""
    digest = hashlib.sha256(json.dumps([options.product_key, options.product_secret, options.product_id]).encode())
    with upload.open() as data:
        for piece in in_pieces(data):
            digest.update(piece)
            yield
    return digest.hexdigest()


def _in_a_thread(action: Callable[[], None], meanwhile: Iterator[None]) -> Generator[None, None, None]:
    """Run what waits for the disk beside the turns of the server, and beside `meanwhile`. Raises what they raised.

    It never ends before its thread: an exception that is thrown in comes out again then, and only `close` waits for it.
    Not by threading.Thread: without memory its thread ends before it begins, and `start` waits for it for ever. Here
    the caller does the work itself when no thread has begun it in time.
    """
    once = threading.Lock()
    results: List[Optional[BaseException]] = []

    def run() -> None:
        if once.acquire(blocking=False):
            try:
                action()
            except BaseException as error:
                results.append(error)
            else:
                results.append(None)

    def wait() -> Iterator[None]:
        while not results:
            yield
            if time.monotonic() > began + THREAD_SECONDS:
                run()
            time.sleep(0.002)

    began = time.monotonic()
    with contextlib.suppress(RuntimeError, MemoryError):  # no thread is to be had
        _thread.start_new_thread(run, ())
    try:
        yield from meanwhile
        yield from wait()
    except Exception:
        yield from wait()
        raise
    finally:
        while not results:
            run()
            time.sleep(0.002)
    if results[0]:
        raise results[0]


DUPLICATE = "duplicate"
ROW_HASH = 0xFFFF_FFFF  # the bits of a row's hash that an import keeps
CHANGED = "{} was changed while it was read: close it elsewhere, and import it again."


class _Import:
    """One file on its way into the store. `hashes` tells an identical row from another one of the same key and name.

    It takes one for the other once in four billion times, and is half as large as one that would never do so.
    """

    def __init__(self, staged: Staged) -> None:
        self.staged = staged
        self.writer: Optional[ImportWriter] = None
        self.hashes = array("I")
        self.detail: Dict[str, Any] = {}

    def add(self, columns: Columns) -> None:
        """Take certificates that are neither in the store nor in the files before."""
        keys, names, _, _, _, device_ids = columns
        self.staged.add(keys, names, device_ids)
        low_bits = map(operator.and_, map(hash, zip(*columns[2:])), itertools.repeat(ROW_HASH))
        self.hashes.extend(array("I", low_bits))

    def find_rows(self) -> Generator[None, None, None]:
        """Note where the rows start, a part in each step: whoever serves them needs to know.

        Raises OSError, or StoreUnavailable where there are not as many as were written.
        """
        assert self.writer
        imported = self.writer.imported
        yield from imported.find_rows()
        if len(imported.offsets) != len(self.staged.names):
            raise changed_at_once(imported.path)

    def event(self) -> Event:
        """The event that makes the file part of the store."""
        assert self.writer
        return Event("import", _now(), detail={**self.detail, **self.writer.detail()})

    def hand_over(self) -> ImportFile:
        """The file is the store's now."""
        assert self.writer
        writer, self.writer = self.writer, None
        return writer.imported


class Service:
    """What certtool does, for whoever asks. `notify` gets sentences that an operator should see.

    The methods that record raise CertToolError and then have changed nothing. What they changed becomes durable, and
    may be told to anybody, after `commit`.
    """

    def __init__(
        self,
        store: Store,
        state: State,
        notify: Callable[[str], None] = lambda sentence: None,
        require_device_id: bool = False,
        serving: bool = True,
    ) -> None:
        self.store = store
        self.state = state
        self.notify = store.warn = notify
        self.require_device_id = require_device_id
        self.serving = serving  # so what is imported will be read
        self.importing: Optional[ImportReport] = None  # what the import that is under way has done so far
        self.taken = 0  # bytes of its files whose rows are done
        self._undo: List[Undo] = []
        self._held_back = False

    def request(self, product_key: str, device_id: str, station: str, now: int) -> Allocation:
        """Give the device its certificate: the one that it has, or a free one. Without an id it gets one made up."""
        if not device_id and product_key in self.state.products:
            if self.require_device_id:
                raise DeviceIDRequired("This server gives certificates only to devices that send their DeviceID.")
            device_id = _made_up_id(self.state.products[product_key])
        command = _new(Command, (REQUEST, product_key, device_id, "", station, False, NO_DETAIL))
        number, event = self.state.decide(command, now)
        certificate = self.store.certificate(number)
        if certificate.credential.device_name != self.state.names[number]:
            raise StoreUnavailable("An import file was changed while the server runs: put it back and start again.")
        if event is None:
            self._check_state()
            return Allocation(certificate, device_id, SAME)
        self._record(event)
        return _new(Allocation, (certificate, device_id, event.kind))

    def report(self, product_key: str, device_id: str, verb: int, station: str, now: int) -> Tuple[str, str]:
        """Record that a burn succeeded or failed; return the certificate's name and the kind of event it took."""
        number, event = self.state.decide(Command(verb, product_key, device_id, "", station), now)
        if event:
            self._record(event)
        else:
            self._check_state()
        return self.state.names[number], event.kind if event else SAME

    def find(self, device_name: str, product_key: str) -> Tuple[Product, int]:
        """Return product and number of the one certificate of that name. Raises Refused."""
        found = self.state.find(device_name, product_key)
        if not found:
            hint = "check the name and --product-key" if product_key else "check the name"
            raise Refused(f"There is no certificate of this DeviceName in the store: {hint}.")
        if len(found) > 1:
            keys = ", ".join(product.key for product, _ in found)
            raise Refused(f"The name occurs in several products ({keys}): say which with --product-key.")
        return found[0]

    def row(self, number: int) -> Tuple[str, ...]:
        """Return what is known of a certificate: QUERY_COLUMNS, and behind them SECRET_COLUMNS."""
        record = self.state.record(number)
        credential, checksum = self.store.certificate(number)
        return (
            credential.device_name,
            credential.product_key,
            credential.product_id,
            self.state.batch(number),
            STATUS_NAMES[record.status],
            record.device_id,
            record.station,
            format_time(record.allocated_at),
            format_time(record.written_at),
            checksum,
            credential.product_secret,
            credential.device_secret,
        )

    def reveal(self, device_name: str, product_key: str, who: str, now: int) -> Mapping[str, str]:
        """Return the secrets of a certificate, and record who saw them."""
        product, number = self.find(device_name, product_key)
        secret_cells = self.row(number)[len(QUERY_COLUMNS) :]
        self._record(Event("reveal", now, product.key, device_name, detail={"who": who}))
        return dict(zip(SECRET_COLUMNS, secret_cells))

    def operate(
        self, verb: int, device_name: str, product_key: str, reason: str, who: str, force: bool, now: int
    ) -> Tuple[str, str]:
        """Release or void a certificate by name; return the sentence that says what happened, and the event's kind."""
        product, number = self.find(device_name, product_key)
        if not reason.strip():
            raise Refused("A reason is needed: give it with --reason.")
        detail: Dict[str, Any] = {"who": who, "reason": reason.strip()}
        if force:
            detail["force"] = True
        before = STATUS_NAMES[self.state.record(number).status]
        command = Command(verb, product.key, device_name=device_name, force=force, detail=detail)
        _, event = self.state.decide(command, now)
        if event is None:
            self._check_state()
            return f"{device_name} is {before} already: nothing changed.", SAME
        self._record(event)
        after = STATUS_NAMES[self.state.record(number).status]
        return f"{device_name} was {before} and is {after} now.", event.kind

    def commit(self) -> None:
        """Make all that was recorded durable. Raises StoreUnavailable: then it is taken back, as if never asked."""
        undo, self._undo = self._undo, []
        try:
            self.store.commit()
        except StoreUnavailable:
            for step in reversed(undo):
                self.state.restore(step)
            raise

    def _record(self, event: Event) -> None:
        self.store.append(event)
        try:
            undo = self.state.apply(event)
            if undo:
                self._undo.append(undo)
        except BaseException:
            self._hold_back()
            raise
        if undo:
            product = undo.product
            if event.kind == "allocate" and product.counts[UNALLOCATED] - product.bound < product.low:
                self._warn_of_stock(undo)

    def _hold_back(self) -> None:
        """Stop where the state may not be what the journal says."""
        self._held_back = True
        self.store.stop(HELD_BACK)

    def _check_state(self) -> None:
        """Raise StoreUnavailable where an answer from the state alone may be wrong."""
        if self._held_back:
            raise StoreUnavailable(HELD_BACK)

    def _warn_of_stock(self, undo: Undo) -> None:
        product, left = undo.product, undo.product.free
        if undo.record.status != UNALLOCATED:
            return
        if left == 0:
            self.notify(f"No certificate of product {product.key} is left: import more now.")
        elif left == product.low - 1:
            self.notify(f"Only {left} certificates of product {product.key} are left: import more.")

    # -- importing -----------------------------------------------------------------------------------------------------

    def import_files(self, uploads: Sequence[Upload], options: ImportOptions) -> Generator[None, None, ImportReport]:
        """Import files, all or nothing unless `skip_bad`, in slices of a few milliseconds; return the report.

        Only one may run at a time. Closing the generator before its end, or a StoreUnavailable from it, changes
        nothing.
        """
        report = self.importing = ImportReport(options.dry_run)
        self.taken = 0
        imports: List[_Import] = []
        try:
            for upload in itertools.takewhile(lambda _: report.rejected <= MAX_WRONG, uploads):
                source = yield from _digest_of_source(upload, options)
                known = self.state.sources.get(source)
                if known is not None:
                    report.read += known
                    report.duplicates += known
                    self.taken += upload.size
                    with upload.open() as data:
                        encoding = yield from sniff_encoding(data)
                        file = IdentityFile(data, encoding, options.fixed())  # kept until `data` is closed
                        report.ignore(file.ignored)
                else:
                    yield from self._stage(upload, options, source, imports, report)
                    if source != (yield from _digest_of_source(upload, options)):
                        raise Refused(CHANGED.format(upload.name))
            report.ok = not report.errors or (options.skip_bad and len(report.errors) == report.rejected)
            if not report.ok:
                report.imported = 0
            elif not options.dry_run:
                for new in imports:
                    if new.writer and new.staged.names:
                        new.hashes = array("I")  # makes room for what follows
                        yield from _in_a_thread(new.writer.sync, new.find_rows() if self.serving else iter(()))
                self._adopt([new for new in imports if new.staged.names])
        except OSError as error:
            raise StoreUnavailable(f"The import could not be written ({error.strerror}): {_remedy(error)}.") from None
        finally:
            self.importing = None
            for new in imports:
                if new.writer:
                    new.writer.discard()
        return report

    def _stage(
        self, upload: Upload, options: ImportOptions, source: str, imports: List[_Import], report: ImportReport
    ) -> Generator[None, None, None]:
        """Read one file into a new entry of `imports`, or find out what is wrong with it."""
        with upload.open() as data:
            try:
                encoding = yield from sniff_encoding(data)
                file = IdentityFile(data, encoding, options.fixed())
            except BadFile as error:
                data.close()  # before what read it goes: Python's development mode would warn of a file left open
                report.reject(upload.name, error.line, str(error))
                return
            first = len(self.state.names) + sum(len(new.staged.names) for new in imports)
            batch = options.batch or os.path.splitext(upload.name)[0]
            new = _Import(Staged(first, batch))
            imports.append(new)
            if not options.dry_run:
                new.writer = self.store.new_import(upload.name, first)
            before = report.read, report.rejected
            taken = self.taken
            for block in file.blocks():
                good = self._sift(upload.name, block, imports, report)
                if good and new.writer:
                    payloads = map("".join, zip(*good[:5]))  # as in Credential.payload
                    new.writer.write(good, crc32_many(list(map(str.encode, payloads))))
                if report.rejected > MAX_WRONG:
                    told = f"More than {MAX_WRONG:,} rows are wrong, so the rest was not read: is that the right file?"
                    report.reject(upload.name, report.errors[-1]["line"], told)
                    return
                if len(new.staged.products) > MAX_PRODUCTS:
                    told = f"The file names more than {MAX_PRODUCTS:,} ProductKeys: is that the right column?"
                    report.reject(upload.name, 1, told)
                    return
                self.taken = taken + data.tell()
                yield
            read, rejected = report.read - before[0], report.rejected - before[1]
            if not read:
                report.reject(upload.name, 1, "The file has no certificate in it, only a header line.")
            if read > rejected:
                report.ignore(file.ignored)
            if new.staged.names:
                report.batches.append(batch)
                new.detail = {"batch": batch, "who": options.who, "read": read, "source": "" if rejected else source}

    def _sift(
        self, name: str, block: Union[PlainRows, List[Row]], imports: Sequence[_Import], report: ImportReport
    ) -> Columns:
        """Add the new certificates of a block to the last of `imports` and return them; report all of its rows."""
        new, good = imports[-1], []
        if isinstance(block, PlainRows):
            if self._all_new(block.columns, imports):
                report.read += len(block.columns[0])
                report.imported += len(block.columns[0])
                new.add(block.columns)
                return block.columns
            block = block.rows()
        for line, row in block:
            reason = row if isinstance(row, str) else self._conflict(row, imports)
            if reason == DUPLICATE:
                report.duplicates += 1
            elif reason:
                report.rejected += 1
                report.reject(name, line, reason)
            elif isinstance(row, Credential):
                new.add([[cell] for cell in row])
                good.append(row)
        report.read += len(block)
        report.imported += len(good)
        return list(zip(*good))

    def _all_new(self, columns: Columns, imports: Sequence[_Import]) -> bool:
        """Say at once, for what most files are made of, that no row of one product has a `_conflict`."""
        keys, names, _, _, _, device_ids = columns
        if keys.count(keys[0]) != len(keys) or any(device_ids):
            return False
        unique = set(names)
        states: List[Mapping[str, Product]] = [self.state.products, *(other.staged.products for other in imports)]
        products = [products[keys[0]] for products in states if keys[0] in products]
        return len(unique) == len(names) and all(product.names.keys().isdisjoint(unique) for product in products)

    def _conflict(self, row: Credential, imports: Sequence[_Import]) -> Optional[str]:
        """Return None for a new certificate, DUPLICATE for one that is here already, else the reason against it."""
        product = self.state.products.get(row.product_key)
        if product:
            number = product.names.get(row.device_name)
            if number is not None:
                there = self.store.certificate(number).credential
                wrong = [column for column, old, new in zip(COLUMNS, there, row) if old != new]
                if wrong:
                    return f"{row.device_name} is in the store with another {' and '.join(wrong)}."
                return DUPLICATE
            if row.device_id and row.device_id in product.devices:
                return f"DeviceID {row.device_id} has another certificate in the store."
        for other in imports:
            staged = other.staged.products.get(row.product_key)
            if staged:
                number = staged.names.get(row.device_name)
                if number is not None:
                    if other.hashes[number - other.staged.first] != hash(row[2:]) & ROW_HASH:
                        return f"{row.device_name} stands in the file before, with another secret or id."
                    return DUPLICATE
                if row.device_id and row.device_id in staged.devices:
                    return f"DeviceID {row.device_id} stands in the file before, with another certificate."
        return None

    def _adopt(self, imports: Sequence[_Import]) -> None:
        """Make the staged files part of the store, all in one commit.

        From here on no file is discarded, also where the commit fails: its event may have reached the disk.
        """
        for new in imports:
            for key, staged in new.staged.products.items():
                product = self.state.products.get(key)
                if product and not product.devices.keys().isdisjoint(staged.devices):
                    raise Refused("A device of the file got another certificate meanwhile: import the file again.")
        self.commit()
        events = [new.event() for new in imports]
        try:
            for event in events:
                self.store.append(event)
            files = [new.hand_over() for new in imports]
            self.store.commit()
            for new, event, file in zip(imports, events, files):
                self.state.prepared.append(new.staged)
                self.state.apply(event)
                self.store.adopt(file)
        except StoreUnavailable:
            raise
        except BaseException:
            self._hold_back()
            raise


# -- auditing ----------------------------------------------------------------------------------------------------------


def audit(store: Store, state: State) -> Iterator[str]:
    """Load a store that was opened for reading; yield a sentence for each thing that is wrong with it."""
    try:
        store.load(state)
    except CertToolError as error:
        yield str(error)
        yield from (found for found in _damaged_imports(store.folder) if found != str(error))
        return
    yield from _wrong_rows(store, state)
    for product in state.products.values():
        yield from _wrong_counts(product, [state.record(number) for number in product.names.values()])
    if sum(product.total for product in state.products.values()) != len(state.names):
        yield "The products together do not have as many certificates as were imported."


def _damaged_imports(folder: str) -> Iterator[str]:
    """Yield what is wrong with each import file that the readable part of the journal names."""
    with contextlib.suppress(OSError, StoreError), open(os.path.join(folder, "journal.csv"), "rb") as file:
        for event in JournalReader().events(file):
            if event.kind == "import":
                path = os.path.join(folder, "imports", str(event.detail.get("file")))
                try:
                    rows, sha256 = event.detail["rows"], event.detail["sha256"]
                    ImportFile(path, 0).load(Staged(0, ""), sha256, rows, lambda what, done, total: None)
                except (KeyError, StoreError) as error:
                    yield str(error)


def _wrong_rows(store: Store, state: State) -> Iterator[str]:
    """Yield what is wrong with the certificates of the import files: checksums, fields, and names that occur twice."""
    number = 0
    for chunk in store.all_certificates():
        checksums = crc32_many([certificate.credential.payload() for certificate in chunk])
        for (credential, told), checksum in zip(chunk, checksums):
            name = credential.device_name
            if told != f"{checksum:08X}":
                yield f"{name}: its CRC32 is {checksum:08X}, and not as the import file has it."
            for column, value in zip(COLUMNS, credential):
                wrong = check_field(column, value)
                if wrong:
                    yield f"certificate {number + 1} of all imports: {wrong}"
            if state.products[credential.product_key].names.get(name) != number:
                yield f"{name} of product {credential.product_key} was imported twice."
            number += 1


def _wrong_counts(product: Product, records: Sequence[Record]) -> Iterator[str]:
    """Yield what does not add up in a product: its counts, its devices, and its free certificates."""
    counts = [sum(record.status == status for record in records) for status in range(len(STATUS_NAMES))]
    if counts != product.counts:
        yield f"Product {product.key}: the counts of its states are wrong."
    held = [record.device_id for record in records if record.device_id]
    if sorted(held) != sorted(product.devices):
        yield f"Product {product.key}: a device holds two certificates, or none that is known."
    if any(record.status in (ALLOCATED, WRITTEN, FAILED) and not record.device_id for record in records):
        yield f"Product {product.key}: a certificate is with a device that is not known."
    if product.free != sum(record.status == UNALLOCATED and not record.device_id for record in records):
        yield f"Product {product.key}: the number of free certificates is wrong."


def in_both(one: State, other: State) -> Iterator[Tuple[str, List[str]]]:
    """Yield the ProductKey and the names of certificates that are in two stores."""
    for key, product in one.products.items():
        if key in other.products:
            names = sorted(product.names.keys() & other.products[key].names.keys())
            if names:
                yield key, names


# ======================================================================================================================
# 10. Protocol messages (pure)
# ======================================================================================================================
# Bytes to request, answer to bytes (CONTRACT 1). HTTP's framing is read here too, and strictly: what a lenient reader
# would guess at could be half a request, and half a request could burn a certificate.

REASONS = {
    200: "OK",
    303: "See Other",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    408: "Request Timeout",
    409: "Conflict",
    410: "Gone",
    413: "Content Too Large",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}  # every HTTP status that is ever sent
ACTIONS = (REQUEST, BURN_SUCCEEDED, BURN_FAILED)  # the wire's numbers are the state machine's columns
ACTION_NAMES = ("request", "burned", "failed")

_REQUEST_LINE = re.compile(r"([A-Z]{1,20}) ([!-~]+) HTTP/(\d\.\d)")
_HEADER_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([\t -~\x80-\xff]*)")
_LENGTH = re.compile(r"\d{1,20}")
_KEY = re.compile(rf"[ -~]{{1,{FIELD_LENGTH}}}")
_DEVICE_ID = re.compile(rf"[ -~]{{0,{DEVICE_ID_LENGTH}}}")


class Head(NamedTuple):
    """A request's line and headers. `length` is the body's in bytes; `headers` has lower-case names."""

    method: str
    path: str
    keep_alive: bool
    length: int
    headers: Mapping[str, str]


NO_HEAD = Head("", "", False, 0, {})


def parse_head(data: bytes) -> Head:
    """Read a head without its empty line. Raises BadRequest (400 or 501) for whatever leaves a doubt where it ends."""
    first, *lines = data.decode("latin-1").replace("\r\n", "\n").split("\n")
    match = _REQUEST_LINE.fullmatch(first)
    if not match:
        raise BadRequest("This is not an HTTP request: send POST / HTTP/1.1 with a JSON body.")
    method, path, version = match.groups()
    if version not in ("1.0", "1.1"):
        raise BadRequest("Only HTTP/1.0 and HTTP/1.1 are spoken here.", 501)
    if len(lines) > MAX_HEADERS:
        raise BadRequest(f"There are more than {MAX_HEADERS} headers.", 431)
    headers: Dict[str, str] = {}
    for line in lines:
        match = _HEADER_LINE.fullmatch(line)
        if not match:
            raise BadRequest("A header line is malformed.")
        name, value = match[1].lower(), match[2].strip(" \t")
        if name in headers and name in ("content-length", "transfer-encoding", "host", "authorization"):
            raise BadRequest(f"The header {name} came twice.")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if "transfer-encoding" in headers:
        raise BadRequest("A chunked body is not supported: send Content-Length.", 501)
    length = headers.get("content-length", "" if method == "POST" else "0")
    if not _LENGTH.fullmatch(length):
        raise BadRequest("A POST needs one Content-Length, a plain number of bytes.")
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise BadRequest("This expectation is not supported.")
    tokens = {token.strip().lower() for token in headers.get("connection", "").split(",")}
    keep_alive = "close" not in tokens if version == "1.1" else "keep-alive" in tokens
    return Head(method, path, keep_alive, int(length), headers)


def is_usual(head: Head) -> bool:
    """Say whether a request with this head needs nothing but its body: no second look at length or expectation."""
    return head.length <= MAX_BODY and "expect" not in head.headers


def is_of_web_page(head: Head) -> bool:
    """Say whether a browser sent this for a web page; what devices and their programmers use sends neither header."""
    return "origin" in head.headers or "sec-fetch-site" in head.headers


def _head_end(buffer: Union[bytes, bytearray]) -> Tuple[int, int]:
    """Return where the first empty line begins, line end before it included, and where the body does; 0 for neither."""
    crlf, lf = buffer.find(b"\n\r\n"), buffer.find(b"\n\n")  # a client may end its lines by LF alone
    if crlf >= 0 and (lf < 0 or crlf < lf):
        end, start = crlf, crlf + 3
    elif lf >= 0:
        end, start = lf, lf + 2
    else:
        return 0, 0
    return (end - 1 if buffer[end - 1] == 13 else end), start


def _no_duplicates(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise BadRequest("The JSON names a key twice.")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise BadRequest(f"{name} is not JSON.")


def _short_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise BadRequest(f"The JSON has a number of more than {MAX_DIGITS} digits.")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant, parse_int=_short_integer)
_NO_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[^\[\]{}"]+')
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}
_SCAN: Callable[[str, int], Tuple[Any, int]] = _DECODER.scan_once  # type: ignore[attr-defined]


def _is_too_deep(text: str) -> bool:
    """Say whether more than MAX_NESTING arrays and objects of right JSON stand in each other."""
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return False
    steps = map(_STEPS.__getitem__, _NO_BRACKETS.sub("", text))
    return max(itertools.accumulate(steps), default=0) > MAX_NESTING


def parse_object(body: bytes) -> Dict[str, Any]:
    """Read one JSON object, strictly. Raises BadRequest."""
    try:
        text = body.decode().strip(" \t\r\n")
        value, end = _SCAN(text, 0)
        if end != len(text):
            raise ValueError("more than one value")
        if _is_too_deep(text):
            raise RecursionError
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is a ValueError (RFC 7493, 2.1)
    except UnicodeDecodeError:
        raise BadRequest("The body is not UTF-8.") from None
    except (ValueError, StopIteration):
        raise BadRequest("The body is not one JSON object.") from None
    except RecursionError:  # which CPython raises too, each version at another depth
        raise BadRequest("The JSON is nested too deep.") from None
    if not isinstance(value, dict):
        raise BadRequest("The body is not a JSON object.")
    return value


_USUAL_REQUEST = re.compile(
    rb'\{"ProductKey": ?"([ !#-\[\]-~]{1,64})", ?"DeviceID": ?"([!#-\[\]-~]{1,64})", ?"Action": ?([012])\}'
)  # what nearly every client sends, byte for byte; it means what the long way makes of it


def parse_request(body: bytes) -> Tuple[str, str, int]:
    """Return ProductKey, DeviceID ("" for none) and Action of a request. Raises BadRequest."""
    usual = _USUAL_REQUEST.fullmatch(body)
    if usual:
        key, device, digit = usual.groups()
        return key.decode(), device.decode(), int(digit)
    if len(body) > MAX_PARTS and sum(map(body.count, (b",", b"[", b"{"))) > MAX_PARTS:
        raise BadRequest(f"The body has more than {MAX_PARTS:,} commas and brackets: send the three fields alone.")
    fields = parse_object(body)
    product_key, device_id, action = fields.get("ProductKey"), fields.get("DeviceID"), fields.get("Action")
    if not isinstance(product_key, str) or not _KEY.fullmatch(product_key):
        raise BadRequest(f"ProductKey must be a string of 1-{FIELD_LENGTH} printable ASCII characters.")
    if device_id is None:
        device_id = ""
    if not isinstance(device_id, str) or not _DEVICE_ID.fullmatch(device_id.strip()):
        raise BadRequest(
            f"DeviceID must be a string of at most {DEVICE_ID_LENGTH} printable ASCII characters, or null."
        )
    device_id = device_id.strip()
    if type(action) is not int or action not in ACTIONS:
        raise BadRequest("Action must be 0 (request), 1 (burn succeeded) or 2 (burn failed).")
    if action != REQUEST and not device_id:
        raise BadRequest("A burn report needs the DeviceID that the certificate was given to.")
    return product_key, device_id, action


def format_certificate(certificate: Certificate, device_id: str, crc_as_int: bool) -> bytes:
    """Return the answer to a request, keys in the contract's order."""
    (product_key, device_name, device_secret, product_secret, product_id, _), crc32 = certificate
    checksum = str(int(crc32, 16)) if crc_as_int else f'"{crc32}"'
    with_id = f'"ProductID": {quote(product_id)}, ' if product_id else ""
    return (
        f'{{"ProductKey": {quote(product_key)}, "ProductSecret": {quote(product_secret)}, '
        f'"DeviceSecret": {quote(device_secret)}, "CRC32": {checksum}, '
        f'"DeviceName": {quote(device_name)}, "DeviceID": {quote(device_id)}, {with_id}"Status": "OK"}}'
    ).encode()


def format_acknowledgement(product_key: str, device_id: str) -> bytes:
    """Return the answer to a burn report."""
    return f'{{"ProductKey": {quote(product_key)}, "DeviceID": {quote(device_id)}, "Status": "OK"}}'.encode()


def format_error(error: CertToolError) -> bytes:
    """Return the answer that refuses."""
    return json.dumps({"Status": error.code, "Message": str(error)}).encode()


def format_reply(
    http_status: int, body: bytes, keep_alive: bool, content_type: str = "application/json", more: str = ""
) -> bytes:
    """Frame an answer, with `more` header lines. It has no Date: the clocks of line PCs jump (RFC 9110, 6.6.1)."""
    return _reply_head(http_status, len(body), keep_alive, content_type, more) + body


@functools.lru_cache(maxsize=256)
def _reply_head(http_status: int, length: int, keep_alive: bool, content_type: str, more: str) -> bytes:
    return (
        f"HTTP/1.1 {http_status} {REASONS[http_status]}\r\nContent-Type: {content_type}\r\n{more}"
        f"Content-Length: {length}\r\nConnection: {'keep-alive' if keep_alive else 'close'}\r\n\r\n"
    ).encode()


def format_json(value: Any) -> Generator[None, None, bytes]:
    """Encode what may be long, in slices."""
    pieces: List[str] = []
    for count, piece in enumerate(json.JSONEncoder().iterencode(value)):
        pieces.append(piece)
        if count % JSON_SLICE == 0:
            yield
    return "".join(pieces).encode()


# ======================================================================================================================
# 11. HTTP server
# ======================================================================================================================
# One thread, one loop. A turn: read every ready connection; run every whole request; look again for a moment, since
# what came meanwhile can share the commit; commit once; send the replies; a slice of a job such as an import, if one is
# under way. No reply of the service leaves before the commit of its turn: that is the order of the turn, not a rule to
# remember. A half-sent request costs a buffer and has a deadline. What a turn has no time for waits for the next one.
#
# The LAN sees only the protocol, and web pages there not even that: their heads are refused, so none is remembered.
# Management is POST /certtool/..., from a loopback peer, to a loopback Host, with the token that `serve` leaves in the
# store's lock file, or with what the site (the management page) gave to a browser.

RECEIVE = 64 * 1024  # bytes read from a connection in one turn
ACCEPTS = 256  # connections accepted in one turn
EXPIRES = 500  # connections that are refused or closed in one turn as late, and as many for what they hold
GATHER_SECONDS = 0.003  # for which a turn looks again: what came meanwhile shares its commit
GATHER_ROUNDS = 30  # of such looks in a turn
TURN_SECONDS = 0.05  # that a turn gives to each of its queues; what is left goes on in the next one, peer by peer
AGAIN_SECONDS = 0.01  # to those that sent more at once than MAX_PIPELINED: a device does not
MAX_GETS = 10  # that a turn takes from each of its queues: to send the page takes longer than to make it, up to 0.4 ms
USUAL_HEADS = 256  # request heads that are kept, so that they need not be read again
MANAGEMENT = "/certtool/"
TOO_LONG_UPLOAD = "A running server takes files of 256 MiB at most: stop it and import then."
LOOPBACK_HOSTS = re.compile(r"(127\.\d+\.\d+\.\d+|localhost|\[::1\])(:\d+)?", re.IGNORECASE)
RESULTS = {  # of an event's kind, for the console
    "allocate": "allocated",
    "rerequest": "same again, is Written",
    "written": "Written",
    "failed": "Failed",
    "release": "released",
    "void": "voided",
    SAME: "same again",
}
OPERATIONS = {"release": RELEASE, "void": MAKE_VOID}
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


def is_import(head: Head) -> bool:
    """Say whether a request hands over an import: from a LAN peer it is refused before its body comes."""
    return head.method == "POST" and head.path == MANAGEMENT + "import"


class RequestEvent(NamedTuple):
    """One request for the console: `result` is one of RESULTS, or tells the code that refused it, and `why` why."""

    time: int
    station: str
    action: str
    device_id: str
    device_name: str
    result: str
    product_key: str = ""
    why: str = ""


class CertRequestHandler(http.server.BaseHTTPRequestHandler):
    """One connection. `feed` takes what has arrived; `do_POST` and `do_GET` run over a whole request, never a part.

    The base class reads and writes blocking streams; this one keeps its vocabulary (`path`, `do_...`) and leaves
    the streams to the loop.
    """

    server: CertServer

    def __init__(self, connection: socket.socket, client_address: Any, server: CertServer) -> None:
        self.connection = connection
        self.client_address = client_address
        self.server = server
        self.station = plain_address(str(client_address[0]))
        self.deadline = server.now + REQUEST_SECONDS
        self.buffer: Union[bytes, bytearray] = b""
        self.head: Optional[Head] = None
        self.path, self.request_head = "", NO_HEAD  # of the request that runs
        self.body_start = 0  # in the buffer, once there is a head
        self.body = b""
        self.unsent = b""
        self.events = 0  # what the selector watches
        self.idle = True  # between two requests
        self.closing = False  # the last reply is decided: read no further request
        self.finished = False  # the last reply is sent, or in `unsent`
        self.draining = False
        self.streaming = False  # a part of the reply is sent
        self.waiting = False  # the reply comes from a job, which ends with the connection
        self.more = False  # whole requests may be left in the buffer
        self.held = False  # so they are, until the peer takes replies
        self.due = 0  # replies that wait for the end of the turn
        self.open = True

    # -- reading -------------------------------------------------------------------------------------------------------

    def feed(self) -> None:
        """Take what has arrived and run the requests that are whole."""
        try:
            data = self.connection.recv(RECEIVE)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, MemoryError):
            self.close()
            return
        if data and self.idle and not (self.buffer or self.waiting or self.closing or self.unsent):
            text, end, body = data.partition(b"\r\n\r\n")
            head = self.server.usual_heads.get(text)
            if head and end and len(body) == head.length:  # as nearly always: a whole request, of a kind seen before
                self.body = body
                self._dispatch(head)
                if self.closing and self.events:
                    self.watch()
                return
        if self.draining:
            if not data:
                self.draining = False
                self.settle()
        elif data:
            self._buffer(data)
            self.run()
        elif self.waiting:
            self.close()
        elif self.idle and not self.buffer:
            self.closing = True
            self._queue(b"", False)  # close behind what this turn still answers
        else:
            self.refuse(BadRequest("The connection ended in the middle of a request."))
        if self.open:
            self.watch()

    def _buffer(self, data: bytes) -> None:
        """Keep what has arrived behind what is there."""
        try:
            if not self.buffer:
                self.buffer = data
            elif isinstance(self.buffer, bytearray):
                self.buffer += data
            else:
                self.buffer = bytearray(self.buffer) + data
        except MemoryError:
            self._refuse_for_memory()

    def holds(self) -> int:
        """Bytes of a half request and of replies that are not taken; those of an operator's job do not count."""
        head = self.head
        if self.waiting or (head and is_import(head)):
            return 0
        read = self.body_start + HEADER_HELD * len(head.headers) if head else 0
        return len(self.buffer) + read + len(self.unsent)

    def free_memory(self) -> None:
        """Give back what is held."""
        if self.unsent:
            self.close()
        else:
            self.refuse(BadRequest("Long half requests take too much memory here: send each at one go.", 413))

    def _refuse_for_memory(self) -> None:
        """An import that is too large for this PC must not end the line."""
        self.buffer = b""
        self.refuse(BadRequest("This PC has no memory for so long a request: split the file.", 413))

    def run(self) -> None:
        """Run whole requests from the buffer, a bounded number in one turn."""
        self.more = self.held = False
        for _ in range(MAX_PIPELINED):
            if self.closing or self.waiting or not self.open:
                return
            if len(self.unsent) > MAX_UNSENT:
                self.held = bool(self.buffer)
                return
            try:
                head = self._take_request()
            except CertToolError as error:
                self.refuse(error)
                return
            except MemoryError:
                self._refuse_for_memory()
                return
            if not head:
                return
            self._dispatch(head)
            if not self.buffer:
                return
            if head.method == "GET":  # a page is long: whether the peer takes it shows before the next one
                break
        self.more = bool(self.buffer)
        if self.more:
            self.server.again.append(self)

    def _take_request(self) -> Optional[Head]:
        """Take one whole request from the buffer: its head, and `body`; None while it is not all there."""
        buffer, head = self.buffer, self.head
        if head is None:
            if buffer[:1] in (b"\r", b"\n"):  # old clients end a body with an empty line
                self.buffer = buffer = buffer.lstrip(b"\r\n")
            if not buffer:
                return None
            if self.idle:
                self.idle = False
                self.deadline = self.server.now + REQUEST_SECONDS
            end, start = _head_end(buffer)
            if not start or start > MAX_HEAD:
                if len(buffer) > MAX_HEAD:
                    raise BadRequest(f"The headers are longer than {MAX_HEAD} bytes.", 431)
                if not buffer[:1].isupper():
                    raise BadRequest("This is not an HTTP request: send POST / HTTP/1.1 with a JSON body.")
                return None
            text = bytes(buffer[:end])
            self.head = head = parse_head(text)
            self.body_start = start
            if head.method == "POST" and not head.path.startswith(MANAGEMENT) and is_of_web_page(head):
                raise Forbidden("Web pages get no certificates: ask from a program, without Origin or Sec-Fetch-Site.")
            self._check_length(head, len(buffer) - start)
            if buffer[end:start] == b"\r\n\r\n" and is_usual(head):
                self.server.remember(text, head)
        start, end = self.body_start, self.body_start + head.length
        if len(buffer) < end:
            return None
        view = memoryview(buffer)[start:end]
        self.body = view if is_import(head) else bytes(view)  # a copy of an import takes long
        self.buffer = buffer[end:]
        self.head = None
        return head

    def _check_length(self, head: Head, there: int) -> None:
        """Refuse a body that is too long before it is read; tell a client that asks first to go on.

        `there`: bytes that have come behind the head.
        """
        limit, too_long = MAX_BODY, f"The body is longer than {MAX_BODY} bytes."
        if is_import(head):
            self.server.check_manager(self, head)
            limit, too_long = MAX_UPLOAD, TOO_LONG_UPLOAD
            self.deadline = self.server.now + UPLOAD_SECONDS
        if head.length > limit:
            raise BadRequest(too_long, 413)
        if "expect" in head.headers and there < head.length:
            self._queue(b"HTTP/1.1 100 Continue\r\n\r\n", True)

    def _dispatch(self, head: Head) -> None:
        """Run a whole request. The one boundary: whatever goes wrong, it is answered, and the line goes on."""
        self.idle = True
        self.request_head = head
        self.path, self.keep_alive = head.path, head.keep_alive
        if not self.unsent:
            self.deadline = self.server.now + IDLE_SECONDS
        try:
            if self.server.networks and not self.server.allows(self.station) and not self._manages(head):
                raise Forbidden("This station is not allowed here: see serve --allow.")
            if head.method == "POST":
                self.do_POST()
            elif head.method == "GET":
                self.do_GET()
            else:
                raise BadRequest("Only POST carries a request.", 501)
        except CertToolError as error:
            self.refuse(error)
        except Exception as error:
            self.refuse(self.server.unexpected(error))
        self.body, self.path, self.request_head = b"", "", NO_HEAD

    def _manages(self, head: Head) -> bool:
        """Say whether this is for management, which has checks of its own."""
        return head.path.startswith(MANAGEMENT) or (head.method == "GET" and is_loopback(self.station))

    # -- answering -----------------------------------------------------------------------------------------------------

    def do_POST(self) -> None:
        """Answer a request of the protocol, or of management."""
        if self.path.startswith(MANAGEMENT):
            self.server.check_manager(self, self.request_head)
            self.server.manage(self, self.path[len(MANAGEMENT) :])
            return
        server = self.server
        product_key, device_id, name, action, now, why = "", "-", "-", "?", server.wall, ""
        try:
            product_key, device_id, verb = parse_request(self.body)
            action = ACTION_NAMES[verb]
            if verb == REQUEST:
                certificate, device_id, kind = server.service.request(product_key, device_id, self.station, now)
                name = certificate.credential.device_name
                reply = format_certificate(certificate, device_id, server.crc_as_int)
            else:
                name, kind = server.service.report(product_key, device_id, verb, self.station, now)
                reply = format_acknowledgement(product_key, device_id)
            result = RESULTS[kind]
            self.reply(200, reply, recorded=True)
        except CertToolError as error:
            result, why = f"refused: {error.code}", str(error)
            bad = isinstance(error, BadRequest)
            self.reply(error.http_status, format_error(error), recorded=not bad)
        event = _new(RequestEvent, (now, self.station, action, device_id or "-", name, result, product_key, why))
        server.turn_events.append(event)

    def do_GET(self) -> None:
        """Show a browser the site."""
        self.server.gets += 1
        self.server.site.get(self)

    def reply(
        self,
        http_status: int,
        body: bytes,
        recorded: bool = False,
        content_type: str = "application/json",
        more: str = "",
    ) -> None:
        """Queue an answer for the end of the turn; a `recorded` one becomes a 503 if the commit fails."""
        if not self.keep_alive:
            self.closing = True
        data = format_reply(http_status, body, self.keep_alive, content_type, more)
        self.due += 1
        self.server.replies.append((self, data, recorded, self.keep_alive))

    def _queue(self, data: bytes, keep_alive: bool) -> None:
        self.due += 1
        self.server.replies.append((self, data, False, keep_alive))

    def stream(self, data: bytes, last: bool = False) -> None:
        """Queue a part of an answer that a job sends in parts; the `last` one ends it."""
        self.streaming = not last
        if last and not self.keep_alive:
            self.closing = True
        self._queue(data, self.keep_alive or not last)

    def refuse(self, error: CertToolError) -> None:
        """Answer an error after which the connection cannot be trusted, or need not go on."""
        self.buffer, self.head = b"", None
        if self.closing:
            return
        self.keep_alive = False
        self.waiting = False
        self.reply(error.http_status, format_error(error))
        self.draining = True
        result = f"refused: {error.http_status} {error.code}"
        self.server.turn_events.append(RequestEvent(_now(), self.station, "-", "-", "-", result, why=str(error)))

    # -- sending -------------------------------------------------------------------------------------------------------

    def send(self, data: bytes, last: bool) -> None:
        """Send now what the peer takes; the loop sends the rest when it takes more."""
        if not self.open:
            return
        self.due -= 1
        self.finished = last
        if self.unsent:
            self.unsent += data
        else:
            try:
                sent = self.connection.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                self.close()
                return
            if sent < len(data):
                self.unsent = data[sent:]
                self.deadline = self.server.now + REPLY_SECONDS
            elif last and not self.draining:
                self.close()
                return
            elif not last and self.events == READ and not (self.more or self.held or self.waiting):
                return  # as most often: the next request may come
        self.settle()

    def flush(self) -> None:
        """Send on, now that the peer takes more."""
        data, self.unsent = self.unsent, b""
        self.due += 1
        self.send(data, self.finished)
        if self.idle and not self.unsent and not self.closing:
            self.deadline = self.server.now + IDLE_SECONDS
        if self.held and len(self.unsent) <= MAX_UNSENT:
            self.held, self.more = False, True
            self.server.again.append(self)

    def settle(self) -> None:
        """Close after the last reply, or watch for what comes next."""
        if self.finished and not self.unsent:
            if not self.draining:
                self.close()
                return
            self.deadline = self.server.now + DRAIN_SECONDS
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
        self.watch()

    def watch(self) -> None:
        """Let the selector wake us for what we can use: data while we take requests, room while a reply is unsent."""
        if self.closing:
            takes = self.draining
        else:
            takes = not (self.more or self.held or len(self.unsent) > MAX_UNSENT or (self.waiting and self.buffer))
        events = (READ if takes else 0) | (WRITE if self.unsent else 0)
        if events != self.events:
            self.server.watch(self, events)

    def on_ready(self, events: int) -> None:
        """The selector's call."""
        if events & WRITE:
            self.flush()
        if events & READ and self.open:
            self.feed()

    def expire(self) -> None:
        """The deadline is over."""
        if self.idle or self.unsent or self.closing:
            self.close()
        else:
            self.refuse(BadRequest("The request came too slowly.", 408))

    def close(self) -> None:
        """End the connection now."""
        if self.open:
            self.open = False
            self.server.forget(self)
            self.connection.close()


Reply = Tuple[CertRequestHandler, bytes, bool, bool]  # connection, bytes, recorded, keep alive
Ready = Tuple[selectors.SelectorKey, int]  # the selector's name for a connection or listener, and what it is ready for


class Site:
    """What a browser sees of the server. This one shows nothing; the management page (12) is another."""

    who = ""  # the operator of whoever passes `check`

    def check(self, head: Head) -> None:  # noqa: ARG002
        """Raise Forbidden unless this request, which has no token of ours, comes from our own page."""
        raise Forbidden("The token is wrong: it is in the store's lock file.")

    def get(self, handler: CertRequestHandler) -> None:  # noqa: ARG002
        """Answer a GET."""
        raise BadRequest("certtool gives certificates to devices: POST a request as JSON.", 501)

    def post(self, handler: CertRequestHandler, operation: str) -> None:  # noqa: ARG002
        """Answer a POST to management that only the page makes. The peer has been checked."""
        raise BadRequest("There is no such management request.")

    def events(self, events: Sequence[RequestEvent]) -> None:
        """See requests whose records are durable."""

    def notice(self, sentence: str) -> None:
        """See a sentence for the operator."""


class Job(NamedTuple):
    """Work in slices between turns, which answers `handler`, or nobody where that is None."""

    name: str
    steps: Generator[None, None, None]
    handler: Optional[CertRequestHandler]

    def can_go_on(self) -> bool:
        """False while the peer has not taken what was sent to it."""
        return self.handler is None or len(self.handler.unsent) <= MAX_UNSENT


class CertServer(http.server.HTTPServer):
    """The loop. Construction binds and listens, and raises CertToolError where the address is taken or wrong.

    It is ready once `serve_forever` runs. `on_events` gets what a console shows of a turn's requests, `notify` gets
    sentences for the operator.
    """

    allow_reuse_address = allow_reuse_port = False  # see _claim
    request_queue_size = BACKLOG

    def __init__(
        self,
        host: str,
        port: int,
        on_events: Callable[[Sequence[RequestEvent]], None],
        notify: Callable[[str], None],
        allow: Sequence[str] = (),
        crc_as_int: bool = False,
    ) -> None:
        self.service: Service
        self.on_events = on_events
        self.notify = notify
        self.crc_as_int = crc_as_int
        self.token = secrets.token_urlsafe(32)
        self.stopping = False
        self.now, self.wall = time.monotonic(), _now()  # of this turn: deadlines, and the time of its events
        self.connections: Set[CertRequestHandler] = set()
        self.replies: List[Reply] = []
        self.turn_events: List[RequestEvent] = []
        self.again: Deque[CertRequestHandler] = deque()
        self.gets = 0  # so far
        self.usual_heads: Dict[bytes, Head] = {}
        self._ready: Deque[Ready] = deque()  # what the selector has named
        self._fresh: Deque[CertRequestHandler] = deque()  # accepted in this turn, and not known to the selector
        self.site = Site()
        self.jobs: Deque[Job] = deque()
        self.networks = [ipaddress.ip_network(network) for network in allow]
        self._allowed: Dict[str, bool] = {}
        self._selector = selectors.DefaultSelector()
        self._listeners: List[socket.socket] = []
        self._most_connections = _most_connections()
        self._most_of_peer = max(1, self._most_connections // PEER_SHARE)
        self._of_peer: Dict[str, int] = {}  # connections by address
        self._victims: Dict[str, Iterator[CertRequestHandler]] = {}  # by address, until the next sweep
        self._sweep_at = 0.0
        self.failing = ""  # why nothing can be recorded
        host = plain_address(host)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), CertRequestHandler)
            self._listeners.append(self.socket)
            if not is_loopback(self.server_name) and self.server_name not in ("0.0.0.0", "::"):
                own = socket.socket()
                self._listeners.append(own)
                _claim(own)
                own.bind(("127.0.0.1", self.server_port))
                own.listen(BACKLOG)
        except (OSError, OverflowError, TypeError) as error:
            raise CertToolError(_why_not_bound(host, port, error)) from None
        for listener in self._listeners:
            listener.setblocking(False)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(listener, READ, functools.partial(self._accept, listener, int(listener.family)))

    def server_bind(self) -> None:
        """Bind; the base class would ask DNS for our name, 30 s on a PC that has none."""
        _claim(self.socket)
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # :: is all addresses, also on Windows
        socketserver.TCPServer.server_bind(self)
        self.server_name = plain_address(str(self.server_address[0]))  # however --host spells it
        self.server_port = int(self.server_address[1])

    @property
    def own_address(self) -> str:
        """The loopback address at which programs on this PC reach this server."""
        host = "::1" if self.server_name == "::" else self.server_name
        return host if is_loopback(host) else "127.0.0.1"

    def serve_forever(self, poll_interval: float = TICK_SECONDS) -> None:
        """Turn the loop until `stopping` is set; then send what is still to be sent, and close."""
        while not self.stopping:
            self.turn(poll_interval)
        while self.jobs:
            self.jobs.pop().steps.close()
        for listener in self._listeners:
            self._selector.unregister(listener)
            listener.close()
        self._listeners = []
        self.now = time.monotonic()
        end = self.now + STOP_SECONDS
        while self.now < end and any(handler.unsent for handler in self.connections):
            for key, events in self._selector.select(TICK_SECONDS):
                if events & WRITE:
                    key.data(WRITE)
            self.now = time.monotonic()
        for handler in list(self.connections):
            handler.close()

    def stop(self, *_: Any) -> None:
        """Let the present turn be the last."""
        self.stopping = True

    def server_close(self) -> None:
        """Close what the server holds; called by `with`."""
        super().server_close()
        for listener in self._listeners:
            listener.close()
        self._selector.close()

    def turn(self, poll_interval: float) -> None:
        """One turn: see the section's head. A defect outside of requests costs the connections, not the line."""
        try:
            self._turn(poll_interval)
        except Exception as error:
            self.unexpected(error)
            for handler in list(self.connections):
                handler.close()
            for queue in (self.replies, self.again, self._ready, self._fresh):
                queue.clear()

    def _turn(self, poll_interval: float) -> None:
        busy = self._ready or self.again or any(job.can_go_on() for job in self.jobs)
        ready = self._selector.select(0 if busy else poll_interval)
        self._ready = _peer_by_peer([*self._ready, *ready]) if self._ready else deque(ready)
        self.now, self.wall = time.monotonic(), _now()
        for handler in self._in_time(self.again, AGAIN_SECONDS):
            handler.run()
            if handler.open and not handler.closing:
                handler.watch()
        for _ in range(GATHER_ROUNDS):
            found = bool(self._ready)
            for key, events in self._in_time(self._ready, TURN_SECONDS):
                key.data(events)
            self._look_at_fresh()
            if self._ready or not (found or self._fresh) or time.monotonic() > self.now + GATHER_SECONDS:
                break
            self._ready.extend(self._selector.select(0))
        fresh, self._fresh = self._fresh, deque()
        for handler in fresh:
            if handler.open:
                handler.watch()
        self._finish_turn()
        if self.jobs:
            self._work()
            self._finish_turn()
        if self.now >= self._sweep_at:
            self._sweep_at = self.now + TICK_SECONDS
            self._victims.clear()
            self._free_memory()
            late = (handler for handler in self.connections if handler.deadline < self.now)
            late = (handler for handler in late if not handler.waiting or handler.unsent)
            for handler in list(itertools.islice(late, EXPIRES)):
                handler.expire()
            self._finish_turn()

    def _in_time(self, queue: Deque[Any], seconds: float) -> Iterator[Any]:
        """Take out what is in the queue now, in its order, one at least, until the time or MAX_GETS are over."""
        end, gets = time.monotonic() + seconds, self.gets + MAX_GETS
        for _ in range(len(queue)):
            yield queue.popleft()
            if time.monotonic() > end or self.gets >= gets:
                return

    def _free_memory(self) -> None:
        """Let long half requests and untaken replies go while all that is held is more than a line ever needs."""
        held = [(handler.holds(), handler) for handler in self.connections]
        if sum(size for size, _ in held) > MAX_HELD:
            long = [handler for size, handler in held if size > LONG_HELD]
            for handler in long[:EXPIRES]:
                handler.free_memory()
            if len(long) > EXPIRES:
                self._sweep_at = self.now  # the next turn looks again

    def _look_at_fresh(self) -> None:
        """Take what new connections have sent: mostly all that they ever will, before the selector need know them."""
        for handler in self._in_time(self._fresh, TURN_SECONDS):
            if handler.open:
                handler.feed()
            if handler.open and not handler.closing:
                if handler.buffer or not handler.idle or handler.due:
                    handler.watch()
                else:
                    self._fresh.append(handler)

    def _finish_turn(self) -> None:
        """Commit, then let the replies go."""
        failure: Optional[StoreUnavailable] = None
        try:
            self.service.commit()
        except StoreUnavailable as error:
            failure = error
            if str(error) != self.failing:
                self.notify(str(error))
        if self.turn_events and not failure:
            self.failing = self.service.store.broken
        elif failure:
            self.failing = str(failure)
        replies, self.replies = self.replies, []
        for handler, data, recorded, keep_alive in replies:
            if failure and recorded:
                data = format_reply(failure.http_status, format_error(failure), keep_alive)
            handler.send(data, not keep_alive)
        events, self.turn_events = self.turn_events, []
        if failure:
            events = [event._replace(result=f"refused: {failure.code}", why=str(failure)) for event in events]
        self.on_events(events)
        self.site.events(events)

    # -- connections ---------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket, family: int, _events: int) -> None:
        for _ in range(ACCEPTS):
            try:
                descriptor, address = listener._accept()  # type: ignore[attr-defined]  # accept() looks enums up
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    continue  # that client is gone already
                if not self._evict():
                    self.notify(f"No connection can be taken ({error.strerror}): close other programs.")
                return
            connection = socket.socket(family, socket.SOCK_STREAM, 0, descriptor)
            connection.setblocking(False)
            if sys.platform == "win32":  # elsewhere the listener passes it on
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            handler = CertRequestHandler(connection, address, self)
            if not is_loopback(handler.station) and self._of_peer.get(handler.station, 0) >= self._most_of_peer:
                self._evict(handler.station)
            elif len(self.connections) >= self._most_connections:
                self._evict()
            self.connections.add(handler)
            self._of_peer[handler.station] = self._of_peer.get(handler.station, 0) + 1
            self._fresh.append(handler)

    def _evict(self, station: str = "") -> bool:
        """Close the connection, of this peer if named, that was silent longest, so that a new client finds room.

        All are looked at every TICK_SECONDS, or when none is left of those found; who came or spoke since is spared.
        """
        victim = next(self._victims.get(station, iter(())), None)
        if not victim:
            self._victims[station] = self._by_silence(station)
            victim = next(self._victims[station], None)
        if victim:
            victim.close()
        return victim is not None

    def _by_silence(self, station: str) -> Iterator[CertRequestHandler]:
        """Look at all once, and name those that may be closed and were silent since, the longest silent first."""

        def silence(handler: CertRequestHandler) -> Tuple[bool, float]:
            return not handler.idle, handler.deadline

        found = [(silence(handler), handler) for handler in self.connections if station in ("", handler.station)]
        for before, handler in sorted(found, key=operator.itemgetter(0)):
            if handler.open and not handler.waiting and not handler.due and silence(handler) == before:
                yield handler

    def watch(self, handler: CertRequestHandler, events: int) -> None:
        """Change what the selector wakes this connection for."""
        if not handler.events:
            self._selector.register(handler.connection, events, handler.on_ready)
        elif not events:
            self._selector.unregister(handler.connection)
        else:
            self._selector.modify(handler.connection, events, handler.on_ready)
        handler.events = events

    def forget(self, handler: CertRequestHandler) -> None:
        """A connection ends; a job that it asked for ends with it, or goes on alone until the disk lets it end."""
        if handler.events:
            self.watch(handler, 0)
        self.connections.discard(handler)
        self._of_peer[handler.station] -= 1
        if not self._of_peer[handler.station]:
            del self._of_peer[handler.station]
        if self.jobs:
            for job in [job for job in self.jobs if job.handler is handler]:
                self.jobs.remove(job)
                with contextlib.suppress(Refused):
                    job.steps.throw(Refused("Who asked for it is gone."))
                    self.jobs.append(job._replace(handler=None))

    def remember(self, text: bytes, head: Head) -> None:
        """Keep a head that is checked and `is_usual`: stations send the same one with each request."""
        if len(self.usual_heads) >= USUAL_HEADS:
            self.usual_heads.clear()
        self.usual_heads[text] = head

    def allows(self, station: str) -> bool:
        """Say whether --allow lets this station in."""
        if station not in self._allowed:
            if len(self._allowed) > MAX_CONNECTIONS:
                self._allowed.clear()
            address = ipaddress.ip_address(station.partition("%")[0])
            self._allowed[station] = any(address in network for network in self.networks)
        return self._allowed[station]

    def unexpected(self, error: Exception) -> CertToolError:
        """Say on the console where a defect showed, and return what to answer; its message may hold a secret."""
        self.notify(f"Please report: {where_raised(error)}")
        return CertToolError("Something unexpected happened here; the server's screen says where.")

    # -- management ----------------------------------------------------------------------------------------------------

    def check_manager(self, handler: CertRequestHandler, head: Head) -> None:
        """Raise Forbidden unless this is a loopback peer that knows the token, or our own page."""
        self.check_local(handler, head)
        given = head.headers.get("authorization", "").encode()
        if not given:
            self.site.check(head)
        elif not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise Forbidden("The token is wrong: it is in the store's lock file.")

    def check_local(self, handler: CertRequestHandler, head: Head) -> None:
        """Raise Forbidden unless this is a loopback peer that means this PC: a page elsewhere may lend us its name."""
        if not is_loopback(handler.station) or not LOOPBACK_HOSTS.fullmatch(head.headers.get("host", "")):
            raise Forbidden("Management is only for programs on this PC.")

    def start_job(self, name: str, steps: Generator[None, None, None], handler: Optional[CertRequestHandler]) -> None:
        """Do `steps` between the next turns, from this one on; they answer `handler`, where there is one."""
        if handler:
            handler.waiting = True
        self.jobs.appendleft(Job(name, steps, handler))

    def manage(self, handler: CertRequestHandler, operation: str) -> None:
        """Release or void a certificate, or start an import whose report is the reply."""
        if operation == "import":
            self._start_import(handler)
            return
        if operation not in OPERATIONS:
            self.site.post(handler, operation)
            return
        fields = parse_object(handler.body)
        name, key, reason, who = (
            str(fields.get(field) or "") for field in ("device_name", "product_key", "reason", "who")
        )
        why = ""
        try:
            force = fields.get("force") is True
            verb, who = OPERATIONS[operation], who or self.site.who
            message, kind = self.service.operate(verb, name, key, reason, who, force, _now())
            handler.reply(200, json.dumps({"Status": "OK", "Message": message}).encode(), recorded=True)
            result = RESULTS[kind]
        except CertToolError as error:
            handler.reply(error.http_status, format_error(error), recorded=True)
            result, why = f"refused: {error.code}", str(error)
        self.turn_events.append(RequestEvent(_now(), handler.station, operation, "-", name, result, key, why))

    def _start_import(self, handler: CertRequestHandler) -> None:
        """The body is a line of JSON, {"options": {...}, "files": [[name, size], ...]}, and behind it the files."""
        if any(job.name == "import" for job in self.jobs):
            raise Refused("Another import is under way: wait until it is done, and try again.")
        body, handler.body = memoryview(handler.body), b""
        try:
            with io.BufferedReader(_InMemory(body)) as file:
                line = file.readline()
            fields = parse_object(line)
            options = ImportOptions(**fields["options"])
            if [type(value) for value in options] != [type(value) for value in ImportOptions()]:
                raise TypeError("an option of another type")
            ends = list(itertools.accumulate((size for _, size in fields["files"]), initial=len(line)))
            parts = [body[start:end] for start, end in zip(ends, ends[1:])]
            uploads = [Upload.of(str(name), part) for (name, _), part in zip(fields["files"], parts)]
        except (KeyError, TypeError, ValueError):
            raise BadRequest("The import request is malformed.") from None
        if [upload.size for upload in uploads] != [size for _, size in fields["files"]] or len(body) > ends[-1]:
            raise BadRequest("The import request does not hold the files that it names.")
        if options.wrong()[1]:
            raise BadRequest(options.wrong()[1])
        options = options._replace(who=options.who or self.site.who)
        self.start_job("import", self._import(handler, uploads, options), handler)

    def _import(
        self, handler: CertRequestHandler, uploads: Sequence[Upload], options: ImportOptions
    ) -> Generator[None, None, None]:
        report = yield from self.service.import_files(uploads, options)
        if report.ok and not report.dry_run:
            batches = f" as batch {', '.join(report.batches)}" if report.batches else ""
            self.notify(f"Imported {report.imported:,} of {report.read:,} rows{batches}.")
        body = yield from format_json({"Status": "OK", "Report": report.as_json()})
        handler.reply(200, body)

    def _work(self) -> None:
        """Do a slice of the next job that can go on."""
        for _ in range(len(self.jobs)):
            self.jobs.rotate(-1)
            if self.jobs[-1].can_go_on():
                break
        else:
            return
        job = self.jobs[-1]
        handler = job.handler
        error: Optional[CertToolError] = None
        end = time.monotonic() + SLICE_SECONDS
        try:
            next(job.steps)
            while handler and time.monotonic() < end:  # what nobody waits for takes one step
                next(job.steps)
            return
        except StopIteration:
            pass
        except CertToolError as failure:
            error = failure
        except Exception as failure:
            error = self.unexpected(failure)
        self.jobs.remove(job)
        if not handler:
            if isinstance(error, StoreUnavailable):
                self.notify(str(error))
            return
        handler.waiting = False
        if error and handler.streaming:
            handler.close()  # what the peer has is seen to be cut short
        elif error:
            handler.reply(error.http_status, format_error(error))
        self.again.append(handler)


def _peer_by_peer(ready: Iterable[Ready]) -> Deque[Ready]:
    """Each connection once, those of a peer in their order, and one of each peer by turns."""
    peers: Dict[str, Dict[int, Ready]] = {}
    for key, events in ready:
        handler = getattr(key.data, "__self__", None)  # a listener has none
        peers.setdefault(getattr(handler, "station", ""), {})[key.fd] = key, events
    turns = [(turn, one) for peer in peers.values() for turn, one in enumerate(peer.values())]
    return deque(one for _, one in sorted(turns, key=operator.itemgetter(0)))


def _most_connections() -> int:
    """As many connections as the system lets this process have, with files left for the store."""
    if sys.platform != "win32":
        wanted = MAX_CONNECTIONS + OTHER_FILES
        soft, hard = (wanted if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
        if soft < min(wanted, hard):
            soft = min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return max(1, min(MAX_CONNECTIONS, soft - OTHER_FILES))
    return MAX_CONNECTIONS


def _claim(listener: socket.socket) -> None:
    """Let no other program share the port; one that has just ended does not count."""
    if sys.platform == "win32":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    else:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def plain_address(address: str) -> str:
    """Return a numeric address as IPv4 where an IPv6 socket has it wrapped."""
    return address[7:] if address.startswith("::ffff:") and "." in address else address


def is_loopback(address: str) -> bool:
    """Say whether this numeric address is of this PC alone."""
    return address.startswith("127.") or address == "::1"


def where_raised(error: BaseException) -> str:
    """Describe an unexpected exception by type and place; never by its message, which may hold a secret."""
    trace = error.__traceback__
    place = ""
    while trace:
        place = f" in {trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}{place}"


def _why_not_bound(host: str, port: int, error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE or (sys.platform == "win32" and number in (errno.EACCES, errno.WSAEACCES)):
        return f"Port {port} is in use by another program: stop it, or choose another port, such as serve {port + 1}."
    if number == errno.EACCES:
        return f"Port {port} is not free for us: choose one above 1023, such as serve {DEFAULT_PORT}."
    return f"{host} port {port} cannot be used ({getattr(error, 'strerror', error)}): is --host an address of this PC?"


# ======================================================================================================================
# 12. Management page
# ======================================================================================================================
# One page with three views, for browsers on this PC. Its source (HTML, CSS, JavaScript) comes first, then who may ask,
# then what it asks for. The page itself holds no data: everything is asked for with POST /certtool/..., and needs our
# own Origin and what the link of `serve` is exchanged for: a cookie, which a browser tells every port of this PC, also
# where another user's program listens, and a key, which it keeps for our script alone. Only the CSV, which has no
# secrets, is a GET with no more than the cookie: a browser saves it.
#
# What costs time is a job in slices; what every open page asks for each second is built once for all of them.

PAGE_STYLE = r"""
:root {
  --back: #f3f5f8; --card: #ffffff; --line: #d5dbe3; --text: #131a22; --soft: #4d5967; --accent: #0b57c2;
  --on-accent: #ffffff; --good: #14713a; --bad: #b3261e; --bad-back: #fdeceb; --warn: #7a4b00; --warn-back: #fff2d6;
  --s0: #b9c7d8; --s1: #2f6fde; --s2: #1f8a4c; --s3: #d0342c; --s4: #56606c; color-scheme: light;
}
:root[data-theme="dark"] {
  --back: #0f141a; --card: #192029; --line: #344050; --text: #edf1f5; --soft: #a9b5c2; --accent: #8ab8ff;
  --on-accent: #0c1520; --good: #6cd794; --bad: #ff9d96; --bad-back: #401a1a; --warn: #ffce73; --warn-back: #3c2c0b;
  --s0: #4f6077; --s1: #6ea3ff; --s2: #43b874; --s3: #f26a61; --s4: #8a96a3; color-scheme: dark;
}
* { box-sizing: border-box; } [hidden] { display: none !important; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.45 "Segoe UI", system-ui, -apple-system,
  "Microsoft YaHei", "PingFang SC", "Noto Sans CJK SC", "Noto Sans SC", sans-serif; }
header, main { max-width: 1360px; margin: 0 auto; padding: 0 20px; }
.top { background: var(--card); border-bottom: 1px solid var(--line); position: sticky; top: 0; z-index: 1; }
header { display: flex; align-items: center; gap: 20px; min-height: 56px; flex-wrap: wrap; }
.brand { font-weight: 700; font-size: 18px; letter-spacing: -.01em; }
nav { display: flex; gap: 4px; flex: 1; align-self: stretch; }
nav a { display: flex; align-items: center; padding: 0 14px; color: var(--soft); text-decoration: none;
  font-weight: 600; border-bottom: 3px solid transparent; border-top: 3px solid transparent; min-height: 44px; }
nav a:hover { color: var(--text); }
nav a[aria-current] { color: var(--accent); border-bottom-color: var(--accent); }
.tools { display: flex; align-items: center; gap: 8px; }
#live { color: var(--good); font-weight: 600; white-space: nowrap; }
#live::before { content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px;
  background: currentColor; }
#live.gone { color: var(--bad); } main { padding-top: 18px; padding-bottom: 40px; }
main > section { scroll-margin-top: 100vh; }  /* where a browser goes to it, it goes to the warnings over it */
h1 { position: absolute; width: 1px; height: 1px; margin: 0; overflow: hidden; clip-path: inset(50%); }
h2 { font-size: 15px; margin: 0 0 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; min-width: 0; }
.grid { display: grid; gap: 16px; }
.columns { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); align-items: start; }
.tiles { grid-template-columns: repeat(4, minmax(0, 1fr)); margin-bottom: 16px; }
.tile { padding: 12px 18px 14px; }
.tile p, .label { margin: 0; color: var(--soft); font-size: 13px; font-weight: 600; }
.big { font-size: 34px; line-height: 1.15; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
#banners { border-radius: 10px; overflow: hidden; margin: 0 0 16px; } #banners:empty { display: none; }
.banner { padding: 10px 18px; margin: 0; font-weight: 600; font-size: 17px; background: var(--bad-back);
  color: var(--bad); border-left: 8px solid currentColor; overflow-wrap: anywhere; }
.banner.warn { background: var(--warn-back); color: var(--warn); }
.note { color: var(--soft); margin: 8px 0 0; } .fail { color: var(--bad); font-weight: 600; }
.note, .fail { overflow-wrap: anywhere; }
.done { color: var(--good); font-weight: 600; }
.row { display: flex; gap: 12px; align-items: baseline; justify-content: space-between; flex-wrap: wrap; }
.key, dd, .mono { font-family: Consolas, "SF Mono", "Liberation Mono", monospace; overflow-wrap: anywhere; }
.key { font-size: 17px; font-weight: 700; }
.product + .product { border-top: 1px solid var(--line); margin-top: 18px; padding-top: 16px; }
.left { font-size: 26px; font-weight: 650; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.left small { font-size: 14px; color: var(--soft); font-weight: 600; letter-spacing: 0; }
.low .left { color: var(--bad); } .batch { margin-top: 12px; }
.bar { display: flex; height: 16px; border-radius: 5px; overflow: hidden; background: var(--line);
  margin: 5px 0 6px; gap: 1px; }
.bar i { min-width: 3px; }
.counts { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0; padding: 0; list-style: none; font-size: 13px;
  color: var(--soft); }
.counts b { color: var(--text); font-variant-numeric: tabular-nums; }
.counts i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 5px; }
.c0 { background: var(--s0); } .c1 { background: var(--s1); } .c2 { background: var(--s2); }
.c3 { background: var(--s3); } .c4 { background: var(--s4); } svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); text-anchor: middle; font-variant-numeric: tabular-nums; }
svg .value { fill: var(--text); font-weight: 600; }
svg .f2 { fill: var(--s2); } svg .f3 { fill: var(--s3); } svg .base { stroke: var(--line); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 10px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-size: 13px; font-weight: 600; white-space: nowrap; }
td { overflow-wrap: anywhere; } td.time { white-space: nowrap; } td.word { overflow-wrap: normal; }
td.mono { font-size: 14px; }
.number { text-align: right; padding-right: 0; padding-left: 10px; white-space: nowrap; }
tr:last-child td { border-bottom: 0; } .status { white-space: nowrap; font-weight: 600; }
.status i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
button, .button, input, select { font: inherit; color: inherit; min-height: 38px; border-radius: 7px; }
button, .button { border: 1px solid var(--line); background: var(--card); padding: 6px 14px; font-weight: 600;
  cursor: pointer; display: inline-flex; align-items: center; text-decoration: none; color: var(--text);
  white-space: nowrap; }
button:hover:not(:disabled), .button:hover { border-color: var(--accent); color: var(--accent); }
button.main { background: var(--accent); color: var(--on-accent); border-color: var(--accent); }
button.main:hover:not(:disabled) { color: var(--on-accent); filter: brightness(1.1); }
button.danger { color: var(--bad); }
button:disabled { background: var(--back); color: var(--soft); border-color: var(--line); cursor: not-allowed; }
button.link { border: 0; background: none; padding: 0; min-height: 24px; color: var(--accent); text-align: left;
  font-family: inherit; font-weight: 600; text-decoration: underline; text-underline-offset: 2px;
  overflow-wrap: anywhere; white-space: normal; }
input, select { border: 1px solid var(--soft); background: var(--card); padding: 6px 10px; width: 100%; }
input[type="checkbox"] { width: 20px; min-height: 20px; margin: 0 8px 0 0; vertical-align: -4px; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
label.field input, label.field select { font-weight: 400; font-size: 15px; }
label.field { display: block; font-weight: 600; font-size: 14px; }
label.field span { display: block; margin-bottom: 4px; } .dots { -webkit-text-security: disc; }
.fields { grid-template-columns: 1fr 1fr; gap: 14px 16px; margin-top: 16px; }
.drop { display: block; border: 2px dashed var(--soft); border-radius: 10px; padding: 26px 18px; text-align: center;
  cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
.drop:hover, .drop.over, .drop:focus-within { border-color: var(--accent); color: var(--accent); }
.drop:focus-within { outline: 3px solid var(--accent); outline-offset: 2px; }
.drop small { display: block; color: var(--soft); font-weight: 400; margin-top: 4px; }
.drop input { position: absolute; opacity: 0; width: 1px; height: 1px; min-height: 0; pointer-events: none; }
.actions { display: flex; flex-wrap: wrap; gap: 10px; align-items: center; margin-top: 16px; }
.facts4 { grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 12px; } .facts4 .big { font-size: 26px; }
progress { width: 100%; height: 14px; accent-color: var(--accent); margin-top: 12px; }
.search { display: flex; gap: 10px; } .search input { font-size: 19px; min-height: 48px; padding: 6px 14px; }
.filters { grid-template-columns: repeat(3, minmax(0, 1fr)) auto; align-items: end; gap: 12px; margin: 16px 0; }
.space { margin-top: 16px; }
dl { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 12px 18px; margin: 12px 0 0; }
dt { color: var(--soft); font-size: 13px; font-weight: 600; } dd { margin: 1px 0 0; min-height: 22px; }
dialog { border: 1px solid var(--line); border-radius: 12px; background: var(--card); color: var(--text); padding: 22px;
  width: min(480px, calc(100vw - 32px)); }
dialog::backdrop { background: rgb(0 0 0 / 55%); } dialog h2 { font-size: 19px; overflow-wrap: anywhere; }
.stale > section { opacity: .55; }
@media (max-width: 960px) {  /* 1366 at 150 % and 200 % too */
  .columns { grid-template-columns: minmax(0, 1fr); } .tiles, .facts4 { grid-template-columns: 1fr 1fr; }
  dl { grid-template-columns: 1fr 1fr; } th { white-space: normal; }
}
@media (max-width: 700px) {
  header, main { padding-left: 12px; padding-right: 12px; } header { gap: 0 12px; padding-top: 8px; }
  .brand { flex: 1; } nav { order: 3; flex-basis: 100%; gap: 0; }
  nav a { flex: 1; justify-content: center; padding: 0 4px; } .tools button { padding: 4px 10px; }
  .grid { gap: 12px; } .tile { padding: 10px 14px 12px; } .card { padding: 14px; } .big { font-size: 27px; }
  .filters { grid-template-columns: 1fr 1fr; } .wide { display: none; } th, td { padding-right: 8px; }
  svg text { font-size: 17px; }
}
@media print {
  :root, :root[data-theme="dark"] { --back: #fff; --card: #fff; --text: #000; --soft: #333; --line: #999;
    --accent: #000; --warn: #000; --warn-back: #fff; --bad: #900; --bad-back: #fff; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } .top { position: static; }
  nav a:not([aria-current]), .tools, .actions, .search, .filters, button:not(.link) { display: none !important; }
  .card, tr { break-inside: avoid; } button.link { color: #000; text-decoration: none; }
  body { font-size: 12px; }
}
"""

PAGE_BODY = r"""
<div class="top"><header>
  <span class="brand">certtool</span>
  <nav data-label="views">
    <a href="#line" data-text="line"></a><a href="#add" data-text="add"></a><a href="#query" data-text="query"></a>
  </nav>
  <div class="tools">
    <span id="live" role="status"></span>
    <button id="theme" data-text="theme"></button>
    <button id="language" data-text="language"></button>
  </div>
</header></div>
<main>
  <div id="banners" role="alert"></div>
  <section id="line" hidden data-view="line">
    <h1 data-text="line"></h1>
    <div class="grid tiles" id="tiles"></div>
    <div class="grid columns">
      <div class="card"><h2 data-text="stock"></h2><div id="products"></div></div>
      <div class="grid">
        <div class="card"><h2 data-text="hours"></h2><div id="chart"></div></div>
        <div class="card"><h2 data-text="stations"></h2><div id="stations"></div></div>
        <div class="card"><h2 data-text="events"></h2><div id="feed"></div></div>
      </div>
    </div>
  </section>
  <section id="add" hidden data-view="add">
    <h1 data-text="add"></h1>
    <div class="grid columns">
      <form class="card" id="form">
        <label class="drop" id="drop"><input type="file" id="file" accept=".csv,.txt,text/csv">
          <span id="chosen"></span><small data-text="dropHint"></small></label>
        <div class="grid fields">
          <label class="field"><span data-text="batch"></span><input name="batch" maxlength="100"></label>
          <label class="field"><span>ProductKey</span><input name="product_key" maxlength="64"></label>
          <label class="field"><span>ProductSecret</span>
            <input name="product_secret" class="dots" autocomplete="off" spellcheck="false" maxlength="64"></label>
          <label class="field"><span>ProductID</span><input name="product_id" maxlength="64"></label>
        </div>
        <p class="note" data-text="fieldsHint"></p>
        <div class="actions"><button class="main" data-text="check"></button></div>
      </form>
      <div class="card" id="report" role="region" data-label="result" aria-live="polite"></div>
    </div>
  </section>
  <section hidden data-view="query"><!-- with that id browsers would go to it, and take the focus from the box -->
    <h1 data-text="query"></h1>
    <form class="search" id="search">
      <input id="text" data-label="searchHint" data-hint="searchHint" autocomplete="off" maxlength="64">
      <button class="main" data-text="find"></button>
    </form>
    <p class="fail" id="missed" role="alert" hidden></p>
    <div class="card space" id="details" role="region" data-label="details" hidden></div>
    <div class="grid filters">
      <label class="field"><span data-text="product"></span><select id="productFilter"></select></label>
      <label class="field"><span data-text="batch"></span><select id="batchFilter"></select></label>
      <label class="field"><span data-text="status"></span><select id="statusFilter"></select></label>
      <a class="button" id="download" data-text="download" download></a>
    </div>
    <div class="card"><div id="rows"></div>
      <div class="actions row"><span id="place" class="label" role="status"></span><span class="actions">
        <button id="first" data-text="first" disabled></button>
        <button id="previous" data-text="previous" disabled></button>
        <button id="next" data-text="next" disabled></button></span></div>
    </div>
  </section>
</main>
<dialog id="dialog" aria-labelledby="dialogTitle"><form id="dialogForm" method="dialog">
  <h2 id="dialogTitle"></h2><p id="dialogText"></p>
  <label class="field"><span data-text="reason"></span>
    <input id="reason" required maxlength="200" autocomplete="off"></label>
  <p id="forceLine"><label><input type="checkbox" id="force"><span data-text="force"></span></label></p>
  <p class="fail" id="dialogFail" role="alert"></p>
  <div class="actions"><button class="main" id="confirm"></button>
    <button type="button" id="cancel" data-text="cancel"></button></div>
</form></dialog>
<p id="old" class="banner">This page needs JavaScript, and Chrome 109, Edge 109, Firefox 115 or a later one.
  此页面需要 JavaScript 和 Chrome 109、Edge 109、Firefox 115 或更高版本。</p>
"""

PAGE_SCRIPT = r"""
"use strict";
// Every text of the page: English, Chinese.
const TEXT = {
  language: ["中文", "English"], views: ["Views", "页面"], theme: ["Light / dark", "明暗"], line: ["Line", "产线"],
  add: ["Add Device", "添加设备"], query: ["Device Query", "设备查询"], live: ["Live", "实时"],
  gone: ["No server", "服务器无响应"], stock: ["Stock", "库存"], Unallocated: ["Unallocated", "未分配"],
  Allocated: ["Allocated", "已分配"], Written: ["Written", "已烧录"], Failed: ["Failed", "烧录失败"],
  Void: ["Void", "已作废"], product: ["Product", "产品"], batch: ["Batch", "批次"], status: ["Status", "状态"],
  all: ["All", "全部"], hours: ["Certificates burned, by the hour", "每小时烧录数"], stations: ["Stations", "工位"],
  station: ["Station", "工位"], last: ["Last contact", "最近联系"], refusals: ["Refused", "被拒绝"],
  events: ["Latest events", "最新事件"], time: ["Time", "时间"], event: ["Event", "事件"],
  noStock: ["There is no certificate yet. Add an identity file.", "还没有证书。请先添加设备身份文件。"],
  noStations: ["No station has asked for anything in the last 12 hours.", "最近 12 小时没有工位发出请求。"],
  noEvents: ["Nothing has happened yet.", "还没有事件。"],
  shiftBurned: ["Burned in the last 12 hours", "最近 12 小时烧录"], rate: ["Burned an hour, now", "当前每小时烧录"],
  yield: ["Yield, last 12 hours", "最近 12 小时良率"], runsOut: ["First stock runs out in", "最先用完的库存还可用"],
  left: ["left", "剩余"], runsOutIn: ["runs out in {0} at the present rate", "按当前速度还可用 {0}"],
  lowStock: ["LOW STOCK: {0}. Add more now.", "库存不足：{0}。请立即添加。"],
  lowOf: ["product {0} has {1} left", "产品 {0} 只剩 {1} 个证书"],
  noneLeft: ["STOCK IS EMPTY: no certificate of product {0} is left. The line stands still until you add more.",
    "库存用完：产品 {0} 已没有证书。添加之前产线无法继续。"],
  finished: ["{0} batches with nothing left are not shown here.", "另有 {0} 个已用完的批次未在此显示。"],
  others: ["{0} more batches are not shown here.", "另有 {0} 个批次未在此显示。"],
  goneSince: ["The server has not answered since {0}: see its window, and start it again. This is old.",
    "服务器自 {0} 起没有响应：请查看其窗口并重新启动。此处显示的是旧数据。"],
  closed: ["This page is locked. Open it with the link that “certtool.py serve” printed when it started.",
    "此页面已锁定。请用 “certtool.py serve” 启动时显示的链接打开。"],
  locked: ["Locked", "已锁定"], minutes: ["{0} min", "{0} 分钟"],
  hoursMinutes: ["{0} h {1} min", "{0} 小时 {1} 分钟"], days: ["{0} days", "{0} 天"],
  choose: ["Choose the identity file, or drop it here", "选择设备身份文件，或拖放到此处"],
  dropHint: ["CSV from the cloud console. Nothing is added before you have seen what is in it.",
    "从云控制台下载的 CSV。先显示内容，确认后才会添加。"],
  fieldsHint: ["ProductKey, ProductSecret and ProductID are for a file that has no such column.",
    "仅当文件中没有相应的列时，才需要填写 ProductKey、ProductSecret 和 ProductID。"],
  check: ["Check the file", "检查文件"], result: ["Result", "结果"], checking: ["Reading the file …", "正在读取文件……"],
  noPreview: ["Choose a file to see what is in it.", "选择文件以查看其内容。"],
  preview: ["Preview: nothing is added yet", "预览：尚未添加"], read: ["Rows read", "读取行数"],
  would: ["New", "新证书"], imported: ["Added", "已添加"], duplicates: ["In the store already", "库中已有"],
  rejected: ["Bad rows", "错误行"], row: ["Line", "行号"], problem: ["What is wrong", "问题"],
  importAll: ["Add {0} certificates", "添加 {0} 个证书"],
  importGood: ["Add the good rows only ({0})", "只添加 {0} 个正确的行"],
  mend: ["Mend these rows in the file and choose it again: with a bad row nothing is added.",
    "请在文件中改正这些行后重新选择：只要有错误行，就不会添加。"],
  notAdded: ["These rows were not added: mend them in the file and choose it again.",
    "以下行未添加：请在文件中改正后重新选择。"],
  unusable: ["This file cannot be used as it is: nothing is added.", "此文件无法直接使用：不会添加任何证书。"],
  orField: [" (or fill in the field ProductKey)", "（或填写 ProductKey 栏）"],
  nothingNew: ["There is nothing new in this file.", "此文件中没有新证书。"],
  ignored: ["Columns not used: {0}", "未使用的列：{0}"], more: ["Show more ({0} left)", "显示更多（还有 {0} 行）"],
  importing: ["Adding: {0} rows …", "正在添加：{0} 行……"], done: ["The certificates are added", "证书已添加"],
  file: ["File", "文件"], chooseFirst: ["Choose a file first.", "请先选择文件。"],
  changed: ["The file cannot be read any more: choose it again.", "无法再读取该文件：请重新选择。"],
  searchHint: ["DeviceName or DeviceID: scan or type", "DeviceName 或 DeviceID：扫码或输入"], find: ["Query", "查询"],
  nothing: ["There is no certificate with the DeviceName or DeviceID “{0}”.",
    "没有 DeviceName 或 DeviceID 为“{0}”的证书。"], download: ["Download as CSV", "下载 CSV"], first: ["First", "首页"],
  previous: ["Previous", "上一页"], next: ["Next", "下一页"], place: ["{0}–{1} of {2}", "第 {0}–{1} 条，共 {2} 条"],
  noRows: ["No certificate matches.", "没有符合的证书。"], details: ["Certificate", "证书详情"],
  history: ["History", "历史记录"], leftOut: ["{0} requests and reports of devices in between are not shown here.",
    "其间另有 {0} 条设备请求和报告未在此显示。"], who: ["Who, why", "操作人与原因"],
  show: ["Show secrets (this is recorded)", "显示密钥（将被记录）"], hide: ["Hide secrets", "隐藏密钥"],
  close: ["Close", "关闭"], release: ["Release", "释放"], void: ["Void", "作废"], cancel: ["Cancel", "取消"],
  reason: ["Reason", "原因"], releaseTitle: ["Release {0} of product {1}?", "释放产品 {1} 的 {0}？"],
  voidTitle: ["Void {0} of product {1}?", "作废产品 {1} 的 {0}？"],
  releaseText: ["It goes back to the stock and another device will get it. Only where no device has it any more.",
    "它将回到库存并分配给其他设备。仅当没有设备再使用它时才可释放。"],
  voidText: ["It is taken out of use for ever. This cannot be undone.", "它将永久停用，无法撤销。"],
  force: ["It is Written: the device that has it is scrap.", "它已烧录：持有它的设备已报废。"],
  import: ["imported", "导入"], allocate: ["allocated", "分配"],
  rerequest: ["asked again, is Written", "再次请求（已烧录）"], written: ["burn succeeded", "烧录成功"],
  failed: ["burn failed", "烧录失败"], reveal: ["secrets shown", "查看密钥"], allocated: ["allocated", "已分配"],
  "same again": ["same again", "与之前相同"], released: ["released", "已释放"],
  "same again, is Written": ["same again, is Written", "与之前相同，已烧录"], voided: ["voided", "已作废"],
  refused: ["refused: {0}", "被拒绝：{0}"],
};
// The server's sentences in Chinese; in English they are shown as they come.
const SENTENCES = [
  [/^Another import is under way.*/, "另一个导入正在进行：请等它完成后再试。"],
  [/^A quotation mark is not closed.*/, "引号没有闭合，或闭合的引号后还有文字。"],
  [/^The row has (\d+) cells where the header line has (\d+)\.$/, "此行有 $1 列，而标题行有 $2 列。"],
  [/^(\w+) is missing\.$/, "缺少 $1。"],
  [/^(\w+) was rewritten by a spreadsheet.*/, "$1 已被电子表格软件改写：请重新导出文件，不要用电子表格软件保存。"],
  [/^DeviceName is not 4-32 characters of (.+)$/, "DeviceName 不是 4–32 个字符（$1）。"],
  [/^(\w+) is not 1-(\d+) printable ASCII.*/, "$1 不是 1–$2 个不含空格的可打印 ASCII 字符。"],
  [/^(.+) is in the store with another (.+)\.$/, "$1 在库中已有，但 $2 不同。"],
  [/^DeviceID (.+) has another certificate in the store\.$/, "DeviceID $1 在库中已有另一个证书。"],
  [/^(.+) stands in the file before, with another secret.*/, "$1 在文件前面已出现，但密钥或 ID 不同。"],
  [/^DeviceID (.+) stands in the file before.*/, "DeviceID $1 在文件前面已出现，但证书不同。"],
  [/^The file has no certificate in it.*/, "文件中没有证书，只有标题行。"],
  [/^The header line names (\w+) twice.*/, "标题行中 $1 出现了两次：请去掉一个。"],
  [/^The first line must name the columns; there is none for (.+)\.$/, "第一行必须是列名；缺少：$1。"],
  [/^The first line names more than ([\d,]+) columns.*/, "第一行的列名超过 $1 个：请重新导出文件。"],
  [/^More than ([\d,]+) rows are wrong.*/, "错误的行超过 $1 行，其余未读取：请确认文件是否正确。"],
  [/^The file names more than ([\d,]+) ProductKeys.*/, "文件中的 ProductKey 超过 $1 个：请确认该列是否正确。"],
  [/^The file is empty.*/, "文件是空的：请重新导出。"],
  [/^This is a spreadsheet, not a CSV.*/, "这是电子表格，不是 CSV 文件：请另存为 CSV 后再导入。"],
  [/^The text is neither UTF-8.*/, "文字编码不是 UTF-8、带 BOM 的 UTF-16 或 GB18030：请另存为 CSV UTF-8。"],
  [/^There is no certificate of this DeviceName.*/, "库中没有此 DeviceName 的证书：请检查名称。"],
  [/^A reason is needed.*/, "必须填写原因。"],
  [/^It is not allocated.*/, "它尚未分配，没有可释放的。"],
  [/^It is void, and.*/, "它已作废，作废的证书不会再分配。"],
  [/^It is Written, so its secret is in a device.*/, "它已烧录，密钥在设备中：仅当设备已报废时，勾选后释放。"],
  [/^Imported ([\d,]+) of ([\d,]+) rows(?: as batch (.*))?\.$/, "已导入 $1 行（共 $2 行），批次 $3。"],
  [/^Only (\d+) certificates of product (.+) are left.*/, "产品 $2 只剩 $1 个证书：请添加。"],
  [/^No certificate of product (.+) is left.*/, "产品 $1 已没有证书：请立即添加。"],
  [/^The record could not be written \(no memory\).*/, "内存不足，无法写入记录，未分配任何证书：请关闭其他程序。"],
  [/^The record could not be written \((.+)\).*/, "无法写入记录（$1），因此没有分配任何证书：请检查磁盘空间和权限。"],
  [/^(?:An|The) import (?:file )?could not be \w+ \((.+)\): close it.*/,
    "无法写入导入文件（$1）：请在其他程序中关闭它，或检查其权限和磁盘。"],
  [/^(?:An|The) import (?:file )?could not be \w+ \((.+)\).*/, "无法写入导入文件（$1）：请检查磁盘空间和权限。"],
  [/^Another program changed (imports\/.+) at once.*/, "其他程序立即改动了 $1：请查明原因后重新导入。"],
  [/^Another program changed journal\.csv.*/, "其他程序改动了 journal.csv：请查明原因后重新启动。"],
  [/^The disk failed to keep a record \((.+)\).*/,
    "磁盘未能保存记录（$1），该记录可能丢失，也可能没有：请检查磁盘并重新启动本机。"],
  [/^A failed record could not be taken back.*/, "无法撤回写入失败的记录：请检查磁盘后重新启动。"],
  [/^Something unexpected stopped the recording.*/, "意外错误使记录停止：请保留日志后重新启动。"],
  [/^Something unexpected happened here.*/, "发生意外错误：服务器窗口中有说明。"],
  [/^Please report: (.+)$/, "请向开发者报告：$1"],
  [/^THERE IS NO SECOND COPY: the mirror (.+) failed \((.+)\)\. The line.*/,
    "没有第二份副本：镜像 $1 失败（$2）。产线继续运行。请修复磁盘后重新启动，届时会补齐缺少的内容。"],
  [/^This PC cannot remember how far the store has come \((.+)\), so.*/,
    "本机无法记住库的进度（$1），因此无法发现旧副本被放回。"],
  [/^No connection can be taken \((.+)\).*/, "无法接受连接（$1）：请关闭其他程序。"],
  [/^A running server takes files of 256 MiB.*/, "运行中的服务器最多接受 256 MiB 的文件：请停止服务器后再导入。"],
  [/^This PC has no memory for so long.*/, "本机内存不足，无法接收这么大的文件：请拆分文件。"],
  [/^This page is locked.*/, "此页面已锁定：请用 certtool.py serve 启动时显示的链接打开。"],
  [/^(.+) cannot be read \((.+)\): check the store's disk.*/, "无法读取 $1（$2）：请检查库所在的磁盘。"],
  [/^(.+) cannot be read \((.+)\).*/, "无法读取 $1（$2）：请在其他程序中关闭它，或检查其权限和磁盘。"],
  [/^(.+) cannot be read: put it back.*/, "无法读取 $1：请恢复该文件后重新启动。"],
  [/^A device of the file got another certificate meanwhile.*/, "文件中的某个设备刚刚得到了另一个证书：请重新导入。"],
];
const STATUSES = ["Unallocated", "Allocated", "Written", "Failed", "Void"];
const MORE = 200;  // bad rows shown at a time
const PATIENCE = 5000;  // milliseconds: the connection to a server that hangs does not end
const $ = (id) => document.getElementById(id);
const zh = () => document.documentElement.lang === "zh";
const stored = (name) => { try { return localStorage.getItem(name); } catch { return null; } };
const store = (name, value) => { try { localStorage.setItem(name, value); } catch { /* for this visit only */ } };
let snapshot = null, goneSince = 0, locked = false, shown = {}, linkKey = "";

function t(key, ...values) {
  return TEXT[key][zh() ? 1 : 0].replace(/\{(\d)\}/g, (_, place) => values[place]);
}
function say(sentence) {  // one of the server's, whose options are fields here
  sentence = sentence.replace(" (or --product-key)", t("orField"));
  sentence = sentence.replace("release it with --force", "tick to release it");
  if (!zh()) return sentence;
  const known = SENTENCES.find(([pattern]) => pattern.test(sentence));
  return known ? sentence.replace(...known) : sentence;
}
function h(tag, properties, ...children) {  // text only ever becomes a text node
  const svg = ["svg", "rect", "text", "line"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "grow") element.style.flex = `${value} 0 0`;
    else if (value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter(Boolean));
  return element;
}
const number = (value) => new Intl.NumberFormat(zh() ? "zh-CN" : "en-US").format(value);
const two = (value) => String(value).padStart(2, "0");
function clock(ms) {
  const date = new Date(ms), time = [date.getHours(), date.getMinutes(), date.getSeconds()].map(two).join(":");
  if (date.toDateString() === new Date().toDateString()) return time;
  return `${two(date.getMonth() + 1)}-${two(date.getDate())} ${time}`;
}
const moment = (iso) => iso.slice(0, 19).replace("T", " ");
function duration(hours) {
  if (hours === null) return "—";
  if (hours >= 48) return t("days", number(Math.floor(hours / 24)));
  const minutes = Math.floor(hours * 60);
  return minutes < 60 ? t("minutes", minutes || "< 1") : t("hoursMinutes", Math.floor(minutes / 60), minutes % 60);
}
function redraw(id, data, draw) {  // only where something changed: a selected text stays selected
  const key = JSON.stringify([zh(), data]);
  if (shown[id] !== key) { shown[id] = key; $(id).replaceChildren(...draw(data)); }
}
function table(heads, rows) {  // of cells, or texts; a head stands and goes with the cells below it
  const lines = rows.map((row) => h("tr", {}, ...row.map((each) => (each.tagName === "TD" ? each : cell("", each)))));
  const has = (kind, place) => lines.length && lines[0].cells[place].classList.contains(kind);
  const side = (place) => ["number", "wide"].filter((kind) => has(kind, place)).join(" ");
  const top = heads.map((head, place) => h("th", { class: side(place), scope: "col" }, TEXT[head] ? t(head) : head));
  return h("table", {}, h("thead", {}, h("tr", {}, ...top)), h("tbody", {}, ...lines));
}
const cell = (kind, ...children) => h("td", { class: kind }, ...children);
const note = (text) => h("p", { class: "note" }, text);
const fail = (text) => h("p", { class: "fail" }, text);
const button = (properties, text) => h("button", { type: "button", ...properties }, text);
const badge = (status) => h("span", { class: "status" }, h("i", { class: "c" + STATUSES.indexOf(status) }), t(status));

async function ask(operation, body, type = "application/json") {
  const data = type === "application/json" ? JSON.stringify(body) : body;
  const headers = { "Content-Type": type, "Certtool-Key": linkKey || stored("key") || "" };
  const options = { method: "POST", headers, body: data };
  if (operation === "line") options.signal = AbortSignal.timeout(PATIENCE);
  const response = await fetch("/certtool/" + operation, options);
  const answer = await response.json();
  if (answer.Status !== "OK") throw Object.assign(new Error(answer.Message), { status: response.status });
  if (linkKey) store("key", linkKey);  // for all tabs, also those of before a restart
  if (linkKey === stored("key")) linkKey = "";
  return answer;
}
const reason = (error) => (error instanceof TypeError ? t("gone") : say(error.message));

// ---- Line -----------------------------------------------------------------------------------------------------------
async function poll() {
  try {
    snapshot = await ask("line", {});
    goneSince = 0;
    locked = false;
  } catch (error) {
    if (error.status === 403) {
      locked = true;
      leave();
    } else goneSince = goneSince || Date.now();
  }
  drawLine();
  setTimeout(poll, document.hidden ? 5000 : 1000);
}
function drawLine() {
  const banners = locked ? [["closed"]] : goneSince ? [["goneSince", clock(goneSince)]] : [];
  const now = snapshot;
  if (now && !banners.length) {
    if (now.problem) banners.push(["", now.problem]);
    const low = now.products.filter((product) => product.low), few = low.filter((product) => product.left);
    const none = low.filter((product) => !product.left);  // a banner for all: products end, and stay in the store
    if (none.length) banners.push(["noneLeft", none.map((product) => product.key).join(", ")]);
    if (few.length) banners.push(["lowStock", few.map(({ key, left }) => t("lowOf", key, number(left))).join(", ")]);
  }
  redraw("banners", banners, (list) => list.map(([key, ...values]) =>
    h("p", { class: key === "lowStock" ? "banner warn" : "banner" }, key ? t(key, ...values) : say(values[0]))));
  const word = locked ? "locked" : goneSince ? "gone" : "live";
  $("live").className = word === "live" ? "" : "gone";
  if ($("live").textContent !== t(word)) $("live").textContent = t(word);
  document.querySelector("main").classList.toggle("stale", word !== "live");
  if (!now) return;
  redraw("tiles", now.shift, drawTiles);
  redraw("products", [now.products, now.stocks], drawProducts);
  redraw("chart", now.hours, drawChart);
  redraw("stations", now.stations, drawStations);
  redraw("feed", now.feed, drawFeed);
  drawFilters();
  if (importing) drawProgress(now.importing);
}
function drawTiles(shift) {
  const tile = (key, value) => h("div", { class: "card tile" }, h("p", {}, t(key)), h("div", { class: "big" }, value));
  const tried = shift.written + shift.failed;
  return [tile("shiftBurned", number(shift.written)), tile("rate", number(Math.round(shift.rate))),
    tile("yield", tried ? (Math.floor((1000 * shift.written) / tried) / 10).toFixed(1) + " %" : "—"),
    tile("runsOut", duration(shift.hours_left))];
}
function counts(values) {
  return h("ul", { class: "counts" }, ...STATUSES.map((name, place) =>
    h("li", {}, h("i", { class: "c" + place }), t(name) + " ", h("b", {}, number(values[place])))));
}
function bar(values) {
  const label = STATUSES.map((name, place) => `${t(name)} ${number(values[place])}`).join(", ");
  const parts = [2, 3, 1, 4, 0].filter((place) => values[place]);
  return h("div", { class: "bar", role: "img", "aria-label": label },
    ...parts.map((place) => h("i", { class: "c" + place, grow: values[place] })));
}
function drawProducts([products, stocks]) {
  if (!products.length) return [note(t("noStock"))];
  const urgency = (product) => (product.hours_left === null ? Infinity : product.hours_left);
  const ordered = [...products].sort((a, b) => (urgency(a) < urgency(b) ? -1 : 1));  // what runs out first
  return ordered.map((product) => {
    const own = stocks.filter((stock) => stock.product === product.key);
    const open = own.filter((stock) => stock.counts[0] + stock.counts[1] > 0);
    const list = (open.length ? open : own.slice(-1)).slice(0, 12);
    return h("div", { class: product.low ? "product low" : "product" },
      h("div", { class: "row" }, h("span", { class: "key" }, product.key),
        h("span", { class: "left" }, number(product.left), h("small", {}, " " + t("left")))),
      product.hours_left && h("p", { class: "label" }, t("runsOutIn", duration(product.hours_left))),
      ...list.map((stock) => h("div", { class: "batch" },
        h("div", { class: "mono" }, stock.batch), bar(stock.counts), counts(stock.counts))),
      own.length > list.length &&
        note(t(open.length > list.length ? "others" : "finished", number(own.length - list.length))));
  });
}
function drawChart(hours) {
  const top = Math.max(1, ...hours.map((hour) => hour.written + hour.failed)), width = 600 / hours.length, parts = [];
  const name = ({ start }) => clock(start).slice(-8, -3);  // an hour of UTC: elsewhere it may begin at half past
  hours.forEach((hour, place) => {
    const { written, failed } = hour, x = place * width, good = (130 * written) / top, bad = (130 * failed) / top;
    parts.push(h("rect", { class: "f2", x: x + 5, y: 160 - good, width: width - 10, height: good }),
      h("rect", { class: "f3", x: x + 5, y: 160 - good - bad, width: width - 10, height: bad }),
      h("text", { class: place % 3 === 2 ? "" : "wide", x: x + width / 2, y: 176 }, name(hour)));
    const value = { class: "value", x: x + width / 2, y: 154 - good - bad };
    if (written + failed) parts.push(h("text", value, number(written)));
  });
  const label = hours.map((hour) => `${name(hour)} ${hour.written}`).join(", ");
  return [h("svg", { viewBox: "0 0 600 184", role: "img", "aria-label": `${t("hours")}: ${label}` }, ...parts,
    h("line", { class: "base", x1: 0, x2: 600, y1: 160.5, y2: 160.5 })),
    h("ul", { class: "counts" }, ...[2, 3].map((place) =>
      h("li", {}, h("i", { class: "c" + place }), t(STATUSES[place]))))];
}
function drawStations(stations) {
  if (!stations.length) return [note(t("noStations"))];
  return [table(["station", "last", "Allocated", "Written", "Failed", "refusals"],
    stations.map(([name, seen, taken, ...values]) => [cell("mono", name), cell("time", clock(seen)),
      cell("number wide", number(taken)), ...values.map((value) => cell("number", number(value)))]))];
}
function result(text) {
  if (text.startsWith("refused: ")) return t("refused", say(text.slice(9)));
  return Object.hasOwn(TEXT, text) ? t(text) : say(text);
}
function drawFeed(feed) {
  if (!feed.length) return [note(t("noEvents"))];
  const rows = feed.map(([time, station, outcome, device, name]) => {
    const kind = outcome === "Failed" || outcome.startsWith("refused") ? "fail" : outcome === "Written" ? "done" : "";
    const what = [name, device].filter((part) => part && part !== "-").join(" · ");
    return [cell("time", clock(time)), cell(kind, result(outcome)), cell("mono", what), cell("mono wide", station)];
  });
  return [table(["time", "event", "details", "station"], rows)];
}

// ---- Add Device -----------------------------------------------------------------------------------------------------
let file = null, named = "", importing = false, choices = 0, checked = 0, checking = Promise.resolve();
let said = () => plain(note(t("noPreview")));
const plain = (...parts) => [h("h2", {}, t("result")), ...parts];
const reportFailure = (error) => report(() => plain(fail(reason(error))));

function report(draw) {  // which is kept, to say it again in the other language
  said = draw;
  $("report").replaceChildren(...draw());
}
async function choose(chosen) {
  if (!chosen) return;
  const { batch } = $("form").elements, name = chosen.name.replace(/\.[^.]*$/, ""), turn = ++choices;
  const bytes = await chosen.arrayBuffer().catch(() => null);
  if (turn !== choices) return;  // another was chosen, and is read already
  file = bytes && { name: chosen.name, bytes: new Uint8Array(bytes) };
  drawChosen();
  if (!file) {
    ++checked;
    report(() => plain(fail(t("changed"))));
    return;
  }
  if (!batch.value || batch.value === named) batch.value = name;  // what was typed stays
  named = name;
  check();
}
function drawChosen() { $("chosen").textContent = file ? file.name : t("choose"); }
function send(dryRun, skipBad) {
  const options = { dry_run: dryRun, skip_bad: skipBad }, fields = $("form").elements;
  for (const { name, value } of fields) if (name) options[name] = value.trim();
  const head = JSON.stringify({ options, files: [[file.name, file.bytes.length]] }) + "\n";
  return ask("import", new Blob([head, file.bytes]), "application/octet-stream");
}
function check() {
  if (importing) return;
  if (!file) { report(() => plain(fail(t("chooseFirst")))); return; }
  const turn = ++checked;
  report(() => plain(note(t("checking"))));
  checking = checking.then(() => preview(turn));  // the server refuses a second one meanwhile
}
async function preview(turn) {
  if (turn !== checked) return;
  try {
    const answer = await send(true, false);
    if (turn === checked) report(() => describe(answer.Report, ""));
  } catch (error) {
    if (turn === checked) reportFailure(error);
  }
}
async function add(skipBad) {
  const added = file, lines = added.bytes.reduce((sum, byte) => sum + (byte === 10), 0);
  importing = true;
  report(() => plain(h("p", { id: "progressText" }, t("importing", 0)),
    h("progress", { id: "progress", max: Math.max(1, lines), value: 0, "aria-label": t("result") })));
  try {
    const answer = await send(false, skipBad);
    report(() => describe(answer.Report, added.name));
    if (answer.Report.ok && file === added) {  // else another was chosen meanwhile
      file = null;
      $("form").reset();
      drawChosen();
    }
  } catch (error) {
    reportFailure(error);
  }
  importing = false;
}
function drawProgress(rows) {
  if (rows === null || !$("progress")) return;
  $("progress").value = rows;
  $("progressText").textContent = t("importing", number(rows));
}
function describe(answer, added) {  // what is in a file, or what became of the one that was added
  const preview = !added;
  const big = (key, value, kind = "") =>
    h("div", {}, h("p", { class: "label" }, t(key)), h("div", { class: "big " + kind }, number(value)));
  const good = answer.read - answer.duplicates - answer.rejected, done = answer.ok && !preview;
  const parts = [h("h2", { class: done ? "done" : "" }, t(preview ? "preview" : done ? "done" : "result")),
    h("div", { class: "grid facts4" }, big("read", answer.read),
      preview ? big("would", good) : big("imported", answer.imported), big("duplicates", answer.duplicates),
      big("rejected", answer.rejected, answer.rejected ? "fail" : ""))];
  if (!preview && answer.batches.length) parts.push(note(`${t("batch")}: ${answer.batches.join(", ")}`));
  if (!preview) parts.push(note(`${t("file")}: ${added}`));
  if (answer.ignored.length) parts.push(note(t("ignored", answer.ignored.join(", "))));
  if (answer.errors.length) {
    const rows = h("tbody", {});
    let place = 0;
    const grow = () => {
      for (const error of answer.errors.slice(place, place + MORE))
        rows.append(h("tr", {}, cell("mono", String(error.line)), cell("", say(error.message))));
      place += MORE;
      more.textContent = t("more", number(answer.errors.length - place));
      more.hidden = place >= answer.errors.length;
    };
    const more = button({ onclick: grow }, "");
    grow();
    const remedy = done ? "notAdded" : answer.errors.length > answer.rejected ? "unusable" : "mend";
    parts.push(fail(t(remedy)), h("table", { id: "bad" }, h("thead", {}, h("tr", {},
      h("th", { scope: "col" }, t("row")), h("th", { scope: "col" }, t("problem")))), rows), more);
  } else if (preview && !good) parts.push(h("p", {}, t("nothingNew")));
  if (preview && good && answer.errors.length === answer.rejected) {
    const bad = answer.rejected > 0, label = t(bad ? "importGood" : "importAll", number(good));
    parts.push(h("div", { class: "actions" },
      button({ class: bad ? "" : "main", id: "import", onclick: () => add(bad) }, label)));
  }
  return parts;
}

// ---- Device Query ---------------------------------------------------------------------------------------------------
let starts = [0], listed = null, current = null, secretsOf = null;
let listing = 0, opening = 0;  // the last question: what answers an earlier one comes too late
let passed = "";  // the filters of the list that is shown
let searched = "";  // what the next scan is to replace

const chosen = (id) => $(id + "Filter").value;
const filters = () => ({ product_key: chosen("product"), batch: chosen("batch"), status: chosen("status") });
const keys = (row) => ({ product_key: row.ProductKey, device_name: row.DeviceName });
function drawFilters() {
  if (!snapshot) return;
  const unique = (name) => [...new Set(snapshot.stocks.map((stock) => stock[name]))];
  const choices = { productFilter: unique("product"), batchFilter: unique("batch"), statusFilter: STATUSES };
  for (const [id, values] of Object.entries(choices)) {
    const option = (value, text) => h("option", { value, selected: value === $(id).value }, text);
    redraw(id, values, () => [option("", t("all")),
      ...values.map((value) => option(value, id === "statusFilter" ? t(value) : value))]);
  }
}
async function list(wanted = starts) {
  const turn = ++listing, asked = String(new URLSearchParams(filters()));
  if (asked !== passed) wanted = [0];  // those are pages of other rows
  $("missed").hidden = true;
  $("download").href = "/certtool/export?" + asked;
  try {
    const answer = await ask("query", { ...filters(), start: wanted[wanted.length - 1] });
    if (turn !== listing) return;
    [listed, starts, passed] = [answer, wanted, asked];
  } catch (error) {
    if (turn === listing) miss(reason(error));
    return;
  }
  drawRows();
}
function drawRows() {
  if (!listed) return;
  const { rows, total, next } = listed, wide = (text) => cell("mono wide", text);
  const link = (row) => button({ class: "link", onclick: () => open(row, true) }, row.DeviceName);
  const line = (row) => [cell("mono", link(row)), wide(row.ProductKey), wide(row.Batch), badge(row.Status),
    cell("mono", row.DeviceID), wide(row.Station), wide(moment(row.AllocatedAt)), wide(moment(row.WrittenAt))];
  const heads = ["DeviceName", "ProductKey", "batch", "status", "DeviceID", "station", "Allocated", "Written"];
  $("rows").replaceChildren(rows.length ? table(heads, rows.map(line)) : note(t("noRows")));
  const from = (starts.length - 1) * listed.size;
  $("place").textContent = rows.length ? t("place", number(from + 1), number(from + rows.length), number(total)) : "";
  $("first").disabled = $("previous").disabled = starts.length < 2;
  $("next").disabled = next === null;
}
function miss(sentence) {
  $("missed").textContent = sentence;
  $("missed").hidden = false;
}
function scanNext() {
  $("text").focus();
  $("text").select();
}
async function find() {
  const text = $("text").value.trim();
  $("text").select();
  searched = $("text").value;
  if (!text) { ++opening; list([0]); return; }
  close();
  const turn = opening, before = listing;
  $("missed").hidden = true;
  try {
    const { rows } = await ask("query", { text });
    if (turn !== opening) return;
    if (!rows.length) miss(t("nothing", text));
    else if (rows.length === 1) await open(rows[0], false);
    else if (before === listing) {
      ++listing;
      listed = { rows, total: rows.length, next: null, size: rows.length };
      starts = [0];
      drawRows();
    }
  } catch (error) { if (turn === opening) miss(reason(error)); }
}
async function open(row, focus) {
  const turn = ++opening;
  try {
    const answer = await ask("certificate", keys(row));
    if (turn !== opening) return;
    [current, secretsOf] = [answer, null];
  } catch (error) {
    if (turn === opening) miss(reason(error));
    return;
  }
  drawDetails();
  if (focus) { $("details").scrollIntoView({ block: "nearest" }); focusOn("closeDetails"); }
}
function close() {
  ++opening;
  current = secretsOf = null;
  drawDetails();
}
function leave() {  // the view, or a page that locks: no secret stays for whoever passes by, and none comes late
  ++opening;
  $("dialog").close();
  if (!secretsOf) return;
  secretsOf = null;
  drawDetails();
}
async function reveal() {
  if (secretsOf) secretsOf = null;
  else {
    const turn = ++opening, wanted = keys(current.row);
    try {
      const { Secrets } = await ask("reveal", wanted), answer = await ask("certificate", wanted);
      if (turn !== opening) return;
      [current, secretsOf] = [answer, Secrets];
    } catch (error) {
      if (turn === opening) miss(reason(error));
      return;
    }
  }
  drawDetails();
  focusOn("reveal");
}
function focusOn(id) {  // unless something is scanned by now: it would go on there, and Enter press it
  if (document.activeElement !== $("text")) $(id).focus();
}
function drawDetails() {
  $("details").hidden = !current;
  if (!current) { $("details").replaceChildren(); return; }
  const { row, history, left_out: more } = current;
  const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value || "—"));
  const secret = (name) => fact(name, secretsOf ? secretsOf[name] : "••••••••");
  const act = (verb, kind = "") => button({ class: kind, id: verb, onclick: () => confirm(verb) }, t(verb));
  const releasable = ["Allocated", "Written", "Failed"].includes(row.Status);
  $("details").replaceChildren(
    h("div", { class: "row" }, h("span", { class: "key" }, row.DeviceName), badge(row.Status)),
    h("dl", {}, fact("ProductKey", row.ProductKey), fact("ProductID", row.ProductID), fact(t("batch"), row.Batch),
      fact("CRC32", row.CRC32), fact("DeviceID", row.DeviceID), fact(t("station"), row.Station),
      fact(t("Allocated"), moment(row.AllocatedAt)), fact(t("Written"), moment(row.WrittenAt)),
      secret("ProductSecret"), secret("DeviceSecret")),
    h("div", { class: "actions" }, button({ id: "reveal", onclick: reveal }, t(secretsOf ? "hide" : "show")),
      releasable && act("release"), row.Status !== "Void" && act("void", "danger"),
      button({ id: "closeDetails", onclick: () => { close(); scanNext(); } }, t("close"))),
    h("h2", { class: "space" }, t("history")), ...(more ? [note(t("leftOut", number(more)))] : []),
    table(["time", "event", "who", "DeviceID", "station"], history.map((event) =>
      [moment(event.time), cell("word", t(event.kind)), [event.who, event.reason].filter(Boolean).join(": ") || "—",
        cell("mono", event.device_id || "—"), cell("mono wide", event.station || "—")])));
}
function confirm(verb) {
  const { row } = current;
  ++opening;  // no late answer takes its place under the dialog
  $("dialog").dataset.verb = verb;
  $("dialogTitle").textContent = t(verb + "Title", row.DeviceName, row.ProductKey);
  $("dialogText").textContent = t(verb + "Text");
  $("confirm").textContent = t(verb);
  $("reason").value = "";
  $("force").checked = false;
  $("dialogFail").textContent = "";
  offerForce();
  $("dialog").showModal();
  $("reason").focus();
}
function offerForce() {
  $("forceLine").hidden = $("dialog").dataset.verb !== "release" || current.row.Status !== "Written";
}
async function operate() {
  const { row } = current, turn = opening;
  const fields = { ...keys(row), reason: $("reason").value, force: $("force").checked };
  $("confirm").disabled = true;  // twice might release what another device has got meanwhile
  try {
    await ask($("dialog").dataset.verb, fields);
  } catch (error) {
    if (turn !== opening || !$("dialog").open) { miss(`${row.DeviceName}: ${reason(error)}`); return; }
    $("dialogFail").textContent = reason(error);
    await open(row, false);  // its device may have reported meanwhile
    if ($("dialog").open) offerForce();
    return;
  } finally { $("confirm").disabled = false; }
  if (turn === opening) {  // else the dialog was closed, and something else is looked at
    const there = $("dialog").open;
    $("dialog").close();
    open(row, there);
  }
  list();
}

// ---- All views ------------------------------------------------------------------------------------------------------
function view() {
  const wanted = ["line", "add", "query"].includes(location.hash.slice(1)) ? location.hash.slice(1) : "line";
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.dataset.view !== wanted;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === "#" + wanted) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${t(wanted)} – certtool`;
  window.scrollTo(0, 0);
  if (wanted === "query") { scanNext(); list(); }
  else leave();
}
function speak(language) {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-text], [data-label], [data-hint]")) {
    const { text, label, hint } = element.dataset;
    if (text) element.textContent = t(text);
    if (label) element.setAttribute("aria-label", t(label));
    if (hint) element.placeholder = t(hint);
  }
  $("language").lang = zh() ? "en" : "zh";
  shown = {};
  drawChosen();
  report(said);
  drawLine();
  drawRows();
  drawDetails();
}
function theme(name) { document.documentElement.dataset.theme = name; }
function turnTheme() {
  theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  store("theme", document.documentElement.dataset.theme);
}
function over(event) {
  event.preventDefault();
  $("drop").classList.toggle("over", event.type === "dragover");
  if (event.type === "drop") choose(event.dataTransfer.files[0]);
}

AbortSignal.timeout(0);  // what came to browsers last: without it, as without scripts, that sentence is all
$("old").remove();
// A field for a password is one that browsers make up, or offer to keep; only Firefox before 111 needs it for the dots.
if (!CSS.supports("-webkit-text-security", "disc")) $("form").elements.product_secret.type = "password";
if (location.hash.startsWith("#key=")) {  // kept once an answer proves it: any web page may lead here with another
  linkKey = location.hash.slice(5);
  history.replaceState(null, "", "/");
}
theme(stored("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
speak(stored("language") || ((navigator.language || "").startsWith("zh") ? "zh" : "en"));
$("theme").onclick = turnTheme;
$("language").onclick = () => { speak(zh() ? "en" : "zh"); store("language", document.documentElement.lang); view(); };
$("file").onchange = () => choose($("file").files[0]);
$("file").onclick = () => { $("file").value = ""; };
$("form").onsubmit = (event) => { event.preventDefault(); check(); };
$("form").onchange = (event) => { if (file && event.target.name.startsWith("product")) check(); };
$("drop").ondragover = $("drop").ondragleave = $("drop").ondrop = over;
$("text").onmousedown = (event) => {  // or what is scanned next goes into what was; a second click places the caret
  if (document.activeElement === $("text") && $("text").value !== searched) return;
  event.preventDefault();
  searched = null;
  scanNext();
};
$("search").onsubmit = (event) => { event.preventDefault(); find(); };
for (const id of ["productFilter", "batchFilter", "statusFilter"]) $(id).onchange = () => list([0]);
$("first").onclick = () => list([0]);
$("previous").onclick = () => list(starts.slice(0, -1));
$("next").onclick = () => list([...starts, listed.next]);
$("dialogForm").onsubmit = (event) => {
  event.preventDefault();
  $("reason").value = $("reason").value.trim();
  if ($("dialogForm").reportValidity()) operate();
};
$("cancel").onclick = () => $("dialog").close();
window.onhashchange = view;
document.querySelector("nav").onclick = ({ target }) => { if (target.hash === location.hash) view(); };
view();
poll();
"""  # noqa: RUF001 - Chinese

PAGE_TYPE = "text/html; charset=utf-8"
PAGE_ROWS = 50  # certificates listed at a time
FEED_LENGTH = 40  # events shown
SNAPSHOT_SECONDS = 1.0  # for which all pages get the same figures
CSV_LINES = 100  # sent in one piece of a download

HOUR, MINUTE = 3_600_000, 60_000  # milliseconds
SHIFT_HOURS = 12  # looked back on
STATIONS_SHOWN = 60  # the latest
MAX_SEEN = 1000  # stations remembered, the latest: one client may come from very many addresses
RATE_MINUTES = 15  # that the present rate is measured over
MAX_SUMS = 500  # (product, station) pairs counted one by one in an hour
RECOVERED_BYTES = 32 * 1024 * 1024  # of the journal, at most, that tell of the time before a start
COUNTED_TOGETHER = 500  # events; fewer at once cost more each
COUNTED = {"allocated": 0, "Written": 1, "Failed": 2}  # results, and their place in a sum; refusals are the fourth
RECOVERY_SLICE = 50  # events of the journal looked at in one step
FIRST_SHOWN, LATEST_SHOWN = 50, 250  # events of one certificate: a device may ask for it, or report, without end
RECOVERED = {"allocate": "request", "rerequest": "request", "written": "burned", "failed": "failed"}  # kind, action

CLOSED = "This page is locked: open it with the link that certtool.py serve printed when it started."
PAGE_HEADERS = (
    "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
    "Cross-Origin-Resource-Policy: same-origin\r\nCross-Origin-Opener-Policy: same-origin\r\n"
)

Sums = Dict[int, Dict[Tuple[str, str], List[int]]]  # by hour or minute since 1970, then by product and station


def _csp_hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


_ALIKE = operator.attrgetter("time", "station", "action", "result", "product_key")  # events that count as one


class Activity:
    """What happened in the last hours: sums of allocated, Written, Failed and refused, and the latest events.

    It is fed with what is durable only.
    """

    def __init__(self) -> None:
        self.hours: Sums = {}
        self.minutes: Sums = {}
        self.seen: Dict[str, int] = {}  # when each station was last heard of
        self.events: Deque[RequestEvent] = deque(maxlen=FEED_LENGTH)
        self._uncounted: List[RequestEvent] = []

    def add(self, events: Sequence[RequestEvent]) -> None:
        """Take events, the latest last; some are counted only when many have come together."""
        self.events.extend(events)
        self._uncounted += events
        if len(self._uncounted) >= COUNTED_TOGETHER:
            self.count()

    def count(self) -> None:
        """Bring the sums up to date."""
        events, self._uncounted = self._uncounted, []
        for (moment, station, action, result, product_key), number in Counter(map(_ALIKE, events)).items():
            if not station or action in OPERATIONS:  # a sentence, or what a person did
                continue
            self.seen.pop(station, None)
            self.seen[station] = moment  # the latest last
            column = 3 if result.startswith("refused") else COUNTED.get(result)
            if column is not None:
                key = "" if column == 3 else product_key, station  # a client may make up as many products as it likes
                self._add_up(self.hours, moment // HOUR, SHIFT_HOURS, key, column, number)
                self._add_up(self.minutes, moment // MINUTE, RATE_MINUTES, key, column, number)
        for station in list(itertools.islice(self.seen, max(0, len(self.seen) - MAX_SEEN))):
            del self.seen[station]

    def _add_up(self, sums: Sums, period: int, kept: int, key: Tuple[str, str], column: int, number: int) -> None:
        if period not in sums:
            sums[period] = {}
            for old in [old for old in sums if old <= period - kept]:
                del sums[old]
            if sums is self.hours:
                stations = {station for counts in sums.values() for _, station in counts}
                self.seen = {
                    station: at for station, at in self.seen.items() if station in stations or at // HOUR == period
                }
        counts = sums[period]
        if key not in counts and len(counts) >= MAX_SUMS:
            key = "", "..."
        counts.setdefault(key, [0, 0, 0, 0])[column] += number

    def recover(self, store: Store, now: int) -> Generator[None, None, None]:
        """Take over what the journal tells of the time before the server started."""
        before = Activity()
        latest: List[RequestEvent] = []
        events = store.look_back([f",{kind},".encode() for kind in RECOVERED], RECOVERED_BYTES)
        for count, event in enumerate(events):
            if event and event.kind in RECOVERED and now - SHIFT_HOURS * HOUR < event.time <= now:
                result = RESULTS[event.kind]
                request = (event.time, event.station, RECOVERED[event.kind], event.device_id, event.device_name, result)
                latest.append(RequestEvent(*request, event.product_key))
            if event is None or count % RECOVERY_SLICE == 0:
                before.add(latest)
                latest.clear()
                yield
        before.count()
        for ours, theirs in ((self.hours, before.hours), (self.minutes, before.minutes)):
            for period, counts in theirs.items():
                for key, values in counts.items():
                    sums = ours.setdefault(period, {}).setdefault(key, [0, 0, 0, 0])
                    sums[:] = [a + b for a, b in zip(sums, values)]
        self.seen = {**before.seen, **self.seen}
        self.events = deque([*before.events, *self.events], FEED_LENGTH)

    def snapshot(self, products: Iterable[Product], now: int) -> Dict[str, Any]:
        """Return what the page shows of it, with the rates that the last minutes give."""
        self.count()
        first_hour = now // HOUR - SHIFT_HOURS + 1
        by_hour = {hour: [0, 0, 0, 0] for hour in range(first_hour, first_hour + SHIFT_HOURS)}
        seen = {station: at for station, at in self.seen.items() if at // HOUR >= first_hour}
        by_station: Dict[str, List[int]] = {station: [0, 0, 0, 0] for station in seen}
        for hour, in_hour in by_hour.items():
            for (_, station), counts in self.hours.get(hour, {}).items():
                for total in (in_hour, by_station.setdefault(station, [0, 0, 0, 0])):
                    total[:] = map(operator.add, total, counts)
        recent = [minute for minute in self.minutes if now // MINUTE - RATE_MINUTES < minute <= now // MINUTE]
        span = max(now - min(recent, default=0) * MINUTE, MINUTE) / HOUR
        taken: Dict[str, int] = {}
        written = 0
        for minute in recent:
            for (key, _), counts in self.minutes[minute].items():
                taken[key] = taken.get(key, 0) + counts[0]
                written += counts[1]
        rows = [
            {
                "key": product.key,
                "counts": product.counts,
                "left": product.free,
                "low": product.free < product.low,
                "hours_left": product.free * span / taken[product.key] if taken.get(product.key) else None,
            }
            for product in products
        ]
        latest = sorted(seen.items(), key=lambda item: -item[1])
        return {
            "products": rows,
            "shift": {
                "written": sum(counts[1] for counts in by_hour.values()),
                "failed": sum(counts[2] for counts in by_hour.values()),
                "rate": written / span,
                "hours_left": min((row["hours_left"] for row in rows if row["hours_left"]), default=None),
            },
            "hours": [{"start": hour * HOUR, "written": c[1], "failed": c[2]} for hour, c in by_hour.items()],
            "stations": [[station, at, *by_station[station]] for station, at in latest[:STATIONS_SHOWN]],
            "feed": [[e.time, e.station, _told(e), e.device_id, e.device_name] for e in reversed(self.events)],
        }


def _told(event: RequestEvent) -> str:
    """Say what came of it: of what a person did the whole reason, which has no code that another could look up."""
    return f"refused: {event.why}" if event.why and event.action in OPERATIONS else event.result


class Page(Site):
    """The management page of a server whose store is open. `who` stands in the journal for what is done on it."""

    def __init__(self, server: CertServer, who: str) -> None:
        self.server = server
        self.who = who
        self.activity = Activity()
        self._token, self._session, self._key = (secrets.token_urlsafe(32) for _ in range(3))
        self._cookie = f"certtool-{server.server_port}"  # a browser does not tell ports apart
        self._snapshot, self._snapshot_at = b"", 0.0
        self._html = (
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>certtool</title>'
            f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
            f"<style>{PAGE_STYLE}</style></head><body>{PAGE_BODY}<script>{PAGE_SCRIPT}</script></body></html>"
        ).encode()
        self._policy = (
            f"Content-Security-Policy: default-src 'none'; script-src {_csp_hash(PAGE_SCRIPT)}; "
            f"style-src {_csp_hash(PAGE_STYLE)}; connect-src 'self'; img-src data:; base-uri 'none'; "
            f"form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'\r\n{PAGE_HEADERS}"
        )
        server.start_job("recover", self.activity.recover(server.service.store, _now()), None)

    def link(self) -> str:
        """The address that opens the page: it holds the token, so it is for the operator alone."""
        host = self.server.own_address
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.server.server_port}/?token={self._token}"

    def events(self, events: Sequence[RequestEvent]) -> None:
        """See requests whose records are durable."""
        self.activity.add(events)

    def notice(self, sentence: str) -> None:
        """See a sentence for the operator."""
        self.activity.add([RequestEvent(_now(), "", "-", "", "", sentence)])

    # -- who may ask ---------------------------------------------------------------------------------------------------

    def check(self, head: Head) -> None:
        """Raise Forbidden unless the request has our cookie, and our key but for a GET, and comes from our page."""
        session = ""
        for part in head.headers.get("cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            session = value if name == self._cookie else session
        key = self._key if head.method == "GET" else head.headers.get("certtool-key", "")
        for given, right in ((session, self._session), (key, self._key)):
            if not hmac.compare_digest(given.encode(), right.encode()):
                raise Forbidden(CLOSED)
        if head.method == "GET":
            ours = head.headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        else:
            ours = head.headers.get("origin", "").lower() == f"http://{head.headers['host']}".lower()
        if not ours:
            raise Forbidden("Only the management page may ask this.")
        wanted = "application/octet-stream" if head.path == MANAGEMENT + "import" else "application/json"
        if head.method == "POST" and head.headers.get("content-type", "").lower() != wanted:
            raise BadRequest(f"The content type must be {wanted}.")

    def get(self, handler: CertRequestHandler) -> None:
        """Show the page, exchange the link's token for the cookie and the key, or send the CSV."""
        self.server.check_local(handler, handler.request_head)
        path, _, text = handler.path.partition("?")
        query = dict(urllib.parse.parse_qsl(text))
        if path == "/" and "token" in query:
            right = hmac.compare_digest(query["token"].encode("utf-8", "replace"), self._token.encode())
            cookie = f"Set-Cookie: {self._cookie}={self._session}; Path=/; HttpOnly; SameSite=Strict\r\n"
            more = f"Location: /#key={self._key}\r\n{cookie}" if right else "Location: /\r\n"
            handler.reply(303, b"", more=more + PAGE_HEADERS)
        elif path == "/":
            handler.reply(200, self._html, content_type=PAGE_TYPE, more=self._policy)
        elif path == MANAGEMENT + "export":
            self.server.check_manager(handler, handler.request_head)
            self.server.start_job("export", self._export(handler, query), handler)
        else:
            raise BadRequest("There is no such page.", 404)

    def post(self, handler: CertRequestHandler, operation: str) -> None:
        """Answer what the page asks for."""
        if operation == "line":
            handler.reply(200, self._line(), more=PAGE_HEADERS)
            return
        fields = parse_object(handler.body)
        name, key = str(fields.get("device_name", "")), str(fields.get("product_key", ""))
        if operation == "query":
            self.server.start_job("query", self._query(handler, fields), handler)
        elif operation == "certificate":
            self.server.start_job("certificate", self._certificate(handler, name, key), handler)
        elif operation == "reveal":
            found = self.server.service.reveal(name, key, self.who, _now())
            answer = json.dumps({"Status": "OK", "Secrets": found}).encode()
            handler.reply(200, answer, recorded=True, more=PAGE_HEADERS)
        else:
            super().post(handler, operation)

    # -- what it asks for ----------------------------------------------------------------------------------------------

    def _line(self) -> bytes:
        server, state = self.server, self.server.service.state
        if server.now >= self._snapshot_at + SNAPSHOT_SECONDS or not self._snapshot:
            self._snapshot_at = server.now
            importing = server.service.importing
            snapshot = {
                "Status": "OK",
                **self.activity.snapshot(state.products.values(), _now()),
                "stocks": [{"product": s.product_key, "batch": s.batch, "counts": s.counts} for s in state.stocks],
                "importing": importing.read if importing else None,
                "problem": server.failing,
            }
            self._snapshot = json.dumps(snapshot).encode()
        return self._snapshot

    def _filters(self, fields: Mapping[str, Any]) -> Tuple[Optional[str], Optional[str], Optional[int]]:
        status = fields.get("status")
        number = STATUS_NAMES.index(status) if status in STATUS_NAMES else None
        return fields.get("product_key") or None, fields.get("batch") or None, number

    def _row(self, number: int) -> Dict[str, str]:
        return dict(zip(QUERY_COLUMNS, self.server.service.row(number)))

    def _query(self, handler: CertRequestHandler, fields: Mapping[str, Any]) -> Generator[None, None, None]:
        """List what has a DeviceName or DeviceID, or what passes the filters, from the number `start` on."""
        state, text = self.server.service.state, str(fields.get("text", ""))
        numbers: List[int] = []
        following = None
        if text:
            held = [product.devices.get(text) for product in state.products.values()]
            named = [number for _, number in state.find(text)]
            numbers = sorted({number for number in [*held, *named] if number is not None})
            total = len(numbers)
            numbers = numbers[:PAGE_ROWS]
        else:
            key, batch, status = self._filters(fields)
            total = sum(
                sum(stock.counts) if status is None else stock.counts[status]
                for stock in state.stocks
                if key in (None, stock.product_key) and batch in (None, stock.batch)
            )
            start = fields.get("start")
            for number in state.select(key, batch, status, start if type(start) is int and start > 0 else 0):
                if number is None:
                    yield
                elif len(numbers) < PAGE_ROWS:
                    numbers.append(number)
                else:
                    following = number
                    break
        answer = {"rows": [self._row(n) for n in numbers], "total": total, "next": following, "size": PAGE_ROWS}
        handler.reply(200, json.dumps({"Status": "OK", **answer}).encode(), more=PAGE_HEADERS)

    def _certificate(self, handler: CertRequestHandler, name: str, key: str) -> Generator[None, None, None]:
        """Tell all about one certificate, with its history from the journal."""
        service = self.server.service
        _, number = service.find(name, key)
        history: List[Dict[str, str]] = []
        latest: Deque[Dict[str, str]] = deque()
        left_out = rows = 0  # events; certificates of the imports so far
        events = service.store.look_back([b",import,", f",{encode_cell(name)},".encode()])
        for count, event in enumerate(events):
            if event is None or count % RECOVERY_SLICE == 0:
                yield
            if event is None:
                continue
            ours = event.device_name == name and event.product_key == key
            if event.kind == "import":
                ours = rows <= number < rows + event.detail["rows"]
                rows += event.detail["rows"]
            if ours:
                who, why = event.detail.get("who", ""), event.detail.get("reason", "")
                facts = {"time": format_time(event.time), "kind": event.kind, "station": event.station}
                latest.append({**facts, "device_id": event.device_id, "who": who, "reason": why})
            if len(latest) > LATEST_SHOWN:
                oldest = latest.popleft()
                if oldest["who"] or len(history) < FIRST_SHOWN:  # what a person did is always shown
                    history.append(oldest)
                else:
                    left_out += 1
        told = {"row": self._row(number), "history": [*history, *latest], "left_out": left_out}
        answer = yield from format_json({"Status": "OK", **told})
        handler.reply(200, answer, more=PAGE_HEADERS)

    def _export(self, handler: CertRequestHandler, query: Mapping[str, str]) -> Generator[None, None, None]:
        """Send what passes the filters as CSV, without secrets, in pieces whose number nobody knows before."""
        service = self.server.service
        name = f"certtool-{format_time(_now())[:16].replace(':', '')}.csv"
        head = (
            f"HTTP/1.1 200 OK\r\nContent-Type: text/csv; charset=utf-8\r\nTransfer-Encoding: chunked\r\n"
            f'Content-Disposition: attachment; filename="{name}"\r\n{PAGE_HEADERS}\r\n'
        ).encode()
        lines = ["\ufeff" + ",".join(QUERY_COLUMNS)]  # the mark tells spreadsheets that it is UTF-8
        for number in itertools.chain(service.state.select(*self._filters(query)), [None]):
            if number is not None:
                lines.append(format_row(service.row(number)[: len(QUERY_COLUMNS)]))
            if lines and (number is None or len(lines) >= CSV_LINES):
                data = "".join(line + "\r\n" for line in lines).encode()
                handler.stream(b"%s%x\r\n%s\r\n" % (head, len(data), data))
                head, lines = b"", []
                yield
            elif number is None:
                yield
        handler.stream(b"0\r\n\r\n", last=True)


# ======================================================================================================================
# 13. Console
# ======================================================================================================================
# A click into a Windows console stops every write to it until Enter. So one thread prints from bounded queues, and no
# request ever waits for it. A line an event; when the production line is faster than an eye, a line a second instead.


class Console:
    """What the operator sees of the running server. `events` and `notify` return at once, whatever the screen does."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._events: Deque[RequestEvent] = deque(maxlen=CONSOLE_BACKLOG)
        self._notices: Deque[str] = deque(maxlen=CONSOLE_BACKLOG)  # of their own: a flood of events loses none of them
        self._put = self._taken = self._lost = 0
        self._results: Dict[str, int] = {}  # of the second that is being summed up
        self._window = 0.0
        self._in_window = 0
        self._fast = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)
        self._thread.start()

    def events(self, events: Sequence[RequestEvent]) -> None:
        """Show requests."""
        self._events.extend(events)
        self._put += len(events)

    def notify(self, sentence: str) -> None:
        """Show a sentence that matters."""
        self._notices.append(sentence)

    def close(self) -> bool:
        """Print what is left; False where the screen does not take it, so that the process must not wait for it."""
        self._stop.set()
        self._thread.join(STOP_SECONDS)
        return not self._thread.is_alive()

    def _run(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more: the server goes on in silence
            while not self._stop.wait(TICK_SECONDS):
                self._print_all(time.monotonic())
            self._print_all(time.monotonic() + 1)
            self._sum_up()

    def _print_all(self, now: float) -> None:
        if now >= self._window + 1:
            self._sum_up()
            self._fast = self._in_window > CONSOLE_LINES_A_SECOND
            self._window, self._in_window = now, 0
        lines = []
        while self._notices:
            lines.append(f"{_clock(_now())}  *** {self._notices.popleft()}")
        while self._events:
            event = self._events.popleft()
            self._taken += 1
            self._in_window += 1
            if self._fast or self._in_window > CONSOLE_LINES_A_SECOND:
                self._results[event.result] = self._results.get(event.result, 0) + 1
            else:
                lines.append(_event_line(event))
        if lines:
            self._write(lines)

    def _sum_up(self) -> None:
        lost = self._put - self._taken - len(self._events)
        if lost > self._lost:
            self._results["not shown"] = lost - self._lost
            self._lost = lost
        if self._results:
            counts = ", ".join(f"{count:,} {result}" for result, count in sorted(self._results.items()))
            self._results = {}
            self._write([f"{_clock(_now())}  many at once: {counts}"])

    def _write(self, lines: List[str]) -> None:
        try:
            for line in lines:
                self._stream.write(printable(line) + "\n")
            self._stream.flush()
        except OSError as error:  # on a full disk these lines are lost, and later ones may not be
            if is_reader_gone(error):
                raise


def printable(text: str) -> str:
    """Keep what commands a terminal off it: a batch may be named after a file, whose name may hold anything."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def is_reader_gone(error: OSError) -> bool:
    """Say whether nobody reads our output any more; Windows calls that an invalid argument."""
    windows_says_so = sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None
    return isinstance(error, BrokenPipeError) or windows_says_so


def _clock(moment: int) -> str:
    return format_time(moment)[11:19]


def _event_line(event: RequestEvent) -> str:
    moment, station, action, device_id, device_name, result, product_key, why = event
    if why:
        result += f" ({product_key}): {why}" if product_key else f": {why}"
    return f"{_clock(moment)}  {station:<15} {action:<8} {device_id:<25} {device_name:<20} {result}"


# ======================================================================================================================
# 14. Station
# ======================================================================================================================
# The other side of the wire, as a programmer or a device does it: one connection for each request, a limit on all it
# waits for and on all it takes. A request with a DeviceID is repeated when the network fails, since it gets the same
# certificate again; one without an id is not, once it was sent: each would take another certificate.

STATION_SECONDS = 10.0  # for one attempt, from connecting to the last byte
STATION_ATTEMPTS = 3
STATION_PAUSE = 0.5  # seconds between two attempts
MAX_ANSWER = 64 * 1024  # bytes of head and body; ours are about 400


class NoAnswer(CertToolError):
    """No usable answer came. `sent` tells whether the server may have seen the request."""

    def __init__(self, message: str, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class ServerRefused(CertToolError):
    """The server answered that it does not do this."""


class Station:
    """Asks the server at `host`, `port` for certificates and reports burns. Safe to use from several threads."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.server = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"  # as --server and Host want it

    def request(self, product_key: str, device_id: str) -> Dict[str, Any]:
        """Return the answer's object, its checksum verified. Raises NoAnswer or ServerRefused."""
        answer = self._ask({"ProductKey": product_key, "DeviceID": device_id or None, "Action": REQUEST})
        fields = [answer.get(name, "") for name in COLUMNS[:5]]
        for column, field in zip(COLUMNS, fields):
            if not isinstance(field, str) or check_field(column, field):
                raise NoAnswer(f"{self.server} sent no valid {column}: is that a certtool?", True)
        checksum = crc32("".join(fields).encode("utf-8", "replace"))
        told = answer.get("CRC32")
        if (told.upper().zfill(8) if isinstance(told, str) else told) not in (checksum, f"{checksum:08X}"):
            raise NoAnswer(f"The CRC32 of the certificate from {self.server} is wrong: do not burn it.", True)
        return answer

    def report(self, product_key: str, device_id: str, succeeded: bool) -> None:
        """Report a burn. Raises NoAnswer or ServerRefused."""
        action = BURN_SUCCEEDED if succeeded else BURN_FAILED
        self._ask({"ProductKey": product_key, "DeviceID": device_id, "Action": action})

    def _ask(self, message: Mapping[str, Any]) -> Dict[str, Any]:
        left = STATION_ATTEMPTS
        while True:
            left -= 1
            try:
                status, body = self._exchange(json.dumps(message).encode())
                return self._answer(status, body, message)
            except NoAnswer as error:
                if left <= 0 or (error.sent and not message["DeviceID"]):
                    raise
                time.sleep(STATION_PAUSE)

    def _answer(self, status: int, body: bytes, message: Mapping[str, Any]) -> Dict[str, Any]:
        try:
            answer = parse_object(body)
        except BadRequest:
            raise NoAnswer(f"{self.server} answered {status}, and no JSON object: is that a certtool?", True) from None
        if status == 200 and answer.get("Status") == "OK":
            self._check_addressee(answer, message)
            return answer
        if status == 503:
            raise NoAnswer(f"{self.server} could not record it: {_one_line(answer.get('Message'))}", True)
        said = _one_line(answer.get("Message")) or "without a reason"
        raise ServerRefused(f"{self.server} refused: {status} {_one_line(answer.get('Status'))}: {said}")

    def _check_addressee(self, answer: Mapping[str, Any], message: Mapping[str, Any]) -> None:
        """Refuse an answer for another product or device than asked for."""
        asked, told = message["DeviceID"], answer.get("DeviceID", "")  # the vendor's server may tell none
        wrong = not isinstance(told, str) or not _DEVICE_ID.fullmatch(told) or (asked and told not in ("", asked))
        if wrong or answer.get("ProductKey") != message["ProductKey"]:
            raise NoAnswer(f"{self.server} answered for another product or device: do not burn it.", True)

    def _exchange(self, body: bytes) -> Tuple[int, bytes]:
        """Send one request, return HTTP status and body."""
        deadline = time.monotonic() + STATION_SECONDS
        head = (
            f"POST / HTTP/1.1\r\nHost: {self.server}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        sent = False
        try:
            with socket.create_connection((self.host, self.port), STATION_SECONDS) as connection:
                sent = True
                connection.sendall(head.encode() + body)
                return _read_answer(connection, deadline)
        except socket.timeout:
            why = f"did not answer within {STATION_SECONDS:.0f} s"
        except UnicodeError:  # what cannot be asked of DNS
            why = "is not reachable (no such host)"
        except (ValueError, OverflowError, http.client.HTTPException):
            why = "sent something that is no whole HTTP answer"
        except OSError as error:
            why = f"is not reachable ({error.strerror or 'no such host'})"
        raise NoAnswer(f"{self.server} {why}: check its address and port, the cable and the firewall.", sent)


class _Received:
    """Bytes in the place of a socket, for http.client to parse."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def makefile(self, _mode: str) -> io.BytesIO:
        return self._file


def _read_answer(connection: socket.socket, deadline: float) -> Tuple[int, bytes]:
    """Read until the answer is whole or the server closes. Raises OSError, ValueError or HTTPException."""
    data = b""
    while len(data) <= MAX_ANSWER:
        left = deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout
        connection.settimeout(left)
        chunk = connection.recv(RECEIVE)
        data += chunk
        head, end, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length:[ \t]*(\d{1,9})[ \t]*(\r|$)", head, re.IGNORECASE)
        chunked = b"chunked" in head.lower() and body.endswith(b"0\r\n\r\n")
        whole = chunked or (length and len(body) >= int(length[1]))
        if not chunk or (end and whole):
            response = http.client.HTTPResponse(_Received(data))  # type: ignore[arg-type]
            response.begin()
            return response.status, response.read()
    raise ValueError("more than an answer")


def _one_line(text: object) -> str:
    """Show what a server sent: printable, on one line, not endless."""
    return printable(str(text or "")[:200])


class LineReport:
    """What a played line saw: each answer's latency in seconds, refusals by text, devices by DeviceName."""

    def __init__(self) -> None:
        self.latencies: List[float] = []
        self.failures: Dict[str, int] = {}
        self.devices: Dict[str, List[str]] = {}
        self.seconds = 0.0
        self.interrupted = False

    def as_json(self) -> Dict[str, Any]:
        """Rate in answers a second, latencies in milliseconds, and how many certificates two devices got."""
        ordered = sorted(self.latencies) or [0.0]
        places = {f"p{part}": len(ordered) * part // 100 for part in (50, 90, 99)}
        places["max"] = len(ordered) - 1
        return {
            "answers": len(self.latencies),
            "failures": self.failures,
            "seconds": round(self.seconds, 3),
            "rate": round(len(self.latencies) / max(self.seconds, 1e-9), 1),
            "latency_ms": {name: round(1000 * ordered[place], 2) for name, place in places.items()},
            "certificates": len(self.devices),
            "duplicates": sum(len(devices) > 1 for devices in self.devices.values()),
        }


def play_line(station: Station, product_key: str, prefix: str, count: int, stations: int, report: str) -> LineReport:
    """Let `stations` threads ask for `count` certificates, as devices `prefix`-1 and so on; `report` as in --report.

    Ctrl-C ends it as soon as what was asked for is there. Raises CertToolError where so many threads cannot be had;
    what those few had asked for is given out.
    """
    result = LineReport()
    numbers = iter(range(1, count + 1))
    guard = threading.Lock()
    begun: List[float] = []  # by the threads: Ctrl-C may find one running that is not counted as started
    ends: List[float] = []  # of the threads; Thread.join takes one for ended that Ctrl-C finds running (CPython 3.11)

    def work() -> None:
        begun.append(time.perf_counter())
        while True:
            with guard:
                number = next(numbers, None)
            if number is None:
                ends.append(time.perf_counter())
                return
            device_id = f"{prefix}-{number}"
            began = time.perf_counter()
            try:
                answer = station.request(product_key, device_id)
                took = time.perf_counter() - began
                if report:
                    station.report(product_key, device_id, report == "ok")
            except Exception as error:  # a defect too: who waits for this thread must not wait for ever
                told = str(error) if isinstance(error, CertToolError) else f"Please report: {where_raised(error)}"
                with guard:
                    result.failures[told] = result.failures.get(told, 0) + 1
            else:
                with guard:
                    result.latencies.append(took)
                    result.devices.setdefault(answer["DeviceName"], []).append(device_id)

    def wait() -> None:
        while len(ends) < max(started, len(begun)):
            time.sleep(0.005)

    started = 0
    began = time.perf_counter()
    try:
        for _ in range(min(stations, count)):
            threading.Thread(target=work).start()
            started += 1
        wait()
    except KeyboardInterrupt:
        result.interrupted = True
        numbers = iter(())
        wait()
    except RuntimeError:
        numbers = iter(())
        wait()
        raise CertToolError("This PC has no room for so many stations: name fewer with --stations.") from None
    result.seconds = max(ends, default=began) - began
    return result


# ======================================================================================================================
# 15. Command line
# ======================================================================================================================
# Exit codes: 0 done, 1 refused or failed, 2 usage. Errors are translated here, once: one line on stderr, no traceback.

TABLE_LIMIT = 50  # rows of a table on a terminal, unless --limit says otherwise
MANAGEMENT_SECONDS = 900.0  # for a running server to import what we hand it

AddCommand = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run one command; return the exit code."""
    _prepare_output()
    if sys.version_info < (3, 8):  # noqa: UP036 - it starts there, and fails later
        return _fail(f"This is Python {sys.version_info[0]}.{sys.version_info[1]}: certtool needs 3.8 or newer.", 1)
    if crc32_warning:
        print(f"certtool: {crc32_warning}", file=sys.stderr)
    gc.set_threshold(100_000)  # garbage that only a search finds: a million rows make none, requests only by an error
    code, doubt = 1, ""
    try:
        options = _parser().parse_args(arguments)
        if options.command not in ("query", "verify", "crc") and not getattr(options, "dry_run", False):  # only look
            doubt = " What was under way may have happened: look with certtool.py query."
        code = options.run(options)
        sys.stdout.flush()
        return code
    except CertToolError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail(f"Interrupted.{doubt}", 1)
    except OSError as error:
        if is_reader_gone(error):
            _drop_output()
            return 1
        if code == 0:
            return _fail(f"It is done, but the output could not be written ({error.strerror}): check the disk.", 1)
        if error.filename:
            return _fail(f"{error.strerror}: {error.filename}", 1)
        why = error.strerror or "Input or output failed"  # of the output, when it is not kept until the command is done
        return _fail(f"{why}: check the disk.{doubt}", 1)
    except Exception as error:  # the edge: whatever it is, the operator sees a sentence
        return _fail(f"Please report this defect: {where_raised(error)}", 1)


def _prepare_output() -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, or never there: pythonw.exe
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the process's life
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            # A console in GBK cannot show every name; CPython 3.8 would keep a warning until a block is full.
            stream.reconfigure(errors="replace", line_buffering=name == "stderr" or None)


def _drop_output() -> None:
    """The reader of our output is gone: the interpreter must not fail at it again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(sentence: str, code: int) -> int:
    print(f"certtool: {printable(' '.join(sentence.splitlines()))}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    return code


class _VersionAction(argparse.Action):
    """`--version`. argparse's own passes over an error of the output on newer Pythons."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"certtool {__version__} (CRC32: {crc32_name()})")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="certtool",
        description="Hand out each device certificate once, and never forget to whom.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_VersionAction, nargs=0, help="print the version and which CRC32 runs")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    commands.required = True

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        told = "the store (default: certtool-data beside certtool.py)"
        command.add_argument("--data", type=_folder, metavar="DIR", help=told)
        return command

    _add_store_commands(add)
    _add_asking_commands(add)
    return parser


def _add_store_commands(add: AddCommand) -> None:
    """Add what runs the store: serve, import, release, void, accept-restore."""
    serve = add("serve", run_serve, "Give certificates to devices and programmers over HTTP.")
    serve.add_argument("port", nargs="?", type=_port, default=DEFAULT_PORT, help="default 8000; 0 takes a free one")
    serve.add_argument(
        "--host", default="0.0.0.0", type=_host, metavar="ADDR", help="address to listen on (default: all)"
    )
    serve.add_argument("--import", dest="files", action="append", default=[], metavar="FILE", help="import first")
    serve.add_argument("--crc-format", choices=("hex", "int"), default="hex", help="how CRC32 is sent")
    serve.add_argument(
        "--allow", action="append", default=[], type=_network, metavar="CIDR", help="only these stations"
    )
    serve.add_argument("--mirror", type=_folder, metavar="DIR", help="second copy, on another disk")
    serve.add_argument("--require-device-id", action="store_true", help="refuse requests without a DeviceID")
    serve.add_argument("--open", action="store_true", help="open the management page in the browser")
    serve.add_argument("--no-page", action="store_true", help="serve no management page")

    importing = add("import", run_import, "Add certificates to the store, also beside a running server.")
    importing.add_argument("files", nargs="+", metavar="FILE", help="identity file (CSV)")
    importing.add_argument(
        "--batch", default="", type=_text, metavar="NAME", help="name of the batch (default: the file's)"
    )
    importing.add_argument("--product-key", default="", metavar="K", help="for a file without that column")
    importing.add_argument("--product-secret", default="", metavar="S", help="for a file without that column")
    importing.add_argument("--product-id", default="", metavar="I", help="for a file without that column")
    importing.add_argument("--skip-bad", action="store_true", help="import the good rows though others are bad")
    importing.add_argument("--dry-run", action="store_true", help="report as an import would, and change nothing")
    importing.add_argument("--json", action="store_true", help="print the report as one JSON object")

    for name, text in (
        ("release", "Give a certificate back to the pool. Only where no device has it any more."),
        ("void", "Take a certificate out of use, for ever."),
    ):
        operation = add(name, run_operation, text)
        operation.add_argument("device_name", metavar="DEVICE_NAME")
        operation.add_argument("--reason", required=True, type=_text, metavar="TEXT", help="stays in the journal")
        operation.add_argument("--product-key", default="", metavar="K", help="where two products have that name")
        if name == "release":
            operation.add_argument("--force", action="store_true", help="also where it is Written")

    accepting = add(
        "accept-restore", run_accept_restore, "Serve an old copy of the store, which was put back, after all."
    )
    accepting.add_argument("--reason", required=True, type=_text, metavar="TEXT", help="stays in the journal")


def _add_asking_commands(add: AddCommand) -> None:
    """Add what only looks or asks: query, verify, request, crc."""
    verify = add("verify", run_verify, "Audit a store, and that no certificate is in two stores. It changes nothing.")
    verify.add_argument("others", nargs="*", metavar="OTHER_STORE", help="the folder of another store")

    query = add("query", run_query, "Show what became of certificates.")
    query.add_argument("device_name", nargs="?", metavar="DEVICE_NAME")
    query.add_argument("--device-id", type=str.strip, metavar="ID")
    query.add_argument("--product-key", metavar="K")
    query.add_argument("--batch", type=_text, metavar="B")
    query.add_argument("--status", metavar="S", type=_status, help=", ".join(STATUS_NAMES))
    query.add_argument("--limit", type=_count, metavar="N", help=f"rows at most (default: {TABLE_LIMIT} on a terminal)")
    query.add_argument("--format", choices=("table", "csv", "json"), default="table")
    query.add_argument("--show-secrets", action="store_true", help="add ProductSecret and DeviceSecret")

    request = add("request", run_request, "Ask a server for a certificate, as a station does, and check the answer.")
    request.add_argument("product_key", metavar="PRODUCT_KEY")
    request.add_argument(
        "device_id", type=_device_id, metavar="DEVICE_ID", nargs="?", help="none: the server makes one up"
    )
    request.add_argument("--server", required=True, type=_server, metavar="HOST[:PORT]", help="default port 8000")
    request.add_argument("--report", choices=("ok", "failed"), default="", help="then report the burn")
    request.add_argument("--show-secrets", action="store_true", help="do not mask ProductSecret and DeviceSecret")
    request.add_argument("--json", action="store_true", help="print one JSON object")
    request.add_argument(
        "--count", type=_count, metavar="N", help="play a whole line: takes N certificates of the pool"
    )
    request.add_argument("--stations", type=_stations, default=1, metavar="M", help="at a time, with --count")

    crc = add("crc", run_crc, "Print the checksum that devices verify.")
    for name in ("pk", "dn", "ds", "ps"):
        crc.add_argument(name, metavar=name.upper())
    crc.add_argument("product_id", metavar="PRODUCT_ID", nargs="?", default="", help="of a Bluetooth product")
    crc.add_argument("--format", choices=("hex", "int"), default="hex")
    crc.add_argument("--quiet", action="store_true", help="print the checksum alone")


def _text(text: str) -> str:
    """A text that UTF-8 can hold: on POSIX an argument or a file's name may be any bytes, mostly those of UTF-8."""
    return text.encode("utf-8", "replace" if sys.platform == "win32" else "surrogateescape").decode("utf-8", "replace")


def _folder(text: str) -> str:
    if not text:  # of a variable that is not set: it would be the current folder, or another store than was meant
        raise argparse.ArgumentTypeError("the name of a folder")
    return os.path.abspath(text)


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError("a port is a number from 0 to 65535")
    return int(text)


def _host(text: str) -> str:
    if not text:  # which would be all addresses
        raise argparse.ArgumentTypeError("an address of this PC, such as 192.168.1.10")
    return text


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError("a whole number, 1 or more")
    return int(text)


def _stations(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError("a number of stations is from 1 to 1000")
    return int(text)


def _device_id(text: str) -> str:
    if not text.strip():  # a scan that failed must not take a fresh certificate
        raise argparse.ArgumentTypeError("empty: leave it out for a device that has none")
    return text.strip()


def _server(text: str) -> Tuple[str, int]:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%a-z]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?", text)
    if not match or not 1 <= int(match[2] or DEFAULT_PORT) <= 65535:
        raise argparse.ArgumentTypeError("a server is HOST or HOST:PORT, such as 192.168.1.10:8000")
    return match[1].strip("[]"), int(match[2] or DEFAULT_PORT)


def _network(text: str) -> str:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise argparse.ArgumentTypeError("an address or network, such as 192.168.1.0/24") from None
    mapped = network.network_address.ipv4_mapped if isinstance(network, ipaddress.IPv6Network) else None
    return f"{mapped}/{network.prefixlen - 96}" if mapped else str(network)  # as a station's address is told


def _status(text: str) -> int:
    for status, name in enumerate(STATUS_NAMES):
        if name.lower() == text.lower():
            return status
    raise argparse.ArgumentTypeError(f"one of {', '.join(STATUS_NAMES)}")


def store_folder(option: Optional[str]) -> str:
    """Return the store's folder: --data, CERTTOOL_DATA, or certtool-data beside certtool.py. Raises UsageError."""
    given = option or os.environ.get("CERTTOOL_DATA")
    if given:
        return os.path.abspath(given)
    here = os.path.dirname(os.path.realpath(__file__))
    by_pip = glob.glob(os.path.join(glob.escape(here), "certtool-*.dist-info"))
    if by_pip or os.path.basename(here) in ("site-packages", "dist-packages"):
        raise UsageError("An installed certtool has no folder of its own: name the store with --data or CERTTOOL_DATA.")
    return os.path.join(here, DEFAULT_STORE)


class _ProgressLine:
    """A line on a terminal that tells how far a long job is; nothing at all in a pipe.

    It is wiped with blanks: a Windows console shows an escape sequence as it is.
    """

    def __init__(self) -> None:
        self._width = 0  # of what is shown
        self._next = time.monotonic() + 0.5

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() >= self._next and sys.stderr.isatty():
            self._next = time.monotonic() + 0.25
            text = f"{what}: {100 * done // max(total, 1):3d}% "
            self._width = max(self._width, len(text))
            print(f"\r{text:{self._width}}", end="", file=sys.stderr, flush=True)

    def done(self) -> None:
        """Wipe the line."""
        if self._width:
            print(f"\r{'':{self._width}}\r", end="", file=sys.stderr, flush=True)


def _open_store(
    options: argparse.Namespace,
    writer: bool,
    accept: Optional[Mapping[str, Any]] = None,
    about: Sequence[str] = (),
) -> Tuple[Store, State]:
    """Open and load the store, or what is `about` some names; say on stderr what was found there. Raises StoreError."""
    marks = marks_folder() if writer or options.command == "import" else None  # a dry run refuses what an import would
    mirror = getattr(options, "mirror", None) or ""
    try:
        store = Store(store_folder(options.data), options.command, writer, marks, mirror, accept)
    except StoreError as error:
        _print_notes(error.notes)
        raise
    state, progress = State(), _ProgressLine()
    try:
        store.load(state, progress, about)
    except BaseException:
        store.close()
        raise
    finally:
        progress.done()
        _print_notes(store.notes)  # what was done stays done, also where the start then fails
    return store, state


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"certtool: {printable(note)}", file=sys.stderr)


# -- serve -------------------------------------------------------------------------------------------------------------


def run_serve(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM, which end the start as cleanly as the work."""
    _on_signals(signal.default_int_handler)  # until there is a server to stop
    uploads = [_read_upload(path) for path in options.files]
    console = Console(sys.stdout)

    def notify(sentence: str) -> None:
        console.notify(sentence)
        server.site.notice(sentence)

    try:
        try:
            server = CertServer(
                options.host, options.port, console.events, notify, options.allow, options.crc_format == "int"
            )
        except CertToolError:
            _look_for_server(store_folder(options.data))
            raise
        with server:
            store, state = _open_store(options, writer=True)
            with contextlib.closing(store):
                server.service = Service(store, state, notify, options.require_device_id)
                if uploads:
                    _import_first(server.service, uploads)
                _announce(server, store)
                _on_signals(server.stop)
                gc.freeze()  # the state lives as long as the process: do not search a million strings for garbage
                _print_start(store, state)
                page = None if options.no_page else _serve_page(server)
                _print_ready(server)
                with _opened(page.link(), store.folder) if page and options.open else contextlib.nullcontext():
                    server.serve_forever()
    except KeyboardInterrupt:
        print("Stopped before it was ready: nothing was given out.", flush=True)
        return 0
    finally:
        clean = console.close()
    if not clean:
        os._exit(0)  # the screen does not take our output, and the interpreter would wait for it
    try:
        print("Stopped. Everything that was answered is on the disk.", flush=True)
    except OSError:
        _drop_output()  # the screen is gone, the work is done
    return 0


def _look_for_server(folder: str) -> None:
    """Raise StoreBusy where a server runs on this store already: it explains better why the port is taken."""
    path = os.path.join(folder, "lock")
    try:
        if os.path.exists(path):
            Lock(path, "serve").release()
    except StoreBusy as busy:
        if busy.holder.get("command") == "serve":
            raise
    except OSError:
        pass


def _import_first(service: Service, uploads: Sequence[Upload]) -> None:
    report = _run_import(service, uploads, ImportOptions(who=_who()))
    _print_report(report)
    if not report.ok:
        raise Refused("Nothing was imported, so the server does not start: mend the file, or leave --import out.")


def _announce(server: CertServer, store: Store) -> None:
    """Tell other commands on this PC how to reach the server: the lock file is for this user alone."""
    assert store.lock
    address = {"host": server.own_address, "port": server.server_port}
    store.lock.announce({"pid": os.getpid(), "command": "serve", **address, "token": server.token})


def _on_signals(stop: Callable[[int, Any], None]) -> None:
    """Let whatever asks a program to end call `stop`."""
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if sys.platform == "win32":
        signal.signal(signal.SIGBREAK, stop)


def _print_start(store: Store, state: State) -> None:
    print(f"certtool {__version__}, CRC32 by {crc32_name()}, store {store.folder}")
    for product in state.products.values():
        left = product.free
        low = "  *** LOW: import more" if left < product.low else ""
        print(f"Product {product.key}: {left:,} of {product.total:,} certificates left{low}")
    if not state.products:
        print("There is no certificate yet: add some with certtool.py import FILE, also while this runs.")


def _serve_page(server: CertServer) -> Page:
    page = server.site = Page(server, f"{_who()} (page)")
    print(f"Page for this PC alone: {page.link()}")
    return page


@contextlib.contextmanager
def _opened(link: str, folder: str) -> Iterator[None]:
    """Open a link with a token in the browser, by way of a file: any user of this PC sees what a command line holds."""
    import pathlib  # noqa: PLC0415 - only for --open
    import webbrowser  # noqa: PLC0415

    path = os.path.join(os.path.abspath(folder), "open-page.html")
    try:
        try:
            if os.path.lexists(path):
                os.unlink(path)  # who made it could read it, or has it lead elsewhere
            with open(_open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w", encoding="ascii") as file:
                file.write(f'<!DOCTYPE html><meta http-equiv="refresh" content="0; url={link}">\n')
            threading.Thread(target=webbrowser.open, args=(pathlib.Path(path).as_uri(),), daemon=True).start()
        except OSError as error:
            print(f"certtool: The browser was not opened ({error.strerror}): open the link.", file=sys.stderr)
        yield
    finally:
        with contextlib.suppress(OSError):  # the token in it ends with the server
            os.unlink(path)


def _print_ready(server: CertServer) -> None:
    host, port = server.server_name, server.server_port
    hosts = [f"[{host}]" if ":" in host else host]
    if host in ("0.0.0.0", "::"):  # both are all addresses, and devices use IPv4
        hosts = ["127.0.0.1", *_lan_addresses()]
    print("Waiting for client request: " + "  ".join(f"http://{name}:{port}" for name in hosts), flush=True)


def _lan_addresses() -> List[str]:
    """The IPv4 addresses under which devices may reach this PC; no DNS is asked."""
    found = []
    if sys.platform == "linux":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # an interface without an IPv4 address
                    reply = fcntl.ioctl(probe.fileno(), 0x8915, name.encode().ljust(256, b"\0"))  # SIOCGIFADDR
                    found.append(socket.inet_ntoa(reply[20:24]))
    elif sys.platform == "win32":
        with contextlib.suppress(OSError):
            found = socket.gethostbyname_ex("")[2]  # this PC; its name may be Chinese, or none that Python can ask for
    return [address for address in found if not is_loopback(address)]


# -- import, release, void, accept-restore -----------------------------------------------------------------------------


def run_import(options: argparse.Namespace) -> int:
    """Import files, here or through the server that runs on the store."""
    try:
        texts = (options.batch, options.product_key, options.product_secret, options.product_id)
        how = ImportOptions(*texts, options.skip_bad, options.dry_run, _who())
        column, reason = how.wrong()
        if reason:
            raise UsageError(f"{OPTIONAL_FROM[column]}: {reason}")
        report = _import(options, [_read_upload(path) for path in options.files], how)
    except CertToolError as error:
        if not options.json or error.exit_code == 2:
            raise
        report = ImportReport(options.dry_run)
        report.ok = False
        report.reject("", 0, str(error))  # of no row
        print(json.dumps(report.as_json()))
        raise
    if options.json:
        print(json.dumps(report.as_json()))
    else:
        _print_report(report)
    if report.ok:
        return 0
    if len(report.errors) == report.rejected:
        return _fail("Nothing was imported: mend the rows, or import the good ones with --skip-bad.", 1)
    return _fail("Nothing was imported: leave out, or mend, the file that cannot be used as a whole.", 1)


def _import(options: argparse.Namespace, uploads: Sequence[Upload], how: ImportOptions) -> ImportReport:
    try:
        if how.dry_run:
            store = Store(store_folder(options.data), writer=False)
            if store.is_new():
                return _run_import(Service(store, State()), uploads, how)
        store, state = _open_store(options, writer=not how.dry_run)
    except StoreBusy as busy:
        files = [[upload.name, upload.size] for upload in uploads]
        reply = _ask_server(busy, "import", {"options": how._asdict(), "files": files}, uploads)
        report = ImportReport(False)
        vars(report).update(reply["Report"])
        return report
    with contextlib.closing(store):
        return _run_import(Service(store, state, serving=False), uploads, how)


class _Source(io.FileIO):
    """A file to import. Raises Refused where it cannot be opened or read."""

    def __init__(self, path: str) -> None:
        self._path = path
        with self._telling():
            super().__init__(path)

    def readinto(self, buffer: Any) -> int:
        with self._telling():
            return super().readinto(buffer) or 0

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Refused(
                f"{self._path} cannot be read ({error.strerror}): check the name, and close it elsewhere."
            ) from None


def _read_upload(path: str) -> Upload:
    name = _text(os.path.basename(path))
    with io.BufferedReader(_Source(path)) as file:
        if not file.seekable():  # a pipe
            return Upload.of(name, b"".join(in_pieces(file)))
        file.peek(1)  # tells now, before a store is made
        return Upload(name, lambda: io.BufferedReader(_Source(path)), file.seek(0, os.SEEK_END))


def _contents(upload: Upload) -> Iterator[bytes]:
    """Yield the bytes of an upload. Raises Refused where there are not as many as there were."""
    left = upload.size
    with upload.open() as data:
        for piece in in_pieces(data):
            left -= len(piece)
            if left < 0:
                break
            yield piece
    if left:
        raise Refused(CHANGED.format(upload.name))


def _run_import(service: Service, uploads: Sequence[Upload], how: ImportOptions) -> ImportReport:
    """Run an import to its end here. Of a long one a terminal sees how far it is."""
    progress = _ProgressLine()
    job = service.import_files(uploads, how)
    size = sum(upload.size for upload in uploads)
    try:
        while True:
            next(job)
            progress("importing", service.taken, size)
    except StopIteration as end:
        report: ImportReport = end.value
        return report
    finally:
        progress.done()
        job.close()


def _print_report(report: ImportReport) -> None:
    for error in report.errors:
        print(f"{printable(error['file'])}:{error['line']}: {error['message']}", file=sys.stderr)
    would = "would be " if report.dry_run else ""
    print(
        f"{report.read:,} rows read: {report.imported:,} {would}imported, {report.duplicates:,} in the store already, "
        f"{report.rejected:,} rejected."
    )
    if report.ignored:
        print(f"Columns not used: {printable(', '.join(report.ignored))}.")


def _ask_server(
    busy: StoreBusy, operation: str, fields: Mapping[str, Any], uploads: Sequence[Upload] = ()
) -> Dict[str, Any]:
    """Hand a command to the server that holds the store; return its answer. Raises CertToolError where it refuses."""
    port, token = busy.holder.get("port"), busy.holder.get("token")
    if not port or not token:
        raise busy
    host = str(busy.holder.get("host", "127.0.0.1"))
    connection = http.client.HTTPConnection(host, int(port), timeout=MANAGEMENT_SECONDS)
    try:
        head = json.dumps(fields).encode() + b"\n"
        length = len(head) + sum(upload.size for upload in uploads)
        if length > MAX_UPLOAD:  # the server's own refusal may be lost behind what it does not read
            raise Refused(TOO_LONG_UPLOAD)
        headers = {"Authorization": f"Bearer {token}", "Content-Length": str(length)}
        connection.request("POST", MANAGEMENT + operation, itertools.chain([head], *map(_contents, uploads)), headers)
        answer = parse_object(connection.getresponse().read())
    except (OSError, http.client.HTTPException, BadRequest):
        raise Refused(  # to release once more what another device has got meanwhile would give it to two
            f"The running server ended before it answered, so the {operation} may have happened: start it, and look "
            "with certtool.py query before you run this again."
        ) from None
    finally:
        connection.close()
    if answer.get("Status") != "OK":
        raise Refused(str(answer.get("Message")))
    return answer


def run_operation(options: argparse.Namespace) -> int:
    """Release or void a certificate, here or through the server that runs on the store."""
    verb, force = OPERATIONS[options.command], getattr(options, "force", False)
    name, key, reason, who = options.device_name, options.product_key, options.reason, _who()
    _need_store(options)
    try:
        store, state = _open_store(options, writer=True)
    except StoreBusy as busy:
        fields = {"device_name": name, "product_key": key, "reason": reason, "who": who, "force": force}
        print(_ask_server(busy, options.command, fields)["Message"])
        return 0
    with contextlib.closing(store):
        service = Service(store, state)
        message, _ = service.operate(verb, name, key, reason, who, force, _now())
        service.commit()
    print(message)
    return 0


def run_accept_restore(options: argparse.Namespace) -> int:
    """Let an old copy of the store be served: a person knows which devices it has forgotten, and says why."""
    if not options.reason.strip():
        raise Refused("A reason is needed: give it with --reason.")
    _need_store(options)
    store, state = _open_store(options, writer=True, accept={"who": _who(), "reason": options.reason.strip()})
    with contextlib.closing(store):
        left = sum(product.free for product in state.products.values())
    print(f"The old copy counts now, with {left:,} free certificates. The journal says who accepted it and why.")
    return 0


def _need_store(options: argparse.Namespace) -> None:
    """Raise Refused where there is no store yet: a new one holds nothing that this command is about."""
    store = Store(store_folder(options.data), writer=False)  # refuses what can be no folder
    if store.is_new():
        raise Refused(f"There is no store at {store.folder}: name it with --data.")


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "unknown"


# -- request -----------------------------------------------------------------------------------------------------------


def run_request(options: argparse.Namespace) -> int:
    """Be a station, or many of them."""
    wrong = "" if _KEY.fullmatch(options.product_key) else "PRODUCT_KEY"
    options.device_id = options.device_id or ""
    if not _DEVICE_ID.fullmatch(options.device_id):
        wrong = "DEVICE_ID"
    if wrong:
        raise UsageError(f"{wrong} is not 1-{FIELD_LENGTH} printable ASCII characters.")
    station = Station(*options.server)
    return _play(options, station) if options.count else _request_one(options, station)


def _request_one(options: argparse.Namespace, station: Station) -> int:
    answer = station.request(options.product_key, options.device_id)
    reported = None
    try:
        if options.report:
            device_id = answer.get("DeviceID") or options.device_id  # the vendor's server may tell none
            station.report(options.product_key, device_id, options.report == "ok")
            reported = options.report
    finally:  # the certificate is taken, whatever became of the report
        _print_answer(options, answer, reported)
    return 0


def _print_answer(options: argparse.Namespace, answer: Dict[str, Any], reported: Optional[str]) -> None:
    if not options.show_secrets:
        answer.update({name: "********" for name in SECRET_COLUMNS if answer.get(name)})
    if options.json:
        print(json.dumps({**answer, "Reported": reported}))
        return
    for name in (*COLUMNS, "CRC32"):
        print(f"{name + ':':<15}{_one_line(answer.get(name))}")
    print("The CRC32 is right." + (f" The burn is reported: {reported}." if reported else ""))


def _play(options: argparse.Namespace, station: Station) -> int:
    prefix = options.device_id or "line-" + secrets.token_hex(4)
    played = play_line(station, options.product_key, prefix, options.count, options.stations, options.report)
    report = played.as_json()
    if options.json:
        print(json.dumps(report))
    else:
        latency = ", ".join(f"{name} {value:.1f}" for name, value in report["latency_ms"].items())
        print(f"{report['answers']:,} answers in {report['seconds']:.1f} s: {report['rate']:,.0f} a second.")
        print(f"Latency in ms: {latency}.")
        print(f"{report['certificates']:,} different certificates, {report['duplicates']:,} given to two devices.")
        for failure, times in report["failures"].items():
            print(f"{times:,} times: {failure}")
    if played.interrupted:
        return _fail("Interrupted: the rest was not asked for.", 1)
    if report["duplicates"] or report["failures"]:
        return _fail("The line did not run clean: see above.", 1)
    return 0


# -- verify ------------------------------------------------------------------------------------------------------------


def run_verify(options: argparse.Namespace) -> int:
    """Audit stores; print a line for each finding, and one for each store that is as it should be."""
    folders = [store_folder(options.data), *map(os.path.abspath, options.others)]
    checked: List[Tuple[str, State]] = []
    findings = 0
    for folder in dict.fromkeys(folders):
        store, state = Store(folder, options.command, writer=False, marks=marks_folder()), State()
        found = 0
        for finding in audit(store, state):
            found += 1
            print(printable(f"{folder}: {finding}"))
        for note in store.notes:
            print(f"certtool: {printable(f'{folder}: {note}')}", file=sys.stderr)
        for other, state_of_other in checked:
            for key, names in in_both(state_of_other, state):
                found += 1
                also = f"{len(names):,} certificates of product {key} are also in {other}, such as {names[0]}."
                print(printable(f"{folder}: {also}"))
        if not found:
            counts = [sum(product.counts[status] for product in state.products.values()) for status in range(5)]
            told = ", ".join(f"{count:,} {name}" for count, name in zip(counts, STATUS_NAMES))
            print(printable(f"{folder}: {len(state.names):,} certificates ({told}): all is right."))
        findings += found
        checked.append((folder, state))
        store.close()
    if findings:
        return _fail(f"{findings:,} findings: see above, and do not serve these stores before you know why.", 1)
    return 0


# -- query and crc -----------------------------------------------------------------------------------------------------


def run_query(options: argparse.Namespace) -> int:
    """Print certificates. It only reads, also beside a running server."""
    about = [text for text in (options.device_name, options.device_id) if text is not None]
    store, state = _open_store(options, writer=False, about=about)
    columns = QUERY_COLUMNS + (SECRET_COLUMNS if options.show_secrets else ())
    limit = options.limit
    if limit is None and options.format == "table" and sys.stdout.isatty():
        limit = TABLE_LIMIT
    with contextlib.closing(store):
        found = itertools.islice(_query(options, Service(store, state)), None if limit is None else limit + 1)
        first = next(found, None)
        rows = itertools.chain([] if first is None else [first], found)
        if options.format == "table":
            _print_table(columns, list(rows), limit)
        else:
            print_rows = _print_json if options.format == "json" else _print_csv
            print_rows(columns, itertools.islice(rows, limit))
    if first is None:
        return _fail("No certificate matches: check the name and the filters.", 1)
    return 0


def _query(options: argparse.Namespace, service: Service) -> Iterator[Tuple[str, ...]]:
    """Yield the row of each certificate that passes the filters, in the order of import."""
    state, key, device_id = service.state, options.product_key, options.device_id
    numbers: Iterable[Optional[int]]
    if options.device_name is not None:
        numbers = [number for _, number in state.find(options.device_name, key or "")]
    elif device_id is not None:
        numbers = [product.devices[device_id] for product in state.products.values() if device_id in product.devices]
    else:
        numbers = state.select(key, options.batch, options.status)
    wanted = {
        "ProductKey": key,
        "Batch": options.batch,
        "Status": None if options.status is None else STATUS_NAMES[options.status],
        "DeviceID": device_id,
    }
    filters = [(QUERY_COLUMNS.index(name), value) for name, value in wanted.items() if value is not None]
    for number in numbers:
        if number is not None:
            row = service.row(number)
            if all(row[place] == value for place, value in filters):
                yield row


def _print_json(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    separator = "["
    for row in rows:
        print(separator + json.dumps(dict(zip(columns, row))), end="")
        separator = ",\n "
    print("]" if separator != "[" else "[]")


def _print_csv(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    shown = printable if sys.stdout.isatty() else str  # a file is as it is, a terminal obeys what it is shown
    print(",".join(columns))
    for row in rows:
        print(shown(format_row(row[: len(columns)])))


def _print_table(columns: Sequence[str], rows: List[Tuple[str, ...]], limit: Optional[int]) -> None:
    """Draw a table, with tabulate where it is installed; both have the same content."""
    shown = [list(map(printable, row[: len(columns)])) for row in rows[:limit]]
    try:
        from tabulate import tabulate  # noqa: PLC0415 - only where it is there
    except ImportError:
        widths = [max(map(len, column)) for column in zip(columns, *shown)]
        for cells in (columns, ["-" * width for width in widths], *shown):
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())
    else:
        print(tabulate(shown, headers=columns, disable_numparse=True))
    if limit is not None and len(rows) > limit:
        print(f"... only the first {limit} are shown: see --limit.")


def run_crc(options: argparse.Namespace) -> int:
    """Print the checksum of a certificate that is given as arguments."""
    text = options.pk + options.dn + options.ds + options.ps + options.product_id
    payload = text.encode("utf-8", "surrogateescape")
    value = crc32(payload)
    shown = str(value) if options.format == "int" else f"{value:08X}"
    if options.quiet:
        print(shown)
    else:
        print(f"length: {len(payload)}\ncrc32: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
