"""Hosts for a test, or the reason why there can be none."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Cluster, why_impossible


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Three hosts, h1 to h3; skips the test where they cannot be made."""
    if reason := why_impossible(tmp_path):
        pytest.skip(reason)
    with Cluster(tmp_path) as cluster:
        yield cluster
