"""Files of every format, whole and broken, against Pillow and hand-made bytes."""

import io
import os
import signal
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_files import COLOURS, corners, encode, near, png, quarters
from PIL import Image, ImageOps

from sturdy.data.decode import UPRIGHT, decode
from sturdy.data.formats import READS_HEIC
from sturdy.data.source import BadImageError


def jpeg_with_size(height, width):
    data = bytearray(encode(quarters(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


# --- formats and colours


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}, 4),
        ("JPEG", {"quality": 95, "progressive": True, "subsampling": 0}, 4),
        ("PNG", {}, 0),
        ("PNG", {"interlace": 1}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 8),
        ("BMP", {}, 0),
        ("GIF", {}, 2),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("AVIF", {"quality": 95}, 8),
        ("JPEG2000", {}, 0),
        ("JPEG2000", {"no_jp2": True}, 0),
    ],
)
def test_every_format(format, options, tolerance):
    data = encode(quarters(), format, **options)
    assert near(corners(decode(data, size=40, crop="random")), COLOURS, tolerance)
    assert near(corners(decode(data, size=20, crop="center")), COLOURS, tolerance + 1)


def test_only_the_first_frame():
    frames = [Image.new("RGB", (50, 50), colour) for colour in COLOURS]
    for format in ("GIF", "WEBP", "TIFF", "AVIF"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:])
        assert near(decode(data, size=8)[:, 4, 4], COLOURS[0], 4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(
        quarters(40, 64), format, exif=exif, **({"quality": 95} if format == "JPEG" else {})
    )
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image).convert("RGB")
    found = decode(data, size=20, crop="random")
    assert found.shape == (3, 20, 32) if orientation < 5 else found.shape == (3, 32, 20)
    assert near(found, decode(encode(upright, "PNG"), size=20, crop="random"), 4)
    assert near(decode(data, size=20), decode(encode(upright, "PNG"), size=20), 4)
    if orientation > 1:  # the control: the quarters tell the turns apart
        assert not near(corners(found), COLOURS, 50)
    assert set(UPRIGHT) == set(range(2, 9))


def test_heic():
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    heif.from_pillow(quarters()).save(file, quality=95)
    data = file.getvalue()
    assert near(corners(decode(data, size=40, crop="random")), COLOURS, 8)
    with pytest.raises(BadImageError):
        decode(data[: int(0.6 * len(data))], size=40)


HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(100)


@pytest.mark.skipif(READS_HEIC, reason="here HEIC is read")
def test_heic_names_what_reads_it():
    with pytest.raises(
        BadImageError, match=r"^HEIC; pip install 'sturdy-diffusion\[heic\]' reads it$"
    ):
        decode(HEIC, size=40)


def test_a_heif_container_of_avif_is_avif():
    data = encode(quarters(), "AVIF", quality=95)
    assert data[4:12] == b"ftypavif"
    assert near(
        corners(decode(data[:8] + b"mif1" + data[12:], size=40)), corners(decode(data, size=40)), 0
    )


# --- sizes


@pytest.mark.parametrize(("height", "width"), [(1200, 1600), (300, 400), (90, 120)])
def test_resize_agrees_with_pillow(height, width):
    low = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    photo = Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)
    expected = np.array(photo.resize((80, 60), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert near(decode(encode(photo, "PNG"), size=60, crop="random"), expected, 2)
    # decoded at a fraction of its size by the JPEG decoder, it is still the same picture
    assert near(
        decode(encode(photo, "JPEG", quality=98, subsampling=0), size=60, crop="random"),
        expected,
        6,
    )


def test_sizes():
    def shape(height, width, **options):
        return decode(encode(Image.new("RGB", (width, height)), "JPEG"), **options).shape

    assert shape(100, 333, size=64, crop="random") == (3, 64, 213)
    assert shape(333, 100, size=64, crop="random") == (3, 213, 64)
    assert shape(999, 3001, size=64, crop="random") == (
        3,
        64,
        192,
    )  # the file's proportions, not the draft's
    assert shape(5, 7, size=64) == (3, 64, 64)
    assert shape(64, 64, size=64) == (3, 64, 64)


def test_the_crop_is_in_the_middle():
    ramp = np.repeat(np.arange(90, dtype=np.uint8)[None], 30, axis=0)
    assert np.array_equal(decode(encode(Image.fromarray(ramp), "PNG"), size=30)[0], ramp[:, 30:60])


# --- broken files


def test_damage_inside_a_jpeg_is_noticed():
    noise = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    )
    data = bytearray(encode(noise, "JPEG"))
    data[len(data) // 2 : len(data) // 2 + 500] = bytes(500)
    Image.open(io.BytesIO(data)).load()  # the control: Pillow takes it
    with pytest.raises(BadImageError, match="corrupt"):
        decode(bytes(data), size=64)


def test_every_changed_byte_of_a_png_is_noticed():
    data, rng = encode(quarters(), "PNG"), np.random.default_rng(0)
    for at in range(16, len(data) - 12):
        changed = bytearray(data)
        changed[at] ^= int(rng.integers(1, 256))
        with pytest.raises(BadImageError):
            decode(bytes(changed), size=20)


@pytest.mark.parametrize(
    "format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000"]
)
def test_cut_short(format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, format)
    for share in (0.05, 0.3, 0.6, 0.95):
        with pytest.raises(BadImageError, match=r"truncated|corrupt"):
            decode(data[: int(share * len(data))], size=32)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "^empty$"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "^a Git LFS pointer, .* git lfs pull fetches it",
        ),
        (b"../.git/annex/objects/a/b", "^a git-annex pointer"),
        (b"\n<!DOCTYPE html><html>403</html>", "^a web page, not an image$"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "^an SVG drawing"),
        (b'{"error": "not found"}', "^a text"),
        (b"\x1f\x8b\x08", "^a compressed archive"),
        (b"\0\0\0\x18ftypmp42" + bytes(99), "^a video"),
        (b"\0\x05\x16\x07" + bytes(99), "^metadata of macOS"),
        (bytes(4096), "^zeros only"),
        (b"8BPS\0\1", "^a Photoshop file"),
        (
            b"not an image, whatever its name",
            "^not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or JPEG 2000 image$",
        ),
        (png(20_000, 20_000, 8, 2), "^400 megapixels is over the limit of 100$"),
        (jpeg_with_size(20_000, 20_000), "^400 megapixels is over the limit of 100$"),
        (b"GIF89a" + struct.pack("<HH", 20_000, 20_000) + bytes(30), "400 megapixels|corrupt"),
        (
            encode(Image.new("L", (1, 30_000)), "PNG"),
            "^123 megapixels after the resize is over the limit of 100$",
        ),
    ],
)
def test_reasons(data, reason):
    with pytest.raises(BadImageError, match=reason):
        decode(data, size=64, crop="random")


def test_the_limit_is_exact():
    data = encode(quarters(40, 60), "PNG")
    assert decode(data, size=8, max_pixels=2400).shape == (3, 8, 8)
    with pytest.raises(BadImageError, match="limit"):
        decode(data, size=8, max_pixels=2399)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "huge.jpg").write_bytes(b"")
    os.truncate(tmp_path / "huge.jpg", 10**10)
    signal.alarm(20)  # opening the pipe would wait for ever
    for name, reason in {
        "pipe.jpg": "not a regular file",
        "folder.jpg": "not a regular file",
        "gone.jpg": "dangling link",
        "none.jpg": "no such file",
        "self.jpg": "link to itself",
        "huge.jpg": "10,000 MB is over the limit of 1,600 MB",
    }.items():
        with pytest.raises(BadImageError, match=rf"^{reason}$"):
            decode(tmp_path / name, size=8)
    signal.alarm(0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(encode(quarters(), "PNG"))
    path.chmod(0)
    with pytest.raises(BadImageError, match=r"^permission denied$"):
        decode(path, size=8)


def test_pillow_does_not_warn_from_any_thread():
    exif = encode(quarters(), "TIFF", tiffinfo={270: "x" * 50})
    at = exif.index(b"x" * 50)
    cut = exif[:at]  # its directory points behind the end: Pillow warns
    noisy = [encode(quarters().quantize(4), "PNG", transparency=bytes(4)), cut, exif] * 20

    def attempt(data):
        try:
            return decode(data, size=16) is None
        except BadImageError:
            return True

    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        outcomes = list(pool.map(attempt, noisy))
        assert warnings.filters == before
    assert not caught
    assert len(set(outcomes)) == 2
    with pytest.warns(UserWarning, match="Transparency"):  # the control: Pillow alone does
        Image.open(io.BytesIO(noisy[0])).convert("RGB")
