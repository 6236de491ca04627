"""How the images of a run differ, by name, from other images or from their source."""

from collections.abc import Collection
from typing import Any

from sturdy.data.cache import Cache
from sturdy.data.cache_writer import hash_pixels
from sturdy.data.listing import first_names
from sturdy.data.source import Source


def describe_changes(old: Cache, new: Cache) -> list[str]:
    """Say how the images of ``new`` differ from those of ``old``: numbers, and the first names.

    An image changed, or was renamed, by the hash of its content where both caches have these
    hashes, and else by its pixels.
    """
    old_index = {name: i for i, name in enumerate(old.names)}
    new_index = {name: i for i, name in enumerate(new.names)}
    old_hashes, new_hashes = _comparable_hashes(old, new)
    broken = dict.fromkeys(name for name, _ in new.quarantine if name in old_index)
    missing = {name: old_hashes[i] for name, i in old_index.items() if name not in new_index}
    missing_by_hash = {h: name for name, h in missing.items() if name not in broken}
    both_have_captions = bool(old.captions and new.captions)
    added, renamed, changed, moved, told = [], [], [], [], []
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
        else:
            added.append(name)
    lines = [
        *_count(added, "is new", "are new"),
        *_count([name for name in missing if name not in broken], "is gone", "are gone"),
        *_count(changed, "changed", "changed"),
        *_count(renamed, "was renamed or moved", "were renamed or moved"),
        *_count(broken, "cannot be read any more", "cannot be read any more"),
        *_count(moved, "has another class", "have another class"),
        *_count(told, "changed", "changed", what="caption"),
    ]
    if bool(old.captions) != bool(new.captions):
        before = f"{len(old.captions):,} captions" if old.captions else "no captions"
        after = f"{len(new.captions):,}" if new.captions else "none"
        lines.append(f"there were {before}, and there are {after}")
    if old.classes != new.classes:
        before = first_names(old.classes) or "none"
        after = first_names(new.classes) or "none"
        lines.append(f"the classes were {before}, and are {after}")
    return lines or ["the files are the same; their order differs, or how they are decoded"]


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
    lines = [
        *_count(added, "is new, and not used", "are new, and not used"),
        *_count(missing, "is gone, and still used", "are gone, and still used"),
        *_count(moved, "has another class, which is not used", "have other classes, not used"),
        *_count(told, "changed; the old one is used", "changed; the old are used", what="caption"),
    ]
    return lines or [
        "files were moved or written anew; the images that the run began with are used"
    ]


def _comparable_hashes(old: Cache, new: Cache) -> tuple[list[int], list[int]]:
    if old.contents is not None and new.contents is not None:
        return old.contents.tolist(), new.contents.tolist()
    return _pixel_hashes(old), _pixel_hashes(new)


def _pixel_hashes(cache: Cache) -> list[int]:
    return [hash_pixels(cache.image(i)) for i in range(len(cache))]


def _class_name(cache: Cache, index: int) -> str:
    return cache.classes[cache.labels[index]] if cache.classes else "none"


def _count(names: Collection[str], one: str, several: str, *, what: str = "image") -> list[str]:
    """Return ``["13 images are new (a.jpg, b.jpg, c.jpg, ...)"]``, or nothing without names."""
    if not names:
        return []
    described = f"{what} {one}" if len(names) == 1 else f"{what}s {several}"
    return [f"{len(names):,} {described} ({first_names(names)})"]
