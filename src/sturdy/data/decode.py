"""One image file to pixels: decoded strictly, turned upright, on a background, resized with antialiasing.

    pixels = crop(upright(resize(composite(file))))

JPEG goes through simplejpeg, which refuses damaged data that Pillow would fill with grey; PNG, WebP, BMP, GIF
(the first frame) and TIFF go through Pillow. The resize is PyTorch's antialiased bicubic on uint8: the same
bits at any number of threads.
"""

import contextlib
import errno
import io
import os
import re
import stat
import threading
import warnings
from typing import Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch.nn.functional import interpolate

DECODER = 1  # raise it whenever a pixel changes: the keys of sources read it
LIMIT = 100_000_000  # pixels; a header that promises more is refused before anything is decoded

Crop = Literal["center", "random"]
Colour = tuple[int, int, int]

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


OPENERS: dict[re.Pattern[bytes], type[ImageFile]] = {
    re.compile(rb"\x89PNG\r\n\x1a\n"): PngImageFile,
    re.compile(rb"RIFF....WEBP", re.DOTALL): WebPImageFile,
    re.compile(rb"BM"): BmpImageFile,
    re.compile(rb"GIF8[79]a"): GifImageFile,
    re.compile(rb"II[*+]\0|MM\0[*+]"): TiffImageFile,
}
ADOBE = b"\xff\xee\x00\x0eAdobe"  # the marker in a JPEG
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


class Broken(Exception):
    """An image that cannot be used; the message is a short plain reason."""


class _Quiet:
    """Silences Pillow while any thread is inside: ``catch_warnings`` alone is not safe with threads."""

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


def decode(
    data: bytes | str | os.PathLike[str],
    *,
    size: int,
    crop: Crop = "center",
    background: Colour = (255, 255, 255),
    limit: int = LIMIT,
) -> np.ndarray:
    """Decode one image, uint8 ``(3, h, w)``, RGB; colour profiles are not applied.

    Of up to 16 bits a channel the high 8 are kept. Floats and 32-bit integers have no agreed white: it is the
    first of 1, 255 and 65535 that no pixel exceeds, else the brightest pixel; what is below 0 is black.

    Args:
        data: the file's content, or its path. The format is told from the content, never from the suffix.
        size: of the short side, in pixels; smaller images are scaled up.
        crop: ``"center"`` cuts to ``(3, size, size)``; ``"random"`` leaves the long side uncut.
        background: what shows through transparent pixels.
        limit: most pixels an image may have, before and after the resize.

    Raises:
        Broken: the file is damaged, too large, not an image, or not to be read.
        OSError, MemoryError: as they come, when the machine is at fault and not the file (a failing disk).
    """
    content = data if isinstance(data, bytes) else read(data, most=16 * limit)
    if not content:
        raise Broken("empty")
    if content.startswith(b"\xff\xd8\xff"):
        pixels, (height, width), orientation = _jpeg(content, size, limit)
    else:
        pixels, (height, width), orientation = _other(content, background, limit)
    pixels = _resize(pixels, height, width, size, limit)
    swap, flip_y, flip_x = UPRIGHT.get(orientation, (False, False, False))
    if swap:
        pixels = pixels.transpose(0, 2, 1)
    pixels = pixels[:, :: -1 if flip_y else 1, :: -1 if flip_x else 1]
    if crop == "center":
        top, left = ((side - size) // 2 for side in pixels.shape[1:])
        pixels = pixels[:, top : top + size, left : left + size]
    return np.ascontiguousarray(pixels)


def read(path: str | os.PathLike[str], *, most: int = 16 * LIMIT) -> bytes:
    """The bytes of a regular file of at most ``most`` bytes; pipes, sockets and devices are never opened."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Broken("not a regular file")
        if status.st_size > most:
            raise Broken(f"{status.st_size / 1e6:,.0f} MB is over the limit of {most / 1e6:,.0f} MB")
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
        if error.errno not in reasons:
            raise
        raise Broken(reasons[error.errno]) from None


Opened = tuple[np.ndarray, tuple[int, int], int]  # pixels (h, w, 3), (h, w) of the file, EXIF orientation


def _jpeg(content: bytes, size: int, limit: int) -> Opened:
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(content)
        _allow(height, width, limit)
        space = "CMYK" if space in ("CMYK", "YCCK") else "RGB"
        # decoded at n/8 of its size where that leaves the short side at least twice the target
        pixels = simplejpeg.decode_jpeg(content, space, min_height=2 * size, min_width=2 * size)
    except ValueError as error:
        raise Broken(_reason(error)) from None
    if space == "CMYK":
        # 255 is no ink where Adobe's marker is (as everybody writes it), full ink where it is not
        ink = pixels if ADOBE in content else 255 - pixels
        pixels = ((ink[..., :3].astype(np.uint16) * ink[..., 3:] + 127) // 255).astype(np.uint8)
    orientation = 1
    if b"Exif\0" in content or b"tiff:Orientation" in content:
        with QUIET, contextlib.suppress(Exception):  # damaged metadata say nothing, and the pixels are sound
            orientation = JpegImageFile(io.BytesIO(content)).getexif().get(ORIENTATION, 1)
    return pixels, (height, width), orientation


def _other(content: bytes, background: Colour, limit: int) -> Opened:
    opener = next((opener for magic, opener in OPENERS.items() if magic.match(content)), None)
    if opener is None:
        raise Broken("not a JPEG, PNG, WebP, BMP, GIF or TIFF image")
    with QUIET:
        try:
            image = opener(io.BytesIO(content))
            _allow(image.height, image.width, limit)
            opener(io.BytesIO(content)).verify()  # the checksums of a PNG, which load does not read
            image.load()
            orientation = image.getexif().get(ORIENTATION, 1)  # after load: a TIFF is upright by then
            pixels = _rgb(image, background)
        except (Broken, MemoryError):
            raise
        except Image.DecompressionBombError:  # some plugins look at the size first
            raise Broken(f"over the limit of {limit / 1e6:,.0f} megapixels") from None
        except Exception as error:  # Pillow's plugins raise a dozen types on damaged files
            raise Broken(_reason(error)) from None
    return pixels, pixels.shape[:2], orientation


def _rgb(image: Image.Image, background: Colour) -> np.ndarray:
    """Any of Pillow's modes to uint8 ``(h, w, 3)``."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.repeat(_grey(image)[..., None], 3, axis=-1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        base = Image.new("RGB", image.size, background)
        base.paste(image, mask=image.getchannel("A"))
        return np.array(base)
    try:
        return np.array(image.convert("RGB"))
    except ValueError:
        raise Broken(f"colour mode {image.mode} is not supported") from None


def _grey(image: Image.Image) -> np.ndarray:
    """More than 8 bits of grey to 8, ``(h, w)``."""
    values = np.array(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode.startswith("I;16"):
        grey = (values >> (tags.get(BITS_PER_SAMPLE, (16,))[0] - 8)).astype(np.uint8)
    else:
        brightest = values.max()
        if not np.isfinite(values).all():
            raise Broken("pixels that are not finite")
        white = next((w for w in (1, 255, 65535) if brightest <= w), brightest)
        grey = np.rint(values.clip(0) * np.float64(255 / white)).astype(np.uint8)
    return 255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey


def _resize(pixels: np.ndarray, height: int, width: int, size: int, limit: int) -> np.ndarray:
    """``(h, w, 3)`` to ``(3, h', w')``, the short side ``size``, in the proportions ``height : width``."""
    short = min(height, width)
    height, width = ((2 * side * size + short) // (2 * short) for side in (height, width))  # the nearest pixel
    _allow(height, width, limit, " after the resize")
    x = torch.from_numpy(pixels).permute(2, 0, 1)  # strides stay as they are: the fast layout
    if x.shape[1:] != (height, width):
        x = interpolate(x[None], size=(height, width), mode="bicubic", antialias=True)[0]
    return x.numpy()


def _allow(height: int, width: int, limit: int, when: str = "") -> None:
    if height < 1 or width < 1:
        raise Broken("no pixels")
    if height * width > limit:
        raise Broken(f"{height * width / 1e6:,.0f} megapixels{when} is over the limit of {limit / 1e6:,.0f}")


def _reason(error: Exception) -> str:
    text = re.sub(r"^tj\w+\(\): ", "", " ".join(str(error).split()))
    if "truncated" in text.lower() or "premature end of jpeg" in text.lower():
        return "truncated"
    return f"corrupt ({text[:80] or type(error).__name__})"
