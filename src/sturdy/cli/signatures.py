"""Which arguments a config's ``_target_`` takes, read from its source and not by importing it.

Importing Lightning or torch takes seconds; a mistyped key must not. Packages of one's own are read
like ours, wherever ``sys.path`` has them. Where the source does not tell, nothing is said.
"""

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
NON_TRAINER_KEYS = {
    "trainer.threads",
    "trainer.compile",
}  # read by the door's task, not handed to the Trainer
DEPTH = (
    20  # imports and base classes that are followed: two modules may import a name from each other
)


def unknown_arguments(config: Any, prefix: str = "") -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield (dotted key, target, argument, arguments it takes) for each argument that a target does
    not take.
    """
    if not isinstance(config, dict | list):
        return
    items = config.items() if isinstance(config, dict) else enumerate(config)
    if isinstance(config, dict) and isinstance(config.get("_target_"), str):
        known = arguments(config["_target_"])
        for name in config.keys() - HYDRA_KEYS:
            if (
                known is not None
                and name not in known
                and f"{prefix}{name}" not in NON_TRAINER_KEYS
            ):
                yield f"{prefix}{name}", config["_target_"], name, sorted(known)
    for key, value in items:
        yield from unknown_arguments(value, f"{prefix}{key}.")


FILLED_AT_FIRST_START = {"data.shards"}  # null until the first start decides it
NON_TRAINER_KEYS = {
    "trainer.threads",
    "trainer.compile",
}  # read by the door's task, not handed to the Trainer


def unfit_arguments(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, value, annotation) for each value that is not of the type its argument is
    annotated with.
    """
    if isinstance(config, dict) and isinstance(config.get("_target_"), str):
        known = arguments(config["_target_"]) or {}
        for name in config.keys() & known.keys():
            path, value = f"{prefix}{name}", config[name]
            if (
                known[name]
                and not _is_a(value, known[name])
                and not (value is None and path in FILLED_AT_FIRST_START)
            ):
                yield path, value, known[name]
    if isinstance(config, dict | list):
        for key, value in config.items() if isinstance(config, dict) else enumerate(config):
            yield from unfit_arguments(value, f"{prefix}{key}.")


KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "Path": (str,),
    "None": (type(None),),
}


def in_words(annotation: str) -> str:
    """What an annotation of plain kinds asks for."""
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "None": "null"}
    if items := re.fullmatch(r"(?:Sequence|list)\[(\w+)\]", annotation):
        return f"a list, each item {in_words(items[1])}"
    return " or ".join(
        dict.fromkeys(words.get(kind.strip(), "a text") for kind in annotation.split("|"))
    )


def _is_a(value: Any, annotation: str) -> bool:
    """Whether ``value`` fits ``annotation``; True where that is not of plain kinds alone, such as a
    class's.
    """
    if items := re.fullmatch(r"(?:Sequence|list)\[(\w+)\]", annotation):
        return isinstance(value, list) and all(_is_a(item, items[1]) for item in value)
    kinds = [kind.strip() for kind in annotation.split("|")]
    if not all(kind in KINDS for kind in kinds):
        return True
    taken = tuple(kind for name in kinds for kind in KINDS[name])
    return isinstance(value, taken) and (not isinstance(value, bool) or "bool" in kinds)


def arguments(target: str, depth: int = DEPTH) -> dict[str, str] | None:
    """The annotation of each argument of the class or function ``target``; None where its source
    does not tell.
    """
    module, _, name = target.rpartition(".")
    file = located(module)
    if file and file.is_dir():
        file /= "__init__.py"
    return _in_file(file, name, depth) if file else None


def located(module: str) -> Path | None:
    """The folder of a package or the ``.py`` file of a module, found without importing it; None if
    there is none.
    """
    package, *rest = module.split(".")
    try:
        spec = find_spec(package)  # of a dotted name it would import what is before the dot
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None:
        return None
    if not spec.submodule_search_locations:
        return (
            Path(spec.origin) if spec.origin and spec.origin.endswith(".py") and not rest else None
        )
    for place in spec.submodule_search_locations:  # several of a namespace package
        path = Path(place).joinpath(*rest)
        if path.is_dir():
            return path
        if path.with_name(f"{path.name}.py").is_file():
            return path.with_name(f"{path.name}.py")
    return None


@lru_cache
def _definitions(file: Path) -> dict[str, ast.stmt]:
    """What a module defines or imports, by name; of a name that is bound twice, the later. Empty if
    it is not read.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return {}
    found: dict[str, ast.stmt] = {}

    def walk(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found[node.name] = node
            elif isinstance(node, ast.ImportFrom):
                found.update({alias.asname or alias.name: node for alias in node.names})
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(
                    {target.id: node for target in targets if isinstance(target, ast.Name)}
                )
            for block in ("body", "orelse", "handlers", "finalbody"):
                if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
                    walk(getattr(node, block, []))

    walk(tree.body)
    return found


def _in_file(file: Path, name: str, depth: int) -> dict[str, str] | None:
    node = _definitions(file).get(name)
    if isinstance(node, ast.FunctionDef):
        return None if node.decorator_list else _parameters(node)
    if isinstance(node, ast.ClassDef):
        return _init_parameters(file, node, depth)
    if isinstance(node, ast.ImportFrom) and depth:
        real = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        if not node.level:
            return arguments(f"{node.module}.{real}", depth - 1)
        folder = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        inner = folder / "__init__.py" if folder.is_dir() else folder.with_name(f"{folder.name}.py")
        return _in_file(inner, real, depth - 1)
    return None


def _init_parameters(file: Path, node: ast.ClassDef, depth: int) -> dict[str, str] | None:
    methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
    if "__init__" in methods:
        return _parameters(methods["__init__"], skip=1)
    if node.decorator_list or "__new__" in methods or node.keywords or len(node.bases) != 1:
        return None  # a decorator may write an __init__
    base = node.bases[0]
    return _in_file(file, base.id, depth - 1) if depth and isinstance(base, ast.Name) else None


def _parameters(node: ast.FunctionDef, skip: int = 0) -> dict[str, str] | None:
    """The annotation of each name that may be given as a keyword, without the first ``skip``; None
    where any may.
    """
    if node.args.kwarg:
        return None
    in_order = [*node.args.posonlyargs, *node.args.args][skip:]
    every = [*in_order, *node.args.kwonlyargs]
    return {arg.arg: ast.unparse(arg.annotation) if arg.annotation else "" for arg in every}
