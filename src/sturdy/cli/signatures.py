"""Read which arguments a config's ``_target_`` takes, from its source and without importing it.

Importing Lightning or torch takes seconds; the answer to a mistyped key must not. Packages of users
are read like ours, wherever ``sys.path`` has them. Where the source does not tell, nothing is
checked.
"""

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sturdy.keys import NON_TRAINER_KEYS

HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
# Null until the first start decides it; the channels are those of ``space.channels``.
FILLED_AT_FIRST_START = {"data.shards", "backbone.image_channels"}
MAX_DEPTH = 20  # imports and base classes that are followed: two modules may import each other
KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "Path": (str,),
    "None": (type(None),),
}


def unknown_arguments(config: Any, prefix: str = "") -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield the arguments that their target does not take.

    Yields:
        (dotted key, target, argument, arguments that the target takes).
    """
    for path, node in _nodes_with_target(config, prefix):
        known = arguments(node["_target_"])
        if known is None:
            continue
        for name in node.keys() - HYDRA_KEYS - known.keys():
            if path + name not in NON_TRAINER_KEYS:
                yield path + name, node["_target_"], name, sorted(known)


def misfit_values(config: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield the values that are not of the type of their argument; Lightning checks its own.

    Yields:
        (dotted key, value, annotation of the argument).
    """
    for path, node in _nodes_with_target(config):
        if path == "trainer.":
            continue
        known = arguments(node["_target_"]) or {}
        for name in node.keys() & known.keys():
            key, value, annotation = path + name, node[name], known[name]
            is_filled_later = value is None and key in FILLED_AT_FIRST_START
            if annotation and not is_filled_later and not _is_a(value, annotation):
                yield key, value, annotation


def _nodes_with_target(config: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each dict with a ``_target_``, and the beginning of its keys, such as ``data.``."""
    if isinstance(config, dict) and isinstance(config.get("_target_"), str):
        yield prefix, config
    if isinstance(config, dict | list):
        for key, value in config.items() if isinstance(config, dict) else enumerate(config):
            yield from _nodes_with_target(value, f"{prefix}{key}.")


def describe_annotation(annotation: str) -> str:
    """Return what an annotation asks for, in words."""
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "None": "null"}
    if items := re.fullmatch(r"(?:Sequence|list)\[(\w+)\]", annotation):
        return f"a list, each item {describe_annotation(items[1])}"
    kinds = [words.get(kind.strip(), "a text") for kind in annotation.split("|")]
    return " or ".join(dict.fromkeys(kinds))


def _is_a(value: Any, annotation: str) -> bool:
    """Return whether ``value`` is of the type; True for types that are not in ``KINDS``."""
    if items := re.fullmatch(r"(?:Sequence|list)\[(\w+)\]", annotation):
        return isinstance(value, list) and all(_is_a(item, items[1]) for item in value)
    kinds = [kind.strip() for kind in annotation.split("|")]
    if not all(kind in KINDS for kind in kinds):
        return True
    types = tuple(kind for name in kinds for kind in KINDS[name])
    return isinstance(value, types) and (not isinstance(value, bool) or "bool" in kinds)


def arguments(target: str, depth: int = MAX_DEPTH) -> dict[str, str] | None:
    """Return the annotation of each argument of a class or function.

    Args:
        target: its dotted name.
        depth: how many imports and base classes are followed.

    Returns:
        Annotations by name, empty where there is none; None where the source does not tell.
    """
    module, _, name = target.rpartition(".")
    file = find_source(module)
    if file and file.is_dir():
        file /= "__init__.py"
    return _arguments_in_file(file, name, depth) if file else None


def find_source(module: str) -> Path | None:
    """Return the folder of a package or the ``.py`` file of a module; None if there is none.

    Nothing is imported.
    """
    package, *rest = module.split(".")
    try:
        spec = find_spec(package)  # of a dotted name it would import what is before the dot
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None:
        return None
    if not spec.submodule_search_locations:
        is_source = spec.origin and spec.origin.endswith(".py") and not rest
        return Path(spec.origin) if is_source and spec.origin else None
    for location in spec.submodule_search_locations:  # a namespace package has several
        path = Path(location).joinpath(*rest)
        file = path.with_name(f"{path.name}.py")
        if path.is_dir():
            return path
        if file.is_file():
            return file
    return None


@lru_cache
def _definitions(file: Path) -> dict[str, ast.stmt]:
    """Return the statements that define or import each name of a module; {} if it is unreadable.

    Of a name that is bound twice, the later statement counts.
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


def _arguments_in_file(file: Path, name: str, depth: int) -> dict[str, str] | None:
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
        return _arguments_in_file(inner, real, depth - 1)
    return None


def _init_parameters(file: Path, node: ast.ClassDef, depth: int) -> dict[str, str] | None:
    methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
    if "__init__" in methods:
        return _parameters(methods["__init__"], skip=1)
    if node.decorator_list or "__new__" in methods or node.keywords or len(node.bases) != 1:
        return None  # a decorator may write an __init__
    base = node.bases[0]
    return (
        _arguments_in_file(file, base.id, depth - 1)
        if depth and isinstance(base, ast.Name)
        else None
    )


def _parameters(node: ast.FunctionDef, skip: int = 0) -> dict[str, str] | None:
    """Return the annotation of each keyword, without the first ``skip``; None if any is taken."""
    if node.args.kwarg:
        return None
    in_order = [*node.args.posonlyargs, *node.args.args][skip:]
    every = [*in_order, *node.args.kwonlyargs]
    return {arg.arg: ast.unparse(arg.annotation) if arg.annotation else "" for arg in every}
