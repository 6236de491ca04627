"""One thread a process: the tests compare bits, and share two cores.

Which tests start processes is found here, so that ``make test-unit`` can leave them out.
"""

import os
import signal
from collections.abc import Iterator
from types import ModuleType

import pytest

from exact_resume.signals import SIGNALS

os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # inherited from a shell's background job
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # inherited from nohup
    signal.signal(signal.SIGHUP, lambda *_: None)  # still lives; what it starts does not inherit it

HANDLERS = {number: signal.getsignal(number) for number in SIGNALS}

# A test module that imports one of these, or a function of runs.py, starts processes.
STARTERS = {
    *("subprocess", "multiprocessing", "campaign", "mini", "striking", "supervised", "worlds"),
    "s3_server",
}


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark the tests that start processes, and run real trainings first: they take longest."""
    for item in items:
        if starts_processes(item.module):
            item.add_marker(pytest.mark.processes)
    items.sort(key=lambda item: not hasattr(item.module, "train"))


def starts_processes(module: ModuleType) -> bool:
    """Return whether ``module`` imports what starts processes."""
    for value in vars(module).values():
        name = value.__name__ if isinstance(value, ModuleType) else ""
        is_helper = callable(value) and getattr(value, "__module__", None) in {"runs", *STARTERS}
        if name in STARTERS or name.startswith("torch.multiprocessing") or is_helper:
            return True
    return False


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Take back the handlers of a training in this process, so that Ctrl-C ends pytest."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def nobody():
    """The environment of a user without an account."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "MODE",
            "API_KEY",
            "IDENTITY_TOKEN_FILE",
            "BASE_URL",
            "DIR",
            "RUN_ID",
            "RESUME",
        ):
            patch.delenv(f"WANDB_{name}", raising=False)
        patch.setenv("NETRC", "/nowhere/netrc")
        yield patch
