"""Made-up certificates, as many as wanted, the same on every run."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any, Iterator

from certtool import Credential

COLUMNS = ("ProductKey", "DeviceName", "DeviceSecret", "ProductSecret", "ProductID", "DeviceID")
PRODUCT = "a1MadeUpPk0"
SECRET = "(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])"  # what finds the secrets that are made here


def rows(
    n: int, product: str = PRODUCT, *, first: int = 0, secret: str = "", product_id: str = ""
) -> Iterator[Credential]:
    """Yield `n` certificates of `product`, numbered from `first`: other numbers or products are other certificates."""
    for number in range(first, first + n):
        digest = hashlib.sha256(f"{product} {number}".encode()).hexdigest()
        yield Credential(product, f"dn{digest[:8]}{number:010d}", digest[32:], secret, product_id)


def write(path: Path, n: int, product: str = PRODUCT, **options: Any) -> Path:
    """Write an identity file with the certificates of `rows`, and return its path."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows(n, product, **options))
    return path
