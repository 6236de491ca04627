"""The record of a run: what is written is read back, whatever a kill has cut."""

import pytest

from exact_resume.metrics import MetricsCSV, read_column, read_rows


@pytest.fixture
def record(tmp_path):
    record = MetricsCSV(tmp_path / "metrics.csv")
    record.log_metrics({"train/loss": 0.5}, 1)
    record.log_metrics({"val/loss": 0.25}, 1)  # a new column
    record.log_metrics({"train/loss": 0.125}, 2)
    return record


def test_a_cut_last_line_is_left_out(record):
    whole = record.path.read_bytes()
    start_of_last = whole.rindex(b"2,")
    for length in range(start_of_last, len(whole)):
        record.path.write_bytes(whole[:length])
        assert read_column(record.path, "train/loss") == {1: 0.5}
        assert record.column("val/loss") == {1: 0.25}
    record.path.write_bytes(whole)
    assert read_column(record.path, "train/loss") == {1: 0.5, 2: 0.125}


def test_cells_that_are_no_numbers_are_left_out(record):
    record.path.write_text("step,val/loss\n1,much\n2,\n3,nan\n4,0.5\nlast,1\n")
    assert list(read_column(record.path, "val/loss")) == [3, 4]
    assert read_column(record.path, "val/other") == {}
    assert [row["step"] for row in read_rows(record.path)] == ["1", "2", "3", "4"]


def test_a_file_that_cannot_be_read(tmp_path):
    path = tmp_path / "metrics.csv"
    assert read_rows(path) == []
    assert read_column(path, "val/loss") == {}
    path.write_bytes(b"step,\xff\n1,2\n")
    assert read_column(path, "val/loss") == {}
    with pytest.raises(ValueError, match="utf-8"):
        read_rows(path)


def test_rows_after_a_step_are_cut_off(record):
    assert [row["train/loss"] for row in record.cut(1)] == ["0.125"]
    assert {row["step"] for row in MetricsCSV(record.path).rows()} == {"1"}


def test_a_file_that_was_replaced_is_read_again(record, tmp_path):
    early = MetricsCSV(tmp_path / "other.csv")  # before its file was fetched
    early.path.write_bytes(record.path.read_bytes())
    early.reload()
    assert [row["train/loss"] for row in early.cut(1)] == ["0.125"]
    early.log_metrics({"train/loss": 0.25}, 2)
    assert early.column("train/loss") == {1: 0.5, 2: 0.25}
