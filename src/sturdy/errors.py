"""The exceptions of the template, and how an error of a class gets the key of the config."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException

EXIT_USAGE = 2  # the exit code of a mistake or a refusal, as of argparse


class ConfigError(Exception):
    """Settings, data or parts cannot be used as configured; nothing was trained."""


def describe(error: Exception) -> str:
    """Return what is wrong, with the config key that Hydra was instantiating.

    A message that begins with ``argument=`` becomes ``key.argument=``, any other ``key: message``.
    """
    cause = error.__cause__ or error
    found = re.search(r"full_key: (\S+)", str(error))
    message = str(cause)
    if not found or re.search(rf"\b{re.escape(found[1])}\b", message):
        return message
    if re.match(r"\w+=", message):
        return f"{found[1]}.{message}"
    return f"{found[1]}: {message}"


def add_key(message: str, key: str, arguments: Iterable[str]) -> str:
    """Put ``key.`` in front of every ``argument=`` in ``message``, as it is typed."""
    names = "|".join(re.escape(str(argument)) for argument in arguments)
    return re.sub(rf"(?<![\w./=])({names})=", rf"{key}.\1=", message)


@contextmanager
def as_config_error(key: str = "", arguments: Iterable[str] = ()) -> Iterator[None]:
    """Turn what building a part raises about its arguments into ``ConfigError``.

    Args:
        key: of the part, where Hydra is not instantiating it any more and cannot tell its key.
        arguments: the names of the part's arguments.

    Raises:
        ConfigError: a supervisor does not try again.
        OSError: for a failure that may pass, such as a network disk that is away.
    """
    try:
        yield
    except (InstantiationException, ValueError, OSError) as error:
        # Imported here, because torch and Lightning take seconds and a wrong command must not.
        from exact_resume.checkpoint.writer import TRANSIENT_ERRNOS
        from exact_resume.failures import is_out_of_memory

        cause = error.__cause__ or error
        is_transient = isinstance(cause, OSError) and cause.errno in TRANSIENT_ERRNOS
        if is_transient or is_out_of_memory(cause):
            raise cause from None
        message = describe(error)
        raise ConfigError(add_key(message, key, arguments) if key else message) from error
