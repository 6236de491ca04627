"""Checks of arguments. An error names the argument and says which values it takes."""

from collections.abc import Iterable, Sequence
from typing import Any

from PIL import ImageColor

from sturdy.image_size import ImageSize


def is_int(value: Any) -> bool:
    """Return whether ``value`` is a whole number; ``True`` and ``False`` are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_int(name: str, value: Any, *, least: int = 1) -> int:
    """Return ``value`` if it is a whole number of at least ``least``."""
    if not is_int(value) or value < least:
        raise ValueError(f"{name}={value} must be a whole number of at least {least}")
    return value


def check_image_size(name: str, value: Any) -> ImageSize:
    """Return ``value`` if it is a whole number of at least 1, or two of them; a square as one."""
    pair = [value, value] if is_int(value) else value
    is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
    if not is_pair or not all(is_int(side) and side >= 1 for side in pair):
        raise ValueError(
            f"{name}={value} must be a whole number of at least 1, or height and width: [64,96]"
        )
    height, width = pair
    return height if height == width else [height, width]


def check_fraction(name: str, value: Any) -> float:
    """Return ``value`` if it is a number from 0 to 1."""
    if not (is_int(value) or isinstance(value, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is a share: it must be a number from 0 to 1")
    return value


def check_fraction_or_count(name: str, value: Any) -> float:
    """Return ``value`` if it is a number from 0 to 1, or a whole number of at least 1."""
    return value if is_int(value) and value > 1 else check_fraction(name, value)


def check_strings(name: str, value: Any) -> list[str]:
    """Return the strings in ``value``, a list of them or a single one."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Iterable) or not all(isinstance(item, str) and item for item in items):
        raise ValueError(f"{name}={value} must be a list of texts, such as [a,b]")
    return list(items)


def check_choice(name: str, value: Any, options: Iterable[Any]) -> Any:
    """Return ``value`` if it is one of ``options``."""
    options = tuple(options)
    if repr(value) not in map(repr, options):  # by repr, because 1 == True
        allowed = ", ".join(str(option).lower() for option in options)
        raise ValueError(f"{name}={value} must be one of {allowed}")
    return value


def check_colour(name: str, value: Any) -> tuple[int, int, int]:
    """Return red, green and blue of a colour's name (``white``, ``#ff8800``) or of three numbers.

    Raises:
        ValueError: it is no colour; red, green and blue are whole numbers from 0 to 255.
    """
    try:
        red, green, blue = ImageColor.getrgb(value)[:3] if isinstance(value, str) else value
        red = bytes((red, green, blue))[0]  # bytes are whole numbers from 0 to 255
    except (ValueError, TypeError):
        raise ValueError(
            f"{name}={value} must be a colour: a name such as white or black, or three numbers "
            f"[255,128,0]"
        ) from None
    return red, green, blue


def check_text(name: str, value: Any) -> str | None:
    """Return ``value`` if it is a text or ``None``."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name}={value} must be a text; quote it: '{name}=\"{value}\"'")
    return value
