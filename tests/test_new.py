"""A new project from the template works under its own name, where the template does not exist."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import new
from exact_resume.checkpoint.store import Store
from runs import ROOT, SMALL, differences

TEMPLATE = "raise ModuleNotFoundError('the template was imported')\n"
STEPS = 30


@pytest.fixture(scope="module")
def planes(tmp_path_factory) -> Path:
    """The new project ``planes``; beside it, a ``sturdy`` that cannot be imported."""
    tmp = tmp_path_factory.mktemp("new")
    (tmp / "none" / "sturdy").mkdir(parents=True)
    (tmp / "none" / "sturdy" / "__init__.py").write_text(TEMPLATE)
    done = make("planes", tmp / "planes")
    assert done.returncode == 0, done.stderr
    assert "make format" not in done.stdout, "ruff is here"
    assert "make train" in done.stdout
    assert sorted(path.name for path in tmp.iterdir()) == ["none", "planes"]
    return tmp / "planes"


def make(name: str, folder: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "new.py"), name, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def environment(project: Path) -> dict[str, str]:
    path = f"{project / 'src'}{os.pathsep}{project.parent / 'none'}"
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def python(project: Path, *words: str, timeout: int = 300) -> str:
    """Return what ``python *words`` prints in the new project; it must end in 0."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=project,
        env=environment(project),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_another_package(planes: Path) -> None:
    code = "import planes.training.session, exact_resume; print(planes.__file__)"
    assert python(planes, "-c", code).strip() == str(planes / "src" / "planes" / "__init__.py")
    with pytest.raises(AssertionError, match="the template was imported"):  # a control
        python(planes, "-c", "import sturdy")


def test_it_names_the_template_only_as_its_origin(planes: Path) -> None:
    named = []
    for path in planes.rglob("*"):
        place = path.relative_to(planes).as_posix()
        assert "sturdy" not in place.lower()
        if path.is_file() and b"sturdy" in path.read_bytes().lower():
            named.append(place)
    named = [place for place in named if not place.startswith("tests/fixtures/run-8928c75/")]
    assert sorted(named) == ["CHANGELOG.md", "NOTICE", "src/planes/renames.py"]
    assert (planes / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert os.access(planes / ".ci" / "run", os.X_OK)
    assert "new" not in (planes / "Makefile").read_text()
    json.loads((planes / "notebooks" / "open_a_run.ipynb").read_text())


@pytest.mark.parametrize("name", ["planes", "a_rather_long_project_name"])
def test_the_linter_has_nothing_to_say(planes: Path, tmp_path: Path, name: str) -> None:
    project = planes
    if name != "planes":
        project = tmp_path / "long"
        assert make(name, project).returncode == 0
        assert 'name = "a-rather-long-project-name"' in (project / "pyproject.toml").read_text()
    python(project, "-m", "ruff", "check", "--no-cache", ".")
    python(project, "-m", "ruff", "format", "--check", "--no-cache", ".")
    python(project, "docs/generate.py", "--check")


def test_it_trains_and_a_killed_run_ends_in_the_same_bits(planes: Path, tmp_path: Path) -> None:
    words = ["train.py", *SMALL, f"trainer.max_steps={STEPS}"]
    words += [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    assert f"fresh, to step {STEPS}" in python(planes, *words, "name=once")
    store = Store(tmp_path / "runs" / "killed" / "checkpoints")
    process = subprocess.Popen(
        [sys.executable, *words, "name=killed"],
        cwd=planes,
        env=environment(planes),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not store.steps():
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert "(bitwise" in python(planes, *words, "name=killed")
    assert differences(tmp_path, "once", "killed") == []


@pytest.mark.slow
def test_tests_of_it_pass(planes: Path) -> None:
    walls = ["tests/test_walls.py", "tests/test_docs.py::test_links_lead_somewhere"]
    old = "tests/training/test_older_version.py::test_it_is_continued_by_the_same_command[dit]"
    python(planes, "-m", "pytest", "-p", "no:cacheprovider", *walls, old)


@pytest.mark.slow
def test_all_tests_of_it_pass(planes: Path) -> None:
    python(planes, "-m", "pytest", "-p", "no:cacheprovider", timeout=7200)


@pytest.mark.parametrize(
    "name",
    [
        *("", "Planes", "2planes", "two-planes", "planes_", "class", "../planes"),
        *("json", "torch", "litserve", "exact_resume", "examples", "mypackage", "tests"),
        *("runs", "train", "conf", "sturdy"),
    ],
)
def test_a_name_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(new.NewProjectError, match=f"^NAME={name} "):
        new.make_project(name, tmp_path / "planes")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "planes").mkdir()
    (tmp_path / "planes" / "mine").write_text("mine")
    done = make("planes", tmp_path / "planes")
    assert done.returncode == 2
    assert "exists and is not an empty folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["planes", "mine"]
    assert "is inside this project" in make("planes", ROOT / "runs" / "planes").stderr
    assert "is not an empty folder" in make("planes", tmp_path / "planes" / "mine").stderr


def test_without_git_the_same_files_are_copied(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    walked = set(new.project_files())
    assert not any("__pycache__" in path or path.startswith(".git/") for path in walked)
    assert ".git" not in walked
    assert {"src/sturdy/training/session.py", ".ci/run", "tests/sampling/test_sample.py"} <= walked


def test_names_are_replaced_as_whole_words() -> None:
    text = "Sturdy Diffusion: import sturdy.data, sturdy_data, sturdydata, unsturdy, STURDY_SEED"
    assert new.rename(text, "my_planes") == (
        "My Planes: import my_planes.data, my_planes_data, sturdydata, unsturdy, MY_PLANES_SEED"
    )
    assert new.rename("pip install 'sturdy-diffusion[onnx]'", "my_planes") == (
        "pip install 'my-planes[onnx]'"
    )
