"""Run Python scripts on a machine of nfs.py; what takes long to import is imported once.

``1.job`` in the folder is a list of words as JSON: a script and its arguments. Its output is added
to ``1.out``. ``1.code`` gets its exit code, negative after a signal. ``1.kill`` has it killed.
"""

import json
import os
import runpy
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path


def main(folder: Path) -> None:
    """Fork for each job that appears in ``folder``."""
    (folder / "ready").touch()
    import exact_resume.checkpoint.writer
    import exact_resume.run  # noqa: F401

    seen: set[Path] = set()
    pids: dict[int, Path] = {}
    while True:
        for job in sorted(set(folder.glob("*.job")) - seen):
            seen.add(job)
            pid = os.fork()
            if pid == 0:
                run(job)
            pids[pid] = job
        for pid, job in pids.items():
            if job.with_suffix(".kill").exists():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in pids:
                job = pids.pop(pid)
                job.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(status)))
                job.with_suffix(".new").rename(job.with_suffix(".code"))
        time.sleep(0.1)


def run(job: Path) -> None:
    """Run the script of ``job`` as this process, and end."""
    output = os.open(job.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.argv = json.loads(job.read_text())
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else bool(stop.code)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
