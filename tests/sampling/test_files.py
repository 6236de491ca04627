"""Sampling notices a file that the network reads and that changed since the run was trained."""

import pytest

from exact_resume.fingerprint import content_hash
from exact_resume.resume import ResumePoint
from sturdy.sampling.loaded_run import check_files


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.npy"
    path.write_bytes(b"one")
    return path


def point(table, key="condition.path"):
    then = {"config": {key: str(table)}, "files": {key: content_hash(table)}}
    return ResumePoint(table, 3, {"fingerprint": then}, explicit=True)


def test_the_same_file_is_accepted(table):
    check_files(point(table))


def test_another_content_and_a_missing_file_are_refused_by_key(table):
    trained = point(table)
    table.write_bytes(b"two")
    with pytest.raises(ValueError, match=r"^condition.path: the content of .* is not what"):
        check_files(trained)
    table.unlink()
    with pytest.raises(ValueError, match=r"^condition.path: .*, which .* is not there"):
        check_files(trained)


def test_files_that_sampling_does_not_read_are_free(table):
    trained = point(table, "alignment.encoder.path")
    table.unlink()
    check_files(trained)
