"""Which folders are classes.

    cat, dog          folders that are classes
    train, test       parts of a data set: the classes are one level below
    images, masks     the images, and what belongs to them

Where folders may be parts of a data set, the user is asked.
"""

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from sturdy.data.files import Files
from sturdy.data.listing import ImageFile, printable

SPLIT_NAMES = frozenset("train training val valid validation dev test testing".split())
IMAGE_NAMES = frozenset("image images img imgs jpegimages".split())
# folders of files that belong to images and are not to be trained on
COMPANION_NAMES = frozenset(
    "annotation annotations conditioning conditioning_image conditioning_images label labels mask "
    "masks segmentation segmentations segmentationclass segmentationobject".split()
)
MAX_CLASSES = 10  # most classes that are named


def find_classes(
    files: Files, roots: Sequence[Path], images: Sequence[ImageFile], labels: bool | str
) -> list[bytes]:
    """Return the classes in byte order, none when unlabelled; see ``Folder`` for ``labels``.

    Raises:
        ValueError: images lie in folders and beside them, or ``labels`` is ``"auto"`` and the
            folders are named like parts of a data set.
    """
    tops = sorted({image.top for image in images} - {b""})
    if labels is False or (labels == "auto" and not tops):
        return []
    loose = next((image.name for image in images if not image.top), None)
    if loose is not None:
        names = ", ".join(printable(top) for top in tops[:3]) + ", ..." * (len(tops) > 3)
        folders = f"{len(tops)} folders of images" + (f" ({names})" if tops else "")
        raise ValueError(
            f"{as_override('root', roots)} has images in the folder itself, such as "
            f"{printable(loose)}, and {folders}: move those into folders of classes, take all as "
            f"unlabelled with labels=false, or leave folders out with exclude=[...]"
        )
    if labels == "auto":
        _ask_about_parts(files, roots, images, tops)
    return tops if labels is True or len(tops) > 1 else []


def _ask_about_parts(
    files: Files, roots: Sequence[Path], images: Sequence[ImageFile], tops: list[bytes]
) -> None:
    """Raise ``ValueError`` with the possible answers if ``tops`` may be parts of a data set."""
    lower = {top: printable(top).lower() for top in tops}
    parts = [top for top in tops if lower[top] in SPLIT_NAMES | IMAGE_NAMES | COMPANION_NAMES]
    if not parts or (len(tops) == 1 and not count_classes_below(images, tops)):
        return
    usable = [top for top in parts if lower[top] not in COMPANION_NAMES]
    usable.sort(key=lambda top: not lower[top].startswith("train"))  # the most likely first
    selections = [usable[:1]] if usable else []
    if len(usable) > 1:
        selections.append(usable)

    answers = []
    for selection in selections:
        folders = subfolders(files, roots, selection)
        n = sum(image.top in selection for image in images)
        classes = describe_classes(count_classes_below(images, selection))
        answers.append((as_override("root", folders), f"{n:,} images, {classes}"))
    if len(tops) > 1:
        classes = describe_classes(count_images(image.top for image in images))
        answers.append(("labels=true", f"{len(images):,} images, {classes}"))
    answers.append(("labels=false", f"{len(images):,} images, no classes"))
    width = max(len(override) for override, _ in answers)
    names = ", ".join(printable(top) for top in parts)
    raise ValueError(
        f"{as_override('root', roots)} has folders that may be parts of a data set and not "
        f"classes: {names}. Give one of:\n"
        + "\n".join(f"  {override:<{width}}  {meaning}" for override, meaning in answers)
    )


def subfolders(files: Files, roots: Iterable[Path], tops: Iterable[bytes]) -> list[Path]:
    """Return the folders named ``tops`` that exist in ``roots``."""
    roots = list(roots)
    paths = [root / os.fsdecode(top) for top in tops for root in roots]
    return [path for path in paths if files.is_folder(os.fsencode(path))]


def count_images(folders: Iterable[bytes]) -> Counter[bytes]:
    """Count how often each folder occurs, in byte order."""
    return Counter(dict(sorted(Counter(folders).items())))


def count_classes_below(images: Iterable[ImageFile], tops: Iterable[bytes]) -> Counter[bytes]:
    """Count the images of each folder one level below ``tops``; none if they are not classes."""
    counts = count_images(image.second for image in images if image.top in tops)
    return counts if len(counts) > 1 and b"" not in counts else Counter()


def as_override(name: str, paths: Sequence[Path]) -> str:
    """Return ``name=path`` or ``name=[path,path]``, quoted as it is typed on a command line."""
    texts = [printable(path) for path in paths]
    special = set(" ()[]{},:=\\'\"$&#;|<>*?!`")
    must_quote = any(special & set(text) or not text.isascii() for text in texts)
    if must_quote:
        texts = ['"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' for text in texts]
    value = texts[0] if len(texts) == 1 else f"[{','.join(texts)}]"
    return shlex.quote(f"{name}={value}") if must_quote else f"{name}={value}"


def describe_classes(counts: Counter[bytes]) -> str:
    """Return ``"classes: cat 40, dog 38"``; of many their number, and the smallest and largest."""
    if not counts:
        return "no classes"
    first = ", ".join(f"{printable(name)} {n:,}" for name, n in list(counts.items())[:MAX_CLASSES])
    if len(counts) <= MAX_CLASSES:
        return f"classes: {first}"
    (largest, most), *_, (smallest, least) = counts.most_common()
    sizes = f"{least:,} ({printable(smallest)}) to {most:,} ({printable(largest)})"
    return f"{len(counts):,} classes of {sizes} images: {first}, ..."
