"""What was left out, on disk: there whole or not at all, and never misread."""

import json
import multiprocessing
import os
import signal

import pytest

from exact_resume import files
from exact_resume.skips import SkipLog, SkippedBatch

FORK = multiprocessing.get_context("fork")
ONE = SkippedBatch(4, 24, 8, "train/loss was nan and train/grad_norm nan", ("a.jpg", "ü\udcff.jpg"))
TWO = SkippedBatch(4, 32, 8, "train/loss was inf and train/grad_norm 3")


def test_what_is_added_is_read_again_in_its_order(tmp_path):
    path = tmp_path / "skips.jsonl"
    assert SkipLog(path).entries == []
    assert not path.exists()
    skips = SkipLog(path)
    for skip in (ONE, TWO):
        skips.add(skip)
        assert SkipLog(path).entries == skips.entries
    assert SkipLog(path).entries == [ONE, TWO]
    assert [json.loads(line)["position"] for line in path.read_text().splitlines()] == [24, 32]


def test_a_skip_tells_its_step_and_positions():
    assert str(ONE) == "step 4, positions 24 to 31: train/loss was nan and train/grad_norm nan"


@pytest.mark.parametrize(
    ("place", "entries"), [("replace", [ONE]), ("fsync_directory", [ONE, TWO])]
)
def test_a_kill_leaves_the_old_file_or_the_new(place, entries, tmp_path):
    path = tmp_path / "skips.jsonl"
    SkipLog(path).add(ONE)

    def add_and_die():
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        if place == "replace":
            os.replace = die
        else:
            files.fsync_directory = die
        SkipLog(path).add(TWO)

    child = FORK.Process(target=add_and_die)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert SkipLog(path).entries == entries
    SkipLog(path).add(TWO)
    assert SkipLog(path).entries == [*entries, TWO]


@pytest.mark.parametrize(
    "line", ["", "{", "[]", '{"step": 1}', '{"step": 1, "images": null}', "\xff"]
)
def test_a_damaged_line_is_named(line, tmp_path):
    path = tmp_path / "skips.jsonl"
    SkipLog(path).add(ONE)
    with path.open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"skips.jsonl, line 2, cannot be read.*found again"):
        SkipLog(path)
