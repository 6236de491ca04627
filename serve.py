"""Draw images from a run on request, over HTTP, with a small page to try it.

python serve.py run=cars
"""

import signal
from pathlib import Path

from sturdy.cli.main import run_script

if __name__ == "__mp_main__":  # a worker: Ctrl-C is for the server, which ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if __name__ == "__main__":
    run_script(Path(__file__).resolve().parent / "conf" / "serve.yaml", "sturdy.serving.main:main")
