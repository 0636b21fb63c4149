"""`python -m bench.allocate STORE`: allocate every certificate as a server does, without the requests."""

from __future__ import annotations

import contextlib
import sys

from certtool import Service, State, Store
from tests import identities

TURN = 500  # allocations that one commit makes durable, as a turn of a busy server's loop does
BEGIN = 1_764_000_000_000  # ms since 1970: one allocation each millisecond from here


def device_name(device: int) -> str:
    """The DeviceID of a made-up device, as SQLite's `allocate-all` names it too."""
    return f"all-{device}"


def main(folder: str) -> None:
    """Allocate all."""
    store, state = Store(folder, "bench"), State()
    with contextlib.closing(store):
        store.load(state)
        service = Service(store, state)
        for device in range(len(state.names)):
            service.request(identities.PRODUCT, device_name(device), "192.0.2.7", BEGIN + device)
            if device % TURN == TURN - 1:
                service.commit()
        service.commit()


if __name__ == "__main__":
    main(sys.argv[1])
