"""Old names of keys are taken, and answered with the new ones."""

import pytest

import sturdy.cli.main as main
from runs import ROOT
from sturdy.cli import usage
from sturdy.cli.usage import RENAMED_KEYS, check_not_refused, rename_old_keys, suggest
from sturdy.renames import RENAMED

OLD = {"clipping": "clip", "callbacks.nan": "callbacks.guard"}


def test_an_old_key_becomes_the_new_one_and_a_line_says_so(capsys):
    words = ["clipping=2", "++callbacks.nan.max_skips=3", "~callbacks.nan", "clip=1", "clippings=1"]
    assert rename_old_keys(words, OLD) == [
        "clip=2",
        "++callbacks.guard.max_skips=3",
        "~callbacks.guard",
        "clip=1",
        "clippings=1",
    ]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("warning: clipping is called clip now")


def test_a_command_with_an_old_key_composes(monkeypatch, capsys):
    monkeypatch.setitem(RENAMED_KEYS, "clipping", "clip")
    cfg = main.compose_run(ROOT / "conf" / "train.yaml", ["clipping=2"])
    assert cfg.clip == 2
    assert "clipping is called clip now" in capsys.readouterr().err


def test_the_keys_that_checkpoints_have_under_old_names_are_taken_on_the_command_line():
    for renamed in RENAMED.values():
        assert renamed.keys.items() <= RENAMED_KEYS.items()


def test_every_new_name_is_a_key():
    assert not set(RENAMED_KEYS.values()) & set(usage.REFUSED)


@pytest.mark.parametrize("key", ["trainer.max_epochs", "hydra.run.dir"])
def test_a_refused_key_is_answered_with_what_to_use(key):
    with pytest.raises(usage.UsageError, match=f"{key} is refused: "):
        check_not_refused(key)


def test_suggestions():
    assert suggest("epochs", ["trainer.max_steps", "seed"]) == " Did you mean trainer.max_steps?"
    assert suggest("sede", ["seed", "name"]) == " Did you mean seed?"
    assert suggest("q", ["seed", "name"]) == " There are: name, seed."
