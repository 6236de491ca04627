"""One thread a process: the tests compare bits, and share two cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
