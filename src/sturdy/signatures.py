"""Which arguments a config's ``_target_`` takes, read from its source and not by importing it.

Importing Lightning or torch takes seconds; a mistyped key must not.
"""

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HYDRA = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


def unknown_arguments(config: Any, prefix: str = "") -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield (dotted key, target, argument, arguments it takes) for each argument that a target does not take."""
    if not isinstance(config, dict | list):
        return
    items = config.items() if isinstance(config, dict) else enumerate(config)
    if isinstance(config, dict) and isinstance(config.get("_target_"), str):
        known = arguments(config["_target_"])
        for name in config.keys() - HYDRA:
            if known is not None and name not in known and f"{prefix}{name}" not in OURS:
                yield f"{prefix}{name}", config["_target_"], name, sorted(known)
    for key, value in items:
        yield from unknown_arguments(value, f"{prefix}{key}.")


SETTLED = {"data.shards"}  # null until the first start decides it
OURS = {"trainer.threads", "trainer.compile"}  # read by the door's task, not handed to the Trainer


def unfit_arguments(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, value, annotation) for each value that is not of the type its argument is annotated with."""
    if isinstance(config, dict) and isinstance(config.get("_target_"), str):
        known = arguments(config["_target_"]) or {}
        for name in config.keys() & known.keys():
            path, value = f"{prefix}{name}", config[name]
            if known[name] and not _is_a(value, known[name]) and not (value is None and path in SETTLED):
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
    return " or ".join(dict.fromkeys(words.get(kind.strip(), "a text") for kind in annotation.split("|")))


def _is_a(value: Any, annotation: str) -> bool:
    """Whether ``value`` fits ``annotation``; True where that is not of plain kinds alone, such as a class's."""
    if items := re.fullmatch(r"(?:Sequence|list)\[(\w+)\]", annotation):
        return isinstance(value, list) and all(_is_a(item, items[1]) for item in value)
    kinds = [kind.strip() for kind in annotation.split("|")]
    if not all(kind in KINDS for kind in kinds):
        return True
    taken = tuple(kind for name in kinds for kind in KINDS[name])
    return isinstance(value, taken) and (not isinstance(value, bool) or "bool" in kinds)


def arguments(target: str) -> dict[str, str] | None:
    """The annotation of each argument of the class or function ``target``; None where its source does not tell."""
    package, *rest = target.split(".")
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    place = Path(spec.submodule_search_locations[0])
    while rest and (place / rest[0]).is_dir():
        place /= rest.pop(0)
    file = place / f"{rest.pop(0)}.py" if rest and (place / f"{rest[0]}.py").is_file() else place / "__init__.py"
    return _in_file(file, rest[0]) if len(rest) == 1 else None


@lru_cache
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def _in_file(file: Path, name: str) -> dict[str, str] | None:
    for node in ast.walk(_parse(file)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _parameters(node)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _of_class(file, node)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return arguments(f"{node.module}.{alias.name}")
    return None


def _of_class(file: Path, node: ast.ClassDef) -> dict[str, str] | None:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _parameters(item)
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    return _in_file(file, bases[0]) if len(bases) == 1 and len(node.bases) == 1 else None


def _parameters(node: ast.FunctionDef) -> dict[str, str] | None:
    if node.args.kwarg:
        return None
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return {arg.arg: ast.unparse(arg.annotation) if arg.annotation else "" for arg in every if arg.arg != "self"}
