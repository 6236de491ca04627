"""The walls of the house: who may import whom, what the README says is there, and what the config
names exists.
"""

import ast
import fnmatch
import re
import subprocess
import sys

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from runs import ROOT
from sturdy.cli.signatures import unknown_arguments

SOURCE = ROOT / "src"
FILES = sorted(path for path in SOURCE.rglob("*.py"))
CONFIGS = sorted((ROOT / "conf").rglob("*.yaml"))

# From the ground up: a room imports itself and rooms of lower layers only.
LAYERS = [
    {"exact_resume"},
    {"sturdy.errors", "sturdy.image_size", "sturdy.keys", "sturdy.renames", "sturdy.progress"},
    {"sturdy.diffusion", "sturdy.backbone", "sturdy.data", "sturdy.encoders"},
    {"sturdy.pretrained"},
    {"sturdy.trust", "sturdy.training"},
    {"sturdy.sampling"},
    {"sturdy.evaluation", "sturdy.export", "sturdy.serving"},
    {"sturdy.cli", "sturdy.fault_injection", "sturdy.prove"},
]
TOGETHER = {("sturdy.training", "sturdy.trust"), ("sturdy.prove", "sturdy.cli")}
HYDRA = {"sturdy.errors", "sturdy.training", "sturdy.sampling", "sturdy.evaluation", "sturdy.trust"}
HYDRA |= {"sturdy.cli", "sturdy.export", "sturdy.prove", "sturdy.serving"}
# Only this room knows what others trained, and its packages are imported when they are used.
PRETRAINED = {"diffusers", "transformers", "peft", "safetensors"}
WEIGHTS_FILE = "exact_resume.weights_file"  # reads safetensors
TORCH_ONLY = {"sturdy.diffusion", "sturdy.backbone"}


def module_name(file):
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    if module.split(".")[0] == "exact_resume":
        return "exact_resume"
    return ".".join(module.split(".")[:2])


def layer(name):
    return next((number for number, rooms in enumerate(LAYERS) if name in rooms), None)


def imported(source):
    """Yield the dotted names of all modules that ``source`` imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def trespasses(place, source):
    """Return what ``source`` in the room ``place`` imports and must not."""
    return [name for name in imported(source) if not may_import(place, name)]


def may_import(place, name):
    package = name.split(".")[0]
    if package in ("sturdy", "exact_resume"):
        other = room(name)
        if name == "sturdy" or other == place or (place, other) in TOGETHER:
            return True
        return layer(other) is not None and layer(other) < layer(place)
    if package == "examples":
        return False
    if package in PRETRAINED:
        return place == "sturdy.pretrained"
    if package in ("hydra", "omegaconf"):
        return place in HYDRA
    known = package == "torch" or package in sys.stdlib_module_names
    return place not in TORCH_ONLY or known or package == "typing_extensions"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_a_room_imports_lower_rooms_only(file):
    if module_name(file) == "sturdy":
        assert [*imported(file.read_text())] == ["exact_resume"], "the package itself is light"
    else:
        found = trespasses(room(module_name(file)), file.read_text())
        if module_name(file) == WEIGHTS_FILE:
            found = [name for name in found if not name.startswith("safetensors")]
        assert found == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("exact_resume", "from sturdy.training import run"),
        ("exact_resume", "from omegaconf import OmegaConf"),
        ("sturdy.data", "from sturdy.training import run"),
        ("sturdy.data", "import sturdy.diffusion.schedule"),
        ("sturdy.data", "from sturdy import backbone"),
        ("sturdy.training", "from examples.cars.source import Cars"),
        ("sturdy.training", "def f():\n    from sturdy.sampling.config import merge"),
        ("sturdy.backbone", "from lightning.pytorch import Trainer"),
        ("sturdy.diffusion", "from hydra.utils import instantiate"),
        ("sturdy.diffusion", "import numpy as np"),
        ("sturdy.training", "def f():\n    from diffusers import UNet2DModel"),
        ("sturdy.encoders", "import transformers"),
        ("sturdy.sampling", "from peft import LoraConfig"),
        ("exact_resume", "from safetensors.torch import load_file"),
        ("sturdy.pretrained", "from sturdy.training import frozen"),
        ("sturdy.data", "from sturdy.pretrained import borrowed"),
    ],
)
def test_control_a_trespass_is_seen(place, line):
    assert trespasses(place, line)


def imported_at_once(source):
    """Yield the packages that ``source`` imports when it is imported itself."""
    lines = []
    for line in ast.parse(source).body:
        is_for_types = isinstance(line, ast.If) and ast.unparse(line.test) == "TYPE_CHECKING"
        if not is_for_types and not isinstance(line, ast.FunctionDef | ast.ClassDef):
            lines.append(line)
    yield from (name.split(".")[0] for name in imported(ast.unparse(ast.Module(lines, []))))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_what_others_trained_is_imported_when_it_is_used(file):
    assert PRETRAINED & {*imported_at_once(file.read_text())} == set()


def test_control_an_early_import_is_seen():
    early = "try:\n    import diffusers\nexcept ImportError:\n    pass"
    late = (
        "if TYPE_CHECKING:\n    import peft\n"
        "def f():\n    import diffusers\n"
        "class A:\n    def g(self):\n        import peft"
    )
    assert PRETRAINED & {*imported_at_once(early)}
    assert not PRETRAINED & {*imported_at_once(late)}


def test_a_run_without_pretrained_parts_loads_none_of_their_packages():
    code = "import sturdy.training.run, sturdy.pretrained.borrowed, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # torchmetrics, which Lightning imports, imports transformers where it is installed
    assert (PRETRAINED - {"transformers"}) & {*done.stdout.split()} == set()


def test_every_room_has_a_layer():
    rooms = {room(module_name(file)) for file in FILES} - {"sturdy"}
    assert rooms == {name for rooms in LAYERS for name in rooms}


def import_graph():
    """Return, by module, the modules of ours that it imports anywhere."""
    modules = {module_name(file): file for file in FILES}
    graph = {}
    for name, file in modules.items():
        targets = set()
        for found in imported(file.read_text()):
            target = found if found in modules else found.rpartition(".")[0]
            if target in modules and target != name:
                targets.add(target)
        graph[name] = targets
    return graph


def circle(graph):
    """Return modules that import each other in a loop; empty if there is none."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        path.append(name)
        for target in sorted(graph.get(name, ())):
            if found := visit(target):
                return found
        path.pop()
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name))), [])


def test_no_modules_import_each_other():
    assert circle(import_graph()) == []


def test_control_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def readme_tree():
    """Yield the paths that docs/concepts/architecture.md names under "The tree"."""
    page = ROOT / "docs" / "concepts" / "architecture.md"
    section = page.read_text().split("## The tree")[1].split("\n## ")[0]
    folders = [(-1, "")]  # (indentation, path), the innermost last
    for line in section.splitlines():
        if not line.startswith("    "):
            continue
        indent = len(line) - len(line.lstrip())
        while folders[-1][0] >= indent:
            folders.pop()
        for word in line.split():  # names come first, then what they are
            if not re.fullmatch(r"[\w./-]+(/|\.\w+)|Makefile|LICENSE|Dockerfile", word):
                break
            path = folders[-1][1] + word
            yield path
            if word.endswith("/"):
                folders.append((indent, path))


def there(folder):
    """What is in ``folder`` and is neither ignored nor what every project has; folders with a
    slash.
    """
    gitignore = ROOT / ".gitignore"
    ignored = (
        [line.strip("/") for line in gitignore.read_text().split()] if gitignore.exists() else []
    )
    ignored += [".*", "__pycache__", "*.egg-info", "__init__.py"]
    ignored += ["README.md", "LICENSE", "NOTICE", "Makefile", "pyproject.toml", "constraints.txt"]
    for path in folder.iterdir():
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored):
            yield str(path.relative_to(ROOT)) + ("/" if path.is_dir() else "")


def test_the_readmes_tree_is_the_tree():
    named = list(readme_tree())
    assert len(named) == len(set(named))
    assert [path for path in named if not (ROOT / path).exists()] == [], "named, but not there"
    assert {*there(ROOT)} - {"src/"} - set(named) == set(), "there, but not named"


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
    assert (
        len([t for file in CONFIGS for t in targets(OmegaConf.to_container(OmegaConf.load(file)))])
        > 20
    )
