"""What became of the images of a run, by name: against other images, and against the source that
they came from.
"""

from collections.abc import Collection

from sturdy.data.cache import Cache
from sturdy.data.remarks import hashed_pixels
from sturdy.data.source import Source


def describe_changes(old: Cache, new: Cache) -> list[str]:
    """Say how the images of ``new`` differ from those of ``old``: how many, and the first names, a
    line each kind.

    Where both know the content of each image, it decides what changed and what was renamed; else
    the pixels do.
    """
    before, now = ({name: i for i, name in enumerate(cache.names)} for cache in (old, new))
    then, since = _contents(old, new)
    broken = dict.fromkeys(name for name, _ in new.quarantine if name in before)
    gone = {name: then[i] for name, i in before.items() if name not in now}
    by_content = {content: name for name, content in gone.items() if name not in broken}
    came, renamed, changed, moved = [], [], [], []
    for name, i in now.items():
        if name in before:
            k = before[name]
            if then[k] != since[i]:
                changed.append(name)
            if (was := _class(old, k)) != (is_now := _class(new, i)):
                moved.append(f"{name}: {was} -> {is_now}")
        elif former := by_content.pop(since[i], None):
            renamed.append(f"{former} -> {name}")
            del gone[former]
        else:
            came.append(name)
    lines = [
        *_count(came, "is new", "are new"),
        *_count([name for name in gone if name not in broken], "is gone", "are gone"),
        *_count(changed, "changed", "changed"),
        *_count(renamed, "was renamed or moved", "were renamed or moved"),
        *_count(broken, "cannot be read any more", "cannot be read any more"),
        *_count(moved, "has another class", "have another class"),
    ]
    if old.classes != new.classes:
        lines.append(
            f"the classes were {_some(old.classes) or 'none'}, and are "
            f"{_some(new.classes) or 'none'}"
        )
    return lines or ["the files are the same; their order differs, or how they are decoded"]


def describe_unused(cache: Cache, source: Source) -> list[str]:
    """Say how ``source`` differs now from what ``cache`` was made of, by names alone: nothing is
    read or decoded.
    """
    if cache.key == source.key:
        return []
    names = [source.name(i) for i in range(len(source))]
    known, there = {*cache.names, *(name for name, _ in cache.quarantine), *cache.small}, set(names)
    lines = [
        *_count(
            [name for name in names if name not in known],
            "is new, and not used",
            "are new, and not used",
        ),
        *_count(
            [name for name in cache.names if name not in there],
            "is gone, and still used",
            "are gone, and still used",
        ),
    ]
    return lines or [
        "files were moved or written anew; the images that the run began with are used"
    ]


def _contents(old: Cache, new: Cache) -> tuple[list[int], list[int]]:
    """A hash of each image of both, of the same kind."""
    if old.contents is not None and new.contents is not None:
        return old.contents.tolist(), new.contents.tolist()
    first, second = (
        [hashed_pixels(cache.image(i)) for i in range(len(cache))] for cache in (old, new)
    )
    return first, second


def _class(cache: Cache, index: int) -> str:
    return cache.classes[cache.labels[index]] if cache.classes else "none"


def _count(names: Collection[str], one: str, several: str) -> list[str]:
    """``"13 images are new (a.jpg, b.jpg, c.jpg, ...)"``, or nothing where there is none."""
    if not names:
        return []
    return [
        f"{len(names):,} {f'image {one}' if len(names) == 1 else f'images {several}'} "
        f"({_some(names)})"
    ]


def _some(names: Collection[str], most: int = 3) -> str:
    """The first names."""
    return ", ".join([*list(names)[:most], *(["..."] if len(names) > most else [])])
