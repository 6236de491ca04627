"""The private parts of Hydra that the command line needs, as no public way exists.

Each has a test in tests/cli/test_hydra_internals.py. pyproject.toml holds ``hydra-core<1.4``.
"""

from argparse import ArgumentParser

from hydra._internal.callbacks import Callbacks
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override, QuotedString
from hydra.types import HydraContext


def make_flag_parser() -> ArgumentParser:
    """Return Hydra's parser of ``--help``, ``--cfg``, ``-m`` and its other flags."""
    parser = get_args_parser()
    parser.allow_abbrev = False  # else --experiment would be --experimental-rerun
    return parser


def make_launcher_context(loader: ConfigLoader) -> HydraContext:
    """Return what a launcher plugin is set up with; there are no Hydra callbacks."""
    return HydraContext(config_loader=loader, callbacks=Callbacks())


def is_quoted(override: Override) -> bool:
    """Return whether the value stands in quotes, which ``Override.value()`` takes away."""
    return isinstance(override._value, QuotedString)
