"""The life of a certificate: what each command makes of each status; live, undone and replayed states agree."""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Type, Union
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import certtool
from certtool import (
    ALLOCATED,
    BURN_FAILED,
    BURN_SUCCEEDED,
    FAILED,
    MAKE_VOID,
    RELEASE,
    REQUEST,
    UNALLOCATED,
    VOID,
    WRITTEN,
    CertToolError,
    Command,
    Credential,
    Event,
    Events,
    PoolExhausted,
    Product,
    Record,
    Refused,
    Staged,
    State,
    StoreUnavailable,
    Undo,
    UnknownDevice,
    UnknownProduct,
    Voided,
)
from tests.stores import (
    RAISE,
    SHORT,
    STATION,
    Disk,
    Opened,
    import_files,
    open_store,
    read_store,
    rows_about,
    snapshot,
    undo,
    upload,
)

PK, OTHER = "a1Product", "a1Other"
DEVICE, NAME = "AA:BB", "name0000"


def new_state(n: int = 3, bound: str = "", product: str = PK) -> State:
    """A state after one import of `n` certificates, the last one bound to the device `bound`."""
    state = State()
    more(state, n, bound, product)
    return state


def more(state: State, n: int, bound: str = "", product: str = PK, batch: str = "batch") -> None:
    """Import `n` more certificates, the last one bound to the device `bound`."""
    staged = Staged(len(state.names), batch)
    for number in range(staged.first, staged.first + n):
        device_id = bound if number == staged.first + n - 1 else ""
        staged.add([product], [f"name{number:04d}"], [device_id])
    state.prepared.append(staged)
    state.apply(Event("import", 1, detail={}))


def do(state: State, verb: int, *, now: int = 1000, force: bool = False, **who: Any) -> Optional[Undo]:
    """Decide a command and apply the event, as the service does."""
    who = who or ({"device_name": NAME} if verb in (RELEASE, MAKE_VOID) else {"device_id": DEVICE})
    _, event = state.decide(Command(verb, PK, station=STATION, force=force, **who), now)
    return state.apply(event) if event else None


def true_to_itself(state: State) -> bool:
    """Whether what the state has counted is what there is to count."""
    stocks: Dict[Tuple[str, str], List[int]] = {}
    bound = {product.key: 0 for product in state.products.values()}
    for product in state.products.values():
        for number in product.names.values():
            record = state.record(number)
            stocks.setdefault((product.key, state.batch(number)), [0] * 5)[record.status] += 1
            bound[product.key] += record.status == UNALLOCATED and record.device_id != ""
    return stocks == {stock[:2]: stock.counts for stock in state.stocks} and all(
        product.bound == bound[product.key] for product in state.products.values()
    )


def in_status(status: int) -> State:
    """A state whose first certificate has this status, and but for Unallocated belongs to DEVICE."""
    state = new_state()
    if status != UNALLOCATED:
        do(state, REQUEST, now=500)
    for verb in {WRITTEN: [BURN_SUCCEEDED], FAILED: [BURN_FAILED], VOID: [MAKE_VOID]}.get(status, []):
        do(state, verb, now=600)
    return state


class Case(NamedTuple):
    """A cell of the contract's table: what becomes of a certificate, or the error that refuses the command."""

    status: int
    verb: int
    result: Any
    force: bool = False


Outcome = Union[str, Type[CertToolError]]  # a certificate's name, or why there is none
VERBS = ("request", "succeeded", "failed", "release", "void")
# fmt: off
CASES = [
    Case(UNALLOCATED, REQUEST,        Record(ALLOCATED, DEVICE, STATION, 1000)),
    Case(UNALLOCATED, BURN_SUCCEEDED, UnknownDevice),
    Case(UNALLOCATED, BURN_FAILED,    UnknownDevice),
    Case(UNALLOCATED, RELEASE,        Refused),
    Case(UNALLOCATED, RELEASE,        Refused, force=True),
    Case(UNALLOCATED, MAKE_VOID,      Record(VOID)),
    Case(ALLOCATED,   REQUEST,        Record(ALLOCATED, DEVICE, STATION, 500)),
    Case(ALLOCATED,   BURN_SUCCEEDED, Record(WRITTEN, DEVICE, STATION, 500, 1000)),
    Case(ALLOCATED,   BURN_FAILED,    Record(FAILED, DEVICE, STATION, 500)),
    Case(ALLOCATED,   RELEASE,        Record(UNALLOCATED)),
    Case(ALLOCATED,   MAKE_VOID,      Record(VOID, DEVICE, STATION, 500)),
    Case(FAILED,      REQUEST,        Record(ALLOCATED, DEVICE, STATION, 1000)),
    Case(FAILED,      BURN_SUCCEEDED, Record(WRITTEN, DEVICE, STATION, 500, 1000)),
    Case(FAILED,      BURN_FAILED,    Record(FAILED, DEVICE, STATION, 500)),
    Case(FAILED,      RELEASE,        Record(UNALLOCATED)),
    Case(FAILED,      MAKE_VOID,      Record(VOID, DEVICE, STATION, 500)),
    Case(WRITTEN,     REQUEST,        Record(WRITTEN, DEVICE, STATION, 500, 600, rerequests=1)),
    Case(WRITTEN,     BURN_SUCCEEDED, Record(WRITTEN, DEVICE, STATION, 500, 600)),
    Case(WRITTEN,     BURN_FAILED,    Record(FAILED, DEVICE, STATION, 500)),
    Case(WRITTEN,     RELEASE,        Refused),
    Case(WRITTEN,     RELEASE,        Record(UNALLOCATED), force=True),
    Case(WRITTEN,     MAKE_VOID,      Record(VOID, DEVICE, STATION, 500, 600)),
    Case(VOID,        REQUEST,        Voided),
    Case(VOID,        BURN_SUCCEEDED, Voided),
    Case(VOID,        BURN_FAILED,    Voided),
    Case(VOID,        RELEASE,        Refused),
    Case(VOID,        RELEASE,        Refused, force=True),
    Case(VOID,        MAKE_VOID,      Record(VOID, DEVICE, STATION, 500)),
]
# fmt: on


@pytest.mark.parametrize(
    "case",
    CASES,
    ids=[f"{certtool.STATUS_NAMES[c.status]}-{VERBS[c.verb]}{'-forced' * c.force}" for c in CASES],
)
def test_each_command_makes_of_each_status_what_the_contract_says(case: Case) -> None:
    state = in_status(case.status)
    before = snapshot(state)
    if isinstance(case.result, type):
        with pytest.raises(CertToolError) as refusal:
            do(state, case.verb, force=case.force)
        assert refusal.type is case.result
        assert snapshot(state) == before, "a refused command changes nothing"
        return
    step = do(state, case.verb, force=case.force)
    after = snapshot(state)
    counts = [0] * 5
    for record in after["records"]:
        counts[record.status] += 1
    product = after["products"][PK]
    assert after["records"] == [case.result, *before["records"][1:]]
    assert product["counts"] == counts
    assert product["devices"] == ({DEVICE: 0} if case.result.device_id else {})
    assert product["free"] == ([1, 2] if case.result.status != UNALLOCATED else [1, 2, 0])
    assert true_to_itself(state)
    if step:
        state.restore(step)
    assert snapshot(state) == before, "what was done can be taken back"
    assert true_to_itself(state)


def test_deciding_changes_nothing() -> None:
    for status in range(5):
        state = in_status(status)
        before = snapshot(state)
        for verb in (REQUEST, BURN_SUCCEEDED, BURN_FAILED):
            with contextlib.suppress(CertToolError):
                state.decide(Command(verb, PK, DEVICE), 1)
        assert snapshot(state) == before


def test_the_table_of_refusals_gives_a_fresh_error_each_time() -> None:
    errors = []
    for _ in range(2):
        with pytest.raises(Voided) as refusal:
            do(in_status(VOID), REQUEST)
        errors.append(refusal.value)
    assert errors[0] is not errors[1], "else their tracebacks would grow for as long as the server runs"


def test_a_product_that_was_never_imported_is_unknown() -> None:
    with pytest.raises(UnknownProduct):
        new_state(product=OTHER).decide(Command(REQUEST, PK, DEVICE), 1)


def test_certificates_are_given_out_in_the_order_of_import_and_released_ones_last() -> None:
    state = new_state(3)
    for device_id in "AB":
        do(state, REQUEST, device_id=device_id)
    do(state, RELEASE, device_name="name0001")
    do(state, RELEASE, device_name="name0000")
    more(state, 1)
    for device_id in "CDEF":
        do(state, REQUEST, device_id=device_id)
    assert state.products[PK].devices == {"C": 2, "D": 3, "E": 1, "F": 0}
    with pytest.raises(PoolExhausted):
        do(state, REQUEST, device_id="G")


def test_a_pool_takes_no_memory_for_each_of_many_certificates_in_a_row() -> None:
    state = new_state(100)
    more(state, 100)
    assert state.products[PK].pool == range(200)
    more(state, 1, product=OTHER)
    more(state, 2, bound="A")
    more(state, 1)
    assert list(state.products[PK].pool) == [*range(200), 201, 203]
    assert state.products[OTHER].pool == range(200, 201)


def test_a_certificate_bound_in_advance_goes_to_its_device_alone() -> None:
    state = new_state(2, bound="BOUND")
    with pytest.raises(UnknownDevice):
        do(state, BURN_SUCCEEDED, device_id="BOUND")
    do(state, REQUEST, device_id="A")
    with pytest.raises(PoolExhausted):
        do(state, REQUEST, device_id="B")
    assert (state.products[PK].bound, state.products[PK].free) == (1, 0)
    step = do(state, REQUEST, device_id="BOUND")
    assert state.products[PK].devices == {"A": 0, "BOUND": 1}
    assert (state.products[PK].bound, state.products[PK].free) == (0, 0)
    undo(state, [step])
    assert (state.products[PK].bound, state.products[PK].free) == (1, 0)


def test_all_that_wait_for_their_devices_are_counted_again_when_requests_are_taken_back() -> None:
    state = new_state(2, bound="B1")
    more(state, 2, bound="B2")
    steps = [do(state, REQUEST, device_id=device_id) for device_id in ("B1", "A", "B2")]
    assert (state.products[PK].bound, state.products[PK].free) == (0, 1)
    undo(state, steps)
    assert (state.products[PK].bound, state.products[PK].free) == (2, 2)


def test_a_release_that_is_taken_back_leaves_no_place_among_the_released_ones() -> None:
    state = new_state(3)
    for device_id in "ABC":
        do(state, REQUEST, device_id=device_id)
    do(state, RELEASE, device_name="name0000")
    undo(state, [do(state, RELEASE, device_name="name0001")])
    for name in ("name0002", "name0001"):
        do(state, RELEASE, device_name=name)
    for device_id in "DEF":
        do(state, REQUEST, device_id=device_id)
    assert state.products[PK].devices == {"D": 0, "E": 2, "F": 1}


def chosen(state: State, *filters: Any) -> List[int]:
    """The numbers that pass the filters."""
    return [number for number in state.select(*filters) if number is not None]


@pytest.mark.parametrize("step", [1, 2, 100])
def test_certificates_are_selected_by_product_batch_and_status(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certtool, "SELECT_SLICE", step)
    state = new_state(2)
    staged = Staged(2, "mixed")
    staged.add([PK], ["name0002"], [""])
    staged.add([OTHER] * 2, ["name0003", "name0004"], ["", ""])
    state.prepared.append(staged)
    state.apply(Event("import", 1, detail={}))
    more(state, 1)
    do(state, REQUEST, device_id="A")
    do(state, MAKE_VOID, device_name="name0002")
    everything = list(range(6))
    assert [
        chosen(state, *filters) for filters in ((), (PK,), (OTHER,), (None, "mixed"), (PK, "mixed"), ("none",))
    ] == [
        everything,
        [0, 1, 2, 5],
        [3, 4],
        [2, 3, 4],
        [2],
        [],
    ]
    assert chosen(state, PK, None, UNALLOCATED) == [1, 5]
    assert chosen(state, None, None, VOID) == [2]
    assert [chosen(state, None, None, None, start) for start in range(7)] == [everything[start:] for start in range(7)]
    assert list(state.select()).count(None) == -(-6 // step), "a pause after each step"
    assert state.stocks == [
        (PK, "batch", [2, 1, 0, 0, 0]),
        (PK, "mixed", [0, 0, 0, 0, 1]),
        (OTHER, "mixed", [2, 0, 0, 0, 0]),
    ]


class Looked(List[Any]):
    """A list that counts how many of its elements were looked at one after another."""

    looks = 0

    def __iter__(self) -> Iterator[Any]:
        for element in super().__iter__():
            self.looks += 1
            yield element


def test_an_import_of_many_products_looks_through_the_stocks_once_and_not_for_each_product() -> None:
    state = new_state(2)
    staged = Staged(2, "wrong columns")
    products = [f"product{number:04d}" for number in range(500)]
    staged.add(products, ["name"] * 500, [""] * 500)
    state.stocks = Looked(state.stocks)
    state.prepared.append(staged)
    state.apply(Event("import", 1, detail={}))
    assert state.stocks.looks <= 501
    assert true_to_itself(state)


def test_an_import_makes_room_for_all_that_are_bound_in_advance_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    state = new_state(2)
    staged = Staged(2, "bound")
    devices = [f"D{number}" for number in range(5000)]
    staged.add([PK] * 5000, [f"bound{number:04d}" for number in range(5000)], devices)
    grow = mock.Mock(side_effect=state._grow)
    monkeypatch.setattr(state, "_grow", grow)
    state.prepared.append(staged)
    state.apply(Event("import", 1, detail={}))
    assert grow.mock_calls == [mock.call(5001)]
    assert [state.record(number).device_id for number in range(5002)] == ["", "", *devices]


def test_what_is_imported_while_certificates_are_selected_is_selected_by_its_own_filters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(certtool, "SELECT_SLICE", 2)
    state = new_state(2)
    selection = state.select(PK)
    assert [next(selection) for _ in range(3)] == [0, 1, None]
    more(state, 2, product=OTHER)
    more(state, 1)
    assert [number for number in selection if number is not None] == [4]


def test_a_certificate_bound_in_advance_is_free_for_all_once_it_was_released() -> None:
    state = new_state(1, bound="BOUND")
    do(state, REQUEST, device_id="BOUND")
    do(state, RELEASE)
    do(state, REQUEST, device_id="ANY")
    assert state.products[PK].devices == {"ANY": 0}
    with pytest.raises(PoolExhausted):
        do(state, REQUEST, device_id="BOUND")


def test_a_void_certificate_that_was_bound_in_advance_keeps_its_device_from_getting_another() -> None:
    state = new_state(2, bound="BOUND")
    step = do(state, MAKE_VOID, device_name="name0001")
    with pytest.raises(Voided):
        do(state, REQUEST, device_id="BOUND")
    undo(state, [step])
    assert snapshot(state) == snapshot(new_state(2, bound="BOUND"))


def test_a_void_certificate_is_never_given_out() -> None:
    state = new_state(3)
    do(state, MAKE_VOID, device_name="name0001")
    for device_id in "AB":
        do(state, REQUEST, device_id=device_id)
    assert state.products[PK].devices == {"A": 0, "B": 2}
    with pytest.raises(PoolExhausted):
        do(state, REQUEST, device_id="C")


def test_a_released_certificate_that_is_voided_is_skipped() -> None:
    state = new_state(3)
    for device_id in "ABC":
        do(state, REQUEST, device_id=device_id)
    for name in ("name0000", "name0001", "name0002"):
        do(state, RELEASE, device_name=name)
    do(state, MAKE_VOID, device_name="name0001")
    for device_id in "DE":
        do(state, REQUEST, device_id=device_id)
    assert state.products[PK].devices == {"D": 0, "E": 2}


def test_a_device_whose_certificate_was_released_gets_another_one() -> None:
    state = new_state(2)
    do(state, REQUEST)
    do(state, RELEASE)
    do(state, REQUEST)
    assert state.products[PK].devices == {DEVICE: 1}


def test_each_request_after_the_burn_is_counted_and_neither_a_new_burn_nor_a_release_forgets_them() -> None:
    state = in_status(WRITTEN)
    for _ in range(3):
        do(state, REQUEST)
    assert state.record(0).rerequests == 3
    for verb in (BURN_FAILED, REQUEST, BURN_SUCCEEDED):
        do(state, verb)
    assert state.record(0).rerequests == 3
    do(state, RELEASE, force=True)
    assert state.record(0) == Record(UNALLOCATED, rerequests=3)


def test_a_device_holds_one_certificate_of_each_product() -> None:
    state = new_state()
    more(state, 3, product=OTHER)
    for key in (PK, OTHER, PK):
        _, event = state.decide(Command(REQUEST, key, DEVICE), 1)
        if event:
            state.apply(event)
    assert [product.devices for product in state.products.values()] == [{DEVICE: 0}, {DEVICE: 3}]


def test_a_name_may_occur_once_in_each_product() -> None:
    state = new_state(1)
    for key in (OTHER, "a1Third"):
        staged = Staged(len(state.names), "again")
        staged.add([key], ["name0000"], [""])
        state.prepared.append(staged)
        state.apply(Event("import", 1, detail={}))
    found = [(product.key, number) for product, number in state.find("name0000")]
    assert found == [(PK, 0), (OTHER, 1), ("a1Third", 2)]
    assert [number for _, number in state.find("name0000", OTHER)] == [1]
    assert state.find("nobody00") == []


def test_each_certificate_knows_its_batch() -> None:
    state = new_state(2)
    more(state, 1, batch="second")
    more(state, 2, batch="")
    assert [state.batch(number) for number in range(5)] == ["batch", "batch", "second", "", ""]


def test_an_event_of_a_certificate_that_no_import_holds_is_a_key_error() -> None:
    for event in (Event("written", 1, PK, "nobody00"), Event("written", 1, OTHER, NAME)):
        with pytest.raises(KeyError):
            new_state().apply(event)


def everything(state: State) -> List[Any]:
    """All that is in a state, also what no answer depends on, but for where `apply_together` looks first."""
    names = sorted(set(Product.__slots__) - {"due", "order"})
    products = [[getattr(product, name) for name in names] for product in state.products.values()]
    return [products, {name: value for name, value in vars(state).items() if name != "products"}]


HAPPENED = st.builds(
    Event,
    st.sampled_from(["allocate", "allocate", "allocate", "written", "written", *certtool.EFFECTS]),
    st.integers(1, 9),
    st.sampled_from([PK, PK, PK, PK, OTHER]),
    st.integers(0, 8).map("name{:04d}".format),
    st.sampled_from(["", "A", "B", "C", "D", "E", "F"]),
    st.sampled_from([STATION, "192.0.2.8"]),
    st.just({}),
)


@settings(max_examples=400)
@given(st.lists(HAPPENED, max_size=12), st.lists(HAPPENED, max_size=12))
def test_events_that_are_applied_together_change_what_each_of_them_changes(
    before: List[Event], events: List[Event]
) -> None:
    one_by_one = new_state(5, bound="A")
    more(one_by_one, 3, batch="another")
    more(one_by_one, 2, product=OTHER)
    for event in before:
        with contextlib.suppress(KeyError):  # it names what is not there
            one_by_one.apply(event)
    together = copy.deepcopy(one_by_one)
    ours = [event for event in events if event.product_key == PK]
    columns = Events(*zip(*ours)) if ours else Events(*[()] * 7)
    assert list(columns.rows()) == ours
    applied = 0
    with contextlib.suppress(KeyError):
        for event in ours:
            one_by_one.apply(event)
            applied += 1
    done = 0
    for part in (ours[: len(ours) // 2], ours[len(ours) // 2 :]):
        if part:
            taken = together.apply_together(Events(*zip(*part)))
            done += taken
            if taken < len(part):
                break
    assert done == applied
    assert everything(together) == everything(one_by_one)


ODD: Dict[str, Dict[str, Any]] = {  # what may happen among allocations in the order of import
    "nothing else": {},
    "a report": {"kind": "written"},
    "no device": {"device_id": ""},
    "a device twice": {"device_id": "D0"},
    "a device that holds one": {"device_id": "H0"},
    "a name out of order": {"device_name": "name0000"},
    "a void one": {},
}


@given(
    held=st.integers(0, 2),
    first=st.integers(1, 4),
    second=st.integers(1, 5),
    odd=st.sampled_from(sorted(ODD)),
    place=st.integers(0, 4),
    split=st.booleans(),
)
def test_a_run_of_allocations_in_the_order_of_import_changes_what_each_of_them_changes(
    held: int, first: int, second: int, odd: str, place: int, split: bool
) -> None:
    one_by_one = new_state(7 if split else 20)
    more(one_by_one, 13 if split else 0, batch="another")
    for number in range(held):
        one_by_one.apply(Event("allocate", 1, PK, f"name{number:04d}", f"H{number}", STATION))
    if odd == "nothing else" and place:
        one_by_one.apply(Event("void", 1, PK, f"name{held + first + second + place:04d}"))
    together = copy.deepcopy(one_by_one)
    events = [
        Event("allocate", 5 + turn, PK, f"name{held + turn:04d}", f"D{turn}", f"192.0.2.{turn % 3}")
        for turn in range(first + second)
    ]
    place = min(place, len(events) - 1)
    if odd == "a void one":
        for state in (one_by_one, together):
            state.apply(Event("void", 1, PK, events[place].device_name))
    events[place] = events[place]._replace(**ODD[odd])
    for event in events:
        one_by_one.apply(event)
    in_order: List[bool] = []

    def watched(state: State, product: Product, block: Events) -> bool:
        in_order.append(allocate_in_order(state, product, block))
        return in_order[-1]

    allocate_in_order = State._allocate_in_order
    with mock.patch.object(State, "_allocate_in_order", watched):
        blocks = [[event] for event in events[:1] if held]  # after it the next ones are met in order
        rest = events[len(blocks) :]
        blocks += [block for block in (rest[:first], rest[first:]) if block]
        for block in blocks:
            assert together.apply_together(Events(*map(list, zip(*block)))) == len(block)
    assert everything(together) == everything(one_by_one)
    if odd == "nothing else":
        assert in_order == [not held or bool(turn) for turn in range(len(blocks))]


def test_a_run_of_allocations_keeps_no_second_object_for_a_number() -> None:
    state = new_state(600)  # small numbers are one object anyway
    product = state.products[PK]
    events = [Event("allocate", 1, PK, f"name{number:04d}", f"D{number}") for number in range(600)]
    assert state.apply_together(Events(*map(list, zip(*events)))) == 600
    assert all(product.devices[f"D{number}"] is product.names[f"name{number:04d}"] for number in range(600))


@pytest.mark.parametrize("bound", [("A", "", ""), ("", "A", ""), ("", "", "A")], ids=["first", "between", "last"])
@pytest.mark.parametrize("twice", [False, True], ids=["one import", "around another product"])
def test_a_run_of_allocations_meets_what_is_bound_in_advance_or_is_another_product_s(
    bound: Sequence[str], twice: bool
) -> None:
    one_by_one = State()
    names = [f"name{number:04d}" for number in range(6)]
    imports = [([PK] * 3, names[:3], bound), ([OTHER] * 2, names[3:5], ["", ""]), ([PK] * 3, names[3:], [""] * 3)]
    for keys, some, device_ids in imports if twice else imports[:1]:
        staged = Staged(len(one_by_one.names), "batch")
        staged.add(keys, some, device_ids)
        one_by_one.prepared.append(staged)
        one_by_one.apply(Event("import", 2, detail={}))
    together = copy.deepcopy(one_by_one)
    for some in (names[:4], names[4:]) if twice else (names[:3],):
        events = [Event("allocate", 3, PK, name, f"D-{name}", STATION) for name in some]
        for event in events:
            one_by_one.apply(event)
        assert together.apply_together(Events(*map(list, zip(*events)))) == len(events)
    assert everything(together) == everything(one_by_one)
    assert together.products[PK].counts[UNALLOCATED] == together.products[PK].bound == 0


def test_each_product_is_given_out_in_its_own_order_while_the_other_has_free_ones() -> None:
    state = new_state(3)
    more(state, 4, product=OTHER)

    def give(product: str, device_id: str) -> str:
        _, event = state.decide(Command(REQUEST, product, device_id=device_id, station=STATION), 1000)
        assert event
        state.apply(event)
        assert true_to_itself(state)
        return event.device_name

    assert [give(OTHER, device_id) for device_id in "AB"] == ["name0003", "name0004"]
    assert [give(PK, device_id) for device_id in "ABC"] == ["name0000", "name0001", "name0002"]
    with pytest.raises(PoolExhausted):
        give(PK, "D")
    more(state, 2)
    assert [give(PK, device_id) for device_id in "DE"] == ["name0007", "name0008"]
    assert [give(OTHER, device_id) for device_id in "CD"] == ["name0005", "name0006"]
    with pytest.raises(PoolExhausted):
        give(OTHER, "E")


def test_certificates_that_are_given_out_in_order_are_met_without_a_look_up_also_after_a_gap() -> None:
    class Names(Dict[str, int]):
        looked_up = 0

        def __getitem__(self, name: str) -> int:
            Names.looked_up += 1
            return super().__getitem__(name)

    state = new_state(8)
    product = state.products[PK]
    product.names = Names(product.names)
    product.restart()
    for numbers, looks in (((0, 1, 2), 0), ((3, 5, 6), 1), ((4, 7), 2)):
        events = [Event("allocate", 1, PK, f"name{number:04d}", f"D{number}") for number in numbers]
        assert state.apply_together(Events(*zip(*events))) == len(numbers)
        assert Names.looked_up == looks
    assert product.counts[ALLOCATED] == 8


@pytest.mark.parametrize(
    "odd",
    [Event("written", 2, OTHER, NAME, "B"), Event("reveal", 2, PK, NAME), Event("written", 2, "a1Unknown", NAME)],
    ids=["another product", "a kind that changes nothing", "an unknown product"],
)
def test_events_that_differ_in_kind_or_product_are_not_applied_together(odd: Event) -> None:
    state = new_state()
    more(state, 1, product=OTHER)
    before = copy.deepcopy(state)
    for events in ([Event("allocate", 1, PK, NAME, "A"), odd], [odd, Event("allocate", 1, PK, NAME, "A")], [odd]):
        together = Events(*zip(*events))
        if len(events) > 1 or odd.product_key != OTHER:
            assert state.apply_together(together) == 0
    assert everything(state) == everything(before)


def test_what_was_done_in_a_turn_is_taken_back_exactly() -> None:
    state = new_state(4)
    for device_id in "ABCD":
        do(state, REQUEST, device_id=device_id)
    for name in ("name0002", "name0000", "name0001"):
        do(state, RELEASE, device_name=name)
    before = snapshot(state)
    steps = [
        do(state, MAKE_VOID, device_name="name0000"),  # stands in the middle of the released ones
        do(state, REQUEST, device_id="E"),  # takes the first of them, and skips the void one
        do(state, RELEASE, device_name="name0003"),
        do(state, REQUEST, device_id="F"),
        do(state, BURN_SUCCEEDED, device_id="F"),
        do(state, REQUEST, device_id="F"),
        do(state, REQUEST, device_id="G"),
    ]
    assert true_to_itself(state)
    undo(state, steps)
    assert snapshot(state) == before
    assert true_to_itself(state)


# -- everything together, against a model ------------------------------------------------------------------------------


class Model:
    """What a store must hold, written down as the contract's table reads."""

    def __init__(self) -> None:
        self.certificates: List[Tuple[str, str, str]] = []  # product, name, device that it was bound to in advance
        self.records: List[Record] = []
        self.fresh: Dict[str, List[int]] = {}
        self.returned: Dict[str, List[int]] = {}
        self.batches: List[Tuple[int, str]] = []

    def snapshot(self) -> Dict[str, Any]:
        """The same as `snapshot` of a State, but for the sources."""
        products = {}
        for key, fresh in self.fresh.items():
            own = [number for number, (product, _, _) in enumerate(self.certificates) if product == key]
            products[key] = {
                "names": {self.certificates[number][1]: number for number in own},
                "devices": {self.records[number].device_id: number for number in own if self.records[number].device_id},
                "counts": [sum(self.records[number].status == status for number in own) for status in range(5)],
                "free": fresh + self.returned[key],
            }
        names = [name for _, name, _ in self.certificates]
        return {"products": products, "records": self.records, "names": names, "batches": self.batches}

    def named(self, product: str, name: str) -> Optional[int]:
        found = [n for n, (key, other, _) in enumerate(self.certificates) if (key, other) == (product, name)]
        return found[0] if found else None

    def held(self, product: str, device_id: str) -> Optional[int]:
        records = enumerate(self.records)
        found = [n for n, old in records if self.certificates[n][0] == product and old.device_id == device_id]
        assert len(found) <= 1, "a device holds one certificate of a product"
        return found[0] if found else None

    def add(self, product: str, name: str, bound: str) -> str:
        """Import a row: "new", "duplicate" or "rejected"."""
        there = self.named(product, name)
        if there is not None:
            return "duplicate" if self.certificates[there][2] == bound else "rejected"
        if bound and self.held(product, bound) is not None:
            return "rejected"
        self.fresh.setdefault(product, [])
        self.returned.setdefault(product, [])
        if not bound:
            self.fresh[product].append(len(self.certificates))
        self.certificates.append((product, name, bound))
        self.records.append(Record(UNALLOCATED, bound))
        return "new"

    def request(self, product: str, device_id: str, now: int) -> Outcome:
        if product not in self.fresh:
            return UnknownProduct
        number = self.held(product, device_id)
        if number is None:
            free = self.fresh[product] or self.returned[product]
            if not free:
                return PoolExhausted
            number = free.pop(0)
        old = self.records[number]
        if old.status == VOID:
            return Voided
        if old.status == WRITTEN:
            self.records[number] = old._replace(rerequests=old.rerequests + 1)
        elif old.status != ALLOCATED:
            self.records[number] = Record(ALLOCATED, device_id, STATION, now, 0, old.rerequests)
        return self.certificates[number][1]

    def report(self, product: str, device_id: str, burned: bool, now: int) -> Outcome:
        if product not in self.fresh:
            return UnknownProduct
        number = self.held(product, device_id)
        if number is None or self.records[number].status == UNALLOCATED:
            return UnknownDevice
        old = self.records[number]
        if old.status == VOID:
            return Voided
        if burned and old.status != WRITTEN:
            self.records[number] = old._replace(status=WRITTEN, written_at=now)
        if not burned:
            self.records[number] = old._replace(status=FAILED, written_at=0)
        return self.certificates[number][1]

    def release(self, product: str, name: str, force: bool) -> Outcome:
        number = self.named(product, name)
        if number is None:
            return Refused
        old = self.records[number]
        if old.status in (UNALLOCATED, VOID) or (old.status == WRITTEN and not force):
            return Refused
        self.records[number] = Record(UNALLOCATED, rerequests=old.rerequests)
        self.returned[product].append(number)
        return name

    def void(self, product: str, name: str) -> Outcome:
        number = self.named(product, name)
        if number is None:
            return Refused
        for free in (self.fresh[product], self.returned[product]):
            if number in free:
                free.remove(number)
        self.records[number] = self.records[number]._replace(status=VOID)
        return name


PRODUCTS = st.sampled_from([PK, PK, OTHER])
DEVICES = st.sampled_from(["A", "B", "C", "D", "E"])
NAMES = st.integers(0, 9).map("name{:04d}".format)
ROWS = st.lists(st.tuples(PRODUCTS, NAMES, st.just("") | st.just("") | DEVICES), min_size=1, max_size=8)
FAULTS: Dict[str, Dict[str, str]] = {
    "no write": {"write": RAISE},
    "half a write": {"write": SHORT},
    "no write, no cut": {"write": RAISE, "ftruncate": RAISE},
    "half a write, no cut": {"write": SHORT, "ftruncate": RAISE},
    "no sync": {"fsync": RAISE},
}


class Line(RuleBasedStateMachine):
    """A line at work: requests, reports, operators, imports; the disk fails, the power fails."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.faults: Dict[str, str] = {}
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(certtool, "os", Disk(lambda call: self.faults.get(call, "")))
        self.now = 1000
        self.stopped = False  # nothing can be recorded until a restart
        self.turn = [Model()]  # the last durable state, and the state after each event since then
        self.after_restart: Optional[List[Model]] = None  # what a failed disk may hold, if not what was durable
        self.opened: Opened = open_store(self.folder)

    def teardown(self) -> None:
        self.opened.store.close()
        self.patch.undo()
        shutil.rmtree(self.folder)

    @property
    def model(self) -> Model:
        return self.turn[-1]

    def expect(self, expected: Outcome, then: Model, act: Callable[[], str]) -> None:
        """Do what the model did: it has the same outcome, or is refused because nothing can be recorded."""
        recorded = then.snapshot() != self.model.snapshot()
        if recorded and self.stopped:
            expected = StoreUnavailable
        elif recorded:
            self.turn.append(then)
        try:
            outcome: Outcome = act()
        except CertToolError as error:
            outcome = type(error)
        assert outcome == expected

    @rule(product=PRODUCTS, device_id=DEVICES)
    def request(self, product: str, device_id: str) -> None:
        self.now += 1
        then = copy.deepcopy(self.model)
        expected = then.request(product, device_id, self.now)

        def act() -> str:
            allocation = self.opened.service.request(product, device_id, STATION, self.now)
            name = allocation.certificate.credential.device_name
            assert allocation.certificate.credential.device_secret == f"secret-{name}"
            assert allocation.device_id == device_id
            return name

        self.expect(expected, then, act)

    @rule(product=PRODUCTS)
    def request_without_an_id(self, product: str) -> None:
        self.now += 1
        made_up = f"auto-{self.now}"
        then = copy.deepcopy(self.model)
        expected = then.request(product, made_up, self.now)

        def act() -> str:
            allocation = self.opened.service.request(product, "", STATION, self.now)
            assert allocation.device_id == made_up
            return allocation.certificate.credential.device_name

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(certtool, "_made_up_id", lambda product: made_up)
            self.expect(expected, then, act)

    @rule(product=PRODUCTS, device_id=DEVICES, burned=st.booleans())
    def report(self, product: str, device_id: str, burned: bool) -> None:
        self.now += 1
        then = copy.deepcopy(self.model)
        expected = then.report(product, device_id, burned, self.now)
        verb = BURN_SUCCEEDED if burned else BURN_FAILED
        act = self.opened.service.report
        self.expect(expected, then, lambda: act(product, device_id, verb, STATION, self.now)[0])

    @rule(product=PRODUCTS, name=NAMES, verb=st.sampled_from([RELEASE, RELEASE, MAKE_VOID]), force=st.booleans())
    def operate(self, product: str, name: str, verb: int, force: bool) -> None:
        then = copy.deepcopy(self.model)
        expected = then.release(product, name, force) if verb == RELEASE else then.void(product, name)
        act = self.opened.service.operate
        self.expect(
            expected, then, lambda: act(verb, name, product, "scrap", "me", force, self.now)[0].partition(" ")[0]
        )

    @rule(rows=ROWS, skip_bad=st.booleans())
    def import_rows(self, rows: List[Tuple[str, str, str]], skip_bad: bool) -> None:
        then = copy.deepcopy(self.model)
        results = [then.add(*row) for row in rows]
        new, ok = results.count("new"), skip_bad or "rejected" not in results
        credentials = [Credential(key, name, f"secret-{name}", device_id=bound) for key, name, bound in rows]
        how = certtool.ImportOptions(batch=f"batch{self.now}", skip_bad=skip_bad)
        if new and ok and self.stopped:
            with pytest.raises(StoreUnavailable):
                import_files(self.opened.service, upload(credentials), how=how)
            return
        report = import_files(self.opened.service, upload(credentials), how=how)
        assert (report.ok, report.read, report.imported) == (ok, len(rows), new if ok else 0)
        assert (report.duplicates, report.rejected) == (results.count("duplicate"), results.count("rejected"))
        if ok:
            if new:
                then.batches.append((len(self.model.certificates), how.batch))
            self.turn = [then if new else self.model]

    @rule(fault=st.sampled_from(["", "", *FAULTS]))
    def commit(self, fault: str) -> None:
        self.faults = FAULTS.get(fault, {})
        if len(self.turn) > 1 and fault:
            with pytest.raises(StoreUnavailable):
                self.opened.service.commit()
            if fault == "half a write, no cut":
                self.after_restart = self.turn
            elif fault == "no sync":
                self.after_restart = self.turn[-1:]
            self.stopped = "no cut" in fault or fault == "no sync"
            self.turn = self.turn[:1]
        else:
            self.opened.service.commit()
            self.turn = self.turn[-1:]
        self.faults = {}

    @rule()
    def restart(self) -> None:
        self.opened.store.close()
        self.opened = open_store(self.folder)
        found = known(self.opened.state)
        self.turn = next([model] for model in self.after_restart or self.turn[:1] if model.snapshot() == found)
        self.stopped, self.after_restart = False, None

    @invariant()
    def the_state_is_the_models(self) -> None:
        assert known(self.opened.state) == self.model.snapshot()
        for product in self.opened.state.products.values():
            assert product.total == len(product.names)
        assert true_to_itself(self.opened.state)

    @invariant()
    def what_a_restart_would_find_is_what_was_committed(self) -> None:
        if not self.stopped:
            found = read_store(self.folder)
            assert known(found.state) == self.turn[0].snapshot()
            for text in ("name0000", "name0001", "A", "B"):
                assert rows_about(read_store(self.folder, text), text) == rows_about(found, text)


def known(state: State) -> Dict[str, Any]:
    """The state's snapshot, but for the sources, which are no matter of the model."""
    found = snapshot(state)
    del found["sources"]
    return found


Line.TestCase.settings = settings(max_examples=50, stateful_step_count=40)
TestALineAtWork = Line.TestCase
