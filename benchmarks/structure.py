"""Measure the structure of a checkout: python benchmarks/structure.py [CHECKOUT] [--python PYTHON]

Counts lines, names and circles in its ``src``. Then trains and samples a tiny run with its own code
under ``sys.setprofile``, and prints

    jumps    the project's functions on the stack when the loss is computed, from train.py on
    stops    the project's functions that are given or return a checkpoint's content, from the
             opening of state.ckpt to load_state_dict, in sample.py

with their names, so that anyone can check. ``--static`` leaves these two out.
"""

import argparse
import ast
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

RUN = (
    "trainer=cpu trainer.threads=1 trainer.max_steps=2 trainer.val_check_interval=2 "
    "data.image_size=16 data.batch_size=4 data.source.n=20 data.holdout=0.2 "
    "callbacks.checkpoint.every_n_train_steps=2 callbacks.samples.every_n_steps=null "
    "backbone=dit backbone.width=32 backbone.depth=1 backbone.heads=2"
)
SAMPLE = "run=run sample.n=1 sampler.steps=1 device=cpu threads=1"
SKIPPED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
RULES = {
    "D401, not imperative": "D401",
    "D without D401, docstrings": "D",
    "N818, exceptions": "N818",
    "ANN, annotations": "ANN",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--python", default=sys.executable, help="runs the checkout's code")
    parser.add_argument("--static", action="store_true", help="do not run anything")
    args = parser.parse_args()
    checkout = args.checkout.resolve()
    measure_source(checkout)
    if not args.static:
        measure_run(checkout, args.python)


# What the source looks like.


def measure_source(checkout: Path) -> None:
    """Print counts of all Python files in ``src``."""
    sources = {path: path.read_text() for path in sorted((checkout / "src").rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in sources.items()}
    lines = {path: len(text.splitlines()) for path, text in sources.items()}
    code = {path: count_code_lines(text, trees[path]) for path, text in sources.items()}
    for package in sorted(path for path in (checkout / "src").iterdir() if path.is_dir()):
        paths = [path for path in sources if package in path.parents]
        if paths:
            total, of_code = sum(lines[p] for p in paths), sum(code[p] for p in paths)
            show(package.name, f"{len(paths)} files, {total} lines, {of_code} of code")
    thousands = sum(code.values()) / 1000
    show("src", f"{len(sources)} files, {sum(lines.values())} lines, {sum(code.values())} of code")
    long = sum(len(line) > 100 for text in sources.values() for line in text.splitlines())
    show("lines over 100 characters", long)
    largest = sorted(lines, key=lambda path: lines[path], reverse=True)[:6]
    show("largest", ", ".join(f"{p.relative_to(checkout / 'src')} {lines[p]}" for p in largest))
    show("modules over 300 lines", sum(n > 300 for n in lines.values()))
    tuples = sum(count_tuple_assignments(tree) for tree in trees.values())
    nested = sum(count_nested_comprehensions(tree) for tree in trees.values())
    show("a, b = x, y per 1,000 lines of code", f"{tuples / thousands:.1f} ({tuples})")
    show("nested comprehensions per 1,000", f"{nested / thousands:.1f} ({nested})")
    for name, rule in RULES.items():
        show(name, count_findings(checkout, rule))
    circles = find_circles(import_graph(checkout, trees))
    show("circles of imports", len(circles))
    for circle in circles:
        print(f"    {', '.join(sorted(circle))}")


def show(name: str, value: object) -> None:
    print(f"{name:38} {value}", flush=True)


def count_code_lines(text: str, tree: ast.Module) -> int:
    """Count lines with more than comments, white space and docstrings."""
    ignored = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in ignored:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, SKIPPED) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
    return len(lines)


def count_tuple_assignments(tree: ast.Module) -> int:
    """Count ``a, b = x, y``; a swap and true unpacking are none."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            for target in node.targets:
                if isinstance(target, ast.Tuple):
                    left = sorted(ast.unparse(item) for item in target.elts)
                    right = sorted(ast.unparse(item) for item in node.value.elts)
                    count += left != right
    return count


def count_nested_comprehensions(tree: ast.Module) -> int:
    """Count comprehensions with two loops, or inside another one."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            inner = [child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS)]
            count += len(node.generators) > 1 or len(inner) > 1
    return count


def count_findings(checkout: Path, rule: str) -> int:
    """Count what ruff finds in ``src``, whatever the checkout's own settings are."""
    command = [
        *(sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--exit-zero"),
        *("--select", rule, "--ignore", "D105,D107,ANN401", "--output-format", "json"),
        *("--config", 'lint.pydocstyle.convention="google"', str(checkout / "src")),
    ]
    return len(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


def import_graph(checkout: Path, trees: Mapping[Path, ast.Module]) -> dict[str, set[str]]:
    """Return, by module, the modules of ``src`` that it imports, at its top or in a function."""
    names = {}
    for path in trees:
        parts = path.relative_to(checkout / "src").with_suffix("").parts
        names[path] = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    modules = set(names.values())
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for path, tree in trees.items():
        for found in imported_names(tree):
            target = found if found in modules else found.rpartition(".")[0]
            if target in modules and target != names[path]:
                graph[names[path]].add(target)
    return graph


def imported_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the groups of modules that reach each other."""
    reach = {name: reachable(graph, name) for name in graph}
    circles: list[set[str]] = []
    for name in sorted(graph):
        circle = {other for other in reach[name] if name in reach[other]}
        if circle and circle not in circles:
            circles.append(circle)
    return circles


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """Return the modules that ``start`` imports, directly or not; itself only in a circle."""
    found: set[str] = set()
    waiting = [*graph[start]]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


# What a run looks like.


def measure_run(checkout: Path, python: str) -> None:
    """Train and sample a tiny run of the checkout, and print its jumps and stops."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"paths.runs={folder}/runs", f"paths.cache={folder}/cache"]
        train = [*RUN.split(), *paths, "name=run"]
        sample = [*SAMPLE.split(), *paths, f"sample.out={folder}/out"]
        jumps = trace(checkout, python, "train.py", train)
        stops = trace(checkout, python, "sample.py", sample)
    files = {re.split(r"[:]", place)[0] for place in jumps}
    show("jumps from train.py to the loss", f"{len(jumps) - 1} in {len(files)} files")
    for place in jumps:
        print(f"    {place}")
    files = {re.split(r"[:]", place)[0] for place in stops}
    show("stops from disk to network", f"{len(stops)} in {len(files)} files")
    for place in stops:
        print(f"    {place}")


def trace(checkout: Path, python: str, script: str, words: list[str]) -> list[str]:
    """Run ``script`` in a process of ``python`` and return the places that its tracer noted."""
    path = os.pathsep.join([str(checkout / "src"), str(checkout)])
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        command = [python, __file__, "--trace", str(checkout), answer.name, script, *words]
        done = subprocess.run(
            command,
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{script} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return json.loads(answer.read())


class Tracer:
    """Notes places of the project's code while a script runs.

    Attributes:
        checkout: the folder whose code counts.
        places: ``file:line function``, in order.
    """

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.places: list[str] = []

    def place(self, frame: FrameType) -> str | None:
        """Return where the function of ``frame`` is defined; None outside the project."""
        code = frame.f_code
        path = Path(code.co_filename)
        if not path.is_absolute() or not path.is_relative_to(self.checkout):
            return None
        name = path.relative_to(self.checkout)
        is_script = len(name.parts) == 1
        if not is_script and name.parts[0] not in ("src", "examples"):
            return None
        if code.co_name in ("<listcomp>", "<setcomp>", "<dictcomp>"):
            return None  # not functions
        return f"{name}:{code.co_firstlineno} {code.co_qualname}"

    def stack(self, frame: FrameType | None) -> list[str]:
        """Return the project's functions on the stack, the outermost first."""
        places = []
        while frame:
            places.append(self.place(frame))
            frame = frame.f_back
        return [place for place in reversed(places) if place]


class Jumps(Tracer):
    """Notes the stack when the loss is computed first."""

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_qualname == "Objective.__call__":
            sys.setprofile(None)
            self.places = self.stack(frame)


class Stops(Tracer):
    """Notes the functions that a checkpoint's content passes through on its way to the network."""

    def __init__(self, checkout: Path) -> None:
        super().__init__(checkout)
        self.is_open = False
        sys.addaudithook(self.on_audit)

    def on_audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).endswith("state.ckpt"):
            self.is_open = True

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if not self.is_open or event not in ("call", "return"):
            return
        if event == "call" and frame.f_code.co_name == "load_state_dict":
            sys.setprofile(None)
            return
        place = self.place(frame)
        if not place or place in self.places or frame.f_code.co_name == "<module>":
            return
        values = [arg]
        if event == "call":
            count = frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount
            values = [frame.f_locals.get(name) for name in frame.f_code.co_varnames[:count]]
        if any(is_content(value) for value in values):
            self.places.append(place)


def is_content(value: Any) -> bool:
    """Return whether ``value`` is the content of a checkpoint: its bytes or its mapping."""
    if isinstance(value, bytes | bytearray | memoryview):
        return len(value) > 10_000
    if isinstance(value, tuple | list):
        return any(is_content(item) for item in value)
    return isinstance(value, Mapping) and "state_dict" in value


def run_traced(checkout: Path, answer: Path, script: str, words: list[str]) -> None:
    """Run ``script`` in this process, and write what its tracer noted to ``answer``."""
    tracer = Jumps(checkout) if script == "train.py" else Stops(checkout)
    sys.argv = [str(checkout / script), *words]
    sys.path[0] = str(checkout)
    sys.setprofile(tracer)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.setprofile(None)
        answer.write_text(json.dumps(tracer.places))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trace"]:
        run_traced(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5:])
    else:
        main()
