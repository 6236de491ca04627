"""The hash of the code that runs: what changes it, what does not, and which modules are found."""

import sys

import pytest

from exact_resume import code_hash
from exact_resume.code_hash import code_hashes, targets

NET = '''
"""A network."""
import os
from typing import TYPE_CHECKING

import torch
from . import helper
from mine.deep.layer import Layer

if TYPE_CHECKING:
    from mine.types import Shape


class Net(torch.nn.Module):
    """Doubles."""

    def forward(self, x):
        """Double."""
        return helper.double(x)  # twice
'''
FILES = {
    "mine/__init__.py": "",
    "mine/net.py": NET,
    "mine/helper.py": "def double(x):\n    return 2 * x\n",
    "mine/types.py": "Shape = tuple\n",
    "mine/unrelated.py": "x = 1\n",
    "mine/deep/__init__.py": "",
    "mine/deep/layer.py": "def f():\n    from ..lazy import g\n    return g\nclass Layer: pass\n",
    "mine/lazy.py": "g = 1\n",
    "alone.py": "class Alone: pass\n",
    "reexport/__init__.py": "from reexport.inside import Part\n",
    "reexport/inside.py": "class Part: pass\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Two packages and a module beside the clone; returns a function that hashes with what was
    written to files.
    """
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    def hashes(root="mine.net.Net", files=None, **options):
        for name, text in (files or {}).items():
            (tmp_path / name).write_text(text)
        for cached in (code_hash.find, code_hash.file_hash, code_hash._parse):
            cached.cache_clear()
        return code_hashes([root], known=["torch"], **options)

    return hashes


def test_a_target_brings_what_it_imports_and_nothing_is_imported(package):
    names = [name for name in package() if not name.startswith("sturdy")]
    assert names == ["mine", "mine.deep", "mine.deep.layer", "mine.helper", "mine.lazy", "mine.net"]
    assert not any(name.split(".")[0] == "mine" for name in sys.modules)


def test_a_module_alone_and_a_name_that_a_package_passes_on(package):
    assert list(package("alone.Alone")) == ["alone"]
    assert list(package("reexport.Part")) == ["reexport", "reexport.inside"]


@pytest.mark.parametrize(
    "text",
    [
        NET.replace("# twice", "# two times"),
        NET.replace('"""Double."""', '"""Multiply by two."""'),
        NET.replace('        """Double."""\n', ""),
        NET.replace('"""A network."""\n', ""),
        NET.replace("return helper.double(x)", "return helper.double(\n            x\n        )"),
        NET.replace("from mine.types import Shape", "from mine.types import Other"),
    ],
)
def test_comments_docstrings_and_formatting_change_nothing(text, package):
    before = package()
    assert text != NET
    if "Other" in text:  # a type is code, but brings no module
        assert list(package(files={"mine/net.py": text})) == list(before)
    else:
        assert package(files={"mine/net.py": text}) == before


@pytest.mark.parametrize(
    ("file", "text", "changed"),
    [
        ("mine/net.py", NET.replace("double(x)", "double(-x)"), {"mine.net"}),
        (
            "mine/net.py",
            NET.replace("def forward(self, x)", "def forward(self, x=None)"),
            {"mine.net"},
        ),
        ("mine/helper.py", "def double(x):\n    return 3 * x\n", {"mine.helper"}),
        ("mine/helper.py", "def double(x):\n    return 2.0 * x\n", {"mine.helper"}),
        ("mine/lazy.py", "g = 2\n", {"mine.lazy"}),
        ("mine/__init__.py", "import os\n", {"mine"}),
        ("mine/unrelated.py", "x = 2\n", set()),
        ("mine/types.py", "Shape = list\n", set()),
    ],
)
def test_a_changed_meaning_changes_the_hash_of_its_module(file, text, changed, package):
    before, after = package(), package(files={file: text})
    assert {
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    } == changed


def test_patterns_leave_modules_out_but_no_root(package):
    assert list(package(leave_out=["mine", "mine.deep*"])) == ["mine.helper", "mine.net"]
    assert list(package(leave_out=["*"])) == ["mine.net"]


def test_an_installed_package_counts_by_its_version(package):
    from importlib.metadata import version

    assert package("omegaconf.DictConfig") == {"omegaconf": f"version {version('omegaconf')}"}
    assert package("PIL.Image.Image") == {"PIL": f"version {version('pillow')}"}
    assert package("torch.optim.AdamW") == {}  # the caller accounts for it
    assert package("collections.Counter") == {}
    assert package("there.is.no.such") == {}


def test_a_file_that_cannot_be_parsed_counts_by_its_bytes(package):
    one = package(files={"mine/helper.py": "def (:\n"})
    two = package(files={"mine/helper.py": "def ((:\n"})
    assert one["mine.helper"] != two["mine.helper"]


def test_the_hash_is_the_same_under_every_version_of_python(package):
    """Python 3.11, 3.12 and 3.13 gave this value; their trees have other fields, and are printed
    otherwise.
    """
    text = "def f(a, *, b=1):\n    return [a, b'x', 1.5, None, ...]\n"
    assert package("alone.Alone", files={"alone.py": text})["alone"] == "3bf6e11a287408a5"


def test_targets_are_found_anywhere():
    config = {"a": {"_target_": "x.A", "b": [{"_target_": "y.B"}, 3]}, "_target_": 5}
    assert list(targets(config)) == ["x.A", "y.B"]
