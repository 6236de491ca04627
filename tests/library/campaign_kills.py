"""Where a process is made to die: at a line of Python about to run, or at a system call about to be
made.
"""

import ctypes
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import campaign
import pytest

from exact_resume import files
from exact_resume.checkpoint import reading, store

FORK = multiprocessing.get_context("fork")
PR_SET_PTRACER = 0x59616D61  # linux/prctl.h; where Yama guards processes, a brother may then trace


class ByLine:
    """Death before the n-th line that the store, or the deletion of a directory, is about to
    run.
    """

    files = (store.__file__, reading.__file__, files.__file__, shutil.__file__, campaign.__file__)

    def points(self, home: Path, ckpt_path: str) -> list[int]:
        ours, theirs = FORK.Pipe()
        child = FORK.Process(target=self._child, args=(home, ckpt_path, -1, theirs))
        child.start()
        theirs.close()
        n = ours.recv()
        child.join()
        return list(range(1, n + 1))

    def start(self, home: Path, ckpt_path: str, point: int) -> int:
        """The exit code of a process that was to die at ``point``."""
        child = FORK.Process(target=self._child, args=(home, ckpt_path, point))
        child.start()
        child.join()
        assert child.exitcode is not None
        return child.exitcode

    def _child(self, home: Path, ckpt_path: str, point: int, count: Any = None) -> None:
        n = 0

        def trace(frame: Any, event: str, arg: object) -> Any:
            nonlocal n
            if frame.f_code.co_filename not in self.files:
                return None
            if event == "line":
                n += 1
                if n == point:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        campaign.live(home, ckpt_path)
        sys.settrace(None)
        if count:
            count.send(n)


class BySystemCall:
    """Death on entering the n-th system call of a kind, for every call that touches the run's
    directory.
    """

    calls = (
        "%file,read,write,pwrite64,writev,lseek,fstat,fsync,fdatasync,ftruncate,close,getdents64"
    )

    def points(self, home: Path, ckpt_path: str) -> list[tuple[str, int]]:
        log = home.with_suffix(".strace")
        assert self._strace(home, ckpt_path, "-y", "-o", str(log)) == 0
        counts, points = Counter[str](), []
        for line in log.read_text().splitlines():
            if call := re.match(r"(?:\d+ +)?(\w+)\(", line):
                counts[call[1]] += 1
                if str(home) in line:
                    points.append((call[1], counts[call[1]]))
        return points

    def start(self, home: Path, ckpt_path: str, point: tuple[str, int]) -> int:
        """The exit code of a process that was to die at ``point``."""
        return self._strace(
            home, ckpt_path, "-o", "/dev/null", f"--inject={point[0]}:signal=KILL:when={point[1]}"
        )

    def _strace(self, home: Path, ckpt_path: str, *options: str) -> int:
        ours, theirs = FORK.Pipe()
        child = FORK.Process(target=self._child, args=(home, ckpt_path, theirs))
        child.start()
        theirs.close()
        ours.recv()
        words = ["strace", f"--trace={self.calls}", *options, "-p", str(child.pid)]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            said = strace.stderr.readline()
            ours.send("go")
            child.join()
            said += strace.stderr.read()
        if "attached" not in said:
            pytest.skip(f"strace may not attach to processes here: {said}")
        assert child.exitcode is not None
        return child.exitcode

    def _child(self, home: Path, ckpt_path: str, parent: Any) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
        parent.send("ready")
        parent.poll(None)  # no call of those that are counted
        campaign.live(home, ckpt_path)
