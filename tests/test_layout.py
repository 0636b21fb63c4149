"""certtool.py keeps the layout that it promises, and the checker of that notices every way to break it."""

from __future__ import annotations

from typing import Optional, Sequence, Tuple

import pytest

from tests.layout import faults
from tests.support import CERTTOOL

BAR = "# " + "=" * 20
STORE = ("Store", "class Store:\n    def read(self) -> List[str]:\n        return os.listdir('.')")


def module(*sections: Tuple[str, str], listed: Optional[Sequence[str]] = None) -> str:
    """Return a module of sections (title, code) numbered from 2, whose map lists them, or what is `listed` instead."""
    titles = [f"{number}. {title}" for number, (title, _) in enumerate(sections, 2)]
    return "\n".join(
        [
            '"""Map:\n',
            *(f"    {title}" for title in (listed or titles)),
            '"""',
            "from __future__ import annotations",
            "import datetime, os, time as clock",
            "from typing import List",
            *(f"{BAR}\n# {title}\n{BAR}\n{code}" for title, (_, code) in zip(titles, sections)),
        ]
    )


def test_every_section_of_certtool_uses_only_those_above_it_and_the_pure_ones_touch_nothing() -> None:
    assert "\n".join(faults(CERTTOOL.read_text(encoding="utf-8"))) == ""


@pytest.mark.parametrize(
    "pure",
    [
        "def double(store: int) -> int:\n    Store = store\n    return Store * 2",
        "class Rule:\n    Store = 5\n    twice = Store * 2",
        "LIMIT = clocks = 5",
        "def moment(now: datetime.datetime) -> str:\n    return now.isoformat()",
    ],
)
def test_a_file_that_keeps_the_layout_has_no_faults(pure: str) -> None:
    assert faults(module(("Rules (pure)", pure), STORE)) == []


@pytest.mark.parametrize(
    "code",
    [
        "def load():\n    return Store()",
        "def load(store: Store): ...",
        "def load() -> List[Store]: ...",
        "def load():\n    store: Store = None",
        "load = lambda: Store()",
        "class Cache(Store): ...",
        "class Cache:\n    store: Store",
        "class Cache:\n    def load(self):\n        return [Store() for _ in range(2)]",
        "if os.sep:\n    store = Store",
    ],
)
def test_a_name_of_a_section_below_is_found_wherever_it_stands(code: str) -> None:
    (fault,) = faults(module(("Cache", code), STORE))
    assert fault.endswith("section 2, uses Store of section 3 below it.")


@pytest.mark.parametrize(
    ("pure", "impure"),
    [
        ("import socket", "socket"),
        ("def f():\n    import socket", "socket"),
        ("def f():\n    from urllib.request import urlopen", "urllib"),
        ("def f():\n    return os.getpid()", "os"),
        ("def f():\n    return clock.time()", "clock"),
        ("def f(path):\n    return open(path)", "open"),
        ("def f(path):\n    return path.open()", ".open"),
        ("class A:\n    def f(self):\n        print(self)", "print"),
        ("def f():\n    return datetime.datetime.now()", ".now"),
        ("FOLDER = os.getcwd()", "os"),
    ],
)
def test_a_pure_section_that_is_not_pure_is_found(pure: str, impure: str) -> None:
    (fault,) = faults(module(("Rules (pure)", pure), STORE))
    assert fault.endswith(f"section 2 (pure), uses {impure}.")


def test_a_pure_section_may_not_reach_the_system_through_others_either() -> None:
    helpers = ("Helpers", "def outer():\n    return inner()\n\ndef inner():\n    return os.getpid()")
    (fault,) = faults(module(helpers, ("Rules (pure)", "def f():\n    return outer()")))
    assert fault.endswith("section 3 (pure), uses os through inner.")


def test_a_pure_section_may_use_a_constant_that_was_computed_from_the_system() -> None:
    assert faults(module(("Limits", "LIMIT = os.cpu_count()"), ("Rules (pure)", "def f():\n    return LIMIT"))) == []


@pytest.mark.parametrize(
    ("listed", "fault"),
    [
        (["2. Cache"], "The map lacks section 3, Store."),
        (["2. Cache     3. Store", "4. Page"], "The map lists section 4, Page, which does not exist."),
    ],
)
def test_a_map_that_differs_from_the_sections_is_found(listed: Sequence[str], fault: str) -> None:
    assert faults(module(("Cache", ""), STORE, listed=listed)) == [fault]


def test_sections_out_of_order_are_found() -> None:
    assert faults(module(STORE).replace("2. Store", "5. Store")) == ["The sections are numbered [5], not from 2 on."]
