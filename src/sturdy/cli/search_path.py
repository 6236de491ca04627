"""Where options come from besides the project's own ``conf/``: from packages that bring a ``conf/``
of their own.

    hydra.searchpath=[pkg://mypackage.conf]    or [file:///path/conf], on the command line or in
    conf/train.yaml
    entry point of the group "sturdy.conf"     of an installed package: mypackage = "mypackage.conf"

The project's own options come first. No package is imported to find its options.
"""

import sys
from importlib.metadata import entry_points
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from sturdy.cli.signatures import located

KEY = "hydra.searchpath"
GROUP = "sturdy.conf"  # of entry points
FOLDERS: list[Path] = []  # of this process; Hydra makes its plugins itself and hands them nothing


class Folders(SearchPathPlugin):
    """Adds ``FOLDERS`` to every search path that Hydra makes in this process."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in FOLDERS:
            search_path.append(GROUP, f"file://{folder}")


def open_folders(words: list[str], config: Path | None = None) -> list[str]:
    """Let Hydra find the options of the folders that ``words`` name, and of those that installed
    packages announce.

    Args:
        words: of the command line.
        config: the YAML file of the script, whose folders hold where ``words`` name none.

    Returns:
        ``words`` with each folder as an absolute path, so that they mean the same in every process.

    Raises:
        ValueError: if a folder is not there.
    """
    named: list[Path] = []
    out = []
    for word in words:
        if is_place(word):
            folders = [_folder(str(place)) for place in _places(word)]
            quoted = [
                QuotedString(f"file://{folder}", Quote.single).with_quotes() for folder in folders
            ]
            word = f"{KEY}=[{','.join(quoted)}]"
            named += folders
        out.append(word)
    if config and not named:
        named = [
            _folder(str(place)) for place in OmegaConf.select(OmegaConf.load(config), KEY) or ()
        ]
    FOLDERS[:] = [*named, *(folder for folder in announced() if folder not in named)]
    Plugins.instance().register(Folders)
    return out


def announced() -> list[Path]:
    """The folders that installed packages announce; one that is not there costs a line and nothing
    else.
    """
    found = []
    for point in entry_points(group=GROUP):
        if (folder := located(point.value)) and folder.is_dir():
            found.append(folder)
        else:
            print(
                f"warning: a package announces {GROUP} {point.name} = {point.value}, not there",
                file=sys.stderr,
            )
    return found


def is_place(word: str) -> bool:
    """Whether a word of the command line is ``hydra.searchpath=...``."""
    return word.lstrip("+").startswith(f"{KEY}=")


def _places(word: str) -> list[object]:
    try:
        value = OverridesParser.create().parse_override(word).value()
    except HydraException as error:
        raise ValueError(f"{word} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(value, list):
        raise ValueError(
            f"{word} must be a list, such as {KEY}=[file:///path/conf] or "
            f"{KEY}=[pkg://mypackage.conf]"
        )
    return value


def _folder(place: str) -> Path:
    if place.startswith("pkg://"):
        folder = located(place.removeprefix("pkg://").replace("/", "."))
        missing = "there is no such package: install it, or add the folder it lies in to PYTHONPATH"
    else:
        folder, missing = (
            Path(place.removeprefix("file://")).expanduser().absolute(),
            "there is no such folder",
        )
    if folder is None or not folder.is_dir():
        raise ValueError(f"{KEY}=[{place}]: {missing}")
    return folder
