"""Text conditions: a caption is a label, the row of a table of text embeddings.

    embeddings, [pooled, sizes] = table[label]        label = rows is the null caption

Label drop is caption dropout, the null label is the empty caption, and guidance needs nothing new.
The text encoders are not trained, so each caption is encoded once, and they are freed afterwards.
"""

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from sturdy.diffusion.condition import Condition
from sturdy.image_size import ImageSize, height_and_width
from sturdy.pretrained.text_encoders import TextEncoders
from sturdy.pretrained.text_table import TextTable, open_table


class CaptionCondition(Condition):
    """The caption of an image. The backbone gets its embeddings, float32.

    That are ``(embeddings (b, tokens, d),)``, and for a table with pooled embeddings
    ``(embeddings, pooled (b, p), sizes (b, 6))``. The sizes are those that SDXL was trained to be
    told (Podell et al. 2023, sec. 2.2): height and width of the original image, top and left of the
    crop, height and width of the image that is drawn.

    Args:
        label: ``(b,)`` int64 in [0, rows]; the label ``rows`` is the null caption.
        table: the embeddings.
        image_size: height and width of the images, in pixels; one number for squares. They count as
            not cropped. ``sized`` is for images of another size.

    Raises:
        ValueError: a label is out of range (checked on the CPU only).
    """

    def __init__(self, label: Tensor, table: TextTable, image_size: ImageSize) -> None:
        super().__init__(label)
        self.table = table
        self.size = height_and_width(image_size)
        if not label.is_cpu:
            return
        wrong = label[(label < 0) | (label > len(table))]
        if wrong.numel():
            raise ValueError(
                f"label {wrong[0].item()} is out of range: {len(table)} captions are 0 to "
                f"{len(table) - 1}, then comes the null caption"
            )

    @override
    def drop(self, mask: Tensor) -> Self:
        (label,) = self.rows
        assert label is not None
        return self.with_rows(label.masked_fill(mask.to(label.device), len(self.table)))

    @override
    def sized(self, height: int, width: int) -> Self:
        changed = copy(self)
        changed.size = (height, width)
        return changed

    @override
    def arguments(self) -> tuple[Tensor | None, ...]:
        (label,) = self.rows
        assert label is not None
        embeddings, pooled = self.table.rows(label)
        if pooled is None:
            return (embeddings,)
        height, width = map(float, self.size)
        sizes = torch.tensor([height, width, 0.0, 0.0, height, width], device=label.device)
        return embeddings, pooled, sizes.expand(len(label), 6)


class Captions:
    """The option ``condition=captions``: makes the condition of labels that number captions.

    ``prepare`` must come first. Copies are the object itself, so that a network and its average
    share one table.

    Args:
        path: where the text encoders are: a folder of diffusers, or a single file.
        image_size: height and width of the images, in pixels; one number for squares.
        sha256: hash of the text encoders' weights (two are joined by ``+``); None accepts any.

    Attributes:
        table: the embeddings; None before ``prepare``.
        notes: lines about the captions that the user should see.
    """

    def __init__(
        self, path: str | Path, *, image_size: ImageSize, sha256: str | None = None
    ) -> None:
        self.path = Path(path).expanduser()
        self.image_size = image_size
        self.sha256 = sha256
        self.table: TextTable | None = None
        self.notes: list[str] = []
        self._key = ""

    def __call__(
        self, label: Tensor, num_classes: int, augmentation: Tensor | None = None
    ) -> CaptionCondition:
        """Return the condition of ``label`` ``(b,)``, in which ``num_classes`` is the null label.

        Raises:
            ValueError: a label is out of range, or there is an augmentation.
        """
        if augmentation is not None:
            raise ValueError("captions do not go with an augmentation that the network is told of")
        if self.table is None:
            raise RuntimeError("Captions.prepare(texts, root) must come before the first condition")
        if num_classes != len(self.table):  # prompts stand in the place of the training captions
            label = label.masked_fill(label == num_classes, len(self.table))
        return CaptionCondition(label, self.table, self.image_size)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def prepare(self, texts: Sequence[str], root: Path, *, null: str | None = None) -> TextTable:
        """Load the embeddings of ``texts``, or make them; then free the text encoders.

        Args:
            texts: the caption of each label.
            root: the folder of all caches.
            null: the text of the null caption, such as a negative prompt; None for that with which
                the text encoders are used.

        Raises:
            ValueError: the text encoders cannot be read, or have other weights than ``sha256``.
            OSError: the table cannot be written.
        """
        encoders = self._open_encoders()
        self.table = open_table(
            root,
            texts,
            null=null,
            encoder_key=encoders.key,
            make_encode=encoders.load,
        )
        self.notes = describe_cut(self.table, encoders.length)
        return self.table

    @property
    def digest(self) -> str:
        """A hash of the captions and of every bit of their embeddings; "" before ``prepare``."""
        return self.table.digest if self.table else ""

    def key(self) -> str:
        """Return a hash of everything that the embedding of a text depends on."""
        return self._key or self._open_encoders().key

    def _open_encoders(self) -> TextEncoders:
        encoders = TextEncoders(self.path)
        found = encoders.sha256
        if self.sha256 not in (None, found):
            raise ValueError(
                f"path={self.path} has other text encoders than expected: sha256 {found} where "
                f"{self.sha256} is expected. Give the file or folder of those as path=..."
            )
        self._key = encoders.key
        return encoders


def describe_cut(table: TextTable, length: int) -> list[str]:
    """Say how many captions were cut, with an example; empty if none was."""
    if not table.cut:
        return []
    return [
        f"{len(table.cut):,} of {len(table):,} captions have more than {length} tokens; the rest "
        f"of these is not read: {table.cut[0][:80]!r}..."
    ]
