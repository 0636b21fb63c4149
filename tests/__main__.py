"""`python -m tests [pytest arguments]`: every check of the project, from a clone with nothing but CPython and pip.

The tools live in `.venv-tests-X.Y`, made anew when tests/requirements.txt changes. All steps run even if one fails; the
exit code is 1 if any did. Without arguments, all tests together must also reach MIN_COVERAGE.
"""

from __future__ import annotations

import subprocess
import sys
from typing import List

from tests.environment import ROOT, environment

MIN_COVERAGE = 95  # percent of certtool.py's lines and branches


def main(pytest_arguments: List[str]) -> int:
    """Run every step and return 1 if any failed; pytest comes last, so that its closing line closes the output."""
    python = environment("tests")

    def passes(*command: str) -> bool:
        print("==", *command, flush=True)
        return subprocess.run([python, *command], cwd=ROOT, check=False).returncode == 0

    if not passes("build_ext.py"):
        print("The C extension was not built: certtool.py is tested with its pure-Python CRC32.", flush=True)
    sources = ["certtool.py", "build_ext.py", "tests", "bench"]
    coverage = ["--cov", "--cov-config=pyproject.toml", "--cov-report=term-missing"]  # of subprocesses too
    if not pytest_arguments:
        coverage += [f"--cov-fail-under={MIN_COVERAGE}", "--numprocesses=2", "--dist=loadfile"]
    steps = [
        ["-m", "ruff", "check", "."],
        ["-m", "ruff", "format", "--check", "."],
        *(["-m", "mypy", f"--platform={p}", f"--cache-dir=.mypy_cache/{p}", *sources] for p in ("linux", "win32")),
        ["-m", "pytest", *coverage, *pytest_arguments],
    ]
    failed = [step for step in steps if not passes(*step)]
    for step in failed:
        print("Failed:", *step[1:], file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
