"""Every kind of pixel: palette, alpha, grey, CMYK, 16 bits and floats, as whole files."""

import io

import numpy as np
import pytest
from image_files import COLOURS, corners, encode, near, png, quarters, tiff
from PIL import Image

from sturdy.data.decode import decode
from sturdy.data.source import BadImageError


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "YCbCr", "CMYK"])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG"])
def test_pixel_types(mode, format):
    image = quarters().convert(mode)
    try:
        data = encode(
            image, format, **({"quality": 95, "subsampling": 0} if format == "JPEG" else {})
        )
    except OSError:
        pytest.skip(f"{format} has no {mode}")
    expected = np.array(image.convert("RGB")).transpose(2, 0, 1)
    if mode == "1":  # dithered: compare the whole
        assert abs(decode(data, size=40, crop="random").mean() - expected.mean()) < 3
    else:
        assert near(corners(decode(data, size=40, crop="random")), corners(expected), 6)


def test_cmyk_jpeg_without_adobes_marker_is_not_inverted():
    data = encode(quarters().convert("CMYK"), "JPEG", quality=95)
    at = data.index(b"\xff\xee")
    plain = data[:at] + data[at + 16 :]
    ink = 255 - np.array(Image.open(io.BytesIO(data))).astype(int)  # Pillow inverts always
    rgb = (255 - ink[..., :3]) * (255 - ink[..., 3:]) // 255
    assert near(decode(plain, size=40, crop="random"), rgb.transpose(2, 0, 1), 2)
    assert not near(decode(data, size=40, crop="random"), decode(plain, size=40, crop="random"), 60)


def test_alpha_lies_on_the_background():
    clear = Image.new("L", (60, 40), 51)  # one fifth opaque
    rgba, la = quarters(), quarters().convert("L")
    rgba.putalpha(clear)
    la.putalpha(clear)
    background = (250, 100, 0)
    colours = np.array(COLOURS) * 0.2 + np.array(background) * 0.8
    grey = corners(np.array(quarters().convert("L").convert("RGB")).transpose(2, 0, 1)) * 0.2
    for data in (
        encode(rgba, "PNG"),
        encode(rgba, "TIFF"),
        encode(rgba, "WEBP", lossless=True, exact=True),
    ):
        assert near(
            corners(decode(data, size=40, crop="random", background=background)), colours, 1
        )
    for data in (encode(la, "PNG"), encode(la, "TIFF")):
        found = corners(decode(data, size=40, crop="random", background=background))
        assert near(found, grey + np.array(background) * 0.8, 1)


def test_transparency_of_palettes_and_keys():
    palette = quarters().quantize(4)
    first = palette.getpixel((1, 1))
    keyed = quarters()
    pa = palette.convert("PA")
    pa.putalpha(Image.new("L", (60, 40), 0))
    for data in (
        encode(palette, "PNG", transparency=first),
        encode(palette, "PNG", transparency=bytes(0 if k == first else 255 for k in range(4))),
        encode(palette, "GIF", transparency=first),
        encode(keyed, "PNG", transparency=COLOURS[0]),
    ):
        assert near(
            corners(decode(data, size=40, crop="random", background=(1, 2, 3))),
            ((1, 2, 3), *COLOURS[1:]),
            1,
        )
    assert near(decode(encode(pa, "TIFF"), size=40, background=(9, 9, 9)), 9, 0)


def test_sixteen_bits_keep_their_high_byte():
    grey = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    colour = np.stack([grey, grey[::-1], 65535 - grey // 2], axis=-1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)
    three = np.repeat(grey[None], 3, axis=0)
    for data, expected in [
        (encode(Image.fromarray(grey), "PNG"), three),
        (encode(Image.fromarray(grey), "TIFF"), three),
        (tiff(grey[..., None], photometric=1), three),
        (tiff(65535 - grey[..., None], photometric=0), three),  # white is zero
        (png(60, 40, 16, 2, rows), colour.transpose(2, 0, 1)),
        (tiff(colour, photometric=2), colour.transpose(2, 0, 1)),
    ]:
        assert np.array_equal(decode(data, size=40, crop="random"), expected >> 8)


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0, 1e6])
def test_floats_are_scaled_to_their_white(white):
    ramp = np.linspace(-0.1 * white, white, 40 * 60, dtype=np.float32).reshape(40, 60)
    found = decode(encode(Image.fromarray(ramp), "TIFF"), size=40, crop="random")
    assert np.array_equal(found[0], np.rint(ramp.clip(0) * np.float64(255 / white)))
    assert found.max() == 255
    ramp[0, 0] = np.nan
    with pytest.raises(BadImageError, match="not finite"):
        decode(encode(Image.fromarray(ramp), "TIFF"), size=40)
