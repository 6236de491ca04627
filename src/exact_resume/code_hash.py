"""Hash the code that a run executes, module by module: a bitwise resume needs the same code.

    roots -> their modules -> the modules that these import -> hashes

A module is parsed, and never imported. The hash is of its syntax tree without docstrings, so that
comments, docstrings and formatting change nothing. An installed package counts by its version. A
module that is imported by a computed name (``importlib``) is not seen.
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
TYPE_CHECKING = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
# Fields of a syntax tree that say nothing about what the code does.
IGNORED_FIELDS = ("ctx", "kind", "type_comment", "type_ignores")
WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_hashes(
    roots: Iterable[str], *, leave_out: Iterable[str] = (), known: Iterable[str] = ()
) -> dict[str, str]:
    """Hash the modules of ``roots``, and the modules that they import.

    Args:
        roots: dotted names of modules, or of classes and functions in modules.
        leave_out: patterns (``mypackage.evaluation.*``) of modules that are neither hashed nor
            followed, unless they are roots.
        known: packages that the caller accounts for, such as ``torch``.

    Returns:
        by name, a hash for each module outside site-packages, and the version of each installed
        package that has a root.
    """
    patterns = tuple(leave_out)
    excluded = {*known, *sys.stdlib_module_names}
    hashes: dict[str, str] = {}
    waiting = [(module_of(root) or root, True) for root in roots if _package(root) not in excluded]
    while waiting:
        name, is_root = waiting.pop()
        if name in hashes or _package(name) in excluded:
            continue
        if not is_root and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        spec = find(name)
        if spec is None or spec.origin is None or INSTALLED & {*Path(spec.origin).parts}:
            version = _version(_package(name)) if is_root else None
            if version:
                hashes[_package(name)] = version
            continue
        hashes[name] = file_hash(Path(spec.origin))
        waiting += [(imported, False) for imported in imports(spec)]
    return dict(sorted(hashes.items()))


def targets(config: Any) -> Iterator[str]:
    """Yield each ``_target_`` at any depth of ``config``, which holds primitives."""
    children: Iterable[Any] = ()
    if isinstance(config, Mapping):
        if isinstance(config.get("_target_"), str):
            yield config["_target_"]
        children = config.values()
    elif isinstance(config, list):
        children = config
    for child in children:
        yield from targets(child)


def module_of(name: str) -> str | None:
    """Return the module that the dotted ``name`` is, or is in; None if there is none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        if find(module):
            return module
    return None


@cache
def find(name: str) -> ModuleSpec | None:
    """Find a module without importing it, or the packages around it."""
    top, *rest = name.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):  # such as __main__
        return None
    path = top
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        path = f"{path}.{part}"
        spec = PathFinder.find_spec(path, list(spec.submodule_search_locations))
    return spec


@cache
def file_hash(path: Path) -> str:
    """Hash the file of a module: the syntax tree of Python, the bytes of anything else.

    The hash is kept: a file that is edited later does not change the code that this process runs.
    """
    digest = hashlib.sha256()
    tree = _parse(path)
    if tree is None:
        digest.update(path.read_bytes())
    else:
        for token in _tokens(tree):
            digest.update(token.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def imports(spec: ModuleSpec) -> Iterator[str]:
    """Yield the modules that a module imports anywhere, except under ``TYPE_CHECKING``.

    The packages around an imported module are yielded, too, as Python runs their ``__init__``.
    """
    is_package = spec.submodule_search_locations is not None
    package = spec.name if is_package else spec.name.rpartition(".")[0]
    names = set()
    for node in _executed(_parse(Path(str(spec.origin)))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = f"{above}.{node.module or ''}".strip(".")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    for name in names:
        module = None if _package(name) in sys.stdlib_module_names else module_of(name)
        while module:
            yield module
            module = module.rpartition(".")[0]


@cache
def _parse(path: Path) -> ast.Module | None:
    """Return the syntax tree of a Python file; None for another file, or one with errors."""
    try:
        return ast.parse(path.read_bytes()) if path.suffix == ".py" else None
    except (SyntaxError, ValueError):
        return None


def _executed(tree: ast.AST | None) -> Iterator[ast.AST]:
    """Yield every node below ``tree``, except under ``if TYPE_CHECKING:``."""
    for node in ast.iter_child_nodes(tree) if tree else ():
        if isinstance(node, ast.If) and ast.unparse(node.test) in TYPE_CHECKING:
            for other in node.orelse:
                yield other
                yield from _executed(other)
        else:
            yield node
            yield from _executed(node)


def _tokens(node: Any) -> Iterator[str]:
    """Yield a syntax tree as text that is the same under every version of Python.

    Empty fields are left out, as newer versions add some.
    """
    if isinstance(node, list):
        for item in node:
            yield from _tokens(item)
    elif isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for field, value in ast.iter_fields(node):
            if field == "body" and isinstance(node, WITH_DOCSTRING):
                value = [line for line in value if not _is_docstring(line)]
            if value not in (None, []) and field not in IGNORED_FIELDS:
                yield field
                yield from _tokens(value)
        yield ")"
    else:
        yield f"{type(node).__name__} {node!r}"


def _is_docstring(node: ast.AST) -> bool:
    """Return whether ``node`` is a string on its own, which does nothing wherever it is."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _package(name: str) -> str:
    return name.split(".")[0]


@cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def _version(package: str) -> str | None:
    """Return the version of the distribution that the installed ``package`` comes from."""
    for name in _distributions().get(package, [package]):
        try:
            return f"version {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return None
