"""Options as users type them, checked where they arrive: an error names the key and says what it
takes.
"""

from collections.abc import Iterable
from typing import Any

from PIL import ImageColor

from sturdy.data.colour import RGB


def check_int(key: str, value: Any, *, least: int = 1) -> int:
    """``value`` if it is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key}={value} must be a whole number of at least {least}")
    return value


def check_fraction(key: str, value: Any) -> float:
    """``value`` if it is a number from 0 to 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{key}={value} is a share: it must be a number from 0 to 1")
    return value


def check_fraction_or_count(key: str, value: Any) -> float:
    """``value`` if it is a share from 0 to 1, or a whole number of at least 1."""
    return (
        value
        if isinstance(value, int) and not isinstance(value, bool) and value > 1
        else check_fraction(key, value)
    )


def check_strings(key: str, value: Any) -> list[str]:
    """The strings in the list ``value``; one alone will do."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Iterable) or not all(isinstance(item, str) and item for item in items):
        raise ValueError(f"{key}={value} must be a list of texts, such as [a,b]")
    return list(items)


def check_choice(key: str, value: Any, options: Iterable[Any]) -> Any:
    """``value`` if it is one of ``options``."""
    if repr(value) not in map(repr, options):  # by repr, for 1 == True
        raise ValueError(
            f"{key}={value} must be one of {', '.join(str(option).lower() for option in options)}"
        )
    return value


def check_colour(key: str, value: Any) -> RGB:
    """The colour that ``value`` names (``white``, ``#ff8800``) or consists of (three whole numbers,
    0 to 255).
    """
    try:
        red, green, blue = ImageColor.getrgb(value)[:3] if isinstance(value, str) else value
        return bytes((red, green, blue))[0], green, blue  # bytes are whole and at most 255
    except (ValueError, TypeError):
        pass
    raise ValueError(
        f"{key}={value} must be a colour: a name such as white or black, or three numbers "
        f"[255,128,0]"
    )
