"""One image file to pixels: decoded strictly, turned upright, on a background, resized with
antialiasing.

    pixels = crop(upright(resize(composite(file))))

JPEG goes through simplejpeg, which refuses damaged data that Pillow would fill with grey; PNG,
WebP, BMP, GIF (the first frame), TIFF, AVIF and JPEG 2000 go through Pillow, HEIC through
pillow-heif where that is installed. Damaged
metadata do not make an image broken: see ``mend``. The resize is PyTorch's antialiased bicubic on
    uint8: the same bits
at any number of threads.
"""

import contextlib
import errno
import io
import os
import re
import stat
import threading
import warnings
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from torch.nn.functional import interpolate

from sturdy.data.colour import RGB, from_cmyk, from_pillow, is_deep
from sturdy.data.formats import JPEG, Opener, opener_of, what_else
from sturdy.data.mend import mend_jpeg, mend_png
from sturdy.data.source import BadImageError, ImageTooSmallError

DECODER = 1  # raise it whenever a pixel changes: the keys of sources read it
MAX_PIXELS = 100_000_000  # a header that promises more is refused before anything is decoded

Crop = Literal["center", "random"]

ORIENTATION = 0x0112  # the EXIF tag
# EXIF orientation -> (swap rows and columns, then flip y, then flip x)
UPRIGHT = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}

# the marker in a JPEG whose CMYK counts 255 as no ink, as everybody writes it
ADOBE = b"\xff\xee\x00\x0eAdobe"


class _Quiet:
    """Silences Pillow while any thread is inside: ``catch_warnings`` alone is not safe with
    threads.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.caught = warnings.catch_warnings()
                self.caught.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.caught.__exit__(None, None, None)


QUIET = _Quiet()


class Decoded(NamedTuple):
    """An image, and what is to be known of its file."""

    pixels: np.ndarray  # uint8 (3, h, w)
    side: int  # the short side of the file, in pixels
    deep: bool  # whether the file has more than 8 bits of grey


def decode(
    data: bytes | str | os.PathLike[str],
    *,
    size: int,
    crop: Crop = "center",
    background: RGB = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    min_side: int = 0,
) -> np.ndarray:
    """Decode one image, uint8 ``(3, h, w)``, RGB; see ``colour`` for what becomes of other kinds of
    pixels.

    Args:
        data: the file's content, or its path. The format is told from the content, never from the
            suffix.
        size: of the short side, in pixels; smaller images are scaled up.
        crop: ``"center"`` cuts to ``(3, size, size)``; ``"random"`` leaves the long side uncut.
        background: what shows through transparent pixels.
        max_pixels: most pixels an image may have, before and after the resize.
        min_side: fewest pixels that the short side of the file may have.

    Raises:
        BadImageError: the file is damaged, too large, not an image, or not to be read.
        ImageTooSmallError: its short side is below ``min_side``.
        OSError, MemoryError: as they come, when the machine is at fault and not the file (a failing
            disk).
    """
    return examine(
        data, size=size, crop=crop, background=background, max_pixels=max_pixels, min_side=min_side
    ).pixels


def examine(
    data: bytes | str | os.PathLike[str],
    *,
    size: int,
    crop: Crop = "center",
    background: RGB = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    min_side: int = 0,
) -> Decoded:
    """Decode one image and tell of its file; arguments and errors as of ``decode``."""
    content = data if isinstance(data, bytes) else read(data, most=16 * max(max_pixels, MAX_PIXELS))
    if not content:
        raise BadImageError("empty")
    if content.startswith(JPEG):
        pixels, (height, width), orientation, deep = _jpeg(content, size, max_pixels)
    else:
        pixels, (height, width), orientation, deep = _other(content, background, max_pixels)
    side = min(height, width)
    if side < min_side:
        raise ImageTooSmallError(f"{width} x {height} pixels")
    pixels = _resize(pixels, height, width, size, max_pixels)
    swap, flip_y, flip_x = UPRIGHT.get(orientation, (False, False, False))
    if swap:
        pixels = pixels.transpose(0, 2, 1)
    pixels = pixels[:, :: -1 if flip_y else 1, :: -1 if flip_x else 1]
    if crop == "center":
        top, left = ((side - size) // 2 for side in pixels.shape[1:])
        pixels = pixels[:, top : top + size, left : left + size]
    return Decoded(np.ascontiguousarray(pixels), side, deep)


def read(path: str | os.PathLike[str], *, most: int = 16 * MAX_PIXELS) -> bytes:
    """The bytes of a regular file of at most ``most`` bytes; pipes, sockets and devices are never
    opened.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError("not a regular file")
        if status.st_size > most:
            raise BadImageError(
                f"{status.st_size / 1e6:,.0f} MB is over the limit of {most / 1e6:,.0f} MB"
            )
        # non-blocking: between stat and open the file may have become a pipe, which would hang
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read()
    except OSError as error:
        reasons = {
            errno.ENOENT: "dangling link" if os.path.islink(path) else "no such file",
            errno.EACCES: "permission denied",
            errno.EPERM: "permission denied",
            errno.ELOOP: "link to itself",
        }
        if (
            error.errno not in reasons
        ):  # the machine's fault; a failing read does not tell of which file
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise BadImageError(reasons[error.errno]) from None


class Opened(NamedTuple):
    pixels: np.ndarray  # (h, w, 3), uint8
    shape: tuple[int, int]  # (h, w) of the file
    orientation: int  # of EXIF
    deep: bool


def _jpeg(content: bytes, size: int, max_pixels: int) -> Opened:
    try:
        pixels, shape = _strict(content, size, max_pixels)
    except ValueError as error:
        try:
            pixels, shape = _strict(mend_jpeg(content), size, max_pixels)
        except ValueError:
            raise BadImageError(_reason(error)) from None
    orientation = 1
    if b"Exif\0" in content or b"tiff:Orientation" in content:
        with QUIET, contextlib.suppress(Exception):
            orientation = _orientation(JpegImageFile(io.BytesIO(content)))
    return Opened(pixels, shape, orientation, deep=False)


def _strict(content: bytes, size: int, max_pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode a JPEG of which libjpeg says nothing at all; raise ``ValueError`` with its first
    warning otherwise.
    """
    height, width, space, _ = simplejpeg.decode_jpeg_header(content)
    _allow(height, width, max_pixels)
    space = "CMYK" if space in ("CMYK", "YCCK") else "RGB"
    # decoded at n/8 of its size where that leaves the short side at least twice the target
    pixels = simplejpeg.decode_jpeg(content, space, min_height=2 * size, min_width=2 * size)
    if space == "CMYK":
        pixels = from_cmyk(pixels if ADOBE in content else 255 - pixels)
    return pixels, (height, width)


def _other(content: bytes, background: RGB, max_pixels: int) -> Opened:
    opener = opener_of(content)
    if opener is None:
        raise BadImageError(what_else(content))
    with QUIET:
        try:
            return _pillow(opener, content, background, max_pixels)
        except BadImageError as broken:
            if opener is not PngImageFile or (mended := mend_png(content)) == content:
                raise
            try:
                return _pillow(opener, mended, background, max_pixels)
            except BadImageError:
                raise broken from None


def _pillow(opener: Opener, content: bytes, background: RGB, max_pixels: int) -> Opened:
    try:
        image = opener(io.BytesIO(content))
        _allow(image.height, image.width, max_pixels)
        opener(io.BytesIO(content)).verify()  # the checksums of a PNG, which load does not read
        image.load()
        orientation = _orientation(image)  # after load: a TIFF is upright by then
        pixels = from_pillow(image, background)
    except (BadImageError, MemoryError):
        raise
    except Image.DecompressionBombError:  # some plugins look at the size first
        raise BadImageError(f"over the limit of {max_pixels / 1e6:,.0f} megapixels") from None
    except Exception as error:  # Pillow's plugins raise a dozen types on damaged files
        raise BadImageError(_reason(error)) from None
    return Opened(pixels, pixels.shape[:2], orientation, is_deep(image))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none: damaged metadata say nothing, and the pixels are
    sound.
    """
    with contextlib.suppress(Exception):
        return int(image.getexif().get(ORIENTATION, 1))
    return 1


def _resize(pixels: np.ndarray, height: int, width: int, size: int, max_pixels: int) -> np.ndarray:
    """``(h, w, 3)`` to ``(3, h', w')``, the short side ``size``, in the proportions ``height :
    width``.
    """
    short = min(height, width)
    height, width = (
        (2 * side * size + short) // (2 * short) for side in (height, width)
    )  # the nearest pixel
    _allow(height, width, max_pixels, " after the resize")
    x = torch.from_numpy(pixels).permute(2, 0, 1)  # strides stay as they are: the fast layout
    if x.shape[1:] != (height, width):
        x = interpolate(x[None], size=(height, width), mode="bicubic", antialias=True)[0]
    return x.numpy()


def _allow(height: int, width: int, max_pixels: int, when: str = "") -> None:
    if height < 1 or width < 1:
        raise BadImageError("no pixels")
    if height * width > max_pixels:
        raise BadImageError(
            f"{height * width / 1e6:,.0f} megapixels{when} is over the limit of "
            f"{max_pixels / 1e6:,.0f}"
        )


def _reason(error: Exception) -> str:
    text = re.sub(r"^tj\w+\(\): ", "", " ".join(str(error).split()))
    if "truncated" in text.lower() or "premature end of jpeg" in text.lower():
        return "truncated"
    return f"corrupt ({text[:80] or type(error).__name__})"
