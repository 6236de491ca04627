"""One thread a process: the tests compare bits, and share two cores. And Ctrl-C reaches what they
start.
"""

import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job, and inherited
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Real runs first, since they take longest."""
    items.sort(key=lambda item: not hasattr(item.module, "train"))


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
