"""The documentation is true: its commands are run or checked, its links and names lead somewhere.

A command stands in a ``bash`` block. It is run if it is in ``RUN``, on one small run that all of
them share. Any other command is composed and checked without training. A block whose commands need
more than this machine has says so in the line before it: ``<!-- needs: gpu -->``.
"""

import ast
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from runs import ROOT, fork
from sturdy.cli.main import compose_run
from sturdy.cli.search import is_search, plan_search
from sturdy.cli.search_path import add_config_folders
from sturdy.cli.sweep_plan import plan_jobs

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
NEEDS = {"gpu", "slurm", "network", "hours", "Docker", "Docker and GPUs"}
SHELL = ("export ", "source ", "make ", "pytest ", "diff ")
SCRIPTS = ("train.py", "sample.py", "evaluate.py", "export.py", "serve.py")
FENCE = re.compile(r"^(<!-- .*? -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\b(?:\.venv/bin/)?python ([^;]+)")

TINY = [
    "trainer=cpu",
    "trainer.threads=1",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "data.image_size=16",
    "data.batch_size=8",
    "data.holdout=0.2",
    "sampler.steps=2",
    "callbacks.checkpoint.every_n_train_steps=2",
    "callbacks.samples=null",
]
TINY_DIT = [*TINY, "data.source.n=60", "backbone.width=32", "backbone.depth=2"]
TINY_UNET = [*TINY, "backbone.width=8", "backbone.head_dim=8", "backbone.blocks=1"]
TINY_SAMPLE = ["sample.n=2", "sampler.steps=2", "threads=1"]
TINY_EVALUATE = [
    "evaluate.n=8",
    "evaluate.batch_size=4",
    "evaluate.levels=2",
    "evaluate.audit_seen=0",
    "features.seen=16",
    "threads=1",
]
MADE = ("tiny-sd", "cars-with-captions")  # folders that commands of the fine-tuning page make
FINETUNE = (
    "train.py experiment=finetune base=tiny-sd data.root=cars-with-captions name=tiny "
    "data.image_size=64 lora.rank=16 lora.dropout=0.1 optimizer.lr=1e-4 trainer=cpu "
    "trainer.max_steps=60 trainer.val_check_interval=20 "
    "callbacks.checkpoint.every_n_train_steps=10 callbacks.samples.every_n_steps=null"
)
# The commands that are run, in this order, and the words that make each small.
RUN = {
    "train.py experiment=cars": TINY_DIT,
    "sample.py run=cars sample.n=64": TINY_SAMPLE,
    "evaluate.py run=cars evaluate.n=1000": TINY_EVALUATE,
    "export.py run=cars to=torch_export": ["preview=2", "threads=1"],
    "-m exact_resume status runs/cars": [],
    "-m exact_resume status runs/cars --html": [],
    "-m exact_resume verify runs/cars": [],
    "train.py data=folder data.root=$HOME/photos name=mine data.image_size=64": TINY_UNET,
    "sample.py run=mine sample.n=64 sampler=heun sampler.steps=30 guidance.scale=2": TINY_SAMPLE,
    "evaluate.py run=mine evaluate.n=1000": TINY_EVALUATE,
    "evaluate.py run=mine drift=true": ["features.seen=16", "threads=1"],
    "train.py data=folder data.root=$HOME/photos name=mine data.image_size=64 ckpt_path=last "
    "trainer.max_steps=40_000": [*TINY_UNET[:2], *TINY_UNET[3:], "trainer.max_steps=6"],
    "-m exact_resume status runs/mine": [],
    "examples/tiny_sd/build.py tiny-sd": [],
    "examples/tiny_sd/cars.py cars-with-captions": [],
    FINETUNE: ["trainer.threads=1", "trainer.max_steps=2", "trainer.val_check_interval=2"],
    "sample.py run=tiny 'sample.prompt=a red pickup, city, night' sample.n=4 guidance.scale=7.5": [
        *TINY_SAMPLE
    ],
}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    marker: str
    language: str
    text: str


def blocks():
    for page in PAGES:
        for marker, language, text in FENCE.findall(page.read_text()):
            yield Block(page, marker.strip(), language, text)


def commands():
    """Yield (page, line) for every command that does not need more than this machine has."""
    for block in blocks():
        if block.language != "bash" or block.marker:
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                quoted = " ".join(words) if "'" not in line else line.split(" #")[0].rstrip()
                yield block.page, re.sub(r"\s+", " ", quoted)


def python_commands():
    """Yield the words of every ``python`` command, without ``python``."""
    for _, line in commands():
        for found in COMMAND.findall(line):
            yield found.strip()


ALL = sorted(set(python_commands()) - set(RUN))


def test_every_block_that_needs_something_says_what_is_known():
    markers = [block.marker for block in blocks() if block.marker]
    assert markers
    for marker in markers:
        assert re.fullmatch(rf"<!-- needs: ({'|'.join(NEEDS)}) -->", marker), marker


def test_every_line_is_of_a_kind_that_is_tested():
    for page, line in commands():
        known = COMMAND.search(line) or line.startswith(SHELL)
        assert known, f"{page.name}: {line}"


def test_commands_stand_in_bash_blocks():
    for page in PAGES:
        text = FENCE.sub("", page.read_text())
        hidden = re.findall(r"^    (?:\S*python|make|pip|torchrun) .*$", text, re.MULTILINE)
        assert hidden == [], page.name


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    text = "\n".join(line for _, line in commands())
    targets = set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE))
    assert {"train", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.fixture
def with_example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "mypackage"))
    yield
    add_config_folders([])


@pytest.mark.parametrize("command", ALL)
def test_a_command_can_be_meant(command, with_example):
    """Compose the config of the command, and check it, without training."""
    script, *words = shlex.split(os.path.expandvars(command).replace("$step", "1000"))
    run_elsewhere = ("benchmarks/dozen.py", "benchmarks/busy.py", "docs/generate.py", "-m")
    if script in (*run_elsewhere, "examples/plain_lightning/train.py"):
        assert script == "-m" or (ROOT / script).exists()
        return
    if script == "prove.py":
        script = "train.py"
        words = [word for word in words if not word.startswith(("kills=", "break="))]
    assert script in SCRIPTS
    config = (ROOT / "conf" / script).with_suffix(".yaml")
    words = [word for word in words if word not in ("--help", "--cfg", "job")]
    sweep = "-m" in words
    words = add_config_folders([word for word in words if word != "-m"], config)
    if is_search(words):
        assert plan_search(config, words).space
    elif sweep:
        assert plan_jobs(config, words)
    else:
        compose_run(config, words)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with ``photos``, for the commands that are run."""
    tmp = tmp_path_factory.mktemp("docs")
    draw = np.random.default_rng(0)
    for k in range(60):
        file = tmp / "photos" / ("cat", "dog")[k % 2] / f"{k:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file)
    return tmp


def run_command(home, number, command, extra):
    """Run a command of ``RUN`` in ``home``; return what it printed."""
    script, *words = shlex.split(command.replace("$HOME", str(home)))
    if script == "-m":
        module, action, run, *options = words
        done = subprocess.run(
            [sys.executable, "-m", module, action, str(home / run), *options],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    for folder in MADE:
        words = [re.sub(rf"\b{folder}$", str(home / folder), word) for word in words]
    replaced = {word.split("=")[0] for word in extra}
    words = [word for word in words if word.split("=")[0] not in replaced]
    paths = [f"paths.runs={home / 'runs'}", f"paths.cache={home / 'cache'}"]
    if script.startswith("examples/"):
        paths = []
    process, out, err = fork(home, f"{number}", [str(ROOT / script), *words, *extra, *paths])
    process.join(120)
    printed = out.read_text() + err.read_text()
    assert process.exitcode == 0, printed
    return printed


def test_the_commands_that_are_run(home, monkeypatch):
    """One small run of drawn cars and one of photos, and what the pages do with them."""
    on_the_pages = set(python_commands())
    for number, (command, extra) in enumerate(RUN.items()):
        assert command in on_the_pages, "no page has this command any more"
        run_command(home, number, command, extra)
    assert len(list((home / "runs" / "tiny" / "pictures").glob("0*.png"))) == 2
    for name in ("cars", "mine"):
        run = home / "runs" / name
        assert (run / "metrics.csv").exists()
        assert (run / "index.html").exists()
        assert (run / "evaluation" / "report.md").exists()
        assert list(run.glob("*/grid.png"))
    again = run_command(home, "again", "train.py experiment=cars", TINY_DIT)
    assert "finished" in again
    monkeypatch.chdir(home)
    for page in ("concepts/checkpoint-format.md", "guides/sample-and-edit.md"):
        text = (ROOT / "docs" / page).read_text()
        [code] = [code for _, language, code in FENCE.findall(text) if language == "python"]
        assert "step-00002000" in code
        namespace: dict = {}
        exec(code.replace("step-00002000", "step-00000004"), namespace)
        assert namespace["module"].ema is not None


def test_python_blocks_import_what_exists():
    """Names that the pages import from this project are there."""
    seen = 0
    for block in blocks():
        if block.language != "python" or block.page.parent.name == "extend":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if not isinstance(node, ast.ImportFrom):
                continue
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block.page.name}: {alias.name}"
                seen += 1
    assert seen


def test_generated_pages_are_up_to_date():
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    for path, text in generate["pages"]():
        assert path.read_text() == text, f"{path.name}: run python docs/generate.py"


def slug(heading):
    """Return the anchor of a heading, as Markdown's table of contents makes it."""
    text = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


def anchors(page):
    text = FENCE.sub("", page.read_text())
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", page.read_text())):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


CODE = re.compile(r"`[^`\n]+`")
PATH = re.compile(r"(?<![\w/.-])(?:src|conf|docs|tests|examples|benchmarks|notebooks)/[\w./-]+")
MODULE_PATH = re.compile(r"`((?:sturdy|exact_resume)/[\w/]+\.py)`")
NAME = re.compile(r"`((?:sturdy|exact_resume)(?:\.\w+)+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_and_names_exist(page):
    if page.name == "CHANGELOG.md":  # it names what went, too
        return
    text = page.read_text()
    for path in PATH.findall(" ".join(CODE.findall(text))):
        assert (ROOT / path).exists(), path
    for path in MODULE_PATH.findall(text):
        assert (ROOT / "src" / path).exists(), path
    for name in NAME.findall(text):
        assert exists(name), name
    for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE):
        assert find_spec(name) is not None, name


def test_pages_that_the_code_names_exist():
    """Messages and comments send their readers to a page of today."""
    folders = [ROOT / name for name in ("src", "conf", "tests", "benchmarks", "examples")]
    files = [file for folder in folders for file in folder.rglob("*")]
    files = [*files, *ROOT.glob("*.py"), ROOT / "Makefile"]
    missing = []
    for file in files:
        if file.suffix in (".py", ".yaml", "") and file.is_file():
            text = file.read_text(errors="ignore")
            for name in re.findall(r"\bdocs/[\w/-]+(?:\.\w+)?", text):
                if not (ROOT / name).exists():
                    missing.append(f"{file.relative_to(ROOT)}: {name}")
    assert missing == []


def exists(name):
    """Return whether ``name`` is a module, or an attribute of one."""
    module, _, attribute = name.rpartition(".")
    try:
        if find_spec(name) is not None:
            return True
    except ModuleNotFoundError:
        pass
    return hasattr(importlib.import_module(module), attribute)


def test_every_page_is_on_the_site():
    """A page that the navigation does not name would not be found."""
    site = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES[3:]:
        assert f"- {page.relative_to(ROOT / 'docs')}\n" in site, page.name
