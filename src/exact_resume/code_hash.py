"""The code that a run executes, as one hash a module: what must be unchanged for a resume to be
bitwise.

    roots  ->  their modules  ->  what those import, outside site-packages and the standard library
    ->  hashes

A module is parsed and never imported. Its hash is of its syntax tree without docstrings, so that
comments, docstrings and formatting change nothing. A package in site-packages counts by its
version. What a module imports by a computed name (``importlib``) is not seen.
"""

import ast
import fnmatch
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

INSTALLED = {"site-packages", "dist-packages"}


def code_hashes(
    roots: Iterable[str], *, leave_out: Iterable[str] = (), known: Iterable[str] = ()
) -> dict[str, str]:
    """Hash the modules of ``roots`` and those that they import; keys are module names, in order.

    Args:
        roots: dotted names of modules, or of classes and functions in modules.
        leave_out: patterns (``sturdy.evaluation.*``) of modules that are neither hashed nor
            followed, unless they are roots.
        known: packages that the caller accounts for, such as ``torch``.

    Returns:
        A hash for each module outside site-packages; for each installed package that a root lives
        in, its version.
    """
    leave_out, known = tuple(leave_out), {*known, *sys.stdlib_module_names}
    hashes: dict[str, str] = {}
    waiting = [(module_of(root) or root, True) for root in roots if root.split(".")[0] not in known]
    while waiting:
        name, is_root = waiting.pop()
        if name in hashes or name.split(".")[0] in known:
            continue
        if not is_root and any(fnmatch.fnmatchcase(name, pattern) for pattern in leave_out):
            continue
        spec = find(name)
        if spec is None or spec.origin is None or INSTALLED & {*Path(spec.origin).parts}:
            if is_root and (version := _version(name.split(".")[0])):
                hashes[name.split(".")[0]] = version
            continue
        hashes[name] = file_hash(Path(spec.origin))
        waiting += [(found, False) for found in imports(spec)]
    return dict(sorted(hashes.items()))


def targets(config: Any) -> Iterator[str]:
    """Yield each ``_target_`` anywhere in ``config``, primitives."""
    if isinstance(config, Mapping) and isinstance(config.get("_target_"), str):
        yield config["_target_"]
    for value in (
        config.values()
        if isinstance(config, Mapping)
        else config
        if isinstance(config, list)
        else ()
    ):
        yield from targets(value)


def module_of(name: str) -> str | None:
    """The module that the dotted ``name`` is, or is in; None if there is none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if find(".".join(parts[:end])):
            return ".".join(parts[:end])
    return None


@cache
def find(name: str) -> ModuleSpec | None:
    """Find a module without importing it or its packages."""
    top, *rest = name.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):  # such as __main__
        return None
    for i, _ in enumerate(rest, start=1):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(
            ".".join([top, *rest[:i]]), list(spec.submodule_search_locations)
        )
    return spec


@cache
def file_hash(path: Path) -> str:
    """Hash one module as this process first found it: the meaning of Python, the bytes of anything
    else.
    """
    digest = hashlib.sha256()
    if (tree := _parse(path)) is None:
        digest.update(path.read_bytes())
    else:
        for token in _tokens(tree):
            digest.update(token.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def imports(spec: ModuleSpec) -> Iterator[str]:
    """Yield the modules that a module imports, anywhere but under ``TYPE_CHECKING``.

    The packages around an imported module count with it, as Python runs their ``__init__``.
    """
    package = (
        spec.name if spec.submodule_search_locations is not None else spec.name.rpartition(".")[0]
    )
    found = set()
    for node in _executed(_parse(Path(str(spec.origin)))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = f"{above}.{node.module or ''}".strip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    for name in found:
        if name.split(".")[0] not in sys.stdlib_module_names and (module := module_of(name)):
            parts = module.split(".")
            yield from (".".join(parts[:end]) for end in range(len(parts), 0, -1))


@cache
def _parse(path: Path) -> ast.Module | None:
    """The syntax tree of a Python file; None where there is none, or where importing it will
    fail.
    """
    try:
        return ast.parse(path.read_bytes()) if path.suffix == ".py" else None
    except (SyntaxError, ValueError):
        return None


def _executed(tree: ast.AST | None) -> Iterator[ast.AST]:
    """Yield every node but those under ``if TYPE_CHECKING:``."""
    for node in ast.iter_child_nodes(tree) if tree else ():
        if isinstance(node, ast.If) and ast.unparse(node.test) in (
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        ):
            yield from (below for other in node.orelse for below in (other, *_executed(other)))
            continue
        yield node
        yield from _executed(node)


def _tokens(node: Any) -> Iterator[str]:
    """Yield a syntax tree as text that does not depend on Python's version; empty fields are left
    out.
    """
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for field, value in ast.iter_fields(node):
            if field == "body" and isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ):
                value = [line for line in value if not _is_docstring(line)]
            if value not in (None, []) and field not in (
                "ctx",
                "kind",
                "type_comment",
                "type_ignores",
            ):
                yield field
                yield from _tokens(value)
        yield ")"
    elif isinstance(node, list):
        for item in node:
            yield from _tokens(item)
    else:
        yield f"{type(node).__name__} {node!r}"


def _is_docstring(node: ast.AST) -> bool:
    """Whether ``node`` is a string that stands alone; it does nothing wherever it is."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


@cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def _version(package: str) -> str | None:
    """The version of the distribution that the installed ``package`` comes from."""
    for name in _distributions().get(package, [package]):
        try:
            return f"version {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return None
