"""``python careless_copy.py FAULT copied_run.py ...``: a run whose copy lacks a mechanism."""

import hashlib
import runpy
import sys
from pathlib import Path
from typing import IO

from exact_resume.checkpoint.remote import Remote


def without_reading_back() -> None:
    """Take what was sent for what is there."""

    def put(self: Remote, name: str, file: IO[bytes]) -> tuple[int, str]:
        content = file.read()
        with self._available(writing=True), self._open_new(name) as target:
            target.write(content)
        return len(content), hashlib.sha256(content).hexdigest()

    Remote.put = put  # type: ignore[method-assign]


def with_the_manifest_first() -> None:
    """Send the manifest before the file that it describes."""
    put = Remote.put

    def hasty(self: Remote, name: str, file: IO[bytes]) -> tuple[int, str]:
        if name.endswith("state.ckpt"):
            with Path(file.name).with_name("manifest.json").open("rb") as manifest:
                put(self, name.replace("state.ckpt", "manifest.json"), manifest)
        return put(self, name, file)

    Remote.put = hasty  # type: ignore[method-assign]


FAULTS = {"not-read-back": without_reading_back, "manifest-first": with_the_manifest_first}

if __name__ == "__main__":
    FAULTS[sys.argv[1]]()
    del sys.argv[:2]
    runpy.run_path(sys.argv[0], run_name="__main__")
