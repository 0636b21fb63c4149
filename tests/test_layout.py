"""certtool.py keeps the layout that it promises, and the checker of that notices every way to break it."""

from __future__ import annotations

import pytest

from tests.layout import faults
from tests.support import CERTTOOL

BAR = "# " + "=" * 20


def source(pure: str = "", later: str = "", between: str = "", listed: str = "    2. Rules (pure)   4. Store\n") -> str:
    """Return a small module of three sections that keeps the layout, but for what is put into it."""
    return f'''"""Map:

{listed}    3. Checks
"""

from __future__ import annotations

import datetime
import os
import time as clock
from typing import List

{BAR}
# 2. Rules (pure)
{BAR}

LIMIT = 5

{pure}

{BAR}
# 3. Checks
{BAR}

{between}

{BAR}
# 4. Store
{BAR}


class Store:
    def read(self) -> List[str]:
        return os.listdir(".")[:LIMIT]

{later}
'''


def test_every_section_of_certtool_uses_only_those_above_it_and_the_pure_ones_touch_nothing() -> None:
    assert faults(CERTTOOL.read_text(encoding="utf-8")) == []


def test_a_file_that_keeps_the_layout_has_no_faults() -> None:
    assert faults(source(pure="def double(store: int) -> int:\n    Store = store\n    return Store * 2")) == []


@pytest.mark.parametrize(
    "between",
    [
        "def load():\n    return Store()",
        "def load(store: Store): ...",
        "def load() -> List[Store]: ...",
        "class Cache(Store): ...",
        "class Cache:\n    def load(self):\n        return [Store() for _ in range(2)]",
        "class Cache:\n    store: Store",
        "def load():\n    store: Store = None",
        "load = lambda: Store()",
        "if LIMIT:\n    store = Store",
    ],
)
def test_a_name_of_a_section_below_is_found_wherever_it_stands(between: str) -> None:
    (fault,) = faults(source(between=between))
    assert fault.endswith("section 3, uses Store of section 4 below it.")


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
    found = faults(source(pure=pure))
    assert found
    assert all(fault.endswith(f"section 2 (pure), uses {impure}.") for fault in found), found


def test_a_pure_section_may_not_reach_the_system_through_others_either() -> None:
    helpers = (
        f"{BAR}\n# 2. Helpers\n{BAR}\n\ndef outer():\n    return inner()\n\ndef inner():\n    return os.getpid()\n"
    )
    module = source(pure="def f():\n    return outer()", listed="    2. Helpers\n    3. Rules (pure)   5. Store\n")
    module = module.replace("    3. Checks", "    4. Checks")
    for old, title in ((4, "Store"), (3, "Checks"), (2, "Rules (pure)")):
        module = module.replace(f"# {old}. {title}", f"# {old + 1}. {title}")
    module = module.replace(f"{BAR}\n# 3.", f"{helpers}\n{BAR}\n# 3.", 1)
    (fault,) = faults(module)
    assert fault.endswith("section 3 (pure), uses os through inner.")


@pytest.mark.parametrize(
    ("listed", "fault"),
    [
        ("    2. Rules (pure)\n", "The map lacks section 4, Store."),
        ("    2. Rules (pure)   4. Store\n    5. Page\n", "The map lists section 5, Page, which does not exist."),
    ],
)
def test_a_map_that_differs_from_the_sections_is_found(listed: str, fault: str) -> None:
    assert faults(source(listed=listed)) == [fault]


def test_sections_out_of_order_are_found() -> None:
    module = source().replace("# 3. Checks", "# 5. Checks").replace("    3. Checks", "    5. Checks")
    assert faults(module) == ["The sections are numbered [2, 5, 4], not from 2 on."]
