"""The names in a pickle: what it would import, which are harmless, and stand-ins for those."""

import pickletools
import re
from collections import OrderedDict
from typing import IO, Any

# What a stand-in may replace: everything in these packages, and these names.
HARMLESS_PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")
HARMLESS = {
    "argparse.Namespace",
    "builtins.bool",
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.str",
    "builtins.tuple",
    "collections.defaultdict",
    "datetime.datetime",
    "datetime.timedelta",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "typing.Any",
}
# What the pickle of every torch file imports to build tensors.
TENSORS = re.compile(r"collections\.OrderedDict|torch\._utils\._rebuild_\w+|torch\.\w*Storage")


def is_harmless(name: str) -> bool:
    """Return whether a stand-in may take the place of ``name`` of a pickle."""
    return name in HARMLESS or name.startswith(HARMLESS_PACKAGES)


class _Inert:
    """Stand in for an object of another library: take any arguments, and do nothing."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _InertDict(_Inert):
    """Stand in for a subclass of dict, whose items a pickle sets one by one."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        return OrderedDict()


def stand_in(name: str) -> type:
    """Return a class of its own for each name, because classes may be the keys of a dict."""
    is_dict = name.endswith((".AttributeDict", ".defaultdict"))
    return type("Inert", (_InertDict if is_dict else _Inert,), {})


def list_imports(file: IO[bytes]) -> list[str]:
    """Return what the pickles at the start of ``file`` would import beyond tensors.

    They are disassembled, not loaded. A file by torch before 1.6 begins with five of them. The list
    is for people: what may be loaded is not decided by it.
    """
    names = set()
    strings = ["", ""]
    memo: dict[Any, str] = {}
    try:
        for _ in range(5):
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    names.add(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.add(".".join(strings[-2:]))
                elif opcode.name == "MEMOIZE":
                    memo[len(memo)] = strings[-1]
                elif "PUT" in opcode.name:
                    memo[argument] = strings[-1]
                elif "GET" in opcode.name:
                    strings.append(memo.get(argument, "?"))
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:
        pass  # the end of the pickles, or of the file
    return sorted(name for name in names if not TENSORS.fullmatch(name))
