"""Write the parts of the documentation that follow from other files.

    python docs/generate.py          # writes; make docs does it first
    python docs/generate.py --check  # exit code 1 if a page is not up to date

- ``docs/reference/config.md``: every key of ``conf/``, with its default and its comment.
- ``docs/concepts/checkpoint-format.md``: the table of ``exact_resume.checkpoint.schema``.
- ``docs/**/*.md``: a code block under the name of a file, which is that file: a path in
  ``examples/mypackage``, or one that begins with ``examples/``.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from exact_resume.checkpoint.schema import markdown_table

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
EXAMPLE = ROOT / "examples" / "mypackage"
SCRIPTS = ("train", "sample", "evaluate", "export", "serve")
SKIPPED_GROUPS = ("hydra",)
CODE_BLOCK = re.compile(r"^`([\w/.]+)`:?\n\n```\w+\n.*?^```$", re.MULTILINE | re.DOTALL)
SCHEMA = re.compile(r"(<!-- schema: state\.ckpt -->\n)\n(?:\|[^\n]*\n)*\n?")
KEY_LINE = re.compile(r"( *)(\w+):(?: +(.*?))?(?: +# (.*))?")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml"}
INTRODUCTION = """# All config keys

<!-- written by docs/generate.py from conf/*.yaml: edit those -->

Type `key=value` on the command line, and `group=option` to choose another option of a group.
[The command line](../guides/command-line.md) has the rules. `python train.py --cfg job` prints the
config of a command.
"""


class Key(NamedTuple):
    """A key of a config file: its dotted name, its default and its comment."""

    name: str
    default: str
    comment: str


def main() -> int:
    """Write the pages, or with ``--check`` compare them; return the exit code."""
    outdated = []
    for path, text in pages():
        if path.exists() and path.read_text() == text:
            continue
        outdated.append(path)
        if "--check" not in sys.argv:
            path.write_text(text)
    for path in outdated:
        print(path.relative_to(ROOT))
    return int("--check" in sys.argv and bool(outdated))


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the path and the text of every page that follows from other files."""
    config = ROOT / "docs" / "reference" / "config.md"
    yield config, config_page()
    for path in sorted(set((ROOT / "docs").rglob("*.md")) - {config}):
        text = CODE_BLOCK.sub(lambda match: code_block(match[1]), path.read_text())
        yield path, SCHEMA.sub(lambda match: f"{match[1]}\n{markdown_table().strip()}\n\n", text)


def code_block(name: str) -> str:
    """Return a file of an example as a code block under its name."""
    file = (ROOT if name.startswith("examples/") else EXAMPLE) / name
    return f"`{name}`:\n\n```{LANGUAGES[file.suffix]}\n{file.read_text()}```"


def config_page() -> str:
    """Return the page of all keys."""
    parts = [INTRODUCTION]
    for script in SCRIPTS:
        parts.append(f"## {script}.py\n\n{file_section(CONF / f'{script}.yaml', '')}")
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
        if folder.name in SKIPPED_GROUPS:
            continue
        parts.append(f"## {folder.name}=\n")
        for file in sorted(folder.glob("*.yaml")):
            section = file_section(file, f"{folder.name}.")
            parts.append(f"### {folder.name}={file.stem}\n\n{section}")
    return "\n".join(parts)


def file_section(file: Path, prefix: str) -> str:
    """Return the comment at the top of a config file, and a table of its keys."""
    text = file.read_text()
    if "# @package _global_" in text:
        prefix = ""
    top = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            top.append(escape(line.lstrip("# ")))
    rows = []
    for key in read_keys(text, prefix):
        default = f"`{key.default}`" if key.default else ""
        rows.append(f"| `{key.name}` | {default} | {escape(key.comment)} |")
    table = "\n".join(["| Key | Default | |", "|---|---|---|", *rows]) if rows else ""
    blocks = ["\n".join(top), table]
    return "\n\n".join(block for block in blocks if block) + "\n"


def read_keys(text: str, prefix: str) -> Iterator[Key]:
    """Yield the keys of a config file; a group of keys only if it has a comment."""
    parents: list[tuple[int, str]] = []  # indentation and name of the enclosing keys
    for line in text.splitlines():
        match = KEY_LINE.fullmatch(line)
        if match is None:
            continue
        indent = len(match[1])
        while parents and parents[-1][0] >= indent:
            parents.pop()
        path = [name for _, name in parents] + [match[2]]
        default = match[3] or ""
        comment = match[4] or ""
        if default.startswith("# "):
            comment = default.removeprefix("# ")
            default = ""
        if not default:
            parents.append((indent, match[2]))
        hidden = path[0] == "defaults" or path[-1] == "_partial_"
        if not hidden and (default or comment):
            yield Key(prefix + ".".join(path), default, comment)


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, in a cell of a table too."""
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([|*_\[\]])", r"\\\1", text)


if __name__ == "__main__":
    sys.exit(main())
