"""The captions of the images of a folder.

The caption of an image is the first of these that there is:

1. its value in ``metadata.jsonl`` or ``metadata.csv``,
2. the text of the ``.txt`` file of the same name beside it,
3. a template, with the image's class in place of ``{}``.

The distinct captions are sorted, and an image has the row of its caption in this list. The row of
an empty caption is the number of distinct captions, which is the null label.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sturdy.data.listing import TextFile, first_names, printable
from sturdy.data.metadata import as_one_line, read_column, read_text

TEMPLATE = "a photo of a {}"  # where no image has a caption of its own
MAX_SHOWN = 80  # characters of the caption that is shown


class Captions(NamedTuple):
    """Captions of images.

    Attributes:
        texts: the distinct captions, without the empty one, in the order of their UTF-8 bytes.
        rows: the row in ``texts`` of each image's caption, ``(n,)``; ``len(texts)`` if it is empty.
        lines: what was found, in words.
        used: the files that captions are from.
    """

    texts: tuple[str, ...]
    rows: NDArray[np.int64]
    lines: list[str]
    used: list[TextFile]


def read_captions(
    images: Sequence[bytes],
    *,
    column: str | None,
    template: str | None,
    tables: Sequence[TextFile],
    texts: Mapping[bytes, TextFile],
    classes: Sequence[str],
) -> Captions:
    """Read the captions of ``images``, which are given by their names.

    Args:
        images: their names.
        column: of the tables; ``None`` does not read them.
        template: of the captions of images without another. ``None`` is ``TEMPLATE`` if there are
            classes and neither a table nor a ``.txt`` of an image, else there is none.
        tables: the tables of the folder.
        texts: the ``.txt`` files, by their name without ``.txt``.
        classes: the class of each image; empty without classes.

    Raises:
        ValueError: images have no caption, all captions are empty, or a file cannot be understood.
        OSError: a file cannot be read.
    """
    tables = tables if column else []
    hint = "; caption_column=null takes no captions from tables"
    found = read_column("caption_column", column or "", tables, frozenset(images), hint=hint)
    captions = [found.values.get(name) for name in images]
    beside = [texts.get(os.path.splitext(name)[0]) for name in images]
    used = [file for file, text in zip(beside, captions, strict=True) if file and text is None]
    counts = found.counts
    for i, file in enumerate(beside):
        if file and captions[i] is None:
            captions[i] = as_one_line(read_text(file))
            counts[".txt"] += 1
    if template is None and classes and not tables and not used:
        template = TEMPLATE
    missing = [i for i, text in enumerate(captions) if text is None]
    if missing and template is None:
        raise ValueError(
            _describe_missing([images[i] for i in missing], len(images), bool(classes))
        )
    fill_captions(captions, template, classes, counts)
    return sort_captions(captions, counts, found.notes(), [*found.tables, *used])


def fill_captions(
    captions: list[str | None], template: str | None, classes: Sequence[str], counts: Counter[str]
) -> None:
    """Give the images whose caption is ``None`` the ``template``, and count them.

    Raises:
        ValueError: the template has ``{}``, and there are no classes.
    """
    missing = [i for i, text in enumerate(captions) if text is None]
    if template is None or not missing:
        return
    if "{}" in template and not classes:
        raise ValueError(
            f'caption="{template}" has {{}} for the class of an image, and these images have '
            f"no classes: leave out the {{}}"
        )
    for i in missing:
        captions[i] = as_one_line(template.replace("{}", classes[i] if classes else ""))
    counts[f'caption="{template}"'] += len(missing)


def sort_captions(
    captions: Sequence[str | None],
    counts: Counter[str],
    notes: Sequence[str] = (),
    used: Sequence[TextFile] = (),
) -> Captions:
    """Sort the distinct captions, and say what was found.

    Args:
        captions: of the images, in order.
        counts: the number of images by the origin of their caption.
        notes: further lines.
        used: the files that captions are from.

    Raises:
        ValueError: all are empty.
    """
    texts = sorted({text for text in captions if text}, key=str.encode)
    if not texts:
        raise ValueError("captions=true, and all captions are empty")
    row_of = {text: row for row, text in enumerate(texts)}
    rows = np.array([row_of.get(text or "", len(texts)) for text in captions], dtype=np.int64)
    empty = int((rows == len(texts)).sum())
    origins = ", ".join(f"{origin} {n:,}" for origin, n in counts.items())
    example = printable(next(text for text in captions if text).encode())
    if len(example) > MAX_SHOWN:
        example = f"{example[:MAX_SHOWN]}..."
    line = f"captions: {len(captions):,} of {len(captions):,} images ({origins})"
    line += f", {len(texts):,} different" + (f", {empty:,} empty" if empty else "")
    return Captions(tuple(texts), rows, [f'{line}; e.g. "{example}"', *notes], list(used))


def _describe_missing(missing: Sequence[bytes], total: int, has_classes: bool) -> str:
    names = first_names([printable(name) for name in missing], 5)
    template = f'caption="{TEMPLATE}"' if has_classes else 'caption="a photo"'
    return (
        f"captions=true, and {len(missing):,} of {total:,} images have no caption ({names}): add "
        f"them to metadata.jsonl or metadata.csv (file_name and text), write a .txt of the same "
        f"name beside each, leave them out with exclude=[...], or give them one with "
        f"'{template}'"
    )
