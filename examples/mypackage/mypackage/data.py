"""A source of images whose classes are in a table."""

import csv
import hashlib
from pathlib import Path

import numpy as np

from sturdy.data.decode import decode


class Table:
    """The images that ``labels.csv`` names: a line ``file,class`` for each, without a header.

    Args:
        root: the folder with ``labels.csv`` and the images.
        size: height and width of the decoded images.

    Attributes:
        classes: names of the classes; label k is ``classes[k]``.
        key: a hash that changes when any image or label changes.

    Raises:
        ValueError: there is no ``labels.csv``.
    """

    def __init__(self, *, root: str, size: int) -> None:
        self.root = Path(root).expanduser().absolute()
        self.size = size
        table = self.root / "labels.csv"
        if not table.is_file():
            raise ValueError(f"root={root} has no labels.csv")
        with table.open(newline="") as file:
            self.rows = [(name, label) for name, label in csv.reader(file)]
        self.classes = tuple(sorted({label for _, label in self.rows}))
        digest = hashlib.sha256(repr((size, self.rows)).encode())
        for name, _ in self.rows:
            digest.update((self.root / name).read_bytes())
        self.key = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def label(self, index: int) -> int:
        """Return the number of the class."""
        return self.classes.index(self.rows[index][1])

    def name(self, index: int) -> str:
        """Return the name of the image for messages."""
        return self.rows[index][0]

    def decode(self, index: int) -> np.ndarray:
        """Return the image, uint8 ``(3, size, size)``.

        Raises:
            sturdy.data.source.BadImageError: the image cannot be used; the message is the reason.
        """
        return decode(self.root / self.rows[index][0], size=self.size)
