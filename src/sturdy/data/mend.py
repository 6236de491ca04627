"""A JPEG or PNG whose pixels are whole, without the metadata that a strict decoder refuses.

Nothing is guessed: what is mended is decoded as strictly as any other file, so that damage of
    pixels stays an error.
"""

import re
import zlib

# zeros of a scan that nothing of the image is behind; a zero after 0xff belongs to that
PADDING = re.compile(rb"(?:(?<![\xff\0])|(?<=\xff\0))\0++(?=\xff[\xd0-\xd7\xd9])")
APP0, APP2, SCAN, SEQUENTIAL = 0xE0, 0xE2, 0xDA, (0xC0, 0xC1)  # markers

# chunks of a PNG that no pixel depends on
METADATA = frozenset(
    b"bKGD cHRM cICP cLLI eXIf gAMA hIST iCCP iTXt mDCV pHYs sBIT sPLT sRGB tEXt tIME zTXt".split()
)
XMP = b"XML:com.adobe.xmp\0\0"  # with what follows, an uncompressed text
IEND = b"\0\0\0\0IEND\xaeB`\x82"


def mend_jpeg(content: bytes) -> bytes:
    """Set the revision of JFIF to 1, leave colour profiles out, and take away zeros between the
    scan and what follows.

    Where such zeros stand in place of lost pixels the decoder misses data once they are gone, and
    says so. Other bytes there are left, for damage in the middle of a scan leaves them, too; and so
    are zeros where there are several scans, of which nobody misses one.
    """
    data, at, components = bytearray(content), 2, 0
    while at + 10 <= len(data) and data[at] == 0xFF and data[at + 1] != SCAN:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xFF:  # fills
            end = at + 1
        elif marker == APP0 and data[at + 4 : at + 9] == b"JFIF\0":
            data[at + 9] = 1
        elif marker == APP2 and data[at + 4 : at + 16] == b"ICC_PROFILE\0":
            del data[at:end]
            continue
        elif marker in SEQUENTIAL:
            components = data[at + 9]
        at = end
    head, scan = bytes(data[:at]), bytes(data[at:])
    return head + (PADDING.sub(b"", scan) if scan[4:5] == bytes([components]) else scan)


def mend_png(content: bytes) -> bytes:
    """Keep the chunks that pixels depend on and what tells the orientation; add an end where only
    that is missing.
    """
    kept, at, name = [content[:8]], 8, b""
    while at + 12 <= len(content) and name != b"IEND":
        end = at + 12 + int.from_bytes(content[at : at + 4])
        chunk, name = content[at:end], content[at + 4 : at + 8]
        if name not in METADATA or _orients(chunk):
            kept.append(chunk)
        at = end
    if at == len(content) and kept[-1][4:8] == b"IDAT":
        kept.append(IEND)
    return b"".join([*kept, content[at:]])


def _orients(chunk: bytes) -> bool:
    """Whether a chunk may tell the orientation, and is whole."""
    body = chunk[8:-4]
    tells = chunk[4:8] == b"eXIf" or (chunk[4:8] == b"iTXt" and body.startswith(XMP))
    return tells and zlib.crc32(chunk[4:-4]).to_bytes(4) == chunk[-4:]
