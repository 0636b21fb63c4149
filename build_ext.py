#!/usr/bin/env python3
"""Build the C extension that makes certtool's checksums many times faster.

    python build_ext.py             puts _certtool_crc32 beside certtool.py, which takes it from its next start on
    pip install '.[accel]'          does the same for an installed certtool, and installs the cffi that it needs

Needed here: cffi, setuptools and a C compiler. Needed to run it: cffi, and any CPython from 3.8 on, since it is built
for the stable ABI. Without it certtool computes the same checksums in Python.

For pip this is the build backend that pyproject.toml names: setuptools with the extension added. Where that cannot be
compiled pip installs certtool without it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional

MISSING = ""
try:
    import setuptools
    from setuptools import build_meta
except ImportError:
    MISSING = "setuptools"
try:
    import cffi
except ImportError:  # also while pip asks get_requires_for_build_wheel
    MISSING = "cffi"

FOLDER = Path(__file__).resolve().parent
NAME = "_certtool_crc32"  # not _crc32: cffi would write its own code over _crc32.c
Settings = Optional[Dict[str, Any]]


def extension(folder: str) -> Any:
    """Return the extension for setuptools; cffi's C for it, with _crc32.c in it, is written into `folder`."""
    ffi = cffi.FFI()
    ffi.cdef(
        """
        uint32_t crc32_update(uint32_t crc, const void *data, size_t length);
        void crc32_batch(const unsigned char *buffer, const uint64_t *offsets, size_t count, uint32_t *out);
        """
    )
    ffi.set_source(NAME, (FOLDER / "_crc32.c").read_text(encoding="utf-8"))
    source = os.path.join(folder, NAME + ".c")
    with contextlib.redirect_stdout(None):
        ffi.emit_c_code(source)
    stable = not any(map(sysconfig.get_config_var, ("Py_DEBUG", "Py_GIL_DISABLED")))
    return setuptools.Extension(NAME, [source], py_limited_api=stable, optional=True)


def build() -> Path:
    """Build the extension beside this file and return its path. Raises whatever cffi and setuptools raise."""
    with tempfile.TemporaryDirectory() as folder:
        module = extension(folder)
        module.optional = False
        command = setuptools.Distribution({"ext_modules": [module]}).get_command_obj("build_ext")
        command.build_lib = command.build_temp = folder
        command.ensure_finalized()
        command.run()
        built = Path(command.get_outputs()[0])
        target = FOLDER / built.name
        # Replaced, not overwritten: a server that runs with the old one keeps it.
        shutil.copy(built, f"{target}.new")
        os.replace(f"{target}.new", target)
    return target


def main() -> int:
    """Build beside certtool.py. Returns 1, and has said why and what still works, where that is not possible."""
    if MISSING:
        why, remedy = f"{MISSING} is missing", "python -m pip install cffi setuptools"
    else:
        try:
            built = build()
        except (Exception, SystemExit) as error:
            why, remedy = f"{type(error).__name__}: {error}", "install a C compiler and the headers of this Python"
        else:
            print(f"Built {built.name}: certtool.py uses it from its next start on.")
            return 0
    print(
        f"The C extension was not built ({why}), so certtool.py goes on computing its checksums in Python: to have it, "
        f"{remedy}, then run this again.",
        file=sys.stderr,
    )
    return 1


# ----------------------------------------------------------------------------------------------------------------------
# The hooks that pip calls (PEP 517, PEP 660)
# ----------------------------------------------------------------------------------------------------------------------


def get_requires_for_build_wheel(config_settings: Settings = None) -> List[str]:
    """Name what the build needs beside setuptools."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), "cffi"]


def build_wheel(directory: str, config_settings: Settings = None, metadata_directory: Optional[str] = None) -> str:
    """Build the wheel, with the extension where it can be compiled."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        if not MISSING:
            # build_meta calls setup() for a project without a setup.py: this is what it then finds.
            modules = [extension(os.path.relpath(folder))]
            setuptools.setup = functools.partial(setuptools.setup, ext_modules=modules)
        return str(build_meta.build_wheel(directory, config_settings, metadata_directory))


get_requires_for_build_editable = get_requires_for_build_wheel


def build_editable(directory: str, config_settings: Settings = None, metadata_directory: Optional[str] = None) -> str:
    """Build what `pip install -e .` wants; the extension stands beside certtool.py then."""
    main()
    return str(build_meta.build_editable(directory, config_settings, metadata_directory))


if __name__ == "__main__":
    sys.exit(main())
