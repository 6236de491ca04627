"""Wait until the run HOME has saved STEP or a later one."""

import sys
import time
from pathlib import Path

from exact_resume.run import Run

run = Run(Path(sys.argv[1]))
while run.newest_step() < int(sys.argv[2]):
    time.sleep(0.05)
