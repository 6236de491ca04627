"""What a file is, told from how its content begins: what opens it, or what it is if it is no
image.
"""

import io
import re
from collections.abc import Callable
from importlib.util import find_spec

from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from sturdy.data.source import BadImageError

Opener = Callable[[io.BytesIO], ImageFile]
JPEG = b"\xff\xd8\xff"  # is not opened by Pillow

READS_HEIC = find_spec("pillow_heif") is not None
INSTALL_HEIC = "pip install 'sturdy-diffusion[heic]' reads"


def _open_heic(file: io.BytesIO) -> ImageFile:
    if not READS_HEIC:
        raise BadImageError(f"HEIC; {INSTALL_HEIC} it")
    from pillow_heif import HeifImageFile

    return HeifImageFile(file)


# how the content begins -> what opens it
OPENERS: dict[re.Pattern[bytes], Opener] = {
    re.compile(rb"\x89PNG\r\n\x1a\n"): PngImageFile,
    re.compile(rb"RIFF....WEBP", re.DOTALL): WebPImageFile,
    re.compile(rb"BM"): BmpImageFile,
    re.compile(rb"GIF8[79]a"): GifImageFile,
    re.compile(rb"II[*+]\0|MM\0[*+]"): TiffImageFile,
    re.compile(rb"....ftyp(avi[fs]|m[is]f1(....){1,8}?avi[fs])", re.DOTALL): AvifImageFile,
    re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"): Jpeg2KImageFile,
    re.compile(rb"....ftyp(hei[cmsx]|hev[cmsx]|m[is]f1)", re.DOTALL): _open_heic,
}
# what else lies under the name of an image
NO_IMAGES = {
    re.compile(
        rb"version https://git-lfs"
    ): "a Git LFS pointer, not the image: git lfs pull fetches it",
    re.compile(
        rb"\S*/annex/objects/"
    ): "a git-annex pointer, not the image: git annex get fetches it",
    re.compile(rb"\s*<(!doctype html|html|head|body)", re.IGNORECASE): "a web page, not an image",
    re.compile(
        rb"\s*(<\?xml.*)?<svg", re.IGNORECASE | re.DOTALL
    ): "an SVG drawing, which is not read",
    re.compile(rb"\s*[{\[<]"): "a text (JSON, XML), not an image",
    re.compile(rb"8BPS"): "a Photoshop file, which is not read",
    re.compile(rb"\0\0\x01\0"): "an icon (ICO), which is not read",
    re.compile(rb"%PDF"): "a PDF, not an image",
    re.compile(rb"\x1f\x8b|PK\x03\x04|Rar!|7z\xbc\xaf"): "a compressed archive: unpack it",
    re.compile(rb"\0\x05\x16\x07"): "metadata of macOS, not an image",
    re.compile(rb"....ftyp", re.DOTALL): "a video, not an image",
    re.compile(rb"\0{64}"): "zeros only, not an image",
}


def opener_of(content: bytes) -> Opener | None:
    """What opens a file with this content, ``None`` if it is no image that is read through
    Pillow.
    """
    return next((opener for magic, opener in OPENERS.items() if magic.match(content)), None)


def is_image(head: bytes) -> bool:
    """Whether a file whose content begins with ``head``, some 64 bytes, is an image of a format
    that is read.
    """
    return head.startswith(JPEG) or opener_of(head) is not None


def what_else(content: bytes) -> str:
    """What a file is that is no image, in a few words."""
    known = (what for magic, what in NO_IMAGES.items() if magic.match(content[:1024]))
    return next(known, "not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or JPEG 2000 image")
