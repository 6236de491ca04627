"""The formats of image files, and the repair of their metadata.

The format is found from the content, never from the suffix.
"""

import io
import re
import zlib
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

READS_HEIC = find_spec("pillow_heif") is not None
INSTALL_HEIC = "pip install 'sturdy-diffusion[heic]' reads"
HEAD = 64  # bytes that are enough to recognise an image


def _open_heic(file: io.BytesIO) -> ImageFile:
    if not READS_HEIC:
        raise BadImageError(f"HEIC; {INSTALL_HEIC} it")
    from pillow_heif import HeifImageFile

    return HeifImageFile(file)


JPEG = b"\xff\xd8\xff"  # the first bytes of a format that Pillow does not open here

# the first bytes of a format -> the function that opens it
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
# the first bytes of other files -> what to tell the user
OTHER_FILES = {
    rb"version https://git-lfs": "a Git LFS pointer, not the image: git lfs pull fetches it",
    rb"\S*/annex/objects/": "a git-annex pointer, not the image: git annex get fetches it",
    rb"(?i)\s*<(!doctype html|html|head|body)": "a web page, not an image",
    rb"(?is)\s*(<\?xml.*)?<svg": "an SVG drawing, which is not read",
    rb"\s*[{\[<]": "a text (JSON, XML), not an image",
    rb"8BPS": "a Photoshop file, which is not read",
    rb"\0\0\x01\0": "an icon (ICO), which is not read",
    rb"%PDF": "a PDF, not an image",
    rb"\x1f\x8b|PK\x03\x04|Rar!|7z\xbc\xaf": "a compressed archive: unpack it",
    rb"\0\x05\x16\x07": "metadata of macOS, not an image",
    rb"(?s)....ftyp": "a video, not an image",
    rb"\0{64}": "zeros only, not an image",
}


def find_opener(content: bytes) -> Opener | None:
    """Return the function that opens a file with this content, or None if Pillow reads no such."""
    return next((opener for start, opener in OPENERS.items() if start.match(content)), None)


def is_image(head: bytes) -> bool:
    """Return whether ``head``, the first ``HEAD`` bytes of a file, begins an image that is read."""
    return head.startswith(JPEG) or find_opener(head) is not None


def describe_other_file(content: bytes) -> str:
    """Say in a few words what a file is that is no image."""
    matches = (text for start, text in OTHER_FILES.items() if re.match(start, content[:1024]))
    return next(matches, "not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or JPEG 2000 image")


# --- Repair. A strict decoder refuses some files because of their metadata. They are removed, and
# the pixels are decoded as strictly as before: damaged pixels stay an error, and none is guessed.

# Zeros at the end of a scan, which belong to no pixel. A zero after 0xff belongs to that byte.
PADDING = re.compile(rb"(?:(?<![\xff\0])|(?<=\xff\0))\0++(?=\xff[\xd0-\xd7\xd9])")
APP0, APP2, START_OF_SCAN, SEQUENTIAL = 0xE0, 0xE2, 0xDA, (0xC0, 0xC1)  # markers of JPEG
# chunks of a PNG that no pixel depends on
METADATA = frozenset(
    b"bKGD cHRM cICP cLLI eXIf gAMA hIST iCCP iTXt mDCV pHYs sBIT sPLT sRGB tEXt tIME zTXt".split()
)
XMP = b"XML:com.adobe.xmp\0\0"  # begins a text chunk with XMP metadata, not compressed
IEND = b"\0\0\0\0IEND\xaeB`\x82"


def repair_jpeg(content: bytes) -> bytes:
    """Set the revision of JFIF to 1, remove colour profiles, and remove zeros after the scan.

    Where zeros stand in place of lost pixels, the decoder misses data after their removal and says
    so. Other bytes stay, because damage in the middle of a scan leaves such bytes, too. With
    several scans the zeros stay, because the decoder would not notice a missing scan.
    """
    data = bytearray(content)
    at = 2
    components = 0
    while at + 10 <= len(data) and data[at] == 0xFF and data[at + 1] != START_OF_SCAN:
        marker = data[at + 1]
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xFF:  # a fill byte
            end = at + 1
        elif marker == APP0 and data[at + 4 : at + 9] == b"JFIF\0":
            data[at + 9] = 1
        elif marker == APP2 and data[at + 4 : at + 16] == b"ICC_PROFILE\0":
            del data[at:end]
            continue
        elif marker in SEQUENTIAL:
            components = data[at + 9]
        at = end
    header = bytes(data[:at])
    scan = bytes(data[at:])
    only_scan = scan[4:5] == bytes([components])
    return header + (PADDING.sub(b"", scan) if only_scan else scan)


def repair_png(content: bytes) -> bytes:
    """Keep the chunks with pixels and orientation, and add the end where only it is missing."""
    chunks = [content[:8]]
    at = 8
    name = b""
    while at + 12 <= len(content) and name != b"IEND":
        end = at + 12 + int.from_bytes(content[at : at + 4])
        chunk = content[at:end]
        name = chunk[4:8]
        if name not in METADATA or _is_intact_orientation(chunk):
            chunks.append(chunk)
        at = end
    if at == len(content) and chunks[-1][4:8] == b"IDAT":
        chunks.append(IEND)
    return b"".join([*chunks, content[at:]])


def _is_intact_orientation(chunk: bytes) -> bool:
    name = chunk[4:8]
    body = chunk[8:-4]
    has_orientation = name == b"eXIf" or (name == b"iTXt" and body.startswith(XMP))
    return has_orientation and zlib.crc32(chunk[4:-4]).to_bytes(4) == chunk[-4:]
