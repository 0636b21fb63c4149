"""Checks the layout that certtool.py promises, from its banners and from what its top-level statements compile to.

- A section uses no name that is defined in a section below it.
- A section whose title ends in "(pure)" imports and uses nothing that touches files, sockets, clocks, threads or the
  console, also not through a function of another section that it names.
- The map in the module's docstring lists exactly the sections.

Not seen: what is reached through an attribute of an object alone (`store.read()`), since its class is not known here.
"""

from __future__ import annotations

import ast
import dis
import re
import types
from typing import Dict, Iterator, List, NamedTuple, Set, Tuple

BANNER = re.compile(r"^# =+\n# (\d+)\. (.+)\n# =+$", re.MULTILINE)
MAP_LINE = re.compile(r"^ +\d+\. .*$", re.MULTILINE)
MAP_ENTRY = re.compile(r"(\d+)\. (\S.*?)(?=  |$)")

PURE = "(pure)"
PURE_MODULES = set(
    """__future__ array base64 binascii bisect codecs collections contextlib csv dataclasses datetime enum functools
    hashlib hmac io itertools json math operator re string struct typing unicodedata""".split()
)
IMPURE_BUILTINS = {"__import__", "breakpoint", "eval", "exec", "input", "open", "print"}
IMPURE_ATTRIBUTES = {"now", "open", "today", "utcnow"}  # datetime.now, io.open, date.today


class Section(NamedTuple):
    """A section of the file: `line` is where its banner starts. What stands above all banners is section 1."""

    number: int
    title: str
    line: int


class Uses(NamedTuple):
    """The global names, attributes and modules that code mentions."""

    names: Set[str]
    attributes: Set[str]
    modules: Set[str]


class Statement:
    """One statement of the module: its section, the names it defines, what it mentions, now and when it is called."""

    def __init__(self, node: ast.stmt, section: Section) -> None:
        # Without the module's `from __future__ import annotations`, so that annotations count as uses.
        code = compile(ast.Module([node], []), "certtool.py", "exec", dont_inherit=True)
        nested = list(_nested(code))
        self.section = section
        self.pure = section.title.endswith(PURE)
        self.line = node.lineno
        self.defines = _stored(code)
        self.calls = _uses(nested)
        self.uses = _uses([code, *nested])
        for annotation in (inner.annotation for inner in ast.walk(node) if isinstance(inner, ast.AnnAssign)):
            self.uses.names.update(inner.id for inner in ast.walk(annotation) if isinstance(inner, ast.Name))


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _nested(constant)


def _stored(code: types.CodeType) -> Set[str]:
    return {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_NAME"}


def _uses(codes: List[types.CodeType]) -> Uses:
    uses = Uses(set(), set(), set())
    for code in codes:
        own = _stored(code) if code.co_name != "<module>" else set()  # the names of a class body
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_NAME", "LOAD_GLOBAL") and step.argval not in own:
                uses.names.add(step.argval)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                uses.attributes.add(step.argval)
            elif step.opname == "IMPORT_NAME":
                uses.modules.add(step.argval.partition(".")[0])
    return uses


def sections(source: str) -> List[Section]:
    """Return the sections that have a banner, in the order of the file."""
    return [
        Section(int(banner[1]), banner[2], source.count("\n", 0, banner.start()) + 1)
        for banner in BANNER.finditer(source)
    ]


def faults(source: str) -> List[str]:
    """Return one sentence for each breach of the layout, none for a file that keeps it."""
    module = ast.parse(source)
    found = sections(source)
    above = Section(1, "what stands above all banners", 1)
    statements = [
        Statement(node, max((s for s in found if s.line <= node.lineno), key=lambda s: s.line, default=above))
        for node in module.body
    ]
    return [
        *_map_faults(ast.get_docstring(module, clean=False) or "", found),
        *_order_faults(statements),
        *_purity_faults(statements, _imports(module)),
    ]


def _map_faults(docstring: str, found: List[Section]) -> Iterator[str]:
    numbers = [section.number for section in found]
    if numbers != list(range(2, 2 + len(found))):
        yield f"The sections are numbered {numbers}, not from 2 on."
    listed = {(int(n), title) for line in MAP_LINE.findall(docstring) for n, title in MAP_ENTRY.findall(line)}
    actual = {(section.number, section.title) for section in found}
    for number, title in sorted(listed ^ actual):
        yield (
            f"The map lacks section {number}, {title}."
            if (number, title) in actual
            else (f"The map lists section {number}, {title}, which does not exist.")
        )


def _order_faults(statements: List[Statement]) -> Iterator[str]:
    home: Dict[str, Section] = {}
    for statement in statements:
        for name in statement.defines:
            home.setdefault(name, statement.section)
    for statement in statements:
        for name in sorted(statement.uses.names & home.keys()):
            if home[name].line > statement.section.line:
                yield (
                    f"Line {statement.line}, section {statement.section.number}, uses {name}"
                    f" of section {home[name].number} below it."
                )


def _imports(module: ast.Module) -> Dict[str, str]:
    """Return what each imported name of the module comes from: {"quote": "json"}."""
    origin = {}
    for node in (node for statement in module.body for node in ast.walk(statement)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                origin[alias.asname or root] = root
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                origin[alias.asname or alias.name] = (node.module or "").partition(".")[0]
    return origin


def _purity_faults(statements: List[Statement], origin: Dict[str, str]) -> Iterator[str]:
    definers: Dict[str, List[Statement]] = {}
    for statement in statements:
        for name in statement.defines - origin.keys():
            definers.setdefault(name, []).append(statement)
    for statement in statements:
        if not statement.pure:
            continue
        # From the statement on to what runs when the names it mentions are called; other pure ones are checked anyway.
        queue: List[Tuple[str, Uses]] = [("", statement.uses)]
        seen: Set[str] = set()
        while queue:
            path, uses = queue.pop()
            for impure in sorted(_impure(uses, origin, definers)):
                yield f"Line {statement.line}, section {statement.section.number} {PURE}, uses {impure}{path}."
            for name in sorted((uses.names & definers.keys()) - seen):
                seen.add(name)
                queue += [(f" through {name}", definer.calls) for definer in definers[name] if not definer.pure]


def _impure(uses: Uses, origin: Dict[str, str], definers: Dict[str, List[Statement]]) -> Set[str]:
    imported = {name for name in uses.names & origin.keys() if origin[name] not in PURE_MODULES}
    builtin = (uses.names & IMPURE_BUILTINS) - definers.keys()
    attributes = {f".{name}" for name in uses.attributes & IMPURE_ATTRIBUTES}
    return imported | builtin | attributes | (uses.modules - PURE_MODULES)
