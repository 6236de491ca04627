"""Progress as a user sees it: on a real terminal, in a file, and not at all for what takes no
time.
"""

import io
import os
import pty

import pytest

from sturdy.progress import ProgressPrinter


def terminal(tell):
    """What ``tell(progress)`` puts on a terminal."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream:
        tell(ProgressPrinter("reading", stream=stream, patience=0.0))
        stream.write("END")
    shown = b""
    with os.fdopen(master, "rb", buffering=0) as screen:
        while not shown.endswith(b"END"):
            shown += screen.read(10_000)
    return shown.decode().removesuffix("END")


def test_a_job_that_takes_no_time_says_nothing():
    file = io.StringIO()
    with ProgressPrinter("reading", stream=file) as progress:
        for done in range(101):
            progress(done, 100)
    assert file.getvalue() == ""


def test_whole_lines_in_a_file():
    file = io.StringIO()
    with ProgressPrinter("reading", stream=file, patience=0.0, interval=1e9) as progress:
        for done in (0, 400, 1200):
            progress(done, 1200)
    first, last = file.getvalue().splitlines()
    assert first == "reading: 0 of 1,200, 0 s so far"
    assert last == "reading: 1,200 of 1,200, took 0 s"


def test_one_line_in_place_on_a_terminal():
    def tell(progress):
        with progress:
            progress.interval = 0.0
            for done in (0, 600, 1200):
                progress(done, 1200)

    shown = terminal(tell)
    assert shown.count("\r") == 4  # the last one belongs to the line's end
    assert shown.count("\n") == 1
    assert "600 of 1,200" in shown
    assert shown.endswith("1,200 of 1,200, took 0 s\x1b[K\r\n")


def test_an_error_begins_on_a_line_of_its_own():
    def fail(progress):
        with progress:
            progress(10, 1200)
            raise KeyError

    def tell(progress):
        with pytest.raises(KeyError):
            fail(progress)

    assert terminal(tell).endswith("left\x1b[K\r\n")
