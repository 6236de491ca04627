"""One thread a process: the tests compare bits, and share two cores."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """For several workers: real runs first, since they take longest, and what shares a costly fixture in one place."""
    items.sort(key=lambda item: not hasattr(item.module, "train"))
    for item in items:
        definitions = item._fixtureinfo.name2fixturedefs.values()
        if any(definition[-1].scope == "module" for definition in definitions):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
