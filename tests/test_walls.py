"""The walls of the house: who may import whom, what the README says is there, and what the config names exists."""

import ast
import fnmatch
import re
import sys

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from runs import ROOT
from sturdy.signatures import unknown_arguments

SOURCE = ROOT / "src" / "sturdy"
FILES = sorted(SOURCE.rglob("*.py"))
CONFIGS = sorted((ROOT / "conf").rglob("*.yaml"))

# What of ours each room may import, besides itself; they meet in conf/.
MAY = {
    "randomness": set(),
    "signatures": set(),
    "files": set(),
    "system": set(),
    "searchpath": {"signatures"},
    "words": set(),
    "command": {"signatures", "words"},
    "sweep": {"command", "resume"},
    "slurm": {"command", "searchpath", "resume", "sweep"},
    "door": {
        "command",
        "searchpath",
        "sweep",
        "slurm",
        "system",
        "resume",
    },
    "prove": {"door", "resume", "system"},
    "sabotage": {"randomness", "data", "training", "resume"},
    "diffusion": {"randomness"},
    "backbone": {"randomness"},
    "data": {"randomness", "files", "system"},
    "resume": {"randomness", "files"},
    "evaluation": {"randomness", "diffusion"},
    "training": {"randomness", "files", "system", "signatures", "diffusion", "resume", "evaluation"},
}
LIGHTNING = {"training", "data", "resume", "evaluation"}
HYDRA = {"words", "command", "searchpath", "sweep", "slurm", "door", "prove", "training"}
TORCH_ONLY = {"diffusion", "backbone", "randomness"}


def room(file):
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(source):
    """Dotted names of all modules that ``source`` imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def trespasses(room, source):
    """What ``source`` in ``room`` imports and must not."""
    return [name for name in imported(source) if not may(room, *name.split("."))]


def may(room, package, *rest):
    match package:
        case "sturdy":
            return not rest or rest[0] in MAY[room] | {room}
        case "lightning":
            return room in LIGHTNING
        case "hydra" | "omegaconf":
            return room in HYDRA
        case _:
            return room not in TORCH_ONLY or package == "torch" or package in sys.stdlib_module_names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_nobody_climbs_a_wall(file):
    if file.name == "__init__.py" and file.parent == SOURCE:
        assert not file.read_text(), "the package itself imports nothing"
    else:
        assert trespasses(room(file), file.read_text()) == []


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("data", "from sturdy.training import run"),
        ("data", "import sturdy.diffusion.schedule"),
        ("data", "from sturdy import backbone"),
        ("training", "from sturdy.backbone.unet import UNet"),
        ("evaluation", "def f():\n    from sturdy.training.build import rebuild"),
        ("door", "import lightning as L"),
        ("backbone", "from lightning.pytorch import Trainer"),
        ("diffusion", "from hydra.utils import instantiate"),
        ("diffusion", "import numpy as np"),
        ("resume", "from sturdy.data.cache import Cache"),
    ],
)
def test_control_a_trespass_is_seen(room, line):
    assert trespasses(room, line)


def test_the_rooms_are_those_that_have_rules():
    assert {room(file) for file in FILES} - {"__init__"} == MAY.keys()


def readme_tree():
    """Paths that the README's section "The tree" names, from its indented block."""
    section = (ROOT / "README.md").read_text().split("## The tree")[1].split("\n## ")[0]
    folders = [(-1, "")]  # (indentation, path), the innermost last
    for line in section.splitlines():
        if not line.startswith("    "):
            continue
        indent = len(line) - len(line.lstrip())
        while folders[-1][0] >= indent:
            folders.pop()
        for word in line.split():  # names come first, then what they are
            if not (re.fullmatch(r"[\w./-]+(/|\.\w+)", word) or word in ("Makefile", "LICENSE")):
                break
            path = folders[-1][1] + word
            yield path
            if word.endswith("/"):
                folders.append((indent, path))


def there(folder):
    """What is in ``folder`` and is neither ignored nor what every project has; folders with a slash."""
    gitignore = ROOT / ".gitignore"
    ignored = [line.strip("/") for line in gitignore.read_text().split()] if gitignore.exists() else []
    ignored += [".*", "__pycache__", "*.egg-info", "__init__.py"]
    ignored += ["README.md", "LICENSE", "Makefile", "pyproject.toml", "constraints.txt"]
    for path in folder.iterdir():
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored):
            yield str(path.relative_to(ROOT)) + ("/" if path.is_dir() else "")


def test_the_readmes_tree_is_the_tree():
    named = list(readme_tree())
    assert len(named) == len(set(named))
    assert [path for path in named if not (ROOT / path).exists()] == [], "named, but not there"
    assert {*there(ROOT), *there(SOURCE)} - {"src/"} - set(named) == set(), "there, but not named"


def targets(node):
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        node = node.values()
    for value in node:
        if isinstance(value, dict | list):
            yield from targets(value)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT / "conf")))
def test_a_config_parses_and_what_it_names_exists(file):
    config = OmegaConf.load(file)
    assert isinstance(config, DictConfig | ListConfig)
    for target in targets(OmegaConf.to_container(config)):
        assert callable(get_object(target)), target
    assert list(unknown_arguments(OmegaConf.to_container(config), f"{file.parent.name}.")) == []


def test_every_room_of_conf_is_reached():
    assert len([t for file in CONFIGS for t in targets(OmegaConf.to_container(OmegaConf.load(file)))]) > 20
