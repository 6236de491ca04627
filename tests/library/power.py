"""A disk that is recorded while a store works on it, and all that a power cut may leave of it.

Durable are the bytes of a file that was fsynced after they were written, and a name that came or
went in a directory that was fsynced after it. Of all else, anything may be there: a file may be
    empty, cut short, or zeros; and any of the
changes of names may have happened and the others not. Only a rename is one change: it has happened,
    or it has not.
(Journaling file systems keep more order than this.)
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any

Name = tuple[int, str]  # in the directory of this number; the root is 0


@dataclass(frozen=True)
class Change:
    """The file or directory ``what`` loses a name, gets one, or is renamed."""

    what: int
    old: Name | None
    new: Name | None


@dataclass(frozen=True)
class Moment:
    """What is known just before a power cut; ``promise`` is the scene's."""

    changes: tuple[Change, ...]
    sure: frozenset[int]
    durable: dict[int, bytes]
    now: dict[int, bytes]
    promise: Any


class Recorder:
    """Watches ``root``, of which all that is there already is durable.

    Args:
        heed: whether the n-th fsync, of a directory or not, does what it should.
    """

    def __init__(
        self, root: Path, heed: Callable[[int, bool], bool] = lambda n, directory: True
    ) -> None:
        self.root, self.heed = root, heed
        self.names: dict[Name, int] = {(-1, ""): 0}
        self.directories, self.count, self.fsyncs = {0}, 0, 0
        self.durable: dict[int, bytes] = {}
        self.changes: list[Change] = []
        self.waiting: list[set[int]] = []  # for each change, the directories still to be fsynced
        self.moments: list[Moment] = []
        self.promise: Any = None
        for path in sorted(root.rglob("*")):
            self.names[self._name(path)] = self._new(path.is_dir())
        self.durable |= self._contents()
        self.base = dict(self.names)

    def fsync(self, fd: int) -> None:
        """In the place of ``os.fsync``."""
        name = self._name(_path(f"/proc/self/fd/{fd}"))
        if name is None:
            return
        self.cut()
        what = self.names[name]
        self.fsyncs += 1
        if not self.heed(self.fsyncs - 1, what in self.directories):
            return
        if what in self.directories:
            for directories in self.waiting:
                directories.discard(what)
        else:
            self.durable[what] = self._contents()[what]

    def cut(self) -> None:
        """Note that the power may fail now."""
        sure = frozenset(i for i, directories in enumerate(self.waiting) if not directories)
        self.moments.append(
            Moment(tuple(self.changes), sure, dict(self.durable), self._contents(), self.promise)
        )

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit event, told before it happens."""
        match event:
            case "open" if isinstance(args[0], str | Path) and args[2] & os.O_CREAT:
                self._change(None, args[0], directory=False)
            case "os.mkdir":
                self._change(None, _path(args[0], args[2]), directory=True)
            case "os.remove" | "os.rmdir":
                self._change(_path(*args), None)
            case "os.rename":
                self._change(_path(args[0], args[2]), _path(args[1], args[3]))
            case "os.link" | "os.symlink" | "os.truncate":
                raise NotImplementedError(event)

    def _change(self, old: Any, new: Any, directory: bool = False) -> None:
        before, after = (
            self._name(Path(path)) if path is not None else None for path in (old, new)
        )
        if before is None and after is None:
            return
        if (before and before not in self.names) or (before is None and after in self.names):
            return  # the call is about to fail, or opens what is there
        self.cut()
        what = self.names.pop(before) if before else self._new(directory)
        if after:
            self.names[after] = what
        self.changes.append(Change(what, before, after))
        self.waiting.append({name[0] for name in (before, after) if name})

    def _new(self, directory: bool) -> int:
        self.count += 1
        if directory:
            self.directories.add(self.count)
        return self.count

    def _name(self, path: Path) -> Name | None:
        """The directory's number and the name; None for what is elsewhere."""
        path = Path(os.path.abspath(path))
        if path == self.root:
            return (-1, "")
        if self.root not in path.parents:
            return None
        directory = 0
        for part in path.relative_to(self.root).parts[:-1]:
            directory = self.names.get((directory, part), -2)
        return directory, path.name

    def _contents(self) -> dict[int, bytes]:
        paths = {what: path for path, what in walk(self.names).items()}
        return {
            what: (self.root / path).read_bytes()
            for what, path in paths.items()
            if what not in self.directories and (self.root / path).is_file()
        }

    def disks(self, moment: Moment) -> Iterator[dict[str, bytes | None]]:
        """All that may be on the disk after a power cut: contents by path, None for a directory."""
        unsure = [i for i in range(len(moment.changes)) if i not in moment.sure]
        assert len(unsure) <= 12, "too many possibilities"
        for happened in map(
            set, chain.from_iterable(combinations(unsure, n) for n in range(len(unsure) + 1))
        ):
            names = dict(self.base)
            for i, change in enumerate(moment.changes):
                if (i in moment.sure or i in happened) and (
                    change.old is None or names.get(change.old) == change.what
                ):
                    if change.old:
                        del names[change.old]
                    if change.new:
                        names[change.new] = change.what
            tree = walk(names)
            options = [
                [None] if what in self.directories else self._left(moment, what)
                for what in tree.values()
            ]
            for contents in product(*options):
                yield dict(zip(tree, contents, strict=True))

    def _left(self, moment: Moment, what: int) -> list[bytes | None]:
        durable, now = moment.durable.get(what), moment.now.get(what, b"")
        if durable == now:
            return [now]
        return [*dict.fromkeys((durable or b"", b"", now[: len(now) // 2], bytes(len(now)), now))]


def walk(names: dict[Name, int]) -> dict[str, int]:
    """Path -> number, of all that can be reached from the root; a directory comes before what is in
    it.
    """
    found, todo = {}, [(0, "")]
    while todo:
        directory, path = todo.pop()
        for (parent, name), what in names.items():
            if parent == directory:
                found[path + name] = what
                todo.append((what, f"{path}{name}/"))
    return found


def lay_out(disk: dict[str, bytes | None], home: Path) -> None:
    """Make ``home`` hold ``disk``."""
    home.mkdir()
    for path, content in disk.items():
        if content is None:
            (home / path).mkdir()
        else:
            (home / path).write_bytes(content)


_listeners: list[Recorder] = []


@contextmanager
def listening(recorder: Recorder) -> Iterator[None]:
    """Let ``recorder`` hear what this process does with names."""
    if not hasattr(_hook, "added"):
        sys.addaudithook(_hook)  # there is no way to remove it
        _hook.added = True  # type: ignore[attr-defined]
    _listeners.append(recorder)
    try:
        yield
    finally:
        _listeners.clear()


def _hook(event: str, args: tuple[Any, ...]) -> None:
    for listener in _listeners:
        listener.hear(event, args)


def _path(path: Any, directory: int = -1) -> Path:
    if isinstance(path, str) and path.startswith("/proc/self/fd/"):
        return Path(os.readlink(path))
    return Path(os.readlink(f"/proc/self/fd/{directory}") if directory >= 0 else "") / os.fsdecode(
        path
    )
