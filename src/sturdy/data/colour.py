"""Any kind of pixel a file can hold, to 8-bit RGB.

    visible = alpha * pixel + (1 - alpha) * background        rgb = (1 - ink) * (1 - black)

Colour profiles are not applied. Of up to 16 bits a channel the high 8 are kept. Floats and 32-bit
integers have no
agreed white: it is the first of 1, 255 and 65535 that no pixel exceeds, else the brightest pixel;
    below 0 is black.
"""

import numpy as np
from PIL import Image

from sturdy.data.source import BadImageError

RGB = tuple[int, int, int]

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


def from_cmyk(paper: np.ndarray) -> np.ndarray:
    """What cyan, magenta, yellow and black leave of the paper, uint8 ``(h, w, 4) -> (h, w, 3)``;
    255 is no ink.
    """
    return ((paper[..., :3].astype(np.uint16) * paper[..., 3:] + 127) // 255).astype(np.uint8)


def from_pillow(image: Image.Image, background: RGB) -> np.ndarray:
    """Any of Pillow's modes to uint8 ``(h, w, 3)``."""
    if is_deep(image):
        return np.repeat(_grey(image)[..., None], 3, axis=-1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        base = Image.new("RGB", image.size, background)
        base.paste(image, mask=image.getchannel("A"))
        return np.array(base)
    try:
        return np.array(image.convert("RGB"))
    except ValueError:
        raise BadImageError(f"colour mode {image.mode} is not supported") from None


def is_deep(image: Image.Image) -> bool:
    """Whether the image has more than 8 bits of grey."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _grey(image: Image.Image) -> np.ndarray:
    """More than 8 bits of grey to 8, ``(h, w)``."""
    values = np.array(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode.startswith("I;16"):
        grey = (values >> (tags.get(BITS_PER_SAMPLE, (16,))[0] - 8)).astype(np.uint8)
    else:
        brightest = values.max()
        if not np.isfinite(values).all():
            raise BadImageError("pixels that are not finite")
        white = next((w for w in (1, 255, 65535) if brightest <= w), brightest)
        grey = np.rint(values.clip(0) * np.float64(255 / white)).astype(np.uint8)
    return 255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey
