"""One thread a process: the tests compare bits, and share two cores."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_itemcollected(item: pytest.Function) -> None:
    """For several workers: tests that share a costly fixture stay in one of them."""
    definitions = item._fixtureinfo.name2fixturedefs.values()
    if any(definition[-1].scope == "module" for definition in definitions):
        item.add_marker(pytest.mark.xdist_group(item.module.__name__))


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Real runs first, since they take longest."""
    items.sort(key=lambda item: not hasattr(item.module, "train"))
