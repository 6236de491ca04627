"""A cache hands out what was computed for exactly this, or has it computed."""

import pytest
import torch

from sturdy.encoders.cached import cached


def test_it_is_computed_once_for_each_thing_it_depends_on(tmp_path):
    calls = []

    def make():
        calls.append(len(calls))
        return {"x": torch.arange(1000.0), "n": torch.tensor(len(calls))}

    first = cached(tmp_path / "new", "thing", ("digest", 32, 1), make)
    again = cached(tmp_path / "new", "thing", ("digest", 32, 1), make)
    assert calls == [0]
    assert torch.equal(first["x"], again["x"])
    assert cached(tmp_path / "new", "thing", ("digest", 32, 2), make)["n"] == 2
    assert len(list((tmp_path / "new").iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "rubbish", "a flipped bit"])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    def make():
        return {"x": torch.arange(1000.0)}

    cached(tmp_path, "thing", (1,), make)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(whole[: len(whole) // 2])
        case "empty":
            path.write_bytes(b"")
        case "rubbish":
            path.write_bytes(b"no archive" * 100)
        case "a flipped bit":
            middle = whole.index(torch.arange(500.0, 504.0).numpy().tobytes())
            path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert torch.equal(cached(tmp_path, "thing", (1,), make)["x"], make()["x"])
    assert torch.equal(
        cached(tmp_path, "thing", (1,), lambda: pytest.fail("made again"))["x"], make()["x"]
    )
