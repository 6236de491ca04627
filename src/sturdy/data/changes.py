"""How the images of a run differ, by name, from other images or from their source."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from sturdy.data.cache import Cache
from sturdy.data.cache_writer import hash_pixels
from sturdy.data.listing import first_names
from sturdy.data.source import Source


@dataclass(frozen=True)
class Change:
    """One difference, as ``str`` a line for people: ``2 images are new (a.png, b.png)``.

    Attributes:
        text: what differs.
        names: all images, or captions, that it is about; the line shows the first of them.
        new: whether they are images that were not there before.
    """

    text: str
    names: list[str] = field(default_factory=list)
    new: bool = False

    def __str__(self) -> str:
        return f"{self.text} ({first_names(self.names)})" if self.names else self.text


def find_changes(old: Cache, new: Cache) -> list[Change]:
    """Return how the images of ``new`` differ from those of ``old``.

    An image changed, or was renamed, by the hash of its content where both caches have these
    hashes, and else by its pixels.
    """
    old_index = {name: i for i, name in enumerate(old.names)}
    new_index = {name: i for i, name in enumerate(new.names)}
    old_hashes, new_hashes = comparable_hashes(old, new)
    known = set(old_hashes)
    broken = dict.fromkeys(name for name, _ in new.quarantine if name in old_index)
    missing = {name: old_hashes[i] for name, i in old_index.items() if name not in new_index}
    missing_by_hash = {h: name for name, h in missing.items() if name not in broken}
    both_have_captions = bool(old.captions and new.captions)
    added, copies, renamed, changed, moved, told = [], [], [], [], [], []
    for name, i in new_index.items():
        if name in old_index:
            k = old_index[name]
            if old_hashes[k] != new_hashes[i]:
                changed.append(name)
            if _class_name(old, k) != _class_name(new, i):
                moved.append(f"{name}: {_class_name(old, k)} -> {_class_name(new, i)}")
            if both_have_captions and old.caption(k) != new.caption(i):
                told.append(name)
        elif old_name := missing_by_hash.pop(new_hashes[i], None):
            renamed.append(f"{old_name} -> {name}")
            del missing[old_name]
        elif new_hashes[i] in known:
            copies.append(name)
        else:
            added.append(name)
    gone = [name for name in missing if name not in broken]
    changes = [
        *_count(added, "is new", "are new", new=True),
        *_count(copies, "is a copy of one that was there", "are copies of some that were there"),
        *_count(gone, "is gone", "are gone"),
        *_count(changed, "changed", "changed", new=True),
        *_count(renamed, "was renamed or moved", "were renamed or moved"),
        *_count(broken, "cannot be read any more", "cannot be read any more"),
        *_count(moved, "has another class", "have another class"),
        *_count(told, "changed", "changed", what="caption"),
    ]
    if bool(old.captions) != bool(new.captions):
        before = f"{len(old.captions):,} captions" if old.captions else "no captions"
        after = f"{len(new.captions):,}" if new.captions else "none"
        changes.append(Change(f"there were {before}, and there are {after}"))
    changes += _class_changes(old.classes, new.classes)
    return changes or [
        Change("the files are the same; their order differs, or how they are decoded")
    ]


def describe_changes(old: Cache, new: Cache) -> list[str]:
    """Say how the images of ``new`` differ from those of ``old``: numbers, and the first names."""
    return [str(change) for change in find_changes(old, new)]


def list_changes(changes: Iterable[Change]) -> str:
    """Return all changes with all their names, a line each."""
    lines = []
    for change in changes:
        lines.append(change.text)
        lines += [f"    {name}" for name in change.names]
    return "\n".join(lines) + "\n"


def new_images(old: Cache, new: Cache) -> list[int]:
    """Return the indices in ``new`` of the images whose content is not in ``old``."""
    old_hashes, new_hashes = comparable_hashes(old, new)
    known = set(old_hashes)
    return [i for i, content in enumerate(new_hashes) if content not in known]


def describe_unused(cache: Cache, source: Source) -> list[str]:
    """Say by name alone how ``source`` differs now from the source that ``cache`` was made of."""
    if cache.key == source.key:
        return []
    index = {source.name(i): i for i in range(len(source))}
    broken = [name for name, _ in cache.quarantine]
    in_cache = {*cache.names, *broken, *cache.small}
    added = [name for name in index if name not in in_cache]
    missing = [name for name in cache.names if name not in index]
    captions = [*getattr(source, "captions", ()), ""]
    both_have_captions = bool(cache.captions) and len(captions) > 1
    both_have_classes = bool(cache.classes and source.classes)
    caption: Any = getattr(source, "caption", None)
    moved, told = [], []
    for k, name in enumerate(cache.names):
        i = index.get(name)
        if i is None:
            continue
        if both_have_classes and source.classes[source.label(i)] != _class_name(cache, k):
            moved.append(name)
        if both_have_captions and captions[caption(i)] != cache.caption(k):
            told.append(name)
    changes = [
        *_count(added, "is new, and not used", "are new, and not used"),
        *_count(missing, "is gone, and still used", "are gone, and still used"),
        *_count(moved, "has another class, which is not used", "have other classes, not used"),
        *_count(told, "changed; the old one is used", "changed; the old are used", what="caption"),
    ]
    return [str(change) for change in changes] or [
        "files were moved or written anew; the images that the run began with are used"
    ]


def comparable_hashes(old: Cache, new: Cache) -> tuple[list[int], list[int]]:
    """Return a hash of each image of both caches: of contents if both have these, else pixels."""
    if old.contents is not None and new.contents is not None:
        return old.contents.tolist(), new.contents.tolist()
    return _pixel_hashes(old), _pixel_hashes(new)


def _pixel_hashes(cache: Cache) -> list[int]:
    return [hash_pixels(cache.image(i)) for i in range(len(cache))]


def _class_name(cache: Cache, index: int) -> str:
    return cache.classes[cache.labels[index]] if cache.classes else "none"


def _class_changes(old: tuple[str, ...], new: tuple[str, ...]) -> list[Change]:
    """Return the classes that came and went, by name."""
    if old == new:
        return []
    added = [name for name in new if name not in old]
    removed = [name for name in old if name not in new]
    words = [f"{first_names(added)} came"] if added else []
    words += [f"{first_names(removed)} went"] if removed else []
    described = " and ".join(words) or "their order changed"
    return [Change(f"of the classes, {described}; there are {len(new) or 'none'} now")]


def _count(
    names: Collection[str], one: str, several: str, *, what: str = "image", new: bool = False
) -> list[Change]:
    """Return ``["13 images are new"]`` with these names, or nothing without names."""
    if not names:
        return []
    described = f"{what} {one}" if len(names) == 1 else f"{what}s {several}"
    return [Change(f"{len(names):,} {described}", list(names), new)]
