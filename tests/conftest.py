"""One thread a process: the tests compare bits, and share two cores."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Real runs first, since they take longest."""
    items.sort(key=lambda item: not hasattr(item.module, "train"))
