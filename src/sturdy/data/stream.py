"""Training images from shards that need not fit on the disk.

The order, the split, crops and flips are those of a folder of the same images in the same order, so
that a training ends in the same bits.
"""

from functools import partial
from inspect import signature
from typing import Any, cast

from typing_extensions import override

from sturdy.data.cache import Cache, find_cache
from sturdy.data.changes import describe_unused
from sturdy.data.datamodule import ImageData
from sturdy.data.shard_source import Shards
from sturdy.data.source import Source


class StreamData(ImageData):
    """``ImageData`` of ``Shards``, with the arguments of both side by side.

    Args:
        root: the folder or the URL with the shards and their index.
        image_size: height and width of the images, in pixels.
        **others: further arguments of ``Shards`` and of ``ImageData``.
    """

    # Lightning keeps the state of a data module under the name of its class, and a run of a folder
    # can go on in shards.
    __qualname__ = ImageData.__qualname__

    def __init__(self, *, root: str, image_size: int = 64, **others: Any) -> None:
        names = signature(Shards).parameters
        of_shards = {name: value for name, value in others.items() if name in names}
        of_data = {name: value for name, value in others.items() if name not in names}
        source = partial(Shards, root=root, image_size=image_size, **of_shards)
        super().__init__(source, image_size=image_size, **of_data)

    @override
    def _open_source(self, source: Source) -> Cache:
        cache = super()._open_source(source)
        assert cache.stream is not None
        if change := cache.stream.find_change():
            raise ValueError(change)
        return cache

    @override
    def _open_expected(self, digest: str) -> Cache:
        """Return the images of ``digest`` if their shards are as they were, else all there are."""
        # Without the store there is no image, whatever is in the cache.
        source = cast(Shards, self._list_source())
        cache = find_cache(self.cache_root, digest, prefer=source.key)
        if cache is None or cache.stream is None:
            change = "the list of the images that the run began with is not there: all are taken"
        elif cache.stream.root != source.store.root:
            change = f"root={source.store.root} was {cache.stream.root}: all images there are taken"
        else:
            change = cache.stream.find_change()
            if not change:
                self.notes = describe_unused(cache, source)
                return cache
        cache = self._open_source(source)
        if digest not in (cache.digest, cache.digest_with_contents):
            self.notes = [change]
        return cache
