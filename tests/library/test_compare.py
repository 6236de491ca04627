"""Bit by bit: what counts as the same, and what differs by which name."""

import pytest
import torch

from exact_resume.checkpoint.compare import diff_checkpoints, first_divergence

NAN = float("nan")


def state(**changes):
    weights = {"a": torch.tensor([1.0, NAN, -0.0]), "b": torch.zeros(2, 3)}
    return {
        "state_dict": weights | changes,
        "optimizer_states": [{"state": {"a": {"step": 3}}}],
        "global_step": 3,
    }


def test_equal_is_equal_whatever_the_memory():
    other = state(b=torch.zeros(3, 2).T)
    assert not other["state_dict"]["b"].is_contiguous()
    assert diff_checkpoints(state(), other) == []


def test_the_progress_of_loops_does_not_count_and_the_state_of_callbacks_does():
    assert diff_checkpoints(state(), state() | {"loops": torch.ones(1)}) == []
    assert diff_checkpoints(state() | {"callbacks": 1}, state()) == ["callbacks"]
    assert diff_checkpoints({"x": 1}, {"x": 2}, parts=["x"]) == ["x"]


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1.0, NAN, 0.0]),  # -0 is not 0
        torch.tensor([1.0, 2.0, -0.0]),
        torch.tensor([1.0, NAN, -0.0, 0.0]),
        torch.tensor([1.0, NAN, -0.0], dtype=torch.float64),
        torch.tensor([[1.0, NAN, -0.0]]),
        torch.nextafter(torch.tensor([1.0, NAN, -0.0]), torch.tensor([2.0, NAN, -0.0])),
        [1.0, NAN, -0.0],
    ],
)
def test_one_bit_or_another_type_or_shape_is_named(value):
    names = diff_checkpoints(state(), state(a=value))
    assert names[0].startswith("state_dict/a")


def test_what_is_in_one_only_is_named():
    assert (
        diff_checkpoints(state(), state(c=None))
        == diff_checkpoints(state(c=None), state())
        == ["state_dict/c"]
    )
    assert diff_checkpoints(state(), state() | {"global_step": 4}) == ["global_step"]
    other = state() | {"optimizer_states": [{"state": {"a": {"step": torch.tensor(3)}}}]}
    assert diff_checkpoints(state(), other) == ["optimizer_states/0/state/a/step"]
    assert diff_checkpoints(state(), {"state_dict": {}}) == [
        "global_step",
        "optimizer_states/0/state/a/step",
        "state_dict/a",
        "state_dict/b",
    ]


ROWS = [
    {"step": "1", "train/loss": "0.5", "train/images_per_second": "10"},
    {"step": "2", "train/loss": "0.25", "val/loss": ""},
    {"step": "2", "train/loss": "", "val/loss": "nan"},
    {"step": "10", "train/loss": "0.125"},
]


def changed(number, **values):
    return [row | values if i == number else row for i, row in enumerate(ROWS)]


def test_records_are_equal_in_any_order_and_at_any_speed():
    assert first_divergence(ROWS, reversed(ROWS)) is None
    assert first_divergence(ROWS, changed(0, **{"train/images_per_second": "99"})) is None
    together = [ROWS[0], {"step": "2", "train/loss": "0.25", "val/loss": "nan"}, ROWS[3]]
    assert first_divergence(ROWS, together) is None


@pytest.mark.parametrize(
    ("other", "where"),
    [
        (changed(1, **{"train/loss": "0.250000001"}), (2, "train/loss")),
        (changed(2, **{"val/loss": "1"}), (2, "val/loss")),
        (changed(3, **{"train/loss": "0"}), (10, "train/loss")),
        (ROWS[:3], (10, "train/loss")),
        (ROWS[1:], (1, "train/loss")),
        (changed(3, extra="1"), (10, "extra")),
        ([], (1, "train/loss")),
    ],
)
def test_the_first_step_that_differs_is_named(other, where):
    assert first_divergence(ROWS, other) == first_divergence(other, ROWS) == where
