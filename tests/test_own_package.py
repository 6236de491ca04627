"""A package of one's own, outside the project, goes the whole way: examples/mypackage, which
docs/extend shows.
"""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

import mini
from exact_resume.checkpoint.store import Store, load_state
from runs import ROOT, differences, kill_at, run_script, train
from sturdy.cli.search_path import add_config_folders
from sturdy.cli.signatures import arguments
from sturdy.diffusion.sampler import Heun
from sturdy.sampling.config import resolve_sampling
from sturdy.training.build import load_module
from sturdy.trust import Trust

EXAMPLE = ROOT / "examples" / "mypackage"
PLACE = "hydra.searchpath=[pkg://mypackage.conf]"
STEPS = 12
BASE = [
    PLACE,
    "experiment=mypackage",
    "trainer=cpu",
    "trainer.threads=1",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=2",
    "data.image_size=16",
    "data.batch_size=8",
    "data.holdout=0.2",
    "backbone.width=8",
    "backbone.depth=2",
    "backbone.dropout=0.2",
    "sampler.steps=2",
    "ema.start=2",
    "callbacks.checkpoint.every_n_train_steps=3",
    "callbacks.samples.every_n_steps=6",
    "callbacks.samples.n=4",
    "callbacks.norms.every_n_steps=4",
]
EVALUATE = [
    "evaluate.n=8",
    "evaluate.batch_size=4",
    "evaluate.levels=2",
    "evaluate.audit_seen=0",
    "features.seen=16",
]


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A directory with the package in ``outside/``, which Python finds there, and images with a
    table of labels.
    """
    tmp = tmp_path_factory.mktemp("own")
    shutil.copytree(EXAMPLE, tmp / "outside", ignore=shutil.ignore_patterns("__pycache__"))
    draw, rows = np.random.default_rng(0), []
    (tmp / "images").mkdir()
    for k in range(60):
        coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((24, 20), Image.Resampling.BICUBIC).save(tmp / "images" / f"{k:02}.png")
        rows.append(f"{k:02}.png,{('cat', 'dog')[k % 2]}\n")
    (tmp / "images" / "labels.csv").write_text("".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp / "outside"), prepend=os.pathsep)
        patch.syspath_prepend(tmp / "outside")
        yield tmp
    add_config_folders([])
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def words(outside):
    return [*BASE, f"data.source.root={outside / 'images'}"]


@pytest.fixture(scope="module")
def once(outside, words):
    """A run of it that nobody has disturbed; its newest ``state.ckpt``."""
    done = train(outside, "once", base=words)
    assert "once: 60 images, 2 classes; fresh, to step 12" in done.stdout
    return Store(outside / "runs" / "once" / "checkpoints").state(STEPS)


def test_killed_three_times_it_ends_in_the_same_bits(outside, words, once):
    for step in (2, 6, 10):
        kill_at(outside, "killed", step, base=words, saved=step > 6)
    assert "resumed from step" in train(outside, "killed", base=words).stdout
    assert differences(outside, "once", "killed") == []
    norms = [
        outside / "runs" / name / "norms" / "step-00000012.json" for name in ("once", "killed")
    ]
    assert norms[0].read_text() == norms[1].read_text(), "of the callback of its own"
    state = load_state(once)["optimizer_states"][0]["state"]
    assert "momentum" in state["denoiser.backbone.first.weight"], "of the optimizer of its own"


@pytest.mark.parametrize(
    ("name", "words_of_it"),
    [
        ("space", ["space=squares", "backbone=dit", "backbone.heads=2", "backbone.width=16"]),
        ("condition", ["condition=class_vector", "backbone=reader"]),
    ],
)
def test_its_space_and_its_condition_train_resume_and_sample(outside, words, name, words_of_it):
    words = [*words, *words_of_it]
    train(outside, name, base=words)
    kill_at(outside, f"killed-{name}", 4, base=words, saved=True)
    assert "resumed from step" in train(outside, f"killed-{name}", base=words).stdout
    assert differences(outside, name, f"killed-{name}") == []
    options = ["sample.n=2", "sampler.steps=2", "guidance.scale=3"]
    run_script(outside, "sample", PLACE, f"run={name}", *options)
    images = sorted((outside / "runs" / name / "pictures").glob("0*.png"))
    assert [Image.open(path).size for path in images] == [(16, 16)] * 2


def test_its_code_is_in_the_promise(outside, words, once):
    """A changed comment is bitwise; a changed helper of the backbone is refused, and named, until
    it is undone.
    """
    helper = outside / "outside" / "mypackage" / "blocks.py"
    before = helper.read_text()
    train(outside, "edited", "trainer.max_steps=6", base=words)
    helper.write_text(f"# a comment\n{before}")
    assert "(bitwise" in train(outside, "edited", "trainer.max_steps=9", base=words).stdout
    helper.write_text(before.replace("F.silu", "F.gelu"))
    assert helper.read_text() != before
    refused = train(outside, "edited", base=words, code=2).stderr
    assert "the code changed, 1 of" in refused
    assert "modules: mypackage.blocks\n" in refused
    helper.write_text(before)
    assert "(bitwise" in train(outside, "edited", base=words).stdout
    assert differences(outside, "once", "edited") == []


def test_its_run_is_sampled_and_evaluated_without_a_word(outside, once):
    said = run_script(outside, "sample", "run=once", "sample.n=4")
    assert re.search(r"drawn by Midpoint \(steps 2\b.*\), guidance 2", said)
    pictures = outside / "runs" / "once" / "pictures"
    assert sorted(p.name for p in pictures.glob("0*.png")) == [f"{k:06d}.png" for k in range(4)]
    assert "the whole report is" in run_script(outside, "evaluate", "run=once", *EVALUATE)
    assert "Midpoint" in (outside / "runs" / "once" / "evaluation" / "report.md").read_text()


def test_from_elsewhere_it_takes_a_word(outside, once):
    (outside / "elsewhere").mkdir()
    foreign = outside / "elsewhere" / "state.ckpt"
    shutil.copy(once, foreign)
    words = ["run=gone", f"ckpt_path={foreign}", f"sample.out={outside / 'drawn'}", "sample.n=1"]
    refused = run_script(outside, "sample", *words, code=2)
    assert (
        "asks for mypackage.network.Plain as its backbone, which is not code of this project"
        in refused
    )
    assert "If you trust mypackage, say so: trust=[mypackage]\n" in refused
    assert not (outside / "drawn").exists()
    run_script(outside, "sample", *words, "trust=[mypackage]")
    assert (outside / "drawn" / "000000.png").exists()
    assert "trust=[mypackage]\n" in run_script(outside, "evaluate", *words[:2], *EVALUATE, code=2)


@pytest.mark.parametrize(
    "target", ["os.system", "subprocess.Popen", "mypackage.data.Path", "mypackage.data.decode"]
)
def test_a_trusted_package_opens_the_door_for_nothing_else(outside, once, target):
    state = load_state(once)
    for name in ("backbone", "schedule", "ema"):
        node = {"_target_": target, "_args_": [f"touch {outside / 'touched'}"]}
        evil = outside / "evil.ckpt"
        torch.save(
            state
            | {"config": state["config"] | {name: {**state["config"][name], "extra": [node]}}},
            evil,
        )
        with pytest.raises(
            ValueError, match=f"asks for {re.escape(target)} as its {name}.* is not run"
        ):
            load_module(evil, trust=["mypackage"], training=False)
    assert not (outside / "touched").exists()


def test_in_a_notebook(outside, once):
    with pytest.raises(ValueError, match=r"trust=\[mypackage\]"):
        load_module(once)
    for trust in (["mypackage"], Trust(runs=outside / "runs")):
        weights = load_module(once, trust=trust).state_dict()
        stored = load_state(once)["state_dict"]
        assert weights.keys() == stored.keys()
        assert all(torch.equal(weights[name], value) for name, value in stored.items())


def test_what_only_trained_it_need_not_be_there_to_draw_with_it(outside, once):
    state = load_state(once)
    file = outside / "without.ckpt"
    torch.save(
        state
        | {"config": state["config"] | {"optimizer": {"_target_": "not_installed.Optimizer"}}},
        file,
    )
    with pytest.raises(
        ValueError,
        match=r"asks for not_installed\.Optimizer as its optimizer.*trust=\[mypackage,not",
    ):
        load_module(file, trust=["mypackage"])
    drawing = load_module(file, trust=["mypackage"], training=False)
    assert all(
        torch.equal(v, state["state_dict"][f"ema.{k}"]) for k, v in drawing.ema.state_dict().items()
    )
    with pytest.raises(RuntimeError, match="loaded for sampling"):
        drawing.configure_optimizers()


def test_what_is_typed_is_run(outside):
    given = add_config_folders([PLACE, "run=any", "sampler=midpoint", "sampler.steps=3"])
    stock = {
        "sampler": {"_target_": "sturdy.diffusion.sampler.Heun", "steps": 5},
        "guidance": {"scale": 1.0},
    }
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        typed = resolve_sampling(compose("sample", given), stock)
        assert type(typed.make_sampler()).__name__ == "Midpoint"
        sampling = resolve_sampling(compose("sample", ["run=any"]), stock)
        assert isinstance(sampling.make_sampler(), Heun)
    own = {**stock, "sampler": {"_target_": "mypackage.sampler.Midpoint"}}
    with pytest.raises(
        ValueError,
        match=r"asks for mypackage\.sampler\.Midpoint as its sampler.*trust=\[mypackage\]",
    ):
        resolve_sampling(OmegaConf.create(), own)


WORDS = {
    "backbone=plane": "there is no such backbone. Did you mean plain?",
    "backbone=plain +backbone.widht=3": (
        "mypackage.network.Plain takes no 'widht'. Did you mean width?"
    ),
}


@pytest.mark.parametrize(
    "place", ["pkg://mypackage.conf", "file://FOLDER/mypackage/conf", "announced"]
)
def test_its_options_are_known_before_anything_is_imported(outside, place, tmp_path, monkeypatch):
    """The package would end the process if it was imported."""
    shutil.copytree(outside / "outside" / "mypackage", tmp_path / "mypackage")
    (tmp_path / "mypackage" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    places = [f"hydra.searchpath=[{place.replace('FOLDER', str(tmp_path))}]"]
    if place == "announced":
        places = []
        info = tmp_path / "mypackage-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mypackage\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text("[sturdy.conf]\nmypackage = mypackage.conf\n")

    def say(*words, code=2):
        command = [sys.executable, "-X", "importtime", str(ROOT / "train.py"), *places, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr[-2000:]
        assert not re.search(r"\| +(torch|lightning|mypackage)$", done.stderr, re.MULTILINE)
        return done.stdout + done.stderr

    for words, answer in WORDS.items():
        assert answer in say(*words.split())
    assert "backbone: aligned_dit, borrowed, dit, plain, reader, unet, unet2d" in say(
        "--help", code=0
    )


@pytest.mark.parametrize("word", ["[file:///nowhere/conf]", "[pkg://nobody.conf]", "conf", "[a"])
def test_a_place_that_is_none_is_named(word):
    with pytest.raises(ValueError, match=r"hydra\.searchpath"):
        add_config_folders([f"hydra.searchpath={word}"])


@pytest.mark.parametrize("where", ["typed", "in the config"])
def test_a_sweep_and_its_jobs_know_the_place(where, tmp_path):
    """Typed, it has become an absolute path."""
    script = mini.project(tmp_path)
    (tmp_path / "theirs" / "plus").mkdir(parents=True)
    (tmp_path / "theirs" / "plus" / "one.yaml").write_text("# @package _global_\nend: 0\n")
    words = ["+plus=one", "seed=1,2"]
    if where == "typed":
        words = ["hydra.searchpath=[theirs]", *words]
    else:
        with (tmp_path / "conf" / "train.yaml").open("a") as file:
            file.write("hydra:\n  searchpath: [theirs]\n")
    done = subprocess.run(
        mini.command(script, *words), cwd=tmp_path, env=mini.environment(), timeout=60
    )
    assert done.returncode == 0
    for seed in (1, 2):
        started = (tmp_path / "runs" / "mini" / f"seed-{seed}" / "starts").read_text()
        assert started.startswith(
            f"hydra.searchpath=['file://{tmp_path}/theirs'] +plus=one" * (where == "typed")
        )
    wrong = subprocess.run(
        mini.command(script, "+plus=ome", "seed=1"), capture_output=True, cwd=tmp_path, text=True
    )
    assert ("Did you mean one?" in wrong.stderr) == (where == "in the config")


def test_the_arguments_of_ones_own_are_read_and_never_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "alone.py").write_text(
        "raise SystemExit('imported')\n"
        "from broken import Broken\nfrom round_a import Ring\nfrom inner.part import Deep as "
        "Renamed\n"
        "class Mine:\n    def __init__(this, width, *, depth=1): ...\n"
        "class Child(Mine): ...\n"
        "class Own(Own): ...\n"
        "class Any:\n    def __init__(self, **rest): ...\n"
        "@made_elsewhere\nclass Made(Mine): ...\n"
        "@made_elsewhere\ndef made(a): ...\n"
        "def plain(a, b=1): ...\n"
        "try:\n    from nowhere import Fast\nexcept ImportError:\n    class Fast:\n        def "
        "__init__(self, c): ...\n"
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "round_a.py").write_text("from round_b import Ring\n")
    (tmp_path / "round_b.py").write_text("from round_a import Ring\n")
    (tmp_path / "inner").mkdir()  # a namespace package
    (tmp_path / "inner" / "part.py").write_text("from .deeper import Deep\n")
    (tmp_path / "inner" / "deeper.py").write_bytes(
        "class Deep:\n    def __init__(self, é): ...\n".encode("latin-1")
    )
    known = {
        "Mine": {"width", "depth"},
        "Child": {"width", "depth"},
        "plain": {"a", "b"},
        "Fast": {"c"},
    }
    unknown = ("Own", "Any", "Made", "made", "Broken", "Ring", "Renamed", "Nothing", "Mine.width")
    for name in (*known, *unknown):
        found = arguments(f"alone.{name}")
        assert (None if found is None else set(found)) == known.get(name), name
    assert arguments("nobody.Mine") is arguments("Mine") is arguments("") is arguments("..") is None


PAGES = sorted((ROOT / "docs" / "extend").glob("*.md"))
BLOCK = re.compile(r"^`([\w/.]+)`:?\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_pages_show_the_files_that_were_tested():
    shown = {}
    for page in PAGES:
        for name, text in BLOCK.findall(page.read_text()):
            assert text == (EXAMPLE / name).read_text(), f"{page.name} shows another {name}"
            shown[name] = page
    files = [path for kind in ("py", "yaml", "toml") for path in EXAMPLE.rglob(f"*.{kind}")]
    assert {str(f.relative_to(EXAMPLE)) for f in files} - {"mypackage/__init__.py"} == shown.keys()


@pytest.mark.slow
def test_it_is_proved(outside, words):
    paths = [
        f"paths.runs={outside / 'runs'}",
        f"paths.cache={outside / 'cache'}",
        "name=proved",
        "kills=1",
    ]
    command = [sys.executable, str(ROOT / "prove.py"), *words, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PROVED: the killed run ended in the same bits" in done.stdout
