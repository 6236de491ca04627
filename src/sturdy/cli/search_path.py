"""Find options outside the project's ``conf/``: in packages of users, which bring their own.

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
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from typing_extensions import override

from sturdy.cli.quoting import quote
from sturdy.cli.signatures import find_source

KEY = "hydra.searchpath"
ENTRY_POINTS = "sturdy.conf"
FOLDERS: list[Path] = []  # of this process: Hydra makes its plugins itself, without arguments


class ConfigFolders(SearchPathPlugin):
    """Adds ``FOLDERS`` to every search path that Hydra makes in this process."""

    @override
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in FOLDERS:
            search_path.append(ENTRY_POINTS, f"file://{folder}")


def add_config_folders(words: list[str], config: Path | None = None) -> list[str]:
    """Let Hydra find options in the folders that ``words`` name and that packages announce.

    Args:
        words: of the command line.
        config: the YAML file of the script; the folders it names count if ``words`` name none.

    Returns:
        ``words`` with absolute folders, so that they mean the same in every process.

    Raises:
        ValueError: if a folder is not there.
    """
    named: list[Path] = []
    absolute_words = []
    for word in words:
        if is_search_path(word):
            folders = [_find_folder(str(place)) for place in _parse_places(word)]
            word = f"{KEY}=[{','.join(quote(f'file://{folder}') for folder in folders)}]"
            named += folders
        absolute_words.append(word)
    if config and not named:
        places = OmegaConf.select(OmegaConf.load(config), KEY) or ()
        named = [_find_folder(str(place)) for place in places]
    FOLDERS[:] = [*named, *(folder for folder in _announced_folders() if folder not in named)]
    Plugins.instance().register(ConfigFolders)
    return absolute_words


def is_search_path(word: str) -> bool:
    """Return whether a word of the command line is ``hydra.searchpath=...``."""
    return word.lstrip("+").startswith(f"{KEY}=")


def _announced_folders() -> list[Path]:
    """Return the folders that installed packages announce; warn of one that is not there."""
    folders = []
    for point in entry_points(group=ENTRY_POINTS):
        folder = find_source(point.value)
        if folder and folder.is_dir():
            folders.append(folder)
        else:
            print(
                f"warning: a package announces {ENTRY_POINTS} {point.name} = {point.value}, which "
                f"is not there",
                file=sys.stderr,
            )
    return folders


def _parse_places(word: str) -> list[object]:
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


def _find_folder(place: str) -> Path:
    if place.startswith("pkg://"):
        folder = find_source(place.removeprefix("pkg://").replace("/", "."))
        missing = "there is no such package: install it, or add the folder it lies in to PYTHONPATH"
    else:
        folder = Path(place.removeprefix("file://")).expanduser().absolute()
        missing = "there is no such folder"
    if folder is None or not folder.is_dir():
        raise ValueError(f"{KEY}=[{place}]: {missing}")
    return folder
