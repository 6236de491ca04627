"""The images of a set in shards, read and decoded at every use.

    image i = decode(bytes [offset_i, offset_i + size_i) of shard_i)

The bytes must have the hash that the index gives, so that an image is what it was when the run
began, or an error.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exact_resume.files import open_durable
from sturdy.data.cache_writer import hash_bytes, hash_pixels
from sturdy.data.decode import decode_file
from sturdy.data.shard_index import Names, Shard
from sturdy.data.shard_store import ShardChangedError, ShardError, ShardStore
from sturdy.data.source import BadImageError

PROBES = 16  # images whose pixels tell whether they are still decoded in the same way
PLACE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4")])
PLACES, NAMES, NAME_ENDS = "places.npy", "names.bin", "name_ends.npy"


class StreamedImages:
    """The images of a ``Cache`` without pixels.

    Args:
        path: the folder of the cache, with where every image lies.
        manifest: what ``write_places`` returned.
        shapes: height and width of each decoded image, ``(n, 2)``.
        contents: the hash of the bytes of each image, ``(n,)``.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        shapes: NDArray[np.int64],
        contents: NDArray[np.uint64] | None,
    ) -> None:
        self.path = path
        self.root: str = manifest["root"]
        self.shards = [Shard(*shard) for shard in manifest["shards"]]
        self.decoding: dict[str, Any] = dict(manifest["decoding"])
        self.decoding["background"] = tuple(self.decoding["background"])
        self.probe: str = manifest["probe"]
        self.shapes = shapes
        self.contents = contents
        self.places = np.load(path / PLACES, mmap_mode="r")
        self._store: ShardStore | None = None

    @property
    def store(self) -> ShardStore:
        """The store with the shards, which is first looked for when an image is read."""
        if self._store is None:
            self._store = ShardStore(self.root)
        return self._store

    def image(self, index: int) -> np.ndarray:
        """Return one image, ``(3, h, w)``.

        Raises:
            ShardChangedError: it is not what the index says.
            ShardError: it cannot be read.
        """
        assert self.contents is not None
        place = self.places[index]
        shard = self.shards[place["shard"]].name
        size = int(place["size"])
        content = self.store.read(shard, int(place["offset"]), size)
        if len(content) != size or hash_bytes(content) != int(self.contents[index]):
            raise ShardChangedError(
                f"root={self.root}: {stream_names(self.path)[index]} in the shard {shard} is not "
                f"what the index says: the shard was changed or is damaged. Put back the one that "
                f"the index was made of"
            )
        try:
            image = decode_file(content, **self.decoding).pixels
        except BadImageError as error:
            name = stream_names(self.path)[index]
            raise ShardChangedError(
                f"root={self.root}: {name} is not decoded any more: {error}"
            ) from None
        if image.shape[1:] != tuple(self.shapes[index]):
            name = stream_names(self.path)[index]
            raise ShardChangedError(f"root={self.root}: {name} is now decoded to {image.shape}")
        return image

    def images(self, indices: Sequence[int] | NDArray[np.int64]) -> Iterator[np.ndarray]:
        """Yield the image at each index."""
        return self.store.map(self.image, [int(index) for index in indices])

    def find_change(self) -> str:
        """Say how the shards differ from those of the index, or how they are decoded; "" if not.

        Sizes are compared, and a few images are read.

        Raises:
            ShardError: the store cannot be read.
        """
        try:
            found = {shard.name: shard.size for shard in self.store.shards()}
        except FileNotFoundError as error:
            raise ShardError(str(error)) from None
        for name, size, _ in self.shards:
            if name not in found:
                return f"root={self.root}: the shard {name} is gone"
            if found[name] != size:
                return (
                    f"root={self.root}: the shard {name} has {found[name]:,} bytes, and had "
                    f"{size:,} when the index was made"
                )
        try:
            is_same = self.probe == hash_probes(self)
        except ShardChangedError as error:
            return str(error)
        return "" if is_same else "the packages that decode images give other pixels now"


def hash_probes(images: StreamedImages) -> str:
    """Hash the pixels of a few images, spread evenly."""
    n = len(images.places)
    indices = np.unique(np.linspace(0, n - 1, PROBES).astype(int)).tolist()
    digest = hashlib.sha256()
    for image in images.images(indices):
        digest.update(hash_pixels(image).to_bytes(8, "little"))
    return digest.hexdigest()


def write_places(
    path: Path,
    root: str,
    shards: Sequence[Shard],
    decoding: dict[str, Any],
    samples: NDArray[Any],
    names: Names,
    shapes: NDArray[np.int64],
) -> dict[str, Any]:
    """Write the files that ``StreamedImages`` reads; return its entry of the manifest."""
    places = np.empty(len(samples), PLACE)
    for column in PLACE.names or ():
        places[column] = samples[column]
    for name, array in ((PLACES, places), (NAME_ENDS, names.ends)):
        with open_durable(path / name) as file:
            np.save(file, array)
    with open_durable(path / NAMES) as file:
        file.write(names.text.tobytes())
    manifest = {"root": root, "shards": shards, "decoding": decoding, "probe": ""}
    manifest = json.loads(json.dumps(manifest))
    images = StreamedImages(path, manifest, shapes, samples["content"])
    return manifest | {"probe": hash_probes(images)}


def stream_names(path: Path) -> Names:
    """Return the names of the images of the cache ``path``, from the memory map."""
    text = np.memmap(path / NAMES, dtype=np.uint8, mode="r")
    return Names(text, np.load(path / NAME_ENDS, mmap_mode="r"))
