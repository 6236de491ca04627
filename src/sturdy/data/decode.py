"""One image file to pixels: decoded strictly, upright, on a background, resized with antialiasing.

    pixels  = crop(upright(resize(composite(file))))
    visible = alpha * pixel + (1 - alpha) * background        rgb = (1 - ink) * (1 - black)

JPEG goes through simplejpeg, which refuses damaged data that Pillow would fill with grey. PNG,
WebP, BMP, GIF (the first frame), TIFF, AVIF and JPEG 2000 go through Pillow, HEIC through
pillow-heif where that is installed. Damaged metadata do not make an image broken
(``formats.repair_jpeg``). The resize is PyTorch's antialiased bicubic on uint8, which gives the
same bits at any number of threads.

Colour profiles are not applied. Of 16 bits a channel the high 8 are kept. Floats and 32-bit
integers have no agreed white: it is the first of 1, 255 and 65535 that no pixel exceeds, or else
the brightest pixel. Values below 0 are black.
"""

import contextlib
import errno
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from torch.nn.functional import interpolate

from sturdy.data.buckets import Size, nearest_bucket
from sturdy.data.formats import (
    JPEG,
    Opener,
    describe_other_file,
    find_opener,
    repair_jpeg,
    repair_png,
)
from sturdy.data.source import BadImageError, ImageTooSmallError, check_file_size

DECODER = 1  # raise it whenever a pixel changes: the keys of sources contain it
MAX_PIXELS = 100_000_000  # an image with more is refused before anything is decoded

Crop = Literal["center", "random"]
RGB = tuple[int, int, int]

ORIENTATION = 0x0112  # a tag of EXIF
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
ADOBE = b"\xff\xee\x00\x0eAdobe"  # a JPEG with this marker has CMYK in which 255 is no ink
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value


class DecodedFile(NamedTuple):
    """The pixels of an image file, and what is reported of it."""

    pixels: np.ndarray  # uint8 (3, h, w)
    height: int  # of the file, upright, in pixels
    width: int
    is_deep: bool  # whether the file has more than 8 bits of grey
    is_scaled_up: bool
    cut: float  # the share of the resized image that was cut off


class _RawImage(NamedTuple):
    """An image as it is in its file, before it is resized and turned."""

    pixels: np.ndarray  # uint8 (h, w, 3); a large JPEG is already smaller than its file says
    height: int
    width: int
    orientation: int = 1  # of EXIF
    is_deep: bool = False


def decode(
    data: bytes | str | os.PathLike[str],
    *,
    size: int,
    crop: Crop = "center",
    background: RGB = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    min_side: int = 0,
    buckets: Sequence[Size] = (),
) -> np.ndarray:
    """Decode one image to RGB, uint8 ``(3, h, w)``.

    Args:
        data: the content of the file, or its path.
        size: of the short side, in pixels; smaller images are scaled up.
        crop: ``"center"`` cuts to ``(3, size, size)``; ``"random"`` leaves the long side uncut.
        background: the colour behind transparent pixels.
        max_pixels: most pixels an image may have, before and after the resize.
        min_side: fewest pixels that the short side of the file may have.
        buckets: heights and widths. In place of ``(size, size)``, the one whose ratio is nearest
            to that of the image is covered by it.

    Raises:
        BadImageError: the file is damaged, too large, not an image, or cannot be read.
        ImageTooSmallError: its short side is below ``min_side``.
        OSError: the machine failed, not the file (a failing disk).
        MemoryError: there is not enough memory.
    """
    return decode_file(data, size, crop, background, max_pixels, min_side, buckets).pixels


def decode_file(
    data: bytes | str | os.PathLike[str],
    size: int,
    crop: Crop,
    background: RGB,
    max_pixels: int,
    min_side: int = 0,
    buckets: Sequence[Size] = (),
) -> DecodedFile:
    """Decode one image and describe its file; arguments and errors as of ``decode``."""
    content = data if isinstance(data, bytes) else read_file(data, max_bytes(max_pixels))
    if not content:
        raise BadImageError("empty")
    if content.startswith(JPEG):
        largest = max(max(bucket) for bucket in [*buckets, (size, size)])
        raw = _decode_jpeg(content, largest, max_pixels)
    else:
        raw = _decode_other(content, background, max_pixels)
    if min(raw.height, raw.width) < min_side:
        raise ImageTooSmallError(f"{raw.width} x {raw.height} pixels")
    swap, flip_y, flip_x = UPRIGHT.get(raw.orientation, (False, False, False))
    height, width = (raw.width, raw.height) if swap else (raw.height, raw.width)
    target = nearest_bucket(height, width, buckets) if buckets else (size, size)
    pixels = _resize(raw, target[::-1] if swap else target, max_pixels)
    if swap:
        pixels = pixels.transpose(0, 2, 1)
    pixels = pixels[:, :: -1 if flip_y else 1, :: -1 if flip_x else 1]
    _, resized_height, resized_width = pixels.shape
    if crop == "center":
        top = (resized_height - target[0]) // 2
        left = (resized_width - target[1]) // 2
        pixels = pixels[:, top : top + target[0], left : left + target[1]]
    return DecodedFile(
        np.ascontiguousarray(pixels),
        height,
        width,
        raw.is_deep,
        is_scaled_up=resized_height > height or resized_width > width,
        cut=1 - pixels[0].size / (resized_height * resized_width),
    )


def max_bytes(max_pixels: int) -> int:
    """Return the largest size of a file whose image may have ``max_pixels`` pixels."""
    return 16 * max(max_pixels, MAX_PIXELS)


def read_file(path: bytes | str | os.PathLike[str], limit: int) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    Pipes, sockets and devices are never opened.

    Raises:
        BadImageError: the file is missing, too large, no regular file, or may not be read.
        OSError: the disk failed.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError("not a regular file")
        check_file_size(status.st_size, limit)
        # Non-blocking, because the file may have become a pipe since ``stat``.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read()
    except OSError as error:
        reasons = {
            errno.ENOENT: "dangling link" if os.path.islink(path) else "no such file",
            errno.EACCES: "permission denied",
            errno.EPERM: "permission denied",
            errno.ELOOP: "link to itself",
        }
        if error.errno not in reasons:  # a failing ``read`` does not name the file
            raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error
        raise BadImageError(reasons[error.errno]) from None


def _decode_jpeg(content: bytes, size: int, max_pixels: int) -> _RawImage:
    try:
        raw = _decode_jpeg_strictly(content, size, max_pixels)
    except ValueError as error:
        try:
            raw = _decode_jpeg_strictly(repair_jpeg(content), size, max_pixels)
        except ValueError:
            raise BadImageError(_reason(error)) from None
    if b"Exif\0" in content or b"tiff:Orientation" in content:
        with SILENT_PILLOW, contextlib.suppress(Exception):
            return raw._replace(orientation=_orientation(JpegImageFile(io.BytesIO(content))))
    return raw


def _decode_jpeg_strictly(content: bytes, size: int, max_pixels: int) -> _RawImage:
    """Decode a JPEG; raise ``ValueError`` with the first warning of libjpeg if there is any."""
    height, width, space, _ = simplejpeg.decode_jpeg_header(content)
    _check_pixels(height, width, max_pixels)
    space = "CMYK" if space in ("CMYK", "YCCK") else "RGB"
    # Decoded at n/8 of its size where the short side stays at least twice ``size``.
    pixels = simplejpeg.decode_jpeg(content, space, min_height=2 * size, min_width=2 * size)
    if space == "CMYK":
        pixels = _cmyk_to_rgb(pixels if ADOBE in content else 255 - pixels)
    return _RawImage(pixels, height, width)


def _decode_other(content: bytes, background: RGB, max_pixels: int) -> _RawImage:
    opener = find_opener(content)
    if opener is None:
        raise BadImageError(describe_other_file(content))
    with SILENT_PILLOW:
        try:
            return _decode_with_pillow(opener, content, background, max_pixels)
        except BadImageError as error:
            if opener is not PngImageFile or (repaired := repair_png(content)) == content:
                raise
            try:
                return _decode_with_pillow(opener, repaired, background, max_pixels)
            except BadImageError:
                raise error from None


def _decode_with_pillow(
    opener: Opener, content: bytes, background: RGB, max_pixels: int
) -> _RawImage:
    try:
        image = opener(io.BytesIO(content))
        _check_pixels(image.height, image.width, max_pixels)
        opener(io.BytesIO(content)).verify()  # the checksums of a PNG, which ``load`` ignores
        image.load()
        orientation = _orientation(image)  # after ``load``, which turns a TIFF
        pixels = _to_rgb(image, background)
    except (BadImageError, MemoryError):
        raise
    except Image.DecompressionBombError:  # some plugins check the size first
        raise BadImageError(f"over the limit of {max_pixels / 1e6:,.0f} megapixels") from None
    except Exception as error:  # Pillow's plugins raise many types on damaged files
        raise BadImageError(_reason(error)) from None
    height, width = pixels.shape[:2]
    return _RawImage(pixels, height, width, orientation, _is_deep(image))


def _orientation(image: Image.Image) -> int:
    """Return the orientation in EXIF; 1 where there is none, or where it is damaged."""
    with contextlib.suppress(Exception):
        return int(image.getexif().get(ORIENTATION, 1))
    return 1


def _resize(raw: _RawImage, target: Size, max_pixels: int) -> np.ndarray:
    """Resize to ``(3, h, w)`` that just covers ``target``, in the proportions of the file."""
    height, width = map(int, resized_shape(raw.height, raw.width, target))
    _check_pixels(height, width, max_pixels, " after the resize")
    x = torch.from_numpy(raw.pixels).permute(2, 0, 1)  # a view, which is the fast memory format
    if x.shape[1:] != (height, width):
        x = interpolate(x[None], size=(height, width), mode="bicubic", antialias=True)[0]
    return x.numpy()


def resized_shape(height: Any, width: Any, target: Size) -> tuple[Any, Any]:
    """Return the height and width that just cover ``target``, in the proportions of those given.

    One of them is that of ``target``, the other is rounded to the nearest pixel. Arrays are taken,
    too.
    """
    top, left = target
    is_wide = top * width >= left * height
    covering_width = np.where(is_wide, (2 * width * top + height) // (2 * height), left)
    covering_height = np.where(is_wide, top, (2 * height * left + width) // (2 * width))
    return covering_height, covering_width


def _check_pixels(height: int, width: int, max_pixels: int, when: str = "") -> None:
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


# --- Any kind of pixel to 8-bit RGB


def _cmyk_to_rgb(cmyk: np.ndarray) -> np.ndarray:
    """Convert uint8 ``(h, w, 4) -> (h, w, 3)``; 255 is no ink."""
    colour = cmyk[..., :3].astype(np.uint16)
    black = cmyk[..., 3:]
    return ((colour * black + 127) // 255).astype(np.uint8)


def _to_rgb(image: Image.Image, background: RGB) -> np.ndarray:
    """Convert an image of any mode of Pillow to uint8 ``(h, w, 3)``."""
    if _is_deep(image):
        return np.repeat(_to_8_bits(image)[..., None], 3, axis=-1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(image, mask=image.getchannel("A"))
        return np.array(canvas)
    try:
        return np.array(image.convert("RGB"))
    except ValueError:
        raise BadImageError(f"colour mode {image.mode} is not supported") from None


def _is_deep(image: Image.Image) -> bool:
    """Return whether the image has more than 8 bits of grey."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _to_8_bits(image: Image.Image) -> np.ndarray:
    """Convert more than 8 bits of grey to uint8 ``(h, w)``."""
    values = np.array(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode.startswith("I;16"):
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
        grey = (values >> (bits - 8)).astype(np.uint8)
    else:
        if not np.isfinite(values).all():
            raise BadImageError("pixels that are not finite")
        brightest = values.max()
        white = next((w for w in (1, 255, 65535) if brightest <= w), brightest)
        grey = np.rint(values.clip(0) * np.float64(255 / white)).astype(np.uint8)
    return 255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey


class _SilentPillow:
    """Silences the warnings of Pillow while any thread is inside.

    ``warnings.catch_warnings`` alone is not safe with threads.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads_inside = 0

    def __enter__(self) -> None:
        with self.lock:
            if self.threads_inside == 0:
                self.caught = warnings.catch_warnings()
                self.caught.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self.threads_inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.threads_inside -= 1
            if self.threads_inside == 0:
                self.caught.__exit__(None, None, None)


SILENT_PILLOW = _SilentPillow()
