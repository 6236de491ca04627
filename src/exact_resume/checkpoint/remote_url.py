"""The URL of a second copy: what it may be, and the file system that it names."""

import re
from pathlib import Path
from typing import Any

EXTRA = "pip install 'sturdy-diffusion[remote]'"


def check_url(url: str) -> None:
    """Check that ``url`` holds no secret, which would go into configs and logs.

    Raises:
        ValueError: without the URL in its message.
    """
    if "://" not in url:
        raise ValueError(
            "remote= must be a URL, such as s3://bucket/runs or file:///other/disk/runs"
        )
    if re.search(r"://[^@]*:[^@]*@", url) or "?" in url:
        raise ValueError(
            "remote= must hold no password and no key, as it goes into configs and logs; give them "
            "in the environment or in the files of the library, such as ~/.aws/credentials"
        )


def connect(url: str) -> tuple[Any, str]:
    """Return the file system of ``url``, and the path in it."""
    try:
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise ValueError(f"remote={url} needs more packages ({error}): {EXTRA}") from None
    except ValueError as error:
        raise ValueError(f"remote={url} cannot be used: {error}") from None
    return fs, str(root).rstrip("/")


def check_mounted(directory: Path) -> None:
    """Check that a directory for second copies exists: its disk may not be mounted."""
    if not directory.is_dir():
        raise ValueError(
            f"remote= needs the directory {directory}, which is not there; make it, or mount its "
            f"disk"
        )
