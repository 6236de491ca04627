"""Metadata that a strict decoder refuses do not make an image broken; lost or damaged pixels do."""

import random
import struct
import zlib

import numpy as np
import pytest
from image_files import encode, quarters
from PIL import Image

from sturdy.data.decode import decode
from sturdy.data.formats import repair_jpeg, repair_png
from sturdy.data.source import BadImageError


def photo(seed=0):
    low = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(low).resize((160, 120), Image.Resampling.BICUBIC)


def chunk(kind, body, spoilt=False):
    return (
        struct.pack(">I", len(body))
        + kind
        + body
        + struct.pack(">I", zlib.crc32(kind + body) ^ spoilt)
    )


def equal(data, other):
    return np.array_equal(
        decode(data, size=40, crop="random"), decode(other, size=40, crop="random")
    )


JPEG = encode(photo(), "JPEG")
RESTARTS = encode(photo(), "JPEG", restart_marker_rows=1)
PROGRESSIVE = encode(photo(), "JPEG", progressive=True)
PNG = encode(photo(), "PNG")
HEAD, REST = PNG[:33], PNG[33:]
TEXT = zlib.compress(b"a" * 3_000_000)
TURNED = Image.Exif()
TURNED[0x0112] = 6


def odd_revision(data):
    at = data.index(b"JFIF\0") + 5
    return data[:at] + b"\0\0" + data[at + 2 :]


ODD_JPEGS = {
    "zeros before the end": JPEG[:-2] + bytes(7) + JPEG[-2:],
    "many zeros before the end": JPEG[:-2] + bytes(5000) + JPEG[-2:],
    "revision 0.00": odd_revision(JPEG),
    "both": odd_revision(JPEG[:-2] + bytes(7) + JPEG[-2:]),
    "a profile in pieces": JPEG[:2] + b"\xff\xe2\0\x12ICC_PROFILE\0\x05\x03ab" + JPEG[2:],
    "fills between markers": JPEG[:2] + b"\xff\xff" + odd_revision(JPEG)[2:],
}


@pytest.mark.parametrize("what", ODD_JPEGS)
def test_a_jpeg_with_odd_metadata_is_read(what):
    assert equal(ODD_JPEGS[what], JPEG)


def test_other_kinds_of_jpeg_are_mended_too():
    for whole in (RESTARTS, PROGRESSIVE):
        assert equal(odd_revision(whole), whole)
    at = RESTARTS.index(b"\xff\xd3")
    assert equal(RESTARTS[:at] + bytes(9) + RESTARTS[at:], RESTARTS)
    turned = encode(quarters(), "JPEG", exif=TURNED)
    assert equal(turned[:-2] + bytes(7) + turned[-2:], turned)
    assert not equal(turned, encode(quarters(), "JPEG"))  # the control: the orientation shows


def test_zeros_in_place_of_pixels_are_refused():
    """The end of a download that broke off is often zeros, and so is a block that a disk lost."""
    for whole in (JPEG, RESTARTS):
        for at in range(whole.index(b"\xff\xda") + 14, len(whole) - 20, 7):
            with pytest.raises(BadImageError):
                decode(whole[:at] + bytes(len(whole) - at - 2) + whole[-2:], size=40)
            with pytest.raises(BadImageError):
                decode(odd_revision(whole)[:at] + bytes(5) + whole[-2:], size=40)
    for at in range(
        PROGRESSIVE.index(b"\xff\xda") + 14, len(PROGRESSIVE), 7
    ):  # a scan less is not noticed
        zeros = PROGRESSIVE[:at] + bytes(99) + PROGRESSIVE[-2:]
        assert repair_jpeg(zeros) == zeros


def test_what_is_mended_is_judged_as_strictly_as_without_the_odd_metadata():
    """A damaged file is accepted with zeros at its end and an odd revision if and only if it is
    without them.
    """

    def accepted(data):
        try:
            decode(data, size=40)
        except BadImageError:
            return False
        return True

    chance, outcomes = random.Random(0), []
    for k in range(300):
        whole = (JPEG, RESTARTS)[k % 2]
        damaged = bytearray(whole)
        at = chance.randrange(whole.index(b"\xff\xda") + 14, len(whole) - 12)
        damaged[at : at + chance.randrange(1, 9)] = chance.randbytes(chance.randrange(0, 9))
        plain = accepted(bytes(damaged))
        assert accepted(odd_revision(bytes(damaged[:-2]) + bytes(7) + b"\xff\xd9")) == plain
        outcomes.append(plain)
    assert 0 < sum(outcomes) < 300  # some damage is not to be noticed: JPEG has no checksum


def test_bytes_that_are_left_over_are_refused():
    with pytest.raises(BadImageError, match="extraneous"):
        decode(JPEG[:-2] + b"\x12\x34\x56\x78\x9a\xbc\xde" + JPEG[-2:], size=40)


ODD_PNGS = {
    "text with a bad checksum": HEAD + chunk(b"tEXt", b"Comment\0hello", spoilt=True) + REST,
    "a large compressed text": HEAD + chunk(b"zTXt", b"parameters\0\0" + TEXT) + REST,
    "a large international text": HEAD + chunk(b"iTXt", b"workflow\0\1\0\0\0" + TEXT) + REST,
    "a length that is no physical size": HEAD + chunk(b"pHYs", b"\0\0\0") + REST,
    "EXIF with a bad checksum": HEAD + chunk(b"eXIf", TURNED.tobytes()[6:], spoilt=True) + REST,
    "EXIF of noise": HEAD + chunk(b"eXIf", b"II*\0\xff\xff\xff\xff") + REST,
    "no end": PNG[:-12],
}


@pytest.mark.parametrize("what", ODD_PNGS)
def test_a_png_with_odd_metadata_is_read(what):
    assert equal(ODD_PNGS[what], PNG)


def test_a_png_keeps_what_turns_it_and_what_colours_it():
    large = chunk(b"zTXt", b"parameters\0\0" + TEXT)
    exif = encode(quarters(), "PNG", exif=TURNED)
    assert equal(exif[:33] + large + exif[33:], exif)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'
    whole = encode(quarters(), "PNG")
    turned = whole[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp) + whole[33:]
    assert equal(turned[:33] + large + turned[33:], turned)
    assert not equal(turned, whole)  # the control
    palette = encode(quarters().quantize(4), "PNG", transparency=b"\0\xff\xff\xff")
    assert equal(palette[:33] + large + palette[33:], palette)
    at = palette.index(b"tRNS") - 4
    spoilt = palette[:at] + chunk(b"tRNS", b"\0\xff\xff\xff", spoilt=True) + palette[at + 16 :]
    assert len(spoilt) == len(palette)
    with pytest.raises(BadImageError):  # pixels depend on it
        decode(spoilt, size=40)


def test_damaged_pixels_of_a_png_are_refused_whatever_its_metadata():
    large = chunk(b"zTXt", b"parameters\0\0" + TEXT)
    parts = b"".join(
        chunk(b"IDAT", zlib.compress(np.asarray(photo()).tobytes())[at : at + 500])
        for at in (0, 500)
    )
    for damaged in (
        PNG[: len(PNG) // 2],
        PNG[:-14],
        HEAD + parts,  # cut where a chunk ends
        HEAD + large + REST[:-30] + bytes([REST[-30] ^ 255]) + REST[-29:],
        HEAD + large + REST[: len(REST) // 2],
    ):
        with pytest.raises(BadImageError):
            decode(damaged, size=40)


def test_whole_files_are_left_alone():
    for whole in (JPEG, RESTARTS, PROGRESSIVE, encode(photo().convert("CMYK"), "JPEG")):
        assert repair_jpeg(whole) == whole
    assert repair_png(PNG) == PNG


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\xff\xff", b"\xff\xd8" + b"\xff" * 99]
)
def test_nothing_is_read_beyond_the_end(data):
    repair_jpeg(data)
    repair_png(b"\x89PNG\r\n\x1a\n" + data)
