"""Which code a file may name: the run's own config, the project, and the packages in the user's
word.
"""

import sys

import pytest
from omegaconf import OmegaConf

from runs import ROOT
from sturdy.trust import Trust, find_untrusted_targets

FRIEND = """
import os, subprocess, torch.distributed.elastic.multiprocessing.subprocess_handler as handler
from subprocess import Popen
class Net:
    pass
class Outer:
    class Inner:
        pass
def make(): ...
system = os.system
"""


@pytest.fixture
def friend(tmp_path, monkeypatch):
    """A package ``friend``, and a run that has named its class and, as a factory, its function."""
    (tmp_path / "friend").mkdir()
    (tmp_path / "friend" / "__init__.py").write_text(FRIEND)
    monkeypatch.syspath_prepend(tmp_path)
    config = {
        "backbone": {"_target_": "friend.Net", "width": 3},
        "ema": {"_target_": "friend.make", "a": 0.1},
    }
    for number in ("001", "002"):
        attempt = tmp_path / "runs" / "sweep" / "run" / "attempts" / number
        attempt.mkdir(parents=True)
        OmegaConf.save(OmegaConf.create({**config, "seed": int(number)}), attempt / "config.yaml")
    yield tmp_path / "runs", config
    sys.modules.pop("friend", None)


def state_of(runs):
    return runs / "sweep" / "run" / "checkpoints" / "step-00000003" / "state.ckpt"


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "posix.system",
        "builtins.eval",
        "subprocess.Popen",
        "functools.partial",
        "torch.load",
        "torch.hub.load",
        "torch.optim.adamw.torch.load",
        "importlib.import_module",
        "friend.os.system",
        "friend.system",
        "friend.subprocess.Popen",  # a class that the package imports, and does not define
        "friend.Popen",
        "friend.handler.SubprocessHandler",
        "friend.make",  # a function
        "friend",
        "friend.Nothing",
        "friendly.Net",
        "sturdy.cli.sweep.Child",
        "sturdy.data.cache_writer.write_cache",
        "sturdy.training.build.load_module",
        "",
    ],
)
@pytest.mark.parametrize("place", ["backbone", "ema"])
def test_never_run_for_a_file_even_where_a_package_is_trusted(target, place, friend):
    runs, config = friend
    evil = {
        **config,
        place: {"_target_": "friend.Net", "inner": [{"_target_": target, "_args_": ["ls"]}]},
    }
    for trust in (Trust(["friend"]), Trust(["friend"], runs)):
        with pytest.raises(
            ValueError, match=r"state\.ckpt asks for .* as its \w+, which is no.* is not run"
        ):
            trust.check(state_of(runs), evil, ["backbone", "ema"])


def test_the_word_is_named_and_then_taken(friend):
    runs, config = friend
    for file, trust in ((state_of(runs), Trust()), (runs.parent / "state.ckpt", Trust(runs=runs))):
        with pytest.raises(ValueError, match=r"asks for friend\.Net .* say so: trust=\[friend\]$"):
            trust.check(file, config, ["backbone"])
    assert "friend" not in sys.modules, "not even imported"
    Trust(["friend"]).check(state_of(runs), config, ["backbone"])
    Trust("friend.Net").check(state_of(runs), config, ["backbone"])
    Trust(["friend"]).check(
        state_of(runs), {"backbone": {"_target_": "friend.Outer.Inner"}}, ["backbone"]
    )
    with pytest.raises(ValueError, match=r"say so: trust=\[friend,other\]$"):
        Trust(["friend"]).check(
            state_of(runs), {"backbone": {"_target_": "other.Net"}}, ["backbone"]
        )
    with pytest.raises(
        ValueError, match=r"say so: trust=\[torch\.nn\.Linear\]$"
    ):  # not of all that is in torch
        Trust().check(state_of(runs), {"backbone": {"_target_": "torch.nn.Linear"}}, ["backbone"])


def test_a_runs_own_config_is_run_to_the_letter(friend, tmp_path):
    runs, config = friend
    trust, names = Trust(runs=runs), ["backbone", "ema"]
    trust.check(state_of(runs), config, names)
    (tmp_path / "link").symlink_to(runs)
    Trust(runs=tmp_path / "link").check(state_of(runs), config, names)
    trust.check(tmp_path / "link" / state_of(runs).relative_to(runs), config, names)
    foreign = {
        "another number": (
            state_of(runs),
            {**config, "ema": {"_target_": "friend.make", "a": 0.2}},
        ),
        "another file": (
            tmp_path / "elsewhere" / "checkpoints" / "step-00000003" / "state.ckpt",
            config,
        ),
        "another run": (runs / "other" / "checkpoints" / "step-00000003" / "state.ckpt", config),
        "a way out": (runs / "sweep" / "run" / ".." / ".." / ".." / "state.ckpt", config),
    }
    for file, given in foreign.values():
        with pytest.raises(ValueError, match=r"trust=\[friend\]"):
            trust.check(file, given, names)


@pytest.mark.parametrize("word", ["os", "subprocess.Popen", "my package", "", 3, True, "a..b"])
def test_a_word_that_is_no_package_is_refused(word):
    with pytest.raises(ValueError, match=r"^trust: "):
        Trust([word])


GROUPS = (
    "backbone",
    "schedule",
    "target",
    "objective",
    "sampler",
    "optimizer",
    "learning_rate",
    "ema",
)
FILES = [
    f
    for g in (*GROUPS, "alignment", "data", "logger")
    for f in sorted((ROOT / "conf" / g).glob("*.yaml"))
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_option_of_the_project_is_trusted(file):
    node = OmegaConf.to_container(OmegaConf.load(file))
    assert [found for found in find_untrusted_targets(node) if not found.startswith("${")] == []
