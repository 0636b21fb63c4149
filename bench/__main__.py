"""`python -m bench`: certtool beside its peers, all in turn in one run; writes bench/RESULTS.md and its growth curves.

The peers and what draws live in `.venv-bench-X.Y`, made anew when bench/requirements.txt changes. wrk makes the load,
and Node.js is a peer where it is installed. A run with --quick or --only is printed, and written only with --output.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import List, Optional

from bench import crc, pages, report, scale, serve
from bench.rig import NORMAL, ROOT, THOROUGH, Effort, efforts, interruptible, need_wrk, progress
from tests.environment import environment

PARTS = {"serve": serve.measure, "scale": scale.measure, "pages": pages.measure, "crc": crc.measure}
LOADED = {"serve", "pages"}  # by wrk


def parse(arguments: List[str]) -> argparse.Namespace:
    """Return effort, parts and, where results are to be written, the folder."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=str(__doc__).partition("\n")[0])
    efforts(parser)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="NAME", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where RESULTS.md goes (default: bench)")
    options = parser.parse_args(arguments)
    if options.output is None and options.only is None and options.effort in (NORMAL, THOROUGH):
        options.output = ROOT / "bench"
    return options


def in_environment(arguments: List[str]) -> None:
    """Go on as the Python that has the pinned tools, with the C extension built."""
    python = environment("bench")
    if Path(sys.prefix) == python.parent.parent:
        return
    if subprocess.run([python, "build_ext.py"], cwd=ROOT, check=False).returncode:
        progress("The C extension was not built: certtool.py is measured with its pure-Python CRC32.")
    os.chdir(ROOT)
    os.execv(python, [str(python), "-m", "bench", *arguments])


def measure(effort: Effort, names: List[str], output: Optional[Path]) -> int:
    """Measure parts, print them, and write them if there is a folder to write to."""
    if LOADED.intersection(names):
        need_wrk()
    facts = report.machine()  # first, while the machine is as idle as it was found
    parts = []
    for name in names:
        parts.append(PARTS[name](effort))
        print(report.as_text(parts[-1]), end="\n\n", flush=True)
    if output:
        report.write(output, parts, facts)
        print(f"Written: {output / report.RESULTS}")
    return 0


def main(arguments: List[str]) -> int:
    """Run what the options say."""
    options = parse(arguments)
    in_environment(arguments)
    return measure(options.effort, options.only or list(PARTS), options.output)


if __name__ == "__main__":
    interruptible(lambda: main(sys.argv[1:]))
