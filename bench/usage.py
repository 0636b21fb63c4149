"""`python -I -S bench/usage.py PROGRAM ARGS`: run a program and print its seconds, its peak MB and its exit status.

Linux counts a process' peak from the memory of the one that forked it, so this one stays small: no imports but these.
"""

import os
import sys
import time

if __name__ == "__main__":
    if sys.platform == "win32":
        raise NotImplementedError
    to_nowhere = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
    began = time.perf_counter()
    child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[to_nowhere])
    _, status, used = os.wait4(child, 0)
    print(time.perf_counter() - began, used.ru_maxrss / 1024, status)
