"""Make a new project from this template, under a name of its own.

make new NAME=planes DIR=../planes

It needs Python and nothing else. Where ruff and torch are installed, as in ``.venv``, the new
project is formatted, too; otherwise its first command is ``make format``.
"""

import argparse
import fnmatch
import importlib.util
import keyword
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGE = "sturdy"
DISTRIBUTION = "sturdy-diffusion"
TITLE = "Sturdy Diffusion"
# A name between other signs than letters and digits: also in sturdy_x, never in sturdyx.
NAMES = re.compile(rf"(?<![^\W_])({TITLE}|{DISTRIBUTION}|{PACKAGE}|{PACKAGE.upper()})(?![^\W_])")
IMPORTED = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)
# A new project makes no others, and has no history yet.
LEFT_OUT = ("new.py", "tests/test_new.py", "docs/guides/new-project.md")
MENTION = r"(?:.*(?:make new|\bnew\.py|\bnew-project\.md).*\n)+"
MENTIONS = re.compile(rf"(?<=\n\n){MENTION}\n|^{MENTION}", re.MULTILINE)  # a paragraph, or lines
OLD_RUNS = "tests/fixtures/"  # written by older versions, under the names of these
RENAMES = f"src/{PACKAGE}/renames.py"


class NewProjectError(Exception):
    """A new project cannot be made from these arguments."""


def main() -> int:
    """Make the project that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description="Make a new project from this template.")
    parser.add_argument("name", help="the name of its package, such as planes")
    parser.add_argument("folder", help="where it is made; must not exist, or be empty")
    arguments = parser.parse_args()
    try:
        folder = Path(arguments.folder).expanduser().absolute()
        is_formatted = make_project(arguments.name, folder)
    except (NewProjectError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    commands = [f"cd {shlex.quote(str(folder))}"]
    if not is_formatted:
        commands.append("make format    # once: imports are sorted by name")
    commands.append(f"git init && git add . && git commit -m 'Start from {TITLE}'")
    commands.append("make train     # sets up .venv, trains on drawn cars")
    print(f"{folder} has the project {distribution(arguments.name)}.")
    print(f"Its package is src/{arguments.name}; src/exact_resume keeps its name. Next:\n")
    print(*[f"    {command}" for command in commands], sep="\n")
    return 0


def make_project(name: str, folder: Path) -> bool:
    """Make the project ``name`` in ``folder``; return whether it could be formatted.

    It is written beside ``folder`` and then renamed, so that a kill leaves no half project there.

    Raises:
        NewProjectError: ``name`` cannot be a package, or ``folder`` is not free.
    """
    files = list(project_files())
    check_name(name, files)
    check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}-{os.getpid()}")
    aside.mkdir()
    try:
        for path in files:
            if path not in LEFT_OUT:
                copy_file(path, aside, name)
        write_origin(aside, name)
        if len(name) > len(PACKAGE):
            allow_long_lines(aside)
        is_formatted = format_project(aside)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return is_formatted


def project_files() -> Iterator[str]:
    """Yield the paths of the files of this project: tracked by git or, without git, not ignored."""
    command = ["git", "ls-files", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        tracked = done.stdout.split("\0")[:-1]
    except FileNotFoundError:
        tracked = []
    if "pyproject.toml" in tracked:
        yield from (path for path in tracked if os.path.lexists(ROOT / path))
        return
    ignored = [".git", *(ROOT / ".gitignore").read_text().replace("/", "").split()]
    for above, folders, names in os.walk(ROOT):
        place = Path(above).relative_to(ROOT)
        folders[:] = [one for one in folders if not matches(one, ignored)]
        yield from ((place / one).as_posix() for one in names if not matches(one, ignored))


def matches(name: str, patterns: list[str]) -> bool:
    """Return whether ``name`` fits one of ``patterns``."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def check_name(name: str, files: list[str]) -> None:
    """Refuse a ``name`` that a package cannot have, or that something else has."""
    if not re.fullmatch(r"[a-z]([a-z0-9_]*[a-z0-9])?", name) or keyword.iskeyword(name):
        raise NewProjectError(
            f"NAME={name} cannot be a package: take small letters, digits and _, such as planes"
        )
    taken = {*sys.stdlib_module_names, PACKAGE, "src", "conf", "docs"}
    for path in files:
        parts = Path(path).with_suffix("").parts
        if parts[0] == "tests":  # pytest puts this folder on the path
            taken.add(parts[1])
        if path.endswith(".py"):
            taken.update(IMPORTED.findall((ROOT / path).read_text()))
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    taken.update(re.sub(r"[-.]", "_", one.lower()) for one in pinned)
    if name in taken or importlib.util.find_spec(name) is not None:
        raise NewProjectError(f"NAME={name} is the name of another module or package: take another")


def check_folder(folder: Path) -> None:
    """Refuse a ``folder`` with something in it, or inside this project."""
    if folder.resolve().is_relative_to(ROOT):
        raise NewProjectError(f"DIR={folder} is inside this project: choose a folder outside")
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise NewProjectError(f"DIR={folder} exists and is not an empty folder: choose another")


def distribution(name: str) -> str:
    """Return the name under which pip knows the project."""
    return name.replace("_", "-")


def rename(text: str, name: str) -> str:
    """Return ``text`` with the names of the new project instead of those of this one."""
    new = {
        TITLE: name.replace("_", " ").title(),
        DISTRIBUTION: distribution(name),
        PACKAGE: name,
        PACKAGE.upper(): name.upper(),
    }
    return NAMES.sub(lambda match: new[match[1]], text)


def copy_file(path: str, project: Path, name: str) -> None:
    """Copy a file of this project into the new one, renamed inside and out."""
    source = ROOT / path
    target = project / (path if path.startswith(OLD_RUNS) else rename(path, name))
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target, follow_symlinks=False)
    if path.startswith(OLD_RUNS) or source.is_symlink():
        return
    try:
        text = source.read_bytes().decode()
    except UnicodeDecodeError:  # an image
        return
    if path in ("Makefile", "mkdocs.yml") or path.endswith(".md"):
        text = MENTIONS.sub("", text)
    text = rename(text, name)
    if path == RENAMES:  # runs of the template's first version are read by the new project, too
        row = f'        "{PACKAGE}": "{name}",  # the template\n'
        text = text.replace("    targets={\n", f"    targets={{\n{row}", 1)
    target.write_bytes(text.encode())


def write_origin(project: Path, name: str) -> None:
    """Say where the new project comes from, and let its history begin."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    origin = f"made from {TITLE} {version}"
    title = rename(TITLE, name)
    (project / "NOTICE").write_text(
        f"{title} was {origin}, which is under the Apache License, Version 2.0 (LICENSE).\n"
    )
    (project / "CHANGELOG.md").write_text(f"# Changelog\n\n## Unreleased\n\n- {title}: {origin}.\n")


def allow_long_lines(project: Path) -> None:
    """Let the linter pass comments and texts that a longer name has made too long.

    ``ruff format`` breaks the lines of code.
    """
    config = project / "pyproject.toml"
    above = "ignore = [\n"
    rule = '    "E501", # a longer name than the template\'s: `ruff format` breaks what is code\n'
    config.write_text(config.read_text().replace(above, above + rule, 1))


def format_project(project: Path) -> bool:
    """Do what ``make format`` does, with this Python; return whether it could."""
    commands = [
        ["-m", "ruff", "check", "--fix", "--quiet", "--no-cache", "."],
        ["-m", "ruff", "format", "--quiet", "--no-cache", "."],
        ["docs/generate.py"],
    ]
    environment = {**os.environ, "PYTHONPATH": str(project / "src")}
    for words in commands:
        command = [sys.executable, "-B", *words]
        done = subprocess.run(
            command, cwd=project, env=environment, capture_output=True, check=False
        )
        if done.returncode:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
