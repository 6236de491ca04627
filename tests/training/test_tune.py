"""The tuning door, on a small run: what it finds is what the others then draw by, and what the file
may say.
"""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from runs import ROOT, train
from sturdy.cli.overrides import check_composed
from sturdy.diffusion.sampler import DDIM
from sturdy.evaluation.evaluate import evaluate
from sturdy.evaluation.tune import Figures, Trial, best, tune
from sturdy.sampling.config import SamplingConfig, resolve_sampling
from sturdy.sampling.sample import main

DOORS = {"tune": tune, "sample": main, "evaluate": evaluate}
WORDS = {
    "tune": [
        "features.seen=300",
        "tune.n=16",
        "tune.batch_size=8",
        "tune.scales=[1,2]",
        "tune.steps=[2,5]",
    ],
    "sample": ["sample.n=2"],
    "evaluate": ["features.seen=300", "evaluate.n=8", "evaluate.levels=4", "evaluate.audit_seen=0"],
}
WORDS["tune"] += ["tune.ema=[null,0.08]"]
POWER = ["ema=power", "callbacks.snapshots.every_n_steps=5", "optimizer.lr=0.02"]

CONFIG = {
    "sampler": {"_target_": "sturdy.diffusion.sampler.DDIM", "steps": 5},
    "guidance": {"scale": 2.0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Where the finished run ``run`` is, and the words that say so."""
    tmp = tmp_path_factory.mktemp("tune")
    train(tmp, "run", *POWER, "callbacks.samples.every_n_steps=null")
    return tmp / "runs" / "run", [
        f"paths.runs={tmp / 'runs'}",
        f"paths.cache={tmp / 'cache'}",
        "run=run",
        "threads=1",
    ]


@pytest.fixture
def through(run, capsys, monkeypatch):
    """Through a door in this process; the exit code and what was said."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)

    def start(door, *words):
        words = [*run[1], *WORDS[door], *words]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose(door, words)
        check_composed(cfg)
        code = DOORS[door](cfg, words)
        said = capsys.readouterr()
        return code, said.out + said.err

    yield start
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def file(run):
    """The run's ``sampling.yaml``, not there before and after."""
    path = run[0] / "sampling.yaml"
    path.unlink(missing_ok=True)
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.slow
def test_killed_it_goes_on_and_the_others_follow_what_it_found(run, through, file):
    home, words = run
    drawn = home / "evaluation" / "drawn"
    command = [sys.executable, str(ROOT / "tune.py"), *words, *WORDS["tune"]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and len(list(drawn.glob("0*.pt"))) < 3:
        time.sleep(0.002)
    process.kill()
    said = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, said
    assert not file.exists()
    before = {path: path.stat().st_mtime_ns for path in drawn.glob("0*.pt")}
    assert 3 <= len(before) < 16

    code, said = through("tune")
    assert code == 0, said
    assert len(list(drawn.glob("0*.pt"))) == 16  # eight recipes, two batches each
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    rows = [line.split() for line in said.splitlines()[2:11]]
    assert rows[0][:2] == ["real", "images"]
    asked = [[ema, scale, steps] for ema in ("own", "0.08") for scale in "12" for steps in "25"]
    assert [row[:3] for row in rows[1:]] == asked
    # UniPC asks once a step, and twice where it is guided
    assert [int(row[3]) for row in rows[1:5]] == [2, 5, 4, 10]
    assert len({row[4] for row in rows[1:]}) == 8, "eight recipes draw eight sets"

    text, found = file.read_text(), OmegaConf.load(file)
    assert text.startswith("# tune.py: KID ")
    assert (
        "best of 8 recipes at step 12, 16 pictures of seed 1 against 12 held-out images in embedded"
        in text
    )
    won = re.match(r"# tune.py: KID (\S+) ± (\S+) with (\d+) network calls", text).groups()
    assert won in [(row[4], row[6], row[3]) for row in rows[1:]]
    assert int(won[2]) <= int(min(rows[1:], key=lambda row: float(row[4]))[3])
    assert through("tune") == (code, said)
    assert file.read_text() == text

    by = f"{found.sampler.steps}"
    for door in ("sample", "evaluate"):
        code, said = through(door)
        assert code == 0, said
        line = next(line for line in said.splitlines() if line.startswith("drawn by UniPC"))
        assert f"steps {by}" in line
        assert f"guidance {found.guidance.scale:g}, " in line
        assert ("the run's own EMA" if found.ema is None else "an EMA of length 0.08") in line
        assert line.endswith(f": from {file}")
    numbers = json.loads((home / "evaluation" / "report.json").read_text())
    assert (numbers["sampler"]["steps"], numbers["ema"]) == (found.sampler.steps, found.ema)


def test_the_command_wins_over_the_file_and_the_file_over_the_run(through, file):
    assert "guidance 2, the run's own EMA: from the run's config\n" in through("sample")[1]
    file.write_text(
        "sampler: {_target_: sturdy.diffusion.sampler.DDIM, steps: 3}\nguidance: "
        "{scale: 1.5}\nema: 0.07\n"
    )
    assert (
        f"by DDIM (steps 3), guidance 1.5, an EMA of length 0.07: from {file}\n"
        in through("sample")[1]
    )
    said = through("sample", "sampler.steps=4", "guidance.scale=3", "sample.ema=0.1")[1]
    assert "by DDIM (steps 4), guidance 3, an EMA of length 0.1: " in said
    assert f"from {file}, but for sampler.steps, guidance.scale, the EMA\n" in said
    said = through("sample", "sampler=euler")[1]
    assert (
        "by Euler (steps 50, spacing time, power 1.0, start 1.0), guidance 1.5, an EMA of length "
        "0.07: " in said
    )
    assert f"from {file}, but for sampler\n" in said


def test_pictures_are_of_the_recipe(run, through, file, tmp_path):
    """What is written is what is done: the same pictures as by a command that says all of it."""
    words = ["sampler=ddim", "sampler.steps=3", "guidance.scale=3", "sample.ema=0.08"]
    SamplingConfig(
        {"_target_": "sturdy.diffusion.sampler.DDIM", "steps": 3},
        {"scale": 3.0},
        0.08,
        origin="this test",
    ).write(run[0], "by hand")
    for name, given in (("file", []), ("command", words), ("other", [*words, "guidance.scale=1"])):
        assert through("sample", *given, f"sample.out={tmp_path / name}")[0] == 0
    pictures = {
        name: (tmp_path / name / "000001.png").read_bytes() for name in ("file", "command", "other")
    }
    assert pictures["file"] == pictures["command"] != pictures["other"]
    assert not list(run[0].glob(".sampling*"))


def test_a_guide_is_a_checkpoint_or_the_last_of_a_run(run, through, tmp_path):
    """Away from itself nothing moves: what is not guided at all comes out."""
    first = min((run[0] / "checkpoints").glob("step-*"))
    given = {
        "none": "guidance.scale=1",
        "itself": f"guidance.guide={run[0]}",
        "earlier": f"guidance.guide={first}",
        "null label": "guidance.scale=3",
    }
    said = {}
    for name, word in given.items():
        words = [
            "sampler=ddim",
            "sampler.steps=3",
            "guidance.scale=3",
            f"sample.out={tmp_path / name}",
            word,
        ]
        code, said[name] = through("sample", *words)
        assert code == 0, said[name]
    pictures = {name: (tmp_path / name / "000001.png").read_bytes() for name in given}
    assert pictures["none"] == pictures["itself"]
    assert len(set(pictures.values())) == 3
    assert f"guidance 3 away from {first}, the run's own EMA" in said["earlier"]


def test_recipes_with_a_guide_ask_two_networks(run, through, file):
    words = [
        "tune.labels=none",
        "tune.n=8",
        "tune.steps=[1]",
        "tune.ema=[null]",
        "tune.scales=[1,2]",
    ]
    code, said = through(
        "tune", f"guidance.guide={min((run[0] / 'checkpoints').glob('step-*'))}", *words
    )
    assert code == 0, said
    assert [line.split()[:4] for line in said.splitlines()[3:5]] == [
        ["own", "1", "1", "1"],
        ["own", "2", "1", "2"],
    ]
    assert "step-" in OmegaConf.load(file).guidance.guide


NOT_RUN = "as its sampler, which is not code of this project, and is not run"
WRONG = {
    "sampler: [": "sampling.yaml cannot be read (while parsing",
    "sampler: {steps: 0}": "sampler.steps=0 must be 1 or more",
    "sampler: {stepps: 3}": "unexpected keyword argument 'stepps'",
    "sampler: heun": "sampling.yaml: sampler=heun makes no sense",
    "steps: 3": "sampling.yaml must say sampler, guidance and ema, and nothing else",
    "guidance: {sacle: 3}": "sampling.yaml: guidance.sacle is none of scale, interval, rescale, guide",
    "guidance: {guide: gone}": "guidance.guide=gone is not there; give the directory of a run",
    "guidance: {scale: high}": "guidance.scale=high must be a number",
    "ema: long": "sampling.yaml: ema=long makes no sense",
    "sampler: {_target_: os.system, command: ls}": f"sampling.yaml asks for os.system {NOT_RUN}",
    "sampler: {_target_: sturdy.diffusion.sampler.Heum}": f"sampler.Heum {NOT_RUN}",
    "sampler: {_target_: sturdy.diffusion.schedule.Linear}": "sturdy.diffusion.schedule.Linear is no sampler",
    "sampler: {steps: [{_target_: os.getpid}]}": f"os.getpid {NOT_RUN}",
    "sampler: {steps: '${oc.create:{_target_: os.getpid}}'}": NOT_RUN,
}

LATE = {
    "sampler: [": "sampling.yaml cannot be read",
    "guidance: {interval: [1, 0]}": "guidance.interval=[1, 0]",
    "ema: 0.28": "an EMA of length 0.28 at step 12 cannot be put together",
}


def test_what_the_file_must_not_say(run, through, file):
    for text, answer in WRONG.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=r"sampling\.yaml") as error:
            resolve_sampling(OmegaConf.create(), CONFIG, run[0])
        assert answer in str(error.value), text
    for text, answer in LATE.items():
        file.write_text(text)
        code, said = through("sample")
        assert (code, answer in said, "sampling.yaml" in said) == (2, True, True), f"{text}: {said}"
        assert "Traceback" not in said


REFUSALS = {
    "tune.scales=[]": "tune.scales=[] must be a list of numbers",
    "tune.steps=8": "tune.steps=8 must be a list of whole numbers, such as [8,15]",
    "tune.steps=[8.5]": "tune.steps=[8.5] must be",
    "tune.steps=[2,0]": "sampler.steps=0 must be 1 or more",
    "tune.ema=[0.28]": "an EMA of length 0.28 at step 12 cannot be put together",
    "tune.n=2": "tune.n=2 must be a whole number of at least 8",
    "tune.labels=some": "tune.labels=some must be one of prior, even, none",
    "run=nobody": "run=nobody is not there; paths.runs=",
}


def test_refusals_say_what_to_do_and_write_nothing(through, file):
    for word, answer in REFUSALS.items():
        code, said = through("tune", word)
        assert (code, answer in said, "Traceback" in said) == (2, True, False), f"{word}: {said}"
    assert not file.exists()


def test_without_labels_guidance_is_not_swept(through, file):
    code, said = through(
        "tune", "tune.labels=none", "tune.n=8", "tune.steps=[1,2]", "tune.ema=[null]"
    )
    assert code == 0, said
    assert "2 recipes like UniPC" in said
    assert [line.split()[:3] for line in said.splitlines()[3:5]] == [
        ["own", "none", "1"],
        ["own", "none", "2"],
    ]
    assert OmegaConf.load(file).guidance.scale == 2  # the run's


def test_an_earlier_tune_does_not_change_what_is_tried(run):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("tune", run[1])
    recipe = resolve_sampling(cfg, CONFIG, None)
    assert isinstance(recipe.sampler, DDIM)
    assert (recipe.ema, recipe.origin) == (None, "from the run's config")


def trial(calls, *kids):
    return Trial(None, calls, Figures(torch.tensor(kids), 0.5, 0.5, None))


def test_level_recipes_go_to_fewer_calls():
    lowest, level, cheaper = trial(30, 1.0, 3.0), trial(15, 2.0, 2.1), trial(8, 1.5, 4.0)
    assert best([lowest, level]) is level  # 0.05 above, give or take 0.95
    assert best([lowest, cheaper, level]) is level  # 0.75 above, give or take 0.25
    assert best([lowest, cheaper]) is lowest  # though they overlap, as all move alike
    assert best([trial(15, 2.0, 2.05), level]).figures.kid < level.figures.kid
    assert best([trial(15, 2.0, 2.1), trial(8, 2.0, 2.1)]).calls == 8
