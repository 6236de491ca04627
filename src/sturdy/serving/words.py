"""What a request may say. Everything is limited, and nothing of it is a path or code."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

MAX_SEED = 2**53 - 1  # JavaScript keeps larger numbers inexactly
MAX_LABEL = 200  # characters
MAX_PROMPT = 2000  # characters


class Words(NamedTuple):
    """A request. The image is a function of these words and of the checkpoint.

    Attributes:
        seed: of the noise, as ``sample.seed``.
        label: a class, as ``sample.label``; None for the first one.
        prompt: a text, for a run with captions.
        negative: a text to be guided away from; None for the empty one.
        steps: as ``sampler.steps``; None for the server's.
        guidance: as ``guidance.scale``; None for the server's.
    """

    seed: int = 0
    label: str | None = None
    prompt: str | None = None
    negative: str | None = None
    steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Limits:
    """The largest numbers of a request."""

    max_steps: int
    max_guidance: float


def read_words(payload: Any, limits: Limits) -> Words:
    """Return the words of a JSON value.

    Raises:
        ValueError: with the name of the word and its limits.
    """
    if not isinstance(payload, Mapping):
        raise ValueError('the body must be a JSON object, such as {"seed": 1}')
    unknown = [name for name in payload if name not in Words._fields]
    if unknown:
        known = ", ".join(Words._fields)
        raise ValueError(f"{str(unknown[0])[:40]} is no word of a request; there are: {known}")
    words = Words(**{name: value for name, value in payload.items() if value is not None})
    _check_integer("seed", words.seed, 0, MAX_SEED)
    for name, longest in (("label", MAX_LABEL), ("prompt", MAX_PROMPT), ("negative", MAX_PROMPT)):
        _check_text(name, getattr(words, name), longest)
    if words.steps is not None:
        _check_integer("steps", words.steps, 1, limits.max_steps)
    if words.guidance is None:
        return words
    return words._replace(guidance=_checked_number("guidance", words.guidance, limits.max_guidance))


def _check_integer(name: str, value: Any, smallest: int, largest: int) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or not smallest <= value <= largest:
        raise ValueError(f"{name} must be a whole number from {smallest} to {largest}")


def _checked_number(name: str, value: Any, largest: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value <= largest:
        raise ValueError(f"{name} must be a number from 0 to {largest:g}")
    return float(value)


def _check_text(name: str, value: Any, longest: int) -> None:
    if value is not None and (not isinstance(value, str) or len(value) > longest):
        raise ValueError(f"{name} must be a text of at most {longest} characters")
