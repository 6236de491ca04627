"""What the top-level folders mean: classes, or the parts of a data set, about which the user is
asked.

cat, dog          classes
train, test       splits: the classes are one level below
images, masks     the images, and what belongs to them
"""

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from sturdy.data.listing import Found, printable

SPLITS = frozenset("train training val valid validation dev test testing".split())
IMAGES = frozenset("image images img imgs jpegimages".split())
BESIDE = frozenset(  # what belongs to images and is none to learn from
    "annotation annotations conditioning conditioning_image conditioning_images label labels mask "
    "masks "
    "segmentation segmentations segmentationclass segmentationobject".split()
)
MANY = 10  # classes; of more only some are named


def classes_of(roots: Sequence[Path], images: Sequence[Found], labels: bool | str) -> list[bytes]:
    """The classes in byte order, none when unlabelled; see ``Folder`` for ``labels``.

    Raises:
        ValueError: images lie in folders and beside them, or ``labels`` is ``"auto"`` and the
            folders are named like the parts of a data set.
    """
    tops = sorted({image.top for image in images} - {b""})
    loose = next((image.name for image in images if not image.top), None)
    if labels is False or (labels == "auto" and not tops):
        return []
    if loose is not None:
        names = ", ".join(printable(top) for top in tops[:3]) + ", ..." * (len(tops) > 3)
        raise ValueError(
            f"{' and '.join(printable(root) for root in roots)} (data.root) has images in the "
            f"folder itself, such as "
            f"{printable(loose)}, and {len(tops)} folders of images{f' ({names})' * bool(tops)}: "
            f"move those into "
            "folders of classes, take all as unlabelled with data.labels=false, or leave folders "
            "out with data.exclude"
        )
    if labels == "auto":
        _ask(roots, images, tops)
    return tops if labels is True or len(tops) > 1 else []


def _ask(roots: Sequence[Path], images: Sequence[Found], tops: list[bytes]) -> None:
    """Raise ``ValueError`` with the words for each meaning if ``tops`` are named like the parts of
    a data set.
    """
    lower = {top: printable(top).lower() for top in tops}
    parts = [top for top in tops if lower[top] in SPLITS | IMAGES | BESIDE]
    if not parts or (len(tops) == 1 and not below(images, tops)):
        return
    choices = []
    whole = [top for top in parts if lower[top] not in BESIDE]
    whole.sort(key=lambda top: not lower[top].startswith("train"))  # the likeliest first
    for some in [[top] for top in whole[:1]] + [whole] * (len(whole) > 1):
        chosen = [
            root / os.fsdecode(top)
            for top in some
            for root in roots
            if (root / os.fsdecode(top)).is_dir()
        ]
        n = sum(image.top in some for image in images)
        choices.append(
            (words("data.root", chosen), f"{n:,} images, {summary(below(images, some))}")
        )
    if len(tops) > 1:
        choices.append(
            (
                "data.labels=true",
                f"{len(images):,} images, {summary(count(image.top for image in images))}",
            )
        )
    choices.append(("data.labels=false", f"{len(images):,} images, no classes"))
    width = max(len(word) for word, _ in choices)
    raise ValueError(
        f"{words('data.root', roots)} has folders that may be parts of a data set and not classes: "
        f"{', '.join(printable(top) for top in parts)}. Say what you mean:\n"
        + "\n".join(f"  {word:<{width}}  {what}" for word, what in choices)
    )


def count(folders: Iterable[bytes]) -> Counter[bytes]:
    """How often each folder occurs, in byte order."""
    return Counter(dict(sorted(Counter(folders).items())))


def below(images: Iterable[Found], tops: Iterable[bytes]) -> Counter[bytes]:
    """How many images each folder one level below ``tops`` has; none if these would be no
    classes.
    """
    counts = count(image.second for image in images if image.top in tops)
    return counts if len(counts) > 1 and b"" not in counts else Counter()


def words(key: str, paths: Sequence[Path]) -> str:
    """``key=path`` or ``key=[path,path]`` as it is typed on a command line."""
    texts = [printable(path) for path in paths]
    odd = (
        any(c in text for text in texts for c in " ()[]{},:=\\'\"$&#;|<>*?!`")
        or not "".join(texts).isascii()
    )
    if odd:
        texts = ['"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' for text in texts]
    value = texts[0] if len(texts) == 1 else f"[{','.join(texts)}]"
    return shlex.quote(f"{key}={value}") if odd else f"{key}={value}"


def summary(counts: Counter[bytes]) -> str:
    """``"classes: cat 40, dog 38"``; of many the number, the smallest and largest, and the
    first.
    """
    if not counts:
        return "no classes"
    first = ", ".join(f"{printable(name)} {n:,}" for name, n in list(counts.items())[:MANY])
    if len(counts) <= MANY:
        return f"classes: {first}"
    (large, most), *_, (small, least) = counts.most_common()
    few = f"{least:,} ({printable(small)}) to {most:,} ({printable(large)})"
    return f"{len(counts):,} classes of {few} images: {first}, ..."
