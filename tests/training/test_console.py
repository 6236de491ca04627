"""What a run says arrives, whatever the terminal can print."""

import os
import subprocess
import sys


def test_a_terminal_of_ascii_loses_no_line(tmp_path):
    program = f"""if True:
        from pathlib import Path
        import logging
        from exact_resume.attempt import configure_logging
        configure_logging(Path({str(tmp_path)!r}), 0, ["sturdy"])
        logging.getLogger("sturdy").info("cr\\xe8me 10, caf\\xe9 8")
    """
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "cr\\xe8me 10, caf\\xe9 8\n"
