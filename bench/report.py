"""Results as text and as Markdown, the machine that they came from, and growth curves as SVG."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Iterator, List, Sequence, Tuple
from xml.etree.ElementTree import Element

from bench.rig import Curves, Goal, Part, Table, number, workplace

RESULTS = "RESULTS.md"
COLORS = ("#555555", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")


def as_text(part: Part) -> str:
    """Write a part for the terminal."""
    lines = [part.title, part.text]
    for table in part.tables:
        lines += ["", table.title, *_aligned([table.head, *table.rows])]
    if part.goals:
        lines += ["", "Goals", *_aligned([_goal_cells(goal) for goal in part.goals])]
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        yield "  ".join(cells).rstrip()


def _goal_cells(goal: Goal) -> Tuple[str, str, str, str]:
    limit = f"{'at least' if goal.at_least else 'at most'} {goal.limit:g}"
    verdict = "holds" if goal.holds else "does not hold"
    return goal.what + (" (stretch)" if goal.stretch else ""), limit, number(goal.measured), verdict


def markdown_table(table: Table) -> str:
    """Write a table with its title above it; all columns but the first are set right."""
    lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
    cells = ((cell.replace("|", "\\|") for cell in line) for line in lines)
    return f"**{table.title}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in cells)


def markdown(parts: Sequence[Part], facts: Sequence[Tuple[str, str]]) -> str:
    """Write the page: goals first, then the machine, then each part's tables and curves."""
    goals = [_goal_cells(goal) for part in parts for goal in part.goals]
    blocks = [
        "# Results\n",
        "Written by `python -m bench`. All that is compared ran in turn in one run on one machine; figures are medians "
        "of the rounds, ratios medians of each round's ratio; a goal's peak memory is the highest of the rounds. Only "
        "the ratios mean anything on another machine.\n",
        "## Goals\n",
        markdown_table(Table("Measured beside the goals", ("goal", "limit", "measured", ""), goals)),
        "## Machine\n",
        markdown_table(Table("Where and with what", ("", ""), facts)),
    ]
    for part in parts:
        blocks += [f"## {part.title}\n", part.text + "\n", *map(markdown_table, part.tables)]
        blocks += [f"![{curves.title}](growth-{curves.name}.svg)\n" for curves in part.curves]
    return "\n".join(blocks)


def write(folder: Path, parts: Sequence[Part], facts: Sequence[Tuple[str, str]]) -> None:
    """Write RESULTS.md and its curves."""
    folder.mkdir(parents=True, exist_ok=True)
    for curves in (curves for part in parts for curves in part.curves):
        draw(curves, folder / f"growth-{curves.name}.svg")
    (folder / RESULTS).write_text(markdown(parts, facts), encoding="utf-8")


def draw(curves: Curves, path: Path) -> None:
    """Draw curves over sizes that are powers of ten, both axes logarithmic: what grows linearly is a straight line."""
    import pygal  # noqa: PLC0415 - only a run that writes needs it
    from pygal.style import CleanStyle  # noqa: PLC0415

    style = CleanStyle(colors=COLORS, title_font_size=16, legend_font_size=12, label_font_size=12)
    size = {"explicit_size": True, "width": 760, "height": 460, "margin_right": 50}
    legend = {"legend_at_bottom": True, "legend_at_bottom_columns": 2, "truncate_legend": -1}
    chart = pygal.Line(logarithmic=True, title=curves.title, style=style, no_prefix=True, **size, **legend)
    chart.x_labels = [f"{size:,}" for size in curves.sizes]
    exponents = [math.log10(figure) for figures in curves.series.values() for figure in figures]
    chart.y_labels = [10.0**power for power in range(math.floor(min(exponents)), math.ceil(max(exponents)) + 1)]
    for name, figures in curves.series.items():
        chart.add(name, figures)
    chart.add_xml_filter(_without_scripts)
    path.write_bytes(chart.render())


def _without_scripts(svg: Element) -> Element:
    """Take out what would need the network, and the configuration, which names folders of this machine."""
    for parent in list(svg.iter()):
        for script in parent.findall("script"):
            parent.remove(script)
    return svg


def machine() -> List[Tuple[str, str]]:
    """Return what the figures depend on, and nothing that tells whose machine it is."""
    if sys.platform == "win32":
        raise NotImplementedError
    model = re.search(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    system = re.search(r'^PRETTY_NAME="?(.*?)"?$', _read("/etc/os-release"), re.MULTILINE)
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    return [
        ("date", date.today().isoformat()),  # noqa: DTZ011 - the day where the run was made
        ("processor", f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores"),
        ("system", f"{system[1] if system else platform.system()}, Linux {platform.release()}"),
        ("load average before the run", load),
        ("one write and fsync on this disk", f"{fsync_milliseconds():.2f} ms"),
        ("Python", platform.python_version()),
        ("SQLite", sqlite3.sqlite_version),
        *((name, _installed(name)) for name in ("Flask", "waitress")),
        ("Node.js", _version("node", "--version")),
        ("wrk", _version("wrk", "--version")),
    ]


def fsync_milliseconds() -> float:
    """Return how long it takes here to make a line durable: the median of many times."""
    times = []
    with workplace() as folder, open(folder / "journal", "wb", buffering=0) as file:
        for _ in range(200):
            began = time.perf_counter()
            file.write(b"x" * 120)
            os.fsync(file.fileno())
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _installed(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _version(*command: str) -> str:
    if not shutil.which(command[0]):
        return "not installed"
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # wrk says it, and exits with 1
    found = re.search(r"\d[\w.+-]*", done.stdout or done.stderr)
    return found[0] if found else "unknown"
