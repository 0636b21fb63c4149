"""The virtual environments of `python -m tests` and `python -m bench`: pinned tools that nothing else sees."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(name: str) -> Path:
    """Return the Python of `.venv-NAME-X.Y`, which is made anew when NAME/requirements.txt changes."""
    requirements = ROOT / name / "requirements.txt"
    folder = ROOT / ".venv-{}-{}.{}".format(name, *sys.version_info[:2])
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    installed = folder / requirements.name
    if python.exists() and installed.exists() and installed.read_bytes() == requirements.read_bytes():
        return python
    print(f"== Making {folder.name}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "--requirement", str(requirements)], check=True)
    except subprocess.CalledProcessError:
        sys.exit("The tools were not installed: see above. On Debian `apt-get install python3-venv`, then try again.")
    shutil.copy(requirements, installed)
    return python
